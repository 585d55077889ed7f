"""A start that migrates a directory of a made-up format 0, to be ended at any of its system calls.

    python -m tests.crash.migrating DATA_DIR

In format 0 users stood in ``profiles.json``. Everything is done in the main thread: the proof of the backup as well, as where
no process can be started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from holdfast.care.upgrade import Changed, Step
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import MANIFEST, encode_manifest, read_manifest
from holdfast.engine import Engine
from holdfast.ops import MessageAppend, UserPut
from holdfast.recovery import open_engine
from holdfast.settings import Settings
from tests.crash.harness import Recorder

USERS = {"ana", "ben"}


def main() -> None:
    sys.executable = ""
    migrated(Path(sys.argv[1])).close(flush=False)


def migrated(data_dir: Path, log: Recorder | None = None, **options: Any) -> Engine:
    """An engine on *data_dir*, as a start makes it that knows how to migrate format 0."""
    return open_engine(Settings(data_dir=data_dir), log=log or Recorder(), migrations=(STEP,), **options)


def make_format_0(data_dir: Path, **options: Any) -> Path:
    """A directory of format 0, with two users, one of them in the journal, and a conversation."""
    engine = open_engine(Settings(data_dir=data_dir), log=Recorder(), **options)
    engine.submit(UserPut(id="ana", value={"name": "Ana"})).wait()
    engine.submit(MessageAppend(id="c", role="user", content="Hola")).wait()
    engine.flush("api")
    engine.submit(UserPut(id="ben", value={"name": "Ben"})).wait()
    engine.close(flush=False)
    with Directory(data_dir) as data:
        manifest = read_manifest(data, MANIFEST)
        assert manifest is not None
        data.rename("users.json", "profiles.json")
        files = dict(manifest.files)
        files["profiles.json"] = files.pop("users.json")
        data.write_atomic(MANIFEST, [encode_manifest(msgspec.structs.replace(manifest, format=0, files=files))])
    return data_dir


def rename_profiles(data: Directory, staging: Directory, progress: Callable[[str], None]) -> Changed:
    """The step from format 0 to format 1."""
    manifest = read_manifest(data, MANIFEST)
    assert manifest is not None
    progress("profiles.json becomes users.json")
    written = staging.write_atomic("users.json", [data.read("profiles.json")])
    files = dict(manifest.files)
    entry = files.pop("profiles.json")
    files["users.json"] = msgspec.structs.replace(entry, mtime_ns=written.mtime_ns)
    return Changed(msgspec.structs.replace(manifest, files=files), ("users.json",), ("profiles.json",))


STEP = Step(1, "users have a file of their own name", rename_profiles)


if __name__ == "__main__":
    main()
