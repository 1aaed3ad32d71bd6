"""Readers that wait for a change. One look a second finds what changed, by whomever, and one at once what changed here.

A look is one statement for everything that is watched. It compares what is stored with what each reader has, so a
change is found whenever it happened, and none can fall between a read and the wait after it.
"""

import asyncio
import logging
import random
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import psycopg2
from starlette.types import Receive

from svc import repo
from svc.db import Row, one_line
from svc.etags import etag, named

log = logging.getLogger(__name__)

LOOK_EVERY = 1.0  # seconds
GATHER = 0.01  # seconds in which the changes of many writers become one look
SPREAD = 0.00005  # seconds a woken reader, so that thousands do not read at the same instant

Key = str | tuple[str, str]  # the id of a configuration, or the names of its application and its own

# The key that each reader waits for and the ETags that it knows, by the event that wakes it.
_readers: dict[asyncio.Event, tuple[Key, frozenset[str]]] = {}
_changed = asyncio.Event()
_closing = False


@asynccontextmanager
async def opened() -> AsyncIterator[None]:
    """Look for changes until the block ends, or SIGTERM or SIGINT comes: then all who wait are answered."""
    global _closing, _changed
    _closing, _changed = False, asyncio.Event()
    looking = asyncio.create_task(_look_on())
    try:
        with _released_by_signals():
            yield
    finally:
        release()
        looking.cancel()


@contextmanager
def _released_by_signals() -> Iterator[None]:
    """uvicorn ends the application only when every request is answered, so those who wait must hear of it before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_signal(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(release)
        if callable(before[number]):
            before[number](number, frame)

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def release() -> None:
    """Answer all who wait, and let nobody wait any more."""
    global _closing
    _closing = True
    for reader in _readers:
        reader.set()


def changed() -> None:
    """To be called after every update and delete, for nobody waits for what is new: look at once, if anybody waits."""
    if _readers:
        _changed.set()


def count() -> int:
    """How many readers wait."""
    return len(_readers)


async def until_changed(
    key: Key,
    read: Callable[[Key], Awaitable[Row | None]],
    known: frozenset[str],
    seconds: float,
    receive: Receive,
) -> Row | None:
    """The row once its ETag is none of those known, None once there is none; after so many seconds, as it is then.

    It holds neither a thread nor a connection while it waits. It ends early when the client goes away. A database that
    is away is an error only for the first read.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    wake = asyncio.Event()
    gone = asyncio.create_task(_gone(receive))
    gone.add_done_callback(lambda _: wake.set())
    # Registered before it reads: what changes from here on sets the event.
    _readers[wake] = key, known
    try:
        row = await read(key)
        while named(known, etag(row)) and not _closing and not gone.done() and loop.time() < until:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await wake.wait()
            wake.clear()
            with suppress(psycopg2.Error):
                row = await read(key)
        return row
    finally:
        gone.cancel()
        del _readers[wake]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _look_on() -> None:
    available = True
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY):
                await _changed.wait()
                await asyncio.sleep(GATHER)
        _changed.clear()
        if not _readers:
            continue
        try:
            await _look()
            available = True
        except psycopg2.Error as error:
            if available:
                log.warning("changes cannot be seen: %s", one_line(error))
            available = False


async def _look() -> None:
    keys = {key for key, _ in _readers.values()}
    current = await repo.read_etags(keys)
    woken = [reader for reader, (key, known) in _readers.items() if key in keys and not named(known, current.get(key))]
    for reader in woken:
        asyncio.get_running_loop().call_later(random.random() * SPREAD * len(woken), reader.set)
