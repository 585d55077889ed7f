"""Snapshot files: valid JSON, one record a line, trusted only as we left them, salvaged when damaged."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path
from typing import Any
from zlib import crc32

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.disk import snapshot
from holdfast.disk.files import Directory, WrittenFile
from holdfast.disk.snapshot import (
    ChecksumMismatchError,
    FileEntry,
    Manifest,
    encode_manifest,
    entry_of,
    read_blocks,
    read_manifest,
    salvage,
    snapshot_chunks,
)
from holdfast.errors import DataRefused

RECORDS = [{"id": str(n), "text": 'ñ, \n []{}\\" 💎', "n": n} for n in range(12)]


def file_of(shards: list[list[bytes]]) -> bytes:
    return b"".join(snapshot_chunks(shards))


@given(st.lists(st.lists(st.integers().map(lambda n: b'{"id":"%d"}' % n), max_size=4), max_size=6))
def test_a_snapshot_is_json_with_a_record_a_line(shards: list[list[bytes]]) -> None:
    """[, newline, records joined by comma and newline, newline, ] for any number of records in any shards."""
    content = file_of(shards)

    records = [line for shard in shards for line in shard]
    assert orjson.loads(content) == [orjson.loads(line) for line in records]
    assert content == (b"[\n" + b",\n".join(records) + b"\n]\n" if records else b"[\n]\n")


@pytest.mark.parametrize("count", [0, 1, 2, 12])
def test_blocks_give_back_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Wherever a block happens to end: inside a record, inside a separator, inside the brackets."""
    lines = [orjson.dumps(value) for value in RECORDS[:count]]
    with Directory(tmp_path) as directory:
        entry = entry_of(directory.write_atomic("c.json", [file_of([lines])]), count, 1)
        for size in range(1, 200):
            monkeypatch.setattr(snapshot, "_BLOCK_BYTES", size)

            blocks = list(read_blocks(directory, "c.json", entry))

            assert list(itertools.chain.from_iterable(block.split(b",\n") for block in blocks)) == lines


def test_a_file_that_changed_is_not_trusted(tmp_path: Path) -> None:
    """Any flipped bit, any other length."""
    lines = [orjson.dumps(value) for value in RECORDS]
    with Directory(tmp_path) as directory:
        entry = entry_of(directory.write_atomic("c.json", [file_of([lines])]), 12, 1)
        content = (tmp_path / "c.json").read_bytes()
        for place in range(0, len(content), 7):
            (tmp_path / "c.json").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(ChecksumMismatchError):
                list(read_blocks(directory, "c.json", entry))
        for other in (content[:-1], content + b" ", b""):
            (tmp_path / "c.json").write_bytes(other)
            with pytest.raises(ChecksumMismatchError):
                list(read_blocks(directory, "c.json", entry))


# Salvage.

LAYOUTS = {
    "ours": file_of([[orjson.dumps(value) for value in RECORDS]]),
    "pretty": orjson.dumps(RECORDS, option=orjson.OPT_INDENT_2),
    "compact": orjson.dumps(RECORDS),
    "spaced": b"[" + b", ".join(orjson.dumps(value) for value in RECORDS) + b"]",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_whole(layout: str) -> None:
    """With and without a byte order mark."""
    for raw in (LAYOUTS[layout], b"\xef\xbb\xbf" + LAYOUTS[layout]):
        found = salvage(raw)
        assert (found.records, found.is_whole) == (RECORDS, True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_whole_record_before_a_cut_is_saved(layout: str) -> None:
    """Wherever the file ends too early."""
    raw = LAYOUTS[layout]
    for cut in range(len(raw) - 3):
        found = salvage(raw[:cut])

        assert not found.is_whole
        assert found.reason
        whole = [record for record in RECORDS if b'"%b"' % str(record["id"]).encode() in raw[:cut]]
        assert found.records == RECORDS[: len(found.records)]
        assert len(whole) - 1 <= len(found.records) <= len(whole)


@pytest.mark.parametrize("layout", ["ours", "pretty"])
def test_a_damaged_record_costs_only_itself(layout: str) -> None:
    """Zeros, garbage, or bytes that are no UTF-8 in one record leave the others whole."""
    raw = LAYOUTS[layout]
    place = raw.index(b'"id":"5"') if layout == "ours" else raw.index(b'"id": "5"')
    for damage in (b"\0" * 6, b"\xff\xfe\xff\xfe\xff\xfe", b"{{{{{{", b'""""""'):
        found = salvage(raw[:place] + damage + raw[place + 6 :])

        assert [record["id"] for record in found.records if record.get("id") != "5"] == [
            record["id"] for record in RECORDS if record["id"] != "5"
        ]
        assert not found.is_whole


@pytest.mark.parametrize("raw", [b"", b"\0" * 5000, b" \n", b"{}", b'{"daily":[]}', b"null", b"[", b"garbage"])
def test_a_file_without_records_yields_none(raw: bytes) -> None:
    """And says why."""
    found = salvage(raw)

    assert (found.records, found.is_whole) == ([], False)
    assert found.reason


@pytest.mark.parametrize("odd", [b"NaN", b"-Infinity", b"1e400"])
def test_salvage_does_not_round(odd: bytes) -> None:
    """A number that cannot be kept makes its record one that is not whole; it never becomes null or infinity."""
    found = salvage(b'[\n{"id":"1"},\n{"id":"2","n":%b},\n{"id":"3"}\n]\n' % odd)

    assert [record["id"] for record in found.records] == ["1", "3"]


def test_deep_nesting_does_not_break_salvage() -> None:
    """200,000 brackets are damage, not a crash."""
    found = salvage(b'[\n{"id":"1"},\n{"id":"2","n":' + b"[" * 200_000 + b"\n]\n")

    assert [record["id"] for record in found.records] == ["1"]


# Manifest.


def test_a_manifest_survives_writing(tmp_path: Path) -> None:
    """What is written is read."""
    entry = FileEntry(records=3, bytes=100, crc32="00ff00ff", mtime_ns=1, seq=7)
    manifest = Manifest(holdfast="1", at="x", snapshot_seq=7, files={"c.json": entry})
    with Directory(tmp_path) as directory:
        directory.write_atomic("manifest.json", [encode_manifest(manifest)])

        assert read_manifest(directory, "manifest.json") == manifest
        assert read_manifest(directory, "other.json") is None


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", ValueError),
        (b"[]", ValueError),
        (b'{"format":1,"snapshot_seq":"x"}', ValueError),
        (b"\xff", ValueError),
        (b'{"format":2}', DataRefused),
        (b'{"format":2,"whatever":[]}', DataRefused),
    ],
)
def test_a_bad_manifest_is_told_from_a_newer_one(tmp_path: Path, raw: bytes, error: type[Exception]) -> None:
    """A newer one is refused, a damaged one mended around."""
    (tmp_path / "manifest.json").write_bytes(raw)
    with Directory(tmp_path) as directory, pytest.raises(error):
        read_manifest(directory, "manifest.json")


# The atomic file underneath.


def test_an_atomic_file_is_whole_private_and_known(tmp_path: Path) -> None:
    """Content, permissions 0600, size, checksum and time are as reported; nothing else is left."""
    with Directory(tmp_path) as directory:
        written = directory.write_atomic("c.json", [b"one", b"", b"two"])

    status = (tmp_path / "c.json").stat()
    assert (tmp_path / "c.json").read_bytes() == b"onetwo"
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert written == WrittenFile(6, crc32(b"onetwo"), status.st_mtime_ns)
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """And no temporary."""

    def chunks() -> Any:
        yield b"half"
        raise KeyError

    with Directory(tmp_path) as directory:
        directory.write_atomic("c.json", [b"old"])
        with pytest.raises(KeyError):
            directory.write_atomic("c.json", chunks())

    assert (tmp_path / "c.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("plant", ["link", "directory", "pipe", "missing"])
def test_only_regular_files_are_read(tmp_path: Path, plant: str) -> None:
    """A link is not followed, a pipe not waited for."""
    path = tmp_path / "c.json"
    if plant == "link":
        path.symlink_to("/etc/passwd")
    elif plant == "directory":
        path.mkdir()
    elif plant == "pipe":
        os.mkfifo(path)

    with Directory(tmp_path) as directory, pytest.raises(OSError):
        directory.read("c.json")
