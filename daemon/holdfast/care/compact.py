"""Giving back the room that nothing uses any more."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from holdfast.archive.base import Archive, Condensed
from holdfast.care.space import Usage, parts_of
from holdfast.disk.files import Directory
from holdfast.errors import Conflict

if TYPE_CHECKING:
    from holdfast.engine import Engine

PAUSE_S_MAX = 0.05
"""After each step of condensing others have the processor as long as it took, up to this."""

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
_one_at_a_time = threading.Lock()


class PartUsage(msgspec.Struct, frozen=True):
    """What a part of the data directory takes of the disk."""

    bytes: int
    files: int


class CompactReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was gained.

    Attributes:
        before, after: by part of the data directory.
        freed_bytes: what all of it takes less.
        condensed_messages: messages of archived conversations that were packed.
        temporaries: half-written files of a killed process that were removed.
        duration_ms: how long it took.
    """

    before: dict[str, PartUsage]
    after: dict[str, PartUsage]
    freed_bytes: int
    condensed_messages: int
    temporaries: int
    duration_ms: float


def compact(
    engine: Engine,
    is_stopping: Callable[[], bool] = lambda: False,
    progress: Callable[[str], object] = lambda text: None,
) -> CompactReport:
    """Flush, prune what is kept by the rules, pack old conversations, write the archive anew; blocks, while others go on.

    Logged as ``data.compacted``. *progress* is told in words how far it is.

    Raises:
        Conflict: it is under way already.
        StorageFull: no room for a second archive; what came before that is done.
        Unavailable: the archive cannot be read or written now, or *is_stopping* said so; likewise.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise Conflict("compacting is under way already; wait until it is done")
    try:
        return _compact(engine, is_stopping, progress)
    finally:
        _one_at_a_time.release()


def _compact(engine: Engine, is_stopping: Callable[[], bool], progress: Callable[[str], object]) -> CompactReport:
    started = engine.monotonic()
    data_dir = engine.settings.data_dir
    before = parts_of(data_dir, is_stopping)
    progress("flushing")
    engine.flush("api")
    temporaries = _remove_temporaries(engine)
    progress("packing old conversations")
    condensed = condense(engine, is_stopping)
    progress("writing the archive anew")
    engine.compact_archive(is_stopping)
    after = parts_of(data_dir, is_stopping)
    report = CompactReport(
        before=_told(before),
        after=_told(after),
        freed_bytes=sum(one.bytes for one in before.values()) - sum(one.bytes for one in after.values()),
        condensed_messages=condensed.messages,
        temporaries=temporaries,
        duration_ms=round((engine.monotonic() - started) * 1000, 1),
    )
    engine.log.info(
        "data.compacted",
        freed_bytes=report.freed_bytes,
        condensed_messages=report.condensed_messages,
        duration_ms=report.duration_ms,
    )
    return report


def condense(engine: Engine, is_stopping: Callable[[], bool] = lambda: False) -> Condensed:
    """Pack the texts of archived conversations, in small steps, until all are or *is_stopping* says so; what it came to,
    logged as ``archive.condensed``.

    Raises:
        Unavailable: the archive cannot be read or written now; the steps that were done stay done.
    """
    started = engine.monotonic()
    messages = bytes_before = bytes_after = 0
    after: str | None = ""
    try:
        while after is not None and not is_stopping():
            began_s = time.monotonic()
            step = engine.transcripts.read(partial(_step, after))
            messages += step.messages
            bytes_before += step.bytes_before
            bytes_after += step.bytes_after
            after = step.after
            time.sleep(min(PAUSE_S_MAX, time.monotonic() - began_s))
    finally:
        if messages:
            engine.log.info(
                "archive.condensed",
                messages=messages,
                bytes_before=bytes_before,
                bytes_after=bytes_after,
                duration_ms=round((engine.monotonic() - started) * 1000, 1),
            )
    return Condensed(messages, bytes_before, bytes_after)


def _step(after: str, archive: Archive) -> Condensed:
    return archive.condense(after)


def _remove_temporaries(engine: Engine) -> int:
    """Remove what a killed process left half written: we have the directory, so no other process is at work in it."""
    removed = 0
    with Directory(engine.settings.data_dir) as directory:
        for name in directory.names():
            found = _TEMPORARY.fullmatch(name)
            status = directory.stat(name)
            is_alone = status is not None and stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if found and int(found[1]) != os.getpid() and is_alone:
                directory.remove(name)
                removed += 1
        directory.sync()
    return removed


def _told(parts: dict[str, Usage]) -> dict[str, PartUsage]:
    return {name: PartUsage(usage.bytes, usage.files) for name, usage in parts.items()}
