"""The tests are tested: without any one of these lines the suite turns red."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.crash.harness import FULL, ROOT, report

pytestmark = [
    pytest.mark.crash,
    pytest.mark.skipif(
        not FULL, reason="runs parts of the suite once for each mutation: only with HOLDFAST_CRASH=full"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for the power cuts and full disks that notice"),
    pytest.mark.timeout(3600),
]


class Mutation(NamedTuple):
    """A line taken out.

    Attributes:
        name: what is missing then.
        file: under ``daemon/holdfast``.
        before: the text; stands exactly once in it.
        after: what stands there instead.
        tests: that must notice.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str


TRACE = "tests/crash/test_trace.py"
CALLS = "tests/crash/test_every_call.py"
JOURNAL = "tests/crash/test_journal_damage.py"
SNAPSHOT = "tests/crash/test_snapshot_damage.py"
FULL_DISK = "tests/crash/test_full_disk.py"
DAMAGE = "tests/crash/test_archive_damage.py"
FOLLOWER = "tests/test_follower.py"

MUTATIONS = [
    Mutation("sync of the journal, by trace", "disk/journal.py", "            _sync_data(self._fd)\n", "            pass\n", TRACE),
    Mutation("sync of the journal, by power cut", "disk/journal.py", "            _sync_data(self._fd)\n", "            pass\n",
             "tests/crash/test_power_cut.py"),
    Mutation("waiting for the sync", "commit.py", "if batch.needs_sync or checkpoint or is_settling or self._is_sync_due():", "if checkpoint:", TRACE),
    Mutation("sync of a new file", "disk/files.py", "            os.fsync(fd)\n            status = os.fstat(fd)", "            status = os.fstat(fd)",
             TRACE),
    Mutation("directory sync after files came into place", "disk/files.py", "                del waiting[0]\n            self.sync()\n",
             "                del waiting[0]\n", TRACE),
    Mutation("keeping what was replaced until the directory is synced", "disk/files.py", "                del waiting[0]\n            self.sync()\n",
             "                del waiting[0]\n            for fd in replaced:\n                _free(fd)\n            self.sync()\n",
             "tests/test_files.py"),
    Mutation("directory sync after the manifest", "flush.py", "self._directory.rename(MANIFEST_NEXT, MANIFEST)\n        self._directory.sync()\n",
             "self._directory.rename(MANIFEST_NEXT, MANIFEST)\n", TRACE),
    Mutation("directory sync after a new segment", "disk/journal.py", "            os.fsync(fd)\n            self._directory.sync()\n",
             "            os.fsync(fd)\n", TRACE),
    Mutation("sync above a new data directory", "disk/files.py", "                parent.sync()\n", "                pass\n", TRACE),
    Mutation("keeping the journal until the manifest stands", "flush.py", "            self._publish(staged, seq)\n",
             "            self._retire(seq, 0)\n            self._publish(staged, seq)\n", CALLS),
    Mutation("the watermark of those who follow", "feed.py", "        return self._committer.committed_seq\n",
             "        return self._last_seq()\n", "tests/test_feed.py"),
    Mutation("end after a failed sync", "disk/journal.py",
             'raise self._break(f"could not sync from seq {self.synced_seq + 1}: {error}") from error', "pass", CALLS),
    Mutation("cutting back a short write", "disk/journal.py", "            os.ftruncate(self._fd, self._good_bytes)\n", "            pass\n", FULL_DISK),
    Mutation("undoing what found no room", "commit.py", "                self._state.undo(last_seq)\n", "                pass\n", FULL_DISK),
    Mutation("checksum of an event", "disk/journal.py", 'return payload if line[:_CHECKSUM_CHARS] == b"%08x" % crc32(payload) else None',
             "return payload", JOURNAL),
    Mutation("cutting a torn tail", "recovery.py", "            directory.truncate(history.torn.segment, history.torn.offset)\n", "", JOURNAL),
    Mutation("stale events", "disk/journal.py", "            elif seq <= last_seq:\n", "            elif False:\n", JOURNAL),
    Mutation("gaps", "disk/journal.py", "            gaps.append((expected, seq - 1))\n", "            pass\n", JOURNAL),
    Mutation("checksum of a snapshot", "disk/snapshot.py", 'if f"{checksum:08x}" != entry.crc32:', "if False:", SNAPSHOT),
    Mutation("checksum of the manifest", "disk/snapshot.py", "    if _CHECKSUM.findall(raw) !=", "    if False and _CHECKSUM.findall(raw) !=", SNAPSHOT),
    Mutation("the manifest of a flush cut short", "recovery.py", "        self._alternative = manifests[MANIFEST_NEXT]\n",
             "        self._alternative = None\n", CALLS),
    Mutation("remembering moved files over a restart", "recovery.py", "        if self._moved:\n", "        if False:\n", CALLS),
    Mutation("remembering moved files over a failed flush", "flush.py", "        if self._interrupted is None:\n", "        if True:\n", CALLS),
    Mutation("the lock", "disk/files.py", "            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "            pass\n",
             "tests/crash/test_signals.py"),
    Mutation("confirming the wall clock", "engine.py", "        if ahead_ms <= CLOCK_JUMP_MS:\n", "        if True:\n", "tests/crash/test_clock_jumps.py"),
    Mutation("idempotency keys over a restart", "core/state.py", "    state.keys.set(event.key,", "    undoable and state.keys.set(event.key,", "tests/test_model.py"),
    Mutation("marks of deleted orders", "core/state.py", "    state.counted.set(event.id,", "    undoable and state.counted.set(event.id,",
             "tests/test_recovery.py"),
    Mutation("keeping the journal for the archive", "engine.py", 'self._flusher.follow("archive", lambda: follower.durable_seq)', "pass", FOLLOWER),
    Mutation("the archive's checkpoint before the journal is pruned", "flush.py", "        self.before_pruning(seq)\n", "", FOLLOWER),
    Mutation("the archive's watermark in the transaction of its rows", "archive/sqlite.py",
             "            changes = Changes(connection)\n            for seq, event in events:",
             '            connection.execute("UPDATE totals SET archived_seq = ? WHERE one = 1", (up_to,))\n            connection.execute("COMMIT")\n'
             '            connection.execute("BEGIN IMMEDIATE")\n            changes = Changes(connection)\n            for seq, event in events:',
             "tests/test_archive_sqlite.py"),
    Mutation("the archive's sync before it is called durable", "archive/sqlite.py", '            self._checkpoint("FULL")\n            reached',
             "            reached", TRACE),
    Mutation("removing the log of an archive that is replaced", "archive/place.py",
             "                self._remove_companions(directory, ARCHIVE)\n            directory.rename", "            directory.rename", DAMAGE),
    Mutation("archiving only what is synced", "engine.py", "synced_seq=lambda: self._journal.synced_seq", "synced_seq=lambda: self._journal.written_seq",
             FOLLOWER),
    Mutation("an archive that did not sync is opened again", "archive/follower.py",
             "if isinstance(error, ArchiveBroken) and self._archive is not None:", "if False:", CALLS),
    Mutation("words of the journal before those of a damaged archive", "archive/follower.py",
             "min(last_numbers.get(id, 0), first_numbers.get(id, _NUMBER_MAX) - 1)", "last_numbers.get(id, 0)", DAMAGE),
    Mutation("noticing that the archive was cut", "archive/sqlite_file.py", "        if _is_cut(path, connection):", "        if False:", DAMAGE),
    Mutation("external ids of a conversation that was deleted", "core/conversations.py", "found is not None and found.born == born", "found is not None",
             "tests/test_conversation_ops.py"),
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_every_safeguard_is_missed(mutation: Mutation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each safeguard, taken out alone, is missed by the tests."""
    tree = tmp_path / "tree"
    for part in ("daemon", "tests"):
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    path = tree / "daemon" / "holdfast" / mutation.file
    text = path.read_text()
    assert text.count(mutation.before) == 1, f"{mutation.file} no longer reads so: {mutation.before!r}"
    path.write_text(text.replace(mutation.before, mutation.after))
    environ = {name: value for name, value in os.environ.items() if name != "HOLDFAST_CRASH"}
    paths = os.pathsep.join([str(tree), str(tree / "daemon")])

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", mutation.tests],
        cwd=tree,
        env=environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )

    failed = re.findall(r"^FAILED \S+::(\S+)", ran.stdout.decode(errors="replace"), re.MULTILINE)
    hangs = b"+ Timeout +" in ran.stdout
    assert ran.returncode == 1 and (failed or hangs), ran.stdout[-500:]
    report(capsys, f"without {mutation.name:58} {failed[0] if failed else 'a test that then hangs'}")
