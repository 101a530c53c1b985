"""The token bucket as one integer.

A bucket is the instant at which it will be full again, `full_at`, in integer microseconds on the
backend's clock; a bucket that is full is not stored at all. Spending a token moves the instant one
interval into the future, time passing brings it nearer, and a cost fits while the instant stays
within one window of now. This is the token bucket in the form of the Generic Cell Rate Algorithm
(ITU-T I.371, annex A, "virtual scheduling").

The *debt* of a bucket is `full_at - now`: how many microseconds it is away from full.
"""

from __future__ import annotations

from tieredlimit._core.quota import Quota


def settle_instant(stored: int | None, now: int, clamp_us: int) -> int:
    """Return a bucket's `full_at` as of now, from what the store holds (None: nothing).

    What lies beyond `clamp_us` comes from a window since shortened or a clock that went back. The
    caller writes the lowered instant back even where it denies: otherwise the bucket would look
    one clamp away for ever, to a client that obeys every Retry-After.
    """
    if stored is None or stored <= now:
        return now
    return min(stored, now + clamp_us)


def debit(quota: Quota, full_at: int, now: int, cost: int) -> int | None:
    """Return the bucket's new `full_at`, or None if `cost` does not fit now."""
    candidate = full_at + cost * quota.interval_us
    return candidate if candidate - now <= quota.reach_us else None


def remaining(quota: Quota, debt_us: int) -> int:
    """Return the whole tokens in a bucket, never below zero."""
    return max(0, (quota.window_us - debt_us) // quota.interval_us)


def wait_us(quota: Quota, debt_us: int, cost: int) -> int | None:
    """Return the microseconds until `cost` fits, 0 if it does now, None if it never will."""
    if cost > quota.capacity - quota.leave:
        return None
    return max(0, debt_us + cost * quota.interval_us - quota.reach_us)


def next_token_us(quota: Quota, debt_us: int) -> int | None:
    """Return the microseconds until one more whole token is there, None if the bucket is full."""
    if debt_us <= 0:
        return None
    more = remaining(quota, debt_us) + 1
    return max(0, debt_us + more * quota.interval_us - quota.window_us)
