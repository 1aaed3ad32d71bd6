"""The HTTP API: its routes, how they are opened and closed, and `python -m svc.app`, which serves them."""

import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import urlencode

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Path, Query
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from svc import db, errors, migrations, repo, settings
from svc.db import Row
from svc.errors import problem, responses
from svc.models import (
    APPLICATION_ID,
    ULID_PATTERN,
    Application,
    ApplicationCreate,
    ApplicationUpdate,
    Configuration,
    ConfigurationCreate,
    ConfigurationUpdate,
    Health,
    Name,
)
from svc.strict import StrictRoute, ended, guarded

PREFIX = "/api/v1"

Id = Annotated[str, Path(pattern=ULID_PATTERN, examples=[APPLICATION_ID])]
After = Annotated[str, Query(pattern=ULID_PATTERN, description="Only what comes after this id.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="At most so many; the Link header names the rest.")]
NameFilter = Annotated[Name, Query(description="Only those with exactly this name.")]

ETAG = {"ETag": {"description": '"<id>.<version>", strong', "schema": {"type": "string"}}}
LOCATION = {"Location": {"description": "Where it can be read", "schema": {"type": "string"}}}
LINK = {"Link": {"description": 'rel="next", while there is more', "schema": {"type": "string"}}}


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    config = settings.load()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("svc").setLevel(config.level)
    async with db.opened(config):
        yield


api = APIRouter(prefix=PREFIX, route_class=StrictRoute)


@api.post(
    "/applications",
    status_code=201,
    response_model=Application,
    responses=responses(400, 408, 409, 413) | {201: {"headers": ETAG | LOCATION}},
)
async def create_application(new: ApplicationCreate) -> Response:
    return created("applications", await repo.create_application(new))


@api.get("/applications", response_model=list[Application], responses=responses(400) | {200: {"headers": LINK}})
async def list_applications(after: After = None, limit: Limit = None, name: NameFilter = None) -> Response:
    next_after, pages = await repo.list_applications(after, limit, name)
    return await listed("applications", next_after, pages, {"limit": limit, "name": name})


@api.get("/applications/{id}", response_model=Application, responses=responses(400, 404) | {200: {"headers": ETAG}})
async def read_application(id: Id) -> Response:
    return document(await repo.read_application(id), "application")


@api.put(
    "/applications/{id}",
    response_model=Application,
    responses=responses(400, 404, 408, 409, 413) | {200: {"headers": ETAG}},
)
async def update_application(id: Id, changes: ApplicationUpdate) -> Response:
    return document(await repo.update_application(id, changes), "application")


@api.post(
    "/configurations",
    status_code=201,
    response_model=Configuration,
    responses=responses(400, 408, 409, 413) | {201: {"headers": ETAG | LOCATION}},
)
async def create_configuration(new: ConfigurationCreate) -> Response:
    return created("configurations", await repo.create_configuration(new))


@api.get("/configurations/{id}", response_model=Configuration, responses=responses(400, 404) | {200: {"headers": ETAG}})
async def read_configuration(id: Id) -> Response:
    return document(await repo.read_configuration(id), "configuration")


@api.put(
    "/configurations/{id}",
    response_model=Configuration,
    responses=responses(400, 404, 408, 409, 413) | {200: {"headers": ETAG}},
)
async def update_configuration(id: Id, changes: ConfigurationUpdate) -> Response:
    return document(await repo.update_configuration(id, changes), "configuration")


def document(row: Row | None, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """What PostgreSQL wrote, as it is, with its ETag; 404 if there is no row."""
    if row is None:
        raise HTTPException(404, f"There is no {kind} with this id.")
    shown = {"ETag": f'"{row["id"]}.{row["version"]}"', "Cache-Control": "no-cache", **(headers or {})}
    return Response(row["json"], status, shown, media_type="application/json")


def created(kind: str, row: Row) -> Response:
    return document(row, kind, 201, {"Location": f"{PREFIX}/{kind}/{row['id']}"})


async def listed(path: str, next_after: str | None, pages: AsyncIterator[str], query: dict[str, Any]) -> Response:
    """A JSON array, sent page by page as it is read; its first page is read before the status is sent."""
    first = await anext(pages, "")

    async def body() -> AsyncIterator[str]:
        yield "[" + first
        async for page in pages:
            yield "," + page
        yield "]"

    given = {name: value for name, value in {**query, "after": next_after}.items() if value is not None}
    link = {"Link": f'<{PREFIX}/{path}?{urlencode(given)}>; rel="next"'} if next_after else None
    return StreamingResponse(body(), headers=link, media_type="application/json")


app = FastAPI(
    title="Config Service",
    version="1.0.0",
    description="Applications and their configurations (JSON documents), kept in PostgreSQL.",
    lifespan=lifespan,
    redirect_slashes=False,
)
app.router.route_class = StrictRoute
app.include_router(api)
app.add_middleware(guarded)
app.add_middleware(ended)
errors.install(app)


@app.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/docs")


@app.get("/health", response_model=Health, responses=responses(), tags=["health"])
async def health() -> Response:
    """200 if the database answers, takes writes, and has the schema that this code needs."""
    state = await repo.read_state()
    if wrong := "the database is read-only" if state["read_only"] else migrations.health(state["migrations"]):
        return problem(503, f"Not ready: {wrong}.", errors.RETRY_AFTER)
    return JSONResponse({"status": "ok", "schema_version": max(state["migrations"]), "pool": db.use()})


@app.get("/health/live", tags=["health"])
async def health_live() -> dict[str, str]:
    """200 while the process serves. It never asks the database."""
    return {"status": "ok"}


def openapi() -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = errors.describe(get_openapi(title=app.title, version=app.version, routes=app.routes))
    return app.openapi_schema


app.openapi = openapi


def check_port(host: str, port: int) -> None:
    """Exits with one line if nothing can listen there."""
    try:
        [*_, (family, kind, _, _, address)] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise SystemExit(f"cannot listen on {host}:{port}: {error.strerror}; set HOST and PORT") from None


def main() -> None:
    """Serve until SIGTERM or SIGINT: then answer what was accepted, for SHUTDOWN_TIMEOUT seconds at most."""
    config = settings.load()
    config.database()
    check_port(config.host, config.port)
    # uvicorn hands the signal on when it has shut down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    uvicorn.run(
        "svc.app:app",
        host=config.host,
        port=config.port,
        workers=config.workers,
        log_level=config.level.lower(),
        timeout_graceful_shutdown=config.shutdown_timeout,
        ws="none",
    )


if __name__ == "__main__":
    main()
