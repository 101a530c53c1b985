"""Which override counts for an account, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tieredlimit._core.account import Account
from tieredlimit._core.cells import read_cell
from tieredlimit._core.draft import spell_percent
from tieredlimit._core.override import Override, choose, position
from tieredlimit._core.policy import Policy
from tieredlimit._core.reading import Reading
from tieredlimit._core.revision import Revision
from tieredlimit._core.tier import Cell
from tieredlimit.cli.spelled import brief, sentence


@dataclass(frozen=True, slots=True)
class Ruling:
    """Say what becomes of one override for an account.

    Attributes:
        override: The override.
        wins: Whether it decides.
        why: Why, or why not.
    """

    override: Override
    wins: bool
    why: str

    def line(self, now: int) -> str:
        """Return it as operators read it."""
        return f"{sentence(self.override, now)}; {self.why}"


def rule(
    revision: Revision, feature: str, account: Account, tier: str, now: int
) -> tuple[Override | None, list[Ruling]]:
    """Return the override that decides, None where the policy does, and a word on each of them."""
    concerned = [one for one in revision.overrides if one.feature == feature]
    winner = choose(concerned, account, tier, now)
    rulings = [
        Ruling(one, one is winner, _why(one, winner, account, tier, now)) for one in concerned
    ]
    return winner, sorted(rulings, key=lambda ruling: not ruling.wins)


def cell_under(policy: Policy, tier: str, feature: str, override: Override | None) -> Cell:
    """Return what a tier may do with a feature while an override decides.

    One that closes leaves the quotas: nobody gets at them.
    """
    cell = policy.cell(tier, feature)
    if override is None or override.action == "open":
        return cell
    if override.action == "close":
        # The policy's messages are for what the policy denies: none of them is said here.
        return replace(cell, messages=override.messages, closed_until_us=override.end_us)
    content = read_cell(Reading(), "quotas", feature, override.quotas)
    if content is None:  # as no revision that was read can have it
        return cell
    messages = override.messages or cell.messages
    return replace(cell, quotas=content.quotas, unlimited=content.unlimited, messages=messages)


def policy_under(policy: Policy, cell: Cell) -> Policy:
    """Return a policy that says of one tier and feature what a cell says."""
    tiers = [
        replace(tier, cells={**tier.cells, cell.feature: cell}) if tier.name == cell.tier else tier
        for tier in policy.tiers
    ]
    return replace(policy, tiers=tuple(tiers))


def pers_of(policy: Policy, overrides: Sequence[Override]) -> set[str]:
    """Return the subjects around an account that anything in force charges."""
    cells = [cell for tier in policy.tiers for cell in tier.cells.values()]
    contents = [
        read_cell(Reading(), "quotas", one.feature, one.quotas)
        for one in overrides
        if one.action == "set"
    ]
    quotas = [quota for cell in cells for quota in cell.quotas]
    quotas += [quota for content in contents if content for quota in content.quotas]
    return {quota.per for quota in quotas if quota.per is not None}


def _why(one: Override, winner: Override | None, account: Account, tier: str, now: int) -> str:
    if one is winner:
        return "it decides"
    if not one.active(now):
        if one.begin_us is not None and now < one.begin_us:
            return "not yet"
        return "over"
    who = one.who
    if not who.matches(account, tier, now):
        if who.account is not None:
            return "this is another account"
        if who.tier not in (None, tier):
            return f"this one is in tier {tier}"
        word = who.when.failing_word(account, now) if who.when else None
        return f"this one does not meet {word}" if word else "this one is not meant"
    if winner is None or not one.counts(account, tier, now):
        return _share(one, account)
    if winner.no_exceptions and one.sequence < winner.sequence:
        return f"{winner.id} is newer and without exceptions"
    if winner.who.specificity > who.specificity:
        return f"{winner.id} is more specific"
    if one.sequence < winner.sequence and winner.who.specificity == who.specificity:
        return f"{winner.id} is newer"
    return "a newer one without exceptions took it away"


def _share(one: Override, account: Account) -> str:
    if one.share is None:
        return "does not count"
    enters_at = one.share.enters_at(position(one.feature, account.id))
    if enters_at is None:
        return f"this one is outside of the {spell_percent(one.share.start_bp)}"
    return f"this one enters at {brief(enters_at)}"
