import asyncio
import importlib.util
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg2
import pytest

from svc import watch
from svc.app_test import problem
from svc.etags import etag
from svc.test.process import service, until


@pytest.fixture
def threads():
    with ThreadPoolExecutor(16) as made:
        yield made


@pytest.fixture(params=["by id", "by name"])
def path(request, application, configuration) -> str:
    if request.param == "by id":
        return f"/configurations/{configuration['id']}"
    return f"/applications/{application['name']}/configurations/production"


def waiters(base_url: str) -> int:
    return httpx.get(f"{base_url}/health").json()["waiters"]


def wait(threads, client, base_url: str, path: str, tag: str, seconds: float = 30) -> "Future[httpx.Response]":
    """A watcher that is known to wait."""
    before = waiters(base_url)
    waiting = threads.submit(client.get, path, params={"wait": seconds}, headers={"If-None-Match": tag})
    until(lambda: waiters(base_url) > before)
    return waiting


def tag(configuration: dict[str, Any], version: int = 1) -> str:
    return f'"{configuration["id"]}.{version}"'


def timed(waiting: "Future[httpx.Response]") -> tuple[httpx.Response, float]:
    started = time.monotonic()
    return waiting.result(20), time.monotonic() - started


def test_a_change_made_here_wakes_its_readers_at_once(threads, client, base_url, configuration, path):
    waiting = wait(threads, client, base_url, path, tag(configuration))
    client.put(f"/configurations/{configuration['id']}", json={"config": {"port": 1}})
    response, seconds = timed(waiting)
    assert (response.status_code, response.json()["config"], response.headers["etag"]) == (
        200,
        {"port": 1},
        tag(configuration, 2),
    )
    assert seconds < 0.5
    assert waiters(base_url) == 0


def test_a_change_made_elsewhere_wakes_its_readers_within_a_second(threads, client, base_url, sql, configuration, path):
    waiting = wait(threads, client, base_url, path, tag(configuration))
    sql('UPDATE configurations SET config = \'{"by": "psql"}\' WHERE id = %s', configuration["id"])
    response, seconds = timed(waiting)
    assert (response.status_code, response.json()["config"]) == (200, {"by": "psql"})
    assert seconds < 1.5


def test_a_deletion_wakes_its_readers_with_404(threads, client, base_url, configuration, path):
    waiting = wait(threads, client, base_url, path, tag(configuration))
    client.delete(f"/configurations/{configuration['id']}")
    response, seconds = timed(waiting)
    problem(response, 404)
    assert seconds < 0.5


def test_an_application_renamed_is_404_to_those_who_wait_by_its_name(threads, client, base_url, configuration, name):
    path = f"/applications/{name}/configurations/production"
    waiting = wait(threads, client, base_url, path, tag(configuration))
    client.put(f"/applications/{configuration['application_id']}", json={"name": name + "-new"})
    assert "no application" in problem(timed(waiting)[0], 404)["detail"]


def test_a_change_of_something_else_wakes_nobody(threads, client, base_url, application, configuration, path):
    waiting = wait(threads, client, base_url, path, tag(configuration), seconds=1)
    body = {"application_id": application["id"], "name": "other", "config": {}}
    other = client.post("/configurations", json=body).json()
    client.put(f"/configurations/{other['id']}", json={"config": {"a": 1}})
    client.put(f"/configurations/{configuration['id']}", json={"config": configuration["config"]})
    response = waiting.result(20)
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == tag(configuration)


def test_who_does_not_have_the_newest_is_answered_at_once(client, configuration, path):
    started = time.monotonic()
    for value in (tag(configuration, 2), '"other"', "garbage", f"W/{tag(configuration, 9)}"):
        response = client.get(path, params={"wait": 30}, headers={"If-None-Match": value})
        assert (response.status_code, response.json()) == (200, configuration)
    assert time.monotonic() - started < 5


def test_a_star_waits_for_the_deletion(threads, client, base_url, configuration, path):
    waiting = wait(threads, client, base_url, path, "*")
    client.put(f"/configurations/{configuration['id']}", json={"config": {"port": 1}})
    client.delete(f"/configurations/{configuration['id']}")
    problem(waiting.result(20), 404)


@pytest.mark.parametrize("known", ["*", "the old and the new"])
def test_a_304_after_a_wait_names_what_is_stored_then(threads, client, base_url, configuration, path, known):
    value = known if known == "*" else f"{tag(configuration)}, {tag(configuration, 2)}"
    waiting = wait(threads, client, base_url, path, value, seconds=1)
    client.put(f"/configurations/{configuration['id']}", json={"config": {"port": 1}})
    response = waiting.result(20)
    assert (response.status_code, response.headers["etag"]) == (304, tag(configuration, 2))


def test_a_wait_of_zero_does_not_wait(client, configuration, path):
    response = client.get(path, params={"wait": 0}, headers={"If-None-Match": tag(configuration)})
    assert response.status_code == 304
    assert client.head(path, params={"wait": "0.1"}, headers={"If-None-Match": tag(configuration)}).status_code == 304


@pytest.mark.parametrize("seconds", ["", "-1", "60.1", "x", "nan", "inf", "1e1", "٣", "1&wait=1"])
def test_a_bad_wait_is_400(client, configuration, path, seconds):
    shown = problem(client.get(f"{path}?wait={seconds}", headers={"If-None-Match": tag(configuration)}), 400)
    assert [error["loc"] for error in shown["errors"]] == [["query", "wait"]]


@pytest.mark.parametrize("query", ["?", "?&", "?&&"])
def test_a_query_of_nothing_does_not_wait(client, configuration, path, query):
    assert client.get(path + query).status_code == 200
    assert client.get(path + query, headers={"If-None-Match": tag(configuration)}).status_code == 304


def test_to_wait_without_if_none_match_is_400_that_says_why(client, path):
    assert "If-None-Match" in problem(client.get(path, params={"wait": 1}), 400)["errors"][0]["msg"]


def test_a_client_that_went_away_is_forgotten(base_url, configuration, path):
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{base_url}/api/v1{path}?wait=30", headers={"If-None-Match": tag(configuration)}, timeout=1)
    until(lambda: waiters(base_url) == 0, 3)


@pytest.fixture
def watch_here() -> Any:
    """The module once more, apart from the one that the session's service uses."""
    spec = importlib.util.spec_from_file_location("watch_of_this_test", watch.__file__)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_a_change_between_read_and_wait_is_heard_at_once(watch_here):
    """The change commits, and is looked for, when the reader has read and does not wait yet."""
    stored = {"id": "X", "version": 1}

    async def scenario() -> tuple[str | None, float]:
        looked = asyncio.Event()

        async def read_and_be_overtaken(id: str) -> dict[str, Any]:
            row = dict(stored)
            if row["version"] == 1:
                stored["version"] = 2
                watch_here.changed()
                await looked.wait()
            return row

        async def look(keys: set[str]) -> dict[str, str | None]:
            looked.set()
            return dict.fromkeys(keys, etag(stored))

        watch_here.repo = SimpleNamespace(read_etags=look)
        async with watch_here.opened():
            started = time.monotonic()
            row = await watch_here.until_changed("X", read_and_be_overtaken, frozenset(['"X.1"']), 30, asyncio.Future)
            return etag(row), time.monotonic() - started

    with ThreadPoolExecutor(1) as thread:  # signals are for the main thread's loop
        seen, seconds = thread.submit(asyncio.run, scenario()).result()
    assert seen == '"X.2"'
    assert seconds < 0.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_waiting_and_goes_to_its_handler_too(watch_here, number):
    handled = []

    def handler(number: int, _: object) -> None:
        handled.append(number)

    async def read(id: str) -> dict[str, Any]:
        return {"id": id, "version": 1}

    async def scenario() -> None:
        async with watch_here.opened():
            waiting = asyncio.create_task(watch_here.until_changed("X", read, frozenset(['"X.1"']), 30, asyncio.Future))
            while not watch_here.count():
                await asyncio.sleep(0)
            signal.raise_signal(number)
            async with asyncio.timeout(5):
                assert etag(await waiting) == '"X.1"'

    before = signal.signal(number, handler)
    try:
        asyncio.run(scenario())
        assert handled == [number]
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_looks_that_fail_are_logged_once_and_the_waiting_goes_on(watch_here, caplog):
    versions, looks = [1], []
    watch_here.LOOK_EVERY = 0.01

    async def read(id: str) -> dict[str, Any]:
        return {"id": id, "version": versions[-1]}

    async def look(keys: set[str]) -> dict[str, str | None]:
        looks.append(keys)
        if len(looks) < 4:
            raise psycopg2.OperationalError("server closed the connection\n")
        versions.append(2)
        return {key: etag(await read(key)) for key in keys}

    async def scenario() -> None:
        watch_here.repo = SimpleNamespace(read_etags=look)
        async with watch_here.opened(), asyncio.timeout(5):
            assert etag(await watch_here.until_changed("X", read, frozenset(['"X.1"']), 30, asyncio.Future)) == '"X.2"'

    asyncio.run(scenario())
    assert looks[:4] == [{"X"}] * 4
    assert caplog.messages == ["changes cannot be seen: server closed the connection"]


# --- With a process of its own ---


def created(base: str, name: str = "watched") -> tuple[str, dict[str, str]]:
    """The path of a new configuration, and the headers to wait for its change."""
    application = httpx.post(f"{base}/api/v1/applications", json={"name": name}).json()
    body = {"application_id": application["id"], "name": "n", "config": {}}
    response = httpx.post(f"{base}/api/v1/configurations", json=body)
    return base + response.headers["location"], {"If-None-Match": response.headers["etag"]}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_shutdown_those_who_wait_get_their_304_at_once(new_database, threads, number):
    with new_database() as url, service(url) as (process, base):
        path, headers = created(base)
        waiting = [threads.submit(httpx.get, f"{path}?wait=60", headers=headers, timeout=70) for _ in range(8)]
        until(lambda: waiters(base) == 8)
        os.kill(process.pid, number)
        started = time.monotonic()
        assert [each.result(20).status_code for each in waiting] == [304] * 8
        assert process.wait(10) == 0
        assert time.monotonic() - started < 3


@pytest.mark.slow
def test_waiters_are_bounded_and_hold_neither_thread_nor_connection(new_database, threads):
    with new_database() as url, service(url, max_waiters=8, db_max_connections=2) as (_, base):
        path, headers = created(base)
        waiting = [threads.submit(httpx.get, f"{path}?wait=60", headers=headers, timeout=70) for _ in range(8)]
        until(lambda: waiters(base) == 8)
        refused = httpx.get(f"{path}?wait=60", headers=headers)
        problem(refused, 503)
        assert refused.headers["retry-after"] == "1"
        outdated = {"If-None-Match": headers["If-None-Match"].replace('.1"', '.0"')}
        assert httpx.get(f"{path}?wait=60", headers=outdated).status_code == 200
        assert httpx.get(path).status_code == 200
        health = until(lambda: (h := httpx.get(f"{base}/health").json())["pool"]["busy"] == 0 and h)
        assert health["pool"]["limit"] == 2
        httpx.put(path, json={"config": {"a": 1}})
        assert [each.result(20).json()["config"] for each in waiting] == [{"a": 1}] * 8


@pytest.mark.slow
def test_those_who_wait_hear_of_changes_by_another_process_and_keep_waiting_while_the_database_is_away(
    new_database, postgres, threads
):
    with new_database() as url, service(url) as (_, here), service(url) as (_, there):
        path, headers = created(here)
        waiting = threads.submit(httpx.get, f"{path}?wait=60", headers=headers, timeout=70)
        until(lambda: waiters(here) == 1)
        database = psycopg2.extensions.parse_dsn(url)["dbname"]
        admin = psycopg2.connect(postgres)
        admin.autocommit = True
        with admin.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            cursor.execute(kill, (database,))
            until(lambda: httpx.get(f"{here}/health").status_code == 503)
            time.sleep(watch.LOOK_EVERY * 2)  # so that a look fails; nothing can be waited for from outside
            assert not waiting.done()
            cursor.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        admin.close()
        assert httpx.put(path.replace(here, there), json={"config": {"a": 1}}).status_code == 200
        response, seconds = timed(waiting)
        assert (response.status_code, response.json()["config"]) == (200, {"a": 1})
        assert seconds < 1.5


@pytest.mark.slow
def test_nothing_is_asked_of_the_database_while_nobody_waits_and_one_statement_a_second_while_somebody_does(
    new_database, threads, tmp_path
):
    log = tmp_path / "log"
    with new_database() as url, open(log, "w") as output, service(url, output=output, debug=True) as (_, base):
        path, headers = created(base)
        assert "read_etags" not in log.read_text()
        waiting = threads.submit(httpx.get, f"{path}?wait=4.5", headers=headers, timeout=70)
        assert waiting.result(20).status_code == 304
        assert 3 <= log.read_text().count("statement: read_etags") <= 5
