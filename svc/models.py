"""What goes in and what comes out: JSON, ids and text as they are accepted, and the shape of every answer."""

import json
import re
from collections import Counter, namedtuple
from math import isinf, log10
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError
from pydantic_extra_types.ulid import ULID

MAX_DOCUMENT_BYTES = 8 * 1024**2  # as PostgreSQL prints it, and checks it too
MAX_VERSION = 2**31 - 1
MAX_POSITION = 2**63 - 1
MAX_CONTAINS = 2048
ULID_PATTERN = "^[0-7][0-9A-HJKMNP-TV-Z]{25}$"
APPLICATION_ID = "01K0M2Z7Q4V5W6X7Y8Z9A0B1C2"
CONFIGURATION_ID = "01K0M30A1B2C3D4E5F6G7H8J9K"
READ_ONLY = {"id", "application_id", "configuration_ids", "version", "created_at", "updated_at"}


# --- JSON ---


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError also for JSON that would not come back as it was sent: a key twice in one object, NaN and
    infinities, numbers beyond a double, integers of more than 4,300 digits. Raises RecursionError if it is thousands of
    levels deep. PostgreSQL refuses unpaired surrogates, U+0000 and depth over 100.
    """
    global _digits
    _digits = 0.0
    return _decoder.decode(text)


def _unique_keys(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(members)) < len(members):
        [(key, _)] = Counter(key for key, _ in members).most_common(1)
        raise ValueError(f"Duplicate key {json.dumps(key[:100])} in an object")
    return unique


def _number(literal: str) -> float | int:
    """jsonb prints 1e23 as 1 and 23 zeros, which as an integer is another number: store the exact value of the double.

    Every double from 1e16 on is whole. Raises ValueError for 1e400, and if together they have more digits than a
    document may: 1 MB of 1e308 has 53 MB, and no other request is served while they are written out.
    """
    global _digits
    number = float(literal)
    if abs(number) < 1e16:
        return number
    if isinf(number):
        raise ValueError("A number is beyond the range of a double")
    _digits += log10(abs(number))
    if _digits > MAX_DOCUMENT_BYTES:
        raise ValueError(f"The large numbers have more than {MAX_DOCUMENT_BYTES} digits together")
    return int(number)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


_digits = 0.0  # how many the large numbers have in the text that is being parsed
_decoder = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_number, parse_constant=_refuse)


def _parse_contains(text: str) -> Any:
    if len(text.encode()) > MAX_CONTAINS:
        raise PydanticCustomError("too_long", f"Document should have at most {MAX_CONTAINS} bytes")
    return parse_json(text)


# --- Text and ids ---


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "String should not contain U+0000")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "String should not be blank")
    return _no_nul(text)


def _check_ulid(value: Any) -> str:
    # python-ulid takes integers too, and raises OverflowError for some of them.
    if not isinstance(value, str) or not re.fullmatch(ULID_PATTERN, value):
        raise PydanticCustomError("ulid", "Input should be a ULID: 26 characters, upper case")
    return value


# One AfterValidator each: pydantic 2.11 keeps only the last where a field has a Field of its own besides.
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_not_blank)]
Comments = Annotated[str, Field(max_length=1024), AfterValidator(_no_nul)]
Contains = Annotated[dict[str, Any], BeforeValidator(_parse_contains), WithJsonSchema({"type": "string"})]
Id = Annotated[
    ULID,
    BeforeValidator(_check_ulid),
    AfterValidator(str),
    WithJsonSchema({"type": "string", "pattern": ULID_PATTERN, "examples": [APPLICATION_ID]}),
]


# --- Requests ---

# Parts of the examples.
COMMENTS = {"comments": "Reviewed every quarter"}
CONFIG = {"config": {"database": {"host": "db1.internal", "port": 5432}}}


class _Strict(BaseModel, extra="forbid"):
    """A field that it does not know is refused."""


# A field that may be missing but not null: model_fields_set tells whether it was there.
ABSENT: Any = Field(default=None, json_schema_extra=lambda schema: schema.pop("default"))


# Of several examples /docs fills in the first, which does no harm when it is sent, and the page at / shows the last.


class ApplicationCreate(_Strict, json_schema_extra={"examples": [{"name": "shop"}]}):
    name: Name
    comments: Comments | None = None


class ApplicationUpdate(_Strict, json_schema_extra={"examples": [COMMENTS]}):
    name: Name = ABSENT
    comments: Comments | None = ABSENT


class ConfigurationPut(_Strict, json_schema_extra={"examples": [COMMENTS, CONFIG]}):
    comments: Comments | None = ABSENT
    config: dict[str, Any] = ABSENT


class ConfigurationUpdate(ConfigurationPut):
    name: Name = ABSENT


class ConfigurationCreate(
    _Strict, json_schema_extra={"examples": [{"application_id": APPLICATION_ID, "name": "staging", **CONFIG}]}
):
    application_id: Id
    name: Name
    comments: Comments | None = None
    config: dict[str, Any]


class Page(_Strict):
    limit: int | None = Field(None, ge=1, le=1000, description="At most so many. The Link header names the next page.")


class ApplicationFilter(Page):
    after: Id | None = Field(None, description="Only what comes after this id.")
    name: Name | None = Field(None, description="Only those with exactly this name.")


class NamedFilter(ApplicationFilter):
    contains: Contains | None = Field(None, description="Only those that hold this JSON.", examples=['{"port": 5432}'])


class ConfigurationFilter(NamedFilter):
    application_id: Id | None = Field(None, description="Only those of this application.")


class VersionFilter(Page):
    before: int | None = Field(None, ge=1, le=MAX_VERSION, description="Only what is older than this version.")


class ChangeFilter(_Strict):
    limit: int = Field(100, ge=1, le=1000, description="At most so many. The Link header names the next page.")
    before: int | None = Field(None, ge=1, le=MAX_POSITION, description="Only what comes before this position.")
    application_id: Id | None = Field(None, description="Only those of this application.")


# The ETags in If-Match and in If-None-Match. Empty if there is no such header.
Conditions = namedtuple("Conditions", "if_match if_none_match")


# --- Answers ---


class _Versioned(_Strict):
    comments: Comments | None
    version: int = Field(ge=1)
    created_at: AwareDatetime
    updated_at: AwareDatetime


class Application(_Versioned):
    id: Id
    name: Name = Field(examples=["shop"])
    configuration_ids: list[Id]


class Configuration(_Versioned):
    id: Id = Field(examples=[CONFIGURATION_ID])
    application_id: Id
    name: Name = Field(examples=["production"])
    config: dict[str, Any] = Field(examples=[CONFIG["config"]])


class Change(_Strict):
    """Who changed what. `actor` is token:NAME, anonymous, or database:USER for SQL by hand."""

    configuration_id: Id = Field(examples=[CONFIGURATION_ID])
    application_id: Id
    name: Name = Field(examples=["production"])
    version: int = Field(ge=1)
    operation: Literal["create", "update", "delete"]
    actor: str = Field(examples=["token:deploy"])
    recorded_at: AwareDatetime


class ChangeEntry(Change):
    position: int = Field(ge=1)


class ConfigurationVersion(Change):
    """A version whose operation is delete has no config: the document is in the version before it."""

    comments: Comments | None
    config: dict[str, Any] | None = Field(examples=[CONFIG["config"]])


class FieldError(_Strict):
    loc: list[str | int]
    msg: str
    type: str


class Problem(_Strict):
    """RFC 9457. A 400 has `errors`, at most 20."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] = ABSENT
