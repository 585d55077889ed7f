"""How much room is left on the disk, how fast it goes, and which part of the data takes it."""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.archive.place import ARCHIVE
from holdfast.care.backup_set import BACKUPS, SET_NAME
from holdfast.disk.journal import KEPT

LOOK_EVERY_S = 5.0
"""Between two looks at the free room, and two tries whether a full disk has room again."""

PARTS_EVERY_S = 300.0
"""Between two walks through the data directory."""

WALK_PAUSE_EVERY = 500
"""Files after which a walk leaves the processor to others."""

WALK_PAUSE_S = 0.005

BUCKET_S = 300.0
"""The growth is noted in spans of this length …"""

BUCKETS_MAX = 72
"""… for so many of them: six hours."""

BUCKETS_MIN = 3
"""Fewer say nothing about the rate."""

HALF_LIFE_BUCKETS = 24.0
"""A span this many spans ago, two hours, counts half."""

FILLING_HOURS, CALM_HOURS = 24.0, 48.0
"""Full within the first at the present rate is told; told again only after it was above the second."""

SHARE = 20
"""Room is low below ``limits.disk_free``, or below one in so many of the disk where that is less."""

CALM = 1.25
"""Times that, from where on it is not low any more."""

INODES_LOW = 1_000
"""Files that can still be made; fewer, or one in SHARE of all where that is less, are as bad as no room."""

_SNAPSHOTS = ".json"


class Usage(NamedTuple):
    """What a part takes.

    Attributes:
        bytes: of the disk; what several names share counts once, with the first part that has it.
        files: how many names.
    """

    bytes: int = 0
    files: int = 0


class Space(NamedTuple):
    """How the disk stands.

    Attributes:
        free_bytes, disk_bytes: of the file system, for users other than root.
        free_files: files that can still be made; None where the file system has no limit.
        grows_bytes_h: by how much more is taken each hour at the present rate, by whomever; None when that is not known.
        hours_left: until it is full at this rate; None when it is not known, or does not grow.
        is_low: less is left than ``limits.disk_free`` asks for.
    """

    free_bytes: int = 0
    disk_bytes: int = 0
    free_files: int | None = None
    grows_bytes_h: int | None = None
    hours_left: float | None = None
    is_low: bool = False


class Growth:
    """The rate at which a disk fills, from what was free at one time and another; seconds and bytes.

    The recent hours weigh most. The span in which most was taken is left out, and the one in which most was given back: a
    backup, or a file that somebody copies, is no rate.
    """

    def __init__(self) -> None:
        self._spans: deque[float] = deque(maxlen=BUCKETS_MAX)
        self._since: tuple[float, int] | None = None

    def note(self, at_s: float, free_bytes: int) -> None:
        """So much was free at this moment; moments only go forward."""
        if self._since is None:
            self._since = at_s, free_bytes
            return
        began_s, free_before = self._since
        if at_s - began_s >= BUCKET_S:
            # A machine that slept is no steady disk: what happened meanwhile counts for the time it took.
            self._spans.append((free_before - free_bytes) / (at_s - began_s))
            self._since = at_s, free_bytes

    @property
    def bytes_s(self) -> float | None:
        """By how much it grows each second; None as long as too little is known."""
        if len(self._spans) < BUCKETS_MIN:
            return None
        spans = list(self._spans)
        weights = [0.5 ** (age / HALF_LIFE_BUCKETS) for age in range(len(spans) - 1, -1, -1)]
        odd = {max(range(len(spans)), key=spans.__getitem__), min(range(len(spans)), key=spans.__getitem__)}
        kept = [index for index in range(len(spans)) if index not in odd or len(spans) == len(odd)]
        total = sum(spans[index] * weights[index] for index in kept)
        return float(total / sum(weights[index] for index in kept))


class SpaceWatch:
    """Watches the disk of one data directory; ``look`` is to be called every few seconds, by one thread at a time.

    Attributes:
        space, parts: as of the last look, and of the last walk; replaced, never changed.
    """

    def __init__(self, data_dir: Path, clock: Callable[[], float], log: Any) -> None:
        """*clock* gives monotonic seconds."""
        self.space = Space()
        self.parts: dict[str, Usage] = {}
        self._data_dir = data_dir
        self._clock = clock
        self._log = log
        self._growth = Growth()
        self._walked_s: float | None = None
        self._is_filling = False

    def look(self, low_bytes: int, is_stopping: Callable[[], bool] = lambda: False) -> None:
        """Bring ``space`` and, from time to time, ``parts`` up to date; *low_bytes* is ``limits.disk_free``.

        Raises:
            OSError: the file system does not answer.
        """
        now_s = self._clock()
        found = os.statvfs(self._data_dir)
        free_bytes, disk_bytes = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        self._growth.note(now_s, free_bytes)
        rate = self._growth.bytes_s
        low_bytes = min(low_bytes, disk_bytes // SHARE)
        low_files = min(INODES_LOW, found.f_files // SHARE) if low_bytes else 0
        # Some file systems make as many as there is room for, and say 0.
        free_files = found.f_favail if found.f_files else None
        factor = CALM if self.space.is_low else 1.0
        self.space = Space(
            free_bytes=free_bytes,
            disk_bytes=disk_bytes,
            free_files=free_files,
            grows_bytes_h=None if rate is None else round(rate * 3600),
            hours_left=round(free_bytes / rate / 3600, 1) if rate is not None and rate > 0 else None,
            is_low=free_bytes < low_bytes * factor or (free_files is not None and free_files < low_files * factor),
        )
        self._tell(bool(low_bytes))
        if self._walked_s is None or now_s - self._walked_s >= PARTS_EVERY_S:
            self.parts = parts_of(self._data_dir, is_stopping)
            self._walked_s = now_s

    @property
    def complaint(self) -> str:
        """What an operator should do something about; empty when there is room."""
        space = self.space
        if not space.is_low:
            return ""
        if space.free_files is not None and space.free_files < INODES_LOW:
            return f"the disk has room for {space.free_files} more files only: remove some"
        left = "" if space.hours_left is None else f", {space.hours_left:g} hours at the present rate"
        return f"the disk is nearly full: {space.free_bytes >> 20} MiB left{left}; free space, or make it larger"

    def _tell(self, is_wanted: bool) -> None:
        """Say once that it fills, and once that it does not any more."""
        space = self.space
        hours = space.hours_left
        limit = CALM_HOURS if self._is_filling else FILLING_HOURS
        is_filling = is_wanted and (space.is_low or (hours is not None and hours < limit))
        if is_filling == self._is_filling:
            return
        self._is_filling = is_filling
        if is_filling:
            self._log.warning(
                "disk.filling", free_bytes=space.free_bytes, hours_left=hours, free_files=space.free_files
            )
        else:
            self._log.info("disk.room_returned", free_bytes=space.free_bytes)


def parts_of(data_dir: Path, is_stopping: Callable[[], bool] = lambda: False) -> dict[str, Usage]:
    """What each part of the data directory takes, in the order in which an operator would look; a file or link counts.

    It takes its time for the sake of others. What cannot be read counts nothing.
    """
    walk = _Walk(is_stopping)
    walk.add_all(data_dir, _part_of_top)
    return {name: Usage(*walk.found.get(name, (0, 0))) for name in PARTS if name in walk.found or name in _ALWAYS}


PARTS = (
    "snapshots",
    "journal",
    "kept",
    "archive",
    "backups",
    "history",
    "copies kept",
    "mirror",
    "media",
    "inbox",
    "quarantine",
    "other",
)
"""What the data directory consists of."""

_ALWAYS = ("snapshots", "journal", "archive", "backups")
_TOP = {
    "conversations": "mirror",
    "escalations": "mirror",
    "media": "media",
    "inbox": "inbox",
    "quarantine": "quarantine",
}


def _part_of_top(name: str) -> str:
    if name.startswith(ARCHIVE):
        return "archive"
    return "snapshots" if name.endswith(_SNAPSHOTS) else _TOP.get(name, name)


def _part_of_backup(name: str) -> str:
    if name == "journal":
        return "history"
    return "backups" if SET_NAME.match(name.lstrip(".")) else "copies kept"


class _Walk:
    """One walk, with what it found by part: bytes and files."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self.found: dict[str, list[int]] = {}
        self._is_stopping = is_stopping
        self._shared: set[tuple[int, int]] = set()
        self._steps = 0

    def add_all(self, place: Path, part_of: Callable[[str], str]) -> None:
        """Add what is in *place*; *part_of* says to which part a name in it belongs."""
        for entry in _entries(place):
            part = part_of(entry.name)
            is_directory = entry.is_dir(follow_symlinks=False)
            if part == BACKUPS and is_directory and part_of is _part_of_top:
                self.add_all(Path(entry), _part_of_backup)
            elif part == "journal" and is_directory and part_of is _part_of_top:
                self.add_all(Path(entry), lambda name: "kept" if name == KEPT else "journal")
            else:
                self._add(entry, part if part in PARTS else "other")

    def _add(self, entry: os.DirEntry[str], part: str) -> None:
        if self._is_stopping():
            return
        self._steps += 1
        if self._steps % WALK_PAUSE_EVERY == 0:
            time.sleep(WALK_PAUSE_S)
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:
            return  # gone meanwhile
        if stat.S_ISDIR(status.st_mode):
            for inner in _entries(Path(entry)):
                self._add(inner, part)
            return
        usage = self.found.setdefault(part, [0, 0])
        usage[1] += 1
        if status.st_nlink > 1:
            if (status.st_dev, status.st_ino) in self._shared:
                return
            self._shared.add((status.st_dev, status.st_ino))
        usage[0] += status.st_blocks * 512


def _entries(place: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as found:
            # In this order, so that what is shared counts with the same part each time.
            return sorted(found, key=lambda entry: entry.name)
    except OSError:
        return []
