"""Decisions: op + state → event, or a refusal; nothing else."""

from __future__ import annotations

from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import orjson
import pytest

from holdfast.clock import format_ms, parse_ms
from holdfast.core.decide import decide, decide_expiry, due_ms
from holdfast.core.event import Event
from holdfast.errors import (
    Conflict,
    InvalidRecord,
    Leased,
    NotFound,
    TooLarge,
    VersionMismatch,
)
from holdfast.ops import (
    ANY_VERSION,
    AnyOp,
    OrderCancel,
    OrderComplete,
    OrderDelete,
    OrderPatch,
    OrderPut,
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
    UserPatch,
    UserPut,
)
from holdfast.values import ValueLimits
from tests.decide_harness import World
from tests.engine_harness import NOW, NOW_MS

DAY_MS = 86_400_000
HOUR_AGO = "2026-11-21T05:00:00.000Z"


# Versions and conditions, the same for every collection.

KINDS: dict[str, tuple[Any, Any, Any]] = {
    "session": (
        lambda **k: SessionPut(id="1", value={"n": 1}, **k),
        lambda **k: SessionPatch(id="1", value={"n": 2}, **k),
        lambda **k: SessionDelete(id="1", **k),
    ),
    "order": (
        lambda **k: OrderPut(id="1", value={"n": 1}, **k),
        lambda **k: OrderPatch(id="1", value={"n": 2}, **k),
        lambda **k: OrderDelete(id="1", **k),
    ),
    "record": (
        lambda **k: RecordPut(collection="notes", id="1", value={"n": 1}, **k),
        lambda **k: RecordPatch(collection="notes", id="1", value={"n": 2}, **k),
        lambda **k: RecordDelete(collection="notes", id="1", **k),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_versions_count_from_one(kind: str) -> None:
    """Created 201, changed 200, removed 204; and from one again after a removal."""
    put, patch, delete = KINDS[kind]
    world = World()

    answers = [world.do(op) for op in (put(), put(), patch(), delete(), put())]

    assert [(answer.status, answer.version, answer.seq) for answer in answers] == [
        (201, 1, 1),
        (200, 2, 2),
        (200, 3, 3),
        (204, 0, 4),
        (201, 1, 5),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("present", "if_version", "is_met"),
    [(0, None, True), (0, 0, True), (0, 1, False), (0, ANY_VERSION, False), (2, None, True), (2, 2, True), (2, 0, False),
     (2, 1, False), (2, 3, False), (2, ANY_VERSION, True)],
)  # fmt: skip
def test_conditions_on_a_put(kind: str, present: int, if_version: int | None, is_met: bool) -> None:
    """if_version names the version there must be; 0 none, ANY_VERSION any."""
    put, _, _ = KINDS[kind]
    world = World()
    for _ in range(present):
        world.do(put())

    if is_met:
        assert world.do(put(if_version=if_version)).version == present + 1
    else:
        world.refused(put(if_version=if_version), VersionMismatch)


@pytest.mark.parametrize("kind", KINDS)
def test_conditions_on_a_patch_and_a_delete(kind: str) -> None:
    """Absent without a condition is not found; absent with one, or another version, is a mismatch."""
    put, patch, delete = KINDS[kind]
    world = World()
    for op in (patch, delete):
        world.refused(op(), NotFound)
        world.refused(op(if_version=1), VersionMismatch)
        world.refused(op(if_version=ANY_VERSION), VersionMismatch)
    world.do(put())
    for op in (patch, delete):
        world.refused(op(if_version=2), VersionMismatch)
        world.refused(op(if_version=0), VersionMismatch)

    assert world.do(patch(if_version=1)).version == 2
    assert world.do(delete(if_version=ANY_VERSION)).status == 204


# Ids and values.


@pytest.mark.parametrize("id", ["", "x" * 257, "a\nb", "\0", "\x7f", "\ud800", "a\u2028b"])
def test_what_cannot_be_an_id_is_refused(id: str) -> None:
    """By every op that does not need the record to be there."""
    world = World()
    for op in (
        SessionPut(id=id, value={}),
        OrderPut(id=id, value={}),
        UserPut(id=id, value={}),
        RecordPut(collection="notes", id=id, value={}),
        SessionLease(id=id),
        SessionRelease(id=id, generation=1),
    ):
        world.refused(op, InvalidRecord)


def test_ids_up_to_the_limit_are_kept() -> None:
    """256 characters, not bytes; 257 are too many."""
    world = World()

    assert world.do(SessionPut(id="ñ" * 256, value={})).status == 201
    world.refused(SessionPut(id="ñ" * 257, value={}), InvalidRecord)


@pytest.mark.parametrize(
    ("op", "field", "stored"),
    [
        (SessionPut(id="57", value={}), "recipientPhone", "57"),
        (OrderPut(id="57", value={}), "odooOrderId", 57),
        (OrderPut(id="057", value={}), "odooOrderId", "057"),
        (OrderPut(id="0", value={}), "odooOrderId", 0),
        (OrderPut(id="A-1", value={}), "odooOrderId", "A-1"),
        (OrderPut(id="1" * 16, value={}), "odooOrderId", "1" * 16),
        (OrderPut(id="٣", value={}), "odooOrderId", "٣"),
        (UserPut(id="57", value={}), "user_id", "57"),
        (RecordPut(collection="notes", id="57", value={}), "id", "57"),
        (OrderPut(id="57", value={"odooOrderId": "57"}), "odooOrderId", "57"),
        (SessionPut(id="57", value={"recipientPhone": 57}), "recipientPhone", 57),
    ],
)
def test_the_id_field_is_filled_in_when_absent(op: Any, field: str, stored: object) -> None:
    """Orders' digits as a number, as the old bots wrote them; given ones stay as they are."""
    world = World()
    world.do(op)

    name = {"recipientPhone": "sessions", "odooOrderId": "orders", "user_id": "users", "id": "notes"}[field]
    assert world.value(name, op.id)[field] == stored


@pytest.mark.parametrize("given", ["58", 58, 57.0, True, None, ["57"], {}])
def test_another_id_in_the_value_is_refused(given: object) -> None:
    """The record would be found under one id and say another."""
    world = World()

    for op in (
        SessionPut(id="57", value={"recipientPhone": given}),
        OrderPut(id="57", value={"odooOrderId": given}),
        UserPut(id="57", value={"user_id": given}),
        RecordPut(collection="notes", id="57", value={"id": given}),
    ):
        world.refused(op, InvalidRecord)


@pytest.mark.parametrize("patch", [{"recipientPhone": None}, {"recipientPhone": "58"}])
def test_a_patch_does_not_change_the_id(patch: dict[str, Any]) -> None:
    """Neither removed nor renamed."""
    world = World()
    world.do(SessionPut(id="57", value={}))

    world.refused(SessionPatch(id="57", value=patch), InvalidRecord)


def test_the_header_key_is_reserved() -> None:
    """At the top of a value, by put and patch; further inside it is a key like any other."""
    world = World()
    world.do(SessionPut(id="1", value={"deep": {"_holdfast": {"v": 9}}}))
    world.do(UserPut(id="1", value={}))
    for op in (
        SessionPut(id="1", value={"_holdfast": {}}),
        SessionPatch(id="1", value={"_holdfast": None}),
        UserPut(id="1", value={"_holdfast": 1}),
        UserPatch(id="1", value={"_holdfast": {}}),
        OrderPut(id="1", value={"_holdfast": {}}),
    ):
        world.refused(op, InvalidRecord)


def test_limits_bind_the_result_of_a_patch() -> None:
    """Small patches do not add up to a record above the limit."""
    world = World(session_limits=ValueLimits(bytes_max=200))
    world.do(SessionPut(id="1", value={"a": "x" * 100}))

    world.refused(SessionPatch(id="1", value={"b": "x" * 100}), TooLarge)


@pytest.mark.parametrize("name", ["", "Notes", "sessions", "_keys", "../x", "manifest", "x" * 65])
def test_bad_collection_names_are_refused(name: str) -> None:
    """Before any path is made of them."""
    World().refused(RecordPut(collection=name, id="1", value={}), InvalidRecord)


def test_names_of_foreign_files_are_refused() -> None:
    """A collection would overwrite them."""
    world = World(reserved_names={"package": "not an array"})

    assert "package.json" in world.refused(RecordPut(collection="package", id="1", value={}), Conflict)


# Sessions: time and ttl.


def test_put_keeps_a_given_activity_and_fills_in_an_absent_one() -> None:
    """patch moves it only when told to; touch sets it to now."""
    world = World()
    world.do(SessionPut(id="1", value={"lastActivity": HOUR_AGO}))
    world.do(SessionPut(id="2", value={}))
    world.now_ms += 60_000
    assert world.value("sessions", "2")["lastActivity"] == NOW
    world.do(SessionPatch(id="1", value={"n": 1}))
    assert world.value("sessions", "1")["lastActivity"] == HOUR_AGO
    world.do(SessionTouch(id="1"))
    assert world.value("sessions", "1")["lastActivity"] == format_ms(world.now_ms)
    assert world.value("sessions", "1")["n"] == 1


@pytest.mark.parametrize("given", [5, None, "", "2026-11", "soon", ["x"]])
def test_an_activity_that_is_no_time_is_refused(given: object) -> None:
    """It could never expire."""
    World().refused(SessionPut(id="1", value={"lastActivity": given}), InvalidRecord)


def due(world: World, id: str) -> int:
    line = world.state.sessions.get(id)
    assert line is not None
    return due_ms(line, world.rules) - NOW_MS


def test_a_ttl_is_kept_until_another_is_given() -> None:
    """Over put, patch and touch."""
    world = World()
    world.do(SessionPut(id="1", value={"lastActivity": NOW}, ttl="2h"))
    assert due(world, "1") == 2 * 3_600_000
    world.do(SessionPut(id="1", value={"lastActivity": NOW}))
    world.do(SessionPatch(id="1", value={"n": 1}))
    assert due(world, "1") == 2 * 3_600_000
    world.now_ms += 1000
    world.do(SessionTouch(id="1"))
    assert due(world, "1") == 2 * 3_600_000 + 1000
    world.do(SessionTouch(id="1", ttl=90))
    assert due(world, "1") == 91_000


@pytest.mark.parametrize("ttl", [0, -1, "0s", "soon", "", True, float("nan"), float("inf"), "200000d", 1e300])
def test_a_ttl_that_is_none_is_refused(ttl: Any) -> None:
    """Zero, negative, endless, not a duration."""
    World().refused(SessionPut(id="1", value={}, ttl=ttl), InvalidRecord)


def test_expiry_tells_the_idle_from_the_others() -> None:
    """To the millisecond; those gone meanwhile are neither."""
    world = World()
    for n in range(3):
        world.do(SessionPut(id=str(n), value={"lastActivity": format_ms(NOW_MS - DAY_MS + n - 1)}))

    expired, later = decide_expiry(world.state, ["0", "1", "2", "gone"], world.rules, NOW_MS)

    assert expired == ["0", "1"]
    assert later == [("2", NOW_MS + 1)]


def test_a_leased_session_does_not_expire() -> None:
    """It is in use; it waits for the end of the lease."""
    world = World()
    world.do(SessionPut(id="1", value={"lastActivity": format_ms(NOW_MS - 2 * DAY_MS)}))
    world.do(SessionLease(id="1", ttl=30))

    assert decide_expiry(world.state, ["1"], world.rules, NOW_MS) == ([], [("1", NOW_MS + 30_000)])
    assert decide_expiry(world.state, ["1"], world.rules, NOW_MS + 30_000) == (["1"], [])


# Leases.


def test_a_lease_fences_all_others() -> None:
    """While it lasts only its generation writes; without it, another, or an older one is refused."""
    world = World()
    world.do(SessionPut(id="1", value={}))
    lease = world.do(SessionLease(id="1", ttl=30, owner="worker-1"))
    generation = lease.generation
    assert generation is not None
    assert lease.expires_at == format_ms(NOW_MS + 30_000)
    for given in (None, generation + 1, generation - 1):
        for op in (
            SessionPut(id="1", value={}, lease=given),
            SessionPatch(id="1", value={}, lease=given),
            SessionTouch(id="1", lease=given),
            SessionDelete(id="1", lease=given),
        ):
            assert "worker-1" in world.refused(op, Leased)
    world.refused(SessionLease(id="1"), Leased)
    world.refused(SessionRelease(id="1", generation=generation + 1), Leased)

    assert world.do(SessionTouch(id="1", lease=generation)).version == 2
    world.do(SessionPut(id="2", value={}))


def test_generations_grow_for_ever() -> None:
    """Over release, expiry of the lease, and removal of the session."""
    world = World()
    generations = []
    for _ in range(3):
        generation = world.do(SessionLease(id="1", ttl=30)).generation
        assert generation is not None
        generations.append(generation)
        world.do(SessionRelease(id="1", generation=generation))
        generation = world.do(SessionLease(id="1", ttl=30)).generation
        assert generation is not None
        generations.append(generation)
        world.now_ms += 30_000

    assert generations == sorted(set(generations))


def test_an_ended_lease_is_worth_nothing() -> None:
    """A write under it is refused, so is renewing it; the session is free."""
    world = World()
    world.do(SessionPut(id="1", value={}))
    generation = world.do(SessionLease(id="1", ttl=30)).generation
    world.now_ms += 30_000

    world.refused(SessionTouch(id="1", lease=generation), Conflict)
    world.refused(SessionLease(id="1", generation=generation), Conflict)
    assert world.do(SessionTouch(id="1")).version == 2
    assert world.do(SessionRelease(id="1", generation=generation or 0)).status == 200


def test_a_lease_is_renewed_by_its_generation() -> None:
    """The end moves, the generation stays."""
    world = World()
    first = world.do(SessionLease(id="1", ttl=30))
    world.now_ms += 20_000

    renewed = world.do(SessionLease(id="1", ttl=30, generation=first.generation))

    assert renewed.generation == first.generation
    assert renewed.expires_at == format_ms(NOW_MS + 50_000)


@pytest.mark.parametrize(("ttl", "is_kept"), [(0.001, True), (3600, True), ("1h", True), (3601, False), (0, False)])
def test_leases_end_within_an_hour(ttl: Any, is_kept: bool) -> None:
    """A worker that needs longer renews."""
    world = World()
    op = SessionLease(id="1", ttl=ttl)
    if is_kept:
        assert world.do(op).status == 200
    else:
        world.refused(op, InvalidRecord)


# Orders and figures.


def test_an_order_counts_once() -> None:
    """However often it is put, completed, deleted and put again."""
    world = World()
    for _ in range(2):
        world.do(OrderPut(id="1", value={"productType": "ring"}))
        world.do(OrderPut(id="1", value={"productType": "watch"}))
        world.do(OrderDelete(id="1"))
    assert world.totals() == (1, 0, 0)
    for _ in range(2):
        world.do(OrderPut(id="1", value={}))
        for _ in range(3):
            world.do(OrderComplete(id="1", revenue=Decimal("10.10")))
        assert world.totals() == (1, 1, Decimal("10.10"))
        world.do(OrderDelete(id="1"))

    day = world.state.sales.days["2026-11-21"]
    assert day["productTypes"] == {"ring": 1}
    assert (day["totalOrders"], day["completedOrders"], day["totalRevenue"]) == (1, 1, Decimal("10.10"))


def test_repeating_a_completion_tells_the_first_one() -> None:
    """Same version, no event, whatever revenue it names."""
    world = World()
    world.do(OrderPut(id="1", value={}))
    first = world.do(OrderComplete(id="1", revenue=Decimal(5)))

    again = world.do(OrderComplete(id="1", revenue=Decimal(7)))

    assert again == first
    assert world.value("completed_orders", "1")["revenue"] == 5
    assert world.value("orders", "1") is None


def test_revenue_that_is_told_later_counts_once() -> None:
    """The completion was counted already; an order that was deleted and begun anew counts nothing a second time."""
    world = World()
    for _ in range(2):
        world.do(OrderPut(id="1", value={}))
        world.do(OrderComplete(id="1"))
        paid = world.do(OrderComplete(id="1", revenue=Decimal("10.10")))
        again = world.do(OrderComplete(id="1", revenue=Decimal("99")))
        assert paid == again and world.value("completed_orders", "1")["revenue"] == 10.1
        assert world.totals() == (1, 1, Decimal("10.10"))
        world.do(OrderDelete(id="1"))

    assert world.state.sales.days["2026-11-21"]["completedOrders"] == 1


def test_a_completed_order_keeps_its_revenue_digit_by_digit() -> None:
    """No float between request and record."""
    world = World()
    world.do(OrderPut(id="1", value={}))
    world.do(OrderComplete(id="1", revenue=Decimal("123456789012345678.10")))

    line = world.state.completed_orders.get("1")
    assert line is not None
    assert b'"revenue":123456789012345678.10' in line


def test_a_closed_order_is_closed() -> None:
    """Completed and cancelled ones refuse every change but their own repetition and removal."""
    world = World()
    for id, close, other in (
        ("1", OrderComplete(id="1"), OrderCancel(id="1")),
        ("2", OrderCancel(id="2", reason="no stock"), OrderComplete(id="2")),
    ):
        world.do(OrderPut(id=id, value={}))
        world.do(close)
        for op in (OrderPut(id=id, value={}), OrderPatch(id=id, value={}), other):
            world.refused(op, Conflict)
        assert world.do(close).version == 2
        assert world.do(OrderDelete(id=id)).status == 204
    assert world.totals() == (2, 1, 0)


def test_only_existing_orders_are_closed() -> None:
    """No completion of what nobody ordered."""
    world = World()
    for op in (OrderComplete(id="1"), OrderCancel(id="1"), OrderDelete(id="1"), OrderPatch(id="1", value={})):
        world.refused(op, NotFound)


@pytest.mark.parametrize("zone", ["UTC", "America/Bogota", "Europe/Berlin", "Pacific/Kiritimati"])
@pytest.mark.parametrize(
    "created",
    [None, 5, "soon", "2026-11-20T23:30:00", "2027-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z",
     "0001-01-01T00:00:00", "9999-12-31T23:59:59.999999"],
)  # fmt: skip
def test_an_order_counts_on_the_day_it_was_made(zone: str, created: object) -> None:
    """createdAt in the configured zone when that is a time not in the future; else today; never an error."""
    world = World(zone=ZoneInfo(zone))
    world.do(OrderPut(id="1", value={"createdAt": created}))

    today = "2026-11-21"
    if created == "2026-11-20T23:30:00":
        assert list(world.state.sales.days) == ["2026-11-20"]
    elif isinstance(created, str) and created.startswith("0001"):
        assert list(world.state.sales.days) in ([], [today])
    else:
        assert list(world.state.sales.days) == [today]
    assert world.totals()[0] == 1


@pytest.mark.parametrize("at", ["soon", "2026-11-22T00:00:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "", 5])
def test_figures_of_no_possible_day_are_refused(at: Any) -> None:
    """The future, and days that no calendar of the zone has."""
    world = World(zone=ZoneInfo("America/Bogota"))

    world.refused(StatsOrder(at=at), InvalidRecord)
    world.refused(StatsCompletion(at=at), InvalidRecord)


@pytest.mark.parametrize(
    "op",
    [
        StatsOrder(product_type="\ud800"),
        StatsOrder(product_type="x" * 300),
        StatsOrder(product_type=5),  # type: ignore[arg-type]
        OrderPut(id="1", value={"productType": 5}),
        OrderPut(id="1", value={"productType": "x" * 300}),
        SessionLease(id="1", owner="\ud800"),
        SessionLease(id="1", owner="x" * 300),
        StatsCompletion(revenue=Decimal(-1)),
        StatsCompletion(revenue=Decimal("NaN")),
    ],
)
def test_what_no_journal_line_could_hold_is_refused(op: AnyOp) -> None:
    """Before anything is changed."""
    World().refused(op, InvalidRecord)


def test_a_reason_that_is_no_text_is_refused() -> None:
    """The order stays as it was."""
    world = World()
    world.do(OrderPut(id="1", value={}))

    world.refused(OrderCancel(id="1", reason="\ud800"), InvalidRecord)


# Idempotency keys.


def test_a_repeat_is_told_the_first_answer() -> None:
    """For 24 hours, whatever happened since; then it is a new op."""
    world = World()
    op = UserPut(id="1", value={}, idempotency_key="k")
    first = world.do(op)
    world.do(UserPut(id="1", value={"n": 2}))
    world.now_ms += DAY_MS - 1

    assert world.do(op) == first
    assert world.state.seq == 2
    world.now_ms += 1
    assert world.do(op).version == 3


def test_a_key_belongs_to_one_op() -> None:
    """Another op, another record, or another collection under it is a mistake worth telling."""
    world = World()
    world.do(RecordPut(collection="notes", id="1", value={}, idempotency_key="k"))

    for op in (
        RecordPut(collection="notes", id="2", value={}, idempotency_key="k"),
        RecordPut(collection="others", id="1", value={}, idempotency_key="k"),
        RecordPatch(collection="notes", id="1", value={}, idempotency_key="k"),
        StatsOrder(idempotency_key="k"),
    ):
        world.refused(op, Conflict)


def test_a_refused_op_does_not_use_up_its_key() -> None:
    """It may succeed later under the same key."""
    world = World()
    op = UserPatch(id="1", value={}, idempotency_key="k")
    world.refused(op, NotFound)
    world.do(UserPut(id="1", value={}))

    assert world.do(op).version == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "a\nb", "\ud800"])
def test_what_cannot_be_a_key_is_refused(key: str) -> None:
    """1 to 255 printable characters."""
    World().refused(UserPut(id="1", value={}, idempotency_key=key), InvalidRecord)


def test_events_hold_results_only() -> None:
    """What an event says does not depend on who reads it when: whole value, version, the day's figures."""
    world = World()
    world.do(SessionPut(id="1", value={"n": 1}))

    event = decide(world.state, SessionPatch(id="1", value={"m": 2}), world.rules, 2, NOW_MS)

    assert isinstance(event, Event)
    assert orjson.loads(bytes(event.value)) == {"recipientPhone": "1", "n": 1, "lastActivity": NOW, "m": 2}
    assert (event.seq, event.version, event.at) == (2, 2, NOW)
    assert parse_ms(event.at) == NOW_MS
