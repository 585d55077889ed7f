"""The list of what was acknowledged, against which a data directory is held after a fault."""

from __future__ import annotations

import random
from collections import ChainMap, defaultdict
from collections.abc import Callable, Iterable, MutableMapping
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import orjson

from holdfast.engine import Engine
from holdfast.ops import (
    AnyOp,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    OrderCancel,
    OrderComplete,
    OrderPut,
    Page,
    Priority,
    RecordDelete,
    RecordPatch,
    RecordPut,
    Role,
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
"""Version, and the fields that were asked for; times that Holdfast adds are not compared.

Of a conversation these are HEAD, all of it, and MESSAGES, all of them in order; of an escalation WHOLE.
"""

CUSTOM = "notes"
READ_COLLECTIONS = ("sessions", "orders", "users", CUSTOM)
CONVERSATIONS, ESCALATIONS = "conversations", "escalations"
HEAD, MESSAGES, WHOLE = "head", "messages", "whole"
IDS_EACH = 12
CONVERSATIONS_EACH = 4


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
    """What a data directory holds.

    Attributes:
        contradictions: what it says of conversations in one place and not so in another, in words.
        has_messages: whether messages were read; when they were not, heads are all that can be compared.
    """

    records: dict[Place, Stored]
    orders: int
    completions: int
    cents: int
    contradictions: tuple[str, ...] = ()
    has_messages: bool = True


class Ledger:
    """What one client asked for, and what of it was acknowledged.

    Each client has ids of its own and one request at a time, so at most one change is in doubt after a fault. Each
    completion of client *n* brings 2^n cents, so that the sum tells whose completion is missing or doubled.
    """

    def __init__(self, client: int, seed: int | str, *, repeats: bool = True) -> None:
        """With *repeats* some changes are messages delivered a second time, which come to no event."""
        self.client = client
        self._repeats = repeats
        self.records: dict[Place, Stored] = {}
        self.orders = self.completions = self.cents = 0
        self.acknowledged = 0
        self.in_doubt: Change | None = None
        self._random = random.Random(f"{seed}:{client}")
        self._serial = 0
        self._open_orders: list[str] = []
        # External ids that were ever proposed, of each conversation, also of those deleted since.
        self._delivered: defaultdict[str, list[Message]] = defaultdict(list)
        # Conversations that the change being proposed deletes, with their last versions.
        self._replaced: dict[str, int] = {}

    def propose(self, *, together: int | None = None) -> Change:
        """The next change, which is in doubt until ``acknowledge`` or ``refuse``."""
        assert self.in_doubt is None, "one request at a time"
        if together is None:
            together = self._random.randint(2, 4) if self._random.random() < 0.15 else 1
        view: MutableMapping[Place, Stored | None] = ChainMap({}, self.records)  # type: ignore[arg-type]
        ops: list[AnyOp] = []
        self._replaced.clear()
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
        if roll < 0.30:
            return self._session(view, id, value), 0, 0
        if roll < 0.55:
            return self._conversation(view), 0, 0
        if roll < 0.70:
            return self._record(view, id, value), 0, 0
        if roll < 0.74:
            _store(view, ("users", id), value)
            return UserPut(id=id, value=value), 0, 0
        if roll < 0.78:
            return StatsOrder(product_type="music"), 1, 0
        if roll < 0.84:
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

    def _conversation(self, view: MutableMapping[Place, Stored | None]) -> AnyOp:
        id = f"c{self.client}-talk{self._random.randrange(CONVERSATIONS_EACH)}"
        present = view.get((CONVERSATIONS, id))
        roll = self._random.random()
        if present is None or roll < 0.66:
            return self._append(view, id)
        if roll < 0.74:
            value = {"title": self._random.choice([None, f"title {self._serial}"]), "topic": self._serial}
            _talk(view, id, value)
            return ConversationPut(id=id, value=value)
        head = present[1][HEAD]
        if roll < 0.80:
            _talk(view, id, {"archived": not head["archived"]})
            return ConversationArchive(id=id, archived=not head["archived"])
        if roll < 0.84:
            _talk(view, id, {}, hold=not head.get("hold"))
            return ConversationHold(id=id, hold=not head.get("hold"))
        if roll < 0.92 or head.get("hold"):
            return self._escalate(view, id)
        self._replaced[id] = present[0]
        view[CONVERSATIONS, id] = None
        if view.get((ESCALATIONS, id)) is not None:
            view[ESCALATIONS, id] = None
        return ConversationDelete(id=id)

    def _append(self, view: MutableMapping[Place, Stored | None], id: str) -> AnyOp:
        """New messages, one or several; or one of those that were delivered before, alone or before a new one."""
        roll = self._random.random()
        if roll < 0.2 and self._delivered[id]:
            again = self._random.choice(self._delivered[id])
            given = [again] if roll < 0.1 and self._repeats else [again, self._message(id, self._serial)]
        else:
            given = [self._message(id, self._serial + part) for part in range(1 if roll < 0.7 else 3)]
            self._serial += len(given) - 1
        is_new = view.get((CONVERSATIONS, id)) is None
        _say(view, id, given)
        if is_new and id in self._replaced:
            # In the place of one that the same batch has deleted: it goes on with its versions.
            stored = view[CONVERSATIONS, id]
            assert stored is not None
            view[CONVERSATIONS, id] = (stored[0] + self._replaced.pop(id), stored[1])
        if len(given) > 1 or roll < 0.3:
            return MessageAppend(id=id, messages=given)
        (one,) = given
        return MessageAppend(
            id=id,
            role=one.role,
            content=one.content,
            tokens_used=one.tokens_used,
            metadata=one.metadata,
            channel=one.channel,
            external_id=one.external_id,
        )

    def _message(self, id: str, number: int) -> Message:
        text = self._random.choice(_TEXTS) * self._random.randint(1, 4) + str(number)
        role: Role = self._random.choice(["user", "user", "assistant", "assistant", "system", "tool"])
        tokens_used = self._random.choice([None, number % 97])
        metadata = {"tool_calls": [{"id": f"call{number}"}]} if role == "assistant" and number % 5 == 0 else None
        if role != "user" or self._random.random() < 0.4:
            return Message(role=role, content=text, tokens_used=tokens_used, metadata=metadata)
        channel = self._random.choice([None, "whatsapp"])
        message = Message(role=role, content=text, tokens_used=tokens_used, channel=channel, external_id=f"m{number}")
        self._delivered[id].append(message)
        return message

    def _escalate(self, view: MutableMapping[Place, Stored | None], id: str) -> AnyOp:
        place = (ESCALATIONS, id)
        reason, priority = f"asks {self._serial}", self._random.choice(_PRIORITIES)
        contact_info = self._random.choice([None, {"n": self._serial}])
        present = view.get(place)
        before = present[1][WHOLE] if present else {"contact_info": None}
        said = {
            "conversation_id": id,
            "reason": reason,
            "contact_info": contact_info or before["contact_info"],
            "priority": priority,
            "status": "pending",
            "assignee": None,
            "claimed_at": None,
            "resolved_at": None,
        }
        _store(view, place, {WHOLE: said})
        conversation = view[CONVERSATIONS, id]
        assert conversation is not None
        _talk(view, id, {"escalated": True, "handler": "waiting"})
        return EscalationOpen(id=id, reason=reason, priority=priority, contact_info=contact_info)

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
_PRIORITIES: list[Priority] = ["low", "high"]
_AUTHORS = {"user": "customer", "assistant": "bot"}
_TITLE_CHARS = 50


def _store(view: MutableMapping[Place, Stored | None], place: Place, value: dict[str, Any]) -> None:
    present = view.get(place)
    view[place] = (present[0] + 1 if present else 1, value)


def _talk(
    view: MutableMapping[Place, Stored | None], id: str, change: dict[str, Any], *, hold: bool | None = None
) -> None:
    """Note what is said about the conversation *id*, which is there; *hold* puts a hold on it or lifts it."""
    present = view[CONVERSATIONS, id]
    assert present is not None
    head = present[1][HEAD] | change
    if hold is not None:
        head = {name: value for name, value in head.items() if name != "hold"} | ({"hold": True} if hold else {})
    _store(view, (CONVERSATIONS, id), present[1] | {HEAD: head})


def _say(view: MutableMapping[Place, Stored | None], id: str, given: list[Message]) -> None:
    """Note the messages *given*; those that the conversation has are there already."""
    present = view.get((CONVERSATIONS, id))
    messages = list(present[1][MESSAGES]) if present else []
    new_head = {"title": None, "user_id": None, "session_id": None, "escalated": False, "handler": "bot"}
    head = dict(present[1][HEAD]) if present else new_head
    there = {(one["metadata"].get("channel"), one["metadata"].get("external_id")) for one in messages}
    before = len(messages)
    for message in given:
        if message.external_id and (message.channel, message.external_id) in there:
            continue
        metadata = dict(message.metadata or {})
        metadata |= {name: text for name in ("channel", "external_id") if (text := getattr(message, name))}
        if message.role == "user" and head["title"] is None:
            cut = len(message.content) > _TITLE_CHARS
            head["title"] = message.content[:_TITLE_CHARS] + ("..." if cut else "")
        messages.append(
            {
                "number": len(messages) + 1,
                "role": message.role,
                "content": message.content,
                "author": _AUTHORS.get(message.role),
                "tokens_used": message.tokens_used,
                "metadata": metadata,
            }
        )
    if len(messages) == before:
        return
    head["archived"] = False
    head["system_count"] = sum(one["role"] == "system" for one in messages)
    head["message_count"] = len(messages) - head["system_count"]
    head["tokens_used"] = sum(one["tokens_used"] or 0 for one in messages)
    head["last_number"] = len(messages)
    _store(view, (CONVERSATIONS, id), {HEAD: head, MESSAGES: messages})


def found_in(engine: Engine, *, with_messages: bool = True) -> Found:
    """What *engine* shows; without messages where the archive has no room to take the newest ones."""
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
    heads = _all_pages(lambda cursor: engine.page(CONVERSATIONS, limit=1000, cursor=cursor))
    escalations = _all_pages(lambda cursor: engine.page(ESCALATIONS, limit=1000, cursor=cursor))
    for id, (version, value) in escalations.items():
        records[ESCALATIONS, id] = (version, whole_escalation(value))
    for id, (version, value) in heads.items():
        records[CONVERSATIONS, id] = (version, {HEAD: without_times(value)})
    if not with_messages:
        return found_of(records, engine.sales())._replace(has_messages=False)
    for id, (version, _) in heads.items():
        found = engine.transcripts.conversation(id)
        assert found is not None and found.version == version, f"{id} changed while it was looked at"
        records[CONVERSATIONS, id] = (version, whole_conversation(orjson.loads(found.value)))
    listed = _all_pages(lambda cursor: engine.transcripts.page(limit=1000, cursor=cursor))
    waiting = _all_pages(lambda cursor: engine.transcripts.escalations(limit=1000, cursor=cursor))
    figures = engine.transcripts.figures()
    counted = {"conversations": figures.conversations, "messages": figures.messages, "tokens": figures.tokens}
    return found_of(records, engine.sales(), contradictions(heads, listed, escalations, waiting, counted))


Listed = dict[str, Stored]
"""Of a list the version and value by id."""


def _all_pages(page_of: Callable[[str | None], Page]) -> Listed:
    found: Listed = {}
    cursor = None
    while True:
        page = page_of(cursor)
        found |= {item.id: (item.version, orjson.loads(item.value)) for item in page.items}
        cursor = page.next
        if cursor is None:
            return found


def without_times(value: dict[str, Any]) -> dict[str, Any]:
    """A head or escalation as the ledgers know it: without its id, and without the times that Holdfast gave it."""
    return {name: field for name, field in value.items() if name not in ("id", "created_at", "updated_at", "opened_at")}


def whole_escalation(value: dict[str, Any]) -> dict[str, Any]:
    """An escalation as the ledgers know it."""
    assert value["updated_at"] >= value["opened_at"]
    return {WHOLE: without_times(value)}


def whole_conversation(value: dict[str, Any]) -> dict[str, Any]:
    """A conversation with its messages as the ledgers know it."""
    messages = value.pop("messages")
    times = [message.pop("created_at") for message in messages]
    assert times == sorted(times), f"times do not run on: {times}"
    return {HEAD: without_times(value), MESSAGES: messages}


def contradictions(
    heads: Listed, listed: Listed, escalations: Listed, waiting: Listed, counted: dict[str, int]
) -> tuple[str, ...]:
    """Where the archive's lists (*listed*, *waiting*) and figures differ from what stands in memory."""
    wrong = [
        f"{id} is {listed.get(id)} in the archive, but {heads.get(id)} in memory"
        for id in heads.keys() | listed.keys()
        if heads.get(id) != listed.get(id)
    ]
    wrong += [
        f"the escalation {id} is {waiting.get(id)} in the archive, but {escalations.get(id)} in memory"
        for id in escalations.keys() | waiting.keys()
        if escalations.get(id) != waiting.get(id)
    ]
    there = {
        "conversations": len(heads),
        "messages": sum(head["message_count"] + head["system_count"] for _, head in heads.values()),
        "tokens": sum(head["tokens_used"] for _, head in heads.values()),
    }
    return (*wrong, *(f"{name} are counted as {counted[name]}, there are {there[name]}" for name in there
                      if counted[name] != there[name]))  # fmt: skip


def found_of(records: dict[Place, Stored], sales: bytes, contradictions: tuple[str, ...] = ()) -> Found:
    """What *records* and the *sales* figures hold; records of no ledger are left out."""
    totals = msgspec.json.Decoder(float_hook=Decimal).decode(sales)["totals"]
    cents = Decimal(totals["allTimeRevenue"]) * 100
    assert cents == int(cents), f"money is not exact: {totals}"
    ours = {place: stored for place, stored in records.items() if place[1].startswith("c")}
    return Found(ours, totals["allTimeOrders"], totals["allTimeCompleted"], int(cents), contradictions)


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
            happened = all(_is_stored(found, place, new) for place, new in change.records.items())
            ledger.acknowledge() if happened else ledger.refuse()
    _settle_figures(ledgers, found)
    expected: dict[Place, Stored] = {}
    for ledger in ledgers:
        expected |= ledger.records
    wrong = [
        f"{place} is {found.records.get(place)}, acknowledged was {stored}"
        for place, stored in expected.items()
        if not _is_stored(found, place, stored)
    ]
    wrong += [
        f"{place} is {found.records[place]}, but was never so" for place in found.records.keys() - expected.keys()
    ]
    for name in ("orders", "completions", "cents"):
        total = sum(getattr(ledger, name) for ledger in ledgers)
        if getattr(found, name) != total:
            wrong.append(f"{name} are {getattr(found, name)}, acknowledged were {total}")
    return wrong + list(found.contradictions)


def _settle_figures(ledgers: list[Ledger], found: Found) -> None:
    """Settle the changes in doubt that show in the sales figures only."""
    surplus_cents = found.cents - sum(ledger.cents for ledger in ledgers)
    surplus_orders = found.orders - sum(ledger.orders for ledger in ledgers)
    for ledger in ledgers:
        change = ledger.in_doubt
        if change is None:
            continue
        if not change.cents and not change.orders:
            happened = False  # a message delivered a second time, which changes nothing
        elif change.cents:
            happened = bool(surplus_cents & change.cents)
        else:
            happened = surplus_orders > 0
            surplus_orders -= happened
        ledger.acknowledge() if happened else ledger.refuse()


def _is_stored(found: Found, place: Place, expected: Stored | None) -> bool:
    there = found.records.get(place)
    if there is None or expected is None:
        return there is expected
    fields = expected[1]
    if place[0] == CONVERSATIONS and not found.has_messages:
        fields = {HEAD: fields[HEAD]}
    return there[0] == expected[0] and fields.items() <= there[1].items()
