"""Bringing a data directory of an older format to the present one, and saying which older Holdfast could go back to it.

A step writes what is new beside what is there, and the swap of ``swap.py`` puts it in place at once: whatever is killed
when, the directory is of the old format or of the new one. Before the first step there is a backup, proved by loading it.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_file import HEADER_BYTES, schema_version
from holdfast.care import swap
from holdfast.care.backup_set import BackupSet, own_sets, read_set
from holdfast.care.backup_stopped import back_up_stopped
from holdfast.care.history import JOURNAL, History
from holdfast.care.set_writer import digest_of, read_pieces
from holdfast.care.swap import STAGING, Intent
from holdfast.clock import format_ms
from holdfast.core.event import decode_event
from holdfast.disk.files import Directory
from holdfast.disk.journal import read_history
from holdfast.disk.snapshot import (
    FORMAT_VERSION,
    MANIFEST,
    MANIFEST_NEXT,
    FileEntry,
    Manifest,
    encode_manifest,
    read_manifest,
)
from holdfast.errors import DataRefused, NotFound
from holdfast.settings import Settings

REASON = "migration"
"""Of the backup before it."""

_VERSION_AT = slice(60, 64)
"""In the header of a SQLite file: the version of its schema."""


class Changed(NamedTuple):
    """What a step made.

    Attributes:
        manifest: of the new format, but for the number itself.
        staged: names that it wrote into the staging directory, to take their places in the data directory.
        removed: names that go.
    """

    manifest: Manifest
    staged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


class Step(NamedTuple):
    """From one format to the next.

    Attributes:
        to: the format it brings, from the one before.
        about: what it does, in words.
        run: is given the data directory, which it only reads; the staging directory, into which it writes, durably; and
            whom to tell how far it is.
    """

    to: int
    about: str
    run: Callable[[Directory, Directory, Callable[[str], None]], Changed]


STEPS: tuple[Step, ...] = ()
"""Every step there was, oldest first. None yet: directories of every version so far are of format 1."""


class Release(NamedTuple):
    """What a version can open.

    Attributes:
        format: of the data directory, at most.
        archive_schema: of the archive, at most; 0 when it keeps none, and does not look at it.
        ops: that may stand in the journal.
    """

    format: int
    archive_schema: int
    ops: frozenset[str]


_CORE_OPS = frozenset(
    {
        "session.put",
        "session.patch",
        "session.touch",
        "session.delete",
        "session.expire",
        "session.lease",
        "session.release",
        "order.put",
        "order.patch",
        "order.complete",
        "order.cancel",
        "order.delete",
        "stats.order",
        "stats.completion",
        "user.put",
        "user.patch",
        "user.delete",
        "record.put",
        "record.patch",
        "record.delete",
        "batch",
    }
)

_CONVERSATION_OPS = frozenset(
    {
        "message.append",
        "message.expire",
        "conversation.put",
        "conversation.delete",
        "conversation.archive",
        "conversation.hold",
        "person.hold",
        "escalation.open",
    }
)

_CARE_OPS = frozenset({"order.take", "order.restore", "stats.take"})

RELEASES = {
    "0.1.0-core": Release(1, 0, _CORE_OPS),
    "0.1.0-connections": Release(1, 0, _CORE_OPS),
    "0.1.0-conversations": Release(1, 1, _CORE_OPS | _CONVERSATION_OPS),
    "0.1.0-backups": Release(1, 2, _CORE_OPS | _CONVERSATION_OPS | _CARE_OPS),
}
"""What each version before this one can open, oldest first; written out, since what they know does not change any more.
``tests/formats/`` has a directory of each."""


class Situation(msgspec.Struct, frozen=True, kw_only=True):
    """How a directory stands to this version.

    Attributes:
        format, newest_format: of the directory; the one this version writes. None: nothing was flushed yet.
        archive_schema, newest_archive_schema: likewise; None: there is no archive.
        written_by: the version that flushed it last.
        steps: what has to be done, in words; empty when nothing has.
    """

    format: int | None
    newest_format: int
    archive_schema: int | None
    newest_archive_schema: int
    written_by: str
    steps: list[str]


def look(data: Directory, steps: Sequence[Step] = STEPS) -> Situation:
    """What bringing the directory *data* to the present format would take; nothing is changed.

    Raises:
        DataRefused: a newer Holdfast wrote it, its format cannot be told, or there is no way from its format to ours.
    """
    manifest = _manifest_of(data)
    present = None if manifest is None else manifest.format
    schema = _archive_schema(data)
    if manifest is None and steps and data.stat(MANIFEST) is not None:
        raise DataRefused(
            f"{data.path / MANIFEST} is damaged, so its format is not known; restore the newest backup. Nothing was touched"
        )
    wanted = [] if present is None else _path_of(data, present, steps)
    texts = [f"format {step.to}: {step.about}" for step in wanted]
    if schema is not None and 0 < schema < schema_version():
        texts.append(f"archive schema {schema} to {schema_version()}")
    return Situation(
        format=present,
        newest_format=FORMAT_VERSION,
        archive_schema=schema,
        newest_archive_schema=schema_version(),
        written_by="" if manifest is None else manifest.holdfast,
        steps=texts,
    )


def bring_up(
    settings: Settings,
    data: Directory,
    log: Any,
    *,
    progress: Callable[[str], None] = lambda text: None,
    cancelled: threading.Event | None = None,
    steps: Sequence[Step] = STEPS,
) -> Situation:
    """Bring *data*, the directory of *settings*, to the present format; under its lock, before anything is loaded.

    A backup comes first, unless an earlier try has made it. The schema of the archive is brought up by whoever opens it next,
    in one transaction. What it was like before is returned.

    Raises:
        DataRefused: as ``look``; or the backup cannot be loaded. Nothing was touched.
        StorageFull, OSError: no room for the backup, or for what is new; the directory is as it was.
        Unavailable: *cancelled*.
    """
    situation = look(data, steps)
    if not situation.steps:
        return situation
    started = time.monotonic()
    swap.discard(data)
    if situation.format is not None and situation.format < FORMAT_VERSION:
        _settle(data)
    backup = _back_up(settings, data, log, progress, cancelled)
    if situation.format is not None:
        for step in _path_of(data, situation.format, steps):
            progress(f"migrating to format {step.to}: {step.about}")
            _take(data, step, progress)
    log.info(
        "data.migrated",
        from_format=situation.format,
        to_format=situation.newest_format,
        steps=situation.steps,
        backup=backup.name,
        duration_ms=round((time.monotonic() - started) * 1000, 1),
    )
    return situation


def _settle(data: Directory) -> None:
    """Have the manifest say what the snapshot files are, also after a flush that was broken off; refuse what is damaged.

    A step could not tell damage from what it does not know.
    """
    manifest = _manifest_of(data)
    assert manifest is not None, "its format was read"
    try:
        following = read_manifest(data, MANIFEST_NEXT)
    except (ValueError, OSError):
        following = None
    moved: dict[str, FileEntry] = {}
    for name, entry in manifest.files.items():
        try:
            checksum = digest_of(read_pieces(data, name)).crc32
        except OSError as error:
            raise _unfit(data, name, error.strerror or str(error)) from error
        later = following.files.get(name) if following is not None else None
        if checksum == entry.crc32:
            continue
        if later is None or checksum != later.crc32:
            raise _unfit(data, name, "it was edited or damaged")
        moved[name] = later
    if moved:
        settled = msgspec.structs.replace(manifest, files=manifest.files | moved)
        data.write_atomic(MANIFEST, [encode_manifest(settled)])


def _unfit(data: Directory, name: str, reason: str) -> DataRefused:
    return DataRefused(
        f"{data.path / name} cannot be migrated: {reason}; start and stop the version that wrote it once, or restore a "
        "backup. Nothing was touched"
    )


def _take(data: Directory, step: Step, progress: Callable[[str], None]) -> None:
    with data.subdirectory(STAGING) as staging:
        changed = step.run(data, staging, progress)
        manifest = msgspec.structs.replace(changed.manifest, format=step.to)
        staging.write_atomic(MANIFEST, [encode_manifest(manifest)])
        staging.sync()
    intent = Intent(
        source=f"migration to format {step.to}",
        at=format_ms(time.time_ns() // 1_000_000),
        seq=manifest.snapshot_seq,
        staged=(*changed.staged, MANIFEST),
        # What a flush left of the old format means nothing in the new one.
        removed=(*changed.removed, MANIFEST_NEXT),
    )
    swap.decide(data, intent)
    swap.complete(data)


def _back_up(
    settings: Settings,
    data: Directory,
    log: Any,
    progress: Callable[[str], None],
    cancelled: threading.Event | None,
) -> BackupSet:
    """The backup from which one could go back, made now or by an earlier try that was broken off."""
    present = _manifest_of(data)
    last_seq = max([part.last_seq for part in History(data.path).parts() if not part.is_packed], default=0)
    for found in own_sets(data.path)[:1]:
        made = found.manifest
        if (
            made is not None
            and found.is_proved
            and made.reason == REASON
            and made.data_format == (present or Manifest()).format
            and made.seq >= max(last_seq, (present or Manifest()).snapshot_seq)
        ):
            return found
    progress("taking a backup before the migration")
    found = read_set(back_up_stopped(settings, REASON, log, progress, cancelled=cancelled).path)
    if not found.is_proved:
        reason = found.proof.reason if found.proof is not None else "it could not be tried"
        raise DataRefused(
            f"the backup before the migration could not be proved: {reason}; run `holdfast verify`. "
            "Nothing else was touched"
        )
    return found


def _path_of(data: Directory, present: int, steps: Sequence[Step]) -> list[Step]:
    wanted = sorted((step for step in steps if step.to > present), key=lambda step: step.to)
    if [step.to for step in wanted] != list(range(present + 1, FORMAT_VERSION + 1)):
        raise DataRefused(
            f"{data.path} has format {present}, from which this Holdfast knows no way to {FORMAT_VERSION}; "
            "install a version in between first. Nothing was touched"
        )
    return wanted


def _manifest_of(data: Directory) -> Manifest | None:
    """The manifest; None when there is none that can be read. Raises DataRefused when a newer Holdfast wrote it."""
    try:
        return read_manifest(data, MANIFEST)
    except (ValueError, OSError):
        return None


def _archive_schema(data: Directory) -> int | None:
    found = data.stat(ARCHIVE)
    if found is None or not stat.S_ISREG(found.st_mode):
        return None
    try:
        return int.from_bytes(data.read_head(ARCHIVE, HEADER_BYTES)[_VERSION_AT])
    except OSError:
        return None


# Going back.


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """Why an older version could not open a directory as it is.

    Attributes:
        found: what it would meet.
        action: what makes it go away.
    """

    found: str
    action: str


class DowngradeReport(msgspec.Struct, frozen=True, kw_only=True):
    """Whether an older version could open a directory.

    Attributes:
        to: that version, or the number of a format.
        backups: names of backups that it could restore, newest first.
    """

    to: str
    obstacles: list[Obstacle]
    backups: list[str]


def check_downgrade(data_dir: Path, to: str, releases: dict[str, Release] = RELEASES) -> DowngradeReport:
    """Whether the version or format *to* could open *data_dir*, running or stopped; nothing is changed.

    Raises:
        NotFound: there is no such version or format.
        DataRefused: the directory cannot be read, or a newer Holdfast wrote it.
    """
    release = _release(to, releases)
    try:
        with Directory(data_dir) as data:
            obstacles = _obstacles(data, release)
    except OSError as error:
        raise DataRefused(f"{data_dir} cannot be read: {error.strerror}; name the data directory") from error
    backups = [
        found.name
        for found in own_sets(data_dir)
        if found.is_proved and found.manifest is not None and found.manifest.data_format <= release.format
    ]
    return DowngradeReport(to=to, obstacles=obstacles, backups=backups)


def _release(to: str, releases: dict[str, Release]) -> Release:
    if to in releases:
        return releases[to]
    if to.isascii() and to.isdigit() and len(to) < 9:
        formats = [release for release in releases.values() if release.format == int(to)]
        if formats:
            return formats[-1]
    known = ", ".join(releases)
    numbers = ", ".join(sorted({str(release.format) for release in releases.values()}))
    raise NotFound(f"no version or format {to!a:.40}; versions are {known}, formats {numbers}")


def _obstacles(data: Directory, release: Release) -> list[Obstacle]:
    found: list[Obstacle] = []
    manifest = _manifest_of(data)
    go_back = "restore a backup from before the migration, or `holdfast export` here and `holdfast import` there"
    if manifest is not None and manifest.format > release.format:
        found.append(Obstacle(found=f"format {manifest.format}, it knows {release.format}", action=go_back))
    schema = _archive_schema(data)
    if schema and release.archive_schema and schema > release.archive_schema:
        found.append(Obstacle(found=f"archive schema {schema}, it knows {release.archive_schema}", action=go_back))
    if schema and not release.archive_schema:
        found.append(Obstacle(found="an archive; it keeps no conversations and would ignore them", action=go_back))
    if data.stat(swap.INTENT) is not None:
        found.append(Obstacle(found="a restore that was broken off", action="start this version once, and stop it"))
    unknown = sorted(_ops_in(data, 0 if manifest is None else manifest.snapshot_seq) - release.ops)
    if unknown:
        found.append(
            Obstacle(
                found=f"events in the journal that it does not know: {', '.join(unknown)}",
                action="flush (`holdfast flush`) and stop this version; then the snapshots hold them",
            )
        )
    return found


def _ops_in(data: Directory, after_seq: int) -> set[str]:
    """The ops behind *after_seq* in the journal, those in batches as well."""
    if data.stat(JOURNAL) is None:
        return set()
    with data.subdirectory(JOURNAL) as journal:
        lines = read_history(journal, after_seq).lines
    ops: set[str] = set()
    for line in lines:
        if line.seq <= after_seq:
            continue
        try:
            event = decode_event(line.payload)
        except (msgspec.DecodeError, ValueError):
            continue
        ops |= {one.op for one in (event, *(event.events or ()))}
    return ops
