"""What messages, holds and escalations make of a conversation; nothing but decisions."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from holdfast.clock import format_ms, parse_ms
from holdfast.core.conversations import Archived
from holdfast.core.decide import decide
from holdfast.core.event import Event, decode_event, encode_event
from holdfast.core.state import EXTERNAL_TTL_MS, State, apply
from holdfast.errors import Conflict, HoldfastError, InvalidRecord, NotFound, TooLarge, VersionMismatch
from holdfast.ops import (
    AnyOp,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    MessageExpire,
    PersonHold,
)
from holdfast.values import ValueLimits
from tests.decide_harness import World
from tests.engine_harness import NOW, NOW_MS

EARLIER = "2026-11-20T06:00:00.000Z"


def say(content: str = "Hola", role: Any = "user", id: str = "c", **fields: Any) -> MessageAppend:
    return MessageAppend(id=id, role=role, content=content, **fields)


def head(world: World, id: str = "c") -> dict[str, Any]:
    found: dict[str, Any] = world.value("conversations", id)
    return found


def decided(world: World, op: Any) -> Event:
    event = decide(world.state, op, world.rules, world.state.seq + 1, world.now_ms)
    assert isinstance(event, Event)
    return event


def test_the_first_message_makes_the_conversation() -> None:
    """With everything that a list shows of it, and nothing that nobody said."""
    world = World()

    answer = world.do(say("Hola! quiero una USB", tokens_used=7))

    assert (answer.status, answer.id, answer.version, answer.numbers) == (200, "c", 1, [1])
    assert head(world) == {
        "id": "c",
        "title": "Hola! quiero una USB",
        "user_id": None,
        "session_id": None,
        "created_at": NOW,
        "updated_at": NOW,
        "escalated": False,
        "archived": False,
        "handler": "bot",
        "message_count": 1,
        "system_count": 0,
        "tokens_used": 7,
        "last_number": 1,
    }


@pytest.mark.parametrize(
    ("content", "title"),
    [("x" * 50, "x" * 50), ("x" * 51, "x" * 50 + "..."), ("é🎶" * 30, "é🎶" * 25 + "..."), ("  ", None)],
)
def test_the_title_is_the_first_user_message(content: str, title: str | None) -> None:
    """Fifty characters of it, whatever they are; a blank one names nothing, and neither does what others say."""
    world = World()

    world.do(say("You are a helpful assistant", "system"))
    world.do(say("¿En qué puedo ayudar?", "assistant"))
    world.do(say(content))

    assert head(world)["title"] == title


def test_messages_are_counted_and_numbered() -> None:
    """Those of the system apart; numbers go on, whatever the op they come in."""
    world = World()

    first = world.do(
        MessageAppend(
            id="c", messages=[Message(role="system", content="s", tokens_used=5), Message(role="user", content="u")]
        )
    )
    second = world.do(say("a", "assistant", tokens_used=11))

    assert (first.numbers, second.numbers) == ([1, 2], [3])
    found = head(world)
    assert (found["message_count"], found["system_count"], found["tokens_used"], found["last_number"]) == (2, 1, 16, 3)


def test_updated_at_is_the_time_of_the_newest_message() -> None:
    """An older message that comes late does not take it back, and no message lies in the future."""
    world = World()

    world.do(say("old", created_at=EARLIER))
    assert (head(world)["created_at"], head(world)["updated_at"]) == (EARLIER, EARLIER)
    world.do(say("new"))
    world.do(say("late", created_at=EARLIER))
    assert head(world)["updated_at"] == NOW
    world.do(say("early", created_at="2031-01-01T00:00:00Z"))
    assert head(world)["updated_at"] == NOW


def test_authors_follow_from_roles() -> None:
    """Unless one is named, as it is when a person of the shop writes."""
    world = World()
    op = MessageAppend(
        id="c",
        messages=[
            Message(role="user", content="x"),
            Message(role="assistant", content="x"),
            Message(role="assistant", content="x", author="agent"),
            Message(role="system", content="x"),
            Message(role="tool", content="x"),
        ],
    )

    messages = decided(world, op).messages

    assert messages is not None
    assert [message.author for message in messages] == ["customer", "bot", "agent", "", ""]


@pytest.mark.parametrize(
    ("op", "error", "told"),
    [
        (say(role="robot"), InvalidRecord, "role must be one of system, user, assistant, tool, found 'robot'"),
        (say(role=None), InvalidRecord, "expected a message with a role"),
        (say(""), InvalidRecord, "empty"),
        (say(content=3), InvalidRecord, "content must be text"),
        (say("\ud800"), InvalidRecord, "surrogate"),
        (say("x" * 1025), TooLarge, "1024 bytes, this one has 1025"),
        (say("é" * 513), TooLarge, "this one has 1026"),
        (say(metadata={"x": "y" * 2000}), TooLarge, "1024"),
        (say(author="nobody"), InvalidRecord, "author must be one of"),
        (say(tokens_used=-1), InvalidRecord, "tokens_used must be a whole number from 0 to 2147483647"),
        (say(tokens_used=1.5), InvalidRecord, "tokens_used"),
        (say(tokens_used=True), InvalidRecord, "tokens_used"),
        (say(created_at="yesterday"), InvalidRecord, "created_at must be a time"),
        (say(external_id="a\nb"), InvalidRecord, "external_id must be printable"),
        (say(external_id="x" * 257), InvalidRecord, "external_id"),
        (say(external_id="a", metadata={"external_id": "b"}), InvalidRecord, "give it once"),
        (say(id=""), InvalidRecord, "an id has 1 to"),
        (say(user_id="\x00"), InvalidRecord, "control"),
        (MessageAppend(id="c", messages=[]), InvalidRecord, "at least one message"),
        (
            MessageAppend(id="c", role="user", content="x", messages=[Message(role="user", content="x")]),
            InvalidRecord,
            "both",
        ),
        (
            MessageAppend(id="c", messages=[Message(role="user", content="x")] * 1001),
            TooLarge,
            "1000 messages, this one has 1001",
        ),
        (
            MessageAppend(id="c", messages=[Message(role="user", content="x"), Message(role="user")]),
            InvalidRecord,
            "empty",
        ),
        (say(if_version=3), VersionMismatch, "does not exist"),
    ],
)
def test_a_message_that_has_no_meaning_is_refused(op: MessageAppend, error: type[HoldfastError], told: str) -> None:
    """With what was expected; nothing comes into being, not even the conversation."""
    world = World(message_limits=ValueLimits(bytes_max=1024))

    reason = world.refused(op, error)

    assert told in reason
    assert head(world) is None


def test_messages_at_the_limit_are_taken() -> None:
    """1,024 bytes where 1,024 are allowed, and a thousand at once."""
    world = World(message_limits=ValueLimits(bytes_max=1024))

    world.do(say("x" * 1024))
    world.do(MessageAppend(id="c", messages=[Message(role="user", content="x")] * 1000))

    assert head(world)["message_count"] == 1001


@pytest.mark.parametrize("metadata", [{"tool_calls": [{"id": "t1"}]}, {"attachments": [{"url": "media/1.jpg"}]}])
def test_a_call_or_an_attachment_may_stand_alone(metadata: dict[str, Any]) -> None:
    """Language models call tools without a word, and customers send pictures without one."""
    world = World()

    event = decided(world, say("", "assistant", metadata=metadata))

    assert event.messages is not None
    assert orjson.loads(bytes(event.messages[0].metadata)) == metadata


# Delivered twice.


def test_a_message_delivered_twice_is_one() -> None:
    """The second time answers the number of the first, and changes nothing; also as a part of a longer delivery."""
    world = World()
    world.do(say("one", external_id="w1", channel="whatsapp"))

    again = world.do(say("one", metadata={"external_id": "w1", "channel": "whatsapp"}))
    assert (again.numbers, again.version, head(world)["message_count"]) == ([1], 1, 1)

    more = world.do(
        MessageAppend(
            id="c",
            messages=[
                Message(role="user", content="one", external_id="w1", channel="whatsapp"),
                Message(role="user", content="two", external_id="w2", channel="whatsapp"),
                Message(role="user", content="two", external_id="w2", channel="whatsapp"),
                Message(role="user", content="three"),
            ],
        )
    )
    assert more.numbers == [1, 2, 2, 3]
    assert head(world)["message_count"] == 3


def test_external_ids_are_of_one_conversation_and_channel() -> None:
    """Telegram counts anew in every chat."""
    world = World()

    world.do(say("one", external_id="7", channel="telegram"))
    world.do(say("two", external_id="7", channel="whatsapp"))
    world.do(say("three", external_id="7"))
    world.do(say("four", id="d", external_id="7", channel="telegram"))

    assert head(world)["message_count"] == 3
    assert head(world, "d")["message_count"] == 1


def test_what_the_archive_knows_is_known() -> None:
    """Also long after memory has forgotten it."""
    world = World()
    world.do(say("one", external_id="w1"))
    world.state.externals.set(next(iter(world.state.externals)), None, 2, undoable=False)

    answer = decide(
        world.state, say("one", external_id="w1"), world.rules, 2, world.now_ms, None, {("", "w1"): Archived(1, born=1)}
    )

    assert not isinstance(answer, Event)
    assert answer.numbers == [1]


def test_what_the_archive_knows_of_an_earlier_conversation_is_nothing() -> None:
    """It was asked before that one was deleted, perhaps by the same batch."""
    world = World()
    world.do(say("one", external_id="w1"))
    world.do(ConversationDelete(id="c"))
    world.do(say("two"))

    event = decide(
        world.state, say("one", external_id="w1"), world.rules, 4, world.now_ms, None, {("", "w1"): Archived(1, born=1)}
    )

    assert isinstance(event, Event)
    assert [message.number for message in event.messages or ()] == [2]


def test_a_deleted_conversation_knows_no_external_ids() -> None:
    """Its id may be used again, by a customer who comes back and is not to be met with silence."""
    world = World()
    world.do(say("one", external_id="w1"))
    world.do(ConversationDelete(id="c"))

    answer = world.do(say("one", external_id="w1"))

    assert (answer.numbers, answer.version) == ([1], 1)


def test_external_ids_are_looked_at_again_in_a_day() -> None:
    """Then the archive knows them, and memory need not."""
    world = World()
    world.do(say(external_id="w1"))

    assert world.state.external_wheel.take_due(NOW_MS + EXTERNAL_TTL_MS - 60_000, 10) == set()
    assert world.state.external_wheel.take_due(NOW_MS + EXTERNAL_TTL_MS + 60_000, 10) == {"c\n\nw1"}


# Whose it is.


def test_a_conversation_belongs_to_a_user_and_a_session() -> None:
    """Said with any message, kept from then on; another owner is a mistake."""
    world = World()
    world.do(say(session_id="s"))
    world.do(say(user_id="u", session_id="s"))

    reason = world.refused(say(user_id="v"), Conflict)

    assert "'u'" in reason
    assert "'v'" in reason
    assert (head(world)["user_id"], head(world)["session_id"]) == ("u", "s")


def test_put_says_what_a_caller_may_say() -> None:
    """What is not given stays, null removes, what Holdfast counts is not believed, and messages stay."""
    world = World()
    world.do(say("Hola", tokens_used=3))

    answer = world.do(
        ConversationPut(
            id="c", value={"title": "USB", "user_id": "u", "tag": [1, 2.5], "note": "x", "message_count": 99}
        )
    )
    assert (answer.status, answer.version) == (200, 2)
    world.do(ConversationPut(id="c", value={"note": None, "user_id": None}))

    found = head(world)
    assert (found["title"], found["user_id"], found["tag"], found["message_count"]) == ("USB", None, [1, 2.5], 1)
    assert "note" not in found


def test_put_makes_a_conversation() -> None:
    """One without messages, whose title comes with its first user message unless it has one."""
    world = World()

    answer = world.do(ConversationPut(id="c", value={"created_at": EARLIER, "escalated": True}))
    world.do(say("Hola"))

    assert answer.status == 201
    found = head(world)
    assert (found["title"], found["created_at"], found["updated_at"], found["escalated"]) == (
        "Hola",
        EARLIER,
        NOW,
        True,
    )


def test_what_was_read_can_be_put_back() -> None:
    """And nothing changes but the version."""
    world = World()
    world.do(say())
    world.do(ConversationHold(id="c", reason="case 7"))
    before = head(world)

    world.do(ConversationPut(id="c", value=before))

    assert head(world) == before


@pytest.mark.parametrize(
    "value",
    [
        {"id": "other"},
        {"messages": []},
        {"title": 3},
        {"title": "x" * 4097},
        {"user_id": ""},
        {"session_id": 5},
        {"escalated": "yes"},
        {"created_at": "then"},
        {"_holdfast": {}},
        {"x": "\ud800"},
        {"x": float("nan")},
    ],
)
def test_what_cannot_be_said_of_a_conversation_is_refused(value: dict[str, Any]) -> None:
    """And it does not come into being by it."""
    world = World()

    world.refused(ConversationPut(id="c", value=value), InvalidRecord)

    assert head(world) is None


# Archived, held, escalated, expired, deleted.


def test_a_new_message_brings_an_archived_conversation_back() -> None:
    """Archiving twice is archiving once."""
    world = World()
    world.do(say())

    assert world.do(ConversationArchive(id="c")).version == 2
    assert world.do(ConversationArchive(id="c")).version == 2
    assert head(world)["archived"] is True
    world.do(say("again"))
    assert head(world)["archived"] is False


def test_nothing_under_a_hold_is_deleted() -> None:
    """Neither the conversation nor its messages, until the hold is lifted; the reason is kept with it."""
    world = World()
    world.do(say())
    world.do(ConversationHold(id="c", reason="case 7"))
    expire = MessageExpire(id="c", before_ms=NOW_MS + 1, up_to=1, messages=1, system=0, tokens=0)

    assert "legal hold" in world.refused(ConversationDelete(id="c"), Conflict)
    world.refused(expire, Conflict)
    assert head(world)["hold_reason"] == "case 7"

    world.do(ConversationHold(id="c", hold=False))
    assert "hold" not in head(world)
    world.do(ConversationDelete(id="c"))
    assert head(world) is None


@pytest.mark.parametrize("whose", [{"id": "573001"}, {"user_id": "573001"}, {"session_id": "573001"}])
def test_a_person_is_held_in_all_conversations(whose: dict[str, str]) -> None:
    """Whichever way these are theirs, those that begin later as well."""
    world = World()
    world.do(PersonHold(id="573001", reason="case 7"))
    op = say(**whose)
    world.do(op)

    world.refused(ConversationDelete(id=op.id), Conflict)
    world.do(PersonHold(id="573001", hold=False))
    world.do(ConversationDelete(id=op.id))


def test_a_held_conversation_stays_with_its_person() -> None:
    """Another owner would end the hold; everything else may change, and an owner may be added."""
    world = World()
    world.do(PersonHold(id="573001"))
    world.do(say(user_id="573001"))

    world.refused(ConversationPut(id="c", value={"user_id": "573002"}), Conflict)
    world.refused(ConversationPut(id="c", value={"user_id": None}), Conflict)
    world.do(ConversationPut(id="c", value={"user_id": "573001", "session_id": "s", "title": "T"}))

    assert (head(world)["user_id"], head(world)["session_id"]) == ("573001", "s")


def test_expired_messages_are_no_longer_counted() -> None:
    """The numbers that they had are not given again."""
    world = World()
    world.do(say("s", "system", tokens_used=2))
    world.do(say("u", tokens_used=3))
    world.do(say("v", tokens_used=4))

    world.do(MessageExpire(id="c", before_ms=NOW_MS + 1, up_to=2, messages=2, system=1, tokens=5))
    answer = world.do(say("w"))

    found = head(world)
    assert (found["message_count"], found["system_count"], found["tokens_used"]) == (2, 0, 4)
    assert answer.numbers == [4]


def test_an_escalation_marks_its_conversation() -> None:
    """The customer waits for a human from then on."""
    world = World()
    world.do(say())

    answer = world.do(EscalationOpen(id="c", reason="wants a human", contact_info={"mobile": "0123"}, priority="high"))

    assert (answer.status, answer.id, answer.version) == (200, "c", 1)
    assert (head(world)["escalated"], head(world)["handler"]) == (True, "waiting")
    world.do(ConversationPut(id="c", value={"escalated": False, "topic": "a head that was read before"}))
    assert (head(world)["escalated"], head(world)["handler"]) == (True, "waiting")
    assert world.value("escalations", "c") == {
        "id": "c",
        "conversation_id": "c",
        "reason": "wants a human",
        "contact_info": {"mobile": "0123"},
        "priority": "high",
        "status": "pending",
        "assignee": None,
        "opened_at": NOW,
        "updated_at": NOW,
        "claimed_at": None,
        "resolved_at": None,
    }


def test_a_second_call_updates_the_open_escalation() -> None:
    """There is one at a time; who waits does not lose the place in the line, nor the way to be reached."""
    world = World()
    world.do(say())
    world.do(EscalationOpen(id="c", reason="first", contact_info={"mobile": "0123"}))
    world.now_ms += 60_000

    answer = world.do(EscalationOpen(id="c", reason="second", priority="high"))

    found = world.value("escalations", "c")
    assert answer.version == 2
    assert (found["reason"], found["priority"], found["opened_at"]) == ("second", "high", NOW)
    assert (found["contact_info"], found["updated_at"]) == ({"mobile": "0123"}, format_ms(NOW_MS + 60_000))


def test_an_update_says_only_what_it_says() -> None:
    """Without a priority a new escalation is of low priority, and an open one keeps what it has."""
    world = World()
    world.do(say())

    world.do(EscalationOpen(id="c", reason="first"))
    assert world.value("escalations", "c")["priority"] == "low"
    world.do(EscalationOpen(id="c", reason="second", priority="high"))
    world.do(EscalationOpen(id="c", reason="third"))
    assert world.value("escalations", "c")["priority"] == "high"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"id": "nobody"}, NotFound),
        ({"reason": " "}, InvalidRecord),
        ({"reason": "x" * 4097}, InvalidRecord),
        ({"priority": "urgent"}, InvalidRecord),
        ({"contact_info": {"x": "\ud800"}}, InvalidRecord),
        ({"opened_at": "then"}, InvalidRecord),
        ({"if_version": 2}, VersionMismatch),
    ],
)
def test_what_is_no_escalation_is_refused(fields: dict[str, Any], error: type[HoldfastError]) -> None:
    """And the conversation is not marked."""
    world = World()
    world.do(say())

    world.refused(EscalationOpen(**({"id": "c", "reason": "help"} | fields)), error)

    assert head(world)["escalated"] is False


@pytest.mark.parametrize(
    "op",
    [ConversationDelete(id="no"), ConversationArchive(id="no"), ConversationHold(id="no")],
)
def test_an_unknown_conversation_is_not_found(op: AnyOp) -> None:
    """Only a message or a put makes one."""
    World().refused(op, NotFound)


def test_deleting_takes_the_escalation_along() -> None:
    """Nobody waits in a conversation that is gone."""
    world = World()
    world.do(say())
    world.do(EscalationOpen(id="c", reason="help"))

    assert world.do(ConversationDelete(id="c")).status == 204
    assert world.value("escalations", "c") is None


# Journal.


def history() -> list[AnyOp]:
    """Ops of every kind, on a few conversations."""
    return [
        say("one", external_id="w1", user_id="u"),
        say("two", "assistant", tokens_used=5),
        ConversationPut(id="c", value={"title": "T", "x": 1}),
        EscalationOpen(id="c", reason="help"),
        say("d one", id="d"),
        ConversationArchive(id="d"),
        ConversationHold(id="d", reason="r"),
        PersonHold(id="u"),
        ConversationHold(id="d", hold=False),
        ConversationDelete(id="d"),
        say("d again", id="d", external_id="w9"),
        MessageExpire(id="d", before_ms=NOW_MS + 1, up_to=1, messages=1, system=0, tokens=0),
        PersonHold(id="u", hold=False),
    ]


def pictured(state: State) -> dict[str, dict[str, bytes | None]]:
    return {name: {id: found.get(id) for id in found} for name, found in state.collections.items()}


@pytest.mark.parametrize("overlap", [0, 1, 5, 13])
def test_replay_ends_in_the_same_state(overlap: int) -> None:
    """Also when the snapshot holds some of the events already, which are then applied twice."""
    world = World()
    lines = []
    for op in history():
        event = decided(world, op)
        lines.append(encode_event(event))
        apply(world.state, event, world.now_ms, undoable=False)
    replayed = State()

    for line in [*lines, *lines[len(lines) - overlap :]]:
        event = decode_event(line)
        apply(replayed, event, parse_ms(event.at), undoable=False)

    assert pictured(replayed) == pictured(world.state)


def test_what_waits_for_the_archive_is_undone_with_the_rest() -> None:
    """An op that a full disk takes back must not be archived."""
    world = World()
    world.do(say("one"))

    event = decided(world, say("two"))
    apply(world.state, event, world.now_ms, undoable=True)
    world.state.undo(1)

    assert world.state.backlog.last_seq == 1
    assert [seq for seq, _ in world.state.backlog.take(9)] == [1]
    assert head(world)["last_number"] == 1


def test_the_backlog_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond it the oldest events are left to the journal, whole seqs at a time."""
    monkeypatch.setattr("holdfast.core.backlog.EVENTS_MAX", 3)
    world = World()

    for number in range(5):
        world.do(say(str(number)))

    backlog = world.state.backlog
    assert (len(backlog), backlog.since, backlog.first_seq, backlog.last_seq) == (3, 2, 3, 5)


@pytest.mark.parametrize(("bytes_max", "kept"), [(2_000, 1), (4_000, 3), (100, 0)])
def test_the_backlog_has_a_limit_of_bytes(monkeypatch: pytest.MonkeyPatch, bytes_max: int, kept: int) -> None:
    """Long messages wait in the journal as well; one above the limit alone is not kept at all."""
    monkeypatch.setattr("holdfast.core.backlog.BYTES_MAX", bytes_max)
    world = World()

    for _ in range(5):
        world.do(say("x" * 1_000))

    assert (len(world.state.backlog), world.state.backlog.since) == (kept, 5 - kept)


def test_the_backlog_counts_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was taken, or taken back, leaves room for others."""
    monkeypatch.setattr("holdfast.core.backlog.BYTES_MAX", 2_000)
    world = World()

    for _ in range(10):
        world.do(say("x" * 1_000))
        event = decided(world, say("y" * 1_000))
        apply(world.state, event, world.now_ms, undoable=True)
        world.state.undo(event.seq - 1)
        world.state.backlog.take(world.state.seq)

    assert len(world.state.backlog) == 0
    world.do(say("x" * 1_000))
    assert len(world.state.backlog) == 1


def test_what_is_taken_back_is_not_looked_for_in_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when there was too much of it to be kept."""
    monkeypatch.setattr("holdfast.core.backlog.EVENTS_MAX", 3)
    world = World()
    world.do(say("one"))

    for _ in range(9):
        event = decided(world, say("two"))
        apply(world.state, event, world.now_ms, undoable=True)
    world.state.undo(1)

    assert world.state.backlog.since == 1
    assert world.state.backlog.last_seq == 1


def test_a_conversation_that_begins_again_knows_no_delivery() -> None:
    """Not even when the earlier one, its end and its own beginning share a seq, as in a batch."""
    world = World()
    twice = say(channel="whatsapp", external_id="wamid.1")

    for op in (twice, ConversationDelete(id="c"), twice):
        event = decide(world.state, op, world.rules, 1, world.now_ms)
        assert isinstance(event, Event)
        apply(world.state, event, world.now_ms, undoable=False)

    assert [message.number for message in event.messages or ()] == [1]
    assert head(world)["message_count"] == 1


@pytest.mark.parametrize("tokens", [-1, 2**31, 2**53, 2**64, True, 1.0])
def test_tokens_have_a_limit(tokens: Any) -> None:
    """Below what their sums can hold, in the archive too."""
    with pytest.raises(InvalidRecord, match="tokens_used must be a whole number from 0 to 2147483647"):
        World().do(say(tokens_used=tokens))


def test_a_conversation_of_the_largest_counts_is_kept() -> None:
    """Sums of what is allowed go through JSON."""
    world = World()

    world.do(MessageAppend(id="c", messages=[Message(role="user", content="x", tokens_used=2**31 - 1)] * 1_000))

    assert head(world)["tokens_used"] == 1_000 * (2**31 - 1)


@pytest.mark.parametrize("field", ["created_at", "updated_at"])
@pytest.mark.parametrize("time", ["", 0, False, 1795283481987, "yesterday", []])
def test_a_conversation_is_given_times_only(field: str, time: Any) -> None:
    """What is none is refused, not passed over."""
    with pytest.raises(InvalidRecord, match=f"{field} must be a time in ISO 8601"):
        World().do(ConversationPut(id="c", value={field: time}))


@pytest.mark.parametrize("created_at", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999-14:00"])
def test_a_time_that_is_none_in_utc_is_refused(created_at: str) -> None:
    """At both ends of the calendar."""
    with pytest.raises(InvalidRecord, match="created_at must be a time in ISO 8601"):
        World().do(say(created_at=created_at))


@pytest.mark.parametrize("external_id", [2**64, -(2**63) - 1, 10**5000], ids=["above", "below", "far above"])
def test_a_number_beyond_64_bits_is_no_external_id(external_id: int) -> None:
    """It cannot be kept, as anywhere else."""
    with pytest.raises(InvalidRecord, match="beyond 64 bits"):
        World().do(say(metadata={"external_id": external_id}))
