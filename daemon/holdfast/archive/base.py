"""What an archive is: it keeps every message, and answers what is asked about conversations.

An archive follows the journal: ``apply`` gets events in order and stores them together with the seq it has come to, so
each counts exactly once however often a crash repeats it. It decides nothing and is never the reason why an op is
refused. SQLite is one implementation; PostgreSQL fits as well: nothing here knows of files, and one test suite holds for
all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from holdfast.core.event import Event, StoredMessage

ARCHIVED_OPS = frozenset(
    {
        "message.append",
        "message.expire",
        "conversation.put",
        "conversation.delete",
        "conversation.archive",
        "conversation.hold",
        "escalation.open",
    }
)
"""The ops whose events an archive stores; all others pass it by."""


class Head(NamedTuple):
    """A conversation without its messages.

    Attributes:
        value: a JSON object: ``id``, ``title``, ``user_id``, ``session_id``, ``created_at``, ``updated_at``, ``escalated``,
            ``archived``, ``handler``, ``message_count`` (without system ones), ``system_count``, ``tokens_used``,
            ``last_number``, and fields of the caller's own.
    """

    id: str
    version: int
    value: bytes


class MessageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which messages of one conversation are wanted.

    Attributes:
        after, before: only numbers above, below.
        role, author: only these.
        since_ms, until_ms: created at or after, before; ms since 1970.
        limit: at most so many.
        newest: when there are more, the newest of them, else the oldest. The answer is in order of numbers either way.
    """

    after: int = 0
    before: int | None = None
    role: str | None = None
    author: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    limit: int = 100
    newest: bool = True


class ConversationQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which conversations are wanted, newest first: by ``updated_at``, then by id, both descending.

    Attributes:
        user_id, session_id, escalated, archived: only these; None means all.
        since_ms, until_ms: updated at or after, before; ms since 1970.
        after: the time and id of the last one of the page before.
        limit: at most so many.
    """

    user_id: str | None = None
    session_id: str | None = None
    escalated: bool | None = None
    archived: bool | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    after: tuple[int, str] | None = None
    limit: int = 100


class EscalationQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which escalations are wanted: high priority first, then the oldest (``opened_at``), then by id.

    Attributes:
        status, priority: only these; None means all.
        after: priority, time and id of the last one of the page before.
        limit: at most so many.
    """

    status: str | None = None
    priority: str | None = None
    after: tuple[str, int, str] | None = None
    limit: int = 100


class Escalation(NamedTuple):
    """An escalation; its id is that of its conversation.

    Attributes:
        value: a JSON object: ``id``, ``conversation_id``, ``reason``, ``contact_info``, ``priority``, ``status``,
            ``assignee``, ``opened_at``, ``updated_at``, ``claimed_at``, ``resolved_at``.
    """

    id: str
    version: int
    value: bytes


class Expirable(NamedTuple):
    """Messages of one conversation that are old enough to be removed.

    Attributes:
        head: the conversation as the archive knows it.
        up_to: the highest number among them.
        messages, system, tokens: how many they are, how many of them of the system, and the sum of their tokens.
        bytes: of their content and metadata, before any condensing.
    """

    head: Head
    up_to: int
    messages: int
    system: int
    tokens: int
    bytes: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """How much there is; exact as of the archive's seq, and found without counting what it holds.

    Attributes:
        conversations: all of them.
        active: not archived, and updated in the last 30 days.
        old: not archived, and not updated for 90 days.
        archived: archived ones.
        escalated: those that are or were escalated.
        messages: all, those of the system as well.
        system_messages: of them.
        messages_last_30_days: by ``created_at``.
        tokens: the sum of ``tokens_used`` of all messages.
        bytes: what the archive takes on the disk.
    """

    conversations: int
    active: int
    old: int
    archived: int
    escalated: int
    messages: int
    system_messages: int
    messages_last_30_days: int
    tokens: int
    bytes: int


class Condensed(NamedTuple):
    """What one step of condensing came to.

    Attributes:
        messages: that take less room now.
        bytes_before, bytes_after: of their content and metadata.
        after: the conversation to go on behind; None when there is nothing more to do.
    """

    messages: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    after: str | None = None


class ArchiveError(Exception):
    """The archive cannot do what it should for now: no room, no permission, no connection. Try again later."""


class ArchiveBroken(ArchiveError):
    """The disk refused to sync, so what is not durable yet may be gone although it can still be read. This archive takes
    nothing more; it has to be opened again."""


class ArchiveDamaged(Exception):
    """What the archive holds cannot be read. It has to be made anew."""


class ArchiveGone(ArchiveDamaged):
    """Somebody removed or replaced it while it was open. It can still be read, until it is closed; but who opens it next
    does not find it."""


class Archive(ABC):
    """One archive, open.

    ``apply`` and ``checkpoint`` are called by one thread at a time; everything else by any thread, at the same time.
    Every method may raise ``ArchiveError`` or ``ArchiveDamaged``; then nothing was changed.

    Attributes:
        archived_seq: it holds every event up to here.
        durable_seq: … and these would survive a power cut.
    """

    archived_seq: int
    durable_seq: int

    # Writing.

    @abstractmethod
    def apply(self, events: Sequence[tuple[int, Event]], up_to: int) -> None:
        """Store *events*, each with its seq, and *up_to* as ``archived_seq``, in one transaction.

        Events with a seq that is archived already are passed over. *events* hold no batches: their members come one by
        one, with the batch's seq.
        """

    @abstractmethod
    def fill(self, heads: Iterable[Head], escalations: Iterable[Escalation]) -> None:
        """Store what a rebuilt archive begins with: conversations without messages, and escalations.

        A conversation that is there is replaced, its messages stay. ``archived_seq`` stays as it is.
        """

    @abstractmethod
    def fill_messages(self, id: str, messages: Sequence[StoredMessage]) -> int:
        """Store messages of the conversation *id* that came from elsewhere; how many of them were not there.

        Those whose number is there, and those of an unknown conversation, are passed over.
        """

    @abstractmethod
    def checkpoint(self) -> None:
        """Bring everything to stable storage: ``durable_seq`` becomes ``archived_seq``."""

    @abstractmethod
    def close(self) -> None:
        """Checkpoint when possible, and give everything back; may be called twice."""

    # Reading.

    @abstractmethod
    def messages(self, id: str, wanted: MessageQuery) -> list[StoredMessage]:
        """The messages of the conversation *id*; empty when it has none."""

    @abstractmethod
    def conversations(self, wanted: ConversationQuery) -> list[Head]:
        """A page of conversations."""

    @abstractmethod
    def escalations(self, wanted: EscalationQuery) -> list[Escalation]:
        """A page of escalations."""

    @abstractmethod
    def external_numbers(self, id: str, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        """Of the pairs of channel and external id in *wanted*, those that messages of the conversation *id* have, each
        with the message's number."""

    @abstractmethod
    def figures(self, now_ms: int) -> Figures:
        """How much there is, as of *now_ms*."""

    @abstractmethod
    def message_counts(self) -> dict[str, int]:
        """Of every conversation how many messages are here; counts them, for checks."""

    # Retention.

    @abstractmethod
    def archivable(self, before_ms: int, limit: int, after: str = "") -> list[Head]:
        """Conversations that are not archived and were last updated before *before_ms*, by id, from behind *after* on."""

    @abstractmethod
    def count_archivable(self, before_ms: int) -> int:
        """How many these are."""

    @abstractmethod
    def expirable(self, before_ms: int, limit: int, after: str = "") -> list[Expirable]:
        """Of up to *limit* conversations, by id from behind *after* on, the messages created before *before_ms*."""

    @abstractmethod
    def condense(self, after: str = "") -> Condensed:
        """Store some messages of archived conversations in less room, where this archive can, by id from behind *after* on.

        What is read is as before. A step takes some milliseconds and is one transaction, so that it can be broken off
        behind any of them, and begun anew: what is done already is passed over.
        """

    @abstractmethod
    def compacted(self, path: Path, is_busy: Callable[[], bool]) -> bool:
        """Write the archive without what is free in it to the new file *path*, as of one moment; False where that has no
        meaning. Others read and write meanwhile. The file is durable; it has still to be put in the archive's place.

        *is_busy* is asked now and then whether others used the disk since; what it raises breaks it off.
        """

    # Care.

    @abstractmethod
    def check(self) -> list[str]:
        """Look through everything; what is wrong, in words; empty when nothing is. May take seconds."""

    @abstractmethod
    def copy_to(self, path: Path, is_busy: Callable[[], bool]) -> int:
        """Write a consistent copy to the file *path*, which must not exist; the seq at which the copy stands.

        In steps, between which events are applied and brought to the disk as usual; what comes meanwhile may be in it. The
        copy is not durable. *is_busy* is asked between the steps whether others have used the disk since it was asked
        last, and what it raises breaks the copying off.

        Raises:
            StorageFull: no room for the copy.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What an operator should know: kind, place, sizes in bytes."""
