"""Faults that only the process itself can have; the lab loads this into the daemon when the variable LAB_FAULT names one.

It stands in the lab's virtual environment beside a ``.pth`` file that imports it, and in no wheel.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

ENDLESS_S = 3600.0
BURST_LINES = 40_000


def _block(*_: object) -> None:
    """In the main thread, which is the one of the event loop."""
    time.sleep(ENDLESS_S)


def _burst(*_: object) -> None:
    """More lines than any buffer between us and the reader of the log holds, from a thread that lets others work."""
    import structlog

    def log() -> None:
        logger = structlog.get_logger()
        for number in range(BURST_LINES):
            logger.warning("lab.line_written", number=number, text="x" * 1_000)
            if number % 100 == 99:
                time.sleep(0.001)

    threading.Thread(target=log, daemon=True).start()


def _hang_service() -> None:
    """A service that does not stop, one that fails to, and a job in the executor that never ends."""
    from holdfast.service import supervisor, watch

    start = watch.FileWatch.start

    async def start_with_endless_job(self: watch.FileWatch) -> None:
        await start(self)
        asyncio.get_running_loop().run_in_executor(None, time.sleep, ENDLESS_S)

    async def stop_never(self: watch.FileWatch) -> None:
        await asyncio.sleep(ENDLESS_S)

    async def stop_badly(self: supervisor.Interval) -> None:
        raise RuntimeError("this interval does not want to stop")

    watch.FileWatch.start = start_with_endless_job
    watch.FileWatch.stop = stop_never
    supervisor.Interval.stop = stop_badly


match os.environ.get("LAB_FAULT"):
    case "block":
        signal.signal(signal.SIGRTMIN, _block)
    case "burst":
        signal.signal(signal.SIGRTMIN, _burst)
    case "hang":
        _hang_service()
