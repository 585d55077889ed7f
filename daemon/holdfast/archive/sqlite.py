"""The archive as one SQLite file."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.archive.base import (
    ARCHIVED_OPS,
    Archive,
    ArchiveBroken,
    ArchiveDamaged,
    ArchiveError,
    ArchiveGone,
    Condensed,
    ConversationQuery,
    Escalation,
    EscalationQuery,
    Expirable,
    Figures,
    Head,
    MessageQuery,
)
from holdfast.archive.sqlite_file import (
    LOG,
    LOG_INDEX,
    SQLITE_ERRORS,
    WAL_BYTES_MAX,
    connect,
    connect_copy,
    connect_writer,
    is_failed_sync,
    make_durable,
    our_error,
    prepare,
    reserve_log,
    totals_of,
)
from holdfast.archive.sqlite_packed import (
    PLACES,
    RETRAIN_AT,
    SAMPLE_MESSAGES_MAX,
    SAMPLES_MAX,
    SAMPLES_MIN,
    TABLES,
    BlockDamaged,
    Dictionaries,
    Packer,
    Text,
    Texts,
    blocks_of,
    has_tables,
    train,
)
from holdfast.archive.sqlite_rows import (
    DAY_MS,
    MESSAGE_COLUMNS,
    OTHER_RANK,
    RANKS,
    SYSTEM,
    Changes,
    kinds,
    message_of,
)
from holdfast.core.event import Event, StoredMessage
from holdfast.errors import ForkedProcess, StorageFull

READERS_MAX = 4
"""Connections that read; further reads wait for one of them."""

CLOSE_WAIT_S = 2.0
"""How long reads under way may still take when the archive is closed; then they are broken off."""

WALK_AT_ONCE = 5_000
"""Conversations that retention looks at in one read transaction, which keeps the write-ahead log from starting anew."""

COPY_PAGES = 128
"""Of a copy, written in one step, during which no event can be applied: 256 KiB take half a millisecond."""

COPY_PAUSE_S = 0.0005
"""Between two steps at least, so that whoever waits for his turn gets it."""

COPY_PATIENCE_S = 120.0
"""The longest that a copy is drawn out for the sake of others."""

PACK_HEADS, PACK_MESSAGES = 16, 128
"""Conversations and messages that are packed in one transaction: 5 ms, for which events wait."""

COMPACT_STEPS, COMPACT_PAUSE_S = 20_000, 0.005
"""Steps of SQLite's virtual machine, about 5 ms, after which others get time while the file is written anew."""

_COMPLAINTS_MAX = 20
_MS_MIN, _MS_MAX = -(2**63), 2**63 - 1
_MONTH_MS, _QUARTER_MS = 30 * DAY_MS, 90 * DAY_MS


def open_sqlite(path: Path) -> SQLiteArchive:
    """The archive in the file *path*, which is created (0600) when it is missing; of one process at a time.

    What a killed process left in the write-ahead log is taken over, and as far as the disk lets it made durable.

    Raises:
        ArchiveDamaged: the file cannot be read, or is no archive of ours; it is as it was.
        ArchiveError: no room, no permission; try again later.
        DataRefused: made by a newer Holdfast, or a link or a directory stands in its place; nothing was touched.
    """
    prepare(path)
    try:
        return SQLiteArchive(path)
    except SQLITE_ERRORS as error:
        raise our_error(error, path) from error


class SQLiteArchive(Archive):
    """One writing connection, and a few that read beside it; made by ``open_sqlite``.

    A forked child cannot use it: every method but ``close`` raises ForkedProcess there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._wal = path.with_name(path.name + LOG)
        self._pid = os.getpid()
        self._write_guard = threading.Lock()
        self._copying = threading.Lock()
        self._refusal: str | None = None
        self._checkpoint_at = WAL_BYTES_MAX
        self._identity = _identity(path)
        self._dictionaries = Dictionaries()
        # One at a time packs; a packer is of one thread.
        self._packing = threading.Lock()
        self._packer: Packer | None = None
        self._trained_in_vain_at = 0
        self._writer = connect_writer(path)
        try:
            self._readers = _Readers(path)
            row = self._writer.execute("SELECT archived_seq FROM totals WHERE one = 1").fetchone()
            if row is None:
                raise ArchiveDamaged(f"{path} does not say how far it is; it has to be made anew")
        except BaseException:
            self._writer.close()
            raise
        self.archived_seq: int = row[0]
        self.durable_seq = 0
        try:
            self.checkpoint()
        except ArchiveError:
            pass  # nothing is promised to be durable before a checkpoint succeeds; the next one tells why it does not
        except BaseException:
            self.close()
            raise
        reserve_log(path)

    # Writing.

    def apply(self, events: Sequence[tuple[int, Event]], up_to: int) -> None:
        if up_to <= self.archived_seq:
            return
        with self._writing() as connection:
            changes = Changes(connection)
            for seq, event in events:
                if seq > self.archived_seq and event.op in ARCHIVED_OPS:
                    changes.apply(event)
            changes.finish(up_to)
        self.archived_seq = up_to
        self._bound_log()

    def fill(self, heads: Iterable[Head], escalations: Iterable[Escalation]) -> None:
        with self._writing() as connection:
            changes = Changes(connection)
            changes.fill(heads, escalations)
            changes.finish()
        self._bound_log()

    def fill_messages(self, id: str, messages: Sequence[StoredMessage]) -> int:
        with self._writing() as connection:
            changes = Changes(connection)
            added = changes.put_messages(id, messages)
            changes.finish()
        self._bound_log()
        return added

    def checkpoint(self) -> None:
        """Raises ArchiveError also when a reader or another program keeps it from being complete."""
        self._check_usable()
        # Not for the sake of this file: what is durable here is what the journal gives up.
        if _identity(self.path) != self._identity:
            raise ArchiveGone(f"{self.path} was removed or replaced while it was open; it has to be made anew")
        with self._write_guard:
            self._checkpoint("FULL")
            reached = self.archived_seq
        self.durable_seq = reached

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # the connections are the parent's; to close them here would touch its files
        with self._write_guard:
            if self._refusal == _CLOSED:
                return
            broken, self._refusal = self._refusal is not None, _CLOSED
        with self._copying:
            pass  # a copy under way breaks off at its next step
        self._readers.stop(CLOSE_WAIT_S)
        try:
            if not broken:
                self._checkpoint("TRUNCATE")
                self.durable_seq = self.archived_seq
        except (ArchiveError, ArchiveDamaged):
            pass  # durable_seq says that it is not
        finally:
            # The last one to close makes SQLite write the log into the file and remove it. After a failed sync nothing
            # of the log may be given up, so then the last one is a reader, which cannot.
            closing = [self._writer.close, self._readers.close] if broken else [self._readers.close, self._writer.close]
            for close in closing:
                try:
                    close()
                except SQLITE_ERRORS:
                    pass  # what it would have written is in the log, or in the journal

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """The writing connection, in a transaction that is committed at the end, or rolled back by an error."""
        self._check_usable()
        with self._write_guard:
            self._check_usable()
            try:
                self._writer.execute("BEGIN IMMEDIATE")
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException as error:
                self._note_failed_sync(error)
                self._roll_back()
                if isinstance(error, SQLITE_ERRORS):
                    raise our_error(error, self.path) from error
                if isinstance(error, BlockDamaged):
                    raise ArchiveDamaged(f"{self.path} is damaged: {error}; it has to be made anew") from error
                if isinstance(error, OverflowError | UnicodeEncodeError):
                    raise ArchiveError(f"{self.path} cannot hold this: {error}") from error
                raise

    def _roll_back(self) -> None:
        try:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        except SQLITE_ERRORS:
            pass  # SQLite rolls back at the next chance; the first error is the one to tell

    def _checkpoint(self, mode: str) -> None:
        """Bring the write-ahead log to the disk and into the file.

        Raises:
            ArchiveError: not all of it, for a reader, for want of room, or because the disk refused.
        """
        try:
            busy, pages, done = self._writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        except SQLITE_ERRORS as error:
            self._note_failed_sync(error)
            raise our_error(error, self.path) from error
        if busy or pages != done:
            raise ArchiveError(
                f"{self.path} is being read; {done} of {pages} pages were brought to the disk, try again"
            )

    def _bound_log(self) -> None:
        """Keep the write-ahead log from growing between checkpoints."""
        try:
            size = self._wal.stat().st_size
        except OSError:
            return
        if size <= WAL_BYTES_MAX:
            self._checkpoint_at = WAL_BYTES_MAX
        elif size >= self._checkpoint_at:
            try:
                with self._write_guard:
                    self._checkpoint("PASSIVE")
                    # After it the log starts anew; its size tells so only when the next transaction is written.
                    self._checkpoint_at = WAL_BYTES_MAX
            except (ArchiveError, ArchiveDamaged):
                # Not now, for a long read or for want of room; what was applied is applied. Not at each apply either.
                self._checkpoint_at = size + WAL_BYTES_MAX

    def _note_failed_sync(self, error: BaseException) -> None:
        if is_failed_sync(error) and self._refusal is None:
            # No retry: after a failed sync the kernel may have dropped the pages, and the next sync succeed without them.
            self._refusal = f"the disk refused to sync {self.path}; open it again"

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ForkedProcess(f"opened by process {self._pid}; a forked child must open or connect for itself")
        if self._refusal is not None:
            raise (ArchiveError if self._refusal == _CLOSED else ArchiveBroken)(self._refusal)

    # Reading.

    def messages(self, id: str, wanted: MessageQuery) -> list[StoredMessage]:
        bounds = [_clamped(wanted.after, 0, PLACES), _clamped(wanted.before, 0, PLACES, PLACES)]
        where = ""
        values: list[int | str] = [*bounds, id]
        if wanted.role is not None or wanted.author is not None:
            found = kinds(wanted.role, wanted.author)
            where += f" AND kind IN ({', '.join(map(str, found))})"
        for comparison, ms in ((">=", wanted.since_ms), ("<", wanted.until_ms)):
            if ms is not None:
                where += f" AND created_ms {comparison} ?"
                values.append(_clamped(ms, _MS_MIN, _MS_MAX))
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {MESSAGE_COLUMNS} FROM conversations INDEXED BY conversation_by_id CROSS JOIN messages NOT INDEXED"
                f" ON place > key * {PLACES} + ? AND place < key * {PLACES} + ? WHERE id = ?{where}"
                f" ORDER BY place {'DESC' if wanted.newest else 'ASC'} LIMIT ?",
                (*values, _clamped(wanted.limit, 0, _MS_MAX)),
            ).fetchall()
            if wanted.newest:
                rows.reverse()
            texts = Texts(connection, self._dictionaries)
            return [message_of(row, texts) for row in rows]

    def conversations(self, wanted: ConversationQuery) -> list[Head]:
        index, where = "conversation_by_time", ""
        values: list[int | str] = []
        # Of the two the session's index is the narrower one: a user has many, a session has hardly more than one.
        for column, value in (("user", wanted.user_id), ("session", wanted.session_id)):
            if value is not None:
                index = f"conversation_by_{column}"
                where += f" AND {column}_id = ?"
                values.append(value)
        before = wanted.after or (_MS_MAX, "\U0010ffff")
        if wanted.until_ms is not None:
            # No id stands before the empty one: of that moment nothing is wanted.
            before = min(before, (wanted.until_ms, ""))
        since_ms = _MS_MIN if wanted.since_ms is None else wanted.since_ms
        values += [_clamped(since_ms, _MS_MIN, _MS_MAX), _clamped(before[0], _MS_MIN, _MS_MAX), before[1]]
        ranges, all_values = [], []
        for escalated in (0, 1) if wanted.escalated is None else (int(wanted.escalated),):
            for archived in (0, 1) if wanted.archived is None else (int(wanted.archived),):
                ranges.append(
                    f"SELECT id, version, CAST(head AS BLOB), updated_ms FROM conversations INDEXED BY {index}"
                    f" WHERE escalated = {escalated} AND archived = {archived}{where}"
                    " AND updated_ms >= ? AND (updated_ms, id) < (?, ?)"
                )
                all_values += values
        with self._reading() as connection:
            rows = connection.execute(
                f"{' UNION ALL '.join(ranges)} ORDER BY updated_ms DESC, id DESC LIMIT ?",
                (*all_values, _clamped(wanted.limit, 0, _MS_MAX)),
            ).fetchall()
        return [Head(id, version, head) for id, version, head, _ in rows]

    def escalations(self, wanted: EscalationQuery) -> list[Escalation]:
        index, where = "escalation_by_rank", ""
        values: list[int | str] = []
        if wanted.status is not None:
            index, where = "escalation_by_status", "status = ? AND "
            values.append(wanted.status)
        after = (-1, _MS_MIN, "")
        if wanted.after is not None:
            priority, opened_ms, id = wanted.after
            after = RANKS.get(priority, OTHER_RANK), _clamped(opened_ms, _MS_MIN, _MS_MAX), id
        if wanted.priority is None:
            where += "(rank, opened_ms, id) > (?, ?, ?)"
            values += after
        else:
            rank = RANKS.get(wanted.priority)
            if rank is None or after[0] > rank:
                return []
            # With the rank among what is compared, SQLite would sort what stands in order already.
            where += "rank = ? AND (opened_ms, id) > (?, ?)"
            values += [rank, *(after[1:] if after[0] == rank else (_MS_MIN, ""))]
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT id, version, CAST(value AS BLOB) FROM escalations INDEXED BY {index} WHERE {where}"
                " ORDER BY rank, opened_ms, id LIMIT ?",
                (*values, _clamped(wanted.limit, 0, _MS_MAX)),
            ).fetchall()
        return [Escalation(*row) for row in rows]

    def external_numbers(self, id: str, wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        found = {}
        with self._reading() as connection:
            # The plus takes the type off the key: an expression has none, and its index serves only the like.
            for channel, external_id in wanted:
                row = connection.execute(
                    "SELECT place & 0xffffffff FROM conversations INDEXED BY conversation_by_id"
                    " CROSS JOIN messages INDEXED BY message_by_external_id ON place >> 32 = +key"
                    " WHERE id = ? AND channel IS ? AND external_id = ? ORDER BY place LIMIT 1",
                    (id, channel or None, external_id),
                ).fetchone()
                if row is not None:
                    found[channel, external_id] = row[0]
        return found

    def figures(self, now_ms: int) -> Figures:
        with self._reading() as connection:
            conversations, archived, escalated, messages, system_messages, tokens = connection.execute(
                "SELECT conversations, archived, escalated, messages, system_messages, tokens FROM totals WHERE one = 1"
            ).fetchone()
            return Figures(
                conversations=conversations,
                active=_updated_since(connection, now_ms - _MONTH_MS),
                old=conversations - archived - _updated_since(connection, now_ms - _QUARTER_MS),
                archived=archived,
                escalated=escalated,
                messages=messages,
                system_messages=system_messages,
                messages_last_30_days=_created_since(connection, now_ms - _MONTH_MS),
                tokens=tokens,
                bytes=sum(self._sizes()),
            )

    def message_counts(self) -> dict[str, int]:
        with self._reading() as connection:
            return counted_messages(connection)

    # Retention.

    def archivable(self, before_ms: int, limit: int, after: str = "") -> list[Head]:
        """Looks at every conversation from behind *after* on until it has enough; a microsecond each."""
        return [
            Head(id, version, head)
            for id, version, head in self._walk("archived = 0 AND updated_ms < ?", before_ms, limit, after)
        ]

    def count_archivable(self, before_ms: int) -> int:
        with self._reading() as connection:
            conversations, archived = connection.execute(
                "SELECT conversations, archived FROM totals WHERE one = 1"
            ).fetchone()
            remaining: int = conversations - archived - _updated_since(connection, before_ms)
            return remaining

    def expirable(self, before_ms: int, limit: int, after: str = "") -> list[Expirable]:
        """Looks at every conversation from behind *after* on until it has enough; a microsecond each."""
        found = []
        for id, version, head in self._walk("oldest_ms < ?", before_ms, limit, after):
            with self._reading() as connection:
                up_to, messages, system, tokens, size = connection.execute(
                    f"SELECT max(place) & 0xffffffff, count(*), total(kind IN ({', '.join(map(str, kinds(SYSTEM, None)))})),"
                    " total(tokens_used), total(coalesce(packed & 0xffffffff,"
                    " length(CAST(content AS BLOB)) + length(CAST(coalesce(metadata, '') AS BLOB))))"
                    " FROM conversations INDEXED BY conversation_by_id CROSS JOIN messages NOT INDEXED"
                    f" ON place > key * {PLACES} AND place < (key + 1) * {PLACES} WHERE id = ? AND created_ms < ?",
                    (id, _clamped(before_ms, _MS_MIN, _MS_MAX)),
                ).fetchone()
            if messages:
                found.append(Expirable(Head(id, version, head), up_to, messages, int(system), int(tokens), int(size)))
        return found

    def _walk(self, condition: str, ms: int, limit: int, after: str) -> list[tuple[str, int, bytes]]:
        """Up to *limit* conversations that meet *condition* on *ms*, by id, from behind *after* on."""
        found: list[tuple[str, int, bytes]] = []
        while len(found) < limit:
            with self._reading() as connection:
                last = connection.execute(
                    "SELECT id FROM conversations INDEXED BY conversation_by_id WHERE id > ? ORDER BY id LIMIT 1 OFFSET ?",
                    (after, WALK_AT_ONCE - 1),
                ).fetchone()
                found += connection.execute(
                    "SELECT id, version, CAST(head AS BLOB) FROM conversations INDEXED BY conversation_by_id"
                    f" WHERE id > ? AND id <= ? AND {condition} ORDER BY id LIMIT ?",
                    (after, last[0] if last else "\U0010ffff", _clamped(ms, _MS_MIN, _MS_MAX), limit - len(found)),
                ).fetchall()
            if last is None:
                break
            after = last[0]
        return found

    def condense(self, after: str = "") -> Condensed:
        with self._packing:
            return self._condense(after)

    def _condense(self, after: str) -> Condensed:
        heads = self._walk(
            "archived = 1 AND packed_version IS NOT version AND updated_ms <= ?", _MS_MAX, PACK_HEADS, after
        )
        if not heads:
            return Condensed()
        packer = self._ready_packer()
        steps: list[_Packing] = []
        left = PACK_MESSAGES
        for id, version, _ in heads:
            if left <= 0:
                break
            steps.append(self._to_pack(id, version, left, packer))
            left -= len(steps[-1].texts)
        messages = before = now = 0
        with self._writing() as connection:
            for step in steps:
                # Whoever changed it since has the version changed, and the next run looks again.
                if step.write(connection):
                    messages += len(step.texts)
                    before += sum(text.bytes for text in step.texts)
                    now += sum(len(packed) for _, packed in step.blocks)
        self._bound_log()
        whole = [step.id for step in steps if step.is_whole]
        return Condensed(messages, before, now, whole[-1] if whole else after)

    def _to_pack(self, id: str, version: int, limit: int, packer: Packer) -> _Packing:
        with self._reading() as connection:
            rows = connection.execute(
                "SELECT key, place & 0xffffffff, content, metadata FROM conversations INDEXED BY conversation_by_id"
                f" CROSS JOIN messages NOT INDEXED ON place > key * {PLACES} AND place < (key + 1) * {PLACES}"
                " WHERE id = ? AND packed IS NULL ORDER BY place LIMIT ?",
                (id, limit + 1),
            ).fetchall()
        texts = [Text(*row[1:]) for row in rows[:limit]]
        blocks = [(block, packer.pack(block)) for block in blocks_of(texts)]
        is_whole = len(rows) <= limit
        if is_whole and sum(len(packed) for _, packed in blocks) >= sum(text.bytes for text in texts):
            # A few words are as short as they can be.
            texts, blocks = [], []
        return _Packing(id, version, rows[0][0] if rows else 0, packer.id, texts, blocks, is_whole)

    def _ready_packer(self) -> Packer:
        """What packs with the newest dictionary, which is made when it is time for one; kept, as it takes a while."""
        with self._reading() as connection:
            is_first = not has_tables(connection)
        if is_first:
            with self._writing() as connection:
                for table in TABLES:
                    connection.execute(table)
        with self._reading() as connection:
            row = connection.execute(
                "SELECT id, messages FROM dictionaries WHERE id > 0 ORDER BY id DESC LIMIT 1"
            ).fetchone()
            archived, messages = connection.execute("SELECT archived, messages FROM totals WHERE one = 1").fetchone()
        newest, trained_on = row or (0, 0)
        if archived >= SAMPLES_MIN and messages >= trained_on * RETRAIN_AT and messages > self._trained_in_vain_at * 2:
            content = train(self._samples())
            if content is None:
                self._trained_in_vain_at = messages
            else:
                newest += 1
                with self._writing() as connection:
                    connection.executemany(
                        "INSERT INTO dictionaries (id, copy, messages, sha256, content) VALUES (?, ?, ?, ?, ?)",
                        [(newest, copy, messages, sha256(content).digest(), content) for copy in (0, 1)],
                    )
        if self._packer is None or self._packer.id != newest:
            with self._reading() as connection:
                known = self._dictionaries.get(connection, newest).as_bytes() if newest else None
            self._packer = Packer(newest, known)
        return self._packer

    def _samples(self) -> list[list[str]]:
        """What is said in some of the archived conversations, of all ages."""
        with self._reading() as connection:
            last: int = connection.execute("SELECT coalesce(max(key), 0) FROM conversations").fetchone()[0]
        samples: list[list[str]] = []
        for key in range(1, last + 1, max(1, last // SAMPLES_MAX)):
            with self._reading() as connection:
                found = connection.execute(
                    "SELECT id FROM conversations WHERE key = ? AND archived = 1", (key,)
                ).fetchone()
            if found is not None:
                messages = self.messages(found[0], MessageQuery(newest=False, limit=SAMPLE_MESSAGES_MAX))
                samples.append([one.content for one in messages] + [bytes(one.metadata).decode() for one in messages])
        return samples

    def compacted(self, path: Path, is_busy: Callable[[], bool]) -> bool:
        broken: list[BaseException] = []

        def leave_others_time() -> int:
            try:
                if is_busy():
                    time.sleep(COMPACT_PAUSE_S)
                return int(self._refusal is not None)
            except BaseException as error:
                # SQLite breaks off with an error of its own.
                broken.append(error)
                return 1

        is_busy()
        try:
            with self._reading() as connection:
                # Not within a transaction; the statement is one by itself.
                connection.execute("COMMIT")
                connection.set_progress_handler(leave_others_time, COMPACT_STEPS)
                try:
                    connection.execute("VACUUM INTO ?", (str(path),))
                finally:
                    connection.set_progress_handler(None, 0)
                    connection.execute("BEGIN")
            make_durable(path)
        except (ArchiveError, ArchiveDamaged):
            if broken:
                raise broken[0] from None
            raise
        return True

    # Care.

    def check(self) -> list[str]:
        try:
            with self._reading() as connection:
                wrong = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_COMPLAINTS_MAX})")]
                return miscounted(connection) if wrong == ["ok"] else wrong
        except ArchiveDamaged as error:
            return [str(error)]

    def copy_to(self, path: Path, is_busy: Callable[[], bool]) -> int:
        self._check_usable()
        with self._copying:
            try:
                self._copy(path, is_busy)
                return totals_of(path)[0]
            except SQLITE_ERRORS as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
                    raise StorageFull(f"no room to copy {self.path} to {path}: free space") from error
                raise our_error(error, self.path) from error

    def _copy(self, path: Path, is_busy: Callable[[], bool]) -> None:
        """By the writing connection: what it changes between two steps goes to the copy as well, so nothing is read twice,
        and no transaction that only reads keeps checkpoints from being complete."""
        target = connect_copy(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        patience_s, began = COPY_PATIENCE_S, 0.0

        def pause(status: int, _remaining: int, _pages: int) -> None:
            nonlocal patience_s, began
            if status == sqlite3.SQLITE_DONE:
                return
            self._write_guard.release()
            try:
                if is_busy() and patience_s > 0:
                    # What the disk was given is brought to it a little at a time: a sync of the journal waits for all of it.
                    _sync_data(fd)
                    took_s = time.monotonic() - began
                    time.sleep(min(took_s, patience_s))
                    patience_s -= 2 * took_s
                time.sleep(COPY_PAUSE_S)
            finally:
                self._write_guard.acquire()
                began = time.monotonic()
            self._check_usable()

        try:
            with self._write_guard:
                self._check_usable()
                began = time.monotonic()
                self._writer.backup(target, pages=COPY_PAGES, progress=pause, sleep=0)
        finally:
            os.close(fd)
            target.close()

    def describe(self) -> dict[str, Any]:
        with self._reading() as connection:
            page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
            free = connection.execute("PRAGMA freelist_count").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        file_bytes, wal_bytes, _ = self._sizes()
        return {
            "kind": "sqlite",
            "path": str(self.path),
            "bytes": file_bytes,
            "wal_bytes": wal_bytes,
            "free_bytes": free * page_bytes,
            "schema_version": version,
            "sqlite_version": sqlite3.sqlite_version,
        }

    def _sizes(self) -> list[int]:
        """Bytes of the file, of the write-ahead log and of its index."""
        sizes = []
        for name in ("", LOG, LOG_INDEX):
            try:
                sizes.append(self.path.with_name(self.path.name + name).stat().st_size)
            except OSError:
                sizes.append(0)
        return sizes

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection that sees the archive at one seq meanwhile; what cannot be read is ours when it leaves."""
        if self._pid != os.getpid():
            self._check_usable()
        connection = self._readers.take()
        try:
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")
        except SQLITE_ERRORS as error:
            raise our_error(error, self.path) from error
        except UnicodeEncodeError as error:
            raise ArchiveError(f"{self.path} has nothing under what is no text: {error}") from error
        except BlockDamaged as error:
            raise ArchiveDamaged(f"{self.path} is damaged: {error}; it has to be made anew") from error
        except (TypeError, IndexError) as error:
            raise ArchiveDamaged(f"{self.path} holds what is not ours: {error}; it has to be made anew") from error
        finally:
            self._readers.give_back(connection)


_CLOSED = "the archive is closed"


class _Packing(NamedTuple):
    """Messages of one conversation that are about to be packed.

    Attributes:
        id, version, key: of the conversation as it was read.
        dictionary: with which *blocks* were compressed.
        texts: of the messages.
        blocks: the same in portions, each with its packed form.
        is_whole: there are no others to be packed.
    """

    id: str
    version: int
    key: int
    dictionary: int
    texts: list[Text]
    blocks: list[tuple[list[Text], bytes]]
    is_whole: bool

    def write(self, connection: sqlite3.Connection) -> bool:
        """Replace the texts by their blocks, unless any of it is not any more what was read; whether it was."""
        places = [(self.key * PLACES + text.number, text) for text in self.texts]
        there = all(
            connection.execute(
                "SELECT 1 FROM messages WHERE place = ? AND packed IS NULL AND content = ? AND metadata IS ?",
                (place, text.content, text.metadata),
            ).fetchone()
            for place, text in places
        )
        if not there or not self._is_unchanged(connection):
            return False
        for block, packed in self.blocks:
            first = block[0].number
            connection.execute(
                "INSERT INTO blocks (place, dictionary, texts) VALUES (?, ?, ?)",
                (self.key * PLACES + first, self.dictionary, packed),
            )
            connection.executemany(
                "UPDATE messages SET content = '', metadata = NULL, packed = ? WHERE place = ?",
                [(first * PLACES + text.bytes, self.key * PLACES + text.number) for text in block],
            )
        if self.is_whole:
            connection.execute("UPDATE conversations SET packed_version = version WHERE id = ?", (self.id,))
        return True

    def _is_unchanged(self, connection: sqlite3.Connection) -> bool:
        row = connection.execute(
            "SELECT key, version, archived FROM conversations INDEXED BY conversation_by_id WHERE id = ?", (self.id,)
        ).fetchone()
        return row is not None and row == (self.key if self.texts else row[0], self.version, 1)


class _Readers:
    """Connections that read, each lent to one thread at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # One is there from the first, so that after a failed sync one can be closed behind the writer.
        self._idle = [connect(path, writable=False)]
        self._all = list(self._idle)
        self._changed = threading.Condition()
        self._is_stopped = False

    def take(self) -> sqlite3.Connection:
        """One that nobody else has, until ``give_back``; waits when all are lent.

        Raises:
            ArchiveError: closed, or no further one can be made.
        """
        with self._changed:
            while not self._idle and len(self._all) >= READERS_MAX and not self._is_stopped:
                self._changed.wait()
            if self._is_stopped:
                raise ArchiveError(_CLOSED)
            if self._idle:
                return self._idle.pop()
            try:
                connection = connect(self._path, writable=False)
            except SQLITE_ERRORS as error:
                raise our_error(error, self._path) from error
            self._all.append(connection)
            return connection

    def give_back(self, connection: sqlite3.Connection) -> None:
        """Take back what ``take`` gave, whatever became of its transaction."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except SQLITE_ERRORS:
            pass  # a transaction that only reads ends with its statements
        with self._changed:
            self._idle.append(connection)
            self._changed.notify_all()

    def stop(self, wait_s: float) -> None:
        """Lend nothing more, and wait until all are back; those that are not after *wait_s* are broken off."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
            if not self._changed.wait_for(self._are_all_back, wait_s):
                for connection in self._all:
                    connection.interrupt()
                self._changed.wait_for(self._are_all_back, wait_s)

    def close(self) -> None:
        """Close them; only after ``stop``."""
        with self._changed:
            # One whose thread never came back stays open: to close it under the reader's hands would end the process.
            for connection in self._idle:
                connection.close()
            self._idle.clear()

    def _are_all_back(self) -> bool:
        return len(self._idle) == len(self._all)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file *path* is; None when there is none."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be looked at: {error.strerror}; check the disk and its permissions"
        ) from error
    return found.st_dev, found.st_ino


def _updated_since(connection: sqlite3.Connection, ms: int) -> int:
    """Conversations that are not archived and were updated at *ms* or later."""
    return _since(
        connection,
        "conversations",
        "(SELECT count(*) FROM conversations INDEXED BY conversation_by_time"
        " WHERE escalated = 0 AND archived = 0 AND updated_ms >= ?1 AND updated_ms < ?2)"
        " + (SELECT count(*) FROM conversations INDEXED BY conversation_by_time"
        " WHERE escalated = 1 AND archived = 0 AND updated_ms >= ?1 AND updated_ms < ?2)",
        ms,
    )


def _created_since(connection: sqlite3.Connection, ms: int) -> int:
    """Messages created at *ms* or later."""
    return _since(
        connection,
        "messages",
        "(SELECT count(*) FROM messages INDEXED BY message_by_time WHERE created_ms >= ?1 AND created_ms < ?2)",
        ms,
    )


def _since(connection: sqlite3.Connection, column: str, counted: str, ms: int) -> int:
    """What the whole days after *ms* add up to in *column*, and what is *counted* of the rest of its own day."""
    ms = _clamped(ms, -(2**62), 2**62)
    day = ms // DAY_MS
    row = connection.execute(
        f"SELECT (SELECT coalesce(sum({column}), 0) FROM days WHERE day > ?3) + {counted}",
        (ms, (day + 1) * DAY_MS, day),
    ).fetchone()
    count: int = row[0]
    return count


def counted_messages(connection: sqlite3.Connection) -> dict[str, int]:
    """As ``Archive.message_counts``, of an archive that may be open for reading only."""
    return dict(
        connection.execute(
            "SELECT id, (SELECT count(*) FROM messages NOT INDEXED"
            f" WHERE place > key * {PLACES} AND place < (key + 1) * {PLACES}) FROM conversations"
        ).fetchall()
    )


def miscounted(connection: sqlite3.Connection) -> list[str]:
    """Where totals, days and oldest messages differ from what is there, in words."""
    system = ", ".join(map(str, kinds(SYSTEM, None)))
    wrong = []
    packed = (
        (
            "packed messages without a block",
            "SELECT 0",
            "SELECT count(*) FROM messages WHERE packed IS NOT NULL"
            f" AND (place >> 32) * {PLACES} + packed / {PLACES} NOT IN (SELECT place FROM blocks)",
        ),
        (
            "blocks without a message",
            "SELECT 0",
            "SELECT count(*) FROM blocks WHERE place NOT IN (SELECT place FROM messages WHERE packed IS NOT NULL)",
        ),
    )
    for what, kept, there in (
        *(packed if has_tables(connection) else ()),
        (
            "totals of conversations",
            "SELECT conversations, archived, escalated FROM totals",
            "SELECT count(*), coalesce(sum(archived), 0), coalesce(sum(escalated), 0) FROM conversations",
        ),
        (
            "totals of messages",
            "SELECT messages, system_messages, tokens FROM totals",
            f"SELECT count(*), coalesce(sum(kind IN ({system})), 0), coalesce(sum(tokens_used), 0) FROM messages",
        ),
        (
            "messages by day",
            "SELECT day, messages FROM days WHERE messages <> 0 ORDER BY day",
            f"SELECT {_day('created_ms')}, count(*) FROM messages GROUP BY 1 ORDER BY 1",
        ),
        (
            "conversations by day",
            "SELECT day, conversations FROM days WHERE conversations <> 0 ORDER BY day",
            f"SELECT {_day('updated_ms')}, count(*) FROM conversations WHERE archived = 0 GROUP BY 1 ORDER BY 1",
        ),
        (
            "messages without a conversation",
            "SELECT 0",
            "SELECT count(*) FROM messages WHERE place >> 32 NOT IN (SELECT key FROM conversations)",
        ),
        (
            "conversations whose oldest message is another one",
            "SELECT 0",
            "SELECT count(*) FROM conversations WHERE oldest_ms IS NOT"
            f" (SELECT min(created_ms) FROM messages WHERE place > key * {PLACES} AND place < (key + 1) * {PLACES})",
        ),
    ):
        expected, found = connection.execute(kept).fetchall(), connection.execute(there).fetchall()
        if expected != found:
            wrong.append(f"{what}: expected {expected!r:.200}, found {found!r:.200}; make the archive anew")
    return wrong


def _day(column: str) -> str:
    # Division rounds towards zero, days are counted downwards.
    return f"({column} - (({column} % {DAY_MS} + {DAY_MS}) % {DAY_MS})) / {DAY_MS}"


def _clamped(value: int | None, low: int, high: int, default: int = 0) -> int:
    """*value*, or *default* when there is none, not below *low* nor above *high*."""
    return min(max(default if value is None else value, low), high)


_sync_data = os.fdatasync if hasattr(os, "fdatasync") else os.fsync
