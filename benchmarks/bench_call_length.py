"""How long does one call hold Redis, which serves nobody else meanwhile?

    scripts/bench call_length [--calls 100] [--rounds 5] [--json PATH]

The fullest calls that our backend makes, its own bytes: as many decisions as go into one, of one
key and of seven (as many as fit into the most keys of a call), of one quota each and of two; on
keys that are not there yet, and on keys that are. `mean` is what Redis counted for the script
(`INFO commandstats`), median of the rounds; `longest` is the slowest single call that its slow log
has seen: what something else on the machine took from Redis is in there too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import redis as redis_py

from benchmarks.measure import (
    Bar,
    Chart,
    Target,
    arguments,
    counted,
    environment,
    finish,
    run,
    table,
    take_turns,
)
from benchmarks.policies import DAY, MINUTE, SCRIPT, account, charges_of, commands_for
from benchmarks.stores import redis_server
from tieredlimit import Account
from tieredlimit.backends.call import MAX_DECISIONS, MAX_KEYS

_SUBJECTS = ("org", "team", "project", "app", "site", "desk")
_MANY = MAX_KEYS // MAX_DECISIONS

POLICY: dict[str, Any] = {
    "order": ["everyone"],
    "features": {name: {"routes": [f"POST /{name}"]} for name in ("one", "two", "many", "all")},
    "tiers": {
        "everyone": {
            "quotas": {
                "one": MINUTE,
                "two": [MINUTE, DAY],
                "many": [
                    {**MINUTE, "name": f"minute-{per}", **({"per": per} if per else {})}
                    for per in ("", *_SUBJECTS)[:_MANY]
                ],
                "all": [
                    {**quota, "name": f"{name}-{per}", **({"per": per} if per else {})}
                    for per in ("", *_SUBJECTS)[:_MANY]
                    for name, quota in (("minute", MINUTE), ("day", DAY))
                ],
            }
        }
    },
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Name a line of the table: what a decision of the call charges."""

    feature: str
    keys: int
    quotas: int
    known: bool


@dataclass(frozen=True, slots=True)
class Held:
    """Hold how long Redis was held, in microseconds a call."""

    mean_us: float
    longest_us: float


SHAPES = tuple(
    Shape(feature, keys, quotas, known)
    for feature, keys, quotas in (
        ("one", 1, 1),
        ("two", 1, 2),
        ("many", _MANY, 1),
        ("all", _MANY, 2),
    )
    for known in (False, True)
)


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("call_length", __doc__, calls=100, rounds=5)
    # Not all: what a script calls would be logged one by one, and slow it down.
    slow = ("--slowlog-log-slower-than", "100", "--slowlog-max-len", "100000")
    with redis_server(*slow) as server, redis_py.Redis(port=server.port) as client:
        result, runs = run(measure(client, options.calls, options.rounds), uvloop=options.uvloop)
    finish(
        options, "call_length", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(runs),
    )  # fmt: skip


async def measure(
    client: redis_py.Redis, calls: int, rounds: int
) -> tuple[dict[str, Any], dict[Shape, list[Held]]]:
    """Make the calls in turns; return the result, and the rounds of every row."""
    before = environment()
    client.script_load(SCRIPT)
    fresh = count()
    contenders: dict[Shape, Callable[[], Awaitable[Held]]] = {
        shape: partial(_hold, client, shape, calls, fresh) for shape in SHAPES
    }
    runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {"calls": calls, "rounds": rounds, "decisions": MAX_DECISIONS},
        "rows": [
            {
                **asdict(shape),
                "mean_us": median(held.mean_us for held in measured),
                "longest_us": max(held.longest_us for held in measured),
                "rounds": [asdict(held) for held in measured],
            }
            for shape, measured in runs.items()
        ],
    }
    return result, runs


async def _hold(client: redis_py.Redis, shape: Shape, calls: int, fresh: Any) -> Held:
    """Make so many calls, each of accounts of its own, and ask Redis what they took."""
    first = next(fresh) * calls * MAX_DECISIONS
    accounts = [_within(first + number) for number in range(calls * MAX_DECISIONS)]
    asked = await charges_of(POLICY, accounts, shape.feature)
    commands: Any = commands_for(asked, together=MAX_DECISIONS)
    execute: Any = client.execute_command
    if shape.known:
        for command in commands:
            execute(*command)
    client.config_resetstat()
    execute("SLOWLOG", "RESET")
    for command in commands:
        reply = execute(*command)
        if any(said != 1 for said in reply[1 :: 1 + shape.keys * shape.quotas]):
            raise RuntimeError("a decision of the call was not allowed")
    mean: float = client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
    slow: Any = client.slowlog_get(2 * calls)
    longest = max([mean, *[e["duration"] for e in slow if e["command"].startswith(b"EVALSHA")]])
    client.flushall()
    return Held(mean, longest)


def _within(number: int) -> Account:
    around = {per: f"{per}-{number:07}" for per in _SUBJECTS}
    return Account(account(number).id, within=around)


def _targets(runs: Mapping[Shape, Sequence[Held]]) -> list[Target]:
    targets = []
    for shape, measured in runs.items():
        if not shape.known:
            continue
        mean_ms = median(held.mean_us for held in measured) / 1e3
        longest_ms = max(held.longest_us for held in measured) / 1e3
        keys = f"{counted(shape.keys, 'key')} of {shape.quotas}"
        question = f"one call of {MAX_DECISIONS} decisions, {keys}"
        targets.append(
            Target(question, 2, True, mean_ms, "ms", note=f"longest of all {longest_ms:.1f} ms")
        )
    return targets


def _charts(runs: Mapping[Shape, Sequence[Held]]) -> list[Chart]:
    bars = [
        Bar(
            f"{counted(shape.keys, 'key')} of {counted(shape.quotas, 'quota')}, "
            f"{'known' if shape.known else 'new'}",
            median(held.mean_us for held in measured) / 1e3,
            "ours",
        )
        for shape, measured in runs.items()
    ]
    title = f"How long a call of {MAX_DECISIONS} decisions holds Redis"
    return [Chart(title, "ms, less is better", bars, [("2 ms", 2)])]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            "known" if row["known"] else "new", str(MAX_DECISIONS), str(row["keys"]),
            str(row["quotas"]), f"{row['mean_us']:,.0f}", f"{row['longest_us']:,.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["accounts", "decisions", "keys each", "quotas a key", "mean us", "longest us"]
    return table(header, lines, words=1)


if __name__ == "__main__":
    main()
