"""What every decision rests on: the settings it depends on, and the checks that ops share."""

from __future__ import annotations

from datetime import UTC, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from holdfast import record, values
from holdfast.core.collection import Collection
from holdfast.errors import InvalidRecord, NotFound, VersionMismatch
from holdfast.ops import ANY_VERSION, Answer, RecordOp
from holdfast.settings import Settings


class Rules(msgspec.Struct, frozen=True):
    """The settings that decisions depend on.

    Attributes:
        session_id_field, session_time_field, order_id_field: names of fields in the values.
        session_ttl_ms: idle time of sessions without their own.
        session_limits, record_limits: of sessions, of all other records.
        id_chars_max: of ids.
        zone: of naive timestamps and of day boundaries.
        keep_days: of sales figures.
        reserved_names: collections that may not come into being, each with the reason.
        message_limits: of the content and of the metadata of a message.
        append_max: messages that one op may append.
    """

    session_id_field: str = "recipientPhone"
    session_time_field: str = "lastActivity"
    order_id_field: str = "odooOrderId"
    session_ttl_ms: int = 24 * 3600 * 1000
    session_limits: values.ValueLimits = values.DEFAULT_LIMITS
    record_limits: values.ValueLimits = values.DEFAULT_LIMITS
    id_chars_max: int = 256
    zone: tzinfo = UTC
    keep_days: int = 90
    reserved_names: dict[str, str] = {}
    message_limits: values.ValueLimits = values.ValueLimits(bytes_max=256 << 10)
    append_max: int = 1_000


def rules_of(settings: Settings, reserved_names: dict[str, str] | None = None) -> Rules:
    """The part of *settings* that decisions depend on."""
    limits = settings.limits
    return Rules(
        session_id_field=settings.sessions.id_field,
        session_time_field=settings.sessions.time_field,
        order_id_field=settings.orders.id_field,
        session_ttl_ms=round(settings.sessions.ttl * 1000),
        session_limits=values.ValueLimits(settings.sessions.max_bytes, limits.depth, limits.keys),
        record_limits=values.ValueLimits(limits.record_bytes, limits.depth, limits.keys),
        id_chars_max=limits.id_chars,
        zone=ZoneInfo(settings.stats.timezone),
        keep_days=settings.stats.keep_days,
        message_limits=values.ValueLimits(limits.message_bytes, limits.depth, limits.keys),
        reserved_names=reserved_names or {},
    )


def check_id(id: str, rules: Rules) -> None:
    """Refuse what cannot be an id.

    Raises:
        InvalidRecord: empty, too long, or with control or other unprintable characters.
    """
    if not id or len(id) > rules.id_chars_max:
        raise InvalidRecord(f"an id has 1 to {rules.id_chars_max} characters, found {len(id)}")
    if not id.isprintable():
        raise InvalidRecord("an id may not hold control characters or other unprintable ones")


def check_text(text: Any, what: str, chars_max: int) -> None:
    """Refuse what a journal line cannot hold as text, or should not."""
    if text is None:
        return
    if not isinstance(text, str) or len(text) > chars_max:
        raise InvalidRecord(f"{what} must be text of at most {chars_max} characters, found {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRecord(f"{what} holds a lone surrogate; send valid Unicode") from None


def existing(collection: Collection, op: RecordOp, noun: str) -> bytes:
    line = collection.get(op.id)
    if line is not None:
        return line
    if op.if_version is not None and op.if_version != 0:
        raise VersionMismatch(f"{noun} {op.id!r} does not exist, but if_version asks for one")
    raise NotFound(f"no {noun} {op.id!r}")


def next_version(old: bytes | None, op: RecordOp) -> tuple[int, int | None]:
    """The version after *op* of the record that is now *old*, and the ttl that it has of its own.

    Raises:
        VersionMismatch: ``if_version`` names another version than the record has.
    """
    wanted = op.if_version
    if old is None:
        if wanted:
            raise VersionMismatch(f"{op.id!r} does not exist, but if_version is {wanted}; read it again")
        return 1, None
    version, is_plain = record.version_of(old)
    if wanted is not None and wanted != version and wanted != ANY_VERSION:
        raise VersionMismatch(f"{op.id!r} has version {version}, but if_version is {wanted}; read it again")
    return version + 1, None if is_plain else record.header_of(old).ttl


def refuse_header(value: dict[str, Any]) -> None:
    if record.HEADER_KEY in value:
        raise InvalidRecord(f"the key {record.HEADER_KEY!r} is reserved; use another name")


def unchanged(op: RecordOp, line: bytes, seq: int) -> Answer:
    return Answer(status=200, seq=seq - 1, id=op.id, version=record.version_of(line)[0])
