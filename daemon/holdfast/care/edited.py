"""A snapshot file that somebody edits while we run: what he changed is taken over, and what he wrote is kept.

The version in the last key of each line tells what the editor had before him. A record that still has that version counts as
he left it, whatever its time says: nobody else changed it. One that was changed here meanwhile goes by the rules of a merge: the
newer counts, on a tie the one that is here. A record that is missing in the file is not deleted, since nobody can tell a deleted
line from a lost one; it is written again with the next flush. ``holdfast sessions rm`` deletes.

A flush that comes before the edit is over replaces the file; what it replaces is kept, and taken over from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any

import msgspec
import orjson

from holdfast import record
from holdfast.care.export import time_of
from holdfast.care.given import Part, Unfinished, Wrong, opener_in, records_of
from holdfast.care.merge import BREATH_EVERY, BREATH_S, RETRY_S, MergeCounts, is_same, op_of
from holdfast.checksum import crc32
from holdfast.core.sales import decode_sales, encode_sales
from holdfast.core.state import COMPLETED_ORDERS, ORDERS, SESSIONS, USERS
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import FileEntry
from holdfast.errors import HoldfastError, InvalidRecord, JournalBroken, StorageFull, Unavailable, VersionMismatch
from holdfast.flush import FILE_OF, SALES_FILE, KeptEdit
from holdfast.load import id_field_of
from holdfast.ops import StatsTake

if TYPE_CHECKING:
    from holdfast.engine import Engine, Ticket

SETTLE_S = 1.0
"""An edit is over when the file has not changed for this long; editors write in place, in several steps."""

PATIENCE_S = 30.0
"""So long a file that is no JSON may still be in the writing; then it is replaced, and kept as it is."""

IN_FLIGHT_MAX = 500

TRIES = 5
"""How often an edited record is looked at that somebody else is changing."""

_MERGED = (SESSIONS, ORDERS, COMPLETED_ORDERS, USERS)


class EditedFiles:
    """Looks after the snapshot files of one engine; for one thread at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._log = engine.log
        # How an edited file was when it was looked at, and since when it has been so.
        self._seen: dict[str, tuple[tuple[int, int] | None, float]] = {}
        # How it was when it was taken over, and the edits that a flush came before.
        self._merged: dict[str, tuple[int, int] | None] = {}
        self._kept: list[KeptEdit] = []

    def look(self) -> int:
        """Take over the edits that are over; how many files.

        Raises:
            StorageFull, Unavailable, OSError: not now; what was edited stays as it is, and is looked at again.
        """
        edited = self._engine.edited_files()
        self._kept += self._engine.take_kept_edits()
        known = {*edited, *(str(kept.place / kept.name) for kept in self._kept)}
        self._seen = {place: seen for place, seen in self._seen.items() if place in known}
        kept_before = len(self._kept)
        self._kept = [kept for kept in self._kept if not self._take_kept(kept)]
        taken = []
        if edited:
            with Directory(self._engine.settings.data_dir) as directory:
                for name in edited:
                    if self._is_over(directory, name, name) and self._take(directory, name, name):
                        taken.append(name)
                        self._merged[name] = self._seen[name][0]
        if taken:
            self._engine.rewrite(taken)
            self._engine.flush("api")
        return len(taken) + kept_before - len(self._kept)

    def _take_kept(self, kept: KeptEdit) -> bool:
        """Take over an edit that a flush came before; whether that is done."""
        try:
            with Directory(kept.place) as directory:
                # Whoever began to write before the flush may still be at it.
                if _signature(directory, kept.name) == self._merged.get(kept.name, ()):
                    return True
                place = str(kept.place / kept.name)
                return self._is_over(directory, kept.name, place) and self._take(
                    directory, kept.name, place, kept.entry
                )
        except FileNotFoundError:
            return True  # somebody tidied up

    def _is_over(self, directory: Directory, name: str, place: str) -> bool:
        signature = _signature(directory, name)
        now = self._engine.monotonic()
        seen = self._seen.get(place)
        if seen is None or seen[0] != signature:
            self._seen[place] = signature, now
            return False
        return now - seen[1] >= SETTLE_S

    def _take(self, directory: Directory, name: str, place: str, entry: FileEntry | None = None) -> bool:
        """Take over the edit of *name*, which was what *entry* says; whether that is done."""
        if directory.stat(name) is None:
            self._log.warning("snapshot.removed", file=name)
            return True
        if entry is None:
            entry = self._engine.hold_snapshots(lambda manifest, _: manifest.files.get(name))
        try:
            counts, missing, reason = self._merge(directory, name, entry)
        except Unfinished as error:
            if self._engine.monotonic() - self._seen[place][1] < PATIENCE_S:
                return False
            counts, missing, reason = MergeCounts(refused=1), 0, str(error)
        except InvalidRecord as error:
            counts, missing, reason = MergeCounts(refused=1), 0, str(error)
        self._log.warning(
            "snapshot.edit_merged",
            file=name,
            added=counts.added,
            newer=counts.newer,
            older=counts.older,
            refused=counts.refused + counts.conflicting,
            missing=missing,
            reason=reason,
        )
        return True

    def _merge(self, directory: Directory, name: str, entry: FileEntry | None) -> tuple[MergeCounts, int, str]:
        """What became of the records in *name*, how many of ours are missing in it, and why the first was refused."""
        opener = opener_in(directory, name)
        if name == SALES_FILE:
            return self._merge_sales(opener, entry)
        kind = next((kind for kind, file in FILE_OF.items() if file == name), name.removesuffix(".json"))
        if name in FILE_OF.values() and kind not in _MERGED:
            return MergeCounts(refused=1), 0, "it is book-keeping of ours, which is not edited while we run"
        counts, known, reason = MergeCounts(), 0, ""
        tickets: list[Ticket] = []
        for number, found in enumerate(records_of(Part(name, kind, opener)), 1):
            if number % BREATH_EVERY == 0:
                time.sleep(BREATH_S)
            if isinstance(found, Wrong):
                outcome, why = "refused", found.reason
            else:
                known += record.HEADER_KEY in found
                outcome, why = self._take_guarded(kind, found, tickets)
            setattr(counts, outcome, getattr(counts, outcome) + 1)
            reason = reason or (f"record {number}: {why}" if why else "")
            if len(tickets) >= IN_FLIGHT_MAX:
                _settle(tickets)
        _settle(tickets)
        return counts, max(0, (entry.records if entry else 0) - known), reason

    def _take_guarded(self, kind: str, value: dict[str, Any], tickets: list[Ticket]) -> tuple[str, str]:
        """As ``_take_record``, again when somebody changes the same record meanwhile."""
        for _ in range(TRIES):
            try:
                return self._take_record(kind, dict(value), tickets)
            except VersionMismatch:
                time.sleep(RETRY_S)
        return "conflicting", "somebody changes it all the while; edit it again"

    def _take_record(self, kind: str, value: dict[str, Any], tickets: list[Ticket]) -> tuple[str, str]:
        """What became of the edited record *value*, and why it was refused."""
        engine, rules = self._engine, self._engine.rules
        collection = ORDERS if kind == COMPLETED_ORDERS else kind
        raw_header = value.pop(record.HEADER_KEY, None)
        try:
            header = record.Header() if raw_header is None else msgspec.convert(raw_header, record.Header)
            given = value.get(id_field_of(collection, rules))
            if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
                raise InvalidRecord(f"expected a record with its {id_field_of(collection, rules)}, found {given!r:.80}")
            id = str(given)
            present = engine.line(collection, id)
            if present is None:
                if raw_header is not None:
                    # It was removed here since the file was written.
                    return "older", ""
                version, outcome = 0, "added"
            else:
                version, outcome = record.version_of(present)[0], "newer"
                there = orjson.loads(record.value_of(present))
                if is_same(there, value):
                    return "same", ""
                times = [
                    time_of(collection, one, its, rules)
                    for one, its in ((value, header), (there, record.header_of(present)))
                ]
                if (raw_header is None or header.v != version) and times[0] <= times[1]:
                    return "older", ""
            op = op_of(collection, id, value, header, version, kind == COMPLETED_ORDERS)
            ticket = engine.submit(op, durability="always")
            if ticket.refusal is not None:
                ticket.wait()  # raises it, once what it rests on is sure
            tickets.append(ticket)
        except (StorageFull, Unavailable, JournalBroken, VersionMismatch):
            raise
        except HoldfastError as error:
            return "refused", str(error)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            return "refused", f"not a record: {error}"
        return outcome, ""

    def _merge_sales(self, opener: Callable[[], IO[bytes]], entry: FileEntry | None) -> tuple[MergeCounts, int, str]:
        with opener() as file:
            raw = file.read().removeprefix(b"\xef\xbb\xbf")
        try:
            given = decode_sales(raw)
        except (ValueError, msgspec.DecodeError) as error:
            raise Unfinished(f"{SALES_FILE}: {error}") from None
        written = encode_sales(self._engine.sales_figures())
        if entry is None or f"{crc32(written):08x}" != entry.crc32:
            return MergeCounts(older=1), 0, "something was counted since it was written; what was counted stays"
        op = StatsTake(days=list(given.days.values()), totals=given.totals, replaces=True)
        self._engine.submit(op, durability="always").wait()
        return MergeCounts(newer=1), 0, ""


def _signature(directory: Directory, name: str) -> tuple[int, int] | None:
    found = directory.stat(name)
    return None if found is None else (found.st_size, found.st_mtime_ns)


def _settle(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.wait()
    tickets.clear()
