from typing import Any

import httpx
import psycopg2
import pytest
from ulid import ULID

from svc import errors, repo
from svc.conftest import problem, run_sql


def answer(error: BaseException) -> httpx.Response:
    """The answer to an error of a route."""
    scope: dict[str, Any] = {"type": "http", "method": "PUT", "path": "/api/v1/applications/X"}
    response = errors.respond(scope, error)
    return httpx.Response(response.status_code, headers=response.headers, content=response.body)


def database_error(url: str, statement: str) -> psycopg2.Error:
    with pytest.raises(psycopg2.Error) as caught:
        run_sql(url, statement)
    return caught.value


BROKEN = {
    "INSERT INTO applications (id, name) VALUES ('hunter2', 'n')": (400, errors.INVALID, None),
    "SELECT hunter2 FROM nowhere": (503, errors.MENDED_BY_OPERATOR, "60"),
    "SET ROLE pg_monitor; DELETE FROM applications": (503, errors.MENDED_BY_OPERATOR, "60"),
    "SET TRANSACTION READ ONLY; DELETE FROM applications": (503, errors.AWAY, "1"),
    "SET statement_timeout = 1; SELECT 'hunter2', pg_sleep(1)": (503, errors.AWAY, "1"),
    "DO $$ BEGIN RAISE 'hunter2' USING ERRCODE = '57P01'; END $$": (503, errors.AWAY, "1"),
}


@pytest.mark.parametrize(("statement", "status", "detail", "retry_after"), [(k, *told) for k, told in BROKEN.items()])
def test_what_the_database_refuses_becomes_its_answer_without_a_word_of_the_database(
    url, statement, status, detail, retry_after
):
    error = database_error(url, statement)
    response = answer(error)
    assert problem(response, status).detail == detail
    assert response.headers.get("retry-after") == retry_after
    for inside in ("SELECT", "INSERT", "applications_", "relation", error.pgcode):
        assert inside not in response.text


REASONS = {
    'password authentication failed for user "hunter2"': "the database refuses the user or the password",
    "sorry, too many clients already": "the database has too many connections",
    'database "hunter2" does not exist': "the database or the user of DATABASE_URL does not exist",
    'could not translate host name "hunter2"': "the database does not answer",
    'connection to server at "hunter2", port 42501 failed': "the database does not answer",
}


@pytest.mark.parametrize(("libpq", "words"), REASONS.items())
def test_health_tells_why_it_cannot_connect_without_a_secret(libpq, words):
    assert errors.reason(psycopg2.OperationalError(libpq)).startswith(words)


def test_health_tells_of_a_missing_grant_of_a_missing_table_and_of_any_other_refusal(url):
    assert "a grant is missing" in errors.reason(database_error(url, "SET ROLE pg_monitor; TABLE migrations"))
    assert "there are no tables" in errors.reason(database_error(url, "TABLE nowhere"))
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
    assert problem(response, 405).detail == f"This resource takes {allowed}."
    assert response.headers["allow"] == allowed


def test_a_validation_error_lists_20_places_and_never_the_value(client):
    response = client.post("/applications", json={f"é {number}": "hunter2" for number in range(100)})
    shown = problem(response, 400).errors
    assert (shown[1].loc, shown[1].msg) == (["body", "é 0"], "Extra inputs are not permitted")
    assert len(shown) == 20


def test_who_sends_a_name_for_an_id_is_told_how_to_find_the_id(client):
    assert "list with ?name=" in problem(client.get("/configurations/production"), 400).errors[0].msg


def test_an_error_that_nobody_expects_is_logged_and_leaves_the_connection_whole(
    client, monkeypatch, caplog, application
):
    async def broken(_: Any) -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr(repo, "read_application", broken)
    path = f"/applications/{application['id']}"
    response = client.get(path)
    assert problem(response, 500).detail == "Internal error."
    assert "connection" not in response.headers
    [record] = [each for each in caplog.records if each.levelname == "ERROR"]
    assert (record.getMessage(), record.exc_info[0]) == (f"GET /api/v1{path}", ZeroDivisionError)
    monkeypatch.undo()
    assert client.get(path).json() == application


def test_what_only_an_operator_can_mend_is_logged_in_one_line(url, caplog):
    answer(database_error(url, "SELECT 1 FROM nowhere"))
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage() == 'PUT /api/v1/applications/X: 42P01 relation "nowhere" does not exist'
