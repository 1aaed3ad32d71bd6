"""From a request to the key that it reads, and from a row to the answer: ETags, conditions, links, waiting."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import unquote, urlencode

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic_core import PydanticCustomError
from starlette.convertors import PathConvertor, register_url_convertor

from svc import errors, etags, repo, settings, watch
from svc.db import Row
from svc.errors import problem
from svc.models import ulid

PREFIX = "/api/v1"

is_number = re.compile(r"[0-9]+(\.[0-9]+)?").fullmatch


class AnyText(PathConvertor):
    regex = r"[\s\S]*"  # a name may hold slashes and line ends


register_url_convertor("text", AnyText())


def path_id(request: Request) -> str:
    try:
        return ulid(request.path_params["id"])
    except PydanticCustomError as error:
        raise refused(("path", "id"), error.message(), error.type) from None


def path_names(request: Request) -> tuple[str, str]:
    """The names in the path as it was sent: decoded, a slash within a name would not differ from one between them."""
    path = request.scope["raw_path"].decode("ascii").removeprefix(f"{PREFIX}/applications/")
    application_name, _, name = path.partition("/configurations/")
    if "/" in application_name:
        raise HTTPException(404, "There is nothing at this path: encode a slash in an application's name as %2F.")
    try:
        names = unquote(application_name, errors="strict"), unquote(name, errors="strict")
    except UnicodeDecodeError:
        raise HTTPException(404, "A name in a path is percent-encoded UTF-8.") from None
    if "\0" in "".join(names):
        raise HTTPException(404, "No name holds U+0000.")
    return names


def refused(loc: tuple[str, ...], msg: str, type: str) -> RequestValidationError:
    return RequestValidationError([{"loc": loc, "msg": msg, "type": type}])


def admitted(request: Request, id: str) -> list[str] | None:
    """The versions that If-Match lets a write change; None is every one."""
    return etags.versions(etags.header(request.scope, b"if-match"), id)


async def current[K: watch.Key](request: Request, key: K, read: Callable[[K], Awaitable[Row | None]]) -> Row | None:
    """The row, or with ?wait= the row once it is another than If-None-Match names."""
    wait = request.query_params.get("wait") if request.scope["query_string"] else None
    if wait is None:
        return await read(key)
    if not is_number(wait) or float(wait) > 60:
        raise refused(("query", "wait"), "Input should be a number of seconds, 60 at most", "wait")
    if_none_match = etags.header(request.scope, b"if-none-match")
    if if_none_match is None:
        raise refused(("query", "wait"), "To wait for a change, name in If-None-Match what you have", "wait")
    known = etags.tags(if_none_match)
    if watch.count() < settings.load().max_waiters:
        return await watch.until_changed(key, read, known, float(wait), request.receive)
    row = await read(key)
    if etags.named(known, etags.etag(row)):
        raise HTTPException(503, "Too many clients wait for a change: try again.", errors.RETRY_AFTER)
    return row


def shown(request: Request, row: Row | None, missing: str) -> Response:
    """What PostgreSQL wrote, as it is; 304 if If-None-Match names it; 404 if there is nothing."""
    tag = etags.etag(row)
    if tag is None:
        raise HTTPException(404, missing)
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if etags.named(etags.tags(etags.header(request.scope, b"if-none-match")), tag):
        return Response(status_code=304, headers=headers)
    return Response(row["json"], 200, headers, media_type="application/json")


def created(kind: str, row: Row) -> Response:
    headers = {"ETag": etags.etag(row), "Location": f"{PREFIX}/{kind}/{row['id']}", "Cache-Control": "no-cache"}
    return Response(row["json"], 201, headers, media_type="application/json")


def written(row: Row | None, kind: str) -> Response:
    """The answer to a conditional write: 404 comes before 412 (RFC 9110, section 13.2.1)."""
    if row is None:
        raise HTTPException(404, f"There is no {kind} with this id.")
    headers = {"ETag": etags.etag(row), "Cache-Control": "no-cache"}
    if not row["written"]:
        detail = f"If-Match does not name version {row['version']}, which is stored: read it, and decide again."
        return problem(412, detail, headers, version=row["version"])
    watch.changed()
    return Response(row["json"], 200, headers, media_type="application/json")


def deleted(row: Row | None, kind: str) -> Response:
    response = written(row, kind)
    return Response(status_code=204) if response.status_code == 200 else response


async def listed(path: str, listing: repo.Listed, bound: str, query: dict[str, Any]) -> Response:
    """A JSON array, sent page by page as it is read; its first page is read before the status is sent."""
    end, pages = listing
    first = await anext(pages, "")

    async def body() -> AsyncIterator[str]:
        yield "[" + first
        async for page in pages:
            yield "," + page
        yield "]"

    following = {name: value for name, value in {**query, bound: end}.items() if value is not None}
    link = {"Link": f'<{PREFIX}/{path}?{urlencode(following)}>; rel="next"'} if end else None
    return StreamingResponse(body(), headers=link, media_type="application/json")
