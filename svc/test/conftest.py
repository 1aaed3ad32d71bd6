from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from svc.test.faults import filled, folders, initialise, new_database, serving, sql, start


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """The folder of a PostgreSQL that the tests of this file may stop, kill and freeze."""
    with folders() as parent:
        initialise(parent / "a")
        start(parent / "a")
        yield parent / "a"


@pytest.fixture(scope="module")
def service_of_all(server: Path) -> Iterator[SimpleNamespace]:
    with serving(new_database(server)) as served:
        yield served


@pytest.fixture
def served(service_of_all: SimpleNamespace) -> SimpleNamespace:
    """The service with every connection open, on tables that are empty."""
    sql(service_of_all.url, "TRUNCATE applications CASCADE")
    service_of_all.before = filled(service_of_all)
    return service_of_all
