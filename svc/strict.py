"""What is refused before a route sees it: bodies too large or too slow, loose JSON, query parameters nobody knows."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svc import errors, models, settings
from svc.db import one_line
from svc.errors import invalid, problem

log = logging.getLogger(__name__)


class StrictRequest(Request):
    async def json(self) -> Any:
        return models.parse(await self.body())


class StrictRoute(APIRoute):
    """Reads bodies by `models.parse`, refuses query parameters that are repeated or that it does not describe.

    An exception that nobody expects is answered here, where the connection stays whole.
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        takes = self.dependant
        # An endpoint that takes the request alone needs nothing of what FastAPI does for each: 25 of its 40 µs.
        direct = not (takes.path_params or takes.query_params or takes.header_params or takes.body_params)
        handle = self.endpoint if direct and takes.request_param_name else super().get_route_handler()
        known = {field.alias for field in takes.query_params}
        described = (self.openapi_extra or {}).get("parameters", [])
        known |= {parameter["name"] for parameter in described if parameter["in"] == "query"}
        has_body = self.body_field is not None

        async def handle_strictly(request: Request) -> Any:
            try:
                if query := request.scope["query_string"]:
                    _check_query(query, known)
                return await handle(StrictRequest(request.scope, request.receive) if has_body else request)
            except errors.KNOWN:
                raise
            except Exception as error:
                # A handler of Exception would answer and raise it again, which breaks the client's connection.
                return errors.unexpected(request, error)

        return handle_strictly


def _check_query(query: bytes, known: set[str]) -> None:
    try:
        names = [name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="strict")]
    except UnicodeDecodeError:
        refusal = {"loc": ("query",), "msg": "Query should be percent-encoded UTF-8", "type": "not_utf8"}
        raise RequestValidationError([refusal]) from None
    found = [
        {"loc": ("query", name), "msg": "Unknown query parameter", "type": "extra_forbidden"}
        for name in names
        if name not in known
    ] + [
        {"loc": ("query", name), "msg": "Query parameter given more than once", "type": "repeated"}
        for name in known
        if names.count(name) > 1
    ]
    if found:
        raise RequestValidationError(found)


def guarded(app: ASGIApp) -> ASGIApp:
    """ASGI middleware: reads a body within its limits before the application runs, and answers HEAD as GET.

    413 as soon as a body is known to be over MAX_BODY_BYTES, 408 if it is not there after BODY_TIMEOUT seconds.
    """

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await app(scope, receive, _briefly(send))
        if scope["type"] == "websocket":
            return await problem(404, "There are no WebSockets here.")(scope, receive, send)
        if _upgrades(scope["headers"]):
            # As some clients ask of every server. uvicorn drops what follows the head, and never reads on.
            send = _closing(send)
            if {b"content-length", b"transfer-encoding"} & dict(scope["headers"]).keys():
                msg = "Connections are not upgraded here: send the body without this header"
                return await invalid({"loc": ["header", "upgrade"], "msg": msg, "type": "upgrade"})(
                    scope, receive, send
                )
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server leaves the body of its answer out
        elif scope["method"] != "GET":
            try:
                body = await _body(scope, receive)
            except ValueError as error:
                return await problem(413, str(error))(scope, receive, send)
            except TimeoutError:
                refusal = problem(408, "The body did not arrive in time.", {"Connection": "close"})
                return await refusal(scope, receive, send)
            if body is None:
                return None  # the client went away
            receive = _replay(body, receive)
        try:
            await app(scope, receive, send)
        except Exception as error:
            # Every error has its handler: this one came when the answer was under way, so it is left unfinished.
            log.error("%s broke off: %s", errors.place(scope), one_line(error.__cause__ or error))

    return guard


def ended(app: ASGIApp) -> ASGIApp:
    """ASGI middleware: answers 503 where a request is still at work SHUTDOWN_TIMEOUT seconds after SIGTERM."""

    async def end(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            refusal = problem(503, "The service is shutting down: try again.", errors.RETRY_AFTER)
            with suppress(RuntimeError):  # its answer is under way, and is left unfinished
                await refusal(scope, receive, send)

    return end


def _upgrades(headers: list[tuple[bytes, bytes]]) -> bool:
    for name, _ in headers:
        if name == b"upgrade":
            return any(name == b"connection" and b"upgrade" in value.lower() for name, value in headers)
    return False


def _closing(send: Send) -> Send:
    async def send_and_close(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"connection", b"close")]
        await send(message)

    return send_and_close


async def _body(scope: Scope, receive: Receive) -> bytes | None:
    limit = settings.load().max_body_bytes
    too_large = ValueError(f"A body has at most {limit} bytes.")
    if int(dict(scope["headers"]).get(b"content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    async with asyncio.timeout(settings.load().body_timeout):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body"):
                return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _briefly(send: Send) -> Send:
    """Passes a failed start on as its last line, where Starlette sends the whole traceback."""

    async def send_briefly(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed" and "SystemExit: " in message["message"]:
            message["message"] = message["message"].rpartition("SystemExit: ")[2].strip()
        await send(message)

    return send_briefly
