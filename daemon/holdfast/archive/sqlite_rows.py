"""What events come to in the tables of the SQLite archive."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import msgspec

from holdfast.archive.base import ArchiveError, Escalation, Head
from holdfast.archive.sqlite_packed import PLACES, Dictionaries, Texts
from holdfast.clock import parse_ms
from holdfast.core.event import NO_VALUE, Event, StoredMessage

DAY_MS = 86_400_000
# Of the conversation *key* the places begin at ``key * PLACES``.

RANKS = {"high": 0, "low": 1}
OTHER_RANK = 2

SYSTEM = "system"
_ROLES = (SYSTEM, "user", "assistant", "tool")
_AUTHORS = ("", "bot", "agent", "customer")
WHO = tuple(product(_ROLES, _AUTHORS))
"""Role and author by kind."""
_KINDS = {who: kind for kind, who in enumerate(WHO)}
_SYSTEM_KINDS = len(_AUTHORS)
"""Kinds below this are messages of the system."""

MESSAGE_COLUMNS = "place, created_ms, kind, tokens_used, content, metadata, channel, external_id, packed"
"""What ``message_of`` takes."""

_AT_ONCE = 1_000
"""Conversations that wait to be written, at most, while an archive is filled."""

_Row = tuple[int, int, int, int | None, str, str | None, str | None, str | None]
"""Of a message that is written: all of them but the last."""

_WholeRow = tuple[int, int, int, int | None, str, str | None, str | None, str | None, int | None]


_Counted = tuple[int, int, int]
"""Of a conversation: escalated, archived, updated_ms."""


class _HeadFields(msgspec.Struct, gc=False):
    """Of a head what stands in columns."""

    updated_at: str
    user_id: str | None = None
    session_id: str | None = None
    escalated: bool = False
    archived: bool = False


class _EscalationFields(msgspec.Struct, gc=False):
    """Of an escalation what stands in columns."""

    opened_at: str
    status: str
    priority: str


_decode_head = msgspec.json.Decoder(_HeadFields).decode
_decode_escalation = msgspec.json.Decoder(_EscalationFields).decode


def message_of(row: _WholeRow, texts: Texts) -> StoredMessage:
    """The message in *row*; IndexError or TypeError when it is none of ours, BlockDamaged when its text is lost."""
    place, created_ms, kind, tokens_used, content, metadata, channel, external_id, packed = row
    number = place % PLACES
    if packed is not None:
        _, content, metadata = texts.of(place, packed)
    if type(content) is not str or type(created_ms) is not int:
        raise TypeError(f"message {number} has no text or no time")
    role, author = WHO[kind]
    return StoredMessage(
        number=number,
        role=role,
        content=content,
        tokens_used=tokens_used,
        author=author,
        created_ms=created_ms,
        metadata=NO_VALUE if metadata is None else msgspec.Raw(str.encode(metadata)),
        channel=channel or "",
        external_id=external_id or "",
    )


def kinds(role: str | None, author: str | None) -> list[int]:
    """The kinds of messages with this role and author; None means any."""
    return [
        kind
        for (one, other), kind in _KINDS.items()
        if (role is None or one == role) and (author is None or other == author)
    ]


class _Conversation:
    """A conversation that this transaction changes.

    Attributes:
        key: None until it has a row.
        counted: escalated, archived and updated_ms as the totals count it; None when they do not yet.
        oldest_ms: as in its row.
        highest: the highest number of its messages, those that wait included; 0 without.
        head: what its row should hold; None when it holds it.
        waiting: messages that are not in the table yet; none of them is there.
    """

    __slots__ = ("counted", "head", "highest", "id", "key", "oldest_ms", "waiting")

    def __init__(self, id: str) -> None:
        self.id = id
        self.key: int | None = None
        self.counted: _Counted | None = None
        self.oldest_ms: int | None = None
        self.highest = 0
        self.head: Head | None = None
        self.waiting: list[StoredMessage] = []


class Changes:
    """The changes of one transaction, gathered so that each row is written once however many events meet it.

    Lives as long as the transaction; nothing is sure to be in the tables before ``finish``.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        # One cursor for all that is looked up: to make one takes as long as a short statement.
        self._look_up = connection.cursor().execute
        self._next_key: int | None = None
        self._conversations: dict[str, _Conversation] = {}
        self._totals: Counter[str] = Counter()
        self._message_days: Counter[int] = Counter()
        self._conversation_days: Counter[int] = Counter()

    def apply(self, event: Event) -> None:
        """Take what *event*, one of ``ARCHIVED_OPS``, says."""
        _APPLY[event.op](self, event)

    def fill(self, heads: Iterable[Head], escalations: Iterable[Escalation]) -> None:
        """Take *heads* and *escalations* for what is so from now on."""
        for head in heads:
            self.put_head(head)
            if len(self._conversations) >= _AT_ONCE:
                self._write()
        for escalation in escalations:
            self.put_escalation(escalation)

    def put_head(self, head: Head) -> None:
        """Take *head* for its conversation's from now on."""
        self._open(head.id).head = head

    def put_messages(self, id: str, messages: Sequence[StoredMessage]) -> int:
        """Add those of *messages* whose number the conversation *id* does not have; how many these are.

        A conversation that has no row, and whose head is not put, has no messages.
        """
        conversation = self._open(id)
        if conversation.key is None and conversation.head is None:
            return 0
        new = {message.number: message for message in messages}
        if new and min(new) <= conversation.highest:
            for number in self._numbers_there(id, min(new), max(new)):
                new.pop(number, None)
            conversation = self._open(id)
        if new:
            conversation.waiting.extend(new.values())
            conversation.highest = max(conversation.highest, *new)
        return len(new)

    def put_escalation(self, escalation: Escalation) -> None:
        """Take *escalation* for its conversation's from now on."""
        try:
            fields = _decode_escalation(escalation.value)
            opened_ms = parse_ms(fields.opened_at)
        except (ValueError, msgspec.DecodeError) as error:
            raise ArchiveError(f"the escalation {escalation.id!r} is not what it should be: {error}") from error
        rank = RANKS.get(fields.priority, OTHER_RANK)
        self._connection.execute(
            "INSERT OR REPLACE INTO escalations (id, version, status, rank, opened_ms, value) VALUES (?, ?, ?, ?, ?, ?)",
            (escalation.id, escalation.version, fields.status, rank, opened_ms, escalation.value.decode()),
        )

    def delete(self, id: str) -> None:
        """Remove the conversation *id* with its messages and its escalation."""
        self._connection.execute("DELETE FROM escalations WHERE id = ?", (id,))
        self._write()
        conversation = self._open(id)
        if conversation.key is None:
            return
        if self._delete_messages(conversation.key, PLACES - 1, None):
            self._connection.execute(
                "DELETE FROM blocks WHERE place > ? AND place < ?",
                (conversation.key * PLACES, (conversation.key + 1) * PLACES),
            )
        self._connection.execute("DELETE FROM conversations WHERE key = ?", (conversation.key,))
        self._count_conversation(conversation.counted, None)
        del self._conversations[id]

    def expire(self, id: str, up_to: int, before_ms: int) -> None:
        """Remove the messages of the conversation *id* with a number up to *up_to* that were created before *before_ms*."""
        self._write()
        conversation = self._open(id)
        if conversation.key is None:
            return
        self._unpack(conversation.key, min(up_to, PLACES - 1), before_ms)
        self._delete_messages(conversation.key, min(up_to, PLACES - 1), before_ms)
        first = conversation.key * PLACES
        self._connection.execute(
            "UPDATE conversations SET oldest_ms = (SELECT min(created_ms) FROM messages WHERE place > ? AND place < ?)"
            " WHERE key = ?",
            (first, first + PLACES, conversation.key),
        )
        del self._conversations[id]

    def finish(self, archived_seq: int | None = None) -> None:
        """Write all that waits, and the totals; *archived_seq* unless it is None."""
        self._write()
        for column, days in (("messages", self._message_days), ("conversations", self._conversation_days)):
            self._connection.executemany(
                "INSERT INTO days (day, messages, conversations) VALUES (?, 0, 0) ON CONFLICT DO NOTHING",
                [(day,) for day, change in days.items() if change > 0],
            )
            self._connection.executemany(
                f"UPDATE days SET {column} = {column} + ? WHERE day = ?",
                [(change, day) for day, change in days.items() if change],
            )
        shrunken = {day for days in (self._message_days, self._conversation_days) for day, n in days.items() if n < 0}
        self._connection.executemany(
            "DELETE FROM days WHERE day = ? AND messages = 0 AND conversations = 0", [(day,) for day in shrunken]
        )
        totals = self._totals
        self._connection.execute(
            "UPDATE totals SET archived_seq = coalesce(?, archived_seq), conversations = conversations + ?,"
            " archived = archived + ?, escalated = escalated + ?, messages = messages + ?,"
            " system_messages = system_messages + ?, tokens = tokens + ? WHERE one = 1",
            (
                archived_seq,
                totals["conversations"],
                totals["archived"],
                totals["escalated"],
                totals["messages"],
                totals["system_messages"],
                totals["tokens"],
            ),
        )

    def _open(self, id: str) -> _Conversation:
        conversation = self._conversations.get(id)
        if conversation is None:
            conversation = self._conversations[id] = _Conversation(id)
            row = self._look_up(
                "SELECT key, escalated, archived, updated_ms, oldest_ms, (SELECT max(place) FROM messages"
                f" WHERE place > key * {PLACES} AND place < (key + 1) * {PLACES})"
                " FROM conversations INDEXED BY conversation_by_id WHERE id = ?",
                (id,),
            ).fetchone()
            if row is not None:
                conversation.key, *counted, conversation.oldest_ms, place = row
                conversation.counted = tuple(counted)
                conversation.highest = (place or 0) % PLACES
        return conversation

    def _numbers_there(self, id: str, first: int, last: int) -> list[int]:
        self._write()
        key = self._open(id).key
        assert key is not None, "a conversation with messages has a row"
        rows = self._connection.execute(
            "SELECT place FROM messages WHERE place >= ? AND place <= ?", (key * PLACES + first, key * PLACES + last)
        )
        return [place % PLACES for (place,) in rows]

    def _write(self) -> None:
        """Bring all that waits into the tables."""
        new: list[tuple[Any, ...]] = []
        changed: list[tuple[Any, ...]] = []
        moved: list[tuple[int | None, int | None]] = []
        rows: list[_Row] = []
        for conversation in self._conversations.values():
            waiting, before_ms = conversation.waiting, conversation.oldest_ms
            if waiting:
                oldest_ms = min([message.created_ms for message in waiting])
                conversation.oldest_ms = oldest_ms if before_ms is None else min(oldest_ms, before_ms)
            if conversation.head is not None:
                row = self._head_row(conversation, conversation.head)
                if conversation.key is None:
                    conversation.key = self._take_key()
                    new.append((*row, conversation.key, conversation.id))
                else:
                    changed.append((*row, conversation.key))
            elif conversation.oldest_ms != before_ms:
                moved.append((conversation.oldest_ms, conversation.key))
            if waiting:
                assert conversation.key is not None, "only a conversation with a row has messages"
                self._add_rows(rows, conversation.key * PLACES, waiting)
        write = self._connection.executemany
        write(
            "INSERT INTO conversations (version, user_id, session_id, escalated, archived, updated_ms, oldest_ms, head,"
            " key, id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            new,
        )
        write(
            "UPDATE conversations SET version = ?, user_id = ?, session_id = ?, escalated = ?, archived = ?,"
            " updated_ms = ?, oldest_ms = ?, head = ? WHERE key = ?",
            changed,
        )
        write("UPDATE conversations SET oldest_ms = ? WHERE key = ?", moved)
        write(
            "INSERT INTO messages (place, created_ms, kind, tokens_used, content, metadata, channel, external_id)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        self._conversations.clear()

    def _take_key(self) -> int:
        """The key of a conversation that is about to get a row."""
        if self._next_key is None:
            self._next_key = self._look_up("SELECT coalesce(max(key), 0) + 1 FROM conversations").fetchone()[0]
        key = self._next_key
        self._next_key += 1
        return key

    def _head_row(self, conversation: _Conversation, head: Head) -> tuple[Any, ...]:
        """The columns of *head*, which is counted."""
        try:
            fields = _decode_head(head.value)
            updated_ms = parse_ms(fields.updated_at)
        except (ValueError, msgspec.DecodeError) as error:
            raise ArchiveError(f"the conversation {head.id!r} is not what it should be: {error}") from error
        escalated, archived = fields.escalated, fields.archived
        self._count_conversation(conversation.counted, (escalated, archived, updated_ms))
        return (
            head.version,
            fields.user_id,
            fields.session_id,
            escalated,
            archived,
            updated_ms,
            conversation.oldest_ms,
            head.value.decode(),
        )

    def _add_rows(self, rows: list[_Row], first: int, messages: list[StoredMessage]) -> None:
        """Add the rows of *messages*, which are counted, to *rows*; places of their conversation begin at *first*."""
        system = tokens = 0
        days = self._message_days
        for message in messages:
            kind = _KINDS.get((message.role, message.author))
            if kind is None:
                raise ArchiveError(f"a message has a role or author that is none: {message.role!r}, {message.author!r}")
            created_ms, tokens_used = message.created_ms, message.tokens_used
            system += kind < _SYSTEM_KINDS
            tokens += tokens_used or 0
            days[created_ms // DAY_MS] += 1
            metadata = bytes(message.metadata)
            rows.append(
                (
                    first + message.number,
                    created_ms,
                    kind,
                    tokens_used,
                    message.content,
                    metadata.decode() if metadata else None,
                    message.channel or None,
                    message.external_id or None,
                )
            )
        self._count_messages(len(messages), system, tokens)

    def _unpack(self, key: int, up_to: int, before_ms: int) -> None:
        """Take the blocks apart of which messages are about to go: what is left of them may be packed again."""
        going = self._connection.execute(
            "SELECT packed FROM messages WHERE place > ? AND place <= ? AND created_ms < ? AND packed IS NOT NULL",
            (key * PLACES, key * PLACES + up_to, before_ms),
        ).fetchall()
        texts = Texts(self._connection, Dictionaries())
        for first in sorted({packed // PLACES for (packed,) in going}):
            self._connection.executemany(
                "UPDATE messages SET content = ?, metadata = ?, packed = NULL WHERE place = ? AND packed IS NOT NULL",
                [
                    (text.content, text.metadata, key * PLACES + text.number)
                    for text in texts.block(key * PLACES + first)
                ],
            )
            self._connection.execute("DELETE FROM blocks WHERE place = ?", (key * PLACES + first,))

    def _delete_messages(self, key: int, up_to: int, before_ms: int | None) -> bool:
        """Delete them; whether some were packed."""
        was_packed = False
        gone = self._connection.execute(
            "DELETE FROM messages WHERE place > ? AND place <= ? AND (?3 IS NULL OR created_ms < ?3)"
            " RETURNING created_ms, kind, tokens_used, packed IS NOT NULL",
            (key * PLACES, key * PLACES + up_to, before_ms),
        )
        messages = system = tokens = 0
        for created_ms, kind, tokens_used, is_packed in gone:
            was_packed = was_packed or bool(is_packed)
            self._message_days[created_ms // DAY_MS] -= 1
            messages += 1
            system += kind < _SYSTEM_KINDS
            tokens += tokens_used or 0
        self._count_messages(-messages, -system, -tokens)
        return was_packed

    def _count_messages(self, messages: int, system: int, tokens: int) -> None:
        totals = self._totals
        totals["messages"] += messages
        totals["system_messages"] += system
        totals["tokens"] += tokens

    def _count_conversation(self, before: _Counted | None, now: _Counted | None) -> None:
        totals, days = self._totals, self._conversation_days
        for counted, change in ((before, -1), (now, 1)):
            if counted is not None:
                escalated, archived, updated_ms = counted
                totals["conversations"] += change
                if escalated:
                    totals["escalated"] += change
                if archived:
                    totals["archived"] += change
                else:
                    days[updated_ms // DAY_MS] += change


def _head_put(changes: Changes, event: Event) -> None:
    changes.put_head(Head(event.id, event.version, bytes(event.value)))


def _appended(changes: Changes, event: Event) -> None:
    _head_put(changes, event)
    changes.put_messages(event.id, event.messages or ())


def _expired(changes: Changes, event: Event) -> None:
    _head_put(changes, event)
    changes.expire(event.id, event.up_to or 0, event.before or 0)


def _deleted(changes: Changes, event: Event) -> None:
    changes.delete(event.id)


def _escalated(changes: Changes, event: Event) -> None:
    changes.put_head(Head(event.id, event.head_version, bytes(event.head)))
    changes.put_escalation(Escalation(event.id, event.version, bytes(event.value)))


_APPLY: dict[str, Callable[[Changes, Event], None]] = {
    "message.append": _appended,
    "message.expire": _expired,
    "conversation.put": _head_put,
    "conversation.delete": _deleted,
    "conversation.archive": _head_put,
    "conversation.hold": _head_put,
    "escalation.open": _escalated,
}
