"""Following the journal: its events from a seq on, read from the segments while they are written.

It looks only at what its caller says is final, opens one segment at a time, and changes nothing; so it serves the event
stream, the archive, and tools on a directory that nobody has open.
"""

from __future__ import annotations

import os
from pathlib import Path

from holdfast.disk.files import Directory
from holdfast.disk.journal import KEPT, SEGMENT_NAME, JournalLine, decode_line, segment_name, seq_of
from holdfast.errors import Gone

READ_BYTES = 64 << 10
"""What one call reads when the caller does not say."""

_SCAN_BYTES = 4 << 10
"""A stretch this short is looked through line by line, rather than halved once more."""

_HEAD_BYTES = 48
"""Of a line, enough to hold its seq."""


class Tail:
    """One reader of a journal, with its place in it; one thread at a time.

    Holds a descriptor from the first ``read`` to ``close``: a segment that is pruned meanwhile can be read to its end.

    Attributes:
        position: everything up to here was handed out.
    """

    def __init__(self, directory: Path, after_seq: int) -> None:
        """Begin behind the event *after_seq* of the journal in *directory*; nothing is opened yet."""
        self.position = after_seq
        self._directory = directory
        self._fd: int | None = None
        self._offset = 0

    def read(self, last_seq: int, bytes_max: int = READ_BYTES) -> list[JournalLine]:
        """The next events, none above *last_seq*: about *bytes_max* bytes of them, one at least; empty when there is none.

        *last_seq* must be one that is never taken back: bytes behind it may yet be cut off and written anew, so nothing
        is concluded from them.

        Raises:
            Gone: the next event is not there any more, or cannot be read. The reader stays where it is.
        """
        if self.position >= last_seq:
            return []
        try:
            if self._fd is None:
                self._seek()
            assert self._fd is not None
            block = os.pread(self._fd, bytes_max, self._offset)
            if not block:
                self._open(self.position + 1)
                block = os.pread(self._fd, bytes_max, self._offset)
            while b"\n" not in block:
                more = os.pread(self._fd, max(bytes_max, len(block)), self._offset + len(block))
                if not more:
                    break
                block += more
        except OSError as error:
            raise self._gone(f"cannot be read: {error.strerror or error}") from error
        return self._take(block, last_seq)

    def skip_to(self, seq: int) -> None:
        """Go on behind the event *seq*, without reading what lies between."""
        if seq != self.position:
            self.position = seq
            self.close()

    def close(self) -> None:
        """Give the descriptor back; may be called twice. The next ``read`` would open its segment again."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _take(self, block: bytes, last_seq: int) -> list[JournalLine]:
        lines: list[JournalLine] = []
        start = 0
        seq = self.position
        while seq < last_seq:
            end = block.find(b"\n", start)
            if end < 0 and lines:
                break
            payload = decode_line(block[start:end]) if end >= 0 else None
            if payload is None or not payload.startswith(b'{"seq":%d,' % (seq + 1)):
                if lines:
                    break  # what was whole is handed out; the next call tells
                raise self._gone("is damaged")
            seq += 1
            lines.append(JournalLine(seq, payload))
            start = end + 1
        self.position = seq
        self._offset += start
        return lines

    def _seek(self) -> None:
        """Open the segment that holds the next event, at that event."""
        wanted = self.position + 1
        # A segment may be kept or pruned between the listing and the opening: then look again.
        for _ in range(10):
            first = max((first for first in _first_seqs(self._directory) if first <= wanted), default=None)
            if first is None:
                raise self._gone("is no longer in the journal")
            try:
                self._open(first)
            except FileNotFoundError:
                continue
            break
        else:
            raise self._gone("is no longer in the journal")
        assert self._fd is not None
        offset = _offset_of(self._fd, wanted)
        if offset is None:
            self.close()
            raise self._gone("is missing in the journal")
        self._offset = offset

    def _open(self, first_seq: int) -> None:
        name = segment_name(first_seq)
        try:
            with Directory(self._directory) as directory:
                fd = directory.open_to_read(name)
        except FileNotFoundError:
            with Directory(self._directory / KEPT) as kept:
                fd = kept.open_to_read(name)
        self.close()
        self._fd, self._offset = fd, 0

    def _gone(self, reason: str) -> Gone:
        wanted = self.position + 1
        # What is missing is not the oldest, but the next one that can be read is not known.
        oldest = min((first for first in _first_seqs(self._directory) if first > wanted), default=wanted + 1)
        return Gone(
            f"event {wanted} {reason}; read the present state, then go on after event {oldest - 1}", oldest_seq=oldest
        )


def oldest_seq(directory: Path) -> int:
    """The first event of the journal in *directory*, or the next one when it is empty; 0 when there is no segment."""
    return min(_first_seqs(directory), default=0)


def _first_seqs(directory: Path) -> set[int]:
    """Of every segment, in use or kept."""
    found: set[int] = set()
    # In this order: a segment moves only from the first to the second.
    for place in (directory, directory / KEPT):
        try:
            with Directory(place) as opened:
                names = opened.names()
        except FileNotFoundError:
            continue
        found.update(int(match[1]) for name in names if (match := SEGMENT_NAME.fullmatch(name)))
    return found


def _offset_of(fd: int, wanted: int) -> int | None:
    """Where the line of the event *wanted* begins in a segment, by halving; None when it is not there."""
    # A line that begins where the search ends may be half written; it is never the one wanted.
    low, high = 0, os.fstat(fd).st_size
    while high - low > _SCAN_BYTES:
        middle = (low + high) // 2
        start = _next_line(fd, middle)
        seq = _seq_at(fd, start) if start < high else None
        if seq is None or seq > wanted:
            high = middle + 1
        else:
            low = start
    while low < high:
        seq = _seq_at(fd, low)
        if seq is None or seq >= wanted:
            return low if seq == wanted else None
        low = _next_line(fd, low)
    return None


def _seq_at(fd: int, offset: int) -> int | None:
    return seq_of(os.pread(fd, _HEAD_BYTES, offset)[9:])


def _next_line(fd: int, offset: int) -> int:
    """Where the first line behind *offset* begins; the end of the file when there is none."""
    while block := os.pread(fd, _SCAN_BYTES, offset):
        newline = block.find(b"\n")
        if newline >= 0:
            return offset + newline + 1
        offset += len(block)
    return offset
