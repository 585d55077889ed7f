"""Exports and imports over HTTP: streamed, bounded in time, and whole or not at all."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from holdfast.http.routes import transfer
from holdfast.ops import MessageAppend, RecordPut
from tests.engine_harness import do
from tests.http_harness import ANSWER_S, Served, serve_and, status_of
from tests.test_transfer import contents, packed

EXPORT = b"GET /v1/export HTTP/1.1\r\nHost: localhost\r\n\r\n"
IMPORT_HEAD = b"POST /v1/admin/import HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n"


def store_much(served: Served) -> None:
    """Records that are more than any buffer holds, however they are compressed."""
    drawn = random.Random(1)
    for number in range(60):
        served.engine.submit(RecordPut(collection="notes", id=str(number), value={"t": drawn.randbytes(100_000).hex()}))


def test_an_export_is_streamed_and_comes_back_by_an_import(tmp_path: Path):
    """A dry run changes nothing; then it is there; then it is there already."""

    async def scenario(served: Served) -> None:
        await served.ask("PUT", "/v1/collections/notes/n1", {"text": "hello"})
        exported = await served.ask("GET", "/v1/export")
        await served.ask("DELETE", "/v1/collections/notes/n1")
        sent = {"body": exported.body, "headers": {"Content-Type": "application/octet-stream"}}

        answers = [
            await served.ask("POST", f"/v1/admin/import?dry_run={dry}", **sent) for dry in ("true", "false", "false")
        ]

        assert exported.headers["Content-Type"] == "application/zstd"
        assert json.loads(contents(exported.body)["notes.json"])[0]["text"] == "hello"
        assert [answer.json["collections"]["notes"]["added"] for answer in answers] == [1, 1, 0]
        assert [answer.json["backup"] is not None for answer in answers] == [False, True, False]
        assert (await served.ask("GET", "/v1/collections/notes/n1")).status == 200

    serve_and(scenario, tmp_path)


def test_what_is_no_archive_is_refused_with_the_reason(tmp_path: Path):
    """Rubbish, a name that promises encryption, records that are none: 4xx, and nothing is changed."""

    async def scenario(served: Served) -> None:
        before = served.engine.status()["seq"]
        invalid = packed({"users.json": b'[{"name": "nobody"}]'})
        for path, body, status, part in (
            ("", b"", 422, "cut short"),
            ("", b"rubbish" * 1000, 422, "not what zstd wrote"),
            ("?file=x.tar.zst.age", b"rubbish", 400, "encrypted"),
            ("?file=x.tar", b"rubbish" * 1000, 422, "expected a tar archive"),
            ("", invalid, 422, "1 of 1 records"),
            ("?skip_invalid=yes", invalid, 400, "true or false"),
        ):
            answer = await served.ask("POST", f"/v1/admin/import{path}", body=body, headers={"Content-Type": "application/octet-stream"})  # fmt: skip
            assert (answer.status, part in answer.json["detail"]) == (status, True), answer
        turned = "since=2026-11-02T00:00:00Z&until=2026-11-01T00:00:00Z"
        for path in (
            "collection=none",
            "conversation=none",
            "state=x",
            "where=nothing",
            "since=yesterday",
            "redact=1",
            turned,
        ):
            assert (await served.ask("GET", f"/v1/export?{path}")).status in (400, 404), path
        assert served.engine.status()["seq"] == before

    serve_and(scenario, tmp_path)


def test_an_upload_may_be_larger_than_a_body_but_not_slower(tmp_path: Path):
    """Above limits.body_bytes it is taken; one that trickles is cut off, and nothing of it stays."""

    async def scenario(served: Served) -> None:
        records = json.dumps([{"id": str(number), "text": "x" * 100} for number in range(2000)]).encode()
        archive = packed({"notes.json": records})
        padded = packed({"notes.json": records, "photo.jpg": random.Random(1).randbytes(50_000)})
        assert len(padded) > 4096
        answer = await served.ask("POST", "/v1/admin/import", body=padded, headers={"Content-Type": "application/octet-stream"})  # fmt: skip
        assert answer.status == 200 and answer.json["ignored"] == ["photo.jpg"]
        assert served.engine.count("notes") == 2000

        reader, writer = await served.connect()
        writer.write(IMPORT_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        raw = b""
        for byte in archive:
            writer.write(b"1\r\n%c\r\n" % byte)
            try:
                raw = await asyncio.wait_for(reader.read(200), 0.05)
                break
            except TimeoutError:
                continue
        assert status_of(raw) == 408
        writer.close()

        # A client that goes away in the midst.
        reader, writer = await served.connect()
        writer.write(IMPORT_HEAD + b"Content-Length: 100000\r\n\r\n" + archive[:100])
        await writer.drain()
        writer.transport.abort()
        await asyncio.sleep(0.1)
        assert (await served.ask("GET", "/healthz")).status == 200

    serve_and(scenario, tmp_path, body_bytes=4096, body_timeout=0.5)


def test_an_import_needs_more_than_a_token_that_reads(tmp_path: Path):
    """Without one 401; the export is all that may be read."""

    async def scenario(served: Served) -> None:
        for method, path in (("GET", "/v1/export"), ("POST", "/v1/admin/import")):
            assert (await served.ask(method, path, body=b"x" if method == "POST" else None, by_tcp=True)).status == 401
        token = {"Authorization": f"Bearer {served.token}"}
        assert (await served.ask("GET", "/v1/export", headers=token, by_tcp=True)).status == 200

    serve_and(scenario, tmp_path)


def test_only_so_many_exports_are_read_at_once_and_a_reader_that_leaves_frees_its_place(tmp_path: Path):
    """Each takes the room of what it exports; 503 says when to come back."""

    async def scenario(served: Served) -> None:
        store_much(served)
        await asyncio.to_thread(do, served.engine, MessageAppend(id="c", role="user", content="x"))
        writers = []
        for _ in range(transfer.EXPORTS_MAX):
            reader, writer = await served.connect()
            writer.write(EXPORT)
            assert status_of(await asyncio.wait_for(reader.read(64), ANSWER_S)) == 200
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writers.append(writer)

        crowded = await served.ask("GET", "/v1/export")
        for writer in writers:
            writer.transport.abort()
        deadline = asyncio.get_running_loop().time() + ANSWER_S
        while (answer := await served.ask("GET", "/v1/export")).status != 200:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)

        assert crowded.status == 503 and crowded.headers["Retry-After"]
        assert len(json.loads(contents(answer.body)["notes.json"])) == 60

    serve_and(scenario, tmp_path)


def test_an_export_that_is_cut_off_by_a_stop_does_not_look_whole(tmp_path: Path):
    """The last chunk is missing, so no client takes it for all there is."""

    async def scenario(served: Served) -> None:
        store_much(served)
        await asyncio.to_thread(do, served.engine, MessageAppend(id="c", role="user", content="x"))
        reader, writer = await served.connect()
        writer.write(EXPORT)
        head = await asyncio.wait_for(reader.read(64), ANSWER_S)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.2)

        await served.service.stop()
        reader._transport.resume_reading()  # type: ignore[attr-defined]
        try:
            rest = await asyncio.wait_for(reader.read(), ANSWER_S)
        except ConnectionError:
            rest = b""

        assert status_of(head) == 200
        assert not rest.endswith(b"0\r\n\r\n")
        writer.close()

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_export_of_nothing_is_an_export(tmp_path: Path, method: str):
    """Of an empty directory: all files, without records."""

    async def scenario(served: Served) -> None:
        answer = await served.ask(method, "/v1/export")

        assert answer.status == 200
        if method == "GET":
            assert json.loads(contents(answer.body)["manifest.json"])["messages"] == 0

    serve_and(scenario, tmp_path)
