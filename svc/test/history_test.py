"""What the database itself keeps of every configuration, whoever writes."""

import subprocess

import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from svc.conftest import run_sql
from svc.dev import PROGRAMS


def history(sql, id: str) -> list[tuple]:
    found = sql("SELECT * FROM configuration_versions WHERE configuration_id = %s ORDER BY version", id)
    return [(row["version"], row["operation"], row["name"], row["config"]) for row in found]


def test_writes_by_psql_are_recorded_in_the_same_transaction(url, sql, configuration):
    id = configuration["id"]
    connection = psycopg2.connect(url)
    with connection.cursor() as cursor:
        cursor.execute("UPDATE configurations SET config = '{}' WHERE id = %s", (id,))
    connection.rollback()
    connection.close()
    assert history(sql, id) == [(1, "create", "production", {"port": 5432})]
    sql("UPDATE configurations SET config = '{}', version = 77 WHERE id = %s", id)
    sql("UPDATE configurations SET config = '{}' WHERE id = %s", id)
    sql("DELETE FROM configurations WHERE id = %s", id)
    assert history(sql, id)[1:] == [(2, "update", "production", {}), (3, "delete", "production", {})]


def test_an_id_that_was_deleted_does_not_come_back(sql, client, configuration):
    client.delete(f"/configurations/{configuration['id']}")
    insert = "INSERT INTO configurations (id, application_id, name, config) VALUES (%s, %s, 'n', '{}')"
    with pytest.raises(psycopg2.errors.UniqueViolation):
        sql(insert, configuration["id"], configuration["application_id"])


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE configuration_versions SET name = 'x'",
        "UPDATE configuration_versions SET name = 'x' WHERE false",
        "DELETE FROM configuration_versions",
        "TRUNCATE configuration_versions",
    ],
)
def test_history_is_append_only(sql, configuration, statement):
    before = sql("SELECT count(*) FROM configuration_versions")
    with pytest.raises(psycopg2.errors.RestrictViolation, match="append-only"):
        sql(statement)
    assert sql("SELECT count(*) FROM configuration_versions") == before


def test_deleting_an_application_records_the_deletion_of_its_configurations(sql, client, configuration):
    client.delete(f"/applications/{configuration['application_id']}?cascade=true")
    assert [row[:2] for row in history(sql, configuration["id"])] == [(1, "create"), (2, "delete")]


@pytest.mark.parametrize(
    ("older_than", "keep", "left"),
    [
        ("1 hour", 1, [1, 2, 3, 4, 5]),  # none is that old
        ("-1 hour", 5, [1, 2, 3, 4, 5]),
        ("-1 hour", 2, [4, 5]),
        ("-1 hour", 0, [5]),
        ("-1 hour", -3, [5]),
        (None, 1, [1, 2, 3, 4, 5]),
    ],
)
def test_pruning_removes_what_is_both_old_and_beyond_the_newest(new_database, older_than, keep, left):
    with new_database() as url:
        run_sql(url, "INSERT INTO applications (id, name) VALUES ('01ARZ3NDEKTSV4RRFFQ69G5FAV', 'a')")
        for name in ("b", "c"):
            id = f"01ARZ3NDEKTSV4RRFFQ69G5F{name.upper()}0"
            run_sql(
                url,
                "INSERT INTO configurations (id, application_id, name, config) VALUES (%s, %s, %s, '{}')",
                *(id, "01ARZ3NDEKTSV4RRFFQ69G5FAV", name),
            )
            for number in range(4):
                run_sql(url, "UPDATE configurations SET comments = %s WHERE id = %s", str(number), id)
        [row] = run_sql(url, "SELECT prune_configuration_versions(%s, %s) AS removed", older_than, keep)
        assert row["removed"] == 2 * (5 - len(left))
        for name in ("B", "C"):
            rows = run_sql(
                url,
                "SELECT version FROM configuration_versions WHERE configuration_id = %s ORDER BY version",
                f"01ARZ3NDEKTSV4RRFFQ69G5F{name}0",
            )
            assert [row["version"] for row in rows] == left
        with pytest.raises(psycopg2.errors.RestrictViolation):
            run_sql(url, "DELETE FROM configuration_versions")


def test_dump_and_restore_keep_etags_and_history(new_database, client, url, configuration):
    client.put(f"/configurations/{configuration['id']}", json={"comments": "x"})
    state = "SELECT * FROM {} ORDER BY 1, 2"
    tables = ("applications", "configurations", "configuration_versions", "migrations")
    before = [run_sql(url, state.format(table)) for table in tables]
    dump = subprocess.run([PROGRAMS / "pg_dump", "--dbname", url], capture_output=True, check=True).stdout
    with new_database(migrated=False) as copy:
        copy = make_dsn(copy)
        subprocess.run(
            [PROGRAMS / "psql", "--quiet", "-v", "ON_ERROR_STOP=1", "--dbname", copy],
            input=dump,
            stdout=subprocess.DEVNULL,
            check=True,
        )
        assert [run_sql(copy, state.format(table)) for table in tables] == before
        run_sql(copy, "UPDATE configurations SET comments = 'y' WHERE id = %s", configuration["id"])
        found = run_sql(copy, "SELECT version FROM configurations WHERE id = %s", configuration["id"])
        assert found == [{"version": 3}]
