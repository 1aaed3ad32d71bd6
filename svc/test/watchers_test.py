"""2,000 watchers on 500 configurations: how soon they hear of a change, and what they cost meanwhile."""

import asyncio
import json
import os
import resource
import time
from typing import Any

import httpx
import pytest

from svc.conftest import run_sql
from svc.test.process import service, until

pytestmark = pytest.mark.slow

WATCHERS, CONFIGURATIONS, CHANGES = 2000, 500, 20
APPLICATION = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


@pytest.fixture(autouse=True)
def descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def seed(url: str) -> list[str]:
    run_sql(url, "INSERT INTO applications (id, name) VALUES (%s, 'a')", APPLICATION)
    run_sql(
        url,
        """
        INSERT INTO configurations (id, application_id, name, config)
        SELECT '01ARZ3NDEKTSV4RRFFQ69G' || to_char(n, 'FM0000'), %s, 'n' || n, '{}'
        FROM generate_series(1, %s) AS n
        """,
        APPLICATION,
        CONFIGURATIONS,
    )
    return [row["id"] for row in run_sql(url, "SELECT id FROM configurations ORDER BY id")]


def processes(pid: int) -> list[int]:
    """A process and its children that serve: without workers, the process itself."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    serving = [child for child in children if b"spawn_main" in command(child)]
    return serving or [pid]


def command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def resident(pid: int) -> int:
    """Kilobytes of memory."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def processor_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def watch(port: int, id: str, heard: dict[int, dict[int, float]], number: int) -> None:
    """Keep a watch on a configuration, and note when which version was heard of."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    version = 1
    try:
        while True:
            version = await heard_of(reader, writer, id, version)
            heard[number][version] = time.monotonic()
    finally:
        writer.close()


async def heard_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, id: str, version: int) -> int:
    """The version that comes after one."""
    tag = f'If-None-Match: "{id}.{version}"'
    request = f"GET /api/v1/configurations/{id}?wait=60 HTTP/1.1\r\nHost: localhost\r\n{tag}\r\n\r\n"
    writer.write(request.encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    assert head.startswith("HTTP/1.1 200"), head
    length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
    return json.loads(await reader.readexactly(length))["version"]


def waiting(base: str, workers: int) -> bool:
    """Whether all wait. One process tells of its own only."""
    return httpx.get(f"{base}/health").json()["waiters"] > (WATCHERS - 1 if workers == 1 else WATCHERS * 0.2)


async def changes(base: str, ids: list[str], heard: dict[int, dict[int, float]]) -> list[float]:
    """Seconds from the answer to each change until each of its watchers had heard of it."""
    delays: list[float] = []
    async with httpx.AsyncClient() as client:
        for change in range(CHANGES):
            place = change * 7 % CONFIGURATIONS
            response = await client.put(f"{base}/api/v1/configurations/{ids[place]}", json={"config": {"n": change}})
            done, version = time.monotonic(), response.json()["version"]
            watchers = range(place, WATCHERS, CONFIGURATIONS)
            while not all(version in heard[number] for number in watchers):
                assert time.monotonic() - done < 5, "a watcher did not hear of a change"
                await asyncio.sleep(0.005)
            delays += [heard[number][version] - done for number in watchers]
    return delays


@pytest.mark.parametrize(("workers", "p99"), [(1, 0.1), (2, 1.2)])
def test_watchers_hear_soon_and_cost_little(new_database, workers, p99, capsys):
    with new_database() as url, service(url, workers=workers, log_level="WARNING") as (process, base):
        ids = seed(url)
        port = int(base.rpartition(":")[2])
        until(lambda: len(processes(process.pid)) == workers)
        httpx.get(f"{base}/api/v1/configurations/{ids[0]}")
        serving = processes(process.pid)
        before = sum(map(resident, serving))

        async def scenario() -> dict[str, Any]:
            heard: dict[int, dict[int, float]] = {number: {} for number in range(WATCHERS)}
            tasks = []
            for number in range(WATCHERS):
                tasks.append(asyncio.create_task(watch(port, ids[number % CONFIGURATIONS], heard, number)))
                if number % 100 == 0:
                    await asyncio.sleep(0.02)
            await asyncio.to_thread(until, lambda: waiting(base, workers))
            await asyncio.sleep(1)  # the time over which the cost of waiting is measured begins after the start
            memory = sum(map(resident, serving)) - before
            started, used = time.monotonic(), sum(map(processor_seconds, serving))
            await asyncio.sleep(4)
            share = (sum(map(processor_seconds, serving)) - used) / (time.monotonic() - started) / workers
            delays = sorted(await changes(base, ids, heard))
            assert not any(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return {
                "p50 s": delays[len(delays) // 2],
                "p99 s": delays[int(len(delays) * 0.99)],
                "KB a watcher": memory / WATCHERS,
                "share of a core": share,
            }

        found = asyncio.run(scenario())
        with capsys.disabled():
            print(f"\n{workers} workers:", {name: round(value, 3) for name, value in found.items()})
        assert found["p99 s"] < p99
        assert found["KB a watcher"] < 50
        assert found["share of a core"] < 0.05
