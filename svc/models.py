"""What goes in and what comes out: JSON, ids and text as they are accepted, and the shape of every answer."""

import json
import re
from decimal import Decimal
from typing import Annotated, Any, Literal, NoReturn

from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from pydantic_extra_types.ulid import ULID

from svc import settings

MAX_DEPTH = 100
MAX_VERSION = 2**31 - 1
ULID_PATTERN = "^[0-7][0-9A-HJKMNP-TV-Z]{25}$"
APPLICATION_ID = "01K0M2Z7Q4V5W6X7Y8Z9A0B1C2"
CONFIGURATION_ID = "01K0M30A1B2C3D4E5F6G7H8J9K"


def parse(body: bytes) -> Any:
    """The JSON value of a request body: UTF-8 (RFC 8259, section 8.1), a byte order mark is ignored.

    Raises json.JSONDecodeError also for JSON that would not come back as it was sent: a name twice in one object, NaN
    and the infinities, numbers beyond a double, integers of more than 4,300 digits (sys.get_int_max_str_digits).
    """
    try:
        return _decoder.decode(body.decode("utf-8-sig"))
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        _refuse("The body is not UTF-8")
    except RecursionError:
        _refuse("The body is nested too deep")
    except ValueError:
        _refuse("An integer has more than 4300 digits")


def _refuse(reason: str) -> NoReturn:
    raise json.JSONDecodeError(reason, "", 0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        _refuse("A name stands twice in one object")
    return members


def _double(literal: str) -> float:
    number = float(literal)
    if number in (float("inf"), float("-inf")):
        _refuse("A number is beyond the range of a double")
    return number


_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_double, parse_constant=lambda name: _refuse(f"{name} is not JSON")
)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_is_ulid = re.compile(ULID_PATTERN).fullmatch
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_EXPONENT = re.compile(r"\de[+-]\d")
_STRING_OR_EXPONENT = re.compile(r'"(?:[^"\\]++|\\.)*+"|-?[\d.]+e[+-]\d+')


def _in_full(text: str, limit: int) -> str:
    """The same JSON without exponents. Stops as soon as it is larger than the limit: 1e308 has 311 characters."""
    size = len(text)

    def write(found: re.Match[str]) -> str:
        nonlocal size
        if found[0].startswith('"'):
            return found[0]
        number = f"{Decimal(found[0]):f}"
        number = number if "." in number else number + ".0"
        size += len(number) - len(found[0])
        if size > limit:
            raise _too_large(limit)
        return number

    return _STRING_OR_EXPONENT.sub(write, text)


def _too_large(limit: int) -> PydanticCustomError:
    return PydanticCustomError("too_large", f"Document should have at most {limit} bytes with its numbers in full")


def _document(config: dict[str, Any]) -> str:
    """The JSON text to store: as PostgreSQL will print it, white space apart.

    jsonb prints 1e+23 as an integer, which some clients then read as another number; written 100000000000000000000000.0
    it stays the double that was sent. That makes a document larger, so its size counts as it is stored.
    """
    level, depth = [config], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise PydanticCustomError("too_deep", f"Document should be nested at most {MAX_DEPTH} deep")
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) is dict or type(child) is list
        ]
    limit = settings.load().max_body_bytes
    text = _encode(config)
    if "\\u0000" in text and _NUL.search(text):
        raise PydanticCustomError("nul", "Document should not contain U+0000")
    if ("e+" in text or "e-" in text) and _EXPONENT.search(text):
        text = _in_full(text, limit)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise PydanticCustomError("surrogate", "Document should not contain an unpaired surrogate") from None
    if size > limit:
        raise _too_large(limit)
    return text


def parse_document(text: str, loc: tuple[str, ...]) -> str:
    """The JSON text of an object that came outside a body. Raises RequestValidationError that names its place."""
    try:
        return _documents.validate_python(parse(text.encode()))
    except json.JSONDecodeError as error:
        found = {"loc": loc, "msg": "JSON decode error", "type": "json_invalid", "ctx": {"error": error.msg}}
        raise RequestValidationError([found]) from None
    except ValidationError as error:
        raise RequestValidationError([{**each, "loc": loc} for each in error.errors()]) from None


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "String should not contain U+0000")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise PydanticCustomError("blank", "String should not be blank")
    return _no_nul(text)


def ulid(value: Any) -> str:
    """The same value. Raises PydanticCustomError if it is no id as the service writes them."""
    # python-ulid takes integers too, and raises OverflowError for some of them.
    if not isinstance(value, str) or not _is_ulid(value):
        raise PydanticCustomError("ulid", "Input should be a ULID: 26 characters, upper case")
    return value


# One AfterValidator each: pydantic 2.11 keeps only the last where a field has a Field of its own besides.
Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_not_blank)]
Comments = Annotated[str, Field(max_length=1024), AfterValidator(_no_nul)]
Document = Annotated[dict[str, Any], AfterValidator(_document), PlainSerializer(lambda text: text)]
_documents = TypeAdapter(Document)
Id = Annotated[str, BeforeValidator(ulid), WithJsonSchema({"type": "string", "pattern": ULID_PATTERN})]
Ulid = Annotated[
    ULID,
    BeforeValidator(ulid),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": ULID_PATTERN, "examples": [APPLICATION_ID]}),
]


def _drop_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


# A field that may be missing but not null: model_fields_set tells whether it was there.
ABSENT: Any = Field(default=None, json_schema_extra=_drop_default)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ApplicationCreate(_Strict):
    name: Name = Field(examples=["billing"])
    comments: Comments | None = Field(None, examples=["Invoices and payments"])


class ApplicationUpdate(_Strict):
    name: Name = ABSENT
    comments: Comments | None = ABSENT


class ConfigurationCreate(_Strict):
    application_id: Ulid
    name: Name = Field(examples=["production"])
    comments: Comments | None = Field(None, examples=["Reviewed every quarter"])
    config: Document = Field(examples=[{"database": {"host": "db1.internal", "port": 5432}}])


class ConfigurationUpdate(_Strict):
    name: Name = ABSENT
    comments: Comments | None = ABSENT
    config: Document = ABSENT


class Application(_Strict):
    id: Ulid
    name: Name = Field(examples=["billing"])
    comments: Comments | None
    configuration_ids: list[Ulid]
    version: int = Field(ge=1)
    created_at: AwareDatetime
    updated_at: AwareDatetime


class Configuration(_Strict):
    id: Ulid = Field(examples=[CONFIGURATION_ID])
    application_id: Ulid
    name: Name = Field(examples=["production"])
    comments: Comments | None
    config: dict[str, Any] = Field(examples=[{"database": {"host": "db1.internal", "port": 5432}}])
    version: int = Field(ge=1)
    created_at: AwareDatetime
    updated_at: AwareDatetime


class ConfigurationVersion(_Strict):
    configuration_id: Ulid = Field(examples=[CONFIGURATION_ID])
    version: int = Field(ge=1)
    operation: Literal["create", "update", "delete"]
    application_id: Ulid
    name: Name = Field(examples=["production"])
    comments: Comments | None
    config: dict[str, Any] = Field(examples=[{"database": {"host": "db1.internal", "port": 5432}}])
    recorded_at: AwareDatetime


class FieldError(_Strict):
    loc: list[str | int] = Field(examples=[["body", "name"]])
    msg: str = Field(examples=["Field required"])
    type: str = Field(examples=["missing"])


class Problem(_Strict):
    """RFC 9457."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["There is no application with this id."])


class PreconditionProblem(Problem):
    version: int = Field(description="The version that is stored", examples=[7])


class ValidationProblem(Problem):
    errors: list[FieldError]


class Pool(_Strict):
    busy: int
    idle: int
    limit: int
    queued: int


class Health(_Strict):
    status: str = Field(examples=["ok"])
    schema_version: int = Field(examples=[4])
    pool: Pool
    waiters: int
