"""The HTTP interface under clients that are slow, many, large, or there when it stops."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.http_harness import ANSWER_S, Served, serve_and, status_of

KIB = 1024
PUT_HEAD = b"PUT /v1/users/1 HTTP/1.1\r\nHost: localhost\r\n"


# Deadlines.


async def _seconds_until_closed(
    served: Served, send: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> tuple[float, bytes]:
    reader, writer = await served.connect()
    started = time.monotonic()
    sending = asyncio.create_task(send(writer))
    raw = b""
    with contextlib.suppress(OSError):
        raw = await asyncio.wait_for(reader.read(), ANSWER_S)
    took = time.monotonic() - started
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    writer.close()
    return took, raw


async def _say_nothing(writer: asyncio.StreamWriter) -> None:
    pass


async def _drip(writer: asyncio.StreamWriter, start: bytes = b"GET /healthz HTTP/1.1\r\nX: ") -> None:
    writer.write(start)
    while not writer.is_closing():
        writer.write(b"a")
        await asyncio.sleep(0.05)


async def _drip_body(writer: asyncio.StreamWriter) -> None:
    await _drip(writer, PUT_HEAD + b'Content-Length: 1000\r\n\r\n{"a":"')


async def _drip_chunks(writer: asyncio.StreamWriter) -> None:
    writer.write(PUT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while not writer.is_closing():
        writer.write(b"1\r\na\r\n")
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("send", "deadline_s", "status"),
    [(_say_nothing, 0.5, 0), (_drip, 0.5, 408), (_drip_body, 1.0, 408), (_drip_chunks, 1.0, 408)],
)
def test_a_slow_client_is_dropped_at_its_deadline(
    tmp_path: Path, send: Callable[[asyncio.StreamWriter], Awaitable[None]], deadline_s: float, status: int
):
    """However steadily its bytes drip, a request that is not there in time ends with 408; a silent client just ends."""

    async def scenario(served: Served) -> None:
        took, raw = await _seconds_until_closed(served, send)

        assert status_of(raw) == status
        assert deadline_s <= took < deadline_s + 0.8

    serve_and(scenario, tmp_path, header_timeout=0.5, body_timeout=1.0)


def test_an_idle_connection_is_closed(tmp_path: Path):
    """After an answer a connection may idle for keep_alive, which is not the deadline of a header."""

    async def scenario(served: Served) -> None:
        async def ask_once(writer: asyncio.StreamWriter) -> None:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")

        took, raw = await _seconds_until_closed(served, ask_once)

        assert raw.count(b"HTTP/1.1") == 1
        assert 1.0 <= took < 1.8

    serve_and(scenario, tmp_path, header_timeout=0.3, keep_alive=1.0)


def test_a_client_that_does_not_read_is_dropped(tmp_path: Path):
    """A reply that nobody takes is not kept for ever."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/users/1", {"text": "x" * 900_000})
        _, writer = await served.connect()
        writer.write(b"GET /v1/users/1 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 30)
        await asyncio.sleep(0.3)
        is_waiting = any(connection.writing_paused for connection in served.service.connections)
        await asyncio.sleep(1.5)

        assert is_waiting
        assert not served.service.connections
        writer.close()

    serve_and(scenario, tmp_path, keep_alive=0.8)


SLOW_CLIENTS = """
import asyncio, sys, time

START = [b"", b"GET /healthz HTTP/1.1\\r\\nX: ", b"PUT /v1/users/1 HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 1000\\r\\n\\r\\n"]

async def client(start):
    reader, writer = await asyncio.open_unix_connection(sys.argv[1])
    began = time.monotonic()
    writer.write(start)
    try:
        while True:
            if start:
                writer.write(b"a")
            try:
                await asyncio.wait_for(reader.read(1), 1.0)
                break
            except TimeoutError:
                pass
    except OSError:
        pass
    writer.close()
    return time.monotonic() - began

async def main():
    clients = [asyncio.create_task(client(START[n % 3])) for n in range(200)]
    await asyncio.sleep(0.5)
    print("open", flush=True)
    print(max(await asyncio.gather(*clients)), flush=True)

asyncio.run(main())
"""


def test_slow_clients_do_not_hurt_the_others(tmp_path: Path):
    """Beside 200 clients that are silent, or send a byte of header or body a second, a healthy one is served as before."""

    async def healthy_p99_ms(served: Served) -> float:
        reader, writer = await served.connect()
        waits = []
        for _ in range(500):
            started = time.perf_counter()
            writer.write(b"GET /v1/users/1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"}")
            waits.append(time.perf_counter() - started)
            await asyncio.sleep(0.001)
        writer.close()
        return sorted(waits)[494] * 1000

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/users/1", {"n": 1})
        alone_ms = await healthy_p99_ms(served)
        slow = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SLOW_CLIENTS, served.socket_path, stdout=subprocess.PIPE
        )
        assert slow.stdout is not None
        await asyncio.wait_for(slow.stdout.readline(), ANSWER_S)
        open_connections = len(served.service.connections)
        beside_ms = await healthy_p99_ms(served)
        last_s = float(await asyncio.wait_for(slow.stdout.readline(), ANSWER_S))
        await slow.wait()

        print(
            f"fault 24: p99 {alone_ms:.2f} ms alone, {beside_ms:.2f} ms beside 200 slow ones (goal: twice); last gone after {last_s:.1f} s"
        )
        assert open_connections >= 200
        assert last_s < 4.5
        # Twice of a tenth of a millisecond is within the noise of a shared machine; a millisecond is not.
        assert beside_ms < max(2 * alone_ms, 5.0)

    serve_and(scenario, tmp_path, header_timeout=2.0, body_timeout=3.0)


# Sizes.


def test_a_header_has_a_limit(tmp_path: Path):
    """One long line, one long field or many small ones: above header_bytes it is 431, whole or not, below it passes."""
    fields = b"".join(b"X-%d: %b\r\n" % (n, b"a" * 50) for n in range(100))

    async def scenario(served: Served) -> None:
        async def status(raw: bytes) -> int:
            return status_of(await served.send_raw(raw))

        end = b"Connection: close\r\n\r\n"
        assert await status(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + fields[:3000].rpartition(b"X")[0] + end) == 200
        assert await status(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + fields + end) == 431
        assert await status(b"GET /healthz HTTP/1.1\r\nHost: x\r\n" + fields) == 431
        assert await status(b"GET /v1/users/" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n") == 431
        assert await status(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 9000 + b"\r\n\r\n") == 431

    serve_and(scenario, tmp_path, header_bytes=4 * KIB)


@pytest.mark.parametrize("size", [8 * KIB - 1, 8 * KIB, 8 * KIB + 1])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_has_a_limit(tmp_path: Path, size: int, is_chunked: bool):
    """At body_bytes it passes, one byte more is 413, however its length is told."""
    body = b'{"a":"' + b"x" * (size - 8) + b'"}'

    async def scenario(served: Served) -> None:
        if is_chunked:
            sent = PUT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        else:
            sent = PUT_HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        reader, writer = await served.connect()
        writer.write(sent)
        raw = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ANSWER_S)
        writer.close()

        assert len(body) == size
        assert status_of(raw) == (201 if size <= 8 * KIB else 413)

    serve_and(scenario, tmp_path, body_bytes=8 * KIB)


def test_a_large_body_is_refused_before_it_is_sent(tmp_path: Path):
    """A Content-Length above the limit is enough; the client reads the problem and the connection ends."""

    async def scenario(served: Served) -> None:
        started = time.monotonic()
        raw = await served.send_raw(PUT_HEAD + b"Content-Length: 99999999999\r\n\r\n{")

        assert status_of(raw) == 413
        assert b'"code":"too_large"' in raw
        assert time.monotonic() - started < 3.5

    serve_and(scenario, tmp_path)


def test_endless_chunks_are_cut(tmp_path: Path):
    """A chunked body that never ends is refused at the limit, and the service holds no more than that of it."""

    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(PUT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 200 and not reader.at_eof():
                writer.write(chunk)
                await asyncio.wait_for(writer.drain(), ANSWER_S)
                sent += 1
                await asyncio.sleep(0)
        raw = b""
        with contextlib.suppress(ConnectionError):
            raw = await asyncio.wait_for(reader.read(), ANSWER_S)
        writer.close()

        assert status_of(raw) == 413
        assert (await served.ask("GET", "/healthz")).status == 200

    serve_and(scenario, tmp_path, body_bytes=256 * KIB)


def test_a_batch_has_a_limit_of_ops(tmp_path: Path):
    """At batch_ops it passes, one more is too_large."""

    async def scenario(served: Served) -> None:
        ops = [{"op": "user.put", "id": str(n), "value": {"n": n}} for n in range(11)]
        at = await served.ask("POST", "/v1/batch", {"ops": ops[:10]})
        above = await served.ask("POST", "/v1/batch", {"ops": ops})

        assert at.status == 200
        assert (above.status, above.json["code"]) == (413, "too_large")

    serve_and(scenario, tmp_path, batch_ops=10)


@pytest.mark.parametrize(("length", "status"), [(255, 201), (256, 201), (257, 422)])
def test_an_id_has_a_limit(tmp_path: Path, length: int, status: int):
    """An id of id_chars passes, a longer one is refused."""

    async def scenario(served: Served) -> None:
        assert (await served.ask("PUT", "/v1/users/" + "a" * length, {"n": 1})).status == status

    serve_and(scenario, tmp_path)


# Connections.


def test_too_many_connections_are_turned_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Beyond limits.connections a client gets 503 and the end; those connected go on; the log stays short."""

    async def scenario(served: Served) -> None:
        taken = [await served.connect() for _ in range(5)]
        refused = [await served.send_raw(b"") for _ in range(40)]
        reader, writer = taken[0]
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        served_still = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ANSWER_S)
        for _, writer in taken:
            writer.close()
        await asyncio.sleep(0.1)
        afterwards = await served.ask("GET", "/healthz")

        assert {status_of(raw) for raw in refused} == {503}
        assert all(b"Retry-After: 1\r\n" in raw for raw in refused)
        assert status_of(served_still) == 200
        assert afterwards.status == 200

    serve_and(scenario, tmp_path, connections=5)

    assert 1 <= capsys.readouterr().out.count("connections.refused") <= 10


CLIENTS = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
taken = [socket.socket(socket.AF_UNIX) for _ in range(200)]
for sock in taken:
    sock.connect(sys.argv[1])
print(sum(sock.recv(12) == b"HTTP/1.1 503" for sock in taken[-50:]), flush=True)
sys.stdin.read()
"""


def test_clients_leave_descriptors_for_files(tmp_path: Path):
    """However many clients come, half of the descriptors stay for the disk, and those connected are served."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/users/1", {"n": 1})
        clients = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENTS, served.socket_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert clients.stdout is not None
        refused = int(await asyncio.wait_for(clients.stdout.readline(), 3 * ANSWER_S))
        flush = await served.ask("POST", "/v1/admin/flush")
        await clients.communicate(b"")

        print(f"200 clients at 256 descriptors: {refused} of the last 50 refused")
        assert refused == 50
        assert flush.status == 200

    try:
        serve_and(scenario, tmp_path, header_timeout=60.0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Stopping.


def test_a_request_in_flight_is_finished(tmp_path: Path):
    """While stopping, what had begun is answered, with Connection: close, and drain waits for it."""

    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(PUT_HEAD + b"Content-Length: 7\r\n\r\n")
        await asyncio.sleep(0.1)
        await served.service.stop_accepting()
        draining = asyncio.create_task(served.service.drain())
        await asyncio.sleep(0.1)
        was_waiting = not draining.done()
        writer.write(b'{"a":1}')
        raw = await asyncio.wait_for(reader.read(), ANSWER_S)
        await asyncio.wait_for(draining, ANSWER_S)
        writer.close()

        assert was_waiting
        assert status_of(raw) == 201
        assert b"Connection: close\r\n" in raw
        assert served.engine.get("users", "1") is not None

    serve_and(scenario, tmp_path)


def test_an_open_connection_is_told_to_go(tmp_path: Path):
    """While stopping, a new request on an open connection gets 503 with Retry-After and the end; readiness is still told."""

    async def scenario(served: Served) -> None:
        one, two = await served.connect(), await served.connect()
        for reader, writer in (one, two):
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"}"), ANSWER_S)
        await served.service.stop_accepting()
        served.state = "SHUTTING_DOWN"
        one[1].write(b"GET /v1/users/1 HTTP/1.1\r\nHost: x\r\n\r\n")
        two[1].write(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        refused = await asyncio.wait_for(one[0].read(), ANSWER_S)
        ready = await asyncio.wait_for(two[0].read(), ANSWER_S)
        with pytest.raises(OSError):
            await served.connect()
        for _, writer in (one, two):
            writer.close()

        assert (status_of(refused), status_of(ready)) == (503, 503)
        assert b"Retry-After: 1\r\n" in refused
        assert b"Connection: close\r\n" in refused
        assert b'"status":"stopping"' in ready

    serve_and(scenario, tmp_path)


def test_the_first_request_of_a_connection_is_answered(tmp_path: Path):
    """Who had connected when the stop began gets one answer, though not the time of the world to ask."""

    async def scenario(served: Served) -> None:
        (reader, writer), (_, silent) = await served.connect(), await served.connect()
        await asyncio.sleep(0.05)
        await served.service.stop_accepting()
        draining = asyncio.create_task(served.service.drain())
        await asyncio.sleep(0.01)
        writer.write(PUT_HEAD + b'Content-Length: 7\r\n\r\n{"a":1}')
        raw = await asyncio.wait_for(reader.read(), ANSWER_S)
        await asyncio.wait_for(draining, 1)
        for one in (writer, silent):
            one.close()

        assert status_of(raw) == 201
        assert b"Connection: close\r\n" in raw

    serve_and(scenario, tmp_path)


def test_a_stop_cuts_what_does_not_end(tmp_path: Path):
    """stop returns at once, whatever clients do."""

    async def scenario(served: Served) -> None:
        _, idle = await served.connect()
        _, sending = await served.connect()
        sending.write(PUT_HEAD + b"Content-Length: 7\r\n\r\n")
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await served.service.stop()

        assert time.monotonic() - started < 1.0
        assert not served.service.connections
        idle.close()
        sending.close()

    serve_and(scenario, tmp_path)
