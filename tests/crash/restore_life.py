"""A restore of a stopped directory in a process of its own, to be ended at each of its system calls.

``python -m tests.crash.restore_life DATA BACKUP NOW_MS`` goes back to the set BACKUP as the command does.
"""

from __future__ import annotations

import sys
from pathlib import Path

from holdfast.care import moments, restore, restore_plan
from holdfast.care.history import History
from holdfast.disk.files import DirectoryLock
from tests.engine_harness import Log
from tests.restore_harness import settings_of


def main(data_dir: Path, backup: str, now_ms: int) -> None:
    """Restore; the whole of it in the main thread."""
    settings = settings_of(data_dir)
    lock = DirectoryLock(data_dir)
    history = History(data_dir)
    target = moments.choose(data_dir, None, name=backup, at_ms=None, now_ms=now_ms, history=history)
    plan, _ = restore_plan.planned(settings, target, None, history, engine=None, now_ms=now_ms)
    restoring = restore.Restoring(settings, target, plan, None, log=Log())
    restoring.prepare()
    restoring.finish("", 0, now_ms, is_awaited=True)
    lock.release()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
