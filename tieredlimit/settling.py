"""Settling: a cost that is known only afterwards corrects the estimate that was charged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.table import Table
from tieredlimit._core.taken import POOL_KIND, Taken
from tieredlimit.backends.holds import Correction
from tieredlimit.decision import Decision
from tieredlimit.errors import UsageError
from tieredlimit.leases import Lease

__all__ = ["Reservation", "corrections"]


class Reservation:
    """Charge an estimate now and the true cost later; made by `Limiter.reserve`.

    `async with` takes, if that was not done by hand: it raises `Denied` where that is denied, keeps
    the lease of the take, if it has one, while the block runs, and releases it at the end. What is
    never settled stands.

    Attributes:
        decision: What was decided.
    """

    def __init__(
        self,
        take: Callable[[], Awaitable[Decision]],
        settle: Callable[[Taken, int], Awaitable[bool]],
    ) -> None:
        self._taking = take
        self._settle = settle
        self._decision: Decision | None = None
        # Whether it was taken by hand, and not entered yet.
        self._waits = False

    @property
    def decision(self) -> Decision:
        """What was decided.

        Raises:
            UsageError: Nothing was taken yet.
        """
        if self._decision is None:
            raise UsageError("nothing is reserved yet: enter it with `async with`")
        return self._decision

    @property
    def token(self) -> str:
        """What `Limiter.settle` of another process knows it by, and `limiter.leases`.

        Empty where nothing was charged, as during an outage: settling that does nothing.
        """
        return self.decision.token

    @property
    def lease(self) -> Lease | None:
        """The slots that are held, None where there are none."""
        return self.decision.lease

    async def settle(self, actual: int) -> bool:
        """Correct the cost to `actual` tokens, once; False if there is nothing to settle any more.

        Less is given back: what was charged, at most at today's price. More is charged, and may
        leave a bucket below empty, by one capacity at most.

        Raises:
            UsageError: `actual` is no whole number from 0 to 10**9.
            BackendError: The store could not answer. It may or may not be settled; once more does
                no harm.
        """
        taken = self.decision.taken
        check_actual(actual)
        return False if taken is None else await self._settle(taken, actual)

    def detach(self) -> str:
        """Leave the lease, if there is one, to somebody else; return the token."""
        if self.lease is not None:
            self.lease.detach()
        return self.token

    async def take(self) -> Decision:
        """Take now: its lease is then yours to keep and release, or `async with` does it."""
        self._decision = await self._taking()
        self._waits = self._decision.allowed
        return self._decision

    async def __aenter__(self) -> Self:
        decision = self.decision if self._waits else await self.take()
        self._waits = False
        decision.raise_if_denied()
        if decision.lease is not None:
            await decision.lease.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.lease is not None:
            await self.lease.__aexit__(kind, error, traceback)


def check_actual(actual: int) -> None:
    """Raise a UsageError where a true cost is none."""
    if type(actual) is not int or not 0 <= actual <= MAX_AMOUNT:
        raise UsageError(
            f"the actual cost must be a whole number from 0 to {MAX_AMOUNT:,}, got {actual!r:.80}"
        )


def corrections(taken: Taken, actual: int, table: Table | None) -> list[Correction]:
    """Return what makes of what was charged what it should have been.

    Tokens that are given back are worth what they cost then, or what they cost now in the table,
    whichever is less; more of them cost what they do now. What an override makes another price for
    some accounts of the tier is worth what it cost then.
    """
    today = {} if table is None else _today(taken, table)
    more = actual - taken.cost
    corrected = []
    for bucket in taken.buckets:
        charged = bucket.interval_us, bucket.clamp_us
        prices = today.get((bucket.kind, bucket.tag), set())
        # Where accounts of the tier differ nobody can tell which one a token is of.
        interval_us, clamp_us = next(iter(prices)) if len(prices) == 1 else charged
        price_us = interval_us if more > 0 else min(interval_us, bucket.interval_us)
        corrected.append(Correction(bucket.key, bucket.tag, more * price_us, clamp_us))
    return corrected


def _today(taken: Taken, table: Table) -> dict[tuple[str, bytes], set[tuple[int, int]]]:
    """Return each interval and clamp that a quota in force may have, by kind and tag."""
    try:
        entry = table.entry(taken.tier, taken.feature)
    except KeyError:
        return {}
    entries = [entry] if entry.variants is None else entry.variants.all()
    quotas = [(quota.per or "", quota) for one in entries for quota in one.cell.quotas]
    pool = entry.feature.pool
    if pool is not None:
        quotas.append((POOL_KIND, pool.slice))
    today: dict[tuple[str, bytes], set[tuple[int, int]]] = {}
    for kind, quota in quotas:
        today.setdefault((kind, quota.tag), set()).add((quota.interval_us, quota.clamp_us))
    return today
