"""Conversations, escalations and figures over HTTP: paths, answers, conditions, errors."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from holdfast.archive.follower import Follower
from tests.http_harness import Served, serve_and

CHAT = "/v1/conversations/573001234567"
USER = {"role": "user", "content": "Hola"}


async def append(served: Served, *contents: str, path: str = CHAT, **more: Any) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    answer = await served.ask("POST", f"{path}/messages", {"messages": messages, **more})
    assert answer.status == 200, answer


def test_a_message_is_appended_and_read(tmp_path: Path):
    """POST answers 200 with the numbers; the whole conversation has its messages, the head alone has not."""

    async def scenario(served: Served) -> None:
        one = await served.ask("POST", f"{CHAT}/messages", USER | {"tokens_used": 2, "metadata": {"a": [1]}})
        several = await served.ask(
            "POST", f"{CHAT}/messages", {"messages": [USER, {"role": "assistant", "content": "¿Sí?"}], "user_id": "ana"}
        )
        whole = await served.ask("GET", CHAT)
        head = await served.ask("GET", f"{CHAT}?messages=false")
        listed = await served.ask("GET", f"{CHAT}/messages?role=user")
        window = await served.ask("GET", f"{CHAT}/window?messages=2")

        assert (one.status, one.json) == (200, {"id": "573001234567", "version": 1, "seq": 1, "numbers": [1]})
        assert (several.status, several.json["numbers"]) == (200, [2, 3])
        assert head.json == {key: value for key, value in whole.json.items() if key != "messages"}
        assert [message["number"] for message in whole.json["messages"]] == [1, 2, 3]
        assert whole.json["messages"][0]["metadata"] == {"a": [1]}
        assert head.headers["ETag"] == whole.headers["ETag"] == '"2"'
        assert [(item["id"], item["version"], item["value"]["number"]) for item in listed.json["items"]] == [
            ("1", 1, 1),
            ("2", 1, 2),
        ]
        assert [item["id"] for item in window.json["items"]] == ["2", "3"]
        assert (window.json["next"], window.json["tokens_used"]) == (None, 2)

    serve_and(scenario, tmp_path)


def test_pages_go_back_and_on(tmp_path: Path):
    """`next` is the `before` of the page before it or, where `after` was given, its `after`; null ends."""

    async def scenario(served: Served) -> None:
        await append(served, *map(str, range(1, 6)))
        for name, first, expected in (
            ("before", "limit=2", [["4", "5"], ["2", "3"], ["1"]]),
            ("after", "limit=2&after=0", [["1", "2"], ["3", "4"], ["5"]]),
        ):
            seen, query = [], first
            while query:
                page = (await served.ask("GET", f"{CHAT}/messages?{query}")).json
                seen.append([item["id"] for item in page["items"]])
                query = f"limit=2&{name}={page['next']}" if page["next"] else ""
            assert seen == expected
        by_number = (await served.ask("GET", f"{CHAT}/messages?before=3")).json
        assert [item["id"] for item in by_number["items"]] == ["1", "2"]

        for id in ("a", "b", "c"):
            await append(served, id, path=f"/v1/conversations/{id}")
        page = (await served.ask("GET", "/v1/conversations?limit=3&active_within=1h")).json
        rest = (await served.ask("GET", f"/v1/conversations?limit=3&active_within=1h&cursor={page['next']}")).json
        assert [item["id"] for item in page["items"] + rest["items"]] == ["c", "b", "a", "573001234567"]
        assert rest["next"] is None

    serve_and(scenario, tmp_path)


def test_who_has_the_version_gets_304(tmp_path: Path):
    """Until something changes; so for escalations."""

    async def scenario(served: Served) -> None:
        await append(served, "Hola")
        escalation = await served.ask(
            "POST", "/v1/escalations", {"conversation_id": "573001234567", "reason": "help", "priority": "high"}
        )
        path = "/v1/escalations/573001234567"
        assert (escalation.status, escalation.json) == (200, {"id": "573001234567", "version": 1, "seq": 2})
        for target in (CHAT, f"{CHAT}?messages=false", path):
            read = await served.ask("GET", target)
            seen = await served.ask("GET", target, headers={"If-None-Match": read.headers["ETag"]})
            assert (read.status, seen.status, seen.body) == (200, 304, b"")
            assert seen.headers["ETag"] == read.headers["ETag"]
        tag = (await served.ask("GET", CHAT)).headers["ETag"]
        await append(served, "more")
        assert (await served.ask("GET", CHAT, headers={"If-None-Match": tag})).status == 200

    serve_and(scenario, tmp_path)


def test_a_whole_conversation_is_of_one_moment(tmp_path: Path):
    """While others append, what is read has exactly the messages that its head counts."""

    async def scenario(served: Served) -> None:
        await append(served, "first")

        async def appending() -> None:
            for number in range(60):
                await append(served, str(number))

        task = asyncio.create_task(appending())
        while not task.done():
            whole = (await served.ask("GET", CHAT)).json
            assert [one["number"] for one in whole["messages"]] == list(range(1, whole["message_count"] + 1))
        await task
        assert len((await served.ask("GET", CHAT)).json["messages"]) == 61

    serve_and(scenario, tmp_path)


def test_a_conversation_has_the_methods_of_a_record(tmp_path: Path):
    """PUT answers 201, then 200; conditions hold; archive, hold and DELETE have their statuses."""

    async def scenario(served: Served) -> None:
        new = await served.ask("PUT", CHAT, {"title": "T"}, headers={"If-None-Match": "*"})
        again = await served.ask("PUT", CHAT, {"colour": "red"}, headers={"If-Match": '"1"'})
        stale = await served.ask("PUT", CHAT, {}, headers={"If-Match": '"1"'})
        stale_message = await served.ask("POST", f"{CHAT}/messages", USER, headers={"If-Match": '"1"'})
        archived = await served.ask("POST", f"{CHAT}/archive")
        active = await served.ask("POST", f"{CHAT}/archive", {"archived": False})
        held = await served.ask("PUT", f"{CHAT}/hold", {"reason": "case 42"})
        kept = await served.ask("DELETE", CHAT)
        free = await served.ask("DELETE", f"{CHAT}/hold")
        person = await served.ask("PUT", "/v1/people/573001234567/hold")
        kept_too = await served.ask("DELETE", CHAT)
        person_free = await served.ask("DELETE", "/v1/people/573001234567/hold")
        deleted = await served.ask("DELETE", CHAT)

        assert [one.status for one in (new, again, stale, stale_message)] == [201, 200, 412, 412]
        assert [one.status for one in (archived, active, held, kept, free)] == [200, 200, 200, 409, 204]
        assert [one.status for one in (person, kept_too, person_free, deleted)] == [200, 409, 204, 204]
        assert kept.json["code"] == "conflict" and "legal hold" in kept.json["detail"]
        assert (await served.ask("GET", CHAT)).status == 404

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("method", "path", "value", "status", "code"),
    [
        ("GET", "/v1/conversations/nobody", None, 404, "not_found"),
        ("GET", "/v1/conversations/nobody?messages=false", None, 404, "not_found"),
        ("GET", "/v1/conversations/nobody/messages", None, 404, "not_found"),
        ("GET", "/v1/conversations/nobody/window", None, 404, "not_found"),
        ("POST", "/v1/conversations/nobody/archive", {}, 404, "not_found"),
        ("PUT", "/v1/conversations/nobody/hold", {}, 404, "not_found"),
        ("GET", "/v1/escalations/nobody", None, 404, "not_found"),
        ("POST", "/v1/escalations", {"conversation_id": "nobody", "reason": "x"}, 404, "not_found"),
        ("GET", "/v1/people/nobody/hold", None, 405, "method_not_allowed"),
        ("GET", "/v1/people/nobody/cart", None, 404, "not_found"),
        ("PATCH", CHAT, {}, 405, "method_not_allowed"),
        ("POST", f"{CHAT}/messages", {"role": "robot", "content": "x"}, 422, "invalid_record"),
        ("POST", f"{CHAT}/messages", {"role": "user", "content": ""}, 422, "invalid_record"),
        ("POST", f"{CHAT}/messages", {}, 422, "invalid_record"),
        ("POST", f"{CHAT}/messages", {"messages": []}, 422, "invalid_record"),
        ("POST", f"{CHAT}/messages", USER | {"colour": "red"}, 422, "invalid_record"),
        ("POST", f"{CHAT}/messages", USER | {"tokens_used": -1}, 422, "invalid_record"),
        ("POST", f"{CHAT}/messages", USER | {"content": "x" * (1 + (256 << 10))}, 413, "too_large"),
        ("POST", f"{CHAT}/messages", {"messages": [USER] * 1001}, 413, "too_large"),
        ("POST", f"{CHAT}/messages", None, 400, "invalid_json"),
        ("POST", "/v1/escalations", {"reason": "x"}, 422, "invalid_record"),
        ("POST", "/v1/escalations", {"conversation_id": "1", "reason": "x", "priority": "urgent"}, 422, "invalid_record"),
        ("PUT", CHAT, {"messages": []}, 422, "invalid_record"),
        ("GET", f"{CHAT}/messages?role=robot", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?before=nonsense", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?before={'9' * 5000}", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?before=2&after=1", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?after=-1", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?limit=0", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?limit=-1", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?since=soon", None, 400, "bad_request"),
        ("GET", f"{CHAT}/messages?until=soon", None, 400, "bad_request"),
        ("GET", f"{CHAT}/window?messages=0", None, 400, "bad_request"),
        ("GET", f"{CHAT}/window?messages=-1", None, 400, "bad_request"),
        ("GET", f"{CHAT}/window?tokens=1.5", None, 400, "bad_request"),
        ("GET", f"{CHAT}?messages=no", None, 400, "bad_request"),
        ("GET", "/v1/conversations?cursor=nonsense", None, 400, "bad_request"),
        ("GET", "/v1/conversations?escalated=yes", None, 400, "bad_request"),
        ("GET", "/v1/conversations?older_than=-1d", None, 400, "bad_request"),
        ("GET", "/v1/conversations?active_within=soon", None, 400, "bad_request"),
        ("GET", "/v1/escalations?status=lost", None, 400, "bad_request"),
        ("GET", "/v1/escalations?priority=urgent", None, 400, "bad_request"),
        ("GET", "/v1/stats/sales?from=2026-13-01", None, 400, "bad_request"),
        ("GET", "/v1/stats/sales?to=20261121", None, 400, "bad_request"),
        ("GET", "/v1/stats/sales?from=2026-11-22&to=2026-11-21", None, 400, "bad_request"),
        ("GET", "/v1/stats/sales?group=year", None, 400, "bad_request"),
        ("GET", "/v1/stats/storage?days=1", None, 400, "bad_request"),
        ("PUT", "/v1/collections/conversations/1", {}, 422, "invalid_record"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(tmp_path: Path, method: str, path: str, value: Any, status: int, code: str):
    """Each with its status and its stable code, and nothing is changed."""

    async def scenario(served: Served) -> None:
        await append(served, "Hola")
        seq = served.engine.status()["seq"]
        answer = await served.ask(method, path, value)

        assert (answer.status, answer.json["code"]) == (status, code), answer
        assert answer.json["detail"] and answer.headers["Content-Type"] == "application/problem+json"
        assert served.engine.status()["seq"] == seq

    serve_and(scenario, tmp_path)


def test_a_cursor_belongs_to_its_list(tmp_path: Path):
    """That of another list, conversation or filter is refused, whatever numbers stand in it."""

    async def scenario(served: Served) -> None:
        await append(served, "1", "2")
        await append(served, "1", "2", path="/v1/conversations/other")
        older = (await served.ask("GET", f"{CHAT}/messages?limit=1")).json["next"]
        chats = (await served.ask("GET", "/v1/conversations?limit=1")).json["next"]
        for path in (
            f"/v1/conversations/other/messages?before={older}",
            f"{CHAT}/messages?before={older}&role=user",
            f"{CHAT}/messages?before={chats}",
            f"/v1/conversations?cursor={older}",
            f"/v1/conversations?cursor={chats}&archived=false",
            f"/v1/escalations?cursor={chats}",
        ):
            answer = await served.ask("GET", path)
            assert (answer.status, answer.json["code"]) == (400, "bad_request"), path
        assert (await served.ask("GET", f"{CHAT}/messages?before={older}")).status == 200

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("place", [2**63, 2**64 - 1, 2**80, -(2**70), 1e300, "x", None, [], [2**70, "a"], [5, 5]])
def test_a_forged_cursor_does_no_harm(tmp_path: Path, place: Any):
    """Whatever stands in it, there is an answer, and it is no 5xx."""

    def forged(of: str, filters: list[Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps([of, filters, place]).encode()).decode().rstrip("=")

    async def scenario(served: Served) -> None:
        await append(served, "1")
        for path in (
            f"{CHAT}/messages?before={forged('messages', ['573001234567', None, None, None, None])}",
            f"/v1/conversations?cursor={forged('conversations', [None] * 8)}",
            f"/v1/escalations?cursor={forged('escalations', [None, None])}",
        ):
            assert (await served.ask("GET", path)).status in (200, 400), path

    serve_and(scenario, tmp_path)


def test_an_idempotency_key_repeats_the_numbers(tmp_path: Path):
    """The header does for messages what it does for every change."""

    async def scenario(served: Served) -> None:
        answers = [
            await served.ask("POST", f"{CHAT}/messages", USER, headers={"Idempotency-Key": "k"}) for _ in range(2)
        ]
        assert answers[0].json == answers[1].json == {"id": "573001234567", "version": 1, "seq": 1, "numbers": [1]}
        retried = [
            await served.ask("POST", f"{CHAT}/messages", USER, headers={"Holdfast-Retry": "bot-4f0c27/1"})
            for _ in range(2)
        ]
        assert retried[0].json == retried[1].json and retried[0].json["numbers"] == [2]

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("header", [{"Idempotency-Key": "k"}, {"Holdfast-Retry": "bot-4f0c27/1"}], ids=["key", "retry"])
@pytest.mark.parametrize("is_flushed", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
def test_a_repeat_gets_the_numbers_behind_a_restart(
    tmp_path: Path, header: dict[str, str], is_flushed: bool, in_batch: bool
):
    """Whether they come back from the journal or from a snapshot, also those of a message that was there before."""
    messages = [USER | {"channel": "w", "external_id": external_id} for external_id in ("1", "2")]
    answers = []

    async def scenario(served: Served) -> None:
        if not answers:
            await served.ask("POST", f"{CHAT}/messages", messages[0])
        if in_batch:
            op = {"op": "message.append", "id": "573001234567", "messages": messages}
            sent = await served.ask("POST", "/v1/batch", {"ops": [op], "atomic": True}, headers=header)
            answers.append(sent.json["results"][0]["numbers"])
        else:
            sent = await served.ask("POST", f"{CHAT}/messages", {"messages": messages}, headers=header)
            answers.append(sent.json["numbers"])
        assert sent.status == 200, sent
        assert [one["number"] for one in (await served.ask("GET", CHAT)).json["messages"]] == [1, 2]
        if not is_flushed:
            copied(tmp_path / "data", tmp_path / "copy")

    serve_and(scenario, tmp_path / "data")
    serve_and(scenario, tmp_path / ("data" if is_flushed else "copy"))

    assert answers == [[1, 2], [1, 2]]


def copied(data_dir: Path, copy: Path) -> None:
    """Take *data_dir* as it is while somebody has it: what a crash would leave."""
    if data_dir.is_dir() and not copy.exists():
        shutil.copytree(data_dir, copy, ignore=lambda _, names: [name for name in names if name.endswith(".sock")])


def test_sales_are_added_up_for_charts(tmp_path: Path):
    """Any parameter adds `periods`; without one the answer is `sales_stats.json` to the byte. Money stays exact."""

    async def scenario(served: Served) -> None:
        ops = [
            {"op": "stats.order", "product_type": "music", "at": "2026-11-01T00:00:00Z"},
            {"op": "stats.completion", "revenue": "0.1", "at": "2026-11-01T00:00:00Z"},
            {"op": "stats.completion", "revenue": "0.2", "at": "2026-11-02T00:00:00Z"},
        ]
        assert (await served.ask("POST", "/v1/batch", {"ops": ops, "atomic": True})).status == 200
        plain = await served.ask("GET", "/v1/stats/sales")
        monthly = await served.ask("GET", "/v1/stats/sales?group=month")
        music = await served.ask("GET", "/v1/stats/sales?product=music&from=2026-11-01&to=2026-11-01")

        assert plain.body == served.engine.sales() and "periods" not in plain.json
        exactly = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode(monthly.body)
        assert exactly["periods"] == [
            {
                "period": "2026-11",
                "from": "2026-11-01",
                "to": "2026-11-30",
                "totalOrders": 1,
                "completedOrders": 2,
                "totalRevenue": Decimal("0.3"),
                "productTypes": {"music": 1},
            }
        ]
        assert {key: value for key, value in monthly.json.items() if key != "periods"} == plain.json
        assert [(one["period"], one["totalOrders"], "totalRevenue" in one) for one in music.json["periods"]] == [
            ("2026-11-01", 1, False)
        ]

    serve_and(scenario, tmp_path)


def test_reads_that_wait_for_the_archive_hold_up_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However many they are: lists of sessions, figures and flushes go on."""
    may_read = threading.Event()
    archive = Follower.archive

    def slow(self: Follower, *options: Any) -> Any:
        may_read.wait(60)
        return archive(self, *options)

    async def scenario(served: Served) -> None:
        await append(served, "Hola")
        monkeypatch.setattr(Follower, "archive", slow)
        paths = [
            CHAT,
            f"{CHAT}/messages",
            f"{CHAT}/window",
            "/v1/conversations",
            "/v1/escalations",
            "/v1/stats/storage",
        ]
        reads = [asyncio.create_task(served.ask("GET", path)) for path in paths * 8]
        await asyncio.sleep(0.2)
        try:
            others = [
                await served.ask("GET", "/v1/sessions"),
                await served.ask("GET", "/metrics"),
                await served.ask("POST", "/v1/admin/flush"),
            ]
        finally:
            may_read.set()

        assert [answer.status for answer in others] == [200] * 3
        assert {answer.status for answer in await asyncio.gather(*reads)} == {200}

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    "wanted",
    [
        {"delete_messages": True},
        {"idle_hours": 1, "days": 1},
        {"idle_hours": 1, "delete_messages": True},
        {"idle_hours": 1, "dry_run": True},
    ],
)
def test_a_cleanup_that_does_not_say_what_goes_is_refused(tmp_path: Path, wanted: dict[str, Any]):
    """Rather than to delete something else than was meant."""

    async def scenario(served: Served) -> None:
        await append(served, "Hola")

        answer = await served.ask("POST", "/v1/admin/cleanup", wanted)

        assert (answer.status, answer.json["code"]) == (422, "invalid_record")
        assert (await served.ask("GET", CHAT)).json["message_count"] == 1

    serve_and(scenario, tmp_path)
