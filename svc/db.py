"""The connection pool, its threads, and how statements run on them, each within a deadline."""

import asyncio
import logging
import os
import re
import select
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import islice
from math import inf
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import psycopg2
from psycopg2.errors import DeadlockDetected, FeatureNotSupported, ReadOnlySqlTransaction, SerializationFailure
from psycopg2.extensions import connection, parse_dsn
from psycopg2.extras import RealDictCursor
from psycopg2.pool import ThreadedConnectionPool

from svc.settings import Settings

log = logging.getLogger(__name__)

Row = dict[str, Any]

BATCH = 64  # documents may be megabytes each, so this bounds what one statement brings into memory
CALM = 1  # seconds without an error after which an outage is over: some statements succeed during most outages

_settings: Settings
_pool: ThreadedConnectionPool
_executors: dict[str, ThreadPoolExecutor]
_prepared: WeakKeyDictionary[connection, dict[str, str]] = WeakKeyDictionary()  # the EXECUTE of each statement
_pending: Counter[str] = Counter()  # statements that run or wait, by their queue
_last_outage: float | None = None  # when the database was last found away; None while all is well


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[None]:
    """Hold the pool and its threads open. A thread for each connection: statements queue, and the pool never runs dry.

    A third of both is for lists and searches, so that they never take the place of others. What is urgent has one more.
    A database that is away does not stop the start: one line in the log says so, and each statement tries to connect.
    """
    global _settings, _pool, _executors
    _settings, limit = settings, settings.db_max_connections
    _pool = ThreadedConnectionPool(0, limit, cursor_factory=RealDictCursor, **_parameters(settings))
    _pool.minconn = limit  # how many idle ones it keeps
    threads = {"lists": max(1, limit // 3), "urgent": 1}
    threads["others"] = limit - threads["lists"]
    _executors = {queue: ThreadPoolExecutor(number) for queue, number in threads.items()}
    with suppress(psycopg2.Error):  # fetch() has logged it
        # The sleep makes each need a connection of its own.
        statement = "SELECT pg_sleep(0.05)"
        queues = ["others"] * threads["others"] + ["lists"] * threads["lists"]
        first = queues[: settings.db_min_connections]
        await asyncio.gather(*(fetch("connect", statement, {}, queue=queue) for queue in first))
    try:
        yield
    finally:
        for executor in _executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        renew()


def _parameters(settings: Settings) -> dict[str, Any]:
    """DATABASE_URL and the service's own defaults. The URL wins, except on encoding, time zone and isolation."""
    given = parse_dsn(settings.database())
    limits = f"-c statement_timeout={settings.db_statement_timeout}s -c lock_timeout={settings.db_lock_timeout}s"
    always = r"-c timezone=UTC -c default_transaction_isolation=read\ committed"
    given["options"] = f"{limits} {given.get('options', '')} {always}"
    given.setdefault("connect_timeout", settings.db_connect_timeout)
    # Seconds of TCP: firewalls forget connections that are silent for long.
    return {"application_name": "config-service", "keepalives_idle": 30, **given, "client_encoding": "UTF8"}


async def fetch(
    name: str, statement: str, params: Mapping[str, Any], within: float | None = None, queue: str = "others"
) -> list[Row]:
    """The rows of one statement, which is a transaction of its own. `name` is what the log calls it.

    Its queue is "others", "lists", or "urgent", which has a thread that nothing else waits for.
    Raises psycopg2.OperationalError at once if too many wait, and after `within` seconds (DB_DEADLINE unless told
    otherwise) if it has no answer. The statement is then given up: it did not begin, or its connection is cut off.
    Raises TimeoutError if a list cannot begin within a third of DB_DEADLINE. If it began later it might be cut off, and
    go on at the server beside those that follow.
    """
    loop = asyncio.get_running_loop()
    job = loop.create_future()
    deadline = loop.call_later(_settings.db_deadline if within is None else within, _give_up, job)
    begin_by = monotonic() + _settings.db_deadline / 3 if queue == "lists" else inf
    _pending[queue] += 1
    try:
        if queue == "others" and _pending[queue] > _settings.db_queue_limit:
            raise psycopg2.OperationalError("the queue for the database is full")
        try:
            _executors[queue].submit(_run, job, begin_by, name, statement, params)
        except RuntimeError:
            raise psycopg2.OperationalError("the service is shutting down, its threads have ended") from None
        rows = await job
        _log_outage(None)
        return rows
    except psycopg2.Error as error:
        # If it still has a connection, its server is silent. The idle ones lead there too, and each would cost somebody
        # the whole deadline. A connection stays read-only when its database or its server no longer is, and keeps what
        # it prepared when a migration has changed the type of what that returns.
        if job in _pool._used or isinstance(error, ReadOnlySqlTransaction | FeatureNotSupported):
            renew()
        if is_outage(error):
            _log_outage(error)
        raise
    finally:
        _pending[queue] -= 1
        deadline.cancel()
        if job in _pool._used:
            _cut_off(job)


def _run(job: asyncio.Future, begin_by: float, *statement: Any) -> None:
    """Run a job in a thread and settle it: as run_in_executor(), but with one future, which saves 25 µs."""
    try:
        outcome = TimeoutError() if monotonic() > begin_by else _execute(job, *statement)
    except BaseException as error:
        outcome = error
    job.get_loop().call_soon_threadsafe(_settle, job, outcome)


def _give_up(job: asyncio.Future) -> None:
    late = "the database did not answer" if job in _pool._used else "there was no connection to the database"
    _settle(job, psycopg2.OperationalError(f"{late} in time"))


def _settle(future: asyncio.Future, outcome: Any) -> None:
    if not future.done():  # done: given up, or its reader has gone away
        set_outcome = future.set_exception if isinstance(outcome, BaseException) else future.set_result
        set_outcome(outcome)


def _execute(job: asyncio.Future, name: str, statement: str, params: Mapping[str, Any]) -> list[Row]:
    lent = _lend(job)
    started = monotonic()
    try:
        if job.done():  # given up before it began; later it is cut off
            return []
        cursor = lent.cursor()
        if params and "RETURNING" in statement:  # a write: its best plan does not depend on its parameters
            statement = _prepare(cursor, statement)
        try:
            cursor.execute(statement, params)
        except (DeadlockDetected, SerializationFailure):
            cursor.execute(statement, params)  # undone as a whole, so it may run again
        return cursor.fetchall()
    finally:
        _pool.putconn(lent, job)  # closes a lost connection
        seconds = monotonic() - started
        level = logging.WARNING if seconds >= _settings.db_slow_statement else logging.DEBUG
        log.log(level, "statement: %s took %.4f s", name, seconds)


def _prepare(cursor: RealDictCursor, statement: str) -> str:
    """The EXECUTE of a statement, which each connection parses and plans once."""
    known = _prepared.setdefault(cursor.connection, {})
    if statement not in known:
        name, parameters = f"prepared_{len(known)}", sorted(set(re.findall(r"%\(\w+\)s", statement)))
        numbers = {parameter[2:-2]: f"${number}" for number, parameter in enumerate(parameters, 1)}
        cursor.execute(f"PREPARE {name} AS {statement % numbers}")
        known[statement] = f"EXECUTE {name} ({', '.join(parameters)})"
    return known[statement]


# --- What psycopg2's pool has no public name for ---
# Its getconn() connects under the pool's lock, where one silent host would hold up every thread, and lends what the
# server has closed. And it neither tells whose connection is which, nor closes only those that are idle.


def _lend(job: asyncio.Future) -> connection:
    """An idle connection, or a new one. An idle one that is readable was closed by the server, and is replaced."""
    while True:
        with _pool._lock:
            lent = _pool._getconn(job) if _pool._pool else None
        if lent is None:
            made = _pool._connect(job)
            made.autocommit = True  # once: psycopg2 lets other threads run each time, which costs a wait
            return made
        poll = select.poll()  # select.select() cannot take descriptors above 1023
        poll.register(lent, select.POLLIN)
        if not poll.poll(0):
            return lent
        _pool.putconn(lent, job, close=True)


def _cut_off(job: asyncio.Future) -> None:
    """If a statement still runs, wake its thread with an error. close() would wait for the server too."""
    with _pool._lock:  # so that no other job gets the connection meanwhile
        if lent := _pool._used.get(job):
            with suppress(OSError, psycopg2.Error), socket.socket(fileno=os.dup(lent.fileno())) as wire:
                wire.shutdown(socket.SHUT_RDWR)


def renew() -> None:
    """Close every idle connection, so that the next statements connect anew: the server may be another."""
    with _pool._lock:
        idle, _pool._pool = _pool._pool, []
    for each in idle:
        each.close()


def use() -> dict[str, int]:
    """How much of the pool is in use now."""
    busy, idle = len(_pool._used), len(_pool._pool)
    return {"busy": busy, "idle": idle, "queued": max(_pending.total() - busy, 0)}


# --- Outages ---


def is_outage(error: psycopg2.Error) -> bool:
    """Whether the database is away (fetch() has logged it), not one statement wrong."""
    if error.pgcode is None:
        return isinstance(error, psycopg2.OperationalError)
    return error.pgcode.startswith(("08", "53", "57P", "25006"))  # connection, resources, shutdown, read-only


def _log_outage(error: psycopg2.Error | None) -> None:
    """One line when an outage begins, and one when it ends. None: a statement has succeeded."""
    global _last_outage
    if error:
        if _last_outage is None:
            log.error("database unavailable: %s", one_line(error))
        _last_outage = monotonic()
    elif _last_outage is not None and monotonic() - _last_outage > CALM:
        _last_outage = None
        log.info("database available again")


def one_line(error: BaseException) -> str:
    """The first line of an error. libpq names host and user in it, never a password."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


# --- Reads that share a statement ---


def coalesced[K](
    fetch_all: Callable[[list[K], float], Awaitable[Mapping[K, Row]]],
) -> Callable[[K], Awaitable[Row | None]]:
    """A read of one key that shares its statement with every other read that waits at the time.

    One statement runs at a time. Whoever comes meanwhile waits for the next, which takes up to BATCH keys, each once.
    So a read always begins after it was asked for. An error reaches those who shared the statement, nobody else.
    `fetch_all` gets the keys and the seconds that are left to the one of them who waits longest.
    """
    waiting: dict[K, tuple[float, list[asyncio.Future[Row | None]]]] = {}  # since when and who, oldest first
    batches: asyncio.Task[None] | None = None

    async def run_batches() -> None:
        while waiting:
            keys = list(islice(waiting, BATCH))
            since = waiting[keys[0]][0]
            readers = [(key, future) for key in keys for future in waiting.pop(key)[1]]
            try:
                outcomes = await fetch_all(keys, since + _settings.db_deadline - monotonic())
            except Exception as error:
                outcomes = dict.fromkeys(keys, error)
            for key, future in readers:
                _settle(future, outcomes.get(key))

    def read(key: K) -> asyncio.Future[Row | None]:
        nonlocal batches
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        waiting.setdefault(key, (monotonic(), []))[1].append(future)
        if batches is None or batches.done():
            batches = loop.create_task(run_batches())
        return future

    return read
