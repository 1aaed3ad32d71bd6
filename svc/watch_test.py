import asyncio
import signal
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg2
import pytest

from svc import repo, watch
from svc.conftest import run_sql
from svc.test.process import gauge, service, until


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


@pytest.fixture
def by_id(configuration) -> str:
    return f"/configurations/{configuration['id']}"


BY_ID = pytest.mark.parametrize("path", ["by id"], indirect=True)


@pytest.fixture(params=["by id", "by name"])
def path(request, application, by_id) -> str:
    return by_id if request.param == "by id" else f"/applications/{application['name']}/configurations/production"


@pytest.fixture
def etag(client, by_id) -> str:
    return client.get(by_id).headers["etag"]


def waiters(base_url: str) -> float:
    return gauge(httpx.get(f"{base_url}/metrics").text, "config_service_waiters")


@pytest.fixture
def wait(threads, client, base_url, path, etag):
    def wait(tags: str = etag, seconds: float = 30) -> "Future[httpx.Response]":
        """The answer to a reader that is known to wait."""
        waiting = threads.submit(client.get, path, params={"wait": seconds}, headers={"If-None-Match": tags})
        until(lambda: waiters(base_url) == 1)
        return waiting

    return wait


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_change_wakes_its_readers(client, sql, by_id, configuration, etag, wait, where):
    waiting = wait()
    started = time.monotonic()
    if where == "here":
        client.put(by_id, json={"config": {"port": 1}})
    else:
        sql("UPDATE configurations SET config = '{\"port\": 1}' WHERE id = %s", configuration["id"])
    response = waiting.result(20)
    assert time.monotonic() - started < 1.5
    assert (response.status_code, response.json()["config"]) == (200, {"port": 1})
    assert response.headers["etag"] == client.get(by_id).headers["etag"] != etag


@pytest.mark.parametrize("path", ["by name"], indirect=True)
def test_an_application_renamed_is_404_in_the_end_to_those_who_wait_by_its_name(client, application, wait):
    waiting = wait(seconds=0.6)
    client.put(f"/applications/{application['id']}", json={"name": application["name"] + "-new"})
    response = waiting.result(20)
    assert (response.status_code, response.json()["detail"]) == (404, "There is no application with this name.")


@BY_ID
def test_a_change_of_something_else_wakes_nobody(client, application, by_id, configuration, etag, wait):
    waiting = wait(seconds=0.6)
    body = {"application_id": application["id"], "name": "other", "config": {}}
    other = client.post("/configurations", json=body).json()
    client.put(f"/configurations/{other['id']}", json={"config": {"a": 1}})
    client.put(by_id, json={"config": configuration["config"]})
    response = waiting.result(20)
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert response.elapsed.total_seconds() > 0.6


def test_a_star_waits_for_the_deletion_and_names_meanwhile_what_is_stored(client, by_id, wait):
    waiting = wait("*", seconds=0.6)
    changed = client.put(by_id, json={"config": {"port": 1}})
    response = waiting.result(20)
    assert (response.status_code, response.headers["etag"]) == (304, changed.headers["etag"])
    waiting = wait("*")
    client.delete(by_id)
    assert waiting.result(20).status_code == 404


@pytest.mark.parametrize("tags", ['"other"', "garbage", 'W/"a", "b"'])
def test_who_does_not_have_what_is_stored_is_answered_at_once(client, configuration, path, tags):
    response = client.get(path, params={"wait": 30}, headers={"If-None-Match": tags})
    assert (response.status_code, response.json()) == (200, configuration)
    assert response.elapsed.total_seconds() < 5


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("seconds", ["0", "0.1"])
def test_who_has_it_is_answered_with_304_after_so_many_seconds(client, path, etag, method, seconds):
    response = client.request(method, path, params={"wait": seconds}, headers={"If-None-Match": etag})
    assert (response.status_code, response.headers["etag"]) == (304, etag)
    assert float(seconds) < response.elapsed.total_seconds() < 5


BAD_WAITS = [("", "number"), ("-1", "equal to 0"), ("60.1", "60"), ("nan", "equal to"), ("1", "If-None-Match")]


@pytest.mark.parametrize(("seconds", "words"), BAD_WAITS)
def test_a_bad_wait_or_one_without_if_none_match_is_400_that_says_why(client, path, seconds, words):
    response = client.get(path, params={"wait": seconds})
    [error] = response.json()["errors"]
    assert (response.status_code, error["loc"], words in error["msg"]) == (400, ["query", "wait"], True)


def test_a_client_that_went_away_is_forgotten(client, base_url, by_id, etag):
    with pytest.raises(httpx.ReadTimeout):
        client.get(by_id, params={"wait": 30}, headers={"If-None-Match": etag}, timeout=0.3)
    until(lambda: waiters(base_url) == 0, 3)


@BY_ID
def test_nothing_that_happens_in_a_look_ends_the_looking_and_it_is_logged_once(
    sql, configuration, wait, monkeypatch, caplog
):
    looks = []
    read_etags = repo.read_etags

    async def fail_thrice(keys: Collection[repo.Key]) -> dict[repo.Key, str]:
        looks.append(keys)
        if len(looks) <= 3:
            await asyncio.sleep(0.1)  # how long it takes to fail does not put off the next
            raise RuntimeError("no luck")
        return await read_etags(keys)

    monkeypatch.setattr(repo, "read_etags", fail_thrice)
    monkeypatch.setattr(watch, "LOOK_EVERY", 0.01)
    waiting = wait()
    sql("UPDATE configurations SET config = '{}' WHERE id = %s", configuration["id"])
    assert waiting.result(1.5).json()["config"] == {}
    assert caplog.messages.count("changes cannot be seen: no luck") == 1


@BY_ID
def test_looks_take_at_most_a_twentieth_of_the_time(wait, monkeypatch):
    looks = []
    read_etags = repo.read_etags

    async def read_slowly(keys: Collection[repo.Key]) -> dict[repo.Key, str]:
        looks.append(keys)
        await asyncio.sleep(0.03)
        return await read_etags(keys)

    monkeypatch.setattr(repo, "read_etags", read_slowly)
    monkeypatch.setattr(watch, "LOOK_EVERY", 0.01)
    assert wait(seconds=0.5).result(20).status_code == 304
    assert 1 <= len(looks) <= 2


# --- With a process of its own ---

PATH = "/api/v1/applications/a/configurations/n"


@pytest.fixture
def watched(new_database, threads, tmp_path):
    @contextmanager
    def watched(readers: int = 1, seconds: float = 60, **settings: Any) -> Iterator[SimpleNamespace]:
        """A service with its log and a client, and the answers to readers that are known to wait for PATH."""
        log = tmp_path / "log"
        with (
            new_database() as url,
            log.open("w") as output,
            service(url, output=output, **settings) as (process, base),
            httpx.Client(base_url=base, headers={"Authorization": "Bearer a"}, timeout=70) as client,
        ):
            hash = sha256(b"a").hexdigest()
            run_sql(url, "INSERT INTO tokens (name, hash, role) VALUES ('a', %s, 'write')", hash)
            client.post("/api/v1/applications", json={"name": "a"})
            headers = {"If-None-Match": client.put(PATH, json={"config": {}}).headers["etag"]}
            assert "read_etags" not in log.read_text()
            answers = [
                threads.submit(client.get, PATH, params={"wait": seconds}, headers=headers) for _ in range(readers)
            ]
            until(lambda: gauge(client.get("/metrics").text, "config_service_waiters") == readers)
            yield SimpleNamespace(url=url, log=log, process=process, client=client, answers=answers)

    return watched


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_shutdown_those_who_wait_get_their_304_at_once(watched, number):
    with watched(readers=8) as service:
        service.process.send_signal(number)
        started = time.monotonic()
        assert [each.result(20).status_code for each in service.answers] == [304] * 8
        assert time.monotonic() - started < 1
        assert service.process.wait(3) == 0


@pytest.mark.slow
def test_readers_that_wait_are_bounded_and_hold_neither_thread_nor_connection(watched):
    with watched(readers=8, max_waiters=8, db_max_connections=2) as service:
        refused = service.client.get(PATH, params={"wait": 60}, headers={"If-None-Match": "*"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        outdated = service.client.get(PATH, params={"wait": 60}, headers={"If-None-Match": '"old"'})
        assert outdated.status_code == 200
        busy = ("config_service_db_connections", 'state="busy"')
        until(lambda: gauge(service.client.get("/metrics").text, *busy) == 0)
        service.client.put(PATH, json={"config": {"a": 1}})
        assert [each.result(20).json()["config"] for each in service.answers] == [{"a": 1}] * 8


@pytest.mark.slow
def test_those_who_wait_get_their_304_also_while_the_database_does_not_answer(watched):
    with (
        watched(seconds=2, db_lock_timeout=0.5, log_level="DEBUG") as service,
        closing(psycopg2.connect(service.url)) as connection,
    ):
        until(lambda: "read_configurations_by_names took" in service.log.read_text())
        connection.cursor().execute("LOCK TABLE configurations")
        assert service.answers[0].result(20).status_code == 304
        assert service.log.read_text().count("changes cannot be seen") == 1


@pytest.mark.slow
def test_the_database_is_asked_four_times_a_second_while_somebody_waits_and_never_else(watched):
    with watched(seconds=2, log_level="DEBUG", auth="on") as service:
        assert service.answers[0].result(20).status_code == 304
        assert 5 <= service.log.read_text().count("read_etags took") <= 9
        # At the beginning, at the end, and once because the tokens were read for the first time.
        assert service.log.read_text().count("read_configurations_by_names took") <= 3
