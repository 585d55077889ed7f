"""The drop-in storage module: the functions and dictionaries of bots with a file per conversation, kept by Holdfast."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import werkzeug.serving

import holdfast
from holdfast.compat import chatbot_storage as storage
from tests.cli_harness import environment
from tests.crash.harness import ROOT, clean_environ, mounted, needs_root, serving
from tests.flask_app import app
from tests.library_forms import daemon_in_thread
from tests.test_old_conversations import LINES, ODD, left, old_conversation, old_escalation

HERE = "America/Bogota"
"""The zone of the machine in these tests: not UTC, so that no hour is right by chance."""


@pytest.fixture(autouse=True)
def zone(monkeypatch: pytest.MonkeyPatch) -> ZoneInfo:
    monkeypatch.setenv("TZ", HERE)
    return ZoneInfo(HERE)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A directory that the module is to use, and has given back in the end."""
    directory = tmp_path / "data"
    storage.configure(directory)
    try:
        yield directory
    finally:
        storage.configure(None)


@pytest.fixture(params=["in this process", "through a daemon"])
def either(request: pytest.FixtureRequest, data: Path) -> Iterator[Path]:
    """The same, held by this process or by a daemon."""
    if request.param == "in this process":
        yield data
        return
    with daemon_in_thread(data):
        yield data
        storage.close()


def turn(number: int) -> list[dict[str, Any]]:
    """What is said at once: by the customer, by the bot."""
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


def talk(turns: int) -> list[dict[str, Any]]:
    return [message for number in range(turns) for message in turn(number)]


class Cost:
    """How many events, and how many bytes of journal, something takes."""

    def __init__(self, hf: Any) -> None:
        self._engine = hf.engine

    def of(self, action: Callable[[], object]) -> tuple[int, int]:
        before = self._now()
        action()
        after = self._now()
        return after[0] - before[0], after[1] - before[1]

    def _now(self) -> tuple[int, int]:
        status = self._engine.status()
        return status["seq"], status["journal_bytes"]


@pytest.fixture
def hf(data: Path) -> Iterator[Any]:
    """One that the test opened, so that it can look beneath; everything goes to the journal, nothing to the snapshots."""
    with holdfast.open(data, stats={"timezone": HERE}) as opened:
        storage.use(opened)
        yield opened
        storage.configure(None)


# Conversations.


def test_a_conversation_comes_back_as_it_was_saved(either: Path, zone: ZoneInfo) -> None:
    """All six keys, the messages with everything in them, and local times that Python reads."""
    before = datetime.now(zone).replace(tzinfo=None) - timedelta(milliseconds=1)
    messages = [
        *LINES,
        {"role": "user", "content": "¿y 128GB? 🎶", "timestamp": "2026-11-01T10:00:00", "n": [1, 2.5, None]},
    ]

    saved = storage.save_conversation("web-17", messages, escalated=True, title="A USB stick")

    found = storage.load_conversation("web-17")
    assert found is not None
    assert list(found) == ["id", "created_at", "updated_at", "title", "messages", "escalated"]
    assert (found["id"], found["title"], found["escalated"], found["messages"]) == (
        "web-17",
        "A USB stick",
        True,
        messages,
    )
    for field in ("created_at", "updated_at"):
        moment = datetime.fromisoformat(found[field])
        assert moment.tzinfo is None and before <= moment <= datetime.now(zone).replace(tzinfo=None)
    assert saved == found


def test_messages_that_no_role_fits_come_back_as_well(either: Path) -> None:
    """Whatever JSON holds may stand in the list, in any order, and a longer list with the same beginning only grows."""
    storage.save_conversation("odd", ODD)
    storage.save_conversation("odd", [*ODD, *turn(1)])

    found = storage.load_conversation("odd")

    assert found is not None and found["messages"] == [*ODD, *turn(1)]


@pytest.mark.parametrize(
    ("messages", "title"),
    [
        ([], None),
        ([{"role": "system", "content": "Be kind"}], None),
        ([{"role": "user", "content": "Hola"}], "Hola"),
        ([{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "x" * 50}], "x" * 50),
        ([{"role": "user", "content": "x" * 51}], "x" * 50 + "..."),
    ],
)
def test_the_title_is_the_beginning_of_the_first_question(messages: Any, title: str | None, data: Path) -> None:
    """50 characters of it, with dots when it was cut; a title that was given stays, also when the list grows."""
    storage.save_conversation("c", messages)
    assert storage.load_conversation("c")["title"] == title  # type: ignore[index]

    storage.save_conversation("c", messages, title="Mine")
    storage.save_conversation("c", messages + turn(1))
    assert storage.load_conversation("c")["title"] == "Mine"  # type: ignore[index]


def test_created_stays_and_updated_moves(data: Path) -> None:
    """However a conversation is saved: ``created_at`` is that of the first time, ``updated_at`` that of the last."""
    first = storage.save_conversation("c", [])
    for messages in (talk(1), talk(2), talk(2), talk(1), []):
        last = storage.save_conversation("c", messages)

        assert last["created_at"] == first["created_at"]
        assert last["updated_at"] >= first["updated_at"]
        assert storage.load_conversation("c") == last
    with holdfast_of(data) as hf:
        hf.conversations.put("c", {"updated_at": "2026-01-01T00:00:00Z"})
    assert storage.save_conversation("c", [])["updated_at"] >= first["updated_at"]


@contextlib.contextmanager
def holdfast_of(data: Path) -> Iterator[Any]:
    """The Holdfast that the module uses, with nobody else in between."""
    storage.close()
    with holdfast.open(data, stats={"timezone": HERE}) as hf:
        yield hf


def test_a_message_of_an_earlier_time_leaves_the_conversation_of_now(data: Path, zone: ZoneInfo) -> None:
    """Timestamps of messages do not make a conversation older than its last save."""
    early = {"role": "user", "content": "Hola", "timestamp": "2020-01-01T00:00:00"}
    storage.save_conversation("c", [])

    saved = storage.save_conversation("c", [early])

    assert datetime.now(zone).replace(tzinfo=None) - datetime.fromisoformat(saved["updated_at"]) < timedelta(minutes=1)
    with holdfast_of(data) as hf:
        (message,) = hf.conversations.messages("c")
        assert message["created_at"] == "2020-01-01T05:00:00.000Z"


def test_a_longer_list_costs_what_is_new(hf: Any) -> None:
    """One event of the same size, however long the conversation is, and nothing is read; also when this is not the
    process that saved it last."""
    costs, reads = {}, []
    for turns in (5, 50, 500, 5_000):
        messages = talk(turns)
        storage.save_conversation(f"c{turns:05}", messages)
        messages += turn(99_999)
        cost = Cost(hf).of(lambda turns=turns, messages=messages: storage.save_conversation(f"c{turns:05}", messages))  # type: ignore[misc]
        costs[turns] = cost
        storage.use(hf)  # forgets what it remembered
        messages += turn(99_998)
        reads.append(
            _messages_read(
                hf, lambda turns=turns, messages=messages: storage.save_conversation(f"c{turns:05}", messages)
            )
        )  # type: ignore[misc]

    assert {events for events, _ in costs.values()} == {1}
    # The counts in the head have a few digits more.
    assert max(size for _, size in costs.values()) - min(size for _, size in costs.values()) <= 20
    assert len(set(reads)) == 1 and reads[0] <= 20
    assert [len(storage.load_conversation(f"c{turns:05}")["messages"]) for turns in costs] == [14, 104, 1004, 10004]  # type: ignore[index]


@pytest.mark.parametrize("is_remembered", [True, False])
def test_a_first_message_that_differs_each_time_costs_what_is_new(hf: Any, is_remembered: bool) -> None:
    """A prompt with the time of day: only the new messages are appended, in one event of the same size, however long the
    conversation is; every list is loaded as it was saved, and the messages stay what they were."""
    costs, ages = {}, {}
    for turns in (5, 50, 500, 5_000):
        id = f"c{turns:05}"
        messages = [*prompt(0), *talk(turns)]
        first = storage.save_conversation(id, messages)
        before = _appended(hf, id)
        for minute in (1, 2):
            messages = [*prompt(minute), *messages[1:], *turn(90_000 + minute)]
            if not is_remembered:
                storage.use(hf)
            costs[turns] = Cost(hf).of(lambda id=id, messages=messages: storage.save_conversation(id, messages))  # type: ignore[misc]
        found = storage.load_conversation(id)
        ages[turns] = _appended(hf, id)[: len(before)] == before

        assert found is not None and found["messages"] == messages
        assert (found["created_at"], found["title"]) == (first["created_at"], "question 0")
        assert hf.conversations.head(id)["last_number"] == len(messages)
        assert list(found) == ["id", "created_at", "updated_at", "title", "messages", "escalated"]

    assert all(ages.values())
    assert {events for events, _ in costs.values()} == {1}
    assert max(size for _, size in costs.values()) - min(size for _, size in costs.values()) <= 40
    assert {one["message_count"] for one in storage.list_conversations()} == {14, 104, 1_004, 10_004}


def prompt(minute: int) -> list[dict[str, Any]]:
    """With what a bot that knows the time begins its list."""
    return [{"role": "system", "content": f"You sell USB sticks. It is 10:{minute:02}."}]


def _appended(hf: Any, id: str) -> list[dict[str, Any]]:
    """The messages of the conversation as our API shows them."""
    return list(hf.conversations.messages(id))


@pytest.mark.parametrize(
    "lists",
    [
        [[], prompt(1), prompt(2), []],
        [prompt(1), talk(1), [*prompt(2), *talk(2)], talk(2), [*prompt(3), *talk(3)]],
        [talk(2), [*prompt(1), *talk(2)], [*prompt(2), *prompt(3), *talk(3)], [*prompt(2), *talk(3)]],
        [[*prompt(1), *talk(1)], [*prompt(1), *prompt(2), *talk(1)], [*prompt(3), *prompt(4), *talk(2)]],
        [prompt(1), [*prompt(1), *prompt(2)], [*prompt(3), *prompt(2), *talk(1)], [*prompt(4), *prompt(2), *talk(2)]],
        [[*prompt(1), *talk(1)], [{"role": "developer", "content": "now 10:02"}, *talk(2)], [*prompt(3), *talk(3)]],
        [[*prompt(1), *talk(1)], [{"role": "system", "content": None, "n": 2**70}, *talk(2)]],
        [[*prompt(1), *talk(1)], [*[prompt(n)[0] for n in range(20)], *talk(2)], [*prompt(1), *talk(3)]],
        [[*prompt(1), *talk(1)], [{"role": "system", "content": "x" * 70_000}, *talk(2)], [*prompt(1), *talk(3)]],
        [[*prompt(1), *talk(20)], [*prompt(2), *talk(20)[10:], *turn(20)], [*prompt(3), *talk(21)[12:], *turn(21)]],
        [[{"role": "user", "content": "ok"}] * 30, [{"role": "user", "content": "ok"}] * 20],
        [[*prompt(1), *[{"role": "user", "content": "ok"}] * n] for n in (30, 31, 12, 13, 14)],
    ],
)
@pytest.mark.parametrize("is_remembered", [True, False])
def test_every_list_is_loaded_as_it_was_saved(lists: list[Any], is_remembered: bool, hf: Any) -> None:
    """Whatever its beginning does: comes, changes, becomes longer or too large, goes."""
    for messages in lists:
        if not is_remembered:
            storage.use(hf)
        saved = storage.save_conversation("c", messages)

        assert storage.load_conversation("c") == saved
        assert saved["messages"] == messages
        count = sum(one["role"] not in ("system", "developer") for one in messages)
        assert storage.list_conversations()[0]["message_count"] == count


def test_what_is_still_in_an_edited_list_stays_what_it_was(hf: Any) -> None:
    """Time, tokens, author, external id and metadata of a message outlive that the list around it changes; statistics and
    retention go by them, and what a channel delivers again is not appended again. A new "ok" is not taken for an old one."""
    long_ago = "2025-03-01T10:00:00.000Z"
    given = [
        {"role": "user", "content": "ok"},
        {"role": "user", "content": "q1", "channel": "whatsapp", "external_id": "wamid.1", "tokens_used": 7},
        {"role": "assistant", "content": "a1", "tokens_used": 9, "author": "agent", "metadata": {"model": "m"}},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "a2"},
        {"role": "assistant", "content": "a3"},
    ]
    hf.conversations.append("c", messages=[one | {"created_at": long_ago} for one in given])
    before = _appended(hf, "c")
    messages = storage.load_conversation("c")["messages"]  # type: ignore[index]

    edited = [
        *messages[1:4],
        {"role": "assistant", "content": "edited"},
        messages[5],
        {"role": "user", "content": "ok"},
    ]
    storage.save_conversation("c", edited)

    after = _appended(hf, "c")
    assert [one["content"] for one in after] == ["q1", "a1", "ok", "edited", "a3", "ok"]
    same = [{key: value for key, value in one.items() if key != "number"} for one in before]
    for place, was in ((0, 1), (1, 2), (2, 3), (4, 5)):
        assert {key: value for key, value in after[place].items() if key != "number"} == same[was]
    assert after[3]["created_at"] == long_ago
    assert after[5]["created_at"] > "2026"
    assert (hf.stats.storage()["messages_last_30_days"], hf.stats.storage()["tokens"]) == (1, 16)
    again = hf.conversations.append("c", "user", "q1", channel="whatsapp", external_id="wamid.1")
    assert again.numbers == [1] and len(_appended(hf, "c")) == 6
    assert storage.load_conversation("c")["messages"] == edited  # type: ignore[index]


def test_the_order_of_a_list_does_not_matter_to_what_stays(hf: Any) -> None:
    """Also a list that was turned round or shuffled keeps the times; one of many messages is aligned in a moment."""
    long_ago = "2025-03-01T10:00:00.000Z"
    hf.conversations.append("c", messages=[one | {"created_at": long_ago} for one in talk(400)])
    same = [{"role": "user", "content": "ok"}] * 1_000
    hf.conversations.append("same", messages=[one | {"created_at": long_ago} for one in same])

    storage.save_conversation("c", talk(400)[::-1])
    started = time.monotonic()
    storage.save_conversation("same", same[:-1])

    assert {one["created_at"] for one in [*_appended(hf, "c"), *_appended(hf, "same")]} == {long_ago}
    assert time.monotonic() - started < 5


def _messages_read(hf: Any, action: Callable[[], object]) -> int:
    """How many messages *action* has the archive look up."""
    count = 0
    messages = hf.engine.transcripts.messages

    def counted(*args: Any, **wanted: Any) -> Any:
        nonlocal count
        page = messages(*args, **wanted)
        count += len(page.items)
        return page

    hf.engine.transcripts.messages = counted
    try:
        action()
    finally:
        del hf.engine.transcripts.messages
    return count


@pytest.mark.parametrize(
    ("change", "is_noticed_at_once"),
    [
        (lambda messages: messages[:-1], True),
        (lambda messages: [], True),
        (lambda messages: messages[1:], True),
        (lambda messages: [{"role": "system", "content": "Be short"}, *messages[1:]], True),
        (lambda messages: [*messages[:-1], {"role": "assistant", "content": "edited"}], True),
        (lambda messages: [*messages[:-1], {"role": "assistant", "content": "edited"}, *turn(9)], True),
        (lambda messages: [*messages[:3], {"role": "user", "content": "edited"}, *messages[4:]], True),
        (lambda messages: list(reversed(messages)), True),
        (lambda messages: [*messages[:-5], {"role": "user", "content": "edited"}, *messages[-4:], *turn(9)], True),
        (lambda messages: [*messages[:3], {"role": "user", "content": "edited"}, *messages[4:], *turn(9)], False),
    ],
)
def test_a_list_that_was_edited_replaces_the_conversation(
    change: Callable[[Any], Any], is_noticed_at_once: bool, data: Path
) -> None:
    """Shortened, or different where a continuation would not be: what is saved is what is loaded. One of the last
    messages changed in a list that grew is noticed as well, an older one when the list is saved again."""
    first = storage.save_conversation("c", talk(10), escalated=True, title="Mine")
    changed = change(talk(10))

    storage.save_conversation("c", changed, escalated=True)

    if not is_noticed_at_once:
        assert storage.load_conversation("c")["messages"] == talk(10) + turn(9)  # type: ignore[index]
        storage.save_conversation("c", changed, escalated=True)
    found = storage.load_conversation("c")
    assert found is not None and found["messages"] == changed
    assert (found["created_at"], found["title"], found["escalated"]) == (first["created_at"], "Mine", True)
    assert storage.list_conversations()[0]["message_count"] == len([one for one in changed if one["role"] != "system"])


def test_what_belongs_to_a_conversation_outlives_its_messages(hf: Any) -> None:
    """A replaced conversation keeps its user, its own fields and its escalation with the time since when somebody waits."""
    hf.conversations.append("c", "user", "Hola", user_id="u1")
    hf.conversations.put("c", {"language": "es"})
    opened = storage.save_escalation("c", "angry", {"mobile": "57"}, priority="high")
    hf.conversations.archive("c")

    storage.save_conversation("c", talk(2))

    head = hf.conversations.head("c")
    assert (head["user_id"], head["language"], head["handler"], head["archived"]) == ("u1", "es", "waiting", False)
    assert storage.load_escalation("c") == opened
    assert storage.load_conversation("c")["language"] == "es"  # type: ignore[index]


def test_an_edited_list_replaces_the_conversation_through_a_daemon_as_well(either: Path) -> None:
    """Its escalation stays open, whoever holds the directory."""
    storage.save_conversation("c", talk(1_500))
    storage.save_escalation("c", "help", {})

    storage.save_conversation("c", talk(1_200) + turn(9))

    assert storage.load_conversation("c")["messages"] == talk(1_200) + turn(9)  # type: ignore[index]
    assert storage.load_escalation("c")["reason"] == "help"  # type: ignore[index]


def test_a_legal_hold_keeps_every_message(hf: Any) -> None:
    """A conversation under one may grow; a list that would replace it is refused, and nothing is changed."""
    storage.save_conversation("c", talk(2))
    hf.conversations.hold("c", reason="court")
    storage.save_conversation("c", talk(3))

    with pytest.raises(OSError) as held:
        storage.save_conversation("c", talk(1))

    assert held.value.errno == errno.EPERM and "legal hold" in held.value.strerror
    assert storage.load_conversation("c")["messages"] == talk(3)  # type: ignore[index]


@pytest.mark.parametrize("whose", ["conversation", "person"])
def test_under_a_legal_hold_new_messages_are_stored(whose: str, either: Path) -> None:
    """With another prompt, or with few messages in place of those that the bot cut off: what was saved is loaded, and everything is kept."""
    storage.save_conversation("c", [*prompt(0), *talk(20)])
    hf = storage._shared.holdfast()
    hf.conversations.put("c", {"user_id": "u1"})
    if whose == "conversation":
        hf.conversations.hold("c", reason="court")
    else:
        hf.conversations.hold_person("u1", reason="court")
    said = talk(20)
    for number in range(20, 24):
        said += turn(number)
        for messages in (
            [*prompt(number), *said],
            [*prompt(number), {"role": "assistant", "content": "in short: …"}, *said[-6:]],
            [*said[:3], {"role": "user", "content": "edited"}, *said[4:]],
            said[-4:],
        ):
            saved = storage.save_conversation("c", messages)

            assert storage.load_conversation("c") == saved and saved["messages"] == messages
            shown = sum(one["role"] != "system" for one in messages)
            assert storage.list_conversations()[0]["message_count"] == shown
    assert [one["content"] for one in _appended(hf, "c")] == [one["content"] for one in [*prompt(0), *said]]


@pytest.mark.parametrize(
    "change",
    [
        lambda messages: [*messages[:-4], {"role": "user", "content": "edited"}, *messages[-3:]],
        lambda messages: [*messages[:-1], {"role": "user", "content": "edited"}],
        lambda messages: messages[:-1],
    ],
)
def test_a_legal_hold_refuses_only_what_it_forbids(change: Callable[[Any], Any], hf: Any) -> None:
    """A message that was changed or left out stays as it was, which is told each time; those after it are stored, once."""
    messages = talk(20)
    storage.save_conversation("c", messages)
    hf.conversations.hold("c", reason="court")
    changed = change(messages)

    for number in (20, 21):
        changed = [*changed, *turn(number)]
        for _ in range(2):
            with pytest.raises(OSError) as held:
                storage.save_conversation("c", changed)
            assert held.value.errno == errno.EPERM and "legal hold" in held.value.strerror

    kept = storage.load_conversation("c")["messages"]  # type: ignore[index]
    assert kept[:40] == messages and kept[-4:] == [*turn(20), *turn(21)]
    assert len(kept) <= 45


def test_what_a_hold_hid_may_be_let_go_later(hf: Any) -> None:
    """When retention deletes of it, after the hold, the list is loaded as before, counted as before, and goes on."""
    from holdfast.ops import MessageExpire

    storage.save_conversation("c", talk(20))
    hf.conversations.hold("c", reason="court")
    storage.save_conversation("c", talk(20)[-4:])
    hf.conversations.hold("c", False)
    hf.engine.submit(MessageExpire(id="c", before_ms=2**45, up_to=6, messages=6, system=0, tokens=0)).wait()

    assert storage.load_conversation("c")["messages"] == talk(20)[-4:]  # type: ignore[index]
    assert storage.list_conversations()[0]["message_count"] == 4
    storage.save_conversation("c", talk(20)[-4:] + turn(20))

    assert storage.load_conversation("c")["messages"] == talk(20)[-4:] + turn(20)  # type: ignore[index]
    assert hf.conversations.head("c")["last_number"] == 42


def test_a_changing_prompt_outlives_what_is_let_go(hf: Any) -> None:
    """Retention may delete the oldest messages: a bot that still has them in its list does not bring them back, and neither
    does one that loads the list."""
    from holdfast.ops import MessageExpire

    for minute, turns in ((0, 5), (1, 6)):
        storage.save_conversation("c", [*prompt(minute), *talk(turns)])
    hf.engine.submit(MessageExpire(id="c", before_ms=2**45, up_to=5, messages=5, system=1, tokens=0)).wait()
    assert storage.load_conversation("c")["messages"] == [*prompt(1), *talk(6)[4:]]  # type: ignore[index]

    storage.save_conversation("c", [*prompt(2), *talk(7)])
    assert storage.load_conversation("c")["messages"] == [*prompt(2), *talk(7)[4:]]  # type: ignore[index]
    storage.save_conversation("c", [*prompt(3), *talk(8)[4:]])
    assert storage.load_conversation("c")["messages"] == [*prompt(3), *talk(8)[4:]]  # type: ignore[index]
    storage.use(hf)
    storage.save_conversation("c", [*prompt(4), *talk(9)[4:]])

    assert storage.load_conversation("c")["messages"] == [*prompt(4), *talk(9)[4:]]  # type: ignore[index]
    assert hf.conversations.head("c")["last_number"] == 19


def test_a_beginning_that_went_through_other_hands_is_no_obstacle(hf: Any) -> None:
    """As in a redacted export: the list begins with what is stored, and can be saved again."""
    storage.save_conversation("c", [*prompt(0), *talk(2)])
    storage.save_conversation("c", [*prompt(1), *talk(2)])
    for spoilt in (
        {"beginning": "mine"},
        {"beginning": {"after": 1, "hidden": 0, "messages": "[redacted]"}},
        {"beginning": {"after": 1, "hidden": 0, "messages": "7"}},
        "mine",
    ):
        hf.conversations.put("c", {"_original": spoilt})

        assert storage.load_conversation("c")["messages"] == [*prompt(0), *talk(2)]  # type: ignore[index]
        saved = storage.save_conversation("c", [*prompt(2), *talk(2)])
        assert storage.load_conversation("c") == saved
    assert saved["_original"] == "mine"


def test_others_may_append_in_between(hf: Any) -> None:
    """A message that came by another way is part of the conversation; a list without it is an edited one."""
    storage.save_conversation("c", talk(1))
    hf.conversations.append("c", "assistant", "from the agent", author="agent")
    seen = storage.load_conversation("c")["messages"]  # type: ignore[index]
    assert seen[-1] == {"role": "assistant", "content": "from the agent", "author": "agent"}

    storage.save_conversation("c", [*seen, *turn(2)])

    assert storage.load_conversation("c")["messages"] == [*seen, *turn(2)]  # type: ignore[index]
    assert [message["author"] for message in hf.conversations.messages("c")][2] == "agent"


def test_messages_that_were_let_go_do_not_come_back(hf: Any) -> None:
    """When retention deleted the oldest, both a list with them and one without them go on where the conversation ends."""
    from holdfast.ops import MessageExpire

    storage.save_conversation("c", talk(3))
    late = 2**45
    hf.engine.submit(MessageExpire(id="c", before_ms=late, up_to=4, messages=4, system=0, tokens=0)).wait()

    storage.save_conversation("c", talk(3) + turn(3))
    assert storage.load_conversation("c")["messages"] == [*turn(2), *turn(3)]  # type: ignore[index]
    storage.use(hf)
    storage.save_conversation("c", [*turn(2), *turn(3), *turn(4)])

    assert storage.load_conversation("c")["messages"] == [*turn(2), *turn(3), *turn(4)]  # type: ignore[index]


def test_the_list_of_conversations(either: Path) -> None:
    """Summaries, without messages and without counting system ones, the last updated first."""
    for number in range(3):
        storage.save_conversation(f"c{number}", [LINES[0], *talk(number)])
        time.sleep(0.002)  # times are to the millisecond
    storage.save_conversation("c0", [LINES[0], *talk(4)], escalated=True)

    listed = storage.list_conversations()

    assert [(one["id"], one["message_count"], one["escalated"]) for one in listed] == [
        ("c0", 8, True),
        ("c2", 4, False),
        ("c1", 2, False),
    ]
    assert list(listed[0]) == ["id", "title", "created_at", "updated_at", "escalated", "message_count"]
    assert datetime.fromisoformat(listed[0]["updated_at"]) >= datetime.fromisoformat(listed[1]["updated_at"])


def test_what_is_not_there_is_none(either: Path) -> None:
    """Missing conversations, escalations and users, whatever their ids, are None, and deleting them is False."""
    for id in ("nobody", "", "../../etc/passwd", "a\0b", "\ud800", "x" * 10_000):
        assert storage.load_conversation(id) is None
        assert storage.load_escalation(id) is None
        assert storage.load_user(id) is None
        assert storage.update_user(id, {"a": 1}) is None
        assert storage.delete_conversation(id) is False
        assert storage.delete_user(id) is False
    assert storage.list_conversations() == storage.list_escalations() == []


def test_deleting(either: Path) -> None:
    """Once true, then false; its escalation goes with it, and a new conversation of the id begins anew."""
    first = storage.save_conversation("c", talk(2))
    storage.save_escalation("c", "help", {})

    assert storage.delete_conversation("c") is True
    assert storage.delete_conversation("c") is False
    assert storage.load_conversation("c") is None
    assert storage.load_escalation("c") is None
    again = storage.save_conversation("c", talk(3))
    assert storage.load_conversation("c")["messages"] == talk(3)  # type: ignore[index]
    assert again["created_at"] >= first["created_at"]


def test_threads_save_at_the_same_time(either: Path) -> None:
    """Each thread's conversation is whole, and one that several save is one of their lists, whole."""

    def save(number: int) -> None:
        for turns in range(1, 6):
            storage.save_conversation(f"own{number}", talk(turns))
            storage.save_conversation("shared", [{"role": "user", "content": f"of {number}"}, *talk(turns)])

    threads = [threading.Thread(target=save, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert all(storage.load_conversation(f"own{number}")["messages"] == talk(5) for number in range(6))  # type: ignore[index]
    shared = storage.load_conversation("shared")
    assert shared is not None
    assert shared["messages"][1:] in [talk(turns) for turns in range(1, 6)]


# Escalations.


def test_escalations(either: Path) -> None:
    """As the files hold them; a second call updates; high priority comes first, then the oldest; the flag shows."""
    storage.save_conversation("c1", talk(1))
    for id, priority in (("c1", "low"), ("c2", "low"), ("c3", "high")):
        storage.save_escalation(id, f"reason of {id}", {"mobile": "0123456789"}, priority)
    opened = storage.load_escalation("c1")
    storage.save_escalation("c1", "still waiting", {"email": "a@example.com"})

    updated = storage.load_escalation("c1")

    assert opened is not None and updated is not None
    assert list(updated) == ["conversation_id", "timestamp", "reason", "contact_info", "priority", "status"]
    assert (updated["reason"], updated["contact_info"]) == ("still waiting", {"email": "a@example.com"})
    assert (updated["timestamp"], updated["status"]) == (opened["timestamp"], "pending")
    assert datetime.fromisoformat(updated["timestamp"]).tzinfo is None
    assert [one["conversation_id"] for one in storage.list_escalations()] == ["c3", "c1", "c2"]
    assert storage.load_conversation("c1")["escalated"] is True  # type: ignore[index]
    assert storage.load_conversation("c2")["messages"] == []  # type: ignore[index]
    storage.save_conversation("c1", talk(2))
    assert storage.load_conversation("c1")["escalated"] is True, "somebody still waits"  # type: ignore[index]


def test_the_flag_without_an_escalation(data: Path) -> None:
    """It is what the last save said."""
    storage.save_conversation("c", talk(1), escalated=True)
    storage.save_conversation("c", talk(2), escalated=False)

    assert storage.load_conversation("c")["escalated"] is False  # type: ignore[index]


@pytest.mark.parametrize("contact", [None, {}, {"name": "José"}, "call 0123456789", ["a", 1], {"n": 2**70}])
def test_any_way_to_reach_a_customer_is_kept(contact: Any, data: Path) -> None:
    """It comes back as it was given."""
    storage.save_escalation("c", "help", contact)

    assert storage.load_escalation("c")["contact_info"] == contact  # type: ignore[index]


# Users.


def test_users(either: Path) -> None:
    """The profile with its id and times; saved again it is replaced but for ``created_at``, updated it is merged."""
    storage.save_user("u1", {"name": "Zoë", "email": "zoe@example.com"})
    first = storage.load_user("u1")
    assert first is not None
    assert list(first) == ["user_id", "created_at", "name", "email", "updated_at"]
    assert datetime.fromisoformat(first["created_at"]).tzinfo is None

    storage.update_user("u1", {"email": "new@example.com", "visits": 2})
    updated = storage.load_user("u1")
    assert updated == first | {"email": "new@example.com", "visits": 2, "updated_at": updated["updated_at"]}  # type: ignore[index]
    storage.save_user("u1", {"name": "Ana"})
    replaced = storage.load_user("u1")
    assert replaced is not None
    assert (replaced["name"], replaced["created_at"], "email" in replaced) == ("Ana", first["created_at"], False)

    assert storage.update_user("nobody", {"a": 1}) is None
    assert (storage.delete_user("u1"), storage.delete_user("u1"), storage.load_user("u1")) == (True, False, None)


# Old files.


def test_the_files_of_the_bot_before_are_there(data: Path) -> None:
    """What was loaded from a file is loaded the same, and what was damaged is None; the list has them all."""
    old = old_conversation("c1", [*LINES, *ODD[:5]], escalated=True)
    left(data, conversations=[old, old_conversation("c2")], escalations=[old_escalation("c1")])
    (data / "conversations" / "broken.json").write_text('{"id": "broken", "messages": [')
    left(data, escalations=[old_escalation("c2", status="resolved")])
    (data / "users").mkdir()
    profile = {
        "user_id": "u1",
        "created_at": "2026-11-01T10:00:00.123456",
        "updated_at": "2026-11-01T10:00:00",
        "name": "Ana",
    }
    (data / "users" / "u1.json").write_text(json.dumps(profile))

    assert storage.load_conversation("c1") == old
    assert storage.load_escalation("c1") == old_escalation("c1")
    assert storage.load_escalation("c2") == old_escalation("c2", status="resolved")
    assert storage.list_escalations() == [old_escalation("c1"), old_escalation("c2", status="resolved")]
    assert storage.load_user("u1") == profile
    assert storage.load_conversation("broken") is None
    assert {one["id"] for one in storage.list_conversations()} == {"c1", "c2"}
    assert (
        storage.save_conversation("c1", [*old["messages"], *turn(1)], escalated=True)["created_at"] == old["created_at"]
    )


def test_old_times_are_shown_as_they_were_written(data: Path) -> None:
    """To the microsecond, with or without a zone, for as long as they stand for the same moment; ours are to the millisecond."""
    old = {
        "c1": {"created_at": "2026-11-01T10:00:00.033812", "updated_at": "2026-11-01T10:05:00.999999"},
        "c2": {"created_at": "2026-11-01T10:00:00+00:00", "updated_at": "2026-11-02T10:00:00.5Z", "_original": "mine"},
        "c3": {"created_at": "2026-11-01 10:00:00", "updated_at": "2026-11-03T10:00:00.000Z", "_original": {"a": 1}},
    }
    said = [{"role": "user", "content": "Hola", "timestamp": "2026-11-01T10:00:00.033812"}]
    conversations = [old_conversation(id, said, **times) for id, times in old.items()]
    escalations = [
        old_escalation("c1", timestamp="2026-11-01T10:01:00.000001"),
        old_escalation("c2", timestamp="2026-11-01T10:01:00.123Z", contact_info=None),
        old_escalation("c3", timestamp="2026-11-01T10:01:00.123456", contact_info={"_original": ["odd"]}),
    ]
    left(data, conversations=conversations, escalations=escalations)

    assert storage.load_conversation("c1") == conversations[0] | {"escalated": True}
    assert storage.load_conversation("c2") == conversations[1] | {"escalated": True}
    # What is exactly our own form is ours, and shown as all of ours is.
    assert storage.load_conversation("c3") == conversations[2] | {
        "escalated": True,
        "updated_at": "2026-11-03T05:00:00",
    }
    times = {one["id"]: (one["created_at"], one["updated_at"]) for one in storage.list_conversations()}
    assert times["c1"] == ("2026-11-01T10:00:00.033812", "2026-11-01T10:05:00.999999")
    assert [storage.load_escalation(id) for id in ("c1", "c3")] == [escalations[0], escalations[2]]
    assert storage.load_escalation("c2") == escalations[1] | {"timestamp": "2026-11-01T05:01:00.123000"}
    assert sorted(one["timestamp"] for one in storage.list_escalations()) == sorted(
        ["2026-11-01T05:01:00.123000", "2026-11-01T10:01:00.000001", "2026-11-01T10:01:00.123456"]
    )

    saved = storage.save_conversation("c1", [*prompt(1), *turn(1)], escalated=True)
    assert saved["created_at"] == "2026-11-01T10:00:00.033812" and saved["updated_at"] > "2026-11-02"
    again = storage.save_escalation("c1", "angry", {"mobile": "57"})
    assert again == escalations[0] | {"reason": "angry", "contact_info": {"mobile": "57"}, "priority": "low"}
    storage.close()
    assert storage.load_conversation("c1") == saved and storage.load_escalation("c1") == again


def test_times_in_messages_stay_as_they_are(either: Path) -> None:
    """However exact, and whether they are times at all; also when the list is replaced."""
    messages = [
        {"role": "user", "content": f"m{number}", field: text}
        for number, (field, text) in enumerate(
            (field, text)
            for field in ("timestamp", "created_at")
            for text in ("2026-11-01T10:00:00.123456", "2026-11-01T10:00:00.1Z", "2026-11-01 10:00", "today", 17, None)
        )
    ]
    storage.save_conversation("c", messages)
    assert storage.load_conversation("c")["messages"] == messages  # type: ignore[index]
    storage.save_conversation("c", messages[1:])
    assert storage.load_conversation("c")["messages"] == messages[1:]  # type: ignore[index]


# Letting go.


def test_old_conversations_are_cleaned_up(either: Path) -> None:
    """Those not updated for so long are removed and counted; those under a legal hold are kept."""
    old = [old_conversation(f"old{number}") for number in range(5)]
    for one in old:
        storage.save_conversation(one["id"], one["messages"])
    storage.save_conversation("new", talk(1))
    hf = storage._shared.holdfast()
    for number in range(5):
        hf.conversations.put(f"old{number}", {"updated_at": "2026-01-01T00:00:00Z", "user_id": f"u{number}"})
    hf.conversations.hold("old3", reason="court")
    hf.conversations.hold_person("u4", reason="court")

    assert storage.cleanup_old_sessions(timeout_hours=24 * 365 * 100) == {"deleted": 0, "errors": 0}
    assert storage.cleanup_old_sessions(timeout_hours=math.inf) == {"deleted": 0, "errors": 0}
    assert storage.cleanup_old_sessions() == {"deleted": 3, "errors": 0}
    assert storage.cleanup_old_sessions() == {"deleted": 0, "errors": 0}
    assert sorted(one["id"] for one in storage.list_conversations()) == ["new", "old3", "old4"]
    with pytest.raises(OSError) as held:
        storage.delete_conversation("old3")
    assert held.value.errno == errno.EPERM and "legal hold" in str(held.value)
    for hours in (-1, math.nan):
        with pytest.raises(ValueError, match="0 or more"):
            storage.cleanup_old_sessions(timeout_hours=hours)


# Errors.


@pytest.mark.parametrize(
    ("action", "number"),
    [
        (lambda: storage.save_conversation("", []), errno.EINVAL),
        (lambda: storage.save_conversation("x" * 300, talk(1)), errno.EINVAL),
        (lambda: storage.save_conversation("c", [{"role": "user", "content": "x" * 300_000}]), errno.EFBIG),
        (lambda: storage.save_conversation("c", talk(1), title="x" * 5_000), errno.EINVAL),
        (lambda: storage.save_escalation("c", "", {}), errno.EINVAL),
        (lambda: storage.save_escalation("c", "help", {}, priority="urgent"), errno.EINVAL),
        (lambda: storage.save_user("u", {"n": math.nan}), errno.EINVAL),
        (lambda: storage.save_user("u", {"text": "x" * (2 << 20)}), errno.EFBIG),
    ],
)
def test_what_cannot_be_kept_is_refused_with_the_reason(action: Callable[[], object], number: int, data: Path) -> None:
    """An OSError that says what was found, and nothing is changed."""
    with pytest.raises(OSError) as refused:
        action()

    assert refused.value.errno == number and refused.value.strerror
    assert storage.list_conversations() == storage.list_escalations() == []
    assert storage.load_user("u") is None


def test_a_directory_that_another_process_holds(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a daemon that answers, the error names the process and what to do."""
    monkeypatch.setattr("holdfast.client.sync.FIRST_CONTACT_S", 0.2)
    with holdfast.open(data), pytest.raises(OSError) as busy:
        storage.list_conversations()

    assert busy.value.errno == errno.EBUSY
    assert str(os.getpid()) in str(busy.value) and "holdfast serve" in str(busy.value)
    assert storage.list_conversations() == []


def unwritable(directory: Path) -> None:
    """Make *directory* one that this process may not use."""
    directory.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        os.chown(directory, 12345, 12345)
    else:
        directory.chmod(0o500)


def test_no_permission(data: Path) -> None:
    """errno 13, with the reason."""
    unwritable(data)

    with pytest.raises(PermissionError) as refused:
        storage.save_conversation("c", talk(1))

    assert refused.value.errno == errno.EACCES and str(data) in refused.value.strerror


# Processes.


BOT = """
import os, sys
from holdfast.compat import chatbot_storage as storage
conversation = storage.load_conversation("c") or {"messages": []}
conversation["messages"].append({"role": "user", "content": sys.argv[1]})
storage.save_conversation("c", conversation["messages"])
if sys.argv[2:] == ["killed"]:
    os.kill(os.getpid(), 9)
"""


def run_bot(data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = clean_environ() | {"DATA_DIR": str(data), "TZ": HERE}
    return subprocess.run(
        [sys.executable, "-c", BOT, *words],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_two_processes_never_mix_their_lists(tmp_path: Path) -> None:
    """Each remembers what it saved last; what the other has made of the conversation since is noticed, also a new beginning."""
    with serving(tmp_path / "data"), contextlib.ExitStack() as opened:
        bots = [opened.enter_context(_other_bot(tmp_path / "data")) for _ in range(2)]
        storage.configure(tmp_path / "data")
        for turn, texts in enumerate(
            (["a1", "a2"], ["b1", "b2", "b3"], ["a2", "a3"], ["b1"], ["a2", "a3", "a4"], ["b1", "b2"])
        ):
            bot = bots[turn % 2]
            assert bot.stdin is not None and bot.stdout is not None
            bot.stdin.write(json.dumps([{"role": "user", "content": text} for text in texts]) + "\n")
            bot.stdin.flush()
            assert bot.stdout.readline() == "saved\n"
            found = storage.load_conversation("c")
            assert found is not None and [message["content"] for message in found["messages"]] == texts
        storage.configure(None)


@contextlib.contextmanager
def _other_bot(data: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that saves each list that it is given."""
    program = (
        "import json, sys\n"
        "from holdfast.compat import chatbot_storage as storage\n"
        "storage.configure(sys.argv[1])\n"
        "for line in sys.stdin:\n"
        "    storage.save_conversation('c', json.loads(line))\n"
        "    print('saved', flush=True)\n"
    )
    bot = subprocess.Popen(
        [sys.executable, "-c", program, str(data)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield bot
    finally:
        assert bot.stdin is not None and bot.stdout is not None
        bot.stdin.close()
        bot.wait(20)
        bot.stdout.close()


def test_a_list_that_follows_after_all_was_let_go_is_saved_whole(hf: Any) -> None:
    """Nothing of it is taken for what retention has deleted."""
    from holdfast.ops import MessageExpire

    storage.save_conversation("c", [{"role": "user", "content": f"old {number}"} for number in range(5)])
    hf.engine.submit(MessageExpire(id="c", before_ms=2**45, up_to=5, messages=5, system=0, tokens=0)).wait()
    assert storage.load_conversation("c")["messages"] == []  # type: ignore[index]

    new = [{"role": "user", "content": f"new {number}"} for number in range(7)]
    storage.save_conversation("c", new)

    found = storage.load_conversation("c")
    assert found is not None and [message["content"] for message in found["messages"]] == [
        one["content"] for one in new
    ]


def test_a_conversation_that_is_saved_while_it_is_read_is_one_list(hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the beginning of one save before the messages of another."""
    storage.save_conversation("c", [*prompt(1), *talk(3)])
    storage.save_conversation("c", [*prompt(2), *talk(4)])
    read, others = storage._shown_messages, [[{"role": "user", "content": f"m{number}"} for number in range(50, 53)]]

    def meanwhile(*arguments: Any) -> Any:
        if others:
            storage.save_conversation("c", others.pop())
        return read(*arguments)

    monkeypatch.setattr(storage, "_shown_messages", meanwhile)
    found = storage.load_conversation("c")

    assert found is not None and [message["content"] for message in found["messages"]] == ["m50", "m51", "m52"]


def test_a_process_that_ends_leaves_everything(data: Path) -> None:
    """The directory is the one of DATA_DIR; the end of the process writes the files and gives it back; a kill loses nothing."""
    ended = run_bot(data, "first")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads((data / "_conversations.json").read_text())[0]["message_count"] == 1
    assert run_bot(data, "second", "killed").returncode == -9
    assert run_bot(data, "third").returncode == 0

    assert [one["content"] for one in storage.load_conversation("c")["messages"]] == ["first", "second", "third"]  # type: ignore[index]


@pytest.mark.parametrize("is_told", [True, False])
def test_a_forked_child_does_not_use_what_is_its_parents(
    data: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """It is told that the directory is held, whether it names it again or not, and the parent goes on."""
    monkeypatch.setattr("holdfast.client.sync.FIRST_CONTACT_S", 0.2)
    storage.save_conversation("c", talk(1))
    monkeypatch.chdir(data)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run here.
        try:
            if is_told:
                storage.configure(data)
            storage.load_conversation("c")
        except OSError as error:
            os.write(writer, str(error.errno).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)

    assert os.read(reader, 100) == str(errno.EBUSY).encode()
    os.close(reader)
    assert storage.load_conversation("c")["messages"] == talk(1)  # type: ignore[index]


def test_a_forked_child_opens_nothing_else_than_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program has opened itself is no good there, and what it says is what the child hears."""
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    with holdfast.open(tmp_path / "own") as own:
        storage.use(own)
        storage.save_conversation("c", talk(1))
        child = os.fork()
        if child == 0:
            # Nothing of pytest may run here.
            try:
                storage.load_conversation("c")
            except OSError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)

        assert "a forked child must open or connect for itself" in os.read(reader, 1_000).decode()
        os.close(reader)
        assert not (tmp_path / "data").exists()
        storage.close()


@pytest.mark.parametrize("hours", [1e308, float("inf"), 1e12])
def test_nothing_is_older_than_everything(data: Path, hours: float) -> None:
    """However many hours that is."""
    storage.save_conversation("c", talk(1))

    assert storage.cleanup_old_sessions(hours) == {"deleted": 0, "errors": 0}


def test_the_zone_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, from TZ; what is no zone is passed over."""
    assert storage.system_zone() == HERE
    monkeypatch.setenv("TZ", ":Europe/Madrid")
    assert storage.system_zone() == "Europe/Madrid"
    monkeypatch.setenv("TZ", "../../etc/passwd")
    assert ZoneInfo(storage.system_zone())


# A bot.


class Client:
    """Talks to the bot as a browser does."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, method: str, path: str, value: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            body = None if value is None else json.dumps(value)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            raw = response.read()
            return response.status, json.loads(raw) if raw else None
        finally:
            connection.close()


@pytest.fixture
def bot() -> Iterator[Client]:
    """The Flask application behind a real server on loopback."""
    server = werkzeug.serving.make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Client(server.port)
    finally:
        server.shutdown()
        thread.join(30)
        server.server_close()


def test_a_flask_bot_needs_no_other_change(either: Path, bot: Client) -> None:
    """Chatting, listing, escalating, profiles and cleaning up, over HTTP, with several customers at once."""
    threads = [
        threading.Thread(
            target=lambda id=id: [bot.ask("POST", f"/chat/{id}", {"message": f"{id} says {n}"}) for n in range(5)]  # type: ignore[misc]
        )
        for id in ("ana", "jos%C3%A9", "573001234567")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    status, answer = bot.ask("POST", "/chat/ana", {"message": "a USB stick 🎶"})
    assert (status, answer) == (200, {"reply": "You said: a USB stick 🎶", "messages": 13})

    status, found = bot.ask("GET", "/chat/ana")
    assert status == 200
    assert [one["content"] for one in found["messages"]][-2:] == ["a USB stick 🎶", "You said: a USB stick 🎶"]
    assert found["title"] == "ana says 0"
    assert {(one["id"], one["message_count"]) for one in bot.ask("GET", "/chat")[1]} == {
        ("ana", 12),
        ("josé", 10),
        ("573001234567", 10),
    }
    assert bot.ask("GET", "/chat/nobody")[0] == 404

    contact = {"name": "José", "mobile": "0123456789"}
    status, escalation = bot.ask(
        "POST", "/chat/ana/escalate", {"reason": "refund", "contact_info": contact, "priority": "high"}
    )
    assert (status, escalation["contact_info"], escalation["priority"]) == (201, contact, "high")
    assert [one["conversation_id"] for one in bot.ask("GET", "/escalations")[1]] == ["ana"]

    assert bot.ask("PUT", "/users/u1", {"name": "Ana"})[1]["name"] == "Ana"
    assert bot.ask("PATCH", "/users/u1", {"city": "Bogotá"})[1]["city"] == "Bogotá"
    assert bot.ask("PATCH", "/users/u2", {"city": "Bogotá"})[0] == 404
    assert [bot.ask("DELETE", "/users/u1")[0] for _ in range(2)] == [204, 404]
    assert bot.ask("POST", "/cleanup?hours=1")[1] == {"deleted": 0, "errors": 0}
    assert bot.ask("POST", "/cleanup?hours=0")[1] == {"deleted": 3, "errors": 0}
    assert bot.ask("GET", "/chat")[1] == []


def test_a_bot_without_permission_says_so(data: Path, bot: Client) -> None:
    """500, with what is wrong with the directory."""
    unwritable(data)

    status, answer = bot.ask("POST", "/chat/ana", {"message": "Hola"})

    assert (status, answer["errno"]) == (500, errno.EACCES)
    assert str(data) in answer["error"]


@needs_root
@pytest.mark.root
def test_a_bot_on_a_full_disk_says_so(tmp_path: Path, bot: Client) -> None:
    """507 with the reason, while what is there can be read; with room it goes on by itself, and nothing is half there."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        storage.configure(disk / "data")
        try:
            answered = 0
            while (answer := bot.ask("POST", "/chat/ana", {"message": "x" * 20_000}))[0] == 200:
                answered += 1
            assert (answer[0], answer[1]["errno"]) == (507, errno.ENOSPC)
            assert "no room" in answer[1]["error"]
            status, found = bot.ask("GET", "/chat/ana")
            assert (status, len(found["messages"])) == (200, 1 + 2 * answered)

            subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
            ends_at = datetime.now() + timedelta(seconds=10)
            while bot.ask("POST", "/chat/ana", {"message": "again"})[0] != 200:
                assert datetime.now() < ends_at, "it did not go on"
            assert len(bot.ask("GET", "/chat/ana")[1]["messages"]) == 1 + 2 * (answered + 1)
        finally:
            storage.configure(None)
    assert answered
