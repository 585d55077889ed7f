"""Whether the archive is whole, and has of each conversation what its head says."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from holdfast.archive.base import Archive, ArchiveDamaged, ArchiveError
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite_look import Look, look_through
from holdfast.care.checks.directory import COMPANIONS
from holdfast.care.checks.run import PAUSE_RECORDS, Verification, many
from holdfast.care.findings import (
    ANEW,
    SET_ASIDE,
    Finding,
    a_warning,
    an_error,
)
from holdfast.core.state import CONVERSATIONS
from holdfast.engine import Engine
from holdfast.errors import HoldfastError
from holdfast.flush import file_of


def look_at_archive(run: Verification) -> Iterator[Finding]:
    """The archive, page by page where nobody writes it, and against snapshots and journal."""
    if run.engine is not None:
        yield from _look_at_open_archive(run, run.engine)
        return
    path = run.path / ARCHIVE
    if not path.exists():
        if run.heads:
            yield an_error(
                "archive",
                f"the messages of {len(run.heads)} conversations",
                f"{ARCHIVE} is missing",
                "restore it; else the next start makes it anew from the journal, without what that does not have",
                mend=ANEW,
            )
        lost = [name for name in COMPANIONS if (run.path / name).exists()]
        for name in lost:
            yield a_warning(
                "archive",
                f"no {name} without {ARCHIVE}",
                f"{name} without {ARCHIVE}",
                "run `holdfast mend`",
                SET_ASIDE,
                name,
            )
        return
    try:
        look = look_through(path)
    except (ArchiveDamaged, ArchiveError) as error:
        yield an_error(
            "archive",
            "an archive that can be read",
            str(error),
            "restore it from a backup; else the next start makes it anew of what can be read and of the journal",
            mend=ANEW,
        )
        return
    if look is None:
        yield Finding(severity="notice", part="archive", found="it was just being created; the next start goes on")
        return
    yield from _look_at_closed_archive(run, look)


def _look_at_closed_archive(run: Verification, look: Look) -> Iterator[Finding]:
    problems = [
        an_error(
            "archive", "an archive in order", text, "restore it, or run `holdfast mend` to make it anew", mend=ANEW
        )
        for text in look.wrong
    ]
    seen = run.seen
    if look.archived_seq > seen.last_seq:
        problems.append(
            an_error(
                "archive",
                f"events up to {seen.last_seq}, where the journal ends",
                f"it has events up to {look.archived_seq}",
                "it is of another history: the next start makes it anew; restore it and the journal together",
                mend=ANEW,
            )
        )
    elif seen.first_seq and look.archived_seq + 1 < seen.first_seq:
        problems.append(
            an_error(
                "archive",
                f"every event before {seen.first_seq}, where the journal begins",
                f"it ends at {look.archived_seq}",
                "the next start makes it anew; restore a newer one if there is one",
                mend=ANEW,
            )
        )
    counted = {id: _counted(line) for id, line in run.heads.items()}
    # What only one of them has yet, the next start brings to the other.
    common_seq = min(seen.snapshot_seq, look.archived_seq)
    wrong = [
        id
        for id in sorted(counted.keys() | look.versions.keys())
        if seen.conversations.get(id, 0) <= common_seq
        and counted.get(id) != (look.versions.get(id), look.messages.get(id, 0))
    ]

    def lacks(id: str) -> bool:
        """Whether the conversation is as it should be, but for messages that are nowhere else in this directory."""
        head = counted.get(id)
        return head is not None and head[0] == look.versions.get(id) and head[1] > look.messages.get(id, 0)

    problems += (
        an_error(
            "archive",
            f"conversation {id!a:.80} {_in_words(counted.get(id))}, as in {file_of(CONVERSATIONS)}",
            _in_words((look.versions[id], look.messages.get(id, 0)) if id in look.versions else None),
            "restore the conversation from a backup"
            if lacks(id)
            else "restore it, or run `holdfast mend` to make it anew",
            mend="" if lacks(id) else ANEW,
        )
        for id in wrong
    )
    yield from problems
    if not problems:
        yield Finding(
            severity="ok",
            part="archive",
            found=f"{many(len(look.versions), 'conversation')}, {many(sum(look.messages.values()), 'message')}, at event "
            f"{look.archived_seq}, schema {look.schema_version}",
        )


def _look_at_open_archive(run: Verification, engine: Engine) -> Iterator[Finding]:
    def ask(archive: Archive) -> tuple[int, int, list[str], dict[str, int] | None]:
        figures = archive.figures(run.now_ms)
        if not run.deep:
            return figures.conversations, figures.messages, [], None
        return figures.conversations, figures.messages, archive.check(), archive.message_counts()

    try:
        conversations, messages, wrong, counts = engine.transcripts.read(ask)
    except HoldfastError as error:
        run.pause()
        yield a_warning("archive", "an archive that answers", error.detail, "see the daemon's log")
        return
    problems = [an_error("archive", "an archive in order", text, "stop, and run `holdfast mend`") for text in wrong]
    there = engine.count(CONVERSATIONS)
    if there != conversations:
        problems.append(
            an_error(
                "archive",
                f"{there} conversations, as in memory",
                f"{conversations}",
                "stop, and run `holdfast mend` to make it anew",
            )
        )
    for number, (id, count) in enumerate((counts or {}).items()):
        if number % PAUSE_RECORDS == 0:
            run.pause()
        if not _agrees(run, engine, id, count):
            problems.append(
                an_error(
                    "archive",
                    f"the messages of conversation {id!a:.80}, as its head counts them",
                    f"{count}",
                    "stop, and run `holdfast mend`",
                )
            )
    yield from problems
    if not problems:
        yield Finding(
            severity="ok", part="archive", found=f"{many(conversations, 'conversation')}, {many(messages, 'message')}"
        )


def _agrees(run: Verification, engine: Engine, id: str, count: int) -> bool:
    """Whether the conversation *id* has *count* messages in memory, or was changed while we looked."""
    found = engine.get(CONVERSATIONS, id)
    if found is None:
        return True
    head = orjson.loads(found.value)
    return bool(head["message_count"] + head["system_count"] >= count)


def _counted(line: bytes) -> tuple[int, int]:
    """Version and messages of a conversation, as its line says."""
    head = orjson.loads(line)
    return head["_holdfast"]["v"], head["message_count"] + head["system_count"]


def _in_words(counted: tuple[int, int] | None) -> str:
    return "absent" if counted is None else f"at version {counted[0]} with {counted[1]} messages"
