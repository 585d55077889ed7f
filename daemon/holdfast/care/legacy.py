"""Taking over the conversations and escalations of an old bot: one JSON file each, in ``conversations/`` and ``escalations/``.

Done at each start, between loading and serving. Each conversation becomes one atomic batch; when all are synced the files move
to ``backups/imported-TIME/``, so a later start neither takes them twice nor brings back what was deleted meanwhile. After a
crash in between, what is there already is only moved. A file that cannot be taken goes to ``quarantine/`` with a report.

Files of our own mirror are left alone, since they only show what is there. Where nothing else is left they are taken as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from datetime import tzinfo
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import orjson

from holdfast.care.mirror import (
    CONVERSATIONS_PLACE,
    ESCALATION_ENDING,
    ESCALATIONS_PLACE,
    begin_adopting,
    file_name,
    forget_state,
    is_mirror_file,
    messages_shown,
    shown_beside,
)
from holdfast.care.old_layout import (
    KEPT,
    OLD_ESCALATION,
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
from holdfast.core.rules import Rules, check_id
from holdfast.core.state import CONVERSATIONS, ESCALATIONS
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused, HoldfastError, InvalidRecord, JournalBroken, StorageFull, Unavailable
from holdfast.ops import (
    AnyOp,
    Batch,
    ConversationArchive,
    ConversationHold,
    ConversationPut,
    EscalationOpen,
    Message,
    MessageAppend,
)

if TYPE_CHECKING:
    from holdfast.engine import Engine, Ticket

FILE_BYTES_MAX = 256 << 20
"""No bot wrote a larger one; it would take the memory of the machine."""

APPEND_AT_ONCE = 1_000
"""Messages in one op; more of them stand in the same batch."""

IN_FLIGHT_MAX = 500
"""Conversations between two waits for the disk."""

TELL_EVERY = 200
"""Files between two signs of progress."""

NAME_BYTES_MAX = 150
"""Of a file's name in its name in ``quarantine/``, which has more before and behind it; file systems take 255."""


class _OldFile(NamedTuple):
    """A file with what was in it.

    Attributes:
        place, name: where it stands.
        content: the JSON object in it.
        written_at: its modification time, in our form.
        is_mirrored: it is one of our own mirror.
    """

    place: str
    name: str
    content: dict[str, Any]
    written_at: str
    is_mirrored: bool


class _Claim(NamedTuple):
    """A file that says that it is a certain conversation.

    Attributes:
        updated_at: what it says when that was updated last, in our form; empty when it does not.
        is_named: its name says the same.
    """

    updated_at: str
    is_named: bool
    name: str


class _Broken(Exception):
    """A file cannot be taken, for this reason."""


_Reader = Callable[[Directory, str, int], dict[str, Any]]
"""Gives the JSON object in a file of so many bytes, or raises ``_Broken``."""


def import_old_files(
    engine: Engine,
    data: Directory,
    rules: Rules,
    *,
    stamp: str,
    adopts_mirror: bool,
    cancelled: threading.Event,
    progress: Callable[[str], None],
    log: Any,
) -> str | None:
    """Take over what an old bot left in *data*, the directory of *engine*; blocks. Why not all of it could be, or None.

    Args:
        rules: of the engine, for its zone and its limits.
        stamp: the time in the names of what is kept.
        adopts_mirror: whether files of our own mirror are taken as well: nothing else is left of what they show.
        cancelled, progress: as for ``open_engine``.

    Raises:
        Unavailable: cancelled; what was not taken yet is taken at the next start.
        JournalBroken: the disk refused to sync.
    """
    with ExitStack() as opened:
        places = {}
        for place in (CONVERSATIONS_PLACE, ESCALATIONS_PLACE):
            found = data.stat(place)
            if found is None:
                continue
            if not stat.S_ISDIR(found.st_mode):
                log.info("file.ignored", file=place, reason="it is not a directory")
                continue
            places[place] = opened.enter_context(data.subdirectory(place))
        try:
            if places:
                run = _Import(engine, data, places, rules, stamp, adopts_mirror, cancelled, progress, log)
                run.run()
            if adopts_mirror:
                # Whatever it says is of the files that were there.
                forget_state(data)
        except (StorageFull, DataRefused) as error:
            return str(error)
        except Unavailable as error:
            if cancelled.is_set() or isinstance(error, JournalBroken):
                raise
            # The archive, which is no reason not to start.
            return str(error)
        except OSError as error:
            return error.strerror or "an error of the disk"
    return None


class _Import:
    """One import; lives as long as ``import_old_files`` runs."""

    def __init__(
        self,
        engine: Engine,
        data: Directory,
        places: Mapping[str, Directory],
        rules: Rules,
        stamp: str,
        adopts_mirror: bool,
        cancelled: threading.Event,
        progress: Callable[[str], None],
        log: Any,
    ) -> None:
        self._engine = engine
        self._data = data
        self._places = places
        self._rules = rules
        self._stamp = stamp
        self._adopts_mirror = adopts_mirror
        self._cancelled = cancelled
        self._progress = progress
        self._log = log
        self._tickets: list[Ticket] = []
        # What is journaled, and moves when all of it is synced.
        self._done: dict[str, list[str]] = {place: [] for place in places}
        self._begun: set[str] = set()
        self._conversations = self._messages = self._escalations = self._broken = 0

    def run(self) -> None:
        """Take all, sync all, move all."""
        started = self._engine.monotonic()
        if self._adopts_mirror and any(self._has_mirrored(place) for place in self._places.values()):
            # From the first of them on something is there, and a later start could not tell that the others are wanted.
            begin_adopting(self._data)
        try:
            self._take_all()
        except (HoldfastError, OSError):
            # What is deleted until the next start must not come back with its file.
            with suppress(HoldfastError, OSError):
                self._settle()
                self._move()
            raise
        self._settle()
        moved = self._move()
        if moved or self._broken:
            self._log.info(
                "conversations.imported",
                conversations=self._conversations,
                messages=self._messages,
                escalations=self._escalations,
                broken=self._broken,
                duration_ms=round((self._engine.monotonic() - started) * 1000, 1),
            )

    def _has_mirrored(self, directory: Directory) -> bool:
        return any(name.endswith(".json") and is_mirror_file(directory, name) for name in directory.names())

    def _take_all(self) -> None:
        escalations: dict[str, list[_OldFile]] = {}
        for old in self._read_all(ESCALATIONS_PLACE, _read):
            id = self._id_of(old, "conversation_id", ESCALATION_ENDING)
            if id is not None:
                escalations.setdefault(id, []).append(old)
        # Each is read twice: whether another file says more of the same conversation is known when all were seen.
        claims: dict[str, list[_Claim]] = {}
        for old in self._read_all(CONVERSATIONS_PLACE, _glance):
            id = self._id_of(old, "id", ".json")
            if id is not None:
                updated_at = moment(old.content.get("updated_at"), self._rules.zone) or ""
                is_named = old.name in (f"{id}.json", file_name(id, ".json"))
                claims.setdefault(id, []).append(_Claim(updated_at, is_named, old.name))
        for number, (id, files) in enumerate(claims.items()):
            if number % TELL_EVERY == 0:
                self._progress(f"taking over {CONVERSATIONS_PLACE}: {number} of {len(claims)}")
            # The newest; of equal ones that which has the name for it, since the other may be a copy that somebody made.
            files.sort(key=lambda claim: (claim.updated_at, claim.is_named), reverse=True)
            is_taken = False
            for claim in files:
                found = self._read_one(CONVERSATIONS_PLACE, claim.name, _read)
                if found is None:
                    continue
                if is_taken:
                    reason = "another file has the same id; nothing of this one was taken"
                    self._set_aside(found.place, found.name, reason)
                else:
                    is_taken = self._take_file(id, found)
            # By now it is known which of them have a conversation.
            self._take_escalations(id, escalations.pop(id, []))
        for id, waiting in escalations.items():
            self._take_escalations(id, waiting)

    # Reading.

    def _read_all(self, place: str, read: _Reader) -> Iterator[_OldFile]:
        """What *place* holds."""
        directory = self._places.get(place)
        if directory is None:
            return
        names = [name for name in directory.names() if name.endswith(".json") and not name.startswith(".")]
        for looked, name in enumerate(names):
            if looked % TELL_EVERY == 0:
                self._progress(f"looking through {place}: {looked} of {len(names)}")
            old = self._read_one(place, name, read)
            if old is not None:
                yield old

    def _read_one(self, place: str, name: str, read: _Reader) -> _OldFile | None:
        """The file *name* in *place*; None when it is not to be taken. One that cannot be is set aside."""
        if self._cancelled.is_set():
            raise Unavailable("stopped while old conversations were taken over; the next start goes on")
        directory = self._places[place]
        found = directory.stat(name)
        if found is None or not stat.S_ISREG(found.st_mode):
            self._log.info("file.ignored", file=f"{place}/", reason="something in it is not a regular file")
            return None
        is_mirrored = is_mirror_file(directory, name)
        if is_mirrored and not self._adopts_mirror:
            return None
        try:
            content = read(directory, name, found.st_size)
        except _Broken as error:
            self._set_aside(place, name, str(error))
            return None
        return _OldFile(place, name, content, format_ms(found.st_mtime_ns // 1_000_000), is_mirrored)

    def _id_of(self, old: _OldFile, field: str, ending: str) -> str | None:
        """The id of what *old* holds: what it says, else what its name says; None when neither can be one."""
        said = old.content.get(field)
        named = old.name.removesuffix(ending if old.name.endswith(ending) else ".json")
        for id in (str(said) if type(said) is int else said, named):
            if not isinstance(id, str):
                continue
            try:
                check_id(id, self._rules)
            except InvalidRecord:
                continue
            return id
        self._set_aside(old.place, old.name, f"neither {field} in it nor its name can be an id")
        return None

    # Taking.

    def _take_file(self, id: str, old: _OldFile) -> bool:
        """Take the conversation in *old*, or set the file aside; whether it was taken."""
        try:
            ops, messages = self._ops_of(id, old)
            self._submit(id, ops)
        except (_Broken, RecursionError) as error:
            self._set_aside(old.place, old.name, str(error))
            return False
        self._conversations += any(isinstance(op, ConversationPut) for op in ops)
        self._messages += messages
        self._done[old.place].append(old.name)
        return True

    def _ops_of(self, id: str, old: _OldFile) -> tuple[list[AnyOp], int]:
        """What has to be done so that the conversation in *old* is there, and how many messages that appends."""
        messages = old.content.get("messages")
        if not isinstance(messages, list):
            raise _Broken(f"expected a list of messages, found {type(messages).__name__}")
        zone = self._rules.zone
        fields = head_fields(old.content, zone)
        created_at, updated_at = fields.get("created_at"), fields.get("updated_at")
        head = self._engine.get(CONVERSATIONS, id)
        if head is None:
            fields["created_at"] = created_at = created_at or updated_at or old.written_at
            put = ConversationPut(id=id, if_version=0, value=fields)
            if old.is_mirrored:
                return [put, *self._mirrored_ops(id, old, created_at)], len(messages)
            return [put, *_appends(id, _made(messages, zone, created_at))], len(messages)
        count = orjson.loads(head.value)["last_number"]
        last = min(len(messages), count)
        if last and self._mark_of(id, last) not in (mark_of(messages[last - 1]), b""):
            raise _Broken("a conversation with this id is there, with other messages; nothing of the file was taken")
        if len(messages) <= count:
            # Taken before, by a start that was broken off before the file was moved.
            return [], 0
        return _appends(id, _made(messages[count:], zone, updated_at)), len(messages) - count

    def _mirrored_ops(self, id: str, old: _OldFile, created_at: str) -> list[AnyOp]:
        """What follows the conversation itself, as our mirror shows it in *old*."""
        try:
            messages = [message for _, message in messages_shown(old.content, self._rules.zone, created_at)]
        except (TypeError, ValueError) as error:
            raise _Broken(str(error)) from error
        ops = _appends(id, messages)
        beside = shown_beside(old.content)
        if beside is not None and beside.archived:
            ops.append(ConversationArchive(id=id))
        if beside is not None and beside.hold:
            ops.append(ConversationHold(id=id, reason=beside.hold_reason))
        return ops

    def _mark_of(self, id: str, number: int) -> bytes:
        """The mark of the message *number*; empty when it was let go."""
        found = self._engine.transcripts.messages(id, limit=1, before=number + 1).items
        return mark_of(old_message(orjson.loads(found[-1].value))) if found and found[-1].id == str(number) else b""

    def _take_escalations(self, id: str, files: list[_OldFile]) -> None:
        zone = self._rules.zone
        for old in sorted(files, key=lambda old: moment(old.content.get("timestamp"), zone) or ""):
            try:
                ops = self._escalation_ops(id, old)
                self._submit(id, ops)
            except (_Broken, RecursionError) as error:
                self._set_aside(old.place, old.name, str(error))
                continue
            self._escalations += bool(ops)
            self._done[old.place].append(old.name)

    def _escalation_ops(self, id: str, old: _OldFile) -> list[AnyOp]:
        fields = escalation_fields(old.content, self._rules.zone)
        fields["opened_at"] = opened_at = fields["opened_at"] or old.written_at
        ops: list[AnyOp] = []
        head = self._engine.get(CONVERSATIONS, id)
        if head is None:
            # What this run began is not to be seen yet.
            if id not in self._begun:
                ops.append(ConversationPut(id=id, if_version=0, value={"created_at": opened_at}))
        elif self._engine.get(ESCALATIONS, id) is not None or OLD_ESCALATION in orjson.loads(head.value):
            return []
        # Who had taken it over is not known any more, but that somebody was waited for.
        if is_waiting(old.content) or (old.is_mirrored and old.content.get("status") == "claimed"):
            return [*ops, EscalationOpen(id=id, **fields)]
        # Nobody waits any more, and nobody may be made to wait again.
        said = {name: value for name, value in old.content.items() if name not in ("_holdfast", KEPT)}
        kept = {OLD_ESCALATION: contact_of(said), "escalated": True}
        return [*ops, ConversationPut(id=id, value=kept)]

    def _submit(self, id: str, ops: list[AnyOp]) -> None:
        if not ops:
            return
        try:
            self._tickets.append(self._engine.submit_batch(Batch(ops=ops, atomic=True), durability="always"))
        except (StorageFull, Unavailable):
            raise
        except HoldfastError as error:
            raise _Broken(str(error)) from error
        self._begun.add(id)
        if len(self._tickets) >= IN_FLIGHT_MAX:
            self._settle()

    def _settle(self) -> None:
        for ticket in self._tickets:
            ticket.wait()
        self._tickets.clear()

    # Keeping.

    def _move(self) -> int:
        """Move what was taken out of the way; how many files."""
        moved = 0
        for place, names in self._done.items():
            if not names:
                continue
            with (
                self._data.subdirectory("backups") as backups,
                backups.subdirectory(f"imported-{self._stamp}") as imported,
                imported.subdirectory(place) as kept,
            ):
                self._places[place].move_all(names, kept)
            moved += len(names)
        return moved

    def _set_aside(self, place: str, name: str, reason: str) -> None:
        """Move the file to ``quarantine/``, with a report."""
        self._broken += 1
        # A name need not be text.
        shown = os.fsencode(f"{place}/{name}").decode("utf-8", "backslashreplace")
        self._log.error("conversation.import_failed", reason=f"{shown}: {reason}")
        new_name = f"{self._stamp}-{place}-{short_name(name)}"
        with self._data.subdirectory("quarantine") as quarantine:
            report = {"file": shown, "reason": reason, "at": self._stamp}
            quarantine.write_atomic(f"{new_name}.report.json", [msgspec.json.encode(report) + b"\n"])
            self._places[place].move(name, quarantine, new_name)


def short_name(name: str) -> str:
    """*name*, cut when it is long; then still no other's."""
    raw = os.fsencode(name)
    if len(raw) <= NAME_BYTES_MAX:
        return name
    mark = hashlib.blake2b(raw, digest_size=16).hexdigest()
    return f"{os.fsdecode(raw[: NAME_BYTES_MAX - len(mark) - 1])}~{mark}"


class _Glance(msgspec.Struct):
    """Of a conversation what tells which one it is."""

    id: Any = None
    updated_at: Any = None


def _glance(directory: Directory, name: str, size: int) -> dict[str, Any]:
    """As ``_read``, but only what tells which conversation it is; for a file that nobody else could read, all of it."""
    if size <= FILE_BYTES_MAX:
        with suppress(OSError, ValueError, RecursionError):
            return msgspec.structs.asdict(msgspec.json.decode(directory.read(name), type=_Glance))
    return _read(directory, name, size)


def _read(directory: Directory, name: str, size: int) -> dict[str, Any]:
    if size > FILE_BYTES_MAX:
        raise _Broken(f"{size} bytes are more than a conversation can have")
    try:
        raw = directory.read(name)
    except OSError as error:
        raise _Broken(f"it cannot be read: {error.strerror}") from error
    try:
        # Not orjson, which rounds integers beyond 64 bits.
        content = json.loads(raw.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise _Broken(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _Broken(f"expected a JSON object, found {type(content).__name__}")
    return content


def _made(messages: list[Any], zone: tzinfo, created_at: str | None) -> list[Message]:
    return [message_of(old, zone, created_at) for old in messages]


def _appends(id: str, messages: list[Message]) -> list[AnyOp]:
    return [
        MessageAppend(id=id, messages=messages[start : start + APPEND_AT_ONCE])
        for start in range(0, len(messages), APPEND_AT_ONCE)
    ]
