"""Going back to a backup, or to a moment: planned first, prepared beside the present, then swapped in whole.

The files of the set, and the events up to the moment, are laid out in ``restore/`` and recovered there as a start would do it,
strictly. Then the new state is given a place in time above every event of the present (no seq is used twice), and takes the
place of the present as ``swap`` says. Until then nothing of the present is touched.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from holdfast.archive.base import ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE, COMPACTED, REBUILT
from holdfast.archive.sqlite import open_sqlite
from holdfast.care import swap
from holdfast.care.backup_set import BACKUPS, SetDamaged, extract, lineage_of, list_sets
from holdfast.care.backup_stopped import back_up_stopped
from holdfast.care.findings import readable_size
from holdfast.care.history import JOURNAL, History, HistoryGap, at_of
from holdfast.care.history_follower import QUARANTINE
from holdfast.care.moments import (
    Restored,
    Target,
    naming_another,
    note_restored,
)
from holdfast.care.packing import PACKED, SEALED, Seal, pack
from holdfast.care.restore_plan import COMPARED, RestorePlan
from holdfast.care.rewind import collection_in
from holdfast.care.seal import AgeSeal, writing_seal
from holdfast.checksum import crc32
from holdfast.clock import format_ms
from holdfast.disk.files import FULL_ERRNOS, Directory, prepare_directory
from holdfast.disk.journal import encode_line, read_history, segment_name
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    Manifest,
    encode_manifest,
    new_lineage,
    read_manifest,
)
from holdfast.engine import Engine
from holdfast.errors import BadRequest, DataRefused, HoldfastError, StorageFull, Unavailable
from holdfast.flush import FILE_OF, SALES_FILE
from holdfast.recovery import open_engine
from holdfast.settings import Settings

ROOM_SHARE = 1.2
"""So many times the size of a set must be free to prepare it: its files are written anew by the recovery."""

ARCHIVE_WAIT_S = 600.0
"""The longest that the archive of a prepared state gets to catch up with its journal."""

_ARCHIVE_COMPANIONS = ("-wal", "-shm", "-journal")
_MIRROR_STATE = "_mirror.json"


class RestoreProof(msgspec.Struct, frozen=True, kw_only=True):
    """What was looked at, and found right, in a state on the disk.

    Attributes:
        files: whose checksums were compared.
        counts: records by collection, and ``messages``.
        duration_ms: how long that took.
    """

    files: int
    counts: dict[str, int]
    duration_ms: float


class RestoreReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a restore did.

    Attributes:
        plan: which state came back.
        seq: where its history begins.
        saved_as: the backup of what was there before.
        backup: the backup of what is there now, from which moments from now on are reached; empty when it failed.
        proof: of what is there now.
        duration_ms: of all of it.
    """

    plan: RestorePlan
    seq: int
    saved_as: str
    backup: str
    proof: RestoreProof
    duration_ms: float


class RestoreState(msgspec.Struct, frozen=True, kw_only=True):
    """How the restore of everything stands that a daemon does, or did last.

    Attributes:
        state: idle, preparing, swapping (nothing is served meanwhile), completed, failed.
        backup: name of the set.
        at: the moment of the state, ISO 8601.
        progress: in words, while it is under way.
        reason: why it failed. The data is what it was before, unless this speaks of what was found after the restore.
        report: what it did.
    """

    state: Literal["idle", "preparing", "swapping", "completed", "failed"]
    backup: str = ""
    at: str = ""
    progress: str = ""
    reason: str = ""
    report: RestoreReport | None = None


# Preparing.


class Prepared(NamedTuple):
    """A state that stands ready in a directory.

    Attributes:
        counts: records by collection, and ``messages``.
        names: of its files there.
    """

    counts: dict[str, int]
    names: tuple[str, ...]


@naming_another()
def prepare(
    target: Target,
    place: Path,
    settings: Settings,
    seal: AgeSeal | None,
    history: History,
    *,
    is_busy: Callable[[], bool] = lambda: False,
    progress: Callable[[str], None] = lambda text: None,
    log: Any = None,
) -> Prepared:
    """Bring the state of *target* into the directory *place*, which is ours alone, as a start would; blocks.

    Raises:
        SetDamaged, HistoryGap, DataRefused: it cannot be had whole; what was made in *place* is of no use.
        StorageFull, OSError: likewise.
    """
    found = target.found
    assert found.manifest is not None
    with Directory(place) as into:
        _check_room(target, into)
        names = [name for name, stored in found.manifest.files.items() if stored.kind not in ("settings", "tokens")]
        progress(f"unpacking backup {found.name}")
        extract(found, names, into, seal, is_busy)
        with into.subdirectory(JOURNAL) as journal:
            first = found.manifest.seq + 1
            # Also without events: a journal says by its name where it goes on.
            lines = (encode_line(line.payload) for line in history.lines(found.manifest.seq, target.seq))
            journal.stage(segment_name(first), lines if target.seq >= first else (), is_busy)
            journal.publish([segment_name(first)])
        into.sync()
    progress(f"replaying up to event {target.seq}")
    counts = _recover(target, place, settings, progress, log)
    with Directory(place) as into:
        manifest = read_manifest(into, MANIFEST)
        assert manifest is not None and manifest.snapshot_seq == target.seq
        kept = {*manifest.files, MANIFEST, JOURNAL, ARCHIVE}
        for name in into.names():
            if name not in kept:
                _remove(into.path / name)
        into.sync()
        return Prepared(counts, tuple(sorted(name for name in kept if into.stat(name) is not None)))


def _check_room(target: Target, into: Directory) -> None:
    if into.space()[0] < _needed(target):
        raise _no_room(target, into, "")


@contextmanager
def naming_room(target: Target, data_dir: Path) -> Iterator[None]:
    """Says of a disk that is full, before anything of the present was touched, how much room the restore takes."""
    try:
        yield
    except (StorageFull, OSError) as error:
        if isinstance(error, OSError) and error.errno not in FULL_ERRNOS:
            raise
        with Directory(data_dir) as data:
            raise _no_room(target, data, ", and room for a backup of the present") from error


def _needed(target: Target) -> int:
    assert target.found.manifest is not None
    return round(ROOM_SHARE * sum(stored.bytes for stored in target.found.manifest.files.values()))


def _no_room(target: Target, place: Directory, besides: str) -> StorageFull:
    return StorageFull(
        f"no room to restore backup {target.found.name}: expected {readable_size(_needed(target))} to be free{besides}, found "
        f"{readable_size(place.space()[0])} at {place.path}; free space, or restore into a directory on another disk "
        "(--into). Nothing was changed"
    )


def _recover(
    target: Target, place: Path, settings: Settings, progress: Callable[[str], None], log: Any
) -> dict[str, int]:
    """Have a start's own code load, replay and write what stands in *place*; the counts of what it is."""
    staged = msgspec.structs.replace(settings, data_dir=place, mirror=False, recovery="strict", journal_keep=0)
    engine = open_engine(staged, progress=progress, log=log or _Silent(), drops_stale=False)
    try:
        engine.flush("restore")
        counts = _counts_of(engine)
        counts["messages"] = _caught_up(engine, target.seq)
        if engine.degraded:
            raise SetDamaged(f"backup {target.found.name} cannot be restored whole: {'; '.join(engine.degraded)}")
        if (seq := engine.status()["seq"]) != target.seq:
            raise SetDamaged(f"backup {target.found.name} ends with event {seq}, expected {target.seq}")
    finally:
        engine.close()
    return counts


def _counts_of(engine: Engine) -> dict[str, int]:
    names = [*COMPARED, *engine.collection_names()]
    return {name: engine.count(name) for name in names}


def _caught_up(engine: Engine, seq: int) -> int:
    """Wait until the archive has every event up to *seq* for good; how many messages it holds."""
    until = engine.monotonic() + ARCHIVE_WAIT_S
    while True:
        try:
            counts = engine.transcripts.read(lambda archive: archive.message_counts())
        except Unavailable:
            if engine.monotonic() > until:
                raise
            continue
        return sum(counts.values())


# Taking its place.


def last_seq_of(data_dir: Path, target: Target | None = None) -> int:
    """The highest number that an event of the stopped directory *data_dir* may have, as far as anything there tells."""
    found = [0 if target is None else target.seq]
    with Directory(data_dir) as directory:
        for name in (MANIFEST, MANIFEST_NEXT):
            with suppress(ValueError, OSError):
                if (manifest := read_manifest(directory, name)) is not None:
                    found.append(manifest.snapshot_seq)
        if directory.stat(JOURNAL) is not None:
            with suppress(OSError), directory.subdirectory(JOURNAL) as journal:
                history = read_history(journal, 0)
                found += [history.last_seq, max(history.segments, default=1) - 1]
    found += [part.last_seq for part in History(data_dir).parts()]
    found += [one.manifest.seq for one in list_sets(data_dir) if one.manifest is not None]
    return max(found)


def rebase(staging: Directory, seq: int, lineage: str) -> None:
    """Give the state in *staging* the place *seq* in time, in the life of the directory of that *lineage*: as if it had
    become so by that event; errors as ``write_atomic``."""
    archive = open_sqlite(staging.path / ARCHIVE)
    try:
        archive.apply([], seq)
        archive.checkpoint()
    except (ArchiveError, ArchiveDamaged) as error:
        raise Unavailable(f"the archive of the prepared state cannot be written: {error}; restore again") from error
    finally:
        archive.close()
    _remove(staging.path / JOURNAL)
    with staging.subdirectory(JOURNAL) as journal:
        journal.write_atomic(segment_name(seq + 1), ())
    manifest = read_manifest(staging, MANIFEST)
    assert manifest is not None, "a prepared state has a manifest"
    manifest = msgspec.structs.replace(manifest, snapshot_seq=seq, lineage=lineage)
    staging.write_atomic(MANIFEST, [encode_manifest(manifest)])
    for companion in _ARCHIVE_COMPANIONS:
        staging.remove(ARCHIVE + companion)
    staging.sync()


def take_place(
    data_dir: Path, prepared: Prepared, target: Target, *, seal: AgeSeal | None, keeps_history: bool, now_ms: int
) -> int:
    """Put the state that ``prepare`` made in ``restore/`` in the place of the present one; where its history begins.

    Only under the lock of *data_dir*, when nobody has it open; the present has been backed up.

    Raises:
        StorageFull, OSError: before the swap is decided, with the present as it was; or later, and the next start goes on.
    """
    assert target.found.manifest is not None
    with Directory(data_dir) as data:
        if target.found.is_foreign:
            set_history_aside(data, now_ms)
        elif keeps_history:
            keep_history(data, writing_seal(seal))
        seq = last_seq_of(data_dir, target) + 1
        with data.subdirectory(swap.STAGING) as staging:
            # Of another directory: that one lives on here, and the present is what is foreign to it from now on.
            rebase(staging, seq, target.found.manifest.lineage or lineage_of(data_dir))
        note_restored(data, Restored(seq, format_ms(now_ms), target.found.name))
        intent = swap.Intent(
            source=target.found.name,
            at=format_ms(now_ms),
            seq=seq,
            staged=prepared.names,
            removed=swap.names_to_remove(data, _names_of_ours(data), prepared.names),
        )
        swap.decide(data, intent)
        swap.complete(data)
    return seq


def _names_of_ours(data: Directory) -> set[str]:
    """The files of the state in *data*, and those that say how far something has come with it."""
    names = {*FILE_OF.values(), SALES_FILE, MANIFEST, MANIFEST_NEXT, _MIRROR_STATE, JOURNAL}
    for base in (ARCHIVE, REBUILT, COMPACTED):
        names |= {base, *(base + companion for companion in _ARCHIVE_COMPANIONS)}
    manifests: list[Manifest] = []
    for name in (MANIFEST, MANIFEST_NEXT):
        with suppress(ValueError, OSError):
            if (manifest := read_manifest(data, name)) is not None:
                manifests.append(manifest)
    if manifests:
        return names.union(*(manifest.files for manifest in manifests))
    # Without a manifest whatever a start would take for a collection; the backup of the present has it.
    return names | {name for name in data.names() if collection_in(name) is not None}


def set_history_aside(data: Directory, now_ms: int) -> None:
    """Put what is packed of the present's history into ``quarantine/``, before a state of another directory takes its place, to
    which the same seqs are other events. Of an empty present it stays: it has come with the backups.

    Raises:
        OSError: what was not moved stays.
    """
    parts = History(data.path).parts()
    packed = [part for part in parts if part.is_packed]
    manifest = None
    with suppress(ValueError, OSError):
        manifest = read_manifest(data, MANIFEST)
    has_lived = any(not part.is_packed for part in parts) or (manifest is not None and manifest.snapshot_seq > 0)
    if not packed or not has_lived:
        return
    stamp = format_ms(now_ms).replace(":", "")
    with (
        data.subdirectory(QUARANTINE) as quarantine,
        data.subdirectory(BACKUPS) as backups,
        backups.subdirectory(JOURNAL) as place,
    ):
        for part in packed:
            place.move(part.place.name, quarantine, f"{stamp}-{part.place.name}")


def keep_history(data: Directory, seal: Seal | None) -> int:
    """Pack every segment of the journal of *data* that the history does not have yet; how many events that were.

    Raises:
        StorageFull, OSError: those that were packed stay so.
    """
    history = History(data.path, seal)
    parts = history.parts()
    last = max((part.last_seq for part in parts if part.is_packed), default=0)
    kept = 0
    for part in parts:
        if part.is_packed or part.last_seq <= last:
            continue
        lines = []
        try:
            for line in history.lines(max(part.first_seq - 1, last), part.last_seq):
                lines.append(line)
        except HistoryGap:
            pass  # what is whole before it is kept
        if not lines:
            continue
        first, last = lines[0].seq, lines[-1].seq
        name = f"{first:020d}-{last:020d}.jsonl{PACKED}{SEALED if seal is not None else ''}"
        with data.subdirectory(BACKUPS) as backups, backups.subdirectory(JOURNAL) as packed:
            packed.stage(name, pack((encode_line(line.payload) for line in lines), seal))
            packed.publish([name])
            at_ns = at_of(lines[-1].payload) * 1_000_000
            os.utime(packed.path / name, ns=(at_ns, at_ns))
        kept += len(lines)
    return kept


# Proving it.


def prove_state(data_dir: Path, expected: dict[str, int]) -> RestoreProof:
    """Read every file of the stopped directory *data_dir* again, and compare with what should be there.

    Raises:
        DataRefused: something is not what it should be.
    """
    started = time.monotonic()
    with Directory(data_dir) as directory:
        manifest = read_manifest(directory, MANIFEST)
        if manifest is None:
            raise DataRefused(f"{data_dir} has no {MANIFEST} after the restore; restore again")
        counts: dict[str, int] = dict.fromkeys(expected, 0)
        for name, entry in manifest.files.items():
            checksum, fd = 0, directory.open_to_read(name)
            with os.fdopen(fd, "rb", buffering=0) as file:
                while piece := file.read(1 << 20):
                    checksum = crc32(piece, checksum)
            if f"{checksum:08x}" != entry.crc32:
                raise DataRefused(
                    f"{data_dir / name} is not what was restored: its checksum does not hold; restore again"
                )
            collection = collection_in(name)
            if collection in expected:
                counts[collection] = entry.records
    archive = open_sqlite(data_dir / ARCHIVE)
    with closing(archive):
        if wrong := archive.check():
            raise DataRefused(f"{data_dir / ARCHIVE} is damaged after the restore: {wrong[0]}; restore again")
        counts["messages"] = sum(archive.message_counts().values())
    if counts != expected:
        odd = next(name for name in expected if counts[name] != expected[name])
        raise DataRefused(
            f"{data_dir} holds {counts[odd]} {odd} after the restore, expected {expected[odd]}; restore again"
        )
    return RestoreProof(
        files=len(manifest.files) + 1, counts=counts, duration_ms=round((time.monotonic() - started) * 1000, 1)
    )


# Whole restores of directories that nobody has open.


def restore_beside(
    target: Target,
    into: Path,
    settings: Settings,
    seal: AgeSeal | None,
    history: History,
    progress: Callable[[str], None] = lambda text: None,
) -> RestoreProof:
    """Bring the state of *target* into the directory *into*, which is missing or empty; blocks.

    Raises:
        BadRequest: it is neither, or lies within the data directory.
        SetDamaged, HistoryGap, DataRefused, StorageFull, OSError: as ``prepare``; *into* is as it was.
    """
    if into.resolve().is_relative_to(settings.data_dir.resolve()):
        raise BadRequest(
            f"expected a directory outside of the data directory {settings.data_dir}, found {into}; choose another"
        )
    existed = into.exists()
    if existed and (not into.is_dir() or any(into.iterdir())):
        raise BadRequest(f"expected an empty or missing directory, found something in {into}; choose another")
    prepare_directory(into)
    try:
        prepared = prepare(target, into, settings, seal, history, progress=progress)
        with Directory(into) as directory:
            assert target.found.manifest is not None
            tokens = [name for name, one in target.found.manifest.files.items() if one.kind == "tokens"]
            extract(target.found, tokens, directory, seal)
            # From here on both go their own ways, and give the same seqs to different events.
            manifest = read_manifest(directory, MANIFEST)
            assert manifest is not None
            manifest = msgspec.structs.replace(manifest, lineage=new_lineage())
            directory.write_atomic(MANIFEST, [encode_manifest(manifest)])
        return prove_state(into, prepared.counts)
    except BaseException:
        for path in into.iterdir():
            _remove(path)
        if not existed:
            into.rmdir()
        raise


class Restoring:
    """One whole restore of a directory: ``prepare`` while it may be served, ``finish`` when nobody has it open.

    Attributes:
        prepared: what stands ready; None before.
        settings: as it was begun with.
    """

    def __init__(
        self,
        settings: Settings,
        target: Target,
        planned: RestorePlan,
        seal: AgeSeal | None,
        *,
        log: Any,
        progress: Callable[[str], None] = lambda text: None,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """*progress* is told how far it is, and may raise to give up; *is_busy* as of ``Directory.stage``."""
        self.prepared: Prepared | None = None
        self.settings = settings
        self._target = target
        self._plan = planned
        self._seal = seal
        self._log = log
        self._progress = progress
        self._is_busy = is_busy
        self._started = time.monotonic()

    def prepare(self) -> None:
        """Make the state ready in ``restore/``; blocks.

        Raises:
            SetDamaged, HistoryGap, DataRefused, StorageFull, OSError: nothing of the present was touched.
        """
        data_dir, target = self.settings.data_dir, self._target
        self._log.info("restore.started", source=target.found.name, at=format_ms(target.at_ms), seq=target.seq)
        try:
            with naming_room(target, data_dir):
                with Directory(data_dir) as data:
                    swap.discard(data)
                    data.subdirectory(swap.STAGING).close()
                self.prepared = prepare(
                    target,
                    data_dir / swap.STAGING,
                    self.settings,
                    self._seal,
                    History(data_dir, self._seal),
                    progress=self._progress,
                    is_busy=self._is_busy,
                )
        except BaseException as error:
            self.give_up(error)
            raise

    def finish(self, saved_as: str, saved_seq: int, now_ms: int, *, is_awaited: bool = False) -> RestoreReport:
        """Put the prepared state in the place of the present one and prove it; blocks. Only under the lock.

        Args:
            saved_as: the backup of the present; made anew when it has not every event up to now, or there is none.
            saved_seq: the last event in it.
            is_awaited: clients wait for the end, so that another backup of the present is not proved.

        Raises:
            DataRefused, StorageFull, OSError: before the swap is decided, with the present as it was; afterwards the
                next start completes it.
        """
        assert self.prepared is not None, "nothing was prepared"
        data_dir = self.settings.data_dir
        try:
            if not saved_as or saved_seq < last_seq_of(data_dir):
                self._progress("backing up the present")
                with naming_room(self._target, data_dir):
                    saved_as = back_up_stopped(
                        self.settings, "restore", self._log, self._progress, prove=not is_awaited
                    ).name
            self._progress("taking its place")
            seq = take_place(
                data_dir,
                self.prepared,
                self._target,
                seal=self._seal,
                keeps_history=self.settings.backups.pitr > 0,
                now_ms=now_ms,
            )
            self._progress("proving it")
            proof = prove_state(data_dir, self.prepared.counts)
        except BaseException as error:
            self.give_up(error)
            raise
        report = RestoreReport(
            plan=self._plan,
            seq=seq,
            saved_as=saved_as,
            backup="",
            proof=proof,
            duration_ms=round((time.monotonic() - self._started) * 1000, 1),
        )
        self._log.info(
            "restore.completed",
            source=self._plan.backup,
            at=self._plan.at,
            seq=report.seq,
            saved_as=report.saved_as,
            counts=report.proof.counts,
            duration_ms=report.duration_ms,
        )
        return report

    def give_up(self, error: BaseException) -> None:
        """Remove what was prepared, and tell why."""
        with suppress(OSError), Directory(self.settings.data_dir) as data:
            swap.discard(data)
        is_ours = isinstance(error, HoldfastError | OSError)
        reason = str(error) if is_ours else type(error).__name__
        self._log.error(
            "restore.failed", source=self._target.found.name, reason=reason, exc_info=None if is_ours else error
        )


def restore_stopped(
    settings: Settings,
    target: Target,
    planned: RestorePlan,
    seal: AgeSeal | None,
    *,
    now_ms: int,
    log: Any,
    progress: Callable[[str], None] = lambda text: None,
) -> RestoreReport:
    """Go back to *target*: prepare, back the present up, swap, prove, back the new state up. Under the caller's lock.

    Raises:
        SetDamaged, HistoryGap, DataRefused, StorageFull, OSError: as ``Restoring``.
    """
    restoring = Restoring(settings, target, planned, seal, log=log, progress=progress)
    restoring.prepare()
    report = restoring.finish("", 0, now_ms)
    try:
        backup = back_up_stopped(settings, "restore", log, progress).name
    except (DataRefused, StorageFull, OSError) as error:
        # What was asked for is done; only moments from now on are not reached before the next backup.
        log.warning("restore.backup_failed", reason=str(error))
        return report
    return msgspec.structs.replace(report, backup=backup)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Silent:
    """A log for the recovery of a state that nobody serves yet; what is wrong there is raised."""

    def info(self, event: str, **fields: Any) -> None:
        """Nothing."""

    debug = warning = error = exception = info
