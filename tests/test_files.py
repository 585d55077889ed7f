"""The one door to the disk: what a large file costs those who share the disk, and what is never cut short for it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from holdfast.disk import files
from holdfast.disk.files import FREE_BYTES, PIECE_BYTES, Directory

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whether others have a file open")


class Disk:
    """The calls of the real disk that matter here, noted on their way.

    Attributes:
        unsynced: bytes written since the last sync, at each sync.
        cuts: the sizes to which files were cut.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsynced: list[int] = []
        self.cuts: list[int] = []
        self._written = 0
        write, truncate = os.write, os.ftruncate

        def noted_write(fd: int, data: Any) -> int:
            taken = write(fd, data)
            self._written += taken
            return taken

        def noted_sync(sync: Callable[[int], None]) -> Callable[[int], None]:
            def synced(fd: int) -> None:
                self.unsynced.append(self._written)
                self._written = 0
                sync(fd)

            return synced

        def noted_truncate(fd: int, size: int) -> None:
            self.cuts.append(size)
            truncate(fd, size)

        monkeypatch.setattr(os, "write", noted_write)
        monkeypatch.setattr(os, "ftruncate", noted_truncate)
        monkeypatch.setattr(os, "fsync", noted_sync(os.fsync))
        monkeypatch.setattr(files, "_sync_data", noted_sync(files._sync_data))


MANY = [bytes([n]) * (n * PIECE_BYTES // 3) for n in range(1, 9)]
"""Chunks around the size of a piece, 12 pieces together."""


def test_a_large_file_goes_to_the_disk_in_small_pieces_while_others_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than two pieces are unsynced, however large a chunk is; the content is the same."""
    disk = Disk(monkeypatch)

    with Directory(tmp_path) as directory:
        written = directory.stage("c.json", MANY, lambda: True)
        directory.publish(["c.json"])

    content = b"".join(MANY)
    assert (tmp_path / "c.json").read_bytes() == content
    assert (written.bytes, written.crc32) == (len(content), crc32(content))
    assert sum(disk.unsynced) == len(content) and max(disk.unsynced) < 2 * PIECE_BYTES


def test_a_large_file_is_synced_once_while_nobody_else_uses_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncs in between would only make it slower."""
    disk = Disk(monkeypatch)

    with Directory(tmp_path) as directory:
        directory.stage("c.json", MANY, lambda: False)

    assert disk.unsynced == [len(b"".join(MANY))]


def test_a_large_file_is_not_drawn_out_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each piece takes long, and others never rest, the rest is written at full speed."""
    disk = Disk(monkeypatch)
    monkeypatch.setattr(files, "PATIENCE_S", 0.05)

    def slow_chunks() -> Iterator[bytes]:
        for _ in range(12):
            time.sleep(0.02)
            yield bytes(PIECE_BYTES)

    with Directory(tmp_path) as directory:
        directory.stage("c.json", slow_chunks(), lambda: True)

    assert 1 <= len(disk.unsynced) - 1 <= 2 and disk.unsynced[-1] >= 10 * PIECE_BYTES


def test_a_sync_that_fails_half_way_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not tried again, and no temporary stays."""

    def refused(fd: int) -> None:
        refusals.append(fd)
        raise OSError(errno.EIO, "the disk refused")

    refusals: list[int] = []
    monkeypatch.setattr(files, "_sync_data", refused)
    with Directory(tmp_path) as directory:
        directory.write_atomic("c.json", [b"old"])

        with pytest.raises(OSError, match="the disk refused"):
            directory.stage("c.json", MANY, lambda: True)

    assert len(refusals) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    assert (tmp_path / "c.json").read_bytes() == b"old"


LARGE = b"large" * (FREE_BYTES // 2)
"""Two and a half times what is freed at a time."""


@linux_only
def test_what_a_large_file_replaced_is_freed_a_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at once, which would hold up every other sync."""
    disk = Disk(monkeypatch)
    with Directory(tmp_path) as directory:
        directory.write_atomic("c.json", [LARGE])

        directory.write_atomic("c.json", [b"new"])

    assert disk.cuts == [len(LARGE) - FREE_BYTES, len(LARGE) - 2 * FREE_BYTES]
    assert (tmp_path / "c.json").read_bytes() == b"new"


@linux_only
def test_what_was_replaced_is_freed_only_when_the_new_file_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the directory's sync fails a power cut may bring the old file back, whole."""
    with Directory(tmp_path) as directory:
        directory.write_atomic("c.json", [LARGE])
        disk = Disk(monkeypatch)
        directory.stage("c.json", [b"new"])

        def refused(fd: int) -> None:
            raise OSError(errno.EIO, "the disk refused")

        monkeypatch.setattr(os, "fsync", refused)
        with pytest.raises(OSError, match="the disk refused"):
            directory.publish(["c.json"])

    assert disk.cuts == []


@pytest.mark.parametrize("held_by", ["a link", "this process", "another process"])
def test_a_replaced_file_that_somebody_still_has_stays_whole(tmp_path: Path, held_by: str) -> None:
    """A backup keeps a link to it, a program that copies it has it open."""
    path, link = tmp_path / "c.json", tmp_path / "kept.json"
    with Directory(tmp_path) as directory, contextlib.ExitStack() as held:
        directory.write_atomic("c.json", [LARGE])
        if held_by == "a link":
            link.hardlink_to(path)
        opened = held.enter_context(path.open("rb")) if held_by != "a link" else None
        if held_by == "another process":
            assert opened is not None
            copying = subprocess.Popen(["cat"], stdin=opened, stdout=subprocess.PIPE)
            held.callback(copying.wait)
            assert copying.stdout is not None
            found = copying.stdout.read(1)
            opened.close()

        directory.write_atomic("c.json", [b"new"])

        if held_by == "another process":
            found += copying.communicate()[0]
        else:
            found = opened.read() if opened else link.read_bytes()

    assert found == LARGE
