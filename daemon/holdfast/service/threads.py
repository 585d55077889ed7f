"""Blocking work beside the event loop, in threads that never keep the process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def in_thread(name: str, work: Callable[[], Result]) -> Result:
    """What *work* returns or raises, run in a daemon thread of its own.

    An executor would do, but the interpreter waits for its threads at exit: one job that hangs on a dead disk
    would keep the process for ever. A cancelled caller leaves the thread running to its end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # None only where Result is None
        else:
            future.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            # StopIteration cannot be raised into a future, SystemExit would end the loop.
            error = raised if isinstance(raised, Exception) and not isinstance(raised, StopIteration) else None
            error = error or RuntimeError(f"{name} raised {type(raised).__name__}")
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future
