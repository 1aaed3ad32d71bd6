"""What pipelines do, which know names and not ids: create or replace, patch, delete and copy."""

import os
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from svc.conftest import MERGE_PATCH, problem, run_sql, send
from svc.test.process import ROOT, service

NO_APPLICATION = "There is no application with this name."
NO_CONFIGURATION = "This application has no configuration with this name."
NAMES = [
    "production",
    "eu/west//1/",
    "100% %2F %25",
    " padded ",
    ".",
    "..",
    "../..",
    "a\nb",
    "a?b#c&d=e+f;g:h@i|j\\k'l\"{name}",
    "näive конфигурация 設定 إعداد הגדרה การตั้งค่า e\u0301 🚀👩\u200d👧",
    "𝔘" * 256,
]


def path_of(owner: str, name: str | None = None) -> str:
    """Dots are encoded too: clients resolve a segment that is two dots."""
    path = f"/applications/{quote(owner, safe='')}/configurations"
    return (path if name is None else f"{path}/{quote(name, safe='')}").replace(".", "%2E")


@pytest.fixture
def path(application: dict[str, Any]) -> str:
    """Where the configuration of a test is, or is not yet."""
    return path_of(application["name"], "production")


def read(client: httpx.Client, path: str) -> tuple[Any, ...]:
    """What is there, and the version of its application."""
    response = client.get(path)
    [application] = client.get("/applications", params={"name": path.split("/")[2]}).json()
    return response.status_code, response.text, response.headers.get("ETag"), application["version"]


def test_put_creates_replaces_and_changes_nothing_when_it_is_sent_again(client, base_url, application, path):
    created = send(client, "PUT", path, {"config": {"a": 1}, "comments": "why"})
    status, *shown, owner = read(client, path)
    assert (created.status_code, status, owner) == (201, 200, application["version"] + 1)
    assert [created.text, created.headers["ETag"]] == shown
    assert httpx.get(base_url + created.headers["Location"]).text == created.text

    replaced = send(client, "PUT", path, {"config": {"b": 2}})
    changed = {"config": {"b": 2}, "version": 2, "updated_at": replaced.json()["updated_at"]}
    assert (replaced.status_code, replaced.json()) == (200, created.json() | changed)
    for body in ({"config": {"b": 2}}, {"comments": "why"}, {}):
        again = send(client, "PUT", path, body)
        assert (200, again.text, again.headers["ETag"], owner) == read(client, path)
        assert (again.status_code, again.text) == (200, replaced.text)
    assert send(client, "PUT", path, {"comments": None}).json()["comments"] is None


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({}, "missing"),
        ({"config": None}, "dict_type"),
        ({"config": {}, "name": "other"}, "extra_forbidden"),
    ],
)
def test_put_without_a_document_creates_nothing(client, path, body, wrong):
    before = read(client, path)
    assert problem(send(client, "PUT", path, body), 400).errors[0].type == wrong
    assert read(client, path) == before


def test_a_404_says_which_of_the_two_names_is_missing(client, application, name):
    missing = path_of(f"no-{name}")
    for method, path in (("GET", missing), *((each, f"{missing}/n") for each in ("GET", "PUT", "PATCH", "DELETE"))):
        assert problem(send(client, method, path, {}), 404).detail == NO_APPLICATION
    for method in ("GET", "PATCH", "DELETE"):
        assert problem(send(client, method, path_of(name, "n"), {}), 404).detail == NO_CONFIGURATION


@pytest.mark.parametrize(
    ("header", "value", "creates"),
    [
        ("If-Match", "*", False),
        ("If-Match", '"other"', False),
        ("If-None-Match", "*", True),
        ("If-None-Match", '"other"', True),
    ],
)
def test_conditions_decide_whether_put_creates(client, path, header, value, creates):
    before = read(client, path)
    response = send(client, "PUT", path, {"config": {"new": 1}}, **{header: value})
    assert response.status_code == (201 if creates else 412)
    assert (read(client, path) != before) is creates


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_every_name_works_in_a_path(client, base_url, name):
    client.post("/applications", json={"name": name})
    [application] = client.get("/applications", params={"name": name}).json()
    created = send(client, "PUT", path_of(name, name), {"config": {"a": 1}})
    assert (application["name"], created.json()["name"]) == (name, name)
    assert client.get(f"{path_of(name)}/{quote(name).replace('.', '%2E')}").text == created.text  # / stays as it is
    assert httpx.get(base_url + created.headers["Location"]).text == created.text
    patched = send(client, "PATCH", path_of(name, name), {"config": {"b": 2}})
    assert client.get(path_of(name)).json() == [patched.json()]
    assert client.delete(path_of(name, name)).status_code == 204
    assert client.delete(f"/applications/{application['id']}").status_code == 204


@pytest.mark.parametrize("bad", ["x" * 257, "%20", "%0A", "a%00b", "%FF", "%ED%A0%80"])
def test_what_is_no_name_is_refused(client, application, name, bad):
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        for path in (f"{path_of(name)}/{bad}", f"/applications/{bad}/configurations/production"):
            assert send(client, method, path, {"config": {}}).status_code == 400
    assert client.get(path_of(name)).json() == []


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # RFC 7396, appendix A
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        # One level deeper, because a config is always an object.
        ({"x": ["a", "b"]}, {"x": ["c", "d"]}, {"x": ["c", "d"]}),
        ({"x": {"a": "b"}}, {"x": ["c"]}, {"x": ["c"]}),
        ({"x": {"a": "foo"}}, {"x": None}, {}),
        ({"x": {"a": "foo"}}, {"x": "bar"}, {"x": "bar"}),
        ({"x": [1, 2]}, {"x": {"a": "b", "c": None}}, {"x": {"a": "b"}}),
    ],
)
def test_a_patch_is_merged_as_rfc_7396_says(client, configuration, path, target, patch, result):
    for each in (path, f"/configurations/{configuration['id']}"):
        send(client, "PUT", each, {"config": target})
        response = send(client, "PATCH", each, {"config": patch})
        assert (response.status_code, response.json()["config"]) == (200, result)
        assert client.get(path).text == response.text


def test_a_patch_changes_name_and_comments_too(client, configuration, path):
    send(client, "PUT", f"{path}-2", {"config": {}})
    assert send(client, "PATCH", path, {"name": "production-2"}).status_code == 409
    changes = {"name": "renamed", "comments": "why", "version": 2}
    renamed = send(client, "PATCH", path, {"name": "renamed", "comments": "why"}).json()
    assert renamed == configuration | changes | {"updated_at": renamed["updated_at"]}
    path = path.replace("production", "renamed")
    assert send(client, "PATCH", path, {"comments": None}).json()["comments"] is None


def test_a_patch_that_changes_nothing_keeps_version_and_etag(client, configuration, path):
    before = read(client, path)
    for body in ({}, {"config": {"port": 5432, "gone": None}, "name": "production", "comments": None}):
        assert send(client, "PATCH", path, body).status_code == 200
    assert read(client, path) == before


def test_a_patch_that_makes_a_document_too_large_stores_nothing(client, configuration, path):
    large = [5e-324] * 13_000  # PostgreSQL prints each with 324 digits
    send(client, "PATCH", path, {"config": {"one": large}})
    before = read(client, path)
    assert problem(send(client, "PATCH", path, {"config": {"two": large}}), 400).errors[0].type == "too_large"
    assert read(client, path) == before


@pytest.mark.parametrize("media_type", ["application/json", "application/json-patch+json", "text/plain", ""])
def test_a_patch_of_another_media_type_is_refused(client, configuration, path, media_type):
    for each in (path, f"/configurations/{configuration['id']}"):
        response = send(client, "PATCH", each, {"config": {"port": 1}}, **{"Content-Type": media_type})
        assert (response.status_code, response.headers["Accept-Patch"]) == (415, MERGE_PATCH)
    assert client.get(path).json() == configuration


def test_of_200_patches_at_once_none_is_lost(client, configuration, path):
    with ThreadPoolExecutor(16) as threads:
        answers = threads.map(lambda n: send(client, "PATCH", path, {"config": {"in": {f"{n}": n}}}), range(200))
        assert {each.status_code for each in answers} == {200}
    found = client.get(path).json()
    assert found["config"] == {"port": 5432, "in": {f"{n}": n for n in range(200)}}
    assert found["version"] == 201


# --- With services of their own ---


@pytest.fixture
def two_workers(new_database):
    """A client of a service with two workers, and the URL of its database. There is an application `a`."""
    with (
        new_database() as url,
        service(url, workers=2) as (_, base),
        httpx.Client(base_url=f"{base}/api/v1", timeout=30) as client,
    ):
        client.post("/applications", json={"name": "a"})
        yield client, url


@pytest.mark.slow
def test_of_racing_creators_one_creates(two_workers):
    client, url = two_workers
    with ThreadPoolExecutor(16) as threads:
        for n in range(50):
            for name, headers, other in ((f"{n}", {}, 200), (f"only-{n}", {"If-None-Match": "*"}, 412)):
                arguments = (send, client, "PUT", path_of("a", name), {"config": {}})
                writers = [threads.submit(*arguments, **headers) for _ in range(16)]
                assert Counter(each.result().status_code for each in writers) == {201: 1, other: 15}
    assert run_sql(url, "SELECT count(*) FROM configurations") == [{"count": 100}]
    assert run_sql(url, "SELECT version FROM applications") == [{"version": 101}]


@pytest.mark.slow
def test_writers_that_race_with_deletions_are_told_the_truth(two_workers):
    client, _ = two_workers
    path = path_of("a", "production")

    def write(number: int) -> tuple[str, int, str | None]:
        method = ("PUT", "PATCH", "DELETE")[number % 3]
        response = send(client, method, path, {"config": {"n": number}})
        return method, response.status_code, response.json()["detail"] if response.is_error else None

    with ThreadPoolExecutor(24) as threads:
        told = Counter(threads.map(write, range(2000)))
    done = {("PUT", 200, None), ("PUT", 201, None), ("PATCH", 200, None), ("DELETE", 204, None)}
    missing = {("PATCH", 404, NO_CONFIGURATION), ("DELETE", 404, NO_CONFIGURATION)}
    busy = {(method, 503, "Others wrote it at the same time: try again.") for method in ("PATCH", "DELETE")}
    busy.add(("PUT", 503, "The database cannot answer now: try again."))
    assert done | missing <= told.keys() <= done | missing | busy
    assert told["PUT", 201, None] - told["DELETE", 204, None] == (client.get(path).status_code == 200)


@pytest.mark.slow
def test_the_recipe_copies_an_application_and_once_more_changes_nothing(two_workers, client, base_url, sql, path):
    copy, url = two_workers
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [recipe] = re.findall(r"^curl [^\n]*\$from .*?^done$", readme, re.DOTALL | re.MULTILINE)
    application = path.split("/")[2]
    hard = {"text": "\n\\ ' \" $HOME `ls` \u2028", "numbers": [2**70, 1.0, 1e300, 1e-7], "large": "é" * 500_000}
    for number, name in enumerate(NAMES + [f"{n}" for n in range(100)]):
        body = {"config": {"n": number} if number else hard, "comments": f" {number} " if number % 2 else None}
        assert send(client, "PUT", path_of(application, name), body).status_code == 201
    shown = """
        SELECT c.name, c.comments, c.config::text, c.version
        FROM configurations AS c JOIN applications AS a ON a.id = c.application_id
        WHERE a.name = %s
        ORDER BY c.name
    """
    places = {"from": f"{base_url}/api/v1{path_of(application)}", "to": f"{copy.base_url}{path_of('a')[1:]}"}
    for _ in range(2):
        ran = subprocess.run(["bash", "-c", recipe], env=os.environ | places, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")
        assert run_sql(url, shown, "a") == sql(shown, application)
