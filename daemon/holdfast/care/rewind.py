"""What the state was: read from a backup set, brought on to any later moment by the history."""

from __future__ import annotations

from collections.abc import Collection as SomeOf
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from holdfast.care.backup_set import BackupSet, SetDamaged, content_of, snapshot_manifest
from holdfast.care.history import JOURNAL, History
from holdfast.care.packing import Seal
from holdfast.clock import parse_ms
from holdfast.core.collection import Collection
from holdfast.core.event import decode_event
from holdfast.core.rules import Rules, rules_of
from holdfast.core.sales import decode_sales
from holdfast.core.state import BUILT_IN, EVENT_OPS, RETRIES, State, apply, is_custom_name
from holdfast.disk.files import Directory
from holdfast.disk.journal import JournalLine, decode_line, read_history, seq_of
from holdfast.disk.snapshot import (
    MANIFEST,
    MANIFEST_NEXT,
    ChecksumMismatchError,
    FileEntry,
    blocks_of,
    read_manifest,
    salvage,
)
from holdfast.errors import DataRefused
from holdfast.flush import FILE_OF, SALES_FILE
from holdfast.load import load_blocks, load_foreign, load_trusted
from holdfast.settings import Settings

SALES = "sales"
"""Among the names of collections: the sales figures."""

_COLLECTION_IN = {file: name for name, file in FILE_OF.items()} | {SALES_FILE: SALES}


def collection_in(file: str) -> str | None:
    """The collection that the snapshot *file* holds, ``sales`` for the figures; None when it holds none."""
    name = file.removesuffix(".json")
    return _COLLECTION_IN.get(file) or (name if file != name and is_custom_name(name) else None)


def state_of(
    found: BackupSet,
    seal: Seal | None,
    settings: Settings,
    *,
    up_to_seq: int | None = None,
    history: History | None = None,
    collections: SomeOf[str] | None = None,
    salvaged: set[str] | None = None,
) -> State:
    """The state that the set *found* holds or, with *history*, the one after the event *up_to_seq*.

    Nothing is written. Memory is that of a start; sessions of any age are in it.

    Args:
        seal: opens it when it is encrypted.
        settings: say under which fields ids and times stand.
        up_to_seq: between the snapshots' seq and that of the set, or with *history* any later one.
        collections: only these are asked for (``sales`` for the figures); the others may hold anything.
        salvaged: gets the names of those that are in the set as somebody else left them: edited, of an old bot, or damaged.

    Raises:
        SetDamaged: the set is not what it should be.
        HistoryGap: an event up to *up_to_seq* cannot be read.
        DataRefused: an event that this Holdfast does not know.
    """
    if found.manifest is None:
        raise SetDamaged(f"backup {found.name} cannot be read: {found.damage}")
    manifest = snapshot_manifest(found, seal)
    rules = rules_of(settings)
    state = State(rules.session_ttl_ms)
    for file, stored in found.manifest.files.items():
        name = collection_in(file) if stored.kind == "snapshot" else None
        if name is None or (collections is not None and name not in collections):
            continue
        if name == SALES:
            try:
                state.set_sales(decode_sales(b"".join(content_of(found, file, seal))), 0, undoable=False)
            except (ValueError, msgspec.DecodeError) as error:
                raise SetDamaged(f"backup {found.name}: {file} cannot be read: {error}") from error
        else:
            is_whole = _load(found, file, manifest.files.get(file), seal, state, name, rules, found.manifest.at)
            if salvaged is not None and not is_whole:
                salvaged.add(name)
    state.seq = found.manifest.snapshot_seq
    state.backlog.since = state.backlog.last_seq = state.seq
    target = found.manifest.seq if up_to_seq is None else up_to_seq
    replay(state, _following(state.seq, target, journal_of(found, seal)))
    if history is not None and target > state.seq:
        replay(state, history.lines(state.seq, target))
    if state.seq < target:
        raise SetDamaged(f"backup {found.name} ends with event {state.seq}, expected {target}; take an older backup")
    return state


def present_of(data_dir: Path, settings: Settings) -> State:
    """What a start on the directory *data_dir* would bring back, as far as it can be read; nothing is changed.

    To be compared with, not to be kept: what is damaged is left out without a word.
    """
    rules = rules_of(settings)
    state = State(rules.session_ttl_ms)
    with Directory(data_dir) as directory:
        manifests = []
        for name in (MANIFEST, MANIFEST_NEXT):
            with suppress(ValueError, OSError):
                if (read := read_manifest(directory, name)) is not None:
                    manifests.append(read)
        for file in directory.names():
            name_in = collection_in(file)
            if name_in in (None, RETRIES):
                continue
            with suppress(OSError):
                _load_present(directory, file, [found.files.get(file) for found in manifests], state, name_in, rules)
    state.seq = manifests[0].snapshot_seq if manifests else 0
    with suppress(OSError), Directory(data_dir / JOURNAL) as journal:
        lines = read_history(journal, state.seq).lines
        with suppress(DataRefused):
            replay(state, (line for line in lines if line.seq > state.seq))
    return state


def _load_present(
    directory: Directory,
    file: str,
    entries: list[FileEntry | None],
    state: State,
    name: str,
    rules: Rules,
) -> None:
    if name == SALES:
        with suppress(ValueError, msgspec.DecodeError):
            state.set_sales(decode_sales(directory.read(file)), 0, undoable=False)
        return
    for entry in entries:
        collection = Collection(name)
        with suppress(ChecksumMismatchError, KeyError, TypeError, ValueError, OverflowError, msgspec.DecodeError):
            if entry is not None:
                load_trusted(directory, file, entry, state, collection, rules, lambda size: None)
                state.collection(name).take_over(collection)
                return
    if not any(entries) and name not in BUILT_IN:
        return  # somebody else's file
    collection = Collection(name)
    load_foreign(salvage(directory.read(file)).records, state, collection, rules, 0, bump_versions=False)
    state.collection(name).take_over(collection)


def journal_of(found: BackupSet, seal: Seal | None) -> Iterator[JournalLine]:
    """The events that stand in the set *found*, in order: those between its snapshots and its archive, perhaps more.

    Raises:
        SetDamaged: one of them cannot be read.
    """
    assert found.manifest is not None, "a set that cannot be read has no events"
    last_seq = 0
    for file in sorted(name for name, stored in found.manifest.files.items() if stored.kind == "journal"):
        rest = b""
        for piece in content_of(found, file, seal):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                payload = decode_line(line)
                seq = None if payload is None else seq_of(payload)
                if payload is None or seq is None:
                    raise SetDamaged(f"backup {found.name}: an event in {file} cannot be read; take an older backup")
                if seq > last_seq:
                    yield JournalLine(seq, payload)
                    last_seq = seq


def _following(after_seq: int, up_to_seq: int, lines: Iterable[JournalLine]) -> Iterator[JournalLine]:
    """Of *lines* those behind *after_seq* up to *up_to_seq*, as long as none is missing."""
    for line in lines:
        if line.seq == after_seq + 1 <= up_to_seq:
            after_seq += 1
            yield line


def replay(state: State, lines: Iterable[JournalLine]) -> int:
    """Apply the events in *lines* to *state*, which nobody else uses; when the last one happened, ms since 1970.

    Raises:
        DataRefused: an event that cannot be read, or that this Holdfast does not know.
    """
    text, at_ms = "", 0
    for seq, payload in lines:
        try:
            event = decode_event(payload)
        except (msgspec.DecodeError, ValueError) as error:
            raise DataRefused(f"event {seq} of the history cannot be read: {error}; choose an earlier moment") from None
        unknown = [op for op in [event.op, *(member.op for member in event.events or ())] if op not in EVENT_OPS]
        if unknown:
            raise DataRefused(
                f"event {seq} of the history is a {unknown[0]!r:.80}, which this Holdfast does not know; "
                "install the version that wrote it"
            )
        if event.at != text:
            text, at_ms = event.at, parse_ms(event.at)
        apply(state, event, at_ms, undoable=False)
    return at_ms


def _load(
    found: BackupSet,
    file: str,
    entry: FileEntry | None,
    seal: Seal | None,
    state: State,
    name: str,
    rules: Rules,
    at: str,
) -> bool:
    """Load the content of *file*; whether it is what was flushed."""
    collection, is_whole = Collection(name), True
    try:
        if entry is None:
            raise ChecksumMismatchError(file)
        load_blocks(blocks_of(content_of(found, file, seal), file, entry), state, collection, rules)
    except (ChecksumMismatchError, KeyError, TypeError, ValueError, OverflowError, msgspec.DecodeError):
        # It was backed up as it was: edited by hand, of an old bot, or written when the settings named other fields.
        records = salvage(b"".join(content_of(found, file, seal))).records
        collection, is_whole = Collection(name), False
        load_foreign(records, state, collection, rules, parse_ms(at), bump_versions=False)
    if name == RETRIES:
        lines = map(collection.get, collection)
        state.retries.load((line for line in lines if line is not None), 0)
    else:
        assert name in BUILT_IN or is_custom_name(name)
        state.collection(name).take_over(collection)
    return is_whole
