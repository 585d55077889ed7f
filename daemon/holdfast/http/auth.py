"""Tokens: who may come by TCP."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from holdfast.clock import format_ms
from holdfast.disk.files import Directory, as_our_error
from holdfast.errors import BadRequest, Conflict, DataRefused, NotFound

Scope = Literal["read", "write"]

TOKEN_PREFIX = "hf_"
TOKEN_RANDOM_BYTES = 32
TOKEN_CHARS_MAX = 256
TOKEN_FILE_BYTES_MAX = 1 << 20
NAME_CHARS_MAX = 64

FIRST_TOKEN_FILE = "token"
"""The first token, in clear for local use; mode 0600."""

TOKENS_FILE = "tokens.json"
"""The tokens made later, as hashes only."""

_FIRST_NAME = "first"


class Token(msgspec.Struct, frozen=True):
    """What is kept of a token; not enough to use it.

    Attributes:
        name: how the operator calls it.
        scope: ``read`` may not change anything.
        sha256: of the whole token, in hexadecimal.
        created_at: ISO 8601.
    """

    name: str
    scope: Scope
    sha256: str
    created_at: str


class _TokensFile(msgspec.Struct):
    tokens: list[Token] = []


class TokenStore:
    """The tokens of one data directory.

    The daemon reads them, the command line writes them, each with an object of its own; ``refresh`` picks up
    what the other has changed. One thread at a time.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._hashes: list[tuple[bytes, Scope]] = []
        self._stamps: tuple[object, ...] | None = None

    def load(self) -> None:
        """Read the tokens; make the first one when there is none. Call it while the directory lock is held.

        Raises:
            DataRefused: a token file is not a regular file of ours, can be read by others, or is damaged.
        """
        with Directory(self._data_dir) as directory:
            if directory.stat(FIRST_TOKEN_FILE) is None:
                _write_private(directory, FIRST_TOKEN_FILE, f"{_new_token()}\n".encode())
        self.refresh()

    def refresh(self) -> bool:
        """Read the files again when they have changed, and say whether they had.

        Raises:
            DataRefused: as ``load``; the tokens known so far stay in use.
        """
        with Directory(self._data_dir) as directory:
            stamps = tuple(_stamp(directory.stat(name)) for name in (FIRST_TOKEN_FILE, TOKENS_FILE))
            if stamps == self._stamps:
                return False
            # Also when reading fails: the same damage is not read, and told, again and again.
            self._stamps = stamps
            tokens = _read_tokens(directory)
            first = _read_private(directory, FIRST_TOKEN_FILE)
        hashes: list[tuple[bytes, Scope]] = [(bytes.fromhex(token.sha256), token.scope) for token in tokens]
        if first is not None:
            hashes.append((_hash(_checked_first(first)), "write"))
        self._hashes = hashes
        return True

    def scope_of(self, presented: str) -> Scope | None:
        """What *presented* allows; None when it is not a token of ours. Takes the same time for any guess."""
        if len(presented) > TOKEN_CHARS_MAX:
            return None
        found: Scope | None = None
        digest = _hash(presented)
        for known, scope in self._hashes:
            if hmac.compare_digest(known, digest):
                found = scope
        return found

    def create(self, name: str, scope: Scope = "write") -> str:
        """Make a token and return it; it is shown this once, and only its hash is kept.

        Raises:
            BadRequest: *name* is empty, too long or not printable.
            Conflict: there is a token of this name.
        """
        if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable():
            raise BadRequest(f"expected a name of 1 to {NAME_CHARS_MAX} printable characters, found {name!a}")
        tokens = self.list()
        if name == _FIRST_NAME or any(token.name == name for token in tokens):
            raise Conflict(f"there is a token named {name!r}; revoke it or choose another name")
        token = _new_token()
        created_at = format_ms(time.time_ns() // 1_000_000)
        tokens.append(Token(name, scope, _hash(token).hex(), created_at))
        self._write(tokens)
        return token

    def revoke(self, name: str) -> None:
        """Make the token of this name worthless; a running daemon follows within a second.

        Raises:
            NotFound: there is none.
            Conflict: it is the first one, which is renewed by deleting its file and starting again.
        """
        if name == _FIRST_NAME:
            raise Conflict(f"the first token is renewed by deleting {FIRST_TOKEN_FILE} and starting again")
        tokens = self.list()
        kept = [token for token in tokens if token.name != name]
        if len(kept) == len(tokens):
            raise NotFound(f"no token is named {name!r}")
        self._write(kept)

    def list(self) -> list[Token]:
        """All tokens but the first, in the order they were made."""
        with Directory(self._data_dir) as directory:
            return _read_tokens(directory)

    def _write(self, tokens: Sequence[Token]) -> None:
        content = msgspec.json.format(msgspec.json.encode(_TokensFile(list(tokens))))
        with Directory(self._data_dir) as directory:
            _write_private(directory, TOKENS_FILE, content + b"\n")


def _read_tokens(directory: Directory) -> list[Token]:
    raw = _read_private(directory, TOKENS_FILE)
    if raw is None:
        return []
    try:
        tokens = msgspec.json.decode(raw, type=_TokensFile).tokens
        for token in tokens:
            if len(bytes.fromhex(token.sha256)) != hashlib.sha256().digest_size:
                raise ValueError(f"a hash of the wrong length for {token.name!r}")
    except (msgspec.DecodeError, ValueError) as error:
        raise DataRefused(
            f"{TOKENS_FILE}: expected tokens as `holdfast token new` writes them, found {error}; "
            "mend it, or remove it and make the tokens anew"
        ) from None
    return tokens


def _new_token() -> str:
    return TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_RANDOM_BYTES)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _checked_first(raw: bytes) -> str:
    token = raw.strip().decode("ascii", "replace")
    if not token.startswith(TOKEN_PREFIX) or not TOKEN_RANDOM_BYTES <= len(token) <= TOKEN_CHARS_MAX:
        raise DataRefused(
            f"{FIRST_TOKEN_FILE}: expected one token starting with {TOKEN_PREFIX}, found something else; "
            "remove the file, and the next start makes a new one"
        )
    return token


def _stamp(found: os.stat_result | None) -> tuple[int, ...] | None:
    return None if found is None else (found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode)


def _read_private(directory: Directory, name: str) -> bytes | None:
    """The content of a file that only its owner may read; None when there is none."""
    try:
        descriptor = directory.open_to_read(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataRefused(
            f"{name}: expected a regular file of mode 0600, found one that cannot be opened: "
            f"{error.strerror or error}; move it away"
        ) from error
    with open(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o077:
            raise DataRefused(
                f"{name}: expected mode 0600, found {mode:04o}, so others may have read it; "
                "remove it and make the tokens anew, or chmod 600 if you are sure"
            )
        return file.read(TOKEN_FILE_BYTES_MAX)


def _write_private(directory: Directory, name: str, content: bytes) -> None:
    try:
        directory.write_atomic(name, [content])
    except OSError as error:
        raise as_our_error(error, f"write {name}") or error from error
