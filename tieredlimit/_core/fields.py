"""The rate limit fields of a response, serialised here and nowhere else.

`RateLimit-Policy` and `RateLimit` follow draft-ietf-httpapi-ratelimit-headers-10: lists of quota
names as structured field strings (RFC 9651) with integer parameters.

- `q` capacity in tokens; `w` window in whole seconds, at least 1
- `r` whole tokens remaining; `t` seconds until there is one more

Since the draft still moves, what is sent is also what one test compares, character by character.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tieredlimit._core.quota import Quota

Field = tuple[bytes, bytes]

SECOND_US = 1_000_000


class QuotaView(Protocol):
    """Show what the fields say of one quota; `remaining` is None where it was not asked for."""

    @property
    def name(self) -> str:
        """The quota's name."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens in a full bucket."""
        ...

    @property
    def window_us(self) -> int:
        """Microseconds from empty to full."""
        ...

    @property
    def remaining(self) -> int | None:
        """Whole tokens in the bucket."""
        ...

    @property
    def next_token_us(self) -> int | None:
        """Microseconds until there is one more, None in a full bucket."""
        ...


def whole_seconds(duration_us: int) -> int:
    """Return a duration rounded up to whole seconds, at least 1: never a moment too early."""
    return max(1, -(-duration_us // SECOND_US))


def policy_item(name: str, capacity: int, window_us: int) -> str:
    """Return a quota's item of `RateLimit-Policy`."""
    # An interval is rounded up by less than a microsecond: so 60.000003 s of 7 tokens are a minute.
    nearest = round(window_us / SECOND_US)
    seconds = nearest if window_us - nearest * SECOND_US < capacity else None
    return f'"{name}";q={capacity};w={seconds or whole_seconds(window_us)}'


def rate_limit_fields(quotas: Iterable[QuotaView]) -> list[Field]:
    """Return `RateLimit-Policy` and `RateLimit`, each only where it has something to say."""
    policies, limits = [], []
    for quota in quotas:
        name = f'"{quota.name}"'
        policies.append(policy_item(quota.name, quota.capacity, quota.window_us))
        if quota.remaining is not None:
            next_us = quota.next_token_us
            until = "" if next_us is None else f";t={whole_seconds(next_us)}"
            limits.append(f"{name};r={quota.remaining}{until}")
    return _lists(policies, limits)


def policy_field(quotas: Iterable[Quota]) -> bytes:
    """Return the value of `RateLimit-Policy` for these quotas."""
    return ", ".join(quota.policy_item for quota in quotas).encode()


def fields_of_debts(policy: bytes, quotas: Iterable[Quota], debts: Iterable[int]) -> list[Field]:
    """Return what `rate_limit_fields` would, straight from the buckets' debts.

    For the response of every request that is allowed: a view of each quota would cost more than
    the decision did. `policy` is what `policy_field` says of the quotas.
    """
    limits = []
    for quota, debt in zip(quotas, debts, strict=True):
        left, rest = divmod(quota.window_us - debt, quota.interval_us)
        if left < 0:
            left, rest = 0, quota.window_us - debt
        limits.append(
            f"{quota.limit_start}{left};t={-((rest - quota.interval_us) // SECOND_US)}"
            if debt > 0
            else f"{quota.limit_start}{left}"
        )
    return [(b"ratelimit-policy", policy), (b"ratelimit", ", ".join(limits).encode())]


def zero_fields(names: Iterable[str]) -> list[Field]:
    """Return the fields of what a policy has at zero: no window, and no time when it would fit."""
    names = list(names)
    return _lists([f'"{name}";q=0' for name in names], [f'"{name}";r=0' for name in names])


def legacy_fields(quotas: Iterable[QuotaView]) -> list[Field]:
    """Return `X-RateLimit-Limit`, `-Remaining` and `-Reset` (seconds) of the tightest quota."""
    asked = [
        (quota.remaining, i, quota) for i, quota in enumerate(quotas) if quota.remaining is not None
    ]
    if not asked:
        return []
    remaining, _, tightest = min(asked, key=lambda row: row[:2])
    until = tightest.next_token_us
    return [
        (b"x-ratelimit-limit", b"%d" % tightest.capacity),
        (b"x-ratelimit-remaining", b"%d" % remaining),
        (b"x-ratelimit-reset", b"%d" % (0 if until is None else whole_seconds(until))),
    ]


def merged_fields(several: Iterable[list[Field]]) -> list[Field]:
    """Join the fields of several decisions: lists grow, `X-RateLimit-*` are the first's."""
    merged: dict[bytes, bytes] = {}
    for fields in several:
        for name, value in fields:
            if name not in merged:
                merged[name] = value
            elif not name.startswith(b"x-"):
                merged[name] += b", " + value
    return list(merged.items())


def _lists(policies: list[str], limits: list[str]) -> list[Field]:
    named = ((b"ratelimit-policy", policies), (b"ratelimit", limits))
    return [(name, ", ".join(items).encode()) for name, items in named if items]
