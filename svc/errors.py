"""Every answer that is an error: application/problem+json (RFC 9457), and which failure becomes which."""

import json
import logging
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import psycopg2
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Match
from starlette.types import Scope

from svc.db import one_line
from svc.models import PreconditionProblem, Problem, ValidationProblem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
# Those that have an answer of their own, by the handlers below.
KNOWN = (RequestValidationError, StarletteHTTPException, psycopg2.Error)
SHAPES: dict[int, type[Problem]] = {400: ValidationProblem, 412: PreconditionProblem}
RETRY_AFTER = {"Retry-After": "1"}

# The detail of a 409, by the name of the constraint in the migrations that a write broke.
BROKEN: dict[str | None, str] = {
    "applications_name_key": "The name is taken: another application has it.",
    "configurations_application_id_name_key": "The name is taken: another configuration of this application has it.",
}


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **members: Any) -> Response:
    # ASCII, because what it quotes (the name of an unknown field) may hold what UTF-8 cannot.
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **members}
    return Response(json.dumps(body), status, headers, media_type=MEDIA_TYPE)


def invalid(*errors: dict[str, Any]) -> Response:
    """400, with what is wrong at which place, and never the value that was sent."""
    shown = [{"loc": e["loc"], "msg": _message(e), "type": e["type"]} for e in errors]
    return problem(400, "The request does not validate: see errors.", errors=shown)


def _message(error: dict[str, Any]) -> str:
    if error["type"] == "model_attributes_type":
        return "Input should be a JSON object, sent with Content-Type: application/json"
    reason = error.get("ctx", {}).get("error")
    return f"{error['msg']}: {reason}" if error["type"] == "json_invalid" else error["msg"]


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these errors, and of those that every route may answer."""
    return {status: {"model": SHAPES.get(status, Problem)} for status in (*statuses, 503)}


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document with errors as they are answered: as problems, and 400 where FastAPI puts 422."""
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            for status, response in operation["responses"].items():
                if status >= "400":
                    response["description"] = HTTPStatus(int(status)).phrase
                    response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    return document


async def _on_invalid(_: Request, error: RequestValidationError) -> Response:
    return invalid(*error.errors())


async def _on_http(request: Request, error: StarletteHTTPException) -> Response:
    headers = dict(error.headers or {})
    detail = error.detail
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
        detail = f"This resource takes {headers['Allow']}."
    elif error.status_code == 404 and not isinstance(error, HTTPException):
        detail = "There is nothing at this path: see /docs."
    return problem(error.status_code, detail, headers)


def _allowed(request: Request) -> list[str]:
    """The methods of every route with this path: Starlette names only the first route's."""
    found: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods
    return sorted(found | {"HEAD"} if "GET" in found else found)


async def _on_database(request: Request, error: psycopg2.Error) -> Response:
    constraint = error.diag.constraint_name
    if constraint in BROKEN:
        return problem(409, BROKEN[constraint])
    if constraint == "configurations_application_id_fkey":
        msg = "There is no application with this id"
        return invalid({"loc": ["body", "application_id"], "msg": msg, "type": "unknown_application"})
    if isinstance(error, psycopg2.IntegrityError | psycopg2.DataError):
        return invalid({"loc": ["body"], "msg": "The database refuses this value", "type": "refused"})
    log.error("%s: %s %s", place(request.scope), error.pgcode or "no SQLSTATE", one_line(error))
    return problem(503, "The database cannot answer now: try again.", RETRY_AFTER)


def unexpected(request: Request, error: Exception) -> Response:
    """500, which no request should get: what went wrong is in the log."""
    log.error("%s", place(request.scope), exc_info=error)
    return problem(500, "Internal error.")


def place(scope: Scope) -> str:
    """Method and path for the log. Not by way of request.url, which raises ValueError for some Host headers."""
    return f"{scope['method']} {quote(scope['path'])}"


def install(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http)
    app.add_exception_handler(psycopg2.Error, _on_database)
