"""Finding the tier of an account: the first whose `when` it meets.

All instants are microseconds on the backend's clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tieredlimit._core.account import Account
from tieredlimit._core.condition import When

NEAR_US = 2_000_000
"""Within so many microseconds of an age, a decision says for which instants it was prepared."""

NEVER_US = 2**53
"""Beyond every instant."""

_NOTHING_ASKED = When()


class Unknowns:
    """Count the accounts that were asked for something that billing did not say.

    Attributes:
        plans: Those with a plan that no tier names.
        ages: Those without `created_at`, where a tier asks for it.
    """

    __slots__ = ("ages", "plans")

    def __init__(self) -> None:
        self.plans: int = 0
        self.ages: int = 0


class Ranking:
    """Rank tiers for each plan, so that few of them have to be asked.

    An account's plan leaves those that ask for it or for none, in their order; of these, tiers that
    ask for tags stand apart, each under one of its tags, and only those under a tag that the
    account carries are asked.

    Args:
        whens: The tiers' conditions in the order of the policy, None for everybody. The last tier
            takes whom no other one does.
        unknowns: Where to count.
    """

    __slots__ = ("_by_plan", "_planless", "_unknowns")

    def __init__(self, whens: Sequence[When | None], unknowns: Unknowns | None = None) -> None:
        plans = {plan for when in whens if when is not None for plan in when.plan or ()}
        self._by_plan = {plan: _rank(plan, whens) for plan in plans}
        self._planless = _rank(None, whens)
        self._unknowns = unknowns or Unknowns()

    def first(self, account: Account, now: int) -> int:
        """Return which tier takes the account at the instant `now`, counted from 0.

        `~` of it, which is below 0, where that may be another within `NEAR_US` of then: an account
        comes to an age that was asked for.
        """
        plan = account.plan
        ranked = self._planless if plan is None else self._by_plan.get(plan) or self._unknown()
        near = False
        for found, below, when in ranked.plain:  # noqa: B007 -- what it is left at is the tier
            if when is None:
                break
            if below is not None:
                created_us = account.created_us()
                if created_us is None:
                    self._unknowns.ages += 1
                    break
                left = created_us + below - now
                if -NEAR_US < left < NEAR_US:
                    near = True
                if left > 0:
                    break
            else:
                near = near or self._is_near(account, when, now)
                if when.failing_word(account, now) is None:
                    break
        if ranked.tagged and account.tags:
            return self._first_tagged(ranked, account, now, found, near=near)
        return ~found if near else found

    def _first_tagged(
        self, ranked: _Ranked, account: Account, now: int, found: int, *, near: bool
    ) -> int:
        """Return what `first` does, where a tier that asks for tags may come before `found`."""
        for tag in account.tags:
            for rank, when in ranked.tagged.get(tag, ()):
                if rank >= found:
                    break
                near = near or self._is_near(account, when, now)
                if when.failing_word(account, now) is None:
                    found = rank
                    break
        return ~found if near else found

    def times(self, account: Account, now: int) -> tuple[int, int]:
        """Return the instants around `now` in which the account comes to no age that is asked for.

        The last one is excluded.
        """
        ranked = self._by_plan.get(account.plan or "", self._planless)
        whens = [when for _, _, when in ranked.plain if when is not None]
        whens += [when for tagged in ranked.tagged.values() for _, when in tagged]
        since, before = 0, NEVER_US
        for when in whens:
            for at in _edges(account, when):
                if at <= now:
                    since = max(since, at)
                else:
                    before = min(before, at)
        return since, before

    def _unknown(self) -> _Ranked:
        self._unknowns.plans += 1
        return self._planless

    def _is_near(self, account: Account, when: When, now: int) -> bool:
        if not when.asks_age:
            return False
        if account.created_at is None:
            self._unknowns.ages += 1
            return False
        return any(-NEAR_US < at - now < NEAR_US for at in _edges(account, when))


def _edges(account: Account, when: When) -> list[int]:
    """Return the instants at which the account comes to an age that is asked for."""
    created_us = account.created_us()
    if created_us is None:
        return []
    ages = (when.account_age_below_us, when.account_age_above_us)
    return [created_us + age_us for age_us in ages if age_us is not None]


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Hold what may take an account of one plan: its rank, and what else than the plan it asks.

    Where that is `account_age_below` alone, as it mostly is, that stands beside it.
    """

    plain: tuple[tuple[int, int | None, When | None], ...]
    tagged: dict[str, list[tuple[int, When]]]


def _rank(plan: str | None, whens: Sequence[When | None]) -> _Ranked:
    plain: list[tuple[int, int | None, When | None]] = []
    tagged: dict[str, list[tuple[int, When]]] = {}
    for rank, when in enumerate(whens[:-1]):
        if when is not None and when.plan is not None and plan not in when.plan:
            continue
        rest = None if when is None else replace(when, plan=None)
        if rest is None or rest == _NOTHING_ASKED:
            plain.append((rank, None, None))
            break
        if rest.tags:
            # Which of them does not matter: an account that lacks it is none of this tier's.
            tagged.setdefault(min(rest.tags), []).append((rank, rest))
        else:
            below = rest.account_age_below_us
            alone = rest == When(account_age_below_us=below)
            plain.append((rank, below if alone else None, rest))
    else:
        plain.append((len(whens) - 1, None, None))
    return _Ranked(tuple(plain), tagged)
