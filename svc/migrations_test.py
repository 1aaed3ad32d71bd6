import json
import re
import secrets
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg2
import pytest
from psycopg2.extensions import make_dsn, parse_dsn

from svc import dev, migrations, settings
from svc.conftest import run_sql
from svc.test.process import environment, until

PASSWORD = "geheim-7f3a"
RUNNER = "application_name = 'config-service-migrations' AND datname = current_database()"
REAL_FOLDER = migrations.FOLDER
TIMES = r"20\d\d-.*"  # when a file was applied, and how long it took

End = namedtuple("End", "code out err")


@pytest.fixture(scope="module")
def shared(new_database):
    with new_database(migrated=False) as url:
        yield url


@pytest.fixture
def database(shared):
    """The URL of an empty database. It is emptied instead of made, which takes a tenth of the time."""
    run_sql(shared, "DROP SCHEMA IF EXISTS own, other CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return shared


@pytest.fixture
def role(database):
    """The name of a role that is dropped with all that it owns."""
    name = f"role_{secrets.token_hex(8)}"
    run_sql(database, f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
    yield name
    run_sql(database, f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(migrations, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs the command line in this process, with settings of its own."""

    def main(url, *arguments, **values):
        for name, value in {"database_url": url, **values}.items():
            monkeypatch.setenv(name.upper(), str(value))
        settings.load.cache_clear()
        try:
            code, said = migrations.main(list(arguments)), ""
        except SystemExit as end:
            # Python prints a text to stderr and ends with 1.
            code, said = (end.code, "") if isinstance(end.code, int) else (1, f"{end.code}\n")
        out, err = capsys.readouterr()
        return End(code, re.sub(r"\d+ ms", "N ms", out), err + said)

    yield main
    settings.load.cache_clear()


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def numbered(first, last):
    """Pairs of files. Each pair creates and drops a table of its number."""
    ups = {f"{n:04}_t{n}.sql": f"CREATE TABLE t{n} (id int);\n" for n in range(first, last + 1)}
    return ups | {f"{n:04}_t{n}.down.sql": f"DROP TABLE t{n};\n" for n in range(first, last + 1)}


def tables(url):
    found = run_sql(url, "SELECT relname FROM pg_stat_user_tables ORDER BY relname")
    return [row["relname"] for row in found if row["relname"] != "migrations"]


def records(url):
    return [row["name"] for row in run_sql(url, "SELECT name FROM migrations ORDER BY version")]


def sessions(url, condition="true"):
    return run_sql(url, f"SELECT pid FROM pg_stat_activity WHERE {RUNNER} AND {condition}")


def dump(url):
    """The database as pg_dump prints it, without what differs in each run."""
    done = subprocess.run([dev.PROGRAMS / "pg_dump", "-d", url], capture_output=True, text=True, check=True)
    return re.sub(r"^\\(un)?restrict .*\n", "", done.stdout, flags=re.MULTILINE)


# --- up, down, status ---


def test_up_applies_each_file_once_in_numeric_order_with_its_record(run, database, folder):
    write(folder, numbered(9, 10) | {"2_two.sql": "CREATE TABLE two (); CREATE TABLE three ();", "notes.txt": "none"})
    done = run(database)  # no command means up
    assert done == (0, "2_two.sql in N ms\n0009_t9.sql in N ms\n0010_t10.sql in N ms\n", "")
    assert tables(database) == ["t10", "t9", "three", "two"]
    assert records(database) == ["2_two", "0009_t9", "0010_t10"]
    before = dump(database)
    assert run(database, "up") == (0, "nothing to do\n", "")
    assert dump(database) == before
    until(lambda: not sessions(database))


def test_up_and_down_end_at_the_version_that_is_asked_for_and_a_dry_run_changes_nothing(run, database, folder):
    write(folder, numbered(1, 3))
    empty = dump(database)
    assert run(database, "up", "--dry-run", "--to", "2") == (0, "would run 0001_t1.sql\nwould run 0002_t2.sql\n", "")
    assert run(database, "--dry-run").out.count("would run") == 3
    assert dump(database) == empty
    assert run(database, "up", "--to", "2").code == 0
    assert tables(database) == ["t1", "t2"]
    assert run(database, "down", "--to", "1") == (0, "0002_t2.down.sql in N ms\n", "")
    assert (tables(database), records(database)) == (["t1"], ["0001_t1"])


def test_down_says_first_which_tables_with_rows_go(run, database, folder):
    write(folder, numbered(1, 3) | {"0002_t2.down.sql": "DROP SCHEMA other CASCADE; ALTER TABLE t1 RENAME TO t0"})
    write(folder, {"0002_t2.sql": 'CREATE SCHEMA other; CREATE TABLE other."B" (); CREATE TABLE other.empty ();'})
    write(folder, {"0001_t1.down.sql": "DROP TABLE t0"})
    assert run(database, "up").code == 0
    run_sql(database, 'INSERT INTO t3 SELECT generate_series(1, 1204); INSERT INTO other."B" DEFAULT VALUES')
    before = dump(database)
    losses = 'drops other."B" (1 rows)\ndrops t3 (1,204 rows)\n'
    would = "would run 0003_t3.down.sql\nwould run 0002_t2.down.sql\n"
    assert run(database, "down", "--to", "1", "--dry-run") == (0, losses + would, "")
    assert dump(database) == before
    done = "0003_t3.down.sql in N ms\n0002_t2.down.sql in N ms\n0001_t1.down.sql in N ms\n"
    assert run(database, "down", "--to", "0") == (0, losses + done, "")
    assert tables(database) == []


def test_a_down_that_would_fail_later_touches_nothing(run, database, folder):
    write(folder, numbered(1, 2))
    assert run(database, "up").code == 0
    before = dump(database)
    last = folder / "0001_t1.down.sql"
    last.write_text("DROP TABLE t1;\nDROP TABLE t9;")
    assert run(database, "down", "--to", "0") == (1, "", '0001_t1.down.sql: table "t9" does not exist\n')
    last.unlink()
    assert run(database, "down", "--to", "0") == (1, "", f"{last}: No such file or directory\n")
    assert dump(database) == before


def test_the_files_of_the_service_go_up_and_down_and_leave_nothing_behind(run, database, monkeypatch):
    monkeypatch.setattr(migrations, "FOLDER", REAL_FOLDER)
    assert run(database, "up").code == 0
    first = dump(database)
    assert "CREATE TABLE public.configurations" in first
    assert run(database, "down", "--to", "0").code == 0
    assert re.findall(r"^CREATE \w+ (\S+)", dump(database), re.MULTILINE) == ["public.migrations"]
    assert run(database, "up").code == 0
    assert re.sub(TIMES, "", dump(database)) == re.sub(TIMES, "", first)


def test_status_shows_what_is_applied_and_when(run, database, folder):
    write(folder, numbered(1, 2))
    assert run(database, "status") == (1, f"{'':20}  0001_t1: pending\n{'':20}  0002_t2: pending\n", "")
    assert tables(database) == []
    assert run(database, "up", "--to", "1").code == 0
    run_sql(database, "UPDATE migrations SET applied_at = '2024-02-29 23:30:00-01', duration = '1.25 s'")
    shown = f"2024-03-01T00:30:00Z  0001_t1: applied\n{'':20}  0002_t2: pending\n"
    assert run(database, "status") == (1, shown, "")
    first, second = json.loads(run(database, "status", "--json").out)
    assert (first["state"], first["applied_at"], first["seconds"]) == ("applied", "2024-03-01T00:30:00Z", 1.25)
    pending = {"version": 2, "name": "0002_t2", "state": "pending", "file": "0002_t2.sql"}
    assert second == pending | {"applied_at": None, "seconds": None}
    assert run(database, "up").code == 0
    assert run(database, "status").code == 0


# --- Drift ---

LATE = "0002_t2: pending, older than the newest applied: --allow-out-of-order accepts it"
DRIFTS = {
    "0002_t2: edited after it was applied": lambda file: file.write_text("CREATE TABLE t2 (id int); -- more"),
    "0002_t2: applied and its file is gone": lambda file: file.unlink(),
    "0002_t2: applied and its file is now called 0002_b": lambda file: file.rename(file.with_name("0002_b.sql")),
    "0002_a.sql and 0002_t2.sql have the same number": lambda file: file.with_name("0002_a.sql").touch(),
}


@pytest.mark.parametrize("found", DRIFTS)
def test_drift_is_found_and_refused_before_anything_is_touched(run, database, folder, found):
    write(folder, numbered(1, 4))
    assert run(database, "up", "--to", "3").code == 0
    DRIFTS[found](folder / "0002_t2.sql")
    before = dump(database)
    for command in ("verify", "status", "up", "up --dry-run", "up --allow-out-of-order", "down --to 2"):
        refused = run(database, *command.split())
        assert refused.code == 1
        assert f"{found}\n" in refused.out + refused.err
    assert dump(database) == before


def test_the_file_of_a_merged_branch_is_accepted_out_of_order(run, database, folder):
    write(folder, numbered(1, 1) | numbered(3, 3))
    assert run(database, "up").code == 0
    write(folder, numbered(2, 2) | numbered(4, 4))
    assert run(database, "verify") == (1, f"{LATE}\n", "")
    assert run(database, "up") == (1, "", f"refused, nothing was touched: {LATE}\n")
    assert run(database, "up", "--allow-out-of-order", "--to", "2") == (0, "0002_t2.sql in N ms\n", "")
    run_sql(database, "DELETE FROM migrations WHERE version = 2")
    assert run(database, "down", "--to", "1") == (0, "0003_t3.down.sql in N ms\n", "")
    assert records(database) == ["0001_t1"]


def test_a_database_that_newer_code_migrated_is_left_as_it_is(run, database, folder):
    write(folder, numbered(1, 4))
    assert run(database, "up").code == 0
    (folder / "0004_t4.sql").unlink()
    before = dump(database)
    assert run(database, "up") == (0, "the database is ahead of this code: 0004_t4\nnothing to do\n", "")
    ahead = "0004_t4: applied, newer than this code\n"
    shown = run(database, "status")
    assert (shown.code, shown.out.endswith(ahead)) == (0, True)
    assert run(database, "verify") == (0, "", "")
    assert run(database, "down", "--to", "0") == (1, "", f"refused, nothing was touched: {ahead}")
    assert dump(database) == before


def test_line_endings_and_a_byte_order_mark_are_no_edit(run, database, folder):
    file = folder / "0001_t.sql"
    file.write_bytes(b"CREATE TABLE t (\n    a text\n);\n")
    assert run(database, "up").code == 0
    file.write_bytes(b"\xef\xbb\xbfCREATE TABLE t (\r\n    a text\r\n);\r\n")
    assert run(database, "verify") == (0, "", "")


# --- Files ---

NAMING = "a migration is called NUMBER_name.sql or NUMBER_name.down.sql"
NO_STATEMENT = "holds no statement, only comments or nothing: write its SQL"
NO_TEXT = "holds what is not UTF-8, or NUL, which PostgreSQL cannot read"
BAD = [(name, "SELECT 1", NAMING) for name in ("bad.sql", "0002-bad.sql", "0000_bad.sql", "2_bad.SQL", "2_größe.sql")]
BAD += [("2_bad.sql", content, NO_TEXT) for content in ("SELECT 'é'".encode("latin-1"), "SELECT '\0'")]
BAD += [("2_bad.sql", content, NO_STATEMENT) for content in ("", b"\xef\xbb\xbf-- one\n/* two\n */ -- SELECT 1;\n;")]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_a_bad_file_is_refused_before_anything_runs(run, database, folder, name, content, message):
    write(folder, numbered(1, 1) | {name: content})
    assert run(database, "up") == (1, "", f"{name}: {message}\n")
    assert tables(database) == []


FAILING = {
    "a syntax error": ("CREATE TABLE h ();\n\nSELECT\n  1,\n  FROM t;", ':5: syntax error at or near "FROM"'),
    "CR LF and letters of many bytes": ("SELECT '𝕏é', -- é\r\n nope", ':2: column "nope" does not exist'),
    "a byte order mark": (b"\xef\xbb\xbfCREATE TABLE h ();\nSELEC 1", ':2: syntax error at or near "SELEC"'),
    "an error in a block": ("CREATE TABLE h ();\nDO $$ BEGIN\nSELECT nope; END $$", ':3: column "nope" does not exist'),
    "an error at run time, of two lines": ("DO $$ BEGIN RAISE 'one\ntwo'; END $$", ": one two"),
    "a deferred constraint": (
        "CREATE TABLE h (id int REFERENCES good (id) DEFERRABLE INITIALLY DEFERRED);\nINSERT INTO h VALUES (7);",
        ': insert or update on table "h" violates foreign key constraint "h_id_fkey"',
    ),
    "COMMIT": ("CREATE TABLE h ();\nCOMMIT;", ": EXECUTE of transaction commands is not implemented"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_file_is_named_and_leaves_nothing(run, database, folder, case):
    content, message = FAILING[case]
    write(folder, {"0001_good.sql": "CREATE TABLE good (id int UNIQUE);", "0002_bad.sql": content} | numbered(3, 3))
    assert run(database, "up") == (1, "0001_good.sql in N ms\n", f"0002_bad.sql{message}\n")
    assert (tables(database), records(database)) == (["good"], ["0001_good"])
    write(folder, {"0002_bad.sql": "CREATE TABLE mended ();"})
    assert run(database, "up") == (0, "0002_bad.sql in N ms\n0003_t3.sql in N ms\n", "")
    assert tables(database) == ["good", "mended", "t3"]


def test_every_statement_runs_as_it_is_written(run, database, folder):
    statements = """
        CREATE TABLE t (id serial, a text); /* ; */ -- it's;
        INSERT INTO t (a) VALUES ('100 %'), ('%s'), ('%(version)s'), ('it''s;'), ($b$x;$$;y$b$), ('中文 → 👩‍👩‍👧‍👦')
    """
    write(folder, {"0001_it.sql": statements})
    assert run(database, "up") == (0, "0001_it.sql in N ms\n", "")
    rows = run_sql(database, "SELECT a FROM t ORDER BY id")
    assert [row["a"] for row in rows] == ["100 %", "%s", "%(version)s", "it's;", "x;$$;y", "中文 → 👩‍👩‍👧‍👦"]


@pytest.mark.parametrize("first_line", ["", "-- no-transaction\n"], ids=["transaction", "none"])
def test_what_a_file_sets_reaches_neither_its_record_nor_the_next_file(run, database, folder, role, first_line):
    run_sql(database, f"GRANT CREATE ON SCHEMA public TO {role}")
    seen = "current_user AS role, current_schema() AS schema, current_setting('lock_timeout') AS wait"
    sets = f"SET search_path = other; SET lock_timeout = 0; CREATE TEMP TABLE migrations (); SET ROLE {role}"
    write(folder, {"0001_sets.sql": f"{first_line}CREATE SCHEMA other; {sets}"})
    write(folder, {"0002_sees.sql": f"CREATE TABLE seen AS SELECT {seen}"})
    assert run(database, "up").code == 0
    [found] = run_sql(database, "SELECT role <> %s AS own, schema, wait FROM public.seen", role)
    assert found == {"own": True, "schema": "public", "wait": "5s"}
    assert records(database) == ["0001_sets", "0002_sees"]


# --- Outside a transaction ---

INDEX = "-- no-transaction\nCREATE UNIQUE INDEX CONCURRENTLY i\nON t1 ({column});"


def test_an_index_is_built_and_dropped_concurrently(run, database, folder):
    write(folder, numbered(1, 1) | {"0002_i.sql": INDEX.format(column="id")})
    write(folder, {"0002_i.down.sql": "-- no-transaction\r\nDROP INDEX CONCURRENTLY i"})
    assert run(database, "up").code == 0
    valid = "SELECT indexrelid::regclass::text AS name FROM pg_index WHERE indisvalid AND indrelid = 't1'::regclass"
    assert run_sql(database, valid) == [{"name": "i"}]
    assert run(database, "down", "--to", "1") == (0, "0002_i.down.sql in N ms\n", "")
    assert (run_sql(database, valid), records(database)) == ([], ["0001_t1"])


@pytest.mark.parametrize(
    ("repair", "next_up"),
    [
        ("DROP INDEX i; DELETE FROM migrations WHERE version = 2", "0002_i.sql in N ms\n0003_t3.sql in N ms\n"),
        ("REINDEX INDEX i; UPDATE migrations SET duration = '0' WHERE version = 2", "0003_t3.sql in N ms\n"),
    ],
)
def test_a_file_that_failed_half_way_stops_everything_until_it_is_repaired(run, database, folder, repair, next_up):
    write(folder, {"0001_t1.sql": "CREATE TABLE t1 AS SELECT 1 AS id FROM generate_series(1, 2)"} | numbered(3, 3))
    write(folder, {"0002_i.sql": INDEX.format(column="id,")})
    assert run(database, "up").err == '0002_i.sql:3: syntax error at or near ")"\n'
    run_sql(database, "DELETE FROM migrations WHERE version = 2")
    write(folder, {"0002_i.sql": INDEX.format(column="id")})
    assert run(database, "up").err == '0002_i.sql: could not create unique index "i"\n'
    half_way = "0002_i: half-way: it failed, or it still runs; -h says how to repair it\n"
    assert run(database, "verify") == (1, half_way, "")
    assert run(database, "up") == (1, "", f"refused, nothing was touched: {half_way}")
    assert run(database, "down", "--to", "0") == (1, "", f"refused, nothing was touched: {half_way}")
    run_sql(database, f"DELETE FROM t1 WHERE ctid = '(0,1)'; {repair}")
    assert run(database, "up") == (0, next_up, "")


# --- One runner at a time ---


def test_of_twenty_runners_at_once_each_ends_well_and_each_file_is_applied_once(database, folder):
    write(folder, {"0001_slow.sql": "CREATE TABLE slow AS SELECT 1 AS n; SELECT pg_sleep(0.2)"} | numbered(2, 3))
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(migrations.up, [database] * 20)) == [None] * 20
    assert records(database) == ["0001_slow", "0002_t2", "0003_t3"]
    assert run_sql(database, "SELECT n FROM slow") == [{"n": 1}]


def test_a_runner_gives_up_when_another_is_at_work_for_too_long(run, database, folder):
    write(folder, numbered(1, 1))
    with closing(psycopg2.connect(database)) as other:
        other.cursor().execute("SELECT pg_advisory_lock(hashtext('svc.migrations'))")
        message = "another runner is still at work: try later, or see what it waits for\n"
        assert run(database, "up", migration_wait="0.1") == (1, "", message)
    assert tables(database) == []


def test_a_runner_that_waits_does_not_hold_up_an_index_that_is_built_concurrently(database, folder):
    write(folder, numbered(1, 1) | {"0002_i.sql": INDEX.format(column="id")})
    with closing(psycopg2.connect(database)) as writer, ThreadPoolExecutor(2) as threads:
        migrations.up(database, to=1)
        writer.cursor().execute("INSERT INTO t1 VALUES (1)")
        first = threads.submit(migrations.up, database)
        until(lambda: sessions(database, "wait_event = 'virtualxid'"))
        second = threads.submit(migrations.up, database)
        until(lambda: sessions(database, "query LIKE '%advisory%'"))
        writer.commit()
        assert (first.result(), second.result()) == (None, None)
    assert records(database) == ["0001_t1", "0002_i"]


def test_a_runner_that_is_killed_leaves_nothing_and_the_next_one_works(run, database, monkeypatch):
    monkeypatch.setattr(migrations, "FOLDER", REAL_FOLDER)
    command, env = [sys.executable, "-m", "svc.migrations"], environment(database_url=database)
    with closing(psycopg2.connect(database)) as other:
        other.cursor().execute("CREATE TABLE tokens ()")  # the second file waits until it is known what becomes of it
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as runner:
            until(lambda: sessions(database, "wait_event_type = 'Lock'"))
            runner.send_signal(signal.SIGINT)
            assert runner.wait(timeout=5) == -signal.SIGINT
            assert re.fullmatch(rb"0001_\w+.sql in \d+ ms\n", runner.stdout.read())
        until(lambda: not sessions(database), 3)
    assert run(database, "up") == (0, "0002_tokens.sql in N ms\n", "")


@pytest.mark.parametrize(("setting", "of_file"), [(0.05, ""), (60, "SET lock_timeout = '50ms'; ")])
def test_a_statement_waits_for_a_lock_no_longer_than_the_setting_or_its_file_says(
    run, database, folder, setting, of_file
):
    run_sql(database, "CREATE TABLE busy (id int)")
    write(folder, {"0001_change.sql": f"CREATE TABLE half (); {of_file}DROP TABLE busy;"})
    with closing(psycopg2.connect(database)) as reader:
        reader.cursor().execute("SELECT count(*) FROM busy")
        stopped = run(database, "up", migration_lock_timeout=setting)
    assert stopped == (1, "", "0001_change.sql: canceling statement due to lock timeout\n")
    assert tables(database) == ["busy"]
    assert run_sql(database, "SELECT to_regclass('migrations') AS found") == [{"found": None}]


# --- Rights, schemas and connections ---


def test_each_schema_has_its_own_migrations_and_no_more_than_its_rights_are_needed(run, database, folder, role):
    write(folder, numbered(1, 2))
    assert run(database, "up", "--to", "1").code == 0
    run_sql(database, f"CREATE SCHEMA own AUTHORIZATION {role}; GRANT USAGE ON SCHEMA public TO {role}")
    url = make_dsn(database, user=role, password=PASSWORD, options="-c search_path=own,public")
    assert run(url, "up") == (0, "0001_t1.sql in N ms\n0002_t2.sql in N ms\n", "")
    found = run_sql(database, "SELECT schemaname || '.' || relname AS name FROM pg_stat_user_tables ORDER BY 1")
    expected = ["own.migrations", "own.t1", "own.t2", "public.migrations", "public.t1"]
    assert [row["name"] for row in found] == expected
    assert run(url, "down", "--to", "0").code == 0
    assert (tables(database), records(database)) == (["t1"], ["0001_t1"])


def test_a_database_that_cannot_hold_every_text_is_refused(run, postgres, new_database, folder):
    write(folder, numbered(1, 1))
    with new_database(migrated=False) as url:
        name = parse_dsn(url)["dbname"]
        run_sql(postgres, f"DROP DATABASE {name}")
        run_sql(postgres, f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        refused = run(url, "up")
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
        assert "migrations_database_must_be_utf8" in refused.err
        assert tables(url) == []


# --- The command line ---

URL = f"postgresql://u:{PASSWORD}@127.0.0.1:1/d"
USAGES = ["down --dry-run", f"up {URL}", f"{URL} status", f"up --to {URL}", f"status --d={URL}", f"status --json={URL}"]


@pytest.mark.parametrize("arguments", USAGES)
def test_wrong_usage_ends_with_2_and_one_line_that_repeats_no_value(run, arguments):
    wrong = run(URL, *arguments.split())
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)
    assert wrong.err.startswith("wrong usage: ")
    assert PASSWORD not in wrong.err


@pytest.mark.parametrize(
    ("url", "words"), [("", "DATABASE_URL: "), (PASSWORD, "DATABASE_URL: "), (URL, "connection to")]
)
def test_a_database_that_is_none_or_away_is_one_line_without_the_password(run, url, words):
    failed = run(URL, "status", "--database-url", url)
    assert (failed.code, failed.out, failed.err.count("\n")) == (1, "", 1)
    assert words in failed.err
    assert PASSWORD not in failed.err


def test_the_database_of_the_command_line_wins_and_help_needs_none(run, database, folder):
    write(folder, numbered(1, 1))
    assert run(URL, "up", "--database-url", f" {database}\n").code == 0
    assert records(database) == ["0001_t1"]
    shown = run(URL, "-h")
    assert shown.code == 0
    assert migrations.__doc__ in shown.out


def test_new_writes_the_next_pair_of_files_to_be_filled_in(run, database, folder):
    write(folder, numbered(9, 9))
    up, down = folder / "0010_add_an_index_gr_e.sql", folder / "0010_add_an_index_gr_e.down.sql"
    assert run(URL, "new", "Add  an\nindex: größe!") == (0, f"{up}\n{down}\n", "")
    assert up.read_text() == "-- Add an index: größe!\n"
    assert down.read_text() == "-- Take back: Add an index: größe!\n"
    assert run(URL, "new", "→ !").code == 0
    assert (folder / "0011_migration.sql").exists()
