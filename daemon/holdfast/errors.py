"""Every error that Holdfast shows to a caller.

Each class carries the stable ``code`` and the HTTP ``status`` of CONTRACT section 7; the message says
what was expected, what was found and what to do. Internal failures that no caller can act on are not here.
"""

from __future__ import annotations

from functools import cache
from typing import ClassVar


class HoldfastError(Exception):
    """Base of all errors that callers may catch.

    Attributes:
        code: stable identifier, the same in Python, over HTTP and in the log.
        status: the HTTP status that carries it.
        exit_code: of a process that ends because of it (CONTRACT section 4).
        index: of the op in an atomic batch that was refused; None elsewhere.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    index: int | None = None

    @property
    def detail(self) -> str:
        """One sentence for a person: expected, found, what to do."""
        return str(self)


# Met when a request cannot be read.


class InvalidJson(HoldfastError):
    """The bytes are not JSON at all. Nothing was changed."""

    code = "invalid_json"
    status = 400


class BadRequest(HoldfastError):
    """A parameter, header or cursor has no meaning here. Nothing was changed."""

    code = "bad_request"
    status = 400


class Unauthorized(HoldfastError):
    """No token, or one that is not known."""

    code = "unauthorized"
    status = 401


class Forbidden(HoldfastError):
    """The caller is known but may not do this, or came by a forbidden way (Host, Origin)."""

    code = "forbidden"
    status = 403


class MethodNotAllowed(HoldfastError):
    """The path exists, the method does not."""

    code = "method_not_allowed"
    status = 405


class UnsupportedMediaType(HoldfastError):
    """A body in another format than JSON."""

    code = "unsupported_media_type"
    status = 415


class TooLarge(HoldfastError):
    """A header, body, record or batch above its limit. Nothing was changed."""

    code = "too_large"
    status = 413


class RequestTimeout(HoldfastError):
    """The request did not arrive within its deadline. Nothing was changed."""

    code = "request_timeout"
    status = 408


class TooManyRequests(HoldfastError):
    """Guessing tokens, or a limit on connections; try again later."""

    code = "too_many_requests"
    status = 429


# Met when an op is decided.


class NotFound(HoldfastError):
    """No such record, collection or path."""

    code = "not_found"
    status = 404


class Conflict(HoldfastError):
    """The op does not fit the present state (a completed order, a lost lease, a reused key)."""

    code = "conflict"
    status = 409


class VersionMismatch(HoldfastError):
    """``if_version`` named another version than the record has. Nothing was changed."""

    code = "version_mismatch"
    status = 412


class InvalidRecord(HoldfastError):
    """Valid JSON that cannot be kept exactly, or is not a record of this collection."""

    code = "invalid_record"
    status = 422


class Leased(HoldfastError):
    """Another worker holds the lease of this session.

    Attributes:
        ends_in_ms: when its time is over unless it is renewed; None where that is not known.
    """

    ends_in_ms: int | None = None
    code = "leased"
    status = 423


class Gone(HoldfastError):
    """The events asked for are no longer in the journal.

    Attributes:
        oldest_seq: the oldest event that can still be read; a reader goes on with it, after a look at the present state.
            0 where that is not known.
    """

    code = "gone"
    status = 410

    def __init__(self, detail: str, oldest_seq: int = 0) -> None:
        super().__init__(detail)
        self.oldest_seq = oldest_seq


# Met when the disk or the process cannot do it now.


class StorageFull(HoldfastError):
    """No room on the disk (ENOSPC, EDQUOT, EFBIG). The op is undone; reads go on; try again when there is room."""

    code = "storage_full"
    status = 507


class Unavailable(HoldfastError):
    """Starting, stopping, or stopped: the op was not done here."""

    code = "unavailable"
    status = 503


class JournalBroken(Unavailable):
    """The disk refused to sync. Whether the last ops are kept shows only after a restart; nothing more is accepted."""


class ForkedProcess(Unavailable):
    """This object belongs to the process that opened it; a forked child must open or connect for itself."""


# Met at start.


class SettingsError(HoldfastError):
    """A setting or command line that has no meaning. Nothing was touched."""

    code = "invalid_settings"
    status = 422
    exit_code = 2


class DirectoryLocked(HoldfastError):
    """Another process holds this data directory."""

    code = "directory_locked"
    status = 503
    exit_code = 3


class DataRefused(HoldfastError):
    """The data cannot be opened safely; nothing was touched."""

    code = "data_refused"
    status = 503
    exit_code = 4


def error_of(code: str, detail: str, status: int) -> HoldfastError:
    """The error that a daemon told by *code*; of a daemon newer than this library, one that only knows code and status."""
    kind = _by_code().get(code)
    if kind is not None:
        return kind(detail)
    error = HoldfastError(detail)
    error.code, error.status = code, status  # type: ignore[misc]
    return error


@cache
def _by_code() -> dict[str, type[HoldfastError]]:
    # Direct subclasses only: what is derived from Unavailable says so by its code.
    return {kind.code: kind for kind in HoldfastError.__subclasses__()}
