"""A scripted life of a data directory, to be ended or hindered at any of its system calls.

    python -m tests.crash.life DATA_DIR ACKNOWLEDGED [--wait] [--after N]

Every step is the same in each run, so whoever knows how many were acknowledged knows what must be there; and what was
changed about a conversation is read at once, so that the archive's thread does the same in each run as well. One byte
goes to ACKNOWLEDGED, which is outside of DATA_DIR, after each acknowledged change. With ``--wait`` it tells the ids of
its journal thread and its archive thread on stdout, and waits for a line on stdin before it lives. With ``--after`` it
goes on with a life of which *N* steps are done.

Ends with 0 when it could go to its end, with 1 when the journal broke or the directory could not be opened or closed.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from holdfast.archive import follower
from holdfast.archive.base import Archive, ArchiveDamaged
from holdfast.engine import Engine
from holdfast.errors import HoldfastError, JournalBroken, StorageFull, Unavailable
from holdfast.settings import BackupSettings
from tests.crash.harness import Recorder, do, reopened
from tests.crash.oracle import CONVERSATIONS, Change, Ledger

SEED = "life 3929"
"""A life with every kind of change in it."""
STEPS = 28
FLUSH_AFTER = (8, 14, 15)
DAMAGE_AFTER = 11
"""The archive is called damaged, so that it is made anew while everything goes on."""
REOPEN_AFTER = 20

RETRY_S = 0.05
"""An archive that cannot be written tries again so soon; lives are short."""

JOURNAL_KEEP = 2_000
"""Some segments are kept behind a flush, and some of those make room for later ones."""


class Complaints(Recorder):
    """Says on stderr what the archive could not do, and when it can again."""

    def info(self, event: str, **fields: Any) -> None:
        super().info(event, **fields)
        if event == "archive.resumed":
            failed("archive", "resumed")

    def error(self, event: str, **fields: Any) -> None:
        super().error(event, **fields)
        if event in ("archive.stalled", "archive.failed"):
            failed("archive", fields["reason"])


def main() -> int:
    follower.RETRY_S = RETRY_S
    data_dir, acknowledged = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    done = int(sys.argv[sys.argv.index("--after") + 1]) if "--after" in sys.argv else 0
    try:
        engine = opened(data_dir)
    except OSError as error:
        return failed("open", error)
    if "--wait" in sys.argv:
        read(engine)
        threads = {thread.name: thread.native_id for thread in threading.enumerate()}
        os.write(1, b"%d %d\n" % (threads["holdfast-journal"] or 0, threads["holdfast-archive"] or 0))
        os.read(0, 1)
    ledger = ledger_after(done)
    for step in range(done + 1, STEPS + 1):
        change = ledger.propose()
        try:
            do(engine, change)
        except StorageFull:
            return failed("write", StorageFull("nothing here fills the disk"))
        except JournalBroken as error:
            return failed("write", error)
        ledger.acknowledge()
        os.write(acknowledged, b".")
        if is_about_conversations(change):
            read(engine)
        if step in FLUSH_AFTER:
            flush(engine)
        if step == DAMAGE_AFTER:
            damage(engine)
        if step == REOPEN_AFTER and "--wait" not in sys.argv:
            try:
                engine.close()
                engine = opened(data_dir)
            except (HoldfastError, OSError) as error:
                return failed("reopen", error)
    try:
        engine.close()
    except (HoldfastError, OSError) as error:
        return failed("close", error)
    return 0


def opened(data_dir: Path) -> Engine:
    return reopened(data_dir, Complaints(), journal_keep=JOURNAL_KEEP, backups=BackupSettings(pitr=0))


def is_about_conversations(change: Change) -> bool:
    """Whether the archive has something to do for it."""
    return any(collection == CONVERSATIONS for collection, _ in change.records)


def read(engine: Engine) -> None:
    """Wait until the archive has everything that was acknowledged."""
    try:
        engine.transcripts.figures()
    except Unavailable as error:
        failed("read", error)


def damage(engine: Engine) -> None:
    """Find that the archive cannot be read, and wait until it can be again."""
    asked: list[Archive] = []

    def ask(archive: Archive) -> None:
        asked.append(archive)
        if len(asked) == 1:
            raise ArchiveDamaged("as the script has it")

    try:
        engine.transcripts.read(ask)
    except Unavailable as error:
        failed("read", error)


def ledger_after(steps: int) -> Ledger:
    """The ledger of a life of which *steps* were acknowledged."""
    ledger = Ledger(0, SEED)
    for _ in range(steps):
        ledger.propose()
        ledger.acknowledge()
    return ledger


def flush(engine: Engine) -> None:
    try:
        engine.flush("api")
    except (HoldfastError, OSError) as error:
        failed("flush", error)


def failed(what: str, error: Exception | str) -> int:
    os.write(2, f"{what}: {error}\n".encode())
    return 1


if __name__ == "__main__":
    sys.exit(main())
