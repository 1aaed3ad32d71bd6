"""2,000 watchers on 500 configurations: how soon they hear of a change, and what they cost meanwhile."""

import asyncio
import os
import random
import resource
import time
from email import message_from_string
from pathlib import Path

import httpx
import pytest

from svc.conftest import run_sql
from svc.test.process import service, until

pytestmark = pytest.mark.slow

WATCHERS, CONFIGURATIONS, CHANGES = 2000, 500, 50
PATHS = [f"/api/v1/applications/a/configurations/{number}" for number in range(CONFIGURATIONS)]
SEED = f"""
    INSERT INTO applications (id, name) VALUES ('01ARZ3NDEKTSV4RRFFQ69G5FAV', 'a');
    INSERT INTO configurations (id, application_id, name, config)
    SELECT '01ARZ3NDEKTSV4RRFFQ69G' || to_char(n, 'FM0000'), '01ARZ3NDEKTSV4RRFFQ69G5FAV', n, '{{}}'
    FROM generate_series(0, {CONFIGURATIONS - 1}) AS n
"""


def processor_seconds(pid: int) -> float:
    """What a process and its children have used."""
    used = 0
    for each in [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]:
        user, system = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:13]
        used += int(user) + int(system)
    return used / os.sysconf("SC_CLK_TCK")


async def watch(port: int, path: str, heard: dict[str, float]) -> None:
    """Keep a watch on a configuration, and note when which ETag was heard of."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    query = condition = ""
    try:
        while True:
            head = f"GET {path}{query} HTTP/1.1\r\nHost: localhost\r\n{condition}\r\n"
            writer.write(head.encode())
            answer = (await reader.readuntil(b"\r\n\r\n")).decode()
            assert answer.startswith("HTTP/1.1 200"), answer
            headers = message_from_string(answer.partition("\r\n")[2])
            await reader.readexactly(int(headers["content-length"]))
            heard[headers["etag"]] = time.monotonic()
            query, condition = "?wait=60", f"If-None-Match: {headers['etag']}\r\n"
    finally:
        writer.close()


async def changes(base: str, heard: list[dict[str, float]]) -> list[float]:
    """Seconds from the answer to each change until each of its watchers had heard of it."""
    delays: list[float] = []
    async with httpx.AsyncClient() as client:
        for change in range(CHANGES):
            await asyncio.sleep(random.uniform(0, 0.25))  # else each follows right after a look
            place = change * 7 % CONFIGURATIONS
            response = await client.put(base + PATHS[place], json={"config": {"n": change}})
            done, etag = time.monotonic(), response.headers["etag"]
            watchers = heard[place::CONFIGURATIONS]
            while not all(etag in each for each in watchers):
                assert time.monotonic() - done < 5, "a watcher did not hear of a change"
                await asyncio.sleep(0.005)
            delays += [each[etag] - done for each in watchers]
    return delays


async def measure(pid: int, base: str, workers: int) -> tuple[list[float], float]:
    """The delays of all who hear of changes, and the share of a core that a worker takes while nothing changes."""
    port = int(base.rpartition(":")[2])
    heard: list[dict[str, float]] = [{} for _ in range(WATCHERS)]
    watches = [watch(port, PATHS[number % CONFIGURATIONS], heard[number]) for number in range(WATCHERS)]
    tasks = [asyncio.create_task(each) for each in watches]
    await asyncio.to_thread(until, lambda: all(heard))
    await asyncio.sleep(1)  # the time over which the cost of waiting is measured begins when all wait
    started, used = time.monotonic(), processor_seconds(pid)
    await asyncio.sleep(4)
    share = (processor_seconds(pid) - used) / (time.monotonic() - started) / workers
    delays = await changes(base, heard)
    assert not any(task.done() for task in tasks)
    return sorted(delays), share


@pytest.mark.parametrize(("workers", "p99"), [(1, 0.3), (2, 0.35)])
def test_watchers_hear_soon_and_cost_little(new_database, workers, p99, capsys):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with new_database() as url, service(url, workers=workers, log_level="WARNING") as (process, base):
        run_sql(url, SEED)
        delays, share = asyncio.run(measure(process.pid, base, workers))
    slowest = delays[len(delays) * 99 // 100]
    with capsys.disabled():
        print(f"\n{workers} workers: p50 {delays[len(delays) // 2]:.3f} s, p99 {slowest:.3f} s, {share:.1%} of a core")
    assert slowest < p99
    assert share < 0.04
