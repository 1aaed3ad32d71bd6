"""What is taken as JSON, text and ids, and that it comes back as it was sent."""

import json
import math
import random
import secrets
import struct
from typing import Any

import httpx
import pytest

from svc.conftest import UNKNOWN, problem, send


def post(client: httpx.Client, application: dict[str, Any], config: bytes) -> httpx.Response:
    """The answer to a configuration whose config is these bytes."""
    head = json.dumps({"application_id": application["id"], "name": secrets.token_hex(8)})
    return client.post("/configurations", content=head[:-1].encode() + b', "config":\n' + config + b"}")


def error_in(response: httpx.Response) -> dict[str, Any]:
    """The one error of a 400."""
    [error] = problem(response, 400).errors
    return error.model_dump()


def nested(depth: int, kind: str) -> bytes:
    """An object that many levels deep, itself the first."""
    opened, closed = (b'{"a":', b"}") if kind == "objects" else (b"[", b"]")
    return b'{"a":' + opened * (depth - 1) + b"1" + closed * (depth - 1) + b"}"


# --- JSON ---

# A config begins in line 2 of the body.
BROKEN = {
    "no colon in the third line": (b'{"a": 1,\n "b" 2', "Expecting ':' delimiter: line 3 column 6"),
    "no UTF-8": (b'{"a":"\xff"}', "'utf-8' codec can't decode byte 0xff in position 93: invalid start byte"),
    "a surrogate in UTF-8": (b'{"a":"\xed\xa0\x80"}', "'utf-8' codec can't decode byte 0xed in position 93"),
    "NaN": (b'{"a":NaN}', "NaN is no number"),
    "Infinity": (b'{"a":-Infinity}', "-Infinity is no number"),
    "4,301 digits": (b"9" * 4301, "Exceeds the limit (4300 digits) for integer string conversion"),
    "100,000 open brackets": (b"[" * 100_000, "maximum recursion depth exceeded"),
    "a number beyond a double": (b'{"a":[-1e400]}', "A number is beyond the range of a double"),
    "30,000 numbers of 309 digits": (
        b'{"a":[%s]}' % b",".join([b"1e308"] * 30_000),
        "The large numbers have more than 8388608 digits together",
    ),
    "400 digits and a fraction": (b'{"a":' + b"9" * 400 + b".0}", "A number is beyond the range of a double"),
    "a key twice": (b'{"a":[{"port":1,"b":2,"port":1}]}', 'Duplicate key "port" in an object'),
    "a key twice, once escaped": (rb'{"a":1,"\u0061":2}', 'Duplicate key "a" in an object'),
    "a long key twice": (b'{"%s":1,"%s":2}' % (b"k" * 999, b"k" * 999), f'Duplicate key "{"k" * 100}" in an object'),
}
REFUSED = {
    "a list": (b"[]", "dict_type"),
    "null": (b"null", "dict_type"),
    "U+0000 in a value": (rb'{"a":[{"b":"x\u0000"}]}', "characters"),
    "U+0000 in a key": (rb'{"a":[{"\u0000":1}]}', "characters"),
    "a surrogate in a value": (rb'{"a":"\ud800"}', "characters"),
    "a surrogate in a key": (rb'{"\ud800":1}', "characters"),
    "objects 101 deep": (nested(101, "objects"), "too_deep"),
    "lists 101 deep": (nested(101, "lists"), "too_deep"),
    "objects 9,900 deep": (nested(9900, "objects"), "too_deep"),
    "over 8 MiB as PostgreSQL prints it": (b'{"a":[' + b",".join([b"5e-324"] * 26_000) + b"]}", "too_large"),
}


@pytest.mark.parametrize(
    ("config", "type_", "msg"),
    [(config, "json_invalid", f"JSON decode error: {msg}") for config, msg in BROKEN.values()]
    + [(config, type_, "") for config, type_ in REFUSED.values()],
    ids=[*BROKEN, *REFUSED],
)
def test_a_document_that_would_not_come_back_as_it_was_sent_is_refused_and_nothing_is_stored(
    client, sql, configuration, config, type_, msg
):
    application = {"id": configuration["application_id"]}
    path = f"/configurations/{configuration['id']}"
    created = error_in(post(client, application, config))
    assert created["type"] == type_
    assert created["msg"].startswith(msg)
    for method, headers in (("PUT", {}), ("PATCH", {"Content-Type": "application/merge-patch+json"})):
        response = client.request(method, path, content=b'{"config":\n' + config + b"}", headers=headers)
        assert error_in(response)["type"] == type_
    assert client.get(path).json() == configuration
    assert sql("SELECT count(*) FROM configurations WHERE application_id = %s", application["id"]) == [{"count": 1}]


@pytest.mark.parametrize("kind", ["objects", "lists"])
def test_a_document_100_deep_comes_back(client, application, kind):
    created = post(client, application, nested(100, kind))
    read = client.get(f"/configurations/{created.json()['id']}")
    assert read.json()["config"] == json.loads(nested(100, kind))


def test_a_byte_order_mark_and_white_space_around_a_body_are_no_part_of_it(client, name):
    body = b'\xef\xbb\xbf \r\n\t{"name": "%s"}\n' % name.encode()
    assert client.post("/applications", content=body).json()["name"] == name
    assert error_in(client.post("/applications", content=b"\xef\xbb\xbf" + body))["type"] == "json_invalid"


NUMBERS = [
    *(b"0", b"-0", b"9007199254740993", b"18446744073709551616", b"7" * 4300, b"-" + b"7" * 4299),
    *(b"1.0", b"-0.0", b"0.1", b"0." + b"3" * 40, b"1E+2", b"1e-5", b"1e15", b"1e16", b"1e22", b"1e23", b"1.5e300"),
    *(b"1.7976931348623157e308", b"5e-324", b"2.2250738585072014e-308", b"1e-400", b"-1e-400"),
    *(b"1.00000000000000011102230246251565404236316680908203125", b"0." + b"12345678901234567890" * 50),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:24].decode())
def test_integers_come_back_exactly_and_other_numbers_as_the_same_double(client, application, number):
    created = post(client, application, b'{"n":[%s]}' % number)
    assert created.status_code == 201, created.text
    assert created.json()["config"] == json.loads(b'{"n":[%s]}' % number)
    assert client.get(f"/configurations/{created.json()['id']}").text == created.text


# --- Fields ---

FIELDS = {
    "an empty name": ({"name": ""}, "string_too_short"),
    "a blank name": ({"name": " \t\n\u3000\u00a0"}, "blank"),
    "a name of 257 characters": ({"name": "𝕏" * 257}, "string_too_long"),
    "U+0000 in a name": ({"name": "a\0b"}, "nul"),
    "a number as a name": ({"name": 1}, "string_type"),
    "null as a name": ({"name": None}, "string_type"),
    "comments of 1,025 characters": ({"comments": "中" * 1025}, "string_too_long"),
    "U+0000 in comments": ({"comments": "\0"}, "nul"),
    "a list as comments": ({"comments": []}, "string_type"),
    "null as a config": ({"config": None}, "dict_type"),
    "an unknown field": ({"nmae": "n"}, "extra_forbidden"),
    "a read-only field": ({"version": 1}, "extra_forbidden"),
}
IDS = [UNKNOWN.lower(), "8" + UNKNOWN[1:], UNKNOWN[1:], UNKNOWN + "0", UNKNOWN + "\n", UNKNOWN[:-1] + "U"]
IDS += [0, 1, -1, 2**128, True, 1.5, None]


@pytest.mark.parametrize(("change", "type_"), FIELDS.values(), ids=FIELDS)
def test_a_bad_field_is_refused_by_its_name(client, configuration, change, type_):
    whole = {"application_id": configuration["application_id"], "name": secrets.token_hex(8), "config": {}}
    for method, path, body in (
        ("POST", "/configurations", whole | change),
        ("PUT", f"/configurations/{configuration['id']}", change),
        ("PATCH", f"/configurations/{configuration['id']}", change),
    ):
        error = error_in(send(client, method, path, body))
        assert (error["loc"], error["type"]) == (["body", *change], type_)
    assert client.get(f"/configurations/{configuration['id']}").json() == configuration


@pytest.mark.parametrize("id", IDS, ids=ascii)
def test_an_id_is_26_upper_case_characters_and_nothing_else(client, id):
    error = error_in(client.post("/configurations", json={"application_id": id, "name": "n", "config": {}}))
    assert (error["loc"], error["type"]) == (["body", "application_id"], "ulid")


@pytest.mark.parametrize("id", ["0" * 26, UNKNOWN, "7" + "Z" * 25])
def test_a_configuration_of_no_application_is_refused(client, id):
    error = error_in(client.post("/configurations", json={"application_id": id, "name": "n", "config": {}}))
    assert (error["loc"], error["type"]) == (["body", "application_id"], "unknown_application")


SEARCHES = {
    "a list": ("[]", "dict_type"),
    "broken JSON": ('{"a":', "value_error"),
    "a key twice": ('{"a":1,"a":1}', "value_error"),
    "2,049 bytes": ('{"a":"%sx"}' % ("é" * 1020), "too_long"),
}


@pytest.mark.parametrize(("contains", "type_"), SEARCHES.values(), ids=SEARCHES)
def test_what_a_search_looks_for_is_a_json_object_of_at_most_2048_bytes(client, contains, type_):
    error = error_in(client.get("/configurations", params={"contains": contains}))
    assert (error["loc"], error["type"]) == (["query", "contains"], type_)
    assert client.get("/configurations", params={"contains": '{"a":"%s"}' % ("é" * 1020)}).json() == []


# --- Text ---

TEXTS = ["", " ", "\\", '"', "\\u0000", "\\\\u0000", "\u2028", "\x7f", "\ufeff", "\uffff", "1e+23", "e\u0301"]
TEXTS += ["__proto__", "a/b~1", "%s", "'; DROP TABLE x; --", "null", "👩‍👩‍👧‍👦", "عربي", " trailing\t "]


def random_text(rng: random.Random) -> str:
    planes = [(1, 0x1F), (0x20, 0x7E), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(
        chr(rng.randint(*rng.choice(planes))) if rng.random() < 0.8 else rng.choice(TEXTS)
        for _ in range(rng.randrange(9))
    )


def random_value(rng: random.Random, depth: int = 0) -> Any:
    if depth == 0 or (kind := rng.randrange(8)) < 2:
        return {random_text(rng): random_value(rng, depth + 1) for _ in range(rng.randrange(7))}
    if kind < 4:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))] if depth < 6 else []
    double = struct.unpack(">d", rng.randbytes(8))[0]
    integer = rng.randint(-(10 ** rng.randint(0, 400)), 10 ** rng.randint(0, 400))
    return rng.choice([random_text(rng), integer, double if math.isfinite(double) else 0.5, None, True, False])


def test_random_names_comments_and_documents_come_back_as_they_were_sent(client, application):
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    path = "/configurations/" + post(client, application, b"{}").json()["id"]
    for number in range(100):
        sent = {"name": random_text(rng) + "n", "comments": random_text(rng), "config": random_value(rng)}
        body = json.dumps(sent, ensure_ascii=rng.random() < 0.5).encode()
        changed = client.put(path, content=body)
        assert changed.status_code == 200, f"seed {seed}, document {number}: {changed.text}"
        assert sent.items() <= changed.json().items(), f"seed {seed}, document {number}"
        assert client.get(path).text == changed.text, f"seed {seed}, document {number}"


def test_the_longest_name_and_comments_are_stored_whole(client, sql, application):
    longest = {"name": "𝕏" * 256, "comments": "中" * 1024}
    assert longest.items() <= client.put(f"/applications/{application['id']}", json=longest).json().items()
    assert sql("SELECT name, comments FROM applications WHERE id = %s", application["id"]) == [longest]
