"""What else there is of a file that is damaged: every backup that has it, each with how much it brings back.

Looked at by a start, before anything is written. A set whose history reaches to where the files stood gives the file as it
was, record by record; one whose history has a gap gives an older state of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any, NamedTuple

import orjson

from holdfast import record
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_salvage import salvage as salvage_archive
from holdfast.care import swap
from holdfast.care.backup_set import BACKUPS, BackupSet, extract, own_sets
from holdfast.care.history import History, HistoryGap
from holdfast.care.mirror import (
    CONVERSATIONS_PLACE,
    file_name,
    is_mirror_file,
    is_same_life,
    living_numbers,
    messages_shown,
)
from holdfast.care.moments import left_at, restored_seqs
from holdfast.care.packing import Seal
from holdfast.care.rewind import SALES, collection_in, journal_of, replay, state_of
from holdfast.care.seal import seal_of
from holdfast.core.collection import Collection
from holdfast.core.conversations import stored_message
from holdfast.core.event import StoredMessage, decode_event
from holdfast.core.rules import Rules, rules_of
from holdfast.core.sales import Sales
from holdfast.core.state import State
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import MANIFEST, read_manifest, salvage
from holdfast.errors import HoldfastError
from holdfast.flush import file_of
from holdfast.load import load_foreign
from holdfast.settings import Settings

NO_LATER_MS = 2**53
"""Bounds no time: that a message is not of the future was seen to when it came."""

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

    def files_until(self, base_seq: int) -> set[str]:
        """The snapshot files into which the events up to *base_seq* have put something that is still there, as far as these
        are still somewhere."""
        state = self._from_events(base_seq)
        return set() if state is None else {file_of(one.name) for one in state.collections.values() if one.count}

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
        if base_seq and (state := self._from_events(base_seq)) is not None:
            if name == SALES:
                yield Candidate("journal", "", len(state.sales.days), False, None, state.sales)
            else:
                yield Candidate("journal", "", state.collection(name).count, False, state.collection(name), None)
        yield from self._copies(file, name)

    def _from_events(self, base_seq: int) -> State | None:
        """What the events alone come to: not all that was there, for files of an old bot are in none of them."""
        state = State(rules_of(self._settings).session_ttl_ms)
        self._bring_on(state, base_seq)
        return state if state.seq else None

    def _state(self, found: BackupSet, name: str, base_seq: int | None) -> tuple[State | None, bool]:
        """The state of the set brought on to *base_seq*, and whether that was possible."""
        assert found.manifest is not None
        wanted = {name}
        is_ours = left_at(self._data_dir, found) is None
        if is_ours and base_seq is not None and base_seq >= found.manifest.snapshot_seq:
            # A backup of what was damaged already has it as it was then, and is no better than what lies here.
            salvaged: set[str] = set()
            with suppress(HoldfastError, OSError):
                state = state_of(
                    found,
                    self._seal,
                    self._settings,
                    up_to_seq=base_seq,
                    history=self.history,
                    collections=wanted,
                    salvaged=salvaged,
                )
                return state, name not in salvaged and (found.proof is None or found.proof.ok)
        with suppress(HoldfastError, OSError):
            state = state_of(found, self._seal, self._settings, collections=wanted)
            if is_ours and base_seq is not None:
                self._bring_on(state, base_seq)
            return state, False
        return None, False

    def _bring_on(self, state: State, base_seq: int) -> None:
        """Apply to *state* what there is of the events up to *base_seq*: each says what a record is from then on, whatever
        was before."""
        position = state.seq
        while position < base_seq:
            try:
                for line in self.history.lines(position, base_seq):
                    replay(state, [line])
                    position = line.seq
            except HistoryGap as gap:
                position = gap.last
            except (HoldfastError, OSError):
                return

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
            if len(found) == sum(last - first + 1 for first, last in gaps):
                break
            if left_at(self._data_dir, backup) is not None:
                continue  # of what was before an older copy was put back, where other events had these numbers
            with suppress(HoldfastError, OSError):
                for line in journal_of(backup, self._seal):
                    if line.seq not in found and any(first <= line.seq <= last for first, last in gaps):
                        found[line.seq] = line.payload
        return found

    def archive(self, place: Directory) -> int | None:
        """Lay the archive of the best set out in *place*; the seq to which it goes, None when there is none."""
        for found in self.sets:
            assert found.manifest is not None
            if ARCHIVE not in found.manifest.files or left_at(self._data_dir, found) is not None:
                continue
            with suppress(HoldfastError, OSError):
                extract(found, [ARCHIVE], place, self._seal)
                return found.manifest.archived_seq
        return None


def kept_messages(settings: Settings, heads: Collection) -> Iterator[tuple[str, list[StoredMessage]]]:
    """The messages that backups, the history and the readable mirror have of the conversations in *heads*: for an archive
    that is made anew.

    Nothing that was removed comes back: neither of another life of the conversation, nor what retention let go. May be
    called at any time from any thread; unpacks an archive in the data directory meanwhile.
    """
    yield from _backed_up_messages(settings, heads)
    # Last, since of a message that several have the first one counts, and a mirror may be edited.
    yield from _mirrored_messages(settings, heads)


def _backed_up_messages(settings: Settings, heads: Collection) -> Iterator[tuple[str, list[StoredMessage]]]:
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


def _mirrored_messages(settings: Settings, heads: Collection) -> Iterator[tuple[str, list[StoredMessage]]]:
    rules = rules_of(settings)
    with ExitStack() as opened:
        try:
            data = opened.enter_context(Directory(settings.data_dir))
            if data.stat(CONVERSATIONS_PLACE) is None:
                return
            place = opened.enter_context(data.subdirectory(CONVERSATIONS_PLACE))
            manifest = read_manifest(data, MANIFEST)
        except (HoldfastError, OSError, ValueError):
            return
        lineage = "" if manifest is None else manifest.lineage
        restored_seq = max(restored_seqs(settings.data_dir), default=0)
        for name in place.names():
            if not name.endswith(".json") or not is_mirror_file(place, name):
                continue
            found: list[StoredMessage] = []
            id = ""
            # Also of one that somebody edited, into whatever.
            with suppress(HoldfastError, OSError, ValueError, TypeError, KeyError, RecursionError):
                content = json.loads(place.read(name))
                id = content["id"]
                line = heads.committed(id)
                # What was written before a state was restored may show what never happened in that.
                is_of_now = content["_holdfast"]["seq"] >= restored_seq
                if line is not None and is_of_now and name == file_name(id, ".json"):
                    born = record.header_of(line).born
                    found = _shown_messages(content, record.value_of(line), born, lineage, rules)
            if found:
                yield id, found


def _shown_messages(content: Any, value: bytes, born: int, lineage: str, rules: Rules) -> list[StoredMessage]:
    """The messages that the *content* of a file of the mirror shows, of those that the conversation *value* has still."""
    if not is_same_life(content, value, born, lineage):
        return []
    head = orjson.loads(value)
    living = living_numbers(value)
    shown = messages_shown(content, rules.zone, head["created_at"])
    if any(number is None for number, _ in shown):
        # A file of before: which ones these are is known only when it shows all of them.
        if len(shown) != len(living) or content.get("updated_at") != head["updated_at"]:
            return []
        shown = [(number, message) for number, (_, message) in zip(living, shown, strict=True)]
    found = []
    for number, message in shown:
        if number is not None and number in living:
            # Those above limits that are lower now are lost alone.
            with suppress(HoldfastError):
                found.append(stored_message(message, number, rules, NO_LATER_MS))
    return found


def _living(heads: Collection, id: str, messages: list[StoredMessage], seq: int) -> list[StoredMessage]:
    """Of *messages*, which the conversation *id* had at *seq*, those that it has still."""
    line = heads.committed(id)
    if line is None or record.header_of(line).born > seq:
        return []
    first = living_numbers(record.value_of(line)).start
    return [message for message in messages if message.number >= first]
