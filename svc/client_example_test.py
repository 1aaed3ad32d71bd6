import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import httpx
import pytest

from svc import client_example
from svc.conftest import run_sql
from svc.test.process import free_port, service


@contextmanager
def client(base: str, copy: Path) -> Iterator[Queue[Any]]:
    """The example, run as a program. The queue has every configuration that it prints, and at last its exit code."""
    command = [sys.executable, client_example.__file__, base, "billing", "production", str(copy)]
    printed: Queue[Any] = Queue()

    def read(process: subprocess.Popen[str]) -> None:
        for line in process.stdout:
            printed.put(json.loads(line))
        printed.put(process.wait())

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        reader = Thread(target=read, args=[process])
        reader.start()
        try:
            yield printed
        finally:
            process.kill()
            reader.join()


def create(base: str, application_name: str = "billing") -> str:
    """The URL of a new configuration."""
    application = httpx.post(f"{base}/api/v1/applications", json={"name": application_name}).json()
    body = {"application_id": application["id"], "name": "production", "config": {"n": 1}}
    return base + httpx.post(f"{base}/api/v1/configurations", json=body).headers["location"]


@pytest.mark.slow
def test_the_client_hears_of_changes_over_restarts_starts_from_its_copy_and_ends_at_404(new_database, tmp_path):
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with new_database() as url:
        with service(url, port=port):
            location = create(base)
        with client(base, tmp_path / "copy") as first:
            with service(url, port=port):
                assert first.get(timeout=40) == {"n": 1}
                httpx.put(location, json={"config": {"n": 2}})
                assert first.get(timeout=10) == {"n": 2}
            with client(base, tmp_path / "copy") as second:
                assert second.get(timeout=10) == {"n": 2}
                run_sql(url, "UPDATE configurations SET config = '{\"n\": 3}'")
                with service(url, port=port):
                    assert (first.get(timeout=40), second.get(timeout=40)) == ({"n": 3}, {"n": 3})
                    httpx.delete(location)
                    assert (first.get(timeout=10), second.get(timeout=10)) == (1, 1)
    assert json.loads((tmp_path / "copy").read_text())["config"] == {"n": 3}


@contextmanager
def proxy(base: str, requests: list[Any]) -> Iterator[str]:
    """The URL of a proxy that drops If-None-Match. It notes the path and the token of each request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append((self.path.partition("?")[2], self.headers["Authorization"]))
            answer = httpx.get(base + self.path)
            self.send_response(answer.status_code if len(requests) < 9 else 404)  # ends what asks without a pause
            self.send_header("ETag", answer.headers.get("etag", ""))
            self.end_headers()
            self.wfile.write(answer.content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=[0.01]).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_the_client_asks_without_waiting_behind_a_proxy_that_drops_if_none_match_and_sends_its_token(
    base_url, name, tmp_path, monkeypatch
):
    monkeypatch.setenv("CONFIG_TOKEN", "secret")
    monkeypatch.setattr(client_example.random, "uniform", min)  # the pause after an error is as short as it may be
    requests: list[Any] = []
    location = create(base_url, name)
    with proxy(base_url, requests) as base:
        heard = client_example.configurations(base, name, "production", str(tmp_path / "copy"), wait=0.1)
        assert next(heard) == {"n": 1}
        httpx.put(location, json={"config": {"n": 2}})
        assert next(heard) == {"n": 2}
        assert requests == [("", "Bearer secret"), ("wait=0.1", "Bearer secret"), ("", "Bearer secret")]
        httpx.delete(location)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            next(heard)
