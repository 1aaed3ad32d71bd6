import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from svc.models import Application, Configuration, Problem, ValidationProblem

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
SCRIPTS = ["عربي ‏مع علامات", "中文配置", "👩‍👩‍👧‍👦 family", " spaced  and trailing ", "ﬀ Ω Å Å", "a/b?c#d%41\n\t"]


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem that is answered, once its form is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    (ValidationProblem if status == 400 else Problem).model_validate_json(response.text)
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
    assert (shown["status"], shown["pool"]["limit"], shown["pool"]["queued"]) == ("ok", 20, 0)
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
