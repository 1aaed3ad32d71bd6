"""The service as a process of its own, and statements on connections of their own, for tests and the benchmark."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import psycopg2
from psycopg2.extras import RealDictCursor

from svc.settings import Settings

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """What the condition returns as soon as it is true. Fails after some seconds."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.01)
    return result


def execute(url: str, statement: str, params: Any = None) -> list[dict[str, Any]]:
    """The rows of a statement, or of the last of several, on an own connection. % is literal without `params`."""
    with closing(psycopg2.connect(url, cursor_factory=RealDictCursor)) as connection:
        connection.autocommit = True
        cursor = connection.cursor()
        cursor.execute(statement, params)
        return cursor.fetchall() if cursor.description else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gauge(metrics: str, name: str, label: str = "") -> float:
    """The value of a gauge, or of one with this label, in what /metrics of a process says."""
    [value] = re.findall(rf"^{name}{{.*{label}}} (.*)$", metrics, re.MULTILINE)
    return float(value)


def environment(**settings: Any) -> dict[str, str]:
    """The environment of a process in which every setting is the default or one of these, whatever svc/.env says."""
    values = {name: field.default for name, field in Settings.model_fields.items()} | settings
    given = {name.upper(): "" if value is None else str(value) for name, value in values.items()}
    # A process whose coverage is measured starts late and serves slowly.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COV_CORE")}
    return {**inherited, "PYTHONPATH": str(ROOT), **given}


@contextmanager
def service(
    url: str, output: int | IO[str] = subprocess.DEVNULL, port: int | None = None, **settings: Any
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process of `python -m svc.app` on a database, and its base URL, once it answers /health/live."""
    port = port or free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "svc.app"],
        env=environment(database_url=url, port=port, **settings),
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        until(lambda: live(base))
        yield process, base
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def live(base: str) -> bool:
    try:
        return httpx.get(f"{base}/health/live", verify=False).status_code == 200
    except httpx.TransportError:
        return False
