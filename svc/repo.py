"""Every SQL statement of the API. Rows hold an id, an ETag, and the JSON to answer with.

In every statement `this` is the row that is read or written.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any

from psycopg2 import OperationalError
from psycopg2.errors import ForeignKeyViolation, UniqueViolation
from psycopg2.extensions import register_adapter
from psycopg2.extras import Json
from pydantic import BaseModel
from ulid import ULID

from svc import db, models
from svc.db import Row
from svc.models import Conditions

# A page of a list ends after so many bytes of documents: it bounds what one request brings into memory at once.
PAGE_BYTES = 1024**2
# How often a PUT by name or a restore runs while others create and delete the same.
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

register_adapter(dict, Json)  # psycopg2 writes documents as JSON, in the thread of the statement


# --- Parts of statements ---


def _json(columns: str) -> str:
    return f"(SELECT row_to_json(shown) FROM (SELECT {columns}) AS shown)::text"


def _application_json(ids: str) -> str:
    return _json(f"this.id, this.name, this.comments, {ids} AS configuration_ids, {TIMES}")


def _row(json: str) -> str:
    return f"this.id, this.etag, {json} AS json"


TIMES = "this.version, this.created_at, this.updated_at"
IDS = "ARRAY(SELECT c.id FROM configurations AS c WHERE c.application_id = this.id ORDER BY c.id)"
# For a write: the ids as they are once it holds the application's row, not as they were when the statement began.
IDS_NOW = "configuration_ids_now(this.id)"
APPLICATION = _row(_application_json(IDS))
# Of a row with a type of its own: a sub-select takes longer.
CONFIGURATION_JSON = f"""
    row_to_json(
        ROW(this.id, this.application_id, this.name, this.comments, this.config, {TIMES})::shown_configuration
    )::text
"""
CONFIGURATION = _row(CONFIGURATION_JSON)
CHANGE = """
    this.configuration_id, this.application_id, this.name, this.version, this.operation, this.actor, this.recorded_at
"""
VERSION_JSON = _json(f"{CHANGE}, this.comments, this.config")
# Tells the trigger that records versions who writes. It is always true.
ACTOR = "set_config('config_service.actor', %(actor)s, true) IS NOT NULL"
# If-Match, If-None-Match (RFC 9110, section 13.1; `conditions_hold` is the same in Python), and ACTOR.
CONDITIONS = f"""
    (%(if_match)s::text[] = '{{}}' OR %(if_match)s && ARRAY['*', this.etag])
    AND NOT %(if_none_match)s && ARRAY['*', this.etag]
    AND {ACTOR}
"""


def etag_matches(row: Row | None, etags: Collection[str]) -> bool:
    """Whether the row has an ETag, and it is among these, or these are *."""
    return row is not None and row["etag"] is not None and (row["etag"] in etags or "*" in etags)


def conditions_hold(row: Row, when: Conditions) -> bool:
    return (not when.if_match or etag_matches(row, when.if_match)) and not etag_matches(row, when.if_none_match)


# --- Applications ---


async def create_application(new: models.ApplicationCreate) -> Row:
    statement = f"""
        INSERT INTO applications AS this (id, name, comments)
        VALUES (%(id)s, %(name)s, %(comments)s)
        RETURNING {APPLICATION}
    """
    [row] = await db.fetch("create_application", statement, {"id": str(ULID()), **vars(new)})
    return row


async def _read_applications(ids: list[str], within: float) -> Mapping[str, Row]:
    statement = f"SELECT {APPLICATION} FROM applications AS this WHERE this.id = ANY(%(ids)s)"
    return {row["id"]: row for row in await db.fetch("read_applications", statement, {"ids": ids}, within)}


read_application = db.coalesced(_read_applications)


def list_applications(wanted: models.ApplicationFilter) -> AsyncIterator[Row]:
    rows = f"""
        SELECT this.*, own.ids, 30 * cardinality(own.ids) AS size, this.id AS key
        FROM applications AS this CROSS JOIN LATERAL (SELECT {IDS} AS ids OFFSET 0) AS own
        WHERE %(name)s IS NULL OR this.name = %(name)s
    """
    return _pages("list_applications", rows, _application_json("this.ids"), dict(wanted))


async def update_application(id: str, changes: models.ApplicationUpdate, when: Conditions) -> Row | None:
    statement = f"""
        UPDATE applications AS this
        SET {_assign(changes)}
        WHERE this.id = %(id)s AND {CONDITIONS}
        RETURNING {_row(_application_json(IDS_NOW))}
    """
    params = {"id": id, **vars(changes), **when._asdict()}
    return await _write("update_application", statement, params, read_application, id)


async def delete_application(id: str, cascade: bool, when: Conditions) -> Row | None:
    """One that has configurations is left alone unless they may go too.

    It is locked before they are counted, so that none comes or goes after that.
    """
    statement = f"""
        DELETE FROM applications AS this
        WHERE this.id = (SELECT id FROM applications WHERE id = %(id)s FOR UPDATE)
          AND {CONDITIONS}
          AND (%(cascade)s OR cardinality({IDS_NOW}) = 0)
        RETURNING this.etag, '' AS json
    """
    params = {"id": id, "cascade": cascade, **when._asdict()}
    return await _write("delete_application", statement, params, read_application, id)


# --- Configurations ---


async def create_configuration(new: models.ConfigurationCreate) -> Row:
    statement = f"""
        INSERT INTO configurations AS this (id, application_id, name, comments, config)
        SELECT %(id)s, %(application_id)s, %(name)s, %(comments)s, %(config)s::jsonb
        WHERE {ACTOR}
        RETURNING {CONFIGURATION}
    """
    params = {"id": str(ULID()), "actor": actor.get(), **vars(new)}
    [row] = await db.fetch("create_configuration", statement, params)
    return row


async def _read_by_ids(ids: list[str], within: float) -> Mapping[str, Row]:
    statement = f"SELECT {CONFIGURATION} FROM configurations AS this WHERE this.id = ANY(%(ids)s)"
    return {row["id"]: row for row in await db.fetch("read_configurations", statement, {"ids": ids}, within)}


async def _read_by_names(keys: list[tuple[str, str]], within: float) -> Mapping[tuple[str, str], Row]:
    # LIMIT 1 makes it two look-ups each: a plain join may read all of an application.
    statement = f"""
        SELECT key.application_name, key.name, a.id AS application_id, c.*
        FROM unnest(%(application_names)s::text[], %(names)s::text[]) AS key (application_name, name)
        LEFT JOIN LATERAL (SELECT id FROM applications WHERE name = key.application_name LIMIT 1) AS a ON true
        LEFT JOIN LATERAL (
            SELECT {CONFIGURATION}
            FROM configurations AS this
            WHERE this.application_id = a.id AND this.name = key.name
            LIMIT 1
        ) AS c ON true
    """
    application_names, names = map(list, zip(*keys, strict=True))
    params = {"application_names": application_names, "names": names}
    rows = await db.fetch("read_configurations_by_names", statement, params, within)
    return {(row["application_name"], row["name"]): row for row in rows}


_read_by_id = db.coalesced(_read_by_ids)
_read_by_name = db.coalesced(_read_by_names)


def read_configuration(key: Key) -> Awaitable[Row | None]:
    """By names there is always a row: without a configuration its `etag` is None, without an application its
    `application_id` too."""
    return _read_by_id(key) if isinstance(key, str) else _read_by_name(key)


def list_configurations(wanted: models.NamedFilter, application_id: str | None = None) -> AsyncIterator[Row]:
    rows = """
        SELECT this.*, this.id AS key
        FROM configurations AS this
        WHERE (%(application_id)s IS NULL OR this.application_id = %(application_id)s)
          AND (%(name)s IS NULL OR this.name = %(name)s)
          AND (%(contains)s IS NULL OR this.config @> %(contains)s)
    """
    return _pages("list_configurations", rows, CONFIGURATION_JSON, {"application_id": application_id, **vars(wanted)})


async def update_configuration(
    key: Key, changes: models.ConfigurationUpdate, when: Conditions, merge: bool = False
) -> Row | None:
    """Replace the fields that are present. With `merge`, merge the config into what is stored (RFC 7396)."""
    found, params = _find(key, lock=changes.name is not None)
    statement = f"""
        UPDATE configurations AS this
        SET {_assign(changes, merge)}
        WHERE {found} AND {CONDITIONS}
        RETURNING {CONFIGURATION}
    """
    params |= {**vars(changes), **when._asdict()}
    return await _write("update_configuration", statement, params, read_configuration, key)


async def put_configuration(key: tuple[str, str], new: models.ConfigurationPut, when: Conditions) -> Row | None:
    """Replace the fields that are present, or create the configuration: `created` tells which."""
    found, params = _find(key)
    update = f"""
        UPDATE configurations AS this
        SET {_assign(new)}
        WHERE {found} AND {CONDITIONS}
    """
    source = f"""
        SELECT %(new_id)s, a.id, %(own_name)s, %(comments)s, %(config)s::jsonb
        FROM applications AS a
        WHERE a.name = %(application_name)s AND NOT EXISTS (SELECT FROM configurations AS this WHERE {found})
    """
    params |= {"new_id": str(ULID()), **vars(new), **when._asdict()}
    return await _write_or_create("put_configuration", update, source, params, when, key)


async def delete_configuration(key: Key, when: Conditions) -> Row | None:
    found, params = _find(key, lock=True)
    statement = f"""
        DELETE FROM configurations AS this
        WHERE {found} AND {CONDITIONS}
        RETURNING this.etag, '' AS json
    """
    return await _write("delete_configuration", statement, params | when._asdict(), read_configuration, key)


async def read_etags(ids: set[str]) -> dict[str, Row]:
    """The ETags of configurations by their ids. Those that do not exist are not among them."""
    statement = "SELECT id, etag FROM configurations WHERE id = ANY(%(ids)s)"
    return {row["id"]: row for row in await db.fetch("read_etags", statement, {"ids": list(ids)})}


# --- Versions of configurations ---


async def has_versions(id: str) -> bool:
    """Whether there is, or was, a configuration with this id."""
    statement = "SELECT FROM configuration_versions WHERE configuration_id = %(id)s LIMIT 1"
    return bool(await db.fetch("has_versions", statement, {"id": id}))


def list_versions(id: str, wanted: models.VersionFilter) -> AsyncIterator[Row]:
    """Newest first."""
    rows = """
        SELECT this.*, this.version AS key
        FROM configuration_versions AS this
        WHERE this.configuration_id = %(id)s
    """
    return _pages("list_versions", rows, VERSION_JSON, {"id": id, **vars(wanted)})


async def read_version(id: str, version: int) -> Row | None:
    statement = f"""
        SELECT {VERSION_JSON} AS json
        FROM configuration_versions AS this
        WHERE this.configuration_id = %(id)s AND this.version = %(version)s
    """
    rows = await db.fetch("read_version", statement, {"id": id, "version": version})
    return rows[0] if rows else None


async def restore_version(id: str, version: int, when: Conditions) -> Row | None:
    """Make name, comments and config of a version the newest again. What was deleted is created again under its id.

    A version that records a deletion has no config, so there is nothing to restore.
    """
    found, params = _find(id, lock=True)
    update = f"""
        UPDATE configurations AS this
        SET name = v.name, comments = v.comments, config = v.config
        FROM configuration_versions AS v
        WHERE v.configuration_id = %(id)s AND v.version = %(version)s AND v.config IS NOT NULL
          AND {found} AND {CONDITIONS}
    """
    source = """
        SELECT %(id)s, v.application_id, v.name, v.comments, v.config
        FROM configuration_versions AS v
        WHERE v.configuration_id = %(id)s AND v.version = %(version)s AND v.config IS NOT NULL
          AND v.application_id IN (SELECT id FROM applications)
          AND NOT EXISTS (SELECT FROM configurations WHERE id = %(id)s)
    """
    params |= {"version": version, **when._asdict()}
    write = partial(_write_or_create, "restore_version", update, source, params, when, id)
    # There is nothing to restore, or it was deleted while the statement waited for it: once more tells.
    return await write() or await write()


def list_changes(wanted: models.ChangeFilter) -> AsyncIterator[Row]:
    """Newest first, without documents."""
    rows = f"""
        SELECT {CHANGE}, this.position, this.position AS key, 0 AS size
        FROM configuration_versions AS this
        WHERE %(application_id)s IS NULL OR this.application_id = %(application_id)s
    """
    return _pages("list_changes", rows, _json(f"this.position, {CHANGE}"), dict(wanted))


# --- The database itself ---


async def read_state() -> Row:
    """Whether the database is read-only, which migrations are applied, and which grants this role lacks."""
    statement = """
        SELECT current_setting('transaction_read_only')::bool AS read_only,
               ARRAY(SELECT version FROM migrations WHERE duration IS NOT NULL ORDER BY version) AS migrations,
               ARRAY(
                   SELECT privilege || ' on ' || relation
                   FROM jsonb_each(%(grants)s) AS needed (relation, privileges),
                        jsonb_array_elements_text(privileges) AS privilege
                   WHERE NOT has_table_privilege(to_regclass(relation), privilege)
               ) AS missing_grants
    """
    [row] = await db.fetch("read_state", statement, {"grants": GRANTS})
    if row["read_only"]:
        db.renew()  # a connection stays read-only when its database or its server no longer is
    return row


# --- What they share ---


def _find(key: Key, lock: bool = False) -> tuple[str, dict[str, Any]]:
    """The condition that finds a configuration for a write, and its parameters.

    With `lock`, for a deletion and for a new name, its application is locked first. The deletion of an application
    locks it first too: so none of them waits for another in a circle.
    """
    if isinstance(key, str):
        found, params = "this.id = %(id)s", {"id": key}
        owner = "id = (SELECT application_id FROM configurations WHERE id = %(id)s)" if lock else None
    else:
        found, params = "this.name = %(own_name)s", {"application_name": key[0], "own_name": key[1]}
        owner = "name = %(application_name)s"
    if owner:
        locked = "FOR NO KEY UPDATE" if lock else ""
        found += f" AND this.application_id = (SELECT id FROM applications WHERE {owner} {locked})"
    return found, params


def _assign(changes: BaseModel, merge: bool = False) -> str:
    """The SQL that sets the fields that are present."""
    values = {field: f"%({field})s" for field in changes.model_fields_set}
    if merge and "config" in values:
        # A document is at most 100 deep. merge_patch() recurses, and would overflow the server's stack.
        values["config"] = "merge_patch(this.config, %(config)s::document)"
    return ", ".join(f"{field} = {value}" for field, value in values.items()) or "id = this.id"


async def _write(
    name: str, statement: str, params: dict[str, Any], read: Callable[[Any], Awaitable[Row | None]], key: Key
) -> Row | None:
    """The row as written, or as it is if it was left alone (`written` is false), or None if there is none."""
    if rows := await db.fetch(name, statement, {"actor": actor.get(), **params}):
        return {**rows[0], "written": True}
    row = await read(key)
    return row and {**row, "written": False}


async def _write_or_create(
    name: str, update: str, source: str, params: dict[str, Any], when: Conditions, key: Key
) -> Row | None:
    """Update, or else insert what `source` selects unless If-Match was sent, in one statement.

    It runs again, TRIES times at most, if another writer was faster.
    """
    statement = f"""
        WITH updated AS ({update} RETURNING {CONFIGURATION}),
        created AS (
            INSERT INTO configurations AS this (id, application_id, name, comments, config)
            {source} AND %(if_match)s = '{{}}' AND {ACTOR}
            RETURNING {CONFIGURATION}
        )
        SELECT *, false AS created FROM updated UNION ALL SELECT *, true FROM created
    """
    for attempt in range(1, TRIES + 1):
        try:
            row = await _write(name, statement, params, read_configuration, key)
        except (UniqueViolation, ForeignKeyViolation):  # created, or its application deleted, meanwhile
            if attempt == TRIES:
                raise
            continue
        # Not done although allowed, and the application is there: deleted meanwhile, so try again.
        if row is None or row["written"] or not row.get("application_id") or not conditions_hold(row, when):
            return row
    raise OperationalError("others write it at the same time")


async def _pages(name: str, rows: str, json: str, wanted: dict[str, Any]) -> AsyncIterator[Row]:
    """The pages of a list by keyset pagination: `json`, the `last` key, and whether there is `more`.

    With a limit there is one page, else as many as it takes. A page ends at the limit, or once its rows have
    PAGE_BYTES by their `size`: it takes the same time and memory wherever it stands.
    """
    bound = "before" if "before" in wanted else "after"
    beyond, order, last = ("<", "DESC", "min") if bound == "before" else (">", "ASC", "max")
    statement = f"""
        SELECT coalesce(string_agg({json}, ',' ORDER BY key {order}) FILTER (WHERE fits), '') AS json,
               {last}(key) FILTER (WHERE fits) AS last, count(*) > count(*) FILTER (WHERE fits) AS more
        FROM (
            SELECT *, row_number() OVER place <= %(limit)s AND sum(size) OVER place - size < {PAGE_BYTES} AS fits
            FROM ({rows}) AS matching
            WHERE %({bound})s IS NULL OR key {beyond} %({bound})s
            WINDOW place AS (ORDER BY key {order})
            ORDER BY key {order}
            LIMIT %(limit)s + 1
        ) AS this
    """
    limit, more = wanted["limit"], True
    while more:
        [page] = await db.fetch(name, statement, {**wanted, "limit": limit or 1000}, queue="lists")
        page["next"] = {bound: page["last"]} if page["more"] and limit else None
        yield page
        more = page["more"] and limit is None
        wanted[bound] = page["last"]
