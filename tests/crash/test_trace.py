"""Faults 4 and 5: the order in which things reach the disk, and every state a power cut could leave of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.archive.place import ARCHIVE
from tests.crash import life
from tests.crash.harness import (
    FULL,
    ROOT,
    SEED,
    Load,
    Recorder,
    Served,
    clean_environ,
    holes_in,
    needs_strace,
    reopened,
    report,
    surprises,
)
from tests.crash.oracle import Ledger, differences, found_in
from tests.crash.trace import CALLS, STRACE, Call, read_trace

pytestmark = [pytest.mark.crash, needs_strace, pytest.mark.timeout(3600 if FULL else 120)]

OPS = 1000
ARCHIVE_EVERY = 9
"""In the short form: of so many writes of the archive one is looked at, and all of the journal and the snapshots."""


def test_nothing_is_told_before_it_is_durable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In 1,000 ops and two flushes: no answer before its event is synced, no rename whose data or directory is not."""
    trace = tmp_path / "trace"
    data_dir = tmp_path / "data"
    ledgers = [Ledger(client, SEED) for client in range(8)]
    served = Served(data_dir, wrapper=[*STRACE, "-o", str(trace), "-e", f"trace={','.join(CALLS)}"])
    try:
        served.ready()
        daemon = served.pid
        load = Load(served, ledgers)
        for flush_at in (OPS // 3, 2 * OPS // 3, OPS):
            while sum(ledger.acknowledged for ledger in ledgers) < flush_at:
                assert served.process.poll() is None and not load.refused
                time.sleep(0.01)
            os.kill(daemon, signal.SIGUSR1)
        time.sleep(0.3)
        load.stop()
        os.kill(daemon, signal.SIGTERM)
        assert served.wait() == 0
    finally:
        if served.process.poll() is None:
            served.kill()

    lint = _Lint(str(data_dir))
    for is_over, call in read_trace(trace):
        lint.see(is_over, call)

    assert not lint.faults, lint.faults[:5]
    assert lint.told >= OPS and lint.renames > 20 and lint.pruned >= 2, vars(lint)
    assert not lint.waiting_directories
    report(
        capsys,
        f"{lint.told} answers, {lint.syncs} syncs, {lint.renames} renames, {lint.pruned} segments pruned: "
        "0 told before synced, 0 renamed before synced, 0 removed before replaced",
    )


class _Lint:
    """Follows a trace and notes whatever happens in the wrong order."""

    def __init__(self, data_dir: str) -> None:
        self.faults: list[str] = []
        self.told = self.renames = self.syncs = self.pruned = 0
        self.waiting_directories: dict[str, str] = {}
        self._data_dir = data_dir
        self._written_seq = self._durable_seq = 0
        self._syncing: list[int] = []
        self._unsynced_files: set[str] = set()
        self._manifest_seq = 0
        self._unnamed: set[str] = set()

    def see(self, is_over: bool, call: Call) -> None:
        if call.name in ("write", "writev", "sendto", "sendmsg"):
            self._see_write(is_over, call)
        elif call.name in ("fdatasync", "fsync"):
            self._see_sync(is_over, call)
        elif call.name.startswith("rename"):
            self._see_rename(is_over, call)
        elif call.name.startswith("unlink") and not is_over:
            self._see_unlink(call)
        elif is_over and (call.result or 0) >= 0 and self._is_new_name(call):
            self._unnamed.add(call.target)

    def _is_new_name(self, call: Call) -> bool:
        """Whether it made a directory or a segment of ours."""
        if not call.target.startswith(self._data_dir):
            return False
        return call.name.startswith("mkdir") or (call.target.endswith(".jsonl") and "O_CREAT" in call.arguments)

    def _see_write(self, is_over: bool, call: Call) -> None:
        text = b"".join(call.strings)
        path = call.paths[0] if call.paths else ""
        if not path.startswith("/"):
            if not is_over:
                self._see_answer(text)
        elif path.endswith(".jsonl"):
            self.faults += [f"event written to {path} before the name {name} was durable" for name in self._unnamed
                            if path.startswith(name)]  # fmt: skip
            if is_over:
                seqs = re.findall(rb'^[0-9a-f]{8} \{"seq":(\d+),', text, re.MULTILINE)
                self._written_seq = max([self._written_seq, *map(int, seqs)])
        elif path.startswith(self._data_dir):
            self._unsynced_files.add(path)
            if "manifest" in path and is_over:
                self._manifest_seq = int(re.search(rb'"snapshot_seq": (\d+)', text)[1])  # type: ignore[index]

    def _see_answer(self, text: bytes) -> None:
        for head in re.split(rb"(?=HTTP/1\.1 )", text):
            if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201")):
                continue
            seq = re.search(rb'"seq":(\d+)', head)
            if seq is not None:
                self.told += 1
                if int(seq[1]) > self._durable_seq:
                    self.faults.append(f"event {int(seq[1])} told when {self._durable_seq} was durable")

    def _see_sync(self, is_over: bool, call: Call) -> None:
        path = call.target
        if path.endswith(".jsonl"):
            if not is_over:
                self._syncing.append(self._written_seq)
            else:
                synced = self._syncing.pop(0)
                if call.result == 0:
                    self.syncs += 1
                    self._durable_seq = max(self._durable_seq, synced)
        elif is_over and call.result == 0:
            self._unsynced_files.discard(path)
            self.waiting_directories.pop(path, None)
            self._unnamed = {name for name in self._unnamed if os.path.dirname(name) != path}

    def _see_rename(self, is_over: bool, call: Call) -> None:
        if call.target.endswith(".jsonl"):
            if not is_over:
                self._see_retired(call.target)
            else:
                for path in (call.source, call.target):
                    self.waiting_directories[os.path.dirname(path)] = path
        elif not is_over:
            if call.source in self._unsynced_files:
                self.faults.append(f"{call.source} renamed before it was synced")
            waiting, name = list(self.waiting_directories.values()), os.path.basename(call.target)
            if waiting and (name == "manifest.json" or any("manifest.next" in one for one in waiting)):
                self.faults.append(f"{name} came into place while {waiting} were not durable")
        else:
            self.renames += 1
            self.waiting_directories[os.path.dirname(call.target)] = call.target

    def _see_unlink(self, call: Call) -> None:
        if call.target.endswith(".jsonl"):
            self._see_retired(call.target)

    def _see_retired(self, path: str) -> None:
        """A segment leaves the journal, or what was kept of it."""
        self.pruned += 1
        if self.waiting_directories:
            self.faults.append(f"{path} retired while {self.waiting_directories} were not durable")
        if int(Path(path).stem) > self._manifest_seq:
            self.faults.append(f"{path} retired, but the manifest holds only up to {self._manifest_seq}")


def test_every_prefix_of_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a power cut leaves of a life (with flushes, rotations, a restart), it is there again afterwards."""
    data_dir, trace = tmp_path / "data", tmp_path / "trace"
    subprocess.run(
        [*STRACE, "-o", str(trace), "-e", f"trace={','.join(CALLS)}", sys.executable, "-m", "tests.crash.life",
         str(data_dir), str(tmp_path / "acknowledged")],
        check=True, cwd=ROOT, env=clean_environ(), timeout=60,
    )  # fmt: skip
    calls = [call for is_over, call in read_trace(trace) if is_over and (call.result or 0) >= 0]
    disk = _Disk(str(data_dir))
    acknowledged = tried = 0
    seen: set[int] = set()
    wrong: list[str] = []
    for number, call in enumerate(calls):
        if call.name == "write" and call.target == str(tmp_path / "acknowledged"):
            acknowledged += 1
            continue
        torn = disk.do(call)
        if torn is None or (not FULL and call.name == "pwrite64" and number % ARCHIVE_EVERY):
            continue
        for index, (kind, state) in enumerate(disk.states(torn)):
            # Otherwise every third kind, after the next call others; they differ by little from call to call.
            if not FULL and (number + index) % 3:
                continue
            key = hash((acknowledged, tuple(sorted(state.items()))))
            if key in seen:
                continue
            seen.add(key)
            tried += 1
            wrong += [f"after call {number} ({call.name} {call.target}), {kind}: {text}"
                      for text in _wrong_in(tmp_path / "state", state, acknowledged)]  # fmt: skip
        assert not wrong, (len(wrong), wrong[:5])
    report(capsys, f"{tried} of {tried} states of {len(calls)} calls come back: 0 lost, 0 doubled")


class _Disk:
    """A file system that keeps what was synced apart from what was only asked for."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._content: dict[int, bytearray] = {}
        self._synced_content: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self._synced_names: dict[str, int] = {}
        # Of the file that was written last, what it was before.
        self._before = b""

    def do(self, call: Call) -> tuple[int, int, int] | None:
        """Do what *call* did; None when it was about nothing here, else the inode and range of what it wrote."""
        path = call.target
        # The index of the archive's log is memory that happens to be a file: SQLite makes it anew at each start.
        if not path.startswith(self._root) or path.endswith((".lock", ".sock", "-shm")):
            return None
        name = os.path.relpath(path, self._root)
        match call.name:
            case "openat":
                if "O_CREAT" in call.arguments and name not in self._names:
                    self._names[name] = inode = len(self._content)
                    self._content[inode], self._synced_content[inode] = bytearray(), b""
            case "write" | "pwrite64":
                inode = self._names[name]
                content, written = self._content[inode], call.strings[0][: call.result]
                start = len(content) if call.name == "write" else _last_number(call)
                self._before = bytes(content)
                content.extend(bytes(max(0, start - len(content))))
                content[start : start + len(written)] = written
                return inode, start, start + len(written)
            case "ftruncate":
                content, size = self._content[self._names[name]], _last_number(call)
                del content[size:]
                content.extend(bytes(size - len(content)))
            case "fsync" | "fdatasync":
                if name in self._names:
                    self._synced_content[self._names[name]] = bytes(self._content[self._names[name]])
                else:
                    here = "" if name == "." else name
                    kept = {one: inode for one, inode in self._synced_names.items() if os.path.dirname(one) != here}
                    now = {one: inode for one, inode in self._names.items() if os.path.dirname(one) == here}
                    self._synced_names = kept | now
            case "renameat" | "renameat2":
                self._names[name] = self._names.pop(os.path.relpath(call.source, self._root))
            case "unlink" | "unlinkat":
                self._names.pop(name, None)
            case "linkat":
                self._names[name] = self._names[os.path.relpath(call.source, self._root)]
        return -1, 0, 0

    def states(self, torn: tuple[int, int, int]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """What may be found after a power cut right now."""
        content = {inode: bytes(raw) for inode, raw in self._content.items()}
        yield "all kept", self._files(self._names, content)
        yield "unsynced writes dropped", self._files(self._names, self._synced_content)
        yield "unsynced names dropped", self._files(self._synced_names, content)
        yield "both dropped", self._files(self._synced_names, self._synced_content)
        log = self._names.get(f"{ARCHIVE}-wal")
        if log is not None:
            # The archive is the one file that is written in place, so what is missing of its log matters.
            without_log = content | {log: self._synced_content[log]}
            yield "unsynced writes of the archive's log dropped", self._files(self._names, without_log)
        inode, start, end = torn
        before = self._before
        for cut in range(start - start % 512 + 512, end, 512):
            torn_content = content[inode][:cut] + before[cut:]
            yield f"torn at {cut}", self._files(self._names, content | {inode: torn_content})

    @staticmethod
    def _files(names: dict[str, int], content: dict[int, bytes]) -> dict[str, bytes]:
        return {name: content[inode] for name, inode in names.items()}


def _last_number(call: Call) -> int:
    """The last argument: an offset, a size."""
    return int(call.arguments.rpartition(",")[2])


def _wrong_in(data_dir: Path, files: dict[str, bytes], acknowledged: int) -> list[str]:
    data_dir.mkdir(mode=0o700)
    try:
        for name, raw in files.items():
            path = data_dir / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_bytes(raw)
        ledger = life.ledger_after(acknowledged)
        if acknowledged < life.STEPS:
            ledger.propose()
        log = Recorder()
        engine = reopened(data_dir, log)
        try:
            wrong = differences([ledger], found_in(engine))
            return wrong + [f"degraded: {reason}" for reason in engine.degraded] + surprises(log) + holes_in(engine)
        finally:
            engine.close(flush=False)
    finally:
        shutil.rmtree(data_dir)
