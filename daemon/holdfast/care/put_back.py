"""Putting a part of an earlier state back: one collection, one record, one conversation.

Done by ordinary ops on the open engine, a few at a time, so that it is journaled and streamed, and needs no restart. What was
written since to other records stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import orjson

from holdfast import record
from holdfast.archive.base import ARCHIVED_OPS, Archive, ArchiveDamaged, ArchiveError, MessageQuery
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite import open_sqlite
from holdfast.care import swap
from holdfast.care.backup_set import extract
from holdfast.care.history import History
from holdfast.care.moments import Target
from holdfast.care.packing import Seal
from holdfast.care.rewind import SALES, collection_in, journal_of
from holdfast.clock import format_ms
from holdfast.core.conversations import KEPT_BY_US
from holdfast.core.decide import due_ms
from holdfast.core.event import StoredMessage, decode_event
from holdfast.core.rules import Rules
from holdfast.core.state import (
    BUILT_IN,
    COMPLETED_ORDERS,
    CONVERSATIONS,
    ESCALATIONS,
    ORDERS,
    SESSIONS,
    USERS,
    State,
    is_custom_name,
)
from holdfast.disk.files import Directory
from holdfast.engine import Engine, Ticket
from holdfast.errors import BadRequest, HoldfastError, JournalBroken, NotFound, StorageFull, Unavailable
from holdfast.ops import (
    Batch,
    ConversationArchive,
    ConversationDelete,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    OrderDelete,
    OrderRestore,
    RecordDelete,
    RecordPut,
    SessionDelete,
    SessionPut,
    SessionTouch,
    UserDelete,
    UserPut,
)

AT_ONCE = 200
"""Records between two waits for the disk."""

APPEND_AT_ONCE = 1_000
"""Messages in one op; more of them stand in the same batch."""

REASONS_MAX = 10
"""Refusals that a report quotes."""

WHOLE = (SESSIONS, ORDERS, COMPLETED_ORDERS, USERS)
"""The built-in collections that can be put back as a whole; of others only with everything else, or one by one."""


class Part(NamedTuple):
    """What is to be put back.

    Attributes:
        collection: of it; ``orders`` are pending ones, then completed and cancelled ones.
        id: of one record; None means all of the collection, and that what is not in it goes.
    """

    collection: str
    id: str | None = None

    @property
    def collections(self) -> tuple[str, ...]:
        """Those that it may touch."""
        if self.collection == ORDERS:
            return (ORDERS, COMPLETED_ORDERS)
        if self.collection == CONVERSATIONS:
            return (CONVERSATIONS, ESCALATIONS)
        return (self.collection,)


class PartRestored(msgspec.Struct, kw_only=True):
    """What became of the records of a part.

    Attributes:
        added, changed, removed: how many.
        unchanged: were as they are wanted.
        refused: how many could not be put back, such as a leased session; *reasons* quotes the first.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    refused: int = 0
    reasons: list[str] = []


def part_of_file(file: str) -> Part:
    """The part that the snapshot *file* is.

    Raises:
        BadRequest: it is none, or one that means nothing without the others.
    """
    name = collection_in(file)
    if name is None:
        raise BadRequest(f"expected a snapshot file such as chat_sessions.json, found {file!a:.80}")
    return part_of_collection(name, file)


def part_of_collection(name: str, shown: str = "") -> Part:
    """The part that the collection *name* is; errors as ``part_of_file``."""
    if name == SALES:
        raise BadRequest("sales_stats.json is counted from the orders; restore everything, or --into a directory")
    if name not in WHOLE and (name in BUILT_IN or not is_custom_name(name)):
        raise BadRequest(
            f"expected {', '.join(WHOLE)} or a collection of your own, found {shown or name!a:.80}; "
            "restore everything, or one conversation"
        )
    return Part(name)


def put_back(
    engine: Engine,
    part: Part,
    then: State,
    rules: Rules,
    messages_of: Callable[[str], Iterable[StoredMessage]],
    is_stopping: Callable[[], bool] = lambda: False,
) -> PartRestored:
    """Make *part* of the data of *engine* what it was *then*; blocks. Repeated, it changes nothing more.

    Args:
        messages_of: gives the messages of a conversation as of then.

    Raises:
        NotFound: the one record that is asked for was not there then.
        StorageFull, JournalBroken, Unavailable: what was put back before stays so.
    """
    run = _Run(engine, then, rules, messages_of)
    if part.id is not None and not any(_line(then, name, part.id) for name in part.collections):
        raise NotFound(f"the backup has no {_word(part.collection)} {part.id!a:.80} at that moment")
    for id in [part.id] if part.id is not None else run.ids(part):
        if is_stopping():
            raise Unavailable("stopping; what was put back stays, restore again for the rest")
        run.put_back(part, id)
    run.settle()
    return run.report


class _Run:
    def __init__(
        self, engine: Engine, then: State, rules: Rules, messages_of: Callable[[str], Iterable[StoredMessage]]
    ) -> None:
        self.report = PartRestored()
        self._engine = engine
        self._then = then
        self._rules = rules
        self._messages_of = messages_of
        self._tickets: list[tuple[Ticket, str]] = []

    def ids(self, part: Part) -> list[str]:
        names = (part.collection,) if part.id is None else part.collections
        found = {one.id for name in names for one in self._engine.everything(name)}
        for name in names:
            if name in self._then.collections:
                found.update(self._then.collections[name])
        return sorted(found)

    def put_back(self, part: Part, id: str) -> None:
        ops, kind = list(self._ops(part, id)), "changed"
        if not ops:
            self.report.unchanged += 1
            return
        is_there = any(self._present(name, id) is not None for name in part.collections)
        is_wanted = any(_line(self._then, name, id) is not None for name in part.collections)
        if not is_there:
            kind = "added"
        elif not is_wanted:
            kind = "removed"
        try:
            if len(ops) == 1:
                ticket = self._engine.submit(ops[0])
            else:
                ticket = self._engine.submit_batch(Batch(ops=ops, atomic=True))
        except (StorageFull, JournalBroken, Unavailable):
            raise
        except HoldfastError as error:
            self._refused(error)
            return
        self._tickets.append((ticket, kind))
        if len(self._tickets) >= AT_ONCE:
            self.settle()

    def settle(self) -> None:
        tickets, self._tickets = self._tickets, []
        for ticket, kind in tickets:
            try:
                ticket.wait()
            except (StorageFull, JournalBroken, Unavailable):
                raise
            except HoldfastError as error:
                self._refused(error)
                continue
            setattr(self.report, kind, getattr(self.report, kind) + 1)

    def _refused(self, error: HoldfastError) -> None:
        self.report.refused += 1
        if len(self.report.reasons) < REASONS_MAX:
            self.report.reasons.append(error.detail)

    def _present(self, name: str, id: str) -> bytes | None:
        found = self._engine.get(name, id)
        if found is not None and name in (ORDERS, COMPLETED_ORDERS):
            # Who asks for an order gets it from either collection.
            closed = self._engine.get(COMPLETED_ORDERS, id)
            if (closed is not None) != (name == COMPLETED_ORDERS):
                return None
        return None if found is None else found.value

    def _ops(self, part: Part, id: str) -> Iterator[Any]:
        name = part.collection
        if name in (ORDERS, COMPLETED_ORDERS):
            yield from self._order_ops(part, id)
            return
        if name == CONVERSATIONS:
            yield from self._conversation_ops(id)
            return
        line, present = _line(self._then, name, id), self._present(name, id)
        if line is None:
            yield {SESSIONS: SessionDelete(id=id), USERS: UserDelete(id=id)}.get(
                name, RecordDelete(collection=name, id=id)
            )
            return
        value = record.value_of(line)
        is_same = value == present
        if name == SESSIONS:
            if not is_same:
                ttl = record.header_of(line).ttl
                yield SessionPut(id=id, value=orjson.loads(value), ttl=None if ttl is None else ttl / 1000)
            if part.id is not None and due_ms(line, self._rules) <= self._engine.now_ms():
                # It is asked for by name, and would be gone in the next minute.
                yield SessionTouch(id=id)
        elif not is_same and name == USERS:
            yield UserPut(id=id, value=orjson.loads(value))
        elif not is_same:
            yield RecordPut(collection=name, id=id, value=orjson.loads(value))

    def _order_ops(self, part: Part, id: str) -> Iterator[Any]:
        names = (ORDERS, COMPLETED_ORDERS) if part.id is not None else (part.collection,)
        wanted = next(((name, line) for name in names if (line := _line(self._then, name, id)) is not None), None)
        present = {name: self._present(name, id) for name in (ORDERS, COMPLETED_ORDERS)}
        if wanted is None:
            # Of one collection only: an order that was in the other one then is no business of this one.
            if present[part.collection] is not None:
                yield OrderDelete(id=id)
            return
        name, line = wanted
        value = record.value_of(line)
        if present[name] == value:
            return
        if present[ORDERS if name == COMPLETED_ORDERS else COMPLETED_ORDERS] is not None:
            yield OrderDelete(id=id)
        counted = record.header_of(line).counted
        yield OrderRestore(id=id, value=value, is_closed=name == COMPLETED_ORDERS, counted=counted)

    def _conversation_ops(self, id: str) -> Iterator[Any]:
        line, present = _line(self._then, CONVERSATIONS, id), self._present(CONVERSATIONS, id)
        if line is None:
            if present is not None:
                yield ConversationDelete(id=id)
            return
        value = record.value_of(line)
        if value == present:
            return
        head = orjson.loads(value)
        if present is not None:
            # Messages are never changed or put between others, so it begins anew with those of then.
            yield ConversationDelete(id=id)
        fields = {name: field for name, field in head.items() if name not in KEPT_BY_US and name != "id"}
        yield ConversationPut(id=id, value=fields)
        messages = [_message(one) for one in self._messages_of(id)]
        for start in range(0, len(messages), APPEND_AT_ONCE):
            yield MessageAppend(id=id, messages=messages[start : start + APPEND_AT_ONCE])
        escalation = _line(self._then, ESCALATIONS, id)
        if escalation is not None and (opened := orjson.loads(escalation)).get("status") != "resolved":
            yield EscalationOpen(
                id=id,
                reason=opened["reason"],
                contact_info=opened.get("contact_info"),
                priority=opened.get("priority"),
                opened_at=opened.get("opened_at"),
            )
        yield ConversationPut(id=id, value={"updated_at": head["updated_at"]})
        if head.get("archived"):
            yield ConversationArchive(id=id)
        if head.get("hold"):
            yield ConversationHold(id=id, reason=head.get("hold_reason"))


def _line(state: State, name: str, id: str) -> bytes | None:
    found = state.collections.get(name)
    return None if found is None else found.get(id)


def _word(collection: str) -> str:
    known = {SESSIONS: "session", ORDERS: "order", USERS: "user", CONVERSATIONS: "conversation"}
    return known.get(collection, f"record of {collection}")


def _message(stored: StoredMessage) -> Message:
    return Message(
        role=cast(Any, stored.role),
        content=stored.content,
        tokens_used=stored.tokens_used,
        author=cast(Any, stored.author or None),
        metadata=orjson.loads(bytes(stored.metadata)) if bytes(stored.metadata) else None,
        created_at=format_ms(stored.created_ms),
    )


# The messages of then.


def messages_from(
    target: Target, data_dir: Path, seal: Seal | None, history: History
) -> Callable[[str], list[StoredMessage]]:
    """Gives the messages of a conversation at *target*; it unpacks the archive of the set in *data_dir* meanwhile.

    It raises:
        SetDamaged, HistoryGap, StorageFull, OSError: they cannot be had.
        Unavailable: the archive of the set cannot be read.
    """

    def messages_of(id: str) -> list[StoredMessage]:
        with _scratch_in_use, Directory(data_dir) as data:
            swap.discard_scratch(data, swap.SCRATCH)
            try:
                with data.subdirectory(swap.SCRATCH) as scratch:
                    return _messages_then(target, id, scratch, seal, history)
            except (ArchiveError, ArchiveDamaged) as error:
                raise Unavailable(f"the archive of backup {target.found.name} cannot be read: {error}") from error
            finally:
                swap.discard_scratch(data, swap.SCRATCH)

    return messages_of


_scratch_in_use = threading.Lock()


def _messages_then(
    target: Target, id: str, scratch: Directory, seal: Seal | None, history: History
) -> list[StoredMessage]:
    manifest = target.found.manifest
    assert manifest is not None
    if ARCHIVE in manifest.files:
        extract(target.found, [ARCHIVE], scratch, seal)
    archive = open_sqlite(scratch.path / ARCHIVE)
    try:
        in_set = [line for line in journal_of(target.found, seal) if line.seq > manifest.archived_seq]
        for line in (*in_set, *history.lines(manifest.seq, target.seq)):
            if line.seq > target.seq:
                break
            event = decode_event(line.payload)
            members = event.events or [] if event.op == "batch" else [event]
            wanted = [(line.seq, one) for one in members if one.op in ARCHIVED_OPS and one.id == id]
            if wanted:
                archive.apply(wanted, line.seq)
        return list(_all_messages(archive, id))
    finally:
        archive.close()


def _all_messages(archive: Archive, id: str) -> Iterator[StoredMessage]:
    after = 0
    while found := archive.messages(id, MessageQuery(newest=False, limit=APPEND_AT_ONCE, after=after)):
        yield from found
        after = found[-1].number
