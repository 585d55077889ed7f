"""A scripted life of a data directory, to be ended or hindered at any of its system calls.

    python -m tests.crash.life DATA_DIR ACKNOWLEDGED [--wait] [--after N]

Every step is the same in each run, so whoever knows how many were acknowledged knows what must be there. One byte goes
to ACKNOWLEDGED, which is outside of DATA_DIR, after each acknowledged change. With ``--wait`` it tells the id of its
journal thread on stdout and waits for a line on stdin before it lives. With ``--after`` it goes on with a life of which
*N* steps are done.

Ends with 0 when it could go to its end, with 1 when the journal broke or the directory could not be opened or closed.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from holdfast.engine import Engine
from holdfast.errors import HoldfastError, JournalBroken, StorageFull
from tests.crash.harness import do, reopened
from tests.crash.oracle import Ledger

SEED = "life"
STEPS = 24
FLUSH_AFTER = (8, 14, 15)
REOPEN_AFTER = 18

JOURNAL_KEEP = 2_000
"""Some segments are kept behind a flush, and some of those make room for later ones."""


def main() -> int:
    data_dir, acknowledged = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        engine = reopened(data_dir, journal_keep=JOURNAL_KEEP)
    except OSError as error:
        return failed("open", error)
    if "--wait" in sys.argv:
        journal = next(thread for thread in threading.enumerate() if thread.name == "holdfast-journal")
        os.write(1, b"%d\n" % (journal.native_id or 0))
        os.read(0, 1)
    done = int(sys.argv[sys.argv.index("--after") + 1]) if "--after" in sys.argv else 0
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
        if step in FLUSH_AFTER:
            flush(engine)
        if step == REOPEN_AFTER and "--wait" not in sys.argv:
            try:
                engine.close()
                engine = reopened(data_dir, journal_keep=JOURNAL_KEEP)
            except (HoldfastError, OSError) as error:
                return failed("reopen", error)
    try:
        engine.close()
    except (HoldfastError, OSError) as error:
        return failed("close", error)
    return 0


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


def failed(what: str, error: Exception) -> int:
    os.write(2, f"{what}: {error}\n".encode())
    return 1


if __name__ == "__main__":
    sys.exit(main())
