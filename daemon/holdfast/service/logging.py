"""The log of the daemon, which nothing that is logged and nobody who reads it can break.

structlog events and the library loggers go through one function, ``render``, into one bounded queue; one thread
writes them. What is not on the allow-list of ``events.EVENTS`` leaves redacted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NoReturn

import orjson
import structlog

from holdfast.clock import format_ms
from holdfast.service.events import EVENTS
from holdfast.service.redaction import describe_exception, exception_of, plain, redacted
from holdfast.settings import LogSettings

LINES_MAX = 10_000
"""Lines that wait for a slow reader before further ones are dropped."""

LINE_BYTES_MAX = 48 * 1024
"""journald cuts longer lines in two, and half a JSON object is none."""

TEXT_CHARS_SHORT = 1_000
"""What remains of each text in a line that was too long."""

WRITE_BYTES = 64 * 1024
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50, "exception": 40}

PRIORITIES = {"debug": b"<7>", "info": b"<6>", "warning": b"<4>", "error": b"<3>", "critical": b"<2>"}
"""How journald learns the level: it takes the prefix off, see sd-daemon(3). Thus ``journalctl -p err`` works."""


class LineWriter:
    """Writes lines to a descriptor from a thread of its own.

    ``put`` never blocks and never raises, whatever the reader does: lines beyond LINES_MAX are dropped, counted, and
    reported by *report_dropped* as soon as a write succeeds again. The thread is a daemon: a reader
    that never comes back does not keep the process.

    Attributes:
        dropped_total: lines that were dropped so far.
    """

    def __init__(self, fd: int, report_dropped: Callable[[int], bytes]) -> None:
        self._fd = fd
        self._report_dropped = report_dropped
        # SimpleQueue, because its put may be interrupted by a signal or a finaliser that logs in turn.
        self._queue: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self.dropped_total = 0
        self._dropped = 0
        self._drop_lock = threading.RLock()
        self._is_closed = False
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Queue *line*, newline included."""
        if self._is_closed:
            return
        if self._queue.qsize() >= LINES_MAX:
            self._drop(1)
        else:
            self._queue.put(line)

    def drain(self, deadline_s: float, *, close: bool = False) -> bool:
        """Wait until all lines put so far are written, at most *deadline_s*; whether they are.

        With *close* nothing put later is written, so that the last line stays the last.
        """
        self._is_closed = self._is_closed or close
        reached = threading.Event()
        self._queue.put(reached)
        return reached.wait(deadline_s)

    def _drop(self, count: int) -> None:
        with self._drop_lock:
            self._dropped += count
            self.dropped_total += count

    def _run(self) -> NoReturn:
        while True:
            lines, reached = self._next()
            if lines:
                self._write(lines)
            if reached is not None:
                reached.set()

    def _next(self) -> tuple[list[bytes], threading.Event | None]:
        """What can be written at once: lines up to WRITE_BYTES or up to a drain."""
        lines: list[bytes] = []
        size = 0
        waiting = self._queue.get()
        while isinstance(waiting, bytes):
            lines.append(waiting)
            size += len(waiting)
            if size >= WRITE_BYTES:
                return lines, None
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                return lines, None
        return lines, waiting

    def _write(self, lines: list[bytes]) -> None:
        if not self._write_all(b"".join(lines)):
            self._drop(len(lines))
            return
        with self._drop_lock:
            dropped, self._dropped = self._dropped, 0
        if dropped and not self._write_all(self._report_dropped(dropped)):
            with self._drop_lock:
                # These are in the total already.
                self._dropped += dropped

    def _write_all(self, chunk: bytes) -> bool:
        rest = memoryview(chunk)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                # Somebody who shares the descriptor made it non-blocking.
                select.select([], [self._fd], [])
            except OSError:
                return False
        return True


class Log:
    """The log of this process from ``install`` to ``drain``.

    Level and redaction may change while it is in use; the form may not.
    """

    def __init__(self, settings: LogSettings, *, fd: int = 1) -> None:
        self.is_terminal = os.isatty(fd)
        self._is_journal = _is_journal(fd)
        self._console: structlog.dev.ConsoleRenderer | None = None
        if settings.format == "console" or (settings.format == "auto" and self.is_terminal):
            self._console = structlog.dev.ConsoleRenderer(colors=self.is_terminal)
        self._settings = settings
        self._level = LEVELS[settings.level]
        self._writer = LineWriter(
            fd, lambda count: self.render("warning", {"event": "log.lines_dropped", "count": count})
        )

    def install(self) -> None:
        """Become the log of structlog, of the library loggers, and of threads that end by an exception."""
        structlog.configure(
            processors=[self._process],
            wrapper_class=structlog.make_filtering_bound_logger(logging.NOTSET),
            logger_factory=structlog.ReturnLoggerFactory(),
            cache_logger_on_first_use=False,
        )
        root = logging.getLogger()
        root.handlers[:] = [_LibraryHandler(self)]
        # What libraries say below warning is about themselves.
        root.setLevel(logging.WARNING)
        logging.captureWarnings(True)
        threading.excepthook = self._thread_failed

    def change(self, settings: LogSettings) -> None:
        """Apply the level and redaction of *settings* from the next line on."""
        self._settings = settings
        self._level = LEVELS[settings.level]

    def emit(self, level: str, event: Mapping[str, Any]) -> None:
        """Queue one event at *level*; for those who do not come through structlog."""
        if LEVELS.get(level, LEVELS["info"]) >= self._level:
            self._writer.put(self.render(level, event))

    def show(self, text: str) -> None:
        """Write *text* as it is, in order with the events; for a person at a terminal."""
        self._writer.put(text.encode("utf-8", "backslashreplace") + b"\n")

    def drain(self, deadline_s: float, *, close: bool = False) -> bool:
        """Wait until everything logged so far is written, at most *deadline_s*; with *close* nothing more is."""
        return self._writer.drain(deadline_s, close=close)

    @property
    def redacts(self) -> bool:
        """Whether it hides what may name or quote a person."""
        return self._settings.redact

    @property
    def lines_dropped(self) -> int:
        """How many could not be written, so far."""
        return self._writer.dropped_total

    def render(self, level: str, event: Mapping[str, Any]) -> bytes:
        """One line, newline included, at most LINE_BYTES_MAX long after its priority. Never raises."""
        priority = PRIORITIES.get(level, b"") if self._is_journal else b""
        try:
            return priority + self._rendered(level, event)
        except Exception as error:
            reason = f"{type(error).__name__} while rendering {str(event.get('event'))[:100]!a}"
            return priority + orjson.dumps({"level": "error", "event": "log.line_failed", "reason": reason}) + b"\n"

    def _process(self, _logger: object, method: str, event: MutableMapping[str, Any]) -> NoReturn:
        self.emit("error" if method == "exception" else method, event)
        # The line is queued: nothing is left for structlog to write.
        raise structlog.DropEvent

    def _rendered(self, level: str, event: Mapping[str, Any]) -> bytes:
        fields = dict(event)
        name = plain(fields.pop("event", ""))
        error = exception_of(fields.pop("exc_info", None))
        if error is not None:
            fields["exception"] = describe_exception(error, redact=self._settings.redact)
        if self._settings.redact:
            allowed = EVENTS[name].fields if name in EVENTS else ()
            fields = {key: redacted(key, value, allowed) for key, value in fields.items()}
        line = {"timestamp": format_ms(time.time_ns() // 1_000_000), "level": level, "event": name}
        line |= {key: plain(value) for key, value in fields.items() if key not in line}
        encoded = self._encoded(line)
        if len(encoded) > LINE_BYTES_MAX:
            encoded = self._encoded({key: _shortened(value) for key, value in line.items()} | {"shortened": True})
        if len(encoded) > LINE_BYTES_MAX:
            encoded = self._encoded({key: line[key] for key in ("timestamp", "level", "event")} | {"shortened": True})
        return encoded

    def _encoded(self, line: dict[str, Any]) -> bytes:
        if self._console is None:
            return orjson.dumps(line) + b"\n"
        printable = {key: _printable(value) if isinstance(value, str) else value for key, value in line.items()}
        return str(self._console(None, str(line["level"]), printable)).encode() + b"\n"

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        name = failure.thread.name if failure.thread else "unknown"
        self.emit("error", {"event": "thread.failed", "thread": name, "exc_info": failure.exc_value})


class _LibraryHandler(logging.Handler):
    """Turns a record of a library logger into ``library.logged``."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = (
            "error" if record.levelno >= logging.ERROR else "warning" if record.levelno >= logging.WARNING else "info"
        )
        message = str(record.msg)
        if self._log.redacts:
            # The template is the library's own; its arguments, and what follows its first line, may quote a request.
            message = message.partition("\n")[0]
        else:
            with contextlib.suppress(Exception):
                message = record.getMessage()
        event = {"event": "library.logged", "logger": record.name, "message": message, "exc_info": record.exc_info}
        self._log.emit(level, event)


def _is_journal(fd: int) -> bool:
    """Whether *fd* leads to journald, which says in JOURNAL_STREAM what it gave us."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def secure_standard_descriptors() -> None:
    """Open /dev/null where descriptor 0, 1 or 2 is closed.

    Otherwise the next file to be opened, a journal segment say, would get the number, and log lines with it.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == fd, "descriptors are handed out lowest first"
    # Python itself has given up on those that were closed.
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _shortened(value: object) -> object:
    if isinstance(value, str):
        return value if len(value) <= TEXT_CHARS_SHORT else f"{value[:TEXT_CHARS_SHORT]}…"
    if isinstance(value, list | dict):
        return f"{str(value)[:TEXT_CHARS_SHORT]}…"
    return value


def _printable(text: str) -> str:
    """*text* without characters that steer a terminal."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
