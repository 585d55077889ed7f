"""Whatever stands in a file, reading it ends in data or in an error of ours, never in another one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from holdfast.core.sales import decode_sales, encode_sales
from holdfast.disk.files import Directory
from holdfast.disk.journal import encode_line, read_history, segment_name
from holdfast.disk.snapshot import Manifest, encode_manifest, read_manifest, salvage
from holdfast.errors import DataRefused
from holdfast.ops import OrderComplete, OrderPut, SessionLease, SessionPut
from tests.crash.harness import Recorder, reopened

FULL = os.environ.get("HOLDFAST_CRASH") == "full"
SEED = int(os.environ.get("HOLDFAST_CRASH_SEED", "20261121"))

fuzzed = settings(
    max_examples=20_000 if FULL else 200,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

EVENTS = b"".join(
    encode_line(b'{"seq":%d,"at":"2026-11-21T06:00:00.000Z","op":"stats.order"}' % n) for n in range(1, 9)
)
SNAPSHOT = (
    b'[\n{"recipientPhone":"57300","lastActivity":"2026-11-21T06:00:00.000Z","_holdfast":{"v":3}},\n{"id":1}\n]\n'
)
MANIFEST = encode_manifest(Manifest(holdfast="1", at="2026-11-21T06:00:00.000Z", snapshot_seq=7))
SALES = b'{"daily": [{"date": "2026-11-21", "totalOrders": 1, "totalRevenue": 0.1}], "totals": {"allTimeRevenue": 1e2}}'


def spoilt(original: bytes) -> st.SearchStrategy[bytes]:
    """Any bytes, or *original* cut, with something put in, or with a part of it repeated."""
    place = st.integers(0, len(original))
    return st.one_of(
        st.binary(max_size=400),
        st.builds(lambda at, end: original[:at] + original[end:], place, place),
        st.builds(lambda at, new: original[:at] + new + original[at:], place, st.binary(max_size=20)),
        st.builds(lambda at, new: original[:at] + new + original[at + len(new) :], place, st.binary(max_size=20)),
        st.builds(lambda at, end: original + original[min(at, end) : max(at, end)], place, place),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=15), inner, max_size=4),
        ).map(_json),
    )


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with Directory(tmp_path) as opened:
        yield opened


@seed(SEED)
@fuzzed
@given(raw=spoilt(EVENTS))
def test_journal(raw: bytes, directory: Directory) -> None:
    """Every event that is read holds by its checksum; what is no event is accounted for byte by byte."""
    (directory.path / segment_name(1)).write_bytes(raw)

    history = read_history(directory, 0)

    for line in history.lines:
        assert encode_line(line.payload).rstrip(b"\n") in raw
    read = sum(len(encode_line(line.payload)) for line in history.lines)
    assert read + sum(damage.bytes for damage in history.damages) + (history.torn.bytes if history.torn else 0) == len(
        raw
    )


@seed(SEED)
@fuzzed
@given(raw=spoilt(SNAPSHOT))
def test_salvage(raw: bytes) -> None:
    """What is salvaged can be kept exactly, or the file is whole; a damaged file has a reason."""
    found = salvage(raw)

    assert found.is_whole or found.reason
    for record in [] if found.is_whole else found.records:
        assert isinstance(record, dict)


@seed(SEED)
@fuzzed
@given(raw=spoilt(MANIFEST))
def test_manifest(raw: bytes, directory: Directory) -> None:
    """A manifest is believed whole or not at all."""
    (directory.path / "manifest.json").write_bytes(raw)
    try:
        manifest = read_manifest(directory, "manifest.json")
    except (ValueError, DataRefused):
        return

    assert raw == MANIFEST and manifest is not None and manifest.snapshot_seq == 7


@seed(SEED)
@fuzzed
@given(raw=spoilt(SALES))
def test_sales(raw: bytes) -> None:
    """Figures that are read can be written, and then read the same."""
    try:
        sales = decode_sales(raw)
    except (ValueError, msgspec.DecodeError):
        return

    assert encode_sales(decode_sales(encode_sales(sales))) == encode_sales(sales)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("chat_sessions.json", spoilt(SNAPSHOT)),
        ("pending_orders.json", spoilt(SNAPSHOT.replace(b"recipientPhone", b"odooOrderId"))),
        ("sales_stats.json", spoilt(SALES)),
        ("_leases.json", spoilt(b'[\n{"id":"1","generation":1,"until":1,"owner":null,"_holdfast":{"v":1}}\n]\n')),
        ("_keys.json", spoilt(b'[\n{"id":"k","op":"session.put","at":1,"status":200,"_holdfast":{"v":1}}\n]\n')),
        ("_counted.json", spoilt(b'[\n{"id":"1","completed":true,"_holdfast":{"v":1}}\n]\n')),
        ("manifest.next.json", spoilt(MANIFEST)),
        ("notes.json", spoilt(SNAPSHOT)),
    ],
)
def test_a_start(name: str, spoil: st.SearchStrategy[bytes], tmp_path: Path) -> None:
    """A start comes up, works, and stops, whatever one of its files holds."""
    count = [0]

    @seed(SEED)
    @settings(fuzzed, max_examples=2_000 if FULL else 15)
    @given(raw=spoil)
    def start(raw: bytes) -> None:
        count[0] += 1
        data_dir = tmp_path / str(count[0])
        data_dir.mkdir(mode=0o700)
        (data_dir / name).write_bytes(raw)

        engine = reopened(data_dir, Recorder())

        engine.submit(SessionPut(id="57300", value={"n": 1}, idempotency_key="key")).wait()
        engine.submit(SessionLease(id="57301")).wait()
        engine.submit(OrderPut(id="new", value={})).wait()
        engine.submit(OrderComplete(id="new")).wait()
        engine.expire()
        for collection in ("sessions", "orders", "users", "notes"):
            for record in engine.page(collection, limit=1000).items:
                orjson.loads(record.value)
        engine.sales()
        engine.close()
        again = reopened(data_dir, Recorder())
        assert again.degraded == []
        again.close()

    start()
