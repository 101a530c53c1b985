"""What every benchmark shares: taking turns, medians, the environment, the table, the file."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from tests.servers import find_server, server_version

RESULTS = Path(__file__).with_name("results")

_OPTIONS = {
    "seconds": "how long each row is measured in each round",
    "rounds": "how often the rows take turns; medians are shown",
    "accounts": "the most accounts",
    "connections": "how many connections ask at once",
    "calls": "how many calls of each kind are made in each round",
    "ids": "how many ids are invented",
    "in-redis": "how many of them for Redis",
}

Subject = TypeVar("Subject")
Outcome = TypeVar("Outcome")
Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Run:
    """Hold what one run of some callers measured; latencies are in microseconds."""

    per_second: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class Target:
    """Hold one thing that was aimed at, and what was measured.

    Attributes:
        question: What is compared, in what setting.
        bound: The value aimed at.
        at_most: True where less is better.
        value: What was measured, None where it was not.
        unit: What both are counted in, such as `x` or `us`.
        note: What the value depends on, or why there is none.
    """

    question: str
    bound: float
    at_most: bool
    value: float | None
    unit: str = "x"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """Hold one bar of a chart; `kind` is ours, peer or floor."""

    label: str
    value: float
    kind: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Hold what a report draws of a benchmark: bars, and the lines that were aimed at."""

    title: str
    unit: str
    bars: Sequence[Bar]
    lines: Sequence[tuple[str, float]] = ()


async def take_turns(
    contenders: Mapping[Name, Callable[[], Awaitable[Outcome]]], rounds: int
) -> dict[Name, list[Outcome]]:
    """Let each contender run once a round; return the rounds of each, without a warm-up round."""
    outcomes: dict[Name, list[Outcome]] = {name: [] for name in contenders}
    for number in range(1 + rounds):
        for name, contender in contenders.items():
            outcome = await contender()
            # The first round is the warm-up: connections, buckets, caches.
            if number:
                outcomes[name].append(outcome)
    return outcomes


def ratio(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the rounds' ratios: what burdens a round burdens both of its sides."""
    return median(mine / theirs for mine, theirs in zip(own, other, strict=True))


async def drive(
    operation: Callable[[Subject], Awaitable[bool]],
    subjects: Sequence[Subject],
    callers: int,
    seconds: float,
    *,
    waits: bool,
) -> Run:
    """Let `callers` repeat `operation` at once for a time, over the subjects in their order.

    `waits` says that each operation waits for something. One that does not would keep the other
    callers out: after each of these a caller gives the event loop a turn, which is part of the
    throughput, not of the latency.

    Raises:
        RuntimeError: An operation returned False: the run would not measure what it says.
    """
    clock = time.perf_counter
    latencies: list[float] = []
    workload = cycle(subjects)
    begin = clock()
    deadline = begin + seconds

    async def call() -> None:
        while True:
            subject = next(workload)
            before = clock()
            if not await operation(subject):
                raise RuntimeError(f"the operation failed for {subject!r}")
            after = clock()
            latencies.append(after - before)
            if after >= deadline:
                return
            if not waits:
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(call())
    elapsed = clock() - begin
    latencies.sort()
    return Run(
        len(latencies) / elapsed,
        percentile(latencies, 50) * 1e6,
        percentile(latencies, 99) * 1e6,
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of a sorted, non-empty sequence reach."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]


def middle(runs: Sequence[Run]) -> Run:
    """Return the median of each number over the runs."""
    return Run(
        median(run.per_second for run in runs),
        median(run.p50_us for run in runs),
        median(run.p99_us for run in runs),
    )


def environment() -> dict[str, str]:
    """Say what a result depends on besides the code; call it inside the event loop."""
    server = find_server()
    loop = type(asyncio.get_running_loop())
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "event loop": f"{loop.__module__}.{loop.__qualname__}",
        "redis-py": _version("redis"),
        "hiredis": _version("hiredis"),
        "limits": _version("limits"),
        "server": f"{server.name} {server_version(server)}",
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "load before": load(),
        "system": f"{platform.system()} {platform.release()}",
    }


def load() -> str:
    """Say how busy the machine was over the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: int,
    last_word: bool = False,
) -> str:
    """Return aligned lines: `words` columns (and the last, if so) to the left, numbers right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width)
            if i < words or (last_word and i == len(widths) - 1)
            else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def arguments(name: str, doc: str | None, **defaults: float) -> argparse.Namespace:
    """Read the options that all benchmarks have: rounds, uvloop, json; and `defaults`, by name.

    A default that is an int takes whole numbers from 1 on, a float anything above 0.
    """
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option, default in defaults.items():
        parser.add_argument(
            f"--{option}", type=_at_least_one if isinstance(default, int) else _above_zero,
            default=default, help=f"{_OPTIONS[option]} (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument("--uvloop", action="store_true", help="use uvloop's event loop")
    parser.add_argument(
        "--json", type=Path, metavar="PATH",
        default=RESULTS / f"{name}-{datetime.now(UTC):%Y-%m-%d-%H%M%S}.json",
        help="where to write the result (default: a file in benchmarks/results)",
    )  # fmt: skip
    return parser.parse_args()


def run(main: Coroutine[Any, Any, Outcome], *, uvloop: bool) -> Outcome:
    """Run a benchmark in the event loop asked for."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if uvloop:
        from uvloop import new_event_loop as factory  # here, since Windows has none
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def finish(
    options: argparse.Namespace,
    benchmark: str,
    doc: str | None,
    result: Mapping[str, Any],
    shown: str,
    *,
    targets: Sequence[Target] = (),
    charts: Sequence[Chart] = (),
) -> None:
    """Print a result, with what was left out and what was aimed at, and write it as JSON."""
    environment = {**result["environment"], "load after": load()}
    print("\n".join(f"{name:<12} {value}" for name, value in environment.items()))
    print(f"\n{shown}\n")
    for name, why in result.get("left_out", {}).items():
        print(f"left out: {name}: {why}")
    if targets:
        print(f"\n{targets_table(targets)}\n")
    document = {
        "benchmark": benchmark,
        "question": (doc or "").partition("\n")[0],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **result,
        "environment": environment,
        "targets": [asdict(target) for target in targets],
        "charts": [asdict(chart) for chart in charts],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(f"written to {options.json}")


def targets_table(targets: Sequence[Target]) -> str:
    """Return a table of what was aimed at, with what was measured beside."""
    rows = [
        [
            target.question,
            f"{'<=' if target.at_most else '>='} {_amount(target.bound, target.unit)}",
            "-" if target.value is None else _amount(target.value, target.unit),
            verdict(target),
            target.note,
        ]
        for target in targets
    ]
    return table(["question", "target", "measured", "", "note"], rows, words=1, last_word=True)


def counted(number: int, word: str) -> str:
    """Return `1 quota`, `2 quotas` and the like."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def verdict(target: Target) -> str:
    """Say whether a target is met, and if not by which factor it is missed."""
    if target.value is None:
        return "not measured"
    if target.value <= target.bound if target.at_most else target.value >= target.bound:
        return "met"
    if not target.bound or not target.value:
        return "not met"
    far = target.value / target.bound if target.at_most else target.bound / target.value
    return f"not met, {far:.2f} off"


def _amount(value: float, unit: str) -> str:
    digits = 2 if unit == "x" else 1
    text = f"{value:,.{digits}f}".rstrip("0").rstrip(".")
    return f"{text}{unit}" if unit == "x" else f"{text} {unit}"


def _above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "no"


def _cpu_model() -> str:
    return next(_cpu_models(), platform.processor() or platform.machine())


def _cpu_models() -> Iterator[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                yield value.strip()
