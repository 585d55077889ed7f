"""Looking through a SQLite archive that nobody has open, without changing a byte of it or beside it."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from holdfast.archive.base import ArchiveDamaged, ArchiveError
from holdfast.archive.sqlite import counted_messages, miscounted
from holdfast.archive.sqlite_file import (
    HEADER_BYTES,
    LOG,
    LOG_INDEX,
    SQLITE_ERRORS,
    check_header,
    check_identity,
    connect_to_look,
    our_error,
)

_COMPLAINTS_MAX = 20


class Look(NamedTuple):
    """What was seen.

    Attributes:
        archived_seq: it holds every event up to here.
        schema_version: of its tables.
        wrong: what is not as it should be, in words; empty when nothing is.
        versions: of each conversation's head.
        messages: of each conversation, how many there are.
    """

    archived_seq: int
    schema_version: int
    wrong: list[str]
    versions: dict[str, int]
    messages: dict[str, int]


def look_through(path: Path) -> Look | None:
    """Everything in the archive *path*, None when it was just being created; takes a second for a million messages.

    Raises:
        ArchiveDamaged: it cannot be read.
        ArchiveError: not ours to read; or its log has to be copied and there is no room for that.
        DataRefused: made by a newer Holdfast.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        if not header:
            return None
        check_header(path, header)
        log = path.with_name(path.name + LOG)
        if not log.exists() or not log.stat().st_size or path.with_name(path.name + LOG_INDEX).exists():
            return _look(path)
        # Without the index of its log SQLite would make one beside it.
        with tempfile.TemporaryDirectory(prefix="holdfast-") as scratch:
            copy = Path(scratch) / path.name
            shutil.copyfile(path, copy)
            shutil.copyfile(log, copy.with_name(copy.name + LOG))
            copy.with_name(copy.name + LOG_INDEX).touch()
            return _look(copy)
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be read: {error.strerror or error}; check the disk and its permissions"
        ) from error


def _look(path: Path) -> Look | None:
    try:
        with closing(connect_to_look(path)) as connection:
            version = _number(connection, "PRAGMA user_version")
            check_identity(path, _number(connection, "PRAGMA application_id"), version)
            if not version:
                return None
            wrong = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_COMPLAINTS_MAX})")]
            wrong = miscounted(connection) if wrong == ["ok"] else wrong
            return Look(
                archived_seq=_number(connection, "SELECT archived_seq FROM totals WHERE one = 1"),
                schema_version=version,
                wrong=wrong,
                versions=dict(connection.execute("SELECT id, version FROM conversations").fetchall()),
                messages=counted_messages(connection),
            )
    except SQLITE_ERRORS as error:
        raise our_error(error, path) from error


def _number(connection: sqlite3.Connection, query: str) -> int:
    row = connection.execute(query).fetchone()
    if row is None or not isinstance(row[0], int):
        raise ArchiveDamaged(f"the archive does not answer {query!r}; it has to be made anew")
    return row[0]
