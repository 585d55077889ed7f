"""What is declared of a route, beside its handler: what it takes, what it answers, what it refuses.

Dispatching, reading the query and the document at ``/openapi.json`` all follow the declaration.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from holdfast.errors import HoldfastError
from holdfast.http.reply import JSON, Reply

H = TypeVar("H", bound=Callable[..., Awaitable[Reply]])
H_co = TypeVar("H_co", bound=Callable[..., Awaitable[Reply]], covariant=True)


class Field(NamedTuple):
    """A query parameter or header.

    Attributes:
        type: of its value, with the constraints that hold for it.
        example: as it is sent; None where a value that fits depends on what went before.
    """

    name: str
    about: str
    type: Any = str
    example: str | None = None


class Body(NamedTuple):
    """What a request carries.

    Attributes:
        type: what it is decoded as.
        example: its JSON value.
        other_type: a media type that it may have instead; then it is no JSON.
    """

    type: Any
    example: Any
    is_required: bool = True
    other_type: str | None = None


class Outcome(NamedTuple):
    """An answer that is no error.

    Attributes:
        type: of its body; None when it has none.
        example: the body's value, or its text when it is not JSON.
    """

    status: int
    about: str
    type: Any = None
    example: Any = None
    headers: tuple[Field, ...] = ()
    content_type: str = JSON


class Route(msgspec.Struct, Generic[H_co], frozen=True, kw_only=True):
    """One method of one path.

    Attributes:
        handler: answers a request for it.
        name: identifies it in the document, and in what is generated from that.
        about: a sentence, then what else a caller should know.
        query: the parameters it takes; any other is refused.
        headers: those it reads, beside the ones that every route has.
        errors: those of its own, beside the ones that every route has.
    """

    handler: H_co
    name: str
    about: str
    query: tuple[Field, ...] = ()
    headers: tuple[Field, ...] = ()
    body: Body | None = None
    outcomes: tuple[Outcome, ...]
    errors: tuple[type[HoldfastError], ...] = ()


Methods = Mapping[str, Route[H]]
"""The routes of one path, by method."""


def route(
    *outcomes: Outcome,
    name: str = "",
    about: str = "",
    query: tuple[Field, ...] = (),
    headers: tuple[Field, ...] = (),
    body: Body | None = None,
    errors: tuple[type[HoldfastError], ...] = (),
) -> Callable[[H], Route[H]]:
    """Declare the function below as the handler of a route.

    Its name and docstring are those of the route, unless *name* and *about* say others.
    """

    def declare(handler: H) -> Route[H]:
        return Route(
            handler=handler,
            name=name or handler.__name__,
            about=about or text_of(handler),
            query=query,
            headers=headers,
            body=body,
            outcomes=outcomes,
            errors=errors,
        )

    return declare


def text_of(documented: Any) -> str:
    """The docstring of *documented* for readers of the document, who do not call it: no Raises, no Attributes."""
    text = inspect.getdoc(documented) or ""
    for section in ("\n\nRaises:", "\n\nAttributes:"):
        text = text.partition(section)[0]
    return text
