"""A PostgreSQL 16 and a database for this run alone, the service on it over real HTTP, and ways to ask and look."""

import json
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from psycopg2.extensions import make_dsn

from svc import dev, migrations, settings
from svc.models import Problem
from svc.test.process import execute, until

Sql = Callable[..., list[dict[str, Any]]]

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"  # the id of nothing
MERGE_PATCH = "application/merge-patch+json"

TEST_URL = settings.load().database_test_url
# Nothing that the developer set decides how a test ends.
for name in settings.Settings.model_fields:
    os.environ.pop(name.upper(), None)
settings.Settings.model_config["env_file"] = None
settings.load.cache_clear()


def run_sql(url: str, statement: str, *params: Any) -> list[dict[str, Any]]:
    """The rows of a statement on a connection of its own."""
    return execute(url, statement, params or None)


def send(client: httpx.Client, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
    """The answer to a body of JSON, which is a merge patch if the method is PATCH."""
    media_type = MERGE_PATCH if method == "PATCH" else "application/json"
    content = json.dumps(body, ensure_ascii=False)
    return client.request(method, path, content=content, headers={"Content-Type": media_type} | headers)


def problem(answer: httpx.Response, status: int) -> Problem:
    """The problem that is answered. It shows nothing of the request's values and nothing of the inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    for word in ("hunter2", "Traceback", "psycopg", "LINE 1", "svc/"):
        assert word not in answer.text
    found = Problem.model_validate_json(answer.text)
    assert (found.status, bool(found.errors)) == (status, status == 400)
    return found


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server in which databases may be made: DATABASE_TEST_URL, or one from the wheel for this run."""
    if TEST_URL:
        yield TEST_URL.get_secret_value()
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, dev.postgres(Path(folder)) as url:
        # Nothing of it outlives the run, and databases are made faster. The fault tests have servers of their own.
        run_sql(url, "ALTER SYSTEM SET fsync = off")
        run_sql(url, "SELECT pg_reload_conf()")
        yield url


@pytest.fixture(scope="session")
def new_database(postgres: str) -> Callable[[], Any]:
    @contextmanager
    def make(migrated: bool = True) -> Iterator[str]:
        """The URL of a database that is dropped after the block."""
        name = f"test_{secrets.token_hex(8)}"
        run_sql(postgres, f"CREATE DATABASE {name}")
        try:
            url = make_dsn(postgres, dbname=name)
            if migrated:
                migrations.up(url)
            yield url
        finally:
            run_sql(postgres, f"DROP DATABASE {name} WITH (FORCE)")

    return make


@pytest.fixture(scope="session")
def url(new_database: Callable[[], Any]) -> Iterator[str]:
    """The migrated database that this run's service uses."""
    with new_database() as made:
        yield made


@pytest.fixture(scope="session")
def sql(url: str) -> Sql:
    return lambda statement, *params: run_sql(url, statement, *params)


@contextmanager
def serving(**options: Any) -> Iterator[str]:
    """The service in a thread of this process, as uvicorn serves it with these options: its URL."""
    server = uvicorn.Server(uvicorn.Config("svc.app:app", port=0, log_level="warning", ws="none", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def base_url(url: str) -> Iterator[str]:
    os.environ["DATABASE_URL"] = url
    settings.load.cache_clear()
    with serving() as made:
        yield made


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url + "/api/v1", timeout=30) as made:
        yield made


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"name-{secrets.token_hex(8)}"


@pytest.fixture
def application(client: httpx.Client, name: str) -> dict[str, Any]:
    return client.post("/applications", json={"name": name}).json()


@pytest.fixture
def configuration(client: httpx.Client, application: dict[str, Any]) -> dict[str, Any]:
    body = {"application_id": application["id"], "name": "production", "config": {"port": 5432}}
    return client.post("/configurations", json=body).json()
