import asyncio
import json
import logging
from typing import Any

import psycopg2
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response

from svc import errors
from svc.app import app
from svc.models import Problem, ValidationProblem


def shown(response: Response) -> dict[str, Any]:
    """What a response says, once its form is checked."""
    assert response.media_type == response.headers["content-type"] == "application/problem+json"
    body = json.loads(response.body)
    (ValidationProblem if "errors" in body else Problem).model_validate(body)
    assert body["status"] == response.status_code
    return body


def request(path: str = "/api/v1/applications", method: str = "GET", **headers: str) -> Request:
    return Request(
        {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "app": app,
        }
    )


def handled(error: Exception, given: Request | None = None) -> Response:
    """The answer to an error, by the handler that the application has for it."""
    installed = FastAPI()
    errors.install(installed)
    [handler] = [each for kind, each in installed.exception_handlers.items() if kind in type(error).__mro__][-1:]
    return asyncio.run(handler(given or request(), error))


def database_error(sql, statement: str) -> psycopg2.Error:
    with pytest.raises(psycopg2.Error) as caught:
        sql(statement)
    return caught.value


def test_a_problem_has_the_members_of_rfc_9457():
    response = errors.problem(404, "There is none.", {"X-A": "b"}, more=[1])
    assert json.loads(response.body) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "There is none.",
        "more": [1],
    }
    assert response.headers["x-a"] == "b"


def test_a_problem_can_quote_what_utf_8_cannot_hold():
    response = errors.invalid({"loc": ["body", "\ud800\0é"], "msg": "Extra inputs are not permitted", "type": "extra"})
    assert response.body.isascii()
    assert shown(response)["errors"][0]["loc"] == ["body", "\ud800\0é"]


def test_a_validation_error_shows_place_message_and_type_and_nothing_else():
    error = {"loc": ("body", "a", 0), "msg": "No", "type": "no", "input": "secret", "ctx": {"x": "secret"}, "url": "u"}
    assert shown(errors.invalid(error))["errors"] == [{"loc": ["body", "a", 0], "msg": "No", "type": "no"}]


def test_broken_json_says_what_is_wrong_and_where():
    error = {"loc": ("body", 7), "msg": "JSON decode error", "type": "json_invalid", "ctx": {"error": "Extra data"}}
    assert shown(errors.invalid(error))["errors"] == [
        {"loc": ["body", 7], "msg": "JSON decode error: Extra data", "type": "json_invalid"}
    ]


ID = "01ARZ3NDEKTSV4RRFFQ69G5FA"
BROKEN = {
    "a name of an application that is taken": (
        f"INSERT INTO applications (id, name) VALUES ('{ID}0', 'secret'), ('{ID}1', 'secret')",
        409,
        "The name is taken: another application has it.",
    ),
    "a name of a configuration that is taken": (
        f"""
        WITH made AS (INSERT INTO applications (id, name) VALUES ('{ID}0', 'secret') RETURNING id)
        INSERT INTO configurations (id, application_id, name, config)
        SELECT '{ID}' || n, id, 'secret', '{{}}' FROM made, generate_series(1, 2) AS n
        """,
        409,
        "The name is taken: another configuration of this application has it.",
    ),
    "an application that is not there": (
        f"INSERT INTO configurations (id, application_id, name, config) VALUES ('{ID}0', '{ID}1', 'secret', '{{}}')",
        400,
        "There is no application with this id",
    ),
    "a check": (f"INSERT INTO applications (id, name) VALUES ('{ID}0', ' ')", 400, "The database refuses this value"),
    "an id that is none": ("INSERT INTO applications (id, name) VALUES ('secret', 'x')", 400, None),
    "text too long": (f"INSERT INTO applications (id, name) VALUES ('{ID}0', repeat('x', 257))", 400, None),
    "a value of another type": ("SELECT 'secret'::jsonb", 400, "The database refuses this value"),
    "a number beyond all bounds": ("SELECT '1e999999'::jsonb", 400, "The database refuses this value"),
    "a table that is missing": ("SELECT secret FROM nowhere", 503, None),
    "a statement that is none": ("SELEKT secret", 503, None),
    "a write where none may be": ("SET TRANSACTION READ ONLY; DELETE FROM applications", 503, None),
    "a statement that took too long": ("SET statement_timeout = 1; SELECT 'secret', pg_sleep(1)", 503, None),
    "a lock that was not had": ("DO $$ BEGIN RAISE 'secret' USING ERRCODE = '55P03'; END $$", 503, None),
    "a server that shuts down": ("DO $$ BEGIN RAISE 'secret' USING ERRCODE = '57P01'; END $$", 503, None),
    "no memory": ("DO $$ BEGIN RAISE 'secret' USING ERRCODE = '53200'; END $$", 503, None),
    "a broken index": ("DO $$ BEGIN RAISE 'secret' USING ERRCODE = 'XX001'; END $$", 503, None),
}


@pytest.mark.parametrize(("statement", "status", "text"), BROKEN.values(), ids=BROKEN)
def test_what_the_database_refuses_becomes_its_answer_without_a_word_of_the_database(sql, statement, status, text):
    before = sql("SELECT count(*) FROM applications")
    error = database_error(sql, statement)
    response = handled(error)
    body = shown(response)
    assert response.status_code == status
    assert response.headers.get("retry-after") == ("1" if status == 503 else None)
    said = body["errors"][0]["msg"] if status == 400 else body["detail"]
    assert text is None or said == text
    answer = response.body.decode()
    for word in ("secret", "SELECT", "INSERT", "constraint", "applications_", "relation", error.pgcode):
        assert word not in answer
    assert sql("SELECT count(*) FROM applications") == before


def test_every_constraint_with_an_answer_of_its_own_is_in_the_schema(sql):
    named = {row["conname"] for row in sql("SELECT conname FROM pg_constraint")}
    assert {*errors.BROKEN, "configurations_application_id_fkey"} <= named


def test_an_outage_is_logged_in_one_line_with_method_path_and_sqlstate(sql, caplog):
    error = database_error(sql, "DO $$ BEGIN RAISE E'first\\nsecond' USING ERRCODE = '57P01'; END $$")
    handled(error, request("/api/v1/applications/X", "PUT"))
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "PUT /api/v1/applications/X: 57P01 first"


def test_an_outage_without_a_code_says_so(caplog):
    response = handled(psycopg2.OperationalError("the database did not answer in time\nDETAIL: secret"))
    assert shown(response)["detail"] == "The database cannot answer now: try again."
    assert caplog.messages == ["GET /api/v1/applications: no SQLSTATE the database did not answer in time"]


def test_a_line_end_in_a_path_does_not_begin_a_line_in_the_log(caplog):
    handled(psycopg2.OperationalError("gone"), request("/api/v1/x\n2026-01-01 ERROR: all is lost"))
    errors.unexpected(request("/api/v1/x\r\nGET /"), ValueError("v"))
    assert [message for message in caplog.messages if "\n" in message or "\r" in message] == []


@pytest.mark.parametrize("host", ["[", "a b", "[::1", "é", "host:99999999", ""])
def test_whatever_the_host_header_says_an_outage_is_503(host):
    assert handled(psycopg2.OperationalError("gone"), request(host=host)).status_code == 503
    assert errors.unexpected(request(host=host), ValueError("v")).status_code == 500


def test_an_unexpected_error_is_logged_with_its_traceback_and_answered_without(caplog):
    try:
        raise ZeroDivisionError("secret")
    except ZeroDivisionError as error:
        response = errors.unexpected(request(method="POST"), error)
    assert (response.status_code, shown(response)["detail"]) == (500, "Internal error.")
    [record] = caplog.records
    assert record.getMessage() == "POST /api/v1/applications"
    assert record.exc_info[0] is ZeroDivisionError


ROUTES = {
    "/api/v1/applications": "GET, HEAD, POST",
    f"/api/v1/applications/{ID}0": "GET, HEAD, PUT",
    "/api/v1/configurations": "POST",
    f"/api/v1/configurations/{ID}0": "GET, HEAD, PUT",
    "/health": "GET, HEAD",
    "/": "GET, HEAD",
}


@pytest.mark.parametrize("path", ROUTES)
def test_405_names_every_method_that_the_path_takes(client, base_url, path):
    response = client.patch(base_url + path)
    assert response.status_code == 405
    allowed = response.headers["allow"]
    assert response.json()["detail"] == f"This resource takes {allowed}."
    for method in ROUTES[path].split(", "):  # further ones may come
        assert method in allowed.split(", ")
    assert allowed.split(", ") == sorted(set(allowed.split(", ")))
    for method in allowed.split(", "):
        assert client.request(method, base_url + path, json={}).status_code != 405


def test_404_of_a_route_keeps_its_words_and_404_of_no_route_points_at_the_docs():
    assert shown(handled(HTTPException(404, "There is no such thing.")))["detail"] == "There is no such thing."
    found = shown(handled(errors.StarletteHTTPException(404)))
    assert found["detail"] == "There is nothing at this path: see /docs."


def test_headers_of_an_error_are_kept():
    assert handled(HTTPException(503, "Wait.", {"Retry-After": "7"})).headers["retry-after"] == "7"


def test_openapi_shows_problems_and_400_in_place_of_422():
    schema = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    operation = {"responses": {"200": {"content": {"application/json": {}}}, "422": {}, "404": {**schema}}}
    document = errors.describe(
        {"paths": {"/x": {"get": operation}}, "components": {"schemas": {"HTTPValidationError": {}, "Problem": {}}}}
    )
    assert document["paths"]["/x"]["get"]["responses"] == {
        "200": {"content": {"application/json": {}}},
        "404": {
            "description": "Not Found",
            "content": {"application/problem+json": schema["content"]["application/json"]},
        },
    }
    assert document["components"]["schemas"] == {"Problem": {}}


def test_every_route_may_answer_503_and_400_has_errors():
    assert errors.responses(400, 404) == {
        400: {"model": ValidationProblem},
        404: {"model": Problem},
        503: {"model": Problem},
    }


def test_an_answer_that_was_not_expected_leaves_the_connection_whole(client, monkeypatch, caplog, application):
    async def broken(_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("svc.repo.read_application", broken)
    path = f"/applications/{application['id']}"
    response = client.get(path)
    assert (response.status_code, response.json()["detail"]) == (500, "Internal error.")
    assert "connection" not in response.headers
    assert "secret" not in response.text
    assert caplog.messages == [f"GET /api/v1{path}"]
    monkeypatch.undo()
    assert client.get(path).json() == application
