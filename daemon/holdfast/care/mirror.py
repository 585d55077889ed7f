"""The readable mirror: each conversation, and each escalation, as one JSON file in the layout of the old bots.

A view for people and their tools, written after each flush for what changed since the one before. Nothing waits for it:
what cannot be written is told, kept in mind, and tried again after the next flush. It is read back only where nothing else
has what it shows, which is why each file also says what the old layout has no place for (``Shown``).

What is still to be written stands in ``_mirror.json``, which is written before the snapshots of a flush are in place; so
after a crash the changes up to its seq are known from there, and those above it from the journal.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import tzinfo
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import orjson

from holdfast.care.old_layout import KEPT, message_of, moment, old_escalation, old_message, own_fields
from holdfast.core.backlog import Backlog
from holdfast.core.conversations import AUTHORS, text_or_empty
from holdfast.core.state import CONVERSATIONS, ESCALATIONS
from holdfast.disk.files import Directory
from holdfast.errors import HoldfastError, NotFound
from holdfast.ops import Author, Message, Record
from holdfast.transcripts import PAGE_MAX, Transcripts

STATE_FILE = "_mirror.json"
CONVERSATIONS_PLACE = "conversations"
ESCALATIONS_PLACE = "escalations"
ESCALATION_ENDING = "_escalation.json"

WAIT_S = 5.0
"""What a flush, also the last one, waits for the mirror; it goes on by itself, or after the next start."""

AT_ONCE = 100
"""Files that share one sync of their directory."""

PENDING_MAX = 10_000
"""Ids that the state file names; with more to do, everything is looked through instead."""

NAME_BYTES_MAX = 200
"""Of a file name without its ending; file systems take 255 bytes, the ending and a temporary name included."""

_PLAIN = re.compile(rb"[A-Za-z0-9_@+=,-][A-Za-z0-9_@+=,.-]*")
_ESCAPED = re.compile(rb"^\.|[^A-Za-z0-9_@+=,.-]")
_CUT_BYTES = 150
_MARK = re.compile(rb'"_holdfast": ?\{"seq": ?\d+\}\s*\}\s*\Z')
_MARK_BYTES = 64


class Source(NamedTuple):
    """What the mirror shows, of the engine.

    Attributes:
        lock: the engine's, under which *backlog* is used.
        backlog: notes which conversations were touched.
        get: a record of memory in its last durable state.
        ids: of all records of a collection.
        transcripts: the messages.
        stamp: the time that names of directories in ``backups/`` end with.
        lineage: whose seqs these are, as of the manifest.
        born_of: with which event a conversation began; None when there is none.
    """

    lock: threading.Lock
    backlog: Backlog
    get: Callable[[str, str], Record | None]
    ids: Callable[[str], Iterable[str]]
    transcripts: Transcripts
    stamp: Callable[[], str]
    lineage: str
    born_of: Callable[[str], int | None]


class ShownMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a file says of one message beside the old layout."""

    number: int
    created_at: str
    tokens_used: int | None = None
    author: str | None = None


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of its conversation beside the old layout.

    Attributes:
        lineage: of the directory that it was written in.
        messages: one for each that it shows.
        archived, hold, hold_reason: as of the conversation.
    """

    lineage: str
    messages: list[ShownMessage]
    archived: bool = False
    hold: bool = False
    hold_reason: str | None = None


class _State(msgspec.Struct, omit_defaults=True):
    """The content of ``_mirror.json``.

    Attributes:
        seq: of all that changed up to here, only *pending* is not in the mirror yet.
        pending: conversations; None for all of them.
        lineage: of the directory, as long as every conversation that it ever had and has no more was deleted; empty when
            some may have been lost.
        is_adopting: files of the mirror are being taken over; what of them is there yet was not deleted.
    """

    seq: int
    pending: list[str] | None
    lineage: str = ""
    is_adopting: bool = False


class Mirror:
    """Writes the mirror of one engine, in a thread of its own; from ``start`` to ``close``.

    Attributes:
        failure: why something could not be written; None when all was.
    """

    def __init__(self, data_dir: Path, source: Source, trusted_seq: int | None, last_seq: int, log: Any) -> None:
        """Go on in *data_dir*, whose journal ends at *last_seq*; *trusted_seq* as of ``Engine.start_mirror``."""
        self.failure: str | None = None
        self._data_dir = data_dir
        self._source = source
        self._log = log
        self._changed = threading.Condition()
        self._state_guard = threading.Lock()
        self._seq = 0
        self._pending: set[str] = set()
        # Of these, those that are being written.
        self._under_way: set[str] = set()
        self._is_all = True
        self._is_tidy = False
        # Flushes, counted: two may have the same seq, and the second one tries again what failed after the first.
        self._wanted = self._done = 0
        self._flushed_seq = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="holdfast-mirror", daemon=True)
        state = _read_state(data_dir)
        # Whether a file of a conversation that is not there tells of one that was deleted, and not of one that was lost.
        self._knows_deleted = (
            state is not None and state.seq <= last_seq and bool(source.lineage) and state.lineage == source.lineage
        )
        # Older than the snapshots: it was switched off, and what changed meanwhile is not known. Newer than the journal:
        # this is another history.
        if (
            state is not None
            and trusted_seq is not None
            and trusted_seq <= state.seq <= last_seq
            and state.pending is not None
        ):
            self._seq, self._pending, self._is_all = state.seq, set(state.pending), False

    def start(self) -> None:
        """Begin; nothing is written before the next flush."""
        self._thread.start()

    def begin(self, seq: int) -> None:
        """A flush with all changes up to *seq* is about to put its files into place. Never raises."""
        source = self._source
        with source.lock:
            touched = source.backlog.touched or {}
            # What changed behind seq as well is written now, and once more after the next flush.
            source.backlog.touched = {id: at for id, at in touched.items() if at > seq}
        with self._changed:
            self._pending.update(touched)
            self._seq = max(self._seq, seq)
        try:
            self._write_state()
        except (HoldfastError, OSError) as error:
            self._note_failure(str(error))

    def flushed(self, seq: int) -> None:
        """That flush succeeded: write, and return when it is done, or WAIT_S have passed. Never raises."""
        if not self._thread.is_alive():
            return
        with self._changed:
            self._flushed_seq = seq
            wanted = self._wanted = self._wanted + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closing or self._done >= wanted, WAIT_S)

    def close(self) -> None:
        """End after the files under way; the rest is done after the next start."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # The thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closing or self._wanted > self._done)
                if self._is_closing:
                    return
                wanted, seq = self._wanted, self._flushed_seq
            try:
                reason = self._write_all(seq)
                self._write_state()
            except (HoldfastError, OSError) as error:
                reason = str(error)
            except Exception as error:  # a fault of ours must not end it for good
                reason = repr(error)
                self._log.exception("mirror.failed", reason=reason)
            self._note_failure(reason)
            with self._changed:
                self._done = wanted
                self._changed.notify_all()

    def _write_all(self, seq: int) -> str | None:
        """Write what is pending; why some of it could not be, or None."""
        reason: str | None = None
        with (
            Directory(self._data_dir) as data,
            data.subdirectory(CONVERSATIONS_PLACE) as conversations,
            data.subdirectory(ESCALATIONS_PLACE) as escalations,
        ):
            if not self._is_tidy:
                # What an earlier process left half written.
                conversations.remove_stale_temporaries()
                escalations.remove_stale_temporaries()
                self._is_tidy = True
            run = _Writing(self._source, data, conversations, escalations, seq, knows_deleted=self._knows_deleted)
            if self._is_all:
                conversations_here = set(self._source.ids(CONVERSATIONS))
                escalations_here = set(self._source.ids(ESCALATIONS))
                with self._changed:
                    # What an event was about and is not there was deleted by it.
                    pending = set(self._pending)
                kept = run.clear_strays(conversations_here | pending, escalations_here | pending)
                if kept is not None:
                    self._log.warning("mirror.files_kept", files=kept.files, kept_in=kept.place)
                with self._changed:
                    self._pending |= conversations_here | escalations_here
                    self._is_all = False
            with self._changed:
                waiting = sorted(self._pending)
            for start in range(0, len(waiting), AT_ONCE):
                if self._is_closing:
                    return reason
                group = waiting[start : start + AT_ONCE]
                # Before they are written: who is touched from now on, and noted by the next flush, is written once more.
                with self._changed:
                    self._under_way = set(group)
                    self._pending -= self._under_way
                failed = self._under_way
                try:
                    failed, why = run.write(group)
                finally:
                    with self._changed:
                        self._pending |= failed
                        self._under_way = set()
                reason = why or reason
            with self._changed:
                # Now every file is of a conversation that is there.
                self._knows_deleted |= reason is None
        return reason

    def _write_state(self) -> None:
        with self._state_guard:
            with self._changed:
                pending = self._pending | self._under_way
                state = _State(
                    self._seq,
                    sorted(pending) if not self._is_all and len(pending) <= PENDING_MAX else None,
                    self._source.lineage if self._knows_deleted else "",
                )
            with Directory(self._data_dir) as data:
                data.write_atomic(STATE_FILE, [msgspec.json.encode(state) + b"\n"])

    def _note_failure(self, reason: str | None) -> None:
        if reason is not None and self.failure is None:
            self._log.error("mirror.failed", reason=reason)
        elif reason is None and self.failure is not None:
            self._log.info("mirror.resumed")
        self.failure = reason


class _Kept(NamedTuple):
    """How many files were moved to *place*, a path in the data directory."""

    files: int
    place: str


class _Writing:
    """One round of writing, as of *seq*."""

    def __init__(
        self,
        source: Source,
        data: Directory,
        conversations: Directory,
        escalations: Directory,
        seq: int,
        *,
        knows_deleted: bool,
    ) -> None:
        """With *knows_deleted*, what is in no conversation that is there was deleted; else it may have been lost."""
        self._knows_deleted = knows_deleted
        self._source = source
        self._data = data
        self._conversations = conversations
        self._escalations = escalations
        self._seq = seq

    def write(self, ids: list[str]) -> tuple[set[str], str | None]:
        """Bring the files of *ids* up to date; those that could not be, and why.

        Raises:
            StorageFull: no room.
            Unavailable: the archive cannot be read now.
        """
        try:
            self._write_together(ids)
            return set(), None
        except OSError as error:
            if len(ids) == 1:
                # Without its name, which is an id: this is also shown to those who may only know how we are.
                return set(
                    ids
                ), f"{error.strerror or 'an error'}; look into {CONVERSATIONS_PLACE}/ and {ESCALATIONS_PLACE}/"
        # One of them is in the way of the others.
        failed: set[str] = set()
        reason: str | None = None
        for id in ids:
            alone, why = self.write([id])
            failed |= alone
            reason = why or reason
        return failed, reason

    def clear_strays(self, conversations: set[str], escalations: set[str]) -> _Kept | None:
        """Take the files of ours that belong to none of these ids away; what was kept of them.

        Removed is what shows a conversation that this directory had and deleted; what it may have lost, or never had, is
        moved to ``backups/``: nobody else may have it.
        """
        kept: dict[Directory, list[str]] = {}
        for directory, ending, ids in (
            (self._conversations, ".json", conversations),
            (self._escalations, ESCALATION_ENDING, escalations),
        ):
            expected = {file_name(id, ending) for id in ids}
            for name in directory.names():
                if not name.endswith(".json") or name in expected or not is_mirror_file(directory, name):
                    continue
                if self._knows_deleted and self._is_of_ours(directory, name):
                    directory.remove(name)
                else:
                    kept.setdefault(directory, []).append(name)
        if not kept:
            return None
        place = f"edited-{self._source.stamp()}"
        with self._data.subdirectory("backups") as backups, backups.subdirectory(place) as into:
            for directory, names in kept.items():
                there = set(into.names())
                directory.move_all([name for name in names if name not in there], into)
                for name in there.intersection(names):
                    directory.move(name, into, _free_name(into, name))
        return _Kept(sum(map(len, kept.values())), f"backups/{place}")

    def _is_of_ours(self, directory: Directory, name: str) -> bool:
        """Whether the file was written in this directory, and not copied here from another one."""
        content = _content_of(directory, name)
        shown = None if content is None else shown_beside(content)
        return shown is not None and shown.lineage == self._source.lineage

    def _write_together(self, ids: list[str]) -> None:
        staged: dict[Directory, list[str]] = {self._conversations: [], self._escalations: []}
        try:
            for id in ids:
                head = self._source.get(CONVERSATIONS, id)
                name = file_name(id, ".json")
                said: list[ShownMessage] = []
                if head is None or not self._stage(
                    self._conversations, name, self._conversation(id, head, said), staged
                ):
                    self._remove(self._conversations, name)
                else:
                    self._keep_only_copy(id, name, {message.number for message in said})
                escalation = self._source.get(ESCALATIONS, id)
                name = file_name(id, ESCALATION_ENDING)
                if escalation is None:
                    self._remove(self._escalations, name)
                else:
                    self._stage(self._escalations, name, self._escalation(escalation), staged)
            for directory, names in staged.items():
                # Also for what was removed.
                directory.publish(names)
                names.clear()
        finally:
            for directory, names in staged.items():
                directory.discard(names)

    def _stage(
        self, directory: Directory, name: str, chunks: Iterable[bytes], staged: dict[Directory, list[str]]
    ) -> bool:
        """Write *chunks* beside the file *name*; False when what they show is gone meanwhile."""
        try:
            directory.stage(name, chunks)
        except NotFound:
            return False
        staged[directory].append(name)
        self._keep_foreign(directory, name)
        return True

    def _keep_foreign(self, directory: Directory, name: str) -> None:
        """Keep a file in our place that somebody else wrote."""
        found = directory.stat(name)
        if found is None or stat.S_ISLNK(found.st_mode) or is_mirror_file(directory, name):
            return
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EISDIR, "a directory, pipe or device is in the way")
        self._keep(directory, name)

    def _keep_only_copy(self, id: str, name: str, written: set[int]) -> None:
        """Keep a file of ours that shows messages which nobody else has; *written* are those that the archive has.

        Not for those that were let go: what is not to be there any more must not be kept either.
        """
        head, born = self._source.get(CONVERSATIONS, id), self._source.born_of(id)
        if head is None or born is None:
            return
        living = living_numbers(head.value)
        if self._knows_deleted and len(written) >= len(living):
            return
        # Somebody else's was kept already.
        if not is_mirror_file(self._conversations, name):
            return
        content = _content_of(self._conversations, name)
        if content is None or not is_same_life(content, head.value, born, self._source.lineage):
            is_only_copy = not self._knows_deleted
        else:
            shown = shown_beside(content)
            # A file of before says no numbers; it may be the last that has them.
            numbers = living if shown is None else [one.number for one in shown.messages]
            is_only_copy = any(number in living and number not in written for number in numbers)
        if is_only_copy:
            self._keep(self._conversations, name)

    def _keep(self, directory: Directory, name: str) -> None:
        with (
            self._data.subdirectory("backups") as backups,
            backups.subdirectory(f"edited-{self._source.stamp()}") as kept,
        ):
            directory.keep_link(name, kept, _free_name(kept, name))

    def _remove(self, directory: Directory, name: str) -> None:
        if directory.stat(name) is not None and is_mirror_file(directory, name):
            directory.remove(name)

    def _conversation(self, id: str, head: Record, written: list[ShownMessage]) -> Iterator[bytes]:
        """The conversation, a message a line; no more than a page of texts is in memory. Those there are go to *written*."""
        said = orjson.loads(head.value)
        shown = {"id": said["id"], "created_at": said["created_at"], "updated_at": said["updated_at"]}
        shown |= {"title": said["title"]} | own_fields(said)
        yield b"{\n" + b"".join(_line(key, value) + b",\n" for key, value in shown.items()) + b'  "messages": ['
        after, separator = 0, b"\n    "
        while True:
            page = self._source.transcripts.messages(id, limit=PAGE_MAX, after=after)
            for item in page.items:
                message = orjson.loads(item.value)
                yield separator + _dumps(old_message(message))
                separator = b",\n    "
                written.append(
                    ShownMessage(message["number"], message["created_at"], message["tokens_used"], message["author"])
                )
            if page.next is None:
                break
            after = int(page.next)
        yield b"],\n" if separator == b"\n    " else b"\n  ],\n"
        shown_beside = Shown(
            lineage=self._source.lineage,
            messages=written,
            archived=said["archived"],
            hold=bool(said.get("hold")),
            hold_reason=said.get("hold_reason"),
        )
        yield _line("escalated", said["escalated"]) + b",\n"
        yield b"  %b: %b,\n" % (orjson.dumps(KEPT), msgspec.json.encode(shown_beside)) + self._mark()

    def _escalation(self, escalation: Record) -> list[bytes]:
        shown = old_escalation(orjson.loads(escalation.value))
        shown[KEPT] = {"lineage": self._source.lineage, "messages": []}
        return [b"{\n", *(_line(key, value) + b",\n" for key, value in shown.items()), self._mark()]

    def _mark(self) -> bytes:
        return _line("_holdfast", {"seq": self._seq}) + b"\n}\n"


def file_name(id: str, ending: str) -> str:
    """The name of the file that mirrors *id*: the id itself where it is plain, else encoded; never a path, never hidden."""
    raw = id.encode()
    if not _PLAIN.fullmatch(raw):
        raw = _ESCAPED.sub(lambda match: b"%%%02X" % match[0][0], raw)
    if len(raw) > NAME_BYTES_MAX:
        # A tilde stands in no other name, so no two ids share one.
        raw = raw[:_CUT_BYTES] + b"~" + hashlib.sha256(id.encode()).hexdigest()[:32].encode()
    return raw.decode() + ending


def is_mirror_file(directory: Directory, name: str) -> bool:
    """Whether *name* is a file of a mirror, told by its last key; looks at its end only."""
    try:
        fd = directory.open_to_read(name)
    except OSError:
        return False
    try:
        return _MARK.search(os.pread(fd, _MARK_BYTES, max(0, os.fstat(fd).st_size - _MARK_BYTES))) is not None
    finally:
        os.close(fd)


def shown_beside(content: dict[str, Any]) -> Shown | None:
    """What the *content* of a file of the mirror says beside the old layout; None for one of before, or when it is broken."""
    try:
        return msgspec.convert(content.get(KEPT), Shown)
    except msgspec.ValidationError:
        return None


def messages_shown(content: dict[str, Any], zone: tzinfo, created_at: str | None) -> list[tuple[int | None, Message]]:
    """The messages that the *content* of a file of the mirror shows, in order, each with its number as far as it says that.

    Args:
        zone, created_at: as of ``message_of``, for those of which it says no time.

    Raises:
        TypeError, ValueError: it shows none that could be messages.
    """
    messages = content.get("messages")
    if not isinstance(messages, list):
        raise ValueError(f"expected a list of messages, found {type(messages).__name__}")
    beside = shown_beside(content)
    is_told = beside is not None and len(beside.messages) == len(messages)
    seen: set[tuple[str, str]] = set()
    made: list[tuple[int | None, Message]] = []
    for index, old in enumerate(messages):
        said_ids = [old.get("channel"), old.get("external_id")] if isinstance(old, dict) else []
        external = (text_or_empty(said_ids[0]), text_or_empty(said_ids[1])) if said_ids else ("", "")
        # One that an old bot gave may be none of ours; a second one with the same would be taken for the first.
        ours = external not in seen and all(len(one) <= 256 and one.isprintable() for one in external)
        message = message_of(old, zone, created_at, has_external_id=ours)
        if external[1]:
            seen.add(external)
        number: int | None = None
        if beside is not None and is_told:
            said = beside.messages[index]
            number = said.number
            metadata = message.metadata
            if said.author == "agent" and metadata is not None and metadata.get("author") == "agent":
                # Put there by ``old_message``, which shows it there also when it is not.
                metadata = {key: value for key, value in metadata.items() if key != "author"} or None
            message = msgspec.structs.replace(
                message,
                metadata=metadata,
                created_at=moment(said.created_at, zone) or message.created_at,
                tokens_used=said.tokens_used,
                author=cast(Author, said.author) if said.author in AUTHORS else None,
            )
        made.append((number, message))
    return made


def living_numbers(head: bytes) -> range:
    """The numbers of the messages that the conversation of *head* should have."""
    said = orjson.loads(head)
    # The oldest go first, and numbers have no gaps.
    gone = said["last_number"] - said["message_count"] - said["system_count"]
    return range(gone + 1, said["last_number"] + 1)


def is_same_life(content: dict[str, Any], head: bytes, born: int, lineage: str) -> bool:
    """Whether a file of the mirror with *content* shows the conversation of *head*, and not an earlier one with its id.

    Args:
        born: the event with which it began.
        lineage: of the directory that it is in.
    """
    beside = shown_beside(content)
    mark = content.get("_holdfast")
    if beside is not None and beside.lineage == lineage and isinstance(mark, dict) and type(mark.get("seq")) is int:
        return bool(mark["seq"] >= born)
    # Seqs of another directory say nothing here, but no two begin in the same millisecond.
    return bool(content.get("created_at") == orjson.loads(head)["created_at"])


def is_adopting(data: Directory) -> bool:
    """Whether taking files of the mirror in *data* over was begun, and not completed."""
    state = _read_state(data.path)
    return state is not None and state.is_adopting


def begin_adopting(data: Directory) -> None:
    """Note durably that files of the mirror in *data* are being taken over, before anything of them is."""
    data.write_atomic(STATE_FILE, [msgspec.json.encode(_State(0, None, is_adopting=True)) + b"\n"])


def forget_state(data: Directory) -> None:
    """Forget how far the mirror in *data* is, durably: all of it is written anew, and nothing that it alone has removed."""
    if data.stat(STATE_FILE) is not None:
        data.remove(STATE_FILE)
        data.sync()


def _content_of(directory: Directory, name: str) -> dict[str, Any] | None:
    try:
        content = json.loads(directory.read(name))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _free_name(directory: Directory, name: str) -> str:
    """*name*, or one like it, that nothing in *directory* has."""
    free, tries = name, 1
    while directory.stat(free) is not None:
        tries += 1
        free = f"{tries}-{name}"
    return free


def _read_state(data_dir: Path) -> _State | None:
    try:
        with Directory(data_dir) as data:
            return msgspec.json.decode(data.read(STATE_FILE), type=_State)
    except (OSError, msgspec.DecodeError):
        return None


def _line(key: str, value: Any) -> bytes:
    return b"  %b: %b" % (orjson.dumps(key), _dumps(value))


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # an old bot's integer beyond 64 bits, or half a pair of surrogates
        return json.dumps(value).encode()


def has_mirror(data: Directory) -> bool:
    """Whether a readable mirror lies in *data*."""
    for place in (CONVERSATIONS_PLACE, ESCALATIONS_PLACE):
        found = data.stat(place)
        if found is not None and stat.S_ISDIR(found.st_mode):
            with data.subdirectory(place) as directory:
                if any(name.endswith(".json") and is_mirror_file(directory, name) for name in directory.names()):
                    return True
    return False
