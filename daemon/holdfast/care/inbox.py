"""Files that somebody drops into ``inbox/``: merged when they are complete, then put away with what came of them.

A file that was merged goes to ``inbox/done/``, one that cannot be to ``inbox/rejected/`` with a report beside it. As long as it
cannot be moved it stays, and is not merged again: what was removed since then would come back. After a crash between the two
steps it is merged once more.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from holdfast.care.given import Given, Unfinished, open_file, open_path
from holdfast.care.merge import MergeReport, merge
from holdfast.care.seal import seal_of
from holdfast.clock import format_ms
from holdfast.disk.files import READ_BYTES_MAX, Directory
from holdfast.errors import HoldfastError, InvalidRecord, SettingsError, StorageFull, Unavailable

if TYPE_CHECKING:
    from holdfast.engine import Engine

INBOX, DONE, REJECTED = "inbox", "done", "rejected"

SETTLE_S = 1.0
"""A file that was not closed under our eyes is complete when it has not changed for this long."""

DIRECTORY_SETTLE_S = 5.0
"""A directory is complete when nothing in it has changed for this long."""

PATIENCE_S = 30.0
"""So long a file that cannot be read as a whole may still be in the writing."""

RETRY_S = 5.0
"""Between two tries when there is no room."""

HELD_BYTES_MAX = 64 << 20
"""So much of a file may be in memory at a time, less than of an import: the daemon meets the same file again at each start, and
whoever is ended by the system for the memory he takes rejects nothing."""

NAME_BYTES_MAX = 200
"""Of a file's name in the name it gets in ``done`` or ``rejected``."""

_IGNORED_ENDINGS = (".part", ".partial", ".tmp", ".swp", ".crdownload", ".filepart", "~")
_LONG_NUMBER = re.compile(r"\d{4,}(?=\d{3})")
_REPORT = ".report.txt"

Signature = tuple[tuple[object, ...], ...]


class _Seen(NamedTuple):
    """How a file was when it was looked at.

    Attributes:
        signature: of it; another one means that somebody writes it.
        since: when it was first seen so, monotonic seconds.
        try_at: when it is worth another try; None when it was not tried since it changed.
    """

    signature: Signature
    since: float
    try_at: float | None = None


class _Outcome(NamedTuple):
    """What came of a file, which is to be put away now.

    Attributes:
        signature: how it was then.
        into: whether to ``done`` or ``rejected``.
        report: to be laid beside it; empty without.
        fields: what the log says of it.
    """

    signature: Signature
    into: str
    report: str
    fields: dict[str, object]


class Inbox:
    """The inbox of one data directory; for one thread at a time."""

    def __init__(self, engine: Engine, *, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        self._engine = engine
        self._is_cancelled = is_cancelled
        self._log = engine.log
        self._seen: dict[str, _Seen] = {}
        self._outcomes: dict[str, _Outcome] = {}
        self._opened = ExitStack()
        with Directory(engine.settings.data_dir) as data:
            self._inbox = self._opened.enter_context(data.subdirectory(INBOX))
        self._done = self._opened.enter_context(self._inbox.subdirectory(DONE))
        self._rejected = self._opened.enter_context(self._inbox.subdirectory(REJECTED))

    def close(self) -> None:
        """Give everything back."""
        self._opened.close()

    def look(self, complete: Collection[str] = (), progress: Callable[[str], object] = lambda text: None) -> int:
        """Merge what is complete; how many files were put away. *complete* are known to be so by those who wrote them.

        Raises:
            Unavailable: the engine stops; what is left is taken by the next start.
            OSError: the inbox cannot be read.
        """
        put_away = 0
        names = [name for name in self._inbox.names() if not _is_ignored(name)]
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        self._outcomes = {name: outcome for name, outcome in self._outcomes.items() if name in names}
        for name in names:
            if self._is_cancelled():
                break
            if self._is_ready(name, is_complete=name in complete):
                progress(f"merging inbox/{shown_name(name)}")
                put_away += self._take(name, progress)
        return put_away

    def _is_ready(self, name: str, *, is_complete: bool) -> bool:
        """Whether *name* is worth a try now."""
        now = self._engine.monotonic()
        signature = self._signature_of(name)
        if signature is None:
            return False
        seen = self._seen.get(name)
        if seen is None or seen.signature != signature:
            seen = self._seen[name] = _Seen(signature, now)
        if seen.try_at is not None:
            return now >= seen.try_at
        found = self._inbox.stat(name)
        is_directory = found is not None and stat.S_ISDIR(found.st_mode)
        if is_complete and not is_directory:
            return True
        settle_s = DIRECTORY_SETTLE_S if is_directory else SETTLE_S
        if name.endswith(".jsonl"):
            # Each beginning of it that ends with a line looks whole.
            settle_s = PATIENCE_S
        # What was moved in was written long ago.
        newest_ms = max(int(one[-1]) for one in signature if isinstance(one[-1], int)) // 1_000_000
        is_old = self._engine.now_ms() - newest_ms >= settle_s * 1000
        return now - seen.since >= settle_s or (is_old and not is_directory)

    def _signature_of(self, name: str) -> Signature | None:
        found = self._inbox.stat(name)
        if found is None:
            return None
        signature: list[tuple[object, ...]] = [_of(name, found)]
        if stat.S_ISDIR(found.st_mode):
            for place, directories, files in os.walk(self._inbox.path / name, followlinks=False):
                for one in (*directories, *files):
                    try:
                        status = os.lstat(os.path.join(place, one))
                    except FileNotFoundError:
                        continue
                    signature.append(_of(os.path.join(place, one), status))
        return tuple(signature)

    def _take(self, name: str, progress: Callable[[str], object]) -> int:
        """Merge *name*, and put it away; whether that was done. Whatever is wrong with it keeps no other from its turn."""
        seen = self._seen[name]
        try:
            outcome = self._outcomes.get(name)
            if outcome is None or outcome.signature != seen.signature:
                outcome = self._merged(name, seen, progress)
            if outcome is None:
                return 0
            self._outcomes[name] = outcome
            return self._put_away(name, outcome)
        except Unavailable:
            raise
        except (HoldfastError, OSError) as error:
            self._postpone(name, f"it cannot be put away: {getattr(error, 'strerror', None) or error}")
        except Exception as error:
            self._log.error("inbox.failed", reason=type(error).__name__, exc_info=error)
            self._postpone(name, f"a fault inside Holdfast: {type(error).__name__}")
        return 0

    def _merged(self, name: str, seen: _Seen, progress: Callable[[str], object]) -> _Outcome | None:
        """What came of merging *name*; None when that is not over."""
        fault: Exception | None = None
        try:
            report = self._merge(name, progress)
        except Unfinished as error:
            if self._engine.monotonic() - seen.since < PATIENCE_S:
                self._seen[name] = seen._replace(try_at=seen.since + PATIENCE_S)
                return None
            return self._rejected_for(name, seen, str(error))
        except (StorageFull, SettingsError) as error:
            self._postpone(name, str(error))
            return None
        except Unavailable:
            raise
        except HoldfastError as error:
            return self._rejected_for(name, seen, str(error))
        except OSError as error:
            return self._rejected_for(name, seen, f"it cannot be read: {error.strerror or error}")
        except MemoryError:
            pass  # what it took is free again only behind this
        except Exception as error:
            # What it is does not change by trying again.
            self._log.error("inbox.failed", reason=type(error).__name__, exc_info=error)
            fault = error
        else:
            return self._outcome_of(name, seen, report)
        what = "more memory than there is" if fault is None else f"a fault inside Holdfast, {type(fault).__name__}"
        how = "split it" if fault is None else "keep it, and report that"
        return self._rejected_for(name, seen, f"expected that it can be taken, found {what}; {how}", is_untouched=False)

    def _outcome_of(self, name: str, seen: _Seen, report: MergeReport) -> _Outcome | None:
        if self._signature_of(name) != seen.signature:
            # Somebody wrote it again, or took it back. What is there now has its turn when he has ended.
            return None
        if report.sum_of("conflicting") and not report.changes and not report.sum_of("same"):
            return self._rejected_for(name, seen, "; ".join(report.reasons))
        fields: dict[str, object] = {
            kind: report.sum_of(kind) for kind in ("added", "newer", "older", "same", "conflicting")
        }
        fields["messages"] = report.messages
        return _Outcome(seen.signature, DONE, _notes_on(report), fields)

    def _rejected_for(self, name: str, seen: _Seen, reason: str, *, is_untouched: bool = True) -> _Outcome:
        report = _report_of(name, reason, self._engine.now_ms(), is_untouched=is_untouched)
        return _Outcome(seen.signature, REJECTED, report, {"reason": reason})

    def _merge(self, name: str, progress: Callable[[str], object]) -> MergeReport:
        with self._open(name) as given:
            return merge(self._engine, given, progress=progress, is_cancelled=self._is_cancelled)

    def _open(self, name: str) -> Given:
        settings = self._engine.settings
        found = self._inbox.stat(name)
        if found is None:
            raise InvalidRecord("it vanished while it was looked at")
        if stat.S_ISDIR(found.st_mode):
            return open_path(self._inbox.path / name, settings.data_dir, held_bytes_max=HELD_BYTES_MAX)
        if not stat.S_ISREG(found.st_mode):
            what = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a pipe, a socket or a device"
            raise InvalidRecord(f"expected a plain file, found {what}")
        if found.st_size > READ_BYTES_MAX:
            raise InvalidRecord(f"expected a file of at most {READ_BYTES_MAX} bytes, found {found.st_size}; split it")
        if found.st_size == 0:
            raise Unfinished("it is empty")
        seal = seal_of(settings)
        return open_file(self._inbox, name, settings.data_dir, seal, held_bytes_max=HELD_BYTES_MAX)

    def _postpone(self, name: str, reason: str) -> None:
        self._log.warning("inbox.postponed", file=shown_name(name), reason=reason)
        self._seen[name] = self._seen[name]._replace(try_at=self._engine.monotonic() + RETRY_S)

    def _put_away(self, name: str, outcome: _Outcome) -> int:
        """Move *name* to where it belongs, with what is to be said of it; whether it was there."""
        if self._inbox.stat(name) is None:
            return 0  # whoever took it away knows
        into = self._done if outcome.into == DONE else self._rejected
        new_name = _short(name)
        if into.stat(new_name) is not None or into.stat(new_name + _REPORT) is not None:
            stem, dot, ending = new_name.partition(".")
            stamp = format_ms(self._engine.now_ms()).replace(":", "").replace(".", "")
            new_name = f"{stem}-{stamp}{dot}{ending}"
            number = 1
            while into.stat(new_name) is not None:
                number += 1
                new_name = f"{stem}-{stamp}-{number}{dot}{ending}"
        if outcome.report:
            into.write_atomic(new_name + _REPORT, [outcome.report.encode("utf-8", "backslashreplace")])
        try:
            self._inbox.move(name, into, new_name)
        except OSError:
            if outcome.report and self._inbox.stat(name) is not None:
                into.remove(new_name + _REPORT)
            raise
        self._seen.pop(name, None)
        self._outcomes.pop(name, None)
        if outcome.into == DONE:
            self._log.info("inbox.merged", file=shown_name(name), **outcome.fields)
        else:
            self._log.warning("inbox.rejected", file=shown_name(name), **outcome.fields)
        return 1


def shown_name(name: str) -> str:
    """*name* for the log: of long numbers, which may be phones, the last three digits."""
    return _LONG_NUMBER.sub("***", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _is_ignored(name: str) -> bool:
    return name in (DONE, REJECTED) or name.startswith((".", "#")) or name.lower().endswith(_IGNORED_ENDINGS)


def _of(name: str, status: os.stat_result) -> tuple[object, ...]:
    return name, status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def _short(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= NAME_BYTES_MAX else os.fsdecode(raw[:NAME_BYTES_MAX])


def _report_of(name: str, reason: str, now_ms: int, *, is_untouched: bool) -> str:
    """For people; *is_untouched*: nothing of the file was taken."""
    reasons = "\n".join(f"  * {one}" for one in reason.split("; "))
    changed = (
        "Nothing was changed." if is_untouched else "What was merged until then stays; merging it again does the rest."
    )
    return (
        f"{name} was not taken, {format_ms(now_ms)}. {changed}\n\n"
        f"What was found:\n{reasons}\n\n"
        "What is expected: a file as it stands in the data directory (chat_sessions.json, pending_orders.json,\n"
        "completed_orders.json, users.json, sales_stats.json, NAME.json), one conversation or escalation of an old bot,\n"
        "or an export (.tar.zst). Every record in it must be one: with its id, and as JSON that can be kept exactly.\n\n"
        "What to do: correct it, and move it into inbox/ again; or take only what is valid:\n"
        "  holdfast import FILE --skip-invalid\n"
    )


def _notes_on(report: MergeReport) -> str:
    """What is to be said of a file that was merged; empty when nothing is."""
    if not report.reasons:
        return ""
    reasons = "\n".join(f"  * {one}" for one in report.reasons)
    return f"Merged, but for what does not go together with what is here, which stays as it is:\n{reasons}\n"
