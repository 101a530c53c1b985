"""What every benchmark shares: driving callers for a time, the environment, the table, the file."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from tests.servers import find_server, server_version

RESULTS = Path(__file__).with_name("results")

Subject = TypeVar("Subject")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Run:
    """Hold what one run of some callers measured; latencies are in microseconds."""

    per_second: float
    p50_us: float
    p99_us: float


async def drive(
    operation: Callable[[Subject], Awaitable[bool]],
    subjects: Sequence[Subject],
    callers: int,
    seconds: float,
) -> Run:
    """Let `callers` repeat `operation` at once for a time, over the subjects in their order.

    After each operation a caller gives the event loop a turn, as a server does between requests;
    an operation that never waits would keep the other callers out otherwise. That turn is part of
    the throughput, not of the latency.

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
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "system": f"{platform.system()} {platform.release()}",
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    """Return aligned lines: the first `words` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def arguments(name: str, doc: str | None, *, seconds: float, rounds: int) -> argparse.Namespace:
    """Read the options that all benchmarks have: seconds, rounds, uvloop, json."""
    parser = argparse.ArgumentParser(
        prog=f"scripts/bench {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=_above_zero, default=seconds,
        help="how long each row is measured in each round (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=_at_least_one, default=rounds,
        help="how often the rows take turns; medians are shown (default: %(default)s)",
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


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, with the instant of its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), **result}
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")


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
