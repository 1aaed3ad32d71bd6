"""A read shows every write that was answered before it began, on whichever worker, under load."""

import http.client
from concurrent.futures import ThreadPoolExecutor

import pytest

from svc.test.process import service
from svc.test.updates_test import request

pytestmark = pytest.mark.slow

WRITERS, PAIRS = 16, 625


def stale(port: int, application_id: str, writer: int) -> int:
    """How many of PAIRS reads, each after a write on another connection, do not show that write."""
    writing, reading = (http.client.HTTPConnection("127.0.0.1", port) for _ in range(2))
    body = {"application_id": application_id, "name": f"n{writer}", "config": {}}
    path = "/api/v1/configurations/" + request(writing, "POST", "/api/v1/configurations", body)[2]["id"]
    found = 0
    for number in range(PAIRS):
        status, etag, _ = request(writing, "PUT", path, {"config": {"n": number}})
        assert status == 200
        _, seen, shown = request(reading, "GET", path)
        found += (seen, shown["config"]) != (etag, {"n": number})
    writing.close()
    reading.close()
    return found


def test_of_10_000_reads_after_writes_none_is_stale(new_database):
    with new_database() as url, service(url, workers=2) as (_, base), ThreadPoolExecutor(WRITERS) as threads:
        port = int(base.rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port)
        application = request(connection, "POST", "/api/v1/applications", {"name": "a"})[2]
        connection.close()
        found = list(threads.map(lambda writer: stale(port, application["id"], writer), range(WRITERS)))
    assert len(found) * PAIRS == 10_000
    assert sum(found) == 0
