"""What else there is of a file that is damaged: every backup that has it, each with how much it brings back.

Looked at by a start, before anything is written. A set whose history reaches to where the files stood gives the file as it
was, record by record; one whose history has a gap gives an older state of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

import orjson

from holdfast import record
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_salvage import salvage as salvage_archive
from holdfast.care import swap
from holdfast.care.backup_set import BACKUPS, BackupSet, extract, own_sets
from holdfast.care.history import History
from holdfast.care.moments import left_at
from holdfast.care.packing import Seal
from holdfast.care.rewind import SALES, collection_in, journal_of, state_of
from holdfast.care.seal import seal_of
from holdfast.core.collection import Collection
from holdfast.core.event import StoredMessage, decode_event
from holdfast.core.rules import rules_of
from holdfast.core.sales import Sales
from holdfast.core.state import State
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import salvage
from holdfast.errors import HoldfastError
from holdfast.load import load_foreign
from holdfast.settings import Settings

SETS_MAX = 20
"""Backups that are looked into for one file; each is loaded."""


class Candidate(NamedTuple):
    """One way to get the content of a damaged file back.

    Attributes:
        source: ``backup NAME``, ``backup NAME + journal``, or the place of a copy.
        at: when it was made, ISO 8601; empty when that is not known.
        records: how many it brings back; of the sales figures, days.
        is_exact: it is the file as it was, with nothing missing.
        collection, sales: what it brings; one of them.
    """

    source: str
    at: str
    records: int
    is_exact: bool
    collection: Collection | None
    sales: Sales | None


class Backed:
    """The backups of the directory that is being recovered; looked at only when they are asked for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._data_dir = settings.data_dir

    @cached_property
    def _seal(self) -> Seal | None:
        try:
            return seal_of(self._settings)
        except (HoldfastError, OSError):
            return None  # without a key the sets that are not encrypted can be read all the same

    @cached_property
    def history(self) -> History:
        """The events that are still somewhere."""
        return History(self._data_dir, self._seal)

    @cached_property
    def sets(self) -> list[BackupSet]:
        """Ours that can be read, the proved ones first, of each kind the newest first."""
        return sorted(own_sets(self._data_dir), key=lambda found: not found.is_proved)[:SETS_MAX]

    def candidates(self, file: str, base_seq: int | None) -> Iterator[Candidate]:
        """What there is of *file*, which stood at *base_seq* (None when that is not known)."""
        name = collection_in(file)
        if name is None:
            return
        for found in self.sets:
            assert found.manifest is not None
            if file not in found.manifest.files:
                continue
            state, is_exact = self._state(found, name, base_seq)
            if state is None:
                continue
            source = f"backup {found.name}"
            if is_exact and base_seq != found.manifest.seq:
                source += " + journal"
            if name == SALES:
                yield Candidate(source, found.manifest.at, len(state.sales.days), is_exact, None, state.sales)
            else:
                kept = state.collection(name)
                yield Candidate(source, found.manifest.at, kept.count, is_exact, kept, None)
        yield from self._copies(file, name)

    def _state(self, found: BackupSet, name: str, base_seq: int | None) -> tuple[State | None, bool]:
        """The state of the set brought on to *base_seq*, and whether that was possible."""
        assert found.manifest is not None
        wanted = {name}
        is_ours = left_at(self._data_dir, found) is None
        if is_ours and base_seq is not None and base_seq >= found.manifest.snapshot_seq:
            with suppress(HoldfastError, OSError):
                state = state_of(
                    found, self._seal, self._settings, up_to_seq=base_seq, history=self.history, collections=wanted
                )
                return state, True
        with suppress(HoldfastError, OSError):
            return state_of(found, self._seal, self._settings, collections=wanted), False
        return None, False

    def _copies(self, file: str, name: str) -> Iterator[Candidate]:
        """Files as they were before a start left records out."""
        if name == SALES:
            return
        rules = rules_of(self._settings)
        backups = self._data_dir / BACKUPS
        with suppress(OSError):
            for place in sorted(os.listdir(backups), reverse=True):
                if not place.startswith("start-"):
                    continue
                with suppress(OSError), Directory(backups / place) as directory:
                    collection = Collection(name)
                    records = salvage(directory.read(file)).records
                    load_foreign(records, State(rules.session_ttl_ms), collection, rules, 0, bump_versions=True)
                    at = place.removeprefix("start-")
                    yield Candidate(f"{BACKUPS}/{place}", at, collection.count, False, collection, None)

    def events(self, gaps: Sequence[tuple[int, int]]) -> dict[int, bytes]:
        """Of the events in *gaps* those that stand somewhere else than in the journal: in the history or in a set."""
        found: dict[int, bytes] = {}
        for first, last in gaps:
            with suppress(HoldfastError, OSError):
                for line in self.history.lines(first - 1, last):
                    found[line.seq] = line.payload
        for backup in self.sets:
            if all(seq in found for first, last in gaps for seq in range(first, last + 1)):
                break
            with suppress(HoldfastError, OSError):
                for line in journal_of(backup, self._seal):
                    if line.seq not in found and any(first <= line.seq <= last for first, last in gaps):
                        found[line.seq] = line.payload
        return found

    def archive(self, place: Directory) -> int | None:
        """Lay the archive of the best set out in *place*; the seq to which it goes, None when there is none."""
        for found in self.sets:
            assert found.manifest is not None
            if ARCHIVE not in found.manifest.files:
                continue
            with suppress(HoldfastError, OSError):
                extract(found, [ARCHIVE], place, self._seal)
                return found.manifest.archived_seq
        return None


def backed_up_messages(settings: Settings, heads: Collection) -> Iterator[tuple[str, list[StoredMessage]]]:
    """The messages that backups and the history have of the conversations in *heads*: for an archive that is made anew.

    Nothing that was removed comes back: neither of another life of the conversation, nor what retention let go. May be
    called at any time from any thread; unpacks an archive in the data directory meanwhile.
    """
    backed = Backed(settings)
    if not backed.sets:
        return
    with Directory(settings.data_dir) as data:
        swap.discard_scratch(data, swap.ARCHIVE_SCRATCH)
        try:
            with data.subdirectory(swap.ARCHIVE_SCRATCH) as scratch:
                archived_seq = backed.archive(scratch)
                if archived_seq is None:
                    return
                for id, messages in salvage_archive(scratch.path / ARCHIVE):
                    yield id, _living(heads, id, messages, archived_seq)
            yield from _since(backed.history, heads, archived_seq)
        finally:
            swap.discard_scratch(data, swap.ARCHIVE_SCRATCH)


def _since(history: History, heads: Collection, after_seq: int) -> Iterator[tuple[str, list[StoredMessage]]]:
    last_seq = max((part.last_seq for part in history.parts()), default=0)
    with suppress(HoldfastError, OSError):
        for line in history.lines(after_seq, last_seq):
            event = decode_event(line.payload)
            for one in event.events or [] if event.op == "batch" else [event]:
                if one.messages:
                    yield one.id, _living(heads, one.id, one.messages, line.seq)


def _living(heads: Collection, id: str, messages: list[StoredMessage], seq: int) -> list[StoredMessage]:
    """Of *messages*, which the conversation *id* had at *seq*, those that it has still."""
    line = heads.committed(id)
    if line is None or record.header_of(line).born > seq:
        return []
    head = orjson.loads(record.value_of(line))
    # The oldest go first, and numbers have no gaps.
    gone = head["last_number"] - head["message_count"] - head["system_count"]
    return [message for message in messages if message.number > gone]
