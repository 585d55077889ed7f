"""JSON for people that carries a checksum of itself, in its last field."""

from __future__ import annotations

import hashlib
import re

import msgspec

_CHECKSUM = re.compile(rb'(?<=\n  "checksum": ")[0-9a-f]{64}(?="\n}\n$)')


def encode_signed(value: msgspec.Struct) -> bytes:
    """The JSON of *value*, indented, whose field ``checksum`` is the SHA-256 of all of it with nothing in that place."""
    bare = msgspec.structs.replace(value, checksum="")
    return indented(msgspec.structs.replace(bare, checksum=hashlib.sha256(indented(bare)).hexdigest()))


def is_whole(raw: bytes) -> bool:
    """Whether *raw* is as ``encode_signed`` made it: its bytes, whatever fields another version gives it."""
    found = _CHECKSUM.search(raw)
    return found is not None and hashlib.sha256(_CHECKSUM.sub(b"", raw)).hexdigest() == found[0].decode()


def indented(value: msgspec.Struct) -> bytes:
    """Its JSON as people read it."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
