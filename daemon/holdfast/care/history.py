"""The history: every event that is still somewhere in a data directory, in order.

Events stand in up to three places: ``backups/journal/FIRST-LAST.jsonl.zst`` (closed segments, compressed, as long as
``backups.pitr`` wants them), ``journal/kept/`` and ``journal/``. The same event may stand in two of them; where one copy is
damaged the other serves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from holdfast.care.backup_set import BACKUPS
from holdfast.care.packing import PACKED, SEALED, Seal, Unreadable, seal_for, unpack
from holdfast.clock import parse_ms
from holdfast.core.event import decode_event
from holdfast.disk.files import Directory
from holdfast.disk.journal import KEPT, SEGMENT_NAME, JournalLine, decode_line, seq_of
from holdfast.errors import DataRefused

JOURNAL = "journal"
"""The directory of the segments within the data directory, and of the packed ones within ``backups/``."""

PACKED_NAME = re.compile(rf"(\d{{20}})-(\d{{20}})\.jsonl{re.escape(PACKED)}(?:{re.escape(SEALED)})?")

READ_BYTES = 1 << 20

_TAIL_BYTES = 64 << 10
_HEAD_CHARS = 80
_TRIES = 10
_AT = re.compile(rb'\{"seq":\d{1,19},"at":"([-0-9T:.Z]{24})"')


class HistoryGap(DataRefused):
    """Events that are asked for stand nowhere any more, or cannot be read.

    Attributes:
        first, last: the first and the last seq of them.
    """

    def __init__(self, first: int, last: int) -> None:
        super().__init__(
            f"events {first} to {last} are in no part of the history that can be read; "
            "choose a moment before them, or a backup made after them"
        )
        self.first, self.last = first, last


class Part(NamedTuple):
    """One file of the history.

    Attributes:
        first_seq, last_seq: of its events.
        first_at, last_at: when they happened, ms since 1970; 0 when that cannot be read.
        place: its path.
    """

    first_seq: int
    last_seq: int
    first_at: int
    last_at: int
    place: Path

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed, in ``backups/journal/``."""
        return self.place.name.endswith((PACKED, SEALED))


class History:
    """Every event of a data directory that is still somewhere; of one that is running or stopped, and nothing is changed.

    Of a running one it sees what was written when it is asked, which may not be durable yet.
    """

    def __init__(self, data_dir: Path, seal: Seal | None = None) -> None:
        """Of *data_dir*; *seal* opens what is encrypted."""
        self._data_dir = data_dir
        self._seal = seal

    def parts(self) -> list[Part]:
        """Its files that hold events, oldest first; of two that begin with the same event, the packed one first."""
        # In this order: a segment moves only from a later place to an earlier one, so that none is missed.
        segments: dict[int, Path] = {}
        for place in (self._data_dir / JOURNAL, self._data_dir / JOURNAL / KEPT):
            for name in _names(place):
                if match := SEGMENT_NAME.fullmatch(name):
                    segments.setdefault(int(match[1]), place / name)
        found = [self._segment(first, path, segments) for first, path in segments.items()]
        found += self._packed_parts()
        return sorted(
            (part for part in found if part is not None and part.last_seq >= part.first_seq),
            key=lambda part: (part.first_seq, not part.is_packed),
        )

    def lines(self, after_seq: int, up_to_seq: int) -> Iterator[JournalLine]:
        """The events behind *after_seq* up to *up_to_seq*, each once, in order.

        Raises:
            HistoryGap: the next one is nowhere, or nowhere readable; those before it were yielded.
            OSError: a file is there and cannot be opened.
        """
        position, tries, parts = after_seq, 0, self.parts()
        while position < up_to_seq:
            began = position
            # Plain files first: they are read without unpacking what stands before.
            for part in sorted(parts, key=lambda part: part.is_packed):
                if part.first_seq <= position + 1 <= part.last_seq:
                    for line in self._read(part, position, up_to_seq):
                        yield line
                        position = line.seq
                    if position > began:
                        break
            else:
                # A segment may be written on, moved, packed or pruned since the listing: then look again.
                before, parts, tries = parts, self.parts(), tries + 1
                if tries < _TRIES and parts != before:
                    continue
                ahead = [part.first_seq for part in parts if part.first_seq > position + 1]
                raise HistoryGap(position + 1, min([*ahead, up_to_seq + 1]) - 1)

    def seq_at(self, at_ms: int, after_seq: int) -> int:
        """The last seq behind *after_seq* whose event happened at or before *at_ms*, ms since 1970; *after_seq* when none did.

        Raises:
            HistoryGap: the part of the history where that is decided cannot be read.
        """
        reached = [part for part in self.parts() if part.last_seq > after_seq and part.first_at <= at_ms]
        if not reached:
            return after_seq
        newest = max(reached, key=lambda part: part.first_seq)
        found = max(after_seq, newest.first_seq - 1)
        for line in self.lines(found, newest.last_seq):
            if at_of(line.payload) > at_ms:
                break
            found = line.seq
        return found

    def _packed_parts(self) -> list[Part]:
        place = self._data_dir / BACKUPS / JOURNAL
        found = []
        for name in _names(place):
            match = PACKED_NAME.fullmatch(name)
            if match is None:
                continue
            part = Part(int(match[1]), int(match[2]), 0, 0, place / name)
            try:
                # Whoever packs it gives the file the time of its last event, so that it need not be unpacked for that.
                last_at = (place / name).stat().st_mtime_ns // 1_000_000
            except OSError:
                continue
            with closing(self._pieces(part)) as pieces:
                head = _first_line(pieces)
            found.append(part._replace(first_at=0 if head is None else at_of(head), last_at=last_at))
        return found

    def _segment(self, first_seq: int, path: Path, segments: Iterable[int]) -> Part | None:
        try:
            with Directory(path.parent) as directory:
                fd = directory.open_to_read(path.name)
        except OSError:
            return None
        try:
            head, last = _first_whole_line(fd), _last_whole_line(fd)
        finally:
            os.close(fd)
        following = min((seq for seq in segments if seq > first_seq), default=0)
        # Where its end cannot be read, the next one tells; where it can, events between the two may be missing.
        last_seq = (last and seq_of(last)) or (following - 1 if following else 0)
        return Part(first_seq, last_seq, at_of(head) if head else 0, at_of(last) if last else 0, path)

    def _read(self, part: Part, position: int, up_to_seq: int) -> Iterator[JournalLine]:
        """The events behind *position* in *part*, as far as they follow one another and can be read."""
        with closing(self._pieces(part)) as pieces:
            for line in _whole_lines(pieces):
                seq = seq_of(line[9 : 9 + _HEAD_CHARS])
                if seq is not None and seq <= position:
                    continue
                payload = decode_line(line)
                if payload is None or seq != position + 1 or seq > up_to_seq:
                    return
                yield JournalLine(seq, payload)
                position = seq
                if position == up_to_seq:
                    return

    def _pieces(self, part: Part) -> Generator[bytes]:
        """The content of *part*, as far as it can be read."""
        try:
            with Directory(part.place.parent) as directory:
                fd = directory.open_to_read(part.place.name)
        except FileNotFoundError:
            return
        with os.fdopen(fd, "rb", buffering=0) as file:
            raw = iter(lambda: file.read(READ_BYTES), b"")
            if not part.is_packed:
                yield from raw
                return
            try:
                yield from unpack(raw, seal_for(part.place.name, self._seal))
            except Unreadable:
                return  # what lacks is a gap; each line before it has a checksum of its own


def holes_of(parts: Iterable[Part], last_seq: int, known: Iterable[int]) -> list[tuple[int, int]]:
    """Which events between the first of *parts* (oldest first) and *last_seq* are in none of them, by their names and ends:
    the first and the last of each hole; those in *known* are none."""
    holes: list[tuple[int, int]] = []
    passed_over = sorted(known)
    position: int | None = None

    def look_between(first: int, last: int) -> None:
        for seq in passed_over:
            if first <= seq <= last:
                if seq > first:
                    holes.append((first, seq - 1))
                first = seq + 1
        if first <= last:
            holes.append((first, last))

    for part in parts:
        if position is not None:
            look_between(position + 1, part.first_seq - 1)
        position = max(position or 0, part.last_seq)
    if position is not None:
        look_between(position + 1, last_seq)
    return holes


def newest_segment(data_dir: Path) -> int:
    """With which event the segment begins that is written to, or would be; 0 when there is none."""
    matches = (SEGMENT_NAME.fullmatch(name) for name in _names(data_dir / JOURNAL))
    return max((int(match[1]) for match in matches if match), default=0)


def at_of(payload: bytes) -> int:
    """When the event in the JSON *payload* happened, ms since 1970; 0 when that cannot be read."""
    match = _AT.match(payload)
    try:
        return parse_ms(match[1].decode() if match else decode_event(payload).at)
    except ValueError:
        return 0


def _names(place: Path) -> list[str]:
    try:
        return os.listdir(place)
    except OSError:
        return []


def _whole_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        lines = (rest + piece).split(b"\n")
        rest = lines.pop()
        yield from lines


def _first_line(pieces: Iterable[bytes]) -> bytes | None:
    line = next(_whole_lines(pieces), None)
    return None if line is None else decode_line(line)


def _first_whole_line(fd: int) -> bytes | None:
    return _first_line(iter(lambda: os.read(fd, _TAIL_BYTES), b""))


def _last_whole_line(fd: int) -> bytes | None:
    """The payload of the last line whose checksum holds; None when there is none."""
    end = os.fstat(fd).st_size
    size = min(_TAIL_BYTES, end)
    while size:
        block = os.pread(fd, size, end - size)
        lines = block.split(b"\n")[:-1]
        # The first one may be a part of a line, unless all of the file was read.
        for line in reversed(lines if size == end else lines[1:]):
            if (payload := decode_line(line)) is not None:
                return payload
        if size == end:
            return None
        size = min(size * 4, end)
    return None
