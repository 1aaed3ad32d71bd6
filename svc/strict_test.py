import asyncio
import json
import random
import re
import resource
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg2
import pytest
import uvicorn

from svc import strict
from svc.models import Problem, ValidationProblem
from svc.test.process import service, until

PATH = "/api/v1/applications"
UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
LIMIT = 1024**2
SECRET = "hunter2"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """A connection on which any bytes can be sent, and answers are read one after the other."""

    def __init__(self, base_url: str) -> None:
        host, port = base_url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.file = self.socket.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        line = self.file.readline()
        assert line, "the connection ended"
        status = int(line.split()[1])
        headers = {}
        while (line := self.file.readline().strip()) != b"":
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        if method == "HEAD" or status in (100, 204, 304):
            return Answer(status, headers, b"")
        if "content-length" in headers:
            return Answer(status, headers, self.file.read(int(headers["content-length"])))
        assert headers["transfer-encoding"] == "chunked"
        body = b""
        while size := int(self.file.readline(), 16):
            body += self.file.read(size + 2)[:-2]
        self.file.readline()
        return Answer(status, headers, body)

    def ended(self) -> bool:
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True


def request(
    method: str = "GET", path: str | bytes = "/health/live", body: bytes | None = None, *headers: bytes
) -> bytes:
    lines = [method.encode() + b" " + (path.encode() if isinstance(path, str) else path) + b" HTTP/1.1", b"Host: x"]
    lines += headers
    if body is not None:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + (body or b"")


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


CHUNKED = b"Transfer-Encoding: chunked"
JSON = b"Content-Type: application/json"


@pytest.fixture
def wire(base_url) -> Iterator[Wire]:
    with closing(Wire(base_url)) as made:
        yield made


@pytest.fixture
def stored(sql) -> Any:
    """How many rows there are now."""
    return lambda: sql("SELECT (SELECT count(*) FROM applications) AS a, (SELECT count(*) FROM configurations) AS c")


def check_problem(answer: Answer, status: int | None = None) -> dict[str, Any]:
    """The problem that is answered, once its form is checked: nothing of the request's values or of the inside."""
    assert status is None or answer.status == status, answer
    assert 400 <= answer.status < 500, answer
    assert answer.headers["content-type"] == "application/problem+json"
    model = ValidationProblem if answer.status == 400 else Problem
    assert model.model_validate_json(answer.body).status == answer.status
    for word in (SECRET, "Traceback", "psycopg", "postgresql://", "SELECT", "INSERT", "svc/"):
        assert word not in answer.body.decode()
    return json.loads(answer.body)


def serves_on(wire: Wire) -> None:
    """The connection serves the next request."""
    wire.send(request())
    assert wire.answer()[::2] == (200, b'{"status":"ok"}')


BODIES = {
    "empty": b"",
    "white space": b"  ",
    "a list": b'["hunter2"]',
    "a string": b'"hunter2"',
    "a number": b"7",
    "null": b"null",
    "an empty object": b"{}",
    "truncated": b'{"name": "hunter2',
    "invalid UTF-8": b'{"name": "hunter2\xff"}',
    "UTF-16": '{"name": "hunter2"}'.encode("utf-16"),
    "random bytes": random.Random(1).randbytes(2000),
    "100,000 open brackets": b"[" * 100_000,
    "an open bracket in a name, 100,000 times": b'{"name": ' + b"[" * 100_000,
    "deep in an unknown field": b'{"name": "n", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "5,000 digits": b'{"name": ' + b"7" * 5000 + b"}",
    "1e400": b'{"name": 1e400}',
    "NaN": b'{"name": "hunter2", "comments": NaN}',
    "U+0000 in a name": rb'{"name": "hunter2\u0000"}',
    "U+0000 in comments": rb'{"name": "n", "comments": "hunter2\u0000"}',
    "U+0000 as a field": rb'{"name": "n", "\u0000": "hunter2"}',
    "a surrogate in a name": rb'{"name": "hunter2\ud800"}',
    "a surrogate in comments": rb'{"name": "n", "comments": "\udfffhunter2"}',
    "a surrogate as a field": rb'{"name": "n", "\ud800": "hunter2"}',
    "a surrogate in an unknown field": rb'{"name": "n", "x": "hunter2\ud800"}',
    "a field twice": b'{"name": "hunter2", "name": "n"}',
    "an unknown field": b'{"name": "n", "nmae": "hunter2"}',
    "a name that is an object": b'{"name": {"hunter2": "hunter2"}}',
    "a blank name": b'{"name": " "}',
    "a name too long": b'{"name": "' + b"hunter2" * 40 + b'"}',
    "a form": b"name=hunter2",
    "SQL": b"'; DROP TABLE applications; --",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize(
    "target", [("POST", PATH), ("POST", "/api/v1/configurations")], ids=["application", "configuration"]
)
def test_a_bad_body_is_400_stores_nothing_and_the_connection_serves_on(wire, stored, target, body):
    before = stored()
    for framed in (
        request(*target, body, JSON),
        request(*target, body),
        request(*target, None, JSON, CHUNKED) + chunked(*(body[n : n + 700] for n in range(0, len(body), 700)), b""),
    ):
        wire.send(framed)
        assert check_problem(wire.answer(), 400)["errors"]
        serves_on(wire)
    assert stored() == before


@pytest.mark.parametrize(
    "body", [body for body in BODIES.values() if body != b"{}"], ids=[n for n in BODIES if n != "an empty object"]
)
def test_a_bad_put_is_400_and_changes_nothing(wire, client, configuration, body):
    path = f"/configurations/{configuration['id']}"
    wire.send(request("PUT", f"/api/v1{path}", body, JSON))
    check_problem(wire.answer(), 400)
    serves_on(wire)
    assert client.get(path).json() == configuration


TYPES = {
    "none": ([], 201),
    "JSON": ([JSON], 201),
    "JSON with a character set": ([b"Content-Type: application/json; charset=utf-8"], 201),
    "JSON of a kind": ([b"Content-Type: application/merge-patch+json"], 201),
    "a form": ([b"Content-Type: application/x-www-form-urlencoded"], 400),
    "parts without a boundary": ([b"Content-Type: multipart/form-data"], 400),
    "text": ([b"Content-Type: text/plain"], 400),
    "bytes": ([b"Content-Type: application/octet-stream"], 400),
    "no type": ([b'Content-Type: \xff\xfe;="'], 400),
    "a slash": ([b"Content-Type: /"], 400),
    "ten thousand characters": ([b"Content-Type: " + b"a/" * 5000], 400),
    "two": ([JSON, b"Content-Type: text/plain"], 201),
}


@pytest.mark.parametrize(("headers", "status"), TYPES.values(), ids=TYPES)
def test_a_body_of_another_type_than_json_is_400(wire, sql, name, headers, status):
    wire.send(request("POST", PATH, b'{"name": "%s"}' % name.encode(), *headers))
    answer = wire.answer()
    assert answer.status == status
    if status == 400:
        [error] = check_problem(answer, 400)["errors"]
        assert error["msg"] == "Input should be a JSON object, sent with Content-Type: application/json"
    serves_on(wire)
    assert len(sql("SELECT id FROM applications WHERE name = %s", name)) == (status == 201)


PATHS = {
    "NUL": ("/api/v1/applications/%00", 400),
    "no UTF-8": ("/api/v1/applications/%ff%fe", 400),
    "a line end after an id": (f"/api/v1/applications/{UNKNOWN}%0a", 400),
    "half a percent": ("/api/v1/applications/%", 400),
    "a percent of no digits": ("/api/v1/applications/%zz", 400),
    "a surrogate": ("/api/v1/configurations/%ed%a0%80", 400),
    "an id too big": ("/api/v1/applications/8" + UNKNOWN[1:], 400),
    "an id in lower case": ("/api/v1/configurations/" + UNKNOWN.lower(), 400),
    "an id that is a number": ("/api/v1/applications/1", 400),
    "an id that is true": ("/api/v1/applications/true", 400),
    "an id of 60,000 characters": ("/api/v1/applications/" + "a" * 60_000, 400),
    "an unknown id": (f"/api/v1/applications/{UNKNOWN}", 404),
    "SQL": ("/api/v1/applications/'%20OR%20'1'='1", 400),
    "a slash in an id": ("/api/v1/applications/a%2Fb", 404),
    "up a folder": ("/api/v1/applications/../../etc/passwd", 404),
    "a slash at the end": ("/api/v1/applications/", 404),
    "two slashes": ("//api/v1/applications", 404),
    "upper case": ("/API/V1/applications", 404),
    "an unknown version": ("/api/v2/applications", 404),
    "a star": ("*", 404),
    "60,000 slashes": ("/" * 60_000, 404),
}


@pytest.mark.parametrize(("path", "status"), PATHS.values(), ids=PATHS)
def test_a_bad_path_is_a_problem_and_the_connection_serves_on(wire, path, status):
    for method in ("GET", "HEAD", "PUT"):
        wire.send(request(method, path, b"{}" if method == "PUT" else None))
        answer = wire.answer(method)
        assert answer.status == status
        if method != "HEAD":
            check_problem(answer, status)
        serves_on(wire)


QUERIES = {
    "unknown": ("nam=hunter2", ["query", "nam"], "extra_forbidden"),
    "no name": ("=hunter2", ["query", ""], "extra_forbidden"),
    "no UTF-8 as a name": ("%ff=hunter2", ["query"], "not_utf8"),
    "no UTF-8 in a value": ("name=hunter2%ff", ["query"], "not_utf8"),
    "NUL as a name": ("%00", ["query", "\0"], "extra_forbidden"),
    "twice": ("name=hunter2&name=b", ["query", "name"], "repeated"),
    "twice the same": ("limit=1&limit=1", ["query", "limit"], "repeated"),
    "twice, once encoded": ("limit=1&%6cimit=2", ["query", "limit"], "repeated"),
    "NUL in a value": ("name=hunter2%00", ["query", "name"], "nul"),
    "a value too long": ("name=" + "hunter2" * 1000, ["query", "name"], "string_too_long"),
    "an empty value": ("name=", ["query", "name"], "string_too_short"),
    "a limit below": ("limit=0", ["query", "limit"], "greater_than_equal"),
    "a limit above": ("limit=1001", ["query", "limit"], "less_than_equal"),
    "a limit of 5,000 digits": ("limit=" + "9" * 5000, ["query", "limit"], "int_parsing_size"),
    "a limit that is a fraction": ("limit=1.5", ["query", "limit"], "int_parsing"),
    "an id in lower case": ("after=" + UNKNOWN.lower(), ["query", "after"], "ulid"),
}


@pytest.mark.parametrize(("query", "loc", "type_"), QUERIES.values(), ids=QUERIES)
def test_a_bad_query_is_400_and_names_the_parameter(wire, query, loc, type_):
    wire.send(request("GET", f"{PATH}?{query}"))
    [error] = check_problem(wire.answer(), 400)["errors"]
    assert (error["loc"], error["type"]) == (loc, type_)
    serves_on(wire)


def test_a_query_is_refused_where_none_is_known_and_before_anything_is_written(wire, stored, application, name):
    before = stored()
    for framed in (
        request("POST", f"{PATH}?dry_run=true", b'{"name": "%s"}' % name.encode()),
        request("PUT", f"{PATH}/{application['id']}?x", b'{"name": "%s"}' % name.encode()),
        request("GET", f"{PATH}/{application['id']}?verbose=1"),
        request("GET", "/health?x=1"),
        request("GET", "/health/live?x=1"),
    ):
        wire.send(framed)
        [error] = check_problem(wire.answer(), 400)["errors"]
        assert error["type"] == "extra_forbidden"
        serves_on(wire)
    assert stored() == before


def test_ten_thousand_query_parameters_are_400(wire):
    wire.send(request("GET", f"{PATH}?" + "&".join(f"p{n}" for n in range(10_000))))
    assert len(check_problem(wire.answer(), 400)["errors"]) == 10_000
    serves_on(wire)


def test_head_answers_as_get_without_a_body_and_ignores_one(wire, application):
    path = f"{PATH}/{application['id']}"
    wire.send(request("GET", path))
    get = wire.answer()
    for body in (None, b"hunter2"):
        wire.send(request("HEAD", path, body))
        head = wire.answer("HEAD")
        assert (head.status, head.headers["etag"]) == (200, get.headers["etag"])
        assert head.headers["content-length"] == get.headers["content-length"]
        serves_on(wire)


METHODS = ["DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "QUERY"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_a_path_does_not_take_is_405(wire, method):
    for body in (None, b"hunter2"):
        wire.send(request(method, "/health/live", body))
        answer = wire.answer()
        check_problem(answer, 405)
        assert answer.headers["allow"] == "GET, HEAD"
        serves_on(wire)


HEADERS = {
    "100 KB in one": [b"X-A: " + b"a" * 100_000],
    "5,000 of them": [b"X-%d: a" % n for n in range(5000)],
    "bytes above ASCII": [bytes(range(128, 256)).join([b"X-A: ", b""])],
    "conditions that are none": [b"If-Match: hunter2", b'If-None-Match: """', b"If-None-Match: W/,,\xff"],
    "hosts that are none": [b"Host: ["],
    "an encoding that is none": [b"Accept: \xff", b"Accept-Encoding: \xff", b"Content-Encoding: hunter2"],
    "a range": [b"Range: bytes=0-99999999999999999999"],
    "cookies": [b"Cookie: " + b"a=b;" * 5000],
    "another's address": [b"X-Forwarded-For: \xff, [", b"X-Forwarded-Proto: \xff", b"Forwarded: ;;="],
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_headers_that_mean_nothing_here_change_nothing(wire, application, headers):
    wire.send(request("GET", f"{PATH}/{application['id']}", None, *headers))
    answer = wire.answer()
    assert (answer.status, json.loads(answer.body)) == (200, application)
    wire.send(request("GET", "/nowhere", None, *headers))
    check_problem(wire.answer(), 404)
    serves_on(wire)


def test_expect_100_continue_is_answered_before_the_body_comes(wire, sql, name):
    body = b'{"name": "%s"}' % name.encode()
    head = request("POST", PATH, None, b"Expect: 100-continue", b"Content-Length: %d" % len(body))
    wire.send(head)
    assert wire.answer().status == 100
    assert sql("SELECT id FROM applications WHERE name = %s", name) == []
    wire.send(body)
    assert wire.answer().status == 201
    serves_on(wire)


def test_expect_100_continue_is_no_use_to_a_body_too_large(wire):
    wire.send(request("POST", PATH, None, b"Expect: 100-continue", b"Content-Length: %d" % (LIMIT + 1)))
    check_problem(wire.answer(), 413)
    wire.send(b" " * (LIMIT + 1))
    serves_on(wire)


def test_pipelined_requests_are_answered_in_their_order(wire, sql, name):
    posts = [request("POST", PATH, b'{"name": "%s-%d"}' % (name.encode(), n)) for n in range(20)]
    bad = request("POST", PATH, b'{"name": ')
    wire.send(b"".join(post + bad + request() for post in posts))
    for number in range(20):
        created = wire.answer()
        assert (created.status, json.loads(created.body)["name"]) == (201, f"{name}-{number}")
        check_problem(wire.answer(), 400)
        assert wire.answer().status == 200
    assert sql("SELECT count(*) FROM applications WHERE name LIKE %s", f"{name}-%") == [{"count": 20}]


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": b"BREW /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in a path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes in a query": b"GET /api/v1/applications?name=\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    "a path of 70,000 characters": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "an address without a path": b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL in a header": b"GET /health/live HTTP/1.1\r\nX: a\0b\r\n\r\n",
    "a space before the colon": b"GET /health/live HTTP/1.1\r\nX : a\r\n\r\n",
    "a line end without a return": b"GET /health/live HTTP/1.1\nHost: x\n\n",
    "a length and chunks": request("POST", PATH, b"{}", CHUNKED),
    "two lengths": request("POST", PATH, b"{}", b"Content-Length: 3"),
    "a length below zero": request("POST", PATH, None, b"Content-Length: -1"),
    "a length that is none": request("POST", PATH, None, b"Content-Length: hunter2"),
    "a length of 30 digits": request("POST", PATH, None, b"Content-Length: " + b"9" * 30),
    "an empty length": request("POST", PATH, None, b"Content-Length: "),
    "an unknown transfer": request("POST", PATH, None, b"Transfer-Encoding: gzip"),
    "a chunk that is none": request("POST", PATH, None, CHUNKED) + b"hunter2\r\n{}\r\n0\r\n\r\n",
    "a chunk longer than said": request("POST", PATH, None, CHUNKED) + b"2\r\n{}{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http_is_400_in_plain_text_by_the_server_below_and_ends_the_connection(wire, base_url, stored, data):
    before = stored()
    wire.send(data)
    answer = wire.answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.body == b"Invalid HTTP request received."
    assert wire.ended()
    assert stored() == before
    with closing(Wire(base_url)) as other:
        serves_on(other)


# --- Upgrades ---

UPGRADES = {
    "WebSocket": [b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="],
    "HTTP/2, as some clients ask of every server": [
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    ],
    "nothing known": [b"Connection: keep-alive, uPGRADE", b"Upgrade: \xff"],
}


@pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES)
def test_a_request_to_upgrade_is_answered_and_the_connection_closed_for_the_server_reads_nothing_more(
    wire, stored, application, name, headers
):
    before = stored()
    wire.send(request("GET", f"{PATH}/{application['id']}", None, *headers))
    answer = wire.answer()
    assert (answer.status, json.loads(answer.body)) == (200, application)
    assert answer.headers["connection"] == "close"
    assert wire.ended()
    assert stored() == before


@pytest.mark.parametrize("headers", UPGRADES.values(), ids=UPGRADES)
def test_a_request_to_upgrade_with_a_body_is_refused_for_the_body_is_lost(base_url, stored, name, headers):
    before = stored()
    body = b'{"name": "%s"}' % name.encode()
    for framed in (
        request("POST", PATH, body, *headers),
        request("POST", PATH, None, CHUNKED, *headers) + chunked(body, b""),
    ):
        with closing(Wire(base_url)) as wire:
            wire.send(framed)
            answer = wire.answer()
            [error] = check_problem(answer, 400)["errors"]
            assert error["loc"] == ["header", "upgrade"]
            assert answer.headers["connection"] == "close"
            assert wire.ended()
    assert stored() == before


def test_an_upgrade_header_that_the_connection_header_does_not_name_is_ignored(wire, name):
    wire.send(request("POST", PATH, b'{"name": "%s"}' % name.encode(), b"Upgrade: h2c"))
    assert wire.answer().status == 201
    serves_on(wire)


def test_a_websocket_is_refused_with_a_problem_where_the_server_supports_them():
    server = uvicorn.Server(
        uvicorn.Config("svc.app:app", port=0, lifespan="off", log_level="error", ws="websockets-sansio")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        with closing(Wire(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")) as wire:
            wire.send(request("GET", "/ws", None, *UPGRADES["WebSocket"], b"Sec-WebSocket-Version: 13"))
            check_problem(wire.answer(), 404)
    finally:
        server.should_exit = True
        thread.join()


# --- Too large, too slow ---


def test_a_body_of_the_limit_is_read_and_one_byte_more_is_413_on_a_connection_that_serves_on(wire, stored, name):
    before = stored()
    body = b'{"name": "%s"}' % name.encode()
    for framing in ("length", "chunks"):
        large = body + b" " * (LIMIT + 1 - len(body))
        if framing == "length":
            wire.send(request("POST", PATH, large, JSON))
        else:
            pieces = [large[n : n + 65536] for n in range(0, len(large), 65536)]
            wire.send(request("POST", PATH, None, JSON, CHUNKED) + chunked(*pieces, b""))
        assert check_problem(wire.answer(), 413)["detail"] == f"A body has at most {LIMIT} bytes."
        serves_on(wire)
    assert stored() == before
    wire.send(request("POST", PATH, body + b" " * (LIMIT - len(body)), JSON))
    assert wire.answer().status == 201


def test_413_comes_as_soon_as_it_is_known(wire, base_url):
    wire.send(request("POST", PATH, None, b"Content-Length: %d" % 2**62))
    check_problem(wire.answer(), 413)
    with closing(Wire(base_url)) as other:
        other.send(request("PUT", f"{PATH}/{UNKNOWN}", None, CHUNKED))
        for _ in range(LIMIT // 65536):
            other.send(chunked(b" " * 65536))
        other.send(chunked(b" "))
        check_problem(other.answer(), 413)
        other.send(chunked(b"x" * 3 * LIMIT, b""))  # what was under way is read over
        serves_on(other)


def memory(process: Any, what: str) -> int:
    [kilobytes] = re.findall(rf"^{what}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


@pytest.mark.slow
def test_bodies_too_large_take_less_than_three_times_the_limit_each(url):
    limit, count = 4 * 1024**2, 6
    with service(url, max_body_bytes=limit) as (process, base), ExitStack() as open_wires:
        with closing(Wire(base)) as first:
            serves_on(first)
        before = memory(process, "VmRSS")
        wires = [open_wires.enter_context(closing(Wire(base))) for _ in range(count)]
        for wire in wires:
            wire.send(request("POST", PATH, None, CHUNKED))
        piece = chunked(b" " * 65536)
        for _ in range(limit // 65536):
            for wire in wires:
                wire.send(piece)
        for wire in wires:
            wire.send(piece)
        for wire in wires:
            check_problem(wire.answer(), 413)
        with ThreadPoolExecutor(count) as threads:  # each sends five times the limit after it was told
            list(threads.map(lambda wire: [wire.send(piece) for _ in range(5 * limit // 65536)], wires))
        for wire in wires:
            wire.send(chunked(b""))
            serves_on(wire)
        assert memory(process, "VmHWM") - before < 3 * limit * count


@pytest.fixture(scope="module")
def slow(url) -> Iterator[str]:
    """A process that waits half a second for a body."""
    with service(url, body_timeout=0.5) as (_, base):
        yield base


SLOW = {
    "nothing after the head": [request("POST", PATH, None, b"Content-Length: 10")],
    "half of it": [request("POST", PATH, None, b"Content-Length: 30") + b'{"name": "hunter2'],
    "a byte now and then": [request("POST", PATH, None, b"Content-Length: 100"), *[b" "] * 12],
    "chunks that never end": [request("PUT", f"{PATH}/{UNKNOWN}", None, CHUNKED), *[chunked(b" ")] * 12],
}


@pytest.mark.parametrize("pieces", SLOW.values(), ids=SLOW)
def test_a_body_that_comes_too_slowly_is_408_and_the_connection_is_closed(slow, stored, pieces):
    before = stored()
    with closing(Wire(slow)) as wire:
        started = time.monotonic()
        for piece in pieces:
            wire.send(piece)
            if len(pieces) > 1:
                time.sleep(0.03)
        answer = wire.answer()
        assert 0.45 < time.monotonic() - started < 4
        assert check_problem(answer, 408)["detail"] == "The body did not arrive in time."
        assert answer.headers["connection"] == "close"
        assert wire.ended()
    assert stored() == before


def test_a_client_that_goes_away_in_the_middle_of_its_body_stores_nothing_and_is_no_error(slow, stored, name):
    before = stored()
    for _ in range(20):
        with closing(Wire(slow)) as wire:
            wire.send(request("POST", PATH, None, b"Content-Length: 1000") + b'{"name": "%s"}' % name.encode())
    with closing(Wire(slow)) as wire:
        serves_on(wire)
    assert stored() == before


def test_a_client_that_goes_away_before_its_answer_leaves_the_pool_whole(slow, name):
    for number in range(30):
        with closing(Wire(slow)) as wire:
            wire.send(request("POST", PATH, b'{"name": "%s-%d"}' % (name.encode(), number)))
    pool = until(lambda: (found := httpx.get(f"{slow}/health").json()["pool"])["busy"] == 0 and found)
    assert (pool["queued"], pool["limit"]) == (0, 8)


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Room for a thousand and more connections on this side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_silent_and_half_open_connections_do_not_keep_others_from_being_served(slow, descriptors, name):
    halves = [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n", request("POST", PATH, None, b"Content-Length: 9") + b"{"]
    with ExitStack() as open_wires:
        for number in range(1000):
            open_wires.enter_context(closing(Wire(slow))).send(halves[number % len(halves)])
        for number in range(20):
            with closing(Wire(slow)) as wire:
                wire.send(request("POST", PATH, b'{"name": "%s-%d"}' % (name.encode(), number)))
                created = json.loads(wire.answer().body)
                wire.send(request("GET", f"{PATH}/{created['id']}"))
                assert json.loads(wire.answer().body) == created
    with closing(Wire(slow)) as wire:
        serves_on(wire)


def test_an_answer_that_breaks_off_is_left_unfinished_and_logged_in_one_line(client, base_url, monkeypatch, caplog):
    async def pages() -> AsyncIterator[str]:
        yield "{}"
        raise psycopg2.OperationalError("gone\nsecond line")

    async def broken(*_: Any) -> tuple[None, AsyncIterator[str]]:
        return None, pages()

    monkeypatch.setattr("svc.repo.list_applications", broken)
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/applications")
    assert [each.getMessage() for each in caplog.records if each.name == "svc.strict"] == [
        f"GET {PATH} broke off: gone"
    ]
    with closing(Wire(base_url)) as wire:
        serves_on(wire)


# --- Random requests ---

FUZZ_PATHS = [PATH, "/api/v1/configurations", f"{PATH}/{UNKNOWN}", f"/api/v1/configurations/{UNKNOWN}", "/health", "/"]
FUZZ_PIECES = [
    *(b"\0", b"\xff", b"%00", b"%ff", b"%ed%a0%80", b"\\ud800", b"\\u0000", b"'", b'"', b"{", b"[", b"]", b"}", b","),
    *(b"1e400", b"NaN", b"-", b"null", b"9" * 5000, b"&", b"=", b"?", b"/", b"..", b"\r\n", b"\n", b";", b" ", b"*"),
    *(b'{"name":', b'"config"', b'"application_id"', UNKNOWN.encode(), b"limit=", b"name=", b"after=", b"chunked"),
]


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The data with a few pieces put in, cut out or replaced."""
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        piece = rng.choice(FUZZ_PIECES) if rng.random() < 0.7 else rng.randbytes(rng.randrange(1, 9))
        data = data[:at] + (piece if rng.random() < 0.8 else b"") + data[at + rng.randrange(4) :]
    return data


def random_request(rng: random.Random) -> bytes:
    method = rng.choice(["GET", "GET", "HEAD", "POST", "POST", "PUT", "PUT", "DELETE", "PATCH", "OPTIONS"])
    path = rng.choice(FUZZ_PATHS).encode()
    if rng.random() < 0.4:
        path = mutated(rng, path + b"?" + rng.choice([b"limit=7", b"name=n", b"after=" + UNKNOWN.encode(), b""]))
    body = None
    if rng.random() < 0.7:
        document = {"application_id": UNKNOWN, "name": "fuzz", "comments": None, "config": {"a": [1, 1.5, "x", {}]}}
        body = mutated(rng, json.dumps(document).encode()) if rng.random() < 0.8 else rng.randbytes(rng.randrange(300))
    names = [b"If-Match", b"If-None-Match", b"Content-Type", b"Accept", b"Host", b"Expect", b"Upgrade", b"Connection"]
    headers = [name + b": " + mutated(rng, b"application/json") for name in rng.sample(names, rng.randrange(3))]
    headers.append(b"Connection: close")
    whole = request(method, path, body, *headers)
    return mutated(rng, whole) if rng.random() < 0.2 else whole


def everything_said(base_url: str, sent: bytes) -> bytes:
    """What is answered to some bytes until the connection is closed, or nothing more comes."""
    with closing(Wire(base_url)) as wire:
        wire.socket.settimeout(0.5)
        said = b""
        with suppress(TimeoutError, ConnectionError):
            wire.send(sent)
            while piece := wire.socket.recv(65536):
                said += piece
        return said


def test_no_random_request_is_answered_with_5xx_or_stores_what_it_did_not_say(base_url, sql):
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    sent = [random_request(rng) for _ in range(600)]
    before = sql("SELECT count(*) FROM configurations")
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda each: everything_said(base_url, each), sent))
    statuses: set[int] = set()
    for number, said in enumerate(answers):
        found = {int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", said)}
        assert max(found, default=0) < 500, f"seed {seed}, request {number}: {sent[number]!r} got {said!r}"
        assert b"Traceback" not in said, f"seed {seed}, request {number}"
        statuses |= found
    assert {200, 400, 404, 405} <= statuses, f"seed {seed}"
    assert sql("SELECT count(*) FROM configurations") == before
    assert httpx.get(f"{base_url}/health").json()["pool"]["busy"] == 0


@pytest.mark.slow
def test_the_service_takes_more_connections_than_the_usual_soft_limit_of_descriptors(url, descriptors):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    with ExitStack() as open_wires:
        try:
            _, base = open_wires.enter_context(service(url))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(500):
            open_wires.enter_context(closing(Wire(base))).send(b"GET")
        with closing(Wire(base)) as wire:
            serves_on(wire)


def test_a_request_that_is_cut_off_at_shutdown_is_503():
    async def cut_off(*_: Any) -> None:
        raise asyncio.CancelledError

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(strict.ended(cut_off)({"type": "http"}, asyncio.Future, send))
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]

    async def end() -> None:
        with pytest.raises(asyncio.CancelledError):
            await strict.ended(cut_off)({"type": "lifespan"}, asyncio.Future, send)

    asyncio.run(end())
