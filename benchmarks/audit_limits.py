"""What is audited: the limits, written once as a policy and once as bare numbers to check by.

The numbers follow from the definition in the documentation alone: nothing of the package computes
them. Buckets are small and the accounts ask for several times what flows in, so that almost every
bucket is at its limit almost always. One takes longer to fill than a failover does: what the
others lose in it they would have regained meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACCOUNTS = 200
TIERS = ("new", "everyone")
SECOND_US = 1_000_000
ESTIMATE = 3
"""What a reservation is charged before it is settled."""

_LEASE_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Bucket:
    """Describe a bucket: `capacity` tokens, `amount` of them a period.

    Attributes:
        name: What the report calls it.
        shared: Whether all accounts have one together, not one each.
        leave: Tokens that takes of a tier must leave in it.
    """

    name: str
    amount: int
    period_us: int
    capacity: int
    shared: bool = False
    leave: Mapping[str, int] = field(default_factory=dict)

    @property
    def interval_us(self) -> int:
        """Microseconds from one token to the next."""
        return -(-self.period_us // self.amount)

    @property
    def rate(self) -> str:
        """The rate as a policy spells it."""
        return f"{self.amount}/{self.period_us // SECOND_US} seconds"

    def reach_us(self, tier: str) -> int:
        """Return how far from full a take of a tier may leave it, in microseconds."""
        return (self.capacity - self.leave.get(tier, 0)) * self.interval_us


@dataclass(frozen=True, slots=True)
class Feature:
    """Describe what accounts ask for.

    Attributes:
        name: The feature.
        buckets: What a take is charged to, the account's own first.
        share: How often it is asked for, of all shares.
        slots: How many jobs of an account may run at once, None where nothing is held.
        settled: Whether it is reserved, and settled afterwards.
    """

    name: str
    buckets: tuple[Bucket, ...]
    share: int
    slots: int | None = None
    settled: bool = False


LEASE_US = _LEASE_SECONDS * SECOND_US

_POOL = Bucket("pool", 700, SECOND_US, 60, shared=True, leave={"new": 30})
FEATURES = (
    Feature("one", (Bucket("one", 7, SECOND_US, 3),), 25),
    Feature(
        "two",
        (Bucket("two-burst", 37, 3 * SECOND_US, 4), Bucket("two-long", 20, 11 * SECOND_US, 30)),
        25,
    ),
    Feature("pooled", (Bucket("pooled", 9, SECOND_US, 5), _POOL), 20),
    Feature("job", (Bucket("job", 13, SECOND_US, 10),), 15, slots=2),
    Feature("reserved", (Bucket("reserved", 17, SECOND_US, 9), _POOL), 15, settled=True),
)


def tier_of(account: int) -> str:
    """Return the tier of an account, by its number."""
    return TIERS[account % len(TIERS)]


def policy() -> dict[str, Any]:
    """Return the same limits as a policy."""
    quotas: dict[str, Any] = {}
    features: dict[str, Any] = {}
    for feature in FEATURES:
        # Without an answer nothing may be admitted that nobody could count.
        features[feature.name] = {"outage": "deny"}
        own = [_quota(bucket) for bucket in feature.buckets if not bucket.shared]
        if feature.slots is not None:
            own[0] |= {"concurrency": feature.slots, "lease": f"{_LEASE_SECONDS} second"}
        if _POOL in feature.buckets:
            features[feature.name]["pool"] = _POOL.name
        quotas[feature.name] = own
    pool = {"rate": _POOL.rate, "capacity": _POOL.capacity, "leave": dict(_POOL.leave)}
    return {
        "order": list(TIERS),
        "features": features,
        "pools": {_POOL.name: pool},
        "tiers": {
            "new": {"when": {"plan": "new"}, "quotas": quotas},
            "everyone": {"quotas": quotas},
        },
    }


def _quota(bucket: Bucket) -> dict[str, Any]:
    return {"rate": bucket.rate, "capacity": bucket.capacity, "name": bucket.name}
