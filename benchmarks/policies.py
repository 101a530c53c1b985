"""The policy, the accounts and the exact commands that several benchmarks measure with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from tests.servers import RedisServer
from tieredlimit import Account, Limiter
from tieredlimit.backends import Charge, MemoryBackend, Reply
from tieredlimit.backends.call import Script
from tieredlimit.backends.calls import Calls

SEED = 20_240_229
FEATURES = {1: "image", 2: "video"}
"""The feature that has so many quotas."""
SCRIPT = files("tieredlimit.backends").joinpath("lua/take.lua").read_text("utf-8")
"""What Redis runs to take."""

# A machine that is busy with something else must not end a run; the timer costs the same.
TIMEOUT = 10.0

KEPT = {1: "kept1", 2: "kept2"}
"""The same, where a bucket that was charged once stays in the store for a quarter of an hour."""

# Large enough to allow everything.
MINUTE = {"rate": "60/minute", "capacity": 1_000_000}
DAY = {"rate": "1000/day", "capacity": 1_000_000}
_SLOW = {"rate": "100/day", "capacity": 100_000}

_TIERS = {
    "new": {"when": {"plan": "free", "account_age_below": "7 days"}},
    "pro": {"when": {"plan": ["pro", "team"]}},
    "free": {"when": {"plan": "free"}},
    "everyone": {},
}
POLICY: dict[str, Any] = {
    "order": list(_TIERS),
    "features": {
        "image": {"routes": ["POST /v1/images"]},
        "video": {"routes": ["POST /v1/videos"]},
        "tight": {"routes": ["POST /v1/tight"]},
        "kept1": {"routes": ["POST /v1/kept1"]},
        "kept2": {"routes": ["POST /v1/kept2"]},
        "none": {"routes": ["POST /v1/none"]},
    },
    "defaults": {
        "quotas": {
            "image": MINUTE,
            "video": [MINUTE, DAY],
            "tight": [{"rate": "1/hour"}, {"rate": "1/day"}],
            "kept1": _SLOW,
            "kept2": [_SLOW, {"rate": "50/day", "capacity": 100_000, "name": "slower"}],
            "none": 0,
        }
    },
    "tiers": _TIERS,
}
"""Four tiers; features of one quota, of two, of two that hold one token each, and of zero."""

_MADE = datetime(2020, 1, 1, tzinfo=UTC)


def account(number: int) -> Account:
    """Return the account of that number, of the tier `free`."""
    return Account(f"account-{number:07}", plan="free", created_at=_MADE)


def drawn(accounts: int, most: int) -> list[Account]:
    """Return `most` accounts out of so many, in an order that is random and always the same."""
    return [account(n) for n in random.Random(SEED).choices(range(accounts), k=most)]


class Recorder(MemoryBackend):
    """Allow everything and keep what is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Sequence[Charge]] = []

    async def take(self, charges: Sequence[Charge]) -> Reply:
        """Keep the charges."""
        self.asked.append(charges)
        return Reply(True, self.now(), [0] * sum(len(charge.shelf.quotas) for charge in charges))


async def charges_of(
    policy: dict[str, Any], accounts: Sequence[Account], feature: str
) -> list[Sequence[Charge]]:
    """Return what a limiter asks its backend for, one take of each account."""
    recorder = Recorder()
    limiter = Limiter(policy, recorder)
    for one in accounts:
        await limiter.take(one, feature)
    if len(recorder.asked) != len(accounts):
        raise RuntimeError("the limiter did not ask its backend once for each take")
    return recorder.asked


def commands_for(asked: Sequence[Sequence[Charge]], together: int = 1) -> list[list[bytes]]:
    """Return the commands that the Redis backend sends for these, so many decisions in each.

    They are its own bytes, taken apart into words: they cannot differ from what it sends.
    """
    calls = Calls(
        Script(SCRIPT),
        clock=None,
        timeout=3600,
        learn_clock=lambda _: None,
        expired=lambda: None,
    )
    commands = []
    for first in range(0, len(asked), together):
        futures = [calls.add(charges) for charges in asked[first : first + together]]
        call = calls.next_call()
        if call is None or len(call.decisions) != len(futures):
            raise RuntimeError(f"the backend did not put {len(futures)} decisions into one call")
        for future in futures:
            future.cancel()
        commands.append(_words(call.command))
    return commands


def script_calls(server: RedisServer) -> int:
    """Return how many calls of a script the server has answered without an error."""
    stats: Any = server.command("INFO", "commandstats")
    found = [stats.get(f"cmdstat_{name}", {}) for name in ("evalsha", "eval")]
    return sum(int(one.get("calls", 0)) - int(one.get("failed_calls", 0)) for one in found)


def _words(command: bytes) -> list[bytes]:
    """Take a command of the Redis serialization protocol apart."""
    at = command.index(b"\r\n") + 2
    words = []
    for _ in range(int(command[1 : at - 2])):
        start = command.index(b"\r\n", at) + 2
        size = int(command[at + 1 : start - 2])
        words.append(command[start : start + size])
        at = start + size + 2
    return words
