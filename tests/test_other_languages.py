"""What the README shows for other languages, run as it stands there against a real daemon."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from tests.crash.harness import serving

README = Path(__file__).parent.parent / "README.md"
ANSWER_S = 30.0


def block(language: str) -> str:
    """The one block of *language* in the README."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"{len(found)} blocks of {language}"
    return str(found[0])


@pytest.mark.parametrize(
    ("language", "interpreter", "file", "order"),
    [("js", "node", "shop.mjs", "1003"), ("php", "php", "shop.php", "1004")],
)
def test_the_example_of_another_language_works(
    tmp_path: Path, language: str, interpreter: str, file: str, order: str
) -> None:
    """A session is put, read and changed on its condition; an order is completed and counted; an error is told."""
    program = shutil.which(interpreter)
    if program is None:
        pytest.skip(f"needs {interpreter}, to run the example of the README")
    (tmp_path / file).write_text(block(language), encoding="utf-8")
    with serving(tmp_path / "data", "--listen", "tcp:127.0.0.1:0") as daemon:
        ready = next(event for event in daemon.events() if event["event"] == "daemon.ready")
        address = next(one for one in ready["listen"] if one.startswith("tcp:")).removeprefix("tcp:")

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [program, file, f"http://{address}"], cwd=tmp_path, capture_output=True, text=True, timeout=ANSWER_S
            )

        done = run()
        with daemon.connect() as client:
            session = msgspec.json.decode(client.ask("GET", "/v1/sessions/573001234567")[1])
            completed = msgspec.json.decode(client.ask("GET", f"/v1/orders/{order}")[1])
            totals = msgspec.json.decode(client.ask("GET", "/v1/stats/sales")[1], type=dict)["totals"]
        again = run()

    assert done.returncode == 0, done.stderr
    assert session["currentState"] == "awaiting_payment"
    assert completed["status"] == "completed"
    assert totals == {"allTimeOrders": 1, "allTimeRevenue": 84900.5, "allTimeCompleted": 1}
    assert "catalog" in done.stdout and "84900.5" in done.stdout
    # The order is closed by now: the refusal is told as it came, and the exit code is not 0.
    assert again.returncode != 0
    assert f"order '{order}' is completed" in again.stderr + again.stdout
