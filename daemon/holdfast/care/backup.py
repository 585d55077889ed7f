"""Backups: consistent sets of everything, taken without stopping anybody, proved by loading them.

Like a base backup with its write-ahead log: a flush; hard links of the snapshot files, which are replaced and never changed in
place; a copy of the archive, in steps; the events that lie between the two, from the journal. Then all of it is compressed at
leisure. What has the same content as in the newest earlier set is a hard link to the file there.
"""

from __future__ import annotations

import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from holdfast import __version__
from holdfast.archive.base import Archive, ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_file import copy_stopped, totals_of
from holdfast.care.backup_set import (
    BACKUPS,
    SET_NAME,
    BackupSet,
    Proof,
    SetManifest,
    list_sets,
    own_sets,
    read_set,
    write_proof,
)
from holdfast.care.history import JOURNAL, History, HistoryGap
from holdfast.care.history_follower import HistoryFollower, history_of
from holdfast.care.moments import note_put_back, restored_seqs
from holdfast.care.packer import Wanted, add_files
from holdfast.care.packing import Seal
from holdfast.care.prover import Unproved, prove_apart, shown
from holdfast.care.rotation import at_of, is_good, stale, was_fetched_lately
from holdfast.care.seal import seal_of, writing_seal
from holdfast.care.set_writer import SetWriter, check_room, leaving_room, read_pieces
from holdfast.checksum import crc32
from holdfast.clock import Clock, format_ms, parse_ms
from holdfast.core.sales import decode_sales
from holdfast.disk.files import Directory
from holdfast.disk.journal import encode_line, segment_name
from holdfast.disk.snapshot import MANIFEST, MANIFEST_NEXT, FileEntry, Manifest, encode_manifest, read_manifest, salvage
from holdfast.errors import DataRefused, HoldfastError, JournalBroken, StorageFull, Unavailable
from holdfast.flush import FILE_OF, SALES_FILE, Flusher
from holdfast.measures import BackupFigures
from holdfast.ops import BackupInfo, BackupList, BackupReport
from holdfast.settings import Settings
from holdfast.turns import Turns

CHECK_EVERY_S = 60.0
"""How often it is looked whether a backup or a proof is due, and how long after the start first."""

RETRY_S = 600.0
"""After a backup or a proof that failed, the time to the next one."""

OVERDUE_AFTER = 2
"""So many times ``backups.every`` without a new set are told as a problem."""

PROVE_EVERY_S = 24 * 3600.0
"""The newest set is proved again when its proof is so old: disks forget."""

SETTINGS_FILE, TOKENS_FILE = "settings.json", "tokens.json"
DAYS, MESSAGES = "days", "messages"

UPGRADE = "upgrade"
"""Why there is a set from before another version changed anything."""

_UPGRADE_AGAIN_MS = 3600 * 1000
_DOUBLINGS_MAX = 20
_TRIES = 2
_LINES_AT_ONCE = 500
_COLLECTION_IN = {file: name for name, file in FILE_OF.items()}
_NOT_SNAPSHOTS = frozenset({MANIFEST, MANIFEST_NEXT, TOKENS_FILE, "restore.json"})

Progress = Callable[[str], object]


class Source(NamedTuple):
    """What a backup is taken of: the engine's side of it.

    Attributes:
        data_dir: the data directory.
        settings: gives those in use.
        flush: writes the snapshots.
        flusher: holds them still.
        archive: gives the archive, None when there is none that could be used.
        archive_failure: gives why it cannot be written, None when it can.
        seq: gives the last event decided.
        change_detector: gives a function that tells whether anything was changed since it was asked last.
        notes: reasons why the data is not all it should be, by who found them.
    """

    data_dir: Path
    settings: Callable[[], Settings]
    flush: Callable[[], object]
    flusher: Flusher
    archive: Callable[[], Archive | None]
    archive_failure: Callable[[], str | None]
    seq: Callable[[], int]
    change_detector: Callable[[], Callable[[], bool]]
    notes: dict[str, str]


class Backups:
    """Takes, proves and rotates the sets of an open data directory; one backup at a time, from any thread.

    Attributes:
        completed: each is called with every new set, in the thread that took it; must not raise.
        history: what keeps the events behind the sets.
        is_wanted: whether there is something that no set and no event has, such as what was merged at the start; the next
            look takes a backup then.
    """

    def __init__(self, source: Source, clock: Clock, log: Any) -> None:
        self.completed: tuple[Callable[[BackupSet], object], ...] = ()
        self.is_wanted = False
        self._source = source
        self._clock = clock
        self._log = log
        self._since_ms = clock.now_ms()
        self._cancelled = threading.Event()
        # While a set is written, proved, or removed.
        self._turns = Turns[BackupReport]()
        self._tried_at: float | None = None
        self._figures = BackupFigures()
        self.history = HistoryFollower(
            source.data_dir, source.settings, lambda: self._seal(), source.flusher, source.change_detector, clock, log
        )

    def start(self) -> None:
        """Remove what a killed process left half made, and begin to keep the history. Called once, under the lock."""
        with suppress(OSError, DataRefused), Directory(self._source.data_dir) as data:
            if data.stat(BACKUPS) is not None:
                with data.subdirectory(BACKUPS) as backups:
                    _remove_half_made(backups)
        self._count(list_sets(self._source.data_dir))
        own = own_sets(self._source.data_dir)
        self._note_newest(own[0] if own else None)
        self._note_newer(own)
        self.history.start()

    def take(self, reason: str, progress: Progress | None = None) -> BackupReport:
        """Make a set of everything acknowledged so far, prove it, and remove those that need not be kept; blocks.

        While one is taken, all further calls share the one that comes after it. *progress* is told in words how far it is.

        Raises:
            StorageFull, OSError: there is no new set; those that are there stay.
            Unavailable: stopping.
        """
        return self._turns.take(lambda: self._take(reason, progress or (lambda text: None)))

    def run_when_due(self) -> None:
        """Take the daily backup, or prove the newest one again, when it is time; what fails is told in the log."""
        settings, now_ms = self._source.settings(), self._clock.now_ms()
        if self._tried_at is not None and self._clock.monotonic() < self._tried_at + RETRY_S:
            return
        sets = own_sets(self._source.data_dir)
        newest = sets[0] if sets else None
        self._note_newest(newest)
        if self._source.seq() and self._is_due(sets, settings.backups.every, now_ms):
            with suppress(HoldfastError, OSError):
                self.take("daily")
        elif newest is not None and self._is_proof_due(newest, now_ms):
            self.prove(newest)

    def prove(self, found: BackupSet, *, shared: bool = False) -> Proof | None:
        """Load everything from the set *found*, and note in it how that went; None when it could not be tried.

        Args:
            shared: the caller has made sure that nothing is removed meanwhile.

        Raises:
            Unavailable: stopping.
        """
        if not shared:
            with self._turns.running:
                return self.prove(found, shared=True)
        self._tried_at = self._clock.monotonic()
        try:
            proof = prove_apart(found, self._source.settings(), self._cancelled)
            write_proof(found.path, proof)
        except (Unproved, OSError, StorageFull) as error:
            self._log.error("backup.proof_failed", backup=found.name, reason=str(error), is_tried=False)
            self._source.notes["proof"] = f"backup {found.name} could not be proved: {error}"
            self._figures = msgspec.structs.replace(self._figures, is_proof_ok=False)
            return None
        if proof.ok:
            self._tried_at = None
            self._log.info("backup.proved", backup=found.name, duration_ms=proof.duration_ms)
        else:
            self._log.error("backup.proof_failed", backup=found.name, reason=proof.reason, is_tried=True)
        self._note_newest(read_set(found.path))
        return proof

    def listed(self) -> BackupList:
        """The sets, newest first, and the history; reads a small file of each."""
        sets = list_sets(self._source.data_dir)
        return BackupList(infos_of(sets), history_of(self._source.settings(), sets, self.history.problem))

    @property
    def complaint(self) -> str:
        """What an operator should do something about; empty when the newest set is new enough, or nothing is to be saved."""
        every_s = self._source.settings().backups.every
        now_ms, taken_ms = self._clock.now_ms(), self._figures.taken_ms
        age_s = (now_ms - max(taken_ms, self._since_ms)) / 1000
        if age_s <= OVERDUE_AFTER * every_s or not self._source.seq():
            return ""
        what = (
            f"the newest backup is {(now_ms - taken_ms) / 3_600_000:.0f} hours old"
            if taken_ms
            else "there is no backup"
        )
        return f"{what}, with backups.every at {every_s / 3600:g} hours; the log says why, `holdfast backup` makes one"

    def figures(self) -> BackupFigures:
        """For metrics; reads nothing."""
        return msgspec.structs.replace(
            self._figures, history_bytes=self.history.bytes, is_history_kept=not self.history.problem
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No backup is taken meanwhile; one under way is waited for."""
        with self._turns.running:
            yield

    def cancel(self) -> None:
        """Break off what is under way, without waiting for it; further backups are refused."""
        self._cancelled.set()

    def close(self) -> None:
        """Break off what is under way, leaving nothing half made; further backups are refused. May be called twice."""
        self._cancelled.set()
        self.history.close()
        with self._turns.running:
            pass

    def _is_due(self, sets: list[BackupSet], every_s: float, now_ms: int) -> bool:
        """Whether it is time for another backup; *sets* are those that can be read, newest first."""
        if self.is_wanted or not sets or sets[0].manifest is None:
            return True
        age_s = (now_ms - at_of(sets[0])) / 1000
        if age_s < 0:
            return True  # taken while the clock was ahead, and nobody knows how long it would be waited for
        for seq in restored_seqs(self._source.data_dir):
            if sets[0].manifest.seq < seq <= self._source.seq():
                return True  # a restored state of which there is no set yet, and so no moment since
        failed = next((count for count, found in enumerate(sets) if is_good(found)), len(sets))
        # Each time after twice the time: what fails all day must not fill the disk.
        return age_s >= (min(every_s, RETRY_S * 2 ** min(failed - 1, _DOUBLINGS_MAX)) if failed else every_s)

    def _is_proof_due(self, newest: BackupSet, now_ms: int) -> bool:
        if newest.proof is None:
            return True
        with suppress(ValueError):
            return now_ms - parse_ms(newest.proof.at) >= PROVE_EVERY_S * 1000
        return True

    def _take(self, reason: str, progress: Progress) -> BackupReport:
        started = self._clock.monotonic()
        self._tried_at = started
        try:
            self._check_cancelled()
            made = self._write(reason, progress)
        except Unavailable:
            raise  # stopping: nothing failed
        except (HoldfastError, OSError) as error:
            self._source.notes["backup"] = f"the last backup failed: {error}"
            self._figures = msgspec.structs.replace(
                self._figures, failures=self._figures.failures + 1, is_last_ok=False
            )
            self._log.error("backup.failed", reason=reason, error=str(error))
            raise
        self.is_wanted = False
        self._source.notes.pop("backup", None)
        manifest = made.found.manifest
        assert manifest is not None, "a set was written that cannot be read"
        self._log.info(
            "backup.completed",
            backup=made.found.name,
            reason=reason,
            seq=manifest.seq,
            bytes=made.found.stored_bytes,
            new_bytes=made.new_bytes,
            notes=made.notes,
            duration_ms=round((self._clock.monotonic() - started) * 1000, 1),
        )
        progress("loading it, to see that all is there")
        proof, problem = None, ""
        try:
            proof = self.prove(made.found, shared=True)
            problem = self._source.notes.get("proof", "") if proof is None else proof.reason
        except Unavailable as error:
            problem = str(error)
        if proof is not None and proof.ok:
            self._rotate()
        took_s = self._clock.monotonic() - started
        self._figures = msgspec.structs.replace(self._figures, is_last_ok=True, duration_s=took_s)
        self._count(list_sets(self._source.data_dir))
        for completed in self.completed:
            completed(made.found)
        return _report_of(made, reason, proof, problem, self._clock, started)

    def _write(self, reason: str, progress: Progress) -> _Made:
        source = self._source
        flusher, settings, notes = source.flusher, source.settings(), list[str]()
        seal = self._seal()
        detector = source.change_detector()

        def is_used() -> bool:
            self._check_cancelled()
            return detector()

        floor_seq = flusher.snapshot_seq
        flusher.follow("backup", lambda: floor_seq)
        try:
            with Directory(source.data_dir) as data, data.subdirectory(BACKUPS) as backups:
                is_busy = leaving_room(data, is_used)
                is_busy()
                writer = SetWriter(backups, self._new_name(), _newest_good(source.data_dir), seal, is_busy)
                try:
                    for tries_left in reversed(range(_TRIES)):
                        progress("writing the snapshots")
                        self._flush(notes)
                        taken = flusher.hold(lambda manifest, directory: _link(manifest, directory, writer))
                        progress("compressing the snapshots")
                        at = format_ms(self._clock.now_ms())
                        counts, changed = _add_snapshots(writer, taken, settings, self._cancelled)
                        if not changed or not tries_left:
                            break
                        # Edited, or changed by the disk, while we run: what memory holds is what counts.
                        flusher.distrust(changed)
                        for name in taken.files:
                            writer.drop(name)
                    notes += [f"{name} was changed by somebody else, and is in it as it was found" for name in changed]
                    progress("copying the archive")
                    archived_seq = self._copy_archive(writer, counts, taken.snapshot_seq, notes, is_busy)
                    progress("adding the events between")
                    reached = _add_journal(writer, History(source.data_dir), taken.snapshot_seq, archived_seq, notes)
                    _add_rest(writer, data, taken, settings)
                    found = writer.finish(
                        SetManifest(
                            data_format=taken.format,
                            holdfast=__version__,
                            at=at,
                            reason=reason,
                            seq=max(taken.snapshot_seq, reached),
                            snapshot_seq=taken.snapshot_seq,
                            lineage=taken.lineage,
                            archived_seq=taken.snapshot_seq if archived_seq is None else archived_seq,
                            counts=counts,
                        )
                    )
                except BaseException:
                    writer.abandon()
                    raise
        finally:
            flusher.unfollow("backup")
        return _Made(found, writer.new_bytes, notes)

    def _flush(self, notes: list[str]) -> None:
        try:
            self._source.flush()
        except JournalBroken:
            raise
        except (StorageFull, OSError) as error:
            notes.append(f"no flush was possible before it ({error}): the events since the last one are in it as such")

    def _copy_archive(
        self,
        writer: SetWriter,
        counts: dict[str, int],
        snapshot_seq: int,
        notes: list[str],
        is_busy: Callable[[], bool],
    ) -> int | None:
        """Where the archive in the set stands; None when it has none."""
        source = self._source
        archive = source.archive()
        path = writer.directory.path / ARCHIVE
        try:
            if archive is None:
                raise ArchiveError(source.archive_failure() or "there is none that can be used")
            # Copied as it is, in large steps, before it is compressed.
            with Directory(source.data_dir) as data:
                found = data.stat(ARCHIVE)
                check_room(data, 0 if found is None else found.st_size)
            archived_seq = archive.copy_to(path, is_busy)
            _, messages = totals_of(path)
        except (ArchiveError, ArchiveDamaged) as error:
            self._check_cancelled()
            with suppress(FileNotFoundError):
                path.unlink()
            notes.append(f"without the archive ({error}), but with all events that the journal has for it")
            return None
        if archived_seq < snapshot_seq and (failure := source.archive_failure()) is not None:
            notes.append(
                f"the archive is behind, at event {archived_seq} ({failure}); the events that it lacks are in it"
            )
        counts[MESSAGES] = messages
        add_files(writer, [Wanted("archive", ARCHIVE, messages)], source.settings(), self._cancelled)
        return archived_seq

    def _rotate(self) -> None:
        sets = list_sets(self._source.data_dir)
        now_ms = self._clock.now_ms()
        wanted = self._source.settings().backups
        removed = [found for found in stale(sets, wanted, now_ms) if not was_fetched_lately(found, now_ms)]
        if not removed:
            return
        try:
            with Directory(self._source.data_dir / BACKUPS) as backups:
                for found in removed:
                    remove_set(backups, found.name)
        except OSError as error:
            self._log.warning("backups.rotation_failed", reason=str(error))
            return
        self._log.info("backups.rotated", removed=[found.name for found in removed], kept=len(sets) - len(removed))

    def _note_newest(self, newest: BackupSet | None) -> None:
        """Take over into figures and reasons how the *newest* set stands."""
        if newest is None:
            return
        proof = newest.proof
        if proof is not None:
            if proof.ok:
                self._source.notes.pop("proof", None)
            else:
                self._source.notes["proof"] = f"backup {newest.name} failed its proof: {proof.reason}"
            with suppress(ValueError):
                self._figures = msgspec.structs.replace(self._figures, proved_ms=parse_ms(proof.at))
        self._figures = msgspec.structs.replace(
            self._figures, taken_ms=at_of(newest), is_proof_ok=proof is None or proof.ok
        )

    def _note_newer(self, sets: list[BackupSet]) -> None:
        """Tell when the backups know of later events than there are: the directory was put back from an older copy."""
        present_seq = self._source.seq()
        newest_seq = max([self.history.newest_packed(), *(found.manifest.seq for found in sets if found.manifest)])
        if newest_seq > present_seq:
            self.is_wanted = True
            try:
                if present_seq:  # an empty directory is about to be restored
                    self.history.set_aside_newer(present_seq)
                with Directory(self._source.data_dir) as data:
                    note_put_back(data, present_seq, self._clock.now_ms())
            except (HoldfastError, OSError) as error:
                self._log.warning("history.failed", reason=str(error))
            self._source.notes["copied"] = (
                f"the data ends with event {present_seq}, but its backups know of event {newest_seq}: it was put back from "
                "an older copy; what is missing is in the backups"
            )

    def _count(self, sets: list[BackupSet]) -> None:
        files = {
            file.stored_sha256: file.stored_bytes
            for found in sets
            if found.manifest is not None
            for file in found.manifest.files.values()
        }
        newest = next((found for found in sets if found.manifest is not None and not found.is_foreign), None)
        self._figures = msgspec.structs.replace(
            self._figures,
            sets=len(sets),
            bytes=sum(files.values()),
            taken_ms=self._figures.taken_ms if newest is None else at_of(newest),
        )

    def _seal(self) -> Seal | None:
        return writing_seal(seal_of(self._source.settings()))

    def _new_name(self) -> str:
        return new_name(self._source.data_dir, self._clock.now_ms())

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Unavailable("stopping; take the backup when it is back")


class _Made(NamedTuple):
    found: BackupSet
    new_bytes: int
    notes: list[str]


def back_up_stopped(
    settings: Settings,
    reason: str,
    log: Any,
    progress: Progress | None = None,
    *,
    prove: bool = True,
    cancelled: threading.Event | None = None,
) -> BackupSet:
    """Make a set of a data directory that nobody has open, under the caller's lock, of whatever state it is in.

    What is damaged is in it as it is, which the log says. Nothing outside of ``backups/`` is changed, but that SQLite may
    create an index of the archive's log beside it.

    Args:
        reason: why.
        prove: load everything from it afterwards; the set says how that went.
        cancelled: set it to give up.

    Raises:
        StorageFull, OSError: there is no set.
        Unavailable: *cancelled*.
    """
    report = report_stopped(settings, reason, log, progress, prove=prove, cancelled=cancelled)
    return read_set(settings.data_dir / BACKUPS / report.name)


def back_up_before_upgrade(
    settings: Settings, written_by: str, log: Any, progress: Progress, cancelled: threading.Event
) -> None:
    """Make a set of what another version has *written*, before this one changes anything of it; under the lock.

    One an hour is enough for a daemon that does not come up. It is proved later, in its turn, so that a start is not held up;
    without room for it the start goes on, and the log says so.

    Raises:
        Unavailable: *cancelled*.
    """
    if not written_by or written_by == __version__:
        return
    now_ms = Clock().now_ms()
    made = next(iter(own_sets(settings.data_dir)), None)
    if made is not None and made.manifest is not None and made.manifest.reason == UPGRADE:
        age_ms = now_ms - at_of(made)
    else:
        age_ms = _UPGRADE_AGAIN_MS
    if age_ms < _UPGRADE_AGAIN_MS:
        return
    progress(f"taking a backup of what Holdfast {written_by} has written")
    try:
        report_stopped(settings, UPGRADE, log, progress, prove=False, cancelled=cancelled)
    except Unavailable:
        raise
    except (HoldfastError, OSError) as error:
        log.error("backup.failed", reason=UPGRADE, error=str(error))


def report_stopped(
    settings: Settings,
    reason: str,
    log: Any = None,
    progress: Progress | None = None,
    *,
    prove: bool = True,
    cancelled: threading.Event | None = None,
) -> BackupReport:
    """As ``back_up_stopped``, for who wants to know how it went; without *log* nobody else is told."""
    clock, cancelled, progress = Clock(), cancelled or threading.Event(), progress or (lambda text: None)
    started = clock.monotonic()
    made = _write_stopped(settings, reason, clock, progress, cancelled)
    manifest = made.found.manifest
    assert manifest is not None, "a set was written that cannot be read"
    if log is not None:
        log.info(
            "backup.completed",
            backup=made.found.name,
            reason=reason,
            seq=manifest.seq,
            bytes=made.found.stored_bytes,
            new_bytes=made.new_bytes,
            notes=made.notes,
            duration_ms=round((clock.monotonic() - started) * 1000, 1),
        )
    proof, problem = None, ""
    if prove:
        progress("loading it, to see that all is there")
        try:
            proof = prove_apart(made.found, settings, cancelled)
            write_proof(made.found.path, proof)
            problem = proof.reason
        except Unproved as error:
            problem = str(error)
        if log is not None and proof is not None and proof.ok:
            log.info("backup.proved", backup=made.found.name, duration_ms=proof.duration_ms)
        elif log is not None:
            log.error("backup.proof_failed", backup=made.found.name, reason=problem, is_tried=proof is not None)
    return _report_of(made, reason, proof, problem, clock, started)


def _write_stopped(
    settings: Settings, reason: str, clock: Clock, progress: Progress, cancelled: threading.Event
) -> _Made:
    notes: list[str] = []

    def is_busy() -> bool:
        if cancelled.is_set():
            raise Unavailable("stopping; the backup was given up, nothing was changed")
        return False

    with Directory(settings.data_dir) as data, data.subdirectory(BACKUPS) as backups:
        _remove_half_made(backups)
        name = new_name(settings.data_dir, clock.now_ms())
        seal = writing_seal(seal_of(settings))
        writer = SetWriter(backups, name, _newest_good(settings.data_dir), seal, is_busy)
        try:
            progress("compressing the snapshots")
            manifest = _settled_manifest(data, notes)
            counts = _add_found(writer, data, manifest, notes)
            progress("copying the archive")
            archived_seq = _copy_stopped_archive(writer, data, counts, notes)
            progress("adding the journal")
            history = History(settings.data_dir)
            last_seq = max([manifest.snapshot_seq, *(part.last_seq for part in history.parts() if not part.is_packed)])
            reached = _add_journal(writer, history, manifest.snapshot_seq, archived_seq, notes, up_to_seq=last_seq)
            _add_rest(writer, data, manifest, settings)
            found = writer.finish(
                SetManifest(
                    data_format=manifest.format,
                    holdfast=__version__,
                    at=format_ms(clock.now_ms()),
                    reason=reason,
                    seq=max(manifest.snapshot_seq, reached),
                    snapshot_seq=manifest.snapshot_seq,
                    lineage=manifest.lineage,
                    archived_seq=manifest.snapshot_seq if archived_seq is None else archived_seq,
                    counts=counts,
                )
            )
        except BaseException:
            writer.abandon()
            raise
    return _Made(found, writer.new_bytes, notes)


def list_stopped(settings: Settings) -> BackupList:
    """The sets of a directory that nobody has open, newest first, and its history."""
    sets = list_sets(settings.data_dir)
    return BackupList(infos_of(sets), history_of(settings, sets))


def _report_of(
    made: _Made, reason: str, proof: Proof | None, problem: str, clock: Clock, started: float
) -> BackupReport:
    manifest = made.found.manifest
    assert manifest is not None, "a set was written that cannot be read"
    return BackupReport(
        name=made.found.name,
        reason=reason,
        seq=manifest.seq,
        records=sum(manifest.counts.values()),
        files=len(manifest.files),
        bytes=made.found.stored_bytes,
        new_bytes=made.new_bytes,
        notes=made.notes,
        proved=None if proof is None else proof.ok,
        problem=problem,
        duration_ms=round((clock.monotonic() - started) * 1000, 1),
        at=format_ms(clock.now_ms()),
    )


def infos_of(sets: list[BackupSet]) -> list[BackupInfo]:
    """What people want to know of *sets*, which come newest first."""
    infos = []
    for index, found in enumerate(sets):
        manifest, proof = found.manifest, found.proof
        older = {
            file.stored_sha256
            for other in sets[index + 1 : index + 2]
            if other.manifest is not None
            for file in other.manifest.files.values()
        }
        files = [] if manifest is None else list(manifest.files.values())
        infos.append(
            BackupInfo(
                name=found.name,
                at="" if manifest is None else manifest.at,
                reason="" if manifest is None else manifest.reason,
                seq=0 if manifest is None else manifest.seq,
                records=0 if manifest is None else sum(manifest.counts.values()),
                bytes=found.stored_bytes,
                new_bytes=sum(file.stored_bytes for file in files if file.stored_sha256 not in older),
                encrypted=manifest is not None and manifest.encrypted,
                proved=None if proof is None or manifest is None else proof.ok,
                proved_at="" if proof is None else proof.at,
                foreign=found.is_foreign,
                problem=found.damage or ("" if proof is None else proof.reason),
            )
        )
    return infos


def remove_set(backups: Directory, name: str) -> None:
    """Remove the set *name*: at no moment is there a part of it under the name of a set."""
    gone = f".{name}.0.tmp"
    if backups.stat(gone) is not None:
        backups.remove_tree(gone)
    backups.rename(name, gone)
    backups.sync()
    backups.remove_tree(gone)


def _remove_half_made(backups: Directory) -> None:
    """Remove what a killed process left: sets, parts of the history, and files such as ``restores.json``. Under the lock."""
    for name in backups.temporaries():
        found = backups.stat(name)
        if found is not None and stat.S_ISDIR(found.st_mode):
            backups.remove_tree(name)
        else:
            backups.remove(name)
    if backups.stat(JOURNAL) is not None:
        with backups.subdirectory(JOURNAL) as packed:
            packed.remove_stale_temporaries()


def new_name(data_dir: Path, now_ms: int) -> str:
    """A name for a set taken now: above all that are there, also when the clock was set back."""
    taken = list_sets(data_dir)
    for found in taken:
        with suppress(ValueError):
            if found.manifest is not None:
                now_ms = max(now_ms, _ms_of(found.name) + 1)
    name = format_ms(now_ms).replace(":", "")
    while any(found.name == name for found in taken):
        now_ms += 1
        name = format_ms(now_ms).replace(":", "")
    assert SET_NAME.fullmatch(name)
    return name


def _ms_of(name: str) -> int:
    day, _, time = name.partition("T")
    return parse_ms(f"{day}T{time[:2]}:{time[2:4]}:{time[4:]}")


def _newest_good(data_dir: Path) -> BackupSet | None:
    return next((found for found in list_sets(data_dir) if is_good(found)), None)


# Snapshots.


def _link(manifest: Manifest, data: Directory, writer: SetWriter) -> Manifest:
    for name in manifest.files:
        if data.stat(name) is not None:
            writer.directory.remove(name)
            data.keep_link(name, writer.directory)
    return manifest


def _add_snapshots(
    writer: SetWriter, manifest: Manifest, settings: Settings, cancelled: threading.Event
) -> tuple[dict[str, int], list[str]]:
    """Take the linked files into the set; their counts, and the names of those that are not what they should be."""
    counts: dict[str, int] = {}
    wanted, changed = [], []
    for name, entry in manifest.files.items():
        if writer.directory.stat(name) is None:
            changed.append(name)
            continue
        if name == SALES_FILE:
            with suppress(ValueError, msgspec.DecodeError):
                counts[DAYS] = len(decode_sales(writer.directory.read(name)).days)
        else:
            counts[_collection_of(name)] = entry.records
        wanted.append(Wanted("snapshot", name, entry.records))
    for name, digest in add_files(writer, wanted, settings, cancelled).items():
        entry = manifest.files[name]
        if (digest.bytes, digest.crc32) != (entry.bytes, entry.crc32):
            changed.append(name)
    return counts, changed


def _collection_of(file: str) -> str:
    return _COLLECTION_IN.get(file, file.removesuffix(".json"))


def _settled_manifest(data: Directory, notes: list[str]) -> Manifest:
    """The manifest of a stopped directory, with what an interrupted flush moved into place."""
    found: list[Manifest] = []
    for name in (MANIFEST, MANIFEST_NEXT):
        try:
            manifest = read_manifest(data, name)
        except (ValueError, OSError) as error:
            notes.append(f"{name} is damaged ({error})")
            manifest = None
        if manifest is not None:
            found.append(manifest)
        elif name == MANIFEST:
            found.append(Manifest())
    settled, following = found[0], found[1:]
    files: dict[str, FileEntry] = {}
    for name in {**settled.files, **{name: entry for one in following for name, entry in one.files.items()}}:
        status = data.stat(name)
        for one in found:
            entry = one.files.get(name)
            if entry is not None and status is not None and status.st_size == entry.bytes:
                with suppress(OSError):
                    if f"{_crc_of(data, name):08x}" == entry.crc32:
                        files[name] = entry
                        break
        else:
            if name in settled.files:
                notes.append(f"{name} is not as it was left: edited, damaged or missing")
    return msgspec.structs.replace(settled, files=files)


def _crc_of(data: Directory, name: str) -> int:
    checksum = 0
    for piece in read_pieces(data, name):
        checksum = crc32(piece, checksum)
    return checksum


def _add_found(writer: SetWriter, data: Directory, manifest: Manifest, notes: list[str]) -> dict[str, int]:
    """Take every snapshot file of a stopped directory into the set; how many records each holds."""
    counts: dict[str, int] = {}
    for name in data.names():
        if not name.endswith(".json") or name.startswith(".") or name in _NOT_SNAPSHOTS:
            continue
        entry = manifest.files.get(name)
        try:
            raw = data.read(name) if entry is None or name == SALES_FILE else b""
        except OSError as error:
            notes.append(f"without {name}, which cannot be read: {error.strerror or error}")
            continue
        if name == SALES_FILE:
            try:
                counts[DAYS] = len(decode_sales(raw.removeprefix(b"\xef\xbb\xbf")).days)
            except (ValueError, msgspec.DecodeError) as error:
                notes.append(f"{name} is damaged ({error})")
            records = 0
        elif entry is None:
            read = salvage(raw)
            if not read.is_whole:
                notes.append(f"{name} is damaged ({read.reason}), and is in it as it is")
            records = counts[_collection_of(name)] = len(read.records)
        else:
            records = counts[_collection_of(name)] = entry.records
        data.keep_link(name, writer.directory)
        writer.add_file("snapshot", name, records)
    return counts


# Archive, journal, and the rest.


def _copy_stopped_archive(writer: SetWriter, data: Directory, counts: dict[str, int], notes: list[str]) -> int | None:
    if data.stat(ARCHIVE) is None:
        return None
    path = writer.directory.path / ARCHIVE
    try:
        archived_seq = copy_stopped(data.path / ARCHIVE, path)
        _, messages = totals_of(path)
    except (ArchiveError, ArchiveDamaged) as error:
        with suppress(FileNotFoundError):
            path.unlink()
        notes.append(f"without the archive ({error}), but with all events that the journal has for it")
        return None
    counts[MESSAGES] = messages
    writer.add_file("archive", ARCHIVE, messages)
    return archived_seq


def _add_journal(
    writer: SetWriter,
    history: History,
    snapshot_seq: int,
    archived_seq: int | None,
    notes: list[str],
    *,
    up_to_seq: int = 0,
) -> int:
    """Take the events between snapshots and archive into the set, or without an archive all that the journal has for one;
    the seq up to which everything is in it."""
    if archived_seq is None:
        parts = [part for part in history.parts() if not part.is_packed]
        low = min([part.first_seq - 1 for part in parts if part.first_seq <= snapshot_seq + 1], default=snapshot_seq)
        high = max(snapshot_seq, up_to_seq)
    else:
        low, high = min(snapshot_seq, archived_seq), max(snapshot_seq, archived_seq, up_to_seq)
    if low >= high:
        return high
    reached = low
    count = 0

    def lines() -> Iterator[bytes]:
        nonlocal reached, count
        position = low
        while position < high:
            batch: list[bytes] = []
            try:
                for line in history.lines(position, high):
                    batch.append(encode_line(line.payload))
                    position = reached = line.seq
                    count += 1
                    if len(batch) >= _LINES_AT_ONCE:
                        yield b"".join(batch)
                        batch = []
            except HistoryGap as gap:
                notes.append(f"without events {gap.first} to {gap.last}, which cannot be read")
                position = gap.last
            yield b"".join(batch)

    first = segment_name(low + 1)
    writer.add("journal", f"journal/{first}", lines(), lambda: count)
    return max(reached, snapshot_seq, archived_seq or 0)


def _add_rest(writer: SetWriter, data: Directory, manifest: Manifest, settings: Settings) -> None:
    writer.add("manifest", MANIFEST, [encode_manifest(manifest)])
    raw = msgspec.json.format(msgspec.json.encode(shown(settings)), indent=2) + b"\n"
    writer.add("settings", SETTINGS_FILE, [raw])
    with suppress(OSError):
        writer.add("tokens", TOKENS_FILE, [data.read(TOKENS_FILE)])
