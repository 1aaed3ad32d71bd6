"""What the statements read, what they wait for, and the rules that the schema keeps, whoever writes."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import httpx
import psycopg2
import pytest
from ulid import ULID

from svc import db, repo
from svc.conftest import run_sql
from svc.models import ApplicationFilter, ChangeFilter, ConfigurationFilter, VersionFilter
from svc.settings import Settings
from svc.test.process import until

# No row has it that outlives its transaction.
ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


# --- What the statements read ---


APPLICATION_ID = "01ARZ3NDEKTSV4RRFFQ69G0050"
CONFIGURATION_ID = "02ARZ3NDEKTSV4RRFFQ69G0500"


@pytest.fixture(scope="module")
def many(new_database) -> Iterator[str]:
    """The URL of a database of 300 applications with ten configurations each, of which PostgreSQL knows the statistics.

    Ten applications share the names of their configurations.
    """
    with new_database() as url:
        run_sql(
            url,
            """
            INSERT INTO applications (id, name)
            SELECT '01ARZ3NDEKTSV4RRFFQ69G' || lpad(n::text, 4, '0'), 'name ' || n FROM generate_series(0, 299) AS n;
            INSERT INTO configurations (id, application_id, name, config)
            SELECT '02ARZ3NDEKTSV4RRFFQ69G' || lpad(n::text, 4, '0'),
                   '01ARZ3NDEKTSV4RRFFQ69G' || lpad((n / 10)::text, 4, '0'),
                   'name ' || n % 100, jsonb_build_object('number', n)
            FROM generate_series(0, 2999) AS n;
            ANALYZE
            """,
        )
        yield url


def rows_read(plan: dict[str, Any]) -> int:
    """How many rows of tables a plan looked at."""
    rows = sum(map(rows_read, plan.get("Plans", [])))
    if "Relation Name" in plan:
        rows += plan["Actual Loops"] * (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0))
    return rows


@pytest.mark.parametrize(
    ("read", "rows"),
    [
        (lambda: repo.read_configuration(CONFIGURATION_ID), 1),
        (lambda: repo.read_configuration(("name 50", "name 0")), 2),
        (lambda: asyncio.gather(*(repo.read_configuration((f"name {n}", "name 0")) for n in range(0, 300, 10))), 60),
        (lambda: repo.read_etags({CONFIGURATION_ID}), 1),
        (lambda: anext(repo.list_applications(ApplicationFilter(limit=5, after=APPLICATION_ID))), 7 + 70),
        (lambda: anext(repo.list_configurations(ConfigurationFilter(limit=5, after=CONFIGURATION_ID))), 7),
        (lambda: anext(repo.list_configurations(ConfigurationFilter(application_id=APPLICATION_ID))), 10),
        (lambda: anext(repo.list_configurations(ConfigurationFilter(name="name 0"))), 30),
        (lambda: anext(repo.list_configurations(ConfigurationFilter(contains='{"number": 500}'))), 1),
        (lambda: anext(repo.list_configurations(ConfigurationFilter(contains='{"number": 500}', limit=5))), 1),
        (lambda: anext(repo.list_versions(CONFIGURATION_ID, VersionFilter())), 1),
        (lambda: anext(repo.list_changes(ChangeFilter(limit=5, before=500))), 7),
        (lambda: anext(repo.list_changes(ChangeFilter(limit=5, application_id=APPLICATION_ID))), 7),
    ],
)
def test_a_statement_reads_no_more_rows_than_it_needs(many, monkeypatch, read, rows):
    """A page looks at two rows beyond its limit: whether there is more, and whether that one has an equal."""
    for name, value in list(vars(db).items()):
        monkeypatch.setattr(db, name, value)  # the session's service gets it back
    plans = []
    fetch = db.fetch

    async def explain_and_fetch(name: str, statement: str, params: Any, *within: float, **queue: str) -> list[db.Row]:
        [row] = await fetch("explain", f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", params)
        plans.append(row["QUERY PLAN"][0]["Plan"])
        return await fetch(name, statement, params, *within, **queue)

    async def work() -> None:
        async with db.opened(Settings(database_url=many)):
            await read()

    monkeypatch.setattr(db, "fetch", explain_and_fetch)
    asyncio.run(work())
    assert sum(map(rows_read, plans)) == rows


# --- The schema keeps the rules, whoever writes ---

# What they say of versions and times does not count.
SAID = "99, '2000-01-01', '2000-01-01'"
ROWS = f"""
    INSERT INTO applications (id, name, version, created_at, updated_at) VALUES ('{ID}', 'n', {SAID});
    INSERT INTO configurations (id, application_id, name, config, version, created_at, updated_at)
    VALUES ('{ID}', '{ID}', 'n', '{{}}', {SAID});
"""
OTHER = "01ARZ3NDEKTSV4RRFFQ69G5FB0"
VERSION = "configuration_id, application_id, name, size, version, operation, actor, recorded_at"
RULES = [
    (f"INSERT INTO applications (id, name) VALUES ('8{ID[1:]}', 'x')", "ulid_check"),
    (f"INSERT INTO applications (id, name) VALUES ('{ID}\n', 'x')", "ulid_check"),
    (f"UPDATE applications SET id = '{OTHER}'", "the id of an application cannot be changed"),
    ("UPDATE applications SET name = E' \\t'", "not_blank_check"),
    ("UPDATE applications SET name = NULL", '"name" of relation "applications" violates not-null'),
    ("INSERT INTO configurations SELECT 'x', application_id, 'x', '', config FROM configurations", "ulid_check"),
    (f"UPDATE configurations SET id = '{OTHER}'", "the ids of a configuration cannot be changed"),
    (f"UPDATE configurations SET application_id = '{OTHER}'", "the ids of a configuration cannot be changed"),
    ("UPDATE configurations SET name = ''", "not_blank_check"),
    ("UPDATE configurations SET comments = repeat('x', 1025)", "too long for type character varying.1024"),
    ("UPDATE configurations SET config = '[]'", "document_check"),
    ("UPDATE configurations SET config = NULL", '"config" of relation "configurations" violates not-null'),
    ("SET config_service.actor = ' '; UPDATE configurations SET config = '{\"a\": 1}'", "not_blank_check"),
    (
        f"INSERT INTO configuration_versions ({VERSION}) SELECT '{ID}', '{ID}', 'n', 0, 9, 'update', 'me', now()",
        "config_check",
    ),
    ("UPDATE configuration_versions SET name = 'x' WHERE false", "append-only"),
    ("DELETE FROM configuration_versions", "append-only"),
    ("TRUNCATE configuration_versions", "append-only"),
    ("SELECT prune_configuration_versions('1 day', 1); DELETE FROM configuration_versions", "append-only"),
    ("SELECT prune_configuration_versions(NULL, 1)", "needs an age, and at least 1 to keep"),
    ("SELECT prune_configuration_versions('1 day', NULL)", "needs an age, and at least 1 to keep"),
    ("SELECT prune_configuration_versions('1 day', 0)", "needs an age, and at least 1 to keep"),
]


@pytest.mark.parametrize(("statement", "message"), RULES)
def test_a_rule_holds_for_psql_too(url, statement, message):
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute(ROWS)
        with pytest.raises(psycopg2.Error, match=message):
            cursor.execute(statement)


@pytest.mark.parametrize(("table", "version"), [("applications", 2), ("configurations", 1)])
def test_versions_and_times_follow_from_changes_whatever_a_writer_says(url, table, version):
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:

        def update(change: str) -> tuple:
            cursor.execute(
                f"""
                UPDATE {table} SET {change}, (version, created_at, updated_at) = ({SAID}) WHERE id = '{ID}'
                RETURNING version, created_at > now() - interval '1 minute', created_at, updated_at
                """
            )
            return cursor.fetchone()

        cursor.execute(ROWS)
        new = update("name = name")
        assert new[:2] == (version, True)
        changed = update("comments = 'said'")
        assert changed[:3] == (version + 1, True, new[2])
        assert changed[3] > new[3]
        assert update("comments = 'said'") == changed


# --- Writers that wait for each other ---


BLOCKED = "SELECT 1 FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
BY_ID, BY_NAME = "/configurations/{c}", "/applications/{name}/configurations/production"
GONE = "DELETE FROM applications WHERE id = '{a}'"
DELETED = "DELETE FROM configurations WHERE id = '{c}'"
RENAMED = "UPDATE configurations SET name = 'renamed' WHERE id = '{c}'"
ADDED = "INSERT INTO configurations SELECT '{new}', '{empty}', 'n', '', config FROM configurations WHERE id = '{c}'"


@pytest.mark.parametrize(
    ("method", "path", "meanwhile", "status"),
    [
        ("DELETE", BY_ID, GONE, 404),
        ("DELETE", BY_NAME, GONE, 404),
        ("PATCH", BY_ID, GONE, 404),
        ("PATCH", BY_NAME, GONE, 404),
        ("DELETE", BY_NAME, RENAMED, 404),
        ("PATCH", BY_NAME, RENAMED, 404),
        ("POST", f"{BY_ID}/versions/1/restore", GONE, 404),
        ("POST", f"{BY_ID}/versions/1/restore", DELETED, 200),
        ("DELETE", "/applications/{a}", DELETED, 204),
        ("DELETE", "/applications/{empty}", ADDED, 409),
    ],
)
def test_a_write_locks_the_application_first_and_goes_by_what_is_stored_then(
    client, url, application, configuration, method, path, meanwhile, status
):
    """Else two writes would wait for each other, or a deletion would not see a configuration that was just added."""
    ids = {"a": application["id"], "name": application["name"], "c": configuration["id"], "new": str(ULID())}
    ids["empty"] = client.post("/applications", json={"name": ids["new"]}).json()["id"]
    rename = {"headers": {"Content-Type": "application/merge-patch+json"}, "content": '{"name": "n"}'}
    with ThreadPoolExecutor(1) as threads, closing(psycopg2.connect(url)) as other, other.cursor() as cursor:
        cursor.execute("SELECT FROM applications WHERE id IN (%(a)s, %(empty)s) FOR UPDATE", ids)
        answer = threads.submit(client.request, method, path.format(**ids), **(rename if method == "PATCH" else {}))
        until(lambda: run_sql(url, BLOCKED, other.info.backend_pid))
        cursor.execute("SELECT FROM configurations WHERE id = %(c)s FOR UPDATE NOWAIT", ids)
        cursor.execute(meanwhile.format(**ids))
        other.commit()
        assert answer.result().status_code == status


def test_who_keeps_the_name_of_a_configuration_waits_for_nobody(client, url, application, configuration):
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT FROM applications WHERE id = %s FOR UPDATE", (application["id"],))
        assert client.put(f"/configurations/{configuration['id']}", json={"config": {}}).status_code == 200


def test_a_put_leaves_alone_what_gets_another_name_while_it_waits(client, url, application, configuration):
    path = BY_NAME.format(name=application["name"])
    with ThreadPoolExecutor(1) as threads, closing(psycopg2.connect(url)) as other, other.cursor() as cursor:
        cursor.execute("UPDATE configurations SET name = 'renamed' WHERE id = %s", (configuration["id"],))
        answer = threads.submit(client.put, path, json={"config": {}})
        until(lambda: run_sql(url, BLOCKED, other.info.backend_pid))
        other.commit()
        assert (answer.result().status_code, answer.result().json()["name"]) == (201, "production")
    assert client.get(f"/configurations/{configuration['id']}").json()["config"] == configuration["config"]


def test_what_is_inserted_again_while_its_deletion_commits_goes_on_counting(url, configuration):
    insert = """
        INSERT INTO configurations (id, application_id, name, config) VALUES (%s, %s, 'again', '{}') RETURNING version
    """
    ids = configuration["id"], configuration["application_id"]
    with ThreadPoolExecutor(1) as threads, closing(psycopg2.connect(url)) as other, other.cursor() as cursor:
        cursor.execute("DELETE FROM configurations WHERE id = %s", ids[:1])
        again = threads.submit(run_sql, url, insert, *ids)
        until(lambda: run_sql(url, BLOCKED, other.info.backend_pid))
        other.commit()
        assert again.result() == [{"version": 3}]


def test_what_a_put_of_an_application_shows_is_one_state_while_configurations_are_added(client, application):
    path = f"/applications/{application['id']}"
    shown: list[httpx.Response] = []
    done = threading.Event()

    def put() -> None:
        while not done.is_set() or len(shown) < 5:
            shown.append(client.put(path, json={"comments": str(ULID())}))

    def add(number: int) -> None:
        body = {"application_id": application["id"], "name": f"n{number}", "config": {}}
        assert client.post("/configurations", json=body).status_code == 201

    with ThreadPoolExecutor(8) as threads:
        putting = [threads.submit(put) for _ in range(3)]
        list(threads.map(add, range(60)))
        done.set()
        for each in putting:
            each.result()
    shown.sort(key=lambda response: response.json()["version"])
    for puts, response in enumerate(shown, start=1):
        assert response.json()["version"] == 1 + puts + len(response.json()["configuration_ids"])
    assert len({response.headers["etag"] for response in shown}) == len(shown)
    assert client.get(path).json()["version"] == 1 + 60 + len(shown)  # every change counts, none is lost
