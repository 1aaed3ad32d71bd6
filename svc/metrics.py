"""What a process counts, in the text format of Prometheus, version 0.0.4."""

import os
from bisect import bisect_left
from collections import Counter
from itertools import accumulate

from svc import db, watch

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds

_requests: Counter[tuple[str, int]] = Counter()
_buckets = [0] * (len(BOUNDS) + 1)  # how many took no longer than each bound and longer than the one before
_seconds = 0.0


def observe(method: str, status: int, seconds: float | None) -> None:
    """Count a request. Without seconds, its time does not count."""
    global _seconds
    _requests[method if method in METHODS else "other", status] += 1
    if seconds is not None:
        _buckets[bisect_left(BOUNDS, seconds)] += 1
        _seconds += seconds


def text() -> str:
    """Everything since this process started. Nothing that a client chooses is a label, so their number is bounded."""
    name = "http_request_duration_seconds"
    cumulative = list(accumulate(_buckets))
    pool = db.use()
    lines = [
        _head("http_requests_total", "counter", "Requests that were answered."),
        *(_sample("http_requests_total", n, method=method, status=status) for (method, status), n in _requests.items()),
        _head(name, "histogram", "Seconds until a request was answered. Those with ?wait= are left out."),
        *(_sample(f"{name}_bucket", n, le=bound) for bound, n in zip((*BOUNDS, "+Inf"), cumulative, strict=True)),
        _sample(f"{name}_sum", _seconds),
        _sample(f"{name}_count", cumulative[-1]),
        _head("config_service_db_connections", "gauge", "Connections to the database."),
        *(_sample("config_service_db_connections", pool[state], state=state) for state in ("busy", "idle")),
        _head("config_service_db_queue", "gauge", "Statements that wait for a connection."),
        _sample("config_service_db_queue", pool["queued"]),
        _head("config_service_waiters", "gauge", "Clients that wait for a change."),
        _sample("config_service_waiters", len(watch.readers)),
    ]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> str:
    return f"# HELP {name} {meaning}\n# TYPE {name} {kind}"


def _sample(name: str, value: float, **labels: object) -> str:
    shown = ",".join(f'{key}="{label}"' for key, label in {"pid": os.getpid(), **labels}.items())
    return f"{name}{{{shown}}} {value}"
