"""How many decisions a second does a Redis Cluster of three primaries answer, spread over them?

    scripts/bench cluster [--seconds 0.3] [--rounds 5] [--uvloop] [--json PATH]

One process, one event loop; a Redis server, and a cluster of three primaries with a replica each,
of their own on loopback. Every decision is allowed, for one of 1,000 accounts drawn at random with
a fixed seed, of a feature with one quota or with two. All rows take turns, round after round, and
the medians of the rounds are shown:

- `tieredlimit` on the `server` is `limiter.take` over `RedisBackend`; on the `cluster` over
  `ClusterBackend`, with its 64 shards.
- `1 shard` is the same cluster with `Limiter(shards=1)`: all load on one primary.
- `limits.aio`, `throttled-py` and `traffik` are on the same cluster, each with redis-py's
  asynchronous client, a fixed window, and two calls for two quotas, one after the other.

`a call` is how many decisions shared a call of the script; on a cluster, only those of one shard
can. `calls` and `decisions` are the percent of them that each primary answered, by its own count
(`INFO commandstats`): a decision of ours writes once, one of a peer once for each quota.

The client and all servers share the cores: six processes of the cluster, and one of the server,
which has no replica. On two cores that says what a cluster costs there and how the load spreads,
not what three machines answer.

Peers that are not installed, or know no cluster, are left out, and named.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

from limits import RateLimitItemPerDay, RateLimitItemPerMinute
from limits.aio.storage import RedisClusterStorage
from limits.aio.strategies import FixedWindowRateLimiter

from benchmarks.measure import (
    Bar,
    Chart,
    Run,
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
from benchmarks.peers import LIMIT, Operation, notes
from benchmarks.policies import FEATURES, POLICY, SEED, TIMEOUT, drawn, script_calls
from benchmarks.stores import redis_server
from tests.clusters import RedisCluster
from tests.servers import RedisServer
from tieredlimit import Account, Limiter
from tieredlimit.backends import ClusterBackend, RedisBackend

ACCOUNTS = 1_000
CALLERS = (1, 64, 256)
OURS = "tieredlimit"
ONE_SHARD = "1 shard"
PEER = "limits.aio"
# What charges a bucket, ours and the peers'.
_WRITES = ("set", "incr", "incrby")
# Beyond redis-py's own maximum a request of 256 callers fails instead of waiting.
_MOST_CONNECTIONS = 1_000


@dataclass(frozen=True, slots=True)
class Cell:
    """Name a line of the table."""

    store: str
    quotas: int
    callers: int
    target: str


@dataclass(frozen=True, slots=True)
class Asked:
    """Hold one round, and by server how many script calls it answered and buckets it charged."""

    run: Run
    calls: Sequence[int]
    writes: Sequence[int]


Runs = Mapping[Cell, Sequence[Asked]]


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("cluster", __doc__, seconds=0.3, rounds=5)
    with redis_server() as server, RedisCluster() as cluster:
        result, runs = run(
            measure(server, cluster, options.seconds, options.rounds), uvloop=options.uvloop
        )
    finish(
        options, "cluster", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    server: RedisServer, cluster: RedisCluster, seconds: float, rounds: int
) -> tuple[dict[str, Any], dict[Cell, list[Asked]]]:
    """Run every cell, warmed up, in rounds; return the result, and the rounds of every cell."""
    before = environment()
    accounts = drawn(ACCOUNTS, 10 * ACCOUNTS)
    servers = {"server": [server], "cluster": cluster.masters}
    contenders: dict[Cell, Callable[[], Awaitable[Asked]]] = {}
    async with _operations(server, cluster) as (operations, left_out):
        for quotas in FEATURES:
            for callers in CALLERS:
                for (store, target), by_quotas in operations.items():
                    contenders[Cell(store, quotas, callers, target)] = partial(
                        _ask, servers[store], by_quotas[quotas], accounts, callers, seconds
                    )
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
    server: RedisServer, cluster: RedisCluster
) -> AsyncIterator[tuple[dict[tuple[str, str], dict[int, Operation]], dict[str, str]]]:
    """Open everything that is compared; yield the operations by store and target, then quotas."""
    async with AsyncExitStack() as stack:
        one = Limiter(POLICY, RedisBackend.from_url(server.url, timeout=TIMEOUT))
        spread = Limiter(POLICY, ClusterBackend(cluster.url, timeout=TIMEOUT))
        # Of its own name: the shards of a namespace cannot differ.
        heaped = Limiter(
            POLICY, ClusterBackend(cluster.url, timeout=TIMEOUT), namespace="heaped", shards=1
        )
        operations: dict[tuple[str, str], dict[int, Operation]] = {}
        for named, limiter in {
            ("server", OURS): one,
            ("cluster", OURS): spread,
            ("cluster", ONE_SHARD): heaped,
        }.items():
            await stack.enter_async_context(limiter)
            operations[named] = {
                quotas: _take(limiter, feature) for quotas, feature in FEATURES.items()
            }
        others, left_out = await _peers(stack, cluster)
        for name, by_quotas in others.items():
            operations["cluster", name] = by_quotas
        yield operations, left_out


def _take(limiter: Limiter, feature: str) -> Operation:
    take = limiter.take

    async def operation(account: Account) -> bool:
        # An outage answer may allow as well, and would be measured as a decision.
        return (await take(account, feature)).reason == "allowed"

    return operation


async def _ask(
    servers: Sequence[RedisServer],
    operation: Operation,
    accounts: Sequence[Account],
    callers: int,
    seconds: float,
) -> Asked:
    calls, writes = _answered(servers)
    measured = await drive(operation, accounts, callers, seconds, waits=True)
    calls_after, writes_after = _answered(servers)
    if sum(writes_after) == sum(writes):
        raise RuntimeError("no server has charged a bucket")
    return Asked(measured, _minus(calls_after, calls), _minus(writes_after, writes))


def _answered(servers: Sequence[RedisServer]) -> tuple[list[int], list[int]]:
    """Return by server how many script calls it has answered, and buckets charged."""
    writes = []
    for server in servers:
        stats: Any = server.command("INFO", "commandstats")
        writes.append(sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in _WRITES))
    return [script_calls(server) for server in servers], writes


def _minus(after: Sequence[int], before: Sequence[int]) -> list[int]:
    return [now - then for now, then in zip(after, before, strict=True)]


async def _peers(
    stack: AsyncExitStack, cluster: RedisCluster
) -> tuple[dict[str, dict[int, Operation]], dict[str, str]]:
    """Open the peers on the cluster; return what they do, and who was left out and why."""
    made: dict[str, dict[int, Operation]] = {}
    left_out = {
        "asgi-ratelimit": "its keys of two quotas share no hash tag, so a cluster refuses them",
        "moderato": "takes no URL of a cluster",
        "fastapi-limiter": "as in `scripts/bench decision`",
        **notes(),
    }
    for name, opens in {PEER: _limits, "throttled-py": _throttled, "traffik": _traffik}.items():
        try:
            operations = await opens(stack, cluster)
            for operation in operations.values():
                if not await operation(Account("warm-up")):
                    raise RuntimeError("denied its first request")
        except Exception as exc:  # noqa: BLE001 -- a peer that does not run is named, not fatal
            left_out.setdefault(name, f"{type(exc).__name__}: {exc}"[:200])
        else:
            made[name] = operations
    return made, left_out


async def _limits(stack: AsyncExitStack, cluster: RedisCluster) -> dict[int, Operation]:
    storage = RedisClusterStorage(f"async+{cluster.url}", implementation="redispy")
    client: Any = storage.bridge
    stack.push_async_callback(client.storage.aclose)
    hit = FixedWindowRateLimiter(storage).hit

    def hits(quotas: int) -> Operation:
        items = (RateLimitItemPerMinute(LIMIT), RateLimitItemPerDay(LIMIT))[:quotas]

        async def operation(account: Account) -> bool:
            for item in items:
                if not await hit(item, account.id):
                    return False
            return True

        return operation

    return {quotas: hits(quotas) for quotas in FEATURES}


async def _throttled(stack: AsyncExitStack, cluster: RedisCluster) -> dict[int, Operation]:
    throttled: Any = import_module("throttled.asyncio")
    store = throttled.RedisStore(
        server=cluster.url, options={"REDIS_CLIENT_KWARGS": {"max_connections": _MOST_CONNECTIONS}}
    )
    stack.push_async_callback(store._backend.get_client().aclose)

    def limit(quotas: int) -> Operation:
        limits = [
            throttled.Throttled(
                using="fixed_window", quota=quota, store=store, key_prefix=prefix
            ).limit
            for quota, prefix in ((f"{LIMIT}/m", "minute"), (f"{LIMIT}/d", "day"))
        ][:quotas]

        async def operation(account: Account) -> bool:
            for limit in limits:
                if (await limit(account.id)).limited:
                    return False
            return True

        return operation

    return {quotas: limit(quotas) for quotas in FEATURES}


async def _traffik(stack: AsyncExitStack, cluster: RedisCluster) -> dict[int, Operation]:
    traffik: Any = import_module("traffik")
    from starlette.requests import Request

    # Persistent: what it does at its end to forget its keys fails on a cluster.
    backend = import_module("traffik.backends.redis").RedisBackend(
        [cluster.startup], namespace="traffik", persistent=True,
        cluster_kwargs={"max_connections": _MOST_CONNECTIONS},
    )  # fmt: skip
    await stack.enter_async_context(backend())

    async def identify(connection: Request) -> str:
        return str(connection.scope["account"])

    def hit(quotas: int) -> Operation:
        hits = [
            traffik.HTTPThrottle(
                f"{quotas}-{unit}", rate=f"{LIMIT}/{unit}", backend=backend,
                identifier=identify, cache_ids=False,
            ).hit
            for unit in ("minute", "day")
        ][:quotas]  # fmt: skip

        async def operation(account: Account) -> bool:
            scope = {
                "type": "http", "method": "POST", "path": "/v1/images", "headers": [],
                "state": {}, "account": account.id,
            }  # fmt: skip
            request = Request(scope)
            for hit in hits:
                await hit(request)  # raises where it is denied
            return True

        return operation

    return {quotas: hit(quotas) for quotas in FEATURES}


def _rows(runs: Runs) -> list[dict[str, Any]]:
    """Return per cell its medians, its ratios, what each server answered, and its rounds."""
    rows: list[dict[str, Any]] = []
    for cell, asked in runs.items():
        others = {
            "server": replace(cell, store="server", target=OURS),
            PEER: replace(cell, store="cluster", target=PEER),
        }
        vs = {
            name: round(_times(runs, cell, other), 2)
            for name, other in others.items()
            if other in runs and other != cell
        }
        calls, writes = _totals(asked)
        ours = cell.target in (OURS, ONE_SHARD)
        rows.append({
            **asdict(cell),
            **asdict(middle([one.run for one in asked])),
            "vs": vs,
            "decisions_a_call": sum(writes) / sum(calls) if ours else None,
            "calls": _shares(calls) if ours else None,
            "decisions": _shares(writes),
            "rounds": [asdict(one) for one in asked],
        })  # fmt: skip
    return rows


def _times(runs: Runs, cell: Cell, other: Cell) -> float:
    """Return how many times another's decisions a cell makes."""
    return ratio(
        [one.run.per_second for one in runs[cell]], [one.run.per_second for one in runs[other]]
    )


def _totals(asked: Sequence[Asked]) -> tuple[list[int], list[int]]:
    """Return calls and writes by server, over all rounds."""
    calls = [sum(counts) for counts in zip(*(one.calls for one in asked), strict=True)]
    writes = [sum(counts) for counts in zip(*(one.writes for one in asked), strict=True)]
    return calls, writes


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / sum(counts) for count in counts]


def _targets(runs: Runs) -> list[Target]:
    totals = [
        _totals(asked)
        for cell, asked in runs.items()
        if (cell.store, cell.target) == ("cluster", OURS)
    ]
    of_calls = min(min(_shares(calls)) for calls, _ in totals)
    of_decisions = min(min(_shares(writes)) for _, writes in totals)
    return [
        Target("cluster of 3, least share of a primary: all decisions", 0.25, False, of_decisions,
               note=f"{of_calls:.2f}x all calls"),
    ]  # fmt: skip


def _charts(runs: Runs) -> list[Chart]:
    charts = []
    for quotas, callers in ((2, 64), (1, 64), (2, 256)):
        bars = []
        for cell, asked in runs.items():
            if (cell.quotas, cell.callers) != (quotas, callers):
                continue
            kind = "floor" if cell.store == "server" or cell.target == ONE_SHARD else "peer"
            kind = "ours" if (cell.store, cell.target) == ("cluster", OURS) else kind
            label = "one server" if cell.store == "server" else cell.target
            bars.append(Bar(label, middle([one.run for one in asked]).per_second, kind))
        title = f"Redis Cluster: {counted(callers, 'caller')}, {counted(quotas, 'quota')}"
        charts.append(Chart(title, "decisions/s, more is better", bars))
    _, writes = _totals(runs[Cell("cluster", 2, 64, OURS)])
    shares = [
        Bar(f"primary {number}", 100 * share, "ours")
        for number, share in enumerate(_shares(writes), 1)
    ]
    title = "Redis Cluster: who answers, 64 callers, 2 quotas"
    charts.append(Chart(title, "percent of the decisions", shares, [("at least 25", 25.0)]))
    return charts


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["store"], str(row["quotas"]), str(row["callers"]), row["target"],
            f"{row['per_second']:,.0f}", f"{row['p50_us']:,.1f}", f"{row['p99_us']:,.1f}",
            *[f"{row['vs'][name]:.2f}x" if name in row["vs"] else "" for name in ("server", PEER)],
            f"{row['decisions_a_call']:.1f}" if row["decisions_a_call"] else "",
            _percents(row["calls"]), _percents(row["decisions"]),
        ]
        for row in rows
    ]  # fmt: skip
    header = ["store", "quotas", "callers", "target", "decisions/s", "p50 us", "p99 us"]
    header += ["vs server", f"vs {PEER}", "a call", "calls", "decisions"]
    return table(header, lines, words=4)


def _percents(shares: Sequence[float] | None) -> str:
    return "/".join(f"{100 * share:.0f}" for share in shares or ())


if __name__ == "__main__":
    main()
