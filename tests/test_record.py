"""The record: value and header in one bytes object, told apart again whatever the value holds."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import record
from holdfast.record import Header

HEADERS = [
    Header(),
    Header(v=1, at=5),
    Header(v=2),
    Header(v=2**53),
    Header(v=3, ttl=60_000),
    Header(v=1, ttl=1, at=2, counted=True),
    Header(v=7, at=1_795_000_000_000, counted=True),
]

TRAPS = [
    {"id": "1"},
    {"id": ',"_holdfast":{"v":9}}'},
    {"id": "1", "nested": {"a": 1, "_holdfast": {"v": 9}}},
    {"id": "1", "list": [{"b": 1, "_holdfast": {"v": 9, "ttl": 1}}]},
    {"id": "1", "end": {}},
    {"id": 'ñandú 💎 \\ "'},
]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("value", TRAPS)
def test_value_and_header_come_apart_again(value: dict[str, object], header: Header) -> None:
    """What was joined is told apart, byte for byte, and is one JSON object with the header as its last key."""
    encoded = orjson.dumps(value)

    line = record.join_header(encoded, header)

    assert record.value_of(line) == encoded
    assert record.split(line) == (encoded, header.v)
    assert record.header_of(line) == header
    assert record.version_of(line) == (header.v, header == Header(v=header.v))
    assert list(orjson.loads(line))[-1] == "_holdfast"


# Without the bounds nearly all the time goes into making values of a hundred leaves.
VALUES = st.recursive(
    st.text(max_size=20) | st.integers(-5, 5) | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=20), VALUES, min_size=1, max_size=6), st.integers(1, 2**53))
def test_any_value_comes_apart_again(value: dict[str, object], version: int) -> None:
    """The short way of joining is the long way's equal."""
    try:
        encoded = orjson.dumps(value)
    except TypeError:  # lone surrogates never become records
        return

    line = record.join(encoded, version)

    assert line == record.join_header(encoded, Header(v=version))
    assert record.split(line) == (encoded, version)
