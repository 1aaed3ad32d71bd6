"""Every SQL statement of the API. Rows hold an id, a version, and the JSON to answer with."""

from collections.abc import AsyncIterator, Collection, Mapping
from itertools import batched
from typing import Any

from psycopg2.errors import UndefinedTable
from pydantic import BaseModel
from ulid import ULID

from svc import db
from svc.db import Row
from svc.etags import etag
from svc.models import ApplicationCreate, ApplicationUpdate, ConfigurationCreate, ConfigurationUpdate

# What one statement of a list brings into memory at most: a configuration may have a megabyte.
APPLICATIONS_PAGE = 1000
CONFIGURATIONS_PAGE = 16

# Where the next part of a list begins, None if this is the last, and the JSON of each page.
Listed = tuple[Any, AsyncIterator[str]]


def _application(ids: str) -> str:
    members = f"a.id, a.name, a.comments, {ids} AS configuration_ids, a.version, a.created_at, a.updated_at"
    return f"a.id, a.version, (SELECT row_to_json(shown) FROM (SELECT {members}) AS shown)::text AS json"


APPLICATION = _application("ARRAY(SELECT c.id FROM configurations AS c WHERE c.application_id = a.id ORDER BY c.id)")
# For a write: the ids as they are once it holds the application's row, not as they were when the statement began.
APPLICATION_WRITTEN = _application("configuration_ids_now(a.id)")
# A configuration and a version are shown with every column of their tables.
CONFIGURATION = "c.id, c.version, row_to_json(c)::text AS json"
VERSION = "v.configuration_id AS id, v.version, row_to_json(v)::text AS json"
# Locks its application before a configuration that goes or may get another's name, as the deletion of the application
# does: none of them then has what another waits for.
IN_ITS_APPLICATION = """
    c.application_id = (
        SELECT a.id
        FROM applications AS a JOIN configurations AS own ON own.application_id = a.id
        WHERE own.id = %(id)s
        FOR NO KEY UPDATE OF a
    )
"""
ADMITTED = "(%(versions)s::text[] IS NULL OR {}.version::text = ANY(%(versions)s::text[]))"


# --- Applications ---


async def create_application(new: ApplicationCreate) -> Row:
    [row] = await db.fetch(
        "create_application",
        f"""
        INSERT INTO applications AS a (id, name, comments)
        VALUES (%(id)s, %(name)s, %(comments)s)
        RETURNING {APPLICATION}
        """,
        {"id": str(ULID()), **new.model_dump()},
    )
    return row


async def _read_applications(ids: list[str], within: float) -> Mapping[str, Row]:
    rows = await db.fetch(
        "read_applications",
        f"SELECT {APPLICATION} FROM applications AS a WHERE a.id = ANY(%(ids)s)",
        {"ids": ids},
        within,
    )
    return {row["id"]: row for row in rows}


read_application = db.coalesced(_read_applications)


async def list_applications(after: str | None, limit: int | None, name: str | None) -> Listed:
    return await _list(
        "list_applications",
        APPLICATION,
        "FROM applications AS a WHERE (%(name)s IS NULL OR a.name = %(name)s)",
        "a.id",
        {"after": after, "name": name},
        limit,
        APPLICATIONS_PAGE,
    )


async def update_application(id: str, changes: ApplicationUpdate, versions: list[str] | None = None) -> Row | None:
    return await _write(
        "update_application",
        f"""
        UPDATE applications AS a
        SET name = coalesce(%(name)s, a.name),
            comments = CASE WHEN %(keep_comments)s THEN a.comments ELSE %(comments)s END
        WHERE a.id = %(id)s AND {ADMITTED.format("a")}
        RETURNING {APPLICATION_WRITTEN}
        """,
        "SELECT a.id, a.version, NULL AS json FROM applications AS a WHERE a.id = %(id)s",
        {"id": id, "versions": versions, **_changes(changes)},
    )


async def delete_application(id: str, cascade: bool, versions: list[str] | None = None) -> Row | None:
    """One that has configurations is left alone unless they may go too; `json` then is their number.

    It is locked before they are counted, so that none comes or goes after that.
    """
    return await _write(
        "delete_application",
        f"""
        DELETE FROM applications AS a
        WHERE a.id = (SELECT id FROM applications WHERE id = %(id)s FOR UPDATE) AND {ADMITTED.format("a")}
          AND (%(cascade)s OR cardinality(configuration_ids_now(a.id)) = 0)
        RETURNING a.id, a.version, NULL AS json
        """,
        """
        SELECT a.id, a.version, cardinality(configuration_ids_now(a.id))::text AS json
        FROM applications AS a
        WHERE a.id = %(id)s
        """,
        {"id": id, "versions": versions, "cascade": cascade},
    )


# --- Configurations ---


async def create_configuration(new: ConfigurationCreate) -> Row:
    [row] = await db.fetch(
        "create_configuration",
        f"""
        INSERT INTO configurations AS c (id, application_id, name, comments, config)
        VALUES (%(id)s, %(application_id)s, %(name)s, %(comments)s, %(config)s)
        RETURNING {CONFIGURATION}
        """,
        {"id": str(ULID()), **new.model_dump()},
    )
    return row


async def _read_configurations(ids: list[str], within: float) -> Mapping[str, Row]:
    rows = await db.fetch(
        "read_configurations",
        f"SELECT {CONFIGURATION} FROM configurations AS c WHERE c.id = ANY(%(ids)s)",
        {"ids": ids},
        within,
    )
    return {row["id"]: row for row in rows}


read_configuration = db.coalesced(_read_configurations)


async def list_configurations(
    after: str | None, limit: int | None, application_id: str | None, name: str | None, contains: str | None
) -> Listed:
    return await _list(
        "list_configurations",
        CONFIGURATION,
        """
        FROM configurations AS c
        WHERE (%(application_id)s IS NULL OR c.application_id = %(application_id)s)
          AND (%(name)s IS NULL OR c.name = %(name)s)
          AND (%(contains)s IS NULL OR c.config @> %(contains)s)
        """,
        "c.id",
        {"after": after, "application_id": application_id, "name": name, "contains": contains},
        limit,
        CONFIGURATIONS_PAGE,
    )


async def update_configuration(id: str, changes: ConfigurationUpdate, versions: list[str] | None = None) -> Row | None:
    return await _write(
        "update_configuration",
        f"""
        UPDATE configurations AS c
        SET name = coalesce(%(name)s, c.name),
            comments = CASE WHEN %(keep_comments)s THEN c.comments ELSE %(comments)s END,
            config = coalesce(%(config)s, c.config)
        WHERE c.id = %(id)s AND {ADMITTED.format("c")} AND {IN_ITS_APPLICATION if changes.name else "true"}
        RETURNING {CONFIGURATION}
        """,
        "SELECT c.id, c.version, NULL AS json FROM configurations AS c WHERE c.id = %(id)s",
        {"id": id, "versions": versions, **_changes(changes)},
    )


async def delete_configuration(id: str, versions: list[str] | None = None) -> Row | None:
    return await _write(
        "delete_configuration",
        f"""
        DELETE FROM configurations AS c
        WHERE c.id = %(id)s AND {ADMITTED.format("c")} AND {IN_ITS_APPLICATION}
        RETURNING c.id, c.version, NULL AS json
        """,
        "SELECT c.id, c.version, NULL AS json FROM configurations AS c WHERE c.id = %(id)s",
        {"id": id, "versions": versions},
    )


def _named(columns: str) -> str:
    """FROM what has the names. LIMIT 1 makes it two look-ups each: a plain join may read all of an application."""
    return f"""
        FROM unnest(%(application_names)s::text[], %(names)s::text[]) AS key (application_name, name)
        LEFT JOIN LATERAL (SELECT id FROM applications WHERE name = key.application_name LIMIT 1) AS a ON true
        LEFT JOIN LATERAL (
            SELECT {columns} FROM configurations AS c WHERE c.application_id = a.id AND c.name = key.name LIMIT 1
        ) AS c ON true
    """


async def _read_configurations_by_name(keys: list[tuple[str, str]], within: float) -> Mapping[tuple[str, str], Row]:
    rows = await db.fetch(
        "read_configurations_by_name",
        f"""
        SELECT key.application_name, key.name, a.id AS application_id, c.id, c.version, c.json
        {_named(CONFIGURATION)}
        """,
        {"application_names": [key[0] for key in keys], "names": [key[1] for key in keys]},
        within,
    )
    return {(row["application_name"], row["name"]): row for row in rows}


# There is always a row: its id is None if there is no configuration, its application_id if there is no application.
read_configuration_by_name = db.coalesced(_read_configurations_by_name)


async def read_etags(keys: Collection[str | tuple[str, str]]) -> dict[str | tuple[str, str], str]:
    """The ETags of configurations by their ids or names. Those that do not exist are not among them."""
    names = [key for key in keys if isinstance(key, tuple)]
    rows = await db.fetch(
        "read_etags",
        f"""
        SELECT c.id, c.version, NULL AS application_name, NULL AS name
        FROM configurations AS c
        WHERE c.id = ANY(%(ids)s::text[])
        UNION ALL
        SELECT c.id, c.version, key.application_name, key.name
        {_named("c.id, c.version")}
        WHERE c.id IS NOT NULL
        """,
        {
            "ids": [key for key in keys if isinstance(key, str)],
            "application_names": [key[0] for key in names],
            "names": [key[1] for key in names],
        },
    )
    return {row["id"] if row["name"] is None else (row["application_name"], row["name"]): etag(row) for row in rows}


# --- Versions of configurations ---


async def list_versions(id: str, before: int | None, limit: int | None) -> Listed | None:
    """The versions of a configuration, newest first, or None if it never existed."""
    [known] = await db.fetch(
        "find_versions",
        "SELECT EXISTS (SELECT FROM configuration_versions WHERE configuration_id = %(id)s) AS exists",
        {"id": id},
    )
    if not known["exists"]:
        return None
    return await _list(
        "list_versions",
        VERSION,
        "FROM configuration_versions AS v WHERE v.configuration_id = %(id)s",
        "v.version",
        {"id": id, "after": before},
        limit,
        CONFIGURATIONS_PAGE,
        descending=True,
    )


async def read_version(id: str, version: int) -> Row | None:
    rows = await db.fetch(
        "read_version",
        f"""
        SELECT {VERSION}
        FROM configuration_versions AS v
        WHERE v.configuration_id = %(id)s AND v.version = %(version)s
        """,
        {"id": id, "version": version},
    )
    return rows[0] if rows else None


async def restore_version(id: str, version: int, versions: list[str] | None = None) -> Row | None:
    """The configuration with name, comments and config of one of its versions. None, too, without that version."""
    return await _write(
        "restore_version",
        f"""
        UPDATE configurations AS c
        SET name = v.name, comments = v.comments, config = v.config
        FROM configuration_versions AS v
        WHERE c.id = %(id)s AND v.configuration_id = c.id AND v.version = %(version)s AND {ADMITTED.format("c")}
          AND {IN_ITS_APPLICATION}
        RETURNING {CONFIGURATION}
        """,
        """
        SELECT c.id, c.version, NULL AS json
        FROM configurations AS c JOIN configuration_versions AS v ON v.configuration_id = c.id
        WHERE c.id = %(id)s AND v.version = %(version)s
        """,
        {"id": id, "version": version, "versions": versions},
    )


# --- The database itself ---


async def read_state() -> Row:
    """Whether the database is read-only, and the versions of the migrations that are applied as a whole."""
    try:
        [row] = await db.fetch(
            "read_state",
            """
            SELECT current_setting('transaction_read_only')::bool AS read_only,
                   ARRAY(SELECT version FROM migrations WHERE duration IS NOT NULL ORDER BY version) AS migrations
            """,
            {},
        )
    except UndefinedTable:
        return {"read_only": False, "migrations": []}
    if row["read_only"]:
        db.renew()  # a connection stays read-only when its database or its server no longer is
    return row


# --- What they share ---


def _changes(changes: BaseModel) -> dict[str, Any]:
    return {"keep_comments": "comments" not in changes.model_fields_set, **changes.model_dump()}


async def _write(name: str, statement: str, otherwise: str, params: dict[str, Any]) -> Row | None:
    """What became of a write: the row that it wrote, one that it left alone (`written` is false), or None without any.

    `otherwise` selects the row that was left alone, as it is when the write has given up on it: hence the lock, which
    waits for other writers and shows what they left. It costs time, so it is left out where nothing can be left alone.
    """
    if params["versions"] is None and params.get("cascade", True):
        rows = await db.fetch(name, statement + ", true AS written", params)
    else:
        rows = await db.fetch(
            name,
            f"""
            WITH written AS ({statement}, true AS written),
            kept AS ({otherwise} AND NOT EXISTS (SELECT FROM written) FOR UPDATE)
            SELECT * FROM written
            UNION ALL
            SELECT *, false AS written FROM kept
            """,
            params,
        )
    return rows[0] if rows else None


async def _list(
    name: str,
    columns: str,
    matching: str,
    key: str,
    params: dict[str, Any],
    limit: int | None,
    size: int,
    descending: bool = False,
) -> Listed:
    """`limit` rows that match, all of them without a limit, in the order of their key after the key `after`.

    A page begins after the last key of the one before: each takes the same time and memory, wherever it stands, and
    rows that come or go meanwhile neither repeat nor hide another. The keys of a limited list are picked at once, so
    that what comes while it is sent does not make it longer.
    """
    beyond, direction, last = ("<", "DESC", "min") if descending else (">", "ASC", "max")
    matching += f" AND (%(after)s IS NULL OR {key} {beyond} %(after)s)"

    async def page(after: Any, keys: list[Any] | None) -> Row:
        [row] = await db.fetch(
            name,
            f"""
            SELECT count(*), {last}(page.key) AS last,
                   string_agg(page.json, ',' ORDER BY page.key {direction}) AS json
            FROM (
                SELECT {key} AS key, {columns}
                {matching} AND (%(keys)s IS NULL OR {key} = ANY(%(keys)s))
                ORDER BY {key} {direction}
                LIMIT {size}
            ) AS page
            """,
            {**params, "after": after, "keys": keys},
        )
        return row

    async def walked() -> AsyncIterator[str]:
        after, count = params["after"], size
        while count == size:
            row = await page(after, None)
            after, count = row["last"], row["count"]
            if count:
                yield row["json"]

    async def picked(keys: list[Any]) -> AsyncIterator[str]:
        for some in batched(keys, size, strict=False):
            row = await page(None, list(some))
            if row["count"]:  # they may be gone
                yield row["json"]

    if limit is None:
        return None, walked()
    keys = f"SELECT {key} {matching} ORDER BY {key} {direction} LIMIT {limit + 1}"
    [found] = await db.fetch(f"{name}_keys", f"SELECT ARRAY({keys}) AS keys", params)
    shown = found["keys"][:limit]
    return shown[-1] if len(found["keys"]) > limit else None, picked(shown)
