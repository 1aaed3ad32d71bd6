"""Who asks and what they may: bearer tokens (RFC 6750), and `python -m svc.auth`, which makes and revokes them."""

import asyncio
import re
import secrets
from argparse import ArgumentParser
from hashlib import sha256
from time import monotonic
from urllib.parse import unquote

import psycopg2
from fastapi import HTTPException
from starlette.types import Scope

from svc import db, migrations, repo, settings

# Everything else needs a token.
OPEN = {"/", "/docs", "/openapi.json", "/health", "/health/live"}
READ_EVERY = 1.0  # seconds: a token works no longer than that after its end

_tokens: dict[str, db.Row] = {}  # the valid ones, by their hash
_refused: set[str] = set()  # the hashes of others that were sent since they were read
_error: psycopg2.Error | None = None  # why they could not be read the last time
_read_at = _next_read = float("-inf")  # when the last read began, and when one more may begin
_reading = asyncio.Lock()


async def check(scope: Scope) -> None:
    """Admit a request, and set the actor of what it writes. With AUTH=off everybody is admitted, as anonymous.

    Raises HTTPException 401 or 403, and psycopg2.Error if the tokens could never be read.
    """
    path = scope["path"].removeprefix(scope["root_path"])
    if settings.load().auth != "on" or path in OPEN:
        return
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = sent[0].partition(b" ") if len(sent) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer":
        raise _refuse(401, "A token is needed: send Authorization: Bearer.")
    row = await _find(sha256(token.strip()).hexdigest())
    if row is None:
        raise _refuse(401, "This token is unknown, expired or revoked.", "invalid_token")
    repo.actor.set(f"token:{row['name']}")
    if row["application_id"] is not None:
        below = re.match("/api/v1/applications/([^/]*)/configurations(/|$)", path)
        if not below or unquote(below[1]) != row["application_name"]:
            detail = "This token is for the configurations of one application, by name."
            raise _refuse(403, detail, "insufficient_scope")
    if row["role"] != "write" and scope["method"] != "GET":
        raise _refuse(403, "This token may only read.", "insufficient_scope")


def _refuse(status: int, detail: str, error: str | None = None) -> HTTPException:
    challenge = 'Bearer realm="config-service"' + (f', error="{error}"' if error else "")
    return HTTPException(status, detail, {"WWW-Authenticate": challenge})


async def refresh() -> dict[str, db.Row]:
    """The valid tokens by their hash, read again if that is due; while the database is away, the last known."""
    due = monotonic() - READ_EVERY
    if settings.load().auth == "on" and _read_at <= due:
        await _read_since(due)
    return _tokens


async def _find(hash: str) -> db.Row | None:
    """The valid token with this hash. Raises psycopg2.Error if it may be new, and the tokens cannot be read."""
    arrived = monotonic()
    await refresh()
    if hash not in _tokens and hash not in _refused:
        await _read_since(arrived)
        if _error:
            raise _error
        _refused.add(hash)
    return _tokens.get(hash)


async def _read_since(time: float) -> None:
    """Read the tokens, unless that has begun since this time: all who ask meanwhile share one statement.

    It waits until a read is due, which is once a second, and once more after a pause, whatever is sent.
    """
    global _tokens, _error, _read_at, _next_read
    statement = """
        SELECT t.hash, t.name, t.role, t.application_id, a.name AS application_name
        FROM tokens AS t LEFT JOIN applications AS a ON a.id = t.application_id
        WHERE t.expires_at > now() OR t.expires_at IS NULL
    """
    async with _reading:
        if _read_at > time:
            return
        await asyncio.sleep(_next_read - monotonic())
        _read_at = monotonic()
        _next_read = max(_next_read + READ_EVERY, _read_at)
        _refused.clear()
        try:
            tokens = {row["hash"]: row for row in await db.fetch("read_tokens", statement, {}, queue="urgent")}
            _refused.update(_tokens.keys() - tokens.keys())  # what has ended needs no reading
            _tokens, _error = tokens, None
        except psycopg2.Error as error:
            _error = error


# --- The command line ---


def new(name: str, role: str, application: str | None, expires: int | None) -> None:
    """Make a token, and print it: it cannot be shown again"""
    if not re.fullmatch("(?!cfs_)[A-Za-z0-9._@-]{1,64}", name):
        raise SystemExit("the name of a token has 1 to 64 letters, digits, or . _ @ -, and does not begin with cfs_")
    token = f"cfs_{secrets.token_urlsafe(32)}"
    hash = sha256(token.encode()).hexdigest()
    with migrations.connect() as cursor:
        cursor.execute(
            """
            INSERT INTO tokens (name, hash, role, application_id, expires_at)
            SELECT %(name)s, %(hash)s, %(role)s, a.id, now() + make_interval(days => %(expires)s)
            FROM (SELECT) AS one LEFT JOIN applications AS a ON a.name = %(application)s
            WHERE a.id IS NOT NULL OR %(application)s IS NULL
            ON CONFLICT (name) DO NOTHING
            """,
            {"name": name, "hash": hash, "role": role, "application": application, "expires": expires},
        )
        if not cursor.rowcount:
            reason = f"{name} exists already" + (f", or there is no application {application}" if application else "")
            raise SystemExit(f"no token was made: {reason}")
    print(token)


def list_all() -> None:
    """List the tokens, without what is secret"""
    with migrations.connect() as cursor:
        cursor.execute(
            """
            SELECT t.name, t.role, coalesce(a.name, 'all applications') AS application, t.created_at::date AS created,
                   CASE WHEN expires_at <= now() THEN 'expired' ELSE coalesce(expires_at::text, 'never') END AS expires
            FROM tokens AS t LEFT JOIN applications AS a ON a.id = t.application_id
            ORDER BY t.name
            """
        )
        for row in cursor:
            print(f"{row.name}  {row.role}  {row.application}  made {row.created}  expires {row.expires}")


def revoke(name: str) -> None:
    """End a token: within a second it is refused everywhere"""
    with migrations.connect() as cursor:
        cursor.execute("DELETE FROM tokens WHERE name = %(name)s", {"name": name})
        if not cursor.rowcount:
            raise SystemExit("there is no token with this name")


def main() -> None:
    parser = ArgumentParser("pipenv run token", description="Make, list and revoke tokens.")
    parser.error = migrations.exit_for_usage
    commands = parser.add_subparsers(required=True, metavar="new|list|revoke")
    for name, function in (("new", new), ("list", list_all), ("revoke", revoke)):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        command.error = migrations.exit_for_usage
        if function is not list_all:
            command.add_argument("name", metavar="NAME")
    command = commands.choices["new"]
    command.add_argument("--role", choices=["read", "write"], required=True)
    command.add_argument("--application", metavar="NAME", help="only the configurations of this application, by name")
    command.add_argument("--expires", type=int, metavar="DAYS", choices=range(1, 36_501))
    given = vars(parser.parse_args())
    given.pop("function")(**given)


if __name__ == "__main__":
    main()
