"""JSON values as Holdfast keeps them: decoded without loss, or refused.

A value is kept in one canonical encoding (orjson: compact, UTF-8, shortest floats). What that encoding
cannot hold exactly is refused at the door rather than changed in silence: integers beyond 64 bits, numbers
beyond a double, NaN, lone surrogates, duplicate keys (CONTRACT section 1).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec
import orjson

from holdfast.errors import HoldfastError, InvalidJson, InvalidRecord, TooLarge

T = TypeVar("T")

# A compiled pattern finds it in half the time that ``in`` takes.
_NULL = re.compile(rb"null")
_NO_WORD = "Invalid enum value "
"""How msgspec begins when a field is none of the words that it may be."""

_MAYBE_LENIENT = re.compile(rb"NaN|Infinity|\\u[dD][89a-fA-F]")


class ValueLimits(msgspec.Struct, frozen=True):
    """How large one value may be.

    Attributes:
        bytes_max: of the canonical encoding.
        depth_max: of nested arrays and objects.
        keys_max: of all objects in the value together.
    """

    bytes_max: int = 1 << 20
    depth_max: int = 128
    keys_max: int = 10_000


DEFAULT_LIMITS = ValueLimits()


def encode(value: Mapping[str, Any], limits: ValueLimits = DEFAULT_LIMITS) -> bytes:
    """The canonical JSON of *value*.

    Raises:
        InvalidRecord: it holds what JSON, or this store, cannot keep exactly.
        TooLarge: above *limits*.
    """
    try:
        encoded = orjson.dumps(value)
    except TypeError as error:  # orjson.JSONEncodeError is a TypeError
        raise InvalidRecord(_reason(error)) from None
    if _NULL.search(encoded):
        # orjson writes NaN and the infinities as null; only a walk can tell them from None.
        _refuse_not_finite(value)
    # Each level takes two bytes at least, each key four: what is this short needs no closer look.
    size = len(encoded)
    if size > 2 * limits.depth_max or size > 4 * limits.keys_max or size > limits.bytes_max:
        check_limits(value, encoded, limits)
    return encoded


def check_limits(value: Any, encoded: bytes, limits: ValueLimits) -> None:
    """Refuse a value above its limits.

    The count of opening brackets bounds the depth from above, and the length the number of keys, at the price of one
    scan in C; only values with many of them are walked.

    Raises:
        TooLarge: more bytes, depth or keys than *limits* allow.
    """
    size = len(encoded)
    if size > limits.bytes_max:
        raise TooLarge(f"a record may have {limits.bytes_max} bytes, this one has {size}")
    if size - len(encoded.translate(None, b"{[")) > limits.depth_max or size > 4 * limits.keys_max:
        _check_shape(value, limits)


def decode_object(raw: bytes, limits: ValueLimits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The JSON object in *raw*, as a caller sent it.

    Raises:
        InvalidJson: not JSON.
        InvalidRecord: JSON, but not an object, or nothing that can be kept exactly.
        TooLarge: above *limits*.
    """
    value = _decode_exactly(raw, limits)
    if type(value) is not dict:
        raise InvalidRecord(f"expected a JSON object, found {_kind(value)}")
    return value


def decode_typed(raw: bytes, kind: type[T], limits: ValueLimits = DEFAULT_LIMITS) -> T:
    """The value of type *kind* in *raw*; numbers for Decimal fields are read from their text, never as floats.

    Raises:
        InvalidJson: not JSON.
        InvalidRecord: JSON, but not a *kind*; the message names the place.
        TooLarge: above *limits*.
    """
    _decode_exactly(raw, limits)
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRecord(_wrong(kind, str(error))) from None


def merge_patch(target: Any, patch: Mapping[str, Any]) -> dict[str, Any]:
    """*patch* merged into *target* by the rules of RFC 7396; neither is changed."""
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = merge_patch(merged.get(key), value)
        else:
            merged[key] = value
    return merged


def has_duplicate_keys(raw: bytes, canonical: bytes) -> bool:
    """Whether the JSON text *raw*, whose decoded value encodes as *canonical*, names a key twice.

    Without a backslash every quote in either text delimits a string, and a dropped duplicate takes at least
    two of them with it; only texts with escapes need a second, slower parse.
    """
    if b"\\" not in raw:
        return raw.count(b'"') != canonical.count(b'"')

    def refuse_twice(pairs: list[tuple[str, Any]]) -> None:
        if len({key for key, _ in pairs}) != len(pairs):
            raise _DuplicateKeyError

    try:
        json.loads(raw, object_pairs_hook=refuse_twice)
    except _DuplicateKeyError:
        return True
    return False


def _wrong(kind: Any, told: str) -> str:
    """*told*, why something is no *kind*; where it may be one of a few words, with these words."""
    # What was found may be long, and hold anything; where it was found cannot.
    found, _, place = told.rpartition(" - at ")
    if not found.startswith(_NO_WORD):
        return told
    name = place.strip("`").rpartition(".")[2]
    words = _words(kind, name)
    return (
        f"expected {name} to be one of {words}, found {found.removeprefix(_NO_WORD):.80} at {place}" if words else told
    )


@cache
def _words(kind: Any, name: str) -> str:
    """What the field *name* of a *kind*, or of what it holds, may be; empty when it is not one of a few words."""
    _, structs = msgspec.json.schema_components([kind])
    for struct in structs.values():
        field = struct.get("properties", {}).get(name, {})
        for choice in (field, *field.get("anyOf", ())):
            if "enum" in choice:
                return ", ".join(choice["enum"])
    return ""


class _DuplicateKeyError(Exception):
    pass


def _decode_exactly(raw: bytes, limits: ValueLimits) -> Any:
    try:
        value = msgspec.json.decode(raw)
        canonical = orjson.dumps(value)
    except msgspec.ValidationError as error:
        raise InvalidRecord(f"cannot be kept exactly: {error}") from None
    except msgspec.DecodeError as error:
        raise _malformed(raw, error) from None
    except UnicodeDecodeError:
        raise InvalidJson("not JSON: the text is not valid UTF-8") from None
    except RecursionError:
        raise InvalidRecord(f"nested deeper than the {limits.depth_max} levels allowed") from None
    except TypeError as error:
        raise InvalidRecord(_reason(error)) from None
    except ValueError as error:
        raise InvalidRecord(f"cannot be kept exactly: {error}") from None
    check_limits(value, canonical, limits)
    if has_duplicate_keys(raw, canonical):
        raise InvalidRecord("an object names the same key twice; only one of the values could be kept")
    return value


def _malformed(raw: bytes, error: msgspec.DecodeError) -> HoldfastError:
    """Tell JSON with values that cannot be kept (422) from what is no JSON at all (400)."""
    if _MAYBE_LENIENT.search(raw):
        try:
            json.loads(raw)
        except (ValueError, RecursionError):
            pass
        else:
            return InvalidRecord("NaN, Infinity and lone surrogates cannot be kept in JSON; send null or valid Unicode")
    return InvalidJson(f"not JSON: {error}")


def _reason(error: TypeError) -> str:
    text = str(error)
    if "Recursion" in text:
        return "nested too deep"
    if "64-bit" in text:
        return "an integer beyond 64 bits cannot be kept exactly; send it as a string"
    if "surrogates" in text:
        return "a lone surrogate is not text; send valid Unicode"
    return f"cannot be kept as JSON: {text}"


def _refuse_not_finite(value: Any) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRecord("NaN and the infinities cannot be kept in JSON; use None")
    elif isinstance(value, Mapping):
        for item in value.values():
            _refuse_not_finite(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_not_finite(item)


def _check_shape(value: Any, limits: ValueLimits) -> None:
    keys = 0
    level, depth = [value], 0
    while level:
        deeper: list[Any] = []
        is_container = False
        for item in level:
            if isinstance(item, Mapping):
                is_container = True
                keys += len(item)
                deeper.extend(item.values())
            elif isinstance(item, list | tuple):
                is_container = True
                deeper.extend(item)
        depth += is_container
        if depth > limits.depth_max:
            raise InvalidRecord(f"nested deeper than the {limits.depth_max} levels allowed")
        if keys > limits.keys_max:
            raise TooLarge(f"a record may have {limits.keys_max} keys, this one has more")
        level = deeper


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    return names.get(type(value), "null")
