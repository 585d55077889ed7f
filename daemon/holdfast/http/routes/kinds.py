"""What tells one kind of record from another, in its ops and in its paths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from holdfast.http.reply import Reply
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.fields import CURSOR, LIMIT, SINCE, UNTIL
from holdfast.http.routes.route import Field, Methods


class Example(NamedTuple):
    """A record of one kind, as the document shows it.

    Attributes:
        key: what is added to *value* when it is stored.
    """

    id: str
    key: dict[str, Any]
    value: dict[str, Any]
    patch: dict[str, Any]


class Kind(NamedTuple):
    """Sessions, orders, users, the records of custom collections, or what has paths of its own.

    Attributes:
        put, patch, delete: its ops; None where it has no such one.
        list_query: the parameters of its lists.
        takes_lease: it is written under a lease, if there is one, and has a ttl of its own.
        is_custom: its ops name the collection as well.
    """

    noun: str
    put: Any
    patch: Any
    delete: Any
    example: Example
    list_query: tuple[Field, ...] = (LIMIT, CURSOR, SINCE, UNTIL)
    takes_lease: bool = False
    is_custom: bool = False


class Place(NamedTuple):
    """Where a request points: a record, or with an empty *id* a collection."""

    kind: Kind
    collection: str
    id: str

    def names(self) -> dict[str, str]:
        """The op's fields that say where."""
        return {"id": self.id, "collection": self.collection} if self.kind.is_custom else {"id": self.id}


RecordHandler = Callable[[Backend, Request, Place], Awaitable[Reply]]


class Paths(NamedTuple):
    """The routes of one kind of record: of its collection, of a record, and of what may follow a record's id."""

    kind: Kind
    collection: Methods[RecordHandler]
    record: Methods[RecordHandler]
    actions: Mapping[str, Methods[RecordHandler]]
