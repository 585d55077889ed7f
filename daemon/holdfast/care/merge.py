"""Merging records that come from elsewhere: an import, a file in the inbox, a snapshot file that somebody edited.

The rules are those of a start: of two records with one id the newer counts, on a tie the one that is here. Everything is
checked before anything is changed, and everything is done by ops, so it is journaled, streamed, and survives a crash;
whoever merges the same again, after a crash in the midst of it or for no reason, changes nothing.

Messages are never changed or dropped. A conversation that is here takes from another only what was said after what both have;
when they are not the same up to there, it stays as it is, and that is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from holdfast import record
from holdfast.archive.base import MessageQuery
from holdfast.care.export import time_of
from holdfast.care.given import (
    OLD_CONVERSATION,
    OLD_ESCALATION,
    SALES,
    Given,
    NoRecords,
    Part,
    Unfinished,
    Wrong,
    read_up_to,
    records_of,
    whole_of,
)
from holdfast.care.mirror import ESCALATION_ENDING
from holdfast.care.old_layout import (
    OLD_ESCALATION as OLD_ESCALATION_FIELD,
)
from holdfast.care.old_layout import (
    contact_of,
    escalation_fields,
    head_fields,
    is_waiting,
    mark_of,
    message_of,
    moment,
    old_message,
)
from holdfast.clock import format_ms
from holdfast.core.conversations import KEPT_BY_US
from holdfast.core.decide import due_ms
from holdfast.core.rules import check_id
from holdfast.core.sales import decode_sales
from holdfast.core.state import COMPLETED_ORDERS, CONVERSATIONS, ESCALATIONS, ORDERS, SESSIONS, USERS, is_custom_name
from holdfast.errors import (
    BadRequest,
    Conflict,
    InvalidRecord,
    JournalBroken,
    Leased,
    NotFound,
    StorageFull,
    TooLarge,
    Unavailable,
    VersionMismatch,
)
from holdfast.load import id_field_of
from holdfast.ops import (
    AnyOp,
    Batch,
    ConversationArchive,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
    OrderTake,
    OwnOp,
    RecordPut,
    SessionPut,
    StatsTake,
    UserPut,
)
from holdfast.transcripts import encode_message

if TYPE_CHECKING:
    from holdfast.engine import Engine, Ticket

IN_FLIGHT_MAX = 500
"""Changes between two waits for the disk."""

APPEND_AT_ONCE = 1_000
"""Messages in one op; more of them stand in the same batch."""

_COLLECTION_OF = {COMPLETED_ORDERS: ORDERS, OLD_CONVERSATION: CONVERSATIONS, OLD_ESCALATION: ESCALATIONS}
"""Where the kinds of parts that are no collections are counted."""

REASONS_TOLD = 10
"""Of records that were refused, or could not be merged; the first ones are told with their reasons."""

TELL_EVERY = 1_000
"""Records between two signs of progress."""

BREATH_S = 0.0005
"""Every so many records for the others that share the processor."""

BREATH_EVERY = 50

RETRY_S = 0.01
"""Before a record that somebody else is changing is looked at again."""

_INVALID = (InvalidRecord, TooLarge, BadRequest)


class MergeCounts(msgspec.Struct, kw_only=True):
    """What became of the records of one collection.

    Attributes:
        added: were not here.
        newer: replaced what was here, or added to it.
        older: are not newer than what is here, which stays.
        same: are here as they are.
        expired: sessions idle for longer than their ttl; they would be dropped at once.
        conflicting: cannot be merged with what is here, which stays.
        refused: are no records, or cannot be kept exactly.
    """

    added: int = 0
    newer: int = 0
    older: int = 0
    same: int = 0
    expired: int = 0
    conflicting: int = 0
    refused: int = 0


class MergeReport(msgspec.Struct, kw_only=True):
    """What a merge did, or in a dry run would do.

    Attributes:
        collections: what became of the records, by collection.
        messages: appended to conversations.
        reasons: why records were refused or could not be merged; the first of them.
        ignored: files that are none of ours.
        dry_run: nothing was changed.
        backup: the backup that was taken before.
    """

    collections: dict[str, MergeCounts] = msgspec.field(default_factory=dict)
    messages: int = 0
    reasons: list[str] = msgspec.field(default_factory=list)
    ignored: list[str] = msgspec.field(default_factory=list)
    dry_run: bool = False
    backup: str | None = None

    def sum_of(self, name: str) -> int:
        """*name*, such as ``added``, over all collections."""
        return sum(getattr(counts, name) for counts in self.collections.values())

    @property
    def changes(self) -> int:
        """Records that were added or changed."""
        return self.sum_of("added") + self.sum_of("newer")


def merge(
    engine: Engine,
    given: Given,
    *,
    is_dry_run: bool = False,
    skips_invalid: bool = False,
    before_change: Callable[[], str | None] = lambda: None,
    progress: Callable[[str], object] = lambda text: None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> MergeReport:
    """Merge *given* into the data of *engine*; blocks.

    Args:
        skips_invalid: take the valid records where others are not; else nothing is taken then.
        before_change: called once when there is something to change; the name of the backup it has taken.

    Raises:
        InvalidRecord: something in it is no record, or a file of it is broken; nothing was changed.
        StorageFull: no room; what was merged until then stays, and merging again does the rest.
        Unavailable: cancelled, or stopping; likewise.
    """
    plan = _Merge(engine, progress, is_cancelled, is_dry_run=True, skips_invalid=skips_invalid)
    plan.run(given)
    report = plan.report
    report.ignored = given.ignored
    refused = report.sum_of("refused")
    if refused and not skips_invalid:
        total = sum(sum(msgspec.structs.astuple(counts)) for counts in report.collections.values())
        raise InvalidRecord(
            f"{refused} of {total} records cannot be taken, and nothing was changed: {'; '.join(report.reasons)}"
            f"{' and more' if refused > len(report.reasons) else ''}. "
            "Mend them, or have the others taken without them (--skip-invalid)"
        )
    if is_dry_run or not report.changes:
        report.dry_run = is_dry_run
        return report
    backup = before_change()
    work = _Merge(engine, progress, is_cancelled, is_dry_run=False, skips_invalid=skips_invalid)
    work.run(given)
    work.report.ignored, work.report.backup = given.ignored, backup
    return work.report


class _Different(Exception):
    """A conversation here and one that is given are not the same up to where one of them ends."""


class _Merge:
    """One pass over what is given: it counts, and unless it is a dry run changes."""

    def __init__(
        self,
        engine: Engine,
        progress: Callable[[str], object],
        is_cancelled: Callable[[], bool],
        *,
        is_dry_run: bool,
        skips_invalid: bool,
    ) -> None:
        self._engine = engine
        self._skips_invalid = skips_invalid
        self._rules = engine.rules
        self._progress = progress
        self._is_cancelled = is_cancelled
        self._is_dry_run = is_dry_run
        self._tickets: list[Ticket] = []
        # Conversations that the dry run would have made.
        self._begun: set[str] = set()
        self._looked = 0
        self.report = MergeReport(dry_run=is_dry_run)

    def run(self, given: Given) -> None:
        """Take all of it."""
        for part in given.parts:
            try:
                self._take(part)
            except InvalidRecord as error:
                if given.manifest is not None:
                    raise
                if isinstance(error, NoRecords) and len(given.parts) > 1 and is_custom_name(part.kind):
                    # What a bot keeps beside its data; a start leaves it alone as well.
                    del self.report.collections[part.kind]
                    if part.name not in given.ignored:
                        given.ignored.append(part.name)
                elif self._skips_invalid:
                    self._note(self._counts(_COLLECTION_OF.get(part.kind, part.kind)), "refused", str(error))
                else:
                    raise
        self._settle()

    def _take(self, part: Part) -> None:
        if part.kind == SALES:
            self._take_sales(part)
        elif part.kind == CONVERSATIONS:
            self._take_conversations(part)
        elif part.kind == ESCALATIONS:
            self._take_each(part, ESCALATIONS, self._take_escalation)
        elif part.kind == OLD_CONVERSATION:
            self._take_one(part, CONVERSATIONS, self._take_old_conversation)
        elif part.kind == OLD_ESCALATION:
            self._take_one(part, ESCALATIONS, self._take_old_escalation)
        else:
            self._take_collection(part)

    # What all kinds have in common.

    def _take_each(self, part: Part, collection: str, take: Callable[[dict[str, Any]], str]) -> None:
        counts = self._counts(collection)
        for number, found in enumerate(records_of(part, salvages=self._skips_invalid), 1):
            self._breathe(part)
            if isinstance(found, Wrong):
                self._note(counts, "refused", f"{found.place}: {found.reason}")
                continue
            self._take_guarded(counts, found, f"{part.name}, record {number}", take)

    def _take_one(self, part: Part, collection: str, take: Callable[[Part, dict[str, Any]], str]) -> None:
        self._breathe(part)
        counts = self._counts(collection)
        try:
            content = whole_of(part)
        except Unfinished:
            raise
        except InvalidRecord as error:
            self._note(counts, "refused", str(error))
            return
        self._take_guarded(counts, content, part.name, lambda value: take(part, value))

    def _take_guarded(
        self, counts: MergeCounts, value: dict[str, Any], place: str, take: Callable[[dict[str, Any]], str]
    ) -> None:
        """Have *take* take *value*, again when somebody changes the same meanwhile, and count what came of it."""
        for _ in range(5):
            try:
                outcome = take(dict(value))
            except VersionMismatch:
                # What is read here is durable, and a change on its way to the disk is not yet.
                self._settle()
                time.sleep(RETRY_S)
                continue
            except (StorageFull, Unavailable, JournalBroken):
                raise
            except _INVALID as error:
                self._note(counts, "refused", f"{place}: {error}")
            except (Conflict, Leased, NotFound, _Different) as error:
                self._note(counts, "conflicting", f"{place}: {error}")
            except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
                self._note(counts, "refused", f"{place}: not a record: {error}")
            else:
                setattr(counts, outcome, getattr(counts, outcome) + 1)
            return
        self._note(counts, "conflicting", f"{place}: somebody changes it all the while; merge again")

    def _counts(self, collection: str) -> MergeCounts:
        return self.report.collections.setdefault(collection, MergeCounts())

    def _note(self, counts: MergeCounts, outcome: str, reason: str) -> None:
        setattr(counts, outcome, getattr(counts, outcome) + 1)
        if len(self.report.reasons) < REASONS_TOLD:
            self.report.reasons.append(reason)

    def _breathe(self, part: Part) -> None:
        if self._is_cancelled():
            raise Unavailable("stopped in the midst of a merge; merging the same again does the rest")
        if self._looked % TELL_EVERY == 0:
            verb = "checking" if self._is_dry_run else "merging"
            self._progress(f"{verb} {part.name}: {self._looked} records so far")
        if self._looked % BREATH_EVERY == 0:
            time.sleep(BREATH_S)
        self._looked += 1

    def _do(self, op: AnyOp | OwnOp) -> None:
        if self._is_dry_run:
            self._engine.check(op)
            return
        self._keep(self._engine.submit(op, durability="always"))

    def _do_together(self, ops: list[AnyOp]) -> None:
        if not self._is_dry_run:
            self._keep(self._engine.submit_batch(Batch(ops=ops, atomic=True), durability="always"))
            return
        for op in ops:
            # The others rest on what stands before them; that is there only when it is done.
            if isinstance(op, ConversationPut | MessageAppend):
                self._engine.check(op)

    def _keep(self, ticket: Ticket) -> None:
        if ticket.refusal is not None:
            ticket.wait()  # raises it, once what it rests on is sure
        self._tickets.append(ticket)
        if len(self._tickets) >= IN_FLIGHT_MAX:
            self._settle()

    def _settle(self) -> None:
        tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            ticket.wait()

    # Records.

    def _take_collection(self, part: Part) -> None:
        collection = ORDERS if part.kind == COMPLETED_ORDERS else part.kind
        is_closed = part.kind == COMPLETED_ORDERS
        self._take_each(part, collection, lambda value: self._take_record(collection, value, is_closed))

    def _take_record(self, collection: str, value: dict[str, Any], is_closed: bool) -> str:
        rules = self._rules
        raw_header = value.pop(record.HEADER_KEY, None)
        header = record.Header() if raw_header is None else msgspec.convert(raw_header, record.Header)
        field = id_field_of(collection, rules)
        given_id = value.get(field)
        if isinstance(given_id, bool) or not isinstance(given_id, str | int) or given_id == "":
            raise InvalidRecord(f"expected a record with its {field}, found {given_id!r:.80}")
        id = str(given_id)
        if collection == SESSIONS and rules.session_time_field not in value:
            raise InvalidRecord(f"expected a session with its {rules.session_time_field}, found none")
        present = self._engine.line(collection, id)
        version = 0 if present is None else record.version_of(present)[0]
        op = op_of(collection, id, value, header, version, is_closed)
        if collection == SESSIONS:
            self._engine.check(op)  # or its time could not be read
            activity = {rules.session_time_field: value[rules.session_time_field]}
            if due_ms(record.join_header(orjson.dumps(activity), header), rules) <= self._engine.now_ms():
                return "expired"
        if present is None:
            self._do(op)
            return "added"
        there = orjson.loads(record.value_of(present))
        if is_same(there, value):
            return "same"
        if time_of(collection, value, header, rules) <= time_of(collection, there, record.header_of(present), rules):
            return "older"
        self._do(op)
        return "newer"

    # Conversations.

    def _take_conversations(self, part: Part) -> None:
        self._take_each(part, CONVERSATIONS, self._take_conversation)

    def _take_conversation(self, value: dict[str, Any]) -> str:
        """A conversation of an export."""
        id = self._id_in(value, "id")
        messages = value.pop("messages", None)
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise InvalidRecord("expected a conversation with a list of its messages")
        fields = {name: inner for name, inner in value.items() if name not in KEPT_BY_US and inner is not None}
        made = [_message_in(one) for one in messages]
        first = messages[0].get("number", 1) if messages else 1
        theirs = [_mark(one) for one in messages] if self._engine.line(CONVERSATIONS, id) is not None else []
        after: list[AnyOp] = [ConversationArchive(id=id)] if value.get("archived") else []
        hold = [ConversationHold(id=id, reason=value.get("hold_reason"))] if value.get("hold") else []
        return self._merge_conversation(id, fields, made, theirs, first, _mark_here, after, hold)

    def _take_old_conversation(self, part: Part, value: dict[str, Any]) -> str:
        """A conversation in a file of its own, as the old bots and the mirror write them."""
        zone = self._rules.zone
        name = part.name.rpartition("/")[2]
        id = self._id_in(value, "id", name.removesuffix(".json"))
        messages = value.get("messages")
        if not isinstance(messages, list):
            raise InvalidRecord(f"expected a list of messages, found {type(messages).__name__}")
        fields = head_fields(value, zone)
        if fields.get("created_at") is None:
            written = format_ms(part.written_ms or self._engine.now_ms())
            fields["created_at"] = fields.get("updated_at") or written
        made = [message_of(old, zone, fields["created_at"]) for old in messages]
        return self._merge_conversation(id, fields, made, [mark_of(old) for old in messages], 1, _old_mark_here)

    def _merge_conversation(
        self,
        id: str,
        fields: dict[str, Any],
        messages: list[Message],
        theirs: list[bytes],
        first: int,
        mark_here: Callable[[bytes], bytes],
        after: Sequence[AnyOp] = (),
        after_added: Sequence[AnyOp] = (),
    ) -> str:
        """What became of it; *after* is done with what is taken of it, *after_added* where it was not here."""
        present = self._engine.get(CONVERSATIONS, id)
        if present is None:
            # Together: whoever merges again after a crash finds it here, and has no reason to do the rest.
            ops: list[AnyOp] = [
                ConversationPut(id=id, if_version=0, value=fields),
                *_appends(id, messages),
                *after,
                *after_added,
            ]
            if id in self._begun and self._is_dry_run:
                raise _Different("another with the same id stands before it; nothing of this one is taken")
            self._do_together(ops)
            self._begun.add(id)
            self.report.messages += len(messages)
            return "added"
        head = orjson.loads(present.value)
        start = _start_of_new(self._marks_here(id, mark_here), head["last_number"], theirs, first)
        changed = _changed_fields(head, fields)
        updated_at = fields.get("updated_at")
        is_newer = updated_at is not None and (moment(updated_at, self._rules.zone) or "") > head["updated_at"]
        ops = []
        if changed and is_newer:
            ops.append(ConversationPut(id=id, if_version=present.version, value=changed))
        # What was said here meanwhile would come to stand before them.
        ops += _appends(id, messages[start:], None if ops else present.version)
        if not ops:
            return "older" if changed or start > len(messages) else "same"
        self._do_together([*ops, *after])
        self.report.messages += len(messages[start:])
        return "newer"

    def _marks_here(self, id: str, mark_here: Callable[[bytes], bytes]) -> tuple[int, list[bytes]]:
        """The number of the first message that is here, and the marks of all."""
        marks: list[bytes] = []
        first, after = 1, 0
        while True:
            query = MessageQuery(after=after, limit=APPEND_AT_ONCE, newest=False)
            found = self._engine.transcripts.read(lambda archive, query=query: archive.messages(id, query))  # type: ignore[misc]
            if found and not marks:
                first = found[0].number
            marks += [mark_here(encode_message(message)) for message in found]
            if len(found) < APPEND_AT_ONCE:
                return first, marks
            after = found[-1].number

    def _id_in(self, value: dict[str, Any], field: str, otherwise: str | None = None) -> str:
        said = value.get(field)
        for id in (str(said) if type(said) is int else said, otherwise):
            if isinstance(id, str):
                try:
                    check_id(id, self._rules)
                except InvalidRecord:
                    if otherwise is None:
                        raise
                    continue
                return id
        raise InvalidRecord(f"expected an {field}, found {said!r:.80}")

    # Escalations.

    def _take_escalation(self, value: dict[str, Any]) -> str:
        """An escalation of an export."""
        id = self._id_in(value, "id")
        fields = {name: value.get(name) for name in ("reason", "contact_info", "priority", "opened_at")}
        if not isinstance(fields["reason"], str):
            raise InvalidRecord(f"expected the reason of the escalation as text, found {fields['reason']!r:.80}")
        op = msgspec.convert({"op": "escalation.open", "id": id, **fields}, EscalationOpen)
        return self._open_escalation(op, is_open=value.get("status") in ("pending", "claimed", None))

    def _open_escalation(self, op: EscalationOpen, *, is_open: bool) -> str:
        there = self._engine.get(ESCALATIONS, op.id)
        if there is not None:
            value = orjson.loads(there.value)
            same = all(value.get(name) == getattr(op, name) for name in ("reason", "contact_info"))
            return "same" if same else "older"
        if not is_open:
            # Nobody waits any more, and nobody may be made to wait again.
            return "older"
        ops: list[AnyOp] = []
        if self._engine.get(CONVERSATIONS, op.id) is None and op.id not in self._begun:
            ops.append(ConversationPut(id=op.id, if_version=0, value={"created_at": op.opened_at}))
        self._do_together([*ops, op])
        return "added"

    def _take_old_escalation(self, part: Part, value: dict[str, Any]) -> str:
        zone = self._rules.zone
        name = part.name.rpartition("/")[2]
        id = self._id_in(value, "conversation_id", name.removesuffix(ESCALATION_ENDING).removesuffix(".json"))
        fields = escalation_fields(value, zone)
        fields["opened_at"] = fields["opened_at"] or format_ms(part.written_ms or self._engine.now_ms())
        if is_waiting(value):
            return self._open_escalation(EscalationOpen(id=id, **fields), is_open=True)
        head = self._engine.get(CONVERSATIONS, id)
        if head is not None and OLD_ESCALATION_FIELD in orjson.loads(head.value):
            return "same"
        kept = {OLD_ESCALATION_FIELD: contact_of(value), "escalated": True}
        if head is None and id not in self._begun:
            kept["created_at"] = fields["opened_at"]
        self._do_together([ConversationPut(id=id, value=kept)])
        return "added"

    # Sales figures.

    def _take_sales(self, part: Part) -> None:
        self._breathe(part)
        counts = self._counts("sales")
        try:
            with part.open() as file:
                raw = read_up_to(file, part.line_bytes_max + 1)
            if len(raw) > part.line_bytes_max:
                raise part.too_large(part.name, part.line_bytes_max)
            given = decode_sales(raw.removeprefix(b"\xef\xbb\xbf"))
        except (ValueError, msgspec.DecodeError) as error:
            self._note(counts, "refused", f"{part.name}: {error}")
            return
        here = self._engine.sales_figures()
        for date, day in given.days.items():
            there = here.days.get(date)
            outcome = "added" if there is None else "same" if there == day else "older"
            setattr(counts, outcome, getattr(counts, outcome) + 1)
        op = StatsTake(days=list(given.days.values()), totals=given.totals)
        if not self._is_dry_run:
            self._keep(self._engine.submit(op, durability="always"))


def is_same(there: dict[str, Any], value: dict[str, Any]) -> bool:
    """Whether the record *value*, from elsewhere, says what the one that is *there* does; true and 1 are not the same."""
    return _comparable(there) == _comparable(value)


def _comparable(value: dict[str, Any]) -> bytes:
    return orjson.dumps(
        {name: float(one) if isinstance(one, Decimal) else one for name, one in value.items()},
        option=orjson.OPT_SORT_KEYS,
    )


def op_of(
    collection: str, id: str, value: dict[str, Any], header: record.Header, version: int, is_closed: bool
) -> AnyOp | OwnOp:
    """What stores *value*, a record from elsewhere, in place of the one that has *version* here (0: none).

    Args:
        header: it came with.
        is_closed: an order that is completed or cancelled.
    """
    if collection == SESSIONS:
        ttl = None if header.ttl is None else header.ttl / 1000
        return SessionPut(id=id, value=value, if_version=version, ttl=ttl)
    if collection == ORDERS:
        return OrderTake(id=id, value=value, if_version=version, is_closed=is_closed)
    if collection == USERS:
        return UserPut(id=id, value=value, if_version=version)
    return RecordPut(collection=collection, id=id, value=value, if_version=version)


def _start_of_new(here: tuple[int, list[bytes]], last_number: int, theirs: list[bytes], first: int) -> int:
    """From which of *theirs* on they are new; their length or more when none is.

    Args:
        here: the number of the first message that is here, and the marks of all.
        last_number: of the last one that ever was here.
        first: the number of the first of *theirs*.

    Raises:
        _Different: the two are not the same up to the end of the shorter one.
    """
    first_here, ours = here
    if not ours:
        # Those that were here are deleted; what was said after them is new.
        return last_number if first == 1 or not last_number else len(theirs)
    # Where one of the two has lost its oldest messages, the other may begin before it.
    before_ours = range(len(theirs)) if first_here > 1 else range(1)
    for skipped in before_ours:
        common = min(len(ours), len(theirs) - skipped)
        if common and theirs[skipped : skipped + common] == ours[:common]:
            return max(skipped + len(ours), 0)
    if first > 1:
        for skipped in range(1, len(ours)):
            common = min(len(ours) - skipped, len(theirs))
            if common and ours[skipped : skipped + common] == theirs[:common]:
                return max(len(ours) - skipped, 0)
    if not theirs:
        return 1
    raise _Different(
        "a conversation with this id is here, with other messages; messages are never replaced, so nothing of it was taken"
    )


def _changed_fields(head: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Of *fields* those that would change *head*."""
    return {name: value for name, value in fields.items() if head.get(name) != value}


def _message_in(value: dict[str, Any]) -> Message:
    """A message of an export."""
    given = {
        name: value[name]
        for name in ("role", "content", "author", "tokens_used", "created_at", "metadata")
        if value.get(name) is not None and value[name] != {}
    }
    try:
        return msgspec.convert(given, Message)
    except msgspec.ValidationError as error:
        raise InvalidRecord(f"message {value.get('number')!r:.20}: {error}") from None


def _mark(message: dict[str, Any]) -> bytes:
    """The same for two messages of an export that are the same, whatever their numbers."""
    return mark_of({name: inner for name, inner in message.items() if name != "number"})


def _mark_here(shown: bytes) -> bytes:
    return _mark(orjson.loads(shown))


def _old_mark_here(shown: bytes) -> bytes:
    return mark_of(old_message(orjson.loads(shown)))


def _appends(id: str, messages: list[Message], version: int | None = None) -> Iterator[AnyOp]:
    """What appends *messages* to the conversation *id*, which has *version* unless it is None."""
    for start in range(0, len(messages), APPEND_AT_ONCE):
        yield MessageAppend(
            id=id, messages=messages[start : start + APPEND_AT_ONCE], if_version=None if start else version
        )
