"""The README's example client, as it stands there."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import httpx
import pytest

from svc.conftest import run_sql
from svc.dev import postgres
from svc.migrations import up
from svc.settings import Settings
from svc.test.process import ROOT, free_port, service

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def configurations() -> Callable[..., Iterator[Any]]:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 50
    found: dict[str, Any] = {}
    exec(code, found)
    return found["configurations"]


@pytest.fixture
def heard(configurations, tmp_path) -> Callable[[str], "Queue[Any]"]:
    """What a client hears that was started on a base URL, as a queue."""

    def start(base: str) -> "Queue[Any]":
        queue: Queue[Any] = Queue()

        def listen() -> None:
            with suppress(OSError):  # what another test may serve on this port later
                for config in configurations(base, "billing", "production", str(tmp_path / "copy")):
                    queue.put(config)

        Thread(target=listen, daemon=True).start()
        return queue

    return start


def create(base: str) -> str:
    application = httpx.post(f"{base}/api/v1/applications", json={"name": "billing"}).json()
    body = {"application_id": application["id"], "name": "production", "config": {"n": 1}}
    return httpx.post(f"{base}/api/v1/configurations", json=body).headers["location"]


@pytest.mark.slow
def test_the_example_client_survives_a_restart_of_the_service_and_of_postgresql_and_a_start_without_either(
    heard, tmp_path
):
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with ExitStack() as first:
        url = first.enter_context(postgres(tmp_path / "postgres"))
        up(url)
        with service(url, port=port):
            path = base + create(base)
            queue = heard(base)
            assert queue.get(timeout=10) == {"n": 1}
            httpx.put(path, json={"config": {"n": 2}})
            assert queue.get(timeout=10) == {"n": 2}
        # The service is away.
        run_sql(url, "UPDATE configurations SET config = '{\"n\": 3}'")
        with service(url, port=port):
            assert queue.get(timeout=20) == {"n": 3}
    # PostgreSQL and the service are away.
    started_without = heard(base)
    assert started_without.get(timeout=10) == {"n": 3}
    with postgres(tmp_path / "postgres") as url, service(url, port=port):
        assert httpx.put(path, json={"config": {"n": 4}}).status_code == 200
        assert queue.get(timeout=40) == {"n": 4}
        assert started_without.get(timeout=40) == {"n": 4}
        assert queue.empty()


def test_the_example_client_stops_at_a_name_that_does_not_exist(configurations, base_url, tmp_path):
    with pytest.raises(OSError, match="404"):
        next(configurations(base_url, "nobody", "nothing", str(tmp_path / "copy")))


def test_the_readme_names_every_setting_and_every_file():
    example = Path(ROOT / "svc/.env.example").read_text()
    for name in Settings.model_fields:
        assert name.upper() in README
        assert re.search(rf"^(# )?{name.upper()}=", example, re.MULTILINE)
    for file in (ROOT / "svc").glob("*.py"):
        assert file.name.endswith("_test.py") or file.name in ("__init__.py", "conftest.py") or file.name in README
