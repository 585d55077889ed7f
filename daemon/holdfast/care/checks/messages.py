"""Whether messages, which never change, are what they were when they were backed up."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import orjson

from holdfast.archive.base import (
    Archive,
    ArchiveDamaged,
    ArchiveError,
    ConversationQuery,
    Head,
    MessageQuery,
)
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite import open_sqlite
from holdfast.archive.sqlite_file import LOG
from holdfast.care.backup_set import BackupSet, SetDamaged, extract
from holdfast.care.checks.run import Verification
from holdfast.care.findings import ANEW, Finding, an_error
from holdfast.clock import parse_ms
from holdfast.core.event import StoredMessage
from holdfast.core.state import CONVERSATIONS
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused, StorageFull, Unavailable

AT_ONCE = 500
"""Conversations, or messages of one, that are read at a time."""

_Ask = Callable[[Callable[[Archive], Any]], Any]
"""Has a question answered by an archive."""


def look_at_messages(run: Verification, found: BackupSet) -> Iterator[Finding]:
    """Each message of the conversations that are the same here and in the set *found*.

    One that has changed since is passed over: it may have been deleted and begun again, with other messages.
    """
    run.progress(f"comparing the messages with backup {found.name}")
    try:
        with ExitStack() as opened:
            scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-")))
            with Directory(scratch) as directory:
                extract(found, [ARCHIVE], directory, run.seal)
            archive = opened.enter_context(closing(open_sqlite(scratch / ARCHIVE)))
            yield from _compared(run, found, _present(run, opened), lambda question: question(archive))
    except _Unread as error:
        yield an_error(
            "archive",
            "messages that can be read",
            str(error),
            "restore it from a backup; else run `holdfast mend`, which makes it anew of what can be read and of the journal",
            mend=ANEW,
        )
    except (StorageFull, OSError) as error:
        yield Finding(severity="notice", part="archive", found=f"messages could not be compared with backups: {error}")
    except (SetDamaged, ArchiveDamaged, ArchiveError, DataRefused):
        return  # told by those who look at the sets, and at the archive


class _Unread(Exception):
    """Something in the archive here is no message any more."""


def _present(run: Verification, opened: ExitStack) -> _Ask:
    if run.engine is not None:
        return partial(_asked, run.engine.transcripts.read)
    # Whoever opens an archive takes its log over, so a copy is opened.
    scratch = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="holdfast-")))
    for name in (ARCHIVE, f"{ARCHIVE}{LOG}"):
        if (run.path / name).exists():
            shutil.copyfile(run.path / name, scratch / name)
    archive = opened.enter_context(closing(open_sqlite(scratch / ARCHIVE)))
    return partial(_asked, lambda question: question(archive))


def _asked(ask: _Ask, question: Callable[[Archive], Any]) -> Any:
    try:
        return ask(question)
    except (ArchiveDamaged, ArchiveError, Unavailable) as error:
        raise _Unread(str(error)) from error


def _compared(run: Verification, found: BackupSet, here: _Ask, then: _Ask) -> Iterator[Finding]:
    present = {head.id: hash(head) for head in _heads(run, here)}
    for head in _heads(run, then):
        if present.get(head.id) != hash(head):
            continue
        pairs = zip_longest(_messages(run, head.id, here), _messages(run, head.id, then))
        number = next(((ours or theirs).number for ours, theirs in pairs if ours != theirs), None)
        if number is None or not _is_still(run, head):
            continue
        yield an_error(
            "archive",
            f"message {number} of conversation {head.id!a:.80} as backup {found.name} has it, since no message changes",
            "another one",
            f"see which is right (`holdfast restore {found.name} --into DIR`), and look for a disk that fails; keep that backup",
        )


def _heads(run: Verification, ask: _Ask) -> Iterator[Head]:
    after: tuple[int, str] | None = None
    while heads := ask(partial(_page_of_heads, after)):
        run.pause()
        yield from heads
        after = parse_ms(orjson.loads(heads[-1].value)["updated_at"]), heads[-1].id


def _page_of_heads(after: tuple[int, str] | None, archive: Archive) -> list[Head]:
    return archive.conversations(ConversationQuery(after=after, limit=AT_ONCE))


def _messages(run: Verification, id: str, ask: _Ask) -> Iterator[StoredMessage]:
    after = 0
    while some := ask(partial(_page_of_messages, id, after)):
        run.pause()
        yield from some
        after = some[-1].number


def _page_of_messages(id: str, after: int, archive: Archive) -> list[StoredMessage]:
    return archive.messages(id, MessageQuery(after=after, limit=AT_ONCE, newest=False))


def _is_still(run: Verification, head: Head) -> bool:
    """Whether nobody has changed the conversation while it was compared."""
    if run.engine is None:
        return True
    present = run.engine.get(CONVERSATIONS, head.id)
    return present is not None and present.version == head.version
