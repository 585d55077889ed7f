"""The single writer: ops come in, are decided, become events, and are answered when they are durable.

The same object serves the daemon's event loop, an embedded program's threads and the tests. It is plain,
synchronous and thread-safe; ``Ticket.committed`` is its only door to asyncio.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import msgspec
import orjson

from holdfast import record
from holdfast.archive.base import ArchiveDamaged, Escalation, Head
from holdfast.archive.follower import Follower, Place, Source
from holdfast.care import backup, mirror
from holdfast.care.space import SpaceWatch
from holdfast.clock import Clock, format_ms, parse_ms
from holdfast.commit import Batch as WriteBatch
from holdfast.commit import Committer
from holdfast.core.collection import SHARDS
from holdfast.core.conversations import Archived, Externals, external_ids, is_held
from holdfast.core.decide import NOTHING_KNOWN, decide, decide_expiry
from holdfast.core.event import Event, encode_event
from holdfast.core.rules import Rules, rules_of
from holdfast.core.sales import Sales, encode_sales
from holdfast.core.state import (
    COMPLETED_ORDERS,
    CONVERSATIONS,
    ESCALATIONS,
    KEYS,
    LEASES,
    ORDERS,
    SESSIONS,
    USERS,
    State,
    answer_of,
    apply,
)
from holdfast.disk.files import Directory, DirectoryLock
from holdfast.disk.journal import Journal
from holdfast.disk.snapshot import Manifest
from holdfast.errors import BadRequest, ForkedProcess, HoldfastError, StorageFull, TooLarge, Unavailable
from holdfast.feed import Events, Feed, Selection
from holdfast.flush import Flusher, KeptEdit, change_detector
from holdfast.leases import LeaseQueue
from holdfast.load import forgotten_ms
from holdfast.measures import Gauges
from holdfast.ops import (
    Answer,
    AnyOp,
    BackupReport,
    Batch,
    ConversationDelete,
    Durability,
    FlushReport,
    MessageAppend,
    OwnOp,
    Page,
    Record,
    Retry,
)
from holdfast.pages import Filter, page_of
from holdfast.settings import Settings
from holdfast.transcripts import Transcripts

if TYPE_CHECKING:
    from holdfast.care.copies import Copies

T = TypeVar("T")

EXPIRE_AT_ONCE = 1_000
"""Sessions that one ``session.expire`` event may hold, so that no event and no wait for the lock is long."""

ASKERS_MAX = 8
"""Threads in which event loops have conversations read: twice what the archive reads at once, for those that wait for it."""

ARCHIVE_WAIT_S = 5.0
"""What a flush gives the archive to catch up; when it does not, the journal is kept for it."""

COMPACT_ROOM = 1.2
"""Times the size of the archive that must be free to write a second one: what comes meanwhile needs room as well."""

CLOCK_JUMP_MS = 5 * 60_000
"""A wall clock this far ahead of the monotonic one has jumped; expiry does not believe it."""


class Ticket(msgspec.Struct, frozen=True, gc=False):
    """What was decided, and the wait until it may be told.

    Attributes:
        outcomes: one per op, in order; not to be shown before ``wait`` or ``committed``. Empty when the op is refused.
        seq: the last event of the ticket.
        batch: after which all of it is durable; None when it is already.
        refusal: of an op refused on grounds that are not durable yet.
    """

    outcomes: list[Answer | HoldfastError]
    seq: int
    batch: WriteBatch | None
    refusal: HoldfastError | None = None

    def waits_with(self, other: Ticket) -> bool:
        """Whether one wait serves both."""
        return self.batch is other.batch

    @property
    def answer(self) -> Answer:
        """The answer of a ticket for one op."""
        answer = self.outcomes[0]
        assert isinstance(answer, Answer), "a refused op has no answer"
        return answer

    def wait(self, timeout: float | None = None) -> None:
        """Block until everything this ticket tells is durable.

        Raises:
            StorageFull, JournalBroken: it is not; the ops were undone.
            Unavailable: *timeout* seconds have passed.
            HoldfastError: the op is refused, on grounds that are now durable.
        """
        if self.batch is not None:
            self.batch.wait(timeout)
        if self.refusal is not None:
            raise self.refusal

    def committed(self) -> Coroutine[Any, Any, None]:
        """The same as ``wait``, for asyncio."""
        if self.batch is None or self.refusal is not None:
            return self._told()
        # The common case, without a frame of its own on the way back to each waiter.
        return self.batch.committed()

    async def _told(self) -> None:
        if self.batch is not None:
            await self.batch.committed()
        if self.refusal is not None:
            raise self.refusal


class Engine:
    """The state, its journal and its snapshots, behind one lock.

    Made by ``recovery.open_engine``; owns the data directory until ``close``.

    Attributes:
        degraded: reasons why the data is not all it should be; empty when healthy.
        backups: the sets, and what keeps the history behind them.
        care_notes: such reasons, by the name of whoever found them and takes them back: a verification, a backup.
        feed: the event stream, for readers that need more than ``events``.
        lease_queue: who waits for a session's lease.
        space: the room on the disk, and what takes it, as of the last ``look_at_disk``.
        copies: those of the backups at a second place; None where nobody makes any.
        transcripts: the conversations, for reading.
        log: where it tells what it does.
        measures: what it, its journal thread and its flushes count.
        on_broken: called once, by whoever writes the journal, when the disk refused to sync: the process must end, with
            exit code 1.
    """

    def __init__(
        self,
        settings: Settings,
        state: State,
        journal: Journal,
        flusher: Flusher,
        lock: DirectoryLock,
        clock: Clock,
        log: Any,
        *,
        degraded: list[str],
        reserved_names: dict[str, str],
    ) -> None:
        self.settings = settings
        self._recovery_notes = degraded
        self.care_notes: dict[str, str] = {}
        self.space = SpaceWatch(settings.data_dir, clock.monotonic, log)
        self.copies: Copies | None = None
        self._reserved_names = reserved_names
        self._state = state
        # Which ids were forgotten before nobody knows.
        state.externals_since = state.seq
        self._journal = journal
        self._flusher = flusher
        flusher.journal_keep = settings.journal_keep
        self._directory_lock: DirectoryLock | None = lock
        self._clock = clock
        self.log = self._log = log
        self._rules = rules_of(settings, reserved_names)
        self._committer = Committer(state, journal, settings.durability, clock, log)
        self._committer.on_full = self._log_full
        self._committer.on_broken = self._refuse_all
        self.on_broken: Callable[[HoldfastError], None] = lambda error: None
        self.measures = self._committer.measures
        self._op_counts = self.measures.ops
        self._accepted_ops = self._op_counts.accepted
        self._lock = self._committer.lock
        self.feed = Feed(settings.data_dir / "journal", self._committer, flusher, lambda: state.seq)
        self._refusal: HoldfastError | None = None
        self._started = clock.monotonic()
        self._started_ms = clock.now_ms()
        if state.seq > flusher.snapshot_seq:
            # Replayed events are older, but by how much nobody needs to know.
            self._committer.unflushed_since = self._started
        self._expiry_clock = _ConfirmedClock(clock)
        self._close_guard = threading.Lock()
        self._submitter: ThreadPoolExecutor | None = None
        self._askers: ThreadPoolExecutor | None = None
        self.lease_queue = LeaseQueue()
        state.on_released = self.lease_queue.released
        self.transcripts = Transcripts(self.get, self._born_of, clock.now_ms, self._check_readable)
        self._follower: Follower | None = None
        self._mirror: mirror.Mirror | None = None
        self.backups = backup.Backups(self._backup_source(), clock, log)
        _open_engines.add(self)

    # Changing.

    def start_archive(self, place: Place) -> None:
        """Open the archive in *place* and follow the journal with it, until ``close``. Called once, before anything else.

        Raises:
            DataRefused: a newer Holdfast wrote it.
        """
        source = Source(
            lock=self._lock,
            backlog=self._state.backlog,
            journal=self.feed.directory,
            synced_seq=lambda: self._journal.synced_seq,
            settle=self._committer.settle,
            heads=lambda: (Head(one.id, one.version, one.value) for one in self._everything(CONVERSATIONS)),
            escalations=lambda: (Escalation(one.id, one.version, one.value) for one in self._everything(ESCALATIONS)),
        )
        follower = self._follower = Follower(place, source, self._log)
        self._committer.on_committed += (follower.committed,)
        self._flusher.follow("archive", lambda: follower.durable_seq)
        self._flusher.before_pruning = lambda seq: follower.catch_up(seq, ARCHIVE_WAIT_S)
        self.transcripts.follow_with(follower)
        follower.start()

    def rebuild_archive(self, reason: str, timeout: float) -> None:
        """Have the archive made anew, and wait until that is done.

        Raises:
            Unavailable: *timeout* seconds have passed; it goes on.
        """
        assert self._follower is not None, "there is an archive from the start on"
        self._follower.report_damage(ArchiveDamaged(reason))
        self._follower.archive(timeout)

    def start_mirror(self, *, trusted_seq: int | None, last_seq: int, lineage: str, stamp: Callable[[], str]) -> None:
        """Write the readable mirror after each flush from now on. Called once, after ``start_archive``.

        Args:
            trusted_seq: what the snapshots held at the start; what changed since was noted by the state's backlog. None
                when that is not known.
            last_seq: where the journal ended then.
            lineage, stamp: as of ``mirror.Source``.
        """
        assert self._state.backlog.touched is not None, "what the mirror needs was not noted"
        source = mirror.Source(
            lock=self._lock,
            backlog=self._state.backlog,
            get=self.get,
            ids=lambda collection: (one.id for one in self._everything(collection)),
            transcripts=self.transcripts,
            stamp=stamp,
            lineage=lineage,
            born_of=lambda id: self._born_of(id)[0],
        )
        writer = self._mirror = mirror.Mirror(self.settings.data_dir, source, trusted_seq, last_seq, self._log)
        self._flusher.before_publishing = writer.begin
        self._flusher.after_flush = writer.flushed
        writer.start()

    def start_backups(self) -> None:
        """Keep the history from now on, and clear away what a killed backup left. Called once, after ``start_archive``."""
        self.backups.start()

    def _backup_source(self) -> backup.Source:
        return backup.Source(
            data_dir=self.settings.data_dir,
            settings=lambda: self.settings,
            flush=lambda: self.flush("backup"),
            flusher=self._flusher,
            archive=lambda: None if self._follower is None else self._follower.present,
            archive_failure=lambda: None if self._follower is None else self._follower.failure,
            seq=lambda: self._state.seq,
            change_detector=lambda: change_detector(self._state),
            notes=self.care_notes,
        )

    def _everything(self, collection: str) -> Iterator[Record]:
        """All records of *collection* in their last durable state, a shard at a time."""
        found = self._state.collections[collection]
        for index in range(SHARDS):
            with self._lock:
                ids = list(found.committed_shard(index))
            for id in ids:
                line = found.committed(id)
                if line is not None:
                    value, version = record.split(line)
                    yield Record(id, version, value)

    def submit(
        self,
        op: AnyOp | OwnOp,
        *,
        durability: Durability | None = None,
        retry: Retry | None = None,
        at_once: bool = False,
    ) -> Ticket:
        """Decide *op*. It is durable, and may be told to its caller, when the ticket's wait ends.

        With *retry*, a repeat of the request gets the first answer and changes nothing. With *at_once* the caller's
        thread may be taken for writing where that is quicker than waiting for the journal's (``Committer.take_lead``).

        Raises:
            HoldfastError: refused; nothing was changed. A refusal that rests on what is not durable yet comes from
                the ticket's wait instead.
        """
        if durability is not None:
            _check_durability(durability)
        # Before the lock, since the archive is on the disk.
        known = self._known_messages(op) if type(op) is MessageAppend else NOTHING_KNOWN
        if at_once:
            return self._submit_at_once(lambda: self._decide_one(op, durability, retry, known))
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            return self._decide_one(op, durability, retry, known)

    def submit_batch(
        self,
        batch: Batch,
        *,
        durability: Durability | None = None,
        retry: Retry | None = None,
        at_once: bool = False,
    ) -> Ticket:
        """Decide the ops of *batch* in order; they wait together. *retry*, op by op, and *at_once* as for ``submit``.

        An atomic batch is one event, all or nothing. Otherwise refusals stand among the outcomes.

        Raises:
            HoldfastError: an op of an atomic batch is refused; its attribute ``index`` says which. Or the batch as a
                whole is.
        """
        _check_durability(durability)
        ops_max = self.settings.limits.batch_ops
        if len(batch.ops) > ops_max:
            raise TooLarge(f"a batch may have {ops_max} ops, this one has {len(batch.ops)}")
        known = {
            index: found
            for index, op in enumerate(batch.ops)
            if type(op) is MessageAppend and (found := self._known_messages(op))
        }
        if at_once:
            return self._submit_at_once(lambda: self._decide_all(batch, durability, retry, known))
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            return self._decide_all(batch, durability, retry, known)

    async def submit_async(self, op: AnyOp, **options: Any) -> Ticket:
        """As ``submit``, for event loops, which the archive must not hold up."""
        if not self._asks_archive(op):
            return self.submit(op, **options)
        return await self._beside(partial(self.submit, op, **options))

    async def submit_batch_async(self, batch: Batch, **options: Any) -> Ticket:
        """As ``submit_batch``, for event loops, which the archive must not hold up."""
        if not any(map(self._asks_archive, batch.ops)):
            return self.submit_batch(batch, **options)
        return await self._beside(partial(self.submit_batch, batch, **options))

    def _asks_archive(self, op: AnyOp) -> bool:
        """Whether *op* cannot be decided before the archive was asked, which may be busy."""
        if type(op) is not MessageAppend:
            return False
        line = self._state.conversations.get(op.id)
        return (
            line is not None and record.header_of(line).born <= self._state.externals_since and bool(external_ids(op))
        )

    async def _beside(self, submit: Callable[[], Ticket]) -> Ticket:
        if self._submitter is None:
            # One thread, so that messages keep the order in which they were said.
            self._submitter = ThreadPoolExecutor(1, "holdfast-submit")
        try:
            future = self._submitter.submit(submit)
        except RuntimeError:
            return submit()  # closed: it says so
        return await asyncio.wrap_future(future)

    async def ask(self, question: Callable[[], T]) -> T:
        """What *question*, which is one to ``transcripts``, answers; for event loops.

        It has threads of its own: however many wait for an archive that cannot be written, nobody else waits for a thread.
        """
        if self._askers is None:
            self._askers = ThreadPoolExecutor(ASKERS_MAX, "holdfast-ask")
        try:
            future = self._askers.submit(question)
        except RuntimeError:
            raise self._refusal or Unavailable("closed; open it again") from None
        return await asyncio.wrap_future(future)

    def _born_of(self, id: str) -> tuple[int | None, int]:
        """The event with which the conversation *id* began, None when there is none, and one to which that is known at least."""
        seq = self._committer.committed_seq
        line = self._state.conversations.committed(id)
        return None if line is None else record.header_of(line).born, seq

    def _known_messages(self, op: MessageAppend) -> Externals:
        """Of the external ids in *op* those that the archive knows."""
        line = self._state.conversations.get(op.id)
        if line is None or not (wanted := external_ids(op)):
            return NOTHING_KNOWN
        born = record.header_of(line).born
        if born > self._state.externals_since:
            return NOTHING_KNOWN
        found = self.transcripts.external_numbers(op.id, wanted, born)
        return {pair: Archived(number, born) for pair, number in found.items()}

    def _submit_at_once(self, decide_under_lock: Callable[[], Ticket]) -> Ticket:
        leads = False
        try:
            with self._lock:
                if self._refusal is not None:
                    raise self._refusal
                leads = self._committer.take_lead()
                return decide_under_lock()
        finally:
            if leads:
                self._committer.lead()

    def _decide_one(
        self, op: AnyOp | OwnOp, durability: Durability | None, retry: Retry | None, known: Externals
    ) -> Ticket:
        state = self._state
        place = None if retry is None else (retry.client, 0, retry.number)
        try:
            answer, batch = self._decide(op, durability, place, self._is_repeat(retry), self._clock.now_ms(), known)
        except HoldfastError as error:
            in_flight = self._committer.in_flight()
            if in_flight is None:
                raise
            # What it rests on may yet be undone, and must not be told before it is durable.
            return Ticket([], state.seq, in_flight, error)
        return Ticket([answer], state.seq, batch)

    def _decide_all(
        self, batch: Batch, durability: Durability | None, retry: Retry | None, known: Mapping[int, Externals]
    ) -> Ticket:
        if batch.atomic:
            return self._decide_together(batch.ops, durability, retry, known)
        outcomes: list[Answer | HoldfastError] = []
        now_ms = self._clock.now_ms()
        place: tuple[str, int, int] | None = None
        is_repeat = self._is_repeat(retry)
        for index, op in enumerate(batch.ops):
            if retry is not None:
                place = (retry.client, index, retry.number)
            try:
                of_op = known.get(index, NOTHING_KNOWN) if known else NOTHING_KNOWN
                outcomes.append(self._decide(op, durability, place, is_repeat, now_ms, of_op)[0])
            except HoldfastError as error:
                outcomes.append(error)
        return Ticket(outcomes, self._state.seq, self._committer.in_flight())

    def _is_repeat(self, retry: Retry | None) -> bool:
        """Whether this client sent its request before, or a later one; most requests are new."""
        return retry is not None and self._state.retries.is_repeat(retry.client, retry.number)

    def _decide(
        self,
        op: AnyOp | OwnOp,
        durability: Durability | None,
        place: tuple[str, int, int] | None,
        is_repeat: bool,
        now_ms: int,
        known: Externals,
    ) -> tuple[Answer, WriteBatch | None]:
        """Decide and apply one op, under the lock: its answer, and the batch after which it may be told.

        *place* is the op's in the requests of its client.
        """
        state, committer = self._state, self._committer
        try:
            decided = decide(state, op, self._rules, state.seq + 1, now_ms, place if is_repeat else None, known)
        except HoldfastError as error:
            self._op_counts.refused[type(op), error.code] += 1
            raise
        if type(decided) is Answer:
            in_flight = committer.in_flight()
            self._op_counts.of(in_flight is not None)[type(op)] += 1
            return decided, in_flight
        assert type(decided) is Event
        if place is not None and decided.key is None:
            decided.retry = place
        undoable = committer.is_undoable(durability)
        counts = self._accepted_ops
        if not undoable:
            self._check_room([op])
            counts = self._op_counts.settled
        # Before anything is changed: what cannot be encoded must not have happened.
        payload = encode_event(decided)
        apply(state, decided, now_ms, undoable=undoable)
        seq = decided.seq
        batch = committer.add(payload, seq, durability, undoable=undoable)
        counts[type(op)] += 1
        return answer_of(decided, seq), batch

    def _decide_together(
        self, ops: list[AnyOp], durability: Durability | None, retry: Retry | None, known: Mapping[int, Externals]
    ) -> Ticket:
        state, committer = self._state, self._committer
        now_ms = self._clock.now_ms()
        seq = state.seq + 1
        undoable = committer.is_undoable(durability)
        if not undoable:
            self._check_room(ops)
        outcomes: list[Answer | HoldfastError] = []
        events: list[Event] = []
        in_flight = committer.in_flight()
        # A conversation that is put anew in place of another goes on with its versions: who knows one of them, and asks for
        # it, must not be given what somebody else has made of it since.
        replaced: dict[str, int] = {}
        with state.all_or_nothing():
            for index, op in enumerate(ops):
                if isinstance(op, ConversationDelete) and (line := state.conversations.get(op.id)) is not None:
                    replaced[op.id] = record.header_of(line).v
                try:
                    place = None if retry is None else (retry.client, index, retry.number)
                    decided = decide(state, op, self._rules, seq, now_ms, place, known.get(index, NOTHING_KNOWN))
                except HoldfastError as error:
                    self._op_counts.refused[type(op), error.code] += 1
                    error.index = index
                    raise
                if isinstance(decided, Event):
                    if decided.version == 1 and decided.op in ("conversation.put", "message.append"):
                        decided.version += replaced.pop(decided.id, 0)
                    apply(state, decided, now_ms, undoable=undoable)
                    outcomes.append(answer_of(decided, seq))
                    decided.seq, decided.at = 0, ""
                    events.append(decided)
                else:
                    outcomes.append(decided)
            payload = encode_event(Event(seq, format_ms(now_ms), "batch", events=events))
        counts = self._op_counts.of(undoable if events else in_flight is not None)
        for op in ops:
            counts[type(op)] += 1
        if not events:
            return Ticket(outcomes, state.seq, in_flight)
        state.seq = seq
        batch = committer.add(payload, seq, durability, undoable=undoable)
        return Ticket(outcomes, seq, batch)

    def _check_room(self, ops: Sequence[AnyOp | OwnOp]) -> None:
        """Refuse *ops* that would wait in memory for a flush that cannot be written."""
        if self._committer.deferred_bytes > self.settings.journal_max:
            for op in ops:
                self._op_counts.refused[type(op), StorageFull.code] += 1
            raise StorageFull("more changes wait for a flush than journal_max allows; free space on the disk")

    def expire(self) -> int:
        """Expire the sessions that are idle too long, and forget ended leases and old idempotency keys.

        Looks only at those whose minute has come. Returns how many sessions expired; they are durably gone then.
        """
        now_ms, jumped_ms = self._expiry_clock.now_ms()
        if jumped_ms:
            self._log.warning("clock.jumped", ahead_ms=jumped_ms)
        count = 0
        while True:
            with self._lock:
                if self._refusal is not None:
                    return count
                looked, expired, batch = self._expire_some(now_ms)
            if batch is not None:
                try:
                    batch.wait(None)
                except StorageFull:
                    break  # told once by journal.disk_filled; they are looked at again
            count += expired
            if not looked:
                break
        self._forget_old(now_ms)
        if count:
            self.measures.sessions_expired += count
            self._log.info("sessions.expired", count=count)
        return count

    def _expire_some(self, now_ms: int) -> tuple[int, int, WriteBatch | None]:
        state = self._state
        ids = state.session_wheel.take_due(now_ms, EXPIRE_AT_ONCE)
        expired, later = decide_expiry(state, ids, self._rules, now_ms)
        for id, due in later:
            state.session_wheel.schedule(id, due)
        if not expired:
            return len(ids), 0, None
        event = Event(state.seq + 1, format_ms(self._clock.now_ms()), "session.expire", ids=expired)
        undoable = self._committer.is_undoable(None)
        # Should the disk be full the sessions come back, and must be looked at again.
        state.session_wheel.schedule_all(now_ms // 60_000 + 1, expired)
        apply(state, event, now_ms, undoable=undoable)
        return len(ids), len(expired), self._committer.add(encode_event(event), event.seq, None, undoable=undoable)

    def _forget_old(self, now_ms: int) -> None:
        """Drop book-keeping that no decision looks at any more; replay would only bring it back to be dropped again."""
        state = self._state
        for wheel, collection in (
            (state.lease_wheel, state.leases),
            (state.key_wheel, state.keys),
            (state.external_wheel, state.externals),
        ):
            looked = True
            while looked:
                with self._lock:
                    ids = wheel.take_due(now_ms, EXPIRE_AT_ONCE)
                    for id in ids:
                        line = collection.get(id)
                        if line is None:
                            continue
                        due = forgotten_ms(collection.name, line)
                        if due > now_ms:
                            wheel.schedule(id, due)
                        else:
                            collection.set(id, None, collection.changed_seq, undoable=False)
                            if collection is state.externals:
                                state.externals_since = max(state.externals_since, orjson.loads(line)["seq"])
                looked = bool(ids)
        with self._lock:
            state.retries.forget(now_ms)

    # Reading. Only what is durable is seen.

    def get(self, collection: str, id: str) -> Record | None:
        """The record *id* in its last durable state; ``orders`` are pending ones, then completed and cancelled ones."""
        if self._refusal is not None:
            self._check_readable()
        found = self._state.collections.get(collection)
        line = found.committed(id) if found is not None else None
        if line is None:
            if collection != ORDERS:
                return None
            line = self._state.completed_orders.committed(id)
            if line is None:
                # It may have moved between the two looks.
                line = self._state.orders.committed(id)
                if line is None:
                    return None
        value, version = record.split(line)
        return Record(id, version, value)

    def line(self, collection: str, id: str) -> bytes | None:
        """The record *id* with its header, in its last durable state; ``orders`` as for ``get``."""
        self._check_readable()
        names = (ORDERS, COMPLETED_ORDERS, ORDERS) if collection == ORDERS else (collection,)
        for name in names:
            found = self._state.collections.get(name)
            line = found.committed(id) if found is not None else None
            if line is not None:
                return line
        return None

    def check(self, op: AnyOp | OwnOp) -> None:
        """Raise what ``submit`` would raise for *op* now; nothing is changed."""
        with self._lock:
            if self._refusal is not None:
                raise self._refusal
            decide(self._state, op, self._rules, self._state.seq + 1, self._clock.now_ms())

    @property
    def rules(self) -> Rules:
        """The settings that decisions depend on, as they are now."""
        return self._rules

    def page(
        self,
        collection: str,
        *,
        limit: int = 100,
        cursor: str | None = None,
        since_ms: int | None = None,
        state: str | None = None,
        until_ms: int | None = None,
    ) -> Page:
        """Records of *collection* in a stable order of no meaning, from *cursor* on.

        Args:
            limit: at most so many.
            cursor: ``next`` of the page before.
            since_ms, until_ms: only records active (sessions) or changed (others) at or after this, and before; ms since 1970.
            state: only sessions with this ``currentState``, orders with this ``status``.

        Raises:
            BadRequest: a cursor of another list, or a filter that this collection does not have.
        """
        self._check_readable()
        wanted = Filter(since_ms, state, until_ms)
        return page_of(self._state, self._lock, self._rules, collection, limit, cursor, wanted)

    def everything(self, collection: str) -> Iterator[Record]:
        """All records of *collection*, none when there is no such thing, each in its last durable state."""
        self._check_readable()
        return iter(()) if collection not in self._state.collections else self._everything(collection)

    def is_held(self, head: Mapping[str, Any]) -> bool:
        """Whether a legal hold keeps the conversation of *head*."""
        return is_held(self._state, head)

    def count(self, collection: str) -> int:
        """How many records, in their last durable state."""
        with self._lock:
            found = self._state.collections.get(collection)
            return found.committed_count() if found is not None else 0

    def collection_names(self) -> list[str]:
        """The custom collections that hold something."""
        return [found.name for found in list(self._state.custom())]

    def sales(self) -> bytes:
        """The sales figures in their last durable state, as in ``sales_stats.json``."""
        return encode_sales(self.sales_figures())

    def sales_figures(self) -> Sales:
        """The same as values, for those who add them up."""
        self._check_readable()
        with self._lock:
            return self._state.committed_sales

    def status(self) -> dict[str, Any]:
        """Counts, seqs, sizes and the last flush, for people and monitors."""
        state, journal = self._state, self._journal
        last = self._flusher.last_report
        space = self.space.space
        with self._lock:
            count = {name: found.committed_count() for name, found in state.collections.items()}
        return {
            "data_dir": str(self.settings.data_dir),
            "uptime_s": round(self._clock.monotonic() - self._started, 1),
            "sessions": count[SESSIONS],
            "pending_orders": count[ORDERS],
            "completed_orders": count[COMPLETED_ORDERS],
            "users": count[USERS],
            "conversations": count[CONVERSATIONS],
            "open_escalations": count[ESCALATIONS],
            "collections": {found.name: count[found.name] for found in list(state.custom())},
            "leases": count[LEASES],
            "idempotency_keys": count[KEYS],
            "seq": state.seq,
            "durable_seq": journal.synced_seq,
            "snapshot_seq": self._flusher.snapshot_seq,
            "archived_seq": 0 if self._follower is None else self._follower.covered_seq,
            "journal_bytes": journal.size_bytes,
            "journal_segments": journal.segments,
            "snapshot_bytes": self._flusher.snapshot_bytes,
            "durability": self._committer.durability,
            "last_flush": None if last is None else msgspec.to_builtins(last),
            "backups": self._backup_status(),
            "copies": None if self.copies is None else self.copies.status(),
            "disk": {
                "free_bytes": space.free_bytes,
                "size_bytes": space.disk_bytes,
                "free_files": space.free_files,
                "grows_bytes_h": space.grows_bytes_h,
                "hours_left": space.hours_left,
            },
            "parts": {name: usage._asdict() for name, usage in self.space.parts.items()},
            "degraded": self.degraded,
        }

    def _backup_status(self) -> dict[str, Any]:
        figures = self.backups.figures()
        return {
            "count": figures.sets,
            "bytes": figures.bytes,
            "newest_at": format_ms(figures.taken_ms) if figures.taken_ms else None,
            "proved_at": format_ms(figures.proved_ms) if figures.proved_ms else None,
            "is_proved": bool(figures.proved_ms) and figures.is_proof_ok,
        }

    def last_seq(self) -> int:
        """Of the last event decided; cheap, to see whether anything happens."""
        return self._state.seq

    def now_ms(self) -> int:
        """The time of records: ms since 1970."""
        return self._clock.now_ms()

    def monotonic(self) -> float:
        """The time of durations: seconds."""
        return self._clock.monotonic()

    @property
    def uptime_s(self) -> float:
        """Since it was opened."""
        return self._clock.monotonic() - self._started

    def gauges(self) -> Gauges:
        """How it stands, without taking the lock; asks the file system for its room.

        Raises:
            OSError: the file system does not answer.
            Unavailable: closed.
        """
        self._check_readable()
        state, journal, flusher = self._state, self._journal, self._flusher
        follower = self._follower
        waiting = [since for since in (flusher.flushing_since, self._committer.unflushed_since) if since is not None]
        durable_seq, snapshot_seq = journal.synced_seq, flusher.snapshot_seq
        oldest = min(waiting, default=None) if state.seq > snapshot_seq else None
        free_bytes, disk_bytes = flusher.disk_space()
        return Gauges(
            decided_seq=state.seq,
            durable_seq=durable_seq,
            snapshot_seq=snapshot_seq,
            journal_bytes=journal.size_bytes,
            journal_bytes_max=self.settings.journal_max,
            journal_segments=journal.segments,
            journal_kept_bytes=journal.kept_bytes,
            deferred_bytes=self._committer.deferred_bytes,
            unflushed_age_s=0.0 if oldest is None else max(0.0, self._clock.monotonic() - oldest),
            snapshot_bytes=flusher.snapshot_bytes,
            flushed_ms=parse_ms(flusher.snapshot_at) if flusher.snapshot_at else self._started_ms,
            flush_every_s=self.settings.flush_every,
            has_flush_failed=flusher.last_error is not None,
            is_disk_full=self._committer.is_full,
            is_damaged=bool(self._recovery_notes or (follower and follower.lost_messages)),
            is_archive_stalled=follower is not None and follower.failure is not None,
            archived_seq=0 if follower is None else follower.covered_seq,
            records={name: found.count for name, found in list(state.collections.items()) if name[0] != "_"},
            leases=state.leases.count,
            idempotency_keys=state.keys.count,
            follower_lag={
                name: max(0, durable_seq - watermark()) for name, watermark in list(flusher.followers.items())
            }
            | self.feed.lags()
            # What it has taken, not what it has synced: that moves with each flush only.
            | ({} if follower is None else {"archive": follower.lag}),
            disk_free_bytes=free_bytes,
            disk_bytes=disk_bytes,
        )

    @property
    def degraded(self) -> list[str]:
        """Reasons why the data is not all it should be; empty when healthy."""
        reasons = [*self._recovery_notes, *list(self.care_notes.values())]
        if self._committer.is_full:
            reasons.append("the disk is full: writes are refused with storage_full until there is room")
        if self._flusher.last_error is not None:
            reasons.append(f"the last flush failed: {self._flusher.last_error}")
        if self._follower is not None:
            if self._follower.failure is not None:
                reasons.append(f"the archive cannot be written: {self._follower.failure}")
            if self._follower.lost_messages:
                reasons.append(f"the archive was damaged and made anew without {self._follower.lost_messages} messages")
        if self._mirror is not None and self._mirror.failure is not None:
            reasons.append(f"the readable mirror cannot be written: {self._mirror.failure}")
        return reasons

    # Keeping.

    def flush(self, reason: str) -> FlushReport:
        """Write what changed to the snapshot files and prune the journal; blocks.

        While one flush runs, all further calls share the one that comes after it.

        Raises:
            StorageFull, JournalBroken, OSError: the old snapshot stands and the journal is not pruned.
        """
        self._check_readable()
        return self._flusher.flush(reason, self._committer, self._state)

    def hold_snapshots(self, use: Callable[[Manifest, Directory], T]) -> T:
        """What *use* gives, called with the manifest and the data directory while no flush replaces a file.

        Raises:
            StorageFull, OSError: a flush was interrupted before, and what it left cannot be settled.
        """
        self._check_readable()
        return self._flusher.hold(use)

    def edited_files(self) -> list[str]:
        """The snapshot files that are not as the last flush left them: somebody wrote, or removed, them."""
        self._check_readable()
        return self._flusher.edited()

    def take_kept_edits(self) -> list[KeptEdit]:
        """The edits of snapshot files that a flush came before, and kept; each is told once."""
        self._check_readable()
        return self._flusher.take_kept_edits()

    def rewrite(self, names: Collection[str]) -> None:
        """Have the next flush write the snapshot files *names* anew; what stands there is kept in ``backups/``."""
        self._flusher.distrust(names)

    def backup(self, reason: str, progress: Callable[[str], object] | None = None) -> BackupReport:
        """Make a backup set of everything acknowledged so far, load everything from it to prove it, and remove those that
        need not be kept; blocks nobody but its caller.

        While one backup is taken, all further calls share the one that comes after it. *progress* is told in words how far
        it is. A set whose proof fails is there nevertheless; the report says so.

        Raises:
            StorageFull, OSError: there is no new set; those that are there stay.
            Unavailable: stopping.
        """
        self._check_readable()
        return self.backups.take(reason, progress)

    def flush_wanted(self) -> bool:
        """Whether the journal has outgrown ``journal_max``."""
        return self._journal.size_bytes + self._committer.deferred_bytes > self.settings.journal_max

    def follow(self, name: str, watermark: Callable[[], int]) -> None:
        """Keep the journal from *watermark*() + 1 on for the follower *name* (archive, replica, backup window)."""
        self._flusher.follow(name, watermark)

    def unfollow(self, name: str) -> None:
        """Keep nothing for the follower *name* any more."""
        self._flusher.unfollow(name)

    def events(self, after: int | None = None, ops: Collection[str] = (), ids: Collection[str] = ()) -> Events:
        """Every event after *after* once it is durable, in order; None: those that come from now on.

        Args:
            after: a seq; 0 is the beginning.
            ops: only these, such as ``session.put``, or ``order.*`` for all that begin so.
            ids: only events of these records.

        Raises:
            Gone: the journal does not reach back so far; its ``oldest_seq`` says how far.
            Conflict: *after* has not happened yet.
            BadRequest: an op that does not exist, or *after* is no seq.
            Unavailable: closed.
        """
        return Events(self.feed.open(after, Selection(ops, ids)))

    def compact_archive(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Write the archive anew without what is free in it; blocks, while others read and write.

        Raises:
            StorageFull: there is no room for a second one.
            Unavailable: it cannot be read or written now, or *is_stopping* said so; it is as it was.
        """
        self._check_readable()
        follower = self._follower
        if follower is None:
            return
        archive_bytes = follower.archive().describe().get("bytes", 0)
        free_bytes, _ = self._flusher.disk_space()
        if free_bytes < archive_bytes * COMPACT_ROOM:
            raise StorageFull(
                f"compacting the archive needs {round(archive_bytes * COMPACT_ROOM) >> 20} MiB of free room for a while, "
                f"there are {free_bytes >> 20}; free space first"
            )
        has_changed = change_detector(self._state)

        def is_busy() -> bool:
            if is_stopping() or self._refusal is not None:
                raise Unavailable("stopping; the archive is as it was")
            return has_changed()

        # A backup under way would lose the archive that it copies.
        with self.backups.paused():
            seq = follower.durable_seq
            self._flusher.follow("compacting", lambda: seq)
            try:
                follower.compact(is_busy)
            finally:
                self._flusher.unfollow("compacting")

    def look_at_disk(self, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """See how much room there is, and whether a full disk has some again; to be called every few seconds, by one thread.

        Raises:
            OSError: the file system does not answer.
        """
        self.space.look(self.settings.limits.disk_free, is_stopping)
        complaints = {
            "disk": self.space.complaint,
            "overdue": self.backups.complaint,
            "copies": self.copies.complaint if self.copies is not None else "",
        }
        for name, complaint in complaints.items():
            if complaint:
                self.care_notes[name] = complaint
            else:
                self.care_notes.pop(name, None)
        self._committer.probe_room(self._flusher.has_room)

    def journal_progress(self) -> float:
        """When whoever writes the journal began, monotonic seconds; infinite when nobody does."""
        since = self._committer.busy_since
        return float("inf") if since is None else since

    def reconfigure(self, settings: Settings) -> None:
        """Use *settings* from the next op on; those that need a restart must be unchanged."""
        with self._lock:
            ttl_before = self._rules.session_ttl_ms
            self.settings = settings
            self._rules = rules_of(settings, self._reserved_names)
            self._committer.durability = settings.durability
            self._flusher.journal_keep = settings.journal_keep
            self._state.session_ttl_ms = self._rules.session_ttl_ms
            if self._rules.session_ttl_ms < ttl_before:
                # Whoever may now be due earlier is looked at once, in small portions, by the next expiry.
                now_minute = self._clock.now_ms() // 60_000
                self._state.session_wheel.clear()
                self._state.session_wheel.schedule_all(now_minute, self._state.sessions)

    def close(self, *, flush: bool = True) -> None:
        """Stop: refuse ops, flush, close the journal, release the directory. Safe to call twice.

        Raises:
            HoldfastError, OSError: the final flush failed. Everything acknowledged is in the journal nevertheless,
                unless the error is JournalBroken; all is closed and released.
        """
        with self._close_guard:
            if self._directory_lock is None or isinstance(self._refusal, ForkedProcess):
                return
            with self._lock:
                self._refusal = self._refusal or Unavailable("stopping; connect again when it is back")
            self.lease_queue.dismiss()
            self.backups.close()
            for executor in (self._submitter, self._askers):
                if executor is not None:
                    executor.shutdown(wait=False)
            try:
                try:
                    if flush:
                        self._flusher.flush("shutdown", self._committer, self._state)
                finally:
                    if self._mirror is not None:
                        self._mirror.close()
                    if self._follower is not None:
                        self._follower.close()
                    self._committer.close()
            finally:
                self.feed.close()
                self._flusher.close()
                self._directory_lock.release()
                self._directory_lock = None
                self._refusal = Unavailable("closed; open the data directory again")

    def _check_readable(self) -> None:
        if self._refusal is not None and (isinstance(self._refusal, ForkedProcess) or self._directory_lock is None):
            raise self._refusal

    def _refuse_all(self, error: HoldfastError) -> None:
        self._refusal = self._refusal or error
        self.lease_queue.dismiss()
        self.on_broken(error)

    def _log_full(self, is_full: bool) -> None:
        if is_full:
            self._log.error("journal.disk_filled", action="free space; writes resume by themselves")
            self._flusher.make_room()
        else:
            self._log.info("journal.writes_resumed")

    def _forget_in_child(self) -> None:
        self._refusal = ForkedProcess(
            f"opened by process {os.getppid()}; a forked child must open or connect for itself"
        )
        # A thread of the parent may have held them at the fork; here nobody would ever release them.
        self._lock = threading.Lock()
        self._close_guard = threading.Lock()
        self._submitter = self._askers = None
        self.feed.refuse_in_child(self._refusal)
        if self._directory_lock is not None:
            self._directory_lock.abandon()


class _ConfirmedClock:
    """Wall time for expiry, believed only as far as a clock that nobody can set confirms it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._wall_ms = clock.now_ms()
        self._monotonic = clock.monotonic()
        self._has_told = False

    def now_ms(self) -> tuple[int, int]:
        """The time, and by how many ms the wall clock was just found to have jumped ahead (0: not)."""
        wall_ms = self._clock.now_ms()
        expected_ms = self._wall_ms + round((self._clock.monotonic() - self._monotonic) * 1000)
        ahead_ms = wall_ms - expected_ms
        if ahead_ms <= CLOCK_JUMP_MS:
            self._has_told = False
            return wall_ms, 0
        told, self._has_told = self._has_told, True
        return expected_ms, 0 if told else ahead_ms


def _check_durability(durability: Durability | None) -> None:
    if durability is not None and durability not in _DURABILITIES:
        raise BadRequest(f"durability must be one of {', '.join(_DURABILITIES)}, found {durability!r:.80}")


_DURABILITIES = get_args(Durability)


_open_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_open_engines):
        engine._forget_in_child()


os.register_at_fork(after_in_child=_after_fork)
