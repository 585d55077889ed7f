"""What ``/metrics`` says, on real services and engines."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from holdfast.clock import Clock
from holdfast.engine import Engine
from holdfast.errors import HoldfastError, StorageFull
from holdfast.http.app import HttpService
from holdfast.http.auth import TokenStore
from holdfast.measures import Histogram
from holdfast.ops import Batch, OrderPut, RecordPut, SessionDelete, SessionPut, SessionTouch
from holdfast.service.logging import LineWriter
from tests.engine_harness import ANSWER_S, NOW_MS, Disk, HandClock, do, do_together, running
from tests.http_harness import Operator, Served, serve_and

ROOT = Path(__file__).parent.parent
RULES = ROOT / "systemd" / "holdfast.rules.yml"
OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"}
PHONE = "573001234567"
NONE_SUCH = -1.0


class Scrape:
    """The samples of one scrape."""

    def __init__(self, body: bytes) -> None:
        self.families = list(parse_text(body.decode()))
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """Of ``holdfast_NAME`` with exactly these labels; NONE_SUCH when there is none."""
        return self.samples.get((f"holdfast_{name}", frozenset(labels.items())), NONE_SUCH)

    def labels(self, name: str, label: str) -> set[str]:
        """The values that *label* has in ``holdfast_NAME``."""
        return {dict(labels)[label] for found, labels in self.samples if found == f"holdfast_{name}"}


def scraper_of(engine: Engine) -> Callable[[], Scrape]:
    """Scrapes *engine* by way of a service that listens nowhere."""
    service = HttpService(engine, engine.settings, readiness=dict, admin=Operator(engine))
    return lambda: Scrape(service.scrape("").body)


async def scraped(served: Served) -> Scrape:
    answer = await served.ask("GET", "/metrics")
    assert answer.status == 200
    return Scrape(answer.body)


def put(id: str = PHONE, **chosen: Any) -> SessionPut:
    return SessionPut(id=id, value={}, **chosen)


# Form.


def test_every_metric_says_what_it_is(tmp_path: Path) -> None:
    """HELP, a TYPE and at least one sample stand for each, once, and names follow the conventions of Prometheus."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", f"/v1/sessions/{PHONE}", {})
        await served.ask("POST", "/v1/admin/flush")
        await served.ask("GET", "/nowhere")
        served.engine.follow("archive", lambda: 0)
        answer = await served.ask("GET", "/metrics")
        text = answer.body.decode()
        families = Scrape(answer.body).families

        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert len(families) > 40
        for family in families:
            assert family.documentation and family.type != "unknown" and family.samples, family.name
            assert re.fullmatch(r"(holdfast|process|python)_[a-z_]+", family.name)
            if family.name.startswith("holdfast"):
                assert family.documentation.endswith("."), family.name
                assert not re.search(r"_(ms|us|milliseconds|minutes|kb|mb|kib|mib|percent)\b", family.name)
        helps = re.findall(r"^# HELP (\S+)", text, re.M)
        assert len(helps) == len(set(helps))

    serve_and(scenario, tmp_path)


def test_openmetrics_is_served_to_who_asks_for_it(tmp_path: Path) -> None:
    """A strict parser of it finds nothing wrong: no name that is another with a suffix, no bucket out of order."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", f"/v1/sessions/{PHONE}", {})
        await served.ask("POST", "/v1/admin/flush")
        answer = await served.ask("GET", "/metrics", headers=OPENMETRICS)
        names = [family.name for family in parse_openmetrics(answer.body.decode())]

        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        assert "holdfast_ops" in names and "holdfast_durable_latency_seconds" in names
        assert len(names) == len(set(names))

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=x",
        "application/openmetrics-text; version=1.0.0\xff; escaping=allow-utf-8",
        "application/openmetrics-text; version=99999999999.1; charset=x, text/plain; version=-1; escaping=?",
        "text/plain; version=1.0.0.0.0.0; escaping=<script>",
        ",;=,;=" * 500,
    ],
)
def test_an_odd_accept_header_is_answered_and_not_repeated(tmp_path: Path, accept: str) -> None:
    """No version that a client makes up is an error of ours, nor sent back to it."""

    async def scenario(served: Served) -> None:
        answer = await served.ask("GET", "/metrics", headers={"Accept": accept})

        assert answer.status == 200
        assert re.fullmatch(
            r"text/plain; version=0\.0\.4; charset=utf-8|application/openmetrics-text; version=1\.0\.0; [a-z0-9=;-]+( escaping=underscores)?",
            answer.headers["Content-Type"],
        )

    serve_and(scenario, tmp_path)


def test_a_scrape_is_compressed_on_request_and_has_a_head(tmp_path: Path) -> None:
    """As every reply; an unknown parameter is refused as everywhere."""

    async def scenario(served: Served) -> None:
        packed = await served.ask("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
        head = await served.ask("HEAD", "/metrics")
        odd = await served.ask("GET", "/metrics?name=x")
        posted = await served.ask("POST", "/metrics", {})

        assert packed.headers["Content-Encoding"] == "gzip"
        assert Scrape(gzip.decompress(packed.body)).value("durable_seq") == 0
        assert (head.status, head.body) == (200, b"")
        assert (odd.status, posted.status) == (400, 405)

    serve_and(scenario, tmp_path)


def test_a_scrape_over_tcp_wants_a_token_and_a_read_token_will_do(tmp_path: Path) -> None:
    """Counts of customers and orders are nobody's business."""

    async def scenario(served: Served) -> None:
        store = TokenStore(tmp_path)
        store.load()
        token = store.create("prometheus", "read")
        await asyncio.sleep(0.6)  # the service looks at its token files a few times a second
        without = await served.ask("GET", "/metrics", by_tcp=True)
        with_token = await served.ask("GET", "/metrics", headers={"Authorization": f"Bearer {token}"}, by_tcp=True)

        assert (without.status, with_token.status) == (401, 200)
        assert Scrape(with_token.body).value("http_problems_total", code="unauthorized") == 1

    serve_and(scenario, tmp_path)


def test_before_the_data_is_loaded_there_is_nothing_to_scrape(tmp_path: Path) -> None:
    """503 like every other path, so that a start of minutes shows as not up."""

    async def scenario(served: Served) -> None:
        engine = served.service._engine
        served.service._engine = None
        answer = await served.ask("GET", "/metrics")
        served.service._engine = engine

        assert answer.status == 503
        assert (await served.ask("GET", "/metrics")).status == 200

    serve_and(scenario, tmp_path)


def test_the_library_is_loaded_by_the_first_scrape_only() -> None:
    """Neither the library, the command line nor the daemon pays for it before."""
    script = (
        "import sys, holdfast, holdfast.cli.main, holdfast.service.daemon; print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=ANSWER_S * 3)

    assert done.stdout.strip() == "False", done.stderr


# Ops and the journal.


def test_ops_count_by_kind_and_result(tmp_path: Path) -> None:
    """Each once, alone, in a batch or in an atomic one; a repeat counts as done; of a refused atomic batch the op at
    fault counts."""
    with running(tmp_path) as engine:
        scrape = scraper_of(engine)
        before = scrape()
        do(engine, put())
        do(engine, put(idempotency_key="k"))
        do(engine, put(idempotency_key="k"))
        with pytest.raises(HoldfastError):
            do(engine, put(if_version=9))
        engine.submit_batch(Batch(ops=[put("1"), SessionTouch(id="absent"), SessionDelete(id="1")])).wait(ANSWER_S)
        do_together(engine, put("2"), OrderPut(id="7", value={"recipientPhone": "1"}), SessionTouch(id="2"))
        with pytest.raises(HoldfastError):
            do_together(engine, put("3"), SessionTouch(id="absent"), put("4"))
        after = scrape()

    assert before.value("ops_total", op="session.put", result="ok") == 0
    assert after.value("ops_total", op="session.put", result="ok") == 5
    assert after.value("ops_total", op="session.put", result="version_mismatch") == 1
    assert after.value("ops_total", op="session.touch", result="ok") == 1
    assert after.value("ops_total", op="session.touch", result="not_found") == 2
    assert after.value("ops_total", op="session.delete", result="ok") == 1
    assert after.value("ops_total", op="order.put", result="ok") == 1
    assert after.value("records", collection="sessions") == 2
    assert after.value("idempotency_keys") == 1


def test_group_commits_and_their_latency_are_measured(tmp_path: Path) -> None:
    """Every event counts in the latency histogram, every write in the two of sizes, every sync in its own."""
    with running(tmp_path) as engine:
        scrape = scraper_of(engine)
        for _ in range(3):
            do(engine, put())
        alone = scrape()
        engine.submit_batch(Batch(ops=[put(str(number)) for number in range(500)])).wait(ANSWER_S)
        together = scrape()

    assert alone.value("commit_events_count") == alone.value("journal_sync_seconds_count") == 3
    assert alone.value("durable_latency_seconds_count") == 3
    assert together.value("durable_latency_seconds_count") == 503
    assert together.value("commit_events_sum") == 503
    assert together.value("commit_events_bucket", le="1.0") == 3
    assert together.value("commit_bytes_sum") == together.value("journal_bytes")
    assert together.value("decided_seq") == together.value("durable_seq") == 503


def test_a_slow_sync_shows_in_its_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk takes, and what the caller waits, both at least as long as it was."""
    disk = Disk(monkeypatch)
    disk.before_sync = lambda: time.sleep(0.06)
    with running(tmp_path, clock=Clock()) as engine:
        do(engine, put())
        after = scraper_of(engine)()

    for name in ("journal_sync_seconds", "durable_latency_seconds"):
        assert after.value(f"{name}_bucket", le="0.05") == 0
        assert after.value(f"{name}_bucket", le="+Inf") == 1
        assert after.value(f"{name}_sum") > 0.06


def test_a_full_disk_counts_what_it_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decided and then undone was never ok; counters do not fall; the reason shows until there is room."""
    disk = Disk(monkeypatch)
    with running(tmp_path) as engine:
        scrape = scraper_of(engine)
        do(engine, put("1"))
        disk.fill()
        with pytest.raises(StorageFull):
            engine.submit_batch(Batch(ops=[put("2"), put("3"), SessionDelete(id="1")])).wait(ANSWER_S)
        full = scrape()
        disk.free()
        do(engine, put("4"))
        after = scrape()

    assert full.value("ops_total", op="session.put", result="ok") == 1
    assert full.value("ops_total", op="session.put", result="storage_full") == 2
    assert full.value("ops_total", op="session.delete", result="ok") == 0
    assert full.value("ops_total", op="session.delete", result="storage_full") == 1
    assert full.value("degraded", reason="disk_full") == 1
    assert full.value("records", collection="sessions") == 1
    assert after.value("ops_total", op="session.put", result="ok") == 2
    assert after.value("ops_total", op="session.put", result="storage_full") == 2
    assert after.value("degraded", reason="disk_full") == 0


def test_ops_kept_in_memory_count_at_once_and_survive_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Acknowledged under interval is done; what waits for the flush shows as deferred."""
    disk = Disk(monkeypatch)
    with running(tmp_path, durability="interval") as engine:
        scrape = scraper_of(engine)
        do(engine, put("1"))
        kept = scrape()
        disk.fill()
        with pytest.raises(StorageFull):
            do(engine, put("2"), durability="always")
        full = scrape()
        disk.free()
        engine.flush("api")
        flushed = scrape()

    assert kept.value("ops_total", op="session.put", result="ok") == 1
    assert kept.value("journal_deferred_bytes") > 0
    assert full.value("ops_total", op="session.put", result="ok") == 1
    assert full.value("ops_total", op="session.put", result="storage_full") == 1
    assert flushed.value("journal_deferred_bytes") == 0
    assert flushed.value("durable_latency_seconds_count") == 0


# Flushes.


def test_a_flush_moves_what_it_should(tmp_path: Path) -> None:
    """Its count, seconds, bytes and time; the snapshot catches up, and nothing is unflushed."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        scrape = scraper_of(engine)
        do(engine, put())
        clock.advance(40)
        do(engine, put())
        before = scrape()
        engine.flush("signal")
        after = scrape()
        clock.advance(5)
        do(engine, put())
        clock.advance(7)
        later = scrape()

    assert before.value("unflushed_age_seconds") == 40
    assert before.value("last_flush_timestamp_seconds") == NOW_MS / 1000
    assert before.value("snapshot_seq") == 0
    assert after.value("unflushed_age_seconds") == 0
    assert after.value("flushes_total", reason="signal", result="ok") == 1
    assert after.value("flush_seconds_count") == 1
    assert after.value("journal_sync_seconds_count") == 2  # it found nothing that was not synced
    assert after.value("flushed_bytes_total") == after.value("snapshot_bytes") > 0
    assert after.value("last_flush_timestamp_seconds") == NOW_MS / 1000 + 40
    assert after.value("last_flush_succeeded") == 1
    assert after.value("snapshot_seq") == after.value("decided_seq") == 2
    assert later.value("unflushed_age_seconds") == 7


def test_a_flush_that_fails_leaves_everything_unflushed(tmp_path: Path) -> None:
    """It counts as failed, and the age goes on from the oldest event, however often it is tried."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        scrape = scraper_of(engine)
        do(engine, put())
        in_the_way = tmp_path / f".chat_sessions.json.{os.getpid()}.tmp"
        in_the_way.mkdir()
        (in_the_way / "x").touch()
        for _ in range(2):
            clock.advance(10)
            do(engine, put())
            with pytest.raises(OSError):
                engine.flush("interval")
        failed = scrape()
        shutil.rmtree(in_the_way)
        engine.flush("interval")
        mended = scrape()

    assert failed.value("flushes_total", reason="interval", result="failed") == 2
    assert failed.value("last_flush_succeeded") == 0
    assert failed.value("degraded", reason="flush_failed") == 1
    assert failed.value("unflushed_age_seconds") == 20
    assert mended.value("last_flush_succeeded") == 1
    assert mended.value("degraded", reason="flush_failed") == 0
    assert mended.value("unflushed_age_seconds") == 0
    assert mended.value("flushes_total", reason="interval", result="ok") == 1


def test_the_time_of_the_last_flush_survives_a_restart(tmp_path: Path) -> None:
    """It is that of the files; events that were replayed are unflushed from the start on."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        do(engine, put())
        engine.flush("api")
        do(engine, put())
    clock.advance(3600)
    with running(tmp_path, clock=clock) as engine:
        clock.advance(60)
        after = scraper_of(engine)()

    assert after.value("last_flush_timestamp_seconds") == NOW_MS / 1000
    assert after.value("unflushed_age_seconds") == 60
    assert after.value("start_time_seconds") == pytest.approx(time.time() - 60, abs=5)


# What there is.


def test_expired_sessions_are_counted(tmp_path: Path) -> None:
    """All of them, however many events they took."""
    clock = HandClock()
    with running(tmp_path, clock=clock) as engine:
        scrape = scraper_of(engine)
        engine.submit_batch(Batch(ops=[put(str(number)) for number in range(1500)])).wait(ANSWER_S)
        clock.advance(25 * 3600)
        engine.expire()
        after = scrape()

    assert after.value("sessions_expired_total") == 1500
    assert after.value("records", collection="sessions") == 0


def test_collections_beyond_the_hundredth_are_counted_together(tmp_path: Path) -> None:
    """Clients name collections, and must not be able to fill the memory of whoever scrapes; one that is called other
    is not mistaken for the rest."""
    with running(tmp_path) as engine:
        scrape = scraper_of(engine)
        names = ["other", *(f"c{number}" for number in range(129))]
        ops = [RecordPut(collection=name, id=str(turn), value={}) for name in names for turn in range(2)]
        engine.submit_batch(Batch(ops=ops)).wait(ANSWER_S)
        after = scrape()
        engine.submit_batch(Batch(ops=[RecordPut(collection="c128", id="9", value={})])).wait(ANSWER_S)
        later = scrape()

    labels = after.labels("records", "collection")
    assert labels == {
        "sessions",
        "orders",
        "completed_orders",
        "users",
        "conversations",
        "escalations",
        *names[:100],
        "(other)",
    }
    assert after.value("records", collection="other") == 2
    assert after.value("records", collection="(other)") == 60
    assert later.value("records", collection="(other)") == 61
    assert later.labels("records", "collection") == labels


def test_followers_are_told_apart_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slowest of each kind, also when the journal has given up waiting for it, and how many there are; streams
    that come and go leave no series behind."""
    monkeypatch.setattr("holdfast.feed.HOLD_S", 0.0)
    with running(tmp_path) as engine:
        scrape = scraper_of(engine)
        engine.follow("replica", lambda: 2)
        readers = [engine.feed.open(after=0) for _ in range(3)]
        for number in range(5):
            do(engine, put(str(number)))
        readers[0].read()
        behind = scrape()
        for reader in readers:
            reader.read()
        caught_up = scrape()
        for reader in readers:
            reader.close()
        gone = scrape()

    assert behind.labels("follower_lag_events", "follower") == {"archive", "replica", "events"}
    assert behind.value("follower_lag_events", follower="replica") == 3
    assert behind.value("follower_lag_events", follower="events") == 5
    assert behind.value("followers", follower="events") == 3
    assert caught_up.value("follower_lag_events", follower="events") == 0
    assert gone.labels("followers", "follower") == {"archive", "replica"}


def test_a_flood_of_kinds_of_followers_is_bounded(tmp_path: Path) -> None:
    """Names without a kind, or of too many kinds, share one."""
    with running(tmp_path) as engine:
        for number in range(30):
            engine.follow("x" * (number + 1), lambda: 0)
        engine.follow('57300 "\n\\', lambda: 0)
        after = scraper_of(engine)()

    assert len(after.labels("followers", "follower")) == 21
    assert after.value("followers", follower="(other)") == 12


def test_damage_found_at_the_start_shows(tmp_path: Path) -> None:
    """As a reason of its own, with a label that is not the text of the damage."""
    with running(tmp_path) as engine:
        do(engine, put())
        engine.flush("api")
    (tmp_path / "chat_sessions.json").write_bytes(b"[\n\x00\x00\x00")
    with running(tmp_path) as engine:
        after = scraper_of(engine)()

    assert after.labels("degraded", "reason") == {"disk_full", "flush_failed", "archive_stalled", "damage"}
    assert after.value("degraded", reason="damage") == 1


def test_room_on_the_disk_is_that_of_the_data_directory(tmp_path: Path) -> None:
    """For users other than root."""
    with running(tmp_path) as engine:
        after = scraper_of(engine)()
    usage = shutil.disk_usage(tmp_path)

    assert after.value("disk_size_bytes") == usage.total
    assert after.value("disk_free_bytes") == pytest.approx(usage.free, rel=0.05)


# HTTP and the process.


def test_requests_and_errors_are_counted(tmp_path: Path) -> None:
    """By status, and by the code of the error, also those refused before there is a request."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", f"/v1/sessions/{PHONE}", {})
        await served.ask("PUT", f"/v1/sessions/{PHONE}", body=b"{")
        await served.ask("GET", "/v1/sessions/absent")
        await served.send_raw(b"\x00\x01 nonsense\r\n\r\n")
        await served.send_raw(b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\n\r\n")
        after = await scraped(served)

        assert after.value("http_responses_total", status="201") == 1
        assert after.value("http_responses_total", status="404") == 1
        assert after.value("http_responses_total", status="400") == 2
        assert after.value("http_responses_total", status="431") == 1
        assert after.value("http_problems_total", code="not_found") == 1
        assert after.value("http_problems_total", code="invalid_json") == 1
        assert after.value("http_problems_total", code="bad_request") == 1
        assert after.value("http_problems_total", code="too_large") == 1

    serve_and(scenario, tmp_path)


def test_connections_are_counted_and_so_are_those_turned_away(tmp_path: Path) -> None:
    """Open, allowed, taken, refused."""

    async def scenario(served: Served) -> None:
        _, held = await served.connect()
        before = await scraped(served)
        reader, writer = await served.connect()
        refused = await asyncio.wait_for(reader.read(), ANSWER_S)
        writer.close()
        after = await scraped(served)
        held.close()

        assert refused.startswith(b"HTTP/1.1 503")
        assert before.value("http_connections") == before.value("http_connections_max") == 2
        assert after.value("http_connections_accepted_total") == 2
        assert after.value("http_connections_refused_total") == 1
        assert after.value("http_problems_total", code="unavailable") == 1

    serve_and(scenario, tmp_path, connections=2)


def test_clients_cannot_make_series(tmp_path: Path) -> None:
    """Whatever methods, paths, headers, ids and names they think of: what is not ours is not a label."""

    async def scenario(served: Served) -> None:
        async def everything_odd(mark: str) -> None:
            for path in (f"/{mark}", f"/v1/{mark}", f"/v1/sessions/{mark}", f"/v1/collections/{mark}%22%0A/1"):
                await served.ask("PUT", path, {"a": mark})
                await served.ask("GET", f"{path}?{mark}={mark}")
            await served.ask("POST", "/v1/batch", {"ops": [{"op": mark, "id": mark}]})
            await served.ask(f"X{mark}", "/metrics")
            await served.send_raw(f"{mark} / HTTP/9.9\r\n\r\n".encode())
            await served.ask("GET", "/metrics", headers={"Authorization": mark, "Accept": mark}, by_tcp=True)

        await scraped(served)
        await everything_odd("A0")
        first = await scraped(served)
        for number in range(1, 10):
            await everything_odd(f"A{number}")
        last = await scraped(served)

        assert set(last.samples) == set(first.samples)
        assert last.value("http_responses_total", status="401") == 10

    serve_and(scenario, tmp_path)


def test_a_blocked_event_loop_shows(tmp_path: Path) -> None:
    """By how long a timer was late."""

    async def scenario(served: Served) -> None:
        await asyncio.sleep(0.05)
        time.sleep(0.5)  # noqa: ASYNC251  # that is what is measured
        await asyncio.sleep(0.05)
        after = await scraped(served)

        late = after.value("event_loop_lag_seconds_count") - after.value("event_loop_lag_seconds_bucket", le="0.1")
        assert late == 1
        assert after.value("event_loop_lag_seconds_sum") > 0.2

    serve_and(scenario, tmp_path)


def test_dropped_log_lines_count_once(tmp_path: Path) -> None:
    """However often the line that reports them is dropped in turn."""
    reading, writing = os.pipe()
    gone, broken = os.pipe()
    os.close(gone)
    fd = os.dup(broken)
    reported: list[int] = []

    def report(count: int) -> bytes:
        reported.append(count)
        os.dup2(broken, fd)
        return b"lines are missing\n"

    writer = LineWriter(fd, report)
    for stream in (broken, broken, writing, writing):
        os.dup2(stream, fd)
        writer.put(b"line\n")
        assert writer.drain(ANSWER_S)
    with running(tmp_path) as engine:
        service = HttpService(
            engine,
            engine.settings,
            readiness=dict,
            admin=Operator(engine),
            lines_dropped=lambda: writer.dropped_total,
        )
        after = Scrape(service.scrape("").body)
    for one in (reading, writing, broken, fd):
        os.close(one)

    assert reported == [2, 2]
    assert after.value("log_lines_dropped_total") == 2


def test_scrapes_beside_ops_are_whole(tmp_path: Path) -> None:
    """While four threads write, no counter falls, no histogram contradicts itself, and at the end all is counted."""
    each, threads = 400, 4
    with running(tmp_path, clock=Clock()) as engine:
        scrape = scraper_of(engine)
        scrapes = [scrape()]

        def write(turn: int) -> None:
            for number in range(each):
                with contextlib.suppress(HoldfastError):
                    do(engine, put(f"{turn}-{number}", if_version=0 if number % 2 else 7))

        writers = [threading.Thread(target=write, args=(turn,)) for turn in range(threads)]
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            scrapes.append(scrape())
        scrapes.append(scrape())

    for before, after in itertools.pairwise(scrapes):
        for key, value in before.samples.items():
            if key[0].startswith("holdfast_") and key[0].endswith(("_total", "_count", "_bucket", "_seq")):
                assert after.samples[key] >= value, key
    for one in scrapes:
        infinite = one.value("durable_latency_seconds_bucket", le="+Inf")
        assert infinite == one.value("durable_latency_seconds_count")
    last = scrapes[-1]
    assert last.value("ops_total", op="session.put", result="ok") == each * threads / 2
    assert last.value("ops_total", op="session.put", result="version_mismatch") == each * threads / 2
    assert last.value("durable_latency_seconds_count") == each * threads / 2


def test_a_value_on_a_bound_belongs_below_it() -> None:
    """As ``le`` says; above the last bound there is room as well."""
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 3):
        histogram.add(value)
    histogram.add(9, times=2)

    assert histogram.counts == [2, 2, 3]
    assert histogram.sum == 26


# The alerts.


def alerts() -> dict[str, str]:
    """The expression of each alert in the rules that we ship."""
    found = re.findall(r"- alert: (\w+)\n +expr: (.+)\n", RULES.read_text())
    return dict(found)


def test_the_alerts_look_at_metrics_that_exist(tmp_path: Path) -> None:
    """Every name in an expression is in the scrape of a service that has done nothing yet."""

    async def scenario(served: Served) -> None:
        names = {name for name, _ in (await scraped(served)).samples}
        looked_at = set(re.findall(r"\bholdfast_\w+", " ".join(alerts().values())))

        assert len(alerts()) == RULES.read_text().count("expr:") == 6
        assert len(looked_at) >= 6
        assert looked_at <= names

    serve_and(scenario, tmp_path)


def test_the_readme_names_the_alerts_and_metrics_that_there_are(tmp_path: Path) -> None:
    """Those of the rules, no other; and no metric that does not exist."""

    async def scenario(served: Served) -> None:
        await served.ask("POST", "/v1/admin/flush")
        await served.ask("GET", "/nowhere")
        served.engine.follow("archive", lambda: 0)
        names = {
            family.name
            for family in parse_openmetrics((await served.ask("GET", "/metrics", headers=OPENMETRICS)).body.decode())
        }
        section = (ROOT / "README.md").read_text().partition("\n### Watching it\n")[2].partition("\n### ")[0]
        mentioned = {
            re.sub(r"_(total|bucket|count|sum|info)$", "", name) for name in re.findall(r"`(holdfast_\w+)", section)
        }

        assert set(re.findall(r"`(Holdfast[A-Z]\w+)`", section)) == set(alerts())
        assert len(mentioned) > 20
        assert mentioned <= names

    serve_and(scenario, tmp_path)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of Prometheus, is not installed")
def test_promtool_accepts_the_rules() -> None:
    """Prometheus's own tool reads them."""
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, timeout=ANSWER_S)

    assert done.returncode == 0, done.stdout + done.stderr
