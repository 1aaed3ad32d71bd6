import asyncio
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg2
import pytest

from svc import auth
from svc.app import app
from svc.conftest import run_sql
from svc.test.process import gauge, service, until

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
READ_TOKEN = "INSERT INTO tokens (name, hash, role, application_id, expires_at) VALUES (%s, %s, %s, %s, %s)"


def new_token(url: str, role: str = "write", application_id: str | None = None, expires_at: str | None = None) -> str:
    token = f"cfs_{secrets.token_urlsafe(32)}"
    hash = auth.sha256(token.encode()).hexdigest()
    run_sql(url, READ_TOKEN, f"token-{secrets.token_hex(8)}", hash, role, application_id, expires_at)
    return token


def revoke(url: str, token: str) -> None:
    run_sql(url, "DELETE FROM tokens WHERE hash = %s", auth.sha256(token.encode()).hexdigest())


def name_of(url: str, token: str) -> str:
    [row] = run_sql(url, "SELECT name FROM tokens WHERE hash = %s", auth.sha256(token.encode()).hexdigest())
    return row["name"]


def bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


@pytest.fixture(scope="module")
def guarded(new_database: Callable[[], Any]) -> Iterator[SimpleNamespace]:
    """The service with AUTH=on, its log, and the two applications `mine` and `other`, each with a configuration."""
    with (
        new_database() as url,
        tempfile.TemporaryFile("w+") as log,
        service(url, output=log, auth="on", debug=True) as (_, base),
    ):
        admin = new_token(url)
        with httpx.Client(base_url=base, headers=bearer(admin), timeout=30) as client:
            ids = {}
            for name in ("mine", "other"):
                ids[name] = client.post("/api/v1/applications", json={"name": name}).json()["id"]
                made = client.put(f"/api/v1/applications/{name}/configurations/c", json={"config": {}})
                assert made.status_code == 201
            yield SimpleNamespace(url=url, base=base, log=log, ids=ids, admin=admin, client=client)


# --- Who is let in ---


def doors() -> list[tuple[str, str]]:
    """Every method and path of the application, with what exists in the place of parameters."""
    values = {"id": UNKNOWN, "version": "1", "application_name": "mine", "name:path": "c"}
    return sorted(
        (method, re.sub(r"{([^}]*)}", lambda found: values[found[1]], route.path))
        for route in app.routes
        for method in route.methods
    )


HOLDERS = {
    "nobody": (401, 401, 401),
    "a stranger": (401, 401, 401),
    "an expired token": (401, 401, 401),
    "a revoked token": (401, 401, 401),
    "a reader": (None, 403, None),
    "a writer": (None, None, None),
    "a reader of the application": (403, 403, None),
    "a writer of the application": (403, 403, None),
    "a writer of another application": (403, 403, 403),
}


@pytest.fixture(scope="module")
def tokens(guarded: SimpleNamespace) -> dict[str, str | None]:
    made = {
        "nobody": None,
        "a stranger": "cfs_" + "x" * 43,
        "an expired token": new_token(guarded.url, expires_at="2020-01-01"),
        "a revoked token": new_token(guarded.url),
        "a reader": new_token(guarded.url, "read"),
        "a writer": new_token(guarded.url),
        "a reader of the application": new_token(guarded.url, "read", guarded.ids["mine"]),
        "a writer of the application": new_token(guarded.url, "write", guarded.ids["mine"]),
        "a writer of another application": new_token(guarded.url, "write", guarded.ids["other"]),
    }
    revoke(guarded.url, made["a revoked token"])
    return made


def expected(holder: str, method: str, path: str) -> int | None:
    """401, 403, or None for whoever is let in."""
    if path in auth.OPEN:
        return None
    reads, below = method in ("GET", "HEAD"), path.startswith("/api/v1/applications/mine/configurations")
    read, write, own = HOLDERS[holder]
    if below and holder.endswith(" of the application"):
        return own if reads or "writer" in holder else 403
    return read if reads else write


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_door_opens_to_those_alone_whom_it_is_for(guarded, tokens, holder):
    found, wanted = {}, {}
    for method, path in doors():
        response = guarded.client.request(method, path, headers={"Authorization": "", **bearer(tokens[holder])})
        refused = response.status_code if response.status_code in (401, 403) else None
        found[method, path] = refused, response.headers.get("www-authenticate")
        challenge = None
        if status := expected(holder, method, path):
            error = {401: ', error="invalid_token"', 403: ', error="insufficient_scope"'}[status]
            challenge = 'Bearer realm="config-service"' + ("" if holder == "nobody" else error)
            if method != "HEAD":
                assert response.headers["content-type"] == "application/problem+json"
                assert response.json()["status"] == status
        wanted[method, path] = expected(holder, method, path), challenge
    assert found == wanted
    assert len(found) > 25


TRICKS = [
    *(
        "/api/v1/../api/v1/changes",
        "//api/v1/changes",
        "/API/V1/changes",
        "/api/v1/changes/",
        "/health/../api/v1/changes",
    ),
    *("/api/v1/%63hanges", "/api/v1%2Fchanges", "/api/v1%252Fchanges", "/health%2F..%2Fapi%2Fv1%2Fchanges", "/health/"),
    *("/health;/../metrics", "/docs/oauth2-redirect", "/redoc", "/%2e%2e/metrics", "/metrics%00", "/metrics?/health"),
    *(
        "/health?x=/../../metrics",
        "http://localhost/api/v1/changes",
        "http://localhost/metrics",
        "/./metrics",
        "/docs/",
    ),
    *(
        "/api/v1/applications/mine/configurations/../../other/configurations/c",
        "/api/v1/applications/mine%2F..%2Fother",
    ),
    *("/api/v1/applications/other/configurations/c", "/api/v1/applications/mine/../other/configurations/c"),
    *("/api/v1/applications/MINE/configurations/c", "/api/v1/applications/mine/configurations%2Fc/../../other"),
    *("/api/v1/applications//mine/configurations/c", "/api/v1/applications/mine%2Fconfigurations/configurations/c"),
    *("/x/api/v1/applications/mine/configurations/c", "/api/v1/applications/%256Dine/configurations/c"),
    *("/api/v1/applications/x/applications/mine/configurations/c", "/applications/mine/configurations/c"),
]


async def raw_status(base: str, target: str, token: str | None, method: str = "GET") -> int:
    host, port = base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "".join(f"{name}: {value}\r\n" for name, value in bearer(token).items())
    writer.write(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{head}Connection: close\r\n\r\n".encode())
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


@pytest.mark.parametrize("target", TRICKS)
def test_no_spelling_of_a_path_opens_a_door(guarded, tokens, target):
    assert asyncio.run(raw_status(guarded.base, target, None)) in (400, 401) or target in ("/health?x=/../../metrics",)
    limited = asyncio.run(raw_status(guarded.base, target, tokens["a writer of the application"]))
    below = "/api/v1/applications/mine/configurations/"
    assert limited in (400, 403) or target.startswith((below, "/health?"))
    if target.startswith(below):
        assert limited == 404  # a name like any other


@pytest.mark.parametrize("value", ["", "Bearer", "Basic eDp5", "Token x", "Bearer é"])
def test_another_header_than_a_bearer_token_is_401(guarded, value):
    response = httpx.get(f"{guarded.base}/api/v1/changes", headers={"Authorization": value.encode()})
    assert response.status_code == 401


def test_the_scheme_is_written_in_any_case_and_a_second_header_is_refused(guarded):
    path = f"{guarded.base}/api/v1/changes"
    assert httpx.get(path, headers={"Authorization": f"bEARER {guarded.admin}"}).status_code == 200
    twice = [("Authorization", f"Bearer {guarded.admin}")] * 2
    assert httpx.get(path, headers=twice).status_code == 401


def test_a_body_is_not_read_before_the_token_is_checked(guarded):
    async def status() -> bytes:
        host, port = guarded.base.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /api/v1/applications HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n")
        line = await reader.readline()
        writer.close()
        return line

    assert b" 401 " in asyncio.run(status())


def test_a_token_follows_its_application_through_a_rename(guarded):
    client = guarded.client
    first = client.post("/api/v1/applications", json={"name": "before"}).json()
    token = new_token(guarded.url, "write", first["id"])
    old, new = (f"{guarded.base}/api/v1/applications/{name}/configurations" for name in ("before", "after"))
    assert httpx.get(old, headers=bearer(token)).status_code == 200
    client.put(f"/api/v1/applications/{first['id']}", json={"name": "after"})
    client.post("/api/v1/applications", json={"name": "before"})
    until(lambda: httpx.get(old, headers=bearer(token)).status_code == 403, 1.3)
    assert httpx.get(new, headers=bearer(token)).status_code == 200


def test_a_long_poll_ends_with_401_within_a_second_of_the_revocation(guarded):
    token = new_token(guarded.url, "read")
    path = f"{guarded.base}/api/v1/applications/mine/configurations/watched"
    etag = guarded.client.put(path, json={"config": {}}).headers["etag"]
    with ThreadPoolExecutor(1) as thread:
        headers = {**bearer(token), "If-None-Match": etag}
        waiting = thread.submit(httpx.get, path, params={"wait": 30}, headers=headers, timeout=40)
        until(lambda: gauge(guarded.client.get("/metrics").text, "config_service_waiters") == 1)
        revoke(guarded.url, token)
        started = time.monotonic()
        assert waiting.result().status_code == 401
        assert time.monotonic() - started < 1.3


def test_many_unknown_tokens_cost_one_statement_a_second(guarded):
    def statements() -> int:
        guarded.log.seek(0)
        return guarded.log.read().count("read_tokens")

    async def ask(times: int) -> set[int]:
        return {await raw_status(guarded.base, "/api/v1/changes", f"cfs_{secrets.token_hex(9)}") for _ in range(times)}

    async def all_at_once() -> list[set[int]]:
        return await asyncio.gather(*(ask(2) for _ in range(500)))

    before, started = statements(), time.monotonic()
    assert set.union(*asyncio.run(all_at_once())) == {401}
    assert statements() - before <= time.monotonic() - started + 2


# --- What stands in the log and in history ---


def test_writes_and_refusals_are_one_line_each_with_the_actor_and_no_token(guarded):
    reader = new_token(guarded.url, "read")
    path = f"/api/v1/applications/mine/configurations/{secrets.token_hex(8)}%0Aforged"
    guarded.client.put(path, json={"config": {}})
    httpx.put(guarded.base + path, headers=bearer(reader), json={"config": {}})
    httpx.get(guarded.base + path, headers=bearer("cfs_unknown"))
    guarded.log.seek(0)
    lines = [line for line in guarded.log.read().split("\n") if path in line]
    shape = r"\S+ \S+ INFO svc\.middleware: (\S+) (\S+) \S+ (\d+) \d+\.\d ms"
    found = [re.fullmatch(shape, line).groups() for line in lines]
    assert found == [
        (f"token:{name_of(guarded.url, guarded.admin)}", "PUT", "201"),
        (f"token:{name_of(guarded.url, reader)}", "PUT", "403"),
        ("anonymous", "GET", "401"),
    ]
    guarded.log.seek(0)
    assert "cfs_" not in guarded.log.read()


def test_every_kind_of_write_is_recorded_with_who_made_it(guarded):
    name, token = secrets.token_hex(8), new_token(guarded.url)
    mine, patch = f"token:{name_of(guarded.url, token)}", {"Content-Type": "application/merge-patch+json"}
    with httpx.Client(base_url=f"{guarded.base}/api/v1", headers=bearer(token)) as client:
        application = client.post("/applications", json={"name": name}).json()
        body = {"application_id": application["id"], "name": "c", "config": {}}
        one = client.post("/configurations", json=body).json()["id"]
        client.put(f"/configurations/{one}", json={"config": {"a": 1}})
        client.patch(f"/configurations/{one}", content='{"config": {"b": 1}}', headers=patch)
        client.put(f"/applications/{name}/configurations/c", json={"config": {"c": 1}})
        client.patch(f"/applications/{name}/configurations/c", content='{"comments": "x"}', headers=patch)
        client.post(f"/configurations/{one}/versions/1/restore")
        client.delete(f"/applications/{name}/configurations/c")
        client.post(f"/configurations/{one}/versions/1/restore")
        client.delete(f"/configurations/{one}")
        client.put(f"/applications/{name}/configurations/d", json={"config": {}})
        run_sql(
            guarded.url, "UPDATE configurations SET comments = 'by hand' WHERE application_id = %s", application["id"]
        )
        client.delete(f"/applications/{application['id']}?cascade=true")
        rows = client.get("/changes", params={"application_id": application["id"]}).json()
    user = psycopg2.extensions.parse_dsn(guarded.url)["user"]
    found = [(row["operation"], row["actor"]) for row in reversed(rows)]
    operations = ["create", *["update"] * 5, "delete", "create", "delete", "create"]
    assert found == [*((each, mine) for each in operations), ("update", f"database:{user}"), ("delete", mine)]


@pytest.mark.slow
def test_no_version_carries_the_name_of_another_under_load(new_database):
    with new_database() as url, service(url, auth="on", db_max_connections=4) as (_, base):
        tokens = [new_token(url) for _ in range(8)]
        with httpx.Client(base_url=base, headers=bearer(tokens[0])) as client:
            client.post("/api/v1/applications", json={"name": "a"})

        def write(token: str) -> None:
            name = name_of(url, token)
            with httpx.Client(base_url=f"{base}/api/v1/applications/a", headers=bearer(token), timeout=30) as client:
                for number in range(200):
                    made = client.put(f"/configurations/{number % 10}", json={"config": {"by": name, "n": number}})
                    assert made.status_code in (200, 201)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(write, tokens))
        found = run_sql(url, "SELECT actor, config->>'by' AS by FROM configuration_versions")
    assert len(found) == 1600
    assert [row for row in found if row["actor"] != f"token:{row['by']}"] == []


@pytest.mark.slow
def test_tokens_come_and_go_while_others_read(new_database):
    with new_database() as url, service(url, auth="on", workers=2) as (_, base):
        until_when, refused, admitted = time.monotonic() + 8, [], []

        def come_and_go(_: int) -> None:
            with httpx.Client(base_url=base, verify=False, timeout=30) as client:
                while time.monotonic() < until_when:
                    token = new_token(url, "read")
                    first = [client.get("/api/v1/changes", headers=bearer(token)) for _ in range(2)]
                    refused.extend(each.text for each in first if each.status_code != 200)
                    revoke(url, token)
                    end = began = time.monotonic()
                    while client.get("/api/v1/changes", headers=bearer(token)).status_code == 200:
                        admitted.append(began - end)
                        began = time.monotonic()

        with ThreadPoolExecutor(32) as threads:
            list(threads.map(come_and_go, range(32)))
    assert refused == []
    assert len(admitted) > 100
    assert max(admitted) < 1.3


def test_the_last_tokens_count_while_the_database_is_away_and_without_any_it_is_503(new_database, postgres):
    with new_database() as url, service(url, auth="on") as (_, base):
        good, path = new_token(url), "/nothing"
        assert httpx.get(base + path, headers=bearer(good)).status_code == 404
        name = psycopg2.extensions.parse_dsn(url)["dbname"]
        run_sql(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        run_sql(postgres, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        with service(url, auth="on") as (_, other):
            until(lambda: httpx.get(f"{base}/health").status_code == 503)
            end = time.monotonic() + auth.READ_EVERY * 2  # so that the tokens are read again, in vain
            until(lambda: time.monotonic() > end or httpx.get(base + path, headers=bearer(good)).status_code != 404)
            assert httpx.get(base + path, headers=bearer(good)).status_code == 404
            assert httpx.get(base + path, headers=bearer("cfs_x")).status_code == 503
            never_read = httpx.get(other + path, headers=bearer(good))
        assert (never_read.status_code, never_read.headers["retry-after"]) == (503, "1")


def test_tokens_come_and_go_also_while_every_connection_is_busy_and_the_queue_is_full(new_database):
    with (
        new_database() as url,
        service(url, auth="on", db_max_connections=1, db_queue_limit=1) as (_, base),
        httpx.Client(base_url=base, headers=bearer(old := new_token(url))) as client,
        closing(psycopg2.connect(url)) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        path = f"/api/v1/applications/{client.post('/api/v1/applications', json={'name': 'a'}).json()['id']}"
        other.cursor().execute("SELECT FROM applications FOR UPDATE")
        busy = threads.submit(client.put, path, json={"name": "b"})
        until(lambda: run_sql(url, "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))
        assert httpx.get(f"{base}/nothing", headers=bearer(new_token(url))).status_code == 404
        revoke(url, old)
        until(lambda: httpx.get(f"{base}/nothing", headers=bearer(old)).status_code == 401)
        assert not busy.done()
        other.rollback()
        assert busy.result().status_code == 200


@pytest.mark.slow
def test_who_asks_while_the_tokens_are_read_for_the_first_time_waits_for_them(new_database):
    with new_database() as url, service(url, auth="on") as (_, base), closing(psycopg2.connect(url)) as other:
        good = new_token(url)
        other.cursor().execute("LOCK TABLE tokens")
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(httpx.get, f"{base}/nothing", headers=bearer(good)) for _ in range(8)]
        assert [each.result().status_code for each in asked] == [503] * 8
        other.rollback()
        assert httpx.get(f"{base}/nothing", headers=bearer(good)).status_code == 404


@pytest.mark.slow
def test_all_who_wait_for_the_tokens_share_one_reading_however_long_it_takes(new_database):
    def ask_once_due(base: str, token: str, number: int) -> list[Future[httpx.Response]]:
        due = time.monotonic() + auth.READ_EVERY
        until(lambda: time.monotonic() > due)
        return [clients.submit(httpx.get, f"{base}/nothing", headers=bearer(token), timeout=30) for _ in range(number)]

    with new_database() as url, service(url, auth="on") as (_, base), closing(psycopg2.connect(url)) as other:
        good = new_token(url)
        assert httpx.get(f"{base}/nothing", headers=bearer(good)).status_code == 404
        other.cursor().execute("LOCK TABLE tokens")
        with ThreadPoolExecutor(9) as clients:
            asked = [*ask_once_due(base, good, 1), *ask_once_due(base, good, 8)]
        answers = [each.result() for each in asked]
    assert [each.status_code for each in answers] == [404] * 9
    # The first reading fails after the 2 s of DB_LOCK_TIMEOUT, and a second one.
    assert max(each.elapsed.total_seconds() for each in answers) < 5


# --- The command line ---


@pytest.fixture
def token(
    url: str, base_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Callable[..., str]:
    """Runs the command, and returns what it prints."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["token", *arguments])
        auth.main()
        return capsys.readouterr().out

    return run


def test_a_token_is_printed_once_and_its_hash_is_stored_alone(token, sql, application, name):
    made = token("new", name, "--role", "read", "--application", application["name"], "--expires", "3").strip()
    assert re.fullmatch(r"cfs_[A-Za-z0-9_-]{43}", made)
    [row] = sql("SELECT *, expires_at::date - now()::date AS days FROM tokens WHERE name = %s", name)
    assert (row["hash"], row["role"], row["application_id"], row["days"]) == (
        auth.sha256(made.encode()).hexdigest(),
        "read",
        application["id"],
        3,
    )
    assert made not in str(row)
    listed = token("list")
    assert f"{name}  read  {application['name']}" in listed
    assert made not in listed
    token("revoke", name)
    assert sql("SELECT FROM tokens WHERE name = %s", name) == []


def test_a_mistake_is_one_line_and_makes_nothing(token, sql, name):
    token("new", name, "--role", "write")
    for arguments in (
        ("new", name, "--role", "write"),
        ("new", f"{name}-2", "--role", "write", "--application", "nowhere"),
        ("new", "with blank", "--role", "write"),
        ("new", f"{name}-3", "--role", "admin"),
        ("new", f"{name}-4"),
        ("revoke", "nobody"),
        (),
    ):
        with pytest.raises(SystemExit) as stopped:
            token(*arguments)
        assert "\n" not in str(stopped.value)
    assert [row["name"] for row in sql("SELECT name FROM tokens WHERE name LIKE %s", f"{name}%")] == [name]


def test_wrong_usage_repeats_no_value_which_may_be_a_secret(token, capsys):
    for arguments in (
        ("list", "--database-url", "postgresql://u:hunter2@h/d"),
        ("hunter2",),
        ("revoke", "a", "hunter2"),
    ):
        with pytest.raises(SystemExit):
            token(*arguments)
    assert "hunter2" not in capsys.readouterr().err
