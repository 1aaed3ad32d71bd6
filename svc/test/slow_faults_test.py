"""Faults that take their time: `pipenv run test-faults` runs them after the quick ones."""

import os
import random
import secrets
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from svc import migrations
from svc.test import faults
from svc.test.process import until

pytestmark = [pytest.mark.faults, pytest.mark.slow]

CONNECT_TIMEOUT = 2  # seconds: libpq knows no less


# --- Faults under load ---


def is_stopped(server: Path, _: SimpleNamespace) -> None:
    faults.stop(server)
    sleep(1)
    faults.start(server)


def crashes(server: Path, _: SimpleNamespace) -> None:
    faults.crash(server)
    faults.start(server)


def loses_backends(_: Path, served: SimpleNamespace) -> None:
    for _ in range(3):
        faults.kill_one(served.url)


def is_silent(server: Path, served: SimpleNamespace) -> None:
    faults.freeze(server)
    try:
        for _ in range(2 * faults.DEADLINE * 10):
            asked = monotonic()
            assert served.client.get("/health/live").status_code == 200
            assert monotonic() - asked < 1
            # With tokens it waits until they cannot be read.
            assert served.client.post(f"{faults.API}/applications", json={"nam": "x"}).status_code == 400
            sleep(0.1)
    finally:
        faults.resume(server)


def locks_a_table(_: Path, served: SimpleNamespace) -> None:
    with faults.locked(served.url):
        sleep(3)


def becomes_read_only(_: Path, served: SimpleNamespace) -> None:
    name = parse_dsn(served.url)["dbname"]
    faults.sql(served.url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    faults.terminate(served.url)
    sleep(1)
    faults.sql(served.url, f"ALTER DATABASE {name} RESET default_transaction_read_only")


def admits_too_few(_: Path, served: SimpleNamespace) -> None:
    for limit in (0, 2):
        faults.sql(served.url, f"ALTER ROLE service CONNECTION LIMIT {limit}")
        faults.terminate(served.url)
        sleep(1)
    faults.sql(served.url, "ALTER ROLE service CONNECTION LIMIT -1")


FAULTS = [is_stopped, crashes, loses_backends, is_silent, locks_a_table, becomes_read_only, admits_too_few]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_database_that_fails_under_load_costs_503_in_time_and_no_acknowledged_write(server, served, fault):
    with faults.writers(served) as ledger:
        usual = faults.pace(ledger)
        fault(server, served)
        until(lambda: faults.answers(served.url))
        faults.at_full_pace(ledger, usual, monotonic())
    assert max(each.ended - each.began for each in ledger.attempts) < faults.DEADLINE + 1
    faults.compare(served.url, ledger)
    faults.recovered(served, served.before)


# --- From the start on ---


def test_a_database_that_is_down_at_the_start_is_503_and_two_lines_in_the_log_until_it_is_there(server):
    url = faults.new_database(server)
    faults.stop(server)
    with faults.serving(url, log_level="INFO") as served:
        for path in (f"{faults.API}/applications", f"{faults.API}/applications/{faults.UNKNOWN}", "/health"):
            answer = served.client.get(path)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        faults.start(server)
        assert served.client.get("/health").status_code == 200
        with faults.writers(served) as ledger:
            until(lambda: "database available again" in served.log.read_text())
        faults.compare(url, ledger)
        assert served.log.read_text().count("database unavailable: ") == 1
        faults.recovered(served, faults.filled(served))


def test_a_schema_that_is_missing_is_503_until_it_is_there(server):
    url = faults.new_database(server, migrated=False)
    with faults.serving(url) as served:
        paths = (f"{faults.API}/applications/{faults.UNKNOWN}", f"{faults.API}/applications", "/health")
        answers = [served.client.get(path) for path in paths]
        assert [answer.status_code for answer in answers] == [503] * 3
        assert "no tables" in answers[2].json()["detail"]
        migrations.up(url)
        assert [served.client.get(path).status_code for path in paths] == [404, 200, 200]


# --- Shutdown ---


@pytest.mark.parametrize(("shutdown", "statement"), [(10, 1), (1, 4)])
def test_sigterm_waits_for_statements_as_long_as_they_or_it_may_take_and_answers_503(server, shutdown, statement):
    limits = {"db_lock_timeout": statement, "db_statement_timeout": statement, "db_deadline": statement + 1}
    with faults.serving(faults.new_database(server), shutdown_timeout=shutdown, **limits) as served:
        with faults.at_work(served, [("POST", "/applications")] * faults.CONNECTIONS) as asked:
            served.process.send_signal(signal.SIGTERM)
            stopped = monotonic()
            answered = [each.result() for each in asked]
            assert [(each.status_code, each.headers["retry-after"]) for each in answered] == [(503, "1")] * len(asked)
            assert served.process.wait(10) == 0
            assert monotonic() - stopped < 1 + 1
        if statement < shutdown:  # PostgreSQL refused them: of a connection that is lost, nobody knows
            assert faults.sql(served.url, "SELECT id FROM applications") == []


@pytest.mark.parametrize(("away", "back"), [(faults.freeze, faults.resume), (faults.stop, faults.start)])
def test_sigterm_ends_in_time_while_the_database_is_away(server, away, back):
    with faults.serving(faults.new_database(server), shutdown_timeout=3) as served:
        with faults.writers(served) as ledger:
            faults.pace(ledger)
            away(server)
            try:
                until(lambda: any(each.status == 503 for each in ledger.attempts))
                ledger.ending.set()
                served.process.send_signal(signal.SIGTERM)
                stopped = monotonic()
                assert served.process.wait(20) == 0
                assert monotonic() - stopped < 3 + CONNECT_TIMEOUT + 1
            finally:
                back(server)
        assert not [each for each in ledger.attempts if each.status == 0 and each.began < stopped]
        faults.compare(served.url, ledger)


# --- Two hosts ---


@contextmanager
def replicated(server: Path) -> Iterator[tuple[Path, Path, SimpleNamespace]]:
    """A primary whose commits wait for its standby, their folders, and the service on both."""
    with faults.folders() as parent:
        primary, standby = parent / "a", parent / "b"
        faults.copy(server, primary)
        faults.start(primary)
        url = faults.new_database(primary)
        faults.copy(primary, standby, "-R")
        faults.start(standby)
        faults.sql(url, "ALTER SYSTEM SET synchronous_standby_names = 'b'")
        faults.sql(url, "SELECT pg_reload_conf()")
        until(lambda: faults.sql(url, "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"))
        both = make_dsn(url, host=f"{primary},{standby}", target_session_attrs="read-write")
        with faults.serving(both, db_deadline=CONNECT_TIMEOUT + 1) as served:
            served.url = url
            served.before = faults.filled(served)
            yield primary, standby, served


@pytest.mark.parametrize(("fault", "seconds"), [(faults.crash, 2), (faults.freeze, CONNECT_TIMEOUT + 1 + 2)])
def test_a_standby_takes_over_and_no_acknowledged_write_is_lost(server, fault, seconds):
    with replicated(server) as (primary, standby, served):
        with faults.writers(served) as ledger:
            usual = faults.pace(ledger)
            fault(primary)
            faults.control(standby, "promote")
            faults.at_full_pace(ledger, usual, monotonic(), seconds)
        served.url = make_dsn(served.url, host=str(standby))
        faults.crash(primary)
        faults.compare(served.url, ledger)
        faults.recovered(served, served.before)


def test_a_host_that_vanished_costs_one_deadline_however_many_connections_led_to_it(server):
    with replicated(server) as (primary, standby, served):
        faults.freeze(primary)
        faults.control(standby, "promote")
        answers = [served.client.post(f"{faults.API}/applications", json={"name": f"n{n}"}) for n in range(20)]
        assert [answer.status_code for answer in answers] == [503] + [201] * 19


def test_writes_are_503_while_the_standby_that_they_wait_for_is_away(server):
    with replicated(server) as (_, standby, served):
        with faults.writers(served) as ledger:
            usual = faults.pace(ledger)
            faults.stop(standby)
            until(lambda: any(each.status == 503 for each in ledger.attempts))
            assert served.client.get(f"{faults.API}/applications?limit=1").status_code == 200
            assert served.client.get("/health").status_code == 200
            faults.start(standby)
            faults.at_full_pace(ledger, usual, monotonic())
        faults.compare(served.url, ledger)
        faults.recovered(served, served.before)


def test_a_host_that_is_silent_holds_up_no_other_connection(server):
    live = faults.new_database(server)
    with tempfile.TemporaryDirectory() as silent, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{silent}/.s.PGSQL.5432")
        listening.listen(100)
        limits = {"db_deadline": 4.5, "db_statement_timeout": 3, "db_lock_timeout": 3}
        with faults.serving(make_dsn(live, host=f"{silent},{server}"), **limits) as served:
            served.url = live
            faults.filled(served)  # all at once: each takes CONNECT_TIMEOUT, and together they would take five of it


# --- All of it, for minutes ---


def memory(pid: int) -> int:
    """What a process has in memory, in MiB."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) // 1024


@pytest.mark.soak
def test_random_faults_lose_nothing_and_leave_nothing_behind(server):
    """`pipenv run soak`, with tokens, for SOAK_MINUTES (5). SOAK_SEED repeats the faults of another run."""
    minutes = float(os.environ.get("SOAK_MINUTES", "5"))
    seed = os.environ.get("SOAK_SEED", secrets.token_hex(4))
    print(f"\nSOAK_MINUTES={minutes:g} SOAK_SEED={seed}")
    choose = random.Random(seed).choice
    url, token = faults.new_database(server), f"cfs_{secrets.token_hex(32)}"
    hash = sha256(token.encode()).hexdigest()
    faults.sql(url, "INSERT INTO tokens (name, hash, role) VALUES ('soak', %s, 'write')", hash)
    with faults.serving(url, token=token, auth="on") as served:
        with faults.writers(served) as ledger:
            faults.pace(ledger, 1000)
            small, end = memory(served.process.pid), monotonic() + minutes * 60
            while monotonic() < end:
                fault = choose(FAULTS)
                fault(server, served)
                until(lambda: faults.answers(served.url))
                print(f"{faults.pace(ledger):5.0f} requests/s after the database {fault.__name__}", flush=True)
            large = memory(served.process.pid)
        faults.compare(served.url, ledger)
        refused = sum(each.status == 503 for each in ledger.attempts)
        print(f"{len(ledger.attempts)} requests, {refused} times 503, {len(ledger.acknowledged)} documents")
        print(f"memory {small} MiB before, {large} MiB after")
        assert large < small * 1.2 + 10
