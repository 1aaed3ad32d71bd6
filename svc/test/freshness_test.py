"""A read shows every write that was answered before it began, on whichever worker, under load."""

from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import pytest

from svc.test.process import service
from svc.test.updates_test import request

pytestmark = pytest.mark.slow

WRITERS, PAIRS = 16, 625


def stale(port: int, writer: int) -> int:
    """How many of PAIRS reads, each after a write on another connection, do not show that write."""
    writing, reading = (HTTPConnection("127.0.0.1", port) for _ in range(2))
    path = f"/api/v1/applications/a/configurations/{writer}"
    found = 0
    for number in range(PAIRS):
        status, etag, _ = request(writing, "PUT", path, {"config": {"n": number}})
        assert status in (200, 201)
        _, seen, shown = request(reading, "GET", path)
        found += (seen, shown["config"]) != (etag, {"n": number})
    writing.close()
    reading.close()
    return found


def test_of_10_000_reads_after_writes_none_is_stale(new_database):
    with new_database() as url, service(url, workers=2) as (_, base), ThreadPoolExecutor(WRITERS) as threads:
        httpx.post(f"{base}/api/v1/applications", json={"name": "a"})
        found = list(threads.map(lambda writer: stale(int(base.rpartition(":")[2]), writer), range(WRITERS)))
    assert len(found) * PAIRS == 10_000
    assert sum(found) == 0
