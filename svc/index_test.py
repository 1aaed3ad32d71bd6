import asyncio
import re
import shlex
import subprocess
from html import unescape
from typing import Any

import httpx
import pytest

from svc import models
from svc.app import app
from svc.conftest import run_sql
from svc.test.process import service

UPDATES = ["ApplicationUpdate", "ConfigurationUpdate", "ConfigurationPut"]


def commands(page: httpx.Response) -> list[str]:
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    return [unescape(each) for each in re.findall("<pre>(.*?)</pre>", page.text, re.DOTALL)]


@pytest.fixture
def document(base_url) -> dict[str, Any]:
    return httpx.get(f"{base_url}/openapi.json").json()


def operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for methods in document["paths"].values() for operation in methods.values()]


# --- The page ---


def test_all_commands_of_the_page_work_in_bash_from_the_top(new_database, document):
    with new_database() as url, service(url) as (_, base):
        found = commands(httpx.get(base))
        assert len(found) == len(operations(document))
        script = "\n".join(['curl() { command curl --fail "$@"; }', "set -eu -o pipefail", *found])
        ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        made = run_sql(url, "SELECT name, operation FROM configuration_versions ORDER BY position")
        assert {(row["name"], row["operation"]) for row in made} >= {("production", "create"), ("staging", "delete")}
        assert run_sql(url, "SELECT FROM applications") == []


def test_the_page_says_what_the_document_says_and_loads_nothing(base_url, document):
    page = httpx.get(base_url).text
    text = unescape(re.sub("<.*?>", "", page))
    for operation in operations(document):
        assert operation["description"].replace("`", "") in text
        for parameter in operation.get("parameters", []):
            assert f"{parameter['name']} in the {parameter['in']}: {parameter['description']}" in text
    assert re.findall('href="(.*?)"', page) == [f"{base_url}/docs"]
    assert not re.search(r"<script|<link|src=|url\(|@import| on\w+=", page)


def test_the_page_works_below_a_path_and_for_any_host():
    async def read(host: str) -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path="/config")
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.get("/config/", headers={"Host": host})

    for host in ("config.internal:8443", "[::1]:8000", "$(id)'<b>&;`id`"):
        page = asyncio.run(read(host))
        [command] = [each for each in commands(page) if each.endswith("/health/live")]
        assert shlex.split(command) == ["curl", "-s", f"http://{host}/config/health/live"]
        assert "<b>" not in page.text


# --- The OpenAPI document ---


def test_the_examples_of_bodies_are_valid_and_those_of_updates_do_no_harm(document):
    schemas = document["components"]["schemas"]
    for name in ("ApplicationCreate", "ConfigurationCreate", *UPDATES):
        for example in schemas[name]["examples"]:
            getattr(models, name).model_validate(example)
    assert all(schemas[name]["examples"][0].keys() == {"comments"} for name in UPDATES)


def test_a_token_is_needed_but_for_health(document):
    assert document["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert document["security"] == [{"token": []}]
    free = [each["operationId"] for each in operations(document) if each.get("security") == []]
    assert free == ["health", "health_live"]
