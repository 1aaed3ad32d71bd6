"""Long polling. Looks for changes by any process while somebody waits.

A look is one statement for everything that is watched. It compares what is stored with what each reader has, so a
change is found whenever it happened, and none can fall between a read and the wait after it.
"""

import asyncio
import logging
import random
import signal
from contextlib import suppress
from time import monotonic

import psycopg2
from fastapi import Request

from svc import auth, repo
from svc.db import Row, one_line

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25  # seconds
SHARE = 1 / 20  # of the time, at most, for looks
JITTER = 0.00005  # seconds for each woken reader, so that thousands do not read at once

# The id of the configuration that each reader waits for and the ETags that it knows, by the event that wakes it.
readers: dict[asyncio.Event, tuple[str, frozenset[str]]] = {}
_tokens: dict[str, Row] = {}  # those that were valid at the last look


async def until_changed(request: Request, key: repo.Key, known: frozenset[str], seconds: float) -> Row | None:
    """The row as it is once its ETag is not known (it may be gone), or else after so many seconds.

    It holds neither a thread nor a connection while it waits. It ends early when the client goes away, the service
    stops, or the client's token no longer counts (401). A database that is away is an error only for the first read.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + seconds
    wake = asyncio.Event()
    gone = asyncio.create_task(_wait_for_disconnect(request))
    gone.add_done_callback(lambda _: wake.set())
    readers[wake] = "", known  # counts from now on; no configuration has this id
    try:
        row = await repo.read_configuration(key)
        while repo.etag_matches(row, known) and loop.time() < until and not gone.done() and not _is_stopping():
            readers[wake] = row["id"], known
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await wake.wait()
            wake.clear()
            await auth.check(request.scope)
            with suppress(psycopg2.Error):
                row = await repo.read_configuration(key)
        return row
    finally:
        gone.cancel()
        del readers[wake]


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_stopping() -> bool:
    """Whether uvicorn was told to stop. It waits for every answer before it tells the application.

    Its SIGTERM handler is a method of the server, which knows.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False)


async def keep_looking() -> None:
    """Look for changes until this is cancelled."""
    available, before = True, 0.0
    while True:
        began = monotonic()
        try:
            await _look()
            available = True
        except Exception as error:
            if available:
                log.warning("changes cannot be seen: %s", one_line(error))
            available, began = False, monotonic()  # how long it took to fail says nothing of what a look costs
        spent = monotonic() - began
        # The faster of two: other load slows a look at times.
        await asyncio.sleep(max(LOOK_EVERY - spent, min(spent, before) / SHARE))
        before = spent


async def _look() -> None:
    if not readers:
        return
    if _is_stopping() or await _tokens_changed():
        woken = list(readers)
    else:
        watched = dict(readers)
        rows = await repo.read_etags({id for id, _ in watched.values()})
        woken = [reader for reader, (id, known) in watched.items() if not repo.etag_matches(rows.get(id), known)]
    for reader in woken:
        asyncio.get_running_loop().call_later(random.random() * JITTER * len(woken), reader.set)


async def _tokens_changed() -> bool:
    global _tokens
    before, _tokens = _tokens, await auth.refresh()
    return _tokens != before
