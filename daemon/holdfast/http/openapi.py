"""The OpenAPI 3.1 document of the HTTP interface, made from the declarations beside the handlers.

Imported when somebody asks for it: neither start nor the other commands pay for it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec

import holdfast
from holdfast.errors import (
    BadRequest,
    Forbidden,
    HoldfastError,
    RequestTimeout,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
)
from holdfast.http.guard import OPEN_PATHS
from holdfast.http.problem import GUESSING_RETRY_AFTER_S, PROBLEM_JSON, RETRY_AFTER_S, Problem
from holdfast.http.reply import JSON
from holdfast.http.request import PATCH_TYPE
from holdfast.http.routes import RECORDS, declared
from holdfast.http.routes.answers import Refusal
from holdfast.http.routes.kinds import Paths
from holdfast.http.routes.records import CUSTOM_PATHS
from holdfast.http.routes.route import Body, Field, Outcome, Route, text_of
from holdfast.ops import Answer
from holdfast.settings import LimitSettings

VERSION = "3.1.0"

DESCRIPTION = """\
Holdfast keeps a chatbot's state. What it has acknowledged is on disk.

**Where.** On the unix socket `holdfast.sock` in the data directory, where the file's permissions are the credential, and
on loopback TCP, where every path but `/healthz` and `/readyz` needs `Authorization: Bearer TOKEN`. The first token is in
the file `token` of the data directory; `holdfast token new` makes others.

**Records** have a version, sent as `ETag`. `If-Match` and `If-None-Match: *` make a change conditional. An id stands
percent-encoded in the path. HEAD works wherever GET does. An unknown query parameter is refused.

**Errors** are `application/problem+json` (RFC 9457) with a stable `code`; `detail` says what was expected, what was found
and what to do. Nothing was changed then. No input, however odd, gets a 5xx for being odd.

**Numbers** are kept as they were sent: integers to 64 bits and doubles, money as exact decimals. What JSON cannot keep
exactly is refused with `invalid_record`.
"""

TAGS = {
    "sessions": "The state of a chat; a session that is idle for longer than its ttl expires.",
    "orders": "Orders and their completion, which the sales figures count.",
    "users": "User profiles.",
    "collections": "Records of any other kind, under names of your own.",
    "conversations": "What is said, message by message; it is never changed, and let go in time.",
    "escalations": "Customers who wait for a human.",
    "people": "What concerns one person, a phone or user id.",
    "batch": "Many ops in one request.",
    "stats": "Sales figures, and how much there is.",
    "events": "Every change as it becomes durable.",
    "export": "All data, as files.",
    "admin": "What operators ask.",
    "service": "Health, metrics, and this document.",
}

_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "A collection; it comes into being with its first record.",
    "schema": {"type": "string", "pattern": "^[a-z][a-z0-9_-]{0,63}$"},
    "example": "notes",
}

DETAILS = {
    "bad_request": "unknown query parameter 'colour'; this path takes none",
    "invalid_json": "not JSON: JSON is malformed: expected ':' (byte 4)",
    "unauthorized": "expected Authorization: Bearer TOKEN with a token of `holdfast token`",
    "forbidden": "this token may read only; use one made without --read-only",
    "not_found": "no session '573009999999'",
    "request_timeout": "the body did not arrive within limits.body_timeout; send it faster",
    "conflict": "order '1001' is completed; a closed order is not changed any more",
    "gone": "event 2 is no longer in the journal, which begins with 118; read the present state, then go on after event 117",
    "version_mismatch": "'573001234567' has version 1, but if_version is 7; read it again",
    "too_large": "a record may have 1048576 bytes, this one has 1048601",
    "unsupported_media_type": "expected Content-Type: application/json in UTF-8, found 'text/plain'",
    "invalid_record": "odooOrderId is 7, but the record's id is '1001'; leave it out or make them equal",
    "invalid_settings": "sessions.ttl: expected a duration such as 500ms, 300s, 5m, 24h, 90d, found 'soon'",
    "leased": "session '573001234567' is leased until 2026-11-21T06:00:30.000Z; wait, or write with its generation",
    "too_many_requests": "too many requests without a known token from this address; wait a minute",
    "internal": "an error inside Holdfast; the log has it as request.failed",
    "unavailable": "starting: the data is being loaded; try again soon",
    "storage_full": "no room to write chat_sessions.json: No space left on device; free space, writes resume by themselves",
}
"""Of each code, what a reply says; the tests provoke them."""

_ID_CHARS_MAX = LimitSettings().id_chars

_REFUSAL_HEADERS = {
    401: {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}, "example": 'Bearer realm="holdfast"'}},
    429: {"Retry-After": {"required": True, "schema": {"type": "integer"}, "example": GUESSING_RETRY_AFTER_S}},
    503: {"Retry-After": {"required": True, "schema": {"type": "integer"}, "example": RETRY_AFTER_S}},
}

_MONEY = {
    "description": "An exact amount of 0 or more, as a number or as text.",
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^[0-9]{1,24}(\.[0-9]{1,12})?$"},
    ],
}

_EXTRA = {"gone": {"oldest_seq": 118}}
"""What the example of a code has beside its detail."""

_HEADER_TOO_LARGE = "a request header may have 16384 bytes, this one has more"

_Schema = dict[str, Any]
_Refusals = dict[int, list[type[HoldfastError]]]


@cache
def document() -> dict[str, Any]:
    """The whole document, as JSON values; made once, and not to be changed."""
    return _Builder().document()


class _Builder:
    """One making of the document: what several routes have in common is collected in ``components``."""

    def __init__(self) -> None:
        self._routes = list(declared())
        types: list[Any] = [Answer, Refusal, Problem]
        for _, _, route in self._routes:
            types += [route.body.type] if route.body else []
            types += [outcome.type for outcome in route.outcomes if outcome.type is not None]
            types += [field.type for field in (*route.query, *route.headers)]
            types += [field.type for outcome in route.outcomes for field in outcome.headers]
        schemas, self._schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
        self._types = types
        self._schema_of = {id(type): _readable(schema) for type, schema in zip(types, schemas, strict=True)}
        self._path_parameters: dict[str, _Schema] = {}
        self._parameters: dict[str, tuple[Field, _Schema]] = {}
        self._responses: dict[str, _Schema] = {}

    def document(self) -> dict[str, Any]:
        paths: dict[str, dict[str, Any]] = {}
        for path, method, route in self._routes:
            operations = paths.setdefault(path, {})
            names = re.findall(r"{(\w+)}", path)
            if names:
                operations["parameters"] = [self._path_parameter(path, name) for name in names]
            operations[method.lower()] = self._operation(path, method, route)
        used = {
            tag for operations in paths.values() for one in operations.values() if "tags" in one for tag in one["tags"]
        }
        return {
            "openapi": VERSION,
            "info": {
                "title": "Holdfast",
                "version": holdfast.__version__,
                "summary": "Keeps the sessions, orders, conversations and sales figures of chat bots.",
                "description": DESCRIPTION,
                "license": {"name": "MIT", "identifier": "MIT"},
            },
            "servers": [
                {
                    "url": "http://{host}:{port}",
                    "description": "Loopback TCP, as the setting `listen` says. On the unix socket: http://localhost.",
                    "variables": {"host": {"default": "127.0.0.1"}, "port": {"default": "8765"}},
                }
            ],
            "security": [{"bearer": []}],
            "tags": [{"name": name, "description": about} for name, about in TAGS.items() if name in used],
            "paths": paths,
            "components": {
                "securitySchemes": {
                    "bearer": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "A token, over TCP only; `holdfast token` says where the first one is.",
                    }
                },
                "parameters": self._path_parameters | {key: schema for key, (_, schema) in self._parameters.items()},
                "responses": self._responses,
                "schemas": self._described_schemas(),
            },
        }

    def _operation(self, path: str, method: str, route: Route[Any]) -> dict[str, Any]:
        summary, rest = _summary_of(route.about)
        is_open = _is_open(path)
        operation: dict[str, Any] = {"operationId": route.name, "tags": [_tag(path)], "summary": summary}
        if rest:
            operation["description"] = rest
        parameters = [self._parameter("query", field) for field in route.query]
        parameters += [self._parameter("header", field) for field in route.headers]
        if parameters:
            operation["parameters"] = parameters
        if route.body:
            operation["requestBody"] = self._request_body(route.body, method)
        if is_open:
            operation["security"] = []
        responses = {str(outcome.status): self._answer(outcome) for outcome in route.outcomes}
        for status, kinds in sorted(_refusals(route, is_open).items()):
            shared = self._refusal(status, kinds)
            # /readyz answers 503 in a form of its own, and the connection limit in this one.
            responses[str(status)] = (
                _either(responses[str(status)], self._responses[shared])
                if (str(status) in responses)
                else _reference("responses", shared)
            )
        operation["responses"] = dict(sorted(responses.items()))
        return operation

    def _path_parameter(self, path: str, name: str) -> _Schema:
        key, schema = ("name", _NAME) if name == "name" else _id_of(RECORDS.get(_tag(path), CUSTOM_PATHS))
        self._path_parameters[key] = schema
        return _reference("parameters", key)

    def _parameter(self, where: str, field: Field) -> _Schema:
        key, number = field.name, 1
        while key in _PATH_KEYS or (key in self._parameters and self._parameters[key][0] is not field):
            number += 1
            key = f"{field.name}.{number}"
        schema: _Schema = {
            "name": field.name,
            "in": where,
            "description": field.about,
            "schema": self._schema_of[id(field.type)],
        }
        if field.example is not None:
            schema["example"] = _value_of(field)
        self._parameters[key] = field, schema
        return _reference("parameters", key)

    def _request_body(self, body: Body, method: str) -> _Schema:
        media = {"schema": self._schema_of[id(body.type)], "example": body.example}
        media_types = [JSON, PATCH_TYPE] if method == "PATCH" else [JSON]
        content = dict.fromkeys(media_types, media)
        if body.other_type is not None:
            content[body.other_type] = {}
        return {"required": body.is_required, "content": content}

    def _answer(self, outcome: Outcome) -> _Schema:
        answer: _Schema = {"description": outcome.about}
        if outcome.headers:
            answer["headers"] = {field.name: self._header(field) for field in outcome.headers}
        if outcome.type is not None:
            media = {"schema": self._schema_of[id(outcome.type)]}
            if outcome.example is not None:
                media["example"] = outcome.example
            answer["content"] = {outcome.content_type: media}
        return answer

    def _header(self, field: Field) -> _Schema:
        header: _Schema = {"description": field.about, "required": True, "schema": self._schema_of[id(field.type)]}
        if field.example is not None:
            header["example"] = _value_of(field)
        return header

    def _refusal(self, status: int, kinds: Iterable[type[HoldfastError]]) -> str:
        """The name of the response that tells the errors of *kinds*."""
        by_code = {kind.code: kind for kind in kinds}
        name = "-".join(by_code) if status == next(iter(by_code.values())).status else f"{'-'.join(by_code)}-{status}"
        if name not in self._responses:
            self._responses[name] = _refusal_of(status, by_code)
        return name

    def _described_schemas(self) -> dict[str, _Schema]:
        """The schemas of the structs, with what their docstrings say of each field."""
        structs = {
            struct.__name__: struct for type in self._types for struct in _structs(msgspec.inspect.type_info(type))
        }
        described = {}
        for name, schema in self._schemas.items():
            schema = _readable(schema)
            about, fields = _documented(structs[name])
            schema["description"] = about
            for field, text in fields.items():
                if field in schema["properties"]:
                    schema["properties"][field]["description"] = text
            described[name] = schema
        codes = sorted({code for response in self._responses.values() for code in _codes_of(response)})
        described["Problem"]["properties"]["code"]["enum"] = codes
        return described


def _id_of(paths: Paths) -> tuple[str, _Schema]:
    noun = paths.kind.noun
    return f"{noun}_id", {
        "name": "id",
        "in": "path",
        "required": True,
        "description": f"Of the {noun}, percent-encoded; at most `limits.id_chars` ({_ID_CHARS_MAX}) printable characters.",
        "schema": {"type": "string", "minLength": 1, "maxLength": _ID_CHARS_MAX},
        "example": paths.kind.example.id,
    }


_PATH_KEYS = {_id_of(paths)[0] for paths in (*RECORDS.values(), CUSTOM_PATHS)}


def _refusals(route: Route[Any], is_open: bool) -> _Refusals:
    """The errors of *route* by status, with those that every route has."""
    found: _Refusals = {}
    common: tuple[type[HoldfastError], ...] = (BadRequest, Forbidden, RequestTimeout, Unavailable, HoldfastError)
    if not is_open:
        common = (*common, Unauthorized, TooManyRequests)
    for kind in (*common, *route.errors):
        kinds = found.setdefault(kind.status, [])
        if kind not in kinds:
            kinds.append(kind)
    found[HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE] = [TooLarge]
    return found


def _refusal_of(status: int, by_code: Mapping[str, type[HoldfastError]]) -> _Schema:
    examples: dict[str, dict[str, Any]] = {}
    for code, kind in by_code.items():
        detail = _HEADER_TOO_LARGE if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE else DETAILS[code]
        problem = Problem("about:blank", HTTPStatus(status).phrase, status, code, detail, **_EXTRA.get(code, {}))
        about = _markdown(text_of(kind))
        examples[code] = {"description": about, "value": msgspec.to_builtins(problem)}
    response: _Schema = {
        "description": " Or: ".join(example["description"] for example in examples.values()),
        "content": {
            PROBLEM_JSON: {
                "schema": {
                    "allOf": [
                        _reference("schemas", "Problem"),
                        {"properties": {"status": {"const": status}, "code": {"enum": list(by_code)}}},
                    ]
                },
                "examples": examples,
            }
        },
    }
    headers = _REFUSAL_HEADERS.get(status)
    if headers is not None:
        response["headers"] = headers
    return response


def _codes_of(response: _Schema) -> list[str]:
    return list(response["content"][PROBLEM_JSON]["examples"])


def _either(answer: _Schema, refusal: _Schema) -> _Schema:
    """One response for a status that has an answer and a refusal; they differ in their media type."""
    return refusal | answer | {"content": answer.get("content", {}) | refusal["content"]}


def _structs(info: msgspec.inspect.Type) -> Iterable[type[Any]]:
    """The structs that a type consists of."""
    match info:
        case msgspec.inspect.StructType():
            yield info.cls
            for field in info.fields:
                yield from _structs(field.type)
        case msgspec.inspect.UnionType():
            for one in info.types:
                yield from _structs(one)
        case msgspec.inspect.ListType():
            yield from _structs(info.item_type)
        case msgspec.inspect.DictType():
            yield from _structs(info.value_type)
        case msgspec.inspect.Metadata():
            yield from _structs(info.type)


def _documented(struct: type[Any]) -> tuple[str, dict[str, str]]:
    """What the docstring of *struct* says, and what it and those it inherits from say of their fields."""
    fields: dict[str, str] = {}
    for kind in reversed(struct.__mro__[: struct.__mro__.index(msgspec.Struct)]):
        _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            fields[name] = _sentence(_markdown(" ".join(text.split())))
    return _markdown(text_of(struct)), fields


def _readable(schema: Any) -> Any:
    """*schema* as we mean it: money may be a number too, and titles and empty texts that say nothing are left out."""
    if isinstance(schema, list):
        return [_readable(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "decimal":
        return _MONEY
    return {key: _readable(value) for key, value in schema.items() if not (key == "title" and isinstance(value, str))}


def _summary_of(about: str) -> tuple[str, str]:
    """The first sentence of *about*, without its stop, and the rest."""
    first, stop, rest = _markdown(about).partition(". ")
    return (first, _sentence(rest)) if stop else (first.removesuffix("."), "")


def _sentence(text: str) -> str:
    """*text* as it stands alone, not behind a colon."""
    return text[:1].upper() + text[1:]


def _value_of(field: Field) -> Any:
    """The example of *field* as its type has it."""
    return msgspec.convert(field.example, field.type, strict=False)


def _markdown(text: str) -> str:
    """Docstrings quote code with two backticks, the document with one; a line break in a paragraph is none; JSON has
    no None."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.replace("``", "`").replace("None", "null"))


def _tag(path: str) -> str:
    parts = path.split("/")
    return parts[2] if parts[1] == "v1" else "service"


def _is_open(path: str) -> bool:
    return path.split("/")[1:] in OPEN_PATHS


def _reference(section: str, name: str) -> _Schema:
    return {"$ref": f"#/components/{section}/{name}"}
