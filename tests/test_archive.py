"""What every archive does, whatever it stores in."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from holdfast.archive.base import (
    Archive,
    ArchiveError,
    ConversationQuery,
    Escalation,
    EscalationQuery,
    Head,
    MessageQuery,
)
from holdfast.archive.sqlite import open_sqlite
from holdfast.clock import format_ms, parse_ms
from holdfast.core.event import Event, StoredMessage

DAY_MS = 86_400_000
T0_MS = 1_795_000_000_000

Opener = Callable[[], Archive]

IMPLEMENTATIONS: dict[str, Callable[[Path], Archive]] = {"sqlite": lambda path: open_sqlite(path / "archive.db")}
"""By name, each opened in an empty directory, or in one where it was before."""


@pytest.fixture(params=IMPLEMENTATIONS)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    """Opens the same archive each time."""
    open_in = IMPLEMENTATIONS[request.param]
    return lambda: open_in(tmp_path)


@pytest.fixture
def archive(opener: Opener) -> Iterator[Archive]:
    opened = opener()
    yield opened
    wrong = [] if _is_closed(opened) else opened.check()
    opened.close()
    assert not wrong


def head_of(id: str, version: int = 1, **fields: Any) -> Head:
    value: dict[str, Any] = {
        "id": id,
        "title": "Hola",
        "user_id": None,
        "session_id": None,
        "created_at": format_ms(T0_MS),
        "updated_at": format_ms(T0_MS),
        "escalated": False,
        "archived": False,
        "handler": "bot",
        "message_count": version,
        "system_count": 0,
        "tokens_used": 0,
        "last_number": version,
    }
    return Head(id, version, orjson.dumps(value | fields))


def message(number: int, created_ms: int = T0_MS, **fields: Any) -> StoredMessage:
    given = {"role": "user", "author": "customer", "content": f"message {number}"}
    return StoredMessage(**given | fields, number=number, created_ms=created_ms)


def appended(head: Head, *messages: StoredMessage) -> Event:
    return Event(
        op="message.append", id=head.id, version=head.version, value=msgspec.Raw(head.value), messages=[*messages]
    )


def changed(op: str, head: Head, **fields: Any) -> Event:
    return Event(op=op, id=head.id, version=head.version, value=msgspec.Raw(head.value), **fields)


def deleted(id: str) -> Event:
    return Event(op="conversation.delete", id=id)


def escalation_of(id: str, version: int = 1, **fields: Any) -> Escalation:
    value = {
        "id": id,
        "conversation_id": id,
        "reason": "wants a person",
        "contact_info": {"phone": "573001234567"},
        "priority": "low",
        "status": "pending",
        "assignee": None,
        "opened_at": format_ms(T0_MS),
    }
    return Escalation(id, version, orjson.dumps(value | fields))


def escalated(escalation: Escalation, head: Head) -> Event:
    return Event(
        op="escalation.open",
        id=escalation.id,
        version=escalation.version,
        value=msgspec.Raw(escalation.value),
        head=msgspec.Raw(head.value),
        head_version=head.version,
    )


def apply(archive: Archive, *events: Event) -> None:
    """Apply each of *events* as one with the next seq, all in one transaction."""
    first = archive.archived_seq + 1
    archive.apply(list(enumerate(events, first)), first + len(events) - 1)


def numbers(archive: Archive, id: str, **wanted: Any) -> list[int]:
    return [one.number for one in archive.messages(id, MessageQuery(**wanted))]


def ids(heads: Sequence[Head | Escalation]) -> list[str]:
    return [head.id for head in heads]


def _is_closed(archive: Archive) -> bool:
    try:
        archive.message_counts()
    except ArchiveError:
        return True
    return False


# Messages.


MESSAGES = [
    message(1, role="system", author="", content="Be kind."),
    message(2, T0_MS + 1, content="¿Cuánto cuesta? 💎\0 价格\n\"quoted\" \\ 'x'", tokens_used=0),
    message(
        3,
        T0_MS + 2,
        role="assistant",
        author="bot",
        content="",
        tokens_used=2**53,
        metadata=msgspec.Raw(b'{"tool_calls":[{"id":"a"}],"n":18446744073709551615}'),
    ),
    message(4, T0_MS + 3, role="tool", author="", content="84.900", metadata=msgspec.Raw(b'{"tool_call_id":"a"}')),
    message(5, T0_MS + 3, role="assistant", author="agent", channel="whatsapp", external_id="wamid.1"),
    message(9, T0_MS - 5, external_id="x", content="y" * 50_000),
    message(2**31, T0_MS + 9, author="customer", channel="web"),
]


def test_messages_come_back_as_they_were(archive: Archive) -> None:
    """Every field of every kind of message, in order, from one conversation and no other."""
    apply(archive, appended(head_of("a"), message(1), message(2)), appended(head_of("b"), *MESSAGES))
    apply(archive, appended(head_of("c"), message(7)))

    assert archive.messages("b", MessageQuery()) == MESSAGES
    assert numbers(archive, "a") == [1, 2]
    assert numbers(archive, "c") == [7]
    assert archive.message_counts() == {"a": 2, "b": len(MESSAGES), "c": 1}


def test_an_unknown_conversation_has_no_messages(archive: Archive) -> None:
    """Nor an error."""
    assert archive.messages("nobody", MessageQuery()) == []
    assert archive.external_numbers("nobody", [("web", "1")]) == {}


def test_messages_are_filtered_as_asked(archive: Archive) -> None:
    """Numbers, role, author and time, alone and together, from either end, as a plain filter would."""
    kept = [
        message(n, T0_MS + random.Random(n).randrange(50), role=role, author=author)
        for n, (role, author) in enumerate(
            [("system", ""), ("user", "customer"), ("assistant", "bot"), ("assistant", "agent"), ("tool", "")] * 12, 1
        )
    ]
    apply(archive, appended(head_of("a"), *kept))
    choose = random.Random(7).choice

    for _ in range(300):
        wanted = MessageQuery(
            after=choose([0, 0, 5, 30, 60, 2**40]),
            before=choose([None, None, 0, 1, 31, 61, 2**40]),
            role=choose([None, None, "user", "assistant", "tool", "system", "nobody"]),
            author=choose([None, None, "bot", "agent", "customer", "nobody"]),
            since_ms=choose([None, None, T0_MS, T0_MS + 20, 2**63]),
            until_ms=choose([None, None, T0_MS, T0_MS + 30, -(2**63)]),
            limit=choose([0, 1, 3, 100]),
            newest=choose([True, False]),
        )
        matching = [one for one in kept if _matches(one, wanted)]
        cut = matching[max(0, len(matching) - wanted.limit) :] if wanted.newest else matching[: wanted.limit]

        assert archive.messages("a", wanted) == cut, wanted


def _matches(one: StoredMessage, wanted: MessageQuery) -> bool:
    return (
        one.number > wanted.after
        and (wanted.before is None or one.number < wanted.before)
        and wanted.role in (None, one.role)
        and wanted.author in (None, one.author)
        and (wanted.since_ms is None or one.created_ms >= wanted.since_ms)
        and (wanted.until_ms is None or one.created_ms < wanted.until_ms)
    )


def test_external_ids_lead_to_the_messages_of_their_conversation(archive: Archive) -> None:
    """By channel and external id together, the one without a channel as well; unknown ones are left out."""
    apply(
        archive, appended(head_of("b"), *MESSAGES), appended(head_of("c"), message(1, channel="web", external_id="1"))
    )

    found = archive.external_numbers(
        "b", [("whatsapp", "wamid.1"), ("", "x"), ("web", "x"), ("web", "1"), ("whatsapp", "")]
    )

    assert found == {("whatsapp", "wamid.1"): 5, ("", "x"): 9}


# Exactly once.


def test_an_event_counts_once(archive: Archive) -> None:
    """What a crash has applied again, whole or from its middle on, changes nothing; what is new is taken."""
    events = [(seq, appended(head_of("a", seq), message(seq, tokens_used=seq))) for seq in range(1, 8)]
    archive.apply(events[:5], 5)

    archive.apply(events[:5], 5)
    archive.apply(events[2:4], 4)
    archive.apply(events[3:], 9)

    assert archive.archived_seq == 9
    assert numbers(archive, "a") == list(range(1, 8))
    figures = archive.figures(T0_MS)
    assert (figures.messages, figures.tokens, figures.conversations) == (7, 28, 1)


def test_an_old_event_does_not_undo_a_newer_one(archive: Archive) -> None:
    """A deletion that comes again, behind what began under the same id after it, is passed over."""
    life = [appended(head_of("a"), message(1)), deleted("a"), appended(head_of("a"), message(1), message(2))]
    archive.apply(list(enumerate(life, 1)), 3)

    archive.apply([(2, deleted("a")), (4, appended(head_of("b"), message(1)))], 4)

    assert archive.message_counts() == {"a": 2, "b": 1}


def test_a_message_that_is_there_is_not_doubled(archive: Archive) -> None:
    """An event with a number that came before, from a rebuild, adds only the others."""
    apply(archive, appended(head_of("a", 3), message(2), message(3)))

    apply(archive, appended(head_of("a", 4), message(1), message(2), message(4)), appended(head_of("a", 4), message(4)))

    assert numbers(archive, "a") == [1, 2, 3, 4]
    assert archive.figures(T0_MS).messages == 4


def test_events_that_do_not_concern_it_move_it_forward(archive: Archive) -> None:
    """Sessions and orders are not its business, but its seq goes on."""
    archive.apply([(3, Event(op="session.put", id="a"))], 12)

    assert archive.archived_seq == 12
    assert archive.conversations(ConversationQuery()) == []


def test_it_goes_on_where_it_was(opener: Opener) -> None:
    """Closed and opened again: the same seq, the same content, all of it durable."""
    archive = opener()
    apply(archive, appended(head_of("b"), *MESSAGES), escalated(escalation_of("b"), head_of("b", 2, escalated=True)))
    before = _everything(archive)
    archive.close()
    archive.close()

    again = opener()

    assert (again.archived_seq, again.durable_seq) == (2, 2)
    assert _everything(again) == before
    assert again.check() == []
    again.close()


def test_a_checkpoint_makes_durable(archive: Archive) -> None:
    """``durable_seq`` follows at checkpoints, and never runs ahead."""
    apply(archive, appended(head_of("a"), message(1)))
    assert archive.durable_seq <= archive.archived_seq == 1

    archive.checkpoint()

    assert archive.durable_seq == 1


def _everything(archive: Archive) -> object:
    heads = archive.conversations(ConversationQuery())
    return (
        heads,
        [archive.messages(head.id, MessageQuery()) for head in heads],
        archive.escalations(EscalationQuery()),
        msgspec.structs.replace(archive.figures(T0_MS), bytes=0),
    )


def test_odd_questions_have_answers(archive: Archive) -> None:
    """Times, limits and numbers beyond 64 bits mean all or nothing; text that is none is an ArchiveError."""
    apply(archive, appended(head_of("a"), message(1)), escalated(escalation_of("a"), head_of("a", 2)))
    huge = 2**80

    for ms in (huge, -huge):
        archive.figures(ms)
        archive.count_archivable(ms)
        archive.archivable(ms, 10)
        archive.expirable(ms, 10)
        archive.conversations(ConversationQuery(since_ms=ms, until_ms=ms, after=(ms, ""), limit=ms))
        archive.escalations(EscalationQuery(after=("low", ms, ""), limit=ms))
        archive.messages("a", MessageQuery(after=ms, before=ms, since_ms=ms, until_ms=ms, limit=ms))
    assert ids(archive.conversations(ConversationQuery(since_ms=-huge, until_ms=huge, limit=huge))) == ["a"]
    assert numbers(archive, "a", after=-huge, before=huge, since_ms=-huge, until_ms=huge, limit=huge) == [1]
    with pytest.raises(ArchiveError):
        archive.messages("\ud800", MessageQuery())


@pytest.mark.parametrize(
    "bad",
    [
        Event(op="conversation.put", id="x", version=1, value=msgspec.Raw(b"{")),
        Event(op="conversation.put", id="x", version=1, value=msgspec.Raw(b'{"updated_at":"yesterday"}')),
        Event(op="conversation.put", id="x", version=2**80, value=msgspec.Raw(head_of("x").value)),
        appended(head_of("x"), message(1, tokens_used=2**70)),
        appended(head_of("x"), message(1, role="nobody")),
        escalated(Escalation("x", 1, b'{"status":3}'), head_of("x")),
    ],
    ids=["cut", "no-time", "huge-version", "huge-tokens", "no-role", "odd-escalation"],
)
def test_what_cannot_be_stored_changes_nothing(archive: Archive, bad: Event) -> None:
    """One of many events is impossible: none of them is stored, and the archive goes on."""
    apply(archive, appended(head_of("a"), message(1)))
    before = _everything(archive)

    with pytest.raises(ArchiveError):
        apply(archive, appended(head_of("a", 2), message(2)), bad, appended(head_of("b"), message(1)))

    assert (archive.archived_seq, _everything(archive)) == (1, before)
    apply(archive, appended(head_of("a", 2), message(2)))
    assert numbers(archive, "a") == [1, 2]


# Conversations.


def test_a_conversation_is_what_its_last_event_says(archive: Archive) -> None:
    """Appending, storing, archiving and holding each leave their head, all in one transaction or one by one."""
    steps = [
        appended(head_of("a", 1), message(1)),
        changed("conversation.put", head_of("a", 2, title="Other")),
        changed("conversation.hold", head_of("a", 3, hold=True)),
        changed("conversation.archive", head_of("a", 4, archived=True)),
    ]

    apply(archive, *steps)
    for step in steps:
        apply(archive, step)
        assert archive.conversations(ConversationQuery()) == [Head("a", step.version, bytes(step.value))]

    assert numbers(archive, "a") == [1]


def test_lists_are_newest_first_and_filtered_as_asked(archive: Archive) -> None:
    """User, session, escalated, archived and time in any combination, page by page, as a plain filter and sort would."""
    rnd = random.Random(3)
    kept: list[tuple[int, Head, dict[str, Any]]] = []
    for n in range(160):
        fields = {
            "user_id": rnd.choice([None, "u1", "u2"]),
            "session_id": rnd.choice([None, "s1", "s2"]),
            "escalated": rnd.random() < 0.3,
            "archived": rnd.random() < 0.3,
        }
        updated_ms = T0_MS + rnd.randrange(40)
        kept.append((updated_ms, head_of(f"ñ{n}", updated_at=format_ms(updated_ms), **fields), fields))
    apply(archive, *(changed("conversation.put", head) for _, head, _ in kept))
    kept.sort(key=lambda one: (one[0], one[1].id), reverse=True)

    for _ in range(300):
        given = {
            "user_id": rnd.choice([None, None, "u1", "u3"]),
            "session_id": rnd.choice([None, None, "s1", "s3"]),
            "escalated": rnd.choice([None, True, False]),
            "archived": rnd.choice([None, True, False]),
        }
        since_ms, until_ms = rnd.choice([None, T0_MS + 9]), rnd.choice([None, T0_MS + 25])
        expected = [
            head
            for updated_ms, head, fields in kept
            if all(value is None or fields[name] == value for name, value in given.items())
            and (since_ms is None or updated_ms >= since_ms)
            and (until_ms is None or updated_ms < until_ms)
        ]
        found: list[Head] = []
        after = None
        while page := archive.conversations(
            ConversationQuery(**given, since_ms=since_ms, until_ms=until_ms, after=after, limit=17)
        ):
            found += page
            after = parse_ms(orjson.loads(page[-1].value)["updated_at"]), page[-1].id

        assert found == expected, given


def test_a_deleted_conversation_leaves_nothing(archive: Archive) -> None:
    """Messages and escalation go with it; what comes under its id afterwards begins anew, even at once."""
    apply(archive, appended(head_of("a", 2), message(1), message(2)), appended(head_of("b"), message(1)))
    apply(archive, escalated(escalation_of("a"), head_of("a", 3, escalated=True)))

    apply(archive, deleted("a"), deleted("nobody"))
    assert ids(archive.conversations(ConversationQuery())) == ["b"]
    assert archive.messages("a", MessageQuery()) == []
    assert archive.escalations(EscalationQuery()) == []

    apply(archive, appended(head_of("a"), message(1)), deleted("a"), appended(head_of("a"), message(5)), deleted("b"))
    assert archive.message_counts() == {"a": 1}
    assert numbers(archive, "a") == [5]
    assert archive.figures(T0_MS).messages == 1


# Escalations.


def test_escalations_are_listed_high_first_then_oldest(archive: Archive) -> None:
    """By status and priority or all, page by page; an escalation that changes has one place in the list."""
    rnd = random.Random(5)
    kept = {}
    for n in [*range(80), *range(0, 80, 3)]:
        fields = {
            "priority": rnd.choice(["low", "high"]),
            "status": rnd.choice(["pending", "claimed", "resolved"]),
            "opened_at": format_ms(T0_MS + rnd.randrange(30)),
        }
        kept[f"c{n}"] = (escalation_of(f"c{n}", n + 1, **fields), fields)
        apply(archive, escalated(kept[f"c{n}"][0], head_of(f"c{n}", escalated=True)))
    in_order = sorted(kept.values(), key=lambda one: (one[1]["priority"] != "high", one[1]["opened_at"], one[0].id))

    for status in (None, "pending", "claimed", "nothing"):
        for priority in (None, "low", "high", "nothing"):
            expected = [
                escalation
                for escalation, fields in in_order
                if status in (None, fields["status"]) and priority in (None, fields["priority"])
            ]
            found: list[Escalation] = []
            after = None
            while page := archive.escalations(EscalationQuery(status=status, priority=priority, after=after, limit=7)):
                found += page
                last = orjson.loads(page[-1].value)
                after = last["priority"], parse_ms(last["opened_at"]), last["id"]

            assert found == expected, (status, priority)
            before_high = ("high", -(2**63), "")
            assert archive.escalations(EscalationQuery(status=status, priority=priority, after=before_high)) == expected
    assert archive.escalations(EscalationQuery(priority="high", after=("low", T0_MS, ""))) == []


# Figures.


def test_figures_are_exact(archive: Archive) -> None:
    """Whatever was appended, archived, expired and deleted, each figure is what counting gives, at any moment."""
    rnd = random.Random(11)
    model: dict[str, tuple[dict[str, Any], dict[int, StoredMessage]]] = {}
    for round_number in range(60):
        events: list[Event] = []
        for _ in range(rnd.randrange(1, 6)):
            events.append(_random_change(rnd, model))
        apply(archive, *events)

        now_ms = T0_MS + rnd.randrange(-100, 400) * DAY_MS // 4
        figures = archive.figures(now_ms)
        assert figures.bytes > 0
        assert msgspec.structs.asdict(figures) | {"bytes": 0} == _counted(model, now_ms) | {"bytes": 0}, round_number
        quarter_ms = now_ms - 90 * DAY_MS
        assert archive.count_archivable(quarter_ms) == figures.old
        assert len(archive.archivable(quarter_ms, 10_000)) == figures.old


def _random_change(rnd: random.Random, model: dict[str, tuple[dict[str, Any], dict[int, StoredMessage]]]) -> Event:
    id = f"c{rnd.randrange(12)}"
    fields, messages = model.get(id, ({"archived": False, "escalated": False, "updated_ms": T0_MS}, {}))
    kind = rnd.choice(["append"] * 5 + ["archive", "put", "expire", "delete"])
    if kind == "delete":
        model.pop(id, None)
        return deleted(id)
    fields = fields | {"updated_ms": T0_MS + rnd.randrange(-100 * DAY_MS, 100 * DAY_MS)}
    if kind == "archive":
        fields = fields | {"archived": rnd.random() < 0.7}
    if kind == "put":
        fields = fields | {"escalated": rnd.random() < 0.5}
    head = head_of(
        id, archived=fields["archived"], escalated=fields["escalated"], updated_at=format_ms(fields["updated_ms"])
    )
    if kind == "expire":
        before, up_to = T0_MS + rnd.randrange(-50, 50) * DAY_MS, rnd.randrange(1, 30)
        messages = {n: one for n, one in messages.items() if n > up_to or one.created_ms >= before}
        model[id] = (fields, messages)
        return changed("message.expire", head, up_to=up_to, before=before)
    added = {}
    if kind == "append":
        last = max(messages, default=0)
        for n in range(last + 1, last + rnd.randrange(2, 5)):
            role, author = rnd.choice([("system", ""), ("user", "customer"), ("assistant", "bot")])
            created_ms = T0_MS + rnd.randrange(-100 * DAY_MS, 100 * DAY_MS)
            added[n] = message(n, created_ms, role=role, author=author, tokens_used=rnd.choice([None, n]))
    model[id] = (fields, messages | added)
    return appended(head, *added.values()) if kind == "append" else changed(f"conversation.{kind}", head)


def _counted(model: dict[str, tuple[dict[str, Any], dict[int, StoredMessage]]], now_ms: int) -> dict[str, int]:
    heads = [fields for fields, _ in model.values()]
    messages = [one for _, some in model.values() for one in some.values()]
    awake = [fields["updated_ms"] for fields in heads if not fields["archived"]]
    return {
        "conversations": len(heads),
        "active": sum(updated_ms >= now_ms - 30 * DAY_MS for updated_ms in awake),
        "old": sum(updated_ms < now_ms - 90 * DAY_MS for updated_ms in awake),
        "archived": sum(fields["archived"] for fields in heads),
        "escalated": sum(fields["escalated"] for fields in heads),
        "messages": len(messages),
        "system_messages": sum(one.role == "system" for one in messages),
        "messages_last_30_days": sum(one.created_ms >= now_ms - 30 * DAY_MS for one in messages),
        "tokens": sum(one.tokens_used or 0 for one in messages),
    }


def test_times_before_1970_count_too(archive: Archive) -> None:
    """Old clocks put messages anywhere; a day before the first of all is a day."""
    apply(archive, appended(head_of("a", updated_at="1969-12-31T12:00:00.000Z"), message(1, -1), message(2, -DAY_MS)))

    assert archive.figures(29 * DAY_MS).messages_last_30_days == 2
    assert archive.figures(30 * DAY_MS - 1).messages_last_30_days == 1
    assert archive.figures(0).active == 1


# Retention.


def test_archivable_conversations_come_in_portions(archive: Archive) -> None:
    """Those not archived and last updated before the moment, by id, each once."""
    apply(
        archive,
        *(
            changed("conversation.put", head_of(f"c{n:03}", archived=n % 3 == 0, updated_at=format_ms(T0_MS + n)))
            for n in range(100)
        ),
    )

    found: list[str] = []
    after = ""
    while portion := archive.archivable(T0_MS + 80, 7, after):
        assert len(portion) <= 7
        found += ids(portion)
        after = portion[-1].id

    assert found == [f"c{n:03}" for n in range(80) if n % 3]
    assert archive.count_archivable(T0_MS + 80) == len(found)
    assert archive.archivable(T0_MS + 80, 0) == []


def test_expirable_messages_are_counted_before_they_go(archive: Archive) -> None:
    """How many, of the system, with how many tokens and bytes, up to which number; expiring them leaves the others."""
    apply(
        archive,
        appended(
            head_of("a", 5),
            message(1, T0_MS, role="system", author="", content="é", tokens_used=3),
            message(2, T0_MS + 5, tokens_used=4),
            message(3, T0_MS + 1, content="", metadata=msgspec.Raw(b'{"a":1}')),
            message(4, T0_MS + 9),
        ),
        appended(head_of("b"), message(1, T0_MS + 9)),
        appended(head_of("c"), message(1, T0_MS)),
        changed("conversation.put", head_of("d")),
    )

    first, second = archive.expirable(T0_MS + 5, 10)
    assert (first.head, first.up_to, first.messages, first.system, first.tokens) == (head_of("a", 5), 3, 2, 1, 3)
    assert first.bytes == len("é".encode()) + len(b'{"a":1}')
    assert second.head.id == "c"
    assert archive.expirable(T0_MS + 5, 1) == [first]
    assert archive.expirable(T0_MS + 5, 1, "a") == [second]

    apply(archive, changed("message.expire", head_of("a", 6), up_to=first.up_to, before=T0_MS + 5))
    assert numbers(archive, "a") == [2, 4]
    assert [one.head.id for one in archive.expirable(T0_MS + 5, 10)] == ["c"]
    assert [(one.head.id, one.messages) for one in archive.expirable(T0_MS + 6, 10)] == [("a", 1), ("c", 1)]


def test_a_conversation_that_lost_all_messages_stays(archive: Archive) -> None:
    """Its head remains, nothing of it expires any more, and it can go on."""
    apply(archive, appended(head_of("a"), message(1)))

    apply(archive, changed("message.expire", head_of("a", 2), up_to=1, before=T0_MS + 1))
    assert ids(archive.conversations(ConversationQuery())) == ["a"]
    assert archive.expirable(2**62, 10) == []
    apply(archive, appended(head_of("a", 3), message(2)))

    assert numbers(archive, "a") == [2]
    assert [one.up_to for one in archive.expirable(2**62, 10)] == [2]


# Made anew.


def test_a_new_archive_is_filled_from_memory_and_what_was_saved(archive: Archive) -> None:
    """Heads and escalations first, then messages in any order and more than once; those of strangers are passed over."""
    heads = [head_of(f"c{n:04}", 3, escalated=n == 2) for n in range(2_500)]
    archive.fill(iter(heads), iter([escalation_of("c0002")]))

    assert archive.fill_messages("c0001", [message(3, T0_MS + 3), message(1, T0_MS - 1)]) == 2
    assert archive.fill_messages("c0001", [message(1), message(2), message(3)]) == 1
    assert archive.fill_messages("c0001", []) == 0
    assert archive.fill_messages("stranger", [message(1)]) == 0

    assert archive.archived_seq == 0
    assert numbers(archive, "c0001") == [1, 2, 3]
    assert len(archive.conversations(ConversationQuery(limit=5_000))) == 2_500
    assert ids(archive.escalations(EscalationQuery())) == ["c0002"]
    assert archive.figures(T0_MS).escalated == 1
    assert [one.head.id for one in archive.expirable(T0_MS, 10)] == ["c0001"]


def test_filling_replaces_heads_and_keeps_messages(archive: Archive) -> None:
    """What memory says counts; the messages that are there stay, and the events that follow add theirs."""
    apply(archive, appended(head_of("a"), message(1)))

    archive.fill([head_of("a", 9, title="New")], [])
    apply(archive, appended(head_of("a", 2), message(2)))

    assert archive.conversations(ConversationQuery())[0].version == 2
    assert numbers(archive, "a") == [1, 2]


# Threads, and the end.


def test_readers_see_whole_transactions(archive: Archive) -> None:
    """Many threads read while another appends: each sees messages without holes, and a head that fits them or is older."""
    wrong: list[object] = []
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            heads = archive.conversations(ConversationQuery())
            found = numbers(archive, "a", limit=10_000)
            if found != list(range(1, len(found) + 1)) or (heads and heads[0].version > len(found)) or len(found) % 3:
                wrong.append((heads, found))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for n in range(1, 300, 3):
            apply(archive, *(appended(head_of("a", n + more), message(n + more)) for more in range(3)))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()

    assert not wrong
    assert len(numbers(archive, "a", limit=10_000)) == 300


def test_closing_under_readers_is_safe(opener: Opener) -> None:
    """Whoever reads while it is closed gets an answer or an ArchiveError; nobody hangs."""
    archive = opener()
    apply(archive, appended(head_of("a"), *(message(n) for n in range(1, 400))))
    odd: list[BaseException] = []
    refused: list[ArchiveError] = []

    def read() -> None:
        try:
            while True:
                assert len(numbers(archive, "a", limit=1_000)) == 399
        except ArchiveError as error:
            refused.append(error)
        except BaseException as error:
            odd.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    archive.close()
    for thread in threads:
        thread.join(20)

    assert (odd, len(refused)) == ([], 8)


def test_a_closed_archive_refuses(archive: Archive) -> None:
    """Every method says that it is closed."""
    archive.close()

    for use in (
        lambda: apply(archive, appended(head_of("a"), message(1))),
        lambda: archive.fill([], []),
        lambda: archive.fill_messages("a", [message(1)]),
        archive.checkpoint,
        lambda: archive.figures(T0_MS),
        archive.check,
        archive.describe,
        archive.message_counts,
    ):
        with pytest.raises(ArchiveError, match="closed"):
            use()


def test_it_describes_itself(archive: Archive) -> None:
    """An operator learns what it is and how large."""
    described = archive.describe()

    assert described["kind"]
    assert described["bytes"] > 0
