"""The HTTP interface: paths, conditions, answers, errors."""

from __future__ import annotations

import asyncio
import errno
import gzip
import os
import stat
from pathlib import Path

import msgspec
import pytest

from holdfast.errors import SettingsError
from holdfast.http.listen import open_listeners
from tests.http_harness import Served, serve_and, serving, status_of

PHONE = "573001234567"
SESSION = f"/v1/sessions/{PHONE}"


# One record.


def test_a_record_comes_back_as_it_was_stored(tmp_path: Path):
    """PUT answers 201 then 200; GET gives the value with the version as its ETag and nothing of ours inside."""

    async def scenario(served: Served) -> None:
        first = await served.ask("PUT", SESSION, {"currentState": "catalog", "n": 1.5, "ñ": ["é", None]})
        second = await served.ask("PUT", SESSION, {"currentState": "cart", "lastActivity": "2026-11-21T06:00:00.000Z"})
        read = await served.ask("GET", SESSION)

        assert [first.status, second.status, read.status] == [201, 200, 200]
        assert first.json == {"id": PHONE, "version": 1, "seq": 1}
        assert second.json["version"] == 2
        assert read.headers["ETag"] == '"2"'
        assert read.json["currentState"] == "cart"
        assert read.json["recipientPhone"] == PHONE
        assert b"_holdfast" not in read.body

    serve_and(scenario, tmp_path)


def test_a_patch_merges(tmp_path: Path):
    """PATCH follows RFC 7396, also under its own media type; null removes a key."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"a": {"b": 1, "c": 2}, "d": 3})
        answer = await served.ask(
            "PATCH",
            SESSION,
            {"a": {"b": None}, "e": 5},
            headers={"Content-Type": "application/merge-patch+json"},
        )
        read = (await served.ask("GET", SESSION)).json

        assert answer.status == 200
        assert (read["a"], read["d"], read["e"]) == ({"c": 2}, 3, 5)

    serve_and(scenario, tmp_path)


def test_a_deleted_record_is_gone(tmp_path: Path):
    """DELETE answers 204 without a body; afterwards the id is not found."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"a": 1})
        deleted = await served.ask("DELETE", SESSION)
        read = await served.ask("GET", SESSION)

        assert (deleted.status, deleted.body) == (204, b"")
        assert (read.status, read.json["code"]) == (404, "not_found")
        assert read.headers["Content-Type"] == "application/problem+json"

    serve_and(scenario, tmp_path)


def test_head_is_get_without_a_body(tmp_path: Path):
    """HEAD has the headers of GET, the length of its body included."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"a": 1})
        read = await served.ask("GET", SESSION)
        head = await served.ask("HEAD", SESSION)

        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == read.headers["Content-Length"] == str(len(read.body))
        assert head.headers["ETag"] == read.headers["ETag"]

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("path", ["/v1/users/ana", "/v1/collections/notes/ana", "/v1/orders/4711"])
def test_every_kind_of_record_has_the_same_paths(tmp_path: Path, path: str):
    """Users, custom collections and orders take PUT, GET, PATCH, DELETE and a list."""

    async def scenario(served: Served) -> None:
        value = {"recipientPhone": PHONE, "name": "Ana"}
        put = await served.ask("PUT", path, value)
        patched = await served.ask("PATCH", path, {"name": "Eva"})
        read = await served.ask("GET", path)
        listed = await served.ask("GET", path.rsplit("/", 1)[0])
        deleted = await served.ask("DELETE", path)

        assert [put.status, patched.status, read.status, listed.status, deleted.status] == [201, 200, 200, 200, 204]
        assert read.json["name"] == "Eva"
        assert [item["id"] for item in listed.json["items"]] == [path.rsplit("/", 1)[1]]
        assert listed.json["items"][0]["value"] == read.json

    serve_and(scenario, tmp_path)


def test_custom_collections_are_named(tmp_path: Path):
    """GET /v1/collections names those that exist, with their counts; names of ours are refused."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/collections/notes/1", {"text": "x"})
        listed = await served.ask("GET", "/v1/collections")
        refused = [
            await served.ask("GET", f"/v1/collections/{name}/1") for name in ("orders", "_keys", "..", "A", "tokens")
        ]

        assert listed.json["items"] == [{"name": "notes", "count": 1}]
        assert [answer.status for answer in refused] == [422] * 5

    serve_and(scenario, tmp_path)


# Conditions.


def test_a_write_may_depend_on_the_version(tmp_path: Path):
    """If-Match and If-None-Match: * hold or give 412; the record stays as it was."""

    async def scenario(served: Served) -> None:
        async def put(headers: dict[str, str]) -> int:
            return (await served.ask("PUT", SESSION, {"a": 1}, headers=headers)).status

        assert await put({"If-Match": "*"}) == 412
        assert await put({"If-None-Match": "*"}) == 201
        assert await put({"If-None-Match": "*"}) == 412
        assert await put({"If-Match": '"1"'}) == 200
        assert await put({"If-Match": '"1"'}) == 412
        assert await put({"If-Match": 'W/"2"'}) == 200
        assert await put({"If-Match": "*"}) == 200
        assert await put({"If-Match": '"nonsense"'}) == 412
        assert await put({"If-Match": '"4", "5"'}) == 400
        assert await put({"If-None-Match": '"4"'}) == 400
        assert (await served.ask("DELETE", SESSION, headers={"If-Match": '"3"'})).status == 412
        assert (await served.ask("DELETE", SESSION, headers={"If-Match": '"4"'})).status == 204

    serve_and(scenario, tmp_path)


def test_an_unchanged_record_is_not_sent_again(tmp_path: Path):
    """GET with If-None-Match of the present version answers 304 with the ETag and no body."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"a": 1})
        same = await served.ask("GET", SESSION, headers={"If-None-Match": '"7", W/"1"'})
        other = await served.ask("GET", SESSION, headers={"If-None-Match": '"2"'})

        assert (same.status, same.body, same.headers["ETag"]) == (304, b"", '"1"')
        assert other.status == 200

    serve_and(scenario, tmp_path)


def test_a_repeated_key_gives_the_first_answer(tmp_path: Path):
    """A second request with the same Idempotency-Key changes nothing and answers as the first did."""

    async def scenario(served: Served) -> None:
        headers = {"Idempotency-Key": "k-1"}
        first = await served.ask("PUT", SESSION, {"a": 1}, headers=headers)
        second = await served.ask("PUT", SESSION, {"a": 1}, headers=headers)

        assert second.json == first.json
        assert (await served.ask("GET", SESSION)).headers["ETag"] == '"1"'

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("name", ["Holdfast-Lease", "Holdfast-Durability", "Idempotency-Key"])
def test_an_empty_header_is_no_missing_one(tmp_path: Path, name: str):
    """A client whose variable is empty is told so, and does not write without its lease, or key, unawares."""

    async def scenario(served: Served) -> None:
        by_header = await served.ask("PUT", SESSION, {"a": 1}, headers={name: ""})
        in_batch = await served.ask("POST", "/v1/batch", {"ops": []}, headers={name: ""})
        read = await served.ask("GET", SESSION)

        assert (by_header.status, by_header.json["code"]) == (400, "bad_request")
        assert in_batch.status == (200 if name == "Holdfast-Lease" else 400)  # its ops have a field for it
        assert read.status == 404

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("query", ["lease=", "durability=", "ttl="])
def test_an_empty_parameter_is_no_missing_one(tmp_path: Path, query: str):
    """The same in the query."""

    async def scenario(served: Served) -> None:
        refused = await served.ask("PUT", f"{SESSION}?{query}", {"a": 1})

        assert refused.status in (400, 422)
        assert (await served.ask("GET", SESSION)).status == 404

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("path", "header", "value"),
    [(f"{SESSION}?lease=1", "Holdfast-Lease", 2), (f"{SESSION}?durability=always", "Holdfast-Durability", "everysec")],
)
def test_a_parameter_and_a_header_do_not_contradict_each_other(tmp_path: Path, path: str, header: str, value: object):
    """Neither wins in silence."""

    async def scenario(served: Served) -> None:
        refused = await served.ask("PUT", path, {"a": 1}, headers={header: str(value)})

        assert (refused.status, refused.json["code"]) == (400, "bad_request")
        assert header in refused.json["detail"]

    serve_and(scenario, tmp_path)


# The paths that do more.


def test_a_touch_sets_the_last_activity(tmp_path: Path):
    """POST touch needs no body and moves lastActivity to now."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"lastActivity": "2020-01-01T00:00:00.000Z"})
        answer = await served.ask("POST", f"{SESSION}/touch?ttl=12h")

        assert answer.status == 200
        assert (await served.ask("GET", SESSION)).json["lastActivity"] > "2026"

    serve_and(scenario, tmp_path)


def test_a_lease_fences_writers(tmp_path: Path):
    """While a lease is held, only writes with its generation pass; after its release others may take it."""

    async def scenario(served: Served) -> None:
        lease = await served.ask("POST", f"{SESSION}/lease", {"ttl": "30s", "owner": "worker-1"})
        generation = lease.json["generation"]
        held = await served.ask("PUT", SESSION, {"a": 1})
        stale = await served.ask("PUT", SESSION, {"a": 1}, headers={"Holdfast-Lease": str(generation + 1)})
        right = await served.ask("PUT", SESSION, {"a": 1}, headers={"Holdfast-Lease": str(generation)})
        by_query = await served.ask("POST", f"{SESSION}/touch?lease={generation}")
        second = await served.ask("POST", f"{SESSION}/lease", {"ttl": 5, "owner": "worker-2"})
        released = await served.ask("DELETE", f"{SESSION}/lease?generation={generation}")
        third = await served.ask("POST", f"{SESSION}/lease", {"ttl": 5, "owner": "worker-2"})
        given_back = await served.ask("POST", f"{SESSION}/release", {"generation": third.json["generation"]})

        assert lease.status == 200
        assert lease.json["expires_at"].endswith("Z")
        assert (held.status, held.json["code"]) == (423, "leased")
        assert stale.status in (409, 423)
        assert right.status in (200, 201)
        assert by_query.status == 200
        assert second.status == 423
        assert released.status == 204
        assert third.json["generation"] > generation
        assert given_back.status == 200

    serve_and(scenario, tmp_path)


def test_a_completed_order_counts_once(tmp_path: Path):
    """However often completion is repeated, revenue counts once and exactly."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/orders/1", {"recipientPhone": PHONE})
        await served.ask("PUT", "/v1/orders/2", {"recipientPhone": PHONE})
        answers = [await served.ask("POST", "/v1/orders/1/complete", body=b'{"revenue": 0.1}') for _ in range(3)]
        await served.ask("POST", "/v1/orders/2/complete", {"revenue": "0.2"})
        sales = await served.ask("GET", "/v1/stats/sales")

        assert [answer.status for answer in answers] == [200] * 3
        assert sales.json["totals"]["allTimeCompleted"] == 2
        assert b'"allTimeRevenue":0.3' in sales.body.replace(b" ", b"")

    serve_and(scenario, tmp_path)


def test_a_cancelled_order_is_closed(tmp_path: Path):
    """POST cancel needs no reason; completing it afterwards is a conflict."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/orders/1", {"recipientPhone": PHONE})
        cancelled = await served.ask("POST", "/v1/orders/1/cancel")
        completed = await served.ask("POST", "/v1/orders/1/complete")

        assert cancelled.status == 200
        assert (completed.status, completed.json["code"]) == (409, "conflict")

    serve_and(scenario, tmp_path)


def test_a_batch_answers_for_each_op(tmp_path: Path):
    """Ops of a batch that is not atomic stand or fall alone, each with an outcome in its place."""

    async def scenario(served: Served) -> None:
        ops = [
            {"op": "session.put", "id": PHONE, "value": {"a": 1}},
            {"op": "session.touch", "id": "nobody"},
            {"op": "order.put", "id": "1", "value": {"recipientPhone": PHONE}},
            {"op": "session.delete", "id": PHONE},
        ]
        answer = await served.ask("POST", "/v1/batch?durability=everysec", {"ops": ops})
        results = answer.json["results"]

        assert answer.status == 200
        assert [result["status"] for result in results] == [201, 404, 201, 204]
        assert results[1]["code"] == "not_found"
        assert results[0]["version"] == 1
        assert answer.json["seq"] == results[3]["seq"]

    serve_and(scenario, tmp_path)


def test_an_atomic_batch_is_all_or_nothing(tmp_path: Path):
    """The op that is refused decides for all, and the problem says which one it was."""

    async def scenario(served: Served) -> None:
        ops = [{"op": "session.put", "id": PHONE, "value": {"a": 1}}, {"op": "session.touch", "id": "nobody"}]
        refused = await served.ask("POST", "/v1/batch", {"atomic": True, "ops": ops})
        read = await served.ask("GET", SESSION)
        done = await served.ask("POST", "/v1/batch", {"atomic": True, "ops": ops[:1]})

        assert (refused.status, refused.json["index"]) == (404, 1)
        assert read.status == 404
        assert done.json["results"][0]["status"] == 201

    serve_and(scenario, tmp_path)


def test_the_operator_is_served(tmp_path: Path):
    """Flush reports what was written, reload what changed or why not, status gives counts."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"a": 1})
        flush = await served.ask("POST", "/v1/admin/flush")
        reload = await served.ask("POST", "/v1/admin/reload")
        served.operator.invalid = "sessions.ttl: expected a duration"
        refused = await served.ask("POST", "/v1/admin/reload")
        status = await served.ask("GET", "/v1/admin/status")

        assert flush.json["reason"] == "api"
        assert flush.json["snapshot_seq"] == 1
        assert (tmp_path / "chat_sessions.json").exists()
        assert reload.json["changed"] == ["sessions.ttl"]
        assert (refused.status, refused.json["code"]) == (422, "invalid_settings")
        assert status.status == 200

    serve_and(scenario, tmp_path)


def test_readiness_follows_the_state(tmp_path: Path):
    """/readyz is 200 while running, also when degraded, and 503 before and after; /healthz is always 200."""

    async def scenario(served: Served) -> None:
        ready = await served.ask("GET", "/readyz")
        served.state = "STARTING"
        starting = await served.ask("GET", "/readyz")
        served.state = "SHUTTING_DOWN"
        stopping = await served.ask("GET", "/readyz")
        healthy = await served.ask("GET", "/healthz")

        assert (ready.status, ready.json["status"]) == (200, "ready")
        assert (starting.status, starting.json["status"]) == (503, "starting")
        assert (stopping.status, stopping.json["status"]) == (503, "stopping")
        assert (healthy.status, healthy.json) == (200, {"status": "ok"})

    serve_and(scenario, tmp_path)


# Lists.


def test_a_list_comes_in_pages(tmp_path: Path):
    """Following the cursor gives every record exactly once, in pages of at most the limit."""

    async def scenario(served: Served) -> None:
        ops = [{"op": "user.put", "id": f"u{n}", "value": {"n": n}} for n in range(25)]
        await served.ask("POST", "/v1/batch", {"ops": ops})
        seen, cursor, pages = [], "", 0
        while True:
            answer = await served.ask("GET", f"/v1/users?limit=10{cursor}")
            seen += [item["id"] for item in answer.json["items"]]
            pages += 1
            if answer.json["next"] is None:
                break
            cursor = f"&cursor={answer.json['next']}"

        assert sorted(seen) == sorted(f"u{n}" for n in range(25))
        assert pages == 3

    serve_and(scenario, tmp_path)


def test_a_list_takes_filters(tmp_path: Path):
    """state and since narrow a list; an offset with a bare plus is understood."""

    async def scenario(served: Served) -> None:
        old = {"currentState": "cart", "lastActivity": "2026-01-01T00:00:00.000Z"}
        await served.ask("PUT", "/v1/sessions/1", old)
        await served.ask("PUT", "/v1/sessions/2", {"currentState": "cart"})
        await served.ask("PUT", "/v1/sessions/3", {"currentState": "catalog"})

        async def ids(query: str) -> list[str]:
            return sorted(item["id"] for item in (await served.ask("GET", f"/v1/sessions?{query}")).json["items"])

        assert await ids("state=cart") == ["1", "2"]
        assert await ids("since=2026-01-02T00:00:00+02:00") == ["2", "3"]
        assert await ids("since=2026-01-02T00:00:00Z&state=cart") == ["2"]

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=x",
        "limit=" + "9" * 5000,
        "cursor=%00",
        "cursor=nonsense",
        "since=yesterday",
        "since=99999-01-01T00:00:00Z",
        "colour=red",
        "limit=1&limit=2",
        "limit=%ff",
        "&".join(f"a{n}=1" for n in range(100)),
    ],
)
def test_a_wrong_query_is_refused(tmp_path: Path, query: str):
    """A parameter that is unknown, doubled or without meaning gives 400 bad_request and says what is known."""

    async def scenario(served: Served) -> None:
        answer = await served.ask("GET", f"/v1/sessions?{query}")

        assert (answer.status, answer.json["code"]) == (400, "bad_request")

    serve_and(scenario, tmp_path)


# Errors.


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v2/sessions", 404, "not_found"),
        ("GET", "/v1/sessions/", 404, "not_found"),
        ("GET", "/v1/sessions/1/2/3", 404, "not_found"),
        ("POST", "/v1/users/1/touch", 404, "not_found"),
        ("GET", "/v1/people", 404, "not_found"),
        ("GET", "/v1/people/1", 404, "not_found"),
        ("GET", "/metrics/x", 404, "not_found"),
        ("POST", "/v1/sessions/1", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/sessions/1", 405, "method_not_allowed"),
        ("GET", "/v1/batch", 405, "method_not_allowed"),
        ("DELETE", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/sessions/%zz", 400, "bad_request"),
        ("GET", "/v1/sessions/%ff", 400, "bad_request"),
        ("DELETE", "/v1/sessions/1?durability=never", 400, "bad_request"),
        ("PUT", "/v1/sessions/1", 400, "invalid_json"),
        ("POST", "/v1/batch", 400, "invalid_json"),
        ("DELETE", "/v1/sessions/1/lease", 400, "bad_request"),
    ],
)
def test_a_request_without_meaning_is_refused(tmp_path: Path, method: str, path: str, status: int, code: str):
    """Each wrong path, method or parameter has its status and its stable code."""

    async def scenario(served: Served) -> None:
        answer = await served.ask(method, path)

        assert (answer.status, answer.json["code"]) == (status, code)
        assert answer.json["status"] == status
        assert answer.json["detail"]
        assert ("Allow" in answer.headers) is (status == 405)

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "application/json; charset=utf-8"}, 201),
        ({"Content-Type": "Application/JSON"}, 201),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/merge-patch+json"}, 415),
        ({"Content-Type": "application/json; charset=latin-1"}, 415),
        ({"Content-Encoding": "gzip"}, 415),
    ],
)
def test_a_body_must_be_json(tmp_path: Path, headers: dict[str, str], status: int):
    """A body of another media type, charset or encoding is refused with 415."""

    async def scenario(served: Served) -> None:
        answer = await served.ask("PUT", SESSION, body=b'{"a": 1}', headers=headers)

        assert answer.status == status

    serve_and(scenario, tmp_path)


def test_an_id_in_the_body_must_be_the_one_in_the_path(tmp_path: Path):
    """It is filled in when absent, and refused when it differs."""

    async def scenario(served: Served) -> None:
        answer = await served.ask("PUT", SESSION, {"recipientPhone": "somebody else"})

        assert (answer.status, answer.json["code"]) == (422, "invalid_record")

    serve_and(scenario, tmp_path)


def test_before_the_data_is_loaded_the_service_says_so(tmp_path: Path):
    """Without an engine every data path answers 503 with Retry-After; attach makes it serve."""

    async def scenario(served: Served) -> None:
        engine = served.service.engine
        served.service._engine = None
        early = await served.ask("GET", SESSION)
        healthy = await served.ask("GET", "/healthz")
        served.service.attach(engine)
        late = await served.ask("GET", SESSION)

        assert (early.status, early.json["code"]) == (503, "unavailable")
        assert early.headers["Retry-After"] == "1"
        assert healthy.status == 200
        assert late.status == 404

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("failure", "detail"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "no permission on the data directory"),
        (OSError(errno.EROFS, "Read-only file system"), "no permission on the data directory"),
        (ZeroDivisionError("secret text"), "an error inside Holdfast"),
    ],
)
def test_a_fault_of_ours_is_told_without_its_inside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failure: Exception, detail: str
):
    """An unexpected error is 500 internal and one line in the log; permission problems say so."""

    async def scenario(served: Served) -> None:
        served.operator.failure = failure
        answer = await served.ask("POST", "/v1/admin/flush")

        assert (answer.status, answer.json["code"]) == (500, "internal")
        assert answer.json["detail"].startswith(detail)
        assert b"secret" not in answer.body

    serve_and(scenario, tmp_path)

    assert capsys.readouterr().out.count("request.failed") == 1


def test_changed_limits_hold_at_once(tmp_path: Path):
    """After a reload the next request is measured by the new limits."""

    async def scenario(served: Served) -> None:
        body = b'{"a":"' + b"x" * 3000 + b'"}'
        before = await served.ask("PUT", SESSION, body=body)
        limits = msgspec.structs.replace(served.settings.limits, body_bytes=2048)
        served.service.reconfigure(msgspec.structs.replace(served.settings, limits=limits))
        after = await served.ask("PUT", SESSION, body=body)

        assert (before.status, after.status) == (201, 413)

    serve_and(scenario, tmp_path)


# The wire.


def test_a_client_that_goes_away_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A body that breaks off is no request, and no fault of ours to log."""

    async def scenario(served: Served) -> None:
        _, writer = await served.connect()
        writer.write(b'PUT /v1/users/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"a":1}')
        await asyncio.sleep(0.1)
        writer.close()
        await asyncio.sleep(0.1)
        await asyncio.wait_for(served.service.drain(), 1)

        assert not served.service.connections
        assert served.engine.get("users", "1") is None

    serve_and(scenario, tmp_path)

    assert "request.failed" not in capsys.readouterr().out


def test_long_answers_are_compressed_on_request(tmp_path: Path):
    """gzip for bodies above 1 KiB and only when asked for; the ETag stays the version."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", SESSION, {"text": "x" * 5000})
        plain = await served.ask("GET", SESSION, headers={"Accept-Encoding": "identity"})
        zipped = await served.ask("GET", SESSION, headers={"Accept-Encoding": "br, gzip;q=0.5"})
        refused = await served.ask("GET", SESSION, headers={"Accept-Encoding": "gzip;q=0"})

        assert "Content-Encoding" not in plain.headers
        assert zipped.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(zipped.body) == plain.body == refused.body
        assert zipped.headers["ETag"] == '"1"'

    serve_and(scenario, tmp_path)


def test_pipelined_requests_are_answered_in_order(tmp_path: Path):
    """Requests sent without waiting come back one by one on the same connection."""

    async def scenario(served: Served) -> None:
        requests = b"".join(
            b"PUT /v1/users/%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 7\r\n%b\r\n"
            % (n, b"Connection: close\r\n" * (n == 99))
            + b'{"a":1}'
            for n in range(100)
        )
        raw = await served.send_raw(requests)

        answers = [part for part in raw.split(b"HTTP/1.1 ") if part]
        assert [part[:3] for part in answers] == [b"201"] * 100
        assert [b'{"id":"%d"' % n in part for n, part in enumerate(answers)] == [True] * 100

    serve_and(scenario, tmp_path)


def test_old_clients_are_served(tmp_path: Path):
    """HTTP/1.0 is answered and closed, or kept open when it asks for that."""

    async def scenario(served: Served) -> None:
        closed = await served.send_raw(b"GET /healthz HTTP/1.0\r\n\r\n")
        kept = await served.send_raw(
            b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /healthz HTTP/1.0\r\n\r\n"
        )

        assert closed.count(b"200 OK") == 1
        assert kept.count(b"200 OK") == 2
        assert b"Connection: keep-alive\r\n" in kept

    serve_and(scenario, tmp_path)


def test_a_client_may_ask_before_it_sends(tmp_path: Path):
    """Expect: 100-continue gets its 100 before the body is sent."""

    async def scenario(served: Served) -> None:
        reader, writer = await served.connect()
        writer.write(b"PUT /v1/users/1 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 7\r\n\r\n")
        asked = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.write(b'{"a":1}')
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.close()

        assert asked.startswith(b"HTTP/1.1 100 ")
        assert status_of(answer) == 201

    serve_and(scenario, tmp_path)


# Listening.


def test_the_socket_file_is_for_owner_and_group(tmp_path: Path):
    """The unix socket has mode 0660 and goes away with the service."""

    async def scenario(served: Served) -> None:
        assert stat.S_IMODE(os.stat(served.socket_path).st_mode) == 0o660

    serve_and(scenario, tmp_path)

    assert not (tmp_path / "holdfast.sock").exists()


def test_the_socket_of_a_dead_daemon_is_replaced(tmp_path: Path):
    """A socket file nobody answers on is in nobody's way."""
    import socket

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "holdfast.sock"))

    async def scenario(served: Served) -> None:
        assert (await served.ask("GET", "/healthz")).status == 200

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("kind", ["file", "symlink", "directory", "fifo"])
def test_what_is_no_socket_is_never_replaced(tmp_path: Path, kind: str):
    """A file, link, directory or pipe where the socket should be is refused and left alone."""
    path = tmp_path / "holdfast.sock"
    target = tmp_path / "precious"
    target.write_text("data")
    {
        "file": lambda: path.write_text("data"),
        "symlink": lambda: path.symlink_to(target),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }[kind]()

    with pytest.raises(SettingsError, match="another kind of file"):
        open_listeners(("unix:",), tmp_path)

    assert os.path.lexists(path)
    assert target.read_text() == "data"


def test_a_socket_that_answers_is_not_taken(tmp_path: Path):
    """When another program serves on the path, it keeps it."""

    async def scenario(served: Served) -> None:
        with pytest.raises(SettingsError, match="another program answers"):
            open_listeners(("unix:",), tmp_path)

        assert (await served.ask("GET", "/healthz")).status == 200

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("address", ["tcp:0.0.0.0:0", "tcp:example.org:80", "tcp:[::]:0", "unix:" + "x" * 200, "ftp:x"])
def test_only_local_addresses_are_listened_on(tmp_path: Path, address: str):
    """What would serve other machines in clear text, or cannot be a socket, is refused, and nothing stays open."""
    with pytest.raises(SettingsError):
        open_listeners(("unix:", address), tmp_path)

    assert not (tmp_path / "holdfast.sock").exists()


def test_inherited_sockets_are_served(tmp_path: Path):
    """Sockets opened by systemd are used as they are, and their files are left to it."""
    import socket

    from holdfast.http.app import HttpService

    async def scenario() -> None:
        async with serving(tmp_path / "data") as served:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(tmp_path / "given.sock"))
                sock.listen()
                service = HttpService(
                    served.engine,
                    served.settings,
                    readiness=lambda: {"state": "RUNNING"},
                    admin=served.operator,
                    sockets=[sock],
                )
                await service.start()
                reader, writer = await asyncio.open_unix_connection(str(tmp_path / "given.sock"))
                writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
                raw = await asyncio.wait_for(reader.read(), 5)
                writer.close()
                await service.stop()

                assert status_of(raw) == 200
                assert (tmp_path / "given.sock").exists()

    asyncio.run(scenario())


def test_a_lease_tells_the_version_of_its_session(tmp_path: Path) -> None:
    """The session's own, which the lease does not change; 0 while there is none."""

    async def scenario(served: Served) -> None:
        for version in range(3):
            lease = await served.ask("POST", f"{SESSION}/lease", {"ttl": "30s"})
            renewed = await served.ask("POST", f"{SESSION}/lease", {"generation": lease.json["generation"]})
            path = f"{SESSION}/release?generation={lease.json['generation']}"
            answers = [lease, renewed, *[await served.ask("POST", path) for _ in range(2)]]
            assert [answer.json["version"] for answer in answers] == [version] * 4
            await served.ask("PUT", SESSION, {"n": version})

    serve_and(scenario, tmp_path)
