#!/usr/bin/env python3
"""Replays recorded dialogues as the traffic of a chat bot against a real daemon.

    python tests/replay.py DIALOGUES.jsonl[.gz] --data-dir D [--processes 4] [--kill-at SECONDS]…
    python tests/replay.py DIALOGUES.jsonl[.gz] --connect unix:PATH|tcp:HOST:PORT [--token TOKEN]

A line of the file is ``{"id", "services", "turns": [[role, text], …], "transactions": [{"turn", "service", "intent",
"success"}, …]}``. Each dialogue becomes a session with a put or patch a turn, and a conversation with a message a turn; each
transaction an order, completed with its revenue when it succeeded. Several processes send at once, one op at a time each, over the unix socket and TCP in turn.

Every process keeps the list of what was acknowledged. From these lists alone follows what must be there: every session
and order field by field, with its version, every transcript word by word, and the sales figures to the last decimal. With ``--data-dir`` the daemon is
started here, told to flush by SIGUSR1, stopped by SIGTERM, started again, and compared each time; each ``--kill-at``
kills it in the middle of the traffic, compares after the restart, then sends what had no answer once more. With ``--events``
a reader of the event stream, through all of that, must have seen every acknowledged op once, in the order of its process.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from itertools import zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ANSWER_S = 30.0
READY_S = 60.0
PAGE = 1_000
ORDERS_A_DIALOGUE_MAX = 100

# Traffic: pure functions from a dialogue to ops.


class Op(NamedTuple):
    """One request that changes something.

    Attributes:
        kind: as in the journal.
        id: of the session or order.
        value: the body.
        key: its idempotency key, so that sending it again cannot count twice; a message has its external id for that.
    """

    kind: str
    id: str
    value: dict[str, Any]
    key: str


METHODS = {
    "session.put": "PUT",
    "session.patch": "PATCH",
    "order.put": "PUT",
    "order.complete": "POST",
    "message.append": "POST",
}


def path_of(op: Op) -> str:
    """Where *op* is sent to."""
    if op.kind == "order.complete":
        return f"/v1/orders/{op.id}/complete"
    if op.kind == "message.append":
        return f"/v1/conversations/{op.id}/messages"
    return f"/v1/{op.kind.split('.')[0]}s/{op.id}"


def ops_of(number: int, dialogue: dict[str, Any]) -> Iterator[Op]:
    """The ops of the *number*th dialogue, each made at the moment when it is asked for.

    The user's turns store the session whole, as the old bots do; the assistant's turns patch it.
    """
    phone = f"57{3_000_000_000 + number}"
    transactions = dialogue["transactions"]
    for turn, (role, text) in enumerate(dialogue["turns"]):
        key = f"{dialogue['id']}.{turn}"
        if role == "user":
            pending = {"lastText": text, "services": dialogue["services"], "turn": turn}
            value = {
                "currentState": "choosing",
                "pendingData": pending,
                "lastActivity": now(),
                "dialogue": dialogue["id"],
            }
            yield Op("session.put", phone, {"recipientPhone": phone, **value}, key)
        else:
            pending = {"lastText": None, "lastReply": text, "turn": turn}
            yield Op(
                "session.patch", phone, {"pendingData": pending, "currentState": "waiting", "lastActivity": now()}, key
            )
        message = {"role": role, "content": text, "channel": "replay", "external_id": key, "session_id": phone}
        yield Op("message.append", phone, message, "")
        for index, transaction in enumerate(transactions):
            if transaction["turn"] == turn:
                yield from order_ops(number, index, phone, dialogue["id"], transaction)


def order_ops(number: int, index: int, phone: str, dialogue: str, transaction: dict[str, Any]) -> Iterator[Op]:
    """The order of a transaction and, when it succeeded, its completion."""
    id = (number + 1) * ORDERS_A_DIALOGUE_MAX + index
    value = {
        "odooOrderId": id,
        "recipientPhone": phone,
        "orderNumber": f"{dialogue}/{index}",
        "productType": transaction["service"].rstrip("_0123456789"),
        "intent": transaction.get("intent"),
        "status": "pending",
        "createdAt": now(),
    }
    yield Op("order.put", str(id), value, f"order.{id}")
    if transaction["success"]:
        yield Op("order.complete", str(id), {"revenue": price_of(id)}, f"complete.{id}")


def price_of(order: int) -> str:
    """A made-up price with two decimals, the same each time; most such sums are no binary floating point number."""
    return f"{random.Random(order).randrange(100, 100_000_000) / 100:.2f}"


def now() -> str:
    """ISO 8601, UTC, ms."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def read_dialogues(path: Path) -> list[dict[str, Any]]:
    """The dialogues in a file of one JSON object a line, gzipped or not."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        return [json.loads(line) for line in file]


# The oracle: what must be there, from the acknowledged ops alone.


class Picture(NamedTuple):
    """What is there, or should be.

    Attributes:
        sessions: id → version and value.
        orders: the same, without the moment of completion, which only the daemon knows.
        transcripts: conversation → version, and what was said: title, count, and role and text of each message.
        sales: figures by name, product types among them.
    """

    sessions: dict[str, tuple[int, dict[str, Any]]]
    orders: dict[str, tuple[int, dict[str, Any]]]
    sales: dict[str, Decimal]
    transcripts: dict[str, tuple[int, dict[str, Any]]]


def picture_after(ops: Iterable[Op]) -> Picture:
    """What *ops* amount to, beginning with nothing."""
    picture = Picture({}, {}, {}, {})
    for op in ops:
        if op.kind == "message.append":
            add_message(picture.transcripts, op)
            continue
        records = picture.sessions if op.kind.startswith("session") else picture.orders
        version, value = records.get(op.id, (0, {}))
        if op.kind == "session.patch":
            changed = merged(value, op.value)
        elif op.kind == "order.complete":
            changed = {**value, "status": "completed", "revenue": Decimal(op.value["revenue"])}
            count(picture.sales, "allTimeCompleted", "completedOrders")
            count(picture.sales, "allTimeRevenue", "totalRevenue", by=changed["revenue"])
        else:
            changed = op.value
            if op.kind == "order.put":
                count(picture.sales, "allTimeOrders", "totalOrders", f"type {changed['productType']}")
        records[op.id] = (version + 1, changed)
    return picture


def add_message(transcripts: dict[str, tuple[int, dict[str, Any]]], op: Op) -> None:
    """One more line of the conversation, whose title is its first line by the user."""
    role, content = op.value["role"], op.value["content"]
    version, said = transcripts.get(op.id, (0, {"title": None, "count": 0, "messages": []}))
    title = said["title"]
    if title is None and role == "user":
        title = content[:50] + ("..." if len(content) > 50 else "")
    messages = [*said["messages"], [role, content]]
    transcripts[op.id] = version + 1, {"title": title, "count": len(messages), "messages": messages}


def merged(target: Any, patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396, on our own so as not to believe the daemon's."""
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value) if isinstance(value, dict) else value
    return result


def count(sales: dict[str, Decimal], *names: str, by: Decimal = Decimal(1)) -> None:
    """Add *by* to each figure."""
    for name in names:
        sales[name] = sales.get(name, Decimal(0)) + by


def difference(expected: Picture, found: Picture) -> list[str]:
    """What of *found* is not as *expected*; empty when all is equal."""
    wrong = []
    for noun in ("sessions", "orders", "transcripts"):
        wanted, there = getattr(expected, noun), getattr(found, noun)
        wrong += [f"{noun} {id} lost, expected {wanted[id]}" for id in wanted.keys() - there.keys()]
        wrong += [f"{noun} {id} out of nowhere: {there[id]}" for id in there.keys() - wanted.keys()]
        wrong += [
            f"{noun} {id}: expected {wanted[id]}, found {there[id]}"
            for id in wanted.keys() & there.keys()
            if wanted[id] != there[id]
        ]
    for name in expected.sales.keys() | found.sales.keys():
        if expected.sales.get(name, 0) != found.sales.get(name, 0):
            wrong.append(f"sales {name}: expected {expected.sales.get(name, 0)}, found {found.sales.get(name, 0)}")
    return wrong


# HTTP.


class Client:
    """One keep-alive connection to ``unix:PATH`` or ``tcp:HOST:PORT``."""

    def __init__(self, address: str, token: str | None) -> None:
        scheme, _, place = address.partition(":")
        if scheme == "unix":
            self._connection = http.client.HTTPConnection("localhost", timeout=ANSWER_S)
            self._connection.sock = socket.socket(socket.AF_UNIX)
            self._connection.sock.settimeout(ANSWER_S)
            self._connection.sock.connect(place)
        else:
            self._connection = http.client.HTTPConnection(place, timeout=ANSWER_S)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The decoded answer, numbers with a point as Decimal.

        Raises:
            OSError, http.client.HTTPException: no answer came; whether the daemon did it is unknown.
            RuntimeError: it refused.
        """
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        self._connection.request(method, path, content, self._headers | (headers or {}))
        response = self._connection.getresponse()
        raw = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{method} {path} answered {response.status}: {raw[:500]!r}")
        return json.loads(raw, parse_float=Decimal) if raw else None

    def close(self) -> None:
        self._connection.close()


def picture_found(client: Client) -> Picture:
    """What the daemon holds."""
    sessions = {item["id"]: (item["version"], item["value"]) for item in listed(client, "/v1/sessions")}
    orders = {}
    for item in listed(client, "/v1/orders"):
        value = item["value"]
        if value["status"] == "completed":
            datetime.fromisoformat(value.pop("completedAt"))
        orders[item["id"]] = (item["version"], value)
    transcripts = {}
    for item in listed(client, "/v1/conversations"):
        whole = client.ask("GET", f"/v1/conversations/{item['id']}")
        messages = [[message["role"], message["content"]] for message in whole["messages"]]
        said = {"title": whole["title"], "count": whole["message_count"], "messages": messages}
        transcripts[item["id"]] = (item["version"], said)
    figures = client.ask("GET", "/v1/stats/sales")
    sales = {name: Decimal(amount) for name, amount in figures["totals"].items()}
    for day in figures["daily"]:
        for name in ("totalOrders", "completedOrders", "totalRevenue"):
            count(sales, name, by=Decimal(day[name]))
        for product_type, orders_of_type in day["productTypes"].items():
            count(sales, f"type {product_type}", by=Decimal(orders_of_type))
    return Picture(sessions, orders, sales, transcripts)


def listed(client: Client, path: str) -> Iterator[dict[str, Any]]:
    """All records of a collection, page by page."""
    cursor = ""
    while True:
        page = client.ask("GET", f"{path}?limit={PAGE}{cursor}")
        yield from page["items"]
        if page["next"] is None:
            return
        cursor = f"&cursor={page['next']}"


# The processes that send.


class Report(NamedTuple):
    """What a sending process knows when it has lost its connection, or is done.

    Attributes:
        acknowledged: every op that was answered, in order.
        in_flight: the op that had no answer; None when it is done.
        delays: seconds that each op took.
        failure: what the daemon should not have answered.
    """

    acknowledged: list[Op]
    in_flight: Op | None
    delays: list[float]
    failure: str | None = None


def send(numbered: Sequence[tuple[int, dict[str, Any]]], turn: int, main: Connection, progress: Any) -> None:
    """Send the ops of *numbered* dialogues, as a process of its own.

    Receives addresses through *main*, one at the start and one after each lost connection, and answers each with a report.

    Args:
        turn: which of the addresses to use.
        progress: shared numbers; the one at *turn* is how many ops were acknowledged.
    """
    acknowledged: list[Op] = []
    delays: list[float] = []
    op = None
    traffic = (op for number, dialogue in numbered for op in ops_of(number, dialogue))
    while True:
        addresses, token = main.recv()
        try:
            client = Client(addresses[turn % len(addresses)], token)
            op = op or next(traffic, None)
            while op is not None:
                started = time.monotonic()
                client.ask(METHODS[op.kind], path_of(op), op.value, {"Idempotency-Key": op.key} if op.key else None)
                delays.append(time.monotonic() - started)
                acknowledged.append(op)
                progress[turn] = len(acknowledged)
                op = next(traffic, None)
            client.close()
            main.send(Report(acknowledged, None, delays))
            return
        except (OSError, http.client.HTTPException):
            main.send(Report(acknowledged, op, delays))
        except RuntimeError as error:
            main.send(Report(acknowledged, op, delays, str(error)))
            return


class Senders:
    """The sending processes."""

    def __init__(self, dialogues: list[dict[str, Any]], processes: int) -> None:
        # A fresh interpreter each, as bots are; a fork would take our threads' locks with it.
        context = multiprocessing.get_context("spawn")
        self._progress = context.Array("q", processes, lock=False)
        self._pipes: list[Connection] = []
        self._processes = []
        numbered = list(enumerate(dialogues))
        for turn in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=send, args=(numbered[turn::processes], turn, theirs, self._progress), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._waiting = set(range(processes))

    @property
    def acknowledged(self) -> int:
        """Ops so far, of all processes."""
        return sum(self._progress)

    def go(self, addresses: list[str], token: str | None) -> None:
        """Let those that wait send to *addresses*."""
        for turn in self._waiting:
            self._pipes[turn].send((addresses, token))

    def are_sending(self) -> bool:
        """Whether any process still has something to do, and could do it."""
        return not all(self._pipes[turn].poll() for turn in self._waiting)

    def reports(self, known: dict[int, Report]) -> None:
        """Wait until all are done or without connection; put what they know into *known*.

        Raises:
            RuntimeError: the daemon gave an answer that it should not have given.
        """
        for turn in sorted(self._waiting):
            report = known[turn] = self._pipes[turn].recv()
            if report.failure:
                raise RuntimeError(report.failure)
            if report.in_flight is None:
                self._waiting.discard(turn)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


# The daemon.


class Daemon:
    """``holdfast serve`` on a data directory, with the events that it logs."""

    def __init__(self, data_dir: Path) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HOLDFAST_", "DATA_DIR"))}
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "daemon"), *filter(None, [environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "holdfast", "serve", "--data-dir", str(data_dir)]
        self._data_dir = data_dir
        self.process = subprocess.Popen(
            [*command, "--listen", "unix:", "--listen", "tcp:127.0.0.1:0", "--set", "log.format=json"],
            stdout=subprocess.PIPE,
            cwd=data_dir.parent,
            env=environ,
        )
        self.events: list[dict[str, Any]] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()

    def event(self, name: str, after: int = 0) -> dict[str, Any]:
        """The first event *name* behind the first *after* events, waited for."""

        def found() -> dict[str, Any] | None:
            return next((event for event in self.events[after:] if event["event"] == name), None)

        with self._news:
            event = self._news.wait_for(found, READY_S)
        if event is None:
            raise RuntimeError(f"no {name} within {READY_S} s; the last events were {self.events[-3:]}")
        return event

    @property
    def addresses(self) -> list[str]:
        """Where it listens; waits until it does."""
        listening: list[str] = self.event("daemon.ready")["listen"]
        return listening

    @property
    def token(self) -> str:
        return (self._data_dir / "token").read_text().strip()

    def flush(self) -> dict[str, Any]:
        """SIGUSR1, and the event of the flush."""
        after = len(self.events)
        self.process.send_signal(signal.SIGUSR1)
        return self.event("flush.completed", after)

    def stop(self, number: signal.Signals) -> int:
        """The exit code after *number*."""
        self.process.send_signal(number)
        code = self.process.wait(READY_S)
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


# The whole.


Moment = Callable[[float, int], bool]
"""Whether it has come, given the seconds of traffic so far and the ops acknowledged."""


def after_seconds(moment_s: float) -> Moment:
    """The moment after so many seconds of traffic."""
    return lambda seconds, ops: seconds >= moment_s


def after_ops(number: int) -> Moment:
    """The moment when so many ops are acknowledged."""
    return lambda seconds, ops: ops >= number


def never(seconds: float, ops: int) -> bool:
    """No moment at all."""
    return False


class Trial:
    """A replay and everything that is checked on the way.

    Attributes:
        wrong: what was not as it had to be.
    """

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.wrong: list[str] = []
        self.say = say
        self._reports: dict[int, Report] = {}
        self._before = Picture({}, {}, {}, {})
        self._traffic_s = 0.0

    def note_before(self, client: Client) -> None:
        """Begin with what is there already, which must be none of ours."""
        self._before = picture_found(client)

    def compare(self, client: Client, when: str) -> None:
        """Compare what is there with what was acknowledged; an op without an answer may have happened or not."""
        found = picture_found(client)
        acknowledged = [op for report in self._reports.values() for op in report.acknowledged]
        happened = [op for op in self._in_flight() if self._has_happened(op, acknowledged, found)]
        expected = picture_after([*acknowledged, *happened])
        wrong = difference(self._with_before(expected), found)
        self.wrong += [f"{when}: {one}" for one in wrong]
        uncertain = len(self._in_flight())
        self.say(
            f"{when}: {len(expected.sessions)} sessions, {len(expected.orders)} orders, "
            f"{sum(said['count'] for _, said in expected.transcripts.values())} messages, revenue "
            f"{expected.sales.get('allTimeRevenue', 0)}, {len(acknowledged)} acknowledged ops"
            + (f", {uncertain} without an answer of which {len(happened)} happened" if uncertain else "")
            + f": {len(wrong)} differences"
        )

    def _in_flight(self) -> list[Op]:
        return [report.in_flight for report in self._reports.values() if report.in_flight is not None]

    def _has_happened(self, op: Op, acknowledged: list[Op], found: Picture) -> bool:
        noun = {"session": "sessions", "order": "orders", "message": "transcripts"}[op.kind.split(".")[0]]
        after: dict[str, Any] = getattr(picture_after([*(one for one in acknowledged if one.id == op.id), op]), noun)
        there: dict[str, Any] = getattr(found, noun)
        return bool(there.get(op.id) == after[op.id])

    def _with_before(self, picture: Picture) -> Picture:
        sales = dict(self._before.sales)
        for name, amount in picture.sales.items():
            count(sales, name, by=amount)
        return Picture(
            self._before.sessions | picture.sessions,
            self._before.orders | picture.orders,
            sales,
            self._before.transcripts | picture.transcripts,
        )

    def drive(self, senders: Senders, addresses: list[str], token: str | None, has_come: Moment) -> bool:
        """Let the senders send until they are done, or the moment *has_come*; whether they are done."""
        started = time.monotonic()
        before_s = self._traffic_s
        senders.go(addresses, token)
        while senders.are_sending() and not has_come(self._traffic_s, senders.acknowledged):
            time.sleep(0.002)
            self._traffic_s = before_s + time.monotonic() - started
        return not senders.are_sending()

    def reports(self) -> list[Report]:
        """The last report of each sender."""
        return list(self._reports.values())

    def collect(self, senders: Senders) -> None:
        """Take the reports of all senders, which are done or lost their connection."""
        senders.reports(self._reports)

    def say_speed(self) -> None:
        """Print how fast the traffic was answered."""
        took_s = self._traffic_s
        delays = sorted(delay for report in self._reports.values() for delay in report.delays)
        p50, p99 = (delays[int(len(delays) * share)] * 1000 for share in (0.50, 0.99))
        self.say(
            f"traffic: {len(delays)} ops from {len(self._reports)} processes in {took_s:.1f} s, "
            f"{len(delays) / took_s:.0f} ops/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {delays[-1] * 1000:.0f} ms"
        )


class Reader:
    """Reads the event stream from its beginning, through the restarts of the daemon."""

    def __init__(self, address: str) -> None:
        sys.path.insert(0, str(ROOT / "daemon"))
        import holdfast  # here, because all the rest needs no library

        self._remote = holdfast.connect(address, timeout=READY_S)
        self._seqs: list[int] = []
        self._seen: list[Landmark] = []
        self._failure: BaseException | None = None
        self._events = self._remote.events(after=0, ops=list(METHODS))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._events:
                self._seqs.append(event.seq)
                said = event.data["messages"][0] if event.op == "message.append" else event.data["value"]
                self._seen.append(landmark(event.op, str(event.id), said))
        except BaseException as error:
            self._failure = error

    def finish(self, reports: Iterable[Report], say: Callable[[str], None]) -> list[str]:
        """Read what is left, and tell how it differs from what the *reports* say was acknowledged."""
        expected = [[landmark(op.kind, op.id, op.value) for op in report.acknowledged] for report in reports]
        ends_at = time.monotonic() + READY_S
        while len(self._seqs) < sum(map(len, expected)) and self._failure is None and time.monotonic() < ends_at:
            time.sleep(0.01)
        # What is one too many would come now.
        time.sleep(0.2)
        self._remote.close()
        self._thread.join(READY_S)
        wrong = [] if self._failure is None else [f"event stream: {self._failure!r}"]
        if self._seqs != sorted(set(self._seqs)):
            wrong.append("event stream: not in order, or something twice")
        for process, landmarks in enumerate(expected):
            ids = {id for _, id, _ in landmarks}
            found = [one for one in self._seen if one[1] in ids]
            if found != landmarks:
                pairs = zip_longest(landmarks, found)
                at, (wanted, got) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
                wrong.append(f"event stream: op {at} of process {process}: expected {wanted}, found {got}")
        say(
            f"event stream: {len(self._seqs)} events, of {sum(map(len, expected))} acknowledged: {len(wrong)} differences"
        )
        return wrong


Landmark = tuple[str, str, Any]
"""What tells one op of a dialogue from all others: kind, id, and its turn."""


def landmark(kind: str, id: str, value: dict[str, Any]) -> Landmark:
    """Of an op, or of its event."""
    turn = value["pendingData"]["turn"] if kind.startswith("session.") else value.get("external_id")
    return kind, id, turn


@contextmanager
def connected(addresses: list[str], token: str | None) -> Iterator[Client]:
    """A client of the first address."""
    client = Client(addresses[0], token)
    try:
        yield client
    finally:
        client.close()


def replay_served(
    dialogues: list[dict[str, Any]],
    data_dir: Path,
    processes: int,
    kills: Sequence[Moment] = (),
    say: Callable[[str], None] = print,
    *,
    reads_events: bool = False,
) -> list[str]:
    """Replay against a daemon of our own on *data_dir*; return what went wrong.

    Args:
        kills: the moment of each ``kill -9``.
        reads_events: compare what the event stream shows as well.
    """
    trial = Trial(say)
    daemon = Daemon(data_dir)
    senders = Senders(dialogues, processes)

    def started(was: str) -> None:
        nonlocal daemon
        daemon = Daemon(data_dir)
        with connected(daemon.addresses, daemon.token) as client:
            loaded, ready = daemon.event("state.loaded"), daemon.event("daemon.ready")
            say(f"started again in {ready['duration_ms']:.0f} ms: {loaded['replayed']} events replayed")
            trial.compare(client, f"after {was}")

    try:
        with connected(daemon.addresses, daemon.token) as client:
            trial.note_before(client)
        reader = Reader(f"unix:{data_dir / 'holdfast.sock'}") if reads_events else None
        for has_come in kills:
            if trial.drive(senders, daemon.addresses, daemon.token, has_come):
                trial.wrong.append("the traffic ended before the moment of the kill; choose an earlier one")
                break
            # So that the kill comes in the middle of a flush.
            daemon.process.send_signal(signal.SIGUSR1)
            daemon.stop(signal.SIGKILL)
            trial.collect(senders)
            started("kill -9")
        else:
            trial.drive(senders, daemon.addresses, daemon.token, never)
        trial.collect(senders)
        trial.say_speed()
        flush = daemon.flush()
        say(f"SIGUSR1: {flush['files']} files, {flush['bytes']} bytes in {flush['duration_ms']} ms")
        if flush["reason"] != "signal":
            trial.wrong.append(f"expected a flush by signal, found {flush}")
        with connected(daemon.addresses, daemon.token) as client:
            trial.compare(client, "after the traffic")
        if reader is not None:
            trial.wrong += reader.finish(trial.reports(), say)
        stopping = time.monotonic()
        code = daemon.stop(signal.SIGTERM)
        say(f"SIGTERM: exit {code} after {time.monotonic() - stopping:.2f} s")
        if code != 0:
            trial.wrong.append(f"expected exit 0 after SIGTERM, found {code}: {daemon.events[-1:]}")
        started("SIGTERM")
        daemon.stop(signal.SIGTERM)
    finally:
        senders.close()
        daemon.close()
    return trial.wrong


def replay_connected(
    dialogues: list[dict[str, Any]],
    addresses: list[str],
    token: str | None,
    processes: int,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Replay against a daemon that runs already; return what went wrong."""
    trial = Trial(say)
    senders = Senders(dialogues, processes)
    try:
        with connected(addresses, token) as client:
            trial.note_before(client)
            trial.drive(senders, addresses, token, never)
            trial.collect(senders)
            trial.say_speed()
            trial.compare(client, "after the traffic")
    finally:
        senders.close()
    return trial.wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dialogues", type=Path)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--data-dir", type=Path, help="start the daemon here, stop it, start it again")
    where.add_argument("--connect", metavar="ADDRESS", help="a running daemon: unix:PATH or tcp:HOST:PORT")
    parser.add_argument("--token", help="for tcp")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--events", action="store_true", help="compare what the event stream shows as well")
    parser.add_argument("--kill-at", type=float, action="append", default=[], metavar="SECONDS", help="may be repeated")
    arguments = parser.parse_args()
    dialogues = read_dialogues(arguments.dialogues)
    turns = sum(len(dialogue["turns"]) for dialogue in dialogues)
    transactions = sum(len(dialogue["transactions"]) for dialogue in dialogues)
    print(f"{len(dialogues)} dialogues, {turns} turns, {transactions} transactions", flush=True)
    if arguments.connect:
        if arguments.kill_at:
            parser.error("--kill-at needs --data-dir: only a daemon started here may be killed")
        if arguments.events:
            parser.error("--events needs --data-dir: the stream of another daemon may begin with what is not ours")
        wrong = replay_connected(dialogues, [arguments.connect], arguments.token, arguments.processes)
    else:
        data_dir: Path = arguments.data_dir.resolve()
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        kills = [after_seconds(moment) for moment in sorted(arguments.kill_at)]
        wrong = replay_served(dialogues, data_dir, arguments.processes, kills, reads_events=arguments.events)
    for one in wrong[:20]:
        print(f"WRONG {one:.1000}")
    print(f"{len(wrong)} wrong" if wrong else "nothing lost, nothing doubled, nothing else")
    return 1 if wrong else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
