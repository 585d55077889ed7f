"""What goes into a backup set, of a directory in use and of a stopped one; and the names that sets have."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from holdfast import __version__
from holdfast.archive.base import ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_file import copy_stopped, totals_of
from holdfast.care.backup_set import (
    SET_NAME,
    BackupSet,
    SetManifest,
    list_sets,
    note_lineage,
)
from holdfast.care.history import JOURNAL, History, HistoryGap
from holdfast.care.packer import Wanted, add_files
from holdfast.care.prover import shown
from holdfast.care.rotation import is_good
from holdfast.care.set_writer import SetWriter, read_pieces
from holdfast.checksum import crc32
from holdfast.clock import format_ms, parse_ms
from holdfast.core.sales import decode_sales
from holdfast.disk.files import Directory
from holdfast.disk.journal import encode_line, segment_name
from holdfast.disk.snapshot import MANIFEST, MANIFEST_NEXT, FileEntry, Manifest, encode_manifest, read_manifest, salvage
from holdfast.errors import StorageFull
from holdfast.flush import FILE_OF, SALES_FILE
from holdfast.settings import Settings

SETTINGS_FILE, TOKENS_FILE = "settings.json", "tokens.json"
DAYS, MESSAGES = "days", "messages"

_LINES_AT_ONCE = 500
_COLLECTION_IN = {file: name for name, file in FILE_OF.items()}
_NOT_SNAPSHOTS = frozenset({MANIFEST, MANIFEST_NEXT, TOKENS_FILE, "restore.json", "_mirror.json"})


class Made(NamedTuple):
    """A set that was just written.

    Attributes:
        found: it.
        new_bytes: what it takes of the disk beyond what it shares with the set before.
        notes: what could not be had, and so is not in it.
    """

    found: BackupSet
    new_bytes: int
    notes: list[str]


def finished(
    writer: SetWriter,
    notes: list[str],
    manifest: Manifest,
    *,
    at: str,
    reason: str,
    reached: int,
    archived_seq: int | None,
    counts: dict[str, int],
) -> Made:
    """The set that *writer* has all files of.

    Args:
        notes: what could not be had.
        manifest: of the snapshots in it, taken *at*.
        reached: everything up to here is in it; *archived_seq* is where its archive stands, None without one.
        counts: records by collection.
    """
    snapshot_seq = manifest.snapshot_seq
    found = writer.finish(
        SetManifest(
            data_format=manifest.format,
            holdfast=__version__,
            at=at,
            reason=reason,
            seq=max(snapshot_seq, reached),
            snapshot_seq=snapshot_seq,
            lineage=manifest.lineage,
            archived_seq=snapshot_seq if archived_seq is None else archived_seq,
            counts=counts,
        )
    )
    with suppress(OSError, StorageFull), Directory(found.path.parent) as backups:
        note_lineage(backups, manifest.lineage)
    return Made(found, writer.new_bytes, notes)


def link_snapshots(manifest: Manifest, data: Directory, writer: SetWriter) -> Manifest:
    """Link the files of *manifest*, which nobody replaces meanwhile, into the set that is written; gives *manifest*."""
    for name in manifest.files:
        if data.stat(name) is not None:
            writer.directory.remove(name)
            data.keep_link(name, writer.directory)
    return manifest


def add_snapshots(
    writer: SetWriter, manifest: Manifest, settings: Settings, cancelled: threading.Event
) -> tuple[dict[str, int], list[str]]:
    """Take the linked files into the set; their counts, and the names of those that are not what they should be."""
    counts: dict[str, int] = {}
    wanted, changed = [], []
    for name, entry in manifest.files.items():
        if writer.directory.stat(name) is None:
            changed.append(name)
            continue
        if name == SALES_FILE:
            with suppress(ValueError, msgspec.DecodeError):
                counts[DAYS] = len(decode_sales(writer.directory.read(name)).days)
        else:
            counts[_collection_of(name)] = entry.records
        wanted.append(Wanted("snapshot", name, entry.records))
    for name, digest in add_files(writer, wanted, settings, cancelled).items():
        entry = manifest.files[name]
        if (digest.bytes, digest.crc32) != (entry.bytes, entry.crc32):
            changed.append(name)
    return counts, changed


def _collection_of(file: str) -> str:
    return _COLLECTION_IN.get(file, file.removesuffix(".json"))


def settled_manifest(data: Directory, notes: list[str]) -> Manifest:
    """The manifest of a stopped directory, with what an interrupted flush moved into place."""
    found: list[Manifest] = []
    for name in (MANIFEST, MANIFEST_NEXT):
        try:
            manifest = read_manifest(data, name)
        except (ValueError, OSError) as error:
            notes.append(f"{name} is damaged ({error})")
            manifest = None
        if manifest is not None:
            found.append(manifest)
        elif name == MANIFEST:
            found.append(Manifest())
    settled, following = found[0], found[1:]
    files: dict[str, FileEntry] = {}
    for name in {**settled.files, **{name: entry for one in following for name, entry in one.files.items()}}:
        status = data.stat(name)
        for one in found:
            entry = one.files.get(name)
            if entry is not None and status is not None and status.st_size == entry.bytes:
                with suppress(OSError):
                    if f"{_crc_of(data, name):08x}" == entry.crc32:
                        files[name] = entry
                        break
        else:
            if name in settled.files:
                notes.append(f"{name} is not as it was left: edited, damaged or missing")
    return msgspec.structs.replace(settled, files=files)


def _crc_of(data: Directory, name: str) -> int:
    checksum = 0
    for piece in read_pieces(data, name):
        checksum = crc32(piece, checksum)
    return checksum


def add_found(writer: SetWriter, data: Directory, manifest: Manifest, notes: list[str]) -> dict[str, int]:
    """Take every snapshot file of a stopped directory into the set; how many records each holds."""
    counts: dict[str, int] = {}
    for name in data.names():
        if not name.endswith(".json") or name.startswith(".") or name in _NOT_SNAPSHOTS:
            continue
        entry = manifest.files.get(name)
        try:
            raw = data.read(name) if entry is None or name == SALES_FILE else b""
        except OSError as error:
            notes.append(f"without {name}, which cannot be read: {error.strerror or error}")
            continue
        if name == SALES_FILE:
            try:
                counts[DAYS] = len(decode_sales(raw.removeprefix(b"\xef\xbb\xbf")).days)
            except (ValueError, msgspec.DecodeError) as error:
                notes.append(f"{name} is damaged ({error})")
            records = 0
        elif entry is None:
            read = salvage(raw)
            if not read.is_whole:
                notes.append(f"{name} is damaged ({read.reason}), and is in it as it is")
            records = counts[_collection_of(name)] = len(read.records)
        else:
            records = counts[_collection_of(name)] = entry.records
        data.keep_link(name, writer.directory)
        writer.add_file("snapshot", name, records)
    return counts


def copy_stopped_archive(writer: SetWriter, data: Directory, counts: dict[str, int], notes: list[str]) -> int | None:
    """Take the archive of a stopped directory into the set; where it stands, None when there is none that can be read."""
    if data.stat(ARCHIVE) is None:
        return None
    path = writer.directory.path / ARCHIVE
    try:
        archived_seq = copy_stopped(data.path / ARCHIVE, path)
        _, messages = totals_of(path)
    except (ArchiveError, ArchiveDamaged) as error:
        with suppress(FileNotFoundError):
            path.unlink()
        notes.append(f"without the archive ({error}), but with all events that the journal has for it")
        return None
    counts[MESSAGES] = messages
    writer.add_file("archive", ARCHIVE, messages)
    return archived_seq


def add_journal(
    writer: SetWriter,
    history: History,
    snapshot_seq: int,
    archived_seq: int | None,
    notes: list[str],
    *,
    up_to_seq: int = 0,
) -> int:
    """Take the events between snapshots and archive into the set, or without an archive all that the journal has for one;
    the seq up to which everything is in it."""
    if archived_seq is None:
        parts = [part for part in history.parts() if not part.is_packed]
        low = min([part.first_seq - 1 for part in parts if part.first_seq <= snapshot_seq + 1], default=snapshot_seq)
        high = max(snapshot_seq, up_to_seq)
    else:
        low, high = min(snapshot_seq, archived_seq), max(snapshot_seq, archived_seq, up_to_seq)
    if low >= high:
        return high
    reached = low
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal reached, count
        position = low
        while position < high:
            batch: list[bytes] = []
            try:
                for line in history.lines(position, high):
                    batch.append(encode_line(line.payload))
                    position = reached = line.seq
                    count += 1
                    if len(batch) >= _LINES_AT_ONCE:
                        yield b"".join(batch)
                        batch = []
            except HistoryGap as gap:
                notes.append(f"without events {gap.first} to {gap.last}, which cannot be read")
                position = gap.last
            yield b"".join(batch)

    first = segment_name(low + 1)
    writer.add("journal", f"journal/{first}", lines(), lambda: count)
    return max(reached, snapshot_seq, archived_seq or 0)


def add_rest(writer: SetWriter, data: Directory, manifest: Manifest, settings: Settings) -> None:
    """Take the *manifest*, the *settings* in use and the hashes of tokens into the set."""
    writer.add("manifest", MANIFEST, [encode_manifest(manifest)])
    raw = msgspec.json.format(msgspec.json.encode(shown(settings)), indent=2) + b"\n"
    writer.add("settings", SETTINGS_FILE, [raw])
    with suppress(OSError):
        writer.add("tokens", TOKENS_FILE, [data.read(TOKENS_FILE)])


def newest_good(data_dir: Path) -> BackupSet | None:
    """The set whose files are shared with the next one."""
    return next((found for found in list_sets(data_dir) if is_good(found)), None)


def new_name(data_dir: Path, now_ms: int) -> str:
    """A name for a set taken now: above all that are there, also when the clock was set back."""
    taken = list_sets(data_dir)
    for found in taken:
        with suppress(ValueError):
            if found.manifest is not None:
                now_ms = max(now_ms, _ms_of(found.name) + 1)
    name = format_ms(now_ms).replace(":", "")
    while any(found.name == name for found in taken):
        now_ms += 1
        name = format_ms(now_ms).replace(":", "")
    assert SET_NAME.fullmatch(name)
    return name


def _ms_of(name: str) -> int:
    day, _, time = name.partition("T")
    return parse_ms(f"{day}T{time[:2]}:{time[2:4]}:{time[4:]}")


def remove_half_made(backups: Directory) -> None:
    """Remove what a killed process left: sets, parts of the history, and files such as ``restores.json``. Under the lock."""
    for name in backups.temporaries():
        found = backups.stat(name)
        if found is not None and stat.S_ISDIR(found.st_mode):
            backups.remove_tree(name)
        else:
            backups.remove(name)
    if backups.stat(JOURNAL) is not None:
        with backups.subdirectory(JOURNAL) as packed:
            packed.remove_stale_temporaries()


def remove_set(backups: Directory, name: str) -> None:
    """Remove the set *name*: at no moment is there a part of it under the name of a set."""
    gone = f".{name}.0.tmp"
    if backups.stat(gone) is not None:
        backups.remove_tree(gone)
    backups.rename(name, gone)
    backups.sync()
    backups.remove_tree(gone)
