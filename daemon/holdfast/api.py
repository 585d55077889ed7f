"""What a program may ask of Holdfast: one set of methods for every way to reach it.

Each method builds an op and hands it to ``_do``. A is what comes back: ``Answer`` where the call waits, an awaitable of
it where the caller awaits. Embedded and remote, waiting and awaiting forms differ only in ``_do`` and in how they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from decimal import Decimal
from typing import Any, Generic, TypeVar

import msgspec
import orjson

from holdfast.errors import InvalidRecord, NotFound
from holdfast.ops import (
    AnyOp,
    Durability,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
    Record,
    RecordDelete,
    RecordPatch,
    RecordPut,
    Seconds,
    SessionDelete,
    SessionLease,
    SessionPatch,
    SessionPut,
    SessionRelease,
    SessionTouch,
    StatsCompletion,
    StatsOrder,
    UserDelete,
    UserPatch,
    UserPut,
)
from holdfast.settings import parse_duration

A = TypeVar("A")

Value = Mapping[str, Any]
"""A JSON object, as Python has it."""

Id = str | int
"""A record's id; numbers stand for their digits."""

Money = Decimal | int | str
"""An exact amount. A float is none: 0.1 is not what it seems."""

Do = Callable[[AnyOp, Durability | None], A]


LIST_PAGE = 1_000
"""Records that a list asks for at once."""

UPDATE_ATTEMPTS = 100
"""More than the workers that any record has at once; who loses as often is in an endless loop."""


class SessionOps(Generic[A]):
    """Changing sessions.

    All take ``durability`` for this call, ``idempotency_key``, and, where a record changes, ``if_version`` (0: only if
    absent) and ``lease`` (the generation under which the caller writes).
    """

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Store *value* whole. ``lastActivity`` is kept when given and set to now when absent."""
        return self._do(
            SessionPut(
                id=id if type(id) is str else text_of(id),
                value=value if type(value) is dict else object_of(value),
                if_version=if_version,
                ttl=ttl,
                lease=lease,
                idempotency_key=idempotency_key,
            ),
            durability,
        )

    def patch(
        self,
        id: Id,
        patch: Value,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Merge *patch* into it (RFC 7396)."""
        op = SessionPatch(
            id=text_of(id),
            value=object_of(patch),
            if_version=if_version,
            ttl=ttl,
            lease=lease,
            idempotency_key=idempotency_key,
        )
        return self._do(op, durability)

    def touch(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        ttl: Seconds | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Set ``lastActivity`` to now."""
        op = SessionTouch(id=text_of(id), if_version=if_version, ttl=ttl, lease=lease, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        lease: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it; NotFound when it is not there."""
        op = SessionDelete(id=text_of(id), if_version=if_version, lease=lease, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def release(
        self, id: Id, generation: int, *, idempotency_key: str | None = None, durability: Durability | None = None
    ) -> A:
        """Give the lease back."""
        return self._do(
            SessionRelease(id=text_of(id), generation=generation, idempotency_key=idempotency_key), durability
        )


class OrderOps(Generic[A]):
    """Changing orders; options as for sessions, without lease."""

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Store *value* whole. The first put of an id counts in the sales figures."""
        op = OrderPut(id=text_of(id), value=object_of(value), if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def patch(
        self,
        id: Id,
        patch: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Merge *patch* into a pending order (RFC 7396)."""
        op = OrderPatch(id=text_of(id), value=object_of(patch), if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def complete(
        self,
        id: Id,
        revenue: Money | None = None,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Complete it. Completion and *revenue* count once, however often this is repeated."""
        op = OrderComplete(
            id=text_of(id), revenue=_exact(revenue), if_version=if_version, idempotency_key=idempotency_key
        )
        return self._do(op, durability)

    def cancel(
        self,
        id: Id,
        reason: str | None = None,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Cancel a pending one."""
        op = OrderCancel(id=text_of(id), reason=reason, if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it. What it added to the figures stays counted."""
        op = OrderDelete(id=text_of(id), if_version=if_version, idempotency_key=idempotency_key)
        return self._do(op, durability)


class RecordOps(Generic[A]):
    """Changing users, or a custom collection; options as for orders."""

    def __init__(self, do: Do[A], name: str) -> None:
        self._do = do
        self.name = name

    def put(
        self,
        id: Id,
        value: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Store *value* whole."""
        op: AnyOp
        if self.name == "users":
            op = UserPut(id=text_of(id), value=object_of(value), if_version=if_version, idempotency_key=idempotency_key)
        else:
            op = RecordPut(
                collection=self.name,
                id=text_of(id),
                value=object_of(value),
                if_version=if_version,
                idempotency_key=idempotency_key,
            )
        return self._do(op, durability)

    def patch(
        self,
        id: Id,
        patch: Value,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Merge *patch* into it (RFC 7396)."""
        op: AnyOp
        if self.name == "users":
            op = UserPatch(
                id=text_of(id), value=object_of(patch), if_version=if_version, idempotency_key=idempotency_key
            )
        else:
            op = RecordPatch(
                collection=self.name,
                id=text_of(id),
                value=object_of(patch),
                if_version=if_version,
                idempotency_key=idempotency_key,
            )
        return self._do(op, durability)

    def delete(
        self,
        id: Id,
        *,
        if_version: int | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Remove it; NotFound when it is not there."""
        op: AnyOp
        if self.name == "users":
            op = UserDelete(id=text_of(id), if_version=if_version, idempotency_key=idempotency_key)
        else:
            op = RecordDelete(
                collection=self.name, id=text_of(id), if_version=if_version, idempotency_key=idempotency_key
            )
        return self._do(op, durability)


class StatsOps(Generic[A]):
    """Counting what is kept elsewhere."""

    def __init__(self, do: Do[A]) -> None:
        self._do = do

    def order(
        self,
        product_type: str | None = None,
        *,
        at: str | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Count an order, made *at* (ISO 8601, now when absent)."""
        return self._do(StatsOrder(product_type=product_type, at=at, idempotency_key=idempotency_key), durability)

    def completion(
        self,
        revenue: Money | None = None,
        *,
        at: str | None = None,
        idempotency_key: str | None = None,
        durability: Durability | None = None,
    ) -> A:
        """Count a completion with its *revenue*, made *at*."""
        op = StatsCompletion(revenue=_exact(revenue), at=at, idempotency_key=idempotency_key)
        return self._do(op, durability)


def text_of(id: Id) -> str:
    """*id* as text.

    Raises:
        InvalidRecord: it is neither text nor a whole number; a None that slipped in would be one record for everybody.
    """
    if isinstance(id, str):
        return id if type(id) is str else str(id)
    if isinstance(id, int) and not isinstance(id, bool):
        return str(id)
    raise InvalidRecord(f"expected an id as text or a whole number, found {id!r:.80}")


def object_of(value: Value) -> dict[str, Any]:
    """A copy of *value* as a dict.

    Raises:
        InvalidRecord: it is none.
    """
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise InvalidRecord(f"expected a JSON object as a dict, found {type(value).__name__}") from None


def detached(op: AnyOp) -> AnyOp:
    """*op* with a value of its own, for doing it later: what the caller changes in the meantime does not count."""
    value = getattr(op, "value", None)
    if value is None:
        return op
    try:
        return msgspec.structs.replace(op, value=deepcopy(value))
    except TypeError as error:
        raise InvalidRecord(f"cannot be kept as JSON: {error}") from None


def _exact(amount: Money | None) -> Decimal | None:
    if amount is None or isinstance(amount, Decimal):
        return amount
    if isinstance(amount, bool) or not isinstance(amount, int | str):
        raise InvalidRecord(f"revenue must be a Decimal, an int or a decimal string, found {amount!r}")
    try:
        return Decimal(amount)
    except ArithmeticError:
        raise InvalidRecord(f"revenue must be a Decimal, an int or a decimal string, found {amount!r}") from None


def changed(
    found: Record | None, change: Callable[[dict[str, Any]], Value | None], default: Value | None, what: str
) -> tuple[Value, int]:
    """What *change* makes of the record *found*, or of *default* when there is none, with the version it rests on.

    Raises:
        NotFound: neither a record nor a default.
    """
    if found is not None:
        value, version = orjson.loads(found.value), found.version
    elif default is not None:
        value, version = dict(default), 0
    else:
        raise NotFound(f"no {what} to update; give a default to begin with")
    returned = change(value)
    return (value if returned is None else returned), version


def counted(name: str) -> tuple[str, ...]:
    """The collections whose records the list *name* has."""
    return ("orders", "completed_orders") if name == "orders" else (name,)


def lease_op(id: Id, ttl: Seconds, owner: str | None, generation: int | None) -> tuple[SessionLease, float]:
    """The op that asks for a lease, with its ttl in seconds.

    Raises:
        InvalidRecord: *ttl* is no duration.
    """
    try:
        ttl_s = parse_duration(ttl)
    except ValueError as error:
        raise InvalidRecord(f"ttl: {error}") from None
    return SessionLease(id=text_of(id), ttl=ttl, owner=owner, generation=generation), ttl_s


def waited(timeout: float | None) -> float:
    """Seconds to wait for a lease; None means for ever."""
    return math.inf if timeout is None else timeout
