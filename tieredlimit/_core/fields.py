"""The rate limit fields of a response, serialised here and nowhere else.

`RateLimit-Policy` and `RateLimit` follow draft-ietf-httpapi-ratelimit-headers-10: lists of quota
names as structured field strings (RFC 9651) with integer parameters.

- `q` capacity in tokens; `w` window in whole seconds, at least 1
- `r` whole tokens remaining; `t` seconds until there is one more

Since the draft still moves, what is sent is also what one test compares, character by character.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

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


def rate_limit_fields(quotas: Iterable[QuotaView]) -> list[Field]:
    """Return `RateLimit-Policy` and `RateLimit`, each only where it has something to say."""
    policies, limits = [], []
    for quota in quotas:
        name = f'"{quota.name}"'
        policies.append(f"{name};q={quota.capacity};w={whole_seconds(quota.window_us)}")
        if quota.remaining is not None:
            next_us = quota.next_token_us
            until = "" if next_us is None else f";t={whole_seconds(next_us)}"
            limits.append(f"{name};r={quota.remaining}{until}")
    return _lists(policies, limits)


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


def _lists(policies: list[str], limits: list[str]) -> list[Field]:
    named = ((b"ratelimit-policy", policies), (b"ratelimit", limits))
    return [(name, ", ".join(items).encode()) for name, items in named if items]
