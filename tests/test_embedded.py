"""The library: the same behaviour with ``holdfast.open`` and with ``holdfast.aio.open``."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import errors
from tests.engine_harness import ANSWER_S

Body = Callable[[Any, Callable[[Any], Awaitable[Any]]], Awaitable[None]]


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

    async def __aenter__(self) -> None:
        await settled(self._block.__aenter__() if hasattr(self._block, "__aenter__") else self._block.__enter__())

    async def __aexit__(self, *error: Any) -> Any:
        leave = self._block.__aexit__ if hasattr(self._block, "__aexit__") else self._block.__exit__
        return await settled(leave(*error))


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


def test_sessions(use: Callable[..., None]) -> None:
    """Put, get, patch, touch, list, membership, length, delete."""

    async def body(hf: Any) -> None:
        answer = await settled(hf.sessions.put("57", {"currentState": "catalog"}))
        assert (answer.status, answer.version) == (201, 1)
        assert (await settled(hf.sessions.get("57")))["currentState"] == "catalog"
        await settled(hf.sessions.patch(57, {"n": 1}, if_version=1))
        assert (await settled(hf.sessions.touch("57", ttl="2h"))).version == 3
        assert [item.id for item in await settled(hf.sessions.list(state="catalog"))] == ["57"]
        assert "57" in hf.sessions and 57 in hf.sessions and "58" not in hf.sessions and object() not in hf.sessions
        assert len(hf.sessions) == 1
        await settled(hf.sessions.delete("57"))
        assert await settled(hf.sessions.get("57", "none")) == "none"
        with pytest.raises(holdfast.NotFound):
            await settled(hf.sessions.delete("57"))

    use(body)


def test_leases(use: Callable[..., None]) -> None:
    """Taken, fenced, renewed, released."""

    async def body(hf: Any) -> None:
        await settled(hf.sessions.put("57", {}))
        lease = await settled(hf.sessions.lease("57", 30, owner="w"))
        with pytest.raises(holdfast.Leased):
            await settled(hf.sessions.touch("57"))
        await settled(hf.sessions.lease("57", generation=lease.generation))
        await settled(hf.sessions.put("57", {}, lease=lease.generation))
        await settled(hf.sessions.release("57", lease.generation))
        await settled(hf.sessions.touch("57"))

    use(body)


def test_orders_and_figures(use: Callable[..., None]) -> None:
    """Orders of either state are one collection; money is exact, and a float is none."""

    async def body(hf: Any) -> None:
        for id in (1, 2, 3):
            await settled(hf.orders.put(id, {"productType": "ring"}))
        await settled(hf.orders.complete(1, "0.1"))
        await settled(hf.orders.complete(2, Decimal("0.2")))
        await settled(hf.orders.cancel(3, "no stock"))
        await settled(hf.stats.order("watch", at="2026-11-01T00:00:00Z"))
        await settled(hf.stats.completion(5))
        sales = await settled(hf.stats.sales())
        assert sales["totals"] == {"allTimeOrders": 4, "allTimeCompleted": 3, "allTimeRevenue": Decimal("5.3")}
        assert len(hf.orders) == 3 and 1 in hf.orders
        assert [item.id for item in await settled(hf.orders.list(state="cancelled"))] == ["3"]
        for wrong in (0.1, "much", True):
            with pytest.raises(holdfast.InvalidRecord):
                await settled(hf.orders.complete(1, wrong))
        await settled(hf.orders.delete(1))
        assert 1 not in hf.orders

    use(body)


def test_users_and_collections(use: Callable[..., None]) -> None:
    """They work alike."""

    async def body(hf: Any) -> None:
        for records in (hf.users, hf.collection("notes")):
            await settled(records.put("a", {"n": 1}))
            await settled(records.patch("a", {"n": 2}))
            found = await settled(records.record("a"))
            assert (found.id, found.version) == ("a", 2)
            assert len(records) == 1
            assert (await settled(records.page(limit=1))).items == [found]
            await settled(records.delete("a"))
            assert "a" not in records

    use(body)


def test_a_second_opening_has_everything(use: Callable[..., None], tmp_path: Path) -> None:
    """The block's end flushes; nothing is left locked."""

    async def write(hf: Any) -> None:
        await settled(hf.sessions.put("57", {"n": 1}))

    async def read(hf: Any) -> None:
        assert (await settled(hf.sessions.get("57")))["n"] == 1

    use(write)
    assert (tmp_path / "manifest.json").exists()
    use(read)


def test_atomic_is_all_or_nothing(use: Callable[..., None]) -> None:
    """At the end of the block, and not at all when an op is refused or the block fails."""

    async def body(hf: Any) -> None:
        async with Block(hf.atomic()):
            await settled(hf.sessions.put("1", {}))
            await settled(hf.orders.put("1", {}))
            assert await settled(hf.sessions.get("1")) is None
        assert len(hf.sessions) == len(hf.orders) == 1
        with pytest.raises(holdfast.NotFound) as refused:
            async with Block(hf.atomic()):
                await settled(hf.sessions.put("2", {}))
                await settled(hf.sessions.delete("absent"))
        assert refused.value.index == 1
        with pytest.raises(KeyError):
            async with Block(hf.atomic()):
                await settled(hf.sessions.put("3", {}))
                raise KeyError
        async with Block(hf.atomic()):
            pass
        assert [item.id for item in await settled(hf.sessions.list())] == ["1"]

    use(body)


def test_a_pipeline_is_acknowledged_at_its_end(use: Callable[..., None]) -> None:
    """Each op answers at once; a refused one raises where it stands, and the others have happened."""

    async def body(hf: Any) -> None:
        async with Block(hf.pipeline()):
            answers = [await settled(hf.sessions.put(str(n), {})) for n in range(100)]
            with pytest.raises(holdfast.VersionMismatch):
                await settled(hf.sessions.put("1", {}, if_version=0))
        assert [answer.seq for answer in answers] == list(range(1, 101))
        assert len(await settled(hf.sessions.list())) == 100
        async with Block(hf.pipeline(durability="everysec")):
            await settled(hf.sessions.put("last", {}))
        assert "last" in hf.sessions

    use(body)


def test_blocks_do_not_nest(use: Callable[..., None]) -> None:
    """Their ends would contradict each other."""

    async def body(hf: Any) -> None:
        for outer, inner in ((hf.atomic, hf.pipeline), (hf.pipeline, hf.atomic), (hf.atomic, hf.atomic)):
            with pytest.raises(errors.BadRequest):
                async with Block(outer()), Block(inner()):
                    pass
        await settled(hf.sessions.put("1", {}))
        assert "1" in hf.sessions

    use(body)


def test_two_libraries_do_not_share_a_block(use: Callable[..., None], tmp_path: Path) -> None:
    """An op goes to the directory that it was called on."""

    async def body(hf: Any) -> None:
        async with holdfast.aio.open(tmp_path / "other") as other:
            async with Block(hf.atomic()):
                await other.sessions.put("1", {})
                assert "1" in other.sessions
                async with other.atomic():
                    await other.sessions.put("2", {})
            assert len(hf.sessions) == 0
            assert len(other.sessions) == 2

    use(body)


def test_what_outlives_a_block_is_not_part_of_it(tmp_path: Path) -> None:
    """A task started inside an async block does its ops for itself, also when the block is long over."""

    async def body() -> None:
        async with holdfast.aio.open(tmp_path) as hf:
            go_on = asyncio.Event()

            async def later() -> int:
                await go_on.wait()
                return (await hf.sessions.put("late", {})).seq

            for block in (hf.atomic(), hf.pipeline()):
                go_on.clear()
                async with block:
                    task = asyncio.create_task(later())
                    await asyncio.sleep(0)
                go_on.set()
                assert await task > 0
                assert "late" in hf.sessions
                await hf.sessions.delete("late")

    asyncio.run(asyncio.wait_for(body(), ANSWER_S))


def test_blocks_belong_to_their_thread(tmp_path: Path) -> None:
    """Another thread's ops happen at once."""
    with holdfast.open(tmp_path) as hf:
        with hf.atomic():
            other = threading.Thread(target=lambda: hf.sessions.put("other", {}))
            other.start()
            other.join(ANSWER_S)
            assert "other" in hf.sessions
            hf.sessions.put("mine", {})
            assert "mine" not in hf.sessions
        assert "mine" in hf.sessions


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


def test_a_closed_library_is_refused(tmp_path: Path) -> None:
    """Closing twice is fine, using it afterwards is not."""
    hf = holdfast.open(tmp_path)
    hf.close()
    hf.close()

    for attempt in (lambda: hf.sessions.put("1", {}), lambda: hf.sessions.get("1"), hf.flush):
        with pytest.raises(holdfast.Unavailable):
            attempt()


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


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    """What the README shows a newcomer works as it stands there."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```python\n")[2].partition("```")[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    done = subprocess.run(
        [sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30
    )

    assert done.returncode == 0, done.stderr
    assert "awaiting_payment" in done.stdout and "119900" in done.stdout
    assert len(json.loads((tmp_path / "data" / "notes.json").read_text())) == 1000
