"""What many writers do to one configuration, on two workers."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import pairwise
from typing import Any

import httpx
import pytest

from svc.conftest import run_sql
from svc.test.process import service

pytestmark = pytest.mark.slow

WRITERS, TIMES = 32, 20


def request(connection: HTTPConnection, method: str, path: str, body: Any = None, headers: Any = None) -> tuple:
    """Status, ETag and parsed body of an answer."""
    json_headers = {"Content-Type": "application/json", **(headers or {})}
    connection.request(method, path, None if body is None else json.dumps(body), json_headers)
    response = connection.getresponse()
    return response.status, response.headers["ETag"], json.loads(response.read() or "null")


def add_keys(port: int, path: str, writer: int) -> None:
    """Read, add a key of one's own, write back, and again if somebody else was faster."""
    connection = HTTPConnection("127.0.0.1", port)
    for number in range(TIMES):
        status = None
        while status != 200:
            _, etag, shown = request(connection, "GET", path)
            changed = {"config": {**shown["config"], f"{writer}-{number}": number}}
            status, current, _ = request(connection, "PUT", path, changed, {"If-Match": etag})
            if status != 200:
                assert (status, current == etag) == (412, False)
                time.sleep(random.uniform(0, 0.4))
    connection.close()


def test_of_many_writers_to_one_configuration_none_loses_an_update(new_database):
    with new_database() as url, service(url, workers=2) as (_, base), ThreadPoolExecutor(WRITERS) as threads:
        port = int(base.rpartition(":")[2])
        path = "/api/v1/applications/a/configurations/n"
        httpx.post(f"{base}/api/v1/applications", json={"name": "a"})
        httpx.put(base + path, json={"config": {}})
        list(threads.map(lambda writer: add_keys(port, path, writer), range(WRITERS)))
        kept = httpx.get(base + path).json()
        history = run_sql(url, "SELECT config FROM configuration_versions ORDER BY version")
    assert len(kept["config"]) == kept["version"] - 1 == len(history) - 1 == WRITERS * TIMES
    for before, after in pairwise(history):
        assert before["config"].items() < after["config"].items()
        assert len(after["config"]) == len(before["config"]) + 1
