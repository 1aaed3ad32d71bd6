"""Applies SQL files to PostgreSQL, each once, in the order of their numbers: python -m svc.migrations [COMMAND]

    status [--json]                  every migration: applied, pending, or what is wrong with it
    up [--to VERSION]                apply what is pending; the same as no command
    down [--to VERSION | --steps N]  take back what is applied, newest first; one step unless told otherwise
    verify                           a line for each applied file that was edited, renamed or deleted, for each
                                     pending one older than the newest applied, and for files with the same number
    new NAME                         write the next numbered pair of files

    --dry-run                        with up and down: say what would run, and run nothing
    --allow-out-of-order             with up and down: accept pending files older than the newest applied
    --database-url URL               instead of DATABASE_URL
    --folder FOLDER                  where the files are, instead of the folder beside the code
    -h, --help                       this text

NUMBER_name.sql runs in one transaction with its record in the table `migrations`; NUMBER_name.down.sql takes it back.
A file whose first line is `-- no-transaction` runs statement by statement outside one, as CREATE INDEX CONCURRENTLY
needs. Files are UTF-8. What `verify` finds, or a file that cannot run, is refused before anything is touched.

One runner works at a time, and others wait for it, at most MIGRATION_WAIT seconds. A statement that has to wait for a
lock longer than MIGRATION_LOCK_TIMEOUT seconds fails, unless its file sets another lock_timeout.

Exit codes: 0 done, and for `status` and `verify` nothing is pending or wrong; 1 pending or wrong, or refused or failed
as a line on stderr says; 2 wrong usage.
"""

import hashlib
import inspect
import json
import re
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
from collections import defaultdict, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import psycopg2
from psycopg2.extensions import cursor, make_dsn, parse_dsn
from psycopg2.extras import RealDictCursor
from pydantic import SecretStr

from svc import settings

FOLDER = Path(__file__).with_name("migrations")

Migration = namedtuple("Migration", "version name path text checksum")
# What is at one number: the file and the record of it, of which one may be missing, and what is wrong, or None.
State = namedtuple("State", "version name state problem applied_at seconds file")


# --- The commands. Each exits with one line if it cannot do its work. ---


def up(url: str, folder: Path = FOLDER, to: int | None = None, dry_run: bool = False, late: bool = False) -> None:
    """Apply what is pending, in numeric order, up to version `to`. `late` accepts what is older than the newest."""
    with _ready(url, folder, dry_run, late) as (db, table, states):
        if to is not None and to not in {each.version for each in states}:
            raise SystemExit(f"no migration has the number {to}")
        pending = [each.file for each in states if each.state != "applied" and (to is None or each.version <= to)]
        begin = f"INSERT INTO {table} (version, name, checksum) VALUES (%(version)s, %(name)s, %(checksum)s)"
        end = f"UPDATE {table} SET duration = clock_timestamp() - applied_at WHERE version = %(version)s"
        _run(db, table, [(file, file.path.name, file.text) for file in pending], begin, end, dry_run)


def down(
    url: str, folder: Path = FOLDER, to: int | None = None, steps: int = 1, dry_run: bool = False, late: bool = False
) -> None:
    """Take back the newest `steps`, or all above version `to`, newest first."""
    with _ready(url, folder, dry_run, late) as (db, table, states):
        if steps < 1:
            raise SystemExit("--steps must be 1 or more")
        newest_first = [each.file for each in reversed(states) if each.state == "applied"]
        if to not in {None, 0, *(file.version for file in newest_first)}:
            raise SystemExit(f"version {to} is not applied")
        chosen = newest_first[:steps] if to is None else [file for file in newest_first if file.version > to]
        paths = [file.path.with_suffix(".down.sql") for file in chosen]
        if missing := [path.name for path in paths if not path.exists()]:
            raise SystemExit(f"refused, nothing was touched: there is no {missing[0]}")
        plan = [(file, path.name, _read(path)) for file, path in zip(chosen, paths, strict=True)]
        begin = f"UPDATE {table} SET duration = NULL WHERE version = %(version)s"
        end = f"DELETE FROM {table} WHERE version = %(version)s"
        _run(db, table, plan, begin, end, dry_run)


def status(url: str, folder: Path = FOLDER, as_json: bool = False) -> bool:
    """Print every migration and its state. True if nothing is pending or wrong."""
    with _connected(url) as (db, table):
        states = _states(db, table, folder)
    if as_json:
        print(json.dumps([{**each._asdict(), "file": each.file and each.file.path.name} for each in states], indent=2))
    else:
        width = max((len(each.name) for each in states), default=0)
        for each in states:
            took = "" if each.seconds is None else f"{each.seconds * 1000:.0f} ms"
            print(f"{each.name:{width}}  {each.state:12}  {each.applied_at or '':20}  {took}".rstrip())
    return all(each.state == "applied" for each in states)


def verify(url: str, folder: Path = FOLDER) -> bool:
    """Print a line for everything that is wrong. True if nothing is."""
    with _connected(url) as (db, table):
        problems = [each.problem for each in _states(db, table, folder) if each.problem]
    for problem in problems:
        print(problem)
    return not problems


def new(name: str, folder: Path = FOLDER) -> None:
    """Write the next pair of files, empty but for a comment, and print their paths."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not slug:
        raise SystemExit("a migration needs a name of letters or digits")
    version = max((file.version for file in _files(folder)), default=0) + 1
    for ending, comment in ((".sql", name), (".down.sql", f"Take back: {name}")):
        path = folder / f"{version:04}_{slug}{ending}"
        with path.open("x", encoding="utf-8") as file:
            file.write(f"-- {' '.join(comment.split())}\n")
        print(path)


def health(applied: list[int], folder: Path = FOLDER) -> str | None:
    """Why this code cannot work with a schema of these versions, or None if it can. Reads only the names of files."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("*.sql")]
    expected = {int(name["version"]) for name in names if name and not name["down"]}
    if ahead := sorted(set(applied) - expected):
        return f"the database is ahead of this code by migration {', '.join(map(str, ahead))}"
    if pending := sorted(expected - set(applied)):
        return f"migrations are pending ({', '.join(map(str, pending))}): run `pipenv run migrate`"
    return None


@contextmanager
def _ready(url: str, folder: Path, dry_run: bool, late: bool) -> Iterator[tuple[cursor, str, list[State]]]:
    """A connection, the table of records and all states, with nothing wrong and no other runner at work."""
    with _connected(url) as (db, table):
        if not dry_run:
            _lock(db, table)
        states = _states(db, table, folder)
        accepted = "out of order" if late else None
        if problems := [each.problem for each in states if each.problem and each.state != accepted]:
            more = f" (and {len(problems) - 1} more: see verify)" if len(problems) > 1 else ""
            raise SystemExit(f"refused, nothing was touched: {problems[0]}{more}")
        yield db, table, states


def _states(db: cursor, table: str, folder: Path) -> list[State]:
    """The state of every migration, in numeric order."""
    files, records = defaultdict(list), {}
    for file in _files(folder):
        files[file.version].append(file)
    db.execute("SELECT to_regclass(%(table)s) IS NOT NULL AS exists", {"table": table})
    if db.fetchone()["exists"]:
        at = "to_char(applied_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') AS applied_at"
        db.execute(f"SELECT version, name, checksum, {at}, extract(epoch FROM duration)::float AS seconds FROM {table}")
        records = {row["version"]: row for row in db}
    newest, states = max(records, default=0), []
    for version in sorted(files.keys() | records.keys()):
        file, *others = files[version] or [None]
        record = records.get(version)
        name = record["name"] if record else file.name
        state, problem = "applied", None
        if others:
            state, problem = "ambiguous", f"{file.name} and {others[0].name} have the same number"
        elif record is None and version > newest:
            state = "pending"
        elif record is None:
            state = "out of order"
            problem = f"{name} is pending and older than the newest applied, {newest}: --allow-out-of-order accepts it"
        elif record["seconds"] is None:
            state = "half-way"
            problem = (
                f"{name} broke half-way: put right by hand what it left, then either "
                f"DELETE FROM migrations WHERE version = {version}; if none of it is there, or "
                f"UPDATE migrations SET duration = '0' WHERE version = {version}; if all of it is"
            )
        elif file is None:
            state, problem = "deleted", f"{name} is applied and its file is gone"
        elif file.name != name:
            state, problem = "renamed", f"{name} is applied and its file is now called {file.name}"
        elif file.checksum != record["checksum"]:
            state, problem = "edited", f"{name} was edited after it was applied"
        when = (record["applied_at"], record["seconds"]) if record else (None, None)
        states.append(State(version, name, state, problem, *when, file))
    return states


# --- Files ---

# ASCII alone: file systems do not agree on how to write the rest, so that a file would seem to be renamed.
_NAME = re.compile(r"(?P<version>(?!0+_)[0-9]{1,18})_[A-Za-z0-9_-]+(?P<down>\.down)?\.sql")


def _files(folder: Path) -> list[Migration]:
    found = []
    for path in folder.iterdir():
        name = _NAME.fullmatch(path.name)
        if name is None and path.suffix.lower() == ".sql":
            raise SystemExit(f"{path.name}: a migration is called NUMBER_name.sql or NUMBER_name.down.sql")
        if name and not name["down"]:
            text = _read(path)
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append(Migration(int(name["version"]), path.stem, path, text, digest))
    return sorted(found)


def _read(path: Path) -> str:
    """The text as it is run and summed: without a byte order mark, every line ending in a line feed."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SystemExit(f"{path.name}: not UTF-8") from None
    if "\0" in text:
        raise SystemExit(f"{path.name}: holds a NUL byte, which PostgreSQL cannot read")
    return text.replace("\r\n", "\n").replace("\r", "\n")


# What may hold a semicolon that ends no statement (PostgreSQL manual, 4.1 Lexical Structure), words and single marks.
_TOKEN = re.compile(
    r"""
      --[^\n]*
    | /\*
    | [eE]'(?:[^'\\]|\\.|'')*'
    | '[^']*'
    | "[^"]*"
    | \$(?P<tag>(?:[^\W\d]\w*)?)\$.*?\$(?P=tag)\$
    | \w[\w$]*
    | \S
    """,
    re.DOTALL | re.VERBOSE,
)
_COMMENT = re.compile(r"/\*|\*/")
_CONTROL = re.compile(r"(BEGIN|START|COMMIT|END|ROLLBACK|ABORT|PREPARE\s+TRANSACTION|DISCARD)\b", re.IGNORECASE)


def _statements(name: str, text: str) -> list[tuple[int, str]]:
    """The statements of a file, each with the line it begins at. Exits with one line if it cannot run."""
    found, line, counted = [], 1, 0
    begin, position, previous = None, 0, ""
    comments, depth = 0, 0  # how many are open
    while token := (_COMMENT if comments else _TOKEN).search(text, position):
        position, word = token.end(), token[0].upper()
        comments += (word == "/*") - (word == "*/")
        if comments or word == "*/" or word.startswith("--"):
            continue
        # Semicolons stand in the body of a rule, ( … ; … ), and of an SQL function, BEGIN ATOMIC … CASE … END; … END.
        depth += word == "(" or (previous, word) == ("BEGIN", "ATOMIC")
        depth -= word == ")"
        if depth > 0 and previous != "AS":  # after which it is a column's name
            depth += (word == "CASE") - (word == "END")
        previous = word
        if begin is None and word != ";":
            begin = token.start()
            line, counted = line + text.count("\n", counted, begin), begin
        if begin is not None and word == ";" and depth <= 0:
            found.append((line, text[begin:position]))
            begin = None
    if begin is not None:
        found.append((line, text[begin:]))
    if comments:
        raise SystemExit(f"{name}: a comment in it does not end")
    if not found:
        raise SystemExit(f"{name}: holds no statement, only comments or nothing: write its SQL")
    for line, statement in found:
        if control := _CONTROL.match(statement):
            raise SystemExit(f"{name}:{line}: {control[0].upper()} is for the runner to say; take it out")
    return found


# --- The database ---


@contextmanager
def _connected(url: str) -> Iterator[tuple[cursor, str]]:
    """A connection of the runner's own and the qualified name of its table, which no file's search_path then hides.

    It is in autocommit, and closing it takes back whatever transaction is open.
    """
    given = parse_dsn(url)
    # A server notices within half a second that its runner was killed, and lets go of the locks.
    options = f"-c lock_timeout={settings.load().migration_lock_timeout * 1000:.0f}"
    options += f" -c client_connection_check_interval=500 {given.get('options', '')}"
    defaults = {"application_name": "config-service-migrations", "connect_timeout": 5}
    dsn = make_dsn(**{**defaults, **given, "options": options, "client_encoding": "UTF8"})
    try:
        connection = psycopg2.connect(dsn, cursor_factory=RealDictCursor)
    except psycopg2.Error as error:
        raise SystemExit(f"cannot connect: {_line(error)}") from None
    try:
        connection.autocommit = True
        db = connection.cursor()
        db.execute("SELECT quote_ident(current_schema()) || '.migrations' AS name, getdatabaseencoding() AS encoding")
        row = db.fetchone()
        if row["name"] is None:
            raise SystemExit("no schema of the search_path exists, or this user may not use it")
        if row["encoding"] != "UTF8":
            raise SystemExit(f"the database has the encoding {row['encoding']}: make it with ENCODING 'UTF8'")
        yield db, row["name"]
    except psycopg2.Error as error:
        raise SystemExit(_line(error)) from None
    finally:
        connection.close()


def _line(error: psycopg2.Error) -> str:
    message = " ".join((error.diag.message_primary or str(error)).split())
    return f"{error.pgcode}: {message}" if error.pgcode else message


def _lock(db: cursor, table: str) -> None:
    """Be the only runner at work in this schema until the connection ends, or give up after MIGRATION_WAIT.

    Tried again and again instead of waited for: a statement that waits would hold a snapshot, for which the CREATE
    INDEX CONCURRENTLY of the runner at work would wait in turn.
    """
    wait, started = settings.load().migration_wait, time.monotonic()
    while True:
        db.execute("SELECT pg_try_advisory_lock(hashtext('svc.migrations'), hashtext(%s)) AS held", [table])
        if db.fetchone()["held"]:
            return
        if time.monotonic() - started > wait:
            raise SystemExit(f"another runner is still at work after {wait:g} s: try later, or see what it waits for")
        time.sleep(0.05)


def _run(db: cursor, table: str, plan: list[tuple[Migration, str, str]], begin: str, end: str, dry_run: bool) -> None:
    """Run each text of the plan between two statements on its record, in one transaction unless it asks for none.

    Without one, a record that has its beginning and not its end tells of a file that broke half-way.
    """
    checked = [(*each, _statements(*each[1:])) for each in plan]
    if checked and not dry_run:
        # An open transaction elsewhere may be about to create it too: wait for that as for another runner.
        db.execute(
            f"""
            BEGIN;
            SET LOCAL lock_timeout = {settings.load().migration_wait * 1000:.0f};
            CREATE TABLE IF NOT EXISTS {table} (
                version    bigint PRIMARY KEY,
                name       text NOT NULL,
                checksum   text NOT NULL,
                applied_at timestamptz NOT NULL DEFAULT now(),
                duration   interval
            );
            COMMIT
            """
        )
    for migration, name, text, statements in checked:
        if dry_run:
            print(f"would run {name}")
            continue
        started = time.monotonic()
        # What the file set for its session must reach neither the record nor the next file.
        reset = "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL"
        steps = [(None, begin), *statements, (None, reset), (None, end)]
        if transaction := text.partition("\n")[0].rstrip() != "-- no-transaction":
            steps = [(None, "BEGIN"), *steps, (None, "COMMIT")]
        for line, statement in steps:
            try:
                db.execute(statement, None if line else migration._asdict())
            except psycopg2.Error as error:
                inside = statement.count("\n", 0, int(error.diag.statement_position or 1) - 1)
                place = f"{name}:{line + inside}" if line else name
                waited = f" in {statement.splitlines()[0]}" if error.pgcode == "55P03" else ""
                left = "" if transaction or not line else "; half-way now: see verify"
                raise SystemExit(f"{place}: {_line(error)}{waited}{left}") from None
        print(f"{name} in {(time.monotonic() - started) * 1000:.0f} ms", flush=True)
    if not checked:
        print("nothing to do")


# --- The command line ---


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser("svc.migrations", argument_default=SUPPRESS, allow_abbrev=False)
    parser.format_help = lambda: __doc__
    parser.error = _wrong_usage
    commands = {command.__name__: command for command in (status, up, down, verify, new)}
    parser.add_argument("command", nargs="?", choices=commands, default="up")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--json", action="store_true", dest="as_json")
    end = parser.add_mutually_exclusive_group()
    end.add_argument("--to", type=int)
    end.add_argument("--steps", type=int)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--allow-out-of-order", action="store_true", dest="late")
    parser.add_argument("--database-url", type=_database, dest="url")
    parser.add_argument("--folder", type=Path)
    given = vars(parser.parse_intermixed_args(arguments))
    command = commands[given.pop("command")]
    if command is not new and "url" not in given:
        given["url"] = settings.load().database()
    try:
        inspect.signature(command).bind(**given)
    except TypeError:
        parser.error(f"wrong arguments for {command.__name__}")
    try:
        return 1 if command(**given) is False else 0
    except OSError as error:
        raise SystemExit(f"{error.filename or 'output'}: {error.strerror}") from None


def _database(url: str) -> str:
    url = url.strip()
    try:
        settings.check_database(SecretStr(url or "="))  # "" would be libpq's default, which nobody named
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    return url


def _wrong_usage(message: str) -> NoReturn:
    """Exit with one line that repeats no value: it may be the URL of the database, given in the wrong place."""
    message = re.sub(r"(unrecognized arguments|invalid \w+|explicit argument)\b.*", r"\1", message, flags=re.DOTALL)
    print(f"svc.migrations: {message}; -h explains", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    # psycopg2 waits in C, where Python's own handler does not run: end at once, the server takes back what is open.
    for number in (signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    sys.exit(main())
