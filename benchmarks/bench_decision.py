"""How many decisions a second, and how long does one take, at 1, 8 and 64 callers?

    scripts/bench decision [--seconds 0.3] [--rounds 5] [--uvloop] [--json PATH]

One process, one event loop, a Redis server of its own on loopback. Every decision is allowed, for
one of 1,000 accounts drawn at random with a fixed seed, of a feature with one quota or with two.
Rows of the same store take turns, round after round, and the medians of the rounds are shown:

- `tieredlimit` is `limiter.take`, whole: tier, cell, keys, store, decision.
- `limits.aio` hits a fixed window, its cheapest strategy; two quotas are two hits, one after the
  other, since it has no call for both. In memory it looks at every key it holds once in each turn
  of the loop, between decisions: that shows in the throughput and not in the latency.
- `throttled-py`, `moderato` and `traffik` likewise: a fixed window, and two calls for two quotas.
- `asgi-ratelimit` asks its backend as its middleware does; two quotas are one rule.
- `no-revisions` is `tieredlimit` with calls that do not compare whether the revision under which
  their decisions were prepared is still in force: what live control costs.
- `EVALSHA` is redis-py alone, sending the bytes that our backend sends for one decision, made
  beforehand, on a connection per caller: one round trip without a limiter around it.
- `redis-benchmark` is the same script with one decision a call, sent by Redis' own load generator,
  `-c 50 -P 64 -r 10000`: 3,200 calls under way, no Python. It stands beside the 64 callers. It
  cannot send binary arguments: a line before the script holds them, and text of their length is
  sent.
- `nothing` decides nothing: the callers and the event loop alone, to be taken off the memory rows.

Peers that are not installed are left out, and named.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from shutil import which
from typing import Any

import redis
from redis.asyncio import Redis

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
from benchmarks.peers import Operation, Operations, peers
from benchmarks.policies import (
    FEATURES,
    POLICY,
    SCRIPT,
    SEED,
    TIMEOUT,
    charges_of,
    commands_for,
    drawn,
    script_calls,
)
from benchmarks.stores import redis_server
from tests.servers import RedisServer, find_server
from tieredlimit import Account, Limiter
from tieredlimit.backends import MemoryBackend, RedisBackend

ACCOUNTS = 1_000
CALLERS = (1, 8, 64)
BASELINES = ("limits.aio", "EVALSHA")
OFF = "no-revisions"
FLOORS = ("EVALSHA", "redis-benchmark", "nothing", OFF)


@dataclass(frozen=True, slots=True)
class Cell:
    """Name a line of the table."""

    store: str
    quotas: int
    callers: int
    target: str


Runs = Mapping[Cell, Sequence[Run]]


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("decision", __doc__, seconds=0.3, rounds=5)
    with redis_server() as server:
        result, runs = run(measure(server, options.seconds, options.rounds), uvloop=options.uvloop)
    finish(
        options, "decision", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    server: RedisServer, seconds: float, rounds: int
) -> tuple[dict[str, Any], dict[Cell, list[Run]]]:
    """Run every cell, warmed up, in rounds; return the result, and the rounds of every cell."""
    before = environment()
    accounts = drawn(ACCOUNTS, 10 * ACCOUNTS)
    contenders: dict[Cell, Callable[[], Awaitable[Run]]] = {}
    async with _operations(server.url, accounts) as (operations, left_out):
        for (store, quotas), targets in operations.items():
            for callers in CALLERS:
                for target, operation in targets.items():
                    contenders[Cell(store, quotas, callers, target)] = partial(
                        drive, operation, accounts, callers, seconds, waits=store == "redis"
                    )
        try:
            for quotas, floor in (await _redis_benchmarks(server, accounts, seconds)).items():
                contenders[Cell("redis", quotas, CALLERS[-1], "redis-benchmark")] = floor
        except RuntimeError as exc:
            left_out["redis-benchmark"] = str(exc)
        runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "accounts": ACCOUNTS, "seed": SEED},
        "left_out": left_out,
        "rows": _rows(runs),
    }
    return result, runs


@asynccontextmanager
async def _operations(
    url: str, accounts: Sequence[Account]
) -> AsyncIterator[tuple[Operations, dict[str, str]]]:
    """Open everything that is compared; yield the operations by store and quotas, then target."""
    async with AsyncExitStack() as stack:
        memory = await stack.enter_async_context(Limiter(POLICY, MemoryBackend()))
        remote = await stack.enter_async_context(
            Limiter(POLICY, RedisBackend.from_url(url, timeout=TIMEOUT))
        )
        blind = await stack.enter_async_context(
            Limiter(POLICY, RedisBackend.from_url(url, timeout=TIMEOUT))
        )
        blind._comparing = None
        client = await stack.enter_async_context(Redis.from_url(url, protocol=2))
        others, left_out = await peers(stack, url)
        operations: Operations = {}
        for quotas, feature in FEATURES.items():
            operations["memory", quotas] = {
                "tieredlimit": _take(memory, feature),
                **others["memory", quotas],
                "nothing": _nothing,
            }
        for quotas, feature in FEATURES.items():
            operations["redis", quotas] = {
                "tieredlimit": _take(remote, feature),
                OFF: _take(blind, feature),
                **others["redis", quotas],
                "EVALSHA": await _evalsha(client, feature, accounts),
            }
        yield operations, left_out


def _take(limiter: Limiter, feature: str) -> Operation:
    take = limiter.take

    async def operation(account: Account) -> bool:
        # An outage answer may allow as well, and would be measured as a decision.
        return (await take(account, feature)).reason == "allowed"

    return operation


async def _evalsha(client: Redis, feature: str, accounts: Sequence[Account]) -> Operation:
    await client.script_load(SCRIPT)
    known = {account.id: account for account in accounts}
    asked = await charges_of(POLICY, list(known.values()), feature)
    commands: dict[str, Any] = dict(zip(known, commands_for(asked), strict=True))
    execute: Any = client.execute_command

    async def operation(account: Account) -> bool:
        reply = await execute(*commands[account.id])
        allowed: bool = reply[1] == 1
        return allowed

    return operation


async def _nothing(account: Account) -> bool:  # noqa: ARG001 -- an operation
    return True


async def _redis_benchmarks(
    server: RedisServer, accounts: Sequence[Account], seconds: float
) -> dict[int, Callable[[], Awaitable[Run]]]:
    """Return Redis' own load generator, by number of quotas.

    Raises:
        RuntimeError: There is none here that can do it.
    """
    beside = find_server().parent
    binary = which("redis-benchmark") or which("redis-benchmark", path=str(beside))
    if binary is None:
        raise RuntimeError("none on PATH, none beside the server")
    floors: dict[int, Callable[[], Awaitable[Run]]] = {}
    for quotas, feature in FEATURES.items():
        [command] = commands_for(await charges_of(POLICY, accounts[:1], feature))
        key = next(i for i, word in enumerate(command) if word.endswith(accounts[0].id.encode()))
        command[key] = command[key].replace(accounts[0].id.encode(), b"__rand_int__")
        command = _without_binary(server, command)
        floors[quotas] = partial(
            asyncio.to_thread, _redis_benchmark, binary, server, command, seconds
        )
    return floors


def _without_binary(server: RedisServer, command: Sequence[bytes]) -> list[bytes]:
    """Return a command of the same length and the same script, which holds its own arguments."""
    evalsha, _, count, *words = command
    keys, given = words[: int(count)], words[int(count) :]
    held = ["".join(f"\\{byte:03d}" for byte in word) for word in given]
    line = "local ARGV = {" + ", ".join(f'"{text}"' for text in held) + "}\n"
    with redis.Redis(port=server.port) as client:
        sha: str = client.script_load(line + SCRIPT)
    return [evalsha, sha.encode(), count, *keys, *[b"x" * len(word) for word in given]]


def _redis_benchmark(
    binary: str, server: RedisServer, command: Sequence[bytes], seconds: float
) -> Run:
    # As many as take about as long as the other rows.
    requests = max(3_200, int(100_000 * seconds))
    before = script_calls(server)
    words: list[bytes | str] = [binary, "-p", str(server.port), "-c", "50", "-P", "64"]
    words += ["-r", "10000", "-n", str(requests), "--csv", *command]
    done = subprocess.run(words, capture_output=True, check=True)
    if script_calls(server) - before < requests:
        raise RuntimeError(f"redis-benchmark did not run the script: {done.stdout!r:.300}")
    # The name of the test, which is the binary command, then rps and avg, min, p50, p95, p99, max.
    per_second, _, _, p50_ms, _, p99_ms, _ = (
        float(number) for number in done.stdout.strip().strip(b'"').split(b'","')[-7:]
    )
    return Run(per_second, p50_ms * 1e3, p99_ms * 1e3)


def _rows(runs: Runs) -> list[dict[str, Any]]:
    """Return per cell its medians, how many times another's decisions it makes, and its rounds."""
    rows: list[dict[str, Any]] = []
    for cell, measured in runs.items():
        vs = {
            other: round(found, 2)
            for other in BASELINES
            if other != cell.target and cell.target != "nothing"
            if (found := _times(runs, cell, other)) is not None
        }
        rounds = [asdict(one) for one in measured]
        rows.append({**asdict(cell), **asdict(middle(measured)), "vs": vs, "rounds": rounds})
    return rows


def _times(
    runs: Runs,
    cell: Cell,
    other: str,
    what: Callable[[Run], float] = lambda one: one.per_second,
) -> float | None:
    """Return how many times another's number a cell's is, None where the other was left out."""
    others = runs.get(replace(cell, target=other))
    if others is None or cell not in runs:
        return None
    return ratio([what(one) for one in runs[cell]], [what(one) for one in others])


def _targets(runs: Runs) -> list[Target]:
    def against_fastest(store: str, callers: int) -> tuple[float | None, str]:
        own = Cell(store, 2, callers, "tieredlimit")
        beaten = {
            cell.target: times
            for cell in runs
            if (cell.store, cell.quotas, cell.callers) == (store, 2, callers)
            and cell.target not in (*FLOORS, "tieredlimit", "limits.aio")
            and (times := _times(runs, own, cell.target)) is not None
        }
        if not beaten:
            return None, "no other peer is installed"
        fastest = min([*beaten, "limits.aio"], key=lambda name: _times(runs, own, name) or 0)
        return _times(runs, own, fastest), f"which is {fastest}"

    redis, memory = Cell("redis", 2, 64, "tieredlimit"), Cell("memory", 2, 1, "tieredlimit")
    floor = _times(runs, replace(redis, quotas=1), "redis-benchmark")
    peer, who = against_fastest("redis", 64)
    memory_peer, memory_who = against_fastest("memory", 1)
    return [
        Target("Redis, 64 callers, 2 quotas: limits.aio", 15, False,
               _times(runs, redis, "limits.aio")),
        Target("Redis, 64 callers, 2 quotas: fastest peer", 8, False, peer, note=who),
        Target("Redis, 64 callers, 1 quota: redis-benchmark", 0.7, False, floor),
        Target("Redis, 64 callers, 2 quotas: without revisions", 0.9, False,
               _times(runs, redis, OFF)),
        Target("Redis, 1 caller, p50: EVALSHA (1 quota)", 1.15, True,
               _times(runs, Cell("redis", 1, 1, "tieredlimit"), "EVALSHA", lambda r: r.p50_us)),
        Target("Redis, 1 caller, p50: EVALSHA (2 quotas)", 1.15, True,
               _times(runs, Cell("redis", 2, 1, "tieredlimit"), "EVALSHA", lambda r: r.p50_us)),
        Target("memory, 1 caller, 2 quotas: limits.aio", 3, False,
               _times(runs, memory, "limits.aio")),
        Target("memory, 1 caller, 2 quotas, p50: limits.aio", 3, False,
               _inverse(_times(runs, memory, "limits.aio", lambda r: r.p50_us)),
               note="without what limits.aio does between decisions"),
        Target("memory, 1 caller, 2 quotas: fastest peer", 2, False, memory_peer, note=memory_who),
    ]  # fmt: skip


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def _charts(runs: Runs) -> list[Chart]:
    charts = []
    for store, quotas, callers in (("redis", 2, 64), ("redis", 1, 64), ("memory", 2, 1)):
        bars = []
        for cell, measured in runs.items():
            if (cell.store, cell.quotas, cell.callers) != (store, quotas, callers):
                continue
            kind = "floor" if cell.target in FLOORS else "peer"
            kind = "ours" if cell.target == "tieredlimit" else kind
            if cell.target != "nothing":
                bars.append(Bar(cell.target, middle(measured).per_second, kind))
        aims = [("15x limits.aio", 15.0, "limits.aio")] if store == "redis" else []
        aims = [("3x limits.aio", 3.0, "limits.aio")] if store == "memory" else aims
        aims = [("0.7 of redis-benchmark", 0.7, "redis-benchmark")] if quotas == 1 else aims
        lines = [
            (label, times * middle(runs[cell]).per_second)
            for label, times, name in aims
            if (cell := Cell(store, quotas, callers, name)) in runs
        ]
        plural = "" if quotas == 1 else "s"
        who = "1 caller" if callers == 1 else f"{callers} callers"
        title = f"Decisions a second: {store}, {who}, {quotas} quota{plural}"
        charts.append(Chart(title, "decisions/s, more is better", bars, lines))
    return charts


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
