"""What a process gives out by itself while the store cannot be asked: a share of each quota."""

from __future__ import annotations

from collections.abc import Callable

from tieredlimit._core.account import Account
from tieredlimit._core.bucket import wait_us
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.table import Entry
from tieredlimit.backends import Charge, MemoryBackend
from tieredlimit.errors import BackendError

__all__ = ["Local"]

MAX_KEYS = 100_000
"""The most keys kept, of accounts; of strangers a tenth. Who is not among them is denied."""


class Local:
    """Decide features whose outage answer is `local`, on buckets of this process.

    A bucket holds a share of the quota's tokens, at least one, and refills at that share of its
    rate. So a fleet gives out at most what one process does times their number: processes x
    max(1, share of the capacity), and as many shares of the rate.

    They are charged while the store answers, too, and so are as empty as the account has been
    busy here: an outage hands out no fresh burst.

    Args:
        clock: The store's clock, as well as it is known.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._memory = MemoryBackend(
            clock=clock, max_keys=MAX_KEYS, max_catch_all_keys=MAX_KEYS // 10
        )

    def note(self, entry: Entry, account: Account, cost: int) -> None:
        """Take note of what the store has allowed."""
        if cost and entry.demands is not None and entry.demands.local:
            self._memory.note(_charges(entry, account, cost))

    def take(self, entry: Entry, account: Account, cost: int) -> tuple[bool, float | None]:
        """Return whether a cost fits, and else the seconds until it does, None for unknown."""
        if entry.cell.unlimited and (entry.demands is None or entry.demands.pool is None):
            return True, None
        if entry.demands is None or not entry.demands.local:
            return False, None
        charges = _charges(entry, account, cost)
        try:
            allowed, _, debts = self._memory.take_now(charges)
        except BackendError:
            return False, None
        if allowed:
            return True, None
        quotas = [quota for shelf in entry.demands.local for quota in shelf.quotas]
        waits = [wait_us(quota, debt, cost) for quota, debt in zip(quotas, debts, strict=True)]
        if None in waits:
            return False, None
        return False, max(wait or 0 for wait in waits) / SECOND_US


def _charges(entry: Entry, account: Account, cost: int) -> list[Charge]:
    shelves = () if entry.demands is None else entry.demands.local or ()
    own = len(entry.shelves)
    return [
        Charge(shelf.key(account) if i < own else shelf.prefix, shelf, cost)
        for i, shelf in enumerate(shelves)
    ]
