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
def test_pruning_removes_what_is_old_but_the_newest_and_what_was_deleted_as_a_whole(url, old, keep, deleted, left):
    age = f"""
        ALTER TABLE configuration_versions DISABLE TRIGGER USER;
        UPDATE configuration_versions SET recorded_at = now() - interval '2 days'
        WHERE configuration_id = '{ID}' AND version <= %s
    """
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:  # which takes all of it back
        cursor.execute(f"{APPLICATION}; {CONFIGURATION}")
        for number in range(3):
            cursor.execute("UPDATE configurations SET comments = %s WHERE id = %s", [number, ID])
        if deleted:
            cursor.execute("DELETE FROM configurations WHERE id = %s", [ID])
        cursor.execute(age, [old])
        cursor.execute("SELECT prune_configuration_versions('1 day', %s)", [keep])
        assert cursor.fetchone() == (4 + deleted - len(left),)
        cursor.execute("SELECT version FROM configuration_versions WHERE configuration_id = %s ORDER BY version", [ID])
        assert [version for (version,) in cursor] == left


@pytest.mark.parametrize(
    ("action", "versions"),
    [("NOTHING", [(1, "create")]), ("UPDATE SET comments = 'x'", [(1, "create"), (2, "update")])],
)
def test_what_an_insert_leaves_out_on_conflict_is_no_version(url, action, versions):
    again = CONFIGURATION.replace(f"('{ID}'", f"('{ID[:-1]}W'")
    with closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:  # which takes all of it back
        cursor.execute(f"{APPLICATION}; {CONFIGURATION}; {again} ON CONFLICT (application_id, name) DO {action}")
        cursor.execute(
            "SELECT version, operation FROM configuration_versions WHERE application_id = %s ORDER BY 1", [ID]
        )
        assert cursor.fetchall() == versions


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


def test_dump_and_restore_keep_etags_and_history(new_database):
    tables = ("applications", "configurations", "configuration_versions", "migrations")
    states = [f"SELECT * FROM {table} ORDER BY 1, 2" for table in tables]
    update = "UPDATE configurations SET comments = %s RETURNING version"
    with new_database() as url, new_database(migrated=False) as copy:
        run_sql(url, f"{APPLICATION}; {CONFIGURATION}")
        assert run_sql(url, update, "x") == [{"version": 2}]
        before = [run_sql(url, state) for state in states]
        dump = subprocess.run([PROGRAMS / "pg_dump", "--dbname", url], capture_output=True, check=True).stdout
        restore = [PROGRAMS / "psql", "--quiet", "-v", "ON_ERROR_STOP=1", "--dbname", copy]
        subprocess.run(restore, input=dump, stdout=subprocess.DEVNULL, check=True)
        assert [run_sql(copy, state) for state in states] == before
        assert run_sql(copy, update, "y") == [{"version": 3}]
        [position] = run_sql(copy, "SELECT max(position) FROM configuration_versions")
        assert position["max"] > max(row["position"] for row in before[2])
