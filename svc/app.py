"""The HTTP API: its routes, how they are opened and closed, and `python -m svc.app`, which serves them."""

import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Path, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from svc import db, errors, migrations, models, repo, settings, watch
from svc.answers import PREFIX, admitted, created, current, deleted, listed, path_id, path_names, shown, written
from svc.errors import problem, responses
from svc.models import (
    ULID_PATTERN,
    Application,
    ApplicationCreate,
    ApplicationUpdate,
    Configuration,
    ConfigurationCreate,
    ConfigurationUpdate,
    ConfigurationVersion,
    Health,
    Id,
    Name,
)
from svc.strict import StrictRoute, ended, guarded

IMMUTABLE = "max-age=31536000, immutable"

PathId = Annotated[Id, Path()]
Version = Annotated[int, Path(ge=1, le=models.MAX_VERSION)]
After = Annotated[Id | None, Query(description="Only what comes after this id.")]
Before = Annotated[int | None, Query(ge=1, le=models.MAX_VERSION, description="Only what is older than this version.")]
Limit = Annotated[int | None, Query(ge=1, le=1000, description="At most so many; the Link header names the next.")]
OfApplication = Annotated[Id | None, Query(description="Only those of this application.")]
NameFilter = Annotated[Name | None, Query(description="Only those with exactly this name.")]
Contains = Annotated[
    str | None, Query(description="Only those whose config contains this JSON object.", examples=['{"port": 5432}'])
]
Cascade = Annotated[bool, Query(description="Delete its configurations too.")]


def header(name: str, description: str) -> dict[str, Any]:
    return {name: {"description": description, "schema": {"type": "string"}}}


def parameter(name: str, place: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": place, "description": description, "schema": schema, "required": place == "path"}


ETAG = header("ETag", "The id and the version, strong")
LOCATION = header("Location", "Where it can be read")
LINK = header("Link", 'rel="next", while there is more')
WRITTEN = {200: {"headers": ETAG}}
SHOWN = WRITTEN | {304: {"description": "Not Modified: If-None-Match names what is stored.", "headers": ETAG}}

# The routes take these from the request itself: FastAPI's own way costs 15 to 35 µs for each.
PATH_ID = parameter("id", "path", "A ULID", {"type": "string", "pattern": ULID_PATTERN})
IF_NONE_MATCH = parameter(
    "If-None-Match", "header", "Answer 304 if one of these ETags is the stored one's, or *.", {"type": "string"}
)
IF_MATCH = parameter(
    "If-Match", "header", "Write only if one of these ETags is the stored one's, or *.", {"type": "string"}
)
CONDITIONAL = {"parameters": [PATH_ID, IF_MATCH]}
WAIT = parameter(
    "wait",
    "query",
    "With If-None-Match: so many seconds to wait for a change before the answer is 304.",
    {"type": "number", "minimum": 0, "maximum": 60},
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    config = settings.load()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("svc").setLevel(config.level)
    # One descriptor a connection: the usual soft limit of 1,024 would keep clients out.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with db.opened(config), watch.opened():
        yield


api = APIRouter(prefix=PREFIX, route_class=StrictRoute)


# --- Applications ---


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
    listing = await repo.list_applications(after, limit, name)
    return await listed("applications", listing, "after", {"limit": limit, "name": name})


@api.get(
    "/applications/{id}",
    response_model=Application,
    responses=responses(400, 404) | SHOWN,
    openapi_extra={"parameters": [PATH_ID, IF_NONE_MATCH]},
)
async def read_application(request: Request) -> Response:
    return shown(request, await repo.read_application(path_id(request)), "There is no application with this id.")


@api.put(
    "/applications/{id}",
    response_model=Application,
    responses=responses(400, 404, 408, 409, 412, 413) | WRITTEN,
    openapi_extra=CONDITIONAL,
)
async def update_application(request: Request, changes: ApplicationUpdate) -> Response:
    id = path_id(request)
    return written(await repo.update_application(id, changes, admitted(request, id)), "application")


@api.delete(
    "/applications/{id}",
    status_code=204,
    responses=responses(400, 404, 408, 409, 412, 413),
    openapi_extra=CONDITIONAL,
)
async def delete_application(request: Request, cascade: Cascade = False) -> Response:
    id = path_id(request)
    versions = admitted(request, id)
    row = await repo.delete_application(id, cascade, versions)
    if row and not row["written"] and (versions is None or str(row["version"]) in versions):
        raise HTTPException(
            409, f"The application has configurations ({row['json']}): delete them, or add ?cascade=true."
        )
    return deleted(row, "application")


@api.get(
    "/applications/{application_name:text}/configurations/{name:text}",
    response_model=Configuration,
    responses=responses(400, 404) | SHOWN,
    openapi_extra={
        "parameters": [
            parameter("application_name", "path", "Percent-encoded", {"type": "string"}),
            parameter("name", "path", "Percent-encoded; it may hold slashes", {"type": "string"}),
            IF_NONE_MATCH,
            WAIT,
        ]
    },
)
async def read_configuration_by_name(request: Request) -> Response:
    row = await current(request, path_names(request), repo.read_configuration_by_name)
    missing = "This application has no configuration with this name."
    return shown(request, row, missing if row["application_id"] else "There is no application with this name.")


# --- Configurations ---


@api.post(
    "/configurations",
    status_code=201,
    response_model=Configuration,
    responses=responses(400, 408, 409, 413) | {201: {"headers": ETAG | LOCATION}},
)
async def create_configuration(new: ConfigurationCreate) -> Response:
    return created("configurations", await repo.create_configuration(new))


@api.get("/configurations", response_model=list[Configuration], responses=responses(400) | {200: {"headers": LINK}})
async def list_configurations(
    after: After = None,
    limit: Limit = None,
    application_id: OfApplication = None,
    name: NameFilter = None,
    contains: Contains = None,
) -> Response:
    document = None if contains is None else models.parse_document(contains, ("query", "contains"))
    listing = await repo.list_configurations(after, limit, application_id, name, document)
    query = {"limit": limit, "application_id": application_id, "name": name, "contains": contains}
    return await listed("configurations", listing, "after", query)


@api.get(
    "/configurations/{id}",
    response_model=Configuration,
    responses=responses(400, 404) | SHOWN,
    openapi_extra={"parameters": [PATH_ID, IF_NONE_MATCH, WAIT]},
)
async def read_configuration(request: Request) -> Response:
    row = await current(request, path_id(request), repo.read_configuration)
    return shown(request, row, "There is no configuration with this id.")


@api.put(
    "/configurations/{id}",
    response_model=Configuration,
    responses=responses(400, 404, 408, 409, 412, 413) | WRITTEN,
    openapi_extra=CONDITIONAL,
)
async def update_configuration(request: Request, changes: ConfigurationUpdate) -> Response:
    id = path_id(request)
    return written(await repo.update_configuration(id, changes, admitted(request, id)), "configuration")


@api.delete(
    "/configurations/{id}",
    status_code=204,
    responses=responses(400, 404, 408, 412, 413),
    openapi_extra=CONDITIONAL,
)
async def delete_configuration(request: Request) -> Response:
    id = path_id(request)
    return deleted(await repo.delete_configuration(id, admitted(request, id)), "configuration")


# --- Versions of configurations ---


@api.get(
    "/configurations/{id}/versions",
    response_model=list[ConfigurationVersion],
    responses=responses(400, 404) | {200: {"headers": LINK}},
)
async def list_versions(id: PathId, before: Before = None, limit: Limit = None) -> Response:
    listing = await repo.list_versions(id, before, limit)
    if listing is None:
        raise HTTPException(404, "There never was a configuration with this id.")
    return await listed(f"configurations/{id}/versions", listing, "before", {"limit": limit})


@api.get("/configurations/{id}/versions/{version}", response_model=ConfigurationVersion, responses=responses(400, 404))
async def read_version(id: PathId, version: Version) -> Response:
    row = await repo.read_version(id, version)
    if row is None:
        raise HTTPException(404, "There is no such version of a configuration with this id.")
    return Response(row["json"], headers={"Cache-Control": IMMUTABLE}, media_type="application/json")


@api.post(
    "/configurations/{id}/versions/{version}/restore",
    response_model=Configuration,
    responses=responses(400, 404, 408, 409, 412, 413) | WRITTEN,
    openapi_extra=CONDITIONAL,
)
async def restore_version(request: Request, version: Version) -> Response:
    id = path_id(request)
    row = await repo.restore_version(id, version, admitted(request, id))
    return written(row, "configuration, or none of this version,")


app = FastAPI(
    title="Config Service",
    version="1.0.0",
    description="Applications and their configurations (JSON documents), kept in PostgreSQL.",
    lifespan=lifespan,
    redirect_slashes=False,
)
app.router.route_class = StrictRoute
app.include_router(api)
# Routes are matched in their order: first those that are asked most.
HOT = (read_configuration, read_configuration_by_name, read_application, update_configuration)
app.router.routes.sort(key=lambda route: HOT.index(route.endpoint) if route.endpoint in HOT else len(HOT))
app.add_middleware(guarded)
app.add_middleware(ended)
errors.install(app)


@app.get("/", include_in_schema=False)
async def root() -> Response:
    return RedirectResponse("/docs")


@app.get("/health", response_model=Health, responses=responses(400), tags=["health"])
async def health() -> Response:
    """200 if the database answers, takes writes, and has the schema that this code needs."""
    state = await repo.read_state()
    if wrong := "the database is read-only" if state["read_only"] else migrations.health(state["migrations"]):
        return problem(503, f"Not ready: {wrong}.", errors.RETRY_AFTER)
    return JSONResponse(
        {"status": "ok", "schema_version": max(state["migrations"]), "pool": db.use(), "waiters": watch.count()}
    )


@app.get("/health/live", responses=responses(400), tags=["health"])
async def health_live() -> dict[str, str]:
    """200 while the process serves. It never asks the database."""
    return {"status": "ok"}


def openapi() -> dict[str, Any]:
    if app.openapi_schema is None:
        errors.describe(FastAPI.openapi(app))  # which keeps the document that is changed here
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
    serve(config, workers=config.workers)


def serve(config: settings.Settings, **options: Any) -> None:
    uvicorn.run(
        "svc.app:app",
        host=config.host,
        port=config.port,
        log_level=config.level.lower(),
        timeout_graceful_shutdown=config.shutdown_timeout,
        ws="none",
        **options,
    )


if __name__ == "__main__":
    main()
