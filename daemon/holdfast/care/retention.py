"""Letting conversations go in time: archived when nobody has written for long, their messages deleted when they are old.

Everything is done by ops, a few at a time, so that it is journaled, survives a crash and holds nobody up. What is under a
legal hold keeps its messages.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import orjson

from holdfast.care.compact import condense
from holdfast.clock import parse_ms
from holdfast.errors import Conflict, HoldfastError, InvalidRecord, NotFound, VersionMismatch
from holdfast.ops import ConversationArchive, ConversationDelete, MessageExpire, Record

if TYPE_CHECKING:
    from holdfast.archive.base import Expirable, Head
    from holdfast.engine import Engine, Ticket

AT_ONCE = 50
"""Conversations changed between two waits for the disk."""

LOOK_AT_ONCE = 500
"""Conversations looked at in one question to the archive."""

DAY_MS = 24 * 3600 * 1000

CHECK_EVERY_S = 600.0
"""How often a daemon looks whether a day has passed, and how long after its start it looks first."""


class Cleanup(msgspec.Struct, frozen=True, kw_only=True):
    """What is to go.

    Attributes:
        archive_before_ms: conversations last updated before this are archived, ms since 1970; None: none.
        delete_before_ms: messages created before this are deleted; None: none.
        idle_before_ms: messages are deleted only of conversations last updated before this; None: of all.
        limit: conversations changed at most; None: no limit.
        is_dry_run: count only.
    """

    archive_before_ms: int | None = None
    delete_before_ms: int | None = None
    idle_before_ms: int | None = None
    limit: int | None = None
    is_dry_run: bool = False


class CleanupReport(msgspec.Struct, kw_only=True):
    """What went, or in a dry run would go.

    Attributes:
        archived: conversations that were archived.
        conversations: those that lost messages.
        messages_deleted: these messages.
        bytes_freed: of their content and metadata; the archive uses the room for new ones.
        held: conversations that keep old messages under a legal hold.
        remaining: conversations still to be archived, and 1 more when old messages are left to look for.
    """

    archived: int = 0
    conversations: int = 0
    messages_deleted: int = 0
    bytes_freed: int = 0
    held: int = 0
    remaining: int = 0


class Removal(msgspec.Struct, kw_only=True):
    """What became of idle conversations that were to be removed.

    Attributes:
        deleted: those that are gone.
        errors: those that could not be removed.
        held: those that a legal hold keeps.
        remaining: 1 when there may be more, beyond the limit.
    """

    deleted: int = 0
    errors: int = 0
    held: int = 0
    remaining: int = 0


def by_settings(engine: Engine, now_ms: int) -> Cleanup:
    """What the settings say should go now."""
    retention = engine.settings.retention
    return Cleanup(
        archive_before_ms=now_ms - round(retention.archive_after * 1000),
        delete_before_ms=now_ms - round(retention.delete_after * 1000),
    )


def older_than(
    days: float, now_ms: int, *, delete_messages: bool = False, limit: int | None = None, is_dry_run: bool = False
) -> Cleanup:
    """Archive conversations without a message for *days*; with *delete_messages*, delete their messages as well.

    Raises:
        InvalidRecord: fewer than 0 days, or more than a century.
    """
    if not 0 <= days <= 36_500:
        raise InvalidRecord(f"days must be from 0 to 36500, found {days}")
    before_ms = now_ms - round(days * DAY_MS)
    return Cleanup(
        archive_before_ms=before_ms,
        delete_before_ms=before_ms if delete_messages else None,
        idle_before_ms=before_ms,
        limit=limit,
        is_dry_run=is_dry_run,
    )


def clean(
    engine: Engine, wanted: Cleanup, *, reason: str, is_stopping: Callable[[], bool] = lambda: False
) -> CleanupReport:
    """Do what is *wanted*, and log it as ``retention.completed``; blocks. What was not done is done by the next call.

    Raises:
        Unavailable: the archive cannot be read.
        StorageFull: no room to journal it.
    """
    started = engine.monotonic()
    run = _Run(engine, wanted, is_stopping)
    report = run.report
    try:
        run.archive()
        run.delete()
    finally:
        if not wanted.is_dry_run:
            engine.log.info(
                "retention.completed",
                reason=reason,
                archived=report.archived,
                conversations=report.conversations,
                messages_deleted=report.messages_deleted,
                bytes_freed=report.bytes_freed,
                held=report.held,
                duration_ms=round((engine.monotonic() - started) * 1000, 1),
            )
    return report


def remove_idle(engine: Engine, hours: float, now_ms: int, *, limit: int | None = None) -> Removal:
    """Remove conversations not updated for *hours*, with everything in them; blocks.

    Raises:
        InvalidRecord: fewer than 0 hours, or more than a century.
        Unavailable: the archive cannot be read.
    """
    if not 0 <= hours <= 876_000:
        raise InvalidRecord(f"hours must be from 0 to 876000, found {hours}")
    before_ms = now_ms - round(hours * 3600 * 1000)
    removal = Removal()
    cursor: str | None = None
    try:
        while not removal.remaining:
            page = engine.transcripts.page(limit=AT_ONCE, cursor=cursor, until_ms=before_ms)
            idle = [item for item in page.items if not engine.is_held(orjson.loads(item.value))]
            removal.held += len(page.items) - len(idle)
            if limit is not None:
                left = limit - removal.deleted - removal.errors
                removal.remaining = int(len(idle) > left)
                idle = idle[:left]
            _remove(engine, idle, removal)
            if page.next is None:
                break
            cursor = page.next
    finally:
        engine.log.info("retention.idle_removed", deleted=removal.deleted, errors=removal.errors, held=removal.held)
    return removal


def _remove(engine: Engine, idle: list[Record], removal: Removal) -> None:
    """Remove the conversations *idle* with one wait for all, and count in *removal* what became of each."""
    tickets: list[Ticket] = []
    outcomes: list[HoldfastError | None] = []
    for item in idle:
        try:
            # Only as it was seen: whoever writes meanwhile is not idle.
            tickets.append(engine.submit(ConversationDelete(id=item.id, if_version=item.version)))
        except HoldfastError as error:
            outcomes.append(error)
    for ticket in tickets:
        try:
            ticket.wait()
            outcomes.append(None)
        except HoldfastError as error:
            outcomes.append(error)
    for outcome in outcomes:
        match outcome:
            case None:
                removal.deleted += 1
            case VersionMismatch() | NotFound():
                pass
            case Conflict():
                removal.held += 1  # since a moment ago
            case _:
                removal.errors += 1


class Daily:
    """Does what the settings say, once a day."""

    def __init__(self, engine: Engine, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._engine = engine
        self._is_stopping = is_stopping
        self._due_at = 0.0

    def run_when_due(self) -> None:
        """Let go what is old, and pack what is archived, unless that was done less than a day ago; errors as ``clean``."""
        now = self._engine.monotonic()
        if now < self._due_at:
            return
        clean(
            self._engine,
            by_settings(self._engine, self._engine.now_ms()),
            reason="daily",
            is_stopping=self._is_stopping,
        )
        condense(self._engine, self._is_stopping)
        self._due_at = now + DAY_MS / 1000


class _Run:
    """One cleanup under way."""

    def __init__(self, engine: Engine, wanted: Cleanup, is_stopping: Callable[[], bool]) -> None:
        self.report = CleanupReport()
        self._engine = engine
        self._wanted = wanted
        self._is_stopping = is_stopping
        self._left = wanted.limit
        self._tickets: list[tuple[Ticket, Callable[[], None]]] = []

    def archive(self) -> None:
        """Archive what nobody has written to for long."""
        before_ms = self._wanted.archive_before_ms
        if before_ms is None:
            return
        count = self._engine.transcripts.read(lambda archive: archive.count_archivable(before_ms))
        if self._wanted.is_dry_run:
            self.report.archived = count
            return
        after = ""
        while self._may_go_on() and (found := self._archivable(before_ms, after)):
            for head in found:
                if not self._may_go_on():
                    break
                self._do(ConversationArchive(id=head.id, if_version=head.version), self._note_archived)
            self._settle()
            after = found[-1].id
        if not self._may_go_on():
            self.report.remaining = max(0, count - self.report.archived)

    def delete(self) -> None:
        """Delete the messages that are old."""
        before_ms, idle_before_ms = self._wanted.delete_before_ms, self._wanted.idle_before_ms
        if before_ms is None:
            return
        after = ""
        while found := self._expirable(before_ms, after):
            for old in found:
                if not self._may_go_on():
                    self._settle()
                    self.report.remaining += 1
                    return
                head = orjson.loads(old.head.value)
                if idle_before_ms is not None and parse_ms(head["updated_at"]) >= idle_before_ms:
                    continue
                if self._engine.is_held(head):
                    self.report.held += 1
                elif self._wanted.is_dry_run:
                    self._note_deleted(old)
                else:
                    self._do(_expiry_of(old, before_ms), partial(self._note_deleted, old))
            self._settle()
            after = found[-1].head.id

    def _archivable(self, before_ms: int, after: str) -> list[Head]:
        return self._engine.transcripts.read(lambda archive: archive.archivable(before_ms, LOOK_AT_ONCE, after))

    def _expirable(self, before_ms: int, after: str) -> list[Expirable]:
        return self._engine.transcripts.read(lambda archive: archive.expirable(before_ms, AT_ONCE, after))

    def _may_go_on(self) -> bool:
        return not self._is_stopping() and (self._left is None or self._left > 0)

    def _do(self, op: ConversationArchive | MessageExpire, note: Callable[[], None]) -> None:
        if self._left is not None:
            self._left -= 1
        try:
            self._tickets.append((self._engine.submit(op), note))
        except (VersionMismatch, NotFound, Conflict):
            return  # changed since it was looked at; the next run looks again
        if len(self._tickets) >= AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        """Wait for what was asked for, and count it."""
        tickets, self._tickets = self._tickets, []
        for ticket, note in tickets:
            try:
                ticket.wait()
            except (VersionMismatch, NotFound, Conflict):
                continue
            note()

    def _note_archived(self) -> None:
        self.report.archived += 1

    def _note_deleted(self, old: Expirable) -> None:
        self.report.conversations += 1
        self.report.messages_deleted += old.messages
        self.report.bytes_freed += old.bytes


def _expiry_of(old: Expirable, before_ms: int) -> MessageExpire:
    return MessageExpire(
        id=old.head.id,
        if_version=old.head.version,
        before_ms=before_ms,
        up_to=old.up_to,
        messages=old.messages,
        system=old.system,
        tokens=old.tokens,
    )
