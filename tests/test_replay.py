"""The replay of dialogues: bot traffic from several processes, compared op by op with what was acknowledged."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.replay import (
    Client,
    Daemon,
    Moment,
    Op,
    Picture,
    after_ops,
    difference,
    ops_of,
    picture_after,
    read_dialogues,
    replay_connected,
    replay_served,
)

DIALOGUES = Path(__file__).parent / "dialogues.jsonl"
PROCESSES = 2

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that is ready."""
    daemon = Daemon(tmp_path / "data")
    try:
        assert daemon.addresses
        yield daemon
    finally:
        daemon.close()


def ops() -> list[Op]:
    """All ops of the sample."""
    return [op for number, dialogue in enumerate(read_dialogues(DIALOGUES)) for op in ops_of(number, dialogue)]


@pytest.mark.parametrize("kills", [[], [after_ops(40), after_ops(120)]], ids=["undisturbed", "killed twice"])
def test_replay_finds_everything_again(tmp_path: Path, kills: list[Moment]) -> None:
    """After SIGTERM, and after each kill -9 in the middle, all that was acknowledged is there once, and nothing else."""
    said: list[str] = []

    wrong = replay_served(
        read_dialogues(DIALOGUES), tmp_path / "data", PROCESSES, kills, said.append, reads_events=True
    )

    print("\n".join(said))
    assert wrong == []
    assert sum(line.startswith("event stream:") for line in said) == 1
    assert sum(line.startswith("after kill -9") for line in said) == len(kills)


def test_replay_against_a_running_daemon(running: Daemon) -> None:
    """A daemon that somebody else runs, and that holds something already, is compared as well."""
    client = Client(running.addresses[0], None)
    client.ask("PUT", "/v1/sessions/573109999999", {"currentState": "theirs"})
    client.ask("PUT", "/v1/orders/7", {"recipientPhone": "573109999999", "status": "pending", "productType": "Tea"})
    client.close()

    wrong = replay_connected(read_dialogues(DIALOGUES), running.addresses, running.token, PROCESSES, lambda line: None)

    assert wrong == []


def test_replay_notices_an_answer_that_should_not_come(running: Daemon) -> None:
    """An op that the daemon refuses ends the replay with the daemon's words."""
    dialogues = read_dialogues(DIALOGUES)
    dialogues[3]["turns"][0][1] = "x" * (2 << 20)

    with pytest.raises(RuntimeError, match="answered 413"):
        replay_connected(dialogues, running.addresses, running.token, PROCESSES, lambda line: None)


def test_the_sample_covers_every_kind_of_op() -> None:
    """Puts and patches of sessions, orders that succeed, and orders that stay open."""
    picture = picture_after(ops())

    statuses = {value["status"] for _, value in picture.orders.values()}

    assert {op.kind for op in ops()} == {
        "session.put",
        "session.patch",
        "order.put",
        "order.complete",
        "message.append",
    }
    assert statuses == {"pending", "completed"}
    assert picture.sales["allTimeRevenue"] != int(picture.sales["allTimeRevenue"])


def lose(picture: Picture) -> None:
    picture.orders.popitem()


def double(picture: Picture) -> None:
    id, (version, value) = next(iter(picture.sessions.items()))
    picture.sessions[id] = (version + 1, value)


def alter(picture: Picture) -> None:
    id, (version, value) = next(iter(picture.sessions.items()))
    picture.sessions[id] = (version, value | {"pendingData": {}})


def invent(picture: Picture) -> None:
    picture.sessions["573100000000"] = (1, {})


def miscount(picture: Picture) -> None:
    picture.sales["allTimeRevenue"] += Decimal("0.01")


@pytest.mark.parametrize("spoil", [lose, double, alter, invent, miscount])
def test_the_comparison_notices(spoil: Any) -> None:
    """A record lost, changed twice, altered or invented is a difference, and so is a cent."""
    all_ops = ops()
    found = picture_after(all_ops)
    assert difference(picture_after(all_ops), found) == []

    spoil(found)

    assert len(difference(picture_after(all_ops), found)) == 1
