"""Conversations and escalations: the same behaviour in each of the four forms of the library."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast import errors
from holdfast.archive.sqlite import READERS_MAX
from holdfast.ops import Message
from tests.library_forms import FORMS, Block, Use, opened, settled, use

__all__ = ["use"]

BYTES_MAX = 256 << 10
"""Of one message, by default."""

CALL = {"tool_calls": [{"id": "call-1", "function": {"name": "stock"}}]}


async def texts_of(messages: Any) -> list[str]:
    """What messages say, in their order."""
    return [message["content"] for message in await settled(messages)]


async def ids_of(records: Any) -> list[str]:
    return [record.id for record in await settled(records)]


def said(content: str, role: str = "user", **more: Any) -> dict[str, Any]:
    """A message as a member of ``messages``."""
    return {"role": role, "content": content, **more}


# Appending.


def test_a_conversation_begins_with_its_first_message(use: Use) -> None:
    """Title, times, counts and owner follow from what is appended; messages come back as they were said."""

    async def body(hf: Any) -> None:
        first = await settled(hf.conversations.append("57", "system", "Be kind.", user_id=7, session_id="57"))
        second = await settled(
            hf.conversations.append(
                "57", "user", "¿Tienen música? 音楽 🎵" + "x" * 40, tokens_used=9, metadata={"lang": "es", "score": 0.5}
            )
        )
        third = await settled(hf.conversations.append(57, "assistant", "Sí.", tokens_used=2))

        assert [(one.status, one.version, one.id, one.numbers) for one in (first, second, third)] == [
            (200, 1, "57", [1]),
            (200, 2, "57", [2]),
            (200, 3, "57", [3]),
        ]
        whole = await settled(hf.conversations.get("57"))
        messages = whole.pop("messages")
        assert whole == await settled(hf.conversations.head("57"))
        assert whole["title"] == ("¿Tienen música? 音楽 🎵" + "x" * 40)[:50] + "..."
        assert (whole["message_count"], whole["system_count"], whole["tokens_used"]) == (2, 1, 11)
        assert (whole["user_id"], whole["session_id"], whole["handler"]) == ("7", "57", "bot")
        assert whole["updated_at"] == messages[-1]["created_at"]
        assert [(one["number"], one["role"], one["author"]) for one in messages] == [
            (1, "system", None),
            (2, "user", "customer"),
            (3, "assistant", "bot"),
        ]
        assert messages[1]["content"] == "¿Tienen música? 音楽 🎵" + "x" * 40
        assert messages[1]["metadata"] == {"lang": "es", "score": 0.5}
        assert await settled(hf.conversations.get("58", "none")) == "none"
        assert await settled(hf.conversations.head("58", "none")) == "none"

    use(body)


def test_several_messages_in_one_op(use: Use) -> None:
    """Given as dicts or as Message; numbered in their order, under one version."""

    async def body(hf: Any) -> None:
        answer = await settled(
            hf.conversations.append(
                "57",
                messages=[
                    said("Hola", created_at="2026-01-02T03:04:05.678Z"),
                    Message(role="assistant", metadata=CALL),
                    said("3 left", "tool", metadata={"tool_call_id": "call-1"}),
                    said("Three.", "assistant", author="agent", created_at=datetime(2026, 1, 3, tzinfo=UTC)),
                ],
            )
        )

        assert (answer.version, answer.numbers) == (1, [1, 2, 3, 4])
        found = await settled(hf.conversations.messages("57"))
        assert [one["content"] for one in found] == ["Hola", "", "3 left", "Three."]
        assert found[0]["created_at"] == "2026-01-02T03:04:05.678Z"
        assert found[3]["created_at"] == "2026-01-03T00:00:00.000Z"
        assert found[1]["metadata"] == CALL and found[3]["author"] == "agent"

    use(body)


def test_long_messages_come_in_short_pages(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, in order, from either end; a window holds as many as one reading does, the whole has all."""
    monkeypatch.setattr("holdfast.transcripts.READ_BYTES_MAX", 5_000)
    monkeypatch.setattr("holdfast.transcripts.READ_AT_ONCE", 2)

    async def body(hf: Any) -> None:
        for size in (10, 1_000, 3_000):
            id = f"of {size}"
            await settled(hf.conversations.append(id, messages=[said(f"{n} ".ljust(size)) for n in range(30)]))

            whole = await settled(hf.conversations.get(id))
            forward = await settled(hf.conversations.messages(id))
            newest = await settled(hf.conversations.newest(id, 25))
            page = await settled(hf.conversations.message_page(id, limit=30))
            window = await settled(hf.conversations.window(id, messages=30))
            by_tokens = await settled(hf.conversations.window(id, tokens=10**9))

            numbers = [one["number"] for one in forward]
            assert numbers == list(range(1, 31)) == [one["number"] for one in whole["messages"]]
            assert [one["number"] for one in newest] == numbers[5:]
            fitting = {10: 30, 1_000: 5, 3_000: 2}[size]
            assert [item.id for item in page.items] == [str(number) for number in numbers[-fitting:]]
            assert (page.next is None) == (fitting == 30)
            for found in (window, by_tokens):
                assert [one["number"] for one in found] == numbers[-fitting:]

    use(body)


def test_a_message_that_comes_twice_is_one(use: Use) -> None:
    """By channel and external id, also among new ones in the same op; numbers of a channel are as good as text."""

    async def body(hf: Any) -> None:
        once = await settled(hf.conversations.append("57", "user", "Hola", channel="telegram", external_id=12))
        again = await settled(hf.conversations.append("57", "user", "Hola", channel="telegram", external_id="12"))
        mixed = await settled(
            hf.conversations.append(
                "57",
                messages=[
                    said("new", metadata={"channel": "telegram", "external_id": "13"}),
                    said("Hola", channel="telegram", external_id="12"),
                    said("new", channel="telegram", external_id="13"),
                    said("Hola", channel="whatsapp", external_id="12"),
                ],
            )
        )
        elsewhere = await settled(hf.conversations.append("58", "user", "Hola", channel="telegram", external_id="12"))

        assert [one.numbers for one in (once, again, mixed, elsewhere)] == [[1], [1], [2, 1, 2, 3], [1]]
        assert (again.seq, again.version) == (once.seq, once.version)
        assert await texts_of(hf.conversations.messages("57")) == ["Hola", "new", "Hola"]

    use(body)


def test_a_message_that_comes_twice_is_one_behind_a_restart(tmp_path: Path) -> None:
    """Whoever remembers it: memory from its journal or snapshot, or the archive when that is long ago."""

    async def body() -> None:
        for form in FORMS:
            data_dir = tmp_path / form
            async with opened(form, data_dir) as hf:
                await settled(hf.conversations.append("57", "user", "Hola", channel="w", external_id="1"))
            async with opened(form, data_dir) as hf:
                again = await settled(
                    hf.conversations.append(
                        "57",
                        messages=[
                            said("Hola", channel="w", external_id="1"),
                            said("new", channel="w", external_id="2"),
                        ],
                    )
                )
                await settled(hf.flush())
                # What memory knew of it has run out.
                if hasattr(hf, "engine"):
                    for key in ("57\nw\n1", "57\nw\n2"):
                        hf.engine._state.externals.set(key, None, hf.engine._state.seq, undoable=False)
                later = await settled(hf.conversations.append("57", "user", "new", channel="w", external_id="2"))

                assert (again.numbers, later.numbers) == ([1, 2], [2]), form
                assert await texts_of(hf.conversations.messages("57")) == ["Hola", "new"], form

    asyncio.run(body())


def test_an_idempotency_key_repeats_the_numbers(use: Use) -> None:
    """A repeat gets the first answer whole, and appends nothing."""

    async def body(hf: Any) -> None:
        await settled(hf.conversations.append("57", "user", "first"))
        answers = [
            await settled(hf.conversations.append("57", messages=[said("a"), said("b")], idempotency_key="k"))
            for _ in range(2)
        ]

        assert [(one.seq, one.version, one.numbers) for one in answers] == [(2, 2, [2, 3])] * 2
        assert (await settled(hf.conversations.head("57")))["message_count"] == 3

    use(body)


def test_a_message_may_have_256_kib(use: Use) -> None:
    """In bytes of UTF-8: just below and at the limit it is kept, above it is refused and nothing changes."""

    async def body(hf: Any) -> None:
        for size in (BYTES_MAX - 1, BYTES_MAX):
            content = "é" * (size // 2) + "x" * (size % 2)
            await settled(hf.conversations.append("57", "user", content))
            assert (await settled(hf.conversations.newest("57", 1)))[0]["content"] == content
        for over in (
            {"content": "é" * (BYTES_MAX // 2) + "x"},
            {"content": "x", "metadata": {"text": "x" * BYTES_MAX}},
        ):
            with pytest.raises(holdfast.TooLarge):
                await settled(hf.conversations.append("57", "user", **over))
        assert (await settled(hf.conversations.head("57")))["last_number"] == 2

    use(body)


def test_an_op_may_append_1000_messages(use: Use) -> None:
    """All of them, in order; with one more none."""

    async def body(hf: Any) -> None:
        thousand = [said(f"message {number}") for number in range(1_000)]
        with pytest.raises(holdfast.TooLarge, match="1000 messages, this one has 1001"):
            await settled(hf.conversations.append("57", messages=[*thousand, said("one more")]))
        assert not await settled(hf.conversations.contains("57"))

        answer = await settled(hf.conversations.append("57", messages=thousand))
        await settled(hf.conversations.append("57", "assistant", "That was long."))

        assert answer.numbers == list(range(1, 1_001))
        read = await texts_of(hf.conversations.messages("57"))
        assert read == [one["content"] for one in thousand] + ["That was long."]
        assert await texts_of(hf.conversations.newest("57", 1_001)) == read
        whole = await settled(hf.conversations.get("57"))
        assert [one["content"] for one in whole["messages"]] == read

    use(body)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"role": "robot", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": ""},
        {"role": "user", "content": 5},
        {"role": "user", "content": None},
        {"role": "user", "content": "\ud800"},
        {"role": "user", "content": "x", "author": "nobody"},
        {"role": "user", "content": "x", "tokens_used": -1},
        {"role": "user", "content": "x", "tokens_used": 1.5},
        {"role": "user", "content": "x", "tokens_used": float("nan")},
        {"role": "user", "content": "x", "tokens_used": 2**70},
        {"role": "user", "content": "x", "metadata": {"n": float("nan")}},
        {"role": "user", "content": "x", "metadata": {"n": 2**64}},
        {"role": "user", "content": "x", "metadata": {"s": {1, 2}}},
        {"role": "user", "metadata": [1]},
        {"role": "user", "content": "x", "channel": 5},
        {"role": "user", "content": "x", "external_id": 1.5},
        {"role": "user", "content": "x", "channel": "a\nb", "external_id": "1"},
        {"role": "user", "content": "x", "created_at": "yesterday"},
        {"role": "user", "content": "x", "created_at": 5},
        {"role": "user", "content": "x", "user_id": ""},
        {"role": "user", "content": "x", "messages": [{"role": "user", "content": "x"}]},
        {"role": "user", "messages": [{"role": "user", "content": "x"}]},
        {"tokens_used": 5, "messages": [{"role": "user", "content": "x"}]},
        {"messages": []},
        {"messages": 5},
        {"messages": ["x"]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "colour": "red"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": ""}]},
    ],
    ids=lambda wrong: "-".join(wrong) or "nothing",
)
def test_what_is_no_message_is_refused(wrong: dict[str, Any], use: Use) -> None:
    """With invalid_record, in every form alike, and nothing is changed."""

    async def body(hf: Any) -> None:
        with pytest.raises(holdfast.InvalidRecord) as refused:
            await settled(hf.conversations.append("57", **wrong))
        assert refused.value.code == "invalid_record" and refused.value.detail
        assert await settled(hf.conversations.count()) == 0

    use(body)


def test_whose_a_conversation_is_stays(use: Use) -> None:
    """Said with any message, once; another user is a conflict, which put resolves."""

    async def body(hf: Any) -> None:
        await settled(hf.conversations.append("57", "user", "a"))
        await settled(hf.conversations.append("57", "user", "b", user_id="ana"))
        await settled(hf.conversations.append("57", "user", "c", user_id="ana"))
        with pytest.raises(holdfast.Conflict, match="user_id"):
            await settled(hf.conversations.append("57", "user", "d", user_id="eva"))
        await settled(hf.conversations.put("57", {"user_id": "eva"}))
        await settled(hf.conversations.append("57", "user", "d", user_id="eva"))
        assert await texts_of(hf.conversations.messages("57")) == ["a", "b", "c", "d"]

    use(body)


def test_conditions_hold_for_messages(use: Use) -> None:
    """if_version 0 begins a conversation, another one goes on with what was read."""

    async def body(hf: Any) -> None:
        await settled(hf.conversations.append("57", "user", "a", if_version=0))
        with pytest.raises(holdfast.VersionMismatch):
            await settled(hf.conversations.append("57", "user", "a", if_version=0))
        await settled(hf.conversations.append("57", "user", "b", if_version=1))
        assert await texts_of(hf.conversations.messages("57")) == ["a", "b"]

    use(body)


# Together with other ops.


def test_session_and_message_happen_together_or_not_at_all(use: Use) -> None:
    """An atomic block takes both; when one is refused the other did not happen."""

    async def body(hf: Any) -> None:
        async with Block(hf.atomic()):
            await settled(hf.sessions.put("57", {"currentState": "catalog"}))
            await settled(hf.conversations.append("57", "user", "Hola", external_id="1", channel="w"))
            await settled(hf.conversations.append("57", "assistant", "¿Sí?"))
        with pytest.raises(holdfast.InvalidRecord) as refused:
            async with Block(hf.atomic()):
                await settled(hf.sessions.put("57", {"currentState": "paid"}))
                await settled(hf.conversations.append("57", "user", "lost", external_id="2", channel="w"))
                await settled(hf.conversations.append("57", "user", ""))

        assert refused.value.index == 2
        assert (await settled(hf.sessions.get("57")))["currentState"] == "catalog"
        assert await texts_of(hf.conversations.messages("57")) == ["Hola", "¿Sí?"]
        # What the refused block noted of external ids is forgotten as well.
        later = await settled(hf.conversations.append("57", "user", "found", external_id="2", channel="w"))
        assert later.numbers == [3]

    use(body)


def test_a_pipeline_of_messages_keeps_their_order(use: Use) -> None:
    """Across several requests; a refused one keeps none back."""

    async def body(hf: Any) -> None:
        with pytest.raises(holdfast.InvalidRecord):
            async with Block(hf.pipeline()):
                for number in range(700):
                    await settled(hf.conversations.append("57", "user", str(number)))
                    if number == 300:
                        await settled(hf.conversations.append("57", "robot", "x"))
        assert await texts_of(hf.conversations.messages("57")) == [str(number) for number in range(700)]

    use(body)


def test_what_changes_behind_a_call_in_a_block_does_not_count(use: Use) -> None:
    """Neither in metadata nor in a list of messages nor in contact_info."""

    async def body(hf: Any) -> None:
        metadata: dict[str, Any] = {"tags": ["a"]}
        messages = [said("one", metadata={"tags": ["a"]})]
        contact = {"phones": ["1"]}
        async with Block(hf.atomic()):
            await settled(hf.conversations.append("57", "user", "x", metadata=metadata))
            await settled(hf.conversations.append("57", messages=messages))
            await settled(hf.escalations.open("57", "help", contact))
            metadata["tags"].append("b")
            messages[0]["metadata"]["tags"].append("b")
            messages.append(said("two"))
            contact["phones"].append("2")

        found = await settled(hf.conversations.messages("57"))
        assert [one["metadata"] for one in found] == [{"tags": ["a"]}] * 2
        assert (await settled(hf.escalations.get("57")))["contact_info"] == {"phones": ["1"]}

    use(body)


def test_tasks_keep_the_order_of_their_messages(tmp_path: Path) -> None:
    """Called one after the other without waiting, with external ids that must be looked for, they stand as called."""

    async def body() -> None:
        for form in ("aio.open", "aio.connect"):
            async with opened(form, tmp_path / form) as hf:
                await hf.conversations.append("57", "user", "0")
                if form == "aio.open":  # as if it were a day old
                    hf.engine._state.externals_since = 1
                calls = [
                    hf.conversations.append("57", "user", str(number), channel="w", external_id=number)
                    for number in range(1, 200)
                ]
                answers = await asyncio.gather(*calls)

                assert [one.numbers for one in answers] == [[number] for number in range(2, 201)], form
                assert await texts_of(hf.conversations.messages("57")) == [str(number) for number in range(200)], form

    asyncio.run(body())


def test_a_busy_archive_holds_up_no_event_loop(tmp_path: Path) -> None:
    """While a message waits to be looked for in it, everything else goes on; then the message is there, once."""

    async def body() -> None:
        async with holdfast.aio.open(tmp_path) as hf:
            await hf.conversations.append("57", "user", "a", channel="w", external_id="1")
            await hf.conversations.get("57")
            # As if it were a day old, and memory had forgotten its external ids.
            hf.engine._state.externals_since = 1
            readers = hf.engine._follower.archive()._readers
            taken = [readers.take() for _ in range(READERS_MAX)]

            def release() -> None:
                while taken:
                    readers.give_back(taken.pop())

            # So that a loop that is held up comes to its end as well.
            late = threading.Timer(5, release)
            late.start()
            try:
                append = asyncio.create_task(hf.conversations.append("57", "user", "b", channel="w", external_id="2"))
                await hf.sessions.put("57", {})
                assert (await hf.conversations.head("57"))["last_number"] == 1
                assert not append.done() and len(taken) == READERS_MAX
            finally:
                late.cancel()
                release()
            assert (await append).numbers == [2]
            assert await texts_of(hf.conversations.messages("57")) == ["a", "b"]

    asyncio.run(body())


# Reading.


def test_messages_are_filtered_and_paged(use: Use) -> None:
    """By role, author and time; pages go back from the newest, or on from a number, and the last one says so."""

    async def body(hf: Any) -> None:
        await settled(
            hf.conversations.append(
                "57",
                messages=[
                    said(
                        str(number), "user" if number % 2 else "assistant", created_at=f"2026-01-{number:02}T00:00:00Z"
                    )
                    for number in range(1, 8)
                ],
            )
        )
        c = hf.conversations
        assert await texts_of(c.messages("57", role="user")) == ["1", "3", "5", "7"]
        assert await texts_of(c.messages("57", author="bot")) == ["2", "4", "6"]
        since, until = datetime(2026, 1, 3, tzinfo=UTC), datetime(2026, 1, 6, tzinfo=UTC)
        assert await texts_of(c.messages("57", since_ms=since, until_ms=until)) == ["3", "4", "5"]
        in_ms = int(since.timestamp() * 1000)
        assert await texts_of(c.messages("57", role="assistant", since_ms=in_ms)) == ["4", "6"]
        assert await texts_of(c.newest("57", 3)) == ["5", "6", "7"]
        assert await texts_of(c.newest("57", 99)) == [str(number) for number in range(1, 8)]

        seen: list[list[str]] = []
        before = None
        while True:
            page = await settled(c.message_page("57", limit=3, before=before))
            seen.append([item.id for item in page.items])
            if page.next is None:
                break
            before = page.next
        assert seen == [["5", "6", "7"], ["2", "3", "4"], ["1"]]
        forward = await settled(c.message_page("57", limit=2, after=3))
        assert ([item.id for item in forward.items], forward.next) == (["4", "5"], "5")
        assert [item.id for item in (await settled(c.message_page("57", limit=2, before=3))).items] == ["1", "2"]

    use(body)


def test_a_window_is_the_newest_that_fit(use: Use) -> None:
    """Counted in messages or tokens, oldest first; a tool's result never comes without its call."""

    async def body(hf: Any) -> None:
        await settled(
            hf.conversations.append(
                "57",
                messages=[
                    said("stock?", tokens_used=10),
                    said("", "assistant", metadata=CALL, tokens_used=10),
                    said("3", "tool", metadata={"tool_call_id": "call-1"}, tokens_used=10),
                    said("Three.", "assistant", tokens_used=10),
                    said("x" * 40),
                ],
            )
        )
        c = hf.conversations
        assert await texts_of(c.window("57", messages=4)) == ["", "3", "Three.", "x" * 40]
        assert await texts_of(c.window("57", messages=3)) == ["Three.", "x" * 40]
        assert await texts_of(c.window("57", tokens=20)) == ["Three.", "x" * 40]
        assert await texts_of(c.window("57", tokens=19)) == ["x" * 40]
        assert await texts_of(c.window("57", tokens=9)) == []
        assert len(await settled(c.window("57"))) == 5
        assert len(await settled(c.window("57", tokens=1_000, messages=2))) == 2

    use(body)


def test_lists_are_newest_first_and_filtered(use: Use) -> None:
    """By user, session, escalation, archive and age; a page goes on where the one before ended."""

    async def body(hf: Any) -> None:
        c = hf.conversations
        for day, id in enumerate(("a", "b", "c", "d"), 1):
            await settled(
                c.append(
                    id,
                    "user",
                    id,
                    created_at=f"2026-01-{day:02}T00:00:00Z",
                    user_id="ana" if day % 2 else "eva",
                    session_id=f"s{day}",
                )
            )
        await settled(c.append("now", "user", "now"))
        await settled(c.archive("b"))
        await settled(hf.escalations.open("c", "help"))

        assert await ids_of(c.list()) == ["now", "d", "c", "b", "a"]
        assert await ids_of(c.list(user_id="ana")) == ["c", "a"]
        assert await ids_of(c.list(session_id="s4")) == ["d"]
        assert await ids_of(c.list(escalated=True)) == ["c"]
        assert await ids_of(c.list(archived=True)) == ["b"]
        assert await ids_of(c.list(archived=False, user_id="eva")) == ["d"]
        assert await ids_of(c.list(active_within="1h")) == ["now"]
        assert await ids_of(c.list(older_than=3600, user_id="ana")) == ["c", "a"]
        window = {"since_ms": datetime(2026, 1, 2, tzinfo=UTC), "until_ms": datetime(2026, 1, 4, tzinfo=UTC)}
        assert await ids_of(c.list(**window)) == ["c", "b"]
        first = await settled(c.page(limit=2, older_than="1h"))
        second = await settled(c.page(limit=2, older_than="1h", cursor=first.next))
        assert [[item.id for item in page.items] for page in (first, second)] == [["d", "c"], ["b", "a"]]
        assert second.next is None
        assert await settled(c.count()) == 5
        await settled(c.archive("b", False))
        assert await ids_of(c.list(archived=True)) == []

    use(body)


@pytest.mark.parametrize("form", ["open", "aio.open", "connect"])
def test_in_and_len(form: str, tmp_path: Path) -> None:
    """Wherever no await is needed conversations and escalations are asked as Python asks."""

    async def body() -> None:
        async with opened(form, tmp_path) as hf:
            await settled(hf.conversations.append("57", "user", "Hola"))
            await settled(hf.escalations.open("57", "help"))
            for collection in (hf.conversations, hf.escalations):
                assert 57 in collection and "58" not in collection and object() not in collection
                assert len(collection) == 1

    asyncio.run(body())


def test_wrong_questions_are_refused(use: Use) -> None:
    """Unknown conversations are not found; numbers below 1, other lists' cursors and spans that are none, bad requests."""

    async def body(hf: Any) -> None:
        c, e = hf.conversations, hf.escalations
        for id in ("a", "b"):
            await settled(c.append(id, messages=[said("1"), said("2"), said("3")]))
        cursor = (await settled(c.page(limit=1))).next
        older = (await settled(c.message_page("a", limit=1))).next
        for attempt in (
            lambda: c.messages("absent"),
            lambda: c.window("absent"),
            lambda: c.newest("absent"),
            lambda: c.archive("absent"),
            lambda: c.hold("absent"),
            lambda: c.delete("absent"),
            lambda: e.open("absent", "help"),
        ):
            with pytest.raises(holdfast.NotFound):
                await settled(attempt())
        for attempt in (
            lambda: c.window("a", messages=0),
            lambda: c.window("a", tokens=-1),
            lambda: c.newest("a", 0),
            lambda: c.messages("a", role="robot"),
            lambda: c.messages("a", author="nobody"),
            lambda: c.messages("a", since_ms=datetime(2026, 1, 1)),
            lambda: c.message_page("a", before="nonsense"),
            lambda: c.message_page("a", before="9" * 5_000),
            lambda: c.message_page("a", before=2, after=1),
            lambda: c.message_page("a", after=-1),
            lambda: c.message_page("b", before=older),
            lambda: c.message_page("a", before=older, role="user"),
            lambda: c.page(limit=0),
            lambda: c.page(escalated="yes"),
            lambda: c.page(archived=1),
            lambda: c.page(cursor="nonsense"),
            lambda: c.page(cursor=older),
            lambda: c.page(cursor=cursor, archived=True),
            lambda: c.list(active_within=-1),
            lambda: c.list(older_than="soon"),
            lambda: e.page(cursor=cursor),
            lambda: e.list(status="lost"),
            lambda: e.list(priority="urgent"),
        ):
            with pytest.raises(errors.BadRequest) as refused:
                await settled(attempt())
            assert refused.value.detail

    use(body)


# Changing.


def test_what_is_said_about_a_conversation(use: Use) -> None:
    """Put merges: own fields are kept, None removes, what Holdfast counts is ignored, messages are refused."""

    async def body(hf: Any) -> None:
        c = hf.conversations
        assert (await settled(c.put("57", {"title": "Early", "colour": "red"}))).status == 201
        await settled(c.append("57", "user", "Hola"))
        read = await settled(c.head("57"))
        assert (read["title"], read["colour"], read["message_count"]) == ("Early", "red", 1)
        assert (await settled(c.put("57", read | {"message_count": 99, "colour": None}))).status == 200
        read = await settled(c.head("57"))
        assert (read["message_count"], "colour" in read) == (1, False)
        for wrong in ({"messages": []}, {"id": "58"}, {"escalated": "yes"}, {"created_at": "soon"}):
            with pytest.raises(holdfast.InvalidRecord):
                await settled(c.put("57", wrong))
        assert (await settled(c.record("57"))).version == 3

    use(body)


def test_a_deleted_conversation_is_gone(use: Use) -> None:
    """With its messages and its escalation; a new one under its id begins with number 1, external ids included."""

    async def body(hf: Any) -> None:
        c = hf.conversations
        await settled(c.append("57", messages=[said("a", channel="w", external_id="1"), said("b")]))
        await settled(hf.escalations.open("57", "help"))
        assert (await settled(c.delete("57"))).status == 204
        assert await settled(c.get("57")) is None
        assert await settled(hf.escalations.get("57")) is None
        assert await ids_of(hf.escalations.list()) == []
        again = await settled(c.append("57", "user", "new", channel="w", external_id="1"))
        assert again.numbers == [1]
        assert await texts_of(c.messages("57")) == ["new"]
        assert (await settled(hf.stats.storage()))["messages"] == 1

    use(body)


def test_a_legal_hold_keeps_a_conversation(use: Use) -> None:
    """Its own, or that of the person it belongs to, until it is lifted; saying it twice changes nothing."""

    async def body(hf: Any) -> None:
        c = hf.conversations
        await settled(c.append("57", "user", "a", user_id="ana"))
        held = await settled(c.hold("57", reason="case 42"))
        assert (await settled(c.hold("57", reason="case 42"))).seq == held.seq
        person = await settled(c.hold_person("ana", reason="case 42"))
        assert (await settled(c.hold_person("ana", reason="case 42"))).seq == person.seq
        for lift in (lambda: c.hold("57", False), lambda: c.hold_person("ana", False)):
            with pytest.raises(holdfast.Conflict, match="legal hold"):
                await settled(c.delete("57"))
            await settled(lift())
        with pytest.raises(holdfast.InvalidRecord):
            await settled(c.hold("57", "yes"))
        with pytest.raises(holdfast.InvalidRecord):
            await settled(c.archive("57", "yes"))
        assert (await settled(c.delete("57"))).status == 204

    use(body)


def test_escalations_wait_in_their_order(use: Use) -> None:
    """High priority first, then the oldest; one for each conversation, which a second call updates."""

    async def body(hf: Any) -> None:
        e = hf.escalations
        for id in ("a", "b", "c"):
            await settled(hf.conversations.append(id, "user", id))
            await settled(e.open(id, "help", {"phone": id}))
            await asyncio.sleep(0.002)
        opened_at = (await settled(e.get("c")))["opened_at"]
        answer = await settled(e.open("c", "angry", priority="high"))

        assert (answer.version, await ids_of(e.list())) == (2, ["c", "a", "b"])
        assert await ids_of(e.list(priority="low", status="pending")) == ["a", "b"]
        assert await ids_of(e.list(status="resolved")) == []
        found = await settled(e.get("c"))
        assert (found["reason"], found["priority"], found["contact_info"]) == ("angry", "high", {"phone": "c"})
        assert (found["opened_at"], found["status"]) == (opened_at, "pending")
        head = await settled(hf.conversations.head("c"))
        assert (head["escalated"], head["handler"]) == (True, "waiting")
        assert await settled(e.count()) == 3
        for wrong in ({"reason": ""}, {"reason": "x", "priority": "urgent"}, {"reason": "x", "contact_info": "me"}):
            with pytest.raises(holdfast.InvalidRecord):
                await settled(e.open("a", **wrong))

    use(body)


def test_how_much_there_is(use: Use) -> None:
    """Exact after every change."""

    async def body(hf: Any) -> None:
        assert (await settled(hf.stats.storage()))["escalated_share"] == 0
        c = hf.conversations
        await settled(c.append("a", messages=[said("s", "system"), said("u", tokens_used=4), said("x", "assistant")]))
        await settled(c.append("b", "user", "b", created_at="2026-01-01T00:00:00Z"))
        await settled(c.archive("b"))
        await settled(hf.escalations.open("a", "help"))
        found = await settled(hf.stats.storage())
        assert found.pop("bytes") > 0
        assert found == {
            "total": 2,
            "active": 1,
            "old": 0,
            "archived": 1,
            "escalated": 1,
            "messages": 4,
            "system_messages": 1,
            "messages_last_30_days": 3,
            "tokens": 4,
            "escalated_share": 0.5,
            "average_messages": 1.5,
        }

    use(body)


def test_everything_is_there_behind_a_restart(tmp_path: Path) -> None:
    """In each form, with the directory of the one before: what was said, held and escalated stays and goes on."""

    async def body() -> None:
        for turn, form in enumerate(FORMS, 1):
            async with opened(form, tmp_path) as hf:
                answer = await settled(hf.conversations.append("57", "user", f"from {form}", user_id="ana"))
                await settled(hf.escalations.open("57", f"by {form}"))
                assert answer.numbers == [turn]
                with contextlib.suppress(holdfast.NotFound):
                    await settled(hf.conversations.hold("57", reason=form))
                assert await texts_of(hf.conversations.messages("57")) == [f"from {one}" for one in FORMS[:turn]]
                head = await settled(hf.conversations.head("57"))
                assert (head["title"], head["message_count"], head["hold_reason"]) == (f"from {FORMS[0]}", turn, form)
                assert (await settled(hf.escalations.record("57"))).version == turn
                assert await ids_of(hf.conversations.list(user_id="ana")) == ["57"]

    asyncio.run(body())


def test_any_id_is_a_conversation(use: Use) -> None:
    """Whatever may be an id is found again, also where it must be encoded on its way."""

    async def body(hf: Any) -> None:
        ids = ["a/b", "..", ".", "ñ 价", "a?b#c", "%2e", "a+b", '"', "x" * 256]
        for id in ids:
            await settled(hf.conversations.append(id, "user", id, user_id=id))
            await settled(hf.escalations.open(id, id))
            assert await texts_of(hf.conversations.messages(id)) == [id]
            assert await texts_of(hf.conversations.window(id)) == [id]
            assert await ids_of(hf.conversations.list(user_id=id)) == [id]
            assert (await settled(hf.conversations.get(id)))["id"] == id
            assert (await settled(hf.escalations.get(id)))["id"] == id
        assert sorted(await ids_of(hf.escalations.list())) == sorted(ids)
        for wrong in (None, True, 1.5):
            with pytest.raises(holdfast.InvalidRecord, match="expected an id"):
                await settled(hf.conversations.get(wrong))

    use(body)


def test_what_is_no_text_is_no_id(use: Use) -> None:
    """A lone surrogate, as comes of text decoded carelessly, is refused or not found, alone as among others."""

    async def body(hf: Any) -> None:
        c, wrong = hf.conversations, "\ud800"
        await settled(c.append("57", "user", "one"))
        for change in (
            lambda: c.append(wrong, "user", "x"),
            lambda: c.append(wrong, "user", "x", channel="w", external_id="1"),
            lambda: c.put(wrong, {}),
            lambda: c.delete(wrong),
            lambda: c.archive(wrong),
            lambda: c.hold(wrong),
            lambda: c.hold_person(wrong),
            lambda: hf.escalations.open(wrong, "help"),
            lambda: c.window(wrong),
            lambda: c.message_page(wrong),
        ):
            with pytest.raises((holdfast.InvalidRecord, holdfast.NotFound)):
                await settled(change())
        for read in (c.get, c.head, hf.escalations.get):
            try:
                assert await settled(read(wrong)) is None
            except holdfast.InvalidRecord:
                pass  # a path cannot hold it
        with pytest.raises(holdfast.InvalidRecord):
            async with Block(hf.pipeline()):
                for id in ("57", wrong, "57"):
                    await settled(c.append(id, "user", "two", channel="w"))
        assert await texts_of(c.messages("57")) == ["one", "two", "two"]

    use(body)


# The event stream.


def test_events_show_what_is_said(use: Use) -> None:
    """Messages with their content, under the names of their ops, by name, by prefix and by conversation."""

    async def body(hf: Any) -> None:
        is_async = type(hf).__name__.startswith("Async")

        async def take(count: int, **wanted: Any) -> list[Any]:
            stream = hf.events(0, **wanted)
            try:
                return [
                    await settled(stream.__anext__()) if is_async else await asyncio.to_thread(next, stream)
                    for _ in range(count)
                ]
            finally:
                stream.close()

        c = hf.conversations
        await settled(c.append("57", messages=[said("Hola", channel="w", external_id="1"), said("b")]))
        await settled(c.put("57", {"title": "T"}))
        await settled(hf.escalations.open("57", "help"))
        await settled(c.archive("57"))
        await settled(c.hold("57"))
        await settled(c.hold_person("ana"))
        await settled(c.hold("57", False))
        await settled(c.delete("57"))
        await settled(c.append("58", "user", "other"))
        names = [
            "message.append",
            "conversation.put",
            "escalation.open",
            "conversation.archive",
            "conversation.hold",
            "person.hold",
            "conversation.hold",
            "conversation.delete",
            "message.append",
        ]
        assert [event.op for event in await take(9)] == names
        appended = await take(2, ops=["message.*"])
        assert [event.id for event in appended] == ["57", "58"]
        assert [one["content"] for one in appended[0].data["messages"]] == ["Hola", "b"]
        assert [event.op for event in await take(7, ids=["57"])] == [*names[:5], *names[6:8]]
        assert [event.id for event in await take(2, ops=["person.hold", "escalation.*"])] == ["57", "ana"]
        for op in ("message.nonsense", "conversation.lease"):
            with pytest.raises(errors.BadRequest):
                await take(1, ops=[op])

    use(body)
