"""A set is read as it was written, or an error says what is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from holdfast.care.backup_set import (
    SET_FILE,
    BackupSet,
    Kind,
    Proof,
    SetDamaged,
    SetManifest,
    StoredFile,
    content_of,
    decode_set_manifest,
    encode_set_manifest,
    extract,
    list_sets,
    read_set,
    stored_name,
    write_proof,
)
from holdfast.care.packing import pack
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused

NAME = "2026-11-21T140300.123Z"
FILES: dict[str, tuple[Kind, bytes]] = {
    "chat_sessions.json": ("snapshot", b'[\n{"recipientPhone":"573001234567"}\n]\n' * 300),
    "journal/00000000000000000008.jsonl": ("journal", b"0f3a9c21 {}\n"),
    "archive.db": ("archive", b"SQLite format 3\0" * 1000),
}


def write_set(path: Path, **fields: object) -> SetManifest:
    """A set with FILES in the directory *path*."""
    path.mkdir(parents=True)
    files = {}
    for name, (kind, content) in FILES.items():
        packed = b"".join(pack([content]))
        stored = stored_name(name, sealed=False)
        (path / stored).write_bytes(packed)
        files[name] = StoredFile(kind, stored, len(packed), _sha256(packed), len(content), _sha256(content), 1)
    manifest = msgspec.structs.replace(SetManifest(seq=8, at="2026-11-21T14:03:00.123Z", files=files), **fields)
    (path / SET_FILE).write_bytes(encode_set_manifest(manifest))
    return manifest


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def found(tmp_path: Path) -> BackupSet:
    write_set(tmp_path / "backups" / NAME)
    return read_set(tmp_path / "backups" / NAME)


def test_sets_are_listed_newest_first(tmp_path: Path) -> None:
    """What else lies in the directory is no set: kept evidence, and what is half made."""
    backups = tmp_path / "backups"
    for name in ("2026-11-20T140300.000Z", NAME, "2025-01-01T000000.000Z"):
        write_set(backups / name)
    for name in ("start-2026-11-21T140300.123Z", f".{NAME}.7.tmp", "journal"):
        (backups / name).mkdir()

    assert [one.name for one in list_sets(tmp_path)] == [NAME, "2026-11-20T140300.000Z", "2025-01-01T000000.000Z"]
    assert list_sets(tmp_path / "missing") == []


def test_the_content_comes_back(found: BackupSet) -> None:
    """Byte for byte."""
    for name, (_, content) in FILES.items():
        assert content == b"".join(content_of(found, name))


def test_it_is_laid_out_as_in_a_data_directory(found: BackupSet, tmp_path: Path) -> None:
    """Those of the journal in its own directory."""
    into = tmp_path / "restored"
    into.mkdir()

    with Directory(into) as directory:
        extract(found, FILES, directory)

    assert {name: content for name, (_, content) in FILES.items()} == {
        str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()
    }


def test_every_changed_byte_of_the_manifest_is_noticed(found: BackupSet) -> None:
    """None of them gives a set that can be read."""
    raw = (found.path / SET_FILE).read_bytes()

    for index in range(len(raw)):
        changed = bytearray(raw)
        changed[index] ^= 0x01
        (found.path / SET_FILE).write_bytes(changed)
        again = read_set(found.path)
        assert again.manifest is None, index
        assert again.damage


def damages(stored: Path) -> Iterator[str]:
    """*stored* damaged in one way after the other; what each is called."""
    raw = stored.read_bytes()
    for index in range(0, len(raw), max(1, len(raw) // 50)):
        stored.write_bytes(raw[:index])
        yield f"cut at {index}"
        changed = bytearray(raw)
        changed[index] ^= 0x20
        stored.write_bytes(changed)
        yield f"byte {index} changed"
    stored.write_bytes(raw + b"\n")
    yield "longer"
    stored.unlink()
    yield "missing"
    stored.mkdir()
    yield "a directory"


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_noticed(found: BackupSet, name: str, tmp_path: Path) -> None:
    """Before anything is put in place; an error names the set and the file. What is damaged and gives the same is the same."""
    assert found.manifest is not None
    into = tmp_path / "restored"
    into.mkdir()
    stored = found.path / found.manifest.files[name].stored
    noticed = 0

    for damage in damages(stored):
        with Directory(into) as directory:
            try:
                extract(found, [name], directory)
            except SetDamaged as error:
                noticed += 1
                assert NAME in str(error) and stored.name.removesuffix(".zst") in str(error), damage
                assert not [path for path in into.rglob("*") if path.is_file()], damage
            else:
                assert (into / name).read_bytes() == FILES[name][1], damage
                (into / name).unlink()

    assert noticed > 10


def test_a_file_that_is_not_in_it(found: BackupSet) -> None:
    """The error names those that are."""
    with pytest.raises(SetDamaged, match=r"has no users\.json; it has archive\.db, chat_sessions\.json"):
        list(content_of(found, "users.json"))


def test_a_set_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    """By name, since it is no damage."""
    manifest = write_set(tmp_path / NAME, format=99)

    with pytest.raises(DataRefused, match="format 99"):
        decode_set_manifest(encode_set_manifest(manifest))
    again = read_set(tmp_path / NAME)
    assert again.manifest is None and "install the version that wrote it" in again.damage


def test_a_proof_is_kept_with_the_set(found: BackupSet) -> None:
    """A set counts as proved only when everything could be loaded from it."""
    assert not found.is_proved

    write_proof(found.path, Proof("2026-11-21T14:04:00.000Z", ok=False, reason="chat_sessions.json is cut short"))
    assert not read_set(found.path).is_proved

    write_proof(found.path, Proof("2026-11-21T14:05:00.000Z", ok=True, counts={"sessions": 300}))
    assert read_set(found.path).is_proved
    (found.path / "proof.json").write_bytes(b"{")
    assert not read_set(found.path).is_proved
