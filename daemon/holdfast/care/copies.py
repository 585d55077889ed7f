"""Copies of the backups at a second place, brought there in a thread of its own.

Whatever the second place does, be slow, be full, be gone, concerns nobody but this thread: it tries again, later and later,
and says so. What is there is only ever removed because newer sets are there, never because it is missing here.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from holdfast.care.backup_set import (
    BACKUPS,
    SET_FILE,
    BackupSet,
    SetDamaged,
    StoredFile,
    encode_set_manifest,
    lineage_of,
    list_sets,
    marked,
    own_sets,
    read_set,
    write_proof,
)
from holdfast.care.history import JOURNAL, PACKED_NAME
from holdfast.care.history_follower import QUARANTINE, packed_parts
from holdfast.care.store import (
    SCHEME,
    CopyFailed,
    SourceDamaged,
    Stopped,
    Store,
    known_files,
    link_known,
    stands_whole,
    store_of,
)
from holdfast.clock import format_ms, parse_ms
from holdfast.disk.files import Directory, kept_from_writers
from holdfast.disk.snapshot import MANIFEST, MANIFEST_NEXT, read_manifest
from holdfast.errors import DataRefused, DirectoryLocked, HoldfastError, NotFound, Unavailable
from holdfast.settings import Settings

CHECK_EVERY_S = 5.0
"""Between two looks for a new backup; a look costs a few system calls."""

RETRY_S, RETRY_S_MAX = 30.0, 3600.0
"""After the first failure, and at most; doubled in between."""

TIDY_EVERY_S = 24 * 3600.0

CLOSE_S = 4.0
"""What a transfer under way gets to notice that it should end; afterwards the process ends without it."""

NOTE_FILE = "copied_to.json"
"""In ``backups/``: which directory had copies when it was last looked at; empty, it is then a disk that is not mounted."""

OLD_AFTER = 2
"""Times ``backups.every``: when the newest copy is older than this, something is wrong."""


class CopyState(NamedTuple):
    """How the second place stands, as far as is known.

    Attributes:
        place: where it is; empty when there is none.
        newest: name of the newest set there; empty when there is none, or nobody has looked yet.
        newest_ms: when it was made, ms since 1970; 0 without.
        sets: how many sets are there.
        copied, failures: sets that were brought there, and tries that failed, since the start.
        failure: why the last try failed; empty when it did not.
    """

    place: str = ""
    newest: str = ""
    newest_ms: int = 0
    sets: int = 0
    copied: int = 0
    failures: int = 0
    failure: str = ""


class Copies:
    """Brings every backup of one data directory to the second place; from ``start`` to ``close``.

    Attributes:
        state: how it stands; replaced, never changed, so any thread may read it.
    """

    def __init__(
        self,
        data_dir: Path,
        settings: Callable[[], Settings],
        now_ms: Callable[[], int],
        log: Any,
        *,
        is_left_behind: bool = False,
    ) -> None:
        """*settings* gives those in force; *now_ms* the time. *is_left_behind*: a program that ends without ``close`` does
        not wait for it."""
        self.state = CopyState()
        self._data_dir = data_dir
        self._settings = settings
        self._now_ms = now_ms
        self._log = log
        self._since_ms = now_ms()
        self._stopping = threading.Event()
        self._seen: object = None
        self._retry_s = 0.0
        self._tidied_s = -TIDY_EVERY_S
        self._waited_s = 0.0
        # Where it is left in the midst of a request, the daemon is ended by its own last step and not by the interpreter,
        # which would take the library's threads down with it; so there it is no daemon thread.
        self._thread = threading.Thread(target=self._run, name="holdfast-copies", daemon=is_left_behind)

    def start(self) -> None:
        """Begin to copy, now and whenever there is a new backup."""
        self._thread.start()

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Have it end; what is half way there is done again another time. Whether it did within *timeout_s*."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def status(self) -> dict[str, Any] | None:
        """How they stand, for people and monitors; None without a second place."""
        state = self.state
        if not self._settings().backups.copy_to:
            return None
        return {
            "place": state.place,
            "count": state.sets,
            "newest_at": format_ms(state.newest_ms) if state.newest_ms else None,
            "failure": state.failure,
        }

    @property
    def complaint(self) -> str:
        """What an operator should do something about; empty when the newest copy is new enough."""
        state, settings = self.state, self._settings().backups
        if not settings.copy_to:
            return ""
        age_s = (self._now_ms() - max(state.newest_ms, 0 if state.newest_ms else self._since_ms)) / 1000
        if age_s <= OLD_AFTER * settings.every:
            return ""
        what = (
            f"the newest backup copy is {age_s / 3600:.0f} hours old" if state.newest else "no backup was ever copied"
        )
        return f"{what} ({settings.copy_to}){f': {state.failure}' if state.failure else ''}"

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stopping.wait(pause_s):
            self._waited_s += pause_s
            try:
                self._look()
                pause_s, self._retry_s = CHECK_EVERY_S, 0.0
            except Stopped:
                return
            except (CopyFailed, HoldfastError, OSError) as error:
                self._note_failure(str(error))
                pause_s = self._retry_s
            except Exception as error:  # a fault of ours must not end the copies for good
                self._note_failure(f"a fault inside Holdfast: {error!r}")
                pause_s = self._retry_s

    def _note_failure(self, reason: str) -> None:
        self._seen = None
        self._retry_s = min(RETRY_S_MAX, self._retry_s * 2 or RETRY_S)
        self.state = self.state._replace(failure=reason, failures=self.state.failures + 1)
        self._log.error("backup.copy_failed", reason=reason, place=self.state.place, retry_s=self._retry_s)

    def _look(self) -> None:
        settings = self._settings()
        backups = settings.backups
        seen = (backups, _changes(self._data_dir))
        if seen == self._seen:
            return
        if not backups.copy_to:
            self.state, self._seen = CopyState(), seen
            return
        if self.state.place != backups.copy_to:
            self.state = CopyState(backups.copy_to)
        store = store_of(settings)
        there = store.sets()
        self._check_mounted(backups.copy_to, there)
        self._check_ours(backups.copy_to, there)
        self._know(there)
        if self._waited_s - self._tidied_s >= TIDY_EVERY_S:
            # Before anything is sent: what was left half done may be what fills the place.
            store.tidy()
            self._tidied_s = self._waited_s
        there, damaged = self._send_sets(store, there, backups.copy_keep)
        self._send_history(store)
        self._rotate(store, there, backups.copy_keep)
        self._note_place(backups.copy_to, there)
        if damaged is not None:
            raise damaged
        self._seen = seen
        self.state = self.state._replace(failure="")

    def _check_mounted(self, place: str, there: list[BackupSet]) -> None:
        if there or _noted_place(self._data_dir) != place:
            return
        raise CopyFailed(
            f"{place} has no backups, and had some before; mount its disk, or, if it is to be filled anew, remove "
            f"{self._data_dir / BACKUPS / NOTE_FILE}"
        )

    def _check_ours(self, place: str, there: list[BackupSet]) -> None:
        """Another directory's events have the same numbers, and the older of its sets would have to make room for ours."""
        strangers = [one.name for one in marked(there, lineage_of(self._data_dir)) if one.is_foreign]
        if strangers:
            raise CopyFailed(
                f"expected a place for this data directory alone, found {strangers[0]} of another one in {place}; "
                "name a place of its own in backups.copy_to, or, after a loss, restore from what is there first"
            )

    def _note_place(self, place: str, there: list[BackupSet]) -> None:
        noted = place if there and not place.startswith(SCHEME) else ""
        if noted != _noted_place(self._data_dir):
            with Directory(self._data_dir) as data, data.subdirectory(BACKUPS) as backups:
                backups.write_atomic(NOTE_FILE, [msgspec.json.encode({"place": noted}), b"\n"])

    def _know(self, there: list[BackupSet]) -> None:
        whole = [one for one in there if one.manifest is not None]
        newest = whole[0] if whole else None
        newest_ms = parse_ms(newest.manifest.at) if newest is not None and newest.manifest is not None else 0
        self.state = self.state._replace(
            newest=newest.name if newest is not None else "", newest_ms=newest_ms, sets=len(whole)
        )

    def _send_sets(
        self, store: Store, there: list[BackupSet], keep: int
    ) -> tuple[list[BackupSet], SourceDamaged | None]:
        """Send what is missing, the newest first; the sets that are there then, newest first, and why one was not sent."""
        damaged: SourceDamaged | None = None
        known = {one.name: one for one in there if one.manifest is not None}
        here = {one.name: one for one in own_sets(self._data_dir)}
        wanted = sorted({*known, *here}, reverse=True)[:keep]
        for name in wanted:
            one = here.get(name)
            if one is None:
                continue
            try:
                if name not in known:
                    self._send(store, one)
                elif one.proof is not None and one.proof != known[name].proof:
                    store.put_proof(one)
                else:
                    continue
            except SourceDamaged as error:
                # Those before it are worth a copy all the more.
                damaged = damaged or error
                continue
            except CopyFailed:
                if not one.path.is_dir():
                    continue  # rotated away meanwhile
                raise
            known[name] = one
            self._know([known[name] for name in sorted(known, reverse=True)])
        return [known[name] for name in sorted(known, reverse=True)], damaged

    def _send(self, store: Store, one: BackupSet) -> None:
        started_ms = self._now_ms()
        sent = store.put(one, self._stopping.is_set)
        self.state = self.state._replace(copied=self.state.copied + 1)
        self._log.info(
            "backup.copied",
            name=one.name,
            place=store.where,
            files=sent.files,
            bytes=sent.bytes,
            duration_ms=max(0, self._now_ms() - started_ms),
        )

    def _send_history(self, store: Store) -> None:
        path = self._data_dir / BACKUPS / JOURNAL
        if not path.is_dir():
            return
        there = store.history()
        with Directory(path) as source:
            for name in source.names():
                status = source.stat(name)
                if (
                    PACKED_NAME.fullmatch(name)
                    and status
                    and (name not in there or there[name].bytes != status.st_size)
                ):
                    try:
                        store.put_history(source, name, self._stopping.is_set)
                    except CopyFailed:
                        if source.stat(name) is None:
                            continue  # no longer needed
                        raise

    def _rotate(self, store: Store, there: list[BackupSet], keep: int) -> None:
        kept = there[:keep]
        if not any(one.is_proved for one in kept):
            # Whatever comes after it has not been shown to be of use.
            kept += [one for one in there[keep:] if one.is_proved][:1]
        for one in there:
            if one not in kept:
                self._stop_here()
                store.remove(one.name)
        oldest = kept[-1].manifest if kept else None
        if oldest is None:
            return
        # By when it came there and not by its seq: another life of this directory may have begun at 1.
        needed_s = parse_ms(oldest.at) / 1000
        for name, file in store.history().items():
            if file.at_s < needed_s:
                self._stop_here()
                store.remove_history(name)
        if len(kept) < len(there):
            store.tidy()

    def _stop_here(self) -> None:
        if self._stopping.is_set():
            raise Stopped


class Fetched(NamedTuple):
    """What was brought back from the second place.

    Attributes:
        found: the set, now in ``backups/``.
        bytes: so many had to be read from there; the others were here.
        history: files of the history that came with it.
        left: why the history that is there stayed there; empty when it did not, or there is none.
        set_aside: where the damaged set of the same name went, within the data directory; empty when there was none.
    """

    found: BackupSet
    bytes: int
    history: int
    left: str = ""
    set_aside: str = ""


def fetch(
    store: Store,
    name: str,
    data_dir: Path,
    progress: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> Fetched:
    """Bring the set *name*, or the newest one for ``latest``, from *store* into ``backups/`` of *data_dir*.

    One of that name that is here is read, and stays when it is the same; else it goes to ``quarantine/``. The history that
    is there comes along where none is packed here, and the numbers of its events mean no others here. *progress* is told
    the file, and bytes done of all.

    Raises:
        NotFound: there is no such set; says which there are.
        SetDamaged: it is not what it says; nothing of it is here.
        Unavailable: the second place cannot be read.
        StorageFull, OSError: there is no room here; nothing of it is here.
    """
    try:
        there = [one for one in store.sets() if one.manifest is not None]
        found = next((one for one in there if name in (one.name, "latest")), None)
        if found is None or found.manifest is None:
            known = ", ".join(one.name for one in there[:10]) or "none at all"
            raise NotFound(f"{store.where} has no backup {name}; it has {known}")
        with Directory(data_dir) as data, data.subdirectory(BACKUPS) as backups:
            size, set_aside = 0, ""
            difference = None if backups.stat(found.name) is None else _difference(found, backups, progress)
            if difference != "":
                with _laid_out(store, found, backups, progress) as size:
                    if difference is not None:
                        set_aside = _set_aside(data, backups, found.name, difference)
            history, left = _fetch_history(store, found, data_dir, backups)
        return Fetched(read_set(data_dir / BACKUPS / found.name), size, history, left, set_aside)
    except CopyFailed as error:
        raise Unavailable(str(error)) from error


@contextmanager
def _laid_out(
    store: Store, found: BackupSet, backups: Directory, progress: Callable[[str, int, int], object]
) -> Iterator[int]:
    """Lay *found* out in *backups*, and give it its name behind the block; how many bytes had to be read from *store*."""
    assert found.manifest is not None
    half_made = f".{found.name}.{os.getpid()}.tmp"
    here = known_files(list_sets(backups.path.parent))
    total = sum(stored.stored_bytes for stored in found.manifest.files.values())
    done = size = 0
    try:
        with backups.subdirectory(half_made) as target:
            for name, stored in found.manifest.files.items():
                progress(name, done, total)
                if not link_known(here, stored, target):
                    target.write_atomic(stored.stored, _whole(store, found, stored))
                    size += stored.stored_bytes
                done += stored.stored_bytes
            progress("", done, total)
            target.write_atomic(SET_FILE, [encode_set_manifest(found.manifest)])
            if found.proof is not None:
                write_proof(target.path, found.proof)
        yield size
        backups.rename(half_made, found.name)
        backups.sync()
    except BaseException:
        if backups.stat(half_made) is not None:
            backups.remove_tree(half_made)
        raise


def _difference(found: BackupSet, backups: Directory, progress: Callable[[str, int, int], object]) -> str:
    """In what the set of the name of *found* that stands in *backups* is not as *found* says; empty when it is the same."""
    assert found.manifest is not None
    here = read_set(backups.path / found.name)
    if here.manifest is None:
        return here.damage
    # What a later version knows beyond it is not written here again, which gives it another checksum.
    if msgspec.structs.replace(here.manifest, checksum="") != msgspec.structs.replace(found.manifest, checksum=""):
        return f"its {SET_FILE} is another one than that of the copy"
    done, total = 0, found.stored_bytes
    with Directory(here.path) as directory:
        for name, stored in found.manifest.files.items():
            progress(name, done, total)
            if not stands_whole(directory, stored.stored, stored):
                return f"{stored.stored} is not what was backed up"
            done += stored.stored_bytes
    return ""


def _set_aside(data: Directory, backups: Directory, name: str, reason: str) -> str:
    """Put the set *name* into ``quarantine/``, with a report of what is wrong with it; its place there."""
    at = format_ms(time.time_ns() // 1_000_000)
    new_name = f"{at.replace(':', '')}-{name}"
    report = {"file": f"{BACKUPS}/{name}", "reason": reason, "at": at}
    with data.subdirectory(QUARANTINE) as quarantine:
        quarantine.write_atomic(f"{new_name}.report.json", [msgspec.json.encode(report), b"\n"])
        backups.move(name, quarantine, new_name)
    return f"{QUARANTINE}/{new_name}"


def _fetch_history(store: Store, found: BackupSet, data_dir: Path, backups: Directory) -> tuple[int, str]:
    """Bring the history here that *found* stands in; how many files, and why it stayed where it is when it did."""
    assert found.manifest is not None
    names = list(store.history())
    if not names or packed_parts(data_dir):
        return 0, ""  # what is here is newer, and may be of another life of this directory
    if found.manifest.lineage in ("", lineage_of(data_dir)):
        return _copy_history(store, names, backups), ""
    try:
        # Whoever runs may have his first event in the next moment.
        with kept_from_writers(data_dir):
            if _has_events(data_dir, found.manifest.lineage):
                return 0, (
                    "it is of another data directory, and the same numbers are other events here; fetch it into an empty "
                    "data directory (--data-dir) for its moments"
                )
            return _copy_history(store, names, backups), ""
    except DirectoryLocked as error:
        return 0, f"it is of another data directory than this one, which is in use: {error}"


def _copy_history(store: Store, names: list[str], backups: Directory) -> int:
    with backups.subdirectory(JOURNAL) as place:
        for name in names:
            place.write_atomic(name, store.read_history(name))
    return len(names)


def _has_events(data_dir: Path, lineage: str) -> bool:
    """Whether anything in the directory *data_dir*, which nobody has open, tells of an event; sets of *lineage* aside."""
    for name in (MANIFEST, MANIFEST_NEXT):
        try:
            with Directory(data_dir) as data:
                manifest = read_manifest(data, name)
        except (DataRefused, ValueError, OSError):
            return True  # there was one
        if manifest is not None and manifest.snapshot_seq:
            return True
    if any(path.stat().st_size for path in (data_dir / JOURNAL).rglob("*.jsonl")):
        return True
    others = [one.manifest for one in list_sets(data_dir) if one.manifest and one.manifest.lineage != lineage]
    return any(manifest.seq for manifest in others)


def _whole(store: Store, found: BackupSet, stored: StoredFile) -> Iterator[bytes]:
    digest, size = hashlib.sha256(), 0
    for piece in store.read(found, stored):
        digest.update(piece)
        size += len(piece)
        yield piece
    if size != stored.stored_bytes or digest.hexdigest() != stored.stored_sha256:
        raise SetDamaged(f"{store.where}: {stored.stored} of {found.name} is not what was copied; take an older backup")


def _noted_place(data_dir: Path) -> str:
    try:
        with Directory(data_dir / BACKUPS) as backups:
            return msgspec.json.decode(backups.read(NOTE_FILE), type=dict[str, str]).get("place", "")
    except (OSError, HoldfastError, msgspec.DecodeError):
        return ""  # nobody knows


def _changes(data_dir: Path) -> tuple[tuple[str, int], ...]:
    """What changes whenever a set, a proof or a file of the history comes or goes."""
    place = data_dir / BACKUPS
    try:
        names = os.listdir(place)
    except OSError:
        return ()
    found = []
    for name in sorted({*names} - {NOTE_FILE}):
        try:
            found.append((name, (place / name).stat().st_mtime_ns))
        except OSError:
            continue  # gone meanwhile
    return tuple(found)
