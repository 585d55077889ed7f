"""What is counted while Holdfast works: plain numbers, since the locks of a metrics library cost a microsecond each.

Every number has one writer, or is written under the engine's lock; readers take none, and may see one number a moment
older than another. ``/metrics`` gives them their names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

import msgspec

LATENCY_BOUNDS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
FLUSH_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
COMMIT_EVENTS_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 100_000)
COMMIT_BYTES_BOUNDS = tuple(4**power for power in range(4, 14))
"""256 B to 64 MiB."""


class Histogram:
    """How many values fell below each of some bounds; one thread adds."""

    __slots__ = ("_counts", "bounds", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float, times: int = 1) -> None:
        """Count *value* as so many."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def counts(self) -> list[int]:
        """How many were at most each bound and above the one before, then how many were above the last."""
        return self._counts.copy()


class OpCounts:
    """How ops ended, by their type; changed under the engine's lock only.

    An accepted op counts as done once it is as durable as was asked for, since a full disk may undo it until then.

    Attributes:
        accepted: ops whose events go to the journal before they are acknowledged.
        settled: ops that were done when they were decided: acknowledged in memory, or nothing to write.
        refused: by type and error code.
    """

    __slots__ = ("_durable", "_written", "accepted", "refused", "settled")

    def __init__(self) -> None:
        self.accepted: defaultdict[type, int] = defaultdict(int)
        self.settled: defaultdict[type, int] = defaultdict(int)
        self.refused: defaultdict[tuple[type, str], int] = defaultdict(int)
        self._written = self._durable = self.accepted.copy()

    def of(self, undoable: bool) -> defaultdict[type, int]:
        """Where an op counts that may, or may not, still be undone."""
        return self.accepted if undoable else self.settled

    def begin_write(self) -> None:
        """What was accepted so far is now being written."""
        self._written = self.accepted.copy()

    def commit(self) -> None:
        """What was being written is durable."""
        self._durable = self._written

    def undo(self, code: str) -> None:
        """Everything accepted that is not durable was refused with *code* after all."""
        for kind, count in self.accepted.items():
            if count > self._durable[kind]:
                self.refused[kind, code] += count - self._durable[kind]
                self.accepted[kind] = self._durable[kind]

    @property
    def done(self) -> dict[type, int]:
        """Ops that took effect, or repeated one that had."""
        done = self._durable.copy()
        for kind, count in self.settled.copy().items():
            done[kind] += count
        return done


class EngineMeasures:
    """What the engine, its journal thread and its flushes count.

    Attributes:
        ops: how they ended.
        durable_latency: seconds from the decision of the first op of each batch until all of it was as durable as was
            asked for, counted once for each event of the batch; no event waited longer.
        commit_events, commit_bytes: of each batch.
        sync: seconds that each sync of the journal took.
        flush: seconds that each flush took which succeeded.
        flushes: by reason, and whether it succeeded.
        flushed_bytes: written by them all.
        sessions_expired: because they were idle too long.
        verified_at: when the data was verified last, seconds since 1970; None when it was not.
        verify_findings: what that found, by severity.
    """

    def __init__(self) -> None:
        self.ops = OpCounts()
        self.durable_latency = Histogram(LATENCY_BOUNDS_S)
        self.commit_events = Histogram(COMMIT_EVENTS_BOUNDS)
        self.commit_bytes = Histogram(COMMIT_BYTES_BOUNDS)
        self.sync = Histogram(LATENCY_BOUNDS_S)
        self.flush = Histogram(FLUSH_BOUNDS_S)
        self.flushes: defaultdict[tuple[str, bool], int] = defaultdict(int)
        self.flushed_bytes = 0
        self.sessions_expired = 0
        self.verified_at: float | None = None
        self.verify_findings: dict[str, int] = {}


class BackupFigures(msgspec.Struct, frozen=True):
    """How the backups stand.

    Attributes:
        taken_ms: when the newest set was taken, also by an earlier process, ms since 1970; 0 when there is none.
        proved_ms: when the newest proof was tried; 0 when none was.
        is_proof_ok: everything was loaded from the newest set, or nobody has tried yet.
        is_last_ok: the last backup of this process succeeded, or there was none.
        failures: backups of this process that failed.
        duration_s: what the last one took, with its proof.
        sets: how many there are.
        bytes: their files take, shared ones counted once.
        history_bytes: the packed journal takes.
        is_history_kept: not given up for want of room.
    """

    taken_ms: int = 0
    proved_ms: int = 0
    is_proof_ok: bool = True
    is_last_ok: bool = True
    failures: int = 0
    duration_s: float = 0.0
    sets: int = 0
    bytes: int = 0
    history_bytes: int = 0
    is_history_kept: bool = True


class Gauges(msgspec.Struct, frozen=True):
    """How the engine stands at one moment.

    Attributes:
        decided_seq, durable_seq, snapshot_seq: the watermarks.
        journal_bytes: of all segments.
        journal_bytes_max: the setting; a journal grown past it is flushed.
        journal_segments: how many.
        journal_kept_bytes: of the segments that only event streams still want.
        deferred_bytes: acknowledged under ``interval`` and not yet in the journal.
        unflushed_age_s: age of the oldest event that no snapshot holds, 0 when there is none; replayed ones count from
            the start.
        snapshot_bytes: of all snapshot files.
        flushed_ms: when the last flush ended that succeeded, also of an earlier process, ms since 1970; the start of
            this one when there was none.
        flush_every_s: the setting.
        has_flush_failed: the last flush did.
        is_disk_full: writes are refused with ``storage_full``.
        is_damaged: the start found damage, or the archive lost messages.
        is_archive_stalled: the archive cannot be written for now.
        archived_seq: the archive has every event about conversations up to here.
        records: as decided, by collection, in the order in which the collections came into being.
        leases, idempotency_keys: remembered.
        follower_lag: by name, how many durable events each follower has still to take.
        disk_free_bytes, disk_bytes: of the file system of the data directory, for users other than root.
    """

    decided_seq: int
    durable_seq: int
    snapshot_seq: int
    journal_bytes: int
    journal_bytes_max: int
    journal_segments: int
    journal_kept_bytes: int
    deferred_bytes: int
    unflushed_age_s: float
    snapshot_bytes: int
    flushed_ms: int
    flush_every_s: float
    has_flush_failed: bool
    is_disk_full: bool
    is_damaged: bool
    is_archive_stalled: bool
    archived_seq: int
    records: dict[str, int]
    leases: int
    idempotency_keys: int
    follower_lag: dict[str, int]
    disk_free_bytes: int
    disk_bytes: int


class HttpMeasures:
    """What the HTTP service counts, all on its event loop.

    Attributes:
        responses: by status.
        problems: replies that told an error, by its code; also those sent before there was a request.
        connections: taken so far.
        connections_refused: because limits.connections were open.
        streams_dropped: event streams cut off, because their readers took nothing.
        loop_lag: seconds by which a timer of the event loop was late, a few times a second.
    """

    def __init__(self) -> None:
        self.responses: defaultdict[int, int] = defaultdict(int)
        self.problems: defaultdict[str, int] = defaultdict(int)
        self.connections = 0
        self.connections_refused = 0
        self.streams_dropped = 0
        self.loop_lag = Histogram(LATENCY_BOUNDS_S)
