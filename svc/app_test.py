import json
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg2
import pytest
from pydantic import TypeAdapter
from ulid import ULID

from svc import app as service
from svc.conftest import run_sql
from svc.models import Application, Configuration, ConfigurationVersion, PreconditionProblem, Problem, ValidationProblem
from svc.settings import Settings
from svc.test.process import free_port, until

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
SCRIPTS = ["عربي ‏مع علامات", "中文配置", "👩‍👩‍👧‍👦 family", " spaced  and trailing ", "ﬀ Ω Å Å", "a/b?c#d%41\n\t"]


def problem(response: httpx.Response, status: int, model: type[Problem] = Problem) -> dict[str, Any]:
    """The problem that is answered, once its form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    (ValidationProblem if status == 400 else model).model_validate_json(response.text)
    assert response.json()["status"] == status
    return response.json()


def test_an_application_is_created_and_read_back(client, sql, name):
    response = client.post("/applications", json={"name": name, "comments": "of billing"})
    assert response.status_code == 201
    shown = response.json()
    Application.model_validate(shown)
    assert shown == {
        "id": shown["id"],
        "name": name,
        "comments": "of billing",
        "configuration_ids": [],
        "version": 1,
        "created_at": shown["created_at"],
        "updated_at": shown["created_at"],
    }
    assert response.headers["location"] == f"/api/v1/applications/{shown['id']}"
    assert response.headers["etag"] == f'"{shown["id"]}.1"'
    assert response.headers["cache-control"] == "no-cache"
    read = client.get(f"/applications/{shown['id']}")
    assert (read.status_code, read.json(), read.headers["etag"]) == (200, shown, response.headers["etag"])
    [row] = sql("SELECT name, comments, version FROM applications WHERE id = %s", shown["id"])
    assert row == {"name": name, "comments": "of billing", "version": 1}


def test_a_configuration_is_created_and_read_back(client, sql, application):
    config = {"database": {"host": "db1", "port": 5432}, "list": [1, 1.0, None, True, "x"]}
    body = {"application_id": application["id"], "name": "production", "comments": None, "config": config}
    response = client.post("/configurations", json=body)
    assert response.status_code == 201
    shown = response.json()
    Configuration.model_validate(shown)
    assert shown == {
        "id": shown["id"],
        **body,
        "version": 1,
        "created_at": shown["created_at"],
        "updated_at": shown["created_at"],
    }
    assert response.headers["location"] == f"/api/v1/configurations/{shown['id']}"
    read = client.get(f"/configurations/{shown['id']}")
    assert (read.status_code, read.json(), read.headers["etag"]) == (200, shown, f'"{shown["id"]}.1"')
    [row] = sql("SELECT application_id, config FROM configurations WHERE id = %s", shown["id"])
    assert row == {"application_id": application["id"], "config": config}


def test_an_application_shows_its_configurations_and_counts_them_in_its_version(client, application):
    ids = []
    for number in range(3):
        body = {"application_id": application["id"], "name": f"n{number}", "config": {}}
        ids.append(client.post("/configurations", json=body).json()["id"])
    shown = client.get(f"/applications/{application['id']}").json()
    assert shown["configuration_ids"] == sorted(ids)
    assert shown["version"] == 4
    assert shown["updated_at"] > application["updated_at"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"name": "new"}, {"name": "new"}),
        ({"comments": "new"}, {"comments": "new"}),
        ({"comments": None}, {"comments": None}),
        ({"name": "new", "comments": None}, {"name": "new", "comments": None}),
    ],
)
def test_put_changes_the_fields_that_are_there(client, sql, name, changes, expected):
    before = client.post("/applications", json={"name": name, "comments": "old"}).json()
    changes, expected = ({**d, "name": name + "-new"} if "name" in d else d for d in (changes, expected))
    response = client.put(f"/applications/{before['id']}", json=changes)
    assert response.status_code == 200
    after = response.json()
    assert after == {**before, **expected, "version": 2, "updated_at": after["updated_at"]}
    assert after["updated_at"] > before["updated_at"]
    assert response.headers["etag"] == f'"{before["id"]}.2"'
    assert client.get(f"/applications/{before['id']}").json() == after


def test_put_replaces_a_config_whole(client, sql, configuration):
    path = f"/configurations/{configuration['id']}"
    after = client.put(path, json={"config": {"other": 1}}).json()
    assert after == {**configuration, "config": {"other": 1}, "version": 2, "updated_at": after["updated_at"]}
    [row] = sql("SELECT config, version FROM configurations WHERE id = %s", configuration["id"])
    assert row == {"config": {"other": 1}, "version": 2}
    assert client.put(path, json={"comments": "said"}).json()["comments"] == "said"
    assert client.put(path, json={"name": "other"}).json()["config"] == {"other": 1}


@pytest.mark.parametrize("changes", [{}, {"name": "production"}, {"config": {"port": 5432}}, {"comments": None}])
def test_a_put_that_changes_nothing_keeps_version_and_time(client, configuration, changes):
    response = client.put(f"/configurations/{configuration['id']}", json=changes)
    assert (response.status_code, response.json()) == (200, configuration)
    application = client.get(f"/applications/{configuration['application_id']}").json()
    again = client.put(f"/applications/{application['id']}", json={"name": application["name"]})
    assert (again.status_code, again.json()) == (200, application)


def test_1_to_1_0_is_a_change_and_another_order_of_keys_is_not(client, application):
    body = {"application_id": application["id"], "name": "n", "config": {"a": 1, "b": 2}}
    id = client.post("/configurations", json=body).json()["id"]
    assert client.put(f"/configurations/{id}", json={"config": {"b": 2, "a": 1}}).json()["version"] == 1
    after = client.put(f"/configurations/{id}", json={"config": {"a": 1.0, "b": 2}})
    assert after.json()["version"] == 2
    assert '"a": 1.0' in after.text


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": ""},
        {"name": "  \t"},
        {"name": "x" * 257},
        {"name": "a\0b"},
        {"name": 1},
        {"name": None},
        {"nam": "web"},
        {"name": "web", "extra": 1},
        {"name": "web", "comments": "x" * 1025},
        {"name": "web", "comments": 7},
        {"name": "web", "comments": "\0"},
        [],
        "web",
        None,
    ],
)
def test_a_bad_application_is_refused_and_nothing_is_stored(client, sql, body):
    before = sql("SELECT count(*) FROM applications")
    shown = problem(client.post("/applications", json=body), 400)
    assert shown["errors"]
    assert sql("SELECT count(*) FROM applications") == before


@pytest.mark.parametrize(
    ("change", "loc"),
    [
        ({"config": []}, ["body", "config"]),
        ({"config": None}, ["body", "config"]),
        ({"config": "{}"}, ["body", "config"]),
        ({"application_id": 1}, ["body", "application_id"]),
        ({"application_id": True}, ["body", "application_id"]),
        ({"application_id": UNKNOWN.lower()}, ["body", "application_id"]),
        ({"application_id": "8" + UNKNOWN[1:]}, ["body", "application_id"]),
        ({"application_id": UNKNOWN}, ["body", "application_id"]),
        ({"name": ""}, ["body", "name"]),
        ({"unknown": 1}, ["body", "unknown"]),
    ],
)
def test_a_bad_configuration_is_refused_and_nothing_is_stored(client, sql, application, change, loc):
    body = {"application_id": application["id"], "name": "n", "config": {}, **change}
    shown = problem(client.post("/configurations", json=body), 400)
    assert [error["loc"] for error in shown["errors"]] == [loc]
    assert sql("SELECT id FROM configurations WHERE application_id = %s", application["id"]) == []


@pytest.mark.parametrize("changes", [{"name": None}, {"config": None}, {"application_id": UNKNOWN}, {"version": 7}])
def test_a_bad_put_is_refused_and_nothing_changes(client, configuration, changes):
    path = f"/configurations/{configuration['id']}"
    problem(client.put(path, json=changes), 400)
    assert client.get(path).json() == configuration


@pytest.mark.parametrize("path", ["/applications", "/configurations"])
def test_ids_that_are_no_ulid_are_400_and_unknown_ones_404(client, path):
    for method in ("GET", "PUT"):
        for id in ("x", UNKNOWN.lower(), "8" + UNKNOWN[1:], UNKNOWN + "0", "0", "%00"):
            problem(client.request(method, f"{path}/{id}", json={}), 400)
        problem(client.request(method, f"{path}/{UNKNOWN}", json={}), 404)


def test_an_id_that_is_no_ulid_is_refused_in_the_same_words_wherever_it_stands(client):
    paths = ("configurations/x", "configurations/x/versions", "configurations?after=x", "applications?after=x")
    answers = [client.get(path) for path in (*paths, "configurations?application_id=x")]
    answers.append(client.post("/configurations", json={"application_id": "x", "name": "n", "config": {}}))
    found = [error for answer in answers for error in problem(answer, 400)["errors"]]
    assert {(error["msg"], error["type"]) for error in found} == {
        ("Input should be a ULID: 26 characters, upper case", "ulid")
    }
    assert len(found) == 6


def test_a_name_that_is_taken_is_409_and_nothing_is_stored(client, sql, application, configuration):
    assert "name is taken" in problem(client.post("/applications", json={"name": application["name"]}), 409)["detail"]
    other = client.post("/applications", json={"name": application["name"] + "-other"}).json()
    problem(client.put(f"/applications/{other['id']}", json={"name": application["name"]}), 409)
    assert client.get(f"/applications/{other['id']}").json() == other
    body = {"application_id": application["id"], "name": "production", "config": {}}
    assert "name is taken" in problem(client.post("/configurations", json=body), 409)["detail"]
    assert client.post("/configurations", json={**body, "application_id": other["id"]}).status_code == 201
    assert len(sql("SELECT id FROM applications WHERE name = %s", application["name"])) == 1
    assert len(sql("SELECT id FROM configurations WHERE application_id = %s", application["id"])) == 1


def test_of_200_simultaneous_posts_with_one_name_one_is_stored(client, sql, name):
    with ThreadPoolExecutor(50) as threads:
        found = list(threads.map(lambda _: client.post("/applications", json={"name": name}).status_code, range(200)))
    assert (found.count(201), found.count(409)) == (1, 199)
    assert len(sql("SELECT id FROM applications WHERE name = %s", name)) == 1


@pytest.mark.parametrize("text", [*SCRIPTS, "𝕏" * 256, "é" * 256])
def test_names_and_comments_are_stored_exactly(client, sql, text):
    unique = secrets.token_hex(4)
    name = (text + unique)[-256:]
    shown = client.post("/applications", json={"name": name, "comments": text * (1024 // len(text))}).json()
    [row] = sql("SELECT name, comments FROM applications WHERE id = %s", shown["id"])
    assert row == {"name": name, "comments": text * (1024 // len(text))} == {k: shown[k] for k in ("name", "comments")}
    assert [each["id"] for each in client.get("/applications", params={"name": name}).json()] == [shown["id"]]


def test_real_documents_come_back_equal(client, base_url, application):
    lock = json.loads(Path(__file__).with_name("Pipfile.lock").read_text())
    openapi = httpx.get(f"{base_url}/openapi.json").json()
    body = {"application_id": application["id"], "name": "lock", "config": lock}
    id = client.post("/configurations", json=body).json()["id"]
    assert client.get(f"/configurations/{id}").json()["config"] == lock
    assert client.put(f"/configurations/{id}", json={"config": openapi}).json()["config"] == openapi
    assert client.get(f"/configurations/{id}").json()["config"] == openapi


def test_a_list_is_walked_by_its_links(client, sql, name):
    created = [client.post("/applications", json={"name": f"{name}-{n}"}).json()["id"] for n in range(7)]
    everything = [each["id"] for each in client.get("/applications").json()]
    assert everything == sorted(everything)
    assert set(created) <= set(everything)
    assert len(everything) == sql("SELECT count(*) FROM applications")[0]["count"]
    walked: list[str] = []
    path = f"/applications?limit=3&after={min(created)}"
    while path:
        response = client.get(path.removeprefix("/api/v1"))
        TypeAdapter(list[Application]).validate_json(response.content)
        assert len(response.json()) == 3 or "next" not in response.links
        walked += [each["id"] for each in response.json()]
        path = response.links.get("next", {}).get("url")
    assert walked == [id for id in everything if id > min(created)]


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=1001", "limit=x", "after=x", "nam=web", "limit=1&limit=2", "name=a%00b", "limit="),
        *("=", "&&x", "%ff=1", "name=" + "x" * 257),
    ],
)
def test_a_bad_query_is_400(client, query):
    problem(client.get(f"/applications?{query}"), 400)


def test_an_empty_list_is_an_empty_array(client):
    response = client.get("/applications", params={"name": "nobody has this name"})
    assert (response.status_code, response.json(), response.links) == (200, [], {})


def test_errors_beside_the_routes_are_problems(client, base_url):
    problem(httpx.get(f"{base_url}/nowhere"), 404)
    problem(client.get("/applications/"), 404)
    response = client.delete("/applications")
    problem(response, 405)
    assert response.headers["allow"] == "GET, HEAD, POST"
    assert client.post(f"/configurations/{UNKNOWN}").headers["allow"] == "DELETE, GET, HEAD, PUT"
    assert httpx.get(base_url).headers["location"] == "/docs"
    assert httpx.get(f"{base_url}/docs").status_code == 200


def test_head_answers_as_get_without_a_body(client, base_url, configuration):
    for path in (f"/configurations/{configuration['id']}", "/applications", f"/applications/{UNKNOWN}"):
        get, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers.get("etag") == get.headers.get("etag")
        assert head.headers.get("content-length") == get.headers.get("content-length")
    assert httpx.head(f"{base_url}/health").status_code == 200


def test_health_shows_the_pool_and_the_schema(base_url, sql):
    response = httpx.get(f"{base_url}/health")
    assert response.status_code == 200
    shown = response.json()
    assert (shown["status"], shown["pool"]["limit"], shown["pool"]["queued"]) == ("ok", 8, 0)
    assert shown["schema_version"] == sql("SELECT max(version) FROM migrations")[0]["max"]
    assert httpx.get(f"{base_url}/health/live").json() == {"status": "ok"}


def test_openapi_states_what_is_answered_and_no_422(base_url):
    document = httpx.get(f"{base_url}/openapi.json").json()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            statuses = operation["responses"].keys()
            assert "422" not in statuses
            errors = {status for status in statuses if status >= "400"}
            for status in errors:
                assert list(operation["responses"][status]["content"]) == ["application/problem+json"]
            if path.startswith("/api"):
                assert "503" in errors
                assert "400" in errors
            if method in ("put", "post"):
                assert {"413", "408"} <= errors or path.endswith("/restore")
    schemas = document["components"]["schemas"]
    assert schemas["Application"]["properties"]["id"]["type"] == "string"
    assert schemas["Application"]["properties"]["id"]["pattern"].startswith("^[0-7]")
    assert schemas["ApplicationCreate"]["additionalProperties"] is False
    assert "HTTPValidationError" not in schemas


# --- Conditions ---


@pytest.fixture(params=["applications", "configurations"])
def resource(request, client, application, configuration) -> dict[str, Any]:
    """The path and the current state of a resource of each kind."""
    id = application["id"] if request.param == "applications" else configuration["id"]
    path = f"/{request.param}/{id}"
    return {"path": path, "id": id, "state": client.get(path).json()}


def tag(resource: dict[str, Any], version: int | None = None) -> str:
    return f'"{resource["id"]}.{version or resource["state"]["version"]}"'


def test_get_answers_304_without_a_body_to_what_names_its_etag(client, resource):
    for value in (tag(resource), f"W/{tag(resource)}", "*", f'"other", {tag(resource)}'):
        for method in ("GET", "HEAD"):
            response = client.request(method, resource["path"], headers={"If-None-Match": value})
            assert (response.status_code, response.content) == (304, b"")
            assert response.headers["etag"] == tag(resource)
            assert response.headers["cache-control"] == "no-cache"
            assert "content-length" not in response.headers
    for value in (tag(resource, 99), "garbage", "", '"'):
        response = client.get(resource["path"], headers={"If-None-Match": value})
        assert (response.status_code, response.json()) == (200, resource["state"])
    split = [("If-None-Match", '"x"'), ("If-None-Match", tag(resource))]
    assert client.get(resource["path"], headers=split).status_code == 304


def test_put_with_if_match_writes_only_what_it_names(client, sql, resource):
    for value in (tag(resource, 99), f"W/{tag(resource)}", "garbage", "", '"x", "y"'):
        response = client.put(resource["path"], json={"comments": "x"}, headers={"If-Match": value})
        shown = problem(response, 412, PreconditionProblem)
        assert shown["version"] == resource["state"]["version"]
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["etag"] == tag(resource)
        assert client.get(resource["path"]).json() == resource["state"]
    version = resource["state"]["version"]
    for step, value in enumerate((tag(resource), "*", f'"x", {tag(resource, version + 2)}')):
        response = client.put(resource["path"], json={"comments": f"{step}"}, headers={"If-Match": value})
        assert (response.status_code, response.json()["version"]) == (200, version + step + 1)


def test_delete_with_if_match_deletes_only_what_it_names(client, resource):
    path = resource["path"] + ("?cascade=true" if "app" in resource["path"] else "")
    problem(client.delete(path, headers={"If-Match": tag(resource, 99)}), 412, PreconditionProblem)
    assert client.get(resource["path"]).json() == resource["state"]
    response = client.delete(path, headers={"If-Match": tag(resource)})
    assert (response.status_code, response.content) == (204, b"")
    for method in ("GET", "PUT", "DELETE"):
        # 404 before 412: RFC 9110, 13.2.1
        problem(client.request(method, resource["path"], json={}, headers={"If-Match": tag(resource)}), 404)


def test_a_condition_on_a_write_is_checked_before_a_taken_name(client, application, name):
    client.post("/applications", json={"name": name + "x"})
    response = client.put(
        f"/applications/{application['id']}", json={"name": name + "x"}, headers={"If-Match": '"stale"'}
    )
    problem(response, 412, PreconditionProblem)


# --- Deletion ---


def test_an_application_with_configurations_is_deleted_only_with_them(client, sql, application, configuration):
    path = f"/applications/{application['id']}"
    assert "has configurations (1)" in problem(client.delete(path), 409)["detail"]
    assert "has configurations (1)" in problem(client.delete(path, params={"cascade": "false"}), 409)["detail"]
    assert len(sql("SELECT id FROM configurations WHERE application_id = %s", application["id"])) == 1
    assert client.delete(path, params={"cascade": "true"}).status_code == 204
    problem(client.get(path), 404)
    problem(client.get(f"/configurations/{configuration['id']}"), 404)
    assert sql("SELECT id FROM configurations WHERE application_id = %s", application["id"]) == []
    problem(client.delete(path, params={"cascade": "maybe"}), 400)


def test_deleting_a_configuration_changes_its_application(client, application, configuration):
    path = f"/applications/{application['id']}"
    before = client.get(path).json()
    assert before["configuration_ids"] == [configuration["id"]]
    assert client.delete(f"/configurations/{configuration['id']}").status_code == 204
    after = client.get(path).json()
    assert (after["configuration_ids"], after["version"]) == ([], before["version"] + 1)
    assert client.delete(path).status_code == 204


def test_a_configuration_added_while_its_application_is_deleted_is_never_lost(client, sql, name):
    """Either the configuration was first, and the deletion is refused, or it comes too late for its application."""
    seen = set()
    with ThreadPoolExecutor(2) as threads:
        for number in range(60):
            id = client.post("/applications", json={"name": f"{name}-{number}"}).json()["id"]
            body = {"application_id": id, "name": "n", "config": {}}
            add = threads.submit(client.post, "/configurations", json=body)
            delete = threads.submit(client.delete, f"/applications/{id}")
            outcome = (add.result().status_code, delete.result().status_code)
            assert outcome in {(201, 409), (400, 204)}
            assert len(sql("SELECT id FROM configurations WHERE application_id = %s", id)) == (outcome[0] == 201)
            seen.add(outcome)
    assert seen


@contextmanager
def behind(url: str, request: Callable[[], httpx.Response], *statements: str) -> Iterator[tuple[Any, Any]]:
    """A cursor whose transaction has run these statements, and the future of a request that has come to wait for it."""
    connection = psycopg2.connect(url)
    with ThreadPoolExecutor(1) as threads, closing(connection), connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        answer = threads.submit(request)
        blocked = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
        until(lambda: run_sql(url, blocked, connection.info.backend_pid))
        yield cursor, answer


def test_a_configuration_that_is_deleted_waits_for_its_application_before_it_is_locked_itself(
    client, url, application, configuration
):
    """Else it and the deletion of its application would wait for each other."""
    locked = f"SELECT FROM applications WHERE id = '{application['id']}' FOR UPDATE"
    with behind(url, lambda: client.delete(f"/configurations/{configuration['id']}"), locked) as (other, answer):
        other.execute(f"SELECT FROM configurations WHERE id = '{configuration['id']}' FOR UPDATE NOWAIT")
        other.execute(f"DELETE FROM applications WHERE id = '{application['id']}'")
        other.connection.commit()
        problem(answer.result(), 404)


@pytest.mark.parametrize("write", ["rename", "restore"])
def test_a_configuration_that_may_get_a_new_name_waits_for_its_application_before_it_is_locked_itself(
    client, url, application, configuration, write
):
    """Else it and the deletion of its application would wait for each other, or it and another that gets its name."""
    path = f"/configurations/{configuration['id']}"
    locked = f"SELECT FROM applications WHERE id = '{application['id']}' FOR UPDATE"

    def request() -> httpx.Response:
        return client.put(path, json={"name": "n"}) if write == "rename" else client.post(f"{path}/versions/1/restore")

    with behind(url, request, locked) as (other, answer):
        other.execute(f"SELECT FROM configurations WHERE id = '{configuration['id']}' FOR UPDATE NOWAIT")
        other.connection.commit()
        assert answer.result().status_code == 200
        other.execute(locked)
        assert client.put(path, json={"config": {}}).status_code == 200  # which keeps its name, and waits for nobody


@pytest.mark.parametrize("status", [204, 409])
def test_an_application_that_waits_to_be_deleted_goes_by_what_it_has_then(
    client, url, application, configuration, status
):
    path = f"/applications/{application['id']}"
    another = f"""
        INSERT INTO configurations (id, application_id, name, config)
        VALUES ('{ULID()}', '{application["id"]}', 'another', '{{}}')
    """
    gone = f"DELETE FROM configurations WHERE id = '{configuration['id']}'"
    statements = [another, gone] if status == 409 else [gone]
    with behind(url, lambda: client.delete(path), *statements) as (other, answer):
        other.connection.commit()
        assert answer.result().status_code == status
    assert len(client.get("/applications", params={"name": application["name"]}).json()) == (status == 409)


# --- Versions ---


def versions_of(client, id: str) -> list[dict[str, Any]]:
    response = client.get(f"/configurations/{id}/versions")
    TypeAdapter(list[ConfigurationVersion]).validate_json(response.content)
    return response.json()


def test_every_change_is_a_version_that_outlives_the_configuration(client, configuration):
    id, path = configuration["id"], f"/configurations/{configuration['id']}"
    client.put(path, json={"config": {"port": 1}})
    client.put(path, json={"config": {"port": 1}})  # changes nothing
    client.put(path, json={"name": "staging", "comments": "moved"})
    client.delete(path)
    found = versions_of(client, id)
    assert [(v["version"], v["operation"], v["name"], v["comments"], v["config"]) for v in found] == [
        (4, "delete", "staging", "moved", {"port": 1}),
        (3, "update", "staging", "moved", {"port": 1}),
        (2, "update", "production", None, {"port": 1}),
        (1, "create", "production", None, {"port": 5432}),
    ]
    assert found[3]["recorded_at"] == configuration["created_at"]
    assert [v["recorded_at"] for v in found] == sorted((v["recorded_at"] for v in found), reverse=True)
    response = client.get(f"{path}/versions/2")
    ConfigurationVersion.model_validate_json(response.content)
    assert response.json() == found[2]
    assert response.headers["cache-control"] == "max-age=31536000, immutable"
    problem(client.get(f"{path}/versions/5"), 404)
    problem(client.get(f"/configurations/{UNKNOWN}/versions"), 404)
    problem(client.get(f"/configurations/{UNKNOWN}/versions/1"), 404)
    for bad in ("0", "-1", "x", "2147483648", "9" * 30):
        problem(client.get(f"{path}/versions/{bad}"), 400)


def test_versions_are_walked_newest_first(client, configuration):
    path = f"/configurations/{configuration['id']}"
    for port in range(40):
        client.put(path, json={"config": {"port": port}})
    everything = versions_of(client, configuration["id"])
    assert [v["version"] for v in everything] == list(range(41, 0, -1))
    walked: list[dict[str, Any]] = []
    next_path: str | None = f"{path}/versions?limit=7"
    while next_path:
        response = client.get(next_path.removeprefix("/api/v1"))
        walked += response.json()
        next_path = response.links.get("next", {}).get("url")
    assert walked == everything
    assert client.get(f"{path}/versions?before=3").json() == everything[-2:]
    assert client.get(f"{path}/versions?before=1").json() == []
    problem(client.get(f"{path}/versions?before=0"), 400)


def test_an_old_version_is_brought_back_as_a_new_one(client, configuration):
    id, path = configuration["id"], f"/configurations/{configuration['id']}"
    client.put(path, json={"name": "staging", "comments": "moved", "config": {"port": 1}})
    response = client.post(f"{path}/versions/1/restore")
    assert response.status_code == 200
    restored = response.json()
    assert restored == {**configuration, "version": 3, "updated_at": restored["updated_at"]}
    assert response.headers["etag"] == f'"{id}.3"'
    assert client.get(path).json() == restored
    assert client.post(f"{path}/versions/2/restore").json()["config"] == {"port": 1}
    assert [v["version"] for v in versions_of(client, id)] == [4, 3, 2, 1]


def test_a_restore_is_refused_where_a_put_would_be(client, application, configuration):
    path = f"/configurations/{configuration['id']}"
    client.put(path, json={"name": "moved"})
    stale = {"If-Match": f'"{configuration["id"]}.1"'}
    problem(client.post(f"{path}/versions/1/restore", headers=stale), 412, PreconditionProblem)
    problem(client.post(f"{path}/versions/3/restore"), 404)
    problem(client.post(f"{path}/versions/3/restore", headers=stale), 404)
    body = {"application_id": application["id"], "name": "production", "config": {}}
    client.post("/configurations", json=body)
    problem(client.post(f"{path}/versions/1/restore"), 409)
    assert client.get(path).json()["version"] == 2
    client.delete(path)
    problem(client.post(f"{path}/versions/1/restore"), 404)
    problem(client.post(f"/configurations/{UNKNOWN}/versions/1/restore"), 404)


# --- By name and by content ---


def test_a_configuration_is_found_by_name(client, application, configuration):
    path = f"/applications/{application['name']}/configurations/production"
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, configuration)
    assert response.headers["etag"] == f'"{configuration["id"]}.1"'
    again = client.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head(path)
    assert (head.status_code, head.headers["etag"]) == (200, response.headers["etag"])
    missing = problem(client.get(f"/applications/{application['name']}/configurations/nothing"), 404)
    assert "no configuration" in missing["detail"]
    assert "no application" in problem(client.get("/applications/nobody/configurations/production"), 404)["detail"]
    problem(client.get(path, params={"nam": "x"}), 400)


@pytest.mark.parametrize("text", [*SCRIPTS, "a/configurations/b", "/", "..x", "%2F", "+", "configurations"])
def test_names_of_any_text_are_found_percent_encoded(client, name, text):
    application = client.post("/applications", json={"name": text + name}).json()
    body = {"application_id": application["id"], "name": text, "config": {"of": text}}
    configuration = client.post("/configurations", json=body).json()
    for safe in ("", "/"):  # slashes need no encoding in the configuration's name
        path = f"/applications/{quote(text + name, safe='')}/configurations/{quote(text, safe=safe)}"
        response = raw_get(client, path)
        assert (response.status_code, response.json()) == (200, configuration)


def raw_get(client, path: str) -> httpx.Response:
    """A GET whose path is sent as it is."""
    url = httpx.URL(str(client.base_url)).copy_with(raw_path=f"/api/v1{path}".encode())
    return client.get(url)


@pytest.mark.parametrize("path", ["/a/b/configurations/c", "/%00/configurations/%00", "/%ff/configurations/%fe"])
def test_names_that_cannot_be_are_not_found(client, path):
    problem(raw_get(client, f"/applications{path}"), 404)


def test_configurations_are_filtered_and_walked(client, application):
    made = []
    for number in range(40):
        config = {"database": {"host": f"db{number % 2}", "port": 5432}, "tags": ["a", application["id"]]}
        body = {"application_id": application["id"], "name": f"n{number}", "config": config}
        made.append(client.post("/configurations", json=body).json())
    made.sort(key=lambda each: each["id"])
    of_application = {"application_id": application["id"]}
    assert client.get("/configurations", params=of_application).json() == made
    assert client.get("/configurations", params={**of_application, "name": "n7"}).json() == [
        each for each in made if each["name"] == "n7"
    ]
    contains = json.dumps({"database": {"host": "db1"}, "tags": [application["id"]]})
    expected = [each for each in made if each["config"]["database"]["host"] == "db1"]
    assert client.get("/configurations", params={"contains": contains}).json() == expected
    walked: list[dict[str, Any]] = []
    response = client.get("/configurations", params={**of_application, "contains": contains, "limit": 6})
    TypeAdapter(list[Configuration]).validate_json(response.content)
    while True:
        walked += response.json()
        if "next" not in response.links:
            break
        assert len(response.json()) == 6
        response = client.get(response.links["next"]["url"].removeprefix("/api/v1"))
    assert walked == expected
    assert client.get("/configurations", params={**of_application, "after": made[-1]["id"]}).json() == []


@pytest.mark.parametrize(
    "query",
    [
        *("contains=", "contains=[]", "contains=1", "contains=%7B", "contains=%7B%22a%22:NaN%7D", "contains=%ff"),
        *(
            "application_id=x",
            "limit=0",
            "after=1",
            "unknown=1",
            "name=a&name=b",
            "contains=%7B%22a%22:%22%5Cu0000%22%7D",
        ),
        "contains=%7B%22a%22:%22%5Cud800%22%7D",
    ],
)
def test_a_bad_query_for_configurations_is_400(client, query):
    problem(client.get(f"/configurations?{query}"), 400)


# --- The process ---


@pytest.fixture
def served(monkeypatch) -> Iterator[dict[str, Any]]:
    """What `main` gives to uvicorn, which does not run."""
    found: dict[str, Any] = {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(service.uvicorn, "run", lambda target, **options: found.update(options, target=target))
    yield found
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_main_serves_as_the_settings_say(served, monkeypatch):
    config = Settings(database_url="postgresql:///x", port=free_port(), workers=3, shutdown_timeout=7, debug=True)
    monkeypatch.setattr(service.settings, "load", lambda: config)
    service.main()
    assert served == {
        "target": "svc.app:app",
        "host": "127.0.0.1",
        "port": config.port,
        "workers": 3,
        "log_level": "debug",
        "timeout_graceful_shutdown": 7,
        "ws": "none",
    }
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 0


def test_main_says_in_one_line_what_keeps_it_from_serving(served, monkeypatch):
    monkeypatch.setattr(service.settings, "load", lambda: Settings(database_url=None))
    with pytest.raises(SystemExit, match=r"^DATABASE_URL is not set: .*$"):
        service.main()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = Settings(database_url="postgresql:///x", port=port)
        monkeypatch.setattr(service.settings, "load", lambda: config)
        with pytest.raises(SystemExit, match=f"^cannot listen on 127.0.0.1:{port}: Address already in use; "):
            service.main()
    assert served == {}
