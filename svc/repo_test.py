import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg2
import pytest
from pydantic import TypeAdapter
from ulid import ULID

from svc import db, repo
from svc.conftest import run_sql
from svc.models import (
    Application,
    ApplicationCreate,
    ApplicationUpdate,
    Configuration,
    ConfigurationCreate,
    ConfigurationUpdate,
)
from svc.settings import Settings
from svc.test.process import service, until

UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def new_id() -> str:
    return str(ULID())


# --- The statements ---


@pytest.fixture
def run(url, monkeypatch):
    """Runs a coroutine with a pool of its own, apart from that of the session's service, should it run."""
    for each in ("_settings", "_url", "_pool", "_executor"):
        monkeypatch.setattr(db, each, getattr(db, each, None), raising=False)

    def run(work: Any, url: str = url) -> Any:
        async def opened() -> Any:
            async with db.opened(Settings(database_url=url)):
                return await work

        return asyncio.run(opened())

    return run


def test_every_statement_answers_with_id_version_and_the_whole_json(run, name):
    async def work() -> None:
        made = await repo.create_application(ApplicationCreate(name=name, comments="said"))
        shown = Application.model_validate_json(made["json"])
        assert set(made) == {"id", "version", "json"}
        assert (made["id"], made["version"]) == (str(shown.id), shown.version) == (made["id"], 1)
        assert (shown.name, shown.comments, shown.configuration_ids) == (name, "said", [])
        assert await repo.read_application(made["id"]) == made

        new = ConfigurationCreate(application_id=made["id"], name="n", config={"b": 1, "a": [1.0, None]})
        configuration = await repo.create_configuration(new)
        shown = Configuration.model_validate_json(configuration["json"])
        assert (configuration["id"], configuration["version"]) == (str(shown.id), 1)
        assert (str(shown.application_id), shown.config, shown.comments) == (made["id"], new_config, None)
        assert await repo.read_configuration(configuration["id"]) == configuration

        renamed = await repo.update_configuration(configuration["id"], ConfigurationUpdate(name="m"))
        assert renamed["version"] == 2
        assert Configuration.model_validate_json(renamed["json"]).name == "m"
        assert {**(await repo.read_configuration(configuration["id"])), "written": True} == renamed
        cleared = await repo.update_application(made["id"], ApplicationUpdate(comments=None))
        shown = Application.model_validate_json(cleared["json"])
        assert (cleared["version"], shown.comments, shown.name) == (3, None, name)
        assert [str(id) for id in shown.configuration_ids] == [configuration["id"]]
        assert {**(await repo.read_application(made["id"])), "written": True} == cleared

    new_config = {"b": 1, "a": [1.0, None]}
    run(work())


def test_what_is_not_there_is_none(run):
    async def work() -> None:
        assert await repo.read_application(UNKNOWN) is None
        assert await repo.read_configuration(UNKNOWN) is None
        assert await repo.update_application(UNKNOWN, ApplicationUpdate(name="n")) is None
        assert await repo.update_configuration(UNKNOWN, ConfigurationUpdate(config={})) is None

    run(work())


def test_reads_at_once_each_get_their_own_row(run, name):
    async def work() -> None:
        news = [ApplicationCreate(name=f"{name}-{n}") for n in range(150)]
        made = await asyncio.gather(*map(repo.create_application, news))
        ids = [row["id"] for row in made for _ in range(2)]
        assert await asyncio.gather(*map(repo.read_application, [*ids, UNKNOWN])) == [
            *(row for row in made for _ in range(2)),
            None,
        ]

    run(work())


@pytest.mark.parametrize(("rows", "limit", "more"), [(0, 1, False), (2, 3, False), (3, 3, False), (4, 3, True)])
def test_a_limited_list_shows_only_what_there_was_when_it_was_asked_for(run, sql, application, rows, limit, more):
    def new(number: int) -> ConfigurationCreate:
        return ConfigurationCreate(application_id=application["id"], name=f"name {number}", config={})

    async def work() -> None:
        made = sorted([(await repo.create_configuration(new(number)))["id"] for number in range(rows)])
        end, pages = await repo.list_configurations(None, limit, application["id"], None, None)
        for number in range(40):  # more than fit into one statement
            await repo.create_configuration(new(100 + number))
        before_all = f"00{new_id()[2:]}"
        insert = "INSERT INTO configurations (id, application_id, name, config) VALUES (%s, %s, 'first', '{}')"
        sql(insert, before_all, application["id"])
        shown = [each["id"] for each in json.loads("[" + ",".join([page async for page in pages]) + "]")]
        assert (shown, end) == (made[:limit], made[limit - 1] if more else None)

    run(work())


@pytest.fixture(scope="module")
def many(new_database):
    """A database of 100 applications with 10 configurations each, of which PostgreSQL knows the statistics."""
    with new_database() as url:
        run_sql(
            url,
            """
            INSERT INTO applications (id, name)
            SELECT '01ARZ3NDEKTSV4RRFFQ69G' || lpad(n::text, 4, '0'), 'name ' || n FROM generate_series(0, 99) AS n;
            INSERT INTO configurations (id, application_id, name, config)
            SELECT '02ARZ3NDEKTSV4RRFFQ69G' || lpad(n::text, 4, '0'),
                   '01ARZ3NDEKTSV4RRFFQ69G' || lpad((n / 10)::text, 4, '0'), 'name ' || n,
                   jsonb_build_object('number', n)
            FROM generate_series(0, 999) AS n;
            ANALYZE
            """,
        )
        yield url


@pytest.mark.parametrize("keys", [1, 32])
def test_a_read_by_name_looks_at_one_row_however_many_have_the_application_or_the_name(many, keys):
    named = f"EXPLAIN (COSTS OFF) SELECT c.json {repo._named(repo.CONFIGURATION)}"
    names = [f"name {number}" for number in range(keys)]
    plan = run_sql(many, named.replace("%(application_names)s", "%s").replace("%(names)s", "%s"), names, names)
    [condition] = [line["QUERY PLAN"] for line in plan if "key.name" in line["QUERY PLAN"]]
    assert condition.strip() in (
        "Index Cond: ((application_id = applications.id) AND ((name)::text = key.name))",
        "Index Cond: (((name)::text = key.name) AND (application_id = applications.id))",
    )


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize(
    ("index", "name", "contains"),
    [("configurations_name_idx", "name 500", None), ("configurations_config_idx", None, '{"number": 500}')],
)
def test_a_list_by_name_or_by_content_is_read_by_its_index(many, run, index, name, contains, limit):
    def scans() -> int:
        [row] = run_sql(many, "SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s", index)
        return row["idx_scan"]

    async def work() -> list[str]:
        _, pages = await repo.list_configurations(None, limit, None, name, contains)
        return [page async for page in pages]

    before = scans()
    [page] = run(work(), many)
    assert Configuration.model_validate_json(page).id == "02ARZ3NDEKTSV4RRFFQ69G0500"
    until(lambda: scans() > before)  # a backend tells what it read when it ends


def test_the_state_tells_the_migrations_and_whether_it_takes_writes(run):
    state = run(repo.read_state())
    assert state["read_only"] is False
    assert state["migrations"] == sorted(state["migrations"])
    assert 1 in state["migrations"]


# --- The database keeps the rules, whoever writes ---


@pytest.fixture
def rows(sql, name) -> tuple[str, str]:
    """An application with one configuration, by SQL alone: their ids."""
    application, configuration = new_id(), new_id()
    sql("INSERT INTO applications (id, name) VALUES (%s, %s)", application, name)
    sql(
        "INSERT INTO configurations (id, application_id, name, config) VALUES (%s, %s, 'n', '{}')",
        configuration,
        application,
    )
    return application, configuration


RULES = {
    "an id in lower case": ("UPDATE applications SET id = lower(id) WHERE id = %(a)s", "23001"),
    "another id": (f"UPDATE applications SET id = '{UNKNOWN}' WHERE id = %(a)s", "23001"),
    "another id of a configuration": (f"UPDATE configurations SET id = '{UNKNOWN}' WHERE id = %(c)s", "23001"),
    "another application": (f"UPDATE configurations SET application_id = '{UNKNOWN}' WHERE id = %(c)s", "23001"),
    "an application with an id that is none": ("INSERT INTO applications (id, name) VALUES ('x', 'x')", "23514"),
    "an id too big": (f"INSERT INTO applications (id, name) VALUES ('8{UNKNOWN[1:]}', 'x')", "23514"),
    "an id and a line end": (f"INSERT INTO applications (id, name) VALUES (E'{UNKNOWN}\\n', 'x')", "23514"),
    "a blank name": (f"INSERT INTO applications (id, name) VALUES ('{UNKNOWN}', E' \\t')", "23514"),
    "an empty name": ("UPDATE applications SET name = '' WHERE id = %(a)s", "23514"),
    "no name": ("UPDATE applications SET name = NULL WHERE id = %(a)s", "23502"),
    "a name too long": ("UPDATE applications SET name = repeat('x', 257) WHERE id = %(a)s", "22001"),
    "comments too long": ("UPDATE configurations SET comments = repeat('x', 1025) WHERE id = %(c)s", "22001"),
    "a blank name of a configuration": ("UPDATE configurations SET name = ' ' WHERE id = %(c)s", "23514"),
    "a config that is a list": ("UPDATE configurations SET config = '[]' WHERE id = %(c)s", "23514"),
    "a config that is null in JSON": ("UPDATE configurations SET config = 'null' WHERE id = %(c)s", "23514"),
    "no config": ("UPDATE configurations SET config = NULL WHERE id = %(c)s", "23502"),
    "a configuration with an id that is none": (
        "INSERT INTO configurations (id, application_id, name, config) VALUES ('x', %(a)s, 'x', '{}')",
        "23514",
    ),
    "a configuration of nothing": (
        f"INSERT INTO configurations (id, application_id, name, config) VALUES ('{UNKNOWN}', '{UNKNOWN}', 'x', '{{}}')",
        "23503",
    ),
    "a name twice in an application": (
        f"INSERT INTO configurations (id, application_id, name, config) VALUES ('{UNKNOWN}', %(a)s, 'n', '{{}}')",
        "23505",
    ),
    "a name of an application twice": (
        f"INSERT INTO applications (id, name) SELECT '{UNKNOWN}', name FROM applications WHERE id = %(a)s",
        "23505",
    ),
}


@pytest.mark.parametrize(("statement", "code"), RULES.values(), ids=RULES)
def test_a_rule_holds_for_psql_too(sql, rows, statement, code):
    application, configuration = rows
    every = "SELECT a, c FROM applications AS a JOIN configurations AS c ON c.application_id = a.id WHERE a.id = %s"
    before = sql(every, application)
    with pytest.raises(psycopg2.Error) as caught:
        sql(statement.replace("%(a)s", f"'{application}'").replace("%(c)s", f"'{configuration}'"))
    assert caught.value.pgcode == code
    assert sql(every, application) == before
    assert sql("SELECT id FROM applications WHERE id = %s", UNKNOWN) == []


ALL = "SELECT version, created_at, updated_at FROM {} WHERE id = %s"


def test_versions_and_times_follow_from_changes_whatever_a_writer_says(sql, rows):
    for table, id in zip(("applications", "configurations"), rows, strict=True):
        [before] = sql(ALL.format(table), id)
        assert before["version"] == (2 if table == "applications" else 1)
        said = "version = 99, created_at = '2000-01-01', updated_at = '2000-01-01'"
        sql(f"UPDATE {table} SET {said} WHERE id = %s", id)
        assert sql(ALL.format(table), id) == [before]
        sql(f"UPDATE {table} SET comments = 'said', {said} WHERE id = %s", id)
        [after] = sql(ALL.format(table), id)
        assert after["version"] == before["version"] + 1
        assert after["created_at"] == before["created_at"]
        assert after["updated_at"] > before["updated_at"]
        sql(f"UPDATE {table} SET comments = 'said', name = name WHERE id = %s", id)
        assert sql(ALL.format(table), id) == [after]


def test_a_new_row_begins_at_version_1_now_whatever_a_writer_says(sql, name):
    id = new_id()
    sql(
        "INSERT INTO applications (id, name, version, created_at, updated_at) VALUES (%s, %s, 7, '2000-01-01', NULL)",
        id,
        name,
    )
    [row] = sql(ALL.format("applications") + " AND created_at > now() - interval '1 minute'", id)
    assert (row["version"], row["updated_at"]) == (1, row["created_at"])


def test_a_configuration_added_or_removed_is_a_new_version_of_its_application(sql, rows):
    application, configuration = rows
    [before] = sql(ALL.format("applications"), application)
    sql("UPDATE configurations SET config = '{\"a\": 1}' WHERE id = %s", configuration)
    assert sql(ALL.format("applications"), application) == [before]  # it shows ids only
    sql("DELETE FROM configurations WHERE id = %s", configuration)
    [after] = sql(ALL.format("applications"), application)
    assert (after["version"], after["created_at"]) == (before["version"] + 1, before["created_at"])
    assert after["updated_at"] > before["updated_at"]
    sql(
        """
        INSERT INTO configurations (id, application_id, name, config)
        SELECT substr(%s, 1, 24) || 'Z' || n, %s, n, '{}' FROM generate_series(1, 3) AS n
        """,
        configuration,
        application,
    )
    assert sql(ALL.format("applications"), application)[0]["version"] == before["version"] + 4


def test_an_application_takes_its_configurations_with_it(sql, rows):
    application, configuration = rows
    sql("DELETE FROM applications WHERE id = %s", application)
    assert sql("SELECT id FROM configurations WHERE id = %s", configuration) == []


# --- Together ---


def test_what_a_put_of_an_application_shows_is_one_state_while_configurations_are_added(client, application):
    path = f"/applications/{application['id']}"
    shown: list[tuple[str, dict[str, Any]]] = []
    done = threading.Event()

    def put() -> None:
        count = 0
        while not done.is_set() or count < 5:
            count += 1
            response = client.put(path, json={"comments": f"{threading.get_ident()} {count}"})
            assert response.status_code == 200
            shown.append((response.headers["etag"], response.json()))

    def add(number: int) -> None:
        body = {"application_id": application["id"], "name": f"n{number}", "config": {}}
        assert client.post("/configurations", json=body).status_code == 201

    with ThreadPoolExecutor(8) as threads:
        putting = [threads.submit(put) for _ in range(3)]
        adding = [threads.submit(add, number) for number in range(60)]
        for each in adding:
            each.result()
        done.set()
        for each in putting:
            each.result()
    last = client.get(path).json()
    assert last["version"] == 1 + 60 + len(shown)  # every change counts, none is lost
    versions = sorted(body["version"] for _, body in shown)
    assert len(set(versions)) == len(versions)
    shown.sort(key=lambda pair: pair[1]["version"])
    for puts, (etag, body) in enumerate(shown, start=1):
        assert etag == f'"{application["id"]}.{body["version"]}"'
        assert body["version"] == 1 + puts + len(body["configuration_ids"])
        assert body["configuration_ids"] == sorted(body["configuration_ids"])


@pytest.mark.slow
def test_a_thousand_applications_of_ten_configurations_are_listed_once_each(new_database):
    with new_database() as url:
        run_sql(
            url,
            """
            INSERT INTO applications (id, name)
            SELECT '01ARZ3NDEKTSV4RRFFQ69G' || lpad(n::text, 4, '0'), 'name ' || n FROM generate_series(0, 999) AS n;
            ALTER TABLE configurations DISABLE TRIGGER configurations_renew_application;
            INSERT INTO configurations (id, application_id, name, config)
            SELECT '02ARZ3NDEKTSV4RRFFQ69G' || lpad((9999 - n)::text, 4, '0'),
                   '01ARZ3NDEKTSV4RRFFQ69G' || lpad((n / 10)::text, 4, '0'), 'name ' || n, '{}'
            FROM generate_series(0, 9999) AS n;
            ALTER TABLE configurations ENABLE TRIGGER configurations_renew_application
            """,
        )
        expected = {
            f"01ARZ3NDEKTSV4RRFFQ69G{n:04}": [
                f"02ARZ3NDEKTSV4RRFFQ69G{9999 - m:04}" for m in range(10 * n + 9, 10 * n - 1, -1)
            ]
            for n in range(1000)
        }
        with service(url) as (_, base), httpx.Client(base_url=base) as client:
            whole = client.get("/api/v1/applications").json()
            TypeAdapter(list[Application]).validate_python(whole)
            assert [each["id"] for each in whole] == list(expected)
            assert {each["id"]: each["configuration_ids"] for each in whole} == expected
            for limit, pages in ((100, 10), (333, 4), (1000, 1)):
                walked, count, path = [], 0, f"/api/v1/applications?limit={limit}"
                while path:
                    response = client.get(path)
                    walked += response.json()
                    count += 1
                    path = response.links.get("next", {}).get("url")
                assert (walked, count) == (whole, pages)
            last = client.get("/api/v1/applications", params={"after": list(expected)[-2], "limit": 1})
            assert ([each["id"] for each in last.json()], last.links) == ([list(expected)[-1]], {})
            assert client.get("/api/v1/applications", params={"after": list(expected)[-1]}).json() == []
