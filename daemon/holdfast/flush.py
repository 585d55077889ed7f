"""The flush: a consistent picture of the whole state at one seq, written without stopping the world.

In this order, so that a crash at any point loses nothing: the journal is synced and goes on in a new segment;
the changed collections are captured as of its last seq S; their files are staged beside the old ones; the next
manifest; the files move into place; the manifest follows; only then is the journal pruned.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from holdfast import __version__
from holdfast.clock import Clock, format_ms
from holdfast.commit import Committer
from holdfast.core.collection import SHARDS, Collection
from holdfast.core.sales import Sales, encode_sales
from holdfast.core.state import (
    COMPLETED_ORDERS,
    CONVERSATIONS,
    COUNTED,
    ESCALATIONS,
    EXTERNALS,
    HOLDS,
    KEYS,
    LEASES,
    ORDERS,
    RETRIES,
    SESSIONS,
    USERS,
    State,
)
from holdfast.disk.files import FULL_ERRNOS, Directory
from holdfast.disk.journal import Journal
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    FileEntry,
    Manifest,
    encode_manifest,
    entry_of,
    snapshot_chunks,
)
from holdfast.errors import HoldfastError
from holdfast.ops import FlushReport
from holdfast.turns import Turns

T = TypeVar("T")

SALES_FILE = "sales_stats.json"
RETRIES_FILE = "_retries.json"

KEEP_SHARE = 4
"""History is kept only while so many times ``journal_keep`` is free on the disk: room is for what is new."""

FILE_OF = {
    SESSIONS: "chat_sessions.json",
    ORDERS: "pending_orders.json",
    COMPLETED_ORDERS: "completed_orders.json",
    USERS: "users.json",
    LEASES: "_leases.json",
    KEYS: "_keys.json",
    RETRIES: RETRIES_FILE,
    COUNTED: "_counted.json",
    CONVERSATIONS: "_conversations.json",
    ESCALATIONS: "_escalations.json",
    HOLDS: "_holds.json",
    EXTERNALS: "_externals.json",
}
"""Where the built-in collections live; a custom one lives in NAME.json."""


def file_of(collection: str) -> str:
    """The snapshot file of *collection*."""
    return FILE_OF.get(collection, f"{collection}.json")


class Flusher:
    """Writes snapshots; one flush at a time, at most one waiting.

    Attributes:
        followers: by name, what each still needs: a function that gives its watermark seq. Changed by ``follow`` and
            ``unfollow``, from any thread.
        journal_keep: bytes of the journal that are kept for readers behind the snapshots.
        before_making_room: called when history is given up for want of room, by whoever makes it; must not raise.
        before_publishing: called with the seq of the snapshots before they are in place; must not raise.
        before_pruning: called with the seq of the snapshots before the journal is pruned, so that followers may catch up.
        after_flush: called with that seq when all is done; must not raise.
        flushing_since: when the oldest event came that the flush under way writes, monotonic seconds; None when there
            is none.
        last_report: of the last flush that succeeded.
        last_error: why the last one failed; None when it did not.
    """

    def __init__(
        self,
        directory: Directory,
        journal: Journal,
        manifest: Manifest,
        loaded: dict[str, tuple[int, int]],
        clock: Clock,
        log: Any,
    ) -> None:
        """Begin with the files of *manifest*, and with those *loaded* (name to size and mtime_ns) that others wrote."""
        self.followers: dict[str, Callable[[], int]] = {}
        self.journal_keep = 0
        self.before_making_room: Callable[[], object] = lambda: None
        self.before_publishing: Callable[[int], object] = lambda seq: None
        self.before_pruning: Callable[[int], object] = lambda seq: None
        self.after_flush: Callable[[int], object] = lambda seq: None
        # Who begins to follow either counts in a pruning, or finds what it left.
        self._pruning = threading.Lock()
        self.flushing_since: float | None = None
        self.last_report: FlushReport | None = None
        self.last_error: Exception | None = None
        self._directory = directory
        self._journal = journal
        self._manifest = manifest
        self._loaded = loaded
        # Of a flush that failed while its files moved into place.
        self._interrupted: Manifest | None = None
        # As the flush that wrote them left them.
        self._distrusted: dict[str, FileEntry] = {}
        self._kept_edits: list[KeptEdit] = []
        self._clock = clock
        self._log = log
        # From the begin of a run on its picture may be taken; who comes later needs the one after it.
        self._turns = Turns[FlushReport]()

    @property
    def snapshot_seq(self) -> int:
        """The snapshot files hold every event up to here."""
        return self._manifest.snapshot_seq

    @property
    def snapshot_at(self) -> str:
        """When they were written, ISO 8601; empty when there are none yet."""
        return self._manifest.at

    @property
    def snapshot_bytes(self) -> int:
        """Size of the snapshot files."""
        return sum(entry.bytes for entry in self._manifest.files.values())

    def disk_space(self) -> tuple[int, int]:
        """Bytes free for us, and all bytes, of the file system that the data directory is on."""
        return self._directory.space()

    def has_room(self, beyond_bytes: int) -> bool:
        """Whether a file of *beyond_bytes* could grow: tried, since neither quotas nor limits show in the free room."""
        return self._directory.has_room(beyond_bytes)

    def follow(self, name: str, watermark: Callable[[], int]) -> None:
        """Keep the journal from *watermark*() + 1 on, as long as it is still there when this returns."""
        with self._pruning:
            self.followers[name] = watermark

    def unfollow(self, name: str) -> None:
        """Keep nothing for *name* any more."""
        # Without waiting for a pruning: event loops call this.
        self.followers.pop(name, None)

    def make_room(self) -> None:
        """Give up the history that is kept for readers only; what followers need stays. Errors are told in the log."""
        self.before_making_room()
        try:
            self._retire(self.snapshot_seq, keep_bytes=0)
        except OSError as error:
            self._log.warning("journal.keep_failed", reason=str(error))

    def hold(self, use: Callable[[Manifest, Directory], T]) -> T:
        """What *use* gives, called with the manifest and the directory while no flush replaces a file.

        Raises:
            StorageFull, OSError: a flush was interrupted before, and what it left cannot be settled.
        """
        with self._turns.running:
            self._settle_interrupted()
            return use(self._manifest, self._directory)

    def distrust(self, names: Iterable[str]) -> None:
        """Have the next flush write the files *names* anew, whether their collections changed or not: somebody else, or the
        disk, changed what we wrote. What stands there is kept as evidence."""
        with self._turns.running:
            doubtful = set(names)
            self._distrusted |= {name: entry for name, entry in self._manifest.files.items() if name in doubtful}
            files = {name: entry for name, entry in self._manifest.files.items() if name not in doubtful}
            self._manifest = msgspec.structs.replace(self._manifest, files=files)

    def flush(self, reason: str, committer: Committer, state: State) -> FlushReport:
        """Flush, or share the flush that waits for the running one; errors as ``Engine.flush``."""
        return self._turns.take(lambda: self._flush(reason, committer, state))

    def _flush(self, reason: str, committer: Committer, state: State) -> FlushReport:
        started = self._clock.monotonic()
        try:
            report = self._write(reason, committer, state, started)
        except (HoldfastError, OSError) as error:
            self.last_error = error
            committer.measures.flushes[reason, False] += 1
            self._log.error("flush.failed", reason=reason, error=str(error))
            raise
        self.last_error = None
        self.last_report = report
        measures = committer.measures
        measures.flushes[reason, True] += 1
        measures.flush.add(report.duration_ms / 1000)
        measures.flushed_bytes += report.bytes
        self._log.info("flush.completed", **{key: getattr(report, key) for key in _LOGGED})
        self.after_flush(report.snapshot_seq)
        return report

    def _write(self, reason: str, committer: Committer, state: State, started: float) -> FlushReport:
        if not self._may_keep(committer):
            # Before anything is written: it may be just the room that is missing.
            self.make_room()
        files = self._manifest.files
        captured: list[Collection] = []
        sales: list[Sales] = []

        def begin(seq: int) -> None:
            self.flushing_since, committer.unflushed_since = committer.unflushed_since, None
            for collection in state.collections.values():
                if collection.name == RETRIES:
                    continue
                entry = files.get(file_of(collection.name))
                if entry is None or collection.changed_seq > entry.seq:
                    collection.begin_capture()
                    captured.append(collection)
            entry = files.get(SALES_FILE)
            if entry is None or state.sales_changed_seq > entry.seq:
                sales.append(state.sales)

        staged: dict[str, FileEntry] = {}
        is_busy = change_detector(state)
        try:
            seq = committer.checkpoint(begin)
            for collection in captured:
                name = file_of(collection.name)
                records = _Counter()
                written = self._directory.stage(
                    name, snapshot_chunks(_captured_shards(collection, committer.lock, records)), is_busy
                )
                staged[name] = entry_of(written, records.count, seq)
            if sales:
                staged[SALES_FILE] = entry_of(self._directory.stage(SALES_FILE, [encode_sales(sales[0])]), 0, seq)
            entry = files.get(RETRIES_FILE)
            if entry is None or state.retries.changed_seq > entry.seq:
                lines = _retry_lines(state, committer)
                staged[RETRIES_FILE] = entry_of(
                    self._directory.stage(RETRIES_FILE, snapshot_chunks([lines])), len(lines), seq
                )
            self.before_publishing(seq)
            self._publish(staged, seq)
            self.flushing_since = None
        except BaseException:
            with committer.lock:
                if self.flushing_since is not None:
                    committer.unflushed_since, self.flushing_since = self.flushing_since, None
            self._directory.discard(staged)
            raise
        finally:
            with committer.lock:
                for collection in captured:
                    collection.end_capture()
        self.before_pruning(seq)
        # What was damaged is no history to go on with.
        is_sound = reason != "recovery"
        pruned = self._retire(seq, self.journal_keep if is_sound and self._may_keep(committer) else 0)
        return FlushReport(
            reason=reason,
            snapshot_seq=seq,
            files=len(staged),
            bytes=sum(entry.bytes for entry in staged.values()),
            pruned=pruned,
            duration_ms=round((self._clock.monotonic() - started) * 1000, 1),
            at=format_ms(self._clock.now_ms()),
        )

    def _may_keep(self, committer: Committer) -> bool:
        free_bytes, _ = self._directory.space()
        return not committer.is_full and free_bytes >= KEEP_SHARE * self.journal_keep

    def _retire(self, covered_seq: int, keep_bytes: int) -> int:
        with self._pruning:
            needed_seq = min([covered_seq, *(watermark() for watermark in list(self.followers.values()))]) + 1
            try:
                return self._journal.retire(covered_seq, needed_seq, keep_bytes)
            except OSError as error:
                if error.errno not in FULL_ERRNOS:
                    raise
                # What only readers want must not make a flush fail for want of room.
                self._log.warning("journal.keep_failed", reason=str(error))
                self.before_making_room()
                needed_seq = min([covered_seq, *(watermark() for watermark in list(self.followers.values()))]) + 1
                return self._journal.retire(covered_seq, needed_seq, keep_bytes=0)

    def _publish(self, staged: dict[str, FileEntry], seq: int) -> None:
        self._settle_interrupted()
        manifest = Manifest(
            holdfast=__version__,
            at=format_ms(self._clock.now_ms()),
            snapshot_seq=seq,
            lineage=self._manifest.lineage,
            files=self._manifest.files | staged,
        )
        self._keep_what_others_wrote(staged)
        self._directory.write_atomic(MANIFEST_NEXT, [encode_manifest(manifest)])
        self._interrupted = manifest
        self._directory.publish(staged)
        self._directory.rename(MANIFEST_NEXT, MANIFEST)
        self._directory.sync()
        self._manifest, self._interrupted = manifest, None
        self._distrusted.clear()

    def take_kept_edits(self) -> list[KeptEdit]:
        """The edits that a flush has replaced and kept since this was asked last."""
        with self._turns.running:
            taken, self._kept_edits = self._kept_edits, []
        return taken

    def edited(self) -> list[str]:
        """The files that are not as the last flush left them, or as they were loaded."""
        with self._turns.running:
            known = {name: (entry.bytes, entry.mtime_ns) for name, entry in self._manifest.files.items()}
            return [name for name, expected in (self._loaded | known).items() if self._signature(name) != expected]

    def _signature(self, name: str) -> tuple[int, int] | None:
        found = self._directory.stat(name)
        return None if found is None else (found.st_size, found.st_mtime_ns)

    def _settle_interrupted(self) -> None:
        """Put into the manifest what a flush that failed moved into place, before the manifest that knows it is replaced."""
        if self._interrupted is None:
            return
        moved = {
            name: entry
            for name, entry in self._interrupted.files.items()
            if (found := self._directory.stat(name))
            and (found.st_size, found.st_mtime_ns) == (entry.bytes, entry.mtime_ns)
        }
        settled = msgspec.structs.replace(self._manifest, files=self._manifest.files | moved)
        self._directory.write_atomic(MANIFEST, [encode_manifest(settled)])
        self._manifest, self._interrupted = settled, None

    def _keep_what_others_wrote(self, staged: dict[str, FileEntry]) -> None:
        """Copy aside each file about to be replaced that somebody changed while we ran."""
        for name in staged:
            ours = self._manifest.files.get(name)
            known = self._loaded.get(name) if ours is None else (ours.bytes, ours.mtime_ns)
            found = self._directory.stat(name)
            if found is None or (found.st_size, found.st_mtime_ns) == known:
                continue
            with self._directory.subdirectory("backups") as backups:
                place = f"edited-{format_ms(self._clock.now_ms()).replace(':', '')}"
                with backups.subdirectory(place) as kept:
                    # Not a copy: whoever is still writing it writes on in what is kept.
                    self._directory.keep_link(name, kept)
                    with suppress(OSError), os.fdopen(kept.open_to_read(name), "rb") as file:
                        os.fchmod(file.fileno(), 0o600)
                    last = self._distrusted.get(name, ours)
                    # What the disk changed under us is nobody's edit.
                    if last is not None and (found.st_size, found.st_mtime_ns) != (last.bytes, last.mtime_ns):
                        self._kept_edits.append(KeptEdit(name, kept.path, last))
            self._log.warning("snapshot.edit_kept", file=name, kept_in=f"backups/{place}")

    def close(self) -> None:
        """Give the directory back."""
        self._directory.close()


def _retry_lines(state: State, committer: Committer) -> list[bytes]:
    """The lines of ``_retries.json``, as of now instead of as of the picture's seq.

    What they know beyond that seq is durable, and so in the journal that is replayed on top of them; what a client's next
    request has replaced is of no use to anybody.
    """
    lines = []
    with committer.lock:
        clients = state.retries.clients()
    for client in clients:
        # One at a time, so that nobody waits long.
        with committer.lock:
            line = state.retries.line(client, committer.committed_seq)
        if line is not None:
            lines.append(line)
    return lines


class KeptEdit(NamedTuple):
    """A snapshot file that somebody edited, and that a flush replaced before the edit was taken over.

    Attributes:
        name: of the file.
        place: the directory in which it is kept under that name.
        entry: what stood there before the edit.
    """

    name: str
    place: Path
    entry: FileEntry


class _Counter:
    def __init__(self) -> None:
        self.count = 0


def change_detector(state: State) -> Callable[[], bool]:
    """Tells whether anything was changed since it was asked last."""
    seen_seq = state.seq

    def has_changed() -> bool:
        nonlocal seen_seq
        before, seen_seq = seen_seq, state.seq
        return seen_seq != before

    return has_changed


def _captured_shards(collection: Collection, lock: threading.Lock, counter: _Counter) -> Iterator[Any]:
    for index in range(SHARDS):
        # One shard at a time, so that nobody waits longer than the copying of one takes.
        with lock:
            shard = collection.capture_shard(index)
        counter.count += len(shard)
        yield shard.values()


_LOGGED = ("reason", "duration_ms", "bytes", "files", "snapshot_seq")
