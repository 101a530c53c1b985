"""What a limiter has decided, kept for a test to look at."""

from __future__ import annotations

from typing import NamedTuple

from tieredlimit._core.account import Account
from tieredlimit.decision import Decision, Reason
from tieredlimit.errors import UsageError

__all__ = ["Recorded", "RecordingObserver"]

_MOST_TOLD = 30


class Recorded(NamedTuple):
    """Hold one decision, and whose it was.

    Attributes:
        decision: The decision.
        account: Who was to be charged.
        shadow: Whether it was only measured.
    """

    decision: Decision
    account: Account
    shadow: bool

    def __str__(self) -> str:
        decision, account = self.decision, self.account
        answer = "allowed" if decision.allowed else "denied"
        if decision.reason != "allowed":
            answer += f" ({decision.reason})"
        left = "" if decision.remaining is None else f", {decision.remaining} left"
        who = f"{account.id}{' (an address)' if account.anonymous else ''}"
        measured = ", in shadow" if self.shadow else ""
        return (
            f"{decision.feature}: {answer}, {who} in tier {decision.tier}, "
            f"cost {decision.cost}{left}{measured}"
        )


class RecordingObserver:
    """Keep every decision of the limiters that have it: `Limiter(…, observers=[recording])`.

    Where an assertion fails it lists what was decided instead.

    Attributes:
        decisions: All of them, in their order, shadow included.
        outages: The feature and the error of each decision that could not be made.
        revisions: The number and the digest of each revision that came into force.
    """

    def __init__(self) -> None:
        self.decisions: list[Recorded] = []
        self.outages: list[tuple[str, Exception]] = []
        self.revisions: list[tuple[int, str]] = []

    def __str__(self) -> str:
        if not self.decisions:
            return "nothing was decided"
        told = [f"{i}. {one}" for i, one in enumerate(self.decisions, start=1)][-_MOST_TOLD:]
        more = len(self.decisions) - len(told)
        return "\n".join([f"({more} before these)", *told] if more else told)

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        """Keep a decision."""
        self.decisions.append(Recorded(decision, account, shadow))

    def on_outage(self, feature: str, error: Exception) -> None:
        """Keep why there was none."""
        self.outages.append((feature, error))

    def on_revision(self, number: int, digest: str) -> None:
        """Keep a revision."""
        self.revisions.append((number, digest))

    def clear(self) -> None:
        """Forget what was kept so far."""
        self.decisions.clear()
        self.outages.clear()
        self.revisions.clear()

    def of(
        self,
        feature: str | None = None,
        *,
        account: Account | str | None = None,
        tier: str | None = None,
        allowed: bool | None = None,
        reason: Reason | None = None,
        shadow: bool = False,
    ) -> list[Recorded]:
        """Return the decisions for which all that is given holds.

        `account` is one, or an id; None is whatever. Those in shadow are apart.
        """
        id_ = account.id if isinstance(account, Account) else account
        return [
            one
            for one in self.decisions
            if one.shadow == shadow
            and feature in (None, one.decision.feature)
            and id_ in (None, one.account.id)
            and tier in (None, one.decision.tier)
            and allowed in (None, one.decision.allowed)
            and reason in (None, one.decision.reason)
        ]

    def assert_allowed(
        self,
        feature: str,
        *,
        times: int | None = None,
        account: Account | str | None = None,
        tier: str | None = None,
    ) -> None:
        """Fail unless a feature was allowed, at least once or just so many times; 0 is never.

        Raises:
            AssertionError: It was not; the message lists what was decided.
        """
        found = self.of(feature, account=account, tier=tier, allowed=True)
        self._require(found, times, f"{feature} to be allowed", account, tier)

    def assert_denied(
        self,
        feature: str,
        reason: Reason | None = None,
        *,
        times: int | None = None,
        account: Account | str | None = None,
        tier: str | None = None,
    ) -> None:
        """Fail unless a feature was denied, as `assert_allowed`; `reason` is why, None whatever.

        Raises:
            AssertionError: It was not; the message lists what was decided.
        """
        found = self.of(feature, account=account, tier=tier, allowed=False, reason=reason)
        why = "" if reason is None else f" ({reason})"
        self._require(found, times, f"{feature} to be denied{why}", account, tier)

    def _require(
        self,
        found: list[Recorded],
        times: int | None,
        what: str,
        account: Account | str | None,
        tier: str | None,
    ) -> None:
        if times is not None and (type(times) is not int or times < 0):
            raise UsageError(f"times must be a whole number from 0, got {times!r:.80}")
        if len(found) == times or (times is None and found):
            return
        id_ = account.id if isinstance(account, Account) else account
        whom = "" if id_ is None else f" to {id_}"
        where = "" if tier is None else f" in tier {tier}"
        often = "" if times is None else f" {times} time{'' if times == 1 else 's'}"
        but = "never" if not found else f"{len(found)} time{'' if len(found) == 1 else 's'}"
        raise AssertionError(f"expected {what}{whom}{where}{often}, it was {but}:\n{self}")
