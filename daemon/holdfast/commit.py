"""Group commit: decided events become durable a batch at a time, by one thread, or by whoever has the journal to himself.

While a batch is written and synced, the next one gathers; one fsync serves all who wait. Nothing that is not
durable is shown: what an event replaced is kept until its batch is, and comes back when the disk is full.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from holdfast.clock import Clock
from holdfast.core.state import State
from holdfast.disk.journal import Journal, encode_line
from holdfast.errors import HoldfastError, JournalBroken, StorageFull, Unavailable
from holdfast.measures import EngineMeasures
from holdfast.ops import Durability

SYNC_EVERY_S = 1.0
"""``everysec``: the longest that a written event stays unsynced."""

SEGMENT_BYTES = 4 << 20
"""A segment is followed by another at the latest when it has grown to this, since only whole ones can be kept or removed."""

QUICK_SYNC_S = 0.001
"""Up to this the event loop may do a sync by itself: less than it would take any other request to notice."""

UNKNOWN_SYNC_S = 1.0
"""What the first syncs have to disprove."""

SLOW_SYNC_S = 0.25
SLOW_SYNC_LOG_EVERY_S = 30.0


class Batch:
    """Events that become durable together, with everybody who waits for it.

    Attributes:
        last_seq: of its last event.
        began_at: when its first event came, monotonic seconds.
        needs_sync: at least one of its ops asked for ``always``.
        is_deferred: acknowledged already (``interval``); written at the next flush and never taken back.
    """

    __slots__ = (
        "_futures", "_guard", "_threads", "began_at", "error", "is_deferred", "is_done", "last_seq", "lines", "needs_sync",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.last_seq = 0
        self.began_at = 0.0
        self.needs_sync = False
        self.is_deferred = False
        self.is_done = False
        self.error: HoldfastError | None = None
        self._guard = threading.Lock()
        # Of each waiting thread a lock that is taken, and released when it may go on: one wake-up, where an Event takes
        # a second lock that the waker still holds.
        self._threads: list[threading.Lock] = []
        self._futures: list[asyncio.Future[None]] = []

    def wait(self, timeout: float | None) -> None:
        """Block until the batch is as durable as was asked for.

        Raises:
            StorageFull, JournalBroken: it is not, and will not be.
            Unavailable: *timeout* seconds have passed; it may still become so.
        """
        if not self.is_done:
            waiting = threading.Lock()
            with self._guard:
                if not self._is_finished():
                    waiting.acquire()
                    self._threads.append(waiting)
            if not waiting.acquire(timeout=-1 if timeout is None else timeout):
                raise Unavailable(f"not durable within {timeout} s; it may still become so")
        self._raise_error()

    async def committed(self) -> None:
        """The same as ``wait``, for asyncio."""
        if not self.is_done:
            future = asyncio.get_running_loop().create_future()
            with self._guard:
                if self._is_finished():
                    future.set_result(None)
                else:
                    self._futures.append(future)
            await future
        self._raise_error()

    def _is_finished(self) -> bool:
        return self.is_done

    def _raise_error(self) -> None:
        if self.error is not None:
            # A new one for each waiter: a traceback belongs to one thread.
            raise type(self.error)(str(self.error))

    def finish(self, error: HoldfastError | None) -> None:
        """Release all who wait; called once, by whoever writes."""
        with self._guard:
            self.error = error
            self.is_done = True
            # A pipeline keeps its batches to its end, and would keep a copy of everything it wrote.
            self.lines = []
            futures, self._futures = self._futures, []
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.release()
        loops = {future.get_loop() for future in futures}
        for loop in loops:
            waiting = futures if len(loops) == 1 else [future for future in futures if future.get_loop() is loop]
            try:
                loop.call_soon_threadsafe(_release, waiting)
            except RuntimeError:  # the loop was closed; nobody waits there any more
                pass


def _release(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Committer:
    """Owns the journal, and the lock under which the state changes.

    Attributes:
        lock: held while an op is decided and while the state moves from one batch to the next.
        committed_seq: every event up to here is as durable as its caller asked for.
        unflushed_since: when the first event after the last checkpoint came, monotonic seconds; None when there is none.
        measures: what is counted, here and by those who use the committer.
        on_committed: each is called by whoever writes whenever ``committed_seq`` has moved, or something was synced,
            after those who waited are released.
        on_broken: called once, by whoever writes, when the disk refused to sync.
        on_full: called by whoever writes with True when the disk is full and with False when it is not any more.
    """

    def __init__(self, state: State, journal: Journal, durability: Durability, clock: Clock, log: Any) -> None:
        self.lock = threading.Lock()
        self.committed_seq = state.seq
        self.on_committed: tuple[Callable[[], None], ...] = ()
        self.on_broken: Callable[[HoldfastError], None] = lambda error: None
        self.on_full: Callable[[bool], None] = lambda is_full: None
        self.durability: Durability = durability
        self.deferred_bytes = 0
        self.unflushed_since: float | None = None
        self.measures = EngineMeasures()
        self._state = state
        self._journal = journal
        self._clock = clock
        self._log = log
        self._gathering = Batch()
        self._writing: Batch | None = None
        self._deferred: Batch | None = None
        self._checkpoint: _Checkpoint | None = None
        self._broken: JournalBroken | None = None
        self._is_full = False
        self._is_closing = False
        self._is_settling = False
        self._has_room: Callable[[int], bool] | None = None
        # Not an Event, whose waiter wakes only to wait for the lock that the setter still holds.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._is_woken = False
        self._io = threading.Lock()
        self._usual_sync_s = UNKNOWN_SYNC_S
        self._unsynced_since: float | None = None
        self._busy_since: float | None = None
        self._slow_logged_at = -SLOW_SYNC_LOG_EVERY_S
        self._thread = threading.Thread(target=self._run, name="holdfast-journal", daemon=True)
        self._thread.start()

    # Called under the lock.

    def is_undoable(self, durability: Durability | None) -> bool:
        """Whether an op decided now must be kept revocable: all but those acknowledged before they are written.

        An ``interval`` op behind others that may still be taken back rests on them, and so waits with them.
        """
        if (durability or self.durability) != "interval":
            return True
        return bool(self._gathering.lines) or self._writing is not None

    def add(self, payload: bytes, seq: int, durability: Durability | None, *, undoable: bool) -> Batch:
        """Queue the event *payload*; the batch tells when it is durable."""
        if not undoable:
            batch = self._deferred
            if batch is None:
                batch = self._deferred = Batch()
                batch.is_deferred = batch.is_done = True
        else:
            batch = self._gathering
            if (durability or self.durability) == "always":
                batch.needs_sync = True
            if not self._is_woken:
                self._wake()
        line = encode_line(payload)
        if not undoable:
            self.deferred_bytes += len(line)
        if not batch.lines:
            # One look at the clock a batch: those who come later wait less.
            batch.began_at = self._clock.monotonic()
            if self.unflushed_since is None:
                self.unflushed_since = batch.began_at
        batch.lines.append(line)
        batch.last_seq = seq
        return batch

    def in_flight(self) -> Batch | None:
        """The batch after which everything decided so far is durable; None when it is already."""
        if self._gathering.lines:
            return self._gathering
        return self._writing

    def check(self) -> None:
        """Raise when nothing more can be written."""
        if self._broken is not None:
            raise JournalBroken(str(self._broken))

    # Called without the lock.

    @property
    def is_full(self) -> bool:
        """Whether the last attempt to write found no room."""
        return self._is_full

    @property
    def busy_since(self) -> float | None:
        """Since when the thread is at its present piece of work, monotonic seconds; None when it rests."""
        return self._busy_since

    def checkpoint(self, begin: Callable[[int], None]) -> int:
        """Make everything decided so far durable, and go on in a new segment; return its last seq S.

        *begin* is called with S under the lock, at the moment when the state holds exactly the events up to S.

        Raises:
            StorageFull, JournalBroken: the events up to S are not all durable, and those not acknowledged are undone.
        """
        checkpoint = _Checkpoint(begin)
        with self.lock:
            self.check()
            if self._is_closing:
                raise Unavailable("closed; open the data directory again")
            assert self._checkpoint is None, "two checkpoints at once"
            self._checkpoint = checkpoint
            self._wake()
        try:
            checkpoint.done.wait()
        except BaseException:
            # A KeyboardInterrupt. The thread may be about to call *begin*, which the caller must not outrun.
            checkpoint.done.wait()
            raise
        if checkpoint.error is not None:
            raise checkpoint.error
        return checkpoint.seq

    def settle(self) -> None:
        """Have everything acknowledged so far written and synced soon, whatever durability was asked for."""
        self._is_settling = True
        self._wake()

    def probe_room(self, has_room: Callable[[int], bool]) -> None:
        """Have whoever writes see soon whether a full disk has room again, without waiting for somebody's next op.

        *has_room* is asked whether a file could grow beyond so many bytes, those of the present segment.
        """
        if self._is_full:
            self._has_room = has_room
            self._wake()

    def close(self) -> None:
        """Write what was acknowledged but not yet written, sync, and end the thread.

        Raises:
            StorageFull, JournalBroken: what was acknowledged under ``interval`` is not all on the disk.
        """
        self._is_closing = True
        self._wake()
        self._thread.join()
        try:
            if self._broken is None and self._deferred is not None:
                self._write_deferred(self._deferred)
                self._committed(self._deferred.last_seq)
        finally:
            self._journal.close()

    # Who writes: the journal's thread, or whoever takes the lead while it rests. One at a time.

    def take_lead(self) -> bool:
        """Whether the caller should write what it is about to add, by ``lead``; called under the lock.

        For a single op the way to the thread and back costs as much as a quick sync. Only where nobody else waits or
        writes, and where syncs were quick of late, since the caller is the daemon's event loop.
        """
        if (
            self._is_woken
            or self._gathering.lines
            or self._writing is not None
            or self._checkpoint is not None
            or self._is_closing
            or self._usual_sync_s > QUICK_SYNC_S
        ):
            return False
        # As if the thread were awake already; whoever comes behind the lead's look wakes it as usual.
        self._is_woken = True
        return True

    def lead(self) -> None:
        """Write what was added since ``take_lead``, in the calling thread; not under the lock.

        The caller must not be interruptible by exceptions from signals.
        """
        if not self._io.acquire(blocking=False):
            self._wake()
            return
        try:
            self._write_once(is_thread=False)
            if self._unsynced_since is not None:
                self._wake()  # it has to sync within the second
        except BaseException as error:
            self._give_up(error)
        finally:
            self._io.release()

    def _run(self) -> None:
        try:
            self._write_batches()
        except BaseException as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        # A fault of ours. Whoever waits must not wait for ever, and nothing more may be acknowledged.
        self._broken = JournalBroken(f"the journal thread failed: {error!r}; restart to recover")
        self._log.exception("journal.failed")
        try:
            self.on_broken(self._broken)
        finally:
            self._fail(self._writing or Batch(), self._broken, None)
            if self._checkpoint is not None:
                self._checkpoint.error = self._broken
                self._checkpoint.done.set()

    def _wake(self) -> None:
        self._is_woken = True
        self._wakes.put(None)

    def _write_batches(self) -> None:
        while True:
            # Whatever woke it last may have been the call to close.
            if not self._is_closing:
                with suppress(Empty):
                    self._wakes.get(timeout=self._next_sync_s())
            with self._io:
                if not self._write_once(is_thread=True) and self._is_closing:
                    return

    def _write_once(self, *, is_thread: bool) -> bool:
        """Write what has gathered; whether there was anything. Checkpoints and new segments are left to the thread."""
        # Before looking: what comes after the look wakes the thread again.
        self._is_woken = False
        deferred = checkpoint = None
        is_settling = False
        if is_thread:
            is_settling, self._is_settling = self._is_settling, False
        with self.lock:
            batch, self._gathering = self._gathering, Batch()
            if is_thread:
                checkpoint = self._checkpoint
            # What was deferred precedes what gathered, so it must reach the disk before.
            if batch.lines or checkpoint or is_settling:
                deferred, self._deferred = self._deferred, None
            if batch.lines:
                self._state.begin_write()
                self.measures.ops.begin_write()
                self._writing = batch
            if checkpoint:
                checkpoint.seq = self._state.seq
                checkpoint.begin(checkpoint.seq)
        if is_thread and self._has_room is not None:
            has_room, self._has_room = self._has_room, None
            # A batch finds out by itself.
            if self._is_full and not batch.lines and has_room(self._journal.segment_bytes):
                self._note_full(False)
        has_work = bool(batch.lines or checkpoint or deferred)
        if not has_work and self._is_closing:
            return False
        self._busy_since = self._clock.monotonic()
        error = self._write(deferred, batch, checkpoint, is_settling)
        if error is None and self._journal.segment_bytes >= SEGMENT_BYTES and not checkpoint:
            if is_thread:
                # Without room for another file this one grows on, and nobody needs to know.
                self._rotate()
            else:
                self._wake()
        self._busy_since = None
        if checkpoint:
            self._checkpoint = None
            checkpoint.error = error
            checkpoint.done.set()
        return has_work

    def _write(
        self, deferred: Batch | None, batch: Batch, checkpoint: _Checkpoint | None, is_settling: bool
    ) -> HoldfastError | None:
        """Bring *deferred*, then *batch*, to the disk; the error when that failed and was dealt with."""
        if self._broken is not None:
            self._fail(batch, self._broken, deferred)
            return self._broken
        last_seq = batch.last_seq or (deferred.last_seq if deferred else 0)
        try:
            if deferred is not None:
                self._write_deferred(deferred)
                deferred = None
            if batch.lines:
                self._append(batch)
            if batch.needs_sync or checkpoint or is_settling or self._is_sync_due():
                self._sync()
            if batch.lines:
                with self.lock:
                    self._state.commit()
                    self.measures.ops.commit()
                    self._writing = None
                    self.committed_seq = batch.last_seq
                self.measures.durable_latency.add(self._clock.monotonic() - batch.began_at, len(batch.lines))
                batch.finish(None)
                self._note_full(False)
            self._committed(last_seq)
        except StorageFull as error:
            self._fail(batch, error, deferred)
            # What was deferred may be in the file all the same, and is not taken back.
            self._committed(self._journal.written_seq)
            self._note_full(True)
            return error
        except JournalBroken as error:
            self._broken = error
            # Before anybody is told: whether these ops come back shows only after a restart, so a daemon ends here
            # without an answer that could be taken for a refusal.
            self.on_broken(error)
            self._fail(batch, error, deferred)
            return error
        return self._rotate() if checkpoint else None

    def _committed(self, last_seq: int) -> None:
        """Tell those who follow the journal, if there are any, that they may read up to *last_seq*."""
        if last_seq > self.committed_seq:
            self.committed_seq = last_seq
        for tell in self.on_committed:
            tell()

    def _rotate(self) -> HoldfastError | None:
        try:
            self._journal.rotate()
        except StorageFull as error:
            # Everything written so far is safe in the old segment, which simply grows on.
            return error
        except JournalBroken as error:
            self._broken = error
            self.on_broken(error)
            return error
        return None

    def _append(self, batch: Batch) -> None:
        data = b"".join(batch.lines)
        self._journal.append(data, batch.last_seq)
        if self._unsynced_since is None:
            self._unsynced_since = self._clock.monotonic()
        self.measures.commit_events.add(len(batch.lines))
        self.measures.commit_bytes.add(len(data))

    def _write_deferred(self, deferred: Batch) -> None:
        self._append(deferred)
        with self.lock:  # others may be deferred meanwhile
            self.deferred_bytes -= sum(map(len, deferred.lines))

    def _fail(self, batch: Batch, error: HoldfastError, deferred: Batch | None) -> None:
        """Undo and refuse *batch* and all that was decided on top of it; keep what was acknowledged already."""
        with self.lock:
            if deferred is not None:
                # Ops that were deferred meanwhile come after these.
                if self._deferred is not None:
                    deferred.lines += self._deferred.lines
                    deferred.last_seq = self._deferred.last_seq
                self._deferred = deferred
            gathered: Batch | None = None
            if not batch.is_done and (batch.lines or self._gathering.lines):
                gathered, self._gathering = self._gathering, Batch()
                self._writing = None
                last_seq = max(self._journal.written_seq, self._deferred.last_seq if self._deferred else 0)
                self._state.undo(last_seq)
                self.measures.ops.undo(error.code)
        if gathered is not None:
            batch.finish(error)
            gathered.finish(error)

    def _sync(self) -> None:
        started = self._clock.monotonic()
        is_needed = self._journal.synced_seq != self._journal.written_seq
        self._journal.sync()
        self._unsynced_since = None
        took = self._clock.monotonic() - started
        if is_needed:
            self.measures.sync.add(took)
            self._usual_sync_s += (took - self._usual_sync_s) / 8
        if took >= SLOW_SYNC_S and started - self._slow_logged_at >= SLOW_SYNC_LOG_EVERY_S:
            self._slow_logged_at = started
            self._log.warning("journal.sync_slow", duration_ms=round(took * 1000))

    def _note_full(self, is_full: bool) -> None:
        if is_full != self._is_full:
            self._is_full = is_full
            self.on_full(is_full)

    def _next_sync_s(self) -> float | None:
        if self._unsynced_since is None or self._broken is not None:
            return None
        return max(0.0, self._unsynced_since + SYNC_EVERY_S - self._clock.monotonic())

    def _is_sync_due(self) -> bool:
        return self._unsynced_since is not None and self._next_sync_s() == 0.0


class _Checkpoint:
    def __init__(self, begin: Callable[[int], None]) -> None:
        self.begin = begin
        self.seq = 0
        self.error: HoldfastError | None = None
        self.done = threading.Event()
