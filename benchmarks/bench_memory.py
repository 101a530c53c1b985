"""How many bytes does a bucket take, in this process and in Redis?

    scripts/bench memory [--accounts 100000] [--json PATH]

In memory: what Python holds after one take of each account, by tracemalloc, the key's text
included. In Redis: `MEMORY USAGE` of a key as our backend writes it, with its expiry, beside
`SET key value PX` of the same key and a value of 16 digits, median of 100 keys; and the growth of
`used_memory` over all accounts, which has the tables around the keys in it as well.

Nothing here depends on time: it is measured once.
"""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Sequence
from itertools import islice
from statistics import median
from typing import Any

import redis as redis_py

from benchmarks.measure import Bar, Chart, Target, arguments, environment, finish, run, table
from benchmarks.policies import KEPT, POLICY, TIMEOUT, account
from benchmarks.stores import redis_server
from tests.servers import RedisServer
from tieredlimit import Limiter
from tieredlimit.backends import MemoryBackend, RedisBackend

PLAIN = "SET key value PX"
_SAMPLE = 100
_TOGETHER = 256
_LIFE_MS = 86_400_000


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("memory", __doc__, accounts=100_000)
    with redis_server() as server:
        result = run(measure(server, options.accounts), uvloop=options.uvloop)
    rows = result["rows"]
    finish(
        options, "memory", __doc__, result, _table(rows),
        targets=_targets(rows), charts=_charts(rows),
    )  # fmt: skip


async def measure(server: RedisServer, accounts: int) -> dict[str, Any]:
    """Fill both stores and return what they take."""
    rows = [await _in_process(quotas, feature, accounts) for quotas, feature in KEPT.items()]
    with redis_py.Redis(port=server.port) as client:
        prefix = ""
        for quotas, feature in KEPT.items():
            client.flushall()
            before = client.info("memory")["used_memory"]
            await _take_all(server.url, feature, accounts)
            grown = client.info("memory")["used_memory"] - before
            if len(list(client.scan_iter(match="*account*", count=1_000))) != accounts:
                raise RuntimeError("not every account has its key")
            rows.append(_in_redis(client, "tieredlimit", quotas, grown / accounts))
            prefix = _a_key(client).decode()[: -len(account(0).id)]
        client.flushall()
        before = client.info("memory")["used_memory"]
        pipeline = client.pipeline(transaction=False)
        for number in range(accounts):
            key = prefix + account(number).id
            pipeline.set(key, 1_700_000_000_000_000 + number, px=_LIFE_MS)
            if number % 1_000 == 999 or number == accounts - 1:
                pipeline.execute()
        grown = client.info("memory")["used_memory"] - before
        rows.append(_in_redis(client, PLAIN, 1, grown / accounts))
    return {"environment": environment(), "settings": {"accounts": accounts}, "rows": rows}


async def _in_process(quotas: int, feature: str, accounts: int) -> dict[str, Any]:
    known = [account(number) for number in range(accounts)]
    backend = MemoryBackend(max_keys=2 * accounts)
    limiter = Limiter(POLICY, backend)
    # What the first decision makes is not a bucket's.
    await limiter.take(account(accounts), feature)
    gc.collect()
    tracemalloc.start()
    try:
        for one in known:
            await limiter.take(one, feature)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    if len(backend) != accounts + 1:
        raise RuntimeError(f"{len(backend)} of {accounts + 1} keys are in memory")
    per_key = held / accounts
    return _row("memory", "tieredlimit", quotas, per_key, per_key)


async def _take_all(url: str, feature: str, accounts: int) -> None:
    numbers = iter(range(accounts))
    async with Limiter(POLICY, RedisBackend.from_url(url, timeout=TIMEOUT)) as limiter:
        while batch := [account(number) for number in islice(numbers, _TOGETHER)]:
            taken = await asyncio.gather(*[limiter.take(one, feature) for one in batch])
            if any(decision.reason != "allowed" for decision in taken):
                raise RuntimeError("a take was not allowed")


def _in_redis(client: redis_py.Redis, target: str, quotas: int, grown: float) -> dict[str, Any]:
    keys = list(islice(client.scan_iter(match="*account*", count=1_000), _SAMPLE))
    usage = median(client.memory_usage(key) or 0 for key in keys)
    return _row("redis", target, quotas, usage, grown)


def _a_key(client: redis_py.Redis) -> bytes:
    key: bytes = next(client.scan_iter(match="*account*"))
    return key


def _row(store: str, target: str, quotas: int, per_key: float, grown: float) -> dict[str, Any]:
    return {
        "store": store,
        "target": target,
        "quotas": quotas,
        "bytes_per_key": per_key,
        "bytes_per_bucket": per_key / quotas,
        "grown_per_bucket": grown / quotas,
    }


def _find(rows: Sequence[dict[str, Any]], store: str, target: str, quotas: int) -> dict[str, Any]:
    wanted = (store, target, quotas)
    return next(r for r in rows if (r["store"], r["target"], r["quotas"]) == wanted)


def _targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    plain = _find(rows, "redis", PLAIN, 1)
    two, one = (_find(rows, "redis", "tieredlimit", quotas) for quotas in (2, 1))
    whole = two["bytes_per_key"] / plain["bytes_per_key"]
    alone = one["bytes_per_key"] / plain["bytes_per_key"]
    targets = [
        Target("Redis memory, cell of 2 quotas, per quota: plain SET PX", 1.1, True,
               two["bytes_per_bucket"] / plain["bytes_per_bucket"],
               note=f"the whole cell {whole:.2f}x"),
        Target("Redis memory, cell of 1 quota: plain SET PX", 1.1, True, alone),
    ]  # fmt: skip
    for quotas in KEPT:
        held = _find(rows, "memory", "tieredlimit", quotas)["bytes_per_bucket"]
        question = f"memory backend, per bucket, cell of {quotas}"
        targets.append(Target(question, 250, True, held, "bytes"))
    return targets


def _charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    bars = [
        Bar(
            f"{row['store']}: {PLAIN}" if row["target"] == PLAIN
            else f"{row['store']}, cell of {row['quotas']}",
            row["bytes_per_bucket"],
            "floor" if row["target"] == PLAIN else "ours",
        )
        for row in rows
    ]  # fmt: skip
    return [Chart("Bytes per bucket", "bytes, less is better", bars, [("250, in memory", 250)])]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["store"], row["target"], str(row["quotas"]), f"{row['bytes_per_key']:.0f}",
            f"{row['bytes_per_bucket']:.0f}", f"{row['grown_per_bucket']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["store", "target", "quotas", "bytes a key", "a bucket", "grown, a bucket"]
    return table(header, lines, words=2)


if __name__ == "__main__":
    main()
