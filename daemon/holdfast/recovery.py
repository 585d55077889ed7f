"""Coming back: from snapshot files and journal, whatever state they were left in, to an engine.

lock → manifest and snapshots (salvaged where damaged) → replay → drop what is too old → merge. Until all of that is
done nothing is written except evidence and copies; a start that is cancelled leaves the data as it was.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import orjson
import structlog

from holdfast import record
from holdfast.archive.place import ARCHIVE, DataDirectoryPlace
from holdfast.archive.sqlite_salvage import salvage_heads
from holdfast.care import swap, upgrade
from holdfast.care.backup_set import noted_lineage
from holdfast.care.backup_stopped import back_up_before_upgrade
from holdfast.care.candidates import Backed, Candidate, kept_messages
from holdfast.care.legacy import import_old_files, short_name
from holdfast.care.mirror import begin_adopting, forget_state, has_mirror, is_adopting
from holdfast.checksum import crc32
from holdfast.clock import Clock, format_ms, parse_ms
from holdfast.core.collection import Collection
from holdfast.core.decide import USER_ID_FIELD, decide_expiry, due_ms
from holdfast.core.event import decode_event
from holdfast.core.rules import Rules, check_id, rules_of
from holdfast.core.sales import Sales, decode_sales, oldest_day
from holdfast.core.state import (
    BUILT_IN,
    CONVERSATIONS,
    ESCALATIONS,
    EVENT_OPS,
    RETRIES,
    SESSIONS,
    USERS,
    State,
    apply,
    is_custom_name,
)
from holdfast.disk.files import Directory, DirectoryLock, prepare_directory
from holdfast.disk.journal import SEGMENT_NAME, Damage, History, Journal, JournalLine, read_history, segment_name
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    ChecksumMismatchError,
    FileEntry,
    Manifest,
    encode_manifest,
    new_lineage,
    read_manifest,
    salvage,
)
from holdfast.engine import Engine
from holdfast.errors import DataRefused, HoldfastError, InvalidRecord, Unavailable
from holdfast.flush import SALES_FILE, Flusher, file_of
from holdfast.load import SCHEDULED, Counts, load_foreign, load_trusted, schedule_bookkeeping
from holdfast.settings import Settings

_OLD_USERS = "users"
_NOT_COLLECTIONS = frozenset({MANIFEST, MANIFEST_NEXT, SALES_FILE, "tokens.json"})


def open_engine(
    settings: Settings,
    *,
    clock: Clock | None = None,
    cancelled: threading.Event | None = None,
    progress: Callable[[str], None] | None = None,
    log: Any = None,
    drops_stale: bool = True,
    migrations: Sequence[upgrade.Step] = upgrade.STEPS,
) -> Engine:
    """Take the data directory and bring its state into memory; blocks for as long as that takes.

    Args:
        settings: where the data is and how to read it.
        clock: for tests.
        cancelled: set it to give up; nothing is written then.
        progress: told in words how far it is.
        log: a structlog logger; without one, that of the program, or the standard logger ``holdfast``.
        drops_stale: whether sessions and sales days that are too old by now go; a restore wants them as they were.
        migrations: from older formats to the present one.

    Raises:
        DirectoryLocked: another process has it.
        DataRefused: it cannot be opened safely; nothing was touched.
        Unavailable: cancelled.
        StorageFull, OSError: the disk does not let us.
    """
    data_dir = settings.data_dir
    prepare_directory(data_dir)
    lock = DirectoryLock(data_dir)
    try:
        directory = Directory(data_dir)
        try:
            log = log if log is not None else _library_log()
            finish_restore(directory, log)
            cancelled, progress = cancelled or threading.Event(), progress or (lambda text: None)
            before = upgrade.bring_up(
                settings, directory, log, progress=progress, cancelled=cancelled, steps=migrations
            )
            # A migration takes one of its own; what a restore has laid out comes from a backup.
            if not before.steps and drops_stale:
                back_up_before_upgrade(settings, before.written_by, log, progress, cancelled)
            recovery = _Recovery(
                settings,
                directory,
                clock or Clock(),
                cancelled,
                progress,
                log,
                drops_stale=drops_stale,
            )
            engine = recovery.run(lock)
        except BaseException:
            directory.close()
            raise
    except BaseException:
        lock.release()
        raise
    # Lock and directory are the engine's now.
    try:
        recovery.complete(engine)
    except BaseException:
        engine.close(flush=False)
        raise
    return engine


def _is_at_end(damage: Damage, history: History) -> bool:
    """Whether nothing whole follows *damage*, so that nobody knows how many events it took."""
    newest = max(history.segments)
    return damage.segment == segment_name(newest) and damage.offset + damage.bytes >= history.segments[newest]


def finish_restore(directory: Directory, log: Any) -> bool:
    """Complete a restore that a crash broke off when it was decided already; whether there was one. Errors as ``swap.complete``."""
    finished = swap.complete(directory)
    if finished is not None:
        log.warning("restore.completed", source=finished.source, seq=finished.seq, after_crash=True)
    return finished is not None


def _library_log() -> Any:
    """Where a program that has opened us itself finds our events: its structlog, or the standard logger ``holdfast``."""
    if structlog.is_configured():
        return structlog.get_logger()
    renderer = structlog.processors.KeyValueRenderer(key_order=["event"])
    return structlog.wrap_logger(
        logging.getLogger("holdfast"),
        processors=[structlog.stdlib.filter_by_level, structlog.processors.format_exc_info, renderer],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


class _Recovery:
    """One recovery; lives as long as ``open_engine`` runs."""

    def __init__(
        self,
        settings: Settings,
        directory: Directory,
        clock: Clock,
        cancelled: threading.Event,
        progress: Callable[[str], None],
        log: Any,
        *,
        drops_stale: bool,
    ) -> None:
        self._settings = settings
        self._drops_stale = drops_stale
        self._directory = directory
        self._clock = clock
        self._cancelled = cancelled
        self._progress = progress
        self._log = log
        self._started = clock.monotonic()
        self._now_ms = clock.now_ms()
        self._rules: Rules = rules_of(settings)
        self._state = State(self._rules.session_ttl_ms)
        if settings.mirror:
            self._state.backlog.touched = {}
        self._archive_place = DataDirectoryPlace(
            settings.data_dir, self._now_stamp, lambda: kept_messages(settings, self._state.conversations)
        )
        self._replayed = self._dropped = 0
        self._manifest = Manifest()
        self._has_manifest = False
        self._alternative: Manifest | None = None
        self._counts = Counts()
        # Names of files whose content differs from what memory now holds: kept before anything replaces them.
        self._replaced: set[str] = set()
        # Files that an interrupted flush moved into place; only its own manifest knows them.
        self._moved: dict[str, FileEntry] = {}
        # When each file was written, as found before it was read: a copied directory has times of its own, and only
        # what is written from now on is an edit.
        self._written_at: dict[str, int] = {}
        self._damages: list[str] = []
        # What was damaged and is whole again, out of a backup.
        self._healed: list[str] = []
        self._backed = Backed(settings)
        self._ignored: dict[str, str] = {}
        # Collections that came back as far as that was possible, and not as they were.
        self._inexact: set[str] = set()
        # Whether a file held something that is in no event: an old bot's, or one edited by hand.
        self._has_merged = False
        # Whether there is nothing yet that could know of a conversation.
        self._is_new = False
        self._lineage_now = ""
        # Where the journal ended.
        self._last_seq = 0
        # What is done for each damaged file once it is certain that the start goes on.
        self._evidence: list[Callable[[Directory], None]] = []

    def run(self, lock: DirectoryLock) -> Engine:
        self._read_manifests()
        self._load_snapshots()
        journal_directory = self._directory.subdirectory("journal")
        try:
            return self._engine(lock, journal_directory)
        except BaseException:
            journal_directory.close()
            raise

    def _engine(self, lock: DirectoryLock, journal_directory: Directory) -> Engine:
        history = self._read_history(journal_directory)
        self._is_new = not history.segments and not any(
            self._directory.stat(name) for name in (MANIFEST, MANIFEST_NEXT, file_of(CONVERSATIONS))
        )
        self._replayed = self._replay(history)
        if self._drops_stale:
            self._dropped = self._drop_stale()
        self._check_cancelled()
        if self._damages and self._settings.recovery == "strict":
            raise DataRefused(
                f"{self._directory.path} is damaged: {'; '.join(self._damages)}. "
                'Restore a backup, or start with recovery = "available" to go on with what is left'
            )

        self._archive_place.check()

        # From here on the disk is changed.
        self._directory.remove_stale_temporaries()
        swap.discard(self._directory)
        swap.discard_scratch(self._directory)
        if self._moved:
            # Before the next flush replaces the manifest that knows them.
            self._manifest = msgspec.structs.replace(self._manifest, files=self._manifest.files | self._moved)
            self._directory.write_atomic(MANIFEST, [encode_manifest(self._manifest)])
        self._keep_evidence()
        self._keep_replaced()
        if self._is_new and has_mirror(self._directory):
            begin_adopting(self._directory)
        journal = self._open_journal(journal_directory, history)
        self._lineage_now, self._last_seq = self._lineage(), self._state.seq
        manifest = msgspec.structs.replace(
            self._manifest,
            lineage=self._lineage_now,
            files={
                name: msgspec.structs.replace(entry, mtime_ns=self._written_at.get(name, entry.mtime_ns))
                for name, entry in self._manifest.files.items()
                if name not in self._replaced
            },
        )
        loaded = {
            name: (found.st_size, found.st_mtime_ns) for name in self._replaced if (found := self._directory.stat(name))
        }
        flusher = Flusher(self._directory, journal, manifest, loaded, self._clock, self._log)
        return Engine(
            self._settings,
            self._state,
            journal,
            flusher,
            lock,
            self._clock,
            self._log,
            degraded=self._damages,
            reserved_names=self._ignored,
        )

    def complete(self, engine: Engine) -> None:
        """Start what follows *engine*, and take over what an old bot left; errors as ``open_engine``."""
        engine.start_archive(self._archive_place)
        engine.start_backups()
        self._log.info(
            "state.loaded",
            sessions=self._state.sessions.count,
            orders=self._state.orders.count,
            users=self._state.users.count,
            dropped_stale=self._dropped,
            skipped_invalid=self._counts.skipped_invalid,
            merged=self._counts.merged,
            replayed=self._replayed,
            duration_ms=round((self._clock.monotonic() - self._started) * 1000, 1),
        )
        if self._healed:
            engine.care_notes["recovered"] = f"{'; '.join(self._healed)}; until the next backup is made"
            engine.backups.completed += (lambda found: engine.care_notes.pop("recovered", None),)
        # Only the files say it, not the events: what is restored from an older set and the events since would not have it.
        engine.backups.is_wanted |= bool(self._damages or self._has_merged)
        if {file_of(CONVERSATIONS), file_of(ESCALATIONS)} & self._replaced:
            # Also where there is no mirror now: one that is written later must not take what was lost for deleted.
            forget_state(self._directory)
        is_sound = not self._damages and not self._healed
        if not is_sound:
            # So that the next start finds whole files, and a journal without holes.
            try:
                engine.flush("recovery")
            except (HoldfastError, OSError):
                pass  # logged by the flush; the evidence is kept, and the next flush tries again
        adopts_mirror = self._is_new or is_adopting(self._directory)
        reason = import_old_files(
            engine,
            self._directory,
            self._rules,
            stamp=self._stamp(),
            adopts_mirror=adopts_mirror,
            cancelled=self._cancelled,
            progress=self._progress,
            log=self._log,
        )
        if reason is not None:
            self._damages.append(f"old conversations could not be taken over, the next start tries again: {reason}")
        if self._settings.mirror and (reason is None or not adopts_mirror):
            # Not before: it would write over what is to be taken over.
            engine.start_mirror(
                trusted_seq=self._manifest.snapshot_seq if is_sound and not adopts_mirror else None,
                last_seq=self._last_seq,
                lineage=self._lineage_now,
                stamp=self._now_stamp,
            )

    # Snapshots.

    def _read_manifests(self) -> None:
        manifests: dict[str, Manifest | None] = {}
        for name in (MANIFEST, MANIFEST_NEXT):
            try:
                manifests[name] = read_manifest(self._directory, name)
            except (ValueError, OSError) as error:
                manifests[name] = None
                if name == MANIFEST:
                    self._note_damage(name, f"{name}: {error}", "the files themselves")
        found = manifests[MANIFEST]
        self._has_manifest = found is not None
        self._manifest = found or Manifest()
        # A flush that was interrupted while its files moved into place: each file is the old or the new one, and
        # replay from the old seq is right over both. The first flush ever has no old manifest; its seq is 0.
        self._alternative = manifests[MANIFEST_NEXT]

    def _lineage(self) -> str:
        """Whose seqs these are; without a manifest that tells, the backups may."""
        if self._is_new:
            return new_lineage()  # whatever backups lie here: what begins now gives their numbers to other events
        manifests = [self._manifest] if self._alternative is None else [self._manifest, self._alternative]
        known = [*(one.lineage for one in manifests), noted_lineage(self._directory.path)]
        if not any(known) and not self._has_manifest:
            known = [found.manifest.lineage for found in self._backed.sets if found.manifest is not None]
        return next(filter(None, known), "") or new_lineage()

    def _load_snapshots(self) -> None:
        self._written_at = {
            name: found.st_mtime_ns for name in self._manifest.files if (found := self._directory.stat(name))
        }
        names = {file_of(name): name for name in BUILT_IN}
        for file in self._directory.names():
            stem = file.removesuffix(".json")
            if file.endswith(".json") and not file.startswith((".", "_")) and file not in {*names, *_NOT_COLLECTIONS}:
                if is_custom_name(stem):
                    names[file] = stem
                else:
                    self._ignore(file, stem, "its name is no collection's name")
        for file in [*self._manifest.files, *self._known_files]:
            if file not in names and file not in _NOT_COLLECTIONS and is_custom_name(file.removesuffix(".json")):
                names[file] = file.removesuffix(".json")
        for file, name in names.items():
            self._check_cancelled()
            self._load_collection(file, name)
        self._drop_doubles()
        self._load_user_files()
        self._load_sales()

    def _load_collection(self, file: str, name: str) -> None:
        entries = self._entries_of(file)
        known = self._manifest.files.get(file)
        if self._directory.stat(file) is None:
            if known is not None and known.records:
                self._replaced.add(file)
                reason = f"{file} is missing; it held {known.records} records"
                self._recover(file, Collection(name), 0, reason, known)
            elif file in self._known_files:
                self._replaced.add(file)
                self._recover(file, Collection(name), 0, f"{file} is missing, and so is the manifest", None)
            return
        for entry in entries:
            collection = Collection(name)
            try:
                load_trusted(
                    self._directory, file, entry, self._state, collection, self._rules, self._note_progress(file, entry)
                )
            except ChecksumMismatchError:
                continue
            except (KeyError, TypeError, ValueError, OverflowError, msgspec.DecodeError):
                # Whole, but written under other field names: for these settings as foreign as any other file.
                known = None
                break
            except OSError:
                break
            self._adopt(collection, entry.seq)
            if entry is not known:
                self._moved[file] = entry
            return
        self._load_changed(file, name, is_ours=bool(entries) or name in BUILT_IN, known=known)

    @cached_property
    def _known_files(self) -> list[str]:
        """The snapshot files that a backup has with something in them, where no manifest says what there should be.

        Empty when nothing was flushed yet: then a backup is no word about these files.
        """
        base_seq = self._base_seq()
        if self._has_manifest or not base_seq:
            return []
        some = [found.manifest.files for found in self._backed.sets if found.manifest is not None]
        backed_up = {
            name
            for files in some
            for name, stored in files.items()
            if stored.kind == "snapshot" and (stored.records or name == SALES_FILE)
        }
        # What began after the newest backup only the events know of.
        return sorted(backed_up | self._backed.files_until(base_seq))

    def _entries_of(self, file: str) -> list[FileEntry]:
        """What *file* may be as we left it: by the manifest, or by the one of an interrupted flush."""
        manifests = [self._manifest] if self._alternative is None else [self._manifest, self._alternative]
        return [manifest.files[file] for manifest in manifests if file in manifest.files]

    def _load_changed(self, file: str, name: str, *, is_ours: bool, known: FileEntry | None) -> None:
        """Load a file that is not as we left it: an old bot's, one edited by hand, or a damaged one."""
        try:
            found = salvage(self._directory.read(file))
        except OSError as error:
            if not is_ours:
                self._ignore(file, name, f"it cannot be read: {error.strerror}")
                return
            self._set_aside(file)
            self._replaced.add(file)
            self._recover(file, Collection(name), 0, f"{file} cannot be read: {error.strerror}", known)
            return
        if not is_ours and not found.is_whole:
            self._ignore(file, name, found.reason)
            return
        collection = Collection(name)
        counts = load_foreign(
            found.records, self._state, collection, self._rules, self._now_ms, bump_versions=known is not None
        )
        if not is_ours and found.records and not counts.loaded:
            self._ignore(file, name, "none of its records has an id")
            return
        self._counts.skipped_invalid += counts.skipped_invalid
        self._counts.merged += counts.merged
        self._has_merged = True
        self._replaced.add(file)
        if not found.is_whole:
            self._quarantine_copy(self._directory, file, found.reason)
            reason = f"{file} was damaged ({found.reason}): {counts.loaded} whole records saved"
            self._recover(file, collection, counts.loaded, reason, known)
        elif known is not None and self._is_damage(file, known):
            self._quarantine_copy(self._directory, file, "content changed without being written")
            reason = f"{file} changed on the disk without being written"
            self._recover(file, collection, counts.loaded, reason, known)
        else:
            self._adopt(collection, 0)
            if known is not None:
                self._log.warning("snapshot.edited", file=file, records=counts.loaded)

    def _is_damage(self, file: str, known: FileEntry) -> bool:
        """Tell damage from an edit: a readable *file* is not as we left it. Nobody wrote it, yet it changed: the disk did."""
        found = self._directory.stat(file)
        return found is not None and found.st_mtime_ns == known.mtime_ns

    def _recover(self, file: str, salvaged: Collection, saved: int, reason: str, known: FileEntry | None) -> None:
        """Take of the damaged *file* what brings back most: what was *salvaged* of it, or what a backup has."""
        source, records, best = ("salvage" if saved else "nothing"), saved, salvaged
        if salvaged.name != RETRIES:
            found = self._best(file, saved, known)
            if found is not None and found.collection is not None:
                best = self._scheduled(found.collection)
                if found.is_exact:
                    self._adopt(best, 0)
                    self._heal(file, reason, found.source, best.count)
                    return
                # Of an older state: what could be saved is newer.
                for id in salvaged:
                    best.fill(id, salvaged.get(id) or b"")
                source, records = (f"salvage, {found.source}" if saved else found.source), best.count
        self._inexact.add(salvaged.name)
        if salvaged.name == CONVERSATIONS and (count := self._take_archived_heads(best)):
            source, records = (f"{source}, {ARCHIVE}" if records else ARCHIVE), count
        self._adopt(best, 0)
        self._lose(file, reason, records, source)

    def _take_archived_heads(self, best: Collection) -> int:
        """Bring the conversations in *best* up to what the archive has of them; how many there are then, 0 without an archive.

        An older head counts its messages anew, and those that are archived under these numbers would hide the new ones.
        """
        taken = False
        with suppress(OSError):
            if self._directory.stat(ARCHIVE) is None:
                return 0
            for head in salvage_heads(self._directory.path / ARCHIVE):
                line, taken = best.get(head.id), True
                try:
                    checked = record.join(head.value, head.version)
                    last_number = orjson.loads(head.value)["last_number"]
                    if line is None or orjson.loads(line)["last_number"] < last_number:
                        best.fill(head.id, checked)
                except (KeyError, TypeError, ValueError):
                    continue
        return best.count if taken else 0

    def _drop_doubles(self) -> None:
        """Of an order that is pending and closed at once, since one of the files came back older than the other, one stays."""
        pending, closed = self._state.orders, self._state.completed_orders
        if not self._inexact & {pending.name, closed.name}:
            return
        # The one whose file is as it was; an order that was closed is not opened again.
        wrong = pending if pending.name in self._inexact else closed
        for id in [id for id in wrong if (closed if wrong is pending else pending).get(id) is not None]:
            wrong.set(id, None, wrong.changed_seq, undoable=False)

    def _best(self, file: str, saved: int, known: FileEntry | None) -> Candidate | None:
        """The backup that brings back more of *file* than the *saved* records, all of it if there is one; else None."""
        best: Candidate | None = None
        for found in self._backed.candidates(file, self._base_seq()):
            self._check_cancelled()
            self._log.info(
                "recovery.candidate_found",
                file=file,
                source=found.source,
                at=found.at,
                records=found.records,
                is_exact=found.is_exact,
                salvaged=saved,
                lost_with_file=None if known is None else known.records,
            )
            if found.is_exact:
                return found
            if found.records > (saved if best is None else best.records):
                best = found
        return best

    def _base_seq(self) -> int | None:
        """Up to where the files were written: what the journal goes on from. None when nothing tells."""
        if self._has_manifest:
            return self._manifest.snapshot_seq
        with self._directory.subdirectory("journal") as journal:
            firsts = [int(match[1]) for name in journal.names() if (match := SEGMENT_NAME.fullmatch(name))]
        return min(firsts) - 1 if firsts else None

    def _scheduled(self, found: Collection) -> Collection:
        """*found*, which was loaded for another state, with its records in the wheels of this one."""
        for id in found:
            line = found.get(id)
            assert line is not None
            if found.name == SESSIONS:
                self._state.session_wheel.schedule(id, due_ms(line, self._rules))
            elif found.name in SCHEDULED:
                schedule_bookkeeping(self._state, found.name, id, line)
        return found

    def _heal(self, file: str, reason: str, source: str, records: int) -> None:
        """Tell that the damaged *file* is back as it was."""
        self._healed.append(f"{reason.partition(':')[0]}; all of it came back from {source}")
        self._log.error("snapshot.damaged", file=file, recovered_from=source, records=records, reason=reason)

    def _load_user_files(self) -> None:
        """Load the profiles of an old bot, one file each in ``users/``, as long as there is no file of ours with all of them."""
        found = self._directory.stat(_OLD_USERS)
        if found is None or not stat.S_ISDIR(found.st_mode) or self._directory.stat(file_of(USERS)) is not None:
            return
        collection = Collection(USERS)
        with self._directory.subdirectory(_OLD_USERS) as old:
            for name in old.names():
                if not name.endswith(".json"):
                    continue
                self._check_cancelled()
                try:
                    profile = msgspec.json.decode(old.read(name).removeprefix(b"\xef\xbb\xbf"))
                except (OSError, ValueError, RecursionError) as error:
                    self._lose_user_file(name, str(error))
                    continue
                if isinstance(profile, dict) and profile.get(USER_ID_FIELD) in (None, ""):
                    # As of a conversation: whose it is its name says as well.
                    id = name.removesuffix(".json")
                    with suppress(InvalidRecord):
                        check_id(id, self._rules)
                        profile[USER_ID_FIELD] = id
                counts = load_foreign(
                    [profile], self._state, collection, self._rules, self._now_ms, bump_versions=False
                )
                self._counts.merged += counts.merged
                if counts.skipped_invalid:
                    self._lose_user_file(
                        name, f"expected a JSON object with a {USER_ID_FIELD} that can be kept exactly"
                    )
        self._adopt(collection, 0)

    def _lose_user_file(self, name: str, reason: str) -> None:
        """Nothing of the profile in the file *name* can be taken: it goes to ``quarantine/``."""
        self._counts.skipped_invalid += 1
        # A name need not be text.
        file = os.fsencode(f"{_OLD_USERS}/{name}").decode("utf-8", "backslashreplace")

        def move(quarantine: Directory) -> None:
            new_name = f"{self._stamp()}-{_OLD_USERS}-{short_name(name)}"
            report = {"file": file, "reason": reason, "at": format_ms(self._now_ms)}
            quarantine.write_atomic(f"{new_name}.report.json", [msgspec.json.encode(report) + b"\n"])
            with self._directory.subdirectory(_OLD_USERS) as old:
                old.move(name, quarantine, new_name)

        self._evidence.append(move)
        self._lose(file, f"{file} cannot be taken over: {reason}", 0)

    def _load_sales(self) -> None:
        if self._directory.stat(SALES_FILE) is None:
            if SALES_FILE in self._manifest.files or SALES_FILE in self._known_files:
                self._replaced.add(SALES_FILE)
                self._recover_sales(f"{SALES_FILE} is missing")
            return
        try:
            raw = self._directory.read(SALES_FILE)
        except OSError as error:
            self._set_aside(SALES_FILE)
            self._replaced.add(SALES_FILE)
            self._recover_sales(f"{SALES_FILE} cannot be read: {error.strerror}")
            return
        try:
            sales = decode_sales(raw.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, msgspec.DecodeError) as error:
            self._quarantine_copy(self._directory, SALES_FILE, str(error))
            self._replaced.add(SALES_FILE)
            self._recover_sales(f"{SALES_FILE} was damaged: {error}")
            return
        known = self._manifest.files.get(SALES_FILE)
        ours = [entry for entry in self._entries_of(SALES_FILE) if entry.crc32 == f"{crc32(raw):08x}"]
        if ours and ours[0] is not known:
            self._moved[SALES_FILE] = ours[0]
        elif known is not None and not ours:
            self._replaced.add(SALES_FILE)
            if self._is_damage(SALES_FILE, known):
                self._quarantine_copy(self._directory, SALES_FILE, "content changed without being written")
                self._recover_sales(f"{SALES_FILE} changed on the disk without being written", sales)
                return
            self._has_merged = True
            self._log.warning("snapshot.edited", file=SALES_FILE, records=len(sales.days))
        self._adopt_sales(sales)

    def _recover_sales(self, reason: str, sales: Sales | None = None) -> None:
        """Take the figures of a backup in the place of the damaged *sales*, which are None when there are none at all."""
        found = self._best(SALES_FILE, 0 if sales is None else len(sales.days), self._manifest.files.get(SALES_FILE))
        if found is not None and found.sales is not None:
            self._adopt_sales(found.sales)
            if found.is_exact:
                self._heal(SALES_FILE, reason, found.source, found.records)
                return
            self._lose(SALES_FILE, reason, found.records, found.source)
            return
        if sales is not None:
            self._adopt_sales(sales)
        self._lose(SALES_FILE, reason, 0 if sales is None else len(sales.days))

    def _adopt_sales(self, sales: Sales) -> None:
        oldest = oldest_day(self._now_ms, self._rules.zone, self._rules.keep_days)
        kept = sales.replaced(None, None, oldest) if self._drops_stale else sales
        if len(kept.days) != len(sales.days):
            self._replaced.add(SALES_FILE)
        self._state.set_sales(kept, 0, undoable=False)

    def _adopt(self, collection: Collection, seq: int) -> None:
        if collection.name == RETRIES:
            # Kept in a form of its own, which is as quick to note as it is to forget.
            lines = map(collection.get, collection)
            self._state.retries.load((line for line in lines if line is not None), seq)
            return
        collection.changed_seq = seq
        self._state.collection(collection.name).take_over(collection)

    # Journal.

    def _read_history(self, journal_directory: Directory) -> History:
        self._progress("reading the journal")
        after = self._manifest.snapshot_seq
        history = read_history(journal_directory, after, distrust_cache=True)
        if not history.segments and after:
            self._damages.append(f"the journal is missing; changes after event {after} are lost if there were any")
            self._log.error("journal.damaged", segment="journal/", offset=0, bytes=0, reason="no segment found")
        if not self._has_manifest and history.gaps and history.gaps[0][0] == 1:
            # Without a manifest nobody knows what the files hold; only holes inside the journal can be told.
            history = history._replace(gaps=history.gaps[1:])
        history, missing = self._filled(history)
        for damage in history.damages:
            is_healed = bool(history.gaps) and not missing and not _is_at_end(damage, history)
            self._note_journal_damage(journal_directory, damage, is_healed=is_healed)
        for first, last in missing:
            self._damages.append(f"events {first} to {last} are missing from the journal")
            self._log.error(
                "journal.damaged", segment="", offset=0, bytes=0, reason=f"events {first} to {last} missing"
            )
        return history

    def _filled(self, history: History) -> tuple[History, list[tuple[int, int]]]:
        """*history* with the missing events that stand elsewhere, and the stretches of those that stand nowhere."""
        if not history.segments and self._manifest.snapshot_seq:
            # What the history has beyond the snapshots; whether that is all nobody knows.
            after = self._manifest.snapshot_seq
            last = max((part.last_seq for part in self._backed.history.parts()), default=0)
            found = self._backed.events([(after + 1, last)]) if last > after else {}
            return history._replace(lines=[JournalLine(seq, found[seq]) for seq in sorted(found)]), []
        if not history.gaps:
            return history, []
        found = self._backed.events(history.gaps)
        missing: list[tuple[int, int]] = []
        for first, last in history.gaps:
            there = sorted(seq for seq in found if first <= seq <= last)
            # Never seq by seq: the name of a stray segment may leave a gap of any size.
            for before, behind in pairwise([first - 1, *there, last + 1]):
                if behind > before + 1:
                    missing.append((before + 1, behind - 1))
            got = len(there)
            self._log.info(
                "recovery.candidate_found",
                file=f"journal/{segment_name(first)}",
                source="history",
                records=got,
                is_exact=got == last - first + 1,
            )
            if got == last - first + 1:
                self._healed.append(
                    f"events {first} to {last} were missing from the journal; all came back from the history"
                )
        lines = sorted([*history.lines, *(JournalLine(seq, payload) for seq, payload in found.items())])
        return history._replace(lines=lines), missing

    def _replay(self, history: History) -> int:
        snapshot_seq = self._manifest.snapshot_seq
        self._state.seq = snapshot_seq
        self._state.backlog.since = self._state.backlog.last_seq = snapshot_seq
        text, at_ms = "", 0
        replayed = 0
        for seq, payload in history.lines:
            if seq <= snapshot_seq:
                continue
            try:
                event = decode_event(payload)
            except (msgspec.DecodeError, ValueError) as error:
                self._damages.append(f"event {seq} of the journal cannot be read: {error}")
                continue
            unknown = [op for op in [event.op, *(member.op for member in event.events or ())] if op not in EVENT_OPS]
            if unknown:
                raise DataRefused(
                    f"event {seq} of the journal is a {unknown[0]!r:.80}, which this Holdfast does not know; "
                    "install the version that wrote it. Nothing was touched"
                )
            if event.at != text:
                text, at_ms = event.at, parse_ms(event.at)
            apply(self._state, event, at_ms, undoable=False)
            replayed += 1
            if replayed % 20_000 == 0:
                self._check_cancelled()
                self._progress(f"replayed {replayed} of {len(history.lines)} events")
        self._clock.not_before(at_ms)
        return replayed

    def _open_journal(self, directory: Directory, history: History) -> Journal:
        if history.torn is not None:
            directory.truncate(history.torn.segment, history.torn.offset)
            self._log.warning("journal.tail_dropped", bytes=history.torn.bytes, segment=history.torn.segment)
        newest = max(history.segments, default=0)
        next_seq = max(history.last_seq, self._manifest.snapshot_seq, newest - 1) + 1
        self._state.seq = next_seq - 1
        segments = dict(history.segments)
        if history.torn is not None:
            segments[newest] = history.torn.offset
        if segments.get(next_seq):
            # It holds nothing that could be read, and its evidence is kept.
            directory.truncate(segment_name(next_seq), 0)
            segments[next_seq] = 0
        is_sound = not history.damages and not history.gaps
        new_segment = not is_sound and next_seq not in segments
        directory.sync()
        return Journal(directory, segments, next_seq, new_segment=new_segment)

    # Ageing.

    def _drop_stale(self) -> int:
        """Remove the sessions that became too old while nobody was there to expire them."""
        self._progress("dropping sessions that are too old")
        state, dropped = self._state, 0
        while ids := state.session_wheel.take_due(self._now_ms, 50_000):
            expired, later = decide_expiry(state, ids, self._rules, self._now_ms)
            for id in expired:
                state.sessions.set(id, None, state.sessions.changed_seq, undoable=False)
            for id, due in later:
                state.session_wheel.schedule(id, due)
            dropped += len(expired)
        if dropped:
            self._replaced.add(file_of(SESSIONS))
        return dropped

    # Evidence.

    def _keep_replaced(self) -> None:
        """Keep the files as they were before anything of them is dropped, skipped or merged."""
        names = sorted(name for name in self._replaced if self._directory.stat(name) is not None)
        if not names:
            return
        with self._directory.subdirectory("backups") as backups:
            place = f"start-{self._stamp()}"
            with backups.subdirectory(place) as kept:
                for name in names:
                    self._directory.keep_link(name, kept)
            earlier = [name for name in backups.names() if name.startswith("start-")]
            for name in earlier[: -self._settings.backups.keep]:
                backups.remove_tree(name)
        self._log.info("backup.kept_before_merge", files=len(names), kept_in=f"backups/{place}")

    def _keep_evidence(self) -> None:
        if self._evidence:
            with self._directory.subdirectory("quarantine") as quarantine:
                for keep in self._evidence:
                    keep(quarantine)

    def _quarantine_copy(self, directory: Directory, name: str, reason: str) -> None:
        def keep(quarantine: Directory) -> None:
            directory.keep_copy(name, quarantine, f"{self._stamp()}-{name}")
            self._report(quarantine, name, reason)

        self._evidence.append(keep)

    def _set_aside(self, name: str) -> None:
        """Move away what stands in the place of a file and cannot be read as one."""

        def move(quarantine: Directory) -> None:
            self._directory.move(name, quarantine, f"{self._stamp()}-{name}")
            self._report(quarantine, name, "not a readable regular file")

        self._evidence.append(move)

    def _report(self, quarantine: Directory, name: str, reason: str) -> None:
        report = {"file": name, "reason": reason, "at": format_ms(self._now_ms)}
        quarantine.write_atomic(f"{self._stamp()}-{name}.report.json", [msgspec.json.encode(report) + b"\n"])

    def _note_journal_damage(self, directory: Directory, damage: Damage, *, is_healed: bool) -> None:
        self._log.error("journal.damaged", **damage._asdict())
        told = self._healed if is_healed else self._damages
        told.append(f"{damage.segment} is damaged at byte {damage.offset}: {damage.reason}")
        self._quarantine_copy(directory, damage.segment, f"byte {damage.offset}: {damage.reason}")

    def _note_damage(self, file: str, reason: str, recovered_from: str) -> None:
        self._damages.append(reason)
        self._log.error("snapshot.damaged", file=file, recovered_from=recovered_from, reason=reason)

    def _lose(self, file: str, reason: str, saved: int, source: str = "") -> None:
        recovered_from = source or ("salvage" if saved else "nothing")
        self._damages.append(
            reason if recovered_from in ("salvage", "nothing") else f"{reason}; {recovered_from} is used"
        )
        self._log.error("snapshot.damaged", file=file, recovered_from=recovered_from, records=saved, reason=reason)

    def _ignore(self, file: str, name: str, reason: str) -> None:
        self._ignored[name] = reason
        self._log.info("file.ignored", file=file, reason=reason)

    def _now_stamp(self) -> str:
        return format_ms(self._clock.now_ms()).replace(":", "")

    def _stamp(self) -> str:
        return format_ms(self._now_ms).replace(":", "")

    def _note_progress(self, file: str, entry: FileEntry) -> Callable[[int], None]:
        done = 0

        def note(block_bytes: int) -> None:
            nonlocal done
            done += block_bytes
            self._check_cancelled()
            self._progress(f"loading {file}: {100 * done // max(entry.bytes, 1)} %")

        return note

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise Unavailable("stopped while loading; nothing was written")
