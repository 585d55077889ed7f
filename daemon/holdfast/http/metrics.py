"""What is counted, under the names and in the forms that Prometheus knows.

Imported at the first scrape: the library takes a tenth of a second, and many are never scraped.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector, CollectorRegistry

from holdfast import __version__
from holdfast.care.copies import Copies, CopyState
from holdfast.care.space import PARTS, SpaceWatch, Usage
from holdfast.core.state import is_custom_name
from holdfast.engine import Engine
from holdfast.measures import BackupFigures, EngineMeasures, Gauges, Histogram, HttpMeasures
from holdfast.ops import AnyOp

COLLECTIONS_MAX = 100
"""Custom collections that are counted by name, since clients name them; the first that came into being. The others
are counted together."""

FOLLOWERS_MAX = 20
"""Kinds of followers that are told apart."""

PAUSE_S = 0.00005
"""After each metric; with it the event loop waits a tenth of a millisecond for a scrape, not three."""

OTHER = "(other)"
"""No collection may have this name."""

_OPENMETRICS = "application/openmetrics-text"
_KIND = re.compile(r"[a-z_]*")


class Source(Protocol):
    """What a scrape asks of the HTTP service, beside its engine."""

    measures: HttpMeasures

    @property
    def open_connections(self) -> int:
        """How many there are."""

    @property
    def connections_max(self) -> int:
        """How many there may be."""

    @property
    def open_streams(self) -> int:
        """How many of those that are open are event streams."""


class Exposition:
    """All metrics of one daemon; a scrape may come from any thread, and takes no lock that an op waits for."""

    def __init__(self, engine: Engine, source: Source, lines_dropped: Callable[[], int]) -> None:
        """*lines_dropped*: log lines that could not be written, so far."""
        # Not the registry of the library, in which other code of the process may put what it likes.
        self._registry = CollectorRegistry()
        self._registry.register(_HoldfastCollector(engine, source, lines_dropped))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def rendered(self, accept: str) -> tuple[bytes, str]:
        """Body and content type: OpenMetrics when *accept*, the header, names it, else the older text.

        Raises:
            OSError, Unavailable: as ``Engine.gauges``.
        """
        # Not the header itself: the library raises on an odd version, and sends back what it finds.
        encode, content_type = choose_encoder(f"{_OPENMETRICS}; version=1.0.0" if _OPENMETRICS in accept else "")
        return encode(self._registry), content_type


class _HoldfastCollector(Collector):
    def __init__(self, engine: Engine, source: Source, lines_dropped: Callable[[], int]) -> None:
        self._engine = engine
        self._source = source
        self._lines_dropped = lines_dropped
        self._started = time.time() - engine.uptime_s

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are ours alone, and the library would scrape to learn them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric, as of now."""
        for metric in self._metrics():
            yield metric
            # Else the event loop, in another thread, would wait for the interpreter until the scrape is over.
            time.sleep(PAUSE_S)

    def _metrics(self) -> Iterator[Metric]:
        gauges = self._engine.gauges()
        yield InfoMetricFamily("holdfast_build", "The version that runs.", value={"version": __version__})
        yield _gauge("start_time_seconds", "When the engine was opened, seconds since 1970.", self._started)
        yield from _op_metrics(self._engine.measures)
        yield from _journal_metrics(gauges)
        yield from _flush_metrics(gauges, self._engine.measures)
        yield from _record_metrics(gauges, self._engine.measures)
        yield from _follower_metrics(gauges)
        yield from _health_metrics(gauges)
        yield from _space_metrics(self._engine.space)
        yield from _backup_metrics(self._engine.backups.figures(), self._engine.settings.backups.every)
        yield from _copy_metrics(self._engine.copies)
        yield from _verify_metrics(self._engine.measures)
        yield from _http_metrics(self._source)
        yield _counter(
            "log_lines_dropped_total",
            "Log lines that could not be written, because the reader of stdout was too slow or gone.",
            self._lines_dropped(),
        )


# One group each, in the order in which they are shown.


def _op_metrics(measures: EngineMeasures) -> Iterator[Metric]:
    ops = measures.ops
    family = _counters(
        "ops_total",
        "Ops by kind, and how they ended: ok when they are as durable as was asked for, else the code of the refusal. Of "
        "an atomic batch that is refused only the op at fault counts.",
        "op",
        "result",
    )
    done = dict.fromkeys(get_args(AnyOp), 0) | ops.done
    for kind, count in done.items():
        family.add_metric([_op_name(kind), "ok"], count)
    for (kind, code), count in ops.refused.copy().items():
        family.add_metric([_op_name(kind), code], count)
    yield family
    yield _histogram(
        "durable_latency_seconds",
        "From the decision of an op until it was as durable as was asked for (always: synced; everysec: written), by "
        "event. Measured from the first op of each group commit, so that the true figures are this or less. Without "
        "those acknowledged under interval.",
        measures.durable_latency,
    )
    yield _histogram("commit_events", "Events that went to the journal in one write.", measures.commit_events)
    yield _histogram("commit_bytes", "Bytes that went to the journal in one write.", measures.commit_bytes)
    yield _histogram("journal_sync_seconds", "What each sync (fsync) of the journal took.", measures.sync)


def _journal_metrics(gauges: Gauges) -> Iterator[Metric]:
    yield _gauge("decided_seq", "The last event that was decided.", gauges.decided_seq)
    yield _gauge("durable_seq", "The last event that is on stable storage.", gauges.durable_seq)
    yield _gauge("snapshot_seq", "The last event that the snapshot files hold.", gauges.snapshot_seq)
    yield _gauge("archived_seq", "The archive has every event about conversations up to here.", gauges.archived_seq)
    yield _gauge("journal_bytes", "Size of the journal, all segments together.", gauges.journal_bytes)
    yield _gauge(
        "journal_max_bytes", "The setting journal_max: a larger journal is flushed at once.", gauges.journal_bytes_max
    )
    yield _gauge("journal_segments", "Files of the journal.", gauges.journal_segments)
    yield _gauge(
        "journal_kept_bytes", "Size of the segments kept for event streams that resume.", gauges.journal_kept_bytes
    )
    yield _gauge(
        "journal_deferred_bytes",
        "Acknowledged under interval and not yet in the journal: lost with the process.",
        gauges.deferred_bytes,
    )
    yield _gauge(
        "unflushed_age_seconds",
        "Age of the oldest event that no snapshot holds; 0 when there is none. Events that were replayed count from the "
        "start.",
        gauges.unflushed_age_s,
    )


def _flush_metrics(gauges: Gauges, measures: EngineMeasures) -> Iterator[Metric]:
    yield _histogram("flush_seconds", "What each flush took that succeeded.", measures.flush)
    family = _counters("flushes_total", "Flushes by reason and result, ok or failed.", "reason", "result")
    for (reason, is_ok), count in measures.flushes.copy().items():
        family.add_metric([reason, "ok" if is_ok else "failed"], count)
    yield family
    yield _counter("flushed_bytes_total", "Written to snapshot files by flushes.", measures.flushed_bytes)
    yield _gauge(
        "last_flush_timestamp_seconds",
        "When the last flush that succeeded ended, seconds since 1970, also of an earlier process; the start of this one "
        "when there was none.",
        gauges.flushed_ms / 1000,
    )
    yield _gauge(
        "last_flush_succeeded", "0 when the last flush of this process failed, else 1.", not gauges.has_flush_failed
    )
    yield _gauge("flush_interval_seconds", "The setting flush_every.", gauges.flush_every_s)
    yield _gauge("snapshot_bytes", "Size of all snapshot files.", gauges.snapshot_bytes)


def _record_metrics(gauges: Gauges, measures: EngineMeasures) -> Iterator[Metric]:
    family = _gauges(
        "records",
        f"Records by collection; of orders the pending ones. Custom collections after the first {COLLECTIONS_MAX} are "
        f"counted together as {OTHER}.",
        "collection",
    )
    for collection, count in _bounded(gauges.records, COLLECTIONS_MAX, is_free=is_custom_name):
        family.add_metric([collection], count)
    yield family
    yield _gauge("leases", "Sessions under a lease, or lately so.", gauges.leases)
    yield _gauge("idempotency_keys", "Answers remembered by idempotency key.", gauges.idempotency_keys)
    yield _counter(
        "sessions_expired_total", "Sessions that were idle for longer than their ttl.", measures.sessions_expired
    )


def _follower_metrics(gauges: Gauges) -> Iterator[Metric]:
    lags: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name, lag in gauges.follower_lag.items():
        # What comes after the kind tells apart those that come and go, and would make a series each.
        found = _KIND.match(name)
        kind = (found and found[0].strip("_")) or OTHER
        if kind not in counts and len(counts) >= FOLLOWERS_MAX:
            kind = OTHER
        lags[kind] = max(lag, lags.get(kind, 0))
        counts[kind] = counts.get(kind, 0) + 1
    lag_family = _gauges(
        "follower_lag_events",
        "Durable events that a follower of this kind has still to take, the slowest one.",
        "follower",
    )
    count_family = _gauges("followers", "Who follows the journal, by kind.", "follower")
    for kind, lag in lags.items():
        lag_family.add_metric([kind], lag)
        count_family.add_metric([kind], counts[kind])
    yield lag_family
    yield count_family


def _health_metrics(gauges: Gauges) -> Iterator[Metric]:
    family = _gauges(
        "degraded",
        "1 for each reason why the data is not all it should be: disk_full (writes are refused), flush_failed, "
        "archive_stalled (conversations cannot be written to archive.db), damage (found at the start; the evidence is in quarantine/). /readyz has the words.",
        "reason",
    )
    family.add_metric(["disk_full"], gauges.is_disk_full)
    family.add_metric(["flush_failed"], gauges.has_flush_failed)
    family.add_metric(["archive_stalled"], gauges.is_archive_stalled)
    family.add_metric(["damage"], gauges.is_damaged)
    yield family
    yield _gauge(
        "disk_free_bytes",
        "Room on the file system of the data directory, for users other than root.",
        gauges.disk_free_bytes,
    )
    yield _gauge("disk_size_bytes", "Size of the file system of the data directory.", gauges.disk_bytes)


def _verify_metrics(measures: EngineMeasures) -> Iterator[Metric]:
    yield _gauge(
        "verified_time_seconds",
        "When the data directory was looked through last, by this process, seconds since 1970; 0 when it was not.",
        measures.verified_at or 0,
    )
    family = _gauges("verify_findings", "What that found, by severity; error and warning are problems.", "severity")
    for severity in ("notice", "warning", "error"):
        family.add_metric([severity], measures.verify_findings.get(severity, 0))
    yield family


def _space_metrics(watch: SpaceWatch) -> Iterator[Metric]:
    space = watch.space
    yield _gauge(
        "disk_free_files",
        "Files that can still be made on that file system; +Inf where it has no limit.",
        math.inf if space.free_files is None else space.free_files,
    )
    yield _gauge(
        "disk_growth_bytes_per_second",
        "By how much more of that file system is taken, by whomever, at the rate of the last hours; NaN until that is known.",
        math.nan if space.grows_bytes_h is None else space.grows_bytes_h / 3600,
    )
    yield _gauge(
        "disk_full_in_seconds",
        "Until that file system is full at this rate; +Inf when it does not grow, or that is not known yet.",
        math.inf if space.hours_left is None else space.hours_left * 3600,
    )
    taken = _gauges(
        "part_bytes", "What each part of the data directory takes of the disk, looked at every few minutes.", "part"
    )
    files = _gauges("part_files", "How many files each part has.", "part")
    for name, usage in (watch.parts or dict.fromkeys(PARTS, Usage())).items():
        taken.add_metric([name], usage.bytes)
        files.add_metric([name], usage.files)
    yield taken
    yield files


def _backup_metrics(figures: BackupFigures, every_s: float) -> Iterator[Metric]:
    yield _gauge(
        "last_backup_timestamp_seconds",
        "When the newest backup was taken, also by an earlier process, seconds since 1970; 0 when there is none.",
        figures.taken_ms / 1000,
    )
    yield _gauge("backup_interval_seconds", "The setting backups.every.", every_s)
    yield _gauge("last_backup_succeeded", "0 when the last backup of this process failed, else 1.", figures.is_last_ok)
    yield _gauge(
        "last_backup_seconds", "What the last backup of this process took, with its proof.", figures.duration_s
    )
    yield _gauge(
        "last_backup_proof_timestamp_seconds",
        "When loading everything from the newest backup was tried last, seconds since 1970; 0 when it was not.",
        figures.proved_ms / 1000,
    )
    yield _gauge(
        "last_backup_proved",
        "0 when not everything could be loaded from the newest backup, else 1.",
        figures.is_proof_ok,
    )
    yield _counter("backup_failures_total", "Backups of this process that failed.", figures.failures)
    yield _gauge("backups", "How many backups there are.", figures.sets)
    yield _gauge("backup_bytes", "What they take, files that several of them share counted once.", figures.bytes)
    yield _gauge(
        "history_bytes",
        "Size of the packed journal behind the backups, from which any moment is restored.",
        figures.history_bytes,
    )
    yield _gauge("history_kept", "0 when it was given up for want of room, else 1.", figures.is_history_kept)


def _copy_metrics(copies: Copies | None) -> Iterator[Metric]:
    state = CopyState() if copies is None else copies.state
    yield _gauge(
        "backup_copy_timestamp_seconds",
        "When the newest backup was made that stands at the second place, seconds since 1970; 0 when there is none.",
        state.newest_ms / 1000,
    )
    yield _gauge("backup_copies", "Backups at the second place.", state.sets)
    yield _counter("backup_copied_total", "Backups that were brought to the second place.", state.copied)
    yield _counter("backup_copy_failures_total", "Tries to do so that failed.", state.failures)
    yield _gauge("backup_copy_succeeded", "0 when the last try failed, else 1.", not state.failure)


def _http_metrics(source: Source) -> Iterator[Metric]:
    measures = source.measures
    responses = _counters("http_responses_total", "Requests that were answered, by status.", "status")
    for status, count in measures.responses.copy().items():
        responses.add_metric([str(status)], count)
    yield responses
    problems = _counters(
        "http_problems_total",
        "Answers that told an error, by its code: unauthorized, forbidden and too_many_requests are requests refused at "
        "the door.",
        "code",
    )
    for code, count in measures.problems.copy().items():
        problems.add_metric([code], count)
    yield problems
    yield _gauge("http_connections", "Open connections, streams among them.", source.open_connections)
    yield _gauge(
        "http_connections_max",
        "How many may be open: limits.connections, or fewer by RLIMIT_NOFILE.",
        source.connections_max,
    )
    yield _counter("http_connections_accepted_total", "Connections that were taken.", measures.connections)
    yield _counter(
        "http_connections_refused_total",
        "Connections that were turned away, because too many were open.",
        measures.connections_refused,
    )
    yield _gauge("http_streams", "Open event streams.", source.open_streams)
    yield _counter(
        "http_streams_dropped_total",
        "Event streams that were cut off, because their readers took nothing.",
        measures.streams_dropped,
    )
    yield _histogram(
        "event_loop_lag_seconds",
        "By how much a timer of the event loop was late, a few times a second; what every request waits.",
        measures.loop_lag,
    )


# How a family is made.


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(f"holdfast_{name}", about, value=value)


def _gauges(name: str, about: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"holdfast_{name}", about, labels=labels)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(f"holdfast_{name}", about, value=value)


def _counters(name: str, about: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"holdfast_{name}", about, labels=labels)


def _histogram(name: str, about: str, histogram: Histogram) -> Metric:
    # One look: the sum may be that of a moment later, the counts fit each other.
    totals = itertools.accumulate(histogram.counts)
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return HistogramMetricFamily(
        f"holdfast_{name}", about, buckets=list(zip(bounds, totals, strict=True)), sum_value=histogram.sum
    )


def _bounded(counts: Mapping[str, int], names_max: int, *, is_free: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """*counts*, of whose freely chosen names only the first *names_max* are shown, and the others summed."""
    shown = others = 0
    for name, count in counts.items():
        if is_free(name):
            shown += 1
            if shown > names_max:
                others += count
                continue
        yield name, count
    if shown > names_max:
        yield OTHER, others


def _op_name(kind: type) -> str:
    name: str = kind.__struct_config__.tag  # type: ignore[attr-defined]  # msgspec's own
    return name
