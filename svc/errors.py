"""Every answer that is an error: application/problem+json (RFC 9457), and which failure becomes which."""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any

import psycopg2
from fastapi import Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from svc import db
from svc.models import MAX_DOCUMENT_BYTES, READ_ONLY, Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_LISTED = 20
MAX_SHOWN = 100
RETRY_AFTER = {"Retry-After": "1"}
INVALID = "The request does not validate: see errors."
AWAY = "The database cannot answer now: try again."
MENDED_BY_OPERATOR = "The database denies the service what it needs: an operator has to mend it, see /health."

# What is said to a write that breaks a constraint, by its name in the migrations.
CONFLICTS: dict[str | None, str] = {
    "applications_name_key": "The name is taken: another application has it.",
    "configurations_application_id_name_key": "The name is taken: another configuration of this application has it.",
}


def problem(status: int, detail: str, headers: Any = None, **members: Any) -> Response:
    # json.dumps writes ASCII: what it quotes (the name of an unknown field) may hold what UTF-8 cannot.
    return Response(json.dumps(_members(status, detail, **members)), status, headers, MEDIA_TYPE)


def _members(status: int, detail: str, **others: Any) -> dict[str, Any]:
    return {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **others}


def invalid(msg: str, type: str, *loc: str) -> RequestValidationError:
    """The error of a request that is wrong in one place, which becomes a 400."""
    return RequestValidationError([{"loc": loc, "msg": msg, "type": type}])


def respond(scope: Scope, error: BaseException) -> Response:
    """The answer to any error. What nobody expected is 500, with a traceback in the log."""
    if isinstance(error, RequestValidationError):
        return _on_invalid(error)
    if isinstance(error, HTTPException):
        return _on_http(scope, error)
    if isinstance(error, psycopg2.Error):
        return _on_database(scope, error)
    if isinstance(error, asyncio.CancelledError):
        return problem(503, "The service is shutting down: try again.", RETRY_AFTER)
    log.error("%s", place(scope), exc_info=error)
    return problem(500, "Internal error.")


def _on_invalid(error: RequestValidationError) -> Response:
    """400, with what is wrong at which place, and never the value that was sent."""
    return problem(400, INVALID, errors=[_show(each) for each in error.errors()[:MAX_LISTED]])


def _show(error: dict[str, Any]) -> dict[str, Any]:
    # The name of an unknown field may be as long as a body.
    loc = [part[:MAX_SHOWN] if isinstance(part, str) else part for part in error["loc"]]
    return {"loc": loc, "msg": _message(error), "type": error["type"]}


def _message(error: dict[str, Any]) -> str:
    if error["type"] == "model_attributes_type":
        return "Input should be a JSON object, sent with Content-Type: application/json"
    if error["type"] == "extra_forbidden" and error["loc"][0] == "body" and error["loc"][-1] in READ_ONLY:
        return "This field is read-only: leave it out"
    if error["loc"] == ("path", "id"):
        return "Input should be a ULID: 26 characters, upper case. To find one by its name, list with ?name="
    return error["msg"]


def _on_http(scope: Scope, error: HTTPException) -> Response:
    if error.status_code == 400:  # the body could not be read
        return _on_invalid(invalid(error.detail, "json_invalid", "body"))
    if error.status_code == 405:
        allowed = ", ".join(_allowed_methods(scope))
        return problem(405, f"This resource takes {allowed}.", {"Allow": allowed})
    detail = "There is nothing at this path: see /docs." if error.detail == "Not Found" else error.detail
    return problem(error.status_code, detail, error.headers)


def _allowed_methods(scope: Scope) -> list[str]:
    """The methods of every route with this path: Starlette names only the first route's."""
    matching = [route for route in scope["app"].routes if route.matches(scope)[0] is not Match.NONE]
    methods = {method for route in matching for method in route.methods}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)


def _on_database(scope: Scope, error: psycopg2.Error) -> Response:
    if error.diag.constraint_name in CONFLICTS:
        return problem(409, CONFLICTS[error.diag.constraint_name])
    if isinstance(error, psycopg2.IntegrityError | psycopg2.DataError):
        return _on_invalid(_find_refused(error))
    if not db.is_outage(error):  # db logs an outage, once
        log.error("%s: %s %s", place(scope), error.pgcode or "no SQLSTATE", db.one_line(error))
    if isinstance(error, psycopg2.ProgrammingError):
        return problem(503, MENDED_BY_OPERATOR, {"Retry-After": "60"})
    return problem(503, AWAY, RETRY_AFTER)


def _find_refused(error: psycopg2.Error) -> RequestValidationError:
    """What the database refuses in a body."""
    if error.diag.constraint_name == "configurations_application_id_fkey":
        return invalid("There is no application with this id", "unknown_application", "body", "application_id")
    if error.diag.constraint_name == "document_depth_check":
        return invalid("Document should be nested at most 100 deep", "too_deep", "body", "config")
    if error.diag.constraint_name == "configurations_size_check":
        msg = f"Document should have at most {MAX_DOCUMENT_BYTES} bytes as PostgreSQL prints it"
        return invalid(msg, "too_large", "body", "config")
    if isinstance(error, psycopg2.errors.NotNullViolation):
        return invalid("Field required", "missing", "body", error.diag.column_name)
    if isinstance(error, psycopg2.errors.UntranslatableCharacter | psycopg2.errors.InvalidTextRepresentation):
        return invalid("Document should not contain U+0000 or an unpaired surrogate", "characters", "body")
    return invalid("The database refuses this value", "refused", "body")


def place(scope: Scope) -> str:
    """What was asked, for the log. The path is percent-encoded, so it is one line."""
    return f"{scope['method']} {scope['path']}"


# --- For /health ---

# What is wrong, by its SQLSTATE, or by what libpq says when it cannot connect.
REASONS = {
    "SQLSTATE 42501": "a grant is missing: see the README for those that the service needs",
    "SQLSTATE 42P01": "there are no tables: run `pipenv run migrate`, or grant USAGE on their schema",
    "password authentication failed": "the database refuses the user or the password of DATABASE_URL",
    "too many c": "the database has too many connections",
    "remaining connection slots": "the database has too many connections",
    "does not exist": "the database or the user of DATABASE_URL does not exist",
}


def reason(error: psycopg2.Error) -> str:
    """What is wrong with the database, in words that show no secret."""
    for words, told in REASONS.items():
        if words in f"SQLSTATE {error.pgcode} {error}":
            return told
    return f"it answers with {error.pgcode}" if error.pgcode else "the database does not answer"


# --- For OpenAPI ---

EXAMPLES: dict[int, dict[str, Any]] = {
    400: {"detail": INVALID, "errors": [{"loc": ["body", "name"], "msg": "Field required", "type": "missing"}]},
    401: {"detail": "A token is needed: send Authorization: Bearer."},
    403: {"detail": "This token may only read."},
    404: {"detail": "There is nothing with this id."},
    405: {"detail": "This resource takes GET, HEAD."},
    408: {"detail": "The body did not arrive in time."},
    409: {"detail": CONFLICTS["applications_name_key"]},
    412: {"detail": 'The ETag is "01K0M30A1B2C3D4E5F6G7H8J9K.7.1753000000000000" now: read it, and decide again.'},
    413: {"detail": "A body has at most 1048576 bytes."},
    415: {"detail": "A patch is sent as application/merge-patch+json."},
    503: {"detail": AWAY},
}


def problems(*statuses: int) -> dict[int | str, Any]:
    """The errors of a route, for OpenAPI."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {"content": {MEDIA_TYPE: {"schema": schema, "example": _members(status, **EXAMPLES[status])}}}
        for status in statuses
    }


def schemas() -> dict[str, Any]:
    """What `problems` refers to, for OpenAPI."""
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return schema.pop("$defs") | {"Problem": schema}
