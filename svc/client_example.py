"""How a program reads its configuration and hears of changes: copy what you need, it is the standard library alone.

    python client_example.py http://127.0.0.1:8000 billing production copy.json

prints the configuration of these names, and again after each change. CONFIG_TOKEN in the environment is the token.
"""

import http.client
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import quote


def configurations(base: str, application: str, name: str, copy: str, wait: int = 30) -> Iterator[dict]:
    """Yield the configuration, and again after each change. Raises HTTPError 404 if there is none.

    `copy` names a file that keeps the last good one, to begin with while the service is away.
    `wait` is how many seconds a request waits for a change. Proxies cut off what takes 60.
    """
    url = f"{base}/api/v1/applications/{quote(application, safe='')}/configurations/{quote(name, safe='')}"
    known = yielded = None
    interval = failures = 0
    with suppress(OSError, ValueError), open(copy) as file:
        known = json.load(file)
    while True:
        try:
            known = fetch(url, known, wait if yielded else 0)
            with open(f"{copy}.new", "w") as file:
                json.dump(known, file)
            os.replace(f"{copy}.new", copy)
            failures, pause = 0, interval
        except (OSError, ValueError, http.client.HTTPException) as error:
            code = getattr(error, "code", None)
            if code == 404 or (code == 400 and not wait):
                raise
            if code == 400:  # a proxy drops If-None-Match: from now on, ask at an interval instead of waiting
                wait, interval = 0, wait
            # Others try again too: not all at once, and ever more rarely.
            failures += 1
            pause = random.uniform(0, min(30, 2**failures))
            print(f"{url}: {error}", file=sys.stderr)
        if known and known["etag"] != yielded:
            yielded = known["etag"]
            yield known["config"]
        time.sleep(pause)


def fetch(url: str, known: dict | None, wait: int) -> dict | None:
    """The ETag and the configuration as they are now, or after a change within so many seconds."""
    request = urllib.request.Request(f"{url}?wait={wait}" if wait else url)
    if known:
        request.add_header("If-None-Match", known["etag"])
    if token := os.environ.get("CONFIG_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=wait + 15) as answer:
            return {"etag": answer.headers["ETag"], "config": json.load(answer)["config"]}
    except urllib.error.HTTPError as error:
        if error.code == 304:
            return known
        raise


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        for config in configurations(*sys.argv[1:]):
            print(json.dumps(config), flush=True)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.url}: {error}")
