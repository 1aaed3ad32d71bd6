"""Faults that take no more than a second or two each."""

import asyncio
import json
import signal
import socket
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import pytest

from svc.test import faults

pytestmark = pytest.mark.faults


def test_the_first_requests_after_an_idle_restart_all_succeed(server, served):
    faults.stop(server)
    faults.start(server)
    statuses = [served.client.post(f"{faults.API}/applications", json={"name": f"n{n}"}).status_code for n in range(20)]
    assert statuses == [201] * 20
    faults.recovered(served, served.before)


def test_backends_that_end_at_work_cost_some_503_and_no_acknowledged_write(served):
    with faults.writers(served) as ledger:
        faults.pace(ledger)
        with faults.locked(served.url):
            faults.all_wait(served.url)
            faults.terminate(served.url)
        faults.pace(ledger)
        with faults.locked(served.url):
            faults.all_wait(served.url)
            faults.kill_one(served.url)
        faults.pace(ledger)
    faults.compare(served.url, ledger)
    faults.recovered(served, served.before)


@pytest.mark.parametrize("notices", ["a write", "a look at its health"])
def test_a_database_that_became_read_only_is_reported_and_left_by_who_notices(served, notices):
    name = faults.sql(served.url, "SELECT current_database() AS name")[0]["name"]
    made = served.client.post(f"{faults.API}/applications", json={"name": "x"}).json()
    path = f"{faults.API}/applications/{made['id']}"
    faults.sql(served.url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    faults.terminate(served.url)
    with ThreadPoolExecutor() as clients, faults.locked(served.url):
        paths = [path, f"{faults.API}/applications?name=x", f"{faults.API}/applications?name=y"]
        reads = [clients.submit(served.client.get, each) for each in paths]
        faults.all_wait(served.url, len(paths))
    assert [read.result().status_code for read in reads] == [200] * len(paths)
    if notices == "a write":
        answer = served.client.put(path, json={"name": "y"})
    else:
        answer = served.client.get("/health")
        assert "read-only" in answer.json()["detail"]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    # The connections that were made meanwhile would stay read-only.
    faults.sql(served.url, f"ALTER DATABASE {name} RESET default_transaction_read_only")
    assert [served.client.put(path, json={"name": f"y{n}"}).status_code for n in range(20)] == [200] * 20
    faults.recovered(served, served.before)


# --- Many clients ---


def request(method: str, path: str, body: object = None) -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {faults.API}{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text


async def all_at_once(base: str, requests: list[bytes]) -> Counter[int]:
    """The statuses of requests that are sent together, each on a connection of its own."""
    host, port = base.removeprefix("http://").split(":")
    connections = [await asyncio.open_connection(host, int(port)) for _ in requests]
    for sent, (_, writer) in zip(requests, connections, strict=True):
        writer.write(sent)
    lines = await asyncio.gather(*(reader.readline() for reader, _ in connections))
    for _, writer in connections:
        writer.close()
        await writer.wait_closed()
    return Counter(int(line.split()[1]) for line in lines)


def test_500_clients_at_once_are_queued_and_answered(served):
    requests = [request("POST", "/applications", {"name": f"n{n}"}) for n in range(400)]
    requests += [request("GET", f"/applications?name=n{n}") for n in range(100)]
    assert asyncio.run(all_at_once(served.base, requests)) == {201: 400, 200: 100}
    assert faults.sql(served.url, "SELECT count(*) FROM applications") == [{"count": 400}]
    faults.recovered(served, served.before)


def test_beyond_the_queue_clients_get_503_at_once_and_those_in_it_are_answered(server):
    requests = [request("POST", "/applications", {"name": f"n{n}"}) for n in range(300)]
    with faults.serving(faults.new_database(server), db_queue_limit=20) as served, ThreadPoolExecutor(1) as clients:
        with faults.locked(served.url):
            asked = clients.submit(asyncio.run, all_at_once(served.base, requests[:20]))
            faults.all_wait(served.url)
            assert asyncio.run(all_at_once(served.base, requests[20:])) == {503: 280}
            assert not asked.done()
        assert asked.result() == {201: 20}


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_away_leaves_a_whole_write_or_none(served, reset):
    bodies = [{"name": f"n{n}", "comments": "x" * 1000} for n in range(60 + faults.CONNECTIONS)]

    def connect(data: bytes) -> socket.socket:
        host, port = served.base.removeprefix("http://").split(":")
        made = socket.create_connection((host, int(port)))
        if reset:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        made.sendall(data)
        return made

    whole = [request("POST", "/applications", body) for body in bodies]
    for n, sent in enumerate(whole[:60]):
        end = [20, sent.index(b"\r\n\r\n") + 4, len(sent) - 500][n % 3]  # in the head, before the body, within it
        connect(sent[:end]).close()
    with faults.locked(served.url):
        waiting = [connect(sent) for sent in whole[60:]]
        faults.all_wait(served.url)
        for each in waiting:
            each.close()
    faults.recovered(served, served.before)
    assert faults.sql(served.url, "SELECT name, comments FROM applications ORDER BY name") == bodies[60:]


# --- Shutdown ---


def test_what_was_accepted_before_sigterm_is_answered_and_stored(server):
    with faults.serving(faults.new_database(server)) as served:
        with faults.writers(served) as ledger:
            faults.pace(ledger)
            with faults.at_work(served, [("POST", "/applications")] * faults.CONNECTIONS) as asked:
                ledger.ending.set()
                served.process.send_signal(signal.SIGTERM)
                stopped = monotonic()
            ids = {each.result().json()["id"] for each in asked}
            assert served.process.wait(10) == 0
            assert monotonic() - stopped < 5
        assert len(faults.sql(served.url, "SELECT id FROM applications WHERE id = ANY(%s)", list(ids))) == len(asked)
        faults.compare(served.url, ledger)
