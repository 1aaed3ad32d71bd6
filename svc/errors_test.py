import asyncio
from typing import Any

import httpx
import psycopg2
import pytest
from fastapi import Request
from ulid import ULID

from svc import dev, errors, repo
from svc.app import app
from svc.app_test import problem


def answer(error: BaseException, path: str = "/api/v1/applications") -> httpx.Response:
    """The answer to an error of a route."""
    scope: dict[str, Any] = {"type": "http", "method": "PUT", "path": path, "headers": [], "app": app}
    response = asyncio.run(errors.respond(Request(scope), error))
    return httpx.Response(response.status_code, headers=response.headers, content=response.body)


def database_error(url: str, statement: str, **params: Any) -> psycopg2.Error:
    with pytest.raises(psycopg2.Error) as caught:
        dev.execute(url, statement, params)
    return caught.value


INSERT = "INSERT INTO configurations (id, application_id, name, config) VALUES (%(new)s, %(a)s, 'production', '{}')"
BROKEN = {
    "INSERT INTO applications (id, name) SELECT %(new)s, name FROM applications WHERE id = %(a)s": (
        409,
        "The name is taken: another application has it.",
    ),
    INSERT: (409, "The name is taken: another configuration of this application has it."),
    INSERT.replace("%(a)s", "%(new)s"): (400, "There is no application with this id"),
    INSERT.replace("'{}'", "jsonb_build_object('a', repeat('x', 8388608))"): (
        400,
        "Document should have at most 8388608 bytes as PostgreSQL prints it",
    ),
    "UPDATE applications SET name = ' ' WHERE id = %(a)s": (400, "The database refuses this value"),
    "UPDATE applications SET name = repeat('x', 257) WHERE id = %(a)s": (400, "The database refuses this value"),
    r"""SELECT '"\u0000"'::jsonb""": (400, "Document should not contain U+0000"),
    "SELECT secret FROM nowhere": (503, errors.MENDED_BY_OPERATOR),
    "SET ROLE pg_monitor; DELETE FROM applications": (503, errors.MENDED_BY_OPERATOR),
    "SET TRANSACTION READ ONLY; DELETE FROM applications": (503, errors.AWAY),
    "SET statement_timeout = 1; SELECT 'secret', pg_sleep(1)": (503, errors.AWAY),
    "DO $$ BEGIN RAISE 'secret' USING ERRCODE = '57P01'; END $$": (503, errors.AWAY),
}


@pytest.mark.parametrize(("statement", "status", "words"), [(each, *told) for each, told in BROKEN.items()])
def test_what_the_database_refuses_becomes_its_answer_without_a_word_of_the_database(
    url, configuration, statement, status, words
):
    error = database_error(url, statement, a=configuration["application_id"], new=str(ULID()))
    response = answer(error)
    shown = problem(response, status)
    assert (shown["errors"][0]["msg"] if status == 400 else shown["detail"]) == words
    assert response.headers.get("retry-after") == {errors.AWAY: "1", errors.MENDED_BY_OPERATOR: "60"}.get(words)
    for inside in ("secret", "SELECT", "INSERT", "applications_", "configurations_", "relation", error.pgcode):
        assert inside not in response.text


REASONS = {
    'password authentication failed for user "hunter2"': "the database refuses the user or the password",
    "sorry, too many clients already": "the database has too many connections",
    'database "hunter2" does not exist': "the database or the user of DATABASE_URL does not exist",
    'could not translate host name "hunter2"': "the database does not answer",
}


@pytest.mark.parametrize(("libpq", "words"), REASONS.items())
def test_health_tells_why_it_cannot_connect_without_a_secret(libpq, words):
    assert errors.reason(psycopg2.OperationalError(libpq)).startswith(words)


def test_health_tells_of_a_missing_grant_and_of_any_other_refusal(url):
    assert "a grant is missing" in errors.reason(database_error(url, "SET ROLE pg_monitor; TABLE migrations"))
    assert errors.reason(database_error(url, "SELECT 1 / 0")) == "it answers with 22012"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/applications", "GET, HEAD, POST"),
        ("/applications/{id}", "DELETE, GET, HEAD, PUT"),
        ("/configurations/{id}", "DELETE, GET, HEAD, PATCH, PUT"),
        ("/configurations/{id}/versions/1/restore", "POST"),
    ],
)
def test_405_names_every_method_that_the_path_takes(client, path, allowed):
    response = client.request("TRACE", path.format(id=ULID()))
    assert problem(response, 405)["detail"] == f"This resource takes {allowed}."
    assert response.headers["allow"] == allowed


def test_a_path_that_is_nowhere_is_404_and_leads_to_the_docs(client):
    assert "/docs" in problem(client.get("/applications/"), 404)["detail"]


def test_a_validation_error_lists_20_places_and_never_the_value(client):
    response = client.post("/applications", json={f"é {number}": "hunter2" for number in range(100)})
    shown = problem(response, 400)["errors"]
    assert shown[1] == {"loc": ["body", "é 0"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}
    assert (len(shown), "hunter2" in response.text) == (20, False)


def test_an_error_that_nobody_expects_is_logged_and_leaves_the_connection_whole(
    client, monkeypatch, caplog, application
):
    async def broken(_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(repo, "read_application", broken)
    path = f"/applications/{application['id']}"
    response = client.get(path)
    assert problem(response, 500)["detail"] == "Internal error."
    assert "connection" not in response.headers
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert (record.getMessage(), record.exc_info[0]) == (f"GET /api/v1{path}", ZeroDivisionError)
    monkeypatch.undo()
    assert client.get(path).json() == application


def test_what_only_an_operator_can_mend_is_logged_in_one_line(url, caplog):
    answer(database_error(url, "SELECT secret FROM nowhere"), "/api/v1/applications/X")
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage() == 'PUT /api/v1/applications/X: 42P01 relation "nowhere" does not exist'
