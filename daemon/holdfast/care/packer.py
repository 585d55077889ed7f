"""Compressing the files of a backup set in a process of its own, so that nobody shares a processor with it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import msgspec

from holdfast.care.apart import Failed, run_apart, step_back
from holdfast.care.backup_set import Kind, StoredFile, read_set
from holdfast.care.prover import settings_from, written
from holdfast.care.set_writer import Digest, SetWriter, leaving_room
from holdfast.disk.files import Directory
from holdfast.errors import HoldfastError, StorageFull
from holdfast.settings import Settings

APART_BYTES = 8 << 20
"""Less than this is compressed here, sooner than a process can be started."""

_PROGRAM = "from holdfast.care.packer import main; main()"


class Wanted(msgspec.Struct, frozen=True):
    """A file that stands in the directory of the set under way, to be taken into it."""

    kind: Kind
    name: str
    records: int


class Question(msgspec.Struct, frozen=True):
    """What the child is to do.

    Attributes:
        staging: the directory of the set under way.
        earlier: path of the set that shares its files; empty without one.
        settings: as they would stand in a settings file.
    """

    staging: str
    earlier: str
    settings: dict[str, str]
    wanted: list[Wanted]


class Packed(msgspec.Struct, frozen=True):
    """What it has done; ``is_full`` when there was no room."""

    files: dict[str, StoredFile] = {}
    digests: dict[str, Digest] = {}
    new_bytes: int = 0
    is_full: str = ""


def add_files(
    writer: SetWriter, wanted: list[Wanted], settings: Settings, cancelled: threading.Event
) -> dict[str, Digest]:
    """Take the files *wanted* into the set of *writer*; their digests. Errors as those of ``SetWriter.add_file``.

    Raises:
        OSError: the child failed.
        Unavailable: *cancelled*.
    """
    size = sum(found.st_size for one in wanted if (found := writer.directory.stat(one.name)))
    answer = None
    if size >= APART_BYTES:
        question = Question(str(writer.directory.path), writer.earlier_path, written(settings), wanted)
        try:
            answer = run_apart(_PROGRAM, msgspec.json.encode(question), cancelled)
        except Failed as error:
            raise OSError(f"the files could not be compressed: {error}") from error
    if answer is None:
        return {one.name: writer.add_file(one.kind, one.name, one.records) for one in wanted}
    packed = msgspec.json.decode(answer, type=Packed)
    if packed.is_full:
        raise StorageFull(packed.is_full)
    writer.adopt(packed.files, packed.new_bytes)
    return packed.digests


def main() -> None:
    """The child: a question on standard input, the answer on standard output."""
    step_back()
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    from holdfast.care.seal import seal_to_write  # here, since the parent has its own

    try:
        seal = seal_to_write(settings_from(question.settings))
        earlier = read_set(Path(question.earlier)) if question.earlier else None
        # Others may wait for the disk at any time, and from here nobody sees whether they do.
        staging = Directory(Path(question.staging))
        writer = SetWriter.within(staging, earlier, seal, leaving_room(staging, lambda: True))
        digests = {one.name: writer.add_file(one.kind, one.name, one.records) for one in question.wanted}
        writer.publish()
    except StorageFull as error:
        answer = Packed(is_full=str(error))
    except (HoldfastError, OSError) as error:
        sys.exit(str(error))
    else:
        answer = Packed(writer.files, digests, writer.new_bytes)
    sys.stdout.buffer.write(msgspec.json.encode(answer))
