"""Every SQL statement of the API, one function a statement. Rows hold an id, a version, and the JSON to answer with."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

from psycopg2.errors import UndefinedTable
from pydantic import BaseModel
from ulid import ULID

from svc import db
from svc.db import Row
from svc.models import ApplicationCreate, ApplicationUpdate, ConfigurationCreate, ConfigurationUpdate

# How many rows one statement of a list brings into memory.
APPLICATIONS_PAGE = 1000


def _application(configuration_ids: str) -> str:
    return f"""
        a.id, a.version, (
            SELECT row_to_json(shown)
            FROM (
                SELECT a.id, a.name, a.comments, {configuration_ids} AS configuration_ids,
                       a.version, a.created_at, a.updated_at
            ) AS shown
        )::text AS json
    """


APPLICATION = _application("ARRAY(SELECT c.id FROM configurations AS c WHERE c.application_id = a.id ORDER BY c.id)")
# For a write: the ids as they are once it holds the application's row, not as they were when the statement began.
APPLICATION_WRITTEN = _application("configuration_ids_now(a.id)")
CONFIGURATION = """
        c.id, c.version, (
            SELECT row_to_json(shown)
            FROM (
                SELECT c.id, c.application_id, c.name, c.comments, c.config, c.version, c.created_at, c.updated_at
            ) AS shown
        )::text AS json
"""


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


async def update_application(id: str, changes: ApplicationUpdate) -> Row | None:
    """The application after its change, or None if there is none."""
    rows = await db.fetch(
        "update_application",
        f"""
        UPDATE applications AS a
        SET name = coalesce(%(name)s, a.name),
            comments = CASE WHEN %(keep_comments)s THEN a.comments ELSE %(comments)s END
        WHERE a.id = %(id)s
        RETURNING {APPLICATION_WRITTEN}
        """,
        _changes(id, changes),
    )
    return rows[0] if rows else None


async def list_applications(
    after: str | None, limit: int | None, name: str | None
) -> tuple[str | None, AsyncIterator[str]]:
    return await _list(
        "list_applications",
        f"SELECT {APPLICATION}",
        "FROM applications AS a WHERE (%(name)s::text IS NULL OR a.name = %(name)s)",
        "a.id",
        {"after": after, "name": name},
        limit,
        APPLICATIONS_PAGE,
    )


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


async def update_configuration(id: str, changes: ConfigurationUpdate) -> Row | None:
    """The configuration after its change, or None if there is none."""
    rows = await db.fetch(
        "update_configuration",
        f"""
        UPDATE configurations AS c
        SET name = coalesce(%(name)s, c.name),
            comments = CASE WHEN %(keep_comments)s THEN c.comments ELSE %(comments)s END,
            config = coalesce(%(config)s, c.config)
        WHERE c.id = %(id)s
        RETURNING {CONFIGURATION}
        """,
        _changes(id, changes),
    )
    return rows[0] if rows else None


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


def _changes(id: str, changes: BaseModel) -> dict[str, Any]:
    return {"id": id, "keep_comments": "comments" not in changes.model_fields_set, **changes.model_dump()}


async def _list(
    name: str, select: str, matching: str, id: str, params: dict[str, Any], limit: int | None, size: int
) -> tuple[str | None, AsyncIterator[str]]:
    """The rows that match, in the order of their ids: where the next list begins, and the JSON of each page of rows.

    `limit` rows, and then None or the id after which there is more; without a limit all of them. Pages begin after the
    last id of the one before, so each takes the same time and memory, and rows that come or go move no other.
    """
    matching += f" AND (%(after)s::text IS NULL OR {id} > %(after)s)"
    ends: list[Row] = []
    if limit is not None:
        ends = await db.fetch(f"{name}_end", f"SELECT {id} {matching} ORDER BY {id} OFFSET {limit - 1} LIMIT 2", params)
    until = ends[0]["id"] if ends else None

    async def pages() -> AsyncIterator[str]:
        after, count = params["after"], size
        while count == size:
            [page] = await db.fetch(
                name,
                f"""
                SELECT count(*), max(page.id) AS last, string_agg(page.json, ',' ORDER BY page.id) AS json
                FROM (
                    {select}
                    {matching} AND (%(until)s::text IS NULL OR {id} <= %(until)s)
                    ORDER BY {id}
                    LIMIT {size}
                ) AS page
                """,
                {**params, "after": after, "until": until},
            )
            after, count = page["last"], page["count"]
            if count:
                yield page["json"]

    return until if len(ends) == 2 else None, pages()
