"""Any sequence of ops, flushes, crashes and restarts equals a plain dict."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from holdfast.clock import Clock
from holdfast.engine import Engine
from holdfast.errors import HoldfastError
from holdfast.ops import (
    Answer,
    AnyOp,
    Batch,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
    PersonHold,
    RecordDelete,
    RecordPatch,
    RecordPut,
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
from holdfast.recovery import open_engine
from holdfast.settings import Settings

FULL = os.environ.get("HOLDFAST_CRASH") == "full"
SEED = int(os.environ.get("HOLDFAST_CRASH_SEED", "20261121"))
EXAMPLES = 600 if FULL else 40
STEPS = 40

SESSION_TTL_MS = 24 * 3600 * 1000
KEY_TTL_MS = 24 * 3600 * 1000
MINUTE_MS = 60_000

IDS = st.sampled_from(["57300", 'a"b\\c', "ñ 价"])
KEYS = st.sampled_from([None, None, None, None, "k1", "k2", "k3"])
VALUES = st.dictionaries(
    st.sampled_from(["currentState", "n", "text"]),
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.lists(st.integers(0, 9), max_size=2)
    | st.dictionaries(st.sampled_from(["a", "b"]), st.none() | st.integers(0, 3), max_size=2),
    max_size=3,
)  # fmt: skip
PATCHES = VALUES
VERSIONS = st.sampled_from([None] * 9 + [0, 1, 2])
REVENUES = st.none() | st.decimals("0", "1000", places=2)
PRODUCTS = st.none() | st.sampled_from(["music", "videos"])
TALKS = st.sampled_from(["57300", "ñ 价"])
PERSONS = st.none() | st.sampled_from(["57300", "ana"])
MESSAGES: dict[str, st.SearchStrategy[Any]] = {
    "role": st.sampled_from(["user", "user", "assistant", "system", "tool"]),
    "content": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    "tokens_used": st.none() | st.integers(0, 9),
    "author": st.sampled_from([None, None, "bot", "agent", "customer"]),
    "metadata": st.none() | st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 3), max_size=2),
    "channel": st.sampled_from([None, "web"]),
    "external_id": st.sampled_from([None, None, "w1", "w2", "w3"]),
}
AUTHORS = {"user": "customer", "assistant": "bot"}
TITLE_CHARS = 50


class Refused(Exception):
    """The model refuses; its argument is the code."""


class Model:
    """What Holdfast should be, in the plainest way: dicts, and a list of what happened."""

    def __init__(self) -> None:
        self.records: dict[str, dict[str, dict[str, Any]]] = {
            name: {}
            for name in ("sessions", "pending", "closed", "users", "notes", "x_y", "conversations", "escalations")
        }
        self.messages: dict[str, list[dict[str, Any]]] = {}
        self.holds: set[str] = set()
        self.versions: dict[tuple[str, str], int] = {}
        self.ttls: dict[str, int] = {}
        self.leases: dict[str, tuple[int, int]] = {}
        self.keys: dict[str, tuple[int, str, Answer]] = {}
        self.completion_counted: dict[str, bool] = {}
        self.days: dict[str, dict[str, Any]] = {}
        self.orders = self.completed = 0
        self.revenue = Decimal(0)

    def copy(self) -> Model:
        return copy.deepcopy(self)

    def do(self, op: AnyOp, seq: int, now_ms: int) -> Answer | None:
        """Do *op*; the answer it must get, None when the answer is not told by the model (a repeat without effect)."""
        key = op.idempotency_key
        what = f"{type(op).__name__}:{getattr(op, 'collection', '')}:{getattr(op, 'id', '')}"
        if key is not None and key in self.keys and self.keys[key][0] + KEY_TTL_MS > now_ms:
            if self.keys[key][1] != what:
                raise Refused("conflict")
            return self.keys[key][2]
        answer, changed = self._do(op, seq, now_ms)
        if key is not None and changed:
            self.keys[key] = (now_ms, what, answer)
        return answer

    def _do(self, op: AnyOp, seq: int, now_ms: int) -> tuple[Answer, bool]:
        match op:
            case SessionPut() | SessionPatch() | SessionTouch() | SessionDelete():
                return self._session(op, seq, now_ms), True
            case SessionLease():
                return self._lease(op, seq, now_ms), True
            case SessionRelease():
                until, generation = self.leases.get(op.id, (0, 0))
                version = self.versions.get(("sessions", op.id), 0)
                if until <= now_ms:
                    return Answer(status=200, seq=seq - 1, id=op.id, version=version), False
                if generation != op.generation:
                    raise Refused("leased")
                del self.leases[op.id]
                return Answer(status=200, seq=seq, id=op.id, version=version), True
            case StatsOrder():
                self._count_order(now_ms, op.product_type)
                return Answer(status=200, seq=seq), True
            case StatsCompletion():
                self._count_completion(now_ms, op.revenue)
                return Answer(status=200, seq=seq), True
            case OrderPut() | OrderPatch() | OrderComplete() | OrderCancel() | OrderDelete():
                return self._order(op, seq, now_ms)
            case UserPut() | UserPatch() | UserDelete():
                return self._record("users", "user_id", op, seq), True
            case RecordPut() | RecordPatch() | RecordDelete():
                return self._record(op.collection, "id", op, seq), True
            case MessageAppend():
                return self._append(op, seq, now_ms)
            case ConversationPut():
                return self._talk(op, seq, now_ms), True
            case ConversationDelete() | ConversationArchive() | ConversationHold():
                return self._change_talk(op, seq)
            case EscalationOpen():
                return self._escalate(op, seq, now_ms), True
            case PersonHold():
                if op.hold == (op.id in self.holds):
                    return Answer(status=200, seq=seq - 1, id=op.id), False
                self.holds = self.holds ^ {op.id}
                return Answer(status=200, seq=seq, id=op.id), True
        raise AssertionError(op)

    def _session(self, op: Any, seq: int, now_ms: int) -> Answer:
        present = self.records["sessions"].get(op.id)
        if not isinstance(op, SessionPut) and present is None:
            raise Refused("version_mismatch" if op.if_version else "not_found")
        self._check_version("sessions", op)
        until, generation = self.leases.get(op.id, (0, 0))
        if until > now_ms:
            if op.lease != generation:
                raise Refused("leased")
        elif op.lease is not None:
            raise Refused("conflict")
        if isinstance(op, SessionDelete):
            del self.records["sessions"][op.id]
            del self.versions["sessions", op.id]
            self.ttls.pop(op.id, None)
            return Answer(status=204, seq=seq, id=op.id)
        if isinstance(op, SessionPut):
            value = {"recipientPhone": op.id, "lastActivity": _iso(now_ms)} | op.value
            self.ttls = self.ttls if present is not None else {id: ttl for id, ttl in self.ttls.items() if id != op.id}
        elif isinstance(op, SessionPatch):
            value = _merged(present, op.value)
        else:
            value = {**(present or {}), "lastActivity": _iso(now_ms)}
        if op.ttl is not None:
            self.ttls[op.id] = op.ttl * 1000
        return self._store("sessions", op.id, value, seq, is_put=isinstance(op, SessionPut))

    def _lease(self, op: SessionLease, seq: int, now_ms: int) -> Answer:
        until, generation = self.leases.get(op.id, (0, 0))
        if until > now_ms:
            if op.generation != generation:
                raise Refused("leased")
        elif op.generation is not None:
            raise Refused("conflict")
        else:
            generation = seq
        assert isinstance(op.ttl, int)
        ends = now_ms + op.ttl * 1000
        self.leases[op.id] = (ends, generation)
        version = self.versions.get(("sessions", op.id), 0)
        return Answer(status=200, seq=seq, id=op.id, version=version, generation=generation, expires_at=_iso(ends))

    def _order(self, op: Any, seq: int, now_ms: int) -> tuple[Answer, bool]:
        pending, closed = self.records["pending"], self.records["closed"]
        present, done = pending.get(op.id), closed.get(op.id)
        if isinstance(op, OrderDelete):
            if present is None and done is None:
                raise Refused("version_mismatch" if op.if_version else "not_found")
            self._check_version("orders", op)
            (pending if present is not None else closed).pop(op.id)
            del self.versions["orders", op.id]
            return Answer(status=204, seq=seq, id=op.id), True
        if done is not None:
            closes = isinstance(op, OrderComplete | OrderCancel)
            if not closes or done["status"] != ("completed" if isinstance(op, OrderComplete) else "cancelled"):
                raise Refused("conflict")
            return Answer(status=200, seq=seq - 1, id=op.id, version=self.versions["orders", op.id]), False
        if not isinstance(op, OrderPut) and present is None:
            raise Refused("version_mismatch" if op.if_version else "not_found")
        self._check_version("orders", op)
        if isinstance(op, OrderPut):
            if present is None and op.id not in self.completion_counted:
                self._count_order(now_ms, op.value.get("productType"))
                self.completion_counted[op.id] = False
            return self._store("pending", op.id, {"odooOrderId": _number(op.id)} | op.value, seq, is_put=True), True
        assert present is not None
        if isinstance(op, OrderPatch):
            return self._store("pending", op.id, _merged(present, op.value), seq, is_put=False), True
        if isinstance(op, OrderComplete):
            value = present | {"status": "completed", "completedAt": _iso(now_ms)}
            if op.revenue is not None:
                value["revenue"] = float(op.revenue)
            if not self.completion_counted[op.id]:
                self._count_completion(now_ms, op.revenue)
                self.completion_counted[op.id] = True
        else:
            value = present | {"status": "cancelled", "cancelledAt": _iso(now_ms)}
        del pending[op.id]
        return self._store("closed", op.id, value, seq, is_put=False), True

    def _record(self, collection: str, id_field: str, op: Any, seq: int) -> Answer:
        part = self.records[collection]
        present = part.get(op.id)
        is_put = isinstance(op, UserPut | RecordPut)
        if not is_put and present is None:
            raise Refused("version_mismatch" if op.if_version else "not_found")
        self._check_version(collection, op)
        if isinstance(op, UserDelete | RecordDelete):
            del part[op.id]
            del self.versions[collection, op.id]
            return Answer(status=204, seq=seq, id=op.id)
        value = {id_field: op.id} | op.value if is_put else _merged(present, op.value)
        return self._store(collection, op.id, value, seq, is_put=is_put)

    def _append(self, op: MessageAppend, seq: int, now_ms: int) -> tuple[Answer, bool]:
        present = self.records["conversations"].get(op.id)
        if op.if_version and present is None:
            raise Refused("version_mismatch")
        self._check_version("conversations", op)
        there = list(self.messages[op.id]) if present else []
        given = op.messages or [op]
        numbers: list[int] = []
        for one in given:
            known = [
                said["number"] for said in there if one.external_id and _delivery(said["metadata"]) == _delivery_of(one)
            ]
            numbers.append(known[0] if known else len(there) + 1)
            if not known:
                there.append(_message(one, len(there) + 1, now_ms))
        if present is not None and len(there) == len(self.messages[op.id]):
            version = self.versions["conversations", op.id]
            return Answer(status=200, seq=seq - 1, id=op.id, version=version, numbers=numbers), False
        head = dict(present or _new_head(op.id))
        for name, whose in (("user_id", op.user_id), ("session_id", op.session_id)):
            if whose is not None and head[name] not in (None, whose):
                raise Refused("conflict")
            head[name] = whose or head[name]
        titles = [one["content"] for one in there[head["last_number"] :] if one["role"] == "user"]
        titles = [content for content in titles if content.strip()]
        if head["title"] is None and titles:
            head["title"] = titles[0][:TITLE_CHARS] + ("..." if len(titles[0]) > TITLE_CHARS else "")
        system = sum(one["role"] == "system" for one in there)
        self.messages[op.id] = there
        head |= {
            "created_at": head["created_at"] or _iso(now_ms),
            "updated_at": _iso(now_ms),
            "archived": False,
            "message_count": len(there) - system,
            "system_count": system,
            "tokens_used": sum(one["tokens_used"] or 0 for one in there),
            "last_number": len(there),
        }
        answer = self._store("conversations", op.id, head, seq, is_put=False)
        return msgspec.structs.replace(answer, numbers=numbers), True

    def _talk(self, op: ConversationPut, seq: int, now_ms: int) -> Answer:
        present = self.records["conversations"].get(op.id)
        if op.if_version and present is None:
            raise Refused("version_mismatch")
        self._check_version("conversations", op)
        if present is None:
            self.messages[op.id] = []
            present = _new_head(op.id) | {"created_at": _iso(now_ms), "updated_at": _iso(now_ms)}
        head = present | op.value
        if head.get("topic", 0) is None:
            del head["topic"]
        return self._store("conversations", op.id, head, seq, is_put=True)

    def _change_talk(self, op: Any, seq: int) -> tuple[Answer, bool]:
        present = self.records["conversations"].get(op.id)
        if present is None:
            raise Refused("version_mismatch" if op.if_version else "not_found")
        self._check_version("conversations", op)
        same = Answer(status=200, seq=seq - 1, id=op.id, version=self.versions["conversations", op.id])
        if isinstance(op, ConversationArchive):
            if present["archived"] == op.archived:
                return same, False
            return self._store("conversations", op.id, present | {"archived": op.archived}, seq, is_put=False), True
        if isinstance(op, ConversationHold):
            head = {name: value for name, value in present.items() if name != "hold"}
            head |= {"hold": True} if op.hold else {}
            if head == present:
                return same, False
            return self._store("conversations", op.id, head, seq, is_put=False), True
        if present.get("hold") or self.holds & {op.id, present["user_id"], present["session_id"]}:
            raise Refused("conflict")
        for part in ("conversations", "escalations"):
            self.records[part].pop(op.id, None)
            self.versions.pop((part, op.id), None)
        del self.messages[op.id]
        return Answer(status=204, seq=seq, id=op.id), True

    def _escalate(self, op: EscalationOpen, seq: int, now_ms: int) -> Answer:
        head = self.records["conversations"].get(op.id)
        if head is None:
            raise Refused("not_found")
        present = self.records["escalations"].get(op.id)
        if op.if_version and present is None:
            raise Refused("version_mismatch")
        self._check_version("escalations", op)
        before = present or {
            "id": op.id,
            "conversation_id": op.id,
            "contact_info": None,
            "status": "pending",
            "assignee": None,
            "opened_at": _iso(now_ms),
            "claimed_at": None,
            "resolved_at": None,
        }
        said = {"reason": op.reason, "priority": op.priority, "updated_at": _iso(now_ms)}
        said["contact_info"] = before["contact_info"] if op.contact_info is None else op.contact_info
        self._store("conversations", op.id, head | {"escalated": True, "handler": "waiting"}, seq, is_put=False)
        return self._store("escalations", op.id, before | said, seq, is_put=False)

    def _store(self, part: str, id: str, value: dict[str, Any], seq: int, *, is_put: bool) -> Answer:
        place = ("orders" if part in ("pending", "closed") else part, id)
        version = self.versions.get(place, 0) + 1
        self.versions[place] = version
        self.records[part][id] = value
        return Answer(status=201 if is_put and version == 1 else 200, seq=seq, id=id, version=version)

    def _check_version(self, collection: str, op: Any) -> None:
        if op.if_version is not None and op.if_version != self.versions.get((collection, op.id), 0):
            raise Refused("version_mismatch")

    def _count_order(self, now_ms: int, product: str | None) -> None:
        self.orders += 1
        day = self._day(now_ms)
        day["totalOrders"] += 1
        if product is not None:
            day["productTypes"][product] = day["productTypes"].get(product, 0) + 1

    def _count_completion(self, now_ms: int, revenue: Decimal | None) -> None:
        self.completed += 1
        self.revenue += revenue or 0
        day = self._day(now_ms)
        day["completedOrders"] += 1
        day["totalRevenue"] += revenue or 0

    def _day(self, now_ms: int) -> dict[str, Any]:
        date = _iso(now_ms)[:10]
        return self.days.setdefault(
            date,
            {"date": date, "totalOrders": 0, "completedOrders": 0, "totalRevenue": Decimal(0), "productTypes": {}},
        )

    def expire(self, now_ms: int, is_gone: Callable[[str], bool]) -> int:
        """Remove what is idle too long, how many those are; for who is due since less than a minute *is_gone* tells."""
        due = []
        for id, value in self.records["sessions"].items():
            idle_ms = round(datetime.fromisoformat(value["lastActivity"]).timestamp() * 1000)
            due_ms = idle_ms + self.ttls.get(id, SESSION_TTL_MS)
            until, _ = self.leases.get(id, (0, 0))
            if max(due_ms, until) + MINUTE_MS <= now_ms or (
                max(due_ms, until if until > now_ms else 0) <= now_ms and is_gone(id)
            ):
                due.append(id)
        for id in due:
            del self.records["sessions"][id]
            del self.versions["sessions", id]
            self.ttls.pop(id, None)
        return len(due)


class FakeClock(Clock):
    """A clock that moves when told."""

    def __init__(self, now_ms: int) -> None:
        super().__init__()
        self._last_ms = now_ms
        self.passed_s = 0.0

    def now_ms(self) -> int:
        return self._last_ms

    def monotonic(self) -> float:
        return self.passed_s

    def advance(self, seconds: int) -> None:
        self._last_ms += seconds * 1000
        self.passed_s += seconds


class Silent:
    """A logger for nobody."""

    def info(self, event: str, **fields: Any) -> None:
        pass

    warning = error = exception = info


_records = st.sampled_from(["notes", "x_y"])
_revisions = {"if_version": VERSIONS, "idempotency_key": KEYS}
SESSION_OPS: st.SearchStrategy[AnyOp] = st.one_of(
    st.builds(
        SessionPut, id=IDS, value=VALUES, ttl=st.none() | st.integers(60, 200_000), lease=st.none(), **_revisions
    ),
    st.builds(
        SessionPatch, id=IDS, value=PATCHES, ttl=st.none() | st.none() | st.just(90), lease=st.none(), **_revisions
    ),
    st.builds(SessionTouch, id=IDS, ttl=st.none(), lease=st.none(), **_revisions),
    st.builds(SessionDelete, id=IDS, lease=st.none() | st.none() | st.just(1), **_revisions),
    st.builds(
        SessionLease, id=IDS, ttl=st.integers(1, 3600), owner=st.none(), generation=st.none(), idempotency_key=KEYS
    ),
    st.builds(SessionRelease, id=IDS, generation=st.integers(1, 5), idempotency_key=KEYS),
)
ORDER_OPS: st.SearchStrategy[AnyOp] = st.one_of(
    st.builds(
        OrderPut,
        id=st.sampled_from(["1", "2", "x3"]),
        value=st.builds(lambda value, product: value | ({"productType": product} if product else {}), VALUES, PRODUCTS),
        **_revisions,
    ),
    st.builds(OrderPatch, id=st.sampled_from(["1", "2", "x3"]), value=PATCHES, **_revisions),
    st.builds(OrderComplete, id=st.sampled_from(["1", "2", "x3"]), revenue=REVENUES, **_revisions),
    st.builds(OrderCancel, id=st.sampled_from(["1", "2"]), reason=st.none(), **_revisions),
    st.builds(OrderDelete, id=st.sampled_from(["1", "2", "x3"]), **_revisions),
    st.builds(StatsOrder, product_type=PRODUCTS, at=st.none(), idempotency_key=KEYS),
    st.builds(StatsCompletion, revenue=REVENUES, at=st.none(), idempotency_key=KEYS),
)
RECORD_OPS: st.SearchStrategy[AnyOp] = st.one_of(
    st.builds(UserPut, id=IDS, value=VALUES, **_revisions),
    st.builds(UserPatch, id=IDS, value=PATCHES, **_revisions),
    st.builds(UserDelete, id=IDS, **_revisions),
    st.builds(RecordPut, collection=_records, id=IDS, value=VALUES, **_revisions),
    st.builds(RecordPatch, collection=_records, id=IDS, value=PATCHES, **_revisions),
    st.builds(RecordDelete, collection=_records, id=IDS, **_revisions),
)
CONVERSATION_OPS: st.SearchStrategy[AnyOp] = st.one_of(
    st.builds(MessageAppend, id=TALKS, user_id=PERSONS, session_id=st.none(), **MESSAGES, **_revisions),
    st.builds(
        MessageAppend,
        id=TALKS,
        messages=st.lists(st.builds(Message, **MESSAGES), min_size=1, max_size=4),
        user_id=st.none(),
        session_id=st.none(),
        **_revisions,
    ),
    st.builds(
        ConversationPut,
        id=TALKS,
        value=st.fixed_dictionaries(
            {},
            optional={
                "title": st.none() | st.just("title"),
                "user_id": PERSONS,
                "escalated": st.booleans(),
                "topic": st.none() | st.integers(0, 3),
            },
        ),
        **_revisions,
    ),
    st.builds(ConversationArchive, id=TALKS, archived=st.booleans(), **_revisions),
    st.builds(ConversationHold, id=TALKS, hold=st.booleans(), reason=st.none(), **_revisions),
    st.builds(
        PersonHold, id=st.sampled_from(["57300", "ana"]), hold=st.booleans(), reason=st.none(), idempotency_key=KEYS
    ),
    st.builds(ConversationDelete, id=TALKS, **_revisions),
    st.builds(ConversationDelete, id=TALKS),
    st.builds(
        EscalationOpen,
        id=TALKS,
        reason=st.sampled_from(["help", "pay"]),
        contact_info=st.none() | st.just({"phone": "57300"}),
        priority=st.sampled_from(["low", "high"]),
        opened_at=st.none(),
        **_revisions,
    ),
)
OPS: st.SearchStrategy[AnyOp] = SESSION_OPS | ORDER_OPS | RECORD_OPS | CONVERSATION_OPS


class Life(RuleBasedStateMachine):
    """A data directory that is used, flushed, killed and restarted, beside the model."""

    restarts = changes = refusals = 0

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="holdfast-model-"))
        self.data_dir = self.base / "0"
        self.model = Model()
        # 22:00 in UTC, so that days change.
        self.clock = FakeClock(1_795_298_400_000)
        self.engine = self._opened()

    def _opened(self) -> Engine:
        return open_engine(Settings(data_dir=self.data_dir), clock=self.clock, log=Silent())

    @property
    def seq(self) -> int:
        return int(self.engine.status()["seq"])

    @rule(op=SESSION_OPS)
    def change_a_session(self, op: AnyOp) -> None:
        self._with_lease(op)

    @rule(op=ORDER_OPS)
    def change_an_order(self, op: AnyOp) -> None:
        self._with_lease(op)

    @rule(op=ORDER_OPS)
    def change_another_order(self, op: AnyOp) -> None:
        self._with_lease(op)

    @rule(op=RECORD_OPS)
    def change_a_record(self, op: AnyOp) -> None:
        self._with_lease(op)

    @rule(op=CONVERSATION_OPS)
    def change_a_conversation(self, op: AnyOp) -> None:
        self._with_lease(op)

    @rule(op=CONVERSATION_OPS)
    def change_another_conversation(self, op: AnyOp) -> None:
        self._with_lease(op)

    @rule(op=OPS)
    def change_again(self, op: AnyOp) -> None:
        """Most retries come right after the first try."""
        self._with_lease(op)
        self._with_lease(op)

    def _with_lease(self, op: AnyOp) -> None:
        """Half of the writers to a leased session know its generation."""
        if isinstance(op, SessionPut | SessionPatch | SessionTouch) and op.if_version is None:
            until, generation = self.model.leases.get(op.id, (0, 0))
            if until > self.clock.now_ms():
                op = msgspec.structs.replace(op, lease=generation)
        before = self.model.copy()
        try:
            expected = self.model.do(op, self.seq + 1, self.clock.now_ms())
        except Refused as refusal:
            self.model = before
            Life.refusals += 1
            with pytest.raises(HoldfastError) as raised:
                self.engine.submit(op).wait()
            assert raised.value.code == str(refusal)
        else:
            ticket = self.engine.submit(op)
            ticket.wait()
            assert ticket.answer == expected
            Life.changes += 1

    @rule(ops=st.lists(OPS, min_size=1, max_size=5))
    def change_together(self, ops: list[AnyOp]) -> None:
        """All or nothing, whichever is refused."""
        after, expected, seq = self.model.copy(), [], self.seq + 1
        try:
            for op in ops:
                expected.append(after.do(op, seq, self.clock.now_ms()))
        except Refused as refusal:
            with pytest.raises(HoldfastError) as raised:
                self.engine.submit_batch(Batch(ops=ops, atomic=True)).wait()
            assert raised.value.code == str(refusal)
            assert raised.value.index == len(expected)
        else:
            ticket = self.engine.submit_batch(Batch(ops=ops, atomic=True))
            ticket.wait()
            assert ticket.outcomes == expected
            self.model = after

    @rule(seconds=st.sampled_from([1, 61, 3600, 7 * 3600, 25 * 3600]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        """Who is idle too long goes, at most a minute late, and nobody else."""
        expired = self.engine.expire()
        assert expired == self._expire_in_model(), "another number of sessions expired"

    def _expire_in_model(self) -> int:
        return self.model.expire(self.clock.now_ms(), lambda id: self.engine.get("sessions", id) is None)

    @rule()
    def flush(self) -> None:
        self.engine.flush("api")

    @rule()
    def restart(self) -> None:
        self.engine.close()
        self._come_back()

    @rule(cut=st.integers(0, 200))
    def crash(self, cut: int) -> None:
        """What a kill leaves: the files as they are, perhaps with the beginning of an event nobody was told of."""
        left = self.base / str(Life.restarts + 1)
        shutil.copytree(self.data_dir, left, copy_function=shutil.copy2, ignore=shutil.ignore_patterns("*.sock"))
        self.engine.close(flush=False)
        shutil.rmtree(self.data_dir)
        self.data_dir = left
        with max((left / "journal").glob("*.jsonl")).open("ab") as segment:
            segment.write(b'0f3a9c21 {"seq":99,"at":"2026-11-21T06:00:00.000Z","op":"session.put"'[:cut])
        self._come_back()

    def _come_back(self) -> None:
        Life.restarts += 1
        self.engine = self._opened()
        assert self.engine.degraded == []
        # A start drops who became too old meanwhile.
        self._expire_in_model()

    @invariant()
    def equals_the_model(self) -> None:
        for name in ("sessions", "users", "notes", "x_y"):
            self._compare(name, self.model.records[name])
        self._compare("orders", self.model.records["pending"] | self.model.records["closed"])
        assert self.engine.count("orders") == len(self.model.records["pending"])
        sales = msgspec.json.Decoder(float_hook=Decimal).decode(self.engine.sales())
        assert sales["totals"] == {
            "allTimeOrders": self.model.orders,
            "allTimeRevenue": self.model.revenue,
            "allTimeCompleted": self.model.completed,
        }
        assert {day["date"]: day for day in sales["daily"]} == self.model.days
        self._compare_conversations()

    def _compare_conversations(self) -> None:
        """In memory and in the archive, every message, and what is counted of them."""
        heads, messages = self.model.records["conversations"], self.model.messages
        for name in ("conversations", "escalations"):
            self._compare(name, self.model.records[name])
        transcripts = self.engine.transcripts
        for id, head in heads.items():
            found = transcripts.conversation(id)
            assert found is not None
            assert orjson.loads(found.value) == head | {"messages": messages[id]}
        listed = transcripts.page().items
        assert {item.id: orjson.loads(item.value) for item in listed} == heads
        updated = [orjson.loads(item.value)["updated_at"] for item in listed]
        assert updated == sorted(updated, reverse=True)
        waiting = {item.id: orjson.loads(item.value) for item in transcripts.escalations().items}
        assert waiting == self.model.records["escalations"]
        figures = transcripts.figures()
        assert (figures.conversations, figures.archived) == (
            len(heads),
            sum(head["archived"] for head in heads.values()),
        )
        assert figures.messages == sum(map(len, messages.values()))
        assert figures.tokens == sum(head["tokens_used"] for head in heads.values())

    def _compare(self, collection: str, expected: dict[str, dict[str, Any]]) -> None:
        found = {record.id: record for record in self.engine.page(collection, limit=1000).items}
        assert {id: orjson.loads(record.value) for id, record in found.items()} == expected
        for id, record in found.items():
            assert record.version == self.model.versions[collection, id]
            assert self.engine.get(collection, id) == record

    @precondition(lambda self: self.model.records["sessions"])
    @rule()
    def no_header_is_shown(self) -> None:
        for record in self.engine.page("sessions").items:
            assert b"_holdfast" not in record.value

    def teardown(self) -> None:
        self.engine.close(flush=False)
        shutil.rmtree(self.base)


@pytest.mark.timeout(3600 if FULL else 120)
def test_any_sequence_equals_a_dict(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is done in whatever order, with crashes anywhere, the state is that of a plain dict."""
    Life.restarts = Life.changes = Life.refusals = 0
    seed(SEED)(Life)

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )

    with capsys.disabled():
        print(
            f"\n    {EXAMPLES} lives, {Life.changes} changes, {Life.refusals} refusals, {Life.restarts} restarts and crashes: "
            f"all equal the model (seed {SEED})"
        )


def _iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _merged(target: Any, patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396, as its pseudocode has it."""
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        elif isinstance(value, dict):
            result[name] = _merged(result.get(name), value)
        else:
            result[name] = value
    return result


def _new_head(id: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("title", "user_id", "session_id", "created_at", "updated_at"))
    counts = dict.fromkeys(("message_count", "system_count", "tokens_used", "last_number"), 0)
    return {"id": id, "escalated": False, "archived": False, "handler": "bot"} | nothing | counts


def _message(given: Any, number: int, now_ms: int) -> dict[str, Any]:
    names = {"channel": given.channel, "external_id": given.external_id}
    return {
        "number": number,
        "role": given.role,
        "content": given.content,
        "author": given.author or AUTHORS.get(given.role),
        "tokens_used": given.tokens_used,
        "created_at": _iso(now_ms),
        "metadata": (given.metadata or {}) | {name: text for name, text in names.items() if text},
    }


def _delivery(metadata: dict[str, Any]) -> tuple[Any, Any]:
    return metadata.get("channel"), metadata.get("external_id")


def _delivery_of(given: Any) -> tuple[Any, Any]:
    return given.channel, given.external_id


def _number(id: str) -> str | int:
    return int(id) if id.isdigit() else id
