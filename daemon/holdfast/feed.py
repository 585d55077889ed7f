"""The event stream inside the process: every event once it is durable, in order, to any number of readers.

Readers read the journal itself, each at its own pace; those that keep up share what was read last. A reader keeps the
journal from its position on, as long as it reads.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import msgspec

from holdfast.commit import Committer
from holdfast.core.state import EVENT_OPS
from holdfast.disk.journal import JournalLine
from holdfast.disk.tail import READ_BYTES, Tail, oldest_seq
from holdfast.errors import BadRequest, Conflict, ForkedProcess, Gone, HoldfastError, Unavailable
from holdfast.events import Event, event_of
from holdfast.flush import Flusher

STREAM_OPS = EVENT_OPS - {"batch"}
"""The ops that a reader may meet; a batch comes as its members."""

SHARED_BYTES_MAX = 128 << 10
"""Of the newest events, for all readers that keep up; who is further behind reads for itself."""

HOLD_S = 60.0
"""A reader that takes nothing for so long keeps the journal no more."""


class Part(NamedTuple):
    """One event as a reader meets it: one line of the journal or, of a batch, one of its members.

    Attributes:
        seq: of the line.
        op: the op's name.
        payload: JSON on one line.
        ends_line: whoever has it has all of the line that is wanted, and may go on after its seq.
    """

    seq: int
    op: str
    payload: bytes
    ends_line: bool


class Selection:
    """Which events a reader wants."""

    def __init__(self, ops: Collection[str] = (), ids: Collection[str] = ()) -> None:
        """Those with one of *ops* (``session.put``, ``order.*``) and of one of *ids*; an empty collection means all.

        Raises:
            BadRequest: an op that does not exist, or text where a collection is expected.
        """
        if isinstance(ops, str) or isinstance(ids, str):
            raise BadRequest("expected a collection of names for ops and ids, found a single text; put it in a list")
        for op in ops:
            if op not in STREAM_OPS and not (op.endswith(".*") and any(one.startswith(op[:-1]) for one in STREAM_OPS)):
                known = ", ".join(sorted(STREAM_OPS))
                raise BadRequest(f"unknown op {op!a:.80}; known are {known}, and session.* for all that begin so")
        self._ops = frozenset(op for op in ops if not op.endswith(".*"))
        self._prefixes = tuple(op[:-1] for op in ops if op.endswith(".*"))
        self._ids = frozenset(ids)
        self._has_ops = bool(ops)

    def chosen(self, line: list[Part]) -> list[Part]:
        """What is wanted of the parts of one *line*."""
        if not self._has_ops and not self._ids:
            return line
        parts = [part for part in line if self._takes(part)]
        if parts and not parts[-1].ends_line:
            parts[-1] = parts[-1]._replace(ends_line=True)
        return parts

    def _takes(self, part: Part) -> bool:
        if self._has_ops and part.op not in self._ops and not part.op.startswith(self._prefixes):
            return False
        if not self._ids:
            return True
        subject = _decode_subject(part.payload)
        return subject.id in self._ids or not self._ids.isdisjoint(subject.ids)


def parts_of(line: JournalLine) -> list[Part]:
    """What readers meet of *line*: of a batch the members, completed by its seq and time."""
    op = _op_of(line.payload)
    if op != "batch":
        return [Part(line.seq, op, line.payload, True)]
    batch = _decode_batch(line.payload)
    shared = b'{"seq":%d,"at":"%b",' % (line.seq, batch.at.encode())
    parts = [Part(line.seq, _op_of(raw), shared + raw[1:], False) for raw in map(bytes, batch.events)]
    parts[-1] = parts[-1]._replace(ends_line=True)
    return parts


def _bytes_of(line: list[Part]) -> int:
    return sum([len(part.payload) for part in line])


def _op_of(payload: bytes) -> str:
    """The op of an event; before it stand its seq and time only, so that nothing need be decoded for it."""
    start = payload.index(_OP) + len(_OP)
    return payload[start : payload.index(b'"', start)].decode()


_OP = b'"op":"'


class _Subject(msgspec.Struct, gc=False):
    """Which record an event is about, or which sessions."""

    id: str = ""
    ids: tuple[str, ...] = ()


class _Batch(msgspec.Struct, gc=False):
    at: str
    events: list[msgspec.Raw]


_decode_subject = msgspec.json.Decoder(_Subject).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode


class _Shared:
    """The newest events, read once for all readers that keep up. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        # Reentrant, since the garbage collector may end a reader in the midst of another's reading.
        self._guard = threading.RLock()
        self._lines: deque[list[Part]] = deque()
        self._bytes = 0
        self._tail = Tail(directory, 0)

    def read(self, position: int, last_seq: int) -> list[list[Part]] | None:
        """The parts of the lines from *position* on, none above *last_seq*; None for who must read for itself.

        Raises:
            Gone: as ``Tail.read``.
        """
        with self._guard:
            tail, lines = self._tail, self._lines
            if position > tail.position:
                # Nobody has read what lies between, so nobody shares it.
                self._begin_at(position)
            if position == tail.position:
                for line in map(parts_of, tail.read(last_seq)):
                    lines.append(line)
                    self._bytes += _bytes_of(line)
                while self._bytes > SHARED_BYTES_MAX and len(lines) > 1:
                    self._bytes -= _bytes_of(lines.popleft())
            first = tail.position - len(lines)
            if position < first:
                return None
            return list(itertools.islice(lines, position - first, last_seq - first))

    def close(self) -> None:
        """Nobody reads any more."""
        with self._guard:
            self._begin_at(self._tail.position)

    def _begin_at(self, position: int) -> None:
        self._tail.skip_to(position)
        self._tail.close()
        self._lines.clear()
        self._bytes = 0


class Feed:
    """Opens readers, and tells them when there is more. Thread-safe; lives as long as its engine."""

    def __init__(self, directory: Path, committer: Committer, flusher: Flusher, last_seq: Callable[[], int]) -> None:
        """Of the journal in *directory*; *last_seq* gives the last event that anybody may have been told of."""
        # A program may change its working directory.
        self.directory = directory.absolute()
        self._committer = committer
        self._flusher = flusher
        self._last_seq = last_seq
        self._moved = threading.Condition()
        self._waiting: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        self._readers: dict[str, Reader] = {}
        self._shared = _Shared(self.directory)
        self._refusal: HoldfastError | None = None

    def open(self, after: int | None = None, selection: Selection | None = None) -> Reader:
        """A reader of the events after *after*; None: of those that come from now on. Looks into the directory.

        Raises:
            Gone: events after *after* are no longer in the journal.
            Conflict: *after* has not happened yet.
            BadRequest: it is no seq.
            Unavailable: the engine is closed.
        """
        if after is not None and (type(after) is not int or after < 0):
            raise BadRequest(f"expected the seq of an event, 0 for the beginning, found {after!a:.80}")
        with self._moved:
            if self._refusal is not None:
                raise self._refusal
            last = self._last_seq()
            if after is not None and after > last:
                raise Conflict(
                    f"event {after} has not happened: the last one is {last}. The data may come from a backup; read "
                    f"the present state, then go on after event {last}"
                )
            name = next(name for name in map("events-{}".format, itertools.count(1)) if name not in self._readers)
            position = self._committer.committed_seq if after is None else after
            reader = self._readers[name] = Reader(self, name, position, selection or Selection())
            if self._wake not in self._committer.on_committed:
                self._committer.on_committed += (self._wake,)
        try:
            self._flusher.follow(name, reader.watermark)
            oldest = oldest_seq(self.directory)
            if position + 1 < oldest:
                raise Gone(
                    f"event {position + 1} is no longer in the journal, which begins with {oldest}; read the present "
                    f"state, then go on after event {oldest - 1}",
                    oldest_seq=oldest,
                )
        except BaseException:
            reader.close()
            raise
        return reader

    @property
    def committed_seq(self) -> int:
        """Readers may see everything up to here."""
        return self._committer.committed_seq

    def lags(self) -> dict[str, int]:
        """How many events behind each reader is, by name; those too that the journal does not wait for any more."""
        return {name: reader.lag for name, reader in self._readers.copy().items()}

    def close(self) -> None:
        """Readers get what is durable, then the end."""
        with self._moved:
            self._refusal = self._refusal or Unavailable("closed; open the data directory again")
            readers = list(self._readers.values())
        for reader in readers:
            reader.end()

    def refuse_in_child(self, error: ForkedProcess) -> None:
        """In a forked child: no reader works any more."""
        # A thread of the parent may have held it at the fork; here nobody would ever release it.
        self._moved = threading.Condition()
        self._refusal = error
        self._waiting.clear()

    def _wake(self) -> None:
        with self._moved:
            self._moved.notify_all()
            waiting, self._waiting = self._waiting, {}
        for loop, futures in waiting.items():
            try:
                loop.call_soon_threadsafe(_release, futures)
            except RuntimeError:  # the loop was closed; nobody waits there any more
                pass

    def _leave(self, name: str) -> None:
        with self._moved:
            self._readers.pop(name, None)
            if not self._readers:
                told = self._committer.on_committed
                self._committer.on_committed = tuple(one for one in told if one != self._wake)
                self._shared.close()
        self._flusher.unfollow(name)


class Reader:
    """One who follows the events; one thread or task at a time, but ``end`` and ``close`` may come from anywhere."""

    def __init__(self, feed: Feed, name: str, position: int, selection: Selection) -> None:
        self._feed = feed
        self._name = name
        self._selection = selection
        self._tail = Tail(feed.directory, position)
        self._guard = threading.Lock()
        self._pid = os.getpid()
        self._end_seq: int | None = None
        self._is_closed = False
        self._is_waiting = False
        self._has_caught_up = False
        self._read_at = time.monotonic()

    @property
    def position(self) -> int:
        """Everything up to here was read, or was not wanted."""
        return self._tail.position

    @property
    def lag(self) -> int:
        """How many events behind it is."""
        return max(0, self._feed.committed_seq - self._tail.position)

    def watermark(self) -> int:
        """What the journal need not keep for it any more."""
        if self._is_waiting or time.monotonic() - self._read_at < HOLD_S:
            return self._tail.position
        return self._feed.committed_seq

    def read(self, bytes_max: int = READ_BYTES) -> list[Part]:
        """What is wanted of the next events, of about *bytes_max* bytes; may be empty even when there is more.

        Raises:
            Gone: it was so slow that the journal did not wait, or the journal is damaged there.
            ForkedProcess: it belongs to the parent.
        """
        with self._guard:
            self._check_process()
            if self._is_closed:
                return []
            self._read_at = time.monotonic()
            limit = self._limit()
            if self._tail.position >= limit:
                return []
            lines = self._feed._shared.read(self._tail.position, limit) if self._has_caught_up else None
            if lines is None:
                lines = [parts_of(line) for line in self._tail.read(limit, bytes_max)]
            else:
                self._tail.skip_to(self._tail.position + len(lines))
            self._has_caught_up = self._has_caught_up or self._tail.position >= limit
        chosen = self._selection.chosen
        return [part for line in lines for part in chosen(line)]

    async def read_async(self, bytes_max: int = READ_BYTES) -> list[Part]:
        """The same for asyncio: in a thread until it has caught up, since what is new needs no disk to be read."""
        if self._has_caught_up:
            return self.read(bytes_max)
        return await asyncio.to_thread(self.read, bytes_max)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until there is more to read; False when there is not, because *timeout_s* have passed or it ``is_over``."""
        self._check_process()
        moved = self._feed._moved
        with moved:
            self._is_waiting = True
            try:
                moved.wait_for(self._has_news, timeout_s)
            finally:
                self._is_waiting = False
        return self.has_more

    async def wait_async(self, timeout_s: float | None = None) -> bool:
        """The same for asyncio."""
        self._check_process()
        feed, loop = self._feed, asyncio.get_running_loop()
        with feed._moved:
            if self._has_news():
                return self.has_more
            future = loop.create_future()
            feed._waiting.setdefault(loop, []).append(future)
        timer = None if timeout_s is None else loop.call_later(timeout_s, _release, [future])
        self._is_waiting = True
        try:
            await future
        finally:
            self._is_waiting = False
            if timer is not None:
                timer.cancel()
            with feed._moved:
                waiting = feed._waiting.get(loop, [])
                if future in waiting:
                    waiting.remove(future)
                if not waiting:
                    feed._waiting.pop(loop, None)
        return self.has_more

    @property
    def has_more(self) -> bool:
        """Whether there is something to read now."""
        return not self._is_closed and self._tail.position < self._limit()

    @property
    def is_closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._is_closed

    @property
    def is_over(self) -> bool:
        """Whether nothing will come any more."""
        return self._is_closed or (self._end_seq is not None and self._tail.position >= self._limit())

    def end(self) -> None:
        """Let it read what is durable now, and nothing after that."""
        if self._end_seq is None:
            self._end_seq = self._feed.committed_seq
        self._feed._wake()

    def close(self) -> None:
        """Give everything back; may be called twice."""
        if self._is_closed or self._pid != os.getpid():
            return
        self._is_closed = True
        self._feed._leave(self._name)
        self._feed._wake()
        with self._guard:
            self._tail.close()

    def _limit(self) -> int:
        committed_seq = self._feed.committed_seq
        return committed_seq if self._end_seq is None else min(committed_seq, self._end_seq)

    def _has_news(self) -> bool:
        return self.has_more or self.is_over

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(f"opened by process {self._pid}; a forked child must open or connect for itself")


class Events:
    """The events of an engine, one after the other: for ``for`` in a thread, which blocks, or ``async for`` in a task.

    One consumer at a time. Ends when it is closed or, after everything durable, when the engine is. A consumer that
    takes nothing for HOLD_S may find that the journal did not wait for it, and gets ``Gone``.

    Attributes:
        position: a reader that begins after it misses nothing that this one did not hand out.

    Example::

        with hf.events(ops=["order.*"]) as events:
            for event in events:
                print(event.seq, event.op, event.id)
    """

    def __init__(self, reader: Reader) -> None:
        self.position = reader.position
        self._reader = reader
        self._ready: deque[Part] = deque()

    @property
    def lag(self) -> int:
        """How many events behind it is."""
        return self._reader.lag + len(self._ready)

    def __iter__(self) -> Events:
        return self

    def __next__(self) -> Event:
        reader = self._reader
        while not self._ready and not reader.is_over:
            if reader.wait():
                self._take_in(reader.read())
        if reader.is_closed or not self._ready:
            self.close()
            raise StopIteration
        return self._hand_out()

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> Event:
        reader = self._reader
        while not self._ready and not reader.is_over:
            if await reader.wait_async():
                self._take_in(await reader.read_async())
        if reader.is_closed or not self._ready:
            self.close()
            raise StopAsyncIteration
        return self._hand_out()

    def close(self) -> None:
        """End it; may be called from any thread, and twice."""
        self._reader.close()

    def _take_in(self, parts: list[Part]) -> None:
        self._ready.extend(parts)
        if not parts:
            self.position = self._reader.position

    def _hand_out(self) -> Event:
        part = self._ready.popleft()
        if not self._ready:
            self.position = self._reader.position
        elif part.ends_line:
            self.position = part.seq
        return event_of(part.payload)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Events:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Who breaks off a loop rarely closes what it looped over.
        self._reader.close()


def _release(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
