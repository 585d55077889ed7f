"""The journal: the append-only history of every change, in segments.

Format, shared by writer and reader. A segment is a file ``%020d.jsonl`` named by the seq of its first event;
each event is one line::

    0f3a9c21 {"seq":7,"at":"2026-11-21T06:00:00.000Z","op":"session.put",…}\\n

8 hex digits of the CRC-32 of the JSON, a space, the JSON, a newline. The JSON begins with its seq. ``tail -f``
and ``cut -c10- | jq`` work on it.

Segments that the snapshots hold move to ``kept/``, for readers that come back after a while; a start never looks there.

What it is bad at: a checksum a line costs 9 bytes and some of the speed that a checksum a block would have; text is
two to three times the size of a binary encoding; finding a seq inside a segment means halving it a dozen times.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from holdfast.checksum import crc32
from holdfast.disk.files import FULL_ERRNOS, Directory
from holdfast.errors import JournalBroken, StorageFull

SEGMENT_NAME = re.compile(r"(\d{20})\.jsonl")
KEPT = "kept"
"""The directory, within that of the segments, of those that only readers still want."""

_CHECKSUM_CHARS = 8
_SEQ = re.compile(rb'\{"seq":(\d{1,19}),')


def encode_line(payload: bytes) -> bytes:
    """The line of one event."""
    return b"%08x %b\n" % (crc32(payload), payload)


def decode_line(line: bytes) -> bytes | None:
    """The payload of *line* (without its newline), or None when its checksum does not hold."""
    payload = line[_CHECKSUM_CHARS + 1 :]
    if line[_CHECKSUM_CHARS : _CHECKSUM_CHARS + 1] != b" ":
        return None
    return payload if line[:_CHECKSUM_CHARS] == b"%08x" % crc32(payload) else None


def segment_name(first_seq: int) -> str:
    """The file name of the segment that begins with *first_seq*."""
    return f"{first_seq:020d}.jsonl"


def seq_of(payload: bytes) -> int | None:
    """The seq with which the JSON of an event begins; None when it does not begin so."""
    match = _SEQ.match(payload)
    return int(match[1]) if match else None


class Journal:
    """The writing end. One thread at a time; it owns the newest segment.

    Attributes:
        written_seq: everything up to here is in the file.
        synced_seq: everything up to here is on stable storage.
    """

    def __init__(self, directory: Directory, segments: dict[int, int], next_seq: int, *, new_segment: bool) -> None:
        """Open for appending.

        Args:
            directory: where the segments are.
            segments: first seq → size in bytes of those that are there, all of them durable.
            next_seq: of the next event.
            new_segment: begin a new segment rather than go on in the newest.
        """
        self._directory = directory
        self._segments = dict(sorted(segments.items()))
        self._kept: dict[int, int] = {}
        self._broken: str | None = None
        self.written_seq = self.synced_seq = next_seq - 1
        if self._segments and not new_segment:
            self._first_seq = next(reversed(self._segments))
            self._fd = directory.open_to_append(segment_name(self._first_seq), new=False)
        else:
            self._fd = self._create(next_seq)
            self._first_seq = next_seq
        self._good_bytes = self._segments.setdefault(self._first_seq, 0)
        if directory.stat(KEPT) is not None:
            self._find_kept()

    @property
    def size_bytes(self) -> int:
        """Of all segments together; without those kept, which no flush makes smaller."""
        return sum(list(self._segments.values()))

    @property
    def kept_bytes(self) -> int:
        """Of the segments kept for readers."""
        return sum(list(self._kept.values()))

    @property
    def segment_bytes(self) -> int:
        """Of the newest segment."""
        return self._good_bytes

    @property
    def segments(self) -> int:
        """How many there are."""
        return len(self._segments)

    @property
    def first_seq(self) -> int:
        """The oldest event that is still there, or the next one when there is none."""
        return min(list(self._segments))

    def append(self, batch: bytes, last_seq: int) -> None:
        """Write the lines of *batch*, whose last event has *last_seq*; durable only after ``sync``.

        Raises:
            StorageFull: nothing of the batch is in the file; the journal stays usable.
            JournalBroken: the file cannot be put right; nothing more is accepted.
        """
        self._check()
        # A short write comes before ENOSPC, or from a disk that lies about what it took. Either way the rest
        # must not follow a part that may not be there: cut back, and write the whole batch once more.
        for _ in range(2):
            try:
                written = os.write(self._fd, batch)
            except OSError as error:
                self._cut_back(error)
                if error.errno in FULL_ERRNOS:
                    raise StorageFull(
                        f"no room for the journal: {error.strerror}; free space, writes resume by themselves"
                    ) from error
                raise self._break(f"could not write from seq {self.written_seq + 1}: {error}") from error
            if written == len(batch):
                self._good_bytes += written
                self._segments[self._first_seq] = self._good_bytes
                self.written_seq = last_seq
                return
            self._cut_back(OSError(errno.EIO, "short write"))
        raise StorageFull("no room for the journal: the disk took only a part of it; free space")

    def sync(self) -> None:
        """Put everything written on stable storage.

        Raises:
            JournalBroken: the disk refused. What was written since the last sync may or may not come back after a
                restart; nothing more is accepted.
        """
        self._check()
        if self.synced_seq == self.written_seq:
            return
        try:
            _sync_data(self._fd)
        except OSError as error:
            # No retry: after a failed fsync the kernel may have dropped the dirty pages, and the next fsync
            # would succeed without them.
            raise self._break(f"could not sync from seq {self.synced_seq + 1}: {error}") from error
        self.synced_seq = self.written_seq

    def rotate(self) -> None:
        """Go on in a new segment; the old one is complete and durable. Nothing happens when the newest is empty.

        Raises:
            StorageFull: no room for another file; the journal goes on in the old segment.
            JournalBroken: as ``sync``.
        """
        self.sync()
        if not self._good_bytes:
            return
        next_seq = self.written_seq + 1
        try:
            fd = self._create(next_seq)
        except OSError as error:
            if error.errno in FULL_ERRNOS:
                raise StorageFull(f"no room for a new journal segment: {error.strerror}") from error
            raise self._break(f"could not begin a segment at seq {next_seq}: {error}") from error
        os.close(self._fd)
        self._fd, self._first_seq, self._good_bytes = fd, next_seq, 0
        self._segments[next_seq] = 0

    def retire(self, covered_seq: int, needed_seq: int, keep_bytes: int) -> int:
        """Take the segments that hold only events up to *covered_seq* out of the journal; return how many.

        Of these, and of those taken out before, the newest are kept for readers: as many as *keep_bytes* allows, and
        every one that holds an event from *needed_seq* on. The others are removed. One thread at a time.
        """
        # The writing thread may begin another one meanwhile.
        firsts = list(self._segments)
        retiring = [first for first, following in itertools.pairwise(firsts) if following <= covered_seq + 1]
        candidates = self._kept | {first: self._segments[first] for first in retiring}
        kept: set[int] = set()
        total, following = 0, firsts[len(retiring)]
        for first, size in reversed(candidates.items()):
            total += size
            if total > keep_bytes and following <= needed_seq:
                break
            kept.add(first)
            following = first
        # From the oldest on, so that what a crash leaves has no hole.
        stale = [first for first in self._kept if first not in kept]
        if stale:
            with self._directory.subdirectory(KEPT) as directory:
                self._remove(stale, directory, self._kept)
        self._remove([first for first in retiring if first not in kept], self._directory, self._segments)
        self._keep([first for first in retiring if first in kept])
        return len(retiring)

    def _keep(self, firsts: list[int]) -> None:
        if not firsts:
            return
        with self._directory.subdirectory(KEPT) as kept:
            for first in firsts:
                # Missing where an earlier try moved it and then failed.
                with contextlib.suppress(FileNotFoundError):
                    self._directory.move(segment_name(first), kept, segment_name(first))
                self._kept[first] = self._segments.pop(first)

    def _remove(self, firsts: list[int], directory: Directory, sizes: dict[int, int]) -> None:
        for first in firsts:
            directory.remove(segment_name(first))
            del sizes[first]
        if firsts:
            directory.sync()

    def _find_kept(self) -> None:
        with self._directory.subdirectory(KEPT) as kept:
            for name in kept.names():
                match, status = SEGMENT_NAME.fullmatch(name), kept.stat(name)
                if match is None or status is None:
                    continue
                if int(match[1]) < self.first_seq:
                    self._kept[int(match[1])] = status.st_size
                else:
                    # Of a history that was given up: its numbers are used again.
                    kept.remove(name)

    def close(self) -> None:
        """Sync what is written, unless broken, and give the descriptors back, the directory's too."""
        try:
            if self._broken is None:
                self.sync()
        finally:
            os.close(self._fd)
            self._directory.close()

    def _create(self, first_seq: int) -> int:
        name = segment_name(first_seq)
        fd = self._directory.open_to_append(name, new=True)
        try:
            os.fsync(fd)
            self._directory.sync()
        except OSError:
            os.close(fd)
            self._directory.remove(name)
            raise
        return fd

    def _cut_back(self, cause: OSError) -> None:
        try:
            os.ftruncate(self._fd, self._good_bytes)
        except OSError as error:
            raise self._break(f"could not cut back to byte {self._good_bytes} after {cause}: {error}") from error

    def _break(self, reason: str) -> JournalBroken:
        self._broken = reason
        return JournalBroken(f"the journal {reason}; restart to recover")

    def _check(self) -> None:
        if self._broken is not None:
            raise JournalBroken(f"the journal {self._broken}; restart to recover")


# The reading end.


class JournalLine(NamedTuple):
    """One event whose checksum holds.

    Attributes:
        seq: its number.
        payload: its JSON.
    """

    seq: int
    payload: bytes


class Damage(NamedTuple):
    """A stretch of a segment that holds no event.

    Attributes:
        segment: file name.
        offset: of its first byte.
        bytes: its length.
        reason: what is wrong.
    """

    segment: str
    offset: int
    bytes: int
    reason: str


class History(NamedTuple):
    """What the segments hold.

    Attributes:
        segments: first seq by name → size in bytes.
        lines: every event whose checksum holds, by seq, each once.
        torn: an unfinished last write, to be cut off.
        damages: everything else that is wrong.
        gaps: first and last seq of each stretch that is missing.
    """

    segments: dict[int, int]
    lines: list[JournalLine]
    torn: Damage | None
    damages: list[Damage]
    gaps: list[tuple[int, int]]

    @property
    def last_seq(self) -> int:
        """Of the newest event; 0 when there is none."""
        return self.lines[-1].seq if self.lines else 0


def read_history(directory: Directory, after_seq: int, *, distrust_cache: bool = False) -> History:
    """Read all segments; nothing is changed.

    An unfinished last write is one at the very end of the newest segment that has no newline, or holds zeros;
    a whole line with a wrong checksum is damage wherever it stands.

    Args:
        directory: of the segments.
        after_seq: what the snapshot holds; only gaps after it are gaps.
        distrust_cache: sync each segment and drop it from the page cache before reading, so that what is read is what
            is on the disk. After a failed fsync the cache may hold events that the disk does not.
    """
    found = sorted((int(match[1]), name) for name in directory.names() if (match := SEGMENT_NAME.fullmatch(name)))
    segments: dict[int, int] = {}
    lines: dict[int, bytes] = {}
    damages: list[Damage] = []
    torn: Damage | None = None
    for index, (first_seq, name) in enumerate(found):
        is_newest = index == len(found) - 1
        data = _read_segment(directory, name, distrust_cache=distrust_cache)
        segments[first_seq] = len(data)
        wrong = _take_lines(data, name, first_seq, lines)
        if wrong and is_newest:
            torn, rest = _split_torn(data, wrong.pop())
            wrong += rest
        damages += wrong
    ordered = [JournalLine(seq, lines[seq]) for seq in sorted(lines)]
    return History(segments, ordered, torn, damages, _gaps(ordered, segments, after_seq))


def read_lines(directory: Path) -> Iterator[JournalLine | Damage]:
    """Every event of a journal that may be in use, then everything that is wrong; for people to look at."""
    with Directory(directory) as opened:
        history = read_history(opened, after_seq=0)
    yield from history.lines
    yield from history.damages
    if history.torn is not None:
        yield history.torn


class Segment(NamedTuple):
    """What one segment holds.

    Attributes:
        bytes: its size.
        lines: every event whose checksum holds, in order.
        torn: an unfinished last write; only of the newest segment.
        damages: everything else that is wrong.
    """

    bytes: int
    lines: list[JournalLine]
    torn: Damage | None
    damages: list[Damage]


def read_segment(directory: Directory, name: str, *, is_newest: bool) -> Segment:
    """Read the segment *name* alone; nothing is changed.

    Raises:
        OSError: it cannot be read.
    """
    match = SEGMENT_NAME.fullmatch(name)
    assert match is not None, "a segment is named by a seq"
    lines: dict[int, bytes] = {}
    data = _read_segment(directory, name, distrust_cache=False)
    damages = _take_lines(data, name, int(match[1]), lines)
    torn = None
    if damages and is_newest:
        torn, rest = _split_torn(data, damages.pop())
        damages += rest
    return Segment(len(data), [JournalLine(seq, payload) for seq, payload in lines.items()], torn, damages)


def _read_segment(directory: Directory, name: str, *, distrust_cache: bool) -> bytes:
    fd = directory.open_to_read(name)
    with os.fdopen(fd, "rb") as file:
        if distrust_cache:
            os.fsync(fd)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def _take_lines(data: bytes, name: str, first_seq: int, lines: dict[int, bytes]) -> list[Damage]:
    """Put the events of a segment into *lines*; return its damages, neighbouring ones as one."""
    damages: list[Damage] = []
    offset = last_seq = 0
    for line in data.split(b"\n"):
        end = offset + len(line) + 1
        if end > len(data) and not line:
            break
        reason = None
        payload = decode_line(line) if end <= len(data) else None
        if payload is None:
            reason = "unfinished line" if end > len(data) else "checksum does not hold"
        else:
            match = _SEQ.match(payload)
            seq = int(match[1]) if match else 0
            if match and not offset and seq != first_seq:
                # Of another segment; its events are as good under any name.
                damages.append(Damage(name, 0, 0, f"named for event {first_seq}, but begins with {seq}"))
                last_seq = seq - 1
            if not match:
                reason = "event without a seq"
            elif seq <= last_seq:
                reason = f"stale event {seq} behind {last_seq}"
            elif lines.get(seq, payload) != payload:
                reason = f"a second, different event {seq}"
            elif seq in lines:
                reason = f"event {seq} stands twice"
            else:
                lines[seq] = payload
                last_seq = seq
        if reason:
            size = min(end, len(data)) - offset
            previous = damages[-1] if damages else None
            if previous and previous.bytes and previous.offset + previous.bytes == offset:
                damages[-1] = previous._replace(bytes=previous.bytes + size)
            else:
                damages.append(Damage(name, offset, size, reason))
        offset = end
    return damages


def _split_torn(data: bytes, damage: Damage) -> tuple[Damage | None, list[Damage]]:
    """The part of the last *damage* that looks like a write that never finished, and what else of it there is.

    Unfinished is the end of the file from the first line on that holds zeros, has no newline, or repeats an older
    event. A line before it with a wrong checksum was whole once, so it was acknowledged.
    """
    if damage.offset + damage.bytes != len(data) or not damage.bytes:
        return None, [damage]
    if damage.reason.startswith("stale"):
        return damage, []
    tail = data[damage.offset :]
    zero = tail.find(b"\0")
    if zero < 0 and tail.endswith(b"\n"):
        return None, [damage]
    start = tail.rfind(b"\n", 0, zero if zero >= 0 else len(tail)) + 1
    torn = Damage(damage.segment, damage.offset + start, damage.bytes - start, "unfinished line")
    return torn, [damage._replace(bytes=start)] if start else []


def _gaps(lines: list[JournalLine], segments: dict[int, int], after_seq: int) -> list[tuple[int, int]]:
    gaps = []
    expected = after_seq + 1
    for seq in [line.seq for line in lines]:
        if seq > expected:
            gaps.append((expected, seq - 1))
        expected = max(expected, seq + 1)
    # The newest segment is named by the next event even when it is still empty.
    newest = max(segments, default=0)
    if newest > expected:
        gaps.append((expected, newest - 1))
    return gaps


# fdatasync leaves the modification time to be written later; the size it does write.
_sync_data = os.fdatasync if hasattr(os, "fdatasync") else os.fsync
