"""Backups with proof and rotation, to be ended at any of their system calls.

    python -m tests.crash.backing_up DATA_DIR ACKNOWLEDGED [--first]

With ``--first`` it fills the directory and takes the first backup; without, it changes something and takes two more, of
which only the newest is to stay. One byte goes to ACKNOWLEDGED after each acknowledged change. The history is packed on the
way. Everything is done in the main thread: a proof as well, as where no process can be started.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from holdfast.care import history_follower
from holdfast.engine import Engine
from holdfast.ops import MessageAppend, SessionPut
from holdfast.settings import BackupSettings
from tests.crash.harness import reopened

SETTINGS = BackupSettings(keep=1, keep_daily=0, keep_weekly=0, pitr=0.001)
SESSIONS = 30


def main() -> None:
    data_dir, acknowledged = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    history_follower.PACK_AFTER_S = 0.0
    sys.executable = ""
    engine = reopened(data_dir, backups=SETTINGS, journal_keep=0)
    if "--first" in sys.argv:
        for n in range(SESSIONS):
            engine.submit(MessageAppend(id=str(n), role="user", content=f"hola {n}")).wait()
            engine.submit(SessionPut(id=str(n), value={"n": n})).wait()
        back_up(engine)
    else:
        for n in range(2):
            engine.submit(SessionPut(id=f"new {n}", value={"n": n})).wait()
            os.write(acknowledged, b".")
            back_up(engine)
    engine.close()


def back_up(engine: Engine) -> None:
    """Take a backup; a fault ends the life."""
    assert engine.backup("api").proved
    engine.backups.history.step()


if __name__ == "__main__":
    main()
