"""The library: the same behaviour in each of its four forms."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import errors
from tests.library_forms import FORMS, Block, Use, opened, settled, use

__all__ = ["use"]


async def ids_of(records: Any, **wanted: Any) -> list[str]:
    """The ids that a list has."""
    return sorted([item.id for item in await settled(records.list(**wanted))])


def test_sessions(use: Use) -> None:
    """Put, get, patch, touch, list, membership, length, delete."""

    async def body(hf: Any) -> None:
        answer = await settled(hf.sessions.put("57", {"currentState": "catalog"}))
        assert (answer.status, answer.version, answer.id) == (201, 1, "57")
        assert (await settled(hf.sessions.get("57")))["currentState"] == "catalog"
        await settled(hf.sessions.patch(57, {"n": 1}, if_version=1))
        assert (await settled(hf.sessions.touch("57", ttl="2h"))).version == 3
        assert await ids_of(hf.sessions, state="catalog") == ["57"]
        assert await ids_of(hf.sessions, state="paid") == []
        for id, is_there in (("57", True), (57, True), ("58", False)):
            assert await settled(hf.sessions.contains(id)) is is_there
        assert await settled(hf.sessions.count()) == 1
        assert (await settled(hf.sessions.delete("57"))).status == 204
        assert await settled(hf.sessions.get("57", "none")) == "none"
        with pytest.raises(holdfast.NotFound):
            await settled(hf.sessions.delete("57"))

    use(body)


@pytest.mark.parametrize("form", ["open", "aio.open", "connect"])
def test_in_and_len(form: str, tmp_path: Path) -> None:
    """Wherever no await is needed a collection is asked as Python asks."""

    async def body() -> None:
        async with opened(form, tmp_path) as hf:
            await settled(hf.sessions.put("57", {}))
            await settled(hf.orders.put(1, {}))
            await settled(hf.orders.complete(1))
            assert "57" in hf.sessions and 57 in hf.sessions and "58" not in hf.sessions and object() not in hf.sessions
            assert len(hf.sessions) == len(hf.orders) == 1
            assert 1 in hf.orders and 1 not in hf.users

    asyncio.run(body())


def test_any_id_is_found_again(use: Use) -> None:
    """Whatever may be an id is the same record in every call, also where it must be encoded on its way."""

    async def body(hf: Any) -> None:
        for id in ("a/b", "..", ".", "ñ 价", "a?b#c", "%2e", "a+b", '"', "x" * 256):
            await settled(hf.sessions.put(id, {"for": id}))
            assert (await settled(hf.sessions.get(id)))["for"] == id
            assert (await settled(hf.sessions.record(id))).id == id
            await settled(hf.sessions.touch(id))
        assert await settled(hf.sessions.count()) == 9

    use(body)


def test_values_come_back_as_they_were(use: Use) -> None:
    """Every value that may be kept; what may not is refused with the same code."""

    async def body(hf: Any) -> None:
        kept = {
            "n": None,
            "i": 2**64 - 1,
            "j": -(2**63),
            "f": 0.1,
            "t": "価\n\x7f",
            "l": [1, [2]],
            "o": {"a": {}},
            "b": True,
        }
        await settled(hf.collection("notes").put("1", kept))
        assert await settled(hf.collection("notes").get("1")) == kept | {"id": "1"}
        for wrong in ({"n": float("nan")}, {"n": 2**64}, {"t": "\ud800"}, {"n": float("inf")}, {1: 2}, {"s": {1, 2}}):
            with pytest.raises(holdfast.InvalidRecord):
                await settled(hf.collection("notes").put("2", wrong))
        assert await settled(hf.collection("notes").get("2")) is None

    use(body)


def test_refusals_have_their_class_and_code(use: Use) -> None:
    """What a program catches does not depend on where its state is."""

    async def body(hf: Any) -> None:
        await settled(hf.sessions.put("57", {}))
        await settled(hf.orders.put(1, {}))
        await settled(hf.orders.cancel(1))
        for kind, code, attempt in (
            (holdfast.NotFound, "not_found", lambda: hf.sessions.patch("absent", {})),
            (holdfast.VersionMismatch, "version_mismatch", lambda: hf.sessions.put("57", {}, if_version=0)),
            (holdfast.Conflict, "conflict", lambda: hf.orders.complete(1)),
            (holdfast.InvalidRecord, "invalid_record", lambda: hf.sessions.put("57", {"recipientPhone": "58"})),
            (holdfast.InvalidRecord, "invalid_record", lambda: hf.sessions.put("", {})),
            (holdfast.InvalidRecord, "invalid_record", lambda: hf.collection("../x").put("1", {})),
            (holdfast.TooLarge, "too_large", lambda: hf.sessions.put("57", {"t": "x" * (1 << 20)})),
        ):
            with pytest.raises(kind) as refused:
                await settled(attempt())
            assert refused.value.code == code and type(refused.value) is kind and refused.value.detail

    use(body)


def test_an_update_reads_changes_and_puts(use: Use) -> None:
    """With a default it makes the record; without one it says that there is none."""

    async def body(hf: Any) -> None:
        def more(value: dict[str, Any]) -> None:
            value["n"] = value.get("n", 0) + 1

        with pytest.raises(holdfast.NotFound):
            await settled(hf.users.update("a", more))
        assert (await settled(hf.users.update("a", more, default={}))).version == 1
        assert (await settled(hf.users.update("a", more))).version == 2
        await settled(hf.users.update("a", lambda value: {"n": value["n"] * 10}))
        assert (await settled(hf.users.get("a")))["n"] == 20

    use(body)


def test_an_update_tries_again_when_another_was_faster(use: Use) -> None:
    """Nobody's change is lost: the function is called anew with what the other has left."""

    async def body(hf: Any) -> None:
        seen: list[int] = []
        await settled(hf.users.put("a", {"n": 0}))
        loop = asyncio.get_running_loop()
        others = [hf.users.put("a", {"n": n}) if not asyncio.iscoroutinefunction(hf.users.put) else None for n in ()]
        assert not others

        async def update() -> None:
            def change(value: dict[str, Any]) -> dict[str, Any]:
                seen.append(value["n"])
                return value | {"n": value["n"] + 1}

            if type(hf).__name__.startswith("Async"):
                await asyncio.gather(*(hf.users.update("a", change) for _ in range(8)))
            else:
                await asyncio.gather(*(loop.run_in_executor(None, hf.users.update, "a", change) for _ in range(8)))

        await update()

        assert (await settled(hf.users.get("a")))["n"] == 8
        assert sorted(set(seen)) == list(range(8))

    use(body)


def test_leases(use: Use) -> None:
    """Taken, fenced, renewed, released."""

    async def body(hf: Any) -> None:
        await settled(hf.sessions.put("57", {}))
        lease = await settled(hf.sessions.lease("57", 30, owner="w"))
        with pytest.raises(holdfast.Leased, match="by w"):
            await settled(hf.sessions.touch("57"))
        with pytest.raises(holdfast.Leased):
            await settled(hf.sessions.lease("57", timeout=0))
        before = lease.expires_at
        await asyncio.sleep(0.002)
        await settled(lease.renew())
        assert lease.expires_at > before
        await settled(hf.sessions.put("57", {}, lease=lease.generation))
        await settled(lease.patch({"n": 1}))
        assert (await settled(lease.get()))["n"] == 1
        await settled(lease.release())
        await settled(lease.release())
        await settled(hf.sessions.touch("57"))

    use(body)


def test_a_lease_is_a_block(use: Use) -> None:
    """Held inside, given back at its end, also when the block fails."""

    async def body(hf: Any) -> None:
        with contextlib.suppress(KeyError):
            async with Block(hf.sessions.lease("57", ttl="30s")) as session:
                await settled(session.put({"n": 1}))
                await settled(session.touch())
                with pytest.raises(holdfast.Leased):
                    await settled(hf.sessions.put("57", {}))
                raise KeyError
        await settled(hf.sessions.put("57", {"n": 2}))
        async with Block(hf.sessions.lease("57")) as session:
            assert session.generation > 0
            await settled(session.delete())
        assert await settled(hf.sessions.get("57")) is None

    use(body)


def test_a_lost_lease_is_told(use: Use) -> None:
    """Who came too late cannot write any more, and ends cleanly."""

    async def body(hf: Any) -> None:
        await settled(hf.sessions.put("57", {"n": 1}))
        lease = await settled(hf.sessions.lease("57", 0.05))
        await asyncio.sleep(0.1)
        with pytest.raises(holdfast.Conflict, match="has ended"):
            await settled(lease.put({"n": 2}))
        with pytest.raises(holdfast.Conflict, match="has ended"):
            await settled(lease.renew())
        assert lease.is_lost
        other = await settled(hf.sessions.lease("57", timeout=0))
        with pytest.raises(holdfast.Leased):
            await settled(lease.put({"n": 2}))
        await settled(lease.release())
        await settled(other.release())
        assert (await settled(hf.sessions.get("57")))["n"] == 1

    use(body)


def test_a_block_renews_its_lease(use: Use) -> None:
    """It holds for as long as the work takes, however short its ttl."""

    async def body(hf: Any) -> None:
        async with Block(hf.sessions.lease("57", 0.3)) as session:
            await asyncio.sleep(1.0)
            assert not session.is_lost
            await settled(session.put({"n": 1}))
            with pytest.raises(holdfast.Leased):
                await settled(hf.sessions.lease("57", timeout=0))

    use(body)


def test_a_lease_of_no_duration_is_refused(use: Use) -> None:
    """Before anything is asked for."""

    async def body(hf: Any) -> None:
        for wrong in ("soon", -1, 0, "2h"):
            with pytest.raises(holdfast.InvalidRecord):
                await settled(hf.sessions.lease("57", wrong))

    use(body)


def test_orders_and_figures(use: Use) -> None:
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
        assert await settled(hf.orders.count()) == 3
        assert await ids_of(hf.orders, state="cancelled") == ["3"]
        for wrong in (0.1, "much", True):
            with pytest.raises(holdfast.InvalidRecord):
                await settled(hf.orders.complete(1, wrong))
        await settled(hf.orders.delete(1))
        assert not await settled(hf.orders.contains(1))

    use(body)


def test_users_and_collections(use: Use) -> None:
    """They work alike."""

    async def body(hf: Any) -> None:
        for records in (hf.users, hf.collection("notes")):
            await settled(records.put("a", {"n": 1}))
            await settled(records.patch("a", {"n": 2, "m": None}))
            found = await settled(records.record("a"))
            assert (found.id, found.version) == ("a", 2)
            assert await settled(records.count()) == 1
            assert (await settled(records.page(limit=1))).items == [found]
            await settled(records.delete("a"))
            assert not await settled(records.contains("a"))

    use(body)


def test_lists_are_whole(use: Use) -> None:
    """More than a page, each record once, filtered by time."""

    async def body(hf: Any) -> None:
        async with Block(hf.pipeline()):
            for n in range(2_500):
                await settled(hf.sessions.put(str(n), {"lastActivity": "2999-01-01T00:00:00Z"} if n % 2 else {}))
        assert await ids_of(hf.sessions) == sorted(map(str, range(2_500)))
        assert len(await ids_of(hf.sessions, since_ms=32_000_000_000_000)) == 1_250
        page = await settled(hf.sessions.page(limit=7))
        assert len(page.items) == 7 and page.next
        with pytest.raises(errors.BadRequest):
            await settled(hf.sessions.page(cursor="nonsense"))

    use(body)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_opening_has_everything(form: str, tmp_path: Path) -> None:
    """The end of a program, or of a daemon, leaves all in the files and nothing locked."""

    async def write() -> None:
        async with opened(form, tmp_path) as hf:
            await settled(hf.sessions.put("57", {"n": 1}))

    async def read() -> None:
        async with opened(form, tmp_path) as hf:
            assert (await settled(hf.sessions.get("57")))["n"] == 1

    asyncio.run(write())
    assert (tmp_path / "manifest.json").exists()
    asyncio.run(read())


def test_a_flush_writes_the_files(use: Use, tmp_path: Path) -> None:
    """And says what it wrote."""

    async def body(hf: Any) -> None:
        await settled(hf.sessions.put("57", {"n": 1}))
        report = await settled(hf.flush())
        assert (report.reason, report.snapshot_seq) == ("api", 1) and report.files >= 1
        assert '"recipientPhone":"57"' in (tmp_path / "chat_sessions.json").read_text()
        assert (await settled(hf.status()))["snapshot_seq"] == 1

    use(body)


def test_atomic_is_all_or_nothing(use: Use) -> None:
    """At the end of the block, and not at all when an op is refused or the block fails."""

    async def body(hf: Any) -> None:
        async with Block(hf.atomic()):
            await settled(hf.sessions.put("1", {}))
            await settled(hf.orders.put("1", {}))
            assert await settled(hf.sessions.get("1")) is None
        assert await settled(hf.sessions.count()) == await settled(hf.orders.count()) == 1
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
        assert await ids_of(hf.sessions) == ["1"]

    use(body)


def test_a_pipeline_is_acknowledged_at_its_end(use: Use) -> None:
    """A refused op keeps nobody back, and is raised at the end; what an exception leaves behind has happened."""

    async def body(hf: Any) -> None:
        with pytest.raises(holdfast.VersionMismatch):
            async with Block(hf.pipeline()):
                for n in range(1_500):
                    await settled(hf.sessions.put(str(n), {}))
                await settled(hf.sessions.put("1", {}, if_version=0))
                await settled(hf.sessions.put("2", {"n": float("nan")}))
                await settled(hf.sessions.put("behind", {}))
        assert await settled(hf.sessions.count()) == 1_501
        async with Block(hf.pipeline(durability="everysec")):
            await settled(hf.sessions.put("last", {}))
        assert await settled(hf.sessions.contains("last"))
        with pytest.raises(KeyError):
            async with Block(hf.pipeline()):
                await settled(hf.sessions.put("kept", {}))
                raise KeyError
        assert await settled(hf.sessions.contains("kept"))

    use(body)


def test_ops_of_one_task_happen_in_their_order(use: Use) -> None:
    """The last put of a record is the one that stays."""

    async def body(hf: Any) -> None:
        async with Block(hf.pipeline()):
            for n in range(300):
                await settled(hf.users.put("a", {"n": n}))
        assert (await settled(hf.users.get("a")))["n"] == 299
        assert (await settled(hf.users.record("a"))).version == 300

    use(body)


def test_blocks_do_not_nest(use: Use) -> None:
    """Their ends would contradict each other."""

    async def body(hf: Any) -> None:
        for outer, inner in ((hf.atomic, hf.pipeline), (hf.pipeline, hf.atomic), (hf.atomic, hf.atomic)):
            with pytest.raises(errors.BadRequest):
                async with Block(outer()), Block(inner()):
                    pass
        await settled(hf.sessions.put("1", {}))
        assert await settled(hf.sessions.contains("1"))

    use(body)


def test_two_libraries_do_not_share_a_block(use: Use, tmp_path: Path) -> None:
    """An op goes to the directory that it was called on."""

    async def body(hf: Any) -> None:
        async with holdfast.aio.open(tmp_path / "other") as other:
            async with Block(hf.atomic()):
                await other.sessions.put("1", {})
                assert "1" in other.sessions
                async with other.atomic():
                    await other.sessions.put("2", {})
            assert await settled(hf.sessions.count()) == 0
            assert len(other.sessions) == 2

    use(body)


@pytest.mark.parametrize("form", ["aio.open", "aio.connect"])
def test_what_outlives_a_block_is_not_part_of_it(form: str, tmp_path: Path) -> None:
    """A task started inside an async block does its ops for itself, also when the block is long over."""

    async def body() -> None:
        async with opened(form, tmp_path) as hf:
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
                await hf.sessions.delete("late")

    asyncio.run(body())


@pytest.mark.parametrize("form", ["open", "connect"])
def test_blocks_belong_to_their_thread(form: str, tmp_path: Path) -> None:
    """Another thread's ops happen at once."""

    async def body() -> None:
        async with opened(form, tmp_path) as hf:
            with hf.atomic():
                other = threading.Thread(target=lambda: hf.sessions.put("other", {}))
                other.start()
                other.join(10)
                assert "other" in hf.sessions
                hf.sessions.put("mine", {})
                assert "mine" not in hf.sessions
            assert "mine" in hf.sessions

    asyncio.run(body())


def test_idempotency_keys(use: Use) -> None:
    """A repeat gets the first answer, and another op under the same key is refused."""

    async def body(hf: Any) -> None:
        first = await settled(hf.stats.order("ring", idempotency_key="k"))
        assert (await settled(hf.stats.order("ring", idempotency_key="k"))).seq == first.seq
        with pytest.raises(holdfast.Conflict):
            await settled(hf.stats.completion(1, idempotency_key="k"))
        assert (await settled(hf.stats.sales()))["totals"]["allTimeOrders"] == 1

    use(body)


def test_a_closed_library_is_refused(use: Use) -> None:
    """What is over is over."""
    left: list[Any] = []

    async def body(hf: Any) -> None:
        await settled(hf.sessions.put("1", {}))
        left.append(hf)

    async def attempts() -> None:
        hf = left[0]
        for attempt in (lambda: hf.sessions.put("1", {}), lambda: hf.sessions.get("1"), hf.flush):
            with pytest.raises(holdfast.Unavailable):
                await settled(attempt())

    use(body)
    asyncio.run(attempts())


def test_events_show_what_happened_in_order(use: Use) -> None:
    """From now on, from the beginning, from anywhere; filtered; an atomic batch op by op."""

    async def body(hf: Any) -> None:
        async def take(count: int, *args: Any, **wanted: Any) -> list[tuple[int, str, str | None]]:
            found: list[tuple[int, str, str | None]] = []
            stream = hf.events(*args, **wanted)
            try:
                while len(found) < count:
                    event = await settled(stream.__anext__()) if is_async else await asyncio.to_thread(next, stream)
                    found.append((event.seq, event.op, event.id))
            finally:
                stream.close()
            return found

        is_async = type(hf).__name__.startswith("Async")
        await settled(hf.sessions.put("1", {}))
        await settled(hf.orders.put("7", {}))
        async with Block(hf.atomic()):
            await settled(hf.orders.complete("7", "1.5"))
            await settled(hf.sessions.touch("1"))
        everything = [
            (1, "session.put", "1"),
            (2, "order.put", "7"),
            (3, "order.complete", "7"),
            (3, "session.touch", "1"),
        ]
        assert await take(4, 0) == everything
        assert await take(2, 2) == everything[2:]
        assert await take(2, 0, ops=["order.*"]) == everything[1:3]
        assert await take(2, 0, ids=["1"]) == [everything[0], everything[3]]
        with pytest.raises(holdfast.Conflict):
            await take(1, 99)
        with pytest.raises(errors.BadRequest):
            await take(1, 0, ops=["order.nonsense"])

    use(body)


@pytest.mark.parametrize("id", [None, True, 1.5, b"57"])
def test_an_id_is_text_or_a_whole_number(id: Any, use: Use) -> None:
    """A None that slipped in would otherwise be one record for all customers."""

    async def body(hf: Any) -> None:
        for attempt in (
            lambda: hf.sessions.put(id, {}),
            lambda: hf.sessions.get(id),
            lambda: hf.sessions.lease(id),
            lambda: hf.users.update(id, dict, default={}),
            lambda: hf.orders.complete(id),
        ):
            with pytest.raises(errors.InvalidRecord, match="expected an id as text or a whole number"):
                await settled(attempt())
        assert await settled(hf.sessions.count()) == 0

    use(body)


def test_a_value_is_an_object(use: Use) -> None:
    """Anything else is refused with what was found."""

    async def body(hf: Any) -> None:
        for value in ([1], None, "text", 5):
            for records in (hf.sessions, hf.orders, hf.users, hf.collection("notes")):
                with pytest.raises(errors.InvalidRecord, match=f"found {type(value).__name__}"):
                    await settled(records.put("1", value))

    use(body)


def test_what_changes_behind_a_call_in_a_block_does_not_count(use: Use) -> None:
    """The block stores values as they were when they were given to it."""

    async def body(hf: Any) -> None:
        for block in (hf.atomic, hf.pipeline):
            value = {"cart": ["ring"]}
            async with Block(block()):
                await settled(hf.sessions.put("1", value))
                value["cart"].append("watch")
                value["paid"] = True
            found = await settled(hf.sessions.get("1"))
            assert (found["cart"], found.get("paid")) == (["ring"], None)

    use(body)


def test_a_lease_tells_the_version_of_its_session(use: Use) -> None:
    """The session's own, which the lease does not change; 0 while there is none."""

    async def body(hf: Any) -> None:
        for version in range(3):
            lease = await settled(hf.sessions.lease("1", ttl=30))
            events = [await settled(hf.sessions.release("1", lease.generation)) for _ in range(2)]
            assert [one.version for one in events] == [version, version]
            await settled(hf.sessions.put("1", {"n": version}))

    use(body)
