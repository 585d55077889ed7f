"""Encryption of backups and exports for age recipients, so that the common tool ``age`` opens what we wrote.

Recipients are public and may stand in the settings. Identities are secret: they come from a file, or from a credential of
systemd, which is a file as well; never from the environment or the command line, which other programs can see.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from holdfast.care.packing import Unreadable
from holdfast.errors import SettingsError
from holdfast.settings import RECIPIENT_PREFIXES, SECRET_KEY_PREFIX, Settings

PIECES_MAX = 16
"""Pieces of 64 KiB at most that wait for whoever takes them."""

WAIT_S = 0.1
"""Between two looks whether whoever takes the pieces has gone."""

KEY_FILE_BYTES_MAX = 1 << 20

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""The variable in which systemd names the directory of a unit's credentials; it holds no secret itself."""

_SSH_IDENTITY = b"-----BEGIN "


class AgeSeal:
    """Encrypts for *recipients*, decrypts with *identities*; as ``packing.Seal``. Any number of threads may use it.

    What is encrypted or decrypted is never in memory as a whole.
    """

    def __init__(self, recipients: Sequence[Any], identities: Sequence[Any]) -> None:
        self._recipients = tuple(recipients)
        self._identities = tuple(identities)

    @property
    def can_close_up(self) -> bool:
        """Whether there is a recipient to encrypt for."""
        return bool(self._recipients)

    @property
    def can_open(self) -> bool:
        """Whether there is an identity to decrypt with; a daemon that only writes needs none."""
        return bool(self._identities)

    def close_up(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """*chunks*, encrypted for every recipient; an error of *chunks* is passed on."""
        assert self._recipients, "nobody to encrypt for"
        age = _age()
        return _piped(chunks, lambda source, sink: age.encrypt_io(source, sink, self._recipients))

    def open(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """*chunks*, decrypted; an error of *chunks* is passed on.

        Raises:
            Unreadable: no identity fits, or there is none; they were changed or cut short, or age did not write them.
        """
        if not self._identities:
            raise Unreadable(
                "it is encrypted, and there is no key; name it by --identity FILE or backups.identity_file"
            )
        age = _age()
        try:
            yield from _piped(chunks, lambda source, sink: age.decrypt_io(source, sink, self._identities))
        except _Undecryptable as error:
            raise Unreadable("it was changed or cut short") from error
        except age.DecryptError as error:
            raise Unreadable(_reason(str(error))) from error


def seal_of(settings: Settings, identity: Path | None = None, recipients: Sequence[str] = ()) -> AgeSeal | None:
    """The seal that *settings* ask for; None when they name neither recipients nor an identity.

    Args:
        identity: a file of keys instead of ``backups.identity_file``.
        recipients: for whom to encrypt, as in ``backups.recipients``, instead of those.

    Raises:
        SettingsError: a file cannot be read or holds no such keys, or the extra ``encryption`` is missing.
    """
    backups = settings.backups
    named = tuple(recipients) or backups.recipients
    file = identity if identity is not None else credential_file("backups.identity_file", backups.identity_file)
    if not named and file is None:
        return None
    return AgeSeal([one for name in named for one in _recipients(name)], [] if file is None else _identities(file))


def seal_to_write(settings: Settings, recipients: Sequence[str] = ()) -> AgeSeal | None:
    """The seal for what is written from now on; the key that opens it is not asked for, and may be away. None without
    recipients.

    Args:
        recipients: as of ``seal_of``.

    Raises:
        SettingsError: as ``seal_of``, for a recipient.
    """
    named = tuple(recipients) or settings.backups.recipients
    return AgeSeal([one for name in named for one in _recipients(name)], []) if named else None


def key_problem(settings: Settings) -> str:
    """Why the key that *settings* name cannot be used now; empty when it can, or none is named."""
    try:
        file = credential_file("backups.identity_file", settings.backups.identity_file)
        if file is not None:
            _identities(file)
    except SettingsError as error:
        return str(error)
    return ""


def writing_seal(seal: AgeSeal | None) -> AgeSeal | None:
    """*seal* where what is written is to be encrypted; None where it only reads, or there is none."""
    return seal if seal is not None and seal.can_close_up else None


def credential_file(setting: str, name: str) -> Path | None:
    """The file that *name*, the value of *setting*, means; None when it is empty.

    Without a slash it is a credential of systemd (``LoadCredential=NAME:…``), else a path.

    Raises:
        SettingsError: systemd gave this process no credentials.
    """
    if not name:
        return None
    if "/" in name:
        return Path(name).expanduser()
    directory = os.environ.get(CREDENTIALS)
    if not directory:
        raise SettingsError(
            f"{setting}: {name!r} names a systemd credential, and this process was given none; write LoadCredential= into "
            f"the unit, or ./{name} for a file"
        )
    return Path(directory) / name


def read_key_file(path: Path, what: str) -> bytes:
    """The content of the secret file *path*.

    Raises:
        SettingsError: it cannot be read, is no regular file, too large, or open to everybody.
    """
    try:
        # Without O_NONBLOCK opening a pipe would wait for a writer for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SettingsError(
            f"{path}: {what} cannot be read: {error.strerror}; correct the path or its permissions"
        ) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > KEY_FILE_BYTES_MAX:
            raise SettingsError(f"{path}: expected a file with {what}, found something else")
        if status.st_mode & stat.S_IRWXO:
            raise SettingsError(f"{path}: {what} is open to everybody; run chmod 600 {path}")
        return os.read(fd, KEY_FILE_BYTES_MAX)
    finally:
        os.close(fd)


def _age() -> Any:
    try:
        import pyrage  # type: ignore[import-untyped]  # here, because only who encrypts has it installed
    except ImportError:
        raise SettingsError(
            "encryption needs the library pyrage, which is not installed; run pip install 'holdfast[encryption]'"
        ) from None
    return pyrage


def _recipients(name: str) -> Iterator[Any]:
    """Those that one entry of ``backups.recipients`` names: itself, or those in the file of that name."""
    if name.startswith(RECIPIENT_PREFIXES):
        yield _recipient(name, "recipient")
        return
    try:
        lines = Path(name).expanduser().read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{name}: the recipients file cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}; name "
            "recipients (age1…, ssh-ed25519 …) or a file with one a line"
        ) from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise SettingsError(f"{name}: expected a recipient a line, found none; age-keygen -y KEYFILE prints one")
    for line in found:
        yield _recipient(line, name)


def _recipient(text: str, where: str) -> Any:
    age = _age()
    if SECRET_KEY_PREFIX in text.upper():
        raise SettingsError(
            f"{where}: expected a recipient (age1…), found a secret key; age-keygen -y KEYFILE prints its recipient"
        )
    try:
        if text.startswith("ssh-"):
            return age.ssh.Recipient.from_str(text)
        return age.x25519.Recipient.from_str(text)
    except age.RecipientError as error:
        raise SettingsError(
            f"{where}: expected age1… or ssh-ed25519 …, found {text[:80]!r}: {' '.join(str(error).split())}"
        ) from None


def _identities(path: Path) -> list[Any]:
    age = _age()
    raw = read_key_file(path, "the key")
    try:
        if raw.startswith(_SSH_IDENTITY):
            return [age.ssh.Identity.from_buffer(raw)]
        lines = [line.strip() for line in raw.decode().splitlines()]
        found = [age.x25519.Identity.from_str(line) for line in lines if line and not line.startswith("#")]
    # The text of the error is left out: it might quote what is secret.
    except (age.IdentityError, UnicodeDecodeError):
        found = []
    if not found:
        raise SettingsError(
            f"{path}: expected keys as age-keygen makes them (AGE-SECRET-KEY-1…), or an ssh key without a passphrase, "
            "found something else"
        )
    return found


def _reason(text: str) -> str:
    if "No matching keys" in text:
        return "it is encrypted for another key; name the one that fits by --identity FILE"
    return f"it is not what age wrote, or cut short ({' '.join(text.split())})"


class _Undecryptable(Exception):
    """A part of it is not what was encrypted."""


class _Gone(Exception):
    """Whoever took the pieces wants no more."""


class _Pipe:
    """Between the library, which reads and writes files in a thread of its own, and a generator's caller."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.error: BaseException | None = None
        self.source_error: BaseException | None = None
        self.is_gone = False
        self.pieces: Queue[bytes | None] = Queue(PIECES_MAX)
        self._chunks = iter(chunks)
        self._left = memoryview(b"")

    # What the library takes for a file to read from, and one to write to.

    def read(self, size: int = -1) -> bytes:
        try:
            while not self._left:
                self._left = memoryview(next(self._chunks))
        except StopIteration:
            return b""
        except BaseException as error:
            # It comes out of the library as a text.
            self.source_error = error
            raise
        taken, self._left = self._left[:size], self._left[size:]
        return bytes(taken)

    def write(self, data: bytes) -> int:
        self.put(bytes(data))
        return len(data)

    def flush(self) -> None:
        pass

    def put(self, piece: bytes | None) -> None:
        while True:
            if self.is_gone:
                raise _Gone
            try:
                return self.pieces.put(piece, timeout=WAIT_S)
            except Full:
                continue

    def run(self, work: Callable[[Any, Any], object]) -> None:
        try:
            work(self, self)
        except BaseException as error:
            self.error = error
        finally:
            with suppress(_Gone):
                self.put(None)

    def abandon(self) -> None:
        """Have the library end at its next piece."""
        self.is_gone = True
        with suppress(Empty):
            while True:
                self.pieces.get_nowait()


def _piped(chunks: Iterable[bytes], work: Callable[[Any, Any], object]) -> Generator[bytes]:
    pipe = _Pipe(chunks)
    thread = threading.Thread(target=pipe.run, args=(work,), name="holdfast-age", daemon=True)
    thread.start()
    try:
        while (piece := pipe.pieces.get()) is not None:
            yield piece
    finally:
        pipe.abandon()
        # Until then the library may still be taking from *chunks*, which the caller closes next.
        thread.join()
    if pipe.source_error is not None:
        raise pipe.source_error
    if pipe.error is not None:
        if isinstance(pipe.error, OSError):
            raise _Undecryptable from pipe.error
        raise pipe.error
