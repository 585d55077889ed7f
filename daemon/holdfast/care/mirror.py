"""The readable mirror: each conversation, and each escalation, as one JSON file in the layout of the old bots.

A view for people and their tools, written after each flush for what changed since the one before. It is never read back,
and nothing waits for it: what cannot be written is told, kept in mind, and tried again after the next flush.

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
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import orjson

from holdfast.care.old_layout import old_escalation, old_message, own_fields
from holdfast.core.backlog import Backlog
from holdfast.core.state import CONVERSATIONS, ESCALATIONS
from holdfast.disk.files import Directory
from holdfast.errors import HoldfastError, NotFound
from holdfast.ops import Record
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
    """

    lock: threading.Lock
    backlog: Backlog
    get: Callable[[str, str], Record | None]
    ids: Callable[[str], Iterable[str]]
    transcripts: Transcripts
    stamp: Callable[[], str]


class _State(msgspec.Struct):
    """The content of ``_mirror.json``.

    Attributes:
        seq: of all that changed up to here, only *pending* is not in the mirror yet.
        pending: conversations; None for all of them.
    """

    seq: int
    pending: list[str] | None


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
        state = None if trusted_seq is None else _read_state(data_dir)
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
            run = _Writing(self._source, data, conversations, escalations, seq)
            if self._is_all:
                ids = set(self._source.ids(CONVERSATIONS)) | set(self._source.ids(ESCALATIONS))
                run.remove_strays(ids)
                with self._changed:
                    self._pending |= ids
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
        return reason

    def _write_state(self) -> None:
        with self._state_guard:
            with self._changed:
                pending = self._pending | self._under_way
                state = _State(self._seq, sorted(pending) if not self._is_all and len(pending) <= PENDING_MAX else None)
            with Directory(self._data_dir) as data:
                data.write_atomic(STATE_FILE, [msgspec.json.encode(state) + b"\n"])

    def _note_failure(self, reason: str | None) -> None:
        if reason is not None and self.failure is None:
            self._log.error("mirror.failed", reason=reason)
        elif reason is None and self.failure is not None:
            self._log.info("mirror.resumed")
        self.failure = reason


class _Writing:
    """One round of writing, as of *seq*."""

    def __init__(
        self, source: Source, data: Directory, conversations: Directory, escalations: Directory, seq: int
    ) -> None:
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

    def remove_strays(self, ids: set[str]) -> None:
        """Remove the files of ours that belong to none of *ids*."""
        for directory, ending in ((self._conversations, ".json"), (self._escalations, ESCALATION_ENDING)):
            expected = {file_name(id, ending) for id in ids}
            strays = [name for name in directory.names() if name.endswith(".json") and name not in expected]
            for name in strays:
                if is_mirror_file(directory, name):
                    directory.remove(name)

    def _write_together(self, ids: list[str]) -> None:
        staged: dict[Directory, list[str]] = {self._conversations: [], self._escalations: []}
        try:
            for id in ids:
                head = self._source.get(CONVERSATIONS, id)
                name = file_name(id, ".json")
                if head is None or not self._stage(self._conversations, name, self._conversation(id, head), staged):
                    self._remove(self._conversations, name)
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
        with (
            self._data.subdirectory("backups") as backups,
            backups.subdirectory(f"edited-{self._source.stamp()}") as kept,
        ):
            directory.keep_link(name, kept)

    def _remove(self, directory: Directory, name: str) -> None:
        if directory.stat(name) is not None and is_mirror_file(directory, name):
            directory.remove(name)

    def _conversation(self, id: str, head: Record) -> Iterator[bytes]:
        """The conversation, a message a line; no more than a page of it is in memory."""
        said = orjson.loads(head.value)
        shown = {"id": said["id"], "created_at": said["created_at"], "updated_at": said["updated_at"]}
        shown |= {"title": said["title"]} | own_fields(said)
        yield b"{\n" + b"".join(_line(key, value) + b",\n" for key, value in shown.items()) + b'  "messages": ['
        after, separator = 0, b"\n    "
        while True:
            page = self._source.transcripts.messages(id, limit=PAGE_MAX, after=after)
            for item in page.items:
                yield separator + _dumps(old_message(orjson.loads(item.value)))
                separator = b",\n    "
            if page.next is None:
                break
            after = int(page.next)
        yield (b"],\n" if separator == b"\n    " else b"\n  ],\n") + self._ending(said["escalated"])

    def _escalation(self, escalation: Record) -> list[bytes]:
        shown = old_escalation(orjson.loads(escalation.value))
        return [b"{\n", *(_line(key, value) + b",\n" for key, value in shown.items()), self._mark()]

    def _ending(self, is_escalated: bool) -> bytes:
        return _line("escalated", is_escalated) + b",\n" + self._mark()

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
