"""A backup set: a directory in ``backups/`` with everything at one seq, and how it is read.

::

    backups/2026-11-21T140300.123Z/
      set.json                    what is in it, with SHA-256 and counts; without it, it is no set
      proof.json                  whether everything could be loaded from it, and when that was tried last
      manifest.json.zst           the data directory's manifest as of the snapshots
      chat_sessions.json.zst …    every snapshot file
      archive.db.zst              the archive
      00000000000000000042.jsonl.zst   the events between snapshots and archive
      settings.json.zst, tokens.json.zst

A set is read only. Its files may be hard links to those of an earlier set; an encrypted one has ``.age`` behind ``.zst``.
What stands in it lies flat, so that copying and removing it needs nothing but a list of names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from holdfast.care.packing import PACKED, SEALED, Seal, Unreadable, seal_for, unpack
from holdfast.care.signed import encode_signed, indented, is_whole
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import MANIFEST, MANIFEST_NEXT, Manifest, read_manifest
from holdfast.errors import DataRefused

SET_FORMAT = 1
"""Of a set; a newer one is refused."""

BACKUPS = "backups"
"""The directory of the sets, within the data directory."""

SET_FILE, PROOF_FILE, LINEAGE_FILE = "set.json", "proof.json", "lineage.json"
SET_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d{6}\.\d{3}Z")
"""The time of a set without colons; everything else in ``backups/`` is kept evidence (``start-…``, ``edited-…``) or half made."""

READ_BYTES = 1 << 20

_STORED_NAME = re.compile(r"[^./\0][^/\0]*")
_NAME = re.compile(rf"(?:journal/)?{_STORED_NAME.pattern}")

Kind = Literal["manifest", "snapshot", "journal", "archive", "settings", "tokens"]


class StoredFile(msgspec.Struct, frozen=True):
    """One file of a set.

    Attributes:
        kind: what it is of.
        stored: its name in the set.
        stored_bytes, stored_sha256: of the file as it stands there.
        bytes, sha256: of its content, unpacked.
        records: of a snapshot or archive how many, of a journal its events; else 0.
    """

    kind: Kind
    stored: str
    stored_bytes: int
    stored_sha256: str
    bytes: int
    sha256: str
    records: int = 0


class SetManifest(msgspec.Struct, frozen=True):
    """What ``set.json`` says.

    Attributes:
        format: of the set; *data_format* of the data directory in it.
        holdfast: version of the program that wrote it.
        at: when the snapshots were taken, ISO 8601.
        reason: why it was made: daily, api, command, restore, import, migration, upgrade, mend.
        seq: everything up to here is in it, and nothing beyond.
        snapshot_seq, archived_seq: where its snapshots and its archive stand; the journal in it has what lies between.
        lineage: of the data directory in it; empty in sets of early versions.
        encrypted: whether its files are.
        counts: records by collection, ``messages``, and ``days`` of sales, as its snapshots and its archive have them; the
            events in its journal are not in these.
        files: by their name in the data directory; those of the journal as ``journal/NAME``.
        checksum: SHA-256 of the file with nothing in this place.
    """

    format: int = SET_FORMAT
    data_format: int = 0
    holdfast: str = ""
    at: str = ""
    reason: str = ""
    seq: int = 0
    snapshot_seq: int = 0
    archived_seq: int = 0
    lineage: str = ""
    encrypted: bool = False
    counts: dict[str, int] = {}
    files: dict[str, StoredFile] = {}
    checksum: str = ""


class Proof(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ``proof.json`` says: the outcome of loading everything from a set.

    Attributes:
        at: when, ISO 8601.
        ok: whether all of it was there and right.
        reason: what was wrong; empty when nothing was.
        duration_ms: how long it took.
        counts: what was found, as in the set's own counts.
    """

    at: str
    ok: bool
    reason: str = ""
    duration_ms: float = 0.0
    counts: dict[str, int] = {}


class SetDamaged(DataRefused):
    """A set, or a file of it, is not what it should be; the text says what."""


class BackupSet(NamedTuple):
    """A set on the disk.

    Attributes:
        path: its directory; the last part is its name.
        manifest: None when it cannot be read.
        damage: why it cannot; empty when it can.
        proof: None when it was never proved.
        is_foreign: it is of another data directory, whose seqs mean something else: somebody has laid it there, and it is
            used for what names it only.
        is_newer: a newer Holdfast wrote it, which will know what to do with it.
    """

    path: Path
    manifest: SetManifest | None
    damage: str
    proof: Proof | None
    is_foreign: bool = False
    is_newer: bool = False

    @property
    def name(self) -> str:
        """Its name: the time it was made."""
        return self.path.name

    @property
    def is_proved(self) -> bool:
        """Whether all of it was loaded from it, the last time that was tried."""
        return self.manifest is not None and self.proof is not None and self.proof.ok

    @property
    def stored_bytes(self) -> int:
        """Size of its files, those shared with other sets as well."""
        return 0 if self.manifest is None else sum(file.stored_bytes for file in self.manifest.files.values())


def lineage_of(data_dir: Path) -> str:
    """The lineage of the directory *data_dir*; empty when nothing there tells."""
    for name in (MANIFEST, MANIFEST_NEXT):
        with suppress(DataRefused, ValueError, OSError), Directory(data_dir) as data:
            if (manifest := read_manifest(data, name)) is not None and manifest.lineage:
                return manifest.lineage
    return noted_lineage(data_dir)


def noted_lineage(data_dir: Path) -> str:
    """What ``note_lineage`` has kept for the case that no manifest can be read; empty when it has not."""
    with suppress(OSError, msgspec.DecodeError), Directory(data_dir / BACKUPS) as backups:
        return msgspec.json.decode(backups.read(LINEAGE_FILE), type=dict[str, str]).get("lineage", "")
    return ""


def note_lineage(backups: Directory, lineage: str) -> None:
    """Keep beside the sets in *backups* which of them are ours; errors as ``Directory.write_atomic``."""
    if lineage and noted_lineage(backups.path.parent) != lineage:
        backups.write_atomic(LINEAGE_FILE, [msgspec.json.encode({"lineage": lineage}), b"\n"])


def list_sets(data_dir: Path) -> list[BackupSet]:
    """The sets of the directory *data_dir*, newest first; those that cannot be read say why."""
    sets = list_sets_in(data_dir / BACKUPS)
    return marked(sets, lineage_of(data_dir)) if sets else []


def own_sets(data_dir: Path) -> list[BackupSet]:
    """Those of ``list_sets`` that can be read and are of this directory."""
    return [found for found in list_sets(data_dir) if found.manifest is not None and not found.is_foreign]


def marked(sets: Iterable[BackupSet], lineage: str) -> list[BackupSet]:
    """The *sets* as seen by the directory of that *lineage*; what is of none, or seen by none, is no stranger."""
    return [
        found._replace(
            is_foreign=bool(lineage and found.manifest and found.manifest.lineage not in ("", lineage)),
        )
        for found in sets
    ]


def list_sets_in(place: Path) -> list[BackupSet]:
    """As ``list_sets``, of any directory that holds sets, such as the second copy."""
    try:
        names = os.listdir(place)
    except OSError:
        return []
    # Links lead out of here, and sets are written to: their proofs.
    ours = [place / name for name in names if SET_NAME.fullmatch(name) and not (place / name).is_symlink()]
    return [read_set(path) for path in sorted(ours, reverse=True)]


def read_set(path: Path) -> BackupSet:
    """The set in the directory *path*, whatever state it is in; its files are not looked at."""
    try:
        with Directory(path) as directory:
            proof = _read_proof(directory)
            try:
                return BackupSet(path, decode_set_manifest(directory.read(SET_FILE)), "", proof)
            except (OSError, ValueError) as error:
                return BackupSet(path, None, f"{SET_FILE}: {getattr(error, 'strerror', None) or error}", proof)
            except DataRefused as error:
                return BackupSet(path, None, str(error), proof, is_newer=True)
    except OSError as error:
        return BackupSet(path, None, error.strerror or str(error), None)


def encode_set_manifest(manifest: SetManifest) -> bytes:
    """Its JSON, indented for people."""
    return encode_signed(manifest)


def decode_set_manifest(raw: bytes) -> SetManifest:
    """What ``encode_set_manifest`` made.

    Raises:
        DataRefused: a newer Holdfast wrote it.
        ValueError: it is damaged.
    """
    try:
        layout = msgspec.json.decode(raw, type=dict[str, Any]).get("format")
        if isinstance(layout, int) and layout > SET_FORMAT:
            raise DataRefused(
                f"it has format {layout}, this Holdfast knows {SET_FORMAT}; install the version that wrote it"
            )
        manifest = msgspec.json.decode(raw, type=SetManifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not the manifest of a set: {error}") from None
    if not is_whole(raw):
        raise ValueError("its checksum does not hold")
    for name, file in manifest.files.items():
        # A set may come from elsewhere, and these become paths.
        if not (_NAME.fullmatch(name) and _STORED_NAME.fullmatch(file.stored)):
            raise ValueError(f"it names a file that no set has: {name!r:.80}, {file.stored!r:.80}")
    return manifest


def write_proof(path: Path, proof: Proof) -> None:
    """Note in the set *path* how proving it went; errors as ``Directory.write_atomic``."""
    with Directory(path) as directory:
        directory.write_atomic(PROOF_FILE, [indented(proof)])


def decode_proof(raw: bytes) -> Proof | None:
    """What ``write_proof`` wrote; None when it cannot be read."""
    try:
        return msgspec.json.decode(raw, type=Proof)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def content_of(found: BackupSet, name: str, seal: Seal | None = None) -> Iterator[bytes]:
    """The content of the file *name* (its name in the data directory) of the set *found*, unpacked, in pieces.

    Raises:
        SetDamaged: it is not what the set says, was cut short, or is for another key. Told at the latest behind the last
            piece, so nothing may be concluded before the end.
    """
    assert found.manifest is not None, "a set that cannot be read has no files"
    stored = found.manifest.files.get(name)
    if stored is None:
        raise SetDamaged(f"backup {found.name} has no {name}; it has {', '.join(sorted(found.manifest.files))}")
    digest, size = hashlib.sha256(), 0
    try:
        with Directory(found.path) as directory, closing(_read(directory, stored)) as raw:
            for piece in unpack(raw, seal_for(stored.stored, seal)):
                digest.update(piece)
                size += len(piece)
                if size > stored.bytes:
                    break
                yield piece
    except Unreadable as error:
        raise SetDamaged(f"backup {found.name}: {stored.stored} cannot be unpacked: {error}") from error
    except OSError as error:
        raise SetDamaged(f"backup {found.name}: {stored.stored} cannot be read: {error.strerror or error}") from error
    if size != stored.bytes or digest.hexdigest() != stored.sha256:
        raise SetDamaged(f"backup {found.name}: {name} is not what was backed up; take an older backup")


def snapshot_manifest(found: BackupSet, seal: Seal | None = None) -> Manifest:
    """The manifest of the data directory in the set *found*, which says how its snapshots are read.

    Raises:
        SetDamaged: it cannot be read.
    """
    try:
        return msgspec.json.decode(b"".join(content_of(found, MANIFEST, seal)), type=Manifest)
    except msgspec.DecodeError as error:
        raise SetDamaged(f"backup {found.name}: {MANIFEST} cannot be read: {error}") from error


def extract(
    found: BackupSet,
    names: Iterable[str],
    into: Directory,
    seal: Seal | None = None,
    is_busy: Callable[[], bool] = lambda: False,
) -> None:
    """Lay the files *names* of the set *found* out in *into*, durably; those of the journal in ``journal/`` there.

    Raises:
        SetDamaged: as ``content_of``; that file and those behind it are not there.
        StorageFull, OSError: likewise.
    """
    for name in names:
        place, _, last = name.rpartition("/")
        if place:
            with into.subdirectory(place) as inner:
                inner.stage(last, content_of(found, name, seal), is_busy)
                inner.publish([last])
        else:
            into.stage(last, content_of(found, name, seal), is_busy)
            into.publish([last])


def stored_name(name: str, *, sealed: bool) -> str:
    """Under which name the file *name* of the data directory stands in a set."""
    return name.rpartition("/")[2] + PACKED + (SEALED if sealed else "")


def _read(directory: Directory, stored: StoredFile) -> Generator[bytes]:
    """The bytes of a file as it stands in the set; no more of them than there should be."""
    fd = directory.open_to_read(stored.stored)
    try:
        left = stored.stored_bytes
        while left > 0 and (piece := os.read(fd, min(left, READ_BYTES))):
            left -= len(piece)
            yield piece
        if left == 0 and os.read(fd, 1):
            raise Unreadable("it is longer than it should be")
    finally:
        os.close(fd)


def _read_proof(directory: Directory) -> Proof | None:
    try:
        return decode_proof(directory.read(PROOF_FILE))
    except OSError:
        return None
