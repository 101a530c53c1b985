"""A quota: an allowance of so many tokens, refilled at such a rate."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from tieredlimit._core.fields import policy_item
from tieredlimit._core.rate import DAY_US, SECOND_US, TEN_YEARS_US, Rate, parse_rate
from tieredlimit._core.reading import spell

if TYPE_CHECKING:
    from fractions import Fraction

MAX_AMOUNT = 1_000_000_000
"""The largest capacity and the largest cost, in tokens."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Describe one token bucket: `capacity` tokens, one more every `interval_us` microseconds.

    Attributes:
        name: Unique in its cell; what a client reads in `RateLimit-Policy`.
        rate: The rate as the policy wrote it.
        capacity: Tokens in a full bucket, at least 1.
        interval_us: Microseconds from one token to the next.
        per: The subject around the account that is charged, or None for the account itself.
        concurrency: Slots that the subject may hold at once, None where nothing is held.
        lease_us: Microseconds after which a slot that nobody renews is free, None without slots.
        leave: Tokens that a take must leave in the bucket: 0 but for a pool's.
        window_us: Microseconds from empty to full.
        reach_us: The debt up to which a take may go: the window, less what it must leave.
        clamp_us: How far ahead of now a bucket's instant may stand before it is lowered.
        tag: Four bytes that stand for the name in the store.
        policy_item: The quota's item of `RateLimit-Policy`.
        limit_start: Its item of `RateLimit`, up to the number of tokens.
    """

    name: str
    rate: str
    capacity: int
    interval_us: int
    per: str | None = None
    concurrency: int | None = None
    lease_us: int | None = None
    leave: int = 0
    window_us: int = field(init=False)
    reach_us: int = field(init=False)
    clamp_us: int = field(init=False)
    tag: bytes = field(init=False, repr=False)
    policy_item: str = field(init=False, repr=False)
    limit_start: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Settling may leave a bucket one capacity below empty: the clamp must let that stand.
        object.__setattr__(self, "window_us", self.capacity * self.interval_us)
        object.__setattr__(self, "reach_us", self.window_us - self.leave * self.interval_us)
        object.__setattr__(self, "clamp_us", 2 * self.window_us)
        object.__setattr__(self, "tag", blake2b(self.name.encode(), digest_size=4).digest())
        item = policy_item(self.name, self.capacity, self.window_us)
        object.__setattr__(self, "policy_item", item)
        object.__setattr__(self, "limit_start", f'"{self.name}";r=')


def share_of(quota: Quota, share: Fraction) -> Quota:
    """Return a share of a quota: so much of its tokens, at the same part of its rate.

    At least one token, and so one that its takes need not leave. No slots: nobody could tell how
    many are held elsewhere.
    """
    capacity = max(1, int(quota.capacity * share))
    interval_us = -(-quota.interval_us * share.denominator // share.numerator)
    leave = min(-(-quota.leave * share.numerator // share.denominator), capacity - 1)
    return replace(
        quota,
        capacity=capacity,
        interval_us=interval_us,
        leave=leave,
        concurrency=None,
        lease_us=None,
    )


def interval_of(rate: Rate) -> tuple[int, str | None]:
    """Return the microseconds between tokens, rounded up, and a warning where rounding shows.

    Raises:
        ValueError: Rounding would change the rate by more than 1 %.
    """
    if rate.amount > rate.period_us:
        raise ValueError('is more than a token a microsecond; at most "1000000/second"')
    interval_us = -(-rate.period_us // rate.amount)
    # In whole numbers, for the bounds to be exact: off / period is how far off it gets.
    off_us = interval_us * rate.amount - rate.period_us
    if off_us * 1_000 <= rate.period_us:
        return interval_us, None
    nearest = " or ".join(
        f'"{_spell_exact(candidate)}"' for candidate in (interval_us, interval_us - 1)
    )
    told = (
        f"is {off_us / rate.period_us:.2%} off once rounded to whole microseconds; "
        f"exact nearby: {nearest}"
    )
    if off_us * 100 > rate.period_us:
        raise ValueError(told)
    return interval_us, told


def parse_quota_rate(text: str, capacity: int | None) -> tuple[Rate, int, int, str | None]:
    """Read a rate with its capacity; return rate, capacity, interval and a warning or None.

    Raises:
        ValueError: The rate, its rounding or the bucket's window is out of bounds.
    """
    rate = parse_rate(text)
    try:
        interval_us, warning = interval_of(rate)
    except ValueError as exc:
        raise ValueError(f"{spell(text)} {exc}") from None
    tokens = rate.amount if capacity is None else capacity
    if tokens > MAX_AMOUNT:
        raise ValueError(
            f"{spell(text)} makes a capacity of {tokens:,}; at most {MAX_AMOUNT:,}: give a capacity"
        )
    if tokens * interval_us > TEN_YEARS_US:
        most = TEN_YEARS_US // interval_us
        fitting = f": a capacity of {most:,}" if most else ""
        raise ValueError(
            f"a capacity of {tokens:,} at {spell(text)} takes {tokens * interval_us // DAY_US:,} "
            f"days from empty to full; at most 10 years (3,650 days){fitting}"
        )
    return rate, tokens, interval_us, warning and f"{spell(text)} {warning}"


def _spell_exact(interval_us: int) -> str:
    """Spell the rate of one token every `interval_us`, which must be below a second."""
    per_second, rest = divmod(SECOND_US, interval_us)
    return f"{SECOND_US}/{interval_us} seconds" if rest else f"{per_second}/second"
