"""GET /changes: who changed what, newest first."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx

# Changes one configuration so often at once.
MANY = "DO $$ BEGIN FOR n IN 1..150 LOOP UPDATE configurations SET comments = n WHERE id = '{}'; END LOOP; END $$"


def changes_of(client: httpx.Client, configuration: dict) -> list[tuple]:
    """What is told of each change, which is what its version says without the document."""
    found = client.get("/changes", params={"application_id": configuration["application_id"]}).json()
    for each in found:
        version = client.get(f"/configurations/{configuration['id']}/versions/{each['version']}").json()
        del version["config"], version["comments"]
        assert each == version | {"position": each["position"]}
    assert found == sorted(found, key=lambda each: -each["position"])
    return [(each["version"], each["operation"], each["name"], each["actor"]) for each in found]


def test_a_tombstone_a_restore_and_a_prune_are_told_as_they_are(client, sql, configuration):
    path = f"/configurations/{configuration['id']}"
    client.put(path, json={"name": "renamed"})
    client.delete(path)
    client.post(f"{path}/versions/1/restore")
    sql("DELETE FROM applications WHERE id = %s", configuration["application_id"])
    [user] = sql("SELECT 'database:' || session_user AS name")
    told = [
        (5, "delete", "production", user["name"]),
        (4, "create", "production", "anonymous"),
        (3, "delete", "renamed", "anonymous"),
        (2, "update", "renamed", "anonymous"),
        (1, "create", "production", "anonymous"),
    ]
    assert changes_of(client, configuration) == told

    # Of all versions in the database only these become old enough.
    age = "UPDATE configuration_versions SET recorded_at = '2000-01-01' WHERE configuration_id = %s AND version < 4"
    trigger = "ALTER TABLE configuration_versions {} TRIGGER USER"
    sql(f"{trigger.format('DISABLE')}; {age}; {trigger.format('ENABLE')}", configuration["id"])
    sql("SELECT prune_configuration_versions('10 years', 1)")
    assert changes_of(client, configuration) == told[:2]


def test_a_page_has_100_changes_unless_told_otherwise(client, base_url, sql, configuration):
    sql(MANY.format(configuration["id"]))
    path = f"/changes?application_id={configuration['application_id']}"
    page = client.get(path)
    assert [each["version"] for each in page.json()] == [*range(151, 51, -1)]
    rest = httpx.get(base_url + page.links["next"]["url"])
    assert [each["version"] for each in rest.json()] == [*range(51, 0, -1)]
    assert rest.links == {}
    assert client.get(f"{path}&limit=1000").json() == page.json() + rest.json()
    assert client.get(f"{path}&before={page.json()[-1]['position']}&limit=7").json() == rest.json()[:7]
    for bad in ("limit=0", "limit=1001", "before=0", "after=1", "application_id=x", "nam=x"):
        assert client.get(f"/changes?{bad}").status_code == 400


def test_a_walk_shows_each_change_once_while_eight_writers_write(client, base_url, sql, application):
    path = f"/applications/{application['name']}/configurations"
    for writer in range(8):
        sql(MANY.format(client.put(f"{path}/{writer}", json={"config": {}}).json()["id"]))
    rows = sql("SELECT position FROM configuration_versions WHERE application_id = %s", application["id"])
    ended = Event()

    def write(writer: int) -> int:
        count = 0
        while not ended.is_set():
            count += client.put(f"{path}/{writer}", json={"config": {"n": count}}).is_success
        return count

    with ThreadPoolExecutor(8) as threads:
        writers = [threads.submit(write, writer) for writer in range(8)]
        shown, link = [], f"/api/v1/changes?application_id={application['id']}"
        try:
            while link:
                page = httpx.get(base_url + link)
                shown += [each["position"] for each in page.json()]
                link = page.links.get("next", {}).get("url")
        finally:
            ended.set()
    assert sum(each.result() for each in writers) > 8
    assert shown == sorted(set(shown), reverse=True)
    assert {row["position"] for row in rows} <= set(shown)
