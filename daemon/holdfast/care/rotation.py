"""Which backup sets stay: the newest ones, a ladder of days, weeks and months, and what a moment is restored from."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from holdfast.archive.place import ARCHIVE
from holdfast.care.backup_set import BackupSet
from holdfast.clock import parse_ms
from holdfast.settings import BackupSettings

_FETCHED_MS = 24 * 3_600_000

_DAY, _WEEK, _MONTH = "%Y-%m-%d", "%G-%V", "%Y-%m"


def at_of(found: BackupSet) -> int:
    """When the set was taken, ms since 1970; 0 when it cannot be read."""
    try:
        return 0 if found.manifest is None else parse_ms(found.manifest.at)
    except ValueError:
        return 0


def is_good(found: BackupSet) -> bool:
    """Whether one may count on the set: it is ours and can be read, no proof of it has failed, and nothing could not be had."""
    manifest = found.manifest
    return (
        manifest is not None
        and not found.is_foreign
        and (found.proof is None or found.proof.ok)
        # Made while the archive could not be read: worth having, but no reason to let go of one with all messages.
        and (ARCHIVE in manifest.files or not manifest.counts.get("conversations"))
    )


def was_fetched_lately(found: BackupSet, now_ms: int) -> bool:
    """Whether an old set came here within a day, from the second place: somebody is about to restore it."""
    try:
        came_ms = found.path.stat().st_mtime * 1000
    except OSError:
        return False
    return came_ms - at_of(found) > _FETCHED_MS > now_ms - came_ms


def stale(sets: Sequence[BackupSet], wanted: BackupSettings, now_ms: int) -> list[BackupSet]:
    """Those of *sets* (newest first) that may go, oldest first.

    What always stays: the newest set that was proved; the newest proved one that is as old as ``pitr``, since every later
    moment is restored from it. A set that cannot be read or failed its proof counts for nothing, and goes when enough good
    ones are newer. Those from before restores are counted apart: whoever puts one record after the other back must not lose
    the sets that they come from. Sets of another directory, and of a newer Holdfast, are not ours to remove.
    """
    good = [found for found in sets if is_good(found)]
    before_restores = [found for found in good if found.manifest is not None and found.manifest.reason == "restore"]
    others = [found for found in good if found not in before_restores]
    kept = {found.name for some in (before_restores, others) for found in some[: wanted.keep]}
    for form, count in ((_DAY, wanted.keep_daily), (_WEEK, wanted.keep_weekly), (_MONTH, wanted.keep_monthly)):
        newest: dict[str, str] = {}
        for found in good:
            newest.setdefault(datetime.fromtimestamp(at_of(found) / 1000, UTC).strftime(form), found.name)
        kept |= set(list(newest.values())[:count])
    proved = [found for found in good if found.is_proved]
    kept |= {found.name for found in proved[:1]}
    base = base_of(sets, wanted.pitr, now_ms)
    if base is not None:
        kept.add(base.name)
    if len(good) < wanted.keep:
        kept |= {found.name for found in sets}
    else:
        last = good[wanted.keep - 1].name
        kept |= {found.name for found in sets if found.name > last}
    return [found for found in reversed(sets) if found.name not in kept and not found.is_foreign and not found.is_newer]


def base_of(sets: Sequence[BackupSet], pitr_s: float, now_ms: int) -> BackupSet | None:
    """The set from which every moment of the last *pitr_s* seconds can be restored, as far as there is one: the newest proved
    one that is so old, else the oldest good one. None with *pitr_s* 0, or without any."""
    if not pitr_s:
        return None
    oldest_ms = now_ms - round(pitr_s * 1000)
    old = [found for found in sets if found.is_proved and is_good(found) and at_of(found) <= oldest_ms]
    good = [found for found in sets if is_good(found)]
    return old[0] if old else good[-1] if good else None
