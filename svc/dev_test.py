import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from svc import dev, settings
from svc.conftest import run_sql
from svc.settings import Settings
from svc.test.process import ROOT, environment, free_port, live, until


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folder: as root, another run that starts would close that to PostgreSQL's user."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        yield Path(made)


@pytest.fixture
def tree(folder) -> Path:
    """A copy of the source, so that the developer's svc/.postgres is not touched."""
    shutil.copytree(ROOT / "svc", folder / "svc", ignore=shutil.ignore_patterns(".*", "*_test.py", "__pycache__"))
    return folder


@contextmanager
def serving(tree: Path, **given: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process of `python -m svc.dev`, in a group of its own as in a terminal, and its base URL."""
    port = free_port()
    env = {**environment(log_level="WARNING", port=port, **given), "PYTHONPATH": str(tree)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-m", "svc.dev"], cwd=tree, env=env, **options)
    try:
        until(lambda: live(f"http://127.0.0.1:{port}") or process.poll() is not None, 60)
        assert process.poll() is None, process.stderr.read()
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def running(folder: Path) -> bool:
    """PostgreSQL removes the file as the last thing it does."""
    return (folder / "postmaster.pid").exists()


@pytest.mark.slow
def test_dev_serves_on_a_postgresql_of_its_own_that_ctrl_c_stops_and_the_next_run_finds_again(tree):
    for names in ([], ["kept"]):
        with serving(tree) as (process, base):
            assert [each["name"] for each in httpx.get(f"{base}/api/v1/applications").json()] == names
            httpx.post(f"{base}/api/v1/applications", json={"name": "kept"})
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        assert "Traceback" not in out + err
        assert not running(tree / "svc/.postgres")
        assert out[out.index("export DATABASE_URL=") :].splitlines()[:2] == [
            f"export DATABASE_URL='postgresql://postgres:@/postgres?host={tree}/svc/.postgres'",
            f"serves on {base}",
        ]


@pytest.mark.slow
def test_a_second_dev_of_the_same_clone_is_refused_and_leaves_the_first_alone(tree):
    with serving(tree) as (_, base):
        with pytest.raises(AssertionError, match="dev runs in this clone already"), serving(tree):
            pass
        assert httpx.get(f"{base}/health").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_dev_leaves_neither_postgresql_nor_the_service_running_however_it_is_ended(tree, number):
    with serving(tree) as (process, base):
        process.send_signal(number)
        until(lambda: not running(tree / "svc/.postgres") and not live(base))


@pytest.mark.slow
def test_dev_serves_on_a_database_of_the_developers(tree, new_database):
    with new_database(migrated=False) as url, serving(tree, database_url=url) as (process, base):
        assert httpx.get(f"{base}/health").json()["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=60)[1]
        assert not (tree / "svc/.postgres").exists()


def test_what_is_wrong_is_one_line_and_starts_no_postgresql(monkeypatch):
    monkeypatch.delattr(dev, "postgres")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(settings, "load", lambda: Settings(port=port))
        refusals = {
            f"cannot listen on 127.0.0.1:{port}: Address already in use.*; set PORT": ["dev"],
            "svc.dev takes no arguments: DATABASE_URL, HOST and PORT say where": ["dev", "--port=1"],
        }
        for line, argv in refusals.items():
            monkeypatch.setattr("sys.argv", argv)
            with pytest.raises(SystemExit, match=f"^{line}$"):
                dev.main()


@pytest.mark.slow
def test_postgresql_keeps_its_data_and_ends_with_its_block_or_its_process(folder):
    with suppress(ZeroDivisionError), dev.postgres(folder / "data") as url:
        run_sql(url, "CREATE TABLE kept AS SELECT 1 AS n")
        raise ZeroDivisionError
    assert not running(folder / "data")
    (folder / ".lockfile").mkdir()  # as little of use as the lock file of another user, to root as well
    code = """
from svc.dev import Path, os, postgres
from svc.test.process import execute
with postgres(Path("data")) as url:
    print(execute(url, "SELECT n FROM kept"), flush=True)
    os.kill(os.getpid(), 9)
"""
    given = {**environment(), "TMPDIR": str(folder), "XDG_RUNTIME_DIR": ""}
    killed = subprocess.run([sys.executable, "-c", code], cwd=folder, env=given, capture_output=True, text=True)
    assert (killed.returncode, killed.stdout, killed.stderr) == (-signal.SIGKILL, "[RealDictRow({'n': 1})]\n", "")
    until(lambda: not running(folder / "data"))
