"""What a verification finds, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

Severity = Literal["ok", "notice", "warning", "error"]
"""What ``error`` says is data lost or at risk; a ``warning`` needs somebody's hand; a ``notice`` is good to know."""

TOLD_MAX = 20
"""Findings of one kind in one part; more are counted."""


CHMOD = "takes away the rights of others"
OPEN = "opens it, which recovers what can be recovered and keeps the evidence, and flushes"
ANEW = "makes the archive anew, of memory, of what can be read of it, and of the journal"
SET_ASIDE = "moves it to quarantine/"
REMOVE = "removes it"
"""What ``holdfast mend`` does about a finding."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at.

    Attributes:
        part: of the directory: directory, space, manifest, snapshots, journal, archive, history, backups, quarantine,
            files.
        expected: what should be so; of what is right, empty.
        found: what is so.
        action: what to do; empty where there is nothing to be done.
        mend: what ``holdfast mend`` does about it; empty when it does nothing.
        path: of the file that it is about, within the directory, where mending needs to know it.
    """

    severity: Severity
    part: str
    found: str
    expected: str = ""
    action: str = ""
    mend: str = ""
    path: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a verification found.

    Attributes:
        at: when it began, ISO 8601.
        is_running: whether the directory was in use.
        is_deep: whether the backups were proved.
        findings: in the order of the parts; at least one of each.
    """

    at: str
    data_dir: str
    is_running: bool
    is_deep: bool
    duration_ms: float
    findings: list[Finding]

    @property
    def wrong(self) -> list[Finding]:
        """The warnings and errors."""
        return [finding for finding in self.findings if finding.severity in ("warning", "error")]


def an_error(part: str, expected: str, found: str, action: str, mend: str = "", path: str = "") -> Finding:
    """A finding that is an error."""
    return Finding(severity="error", part=part, expected=expected, found=found, action=action, mend=mend, path=path)


def a_warning(part: str, expected: str, found: str, action: str, mend: str = "", path: str = "") -> Finding:
    """A finding that is a warning."""
    return Finding(severity="warning", part=part, expected=expected, found=found, action=action, mend=mend, path=path)


def bounded(findings: Iterable[Finding]) -> list[Finding]:
    """*findings* without those beyond TOLD_MAX of a severity, which are counted in one more."""
    kept: list[Finding] = []
    counts: dict[tuple[str, str], int] = {}
    for finding in findings:
        key = (finding.part, finding.severity)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= TOLD_MAX:
            kept.append(finding)
    for (part, severity), count in counts.items():
        if count > TOLD_MAX:
            kept.append(
                msgspec.structs.replace(
                    next(one for one in kept if (one.part, one.severity) == (part, severity)),
                    found=f"and {count - TOLD_MAX} more of this kind",
                )
            )
    return kept


def readable_size(size: int) -> str:
    """*size* bytes, for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 10_000:
            return f"{size} {unit}"
        size >>= 10
    return f"{size} TiB"
