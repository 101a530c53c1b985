"""Does a request take longer under a policy of thousands of routes and dozens of tiers?

    scripts/bench policy_size [--seconds 0.2] [--rounds 7] [--json PATH]

A `request` is a whole one, in process: our middleware, on the memory backend, before an application
that answers at once. `match` is what it needs of the policy, and nothing else: which feature its
method and path are, which tier its account is in, which cell that makes. Requests are drawn at
random over all routes and all tiers. Two routes in five have a parameter in the middle of the path;
ten routes make a feature.

`by plan` gives each tier plans of its own; `by tag`, only a tag tells tiers apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from statistics import median
from typing import Any

from starlette.requests import HTTPConnection

from benchmarks.bench_middleware import answer_at_once, receive_nothing, scope_of, send_nowhere
from benchmarks.measure import (
    Bar,
    Chart,
    Target,
    arguments,
    environment,
    finish,
    ratio,
    run,
    table,
    take_turns,
)
from benchmarks.policies import SEED
from tieredlimit import Account, Limiter, TieredLimitMiddleware

DRAWN = 10_000
_AT_ONCE = 500
_PER_FEATURE = 10


@dataclass(frozen=True, slots=True)
class Size:
    """Name a line of the table."""

    routes: int
    tiers: int
    told_apart: str = "by plan"
    what: str = "request"


SMALL = Size(5, 3)
LARGE = Size(5_000, 50)
_LADDER = (SMALL, Size(50, 3), Size(500, 3), Size(5_000, 3), Size(5, 10), Size(5, 50), LARGE,
           Size(5, 50, "by tag"))  # fmt: skip
SIZES = (*_LADDER, *(replace(size, what="match") for size in _LADDER))

Request = tuple[str, str, Account]
Work = Callable[[Iterable[Request]], Awaitable[None]]


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("policy_size", __doc__, seconds=0.2, rounds=7)
    result, runs = run(measure(options.seconds, options.rounds), uvloop=options.uvloop)
    finish(
        options, "policy_size", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(seconds: float, rounds: int) -> tuple[dict[str, Any], dict[Size, list[float]]]:
    """Let the policies take turns; return the result, and the rounds of every row."""
    before = environment()
    contenders: dict[Size, Callable[[], Awaitable[float]]] = {}
    for size in _LADDER:
        limiter, requests = Limiter(_policy(size)), _requests(size)
        contenders[size] = partial(_time, _whole(limiter), requests, seconds)
        contenders[replace(size, what="match")] = partial(_time, _match(limiter), requests, seconds)
    runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "seed": SEED},
        "rows": [
            {
                **asdict(size),
                "us": median(measured),
                "vs_smallest": ratio(measured, runs[replace(SMALL, what=size.what)]),
                "rounds": measured,
            }
            for size, measured in runs.items()
        ],
    }
    return result, runs


def _policy(size: Size) -> dict[str, Any]:
    features: dict[str, dict[str, list[str]]] = {}
    for number in range(size.routes):
        routes = features.setdefault(f"feature-{number // _PER_FEATURE}", {"routes": []})["routes"]
        routes.append(f"POST {_path(number, '{id}')}")
    names = [f"tier-{number}" for number in range(size.tiers)]
    by_tag = size.told_apart == "by tag"
    whens = [{"tags": [name]} if by_tag else {"plan": [name]} for name in names[:-1]]
    return {
        "order": names,
        "features": features,
        "defaults": {"quotas": dict.fromkeys(features, "60/minute")},
        "tiers": {
            **{name: {"when": when} for name, when in zip(names, whens, strict=False)},
            names[-1]: {},
        },
    }


def _path(number: int, parameter: str) -> str:
    middle = f"{parameter}/" if number % 5 in (1, 3) else ""
    return f"/v1/resource-{number}/{middle}actions"


def _requests(size: Size) -> list[Request]:
    chance = random.Random(SEED)
    requests = []
    for number in range(DRAWN):
        tier = f"tier-{chance.randrange(size.tiers)}"
        account = (
            Account(f"u{number}", tags=[tier])
            if size.told_apart == "by tag"
            else Account(f"u{number}", plan=tier)
        )
        path = _path(chance.randrange(size.routes), str(chance.randrange(1_000_000)))
        requests.append(("POST", path, account))
    return requests


def _whole(limiter: Limiter) -> Work:
    def identify(conn: HTTPConnection) -> Account:
        account: Account = conn.scope["account"]
        return account

    app = TieredLimitMiddleware(answer_at_once, limiter=limiter, identify=identify)

    async def work(requests: Iterable[Request]) -> None:
        for _, path, account in requests:
            scope = {**scope_of(path), "headers": [], "account": account}
            await app(scope, receive_nothing, send_nowhere)

    return work


def _match(limiter: Limiter) -> Work:
    match, find = limiter.match, limiter._table.find

    async def work(requests: Iterable[Request]) -> None:
        for method, path, account in requests:
            matched = match(method, path)
            if matched is None:
                raise RuntimeError(f"{path} matches no route")
            find(account, matched[0], 0)

    return work


async def _time(work: Work, requests: Sequence[Request], seconds: float) -> float:
    """Return the microseconds that a request takes."""
    workload = cycle(requests)
    done = 0
    clock = time.perf_counter
    begin = now = clock()
    while now < begin + seconds:
        await work(islice(workload, _AT_ONCE))
        done += _AT_ONCE
        now = clock()
    return (now - begin) / done * 1e6


def _targets(runs: Mapping[Size, Sequence[float]]) -> list[Target]:
    pairs = {
        "5 -> 5,000 routes": Size(5_000, 3),
        "3 -> 50 tiers": Size(5, 50),
        "5 -> 5,000 routes and 3 -> 50 tiers": LARGE,
        "3 -> 50 tiers that only tags tell apart": Size(5, 50, "by tag"),
    }
    return [
        Target(
            question,
            1.2,
            True,
            ratio(runs[replace(size, what=what)], runs[replace(SMALL, what=what)]),
            note=note,
        )
        for what, note in (("request", "a whole request"), ("match", "match, tier and cell"))
        for question, size in pairs.items()
    ]


def _charts(runs: Mapping[Size, Sequence[float]]) -> list[Chart]:
    bars = [
        Bar(
            f"{size.routes:,} routes, {size.tiers} tiers {size.told_apart}",
            median(measured),
            "ours",
        )
        for size, measured in runs.items()
        if size.what == "request"
    ]
    line = ("1.2x the smallest", 1.2 * median(runs[SMALL]))
    return [
        Chart("A request in process, by size of the policy", "us, less is better", bars, [line])
    ]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            row["what"], row["told_apart"], f"{row['routes']:,}", str(row["tiers"]),
            f"{row['us']:.2f}", f"{row['vs_smallest']:.2f}x",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["what", "told apart", "routes", "tiers", "us a request", "vs smallest"]
    return table(header, lines, words=2)


if __name__ == "__main__":
    main()
