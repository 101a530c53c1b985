"""What a take of a cell asks for beside the account's own buckets: pools and slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from zlib import crc32

from tieredlimit._core.account import Account
from tieredlimit._core.keys import LEASES, POOL, NameOf, key_prefix, subject_name
from tieredlimit._core.pool import Pool
from tieredlimit._core.quota import Quota, share_of
from tieredlimit._core.shelf import Shelf, subject_key
from tieredlimit._core.slots import Slot, Slots

if TYPE_CHECKING:
    from fractions import Fraction

# What a named tuple's own constructor does, at half its cost.
_new = tuple.__new__


@dataclass(frozen=True, slots=True, eq=False)
class PoolPart:
    """Hold what a cell takes from its feature's pool.

    Attributes:
        pool: The pool.
        tier: The tier.
        quota: One of its slices, as takes of the cell's tier see it: with what they must leave.
        shelves: The bucket of each slice.
        shards: The shard of each slice, which all keys of its takes are on.
        slots: What a take fills of each slice's slots, None where the pool has none.
    """

    pool: Pool
    tier: str
    quota: Quota
    shelves: tuple[Shelf, ...]
    shards: tuple[int, ...]
    slots: tuple[Slot, ...] | None

    @classmethod
    def of(cls, pool: Pool, tier: str, namespace: str, shards: int) -> PoolPart:
        """Build it for a tier, where keys are spread over so many shards."""
        quota = pool.seen_by(tier)
        first = crc32(f"pool:{pool.name}".encode())
        places = tuple((first + i) % shards for i in range(pool.slices))

        def keys(name: str) -> tuple[str, ...]:
            prefixes = [key_prefix(namespace, shard, POOL, name, None) for shard in places]
            return tuple(f"{prefix}{i}" for i, prefix in enumerate(prefixes))

        held = None
        if quota.concurrency is not None and quota.lease_us is not None:
            limit, lease_us = quota.concurrency, quota.lease_us
            held = tuple(Slot(key, limit, lease_us) for key in keys(pool.name + LEASES))
        shelves = tuple(
            Shelf((quota,), None, key, False, b"$%d\r\n%b\r\n" % (len(key), key.encode()))
            for key in keys(pool.name)
        )
        return cls(pool, tier, quota, shelves, places, held)


@dataclass(frozen=True, slots=True, eq=False)
class Demands:
    """Hold what a cell asks for beside its buckets.

    Attributes:
        pool: What it takes from a pool, None where its feature has none.
        own: The slots of the account and the subjects around it.
        refunds: Whether the end of a request may give back what it was charged.
        name_of: Returns what stands for a subject in a key.
        local: What a process gives out by itself during an outage: a share of each of the cell's
            shelves, then of its pool's bucket; None where it gives out nothing.
        lease_us: The shortest lease of all its slots, None where it takes none.
    """

    pool: PoolPart | None
    own: tuple[Slots, ...]
    refunds: bool
    name_of: NameOf = field(default=subject_name, repr=False)
    local: tuple[Shelf, ...] | None = None
    lease_us: int | None = field(init=False)

    def __post_init__(self) -> None:
        leases = [slots.lease_us for slots in self.own]
        if self.pool is not None and self.pool.quota.lease_us is not None:
            leases.append(self.pool.quota.lease_us)
        object.__setattr__(self, "lease_us", min(leases, default=None))

    def slots(self, account: Account, shard: int, part: int) -> list[Slot]:
        """Return each slot that a take fills.

        `part` is the pool's slice.
        """
        name_of = self.name_of
        held = [
            _new(
                Slot,
                (
                    subject_key(one.prefix, one.per, account, shard, name_of),
                    one.limit,
                    one.lease_us,
                ),
            )
            for one in self.own
        ]
        if self.pool is not None and self.pool.slots is not None:
            held.append(self.pool.slots[part])
        return held


def local_shelves(
    shelves: Iterable[Shelf], pool: PoolPart | None, share: Fraction
) -> tuple[Shelf, ...]:
    """Return a share of each shelf, and of the pool if there is one."""
    own = [
        Shelf(
            tuple(share_of(quota, share) for quota in shelf.quotas),
            shelf.per,
            shelf.prefix,
            shelf.catch_all,
        )
        for shelf in shelves
    ]
    if pool is not None:
        whole = replace(pool.pool.quota, leave=pool.pool.left_by(pool.tier))
        first = pool.shelves[0]
        own.append(Shelf((share_of(whole, share),), None, first.prefix, False, first.spelled))
    return tuple(own)


def slots_of(quotas: Iterable[Quota], namespace: str, feature: str, tier: str) -> tuple[Slots, ...]:
    """Return the slots that quotas of a cell ask for."""
    return tuple(
        Slots(
            key_prefix(namespace, 0, feature, tier + LEASES, quota.per),
            quota.per,
            quota.concurrency,
            quota.lease_us,
        )
        for quota in quotas
        if quota.concurrency is not None and quota.lease_us is not None
    )
