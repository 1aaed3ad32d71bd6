import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg2
import pytest

from svc import auth
from svc.app import app
from svc.conftest import UNKNOWN, problem, run_sql, send
from svc.middleware_test import APPLICATIONS, ask, connect, read_all, request
from svc.test.process import gauge, service, until

INSERT = "INSERT INTO tokens (name, hash, role, application_id, expires_at) VALUES (%s, %s, %s, %s, %s)"


def new_token(url: str, role: str = "write", application_id: str | None = None, expires_at: str | None = None) -> str:
    token = f"cfs_{secrets.token_urlsafe(32)}"
    run_sql(url, INSERT, name_of(token), sha256(token.encode()).hexdigest(), role, application_id, expires_at)
    return token


def name_of(token: str) -> str:
    return sha256(token.encode()).hexdigest()[:16]


def revoke(url: str, token: str) -> None:
    run_sql(url, "DELETE FROM tokens WHERE name = %s", name_of(token))


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


OPEN = {"/", "/docs", "/openapi.json", "/health", "/health/live"}
# 401, 403, or None for whoever is let in: to read and to write anything, and below the application `mine`.
HOLDERS = {
    "nobody": (401, 401, 401, 401),
    "a stranger": (401, 401, 401, 401),
    "an expired token": (401, 401, 401, 401),
    "a revoked token": (401, 401, 401, 401),
    "a reader": (None, 403, None, 403),
    "a writer": (None, None, None, None),
    "a reader of the application": (403, 403, None, 403),
    "a writer of the application": (403, 403, None, None),
    "a writer of another application": (403, 403, 403, 403),
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


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_door_opens_to_those_alone_whom_it_is_for(guarded, tokens, holder):
    errors = {None: "", 401: ', error="invalid_token"', 403: ', error="insufficient_scope"'}
    for method, path in doors():
        response = guarded.client.request(method, path, headers={"Authorization": "", **bearer(tokens[holder])})
        below = path.startswith("/api/v1/applications/mine/configurations")
        status = HOLDERS[holder][2 * below + (method not in ("GET", "HEAD"))]
        if status is None or path in OPEN:
            assert response.status_code not in (401, 403), (method, path)
            continue
        assert response.status_code == status, (method, path)
        error = "" if holder == "nobody" else errors[status]
        assert response.headers["www-authenticate"] == f'Bearer realm="config-service"{error}'
        assert method == "HEAD" or problem(response, status)


TRICKS = [
    *("/api/v1/../api/v1/changes", "//api/v1/changes", "/API/V1/changes", "/api/v1/changes/", "/health/", "/docs/"),
    *("/health/../api/v1/changes", "/api/v1/%63hanges", "/api/v1%2Fchanges", "/api/v1%252Fchanges", "/./metrics"),
    *("/health%2F..%2Fapi%2Fv1%2Fchanges", "/health;/../metrics", "/docs/oauth2-redirect", "/redoc", "/metrics%00"),
    *("/%2e%2e/metrics", "/metrics?/health", "http://localhost/api/v1/changes", "http://localhost/metrics"),
    *("/x/api/v1/applications/mine/configurations/c", "/api/v1/applications/%256Dine/configurations/c"),
    *("/api/v1/applications/other/configurations/c", "/api/v1/applications/mine/../other/configurations/c"),
    *("/api/v1/applications/MINE/configurations/c", "/api/v1/applications/mine/configurations%2Fc/../../other"),
    *("/api/v1/applications//mine/configurations/c", "/api/v1/applications/mine%2Fconfigurations/configurations/c"),
    *("/api/v1/applications/x/applications/mine/configurations/c", "/applications/mine/configurations/c"),
    "/api/v1/applications/mine%2F..%2Fother",
]


def raw_status(base: str, target: str, *tokens: str) -> int:
    """The status of a request whose target and tokens are sent as they are."""
    with connect(base) as connection:
        headers = [b"Authorization: " + token.encode() for token in tokens]
        return ask(connection, request("GET", target, None, *headers)).status_code


@pytest.mark.parametrize("target", TRICKS)
def test_no_spelling_of_a_path_opens_a_door(guarded, tokens, target):
    assert raw_status(guarded.base, target) in (400, 401)
    assert raw_status(guarded.base, target, f"Bearer {tokens['a writer of the application']}") in (400, 403)


def test_what_looks_like_another_path_below_an_application_is_a_name_there(guarded, tokens):
    target = "/api/v1/applications/mine/configurations/../../other/configurations/c"
    assert raw_status(guarded.base, target, f"Bearer {tokens['a writer of the application']}") == 404
    assert raw_status(guarded.base, target) == 401


def test_one_bearer_token_is_taken_its_scheme_in_any_case_and_nothing_else(guarded):
    token = f"bEARER {guarded.admin}"
    assert raw_status(guarded.base, "/api/v1/changes", token) == 200
    for refused in ([""], ["Basic eDp5"], ["Bearer é"], [token, token]):
        assert raw_status(guarded.base, "/api/v1/changes", *refused) == 401


def test_a_body_is_not_read_before_the_token_is_checked(guarded):
    with connect(guarded.base) as connection:
        assert ask(connection, request("POST", APPLICATIONS, None, b"Content-Length: 9000000")).status_code == 401


@pytest.mark.slow
def test_a_rename_and_a_revocation_count_within_a_second_and_end_a_long_poll(guarded):
    owner = guarded.client.post("/api/v1/applications", json={"name": "before"}).json()
    renamed, revoked = new_token(guarded.url, "write", owner["id"]), new_token(guarded.url, "read")
    old, new = (f"{guarded.base}/api/v1/applications/{name}/configurations" for name in ("before", "after"))
    watched = f"{guarded.base}/api/v1/applications/mine/configurations/watched"
    etag = guarded.client.put(watched, json={"config": {}}).headers["etag"]
    headers = {**bearer(revoked), "If-None-Match": etag}
    assert httpx.get(old, headers=bearer(renamed)).status_code == 200
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(httpx.get, watched, params={"wait": 30}, headers=headers, timeout=40)
        until(lambda: gauge(guarded.client.get("/metrics").text, "config_service_waiters") == 1)
        revoke(guarded.url, revoked)
        guarded.client.put(f"/api/v1/applications/{owner['id']}", json={"name": "after"})
        guarded.client.post("/api/v1/applications", json={"name": "before"})
        started = time.monotonic()
        until(lambda: httpx.get(old, headers=bearer(renamed)).status_code == 403)
        assert waiting.result().status_code == 401
        assert time.monotonic() - started < 1.3
    assert httpx.get(new, headers=bearer(renamed)).status_code == 200


@pytest.mark.slow
def test_many_unknown_tokens_cost_one_statement_a_second(guarded):
    def count_statements() -> int:
        guarded.log.seek(0)
        return guarded.log.read().count("read_tokens")

    def ask_twice(number: int) -> set[int]:
        return {raw_status(guarded.base, "/api/v1/changes", f"Bearer {number}-{turn}") for turn in range(2)}

    before, started = count_statements(), time.monotonic()
    with ThreadPoolExecutor(100) as threads:
        assert set.union(*threads.map(ask_twice, range(100))) == {401}
    assert count_statements() - before <= time.monotonic() - started + 2


# --- What stands in the log and in history ---


@pytest.mark.slow
def test_writes_and_refusals_are_one_line_each_with_the_actor_and_no_token(guarded):
    reader = new_token(guarded.url, "read")
    path = f"/api/v1/applications/mine/configurations/{secrets.token_hex(8)}%0Aforged"
    put = request("PUT", path, b'{"config": {}}', f"Authorization: Bearer {guarded.admin}".encode())
    read_all(guarded.base, put + request("PUT", path, b"", b"Connection: close"))  # the second without a token
    guarded.client.get(path)
    httpx.put(guarded.base + path, headers=bearer(reader), json={"config": {}})
    httpx.get(guarded.base + path, headers=bearer("cfs_unknown"))
    guarded.log.seek(0)
    log = guarded.log.read()
    shape = rf"^\S+ \S+ (\w+) svc\.middleware: (\S+) (\w+) {path} (\d+) \d+\.\d ms$"
    assert re.findall(shape, log, re.MULTILINE) == [
        ("INFO", f"token:{name_of(guarded.admin)}", "PUT", "201"),
        ("INFO", "anonymous", "PUT", "401"),
        ("DEBUG", f"token:{name_of(guarded.admin)}", "GET", "200"),
        ("INFO", f"token:{name_of(reader)}", "PUT", "403"),
        ("INFO", "anonymous", "GET", "401"),
    ]
    assert "cfs_" not in log


def test_every_kind_of_write_is_recorded_with_who_made_it(guarded):
    name, token = secrets.token_hex(8), new_token(guarded.url)
    path = f"/applications/{name}/configurations/c"
    with httpx.Client(base_url=f"{guarded.base}/api/v1", headers=bearer(token)) as client:
        owner = send(client, "POST", "/applications", {"name": name}).json()["id"]
        body = {"application_id": owner, "name": "c", "config": {}}
        by_id = f"/configurations/{send(client, 'POST', '/configurations', body).json()['id']}"
        for method, to, body in (
            ("PUT", by_id, {"config": {"a": 1}}),
            ("PATCH", by_id, {"config": {"b": 1}}),
            ("PUT", path, {"config": {"c": 1}}),
            ("PATCH", path, {"comments": "x"}),
            ("POST", f"{by_id}/versions/1/restore", None),
            ("DELETE", path, None),
            ("POST", f"{by_id}/versions/1/restore", None),
            ("DELETE", by_id, None),
            ("PUT", path, {"config": {}}),
        ):
            assert send(client, method, to, body).is_success
        run_sql(guarded.url, "UPDATE configurations SET comments = 'by hand' WHERE application_id = %s", owner)
        client.delete(f"/applications/{owner}?cascade=true")
        rows = client.get("/changes", params={"application_id": owner}).json()
    user = psycopg2.extensions.parse_dsn(guarded.url)["user"]
    found = [(row["operation"], row["actor"]) for row in reversed(rows)]
    operations = ["create", *["update"] * 5, "delete", "create", "delete", "create"]
    mine = f"token:{name_of(token)}"
    assert found == [*((each, mine) for each in operations), ("update", f"database:{user}"), ("delete", mine)]


@pytest.mark.slow
def test_no_version_carries_the_name_of_another_under_load(new_database):
    with new_database() as url, service(url, auth="on", db_max_connections=4) as (_, base):
        tokens = [new_token(url) for _ in range(8)]
        with httpx.Client(base_url=base, headers=bearer(tokens[0])) as client:
            client.post("/api/v1/applications", json={"name": "a"})

        def write(token: str) -> None:
            name = name_of(token)
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
        until_when, refused, admitted = time.monotonic() + 4, [], []

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


@pytest.mark.slow
def test_the_last_tokens_count_while_the_database_is_away_and_without_any_it_is_503(new_database, postgres):
    with new_database() as url, service(url, auth="on") as (_, base):
        good, path = new_token(url), "/nothing"
        assert httpx.get(base + path, headers=bearer(good)).status_code == 404
        name = psycopg2.extensions.parse_dsn(url)["dbname"]
        run_sql(postgres, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        run_sql(postgres, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        with service(url, auth="on") as (_, other):
            until(lambda: httpx.get(f"{base}/health").status_code == 503)
            end = time.monotonic() + auth.READ_EVERY * 1.2  # so that the tokens are read again, in vain
            until(lambda: time.monotonic() > end or httpx.get(base + path, headers=bearer(good)).status_code != 404)
            assert httpx.get(base + path, headers=bearer(good)).status_code == 404
            assert httpx.get(base + path, headers=bearer("cfs_x")).status_code == 503
            never_read = httpx.get(other + path, headers=bearer(good))
        assert (never_read.status_code, never_read.headers["retry-after"]) == (503, "1")


@pytest.mark.slow
def test_tokens_come_and_go_also_while_every_connection_is_busy_and_the_queue_is_full(new_database):
    with (
        new_database() as url,
        service(url, auth="on", db_max_connections=2, db_queue_limit=1) as (_, base),
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
def test_all_who_wait_for_the_tokens_share_one_reading_however_long_it_takes(new_database):
    with new_database() as url, service(url, auth="on") as (_, base), closing(psycopg2.connect(url)) as other:
        good = new_token(url)

        def ask_at_once(number: int) -> list[Future[httpx.Response]]:
            return [threads.submit(httpx.get, f"{base}/x", headers=bearer(good), timeout=30) for _ in range(number)]

        def ask_once_due(number: int) -> list[Future[httpx.Response]]:
            due = time.monotonic() + auth.READ_EVERY
            until(lambda: time.monotonic() > due)
            return ask_at_once(number)

        with ThreadPoolExecutor(9) as threads:
            other.cursor().execute("LOCK TABLE tokens")
            assert {each.result().status_code for each in ask_at_once(8)} == {503}  # they were never read
            other.rollback()
            assert ask_at_once(1)[0].result().status_code == 404
            other.cursor().execute("LOCK TABLE tokens")
            asked = [*ask_once_due(1), *ask_once_due(8)]
            answers = [each.result() for each in asked]
    assert {each.status_code for each in answers} == {404}
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
    stored = {"hash": sha256(made.encode()).hexdigest(), "role": "read", "application_id": application["id"], "days": 3}
    assert stored.items() <= row.items()
    assert made not in str(row)
    listed = token("list")
    assert f"{name}  read  {application['name']}" in listed
    assert made not in listed
    token("revoke", name)
    assert sql("SELECT FROM tokens WHERE name = %s", name) == []


def test_a_mistake_is_one_line_that_repeats_no_secret_and_makes_nothing(token, capsys, sql, name):
    token("new", name, "--role", "write")
    for arguments in (
        ("new", name, "--role", "write"),
        ("new", f"{name}-2", "--role", "write", "--application", "nowhere"),
        ("new", "with blank", "--role", "write"),
        ("new", "cfs_hunter2", "--role", "write"),
        ("new", f"{name}-3", "--role", "admin"),
        ("new", f"{name}-4"),
        ("revoke", "nobody"),
        ("revoke", "nobody", "hunter2"),
        ("list", "--database-url", "postgresql://u:hunter2@h/d"),
        ("hunter2",),
        (),
    ):
        with pytest.raises(SystemExit) as stopped:
            token(*arguments)
        said = capsys.readouterr().err or f"{stopped.value}\n"
        assert (said.count("\n"), "hunter2" in said) == (1, False)
    assert [row["name"] for row in sql("SELECT name FROM tokens WHERE name LIKE %s", f"{name}%")] == [name]
