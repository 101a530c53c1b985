"""What do a pool, a lease and a reservation add to a decision?

    scripts/bench capacity [--seconds 0.3] [--rounds 5] [--uvloop] [--json PATH]

One process, one event loop, a Redis server of its own on loopback; every take is allowed, for one
of 100,000 accounts drawn at random with a fixed seed, and has two quotas of its own. Rows take
turns, round after round, and the medians of the rounds are shown:

- `two quotas` is what the others are compared with.
- `+ pool` is charged to a pool that all accounts share, too.
- `+ lease` takes a slot of the account, which ends by itself.
- `+ lease, released` takes a slot and gives it back: two calls.
- `+ reservation` leaves a record; `+ reservation, settled` settles it at half its cost: two calls.
- `+ pool, lease` is what a render asks for; `+ all` is that with slots in the pool and a record.

`calls` are the script calls that Redis counted per take.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from benchmarks.policies import DAY, MINUTE, SEED, drawn, script_calls
from benchmarks.stores import Asked, limiters, redis_server, told
from tests.servers import RedisServer
from tieredlimit import Account, Limiter

ACCOUNTS = 100_000
CALLERS = (1, 64)
BASE = "two quotas"

_POOL = {"rate": "1000000/second", "capacity": 100_000_000, "leave": {"everyone": "10%"}}
_SLOTS = {"concurrency": 1_000_000, "lease": "2 seconds"}
_FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "pool": {"pool": _POOL},
    "lease": {},
    "both": {"pool": _POOL},
    "all": {"pool": {**_POOL, **_SLOTS}},
}
_LEASED = ("lease", "both", "all")
POLICY: dict[str, Any] = {
    "features": _FEATURES,
    "tiers": {
        "everyone": {
            "quotas": {
                name: [{**MINUTE, **_SLOTS} if name in _LEASED else MINUTE, DAY]
                for name in _FEATURES
            }
        }
    },
}


@dataclass(frozen=True, slots=True)
class Cell:
    """Name a line of the table."""

    store: str
    callers: int
    asks: str


Runs = Mapping[Cell, Sequence[Asked]]
Operation = Callable[[Account], Awaitable[bool]]


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("capacity", __doc__, seconds=0.3, rounds=5)
    with redis_server() as server:
        result, runs = run(measure(server, options.seconds, options.rounds), uvloop=options.uvloop)
    finish(
        options, "capacity", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    server: RedisServer, seconds: float, rounds: int
) -> tuple[dict[str, Any], dict[Cell, list[Asked]]]:
    """Let all rows take turns; return the result, and the rounds of every row."""
    before = environment()
    contenders: dict[Cell, Callable[[], Awaitable[Asked]]] = {}
    accounts = drawn(ACCOUNTS, 2 * ACCOUNTS)
    async with limiters(POLICY, server) as opened:
        for store, limiter in opened.items():
            for callers in CALLERS:
                for asks, operation in _operations(limiter).items():
                    contenders[Cell(store, callers, asks)] = partial(
                        _asked, server, operation, accounts, callers, seconds, store == "redis"
                    )
        runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "accounts": ACCOUNTS, "seed": SEED},
        "rows": [
            {
                **asdict(cell),
                **told(asked),
                "vs_base": _share(runs, cell),
            }
            for cell, asked in runs.items()
        ],
    }
    return result, runs


def _operations(limiter: Limiter) -> dict[str, Operation]:
    def taking(feature: str, settle_within: float | None = None) -> Operation:
        async def operation(account: Account) -> bool:
            decision = await limiter.take(account, feature, settle_within=settle_within)
            return decision.reason == "allowed"

        return operation

    async def released(account: Account) -> bool:
        lease = (await limiter.take(account, "lease")).lease
        return lease is not None and await lease.release()

    async def settled(account: Account) -> bool:
        async with limiter.reserve(account, "plain", 2) as reservation:
            return await reservation.settle(1)

    return {
        BASE: taking("plain"),
        "+ pool": taking("pool"),
        "+ lease": taking("lease"),
        "+ lease, released": released,
        "+ reservation": taking("plain", 60.0),
        "+ reservation, settled": settled,
        "+ pool, lease": taking("both"),
        "+ all": taking("all", 60.0),
    }


async def _asked(
    server: RedisServer,
    operation: Operation,
    accounts: Sequence[Account],
    callers: int,
    seconds: float,
    waits: bool,
) -> Asked:
    before = script_calls(server)
    measured = await drive(operation, accounts, callers, seconds, waits=waits)
    return Asked(measured, script_calls(server) - before)


def _share(runs: Runs, cell: Cell) -> float:
    """Return which part of the throughput of two quotas alone this one's is."""
    base = Cell(cell.store, cell.callers, BASE)
    return ratio([o.run.per_second for o in runs[cell]], [o.run.per_second for o in runs[base]])


def _targets(runs: Runs) -> list[Target]:
    cell = Cell("redis", CALLERS[-1], "+ pool, lease")
    question = f"pool, lease and two quotas, Redis, {counted(cell.callers, 'caller')}: two quotas"
    return [Target(question, 0.5, False, _share(runs, cell))]


def _charts(runs: Runs) -> list[Chart]:
    bars = [
        Bar(cell.asks, 1e6 / middle([one.run for one in asked]).per_second,
            "floor" if cell.asks == BASE else "ours")
        for cell, asked in runs.items()
        if cell.store == "redis" and cell.callers == CALLERS[-1]
    ]  # fmt: skip
    return [Chart("Capacity: 64 callers, Redis", "us a take, less is better", bars)]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["store"], str(row["callers"]), row["asks"], f"{row['per_second']:,.0f}",
            f"{row['p50_us']:,.1f}", f"{row['p99_us']:,.1f}", f"{row['vs_base']:.2f}",
            f"{row['calls']:,.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["store", "callers", "asks for", "takes/s", "p50 us", "p99 us", "of two quotas"]
    return table([*header, "calls"], lines, words=3)


if __name__ == "__main__":
    main()
