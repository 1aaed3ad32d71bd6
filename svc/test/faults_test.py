"""Faults that take no more than a second or two each."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import pytest

from svc.test.faults import (
    AT_WORK,
    CONNECTIONS,
    all_at_once,
    backends,
    compare,
    connect,
    filled,
    leave,
    locked,
    new_database,
    recovered,
    request,
    restart,
    running,
    serving,
    sql,
    terminate,
    writers,
    written,
)
from svc.test.process import until

pytestmark = pytest.mark.faults


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


def test_the_first_requests_after_an_idle_restart_all_succeed(server, served):
    restart(server)
    statuses = [served.client.post("/api/v1/applications", json={"name": f"n{n}"}).status_code for n in range(20)]
    assert statuses == [201] * 20
    recovered(served, served.before)


def test_backends_that_end_at_work_cost_some_503_and_no_acknowledged_write(served):
    with writers(served.base, 8) as ledger:
        written(ledger)
        with locked(served.url, "applications"):
            until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
            terminate(served.url)
        written(ledger)
        with locked(served.url, "applications"):
            until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
            killed = backends(served.url)
            os.kill(killed[0], signal.SIGKILL)  # the postmaster then ends all others, and recovers
            until(lambda: not any(map(running, killed)))
        written(ledger)
    compare(served.url, ledger)
    recovered(served, served.before)


def test_a_database_that_became_read_only_is_reported_and_left_by_itself(served):
    name = sql(served.url, "SELECT current_database() AS name")[0]["name"]
    made = served.client.post("/api/v1/applications", json={"name": "x"}).json()
    sql(served.url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    terminate(served.url)
    path = f"/api/v1/applications/{made['id']}"
    with ThreadPoolExecutor(CONNECTIONS) as clients, locked(served.url, "applications"):
        reads = [clients.submit(served.client.get, f"/api/v1/applications?name={n}") for n in range(CONNECTIONS)]
        until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
    assert [read.result().status_code for read in reads] == [200] * CONNECTIONS
    write = served.client.put(path, json={"name": "y"})
    assert (write.status_code, write.headers["retry-after"]) == (503, "1")
    assert served.client.get(path).json() == made
    health = served.client.get("/health")
    assert (health.status_code, health.json()["detail"]) == (503, "Not ready: the database is read-only.")
    # Connections that were made meanwhile stay read-only, and nobody writes to a service that is not ready.
    sql(served.url, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert [served.client.get("/health").status_code for _ in range(3)][-1] == 200
    statuses = [served.client.put(path, json={"name": f"y{n}"}).status_code for n in range(20)]
    assert statuses == [200] * 20
    recovered(served, served.before)


def test_too_few_connections_are_503_until_there_are_more(served):
    sql(served.url, "ALTER ROLE service CONNECTION LIMIT 0")
    terminate(served.url)
    until(lambda: not backends(served.url))
    assert [served.client.get("/api/v1/applications").status_code for _ in range(10)] == [503] * 10
    assert served.client.get("/health").status_code == 503
    assert served.client.get("/health/live").status_code == 200
    sql(served.url, "ALTER ROLE service CONNECTION LIMIT 2")
    with writers(served.base, 8) as ledger:
        written(ledger)
        sql(served.url, "ALTER ROLE service CONNECTION LIMIT -1")
        written(ledger)
    compare(served.url, ledger)
    recovered(served, served.before)


def test_500_clients_at_once_are_queued_and_answered(served):
    requests = [request("POST", "/applications", {"name": f"n{n}"}) for n in range(400)]
    requests += [request("GET", f"/applications?name=n{n}") for n in range(100)]
    statuses = asyncio.run(all_at_once(served.base, requests))
    assert Counter(statuses) == {201: 400, 200: 100}
    assert sql(served.url, "SELECT count(*) FROM applications") == [{"count": 400}]
    recovered(served, served.before)


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_leaves_a_whole_write_or_none(served, reset):
    bodies = {f"n{n}": {"name": f"n{n}", "comments": "x" * 1000} for n in range(80)}
    sent = [request("POST", "/applications", body) for body in bodies.values()]
    for n, whole in enumerate(sent[:60]):
        end = [20, whole.index(b"\r\n\r\n") + 4, len(whole) - 500][n % 3]  # in the head, before the body, within it
        leave(connect(served.base, whole[:end]), reset)
    for whole in sent[60:70]:
        leave(connect(served.base, whole), reset)
    with locked(served.url, "applications"):
        waiting = [connect(served.base, whole) for whole in sent[70:]]
        until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
        for each in waiting:
            leave(each, reset)
    recovered(served, served.before)
    rows = {row["name"]: row for row in sql(served.url, "SELECT name, comments FROM applications")}
    assert all(row == bodies[name] for name, row in rows.items())
    assert not rows.keys() & {f"n{n}" for n in range(60)}
    assert rows.keys() >= {f"n{n}" for n in range(70, 80)}


def test_what_was_accepted_before_sigterm_is_answered_and_stored(server):
    with serving(new_database(server), shutdown_timeout=5) as served:
        with writers(served.base) as ledger, ThreadPoolExecutor(CONNECTIONS) as clients:
            written(ledger)
            with locked(served.url, "applications"):
                path = "/api/v1/applications"
                asked = [clients.submit(served.client.post, path, json={"name": f"n{n}"}) for n in range(CONNECTIONS)]
                until(lambda: len(backends(served.url, AT_WORK)) == CONNECTIONS)
                ledger.ending.set()
                served.process.send_signal(signal.SIGTERM)
                stopped = monotonic()
            assert {each.result().status_code for each in asked} == {201}
            assert served.process.wait(10) == 0
            assert monotonic() - stopped < 5
        sql(served.url, "DELETE FROM applications WHERE name ~ '^n'")
        compare(served.url, ledger)


def test_a_start_with_too_few_connections_loses_none_of_the_pool(server):
    url = new_database(server)
    sql(url, "ALTER ROLE service CONNECTION LIMIT 3")
    try:
        with serving(url, db_min_connections=CONNECTIONS) as served:
            sql(url, "ALTER ROLE service CONNECTION LIMIT -1")
            filled(served)
    finally:
        sql(url, "ALTER ROLE service CONNECTION LIMIT -1")
