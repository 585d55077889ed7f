"""The storage functions of chatbots that keep a JSON file for each conversation, with Holdfast beneath them.

A bot changes one import, and keeps its functions and its dictionaries::

    from holdfast.compat import chatbot_storage as storage

    conversation = storage.load_conversation("web-17") or {"messages": []}
    conversation["messages"].append({"role": "user", "content": "Hola"})
    storage.save_conversation("web-17", conversation["messages"])

The first call opens the data directory: the one of ``configure``, else the environment's ``DATA_DIR``, else ``data``. What
an old bot left in it is taken over. When a daemon holds it, its socket is used instead; so several processes of a bot need
a daemon. ``use`` takes what a program has opened itself.

Times are as such bots write them: ISO 8601 without a zone, local (``stats.timezone`` of what is open in this process, and
this machine's zone otherwise), to the millisecond. One that an old file says otherwise is shown as it says it, until it changes.

Errors are those of files: ``OSError`` with ``errno`` 28 (no room), 13 (no permission), 16 (held by another process), 22
(cannot be kept), 27 (too large), 1 (under a legal hold), 5 (anything else), and the reason as ``strerror``.

All functions may be called from any thread.
"""

from __future__ import annotations

import atexit
import errno
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from zoneinfo import ZoneInfo

import orjson

from holdfast.blocking import Holdfast
from holdfast.care.old_layout import (
    BEGINNING,
    OLD_ESCALATION,
    ORIGINAL,
    bots_fields,
    contact_of,
    local_time,
    mark_of,
    message_of,
    old_contact,
    old_escalation,
    old_message,
    old_timestamp,
    originals,
    own_fields,
    shown_time,
)
from holdfast.client.sync import connect
from holdfast.clock import format_ms
from holdfast.compat.saved_list import (
    LEAD_MAX,
    TAIL,
    Beginning,
    Continuation,
    Known,
    beginning_of,
    common_before,
    end_in,
    fits,
    is_system,
    known_after,
    marks_of,
    matches,
    system_lead,
)
from holdfast.embedded import Embedded
from holdfast.embedded import open as open_embedded
from holdfast.errors import (
    BadRequest,
    Conflict,
    DataRefused,
    DirectoryLocked,
    Forbidden,
    HoldfastError,
    InvalidRecord,
    NotFound,
    StorageFull,
    TooLarge,
    Unauthorized,
    VersionMismatch,
)
from holdfast.ops import Message, Record

__all__ = [
    "cleanup_old_sessions",
    "close",
    "configure",
    "delete_conversation",
    "delete_user",
    "list_conversations",
    "list_escalations",
    "load_conversation",
    "load_escalation",
    "load_user",
    "save_conversation",
    "save_escalation",
    "save_user",
    "update_user",
    "use",
]

P = ParamSpec("P")
R = TypeVar("R")

Messages = list[Any]
"""Dictionaries with ``role`` and ``content``, and whatever the bot adds."""

APPEND_AT_ONCE = 1_000
"""Messages in one op; more of them stand in the same batch."""

REMEMBERED_MAX = 10_000
"""Conversations of which it is remembered how they end; of others that is read before the first save."""

LOAD_TRIES = 50
"""Of a conversation that others save all the time, before what was read last is good enough."""

READ_AT_ONCE = 1_000
"""Messages of one page."""

ATTEMPTS = 10
"""Of a save, when somebody else changes the conversation at the same time."""

REMOVE_AT_ONCE = 200
"""Conversations removed between two waits for the disk."""

_LOCKS = 64

_ERRNO_OF: dict[type[HoldfastError], int] = {
    StorageFull: errno.ENOSPC,
    DataRefused: errno.EACCES,
    Forbidden: errno.EACCES,
    Unauthorized: errno.EACCES,
    DirectoryLocked: errno.EBUSY,
    InvalidRecord: errno.EINVAL,
    BadRequest: errno.EINVAL,
    TooLarge: errno.EFBIG,
    Conflict: errno.EPERM,
}


class _Shared:
    """What all functions of this module share: one Holdfast, opened when it is first used."""

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._data_dir: str | None = None
        self._settings: dict[str, Any] = {}
        self._holdfast: Holdfast | None = None
        self._is_ours = False
        self._zone: ZoneInfo | None = None
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def holdfast(self) -> Holdfast:
        """The one in use, opened now when there is none."""
        found = self._holdfast
        if found is not None:
            return found
        with self._guard:
            if self._holdfast is None:
                self._holdfast, self._is_ours = self._open(), True
            return self._holdfast

    def zone(self) -> ZoneInfo:
        """The zone of times that name none."""
        found = self._zone
        if found is None:
            holdfast = self.holdfast()
            name = holdfast.engine.settings.stats.timezone if isinstance(holdfast, Embedded) else system_zone()
            found = self._zone = ZoneInfo(name)
        return found

    def use(self, holdfast: Holdfast | None, data_dir: str | None, settings: dict[str, Any]) -> None:
        """Take another one, or open one in *data_dir* when it is needed; the one so far is closed when it is ours."""
        with self._guard:
            before, was_ours = self._holdfast, self._is_ours
            self._holdfast, self._is_ours, self._zone = holdfast, False, None
            self._data_dir, self._settings = data_dir, settings
            self._known.clear()
            if before is not None and was_ours and before is not holdfast:
                before.close()

    def close(self) -> None:
        """Close the one in use when it is ours; the next call opens it again."""
        self.use(None, self._data_dir, self._settings)

    def forget_in_child(self) -> None:
        """In a forked child: what is open belongs to the parent, who may have held the locks; what was chosen stays so."""
        # What the program has opened says itself that it is no good here; to open another place would be worse.
        given = None if self._is_ours else self._holdfast
        data_dir, settings = self._data_dir, self._settings
        self.__init__()  # type: ignore[misc]
        self._holdfast, self._data_dir, self._settings = given, data_dir, settings

    def lock_of(self, id: str) -> threading.Lock:
        """Held by whoever saves the conversation *id*, in this process."""
        return self._locks[hash(id) % _LOCKS]

    def known(self, id: str) -> Known | None:
        """What is remembered of the conversation *id*; under its lock."""
        return self._known.get(id)

    def remember(self, id: str, known: Known | None) -> None:
        """Remember *known* instead, or nothing; under the lock of *id*."""
        with self._guard:
            self._known.pop(id, None)
            if known is not None:
                self._known[id] = known
                if len(self._known) > REMEMBERED_MAX:
                    self._known.popitem(last=False)

    def _open(self) -> Holdfast:
        data_dir = self._data_dir or os.environ.get("DATA_DIR") or "data"
        settings = dict(self._settings)
        settings["stats"] = {"timezone": system_zone()} | dict(settings.get("stats", {}))
        try:
            return open_embedded(data_dir, **settings)
        except DirectoryLocked as locked:
            address = f"unix:{Path(data_dir) / 'holdfast.sock'}"
            try:
                remote = connect(address)
                try:
                    remote.status()
                except BaseException:
                    remote.close()
                    raise
            except HoldfastError as error:
                raise DirectoryLocked(
                    f"{locked}. Nor does a daemon answer at {address} ({error}); several processes need one: run "
                    f"holdfast serve --data-dir {data_dir}"
                ) from error
            return remote


_shared = _Shared()
atexit.register(lambda: _shared.close())
os.register_at_fork(after_in_child=lambda: _shared.forget_in_child())


def _with_errors_of_files(function: Callable[P, R]) -> Callable[P, R]:
    """*function*, with what Holdfast refuses told as the errors that code for files handles."""

    @wraps(function)
    def told(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return function(*args, **keywords)
        except HoldfastError as error:
            raise OSError(_errno_of(error), str(error)) from error

    return told


@_with_errors_of_files
def configure(data_dir: str | os.PathLike[str] | None = None, **settings: Any) -> None:
    """Keep everything in *data_dir* from now on, with *settings* as of ``holdfast.open``; nothing is opened yet.

    What was open so far is closed, unless ``use`` gave it. A daemon that holds the directory has settings of its own.
    """
    _shared.use(None, None if data_dir is None else os.fspath(data_dir), settings)


@_with_errors_of_files
def use(holdfast: Holdfast) -> None:
    """Use *holdfast*, of ``holdfast.open`` or ``holdfast.connect``, from now on; whoever opened it closes it."""
    _shared.use(holdfast, None, {})


@_with_errors_of_files
def close() -> None:
    """Write everything to the files and give the directory back, as the end of the process does; a later call opens it again."""
    _shared.close()


# Conversations.


@_with_errors_of_files
def save_conversation(
    conversation_id: str, messages: Messages, escalated: bool = False, title: str | None = None
) -> dict[str, Any]:
    """Have the conversation hold *messages*; returns it as ``load_conversation`` would, with the list that was given.

    A list that begins with what is stored only grew, and its new messages are appended: that costs the same however long the
    conversation is, since the number of messages, the first ones and the last ones (8) are compared. Its first messages of
    the system may differ each time, as a prompt with the time of day does: with which ones the list begins (8 at most, 64 KiB)
    is a field of the conversation, and the transcript keeps those that it began with. Whoever changes an earlier message, and
    appends at the same time, is not noticed until the next save without new messages.

    Any other list (shortened, or edited) replaces the conversation, which costs as much as the list is long. Messages that it
    still has keep the time, tokens, author, external id and metadata that they have; a new one between them, unless it has a
    ``timestamp``, is as old as the next of them.

    A legal hold lets nothing be replaced. A list whose beginning was cut off, or has other messages (8 at most) instead, is
    shown as it was saved, while what it lacks is kept. For any other change there is OSError 1, each time; the new messages
    behind the last that is stored, of which the list must still have one of the last 8, are stored all the same.

    ``created_at`` is kept, ``updated_at`` is now. A message's own ``timestamp`` is when it was created, else now is.

    Args:
        messages: dictionaries with ``role`` and ``content``, and anything else that JSON holds; kept as they are.
        escalated: whether somebody is to take over. A conversation whose escalation is open stays escalated.
        title: without one it keeps its title, or gets the beginning of the first user message.
    """
    id = str(conversation_id)
    given = messages if isinstance(messages, list) else list(messages)
    holdfast = _shared.holdfast()
    with _shared.lock_of(id):
        for attempt in range(1, ATTEMPTS + 1):
            save = _Save(holdfast, id, given, bool(escalated), title)
            try:
                known = save.do()
            except BaseException as error:
                _shared.remember(id, None)
                if isinstance(error, VersionMismatch) and attempt < ATTEMPTS:
                    continue
                raise
            _shared.remember(id, known)
            break
    head = holdfast.conversations.head(id, {})
    return _conversation(head, given) if head else {"id": id, "messages": given}


@_with_errors_of_files
def load_conversation(conversation_id: str) -> dict[str, Any] | None:
    """The conversation with all its messages, or None: ``id``, ``created_at``, ``updated_at``, ``title``, ``messages``,
    ``escalated``, and whatever else an old file or another program gave it."""
    id = str(conversation_id)
    holdfast = _shared.holdfast()
    head = holdfast.conversations.head(id) if _is_id(id) else None
    if head is None:
        return None
    for _ in range(LOAD_TRIES):
        try:
            messages = _shown_messages(holdfast, head)
        except NotFound:  # removed meanwhile
            return None
        now = holdfast.conversations.head(id)
        if now is None:
            return None
        if now == head:
            break
        # Saved meanwhile, perhaps with another beginning: one without the other was never a list.
        head = now
    return _conversation(head, messages)


@_with_errors_of_files
def list_conversations() -> list[dict[str, Any]]:
    """Of every conversation ``id``, ``title``, ``created_at``, ``updated_at``, ``escalated`` and ``message_count``, which does
    not count messages of the system; the one that was updated last comes first."""
    holdfast = _shared.holdfast()
    heads = (orjson.loads(record.value) for record in holdfast.conversations.list())
    return [
        {
            "id": head["id"],
            "title": head["title"],
            "created_at": _time(head, "created_at"),
            "updated_at": _time(head, "updated_at"),
            "escalated": head["escalated"],
            "message_count": _message_count(holdfast, head),
        }
        for head in heads
    ]


@_with_errors_of_files
def delete_conversation(conversation_id: str) -> bool:
    """Remove the conversation with its escalation; whether there was one. OSError 1 when a legal hold keeps it."""
    id = str(conversation_id)
    if not _is_id(id):
        return False
    with _shared.lock_of(id):
        _shared.remember(id, None)
        try:
            _shared.holdfast().conversations.delete(id)
        except NotFound:
            return False
    return True


@_with_errors_of_files
def cleanup_old_sessions(timeout_hours: float = 24) -> dict[str, int]:
    """Remove the conversations not updated for *timeout_hours*: how many were ``deleted``, how many could not be (``errors``).

    Those under a legal hold are kept, and counted in neither.

    Raises:
        ValueError: fewer than 0 hours.
    """
    if not timeout_hours >= 0:
        raise ValueError(f"timeout_hours must be 0 or more, found {timeout_hours!r}")
    timeout_ms = timeout_hours * 3_600_000
    if math.isinf(timeout_ms):
        return {"deleted": 0, "errors": 0}
    holdfast = _shared.holdfast()
    before_ms = max(0, int(time.time() * 1000 - timeout_ms))
    deleted = errors = 0
    waiting: list[Record] = []
    for record in holdfast.conversations.list(until_ms=before_ms):
        waiting.append(record)
        if len(waiting) == REMOVE_AT_ONCE:
            some, failed = _remove(holdfast, waiting)
            deleted, errors, waiting = deleted + some, errors + failed, []
    some, failed = _remove(holdfast, waiting)
    return {"deleted": deleted + some, "errors": errors + failed}


# Escalations.


@_with_errors_of_files
def save_escalation(
    conversation_id: str, reason: str, contact_info: Any = None, priority: str = "low"
) -> dict[str, Any] | None:
    """Have the customer of the conversation wait for a human; a second call updates what is open. Returns the escalation.

    A conversation that does not exist comes into being without messages.

    Args:
        contact_info: how the customer is reached; a dictionary, or anything else that JSON holds.
        priority: low, high.
    """
    id = str(conversation_id)
    holdfast = _shared.holdfast()
    before = holdfast.escalations.get(id) if _is_id(id) and contact_info is not None else None
    # The time that an old file gave stands there, and goes on to be shown.
    contact: Any = contact_of(contact_info, old_timestamp(before["contact_info"]) if before else None)
    said: Any = priority
    try:
        holdfast.escalations.open(id, reason, contact, said)
    except NotFound:
        try:
            with holdfast.atomic():
                holdfast.conversations.put(id, {}, if_version=0)
                holdfast.escalations.open(id, reason, contact, said)
        except VersionMismatch:  # made meanwhile
            holdfast.escalations.open(id, reason, contact, said)
    return load_escalation(id)


@_with_errors_of_files
def load_escalation(conversation_id: str) -> dict[str, Any] | None:
    """The escalation of the conversation, or None: ``conversation_id``, ``timestamp``, ``reason``, ``contact_info``,
    ``priority``, ``status``."""
    id = str(conversation_id)
    if not _is_id(id):
        return None
    holdfast = _shared.holdfast()
    escalation = holdfast.escalations.get(id)
    if escalation is not None:
        return _escalation(escalation)
    head = holdfast.conversations.head(id)
    return None if head is None or OLD_ESCALATION not in head else old_contact(head[OLD_ESCALATION])


@_with_errors_of_files
def list_escalations() -> list[dict[str, Any]]:
    """All escalations: those of high priority first, then the one that was opened first; closed ones of old files last."""
    holdfast = _shared.holdfast()
    found = [_escalation(orjson.loads(record.value)) for record in holdfast.escalations.list()]
    has_one = {escalation["conversation_id"] for escalation in found}
    for record in holdfast.conversations.list(escalated=True):
        if record.id not in has_one:
            old = orjson.loads(record.value).get(OLD_ESCALATION)
            if old is not None:
                found.append(old_contact(old))
    return found


# Users.


@_with_errors_of_files
def save_user(user_id: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Store the profile whole, with ``user_id``, ``created_at`` (kept once it is there) and ``updated_at``; returns it."""
    given = dict(data)

    def replaced(profile: dict[str, Any]) -> dict[str, Any]:
        now = _now()
        begun = profile.get("created_at") or given.get("created_at") or now
        return (
            {"user_id": str(user_id), "created_at": begun}
            | given
            | {
                "user_id": str(user_id),
                "created_at": begun,
                "updated_at": now,
            }
        )

    return _changed_user(str(user_id), replaced, {})


@_with_errors_of_files
def load_user(user_id: str) -> dict[str, Any] | None:
    """The profile, or None."""
    found: dict[str, Any] | None = _shared.holdfast().users.get(str(user_id)) if _is_id(str(user_id)) else None
    return found


@_with_errors_of_files
def update_user(user_id: str, updates: Mapping[str, Any]) -> dict[str, Any] | None:
    """Set the fields *updates* of the profile, and ``updated_at``; returns it, or None when there is none."""
    if not _is_id(str(user_id)):
        return None
    given = dict(updates)

    def updated(profile: dict[str, Any]) -> dict[str, Any]:
        return profile | given | {"user_id": profile.get("user_id", str(user_id)), "updated_at": _now()}

    try:
        return _changed_user(str(user_id), updated, None)
    except NotFound:
        return None


@_with_errors_of_files
def delete_user(user_id: str) -> bool:
    """Remove the profile; whether there was one."""
    if not _is_id(str(user_id)):
        return False
    try:
        _shared.holdfast().users.delete(str(user_id))
    except NotFound:
        return False
    return True


def system_zone() -> str:
    """The zone of this machine by its name, as the environment's ``TZ`` or ``/etc/localtime`` has it; UTC when neither tells."""
    for name in (os.environ.get("TZ", "").lstrip(":"), os.path.realpath("/etc/localtime").partition("/zoneinfo/")[2]):
        try:
            return ZoneInfo(name).key
        except (KeyError, ValueError, OSError):
            continue
    return "UTC"


class _Save:
    """One attempt to have a conversation hold a list of messages."""

    def __init__(self, holdfast: Holdfast, id: str, messages: Messages, is_escalated: bool, title: str | None) -> None:
        self._holdfast = holdfast
        self._conversations = holdfast.conversations
        self._id = id
        self._messages = messages
        # Whoever appends to the list meanwhile has his message saved the next time.
        self._count = len(messages)
        self._is_escalated = is_escalated
        self._title = title

    def do(self) -> Known | None:
        """Save; what is to be remembered of the conversation.

        Raises:
            VersionMismatch: somebody else changed it meanwhile; nothing was done.
        """
        record = self._conversations.record(self._id) if _is_id(self._id) else None
        if record is None:
            return self._create()
        head = orjson.loads(record.value)
        known = _shared.known(self._id)
        if known is None or (known.version, known.created_at) != (record.version, head["created_at"]):
            known = self._look(record, head)
        at = known.goes_on_at(self._messages, self._count)
        if at is not None and at.end == self._count and known.rest > TAIL + 1 and not self._is_same(known, at):
            at = None
        if at is not None:
            try:
                return self._go_on(record, head, known, at)
            except TooLarge:
                # The head may have no room for another beginning; what is too large by itself is refused below as well.
                if not at.is_other:
                    raise
        if head.get("hold"):
            return self._go_on_held(record, head, known, Conflict(f"conversation {self._id!r} is under a legal hold"))
        try:
            return self._replace(record, head)
        except Conflict as error:  # its person is under a legal hold
            return self._go_on_held(record, head, known, error)

    def _look(self, record: Record, head: dict[str, Any]) -> Known:
        """How the conversation begins and ends, as it is stored."""
        stored = head["message_count"] + head["system_count"]
        known = Known(record.version, head["created_at"], stored, head["last_number"])
        beginning = beginning_of(head)
        if beginning is not None:
            lead = marks_of(beginning.messages)
            known = known._replace(after=beginning.after, lead=lead, hidden=beginning.hidden)
        try:
            if beginning is None and stored and not known.let_go:
                oldest = [
                    _old(item) for item in self._conversations.message_page(self._id, limit=LEAD_MAX, after=0).items
                ]
                after = system_lead(oldest, len(oldest))
                known = known._replace(after=after, lead=marks_of(oldest[:after]))
            if not known.rest:
                return known
            after = max(known.after, known.let_go)
            first = self._conversations.message_page(self._id, limit=1, after=after).items
            last = self._conversations.message_page(self._id, limit=min(TAIL, known.rest)).items
        except NotFound as error:
            raise VersionMismatch(f"conversation {self._id!r} was removed meanwhile") from error
        if not first or not last:
            # The archive has lost them: no list goes on from there.
            return known._replace(last=(b"",))
        return known._replace(first=mark_of(_old(first[0])), last=tuple(mark_of(_old(item)) for item in last))

    def _is_same(self, known: Known, at: Continuation) -> bool:
        """Whether the messages from where *at* says are those that are stored."""
        stored = list(_stored_messages(self._holdfast, self._id, max(known.after, known.let_go)))
        given = self._messages[at.start : self._count]
        return len(stored) == len(given) and all(
            mark_of(one) == mark_of(other) for one, other in zip(stored, given, strict=True)
        )

    def _create(self) -> Known | None:
        chunks = self._chunks(0)
        with self._holdfast.atomic():
            self._conversations.put(self._id, self._changes({}), if_version=0)
            self._append_all(chunks)
        return self._remembered(1 + len(chunks))

    def _go_on(self, record: Record, head: dict[str, Any], known: Known, at: Continuation) -> Known:
        """Append what is new, and have the list begin as it does."""
        chunks = self._chunks(at.end)
        fields = self._changes(head)
        if not chunks or any(message.created_at is not None for message in chunks[-1]):
            # Else the newest message's time would be the conversation's.
            fields["updated_at"] = _now_exact()
        if at.is_other:
            beginning = Beginning(at.after, self._messages[: at.lead], at.hidden)
            fields[ORIGINAL] = originals(head) | {BEGINNING: beginning.field()}
        if not chunks:
            version = self._conversations.put(self._id, fields, if_version=record.version).version
        elif len(chunks) == 1 and not fields:
            version = self._conversations.append(self._id, messages=chunks[0], if_version=record.version).version
        else:
            version = record.version + len(chunks) + bool(fields)
            with self._holdfast.atomic():
                self._append_all(chunks, record.version)
                if fields:
                    self._conversations.put(self._id, fields)
        return known.after_save(version, self._messages, self._count, at)

    def _go_on_held(self, record: Record, head: dict[str, Any], known: Known, refused: Conflict) -> Known:
        """Append what is new of a list for which the conversation, under a legal hold, may not be replaced.

        Raises:
            Conflict: what else is different cannot be done; what is new was appended.
        """
        given = marks_of(self._messages[: self._count])
        newest = self._newest_first()
        tail = list(islice(newest, TAIL))
        found = end_in(given, tail)
        if found is None:
            raise refused
        end, skipped = found
        if not skipped:
            tail += islice(newest, max(0, end - TAIL))
            common = common_before(given, end, tail)
            start = end - common
            if fits(self._messages[:start]):
                shown = sum(not is_system(message) for message in self._messages[start:end])
                after, hidden = head["last_number"] - common, head["message_count"] - shown
                return self._go_on(record, head, known, Continuation(start, start, end, after, hidden, is_other=True))
        if end < self._count:
            self._append_all(self._chunks(end), record.version)
        raise Conflict(
            f"conversation {self._id!r} is under a legal hold, so no message of it is changed or left out; "
            f"{self._count - end} new ones were appended"
        ) from refused

    def _newest_first(self) -> Iterator[bytes]:
        """The marks of the stored messages."""
        before: str | None = None
        while True:
            page = self._conversations.message_page(self._id, limit=READ_AT_ONCE, before=before)
            for item in reversed(page.items):
                yield mark_of(_old(item))
            if page.next is None:
                return
            before = page.next

    def _replace(self, record: Record, head: dict[str, Any]) -> Known | None:
        """Let the conversation begin anew, with what it keeps beside its messages, and with those that are still the same."""
        chunks = _chunked(self._kept_messages())
        fields = own_fields(head) | {"created_at": head["created_at"], "updated_at": _now_exact()}
        if BEGINNING in originals(head):
            fields[ORIGINAL] = {key: value for key, value in originals(head).items() if key != BEGINNING} or None
        fields |= {"title": head["title"]} | self._changes({})
        escalation = self._holdfast.escalations.get(self._id)
        is_open = escalation is not None and escalation["status"] == "pending"
        if escalation is not None and not is_open:
            # It cannot be opened as what it is.
            fields[OLD_ESCALATION] = contact_of(_escalation(escalation))
        with self._holdfast.atomic():
            self._conversations.delete(self._id, if_version=record.version)
            self._conversations.put(self._id, fields)
            self._append_all(chunks)
            if is_open:
                self._holdfast.escalations.open(
                    self._id,
                    escalation["reason"],
                    escalation["contact_info"],
                    escalation["priority"],
                    opened_at=escalation["opened_at"],
                )
        # The versions go on where they were.
        return self._remembered(record.version + 1 + len(chunks) + is_open)

    def _kept_messages(self) -> list[Message]:
        """The list, each message that is stored as it is stored."""
        try:
            stored = list(self._conversations.messages(self._id))
        except NotFound as error:
            raise VersionMismatch(f"conversation {self._id!r} was removed meanwhile") from error
        given = self._messages[: self._count]
        found = matches([mark_of(old_message(message)) for message in stored], marks_of(given))
        zone = _shared.zone()
        made: list[Message] = []
        created_at: str | None = None
        for old, place in zip(reversed(given), reversed(found), strict=True):
            if place is None:
                made.append(message_of(old, zone, created_at))
            else:
                made.append(_as_stored(stored[place]))
                created_at = stored[place]["created_at"]
        return made[::-1]

    def _changes(self, head: dict[str, Any]) -> dict[str, Any]:
        """What is to be different in *head*."""
        fields: dict[str, Any] = {}
        if self._title is not None and self._title != head.get("title"):
            fields["title"] = self._title
        if self._is_escalated != head.get("escalated", False) and (self._is_escalated or not self._is_waiting(head)):
            fields["escalated"] = self._is_escalated
        return fields

    def _is_waiting(self, head: dict[str, Any]) -> bool:
        return bool(head.get("handler", "bot") != "bot")

    def _chunks(self, start: int) -> list[list[Message]]:
        zone = _shared.zone()
        return _chunked([message_of(message, zone) for message in self._messages[start : self._count]])

    def _append_all(self, chunks: list[list[Message]], version: int | None = None) -> None:
        for chunk in chunks:
            self._conversations.append(self._id, messages=chunk, if_version=version)
            version = None

    def _remembered(self, version: int) -> Known | None:
        """What the conversation is after it was made by a batch of its own."""
        head = self._conversations.head(self._id)
        if head is None:
            return None
        return known_after(version, head["created_at"], self._messages, self._count)


def _chunked(messages: list[Message]) -> list[list[Message]]:
    return [messages[start : start + APPEND_AT_ONCE] for start in range(0, len(messages), APPEND_AT_ONCE)]


def _as_stored(message: Mapping[str, Any]) -> Message:
    """What makes *message*, as our API shows it, once more."""
    return Message(
        role=message["role"],
        content=message["content"],
        tokens_used=message["tokens_used"],
        author=message["author"],
        metadata=message["metadata"] or None,
        created_at=message["created_at"],
    )


def _stored_messages(holdfast: Holdfast, id: str, after: int) -> Iterator[Any]:
    """Those after the number *after*, in the old bot's form."""
    while True:
        page = holdfast.conversations.message_page(id, limit=READ_AT_ONCE, after=after)
        yield from map(_old, page.items)
        if page.next is None:
            return
        after = int(page.next)


def _shown_messages(holdfast: Holdfast, head: Mapping[str, Any]) -> Messages:
    """The messages of the conversation with this *head*, as they were saved."""
    beginning = beginning_of(head) or Beginning(0, [])
    return [*beginning.messages, *_stored_messages(holdfast, head["id"], beginning.after)]


def _message_count(holdfast: Holdfast, head: Mapping[str, Any]) -> int:
    """How many of these are not the system's."""
    beginning = beginning_of(head)
    count: int = head["message_count"]
    if beginning is None:
        return count
    hidden = beginning.hidden
    if hidden and count + head["system_count"] < head["last_number"]:
        hidden = _still_hidden(holdfast, head["id"], beginning.after)
    return count - hidden + sum(not is_system(message) for message in beginning.messages)


def _still_hidden(holdfast: Holdfast, id: str, after: int) -> int:
    """How many messages up to the number *after*, not the system's, retention has not let go since they were hidden."""
    count = 0
    try:
        for message in holdfast.conversations.messages(id):
            if message["number"] > after:
                break
            count += message["role"] != "system"
    except NotFound:  # removed meanwhile
        pass
    return count


def _conversation(head: dict[str, Any], messages: Messages) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": head["id"],
        "created_at": _time(head, "created_at"),
        "updated_at": _time(head, "updated_at"),
        "title": head["title"],
        "messages": messages,
        "escalated": head["escalated"],
    }
    return shown | bots_fields(head)


def _escalation(escalation: dict[str, Any]) -> dict[str, Any]:
    shown = old_escalation(escalation)
    timestamp = old_timestamp(escalation["contact_info"])
    return shown | {"timestamp": shown_time(shown["timestamp"], timestamp, _shared.zone())}


def _time(head: Mapping[str, Any], field: str) -> str:
    return shown_time(head[field], originals(head).get(field), _shared.zone())


def _remove(holdfast: Holdfast, records: list[Record]) -> tuple[int, int]:
    """Remove the conversations of *records*, each as it was seen: how many are gone, how many could not be removed."""
    wanted = [record for record in records if not orjson.loads(record.value).get("hold")]
    if not wanted:
        return 0, 0
    try:
        with holdfast.pipeline():
            for record in wanted:
                holdfast.conversations.delete(record.id, if_version=record.version)
        return len(wanted), 0
    except HoldfastError:
        pass  # which ones it was shows when each is asked for alone
    deleted = errors = 0
    for record in wanted:
        try:
            holdfast.conversations.delete(record.id, if_version=record.version)
            deleted += 1
        except (NotFound, VersionMismatch):
            # Removed just before, or written to by somebody.
            deleted += not holdfast.conversations.contains(record.id)
        except Conflict:
            continue  # its person is under a legal hold
        except HoldfastError:
            errors += 1
    return deleted, errors


def _changed_user(
    id: str, change: Callable[[dict[str, Any]], dict[str, Any]], default: dict[str, Any] | None
) -> dict[str, Any]:
    profile: dict[str, Any] = {}

    def noted(value: dict[str, Any]) -> dict[str, Any]:
        nonlocal profile
        profile = change(value)
        return profile

    _shared.holdfast().users.update(id, noted, default=default)
    return profile


def _old(item: Record) -> Any:
    """A stored message in the old bot's form."""
    return old_message(orjson.loads(item.value))


def _is_id(id: str) -> bool:
    """Whether there could be a record *id*."""
    return bool(id) and id.isprintable()


def _now() -> str:
    return local_time(_now_exact(), _shared.zone())


def _now_exact() -> str:
    return format_ms(time.time_ns() // 1_000_000)


def _errno_of(error: HoldfastError) -> int:
    if isinstance(error.__context__, PermissionError):
        return errno.EACCES
    return next((number for kind, number in _ERRNO_OF.items() if isinstance(error, kind)), errno.EIO)
