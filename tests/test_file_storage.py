"""The drop-in storage class: lists in JSON files that are always whole, with backups beside them."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from datetime import time as day_time
from pathlib import Path
from typing import Any

import freezegun
import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import holdfast
from holdfast.compat import file_storage
from holdfast.compat.file_storage import (
    BackupNotFoundError,
    ConfigManager,
    CorruptedDataError,
    FileStorage,
    StorageError,
    recover_from_corruption,
)
from tests.crash.harness import FULL, ROOT, clean_environ, mounted, needs_root, needs_strace, report, spread

NAME = "orders.json"
FIRST: list[dict[str, Any]] = [{"id": 1, "text": "¿USB de 64GB? 🎶"}, {"id": 2, "lines": [1, 2.5, None, {"a": True}]}]
SECOND: list[dict[str, Any]] = [*FIRST, {"id": 3}]

RECORDS = st.lists(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(1 << 63), (1 << 64) - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=4,
        ),
        max_size=4,
    ),
    max_size=4,
)


@pytest.fixture
def storage(tmp_path: Path) -> FileStorage:
    return FileStorage(tmp_path / "files")


def damage(path: Path) -> bytes:
    """Cut *path* in half; what is left of it."""
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    return path.read_bytes()


def in_quarantine(storage: FileStorage) -> list[bytes]:
    return [path.read_bytes() for path in sorted((storage.base_dir / "quarantine").glob("*"))]


# Saving and loading.


def test_a_list_comes_back_as_it_was_saved(storage: FileStorage) -> None:
    """The file is JSON that any program reads, one record a line, and nothing of ours lies beside it but the lock."""
    assert storage.load(NAME) == []

    assert storage.save(NAME, FIRST) is True

    assert storage.load(NAME) == FIRST
    lines = (storage.base_dir / NAME).read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("[", "]", 4)
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == FIRST
    assert sorted(os.listdir(storage.base_dir)) == [".lock", "backups", NAME]
    assert storage.save(NAME, []) and storage.load(NAME) == json.loads((storage.base_dir / NAME).read_text()) == []


def test_a_name_without_json_gets_it(storage: FileStorage) -> None:
    """So that both names are the same file."""
    storage.save("orders", FIRST)

    assert storage.load("orders.json") == storage.load("orders") == FIRST
    assert (storage.base_dir / "orders.json").exists()


def test_dates_and_datetimes_become_iso(storage: FileStorage) -> None:
    """As isoformat writes them, with their zone when they have one."""
    noon = datetime(2026, 11, 21, 12, 0, 0, 123456)
    storage.save(NAME, [{"d": date(2026, 11, 21), "n": noon, "z": noon.replace(tzinfo=UTC), "t": [day_time(14, 3)]}])

    assert storage.load(NAME) == [
        {"d": "2026-11-21", "n": noon.isoformat(), "z": noon.replace(tzinfo=UTC).isoformat(), "t": ["14:03:00"]}
    ]


def test_files_of_the_bot_before_load(storage: FileStorage) -> None:
    """Pretty-printed, escaped, with NaN and integers of any size: as Python's json wrote them."""
    old = [{"name": "José", "n": 1 << 80, "x": math.inf}]
    (storage.base_dir / NAME).write_text(json.dumps(old, indent=4))

    assert storage.load(NAME) == old


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("no list", "list of dictionaries, found str"),
        ([{"a": 1}, 2], "found int at 1"),
        ([{"a": object()}], "record 0"),
        ([{"a": math.nan}], "NaN"),
        ([{"a": 1 << 64}], "64 bits"),
        ([{"a": "\ud800"}], "surrogate"),
        ([{1: 2}], "must be str"),
    ],
)
def test_what_cannot_be_kept_is_refused(data: Any, reason: str, storage: FileStorage) -> None:
    """With the reason and the place; the file is as before."""
    storage.save(NAME, FIRST)

    with pytest.raises(StorageError, match=reason) as refused:
        storage.save(NAME, data)

    assert refused.value.errno == errno.EINVAL
    assert storage.load(NAME) == FIRST


@pytest.mark.parametrize(
    "name",
    ["../x.json", "/etc/x.json", "a/b.json", "a\\b.json", "x\0.json", "..", ".", "", ".json", ".lock", "a\n.json",
     "\ud800.json", "x" * 201, 7],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(name: Any, storage: FileStorage) -> None:
    """By every function that takes one, before anything is read or written."""
    actions: list[Callable[[], object]] = [
        lambda: storage.save(name, FIRST),
        lambda: storage.load(name),
        lambda: storage.create_backup(name),
        lambda: storage.restore_from_backup(name),
        lambda: storage.delete_old_backups(name),
        lambda: storage.list_backups(name),
        lambda: recover_from_corruption(storage, name),
    ]
    for action in actions:
        with pytest.raises(StorageError, match="filename") as refused:
            action()
        assert refused.value.errno == errno.EINVAL

    assert sorted(os.listdir(storage.base_dir)) == [".lock", "backups"]


def test_the_longest_name(storage: FileStorage) -> None:
    """Has room for its backups and temporaries as well."""
    name = "é" * 97 + "x.json"
    assert len(name.encode()) == file_storage.NAME_BYTES_MAX

    storage.save(name, FIRST)
    storage.save(name, SECOND)

    assert storage.create_backup(name).exists() and storage.load(name) == SECOND
    with pytest.raises(StorageError, match="200 bytes at most, found 201"):
        storage.save("x" + name, FIRST)


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_what_is_no_file_is_left_alone(kind: str, storage: FileStorage, tmp_path: Path) -> None:
    """A link leads nowhere, a pipe is not waited for; whatever stands there stands there afterwards."""
    place, outside = storage.base_dir / NAME, tmp_path / "outside.json"
    outside.write_text("[]")
    {
        "link": lambda: place.symlink_to(outside),
        "directory": place.mkdir,
        "pipe": lambda: os.mkfifo(place),
    }[kind]()
    before = place.lstat()

    for action in (lambda: storage.save(NAME, FIRST), lambda: storage.load(NAME), lambda: storage.create_backup(NAME)):
        with pytest.raises(StorageError):
            action()

    assert (place.lstat().st_ino, outside.read_text()) == (before.st_ino, "[]")


# Backups.


def test_a_backup_is_made_listed_and_restored(storage: FileStorage) -> None:
    """By a name with its local time; restoring brings back what the file held then."""
    storage.save(NAME, FIRST)
    before = datetime.now().replace(microsecond=0)
    backup = storage.create_backup(NAME)
    storage.save(NAME, SECOND)

    assert re.fullmatch(r"orders_\d{8}_\d{6}\.json", backup.name) and json.loads(backup.read_text()) == FIRST
    [listed] = storage.list_backups(NAME)
    assert listed["filename"] == backup.name and listed["size"] == backup.stat().st_size
    assert before <= datetime.fromisoformat(listed["timestamp"]) <= datetime.now()
    assert storage.restore_from_backup(NAME) is True
    assert storage.load(NAME) == FIRST


def test_backups_within_one_second(storage: FileStorage) -> None:
    """Do not take each other's place: each has a second of its own, in their order."""
    with freezegun.freeze_time("2026-11-21 14:03:00", real_asyncio=True):
        for number in range(5):
            storage.save(NAME, [{"n": number}])
            storage.create_backup(NAME)
        listed = storage.list_backups(NAME)

    assert [one["filename"] for one in listed] == [f"orders_20261121_14030{second}.json" for second in (4, 3, 2, 1, 0)]
    for number, one in zip((4, 3, 2, 1, 0), listed, strict=True):
        storage.restore_from_backup(NAME, one["timestamp"])
        assert storage.load(NAME) == [{"n": number}]


def test_a_clock_set_back_does_not_make_a_new_backup_the_oldest(storage: FileStorage) -> None:
    """It has the second behind the newest one, so that neither restoring nor deleting takes the wrong one."""
    for now, records in (("2026-11-21 14:03:00", FIRST), ("2024-01-01 00:00:00", SECOND)):
        with freezegun.freeze_time(now, real_asyncio=True):
            storage.save(NAME, records)
            storage.create_backup(NAME)

    assert [one["filename"] for one in storage.list_backups(NAME)] == [
        "orders_20261121_140301.json",
        "orders_20261121_140300.json",
    ]
    assert storage.delete_old_backups(NAME, 1) == 1
    assert storage.restore_from_backup(NAME) and storage.load(NAME) == SECOND


@pytest.mark.parametrize(
    "form",
    [
        "2026-11-21T14:03:00",
        "2026-11-21 14:03:00.789",
        "20261121_140300",
        "orders_20261121_140300.json",
        datetime(2026, 11, 21, 14, 3, 0, 5),
        datetime(2026, 11, 21, 14, 3).astimezone(UTC),
        datetime(2026, 11, 21, 14, 3).astimezone(UTC).isoformat(),
    ],
)
def test_a_backup_is_named_by_its_time(form: str | datetime, storage: FileStorage) -> None:
    """As text or datetime, with a zone or local."""
    for second, records in ((0, FIRST), (1, SECOND)):
        (storage.backup_dir / f"orders_20261121_14030{second}.json").write_text(json.dumps(records))

    storage.restore_from_backup(NAME, form)

    assert storage.load(NAME) == FIRST


@pytest.mark.parametrize("form", ["2026-11-21T14:03:00Z", datetime(2026, 11, 21, 14, 3, tzinfo=UTC)])
def test_a_time_with_a_zone_is_that_moment(
    form: str | datetime, storage: FileStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is called here, where names are local."""
    monkeypatch.setenv("TZ", "America/Bogota")
    time.tzset()
    try:
        for hour, records in ((9, FIRST), (14, SECOND)):
            (storage.backup_dir / f"orders_20261121_{hour:02}0300.json").write_text(json.dumps(records))

        storage.restore_from_backup(NAME, form)

        assert storage.load(NAME) == FIRST
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_backup_that_is_not_there(storage: FileStorage) -> None:
    """The error names those that are; a time that is none is refused; the file is as before."""
    storage.save(NAME, SECOND)
    with pytest.raises(BackupNotFoundError, match="there are: none"):
        storage.restore_from_backup(NAME)
    (storage.backup_dir / "orders_20261121_140300.json").write_text("[]")

    with pytest.raises(BackupNotFoundError, match=r"of 2026-11-21T14:04:00 .* there are: 2026-11-21T14:03:00") as error:
        storage.restore_from_backup(NAME, datetime(2026, 11, 21, 14, 4))
    assert error.value.errno == errno.ENOENT
    with pytest.raises(StorageError, match="found 'yesterday'"):
        storage.restore_from_backup(NAME, "yesterday")
    assert storage.load(NAME) == SECOND


def test_backups_of_one_file_are_not_those_of_another(storage: FileStorage) -> None:
    """Whatever their names begin with, and what only looks like a backup is none."""
    for name in ("orders.json", "orders_x.json", "orders_20261121_140300.json"):
        storage.save(name, [{"name": name}])
        storage.create_backup(name)
    (storage.backup_dir / "orders_99999999_999999.json").write_text("[]")
    (storage.backup_dir / "orders_2026.json").write_text("[]")

    assert [len(storage.list_backups(name)) for name in ("orders", "orders_x", "orders_20261121_140300")] == [1, 1, 1]
    assert len(storage.list_backups()) == 3
    assert storage.delete_old_backups("orders", 0) == 1 and len(storage.list_backups()) == 2


def test_old_backups_are_deleted(storage: FileStorage) -> None:
    """All but the newest ten, or so many; how many went is returned."""
    storage.save(NAME, FIRST)
    names = [storage.create_backup(NAME).name for _ in range(13)]

    assert storage.delete_old_backups(NAME) == 3
    assert [one["filename"] for one in storage.list_backups(NAME)] == names[:2:-1]
    assert (storage.delete_old_backups(NAME), storage.delete_old_backups(NAME, 9)) == (0, 1)
    with pytest.raises(ValueError, match="0 or more"):
        storage.delete_old_backups(NAME, -1)


def test_the_newest_whole_backup_is_not_deleted(storage: FileStorage) -> None:
    """When those after it are damaged, it is all there is."""
    storage.save(NAME, FIRST)
    backups = [storage.create_backup(NAME) for _ in range(5)]
    for backup in backups[2:]:
        damage(backup)

    assert storage.delete_old_backups(NAME, 2) == 2

    assert storage.restore_from_backup(NAME) and storage.load(NAME) == FIRST


def test_a_backup_of_nothing_whole(storage: FileStorage) -> None:
    """What is missing or damaged does not become the newest backup."""
    with pytest.raises(StorageError, match="save it first") as missing:
        storage.create_backup(NAME)
    storage.save(NAME, FIRST)
    damage(storage.base_dir / NAME)
    with pytest.raises(CorruptedDataError, match="not backed up"):
        storage.create_backup(NAME)

    assert missing.value.errno == errno.ENOENT and storage.list_backups(NAME) == []


def test_a_damaged_backup_is_not_restored(storage: FileStorage, caplog: pytest.LogCaptureFixture) -> None:
    """The newest whole one is, unless the damaged one was asked for; the file is as before then."""
    storage.save(NAME, FIRST)
    storage.create_backup(NAME)
    storage.save(NAME, SECOND)
    damage(storage.create_backup(NAME))
    newest = storage.list_backups(NAME)[0]["timestamp"]

    with pytest.raises(CorruptedDataError, match="restore another one"):
        storage.restore_from_backup(NAME, newest)
    assert storage.load(NAME) == SECOND
    storage.restore_from_backup(NAME)
    assert storage.load(NAME) == FIRST and "passed over" in caplog.text


# Damage.


DAMAGES = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "zeros": lambda raw: b"\0" * len(raw),
    "no text": lambda raw: b"\xff" + raw,
    "an object": lambda raw: b'{"a": 1}',
    "no objects": lambda raw: b"[1, 2]",
    "deep": lambda raw: b"[" * 200_000,
    "a large number": lambda raw: b'[{"n": ' + b"9" * 5_000 + b"}]",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_recovered_from_its_newest_backup(
    kind: str, storage: FileStorage, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning that names it, and what was damaged kept as it was."""
    storage.save(NAME, FIRST)
    storage.create_backup(NAME)
    storage.save(NAME, SECOND)
    backup = storage.create_backup(NAME)
    place = storage.base_dir / NAME
    place.write_bytes(DAMAGES[kind](place.read_bytes()))
    damaged = place.read_bytes()

    with caplog.at_level(logging.WARNING):
        assert storage.load(NAME) == SECOND

    assert json.loads(place.read_bytes()) == SECOND and in_quarantine(storage) == [damaged]
    [record] = caplog.records
    assert record.levelname == "WARNING" and str(backup) in record.getMessage()
    assert storage.load(NAME) == SECOND and len(in_quarantine(storage)) == 1


def test_without_a_backup_what_the_last_save_replaced_is_used(storage: FileStorage) -> None:
    """So is it when the backups are older than it; damaged backups are passed over."""
    storage.save(NAME, FIRST)
    storage.save(NAME, SECOND)
    damage(storage.base_dir / NAME)
    assert storage.load(NAME) == FIRST

    damage(storage.create_backup(NAME))
    storage.save(NAME, SECOND)
    storage.save(NAME, [])
    damage(storage.base_dir / NAME)
    assert storage.load(NAME) == SECOND


def test_damaged_beyond_recovery(storage: FileStorage) -> None:
    """An error that says what to do; nothing is changed, and nobody goes on with an empty list."""
    storage.save(NAME, FIRST)
    damaged = damage(storage.base_dir / NAME)

    with pytest.raises(CorruptedDataError, match="no backup that is whole") as refused:
        storage.load(NAME)

    assert refused.value.errno == errno.EIO and isinstance(refused.value, StorageError)
    assert (storage.base_dir / NAME).read_bytes() == damaged
    assert recover_from_corruption(storage, NAME) is False


def test_recovering_by_hand(storage: FileStorage) -> None:
    """True when the file is whole afterwards, and when it was before."""
    storage.save(NAME, FIRST)
    assert recover_from_corruption(storage, NAME) is True
    storage.create_backup(NAME)
    damage(storage.base_dir / NAME)

    assert recover_from_corruption(storage, NAME) is True
    assert json.loads((storage.base_dir / NAME).read_text()) == FIRST


@needs_root
@pytest.mark.root
def test_recovering_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever loads has the backup's content, and the file is mended by a load when there is room."""
    with mounted(tmp_path / "disk", "size=256k") as disk:
        storage = FileStorage(disk / "files")
        storage.save(NAME, FIRST)
        storage.create_backup(NAME)
        damaged = damage(storage.base_dir / NAME)
        with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)

        assert storage.load(NAME) == FIRST
        assert (storage.base_dir / NAME).read_bytes() == damaged and "stays damaged for now" in caplog.text
        (disk / "filler").unlink()
        assert storage.load(NAME) == json.loads((storage.base_dir / NAME).read_text()) == FIRST


# A model.


class Model(RuleBasedStateMachine):
    """Any sequence of calls does what the same does to plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(os.environ["FILE_STORAGE_MODEL"]) / str(id(self))
        self.storage = FileStorage(self.place)
        self.held: list[dict[str, Any]] | None = None
        self.backups: list[list[dict[str, Any]]] = []

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    @rule(records=RECORDS)
    def save(self, records: list[dict[str, Any]]) -> None:
        self.storage.save(NAME, records)
        self.held = records

    @precondition(lambda self: self.held is not None)
    @rule()
    def back_up(self) -> None:
        assert self.held is not None
        self.storage.create_backup(NAME)
        self.backups.append(self.held)

    @precondition(lambda self: self.backups)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.backups) - 1))
        listed = self.storage.list_backups(NAME)[::-1]
        self.storage.restore_from_backup(NAME, listed[index]["timestamp"] if index + 1 < len(listed) else None)
        self.held = self.backups[index]

    @rule(keep=st.integers(0, 3))
    def delete(self, keep: int) -> None:
        gone = max(0, len(self.backups) - keep)
        assert self.storage.delete_old_backups(NAME, keep) == gone
        del self.backups[:gone]

    @precondition(lambda self: self.backups)
    @rule()
    def back_up_and_damage(self) -> None:
        self.back_up()
        damage(self.place / NAME)

    @precondition(lambda self: self.held is not None)
    @rule()
    def export_and_import(self) -> None:
        outside = self.place / "export"
        self.storage.export_data(outside)
        held = self.held
        self.save([])
        self.storage.import_data(outside)
        self.held = held
        self.backups.append([])

    @invariant()
    def is_as_the_model_says(self) -> None:
        assert self.storage.load(NAME) == (self.held or [])
        listed = [json.loads((self.storage.backup_dir / one["filename"]).read_bytes())
                  for one in self.storage.list_backups(NAME)]  # fmt: skip
        assert listed == self.backups[::-1]


def test_any_sequence_of_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and backups hold what a plain list of lists would."""
    monkeypatch.setenv("FILE_STORAGE_MODEL", str(tmp_path))
    Model.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
    Model.TestCase("runTest").runTest()


# Export and import.


def test_everything_moves_in_one_file(storage: FileStorage, tmp_path: Path) -> None:
    """Into another directory; files that it has and the export has not stay; those replaced are backed up first."""
    storage.save(NAME, SECOND)
    storage.save("users.json", FIRST)
    other = FileStorage(tmp_path / "other")
    other.save(NAME, FIRST)
    other.save("own.json", FIRST)

    assert storage.export_data(tmp_path / "all.export") is True
    assert other.import_data(str(tmp_path / "all.export")) is True

    assert [other.load(name) for name in (NAME, "users.json", "own.json")] == [SECOND, FIRST, FIRST]
    assert other.restore_from_backup(NAME) and other.load(NAME) == FIRST
    exported = json.loads((tmp_path / "all.export").read_text())
    assert exported["format"] == 1 and sorted(exported["files"]) == [NAME, "users.json"]


def test_an_export_leaves_out_what_is_somebody_elses(
    storage: FileStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A JSON object is none of our lists, and said so; a list damaged beyond recovery stops the export."""
    storage.save(NAME, FIRST)
    (storage.base_dir / "package.json").write_text('{"name": "bot"}')
    (storage.base_dir / "bot.log").write_text("started")

    storage.export_data(tmp_path / "export")
    assert list(json.loads((tmp_path / "export").read_text())["files"]) == [NAME]
    assert "package.json" in caplog.text

    damage(storage.base_dir / NAME)
    with pytest.raises(CorruptedDataError):
        storage.export_data(tmp_path / "another")
    assert not (tmp_path / "another").exists()


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ('{"format": 1, "files": {"a.json": [{"n": 1}', CorruptedDataError, "not a whole export"),
        ("[]", CorruptedDataError, "no export"),
        ('{"format": 1}', CorruptedDataError, "no export"),
        ('{"format": 2, "files": {}}', StorageError, "has format 2, this version knows 1"),
        ('{"format": 1, "files": {"orders.json": [], "../x": []}}', StorageError, "filename"),
        ('{"format": 1, "files": {"orders.json": [], "x.json": [1]}}', StorageError, "found int at 0"),
    ],
)
def test_an_import_that_is_wrong_changes_nothing(
    text: str, kind: type[StorageError], reason: str, storage: FileStorage, tmp_path: Path
) -> None:
    """Not even the files that are right in it."""
    storage.save(NAME, FIRST)
    (tmp_path / "export").write_text(text)

    with pytest.raises(kind, match=reason):
        storage.import_data(tmp_path / "export")

    assert storage.load(NAME) == FIRST and storage.list_backups() == []
    assert not (tmp_path / "x.json").exists()


def test_an_export_that_is_not_there(storage: FileStorage, tmp_path: Path) -> None:
    """Says so by its path."""
    with pytest.raises(StorageError, match="missing") as missing:
        storage.import_data(tmp_path / "missing")
    with pytest.raises(StorageError):
        storage.export_data(tmp_path / "no" / "where")

    assert missing.value.errno == errno.ENOENT


# Settings of a bot.


def test_settings_have_defaults_and_are_saved_at_once(storage: FileStorage) -> None:
    """Another one sees what was set; keys of the bot's own are kept."""
    config = ConfigManager(storage)
    assert {name: config.get(name) for name in file_storage.DEFAULT_CONFIG} == {
        "backup_enabled": True,
        "backup_count": 10,
        "auto_save": True,
        "auto_save_interval": 60,
        "data_format": "json",
        "date_format": "%Y-%m-%d",
        "time_format": "%H:%M:%S",
    }
    assert (config.get("mine"), config.get("mine", 7)) == (None, 7)

    assert config.set("backup_count", 3) and config.set("mine", {"a": date(2026, 11, 21)})

    other = ConfigManager(FileStorage(storage.base_dir))
    assert (other.get("backup_count"), other.get("mine"), other.get("auto_save")) == (3, {"a": "2026-11-21"}, True)
    other.config["auto_save"] = False
    assert other.save_config() and config.load_config()["auto_save"] is False
    assert config.get("auto_save") is False


def test_a_setting_is_the_same_before_and_after_it_is_loaded_again(storage: FileStorage) -> None:
    """As it is stored: a date is text, a tuple a list."""
    config = ConfigManager(storage)
    config.set("since", {"day": date(2026, 11, 21), "at": datetime(2026, 11, 21, 14, 3), "of": (1, 2)})
    config.config["until"] = date(2026, 12, 1)
    config.save_config()
    seen = dict(config.config)

    assert config.get("since") == {"day": "2026-11-21", "at": "2026-11-21T14:03:00", "of": [1, 2]}
    assert config.get("until") == "2026-12-01"
    assert seen == config.load_config()


def test_a_setting_that_cannot_be_saved_is_not_set(storage: FileStorage) -> None:
    """What is refused leaves the old value, here and in the file."""
    config = ConfigManager(storage)
    config.set("backup_count", 3)

    with pytest.raises(StorageError):
        config.set("backup_count", math.nan)

    assert config.get("backup_count") == ConfigManager(storage).get("backup_count") == 3


# The directory.


def test_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what is named, else in DATA_DIR, else in data; made with parents, for the owner alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_DIR", raising=False)
    assert FileStorage().base_dir == Path("data")
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "a" / "b"))

    storage = FileStorage()
    storage.save(NAME, FIRST)

    assert storage.base_dir == tmp_path / "a" / "b" and storage.backup_dir == storage.base_dir / "backups"
    modes = [(path.stat().st_mode & 0o777) for path in (storage.base_dir, storage.backup_dir, storage.base_dir / NAME)]
    assert modes == [0o700, 0o700, 0o600]


def test_a_directory_of_holdfast_is_refused(tmp_path: Path) -> None:
    """With what to use instead, also when it became one later; the files imported there are there."""
    storage = FileStorage(tmp_path / "data")
    storage.save("notes.json", [{"id": "n1", "text": "hola"}])
    with holdfast.open(tmp_path / "data") as hf:
        assert hf.collection("notes").get("n1") == {"id": "n1", "text": "hola"}

        for action in (lambda: FileStorage(tmp_path / "data"), lambda: storage.save(NAME, FIRST)):
            with pytest.raises(StorageError, match=r"use holdfast\.open") as refused:
                action()
            assert refused.value.errno == errno.EBUSY


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    """The error is told at once, with its number."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StorageError, match="cannot be used") as refused:
        FileStorage(tmp_path / "file")

    assert refused.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_what_a_killed_process_left_is_removed(storage: FileStorage) -> None:
    """At the next start, temporaries only."""
    for place in (storage.base_dir, storage.backup_dir):
        (place / f".{NAME}.4711.tmp").write_text("[")
    (storage.base_dir / ".env").write_text("mine")

    FileStorage(storage.base_dir)

    assert sorted(os.listdir(storage.base_dir)) == [".env", ".lock", "backups"] and not os.listdir(storage.backup_dir)


# Several at once.


WORKER = """
import sys
from holdfast.compat.file_storage import FileStorage
storage = FileStorage(sys.argv[1])
for number in range(10):
    storage.save("orders.json", [{"by": sys.argv[2], "n": n} for n in range(number * 50)])
    storage.create_backup("orders.json")
    assert len({one["by"] for one in storage.load("orders.json")}) <= 1
"""


def test_threads_and_processes_at_once(storage: FileStorage) -> None:
    """Every file is one that somebody saved whole, and no backup takes the place of another."""
    wrong: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for number in range(10):
                storage.save(NAME, [{"by": name, "n": n} for n in range(number * 50)])
                storage.create_backup(NAME)
                assert len({one["by"] for one in storage.load(NAME)}) <= 1
        except BaseException as error:
            wrong.append(error)

    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(storage.base_dir), str(number)], env=clean_environ(), cwd=ROOT
        )
        for number in range(2)
    ]
    threads = [threading.Thread(target=work, args=(f"thread {number}",)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    codes = [process.wait(60) for process in processes]

    assert (codes, wrong) == ([0, 0], [])
    assert len(storage.list_backups(NAME)) == 40
    for one in storage.list_backups(NAME):
        assert len({line["by"] for line in json.loads((storage.backup_dir / one["filename"]).read_text())}) <= 1


def test_a_lock_that_nobody_lets_go(storage: FileStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is not waited for without end; a file that is whole can be loaded meanwhile."""
    import fcntl

    storage.save(NAME, FIRST)
    monkeypatch.setattr(file_storage, "LOCK_S", 0.1)
    with (storage.base_dir / ".lock").open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(StorageError, match="see who holds") as busy:
            storage.save(NAME, SECOND)
        assert busy.value.errno == errno.EBUSY
        assert storage.load(NAME) == FIRST
    storage.save(NAME, SECOND)


# Broken disks.


@needs_root
@pytest.mark.root
def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """The save raises with errno 28; file and backups are as before, nothing half written stays, with room it goes on."""
    with mounted(tmp_path / "disk", "size=256k") as disk:
        storage = FileStorage(disk)
        storage.save(NAME, FIRST)
        storage.create_backup(NAME)
        before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}

        with pytest.raises(StorageError, match="no room") as full:
            storage.save(NAME, [{"text": "x" * 1_000} for _ in range(400)])

        assert full.value.errno == errno.ENOSPC
        assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
        assert storage.save(NAME, SECOND) and storage.load(NAME) == SECOND


LIFE = """
import sys
from datetime import datetime
from holdfast.compat.file_storage import FileStorage
storage = FileStorage(sys.argv[1])
print("begun", flush=True)
for number in (1, 2):
    storage.save("orders.json", [{"n": number}] * 3)
    print("saved", flush=True)
    storage.create_backup("orders.json")
    print("saved", flush=True)
print(storage.delete_old_backups("orders.json", 1), flush=True)
"""
CHANGING = ("write", "fsync", "rename", "renameat", "unlinkat", "linkat", "mkdirat", "mkdir", "openat", "flock")


@needs_strace
@pytest.mark.crash
def test_killed_at_every_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before whichever system call it ends, the file is a whole one, not older than the last save that returned."""
    command = [sys.executable, "-c", LIFE]
    strace = ["strace", "-f", "-qq"]
    trace = tmp_path / "trace"
    subprocess.run(
        [*strace, "-o", str(trace), "-e", f"trace={','.join(CHANGING)}", *command, str(tmp_path / "whole")],
        env=clean_environ(), cwd=ROOT, check=True, timeout=60,
    )  # fmt: skip
    counts: Counter[str] = Counter()
    places = []
    begun = False
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        assert call is not None, line
        counts[call[1]] += 1
        begun = begun or '"begun' in line
        if begun and call[1] != "openat":
            places.append((call[1], counts[call[1]]))
    assert len(places) > 30
    chosen = [places[index - 1] for index in spread(len(places), len(places) if FULL else 9)]

    for name, number in chosen:
        base = tmp_path / f"{name}{number}"
        killed = subprocess.run(
            [*strace, "-o", "/dev/null", "-e", f"trace={name}", "-e", f"inject={name}:signal=KILL:when={number}",
             *command, str(base)],
            env=clean_environ(), cwd=ROOT, check=False, timeout=60, capture_output=True, text=True,
        )  # fmt: skip
        assert killed.returncode == -9, killed.stderr
        done = killed.stdout.count("saved")
        storage = FileStorage(base)
        held = [one["n"] for one in storage.load(NAME)]
        saved = (done + 1) // 2
        assert held in ([[] if n == 0 else [n] * 3 for n in (saved, saved + 1)]), (name, number, held, done)
        backups = [json.loads((storage.backup_dir / one["filename"]).read_text())[0]["n"]
                   for one in storage.list_backups(NAME)]  # fmt: skip
        allowed = {0: [[]], 1: [[], [1]], 2: [[1]], 3: [[1], [2, 1]], 4: [[2, 1], [2]]}
        assert backups in allowed[done], (name, number, backups)
        assert not list(base.rglob("*.tmp"))
        shutil.rmtree(base)
    report(capsys, f"killed at {len(chosen)} of {len(places)} calls of save, backup and rotation: every file whole")


def test_a_timestamp_is_local(storage: FileStorage) -> None:
    """The one that the clock on the wall shows, as the bots before wrote it."""
    storage.save(NAME, FIRST)

    made_at = datetime.strptime(storage.create_backup(NAME).stem.partition("_")[2], "%Y%m%d_%H%M%S")

    assert abs(made_at - datetime.now()) < timedelta(seconds=5)
