"""A data directory as the old bots leave it: it loads without conversion, and nothing in it is lost."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from holdfast.errors import DataRefused
from tests.engine_harness import Log, running
from tests.replay import Client, Daemon, listed

SESSIONS = 300
ORDERS = 40
DAYS_IN_FILE = 121
DAYS_KEPT = 90
CONVERSATIONS = 20

NAMES = ["Ana Martínez", "李小龙", "O'Neil", "José 🎶", "محمد"]
TEXTS = ["Hola! quiero una USB 🎶", 'line one\nline two\t"quoted" \\ backslash', "zero\u200bwidth e\u0301", "</script>"]


class Legacy(NamedTuple):
    """What an old bot left, and what must become of it.

    Attributes:
        sessions: the surviving ones, whole, by id.
        orders: the valid ones, whole, by id.
        stale, invalid, merged: how many sessions are dropped, skipped, merged; *invalid* counts orders as well.
        days: the figures that are kept, oldest first.
        totals: of all time.
        conversations: the valid ones, whole, by id; one more is broken.
        escalations: ids of those whose customer waits.
    """

    sessions: dict[str, dict[str, Any]]
    orders: dict[str, dict[str, Any]]
    stale: int
    invalid: int
    merged: int
    days: list[dict[str, Any]]
    totals: dict[str, int]
    conversations: dict[str, dict[str, Any]]
    escalations: list[str]


def javascript_time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def python_time(moment: datetime) -> str:
    """Naive, as ``datetime.now().isoformat()``; the daemon's zone is UTC here."""
    return moment.replace(tzinfo=None).isoformat()


def written_by_an_old_bot(directory: Path) -> Legacy:
    """Fill *directory* with files in the old bots' layouts: pretty-printed, some records unusable."""
    rnd = random.Random(11)
    now = datetime.now(UTC)
    rows: list[Any] = []
    alive: dict[str, dict[str, Any]] = {}
    stale = merged = 0
    unusable: list[Any] = [
        {"currentState": "done", "lastActivity": javascript_time(now)},
        {"recipientPhone": "573100000001", "currentState": "done"},
        {"recipientPhone": "573100000002", "lastActivity": "not a time"},
        {"recipientPhone": "", "lastActivity": javascript_time(now)},
        {"recipientPhone": None, "lastActivity": javascript_time(now)},
        ["not", "an", "object"],
        None,
        "text",
    ]
    for number in range(SESSIONS):
        phone = f"57{3_200_000_000 + number}"
        is_stale = rnd.random() < 0.3
        age = timedelta(hours=rnd.uniform(24.1, 400) if is_stale else rnd.uniform(0, 23.5))
        session = {
            "recipientPhone": phone,
            "currentState": rnd.choice(["catalog", "choosing_capacity", "done"]),
            "lastActivity": rnd.choice([javascript_time, python_time])(now - age),
            "pendingData": {"name": rnd.choice(NAMES), "cart": [{"price": 54900.5}], "lastText": rnd.choice(TEXTS)},
            "largest": 2**63 - 1,
            "nested": {"a": {"b": [1, 2.5, None, True, -0.1, 1e-7]}},
        }
        rows.append(session)
        if is_stale:
            stale += 1
            continue
        alive[phone] = session
        if number % 17 == 0:
            newer = session | {"currentState": "newer", "lastActivity": javascript_time(now)}
            rows.insert(rnd.randrange(len(rows)), newer)
            alive[phone] = newer
            merged += 1
    for row in unusable:
        rows.insert(rnd.randrange(len(rows)), row)
    write_pretty(directory / "chat_sessions.json", rows)

    orders: dict[str, dict[str, Any]] = {}
    for number in range(ORDERS):
        order = {
            "odooOrderId": 1000 + number,
            "recipientPhone": f"57{3_200_000_000 + number}",
            "customerName": rnd.choice(NAMES),
            "productType": rnd.choice(["music", "videos"]),
            "price": rnd.randrange(1000, 200_000),
            "status": "pending",
            "createdAt": javascript_time(now - timedelta(days=rnd.uniform(0, 20))),
        }
        orders[str(order["odooOrderId"])] = order
    unusable_orders = [
        {name: value for name, value in orders["1000"].items() if name != "recipientPhone"} | {"odooOrderId": 2000},
        orders["1001"] | {"odooOrderId": None},
        orders["1002"] | {"odooOrderId": True},
    ]
    write_pretty(directory / "pending_orders.json", [*unusable_orders, *orders.values()])

    days = []
    for back in range(DAYS_IN_FILE - 1, -1, -1):
        date = (now - timedelta(days=back)).date().isoformat()
        done = rnd.randrange(20)
        figures = {"totalOrders": done + 3, "completedOrders": done, "totalRevenue": done * 84900}
        days.append({"date": date, **figures, "productTypes": {"music": done, "videos": 3}})
    totals = {"allTimeOrders": 9000, "allTimeRevenue": 300_000_000, "allTimeCompleted": 8000}
    write_pretty(directory / "sales_stats.json", {"daily": days, "totals": totals})
    write_pretty(directory / "contacts.json", [{"id": f"c{number}", "name": NAMES[number]} for number in range(5)])
    write_pretty(directory / "config.json", [{"backup_count": 5}])
    (directory / "users").mkdir()
    for number, name in enumerate(NAMES):
        profile = {"user_id": f"user-{number}", "created_at": python_time(now), "name": name}
        write_pretty(directory / "users" / f"user-{number}.json", profile)
    (directory / "users" / "broken.json").write_text('{"user_id": "bro', encoding="utf-8")
    conversations, escalations = conversations_of_an_old_bot(directory, rnd, now)
    invalid = len(unusable) + len(unusable_orders) + 1
    return Legacy(alive, orders, stale, invalid, merged, days[-DAYS_KEPT:], totals, conversations, escalations)


def conversations_of_an_old_bot(
    directory: Path, rnd: random.Random, now: datetime
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A file for each conversation, some of them escalated, one cut short."""
    for place in ("conversations", "escalations"):
        (directory / place).mkdir()
    conversations: dict[str, dict[str, Any]] = {}
    escalations = []
    for number in range(CONVERSATIONS):
        id = f"conversation-{number}"
        started = now - timedelta(days=rnd.uniform(1, 80))
        messages = [{"role": "system", "content": "You are a helpful assistant"}]
        for turn in range(rnd.randint(1, 12)):
            messages.append({"role": "assistant" if turn % 2 else "user", "content": rnd.choice(TEXTS)})
        conversations[id] = {
            "id": id,
            "created_at": python_time(started),
            "updated_at": python_time(started + timedelta(minutes=5)),
            "title": messages[1]["content"][:50],
            "messages": messages,
            "escalated": number % 5 == 0,
        }
        write_pretty(directory / "conversations" / f"{id}.json", conversations[id])
        if number % 5 == 0:
            escalation = {
                "conversation_id": id,
                "timestamp": python_time(started),
                "reason": "Customer requested assistance",
                "contact_info": {"name": rnd.choice(NAMES)},
                "priority": "high" if number % 10 == 0 else "low",
                "status": "pending",
            }
            write_pretty(directory / "escalations" / f"{id}_escalation.json", escalation)
            escalations.append(id)
    (directory / "conversations" / "broken.json").write_text('{"id": "broken", "messages": [', encoding="utf-8")
    return conversations, escalations


def write_pretty(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


class Loaded(NamedTuple):
    """The old bot's directory and a daemon on it."""

    directory: Path
    legacy: Legacy
    original: bytes
    daemon: Daemon
    client: Client

    def found(self, path: str) -> dict[str, dict[str, Any]]:
        """All records of a list by id."""
        return {item["id"]: item["value"] for item in listed(self.client, path)}


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[Loaded]:
    directory = tmp_path / "data"
    directory.mkdir(mode=0o700)
    legacy = written_by_an_old_bot(directory)
    original = (directory / "chat_sessions.json").read_bytes()
    daemon = Daemon(directory)
    try:
        yield Loaded(directory, legacy, original, daemon, Client(daemon.addresses[0], None))
    finally:
        daemon.close()


def as_read(value: Any) -> Any:
    """*value* as a reader of exact numbers gets it."""
    return json.loads(json.dumps(value), parse_float=Decimal)


def test_counts_are_reported(loaded: Loaded) -> None:
    """``state.loaded`` says how many sessions and orders came, and what was dropped, skipped and merged."""
    legacy = loaded.legacy

    event = loaded.daemon.event("state.loaded")

    assert event["sessions"] == len(legacy.sessions)
    assert event["orders"] == len(legacy.orders)
    assert event["dropped_stale"] == legacy.stale
    assert event["skipped_invalid"] == legacy.invalid
    assert event["merged"] == legacy.merged


def test_every_surviving_record_is_equal_field_by_field(loaded: Loaded) -> None:
    """Sessions, orders and custom collections come back as they were, numbers and all; of two with one id the newer."""
    assert loaded.found("/v1/sessions") == as_read(loaded.legacy.sessions)
    assert loaded.found("/v1/orders") == as_read(loaded.legacy.orders)
    assert [record["name"] for _, record in sorted(loaded.found("/v1/collections/contacts").items())] == NAMES
    assert [profile["name"] for _, profile in sorted(loaded.found("/v1/users").items())] == NAMES


def test_the_last_90_days_of_sales_are_kept(loaded: Loaded) -> None:
    """Older days go, the totals of all time stay."""
    figures = loaded.client.ask("GET", "/v1/stats/sales")

    assert figures["daily"] == loaded.legacy.days
    assert figures["totals"] == loaded.legacy.totals


def test_what_the_old_bot_left_is_kept_beside(loaded: Loaded) -> None:
    """A byte-identical copy of each file stands in the backups, so nothing that was dropped is gone."""
    loaded.daemon.flush()

    kept = list((loaded.directory / "backups").glob("*/chat_sessions.json"))

    assert [path.read_bytes() for path in kept] == [loaded.original]
    assert (loaded.directory / "chat_sessions.json").read_bytes() != loaded.original


def test_the_files_that_replace_them_load_the_same(loaded: Loaded) -> None:
    """After SIGTERM and a second start everything is as after the first, and nothing is dropped or skipped again."""
    sessions, orders = loaded.found("/v1/sessions"), loaded.found("/v1/orders")
    sales = loaded.client.ask("GET", "/v1/stats/sales")

    assert loaded.daemon.stop(signal.SIGTERM) == 0

    again = Daemon(loaded.directory)
    try:
        client = Client(again.addresses[0], None)
        event = again.event("state.loaded")
        second = Loaded(loaded.directory, loaded.legacy, loaded.original, again, client)

        assert (second.found("/v1/sessions"), second.found("/v1/orders")) == (sessions, orders)
        assert client.ask("GET", "/v1/stats/sales") == sales
        assert (event["dropped_stale"], event["skipped_invalid"], event["merged"]) == (0, 0, 0)
    finally:
        again.close()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "truncated"),
        (b"", "truncated"),
        (b"[1]", "user_id"),
        (b'{"user_id": [1]}', "user_id"),
        (b'{"user_id": "big", "n": 1%030d}' % 0, "exactly"),
    ],
)
def test_a_profile_that_cannot_be_taken_is_told_and_kept_aside(content: bytes, reason: str, tmp_path: Path) -> None:
    """As a damaged file is: in the log, in `degraded` until the next start, and in quarantine/ with a report."""
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "good.json").write_bytes(b'\xef\xbb\xbf{"user_id": "good"}')
    (tmp_path / "users" / "bad.json").write_bytes(content)
    log = Log()

    with running(tmp_path, log=log) as engine:
        assert [item.id for item in engine.page("users").items] == ["good"]
        (told,) = engine.degraded
    with running(tmp_path) as engine:
        assert (engine.count("users"), engine.degraded) == (1, [])

    assert "users/bad.json" in told and reason in told
    (event,) = log.named("snapshot.damaged")
    assert event["file"] == "users/bad.json" and reason in event["reason"]
    (kept,) = tmp_path.glob("quarantine/*-users-bad.json")
    assert kept.read_bytes() == content
    report = json.loads(kept.with_name(f"{kept.name}.report.json").read_bytes())
    assert report["file"] == "users/bad.json" and reason in report["reason"]
    assert [path.name for path in (tmp_path / "users").iterdir()] == ["good.json"]


def test_whose_a_profile_is_its_name_says_as_well(tmp_path: Path) -> None:
    """Where the profile itself does not; a name that can be no id makes it one that cannot be taken."""
    (tmp_path / "users").mkdir()
    for name, profile in {"57": {"n": 1}, "58": {"user_id": "", "n": 2}, "59": {"user_id": "60"}, "\x7f": {}}.items():
        (tmp_path / "users" / f"{name}.json").write_text(json.dumps(profile))

    with running(tmp_path) as engine:
        users = {item.id: json.loads(item.value) for item in engine.page("users").items}
        assert len(engine.degraded) == 1

    assert users == {
        "57": {"n": 1, "user_id": "57"},
        "58": {"user_id": "58", "n": 2},
        "60": {"user_id": "60"},
    }


def test_a_profile_that_cannot_be_taken_is_a_reason_not_to_start(tmp_path: Path) -> None:
    """For who wants to be asked; then it stays where it is."""
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "bad.json").write_bytes(b"{")

    with pytest.raises(DataRefused, match=r"users/bad\.json"), running(tmp_path, recovery="strict"):
        pass

    assert (tmp_path / "users" / "bad.json").read_bytes() == b"{"


def test_a_removed_user_does_not_come_back(loaded: Loaded) -> None:
    """The old bot's profile files are read once; a profile that was removed since stays removed."""
    loaded.client.ask("DELETE", "/v1/users/user-0")
    loaded.daemon.stop(signal.SIGTERM)

    again = Daemon(loaded.directory)
    try:
        users = {item["id"] for item in listed(Client(again.addresses[0], None), "/v1/users")}
    finally:
        again.close()

    assert users == {f"user-{number}" for number in range(1, len(NAMES))}


def as_old(client: Client, id: str) -> dict[str, Any]:
    """A conversation in the old bot's form, with its times as moments."""
    whole = client.ask("GET", f"/v1/conversations/{id}")
    messages = [{"role": message["role"], "content": message["content"]} for message in whole["messages"]]
    shown = {field: whole[field] for field in ("id", "created_at", "updated_at", "title", "escalated")}
    return with_moments(shown | {"messages": messages})


def with_moments(conversation: dict[str, Any]) -> dict[str, Any]:
    moments = {}
    for field in ("created_at", "updated_at"):
        moment = datetime.fromisoformat(conversation[field]).replace(tzinfo=UTC)
        moments[field] = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    return conversation | moments


def test_every_conversation_comes_over(loaded: Loaded) -> None:
    """With title, times and every message in order; who waited waits still; the broken one is told and kept aside."""
    legacy = loaded.legacy

    event = loaded.daemon.event("conversations.imported")

    messages = sum(len(conversation["messages"]) for conversation in legacy.conversations.values())
    assert (event["conversations"], event["messages"], event["escalations"], event["broken"]) == (
        CONVERSATIONS,
        messages,
        len(legacy.escalations),
        1,
    )
    for id, conversation in legacy.conversations.items():
        assert as_old(loaded.client, id) == with_moments(conversation)
    waiting = loaded.found("/v1/escalations")
    assert sorted(waiting) == sorted(legacy.escalations)
    assert "broken.json" in loaded.daemon.event("conversation.import_failed")["reason"]
    assert len(list((loaded.directory / "quarantine").glob("*-conversations-broken.json"))) == 1
    storage = loaded.client.ask("GET", "/v1/stats/storage")
    assert (storage["total"], storage["messages"]) == (CONVERSATIONS, messages)


def test_conversations_are_taken_over_once(loaded: Loaded) -> None:
    """A second start has them all, none twice, and none that was deleted meanwhile."""
    loaded.client.ask("DELETE", "/v1/conversations/conversation-0")
    loaded.daemon.stop(signal.SIGKILL)

    again = Daemon(loaded.directory)
    try:
        client = Client(again.addresses[0], None)
        second = loaded._replace(daemon=again, client=client)
        assert sorted(second.found("/v1/conversations")) == sorted(
            set(loaded.legacy.conversations) - {"conversation-0"}
        )
        for id in list(loaded.legacy.conversations)[1:]:
            assert as_old(client, id) == with_moments(loaded.legacy.conversations[id])
        again.stop(signal.SIGTERM)
        assert not [event for event in again.events if event["event"] == "conversations.imported"]
    finally:
        again.close()
