"""That the benchmarks run; never how fast."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

from benchmarks.measure import (
    Bar,
    Chart,
    Target,
    drive,
    percentile,
    ratio,
    table,
    take_turns,
    verdict,
)
from benchmarks.policies import POLICY, account, charges_of, commands_for
from benchmarks.report import QUICK, draw
from benchmarks.targets import ORDER

CHECKOUT = Path(__file__).parent.parent
BENCHMARKS = CHECKOUT / "benchmarks"


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
def test_capacity_benchmark_measures_what_each_part_adds(tmp_path: Path) -> None:
    path = tmp_path / "capacity.json"

    run_benchmark("capacity", "--seconds", "0.02", "--rounds", "1", "--json", str(path))

    result = json.loads(path.read_text("utf-8"))
    rows = {(row["store"], row["callers"], row["asks"]): row for row in result["rows"]}
    asks = {asks for _, _, asks in rows}
    assert {"two quotas", "+ pool", "+ lease", "+ reservation", "+ pool, lease", "+ all"} <= asks
    assert all(rows["redis", callers, "two quotas"]["vs_base"] == 1 for callers in (1, 64))
    # However much a decision asks for, alone it is one call.
    alone = rows["redis", 1, "+ all"]
    assert alone["calls"] > 0
    assert [target["bound"] for target in result["targets"]] == [0.5]


@pytest.mark.redis
def test_decision_benchmark_measures_every_target_at_every_concurrency(tmp_path: Path) -> None:
    path = tmp_path / "new" / "decision.json"

    said = run_benchmark("decision", "--seconds", "0.02", "--rounds", "2", "--json", str(path))

    result = json.loads(path.read_text("utf-8"))
    measured = [tuple(row[k] for k in ("store", "quotas", "callers")) for row in result["rows"]]
    assert set(measured) == set(product(("memory", "redis"), (1, 2), (1, 8, 64)))
    targets = {row["target"] for row in result["rows"]}
    assert {"tieredlimit", "limits.aio", "EVALSHA", "nothing"} <= targets
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


TINY = {
    "accounts": ["--accounts", "2000", "--seconds", "0.01", "--rounds", "1"],
    "call_length": ["--calls", "2", "--rounds", "1"],
    "cluster": ["--seconds", "0.01", "--rounds", "1"],
    "denied": ["--seconds", "0.01", "--rounds", "1"],
    "memory": ["--accounts", "300"],
    "middleware": ["--seconds", "0.01", "--rounds", "1"],
    "policy_size": ["--seconds", "0.01", "--rounds", "1"],
    "strangers": ["--ids", "3000", "--in-redis", "300"],
}


@pytest.mark.redis
@pytest.mark.parametrize("name", TINY)
def test_benchmark_measures_what_it_aims_at(name: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"

    said = run_benchmark(name, *TINY[name], "--json", str(path))

    result = json.loads(path.read_text("utf-8"))
    assert result["benchmark"] == name
    assert result["question"].endswith("?")
    assert result["rows"]
    assert result["charts"]
    peerless = [target for target in result["targets"] if "slowapi" not in target["question"]]
    assert all(target["value"] is not None for target in peerless)
    for target in result["targets"]:
        assert target["question"] in said
    for peer, why in result.get("left_out", {}).items():
        assert f"left out: {peer}: {why}" in said


@pytest.mark.redis
def test_whole_server_is_measured_bare_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    options = ["--seconds", "0.1", "--rounds", "1", "--connections", "4", "--json", str(path)]

    run_benchmark("end_to_end", *options)

    rows = {row["target"] for row in json.loads(path.read_text("utf-8"))["rows"]}
    assert {"bare", "tieredlimit, 1 quota", "tieredlimit, 2 quotas"} <= rows


def test_every_benchmark_is_in_the_report() -> None:
    files = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}

    assert files == set(ORDER) == set(QUICK)


def test_targets_stand_beside_the_latest_results(tmp_path: Path) -> None:
    for day, value in (("01", 3.0), ("02", 30.0)):
        target = Target("how fast", 15, False, value)
        result = {
            "benchmark": "decision",
            "finished": f"2026-01-{day}T00:00:00+00:00",
            "environment": {"load after": "0 0 0"},
            "targets": [asdict(target)],
        }
        name = f"decision-2026-01-{day}-000000.json"
        (tmp_path / name).write_text(json.dumps(result), "utf-8")

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.targets", "--results", str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ["how", "fast", ">=", "15x", "30x", "met"] in [
        line.split() for line in done.stdout.splitlines()
    ]
    assert "not measured: scripts/bench memory" in done.stderr
    assert done.returncode == 1


def test_report_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing is an extra")
    target = Target("how fast", 15, False, 3.0)
    chart = Chart("Fast", "x", [Bar("ours", 3.0, "ours"), Bar("theirs", 1.0, "peer")], [("aim", 2)])
    result = {
        "benchmark": "decision",
        "finished": "2026-01-01T00:00:00+00:00",
        "environment": {"cpu": "some"},
        "targets": [asdict(target)],
        "charts": [asdict(chart)],
    }

    draw([result], tmp_path / "new" / "report.svg")

    assert "tieredlimit" in (tmp_path / "new" / "report.svg").read_text("utf-8")


@pytest.mark.parametrize(
    ("at_most", "value", "expected"),
    [
        (True, 10.0, "met"),
        (True, 20.0, "not met, 2.00 off"),
        (False, 10.0, "met"),
        (False, 5.0, "not met, 2.00 off"),
        (True, None, "not measured"),
    ],
)
def test_verdict_says_how_far_off(at_most: bool, value: float | None, expected: str) -> None:
    assert verdict(Target("how fast", 10, at_most, value)) == expected


async def test_contenders_take_turns_after_a_warm_up_round() -> None:
    turns: list[str] = []

    def contender(name: str) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            turns.append(name)
            return len(turns)

        return run

    rounds = await take_turns({"a": contender("a"), "b": contender("b")}, rounds=2)

    assert turns == ["a", "b"] * 3
    assert rounds == {"a": [3, 5], "b": [4, 6]}


def test_ratio_is_taken_within_each_round() -> None:
    # The second round was burdened on both sides.
    assert ratio([100.0, 10.0, 120.0], [50.0, 5.0, 50.0]) == 2.0


async def test_commands_are_the_bytes_that_redis_is_sent() -> None:
    accounts = [account(number) for number in range(3)]

    commands = commands_for(await charges_of(POLICY, accounts, "video"), together=2)

    assert [command[0] for command in commands] == [b"EVALSHA", b"EVALSHA"]
    assert [int(command[2]) for command in commands] == [2, 1]
    assert [command[3].rpartition(b":")[2].decode() for command in commands] == [
        accounts[0].id,
        accounts[2].id,
    ]


async def test_driven_callers_share_the_subjects_in_their_order() -> None:
    seen: list[int] = []

    async def see(subject: int) -> bool:
        seen.append(subject)
        return True

    measured = await drive(see, [1, 2, 3], callers=4, seconds=0.001, waits=False)

    assert seen[:7] == [1, 2, 3, 1, 2, 3, 1]
    assert measured.per_second > 0


async def test_failed_operation_ends_the_run() -> None:
    async def fail(subject: str) -> bool:
        return False

    with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="failed for 'u1'")):
        await drive(fail, ["u1"], callers=1, seconds=0.001, waits=True)


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


def test_import_benchmark_compares_with_what_is_imported_anyway(tmp_path: Path) -> None:
    path = tmp_path / "import.json"

    said = run_benchmark("import", "--rounds", "1", "--breakdown", "--json", str(path))

    result = json.loads(path.read_text("utf-8"))
    rows = {row["imports"]: row for row in result["rows"]}
    assert rows["starlette and redis"]["vs_base"] == 1
    assert rows["both, and tieredlimit"]["ms"] > 0
    assert [target["bound"] for target in result["targets"]] == [1.3]
    assert "tieredlimit._core.tier " in said
