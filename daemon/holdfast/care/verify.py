"""Looking through a data directory: everything that can be wrong with it, and what to do about each.

Nothing is changed. On a directory that nobody has open the lock is held meanwhile; of one in use, what does not hold is
looked at again before it is told, since a flush may have been under way.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import msgspec
import orjson

from holdfast.archive.base import ARCHIVED_OPS, Archive, ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE, COMPACTED, REBUILT
from holdfast.archive.sqlite_look import Look, look_through
from holdfast.care.backup_set import BACKUPS, SET_NAME, BackupSet, list_sets
from holdfast.care.findings import (
    ANEW,
    CHMOD,
    OPEN,
    REMOVE,
    SET_ASIDE,
    Finding,
    Report,
    a_warning,
    an_error,
    bounded,
    readable_size,
)
from holdfast.care.history import JOURNAL, History, HistoryGap
from holdfast.care.mirror import CONVERSATIONS_PLACE, ESCALATIONS_PLACE
from holdfast.care.packing import Seal
from holdfast.care.prove import prove
from holdfast.care.prover import Unproved, prove_apart
from holdfast.care.space import INODES_LOW, SHARE
from holdfast.care.swap import ARCHIVE_SCRATCH, INTENT, SCRATCH, STAGING
from holdfast.checksum import crc32
from holdfast.clock import format_ms, parse_ms
from holdfast.core.event import decode_event
from holdfast.core.rules import Rules, rules_of
from holdfast.core.sales import decode_sales
from holdfast.core.state import BUILT_IN, CONVERSATIONS, EVENT_OPS, is_custom_name
from holdfast.disk.files import LOCK_NAME, Directory, kept_from_writers
from holdfast.disk.journal import KEPT, SEGMENT_NAME, Damage, read_segment, segment_name
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    ChecksumMismatchError,
    FileEntry,
    Manifest,
    read_blocks,
    read_manifest,
    salvage,
)
from holdfast.engine import Engine
from holdfast.errors import Conflict, DataRefused, HoldfastError, StorageFull, Unavailable
from holdfast.flush import SALES_FILE, file_of
from holdfast.load import checked_id
from holdfast.settings import Settings

TRIES = 4
"""Of a part of a directory in use, before what is wrong with it counts."""

TRY_AGAIN_S = 0.3

PAUSE_S = 0.0005
PAUSE_RECORDS = 50
"""In a running daemon, after so many records, others get the interpreter for a moment."""

FREE_SHARE_MIN = 0.03

DAY_S = 24 * 3600.0
DAILY_CHECK_S = 900.0
"""How often a daemon looks whether a day has passed, and how long after its start it verifies first."""

NICE = 10
"""Of the thread of a daemon that verifies."""

LEFTOVER_NAMES = frozenset(
    base + companion for base in (REBUILT, COMPACTED) for companion in ("", "-wal", "-shm", "-journal")
)
COMPANIONS = (ARCHIVE + "-wal", ARCHIVE + "-shm", ARCHIVE + "-journal")

DIRECTORIES = frozenset(
    {
        JOURNAL,
        BACKUPS,
        "quarantine",
        "inbox",
        "media",
        "conversations",
        "escalations",
        "users",
        STAGING,
        SCRATCH,
        ARCHIVE_SCRATCH,
    }
)
"""Those of ours in a data directory."""

FILES = frozenset(
    {
        *(file_of(name) for name in BUILT_IN),
        SALES_FILE,
        MANIFEST,
        MANIFEST_NEXT,
        ARCHIVE,
        *COMPANIONS,
        *LEFTOVER_NAMES,
        INTENT,
        LOCK_NAME,
        "_mirror.json",
        "token",
        "tokens.json",
        "holdfast.sock",
        "holdfast.toml",
        "README.md",
        ".gitkeep",
    }
)
"""Likewise files, beside those of custom collections."""

_KEPT_FILES = ("start-", "edited-", "imported-", "restores.json", "copied_to.json")


def verify(
    data_dir: Path,
    settings: Settings,
    *,
    deep: bool = False,
    engine: Engine | None = None,
    seal: Seal | None = None,
    progress: Callable[[str], None] = lambda text: None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> Report:
    """Look through all of *data_dir*; blocks, for a second a gigabyte or so.

    Args:
        settings: how its records are read.
        deep: load every backup as well; and of a directory in use look at each page of the archive.
        engine: which has the directory open; without one nobody may have.
        seal: opens encrypted backups.
        progress: told in words how far it is.
        is_stopping: whether to break off.

    Raises:
        DirectoryLocked: another process has it open.
        Unavailable: broken off.
        DataRefused: there is no such directory, or a newer Holdfast wrote it.
    """
    started, at_ms = time.monotonic(), time.time_ns() // 1_000_000
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(Directory(data_dir))
        except OSError as error:
            raise DataRefused(
                f"{data_dir} cannot be read: {error.strerror}; name the data directory, and run as its owner"
            ) from error
        if engine is None:
            stack.enter_context(kept_from_writers(data_dir))
        run = _Verification(directory, settings, deep, engine, seal, progress, is_stopping, at_ms)
        findings = run.run()
    return Report(
        at=format_ms(at_ms),
        data_dir=str(data_dir),
        is_running=engine is not None,
        is_deep=deep,
        duration_ms=round((time.monotonic() - started) * 1000, 1),
        findings=findings,
    )


class Daily:
    """Verifies a daemon's directory once a day, and tells what it finds."""

    def __init__(self, engine: Engine, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._engine = engine
        self._is_stopping = is_stopping
        self._due_at = 0.0

    def run_when_due(self) -> None:
        """Verify, unless that was done less than a day ago; broken off when the daemon stops."""
        now = self._engine.monotonic()
        if now < self._due_at:
            return
        self._due_at = now + DAY_S
        try:
            verify_running(self._engine, deep=False, reason="daily", is_stopping=self._is_stopping)
        except Conflict:
            pass  # somebody asked for it just now
        except Unavailable:
            if not self._is_stopping():
                raise


def verify_running(
    engine: Engine, *, deep: bool, reason: str, is_stopping: Callable[[], bool] = lambda: False
) -> Report:
    """Verify the directory of *engine*, log the outcome, and have ``degraded`` say it; blocks.

    Raises:
        Conflict: that is being done already.
        DataRefused, Unavailable: as ``verify``.
    """
    if not _running.acquire(blocking=False):
        raise Conflict("a verification is under way; ask again when it is over")
    try:
        return _verify_running(engine, deep, reason, is_stopping)
    finally:
        _running.release()


_running = threading.Lock()
"""One at a time: each reads all there is."""


def _verify_running(engine: Engine, deep: bool, reason: str, is_stopping: Callable[[], bool]) -> Report:
    report = _politely(
        lambda: verify(engine.settings.data_dir, engine.settings, deep=deep, engine=engine, is_stopping=is_stopping)
    )
    wrong = report.wrong
    severities = [finding.severity for finding in report.findings]
    engine.measures.verified_at = time.time()
    engine.measures.verify_findings = {name: severities.count(name) for name in ("notice", "warning", "error")}
    if not wrong:
        engine.care_notes.pop("verify", None)
        engine.log.info("data.verified", reason=reason, deep=deep, duration_ms=report.duration_ms)
        return report
    # Without the texts: they may name conversations, and neither the log nor /readyz may.
    parts = sorted({finding.part for finding in wrong})
    engine.care_notes["verify"] = (
        f"{_NOTE} {len(wrong)} problems ({', '.join(parts)}); see `holdfast verify`, and verify again when they are mended"
    )
    engine.log.error(
        "data.verify_failed",
        reason=reason,
        deep=deep,
        count=len(wrong),
        parts=parts,
        action="see `holdfast verify`",
        duration_ms=report.duration_ms,
    )
    return report


_NOTE = "a verification found"


def _politely(work: Callable[[], Report]) -> Report:
    """What *work* returns, done in a thread that gives way to all others where the system lets one."""
    outcome: list[Report | BaseException] = []

    def run() -> None:
        try:
            # Of this thread alone, on Linux; elsewhere there is no such thing, and nothing depends on it.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        except OSError:
            pass
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="holdfast-verify", daemon=True)
    thread.start()
    thread.join()
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found


_KEPT_FROM_OTHERS = tuple(
    os.path.join(*parts)
    for parts in (("inbox", ""), ("quarantine", ""), *((BACKUPS, kind) for kind in ("imported-", "start-", "edited-")))
)
"""How the paths begin of what others wrote, and we only moved or linked."""


class _Manifests(NamedTuple):
    """The manifest, and that of a flush which moves its files; None where there is none that can be read."""

    present: Manifest | None
    following: Manifest | None

    def entries(self, name: str) -> list[FileEntry]:
        """What *name* may be as we left it."""
        found = (one.files.get(name) for one in self if one is not None)
        return [entry for entry in found if entry is not None]


class _Seen(NamedTuple):
    """What the journal says.

    Attributes:
        first_seq: the oldest event that is there, those kept for readers as well; 0 when there is none.
        last_seq: the newest.
        snapshot_seq: the snapshots hold everything up to here.
        conversations: those that events in it change, each with the last of these.
    """

    first_seq: int
    last_seq: int
    snapshot_seq: int
    conversations: dict[str, int]


class _Verification:
    """One look through a directory."""

    def __init__(
        self,
        directory: Directory,
        settings: Settings,
        deep: bool,
        engine: Engine | None,
        seal: Seal | None,
        progress: Callable[[str], None],
        is_stopping: Callable[[], bool],
        now_ms: int,
    ) -> None:
        self._directory = directory
        self._path = directory.path
        self._settings = settings
        self._rules: Rules = rules_of(settings)
        self._deep = deep
        self._engine = engine
        self._seal = seal
        self._progress = progress
        self._is_stopping = is_stopping
        self._now_ms = now_ms
        self._seen = _Seen(0, 0, 0, {})
        self._heads: dict[str, bytes] = {}

    def run(self) -> list[Finding]:
        # A newer format is refused before anything is said of it.
        self._manifests()
        findings: list[Finding] = []
        for part, look in (
            ("directory", self._look_at_directory),
            ("space", self._look_at_space),
            ("manifest", self._look_at_manifest),
            ("snapshots", self._look_at_snapshots),
            ("journal", self._look_at_journal),
            ("archive", self._look_at_archive),
            ("history", self._look_at_history),
            ("backups", self._look_at_backups),
            ("quarantine", self._look_at_quarantine),
            ("files", self._look_at_files),
        ):
            self._progress(f"looking at the {part}")
            findings += self._settled(part, look)
        if self._engine is not None:
            notes = [text for text in self._engine.degraded if not text.startswith(_NOTE)]
            findings += [Finding(severity="warning", part="daemon", found=text, action="see its log") for text in notes]
        return findings

    def _settled(self, part: str, look: Callable[[], Iterable[Finding]]) -> list[Finding]:
        """What *look* finds; of a directory in use what it finds again and again."""
        for left in reversed(range(TRIES)):
            found = bounded(look())
            is_wrong = any(finding.severity in ("warning", "error") for finding in found)
            if self._engine is None or not is_wrong or not left:
                break
            time.sleep(TRY_AGAIN_S)
        return found or [Finding(severity="ok", part=part, found="as it should be")]

    # The directory itself.

    def _look_at_directory(self) -> Iterator[Finding]:
        status = self._path.stat()
        if status.st_uid != os.geteuid():
            yield a_warning(
                "directory",
                f"owned by user {os.geteuid()}, who verifies",
                f"it belongs to user {status.st_uid}",
                "run as its owner, or change the owner",
            )
        loose, foreign = [], []
        for path, status in self._everything():
            if stat.S_ISLNK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
                continue
            if status.st_mode & 0o077 and not self._is_dropped(path):
                loose.append(path)
            if status.st_uid != os.geteuid():
                foreign.append(path)
        for path in loose:
            yield a_warning(
                "directory",
                "readable by its owner alone (directories 0700, files 0600)",
                f"{path} has the mode {stat.S_IMODE((self._path / path).lstat().st_mode):04o}",
                "run `holdfast mend`, or chmod go-rwx",
                mend=CHMOD,
                path=path,
            )
        for path in foreign:
            yield a_warning(
                "directory", "one owner", f"{path} belongs to another user", "change its owner to the directory's"
            )

    def _everything(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file and directory in it, by its path within, links not followed."""
        yield ".", self._path.stat()
        for place, directories, files in os.walk(self._path):
            self._pause()
            for name in (*directories, *files):
                path = os.path.join(place, name)
                try:
                    yield os.path.relpath(path, self._path), os.lstat(path)
                except FileNotFoundError:
                    continue  # removed meanwhile

    def _is_dropped(self, path: str) -> bool:
        """Whether somebody else put it there, who may choose its mode: nobody can enter the data directory itself.

        What an old bot left stays as it was, also where it is kept: in backups and quarantine.
        """
        if path.partition(os.sep)[0] in ("users", CONVERSATIONS_PLACE, ESCALATIONS_PLACE):
            return True
        if path.startswith(_KEPT_FROM_OTHERS):
            return True
        return (
            path.endswith(".json") and os.sep not in path and path not in FILES and not self._manifests().entries(path)
        )

    def _look_at_space(self) -> Iterator[Finding]:
        found = os.statvfs(self._path)
        free, size = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
        present = self._manifests().present
        needed = sum(entry.bytes for entry in present.files.values()) if present else 0
        if free < max(needed, round(size * FREE_SHARE_MIN)):
            yield a_warning(
                "space",
                f"room for another copy of the snapshots ({readable_size(needed)}), and 3 % of the disk",
                f"{readable_size(free)} free of {readable_size(size)}",
                "free space before it is full; a full disk refuses writes, reads go on",
            )
        # On a small file system a share of what it has, as the watch of the daemon has it.
        nodes_min = min(INODES_LOW, found.f_files // SHARE)
        if found.f_favail < nodes_min:
            yield a_warning(
                "space",
                f"{nodes_min} free inodes",
                f"{found.f_favail} of {found.f_files}",
                "remove small files from this file system",
            )

    # Manifest and snapshots.

    def _manifests(self) -> _Manifests:
        found: list[Manifest | None] = []
        for name in (MANIFEST, MANIFEST_NEXT):
            try:
                found.append(read_manifest(self._directory, name))
            except (ValueError, OSError):
                found.append(None)
        return _Manifests(*found)

    def _look_at_manifest(self) -> Iterator[Finding]:
        try:
            present = read_manifest(self._directory, MANIFEST)
        except (ValueError, OSError) as error:
            yield an_error(
                "manifest",
                "a manifest whose checksum holds",
                f"{MANIFEST}: {getattr(error, 'strerror', None) or error}",
                "the next start uses the files and the whole journal without it; then verify again",
                mend=OPEN,
            )
            return
        flushed_seq = self._journal_base()
        if present is None and flushed_seq:
            yield a_warning(
                "manifest",
                f"the manifest of a flush up to event {flushed_seq}, behind which the journal begins",
                f"{MANIFEST} is missing",
                "start: the files are used without it, and what is missing of them comes from the backups",
                mend=OPEN,
            )
        elif present is None:
            yield Finding(severity="notice", part="manifest", found="there is none yet: nothing was flushed so far")
        else:
            yield Finding(
                severity="ok",
                part="manifest",
                found=f"format {present.format}, by Holdfast {present.holdfast}, flushed {present.at} at event "
                f"{present.snapshot_seq}, {len(present.files)} files",
            )
        if self._engine is None and self._directory.stat(MANIFEST_NEXT) is not None:
            yield Finding(
                severity="notice",
                part="manifest",
                found="a flush was interrupted; the next start completes it",
                mend=OPEN,
            )

    def _look_at_snapshots(self) -> Iterator[Finding]:
        manifests = self._manifests()
        names = {file_of(name): name for name in BUILT_IN}
        known = {name for one in manifests if one is not None for name in one.files}
        names |= {file: file.removesuffix(".json") for file in known if is_custom_name(file.removesuffix(".json"))}
        self._heads = {}
        records = size = 0
        problems: list[Finding] = []
        for file, collection in sorted(names.items()):
            self._progress(f"looking at {file}")
            problem = self._snapshot_problem(file, collection, manifests)
            if problem is not None:
                problems.append(problem)
            elif entries := manifests.entries(file):
                records += entries[-1].records
                size += entries[-1].bytes
        problems += self._sales_problems(manifests)
        yield from problems
        if not problems:
            yield Finding(
                severity="ok",
                part="snapshots",
                found=f"{records} records in {readable_size(size)}, every one can be read",
            )

    def _snapshot_problem(self, file: str, collection: str, manifests: _Manifests) -> Finding | None:
        entries = manifests.entries(file)
        found = self._directory.stat(file)
        if found is None:
            if any(entry.records for entry in entries):
                return an_error(
                    "snapshots",
                    f"{entries[0].records} records",
                    f"{file} is missing",
                    "restore it from a backup",
                    mend=OPEN,
                )
            return None
        for entry in entries:
            try:
                return self._record_problem(file, collection, entry)
            except ChecksumMismatchError:
                continue
            except OSError as error:
                return an_error(
                    "snapshots", "a file that can be read", f"{file}: {error.strerror}", "check the disk, or restore it"
                )
        return self._changed_file(file, entries, found)

    def _changed_file(self, file: str, entries: list[FileEntry], found: os.stat_result) -> Finding:
        """What is wrong with a file that is not as we left it."""
        try:
            content = salvage(self._directory.read(file))
        except OSError as error:
            return an_error(
                "snapshots",
                "a regular file",
                f"{file} cannot be read: {error.strerror}",
                "move it away, or restore it",
                mend=OPEN,
            )
        if not content.is_whole:
            return an_error(
                "snapshots",
                "one JSON array of records",
                f"{file} is damaged: {content.reason}; {len(content.records)} whole records",
                "restore it from a backup, or start: what is whole is saved, what is not goes to quarantine/",
                mend=OPEN,
            )
        if entries and found.st_mtime_ns in [entry.mtime_ns for entry in entries]:
            return an_error(
                "snapshots",
                "the content that was written",
                f"{file} changed on the disk without being written",
                "check the disk, and restore the file from a backup",
                mend=OPEN,
            )
        if not entries:
            return Finding(
                severity="notice",
                part="snapshots",
                found=f"{file} is no file of ours yet: {len(content.records)} records, read at the next start",
            )
        return Finding(
            severity="warning" if self._engine is not None else "notice",
            part="snapshots",
            expected="the file as it was flushed",
            found=f"{file} was edited by hand: {len(content.records)} records",
            action="nothing: the next start takes it as it is"
            if self._engine is None
            else "stop, edit, start; what was edited while we run is kept in backups/ at the next flush",
        )

    def _record_problem(self, file: str, collection: str, entry: FileEntry) -> Finding | None:
        """Look at every record of a file of ours; raises as ``read_blocks``."""
        ids: set[str] = set()
        bad: list[str] = []
        count = 0
        for block in read_blocks(self._directory, file, entry):
            for line in block.split(b",\n"):
                count += 1
                if count % PAUSE_RECORDS == 0:
                    self._pause()
                try:
                    id = checked_id(collection, line, self._rules)
                except (KeyError, TypeError, ValueError, OverflowError, msgspec.DecodeError) as error:
                    bad.append(f"record {count} ({type(error).__name__}: {error!s:.100})")
                    continue
                if id in ids:
                    bad.append(f"record {count} has an id that stands there already")
                ids.add(id)
                if collection == CONVERSATIONS:
                    self._heads[id] = line
        if bad:
            return an_error(
                "snapshots",
                "records that these settings can read, each id once",
                f"{file}: {len(bad)} of {count} cannot be used, the first is {bad[0]}",
                "check sessions.id_field, sessions.time_field and orders.id_field in the settings, or restore the file",
            )
        if count != entry.records:
            return an_error("snapshots", f"{entry.records} records", f"{file} has {count}", "restore it from a backup")
        return None

    def _sales_problems(self, manifests: _Manifests) -> list[Finding]:
        entries = manifests.entries(SALES_FILE)
        found = self._directory.stat(SALES_FILE)
        if found is None:
            lost = an_error(
                "snapshots", "sales figures", f"{SALES_FILE} is missing", "restore it from a backup", mend=OPEN
            )
            return [lost] if entries else []
        try:
            raw = self._directory.read(SALES_FILE)
            decode_sales(raw.removeprefix(b"\xef\xbb\xbf"))
        except (OSError, ValueError, msgspec.DecodeError) as error:
            return [
                an_error(
                    "snapshots",
                    "sales figures",
                    f"{SALES_FILE} cannot be read: {error}",
                    "restore it from a backup",
                    mend=OPEN,
                )
            ]
        if entries and f"{crc32(raw):08x}" not in [entry.crc32 for entry in entries]:
            if found.st_mtime_ns in [entry.mtime_ns for entry in entries]:
                return [
                    an_error(
                        "snapshots",
                        "the content that was written",
                        f"{SALES_FILE} changed on the disk without being written",
                        "check the disk, and restore the file from a backup",
                        mend=OPEN,
                    )
                ]
            return [Finding(severity="notice", part="snapshots", found=f"{SALES_FILE} was edited by hand")]
        return []

    # The journal.

    def _journal_base(self) -> int:
        """The event behind which the journal begins; 0 when that cannot be told."""
        with suppress(OSError), Directory(self._path / JOURNAL) as directory:
            return min(_firsts_in(directory), default=1) - 1
        return 0

    def _look_at_journal(self) -> Iterator[Finding]:
        engine = self._engine
        durable_seq = 0 if engine is None else engine.status()["durable_seq"]
        present = self._manifests().present
        snapshot_seq = 0 if present is None else present.snapshot_seq
        try:
            with Directory(self._path / JOURNAL) as directory:
                firsts = _firsts_in(directory)
                conversations: dict[str, int] = {}
                kept_findings, first_seq = self._look_at_kept(conversations)
                findings, last_seq = self._segments(directory, firsts, snapshot_seq, conversations)
        except FileNotFoundError:
            if present is not None:
                yield an_error(
                    "journal",
                    f"the events after {snapshot_seq}",
                    "journal/ or a segment of it is missing",
                    "restore it; what changed since the last flush is lost if there was anything",
                    mend=OPEN,
                )
            return
        except OSError as error:
            yield an_error("journal", "segments that can be read", str(error.strerror or error), "check the disk")
            return
        yield from findings
        yield from kept_findings
        if not firsts and snapshot_seq:
            yield an_error(
                "journal",
                f"a segment behind event {snapshot_seq}",
                "none",
                "start: changes since the last flush are lost if there were any",
                mend=OPEN,
            )
        first_seq = first_seq or min(firsts, default=0)
        self._seen = _Seen(first_seq, max(last_seq, snapshot_seq), snapshot_seq, conversations)
        if last_seq < durable_seq:
            yield an_error(
                "journal", f"event {durable_seq}, which was acknowledged", f"it ends at {last_seq}", "check the disk"
            )
        if not any(finding.severity == "error" for finding in findings):
            count = max(0, last_seq - (snapshot_seq or min(firsts, default=1) - 1))
            yield Finding(
                severity="ok",
                part="journal",
                found=f"{_many(count, 'event')} behind the snapshots, to event {self._seen.last_seq}, "
                f"in {_many(len(firsts), 'segment')}",
            )

    def _segments(
        self, directory: Directory, firsts: list[int], snapshot_seq: int, conversations: dict[str, int]
    ) -> tuple[list[Finding], int]:
        """What is wrong with the segments of the journal, and its last event; notes its *conversations*."""
        findings: list[Finding] = []
        expected, last_seq = snapshot_seq + 1, 0
        for first in firsts:
            segment = read_segment(directory, segment_name(first), is_newest=first == firsts[-1])
            findings += map(_damaged, segment.damages)
            if segment.torn is not None and self._engine is None:
                findings.append(
                    Finding(
                        severity="notice",
                        part="journal",
                        found=f"{_placed(segment.torn)}: it was never acknowledged, the next start cuts it off",
                        mend=OPEN,
                    )
                )
            for seq, payload in segment.lines:
                if seq > expected:
                    # Without a manifest nobody knows where the journal should begin.
                    if expected > 1 or snapshot_seq:
                        findings.append(_missing(expected, seq - 1))
                elif seq < expected and seq <= last_seq:
                    findings.append(
                        an_error(
                            "journal",
                            "each event once",
                            f"event {seq} stands twice",
                            "start: one of them is used",
                            mend=OPEN,
                        )
                    )
                expected, last_seq = max(expected, seq + 1), max(last_seq, seq)
                findings += self._event_problems(seq, payload, conversations)
            self._pause()
        # The newest segment is named by the next event even when it is still empty.
        if firsts and firsts[-1] > expected and (expected > 1 or snapshot_seq):
            findings.append(_missing(expected, firsts[-1] - 1))
        return findings, max(last_seq, max(firsts, default=1) - 1)

    def _event_problems(self, seq: int, payload: bytes, conversations: dict[str, int]) -> list[Finding]:
        try:
            event = decode_event(payload)
            parse_ms(event.at)
        except (msgspec.DecodeError, ValueError) as error:
            return [
                an_error(
                    "journal",
                    "an event that can be read",
                    f"event {seq} cannot: {error}",
                    "restore, or go on without it",
                    mend=OPEN,
                )
            ]
        unknown = []
        for one in (event, *(event.events or ())):
            if one.op not in EVENT_OPS:
                unknown.append(one.op)
            elif one.op in ARCHIVED_OPS:
                conversations[one.id] = seq
        return [
            an_error(
                "journal",
                "ops that this Holdfast knows",
                f"event {seq} is a {op!r:.80}",
                "install the version that wrote it",
            )
            for op in unknown
        ]

    def _look_at_kept(self, conversations: dict[str, int]) -> tuple[list[Finding], int]:
        """Of the segments kept for readers: what is wrong, and the oldest event; notes their *conversations*."""
        findings: list[Finding] = []
        oldest = last = 0
        try:
            kept = Directory(self._path / JOURNAL / KEPT)
        except FileNotFoundError:
            return [], 0
        with kept:
            for first in _firsts_in(kept):
                try:
                    segment = read_segment(kept, segment_name(first), is_newest=False)
                except FileNotFoundError:
                    continue  # removed meanwhile
                findings += (
                    a_warning(
                        "journal",
                        "whole segments in kept/",
                        f"{KEPT}/{_placed(damage)}",
                        "nothing: only event streams and a rebuilt archive would read it",
                        mend=SET_ASIDE,
                        path=f"{JOURNAL}/{KEPT}/{damage.segment}",
                    )
                    for damage in segment.damages
                )
                seqs = [line.seq for line in segment.lines]
                if not seqs:
                    continue
                if last and seqs[0] != last + 1:
                    findings.append(
                        Finding(
                            severity="notice",
                            part="journal",
                            found=f"{KEPT}/ has nothing from {last + 1} to {seqs[0] - 1}; event streams begin behind it",
                        )
                    )
                    oldest = 0
                oldest, last = oldest or seqs[0], seqs[-1]
                for line in segment.lines:
                    # A string is looked for sooner than a line is decoded.
                    if (
                        b'"conversation.' in line.payload
                        or b'"message.' in line.payload
                        or b'"escalation.' in line.payload
                    ):
                        self._event_problems(line.seq, line.payload, conversations)
                self._pause()
        return findings, oldest

    # The archive.

    def _look_at_archive(self) -> Iterator[Finding]:
        if self._engine is not None:
            yield from self._look_at_open_archive(self._engine)
            return
        path = self._path / ARCHIVE
        if not path.exists():
            if self._heads:
                yield an_error(
                    "archive",
                    f"the messages of {len(self._heads)} conversations",
                    f"{ARCHIVE} is missing",
                    "restore it; else the next start makes it anew from the journal, without what that does not have",
                    mend=ANEW,
                )
            lost = [name for name in COMPANIONS if (self._path / name).exists()]
            for name in lost:
                yield a_warning(
                    "archive",
                    f"no {name} without {ARCHIVE}",
                    f"{name} without {ARCHIVE}",
                    "run `holdfast mend`",
                    SET_ASIDE,
                    name,
                )
            return
        try:
            look = look_through(path)
        except (ArchiveDamaged, ArchiveError) as error:
            yield an_error(
                "archive",
                "an archive that can be read",
                str(error),
                "restore it from a backup; else the next start makes it anew of what can be read and of the journal",
                mend=ANEW,
            )
            return
        if look is None:
            yield Finding(severity="notice", part="archive", found="it was just being created; the next start goes on")
            return
        yield from self._look_at_closed_archive(look)

    def _look_at_closed_archive(self, look: Look) -> Iterator[Finding]:
        problems = [
            an_error(
                "archive", "an archive in order", text, "restore it, or run `holdfast mend` to make it anew", mend=ANEW
            )
            for text in look.wrong
        ]
        seen = self._seen
        if look.archived_seq > seen.last_seq:
            problems.append(
                an_error(
                    "archive",
                    f"events up to {seen.last_seq}, where the journal ends",
                    f"it has events up to {look.archived_seq}",
                    "it is of another history: the next start makes it anew; restore it and the journal together",
                    mend=ANEW,
                )
            )
        elif seen.first_seq and look.archived_seq + 1 < seen.first_seq:
            problems.append(
                an_error(
                    "archive",
                    f"every event before {seen.first_seq}, where the journal begins",
                    f"it ends at {look.archived_seq}",
                    "the next start makes it anew; restore a newer one if there is one",
                    mend=ANEW,
                )
            )
        counted = {id: _counted(line) for id, line in self._heads.items()}
        # What only one of them has yet, the next start brings to the other.
        common_seq = min(seen.snapshot_seq, look.archived_seq)
        wrong = [
            id
            for id in sorted(counted.keys() | look.versions.keys())
            if seen.conversations.get(id, 0) <= common_seq
            and counted.get(id) != (look.versions.get(id), look.messages.get(id, 0))
        ]

        def lacks(id: str) -> bool:
            """Whether the conversation is as it should be, but for messages that are nowhere else in this directory."""
            head = counted.get(id)
            return head is not None and head[0] == look.versions.get(id) and head[1] > look.messages.get(id, 0)

        problems += (
            an_error(
                "archive",
                f"conversation {id!a:.80} {_in_words(counted.get(id))}, as in {file_of(CONVERSATIONS)}",
                _in_words((look.versions[id], look.messages.get(id, 0)) if id in look.versions else None),
                "restore the conversation from a backup"
                if lacks(id)
                else "restore it, or run `holdfast mend` to make it anew",
                mend="" if lacks(id) else ANEW,
            )
            for id in wrong
        )
        yield from problems
        if not problems:
            yield Finding(
                severity="ok",
                part="archive",
                found=f"{len(look.versions)} conversations, {sum(look.messages.values())} messages, at event "
                f"{look.archived_seq}, schema {look.schema_version}",
            )

    def _look_at_open_archive(self, engine: Engine) -> Iterator[Finding]:
        def ask(archive: Archive) -> tuple[int, int, list[str], dict[str, int] | None]:
            figures = archive.figures(self._now_ms)
            if not self._deep:
                return figures.conversations, figures.messages, [], None
            return figures.conversations, figures.messages, archive.check(), archive.message_counts()

        try:
            conversations, messages, wrong, counts = engine.transcripts.read(ask)
        except HoldfastError as error:
            self._pause()
            yield a_warning("archive", "an archive that answers", error.detail, "see the daemon's log")
            return
        problems = [an_error("archive", "an archive in order", text, "stop, and run `holdfast mend`") for text in wrong]
        there = engine.count(CONVERSATIONS)
        if there != conversations:
            problems.append(
                an_error(
                    "archive",
                    f"{there} conversations, as in memory",
                    f"{conversations}",
                    "stop, and run `holdfast mend` to make it anew",
                )
            )
        for number, (id, count) in enumerate((counts or {}).items()):
            if number % PAUSE_RECORDS == 0:
                self._pause()
            if not self._agrees(engine, id, count):
                problems.append(
                    an_error(
                        "archive",
                        f"the messages of conversation {id!a:.80}, as its head counts them",
                        f"{count}",
                        "stop, and run `holdfast mend`",
                    )
                )
        yield from problems
        if not problems:
            yield Finding(severity="ok", part="archive", found=f"{conversations} conversations, {messages} messages")

    def _agrees(self, engine: Engine, id: str, count: int) -> bool:
        """Whether the conversation *id* has *count* messages in memory, or was changed while we looked."""
        found = engine.get(CONVERSATIONS, id)
        if found is None:
            return True
        head = orjson.loads(found.value)
        return bool(head["message_count"] + head["system_count"] >= count)

    # What is kept of the past.

    def _look_at_history(self) -> Iterator[Finding]:
        history = History(self._path, self._seal)
        try:
            parts = [part for part in history.parts() if part.place.parent.parent.name == BACKUPS]
        except OSError as error:
            yield an_error("history", "a directory that can be read", str(error.strerror or error), "check the disk")
            return
        if not parts:
            yield Finding(severity="ok", part="history", found="none yet")
            return
        if self._deep:
            self._progress("reading the history")
            try:
                for line in history.lines(parts[0].first_seq - 1, parts[-1].last_seq):
                    if line.seq % PAUSE_RECORDS == 0:
                        self._pause()
            except HistoryGap as error:
                yield a_warning(
                    "history",
                    "every event of the days that backups.pitr names",
                    str(error),
                    "nothing: moments before that cannot be restored any more; take a backup",
                )
                return
        size = sum(part.place.stat().st_size for part in parts)
        yield Finding(
            severity="ok",
            part="history",
            found=f"events {parts[0].first_seq} to {parts[-1].last_seq} in {readable_size(size)}, from {format_ms(parts[0].first_at)} on",
        )

    def _look_at_backups(self) -> Iterator[Finding]:
        sets = list_sets(self._path)
        problems: list[Finding] = []
        # Unchanged content is shared among sets, and looked at once.
        known: dict[tuple[int, int], str] = {}
        for found in sets:
            self._progress(f"looking at backup {found.name}")
            problems += self._set_problems(found, known)
        yield from problems
        sound = [found for found in sets if found.manifest is not None and not found.is_foreign]
        if strangers := [found.name for found in sets if found.is_foreign]:
            yield Finding(
                severity="notice",
                part="backups",
                found=f"{_many(len(strangers), 'set')} of another data directory: {', '.join(strangers)}",
                action="nothing: what is there is used when it is named, and never removed",
            )
        if not sets:
            yield Finding(severity="notice", part="backups", found="there is none yet", action="run `holdfast backup`")
            return
        proved = sum(found.is_proved for found in sound)
        if not proved:
            yield a_warning("backups", "a backup that was proved", "none", "run `holdfast backup`")
        if not problems:
            yield Finding(
                severity="ok",
                part="backups",
                found=f"{_many(len(sound), 'set')}, {proved} of them proved, the newest {sound[0].name} at event "
                f"{sound[0].manifest.seq if sound[0].manifest else 0}",
            )

    def _set_problems(self, found: BackupSet, known: dict[tuple[int, int], str]) -> Iterator[Finding]:
        retake = "take another (`holdfast backup`), then remove this directory"
        if found.manifest is None:
            yield an_error("backups", f"a set that can be read: {found.name}", found.damage, retake)
            return
        for name, stored in sorted(found.manifest.files.items()):
            path = found.path / stored.stored
            try:
                status = path.lstat()
                key = (status.st_dev, status.st_ino)
                if key not in known:
                    known[key] = self._digest(path)
            except FileNotFoundError:
                yield an_error("backups", name, f"{found.name} lacks {stored.stored}", retake)
                continue
            except OSError as error:
                yield an_error("backups", name, f"{found.name}/{stored.stored}: {error.strerror}", retake)
                continue
            if (status.st_size, known[key]) != (stored.stored_bytes, stored.stored_sha256):
                yield an_error(
                    "backups", "the content that was backed up", f"{found.name}/{stored.stored} changed", retake
                )
        if found.proof is not None and not found.proof.ok:
            yield an_error("backups", f"that {found.name} can be loaded", found.proof.reason, retake)
        elif self._deep:
            yield from self._prove(found, retake)

    def _prove(self, found: BackupSet, retake: str) -> Iterator[Finding]:
        self._progress(f"loading backup {found.name}")
        try:
            if self._engine is not None:
                # In a process of its own, so that nobody waits for the interpreter.
                proof = prove_apart(found, self._settings, threading.Event())
            else:
                with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
                    proof = prove(found, self._seal, Path(scratch))
        except (Unproved, StorageFull, OSError) as error:
            yield Finding(severity="notice", part="backups", found=f"{found.name} could not be tried: {error}")
            return
        if not proof.ok:
            yield an_error("backups", f"that {found.name} can be loaded", proof.reason, retake)

    def _digest(self, path: Path) -> str:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _look_at_quarantine(self) -> Iterator[Finding]:
        try:
            names = [name for name in os.listdir(self._path / "quarantine") if not name.endswith(".report.json")]
        except OSError:
            names = []
        if names:
            yield Finding(
                severity="notice",
                part="quarantine",
                found=f"{_many(len(names), 'damaged file')}, the oldest {min(names)}",
                action="read the reports beside them; remove what you do not need",
            )
        else:
            yield Finding(severity="ok", part="quarantine", found="empty")

    # What nobody knows.

    def _look_at_files(self) -> Iterator[Finding]:
        manifest = self._manifests().present
        known = FILES | (manifest.files.keys() if manifest is not None else set())
        temporaries = set(self._directory.temporaries())
        has_intent = self._directory.stat(INTENT) is not None
        for name in self._directory.names():
            status = self._directory.stat(name)
            if status is None:
                continue
            is_link = stat.S_ISLNK(status.st_mode)
            if name in temporaries or (name in LEFTOVER_NAMES and self._engine is None):
                if self._engine is None:
                    yield Finding(
                        severity="notice",
                        part="files",
                        found=f"{name} is half written; the next start removes it",
                        mend=REMOVE,
                        path=name,
                    )
            elif name in (STAGING, SCRATCH, ARCHIVE_SCRATCH) and self._engine is None and not has_intent:
                yield Finding(
                    severity="notice",
                    part="files",
                    found=f"{name}/ is left of a restore that was given up; the next start removes it",
                    mend=REMOVE,
                    path=name,
                )
            elif name == INTENT:
                yield a_warning(
                    "files",
                    "no restore under way",
                    "a restore was interrupted",
                    "start, or run `holdfast mend`: it goes on",
                    mend="completes it",
                )
            elif is_link and name in known | DIRECTORIES:
                yield an_error("files", "no symbolic links", f"{name} is one", "move away what is there")
            elif name in DIRECTORIES and not stat.S_ISDIR(status.st_mode):
                yield an_error("files", "a directory", f"{name} is none", "move away what is there")
            elif name not in known | DIRECTORIES and not self._is_collection(name):
                yield Finding(severity="notice", part="files", found=f"{name} is not ours; it is left alone")
        for place in (BACKUPS, JOURNAL):
            yield from self._strangers(place)

    def _is_collection(self, name: str) -> bool:
        return name.endswith(".json") and is_custom_name(name.removesuffix(".json"))

    def _strangers(self, place: str) -> Iterator[Finding]:
        try:
            names = sorted(os.listdir(self._path / place))
        except OSError:
            return
        for name in names:
            if place == JOURNAL:
                is_ours = SEGMENT_NAME.fullmatch(name) is not None or name == KEPT
            else:
                is_ours = SET_NAME.fullmatch(name) is not None or name == JOURNAL or name.startswith(_KEPT_FILES)
            if is_ours:
                continue
            if name.endswith(".tmp") and name.startswith("."):
                if self._engine is None:
                    yield Finding(
                        severity="notice",
                        part="files",
                        found=f"{place}/{name} is half made; the next start removes it",
                        mend=REMOVE,
                        path=f"{place}/{name}",
                    )
            else:
                yield Finding(severity="notice", part="files", found=f"{place}/{name} is not ours; it is left alone")

    def _pause(self) -> None:
        """Let others have the interpreter, where there are others; break off when that is wanted."""
        if self._is_stopping():
            raise Unavailable("stopping; verify again later")
        if self._engine is not None:
            time.sleep(PAUSE_S)


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _firsts_in(directory: Directory) -> list[int]:
    return sorted(int(match[1]) for name in directory.names() if (match := SEGMENT_NAME.fullmatch(name)))


def _counted(line: bytes) -> tuple[int, int]:
    """Version and messages of a conversation, as its line says."""
    head = orjson.loads(line)
    return head["_holdfast"]["v"], head["message_count"] + head["system_count"]


def _in_words(counted: tuple[int, int] | None) -> str:
    return "absent" if counted is None else f"at version {counted[0]} with {counted[1]} messages"


def _damaged(damage: Damage) -> Finding:
    return an_error(
        "journal",
        "events whose checksum holds",
        _placed(damage),
        "restore, or start: the segment is copied to quarantine/ and the rest applied",
        mend=OPEN,
    )


def _missing(first: int, last: int) -> Finding:
    return an_error(
        "journal",
        f"events {first} to {last}",
        "they are missing",
        "restore; a start goes on without them, degraded",
        mend=OPEN,
    )


def _placed(damage: Damage) -> str:
    return f"{damage.segment}: byte {damage.offset}, {damage.bytes} bytes: {damage.reason}"
