import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from time import monotonic
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from svc import db
from svc.conftest import run_sql
from svc.settings import Settings
from svc.test.process import until

SECRET = "hunter2"


@pytest.fixture(scope="module")
def url(new_database):
    """A database of its own: these tests open and close the pool that the session's service would use."""
    with new_database(migrated=False) as made:
        run_sql(made, "CREATE TABLE counters (name text PRIMARY KEY, n integer DEFAULT 0); CREATE SEQUENCE tries")
        yield made


@pytest.fixture(autouse=True)
def apart(monkeypatch, url):
    """The tables are empty, and the pool of the session's service, should it run, is put back afterwards."""
    for name in ("_settings", "_pool", "_executors", "_last_outage"):
        monkeypatch.setattr(db, name, getattr(db, name, None), raising=False)
    run_sql(url, "TRUNCATE counters; ALTER SEQUENCE tries RESTART")


def run(url: str, work: Callable[[], Awaitable[Any]], **settings: Any) -> Any:
    """What the work returns, with a pool of its own, none of whose slots is lost afterwards."""

    async def opened() -> Any:
        async with db.opened(Settings(database_url=url, **settings)):
            result = await work()
            await wait_until(lambda: (db.use()["busy"], db.use()["queued"]) == (0, 0))
            return result

    return asyncio.run(asyncio.wait_for(opened(), 20))


async def value(statement: str, within: float | None = None, **params: Any) -> Any:
    """The only value of the only row."""
    [row] = await db.fetch("test", statement, params, within)
    [found] = row.values()
    return found


async def wait_until(condition: Callable[[], Any]) -> None:
    """As `until`, without holding up the loop."""
    await asyncio.to_thread(until, condition)


# --- Connections ---


def test_every_connection_has_its_limits_and_what_the_url_says_wins_except_where_answers_depend_on_it(url):
    async def work() -> list[str]:
        names = ("statement_timeout", "lock_timeout", "TimeZone", "default_transaction_isolation", "client_encoding")
        shown = [await value(f"SELECT current_setting('{name}')") for name in names]
        [idle] = db._pool._pool
        return [*shown, *(idle.info.dsn_parameters[name] for name in ("application_name", "keepalives_idle"))]

    always = ["UTC", "read committed", "UTF8"]
    assert run(url, work) == ["3s", "2s", *always, "config-service", "30"]
    assert run(url, work, db_lock_timeout=0.25, db_statement_timeout=1.5)[:2] == ["1500ms", "250ms"]
    options = "-c statement_timeout=1234 -c TimeZone=Asia/Tokyo -c default_transaction_isolation=serializable"
    said = make_dsn(url, application_name="mine", client_encoding="LATIN1", keepalives_idle=9, options=options)
    assert run(said, work) == ["1234ms", "2s", *always, "mine", "9"]


def test_the_pool_keeps_the_connections_it_opened_and_closes_all_at_the_end(url):
    backends = "SELECT pid FROM pg_stat_activity WHERE application_name = 'db_test'"

    async def work() -> None:
        assert db.use() == {"busy": 0, "idle": 1, "queued": 0}
        await asyncio.gather(*(value("SELECT pg_sleep(0.02)::text") for _ in range(20)))
        assert db.use() == {"busy": 0, "idle": 4, "queued": 0}
        assert len(run_sql(url, backends)) == 4

    run(make_dsn(url, application_name="db_test"), work, db_max_connections=5)  # one is for lists
    until(lambda: not run_sql(url, backends))


# --- Lists ---


@pytest.mark.parametrize(("limit", "third"), [(6, 2), (2, 1)])
def test_lists_hold_a_third_of_the_connections_and_others_the_rest(url, limit, third):
    async def work() -> None:
        statement = "SELECT pg_sleep(0.05), 1 / %(n)s"  # the first fails, and leaves its place to the others
        lists = [asyncio.create_task(db.fetch("list", statement, {"n": n}, queue="lists")) for n in range(6)]
        await wait_until(lambda: db.use()["busy"] == third)
        assert await value("SELECT 'served'") == "served"
        others = [asyncio.create_task(value("SELECT pg_sleep(0.2)::text")) for _ in range(limit)]
        await wait_until(lambda: db.use()["busy"] == limit)
        while not all(each.done() for each in lists):
            assert db.use()["busy"] <= limit
            await asyncio.sleep(0.001)
        assert [each.exception() is None for each in lists] == [False] + [True] * 5
        await asyncio.gather(*others)

    run(url, work, db_max_connections=limit)


def test_a_list_that_would_begin_so_late_that_it_is_cut_off_never_begins(url, caplog):
    async def work() -> None:
        slow = asyncio.create_task(db.fetch("slow", "SELECT pg_sleep(0.3)", {}, queue="lists"))
        await wait_until(lambda: db.use()["busy"] == 1)
        with pytest.raises(TimeoutError):
            await db.fetch("late", "INSERT INTO counters VALUES ('late') RETURNING n", {}, queue="lists")
        assert len(await slow) == 1
        assert await value("SELECT count(*) FROM counters") == 0

    run(url, work, db_max_connections=2, db_deadline=0.6, db_statement_timeout=0.6, db_lock_timeout=0.6)
    assert "database unavailable" not in caplog.text


def test_lists_that_wait_leave_the_queue_to_others(url):
    async def work() -> None:
        lists = [asyncio.create_task(db.fetch("list", "SELECT pg_sleep(0.05)", {}, queue="lists")) for _ in range(4)]
        await wait_until(lambda: db.use()["queued"] == 3)
        assert await value("SELECT 'served'") == "served"
        await asyncio.gather(*lists)

    run(url, work, db_max_connections=2, db_queue_limit=1)


@pytest.mark.parametrize(("most", "first"), [(2, 2), (12, 9)])
def test_so_many_connections_are_open_at_the_start(url, most, first):
    async def work() -> int:
        return db.use()["idle"]

    assert run(url, work, db_max_connections=most, db_min_connections=first) == first


# --- Errors ---


FAILURES = {
    "a broken constraint": ("INSERT INTO counters VALUES (%(x)s) RETURNING n", None, psycopg2.IntegrityError),
    "a statement too slow": ("SELECT pg_sleep(9)", None, psycopg2.errors.QueryCanceled),
    "a value that no text holds": ("SELECT %(x)s", "\0", ValueError),
}


@pytest.mark.parametrize(("statement", "x", "error"), FAILURES.values(), ids=FAILURES)
def test_an_error_arrives_as_it_is_and_leaves_the_slot_and_what_is_committed(url, caplog, statement, x, error):
    async def work() -> None:
        await value("INSERT INTO counters VALUES ('before') RETURNING n")
        with pytest.raises(error):
            await value(statement, x=x)
        assert await value("SELECT name FROM counters") == "before"

    run(url, work, db_max_connections=2, db_statement_timeout=0.2, db_lock_timeout=0.1)
    assert "database unavailable" not in caplog.text


@pytest.mark.parametrize(("code", "tries"), [("40001", 2), ("40P01", 2), ("40002", 1)])
def test_a_statement_that_fails_because_of_others_runs_twice_and_no_more(url, code, tries):
    async def work() -> None:
        with pytest.raises(psycopg2.Error, match="failed"):
            await value(f"DO $$ BEGIN PERFORM nextval('tries'); RAISE 'failed' USING ERRCODE = '{code}'; END $$")
        assert await value("SELECT last_value FROM tries") == tries

    run(url, work)


def test_a_migration_of_what_a_write_returns_fails_one_write_of_a_connection_at_most(url):
    async def write(name: str) -> int:
        return await value("INSERT INTO counters (name) VALUES (%(name)s) RETURNING n", name=name)

    async def work() -> int:
        await write("before")
        run_sql(url, "ALTER TABLE counters ALTER n TYPE bigint")
        with pytest.raises(psycopg2.errors.FeatureNotSupported, match="cached plan must not change result type"):
            await write("after")
        return await write("then")

    assert run(url, work) == 0


# --- In time ---


def test_after_its_deadline_a_statement_is_given_up_and_its_slot_is_back(url):
    async def work() -> None:
        started = monotonic()
        with pytest.raises(psycopg2.OperationalError, match="the database did not answer in time"):
            await value("SELECT pg_sleep(2)::text")
        await wait_until(lambda: db.use()["busy"] == 0)
        assert 0.2 <= monotonic() - started < 1

    patient = make_dsn(url, options="-c statement_timeout=9s")
    run(patient, work, db_max_connections=2, db_deadline=0.2, db_statement_timeout=0.2, db_lock_timeout=0.1)


def test_a_statement_that_is_given_up_in_the_queue_never_runs(url):
    async def work() -> None:
        slow = asyncio.create_task(value("SELECT pg_sleep(0.3)::text"))
        await wait_until(lambda: db.use()["busy"] == 1)
        with pytest.raises(psycopg2.OperationalError, match="there was no connection to the database in time"):
            await value("INSERT INTO counters VALUES ('late') RETURNING n", within=0.1)
        assert await slow == ""
        assert await value("SELECT count(*) FROM counters") == 0

    run(url, work, db_max_connections=2)


def test_a_statement_that_is_given_up_while_it_is_connected_never_runs(url, monkeypatch):
    released = threading.Event()
    connect = psycopg2.connect

    def connect_late(*given: Any, **named: Any) -> Any:
        released.wait()
        return connect(*given, **named)

    async def work() -> None:
        monkeypatch.setattr(psycopg2, "connect", connect_late)
        with pytest.raises(psycopg2.OperationalError, match="in time"):
            await value("INSERT INTO counters VALUES ('late') RETURNING n", within=0.1)
        released.set()
        await wait_until(lambda: db.use()["idle"] == 1)
        assert await value("SELECT count(*) FROM counters") == 0

    run(url, work, db_min_connections=0, db_max_connections=2)


def test_a_caller_who_goes_away_takes_his_own_statement_along_and_nothing_of_others(url):
    async def pids() -> set[int]:
        return set(await asyncio.gather(*(value("SELECT pg_backend_pid() FROM pg_sleep(0.1)") for _ in range(3))))

    async def work() -> None:
        before = await pids()
        gone = asyncio.create_task(value("SELECT pg_sleep(2)::text"))
        await wait_until(lambda: db.use()["busy"] == 1)
        gone.cancel()
        await wait_until(lambda: db.use()["busy"] == 0)
        assert len(await pids() & before) == 2

    run(url, work, db_max_connections=4)


# --- What is logged ---


def test_a_slow_statement_is_a_warning_and_any_other_a_line_at_debug_without_values(url, caplog):
    caplog.set_level(logging.DEBUG, "svc.db")

    async def work() -> None:
        await db.fetch("quick_one", "SELECT %(x)s", {"x": SECRET})
        await db.fetch("slow_one", "SELECT %(x)s, pg_sleep(0.2)", {"x": SECRET})

    run(url, work, db_slow_statement=0.2)
    levels = {record.getMessage().split()[1]: record.levelno for record in caplog.records}
    assert levels.items() >= {"quick_one": logging.DEBUG, "slow_one": logging.WARNING}.items()
    assert SECRET not in caplog.text


def test_an_outage_is_one_line_when_it_begins_at_the_start_already_and_one_when_it_ends(
    postgres, new_database, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "svc.db")
    monkeypatch.setattr(db, "CALM", 0.2)
    with new_database(migrated=False) as away:
        name = parse_dsn(away)["dbname"]

        async def work() -> None:
            for _ in range(20):
                with pytest.raises(psycopg2.OperationalError):
                    await value("SELECT 1")
            failed = monotonic()
            run_sql(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            while len(caplog.messages) == 1:
                assert await value("SELECT 1") == 1
            assert monotonic() - failed > 0.9 * db.CALM

        run_sql(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        run(make_dsn(away, password=SECRET), work, db_max_connections=2)
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert caplog.messages[0].startswith("database unavailable: ")
    assert caplog.messages[1] == "database available again"
    assert SECRET not in caplog.text


def test_a_database_that_is_silent_at_the_start_holds_it_up_for_the_deadline_at_most(caplog):
    async def work() -> None:
        assert 0.3 <= monotonic() - started < 1

    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and never says a word
        url = f"postgresql://127.0.0.1:{server.getsockname()[1]}/x"
        started = monotonic()
        run(url, work, db_deadline=0.3, db_statement_timeout=0.3, db_lock_timeout=0.1)
    assert caplog.messages == ["database unavailable: there was no connection to the database in time"]


# --- Reads that share a statement ---


def source(**rows: Any) -> SimpleNamespace:
    """Something to read from, row by row: it waits for `open`, keeps the batches, and fails if a key is `broken`."""
    made = SimpleNamespace(rows=rows, batches=[], within=[], open=asyncio.Event(), broken=None)

    async def fetch_all(keys: list[str], within: float) -> dict[str, Any]:
        made.batches.append(keys)
        made.within.append(within)
        found = {key: made.rows[key] for key in keys if key in made.rows}
        await made.open.wait()
        if made.broken in keys:
            raise psycopg2.OperationalError("broken")
        return found

    made.read = db.coalesced(fetch_all)
    return made


async def start(read: Callable[[str], Awaitable[Any]], *keys: str) -> list[asyncio.Future[Any]]:
    """Reads that are under way: the first batch has begun."""
    reads = [asyncio.ensure_future(read(key)) for key in keys]
    await asyncio.sleep(0)
    return reads


def test_one_batch_runs_at_a_time_and_the_next_has_64_keys_each_once_and_what_is_left_of_the_deadline(url):
    async def work() -> None:
        keys = [str(n) for n in range(100)]
        made = source(**dict.fromkeys(keys, "old"))
        early = await start(made.read, "0")
        made.rows = dict.fromkeys(keys, "new")
        late = await start(made.read, *keys, *keys, "none")
        await asyncio.sleep(0.2)
        assert made.batches == [["0"]]
        made.open.set()
        assert await asyncio.gather(*early, *late) == ["old"] + ["new"] * 200 + [None]
        assert made.batches == [["0"], keys[:64], [*keys[64:], "none"]]
        assert 0.9 < made.within[0] <= 1
        assert made.within[1] <= 0.8

    run(url, work, db_deadline=1, db_statement_timeout=1, db_lock_timeout=0.5)


def test_an_error_reaches_those_who_shared_the_statement_and_who_goes_away_takes_nobody_along(url):
    async def work() -> None:
        made = source(a=1, b=2)
        made.broken = "a"
        gone, shared = await start(made.read, "a", "a")
        [other] = await start(made.read, "b")
        gone.cancel()
        made.open.set()
        outcomes = await asyncio.gather(shared, other, return_exceptions=True)
        assert [str(each) for each in outcomes] == ["broken", "2"]
        made.broken = None
        assert await made.read("a") == 1

    run(url, work)
