"""Values: kept exactly, or refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import HoldfastError, InvalidJson, InvalidRecord, TooLarge
from holdfast.ops import Batch, OrderComplete
from holdfast.values import ValueLimits, decode_object, decode_typed, encode, merge_patch

KEPT = [
    b'{"a":9223372036854775807,"b":-9223372036854775808,"c":18446744073709551615}',
    b'{"a":0.1,"b":1e308,"c":5e-324,"d":-0.0}',
    '{"ñ":"日本 💎","":"","a\\"b":"\\\\"}'.encode(),
    b'{"a":[null,true,false,{},[],[[]]]}',
    b'{"a":"\\u0000\\u001f"}',
]
REFUSED = [
    (b"", InvalidJson),
    (b"{", InvalidJson),
    (b"nope", InvalidJson),
    (b"{'a':1}", InvalidJson),
    (b'{"a":01}', InvalidJson),
    (b'{"a":1,}', InvalidJson),
    (b'{"a":"\xff"}', InvalidJson),
    (b'\xef\xbb\xbf{"a":1}', InvalidJson),
    (b'{"a":"\n"}', InvalidJson),
    (b"[]", InvalidRecord),
    (b"null", InvalidRecord),
    (b'"a"', InvalidRecord),
    (b'{"a":18446744073709551616}', InvalidRecord),
    (b'{"a":-9223372036854775809}', InvalidRecord),
    (b'{"a":1e400}', InvalidRecord),
    (b'{"a":NaN}', InvalidRecord),
    (b'{"a":-Infinity}', InvalidRecord),
    (b'{"a":"\\ud800"}', InvalidRecord),
    (b'{"a":1,"a":1}', InvalidRecord),
    (b'{"a":1,"\\u0061":2}', InvalidRecord),
    (b'{"x":{"a":"\\"","a":2}}', InvalidRecord),
    (b'{"a":' * 200 + b"1" + b"}" * 200, InvalidRecord),
    (b"[" * 200_000, HoldfastError),
    (b'{"a":' * 200_000, HoldfastError),
]


@pytest.mark.parametrize("raw", KEPT)
def test_what_can_be_kept_is_kept_exactly(raw: bytes) -> None:
    """Decoding and encoding lose nothing."""
    value = decode_object(raw)

    assert orjson.loads(encode(value)) == orjson.loads(raw) == value


@pytest.mark.parametrize(("raw", "error"), REFUSED, ids=[str(raw[:24]) for raw, _ in REFUSED])
def test_what_cannot_be_kept_is_refused(raw: bytes, error: type[HoldfastError]) -> None:
    """Malformed text and values that no encoding of ours holds get their own errors, never a changed value."""
    with pytest.raises(error):
        decode_object(raw)


@pytest.mark.parametrize(
    "value",
    [
        {"a": math.nan},
        {"a": [{"b": (1, math.inf)}]},
        {"a": None, "b": -math.inf},
        {"a": 2**64},
        {"a": "\ud800"},
        {"\ud800": 1},
        {1: 2},
        {"a": object()},
        {"a": b"bytes"},
        {"a": {1, 2}},
    ],
)
def test_python_values_that_are_no_json_are_refused(value: dict[Any, Any]) -> None:
    """An embedded caller gets the same refusals as a remote one."""
    with pytest.raises(InvalidRecord):
        encode(value)


def test_none_is_not_mistaken_for_nan() -> None:
    """null stands where None stood."""
    assert encode({"a": None, "b": [None, None]}) == b'{"a":null,"b":[null,null]}'


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("limits", "below", "above", "error"),
    [
        (ValueLimits(bytes_max=10), {"a": "1234"[:2]}, {"a": "12345"}, TooLarge),
        (ValueLimits(depth_max=5), nested(5), nested(6), InvalidRecord),
        (ValueLimits(depth_max=5), {"a": [[[[]]]]}, {"a": [[[[[]]]]]}, InvalidRecord),
        (ValueLimits(depth_max=2), {"a": [], "b": [], "c": {}}, {"a": [[]]}, InvalidRecord),
        (ValueLimits(keys_max=3), {"a": {"b": 1, "c": '":":":'}}, {"a": {"b": 1, "c": {"d": 1}}}, TooLarge),
    ],
)
def test_limits_hold_at_the_edge(
    limits: ValueLimits, below: dict[str, Any], above: dict[str, Any], error: type[HoldfastError]
) -> None:
    """The largest value is kept, the next larger one refused, from Python and from JSON alike."""
    encode(below, limits)
    decode_object(orjson.dumps(below), limits)
    for attempt in (lambda: encode(above, limits), lambda: decode_object(orjson.dumps(above), limits)):
        with pytest.raises(error):
            attempt()


def test_money_is_read_from_its_digits() -> None:
    """A number for a Decimal field never passes through a float."""
    raw = b'{"op":"order.complete","id":"1","revenue":0.1000000000000000055}'

    op = decode_typed(raw, OrderComplete)

    assert str(op.revenue) == "0.1000000000000000055"


def test_a_wrong_type_names_its_place() -> None:
    """The message says which field."""
    with pytest.raises(InvalidRecord, match=r"\$\.id"):
        decode_typed(b'{"op":"order.complete","id":5}', OrderComplete)


def test_a_wrong_word_is_told_with_the_right_ones() -> None:
    """Where only a few words will do, the error names them beside the one that was found and its place."""
    for raw, expected, found in (
        ('{"op":"message.append","id":"a","role":"boss"}', "role to be one of assistant, system, tool, user", "'boss'"),
        ('{"op":"message.append","id":"a","author":"bö`t"}', "author to be one of agent, bot, customer", "'bö`t'"),
        ('{"op":"escalation.open","id":"a","reason":"r","priority":""}', "priority to be one of high, low", "''"),
        (
            '{"op":"message.append","id":"a","messages":[{"role":"x"}]}',
            "role to be one of",
            "'x' at `$.ops[0].messages[0].role`",
        ),
    ):
        with pytest.raises(InvalidRecord) as refused:
            decode_typed(f'{{"ops":[{raw}]}}'.encode(), Batch)

        assert expected in refused.value.detail
        assert found in refused.value.detail


MERGES = [  # the table of RFC 7396, appendix A, as far as targets are objects
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "expected"), MERGES)
def test_merge_patch_follows_the_rfc(target: Any, patch: dict[str, Any], expected: dict[str, Any]) -> None:
    """RFC 7396, and neither argument is changed."""
    before = msgspec.json.encode([target, patch])

    assert merge_patch(target, patch) == expected
    assert msgspec.json.encode([target, patch]) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)  # fmt: skip


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_any_json_object_survives(value: dict[str, Any]) -> None:
    """Whatever JSON can say within the limits comes back equal, through either door."""
    try:
        raw = orjson.dumps(value)
    except TypeError:
        with pytest.raises(InvalidRecord):
            encode(value)
        return

    assert decode_object(raw) == value
    assert encode(value) == raw
