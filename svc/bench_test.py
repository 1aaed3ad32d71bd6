import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from svc import bench
from svc.test.process import until

# Sends the first request of its script, and says the status of the answer for the requests a second.
FAKE_WRK = f"""#!{sys.executable} -SE
import json, socket, sys
script, base = sys.argv[-2:]
host, port = base.removeprefix("http://").split(":")
connection = socket.create_connection((host, int(port)))
connection.sendall(json.loads(open(script).readlines()[1].rstrip(",\\n")).encode())
status = connection.recv(1000).split()[1].decode()
print(f"     50%  808.00us\\n     75%    1.71ms\\n     99%    2.61s \\nRequests/sec:   {{status}}.10")
if status >= "400":
    print("  Non-2xx or 3xx responses: 1")
"""
PUT = bench.Target("http://127.0.0.1:1", "PUT", f"/api/v1{bench.BY_ID}")
COMMAND = [sys.executable, "-m", "svc.bench", "--seconds=1", "--rounds=1", "--applications=5"]


@pytest.fixture
def wrk(tmp_path, monkeypatch):
    """The file of a program `wrk`, first in PATH: the machine of the tests may have none."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = tmp_path / "wrk"
    path.touch(0o755)
    return path


@pytest.mark.parametrize("end", ["echo Non-2xx", "echo Socket errors", "echo Requests/sec: 0.00", "echo >&2", "exit 1"])
def test_requests_that_failed_end_the_run(wrk, end):
    wrk.write_text(f"#!/bin/sh\necho Requests/sec: 100.00\n{end}\n")
    with pytest.raises(SystemExit, match=r"PUT /api/v1/configurations/[^ ]*: Requests/sec"):
        bench.wrk(PUT, [bench.FIRST], 1, 1)


def test_no_put_repeats_another():
    assert len({bench.write_request(PUT, bench.FIRST) for _ in range(100)}) == 100


def test_a_run_without_wrk_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^wrk is missing: .*install"):
        bench.main([])


def test_an_application_that_does_not_start_ends_the_run(url):
    with pytest.raises(SystemExit, match="did not start"), bench.serve(url, "svc:nothing", "/"):
        pass


@pytest.mark.slow
def test_the_textbook_and_the_bare_route_answer_as_the_service_does(new_database):
    with (
        new_database() as url,
        bench.serve(url, "svc.bench:baseline", "/bare") as baseline,
        bench.serve(url, "svc.app:app", "/health/live") as api,
    ):
        bench.make_data(url, applications=2)
        textbook, service = f"{baseline.base}/textbook", f"{api.base}/api/v1"
        configuration = bench.fill(bench.BY_ID, bench.FIRST)
        shown = httpx.get(service + configuration)
        assert len(httpx.get(f"{baseline.base}/bare").content) == pytest.approx(len(shown.content), rel=0.02)
        application = f"/applications/{bench.APPLICATION}{bench.FIRST}"
        for kind, path in (bench.TextbookConfiguration, configuration), (bench.TextbookApplication, application):
            read, shown = httpx.get(textbook + path).json(), httpx.get(service + path).json()
            assert read.keys() == shown.keys()
            assert kind(**read) == kind(**shown)

        change = {"name": "staging", "config": {"port": 1}}
        put, shown = (httpx.put(base + configuration, json=change).json() for base in (textbook, service))
        assert put == shown | {"created_at": put["created_at"], "updated_at": put["updated_at"]}
        assert httpx.get(textbook + configuration).json() == put


@pytest.mark.slow
def test_a_whole_run_has_every_row(wrk):
    wrk.write_text(FAKE_WRK)
    done = subprocess.run(COMMAND, env=bench.environment(""), cwd=bench.ROOT, stdout=subprocess.PIPE, text=True)
    lines = {line[:44].rstrip(): line[44:].split() for line in done.stdout.splitlines()}
    assert {row.name for row in bench.ROWS} < lines.keys()
    assert lines["GET configuration by id: 304"] == ["64", "304", "0.81", "2610.00", "1.52", "1.52"]
    assert float(lines["seconds to the first 200"][0]) > 0.1
    assert float(lines["MB resident after load"][0]) > 20


@pytest.mark.slow
def test_a_run_that_is_stopped_stops_what_it_started(wrk, tmp_path, monkeypatch):
    wrk.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 600\n")
    command = [*COMMAND, "--only=process"]
    # Not in tmp_path: each pytest that starts closes that folder to other users, so also to the user of PostgreSQL.
    with TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        process = subprocess.Popen(command, env=bench.environment(""), cwd=bench.ROOT, start_new_session=True)
        try:
            until((tmp_path / "started").exists, 60)
            [[postgres, *_]] = [path.read_text().split() for path in Path(folder).glob("*/postmaster.pid")]
        finally:
            process.terminate()
        assert process.wait(60) == 130
    until(lambda: not Path(f"/proc/{postgres}").exists(), 60)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
