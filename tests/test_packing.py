"""What is packed comes back whole, or an error says that it does not."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from holdfast.care.packing import Unreadable, pack, unpack

SEED = 5
CONTENTS = {
    "empty": b"",
    "short": b"Hola",
    "repetitive": b'{"recipientPhone":"573001234567"},\n' * 100_000,
    "random": random.Random(SEED).randbytes(3_000_000),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_was_packed_comes_back(content: bytes) -> None:
    """In whatever pieces it is given."""
    pieces = [content[start : start + 70_001] for start in range(0, len(content), 70_001)]

    packed = b"".join(pack(pieces))

    assert content == b"".join(unpack([packed]))
    assert content == b"".join(unpack(packed[at : at + 1000] for at in range(0, len(packed), 1000)))


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_what_is_cut_is_noticed(content: bytes) -> None:
    """Wherever the end is missing."""
    packed = b"".join(pack([content]))

    for kept in {*range(min(len(packed), 40)), len(packed) // 2, len(packed) - 4, len(packed) - 1}:
        with pytest.raises(Unreadable):
            b"".join(unpack([packed[:kept]]))


def test_a_changed_byte_changes_nothing_unnoticed() -> None:
    """Every one of them: it is an error, or the same content comes back."""
    content = CONTENTS["repetitive"][:10_000]
    packed = b"".join(pack([content]))

    noticed = 0
    for index in range(len(packed)):
        changed = bytearray(packed)
        changed[index] ^= 0x10
        try:
            assert content == b"".join(unpack([bytes(changed)]))
        except Unreadable:
            noticed += 1

    assert noticed > len(packed) // 2


def test_what_stands_behind_the_end_is_refused() -> None:
    """Also when it is another whole stream."""
    packed = b"".join(pack([b"Hola"]))

    for more in (b"x", packed):
        with pytest.raises(Unreadable, match="behind its end"):
            b"".join(unpack([packed, more]))
        with pytest.raises(Unreadable, match="behind its end"):
            b"".join(unpack([packed + more]))


def test_gigabytes_of_zeros_come_in_small_pieces() -> None:
    """A small file may hold them; whoever reads it stops when it is too much."""
    packed = b"".join(pack(b"\0" * (1 << 20) for _ in range(256)))
    assert len(packed) < 100_000

    largest = max(len(piece) for piece in unpack([packed]))

    assert largest <= 64 << 20


def test_the_common_tool_reads_it(tmp_path: Path) -> None:
    """Without us: ``zstd -d``, where it is installed."""
    if shutil.which("zstd") is None:
        pytest.skip("zstd, the command, is not installed")
    file = tmp_path / "content.zst"
    file.write_bytes(b"".join(pack([CONTENTS["repetitive"]])))

    told = subprocess.run(["zstd", "-dc", str(file)], capture_output=True, check=True, timeout=30)

    assert told.stdout == CONTENTS["repetitive"]
