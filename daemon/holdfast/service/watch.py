"""Notices that the settings file has changed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.polling import PollingObserver

SETTLE_S = 0.3
"""A change is reported when nothing has changed for this long: a half-written file is not read."""

POLL_S = 0.5
"""Between two looks at the directory where the system refuses to tell about changes."""

CHECK_S = 0.5
"""Between two looks of our own, which notice what no event tells: a directory made anew, a link pointed elsewhere."""

_WATCHDOG_STOPS = "InotifyEmitter.queue_events() called when the thread is inactive"
"""Watchdog logs it as an error when an event comes in the moment in which it is stopped; nobody waits for that event."""

# With its own logger, which alone says it: what else it has to say is told.
logging.getLogger("watchdog.observers.inotify").addFilter(lambda entry: entry.msg != _WATCHDOG_STOPS)

Signature = tuple[tuple[int, ...] | None, ...]


class FileWatch:
    """Calls *changed* once after every burst of changes to any of *files*, as a service.

    A file may be absent, vanish, come back, or be a symbolic link that is pointed elsewhere; its directory is
    watched, not the file, as editors and configuration management replace files by renaming.
    """

    name = "settings watch"
    stop_deadline_s = 2.0

    def __init__(
        self,
        files: Sequence[Path],
        changed: Callable[[], Awaitable[object]],
        *,
        observer: Callable[[], Any] = Observer,
    ) -> None:
        """*observer* makes the watchdog observer that is tried first."""
        self._files = files
        self._changed = changed
        self._make_observer = observer
        self._observer: Any = None
        self._watched: dict[Path, tuple[int, int]] = {}
        self._is_polling = False
        self._seen: Signature = ()
        self._noticed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._log = structlog.get_logger()

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._seen = _signature(self._files)
        self._observe()
        self._task = asyncio.create_task(self._run(), name=self.name)

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._forget()

    async def _run(self) -> None:
        while True:
            await self._hear(CHECK_S)
            if self._watched != _directories(self._files):
                self._observe()
            if _signature(self._files) == self._seen:
                continue
            # Wait for the burst to end, however long it lasts.
            while self._seen != (now := _signature(self._files)):
                self._seen = now
                await asyncio.sleep(SETTLE_S)
            await self._changed()

    async def _hear(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._noticed.wait()
        except TimeoutError:
            return
        self._noticed.clear()

    def _observe(self) -> None:
        """Watch the directories of the files as they are now; by polling when the system refuses."""
        self._forget()
        self._watched = _directories(self._files)
        if not self._is_polling:
            try:
                self._start(self._make_observer())
                return
            except OSError as error:
                # Out of inotify instances or watches (fs.inotify.max_user_*): that is no reason not to run.
                self._is_polling = True
                self._log.warning("config.watch_degraded", reason=str(error), poll_s=POLL_S)
        try:
            self._start(PollingObserver(timeout=POLL_S))
        except OSError:
            # A directory vanished in this moment; the next check finds the difference.
            self._watched = {}

    def _start(self, observer: Any) -> None:
        handler = _Handler(self._notice)
        try:
            for directory in self._watched:
                observer.schedule(handler, str(directory))
            observer.start()
        except BaseException:
            _end(observer)
            raise
        self._observer = observer

    def _forget(self) -> None:
        if self._observer is not None:
            _end(self._observer)
            self._observer = None

    def _notice(self) -> None:
        """Called from watchdog's thread."""
        try:
            self._loop.call_soon_threadsafe(self._noticed.set)
        except RuntimeError:
            # The loop is closed: the process ends.
            return


class DirectoryWatch:
    """Notices at once what comes into one directory; by polling where the system refuses to tell.

    Not a service: whoever uses it looks for himself now and then, and is only woken earlier.

    Attributes:
        noticed: set, in the loop that called ``start``, when something has happened.
    """

    def __init__(self, directory: Path, *, observer: Callable[[], Any] = Observer) -> None:
        """*observer* makes the watchdog observer that is tried first."""
        self._directory = directory
        self._make_observer = observer
        self._observer: Any = None
        self._complete: set[str] = set()
        self.noticed = asyncio.Event()
        self._log = structlog.get_logger()

    def start(self) -> None:
        """Begin; what was there before is not noticed."""
        self._loop = asyncio.get_running_loop()
        try:
            self._watch(self._make_observer())
        except OSError as error:
            self._log.warning("inbox.watch_degraded", reason=str(error), poll_s=POLL_S)

    def take_complete(self) -> set[str]:
        """The names that were moved in, or closed by who wrote them, since this was asked last."""
        complete, self._complete = self._complete, set()
        return complete

    def stop(self) -> None:
        """End."""
        if self._observer is not None:
            _end(self._observer)
            self._observer = None

    def _watch(self, observer: Any) -> None:
        try:
            observer.schedule(_CompleteHandler(self._notice), str(self._directory))
            observer.start()
        except BaseException:
            _end(observer)
            raise
        self._observer = observer

    def _notice(self, path: str | bytes) -> None:
        """Called from watchdog's thread."""
        self._complete.add(os.path.basename(os.fsdecode(path)))
        try:
            self._loop.call_soon_threadsafe(self.noticed.set)
        except RuntimeError:
            # The loop is closed: the process ends.
            return


class _CompleteHandler(FileSystemEventHandler):
    def __init__(self, notice: Callable[[str | bytes], None]) -> None:
        self._notice = notice

    def on_closed(self, event: FileSystemEvent) -> None:
        self._notice(event.src_path)

    def on_moved(self, event: FileSystemEvent) -> None:
        if event.dest_path:
            self._notice(event.dest_path)


class _Handler(FileSystemEventHandler):
    def __init__(self, notice: Callable[[], None]) -> None:
        self._notice = notice

    def on_any_event(self, event: FileSystemEvent) -> None:
        # Reading the file is an event as well, and we read it after each event.
        if event.event_type in ("created", "modified", "moved", "deleted"):
            self._notice()


def _end(observer: Any) -> None:
    if observer.is_alive():
        observer.stop()
        observer.join(1.0)


def _directories(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """The directories in which *files*, and what they point to, stand, with their identity."""
    found = {}
    for path in files:
        for directory in {path.parent, Path(os.path.realpath(path)).parent}:
            try:
                status = directory.stat()
            except OSError:
                continue
            found[directory] = (status.st_dev, status.st_ino)
    return found


def _signature(files: Sequence[Path]) -> Signature:
    """What differs after any change to *files*: identity, size and time of each; None for one that is absent."""
    signature: list[tuple[int, ...] | None] = []
    for path in files:
        try:
            status = path.stat()
            signature.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            signature.append(None)
    return tuple(signature)
