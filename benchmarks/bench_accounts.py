"""Does a decision take longer when there are a thousand times as many accounts?

    scripts/bench accounts [--accounts 1000000] [--seconds 0.3] [--rounds 5] [--json PATH]

Every account has its bucket before anything is measured: 1,000, 10,000, 100,000 and so on up to
`--accounts`, each crowd in a backend, or a namespace of one Redis, of its own. Decisions of one
quota are then made for 20,000 accounts drawn at random out of all, one caller in memory and 64 on
Redis; the crowds take turns. `dict` reads and writes a plain dict of as many keys: what the
processor's caches alone make of it.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.measure import (
    Bar,
    Chart,
    Run,
    Target,
    arguments,
    drive,
    environment,
    finish,
    middle,
    ratio,
    run,
    table,
    take_turns,
)
from benchmarks.policies import KEPT, POLICY, SEED, TIMEOUT, account, drawn
from benchmarks.stores import redis_server
from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend, RedisBackend

DRAWN = 20_000
CALLERS = {"dict": 1, "memory": 1, "redis": 64}
_FILLERS = 256


@dataclass(frozen=True, slots=True)
class Cell:
    """Name a line of the table."""

    store: str
    accounts: int


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("accounts", __doc__, seconds=0.3, rounds=5, accounts=1_000_000)
    with redis_server() as server:
        result, runs = run(
            measure(server.url, options.seconds, options.rounds, options.accounts),
            uvloop=options.uvloop,
        )
    finish(
        options, "accounts", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    url: str, seconds: float, rounds: int, most: int
) -> tuple[dict[str, Any], dict[Cell, list[Run]]]:
    """Fill every crowd, let them take turns; return the result, and the rounds of every row."""
    before = environment()
    crowds = list(_crowds(most))
    contenders: dict[Cell, Callable[[], Awaitable[Run]]] = {}
    async with AsyncExitStack() as stack:
        for accounts in crowds:
            subjects = drawn(accounts, DRAWN)
            held = MemoryBackend(max_keys=2 * most)
            memory = Limiter(POLICY, held)
            remote = await stack.enter_async_context(
                Limiter(
                    POLICY, RedisBackend.from_url(url, timeout=TIMEOUT), namespace=f"n{accounts}"
                )
            )
            counts: dict[str, int] = {}
            operations = {"dict": _count(counts), "memory": _take(memory), "redis": _take(remote)}
            for store, operation in operations.items():
                await _fill(operation, accounts)
                contenders[Cell(store, accounts)] = partial(
                    drive, operation, subjects, CALLERS[store], seconds, waits=store == "redis"
                )
            if len(held) != accounts:
                raise RuntimeError(f"{len(held)} of {accounts} buckets are in memory")
        # What was made to fill them is not what a decision leaves behind.
        gc.collect()
        gc.freeze()
        runs = await take_turns(contenders, rounds)
        if len(held) != crowds[-1]:
            raise RuntimeError("buckets went away while they were measured")
    result = {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "accounts": crowds, "seed": SEED},
        "rows": [
            {
                **asdict(cell),
                "callers": CALLERS[cell.store],
                **asdict(middle(measured)),
                "us": 1e6 / middle(measured).per_second,
                "vs_fewest": _slower(runs, cell),
                "rounds": [asdict(one) for one in measured],
            }
            for cell, measured in sorted(runs.items(), key=lambda i: (i[0].store, i[0].accounts))
        ],
    }
    return result, runs


def _crowds(most: int) -> Iterator[int]:
    accounts = min(1_000, most)
    while accounts < most:
        yield accounts
        accounts *= 10
    yield most


def _take(limiter: Limiter) -> Callable[[Account], Awaitable[bool]]:
    async def operation(account: Account) -> bool:
        return (await limiter.take(account, KEPT[1])).reason == "allowed"

    return operation


def _count(counts: dict[str, int]) -> Callable[[Account], Awaitable[bool]]:
    async def operation(account: Account) -> bool:
        counts[account.id] = counts.get(account.id, 0) + 1
        return True

    return operation


async def _fill(operation: Callable[[Account], Awaitable[bool]], accounts: int) -> None:
    numbers = iter(range(accounts))

    async def caller() -> None:
        for number in numbers:
            if not await operation(account(number)):
                raise RuntimeError(f"account {number} was denied")

    async with asyncio.TaskGroup() as group:
        for _ in range(_FILLERS):
            group.create_task(caller())


def _slower(runs: Mapping[Cell, Sequence[Run]], cell: Cell) -> float:
    """Return how many times the time of a decision among the fewest accounts."""
    fewest = min((c for c in runs if c.store == cell.store), key=lambda c: c.accounts)
    return ratio([r.per_second for r in runs[fewest]], [r.per_second for r in runs[cell]])


def _targets(runs: Mapping[Cell, Sequence[Run]]) -> list[Target]:
    most = max(cell.accounts for cell in runs)
    fewest = min(cell.accounts for cell in runs)
    caches = _slower(runs, Cell("dict", most))
    return [
        Target(
            f"{fewest:,} -> {most:,} accounts, {store}", 1.15, True,
            _slower(runs, Cell(store, most)),
            note=f"a dict of as many keys: {caches:.2f}x",
        )
        for store in ("memory", "redis")
    ]  # fmt: skip


def _charts(runs: Mapping[Cell, Sequence[Run]]) -> list[Chart]:
    bars = [
        Bar(f"{cell.store}, {cell.accounts:,}", _slower(runs, cell),
            "floor" if cell.store == "dict" else "ours")
        for cell in sorted(runs, key=lambda c: (c.store, c.accounts))
    ]  # fmt: skip
    fewest = min(cell.accounts for cell in runs)
    unit = f"times the time among {fewest:,} accounts, less is better"
    return [Chart("A decision among more accounts", unit, bars, [("1.15x", 1.15)])]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["store"], str(row["callers"]), f"{row['accounts']:,}", f"{row['us']:.2f}",
            f"{row['p50_us']:,.1f}", f"{row['p99_us']:,.1f}", f"{row['vs_fewest']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["store", "callers", "accounts", "us a decision", "p50 us", "p99 us", "vs fewest"]
    return table(header, lines, words=2)


if __name__ == "__main__":
    main()
