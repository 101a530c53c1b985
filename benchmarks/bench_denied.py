"""What does an account that is denied, and goes on asking, cost?

    scripts/bench denied [--seconds 0.3] [--rounds 5] [--uvloop] [--json PATH]

Takes of a feature of two quotas. `allowed` are those of 1,000 accounts with tokens left; `denied`
are those of one account whose bucket is empty for an hour, which was denied once before anything is
measured. Each round hammers with an account of its own, for less than the second that a denial may
be remembered. `calls` are the script calls that Redis counted meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from typing import Any

from benchmarks.measure import (
    Bar,
    Chart,
    Target,
    arguments,
    counted,
    drive,
    environment,
    finish,
    middle,
    ratio,
    run,
    table,
    take_turns,
)
from benchmarks.policies import POLICY, SEED, account, drawn
from benchmarks.stores import Asked, limiters, redis_server, told
from tests.servers import RedisServer
from tieredlimit import Account, Limiter

ACCOUNTS = 1_000
CALLERS = (1, 64)
_REMEMBERED_SECONDS = 0.9


@dataclass(frozen=True, slots=True)
class Cell:
    """Name a line of the table."""

    store: str
    callers: int
    outcome: str


Runs = Mapping[Cell, Sequence[Asked]]


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("denied", __doc__, seconds=0.3, rounds=5)
    if options.seconds > _REMEMBERED_SECONDS:
        sys.exit(f"--seconds must be at most {_REMEMBERED_SECONDS}: a denial is forgotten after 1")
    with redis_server() as server:
        result, runs = run(measure(server, options.seconds, options.rounds), uvloop=options.uvloop)
    finish(
        options, "denied", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    server: RedisServer, seconds: float, rounds: int
) -> tuple[dict[str, Any], dict[Cell, list[Asked]]]:
    """Let allowed and denied takes alternate; return the result, and the rounds of every row."""
    before = environment()
    contenders: dict[Cell, Callable[[], Awaitable[Asked]]] = {}
    accounts, fresh = drawn(ACCOUNTS, 10 * ACCOUNTS), count(ACCOUNTS)
    async with limiters(POLICY, server) as opened:
        for store, limiter in opened.items():
            for callers in CALLERS:
                contenders[Cell(store, callers, "allowed")] = partial(
                    _allowed, limiter, accounts, callers, seconds
                )
                contenders[Cell(store, callers, "denied")] = partial(
                    _denied, limiter, fresh, callers, seconds
                )
        runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "accounts": ACCOUNTS, "seed": SEED},
        "rows": [
            {
                **asdict(cell),
                **told(asked),
                "vs_allowed": _share(runs, cell),
            }
            for cell, asked in runs.items()
        ],
    }
    return result, runs


async def _allowed(
    limiter: Limiter, accounts: Sequence[Account], callers: int, seconds: float
) -> Asked:
    async def operation(account: Account) -> bool:
        return (await limiter.take(account, "video")).reason == "allowed"

    before = _calls(limiter)
    measured = await drive(operation, accounts, callers, seconds, waits=True)
    return Asked(measured, _calls(limiter) - before)


async def _denied(limiter: Limiter, fresh: Iterator[int], callers: int, seconds: float) -> Asked:
    async def operation(account: Account) -> bool:
        return (await limiter.take(account, "tight")).reason == "quota"

    hammering = account(next(fresh))
    if not (await limiter.take(hammering, "tight")).allowed or not await operation(hammering):
        raise RuntimeError("an account should have had one token")
    before = _calls(limiter)
    measured = await drive(operation, [hammering], callers, seconds, waits=False)
    return Asked(measured, _calls(limiter) - before)


def _calls(limiter: Limiter) -> int:
    """Return the calls with decisions so far: the server also hears that this process lives."""
    return limiter.call_stats.calls if limiter.call_stats is not None else 0


def _share(runs: Runs, cell: Cell) -> float:
    """Return how many times the time of an allowed take this one's is, medians of the rounds."""
    allowed = Cell(cell.store, cell.callers, "allowed")
    return ratio([o.run.per_second for o in runs[allowed]], [o.run.per_second for o in runs[cell]])


def _targets(runs: Runs) -> list[Target]:
    targets = []
    for callers in CALLERS:
        cell, allowed = (Cell("redis", callers, outcome) for outcome in ("denied", "allowed"))
        who = counted(callers, "caller")
        calls = max(asked.calls for asked in runs[cell])
        targets += [
            Target(f"denied, Redis, {who}: Redis calls", 0, True, calls, "calls"),
            Target(
                f"denied, Redis, {who}, p50: an allowed take", 0.2, True,
                ratio([o.run.p50_us for o in runs[cell]], [o.run.p50_us for o in runs[allowed]]),
            ),
            Target(f"denied, Redis, {who}, throughput: an allowed take", 0.2, True,
                   _share(runs, cell)),
        ]  # fmt: skip
    return targets


def _charts(runs: Runs) -> list[Chart]:
    bars = [
        Bar(f"{cell.store}, {counted(cell.callers, 'caller')}, {cell.outcome}",
            1e6 / middle([one.run for one in asked]).per_second,
            "floor" if cell.outcome == "allowed" else "ours")
        for cell, asked in runs.items()
        if cell.store == "redis"
    ]  # fmt: skip
    return [Chart("A denied account that goes on asking", "us a take, less is better", bars)]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["store"], str(row["callers"]), row["outcome"], f"{row['per_second']:,.0f}",
            f"{row['p50_us']:,.1f}", f"{row['p99_us']:,.1f}", f"{row['vs_allowed']:.2f}x",
            f"{row['calls']:,.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["store", "callers", "outcome", "takes/s", "p50 us", "p99 us", "time vs allowed"]
    return table([*header, "calls"], lines, words=3)


if __name__ == "__main__":
    main()
