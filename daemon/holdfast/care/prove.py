"""Proving a backup set: everything in it is really loaded, by the code of a start and of a restore."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from holdfast.archive.base import ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite import open_sqlite
from holdfast.care.backup_set import (
    PROOF_FILE,
    SET_FILE,
    BackupSet,
    Proof,
    SetDamaged,
    SetManifest,
    StoredFile,
    content_of,
    extract,
    snapshot_manifest,
)
from holdfast.care.packing import Seal
from holdfast.care.prover import settings_from
from holdfast.care.rewind import SALES, collection_in, journal_of, replay, state_of
from holdfast.care.set_writer import digest_of, read_pieces
from holdfast.clock import Clock, format_ms
from holdfast.core.state import State
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import FORMAT_VERSION, MANIFEST, Manifest, salvage
from holdfast.errors import DataRefused, SettingsError
from holdfast.settings import Settings, all_settings

SETTINGS_FILE = "settings.json"

DAYS, MESSAGES = "days", "messages"
"""Among the counts of a set: days of sales figures, messages in the archive."""


def prove(found: BackupSet, seal: Seal | None, scratch: Path) -> Proof:
    """Load everything from the set *found*, and say whether all of it was there and right; nothing of it is changed.

    Takes the memory of a start, and the room of the archive in *scratch*, which is a directory that may be removed with
    everything in it afterwards. An encrypted set that *seal* cannot open is judged by its checksums alone.

    Raises:
        StorageFull, OSError: *scratch* cannot be written, so nothing is known.
    """
    started = time.monotonic()
    counts: dict[str, int] = {}
    reason, is_ok = "", False
    try:
        if found.manifest is None:
            raise SetDamaged(f"{found.name} cannot be read: {found.damage}")
        _check_files(found, found.manifest)
        if found.manifest.encrypted and not getattr(seal, "can_open", seal is not None):
            reason = "encrypted, and there is no key here: its checksums hold, it was not loaded"
        elif MANIFEST in found.manifest.files and found.manifest.data_format < FORMAT_VERSION:
            _read_all(found, found.manifest, seal)
            reason = f"of format {found.manifest.data_format}: all of it can be read, and a restore migrates it"
        else:
            counts = _load(found, found.manifest, seal, scratch)
        is_ok = True
    except (SetDamaged, DataRefused, ArchiveDamaged, ArchiveError) as error:
        reason = str(error)
    duration_ms = round((time.monotonic() - started) * 1000, 1)
    return Proof(format_ms(Clock().now_ms()), is_ok, reason, duration_ms, counts)


def settings_in(found: BackupSet, seal: Seal | None = None) -> Settings:
    """The settings under which the set *found* was made, as far as this version knows them; defaults for the rest.

    Raises:
        SetDamaged: they cannot be read.
    """
    try:
        raw = msgspec.json.decode(b"".join(content_of(found, SETTINGS_FILE, seal)), type=dict[str, dict[str, str]])
        known = {name: one["value"] for name, one in raw.items() if name in all_settings()}
        return settings_from(known)
    except (msgspec.DecodeError, KeyError, SettingsError) as error:
        raise SetDamaged(f"backup {found.name}: {SETTINGS_FILE} cannot be read: {error}") from error


def _check_files(found: BackupSet, manifest: SetManifest) -> None:
    """Every file is there as it was written, and no other."""
    expected: dict[str, StoredFile] = {}
    for stored in manifest.files.values():
        if stored.stored in expected:
            raise SetDamaged(f"backup {found.name}: two files are said to be {stored.stored}")
        expected[stored.stored] = stored
    if MANIFEST not in manifest.files and manifest.data_format:
        raise SetDamaged(f"backup {found.name} has no {MANIFEST}")
    with Directory(found.path) as directory:
        names = set(directory.names()) - {SET_FILE, PROOF_FILE}
        odd = sorted(name for name in names - set(expected) if not name.startswith("."))
        if odd:
            raise SetDamaged(f"backup {found.name}: {odd[0]} does not belong to it; move it away")
        for name, stored in expected.items():
            try:
                digest = digest_of(read_pieces(directory, name))
            except OSError as error:
                raise SetDamaged(f"backup {found.name}: {name} cannot be read: {error.strerror or error}") from error
            if digest.bytes != stored.stored_bytes:
                raise SetDamaged(
                    f"backup {found.name}: {name} should have {stored.stored_bytes} bytes, it has {digest.bytes}; "
                    "take an older backup"
                )
            if digest.sha256 != stored.stored_sha256:
                raise SetDamaged(f"backup {found.name}: {name} was changed since it was written; take an older backup")


def _load(found: BackupSet, manifest: SetManifest, seal: Seal | None, scratch: Path) -> dict[str, int]:
    settings = settings_in(found, seal) if SETTINGS_FILE in manifest.files else Settings()
    snapshots = snapshot_manifest(found, seal) if MANIFEST in manifest.files else Manifest()
    _check_snapshots(found, manifest, snapshots, seal)
    # As of the snapshots, as the counts are; what lies between them and the archive comes on top.
    state = state_of(found, seal, settings, up_to_seq=manifest.snapshot_seq)
    counts = _counts_of(state, manifest)
    replay(state, (line for line in journal_of(found, seal) if state.seq < line.seq <= manifest.seq))
    reached = max(state.seq, manifest.archived_seq if ARCHIVE in manifest.files else 0)
    if reached != manifest.seq:
        raise SetDamaged(f"backup {found.name} goes to event {reached}, expected {manifest.seq}; take an older backup")
    del state
    if ARCHIVE in manifest.files:
        counts[MESSAGES] = _count_messages(found, manifest, seal, scratch)
    if counts != manifest.counts:
        wrong = sorted(name for name in {*counts, *manifest.counts} if counts.get(name) != manifest.counts.get(name))
        shown = ", ".join(f"{name}: {counts.get(name, 0)} of {manifest.counts.get(name, 0)}" for name in wrong)
        raise SetDamaged(f"backup {found.name} gives other counts than it should: {shown}; take an older backup")
    return counts


def _read_all(found: BackupSet, manifest: SetManifest, seal: Seal | None) -> None:
    """Each file is as it was when it was backed up, and each snapshot as it was flushed; what they mean is not looked at."""
    for name in manifest.files:
        for _ in content_of(found, name, seal):
            pass
    _check_snapshots(found, manifest, snapshot_manifest(found, seal), seal)


def _check_snapshots(found: BackupSet, manifest: SetManifest, snapshots: Manifest, seal: Seal | None) -> None:
    """Each snapshot is what the data directory's manifest said when it was taken, or a whole file of another program."""
    missing = sorted(name for name in snapshots.files if name not in manifest.files)
    if missing:
        raise SetDamaged(f"backup {found.name} has no {missing[0]}, which its {MANIFEST} names; take an older backup")
    for name, stored in manifest.files.items():
        if stored.kind != "snapshot":
            continue
        entry = snapshots.files.get(name)
        if entry is None:
            whole = salvage(b"".join(content_of(found, name, seal))) if collection_in(name) != SALES else None
            if whole is not None and not whole.is_whole:
                raise SetDamaged(f"backup {found.name}: {name} was damaged when it was taken: {whole.reason}")
        elif digest_of(content_of(found, name, seal)).crc32 != entry.crc32:
            raise SetDamaged(f"backup {found.name}: {name} was edited or damaged when it was taken")


def _counts_of(state: State, manifest: SetManifest) -> dict[str, int]:
    counts: dict[str, int] = {}
    for file, stored in manifest.files.items():
        name = collection_in(file) if stored.kind == "snapshot" else None
        if name == SALES:
            counts[DAYS] = len(state.sales.days)
        elif name is not None:
            counts[name] = len(state.retries.clients()) if name == "_retries" else state.collections[name].count
    return counts


def _count_messages(found: BackupSet, manifest: SetManifest, seal: Seal | None, scratch: Path) -> int:
    with Directory(scratch) as directory:
        extract(found, [ARCHIVE], directory, seal)
    path = scratch / ARCHIVE
    try:
        archive = open_sqlite(path)
        try:
            wrong = archive.check()
            if wrong:
                raise SetDamaged(f"backup {found.name}: {ARCHIVE} is damaged: {wrong[0]:.300}; take an older backup")
            if archive.archived_seq != manifest.archived_seq:
                raise SetDamaged(
                    f"backup {found.name}: {ARCHIVE} stands at event {archive.archived_seq}, "
                    f"expected {manifest.archived_seq}; take an older backup"
                )
            return archive.figures(Clock().now_ms()).messages
        finally:
            archive.close()
    finally:
        for name in os.listdir(scratch):
            if name.startswith(ARCHIVE):
                with suppress(OSError):
                    os.unlink(scratch / name)
