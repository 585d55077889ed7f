"""The command: ``python -m tests.bench [--rows 1,2] [--quick]``, also ``make bench ARGS=…``.

Prints the rows of GOALS.md that can be measured in one run, each beside its peer, with machine, versions and settings.
Only the ratios mean something: both sides ran on the same machine within the same minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench import measure, peers, record
from tests.bench.rows import FULL, ROWS, Bench, Result

COLUMNS = ("row", "what", "ours", "peer", "ratio", "goal", "verdict")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Holdfast beside its peers, in one run.")
    parser.add_argument("--rows", default="", help=f"only these, such as 1,2; there are {', '.join(map(str, ROWS))}")
    parser.add_argument("--quick", action="store_true", help="at 1 %% of the size")
    parser.add_argument(
        "--dir", type=Path, default=measure.ROOT / "build", help="where to write; the disk is measured too"
    )
    parser.add_argument(
        "--dialogues", type=Path, default=measure.ROOT / "tests" / "dialogues.jsonl", help="what sessions hold in row 9"
    )
    arguments = parser.parse_args()
    try:
        numbers = [int(number) for number in arguments.rows.split(",") if number] or list(ROWS)
        rows = {number: ROWS[number] for number in numbers}
    except (ValueError, KeyError) as error:
        parser.error(f"--rows: expected some of {', '.join(map(str, ROWS))}, found {error}")
    arguments.dir.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    results: list[Result] = []
    is_failed = False
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.dir) as directory:
        say_conditions(console, Path(directory))
        sizes = [FULL // 100] if arguments.quick else [FULL // 100, FULL // 10, FULL]
        bench = Bench(Path(directory), sizes, arguments.dialogues.absolute())
        for number, measure_row in rows.items():
            started = time.monotonic()
            print(f"row {number} …", end="", file=sys.stderr, flush=True)
            try:
                results += measure_row(bench)
            except RuntimeError as error:
                is_failed = True
                results.append(Result(number, "failed", "", "", None, None, note=str(error)))
            print(f" {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    say_results(console, results)
    return 1 if is_failed else 0


def say_conditions(console: Console, directory: Path) -> None:
    """What ran where, with which settings."""
    console.print(f"machine   {measure.machine(directory)}")
    console.print(f"versions  {', '.join(f'{name} {version}' for name, version in peers.versions().items())}")
    console.print(
        f"settings  holdfast: defaults (durability always); redis: {peers.REDIS_SETTINGS}; diskcache: defaults"
    )
    console.print(f"record    a session of {record.RECORD_BYTES} bytes; seed {record.SEED}")


def say_results(console: Console, results: list[Result]) -> None:
    """The table, then the notes."""
    table = Table(*COLUMNS)
    for result in results:
        sign = "≥" if result.is_at_least else "≤"
        table.add_row(
            str(result.row),
            result.what + (" *" if result.note else ""),
            result.ours,
            result.peer,
            "" if result.ratio is None else f"{result.ratio:.2f}",
            "" if result.goal is None else f"{sign} {result.goal:g}",
            result.verdict,
        )
    console.print(table)
    for result in results:
        if result.note:
            console.print(f"* {result.row} {result.what}: {result.note}")


if __name__ == "__main__":
    sys.exit(main())
