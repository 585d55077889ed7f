"""The OpenAPI document as tests use it: what it says of an operation, and whether an answer is as it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import jsonschema_rs
import msgspec

from holdfast.http.openapi import document

METHODS = ("get", "put", "patch", "post", "delete")

Schema = dict[str, Any]


class Operation(NamedTuple):
    """One method of one path, with every reference in its own parts resolved."""

    path: str
    method: str
    parameters: list[Schema]
    said: Schema

    @property
    def id(self) -> str:
        return str(self.said["operationId"])

    def target(self, **query: Any) -> str:
        """The path with the examples of its parameters, and the parameters that are required."""
        path = self.path
        for one in self.parameters:
            if one["in"] == "path":
                path = path.replace(f"{{{one['name']}}}", quote(str(one["example"]), safe=""))
            elif one["in"] == "query" and one.get("required"):
                query.setdefault(one["name"], one["example"])
        sent = {name: str(value).lower() if isinstance(value, bool) else value for name, value in query.items()}
        return f"{path}?{urlencode(sent)}" if sent else path

    def media(self) -> Schema:
        """The JSON body it takes: its schema and example; empty when it takes none."""
        body = self.said.get("requestBody")
        return body["content"]["application/json"] if body else {}

    def response(self, status: int) -> Schema:
        responses = self.said["responses"]
        assert str(status) in responses, f"{self.method} {self.path} answered {status}, documented: {list(responses)}"
        return resolved(responses[str(status)])


@cache
def whole() -> Schema:
    """The document."""
    return document()


def resolved(schema: Schema) -> Schema:
    """*schema*, or what it refers to."""
    if "$ref" not in schema:
        return schema
    found: Any = whole()
    for part in schema["$ref"].split("/")[1:]:
        found = found[part]
    return resolved(found)


def operations() -> Iterator[Operation]:
    """All of them, in the order of the document."""
    for path, item in whole()["paths"].items():
        for method in METHODS:
            if method in item:
                said = item[method]
                parameters = [resolved(one) for one in [*item.get("parameters", []), *said.get("parameters", [])]]
                yield Operation(path, method.upper(), parameters, said)


def operation(id: str) -> Operation:
    """The one with this id."""
    return next(one for one in operations() if one.id == id)


def check_value(schema: Schema, value: Any, what: str) -> None:
    """Fail when *value* is not as *schema* says."""
    validator = jsonschema_rs.validator_for({**schema, "components": whole()["components"]}, validate_formats=True)
    errors = [f"{error.instance_path}: {error.message}" for error in validator.iter_errors(value)]
    assert not errors, f"{what}: {errors}"


def check_answer(one: Operation, status: int, headers: Mapping[str, str], body: bytes) -> Schema:
    """Fail when an answer is not documented: its status, media type, headers or body; else what is said of its body."""
    what = f"{one.method} {one.path} {status}"
    response = one.response(status)
    for name, header in response.get("headers", {}).items():
        assert name in headers or not header.get("required"), f"{what} has no {name}"
    content = response.get("content", {})
    if not content:
        assert not body, f"{what} has a body: {body[:200]!r}"
        return {}
    media_type = headers["Content-Type"].partition(";")[0]
    assert media_type in content, f"{what} is {media_type}, documented: {list(content)}"
    media: Schema = content[media_type]
    if media_type == "application/zstd":
        # No text, and no schema says what is in it.
        assert body.startswith(b"\x28\xb5\x2f\xfd"), f"{what} is no zstd"
        return media
    is_json = media_type.endswith("json")
    check_value(media["schema"], msgspec.json.decode(body) if is_json else body.decode(), what)
    return media
