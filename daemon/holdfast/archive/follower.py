"""Bringing the events about conversations into the archive, in a thread of its own.

Lazy while nobody looks, since many events in one transaction cost little more than one; at once for a reader. It
follows what is synced: what a power cut could still take out of the journal must not be in the archive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import orjson

from holdfast.archive.base import (
    ARCHIVED_OPS,
    Archive,
    ArchiveBroken,
    ArchiveDamaged,
    ArchiveError,
    ArchiveGone,
    ConversationQuery,
    Escalation,
    Head,
    MessageQuery,
)
from holdfast.clock import parse_ms
from holdfast.core.backlog import Backlog
from holdfast.core.event import Event, StoredMessage, decode_event
from holdfast.disk.tail import Tail, oldest_seq
from holdfast.errors import Gone, Unavailable

LAZY_S = 0.05
"""How long events may gather before they are archived, when no reader waits."""

RETRY_S = 1.0
"""After an error of the archive."""

READ_WAIT_S = 10.0
"""The longest that a reader waits for the archive to have what it may expect."""

READ_TRIES = 2
"""… and how many failed tries to write it, since a full disk is none the emptier for waiting."""

JOURNAL_READ_BYTES = 1 << 20

MESSAGES_AT_ONCE = 500
"""Of one conversation, that are taken from an old archive together."""

_NUMBER_MAX = 2**63


class Place(Protocol):
    """Where an archive is kept, and how a damaged one is replaced."""

    def open(self) -> Archive | None:
        """The archive; None when there is none.

        Raises:
            ArchiveDamaged: it has to be made anew.
            DataRefused: a newer Holdfast wrote it.
        """

    def create(self) -> Archive:
        """An empty archive, where there is none."""

    def begin(self) -> Archive:
        """An empty archive beside the one that is there."""

    def salvage(self) -> Iterable[tuple[str, list[StoredMessage]]]:
        """What can be read of the damaged archive: some messages of one conversation at a time."""

    def adopt(self, archive: Archive) -> Archive:
        """Put the archive that ``begin`` gave in the place of the one that is there, which is kept as evidence."""

    def begin_compacted(self) -> Path:
        """Where a compacted copy of the archive is to be written; nothing is there."""

    def adopt_compacted(self) -> Archive:
        """Put that copy in the place of the archive, which is closed with nothing left in its log; it is gone then."""

    def discard_compacted(self) -> None:
        """Remove that copy, if there is one."""


class Source(NamedTuple):
    """Where the follower takes from: the writer's side of it.

    Attributes:
        lock: the engine's, under which *backlog* is used.
        journal: its directory.
        synced_seq: gives the last event that would survive a power cut.
        settle: has the writer sync what is acknowledged but not synced; returns at once.
        heads, escalations: everything in memory, for an archive that begins anew.
    """

    lock: threading.Lock
    backlog: Backlog
    journal: Path
    synced_seq: Callable[[], int]
    settle: Callable[[], None]
    heads: Callable[[], Iterable[Head]]
    escalations: Callable[[], Iterable[Escalation]]


class Follower:
    """Keeps one archive up to date with one engine; from ``start`` to ``close``.

    Attributes:
        failure: why it cannot write for now; None when it can.
        lost_messages: how many messages a damaged archive took with it.
    """

    def __init__(self, place: Place, source: Source, log: Any) -> None:
        """Open the archive in *place* or, when that cannot be done now, have the thread open it later.

        Raises:
            DataRefused: a newer Holdfast wrote it.
        """
        self.failure: str | None = None
        self.lost_messages = 0
        self._place = place
        self._source = source
        self._log = log
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._wanted_durable_seq = 0
        self._is_closing = False
        self._archive: Archive | None = None
        # Why there is no archive that could be used; empty for one that never was.
        self._damage: str | None = None
        self._is_damage_told = False
        # Whether the archive is damaged only in that it is no longer where it should be.
        self._is_gone = False
        # Tries to write it that failed.
        self._failures = 0
        self._rebuilt: _Rebuilt | None = None
        self._swap: _Swap | None = None
        try:
            self._open()
        except (ArchiveError, OSError) as error:
            self._note_failure(str(error))  # a full disk, say; the thread tries again
        self._thread = threading.Thread(target=self._run, name="holdfast-archive", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    @property
    def archived_seq(self) -> int:
        """Everything up to here is in the archive."""
        archive = self._archive
        return 0 if archive is None or self._damage is not None else archive.archived_seq

    @property
    def covered_seq(self) -> int:
        """Every event about conversations up to here is in the archive; there may have been none of late."""
        synced_seq = self._source.synced_seq()
        return synced_seq if self._damage is None and not self._has_events() else self.archived_seq

    @property
    def durable_seq(self) -> int:
        """Everything up to here is in it and would survive a power cut: what the journal need not keep for it."""
        archive = self._archive
        return 0 if archive is None or self._damage is not None else archive.durable_seq

    @property
    def present(self) -> Archive | None:
        """The archive as it is now, behind or not; None when there is none that could be used."""
        archive = self._archive
        return None if self._damage is not None else archive

    @property
    def lag(self) -> int:
        """How many events about conversations wait to be archived; at least so many, when it is far behind."""
        return len(self._source.backlog)

    def committed(self) -> None:
        """Something may be synced that was not; called by the writer."""
        if self._has_events():
            with self._changed:
                self._changed.notify_all()

    def archive(self, timeout: float = READ_WAIT_S) -> Archive:
        """The archive, once it has every event about conversations that anybody was told of; blocks until then.

        Raises:
            Unavailable: *timeout* seconds have passed, or it is closed.
        """
        source = self._source
        target = source.backlog.last_seq
        archive = self._with(target)
        if archive is not None:
            return archive
        with self._changed:
            self._hurry.set()
            self._changed.notify_all()
        if source.synced_seq() < target:
            source.settle()
        with self._changed:
            failures_max = self._failures + READ_TRIES
            # An event that is taken back meanwhile, on a full disk, is waited for no longer.
            self._changed.wait_for(
                lambda: (
                    self._is_closing
                    or self._with(min(target, source.backlog.last_seq)) is not None
                    or self._failures >= failures_max
                ),
                timeout,
            )
        archive = self._with(min(target, source.backlog.last_seq))
        if archive is None:
            reason = "closed" if self._is_closing else self.failure or self._damage or "behind"
            raise Unavailable(f"the archive does not have the newest messages yet ({reason}); try again soon")
        return archive

    def catch_up(self, seq: int, timeout: float) -> bool:
        """Have the archive hold everything up to *seq*, on stable storage; whether it does within *timeout* seconds."""
        if not self._thread.is_alive():
            return False
        with self._changed:
            self._wanted_durable_seq = max(self._wanted_durable_seq, seq)
            self._hurry.set()
            self._changed.notify_all()
            failures = self._failures
            self._changed.wait_for(
                lambda: self._is_closing or self.durable_seq >= seq or self._failures > failures, timeout
            )
        return self.durable_seq >= seq

    def compact(self, is_busy: Callable[[], bool]) -> None:
        """Write the archive anew without what is free in it, and go on with that; blocks, while others read and write.

        The journal must keep what is not durable in the archive when this is called, until it returns. *is_busy* tells
        whether others used the disk since it was asked last; what it raises breaks the writing off.

        Raises:
            Unavailable: it could not be done now; the archive is as it was.
        """
        archive = self.archive()
        try:
            if not archive.compacted(self._place.begin_compacted(), is_busy):
                return
            with self._changed:
                if self._is_closing or self.present is not archive:
                    raise Unavailable("the archive was closed, or made anew, while it was compacted; try again")
                swap = self._swap = _Swap()
                self._hurry.set()
                self._changed.notify_all()
                self._changed.wait_for(lambda: swap.is_done or self._is_closing)
            if swap.failure or not swap.is_done:
                raise Unavailable(f"the archive was not compacted: {swap.failure or 'closed'}; try again")
        except (ArchiveError, ArchiveDamaged) as error:
            raise Unavailable(f"the archive cannot be compacted: {error}") from error
        finally:
            # Not when it has the archive's name already: then nothing is there.
            with suppress(OSError):
                self._place.discard_compacted()

    def report_damage(self, error: ArchiveDamaged) -> None:
        """A reader found that the archive cannot be read: have it made anew."""
        with self._changed:
            if self._damage is None:
                self._damage = str(error)
            self._changed.notify_all()

    def close(self) -> None:
        """End, after what is synced is archived as far as that is possible at once."""
        with self._changed:
            self._is_closing = True
            self._hurry.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if self._archive is not None:
            with suppress(ArchiveError, ArchiveDamaged):
                self._archive.close()

    def _with(self, seq: int) -> Archive | None:
        """The archive when it has everything up to *seq*."""
        archive = self.present
        return archive if archive is not None and archive.archived_seq >= seq else None

    def _has_events(self) -> bool:
        backlog, synced_seq = self._source.backlog, self._source.synced_seq()
        first_seq = backlog.first_seq
        return min(backlog.since, synced_seq) > self.archived_seq or (first_seq is not None and first_seq <= synced_seq)

    def _has_work(self) -> bool:
        return (
            self._is_closing
            or self._archive is None
            or self._damage is not None
            or self._swap is not None
            or self._has_events()
            or self._wanted_durable_seq > self.durable_seq
        )

    # The thread.

    def _open(self) -> None:
        synced_seq = self._source.synced_seq()
        try:
            archive = self._place.open()
        except ArchiveDamaged as error:
            self._damage = str(error)
            return
        if (archive is None or not archive.archived_seq) and next(iter(self._source.heads()), None) is None:
            # Nothing to begin with, so nothing to be made anew: what happened to conversations that are gone is over.
            archive = archive or self._place.create()
            archive.apply([], synced_seq)
        elif archive is None:
            self._damage = ""
        elif archive.archived_seq > synced_seq:
            self._damage = f"it holds events up to {archive.archived_seq}, the journal ends at {synced_seq}"
        self._archive = archive

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                is_closing = self._is_closing
            if not is_closing and self._damage is None:
                self._hurry.wait(LAZY_S)
            self._hurry.clear()
            reason: str | None = None
            try:
                if self._archive is None and self._damage is None:
                    self._open()
                elif self._damage is not None:
                    self._begin_anew(self._damage)
                elif self._swap is not None and not is_closing:
                    self._put_compacted(self._swap)
                else:
                    self._step()
            except ArchiveDamaged as error:
                if self._damage is not None:
                    reason = str(error)  # it was being made anew: without a pause, this would go in a circle
                self._damage, self._is_gone = str(error), isinstance(error, ArchiveGone)
            except Gone as error:
                self._damage = f"it is older than the journal: {error}"
            except (ArchiveError, OSError) as error:
                reason = str(error)
                if isinstance(error, ArchiveBroken) and self._archive is not None:
                    # It stays as it is, and the next one that is opened brings all of it to the disk anew.
                    self._archive.close()
                    self._archive = None
            except Exception as error:  # a fault of ours must end neither the archive for good nor anything else
                reason = repr(error)
                self._log.exception("archive.failed", reason=reason)
            self._note_failure(reason)
            with self._changed:
                if self._swap is not None and (reason is not None or self._damage is not None):
                    # What stands in its way is dealt with first; whoever asked may ask again.
                    self._swap.end(reason or self._damage or "")
                    self._swap = None
                self._changed.notify_all()
                if is_closing or (reason is not None and self._changed.wait_for(lambda: self._is_closing, RETRY_S)):
                    return

    def _step(self) -> None:
        source, archive = self._source, self._archive
        assert archive is not None
        synced_seq = source.synced_seq()
        with source.lock:
            since = source.backlog.since
            events = source.backlog.take(synced_seq)
        behind_seq = min(since, synced_seq)
        if archive.archived_seq < behind_seq:
            # What waited was too much to be kept, or could not be stored when it was taken; it stands in the journal. What
            # is not synced may be missing there still, or be cut off and written anew.
            self._read_journal(archive, behind_seq)
            if archive.archived_seq < behind_seq:
                return  # closing; the next start goes on from here, and what was taken stands in the journal as well
        if events or self._wanted_durable_seq > archive.archived_seq:
            archive.apply(events, synced_seq)
        if self._rebuilt is not None:
            self._tell_rebuilt(archive, self._rebuilt)
        if self._wanted_durable_seq > archive.durable_seq:
            archive.checkpoint()
            # Whoever wants more than there is waits for its own time to pass, and not here in a circle.
            self._wanted_durable_seq = 0

    def _put_compacted(self, swap: _Swap) -> None:
        """Go on with the compacted copy of the archive, which is a little behind: the journal has the rest."""
        archive = self._archive
        assert archive is not None
        seq = archive.archived_seq
        # While it is closed and opened again nobody can read it; those who try wait for us.
        self._archive = None
        archive.close()
        try:
            if archive.durable_seq < seq:
                swap.failure = "not all of it could be brought to the disk"
            else:
                self._archive = self._place.adopt_compacted()
        finally:
            self._swap = None
            swap.is_done = True
            if self._archive is None:
                self._open()

    def _read_journal(self, archive: Archive, up_to: int) -> None:
        for position, events in self._journal_after(archive.archived_seq, up_to):
            archive.apply(events, position)

    def _journal_after(self, seq: int, up_to: int) -> Iterator[tuple[int, list[tuple[int, Event]]]]:
        """The events for an archive that the journal has behind *seq*, in parts, each with the seq to which it goes."""
        tail = Tail(self._source.journal, seq)
        try:
            while tail.position < up_to and not self._is_closing:
                events: list[tuple[int, Event]] = []
                for line in tail.read(up_to, JOURNAL_READ_BYTES):
                    event = decode_event(line.payload)
                    members = event.events or [] if event.op == "batch" else [event]
                    events += [(line.seq, one) for one in members if one.op in ARCHIVED_OPS]
                yield tail.position, events
        finally:
            tail.close()

    def _first_numbers(self, up_to: int) -> dict[str, int]:
        """Of every conversation the lowest number among those of its messages that the journal has."""
        found: dict[str, int] = {}
        for _, events in self._journal_after(max(0, oldest_seq(self._source.journal) - 1), up_to):
            for _, event in events:
                for message in event.messages or ():
                    found[event.id] = min(message.number, found.get(event.id, _NUMBER_MAX))
        return found

    def _begin_anew(self, damage: str) -> None:
        """Make the archive anew: heads from memory, messages from what is left of the old one, then the journal.

        The old one stays in its place until the new one is complete, so that this can be broken off at any moment.
        """
        source = self._source
        if damage and not self._is_damage_told:
            self._log.error("archive.damaged", reason=damage)
            self._is_damage_told = True
        if self._archive is not None and not self._is_gone:
            self._archive.close()
            self._archive = None
        synced_seq = source.synced_seq()
        with source.lock:
            # From here on the backlog has what is new; what was before comes from memory and the journal.
            source.backlog.take(synced_seq)
        archive = self._place.begin()
        try:
            heads = list(source.heads())
            newest_seq = source.backlog.last_seq
            last_numbers = {head.id: orjson.loads(head.value)["last_number"] for head in heads}
            archive.fill(heads, source.escalations())
            salvaged = 0
            # Also where there was none: it may have been removed, and then backups have it.
            first_numbers = self._first_numbers(synced_seq)
            for id, messages in self._saved(heads):
                if self._is_closing:
                    raise ArchiveError("closed while the archive was made anew")
                # What has a higher number was never acknowledged, or its event is lost; the number is given again. What
                # the journal has is taken from there: its events have checksums.
                last_number = min(last_numbers.get(id, 0), first_numbers.get(id, _NUMBER_MAX) - 1)
                whole = [message for message in messages if message.number <= last_number]
                salvaged += archive.fill_messages(id, whole)
            archive.apply([], max(0, oldest_seq(source.journal) - 1))
            self._read_journal(archive, synced_seq)
            if self._is_closing:
                raise ArchiveError("closed while the archive was made anew")
        except BaseException:
            archive.close()
            raise
        if self._archive is not None:
            # Before the new one has its name: whoever closes the old one removes what lies beside that name.
            self._archive.close()
            self._archive = None
        self._archive = self._place.adopt(archive)
        self._damage, self._is_damage_told, self._is_gone = None, False, False
        if damage or heads:
            self._rebuilt = _Rebuilt(newest_seq, salvaged, is_first=not damage)
            self._tell_rebuilt(self._archive, self._rebuilt)

    def _saved(self, heads: list[Head]) -> Iterator[tuple[str, list[StoredMessage]]]:
        """What the old archive still gives: as long as it is open by itself, else what is in its place."""
        if self._archive is None:
            yield from self._place.salvage()
            return
        for head in heads:
            wanted = MessageQuery(newest=False, limit=MESSAGES_AT_ONCE)
            while found := self._archive.messages(head.id, wanted):
                yield head.id, found
                wanted = MessageQuery(newest=False, limit=MESSAGES_AT_ONCE, after=found[-1].number)

    def _tell_rebuilt(self, archive: Archive, rebuilt: _Rebuilt) -> None:
        """Say what an archive made anew has and lacks, once it has come to where the heads were that it began with."""
        if archive.archived_seq < min(rebuilt.newest_seq, self._source.backlog.last_seq):
            return
        self._rebuilt = None
        self.lost_messages, conversations, messages = _loss(archive)
        if rebuilt.is_first and not self.lost_messages:
            return
        self._log.warning(
            "archive.rebuilt",
            conversations=conversations,
            messages=messages,
            salvaged=rebuilt.salvaged,
            lost_messages=self.lost_messages,
        )

    def _note_failure(self, reason: str | None) -> None:
        if reason is not None and self.failure is None:
            self._log.error(
                "archive.stalled", reason=reason, action="it is tried again; the journal keeps what it needs"
            )
        elif reason is None and self.failure is not None:
            self._log.info("archive.resumed")
        self.failure = reason
        self._failures += reason is not None


class _Swap:
    """A compacted copy that is to take the archive's place.

    Attributes:
        is_done: it did, or could not.
        failure: why it could not; empty when it did.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.failure = ""

    def end(self, failure: str) -> None:
        """It could not."""
        self.failure, self.is_done = failure, True


class _Rebuilt(NamedTuple):
    """An archive that was made anew.

    Attributes:
        newest_seq: of the newest of the heads that it began with.
        salvaged: messages saved from the old one.
        is_first: there was none.
    """

    newest_seq: int
    salvaged: int
    is_first: bool


def _loss(archive: Archive) -> tuple[int, int, int]:
    """How many messages are missing in *archive*, and how many conversations and messages it has."""
    there = archive.message_counts()
    missing = conversations = 0
    after: tuple[int, str] | None = None
    while heads := archive.conversations(ConversationQuery(limit=1_000, after=after)):
        for head in heads:
            said = orjson.loads(head.value)
            missing += max(0, said["message_count"] + said["system_count"] - there.get(head.id, 0))
        conversations += len(heads)
        after = parse_ms(said["updated_at"]), heads[-1].id
    return missing, conversations, sum(there.values())
