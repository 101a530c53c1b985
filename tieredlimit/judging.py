"""From a cell, and what its buckets hold, to a decision."""

from __future__ import annotations

from collections.abc import Sequence

from tieredlimit._core.account import Account
from tieredlimit._core.bucket import wait_us
from tieredlimit._core.force import reopens_in
from tieredlimit._core.override import Override
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.reading import did_you_mean, spell
from tieredlimit._core.table import Entry, Table
from tieredlimit._core.tier import Cell
from tieredlimit.decision import Decision, Reason
from tieredlimit.demanded import Demanded, pool_wait_us
from tieredlimit.errors import UsageError

_LONGEST_NAME = 32


def checked(table: Table, account: Account, feature: str, cost: int, now: int) -> Entry:
    """Return the cell of an account and a feature at the instant `now`.

    Raises:
        UsageError: The feature is unknown, or the cost is none.
    """
    if type(cost) is not int or not 0 <= cost <= MAX_AMOUNT:
        raise UsageError(
            f"cost must be a whole number from 0 to {MAX_AMOUNT:,}, got {_spell_cost(cost)}"
        )
    require_account(account)
    found = table.find(account, feature, now) if type(feature) is str else None
    return found or named(table, table.tier_of(account, now), feature)


def require_account(account: object) -> None:
    """Check that what is charged is an account.

    Raises:
        UsageError: It is none; such as an id alone.
    """
    if not isinstance(account, Account):
        kind = type(account).__name__
        raise UsageError(f"who is charged is an Account, got a value of type {kind}")


def named(table: Table, tier: str, feature: str) -> Entry:
    """Return the cell of a tier and a feature.

    Raises:
        UsageError: The feature is unknown.
    """
    # A feature may come from a request's body: of any type, of any length.
    if type(feature) is not str:
        raise UsageError(f"a feature's name is a string, got {type(feature).__name__}")
    try:
        return table.entry(tier, feature)
    except KeyError:
        known = list(table.policy.features)
        hint = did_you_mean(feature[:_LONGEST_NAME], known)
        raise UsageError(
            f"unknown feature {spell(feature)}{hint}; known are {', '.join(known)}"
        ) from None


def settled(entry: Entry, cost: int, *, asks: bool) -> Decision | None:
    """Return the decision that no bucket can change, None where a store has to say something.

    That is also whether an unlimited cell still is, if the store `asks` for no more than that.
    """
    cell = entry.cell
    if entry.most is None:
        if not cell.unlimited:
            return Decision(False, "zero", cell, cost)
        return None if asks else Decision(True, "allowed", cell, cost)
    if cost > entry.most:
        reason: Reason = "quota"
        if all(cost <= quota.capacity for quota in entry.quotas):
            reason = "pool"
        demanded = Demanded(entry, cost, allowed=False) if entry.demands else None
        return Decision(False, reason, cell, cost, None, entry.quotas, demanded=demanded)
    return None


def unlimited(feature: str, cost: int) -> Decision:
    """Return the decision where no policy limits a feature: allowed, in no tier ("")."""
    return Decision(True, "allowed", Cell(feature, "", (), unlimited=True, messages={}), cost)


def closed(
    table: Table, entry: Entry, closure: Override, cost: int, account: Account | None, now: int
) -> Decision:
    """Return the denial of a closed cell; nobody's has no time at which to come back."""
    cell = entry.cell
    retry_after = None
    if account is not None:
        overrides = table.overrides.get(closure.feature, [])
        wait = reopens_in(closure, overrides, account, cell.tier, now)
        retry_after = None if wait is None else wait / SECOND_US
    return Decision(False, "closed", cell, cost, retry_after)


def denial_of(entry: Entry, cost: int, debts: Sequence[int]) -> Decision:
    """Return the denial of a cost by buckets as they stand."""
    latest = 0
    # As `wait_us`: a cost that never fits was denied before any bucket was asked.
    for quota, debt in zip(entry.quotas, debts, strict=True):
        latest = max(latest, debt + cost * quota.interval_us - quota.reach_us)
    return Decision(False, "quota", entry.cell, cost, latest / SECOND_US, entry.quotas, debts)


def demanding_denial(
    entry: Entry, cost: int, debts: Sequence[int], held: Sequence[int] = ()
) -> Decision:
    """Return the denial of a cell that asks for more than its own buckets, by how all stands.

    `debts` are those of its quotas, and then of its pool's bucket; `held` are the slots that others
    hold. The account's own limits come first: what nobody else's going can change.
    """
    own = debts[: len(entry.quotas)]
    waits = [wait_us(quota, debt, cost) or 0 for quota, debt in zip(entry.quotas, own, strict=True)]
    own_us = max(waits, default=0)
    pool_debt = debts[-1] if len(debts) > len(own) else None
    pool_us = 0 if pool_debt is None else pool_wait_us(entry, cost, pool_debt)
    demanded = Demanded(entry, cost, allowed=False, pool_debt=pool_debt, held=held)
    reason: Reason
    if own_us:
        reason = "quota"
    elif any(one.denies and not one.pool for one in demanded.slots):
        reason = "concurrency"
    else:
        reason = "pool"
    retry_after = None
    if reason != "concurrency" and (own_us or pool_us):
        retry_after = max(own_us, pool_us) / SECOND_US
    return Decision(False, reason, entry.cell, cost, retry_after, entry.quotas, own, b"", demanded)


def pool_denial(entry: Entry, cost: int, debt: int) -> Decision:
    """Return the denial of a pool that was asked by others, a moment ago."""
    demanded = Demanded(entry, cost, allowed=False, pool_debt=debt)
    wait = pool_wait_us(entry, cost, debt) / SECOND_US
    return Decision(False, "pool", entry.cell, cost, wait, entry.quotas, demanded=demanded)


def judged_demanding(
    entry: Entry, cost: int, debts: Sequence[int], held: Sequence[int]
) -> Decision:
    """Return what a take would decide, where more than the account's own buckets is asked for."""
    denial = demanding_denial(entry, cost, debts, held)
    if denial.retry_after or any(one.denies for one in denial.slots):
        return denial
    return denial._replace(allowed=True, reason="allowed", policy=entry.policy_field)


def judged(entry: Entry, cost: int, debts: Sequence[int]) -> Decision:
    """Return what a take would decide of buckets as they stand."""
    decision = denial_of(entry, cost, debts)
    if decision.retry_after:
        return decision
    policy = entry.policy_field
    return Decision(True, "allowed", entry.cell, cost, None, entry.quotas, debts, policy)


def _spell_cost(cost: object) -> str:
    if type(cost) is int and abs(cost) > MAX_AMOUNT**2:
        return f"one of {cost.bit_length()} bits"  # which Python may refuse to spell
    return f"{cost!r:.80}"
