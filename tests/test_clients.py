"""The clients: what a connection adds to the library, and what must not be seen of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

import holdfast
from holdfast.client.wire import Receiver, Requests, Response, WireError
from holdfast.errors import BadRequest
from tests.library_forms import TEST_S, daemon_in_thread, settled
from tests.test_daemon import Daemon

SEED = 20261121


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon process on ``tmp_path/data``; ``again`` starts another on the same data."""
    running = Daemon(tmp_path / "data").ready()
    yield running
    running.kill()


class Relay:
    """Stands between client and daemon, and breaks connections at the worst moment.

    Attributes:
        lose: how many of the next answers to throw away, with the connection they should have gone to.
        requests: how many were passed on.
    """

    def __init__(self, path: Path, target: str) -> None:
        self.lose = 0
        self.requests = 0
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(100)
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(TEST_S)
        for thread in self._threads:
            thread.join(TEST_S)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                thread.start()
                self._threads.append(thread)

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._target)
            server.settimeout(TEST_S)
            client.settimeout(TEST_S)
            requests, responses = Receiver(), Receiver()
            with contextlib.suppress(OSError):
                while data := client.recv(1 << 20):
                    server.sendall(data)
                    # A request has a body of known length, so its end is found as that of a response is.
                    whole = _whole_requests(requests, data)
                    self.requests += whole
                    for _ in range(whole):
                        while (response := responses.next()) is None:
                            responses.feed(server.recv(1 << 20))
                        if self.lose:
                            self.lose -= 1
                            return
                        client.sendall(_rendered(response))


def _whole_requests(receiver: Receiver, data: bytes) -> int:
    """How many requests *data* completes."""
    receiver._buffer += data
    count = 0
    while True:
        raw = bytes(receiver._buffer)
        end = raw.find(b"\r\n\r\n")
        if end < 0:
            return count
        head = raw[:end].lower()
        _, found, rest = head.partition(b"content-length: ")
        length = int(rest.split(b"\r\n")[0]) if found else 0
        if len(raw) < end + 4 + length:
            return count
        del receiver._buffer[: end + 4 + length]
        count += 1


def _rendered(response: Response) -> bytes:
    names = "".join(f"{name}: {value}\r\n" for name, value in response.headers.items() if name != "content-length")
    return (
        f"HTTP/1.1 {response.status} X\r\n{names}Content-Length: {len(response.body)}\r\n\r\n".encode() + response.body
    )


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    """A relay before a service; its socket is ``tmp_path/relay.sock``."""
    with daemon_in_thread(tmp_path / "data") as served:
        relay = Relay(tmp_path / "relay.sock", served.socket_path)
        yield relay
        relay.close()


Attempt = Callable[[Any], Any]

ATTEMPTS: dict[str, Attempt] = {
    "stats.order": lambda hf: hf.stats.order("ring"),
    "order.put and complete": lambda hf: hf.orders.put("1", {}),
    "session.put if absent": lambda hf: hf.sessions.put("1", {}, if_version=0),
    "session.lease": lambda hf: hf.sessions.lease("1", timeout=0),
    "message.append": lambda hf: hf.conversations.append("1", messages=[{"role": "user", "content": "a"}] * 2),
    "get": lambda hf: hf.sessions.get("1"),
    "list": lambda hf: hf.sessions.list(),
    "flush": lambda hf: hf.flush(),
    "status": lambda hf: hf.status(),
    "sales": lambda hf: hf.stats.sales(),
}


@pytest.mark.parametrize("name", ATTEMPTS)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_lost_answer_changes_nothing_twice(name: str, is_async: bool, relay: Relay, tmp_path: Path) -> None:
    """The request is sent again, and gets the answer of the first time."""

    async def body(hf: Any) -> None:
        await settled(hf.users.put("warm", {}))
        relay.lose = 2
        answer = await settled(ATTEMPTS[name](hf))
        assert relay.lose == 0
        if name == "session.put if absent":
            assert (answer.status, answer.version) == (201, 1)
        totals = (await settled(hf.stats.sales()))["totals"]
        assert totals["allTimeOrders"] == (1 if "order" in name else 0)
        if name == "session.lease":
            await settled(answer.put({}))
        if name == "message.append":
            assert answer.numbers == [1, 2]
            assert len(await settled(hf.conversations.messages("1"))) == 2

    on_relay(tmp_path, is_async, body)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_lost_answer_to_many_ops_changes_nothing_twice(is_async: bool, relay: Relay, tmp_path: Path) -> None:
    """Each op of a batch, and a batch that is all or nothing."""

    async def body(hf: Any) -> None:
        await settled(hf.users.put("warm", {}))
        relay.lose = 1
        block = hf.pipeline()
        async with block if is_async else _as_async(block):
            for n in range(50):
                await settled(hf.stats.order("ring"))
                await settled(hf.sessions.put(str(n), {}, if_version=0))
                await settled(hf.conversations.append("chat", "user", str(n)))
        assert relay.lose == 0
        relay.lose = 1
        block = hf.atomic()
        async with block if is_async else _as_async(block):
            await settled(hf.stats.order("ring"))
            await settled(hf.sessions.put("a", {}, if_version=0))
        assert relay.lose == 0
        totals = (await settled(hf.stats.sales()))["totals"]
        assert totals["allTimeOrders"] == 51
        assert await settled(hf.sessions.count()) == 51
        assert (await settled(hf.sessions.record("a"))).version == 1
        said = [one["content"] for one in await settled(hf.conversations.messages("chat"))]
        assert said == [str(n) for n in range(50)]

    on_relay(tmp_path, is_async, body)


def test_tasks_travel_together(relay: Relay, tmp_path: Path) -> None:
    """What is called while a request is under way leaves in the next one."""

    async def body(hf: Any) -> None:
        answers = await asyncio.gather(*(hf.sessions.put(str(n), {}) for n in range(500)))
        assert sorted(answer.seq for answer in answers) == list(range(1, 501))
        assert relay.requests <= 3

    on_relay(tmp_path, True, body)


def test_any_event_loop_will_do(tmp_path: Path) -> None:
    """uvloop as well as asyncio's own."""
    import uvloop

    async def body() -> None:
        for address in (f"unix:{served.socket_path}", f"http://{served.tcp}"):
            async with holdfast.aio.connect(address, token=served.token) as hf:
                await asyncio.gather(*(hf.sessions.put(str(n), {}) for n in range(100)))
                async with hf.sessions.lease("1") as session, hf.events(after=0) as events:
                    await session.touch()
                    assert (await anext(events)).seq == 1

    with daemon_in_thread(tmp_path) as served:
        uvloop.run(asyncio.wait_for(body(), TEST_S))


def test_an_op_that_is_cancelled_in_time_does_not_happen(relay: Relay, tmp_path: Path) -> None:
    """And one that is under way harms nobody else."""

    async def body(hf: Any) -> None:
        first = asyncio.create_task(hf.sessions.put("first", {}))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks = [asyncio.create_task(hf.sessions.put(str(n), {})) for n in range(10)]
        await asyncio.sleep(0)
        first.cancel()
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(one) is asyncio.CancelledError for one in done] == [True, False] * 5
        found = sorted([item.id async for item in hf.sessions.list()])
        assert [id for id in found if id != "first"] == ["1", "3", "5", "7", "9"]

    on_relay(tmp_path, True, body)


def on_relay(tmp_path: Path, is_async: bool, body: Callable[[Any], Awaitable[None]]) -> None:
    """Run *body* with a client whose connection goes through the relay."""
    address = f"unix:{tmp_path / 'relay.sock'}"

    async def run() -> None:
        if is_async:
            async with holdfast.aio.connect(address, timeout=10) as hf:
                await body(hf)
        else:
            with holdfast.connect(address, timeout=10) as hf:
                await body(hf)

    asyncio.run(asyncio.wait_for(run(), TEST_S))


@contextlib.asynccontextmanager
async def _as_async(block: Any) -> Any:
    with block:
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_under_load_is_a_delay(number: int, daemon: Daemon, tmp_path: Path) -> None:
    """Threads and tasks that count orders see no error, and the figures have each order once."""
    rnd = random.Random(SEED)
    stopping = threading.Event()
    counted = [0]
    slowest_s = [0.0]
    failures: list[BaseException] = []
    lock = threading.Lock()

    def note(started: float) -> None:
        with lock:
            counted[0] += 1
            slowest_s[0] = max(slowest_s[0], time.monotonic() - started)

    def thread(hf: holdfast.Holdfast) -> None:
        try:
            while not stopping.is_set():
                started = time.monotonic()
                hf.stats.order("ring")
                note(started)
        except BaseException as error:
            failures.append(error)

    async def tasks(hf: Any) -> None:
        async def one() -> None:
            while not stopping.is_set():
                started = time.monotonic()
                await hf.stats.order("ring")
                note(started)

        await asyncio.gather(*(one() for _ in range(32)))

    async def many() -> None:
        async with holdfast.aio.connect(address) as hf:
            await tasks(hf)

    def loop() -> None:
        try:
            asyncio.run(many())
        except BaseException as error:
            failures.append(error)

    address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
    with holdfast.connect(address) as hf:
        workers = [threading.Thread(target=thread, args=(hf,)) for _ in range(4)] + [threading.Thread(target=loop)]
        for worker in workers:
            worker.start()
        running = daemon
        try:
            for _ in range(3):
                time.sleep(rnd.uniform(0.2, 0.5))
                running.send(number)
                running.wait()
                running = Daemon(daemon.data_dir).ready()
            time.sleep(0.2)
        finally:
            stopping.set()
            for worker in workers:
                worker.join(TEST_S)
        orders = hf.stats.sales()["totals"]["allTimeOrders"]
    running.kill()

    print(f"{counted[0]} orders in 3 restarts, the slowest call took {slowest_s[0]:.2f} s")
    assert not failures, failures[0]
    assert orders == counted[0] > 100


def test_threads_share_a_client(tmp_path: Path) -> None:
    """As many connections as threads that call at once; every call gets its own answer."""
    with daemon_in_thread(tmp_path) as served, holdfast.connect(f"unix:{served.socket_path}") as hf:

        def work(name: int) -> None:
            for n in range(50):
                assert hf.sessions.put(f"{name}-{n}", {"n": n}).id == f"{name}-{n}"
                assert hf.sessions.get(f"{name}-{n}")["n"] == n
            done.append(name)

        done: list[int] = []
        threads = [threading.Thread(target=work, args=(name,)) for name in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TEST_S)

        assert sorted(done) == list(range(16))
        assert len(hf.sessions) == 800


def test_a_connection_that_was_idle_too_long_is_opened_again(tmp_path: Path) -> None:
    """Without a delay, and without an error."""

    async def body() -> None:
        async with holdfast.aio.connect(address) as hf:
            await hf.sessions.put("1", {})
            await asyncio.sleep(0.6)
            started = time.monotonic()
            await hf.sessions.put("2", {})
            assert time.monotonic() - started < 0.25

    with daemon_in_thread(tmp_path, keep_alive=0.1) as served:
        address = f"unix:{served.socket_path}"
        with holdfast.connect(address) as hf:
            hf.sessions.put("1", {})
            time.sleep(0.6)
            started = time.monotonic()
            hf.sessions.put("2", {})
            assert time.monotonic() - started < 0.25
        asyncio.run(body())


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By argument, file or environment; none, a wrong one and one for reading only are told apart."""
    monkeypatch.delenv("HOLDFAST_TOKEN", raising=False)
    with daemon_in_thread(tmp_path) as served:
        address = f"http://{served.tcp}"
        from holdfast.http.auth import TokenStore

        reading = TokenStore(tmp_path).create("reader", "read")
        time.sleep(1)
        for keywords in ({"token": served.token}, {"token_file": tmp_path / "token"}):
            with holdfast.connect(address, **keywords) as hf:
                hf.sessions.put("1", {})
        monkeypatch.setenv("HOLDFAST_TOKEN", served.token)
        with holdfast.connect(address) as hf:
            hf.sessions.put("1", {})
        monkeypatch.delenv("HOLDFAST_TOKEN")
        for wrong in (None, "hf_wrong"):
            with holdfast.connect(address, token=wrong) as hf, pytest.raises(holdfast.Unauthorized):
                hf.sessions.get("1")
        with holdfast.connect(address, token=reading) as hf:
            assert hf.sessions.get("1")
            with pytest.raises(holdfast.Forbidden):
                hf.sessions.put("1", {})


@pytest.mark.parametrize(
    "wrong", ["", "data/holdfast.sock", "unix:", "ftp://x", "http://", "http://h/path", "http://h:x"]
)
def test_an_address_that_is_none_is_refused(wrong: str) -> None:
    """At once, with the forms that there are."""
    with pytest.raises(holdfast.SettingsError, match="unix:PATH"):
        holdfast.connect(wrong)


@pytest.mark.parametrize("keywords", [{"token": "two words"}, {"token": "ñ"}, {"token_file": "/nonexistent"}])
def test_a_token_that_is_none_is_refused(keywords: dict[str, Any]) -> None:
    """Before anything is sent with it."""
    with pytest.raises(holdfast.SettingsError):
        holdfast.connect("http://127.0.0.1:1", **keywords)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_dead_socket_is_told(is_async: bool, tmp_path: Path) -> None:
    """After the timeout, with what to look for."""
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))

    async def body() -> None:
        for path, reason in ((dead, "connection refused"), (tmp_path / "none.sock", "no such socket")):
            started = time.monotonic()
            with pytest.raises(holdfast.Unavailable, match=f"{reason}; is the daemon running"):
                if is_async:
                    async with holdfast.aio.connect(f"unix:{path}", timeout=0.3) as hf:
                        await hf.sessions.get("1")
                else:
                    with holdfast.connect(f"unix:{path}", timeout=0.3) as hf:
                        hf.sessions.get("1")
            assert time.monotonic() - started < 2

    asyncio.run(body())


@pytest.mark.parametrize("is_async", [False, True])
def test_a_daemon_that_does_not_answer_is_told(is_async: bool, daemon: Daemon) -> None:
    """A call ends with its timeout, and says that it may have happened."""
    address = f"unix:{daemon.data_dir / 'holdfast.sock'}"

    async def body() -> None:
        with contextlib.ExitStack() as stack:
            if is_async:
                async with holdfast.aio.connect(address, timeout=0.5) as hf:
                    await hf.sessions.put("1", {})
                    daemon.send(signal.SIGSTOP)
                    stack.callback(daemon.send, signal.SIGCONT)
                    with pytest.raises(holdfast.Unavailable, match="not answer within"):
                        await hf.sessions.put("1", {})
            else:
                with holdfast.connect(address, timeout=0.5) as hf:
                    hf.sessions.put("1", {})
                    daemon.send(signal.SIGSTOP)
                    stack.callback(daemon.send, signal.SIGCONT)
                    with pytest.raises(holdfast.Unavailable, match="not answer within"):
                        hf.sessions.put("1", {})

    asyncio.run(asyncio.wait_for(body(), TEST_S))


@contextlib.contextmanager
def answering(path: Path, answer: bytes) -> Iterator[None]:
    """A server of another kind: whatever it is asked, it says *answer*."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(10)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(1 << 16)
                    client.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(TEST_S)


def http_answer(status: int, body: bytes, server: str) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nServer: {server}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http_answer(200, b"<html>", "nginx"), "expected the JSON of a Holdfast daemon.*nginx"),
        (http_answer(404, b"<html>", "nginx"), "answers 404 without a reason"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "expected HTTP/1.1, found 'SSH-2.0"),
        (b"", "closed"),
    ],
)
def test_another_server_is_told(answer: bytes, said: str, tmp_path: Path) -> None:
    """What was expected, and what was found."""
    address = f"unix:{tmp_path / 'x.sock'}"
    with answering(tmp_path / "x.sock", answer), holdfast.connect(address, timeout=0.3) as hf:  # noqa: SIM117
        with pytest.raises(holdfast.Unavailable, match=said):
            hf.sessions.put("1", {})


def test_a_daemon_of_another_version_is_told(tmp_path: Path) -> None:
    """Where it refuses what this library asks, both versions are named."""
    body = b'{"code":"not_found","detail":"no such path; GET / names them","status":404}'
    answer = http_answer(404, body, "holdfast/99.1.0")
    with answering(tmp_path / "x.sock", answer), holdfast.connect(f"unix:{tmp_path / 'x.sock'}") as hf:
        for attempt in (lambda: hf.sessions.put("1", {}), lambda: hf.sessions.get("1")):
            with pytest.raises(
                holdfast.NotFound, match=rf"daemon is version 99\.1\.0, this client {holdfast.__version__}"
            ):
                attempt()


def test_a_code_of_a_newer_daemon_is_kept(tmp_path: Path) -> None:
    """An error that this library does not know still says its code and status."""
    answer = http_answer(418, b'{"code":"teapot","detail":"short and stout"}', "holdfast/99.1.0")
    with answering(tmp_path / "x.sock", answer), holdfast.connect(f"unix:{tmp_path / 'x.sock'}") as hf:  # noqa: SIM117
        with pytest.raises(holdfast.HoldfastError, match="short and stout") as refused:
            hf.sessions.put("1", {})

    assert (refused.value.code, refused.value.status) == ("teapot", 418)


def test_a_forked_child_uses_connections_of_its_own(daemon: Daemon) -> None:
    """Parent and child never read each other's answers."""
    script = """
import os, sys, holdfast
hf = holdfast.connect(sys.argv[1])
hf.sessions.put("parent", {})
children = []
for child in range(4):
    pid = os.fork()
    if not pid:
        for n in range(100):
            assert hf.sessions.put(f"{child}-{n}", {}).id == f"{child}-{n}"
        os._exit(0)
    children.append(pid)
for n in range(100):
    assert hf.sessions.put(f"p-{n}", {}).id == f"p-{n}"
assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
assert len(hf.sessions) == 501
"""
    done = subprocess.run(
        [sys.executable, "-c", script, f"unix:{daemon.data_dir / 'holdfast.sock'}"],
        capture_output=True,
        text=True,
        timeout=TEST_S,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_goes_on_behind_a_restart(is_async: bool, daemon: Daemon) -> None:
    """Every event once, in order, whatever happens to the daemon meanwhile."""
    address = f"unix:{daemon.data_dir / 'holdfast.sock'}"
    count = 60
    seen: list[tuple[int, str | None]] = []
    failures: list[BaseException] = []
    began = threading.Event()

    def read() -> None:
        try:
            with holdfast.connect(address) as hf, hf.events() as events:
                began.set()
                while len(seen) < 2 * count:
                    event = next(events)
                    seen.append((event.seq, event.id))
        except BaseException as error:
            failures.append(error)

    async def read_async() -> None:
        async with holdfast.aio.connect(address) as hf, hf.events() as events:
            began.set()
            async for event in events:
                seen.append((event.seq, event.id))
                if len(seen) == 2 * count:
                    break

    def run() -> None:
        try:
            asyncio.run(read_async())
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=run if is_async else read)
    reader.start()
    assert began.wait(TEST_S)
    running = daemon
    with holdfast.connect(address) as hf:
        for n in range(count):
            if n in (20, 40):
                running.send(signal.SIGKILL if n == 20 else signal.SIGTERM)
                running.wait()
                running = Daemon(daemon.data_dir).ready()
            with hf.atomic():
                hf.sessions.put(f"a{n}", {})
                hf.sessions.put(f"b{n}", {})
    reader.join(TEST_S)
    running.kill()

    assert not failures, failures[0]
    assert seen == [(n + 1, f"{letter}{n}") for n in range(count) for letter in "ab"]


def test_a_stream_is_ended_from_outside(tmp_path: Path) -> None:
    """Another thread closes it, and the reader that waits comes back."""
    with daemon_in_thread(tmp_path) as served, holdfast.connect(f"unix:{served.socket_path}") as hf:
        events = hf.events()
        found: list[Any] = []
        reader = threading.Thread(target=lambda: found.extend(events))
        reader.start()
        hf.sessions.put("1", {})
        ends_at = time.monotonic() + TEST_S
        while not found and time.monotonic() < ends_at:
            time.sleep(0.01)
        events.close()
        reader.join(TEST_S)

        assert not reader.is_alive()
        assert [event.id for event in found] == ["1"]
        assert events.position == 1
        with pytest.raises(BadRequest, match="list of names"):
            hf.events(ops="session.put")


# The wire.


RESPONSES = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "1"\r\n\r\nhello'
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nTrailer: x\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n"
)


def test_responses_are_read_in_any_pieces() -> None:
    """Wherever the network cuts them, they are the same."""
    for size in range(1, len(RESPONSES) + 1):
        receiver, found = Receiver(), []
        for start in range(0, len(RESPONSES), size):
            receiver.feed(RESPONSES[start : start + size])
            while (response := receiver.next()) is not None:
                found.append(response)

        assert [(one.status, one.body, one.is_last) for one in found] == [
            (200, b"hello", False),
            (204, b"", False),
            (200, b"hello world", False),
            (200, b"", True),
        ]


def test_a_response_may_end_with_its_connection() -> None:
    """As one of HTTP/1.0 does."""
    receiver = Receiver()
    receiver.feed(b"HTTP/1.0 200 OK\r\n\r\nhel")
    receiver.feed(b"lo")
    assert receiver.next() is None
    receiver.feed(b"")

    assert receiver.next() == Response(200, {}, b"hello", True)


@pytest.mark.parametrize(
    "raw",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n",
        b"x" * (65 << 10),
    ],
)
def test_what_is_no_response_is_refused(raw: bytes) -> None:
    """Instead of being waited for."""
    receiver = Receiver()

    with pytest.raises(WireError):
        receiver.feed(raw)
        receiver.feed(b"x")


@pytest.mark.parametrize("cut", range(1, len(RESPONSES) - 1, 7))
def test_a_response_that_is_cut_off_is_refused(cut: int) -> None:
    """Half an answer is none."""
    receiver = Receiver()
    receiver.feed(RESPONSES[:cut])
    while receiver.next() is not None:
        pass
    is_between = RESPONSES[:cut].endswith((b"hello", b"Content\r\n\r\n", b"x\r\n\r\n"))
    assert is_between is (not receiver._buffer and not receiver.has_head)

    with pytest.raises(WireError):
        receiver.feed(b"")


def test_a_request_holds_what_is_given() -> None:
    """Host, token, body and length."""
    request = Requests("localhost", "hf_x").render("POST", "/v1/batch", b"{}", "A: b\r\n")

    assert request == (
        b"POST /v1/batch HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer hf_x\r\nA: b\r\n"
        b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    )


def test_ops_on_one_record_never_overtake_each_other(relay: Relay, tmp_path: Path) -> None:
    """Whatever else travels beside them, and however often answers are lost."""

    async def body(hf: Any) -> None:
        rnd = random.Random(SEED)
        last: dict[str, int] = {}
        tasks = []
        for n in range(2_000):
            id = str(rnd.randrange(20))
            last[id] = n
            tasks.append(asyncio.create_task(hf.users.put(id, {"n": n})))
            if not n % 50:
                relay.lose += not n % 500
                await asyncio.sleep(0.001)
        answers = await asyncio.gather(*tasks)
        assert {item.id: orjson.loads(item.value)["n"] async for item in hf.users.list()} == last
        assert sum(answer.status == 201 for answer in answers) == 20

    on_relay(tmp_path, True, body)


# At the limits.


SPOILT: dict[str, tuple[Attempt, type[holdfast.HoldfastError]]] = {
    "an if_version that is none": (lambda hf: hf.users.put("x", {}, if_version="new"), holdfast.InvalidRecord),
    "more bytes than a body may have": (lambda hf: hf.users.put("x", {"n": "y" * (11 << 20)}), holdfast.TooLarge),
    "an id that is no text": (lambda hf: hf.users.put("\ud800", {}), holdfast.InvalidRecord),
    "an endless ttl": (lambda hf: hf.sessions.put("x", {}, ttl=float("inf")), holdfast.InvalidRecord),
}


@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("is_async", [False, True])
def test_an_op_that_spoils_its_request_harms_no_other(name: str, is_async: bool, relay: Relay, tmp_path: Path) -> None:
    """It alone is refused, though it travels with those of other tasks, or of its pipeline."""
    spoil, expected = SPOILT[name]

    async def body(hf: Any) -> None:
        if is_async:
            tasks = [hf.users.put(str(n), {}) for n in range(20)]
            tasks.insert(7, spoil(hf))
            found = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [one for one in found if isinstance(one, BaseException)]
            assert [type(one) for one in refused] == [expected] == [type(found[7])], refused
        else:
            with pytest.raises(expected), hf.pipeline():
                for n in range(20):
                    hf.users.put(str(n), {})
                    if n == 7:
                        spoil(hf)
        assert await settled(hf.users.count()) == 20

    on_relay(tmp_path, is_async, body)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_daemon_may_allow_less_than_clients_send(is_async: bool, tmp_path: Path) -> None:
    """With smaller limits of its own, what clients put together by themselves comes in smaller pieces."""

    async def body() -> None:
        if is_async:
            async with holdfast.aio.connect(address) as hf:
                await asyncio.gather(*(hf.users.put(str(n), {}) for n in range(100)))
        else:
            with holdfast.connect(address) as hf, hf.pipeline():
                for n in range(100):
                    hf.users.put(str(n), {})

    with daemon_in_thread(tmp_path, batch_ops=7) as served:
        address = f"unix:{served.socket_path}"
        asyncio.run(asyncio.wait_for(body(), TEST_S))
        with holdfast.connect(address) as hf:
            assert len(hf.users) == 100


def test_closing_ends_what_tasks_have_under_way(tmp_path: Path) -> None:
    """Questions, changes in whatever state, a lease that is waited for, an event stream: nobody waits on."""

    async def body() -> None:
        with holdfast.connect(address) as other:
            other.sessions.lease("x", ttl=20)
            for turns in range(6):
                async with holdfast.aio.connect(address) as hf:
                    await hf.users.put("a", {})
                    waiting = [asyncio.create_task(_listed(hf.events())), asyncio.create_task(_leased(hf, "x"))]
                    await asyncio.sleep(0.05)
                    quick = [asyncio.create_task(hf.users.get("a")), asyncio.create_task(hf.users.put("b", {}))]
                    for _ in range(turns):
                        await asyncio.sleep(0)
                found = await asyncio.wait_for(asyncio.gather(*waiting, *quick, return_exceptions=True), 5)
                assert found[0] == []
                assert isinstance(found[1], holdfast.Unavailable)
                for one in found[2:]:
                    assert not isinstance(one, BaseException) or isinstance(one, holdfast.Unavailable)

    async def _listed(events: Any) -> list[Any]:
        return [event async for event in events]

    async def _leased(hf: Any, id: str) -> None:
        async with hf.sessions.lease(id, ttl=5, timeout=20):
            raise AssertionError("somebody else has it")

    with daemon_in_thread(tmp_path) as served:
        address = f"unix:{served.socket_path}"
        asyncio.run(asyncio.wait_for(body(), TEST_S))


def test_closing_ends_what_threads_wait_for(tmp_path: Path) -> None:
    """An event stream, and a call that waits for a daemon that is away."""
    found: list[Any] = []

    def call() -> None:
        try:
            away.users.get("1")
        except holdfast.HoldfastError as error:
            found.append(error)

    with daemon_in_thread(tmp_path) as served:
        hf = holdfast.connect(f"unix:{served.socket_path}")
        away = holdfast.connect(f"unix:{tmp_path / 'none.sock'}", timeout=TEST_S)
        events = hf.events()
        threads = [threading.Thread(target=lambda: found.extend(events)), threading.Thread(target=call)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        started = time.monotonic()

        hf.close()
        away.close()
        for thread in threads:
            thread.join(TEST_S)

        assert time.monotonic() - started < 2
        assert [str(one) for one in found] == ["closed; connect again"]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_timeout_is_for_all_tries_together(is_async: bool, tmp_path: Path) -> None:
    """A server that always hangs up late gets no more time than one that never answers."""
    path = tmp_path / "x.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(10)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(1 << 16)
                    time.sleep(0.35)

    async def body() -> None:
        if is_async:
            async with holdfast.aio.connect(f"unix:{path}", timeout=0.5) as hf:
                await hf.users.put("1", {})
        else:
            with holdfast.connect(f"unix:{path}", timeout=0.5) as hf:
                hf.users.put("1", {})

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(holdfast.Unavailable):
        asyncio.run(body())
    took_s = time.monotonic() - started
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(TEST_S)

    assert took_s < 0.8


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), None, "5"])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    """At once, in both forms."""

    async def body() -> None:
        async with holdfast.aio.connect("unix:x", timeout=timeout):
            pass

    with pytest.raises(holdfast.SettingsError, match="seconds above 0"):
        holdfast.connect("unix:x", timeout=timeout)
    with pytest.raises(holdfast.SettingsError, match="seconds above 0"):
        asyncio.run(body())


def test_an_answer_to_fewer_ops_is_told(tmp_path: Path) -> None:
    """Nobody waits for an answer that will not come."""

    async def body() -> None:
        async with holdfast.aio.connect(address) as hf:
            with pytest.raises(holdfast.Unavailable, match="answers to 1 ops, found 0"):
                await asyncio.wait_for(hf.users.put("1", {}), TEST_S)

    address = f"unix:{tmp_path / 'x.sock'}"
    with answering(tmp_path / "x.sock", http_answer(200, b'{"seq":0,"results":[]}', "holdfast/99.1.0")):
        asyncio.run(body())
        with holdfast.connect(address) as hf, pytest.raises(holdfast.Unavailable, match="found 0"):
            hf.users.put("1", {})


class Cutter:
    """Stands between client and daemon, and cuts each connection after a random number of bytes.

    Attributes:
        cuts: how many.
    """

    def __init__(self, path: Path, target: Path, rnd: random.Random, bytes_max: int) -> None:
        self.cuts = 0
        self._target = str(target)
        self._rnd = rnd
        self._bytes_max = bytes_max
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(100)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            server.connect(self._target)
            ways = [(client, server), (server, client)]
            threads = [threading.Thread(target=self._pass_on, args=way, daemon=True) for way in ways]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        left = self._rnd.randrange(1, self._bytes_max)
        with contextlib.suppress(OSError):
            while left and (data := source.recv(left)):
                target.sendall(data)
                left -= len(data)
            self.cuts += not left
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cutter(daemon: Daemon, tmp_path: Path) -> Iterator[Cutter]:
    """A cutter before a daemon process; its socket is ``tmp_path/relay.sock``."""
    cutter = Cutter(tmp_path / "relay.sock", daemon.data_dir / "holdfast.sock", random.Random(SEED), 4_000)
    yield cutter
    cutter.close()


def test_connections_that_break_at_any_byte_lose_nothing(cutter: Cutter, tmp_path: Path) -> None:
    """Requests and answers cut anywhere: each order counts once, for threads and for tasks, some of which give up."""
    address = f"unix:{tmp_path / 'relay.sock'}"
    counted, given_up = [0], [0]
    failures: list[BaseException] = []

    def thread() -> None:
        try:
            for _ in range(200):
                hf.stats.order("ring")
                counted[0] += 1
        except BaseException as error:
            failures.append(error)

    async def tasks() -> None:
        rnd = random.Random(SEED)

        async def one() -> None:
            for _ in range(50):
                try:
                    async with asyncio.timeout(rnd.choice([0.002, TEST_S])):
                        await remote.stats.order("ring")
                    counted[0] += 1
                except TimeoutError:
                    given_up[0] += 1

        async with holdfast.aio.connect(address) as remote:
            # Who was never reached is waited for less long, and of a large request nearly every try is cut.
            await remote.status()
            await asyncio.gather(*(one() for _ in range(20)))

    with holdfast.connect(address) as hf:
        threads = [threading.Thread(target=thread) for _ in range(2)]
        for worker in threads:
            worker.start()
        asyncio.run(asyncio.wait_for(tasks(), TEST_S))
        for worker in threads:
            worker.join(TEST_S)
        orders = hf.stats.sales()["totals"]["allTimeOrders"]

    print(f"{cutter.cuts} cuts, {counted[0]} orders counted, {given_up[0]} given up, {orders} in the figures")
    assert not failures, failures[0]
    assert cutter.cuts > 20
    assert counted[0] + given_up[0] == 1_400
    assert counted[0] <= orders <= counted[0] + given_up[0]


@pytest.mark.parametrize("ops", [[], ["user.*"]])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_that_breaks_at_any_byte_shows_all_once(
    is_async: bool, ops: list[str], cutter: Cutter, daemon: Daemon, tmp_path: Path
) -> None:
    """Also within a batch, of which it had shown a part, and with a reader that looks in for a moment at a time."""
    address = f"unix:{tmp_path / 'relay.sock'}"
    seen: list[tuple[int, str]] = []

    async def read() -> None:
        async with holdfast.aio.connect(address) as remote:
            events = remote.events(after=0, ops=ops)
            while not seen or seen[-1][1] != "end":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.005):
                        event = await anext(events)
                        seen.append((event.seq, event.id))

    expected = []
    with holdfast.connect(f"unix:{daemon.data_dir / 'holdfast.sock'}") as hf:
        for n in range(200):
            with hf.atomic():
                for k in range(n % 7):
                    (hf.sessions if k % 2 and ops else hf.users).put(f"{n}-{k}", {"text": "y" * 20 * k})
                    if not (k % 2 and ops):
                        expected.append(f"{n}-{k}")
        hf.users.put("end", {})
        if is_async:
            asyncio.run(asyncio.wait_for(read(), TEST_S))
        else:
            with holdfast.connect(address) as remote, remote.events(after=0, ops=ops) as events:
                for event in events:
                    seen.append((event.seq, event.id))
                    if event.id == "end":
                        break

    assert [id for _, id in seen] == [*expected, "end"]
    assert [seq for seq, _ in seen] == sorted(seq for seq, _ in seen)
    assert cutter.cuts > 10


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_of_nonsense_ends(is_async: bool, tmp_path: Path) -> None:
    """After the timeout, with the reason, and not without a pause between the tries."""
    path = tmp_path / "x.sock"
    connections = [0]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(10)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    connections[0] += 1
                    client.recv(1 << 16)
                    client.sendall(
                        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n16\r\nid: 5\n: from event 6\n\n\r\n"
                    )
                    time.sleep(0.01)
                    client.sendall(b"12\r\nid: 6\ndata: {no}\n\n\r\n")

    async def read() -> None:
        async with holdfast.aio.connect(f"unix:{path}", timeout=0.5) as remote:
            await anext(remote.events())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(holdfast.Unavailable, match="event that cannot be read"):
        if is_async:
            asyncio.run(asyncio.wait_for(read(), TEST_S))
        else:
            with holdfast.connect(f"unix:{path}", timeout=0.5) as hf:
                next(iter(hf.events()))
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(TEST_S)

    assert 2 < connections[0] < 20


def test_threads_make_do_with_few_connections(tmp_path: Path) -> None:
    """Where the daemon takes fewer than there are threads, one thread goes on with what another has no use for."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                hf.stats.order("ring")
        except BaseException as error:
            failures.append(error)

    with (
        daemon_in_thread(tmp_path, connections=3) as served,
        holdfast.connect(f"unix:{served.socket_path}", timeout=10) as hf,
    ):
        threads = [threading.Thread(target=work) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TEST_S)
        assert not failures, failures[0]
        assert hf.stats.sales()["totals"]["allTimeOrders"] == 240
