"""What a decision asked for beside the account's own buckets, how it stands, and what it left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

from tieredlimit._core.bucket import remaining, wait_us
from tieredlimit._core.table import Entry
from tieredlimit._core.taken import POOL_KIND, Bucket, Taken
from tieredlimit.backends import Charge, Claim
from tieredlimit.leases import Lease, Leases

__all__ = ["Demanded", "PoolState", "SlotState", "pool_wait_us", "taken_by"]


class PoolState(NamedTuple):
    """Show the pool that a take was charged to, at the instant of the decision.

    Attributes:
        name: The pool's name.
        capacity: Tokens in it when full; of a sliced pool, in the account's slice. So is the rest.
        leave: What takes of the tier must leave in it.
        remaining: Whole tokens in it now, those to be left included; None where it was not asked.
        denies: True if it stands in the way of the cost.
    """

    name: str
    capacity: int
    leave: int
    remaining: int | None
    denies: bool


class SlotState(NamedTuple):
    """Show the slots of one subject, or of a pool, at the instant of a decision.

    Attributes:
        name: The name of the quota, or of the pool, that limits them.
        limit: How many there are; of a pool, how many the tier may fill.
        held: How many others hold. Where there are enough, some of these may be over.
        denies: True if none was free.
        pool: Whether they are a pool's.
    """

    name: str
    limit: int
    held: int
    denies: bool
    pool: bool


class Demanded:
    """Tell of one decision's pool and slots, and of what can be released, settled or refunded.

    Made for every take that asks for such a thing, and rarely looked at: all is worked out then.

    Args:
        entry: The cell.
        cost: The tokens that were asked for.
        allowed: What was decided.
        pool_debt: The microseconds until the pool is full; None if it was not asked.
        held: Per slot that was asked for, how many others hold.
        charges: What an allowed take was charged.
        claim: What it claimed beside.
        leases: What renews and releases its slots.
    """

    __slots__ = (
        *("_allowed", "_charges", "_claim", "_cost", "_entry", "_held", "_lease", "_leases"),
        *("_pool_debt", "_since", "_taken", "refunded"),
    )

    def __init__(
        self,
        entry: Entry,
        cost: int,
        allowed: bool,
        pool_debt: int | None = None,
        held: Sequence[int] = (),
        charges: Sequence[Charge] = (),
        claim: Claim | None = None,
        leases: Leases | None = None,
    ) -> None:
        self._entry = entry
        self._cost = cost
        self._allowed = allowed
        self._pool_debt = pool_debt
        self._held = held
        self._charges = charges
        self._claim = claim
        self._leases = leases
        # Nobody may look at the lease before much of its time is over.
        self._since = time.monotonic() if claim is not None else 0.0
        self.refunded = False
        """Whether it was given back, or that was tried: never a second time."""
        self._taken: Taken | None = None
        self._lease: Lease | None = None

    @property
    def pool(self) -> PoolState | None:
        """How the pool stands, None where there is none."""
        part = None if self._entry.demands is None else self._entry.demands.pool
        if part is None:
            return None
        quota, debt = part.quota, self._pool_debt
        left = None if debt is None else remaining(quota, debt)
        # Where it was allowed the debt stands after charging: the cost did fit.
        wait = 0 if self._allowed else wait_us(quota, debt or 0, self._cost)
        denies = wait is None or wait > 0
        return PoolState(part.pool.name, quota.capacity, quota.leave, left, denies)

    @property
    def slots(self) -> tuple[SlotState, ...]:
        """How the slots stand, in the order in which they were asked for."""
        demands = self._entry.demands
        if demands is None or not self._held:
            return ()
        limits = [
            (quota.name, quota.concurrency, False)
            for quota in self._entry.cell.quotas
            if quota.concurrency is not None
        ]
        if demands.pool is not None and demands.pool.quota.concurrency is not None:
            limits.append((demands.pool.pool.name, demands.pool.quota.concurrency, True))
        return tuple(
            SlotState(name, limit, held, held >= limit and not self._allowed, pool)
            for (name, limit, pool), held in zip(limits, self._held, strict=True)
        )

    @property
    def taken(self) -> Taken | None:
        """What an allowed take has left behind, None where what it was charged is final."""
        if self._taken is None and self._allowed and self._charges:
            demands = self._entry.demands
            if self._claim is not None or (demands is not None and demands.refunds):
                self._taken = taken_by(self._entry, self._cost, self._charges, self._claim)
        return self._taken

    @property
    def lease(self) -> Lease | None:
        """What holds the slots of an allowed take, always the same one; None without any."""
        if self._lease is None and self._claim is not None and self._claim.slots and self._leases:
            taken = self.taken
            if taken is not None:
                self._lease = Lease(self._leases, taken, since=self._since)
        return self._lease

    def given_back(self, pool_debt: int | None) -> Demanded:
        """Return it as it stands after a refund: what is held is held, by the same lease."""
        if self._claim is not None:
            self._lease = self.lease
        after = copy(self)
        after._pool_debt = pool_debt  # noqa: SLF001 -- of its own class
        return after


def pool_wait_us(entry: Entry, cost: int, debt: int) -> int:
    """Return the microseconds until a cost fits the pool of a cell, 0 if it does or never will."""
    part = None if entry.demands is None else entry.demands.pool
    return 0 if part is None else wait_us(part.quota, debt, cost) or 0


def taken_by(entry: Entry, cost: int, charges: Sequence[Charge], claim: Claim | None) -> Taken:
    """Return what a take of a cell leaves behind."""
    own = len(entry.shelves)
    buckets = tuple(
        Bucket(
            key,
            (shelf.per or "") if i < own else POOL_KIND,
            quota.tag,
            quota.interval_us,
            quota.clamp_us,
        )
        for i, (key, shelf, _) in enumerate(charges)
        for quota in shelf.quotas
    )
    id_, slots, record, _ = claim or Claim(b"", ())
    held = tuple((key, lease_us) for key, _, lease_us in slots)
    return Taken(id_ or bytes(16), entry.cell.feature, entry.cell.tier, cost, buckets, held, record)
