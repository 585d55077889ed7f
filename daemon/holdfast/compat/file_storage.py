"""The storage class of chatbots that keep each list of records in a JSON file, with Holdfast's way of writing files beneath it.

A bot changes one import, and keeps its files::

    from holdfast.compat.file_storage import FileStorage

    storage = FileStorage("bot_files")
    storage.save("tasks.json", [{"id": 1, "due": date(2026, 11, 21)}])
    storage.create_backup("tasks.json")
    tasks = storage.load("tasks.json")

There is no engine behind it, no journal, no daemon: ``tasks.json`` is a JSON array, one record a line, that any program may
read at any time, and a save replaces the whole file. What a save promises is that the file is always whole, the old or the
new, and the new one durable when it returns: written beside it, synced, renamed, the directory synced. Several threads and
processes may use one directory; each call is alone in it (``.lock``), but two who load, change and save overwrite each
other's changes, as with any file. Who needs more than that imports the directory into Holdfast (``holdfast import DIR`` takes
each file whose records have an ``id``) and uses ``holdfast.open``; a data directory of Holdfast is refused here.

::

    bot_files/tasks.json
    bot_files/backups/tasks_20261121_140300.json   of create_backup, by local time
    bot_files/backups/tasks.previous.json          what the last save or restore replaced; only for a damaged tasks.json
    bot_files/quarantine/tasks.5e1c2a90.json       a damaged tasks.json, as it was found; nothing is ever removed from here

Errors are those of files: ``StorageError`` is an ``OSError`` with ``errno`` 28 (no room), 13 (no permission), 2 (missing), 16
(another process does not let go), 22 (cannot be kept), 5 (damaged, or a disk that errs) and the reason as ``strerror``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import orjson

from holdfast.checksum import crc32
from holdfast.disk.files import LOCK_NAME, Directory
from holdfast.errors import HoldfastError, StorageFull
from holdfast.values import ValueLimits, encode

__all__ = [
    "BackupNotFoundError",
    "ConfigManager",
    "CorruptedDataError",
    "FileStorage",
    "StorageError",
    "recover_from_corruption",
]

Records = list[dict[str, Any]]
"""What a file holds."""

BACKUPS, QUARANTINE = "backups", "quarantine"

NAME_BYTES_MAX = 200
"""Of a file's name; file systems take 255, and its backups and temporaries have longer ones."""

LOCK_S = 30.0
"""How long a call waits for others to finish theirs."""

EXPORT_FORMAT = 1
"""Of the file that ``export_data`` writes; a newer one is refused."""

DEFAULT_CONFIG: Mapping[str, Any] = {
    "backup_enabled": True,
    "backup_count": 10,
    "auto_save": True,
    "auto_save_interval": 60,
    "data_format": "json",
    "date_format": "%Y-%m-%d",
    "time_format": "%H:%M:%S",
}
"""What ``ConfigManager`` says of keys that nobody has set. ``auto_save_interval`` is in seconds."""

CONFIG_NAME = "config.json"

_SUFFIX = ".json"
_LOCK_NAME = ".lock"
_STAMP = "%Y%m%d_%H%M%S"
_BACKUP = re.compile(r"(?P<stem>.+)_(?P<stamp>\d{8}_\d{6})\.json", re.DOTALL)
_SECOND = timedelta(seconds=1)
_LIMITS = ValueLimits(bytes_max=1 << 30, keys_max=1 << 30)

_log = logging.getLogger(__name__)


class StorageError(OSError):
    """Nothing was changed, unless it says otherwise; ``strerror`` says what was expected, what was found, what to do."""


class CorruptedDataError(StorageError):
    """A file does not hold a JSON array of objects, and no backup of it does."""


class BackupNotFoundError(StorageError):
    """There is no such backup; it names those that there are."""


class _Backup(NamedTuple):
    """A file in ``backups/``, of the data file *stem*, made at *made_at*, a local time."""

    stem: str
    made_at: datetime
    name: str


class FileStorage:
    """The files of one directory.

    Keeps nothing open and remembers nothing between calls, so it may be used from any thread, and in forked children.

    Attributes:
        base_dir: the directory of the files.
        backup_dir: that of their backups.
    """

    def __init__(self, base_dir: str | os.PathLike[str] | None = None) -> None:
        """Use *base_dir*, made (0700) when it is missing; without one the environment's ``DATA_DIR``, else ``data``.

        Raises:
            StorageError: no directory that could be used, or one of Holdfast.
        """
        given = base_dir if base_dir is not None else os.environ.get("DATA_DIR") or "data"
        self.base_dir = Path(given)
        self.backup_dir = self.base_dir / BACKUPS
        with _told(f"{self.base_dir} cannot be used"):
            missing = [one for one in (self.base_dir, *self.base_dir.parents) if not one.exists()]
            self.base_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            for one in missing:
                # A power cut would otherwise take the directory back, with what was saved in it.
                with Directory(one.parent) as parent:
                    parent.sync()
        with self._alone() as directory, directory.subdirectory(BACKUPS) as backups:
            # Whoever writes holds the lock, so what stands there now is of one who was killed.
            directory.remove_stale_temporaries()
            backups.remove_stale_temporaries()

    def save(self, filename: str, data: Records) -> bool:
        """Have *filename* hold *data*, durably; True. A name without ``.json`` gets it.

        False is never returned: a save that fails raises, so that no caller goes on as if saved who does not look.

        Args:
            data: dictionaries of what JSON holds; dates, times and datetimes become ISO 8601 text.

        Raises:
            StorageError: the file is as before (22: *data* or *filename* cannot be kept).
        """
        name = _name_of(filename)
        lines = _lines_of(data, name)
        with self._alone() as directory:
            self._replace(directory, name, lines)
        return True

    def load(self, filename: str) -> Records:
        """What *filename* holds; an empty list when it is missing.

        A damaged file is replaced by the newest of its backups, and of what the last save replaced, that is whole, with a
        warning in the log; it is kept in ``quarantine/`` as it was found.

        Raises:
            CorruptedDataError: damaged, and nothing is there to take its place; the file is as before.
            StorageError: it cannot be read.
        """
        name = _name_of(filename)
        with _told(f"{self.base_dir / name} cannot be read"), Directory(self.base_dir) as directory:
            raw = _content(directory, name)
        if raw is None:
            return []
        try:
            return _decoded(raw)
        except ValueError:
            with self._alone() as directory:
                return self._load_or_recover(directory, name)

    def create_backup(self, filename: str) -> Path:
        """Copy *filename*, durably, to ``backups/NAME_YYYYMMDD_HHMMSS.json``; the path of that.

        The time in the name is local, and always behind that of the backups before it: made within the same second, or
        after the clock was set back, a backup has the second behind the newest one.

        Raises:
            CorruptedDataError: the file is damaged; it does not become the newest backup.
            StorageError: missing (2), no room, and the like.
        """
        name = _name_of(filename)
        with self._alone() as directory:
            return self._back_up(directory, name)

    def restore_from_backup(self, filename: str, backup_time: str | datetime | None = None) -> bool:
        """Have *filename* hold what its backup of *backup_time* holds, without one the newest that is whole; True.

        What it held is in ``backups/NAME.previous.json`` until the next save.

        Args:
            backup_time: the ``timestamp`` or ``filename`` of ``list_backups``, any ISO 8601, ``YYYYMMDD_HHMMSS``, or a
                datetime; local unless it names a zone, to the second.

        Raises:
            BackupNotFoundError: none, or none of that time; those that there are are named.
            CorruptedDataError: that backup is damaged, or all of them.
            StorageError: the file is as before.
        """
        name = _name_of(filename)
        wanted = None if backup_time is None else _time_of(backup_time)
        with self._alone() as directory, directory.subdirectory(BACKUPS) as backups:
            found = _backups_of(backups, name)
            chosen = found if wanted is None else [backup for backup in found if backup.made_at == wanted]
            if not chosen:
                there = ", ".join(backup.made_at.isoformat() for backup in found) or "none"
                asked = "" if wanted is None else f" of {wanted.isoformat()}"
                raise BackupNotFoundError(errno.ENOENT, f"there is no backup{asked} of {name}; there are: {there}")
            for backup in chosen:
                raw = _whole(backups, backup.name)
                if raw is not None:
                    self._replace(directory, name, [raw])
                    return True
                _log.warning("backup %s is damaged and passed over", backup.name)
            raise CorruptedDataError(
                errno.EIO,
                f"{', '.join(backup.name for backup in chosen)} in {self.backup_dir} should hold a JSON array of objects "
                "and does not; restore another one",
            )

    def list_backups(self, filename: str | None = None) -> list[dict[str, Any]]:
        """The backups of *filename*, or of all files, newest first.

        Each is a dictionary: ``filename`` in ``backups/``, ``timestamp`` (local time, ISO 8601 to the second), ``size`` in bytes.
        """
        name = None if filename is None else _name_of(filename)
        with self._alone() as directory, directory.subdirectory(BACKUPS) as backups:
            listed = []
            for backup in _backups_of(backups, name):
                status = backups.stat(backup.name)
                size = 0 if status is None else status.st_size
                listed.append({"filename": backup.name, "timestamp": backup.made_at.isoformat(), "size": size})
            return listed

    def delete_old_backups(self, filename: str, keep_count: int = 10) -> int:
        """Remove the backups of *filename* but for the newest *keep_count*; how many were removed.

        The newest one that is whole stays in any case, unless none is to be kept.

        Raises:
            ValueError: fewer than 0.
            StorageError: those removed before are gone.
        """
        if keep_count < 0:
            raise ValueError(f"keep_count must be 0 or more, found {keep_count!r}")
        name = _name_of(filename)
        with self._alone() as directory, directory.subdirectory(BACKUPS) as backups:
            found = _backups_of(backups, name)
            last = next((backup for backup in found if keep_count and _whole(backups, backup.name) is not None), None)
            # The oldest first, so that a crash in between leaves the newest.
            removed = [backup for backup in reversed(found[keep_count:]) if backup != last]
            for backup in removed:
                backups.remove(backup.name)
            if removed:
                backups.sync()
            return len(removed)

    def export_data(self, path: str | os.PathLike[str]) -> bool:
        """Write all files into one at *path*, for ``import_data``; True.

        It is a JSON object: ``format``, ``exported_at``, and ``files``, an object with the records of each file by its name.
        Damaged files are recovered as by ``load``; one that holds a JSON object is of somebody else, and passed over with a
        warning in the log.

        Raises:
            CorruptedDataError: a file is damaged beyond recovery.
            StorageError: it could not be written; what stood at *path* stands.
        """
        place = Path(path)
        with self._alone() as directory:
            files = {name: self._load_or_recover(directory, name) for name in self._data_files(directory)}
        head = {"format": EXPORT_FORMAT, "exported_at": datetime.now().isoformat(timespec="seconds")}
        with _told(f"{place} cannot be written"), Directory(place.parent) as outside:
            outside.write_atomic(place.name, [orjson.dumps(head | {"files": files}, option=orjson.OPT_INDENT_2), b"\n"])
        return True

    def import_data(self, path: str | os.PathLike[str]) -> bool:
        """Have every file in the export at *path* hold what it held there; True. Other files stay as they are.

        All of it is checked before anything is changed, and each file that is replaced is backed up first. A crash on the way
        leaves each file whole, the old or the new; done again it completes.

        Raises:
            CorruptedDataError: no export, or a damaged one.
            StorageError: of a newer format, or not to be read: nothing was changed. No room: the files before that one are new.
        """
        place = Path(path)
        with _told(f"{place} cannot be read"), Directory(place.parent) as outside:
            raw = outside.read(place.name)
        files = {_name_of(name): _lines_of(records, name) for name, records in _exported(raw, place).items()}
        with self._alone() as directory:
            for name, lines in files.items():
                if directory.stat(name) is not None:
                    # A damaged one is no backup, but is kept as the previous.
                    try:
                        self._back_up(directory, name)
                    except CorruptedDataError as error:
                        _log.warning("not backed up before the import: %s", error.strerror)
                self._replace(directory, name, lines)
        return True

    @contextmanager
    def _alone(self) -> Iterator[Directory]:
        """The directory, while nobody else, in any process or thread, reads or changes it by this class."""
        with _told(f"{self.base_dir} cannot be used"), ExitStack() as stack:
            directory = stack.enter_context(Directory(self.base_dir))
            if directory.stat(LOCK_NAME) is not None:
                raise StorageError(
                    errno.EBUSY,
                    f"{self.base_dir} is a data directory of Holdfast ({LOCK_NAME} stands in it), whose files it keeps itself; "
                    "use holdfast.open or holdfast.connect for it, or name another directory here",
                )
            fd = os.open(
                self.base_dir / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600
            )
            stack.callback(os.close, fd)
            _wait_for(fd, self.base_dir)
            yield directory

    def _replace(self, directory: Directory, name: str, chunks: Iterable[bytes]) -> None:
        """Have *name* hold *chunks*, and its previous content stand in ``backups/``; under the lock."""
        present = directory.stat(name)
        if present is not None and not stat.S_ISREG(present.st_mode):
            raise StorageError(errno.EINVAL, f"{self.base_dir / name} is not a regular file; move away what is there")
        directory.stage(name, chunks)
        try:
            if present is not None:
                self._keep_previous(directory, name)
        except BaseException:
            directory.discard([name])
            raise
        directory.publish([name])

    def _keep_previous(self, directory: Directory, name: str) -> None:
        with directory.subdirectory(BACKUPS) as backups:
            kept, fresh = _previous(name), f".{_previous(name)}.{os.getpid()}.tmp"
            backups.remove(fresh)
            # The file is about to lose its name and is never changed in place, so another name for it is enough.
            directory.keep_link(name, backups, fresh)
            backups.rename(fresh, kept)
            backups.sync()

    def _back_up(self, directory: Directory, name: str) -> Path:
        raw = _content(directory, name)
        if raw is None:
            raise StorageError(errno.ENOENT, f"there is no {self.base_dir / name} to back up; save it first")
        try:
            _decoded(raw)
        except ValueError as error:
            raise CorruptedDataError(
                errno.EIO,
                f"{self.base_dir / name} is not backed up: {error}; load it, which recovers it, or restore a backup",
            ) from None
        with directory.subdirectory(BACKUPS) as backups:
            made_at = datetime.now().replace(microsecond=0)
            newest = next(iter(_backups_of(backups, name)), None)
            if newest is not None and newest.made_at >= made_at:
                made_at = newest.made_at + _SECOND
            backup = f"{name.removesuffix(_SUFFIX)}_{made_at.strftime(_STAMP)}{_SUFFIX}"
            backups.write_atomic(backup, [raw])
        return self.backup_dir / backup

    def _load_or_recover(self, directory: Directory, name: str) -> Records:
        """As ``load``; under the lock."""
        raw = _content(directory, name)
        if raw is None:
            return []
        try:
            return _decoded(raw)
        except ValueError as error:
            damage = error
        with directory.subdirectory(BACKUPS) as backups:
            for source in _sources_of(backups, name):
                found = _whole(backups, source)
                if found is None:
                    continue
                self._mend(directory, name, raw, found)
                _log.warning(
                    "%s was damaged (%s) and recovered from %s; as it was found it is in %s",
                    self.base_dir / name, damage, self.backup_dir / source, self.base_dir / QUARANTINE,
                )  # fmt: skip
                return _decoded(found)
        raise CorruptedDataError(
            errno.EIO,
            f"{self.base_dir / name} should hold a JSON array of objects: {damage}; it has no backup that is whole. Mend the file, "
            "or move it away to begin anew",
        )

    def _data_files(self, directory: Directory) -> list[str]:
        """The names of the files in it that ``save`` could have written."""
        found = []
        for name in directory.names():
            status = directory.stat(name)
            if not name.endswith(_SUFFIX) or name.startswith(".") or status is None or not stat.S_ISREG(status.st_mode):
                continue
            if _is_object(directory.read(name)):
                _log.warning("%s holds a JSON object, not an array, and is passed over", self.base_dir / name)
                continue
            found.append(_name_of(name))
        return found

    def _mend(self, directory: Directory, name: str, damaged: bytes, whole: bytes) -> None:
        """Put *whole* in the place of *damaged*, which is kept; where the disk does not let us, whoever loads has it all the same."""
        evidence = f"{name.removesuffix(_SUFFIX)}.{crc32(damaged):08x}{_SUFFIX}"
        try:
            with directory.subdirectory(QUARANTINE) as quarantine:
                if quarantine.stat(evidence) is None:
                    quarantine.write_atomic(evidence, [damaged])
            # Not by _replace: a damaged file would take the place of what may be the only good one.
            directory.write_atomic(name, [whole])
        except (OSError, HoldfastError) as error:
            _log.warning("%s stays damaged for now: %s", self.base_dir / name, error)


class ConfigManager:
    """The settings of a bot, in ``config.json`` of a ``FileStorage``: what was set, and DEFAULT_CONFIG for the rest.

    They are for the bot to act on: nothing here backs up or saves by itself because of them. May be used from any thread;
    what another process sets is seen after ``load_config``.

    Attributes:
        storage: where it is kept.
        config: all of it.
    """

    def __init__(self, storage: FileStorage) -> None:
        """Load what is there; errors as ``load_config``."""
        self.storage = storage
        self.config: dict[str, Any] = {}
        self._guard = threading.Lock()
        self.load_config()

    def get(self, key: str, default: Any = None) -> Any:
        """The setting *key*; *default* when it has no value and none by default."""
        return self.config.get(key, default)

    def set(self, key: str, value: Any) -> bool:
        """Set *key*, and save at once; True. When it cannot be saved it is not set; errors as ``FileStorage.save``.

        ``get`` gives it as it stands in the file, before and after it is loaded again: of a date its text.
        """
        with self._guard:
            changed = self.config | {key: value}
            self.storage.save(CONFIG_NAME, [changed])
            self.config = _as_stored(changed)
        return True

    def save_config(self) -> bool:
        """Save all settings as they stand; True. Errors as ``FileStorage.save``."""
        with self._guard:
            self.storage.save(CONFIG_NAME, [self.config])
            # The same dictionary, which the bot may have in its hands.
            self.config.update(_as_stored(self.config))
        return True

    def load_config(self) -> dict[str, Any]:
        """Read the settings again, and return them.

        Raises:
            CorruptedDataError, StorageError: as ``FileStorage.load``; the settings are as before.
        """
        with self._guard:
            changed = dict(DEFAULT_CONFIG)
            for record in self.storage.load(CONFIG_NAME):
                changed |= record
            self.config = changed
            return self.config


def _as_stored(config: dict[str, Any]) -> dict[str, Any]:
    """*config* as whoever loads it finds it."""
    (stored,) = _decoded(b"".join(_lines_of([config], CONFIG_NAME)))
    return stored


def recover_from_corruption(storage: FileStorage, filename: str) -> bool:
    """Whether *filename* is whole now: it was, or was recovered as by ``load``; False when nothing is there to recover from.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        storage.load(filename)
    except CorruptedDataError as error:
        _log.error("%s", error.strerror)
        return False
    return True


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the disk as StorageError, with *what* failed."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(error.errno or errno.EIO, f"{what}: {error.strerror or error}") from error
    except StorageFull as error:
        raise StorageError(errno.ENOSPC, f"{error}; make room") from error
    except HoldfastError as error:
        raise StorageError(errno.EINVAL, f"{what}: {error}") from error


def _wait_for(fd: int, place: Path) -> None:
    """Take the lock of the open file *fd*; it ends with the descriptor."""
    ends_at = time.monotonic() + LOCK_S
    pause_s = 0.0005
    while True:
        try:
            # Not fcntl: that would let the other threads of this process in, and end with any descriptor of the file.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends_at:
                raise StorageError(
                    errno.EBUSY,
                    f"another process has used {place} for {LOCK_S:g} s; see who holds {place / _LOCK_NAME} (lsof)",
                ) from None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.02)


def _name_of(filename: str) -> str:
    """The name of the file in the directory; refuses whatever could lead out of it, or is ours."""
    if not isinstance(filename, str):
        _refuse(f"a filename is text, found {type(filename).__name__}")
    name = filename if filename.endswith(_SUFFIX) else filename + _SUFFIX
    if name == _SUFFIX or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        _refuse(
            f"a filename has no slash and no control character, and does not begin with a dot; found {filename!r:.100}"
        )
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        _refuse(f"a filename is valid Unicode, found {filename!r:.100}")
    if size > NAME_BYTES_MAX:
        _refuse(f"a filename has {NAME_BYTES_MAX} bytes at most, found {size}")
    return name


def _refuse(reason: str) -> NoReturn:
    raise StorageError(errno.EINVAL, reason)


def _lines_of(data: Records, name: str) -> list[bytes]:
    """*data* as it stands in a file: an array, one record a line."""
    if not isinstance(data, list):
        _refuse(f"{name} holds a list of dictionaries, found {type(data).__name__}; nothing was saved")
    lines = []
    for index, record in enumerate(data):
        if not isinstance(record, dict):
            _refuse(f"{name} holds dictionaries, found {type(record).__name__} at {index}; nothing was saved")
        try:
            lines.append(encode(record, _LIMITS))
        except HoldfastError as error:
            _refuse(f"{name}, record {index}: {error}; nothing was saved")
    return [b"[\n", b",\n".join(lines), b"\n]\n"]


def _decoded(raw: bytes) -> Records:
    """The records in *raw*.

    Raises:
        ValueError: anything but a JSON array of objects; the message says what was found.
    """
    try:
        # Python's own, which reads whatever a bot of before has written with it: NaN, large integers, keys that exist twice.
        value = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        if not raw.strip(b" \t\r\n\0"):
            raise ValueError("empty" if not raw else f"{len(raw)} bytes of nothing") from None
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"found a JSON {type(value).__name__}")
    for index, record in enumerate(value):
        if not isinstance(record, dict):
            raise ValueError(f"found a {type(record).__name__} at {index}")
    return value


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw), dict)
    except (ValueError, RecursionError):
        return False


def _content(directory: Directory, name: str) -> bytes | None:
    """The bytes of *name*; None when it is missing."""
    try:
        return directory.read(name)
    except FileNotFoundError:
        return None


def _whole(backups: Directory, name: str) -> bytes | None:
    """The content of *name* when it is one that ``load`` could return."""
    try:
        raw = backups.read(name)
        _decoded(raw)
    except (OSError, ValueError):
        return None
    return raw


def _previous(name: str) -> str:
    return f"{name.removesuffix(_SUFFIX)}.previous{_SUFFIX}"


def _backups_of(backups: Directory, name: str | None) -> list[_Backup]:
    """Those of the data file *name*, or all, newest first."""
    found = []
    for one in backups.names():
        match = _BACKUP.fullmatch(one)
        if match is None or (name is not None and match["stem"] + _SUFFIX != name):
            continue
        try:
            found.append(_Backup(match["stem"], datetime.strptime(match["stamp"], _STAMP), one))
        except ValueError:  # digits that are no time: a file of somebody else
            continue
    return sorted(found, key=lambda backup: (backup.made_at, backup.stem), reverse=True)


def _sources_of(backups: Directory, name: str) -> list[str]:
    """What *name* could be recovered from: what would bring back most first."""
    sources = [backup.name for backup in _backups_of(backups, name)]
    previous = backups.stat(_previous(name))
    if previous is None:
        return sources
    # A backup made after the previous content was written holds that, or the one that is damaged now; the others are older.
    newer = 0
    for source in sources:
        status = backups.stat(source)
        if status is None or status.st_mtime_ns < previous.st_mtime_ns:
            break
        newer += 1
    return [*sources[:newer], _previous(name), *sources[newer:]]


def _time_of(given: str | datetime) -> datetime:
    """The local time, to the second, that *given* names."""
    if isinstance(given, str):
        match = _BACKUP.fullmatch(given)
        text = match["stamp"] if match else given
        try:
            given = (
                datetime.strptime(text, _STAMP) if re.fullmatch(r"\d{8}_\d{6}", text) else datetime.fromisoformat(text)
            )
        except ValueError:
            _refuse(f"backup_time must be a time such as 2026-11-21T14:03:00 or 20261121_140300, found {text!r:.100}")
    if given.tzinfo is not None:
        given = given.astimezone().replace(tzinfo=None)
    return given.replace(microsecond=0)


def _exported(raw: bytes, place: Path) -> dict[str, Records]:
    """The files in an export."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CorruptedDataError(errno.EIO, f"{place} is not a whole export: {error}; nothing was changed") from None
    layout = value.get("format") if isinstance(value, dict) else None
    if isinstance(layout, int) and layout > EXPORT_FORMAT:
        _refuse(f"{place} has format {layout}, this version knows {EXPORT_FORMAT}; nothing was changed")
    files = value.get("files") if layout == EXPORT_FORMAT else None
    if not isinstance(files, dict):
        raise CorruptedDataError(errno.EIO, f"{place} is no export of export_data; nothing was changed")
    return files
