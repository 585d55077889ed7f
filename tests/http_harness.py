"""A real HTTP service on a real engine, for the tests of the HTTP interface."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from holdfast.care.moments import Target
from holdfast.care.restore import RestoreState
from holdfast.care.restore_plan import RestorePlan
from holdfast.care.seal import AgeSeal
from holdfast.engine import Engine
from holdfast.errors import SettingsError
from holdfast.http.app import HttpService
from holdfast.ops import FlushReport
from holdfast.recovery import open_engine
from holdfast.settings import BackupSettings, LimitSettings, Settings

ANSWER_S = 10.0
"""More than any answer in these tests takes, so that a hang fails instead of hanging."""


class Answer(NamedTuple):
    """What came back over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The decoded body."""
        return msgspec.json.decode(self.body)


class Operator:
    """The operator's side of the service, in place of the supervisor."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.invalid = ""
        self.failure: Exception | None = None

    async def flush(self) -> FlushReport:
        if self.failure is not None:
            raise self.failure
        return await asyncio.to_thread(self.engine.flush, "api")

    async def reload(self) -> dict[str, Any]:
        if self.invalid:
            raise SettingsError(self.invalid)
        return {"changed": ["sessions.ttl"], "needs_restart": []}

    def restore(self, target: Target, planned: RestorePlan, seal: AgeSeal | None) -> RestoreState:
        return RestoreState(state="preparing", backup=planned.backup, at=planned.at)

    def restore_state(self) -> RestoreState:
        return RestoreState(state="idle")

    def status(self) -> dict[str, Any]:
        return self.engine.status()


class Served:
    """One running service with a client on its unix socket.

    Attributes:
        state: what ``/readyz`` is told; a test may change it.
    """

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.state = "RUNNING"
        self.settings = settings
        self.engine = engine
        self.operator = Operator(engine)
        self.service = HttpService(
            engine,
            settings,
            readiness=lambda: {"state": self.state, "reasons": engine.degraded},
            admin=self.operator,
        )
        self._session: aiohttp.ClientSession | None = None

    @property
    def socket_path(self) -> str:
        return next(one.removeprefix("unix:") for one in self.service.listening if one.startswith("unix:"))

    @property
    def tcp(self) -> str:
        """``HOST:PORT`` of the TCP address."""
        return next(one.removeprefix("tcp:") for one in self.service.listening if one.startswith("tcp:"))

    @property
    def token(self) -> str:
        return (self.settings.data_dir / "token").read_text().strip()

    async def ask(
        self,
        method: str,
        path: str,
        value: Any = None,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        by_tcp: bool = False,
    ) -> Answer:
        """One request through aiohttp; *path* is sent as it stands."""
        import yarl

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self.socket_path), auto_decompress=False
            )
        sent = {"Accept-Encoding": "identity"} | dict(headers or {})
        if value is not None:
            body = msgspec.json.encode(value)
        if body is not None:
            sent.setdefault("Content-Type", "application/json")
        session = aiohttp.ClientSession() if by_tcp else self._session
        host = self.tcp if by_tcp else "localhost"
        try:
            async with session.request(
                method,
                yarl.URL(f"http://{host}{path}", encoded=True),
                data=body,
                headers=sent,
                timeout=aiohttp.ClientTimeout(ANSWER_S),
            ) as response:
                return Answer(response.status, response.headers, await response.read())
        finally:
            if by_tcp:
                await session.close()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection to the unix socket."""
        return await asyncio.open_unix_connection(self.socket_path)

    async def send_raw(self, raw: bytes) -> bytes:
        """Send *raw* to the unix socket and return everything until the service closes."""
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            with contextlib.suppress(ConnectionError):
                return await asyncio.wait_for(reader.read(), ANSWER_S)
            return b""
        finally:
            writer.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self.service.stop()


def status_of(raw: bytes) -> int:
    """The status in a raw response; 0 when there is none."""
    return int(raw[9:12]) if raw.startswith(b"HTTP/1.1 ") else 0


@contextlib.asynccontextmanager
async def serving(data_dir: Path, **limits: Any) -> AsyncIterator[Served]:
    """A running service on a unix socket and on a TCP port of the system's choice, with these ``[limits]``."""
    settings = Settings(
        data_dir=data_dir,
        listen=("unix:", "tcp:127.0.0.1:0"),
        backups=BackupSettings(pitr=0),
        limits=msgspec.structs.replace(LimitSettings(), **limits),
    )
    engine = await asyncio.to_thread(open_engine, settings)
    served = Served(settings, engine)
    try:
        await served.service.start()
        yield served
    finally:
        await served.close()
        await asyncio.to_thread(engine.close)


def serve_and(scenario: Callable[[Served], Awaitable[None]], data_dir: Path, **limits: Any) -> None:
    """Run *scenario* against a running service."""

    async def run() -> None:
        async with serving(data_dir, **limits) as served:
            await scenario(served)

    asyncio.run(run())
