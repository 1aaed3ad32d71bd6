"""Conditional requests (RFC 9110), and how a row becomes an answer."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import URL

from svc import repo, settings, watch
from svc.db import Row
from svc.errors import RETRY_AFTER, invalid
from svc.middleware import Request
from svc.models import Conditions
from svc.repo import conditions_hold, etag_matches

# How much is sent at once, and so how much the server holds for a client that does not read.
CHUNK = 64 * 1024
# Lists that are under way at a time in this process, each with a page in memory. Others wait for their turn.
_lists = asyncio.Semaphore(32)


async def read_or_wait(request: Request, key: repo.Key, wait: float | None) -> Row | None:
    """Read the configuration. With ?wait=, return when its ETag is not in If-None-Match."""
    if wait is None:
        return await repo.read_configuration(key)
    if not request.when.if_none_match:
        raise invalid("To wait for a change, send your ETag in If-None-Match", "wait", "query", "wait")
    if len(watch.readers) < settings.load().max_waiters:
        return await watch.until_changed(request, key, frozenset(request.when.if_none_match), wait)
    row = await repo.read_configuration(key)
    if etag_matches(row, request.when.if_none_match):
        raise HTTPException(503, "Too many clients wait for a change: try again.", RETRY_AFTER)
    return row


def document(row: Row | None, if_none_match: Collection[str] = ()) -> Response:
    """What PostgreSQL wrote, as it is; 304 if If-None-Match names it; 404 if there is nothing."""
    if row is None:
        raise HTTPException(404, "There is nothing with this id.")
    if row["etag"] is None:
        missing = "This application has no configuration" if row["application_id"] else "There is no application"
        raise HTTPException(404, f"{missing} with this name.")
    headers = {"ETag": row["etag"]}
    if if_none_match and etag_matches(row, if_none_match):
        return Response(None, 304, headers)
    return json_response(row["json"], 200, headers)


def json_response(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """What is long is sent in chunks, so that a client who does not read is cut off.

    They are encoded one by one: readers of one batch then share the text.
    """
    body = text.encode()
    if len(body) <= CHUNK:
        return Response(body, status, headers, "application/json")
    headers = {**(headers or {}), "Content-Length": str(len(body))}
    return StreamingResponse(_in_chunks(text), status, headers, "application/json")


async def _in_chunks(text: str) -> AsyncIterator[str]:
    for start in range(0, len(text), CHUNK):
        yield text[start : start + CHUNK]


def created(request: Request, row: Row) -> Response:
    """201. Location is the path of a PUT; for a POST the id is added to the path."""
    path = request.scope["path"]
    headers = {"ETag": row["etag"], "Location": path if request.method == "PUT" else f"{path}/{row['id']}"}
    return json_response(row["json"], 201, headers)


def written(row: Row | None, when: Conditions) -> Response:
    """The answer to a conditional write: 404 comes before 412 (RFC 9110, section 13.2.1)."""
    if row is not None and not row["written"] and row["etag"]:
        if conditions_hold(row, when):  # it has changed since the statement looked
            raise HTTPException(503, "Others wrote it at the same time: try again.", RETRY_AFTER)
        raise HTTPException(412, _what_failed(row, when), {"ETag": row["etag"]})
    return document(row)


def deleted(row: Row | None, when: Conditions) -> Response:
    written(row, when)
    return Response(status_code=204)


def _what_failed(row: Row, when: Conditions) -> str:
    if etag_matches(row, when.if_none_match):
        return f"If-None-Match names {row['etag']}, the current ETag."
    detail = f"The ETag is {row['etag']} now, which If-Match does not name: read it, and decide again."
    if any(each.startswith("W/") for each in when.if_match):
        return f"{detail} A weak tag (W/) never matches."
    if not all(each.endswith('"') for each in when.if_match):
        return f"{detail} A tag stands in double quotes."
    return detail


async def stream_list(request: Request, pages: AsyncIterator[Row]) -> Response:
    """A JSON array, sent page by page as it is read. A limited one has a Link to the next page while there is more.

    Its first page is read before the status is sent. HEAD reads no other.
    """
    array = _array(pages, request.scope["head"])
    try:
        first = await anext(array)
    except TimeoutError:
        raise HTTPException(503, "Too many lists are being read: try again.", RETRY_AFTER) from None
    headers = {}
    if first["next"]:
        here = URL(f"{request.scope['path']}?{request.scope['query_string'].decode()}")
        headers["Link"] = f'<{here.include_query_params(**first["next"])}>; rel="next"'
    return StreamingResponse(array, 200, headers, "application/json")


async def _array(pages: AsyncIterator[Row], head: bool) -> AsyncIterator[Any]:
    """Its first page as a row, then the text of the whole array in chunks."""
    async with asyncio.timeout(settings.load().db_deadline):
        await _lists.acquire()
    try:
        page = await anext(pages)
        yield page
        text = "[" + page["json"]
        while not head and (page := await anext(pages, None)):
            async for chunk in _in_chunks(text):
                yield chunk
            text = "," + page["json"]
        async for chunk in _in_chunks(text + "]"):
            yield chunk
    finally:
        _lists.release()
