"""The document of the HTTP interface, and the page made of it: both tell the truth."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import html.parser
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import schemathesis

from holdfast.care.backup_set import SET_NAME
from holdfast.disk.files import as_our_error
from holdfast.http.auth import TokenStore
from holdfast.http.docs import page
from holdfast.http.routes import declared
from holdfast.settings import parse_duration
from tests.cli_harness import holdfast as command
from tests.crash.harness import serving as running
from tests.document_harness import METHODS, Operation, check_answer, check_value, operation, operations, whole
from tests.http_harness import ANSWER_S, Answer, Served, serve_and

PHONE = "573001234567"
SESSION = f"/v1/sessions/{PHONE}"
ORDER = "/v1/orders/1001"

VOLATILE = {
    "before",
    "after",
    "freed_bytes",
    "condensed_messages",
    "disk",
    "findings",
    "parts",
    *("at", "bytes", "data_dir", "date", "duration_ms", "expires_at", "files", "journal_bytes", "last_flush", "listen"),
    *("backup", "backup_at", "oldest", "newest", "new_bytes", "newest_at", "proved_at", "since"),
    *("paths", "pid", "pruned", "uptime_s", "created_at", "updated_at", "opened_at"),
}
"""Keys whose values are others each time."""


# The document as a document.


def test_the_document_is_openapi_3_1():
    """It satisfies the schema of its version, every reference leads somewhere, and no two operations have one id."""
    schema = schemathesis.openapi.from_dict(whole())
    references = set(re.findall(r'"#/components/(\w+)/([^"]+)"', msgspec.json.encode(whole()).decode()))
    ids = [one.id for one in operations()]

    assert whole()["openapi"] == "3.1.0"
    schema.validate()
    assert not [name for section, name in references if name not in whole()["components"][section]]
    assert len(set(ids)) == len(ids)


def test_every_route_is_in_the_document_and_nothing_else():
    """What is dispatched is documented: path by path, method by method, parameter by parameter."""
    routes = {(path, method): route for path, method, route in declared()}
    found = {(one.path, one.method): one for one in operations()}

    assert found.keys() == routes.keys()
    for place, one in found.items():
        declared_names = {field.name for field in (*routes[place].query, *routes[place].headers)}
        assert {said["name"] for said in one.parameters if said["in"] != "path"} == declared_names
        assert [said["name"] for said in one.parameters if said["in"] == "path"] == re.findall(r"{(\w+)}", one.path)


def test_a_path_takes_the_documented_methods_and_no_others(tmp_path: Path):
    """Any other method is answered with 405 and the list of those there are."""

    async def scenario(served: Served) -> None:
        for path in whole()["paths"]:
            here = [one for one in operations() if one.path == path]
            documented = {one.method for one in here}
            if "GET" in documented:
                documented.add("HEAD")
            for method in {name.upper() for name in METHODS} - documented:
                refused = await served.ask(method, here[0].target())

                assert refused.status == 405, f"{method} {path}"
                assert set(refused.headers["Allow"].split(", ")) == documented

    serve_and(scenario, tmp_path)


def test_every_schema_is_used():
    """Nothing stands in the document that no request or answer leads to."""
    text = msgspec.json.encode(whole()).decode()

    for section in ("parameters", "responses", "schemas"):
        for name in whole()["components"][section]:
            assert f'"#/components/{section}/{name}"' in text, f"{section}/{name}"


# What it says about requests.


def test_an_operation_takes_the_documented_query_and_nothing_else(tmp_path: Path):
    """A refusal of an unknown parameter names exactly those in the document; the probes alone take anything."""

    async def scenario(served: Served) -> None:
        for one in operations():
            names = [said["name"] for said in one.parameters if said["in"] == "query"]
            refused = await served.ask(one.method, one.target(colour="red"), one.media().get("example"))
            if one.path in ("/", "/healthz", "/readyz"):
                assert refused.status == 200
                continue

            assert (refused.status, refused.json["code"]) == (400, "bad_request"), one.id
            assert refused.json["detail"].endswith(f"this path takes {', '.join(names) or 'none'}"), one.id

    serve_and(scenario, tmp_path)


BROKEN_HEADERS = {
    "If-Match": "nonsense",
    "Idempotency-Key": "ñ",
    "Holdfast-Durability": "never",
    "Holdfast-Retry": "x",
    "Holdfast-Lease": "x",
    "Last-Event-ID": "x",
}


@pytest.mark.parametrize("one", list(operations()), ids=lambda one: one.id)
def test_a_header_is_read_where_it_is_documented_and_nowhere_else(tmp_path: Path, one: Operation):
    """One that makes no sense is refused by an operation that documents it, and does not matter to the others."""

    async def scenario(served: Served) -> None:
        await prepare(served, one)
        documented = {said["name"] for said in one.parameters}
        for name, value in BROKEN_HEADERS.items():
            answer = await send(served, one, headers={name: value})

            assert (answer.status in (400, 412)) == (name in documented), f"{name}: {answer}"

    serve_and(scenario, tmp_path)


def test_a_body_has_the_documented_keys_and_no_others(tmp_path: Path):
    """A key that is not documented is refused; a documented one is known, since its value is judged."""

    async def scenario(served: Served) -> None:
        for one in operations():
            reference = one.media().get("schema", {}).get("$ref")
            if reference is None:
                continue  # a record may have any keys
            properties = whole()["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
            example = one.media()["example"]
            unknown = await served.ask(one.method, one.target(), {**example, "colour": "red"})

            assert unknown.json["detail"].startswith("Object contains unknown field `colour`"), one.id
            for key in properties:
                wrong = "no object" if key in ("metadata", "contact_info") else {"no": "such"}
                refused = await served.ask(one.method, one.target(), {**example, key: wrong})
                assert refused.status == 422 and f"`$.{key}`" in refused.json["detail"], f"{one.id} {key}"

    serve_and(scenario, tmp_path)


# Its examples.


# The status of a daemon is that of a process; it has a test of its own.
@pytest.mark.parametrize("one", [one for one in operations() if one.id != "status"], ids=lambda one: one.id)
def test_the_example_is_what_happens(tmp_path: Path, one: Operation):
    """The request of the example gets the answer of the example, but for times and sizes, and as its schema says."""

    async def scenario(served: Served) -> None:
        if one.media():
            check_value(one.media()["schema"], one.media()["example"], f"the example of {one.id}")
        statuses = set()
        await prepare(served, one)
        # A second PUT of the same finds the record there.
        for _ in range(2 if one.method == "PUT" else 1):
            answer = await send(served, one)
            statuses.add(answer.status)
            media = check_answer(one, answer.status, answer.headers, answer.body)
            if "example" in media:
                assert alike(media["example"], answer.body)

        examples = {int(status) for status, said in one.said["responses"].items() if status in ("200", "201", "204")}
        assert statuses == examples

    serve_and(scenario, tmp_path)


def parameters() -> Iterator[tuple[Operation, str]]:
    """Every parameter and header that has an example, with the first operation that takes it."""
    seen: list[dict[str, Any]] = []
    for one in operations():
        for said in one.parameters:
            if said["in"] != "path" and "example" in said and said not in seen:
                seen.append(said)
                yield one, said["name"]


@pytest.mark.parametrize(
    ("one", "name"), list(parameters()), ids=lambda value: value if isinstance(value, str) else value.id
)
def test_the_example_of_a_parameter_is_taken(tmp_path: Path, one: Operation, name: str):
    """It works with the example of its operation, and is valid under its own schema."""

    async def scenario(served: Served) -> None:
        said = next(said for said in one.parameters if said["name"] == name)
        check_value(said["schema"], said["example"], f"the example of {name}")
        await prepare(served, one, exists=name == "If-Match")
        query = {name: said["example"]} if said["in"] == "query" else {}
        headers = {name: str(said["example"])} if said["in"] == "header" else {}

        answer = await send(served, one, query=query, headers=headers)

        assert answer.status < 300, answer
        check_answer(one, answer.status, answer.headers, answer.body)

    serve_and(scenario, tmp_path)


def test_what_is_not_200_is_as_documented(tmp_path: Path):
    """304 for the version that a caller has, 412 where If-None-Match: * meets a record, 503 before it is ready."""

    async def scenario(served: Served) -> None:
        put, get = operation("session_put"), operation("session_get")
        await send(served, put)

        refused = await send(served, put, headers={"If-None-Match": "*"})
        seen = await send(served, get, headers={"If-None-Match": '"1"'})
        served.state = "STARTING"
        starting = await send(served, operation("readiness"))

        assert (refused.status, seen.status, starting.status) == (412, 304, 503)
        assert check_answer(operation("readiness"), 503, starting.headers, starting.body)["example"] == starting.json
        check_answer(put, refused.status, refused.headers, refused.body)
        check_answer(get, seen.status, seen.headers, seen.body)

    serve_and(scenario, tmp_path)


def test_a_batch_with_a_refused_op_is_as_documented(tmp_path: Path):
    """Results that are answers and results that are refusals both satisfy the schema; an atomic batch tells the index."""

    async def scenario(served: Served) -> None:
        batch = operation("batch")
        ops = [{"op": "session.put", "id": "1", "value": {}}, {"op": "session.delete", "id": "nobody"}]
        mixed = await served.ask("POST", "/v1/batch", {"ops": ops})
        refused = await served.ask("POST", "/v1/batch", {"ops": ops, "atomic": True})

        check_answer(batch, mixed.status, mixed.headers, mixed.body)
        check_answer(batch, refused.status, refused.headers, refused.body)
        assert [result["status"] for result in mixed.json["results"]] == [201, 404]
        assert (refused.status, refused.json["index"]) == (404, 1)

    serve_and(scenario, tmp_path)


def test_the_status_of_a_daemon_is_as_documented(tmp_path: Path):
    """All its keys are documented, and all that are documented are there."""
    report = operation("status")
    with running(tmp_path / "data") as daemon, daemon.connect() as client:
        status, body = client.ask("GET", "/v1/admin/status")

    check_answer(report, status, {"Content-Type": "application/json"}, body)
    assert msgspec.json.decode(body).keys() == whole()["components"]["schemas"]["StatusReport"]["properties"].keys()


# Its errors.


async def bad_request(served: Served) -> Answer:
    return await served.ask("GET", "/v1/admin/status?colour=red")


async def invalid_json(served: Served) -> Answer:
    return await served.ask("PUT", SESSION, body=b'{"a"1}')


async def unauthorized(served: Served) -> Answer:
    return await served.ask("GET", SESSION, by_tcp=True)


async def forbidden(served: Served) -> Answer:
    token = TokenStore(served.settings.data_dir).create("reader", "read")
    served.service._guard.refresh()
    return await served.ask("PUT", SESSION, {}, by_tcp=True, headers={"Authorization": f"Bearer {token}"})


async def not_found(served: Served) -> Answer:
    return await served.ask("GET", "/v1/sessions/573009999999")


async def request_timeout(served: Served) -> Answer:
    return await raw(served, b"PUT /v1/users/ana HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")


async def conflict(served: Served) -> Answer:
    await served.ask("PUT", ORDER, {"recipientPhone": PHONE})
    await served.ask("POST", f"{ORDER}/complete")
    return await served.ask("PATCH", ORDER, {"a": 1})


async def gone(served: Served) -> Answer:
    await served.ask("POST", "/v1/batch", {"ops": [{"op": "session.touch", "id": PHONE}] * 3})
    ops = [{"op": "session.put", "id": str(number), "value": {}} for number in range(117)]
    await served.ask("POST", "/v1/batch", {"ops": ops})
    served.engine._flusher.journal_keep = 0
    await served.ask("POST", "/v1/admin/flush")
    return await served.ask("GET", "/v1/events?after=1")


async def version_mismatch(served: Served) -> Answer:
    await served.ask("PUT", SESSION, {})
    return await served.ask("PATCH", SESSION, {}, headers={"If-Match": '"7"'})


async def too_large(served: Served) -> Answer:
    return await served.ask("PUT", "/v1/users/ana", {"text": "x" * (1048601 - len('{"text":""}'))})


async def unsupported_media_type(served: Served) -> Answer:
    return await served.ask("PUT", SESSION, body=b"{}", headers={"Content-Type": "text/plain"})


async def invalid_record(served: Served) -> Answer:
    return await served.ask("PUT", ORDER, {"odooOrderId": 7, "recipientPhone": PHONE})


async def invalid_settings(served: Served) -> Answer:
    with pytest.raises(ValueError) as found:
        parse_duration("soon")
    served.operator.invalid = f"sessions.ttl: {found.value}"
    return await served.ask("POST", "/v1/admin/reload")


async def leased(served: Served) -> Answer:
    await served.ask("POST", f"{SESSION}/lease", {})
    return await served.ask("PUT", SESSION, {})


async def too_many_requests(served: Served) -> Answer:
    for _ in range(20):
        await unauthorized(served)
    return await unauthorized(served)


async def internal(served: Served) -> Answer:
    served.operator.failure = RuntimeError("a fault of ours")
    return await served.ask("POST", "/v1/admin/flush")


async def unavailable(served: Served) -> Answer:
    served.service._engine = None
    return await served.ask("GET", SESSION)


async def storage_full(served: Served) -> Answer:
    full = OSError(errno.ENOSPC, "No space left on device")
    served.operator.failure = as_our_error(full, "write chat_sessions.json")
    return await served.ask("POST", "/v1/admin/flush")


async def too_large_431(served: Served) -> Answer:
    return await served.ask("GET", SESSION, headers={"X-Long": "x" * 20_000})


PROVOKED: dict[Callable[[Served], Awaitable[Answer]], str] = {
    bad_request: "status",
    invalid_json: "session_put",
    unauthorized: "session_get",
    forbidden: "session_put",
    not_found: "session_get",
    request_timeout: "user_put",
    conflict: "order_patch",
    gone: "events",
    version_mismatch: "session_patch",
    too_large: "user_put",
    unsupported_media_type: "session_put",
    invalid_record: "order_put",
    invalid_settings: "reload",
    leased: "session_put",
    too_many_requests: "session_get",
    internal: "flush",
    unavailable: "session_get",
    storage_full: "flush",
    too_large_431: "session_get",
}
"""What meets each error, and the operation it asks last."""


@pytest.mark.parametrize(("provoke", "id"), list(PROVOKED.items()), ids=lambda one: getattr(one, "__name__", one))
def test_the_example_of_an_error_is_what_happens(
    tmp_path: Path, provoke: Callable[[Served], Awaitable[Answer]], id: str
):
    """Word by word, but for moments; with the headers that are documented."""

    async def scenario(served: Served) -> None:
        answer = await provoke(served)

        said = check_answer(operation(id), answer.status, answer.headers, answer.body)
        example = said["examples"][answer.json["code"]]["value"]
        assert without_moments(answer.json) == without_moments(example)

    serve_and(scenario, tmp_path, body_timeout=0.1)


def test_every_error_is_provoked():
    """No documented error is without a test that meets it."""
    codes = {
        f"{code}_{example['value']['status']}" if example["value"]["status"] == 431 else code
        for response in whole()["components"]["responses"].values()
        for code, example in response["content"]["application/problem+json"]["examples"].items()
    }

    assert codes == {provoke.__name__ for provoke in PROVOKED}


# How it is served.


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_it_is_served_with_an_etag(tmp_path: Path, path: str):
    """Whoever has it already gets 304; it is made once."""

    async def scenario(served: Served) -> None:
        first = await served.ask("GET", path)
        second = await served.ask("GET", path)
        seen = await served.ask("GET", path, headers={"If-None-Match": first.headers["ETag"]})

        assert (first.status, seen.status, seen.body) == (200, 304, b"")
        assert (second.body, second.headers["ETag"]) == (first.body, first.headers["ETag"])
        assert seen.headers["ETag"] == first.headers["ETag"]

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize("path", ["/openapi.json", "/docs"])
def test_over_tcp_it_needs_a_token_and_says_how_to_read_it_without(tmp_path: Path, path: str):
    """A browser sends no token: the refusal names the two other ways in. Elsewhere it does not."""

    async def scenario(served: Served) -> None:
        refused = await served.ask("GET", path, by_tcp=True)
        other = await served.ask("GET", SESSION, by_tcp=True)
        read = await served.ask("GET", path, by_tcp=True, headers={"Authorization": f"Bearer {served.token}"})

        assert (refused.status, other.status, read.status) == (401, 401, 200)
        assert "`holdfast openapi --html > holdfast.html`" in refused.json["detail"]
        assert "--unix-socket" in refused.json["detail"]
        assert "html" not in other.json["detail"]

    serve_and(scenario, tmp_path)


def test_nobody_pays_for_it_who_does_not_ask():
    """Neither the library nor the HTTP service imports what makes the document and the page."""
    code = (
        "import sys, holdfast, holdfast.http.app\n"
        "print([name for name in sys.modules if name.startswith(('jinja2', 'holdfast.http.openapi', 'holdfast.http.docs'))])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout == "[]\n"


def test_the_command_prints_the_same(tmp_path: Path):
    """`holdfast openapi` needs no daemon; with --html it prints the page, for the data directory that is named."""
    printed = command("openapi", cwd=tmp_path)
    shown = command("openapi", "--html", "--data-dir", tmp_path / "elsewhere", cwd=tmp_path)
    both = command("openapi", "--html", "--json", cwd=tmp_path)

    assert (printed.returncode, printed.stderr) == (0, "")
    assert msgspec.json.decode(printed.stdout) == whole()
    assert shown.returncode == 0 and shown.stdout.startswith("<!doctype html>")
    assert f"curl --unix-socket {tmp_path}/elsewhere/holdfast.sock" in shown.stdout
    assert (both.returncode, both.stderr.count("\n")) == (2, 1)


# The page.


class Page(html.parser.HTMLParser):
    """What a page holds: its ids, its links, and by article the lines to paste."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.lines: dict[str, list[str]] = {}
        self._article = ""
        self._is_line = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.attributes |= values.keys()
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [values["href"]] if values.get("href") else []
        if tag == "article":
            self._article = values["id"] or ""
        if tag == "figure":
            self._is_line = values.get("class") == "curl"
        if tag == "code" and self._is_line:
            self.lines.setdefault(self._article, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._is_line = False

    def handle_data(self, data: str) -> None:
        if self._is_line and self.lasttag == "code":
            self.lines[self._article][-1] += data


def test_the_page_shows_every_operation_error_and_type(tmp_path: Path):
    """Each has an anchor, every link leads to one, and none is there twice."""

    async def scenario(served: Served) -> None:
        shown = Page((await served.ask("GET", "/docs")).body.decode())

        assert {one.id for one in operations()} <= set(shown.ids)
        assert whole()["components"]["schemas"].keys() <= set(shown.ids)
        assert len(set(shown.ids)) == len(shown.ids)
        assert [link for link in shown.links if link.removeprefix("#") not in shown.ids] == ["data:,"]

    serve_and(scenario, tmp_path)


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path):
    """No script, no frame, no form, no source elsewhere; the policy allows its own style sheet and nothing more."""

    async def scenario(served: Served) -> None:
        answer = await served.ask("GET", "/docs")
        text = answer.body.decode()
        shown = Page(text)
        style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)

        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert not shown.tags & {"script", "iframe", "form", "img", "object", "embed", "base"}
        assert not shown.attributes & {"src", "style", "srcset"} and not any(
            a.startswith("on") for a in shown.attributes
        )
        assert style is not None and "url(" not in style[1] and "@import" not in style[1]
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
        assert policy == {
            "default-src": "'none'",
            "style-src": f"'sha256-{digest}'",
            "img-src": "data:",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }

    serve_and(scenario, tmp_path)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, whose lines they are")
@pytest.mark.parametrize("one", list(operations()), ids=lambda one: one.id)
def test_the_lines_of_the_page_work_as_they_stand(tmp_path: Path, one: Operation):
    """Pasted into a shell they get an answer; by both ways where that can be asked twice."""

    async def scenario(served: Served) -> None:
        lines = Page(page(served.service.listening, tmp_path).decode()).lines[one.id]
        await prepare(served, one)

        assert ["--unix-socket" in line for line in lines] == [True, False]
        for line in lines if one.method in ("GET", "PUT") else lines[:1]:
            # The stream never ends, all others do; an import takes a backup before.
            seconds = 1 if one.id == "events" else ANSWER_S
            with_status = line.replace("curl ", f"curl -s --max-time {seconds} -w '\\n%{{http_code}}' ", 1)
            shell = await asyncio.create_subprocess_exec("bash", "-c", with_status, stdout=subprocess.PIPE, cwd="/")
            out, _ = await asyncio.wait_for(shell.communicate(), ANSWER_S)
            assert int(out.rpartition(b"\n")[2]) in (200, 201, 204), f"{line}\n{out.decode()}"

    serve_and(scenario, tmp_path)


# What the tests above need.


async def prepare(served: Served, one: Operation, *, exists: bool | None = None) -> None:
    """Bring about what the example of *one* takes for granted: its record, unless it makes one, a lease, an order."""
    noun = one.id.partition("_")[0].replace("collection", "record")
    if noun in ("message", "escalation", "storage") or one.id == "conversation_hold":
        await send(served, operation("conversation_put"))
    elif f"{noun}_put" in {other.id for other in operations()} and (exists or one.method != "PUT"):
        await send(served, operation(f"{noun}_put"))
    if noun in ("conversation", "message", "storage") and one.id not in ("conversation_put", "message_append"):
        await send(served, operation("message_append"))
    if one.id == "cleanup":
        old = {"role": "user", "content": "Hola", "created_at": "2020-01-01T00:00:00Z"}
        await served.ask("POST", "/v1/conversations/old/messages", old)
    if one.id in ("escalation_list", "escalation_get"):
        await send(served, operation("escalation_open"))
    if one.id in ("session_release", "session_lease_delete"):
        await send(served, operation("session_lease"))
    if one.id == "sales":
        await send(served, operation("order_put"))
        await send(served, operation("order_complete"))
    if one.id in ("events", "flush", "restore", "backup", "backups"):
        await send(served, operation("session_put"))
    if one.id in ("restore", "backups"):
        await send(served, operation("backup"))


async def send(
    served: Served, one: Operation, *, query: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Answer:
    """The request of the example of *one*; of a stream, the answer is its beginning."""
    if one.id == "events":
        return await first_event(served, one.target(**{"after": 0} | (query or {})), headers or {})
    return await served.ask(one.method, one.target(**query or {}), one.media().get("example"), headers=headers)


async def first_event(served: Served, target: str, headers: dict[str, str]) -> Answer:
    async with (
        asyncio.timeout(ANSWER_S),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(served.socket_path)) as session,
        session.get(f"http://localhost{target}", headers=headers) as response,
    ):
        body = b""
        while response.status == 200 and (b"data: " not in body or not body.endswith(b"\n\n")):
            body += await response.content.readany()
        return Answer(response.status, response.headers, body or await response.read())


async def raw(served: Served, request: bytes) -> Answer:
    """The answer to *request*, sent as it stands."""
    head, _, body = (await served.send_raw(request)).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return Answer(int(first.split(" ")[1]), dict(line.split(": ", 1) for line in lines), body)


def alike(example: Any, body: bytes) -> bool:
    """Whether *body* is what *example* says, but for what differs each time."""
    if not isinstance(example, str):
        return bool(steady(example) == steady(msgspec.json.decode(body)))
    if example.startswith("# HELP"):
        # Of metrics, whose figures differ: the names.
        return {line.split(" ")[0] for line in example.splitlines()} <= {
            line.split(" ")[0] for line in body.decode().splitlines()
        }
    return bool(without_moments(example) == without_moments(body.decode()))


def steady(value: Any) -> Any:
    """*value* without what differs each time."""
    if isinstance(value, dict):
        return {key: None if key in VOLATILE else steady(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [steady(inner) for inner in value]
    if isinstance(value, str) and SET_NAME.fullmatch(value):
        return "SET"
    return value


def without_moments(value: Any) -> Any:
    """*value* with one and the same moment in place of each."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "MOMENT", text)
