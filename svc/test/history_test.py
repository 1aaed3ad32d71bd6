"""What the database itself keeps of every configuration, whoever writes."""

import subprocess
from contextlib import closing

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from svc import migrations
from svc.conftest import run_sql
from svc.dev import PROGRAMS

ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
APPLICATION = f"INSERT INTO applications (id, name) VALUES ('{ID}', 'a')"
CONFIGURATION = f"INSERT INTO configurations (id, application_id, name, config) VALUES ('{ID}', '{ID}', 'n', '{{}}')"


def history(sql, id: str) -> list[tuple]:
    rows = sql("SELECT * FROM configuration_versions WHERE configuration_id = %s ORDER BY version", id)
    return [(row["version"], row["operation"], row["actor"], row["config"]) for row in rows]


def test_every_change_is_recorded_with_who_made_it_and_numbers_go_on(url, sql, client, configuration):
    id = configuration["id"]
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("UPDATE configurations SET config = '{}' WHERE id = %s", (id,))
        connection.rollback()
        by_hand = f"database:{connection.info.user}"
    assert history(sql, id) == [(1, "create", "anonymous", {"port": 5432})]
    sql("UPDATE configurations SET config = '{}', version = 77 WHERE id = %s", id)
    sql("UPDATE configurations SET config = '{}' WHERE id = %s", id)
    client.delete(f"/configurations/{id}")
    insert = "INSERT INTO configurations (id, application_id, name, config) VALUES (%s, %s, 'n', '{}')"
    sql(insert, id, configuration["application_id"])
    client.put(f"/configurations/{id}", json={"config": {"port": 1}})
    client.delete(f"/applications/{configuration['application_id']}?cascade=true")
    assert history(sql, id)[1:] == [
        (2, "update", by_hand, {}),
        (3, "delete", "anonymous", None),
        (4, "create", by_hand, {}),
        (5, "update", "anonymous", {"port": 1}),
        (6, "delete", "anonymous", None),
    ]


@pytest.mark.parametrize(
    ("old", "keep", "deleted", "left"),
    [
        (0, 1, False, [1, 2, 3, 4]),
        (4, 3, False, [2, 3, 4]),
        (4, 1, False, [4]),
        (4, 3, True, [3, 4, 5]),
        (5, 3, True, []),
    ],
)
def test_pruning_removes_what_is_old_but_the_newest_and_what_was_deleted_as_a_whole(
    new_database, old, keep, deleted, left
):
    with new_database() as url:
        run_sql(url, f"{APPLICATION}; {CONFIGURATION}")
        for number in range(3):
            run_sql(url, "UPDATE configurations SET comments = %s", str(number))
        if deleted:
            run_sql(url, "DELETE FROM configurations")
        age = "UPDATE configuration_versions SET recorded_at = now() - interval '2 days' WHERE version <= %s"
        run_sql(url, f"ALTER TABLE configuration_versions DISABLE TRIGGER USER; {age}", old)
        [row] = run_sql(url, "SELECT prune_configuration_versions('1 day', %s) AS removed", keep)
        assert row["removed"] == 4 + deleted - len(left)
        rows = run_sql(url, "SELECT version FROM configuration_versions ORDER BY version")
        assert [row["version"] for row in rows] == left


def test_what_is_written_in_one_schema_stays_there_whatever_the_search_path(new_database):
    with new_database(migrated=False) as url:
        for schema in ("one", "two"):
            run_sql(url, f"CREATE SCHEMA {schema}")
            migrations.up(make_dsn(url, options=f"-c search_path={schema}"))
        in_one = APPLICATION.replace("applications", "one.applications")
        in_one += f"; {CONFIGURATION.replace('configurations', 'one.configurations')}"
        run_sql(url, f"SET search_path TO two; {in_one}; DELETE FROM one.configurations")
        state = """
            SELECT (SELECT version FROM one.applications) AS version, one.configuration_ids_now(%s) AS ids,
                   one.merge_patch('{"a": {}}', '{"a": {"b": 1}}')::text AS merged,
                   one.prune_configuration_versions('-1 day', 1) AS removed,
                   (SELECT count(*) FROM two.configuration_versions) AS others
        """
        expected = {"version": 3, "ids": [], "merged": '{"a": {"b": 1}}', "removed": 2, "others": 0}
        assert run_sql(url, state, ID) == [expected]


def test_dump_and_restore_keep_etags_and_history(new_database, client, url, configuration):
    client.put(f"/configurations/{configuration['id']}", json={"comments": "x"})
    tables = ("applications", "configurations", "configuration_versions", "migrations")
    states = [f"SELECT * FROM {table} ORDER BY 1, 2" for table in tables]
    before = [run_sql(url, state) for state in states]
    dump = subprocess.run([PROGRAMS / "pg_dump", "--dbname", url], capture_output=True, check=True).stdout
    with new_database(migrated=False) as copy:
        restore = [PROGRAMS / "psql", "--quiet", "-v", "ON_ERROR_STOP=1", "--dbname", copy]
        subprocess.run(restore, input=dump, stdout=subprocess.DEVNULL, check=True)
        assert [run_sql(copy, state) for state in states] == before
        update = "UPDATE configurations SET comments = 'y' WHERE id = %s RETURNING version"
        assert run_sql(copy, update, configuration["id"]) == [{"version": 3}]
        [position] = run_sql(copy, "SELECT max(position) FROM configuration_versions")
        assert position["max"] > max(row["position"] for row in before[2])
