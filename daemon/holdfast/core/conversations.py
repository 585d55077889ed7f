"""Decisions about conversations: what a message, a hold or an escalation makes of them.

Memory holds a conversation's head only: what must be decided atomically. Its messages are in the archive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import orjson

from holdfast import record, values
from holdfast.clock import format_ms, parse_ms
from holdfast.core.event import NO_VALUE, Event, StoredMessage
from holdfast.core.rules import Rules, check_id, check_text, existing, next_version, refuse_header, unchanged
from holdfast.core.state import State
from holdfast.errors import Conflict, InvalidRecord, TooLarge
from holdfast.ops import (
    Answer,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    MessageExpire,
    PersonHold,
    RecordOp,
)

TITLE_CHARS = 50
"""Of the first user message, that become the title (CONTRACT section 6)."""

TEXT_CHARS_MAX = 4_096
"""Of a reason or a given title."""

ROLES = ("system", "user", "assistant", "tool")
AUTHORS = ("bot", "agent", "customer")
PRIORITIES = ("low", "high")

_AUTHOR_OF = {"user": "customer", "assistant": "bot"}
TOKENS_MAX = 2**31 - 1
"""Of one message; a conversation has fewer than 2^32 of them, so that no sum leaves 64 bits."""

_OF_ONE = ("role", "tokens_used", "author", "metadata", "channel", "external_id", "created_at")


class Archived(NamedTuple):
    """A message that the archive has.

    Attributes:
        number: of it.
        born: the event with which its conversation began; a later one with the same id is another.
    """

    number: int
    born: int


Externals = Mapping[tuple[str, str], Archived]
"""Messages by channel and external id."""


KEPT_BY_US = frozenset(
    {"id", "archived", "handler", "message_count", "system_count", "tokens_used", "last_number", "hold", "hold_reason"}
)
"""Fields of a head that no caller sets."""

_CLOSED = ("resolved",)
"""Statuses of an escalation behind which a new one may be opened."""


def external_key(id: str, channel: str, external_id: str) -> str:
    """Where the message with this external id is noted; a newline stands in none of the three."""
    return f"{id}\n{channel}\n{external_id}"


def messages_of(op: MessageAppend) -> Sequence[Message]:
    """The messages that *op* appends.

    Raises:
        InvalidRecord: none, or given in both ways.
    """
    if op.messages is None:
        if op.role is None:
            raise InvalidRecord(f"expected a message with a role, one of {', '.join(ROLES)}, or a list of messages")
        return (
            Message(
                role=op.role,
                content=op.content,
                tokens_used=op.tokens_used,
                author=op.author,
                metadata=op.metadata,
                channel=op.channel,
                external_id=op.external_id,
                created_at=op.created_at,
            ),
        )
    if op.content or any(getattr(op, field) is not None for field in _OF_ONE):
        raise InvalidRecord("expected either one message or a list of messages, found both")
    if not op.messages:
        raise InvalidRecord("expected at least one message, found an empty list")
    return op.messages


def external_ids(op: MessageAppend) -> list[tuple[str, str]]:
    """The channel and external id of each message of *op* that names one, unchecked."""
    messages = op.messages if op.messages is not None else [op]
    return [pair for pair in map(_external, messages) if pair[1]]


def message_append(
    state: State, op: MessageAppend, rules: Rules, seq: int, now_ms: int, known: Externals
) -> Event | Answer:
    """Append; *known* are messages that the archive has under external ids of *op*."""
    check_id(op.id, rules)
    given = messages_of(op)
    if len(given) > rules.append_max:
        raise TooLarge(f"one op may append {rules.append_max} messages, this one has {len(given)}")
    old = state.conversations.get(op.id)
    version, _ = next_version(old, op)
    if old is None:
        head, born = _new_head(op.id), seq
    else:
        head, born = orjson.loads(record.value_of(old)), record.header_of(old).born
    number = head["last_number"]
    numbers: list[int] = []
    added: list[StoredMessage] = []
    in_op: dict[tuple[str, str], int] = {}
    for message in given:
        stored = stored_message(message, number + 1, rules, now_ms)
        if stored.external_id:
            pair = (stored.channel, stored.external_id)
            there = in_op.get(pair)
            if there is None and old is not None:
                there = _delivered(state, op.id, pair, born) or _archived(known, pair, born)
            if there:
                numbers.append(there)
                continue
            in_op[pair] = number + 1
        number += 1
        numbers.append(number)
        added.append(stored)
    if not added:
        assert old is not None, "a message was known of a conversation that does not exist"
        return msgspec.structs.replace(unchanged(op, old, seq), numbers=numbers)
    _count(head, added)
    _say_whose(head, op, rules)
    event = _event(seq, now_ms, "message.append", op.id, version, head)
    event.messages = added
    if len(numbers) != len(added):
        event.numbers = numbers
    return event


def conversation_put(state: State, op: ConversationPut, rules: Rules, seq: int, now_ms: int) -> Event:
    check_id(op.id, rules)
    old = state.conversations.get(op.id)
    version, _ = next_version(old, op)
    given = op.value
    refuse_header(given)
    if given.get("id", op.id) != op.id:
        raise InvalidRecord(f"id is {given['id']!r:.80}, but the conversation's is {op.id!r}; leave it out")
    if "messages" in given:
        raise InvalidRecord("messages are never replaced: leave them out here, and append new ones with message.append")
    head = _new_head(op.id) if old is None else orjson.loads(record.value_of(old))
    check_text(given.get("title"), "title", TEXT_CHARS_MAX)
    for field in ("user_id", "session_id"):
        if given.get(field) is not None:
            _check_other_id(given[field], field, rules)
        # Or a person's hold would end with a new name.
        if field in given and given[field] != head[field] and head[field] is not None and is_held(state, head):
            raise Conflict(f"conversation {op.id!r} is under a legal hold: its {field} stays {head[field]!r:.80}")
    if "escalated" in given and not isinstance(given["escalated"], bool):
        raise InvalidRecord(f"escalated must be true or false, found {given['escalated']!r:.80}")
    times = {
        field: _moment(given[field], field, rules)
        for field in ("created_at", "updated_at")
        if given.get(field) is not None
    }
    for field, value in given.items():
        if field in times:
            head[field] = format_ms(min(times[field], now_ms))
        elif field in _OWN:
            # As long as somebody waits for a human it is escalated, whatever a head that was read earlier says.
            head[field] = (bool(value) or head["handler"] == "waiting") if field == "escalated" else value
        elif field in KEPT_BY_US or field in ("created_at", "updated_at"):
            continue
        elif value is None:
            head.pop(field, None)
        else:
            head[field] = value
    if old is None:
        head["created_at"] = head["created_at"] or format_ms(min(times.get("updated_at", now_ms), now_ms))
        head["updated_at"] = head["updated_at"] or head["created_at"]
    return _event(seq, now_ms, "conversation.put", op.id, version, head, rules)


def conversation_delete(state: State, op: ConversationDelete, rules: Rules, seq: int, now_ms: int) -> Event:
    old = existing(state.conversations, op, "conversation")
    next_version(old, op)
    _refuse_held(state, orjson.loads(old))
    return Event(seq, format_ms(now_ms), "conversation.delete", id=op.id)


def conversation_archive(state: State, op: ConversationArchive, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    head, version, old = _changing(state, op)
    if head["archived"] == op.archived:
        return unchanged(op, old, seq)
    head["archived"] = op.archived
    return _event(seq, now_ms, "conversation.archive", op.id, version, head)


def conversation_hold(state: State, op: ConversationHold, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    check_text(op.reason, "reason", TEXT_CHARS_MAX)
    head, version, old = _changing(state, op)
    if head.get("hold", False) == op.hold and (not op.hold or head.get("hold_reason") == op.reason):
        return unchanged(op, old, seq)
    for field in ("hold", "hold_reason"):
        head.pop(field, None)
    if op.hold:
        head["hold"] = True
        if op.reason is not None:
            head["hold_reason"] = op.reason
    return _event(seq, now_ms, "conversation.hold", op.id, version, head)


def person_hold(state: State, op: PersonHold, rules: Rules, seq: int, now_ms: int) -> Event | Answer:
    check_id(op.id, rules)
    check_text(op.reason, "reason", TEXT_CHARS_MAX)
    old = state.holds.get(op.id)
    is_held = old is not None
    if is_held == op.hold and (old is None or orjson.loads(old)["reason"] == op.reason):
        return Answer(status=200, seq=seq - 1, id=op.id)
    event = Event(seq, format_ms(now_ms), "person.hold", id=op.id)
    if op.hold:
        event.value = msgspec.Raw(orjson.dumps({"id": op.id, "reason": op.reason, "at": format_ms(now_ms)}))
    return event


def message_expire(state: State, op: MessageExpire, rules: Rules, seq: int, now_ms: int) -> Event:
    head, version, _ = _changing(state, op)
    _refuse_held(state, head)
    head["message_count"] -= op.messages - op.system
    head["system_count"] -= op.system
    head["tokens_used"] -= op.tokens
    event = _event(seq, now_ms, "message.expire", op.id, version, head)
    event.before, event.up_to = op.before_ms, op.up_to
    return event


def escalation_open(state: State, op: EscalationOpen, rules: Rules, seq: int, now_ms: int) -> Event:
    if not isinstance(op.reason, str) or not op.reason.strip():
        raise InvalidRecord(f"expected the reason of the escalation as text, found {op.reason!r:.80}")
    check_text(op.reason, "reason", TEXT_CHARS_MAX)
    if op.priority is not None and op.priority not in PRIORITIES:
        raise InvalidRecord(f"priority must be one of {', '.join(PRIORITIES)}, found {op.priority!r:.80}")
    # The escalation's version is the one that a condition means, but it is the conversation that must be there.
    line = existing(state.conversations, msgspec.structs.replace(op, if_version=None), "conversation")
    old = state.escalations.get(op.id)
    version, _ = next_version(old, op)
    now = format_ms(now_ms)
    escalation = None if old is None else orjson.loads(record.value_of(old))
    if escalation is None or escalation["status"] in _CLOSED:
        opened_ms = now_ms if op.opened_at is None else _moment(op.opened_at, "opened_at", rules)
        escalation = {
            "id": op.id,
            "conversation_id": op.id,
            "reason": op.reason,
            "contact_info": op.contact_info,
            "priority": op.priority or "low",
            "status": "pending",
            "assignee": None,
            "opened_at": format_ms(min(opened_ms, now_ms)),
            "updated_at": now,
            "claimed_at": None,
            "resolved_at": None,
        }
    else:
        escalation |= {"reason": op.reason, "updated_at": now}
        if op.priority is not None:
            escalation["priority"] = op.priority
        if op.contact_info is not None:
            escalation["contact_info"] = op.contact_info
    head = orjson.loads(record.value_of(line))
    head["escalated"] = True
    if head["handler"] == "bot":
        head["handler"] = "waiting"
    event = Event(seq, now, "escalation.open", "", op.id, version)
    event.value = msgspec.Raw(values.encode(escalation, rules.record_limits))
    event.head, event.head_version = msgspec.Raw(orjson.dumps(head)), record.version_of(line)[0] + 1
    return event


def is_held(state: State, head: Mapping[str, Any]) -> bool:
    """Whether a legal hold keeps the conversation of *head*: its own, or that of the person it belongs to."""
    if head.get("hold"):
        return True
    holds = state.holds
    return bool(holds.count) and any(
        holds.get(whose) is not None for whose in (head["id"], head["user_id"], head["session_id"]) if whose
    )


_OWN = ("title", "user_id", "session_id", "escalated")


def _new_head(id: str) -> dict[str, Any]:
    return {
        "id": id,
        "title": None,
        "user_id": None,
        "session_id": None,
        "created_at": None,
        "updated_at": None,
        "escalated": False,
        "archived": False,
        "handler": "bot",
        "message_count": 0,
        "system_count": 0,
        "tokens_used": 0,
        "last_number": 0,
    }


def _changing(state: State, op: RecordOp) -> tuple[dict[str, Any], int, bytes]:
    """The head that *op* changes, its version from then on, and its record now."""
    old = existing(state.conversations, op, "conversation")
    version, _ = next_version(old, op)
    return orjson.loads(record.value_of(old)), version, old


def _event(
    seq: int, now_ms: int, name: str, id: str, version: int, head: dict[str, Any], rules: Rules | None = None
) -> Event:
    encoded = orjson.dumps(head) if rules is None else values.encode(head, rules.record_limits)
    return Event(seq, format_ms(now_ms), name, "", id, version, msgspec.Raw(encoded))


def _count(head: dict[str, Any], added: list[StoredMessage]) -> None:
    """Make *head* what it is with the messages *added*."""
    newest_ms = max(message.created_ms for message in added)
    if head["created_at"] is None:
        head["created_at"] = format_ms(min(message.created_ms for message in added))
    updated_at = format_ms(newest_ms)
    # Both are of one form, so they compare as text.
    if head["updated_at"] is None or head["updated_at"] < updated_at:
        head["updated_at"] = updated_at
    for message in added:
        if message.role == "system":
            head["system_count"] += 1
        else:
            head["message_count"] += 1
            if message.role == "user" and head["title"] is None and message.content.strip():
                cut = message.content[:TITLE_CHARS]
                head["title"] = cut if cut == message.content else cut + "..."
        head["tokens_used"] += message.tokens_used or 0
    head["last_number"] = added[-1].number
    head["archived"] = False


def _say_whose(head: dict[str, Any], op: MessageAppend, rules: Rules) -> None:
    for field, given in (("user_id", op.user_id), ("session_id", op.session_id)):
        if given is None:
            continue
        _check_other_id(given, field, rules)
        if head[field] is None:
            head[field] = given
        elif head[field] != given:
            raise Conflict(
                f"conversation {op.id!r} has the {field} {head[field]!r:.80}, the message says {given!r:.80}; "
                "leave it out, or change it with conversation.put"
            )


def stored_message(message: Message | MessageAppend, number: int, rules: Rules, now_ms: int) -> StoredMessage:
    """*message* checked, as it is kept.

    Raises:
        InvalidRecord, TooLarge: it cannot be.
    """
    role, content, tokens = message.role, message.content, message.tokens_used
    if role not in ROLES:
        raise InvalidRecord(f"role must be one of {', '.join(ROLES)}, found {role!r:.80}")
    author: str | None = message.author
    if author is None:
        author = _AUTHOR_OF.get(role, "")
    elif author not in AUTHORS:
        raise InvalidRecord(f"author must be one of {', '.join(AUTHORS)}, found {author!r:.80}")
    if not isinstance(content, str):
        raise InvalidRecord(f"content must be text, found {type(content).__name__}; put other things into metadata")
    try:
        size = len(content) if content.isascii() else len(content.encode())
    except UnicodeEncodeError:
        raise InvalidRecord("content holds a lone surrogate; send valid Unicode") from None
    if size > rules.message_limits.bytes_max:
        raise TooLarge(f"a message may have {rules.message_limits.bytes_max} bytes, this one has {size}")
    if tokens is not None and (
        isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= TOKENS_MAX
    ):
        raise InvalidRecord(f"tokens_used must be a whole number from 0 to {TOKENS_MAX}, found {tokens!r:.80}")
    metadata = message.metadata
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidRecord(f"metadata must be a JSON object, found {type(metadata).__name__}")
    channel, external_id = _external(message)
    if not content and not (metadata and (metadata.get("tool_calls") or metadata.get("attachments"))):
        raise InvalidRecord(
            "expected a message with content, found an empty one; only tool_calls or attachments may stand alone"
        )
    encoded = NO_VALUE
    if metadata is not None or channel or external_id:
        _check_external(message, channel, external_id, rules)
        whole = dict(metadata or {})
        whole |= {name: text for name, text in (("channel", channel), ("external_id", external_id)) if text}
        if whole:
            encoded = msgspec.Raw(values.encode(whole, rules.message_limits))
    created_ms = now_ms if message.created_at is None else min(_moment(message.created_at, "created_at", rules), now_ms)
    return StoredMessage(
        number=number,
        role=role,
        content=content,
        tokens_used=tokens,
        author=author,
        created_ms=created_ms,
        metadata=encoded,
        channel=channel,
        external_id=external_id,
    )


def _external(message: Message | MessageAppend) -> tuple[str, str]:
    """The channel and external id of *message*, empty where it has none, as text."""
    metadata = message.metadata if isinstance(message.metadata, dict) else {}
    channel = message.channel if message.channel is not None else metadata.get("channel")
    external_id = message.external_id if message.external_id is not None else metadata.get("external_id")
    # Telegram's are numbers.
    return text_or_empty(channel), text_or_empty(external_id)


def text_or_empty(value: Any) -> str:
    """A channel or external id as it is compared; empty when *value* is none."""
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64:
        return str(value)
    # What else stands there in the metadata names no message; whether it can be kept is judged with all of it.
    return value if isinstance(value, str) else ""


def _check_external(message: Message | MessageAppend, channel: str, external_id: str, rules: Rules) -> None:
    for name, text in (("channel", channel), ("external_id", external_id)):
        if len(text) > rules.id_chars_max or not text.isprintable():
            raise InvalidRecord(f"{name} must be printable text of at most {rules.id_chars_max} characters")
        given = (message.metadata or {}).get(name)
        if given is not None and text_or_empty(given) != text:
            raise InvalidRecord(f"{name} is {text!r:.80}, but metadata says {given!r:.80}; give it once")


def _delivered(state: State, id: str, pair: tuple[str, str], born: int) -> int | None:
    """The number of the message that was delivered before, when that was lately."""
    line = state.externals.get(external_key(id, *pair))
    if line is None:
        return None
    noted = orjson.loads(line)
    # One of an earlier conversation with this id says nothing.
    return int(noted["number"]) if noted["seq"] >= born else None


def _archived(known: Externals, pair: tuple[str, str], born: int) -> int | None:
    """The number of the message that was delivered before, when the archive has it."""
    found = known.get(pair)
    return found.number if found is not None and found.born == born else None


def _check_other_id(given: Any, field: str, rules: Rules) -> None:
    if not isinstance(given, str):
        raise InvalidRecord(f"{field} must be text, found {given!r:.80}")
    check_id(given, rules)


def _moment(text: Any, field: str, rules: Rules) -> int:
    try:
        ms = parse_ms(text, rules.zone)
        format_ms(ms)  # the first and last hours of the calendar are none in UTC
        return ms
    except (TypeError, ValueError, OverflowError):
        raise InvalidRecord(
            f"{field} must be a time in ISO 8601 such as 2026-11-21T06:00:00.000Z, found {text!r:.80}"
        ) from None


def _refuse_held(state: State, head: Mapping[str, Any]) -> None:
    if is_held(state, head):
        raise Conflict(
            f"conversation {head['id']!r} is under a legal hold; lift it first (conversation.hold, person.hold)"
        )
