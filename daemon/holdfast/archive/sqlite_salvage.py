"""What can still be read of a damaged SQLite archive."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from holdfast.archive.base import Head
from holdfast.archive.sqlite_file import LOG, SQLITE_ERRORS, connect_to_salvage
from holdfast.archive.sqlite_packed import PLACES, BlockDamaged, Dictionaries, Texts
from holdfast.archive.sqlite_rows import MESSAGE_COLUMNS, message_of
from holdfast.core.event import StoredMessage

MESSAGES_AT_ONCE = 500
"""Of one conversation, that are handed over together."""

_KEY_MAX = 2**31 - 1

_CONVERSATIONS = "SELECT key, id FROM conversations NOT INDEXED WHERE key >= ? AND key <= ? ORDER BY key"
_HEADS = "SELECT key, id, version, head FROM conversations NOT INDEXED WHERE key >= ? AND key <= ? ORDER BY key"
_MESSAGES = f"SELECT place, {MESSAGE_COLUMNS} FROM messages NOT INDEXED WHERE place >= ? AND place <= ? ORDER BY place"
# Answered by the index alone, so that it works where the table does not.
_IDS = "SELECT key, id FROM conversations INDEXED BY conversation_by_id WHERE id > '' ORDER BY id"


def salvage(path: Path) -> Iterator[tuple[str, list[StoredMessage]]]:
    """The messages that the file *path* still gives, some of one conversation at a time, in order.

    The file is only read, with its write-ahead log when that helps. A page that is damaged costs the messages on it,
    or, where it leads to others, those behind it. Memory does not grow with the file.
    """
    # Without a log the file is all there is; with one that cannot be used it is what the last checkpoint left.
    for with_log in (True, False) if _has_log(path) else (False,):
        try:
            connection = connect_to_salvage(path, with_log=with_log)
        except SQLITE_ERRORS:
            continue
        with closing(connection):
            yield from _all_messages(connection)
            return


def salvage_heads(path: Path) -> Iterator[Head]:
    """The conversations, without their messages, that the file *path* still gives; as ``salvage``."""
    for with_log in (True, False) if _has_log(path) else (False,):
        try:
            connection = connect_to_salvage(path, with_log=with_log)
        except SQLITE_ERRORS:
            continue
        with closing(connection):
            for _, id, version, value in _readable(connection, _HEADS, 0, _KEY_MAX, lambda first, end: None):
                if isinstance(id, str) and isinstance(version, int) and isinstance(value, str):
                    yield Head(id, version, value.encode())
            return


def _has_log(path: Path) -> bool:
    try:
        return path.with_name(path.name + LOG).stat().st_size > 0
    except OSError:
        return False


def _all_messages(connection: sqlite3.Connection) -> Iterator[tuple[str, list[StoredMessage]]]:
    gaps: list[tuple[int, int]] = []
    for key, id in _readable(connection, _CONVERSATIONS, 0, _KEY_MAX, lambda first, end: gaps.append((first, end))):
        if isinstance(id, str):
            yield from _messages_of(connection, key, id)
    if not gaps:
        return
    # Conversations whose row is lost; the index that knows them by id may be whole, or whole up to a bad place that is
    # then met from the other end as well.
    met: set[int] = set()
    for direction in ("ASC", "DESC"):
        try:
            for key, id in connection.execute(f"{_IDS} {direction}"):
                if key not in met and isinstance(id, str) and any(first <= key < end for first, end in gaps):
                    met.add(key)
                    yield from _messages_of(connection, key, id)
            return
        except SQLITE_ERRORS:
            continue


def _messages_of(connection: sqlite3.Connection, key: int, id: str) -> Iterator[tuple[str, list[StoredMessage]]]:
    found: list[StoredMessage] = []
    texts = Texts(connection, Dictionaries())
    for row in _readable(connection, _MESSAGES, key * PLACES, (key + 1) * PLACES - 1):
        try:
            found.append(message_of(row[1:], texts))
        except (IndexError, TypeError, BlockDamaged, *SQLITE_ERRORS):
            continue
        if len(found) >= MESSAGES_AT_ONCE:
            yield id, found
            found = []
    if found:
        yield id, found


def _readable(
    connection: sqlite3.Connection,
    query: str,
    first: int,
    last: int,
    skipped: Callable[[int, int], object] = lambda first, end: None,
) -> Iterator[tuple[Any, ...]]:
    """The rows of *query* from *first* to *last*, its first column, in order, but for those that cannot be read.

    *skipped* is told where a gap begins, and where it ends.
    """
    position = first
    while position <= last:
        try:
            for row in connection.execute(query, (position, last)):
                if row[0] < position:
                    # A page stands where another one should; without this its rows could come for ever.
                    raise sqlite3.DatabaseError(f"{row[0]} stands behind {position}")
                yield row
                position = row[0] + 1
            return
        except SQLITE_ERRORS:
            # Python looks one row ahead: the error of that one took this one with it.
            if _can_read(connection, query, position, last):
                row = connection.execute(f"{query} LIMIT 1", (position, last)).fetchone()
                if row is None:
                    return
                yield row
                position = row[0] + 1
                continue
            end = _end_of_gap(connection, query, position, last)
            skipped(position, end)
            position = end


def _end_of_gap(connection: sqlite3.Connection, query: str, first: int, last: int) -> int:
    """Where *query* can be read again, when it cannot at *first*: found by doubling the step, then by halving it."""
    bad, step = first, 1
    while not _can_read(connection, query, good := first + step, last):
        bad, step = good, step * 2
        if first + step > last:
            return last + 1
    while good - bad > 1:
        middle = (bad + good) // 2
        if _can_read(connection, query, middle, last):
            good = middle
        else:
            bad = middle
    return good


def _can_read(connection: sqlite3.Connection, query: str, first: int, last: int) -> bool:
    try:
        row = connection.execute(f"{query} LIMIT 1", (first, last)).fetchone()
    except SQLITE_ERRORS:
        return False
    return row is None or row[0] >= first
