"""Tokens, Host and Origin: who may come by TCP."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path

import pytest

from holdfast.errors import BadRequest, Conflict, DataRefused, NotFound
from holdfast.http.auth import TokenStore
from holdfast.http.throttle import KEYS_MAX, Throttle
from tests.http_harness import ANSWER_S, Answer, Served, serve_and, status_of


async def by_tcp(
    served: Served, token: str | None, method: str = "GET", path: str = "/v1/users", **headers: str
) -> Answer:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    body = b'{"n":1}' if method == "PUT" else None
    return await served.ask(method, path, body=body, headers=sent, by_tcp=True)


async def raw_by_tcp(served: Served, raw: bytes) -> bytes:
    host, port = served.tcp.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    try:
        return await asyncio.wait_for(reader.read(), ANSWER_S)
    finally:
        writer.close()


# The store.


def test_the_first_token_is_made_once(tmp_path: Path):
    """It is in clear, for its owner only, and the same after a restart."""
    TokenStore(tmp_path).load()
    token = (tmp_path / "token").read_text().strip()
    store = TokenStore(tmp_path)
    store.load()

    assert token.startswith("hf_")
    assert len(token) >= 46
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert store.scope_of(token) == "write"
    assert (tmp_path / "token").read_text().strip() == token


def test_later_tokens_are_kept_as_hashes(tmp_path: Path):
    """The token itself is nowhere on the disk; its name, scope and time are."""
    store = TokenStore(tmp_path)
    store.load()
    token = store.create("dashboard", "read")
    store.refresh()

    assert store.scope_of(token) == "read"
    assert [(one.name, one.scope) for one in store.list()] == [("dashboard", "read")]
    assert stat.S_IMODE((tmp_path / "tokens.json").stat().st_mode) == 0o600
    assert not any(token.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_a_revoked_token_is_worthless(tmp_path: Path):
    """After revoke and refresh it is unknown; the others stay."""
    store = TokenStore(tmp_path)
    store.load()
    one, two = store.create("one"), store.create("two")
    store.revoke("one")
    store.refresh()

    assert (store.scope_of(one), store.scope_of(two)) == (None, "write")


def test_names_of_tokens_are_checked(tmp_path: Path):
    """Twice the same name, none, a strange one, or the first token's: refused."""
    store = TokenStore(tmp_path)
    store.load()
    store.create("one")

    for name, error in [
        ("one", Conflict),
        ("first", Conflict),
        ("", BadRequest),
        ("x" * 65, BadRequest),
        ("a\n", BadRequest),
    ]:
        with pytest.raises(error):
            store.create(name)
    with pytest.raises(NotFound):
        store.revoke("nobody")
    with pytest.raises(Conflict):
        store.revoke("first")


@pytest.mark.parametrize("name", ["token", "tokens.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "empty", "garbage", "readable"])
def test_a_token_file_that_cannot_be_trusted_is_refused(tmp_path: Path, name: str, kind: str):
    """A link, pipe, directory, damaged file or one that others can read stops the start with its name."""
    TokenStore(tmp_path).load()
    TokenStore(tmp_path).create("one")
    path, aside = tmp_path / name, tmp_path / "aside"
    if kind == "readable":
        path.chmod(0o644)
    else:
        path.rename(aside)
        {
            "link": lambda: path.symlink_to(aside),
            "fifo": lambda: os.mkfifo(path),
            "directory": path.mkdir,
            "empty": lambda: path.touch(0o600),
            "garbage": lambda: (path.touch(0o600), path.write_bytes(b'\xff{"tokens":[{}]}')),
        }[kind]()

    with pytest.raises(DataRefused, match=name):
        TokenStore(tmp_path).load()


def test_guesses_are_never_tokens(tmp_path: Path):
    """Prefixes, extensions, non-ASCII, lone surrogates, very long and empty texts are unknown, not errors."""
    store = TokenStore(tmp_path)
    store.load()
    token = (tmp_path / "token").read_text().strip()
    guesses = [
        "",
        "hf_",
        token[:-1],
        token + "a",
        token.upper(),
        "é" * 46,
        "\udcff" * 46,
        "x" * 1_000_000,
        "\0",
        f" {token}",
    ]

    assert [store.scope_of(guess) for guess in guesses] == [None] * len(guesses)


# Over TCP.


def test_tcp_needs_a_token(tmp_path: Path):
    """Everything but the health checks answers 401 without the right one, and says which scheme it wants."""

    async def scenario(served: Served) -> None:
        token = served.token
        refused = [await by_tcp(served, guess) for guess in (None, "", "hf_", token[:-1], token + "a", "x" * 5000)]
        basic = await by_tcp(served, None, Authorization=f"Basic {token}")
        right = await by_tcp(served, token)
        lower = await by_tcp(served, None, Authorization=f"bearer {token}")
        healthy = [await by_tcp(served, None, path=path) for path in ("/healthz", "/readyz")]
        unknown = await by_tcp(served, None, path="/nowhere")

        assert [answer.status for answer in [*refused, basic, unknown]] == [401] * 8
        assert {answer.json["code"] for answer in refused} == {"unauthorized"}
        assert refused[0].headers["WWW-Authenticate"].startswith("Bearer")
        assert (right.status, lower.status) == (200, 200)
        assert [answer.status for answer in healthy] == [200, 200]

    serve_and(scenario, tmp_path)


def test_odd_bytes_are_no_token(tmp_path: Path):
    """An Authorization header that is not ASCII, or not even UTF-8, gives 401."""

    async def scenario(served: Served) -> None:
        for value in (b"Bearer \xff\xfe", "Bearer é".encode(), b"Bearer", b"", b"Bearer \x80" * 100):
            raw = await raw_by_tcp(
                served,
                b"GET /v1/users HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: %b\r\n\r\n" % value,
            )
            assert status_of(raw) == 401

    serve_and(scenario, tmp_path)


def test_a_read_token_reads_only(tmp_path: Path):
    """GET and HEAD pass; whatever changes something, or asks the operator's side to, is 403."""

    async def scenario(served: Served) -> None:
        token = TokenStore(tmp_path).create("reader", "read")
        read = await by_tcp(served, token)
        while read.status == 401:  # picked up by the running service within a second
            await asyncio.sleep(0.05)
            read = await by_tcp(served, token)
        head = await by_tcp(served, token, "HEAD")
        writes = [
            await by_tcp(served, token, method, path)
            for method, path in [
                ("PUT", "/v1/users/1"),
                ("DELETE", "/v1/users/1"),
                ("POST", "/v1/admin/flush"),
                ("POST", "/v1/batch"),
            ]
        ]

        assert (read.status, head.status) == (200, 200)
        assert [answer.status for answer in writes] == [403] * 4
        assert {answer.json["code"] for answer in writes} == {"forbidden"}

    serve_and(scenario, tmp_path)


def test_changed_tokens_are_followed_without_a_restart(tmp_path: Path):
    """A token works within a second of being made, and stops working within a second of being revoked."""

    async def scenario(served: Served) -> None:
        store = TokenStore(tmp_path)
        token = store.create("worker")
        await asyncio.sleep(1.0)
        made = await by_tcp(served, token)
        store.revoke("worker")
        await asyncio.sleep(1.0)
        revoked = await by_tcp(served, token)

        assert (made.status, revoked.status) == (200, 401)

    serve_and(scenario, tmp_path)


def test_a_damaged_token_file_changes_nothing_while_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The tokens stay as they were, and the log says so once."""

    async def scenario(served: Served) -> None:
        token = served.token
        (tmp_path / "tokens.json").touch(0o600)
        await asyncio.sleep(1.0)

        assert (await by_tcp(served, token)).status == 200

    serve_and(scenario, tmp_path)

    assert capsys.readouterr().out.count("tokens.reload_failed") == 1


def test_guessing_is_slowed_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """After 20 failures in a minute comes 429 with Retry-After; the right token still passes; no guess is logged."""

    async def scenario(served: Served) -> None:
        host, port = served.tcp.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        request = b"GET /v1/users HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer hf_guess%d\r\n\r\n"
        statuses: list[int] = []
        started = time.perf_counter()
        for first in range(0, 10_000, 20):
            writer.write(b"".join(request % n for n in range(first, first + 20)))
            for _ in range(20):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), ANSWER_S)
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                statuses.append(status_of(head))
                assert status_of(head) == 401 or b"Retry-After: 60\r\n" in head
        took_s = time.perf_counter() - started
        right = await by_tcp(served, served.token)
        writer.close()

        print(f"fault 27: 10,000 guesses in {took_s:.1f} s: {statuses.count(401)} × 401, {statuses.count(429)} × 429")
        assert statuses == [401] * 20 + [429] * 9980
        assert right.status == 200

    serve_and(scenario, tmp_path)

    logged = capsys.readouterr().out
    assert "hf_guess" not in logged.replace("fault 27", "")
    assert logged.count("request.refused") <= 10


def test_the_unix_socket_needs_no_token(tmp_path: Path):
    """The permissions of its file are the credential."""

    async def scenario(served: Served) -> None:
        assert (await served.ask("PUT", "/v1/users/1", {"n": 1})).status == 201

    serve_and(scenario, tmp_path)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("LOCALHOST:9000", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8765", 403),
        ("", 403),
        ("[::1].evil.example", 403),
        ("0.0.0.0", 403),
    ],
)
def test_the_host_must_be_this_machine(tmp_path: Path, host: str, status: int):
    """A page that rebinds its name to 127.0.0.1 still sends its own Host, which is refused."""

    async def scenario(served: Served) -> None:
        raw = await raw_by_tcp(
            served,
            f"GET /healthz HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode(),
        )

        assert status_of(raw) == status

    serve_and(scenario, tmp_path)


def test_a_page_of_another_site_may_not_write(tmp_path: Path):
    """A write with a foreign Origin or from a cross-site fetch is 403, also with the token; the same origin passes."""

    async def scenario(served: Served) -> None:
        token = served.token
        own = f"http://{served.tcp}"

        async def put(**headers: str) -> int:
            return (await by_tcp(served, token, "PUT", "/v1/users/1", **headers)).status

        assert await put(Origin="https://evil.example") == 403
        assert await put(Origin="null") == 403
        assert await put(Origin="http://[") == 403
        assert await put(Origin=own + ".evil.example") == 403
        assert await put(Sec_Fetch_Site="cross-site") == 403
        assert await put(Origin=own, Sec_Fetch_Site="same-origin") == 201
        assert (await by_tcp(served, token, Sec_Fetch_Site="cross-site")).status == 200

    serve_and(scenario, tmp_path)


# The throttle.


def test_a_throttle_lets_through_what_fits_the_period():
    """Up to the count within the period, for each key; as time passes it opens again."""
    throttle = Throttle(2, 60.0)

    assert [throttle.allows("a", now) for now in (0.0, 1.0, 2.0, 59.0)] == [True, True, False, False]
    assert throttle.allows("b", 3.0)
    assert throttle.allows("a", 60.5)


def test_a_throttle_forgets_the_oldest():
    """However many keys come, only so many are remembered."""
    throttle = Throttle(1, 60.0)
    for n in range(3 * KEYS_MAX):
        throttle.allows(str(n), 0.0)

    assert len(throttle._moments) == KEYS_MAX
