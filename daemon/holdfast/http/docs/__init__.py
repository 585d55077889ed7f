"""The readable page at ``/docs``, rendered from the same document that ``/openapi.json`` serves."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import msgspec
from jinja2 import Environment, StrictUndefined, Template, select_autoescape
from markupsafe import Markup, escape

from holdfast.http.openapi import document
from holdfast.http.problem import PROBLEM_JSON
from holdfast.http.reply import JSON

METHODS = ("get", "put", "patch", "post", "delete")

_Schema = dict[str, Any]


def _packaged(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


_STYLE = _packaged("page.css")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

SECURITY_HEADERS = (
    # No script at all, nothing from elsewhere; the one style sheet is in the page.
    f"Content-Security-Policy: default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'\r\n"
    "X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\n"
)
"""Of the page, each line ending with CRLF."""


class Field(NamedTuple):
    """A row of a table: a parameter, or a key of an object."""

    name: str
    place: str
    type: Markup
    about: str
    is_required: bool


class Answer(NamedTuple):
    """What comes back, with a status that is no error."""

    status: str
    about: str
    type: Markup | None
    content_type: str
    example: str


class Refusal(NamedTuple):
    """An error: a status with its code."""

    status: str
    code: str
    about: str
    example: str


class Operation(NamedTuple):
    """One method of one path.

    Attributes:
        body_type: None when it takes no body.
        errors: by status; each with its codes.
        lines: by how to reach it, a line to paste.
    """

    id: str
    method: str
    path: str
    summary: str
    description: str
    parameters: list[Field]
    body_type: Markup | None
    body_about: str
    body_example: str
    answers: list[Answer]
    errors: list[tuple[str, list[str]]]
    lines: dict[str, str]


class Section(NamedTuple):
    """The operations that belong together."""

    name: str
    about: str
    operations: list[Operation]


class Type(NamedTuple):
    """An object that is sent or answered."""

    name: str
    about: str
    fields: list[Field]


def page(listening: Sequence[str] = (), data_dir: Path = Path("data")) -> bytes:
    """The page, whole; its curl lines speak to a daemon on the addresses *listening*, or on the usual ones."""
    whole = document()
    reader = _Reader(whole, _Curl(listening, data_dir.absolute()))
    rendered = _template().render(
        info=whole["info"],
        style=Markup(_STYLE),
        sections=reader.sections(),
        refusals=reader.refusals(),
        types=reader.types(),
    )
    return rendered.encode()


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=select_autoescape(default=True), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["prose"] = _prose
    return environment.from_string(_packaged("page.html.j2"))


class _Curl:
    """Writes lines to paste into a shell, for a daemon at these addresses."""

    def __init__(self, listening: Sequence[str], data_dir: Path) -> None:
        unix = [text.removeprefix("unix:") for text in listening if text.startswith("unix:")]
        tcp = [text.removeprefix("tcp:") for text in listening if text.startswith("tcp:")]
        socket = Path(unix[0]).absolute() if unix else data_dir / "holdfast.sock"
        self._ways: dict[str, tuple[str, str]] = {}
        if unix or not listening:
            self._ways["unix socket"] = f"curl --unix-socket {shlex.quote(str(socket))}", "http://localhost"
        if tcp or not listening:
            token = shlex.quote(str(data_dir / "token"))
            self._ways["TCP"] = (
                f'curl -H "Authorization: Bearer $(cat {token})"',
                f"http://{tcp[0] if tcp else '127.0.0.1:8765'}",
            )

    def lines(self, method: str, target: str, example: Any) -> dict[str, str]:
        """By way: the request *method* of *target*, with *example* as its body unless that is None."""
        options = "" if method == "get" else f" -X {method.upper()}"
        if example is not None:
            options += f" -H 'Content-Type: application/json' \\\n    -d {shlex.quote(_compact(example))}"
        return {
            way: f"{command}{options} \\\n    {shlex.quote(origin + target)}"
            for way, (command, origin) in self._ways.items()
        }


class _Reader:
    """Reads the document as the page shows it."""

    def __init__(self, whole: dict[str, Any], curl: _Curl) -> None:
        self._whole = whole
        self._curl = curl

    def sections(self) -> list[Section]:
        operations: dict[str, list[Operation]] = {tag["name"]: [] for tag in self._whole["tags"]}
        for path, item in self._whole["paths"].items():
            shared = item.get("parameters", [])
            for method in METHODS:
                if method in item:
                    operations[item[method]["tags"][0]].append(self._operation(path, method, item[method], shared))
        return [Section(tag["name"], tag["description"], operations[tag["name"]]) for tag in self._whole["tags"]]

    def refusals(self) -> list[Refusal]:
        """Every error there is, once, by status."""
        found = {}
        for response in self._whole["components"]["responses"].values():
            for status, code, example in _problems(response):
                found[status, code] = Refusal(status, code, example["description"], _indented(example["value"]))
        return [found[key] for key in sorted(found)]

    def types(self) -> list[Type]:
        schemas = self._whole["components"]["schemas"]
        return [
            Type(name, schema.get("description", ""), list(self._fields(schema)))
            for name, schema in sorted(schemas.items())
        ]

    def _operation(self, path: str, method: str, operation: _Schema, shared: list[_Schema]) -> Operation:
        parameters = [self._resolved(one) for one in [*shared, *operation.get("parameters", [])]]
        body = operation.get("requestBody")
        media = body["content"][JSON] if body else {"schema": {}, "example": None}
        answers, errors = [], []
        for status, response in operation["responses"].items():
            response = self._resolved(response)
            for content_type, content in response.get("content", {"": None}).items():
                if content_type == PROBLEM_JSON:
                    errors.append((status, [code for _, code, _ in _problems(response)]))
                else:
                    answers.append(_answer(status, response["description"], content_type, content))
        target = path
        for one in parameters:
            if one["in"] == "path":
                target = target.replace(f"{{{one['name']}}}", quote(one["example"], safe=""))
        needed = {one["name"]: one["example"] for one in parameters if one["in"] == "query" and one.get("required")}
        if needed:
            target += f"?{urlencode(needed)}"
        return Operation(
            operation["operationId"],
            method.upper(),
            path,
            operation["summary"],
            operation.get("description", ""),
            [
                Field(one["name"], one["in"], _type(one["schema"]), one["description"], one.get("required", False))
                for one in parameters
            ],
            _type(media["schema"]) if body else None,
            "" if not body or body["required"] else "May be left out.",
            _indented(media["example"]) if body else "",
            answers,
            errors,
            self._curl.lines(method, target, media["example"]),
        )

    def _fields(self, schema: _Schema) -> Iterator[Field]:
        required = schema.get("required", [])
        for name, inner in schema.get("properties", {}).items():
            yield Field(name, "", _type(inner), inner.get("description", ""), name in required)

    def _resolved(self, schema: _Schema) -> _Schema:
        if "$ref" not in schema:
            return schema
        _, _, section, name = schema["$ref"].split("/")
        found: _Schema = self._whole["components"][section][name]
        return found


def _answer(status: str, about: str, content_type: str, content: _Schema | None) -> Answer:
    if content is None:
        return Answer(status, about, None, "", "")
    example = content.get("example", "")
    return Answer(
        status,
        about,
        _type(content["schema"]),
        content_type,
        example if isinstance(example, str) else _indented(example),
    )


def _problems(response: _Schema) -> Iterator[tuple[str, str, Any]]:
    """Status, code and example of each error that *response* tells."""
    for code, example in response["content"][PROBLEM_JSON]["examples"].items():
        yield str(example["value"]["status"]), code, example


def _type(schema: _Schema) -> Markup:
    """What *schema* asks for in a few words; objects that have a name are links."""
    match schema:
        case {"$ref": reference}:
            name = escape(reference.rpartition("/")[2])
            return Markup('<a href="#{0}">{0}</a>').format(name)
        case {"const": value} | {"enum": [value]}:
            return Markup("<code>{}</code>").format(_compact(value))
        case {"enum": values}:
            return Markup(" or ").join(Markup("<code>{}</code>").format(_compact(value)) for value in values)
        case {"anyOf": parts}:
            return Markup(" or ").join(dict.fromkeys(_type(part) for part in parts))
        case {"type": "array", **rest}:
            return Markup("array of {}").format(_type(rest["items"])) if rest.get("items") else Markup("array")
        case {"type": "object", "additionalProperties": dict() as inner} if inner:
            return Markup("object of {}").format(_type(inner))
        case {"type": kind, **rest}:
            return escape(kind + _bounds(rest))
        case _:
            return Markup("anything")


def _bounds(schema: _Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None:
        return f" {low}…{high}" if high is not None else f" ≥ {low}"
    if "format" in schema:
        return f" ({schema['format']})"
    return ""


def _prose(text: str) -> Markup:
    """The little Markdown that descriptions use: paragraphs, code, bold, emphasis."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        marked = str(escape(paragraph))
        marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", marked)
        marked = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", marked)
        marked = re.sub(r"(?<![\w*`>])\*([\w.]+)\*(?![\w*])", r"<em>\1</em>", marked)
        paragraphs.append(f"<p>{marked}</p>")
    return Markup("\n".join(paragraphs))


def _compact(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _indented(value: Any) -> str:
    """JSON over several lines where it would be a long one."""
    line = msgspec.json.format(msgspec.json.encode(value), indent=0).decode()
    return line if len(line) <= 80 else msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
