import httpx
import pytest

from svc.conftest import problem
from svc.test.process import until


@pytest.mark.parametrize("kind", ["applications", "configurations"])
def test_an_etag_never_stands_for_two_contents_even_if_the_database_goes_back_in_time(
    client, sql, application, configuration, kind
):
    id = application["id"] if kind == "applications" else configuration["id"]
    path = f"/{kind}/{id}"
    [dump] = sql(f"SELECT row_to_json(t)::text AS row FROM {kind} AS t WHERE id = %s", id)
    lost = client.put(path, json={"comments": "lost"})
    restore = f"""
        SET session_replication_role = replica;
        DELETE FROM configuration_versions WHERE configuration_id = %s AND version > 1;
        DELETE FROM {kind} WHERE id = %s;
        INSERT INTO {kind} SELECT * FROM json_populate_record(NULL::{kind}, %s)
    """
    sql(restore, id, id, dump["row"])
    other = client.put(path, json={"comments": "other"})
    assert other.json()["version"] == lost.json()["version"]
    assert client.get(path, headers={"If-None-Match": lost.headers["etag"]}).text == other.text
    problem(client.put(path, json={"comments": "new"}, headers={"If-Match": lost.headers["etag"]}), 412)


def test_pages_are_bounded_by_bytes_and_head_reads_only_the_first(client, application, caplog):
    caplog.set_level("DEBUG", "svc")
    for number in range(4):
        body = {"application_id": application["id"], "name": str(number), "config": {"text": "x" * 600_000}}
        client.post("/configurations", json=body)
    path = f"/configurations?application_id={application['id']}"

    def ask(method: str, path: str) -> tuple[httpx.Response, int]:
        """The answer, and how many statements it took."""
        caplog.clear()
        response = client.request(method, path)
        until(lambda: any(f" {method} " in each for each in caplog.messages))  # the line that ends a request
        return response, sum("list_configurations took" in each for each in caplog.messages)

    whole, statements = ask("GET", path)
    assert (len(whole.json()), statements) == (4, 2)
    page, statements = ask("GET", f"{path}&limit=4")
    assert (page.json(), statements) == (whole.json()[:2], 1)
    assert client.get(page.links["next"]["url"].removeprefix("/api/v1")).json() == whole.json()[2:]
    assert len(client.get(f"/changes?application_id={application['id']}").json()) == 4  # without documents: one page
    head, statements = ask("HEAD", path)
    assert (head.status_code, statements) == (200, 1)
