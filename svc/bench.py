"""The benchmark, `python -m svc.bench`: the service against a bare route and a textbook design in the same process.

It starts everything itself, on data that it makes, and loads it with wrk. All designs take turns, so that whatever else
the machine does meets them alike, and each figure is the median of its rounds. Needs Linux: memory is read from /proc.
"""

import argparse
import asyncio
import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, redirect_stdout
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
from fastapi import FastAPI, HTTPException, Response
from psycopg2.extras import Json, RealDictCursor
from psycopg2.pool import ThreadedConnectionPool
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from svc import dev, migrations, settings
from svc.app import app as service

ROOT = Path(__file__).parents[1]
CONNECTIONS = (1, 16, 64)
CONFIGURATIONS = 10  # of each application
SETTINGS = {f"setting_{number}": f"the value of setting {number}" for number in range(1, 20)}
WATCHERS = 200  # four of a configuration
CHANGED = 1000  # configurations that have ten versions when they are restored
TOKEN = "987654321"

# Ids end in a counter, so that wrk and pgbench can draw one at random.
APPLICATION, CONFIGURATION, FIRST = "01" + 14 * "0", "02" + 14 * "0", 1_000_000_001

# Begins with its method. A <word> in path, header or body is drawn for each request: in `lua`, once more in `check`.
Operation = namedtuple(
    "Operation",
    "name path textbook headers body status before pgbench workers",
    defaults=("", {}, "", 200, "", False, 1),
)
ONE = f"/configurations/{CONFIGURATION}<c>"
CONFIG = json.dumps({**SETTINGS, "tenant": "<token>"})
CONTAINS = quote(json.dumps({"tenant": "<c>"}), safe="<>")
# Nine more versions of the configurations that are restored.
CHANGE = f"""
    DO $$ BEGIN
        FOR number IN 2..10 LOOP
            UPDATE configurations SET comments = 'version ' || number WHERE id < '{CONFIGURATION}{FIRST + CHANGED}';
        END LOOP;
    END $$
"""
NEW = f'{{"application_id": "{APPLICATION}<a>", "name": "new-<seed>-<count>", "config": {CONFIG}}}'
KNOWN = {"If-None-Match": f'"{CONFIGURATION}<c>.1"'}
OPERATIONS = [
    Operation("GET configuration by id", f"/api/v1{ONE}", f"/textbook{ONE}"),
    Operation("GET configuration by id: 304", f"/api/v1{ONE}", headers=KNOWN, status=304),
    Operation("GET configuration by name", "/api/v1/applications/app-<a>/configurations/environment-<e>"),
    Operation("GET configurations by content", f"/api/v1/configurations?contains={CONTAINS}"),
    Operation(
        "GET application by id", f"/api/v1/applications/{APPLICATION}<a>", f"/textbook/applications/{APPLICATION}<a>"
    ),
    Operation("GET applications, first 100", "/api/v1/applications?limit=100"),
    Operation("GET applications, last 100", f"/api/v1/applications?limit=100&after={APPLICATION}<late>"),
    Operation("PUT configuration", f"/api/v1{ONE}", f"/textbook{ONE}", body=f'{{"config": {CONFIG}}}', pgbench=True),
    Operation(
        "POST restore of a version",
        f"/api/v1/configurations/{CONFIGURATION}<changed>/versions/<version>/restore",
        before=CHANGE,
    ),
    Operation("POST configuration", "/api/v1/configurations", body=NEW, status=201),
    Operation("GET configuration by id, 2 workers", f"/api/v1{ONE}", f"/textbook{ONE}", workers=2),
]
BARE_ROUTE = Operation("GET bare route", "/bare")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench", description="Measure the service.")
    parser.add_argument("--applications", type=int, default=1000, help="how many, with 10 configurations each (1000)")
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement (2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median is shown (3)")
    parser.add_argument("--only", default="", metavar="TEXT", help="operations with TEXT in their name, or `process`")
    parser.add_argument("--json", action="store_true", help="print all that was measured as JSON")
    options = parser.parse_args(argv)
    chosen = [operation for operation in OPERATIONS if options.only in operation.name]
    if min(options.applications, options.seconds, options.rounds) < 1:
        parser.error("every number is at least 1")
    if not chosen and options.only not in "process":
        parser.error("--only is in no name: " + ", ".join([each.name for each in OPERATIONS] + ["process"]))
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is missing: `apt-get install wrk` brings it")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either signal ends the blocks that stop what was begun
    try:
        report = run(options, chosen)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(report, indent=2) if options.json else table(report))


def run(options: argparse.Namespace, chosen: list[Operation]) -> dict[str, Any]:
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, database(Path(folder, "postgres")) as url:
        bench = SimpleNamespace(**vars(options), url=url, folder=Path(folder))
        make_data(url, options.applications)
        report = {"machine": machine(url), "options": vars(options), "operations": [], "process": {}}
        for workers, operations in itertools.groupby(chosen, attrgetter("workers")):
            with serve(url, "svc.bench:app", workers) as server:
                for operation in operations:
                    report["operations"] += measure(bench, server.base, operation)
        if options.only in "process":
            report["process"] = measure_process(bench)
    return report


# --- Measuring ---


def measure(bench: SimpleNamespace, base: str, operation: Operation) -> list[dict[str, Any]]:
    """A row for each number of connections and design: bare, textbook, service, pgbench, as far as there is one.

    A conditional request is measured beside the same without its condition.
    """
    if operation.before:
        dev.execute(bench.url, operation.before)
    check(base, operation)
    loads = {"bare": lambda connections: wrk(bench, base, BARE_ROUTE, connections)}
    if operation.textbook:
        textbook = operation._replace(path=operation.textbook)
        check(base, textbook)
        loads["textbook"] = lambda connections: wrk(bench, base, textbook, connections)
    if operation.headers:
        unconditional = operation._replace(headers={}, status=200)
        loads["unconditional"] = lambda connections: wrk(bench, base, unconditional, connections)
    loads["service"] = lambda connections: wrk(bench, base, operation, connections)
    if operation.pgbench:
        script = pgbench_script(bench.url)
        loads["pgbench"] = lambda connections: pgbench(bench, script, connections)
    rows = []
    for connections in CONNECTIONS:
        print(f"{operation.name}, connections: {connections}", file=sys.stderr)
        rounds = [{design: load(connections) for design, load in loads.items()} for _ in range(bench.rounds)]
        rows += compared(operation.name, connections, rounds)
    return rows


def compared(name: str, connections: int, rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """The median of each figure by design, and the ratio of its requests a second to those of bare and textbook."""
    medians = {
        design: {figure: median(each[design][figure] for each in rounds) for figure in figures}
        for design, figures in rounds[0].items()
    }
    others = [design for design in ("bare", "textbook") if design in medians]
    return [
        {"operation": name, "connections": connections, "design": design, **figures}
        | {f"to_{other}": figures["rate"] / medians[other]["rate"] for other in others}
        for design, figures in medians.items()
    ]


def lua(operation: Operation, applications: int, seed: int) -> str:
    """The script by which wrk makes its requests. A word is one of its variables."""

    def text(template: str) -> str:
        return "[=[" + re.sub(r"<(\w+)>", r"]=] .. \1 .. [=[", template) + "]=]"

    headers = {**operation.headers, **({"Content-Type": "application/json"} if operation.body else {})}
    return f"""
local seed, count, late = {seed}, 0, {FIRST - 1 + max(applications - 100, 0)}
math.randomseed(seed)
function request()
  count = count + 1
  local drawn, token = math.random(0, {applications * CONFIGURATIONS - 1}), math.random(1000000000)
  local c, a, e = {FIRST} + drawn, {FIRST} + math.floor(drawn / {CONFIGURATIONS}), drawn % {CONFIGURATIONS} + 1
  local changed, version = {FIRST} + drawn % {CHANGED}, token % 10 + 1
  local headers = {{{", ".join(f"[ {text(name)} ] = {text(value)}" for name, value in headers.items())}}}
  return wrk.format("{operation.name.split()[0]}", {text(operation.path)}, headers, {text(operation.body)})
end
"""


_seeds = itertools.count(1)


def wrk(bench: SimpleNamespace, base: str, operation: Operation, connections: int) -> dict[str, float]:
    script = bench.folder / "requests.lua"
    script.write_text(lua(operation, bench.applications, next(_seeds)))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{bench.seconds}s", "--timeout", "10s", "--latency", "-s", script]
    done = subprocess.run([*command, base], capture_output=True, text=True)
    if done.returncode or done.stderr:  # with an error in its script it goes on without one
        raise SystemExit(f"{operation.name}: {done.stdout}{done.stderr}")
    return parse_wrk(done.stdout, operation.name)


def parse_wrk(text: str, name: str) -> dict[str, float]:
    """Requests a second, and latencies in milliseconds. Exits with one line if any request failed."""
    if failed := re.search(r"Non-2xx.*|Socket errors.*", text):
        raise SystemExit(f"{name}: {failed[0]}")
    rate = re.search(r"^Requests/sec: +([\d.]+)", text, re.MULTILINE)
    if rate is None or float(rate[1]) == 0:
        raise SystemExit(f"{name}: wrk says: {' '.join(text.split())}")
    milliseconds = {"us": 0.001, "ms": 1, "s": 1000, "m": 60_000}
    shares = re.findall(r"^ +(50|99)% +([\d.]+)([a-z]+)", text, re.MULTILINE)
    return {"rate": float(rate[1])} | {f"p{share}": float(time) * milliseconds[unit] for share, time, unit in shares}


def check(base: str, operation: Operation) -> None:
    """Sends one request of an operation. Exits with one line if its status is not the expected one."""
    words = dict.fromkeys(("c", "a", "late", "changed"), str(FIRST))
    words |= {"e": "1", "version": "1", "token": TOKEN, "seed": str(time.time_ns()), "count": "0"}

    def text(template: str) -> str:
        return re.sub(r"<(\w+)>", lambda word: words[word[1]], template)

    headers = {name: text(value) for name, value in operation.headers.items()}
    url = base + text(operation.path)
    response = httpx.request(operation.name.split()[0], url, headers=headers, content=text(operation.body))
    if response.status_code != operation.status:
        raise SystemExit(f"{operation.name}: {response.status_code}: {response.text}")


def pgbench_script(url: str) -> str:
    """The statement by which the service answered the PUT of `check`, as the server got it, on random rows."""
    [row] = dev.execute(
        url,
        """
        SELECT query
        FROM pg_stat_activity
        WHERE application_name = 'config-service' AND query LIKE %(like)s
        """,
        {"like": f"%{TOKEN}%"},
    )
    # pgbench sets its variables in quoted text too.
    return row["query"].replace(f"{CONFIGURATION}{FIRST}", f"{CONFIGURATION}:c").replace(TOKEN, ":token")


def pgbench(bench: SimpleNamespace, statement: str, connections: int) -> dict[str, float]:
    """As `wrk`, for a statement that its clients send without a service between."""
    for log in bench.folder.glob("pgbench_log.*"):
        log.unlink()
    script = bench.folder / "statement.sql"
    last = FIRST - 1 + bench.applications * CONFIGURATIONS
    script.write_text(f"\\set c random({FIRST}, {last})\n\\set token random(1, 1000000000)\n{statement.strip()};\n")
    program = dev.PROGRAMS / "pgbench"
    command = [program, "--no-vacuum", f"--file={script}", f"--client={connections}", f"--time={bench.seconds}"]
    done = subprocess.run([*command, "--log", bench.url], cwd=bench.folder, capture_output=True, text=True)
    rate = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode or rate is None:
        raise SystemExit(f"pgbench: {' '.join(done.stderr.split())}")
    lines = itertools.chain.from_iterable(log.read_text().splitlines() for log in bench.folder.glob("pgbench_log.*"))
    took = quantiles((int(line.split()[2]) / 1000 for line in lines), n=100)  # client, transaction, microseconds, …
    return {"rate": float(rate[1]), "p50": took[49], "p99": took[98]}


def measure_process(bench: SimpleNamespace) -> dict[str, float]:
    """The service alone, one worker: how soon it answers, what memory it takes, and how it streams the longest list."""
    print("process", file=sys.stderr)
    starts = []
    for _ in range(bench.rounds):
        with serve(bench.url, "svc.app:app") as server:
            starts.append(server.seconds)
    with serve(bench.url, "svc.app:app") as server, httpx.Client(base_url=server.base, timeout=600) as client:
        fresh = memory(server.pid, "VmRSS")
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")  # the peak begins here
        begun = time.monotonic()
        with client.stream("GET", "/api/v1/applications") as response:
            chunks = response.iter_raw()
            size = len(next(chunks))
            first_byte = time.monotonic() - begun
            size += sum(map(len, chunks))
        took = time.monotonic() - begun
        peak = memory(server.pid, "VmHWM")
        for name in ("GET configuration by id", "PUT configuration"):
            [operation] = [each for each in OPERATIONS if each.name == name]
            wrk(bench, server.base, operation, max(CONNECTIONS))
        return {
            "seconds to the first 200": median(starts),
            "MB resident after start": fresh,
            "MB resident after load": memory(server.pid, "VmRSS"),
            "MB of all applications": size / 1e6,
            "ms to their first byte": first_byte * 1000,
            "ms to their last byte": took * 1000,
            "MB more resident at the peak": peak - fresh,
            **asyncio.run(measure_watchers(server.base)),
        }


async def measure_watchers(base: str) -> dict[str, float]:
    """How long after the answer to a change those who wait for it, among many, have heard of it."""
    async with httpx.AsyncClient(base_url=f"{base}/api/v1/configurations", timeout=60) as client:
        tags, readers, writers = {}, {}, []
        for watcher in range(WATCHERS):
            id = f"{CONFIGURATION}{FIRST + watcher // 4}"
            tags[id] = tags.get(id) or (await client.get(f"/{id}")).headers["ETag"]
            reader, writer = await asyncio.open_connection(*base.removeprefix("http://").split(":"))
            path = f"/api/v1/configurations/{id}?wait=60"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: bench\r\nIf-None-Match: {tags[id]}\r\n\r\n".encode())
            readers.setdefault(id, []).append(reader)
            writers.append(writer)
        while (await client.get(f"{base}/health")).json()["waiters"] < WATCHERS:
            await asyncio.sleep(0.01)
        heard = []
        for id in tags:
            await client.put(f"/{id}", json={"config": {"changed": time.time()}})
            begun = time.monotonic()
            for reader in readers[id]:
                await reader.readuntil(b"\r\n\r\n")
                heard.append((time.monotonic() - begun) * 1000)
        for writer in writers:
            writer.close()
    took = quantiles(heard, n=100)
    return {f"ms until {WATCHERS} watchers hear, p50": took[49], f"ms until {WATCHERS} watchers hear, p99": took[98]}


def memory(pid: int, field: str) -> float:
    """In MB. The kernel's kB has 1,024 bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+)", status, re.MULTILINE)[1]) * 1024 / 1e6


def machine(url: str) -> dict[str, Any]:
    [row] = dev.execute(
        url,
        """
        SELECT current_setting('server_version') AS postgresql, current_setting('fsync') AS fsync,
               current_setting('synchronous_commit') AS synchronous_commit
        """,
    )
    return {"cores": os.cpu_count(), "python": platform.python_version(), **row}


def table(report: dict[str, Any]) -> str:
    """What was measured as text: of the bare route once, of the others each."""
    options = report["options"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in report["machine"].items()),
        f"{options['applications']} applications with {CONFIGURATIONS} configurations of {len(SETTINGS) + 1} keys, "
        f"median of {options['rounds']} rounds of {options['seconds']} s",
        "",
        f"{'':44}{'connections':>11}{'requests/s':>12}{'p50 ms':>8}{'p99 ms':>8}{'x bare':>8}{'x textbook':>12}",
    ]
    first = {row["operation"] for row in report["operations"][:1]}
    for row in report["operations"]:
        if row["design"] != "bare" or row["operation"] in first:
            design = "" if row["design"] == "service" else f", {row['design']}"
            ratios = [f"{row[to]:.2f}" if to in row else "" for to in ("to_bare", "to_textbook")]
            lines.append(
                f"{row['operation'] + design:44}{row['connections']:11}{row['rate']:12,.0f}"
                f"{row['p50']:8.2f}{row['p99']:8.2f}{ratios[0]:>8}{ratios[1]:>12}"
            )
    return "\n".join([*lines, "", *(f"{name:44}{value:11.2f}" for name, value in report["process"].items())])


# --- What is started, and the data in it ---


@contextmanager
def database(folder: Path) -> Iterator[str]:
    """The URL of an empty, migrated database. Durability is PostgreSQL's default."""
    with dev.postgres(folder) as url:
        dev.execute(url, "ALTER SYSTEM SET max_connections = 200")  # two workers of service and textbook
        dev.execute(url, "ALTER SYSTEM SET track_activity_query_size = '16kB'")  # for `pgbench_script`
    with dev.postgres(folder) as url:
        with redirect_stdout(sys.stderr):
            migrations.up(url)
        yield url


@contextmanager
def serve(url: str, app: str, workers: int = 1) -> Iterator[SimpleNamespace]:
    """An application in a process of its own, once it has answered with a configuration."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--port {port} --workers {workers} --no-access-log --log-level warning --timeout-graceful-shutdown 5"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DATABASE_URL": url, "LOG_LEVEL": "WARNING"}
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", app, "--ws", "none", *options.split()],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while not answers(client):
                if process.poll() is not None or time.monotonic() > begun + 60:
                    raise SystemExit(f"{app} did not start")
                time.sleep(0.01)
        seconds = time.monotonic() - begun
        time.sleep(workers - 1)  # the others
        yield SimpleNamespace(base=f"http://127.0.0.1:{port}", pid=process.pid, seconds=seconds)
    finally:
        process.terminate()
        process.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get(f"/api/v1/configurations/{CONFIGURATION}{FIRST}").status_code == 200
    except httpx.TransportError:
        return False


def make_data(url: str, applications: int) -> None:
    # What the triggers would do row by row is done at once: with them it takes minutes for many applications.
    dev.execute(
        url,
        """
        ALTER TABLE applications DISABLE TRIGGER USER;
        ALTER TABLE configurations DISABLE TRIGGER USER;
        INSERT INTO applications (id, name, version)
        SELECT %(application)s || number, 'app-' || number, 1 + %(configurations)s
        FROM generate_series(%(first)s, %(first)s + %(applications)s - 1) AS number;
        INSERT INTO configurations (id, application_id, name, config)
        SELECT %(configuration)s || number,
               %(application)s || %(first)s + (number - %(first)s) / %(configurations)s,
               'environment-' || 1 + mod(number - %(first)s, %(configurations)s),
               %(settings)s || jsonb_build_object('tenant', number::text)
        FROM generate_series(%(first)s, %(first)s + %(applications)s * %(configurations)s - 1) AS number;
        INSERT INTO configuration_versions
        SELECT id, version, 'create', application_id, name, comments, config, updated_at FROM configurations;
        ALTER TABLE applications ENABLE TRIGGER USER;
        ALTER TABLE configurations ENABLE TRIGGER USER;
        """,
        {
            "application": APPLICATION,
            "configuration": CONFIGURATION,
            "first": FIRST,
            "applications": applications,
            "configurations": CONFIGURATIONS,
            "settings": Json(SETTINGS),
        },
    )
    make_textbook(url)
    dev.execute(url, "VACUUM ANALYZE")
    dev.execute(url, "CHECKPOINT")


# --- What the service is measured against ---


def make_textbook(url: str) -> None:
    """The textbook design's own tables: the same rows, without triggers, history or an index for searches."""
    dev.execute(
        url,
        """
        CREATE SCHEMA textbook;
        CREATE TABLE textbook.applications AS TABLE applications;
        CREATE TABLE textbook.configurations AS TABLE configurations;
        ALTER TABLE textbook.applications ADD PRIMARY KEY (id), ADD UNIQUE (name);
        ALTER TABLE textbook.configurations ADD PRIMARY KEY (id), ADD UNIQUE (application_id, name),
            ADD FOREIGN KEY (application_id) REFERENCES textbook.applications;
        """,
    )


class TextbookApplication(BaseModel):
    id: str
    name: str
    comments: str | None
    configuration_ids: list[str]
    version: int
    created_at: datetime
    updated_at: datetime


class TextbookConfiguration(BaseModel):
    id: str
    application_id: str
    name: str
    comments: str | None
    config: dict[str, Any]
    version: int
    created_at: datetime
    updated_at: datetime


class TextbookChanges(BaseModel):
    name: str | None = None
    comments: str | None = None
    config: dict[str, Any] | None = None


@asynccontextmanager
async def pooled(baseline: FastAPI) -> AsyncIterator[None]:
    """As many connections as Starlette has threads for routes: none ever waits, and none is ever made again."""
    url = settings.load().database()
    pool = ThreadedConnectionPool(40, 40, url, options="-c search_path=textbook", cursor_factory=RealDictCursor)
    baseline.state.pool = pool
    try:
        yield
    finally:
        pool.closeall()


baseline = FastAPI(lifespan=pooled, openapi_url=None)
BARE = json.dumps(
    {
        "id": f"{CONFIGURATION}{FIRST}",
        "application_id": f"{APPLICATION}{FIRST}",
        "name": "environment-1",
        "comments": None,
        "config": {**SETTINGS, "tenant": str(FIRST)},
        "version": 1,
        **dict.fromkeys(("created_at", "updated_at"), "2025-01-01T00:00:00.000000+00:00"),
    }
)


@baseline.get("/bare")
async def bare() -> Response:
    return Response(BARE, media_type="application/json")


@baseline.get("/textbook/applications/{id}", response_model=TextbookApplication)
def read_textbook_application(id: str) -> dict[str, Any]:
    return textbook_row(
        """
        SELECT id, name, comments,
               ARRAY(SELECT c.id FROM configurations AS c WHERE c.application_id = a.id ORDER BY c.id)
                   AS configuration_ids,
               version, created_at, updated_at
        FROM applications AS a
        WHERE id = %(id)s
        """,
        {"id": id},
    )


@baseline.get("/textbook/configurations/{id}", response_model=TextbookConfiguration)
def read_textbook_configuration(id: str) -> dict[str, Any]:
    return textbook_row(
        """
        SELECT id, application_id, name, comments, config, version, created_at, updated_at
        FROM configurations
        WHERE id = %(id)s
        """,
        {"id": id},
    )


@baseline.put("/textbook/configurations/{id}", response_model=TextbookConfiguration)
def update_textbook_configuration(id: str, changes: TextbookChanges) -> dict[str, Any]:
    return textbook_row(
        """
        UPDATE configurations
        SET name = coalesce(%(name)s, name), comments = coalesce(%(comments)s, comments),
            config = coalesce(%(config)s, config), version = version + 1, updated_at = now()
        WHERE id = %(id)s
        RETURNING id, application_id, name, comments, config, version, created_at, updated_at
        """,
        {
            "id": id,
            "name": changes.name,
            "comments": changes.comments,
            "config": changes.config and Json(changes.config),
        },
    )


def textbook_row(statement: str, params: dict[str, Any]) -> dict[str, Any]:
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


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The service, and in the same process, without its middleware, what it is measured against."""
    if scope["type"] == "lifespan":
        async with pooled(baseline):
            await service(scope, receive, send)
    elif scope["path"].startswith(("/bare", "/textbook")):
        await baseline(scope, receive, send)
    else:
        await service(scope, receive, send)


if __name__ == "__main__":
    main()
