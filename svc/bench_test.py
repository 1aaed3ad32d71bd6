import json
import signal
import threading
from argparse import Namespace

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from svc import bench
from svc.models import Application, Configuration
from svc.test.process import until

WRK = """\
Running 1s test @ http://127.0.0.1:8799/
  1 threads and 2 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.44ms  431.41us   3.64ms   50.00%
    Req/Sec     1.35k    29.31     1.41k    81.82%
  Latency Distribution
     50%  808.00us
     75%    1.71ms
     90%    1.96ms
     99%    2.61ms
  1475 requests in 1.10s, 2.60MB read
Requests/sec:   1340.90
Transfer/sec:      2.36MB
"""


@pytest.fixture
def fake_wrk(tmp_path, monkeypatch):
    """Puts a program `wrk` first in PATH that writes what it is told to, for the tests' machine may have none."""

    def put(output: str, last: str = "exit 0") -> None:
        path = tmp_path / "wrk"
        path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}END\n{last}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    before = signal.getsignal(signal.SIGTERM)
    yield put
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def served(url, configuration, sql, monkeypatch):
    """The bench's application with a stand-in for the service, which the tests have open already."""
    bench.make_textbook(url)
    hello = Route("/api/v1/hello", lambda request: PlainTextResponse("hello"))
    monkeypatch.setattr(bench, "service", Starlette(routes=[hello]))
    server = uvicorn.Server(uvicorn.Config(bench.app, port=0, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        with httpx.Client(base_url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}") as made:
            yield made
    finally:
        server.should_exit = True
        thread.join()
        sql("DROP SCHEMA textbook CASCADE")


def test_the_output_of_wrk_is_read():
    assert bench.parse_wrk(WRK, "GET") == {"rate": 1340.9, "p50": 0.808, "p99": 2.61}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (WRK + "  Non-2xx or 3xx responses: 2474\n", "GET: Non-2xx or 3xx responses: 2474"),
        (WRK + "  Socket errors: connect 0, read 3, write 0, timeout 0\n", "GET: Socket errors: connect 0, read 3"),
        (WRK.replace("1340.90", "0.00"), "GET: wrk says: Running 1s test"),
        ("unable to connect\n", "GET: wrk says: unable to connect"),
    ],
)
def test_requests_that_failed_end_the_run(output, said):
    with pytest.raises(SystemExit) as ended:
        bench.parse_wrk(output, "GET")
    assert str(ended.value).startswith(said)


def test_a_wrk_that_cannot_read_its_script_ends_the_run(fake_wrk, tmp_path):
    fake_wrk(WRK, "echo 'syntax error' >&2")
    options = Namespace(folder=tmp_path, applications=1, seconds=1)
    with pytest.raises(SystemExit, match="syntax error"):
        bench.wrk(options, "http://127.0.0.1:1", bench.BARE_ROUTE, 1)


def test_medians_are_compared_with_the_bare_route_and_the_textbook():
    rounds = [
        {
            "bare": {"rate": 1000.0, "p50": 1.0},
            "textbook": {"rate": 200.0, "p50": 5.0},
            "service": {"rate": rate, "p50": 2.0},
        }
        for rate in (1.0, 800.0, 900.0)
    ]
    assert bench.compared("GET", 16, rounds)[2] == {
        "operation": "GET",
        "connections": 16,
        "design": "service",
        "rate": 800.0,
        "p50": 2.0,
        "to_bare": 0.8,
        "to_textbook": 4.0,
    }


def test_without_wrk_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^wrk is missing: .*install"):
        bench.main([])


@pytest.mark.parametrize("given", [["--rounds", "0"], ["--only", "nothing is called so"]])
def test_a_run_that_would_measure_nothing_is_refused(given):
    with pytest.raises(SystemExit) as ended:
        bench.main(given)
    assert ended.value.code == 2


def test_ctrl_c_ends_without_a_traceback(fake_wrk, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    fake_wrk(WRK)
    monkeypatch.setattr(bench, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 130


def test_a_service_that_does_not_start_ends_the_run(url):
    with pytest.raises(SystemExit, match="did not start"), bench.serve(url, "svc.bench:nothing"):
        pass


def test_an_unexpected_status_ends_the_run(base_url):
    with pytest.raises(SystemExit, match="GET configuration by id: 404"):
        bench.check(base_url, bench.OPERATIONS[0])


def test_the_textbook_design_answers_as_the_service_does(client, served, application, configuration):
    id = configuration["id"]
    read, shown = served.get(f"/textbook/configurations/{id}"), client.get(f"/configurations/{id}")
    assert Configuration.model_validate(read.json()) == Configuration.model_validate(shown.json())

    path = f"/applications/{application['id']}"
    read, shown = served.get(f"/textbook{path}"), client.get(path)
    assert read.json()["configuration_ids"] == [id]
    assert Application.model_validate(read.json()) == Application.model_validate(shown.json())

    change = {"name": "staging", "config": {"port": 1}}
    put = served.put(f"/textbook/configurations/{id}", json=change)
    shown = client.put(f"/configurations/{id}", json=change)
    assert put.json() == shown.json() | {"updated_at": put.json()["updated_at"], "created_at": put.json()["created_at"]}
    assert served.get(f"/textbook/configurations/{id}").json() == put.json()
    assert served.get("/textbook/configurations/unknown").status_code == 404


def test_the_bare_route_stands_beside_the_service_and_answers_as_much(client, served, application):
    assert served.get("/api/v1/hello").text == "hello"
    config = {**bench.SETTINGS, "tenant": str(bench.FIRST)}
    body = {"application_id": application["id"], "name": "environment-1", "config": config}
    answer = client.post("/configurations", json=body)
    assert len(served.get("/bare").content) == pytest.approx(len(answer.content), rel=0.02)


def test_a_whole_run(fake_wrk, capsys, monkeypatch):
    fake_wrk(WRK)
    monkeypatch.setattr(bench, "CONNECTIONS", (2,))
    bench.main(["--seconds", "1", "--rounds", "1", "--applications", "5", "--json"])
    report = json.loads(capsys.readouterr().out)
    figures = {"connections": 2, "rate": 1340.9, "p50": 0.808, "p99": 2.61}
    first = {"operation": "GET configuration by id", "design": "bare", **figures, "to_bare": 1.0}
    assert report["operations"][0] == first | {"to_textbook": 1.0}
    designs = {}
    for row in report["operations"]:
        designs.setdefault(row["operation"], []).append(row["design"])
    assert designs["PUT configuration"] == ["bare", "textbook", "service", "pgbench"]
    assert designs["GET configuration by id: 304"] == ["bare", "unconditional", "service"]
    assert list(designs) == [each.name for each in bench.OPERATIONS]
    assert min(report["process"].values()) > 0
    lines = bench.table(report).splitlines()
    assert len([line for line in lines if "bare  " in line]) == 2  # the head and one row
    assert lines[-1].startswith("ms until")
