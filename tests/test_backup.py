"""Backups: whole sets of everything at one seq, taken while everybody works, proved by loading them, and rotated."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from holdfast.archive.base import ArchiveDamaged
from holdfast.care import packer, prover
from holdfast.care.backup import PROVE_EVERY_S, RETRY_S
from holdfast.care.backup_set import (
    SET_FILE,
    BackupSet,
    Proof,
    SetManifest,
    content_of,
    encode_set_manifest,
    list_sets,
    read_set,
    write_proof,
)
from holdfast.care.backup_stopped import back_up_stopped
from holdfast.care.history import History
from holdfast.care.history_follower import PACK_AFTER_S
from holdfast.care.packing import pack
from holdfast.care.prove import prove, settings_in
from holdfast.care.prover import prove_apart
from holdfast.care.rewind import state_of
from holdfast.care.rotation import stale
from holdfast.care.set_writer import LEFT_BYTES, digest_of
from holdfast.clock import Clock, format_ms
from holdfast.disk.files import Directory, DirectoryLock
from holdfast.disk.snapshot import Manifest, encode_manifest
from holdfast.engine import Engine
from holdfast.errors import StorageFull, Unavailable
from holdfast.ops import MessageAppend, OrderComplete, OrderPut, SessionPut
from holdfast.settings import BackupSettings
from tests.cli_harness import forked, holdfast
from tests.engine_harness import ANSWER_S, NOW_MS, HandClock, Log, do, opened, running, settings_of
from tests.http_harness import Served, serve_and
from tests.library_forms import Use, daemon_in_thread, use

__all__ = ["use"]

DAY_MS = 24 * 3600 * 1000


def fill(engine: Engine, count: int = 20) -> None:
    present = engine.count("conversations")
    for n in range(present, present + count):
        id = f"57300{n:05d}"
        do(engine, SessionPut(id=id, value={"currentState": "catalog", "n": n}))
        do(engine, MessageAppend(id=id, role="user", content=f"hola {n}"))
        do(engine, OrderPut(id=f"o{n}", value={"recipientPhone": id}))
        if n % 2:
            do(engine, OrderComplete(id=f"o{n}", revenue=Decimal("12.50")))


def proof_of(found: BackupSet, tmp_path: Path) -> Proof:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return prove(found, None, scratch)


def taken_stopped(data_dir: Path, log: Log | None = None) -> BackupSet:
    lock = DirectoryLock(data_dir)
    try:
        return back_up_stopped(settings_of(data_dir), "api", log or Log(), prove=False)
    finally:
        lock.release()


def newest(data_dir: Path) -> BackupSet:
    return list_sets(data_dir)[0]


def manifest_of(found: BackupSet) -> SetManifest:
    assert found.manifest is not None, found.damage
    return found.manifest


def half_made(data_dir: Path) -> list[str]:
    return [name for name in os.listdir(data_dir / "backups") if name.startswith(".")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> BackupSet:
    """A set with something of everything, whose archive is ahead of its snapshots."""
    data_dir = tmp_path_factory.mktemp("whole") / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine)
        engine.flush("api")
        fill(engine, 5)
    return taken_stopped(data_dir)


@pytest.fixture
def copy(whole: BackupSet, tmp_path: Path) -> BackupSet:
    """The same, to be damaged."""
    return read_set(Path(shutil.copytree(whole.path, tmp_path / whole.name)))


def rewritten(found: BackupSet, **changed: Any) -> BackupSet:
    """The set with a manifest that says something else."""
    manifest = msgspec.structs.replace(manifest_of(found), **changed)
    (found.path / SET_FILE).write_bytes(encode_set_manifest(manifest))
    return read_set(found.path)


def replaced(found: BackupSet, name: str, content: bytes) -> BackupSet:
    """The set with other *content* of a file, as if it had been written so."""
    stored = manifest_of(found).files[name]
    packed = b"".join(pack([content]))
    (found.path / stored.stored).write_bytes(packed)
    kept, inner = digest_of([packed]), digest_of([content])
    changed = msgspec.structs.replace(
        stored, stored_bytes=kept.bytes, stored_sha256=kept.sha256, bytes=inner.bytes, sha256=inner.sha256
    )
    return rewritten(found, files=manifest_of(found).files | {name: changed})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs are done in this process, as where none can be started: in a tenth of the time."""
    monkeypatch.setattr("sys.executable", "")


# What is in a set.


def test_a_set_holds_everything_that_was_acknowledged(tmp_path: Path) -> None:
    """Loaded from the set alone, the state is the one at its seq; and it says so itself."""
    data_dir = tmp_path / "data"
    log = Log()
    with running(data_dir, log=log, clock=Clock()) as engine:
        fill(engine)
        told: list[str] = []

        report = engine.backup("api", told.append)

        found = newest(data_dir)
        state = state_of(found, None, settings_in(found))
        assert (report.name, report.seq, report.proved, report.notes) == (found.name, engine.status()["seq"], True, [])
        assert state.seq == report.seq
        for collection in ("sessions", "orders", "completed_orders", "conversations"):
            assert state.collections[collection].count == engine.count(collection) > 0
        assert all(state.sessions.get(id) == engine.line("sessions", id) for id in state.sessions)
        assert manifest_of(found).counts["messages"] == 20
        assert engine.degraded == []
        assert told
    assert found.is_proved
    assert log.named("backup.completed")[0]["reason"] == "api"
    assert log.named("backup.proved")[0]["backup"] == report.name
    assert half_made(data_dir) == []
    assert oct(found.path.stat().st_mode & 0o777) == oct(0o700)
    assert {oct(path.stat().st_mode & 0o777) for path in found.path.iterdir()} == {oct(0o600)}


@pytest.mark.usefixtures("quick")
def test_the_clear_token_is_in_no_set(tmp_path: Path) -> None:
    """Who finds a backup can open nothing with it."""

    async def scenario(served: Served) -> None:
        token = served.token

        made = (await served.ask("POST", "/v1/admin/backup", {})).json

        found = read_set(served.settings.data_dir / "backups" / made["name"])
        contents = {name: b"".join(content_of(found, name)) for name in manifest_of(found).files}
        assert not any(token.encode() in content for content in contents.values())

    serve_and(scenario, tmp_path / "data")


def test_what_did_not_change_costs_no_room(tmp_path: Path) -> None:
    """Its file is a hard link to the one of the set before; a file there that the disk has changed is not handed down."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 5)
        engine.backups._write("api", lambda text: None)
        first = newest(data_dir)
        do(engine, SessionPut(id="1", value={}))

        made = engine.backups._write("api", lambda text: None)

        second = newest(data_dir)
        shared = {
            file.stored
            for file in manifest_of(second).files.values()
            if (second.path / file.stored).samefile(first.path / file.stored)
        }
        assert "pending_orders.json.zst" in shared and "chat_sessions.json.zst" not in shared
        assert made.new_bytes < second.stored_bytes

        damaged = second.path / "pending_orders.json.zst"
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
        engine.backups._write("api", lambda text: None)
        assert proof_of(newest(data_dir), tmp_path).ok


def test_large_files_are_compressed_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same outcome, shared files and all; and where none can be started it is done here."""
    data_dir = tmp_path / "data"
    monkeypatch.setattr(packer, "APART_BYTES", 0)
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 5)
        engine.backups._write("api", lambda text: None)
        made = engine.backups._write("api", lambda text: None)
        assert made.new_bytes < made.found.stored_bytes / 2
        assert proof_of(made.found, tmp_path).reason == ""

        monkeypatch.setattr(packer, "_PROGRAM", "raise OSError('no memory')")
        with pytest.raises(OSError, match="no memory"):
            engine.backup("api")
        monkeypatch.setattr("sys.executable", "/nowhere/python")
        assert proof_of(engine.backups._write("api", lambda text: None).found, tmp_path).reason == ""
        assert half_made(data_dir) == []


def test_writers_flushes_and_readers_go_on_while_it_is_taken(tmp_path: Path) -> None:
    """Nobody waits for it, and whatever they do meanwhile, the set is of one seq."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine)
        done = threading.Event()
        counts = [0, 0]

        def write(number: int) -> None:
            while not done.is_set():
                id = f"57{number}{counts[number] % 50}"
                do(engine, SessionPut(id=id, value={"n": counts[number]}))
                do(engine, MessageAppend(id=id, role="user", content="x"))
                counts[number] += 1

        threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        try:
            before = list(counts)
            for _ in range(3):
                engine.backups._write("api", lambda text: None)
                engine.flush("api")
        finally:
            done.set()
            for thread in threads:
                thread.join(ANSWER_S)

        assert all(now > then for now, then in zip(counts, before, strict=True))
    sets = list_sets(data_dir)
    assert len(sets) == 3
    for found in sets:
        assert proof_of(found, tmp_path).reason == ""
        assert state_of(found, None, settings_in(found)).seq == manifest_of(found).seq


@pytest.mark.usefixtures("quick")
def test_calls_at_one_time_share_a_set(tmp_path: Path) -> None:
    """One is taken, and one more for all who came meanwhile."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 2)
        reports = []
        threads = [threading.Thread(target=lambda: reports.append(engine.backup("api"))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(ANSWER_S)

        assert len(reports) == 5
        assert len(list_sets(data_dir)) <= 2


def test_a_snapshot_that_somebody_edits_does_not_get_into_the_set(tmp_path: Path) -> None:
    """What memory holds is what counts; the edit is kept as such."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 3)
        engine.flush("api")
        (data_dir / "users.json").write_text("[\n]\n \n")
        (data_dir / "pending_orders.json").unlink()

        made = engine.backups._write("api", lambda text: None)

        assert made.notes == []
        assert proof_of(made.found, tmp_path).ok
        assert manifest_of(made.found).counts["orders"] == 2


def test_without_an_archive_the_set_is_made_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events that the journal has for it are in the set, so that it can be made anew from them."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 3)

        def unreadable(*arguments: Any) -> int:
            raise ArchiveDamaged("on fire")

        monkeypatch.setattr("holdfast.archive.sqlite.SQLiteArchive.copy_to", unreadable)

        made = engine.backups._write("api", lambda text: None)

    assert made.notes and "without the archive" in made.notes[0]
    assert "archive.db" not in manifest_of(made.found).files
    journal = [name for name in manifest_of(made.found).files if name.startswith("journal/")]
    assert b"message.append" in b"".join(content_of(made.found, journal[0]))
    assert proof_of(made.found, tmp_path).ok


def test_a_stop_breaks_a_backup_off(tmp_path: Path) -> None:
    """Soon, and nothing half made remains."""
    data_dir = tmp_path / "data"
    engine = opened(data_dir, clock=Clock())
    fill(engine, 3)
    reached, errors = threading.Event(), []

    def progress(text: str) -> None:
        if "archive" in text:
            reached.set()
            time.sleep(0.2)

    def back_up() -> None:
        try:
            engine.backup("api", progress)
        except Unavailable as error:
            errors.append(error)

    thread = threading.Thread(target=back_up)
    thread.start()
    assert reached.wait(ANSWER_S)
    started = time.monotonic()
    engine.close()
    thread.join(ANSWER_S)

    assert len(errors) == 1
    assert time.monotonic() - started < 3
    assert list_sets(data_dir) == [] and half_made(data_dir) == []


def test_a_start_removes_what_a_killed_backup_left(tmp_path: Path) -> None:
    """Half a set, a scratch directory of a proof, a set that was being removed; half a file, and half of the history."""
    data_dir = tmp_path / "data"
    for name in (".a.json.7.tmp", "journal/.00000000000000000001-00000000000000000009.jsonl.zst.7.tmp"):
        (data_dir / "backups" / name).parent.mkdir(parents=True, exist_ok=True)
        (data_dir / "backups" / name).write_bytes(b"half")
    for name in (".2026-11-21T060000.000Z.7.tmp", ".prove.7.tmp", ".2026-11-20T060000.000Z.0.tmp"):
        (data_dir / "backups" / name).mkdir(parents=True)
        (data_dir / "backups" / name / "chat_sessions.json.zst").write_bytes(b"half")

    with running(data_dir):
        assert half_made(data_dir) == []
        assert list((data_dir / "backups" / "journal").iterdir()) == []


# A directory that nobody has open.


def test_a_killed_directory_is_backed_up_with_its_journal(tmp_path: Path) -> None:
    """Everything acknowledged is in the set, as a start would find it."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 4)
        engine.flush("api")
        fill(engine, 8)
        last_seq = engine.status()["seq"]

    found = taken_stopped(data_dir)

    assert manifest_of(found).seq == last_seq
    assert proof_of(found, tmp_path).reason == ""
    assert state_of(found, None, settings_in(found)).sessions.count == 12


def test_a_damaged_directory_is_backed_up_as_it_is(tmp_path: Path) -> None:
    """The log says what is damaged, and so does the proof."""
    data_dir = tmp_path / "data"
    log = Log()
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 4)
        engine.flush("api")
    sessions = data_dir / "chat_sessions.json"
    damaged = sessions.read_bytes()[:-30]
    sessions.write_bytes(damaged)
    (data_dir / "archive.db").write_bytes(b"garbage")

    found = taken_stopped(data_dir, log)

    notes = " ".join(log.named("backup.completed")[0]["notes"])
    assert "chat_sessions.json" in notes and "archive" in notes
    assert b"".join(content_of(found, "chat_sessions.json")) == damaged
    proof = proof_of(found, tmp_path)
    assert not proof.ok and "chat_sessions.json" in proof.reason


def test_files_of_an_old_bot_are_backed_up_and_proved(tmp_path: Path) -> None:
    """Before there is a manifest: as a net under the first start."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "chat_sessions.json").write_text(
        '[\n  {"recipientPhone": "1", "lastActivity": "2026-11-21T05:00:00Z"}\n]'
    )

    found = taken_stopped(data_dir)

    assert manifest_of(found).counts == {"sessions": 1}
    assert proof_of(found, tmp_path).reason == ""


def test_another_version_takes_a_backup_before_it_changes_anything(tmp_path: Path) -> None:
    """Once, before the first flush; what the old one left is whole in it, and a second start soon after adds none."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 3)
        engine.flush("api")
        fill(engine, 3)
    path = data_dir / "manifest.json"
    written = msgspec.structs.replace(msgspec.json.decode(path.read_bytes(), type=Manifest), holdfast="0.0.1")
    path.write_bytes(encode_manifest(written))

    for _ in range(2):
        with running(data_dir, clock=Clock()):
            pass

    (found,) = list_sets(data_dir)
    assert manifest_of(found).reason == "upgrade"
    assert b'"holdfast": "0.0.1"' in b"".join(content_of(found, "manifest.json"))
    assert state_of(found, None, settings_in(found)).sessions.count == 6
    assert proof_of(found, tmp_path).reason == ""


# Proof.


def test_a_whole_set_is_proved(whole: BackupSet, tmp_path: Path) -> None:
    """By loading it: the counts are what came out."""
    proof = proof_of(whole, tmp_path)

    assert (proof.ok, proof.reason) == (True, "")
    assert proof.counts == manifest_of(whole).counts
    assert proof.counts["sessions"] == 20 and proof.counts["messages"] == 25


def test_every_changed_file_of_a_set_is_noticed(copy: BackupSet, tmp_path: Path) -> None:
    """One bit anywhere, in any file; a byte less, a byte more, twice the content, none at all."""
    for path in sorted(copy.path.iterdir()):
        raw = path.read_bytes()
        places = sorted({0, 1, len(raw) // 3, len(raw) // 2, len(raw) - 2, len(raw) - 1})
        damages = [raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] for at in places]
        for damage in [*damages, raw[:-1], raw + b"\0", raw + raw, b""]:
            path.write_bytes(damage)

            proof = proof_of(read_set(copy.path), tmp_path)

            assert not proof.ok and proof.reason, path.name
        path.write_bytes(raw)
    assert proof_of(read_set(copy.path), tmp_path).ok


def test_a_missing_file_and_one_too_many_are_noticed(copy: BackupSet, tmp_path: Path) -> None:
    """By their names."""
    for path in sorted(copy.path.iterdir()):
        raw = path.read_bytes()
        path.unlink()
        proof = proof_of(read_set(copy.path), tmp_path)
        assert not proof.ok
        assert path.name in proof.reason
        path.write_bytes(raw)

    (copy.path / "notes.json.zst").write_bytes(b"")
    assert "notes.json.zst" in proof_of(copy, tmp_path).reason


def test_counts_that_differ_are_noticed(copy: BackupSet, tmp_path: Path) -> None:
    """Also where every checksum holds: it is what comes out that counts."""
    counts = manifest_of(copy).counts
    for name in counts:
        changed = rewritten(copy, counts=counts | {name: counts[name] + 1})

        proof = proof_of(changed, tmp_path)

        assert not proof.ok and name in proof.reason


def test_a_seq_that_is_not_reached_is_noticed(copy: BackupSet, tmp_path: Path) -> None:
    """A set says up to where everything is in it."""
    assert not proof_of(rewritten(copy, seq=manifest_of(copy).seq + 1), tmp_path).ok


def test_an_archive_that_is_no_whole_database_is_noticed(copy: BackupSet, tmp_path: Path) -> None:
    """Its checksum says that it is what was written, its integrity that it was right then."""
    place = tmp_path / "archive.db"
    place.write_bytes(b"".join(content_of(copy, "archive.db")))
    with contextlib.closing(sqlite3.connect(place)) as connection, connection:
        connection.execute("DELETE FROM messages WHERE rowid = (SELECT min(rowid) FROM messages)")
    with contextlib.closing(sqlite3.connect(place)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    proof = proof_of(replaced(copy, "archive.db", place.read_bytes()), tmp_path)

    assert not proof.ok and "archive.db" in proof.reason


def test_a_session_that_is_lost_is_noticed(copy: BackupSet, tmp_path: Path) -> None:
    """A snapshot with a record less, in a set that believes in it."""
    lines = b"".join(content_of(copy, "chat_sessions.json")).split(b",\n")

    proof = proof_of(replaced(copy, "chat_sessions.json", b",\n".join(lines[:1] + lines[2:])), tmp_path)

    assert not proof.ok and "chat_sessions.json" in proof.reason


@pytest.mark.usefixtures("quick")
def test_a_proof_that_fails_is_told_everywhere_and_tried_again(tmp_path: Path) -> None:
    """In the log, in the reasons and figures of the engine, in the list; the next look makes another backup."""
    data_dir = tmp_path / "data"
    log, clock = Log(), HandClock()
    with running(data_dir, log=log, clock=clock) as engine:
        fill(engine, 2)
        engine.backup("api")
        found = newest(data_dir)
        (found.path / "users.json.zst").write_bytes(b"x")
        clock.advance(PROVE_EVERY_S)
        do(engine, SessionPut(id="1", value={}))
        write_proof(found.path, Proof(at=format_ms(NOW_MS), ok=True))

        engine.backups.prove(found)

        assert "users.json.zst" in log.named("backup.proof_failed")[0]["reason"]
        assert any(found.name in reason for reason in engine.degraded)
        assert not engine.backups.figures().is_proof_ok
        assert engine.backups.listed().items[0].proved is False

        engine.backups.run_when_due()
        assert len(list_sets(data_dir)) == 1, "not at once: it would go in a circle"
        clock.advance(RETRY_S + 1)
        engine.backups.run_when_due()

        assert newest(data_dir).is_proved and newest(data_dir).name > found.name
        assert engine.degraded == []


def test_without_a_child_the_proof_is_done_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no process can be started, or the new one cannot find us."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 2)
        monkeypatch.setattr("sys.executable", "/nowhere/python")
        assert engine.backup("api").proved

        monkeypatch.undo()
        monkeypatch.setattr(prover, "_PROGRAM", "import nothing_of_that_name")
        assert engine.backup("api").proved

        monkeypatch.setattr(prover, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
        report = engine.backup("api")
        assert report.proved is None and "signal 9" in report.problem


# Rotation.


def named(at_ms: int, *, ok: bool | None = True, readable: bool = True, reason: str = "daily") -> BackupSet:
    manifest = SetManifest(at=format_ms(at_ms), reason=reason) if readable else None
    proof = None if ok is None else Proof(at=format_ms(at_ms), ok=ok)
    return BackupSet(Path(format_ms(at_ms).replace(":", "")), manifest, "" if readable else "damaged", proof)


def kept_days(sets: list[BackupSet], **wanted: Any) -> list[int]:
    """How many days old those are that stay."""
    chosen = BackupSettings(**{"keep": 1, "keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0, "pitr": 0.0} | wanted)
    gone = {found.name for found in stale(sets, chosen, NOW_MS)}
    ages = {format_ms(NOW_MS - day * DAY_MS).replace(":", ""): day for day in range(500)}
    return [ages[found.name] for found in sets if found.name not in gone]


def test_the_newest_and_a_ladder_stay() -> None:
    """The last ones; of the last days, weeks and months with a backup the newest each."""
    sets = [named(NOW_MS - day * DAY_MS) for day in range(100)]  # NOW is a Saturday

    assert kept_days(sets, keep=3) == [0, 1, 2]
    assert kept_days(sets, keep_daily=5) == [0, 1, 2, 3, 4]
    assert kept_days(sets, keep_weekly=3) == [0, 6, 13]
    assert kept_days(sets, keep_monthly=3) == [0, 21, 52]
    assert kept_days(sets, keep=2, keep_weekly=2, keep_monthly=2) == [0, 1, 6, 21]


def test_restores_do_not_push_out_what_is_restored_from() -> None:
    """Those from before restores are counted apart, as many of them as of all others."""
    sets = [named(NOW_MS - day * DAY_MS, reason="restore") for day in range(5)]
    sets += [named(NOW_MS - day * DAY_MS) for day in range(5, 10)]

    assert kept_days(sets, keep=3) == [0, 1, 2, 5, 6, 7]
    assert kept_days(sets[:6], keep=2) == [0, 1, 5]


def test_what_every_moment_is_restored_from_stays() -> None:
    """The newest proved set that is as old as ``pitr``; without one, the oldest there is."""
    sets = [named(NOW_MS - day * DAY_MS) for day in range(20)]

    assert kept_days(sets, pitr=7 * 86400.0) == [0, 7]
    assert kept_days(sets[:5], pitr=7 * 86400.0) == [0, 4]


def test_a_proved_set_always_stays() -> None:
    """However many newer ones failed, or were never tried; those count for nothing and stay as evidence."""
    sets = [
        named(NOW_MS, ok=False),
        named(NOW_MS - DAY_MS, readable=False),
        named(NOW_MS - 2 * DAY_MS, ok=None),
        *(named(NOW_MS - day * DAY_MS) for day in (3, 4, 5)),
    ]

    assert kept_days(sets) == [0, 1, 2, 3]
    assert kept_days(sets, keep=2) == [0, 1, 2, 3]


def test_a_set_without_the_archive_displaces_none_with_it() -> None:
    """It is worth having, but those with all messages stay."""
    without = named(NOW_MS)
    without = without._replace(manifest=SetManifest(at=format_ms(NOW_MS), counts={"conversations": 5}))

    assert kept_days([without, named(NOW_MS - DAY_MS), named(NOW_MS - 2 * DAY_MS)]) == [0, 1]


def test_nothing_is_removed_unless_the_new_set_is_proved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every instant there is one from which everything was loaded."""
    data_dir = tmp_path / "data"
    log = Log()
    with running(data_dir, log=log, clock=Clock(), backups={"keep": 1, "keep_daily": 0, "keep_weekly": 0}) as engine:
        fill(engine, 2)
        first = engine.backup("api").name
        monkeypatch.setattr(prover, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
        engine.backup("api")
        assert {first} < {found.name for found in list_sets(data_dir)}

        monkeypatch.undo()
        last = engine.backup("api").name

    assert [found.name for found in list_sets(data_dir)] == [last]
    assert first in log.named("backups.rotated")[0]["removed"]


@pytest.mark.usefixtures("quick")
def test_a_backup_is_taken_each_day_and_the_newest_proved_again(tmp_path: Path) -> None:
    """Counted from the newest set that is there; a directory without anything has none."""
    data_dir = tmp_path / "data"
    clock = HandClock()
    with running(data_dir, clock=clock, backups={"every": 3 * 86400.0}) as engine:
        engine.backups.run_when_due()
        assert list_sets(data_dir) == []

        fill(engine, 1)
        engine.backups.run_when_due()
        assert manifest_of(newest(data_dir)).reason == "daily"
        first = newest(data_dir)
        assert first.proof is not None

        write_proof(first.path, msgspec.structs.replace(first.proof, at=format_ms(NOW_MS)))
        clock.advance(PROVE_EVERY_S)
        engine.backups.run_when_due()
        again = newest(data_dir)
        assert again.name == first.name and again.proof is not None and again.proof.at != format_ms(NOW_MS)

        clock.advance(2 * 86400)
        engine.backups.run_when_due()
        assert len(list_sets(data_dir)) == 2


@pytest.mark.usefixtures("quick")
def test_a_backup_that_is_overdue_makes_degraded(tmp_path: Path) -> None:
    """Twice the time between two of them, also when nothing ever failed; with nothing to save nobody is bothered."""
    clock = HandClock()
    with running(tmp_path / "data", clock=clock) as engine:
        clock.advance(3 * 24 * 3600)
        engine.look_at_disk()
        empty = list(engine.degraded)
        fill(engine)
        engine.look_at_disk()
        never = list(engine.degraded)
        engine.backups.take("api")
        clock.advance(24 * 3600)
        engine.look_at_disk()
        fresh, told = list(engine.degraded), engine.status()["backups"]
        clock.advance(25 * 3600)
        engine.look_at_disk()
        old = list(engine.degraded)

    assert (empty, fresh) == ([], [])
    assert "there is no backup" in never[0] and "the newest backup is 49 hours old" in old[0]
    assert (told["count"], told["is_proved"]) == (1, True) and told["newest_at"] == format_ms(NOW_MS + 3 * DAY_MS)


def test_a_backup_does_not_take_the_last_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails while there is still room for the journal: at its begin, or at whichever piece it would get too little."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 2)
        total, looks = 1 << 30, 0
        for enough in range(100):
            looks = 0

            def space(directory: Directory, enough: int = enough) -> tuple[int, int]:
                nonlocal looks
                looks += 1
                return (total if looks <= enough else LEFT_BYTES - 1), total

            with monkeypatch.context() as patched:
                patched.setattr(Directory, "space", space)
                try:
                    engine.backup("api")
                except StorageFull as error:
                    assert "16383 KiB are free" in str(error)
                    assert list_sets(data_dir) == [] and half_made(data_dir) == []
                    continue
            break

    assert 5 < enough < 99
    assert newest(data_dir).is_proved


@pytest.mark.usefixtures("quick")
def test_the_newest_set_is_the_newest_whatever_the_clock_said(tmp_path: Path) -> None:
    """After the clock was set back, over a restart, the next set has a name above the others, and the time of the clock."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=HandClock()) as engine:
        fill(engine, 1)
        engine.backup("api")
        engine.flush("interval")
    early_ms = NOW_MS - 2 * DAY_MS
    with running(data_dir, clock=HandClock(early_ms)) as engine:
        fill(engine, 2)
        engine.backup("api")
        seq = engine.last_seq()

    assert manifest_of(newest(data_dir)).seq == seq
    assert manifest_of(newest(data_dir)).at == format_ms(early_ms)


@pytest.mark.usefixtures("quick")
def test_a_set_from_the_future_holds_up_no_other(tmp_path: Path) -> None:
    """Taken while the clock was ten years ahead: the next look takes another one, and then there is one each day again."""
    data_dir, clock = tmp_path / "data", HandClock()
    with running(data_dir, clock=HandClock(NOW_MS + 3650 * DAY_MS)) as engine:
        fill(engine, 1)
        engine.backup("api")
        engine.flush("interval")
    with running(data_dir, clock=clock) as engine:
        taken = []
        for _ in range(8):
            engine.backups.run_when_due()
            taken.append(len(list_sets(data_dir)))
            clock.advance(6 * 3600)

    assert taken == [2, 2, 2, 2, 3, 3, 3, 3]


@pytest.mark.usefixtures("quick")
def test_proofs_that_fail_all_day_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failed set is followed by the next one after twice the time, at most by one a day; the proved one stays."""
    data_dir, clock = tmp_path / "data", HandClock()
    with running(data_dir, clock=clock, backups={"keep": 1, "keep_daily": 0, "keep_weekly": 0}) as engine:
        fill(engine, 1)
        first = engine.backup("api").name
        clock.advance(86400)
        monkeypatch.setattr(
            "holdfast.care.backup.prove_apart", lambda *_: Proof(at=format_ms(clock.now_ms()), ok=False, reason="odd")
        )
        failed = []
        for _ in range(7 * 24):
            engine.backups.run_when_due()
            failed.append(len(list_sets(data_dir)) - 1)
            clock.advance(3600)
        kept = [found.name for found in list_sets(data_dir)]
        monkeypatch.undo()
        clock.advance(86400)
        engine.backups.run_when_due()

        assert 5 <= failed[23] <= 8 and 10 <= failed[-1] <= 15 and first in kept
        assert newest(data_dir).is_proved


@pytest.mark.usefixtures("quick")
def test_what_was_edited_by_hand_gets_into_a_set_at_once(tmp_path: Path) -> None:
    """No event says it, so an older set and the events since would bring back a state without it."""
    data_dir, clock = tmp_path / "data", HandClock()
    with running(data_dir, clock=clock) as engine:
        do(engine, SessionPut(id="1", value={"turn": 1}))
        engine.backup("api")
        engine.flush("interval")
    path = data_dir / "chat_sessions.json"
    path.write_text(path.read_text().replace('"turn":1', '"turn":7'))
    os.utime(path)
    with running(data_dir, clock=clock) as engine:
        clock.advance(60)
        engine.backups.run_when_due()
        engine.backups.run_when_due()

    assert len(list_sets(data_dir)) == 2
    line = state_of(newest(data_dir), None, settings_of(data_dir)).sessions.get("1")
    assert line is not None and b'"turn":7' in line


@pytest.mark.usefixtures("quick")
def test_a_backup_without_room_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets that are there stay, ops go on, and the reason is told until one succeeds."""
    data_dir = tmp_path / "data"
    log = Log()
    with running(data_dir, log=log, clock=Clock()) as engine:
        fill(engine, 2)
        engine.backup("api")

        def no_room(*arguments: Any) -> None:
            raise StorageFull("no room to write it")

        monkeypatch.setattr("holdfast.archive.sqlite.SQLiteArchive.copy_to", no_room)
        with pytest.raises(StorageFull):
            engine.backup("api")

        assert log.named("backup.failed") and half_made(data_dir) == []
        assert any("backup" in reason for reason in engine.degraded)
        assert engine.backups.figures().failures == 1
        monkeypatch.undo()
        do(engine, SessionPut(id="1", value={}))
        engine.backup("api")
        assert engine.degraded == []


# The history behind the sets.


@contextlib.contextmanager
def with_history(tmp_path: Path, clock: Any, log: Log | None = None, **backups: Any) -> Iterator[Engine]:
    with running(
        tmp_path / "data", clock=clock, log=log, backups={"pitr": 7 * 86400.0} | backups, journal_keep=0
    ) as engine:
        yield engine


def packed(tmp_path: Path) -> list[tuple[int, int]]:
    return [(part.first_seq, part.last_seq) for part in History(tmp_path / "data").parts() if part.is_packed]


def lines(tmp_path: Path, last_seq: int) -> list[int]:
    return [line.seq for line in History(tmp_path / "data").lines(0, last_seq)]


def test_closed_segments_are_packed_and_then_given_up(tmp_path: Path) -> None:
    """No event is nowhere at any moment: a flush removes a segment only when it is packed."""
    clock = HandClock()
    with with_history(tmp_path, clock) as engine:
        for n in range(3):
            do(engine, SessionPut(id=str(n), value={}))
            engine.flush("api")
        assert lines(tmp_path, 3) == [1, 2, 3]

        clock.advance(PACK_AFTER_S + 1)
        engine.backups.history.step()
        do(engine, SessionPut(id="4", value={}))
        engine.flush("api")

        assert packed(tmp_path) == [(1, 3)]
        assert lines(tmp_path, 4) == [1, 2, 3, 4]
        assert sorted(os.listdir(tmp_path / "data" / "journal" / "kept")) == [f"{4:020d}.jsonl"]
        assert engine.backups.figures().history_bytes > 0


def test_history_goes_on_after_a_restart(tmp_path: Path) -> None:
    """From where its packed parts end."""
    clock = HandClock()
    for n in range(3):
        with with_history(tmp_path, clock) as engine:
            do(engine, SessionPut(id=str(n), value={}))
            engine.flush("api")
            clock.advance(PACK_AFTER_S + 1)
            engine.backups.history.step()

    assert packed(tmp_path) == [(1, 1), (2, 2), (3, 3)]
    assert lines(tmp_path, 3) == [1, 2, 3]


@pytest.mark.usefixtures("quick")
def test_moments_are_promised_only_behind_the_last_hole(tmp_path: Path) -> None:
    """What is missing between the sets, or behind all of them, is not reached by naming the oldest set."""
    clock = HandClock()
    with with_history(tmp_path, clock) as engine:
        for n in range(4):
            if n % 2 == 0:
                engine.backup("api")
            do(engine, SessionPut(id=str(n), value={}))
            engine.flush("api")
            clock.advance(PACK_AFTER_S + 1)
            engine.backups.history.step()
        first, second = (format_ms(NOW_MS + round(2 * n * (PACK_AFTER_S + 1) * 1000)) for n in range(2))
        parts = sorted((tmp_path / "data" / "backups" / "journal").iterdir())
        assert engine.backups.listed().history.since == first

        for path, since in ((parts[1], second), (parts[3], "")):
            for gone in (path, *(tmp_path / "data" / "journal" / "kept").iterdir()):
                gone.unlink()

            assert engine.backups.listed().history.since == since


def test_a_history_without_a_set_promises_nothing(tmp_path: Path) -> None:
    """``holdfast backups`` says that, and what brings moments back."""
    clock = HandClock()
    with with_history(tmp_path, clock) as engine:
        do(engine, SessionPut(id="1", value={}))
        engine.flush("api")
        clock.advance(PACK_AFTER_S + 1)
        engine.backups.history.step()

    shown = forked("backups", "--data-dir", tmp_path / "data", cwd=tmp_path)

    assert shown.returncode == 0 and "no moment can be restored before the next backup" in shown.stdout


@pytest.mark.usefixtures("quick")
def test_history_that_no_moment_needs_is_removed(tmp_path: Path) -> None:
    """What lies before the newest proved set that is as old as ``pitr``; with 0, all of it."""
    clock = HandClock()
    with with_history(tmp_path, clock) as engine:
        for day in range(3):
            do(engine, SessionPut(id=str(day), value={}))
            engine.flush("api")
            clock.advance(PACK_AFTER_S + 1)
            engine.backups.history.step()
            engine.backup("api")
            clock.advance(5 * 86400)
        engine.backups.history.step()
        # Sets are 15, 10 and 5 days old: from the second on.
        assert [first for first, _ in packed(tmp_path)] == [3]

        engine.reconfigure(settings_of(tmp_path / "data", backups={"pitr": 0.0}))
        engine.backups.history.step()
        assert packed(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_a_clock_that_jumps_ahead_makes_no_history_old(tmp_path: Path) -> None:
    """Ten years by the wall clock and none by the other: what was packed stays, though a set of then counts as old."""
    data_dir, clock = tmp_path / "data", HandClock()
    with running(data_dir, clock=clock, backups={"pitr": 7 * 86400.0}) as engine:
        fill(engine, 2)
        engine.backup("api")
        clock.advance(PACK_AFTER_S)
        fill(engine, 2)
        engine.flush("interval")
        clock.advance(PACK_AFTER_S)
        engine.backups.history.step()
        engine.backup("api")
        packed = [part for part in History(data_dir).parts() if part.is_packed]
        clock.jump(3650 * 86400)
        engine.backup("api")
        engine.backups.history.step()

        assert packed and set(packed) <= {part for part in History(data_dir).parts() if part.is_packed}


def test_history_gives_way_on_a_full_disk(tmp_path: Path) -> None:
    """It lets go of the segments that wait and of what is packed, says so, and goes on when there is room."""
    clock, log = HandClock(), Log()
    with with_history(tmp_path, clock, log) as engine:
        do(engine, SessionPut(id="1", value={}))
        engine.flush("api")
        clock.advance(PACK_AFTER_S + 1)
        engine.backups.history.step()
        do(engine, SessionPut(id="2", value={}))
        engine.flush("api")
        assert packed(tmp_path) == [(1, 1)]

        engine._flusher.make_room()

        assert packed(tmp_path) == []
        assert not os.listdir(tmp_path / "data" / "journal" / "kept")
        assert log.named("history.given_up")
        assert "room" in engine.backups.listed().history.problem
        assert not engine.backups.figures().is_history_kept
        engine.backups.history.step()
        assert log.named("history.resumed")
        assert engine.backups.listed().history.problem == ""


def test_a_damaged_segment_costs_the_history_no_more_than_itself(tmp_path: Path) -> None:
    """What is before and behind it is packed; the gap is told."""
    clock, log = HandClock(), Log()
    with with_history(tmp_path, clock, log) as engine:
        for n in range(3):
            do(engine, SessionPut(id=str(n), value={}))
            engine.flush("api")
        kept = tmp_path / "data" / "journal" / "kept" / f"{2:020d}.jsonl"
        kept.write_bytes(b"x" * len(kept.read_bytes()))
        clock.advance(PACK_AFTER_S + 1)

        engine.backups.history.step()

    assert packed(tmp_path) == [(1, 1), (3, 3)]
    assert log.named("history.gap_found") == [{"first_seq": 2, "last_seq": 2}]


# The ways to ask for it.


@pytest.mark.usefixtures("quick")
def test_every_form_of_the_library_makes_backups(use: Use) -> None:
    """Embedded or over a daemon, with await or without."""

    async def body(hf: Any) -> None:
        await_it = hf.sessions.put("1", {"currentState": "x"})
        if hasattr(await_it, "__await__"):
            await await_it
        report = hf.backup()
        if hasattr(report, "__await__"):
            report = await report

        assert (report.proved, report.reason, report.seq) == (True, "api", 1)

    use(body)


@pytest.mark.usefixtures("quick")
def test_backups_are_made_and_listed_over_http(tmp_path: Path) -> None:
    """The newest first, with how the proof went, and the history."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/sessions/1", {"currentState": "x"})

        made = await served.ask("POST", "/v1/admin/backup")
        listed = await served.ask("GET", "/v1/admin/backups")

        assert made.status == listed.status == 200
        assert listed.json["items"][0]["name"] == made.json["name"]
        assert listed.json["items"][0]["proved"] is True
        assert (await served.ask("POST", "/v1/admin/backup", {"reason": "boredom"})).status == 422
        metrics = (await served.ask("GET", "/metrics")).body.decode()
        assert "holdfast_last_backup_proved 1.0" in metrics and "holdfast_backups 1.0" in metrics

    serve_and(scenario, tmp_path / "data")


def test_the_commands_ask_the_daemon(tmp_path: Path) -> None:
    """It makes the backup while it serves; the table says what there is to go back to."""
    with daemon_in_thread(tmp_path / "data"):
        made = holdfast("backup", "--json", "--data-dir", tmp_path / "data", cwd=tmp_path)
        table = holdfast("backups", "--data-dir", tmp_path / "data", cwd=tmp_path)

    report = orjson.loads(made.stdout)
    assert (made.returncode, report["reason"], report["proved"]) == (0, "command", True)
    assert report["name"] in table.stdout and "command" in table.stdout and "yes" in table.stdout


def test_the_commands_work_without_a_daemon(tmp_path: Path) -> None:
    """On the directory itself: a backup, the table, the proof of one set, and what is wrong with it by its exit code."""
    data_dir = tmp_path / "data"
    with running(data_dir, clock=Clock()) as engine:
        fill(engine, 2)

    made = forked("backup", "--data-dir", data_dir, cwd=tmp_path)
    listed = orjson.loads(forked("backups", "--json", "--data-dir", data_dir, cwd=tmp_path).stdout)
    name = listed["items"][0]["name"]
    (data_dir / "backups" / name / "users.json.zst").write_bytes(b"x")
    verified = forked("backups", "--verify", name, "--data-dir", data_dir, cwd=tmp_path)
    nothing = forked("backups", "--verify", "yesterday", "--data-dir", data_dir, cwd=tmp_path)

    assert made.returncode == 0 and "proved" in made.stdout and name in made.stdout
    assert listed["items"][0]["proved"] is True
    assert verified.returncode == 1 and "users.json.zst" in verified.stdout
    assert nothing.returncode == 1 and name in nothing.stderr
    assert list_sets(data_dir)[0].proof is not None and not newest(data_dir).is_proved


def test_two_proofs_at_one_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    """The daily one, and that of a verification."""
    with running(tmp_path / "data") as engine:
        fill(engine)
    found = taken_stopped(tmp_path / "data")
    settings = settings_of(tmp_path / "data")
    proofs: list[Proof] = []
    threads = [
        threading.Thread(target=lambda: proofs.append(prove_apart(found, settings, threading.Event()))) for _ in "123"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_S)

    assert [proof.ok for proof in proofs] == [True] * 3, [proof.reason for proof in proofs]


def test_a_descriptor_is_closed_once_when_a_backup_fails_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then its number may be another thread's."""
    with running(tmp_path / "data") as engine:
        fill(engine, 1)
    others: list[int] = []

    def fail(directory: Directory, old: str, new: str) -> None:
        others.append(os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY))
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Directory, "rename", fail)
    with pytest.raises(OSError, match="Input"):
        taken_stopped(tmp_path / "data")

    assert os.write(others[0], b"x") == 1
    os.close(others[0])


def test_a_link_is_no_backup(tmp_path: Path) -> None:
    """What it leads to lies elsewhere, and proofs are written into sets."""
    with running(tmp_path / "data") as engine:
        fill(engine, 1)
    found = taken_stopped(tmp_path / "data")
    outside = found.path.rename(tmp_path / found.name)
    found.path.symlink_to(outside)

    assert list_sets(tmp_path / "data") == []


def test_a_clock_that_jumps_ahead_takes_no_moment_away(tmp_path: Path) -> None:
    """The set that the oldest of them are restored from stays until the monotonic clock confirms its age."""
    clock = HandClock()
    wanted = {"keep": 1, "keep_daily": 0, "keep_weekly": 0, "keep_monthly": 0, "pitr": 7 * 86400.0}
    with running(tmp_path / "data", clock=clock, backups=wanted) as engine:
        for _ in range(3):
            fill(engine, 1)
            engine.backups.take("api")
            clock.advance(3600)
        base = list_sets(tmp_path / "data")[-1].name
        clock.jump(10 * 365 * 86400)
        engine.backups.take("api")

        assert list_sets(tmp_path / "data")[-1].name == base


def test_a_stopped_directory_with_a_mirror_is_backed_up_and_proved(tmp_path: Path) -> None:
    """How far the mirror is belongs to the directory, and to no backup."""
    with running(tmp_path / "data", mirror=True) as engine:
        do(engine, MessageAppend(id="c", role="user", content="Hola"))
        engine.flush("api")
    found = taken_stopped(tmp_path / "data")

    assert found.manifest is not None and "_mirror.json" not in found.manifest.files
    assert proof_of(found, tmp_path).ok
