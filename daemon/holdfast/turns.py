"""Work that is done once for all who ask for it at one time, such as a flush or a backup."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """One run at a time; while one is under way, all who ask share the run that comes after it.

    Not the run under way: it may have looked at the state before they changed it.

    Attributes:
        running: held by a run from begin to end; whoever takes it keeps the next one waiting.
    """

    def __init__(self) -> None:
        self.running = threading.Lock()
        self._guard = threading.Lock()
        self._next: _Run[T] | None = None

    def take(self, work: Callable[[], T]) -> T:
        """What *work* gives: ours, or that of another caller who waits for the same run; blocks. Raises what it raises."""
        with self._guard:
            run = self._next
            is_mine = run is None
            if run is None:
                run = self._next = _Run()
        if is_mine:
            try:
                with self.running:
                    with self._guard:
                        self._next = None
                    run.results.append(work())
            except BaseException as error:
                run.error = error
            finally:
                with self._guard:
                    # Still so when the wait for the run before was broken off, by a KeyboardInterrupt.
                    if self._next is run:
                        self._next = None
                run.done.set()
        else:
            run.done.wait()
        if run.error is not None:
            raise run.error
        return run.results[0]


class _Run(Generic[T]):
    def __init__(self) -> None:
        self.results: list[T] = []
        self.error: BaseException | None = None
        self.done = threading.Event()
