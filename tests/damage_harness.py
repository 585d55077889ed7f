"""A data directory, and everything that may be wrong with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from holdfast.disk.files import Directory
from holdfast.disk.journal import encode_line, segment_name
from holdfast.disk.snapshot import MANIFEST, encode_manifest, read_manifest
from holdfast.ops import AnyOp, MessageAppend, OrderPut, RecordPut, SessionPut, UserPut
from tests.engine_harness import do, opened, running

Damage = Callable[[Path], object]


def life() -> list[AnyOp]:
    """Something of every kind."""
    return [
        *(SessionPut(id=f"57300{number}", value={"currentState": "cart", "n": number}) for number in range(20)),
        OrderPut(id="1001", value={"recipientPhone": "573001", "productType": "music"}),
        UserPut(id="ana", value={"name": "Ana"}),
        RecordPut(collection="notes", id="n1", value={"text": "x"}),
        MessageAppend(id="573001", role="user", content="Hola"),
        MessageAppend(id="573001", role="assistant", content="¿Qué tal?"),
        MessageAppend(id="573002", role="user", content="Ayuda"),
    ]


def make_directory(data_dir: Path) -> Path:
    """A directory as two flushes leave it, with a little in the journal behind them."""
    with running(data_dir, journal_keep=1 << 20) as engine:
        for op in life():
            do(engine, op)
        engine.flush("api")
        do(engine, SessionPut(id="573", value={"currentState": "new"}))
        engine.flush("api")
    engine = opened(data_dir, journal_keep=1 << 20)
    do(engine, UserPut(id="ben", value={"name": "Ben"}))
    do(engine, UserPut(id="eva", value={"name": "Eva"}))
    engine.close(flush=False)
    return data_dir


def picture(data_dir: Path) -> dict[str, tuple[int, int, str]]:
    """Every file and directory with its mode, its time of change, and what is in it."""
    found = {}
    for path in sorted([data_dir, *data_dir.rglob("*")]):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def flip(path: Path, offset: int | None = None) -> None:
    """Change one bit of *path*, in the middle unless told where, as a disk does it: without a trace."""
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if offset is None else offset] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def newest_segment(data_dir: Path) -> Path:
    return max((data_dir / "journal").glob("*.jsonl"))


def edit_archive(data_dir: Path, statement: str) -> None:
    connection = sqlite3.connect(data_dir / "archive.db", isolation_level=None)
    connection.execute(statement)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def double_a_record(data_dir: Path) -> None:
    """Write a users.json, with a manifest that fits, in which one id stands twice."""
    with Directory(data_dir) as directory:
        manifest = read_manifest(directory, MANIFEST)
        assert manifest is not None
        line = directory.read("users.json").removeprefix(b"[\n").removesuffix(b"\n]\n").split(b",\n")[0]
        written = directory.write_atomic("users.json", [b"[\n" + line + b",\n" + line + b"\n]\n"])
        entry = msgspec.structs.replace(
            manifest.files["users.json"],
            records=2,
            bytes=written.bytes,
            crc32=f"{written.crc32:08x}",
            mtime_ns=written.mtime_ns,
        )
        changed = msgspec.structs.replace(manifest, files=manifest.files | {"users.json": entry})
        directory.write_atomic(MANIFEST, [encode_manifest(changed)])


def append_event(data_dir: Path, op: str, *, ahead: int = 1) -> None:
    segment = newest_segment(data_dir)
    last = json.loads(segment.read_bytes().splitlines()[-1][9:])["seq"]
    payload = b'{"seq":%d,"at":"2026-11-21T06:00:00.000Z","op":"%b","id":"x"}' % (last + ahead, op.encode())
    with segment.open("ab") as file:
        file.write(encode_line(payload))


def cut(path: Path, size: int) -> None:
    """Shorten *path* by *size* bytes."""
    os.truncate(path, path.stat().st_size - size)


def rename_segment(data_dir: Path) -> None:
    segment = newest_segment(data_dir)
    segment.rename(segment.with_name(segment_name(int(segment.stem) + 5)))


def link_users(data_dir: Path) -> None:
    (data_dir / "users.json").rename(data_dir.parent / "elsewhere.json")
    (data_dir / "users.json").symlink_to(data_dir.parent / "elsewhere.json")


WRONG: dict[str, tuple[Damage, str, str, str]] = {
    "a bit of a snapshot": (lambda d: flip(d / "chat_sessions.json"), "error", "snapshots", "chat_sessions.json"),
    "a snapshot cut": (lambda d: cut(d / "chat_sessions.json", 40), "error", "snapshots", "damaged"),
    "a snapshot gone": (lambda d: (d / "notes.json").unlink(), "error", "snapshots", "notes.json is missing"),
    "a snapshot is a link": (link_users, "error", "files", "users.json"),
    "an id twice": (double_a_record, "error", "snapshots", "id that stands there already"),
    "sales figures": (lambda d: (d / "sales_stats.json").write_text("{"), "error", "snapshots", "sales_stats.json"),
    "the manifest": (lambda d: flip(d / "manifest.json"), "error", "manifest", "checksum"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "warning", "manifest", "manifest.json is missing"),
    "an event": (lambda d: flip(newest_segment(d), 40), "error", "journal", "checksum does not hold"),
    "an event twice": (
        lambda d: (append_event(d, "user.delete", ahead=0), append_event(d, "user.delete")),
        "error",
        "journal",
        "stale event",
    ),
    "an event missing": (lambda d: append_event(d, "user.delete", ahead=3), "error", "journal", "missing"),
    "an op nobody knows": (lambda d: append_event(d, "pony.ride"), "error", "journal", "pony.ride"),
    "a segment under another name": (rename_segment, "error", "journal", "named for event"),
    "all segments": (lambda d: shutil.rmtree(d / "journal"), "error", "journal", "missing"),
    "a kept segment": (
        lambda d: flip(min((d / "journal" / "kept").iterdir()), 40),
        "warning",
        "journal",
        "kept/",
    ),
    "an archive of garbage": (lambda d: (d / "archive.db").write_bytes(b"x" * 9999), "error", "archive", "no SQLite"),
    "a page of the archive": (lambda d: flip(d / "archive.db", 2048 * 3 + 3), "error", "archive", ""),
    "no archive": (lambda d: (d / "archive.db").unlink(), "error", "archive", "is missing"),
    "a message gone": (
        lambda d: edit_archive(d, "DELETE FROM messages WHERE place = (SELECT max(place) FROM messages)"),
        "error",
        "archive",
        "totals of messages",
    ),
    "a conversation of another version": (
        lambda d: edit_archive(d, "UPDATE conversations SET version = version + 1 WHERE id = '573001'"),
        "error",
        "archive",
        "at version 3 with 2 messages",
    ),
    "an archive of another history": (
        lambda d: edit_archive(d, "UPDATE totals SET archived_seq = 100000"),
        "error",
        "archive",
        "up to 100000",
    ),
    "an archive that is too old": (
        lambda d: (edit_archive(d, "UPDATE totals SET archived_seq = 3"), shutil.rmtree(d / "journal" / "kept")),
        "error",
        "archive",
        "it ends at 3",
    ),
    "a log without its archive": (
        lambda d: ((d / "archive.db").rename(d / "archive.db-wal"), (d / "_conversations.json").unlink()),
        "warning",
        "archive",
        "archive.db-wal without archive.db",
    ),
    "a file for all to read": (lambda d: (d / "users.json").chmod(0o644), "warning", "directory", "mode 0644"),
    "a directory for all to enter": (lambda d: (d / "journal").chmod(0o755), "warning", "directory", "mode 0755"),
    "a restore broken off": (lambda d: (d / "restore.json").write_text("{}"), "warning", "files", "interrupted"),
    "a directory in the place of one": (
        lambda d: (d / "quarantine").write_text("x"),
        "error",
        "files",
        "quarantine is none",
    ),
}


GOOD_TO_KNOW: dict[str, tuple[Damage, str, str]] = {
    "a torn tail": (lambda d: cut(newest_segment(d), 5), "journal", "never acknowledged"),
    "an edited file": (
        lambda d: (d / "users.json").write_text('[{"id": "ana", "name": "Anita"}]'),
        "snapshots",
        "edited by hand: 1 records",
    ),
    "a half written file": (lambda d: (d / ".users.json.123.tmp").touch(0o600), "files", "half written"),
    "a half made backup": (lambda d: (d / "backups" / ".x.123.tmp").mkdir(0o700, parents=True), "files", "half made"),
    "a stranger": (lambda d: (d / "holiday.jpg").touch(0o600), "files", "holiday.jpg is not ours"),
    "evidence": (
        lambda d: ((d / "quarantine").mkdir(0o700), (d / "quarantine" / "2026-x.json").touch(0o600)),
        "quarantine",
        "1 damaged file,",
    ),
    "no backup": (lambda d: None, "backups", "none yet"),
}
