"""Finding the tier of an account: the first whose `when` it meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tieredlimit._core.account import Account
from tieredlimit._core.condition import When

_NOTHING_ASKED = When()


class Ranking:
    """Rank tiers for each plan, so that few of them have to be asked.

    An account's plan leaves those that ask for it or for none, in their order; of these, tiers that
    ask for tags stand apart, each under one of its tags, and only those under a tag that the
    account carries are asked.

    Args:
        whens: The tiers' conditions in the order of the policy, None for everybody. The last tier
            takes whom no other one does.
    """

    __slots__ = ("_by_plan", "_planless")

    def __init__(self, whens: Sequence[When | None]) -> None:
        plans = {plan for when in whens if when is not None for plan in when.plan or ()}
        self._by_plan = {plan: _rank(plan, whens) for plan in plans}
        self._planless = _rank(None, whens)

    def first(self, account: Account, now: int) -> int:
        """Return which tier takes the account at the instant `now`, counted from 0."""
        plan = account.plan
        ranked = self._planless if plan is None else self._by_plan.get(plan, self._planless)
        for found, below, when in ranked.plain:  # noqa: B007 -- what it is left at is the tier
            if when is None:
                break
            if below is not None:
                created_us = account.created_us()
                if created_us is None or now - created_us < below:
                    break
            elif when.failing_word(account, now) is None:
                break
        if ranked.tagged and account.tags:
            for tag in account.tags:
                for rank, when in ranked.tagged.get(tag, ()):
                    if rank >= found:
                        break
                    if when.failing_word(account, now) is None:
                        found = rank
                        break
        return found


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
