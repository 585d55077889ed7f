"""Snapshot files into memory: fast when they are as we left them, careful when somebody else wrote them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import orjson

from holdfast import record
from holdfast.clock import parse_ms
from holdfast.core.collection import Collection
from holdfast.core.decide import RECORD_ID_FIELD, USER_ID_FIELD, due_ms
from holdfast.core.retries import RetryLine
from holdfast.core.rules import Rules
from holdfast.core.state import (
    COMPLETED_ORDERS,
    COUNTED,
    EXTERNAL_TTL_MS,
    EXTERNALS,
    HOLDS,
    KEY_TTL_MS,
    KEYS,
    LEASES,
    ORDERS,
    RETRIES,
    SESSIONS,
    USERS,
    State,
)
from holdfast.core.wheel import MINUTE_MS
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import FileEntry, read_blocks

_STAMP = rb"(?:([-0-9T:]{16}):[0-9.]{6}Z\")?"
"""A time in the form that we write, its minute as the group; any other leaves the group empty."""


class _Lease(msgspec.Struct):
    id: str
    generation: int
    until: int
    owner: str | None


class _Key(msgspec.Struct):
    id: str
    op: str
    collection: str
    target: str
    at: int
    status: int
    seq: int
    version: int
    generation: int | None
    expires_at: str | None
    numbers: list[int] | None = None


class _External(msgspec.Struct):
    id: str
    number: int
    seq: int
    at: int


class _Hold(msgspec.Struct):
    id: str
    reason: str | None
    at: str


class _Mark(msgspec.Struct):
    id: str
    completed: bool


_BOOKKEEPING: dict[str, type[msgspec.Struct]] = {
    LEASES: _Lease,
    KEYS: _Key,
    RETRIES: RetryLine,
    COUNTED: _Mark,
    HOLDS: _Hold,
    EXTERNALS: _External,
}
"""What the records of our own collections hold; nobody else checks them when they are used."""

SCHEDULED = (LEASES, KEYS, EXTERNALS)
"""Of our own collections those whose records are of use for some time only."""


class Counts(msgspec.Struct):
    """What became of the records of foreign files.

    Attributes:
        loaded: are in memory now.
        skipped_invalid: lack a required field, or cannot be kept exactly.
        merged: share their id with another.
    """

    loaded: int = 0
    skipped_invalid: int = 0
    merged: int = 0


def id_field_of(collection: str, rules: Rules) -> str:
    """The field of a record's value that holds its id."""
    fields = {
        SESSIONS: rules.session_id_field,
        ORDERS: rules.order_id_field,
        COMPLETED_ORDERS: rules.order_id_field,
        USERS: USER_ID_FIELD,
    }
    return fields.get(collection, RECORD_ID_FIELD)


def load_trusted(
    directory: Directory,
    name: str,
    entry: FileEntry,
    state: State,
    collection: Collection,
    rules: Rules,
    on_block: Callable[[int], None],
) -> None:
    """Load a file that we wrote; its lines become the records as they are.

    Decodes nothing but each line's id and time, and calls *on_block* with the bytes read after each block.

    Raises:
        ChecksumMismatchError: it is not what we wrote; *collection* may hold wrong records and must be discarded.
        KeyError, ValueError: it was written when the settings named other fields; likewise.
        OSError: it cannot be read.
    """
    try:
        load_blocks(read_blocks(directory, name, entry), state, collection, rules, on_block)
    except (KeyError, TypeError, ValueError, OverflowError, msgspec.DecodeError):
        # The checksum of the whole comes last; until then a changed bit may look like anything.
        for _ in read_blocks(directory, name, entry):
            pass
        raise


def load_blocks(
    blocks: Iterable[bytes],
    state: State,
    collection: Collection,
    rules: Rules,
    on_block: Callable[[int], None] = lambda size: None,
) -> None:
    """Load *blocks* of whole lines, as ``disk.snapshot`` gives them; errors as ``load_trusted``, and those of *blocks*.

    Blocks that are not what we wrote may raise whatever their content leads to, before their checksum tells.
    """
    opening = b'{"%b":"' % id_field_of(collection.name, rules).encode()
    is_sessions = collection.name == SESSIONS
    for block in blocks:
        lines = block.split(b",\n")
        raw_ids = _ids(block, lines, opening) or [_slow_id(line, opening).encode() for line in lines]
        ids = [id.decode() for id in raw_ids]
        collection.fill_all(raw_ids, ids, lines)
        if is_sessions:
            _schedule_sessions(state, block, ids, lines, rules)
        elif collection.name in SCHEDULED:
            for id, line in zip(ids, lines, strict=True):
                schedule_bookkeeping(state, collection.name, id, line)
        on_block(len(block))


def load_foreign(
    values: Iterable[Any],
    state: State,
    collection: Collection,
    rules: Rules,
    now_ms: int,
    *,
    bump_versions: bool,
) -> Counts:
    """Load records that others wrote or changed: each checked, an id that exists twice merged.

    Args:
        values: decoded JSON, whatever it is.
        now_ms: what counts as the time of the change.
        bump_versions: give each record a new version, since which of them were changed cannot be known.
    """
    counts = Counts()
    for value in values:
        try:
            id, line = _foreign_line(collection.name, value, rules, now_ms, bump_versions=bump_versions)
            due = due_ms(line, rules) if collection.name == SESSIONS else 0
        except (KeyError, TypeError, ValueError, OverflowError):
            counts.skipped_invalid += 1
            continue
        present = collection.get(id)
        if present is not None:
            counts.merged += 1
            if _time_of(collection.name, line, rules) <= _time_of(collection.name, present, rules):
                continue
        collection.fill(id, line)
        if collection.name == SESSIONS:
            state.session_wheel.schedule(id, due)
        elif collection.name in SCHEDULED:
            schedule_bookkeeping(state, collection.name, id, line)
    counts.loaded = collection.count
    return counts


def checked_id(collection: str, line: bytes, rules: Rules) -> str:
    """The id of the record in *line*, a line of ours, when all holds for it that is asked of foreign ones.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: it does not.
    """
    return _foreign_line(collection, orjson.loads(line), rules, 0, bump_versions=False)[0]


def forgotten_ms(collection: str, line: bytes) -> int:
    """When the lease, idempotency key or external id in *line* is of no use any more, ms since 1970."""
    kept = orjson.loads(line)
    if collection == LEASES:
        return int(kept["until"])
    return int(kept["at"]) + (KEY_TTL_MS if collection == KEYS else EXTERNAL_TTL_MS)


def schedule_bookkeeping(state: State, collection: str, id: str, line: bytes) -> None:
    """Have the lease, key or external id *id* forgotten in its time."""
    wheel = {LEASES: state.lease_wheel, KEYS: state.key_wheel, EXTERNALS: state.external_wheel}[collection]
    wheel.schedule(id, forgotten_ms(collection, line))


def _ids(block: bytes, lines: list[bytes], opening: bytes) -> list[bytes] | None:
    """The ids of the *lines* of *block* when each begins with its id as plain text, else None."""
    if not block.startswith(opening) or block.count(b",\n" + opening) != len(lines) - 1:
        return None
    start = len(opening)
    try:
        ids = [line[start : line.index(b'"', start)] for line in lines]
    except ValueError:
        return None
    return None if b"\\" in b"".join(ids) else ids


def _slow_id(line: bytes, opening: bytes) -> str:
    field = opening[2:-3].decode()
    return str(orjson.loads(line)[field])


def _schedule_sessions(state: State, block: bytes, ids: list[str], lines: list[bytes], rules: Rules) -> None:
    """Put sessions into the wheel by the minute that their time begins with, without decoding them.

    The field name stands exactly once in each line when its count in the block equals that of the lines, since each
    has it at the top. Lines with a ttl of their own, or a time in another form, are decoded.
    """
    marker = re.escape(b'"%b":"' % rules.session_time_field.encode())
    minutes = re.findall(marker + _STAMP, block)
    wheel = state.session_wheel
    if len(minutes) != len(lines) or b"" in minutes or b'"ttl"' in block:
        for id, line in zip(ids, lines, strict=True):
            wheel.schedule(id, due_ms(line, rules))
        return
    by_minute: defaultdict[bytes, list[str]] = defaultdict(list)
    for id, minute in zip(ids, minutes, strict=True):
        by_minute[minute].append(id)
    ttl_minutes = rules.session_ttl_ms // MINUTE_MS
    for minute, members in by_minute.items():
        started_ms = parse_ms(minute.decode() + "Z")
        wheel.schedule_all(started_ms // MINUTE_MS + ttl_minutes, members)


def _foreign_line(collection: str, value: Any, rules: Rules, now_ms: int, *, bump_versions: bool) -> tuple[str, bytes]:
    """The id and record of *value*.

    Raises:
        TypeError, ValueError: it is no record of *collection*, or cannot be kept exactly.
    """
    if type(value) is not dict:
        raise TypeError("not an object")
    raw_header = value.pop(record.HEADER_KEY, None)
    if collection in _BOOKKEEPING:
        msgspec.convert(value, _BOOKKEEPING[collection])
    given = value.get(id_field_of(collection, rules))
    if isinstance(given, bool) or not isinstance(given, str | int) or given == "":
        raise ValueError("no id")
    if raw_header is not None:
        header = msgspec.convert(raw_header, record.Header)
        if bump_versions:
            header = msgspec.structs.replace(header, v=header.v + 1)
    else:
        # What is completed here was counted by whoever completed it.
        is_counted = collection == COMPLETED_ORDERS and value.get("status") != "cancelled"
        header = record.Header(at=None if collection == SESSIONS else now_ms, counted=is_counted)
        if collection in (ORDERS, COMPLETED_ORDERS) and not value.get("recipientPhone"):
            raise ValueError("no recipientPhone")
    if collection == SESSIONS:
        parse_ms(value[rules.session_time_field], rules.zone)
    return str(given), record.join_header(orjson.dumps(value), header)


def _time_of(collection: str, line: bytes, rules: Rules) -> int:
    """What decides between two records of one id: the newer one wins."""
    value = orjson.loads(line)
    field = rules.session_time_field if collection == SESSIONS else "updatedAt"
    try:
        return parse_ms(value[field], rules.zone)
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0
