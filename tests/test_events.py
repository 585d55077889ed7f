"""The event stream over HTTP: complete, in order, resumable, and never a burden to others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
import structlog
import yarl

from holdfast.http.auth import TokenStore
from tests.http_harness import ANSWER_S, Served, serve_and, serving


class Block(NamedTuple):
    """What stands between two empty lines of a stream; fields that do not are empty."""

    id: str = ""
    event: str = ""
    data: str = ""
    retry: str = ""
    comment: str = ""

    @property
    def seq(self) -> int:
        """Of the event."""
        return int(msgspec.json.decode(self.data)["seq"])


class Stream:
    """A client of the event stream, as a browser's would be."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response
        self.last_id = ""

    async def block(self) -> Block:
        """The next block; an empty one at the end."""
        async with asyncio.timeout(ANSWER_S):
            raw = await self.response.content.readuntil(b"\n\n")
        fields: dict[str, str] = {}
        for line in raw.decode().split("\n"):
            name, _, value = line.partition(":")
            if line:
                name = name or "comment"
                assert name not in fields, raw
                fields[name] = value.removeprefix(" ")
        block = Block(**fields)
        self.last_id = block.id or self.last_id
        return block

    async def event(self) -> Block:
        """The next block that is an event."""
        while not (block := await self.block()).event:
            assert block != Block(), "the stream has ended"
        return block

    async def events(self, count: int) -> list[Block]:
        """The next *count* of them."""
        return [await self.event() for _ in range(count)]

    async def rest(self) -> list[Block]:
        """All blocks to the end of the stream."""
        blocks = []
        while (block := await self.block()) != Block():
            blocks.append(block)
        return blocks


@contextlib.asynccontextmanager
async def stream(served: Served, query: str = "", headers: Mapping[str, str] | None = None) -> AsyncIterator[Stream]:
    """An open stream whose first block was read."""
    async with aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(served.socket_path), read_bufsize=1 << 22
    ) as session:
        url = yarl.URL(f"http://localhost/v1/events{query}", encoded=True)
        async with session.get(url, headers=headers, timeout=aiohttp.ClientTimeout(None)) as response:
            assert response.status == 200, await response.text()
            opened = Stream(response)
            first = await opened.block()
            assert first.retry == "1000" and first.id.isdigit() and not first.event
            yield opened


async def put(served: Served, id: str = "1", **value: Any) -> int:
    """Put a session; its seq."""
    answer = await served.ask("PUT", f"/v1/sessions/{quote(id, safe='')}", value)
    assert answer.status in (200, 201), answer
    return int(answer.json["seq"])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for *condition*, at most ANSWER_S."""
    ends_at = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.01)


def readers(served: Served) -> set[str]:
    """Who follows the journal beside the archive."""
    return served.engine.gauges().follower_lag.keys() - {"archive"}


async def nobody_left(served: Served) -> None:
    """Wait until no stream and no follower is left."""
    await until(lambda: not served.service.open_streams and not readers(served))


# What it shows.


def test_every_change_is_an_event(tmp_path: Path) -> None:
    """With its seq as id, its op as event, and one line of JSON that says what became; never compressed or cached."""

    async def scenario(served: Served) -> None:
        async with stream(served, headers={"Accept-Encoding": "gzip"}) as events:
            assert events.response.headers["Content-Type"] == "text/event-stream"
            assert events.response.headers["Cache-Control"] == "no-store"
            assert "Content-Encoding" not in events.response.headers

            seq = await put(served, "57300", text="línea\nzwei\u2028drei" + "x" * 2000)
            block = await events.event()

            assert (block.id, block.event) == (str(seq), "session.put")
            data = msgspec.json.decode(block.data)
            assert data["seq"] == seq
            assert data["value"]["text"] == "línea\nzwei\u2028drei" + "x" * 2000

    serve_and(scenario, tmp_path)


def test_a_batch_comes_as_its_members_and_only_the_last_has_the_id(tmp_path: Path) -> None:
    """So that who resumes within it meets some again, but misses none."""

    async def scenario(served: Served) -> None:
        async with stream(served) as events:
            ops = [{"op": "session.put", "id": str(n), "value": {}} for n in range(3)]
            await served.ask("POST", "/v1/batch", {"atomic": True, "ops": ops})

            blocks = await events.events(3)

            assert [(block.id, block.event) for block in blocks] == [
                ("", "session.put"), ("", "session.put"), ("1", "session.put"),
            ]  # fmt: skip
            assert [(block.seq, msgspec.json.decode(block.data)["id"]) for block in blocks] == [
                (1, "0"), (1, "1"), (1, "2"),
            ]  # fmt: skip

    serve_and(scenario, tmp_path)


def test_many_writers_are_seen_by_many_readers(tmp_path: Path) -> None:
    """Each reader gets each change exactly once, in order, whatever is flushed meanwhile."""

    async def scenario(served: Served) -> None:
        async def write(number: int) -> list[int]:
            return [await put(served, f"{number}-{n}") for n in range(20)]

        async with stream(served) as one, stream(served, "?after=0") as two:
            writing = [asyncio.create_task(write(number)) for number in range(10)]
            await served.ask("POST", "/v1/admin/flush")
            acknowledged = [seq for seqs in await asyncio.gather(*writing) for seq in seqs]

            for events in (one, two):
                assert [block.seq for block in await events.events(200)] == sorted(acknowledged)

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("query", "seqs"),
    [
        ("?op=session.put", [1, 3]),
        ("?op=session.*", [1, 3, 4]),
        ("?op=session.touch&op=order.put", [2, 4]),
        ("?op=session.touch,order.*", [2, 4]),
        ("?op=session.touch%2Corder.*", [2, 4]),
        ("?id=1", [1, 2]),
        ("?id=a%2Cb,1", [1, 2, 3, 4]),
        ("?id=a%2Cb&op=session.touch", [4]),
        ("", [1, 2, 3, 4]),
    ],
)
def test_filters_choose_by_op_and_id(tmp_path: Path, query: str, seqs: list[int]) -> None:
    """Repeated or with commas; a comma of an id is percent-encoded."""

    async def scenario(served: Served) -> None:
        async with stream(served, query) as events:
            await put(served, "1")
            await served.ask("PUT", "/v1/orders/1", {})
            await put(served, "a,b")
            await served.ask("POST", "/v1/sessions/a%2Cb/touch")

            assert [block.seq for block in await events.events(len(seqs))] == seqs

    serve_and(scenario, tmp_path)


# Where it begins.


def test_a_reader_that_comes_back_misses_nothing(tmp_path: Path) -> None:
    """From every event it may have seen last, by header or query, over a flush and a restart of the daemon."""

    async def life() -> None:
        async with serving(tmp_path) as served:
            for n in range(3):
                await put(served, str(n))
            await served.ask("POST", "/v1/admin/flush")
            async with stream(served) as events:
                assert events.last_id == "3"
                await put(served, "4")
        async with serving(tmp_path) as served:
            async with stream(served, "?after=1", {"Last-Event-ID": events.last_id}) as events:
                assert (await events.event()).seq == 4
            await put(served, "5")
            for after in range(6):
                for query, headers in ((f"?after={after}", {}), ("", {"Last-Event-ID": str(after)})):
                    async with stream(served, query, headers) as events:
                        assert events.last_id == str(after)
                        assert [block.seq for block in await events.events(5 - after)] == list(range(after + 1, 6))

    asyncio.run(life())


def test_what_is_gone_is_said_with_the_oldest_event_there_is(tmp_path: Path) -> None:
    """410 before the stream begins, as a problem that a program understands."""

    async def scenario(served: Served) -> None:
        for n in range(3):
            await put(served, str(n))
        (served.engine._flusher).journal_keep = 0
        await served.ask("POST", "/v1/admin/flush")

        answer = await served.ask("GET", "/v1/events?after=1")

        assert (answer.status, answer.json["code"], answer.json["oldest_seq"]) == (410, "gone", 4)
        assert "event 2 is no longer in the journal, which begins with 4" in answer.json["detail"]
        async with stream(served, "?after=3") as events:
            await put(served)
            assert (await events.event()).seq == 4

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("query", "header", "status", "told"),
    [
        ("?after=2", None, 409, "the last one is 1"),
        ("", "2", 409, "the last one is 1"),
        ("?after=-1", None, 400, "whole number"),
        ("?after=", None, 400, "whole number"),
        ("?after=1&after=1", None, 400, "given twice"),
        ("?after=99999999999999999999", None, 400, "whole number"),
        ("", "abc", 400, "whole number"),
        ("?op=session.jump", None, 400, "known are conversation.archive"),
        ("?op=", None, 400, "unknown op"),
        ("?op=batch", None, 400, "unknown op"),
        ("?since=1", None, 400, "unknown query parameter 'since'; this path takes after, op, id"),
        ("?id=%ff", None, 400, "UTF-8"),
    ],
)
def test_what_has_no_meaning_is_refused(tmp_path: Path, query: str, header: str | None, status: int, told: str) -> None:
    """Before the stream begins, with a reason, and nothing is left behind."""

    async def scenario(served: Served) -> None:
        await put(served)

        answer = await served.ask("GET", f"/v1/events{query}", headers={"Last-Event-ID": header} if header else None)

        assert answer.status == status
        assert told in answer.json["detail"], answer.json
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert readers(served) == set()

    serve_and(scenario, tmp_path)


# Who may.


def test_a_read_token_may_listen(tmp_path: Path) -> None:
    """Over TCP a token is needed, and reading is enough."""

    async def scenario(served: Served) -> None:
        assert (await served.ask("GET", "/v1/events", by_tcp=True)).status == 401
        token = TokenStore(tmp_path).create("reader", "read")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
            asyncio.timeout(ANSWER_S),
        ):
            while True:  # token files are looked at a few times a second
                async with session.get(f"http://{served.tcp}/v1/events") as response:
                    if response.status == 200:
                        assert (await response.content.readuntil(b"\n\n")).startswith(b"retry:")
                        break
                await asyncio.sleep(0.05)

    serve_and(scenario, tmp_path)


def test_other_methods_and_heads(tmp_path: Path) -> None:
    """HEAD gets the headers and no stream, POST a refusal."""

    async def scenario(served: Served) -> None:
        raw = await served.send_raw(b"HEAD /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head, _, body = raw.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in head and not body
        assert (await served.ask("POST", "/v1/events", {})).status == 405
        await nobody_left(served)

    serve_and(scenario, tmp_path)


def test_an_old_client_gets_a_stream_without_chunks(tmp_path: Path) -> None:
    """HTTP/1.0 knows only the end of the connection."""

    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(b"GET /v1/events HTTP/1.0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"chunked" not in head
        assert await reader.readuntil(b"\n\n") == b"retry: 1000\nid: 0\n: from event 1 on\n\n"
        await put(served)
        assert (await reader.readuntil(b"\n\n")).startswith(b"id: 1\nevent: session.put\ndata: {")
        await served.service.stop()
        assert await reader.read() == b""
        writer.close()

    serve_and(scenario, tmp_path)


# How it stays alive, and how it ends.


def test_a_quiet_stream_gives_signs_of_life(tmp_path: Path) -> None:
    """A comment each heartbeat; when events passed that were not wanted, with the id behind them."""

    async def scenario(served: Served) -> None:
        async with stream(served, "?op=order.*") as events:
            began = time.monotonic()
            assert await events.block() == Block(comment="")
            assert await events.block() == Block(comment="")
            assert 0.15 < time.monotonic() - began < ANSWER_S

            await put(served, "1")
            await put(served, "2")
            while (block := await events.block()) == Block(comment=""):
                pass
            assert block == Block(id="2") or block == Block(id="1")
            while events.last_id != "2":
                await events.block()

            await served.ask("PUT", "/v1/orders/1", {})
            assert (await events.event()).id == "3"

    serve_and(scenario, tmp_path, heartbeat=0.1)


def test_signs_of_life_come_among_events_that_are_not_wanted(tmp_path: Path) -> None:
    """However many there are, and without a pause between them."""

    async def scenario(served: Served) -> None:
        async def write() -> None:
            while True:
                await put(served)

        async with stream(served, "?op=order.*") as events:
            writing = asyncio.create_task(write())

            ids = [int((await events.block()).id) for _ in range(5)]

            writing.cancel()
            assert ids == sorted(set(ids)) and ids[0] > 0

    serve_and(scenario, tmp_path, heartbeat=0.1)


def test_clients_that_go_leave_nothing_behind(tmp_path: Path) -> None:
    """200 streams, closed in every way, at once noticed."""

    async def scenario(served: Served) -> None:
        connections = [await served.connect() for _ in range(200)]
        for reader, writer in connections:
            writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"\n\n")
        assert served.service.open_streams == 200
        assert len(readers(served)) == 200
        await put(served)

        for number, (_, writer) in enumerate(connections):
            if number % 2:
                writer.close()
            else:
                writer.transport.abort()

        await nobody_left(served)
        assert not served.engine.feed._readers
        assert served.engine.feed._wake not in served.engine._committer.on_committed

    serve_and(scenario, tmp_path, streams=200)


def test_more_streams_than_the_limit_are_refused(tmp_path: Path) -> None:
    """503, to be tried again; a place that becomes free is given away."""

    async def scenario(served: Served) -> None:
        async with stream(served):
            async with stream(served):
                answer = await served.ask("GET", "/v1/events")
                assert (answer.status, answer.json["code"]) == (503, "unavailable")
                assert "limits.streams" in answer.json["detail"] and "Retry-After" in answer.headers
            await until(lambda: served.service.open_streams == 1)
            async with stream(served):
                assert len(readers(served)) == 2

    serve_and(scenario, tmp_path, streams=2)


def test_a_reader_that_takes_nothing_is_dropped_while_others_go_on(tmp_path: Path) -> None:
    """What waits for it is bounded; it is cut off after limits.stream_stall, told in log and metrics, and may resume."""

    async def scenario(served: Served) -> None:
        stuck = socket.socket(socket.AF_UNIX)
        stuck.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stuck, served.socket_path)
        await loop.sock_sendall(stuck, b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with stream(served, "?after=0") as healthy, asyncio.timeout(ANSWER_S):
            await until(lambda: served.service.open_streams == 2)
            count = 0
            with structlog.testing.capture_logs() as logs:
                while served.service.open_streams == 2:
                    await put(served, str(count), text="x" * 50_000)
                    count += 1
                    buffered = [
                        one.transport.get_write_buffer_size() for one in served.service.connections if one.transport
                    ]
                    assert max(buffered) < 512 * 1024
                seqs = [block.seq for block in await healthy.events(count)]

            assert seqs == list(range(1, count + 1))
            dropped = [line for line in logs if line["event"] == "stream.dropped"]
            assert len(dropped) == 1 and dropped[0]["lag"] > 0
            metrics = (await served.ask("GET", "/metrics")).body.splitlines()
            assert {b"holdfast_http_streams 1.0", b"holdfast_http_streams_dropped_total 1.0"} <= set(metrics)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := await loop.sock_recv(stuck, 1 << 20):
                received += part
        assert b"event: session.put" in received and b"0\r\n\r\n" not in received[-9:]
        stuck.close()
        await nobody_left(served)

    serve_and(scenario, tmp_path, stream_stall=0.3)


def test_a_stop_ends_streams_at_once_and_cleanly(tmp_path: Path) -> None:
    """They are no requests to wait for: what is durable is sent, then the end; nobody holds up the stop."""

    async def life() -> None:
        async with serving(tmp_path) as served:
            stuck = socket.socket(socket.AF_UNIX)
            stuck.connect(served.socket_path)
            stuck.sendall(b"GET /v1/events?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            async with contextlib.AsyncExitStack() as streams:
                opened = [await streams.enter_async_context(stream(served)) for _ in range(20)]
                for n in range(30):
                    await put(served, str(n), text="x" * 50_000)
                began = time.monotonic()

                await served.service.stop_accepting()
                async with asyncio.timeout(ANSWER_S):
                    await served.service.drain()
                await served.service.stop()

                assert time.monotonic() - began < 1.5
                for events in opened:
                    blocks = await events.rest()
                    assert [block.seq for block in blocks if block.event] == list(range(1, 31))
            stuck.close()

    asyncio.run(life())


def test_a_stream_is_refused_while_the_daemon_stops(tmp_path: Path) -> None:
    """503, so that the client tries again later."""

    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        await served.service.stop_accepting()
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 503")
        writer.close()

    serve_and(scenario, tmp_path)


def test_a_reader_overtaken_by_damage_is_told_when_it_comes_back(tmp_path: Path) -> None:
    """The stream says why it ends, and the next request gets 410."""

    async def scenario(served: Served) -> None:
        for n in range(3):
            await put(served, str(n))
        await served.ask("POST", "/v1/admin/flush")
        segment = tmp_path / "journal" / "kept" / f"{1:020d}.jsonl"
        segment.write_bytes(segment.read_bytes().replace(b'"seq":2,', b'"seq":9,'))

        async with stream(served, "?after=0") as events:
            blocks = await events.rest()

        assert [block.seq for block in blocks if block.event] == [1]
        assert "event 2 is damaged" in blocks[-1].comment

    serve_and(scenario, tmp_path)
