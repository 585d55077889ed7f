"""Where one can go back to: a backup set, or any moment that the history reaches; and which seqs are states, not events.

``backups/restores.json`` keeps what the seqs alone do not tell: that a restored state took one, or that the directory was put
back from an older copy, so that from some event on the backups know of another history than the present's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import tzinfo
from pathlib import Path
from typing import NamedTuple

import msgspec

from holdfast.care.backup_set import BACKUPS, BackupSet, SetDamaged, list_sets
from holdfast.care.history import History, HistoryGap, at_of
from holdfast.care.rewind import journal_of
from holdfast.care.seal import AgeSeal
from holdfast.clock import format_ms, parse_ms
from holdfast.disk.files import Directory
from holdfast.disk.journal import JournalLine
from holdfast.disk.snapshot import (
    FORMAT_VERSION,
    MANIFEST,
    read_manifest,
)
from holdfast.errors import BadRequest, DataRefused, NotFound

LATEST = "latest"
"""In the place of a set's name: the newest one that can be read."""

_ANOTHER = "; nothing was changed: choose another (`holdfast backups`)"

RESTORES, RESTORES_MAX = "restores.json", 1_000
"""In ``backups/``: the seqs that restored states have, which no event has; and how many of them are known."""

_NAMES_SHOWN = 10


class Target(NamedTuple):
    """Where to go back to.

    Attributes:
        found: the set.
        seq: the last event of the state.
        at_ms: the moment, ms since 1970: the one that was asked for, or when the set was made.
        is_moment: whether a moment was asked for.
    """

    found: BackupSet
    seq: int
    at_ms: int
    is_moment: bool


def choose(
    data_dir: Path, seal: AgeSeal | None, *, name: str | None, at_ms: int | None, now_ms: int, history: History
) -> Target:
    """The set *name* (or ``latest``), or the moment *at_ms*, reached from the set *name* or the best one there is.

    Raises:
        NotFound: there is no such set, or none at all.
        BadRequest: the moment has not come yet, or lies before the oldest backup.
        SetDamaged, DataRefused: the set cannot be read, or is of a newer Holdfast.
        HistoryGap: what was at that moment cannot be told.
    """
    sets = list_sets(data_dir)
    if not sets:
        raise NotFound(f"no backup in {data_dir / BACKUPS}; make one with `holdfast backup`")
    # A machine that was set up anew has none of its own before those of the lost one are restored.
    strangers = [found for found in sets if found.is_foreign]
    sets = [found for found in sets if not found.is_foreign] or sets
    instead = _instead(strangers) if strangers and sets[0] not in strangers else ""
    named = None if name is None else _named(list_sets(data_dir) if name != LATEST else sets, name, instead)
    if at_ms is None:
        found = named if named is not None else _named(sets, LATEST, instead)
        manifest = found.manifest
        assert manifest is not None
        return Target(found, manifest.seq, parse_ms(manifest.at), False)
    if at_ms > now_ms:
        raise BadRequest(f"expected a moment that is over, found {format_ms(at_ms)}; now it is {format_ms(now_ms)}")
    if named is not None and named not in sets:
        raise BadRequest(
            f"backup {named.name} is of another data directory, whose moments are not reached from here: restore it as it "
            "is, without --at"
        )
    readable = [found for found in ([named] if named else sets) if found.manifest is not None]
    damage: SetDamaged | None = None
    for found in readable:
        assert found.manifest is not None
        if parse_ms(found.manifest.at) > at_ms or found.manifest.data_format > FORMAT_VERSION:
            continue
        try:
            last = _last_line(journal_of(found, seal))
        except SetDamaged as error:
            damage = damage or error
            continue
        if last is None or at_of(last.payload) <= at_ms:
            seq = history.seq_at(at_ms, found.manifest.seq)
            if (kept := left_at(data_dir, found, at_ms)) is not None:
                raise HistoryGap(kept + 1, found.manifest.seq)
            _check_next(data_dir, seq, at_ms, history, sets)
            return Target(found, seq, at_ms, True)
    if damage is not None:
        raise damage
    if not readable:
        raise SetDamaged(f"none of the {len(sets)} backups can be read: {sets[0].name}: {sets[0].damage}{instead}")
    oldest = min(parse_ms(found.manifest.at) for found in readable if found.manifest is not None)
    raise BadRequest(
        f"expected a moment from {format_ms(oldest + 1)} on, the oldest that a backup reaches, found {format_ms(at_ms)}"
    )


def left_at(data_dir: Path, found: BackupSet, at_ms: int | None = None) -> int | None:
    """The last event that the set *found* shares with the history that was there at *at_ms* (None: now), when it has more
    than that: the directory was put back from an older copy in between. None when it belongs to that history."""
    assert found.manifest is not None
    kept = [
        one.kept
        for one in _restored(data_dir)
        if one.kept is not None
        and one.kept < found.manifest.seq
        and found.manifest.at <= one.at
        and (at_ms is None or one.at <= format_ms(at_ms))
    ]
    return min(kept, default=None)


def note_put_back(data: Directory, kept: int, now_ms: int) -> None:
    """Keep that from now on other events follow the event *kept* than those that backups know of; errors as ``write_atomic``."""
    note_restored(data, Restored(0, format_ms(now_ms), "", kept))


def _check_next(data_dir: Path, seq: int, at_ms: int, history: History, sets: list[BackupSet]) -> None:
    """Refuse the moment *at_ms* behind the event *seq* when events may be missing that happened before it.

    Raises:
        HistoryGap: the next one is nowhere, though something later is known of; or it is no event, but a state that was
            restored before that moment.
    """
    parts = history.parts()
    restored = {one.seq: one.at for one in _restored(data_dir)}
    if any(part.first_seq <= seq + 1 <= part.last_seq for part in parts):
        return
    if seq + 1 in restored and restored[seq + 1] >= format_ms(at_ms):
        return
    later = [part.first_seq for part in parts if part.first_seq > seq]
    later += [one.manifest.seq + 1 for one in sets if one.manifest is not None and one.manifest.seq > seq]
    with suppress(ValueError, OSError), Directory(data_dir) as data:
        if (manifest := read_manifest(data, MANIFEST)) is not None and manifest.snapshot_seq > seq:
            later.append(manifest.snapshot_seq + 1)
    if later:
        raise HistoryGap(seq + 1, min(later) - 1)


def restored_seqs(data_dir: Path) -> set[int]:
    """The numbers that no event has, because a restored state took them."""
    return {one.seq for one in _restored(data_dir)}


def _restored(data_dir: Path) -> list[Restored]:
    try:
        with Directory(data_dir / BACKUPS) as backups:
            return msgspec.json.decode(backups.read(RESTORES), type=list[Restored])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return []


class Restored(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of ``restores.json``: which number was given to which state, and when; or that the data was put back from an
    older copy, whose last event was *kept*."""

    seq: int
    at: str
    source: str
    kept: int | None = None


def note_restored(data: Directory, noted: Restored) -> None:
    """Keep that *noted*; before the swap, since a number too many there does no harm."""
    with data.subdirectory(BACKUPS) as backups:
        known: list[Restored] = []
        with suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
            known = msgspec.json.decode(backups.read(RESTORES), type=list[Restored])
        lines = b",\n".join(msgspec.json.encode(one) for one in [*known, noted][-RESTORES_MAX:])
        backups.write_atomic(RESTORES, [b"[\n", lines, b"\n]\n"])


def _instead(strangers: list[BackupSet]) -> str:
    """What to say of the sets of another directory where none of ours can be read."""
    newest = strangers[0].name
    return f"; {newest}, which can be read, is of another data directory: restore it by its name if it is what you want"


def _named(sets: list[BackupSet], name: str, instead: str = "") -> BackupSet:
    """The set *name* of *sets*; where *latest* stands for none, *instead* says what there is besides."""
    if name == LATEST:
        found = next((one for one in sets if one.manifest is not None), sets[0])
    else:
        instead = ""
        by_name = {one.name: one for one in sets}
        if name not in by_name:
            names = list(by_name)
            shown = ", ".join(names[:_NAMES_SHOWN]) + (
                f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            )
            raise NotFound(f"no backup {name!a:.80}; there are {shown}")
        found = by_name[name]
    if found.manifest is None:
        raise SetDamaged(f"backup {found.name} cannot be read: {found.damage}{instead}{_ANOTHER}")
    if found.manifest.data_format > FORMAT_VERSION:
        raise DataRefused(
            f"backup {found.name} holds data of format {found.manifest.data_format}, this Holdfast knows "
            f"{FORMAT_VERSION}; install the newer version that wrote it"
        )
    return found


def _last_line(lines: Iterable[JournalLine]) -> JournalLine | None:
    last = None
    for line in lines:
        last = line
    return last


def moment_of(text: str, zone: tzinfo) -> int:
    """The moment in *text*, ISO 8601, without an offset in *zone*; ms since 1970.

    Raises:
        BadRequest: it is none.
    """
    try:
        return parse_ms(text, zone)
    except (TypeError, ValueError, OverflowError):
        raise BadRequest(f"expected a time in ISO 8601 such as 2026-11-21T14:03:00Z, found {text!a:.80}") from None


@contextmanager
def naming_another() -> Iterator[None]:
    """Says of a set that cannot be restored what to do."""
    try:
        yield
    except SetDamaged as error:
        raise SetDamaged(error.detail.removesuffix(_ANOTHER) + _ANOTHER) from error
