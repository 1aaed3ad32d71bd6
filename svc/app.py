"""The HTTP API: its routes, its start and its end, and `python -m svc.app`, which serves them."""

import asyncio
import gc
import logging
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from urllib.parse import unquote

import psycopg2
import uvicorn
from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Path, Query
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from pydantic import BeforeValidator

from svc import db, errors, index, metrics, migrations, models, repo, settings, watch
from svc.errors import problems
from svc.middleware import Request, Route, middleware
from svc.responses import created, deleted, document, json_response, read_or_wait, stream_list, written

MERGE_PATCH = "application/merge-patch+json"

PathId = Annotated[str, Path(pattern=models.ULID_PATTERN, description="A ULID.")]  # python-ulid would take 9 µs
Decoded = Annotated[models.Name, BeforeValidator(lambda sent: unquote(sent, errors="strict"))]
OwnerName = Annotated[Decoded, Path(description="Percent-encoded.", examples=["shop"])]
PathName = Annotated[Decoded, Path(description="Percent-encoded.", examples=["production"])]
Version = Annotated[int, Path(ge=1, le=models.MAX_VERSION, description="Counts from 1.", examples=[1])]
Cascade = Annotated[bool, Query(description="Delete its configurations too.")]
Wait = Annotated[float | None, Query(ge=0, le=60, description="Seconds to wait for a change, with If-None-Match.")]
Patch = Annotated[models.ConfigurationUpdate, Body(media_type=MERGE_PATCH)]

# What the routes answer with, for OpenAPI.
LINK = {"Link": {"schema": {"type": "string"}, "description": 'rel="next", while there is more'}}
LOCATION = {"Location": {"schema": {"type": "string"}, "description": "Where it can be read"}}


def header(name: str, meaning: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "description": meaning, "schema": {"type": "string"}}


IF_NONE_MATCH = [header("If-None-Match", "Answer 304 if one of these is the current ETag, or *.")]
CONDITIONS = [
    header("If-Match", "Write only if one of these is the current ETag, or *."),
    header("If-None-Match", "Do not write if one of these is the current ETag, or *."),
]
ETAG = {"ETag": {"schema": {"type": "string"}, "description": "Strong. It differs for every state ever stored."}}
LIST = {200: {"headers": LINK}}
READ = {200: {"headers": ETAG}, 304: {"headers": ETAG}} | problems(404)
CREATE = {201: {"headers": ETAG | LOCATION}} | problems(408, 409, 413)
DELETE = problems(404, 412)
WRITE = {200: {"headers": ETAG}} | problems(404, 409, 412)
UPDATE = WRITE | problems(408, 413)
PATCH = UPDATE | problems(415)
PUT = UPDATE | {201: CREATE[201] | {"model": models.Configuration}}


def check_patch(request: Request) -> None:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != MERGE_PATCH:
        raise HTTPException(415, f"A patch is sent as {MERGE_PATCH}.", {"Accept-Patch": MERGE_PATCH})


PATCH_ONLY = [Depends(check_patch)]


def set_up_log(config: settings.Settings) -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("svc").setLevel(config.level)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    config = settings.load()
    set_up_log(config)
    # One descriptor a connection: the usual soft limit of 1,024 would keep clients out.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    async with db.opened(config):
        looking = asyncio.create_task(watch.keep_looking())
        gc.freeze()  # what is loaded by now stays: to look through it again would stop the process for 15 ms
        yield
        looking.cancel()


applications = APIRouter(prefix="/applications", tags=["applications"], route_class=Route)
configurations = APIRouter(prefix="/configurations", tags=["configurations"], route_class=Route)
named = APIRouter(prefix="/applications/{application_name}/configurations", tags=["configurations"], route_class=Route)
versions = APIRouter(prefix="/configurations/{id}/versions", tags=["versions"], route_class=Route)
changes = APIRouter(prefix="/changes", tags=["versions"], route_class=Route)
operation = APIRouter(tags=["operation"], route_class=Route)


# --- Applications ---


@applications.post("", status_code=201, response_model=models.Application, responses=CREATE)
async def create_application(request: Request, new: models.ApplicationCreate) -> Response:
    """Add an application. Its name must be free."""
    return created(request, await repo.create_application(new))


@applications.get("", response_model=list[models.Application], responses=LIST)
async def list_applications(request: Request, wanted: Annotated[models.ApplicationFilter, Query()]) -> Response:
    """All applications, ordered by id."""
    return await stream_list(request, repo.list_applications(wanted))


@applications.get("/{id}", response_model=models.Application, responses=READ)
async def read_application(request: Request, id: PathId) -> Response:
    """One application, with the ids of its configurations."""
    return document(await repo.read_application(id), request.when.if_none_match)


@applications.put("/{id}", response_model=models.Application, responses=UPDATE)
async def update_application(request: Request, id: PathId, changes: models.ApplicationUpdate) -> Response:
    """Change the fields that are present, and keep the others."""
    return written(await repo.update_application(id, changes, request.when), request.when)


@applications.delete("/{id}", status_code=204, responses=DELETE | problems(409))
async def delete_application(request: Request, id: PathId, cascade: Cascade = False) -> Response:
    """Remove an application that has no configurations, or any with `cascade`."""
    row = await repo.delete_application(id, cascade, request.when)
    if row and not row["written"] and repo.conditions_hold(row, request.when):
        raise HTTPException(409, "The application has configurations: delete them, or add ?cascade=true.")
    return deleted(row, request.when)


# --- Configurations ---


@configurations.post("", status_code=201, response_model=models.Configuration, responses=CREATE)
async def create_configuration(request: Request, new: models.ConfigurationCreate) -> Response:
    """Add a configuration to an application. Its name must be free there."""
    return created(request, await repo.create_configuration(new))


@configurations.get("", response_model=list[models.Configuration], responses=LIST)
async def list_configurations(request: Request, wanted: Annotated[models.ConfigurationFilter, Query()]) -> Response:
    """All configurations, ordered by id, or those that match."""
    return await stream_list(request, repo.list_configurations(wanted))


@configurations.get("/{id}", response_model=models.Configuration, responses=READ)
async def read_configuration(request: Request, id: PathId, wait: Wait = None) -> Response:
    """One configuration."""
    return document(await read_or_wait(request, id, wait), request.when.if_none_match)


@configurations.put("/{id}", response_model=models.Configuration, responses=UPDATE)
async def update_configuration(request: Request, id: PathId, changes: models.ConfigurationUpdate) -> Response:
    """Change the fields that are present, and keep the others. `config` is replaced whole."""
    return written(await repo.update_configuration(id, changes, request.when), request.when)


@configurations.patch("/{id}", response_model=models.Configuration, responses=PATCH, dependencies=PATCH_ONLY)
async def patch_configuration(request: Request, id: PathId, changes: Patch) -> Response:
    """Merge a patch into a configuration (RFC 7396): members of `config` that are null are removed."""
    return written(await repo.update_configuration(id, changes, request.when, merge=True), request.when)


@configurations.delete("/{id}", status_code=204, responses=DELETE)
async def delete_configuration(request: Request, id: PathId) -> Response:
    """Remove a configuration. Its versions are kept."""
    return deleted(await repo.delete_configuration(id, request.when), request.when)


# --- Configurations by name, for programs and pipelines, which know names and not ids ---


@named.get("", response_model=list[models.Configuration], responses=LIST | problems(404))
async def list_configurations_by_name(
    request: Request, application_name: OwnerName, wanted: Annotated[models.NamedFilter, Query()]
) -> Response:
    """All configurations of one application, ordered by id, or those that match."""
    row = await repo.read_configuration((application_name, ""))  # no configuration has this name
    if row["application_id"] is None:
        raise HTTPException(404, "There is no application with this name.")
    return await stream_list(request, repo.list_configurations(wanted, row["application_id"]))


@named.get("/{name:path}", response_model=models.Configuration, responses=READ)
async def read_configuration_by_name(
    request: Request, application_name: OwnerName, name: PathName, wait: Wait = None
) -> Response:
    """One configuration by the names of its application and its own."""
    return document(await read_or_wait(request, (application_name, name), wait), request.when.if_none_match)


@named.put("/{name:path}", response_model=models.Configuration, responses=PUT)
async def put_configuration(
    request: Request, application_name: OwnerName, name: PathName, new: models.ConfigurationPut
) -> Response:
    """Replace a configuration, or create it. `If-None-Match: *` creates only."""
    row = await repo.put_configuration((application_name, name), new, request.when)
    if row["written"] and row["created"]:
        return created(request, row)
    if not row["etag"] and row["application_id"]:
        raise HTTPException(412, "There is no configuration with this name: leave If-Match out to create it.")
    return written(row, request.when)


@named.patch("/{name:path}", response_model=models.Configuration, responses=PATCH, dependencies=PATCH_ONLY)
async def patch_configuration_by_name(
    request: Request, application_name: OwnerName, name: PathName, changes: Patch
) -> Response:
    """Merge a patch into a configuration (RFC 7396): members of `config` that are null are removed."""
    row = await repo.update_configuration((application_name, name), changes, request.when, merge=True)
    return written(row, request.when)


@named.delete("/{name:path}", status_code=204, responses=DELETE)
async def delete_configuration_by_name(request: Request, application_name: OwnerName, name: PathName) -> Response:
    """Remove a configuration. Its versions are kept."""
    return deleted(await repo.delete_configuration((application_name, name), request.when), request.when)


# --- Versions of configurations ---


@versions.get("", response_model=list[models.ConfigurationVersion], responses=LIST | problems(404))
async def list_versions(request: Request, id: PathId, wanted: Annotated[models.VersionFilter, Query()]) -> Response:
    """Every version of a configuration, newest first, also after its deletion."""
    if not await repo.has_versions(id):
        raise HTTPException(404, "There never was a configuration with this id.")
    return await stream_list(request, repo.list_versions(id, wanted))


@versions.get("/{version}", response_model=models.ConfigurationVersion, responses=problems(404))
async def read_version(id: PathId, version: Version) -> Response:
    """One version of a configuration."""
    row = await repo.read_version(id, version)
    if row is None:
        raise HTTPException(404, "There is no such version of a configuration with this id.")
    return json_response(row["json"])


@versions.post("/{version}/restore", response_model=models.Configuration, responses=WRITE)
async def restore_version(request: Request, id: PathId, version: Version) -> Response:
    """Make the name, the comments and the config of a version the newest again, also of a deleted configuration."""
    row = await repo.restore_version(id, version, request.when)
    if row is None or (not row["written"] and repo.conditions_hold(row, request.when)):
        raise HTTPException(404, "Nothing to restore: no such version or application, or If-Match on a deleted one.")
    return written(row, request.when)


@changes.get("", response_model=list[models.ChangeEntry], responses=LIST)
async def list_changes(request: Request, wanted: Annotated[models.ChangeFilter, Query()]) -> Response:
    """Who changed what, newest first, without the documents. A write that was slow may appear below newer ones."""
    return await stream_list(request, repo.list_changes(wanted))


# --- The service itself ---


@operation.get("/health", openapi_extra={"security": []})
async def health() -> dict[str, str]:
    """200 if the database answers, takes writes, and has the schema and the grants that this code needs."""
    if fault := await find_fault():
        raise HTTPException(503, f"Not ready: {fault}.", errors.RETRY_AFTER)
    return {"status": "ok"}


async def find_fault() -> str | None:
    """Why the service cannot work on its database, or None if it can."""
    try:
        state = await repo.read_state()
    except psycopg2.Error as error:
        return errors.reason(error)
    if state["read_only"]:
        return "the database is read-only"
    if state["missing_grants"]:
        return f"a grant is missing: {', '.join(state['missing_grants'])}"
    return migrations.health(state["migrations"])


@operation.get("/health/live", openapi_extra={"security": []})
async def health_live() -> dict[str, str]:
    """200 while the process serves. It never asks the database."""
    return {"status": "ok"}


@operation.get("/metrics", response_class=PlainTextResponse, responses=problems(401, 403))
async def read_metrics() -> Response:
    """What the process that answers has counted, for Prometheus."""
    return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")


@operation.get("/", include_in_schema=False)
async def read_index(request: Request) -> Response:
    return HTMLResponse(index.page(openapi, str(request.base_url).rstrip("/")))


app = FastAPI(
    title="Config Service",
    version="1.0.0",
    description="Applications and their configurations (JSON documents), kept in PostgreSQL.",
    openapi_tags=[
        {"name": "applications", "description": "What has configurations: a program, a service."},
        {"name": "configurations", "description": "JSON documents with a name, found by id or by names."},
        {"name": "versions", "description": "What configurations were, who changed them, and the way back."},
        {"name": "operation", "description": "The service itself."},
    ],
    lifespan=lifespan,
    redirect_slashes=False,
    generate_unique_id_function=lambda route: route.name,
    responses=problems(400, 503) | {"default": problems(405)[405] | {"description": "Any other error"}},
)
for router in (applications, configurations, named, versions, changes):
    app.include_router(router, prefix="/api/v1", responses=problems(401, 403))
app.include_router(operation)
# In place of the error middlewares of Starlette: this one answers every error.
app.middleware_stack = middleware(app.router)

# FastAPI serves this document, once it has what FastAPI does not know: the shape of problems, and what needs a token.
openapi = app.openapi()
openapi["components"]["schemas"] |= errors.schemas()
openapi["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
openapi["servers"] = app.servers  # to which FastAPI adds root_path
openapi["security"] = [{"token": []}]
for described in (each for methods in openapi["paths"].values() for each in methods.values()):
    headers = IF_NONE_MATCH * ("304" in described["responses"]) + CONDITIONS * ("412" in described["responses"])
    described.setdefault("parameters", []).extend(headers)

# Routes are tried in their order, which takes 2 µs each: first those that are asked most.
app.router.routes.sort(
    key=lambda route: (not getattr(route, "hot", False), route.path[-1] != "}", "/applications/" in route.path)
)


def main() -> None:
    """Serve until SIGTERM or SIGINT: then answer what was accepted, for SHUTDOWN_TIMEOUT seconds at most."""
    config = settings.load()
    config.database()
    if config.auth is None and config.host not in ("127.0.0.1", "::1", "localhost"):
        raise SystemExit(f"HOST={config.host} lets others in: set AUTH=on, or AUTH=off if a proxy guards the service")
    # uvicorn repeats the signal when it has shut down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    set_up_log(config)
    uvicorn.run(
        "svc.app:app",
        host=config.host,
        port=config.port,
        log_config=None,  # its lines have the format of the others
        log_level=config.level.lower(),
        workers=config.workers,
        timeout_graceful_shutdown=config.shutdown_timeout,
        timeout_keep_alive=75,  # longer than the load balancer's, which else sends into a closing connection
        access_log=False,  # the middleware logs
        ws="none",
    )


if __name__ == "__main__":
    main()
