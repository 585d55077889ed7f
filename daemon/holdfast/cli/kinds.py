"""The kinds of records, as commands name them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

import click

from holdfast.cli.arguments import TEXT
from holdfast.cli.completion import complete_id


class Kind(NamedTuple):
    """What tells the commands of one kind of record from those of another.

    Attributes:
        command: as typed after ``holdfast``.
        path: of its collection.
        collection: as the daemon names it.
        state_field, time_fields: of the value, shown in the list; the first time that is there counts.
        example: an id with a value, for the help.
    """

    noun: str
    command: str
    path: str
    collection: str
    state_field: str | None = None
    time_fields: tuple[str, ...] = ()
    example: tuple[str, str] = ("573001234567", '{"name": "Ana"}')

    @property
    def is_session(self) -> bool:
        """It has a ttl of its own, and leases."""
        return self.noun == "session"

    @property
    def is_custom(self) -> bool:
        """The collection is one of those that clients name."""
        return self.noun == "record"

    def path_of(self, id: str, *action: str) -> str:
        """Of a record, or of what can be done with it."""
        return "/".join([self.path, path_segment(id), *action])

    def op(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        """An op of a batch on a record of this kind."""
        place = {"collection": self.collection} if self.is_custom else {}
        return {"op": f"{self.noun}.{verb}", **place, **fields}


SESSIONS = Kind(
    "session",
    "sessions",
    "/v1/sessions",
    "sessions",
    "currentState",
    ("lastActivity",),
    ("573001234567", '{"currentState": "catalog"}'),
)
ORDERS = Kind(
    "order",
    "orders",
    "/v1/orders",
    "orders",
    "status",
    ("completedAt", "cancelledAt", "updatedAt", "createdAt"),
    ("1001", '{"recipientPhone": "573001234567", "productType": "music"}'),
)
USERS = Kind("user", "users", "/v1/users", "users")
CONVERSATIONS = Kind("conversation", "conversations", "/v1/conversations", "conversations")
ESCALATIONS = Kind("escalation", "escalations", "/v1/escalations", "escalations")


def custom(collection: str) -> Kind:
    """The kind of the records in *collection*."""
    path = f"/v1/collections/{path_segment(collection)}"
    return Kind("record", f"collections {collection}", path, collection, example=("n1", '{"text": "hello"}'))


def path_segment(text: str) -> str:
    """*text* as it may stand between two slashes: a proxy would resolve a ``..``."""
    return quote(text, safe="") if text not in (".", "..") else "%2E" * len(text)


def id_argument(kind: Kind, **more: Any) -> Callable[..., Any]:
    """The argument that names a record, or with ``nargs`` several."""
    return click.argument("id", type=TEXT, metavar="ID", shell_complete=complete_id(kind.path), **more)
