"""Whether manifest, snapshot files and sales figures are as the last flush left them, and every record can be read."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec

from holdfast.care.checks.journal import journal_base
from holdfast.care.checks.run import PAUSE_RECORDS, Manifests, Verification, many
from holdfast.care.findings import (
    OPEN,
    Finding,
    a_warning,
    an_error,
    readable_size,
)
from holdfast.checksum import crc32
from holdfast.core.sales import decode_sales
from holdfast.core.state import BUILT_IN, CONVERSATIONS, is_custom_name
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    ChecksumMismatchError,
    FileEntry,
    read_blocks,
    read_manifest,
    salvage,
)
from holdfast.flush import SALES_FILE, file_of
from holdfast.load import checked_id


def look_at_manifest(run: Verification) -> Iterator[Finding]:
    """The table of contents."""
    try:
        present = read_manifest(run.directory, MANIFEST)
    except (ValueError, OSError) as error:
        yield an_error(
            "manifest",
            "a manifest whose checksum holds",
            f"{MANIFEST}: {getattr(error, 'strerror', None) or error}",
            "the next start uses the files and the whole journal without it; then verify again",
            mend=OPEN,
        )
        return
    flushed_seq = journal_base(run)
    if present is None and flushed_seq:
        yield a_warning(
            "manifest",
            f"the manifest of a flush up to event {flushed_seq}, behind which the journal begins",
            f"{MANIFEST} is missing",
            "start: the files are used without it, and what is missing of them comes from the backups",
            mend=OPEN,
        )
    elif present is None:
        yield Finding(severity="notice", part="manifest", found="there is none yet: nothing was flushed so far")
    else:
        yield Finding(
            severity="ok",
            part="manifest",
            found=f"format {present.format}, by Holdfast {present.holdfast}, flushed {present.at} at event "
            f"{present.snapshot_seq}, {len(present.files)} files",
        )
    if run.engine is None and run.directory.stat(MANIFEST_NEXT) is not None:
        yield Finding(
            severity="notice",
            part="manifest",
            found="a flush was interrupted; the next start completes it",
            mend=OPEN,
        )


def look_at_snapshots(run: Verification) -> Iterator[Finding]:
    """Every file and every record of it; takes the conversations' heads into *run*."""
    manifests = run.manifests()
    names = {file_of(name): name for name in BUILT_IN}
    known = {name for one in manifests if one is not None for name in one.files}
    names |= {file: file.removesuffix(".json") for file in known if is_custom_name(file.removesuffix(".json"))}
    run.heads = {}
    records = size = 0
    problems: list[Finding] = []
    for file, collection in sorted(names.items()):
        run.progress(f"looking at {file}")
        problem = _snapshot_problem(run, file, collection, manifests)
        if problem is not None:
            problems.append(problem)
        elif entries := manifests.entries(file):
            records += entries[-1].records
            size += entries[-1].bytes
    problems += _sales_problems(run, manifests)
    yield from problems
    if not problems:
        yield Finding(
            severity="ok",
            part="snapshots",
            found=f"{many(records, 'record')} in {readable_size(size)}, every one can be read",
        )


def _snapshot_problem(run: Verification, file: str, collection: str, manifests: Manifests) -> Finding | None:
    entries = manifests.entries(file)
    found = run.directory.stat(file)
    if found is None:
        if any(entry.records for entry in entries):
            return an_error(
                "snapshots",
                f"{entries[0].records} records",
                f"{file} is missing",
                "restore it from a backup",
                mend=OPEN,
            )
        return None
    for entry in entries:
        try:
            return _record_problem(run, file, collection, entry)
        except ChecksumMismatchError:
            continue
        except OSError as error:
            return an_error(
                "snapshots", "a file that can be read", f"{file}: {error.strerror}", "check the disk, or restore it"
            )
    return _changed_file(run, file, entries, found)


def _changed_file(run: Verification, file: str, entries: list[FileEntry], found: os.stat_result) -> Finding:
    """What is wrong with a file that is not as we left it."""
    try:
        content = salvage(run.directory.read(file))
    except OSError as error:
        return an_error(
            "snapshots",
            "a regular file",
            f"{file} cannot be read: {error.strerror}",
            "move it away, or restore it",
            mend=OPEN,
        )
    if not content.is_whole:
        return an_error(
            "snapshots",
            "one JSON array of records",
            f"{file} is damaged: {content.reason}; {len(content.records)} whole records",
            "restore it from a backup, or start: what is whole is saved, what is not goes to quarantine/",
            mend=OPEN,
        )
    if entries and found.st_mtime_ns in [entry.mtime_ns for entry in entries]:
        return an_error(
            "snapshots",
            "the content that was written",
            f"{file} changed on the disk without being written",
            "check the disk, and restore the file from a backup",
            mend=OPEN,
        )
    if not entries:
        return Finding(
            severity="notice",
            part="snapshots",
            found=f"{file} is no file of ours yet: {len(content.records)} records, read at the next start",
        )
    return Finding(
        severity="warning" if run.engine is not None else "notice",
        part="snapshots",
        expected="the file as it was flushed",
        found=f"{file} was edited by hand: {len(content.records)} records",
        action="nothing: the next start takes it as it is"
        if run.engine is None
        else "stop, edit, start; what was edited while we run is kept in backups/ at the next flush",
    )


def _record_problem(run: Verification, file: str, collection: str, entry: FileEntry) -> Finding | None:
    """Look at every record of a file of ours; raises as ``read_blocks``."""
    ids: set[str] = set()
    bad: list[str] = []
    count = 0
    for block in read_blocks(run.directory, file, entry):
        for line in block.split(b",\n"):
            count += 1
            if count % PAUSE_RECORDS == 0:
                run.pause()
            try:
                id = checked_id(collection, line, run.rules)
            except (KeyError, TypeError, ValueError, OverflowError, msgspec.DecodeError) as error:
                bad.append(f"record {count} ({type(error).__name__}: {error!s:.100})")
                continue
            if id in ids:
                bad.append(f"record {count} has an id that stands there already")
            ids.add(id)
            if collection == CONVERSATIONS:
                run.heads[id] = line
    if bad:
        return an_error(
            "snapshots",
            "records that these settings can read, each id once",
            f"{file}: {len(bad)} of {count} cannot be used, the first is {bad[0]}",
            "check sessions.id_field, sessions.time_field and orders.id_field in the settings, or restore the file",
        )
    if count != entry.records:
        return an_error("snapshots", f"{entry.records} records", f"{file} has {count}", "restore it from a backup")
    return None


def _sales_problems(run: Verification, manifests: Manifests) -> list[Finding]:
    entries = manifests.entries(SALES_FILE)
    found = run.directory.stat(SALES_FILE)
    if found is None:
        lost = an_error("snapshots", "sales figures", f"{SALES_FILE} is missing", "restore it from a backup", mend=OPEN)
        return [lost] if entries else []
    try:
        raw = run.directory.read(SALES_FILE)
        decode_sales(raw.removeprefix(b"\xef\xbb\xbf"))
    except (OSError, ValueError, msgspec.DecodeError) as error:
        return [
            an_error(
                "snapshots",
                "sales figures",
                f"{SALES_FILE} cannot be read: {error}",
                "restore it from a backup",
                mend=OPEN,
            )
        ]
    if entries and f"{crc32(raw):08x}" not in [entry.crc32 for entry in entries]:
        if found.st_mtime_ns in [entry.mtime_ns for entry in entries]:
            return [
                an_error(
                    "snapshots",
                    "the content that was written",
                    f"{SALES_FILE} changed on the disk without being written",
                    "check the disk, and restore the file from a backup",
                    mend=OPEN,
                )
            ]
        return [Finding(severity="notice", part="snapshots", found=f"{SALES_FILE} was edited by hand")]
    return []
