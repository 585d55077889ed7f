"""The one door to the disk: files that are either whole and durable, or not there.

The protocol of an atomic file, in this order, each step checked: create a temporary file in the same directory
(O_EXCL, O_NOFOLLOW, 0600), write all, fsync, close, rename, fsync the directory. Without the last step a power
cut takes the rename back (measured on ext4); it costs 0.4 ms.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from holdfast.checksum import crc32
from holdfast.errors import DataRefused, DirectoryLocked, HoldfastError, StorageFull

FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""No room: on the disk, in the quota, or under RLIMIT_FSIZE."""

READ_BYTES_MAX = 8 << 30
"""A file above this was not written by us, or is sparse; reading it would take the machine down."""

LOCK_NAME = "holdfast.lock"
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs", "lustre", "ocfs2")


class WrittenFile(NamedTuple):
    """What stands on the disk now.

    Attributes:
        bytes: its size.
        crc32: of its content.
        mtime_ns: its modification time, ns since 1970; another one later means that somebody else wrote it.
    """

    bytes: int
    crc32: int
    mtime_ns: int


WRITEBACK_BYTES = 8 << 20
"""Of a large file, after which the disk may begin with what is written so far, so that the sync at the end is short."""

PIECE_BYTES = 1 << 20
"""Of a large file, written at a time; while others wait for the same disk, synced at a time as well."""

PATIENCE_S = 30.0
"""The longest that the writing of one file is drawn out for the sake of others: far less than passes between two flushes."""

PROBE_BYTES = 256 << 10
"""Room for this much more is room: less would be full again with the next few ops."""

FREE_BYTES = 4 << 20
"""Of a large file that was replaced, given back to the file system at a time: others wait 2 ms for it, not 60."""


class Directory:
    """An open directory in which files are written, read and removed by name, never through a symbolic link.

    Keeps a descriptor until ``close``. May be used from any thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def write_atomic(self, name: str, chunks: Iterable[bytes]) -> WrittenFile:
        """Replace the file *name* by *chunks*; durable when this returns.

        Raises:
            StorageFull: no room; the old file stands.
            OSError: anything else; the old file stands, unless the last directory sync failed.
        """
        written = self.stage(name, chunks)
        self.publish([name])
        return written

    def stage(self, name: str, chunks: Iterable[bytes], is_busy: Callable[[], bool] = lambda: False) -> WrittenFile:
        """Write *chunks* durably beside *name*, to take its place at ``publish``; errors as ``write_atomic``.

        *is_busy* tells, each time it is asked, whether others have used the disk since it was asked last. As long as
        they do they are left half of the time, for PATIENCE_S at most.
        """
        temporary = _temporary(name)
        try:
            return self._write_new(temporary, chunks, is_busy)
        except BaseException as error:
            self.remove(temporary)
            if isinstance(error, OSError) and error.errno in FULL_ERRNOS:
                raise StorageFull(f"no room to write {self.path / name}: {error.strerror}; free space") from error
            raise

    def publish(self, names: Iterable[str]) -> None:
        """Put the staged files *names* into place, durably; on an error those not yet in place are dropped."""
        waiting = list(names)
        replaced: list[int] = []
        try:
            while waiting:
                replaced += self._open_large(waiting[0])
                os.rename(_temporary(waiting[0]), waiting[0], src_dir_fd=self._fd, dst_dir_fd=self._fd)
                del waiting[0]
            self.sync()
            # Not before the sync: a power cut could take the rename back and leave what was freed.
            for fd in replaced:
                _free(fd)
        finally:
            self.discard(waiting)
            for fd in replaced:
                os.close(fd)

    def discard(self, names: Iterable[str]) -> None:
        """Remove the staged files *names*."""
        for name in names:
            self.remove(_temporary(name))

    def _open_large(self, name: str) -> list[int]:
        """A descriptor of *name*, to free it by when it has lost its name; none when that is quick or not possible."""
        found = self.stat(name)
        if found is None or not stat.S_ISREG(found.st_mode) or found.st_size <= FREE_BYTES:
            return []
        try:
            return [os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)]
        except OSError:
            return []  # not ours to write; it is replaced all the same

    def _write_new(self, name: str, chunks: Iterable[bytes], is_busy: Callable[[], bool]) -> WrittenFile:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.remove(name)
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        size = checksum = asked = begun = 0
        patience_s, started = PATIENCE_S, time.monotonic()
        try:
            for piece in _pieces(chunks):
                write_all(fd, piece)
                size += len(piece)
                checksum = crc32(piece, checksum)
                if size - asked < PIECE_BYTES:
                    continue
                asked = size
                if is_busy() and patience_s > 0:
                    # A sync of the journal waits for what the disk has been given before it, so that is kept small.
                    # The rest is for the processor: who decides, answers and reads shares it with us.
                    _sync_data(fd)
                    begun = size
                    took = time.monotonic() - started
                    time.sleep(min(took, patience_s))
                    patience_s -= 2 * took
                elif size - begun >= WRITEBACK_BYTES:
                    _begin_writeback(fd, begun, size - begun)
                    begun = size
                started = time.monotonic()
            os.fsync(fd)
            status = os.fstat(fd)
            if status.st_size != size:
                raise OSError(errno.EIO, f"{size} bytes written, but the file has {status.st_size}")
        finally:
            os.close(fd)
        return WrittenFile(size, checksum, status.st_mtime_ns)

    def open_to_append(self, name: str, *, new: bool) -> int:
        """A descriptor that appends to *name*; with *new* the file is created and may not exist."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags | (os.O_CREAT | os.O_EXCL if new else 0), 0o600, dir_fd=self._fd)

    def open_to_read(self, name: str) -> int:
        """A descriptor that reads the regular file *name*.

        Raises:
            OSError: missing, a link, a directory, a pipe or a device, not ours to read, or above READ_BYTES_MAX.
        """
        # Without O_NONBLOCK opening a pipe would wait for a writer for ever.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > READ_BYTES_MAX:
            os.close(fd)
            what = "not a regular file" if not stat.S_ISREG(status.st_mode) else f"{status.st_size} bytes large"
            raise OSError(errno.EINVAL, f"{name} is {what}")
        return fd

    def read(self, name: str) -> bytes:
        """The whole content of *name*; errors as ``open_to_read``."""
        with os.fdopen(self.open_to_read(name), "rb") as file:
            return file.read()

    def read_head(self, name: str, size: int) -> bytes:
        """The first *size* bytes of the regular file *name*; errors as ``open_to_read``."""
        with os.fdopen(self.open_to_read(name), "rb", buffering=0) as file:
            return file.read(size)

    def stat(self, name: str) -> os.stat_result | None:
        """What *name* is, links not followed; None when there is nothing."""
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """The names in it, sorted."""
        return sorted(os.listdir(self._fd))

    def rename(self, old: str, new: str) -> None:
        """Rename within it; durable only after ``sync``."""
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove *name* when it is there; durable only after ``sync``."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass

    def temporaries(self) -> list[str]:
        """What is half written, by this process or by one that is gone."""
        return [name for name in self.names() if _TEMPORARY.fullmatch(name)]

    def remove_stale_temporaries(self) -> list[str]:
        """Remove what an earlier process left half written; only under the directory lock."""
        stale = self.temporaries()
        for name in stale:
            self.remove(name)
        return stale

    def space(self) -> tuple[int, int]:
        """Bytes that users other than root may still write, and all bytes, of the file system it is on."""
        found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize

    def has_room(self, beyond_bytes: int) -> bool:
        """Whether a file of *beyond_bytes* could grow by PROBE_BYTES: written behind a hole, synced, and removed again."""
        name = _temporary("room")
        fd = -1
        try:
            self.remove(name)
            fd = os.open(
                name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd
            )
            data = memoryview(b"\xa5" * PROBE_BYTES)
            while data:
                written = os.pwrite(fd, data, beyond_bytes + PROBE_BYTES - len(data))
                data = data[written:]
            # Some file systems look for the room only now.
            os.fsync(fd)
            return True
        except OSError:
            return False
        finally:
            if fd >= 0:
                os.close(fd)
            with suppress(OSError):
                self.remove(name)

    def sync(self) -> None:
        """Make creations, renames and removals in it durable."""
        os.fsync(self._fd)

    def subdirectory(self, name: str) -> Directory:
        """The directory *name* in it, created 0700 when it is missing."""
        try:
            os.mkdir(name, 0o700, dir_fd=self._fd)
            self.sync()
        except FileExistsError:
            pass
        if not stat.S_ISDIR(os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_mode):
            raise DataRefused(f"{self.path / name} must be a directory of ours; move away what is there")
        return Directory(self.path / name)

    def keep_copy(self, name: str, into: Directory, new_name: str | None = None) -> None:
        """Copy the regular file *name* durably to the directory *into*."""
        with os.fdopen(self.open_to_read(name), "rb") as file:
            into.write_atomic(new_name or name, iter(lambda: file.read(1 << 20), b""))

    def keep_link(self, name: str, into: Directory, new_name: str | None = None) -> None:
        """Keep the present content of *name* in *into*: a hard link where possible, since files of ours are replaced
        and never changed in place, else a copy."""
        try:
            os.link(name, new_name or name, src_dir_fd=self._fd, dst_dir_fd=into._fd, follow_symlinks=False)
            into.sync()
        except OSError:
            self.keep_copy(name, into, new_name)

    def move(self, name: str, into: Directory, new_name: str) -> None:
        """Move *name*, whatever it is, to the directory *into* of the same file system."""
        os.rename(name, new_name, src_dir_fd=self._fd, dst_dir_fd=into._fd)
        into.sync()
        self.sync()

    def move_all(self, names: Iterable[str], into: Directory) -> None:
        """Move *names* to the directory *into* of the same file system; durable when this returns."""
        for name in names:
            os.rename(name, name, src_dir_fd=self._fd, dst_dir_fd=into._fd)
        # In this order: after a power cut a file may stand in both places, but not in none.
        into.sync()
        self.sync()

    def truncate(self, name: str, size: int) -> None:
        """Cut *name* to *size* bytes, durably."""
        fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove_tree(self, name: str) -> None:
        """Remove the directory *name* with the files in it; directories of ours hold no others."""
        with self.subdirectory(name) as inner:
            for file in inner.names():
                inner.remove(file)
        os.rmdir(name, dir_fd=self._fd)
        self.sync()

    def close(self) -> None:
        """Give the descriptor back; may be called again, when the number may be somebody else's by then."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _temporary(name: str) -> str:
    return f".{name}.{os.getpid()}.tmp"


def _pieces(chunks: Iterable[bytes]) -> Iterator[bytes | memoryview]:
    """*chunks*, in parts where they are above PIECE_BYTES."""
    for chunk in chunks:
        if len(chunk) <= PIECE_BYTES:
            yield chunk
        else:
            view = memoryview(chunk)
            yield from (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of *data*, however few bytes each call takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


class DirectoryLock:
    """The lock of a data directory, held until ``release`` or the end of the process.

    flock, not fcntl: an fcntl lock is lost when any descriptor of the file is closed.
    """

    def __init__(self, directory: Path) -> None:
        """Take the lock of *directory*.

        Raises:
            DirectoryLocked: another process has it; the message names its PID.
            DataRefused: what stands in its place is no file of ours.
        """
        path = directory / LOCK_NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DataRefused(f"{path} cannot be opened: {error.strerror}; move away what is there") from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise DataRefused(f"{path} is not a regular file; move away what is there")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self._fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataRefused(f"{path} cannot be locked: {error.strerror}; use a local file system") from error
            raise DirectoryLocked(
                f"process {holder} holds {directory}; stop it first, or use another data directory"
            ) from None
        # Who holds it is a courtesy to those who come later; a full disk is no reason not to start.
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock back; the file stays, so that nobody locks a removed one."""
        try:
            os.ftruncate(self._fd, 0)
        except OSError:
            pass  # a PID that stays in it harms nobody, a lock that stays taken does
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        """Close the descriptor that a forked child inherited, so that it does not keep the parent's lock alive."""
        os.close(self._fd)


@contextmanager
def kept_from_writers(directory: Path) -> Iterator[None]:
    """Keep everybody from opening *directory* meanwhile, without changing a byte of it, as long as it has a lock.

    Raises:
        DirectoryLocked: another process has it open; the message names its PID.
        DataRefused: what stands in the place of the lock is no file of ours.
    """
    path = directory / LOCK_NAME
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # never opened by us, so nobody has it open
        return
    except OSError as error:
        raise DataRefused(f"{path} cannot be opened: {error.strerror}; move away what is there") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(fd, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise DataRefused(f"{path} cannot be locked: {error.strerror}; use a local file system") from error
        raise DirectoryLocked(f"process {holder} holds {directory}; stop it first, or ask it") from None
    try:
        yield
    finally:
        os.close(fd)


def prepare_directory(path: Path) -> None:
    """Create the data directory *path* (0700) when it is missing, and refuse one that is not safe to use.

    Raises:
        DataRefused: owned by somebody else, writable by all, on a network file system, not a directory, or
            not ours to enter.
    """
    try:
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one in missing:
            # A power cut would otherwise take the directory back, with everything acknowledged in it.
            with Directory(one.parent) as parent:
                parent.sync()
        status = path.stat()
    except (FileExistsError, NotADirectoryError):
        raise DataRefused(f"{path} is not a directory; name one in data_dir") from None
    except OSError as error:
        raise DataRefused(f"{path} cannot be used: {error.strerror}; check its owner and permissions") from error
    if status.st_uid != os.geteuid():
        raise DataRefused(
            f"{path} belongs to user {status.st_uid}, this process runs as {os.geteuid()}; "
            "run as its owner, or change the owner"
        )
    if status.st_mode & stat.S_IWOTH:
        raise DataRefused(f"{path} is writable by everybody; run chmod 700 {path} when you trust what is in it")
    file_system = _file_system_of(path)
    if file_system.startswith(_NETWORK_FILE_SYSTEMS):
        raise DataRefused(
            f"{path} is on a network file system ({file_system}), where locks and fsync cannot be relied on; "
            "use a local disk"
        )
    try:
        if status.st_mode & 0o077:
            path.chmod(0o700)
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
            raise DataRefused(f"{path} is read-only; make it writable for user {os.geteuid()}, or remount it")
    except OSError as error:
        raise DataRefused(f"{path} cannot be used: {error.strerror}; check its permissions and mount") from error


def _file_system_of(path: Path) -> str:
    """The type of the file system that *path* is on; empty where /proc does not tell."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            lines = mounts.readlines()
    except OSError:
        return ""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""


def as_our_error(error: OSError, what: str) -> HoldfastError | None:
    """The error to show for *error* when there is no room; None for any other."""
    if error.errno in FULL_ERRNOS:
        return StorageFull(f"no room to {what}: {error.strerror}; free space, writes resume by themselves")
    return None


def _begin_writeback(fd: int, offset: int, size: int) -> None:
    """Have the system begin to write this part to the disk, without waiting; it stays as little durable as before."""
    if sys.platform == "linux":
        # The one call of Python that does it: Linux starts writeback of what is dirty and drops only what is clean.
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def _free(fd: int) -> None:
    """Give the blocks of a file that has lost its name back, a few at a time.

    Closing it would do so at once, in one transaction of the file system, for which every sync of another file waits:
    45 ms for 190 MB on ext4.
    """
    # Another name is a backup of it. Who has it open reads on in what he opened; then the last to close it frees it.
    status = os.fstat(fd)
    if status.st_nlink or not _has_it_alone(fd):
        return
    # What cannot be freed now is freed when it is closed.
    with suppress(OSError):
        for size in range(status.st_size - FREE_BYTES, 0, -FREE_BYTES):
            os.ftruncate(fd, size)


def _has_it_alone(fd: int) -> bool:
    """Whether nobody else, in any process, has the file open; False where the system does not tell."""
    if sys.platform != "linux":
        return False
    try:
        # A write lease is granted only to one who has. Breaking it would send SIGIO, which ends a process; SIGURG does not.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


_sync_data = os.fdatasync if hasattr(os, "fdatasync") else os.fsync
