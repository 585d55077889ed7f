"""The second place of backups: a directory on another disk, or a bucket of S3 and what speaks like it.

A directory holds sets as ``backups/`` does; what did not change is a hard link. In a bucket it is told apart by its content::

    PREFIX/objects/SHA256            each file of a set once, however many sets have it
    PREFIX/sets/NAME/set.json        which objects make up the set, under which names; written last
    PREFIX/sets/NAME/proof.json
    PREFIX/journal/FIRST-LAST.jsonl.zst   the history
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from holdfast.care.backup_set import (
    PROOF_FILE,
    READ_BYTES,
    SET_FILE,
    SET_NAME,
    BackupSet,
    StoredFile,
    decode_proof,
    decode_set_manifest,
    list_sets_in,
)
from holdfast.care.history import JOURNAL, PACKED_NAME
from holdfast.care.seal import credential_file, read_key_file
from holdfast.disk.files import Directory
from holdfast.errors import DataRefused, HoldfastError, SettingsError
from holdfast.settings import Settings

if TYPE_CHECKING:
    from obstore.store import S3Store

PAUSE_S_MAX = 0.05
"""After each piece that is read the processor and the disk are left as long as it took, up to this."""

ORPHAN_S = 24 * 3600
"""An object of no set is left for so long: the set that it belongs to may be on its way."""

PART_BYTES, PARTS_AT_ONCE = 8 << 20, 2
"""Of what is sent to a bucket; so much of it is in memory."""

REQUEST_S, CONNECT_S = "60s", "10s"
RETRIES = 2
"""By the library, within one try of ours."""

SCHEME = "s3://"
"""Before the name of a bucket."""

_HALF_MADE = re.compile(r"\..+\.tmp")

_DAMAGED = "damaged-"
"""Before the name of a set on a disk that could no longer be read, and was copied again."""


class CopyFailed(Exception):
    """The second place cannot be read or written now; the text says why."""


class SourceDamaged(CopyFailed):
    """The backup here is not what it was; nothing is wrong with the second place."""


class Stopped(Exception):
    """Whoever asked for it wants it no more."""


class HistoryFile(NamedTuple):
    """A file of the history at the second place.

    Attributes:
        bytes: its size.
        at_s: when it was brought there, seconds since 1970.
    """

    bytes: int
    at_s: float


class Transfer(NamedTuple):
    """What had to be sent for a set; the rest was there."""

    files: int = 0
    bytes: int = 0


class Store(Protocol):
    """A second place, used by one thread at a time.

    Every method raises CopyFailed when the place cannot do it, and those that take *is_stopping* Stopped once it says so.

    Attributes:
        where: as an operator would name it.
    """

    where: str

    def sets(self) -> list[BackupSet]:
        """The sets there, newest first; those that cannot be read say why."""

    def put(self, found: BackupSet, is_stopping: Callable[[], bool]) -> Transfer:
        """Bring the set *found* there, in the place of one of that name that cannot be read. It is there with all its files,
        or not at all; each that is sent is read again.

        What a set there has already is not sent. On a disk, which forgets, it is read all the same; in a bucket, which
        keeps checksums of its own and takes money for reading, it was read when it was sent.
        """

    def put_proof(self, found: BackupSet) -> None:
        """Bring the proof of the set *found*, which is there, up to date."""

    def remove(self, name: str) -> None:
        """Remove the set *name*."""

    def tidy(self) -> None:
        """Remove what was left half done, and what no set needs any more; of sets put aside those older than all others."""

    def read(self, found: BackupSet, stored: StoredFile) -> Iterator[bytes]:
        """A file of a set there, as it stands."""

    def history(self) -> dict[str, HistoryFile]:
        """The history there, by name."""

    def put_history(self, source: Directory, name: str, is_stopping: Callable[[], bool]) -> int:
        """Bring the file *name* of the history there; how many bytes that took."""

    def read_history(self, name: str) -> Iterator[bytes]:
        """A file of the history there."""

    def remove_history(self, name: str) -> None:
        """Remove it."""


def store_of(settings: Settings, place: str = "") -> Store:
    """The second place that ``backups.copy_to`` names, or *place* in its stead.

    Raises:
        SettingsError: none is named, its credentials cannot be read, or the extra ``s3`` is missing.
    """
    where = place or settings.backups.copy_to
    if not where:
        raise SettingsError("there is no second place: set backups.copy_to to a directory or to s3://BUCKET/PREFIX")
    if where.startswith(SCHEME):
        return _Bucket(settings, where)
    return _Shelf(Path(where))


class _Shelf:
    """A directory. It is never created: where its disk is not mounted, the copies would fill the wrong one."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._path = path

    def sets(self) -> list[BackupSet]:
        with self._opened():
            return list_sets_in(self._path)

    def put(self, found: BackupSet, is_stopping: Callable[[], bool]) -> Transfer:
        assert found.manifest is not None, "a set that cannot be read is not copied"
        files = size = 0
        with self._opened() as shelf, Directory(found.path) as source:
            there = known_files(one for one in list_sets_in(self._path) if one.name != found.name)
            half_made = f".{found.name}.{os.getpid()}.tmp"
            if shelf.stat(half_made) is not None:
                shelf.remove_tree(half_made)
            try:
                with shelf.subdirectory(half_made) as target:
                    for stored in found.manifest.files.values():
                        if link_known(there, stored, target, is_stopping):
                            continue
                        with closing(_pieces(source, stored.stored)) as pieces:
                            target.write_atomic(stored.stored, _checked(pieces, stored, is_stopping))
                        self._read_again(target, stored)
                        files, size = files + 1, size + stored.stored_bytes
                    self._write_notes(source, target)
                if shelf.stat(found.name) is not None:
                    self._put_aside(shelf, found.name)
                shelf.rename(half_made, found.name)
                shelf.sync()
            except BaseException:
                if shelf.stat(half_made) is not None:
                    shelf.remove_tree(half_made)
                raise
        return Transfer(files, size)

    def put_proof(self, found: BackupSet) -> None:
        with self._opened(), Directory(found.path) as source, Directory(self._path / found.name) as target:
            target.write_atomic(PROOF_FILE, [source.read(PROOF_FILE)])

    def remove(self, name: str) -> None:
        with self._opened() as shelf:
            # Without its name it is no set any more, whatever stops us half way.
            shelf.rename(name, f".{name}.{os.getpid()}.tmp")
            shelf.sync()
            shelf.remove_tree(f".{name}.{os.getpid()}.tmp")

    def tidy(self) -> None:
        with self._opened() as shelf:
            names = shelf.names()
            oldest = min((name for name in names if SET_NAME.fullmatch(name)), default="")
            for name in names:
                is_half_made = _HALF_MADE.fullmatch(name) and SET_NAME.match(name[1:])
                set_aside = name.removeprefix(_DAMAGED) if name.startswith(_DAMAGED) else ""
                if is_half_made or (SET_NAME.fullmatch(set_aside) and set_aside < oldest):
                    shelf.remove_tree(name)
            if JOURNAL in names:
                with shelf.subdirectory(JOURNAL) as place:
                    place.remove_stale_temporaries()

    def read(self, found: BackupSet, stored: StoredFile) -> Iterator[bytes]:
        with self._opened(), Directory(self._path / found.name) as source:
            yield from _pieces(source, stored.stored)

    def history(self) -> dict[str, HistoryFile]:
        with self._opened() as shelf:
            if shelf.stat(JOURNAL) is None:
                return {}
            with shelf.subdirectory(JOURNAL) as place:
                found = {name: place.stat(name) for name in place.names() if PACKED_NAME.fullmatch(name)}
        return {name: HistoryFile(status.st_size, status.st_mtime) for name, status in found.items() if status}

    def put_history(self, source: Directory, name: str, is_stopping: Callable[[], bool]) -> int:
        with self._opened() as shelf, shelf.subdirectory(JOURNAL) as place, closing(_pieces(source, name)) as pieces:
            return place.write_atomic(name, _paced(pieces, is_stopping)).bytes

    def read_history(self, name: str) -> Iterator[bytes]:
        with self._opened(), Directory(self._path / JOURNAL) as place:
            yield from _pieces(place, name)

    def remove_history(self, name: str) -> None:
        with self._opened(), Directory(self._path / JOURNAL) as place:
            place.remove(name)

    def _put_aside(self, shelf: Directory, name: str) -> None:
        """Give the set *name*, which cannot be read, another name; one from an earlier time of that name goes."""
        if shelf.stat(_DAMAGED + name) is not None:
            shelf.remove_tree(_DAMAGED + name)
        shelf.rename(name, _DAMAGED + name)
        shelf.sync()

    def _read_again(self, target: Directory, stored: StoredFile) -> None:
        if not stands_whole(target, stored.stored, stored):
            raise CopyFailed(f"{self.where}: {stored.stored} came back changed after it was written; check that disk")

    @staticmethod
    def _write_notes(source: Directory, target: Directory) -> None:
        for name in (PROOF_FILE, SET_FILE):
            if source.stat(name) is not None:
                target.write_atomic(name, [source.read(name)])

    @contextmanager
    def _opened(self) -> Iterator[Directory]:
        try:
            with Directory(self._path) as shelf:
                yield shelf
        except HoldfastError as error:
            raise CopyFailed(f"{self.where}: {error}") from error
        except OSError as error:
            raise CopyFailed(
                f"{self.where}: {error.strerror or error}; create the directory, or mount its disk"
                if isinstance(error, FileNotFoundError) and not self._path.is_dir()
                else f"{self.where}: {error.strerror or error}"
            ) from error


class _Bucket:
    """A bucket of S3, below a prefix."""

    def __init__(self, settings: Settings, where: str) -> None:
        bucket, _, prefix = where.removeprefix(SCHEME).partition("/")
        self.where = where
        try:
            import obstore
            from obstore.exceptions import BaseError
            from obstore.store import S3Store
        except ImportError:
            raise SettingsError(
                "copies to S3 need the library obstore, which is not installed; run pip install 'holdfast[s3]'"
            ) from None
        self._library = obstore
        self._error = BaseError
        endpoint = settings.backups.s3_endpoint
        credentials: Any = _credentials(settings)
        self._secrets = [text for text in credentials.values() if text]
        self._store: S3Store = S3Store(
            bucket,
            prefix=prefix.strip("/") or None,
            config={
                "region": settings.backups.s3_region,
                "virtual_hosted_style_request": not endpoint,
                # Said in full, since the library takes from the environment what is not.
                "endpoint": endpoint or f"https://{bucket}.s3.{settings.backups.s3_region}.amazonaws.com",
            },
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "timeout": REQUEST_S,
                "connect_timeout": CONNECT_S,
            },
            retry_config={"max_retries": RETRIES},
            credential_provider=lambda: credentials,
        )

    def sets(self) -> list[BackupSet]:
        with self._asking():
            listed = self._library.list_with_delimiter(self._store, "sets")
            names = [prefix.rpartition("/")[2] for prefix in listed["common_prefixes"]]
            return [self._set(name) for name in sorted(names, reverse=True) if SET_NAME.fullmatch(name)]

    def put(self, found: BackupSet, is_stopping: Callable[[], bool]) -> Transfer:
        assert found.manifest is not None, "a set that cannot be read is not copied"
        files = size = 0
        with self._asking(is_stopping), Directory(found.path) as source:
            # Only what is in a set there has been read again.
            in_sets = {
                file.stored_sha256 for one in self.sets() if one.manifest for file in one.manifest.files.values()
            }
            there = {name: bytes_ for name, bytes_, _ in self._listed("objects") if name in in_sets}
            for stored in found.manifest.files.values():
                if there.get(stored.stored_sha256) == stored.stored_bytes:
                    continue
                with closing(_pieces(source, stored.stored)) as pieces:
                    self._send(f"objects/{stored.stored_sha256}", _checked(pieces, stored, is_stopping))
                self._read_again(stored, is_stopping)
                there[stored.stored_sha256] = stored.stored_bytes
                files, size = files + 1, size + stored.stored_bytes
            for name in (PROOF_FILE, SET_FILE):
                if source.stat(name) is not None:
                    self._send(f"sets/{found.name}/{name}", [source.read(name)])
        return Transfer(files, size)

    def put_proof(self, found: BackupSet) -> None:
        with self._asking(), Directory(found.path) as source:
            self._send(f"sets/{found.name}/{PROOF_FILE}", [source.read(PROOF_FILE)])

    def remove(self, name: str) -> None:
        with self._asking():
            # In this order: without this one it is no set any more.
            self._library.delete(self._store, [f"sets/{name}/{SET_FILE}"])
            self._library.delete(self._store, [f"sets/{name}/{PROOF_FILE}"])

    def tidy(self) -> None:
        with self._asking():
            found = self.sets()
            if any(one.manifest is None for one in found):
                return  # what it needs is not known
            needed = {file.stored_sha256 for one in found if one.manifest for file in one.manifest.files.values()}
            old_s = time.time() - ORPHAN_S
            orphans = [
                f"objects/{name}" for name, _, at_s in self._listed("objects") if name not in needed and at_s < old_s
            ]
            if orphans:
                self._library.delete(self._store, orphans)

    def read(self, found: BackupSet, stored: StoredFile) -> Iterator[bytes]:
        return self._received(f"objects/{stored.stored_sha256}")

    def history(self) -> dict[str, HistoryFile]:
        with self._asking():
            listed = self._listed(JOURNAL)
        return {name: HistoryFile(size, at_s) for name, size, at_s in listed if PACKED_NAME.fullmatch(name)}

    def put_history(self, source: Directory, name: str, is_stopping: Callable[[], bool]) -> int:
        with self._asking(is_stopping), closing(_pieces(source, name)) as pieces:
            return self._send(f"{JOURNAL}/{name}", _paced(pieces, is_stopping))

    def read_history(self, name: str) -> Iterator[bytes]:
        return self._received(f"{JOURNAL}/{name}")

    def remove_history(self, name: str) -> None:
        with self._asking():
            self._library.delete(self._store, [f"{JOURNAL}/{name}"])

    def _set(self, name: str) -> BackupSet:
        path = Path(name)
        try:
            manifest, damage = decode_set_manifest(self._received_whole(f"sets/{name}/{SET_FILE}")), ""
        except (DataRefused, ValueError, FileNotFoundError) as error:
            return BackupSet(path, None, f"{SET_FILE}: {error}", None)
        try:
            proof = decode_proof(self._received_whole(f"sets/{name}/{PROOF_FILE}"))
        except FileNotFoundError:
            proof = None
        return BackupSet(path, manifest, damage, proof)

    def _listed(self, place: str) -> list[tuple[str, int, float]]:
        """Name, size and time of everything below *place*."""
        return [
            (meta["path"].rpartition("/")[2], meta["size"], meta["last_modified"].timestamp())
            for part in self._library.list(self._store, place)
            for meta in part
        ]

    def _send(self, key: str, pieces: Iterable[bytes]) -> int:
        sent = 0

        def counted() -> Iterator[bytes]:
            nonlocal sent
            for piece in pieces:
                sent += len(piece)
                yield piece

        self._library.put(self._store, key, counted(), chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        return sent

    def _received_whole(self, key: str) -> bytes:
        return bytes(self._library.get(self._store, key).bytes())

    def _received(self, key: str) -> Iterator[bytes]:
        with self._asking():
            for piece in self._library.get(self._store, key).stream(min_chunk_size=READ_BYTES):
                yield bytes(piece)

    def _read_again(self, stored: StoredFile, is_stopping: Callable[[], bool]) -> None:
        digest = hashlib.sha256()
        for piece in _paced(self._received(f"objects/{stored.stored_sha256}"), is_stopping):
            digest.update(piece)
        if digest.hexdigest() != stored.stored_sha256:
            raise CopyFailed(f"{self.where}: {stored.stored} came back changed after it was sent; it is sent again")

    @contextmanager
    def _asking(self, is_stopping: Callable[[], bool] = lambda: False) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            if is_stopping():
                raise Stopped from error
            # The first line says it; the others are those of the library's own retries, with the whole request.
            raise CopyFailed(f"{self.where}: {self._short(error)}") from error
        except OSError as error:
            raise CopyFailed(f"{self.where}: {error.strerror or error}") from error

    def _short(self, error: Exception) -> str:
        text = " ".join(str(error).split("\n\nDebug source")[0].split())
        # A server that refuses a request may quote it.
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text if len(text) <= 300 else f"{text[:300]}…"


def _credentials(settings: Settings) -> dict[str, Any]:
    name = settings.backups.s3_credentials_file
    file = credential_file("backups.s3_credentials_file", name)
    if file is None:
        raise SettingsError(
            "copies to S3 need backups.s3_credentials_file: a file with aws_access_key_id and aws_secret_access_key, which "
            "are not taken from the environment"
        )
    import configparser  # here, because only copies to S3 need it

    parser = configparser.ConfigParser(interpolation=None, default_section="\0")
    try:
        parser.read_string(read_key_file(file, "the file of credentials").decode())
        section = parser[parser.sections()[0]]
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
            "expires_at": None,
        }
    # What is wrong with it is not quoted: it is secret.
    except (configparser.Error, UnicodeDecodeError, LookupError):
        raise SettingsError(
            f"{file}: expected a section with aws_access_key_id and aws_secret_access_key, as in ~/.aws/credentials"
        ) from None


def known_files(sets: Iterable[BackupSet]) -> dict[tuple[str, int], list[Path]]:
    """Where the files of *sets* are, by what their content should be: SHA-256 and size."""
    known: dict[tuple[str, int], list[Path]] = {}
    for found in sets:
        for stored in found.manifest.files.values() if found.manifest else ():
            known.setdefault((stored.stored_sha256, stored.stored_bytes), []).append(found.path / stored.stored)
    return known


def link_known(
    known: dict[tuple[str, int], list[Path]],
    stored: StoredFile,
    target: Directory,
    is_stopping: Callable[[], bool] | None = None,
) -> bool:
    """Link the content of *stored* into *target* from where it is *known*, when it is still that; whether it was.

    Each is read before: a byte may have changed on the disk since it was written, and would be handed down for ever.
    """
    read: set[tuple[int, int]] = set()
    for path in known.get((stored.stored_sha256, stored.stored_bytes), ()):
        try:
            status = path.lstat()
            # Most of them are one file.
            if status.st_size != stored.stored_bytes or (status.st_dev, status.st_ino) in read:
                continue
            read.add((status.st_dev, status.st_ino))
            with Directory(path.parent) as place:
                if stands_whole(place, path.name, stored, is_stopping):
                    place.keep_link(path.name, target, stored.stored)
                    return True
        except FileNotFoundError:
            continue  # rotated away meanwhile
    return False


def stands_whole(
    place: Directory, name: str, stored: StoredFile, is_stopping: Callable[[], bool] | None = None
) -> bool:
    """Whether *name* in *place*, read from the disk, is what *stored* says; False also when it cannot be read.

    With *is_stopping*, which daemons have, the disk is left to others in between.

    Raises:
        Stopped: *is_stopping* said so.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with closing(_pieces(place, name, is_cached=False)) as pieces:
            for piece in pieces if is_stopping is None else _paced(pieces, is_stopping):
                digest.update(piece)
                size += len(piece)
    except OSError:
        return False
    return (size, digest.hexdigest()) == (stored.stored_bytes, stored.stored_sha256)


def _pieces(source: Directory, name: str, *, is_cached: bool = True) -> Generator[bytes]:
    fd = source.open_to_read(name)
    try:
        if not is_cached and hasattr(os, "posix_fadvise"):
            # Else what is read comes from memory, and says nothing about the disk.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := os.read(fd, READ_BYTES):
            yield piece
    finally:
        os.close(fd)


def _paced(pieces: Iterable[bytes], is_stopping: Callable[[], bool]) -> Iterator[bytes]:
    started = time.monotonic()
    for piece in pieces:
        if is_stopping():
            raise Stopped
        yield piece
        # The daemon shares the processor, the disk and the line with us, and its callers wait.
        time.sleep(min(PAUSE_S_MAX, time.monotonic() - started))
        started = time.monotonic()


def _checked(pieces: Iterable[bytes], stored: StoredFile, is_stopping: Callable[[], bool]) -> Iterator[bytes]:
    """*pieces*; raises CopyFailed behind the last when they are not what the set says."""
    digest = hashlib.sha256()
    for piece in _paced(pieces, is_stopping):
        digest.update(piece)
        yield piece
    if digest.hexdigest() != stored.stored_sha256:
        raise SourceDamaged(f"{stored.stored} of the backup is damaged; it is not copied, take another backup")
