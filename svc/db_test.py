import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn
from psycopg2.extensions import parse_dsn as parsed

from svc import db
from svc.conftest import run_sql
from svc.settings import Settings
from svc.test.process import free_port

SECRET = "hunter2"


@pytest.fixture(scope="module")
def url(new_database):
    """A database of its own: these tests open and close the pool that the session's service would use."""
    with new_database() as made:
        run_sql(made, "CREATE TABLE ledger (n integer PRIMARY KEY)")
        yield made


def run(url: str, work: Callable[[], Awaitable[Any]], **settings: Any) -> Any:
    """What the work returns, with a pool of its own."""

    async def opened() -> Any:
        async with db.opened(Settings(database_url=url, **settings)):
            return await work()

    return asyncio.run(opened())


@pytest.fixture(autouse=True)
def apart(monkeypatch):
    """The pool of the session's service is put back afterwards, should it run."""
    for name in ("_settings", "_url", "_pool", "_executor"):
        monkeypatch.setattr(db, name, getattr(db, name, None), raising=False)


async def value(statement: str, within: float | None = None, **params: Any) -> Any:
    """The only value of the only row."""
    [row] = await db.fetch("test", statement, params, within)
    [found] = row.values()
    return found


async def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """As svc.test.process.until, without holding up the loop."""
    end = monotonic() + seconds
    while not (found := condition()):
        assert monotonic() < end, f"waited {seconds} s in vain"
        await asyncio.sleep(0.005)
    return found


def free(limit: int) -> None:
    """The pool is whole: no slot in use, none lost."""
    assert (db.use()["busy"], db.use()["queued"], db.use()["limit"]) == (0, 0, limit)


# --- Connections ---


def test_every_connection_has_its_time_zone_limits_and_name(url):
    async def work() -> list[str]:
        names = ("timezone", "statement_timeout", "lock_timeout", "application_name", "client_encoding")
        return [await value(f"SELECT current_setting('{name}')") for name in names]

    assert run(url, work) == ["UTC", "3s", "2s", "config-service", "UTF8"]
    assert run(url, work, db_lock_timeout=0.25, db_statement_timeout=1.5)[1:3] == ["1500ms", "250ms"]


def test_what_the_url_says_wins(url):
    async def work() -> list[str]:
        names = ("timezone", "statement_timeout", "lock_timeout", "application_name", "work_mem")
        return [await value(f"SELECT current_setting('{name}')") for name in names]

    said = make_dsn(url, application_name="mine", options="-c statement_timeout=1234 -c work_mem=1MB")
    assert run(said, work) == ["UTC", "1234ms", "2s", "mine", "1MB"]
    assert "connect_timeout=7" in db._dsn(Settings(database_url=make_dsn(url, connect_timeout=7)))
    several = db._dsn(Settings(database_url="postgresql://a,b:5433/x?target_session_attrs=read-write"))
    assert parsed(several).items() >= {"host": "a,b", "port": ",5433", "target_session_attrs": "read-write"}.items()


def test_text_is_utf_8_whatever_the_url_says(url):
    async def work() -> str:
        return await value("SELECT %(text)s::text", text="中𝕏")

    assert run(make_dsn(url, client_encoding="LATIN1"), work) == "中𝕏"


def test_statements_commit_by_themselves_and_one_that_fails_undoes_nothing_else(url):
    async def work() -> None:
        await value("INSERT INTO ledger VALUES (1) RETURNING n")
        with pytest.raises(psycopg2.errors.UniqueViolation):
            await value("INSERT INTO ledger VALUES (2), (1) RETURNING n")
        assert await value("SELECT array_agg(n) FROM ledger") == [1]

    run(url, work)
    assert run_sql(url, "DELETE FROM ledger RETURNING n") == [{"n": 1}]


def test_the_pool_opens_few_keeps_those_it_opened_and_closes_all(url):
    name = f"pool-{os.getpid()}"
    count = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'"

    async def work() -> None:
        assert db.use() == {"busy": 0, "idle": 2, "limit": 5, "queued": 0}
        await asyncio.gather(*(value("SELECT pg_sleep(0.1)::text") for _ in range(20)))
        await until(lambda: db.use() == {"busy": 0, "idle": 5, "limit": 5, "queued": 0})
        assert run_sql(url, count) == [{"count": 5}]

    run(make_dsn(url, application_name=name), work, db_min_connections=2, db_max_connections=5)

    async def none() -> None:
        await until(lambda: run_sql(url, count) == [{"count": 0}])

    asyncio.run(none())


def test_work_queues_for_a_connection_and_never_finds_the_pool_exhausted(url):
    async def work() -> None:
        found = await asyncio.gather(
            *(value("SELECT %(n)s + 0 * length(pg_sleep(0.001)::text)", n=n) for n in range(300))
        )
        assert found == list(range(300))
        free(2)

    run(url, work, db_max_connections=2)


def test_beyond_the_queue_limit_it_fails_at_once(url):
    async def work() -> None:
        slow = [asyncio.create_task(value("SELECT pg_sleep(0.3)::text")) for _ in range(4)]
        await until(lambda: (db.use()["busy"], db.use()["queued"]) == (2, 2))
        started = monotonic()
        with pytest.raises(psycopg2.OperationalError, match="the queue for the database is full"):
            await value("INSERT INTO ledger VALUES (7) RETURNING n")
        assert monotonic() - started < 0.1
        await asyncio.gather(*slow)
        assert await value("SELECT count(*) FROM ledger") == 0
        free(2)

    run(url, work, db_max_connections=2, db_queue_limit=4)


KILL = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = %s"


def test_idle_connections_that_the_server_closed_are_replaced_unseen(url):
    name = f"idle-{os.getpid()}"

    async def work() -> None:
        for _ in range(3):
            assert db.use()["idle"] == 3
            assert run_sql(url, KILL, name) == [{"count": 3}]
            await until(lambda: all(map(db._readable, db._pool._pool)))
            assert await asyncio.gather(*(value("SELECT pg_sleep(0.05)::text") for _ in range(3))) == [""] * 3
            free(3)

    run(make_dsn(url, application_name=name), work, db_min_connections=3, db_max_connections=3)


def test_a_connection_that_breaks_in_use_fails_once_and_loses_no_slot(url):
    name = f"busy-{os.getpid()}"

    async def work() -> None:
        for _ in range(6):  # three times as many as there are slots
            sleeping = asyncio.create_task(value("SELECT pg_sleep(2)::text"))
            await until(lambda: run_sql(url, KILL + " AND state = 'active'", name) == [{"count": 1}])
            with pytest.raises(psycopg2.OperationalError):
                await sleeping
            free(2)
            assert await value("SELECT 1") == 1

    run(make_dsn(url, application_name=name), work, db_max_connections=2)


FAILURES = {
    "bad input": ("SELECT 'x'::jsonb", psycopg2.DataError, True),
    "a broken constraint": ("INSERT INTO ledger VALUES (NULL) RETURNING n", psycopg2.IntegrityError, True),
    "a statement too slow": ("SELECT pg_sleep(9)", psycopg2.errors.QueryCanceled, False),
    "a missing table": ("SELECT * FROM nowhere", psycopg2.errors.UndefinedTable, False),
    "a server that is read-only": ("DO $$ BEGIN RAISE 'x' USING ERRCODE = '25006'; END $$", psycopg2.Error, False),
    "no rows to fetch": ("SET work_mem = '1MB'", psycopg2.ProgrammingError, False),
}


@pytest.mark.parametrize(("statement", "error", "kept"), FAILURES.values(), ids=FAILURES)
def test_after_an_error_the_slot_is_back_and_only_a_sound_connection_is_kept(url, statement, error, kept):
    async def work() -> None:
        before = await value("SELECT pg_backend_pid()")
        with pytest.raises(error):
            await db.fetch("test", statement, {})
        free(1)
        assert (await value("SELECT pg_backend_pid()") == before) is kept

    run(url, work, db_max_connections=1, db_statement_timeout=0.2, db_lock_timeout=0.1)


def test_a_python_error_in_a_statement_loses_no_slot(url):
    async def work() -> None:
        for broken in ("\0", "\ud800", object()):
            with pytest.raises((ValueError, psycopg2.ProgrammingError)):
                await value("SELECT %(x)s", x=broken)
            free(1)
        assert await value("SELECT 1") == 1

    run(url, work, db_max_connections=1)


# --- Again, and in time ---


def test_of_two_statements_in_a_deadlock_the_undone_one_runs_again(url):
    lock = "SELECT sum(length(pg_advisory_xact_lock(n)::text) + length(pg_sleep(0.1)::text)) FROM unnest(%(ns)s) AS n"

    async def work() -> None:
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        before = await value(deadlocks)
        assert await asyncio.gather(value(lock, ns=[1, 2]), value(lock, ns=[2, 1])) == [0, 0]
        await until(lambda: run_sql(url, deadlocks)[0]["deadlocks"] > before)
        await until(lambda: db.use()["busy"] == 0)

    dsn = make_dsn(url, options="-c deadlock_timeout=50ms")
    run(dsn, work, db_lock_timeout=3, db_max_connections=2)


def test_a_statement_that_may_not_be_undone_for_another_runs_twice_and_no_more(url):
    run_sql(url, "CREATE SEQUENCE tries")

    async def work() -> None:
        with pytest.raises(psycopg2.errors.SerializationFailure):
            await value("SELECT fail()")
        assert await value("SELECT last_value FROM tries") == 2

    run_sql(
        url,
        """
        CREATE FUNCTION fail() RETURNS integer LANGUAGE plpgsql AS $$
        BEGIN PERFORM nextval('tries'); RAISE 'again' USING ERRCODE = '40001'; END $$
        """,
    )
    run(url, work)


def test_beyond_its_deadline_a_statement_is_given_up_and_its_slot_is_back(url):
    async def work() -> None:
        started = monotonic()
        with pytest.raises(psycopg2.OperationalError, match="the database did not answer in time"):
            await value("SELECT pg_sleep(2)::text", within=0.2)
        assert 0.2 <= monotonic() - started < 1
        await until(lambda: db.use()["busy"] == 0)
        free(1)
        assert await value("SELECT 1") == 1

    run(url, work, db_max_connections=1)


def test_the_deadline_of_the_settings_counts_unless_told_otherwise(url):
    async def work() -> None:
        started = monotonic()
        with pytest.raises(psycopg2.OperationalError, match="in time"):
            await value("SELECT pg_sleep(2)::text")
        assert monotonic() - started < 1

    run(url, work, db_deadline=0.3, db_statement_timeout=0.3, db_lock_timeout=0.1)


def test_a_job_that_is_given_up_before_it_began_never_runs(url):
    async def work() -> None:
        slow = asyncio.create_task(value("SELECT pg_sleep(0.5)::text"))
        await until(lambda: db.use()["busy"] == 1)
        with pytest.raises(psycopg2.OperationalError, match="in time"):
            await value("INSERT INTO ledger VALUES (8) RETURNING n", within=0.1)
        assert await slow == ""
        assert await value("SELECT count(*) FROM ledger") == 0
        free(1)

    run(url, work, db_max_connections=1)


def test_a_job_that_is_given_up_while_its_connection_is_made_never_runs(url, monkeypatch):
    made = threading.Event()
    connect = db._connect

    def slowly() -> Any:
        made.wait()
        return connect()

    async def work() -> None:
        monkeypatch.setattr(db, "_connect", slowly)
        with pytest.raises(psycopg2.OperationalError, match="in time"):
            await value("INSERT INTO ledger VALUES (9) RETURNING n", within=0.1)
        made.set()
        await until(lambda: db.use() == {"busy": 0, "idle": 1, "limit": 1, "queued": 0})
        assert await value("SELECT count(*) FROM ledger") == 0

    run(url, work, db_min_connections=0, db_max_connections=1)


def test_a_connection_goes_to_the_thread_that_made_it(url, monkeypatch):
    """Where each takes seconds, as to a silent host, a thread that lost its own would run out of time."""
    made, makers, connect = threading.Event(), [], db._connect

    class Idle(list):
        def append(self, connection: Any) -> None:
            super().append(connection)
            made.set()
            time.sleep(0.1)  # in which another thread could take it

    def connect_by_name() -> Any:
        makers.append(threading.current_thread().name)
        return connect()

    async def work() -> None:
        monkeypatch.setattr(db, "_connect", connect_by_name)
        db._pool._pool = Idle()
        first = asyncio.create_task(value("SELECT pg_sleep(0.3)::text"))
        await until(made.is_set)
        await asyncio.gather(first, value("SELECT pg_sleep(0.3)::text"))
        assert makers == ["db_0", "db_1"]

    run(url, work, db_min_connections=0, db_max_connections=2)


def test_a_caller_who_goes_away_takes_his_statement_with_him(url):
    async def work() -> None:
        gone = asyncio.create_task(value("SELECT pg_sleep(2)::text"))
        await until(lambda: db.use()["busy"] == 1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await until(lambda: db.use()["busy"] == 0)
        free(1)
        assert await value("SELECT 1") == 1

    run(url, work, db_max_connections=1)


def test_a_caller_who_goes_away_leaves_the_connections_of_others_alone(url):
    async def pids() -> set[int]:
        return set(await asyncio.gather(*(value("SELECT pg_backend_pid() FROM pg_sleep(0.1)") for _ in range(3))))

    async def work() -> None:
        before = await pids()
        assert len(before) == 3
        gone = asyncio.create_task(value("SELECT pg_sleep(2)::text"))
        await until(lambda: db.use()["busy"] == 1)
        gone.cancel()
        await until(lambda: db.use()["busy"] == 0)
        assert db.use()["idle"] == 2
        assert len(await pids() & before) == 2

    run(url, work, db_max_connections=3)


# --- What is logged ---


def test_a_slow_statement_is_a_warning_and_any_other_a_line_at_debug_without_values(url, caplog):
    caplog.set_level(logging.DEBUG, "svc.db")

    async def work() -> None:
        await db.fetch("quick_one", "SELECT %(x)s", {"x": SECRET})
        await db.fetch("slow_one", "SELECT %(x)s, pg_sleep(0.2)", {"x": SECRET})
        with pytest.raises(psycopg2.DataError):
            await db.fetch("broken_one", "SELECT %(x)s::jsonb", {"x": SECRET})

    run(url, work, db_slow_statement=0.2)
    [quick] = [each for each in caplog.records if "quick_one" in each.getMessage()]
    [slow] = [each for each in caplog.records if "slow_one" in each.getMessage()]
    assert (quick.levelno, slow.levelno) == (logging.DEBUG, logging.WARNING)
    assert slow.getMessage().startswith("slow statement: slow_one took 0.2")
    assert any("broken_one" in message for message in caplog.messages)
    assert SECRET not in caplog.text
    assert "SELECT" not in caplog.text


def test_open_and_close_are_logged(url, caplog):
    caplog.set_level(logging.INFO, "svc.db")

    async def work() -> None:
        pass

    run(url, work)
    assert caplog.messages == ["pool open: at most 8 connections", "pool closed"]


def test_a_database_that_is_away_at_the_start_is_one_line_in_the_log_and_used_once_it_is_there(
    url, caplog, monkeypatch
):
    caplog.set_level(logging.WARNING, "svc.db")
    port = free_port()
    away = f"postgresql://svc:{SECRET}@127.0.0.1:{port}/config"

    async def work() -> None:
        for _ in range(3):
            with pytest.raises(psycopg2.OperationalError):
                await value("SELECT 1")
            free(2)
        assert len(caplog.records) == 1
        monkeypatch.setattr(db, "_url", url)
        assert await value("SELECT 1") == 1

    run(away, work, db_max_connections=2)
    [line] = caplog.messages
    assert line.startswith("database unavailable, the service starts without it: ")
    assert str(port) in line
    assert "\n" not in line
    assert SECRET not in line


def test_a_database_that_is_silent_at_the_start_holds_it_up_for_the_deadline_at_most(caplog):
    caplog.set_level(logging.WARNING, "svc.db")

    async def silent(port: int) -> None:
        started = monotonic()
        settings = Settings(
            database_url=f"postgresql://127.0.0.1:{port}/x",
            db_deadline=0.3,
            db_statement_timeout=0.3,
            db_lock_timeout=0.1,
        )
        async with db.opened(settings):
            assert 0.3 <= monotonic() - started < 1

    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and never says a word
        asyncio.run(silent(server.getsockname()[1]))
    assert caplog.messages == ["database unavailable, the service starts without it: TimeoutError"]


# --- Reads that share a statement ---


class Source:
    """Counts the statements that a coalesced read makes, and holds them up on demand."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.within: list[float] = []
        self.flying = 0
        self.most = 0
        self.broken: Any = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.rows: dict[Any, Any] = {}

    async def fetch(self, keys: list[Any], within: float) -> dict[Any, Any]:
        self.batches.append(keys)
        self.within.append(within)
        self.flying += 1
        self.most = max(self.most, self.flying)
        try:
            found = {key: self.rows[key] for key in keys if key in self.rows}
            await self.gate.wait()
            await asyncio.sleep(0)
            if self.broken in keys:
                raise psycopg2.OperationalError("gone")
            return found
        finally:
            self.flying -= 1


@pytest.fixture
def coalesce(url):
    """Runs work with a source and a coalesced read of it."""

    def start(work: Callable[[Source, Callable[[Any], Awaitable[Any]]], Awaitable[None]], **settings: Any) -> None:
        async def opened() -> None:
            source = Source()
            await work(source, db.coalesced(source.fetch))

        run(url, opened, db_min_connections=0, **settings)

    return start


def test_one_statement_is_in_flight_and_takes_each_key_once(coalesce):
    async def work(source: Source, read: Any) -> None:
        source.rows = {n: {"n": n} for n in range(10)}
        source.gate.clear()
        first = asyncio.ensure_future(read(0))
        await until(lambda: source.flying)
        others = [asyncio.ensure_future(read(n)) for n in (1, 2, 1, 0, 99, 2)]
        await asyncio.sleep(0)
        assert source.batches == [[0]]
        source.gate.set()
        assert await first == {"n": 0}
        assert await asyncio.gather(*others) == [{"n": 1}, {"n": 2}, {"n": 1}, {"n": 0}, None, {"n": 2}]
        assert source.batches == [[0], [1, 2, 0, 99]]
        assert source.most == 1

    coalesce(work)


def test_a_batch_is_bounded_and_the_rest_waits_for_the_next(coalesce):
    async def work(source: Source, read: Any) -> None:
        source.rows = {n: {"n": n} for n in range(200)}
        found = await asyncio.gather(*(read(n) for n in range(200)))
        assert found == [{"n": n} for n in range(200)]
        assert [len(batch) for batch in source.batches] == [db.BATCH] * 3 + [200 - 3 * db.BATCH]
        assert [key for batch in source.batches for key in batch] == list(range(200))
        assert source.most == 1

    coalesce(work)


def test_an_error_reaches_those_who_shared_the_statement_and_nobody_else(coalesce):
    async def work(source: Source, read: Any) -> None:
        source.rows = {1: {"n": 1}, 2: {"n": 2}}
        source.gate.clear()
        source.broken = 1
        first = [asyncio.ensure_future(read(1)) for _ in range(3)]
        await until(lambda: source.flying)
        second = asyncio.ensure_future(read(2))
        source.gate.set()
        found = await asyncio.gather(*first, return_exceptions=True)
        assert [str(each) for each in found] == ["gone"] * 3
        assert await second == {"n": 2}
        source.broken = None
        assert await read(1) == {"n": 1}

    coalesce(work)


def test_a_reader_who_goes_away_takes_nobody_with_him(coalesce):
    async def work(source: Source, read: Any) -> None:
        source.rows = {1: {"n": 1}}
        source.gate.clear()
        gone, stays = asyncio.ensure_future(read(1)), asyncio.ensure_future(read(1))
        await until(lambda: source.flying)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        source.gate.set()
        assert await stays == {"n": 1}
        assert await read(1) == {"n": 1}

    coalesce(work)


def test_a_read_that_starts_after_a_write_sees_it(coalesce):
    async def work(source: Source, read: Any) -> None:
        source.rows = {1: {"n": "before"}}
        source.gate.clear()
        early = asyncio.ensure_future(read(1))
        await until(lambda: source.flying)  # its statement has begun
        source.rows = {1: {"n": "after"}}
        late = asyncio.ensure_future(read(1))
        source.gate.set()
        assert (await early, await late) == ({"n": "before"}, {"n": "after"})

    coalesce(work)


def test_those_who_wait_have_what_is_left_of_the_deadline(coalesce):
    async def work(source: Source, read: Any) -> None:
        source.gate.clear()
        first = asyncio.ensure_future(read(1))
        await until(lambda: source.flying)
        second = asyncio.ensure_future(read(2))
        await asyncio.sleep(0.2)
        source.gate.set()
        await asyncio.gather(first, second)
        assert 0.9 < source.within[0] <= 1
        assert source.within[1] <= 0.8

    coalesce(work, db_deadline=1, db_statement_timeout=1, db_lock_timeout=0.5)


def test_a_queue_that_never_empties_leaves_each_reader_the_whole_deadline(coalesce):
    async def work(source: Source, read: Any) -> None:
        end = monotonic() + 0.8

        async def reader(number: int) -> None:
            while monotonic() < end:
                await read(number)

        await asyncio.gather(*(reader(n) for n in range(4 * db.BATCH)))
        assert len(source.batches) > 8
        assert min(source.within) > 0

    coalesce(work, db_deadline=0.5, db_statement_timeout=0.5, db_lock_timeout=0.1)


def test_a_coalesced_read_of_the_database_finds_what_was_written_before_it(url):
    async def fetch_all(keys: list[int], within: float) -> dict[int, Any]:
        rows = await db.fetch("ledger", "SELECT n FROM ledger WHERE n = ANY(%(keys)s)", {"keys": keys}, within)
        return {row["n"]: row for row in rows}

    async def work() -> None:
        read = db.coalesced(fetch_all)

        async def write_and_read(n: int) -> None:
            assert await read(n) is None
            await value("INSERT INTO ledger VALUES (%(n)s) RETURNING n", n=n)
            assert await read(n) == {"n": n}

        await asyncio.gather(*(write_and_read(n) for n in range(100, 300)))
        free(4)

    run(url, work, db_max_connections=4)
    assert run_sql(url, "SELECT count(*) FROM ledger WHERE n >= 100") == [{"count": 200}]
    run_sql(url, "DELETE FROM ledger")


def test_an_error_is_told_in_its_first_line():
    assert db.one_line(ValueError("first\nsecond")) == "first"
    assert db.one_line(ValueError(" \n")) == "ValueError"
    assert db.one_line(TimeoutError()) == "TimeoutError"
