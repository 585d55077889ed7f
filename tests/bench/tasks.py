"""What is measured, each function in a process of its own: ``python -m tests.bench.tasks NAME ARGUMENTS``.

The last line of the output is the result, as JSON. Seconds are of the measured part alone, without imports or filling.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson

import holdfast
import holdfast.aio
from holdfast.engine import Engine
from holdfast.ops import SessionPut
from holdfast.recovery import open_engine
from holdfast.settings import Settings
from tests.bench.measure import rss_bytes
from tests.bench.record import SEED, id_of, session_of
from tests.replay import ops_of, picture_after, read_dialogues

APPEND_AT_ONCE = 500

PIPELINE = 100
IDS = 10_000
"""Sessions that the durable single puts go round."""

REQUEST_EVERY_S = 0.0005
"""Pace of the requests whose stalls are measured: 2,000 a second."""


def run_async(main: Coroutine[Any, Any, float]) -> float:
    """Run on uvloop, on which the daemon runs as well, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


async def in_coroutines(put: Callable[[str], Awaitable[Any]], count: int, coroutines: int) -> float:
    """Ops a second of *count* puts from so many coroutines, each waiting for its own."""

    async def one(turn: int) -> None:
        for number in range(turn, count, coroutines):
            await put(id_of(number % IDS))

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(coroutines)))
    return count / (time.perf_counter() - started)


# Rows 1 to 3.


def holdfast_async(directory: str, count: int, coroutines: int) -> dict[str, float]:
    """Durable puts embedded in asyncio."""

    async def main() -> float:
        async with holdfast.aio.open(directory) as hf:
            return await in_coroutines(lambda id: hf.sessions.put(id, session_of(id)), count, coroutines)

    return {"ops_s": run_async(main())}


def redis_async(socket: str, count: int, coroutines: int) -> dict[str, float]:
    """The same in redis.asyncio."""
    import redis.asyncio

    async def main() -> float:
        client = redis.asyncio.Redis(unix_socket_path=socket, max_connections=coroutines)
        try:
            return await in_coroutines(lambda id: client.set(id, orjson.dumps(session_of(id))), count, coroutines)
        finally:
            await client.aclose()

    return {"ops_s": run_async(main())}


def holdfast_fill(directory: str, count: int) -> dict[str, float]:
    """Store *count* sessions with one wait at the end, and leave them flushed."""
    before = rss_bytes()
    with holdfast.open(directory) as hf:
        started = time.perf_counter()
        with hf.pipeline():
            put = hf.sessions.put
            for number in range(count):
                id = id_of(number)
                put(id, session_of(id))
        took = time.perf_counter() - started
        return {"ops_s": count / took, "rss_bytes": rss_bytes(), "rss_before_bytes": before}


def redis_fill(socket: str, count: int) -> dict[str, float]:
    """The same in redis-py, in pipelines of 100, then saved to its RDB."""
    import redis

    client = redis.Redis(unix_socket_path=socket, socket_timeout=600)
    started = time.perf_counter()
    for first in range(0, count, PIPELINE):
        pipeline = client.pipeline(transaction=False)
        for number in range(first, min(first + PIPELINE, count)):
            id = id_of(number)
            pipeline.set(id, orjson.dumps(session_of(id)))
        pipeline.execute()
    took = time.perf_counter() - started
    client.save()
    return {"ops_s": count / took}


def _gets(get: Callable[[str], Any], size: int, count: int) -> float:
    """Gets a second of *count* of *size* sessions, in random order."""
    rnd = random.Random(SEED)
    ids = [id_of(rnd.randrange(size)) for _ in range(count)]
    started = time.perf_counter()
    for id in ids:
        get(id)
    return count / (time.perf_counter() - started)


def holdfast_get(directory: str, size: int, count: int) -> dict[str, float]:
    """Gets: decoded to a dict, and as bytes."""
    with holdfast.open(directory) as hf:
        assert len(hf.sessions) == size
        assert hf.sessions.get(id_of(0)) is not None
        return {
            "ops_s": _gets(hf.sessions.get, size, count),
            "bytes_ops_s": _gets(hf.sessions.record, size, count),
        }


def redis_get(socket: str, size: int, count: int) -> dict[str, float]:
    """The same from redis-py."""
    import redis

    client: Any = redis.Redis(unix_socket_path=socket)
    return {
        "ops_s": _gets(lambda id: orjson.loads(client.get(id)), size, count),
        "bytes_ops_s": _gets(client.get, size, count),
    }


def diskcache_get(directory: str, size: int, count: int) -> dict[str, float]:
    """The same from diskcache, filled here with its own settings."""
    import diskcache  # type: ignore[import-untyped]

    with diskcache.Cache(directory, size_limit=1 << 40) as cache:
        with cache.transact():
            for number in range(size):
                id = id_of(number)
                cache.set(id, orjson.dumps(session_of(id)))
        return {
            "ops_s": _gets(lambda id: orjson.loads(cache.get(id)), size, count),
            "bytes_ops_s": _gets(cache.get, size, count),
        }


# Rows 4 and 6.


def client_async(address: str, count: int, coroutines: int) -> dict[str, float]:
    """Durable puts through one async client."""

    async def main() -> float:
        async with holdfast.aio.connect(address) as hf:
            return await in_coroutines(lambda id: hf.sessions.put(id, session_of(id)), count, coroutines)

    return {"ops_s": run_async(main())}


def redis_pipelines(socket: str, count: int) -> dict[str, float]:
    """Durable sets from redis-py, in pipelines of 100."""
    import redis

    client = redis.Redis(unix_socket_path=socket)
    started = time.perf_counter()
    for first in range(0, count, PIPELINE):
        pipeline = client.pipeline(transaction=False)
        for number in range(first, min(first + PIPELINE, count)):
            id = id_of(number % IDS)
            pipeline.set(id, orjson.dumps(session_of(id)))
        pipeline.execute()
    return {"ops_s": count / (time.perf_counter() - started)}


def client_sync(address: str, count: int) -> dict[str, float]:
    """Durable puts through the sync client, one after the other."""
    with holdfast.connect(address) as hf:
        put = hf.sessions.put
        put("warm", session_of("warm"))
        started = time.perf_counter()
        for number in range(count):
            id = id_of(number % IDS)
            put(id, session_of(id))
        return {"ops_s": count / (time.perf_counter() - started)}


def redis_sync(socket: str, count: int) -> dict[str, float]:
    """Durable sets from redis-py, one after the other."""
    import redis

    client = redis.Redis(unix_socket_path=socket)
    client.ping()
    started = time.perf_counter()
    for number in range(count):
        id = id_of(number % IDS)
        client.set(id, orjson.dumps(session_of(id)))
    return {"ops_s": count / (time.perf_counter() - started)}


# Rows 7 to 9.


def opened(directory: str) -> Engine:
    """An engine that flushes only when told."""
    return open_engine(Settings(data_dir=Path(directory), flush_every=1e9, journal_max=1 << 40))


def holdfast_start(directory: str, size: int) -> dict[str, float]:
    """Open a directory with *size* sessions."""
    before = rss_bytes()
    started = time.perf_counter()
    engine = opened(directory)
    took = time.perf_counter() - started
    assert engine.count("sessions") == size
    after = rss_bytes()
    engine.close(flush=False)
    return {"seconds": took, "rss_bytes": after, "rss_before_bytes": before}


def decode_file(path: str) -> dict[str, float]:
    """``orjson.loads`` of a whole file, read included."""
    started = time.perf_counter()
    records = orjson.loads(Path(path).read_bytes())
    return {"seconds": time.perf_counter() - started, "records": len(records)}


def _put(number: int) -> SessionPut:
    id = id_of(number)
    return SessionPut(id=id, value=session_of(id))


def holdfast_flush(directory: str, size: int, rounds: int) -> dict[str, Any]:
    """Flush *size* sessions while others ask, *rounds* times each kind; delays in seconds.

    ``stalls`` are the longest delays of requests that come at a fixed pace, from the moment when each was due to its
    decision and a read, during each flush; ``usual_stalls`` the same without a flush. ``durable`` and
    ``usual_durable`` are those of single puts until they are durable.
    """
    engine = opened(directory)
    assert engine.count("sessions") == size
    stop = threading.Event()
    delays: list[float] = []

    def ask() -> None:
        rnd = random.Random(SEED)
        while not stop.is_set():
            due = time.perf_counter() + REQUEST_EVERY_S
            time.sleep(REQUEST_EVERY_S)
            number = rnd.randrange(size)
            engine.submit(_put(number))
            engine.get("sessions", id_of(number))
            delays.append(time.perf_counter() - due)

    def put_durably() -> None:
        rnd = random.Random(SEED)
        while not stop.is_set():
            started = time.perf_counter()
            engine.submit(_put(rnd.randrange(size))).wait()
            delays.append(time.perf_counter() - started)

    def longest_during(work: Callable[[], None], others: Callable[[], None]) -> float:
        delays.clear()
        stop.clear()
        thread = threading.Thread(target=others)
        thread.start()
        work()
        stop.set()
        thread.join()
        return max(delays)

    def flush() -> None:
        engine.flush("api")

    def nothing() -> None:
        time.sleep(alone_s)

    alone = []
    for number in range(rounds):
        engine.submit(_put(number)).wait()
        alone.append(engine.flush("api"))
    alone_s = min(report.duration_ms for report in alone) / 1000
    result: dict[str, Any] = {"seconds": alone_s, "bytes": alone[0].bytes}
    for name, others in (("stalls", ask), ("durable", put_durably)):
        # In turn, and for as long as a flush takes, so that whatever else the machine does falls on both.
        pairs = [(longest_during(flush, others), longest_during(nothing, others)) for _ in range(rounds)]
        result[name], result[f"usual_{name}"] = map(list, zip(*pairs, strict=True))
    engine.close(flush=False)
    return result


# Row 9 with what bots really keep.


def dialogue_sessions(dialogues: str, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """*count* sessions as replayed dialogues leave them, each with an id of its own; *dialogues* is a file of them."""
    known = read_dialogues(Path(dialogues))
    for number in range(count):
        dialogue = known[number % len(known)]
        # Dialogues are met in the middle as often as at their end.
        turns = dialogue["turns"][: 1 + number % len(dialogue["turns"])]
        kept = picture_after(ops_of(number, dialogue | {"turns": turns, "transactions": []})).sessions
        yield from ((id, value) for id, (_, value) in kept.items())


def holdfast_dialogues(directory: str, dialogues: str, count: int) -> dict[str, float]:
    """Memory after a start with sessions of replayed dialogues."""
    size = 0
    with holdfast.open(directory) as hf, hf.pipeline():
        for id, value in dialogue_sessions(dialogues, count):
            size += len(orjson.dumps(value))
            hf.sessions.put(id, value)
    return {"bytes": size / count}


def redis_dialogues(socket: str, dialogues: str, count: int) -> dict[str, float]:
    """The same data in redis, saved to its RDB."""
    import redis

    client = redis.Redis(unix_socket_path=socket, socket_timeout=600)
    pipeline = client.pipeline(transaction=False)
    for number, (id, value) in enumerate(dialogue_sessions(dialogues, count), 1):
        pipeline.set(id, orjson.dumps(value))
        if not number % PIPELINE:
            pipeline.execute()
    pipeline.execute()
    client.save()
    return {}


# Row 12.


def holdfast_page(directory: str, size: int, rounds: int) -> dict[str, float]:
    """Seconds of the first page of a list of *size* sessions, as many as a page has when nobody says how many."""
    with holdfast.open(directory) as hf:
        assert len(hf.sessions) == size
        took = []
        for _ in range(rounds):
            started = time.perf_counter()
            page = hf.sessions.page()
            took.append(time.perf_counter() - started)
        assert len(page.items) == min(size, 100)
        return {"seconds": sorted(took)[rounds // 2]}


# Rows 10 to 12, conversations.


def conversation_costs(directory: str, size: int, rounds: int) -> dict[str, float]:
    """Median seconds of a durable ``append`` and of a ``window(20)`` on a conversation of *size* messages and on one of 10.

    The two in turn, since the disk is never the same for long; each short one gets two messages and is followed by another.
    """
    with holdfast.open(directory) as hf:
        for first in range(0, size, APPEND_AT_ONCE):
            count = min(APPEND_AT_ONCE, size - first)
            hf.conversations.append("long", messages=[message_of(first + number) for number in range(count)])
        for number in range(rounds // 2 + 1):
            hf.conversations.append(f"short{number}", messages=[message_of(one) for one in range(9)])
        hf.conversations.window("long", messages=1)
        took: dict[str, list[float]] = {name: [] for name in ("append", "append_10", "window", "window_10")}

        def timed(name: str, work: Callable[[], Any]) -> None:
            started = time.perf_counter()
            work()
            took[name].append(time.perf_counter() - started)

        for number in range(rounds):
            for id, suffix in (("long", ""), (f"short{number // 2}", "_10")):
                timed("append" + suffix, partial(hf.conversations.append, id, "user", "Hola, ¿cuánto cuesta?"))
            # The archive is up to date for both.
            hf.conversations.window("long", messages=1)
            for id, suffix in (("long", ""), (f"short{number // 2}", "_10")):
                timed("window" + suffix, partial(hf.conversations.window, id, messages=20))
        return {name: sorted(all_of_it)[len(all_of_it) // 2] for name, all_of_it in took.items()}


def message_of(number: int) -> dict[str, Any]:
    """One of a conversation in which the two sides speak in turn."""
    role = "assistant" if number % 2 else "user"
    return {"role": role, "content": f"This is message {number} of a conversation about a music USB of 64 GB."}


def conversation_bytes(directory: str, dialogues: str, turns: int) -> dict[str, float]:
    """Bytes on the disk for *turns* of recorded dialogues in one conversation, appended one by one, and their own bytes."""
    said = [turn for dialogue in read_dialogues(Path(dialogues)) for turn in dialogue["turns"]]
    own = 0
    with holdfast.open(directory) as hf, hf.pipeline():
        for number in range(turns):
            role, text = said[number % len(said)]
            own += len(text.encode())
            hf.conversations.append("c", role, text)
    sizes = {path: path.stat().st_size for path in Path(directory).rglob("*") if path.is_file()}
    kept = sum(size for path, size in sizes.items() if "kept" in path.parts)
    return {"own": own, "bytes": sum(sizes.values()) - kept, "kept": kept}


def fill_conversations(directory: str, count: int) -> dict[str, float]:
    """*count* conversations with two messages each."""
    with holdfast.open(directory) as hf, hf.pipeline():
        for number in range(count):
            messages = [message_of(0), message_of(1)]
            hf.conversations.append(f"c{number}", messages=messages, user_id=f"u{number % (count // 50)}")
    return {}


def conversation_page(directory: str, size: int, rounds: int) -> dict[str, float]:
    """Seconds of the first page of a list of *size* conversations: of all, and of one user."""
    with holdfast.open(directory) as hf:
        assert len(hf.conversations) == size
        took: dict[str, list[float]] = {"all": [], "user": []}
        for _ in range(rounds):
            for name, filters in (("all", {}), ("user", {"user_id": "u1"})):
                started = time.perf_counter()
                page = hf.conversations.page(**filters)
                took[name].append(time.perf_counter() - started)
                assert len(page.items) == (50 if filters else 100)
        return {name: sorted(all_of_it)[rounds // 2] for name, all_of_it in took.items()}


# Row 16.


def paced_puts(address: str, token: str | None, size: int, seconds: float, ops_s: float) -> dict[str, Any]:
    """Latencies of single durable puts that come at *ops_s*, each from the moment when it was due; a request each."""
    delays: list[float] = []

    async def main() -> float:
        async with holdfast.aio.connect(address, token=token) as hf:
            rnd = random.Random(SEED)
            tasks = set()

            async def put(due: float) -> None:
                id = id_of(rnd.randrange(size))
                await hf.sessions.put(id, session_of(id))
                delays.append(time.perf_counter() - due)

            await hf.sessions.put(id_of(0), session_of(id_of(0)))
            began = time.perf_counter()
            for number in range(int(seconds * ops_s)):
                due = began + number / ops_s
                wait_s = due - time.perf_counter()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                task = asyncio.create_task(put(due))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.gather(*tasks)
        return 0.0

    run_async(main())
    delays.sort()
    return {"p50": delays[len(delays) // 2], "p99": delays[len(delays) * 99 // 100], "longest": delays[-1]}


if __name__ == "__main__":
    print(msgspec.json.encode(globals()[sys.argv[1]](**orjson.loads(sys.argv[2]))).decode())
