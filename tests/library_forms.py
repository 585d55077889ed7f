"""The four forms of the library behind one face, so that one test runs against all of them."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import holdfast
from tests.http_harness import Served, serving

TEST_S = 30.0
"""More than any body here takes, so that a hang fails instead of hanging."""

FORMS = ["open", "aio.open", "connect", "aio.connect"]


async def settled(result: Any) -> Any:
    """What a call comes to: as it is, awaited, or listed."""
    if inspect.isawaitable(result):
        return await result
    if hasattr(result, "__anext__"):
        return [item async for item in result]
    if hasattr(result, "__next__"):
        return list(result)
    return result


class Block:
    """``with`` and ``async with`` as one."""

    def __init__(self, block: Any) -> None:
        self._block = block

    async def __aenter__(self) -> Any:
        return await settled(
            self._block.__aenter__() if hasattr(self._block, "__aenter__") else self._block.__enter__()
        )

    async def __aexit__(self, *error: Any) -> Any:
        leave = self._block.__aexit__ if hasattr(self._block, "__aexit__") else self._block.__exit__
        return await settled(leave(*error))


@contextlib.contextmanager
def daemon_in_thread(data_dir: Path, **limits: Any) -> Iterator[Served]:
    """A real HTTP service on a real engine, in a thread with a loop of its own."""
    ready = threading.Event()
    stop: list[Callable[[], None]] = []
    found: list[Served] = []

    async def serve() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()
        async with serving(data_dir, **limits) as served:
            found.append(served)
            stop.append(lambda: loop.call_soon_threadsafe(done.set))  # type: ignore[arg-type, return-value]
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(TEST_S), "the service did not start"
        yield found[0]
    finally:
        stop[0]()
        thread.join(TEST_S)


@contextlib.asynccontextmanager
async def opened(form: str, data_dir: Path, **settings: Any) -> AsyncIterator[Any]:
    """The library in one of its FORMS, on *data_dir*."""
    if form == "open":
        with holdfast.open(data_dir, **settings) as hf:
            yield hf
    elif form == "aio.open":
        async with holdfast.aio.open(data_dir, **settings) as hf:
            yield hf
    else:
        assert not settings, "a client has no settings of the daemon"
        with daemon_in_thread(data_dir) as served:
            if form == "connect":
                with holdfast.connect(f"unix:{served.socket_path}") as hf:
                    yield hf
            else:
                async with holdfast.aio.connect(f"http://{served.tcp}", token=served.token) as hf:
                    yield hf


Use = Callable[[Callable[[Any], Awaitable[None]]], None]


@pytest.fixture(params=FORMS)
def use(request: pytest.FixtureRequest, tmp_path: Path) -> Use:
    """Runs a test's body with a library in each form."""

    def run(body: Callable[[Any], Awaitable[None]]) -> None:
        async def inside() -> None:
            async with opened(request.param, tmp_path) as hf:
                await body(hf)

        asyncio.run(asyncio.wait_for(inside(), TEST_S))

    return run
