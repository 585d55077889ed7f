"""Whether every event is in the journal once, whole, and can be applied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import msgspec

from holdfast.archive.base import ARCHIVED_OPS
from holdfast.care.checks.run import Seen, Verification, many
from holdfast.care.findings import (
    OPEN,
    SET_ASIDE,
    Finding,
    a_warning,
    an_error,
)
from holdfast.care.history import JOURNAL
from holdfast.clock import parse_ms
from holdfast.core.event import decode_event
from holdfast.core.state import EVENT_OPS
from holdfast.disk.files import Directory
from holdfast.disk.journal import KEPT, SEGMENT_NAME, Damage, read_segment, segment_name


def journal_base(run: Verification) -> int:
    """The event behind which the journal begins; 0 when that cannot be told."""
    with suppress(OSError), Directory(run.path / JOURNAL) as directory:
        return min(_firsts_in(directory), default=1) - 1
    return 0


def look_at_journal(run: Verification) -> Iterator[Finding]:
    """Every event, those kept for readers as well; takes what it says into *run*."""
    engine = run.engine
    durable_seq = 0 if engine is None else engine.status()["durable_seq"]
    present = run.manifests().present
    snapshot_seq = 0 if present is None else present.snapshot_seq
    try:
        with Directory(run.path / JOURNAL) as directory:
            firsts = _firsts_in(directory)
            conversations: dict[str, int] = {}
            kept_findings, first_seq = _look_at_kept(run, conversations)
            findings, last_seq = _segments(run, directory, firsts, snapshot_seq, conversations)
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
    run.seen = Seen(first_seq, max(last_seq, snapshot_seq), snapshot_seq, conversations)
    if last_seq < durable_seq:
        yield an_error(
            "journal", f"event {durable_seq}, which was acknowledged", f"it ends at {last_seq}", "check the disk"
        )
    if not any(finding.severity == "error" for finding in findings):
        count = max(0, last_seq - (snapshot_seq or min(firsts, default=1) - 1))
        yield Finding(
            severity="ok",
            part="journal",
            found=f"{many(count, 'event')} behind the snapshots, to event {run.seen.last_seq}, "
            f"in {many(len(firsts), 'segment')}",
        )


def _segments(
    run: Verification, directory: Directory, firsts: list[int], snapshot_seq: int, conversations: dict[str, int]
) -> tuple[list[Finding], int]:
    """What is wrong with the segments of the journal, and its last event; notes its *conversations*."""
    findings: list[Finding] = []
    expected, last_seq = snapshot_seq + 1, 0
    for first in firsts:
        segment = read_segment(directory, segment_name(first), is_newest=first == firsts[-1])
        findings += map(_damaged, segment.damages)
        if segment.torn is not None and run.engine is None:
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
            findings += _event_problems(run, seq, payload, conversations)
        run.pause()
    # The newest segment is named by the next event even when it is still empty.
    if firsts and firsts[-1] > expected and (expected > 1 or snapshot_seq):
        findings.append(_missing(expected, firsts[-1] - 1))
    return findings, max(last_seq, max(firsts, default=1) - 1)


def _event_problems(run: Verification, seq: int, payload: bytes, conversations: dict[str, int]) -> list[Finding]:
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


def _look_at_kept(run: Verification, conversations: dict[str, int]) -> tuple[list[Finding], int]:
    """Of the segments kept for readers: what is wrong, and the oldest event; notes their *conversations*."""
    findings: list[Finding] = []
    oldest = last = 0
    try:
        kept = Directory(run.path / JOURNAL / KEPT)
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
                if b'"conversation.' in line.payload or b'"message.' in line.payload or b'"escalation.' in line.payload:
                    _event_problems(run, line.seq, line.payload, conversations)
            run.pause()
    return findings, oldest


def _firsts_in(directory: Directory) -> list[int]:
    return sorted(int(match[1]) for name in directory.names() if (match := SEGMENT_NAME.fullmatch(name)))


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
