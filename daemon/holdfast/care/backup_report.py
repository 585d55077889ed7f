"""What is told of backups: of one just made, and of all there are."""

from __future__ import annotations

from typing import Any

from holdfast.care.backup_set import (
    BackupSet,
    Proof,
)
from holdfast.care.set_parts import Made
from holdfast.clock import Clock, format_ms
from holdfast.ops import BackupInfo, BackupReport


def log_completed(log: Any, made: Made, reason: str, duration_s: float) -> None:
    """Tell the *log* of a set that was just written."""
    manifest = made.found.manifest
    assert manifest is not None, "a set was written that cannot be read"
    log.info(
        "backup.completed",
        backup=made.found.name,
        reason=reason,
        seq=manifest.seq,
        bytes=made.found.stored_bytes,
        new_bytes=made.new_bytes,
        notes=made.notes,
        duration_ms=round(duration_s * 1000, 1),
    )


def report_of(made: Made, reason: str, proof: Proof | None, problem: str, clock: Clock, started: float) -> BackupReport:
    """What the call that made the set is answered; *problem* says why it was not proved, or what was wrong."""
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
