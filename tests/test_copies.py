"""Every backup stands at the second place as well, and comes back from there; what that place does concerns nobody else."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from moto.server import ThreadedMotoServer

from holdfast.care import copies as copies_module
from holdfast.care import store as store_module
from holdfast.care.backup_set import (
    SET_FILE,
    BackupSet,
    Proof,
    SetDamaged,
    SetManifest,
    StoredFile,
    content_of,
    encode_set_manifest,
    list_sets,
    list_sets_in,
    read_set,
    stored_name,
    write_proof,
)
from holdfast.care.copies import NOTE_FILE, Copies, fetch
from holdfast.care.packing import pack
from holdfast.care.store import CopyFailed, Store, store_of
from holdfast.clock import parse_ms
from holdfast.errors import NotFound, SettingsError, Unavailable
from holdfast.settings import Settings, chosen

WAIT_S = 20.0
NEVER: Callable[[], bool] = lambda: False  # noqa: E731
SAME, OTHER = b'{"recipientPhone":"573001234567"}\n' * 50_000, b"SQLite format 3\0" * 1_000
NOW_MS = parse_ms("2026-11-21T15:00:00.000Z")


class Log:
    """What was logged: names, with their fields."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _note(self, event: str, **fields: Any) -> None:
        self.lines.append((event, fields))

    info = warning = error = _note

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.lines if name == event]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server; its address."""
    serving = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    serving.start()
    host, port = serving.get_host_and_port()
    yield f"http://{host}:{port}"
    serving.stop()


@pytest.fixture(params=["directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings with a second place: either kind."""
    if request.param == "directory":
        (tmp_path / "second").mkdir()
        return settings_for(tmp_path, str(tmp_path / "second"))
    return bucket_settings(tmp_path, request.getfixturevalue("server"))


def settings_for(tmp_path: Path, copy_to: str, **backups: object) -> Settings:
    (tmp_path / "data").mkdir(exist_ok=True)
    chosen_backups = {f"backups.{name}": value for name, value in {"copy_to": copy_to, **backups}.items()}
    return chosen({"data_dir": str(tmp_path / "data"), **chosen_backups})


def bucket_settings(tmp_path: Path, server: str) -> Settings:
    bucket = "holdfast-" + hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:20]
    urllib.request.urlopen(urllib.request.Request(f"{server}/{bucket}", method="PUT"), timeout=10).close()
    credentials = tmp_path / "credentials"
    credentials.write_text("[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = words\n")
    credentials.chmod(0o600)
    return settings_for(tmp_path, f"s3://{bucket}/shop/one", s3_endpoint=server, s3_credentials_file=str(credentials))


def make_set(settings: Settings, at: str, *contents: bytes, proof: bool = True) -> BackupSet:
    """A set of the moment *at*; each of *contents* is a file of it."""
    path = settings.data_dir / "backups" / at.replace(":", "")
    path.mkdir(parents=True)
    files = {}
    for number, content in enumerate(contents):
        packed = b"".join(pack([content]))
        name = f"file-{number}.json"
        (path / stored_name(name, sealed=False)).write_bytes(packed)
        files[name] = StoredFile(
            "snapshot", stored_name(name, sealed=False), len(packed), sha256(packed), len(content), sha256(content), 1
        )
    (path / SET_FILE).write_bytes(encode_set_manifest(SetManifest(seq=8, at=at, files=files)))
    if proof:
        write_proof(path, Proof(at=at, ok=True))
    return read_set(path)


def change_a_byte(path: Path) -> None:
    """As a disk does in time; the links to it change with it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def running(settings: Settings, log: Log) -> Copies:
    copies = Copies(settings.data_dir, lambda: settings, lambda: NOW_MS, log)
    copies.start()
    return copies


def wait_until(is_so: Callable[[], object]) -> None:
    until = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks and retries come soon enough for a test."""
    monkeypatch.setattr(copies_module, "CHECK_EVERY_S", 0.05)
    monkeypatch.setattr(copies_module, "RETRY_S", 0.1)


def test_a_new_backup_is_copied_whole(place: Settings) -> None:
    """With its proof, and it can be read from there."""
    log = Log()
    copies = running(place, log)
    try:
        made = make_set(place, "2026-11-21T14:00:00.000Z", SAME, OTHER)
        wait_until(lambda: copies.state.newest == made.name and log.named("backup.copied"))
        there = store_of(place).sets()

        assert [one.name for one in there] == [made.name]
        assert there[0].manifest == made.manifest
        assert there[0].is_proved
        assert log.named("backup.copied")[0]["files"] == 2
        assert not copies.complaint
    finally:
        assert copies.close()


def test_what_did_not_change_costs_no_transfer(place: Settings) -> None:
    """A second set with one new file sends that file alone."""
    store = store_of(place)
    first = make_set(place, "2026-11-20T14:00:00.000Z", SAME, OTHER)
    store.put(first, NEVER)

    sent = store.put(make_set(place, "2026-11-21T14:00:00.000Z", SAME, OTHER + b"more"), NEVER)

    assert sent.files == 1
    assert sent.bytes < 1_000
    if not place.backups.copy_to.startswith("s3:"):
        names = [f"{one.path}/file-0.json.zst" for one in store.sets()]
        assert os.path.samefile(*names)


def test_it_comes_back_from_the_second_place(place: Settings) -> None:
    """Into backups/ of a new data directory, byte by byte, with the history; a second time nothing is read."""
    history = place.data_dir / "backups" / "journal" / f"{1:020d}-{8:020d}.jsonl.zst"
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME, OTHER)
    history.parent.mkdir()
    history.write_bytes(b"events")
    copies = running(place, Log())
    store = store_of(place)
    wait_until(lambda: store.history() and store.sets())
    assert copies.close()
    shutil.move(place.data_dir, place.data_dir.with_name("lost"))
    place.data_dir.mkdir()

    fetched = fetch(store, "latest", place.data_dir)

    assert fetched.found.name == made.name
    assert fetched.found.is_proved
    assert b"".join(content_of(fetched.found, "file-0.json")) == SAME
    assert history.read_bytes() == b"events"
    assert fetched.history == 1
    assert fetch(store, made.name, place.data_dir).bytes == 0


def test_only_the_newest_sets_are_kept_there(place: Settings) -> None:
    """As many as copy_keep says, and the newest proved one whatever its age; the history goes with the oldest."""
    place = msgspec.structs.replace(place, backups=msgspec.structs.replace(place.backups, copy_keep=2))
    make_set(place, "2026-11-17T14:00:00.000Z", b"1")
    make_set(place, "2026-11-18T14:00:00.000Z", b"2")
    for day in (19, 20, 21):
        make_set(place, f"2026-11-{day}T14:00:00.000Z", b"%d" % day, proof=False)
    store = store_of(place)
    for one in list_sets(place.data_dir):
        store.put(one, NEVER)

    copies = running(place, Log())
    try:
        wait_until(lambda: len(store.sets()) == 3)
    finally:
        assert copies.close()

    assert [one.name[:10] for one in store.sets()] == ["2026-11-21", "2026-11-20", "2026-11-18"]


def test_nothing_is_removed_there_because_it_is_gone_here(place: Settings) -> None:
    """A data directory that was lost begins anew with no set; the copies are then all there is."""
    store = store_of(place)
    for day in (19, 20):
        store.put(make_set(place, f"2026-11-{day}T14:00:00.000Z", b"%d" % day), NEVER)
    shutil.rmtree(place.data_dir / "backups")

    copies = running(place, Log())
    try:
        made = make_set(place, "2026-11-21T14:00:00.000Z", b"new")
        wait_until(lambda: copies.state.newest == made.name)
    finally:
        assert copies.close()

    assert len(store.sets()) == 3


def test_a_proof_that_comes_later_is_copied_too(place: Settings) -> None:
    """A set is copied before it is proved, since a copy that cannot be proved is better than none."""
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME, proof=False)
    copies = running(place, Log())
    try:
        wait_until(lambda: copies.state.newest == made.name)
        write_proof(made.path, Proof(at="2026-11-21T14:00:09.000Z", ok=True))
        store = store_of(place)

        wait_until(lambda: store.sets()[0].is_proved)
    finally:
        assert copies.close()


def test_a_place_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    """It is never created by us: where a disk is not mounted, the copies would fill the wrong one."""
    settings = settings_for(tmp_path, str(tmp_path / "second"))
    log = Log()
    copies = running(settings, log)
    made = make_set(settings, "2026-11-10T14:00:00.000Z", SAME)
    try:
        wait_until(lambda: len(log.named("backup.copy_failed")) >= 2)

        assert "mount its disk" in copies.state.failure
        assert not (tmp_path / "second").exists()
        assert log.named("backup.copy_failed")[1]["retry_s"] > log.named("backup.copy_failed")[0]["retry_s"]

        (tmp_path / "second").mkdir()
        wait_until(lambda: copies.state.newest == made.name and not copies.state.failure)
        assert "265 hours old" in copies.complaint
    finally:
        assert copies.close()


def test_a_place_that_had_backups_and_has_none_is_not_filled_anew(tmp_path: Path) -> None:
    """An empty directory in its stead is where a disk is not mounted; by a new life of the daemon that is known as well."""
    second = tmp_path / "second"
    second.mkdir()
    settings = settings_for(tmp_path, str(second))
    made = make_set(settings, "2026-11-10T14:00:00.000Z", SAME)
    copies = running(settings, Log())
    try:
        wait_until(lambda: copies.state.newest == made.name and (settings.data_dir / "backups" / NOTE_FILE).exists())
    finally:
        assert copies.close()
    second.rename(tmp_path / "unmounted")
    second.mkdir()

    log = Log()
    copies = running(settings, log)
    try:
        wait_until(lambda: log.named("backup.copy_failed"))
        assert "mount its disk" in copies.state.failure
        assert os.listdir(second) == []

        second.rmdir()
        (tmp_path / "unmounted").rename(second)
        wait_until(lambda: not copies.state.failure and copies.state.newest == made.name)
    finally:
        assert copies.close()


def test_an_address_nobody_answers_at_holds_up_no_stop(tmp_path: Path, server: str) -> None:
    """Whatever the thread is at, the stop of the process goes on without it."""
    settings = bucket_settings(tmp_path, server)
    silent = settings_for(
        tmp_path,
        settings.backups.copy_to,
        s3_endpoint="http://127.0.0.1:9",
        s3_credentials_file=settings.backups.s3_credentials_file,
    )
    make_set(silent, "2026-11-21T14:00:00.000Z", SAME)
    copies = running(silent, Log())
    time.sleep(0.2)

    started = time.monotonic()
    copies.close(timeout_s=1.0)

    assert time.monotonic() - started < 1.5
    wait_until(lambda: not any(one.name == "holdfast-copies" for one in threading.enumerate()))


def test_a_stop_in_the_midst_of_a_copy_leaves_no_set(place: Settings) -> None:
    """The next try begins anew, after what was half done is removed."""
    made = make_set(place, "2026-11-21T14:00:00.000Z", os.urandom(4 << 20), OTHER)
    asked = 0

    def is_stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    store = store_of(place)
    with pytest.raises(store_module.Stopped):
        store.put(made, is_stopping)

    assert store.sets() == []
    store.put(made, NEVER)
    assert store.sets()[0].name == made.name


def test_a_backup_that_is_damaged_is_not_copied(place: Settings) -> None:
    """One byte of a file is another; what is there says nothing of it."""
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME)
    stored = made.path / "file-0.json.zst"
    content = bytearray(stored.read_bytes())
    content[100] ^= 1
    stored.write_bytes(content)

    with pytest.raises(CopyFailed, match="damaged; it is not copied"):
        store_of(place).put(made, NEVER)

    assert store_of(place).sets() == []


def test_a_backup_that_is_damaged_keeps_no_other_from_its_copy(place: Settings) -> None:
    """It is told, and those before it, which are worth the more now, are copied."""
    earlier = make_set(place, "2026-11-20T14:00:00.000Z", b"whole")
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME)
    stored = made.path / "file-0.json.zst"
    content = bytearray(stored.read_bytes())
    content[100] ^= 1
    stored.write_bytes(content)

    log = Log()
    copies = running(place, log)
    try:
        wait_until(lambda: log.named("backup.copy_failed"))
    finally:
        assert copies.close()

    assert "damaged; it is not copied" in log.named("backup.copy_failed")[0]["reason"]
    assert [one.name for one in store_of(place).sets()] == [earlier.name]


def test_a_copy_that_is_damaged_is_not_fetched(tmp_path: Path) -> None:
    """One byte changed, or cut: the reason, and nothing in backups/."""
    (tmp_path / "second").mkdir()
    settings = settings_for(tmp_path, str(tmp_path / "second"))
    made = make_set(settings, "2026-11-21T14:00:00.000Z", SAME)
    store = store_of(settings)
    store.put(made, NEVER)
    stored = tmp_path / "second" / made.name / "file-0.json.zst"
    whole = stored.read_bytes()
    shutil.rmtree(settings.data_dir / "backups")

    for damaged in (whole[:-1], whole[:50] + b"x" + whole[51:]):
        stored.write_bytes(damaged)
        with pytest.raises(SetDamaged, match="take an older backup"):
            fetch(store, made.name, settings.data_dir)

    assert os.listdir(settings.data_dir / "backups") == []


def test_a_set_that_names_files_elsewhere_is_no_set(tmp_path: Path) -> None:
    """Whoever can write to the second place must not be able to write to the first."""
    (tmp_path / "second").mkdir()
    settings = settings_for(tmp_path, str(tmp_path / "second"))
    made = make_set(settings, "2026-11-21T14:00:00.000Z", SAME)
    assert made.manifest is not None
    file = made.manifest.files["file-0.json"]
    for name, stored in (("file-0.json", "../../evil"), ("../evil", "file.zst"), ("a/evil", "file.zst"), ("x", ".tmp")):
        odd = msgspec.structs.replace(
            made.manifest, files={name: msgspec.structs.replace(file, stored=stored)}, checksum=""
        )
        path = tmp_path / "second" / made.name
        path.mkdir(exist_ok=True)
        (path / SET_FILE).write_bytes(encode_set_manifest(odd))

        assert "names a file that no set has" in list_sets_in(tmp_path / "second")[0].damage
        with pytest.raises(NotFound):
            fetch(store_of(settings), made.name, settings.data_dir / "other")


def test_what_is_missing_or_unreachable_says_so(place: Settings, tmp_path: Path) -> None:
    """Which backups there are; that there is no second place; that its credentials are missing, or wrong."""
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME)
    store: Store = store_of(place)
    store.put(made, NEVER)

    with pytest.raises(NotFound, match=made.name):
        fetch(store, "2025-01-01T000000.000Z", place.data_dir)
    with pytest.raises(SettingsError, match=r"set backups\.copy_to"):
        store_of(settings_for(tmp_path, ""))
    with pytest.raises(SettingsError, match=r"backups\.s3_credentials_file.*not taken from the environment"):
        store_of(settings_for(tmp_path, "s3://bucket/x"))
    words = tmp_path / "words"
    words.write_text("aws_secret_access_key = words\n")
    words.chmod(0o600)
    with pytest.raises(SettingsError, match="expected a section") as refusal:
        store_of(settings_for(tmp_path, "s3://bucket/x", s3_credentials_file=str(words)))
    assert "= words" not in str(refusal.value)
    with pytest.raises(Unavailable, match="mount its disk"):
        fetch(store_of(place, str(tmp_path / "nowhere")), "latest", place.data_dir)


def test_a_server_that_quotes_the_credentials_makes_nobody_tell_them(tmp_path: Path, server: str) -> None:
    """Those who refuse a request answer with what they were sent."""

    class Quoting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error>{self.headers['Authorization']}</Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    asked = bucket_settings(tmp_path, server).backups
    with ThreadingHTTPServer(("127.0.0.1", 0), Quoting) as quoting:
        threading.Thread(target=quoting.serve_forever, daemon=True).start()
        settings = settings_for(
            tmp_path,
            "s3://bucket/x",
            s3_endpoint=f"http://127.0.0.1:{quoting.server_port}",
            s3_credentials_file=asked.s3_credentials_file,
        )
        with pytest.raises(CopyFailed, match="403 Forbidden") as found:
            store_of(settings).sets()
        quoting.shutdown()

    assert "Credential=***" in str(found.value)
    assert "AKIAEXAMPLE" not in str(found.value)


def test_a_backup_that_is_damaged_here_is_fetched_anew(place: Settings) -> None:
    """The good copy takes its name; the damaged one goes to quarantine/, with a report."""
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME, OTHER)
    store = store_of(place)
    store.put(made, NEVER)
    change_a_byte(made.path / "file-0.json.zst")
    damaged = (made.path / "file-0.json.zst").read_bytes()

    fetched = fetch(store, made.name, place.data_dir)

    assert b"".join(content_of(fetched.found, "file-0.json")) == SAME
    assert fetched.bytes == len(damaged), "the other file was here"
    report, aside = sorted((place.data_dir / "quarantine").iterdir(), key=os.path.isdir)
    assert aside.name.endswith(made.name) and (aside / "file-0.json.zst").read_bytes() == damaged
    assert "file-0.json.zst" in report.read_text() and fetched.set_aside == f"quarantine/{aside.name}"
    again = fetch(store, made.name, place.data_dir)
    assert (again.bytes, again.set_aside) == (0, "")


def test_a_damaged_file_here_is_no_part_of_what_is_fetched(place: Settings) -> None:
    """It is of another backup, and is what a link would have been to."""
    made = make_set(place, "2026-11-21T14:00:00.000Z", SAME)
    store = store_of(place)
    store.put(made, NEVER)
    made.path.rename(made.path.with_name("2026-11-20T140000.000Z"))
    change_a_byte(made.path.with_name("2026-11-20T140000.000Z") / "file-0.json.zst")

    fetched = fetch(store, made.name, place.data_dir)

    assert b"".join(content_of(fetched.found, "file-0.json")) == SAME
    assert fetched.set_aside == "", "nobody asked for that one"


def test_what_rotted_there_is_not_handed_on(tmp_path: Path) -> None:
    """A file of an earlier copy is read before a later one shares it; when it is another by now, it is sent again."""
    second = tmp_path / "second"
    second.mkdir()
    settings = settings_for(tmp_path, str(second))
    store = store_of(settings)
    for day in (18, 19):
        store.put(make_set(settings, f"2026-11-{day}T14:00:00.000Z", SAME, OTHER), NEVER)
    change_a_byte(second / "2026-11-19T140000.000Z" / "file-0.json.zst")
    third = make_set(settings, "2026-11-20T14:00:00.000Z", SAME, OTHER)

    sent = store.put(third, NEVER)
    after = store.put(make_set(settings, "2026-11-21T14:00:00.000Z", SAME, OTHER), NEVER)

    assert sent.files == 1
    assert after.files == 0, "there is a good one again"
    for found in store.sets()[:2]:
        assert b"".join(content_of(found, "file-0.json")) == SAME


def test_an_object_that_nobody_has_read_again_is_sent_anew(tmp_path: Path, server: str) -> None:
    """It has the size, and belongs to no set: a copy was broken off, or came back changed."""
    settings = bucket_settings(tmp_path, server)
    store: Any = store_of(settings)
    made = make_set(settings, "2026-11-21T14:00:00.000Z", SAME, OTHER)
    assert made.manifest is not None
    stored = made.manifest.files["file-0.json"]
    store._send(f"objects/{stored.stored_sha256}", [bytes(stored.stored_bytes)])

    sent = store.put(made, NEVER)

    assert sent.files == 2
    assert sha256(b"".join(store.read(made, stored))) == stored.stored_sha256


def test_a_copy_that_can_no_longer_be_read_makes_room_for_a_good_one(tmp_path: Path) -> None:
    """It is put aside beside it, holds up no other copy, and goes when the sets of its time have gone."""
    second = tmp_path / "second"
    second.mkdir()
    settings = settings_for(tmp_path, str(second), copy_keep=2)
    store = store_of(settings)
    made = make_set(settings, "2026-11-19T14:00:00.000Z", SAME)
    store.put(made, NEVER)
    (second / made.name / SET_FILE).write_bytes(b"")
    later = make_set(settings, "2026-11-20T14:00:00.000Z", OTHER)

    copies = running(settings, Log())
    try:
        wait_until(lambda: len([one for one in store.sets() if one.manifest]) == 2)
        aside = second / f"damaged-{made.name}"
        assert aside.is_dir() and (second / later.name).is_dir() and not copies.state.failure
        make_set(settings, "2026-11-21T14:00:00.000Z", OTHER)
        wait_until(lambda: not (second / made.name).exists() and not aside.exists())
    finally:
        assert copies.close()


def test_what_was_left_half_done_there_is_removed(tmp_path: Path) -> None:
    """Of sets and of the history; what somebody else keeps there stays."""
    journal = tmp_path / "second" / "journal"
    journal.mkdir(parents=True)
    name = f"{1:020d}-{8:020d}.jsonl.zst"
    for one in (f".{name}.4711.tmp", name, "notes.txt"):
        (journal / one).write_bytes(b"events")
    (tmp_path / "second" / ".2026-11-21T140000.000Z.4711.tmp").mkdir()

    store_of(settings_for(tmp_path, str(tmp_path / "second"))).tidy()

    assert sorted(os.listdir(journal)) == [name, "notes.txt"]
    assert os.listdir(tmp_path / "second") == ["journal"]


def test_objects_that_no_set_needs_go_after_a_day(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before: the set they belong to may be on its way."""
    settings = bucket_settings(tmp_path, server)
    store: Any = store_of(settings)
    first = make_set(settings, "2026-11-20T14:00:00.000Z", b"only here", SAME)
    store.put(first, NEVER)
    store.put(make_set(settings, "2026-11-21T14:00:00.000Z", SAME), NEVER)
    store.remove(first.name)

    store.tidy()
    before = len(store._listed("objects"))
    monkeypatch.setattr(store_module, "ORPHAN_S", -60)
    store.tidy()

    assert (before, len(store._listed("objects"))) == (2, 1)
