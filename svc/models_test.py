import json
import math
import random
import secrets
import struct
import tracemalloc
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from svc import settings
from svc.models import (
    MAX_DEPTH,
    ApplicationCreate,
    ApplicationUpdate,
    Comments,
    ConfigurationCreate,
    ConfigurationUpdate,
    Document,
    Name,
    Ulid,
    parse,
)

ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"

JSON = {
    "an object": (b'{"a": 1}', {"a": 1}),
    "white space around": (b' \r\n\t{"a": [1, 2]}\n', {"a": [1, 2]}),
    "a byte order mark": (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
    "every plane": ('"é中𝕏👩‍👩‍👧‍👦\U0010ffff"'.encode(), "é中𝕏👩‍👩‍👧‍👦\U0010ffff"),
    "a pair of surrogates": (rb'"\ud835\udd4f"', "𝕏"),
    "an integer of 4,300 digits": (b"9" * 4300, int("9" * 4300)),
    "a negative integer of 4,300 digits": (b"-" + b"9" * 4300, -int("9" * 4300)),
    "the largest double": (b"1.7976931348623157e308", 1.7976931348623157e308),
    "what is too small for a double": (b"1e-400", 0.0),
    "a fraction of 5,000 digits": (b"0." + b"3" * 5000, 1 / 3),
    "an escaped backslash before u0000": (rb'"\\u0000"', r"\u0000"),
    "the same name in two objects": (b'[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
    "names that differ in case": (b'{"a": 1, "A": 2}', {"a": 1, "A": 2}),
    "no object": (b"null", None),
}


@pytest.mark.parametrize(("body", "expected"), JSON.values(), ids=JSON)
def test_json_is_read_exactly(body, expected):
    found = parse(body)
    assert found == expected
    assert type(found) is type(expected)


NO_JSON = {
    "empty": (b"", "Expecting value"),
    "white space": (b" \n", "Expecting value"),
    "truncated": (b'{"a": ', "Expecting value"),
    "truncated in a string": (b'{"a', "Unterminated string starting at"),
    "two values": (b"{} {}", "Extra data"),
    "a byte order mark alone": (b"\xef\xbb\xbf", "Expecting value"),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + b"{}", "Expecting value"),
    "invalid UTF-8": (b'{"a": "\xff"}', "The body is not UTF-8"),
    "an overlong form": (b'{"a": "\xc0\x80"}', "The body is not UTF-8"),
    "a surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "The body is not UTF-8"),
    "truncated UTF-8": (b'{"a": "\xe2\x82', "The body is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "The body is not UTF-8"),
    "UTF-16 without a mark": ('{"a": 1}'.encode("utf-16-le"), "Expecting property name enclosed in double quotes"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "The body is not UTF-8"),
    "a NUL byte": (b"\0", "Expecting value"),
    "a raw control character": (b'"a\nb"', "Invalid control character at"),
    "an unknown escape": (rb'"\x41"', "Invalid \\escape"),
    "a comment": (b"{} // said", "Extra data"),
    "a comma too many": (b"[1,]", "Illegal trailing comma before end of array"),
    "single quotes": (b"{'a': 1}", "Expecting property name enclosed in double quotes"),
    "100,000 open brackets": (b"[" * 100_000, "The body is nested too deep"),
    "100,000 open objects": (b'{"a":' * 100_000, "The body is nested too deep"),
    "an integer of 4,301 digits": (b"9" * 4301, "An integer has more than 4300 digits"),
    "an integer of 5,000 digits": (b'{"a": -' + b"9" * 5000 + b"}", "An integer has more than 4300 digits"),
    "a number beyond a double": (b"1e400", "A number is beyond the range of a double"),
    "a negative number beyond a double": (b"[-1e400]", "A number is beyond the range of a double"),
    "a mantissa beyond a double": (b"9" * 400 + b".0", "A number is beyond the range of a double"),
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "Infinity": (b"[Infinity]", "Infinity is not JSON"),
    "-Infinity": (b"-Infinity", "-Infinity is not JSON"),
    "a leading zero": (b"01", "Extra data"),
    "a plus": (b"+1", "Expecting value"),
    "hexadecimal": (b"0x10", "Extra data"),
    "a name twice": (b'{"a": 1, "a": 1}', "A name stands twice in one object"),
    "a name twice, once escaped": (rb'{"a": 1, "\u0061": 2}', "A name stands twice in one object"),
    "a name twice further in": (b'[{"x": {"": 1, "": 2}}]', "A name stands twice in one object"),
}


@pytest.mark.parametrize(("body", "reason"), NO_JSON.values(), ids=NO_JSON)
def test_what_is_not_json_or_would_come_back_as_another_value_is_refused(body, reason):
    with pytest.raises(json.JSONDecodeError) as caught:
        parse(body)
    assert caught.value.msg.removesuffix(": ") == reason


def nested(depth: int, kind: str = "object") -> dict[str, Any]:
    """An object that many levels deep, itself the first."""
    inner: Any = {} if kind == "object" else []
    for _ in range(depth - 2):
        inner = {"a": inner} if kind == "object" else [inner]
    return {"a": inner} if depth > 1 else {}


def found(type_: Any, value: Any) -> list[str]:
    """The types of the errors in a value."""
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(type_).validate_python(value)
    return [each["type"] for each in caught.value.errors()]


GOOD = {
    "a ULID": (Ulid, ID),
    "the first ULID": (Ulid, "0" * 26),
    "the last ULID": (Ulid, "7" + "Z" * 25),
    "a name of one character": (Name, "x"),
    "a name of 256 characters": (Name, "𝕏" * 256),
    "a name with space around": (Name, "  x\t"),
    "comments of 1,024 characters": (Comments, "中" * 1024),
    "no comments": (Comments, ""),
    "blank comments": (Comments, "  "),
}


@pytest.mark.parametrize(("type_", "value"), GOOD.values(), ids=GOOD)
def test_ids_and_text_are_taken_as_they_are(type_, value):
    adapter = TypeAdapter(type_)
    assert adapter.dump_python(adapter.validate_python(value)) == value


BAD = {
    "an id in lower case": (Ulid, ID.lower(), "ulid"),
    "an id too big": (Ulid, "8" + ID[1:], "ulid"),
    "an id too short": (Ulid, ID[1:], "ulid"),
    "an id too long": (Ulid, ID + "0", "ulid"),
    "an id and a line end": (Ulid, ID + "\n", "ulid"),
    "an id with a letter that is none of its alphabet": (Ulid, ID[:-1] + "U", "ulid"),
    "an id with digits of another script": (Ulid, "٠" * 26, "ulid"),
    "0 as an id": (Ulid, 0, "ulid"),
    "1 as an id": (Ulid, 1, "ulid"),
    "-1 as an id": (Ulid, -1, "ulid"),
    "2 ** 128 as an id": (Ulid, 2**128, "ulid"),
    "a boolean as an id": (Ulid, True, "ulid"),
    "a double as an id": (Ulid, 1.5, "ulid"),
    "null as an id": (Ulid, None, "ulid"),
    "a list as an id": (Ulid, [ID], "ulid"),
    "an empty name": (Name, "", "string_too_short"),
    "a blank name": (Name, " \t\n\u3000\u00a0", "blank"),
    "a name of 257 characters": (Name, "x" * 257, "string_too_long"),
    "a name of 257 spaces": (Name, " " * 257, "string_too_long"),
    "U+0000 in a name": (Name, "a\0b", "nul"),
    "an unpaired surrogate in a name": (Name, "a\ud800", "string_unicode"),
    "a number as a name": (Name, 1, "string_type"),
    "null as a name": (Name, None, "string_type"),
    "comments of 1,025 characters": (Comments, "x" * 1025, "string_too_long"),
    "U+0000 in comments": (Comments, "\0", "nul"),
    "an unpaired surrogate in comments": (Comments, "\udfff", "string_unicode"),
    "a list as a config": (Document, [], "dict_type"),
    "a string as a config": (Document, "{}", "dict_type"),
    "null as a config": (Document, None, "dict_type"),
    "U+0000 in a value": (Document, {"a": "\0"}, "nul"),
    "U+0000 after a backslash": (Document, {"a": "\\\0"}, "nul"),
    "U+0000 further in": (Document, {"a": [{"b": ["x", "a\0"]}]}, "nul"),
    "U+0000 in a key further in": (Document, {"a": {"b\0": 1}}, "nul"),
    "an unpaired surrogate in a value": (Document, {"a": "\ud800"}, "surrogate"),
    "an unpaired surrogate further in": (Document, {"a": [[{"b": "\udc00x"}]]}, "surrogate"),
    "an unpaired surrogate in a key further in": (Document, {"a": {"\udfff": 1}}, "surrogate"),
    "objects 101 deep": (Document, nested(101), "too_deep"),
    "lists 101 deep": (Document, nested(101, "list"), "too_deep"),
    "numbers that are too large in full": (Document, {"a": [1e308] * 4000}, "too_large"),
    "numbers that are too large without an exponent": (Document, {"a": [1e15] * 60_000}, "too_large"),
}


@pytest.mark.parametrize(("type_", "value", "expected"), BAD.values(), ids=BAD)
def test_bad_ids_text_and_documents_are_refused(type_, value, expected):
    assert found(type_, value) == [expected]


def test_u_0000_and_surrogates_are_refused_in_keys():
    assert found(Document, {"\0": 1}) == ["nul"]
    assert found(Document, {"\ud800": 1}) == ["surrogate"]


DOCUMENTS = {
    "empty": ({}, "{}"),
    "100 deep": (nested(100), None),
    "lists 100 deep": (nested(100, "list"), None),
    "wide and shallow": ({str(n): [n] for n in range(1000)}, None),
    "u0000 as text": ({r"\u0000": r"\u0000"}, r'{"\\u0000":"\\u0000"}'),
    "backslashes before u0000 as text": ({"a": "\\\\" + r"\u0000"}, None),
    "1e+23 in full": ({"a": 1e23}, '{"a":100000000000000000000000.0}'),
    "1e-05 in full": ({"a": 1e-05}, '{"a":0.00001}'),
    "an exponent in a string": ({"1e+23": '"1e+23'}, r'{"1e+23":"\"1e+23"}'),
    "an exponent after a backslash": ({"a\\": 1e22, "b": "\\"}, r'{"a\\":10000000000000000000000.0,"b":"\\"}'),
}


@pytest.mark.parametrize(("config", "text"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_becomes_its_text(config, text):
    stored = TypeAdapter(Document).validate_python(config)
    assert json.loads(stored) == config
    assert text is None or stored == text


def test_numbers_in_full_are_counted_before_they_are_written_out():
    limit = settings.load().max_body_bytes
    config = {"a": [1e308] * (limit // 30)}  # 6 bytes each as it is sent, 311 in full
    tracemalloc.start()
    try:
        assert found(Document, config) == ["too_large"]
        assert tracemalloc.get_traced_memory()[1] < 4 * limit
    finally:
        tracemalloc.stop()


def test_documents_are_bounded_by_max_depth():
    assert MAX_DEPTH == 100


def test_an_update_tells_what_is_absent_from_what_is_null():
    assert ApplicationUpdate().model_fields_set == set()
    assert ApplicationUpdate(comments=None).model_fields_set == {"comments"}
    for model, field in ((ApplicationUpdate, "name"), (ConfigurationUpdate, "name"), (ConfigurationUpdate, "config")):
        assert found(model, {field: None}) in (["string_type"], ["dict_type"])
    assert found(ConfigurationUpdate, {"application_id": ID}) == ["extra_forbidden"]


def test_unknown_fields_are_refused_by_name():
    assert found(ApplicationCreate, {"name": "n", "nam": "n"}) == ["extra_forbidden"]
    whole = {"application_id": ID, "name": "n", "config": {}}
    assert found(ConfigurationCreate, {**whole, "id": ID}) == ["extra_forbidden"]
    assert found(ConfigurationCreate, {}) == ["missing", "missing", "missing"]
    assert ConfigurationCreate(**whole).model_dump() == {**whole, "comments": None, "config": "{}"}


# --- Over HTTP and through PostgreSQL ---


def posted(client, application, body: bytes) -> Any:
    """The answer to a configuration whose config is these bytes."""
    head = json.dumps({"application_id": application["id"], "name": secrets.token_hex(8)})
    return client.post("/configurations", content=head[:-1].encode() + b', "config": ' + body + b"}")


def same(left: Any, right: Any) -> bool:
    """Equal, integers as integers, and doubles bit by bit, but for the sign of zero, which jsonb does not keep."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left == right and (left == 0 or struct.pack(">d", left) == struct.pack(">d", right))
    return left == right


NUMBERS = {
    "zero": b"0",
    "minus zero as an integer": b"-0",
    "2 ** 53 + 1": b"9007199254740993",
    "2 ** 64": b"18446744073709551616",
    "4,300 digits": b"7" * 4300,
    "minus 4,300 digits": b"-" + b"7" * 4300,
    "1.0": b"1.0",
    "0.1": b"0.1",
    "a third in 40 digits": b"0." + b"3" * 40,
    "1e23": b"1e23",
    "1E+2": b"1E+2",
    "1e22": b"1e22",
    "1e16": b"1e16",
    "1e15": b"1e15",
    "1e-5": b"1e-5",
    "1.5e300": b"1.5e300",
    "the largest double": b"1.7976931348623157e308",
    "the smallest double": b"5e-324",
    "the smallest normal double": b"2.2250738585072014e-308",
    "half between two doubles": b"1.00000000000000011102230246251565404236316680908203125",
    "below any double": b"1e-400",
    "minus below any double": b"-1e-400",
    "1,000 digits as a double": b"0." + b"12345678901234567890" * 50,
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_integers_come_back_exactly_and_other_numbers_as_the_same_double(client, application, number):
    sent = json.loads(number)
    response = posted(client, application, b'{"n": ' + number + b', "l": [' + number + b"]}")
    assert response.status_code == 201, response.text
    assert same(response.json()["config"], {"n": sent, "l": [sent]})
    read = client.get(f"/configurations/{response.json()['id']}")
    assert read.text == response.text


def test_minus_zero_comes_back_as_zero_which_is_equal(client, application):
    shown = posted(client, application, b'{"n": -0.0}').json()["config"]["n"]
    assert shown == -0.0
    assert math.copysign(1, shown) == 1


@pytest.mark.parametrize("kind", ["object", "list"])
def test_a_document_100_deep_is_stored_and_readable_and_101_deep_is_refused(client, sql, application, kind):
    response = posted(client, application, json.dumps(nested(100, kind)).encode())
    assert response.status_code == 201
    read = client.get(f"/configurations/{response.json()['id']}")
    assert (read.status_code, read.json()["config"]) == (200, nested(100, kind))
    for depth in (101, 500, 5000, 100_000):
        opened, closed = (b'{"a":', b"}") if kind == "object" else (b"[", b"]")
        inner = b"1" if kind == "object" else b""
        body = b'{"a":' + opened * (depth - 1) + inner + closed * (depth - 1) + b"}"
        refused = posted(client, application, body)
        assert refused.status_code == 400
        assert refused.json()["errors"]
    rows = sql("SELECT id FROM configurations WHERE application_id = %s", application["id"])
    assert rows == [{"id": response.json()["id"]}]


TEXT = {
    "U+0000 in a value": rb'{"a": "\u0000"}',
    "U+0000 in a key": rb'{"\u0000": 1}',
    "U+0000 in a key further in": rb'{"a": [{"\u0000": 1}]}',
    "a surrogate in a value": rb'{"a": "\ud800"}',
    "a surrogate in a key": rb'{"\ud800": 1}',
    "a surrogate in a key further in": rb'{"a": {"b": {"\udc00": 1}}}',
    "surrogates in the wrong order": rb'{"a": "\udd4f\ud835"}',
    "a name twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "1e400": b'{"a": 1e400}',
    "5,000 digits": b'{"a": ' + b"1" * 5000 + b"}",
    "jsonb's own bomb": b'{"a": [' + b",".join([b"1e307"] * 9000) + b"]}",
}


@pytest.mark.parametrize("config", TEXT.values(), ids=TEXT)
def test_a_document_that_would_not_come_back_is_refused_and_nothing_is_stored(client, sql, configuration, config):
    application = {"id": configuration["application_id"]}
    path = f"/configurations/{configuration['id']}"
    for response in (
        posted(client, application, config),
        client.put(path, content=b'{"config": ' + config + b"}"),
        client.post("/applications", content=b'{"name": "n", "comments": ' + config + b"}"),
        client.post("/applications", content=b'{"name": ' + config + b"}"),
        client.post("/applications", content=config),
    ):
        assert response.status_code == 400, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["errors"]
    assert client.get(path).json() == configuration
    assert sql("SELECT count(*) FROM configurations WHERE application_id = %s", application["id"]) == [{"count": 1}]


STRINGS = ["", "\\", '"', "\\u0000", "\\\\u0000", "\u2028", "\x7f", "\x1f", "\ufeff", "\uffff", "\U0010ffff", "1e+23"]
KEYS = ["", "__proto__", "constructor", "$ref", "a.b", "a/b~1", "null", "é", "e\u0301", "'; DROP TABLE x; --", "%s"]


def random_text(rng: random.Random) -> str:
    planes = [(0x20, 0x7E), (1, 0x1F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    pieces = [chr(rng.randint(*rng.choice(planes))) if rng.random() < 0.8 else rng.choice(STRINGS) for _ in range(8)]
    return "".join(pieces[: rng.randint(0, 8)])


def random_number(rng: random.Random) -> int | float:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randint(-(10 ** rng.randint(0, 400)), 10 ** rng.randint(0, 400))
    if kind == 1:
        return round(rng.uniform(-1000, 1000), rng.randint(0, 6))
    if kind == 2:
        return float(rng.randint(-9, 9) * 10 ** rng.randint(0, 300))
    bits = struct.unpack(">d", rng.randbytes(8))[0]
    return bits if math.isfinite(bits) else 0.5


def random_value(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(8) if depth < 6 else rng.randrange(4)
    if kind < 2:
        return random_text(rng)
    if kind == 2:
        return random_number(rng)
    if kind == 3:
        return rng.choice([None, True, False, 0, 1, 0.0, 1.0, "", [], {}])
    if kind < 6:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    return random_document(rng, depth)


def random_document(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    keys = [rng.choice(KEYS) if rng.random() < 0.4 else random_text(rng) for _ in range(rng.randrange(7))]
    return {key: random_value(rng, depth + 1) for key in keys}


def test_random_documents_go_in_and_come_back_equal(client, application):
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    stored = {}
    for number in range(100):
        config = random_document(rng)
        body = json.dumps(config, ensure_ascii=rng.random() < 0.5).encode()
        response = posted(client, application, body)
        assert response.status_code == 201, f"seed {seed}, document {number}: {response.text}"
        assert same(response.json()["config"], config), f"seed {seed}, document {number}"
        stored[response.json()["id"]] = config
    for number, (id, config) in enumerate(stored.items()):
        read = client.get(f"/configurations/{id}")
        assert (read.status_code, same(read.json()["config"], config)) == (200, True), f"seed {seed}, document {number}"
        other = random_document(rng)
        changed = client.put(f"/configurations/{id}", json={"config": other})
        assert same(changed.json()["config"], other), f"seed {seed}, document {number}, changed"
        assert client.get(f"/configurations/{id}").text == changed.text
