"""The migration runner: applies the SQL files beside it to PostgreSQL, each once, in the order of their numbers.

A file NUMBER_name.sql runs in one transaction with its record in the table `migrations`, NUMBER_name.down.sql takes it
back. A file whose first line is `-- no-transaction` runs statement by statement outside one. One runner works at a
time. Before anything runs, all is refused if an applied file was edited, renamed or deleted, or a number skipped.

exit codes: 0 done, or nothing pending; 1 pending, refused or failed, as one line on stderr says; 2 wrong usage
"""

import argparse
import hashlib
import json
import re
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import connection, make_dsn, parse_dsn
from psycopg2.extras import RealDictCursor
from pydantic import SecretStr

from svc import settings

FOLDER = Path(__file__).with_name("migrations")
NO_TRANSACTION = "-- no-transaction"

# `text` as it is run and summed: without byte order mark, lines ending in \n.
Migration = namedtuple("Migration", "version name path text checksum")


# --- Files ---


def read_files(folder: Path) -> list[Migration]:
    """The migrations of a folder in numeric order. Exits with one line if a file cannot be one."""
    found = []
    for path in folder.glob("*.sql"):
        name = re.fullmatch(r"(\d{1,9})_(\w[\w.-]*)", path.name.removesuffix(".sql").removesuffix(".down"))
        if name is None:
            raise SystemExit(f"{path.name}: a migration is called NUMBER_name.sql or NUMBER_name.down.sql")
        if not path.name.endswith(".down.sql"):
            text = _read(path)
            found.append(Migration(int(name[1]), path.stem, path, text, hashlib.sha256(text.encode()).hexdigest()))
    return sorted(found)


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SystemExit(f"{path.name}: not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def down_path(migration: Migration) -> Path:
    return migration.path.with_suffix(".down.sql")


# What may hold a semicolon that ends no statement (PostgreSQL manual, 4.1 Lexical Structure), words and single marks.
_TOKEN = re.compile(
    r"""
      --[^\n]*
    | /\*
    | [eE]'(?:[^'\\]|\\.|'')*'
    | '(?:[^']|'')*'
    | "(?:[^"]|"")*"
    | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$
    | \w[\w$]*
    | \S
    """,
    re.DOTALL | re.VERBOSE,
)
_ENDS_TRANSACTION = {"BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT"}


def split(text: str) -> list[tuple[int, str]]:
    """The statements of a file, each with the line it begins at."""
    statements, words = [], []
    begin, position, parentheses, atomic = None, 0, 0, 0
    while token := _TOKEN.search(text, position):
        position = token.end()
        mark = token[0].upper()
        if mark.startswith("--"):
            continue
        if mark == "/*":
            position = _comment_end(text, position)
            continue
        if mark == ";" and parentheses == 0 and atomic == 0:
            if begin is not None:
                statements.append((text.count("\n", 0, begin) + 1, text[begin:position]))
            begin, words = None, []
            continue
        if begin is None:
            begin = token.start()
        parentheses += (mark == "(") - (mark == ")")
        # The body of a standard SQL function: BEGIN ATOMIC … END, in which CASE … END may stand.
        atomic += (mark == "ATOMIC" and words[-1:] == ["BEGIN"]) + (atomic > 0 and mark == "CASE")
        atomic -= atomic > 0 and mark == "END"
        words.append(mark)
    if begin is not None:
        statements.append((text.count("\n", 0, begin) + 1, text[begin:]))
    return statements


def _comment_end(text: str, position: int) -> int:
    depth = 1
    for mark in re.compile(r"/\*|\*/").finditer(text, position):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(text)


def _checked(path: Path) -> list[tuple[int, str]]:
    """The statements of a file. Exits with one line if it cannot run as a migration."""
    text = _read(path)
    if "\0" in text:
        raise SystemExit(f"{path.name}: holds a NUL byte, which PostgreSQL cannot read")
    statements = split(text)
    if not statements:
        raise SystemExit(f"{path.name}: holds no statement, only comments or nothing")
    for line, statement in statements:
        first = re.match(r"\w*", statement)[0].upper()
        if first in _ENDS_TRANSACTION or re.match(r"PREPARE\s+TRANSACTION\b", statement, re.IGNORECASE):
            raise SystemExit(f"{path.name}:{line}: {first} is the runner's to say; take it out")
    return statements


# --- The database ---


@contextmanager
def _connected(url: str) -> Iterator[connection]:
    """A connection of the runner's own, closed at the end. Exits with one line if there is none."""
    config = settings.load()
    given = parse_dsn(url)
    # A server notices within half a second that its runner was killed, and lets go of the locks.
    options = f"-c lock_timeout={config.migration_lock_timeout * 1000:.0f} -c client_connection_check_interval=500"
    dsn = make_dsn(
        **{
            "application_name": "config-service-migrations",
            "connect_timeout": 5,
            **given,
            "options": f"{options} {given.get('options', '')}",
        }
    )
    try:
        made = psycopg2.connect(dsn, cursor_factory=RealDictCursor)
    except psycopg2.Error as error:
        raise SystemExit(f"cannot connect: {_line(error)}") from None
    try:
        made.autocommit = True
        yield made
    except psycopg2.Error as error:
        raise SystemExit(f"{error.pgcode or 'connection lost'}: {_line(error)}") from None
    finally:
        made.close()


def _line(error: psycopg2.Error) -> str:
    message = error.diag.message_primary or str(error).strip() or type(error).__name__
    return " ".join(message.split())


def _rows(conn: connection, statement: str, params: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    with conn.cursor() as cursor:
        cursor.execute(statement, params)
        return cursor.fetchall() if cursor.description else []


def _table(conn: connection) -> str:
    """The qualified name of the table `migrations`, so that no file's search_path hides it."""
    [row] = _rows(conn, "SELECT format('%I.migrations', current_schema()) AS name, current_schema() AS schema")
    if row["schema"] is None:
        raise SystemExit("no schema of the search_path exists, or this user may not use it")
    return row["name"]


def _applied(conn: connection, table: str) -> dict[int, dict[str, Any]]:
    [row] = _rows(conn, "SELECT to_regclass(%(table)s) IS NOT NULL AS exists", {"table": table})
    if not row["exists"]:
        return {}
    found = _rows(
        conn,
        f"""
        SELECT version, name, checksum, applied_at, extract(epoch FROM duration)::float AS seconds
        FROM {table}
        ORDER BY version
        """,
    )
    return {row["version"]: row for row in found}


@contextmanager
def _locked(conn: connection, table: str) -> Iterator[None]:
    """The only runner at work on this schema. Exits with one line after MIGRATION_WAIT seconds of waiting for another.

    Tried again and again instead of waited for: a statement that waits would hold a snapshot, for which the CREATE
    INDEX CONCURRENTLY of the runner at work would wait in turn.
    """
    wait = settings.load().migration_wait
    until = time.monotonic() + wait
    attempt = "SELECT pg_try_advisory_lock(hashtext('svc.migrations'), hashtext(%(table)s)) AS held"
    while not _rows(conn, attempt, {"table": table})[0]["held"]:
        if time.monotonic() > until:
            raise SystemExit(f"another runner has been at work for {wait:g} s: see whether it is stuck, or try later")
        time.sleep(0.05)
    # An open transaction elsewhere may be about to create the table too.
    _rows(conn, f"SET lock_timeout = {wait * 1000:.0f}")
    _rows(
        conn,
        f"""
        CREATE TABLE IF NOT EXISTS {table} (
            version    integer PRIMARY KEY,
            name       text NOT NULL,
            checksum   text NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now(),
            duration   interval
        )
        """,
    )
    _rows(conn, "RESET lock_timeout")
    yield


def _run(
    conn: connection,
    verb: str,
    path: Path,
    statements: list[tuple[int, str]],
    mark: str,
    record: str,
    migration: Migration,
) -> None:
    """Run a file between two statements of its record. Exits with one line that names the place if it fails.

    All of it is one transaction. Without one, as the file may ask, the mark tells of a file that broke half-way.
    """
    params = {"version": migration.version, "name": migration.name, "checksum": migration.checksum}
    started, line, statement = time.monotonic(), 0, ""
    try:
        with nullcontext() if _read(path).partition("\n")[0].rstrip() == NO_TRANSACTION else conn:
            _rows(conn, mark, params)
            for line, statement in statements:  # noqa: B007
                _rows(conn, statement)
            _rows(conn, record, params)
        _rows(conn, "RESET ALL")
    except psycopg2.Error as error:
        line += statement.count("\n", 0, int(error.diag.statement_position or 1) - 1)
        waited = f" after {settings.load().migration_lock_timeout:g} s: {statement.splitlines()[0]}"
        reason = _line(error) + (waited if error.pgcode == "55P03" else "")
        raise SystemExit(f"{path.name}:{line}: {error.pgcode or 'connection lost'}: {reason}") from None
    print(f"{verb} {path.name} in {(time.monotonic() - started) * 1000:.0f} ms", flush=True)


# --- What is applied, and what should be ---


def findings(files: list[Migration], applied: dict[int, dict[str, Any]], out_of_order: bool = False) -> list[str]:
    """A line for everything in which the files are not what was applied. `out_of_order` lets late files pass."""
    by_version = {file.version: file for file in files}
    found = [
        f"{later.path.name} has the number of {file.path.name}"
        for file, later in pairwise(files)
        if file.version == later.version
    ]
    for version, row in applied.items():
        file = by_version.get(version)
        if row["seconds"] is None:
            found.append(
                f"{row['name']} broke half-way: put right by hand what it left, then either "
                f"DELETE FROM migrations WHERE version = {version}; to run it again, or "
                f"UPDATE migrations SET duration = '0' WHERE version = {version}; to take it for applied"
            )
        if file is None:
            found.append(f"{row['name']} was applied and its file is gone")
        elif file.name != row["name"]:
            found.append(f"{row['name']} was applied and its file is now called {file.name}")
        elif file.checksum != row["checksum"]:
            found.append(f"{row['name']} was edited after it was applied")
    newest = max(applied, default=0)
    late = [file for file in files if file.version not in applied and file.version < newest]
    return found + [
        f"{file.name} is pending and older than the newest applied, {newest}: --allow-out-of-order applies it"
        for file in late
        if not out_of_order
    ]


def _refuse(found: list[str]) -> None:
    if found:
        more = f" (and {len(found) - 1} more: see verify)" if len(found) > 1 else ""
        raise SystemExit(f"refused, nothing was touched: {found[0]}{more}")


def health(applied: list[int]) -> str | None:
    """Why this code cannot work with a schema of these versions, or None if it can."""
    expected = [file.version for file in read_files(FOLDER)]
    if ahead := sorted(set(applied) - set(expected)):
        return f"the database is ahead of this code by migration {', '.join(map(str, ahead))}"
    if pending := sorted(set(expected) - set(applied)):
        return f"migration {', '.join(map(str, pending))} is pending"
    return None


# --- Commands ---


def up(
    url: str, folder: Path = FOLDER, to: int | None = None, dry_run: bool = False, out_of_order: bool = False
) -> None:
    """Apply what is pending, in numeric order, up to version `to`. Exits with one line if anything is wrong."""
    files = read_files(folder)
    if to is not None and to not in {file.version for file in files}:
        raise SystemExit(f"no file has the number {to}")
    with _connected(url) as conn:
        table = _table(conn)
        with nullcontext() if dry_run else _locked(conn, table):
            applied = _applied(conn, table)
            _refuse(findings(files, applied, out_of_order))
            pending = [file for file in files if file.version not in applied and (to is None or file.version <= to)]
            plan = [(file, _checked(file.path)) for file in pending]
            for file, statements in plan:
                if dry_run:
                    print(f"would apply {file.path.name}")
                    continue
                mark = f"INSERT INTO {table} (version, name, checksum) VALUES (%(version)s, %(name)s, %(checksum)s)"
                record = f"UPDATE {table} SET duration = clock_timestamp() - applied_at WHERE version = %(version)s"
                _run(conn, "applied", file.path, statements, mark, record, file)
            if not plan:
                print("nothing is pending")


def down(
    url: str,
    folder: Path = FOLDER,
    to: int | None = None,
    steps: int = 1,
    dry_run: bool = False,
    out_of_order: bool = False,
) -> None:
    """Take back the newest `steps`, or all above `to`, newest first. Exits with one line if anything is wrong."""
    files = read_files(folder)
    with _connected(url) as conn:
        table = _table(conn)
        with nullcontext() if dry_run else _locked(conn, table):
            applied = _applied(conn, table)
            _refuse(findings(files, applied, out_of_order))
            if to is not None and to not in {0, *applied}:
                raise SystemExit(f"version {to} is not applied")
            newest_first = [file for file in reversed(files) if file.version in applied]
            chosen = newest_first[:steps] if to is None else [file for file in newest_first if file.version > to]
            paths = [down_path(file) for file in chosen]
            if missing := [path.name for path in paths if not path.exists()]:
                raise SystemExit(f"refused, nothing was touched: there is no {missing[0]}")
            plan = [(file, path, _checked(path)) for file, path in zip(chosen, paths, strict=True)]
            for file, path, statements in plan:
                if dry_run:
                    print(f"would take back {path.name}")
                    continue
                mark = f"UPDATE {table} SET duration = NULL WHERE version = %(version)s"
                record = f"DELETE FROM {table} WHERE version = %(version)s"
                _run(conn, "took back", path, statements, mark, record, file)
            if not plan:
                print("nothing is applied")


def status(url: str, folder: Path = FOLDER, as_json: bool = False) -> bool:
    """Print every migration and its state. True if nothing is pending or wrong."""
    files = read_files(folder)
    with _connected(url) as conn:
        applied = _applied(conn, _table(conn))
    by_version = {file.version: file for file in files}
    newest = max(applied, default=0)
    shown = []
    for version in sorted(by_version.keys() | applied.keys()):
        file, row = by_version.get(version), applied.get(version)
        if row is None:
            state = "pending" if version > newest else "out of order"
        elif row["seconds"] is None:
            state = "half-way"
        elif file is None:
            state = "deleted"
        elif file.name != row["name"]:
            state = "renamed"
        else:
            state = "applied" if file.checksum == row["checksum"] else "edited"
        shown.append(
            {
                "version": version,
                "name": row["name"] if row else file.name,
                "state": state,
                "applied_at": row and row["applied_at"].astimezone(UTC).isoformat(timespec="seconds"),
                "seconds": row and row["seconds"],
            }
        )
    if as_json:
        print(json.dumps(shown, indent=2))
    else:
        width = max((len(each["name"]) for each in shown), default=0)
        for each in shown:
            took = "" if each["seconds"] is None else f"{each['seconds'] * 1000:.0f} ms"
            print(f"{each['name']:{width}}  {each['state']:12}  {each['applied_at'] or '':25}  {took}".rstrip())
    return not findings(files, applied) and all(each["state"] == "applied" for each in shown)


def verify(url: str, folder: Path = FOLDER) -> bool:
    """Print a line for each finding. True if there is none."""
    files = read_files(folder)
    with _connected(url) as conn:
        found = findings(files, _applied(conn, _table(conn)))
    for finding in found:
        print(finding)
    return not found


def new(name: str, folder: Path = FOLDER) -> None:
    """Write the next pair of files, empty but for a comment, and print their paths."""
    slug = re.sub(r"\W+", "_", name.strip().lower()).strip("_")
    if not slug:
        raise SystemExit("a migration needs a name of letters or digits")
    version = max((file.version for file in read_files(folder)), default=0) + 1
    for ending, comment in ((".sql", name), (".down.sql", f"Take back: {name}")):
        path = folder / f"{version:04}_{slug}{ending}"
        path.write_text(f"-- {' '.join(comment.split())}\n", encoding="utf-8")
        print(path)


def main(arguments: list[str] | None = None) -> int:
    # psycopg2 waits in C, where Python's own handler would not run: end at once, the server undoes what is open.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not {"-h", "--help", *COMMANDS} & set(arguments):
        arguments = ["up", *arguments]
    given = vars(_parser().parse_args(arguments))
    command = given.pop("command")
    url = given.pop("url")
    if command != "new":
        given["url"] = settings.check_database(SecretStr(url)).get_secret_value() if url else settings.load().database()
    return 1 if COMMANDS[command](**given) is False else 0


COMMANDS = {"status": status, "up": up, "down": down, "verify": verify, "new": new}


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("svc.migrations", description=__doc__, formatter_class=plain)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="up, if there is none:")
    for name, summary in {
        "status": "every migration: applied, pending or what is wrong with it; exit 1 unless all are applied",
        "up": "apply what is pending",
        "down": "take back what is applied, newest first, one unless told otherwise",
        "verify": "a line for each applied file that was edited, renamed or deleted, and the like; exit 1 if any",
        "new": "write the next pair of files",
    }.items():
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument(
            "--folder", type=Path, default=FOLDER, help="where the files are, instead of beside the code"
        )
        command.add_argument("--database-url", dest="url", metavar="URL", help="instead of DATABASE_URL")
        if name == "new":
            command.add_argument("name", metavar="NAME")
        if name == "status":
            command.add_argument("--json", dest="as_json", action="store_true", help="for machines")
        if name in ("up", "down"):
            command.add_argument("--to", type=int, metavar="VERSION", help="the version to end at")
            command.add_argument("--dry-run", action="store_true", help="say what would run, and run nothing")
            accept = "take pending files that are older than the newest applied"
            command.add_argument("--allow-out-of-order", dest="out_of_order", action="store_true", help=accept)
        if name == "down":
            command.add_argument("--steps", type=int, default=1, metavar="N", help="how many; all of them with --to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
