"""A collection: records by id, in shards, with the last durable state of what is being written.

Three views of the same records exist at once. ``get`` sees what was decided (only deciding uses it), ``committed``
what is durable (all reads), and a capture what stood at one seq (a flush). The differences are kept as the few
replaced records of the ops in flight, and as shards copied by whoever first changes them during a flush.
"""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.checksum import crc32

SHARDS = 256
"""Enough that copying one of a million records' shards takes 0.3 ms, few enough that a small one costs nothing."""

Shard = dict[str, bytes]
Replaced = dict[str, bytes | None]
Change = tuple["Collection", str, bytes | None, bool]
"""A change inside an atomic batch: where, of which id, what it replaced, whether it is the first one in flight."""


class Collection:
    """Records by id.

    Writers and captures hold the engine's lock; ``committed`` may be called from any thread without it.

    Attributes:
        name: in ops and paths.
        count: records, as decided.
        changed_seq: the last seq that changed it.
        changes: while an atomic batch is decided, every change with what it replaced; else None.
    """

    __slots__ = ("_captured", "_epoch", "_pending", "_shards", "_writing", "changed_seq", "changes", "count", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.changed_seq = 0
        self.changes: list[Change] | None = None
        self._shards: list[Shard] = [{} for _ in range(SHARDS)]
        # What ops in flight replaced: of the batch being written, and of the one gathering behind it.
        self._writing: Replaced = {}
        self._pending: Replaced = {}
        self._captured: list[Shard | None] | None = None
        self._epoch = 0

    def get(self, id: str) -> bytes | None:
        """The record as decided, durable or not."""
        try:
            return self._shards[crc32(id.encode()) & 255].get(id)
        except UnicodeEncodeError:
            return None  # a lone surrogate, which no id has

    def set(self, id: str, record: bytes | None, seq: int, *, undoable: bool) -> bytes | None:
        """Store *record* (None removes) and return the one it replaces.

        With *undoable* the replaced record is kept, and shown by ``committed``, until ``commit`` or ``undo``.
        """
        index = crc32(id.encode()) & 255
        shard = self._shards[index]
        captured = self._captured
        if captured is not None and captured[index] is None:
            captured[index] = shard.copy()
        old = shard.get(id)
        is_first = undoable and id not in self._pending
        if is_first:
            # Before the shard changes: a reader without the lock looks at the shard first, then here.
            self._pending[id] = old
        if self.changes is not None:
            self.changes.append((self, id, old, is_first))
        if record is not None:
            shard[id] = record
            if old is None:
                self.count += 1
        elif old is not None:
            del shard[id]
            self.count -= 1
        self.changed_seq = seq
        return old

    def committed(self, id: str) -> bytes | None:
        """The record in its last durable state, without taking a lock."""
        try:
            shard = self._shards[crc32(id.encode()) & 255]
        except UnicodeEncodeError:
            return None
        while True:
            epoch = self._epoch
            record = shard.get(id)
            # This order matters: pending becomes writing, never the other way round.
            pending, writing = self._pending, self._writing
            if writing and id in writing:
                return writing[id]
            if pending:
                old = pending.get(id, _ABSENT)  # one look: a refused batch takes its entries out again
                if old is not _ABSENT:
                    return old
            if epoch == self._epoch:
                return record

    def committed_count(self) -> int:
        """How many records there are in their last durable state; under the lock."""
        replaced = self._pending | self._writing
        return self.count + sum((old is not None) - (self.get(id) is not None) for id, old in replaced.items())

    @property
    def is_settled(self) -> bool:
        """Whether nothing of it is in flight."""
        return not self._writing and not self._pending

    # The fate of ops in flight.

    def begin_write(self) -> None:
        """The gathering batch is now the one being written."""
        assert not self._writing, "two batches written at once"
        self._writing = self._pending
        self._pending = {}

    def commit(self) -> None:
        """The batch being written is durable."""
        self._writing = {}

    def undo(self) -> None:
        """Take back everything in flight, newest first."""
        for replaced in (self._pending, self._writing):
            for id, record in replaced.items():
                self.put_back(id, record)
        # A reader that saw an undone record before and no overlay after must look again.
        self._epoch += 1
        self._pending = {}
        self._writing = {}

    def take_back(self, id: str, record: bytes | None, *, is_first: bool) -> None:
        """Undo one change of a refused atomic batch; nothing else in flight may be newer."""
        self.put_back(id, record)
        if is_first:
            # Left behind it would hide, and an undo would take back, what is acknowledged at once.
            self._epoch += 1
            del self._pending[id]

    def put_back(self, id: str, record: bytes | None) -> None:
        """Restore what a change replaced."""
        shard = self._shards[crc32(id.encode()) & 255]
        present = id in shard
        if record is not None:
            shard[id] = record
            self.count += not present
        elif present:
            del shard[id]
            self.count -= 1

    # One consistent picture, taken while others go on writing.

    def begin_capture(self) -> None:
        """From here on, ``capture_shard`` answers with what stood at this moment."""
        self._captured = [None] * SHARDS

    def capture_shard(self, index: int) -> Shard:
        """Shard *index* as it stood at ``begin_capture``; each may be taken once."""
        assert self._captured is not None, "no capture was begun"
        copy = self._captured[index]
        if copy is None:
            copy = self._shards[index].copy()
        # Whoever changes the shard from now on must not copy it again.
        self._captured[index] = _TAKEN
        return copy

    def end_capture(self) -> None:
        """Forget the picture."""
        self._captured = None

    # Whole shards, for loading and listing.

    def fill(self, id: str, record: bytes) -> None:
        """Store a record while loading, when nobody else looks."""
        shard = self._shards[crc32(id.encode()) & 255]
        if id not in shard:
            self.count += 1
        shard[id] = record

    def fill_all(self, raw_ids: list[bytes], ids: list[str], records: list[bytes]) -> None:
        """Store many while loading; *raw_ids* are the *ids* in UTF-8, which the caller has at hand."""
        shards = self._shards
        for raw_id, id, record in zip(raw_ids, ids, records, strict=True):
            shards[crc32(raw_id) & 255][id] = record
        self.count = sum(map(len, shards))

    def take_over(self, loaded: Collection) -> None:
        """Hold what *loaded* holds, which is not used any more."""
        self._shards, self.count, self.changed_seq = loaded._shards, loaded.count, loaded.changed_seq

    def committed_shard(self, index: int) -> Shard:
        """Shard *index* in its last durable state: the shard itself when nothing of it is in flight. Do not change it."""
        shard = self._shards[index]
        if not self._writing and not self._pending:
            return shard
        overlay = {id: old for id, old in list(self._pending.items()) if crc32(id.encode()) & 255 == index}
        overlay.update((id, old) for id, old in list(self._writing.items()) if crc32(id.encode()) & 255 == index)
        if not overlay:
            return shard
        settled = shard | {id: old for id, old in overlay.items() if old is not None}
        for id, old in overlay.items():
            if old is None:
                settled.pop(id, None)
        return settled

    def __iter__(self) -> Iterator[str]:
        """All ids as decided; only while nobody else writes."""
        for shard in self._shards:
            yield from shard


_TAKEN: Shard = {}
_ABSENT = b"absent"
