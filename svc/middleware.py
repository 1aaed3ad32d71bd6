"""What happens to every request: who asks, the limits of its body, HEAD, failures, headers, metrics and the log."""

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from functools import cached_property
from time import perf_counter
from typing import Any
from urllib.parse import unquote_to_bytes

import fastapi
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svc import auth, errors, metrics, repo, settings
from svc.db import one_line
from svc.models import Conditions, parse_json

log = logging.getLogger(__name__)

UNCACHED = {"/health", "/health/live", "/metrics"}


def middleware(app: ASGIApp) -> ASGIApp:
    """Answer every failure as a problem, and log every write and every 401 and 403 in one line."""

    async def handle(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan
            try:
                settings.load().database()
            except SystemExit as error:  # of a wrong setting: one line, where Starlette would send a traceback
                return await send({"type": "lifespan.startup.failed", "message": error.code})
            return await app(scope, receive, send)
        began, status = perf_counter(), 0
        method = scope["method"]
        # uvicorn reads no body behind a head that asks for an upgrade.
        closing = any(name == b"connection" and b"upgrade" in value.lower() for name, value in scope["headers"])
        # Routes match the path as it was sent: decoded, %2F within a name would not differ from / between two names.
        scope = {**scope, "path": scope["raw_path"].decode("ascii"), "head": method == "HEAD", "closing": closing}
        if method == "HEAD":
            scope["method"] = "GET"  # the server leaves out the body of the answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                cacheable = status < 400 and scope["path"].removeprefix(scope["root_path"]) not in UNCACHED
                message["headers"].append((b"cache-control", b"private, no-cache" if cacheable else b"no-store"))
                if closing:
                    message["headers"].append((b"connection", b"close"))
            if "more_body" in message:
                # It waits for the client to read what was sent before: a list must not be held for ever.
                async with asyncio.timeout(settings.load().body_timeout):
                    await send(message)
            else:
                await send(message)

        # A pipelined request begins in the context of the one before it on its connection.
        repo.actor.set("anonymous")
        try:
            await auth.check(scope)
            await app(scope, receive, answer)
        except (Exception, asyncio.CancelledError) as error:
            if status:
                log.error("%s broke off: %s", errors.place(scope), one_line(error))
            else:
                await errors.respond(scope, error)(scope, receive, answer)
        finally:
            seconds = perf_counter() - began
            metrics.observe(method, status, seconds if b"wait=" not in scope["query_string"] else None)
            level = logging.DEBUG if method in ("GET", "HEAD") and status not in (401, 403) else logging.INFO
            log.log(level, "%s %s %s %d %.1f ms", repo.actor.get(), method, scope["path"], status, seconds * 1000)

    return handle


class Request(fastapi.Request):
    """Limits bodies, reads them by `parse_json`, and knows the conditions of the request (RFC 9110, section 13)."""

    @cached_property
    def when(self) -> Conditions:
        """If-None-Match is compared weakly (section 8.8.3.2)."""
        if_none_match = [etag.removeprefix("W/") for etag in _find_etags(self.scope, b"if-none-match")]
        return Conditions(_find_etags(self.scope, b"if-match"), if_none_match)

    async def json(self) -> Any:
        try:
            return parse_json((await super().body()).decode().removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"JSON decode error: {error}") from None

    async def body(self) -> bytes:
        """Raises 408 if the body is not there after BODY_TIMEOUT."""
        try:
            async with asyncio.timeout(settings.load().body_timeout):
                return await super().body()
        except TimeoutError:
            raise HTTPException(408, "The body did not arrive in time.", {"Connection": "close"}) from None

    async def stream(self) -> AsyncIterator[bytes]:
        """The parts of a body. Raises 413 as soon as it is known to be over MAX_BODY_BYTES."""
        if self.scope["closing"]:
            raise HTTPException(400, "Connections are not upgraded here: send the body without Connection: upgrade")
        limit = settings.load().max_body_bytes
        too_large = HTTPException(413, f"A body has at most {limit} bytes.")
        if int(self.headers.get("content-length", 0)) > limit:
            raise too_large
        received = 0
        async for part in super().stream():
            received += len(part)
            if received > limit:
                raise too_large
            yield part


def _find_etags(scope: Scope, name: bytes) -> list[str]:
    """The entity tags of a header, or * if it has none but that. Empty without the header.

    What is malformed matches no ETag. It looks at the raw headers, as every read does so: `Headers` would cost 5 µs.
    """
    lines = [line for sent, line in scope["headers"] if sent == name]
    value = b", ".join(lines).decode("latin-1").strip(" \t")
    return lines and (re.findall(r'(?:W/)?"[^"]*"|[^ \t,*]+', value) or [value[:1]])


class Route(APIRoute):
    """Refuses query parameters that it does not know.

    A hot read, one that may answer 304, skips FastAPI's dependency resolution, which would take half of its time, if it
    has no query.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.resolve = self.get_route_handler()
        self.hot = 304 in self.responses
        fields = self.dependant.query_params
        self.known = {name for field in fields for name in getattr(field.type_, "model_fields", [field.alias])}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self.methods:
            raise HTTPException(405)
        request = Request(scope, receive)
        if query := scope["query_string"]:
            try:
                unquote_to_bytes(query).decode()
            except UnicodeDecodeError:
                raise errors.invalid("Query should be percent-encoded UTF-8", "not_utf8", "query") from None
            if unknown := request.query_params.keys() - self.known:
                raise errors.invalid("Unknown query parameter", "extra_forbidden", "query", min(unknown))
        if query or not self.hot:
            response = await self.resolve(request)
        else:
            values = {}
            for field in self.dependant.path_params:
                sent = request.path_params[field.name]
                values[field.name], invalid = field.validate(sent, loc=("path", field.name))
                if invalid:
                    raise RequestValidationError(invalid)
            response = await self.endpoint(request, **values)
        try:
            await response(scope, receive, send)
        finally:
            if isinstance(response, StreamingResponse):
                await response.body_iterator.aclose()  # else a list that broke off would keep its turn
