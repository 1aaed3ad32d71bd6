"""Every SQL statement of the API. Rows hold an id, an ETag, and the JSON to answer with."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from psycopg2 import OperationalError
from psycopg2.errors import UndefinedTable, UniqueViolation
from psycopg2.extensions import register_adapter
from psycopg2.extras import Json
from pydantic import BaseModel
from ulid import ULID

from svc import db, models
from svc.db import Row
from svc.models import Conditions

# A page of a list ends after so many bytes of documents: it bounds what one request brings into memory at once.
PAGE_BYTES = 1024**2
# How often a write that creates or replaces runs while others create and delete the same.
TRIES = 5
# What the role of the service needs at least.
GRANTS = {
    "applications": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "configurations": ("SELECT", "INSERT", "UPDATE", "DELETE"),
    "configuration_versions": ("SELECT", "INSERT"),
    "tokens": ("SELECT",),
    "migrations": ("SELECT",),
}

# A configuration is found by its id, or by the names of its application and its own.
Key = str | tuple[str, str]

# Who asks, as it will stand in the history of what this request writes.
actor: ContextVar[str] = ContextVar("actor", default="anonymous")


_dump = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))
register_adapter(dict, lambda document: Json(document, _dump))  # psycopg2 calls it in the thread of the statement


# It holds the time as well: in a database that went back in time the numbers of versions repeat.
ETAG = """'"' || {0}.id || '.' || {0}.version || '.' || (extract(epoch FROM {0}.updated_at) * 1000000)::bigint || '"'"""


def _json(columns: str) -> str:
    return f"(SELECT row_to_json(shown) FROM (SELECT {columns}) AS shown)::text"


def _application_json(ids: str) -> str:
    return _json(f"a.id, a.name, a.comments, {ids} AS configuration_ids, a.version, a.created_at, a.updated_at")


def _application(ids: str) -> str:
    return f"a.id, {ETAG.format('a')} AS etag, {_application_json(ids)} AS json"


IDS = "ARRAY(SELECT c.id FROM configurations AS c WHERE c.application_id = a.id ORDER BY c.id)"
# For a write: the ids as they are once it holds the application's row, not as they were when the statement began.
IDS_NOW = "configuration_ids_now(a.id)"
CONFIGURATION_JSON = _json(
    "c.id, c.application_id, c.name, c.comments, c.config, c.version, c.created_at, c.updated_at"
)
CONFIGURATION = f"c.id, {ETAG.format('c')} AS etag, {CONFIGURATION_JSON} AS json"
CHANGE = "v.configuration_id, v.application_id, v.name, v.version, v.operation, v.actor, v.recorded_at"
VERSION_JSON = _json(f"{CHANGE}, v.comments, v.config")
# If-Match and If-None-Match (RFC 9110, section 13.1).
CONDITIONS = f"""
    (%(if_match)s = '{{{{}}}}' OR %(if_match)s && ARRAY['*', {ETAG}]) AND NOT %(if_none_match)s && ARRAY['*', {ETAG}]
"""
# In the FROM of a statement that writes configurations, for the trigger that records their versions.
ACTOR = "set_config('config_service.actor', %(actor)s, true) AS actor"
ID_BY_NAMES = """(
    SELECT named.id
    FROM applications AS a JOIN configurations AS named ON named.application_id = a.id
    WHERE a.name = %(application_name)s AND named.name = %(own_name)s
)"""


def etag_matches(row: Row | None, etags: Iterable[str]) -> bool:
    """Whether the ETag of what a row shows is among these, or is anything where these are *."""
    return row is not None and row["etag"] is not None and not {"*", row["etag"]}.isdisjoint(etags)


def conditions_hold(row: Row, when: Conditions) -> bool:
    return (not when.if_match or etag_matches(row, when.if_match)) and not etag_matches(row, when.if_none_match)


# --- Applications ---


async def create_application(new: models.ApplicationCreate) -> Row:
    statement = f"""
        INSERT INTO applications AS a (id, name, comments)
        VALUES (%(id)s, %(name)s, %(comments)s)
        RETURNING {_application(IDS)}
    """
    [row] = await db.fetch("create_application", statement, {"id": str(ULID()), **dict(new)})
    return row


async def _read_applications(ids: list[str], within: float) -> Mapping[str, Row]:
    statement = f"SELECT {_application(IDS)} FROM applications AS a WHERE a.id = ANY(%(ids)s)"
    return {row["id"]: row for row in await db.fetch("read_applications", statement, {"ids": ids}, within)}


read_application = db.coalesced(_read_applications)


async def find_application(name: str) -> str | None:
    """The id of the application with this name."""
    rows = await db.fetch("find_application", "SELECT id FROM applications WHERE name = %(name)s", {"name": name})
    return rows[0]["id"] if rows else None


def list_applications(wanted: models.ApplicationFilter) -> AsyncIterator[Row]:
    rows = f"""
        applications AS a CROSS JOIN LATERAL (SELECT {IDS} AS ids OFFSET 0) AS own
        WHERE (%(name)s IS NULL OR a.name = %(name)s)
    """
    return _pages("list_applications", _application_json("a.ids"), rows, "a.id", "30 * cardinality(ids)", wanted)


async def update_application(id: str, changes: models.ApplicationUpdate, when: Conditions) -> Row | None:
    statement = f"""
        UPDATE applications AS a
        SET name = coalesce(%(name)s, a.name),
            comments = CASE WHEN %(keep_comments)s THEN a.comments ELSE %(comments)s END
        WHERE a.id = %(id)s AND {CONDITIONS.format("a")}
        RETURNING {_application(IDS_NOW)}
    """
    return await _write("update_application", statement, {"id": id, **_given(changes)}, when, read_application, id)


async def delete_application(id: str, cascade: bool, when: Conditions) -> Row | None:
    """One that has configurations is left alone unless they may go too.

    It is locked before they are counted, so that none comes or goes after that.
    """
    statement = f"""
        DELETE FROM applications AS a USING {ACTOR}
        WHERE a.id = (SELECT id FROM applications WHERE id = %(id)s FOR UPDATE) AND {CONDITIONS.format("a")}
          AND (%(cascade)s OR cardinality({IDS_NOW}) = 0)
        RETURNING {ETAG.format("a")} AS etag, NULL AS json
    """
    return await _write("delete_application", statement, {"id": id, "cascade": cascade}, when, read_application, id)


# --- Configurations ---


async def create_configuration(new: models.ConfigurationCreate) -> Row:
    statement = f"""
        INSERT INTO configurations AS c (id, application_id, name, comments, config)
        SELECT %(id)s, %(application_id)s, %(name)s, %(comments)s, %(config)s FROM {ACTOR}
        RETURNING {CONFIGURATION}
    """
    params = {"id": str(ULID()), "actor": actor.get(), **dict(new)}
    [row] = await db.fetch("create_configuration", statement, params)
    return row


async def _read_by_ids(ids: list[str], within: float) -> Mapping[str, Row]:
    statement = f"SELECT {CONFIGURATION} FROM configurations AS c WHERE c.id = ANY(%(ids)s)"
    return {row["id"]: row for row in await db.fetch("read_configurations", statement, {"ids": ids}, within)}


def _from_names(columns: str) -> str:
    """FROM what has the names. LIMIT 1 makes it two look-ups each: a plain join may read all of an application."""
    return f"""
        FROM unnest(%(application_names)s::text[], %(names)s::text[]) AS key (application_name, name)
        LEFT JOIN LATERAL (SELECT id FROM applications WHERE name = key.application_name LIMIT 1) AS a ON true
        LEFT JOIN LATERAL (
            SELECT {columns} FROM configurations AS c WHERE c.application_id = a.id AND c.name = key.name LIMIT 1
        ) AS c ON true
    """


async def _read_by_names(keys: list[tuple[str, str]], within: float) -> Mapping[tuple[str, str], Row]:
    statement = f"SELECT key.application_name, key.name, a.id AS application_id, c.* {_from_names(CONFIGURATION)}"
    params = {"application_names": [key[0] for key in keys], "names": [key[1] for key in keys]}
    rows = await db.fetch("read_configurations_by_names", statement, params, within)
    return {(row["application_name"], row["name"]): row for row in rows}


_read_by_id = db.coalesced(_read_by_ids)
_read_by_name = db.coalesced(_read_by_names)


def read_configuration(key: Key) -> Awaitable[Row | None]:
    """By names there is always a row: without a configuration its `etag` is None, without an application its
    `application_id` too."""
    return _read_by_id(key) if isinstance(key, str) else _read_by_name(key)


def list_configurations(wanted: models.ConfigurationFilter) -> AsyncIterator[Row]:
    rows = """
        configurations AS c
        WHERE (%(application_id)s IS NULL OR c.application_id = %(application_id)s)
          AND (%(name)s IS NULL OR c.name = %(name)s)
          AND (%(contains)s IS NULL OR c.config @> %(contains)s)
    """
    return _pages("list_configurations", CONFIGURATION_JSON, rows, "c.id", "size", wanted)


async def update_configuration(
    key: Key, changes: models.ConfigurationUpdate, when: Conditions, merge: bool = False
) -> Row | None:
    """Replace the fields that are present. With `merge`, merge the config into what is stored (RFC 7396)."""
    id, params = _find(key)
    config = "merge_patch(c.config, %(config)s)" if merge else "%(config)s"
    statement = f"""
        UPDATE configurations AS c
        SET name = coalesce(%(name)s, c.name),
            comments = CASE WHEN %(keep_comments)s THEN c.comments ELSE %(comments)s END,
            config = coalesce({config}, c.config)
        FROM {ACTOR}
        WHERE c.id = {id} AND {CONDITIONS.format("c")} AND {_in_its_application(id) if changes.name else "true"}
        RETURNING {CONFIGURATION}
    """
    params |= _given(changes)
    return await _write("update_configuration", statement, params, when, read_configuration, key)


async def put_configuration(key: tuple[str, str], new: models.ConfigurationPut, when: Conditions) -> Row | None:
    """Replace the fields that are present, or create the configuration: `created` tells which."""
    id, params = _find(key)
    update = f"""
        UPDATE configurations AS c
        SET comments = CASE WHEN %(keep_comments)s THEN c.comments ELSE %(comments)s END,
            config = coalesce(%(config)s, c.config)
        FROM {ACTOR}
        WHERE c.id = {id} AND {CONDITIONS.format("c")}
    """
    source = f"""
        SELECT %(id)s, a.id, %(own_name)s, %(comments)s, %(config)s
        FROM applications AS a, {ACTOR}
        WHERE a.name = %(application_name)s AND {id} IS NULL
    """
    params |= {"id": str(ULID()), **_given(new)}
    return await _write_or_create("put_configuration", update, source, params, when, key)


async def delete_configuration(key: Key, when: Conditions) -> Row | None:
    id, params = _find(key)
    statement = f"""
        DELETE FROM configurations AS c USING {ACTOR}
        WHERE c.id = {id} AND {CONDITIONS.format("c")} AND {_in_its_application(id)}
        RETURNING {ETAG.format("c")} AS etag, NULL AS json
    """
    return await _write("delete_configuration", statement, params, when, read_configuration, key)


async def read_etags(keys: Collection[Key]) -> dict[Key, str]:
    """The ETags of configurations. Those that do not exist are not among them."""
    statement = f"""
        SELECT c.id, {ETAG.format("c")} AS etag, NULL AS application_name, NULL AS name
        FROM configurations AS c
        WHERE c.id = ANY(%(ids)s::text[])
        UNION ALL
        SELECT c.id, c.etag, key.application_name, key.name
        {_from_names(f"c.id, {ETAG.format('c')} AS etag")}
        WHERE c.id IS NOT NULL
    """
    names = [key for key in keys if isinstance(key, tuple)]
    params = {
        "ids": [key for key in keys if isinstance(key, str)],
        "application_names": [key[0] for key in names],
        "names": [key[1] for key in names],
    }
    rows = await db.fetch("read_etags", statement, params)
    return {row["id"] if row["name"] is None else (row["application_name"], row["name"]): row["etag"] for row in rows}


# --- Versions of configurations ---


async def has_versions(id: str) -> bool:
    """Whether there is, or was, a configuration with this id."""
    statement = "SELECT FROM configuration_versions WHERE configuration_id = %(id)s LIMIT 1"
    return bool(await db.fetch("has_versions", statement, {"id": id}))


def list_versions(id: str, wanted: models.VersionFilter) -> AsyncIterator[Row]:
    """Newest first."""
    rows = "configuration_versions AS v WHERE v.configuration_id = %(id)s"
    return _pages("list_versions", VERSION_JSON, rows, "v.version", "size", wanted, id=id)


async def read_version(id: str, version: int) -> Row | None:
    statement = f"""
        SELECT {VERSION_JSON} AS json
        FROM configuration_versions AS v
        WHERE v.configuration_id = %(id)s AND v.version = %(version)s
    """
    rows = await db.fetch("read_version", statement, {"id": id, "version": version})
    return rows[0] if rows else None


async def restore_version(id: str, version: int, when: Conditions) -> Row | None:
    """Make name, comments and config of a version the newest again. What was deleted is created again under its id.

    A version that records a deletion has no config, so there is nothing to restore.
    """
    chosen = """
        configuration_versions AS v
        WHERE v.configuration_id = %(id)s AND v.version = %(version)s AND v.config IS NOT NULL
    """
    update = f"""
        UPDATE configurations AS c
        SET name = v.name, comments = v.comments, config = v.config
        FROM {ACTOR}, {chosen} AND c.id = v.configuration_id AND {CONDITIONS.format("c")}
          AND {_in_its_application("%(id)s")}
    """
    source = f"""
        SELECT %(id)s, v.application_id, v.name, v.comments, v.config
        FROM {ACTOR}, {chosen} AND v.application_id IN (SELECT id FROM applications)
          AND NOT EXISTS (SELECT FROM configurations WHERE id = %(id)s)
    """
    return await _write_or_create("restore_version", update, source, {"id": id, "version": version}, when, id)


def list_changes(wanted: models.ChangeFilter) -> AsyncIterator[Row]:
    """Newest first, without documents."""
    rows = "configuration_versions AS v WHERE (%(application_id)s IS NULL OR v.application_id = %(application_id)s)"
    return _pages("list_changes", _json(f"v.position, {CHANGE}"), rows, "v.position", "0", wanted)


# --- The database itself ---


async def read_state() -> Row:
    """Whether the database is read-only, which migrations are applied, and which grants this role lacks."""
    statement = """
        SELECT current_setting('transaction_read_only')::bool AS read_only,
               ARRAY(SELECT version FROM migrations WHERE duration IS NOT NULL ORDER BY version) AS migrations,
               ARRAY(
                   SELECT privilege || ' on ' || relation
                   FROM unnest(%(relations)s, %(privileges)s) AS needed (relation, privilege)
                   WHERE NOT has_table_privilege(to_regclass(relation), privilege)
               ) AS missing_grants
    """
    needed = [(relation, privilege) for relation, privileges in GRANTS.items() for privilege in privileges]
    params = {"relations": [each[0] for each in needed], "privileges": [each[1] for each in needed]}
    try:
        [row] = await db.fetch("read_state", statement, params)
    except UndefinedTable:
        return {"read_only": False, "migrations": [], "missing_grants": []}
    if row["read_only"]:
        db.renew()  # a connection stays read-only when its database or its server no longer is
    return row


# --- What they share ---


def _find(key: Key) -> tuple[str, dict[str, Any]]:
    """The SQL of a configuration's id, and its parameters."""
    if isinstance(key, str):
        return "%(id)s", {"id": key}
    return ID_BY_NAMES, {"application_name": key[0], "own_name": key[1]}


def _in_its_application(id: str) -> str:
    """Locks its application before a configuration that goes or may get another's name.

    The deletion of the application locks it first too: none of them then has what another waits for.
    """
    return f"""
        c.application_id = (
            SELECT a.id
            FROM applications AS a JOIN configurations AS own ON own.application_id = a.id
            WHERE own.id = {id}
            FOR NO KEY UPDATE OF a
        )
    """


def _given(changes: BaseModel) -> dict[str, Any]:
    return {"keep_comments": "comments" not in changes.model_fields_set, **dict(changes)}


async def _write[K](
    name: str,
    statement: str,
    params: dict[str, Any],
    when: Conditions,
    read: Callable[[K], Awaitable[Row | None]],
    key: K,
) -> Row | None:
    """The row as written, or as it is if it was left alone (`written` is false), or None without any."""
    rows = await db.fetch(name, statement, {**params, **dict(when), "actor": actor.get()})
    if rows:
        return {**rows[0], "written": True}
    row = await read(key)
    return row and {**row, "written": False}


async def _write_or_create(
    name: str, update: str, source: str, params: dict[str, Any], when: Conditions, key: Key
) -> Row | None:
    """Update, or else insert what `source` selects, in one statement. It runs again if another writer was faster."""
    params["may_create"] = not when.if_match
    statement = f"""
        WITH updated AS ({update} RETURNING {CONFIGURATION}),
        created AS (
            INSERT INTO configurations AS c (id, application_id, name, comments, config)
            {source} AND %(may_create)s
            RETURNING {CONFIGURATION}
        )
        SELECT *, false AS created FROM updated UNION ALL SELECT *, true FROM created
    """
    for attempt in range(1, TRIES + 1):
        try:
            row = await _write(name, statement, params, when, read_configuration, key)
        except UniqueViolation:  # it was created meanwhile, or its name is another's
            if attempt == TRIES:
                raise
            continue
        # It was deleted meanwhile if there is an application, and nothing forbids what was not done.
        if row is None or row["written"] or not row.get("application_id") or not conditions_hold(row, when):
            return row
    raise OperationalError("others write it at the same time")


async def _pages(
    name: str, shown: str, rows: str, key: str, size: str, wanted: BaseModel, **others: Any
) -> AsyncIterator[Row]:
    """The pages of a list by keyset pagination: `json`, the `last` key, and whether there is `more`.

    With a limit there is one page, else as many as it takes. A page ends at the limit, or once its rows have
    PAGE_BYTES by their `size`: it takes the same time and memory wherever it stands.
    """
    params = {**dict(wanted), **others}
    bound = "before" if "before" in params else "after"
    beyond, order, last = ("<", "DESC", "min") if bound == "before" else (">", "ASC", "max")
    statement = f"""
        SELECT coalesce(string_agg({shown}, ',' ORDER BY key {order}) FILTER (WHERE fits), '') AS json,
               {last}(key) FILTER (WHERE fits) AS last, count(*) > count(*) FILTER (WHERE fits) AS more
        FROM (
            SELECT *, {key} AS key,
                   row_number() OVER place <= %(limit)s AND sum({size}) OVER place - {size} < {PAGE_BYTES} AS fits
            FROM {rows} AND (%({bound})s IS NULL OR {key} {beyond} %({bound})s)
            WINDOW place AS (ORDER BY {key} {order})
            ORDER BY {key} {order}
            LIMIT %(limit)s + 1
        ) AS {key.partition(".")[0]}
    """
    limit, more = params["limit"], True
    while more:
        [page] = await db.fetch_page(name, statement, {**params, "limit": limit or 1000})
        yield page
        more = page["more"] and limit is None
        params[bound] = page["last"]
