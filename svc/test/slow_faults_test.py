"""Faults that take their time: `pipenv run test-faults` runs them after the quick ones."""

import socket
import tempfile

import pytest
from psycopg2.extensions import make_dsn

from svc.test.faults import filled, new_database, serving

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def test_a_host_that_is_silent_holds_up_no_other_connection(server):
    live = new_database(server)
    with tempfile.TemporaryDirectory() as silent, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{silent}/.s.PGSQL.5432")
        listening.listen(100)
        url = make_dsn(live, host=f"{silent},{server}")
        with serving(url, db_lock_timeout=3) as served:
            served.url = live
            filled(served)  # all at once: each takes DB_CONNECT_TIMEOUT, and together they would take five of it
