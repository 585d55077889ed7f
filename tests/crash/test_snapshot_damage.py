"""Fault 13: snapshot files damaged in every way: no hang, every whole record back, the evidence kept."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest

from holdfast.engine import Engine
from tests.crash.harness import FULL, SEED, Recorder, complaints, contents, do, reopened, report
from tests.crash.legacy import write_legacy
from tests.crash.oracle import Ledger

pytestmark = [pytest.mark.crash, pytest.mark.timeout(3600 if FULL else 120)]

FILE = "chat_sessions.json"
STARTS_S = 5.0
CUTS = 200 if FULL else 40
FLIPS = 400 if FULL else 40


class Directory(NamedTuple):
    """A data directory whose sessions are about to be damaged.

    Attributes:
        path: of it.
        sessions: what each session is, by id.
        files: all files as they should be.
        mtime_ns: of the file with the sessions.
    """

    path: Path
    sessions: dict[str, dict[str, Any]]
    files: dict[str, bytes]
    mtime_ns: int

    @property
    def raw(self) -> bytes:
        return self.files[FILE]

    def spoil(self, raw: bytes) -> None:
        """Put the directory back, but for the sessions; nobody seems to have written those."""
        shutil.rmtree(self.path)
        for name, content in (self.files | {FILE: raw}).items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.write_bytes(content)
        os.utime(self.path / FILE, ns=(self.mtime_ns, self.mtime_ns))

    def whole(self, raw: bytes) -> dict[str, dict[str, Any]]:
        """The sessions whose text stands unchanged in *raw*."""
        return {id: value for id, value in self.sessions.items() if self._texts[id] in raw}

    @property
    def _texts(self) -> dict[str, bytes]:
        if not _texts_of.get(self.raw):
            begin = b'{"recipientPhone"' if self.raw.startswith(b"[\n{") else b'  {\n    "recipientPhone"'
            starts = _all(self.raw, begin)
            ends = [*starts[1:], len(self.raw)]
            texts = [self.raw[start:end].rstrip(b" \n,]") for start, end in zip(starts, ends, strict=True)]
            _texts_of[self.raw] = {json.loads(text)["recipientPhone"]: text for text in texts}
        return _texts_of[self.raw]


_texts_of: dict[bytes, dict[str, bytes]] = {}


@pytest.fixture(params=["legacy", "ours"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Directory:
    """A directory of an old bot, and the same one after Holdfast flushed it."""
    path = tmp_path / "data"
    rows = write_legacy(path)
    if request.param == "ours":
        engine = reopened(path)
        engine.flush("api")
        engine.close()
        # What a backup brings back is a test of its own.
        shutil.rmtree(path / "backups")
    sessions = {row["recipientPhone"]: row for row in rows}
    return Directory(path, sessions, contents(path), (path / FILE).stat().st_mtime_ns)


def test_truncated(directory: Directory, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut anywhere: every whole record before the cut is back, the start says how many, the file is in quarantine."""
    raw = directory.raw
    # The last cut spares the closing bracket's line only, so that something is always missing.
    cuts = [round(index * (len(raw) - 4) / (CUTS - 1)) for index in range(CUTS)]
    for cut in cuts:
        directory.spoil(raw[:cut])

        with _started(directory.path) as (engine, log):
            expected = directory.whole(raw[:cut])
            _assert_saved(directory, engine, log, expected, raw[:cut], f"cut at {cut}")
    report(capsys, f"truncated at {len(cuts)} of {len(cuts)} points: every whole record back, each in quarantine")


def test_bits_flipped(directory: Directory, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit changed anywhere costs at most its own record; in a file of ours it is always noticed."""
    is_ours = "manifest.json" in directory.files
    chance = random.Random(SEED)
    noticed = 0
    flips = [(chance.randrange(len(directory.raw)), chance.randrange(8)) for _ in range(FLIPS)]
    # The brackets and what stands between records, too.
    begin = _all(directory.raw, b'{\n    "recipientPhone"') or _all(directory.raw, b'{"recipientPhone"')
    flips += [
        (begin[index] - back, bit)
        for index in (0, 1, 30)
        for back in (1, 2, 3, 4)
        for bit in (1, 6, 7)
        if begin[index] >= back
    ]
    for place, bit in flips:
        raw = bytearray(directory.raw)
        raw[place] ^= 1 << bit
        directory.spoil(bytes(raw))

        with _started(directory.path) as (engine, _):
            found = _sessions(engine)
            for id, value in directory.whole(bytes(raw)).items():
                assert found.get(id) == value, (place, bit, id)
            assert len(found) <= len(directory.sessions) + 1
            noticed += bool(engine.degraded)
            if is_ours:
                assert engine.degraded, (place, bit)
                assert bytes(raw) in contents(directory.path / "quarantine").values()
    report(capsys, f"{len(flips)} bits flipped: {noticed} noticed, every other record back")


@pytest.mark.parametrize(
    ("name", "spoil", "share"),
    [
        ("empty", lambda raw: b"", 0),
        ("zeroed", lambda raw: bytes(len(raw)), 0),
        ("zeroed in the middle", lambda raw: raw[: len(raw) // 3] + bytes(600) + raw[len(raw) // 3 + 600 :], None),
        ("doubled", lambda raw: raw + raw, 1),
        ("byte order mark", lambda raw: b"\xef\xbb\xbf" + raw, 1),
        ("garbage", lambda raw: b"this is not json\n" * 50, 0),
        ("not a list", lambda raw: b'{"sessions": "gone"}', 0),
        ("bad UTF-8", lambda raw: raw[: len(raw) // 2] + b"\xff\xfe" + raw[len(raw) // 2 :], None),
        ("deeply nested", lambda raw: b"[" * 100_000, 0),
    ],
)
def test_content_spoilt(directory: Directory, name: str, spoil: Callable[[bytes], bytes], share: int | None) -> None:
    """Whatever the content became, every whole record is back, and it is told with counts."""
    raw = spoil(directory.raw)
    expected = directory.whole(raw)
    assert share is None or len(expected) == share * len(directory.sessions)
    directory.spoil(raw)

    with _started(directory.path) as (engine, log):
        if name == "byte order mark" and "manifest.json" not in directory.files:
            assert _sessions(engine) == expected and engine.degraded == []  # an editor's work, no damage
        else:
            _assert_saved(directory, engine, log, expected, raw, name)


@pytest.mark.parametrize("kind", ["directory", "FIFO", "symlink", "dangling symlink", "10 GB sparse", "socket"])
def test_not_a_file(directory: Directory, kind: str, tmp_path: Path) -> None:
    """What is no readable file is set aside, never followed, and never waited for."""
    directory.spoil(directory.raw)
    path, outside = directory.path / FILE, tmp_path / "outside"
    outside.write_bytes(directory.raw)
    path.unlink()
    match kind:
        case "directory":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "symlink":
            path.symlink_to(outside)
        case "dangling symlink":
            path.symlink_to(tmp_path / "nowhere")
        case "10 GB sparse":
            with path.open("wb") as file:
                file.truncate(10 << 30)
        case "socket":
            import socket

            # A path of at most 108 bytes.
            with socket.socket(socket.AF_UNIX) as end:
                here = Path.cwd()
                os.chdir(directory.path)
                try:
                    end.bind(FILE)
                finally:
                    os.chdir(here)

    with _started(directory.path) as (engine, log):
        assert _sessions(engine) == {}
        assert engine.degraded
        assert [fields["file"] for fields in log.fields("snapshot.damaged")] == [FILE]
        assert any(entry.name.endswith(FILE) for entry in (directory.path / "quarantine").iterdir())
        engine.flush("api")
    assert outside.read_bytes() == directory.raw
    assert not (tmp_path / "nowhere").exists()
    with _started(directory.path) as (engine, _):
        assert engine.degraded == []


def test_mode_0000(directory: Directory) -> None:
    """A file without permissions: root reads it all the same; for others it is told and set aside."""
    directory.spoil(directory.raw)
    (directory.path / FILE).chmod(0)

    with _started(directory.path) as (engine, _):
        if os.geteuid() == 0:
            assert _sessions(engine) == directory.sessions
        else:
            assert _sessions(engine) == {} and engine.degraded


@pytest.mark.parametrize("name", ["manifest.json", "sales_stats.json", "pending_orders.json", "_keys.json"])
def test_a_start_survives_any_other_damage(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damage to any other file of ours loses no session, and no acknowledged change that the journal still holds."""
    ledger = Ledger(0, SEED)
    engine = reopened(tmp_path / "data")
    _live(engine, ledger, 60)
    engine.flush("api")
    _live(engine, ledger, 30)
    engine.close(flush=False)
    pristine, mtime_ns = contents(tmp_path / "data"), (tmp_path / "data" / name).stat().st_mtime_ns
    raw = pristine[name]
    chance = random.Random(SEED)
    damaged = [raw[:cut] for cut in range(0, len(raw), max(1, len(raw) // (100 if FULL else 8)))]
    for place in (
        range(len(raw)) if FULL and name == "manifest.json" else [chance.randrange(len(raw)) for _ in range(25)]
    ):
        flipped = bytearray(raw)
        flipped[place] ^= 1 << chance.randrange(8)
        damaged.append(bytes(flipped))
    if name == "manifest.json":
        at = raw.index(b'"snapshot_seq": ') + len(b'"snapshot_seq": ')
        damaged += [raw[:at] + digit + raw[at + 1 :] for digit in (b"1", b"4", b"7", b"9")]
    lost = []
    for index, content in enumerate(damaged):
        if content == raw:
            continue
        data_dir = tmp_path / f"copy{index}"
        for file, kept in (pristine | {name: content}).items():
            (data_dir / file).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (data_dir / file).write_bytes(kept)
        os.utime(data_dir / name, ns=(mtime_ns, mtime_ns))
        log = Recorder()
        wrong = [text for text in complaints(data_dir, [ledger], log) if "sessions'" in text]
        noticed = log.fields("snapshot.damaged") or log.fields("journal.damaged")
        if wrong or not noticed:
            lost.append(
                (
                    index,
                    len(content),
                    content[-60:] if len(content) < len(raw) else _difference(raw, content),
                    wrong[:2],
                )
            )
        shutil.rmtree(data_dir)
    assert not lost, lost[:5]
    report(capsys, f"{name} damaged in {len(damaged)} ways: all noticed, 0 sessions lost or changed")


def _difference(raw: bytes, changed: bytes) -> bytes:
    place = next(index for index, (one, other) in enumerate(zip(raw, changed, strict=True)) if one != other)
    return changed[max(0, place - 30) : place + 10]


def _live(engine: Engine, ledger: Ledger, steps: int) -> None:
    for _ in range(steps):
        do(engine, ledger.propose())
        ledger.acknowledge()


class _started:
    """An engine on a damaged directory, which must come up in time and close again."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[Engine, Recorder]:
        log = Recorder()
        started = time.monotonic()
        self._engine = reopened(self._path, log)
        assert time.monotonic() - started < STARTS_S
        return self._engine, log

    def __exit__(self, *_: object) -> None:
        self._engine.close()


def _sessions(engine: Engine) -> dict[str, dict[str, Any]]:
    return {record.id: orjson.loads(record.value) for record in engine.page("sessions", limit=1000).items}


def _assert_saved(
    directory: Directory, engine: Engine, log: Recorder, expected: dict[str, dict[str, Any]], raw: bytes, what: str
) -> None:
    found = _sessions(engine)
    assert found == expected, (what, found.keys() ^ expected.keys())
    assert engine.degraded, what
    told = log.fields("snapshot.damaged")
    assert [fields["file"] for fields in told] == [FILE], what
    assert told[0]["records"] == len(expected), what
    assert raw in contents(directory.path / "quarantine").values(), what


def _all(raw: bytes, part: bytes) -> list[int]:
    def find() -> Iterator[int]:
        at = raw.find(part)
        while at >= 0:
            yield at
            at = raw.find(part, at + 1)

    return list(find())
