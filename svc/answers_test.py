import asyncio
import json
from typing import Any

import pytest
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError

from svc import answers, settings, watch

ID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
ROW = {"id": ID, "version": 7, "json": '{"é": 1}', "written": True}


def request(path: bytes = b"/", id: str = ID, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Request:
    return Request({"type": "http", "raw_path": path, "path_params": {"id": id}, "headers": list(headers)})


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (b"billing/configurations/production", ("billing", "production")),
        (b"a%2Fb/configurations/c%2Fd", ("a/b", "c/d")),
        (b"a/configurations/c/d", ("a", "c/d")),
        (b"configurations/configurations/configurations", ("configurations", "configurations")),
        (b"a%2Fconfigurations%2Fb/configurations/c", ("a/configurations/b", "c")),
        (b"%C3%A9%0A/configurations/%2525+", ("é\n", "%25+")),
    ],
)
def test_names_are_read_from_the_path_as_it_was_sent(path, names):
    assert answers.path_names(request(b"/api/v1/applications/" + path)) == names


@pytest.mark.parametrize("path", ["a/b c", "%00 c", "a %00", "%ff c", "a %C3"])
def test_names_that_cannot_be_are_404(path):
    with pytest.raises(HTTPException) as raised:
        answers.path_names(request(b"/api/v1/applications/" + path.replace(" ", "/configurations/").encode()))
    assert raised.value.status_code == 404


def test_an_id_that_is_no_ulid_is_refused_with_its_place():
    assert answers.path_id(request()) == ID
    with pytest.raises(RequestValidationError) as raised:
        answers.path_id(request(id=ID.lower()))
    assert raised.value.errors()[0]["loc"] == ("path", "id")


@pytest.mark.parametrize(("known", "status"), [("*", 503), (f'"{ID}.6"', 200)])
def test_beyond_the_bound_of_those_who_wait_only_they_are_refused(monkeypatch, known, status):
    async def read(_: str) -> dict[str, Any]:
        return ROW

    monkeypatch.setattr(watch, "count", lambda: settings.load().max_waiters)
    asked = request(headers=((b"if-none-match", known.encode()),))
    asked.scope["query_string"] = b"wait=60"
    if status == 200:
        assert asyncio.run(answers.current(asked, ID, read)) is ROW
        return
    with pytest.raises(HTTPException) as raised:
        asyncio.run(answers.current(asked, ID, read))
    assert (raised.value.status_code, raised.value.headers) == (503, {"Retry-After": "1"})


def test_what_postgresql_wrote_is_sent_as_it_is_or_not_again():
    fresh = answers.shown(request(), ROW, "missing")
    assert (fresh.status_code, fresh.body, fresh.headers["etag"]) == (200, ROW["json"].encode(), f'"{ID}.7"')
    again = answers.shown(request(headers=((b"if-none-match", b"*"),)), ROW, "missing")
    assert (again.status_code, again.body, again.headers["etag"]) == (304, b"", f'"{ID}.7"')
    for nothing in (None, {"id": None, "version": None, "json": None}):
        with pytest.raises(HTTPException, match="missing"):
            answers.shown(request(), nothing, "missing")


def test_a_write_that_left_its_row_alone_is_412_with_the_version_that_is_stored():
    done = answers.written(ROW, "thing")
    assert (done.status_code, done.body) == (200, ROW["json"].encode())
    refused = answers.written({**ROW, "written": False}, "thing")
    assert (refused.status_code, json.loads(refused.body)["version"], refused.headers["etag"]) == (412, 7, f'"{ID}.7"')
    assert answers.deleted(ROW, "thing").status_code == 204
    assert answers.deleted({**ROW, "written": False}, "thing").status_code == 412
    with pytest.raises(HTTPException, match="There is no thing with this id"):
        answers.written(None, "thing")
