"""The file of the SQLite archive: how it is opened, told from other files, and brought to the present schema."""

from __future__ import annotations

import os
import sqlite3
import stat
from importlib.resources import files
from pathlib import Path

from holdfast.archive.base import ArchiveBroken, ArchiveDamaged, ArchiveError
from holdfast.errors import DataRefused, StorageFull

APPLICATION_ID = 0x486F6C64
"""``Hold``, at byte 68 of the file: so ``file`` and we know it from other SQLite databases."""

PAGE_BYTES = 2048
"""Half of what is usual: 500 short turns in one conversation take 86 KiB instead of 112, as fast (1024: 73 KiB, but long
messages and later the full-text index would be chains of pages)."""

WAL_BYTES_MAX = 4 << 20
"""Of archive.db-wal: a checkpoint is due behind this, and so much of it stays, so that a full disk leaves room to go on."""

RESERVE_ONE_IN = 4
"""So much of the room that is left may be set aside for the write-ahead log; the journal needs it more."""

BUSY_MS = 5_000
"""How long somebody else, such as an operator's sqlite3 shell, is waited for."""

LOG, LOG_INDEX = "-wal", "-shm"
"""What SQLite keeps beside the file while it is open: the write-ahead log, and where in it which page stands."""

_KEEP_SIZE = 1
"""FALLOC_FL_KEEP_SIZE of fallocate(2), which Python does not offer."""

_SIDE_FILES = (LOG, LOG_INDEX, "-journal")
"""All that it may open there; the last one while it creates the file."""

_MAGIC = b"SQLite format 3\0"
HEADER_BYTES = 100
_WRITER_CACHE_KIB, _READER_CACHE_KIB = 8_000, 2_000

_DAMAGE = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_FORMAT,
        # Our statements fit our schema, and our rows its constraints; when they do not, it is not our schema.
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
    }
)
_DAMAGED_READS = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ, sqlite3.SQLITE_IOERR_CORRUPTFS, 8202})
"""Extended codes; 8202 is SQLITE_IOERR_DATA, which Python does not name: a checksum of the file system's is wrong."""

_SYNC_FAILED = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})


SQLITE_ERRORS = (sqlite3.Error, UnicodeDecodeError)
"""How SQLite fails; the second where the text of its error quotes a damaged schema, which is no text."""


def our_error(error: Exception, path: Path) -> ArchiveError | ArchiveDamaged:
    """What to raise for *error*: whether the file at *path* is damaged, or there is something to wait for."""
    code = getattr(error, "sqlite_errorcode", None)
    if isinstance(error, UnicodeDecodeError):
        return ArchiveDamaged(f"{path} has a schema that is no text: {error}; it has to be made anew")
    if code is None:
        if isinstance(error, sqlite3.OperationalError):
            return ArchiveDamaged(f"{path} holds text that is none: {error}; it has to be made anew")
        return ArchiveError(f"{path} cannot be used: {error}")
    if code & 0xFF in _DAMAGE or code in _DAMAGED_READS:
        return ArchiveDamaged(f"{path} is damaged: {error}; it has to be made anew")
    if code in _SYNC_FAILED:
        return ArchiveBroken(f"the disk refused to sync {path}: {error}; check the disk")
    if code & 0xFF == sqlite3.SQLITE_FULL:
        return ArchiveError(f"no room to write {path}: {error}; free space")
    if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ArchiveError(f"another program holds {path}: {error}; end it")
    return ArchiveError(f"{path} cannot be used: {error}; check the disk and the file's permissions")


def is_failed_sync(error: BaseException | None) -> bool:
    """Whether the disk refused to sync; what is not durable yet may be gone though it can still be read."""
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) in _SYNC_FAILED


def prepare(path: Path) -> None:
    """Create the file *path* (0600) when it is missing, and look at it before SQLite does.

    Raises:
        ArchiveDamaged: no SQLite database, or the database of another program.
        ArchiveError: not ours to read and write; no room.
        DataRefused: a link, a directory or a device in its place, or made by a newer Holdfast; nothing was touched.
    """
    try:
        for side in _SIDE_FILES:
            _make_private(path.with_name(path.name + side), os.O_RDWR)
        header = _make_private(path, os.O_RDWR | os.O_CREAT)
        parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be opened: {error.strerror}; check the disk and its permissions") from error
    check_header(path, header)


def check_header(path: Path, header: bytes) -> None:
    """Refuse what the first HEADER_BYTES of the file *path* say is not ours, or newer than we are; errors as ``check_identity``."""
    if header:
        if len(header) < HEADER_BYTES or not header.startswith(_MAGIC):
            raise ArchiveDamaged(f"{path} is no SQLite database; it has to be made anew")
        check_identity(path, int.from_bytes(header[68:72]), int.from_bytes(header[60:64]))


def _make_private(path: Path, flags: int) -> bytes:
    """Give the regular file *path* the mode 0600; its first bytes, none when it is missing and not created."""
    try:
        # Without O_NONBLOCK opening a pipe would wait for a writer for ever.
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if path.is_symlink() or path.is_dir():
            raise DataRefused(f"{path} is not a regular file; move away what is there") from error
        raise
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DataRefused(f"{path} is not a regular file; move away what is there")
        if status.st_mode & 0o177:
            os.fchmod(fd, 0o600)
        return os.pread(fd, HEADER_BYTES, 0)
    finally:
        os.close(fd)


def check_identity(path: Path, application_id: int, version: int) -> None:
    """Refuse what is not ours, or newer than we are.

    Raises:
        ArchiveDamaged: the database of another program.
        DataRefused: made by a newer Holdfast.
    """
    if application_id != APPLICATION_ID and (application_id or version):
        raise ArchiveDamaged(
            f"{path} is the database of another program: application_id {application_id:#x}; move it away"
        )
    newest = len(_migrations())
    if version > newest:
        raise DataRefused(
            f"{path} has schema version {version}, this Holdfast knows up to {newest}; install the newer one again"
        )


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time; every failure is one of ``SQLITE_ERRORS``."""
    connection = _connect(path, "mode=rw" if writable else "mode=ro")
    try:
        connection.execute(f"PRAGMA busy_timeout={BUSY_MS}")
        connection.execute(f"PRAGMA cache_size=-{_WRITER_CACHE_KIB if writable else _READER_CACHE_KIB}")
        connection.execute("PRAGMA temp_store=MEMORY")
        # A file that is mapped into memory ends the process when it is shorter than it should be.
        connection.execute("PRAGMA mmap_size=0")
        # Found by the length of their cells, most damages end as an error instead of as odd rows.
        connection.execute("PRAGMA cell_size_check=ON")
    except BaseException:
        connection.close()
        raise
    return connection


def make_durable(path: Path) -> None:
    """Bring the file *path*, and its name, to stable storage.

    Raises:
        ArchiveError: the disk refused.
    """
    try:
        for place, flags in ((path, os.O_RDONLY), (path.parent, os.O_RDONLY | os.O_DIRECTORY)):
            fd = os.open(place, flags | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be brought to the disk: {error.strerror}; check the disk") from error


def reserve_log(path: Path) -> None:
    """Set room aside for WAL_BYTES_MAX of the write-ahead log of the file *path*, which is open.

    So the events that were acknowledged before the disk was full can still be archived, without which nobody could read.
    As far as possible: not on a disk with little room, nor where the system cannot do so.
    """
    import ctypes  # here, because only an archive that is opened needs it

    try:
        reserve = ctypes.CDLL(None).fallocate
        fd = os.open(path.with_name(path.name + LOG), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (AttributeError, OSError):
        return
    try:
        found = os.fstatvfs(fd)
        if found.f_bavail * found.f_frsize >= WAL_BYTES_MAX * RESERVE_ONE_IN:
            # The file keeps its size, as SQLite and whoever copies it goes by that. It is no matter when this fails.
            reserve(fd, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(WAL_BYTES_MAX))
    finally:
        os.close(fd)


def connect_to_salvage(path: Path, *, with_log: bool) -> sqlite3.Connection:
    """A connection that reads as much of a damaged file as there is, with its write-ahead log or as if it had none.

    Neither is changed; without the log nothing is created beside the file either. Failures are ``SQLITE_ERRORS``.
    """
    connection = _connect(path, "mode=ro" if with_log else "mode=ro&immutable=1")
    try:
        # First of all, as everything else reads the schema: lets a file be read that is shorter than it says.
        connection.execute("PRAGMA writable_schema=ON")
        connection.execute("PRAGMA cell_size_check=ON")
        connection.execute("SELECT name FROM sqlite_schema WHERE name = 'messages'").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_look(path: Path) -> sqlite3.Connection:
    """A connection that reads an archive which nobody has open, with its write-ahead log, and changes no byte.

    Where there is a log it needs its index, which SQLite would otherwise create. Failures are ``SQLITE_ERRORS``.
    """
    try:
        has_log = path.with_name(path.name + LOG).stat().st_size > 0
    except FileNotFoundError:
        has_log = False
    connection = _connect(path, "mode=ro&readonly_shm=1" if has_log else "mode=ro&immutable=1")
    try:
        connection.execute("PRAGMA temp_store=MEMORY")
        connection.execute("PRAGMA mmap_size=0")
        connection.execute("PRAGMA cell_size_check=ON")
    except BaseException:
        connection.close()
        raise
    return connection


def connect_copy(path: Path) -> sqlite3.Connection:
    """A connection that fills the new file *path* (0600), which nobody reads before it is complete; errors as ``connect``."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    connection = _connect(path, "mode=rw")
    try:
        connection.execute("PRAGMA journal_mode=OFF")
        connection.execute("PRAGMA synchronous=OFF")
    except BaseException:
        connection.close()
        raise
    return connection


def totals_of(path: Path) -> tuple[int, int]:
    """Where the complete copy *path* stands, and how many messages it has; nothing is created beside it.

    Raises:
        ArchiveDamaged, ArchiveError: it cannot be read.
    """
    try:
        connection = _connect(path, "mode=ro&immutable=1")
        try:
            row = connection.execute("SELECT archived_seq, messages FROM totals WHERE one = 1").fetchone()
        finally:
            connection.close()
    except SQLITE_ERRORS as error:
        raise our_error(error, path) from error
    if row is None:
        raise ArchiveDamaged(f"{path} does not say how far it is; it has to be made anew")
    return int(row[0]), int(row[1])


def copy_stopped(path: Path, target: Path) -> int:
    """Copy the archive *path*, which nobody has open, with what is in its write-ahead log to the new file *target*; the seq
    at which it stands. Of *path* nothing is changed, but an index of its log may come to stand beside it.

    Raises:
        ArchiveDamaged, ArchiveError: it cannot be read.
        StorageFull, OSError: *target* cannot be written.
    """
    try:
        source = connect(path, writable=False)
        try:
            copy = connect_copy(target)
            try:
                source.backup(copy)
            finally:
                copy.close()
        finally:
            source.close()
    except SQLITE_ERRORS as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise StorageFull(f"no room to copy {path} to {target}: free space") from error
        raise our_error(error, path) from error
    return totals_of(target)[0]


def schema_version() -> int:
    """What an archive has when it is brought to the present schema."""
    return len(_migrations())


def _connect(path: Path, parameters: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{parameters}", uri=True, isolation_level=None, check_same_thread=False, timeout=0
    )


def connect_writer(path: Path) -> sqlite3.Connection:
    """The one connection that writes, with the present schema; errors as ``connect``.

    Raises:
        ArchiveDamaged, DataRefused: not our database, or newer than we are; nothing was touched.
        ArchiveError: SQLite cannot use it as we do.
    """
    _look_before_writing(path)
    connection = connect(path, writable=True)
    try:
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        if connection.execute("PRAGMA journal_mode=WAL").fetchone() != ("wal",):
            # SQLite says so instead of failing; without a log a transaction would be synced, and readers wait for it.
            raise ArchiveError(f"{path} cannot be given a write-ahead log; check the disk and who else uses the file")
        # The journal is what is synced; of the archive only checkpoints are.
        connection.execute("PRAGMA synchronous=NORMAL")
        # SQLite's own checkpoints swallow a failed sync.
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA journal_size_limit={WAL_BYTES_MAX}")
        connection.execute("PRAGMA foreign_keys=OFF")
        # What is deleted is gone from the file as well.
        connection.execute("PRAGMA secure_delete=ON")
        _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _look_before_writing(path: Path) -> None:
    """Check what the write-ahead log makes of the file; closing a reader changes neither."""
    if path.stat().st_size == 0:
        return
    try:
        _check_content(path, writable=False)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_READONLY_ROLLBACK:
            raise
        # A crash while it was created, or while another program wrote it: what was begun is taken back, as anybody's
        # look at it would.
        _check_content(path, writable=True)


def _check_content(path: Path, *, writable: bool) -> None:
    connection = connect(path, writable=writable)
    try:
        check_identity(path, _number(connection, "application_id"), _number(connection, "user_version"))
        if _is_cut(path, connection):
            raise ArchiveDamaged(f"{path} is shorter than it says; it has to be made anew")
    finally:
        connection.close()


def _is_cut(path: Path, connection: sqlite3.Connection) -> bool:
    """Whether the file lacks what it should have. SQLite takes that for zeroes, which may go unnoticed for long."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
    # A page of 65536 bytes, which does not fit into the field, is never ours.
    page_bytes, pages, size = int.from_bytes(header[16:18]), int.from_bytes(header[28:32]), path.stat().st_size
    if not page_bytes or size >= page_bytes * pages:
        return False
    # Whole pages may be missing when a checkpoint was broken off; then they are in the log.
    return bool(size % page_bytes) or connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",)


def _migrate(connection: sqlite3.Connection) -> None:
    present = _number(connection, "user_version")
    for version, script in enumerate(_migrations()[present:], present + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\nPRAGMA application_id={APPLICATION_ID};\n"
                f"PRAGMA user_version={version};\nCOMMIT;"
            )
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    number = connection.execute(f"PRAGMA {pragma}").fetchone()[0]
    assert isinstance(number, int)
    return number


def _migrations() -> list[str]:
    """The scripts in ``schema/``, in order; the n-th brings a database from version n - 1 to n."""
    found = sorted(
        (entry for entry in files("holdfast.archive").joinpath("schema").iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    assert [int(entry.name[:3]) for entry in found] == list(range(1, len(found) + 1)), (
        "schema files are numbered 1, 2, …"
    )
    return [entry.read_text("utf-8") for entry in found]
