"""The benchmark, `python -m svc.bench`: the service beside a bare FastAPI route and the textbook design.

It starts everything itself, on data that it makes, and sends the requests with `wrk`. The designs take turns, so that
whatever else the machine does slows all of them. Each figure is the median of its rounds. It needs Linux: it reads
memory from /proc.
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, redirect_stdout, suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException, Response
from psycopg2.extras import Json, RealDictCursor
from psycopg2.pool import ThreadedConnectionPool
from pydantic import BaseModel

from svc import dev, migrations
from svc.test.process import ROOT, execute

SAMPLE = 5000  # configurations that a run asks for, drawn at random
CONFIGURATIONS = 10  # of each application
SETTINGS = {f"setting_{number}": f"the value of setting {number}" for number in range(1, 20)}

# Every id is one of these prefixes and a number from FIRST on.
APPLICATION, CONFIGURATION, FIRST = "01" + 14 * "0", "02" + 14 * "0", 1_000_000_001
BY_ID = f"/configurations/{CONFIGURATION}{{number}}"

Server = namedtuple("Server", "base url pid seconds")  # `seconds` until its first 200
Figures = namedtuple("Figures", "rate p50 p99")  # requests a second, and latencies in milliseconds
# Where the requests of a design go. `headers` has the header lines for each number.
Target = namedtuple("Target", "base method path headers", defaults=({},))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench", description="Measure the service.")
    parser.add_argument("--applications", type=int, default=1000, help="how many, with 10 configurations each (1000)")
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement (2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median is shown (3)")
    parser.add_argument("--only", default="", metavar="WORD", help="rows with WORD in their name, or `process`")
    options = parser.parse_args(argv)
    rows = [row for row in ROWS if options.only in row.name]
    if not rows and options.only not in "process":
        parser.error("--only is in no name: " + ", ".join([row.name for row in ROWS] + ["process"]))
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: `apt-get install wrk` brings it")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # stops what was started
    run(options, rows)


def run(options: argparse.Namespace, rows: list["Row"]) -> None:
    """Print the table, each line as soon as it is measured."""
    with ExitStack() as stack:
        url = stack.enter_context(database())
        make_data(url, options.applications)
        print(describe_machine(url))
        print(
            f"{options.applications} applications with {CONFIGURATIONS} configurations of {len(SETTINGS) + 1} keys, "
            f"median of {options.rounds} rounds of {options.seconds} s\n\n{HEAD}",
            flush=True,
        )
        total = options.applications * CONFIGURATIONS
        numbers = random.sample(range(FIRST, FIRST + total), min(total, SAMPLE))

        @cache
        def start(app: str, probe: str, workers: int, auth: str) -> Server:
            return stack.enter_context(serve(url, app, probe, workers, auth))

        for row in rows:
            measure(row, start, numbers, options)
        if options.only in "process":
            rounds = [measure_process(url, numbers, options.seconds) for _ in range(options.rounds)]
            print("".join(f"\n{name:44}{median(each[name] for each in rounds):11.2f}" for name in rounds[0]))


# --- Measuring ---


def measure(row: "Row", start: Callable[..., Server], numbers: list[int], options: argparse.Namespace) -> None:
    """Print the medians of the designs, which take turns, at each number of connections."""
    method = row.name.split()[0]
    baseline = start("svc.bench:baseline", "/bare", row.workers, "off")
    server = start("svc.app:app", "/health/live", row.workers, "off")
    service = Target(server.base, method, f"/api/v1{row.path}")
    targets = {"bare": Target(baseline.base, "GET", "/bare")}
    if row.textbook:
        targets["textbook"] = Target(baseline.base, method, f"/textbook{row.path}")
    if row.headers:
        targets["no header"] = service
        server = start("svc.app:app", "/health/live", row.workers, row.auth)
        service = service._replace(base=server.base, headers=row.headers(server, service.path, numbers))
    targets["service"] = service

    for target in targets.values():  # warm up: pools grow, and the last of the workers starts
        wrk(target, numbers, max(row.connections), seconds=1)
    for connections in row.connections:
        rounds = {design: [] for design in targets}
        for _ in range(options.rounds):
            for design, target in targets.items():
                rounds[design].append(wrk(target, numbers, connections, options.seconds))
        medians = {design: Figures(*map(median, zip(*each, strict=True))) for design, each in rounds.items()}
        print(*table_lines(row.name, connections, medians), sep="\n", flush=True)


COMPARED = ("bare", "textbook", "no header")
LINE = "{:44}{:>11}{:>12}{:>8}{:>8}{:>8}{:>12}{:>13}"
HEAD = LINE.format("", "connections", "requests/s", "p50 ms", "p99 ms", *(f"x {design}" for design in COMPARED))


def table_lines(name: str, connections: int, medians: dict[str, Figures]) -> list[str]:
    """A line for each design, with its requests a second divided by those of the designs that it is compared with."""
    lines = []
    for design, (rate, p50, p99) in medians.items():
        label = name if design == "service" else f"{name}, {design}"
        ratios = [f"{rate / medians[other].rate:.2f}" if other in medians else "" for other in COMPARED]
        line = LINE.format(label, connections, f"{rate:,.0f}", f"{p50:.2f}", f"{p99:.2f}", *ratios)
        lines.append(line.rstrip())
    return lines


def wrk(target: Target, numbers: list[int], connections: int, seconds: int) -> Figures:
    """Send the requests for these numbers, one after the other, over and over. Exits if any of them failed."""
    # Every request is listed twice, a PUT with two bodies. So each PUT changes what is stored.
    requests = [write_request(target, number) for number in numbers * 2]
    with NamedTemporaryFile("w", suffix=".lua") as script:
        script.write("local requests = {\n" + ",\n".join(map(json.dumps, requests)) + "\n}\n")
        script.write("local sent = 0\nfunction request() sent = sent % #requests + 1 return requests[sent] end\n")
        script.flush()
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency"]
        done = subprocess.run([*command, "-s", script.name, target.base], capture_output=True, text=True)
    # With an error in its script, wrk goes on without the script and exits with 0.
    if done.returncode or done.stderr or re.search(r"Non-2xx|Socket errors|Requests/sec: +0\.00", done.stdout):
        raise SystemExit(f"{target.method} {target.path}: {done.stdout}{done.stderr}")
    return read_figures(done.stdout)


def read_figures(output: str) -> Figures:
    rate = re.search(r"Requests/sec: +([\d.]+)", output)[1]
    milliseconds = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}
    latencies = re.findall(r"^ +(?:50|99)% +([\d.]+)([a-z]+)", output, re.MULTILINE)
    return Figures(float(rate), *(float(time) * milliseconds[unit] for time, unit in latencies))


def write_request(target: Target, number: int) -> str:
    lines = [f"{target.method} {fill(target.path, number)} HTTP/1.1", "Host: bench", *target.headers.get(number, [])]
    body = ""
    if target.method == "PUT":
        body = json.dumps({"config": {**SETTINGS, "tenant": str(random.random())}})
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body])


def fill(path: str, number: int) -> str:
    """The path for the configuration with this number, or for its application."""
    application, environment = divmod(number - FIRST, CONFIGURATIONS)
    return path.format(number=number, application=FIRST + application, environment=environment + 1)


def measure_process(url: str, numbers: list[int], seconds: int) -> dict[str, float]:
    """How soon the service answers from the database, and how much memory one worker takes."""
    with serve(url, "svc.app:app", probe=fill(f"/api/v1{BY_ID}", FIRST)) as server:
        fresh = read_memory(server.pid)
        for method in ("GET", "PUT"):
            wrk(Target(server.base, method, f"/api/v1{BY_ID}"), numbers, 64, seconds)
        return {
            "seconds to the first 200": server.seconds,
            "MB resident after start": fresh,
            "MB resident after load": read_memory(server.pid),
        }


def read_memory(pid: int) -> float:
    """In MB. The kernel's kB has 1,024 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6


def describe_machine(url: str) -> str:
    names = ("server_version", "fsync", "synchronous_commit")
    version, fsync, commit = (execute(url, f"SHOW {name}")[0][name] for name in names)
    versions = f"python {platform.python_version()}, postgresql {version}"
    return f"cores {os.cpu_count()}, {versions}, fsync {fsync}, synchronous_commit {commit}"


# --- The rows ---


def etag_headers(server: Server, path: str, numbers: list[int]) -> dict[int, list[str]]:
    with httpx.Client(base_url=server.base) as client:
        return {number: [f"If-None-Match: {client.get(fill(path, number)).headers['ETag']}"] for number in numbers}


def token_headers(server: Server, path: str, numbers: list[int]) -> dict[int, list[str]]:
    command = [sys.executable, "-m", "svc.auth", "new", "bench", "--role", "read"]
    token = subprocess.check_output(command, env=environment(server.url), cwd=ROOT, text=True).strip()
    return {number: [f"Authorization: Bearer {token}"] for number in numbers}


# A name begins with the method. A row with `headers` is measured beside the same requests without them, at AUTH=off.
DEFAULTS = ((64,), False, 1, None, "off")
Row = namedtuple("Row", "name path connections textbook workers headers auth", defaults=DEFAULTS)
ROWS = [
    Row("GET configuration by id", BY_ID, connections=(1, 16, 64), textbook=True),
    Row("GET configuration by id: 304", BY_ID, headers=etag_headers),
    Row("GET configuration by id: token", BY_ID, headers=token_headers, auth="on"),
    Row("GET configuration by name", "/applications/app-{application}/configurations/environment-{environment}"),
    Row("GET configurations by content", "/configurations?contains=%7B%22tenant%22:%22{number}%22%7D"),
    Row("GET application by id", f"/applications/{APPLICATION}{{application}}", textbook=True),
    Row("GET applications, first 100", "/applications?limit=100"),
    Row("PUT configuration", BY_ID, connections=(16,), textbook=True),
    Row("GET configuration by id, 2 workers", BY_ID, textbook=True, workers=2),
]


# --- What is started, and the data in it ---


@contextmanager
def database() -> Iterator[str]:
    """The URL of an empty, migrated database. Durability is PostgreSQL's default."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with dev.postgres(Path(folder)) as url:
            execute(url, "ALTER SYSTEM SET max_connections = 200")  # the textbook's three processes take 120
        with dev.postgres(Path(folder)) as url:
            with redirect_stdout(sys.stderr):
                migrations.up(url)
            yield url


@contextmanager
def serve(url: str, app: str, probe: str, workers: int = 1, auth: str = "off") -> Iterator[Server]:
    """An application in a process of its own, once it has answered the path `probe` with 200."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    options = f"--port {port} --workers {workers} --ws none --no-access-log --log-level warning"
    command = [sys.executable, "-m", "uvicorn", app, *options.split(), "--timeout-graceful-shutdown", "5"]
    begun = time.monotonic()
    process = subprocess.Popen(command, env=environment(url, auth), cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        status = None
        while status != 200:
            if process.poll() is not None or time.monotonic() > begun + 60:
                raise SystemExit(f"{app} did not start")
            time.sleep(0.01)
            with suppress(httpx.TransportError):
                status = httpx.get(base + probe, verify=False).status_code
        yield Server(base, url, process.pid, time.monotonic() - begun)
    finally:
        process.terminate()
        process.wait()


def environment(url: str, auth: str = "off") -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": url, "LOG_LEVEL": "WARNING", "AUTH": auth}


def make_data(url: str, applications: int) -> None:
    """Fill the service's tables, and copy them for the textbook: without triggers, history or an index for searches."""
    execute(
        url,
        f"""
        INSERT INTO applications (id, name)
        SELECT '{APPLICATION}' || number, 'app-' || number
        FROM generate_series({FIRST}, {FIRST + applications - 1}) AS number;

        INSERT INTO configurations (id, application_id, name, config)
        SELECT '{CONFIGURATION}' || number,
               '{APPLICATION}' || {FIRST} + (number - {FIRST}) / {CONFIGURATIONS},
               'environment-' || 1 + (number - {FIRST}) % {CONFIGURATIONS},
               '{json.dumps(SETTINGS)}' || jsonb_build_object('tenant', number::text)
        FROM generate_series({FIRST}, {FIRST + applications * CONFIGURATIONS - 1}) AS number;

        CREATE SCHEMA textbook;
        CREATE TABLE textbook.applications AS TABLE applications;
        CREATE TABLE textbook.configurations AS TABLE configurations;
        ALTER TABLE textbook.applications ADD PRIMARY KEY (id), ADD UNIQUE (name);
        ALTER TABLE textbook.configurations ADD PRIMARY KEY (id), ADD UNIQUE (application_id, name),
            ADD FOREIGN KEY (application_id) REFERENCES textbook.applications;
        """,
    )
    execute(url, "VACUUM (FULL, ANALYZE)")  # the triggers have left dead rows
    execute(url, "CHECKPOINT")


# --- What the service is measured against ---


class TextbookRow(BaseModel):
    id: str
    name: str
    comments: str | None
    version: int
    created_at: datetime
    updated_at: datetime


class TextbookApplication(TextbookRow):
    configuration_ids: list[str]


class TextbookConfiguration(TextbookRow):
    application_id: str
    config: dict[str, Any]


class TextbookChanges(BaseModel):
    name: str | None = None
    comments: str | None = None
    config: dict[str, Any] | None = None


COLUMNS = "id, name, comments, version, created_at, updated_at"


@asynccontextmanager
async def open_pool(baseline: FastAPI) -> AsyncIterator[None]:
    """As many connections as Starlette has threads for routes: none ever waits, and none is ever made again."""
    url, options = os.environ["DATABASE_URL"], "-c search_path=textbook"
    baseline.state.pool = ThreadedConnectionPool(40, 40, url, options=options, cursor_factory=RealDictCursor)
    yield
    baseline.state.pool.closeall()


baseline = FastAPI(lifespan=open_pool, openapi_url=None)
BARE = json.dumps({"config": SETTINGS, "rest": 250 * "x"})  # as long as a configuration


@baseline.get("/bare")
async def bare() -> Response:
    return Response(BARE, media_type="application/json")


@baseline.get("/textbook/applications/{id}", response_model=TextbookApplication)
def read_textbook_application(id: str) -> dict[str, Any]:
    ids = "SELECT c.id::text FROM configurations AS c WHERE c.application_id = a.id ORDER BY c.id"
    statement = f"SELECT {COLUMNS}, ARRAY({ids}) AS configuration_ids FROM applications AS a WHERE id = %(id)s"
    return fetch_textbook_row(statement, {"id": id})


@baseline.get("/textbook/configurations/{id}", response_model=TextbookConfiguration)
def read_textbook_configuration(id: str) -> dict[str, Any]:
    statement = f"SELECT {COLUMNS}, application_id, config FROM configurations WHERE id = %(id)s"
    return fetch_textbook_row(statement, {"id": id})


@baseline.put("/textbook/configurations/{id}", response_model=TextbookConfiguration)
def update_textbook_configuration(id: str, changes: TextbookChanges) -> dict[str, Any]:
    statement = f"""
        UPDATE configurations
        SET name = coalesce(%(name)s, name), comments = coalesce(%(comments)s, comments),
            config = coalesce(%(config)s, config), version = version + 1, updated_at = now()
        WHERE id = %(id)s
        RETURNING {COLUMNS}, application_id, config
    """
    config = changes.config and Json(changes.config)
    return fetch_textbook_row(statement, {"id": id, **dict(changes), "config": config})


def fetch_textbook_row(statement: str, params: dict[str, Any]) -> dict[str, Any]:
    connection = baseline.state.pool.getconn()
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement, params)
            row = cursor.fetchone()
    finally:
        baseline.state.pool.putconn(connection)
    if row is None:
        raise HTTPException(404)
    return row


if __name__ == "__main__":
    main()
