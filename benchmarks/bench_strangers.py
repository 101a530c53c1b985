"""What do ten million invented ids cost, and do they crowd anybody out?

    scripts/bench strangers [--ids 10000000] [--in-redis 1000000] [--json PATH]

In memory, each in a process of its own and within the backend's own bounds: ids of strangers (the
last tier), ids of accounts, and a tenth as many strangers whose buckets are full again after a
millisecond. In Redis: ids of strangers, 256 at once. Every id is new and takes once.

Before, a thousand accounts and a thousand strangers use up what they have for a day. After, each
of them asks again: whoever is let in was forgotten. Memory is what the process (RSS) or the server
(`used_memory`) has grown by; latency is that of the first and of the last 100,000 takes. Where
memory is full, strangers get the outage answer, another way through the code: the first 100,000 of
those are what the last are to be held against.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import redis as redis_py

from benchmarks.measure import (
    Bar,
    Chart,
    Target,
    arguments,
    environment,
    finish,
    percentile,
    run,
    table,
)
from benchmarks.policies import TIMEOUT
from benchmarks.stores import redis_server
from tests.servers import RedisServer
from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend, RedisBackend

POLICY: dict[str, Any] = {
    "order": ["pro", "everyone"],
    "features": {"kept": {"outage": "allow"}, "refilling": {"outage": "allow"}},
    "defaults": {"quotas": {"kept": "2/day", "refilling": {"rate": "1000/second"}}},
    "tiers": {"pro": {"when": {"plan": "pro"}}, "everyone": {}},
}
_KNOWN = 1_000
_ENDS = 100_000
_TOGETHER = 256
_ODD = 0x9E3779B97F4A7C15


class Latencies:
    """Keep those of the first and the last takes, in room made beforehand: none grows a process."""

    def __init__(self, count: int) -> None:
        self._from = count - _ENDS
        self._rooms = [array("d", [0.0]) * _ENDS for _ in range(3)]
        self._used = [0, 0, 0]

    def note(self, number: int, took: float, *, refused: bool) -> None:
        """Keep what take `number` took, if it is one of those."""
        for i, wanted in enumerate((number < _ENDS, number >= self._from, refused)):
            if wanted and self._used[i] < _ENDS:
                self._rooms[i][self._used[i]] = took
                self._used[i] += 1

    def sorted(self) -> list[list[float]]:
        """Return the first ones, the last ones and the first that were refused, shortest first."""
        return [sorted(room[:used]) for room, used in zip(self._rooms, self._used, strict=True)]


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("strangers", __doc__, **{"ids": 10_000_000, "in-redis": 1_000_000})
    with redis_server() as server:
        rows = [
            _apart(in_memory, who, feature, count, options.uvloop)
            for who, feature, count in (
                ("strangers", "kept", options.ids),
                ("accounts", "kept", options.ids),
                ("strangers", "refilling", max(1, options.ids // 10)),
            )
        ]
        rows.append(run(in_redis(server, options.in_redis), uvloop=options.uvloop))
        told = run(_environment(), uvloop=options.uvloop)
    settings = {"ids": options.ids, "in_redis": options.in_redis}
    result = {"environment": told, "settings": settings, "rows": rows}
    finish(
        options, "strangers", __doc__, result, _table(rows),
        targets=_targets(rows), charts=_charts(rows),
    )  # fmt: skip


def invented(count: int, who: str) -> Iterator[Account]:
    """Yield so many accounts, no two with the same id."""
    pro = who == "accounts"
    for number in range(count):
        # An odd factor: every number has its own, and none looks like the one before.
        id_ = f"{number * _ODD % 2**64:016x}"
        yield Account(id_, plan="pro") if pro else Account(id_, anonymous=True)


async def in_memory(who: str, feature: str, count: int) -> dict[str, Any]:
    """Flood memory, and say what it cost."""
    # One line a second says that there is no room.
    logging.getLogger("tieredlimit").setLevel(logging.CRITICAL)
    backend = MemoryBackend()
    limiter = Limiter(POLICY, backend)
    clock = time.perf_counter
    reasons: Counter[str] = Counter()
    latencies = Latencies(count)
    await _use_up(limiter)
    gc.collect()
    before = _rss()
    began = clock()
    for number, account in enumerate(invented(count, who)):
        started = clock()
        decision = await limiter.take(account, feature)
        took = clock() - started
        reasons[decision.reason] += 1
        latencies.note(number, took, refused=decision.reason == "outage")
    elapsed = clock() - began
    grown = _rss() - before
    held = len(backend) - 2 * _KNOWN
    named = f"{who}, {feature}"
    let_in = await _let_in(limiter)
    return _row("memory", named, count, elapsed, grown, held, latencies, reasons, let_in)


async def in_redis(server: RedisServer, count: int) -> dict[str, Any]:
    """Flood Redis, and say what it cost."""
    clock = time.perf_counter
    reasons: Counter[str] = Counter()
    latencies = Latencies(count)
    with redis_py.Redis(port=server.port) as client:
        async with Limiter(POLICY, RedisBackend.from_url(server.url, timeout=TIMEOUT)) as limiter:

            async def take(account: Account, number: int) -> None:
                started = clock()
                decision = await limiter.take(account, "kept")
                took = clock() - started
                latencies.note(number, took, refused=decision.reason == "outage")
                reasons[decision.reason] += 1

            await _use_up(limiter)
            before, keys = client.info("memory")["used_memory"], client.dbsize()
            began = clock()
            accounts = enumerate(invented(count, "strangers"))
            while batch := list(islice(accounts, _TOGETHER)):
                await asyncio.gather(*[take(one, number) for number, one in batch])
            elapsed = clock() - began
            grown = client.info("memory")["used_memory"] - before
            held = client.dbsize() - keys
            let_in = await _let_in(limiter)
    return _row("redis", "strangers, kept", count, elapsed, grown, held, latencies, reasons, let_in)


def _apart(
    measured: Callable[..., Coroutine[Any, Any, dict[str, Any]]],
    who: str,
    feature: str,
    count: int,
    uvloop: bool,
) -> dict[str, Any]:
    """Measure in a process that has held nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run, measured, who, feature, count, uvloop).result()


def _run(
    measured: Callable[..., Coroutine[Any, Any, dict[str, Any]]],
    who: str,
    feature: str,
    count: int,
    uvloop: bool,
) -> dict[str, Any]:
    return run(measured(who, feature, count), uvloop=uvloop)


def _known() -> list[Account]:
    return [
        account
        for number in range(_KNOWN)
        for account in (
            Account(f"known-{number}", plan="pro"),
            Account(f"198.51.{number // 250}.{number % 250}", anonymous=True),
        )
    ]


async def _use_up(limiter: Limiter) -> None:
    for account in _known():
        for _ in range(2):
            decision = await limiter.take(account, "kept")
            if decision.reason != "allowed":
                raise RuntimeError(f"{account.id} was not let in at first: {decision.reason}")


async def _let_in(limiter: Limiter) -> int:
    """Return how many of those who had used up what they have may take once more."""
    decisions = [await limiter.take(account, "kept") for account in _known()]
    return sum(decision.reason != "quota" for decision in decisions)


async def _environment() -> dict[str, str]:
    return environment()


def _rss() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # Elsewhere the most that it ever was must do: it only grows here.
    unit = 1 if sys.platform == "darwin" else 1_024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _row(
    store: str,
    what: str,
    count: int,
    elapsed: float,
    grown: int,
    held: int,
    latencies: Latencies,
    reasons: Counter[str],
    let_in: int,
) -> dict[str, Any]:
    first, last, refused = latencies.sorted()
    return {
        "store": store,
        "what": what,
        "ids": count,
        "seconds": elapsed,
        "grown_bytes": grown,
        "keys": held,
        "first_p50_us": percentile(first, 50) * 1e6,
        "last_p50_us": percentile(last, 50) * 1e6,
        "refused_p50_us": percentile(refused, 50) * 1e6 if refused else None,
        "first_p99_us": percentile(first, 99) * 1e6,
        "last_p99_us": percentile(last, 99) * 1e6,
        "reasons": dict(reasons),
        "forgotten": let_in,
        "of_known": 2 * _KNOWN,
    }


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    forgotten = sum(row["forgotten"] for row in rows)
    targets = [Target("known ids forgotten in a flood", 0, True, forgotten, "")]
    for row in rows:
        named = f"{row['store']}: {row['what']}"
        if "kept" in row["what"]:
            grown = row["grown_bytes"] / row["keys"]
            targets.append(Target(f"{named}, growth a key held", 250, True, grown, "bytes"))
        full = row["reasons"].get("outage", 0) > row["ids"] // 2
        early = row["refused_p50_us"] if full else row["first_p50_us"]
        question = f"{named}, last {_ENDS:,} takes: the first{' refused' if full else ''}"
        targets.append(Target(question, 1.25, True, row["last_p50_us"] / early))
    return targets


def _charts(rows: list[dict[str, Any]]) -> list[Chart]:
    bars = [
        Bar(f"{row['store']}: {row['what']}, {end}", row[f"{end}_p50_us"] / most, "ours")
        for row in rows
        for most in (max(row["first_p50_us"], row["last_p50_us"]),)
        for end in ("first", "last")
    ]
    title = f"Median of the first and the last {_ENDS:,} takes of invented ids"
    return [Chart(title, "share of the longer one", bars)]


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        [
            row["store"], row["what"], f"{row['ids']:,}", f"{row['keys']:,}",
            f"{row['grown_bytes'] / 2**20:,.0f}",
            f"{row['grown_bytes'] / max(1, row['keys']):,.0f}",
            f"{row['first_p50_us']:.1f}",
            "-" if row["refused_p50_us"] is None else f"{row['refused_p50_us']:.1f}",
            f"{row['last_p50_us']:.1f}",
            f"{row['first_p99_us']:.1f}", f"{row['last_p99_us']:.1f}",
            f"{row['reasons'].get('allowed', 0):,}", f"{row['reasons'].get('outage', 0):,}",
            f"{row['forgotten']} of {row['of_known']:,}",
        ]
        for row in rows
    ]  # fmt: skip
    header = [
        "store", "whose ids", "ids", "keys", "MiB", "bytes a key", "p50 first", "refused", "last",
        "p99 first", "last", "allowed", "outage", "forgotten",
    ]  # fmt: skip
    return table(header, lines, words=2)


if __name__ == "__main__":
    main()
