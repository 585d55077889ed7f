"""One stored record, which is at the same time its line in the snapshot file.

A record is a single ``bytes`` object: the value's canonical JSON with one more key at its end, the header::

    {"recipientPhone":"573001234567","lastActivity":"2026-11-21T06:00:00.000Z","_holdfast":{"v":3}}

So a flush is a join, loading is a split, and reading cuts the header off; nothing is decoded that nobody looks
at. The header is written only here and holds numbers and booleans only, so the last opening brace of a record is
its header's, whatever the value contains.

A value is never an empty object: it holds at least its id, so the comma is always right.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

HEADER_KEY = "_holdfast"
"""Reserved as a key of records; values that bring their own are refused."""

_MARK = b',"_holdfast":{'
_BEFORE_BRACE = len(_MARK) - 1
_VERSION_AT = len(b'{"v":')


def _ending(version: int) -> bytes:
    return b',"_holdfast":{"v":%d}}' % version


# Looking short numbers up takes a third of the time that writing or parsing them does.
_SMALL_ENDINGS = {version: _ending(version) for version in range(1, 1000)}
_SMALL_VERSIONS = {b"%d" % version: version for version in range(1, 1000)}

_VERSION_MAX = 2**53
"""What an edited header may say: exact in every JSON reader, and too far from 64 bits to count up to them."""


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """What Holdfast knows about a record beside its value.

    Attributes:
        v: version, counted from 1.
        ttl: a session's own idle time in ms; None means the setting's.
        at: when it was last changed, ms since 1970; absent for sessions, which carry ``lastActivity``.
        counted: the completion of this order is in the sales statistics.
        born: the event with which this conversation began; its id may have had one before it.
    """

    v: Annotated[int, msgspec.Meta(ge=1, le=_VERSION_MAX)] = 1
    ttl: int | None = None
    at: int | None = None
    counted: bool = False
    born: int = 0


_encode_header = msgspec.json.Encoder().encode
_decode_header = msgspec.json.Decoder(Header).decode


def join(value: bytes, version: int) -> bytes:
    """The record of *value* with a header that holds nothing but its version; the hot path."""
    ending = _SMALL_ENDINGS.get(version) or _ending(version)
    return value[:-1] + ending


def join_header(value: bytes, header: Header) -> bytes:
    """The record of *value* with the whole *header*."""
    if header.v == 1:  # omitted as a default by the encoder, but every record shows its version
        rest = _encode_header(header)[1:-1]
        return b'%b,"_holdfast":{"v":1%b%b}}' % (value[:-1], b"," if rest else b"", rest)
    return b'%b,"_holdfast":%b}' % (value[:-1], _encode_header(header))


def value_of(record: bytes) -> bytes:
    """The value as it was stored: canonical JSON without the header."""
    return record[: record.rindex(b"{") - _BEFORE_BRACE] + b"}"


def version_of(record: bytes) -> tuple[int, bool]:
    """The record's version, and whether its header holds nothing else."""
    digits = record[record.rindex(b"{") + _VERSION_AT : -2]
    version = _SMALL_VERSIONS.get(digits)
    if version is not None:
        return version, True
    return int(digits.split(b",", 1)[0]), digits.isdigit()


def split(record: bytes) -> tuple[bytes, int]:
    """Value and version at once; the hot path of reading."""
    brace = record.rindex(b"{")
    digits = record[brace + _VERSION_AT : -2]
    version = _SMALL_VERSIONS.get(digits) or int(digits.split(b",", 1)[0])
    return record[: brace - _BEFORE_BRACE] + b"}", version


def header_of(record: bytes) -> Header:
    """The whole header."""
    return _decode_header(record[record.rindex(b"{") : -1])
