"""Backups: consistent sets of everything, taken without stopping anybody, proved by loading them.

Like a base backup with its write-ahead log: a flush; hard links of the snapshot files, which are replaced and never changed in
place; a copy of the archive, in steps; the events that lie between the two, from the journal. Then all of it is compressed at
leisure. What has the same content as in the newest earlier set is a hard link to the file there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from holdfast.archive.base import Archive, ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_file import totals_of
from holdfast.care.backup_report import infos_of, log_completed, report_of
from holdfast.care.backup_set import (
    BACKUPS,
    BackupSet,
    Proof,
    list_sets,
    note_lineage,
    own_sets,
    read_set,
    write_proof,
)
from holdfast.care.history import History
from holdfast.care.history_follower import HistoryFollower, history_of
from holdfast.care.moments import note_put_back, restored_seqs
from holdfast.care.packer import Wanted, add_files
from holdfast.care.packing import Seal
from holdfast.care.prover import Unproved, prove_apart
from holdfast.care.rotation import at_of, is_good, stale, was_fetched_lately
from holdfast.care.seal import seal_to_write
from holdfast.care.set_parts import (
    MESSAGES,
    Made,
    add_journal,
    add_rest,
    add_snapshots,
    finished,
    link_snapshots,
    new_name,
    newest_good,
    remove_half_made,
    remove_set,
)
from holdfast.care.set_writer import SetWriter, check_room, leaving_room
from holdfast.clock import Clock, format_ms, parse_ms
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused, HoldfastError, JournalBroken, StorageFull, Unavailable
from holdfast.flush import Flusher
from holdfast.measures import BackupFigures
from holdfast.ops import BackupList, BackupReport
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

_DOUBLINGS_MAX = 20
_TRIES = 2

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
        self._since = (clock.now_ms(), clock.monotonic())
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
                    remove_half_made(backups)
                    with suppress(StorageFull):
                        note_lineage(backups, self._source.flusher.hold(lambda manifest, directory: manifest.lineage))
        sets = list_sets(self._source.data_dir)
        self._count(sets)
        own = [found for found in sets if found.manifest is not None and not found.is_foreign]
        strange = [found.name for found in sets if found.is_foreign]
        if strange and not own and not self._source.seq():
            self._source.notes["unrestored"] = (
                f"nothing is here but backups of what was lost, or of another directory; `holdfast restore {strange[0]}` "
                "brings them back"
            )
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
        age_s = (now_ms - max(taken_ms, self._since[0])) / 1000
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
        log_completed(self._log, made, reason, self._clock.monotonic() - started)
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
        return report_of(made, reason, proof, problem, self._clock, started)

    def _write(self, reason: str, progress: Progress) -> Made:
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
                writer = SetWriter(backups, self._new_name(), newest_good(source.data_dir), seal, is_busy)
                try:
                    for tries_left in reversed(range(_TRIES)):
                        progress("writing the snapshots")
                        self._flush(notes)
                        taken = flusher.hold(lambda manifest, directory: link_snapshots(manifest, directory, writer))
                        progress("compressing the snapshots")
                        at = format_ms(self._clock.now_ms())
                        counts, changed = add_snapshots(writer, taken, settings, self._cancelled)
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
                    reached = add_journal(writer, History(source.data_dir), taken.snapshot_seq, archived_seq, notes)
                    add_rest(writer, data, taken, settings)
                    return finished(
                        writer,
                        notes,
                        taken,
                        at=at,
                        reason=reason,
                        reached=reached,
                        archived_seq=archived_seq,
                        counts=counts,
                    )
                except BaseException:
                    writer.abandon()
                    raise
        finally:
            flusher.unfollow("backup")

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
        # A wall clock that jumped ahead makes nothing old.
        since_ms, since = self._since
        now_ms = min(self._clock.now_ms(), since_ms + round((self._clock.monotonic() - since) * 1000))
        wanted = self._source.settings().backups
        removed = [found for found in stale(sets, wanted, now_ms) if not was_fetched_lately(found, now_ms)]
        if not removed:
            return
        try:
            with Directory(self._source.data_dir / BACKUPS) as backups:
                for found in removed:
                    remove_set(backups, found.name)
        except (HoldfastError, OSError) as error:
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
        return seal_to_write(self._source.settings())

    def _new_name(self) -> str:
        return new_name(self._source.data_dir, self._clock.now_ms())

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Unavailable("stopping; take the backup when it is back")
