import pytest

from svc.etags import etag, header, named, tags, versions

ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
TAG = f'"{ID}.7"'

# RFC 9110, 8.8.3 and 13.1: what a header holds, whether If-None-Match names TAG (weak comparison), and the versions
# that If-Match admits (strong comparison; None is every one).
CASES = {
    "no header": (None, False, None),
    "the tag": (TAG, True, ["7"]),
    "the tag, weak": (f"W/{TAG}", True, []),
    "another version": (f'"{ID}.8"', False, ["8"]),
    "another id": ('"01ARZ3NDEKTSV4RRFFQ69G5FAW.7"', False, []),
    "any": ("*", True, None),
    "any, with white space": (" *\t", True, None),
    "a list": (f'"x", {TAG},"y"', True, ["7"]),
    "a list of two versions": (f'"{ID}.6", {TAG}', True, ["6", "7"]),
    "a list with weak tags": (f'W/"x", W/{TAG}', True, []),
    "a list with empty elements": (f",, {TAG} , ,", True, ["7"]),
    "a comma within a tag": (f'"a,b", {TAG}', True, ["7"]),
    "an empty tag": ('""', False, []),
    "obs-text in a tag": (f'"\xe9", {TAG}', True, ["7"]),
    "an empty header": ("", False, []),
    "no quotes": (f"{ID}.7", False, []),
    "half a quote": (f'"{ID}.7', False, []),
    "lower-case weakness": (f"w/{TAG}", False, []),
    "two tags without a comma": (f'{TAG} "x"', False, []),
    "a star among tags": (f"*, {TAG}", False, []),
    "a quoted star": ('"*"', False, []),
    "a space within a tag": (f'"{ID}.7 "', False, []),
    "a tag and garbage": (f"{TAG}, x", False, []),
    "leading zero": (f'"{ID}.07"', False, ["07"]),
    "no version": (f'"{ID}."', False, [""]),
    "not a number": (f'"{ID}.x"', False, ["x"]),
}


@pytest.mark.parametrize("case", CASES)
def test_conditions_are_read_as_the_rfc_says(case):
    value, is_named, admitted = CASES[case]
    assert named(tags(value), TAG) is is_named
    assert versions(value, ID) == admitted
    assert named(tags(value), None) is False


def test_a_long_header_takes_no_long_time_to_read():
    for value in ('"' * 60_000, '"a",' * 15_000 + "x", "W/" * 30_000, ", " * 30_000):
        assert named(tags(value), TAG) is False


def test_the_etag_is_id_and_version():
    assert etag({"id": ID, "version": 7}) == TAG
    assert etag(None) is None
    assert etag({"id": None, "version": None}) is None


def test_lines_of_one_header_are_one_list():
    scope = {"headers": [(b"if-match", b'"a"'), (b"host", b"x"), (b"if-match", b'"b"')]}
    assert header(scope, b"if-match") == '"a", "b"'
    assert header(scope, b"if-none-match") is None
