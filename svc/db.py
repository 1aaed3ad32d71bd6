"""The pool, its threads, and how a statement runs on them: one at a time on a connection, each within a deadline."""

import asyncio
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import psycopg2
from psycopg2 import errors
from psycopg2.extensions import connection, parse_dsn
from psycopg2.extras import RealDictCursor
from psycopg2.pool import ThreadedConnectionPool

from svc.settings import Settings

log = logging.getLogger(__name__)

Row = dict[str, Any]

# Documents may have a megabyte each, so this bounds what one statement brings into memory.
BATCH = 64

_settings: Settings
_pool: ThreadedConnectionPool
_executor: ThreadPoolExecutor
_half: asyncio.Semaphore
_jobs: set[object] = set()  # the statements that somebody waits for: each is the key of its connection in the pool


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[None]:
    """Hold the pool and its threads open. One thread a connection, so work queues and the pool never runs dry.

    A database that is away does not stop the start: one line in the log says so, and each statement tries again.
    """
    global _settings, _pool, _executor, _half
    _settings, limit = settings, settings.db_max_connections
    _pool = ThreadedConnectionPool(0, limit, cursor_factory=RealDictCursor, **_parameters(settings))
    _half = asyncio.Semaphore(max(1, limit // 2))
    _pool.minconn = limit  # how many it keeps when they come back
    _executor = ThreadPoolExecutor(limit, thread_name_prefix="db")
    run = asyncio.get_running_loop().run_in_executor
    try:
        made = asyncio.gather(*(run(_executor, _pool._connect) for _ in range(settings.db_min_connections)))
        await asyncio.wait_for(made, settings.db_deadline)
        log.info("pool open: at most %d connections", limit)
    except (psycopg2.Error, TimeoutError) as error:
        log.error("database unavailable, the service starts without it: %s", one_line(error))
    try:
        yield
    finally:
        _executor.shutdown(wait=False, cancel_futures=True)
        renew()
        log.info("pool closed")


def _parameters(settings: Settings) -> dict[str, Any]:
    """DATABASE_URL with what every connection has; what the URL itself says wins."""
    given = parse_dsn(settings.database())
    limits = f"-c statement_timeout={settings.db_statement_timeout}s -c lock_timeout={settings.db_lock_timeout}s"
    given["options"] = f"-c timezone=UTC {limits} {given.get('options', '')}"
    given.setdefault("connect_timeout", settings.db_connect_timeout)
    # Names are in any script, and firewalls forget connections that are silent for long.
    return {"application_name": "config-service", "keepalives_idle": 30, **given, "client_encoding": "UTF8"}


def use() -> dict[str, int]:
    """How much of the pool is in use now."""
    busy, idle = len(_pool._used), len(_pool._pool)
    return {"busy": busy, "idle": idle, "limit": _pool.maxconn, "queued": max(len(_jobs) - busy, 0)}


def renew(job: object = None) -> None:
    """Cut off every idle connection, or that of a job: who waits for the server wakes, and _lend() replaces it.

    Every idle one: they lead to where the service should not stay. From outside: closing would wait for the statement.
    """
    with _pool._lock:  # so that none is cut off under another job
        for each in _pool._pool if job is None else filter(None, [_pool._used.get(job)]):
            with suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(each.fileno())) as wire:
                wire.shutdown(socket.SHUT_RDWR)


async def fetch(name: str, statement: str, params: Mapping[str, Any], within: float | None = None) -> list[Row]:
    """The rows of one statement, which is a transaction of its own. `name` is what the log calls it.

    Raises psycopg2.OperationalError at once if the queue is full, and after `within` seconds (DB_DEADLINE unless told
    otherwise) if the server is silent. The statement is then given up: it did not begin, or its connection is cut off.
    """
    if len(_jobs) >= _settings.db_queue_limit:
        raise psycopg2.OperationalError("the queue for the database is full")
    job = object()
    _jobs.add(job)
    try:
        work = asyncio.get_running_loop().run_in_executor(_executor, _execute, job, name, statement, params)
        return await asyncio.wait_for(work, within or _settings.db_deadline)
    except TimeoutError:
        renew()  # the idle ones lead to the same silent server, and each would cost somebody the whole deadline
        raise psycopg2.OperationalError("the database did not answer in time") from None
    except errors.ReadOnlySqlTransaction:
        renew()  # all lead to a server that became a standby, or was one
        raise
    finally:
        _jobs.remove(job)
        renew(job)


@asynccontextmanager
async def turn(semaphore: asyncio.Semaphore) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(_settings.db_deadline):
            await semaphore.acquire()
    except TimeoutError:
        raise psycopg2.OperationalError("too many lists") from None
    try:
        yield
    finally:
        semaphore.release()


async def fetch_page(name, statement, params):
    async with turn(_half):
        return await fetch(name, statement, params)


def is_outage(error):
    return isinstance(error, psycopg2.OperationalError)


def _execute(job: object, name: str, statement: str, params: Mapping[str, Any]) -> list[Row]:
    lent = _lend(job)
    started = monotonic()
    try:
        # fetch() removes the job before it looks for the connection: it finds that, or this finds the job gone.
        if job not in _jobs:
            raise psycopg2.OperationalError("given up before it began")
        lent.autocommit = True
        cursor = lent.cursor()
        try:
            cursor.execute(statement, params)
        except (errors.DeadlockDetected, errors.SerializationFailure):
            cursor.execute(statement, params)  # undone as a whole, so it may run again
        return cursor.fetchall()
    finally:
        _pool.putconn(lent, job)  # which closes it if it is lost
        seconds = monotonic() - started
        level = logging.WARNING if seconds >= _settings.db_slow_statement else logging.DEBUG
        log.log(level, "%s took %.4f s", name, seconds)


def _lend(job: object) -> connection:
    """An idle connection, or a new one. An idle one that is readable was closed by the server, and is replaced."""
    while True:
        with _pool._lock:
            lent = _pool._getconn(job) if _pool._pool else None
        if lent is None:
            return _pool._connect(job)  # not by getconn(), whose lock one silent host would hold against every thread
        poll = select.poll()  # select.select() cannot take descriptors above 1023
        poll.register(lent, select.POLLIN)
        if not poll.poll(0):
            return lent
        _pool.putconn(lent, job, close=True)


def coalesced[K](fetch_all: Callable[[list[K], float], Awaitable[Mapping[K, Row]]]) -> Callable[[K], Awaitable]:
    """A read of one key, a row or None, that shares its statement with every other read that waits at the time.

    One statement is in flight; whoever comes meanwhile waits for the next, which takes up to BATCH keys.
    A read so always begins after it was asked for. An error reaches those who shared the statement, nobody else.
    `fetch_all` gets the keys and the seconds that are left to the one of them who waits longest.
    """
    batches: list[tuple[float, dict[K, None], asyncio.Future[Mapping[K, Row]]]] = []  # since when, the keys, their rows
    flying: asyncio.Task[None] | None = None

    async def fly() -> None:
        while batches:
            since, keys, rows = batches.pop(0)
            try:
                rows.set_result(await fetch_all(list(keys), since + _settings.db_deadline - monotonic()))
            except Exception as error:
                rows.set_exception(error)
                rows.exception()  # seen: all who asked may have gone away

    async def read(key: K) -> Row | None:
        nonlocal flying
        if not batches or len(batches[-1][1]) == BATCH:
            batches.append((monotonic(), {}, asyncio.get_running_loop().create_future()))
        _, keys, rows = batches[-1]
        keys[key] = None
        if flying is None or flying.done():
            flying = asyncio.create_task(fly())
        return (await asyncio.shield(rows)).get(key)  # without the shield, who goes away would take the others along

    return read


def one_line(error: BaseException) -> str:
    """The first line of an error. libpq names host and user in it, never a password."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
