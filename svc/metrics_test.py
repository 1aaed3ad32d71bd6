import os
import re
from concurrent.futures import ThreadPoolExecutor

import httpx

from svc.test.process import until

NAME = "[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\["\\n])*)"'
GAUGES = ("config_service_db_connections", "config_service_db_queue", "config_service_waiters")
TYPES = {"http_requests_total": "counter", "http_request_duration_seconds": "histogram"} | dict.fromkeys(
    GAUGES, "gauge"
)


def scrape(base_url: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The values of each name by the labels beside the pid. Fails as `promtool check metrics` would."""
    response = httpx.get(f"{base_url}/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    nothing, *families = re.split("^# HELP ", response.text, flags=re.MULTILINE)
    assert nothing == ""
    types, samples = {}, {}
    for help, kind, *lines, end in (each.split("\n") for each in families):
        assert end == ""
        family = re.fullmatch(rf"({NAME}) \S.*", help).group(1)
        types[family] = kind.removeprefix(f"# TYPE {family} ")
        for line in lines:
            name, labels, value = re.fullmatch(rf"({NAME}){{({LABEL}(?:,{LABEL})*)}} (\S+)", line).group(1, 2, 7)
            assert re.sub("_(bucket|sum|count)$", "", name) == family
            pid, *others = re.findall(LABEL, labels)
            assert pid == ("pid", str(os.getpid()))
            key = tuple(value for _, value in others)
            assert samples.setdefault(name, {}).setdefault(key, float(value)) == float(value)
    assert (types, len(families)) == (TYPES, len(TYPES))
    return samples


def test_the_buckets_are_cumulative_and_the_last_has_all(base_url):
    scrape(base_url)
    samples = scrape(base_url)
    buckets = samples["http_request_duration_seconds_bucket"]
    bounds = [bound for (bound,) in buckets]
    assert bounds == [*sorted(bounds[:-1], key=float), "+Inf"]
    assert [*buckets.values()] == sorted(buckets.values())
    assert buckets["+Inf",] == samples["http_request_duration_seconds_count"][()] > 0
    assert samples["http_request_duration_seconds_sum"][()] > 0


def test_it_counts_what_is_asked_and_leaves_the_time_of_waiting_out(base_url, client, configuration):
    path = f"/configurations/{configuration['id']}"
    etag = {"If-None-Match": client.get(path).headers["etag"]}
    before = scrape(base_url)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(client.get, f"{path}?wait=30", headers=etag)
        until(lambda: scrape(base_url)["config_service_waiters"] == {(): 1})
        assert (client.put(path, json={"config": {}}).status_code, waiting.result().status_code) == (200, 200)
    after = scrape(base_url)
    assert (after["config_service_waiters"], after["config_service_db_queue"]) == ({(): 0}, {(): 0})
    assert after["config_service_db_connections"].keys() == {("busy",), ("idle",)}
    assert after["config_service_db_connections"]["idle",] > 0
    names = ("http_requests_total", "http_request_duration_seconds_count")
    total, timed = (sum(after[name].values()) - sum(before[name].values()) for name in names)
    assert timed == total - 1
    puts = [each["http_requests_total"].get(("PUT", "200"), 0) for each in (before, after)]
    assert puts[1] == puts[0] + 1


def test_the_labels_are_no_more_after_many_paths_and_methods(base_url):
    before = scrape(base_url)["http_requests_total"]
    with httpx.Client(base_url=base_url) as client:
        for number in range(100):
            client.request(("GET", "LOCK", "TRACE", "PROPFIND")[number % 4], f"/{number}")
    after = scrape(base_url)["http_requests_total"]
    assert after["other", "404"] == before.get(("other", "404"), 0) + 75
    assert after.keys() <= before.keys() | {("GET", "404"), ("other", "404"), ("GET", "200")}
