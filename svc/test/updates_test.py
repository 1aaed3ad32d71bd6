"""What many writers do to one configuration, on two workers."""

import http.client
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import httpx
import pytest

from svc.conftest import run_sql
from svc.test.process import service

pytestmark = pytest.mark.slow

WRITERS = 32


def request(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, str, Any]:
    """Status, ETag and parsed body of an answer."""
    json_headers = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method, path, None if body is None else json.dumps(body), json_headers)
    response = connection.getresponse()
    return response.status, response.headers["ETag"], json.loads(response.read() or "null")


def add_keys(port: int, path: str, writer: int, times: int, conditional: bool) -> None:
    """Read, add a key of one's own, write back, and again if somebody else was faster."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    for number in range(times):
        status = None
        while status != 200:
            _, etag, shown = request(connection, "GET", path)
            changed = {"config": {**shown["config"], f"{writer}-{number}": number}}
            status, _, answer = request(connection, "PUT", path, changed, {"If-Match": etag} if conditional else {})
            assert status in ((200, 412) if conditional else (200,))
            if status == 412:
                assert answer["version"] > shown["version"]
                time.sleep(random.uniform(0, 0.4))
    connection.close()


def written_by_all(base: str, name: str, times: int, conditional: bool) -> dict[str, Any]:
    """A configuration after each writer added its keys."""
    port = int(base.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port)
    _, _, application = request(connection, "POST", "/api/v1/applications", {"name": name})
    body = {"application_id": application["id"], "name": "n", "config": {}}
    _, _, configuration = request(connection, "POST", "/api/v1/configurations", body)
    path = f"/api/v1/configurations/{configuration['id']}"
    connection.close()  # the server closes what is idle for 5 s
    with ThreadPoolExecutor(WRITERS) as threads:
        list(threads.map(lambda writer: add_keys(port, path, writer, times, conditional), range(WRITERS)))
    return httpx.get(base + path).json()


def test_no_update_is_lost_with_if_match_and_some_are_without(new_database):
    with new_database() as url, service(url, workers=2) as (_, base):
        kept = written_by_all(base, "with", 50, conditional=True)
        assert len(kept["config"]) == kept["version"] - 1 == 1600
        history = run_sql(
            url,
            "SELECT config FROM configuration_versions WHERE configuration_id = %s ORDER BY version",
            kept["id"],
        )
        assert len(history) == 1601
        for before, after in pairwise(history):
            assert before["config"].items() < after["config"].items()
            assert len(after["config"]) == len(before["config"]) + 1

        lossy = written_by_all(base, "without", 5, conditional=False)
        assert lossy["version"] == 161
        assert len(lossy["config"]) < 160
