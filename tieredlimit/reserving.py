"""Costs that are known only afterwards: reserved, settled, given back."""

from __future__ import annotations

from tieredlimit._core.account import Account
from tieredlimit._core.rate import DAY_US, SECOND_US
from tieredlimit._core.table import Table
from tieredlimit._core.taken import Taken
from tieredlimit.deciding import Deciding
from tieredlimit.decision import Decision
from tieredlimit.errors import UsageError
from tieredlimit.settling import Reservation, check_actual, corrections

__all__ = ["SETTLE_WITHIN", "Reserving"]

SETTLE_WITHIN = 86_400.0
"""Seconds for which a reservation may be settled, unless it says otherwise."""

_LONGEST_SETTLE_US = 30 * DAY_US


class Reserving(Deciding):
    """What `Limiter` does about what was charged before."""

    def reserve(
        self,
        account: Account,
        feature: str,
        cost: int = 1,
        *,
        settle_within: float = SETTLE_WITHIN,
    ) -> Reservation:
        """Charge an estimate now, to be corrected once the true cost is known.

        `async with limiter.reserve(account, "video", cost=30) as r: ... await r.settle(seconds)`,
        or `limiter.settle(r.token, seconds)` in another process. Within `settle_within` seconds,
        and once: then, and where nobody settles, the estimate stands.

        Raises:
            UsageError: As `take`, or `settle_within` is out of bounds.
        """
        kept_us(settle_within)

        async def take() -> Decision:
            return await self._take_kept(account, feature, cost, settle_within)

        return Reservation(take, self._settle)

    async def settle(self, token: str, actual: int) -> bool:
        """Correct the cost of a reservation of any process to `actual` tokens, once.

        False where there is nothing to settle any more: it was done, or it is too late. Less is
        given back: what was charged, at most at today's price. More is charged, and may leave a
        bucket below empty, by one capacity at most.

        Raises:
            UsageError: It is no token of this namespace, or `actual` is no whole number from 0 to
                10**9.
            BackendError: The store could not answer. It may or may not be settled; once more does
                no harm.
        """
        check_actual(actual)
        # Where nothing was charged, as during an outage, a reservation has an empty token.
        return token != "" and await self._settle(Taken.read(token, self.namespace), actual)

    async def refund(self, decision: Decision) -> Decision:
        """Give back what a take was charged, and return the decision as it stands then.

        Only of features with `refund_on` or `refund_on_exception`, and of reservations: of others
        it is not known any more what was charged, and nothing is done. Never beyond full, and never
        twice: one that got no answer may have happened. A lease is held as before.

        Raises:
            BackendError: The store could not answer.
        """
        taken, demanded = decision.taken, decision.demanded
        if demanded is None or demanded.refunded or not self.enabled:
            return decision
        if taken is None or not taken.buckets or not taken.cost:
            return decision
        demanded.refunded = True
        back = corrections(taken, 0, self._table_now())
        if taken.record:
            debts = (await self.leases.holds.settle(taken.record, back)).debts
        else:
            debts = await self.leases.holds.refund(back)
        own = len(decision.limits)
        after = demanded.given_back(debts[own] if len(debts) > own else None)
        return decision._replace(debts=debts[:own], demanded=after)

    async def _settle(self, taken: Taken, actual: int) -> bool:
        if not taken.record:
            return False
        corrected = corrections(taken, actual, self._table_now())
        return (await self.leases.holds.settle(taken.record, corrected)).settled

    def _table_now(self) -> Table | None:
        """Return what is in force now, None where nothing was loaded yet."""
        force = self._force
        # A process that takes nothing has not looked whether an override has begun or ended.
        return force.table and force.table_at(self.backend.now())

    async def _take_kept(
        self, account: Account, feature: str, cost: int, settle_within: float
    ) -> Decision:
        """Take what may be settled; `Limiter` says how."""
        raise NotImplementedError


def kept_us(settle_within: float) -> int:
    """Return for how long a reservation is kept, in microseconds.

    Raises:
        UsageError: It is out of bounds.
    """
    most = _LONGEST_SETTLE_US // SECOND_US
    if type(settle_within) not in (int, float) or not 1 <= settle_within <= most:
        raise UsageError(f"settle_within must be from 1 to {most:,} s, got {settle_within!r:.80}")
    return round(settle_within * SECOND_US)
