import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import make_server

import httpx
import pytest

from svc import client_example
from svc.conftest import run_sql
from svc.test.process import free_port, service, until


@contextmanager
def client(base: str, copy: Path, printed: Path) -> Iterator[subprocess.Popen[str]]:
    """The example, run as a program that prints to a file."""
    command = [sys.executable, client_example.__file__, base, "billing", "production", str(copy)]
    with printed.open("w") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def create(base: str, application_name: str = "billing") -> str:
    """The URL of a new configuration."""
    application = httpx.post(f"{base}/api/v1/applications", json={"name": application_name}).json()
    body = {"application_id": application["id"], "name": "production", "config": {"n": 1}}
    return base + httpx.post(f"{base}/api/v1/configurations", json=body).headers["location"]


def test_the_client_without_arguments_says_how_to_run_it():
    ran = subprocess.run([sys.executable, client_example.__file__], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.strip()) == (1, client_example.__doc__.strip())


@pytest.mark.slow
def test_the_client_hears_of_changes_over_restarts_starts_from_its_copy_and_ends_at_404(new_database, tmp_path):
    copy, one, other = (tmp_path / name for name in ("copy", "one", "other"))
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with new_database() as url:
        with service(url, port=port):
            location = create(base)
        with client(base, copy, one) as first:
            with service(url, port=port):
                until(lambda: one.read_text() == '{"n": 1}\n', 40)
                httpx.put(location, json={"config": {"n": 2}})
                until(lambda: one.read_text() == '{"n": 1}\n{"n": 2}\n', 10)
            with client(base, copy, other) as second:
                until(lambda: other.read_text() == '{"n": 2}\n', 10)
                run_sql(url, "UPDATE configurations SET config = '{\"n\": 3}'")
                with service(url, port=port):
                    until(lambda: one.read_text().endswith('{"n": 2}\n{"n": 3}\n'), 40)
                    until(lambda: other.read_text() == '{"n": 2}\n{"n": 3}\n', 40)
                    httpx.delete(location)
                    assert (first.wait(10), second.wait(10)) == (1, 1)
    assert json.loads(copy.read_text())["config"] == {"n": 3}


@contextmanager
def proxy(base: str, requests: list[Any]) -> Iterator[str]:
    """The URL of a proxy that drops If-None-Match. It notes the query and the token of each request."""

    def answer(environ: Any, start_response: Any) -> list[bytes]:
        requests.append((environ["QUERY_STRING"], environ.get("HTTP_AUTHORIZATION")))
        answer = httpx.get(base + environ["PATH_INFO"], params=environ["QUERY_STRING"])
        status = answer.status_code if len(requests) < 9 else 404  # ends what asks without a pause
        start_response(f"{status} as it came", [("ETag", answer.headers.get("etag", ""))])
        return [answer.content]

    with make_server("127.0.0.1", 0, answer) as server:
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
