import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg2
import pytest
import uvicorn

from svc import dev, settings
from svc.conftest import run_sql
from svc.test.process import ROOT, environment, free_port, live, until

SECRET = "hunter2"


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the source, so that the developer's svc/.postgres is not touched."""
    ignored = shutil.ignore_patterns(".*", "*_test.py", "__pycache__")
    shutil.copytree(Path(dev.__file__).parent, tmp_path / "svc", ignore=ignored)
    return tmp_path


def command(tree: Path, **settings: Any) -> dict[str, Any]:
    """How to run `python -m svc.dev` from a tree."""
    given = {**environment(**settings), "PYTHONPATH": str(tree)}
    if tree != ROOT:  # coverage would count the copies
        given = {name: value for name, value in given.items() if not name.startswith("COV_")}
    return {"args": [sys.executable, "-m", "svc.dev"], "cwd": tree, "env": given, "text": True}


@contextmanager
def running(tree: Path, **settings: Any) -> Any:
    """The process, in a process group of its own, as a terminal has it."""
    process = subprocess.Popen(
        **command(tree, **settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
def test_dev_serves_on_a_postgresql_of_its_own_that_ctrl_c_stops_and_the_next_run_finds_again(tree):
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    folder = tree / "svc" / ".postgres"
    created = None
    for run in ("first", "second"):
        with running(tree, port=port) as process:
            until(lambda: live(base) or process.poll() is not None, 60)
            assert process.poll() is None, process.stderr.read()
            if run == "first":
                created = httpx.post(f"{base}/api/v1/applications", json={"name": "kept"}).json()
                assert httpx.get(f"{base}/docs").status_code == 200
            assert httpx.get(f"{base}/api/v1/applications").json() == [created]
            postmaster = int((folder / "postmaster.pid").read_text().split()[0])
            assert alive(postmaster)
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
            until(lambda: not live(base))
            assert not alive(postmaster)
            assert not (folder / "postmaster.pid").exists()
        version, *places = out[out.index("PostgreSQL") :].splitlines()[:3]
        assert version.startswith("PostgreSQL 16.")
        assert str(folder) in version.rpartition(" at ")[2]
        assert places == [f"API        {base}/api/v1", f"Docs       {base}/docs"]
        assert "Traceback" not in out + err
        assert ("0001_applications_and_configurations.sql in " in out) is (run == "first")


@pytest.mark.slow
def test_dev_on_a_database_of_the_developers_makes_none_of_its_own(tree, new_database):
    port = free_port()
    with new_database(migrated=False) as url:
        with running(tree, port=port, database_url=url) as process:
            until(lambda: live(f"http://127.0.0.1:{port}") or process.poll() is not None, 60)
            assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        assert "PostgreSQL 16" in out
        assert "Traceback" not in out + err
        assert run_sql(url, "SELECT count(*) FROM applications") == [{"count": 0}]
    assert not (tree / "svc" / ".postgres").exists()


def refusal(tree: Path, **settings: Any) -> str:
    """The only line of a process that ends with 1."""
    ended = subprocess.run(**command(tree, **settings), capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    [line] = ended.stderr.splitlines()
    return line


def test_a_port_that_is_taken_is_one_line_and_starts_no_postgresql(tree):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(tree, port=port)
    assert line == f"cannot listen on 127.0.0.1:{port}: Address already in use; set HOST and PORT"
    assert not (tree / "svc" / ".postgres").exists()


def test_a_database_that_cannot_be_reached_is_one_line_without_the_password():
    port = free_port()
    line = refusal(ROOT, port=free_port(), database_url=f"postgresql://svc:{SECRET}@127.0.0.1:{port}/config")
    assert line.startswith(
        f'cannot connect: connection to server at "127.0.0.1", port {port} failed: Connection refused'
    )
    assert SECRET not in line


def test_a_database_that_is_not_there_is_one_line(url):
    line = refusal(ROOT, port=free_port(), database_url=psycopg2.extensions.make_dsn(url, dbname="nowhere"))
    assert line.startswith("cannot connect: ")
    assert line.endswith('database "nowhere" does not exist')


# --- In this process ---


def test_postgresql_runs_until_the_block_ends_or_fails_and_keeps_its_data(tmp_path):
    with dev.postgres(tmp_path / "data") as url:
        [row] = run_sql(url, "SELECT current_setting('server_version') AS version")
        assert row["version"].startswith("16.")
        run_sql(url, "CREATE TABLE kept AS SELECT 1 AS n")
    with pytest.raises(psycopg2.OperationalError):
        run_sql(url, "SELECT 1")
    with suppress(ZeroDivisionError), dev.postgres(tmp_path / "data") as url:
        assert run_sql(url, "SELECT n FROM kept") == [{"n": 1}]
        raise ZeroDivisionError
    with pytest.raises(psycopg2.OperationalError):
        run_sql(url, "SELECT 1")


@pytest.mark.parametrize("given", [True, False], ids=["given", "its own"])
def test_what_is_printed_is_what_is_served(tmp_path, monkeypatch, capsys, new_database, given):
    served: dict[str, Any] = {}

    def serve(app: str, **options: Any) -> None:
        url = os.environ["DATABASE_URL"]
        served.update(options, app=app, url=url, tables=run_sql(url, "SELECT count(*) FROM configurations"))

    port = free_port()
    monkeypatch.setattr(uvicorn, "run", serve)
    monkeypatch.setattr(dev, "FOLDER", tmp_path / ".postgres")
    monkeypatch.setenv("PORT", str(port))
    monkeypatch.setenv("DATABASE_URL", "")
    try:
        with new_database(migrated=False) as url:
            monkeypatch.setenv("DATABASE_URL", url if given else "")
            settings.load.cache_clear()
            runpy.run_path(dev.__file__, run_name="__main__") if given else dev.main()
            out = capsys.readouterr().out
            assert (f" at {served['url']}\n" in out) is not given
            assert f"API        http://127.0.0.1:{port}/api/v1\nDocs       http://127.0.0.1:{port}/docs\n" in out
            assert (served["app"], served["host"], served["port"]) == ("svc.app:app", "127.0.0.1", port)
            assert (served["reload"], served["ws"], served["timeout_graceful_shutdown"]) == (True, "none", 10)
            assert (served["url"] == url) is given
            assert served["tables"] == [{"count": 0}]
            assert (tmp_path / ".postgres").exists() is not given
    finally:
        settings.load.cache_clear()
