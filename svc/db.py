"""The pool, its threads, and how a statement runs on them: one at a time on a connection, each within a deadline."""

import asyncio
import logging
import os
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import islice
from threading import Lock
from time import monotonic
from types import SimpleNamespace
from typing import Any

import psycopg2
from psycopg2 import errors
from psycopg2.extensions import connection, make_dsn, parse_dsn
from psycopg2.extras import RealDictCursor
from psycopg2.pool import ThreadedConnectionPool

from svc.settings import Settings

log = logging.getLogger(__name__)

Row = dict[str, Any]

# Documents may have a megabyte each, so this bounds what one statement brings into memory.
BATCH = 64

_settings: Settings
_url: str
_pool: ThreadedConnectionPool
_executor: ThreadPoolExecutor
_pending = 0  # statements at work or waiting
_ending = Lock()  # held while a job takes or leaves its connection: none is shut down under another's statement


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[None]:
    """Hold the pool and its threads open. One thread a connection, so work queues and the pool never runs dry.

    A database that is away does not stop the start: one line in the log says so, and each statement tries again.
    """
    global _settings, _url, _pool, _executor
    _settings, _url = settings, _dsn(settings)
    _pool = ThreadedConnectionPool(0, settings.db_max_connections)
    _pool.minconn = settings.db_max_connections  # how many the pool keeps when they come back
    _executor = ThreadPoolExecutor(settings.db_max_connections, thread_name_prefix="db")
    try:
        async with asyncio.timeout(settings.db_deadline):
            await asyncio.get_running_loop().run_in_executor(_executor, _warm, settings.db_min_connections)
        log.info("pool open: at most %d connections", settings.db_max_connections)
    except (psycopg2.Error, TimeoutError) as error:
        log.error("database unavailable, the service starts without it: %s", one_line(error))
    try:
        yield
    finally:
        _executor.shutdown(wait=False, cancel_futures=True)
        renew()
        log.info("pool closed")


def _dsn(settings: Settings) -> str:
    """DATABASE_URL with what every connection has; what the URL itself says wins."""
    given = parse_dsn(settings.database())
    options = f"-c timezone=UTC -c statement_timeout={settings.db_statement_timeout * 1000:.0f}"
    options += f" -c lock_timeout={settings.db_lock_timeout * 1000:.0f} {given.get('options', '')}"
    defaults = {
        "application_name": "config-service",
        "connect_timeout": settings.db_connect_timeout,
        # Seconds of TCP: firewalls forget silent connections, and a host that vanished says nothing.
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
    }
    always = {"client_encoding": "UTF8", "options": options}  # names are in any script
    return make_dsn(**{**defaults, **given, **always})


def _connect() -> connection:
    made = psycopg2.connect(_url, cursor_factory=RealDictCursor)
    made.autocommit = True
    return made


def _warm(count: int) -> None:
    while len(_pool._pool) + len(_pool._used) < count:
        _pool._pool.append(_connect())


def use() -> dict[str, int]:
    """How much of the pool is in use now."""
    return {
        "busy": len(_pool._used),
        "idle": len(_pool._pool),
        "limit": _settings.db_max_connections,
        "queued": max(_pending - len(_pool._used), 0),
    }


def renew() -> None:
    """Close every idle connection: they lead to where the service should not stay, so the next ones are new."""
    with _pool._lock:
        idle, _pool._pool[:] = _pool._pool[:], []
    for each in idle:
        each.close()


async def fetch(name: str, statement: str, params: Mapping[str, Any], within: float | None = None) -> list[Row]:
    """The rows of one statement, which is a transaction of its own. `name` is what the log calls it.

    Raises psycopg2.OperationalError at once if the queue is full, and after `within` seconds (DB_DEADLINE unless told
    otherwise) if the server is silent. The statement is then given up: it did not begin, or its connection is closed.
    """
    global _pending
    if _pending >= _settings.db_queue_limit:
        raise psycopg2.OperationalError("the queue for the database is full")
    job = SimpleNamespace(name=name, statement=statement, params=params, connection=None, abandoned=False)
    _pending += 1
    try:
        async with asyncio.timeout(_settings.db_deadline if within is None else within):
            try:
                return await _submit(job)
            except (errors.DeadlockDetected, errors.SerializationFailure):
                return await _submit(job)  # undone as a whole, so it may run again
    except TimeoutError:
        if job.connection is not None:
            renew()  # the idle ones lead to the same silent server, and each would cost somebody the whole deadline
        raise psycopg2.OperationalError("the database did not answer in time") from None
    finally:
        _pending -= 1
        _abandon(job)


def _submit(job: SimpleNamespace) -> asyncio.Future[list[Row]]:
    """What a thread will bring: as loop.run_in_executor does it, but straight to the future, which saves 25 µs."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Row]] = loop.create_future()

    def work() -> None:
        try:
            settle, outcome = future.set_result, _execute(job)
        except BaseException as error:
            settle, outcome = future.set_exception, error
        loop.call_soon_threadsafe(lambda: future.done() or settle(outcome))

    _executor.submit(work)
    return future


def _execute(job: SimpleNamespace) -> list[Row]:
    if job.abandoned:
        raise psycopg2.OperationalError("abandoned before it began")
    lent = _lend()
    started = monotonic()
    healthy = False
    try:
        with _ending:
            if job.abandoned:
                healthy = True
                raise psycopg2.OperationalError("abandoned before it began")
            job.connection = lent
        with lent.cursor() as cursor:
            cursor.execute(job.statement, job.params)
            rows = cursor.fetchall()
        healthy = True
        return rows
    except (psycopg2.IntegrityError, psycopg2.DataError):
        healthy = True
        raise
    finally:
        with _ending:
            job.connection = None
        # After any other error the connection goes too: it may be lost, or lead to a server that became a standby.
        _pool.putconn(lent, close=not healthy)
        seconds = monotonic() - started
        if seconds >= _settings.db_slow_statement:
            log.warning("slow statement: %s took %.3f s", job.name, seconds)
        else:
            log.debug("statement: %s took %.4f s", job.name, seconds)


def _lend() -> connection:
    """An idle connection, or a new one. An idle one that is readable was closed by the server, and is replaced."""
    while True:
        with _pool._lock:
            lent = _pool._getconn() if _pool._pool else None
        if lent is None:
            # getconn() would hold the pool's lock while it connects: one silent host would hold up every thread.
            made = _connect()
            with _pool._lock:  # so that no other thread takes it
                _pool._pool.append(made)
                return _pool._getconn()
        if _readable(lent):
            _pool.putconn(lent, close=True)
        else:
            return lent


def _readable(idle: connection) -> bool:
    poll = select.poll()  # select.select() cannot take descriptors above 1023
    poll.register(idle.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def _abandon(job: SimpleNamespace) -> None:
    """Keep a job from beginning, and wake its thread if it waits for the server."""
    with _ending:
        job.abandoned = True
        if job.connection is None:
            return
        with suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(job.connection.fileno())) as wire:
            wire.shutdown(socket.SHUT_RDWR)


def coalesced[K: Hashable](
    fetch_all: Callable[[list[K], float], Awaitable[Mapping[K, Row]]],
) -> Callable[[K], Awaitable[Row | None]]:
    """A read of one key that shares its statement with every other read that waits at the time.

    One statement is in flight; whoever comes meanwhile waits for the next, which takes up to BATCH keys, each once.
    A read so always begins after it was asked for. An error reaches those who shared the statement, nobody else.
    `fetch_all` gets the keys and the seconds that are left to the one of them who waits longest.
    """
    waiting: dict[K, tuple[float, list[asyncio.Future[Row | None]]]] = {}  # since when, in that order, and who
    flying: asyncio.Task[None] | None = None

    async def fly() -> None:
        while waiting:
            keys = list(islice(waiting, BATCH))
            since = waiting[keys[0]][0]
            batch = {key: waiting.pop(key)[1] for key in keys}
            try:
                rows = await fetch_all(keys, since + _settings.db_deadline - monotonic())
                settle = [(future, future.set_result, rows.get(key)) for key in batch for future in batch[key]]
            except Exception as error:
                settle = [(future, future.set_exception, error) for key in batch for future in batch[key]]
            for future, set_outcome, outcome in settle:
                if not future.done():  # its reader may have gone away
                    set_outcome(outcome)

    def read(key: K) -> asyncio.Future[Row | None]:
        nonlocal flying
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        waiting.setdefault(key, (monotonic(), []))[1].append(future)
        if flying is None or flying.done():
            flying = loop.create_task(fly())
        return future

    return read


def one_line(error: BaseException) -> str:
    """The first line of an error. libpq names host and user in it, never a password."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
