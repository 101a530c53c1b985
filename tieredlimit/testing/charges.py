"""What a backend is asked in the contract, written shortly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tieredlimit._core.account import Account
from tieredlimit._core.keys import key_prefix
from tieredlimit._core.quota import Quota, parse_quota_rate
from tieredlimit._core.shelf import Shelf
from tieredlimit.backends import Backend, Charge, Reply

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR


def quota(rate: str, name: str = "q", *, capacity: int | None = None) -> Quota:
    """Return a quota, of a rate as policies write it."""
    _, tokens, interval_us, _ = parse_quota_rate(rate, capacity)
    return Quota(name, rate, tokens, interval_us)


def shelf(*quotas: Quota, tier: str = "free", catch_all: bool = False) -> Shelf:
    """Return the quotas of a tier, whose buckets stand under one key for each subject."""
    return Shelf(tuple(quotas), None, key_prefix("test", 0, "image", tier, None), catch_all)


def charge(on: Shelf, cost: int = 1, subject: str = "u1") -> Charge:
    """Return what charges the buckets of a subject."""
    return Charge(on.key(Account(subject)), on, cost)


async def take_at_once(backend: Backend, charges: Sequence[Charge], times: int) -> list[Reply]:
    """Take so many times concurrently."""
    return await asyncio.gather(*(backend.take(charges) for _ in range(times)))


async def drain(backend: Backend, on: Shelf, subject: str = "u1") -> int:
    """Take single tokens until one is denied; return how many there were."""
    taken = 0
    while (await backend.take([charge(on, 1, subject)])).allowed:
        taken += 1
    return taken


async def debts(backend: Backend, *charges: Charge) -> list[int]:
    """Peek at the buckets of some charges."""
    peek = [one._replace(cost=0) for one in charges]
    return list((await backend.take(peek)).debts)
