"""Apply SQL files to PostgreSQL, each once, in the order of their numbers.

NUMBER_name.sql runs in one transaction together with its record in the table `migrations`. NUMBER_name.down.sql takes
it back. Files are UTF-8. PostgreSQL refuses COMMIT and the like in them, COPY from or to the client, and a SELECT INTO
at the end. A statement_timeout counts for the whole file.

A file whose first line is `-- no-transaction` holds one statement that PostgreSQL runs only outside a transaction, such
as CREATE INDEX CONCURRENTLY. If it fails half-way, nothing else runs until you have repaired what it left. Then run
`DELETE FROM migrations WHERE version = NUMBER` if nothing of it is there, or
`UPDATE migrations SET duration = '0' WHERE version = NUMBER` if all of it is there.

Refused before anything runs: a file that was edited, renamed or deleted after it was applied, two files with the same
number, and, unless --allow-out-of-order is given, a pending file that is older than the newest applied one. A database
that newer code has migrated is left as it is.

`down` first prints which tables that hold rows will go. To find them it runs the files, but not those
with `-- no-transaction`, in a transaction that it rolls back: so it takes their locks for a moment, even in a dry run.

Only one runner works at a time. Others wait for it, at most MIGRATION_WAIT seconds. A statement that waits for a lock
longer than MIGRATION_LOCK_TIMEOUT seconds fails, unless its file sets another lock_timeout. CREATE INDEX CONCURRENTLY,
alone in its file, cannot: set MIGRATION_LOCK_TIMEOUT=3600 for it if long transactions are open.

Exit codes: 0 done; 1 refused or failed, for `verify` something is wrong, for `status` also pending; 2 wrong usage.
"""

import hashlib
import json
import os
import re
import signal
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import psycopg2
from psycopg2.extensions import cursor, parse_dsn
from psycopg2.extras import NamedTupleCursor

from svc import settings

FOLDER = Path(__file__).with_name("migrations")
# ASCII alone: file systems differ in how they write other letters, and a file would look renamed.
NAME = re.compile(r"(?P<version>(?!0+_)[0-9]{1,18})_[A-Za-z0-9_-]+(?P<down>\.down)?\.sql")

Migration = namedtuple("Migration", "version name path text checksum")
# What stands at one number. Its file or its record may be missing, and with it applied_at and seconds.
State = namedtuple("State", "version name state applied_at seconds file")

ALONE = "-- no-transaction"

# Nothing is wrong with these states. Every other state says what is wrong.
APPLIED = "applied"
PENDING = "pending"
AHEAD = "applied, newer than this code"
# `up` can accept this one too.
LATE = "pending, older than the newest applied: --allow-out-of-order accepts it"

BEGIN_UP = """
CREATE TABLE IF NOT EXISTS migrations (
    version    bigint PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now(),
    duration   interval,  -- NULL while a file runs outside a transaction, and after it failed
    CONSTRAINT migrations_database_must_be_utf8 CHECK (getdatabaseencoding() = 'UTF8')
);
INSERT INTO migrations (version, name, checksum) VALUES (%(version)s, %(name)s, %(checksum)s)
"""
END_UP = "UPDATE migrations SET duration = clock_timestamp() - applied_at WHERE version = %(version)s"
BEGIN_DOWN = "UPDATE migrations SET duration = NULL WHERE version = %(version)s"
END_DOWN = "DELETE FROM migrations WHERE version = %(version)s"
# The name is qualified, so that the table of another schema in the search_path does not count.
TABLE_EXISTS = "SELECT to_regclass(quote_ident(current_schema()) || '.migrations') IS NOT NULL"
RECORDS = """
SELECT version, name, checksum, extract(epoch FROM duration)::float AS seconds,
       to_char(applied_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') AS applied_at
FROM migrations
"""
# Within EXECUTE, PostgreSQL refuses what would end the transaction.
EXECUTE = "SELECT set_config('svc.file', %s, true); DO $$ BEGIN EXECUTE current_setting('svc.file'); END $$"
# What a file sets must reach neither its record nor the next file.
RESET = "RESET SESSION AUTHORIZATION; RESET ALL; DISCARD TEMP"
TABLES = "SELECT relid::regclass::text AS name, relid AS oid FROM pg_stat_user_tables ORDER BY name"


def up(url: str | None = None, to: int | None = None, dry_run: bool = False, late: bool = False) -> None:
    """Apply what is pending"""
    with connect(url) as db:
        states = lock_and_check(db, APPLIED, PENDING, AHEAD, LATE if late else PENDING)
        if newer := [each.name for each in states if each.state == AHEAD]:
            print(f"the database is ahead of this code: {', '.join(newer)}")
        plan = [each.file for each in states if each.state in (PENDING, LATE) and (to is None or each.version <= to)]
        run(db, plan, BEGIN_UP, END_UP, dry_run)


def down(to: int, dry_run: bool = False) -> None:
    """Take back what is applied, newest first"""
    with connect() as db:
        states = lock_and_check(db, APPLIED, PENDING, LATE)
        applied = [each.file for each in reversed(states) if each.state == APPLIED and each.version > to]
        paths = [file.path.with_suffix(".down.sql") for file in applied]
        plan = [file._replace(path=path, text=read(path)) for file, path in zip(applied, paths, strict=True)]
        print_losses(db, plan)
        run(db, plan, BEGIN_DOWN, END_DOWN, dry_run)


def status(as_json: bool) -> bool:
    """Print the state of every migration"""
    with connect() as db:
        states = read_states(db)
    if as_json:
        print(json.dumps([each._asdict() | {"file": each.file and each.file.path.name} for each in states], indent=2))
    else:
        for each in states:
            print(f"{each.applied_at or '':20}  {each.name}: {each.state}")
    return all(each.state in (APPLIED, AHEAD) for each in states)


def verify() -> bool:
    """Print a line for everything that is wrong"""
    with connect() as db:
        wrong = [each for each in read_states(db) if each.state not in (APPLIED, PENDING, AHEAD)]
    for each in wrong:
        print(f"{each.name}: {each.state}")
    return not wrong


def new(name: str) -> None:
    """Write the next pair of files, to be filled in"""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "migration"
    version = max(read_files(), default=0) + 1
    for ending, comment in ((".sql", name), (".down.sql", f"Take back: {name}")):
        path = FOLDER / f"{version:04}_{slug}{ending}"
        path.write_text(f"-- {' '.join(comment.split())}\n", encoding="utf-8")
        print(path)


def health(applied: list[int]) -> str | None:
    """Why this code cannot work on a database with these versions, or None if it can, as it can with newer versions.

    Reads only the names of files.
    """
    names = [NAME.fullmatch(path.name) for path in FOLDER.glob("*.sql")]
    expected = {int(name["version"]) for name in names if name and not name["down"]}
    if pending := sorted(expected - set(applied)):
        return f"migrations are pending ({', '.join(map(str, pending))}): run `pipenv run migrate`"
    return None


@contextmanager
def connect(url: str | None = None) -> Iterator[cursor]:
    """A cursor in autocommit. Closing its connection rolls back an open transaction and releases the lock.

    Exits with one line if the database refuses anything.
    """
    url = url or settings.load().database()
    # If the runner is killed, the server notices within half a second.
    options = f"-c client_connection_check_interval=500 -c lock_timeout={settings.load().migration_lock_timeout}s"
    fixed = {"application_name": "config-service-migrations", "connect_timeout": 5, "client_encoding": "UTF8"}
    try:
        options += " " + parse_dsn(url).get("options", "")
        with closing(psycopg2.connect(url, cursor_factory=NamedTupleCursor, options=options, **fixed)) as connection:
            connection.autocommit = True
            yield connection.cursor()
    except psycopg2.Error as error:
        raise SystemExit(describe(error)) from None


def lock_and_check(db: cursor, *accepted: str) -> list[State]:
    """The state of every migration. No other runner changes it until the connection ends.

    Exits if a state is not accepted, or if another runner is still at work after MIGRATION_WAIT seconds.
    """
    end = time.monotonic() + settings.load().migration_wait
    # Tried, not waited for: CREATE INDEX CONCURRENTLY would wait for the snapshot of a statement that waits.
    while not fetch_value(db, "SELECT pg_try_advisory_lock(hashtext('svc.migrations'))"):
        if time.monotonic() > end:
            raise SystemExit("another runner is still at work: try later, or see what it waits for")
        time.sleep(0.05)
    states = read_states(db)
    if wrong := [f"{each.name}: {each.state}" for each in states if each.state not in accepted]:
        raise SystemExit(f"refused, nothing was touched: {'; '.join(wrong)}")
    return states


def fetch_value(db: cursor, statement: str) -> Any:
    db.execute(statement)
    return db.fetchone()[0]


def read_states(db: cursor) -> list[State]:
    """The state of every migration, in numeric order."""
    files, records, states = read_files(), {}, []
    if fetch_value(db, TABLE_EXISTS):
        db.execute(RECORDS)
        records = {row.version: row for row in db}
    newest_file, newest_record = max(files, default=0), max(records, default=0)
    for version in sorted(files.keys() | records.keys()):
        file, record = files.get(version), records.get(version)
        if record is None:
            state = PENDING if version > newest_record else LATE
        elif record.seconds is None:
            state = "half-way: it failed, or it still runs; -h says how to repair it"
        elif file is None:
            state = AHEAD if version > newest_file else "applied and its file is gone"
        elif file.name != record.name:
            state = f"applied and its file is now called {file.name}"
        else:
            state = APPLIED if file.checksum == record.checksum else "edited after it was applied"
        name, applied_at, seconds = (record or file).name, record and record.applied_at, record and record.seconds
        states.append(State(version, name, state, applied_at, seconds, file))
    return states


def read_files() -> dict[int, Migration]:
    """Every migration by its number. Exits if a file is named wrongly or cannot be read as text."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        name = NAME.fullmatch(path.name)
        if name is None and path.suffix.lower() == ".sql":
            raise SystemExit(f"{path.name}: a migration is called NUMBER_name.sql or NUMBER_name.down.sql")
        if name and not name["down"]:
            version, text = int(name["version"]), read(path)
            if version in files:
                raise SystemExit(f"{files[version].path.name} and {path.name} have the same number")
            files[version] = Migration(version, path.stem, path, text, hashlib.sha256(text.encode()).hexdigest())
    return files


def read(path: Path) -> str:
    """The text without a byte order mark, every line ending in a line feed."""
    text = path.read_text("utf-8-sig", errors="surrogateescape")
    if re.search("[\0\ud800-\udfff]", text):
        raise SystemExit(f"{path.name}: holds what is not UTF-8, or NUL, which PostgreSQL cannot read")
    return text


def print_losses(db: cursor, plan: list[Migration]) -> None:
    """Print which tables that hold rows go when the plan takes files back.

    The plan runs in a transaction that is rolled back. Files that run outside a transaction are left out.
    """
    db.execute(f"BEGIN; {TABLES}")
    before = db.fetchall()
    for file in plan:
        if not file.text.startswith(ALONE):
            execute(db, file, BEGIN_DOWN, END_DOWN)
    db.execute(TABLES)
    kept = {table.oid for table in db}
    db.execute("ROLLBACK")
    for table in before:
        if table.oid not in kept and (rows := fetch_value(db, f"SELECT count(*) FROM {table.name}")):
            print(f"drops {table.name} ({rows:,} rows)", flush=True)


def run(db: cursor, plan: list[Migration], begin: str, end: str, dry_run: bool) -> None:
    """Run each file between two changes of its record, all in one transaction unless the file asks for none."""
    for file in plan:
        if not re.sub(r"--.*|/\*(?s:.*?)\*/|[\s;]", "", file.text):
            raise SystemExit(f"{file.path.name}: holds no statement, only comments or nothing: write its SQL")
    if not plan:
        print("nothing to do")
    for file in plan:
        if dry_run:
            print(f"would run {file.path.name}")
            continue
        started = time.monotonic()
        execute(db, file, begin if file.text.startswith(ALONE) else f"BEGIN; {begin}", f"{end}; COMMIT")
        print(f"{file.path.name} in {(time.monotonic() - started) * 1000:.0f} ms", flush=True)


def execute(db: cursor, file: Migration, before: str, after: str) -> None:
    """Run a file between two statements. Exits with its name, the line if PostgreSQL tells the place, and the error."""
    try:
        db.execute(before, file._asdict())
        if file.text.startswith(ALONE):
            db.execute(file.text)
        else:
            db.execute(EXECUTE, [file.text])
        db.execute(f"{RESET}; {after}", file._asdict())
    except psycopg2.Error as error:
        # A position counts within the whole text, or within the body of a function in it.
        start = file.text.find(error.diag.internal_query or file.text)
        position = error.diag.internal_position or error.diag.statement_position
        line = f":{file.text.count('\n', 0, start + int(position) - 1) + 1}" if position and start >= 0 else ""
        raise SystemExit(f"{file.path.name}{line}: {describe(error)}") from None


def describe(error: psycopg2.Error) -> str:
    """The error in one line, without the statement and without its values."""
    return " ".join((error.diag.message_primary or str(error)).split())


def main(arguments: list[str]) -> int:
    parser = ArgumentParser("svc.migrations", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error = exit_for_usage
    commands = parser.add_subparsers(metavar="COMMAND", help="`up` if none is given; COMMAND -h shows its options")
    for function in (up, down, status, verify, new):
        command = commands.add_parser(function.__name__, help=function.__doc__, allow_abbrev=False)
        command.error = exit_for_usage
        command.set_defaults(function=function)
        command.add_argument("--database-url", metavar="URL", help="instead of DATABASE_URL")
        if function in (up, down):
            command.add_argument("--to", type=int, metavar="VERSION", required=function is down, help="end at VERSION")
            command.add_argument("--dry-run", action="store_true", help="change nothing, only say what would run")
    commands.choices["up"].add_argument("--allow-out-of-order", dest="late", action="store_true")
    commands.choices["status"].add_argument("--json", action="store_true", dest="as_json")
    commands.choices["new"].add_argument("name")
    if {*commands.choices, "-h", "--help"}.isdisjoint(arguments):
        arguments = ["up", *arguments]
    given = vars(parser.parse_args(arguments))
    if (url := given.pop("database_url")) is not None:
        os.environ["DATABASE_URL"] = url.strip() or "="  # settings refuse "=", and take a blank for not set
    try:
        return 1 if given.pop("function")(**given) is False else 0
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from None


def exit_for_usage(message: str) -> NoReturn:
    """Exit with one line that repeats no value: it may be a URL with its password, given in the wrong place."""
    message = re.sub(r"(unrecognized arguments|invalid \w+|explicit argument)\b.*", r"\1", message, flags=re.DOTALL)
    print(f"wrong usage: {message}; -h explains", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    # psycopg2 waits in C, where Python's own handler does not run: end at once, the server takes back what is open.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))
