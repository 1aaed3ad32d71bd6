"""The page that a person sees first, made from the OpenAPI document. It loads nothing."""

import json
import re
import shlex
from html import escape
from typing import Any
from urllib.parse import quote

from svc.models import APPLICATION_ID

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 52rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }
h2 { margin-top: 3rem; border-bottom: 1px solid; }
h3 { margin-top: 2.5rem; }
pre { padding: 0.75rem; border-radius: 0.5rem; background: #8883; white-space: pre-wrap; }</style>"""
ABOUT = """The grey blocks are for bash: pasted from the top into an empty service, all of them work. Where tokens are
needed, add `-H 'Authorization: Bearer TOKEN'` to each `curl`."""
DELETIONS = {"name": "deletions", "description": "They come last, and take away what was created above."}


def page(document: dict[str, Any], base: str) -> str:
    """HTML. `base` is the URL of the service as the client knows it, without a slash at its end."""
    title = escape(document["info"]["title"])
    sections = {
        each["name"]: [f"<h2>{escape(each['name'].capitalize())}</h2><p>{_prose(each['description'])}"]
        for each in [*document["tags"], DELETIONS]
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            section = sections["deletions" if method == "delete" else operation["tags"][0]]
            first = method == "delete" or "201" in operation["responses"]
            section.insert(1 if first else len(section), _show(document, base, path, method, operation))
    return f"""{HEAD}<title>{title}</title><h1>{title}</h1>
<p>{_prose(document["info"]["description"])} {_prose(ABOUT)}
<p><a href="{escape(base)}/docs">Try it in the browser</a> (needs the internet)
{"".join(shown for section in sections.values() for shown in section)}"""


def _show(document: dict[str, Any], base: str, path: str, method: str, operation: dict[str, Any]) -> str:
    """What an operation does, what it takes, and a line for bash that sends the examples.

    What a POST creates is kept as $application or $configuration.
    """
    items, url = "", shlex.quote(base) + re.sub(r"(\w+)s/{id}", r"\1s/$\1", path)
    for each in operation["parameters"]:
        items += f"<li><code>{escape(each['name'])}</code> in the {each['in']}: {_prose(each['description'])}"
        example = each["schema"].get("examples", [""])[0]
        url = url.replace(f"{{{each['name']}}}", quote(str(example), safe=""))
    curl = f"curl -s {url}" if method == "get" else f"curl -s -X {method.upper()} {url}"
    for media_type, content in operation.get("requestBody", {"content": {}})["content"].items():
        schema = document["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        body = shlex.quote(json.dumps(schema["examples"][-1])).replace(APPLICATION_ID, "'$application'")
        curl += f" \\\n  -H 'Content-Type: {media_type}' \\\n  -d {body}"
        if method == "post":
            curl = f"{path.rpartition('/')[2][:-1]}=$({curl} | tee -a /dev/stderr | cut -d'\"' -f4)"
    return f"""
<h3><code>{method.upper()} {escape(path)}</code></h3>
<p>{_prose(operation["description"])}<ul>{items}</ul>
<pre>{escape(curl)}</pre>"""


def _prose(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))
