"""Entity tags and the two conditional headers (RFC 9110, sections 8.8.3 and 13.1)."""

import re
from collections.abc import Iterable

from starlette.types import Scope

from svc.db import Row

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_tags = re.compile(_TAG).findall
_is_list = re.compile(rf"[ \t]*(?:{_TAG}[ \t]*)?(?:,[ \t]*(?:{_TAG}[ \t]*)?)*").fullmatch


def etag(row: Row | None) -> str | None:
    """The strong tag of what GET shows, "<id>.<version>" in quotes; None if there is nothing to show."""
    return f'"{row["id"]}.{row["version"]}"' if row and row["id"] else None


def header(scope: Scope, name: bytes) -> str | None:
    """All lines of a header as one (section 5.3), None without any. `name` is lower case."""
    lines = [value for key, value in scope["headers"] if key == name]
    return b", ".join(lines).decode("latin-1") if lines else None


def _listed(value: str) -> Iterable[str]:
    """The tags of a list. One that is malformed names nothing."""
    return _tags(value) if _is_list(value) else ()


def tags(if_none_match: str | None) -> frozenset[str]:
    """What If-None-Match names, for weak comparison. It may be "*"."""
    if if_none_match is None:
        return frozenset()
    if if_none_match.strip(" \t") == "*":
        return frozenset("*")
    return frozenset(each.removeprefix("W/") for each in _listed(if_none_match))


def named(tags: frozenset[str], tag: str | None) -> bool:
    """Whether a tag is one of those, or any tag is. `tag` is None for what does not exist."""
    return tag is not None and (tag in tags or "*" in tags)


def versions(if_match: str | None, id: str) -> list[str] | None:
    """The versions of a resource that If-Match admits, by strong comparison; None admits every one."""
    if if_match is None or if_match.strip(" \t") == "*":
        return None
    prefix = f'"{id}.'
    return [each[len(prefix) : -1] for each in _listed(if_match) if each.startswith(prefix)]
