"""How many decisions a second, and how long does one take, at 1, 8 and 64 callers?

    scripts/bench decision [--seconds 0.4] [--rounds 5] [--uvloop] [--json PATH]

One process, one event loop, a Redis server of its own on loopback. Every decision is allowed, for
one of 1,000 accounts drawn at random with a fixed seed, of a feature with one quota or with two.
Rows of the same store take turns, round after round, and the medians of the rounds are shown:

- `tieredlimit` is `limiter.take`, whole: tier, cell, keys, store, decision.
- `limits.aio` hits a fixed window, its cheapest strategy; two quotas are two hits, one after the
  other, since it has no call for both. In memory it looks at every key it holds once in each turn
  of the loop, between decisions: that shows in the throughput and not in the latency.
- `EVALSHA` is redis-py alone, sending our script with arguments made beforehand, on a connection
  per caller: what one round trip costs without a limiter around it.
- `nothing` decides nothing: the callers and the event loop alone, to be taken off the memory rows.
"""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from limits import RateLimitItem, RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter
from redis.asyncio import ConnectionPool, Redis

from benchmarks.measure import Run, arguments, drive, environment, middle, run, save, table
from tests.servers import NoServerError, RedisServer
from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend, RedisBackend

SEED = 20_240_229
ACCOUNTS = 1_000
CALLERS = (1, 8, 64)
FEATURES = {1: "image", 2: "video"}
"""The feature that has so many quotas."""
BASELINES = ("limits.aio", "EVALSHA")

# Large enough to allow everything, refilled so slowly that buckets stay in the store.
_MINUTE = {"rate": "60/minute", "capacity": 1_000_000}
_DAY = {"rate": "1000/day", "capacity": 1_000_000}
_LIMITS: tuple[RateLimitItem, ...] = (
    RateLimitItemPerMinute(1_000_000),
    RateLimitItemPerDay(1_000_000),
)
_POLICY = {
    "order": ["new", "pro", "free", "everyone"],
    "features": {
        "image": {"routes": ["POST /v1/images"]},
        "video": {"routes": ["POST /v1/videos"]},
    },
    "defaults": {"quotas": {"image": _MINUTE, "video": [_MINUTE, _DAY]}},
    "tiers": {
        "new": {"when": {"plan": "free", "account_age_below": "7 days"}},
        "pro": {"when": {"plan": ["pro", "team"]}},
        "free": {"when": {"plan": "free"}},
        "everyone": {},
    },
}
# A machine that is busy with something else must not end a run; the timer costs the same.
_TIMEOUT = 10.0

Operation = Callable[[Account], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Cell:
    """Name a line of the table."""

    store: str
    quotas: int
    callers: int
    target: str


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("decision", __doc__, seconds=0.4, rounds=5)
    try:
        server = RedisServer()
    except NoServerError as exc:
        sys.exit(str(exc))
    with server:
        result = run(
            measure(server.url, options.seconds, options.rounds),
            uvloop=options.uvloop,
        )
    print("\n".join(f"{name:<12} {value}" for name, value in result["environment"].items()))
    print(f"\n{_table(result['rows'])}\n")
    save(options.json, {"benchmark": "decision", **result})
    print(f"written to {options.json}")


async def measure(url: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Run every cell, warmed up, in rounds; return the environment, the settings and the rows."""
    before = environment()
    accounts = _accounts()
    runs: dict[Cell, list[Run]] = {}
    async with _operations(url, sorted(set(accounts), key=lambda a: a.id)) as operations:
        for number in range(1 + rounds):
            for (store, quotas), targets in operations.items():
                for callers in CALLERS:
                    for target, operation in targets.items():
                        measured = await drive(operation, accounts, callers, seconds)
                        # The first round is the warm-up: connections, buckets, caches.
                        if number:
                            cell = Cell(store, quotas, callers, target)
                            runs.setdefault(cell, []).append(measured)
    return {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "accounts": ACCOUNTS, "seed": SEED},
        "rows": _rows(runs),
    }


def _accounts() -> list[Account]:
    """Return accounts in the order in which they come, ten times as many as there are."""
    made = datetime(2020, 1, 1, tzinfo=UTC)
    known = [Account(f"account-{i:04}", plan="free", created_at=made) for i in range(ACCOUNTS)]
    return random.Random(SEED).choices(known, k=10 * ACCOUNTS)


@asynccontextmanager
async def _operations(
    url: str, accounts: Sequence[Account]
) -> AsyncIterator[dict[tuple[str, int], dict[str, Operation]]]:
    """Open everything that is compared; yield the operations by store and quotas, then target."""
    async with AsyncExitStack() as stack:
        memory = await stack.enter_async_context(Limiter(_POLICY, MemoryBackend()))
        remote = await stack.enter_async_context(
            Limiter(_POLICY, RedisBackend.from_url(url, timeout=_TIMEOUT))
        )
        client = await stack.enter_async_context(Redis.from_url(url, protocol=2))
        pool = ConnectionPool.from_url(url)
        stack.push_async_callback(pool.disconnect)
        limits_redis = RedisStorage(
            f"async+{url}",
            implementation="redispy",
            connection_pool=pool,  # type: ignore[arg-type]  # it takes one, its types say otherwise
        )
        limits_memory = MemoryStorage()
        yield {
            **{
                ("memory", quotas): {
                    "tieredlimit": _take(memory, feature),
                    "limits.aio": _hits(limits_memory, quotas),
                    "nothing": _nothing,
                }
                for quotas, feature in FEATURES.items()
            },
            **{
                ("redis", quotas): {
                    "tieredlimit": _take(remote, feature),
                    "limits.aio": _hits(limits_redis, quotas),
                    "EVALSHA": await _evalsha(client, remote, feature, accounts),
                }
                for quotas, feature in FEATURES.items()
            },
        }


def _take(limiter: Limiter, feature: str) -> Operation:
    take = limiter.take

    async def operation(account: Account) -> bool:
        # An outage answer may allow as well, and would be measured as a decision.
        return (await take(account, feature)).reason == "allowed"

    return operation


def _hits(storage: Storage, quotas: int) -> Operation:
    hit = FixedWindowRateLimiter(storage).hit
    items = _LIMITS[:quotas]

    async def operation(account: Account) -> bool:
        for item in items:
            if not await hit(item, account.id):
                return False
        return True

    return operation


async def _evalsha(
    client: Redis, limiter: Limiter, feature: str, accounts: Sequence[Account]
) -> Operation:
    script = files("tieredlimit.backends").joinpath("lua/take.lua").read_text("utf-8")
    sha = await client.script_load(script)
    shelves = limiter._table.entry(limiter.tier_of(accounts[0]), feature).shelves
    keys_and_arguments: dict[str, list[str | bytes]] = {
        account.id: [
            *[shelf.key(account) for shelf in shelves],
            "",
            *[shelf.packed_for(1) for shelf in shelves],
        ]
        for account in accounts
    }
    evalsha = client.evalsha

    async def operation(account: Account) -> bool:
        reply = await evalsha(sha, len(shelves), *keys_and_arguments[account.id])
        allowed: bool = reply[0] == 1
        return allowed

    return operation


async def _nothing(account: Account) -> bool:  # noqa: ARG001 -- an operation
    return True


def _rows(runs: Mapping[Cell, Sequence[Run]]) -> list[dict[str, Any]]:
    """Return per cell its medians, how many times another's decisions it makes, and its rounds."""
    medians = {cell: middle(measured) for cell, measured in runs.items()}
    rows: list[dict[str, Any]] = []
    for cell, own in medians.items():
        others = [replace(cell, target=other) for other in BASELINES if other != cell.target]
        vs = {
            other.target: round(own.per_second / medians[other].per_second, 2)
            for other in others
            if other in medians and cell.target != "nothing"
        }
        rounds = [asdict(measured) for measured in runs[cell]]
        rows.append({**asdict(cell), **asdict(own), "vs": vs, "rounds": rounds})
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["store", "quotas", "callers", "target", "decisions/s", "p50 us", "p99 us"]
    lines = [
        [
            row["store"], str(row["quotas"]), str(row["callers"]), row["target"],
            f"{row['per_second']:,.0f}", f"{row['p50_us']:,.1f}", f"{row['p99_us']:,.1f}",
            *[f"{row['vs'][other]:.2f}x" if other in row["vs"] else "" for other in BASELINES],
        ]
        for row in rows
    ]  # fmt: skip
    return table([*header, *[f"vs {other}" for other in BASELINES]], lines, words=4)


if __name__ == "__main__":
    main()
