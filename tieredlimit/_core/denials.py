"""Denials remembered for a moment, so that hammering costs the store nothing."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_US = 1_000_000
"""The longest that a denial is remembered: what was given back since counts after this at last."""

MOST = 10_000


class Denials:
    """Remember who was denied which cost, and how far the buckets were from full.

    Buckets only fill as time passes, and other takes only empty them: until the cost fits it stays
    denied, and so does any larger one. Instants are microseconds on the backend's clock; `local_us`
    is one of this process that never steps, and bounds how long a denial is believed whatever the
    backend's does.
    """

    __slots__ = ("held",)

    def __init__(self) -> None:
        self.held: dict[object, tuple[int, int, int, int, Sequence[int], object]] = {}

    def remember(
        self,
        key: object,
        cost: int,
        now: int,
        wait_us: int,
        debts: Sequence[int],
        local_us: int,
        quotas: object = None,
    ) -> None:
        """Keep a denial of `cost` that ends `wait_us` from now, or sooner.

        `quotas` are whose debts these are: an override that begins or ends gives a cell others.
        """
        if len(self.held) >= MOST:
            # Whoever is dropped is asked about once more; that is all.
            self.held.clear()
        lasts = min(wait_us, LONGEST_US)
        self.held[key] = (cost, now, now + lasts, local_us + lasts, debts, quotas)

    def forget(self, key: object) -> None:
        """Drop a denial of someone who was allowed a smaller cost since: the debts have grown."""
        self.held.pop(key, None)

    def recall(
        self, key: object, cost: int, now: int, local_us: int, quotas: object = None
    ) -> list[int] | None:
        """Return the debts as of now if the cost is still denied, None if the store must say."""
        denial = self.held.get(key)
        if denial is None:
            return None
        denied_cost, since, until, local_until, debts, of = denial
        if local_us >= local_until or not since <= now < until:
            self.held.pop(key, None)  # another thread may have been here
            return None
        if cost < denied_cost or of is not quotas:
            return None
        elapsed = now - since
        return [debt - elapsed if debt > elapsed else 0 for debt in debts]
