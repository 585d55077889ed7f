"""The library in this process: what only the embedded forms have. What all forms share is in test_library.py."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import errors
from tests.engine_harness import ANSWER_S


@pytest.fixture(params=["open", "aio.open"])
def use(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """Runs a test's body with a library opened in either way."""

    def run(body: Callable[[Any], Awaitable[None]], **settings: Any) -> None:
        async def inside() -> None:
            if request.param == "open":
                with holdfast.open(tmp_path, **settings) as hf:
                    await body(hf)
            else:
                async with holdfast.aio.open(tmp_path, **settings) as hf:
                    await body(hf)

        asyncio.run(asyncio.wait_for(inside(), ANSWER_S))

    return run


def test_many_tasks_share_syncs(tmp_path: Path) -> None:
    """Coroutines that write at once are acknowledged together."""

    async def body() -> None:
        async with holdfast.aio.open(tmp_path) as hf:
            answers = await asyncio.gather(*(hf.sessions.put(str(n), {}) for n in range(500)))
            assert sorted(answer.seq for answer in answers) == list(range(1, 501))
            assert len(hf.sessions) == 500

    asyncio.run(asyncio.wait_for(body(), ANSWER_S))


def test_settings_are_keywords(use: Callable[..., None]) -> None:
    """By their names, sections as mappings, text or numbers."""

    async def body(hf: Any) -> None:
        assert hf.engine.settings.flush_every == 60
        assert hf.engine.settings.sessions.ttl == 43_200
        assert hf.engine.settings.mirror is False

    use(body, flush_every="1m", sessions={"ttl": "12h"}, mirror=False)


@pytest.mark.parametrize("wrong", [{"nonsense": 1}, {"sessions": {"tll": 1}}, {"durability": "sometimes"}])
def test_unknown_settings_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    """Before the directory is touched."""
    with pytest.raises(holdfast.SettingsError):
        holdfast.open(tmp_path / "data", **wrong)

    assert not (tmp_path / "data").exists()


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    """A with-block around a library that was closed inside it does no harm."""
    with holdfast.open(tmp_path) as hf:
        hf.close()
        hf.close()


def test_a_second_library_is_refused(tmp_path: Path) -> None:
    """One process owns a directory, and owns it once."""
    with holdfast.open(tmp_path), pytest.raises(holdfast.DirectoryLocked):
        holdfast.open(tmp_path)


def test_every_name_is_there() -> None:
    """What the package promises can be imported; what it does not, not."""
    for name in holdfast.__all__:
        assert getattr(holdfast, name) is not None
    with pytest.raises(AttributeError):
        holdfast.nonsense  # noqa: B018


def test_idle_sessions_expire_by_themselves(tmp_path: Path) -> None:
    """Nobody has to call anything."""
    with holdfast.open(tmp_path):
        names = {thread.name for thread in threading.enumerate()}

        assert {"holdfast-keeper", "holdfast-journal"} <= names
    assert not {"holdfast-keeper", "holdfast-journal"} & {thread.name for thread in threading.enumerate()}


def test_an_opening_that_is_cancelled_gives_the_directory_back(tmp_path: Path) -> None:
    """Whoever cancels aio.open midway can open the directory again at once."""

    async def cancelled_open() -> None:
        async def opened() -> None:
            async with holdfast.aio.open(tmp_path / "data"):
                raise AssertionError("it was cancelled before")

        task = asyncio.create_task(opened())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(cancelled_open())

    with holdfast.open(tmp_path / "data") as hf:
        hf.users.put("u", {"name": "Ana"})


@pytest.mark.parametrize("is_async", [False, True])
def test_a_relative_directory_is_below_the_working_directory(
    is_async: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``open("data")`` means ./data, as every program means a relative path."""
    monkeypatch.chdir(tmp_path)

    async def opened() -> None:
        async with holdfast.aio.open("data") as hf:
            await hf.users.put("u", {"name": "Ana"})

    if is_async:
        asyncio.run(opened())
    else:
        with holdfast.open("data") as hf:
            hf.users.put("u", {"name": "Ana"})

    assert (tmp_path / "data" / "users.json").exists()


def test_no_settings_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holdfast.toml beside the program, and the environment, are the daemon's; keywords alone count here."""
    (tmp_path / "holdfast.toml").write_text("nonsense = true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOLDFAST_DURABILITY", "interval")

    with holdfast.open("data", sessions={"ttl": "2h"}, flush_every=60) as hf:
        settings = hf.engine.settings

    assert (settings.durability, settings.sessions.ttl, settings.flush_every) == ("always", 7200, 60)


def test_a_keyword_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    """A typing error never runs as a default."""
    with pytest.raises(errors.SettingsError, match=r"sessions\.tll.*did you mean sessions\.ttl"):
        holdfast.open(tmp_path, sessions={"tll": "2h"})
