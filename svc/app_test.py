import json
import secrets
import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from psycopg2.extensions import make_dsn
from pydantic import TypeAdapter
from starlette.routing import Match

from svc import repo, settings
from svc.app import app, main
from svc.conftest import UNKNOWN, problem, run_sql, send, serving
from svc.models import Problem
from svc.settings import Settings
from svc.test.process import service


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[httpx.Client]:
    """A client that checks every answer of a route against its OpenAPI description and its response model."""
    document = httpx.get(f"{base_url}/openapi.json").json()

    def check(response: httpx.Response) -> None:
        method = response.request.method.replace("HEAD", "GET")
        path = response.request.url.raw_path.decode().partition("?")[0]
        cacheable = path.startswith("/api/v1/") and response.status_code < 400
        assert response.headers["cache-control"] == ("private, no-cache" if cacheable else "no-store")
        scope = {"type": "http", "method": method, "path": path}
        matching = (route for route in app.routes if route.matches(scope)[0] is Match.FULL)
        if (route := next(matching, None)) and route.path_format in document["paths"]:
            operation = document["paths"][route.path_format][method.lower()]
            check_answer(response, route.response_model, operation["responses"][str(response.status_code)])

    with httpx.Client(base_url=base_url + "/api/v1", timeout=30, event_hooks={"response": [check]}) as made:
        yield made


def check_answer(response: httpx.Response, model: Any, described: dict[str, Any]) -> None:
    for name in described.get("headers", {}).keys() - {"Link"}:
        assert name in response.headers
    if "content" in described and response.request.method != "HEAD":
        assert list(described["content"]) == [response.headers["content-type"]]
        TypeAdapter(model if response.is_success else Problem).validate_json(response.read())


# --- Create, read, update ---


@pytest.mark.parametrize("kind", ["applications", "configurations"])
def test_what_is_created_is_stored_and_read_back(client, sql, application, name, kind):
    body = {"name": f"{name}-new", "comments": "of billing"}
    if kind == "configurations":
        config = {"list": [1, 1.0, None, True, "x", 2**70, 0.1], "of": {"port": 5432}}
        body |= {"application_id": application["id"], "config": config}
    response = client.post(f"/{kind}", json=body)
    assert response.status_code == 201
    shown = response.json()
    made = {"id": shown["id"], "version": 1, "created_at": shown["created_at"], "updated_at": shown["created_at"]}
    assert shown == {**body, **made, **({"configuration_ids": []} if kind == "applications" else {})}
    assert response.headers["location"] == f"/api/v1/{kind}/{shown['id']}"
    read = client.get(f"/{kind}/{shown['id']}")
    assert (read.status_code, read.text, read.headers["etag"]) == (200, response.text, response.headers["etag"])
    [row] = sql(f"SELECT {', '.join(body)}, version FROM {kind} WHERE id = %s", shown["id"])
    assert row == {**body, "version": 1}


def test_an_application_shows_its_configurations_and_counts_them_in_its_version(client, application):
    path = f"/applications/{application['id']}"
    ids = []
    for number in range(3):
        body = {"application_id": application["id"], "name": f"n{number}", "config": {}}
        ids.append(client.post("/configurations", json=body).json()["id"])
    shown = client.get(path).json()
    assert (shown["configuration_ids"], shown["version"]) == (sorted(ids), 4)
    assert shown["updated_at"] > application["updated_at"]
    assert client.delete(f"/configurations/{ids.pop()}").status_code == 204
    shown = client.get(path).json()
    assert (shown["configuration_ids"], shown["version"]) == (sorted(ids), 5)


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({"name": "new"}, 2),
        ({"comments": None}, 2),
        ({"config": {"b": 1}}, 2),
        ({"config": {"a": 1.0, "b": 2}}, 2),
        ({"name": "old", "comments": "old", "config": {"b": 2, "a": 1}}, 1),
        ({}, 1),
    ],
)
def test_put_changes_the_fields_that_are_there_and_counts_only_what_changes(client, application, changes, version):
    old = {"application_id": application["id"], "name": "old", "comments": "old", "config": {"a": 1, "b": 2}}
    before = client.post("/configurations", json=old)
    path = f"/configurations/{before.json()['id']}"
    response = client.put(path, json=changes)
    assert response.status_code == 200
    after = response.json()
    assert after == {**before.json(), **changes, "version": version, "updated_at": after["updated_at"]}
    assert (after["updated_at"] == before.json()["updated_at"]) == (version == 1)
    assert (response.headers["etag"] == before.headers["etag"]) == (version == 1)
    assert client.get(path).text == response.text
    assert json.dumps({**old, **changes}["config"], sort_keys=True) in response.text  # 1.0 is another text than 1


def test_put_of_an_application_does_the_same(client, application):
    path = f"/applications/{application['id']}"
    assert client.put(path, json={"name": application["name"]}).json() == application
    after = client.put(path, json={"comments": "new"}).json()
    assert after == {**application, "comments": "new", "version": 2, "updated_at": after["updated_at"]}
    assert client.put(path, json={"comments": None}).json()["comments"] is None


# --- What is refused ---


def test_put_of_what_get_showed_says_which_fields_are_read_only(client, application):
    errors = problem(client.put(f"/applications/{application['id']}", json=application), 400).errors
    fields = {error.loc[1] for error in errors if error.msg == "This field is read-only: leave it out"}
    assert fields == application.keys() - {"name", "comments"}


def test_a_name_that_is_taken_is_409_and_nothing_is_stored(client, application, configuration):
    other = client.post("/applications", json={"name": application["name"] + "-other"}).json()
    answer = client.post("/applications", json={"name": application["name"]})
    assert problem(answer, 409).detail == "The name is taken: another application has it."
    problem(client.put(f"/applications/{other['id']}", json={"name": application["name"]}), 409)
    assert client.get(f"/applications/{other['id']}").json() == other
    body = {"application_id": application["id"], "name": "production", "config": {}}
    answer = client.post("/configurations", json=body)
    assert problem(answer, 409).detail == "The name is taken: another configuration of this application has it."
    assert client.post("/configurations", json={**body, "application_id": other["id"]}).status_code == 201
    ids = client.get(f"/applications/{application['id']}").json()["configuration_ids"]
    assert ids == [configuration["id"]]


# --- Conditions ---

BY_NAME = "/applications/{name}/configurations/production"
READS = ["/applications/{a}", "/configurations/{c}", BY_NAME]
WRITES = [
    ("PUT", "/applications/{a}", {"comments": "new"}),
    ("PUT", "/configurations/{c}", {"comments": "new"}),
    ("PATCH", "/configurations/{c}", {"config": {"new": 1}}),
    ("DELETE", "/configurations/{c}", None),
    ("POST", "/configurations/{c}/versions/1/restore", None),
    ("PUT", BY_NAME, {"config": {"new": 2}}),
    ("PATCH", BY_NAME, {"config": {"new": 3}}),
    ("DELETE", BY_NAME, None),
    ("DELETE", "/applications/{a}?cascade=true", None),
]
# What the 412 to a write with this header says, or None if the write is done. TAG is the current ETag.
CONDITIONS = [
    ("If-Match", "TAG", None),
    ("If-Match", '"x", TAG', None),
    ("If-Match", "*", None),
    ("If-Match", '"x"', "which If-Match does not name: read it, and decide again."),
    ("If-Match", "W/TAG", "A weak tag (W/) never matches."),
    ("If-Match", "x", "A tag stands in double quotes."),
    ("If-Match", "", "which If-Match does not name"),
    ("If-None-Match", '"x"', None),
    ("If-None-Match", "TAG", "If-None-Match names"),
    ("If-None-Match", 'W/"x", W/TAG', "If-None-Match names"),
    ("If-None-Match", "*", "If-None-Match names"),
    ("If-None-Match", "*, *", "If-None-Match names"),  # in two lines
]


@pytest.mark.parametrize(("header", "value", "words"), CONDITIONS)
@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_a_write_is_done_only_if_its_condition_holds(
    client, application, configuration, method, path, body, header, value, words
):
    client.put(f"/configurations/{configuration['id']}", json={"config": {"port": 1}})
    path = path.format(a=application["id"], c=configuration["id"], name=application["name"])
    stored = path.partition("?")[0].partition("/versions")[0]
    before = client.get(stored)
    tag = before.headers["etag"]
    sent = {header: value.replace("TAG", tag)}
    response = send(client, method, path, body, **sent)
    after = client.get(stored)
    if words is None:
        assert response.is_success
        assert after.headers.get("etag") == response.headers.get("etag") != tag
    else:
        detail = problem(response, 412).detail
        assert words in detail
        assert tag in detail
        assert (response.headers["etag"], after.text) == (tag, before.text)
    client.delete(f"/applications/{application['id']}?cascade=true")
    problem(send(client, method, path, body, **sent), 404)  # which comes before 412: RFC 9110, section 13.2.1


@pytest.mark.parametrize("path", READS)
def test_a_read_answers_304_to_what_names_its_etag(client, application, configuration, path):
    path = path.format(a=application["id"], c=configuration["id"], name=application["name"])
    whole = client.get(path)
    tag = whole.headers["etag"]
    for value in (tag, f"W/{tag}", "*", f'"x", {tag}', f',, {tag} ,"a,b"'):
        for method in ("GET", "HEAD"):
            response = client.request(method, path, headers={"If-None-Match": value})
            assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag)
    for value in ('"x"', tag.strip('"'), f"w/{tag}", '"*"', "", '"', f'{tag[:-1]}0"', "\xa0*"):
        assert client.get(path, headers={"If-None-Match": value.encode("latin-1")}).text == whole.text
    lines = [("If-None-Match", '"x"'), ("If-None-Match", tag)]
    assert client.get(path, headers=lines).status_code == 304


# --- Lists ---


@pytest.fixture(scope="module")
def listed(client) -> SimpleNamespace:
    """Seven applications, of which one has seven configurations, of which one has seven versions."""
    prefix = secrets.token_hex(8)
    applications = [client.post("/applications", json={"name": f"{prefix}{n}"}).json()["id"] for n in range(7)]
    for number in range(7):
        config = {"database": {"host": f"db{number % 2}", "port": 5432}, "tags": ["a", prefix], "number": number}
        body = {"application_id": applications[0], "name": f"n{number}", "config": config}
        configuration = client.post("/configurations", json=body).json()["id"]
    client.post("/configurations", json={**body, "application_id": applications[1], "name": "n3"})
    for number in range(6):
        client.put(f"/configurations/{configuration}", json={"comments": str(number)})
    return SimpleNamespace(first=min(applications), application=applications[0], id=configuration, prefix=prefix)


LISTS = {
    "/applications?after={0.first}": 6,
    "/configurations?application_id={0.application}": 7,
    '/configurations?contains={{"tags": ["{0.prefix}"], "database": {{"host": "db1"}}}}': 3,
    "/configurations?application_id={0.application}&name=n3": 1,
    "/configurations?application_id={0.application}&name=nothing": 0,
    "/applications/{0.prefix}0/configurations": 7,
    "/applications/{0.prefix}0/configurations?name=n3": 1,
    '/applications/{0.prefix}0/configurations?contains={{"database": {{"host": "db1"}}}}': 3,
    "/configurations/{0.id}/versions": 7,
    "/configurations/{0.id}/versions?before=3": 2,
}


@pytest.mark.parametrize(("path", "length"), LISTS.items())
def test_a_list_is_ordered_and_is_walked_by_its_links(client, listed, path, length):
    path = path.format(listed)
    whole = client.get(path)
    assert (len(whole.json()), whole.links) == (length, {})
    keys = [each.get("id") or -each["version"] for each in whole.json()]
    assert keys == sorted(keys)
    walked: list[dict[str, Any]] = []
    page = client.get(f"{path}{'&' if '?' in path else '?'}limit=3")
    while "next" in page.links:
        assert len(page.json()) == 3
        walked += page.json()
        page = client.get(page.links["next"]["url"].removeprefix("/api/v1"))
    assert walked + page.json() == whole.json()


# --- Deletion ---


def test_an_application_with_configurations_is_deleted_only_with_them(client, configuration):
    path = f"/applications/{configuration['application_id']}"
    for query in ("", "?cascade=false"):
        assert "has configurations" in problem(client.delete(path + query), 409).detail
    assert client.get(f"/configurations/{configuration['id']}").json() == configuration
    assert client.delete(path, params={"cascade": "true"}).status_code == 204
    problem(client.get(path), 404)
    problem(client.get(f"/configurations/{configuration['id']}"), 404)


# --- Versions ---


def test_every_change_is_a_version_that_outlives_the_configuration(client, configuration):
    path = f"/configurations/{configuration['id']}"
    client.put(path, json={"config": {"port": 1}})
    client.put(path, json={"name": "staging", "comments": "moved"})
    client.delete(path)
    found = client.get(f"{path}/versions").json()
    assert [(v["version"], v["operation"], v["name"], v["comments"], v["config"]) for v in found] == [
        (4, "delete", "staging", "moved", None),
        (3, "update", "staging", "moved", {"port": 1}),
        (2, "update", "production", None, {"port": 1}),
        (1, "create", "production", None, {"port": 5432}),
    ]
    assert {v["actor"] for v in found} == {"anonymous"}
    assert found[3]["recorded_at"] == configuration["created_at"]
    assert [client.get(f"{path}/versions/{v['version']}").json() for v in found] == found
    problem(client.get(f"{path}/versions/5"), 404)
    problem(client.get(f"/configurations/{UNKNOWN}/versions"), 404)


def test_a_restore_makes_a_version_the_newest_again(client, application, configuration):
    path = f"/configurations/{configuration['id']}"
    client.put(path, json={"name": "moved", "comments": "moved", "config": {"port": 1}})
    response = client.post(f"{path}/versions/1/restore")
    restored = response.json()
    assert restored == {**configuration, "version": 3, "updated_at": restored["updated_at"]}
    assert client.get(path).text == response.text
    problem(client.post(f"{path}/versions/4/restore"), 404)
    client.post("/configurations", json={"application_id": application["id"], "name": "moved", "config": {}})
    problem(client.post(f"{path}/versions/2/restore"), 409)
    assert client.get(path).json() == restored


def test_what_was_deleted_comes_back_under_its_id_and_its_numbers_go_on(client, application, configuration):
    path = f"/configurations/{configuration['id']}"
    client.delete(path)
    problem(client.post(f"{path}/versions/2/restore"), 404)  # the deletion itself, which has no document
    response = client.post(f"{path}/versions/1/restore")
    restored = response.json()
    times = {"created_at": restored["created_at"], "updated_at": restored["created_at"]}
    assert restored == {**configuration, "version": 3, **times}
    assert client.get(path).text == response.text
    assert [v["version"] for v in client.get(f"{path}/versions").json()] == [3, 2, 1]
    client.delete(f"/applications/{application['id']}?cascade=true")
    problem(client.post(f"{path}/versions/1/restore"), 404)


# --- Around the routes ---


def test_what_stands_beside_the_api_says_whether_it_may_be_kept(base_url):
    for path in ("/health", "/health/live", "/metrics", "/nowhere"):
        assert httpx.get(base_url + path).headers["cache-control"] == "no-store"
    assert httpx.get(f"{base_url}/openapi.json").headers["cache-control"] == "private, no-cache"


def test_behind_a_proxy_every_path_has_its_prefix(base_url, name):
    with serving(root_path="/config", lifespan="off") as base, httpx.Client(base_url=f"{base}/api/v1") as client:
        response = client.post("/applications", json={"name": name})
        application = response.json()["id"]
        assert response.headers["location"] == f"/config/api/v1/applications/{application}"
        for own in ("a", "b"):
            client.post("/configurations", json={"application_id": application, "name": own, "config": {}})
        read = client.get(f"/applications/{name}/configurations/a")
        assert (read.status_code, read.json()["name"]) == (200, "a")
        query = f"application_id={application}&limit=1"
        page = client.get(f"/configurations?{query}")
        next_page = f"/config/api/v1/configurations?{query}&after={page.json()[0]['id']}"
        assert page.links["next"]["url"] == next_page
        assert httpx.get(f"{base}/health").headers["cache-control"] == "no-store"
        assert httpx.get(f"{base}/openapi.json").json()["servers"] == [{"url": "/config"}]  # where /docs sends


def test_openapi_describes_every_operation(base_url):
    document = httpx.get(f"{base_url}/openapi.json").json()
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    for operation in operations:
        assert operation["summary"]
        assert operation["description"].endswith(".")
        assert (len(operation["tags"]), len(operation["operationId"]) <= 30) == (1, True)
        headers = [each["schema"] for each in operation.get("parameters", []) if each["in"] == "header"]
        # Generators of clients know no header that is a list.
        assert all(schema["type"] == "string" and "default" not in schema for schema in headers)
        answers = operation["responses"]
        assert {"400", "503"} <= answers.keys()
        assert ({"401", "403"} <= answers.keys()) == (operation.get("security") != [])
        assert "422" not in answers
        assert all("content" in answers[status] for status in answers.keys() & {"200", "201", "default"})
        assert ({"408", "413"} <= answers.keys()) == ("requestBody" in operation)
        for status in answers.keys() & set(map(str, range(400, 600))):
            example = answers[status]["content"]["application/problem+json"]["example"]
            assert Problem.model_validate(example).status == int(status)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    schemas = document["components"]["schemas"]
    assert schemas["Application"]["properties"]["id"]["pattern"].startswith("^[0-7]")
    assert schemas["ApplicationCreate"]["additionalProperties"] is False
    assert httpx.get(f"{base_url}/docs").status_code == 200


# --- Health, and a role with no more grants than it needs ---


@pytest.fixture(scope="module")
def least(new_database) -> Iterator[SimpleNamespace]:
    """The service, with AUTH=on, as a role that has USAGE on the schema and the grants of repo.GRANTS alone."""
    role, token = f"least_{secrets.token_hex(8)}", "cfs_least"
    with new_database() as url:
        run_sql(url, f"CREATE ROLE {role} LOGIN PASSWORD '{role}'; REVOKE ALL ON SCHEMA public FROM PUBLIC")
        run_sql(url, f"GRANT USAGE ON SCHEMA public TO {role}")
        for table, privileges in repo.GRANTS.items():
            run_sql(url, f"GRANT {', '.join(privileges)} ON {table} TO {role}")
        run_sql(url, f"INSERT INTO tokens (name, hash, role) VALUES ('t', encode(sha256('{token}'), 'hex'), 'write')")
        headers = {"Authorization": f"Bearer {token}"}
        url_of_role = make_dsn(url, user=role, password=role)
        with service(url_of_role, auth="on") as (_, base), httpx.Client(base_url=base, headers=headers) as client:
            yield SimpleNamespace(url=url, role=role, client=client)
        run_sql(url, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_the_service_needs_no_more_than_its_grants(least):
    def ask(method: str, path: str, body: Any = None, **headers: str) -> str:
        response = send(least.client, method, f"/api/v1{path}", body, **headers)
        assert response.is_success, response.text
        return response.json()["id"] if method == "POST" else ""

    a = ask("POST", "/applications", {"name": "a"})
    c = ask("POST", "/configurations", {"application_id": a, "name": "production", "config": {}})
    ask("PUT", "/applications/a/configurations/new", {"config": {}})
    lists = ["/applications", '/configurations?contains={"a": 1}', "/applications/a/configurations", "/changes"]
    for path in (*READS, "/configurations/{c}/versions", "/configurations/{c}/versions/1"):
        ask("GET", path.format(a=a, c=c, name="a"))
    for path in lists:
        ask("GET", path)
    ask("POST", f"/configurations/{c}/versions/1/restore", **{"If-Match": "*"})
    for method, path, body in WRITES:
        ask(method, path.format(a=a, c=c, name="a"), body)


HEALTH = [
    ("ALTER ROLE {0} SET default_transaction_read_only = on", "ALTER ROLE {0} RESET ALL", "the database is read-only"),
    ("REVOKE SELECT ON tokens FROM {0}", "GRANT SELECT ON tokens TO {0}", "a grant is missing: SELECT on tokens"),
    ("UPDATE migrations SET version = 9 - version", "UPDATE migrations SET version = 9 - version", "pending (1, 2)"),
    (
        "INSERT INTO migrations (version, name, checksum, duration) VALUES (9, '', '', '1 s')",
        "DELETE FROM migrations WHERE version = 9",
        None,
    ),
]


@pytest.mark.parametrize(("done", "undone", "words"), HEALTH)
def test_health_says_what_is_wrong_and_takes_a_newer_schema(least, done, undone, words):
    run_sql(least.url, done.format(least.role))
    run_sql(least.url, "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = %s", least.role)
    response = least.client.get("/health")
    run_sql(least.url, undone.format(least.role))
    if words:
        assert words in problem(response, 503).detail
        response = least.client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


# --- The process ---


def test_idle_connections_are_kept_longer_than_a_load_balancer_keeps_them(monkeypatch):
    served: dict[str, Any] = {}
    monkeypatch.setattr(uvicorn, "run", lambda _, **options: served.update(options))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    given = Settings(database_url="postgresql://x", port=7, shutdown_timeout=9, workers=3)
    monkeypatch.setattr(settings, "load", lambda: given)
    main()
    assert served["timeout_keep_alive"] == 75
    assert (served["port"], served["timeout_graceful_shutdown"], served["workers"]) == (7, 9, 3)
