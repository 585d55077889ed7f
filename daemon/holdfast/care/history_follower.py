"""Keeping the history: closed segments of the journal are compressed into ``backups/journal/``, as long as ``backups.pitr`` wants.

It follows the journal as the archive does: a segment is not removed before it is packed. But it is the first to give way: when
the disk is short of room, it lets go of the segments that wait for it, then of what it has packed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from holdfast.care.backup_set import BACKUPS, BackupSet, list_sets
from holdfast.care.history import JOURNAL, PACKED_NAME, History, HistoryGap, Part, holes_of, newest_segment
from holdfast.care.history import at_of as history_at
from holdfast.care.moments import restored_seqs
from holdfast.care.packing import PACKED, SEALED, Seal, pack
from holdfast.care.rotation import at_of, base_of, is_good
from holdfast.clock import Clock, format_ms
from holdfast.disk.files import Directory
from holdfast.disk.journal import encode_line
from holdfast.errors import HoldfastError, StorageFull
from holdfast.flush import KEEP_SHARE, Flusher
from holdfast.ops import HistoryInfo
from holdfast.settings import Settings

LOOK_EVERY_S = 20.0

PACK_BYTES = 4 << 20
"""Closed segments are packed when there are so many bytes of them …"""

PACK_AFTER_S = 600.0
"""… or when the oldest event among them is so old, so that there are not more files than hours need."""

PART_BYTES_MAX = 64 << 20
"""Of one part, before it is compressed."""

QUARANTINE = "quarantine"

_NOTHING_NEEDED = 2**63
_LINES_AT_ONCE = 500


class HistoryFollower:
    """Packs what is closed, and removes what no moment needs any more; a thread from ``start`` to ``close``.

    Attributes:
        problem: why nothing is kept now; empty when it is.
        bytes: what the packed parts take.
    """

    def __init__(
        self,
        data_dir: Path,
        settings: Callable[[], Settings],
        seal: Callable[[], Seal | None],
        flusher: Flusher,
        change_detector: Callable[[], Callable[[], bool]],
        clock: Clock,
        log: Any,
    ) -> None:
        self.problem = ""
        self.bytes = 0
        self._data_dir = data_dir
        self._settings = settings
        self._seal = seal
        self._flusher = flusher
        self._change_detector = change_detector
        self._clock = clock
        self._log = log
        self._taken_seq = _NOTHING_NEEDED
        self._woken = threading.Event()
        self._is_closing = False
        self._working = threading.Lock()
        self._has_given_way = False
        self._began = (clock.now_ms(), clock.monotonic())
        self._thread = threading.Thread(target=self._run, name="holdfast-history", daemon=True)

    def start(self) -> None:
        """Begin to follow, from where the packed parts end."""
        self.bytes = sum(part.place.stat().st_size for part in packed_parts(self._data_dir))
        if self._settings().backups.pitr:
            self._resume()
        self._flusher.before_making_room = self.give_way
        self._thread.start()

    def newest_packed(self) -> int:
        """The last event that is packed; 0 when none is."""
        return max((part.last_seq for part in packed_parts(self._data_dir)), default=0)

    def set_aside_newer(self, present_seq: int) -> None:
        """Put what is packed beyond the event *present_seq*, the last there is, into quarantine/: those numbers are given
        to other events from now on. Called before ``start``.

        Raises:
            HoldfastError, OSError: what was not moved stays.
        """
        newer = [part for part in packed_parts(self._data_dir) if part.last_seq > present_seq]
        if not newer:
            return
        stamp = format_ms(self._clock.now_ms()).replace(":", "")
        with (
            Directory(self._data_dir) as data,
            data.subdirectory(QUARANTINE) as quarantine,
            Directory(self._data_dir / BACKUPS / JOURNAL) as place,
        ):
            for part in newer:
                place.move(part.place.name, quarantine, f"{stamp}-{part.place.name}")
        self._log.error(
            "history.set_aside", first_seq=newer[0].first_seq, last_seq=newer[-1].last_seq, present_seq=present_seq
        )

    def wake(self) -> None:
        """Look now whether there is something to do."""
        self._woken.set()

    def close(self) -> None:
        """End; what is not packed yet waits in the journal for the next start."""
        self._is_closing = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> None:
        """Pack what is closed and due, remove what is not needed; called by the thread, and by tests in its place.

        Raises:
            OSError, StorageFull: no room, or not ours to write; the journal keeps what waits.
        """
        pitr_s = self._settings().backups.pitr
        with self._working:
            if not pitr_s:
                self._taken_seq, self.problem = _NOTHING_NEEDED, ""
                self._flusher.unfollow("history")
                self._remove(packed_parts(self._data_dir))
                return
            if self._taken_seq == _NOTHING_NEEDED:
                if self._is_short_of_room():
                    return
                self._resume()
            self._pack_closed()
            self._prune(pitr_s)

    def give_way(self) -> None:
        """Let go of the segments that wait, and of packed parts: there is no room. Called by whoever makes it; does not raise."""
        self._taken_seq = _NOTHING_NEEDED
        if not self._working.acquire(blocking=False):
            return  # it is packing, and will find that there is no room
        try:
            packed = packed_parts(self._data_dir)
            sets = list_sets(self._data_dir)
            newest = next((found.manifest.seq for found in sets if is_good(found) and found.manifest is not None), 0)
            # First what only moments before the newest set need; when that was not enough, the rest.
            going = [part for part in packed if part.last_seq <= newest] or packed
            if going or not self._has_given_way:
                self._remove(going)
                self._log.warning(
                    "history.given_up",
                    first_seq=going[0].first_seq if going else 0,
                    last_seq=going[-1].last_seq if going else 0,
                    reason="the disk is short of room",
                )
            self.problem = "the disk is short of room: moments between two backups cannot be restored"
            self._has_given_way = True
        except OSError as error:
            self._log.warning("history.failed", reason=str(error))
        finally:
            self._working.release()

    def _run(self) -> None:
        while True:
            self._woken.wait(LOOK_EVERY_S)
            self._woken.clear()
            if self._is_closing:
                return
            self._try_step()

    def _try_step(self) -> None:
        try:
            self.step()
        except StorageFull:
            self.give_way()
        except (HoldfastError, OSError) as error:
            if str(error) != self.problem:
                self._log.warning("history.failed", reason=str(error))
                self.problem = str(error)
        except Exception as error:  # a fault of ours must not end it for good
            self._log.exception("history.failed", reason=repr(error))

    def _resume(self) -> None:
        """Follow from the end of the packed parts on, or from the oldest event that is still there."""
        parts = History(self._data_dir).parts()
        packed_seq = max((part.last_seq for part in parts if part.is_packed), default=0)
        # A segment without events says by its name what the next one is.
        oldest_seq = min(
            (part.first_seq for part in parts if not part.is_packed), default=max(newest_segment(self._data_dir), 1)
        )
        self._taken_seq = max(packed_seq, oldest_seq - 1)
        self._flusher.follow("history", self._watermark)
        if self.problem or self._has_given_way:
            self._log.info("history.resumed", after_seq=self._taken_seq)
        self.problem, self._has_given_way = "", False

    def _watermark(self) -> int:
        # Also in the moment after a reload, before the thread has looked.
        return self._taken_seq if self._settings().backups.pitr else _NOTHING_NEEDED

    def _is_short_of_room(self) -> bool:
        free_bytes, _ = self._flusher.disk_space()
        # More than what made it give way, so that it does not go to and fro.
        return free_bytes < 2 * KEEP_SHARE * max(self._settings().journal_keep, PACK_BYTES)

    def _pack_closed(self) -> None:
        detector = self._change_detector()
        while not self._is_closing:
            open_seq = newest_segment(self._data_dir)
            closed = [
                part
                for part in History(self._data_dir).parts()
                if not part.is_packed and part.first_seq < open_seq and part.last_seq > self._taken_seq
            ]
            if not closed:
                return
            sizes = [_size(part.place) for part in closed]
            is_old = self._clock.now_ms() - closed[0].first_at >= PACK_AFTER_S * 1000
            if sum(sizes) < PACK_BYTES and not is_old:
                return
            total, last = 0, closed[0]
            for part, size in zip(closed, sizes, strict=True):
                if total and total + size > PART_BYTES_MAX:
                    break
                total, last = total + size, part
            self._pack(self._taken_seq, last.last_seq, detector)

    def _pack(self, after_seq: int, up_to_seq: int, is_busy: Callable[[], bool]) -> None:
        history, seal = History(self._data_dir), self._seal()
        reached, last_at = after_seq, 0
        gap: HistoryGap | None = None

        def lines() -> Iterator[bytes]:
            nonlocal reached, last_at, gap
            batch: list[bytes] = []
            try:
                for line in history.lines(after_seq, up_to_seq):
                    batch.append(encode_line(line.payload))
                    reached = line.seq
                    if line.seq == up_to_seq:
                        last_at = history_at(line.payload)
                    if len(batch) >= _LINES_AT_ONCE:
                        yield b"".join(batch)
                        batch = []
            except HistoryGap as error:
                gap = error
            yield b"".join(batch)

        # Under the name of what should be in it; a gap makes it another one.
        wanted = _name(after_seq + 1, up_to_seq, seal)
        with (
            Directory(self._data_dir) as data,
            data.subdirectory(BACKUPS) as backups,
            backups.subdirectory(JOURNAL) as place,
        ):
            place.stage(wanted, pack(lines(), seal), is_busy)
            if gap is not None:
                place.discard([wanted])
            else:
                place.publish([wanted])
        if gap is not None:
            if reached > after_seq:
                self._pack(after_seq, reached, is_busy)
            self._log.warning("history.gap_found", first_seq=gap.first, last_seq=gap.last)
            self._go_on_from(gap.last)
            return
        path = self._data_dir / BACKUPS / JOURNAL / wanted
        if last_at:
            # A hint for who looks for a moment, without unpacking.
            os.utime(path, ns=(last_at * 1_000_000, last_at * 1_000_000))
        self.bytes += _size(path)
        self._go_on_from(up_to_seq)

    def _go_on_from(self, seq: int) -> None:
        # What gave way meanwhile stays given up.
        if self._taken_seq != _NOTHING_NEEDED:
            self._taken_seq = seq

    def _prune(self, pitr_s: float) -> None:
        # A wall clock that jumped ahead makes nothing old.
        began_ms, began = self._began
        now_ms = min(self._clock.now_ms(), began_ms + round((self._clock.monotonic() - began) * 1000))
        base = base_of(list_sets(self._data_dir), pitr_s, now_ms)
        if base is not None and base.manifest is not None:
            needed_seq = min(base.manifest.snapshot_seq, base.manifest.seq)
            self._remove([part for part in packed_parts(self._data_dir) if part.last_seq <= needed_seq])
        else:
            oldest_ms = now_ms - round(pitr_s * 1000)
            self._remove([part for part in packed_parts(self._data_dir) if 0 < part.last_at < oldest_ms])

    def _remove(self, parts: list[Part]) -> None:
        if not parts:
            return
        with Directory(self._data_dir / BACKUPS / JOURNAL) as place:
            for part in parts:
                size = _size(part.place)
                place.remove(part.place.name)
                self.bytes -= size
            place.sync()


def history_of(settings: Settings, sets: list[BackupSet], problem: str = "") -> HistoryInfo:
    """How the history stands, for people; *sets* are those that there are, *problem* why it is not kept."""
    packed = packed_parts(settings.data_dir)
    since_ms = 0
    if settings.backups.pitr and not problem:
        # Before the parts are listed: meanwhile there come more.
        last_seq = newest_segment(settings.data_dir) - 1
        parts = History(settings.data_dir).parts()
        first_seq = min((part.first_seq for part in parts), default=0)
        holes = holes_of(parts, last_seq, restored_seqs(settings.data_dir))
        if holes:
            first_seq = holes[-1][1] + 1
        # From the oldest set behind which no event is missing.
        reached = [found for found in sets if is_good(found) and found.manifest and found.manifest.seq >= first_seq - 1]
        since_ms = min(map(at_of, reached), default=0)
    return HistoryInfo(
        since=format_ms(since_ms) if since_ms else "",
        first_seq=packed[0].first_seq if packed else 0,
        last_seq=packed[-1].last_seq if packed else 0,
        parts=len(packed),
        bytes=sum(_size(part.place) for part in packed),
        problem=problem if settings.backups.pitr else "",
    )


def packed_parts(data_dir: Path) -> list[Part]:
    """The packed parts by their names alone, oldest first."""
    place = data_dir / BACKUPS / JOURNAL
    found = []
    with suppress(OSError):
        for name in sorted(os.listdir(place)):
            if match := PACKED_NAME.fullmatch(name):
                with suppress(OSError):
                    last_at = (place / name).stat().st_mtime_ns // 1_000_000
                    found.append(Part(int(match[1]), int(match[2]), 0, last_at, place / name))
    return found


def _name(first_seq: int, last_seq: int, seal: Seal | None) -> str:
    return f"{first_seq:020d}-{last_seq:020d}.jsonl{PACKED}{SEALED if seal is not None else ''}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
