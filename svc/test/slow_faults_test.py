"""Faults that take their time: `pipenv run test-faults` runs them after the quick ones."""

import asyncio
import os
import signal
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from psycopg2.extensions import make_dsn

from svc import migrations
from svc.test.faults import (
    AT_WORK,
    CONNECTIONS,
    UNKNOWN,
    all_at_once,
    answers,
    backends,
    compare,
    copy,
    crash,
    filled,
    folders,
    freeze,
    full_rate,
    initialise,
    locked,
    new_database,
    promote,
    recovered,
    request,
    restart,
    resume,
    running,
    serving,
    sql,
    start,
    stop,
    terminate,
    usual_rate,
    writers,
    written,
)
from svc.test.process import free_port, until

pytestmark = [pytest.mark.faults, pytest.mark.slow]

DEADLINE = 4.5  # DB_DEADLINE


def crash_and_start(folder: Path, _: str) -> None:
    crash(folder)
    start(folder)


def kill_backends(_: Path, url: str) -> None:
    """Five times one, as the kernel does when memory runs out. The postmaster then ends the others, and recovers."""
    for _ in range(5):
        pids = until(lambda: answers(url) and backends(url))
        os.kill(pids[0], signal.SIGKILL)
        until(lambda: not any(map(running, pids)))  # noqa: B023


def terminate_again_and_again(_: Path, url: str) -> None:
    end = monotonic() + 6
    while monotonic() < end:
        terminate(url)
        sleep(0.1)


@pytest.mark.parametrize(
    "fault", [lambda folder, _: restart(folder), crash_and_start, kill_backends, terminate_again_and_again]
)
def test_what_ends_the_connections_under_load_costs_503_and_no_acknowledged_write(server, fault):
    with serving(new_database(server)) as served:
        before = filled(served)
        with writers(served.base) as ledger:
            usual = usual_rate(ledger)
            fault(server, served.url)
            until(lambda: answers(served.url))
            full_rate(ledger, usual, monotonic())
        compare(served.url, ledger)
        recovered(served, before)


def test_a_silent_database_is_503_within_the_deadline_and_used_again_at_once(server):
    with serving(new_database(server)) as served:
        before = filled(served)
        with writers(served.base, 8) as ledger:
            usual = usual_rate(ledger)
            freeze(server)
            frozen = monotonic()
            try:
                slowest = 0.0
                while monotonic() < frozen + 10:
                    asked = monotonic()
                    assert served.client.get("/health/live").status_code == 200
                    assert served.client.post("/api/v1/applications", json={"nam": "x"}).status_code == 400
                    slowest = max(slowest, monotonic() - asked)
                    sleep(0.1)
            finally:
                resume(server)
            full_rate(ledger, usual, monotonic())
        assert slowest < 0.5
        assert max(each.seconds for each in ledger.attempts) < DEADLINE + 1
        compare(served.url, ledger)
        recovered(served, before)


def test_a_database_that_is_down_is_503_at_start_and_later_until_it_is_back(server):
    url = new_database(server)
    stop(server)
    with serving(url) as served:
        for _ in range(2):
            for path in ("/api/v1/applications", f"/api/v1/applications/{UNKNOWN}", "/health"):
                answer = served.client.get(path)
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert served.client.get("/health/live").status_code == 200
            start(server)
            assert served.client.get("/health").status_code == 200
            before = filled(served)
            with writers(served.base) as ledger:
                usual = usual_rate(ledger)
                stop(server)
                down = monotonic()
                until(lambda: monotonic() > down + 5)  # noqa: B023
                start(server)
                full_rate(ledger, usual, monotonic())
            compare(url, ledger)
            recovered(served, before)
            sql(url, "TRUNCATE applications CASCADE")
            stop(server)
    start(server)


def test_a_schema_that_is_missing_is_503_until_it_is_there(server):
    url = new_database(server, migrated=False)
    with serving(url) as served:
        for _ in range(10):
            for path in ("/applications", f"/applications/{UNKNOWN}", f"/configurations/{UNKNOWN}"):
                assert served.client.get(f"/api/v1{path}").status_code == 503
            assert served.client.post("/api/v1/applications", json={"name": "x"}).status_code == 503
        health = served.client.get("/health")
        assert health.status_code == 503
        assert "pending" in health.json()["detail"]
        assert served.client.get("/health/live").status_code == 200
        migrations.up(url)
        assert served.client.get("/health").status_code == 200
        before = filled(served)
        with writers(served.base) as ledger:
            written(ledger)
        compare(url, ledger)
        recovered(served, before)


def test_a_table_that_another_session_locks_is_503_within_the_time_limit(server):
    with serving(new_database(server)) as served:
        before = filled(served)
        with writers(served.base) as ledger:
            usual = usual_rate(ledger)
            with locked(served.url, "applications"):
                held = monotonic()
                while monotonic() < held + 10:
                    assert served.client.get("/health").status_code == 200
                    sleep(0.1)
            full_rate(ledger, usual, monotonic())
        assert max(each.seconds for each in ledger.attempts) < 2 + 1  # DB_LOCK_TIMEOUT
        compare(served.url, ledger)
        recovered(served, before)


def test_beyond_the_queue_clients_get_503_at_once_and_those_in_it_are_answered(server):
    with (
        serving(new_database(server), db_queue_limit=20, db_lock_timeout=3) as served,
        ThreadPoolExecutor(1) as clients,
    ):
        before = filled(served)
        requests = [request("POST", "/applications", {"name": f"n{n}"}) for n in range(500)]
        with locked(served.url, "applications"):
            asked = clients.submit(asyncio.run, all_at_once(served.base, requests[:20]))
            until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
            refused = asyncio.run(all_at_once(served.base, requests[20:]))
            assert Counter(refused) == {503: 480}
            assert not asked.done()
        assert asked.result() == [201] * 20
        recovered(served, before)


def test_many_readers_of_different_documents_are_served_for_longer_than_the_deadline(server):
    settings = {"db_deadline": 1, "db_statement_timeout": 0.9, "db_lock_timeout": 0.5}
    with serving(new_database(server), **settings) as served:
        ids = [f"{UNKNOWN[:-3]}{n}" for n in range(100, 400)]
        sql(served.url, "INSERT INTO applications (id, name) SELECT id, id FROM unnest(%s) AS id", ids)
        requests = [request("GET", f"/applications/{id}") for id in ids]
        statuses = asyncio.run(again_and_again(served.base, requests, 3))
        assert statuses.keys() == {200}


async def again_and_again(base: str, requests: list[bytes], seconds: float) -> Counter[int]:
    """The statuses of requests that are repeated for so long, each on a connection of its own."""
    host, port = base.removeprefix("http://").split(":")
    seen: Counter[int] = Counter()
    end = monotonic() + seconds

    async def repeat(sent: bytes) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while monotonic() < end:
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
            seen[int(head.split()[1])] += 1
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*map(repeat, requests))
    return seen


def ask(clients: ThreadPoolExecutor, served: Any) -> list[Any]:
    """As many writes as there are connections, all waiting for the table, which is locked."""
    path = "/api/v1/applications"
    asked = [clients.submit(served.client.post, path, json={"name": f"n{n}"}) for n in range(CONNECTIONS)]
    until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
    return asked


def test_sigterm_waits_for_statements_that_run_into_their_time_limit(server):
    with serving(new_database(server)) as served, ThreadPoolExecutor(CONNECTIONS) as clients:
        with locked(served.url, "applications"):
            asked = ask(clients, served)
            served.process.send_signal(signal.SIGTERM)
            assert {each.result().status_code for each in asked} == {503}
            assert served.process.wait(2) == 0
        assert sql(served.url, "SELECT FROM applications") == []


def test_sigterm_ends_what_takes_longer_than_its_time_and_answers_503(server):
    url = new_database(server)
    with (
        serving(url, shutdown_timeout=1) as served,
        ThreadPoolExecutor(CONNECTIONS) as clients,
        locked(url, "applications"),
    ):
        asked = ask(clients, served)
        served.process.send_signal(signal.SIGTERM)
        stopped = monotonic()
        answered = [each.result() for each in asked]
        assert {(each.status_code, each.headers["retry-after"]) for each in answered} == {(503, "1")}
        assert served.process.wait(10) == 0
        assert monotonic() - stopped < 1 + 1


@pytest.mark.parametrize("fault", [freeze, stop])
def test_sigterm_ends_in_time_while_the_database_is_away(server, fault):
    with serving(new_database(server), shutdown_timeout=6) as served:
        filled(served)
        with writers(served.base, 8) as ledger:
            written(ledger)
            fault(server)
            try:
                until(lambda: any(each.status == 503 for each in ledger.attempts))
                ledger.ending.set()
                served.process.send_signal(signal.SIGTERM)
                stopped = monotonic()
                assert served.process.wait(20) == 0
                assert monotonic() - stopped < 6 + 2 + 1  # SHUTDOWN_TIMEOUT, DB_CONNECT_TIMEOUT
            finally:
                resume(server)
                if fault is stop:
                    start(server)
        assert not [each for each in ledger.attempts if each.status == 0 and each.at < stopped]
        compare(served.url, ledger)


@contextmanager
def replicated() -> Iterator[tuple[Path, Path, str, str]]:
    """A primary whose commits wait for its standby, their folders, the primary's URL, and the URL of both."""
    with folders() as parent:
        primary, standby = parent / "a", parent / "b"
        initialise(primary)
        start(primary)
        url = new_database(primary)
        copy(primary, standby)
        start(standby)
        sql(url, "ALTER SYSTEM SET synchronous_standby_names = 'b'")
        sql(url, "SELECT pg_reload_conf()")
        until(lambda: sql(url, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        yield primary, standby, url, make_dsn(url, host=f"{primary},{standby}", target_session_attrs="read-write")


@pytest.mark.parametrize(("fault", "seconds"), [(crash, 2), (freeze, DEADLINE + 2)])
def test_a_standby_takes_over_and_no_acknowledged_write_is_lost(fault, seconds):
    with replicated() as (primary, standby, url, both), serving(both) as served:
        served.url = url
        before = filled(served)
        with writers(served.base) as ledger:
            usual = usual_rate(ledger)
            fault(primary)
            promote(standby)
            full_rate(ledger, usual, monotonic(), seconds)
        served.url = make_dsn(url, host=str(standby))
        crash(primary)
        compare(served.url, ledger)
        recovered(served, before)


def test_a_host_that_vanished_costs_one_deadline_however_many_connections_led_to_it():
    with replicated() as (primary, standby, url, both), serving(both) as served:
        served.url = url
        filled(served)
        freeze(primary)
        promote(standby)
        statuses = [served.client.post("/api/v1/applications", json={"name": f"n{n}"}).status_code for n in range(20)]
        assert statuses == [503] + [201] * 19


def test_writes_are_503_while_the_standby_that_they_wait_for_is_away():
    with replicated() as (_, standby, url, both), serving(both) as served:
        served.url = url
        before = filled(served)
        with writers(served.base) as ledger:
            usual = usual_rate(ledger)
            stop(standby)
            until(lambda: any(each.status == 503 for each in ledger.attempts))
            assert served.client.get("/api/v1/applications?limit=1").status_code == 200
            assert served.client.get("/health").status_code == 200
            start(standby)
            full_rate(ledger, usual, monotonic())
        compare(served.url, ledger)
        recovered(served, before)


def test_a_host_that_is_silent_holds_up_no_other_connection(server):
    live = new_database(server)
    with tempfile.TemporaryDirectory() as silent, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{silent}/.s.PGSQL.5432")
        listening.listen(100)
        url = make_dsn(live, host=f"{silent},{server}")
        with serving(url, db_lock_timeout=3) as served:
            served.url = live
            filled(served)  # all at once: each takes DB_CONNECT_TIMEOUT, and together they would take five of it


def test_the_system_probes_idle_connections_before_a_firewall_forgets_them(server):
    port = free_port()
    restart(server, listen_addresses="127.0.0.1", port=port)
    try:
        url = new_database(server, port=port)
        with serving(make_dsn(url, host="127.0.0.1")) as served:
            filled(served)
            rows = [line.split() for line in Path(f"/proc/{served.process.pid}/net/tcp").read_text().splitlines()[1:]]
            timers = [row[5].split(":") for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"]
            service_timers = [(kind, int(when, 16) / 100) for kind, when in timers]
            assert len(service_timers) == CONNECTIONS
            assert all(kind == "02" and seconds <= 30 for kind, seconds in service_timers)  # 02: keepalive
    finally:
        restart(server)
