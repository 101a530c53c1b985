"""That the benchmarks run; never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from benchmarks.measure import drive, percentile, table

CHECKOUT = Path(__file__).parent.parent


def run_benchmark(name: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.bench_{name}", *options],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.redis
def test_decision_benchmark_measures_every_target_at_every_concurrency(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decision.json"

    said = run_benchmark("decision", "--seconds", "0.02", "--rounds", "2", "--json", str(path))

    result = json.loads(path.read_text("utf-8"))
    measured = [tuple(row[k] for k in ("store", "quotas", "callers")) for row in result["rows"]]
    assert set(measured) == set(product(("memory", "redis"), (1, 2), (1, 8, 64)))
    assert all(measured.count(cell) == 3 for cell in measured)
    assert all(len(row["rounds"]) == 2 for row in result["rows"])
    lines = [line.split()[:5] for line in said.splitlines()]
    for row in result["rows"]:
        words = [str(row[key]) for key in ("store", "quotas", "callers", "target")]
        assert [*words, f"{row['per_second']:,.0f}"] in lines


@pytest.mark.redis
def test_decision_benchmark_says_what_it_was_measured_with(tmp_path: Path) -> None:
    path = tmp_path / "decision.json"

    said = run_benchmark("decision", "--seconds", "0.001", "--rounds", "1", "--json", str(path))

    environment = json.loads(path.read_text("utf-8"))["environment"]
    assert {"python", "event loop", "redis-py", "hiredis", "server", "cpu", "cores"} <= {
        name for name, value in environment.items() if value
    }
    assert all(value in said for value in environment.values())


async def test_driven_callers_share_the_subjects_in_their_order() -> None:
    seen: list[int] = []

    async def see(subject: int) -> bool:
        seen.append(subject)
        return True

    measured = await drive(see, [1, 2, 3], callers=4, seconds=0.001)

    assert seen[:7] == [1, 2, 3, 1, 2, 3, 1]
    assert measured.per_second > 0


async def test_failed_operation_ends_the_run() -> None:
    async def fail(subject: str) -> bool:
        return False

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="failed for 'u1'")):
        await drive(fail, ["u1"], callers=1, seconds=0.001)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (50, 2), (51, 3), (75, 3), (99, 4), (100, 4)]
)
def test_percentile_is_the_smallest_value_that_so_many_reach(percent: float, expected: int) -> None:
    assert percentile([1, 2, 3, 4], percent) == expected


def test_table_puts_words_left_and_numbers_right() -> None:
    assert table(["name", "n"], [["a", "100"]], words=1).splitlines() == [
        "name    n",
        "----  ---",
        "a     100",
    ]
