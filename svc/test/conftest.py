from collections.abc import Iterator
from pathlib import Path

import pytest

from svc.test.faults import folders, initialise, start


@pytest.fixture(scope="module")
def server() -> Iterator[Path]:
    """The folder of a PostgreSQL that the tests of this file may stop, kill and freeze."""
    with folders() as parent:
        initialise(parent / "a")
        start(parent / "a")
        yield parent / "a"
