"""Minutes of load with a random fault every 15 seconds: `pipenv run soak`, for SOAK_MINUTES (5), after SOAK_SEED."""

import asyncio
import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
from psycopg2.extensions import parse_dsn

from svc.test.faults import (
    all_at_once,
    answers,
    compare,
    connect,
    filled,
    freeze,
    leave,
    locked,
    new_database,
    recovered,
    request,
    restart,
    resume,
    serving,
    sql,
    start,
    stop,
    terminate,
    writers,
    written,
)
from svc.test.process import until
from svc.test.slow_faults_test import crash_and_start, kill_backends

pytestmark = pytest.mark.soak

EVERY = 15


def restarted(server: Path, _: SimpleNamespace) -> None:
    restart(server)


def crashed(server: Path, served: SimpleNamespace) -> None:
    crash_and_start(server, served.url)


def backends_killed(server: Path, served: SimpleNamespace) -> None:
    kill_backends(server, served.url)


def connections_terminated(_: Path, served: SimpleNamespace) -> None:
    for _ in range(30):
        terminate(served.url)
        sleep(0.1)


def frozen(server: Path, _: SimpleNamespace) -> None:
    freeze(server)
    try:
        sleep(6)
    finally:
        resume(server)


def down(server: Path, _: SimpleNamespace) -> None:
    stop(server)
    sleep(5)
    start(server)


def table_locked(_: Path, served: SimpleNamespace) -> None:
    with locked(served.url, "applications"):
        sleep(5)


def read_only(_: Path, served: SimpleNamespace) -> None:
    name = parse_dsn(served.url)["dbname"]
    sql(served.url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    terminate(served.url)
    sleep(3)
    sql(served.url, f"ALTER DATABASE {name} RESET default_transaction_read_only")


def too_few_connections(_: Path, served: SimpleNamespace) -> None:
    sql(served.url, "ALTER ROLE service CONNECTION LIMIT 1")
    terminate(served.url)
    sleep(3)
    sql(served.url, "ALTER ROLE service CONNECTION LIMIT -1")


def many_clients(_: Path, served: SimpleNamespace) -> None:
    assert set(asyncio.run(all_at_once(served.base, [request("GET", "/applications?limit=1")] * 500))) <= {200, 503}


def clients_gone(_: Path, served: SimpleNamespace) -> None:
    for n in range(500):
        whole = request("GET", "/applications?limit=1")
        leave(connect(served.base, whole[: n % 2 * 20 or None]), reset=n % 3 == 0)


FAULTS: list[Callable[[Path, SimpleNamespace], None]] = [
    restarted,
    crashed,
    backends_killed,
    connections_terminated,
    frozen,
    down,
    table_locked,
    read_only,
    too_few_connections,
    many_clients,
    clients_gone,
]


def memory(pid: int) -> int:
    """What a process has in memory, in MiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024


def test_random_faults_lose_nothing_and_leave_nothing_behind(server):
    minutes = float(os.environ.get("SOAK_MINUTES", "5"))
    seed = int(os.environ.get("SOAK_SEED", secrets.randbelow(10**6)))
    print(f"\nSOAK_MINUTES={minutes:g} SOAK_SEED={seed}")
    choice = random.Random(seed).choice
    with serving(new_database(server)) as served:
        before = filled(served)
        with writers(served.base) as ledger:
            many_clients(server, served)  # what 500 connections took is kept, and used again
            written(ledger, 1000)
            small = memory(served.process.pid)
            for number in range(1, int(minutes * 60 / EVERY) + 1):
                began = monotonic()
                fault = choice(FAULTS)
                fault(server, served)
                until(lambda: answers(served.url))
                returned = monotonic()
                written(ledger)
                took = monotonic() - returned
                large = memory(served.process.pid)
                print(f"{number:3}  {fault.__name__:24} {took:5.2f} s to 100 requests  {large} MiB", flush=True)
                until(lambda: monotonic() > began + EVERY, EVERY)  # noqa: B023
        compare(served.url, ledger)
        recovered(served, before)
        refused = sum(each.status == 503 for each in ledger.attempts)
        print(f"{len(ledger.attempts)} requests, {refused} times 503, {len(ledger.acknowledged)} documents")
        print(f"memory {small} MiB before, {large} MiB after")
        assert large < small * 1.2 + 10
