"""The list of what was acknowledged, against which a data directory is held after a fault."""

from __future__ import annotations

import random
from collections import ChainMap
from collections.abc import Iterable, MutableMapping
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import orjson

from holdfast.engine import Engine
from holdfast.ops import (
    AnyOp,
    OrderCancel,
    OrderComplete,
    OrderPut,
    RecordDelete,
    RecordPatch,
    RecordPut,
    SessionDelete,
    SessionPatch,
    SessionPut,
    SessionTouch,
    StatsCompletion,
    StatsOrder,
    UserPut,
)

Place = tuple[str, str]
"""Collection and id."""

Stored = tuple[int, dict[str, Any]]
"""Version, and the fields that were asked for; times that Holdfast adds are not compared."""

CUSTOM = "notes"
READ_COLLECTIONS = ("sessions", "orders", "users", CUSTOM)
IDS_EACH = 12


class Change(NamedTuple):
    """Ops that happen together, with what they come to.

    Attributes:
        ops: one op, or several that are to be one atomic batch.
        records: what stands in each place afterwards; None where nothing does.
        orders, completions, cents: what is added to the sales figures.
    """

    ops: list[AnyOp]
    records: dict[Place, Stored | None]
    orders: int
    completions: int
    cents: int


class Found(NamedTuple):
    """What a data directory holds."""

    records: dict[Place, Stored]
    orders: int
    completions: int
    cents: int


class Ledger:
    """What one client asked for, and what of it was acknowledged.

    Each client has ids of its own and one request at a time, so at most one change is in doubt after a fault. Each
    completion of client *n* brings 2^n cents, so that the sum tells whose completion is missing or doubled.
    """

    def __init__(self, client: int, seed: int | str) -> None:
        self.client = client
        self.records: dict[Place, Stored] = {}
        self.orders = self.completions = self.cents = 0
        self.acknowledged = 0
        self.in_doubt: Change | None = None
        self._random = random.Random(f"{seed}:{client}")
        self._serial = 0
        self._open_orders: list[str] = []

    def propose(self, *, together: int | None = None) -> Change:
        """The next change, which is in doubt until ``acknowledge`` or ``refuse``."""
        assert self.in_doubt is None, "one request at a time"
        if together is None:
            together = self._random.randint(2, 4) if self._random.random() < 0.15 else 1
        view: MutableMapping[Place, Stored | None] = ChainMap({}, self.records)  # type: ignore[arg-type]
        ops: list[AnyOp] = []
        orders = completions = cents = 0
        if together > 1:
            # By this record one can always tell whether a batch happened.
            self._serial += 1
            marker = {"n": self._serial}
            _store(view, ("users", f"c{self.client}-batch"), marker)
            ops.append(UserPut(id=f"c{self.client}-batch", value=marker))
        for _ in range(together - len(ops)):
            op, new_orders, new_completions = self._next(view)
            ops.append(op)
            orders += new_orders
            completions += new_completions
            cents += new_completions << self.client
        assert isinstance(view, ChainMap)
        self.in_doubt = Change(ops, dict(view.maps[0]), orders, completions, cents)
        return self.in_doubt

    def acknowledge(self) -> None:
        """The change in doubt happened."""
        change = self.in_doubt
        assert change is not None
        for place, stored in change.records.items():
            if stored is None:
                self.records.pop(place, None)
            else:
                self.records[place] = stored
        self.orders += change.orders
        self.completions += change.completions
        self.cents += change.cents
        self.acknowledged += 1
        self.in_doubt = None

    def refuse(self) -> None:
        """The change in doubt did not happen."""
        self.in_doubt = None

    def _next(self, view: MutableMapping[Place, Stored | None]) -> tuple[AnyOp, int, int]:
        """An op that will be accepted, applied to *view*; how many orders and completions it counts."""
        self._serial += 1
        roll = self._random.random()
        id = f"c{self.client}-{self._random.randrange(IDS_EACH)}"
        value = {"n": self._serial, "text": self._random.choice(_TEXTS) * self._random.randint(0, 4)}
        if roll < 0.40:
            return self._session(view, id, value), 0, 0
        if roll < 0.60:
            return self._record(view, id, value), 0, 0
        if roll < 0.65:
            _store(view, ("users", id), value)
            return UserPut(id=id, value=value), 0, 0
        if roll < 0.70:
            return StatsOrder(product_type="music"), 1, 0
        if roll < 0.78:
            return StatsCompletion(revenue=self._revenue()), 0, 1
        return self._order(view, value)

    def _session(self, view: MutableMapping[Place, Stored | None], id: str, value: dict[str, Any]) -> AnyOp:
        place = ("sessions", id)
        present = view.get(place)
        roll = self._random.random()
        if present is None or roll < 0.5:
            _store(view, place, value)
            return SessionPut(id=id, value=value)
        if roll < 0.75:
            _store(view, place, present[1] | {"n": value["n"]})
            return SessionPatch(id=id, value={"n": value["n"]})
        if roll < 0.9:
            _store(view, place, present[1])
            return SessionTouch(id=id)
        view[place] = None
        return SessionDelete(id=id, if_version=present[0])

    def _record(self, view: MutableMapping[Place, Stored | None], id: str, value: dict[str, Any]) -> AnyOp:
        place = (CUSTOM, id)
        present = view.get(place)
        roll = self._random.random()
        if present is None or roll < 0.6:
            _store(view, place, value)
            return RecordPut(collection=CUSTOM, id=id, value=value)
        if roll < 0.85:
            _store(view, place, present[1] | {"n": value["n"]})
            return RecordPatch(collection=CUSTOM, id=id, value={"n": value["n"]})
        view[place] = None
        return RecordDelete(collection=CUSTOM, id=id)

    def _order(self, view: MutableMapping[Place, Stored | None], value: dict[str, Any]) -> tuple[AnyOp, int, int]:
        pending = [
            id for id in self._open_orders if (stored := view.get(("orders", id))) and stored[1]["status"] == "pending"
        ]
        self._open_orders = pending
        if len(pending) < 2 or self._random.random() < 0.4:
            id = f"c{self.client}-o{self._serial}"
            self._open_orders.append(id)
            _store(view, ("orders", id), value | {"status": "pending"})
            return OrderPut(id=id, value=value | {"status": "pending", "productType": "videos"}), 1, 0
        id = self._random.choice(pending)
        stored = view[("orders", id)]
        assert stored is not None
        if self._random.random() < 0.2:
            _store(view, ("orders", id), stored[1] | {"status": "cancelled"})
            return OrderCancel(id=id), 0, 0
        _store(view, ("orders", id), stored[1] | {"status": "completed"})
        return OrderComplete(id=id, revenue=self._revenue()), 0, 1

    def _revenue(self) -> Decimal:
        return Decimal(1 << self.client) / 100


_TEXTS = ["Hola! ", "¿cuánto cuesta? ", "价格 ", 'quoted "text" \\ ', "🎶 "]


def _store(view: MutableMapping[Place, Stored | None], place: Place, value: dict[str, Any]) -> None:
    present = view.get(place)
    view[place] = (present[0] + 1 if present else 1, value)


def found_in(engine: Engine) -> Found:
    """What *engine* shows."""
    records: dict[Place, Stored] = {}
    for collection in READ_COLLECTIONS:
        cursor = None
        while True:
            page = engine.page(collection, limit=1000, cursor=cursor)
            for record in page.items:
                records[collection, record.id] = (record.version, orjson.loads(record.value))
            cursor = page.next
            if cursor is None:
                break
    return found_of(records, engine.sales())


def found_of(records: dict[Place, Stored], sales: bytes) -> Found:
    """What *records* and the *sales* figures hold; records of no ledger are left out."""
    totals = msgspec.json.Decoder(float_hook=Decimal).decode(sales)["totals"]
    cents = Decimal(totals["allTimeRevenue"]) * 100
    assert cents == int(cents), f"money is not exact: {totals}"
    ours = {place: stored for place, stored in records.items() if place[1].startswith("c")}
    return Found(ours, totals["allTimeOrders"], totals["allTimeCompleted"], int(cents))


def differences(ledgers: Iterable[Ledger], found: Found) -> list[str]:
    """What is lost, doubled or from nowhere, in words; empty when all is as it was acknowledged.

    Changes in doubt are settled: from now on they count as what they turned out to be.
    """
    ledgers = list(ledgers)
    for ledger in ledgers:
        change = ledger.in_doubt
        if change is None:
            continue
        if change.records:
            happened = all(_is_stored(found.records.get(place), new) for place, new in change.records.items())
            ledger.acknowledge() if happened else ledger.refuse()
    _settle_figures(ledgers, found)
    expected: dict[Place, Stored] = {}
    for ledger in ledgers:
        expected |= ledger.records
    wrong = [
        f"{place} is {found.records.get(place)}, acknowledged was {stored}"
        for place, stored in expected.items()
        if not _is_stored(found.records.get(place), stored)
    ]
    wrong += [
        f"{place} is {found.records[place]}, but was never so" for place in found.records.keys() - expected.keys()
    ]
    for name in ("orders", "completions", "cents"):
        total = sum(getattr(ledger, name) for ledger in ledgers)
        if getattr(found, name) != total:
            wrong.append(f"{name} are {getattr(found, name)}, acknowledged were {total}")
    return wrong


def _settle_figures(ledgers: list[Ledger], found: Found) -> None:
    """Settle the changes in doubt that show in the sales figures only."""
    surplus_cents = found.cents - sum(ledger.cents for ledger in ledgers)
    surplus_orders = found.orders - sum(ledger.orders for ledger in ledgers)
    for ledger in ledgers:
        change = ledger.in_doubt
        if change is None:
            continue
        if change.cents:
            happened = bool(surplus_cents & change.cents)
        else:
            happened = surplus_orders > 0
            surplus_orders -= happened
        ledger.acknowledge() if happened else ledger.refuse()


def _is_stored(found: Stored | None, expected: Stored | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found[0] == expected[0] and expected[1].items() <= found[1].items()
