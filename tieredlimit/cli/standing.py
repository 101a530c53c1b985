"""How the pool and the slots that a take asks for stand, and whether they are in its way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tieredlimit._core.account import Account
from tieredlimit._core.bucket import wait_us
from tieredlimit._core.explanation import spell_about
from tieredlimit._core.policy import Policy
from tieredlimit._core.pool import Pool
from tieredlimit._core.quota import Quota
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.revision import Revision
from tieredlimit._core.table import Entry, Table
from tieredlimit._core.tier import Cell, Feature
from tieredlimit.cli.inforce import policy_under
from tieredlimit.cli.pools import (
    Level,
    count_held,
    heading,
    left,
    level_document,
    levels,
    pool_document,
    reached,
    share_document,
    state,
    users,
)
from tieredlimit.cli.session import Session
from tieredlimit.cli.terminal import count
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError
from tieredlimit.judging import judged_demanding


@dataclass(frozen=True, slots=True)
class Held:
    """Hold how many slots of one subject, or of the pool, are held.

    Attributes:
        name: The quota, or the pool, that limits them.
        whose: Whose they are, as an operator reads it.
        limit: How many this take's tier may fill.
        held: How many are held, None where that depends on an account that was not named.
        pool: Whether they are the pool's: those of the account's slice.
    """

    name: str
    whose: str
    limit: int
    held: int | None
    pool: bool

    @property
    def denies(self) -> bool:
        """Whether none is free."""
        return self.held is not None and self.held >= self.limit

    def line(self, tier: str) -> str:
        """Return it as operators read it."""
        if self.held is None:
            return f"{self.name}: {self.limit:,} at once; say with --account whose are held"
        if self.pool:
            told = f"{self.whose}: {self.held:,} held, and tier {tier} may fill {self.limit:,}"
        else:
            told = f"{self.name}: {self.held:,} of {self.limit:,} held by {self.whose}"
        return f"{told}: in the way, for none is free" if self.denies else told


@dataclass(frozen=True, slots=True)
class Standing:
    """Hold what a take asks for beside the account's own buckets.

    Attributes:
        pool: The feature's pool, None where it has none or its tier may take nothing.
        features: All features of the pool.
        tier: The account's tier.
        cost: What it takes.
        level: How the pool stands, or why that is not known; None where nobody was asked.
        part: The account's slice of it, None where that is not known.
        slots: The slots, where they were asked for.
        decision: What a take would get from full buckets of its own, as all of this stands; None
            where nobody was asked.
    """

    pool: Pool | None
    features: Sequence[str]
    tier: str
    cost: int
    level: Level | BackendError | None = None
    part: int | None = None
    slots: Sequence[Held] = ()
    decision: Decision | None = None

    @property
    def seen(self) -> Quota | None:
        """A slice of the pool, as takes of the tier see it."""
        return None if self.pool is None else self.pool.seen_by(self.tier)

    @property
    def debt(self) -> int | None:
        """The microseconds until the account's slice is full, None where that is not known."""
        if isinstance(self.level, Level) and self.part is not None:
            return self.level.debts[self.part]
        return None

    @property
    def room(self) -> int | None:
        """The tokens that this take could get: of a full pool, where it was not asked."""
        if self.pool is None or self.seen is None:
            return None
        if isinstance(self.level, Level) and self.part is not None:
            return max(0, self.level.slices[self.part] - self.seen.leave)
        return self.seen.capacity - self.seen.leave


def unasked(policy: Policy, cell: Cell, cost: int) -> Standing:
    """Return what a take asks for, where nobody is asked how it stands."""
    pool = None if cell.zero else policy.features[cell.feature].pool
    return Standing(pool, [] if pool is None else users(policy, pool), cell.tier, cost)


def demanding(policy: Policy, cell: Cell) -> bool:
    """Say whether a take of a cell asks for a pool or for slots."""
    has_slots = any(quota.concurrency is not None for quota in cell.quotas)
    return not cell.zero and (has_slots or policy.features[cell.feature].pool is not None)


async def asked(
    opened: Session,
    policy: Policy,
    head: Revision,
    cell: Cell,
    account: Account,
    cost: int,
    *,
    anybody: bool,
) -> Standing:
    """Return what a take asks for, and how it stands in a namespace.

    `anybody` says that the account's id is none: what hangs on it counts as free.
    """
    plain = unasked(policy, cell, cost)
    namespace, shards = opened.place.namespace, opened.shards
    now = await opened.store.now()
    # The one knows where accounts live, the other what the cell says while it is closed, too.
    table = Table(policy, namespace, shards, overrides=head.overrides, now=now)
    secret = None if anybody and not account.within else opened.secret
    under = Table(policy_under(policy, cell), namespace, shards, secret=secret)
    entry = under.entry(cell.tier, cell.feature)
    shard, slice_ = table.place_of(account, entry)
    part = slice_ if plain.pool is None or plain.pool.slices == 1 or not anybody else None
    level = None
    if plain.pool is not None:
        level = (await levels(opened, [plain.pool]))[plain.pool.name]
    slots = await _slots(opened, entry, account, shard, level, part, now, anybody=anybody)
    told = replace(plain, level=level, part=part, slots=slots)
    debts = [0] * len(entry.quotas) + ([told.debt or 0] if plain.pool is not None else [])
    decision = judged_demanding(entry, cost, debts, [held.held or 0 for held in slots])
    return replace(told, decision=decision)


def pool_paragraphs(standing: Standing) -> Iterator[str]:
    """Yield what is to be said of the pool."""
    pool, tier = standing.pool, standing.tier
    if pool is None:
        return
    yield heading(pool, standing.features).removeprefix("pool ")
    leaves, reaches = left(pool, tier).told(), reached(pool, tier).told()
    yield f"  tier {tier} leaves {leaves}, and reaches {reaches}"
    level, seen = standing.level, standing.seen
    if level is None:
        return
    if not isinstance(level, Level):
        yield f"  now {state(level)}"
        return
    yield f"  now {state(level)}: tier {tier} can take {level.free(tier).told()}"
    debt = standing.debt
    if pool.slices > 1:
        if standing.part is None or seen is None:
            yield "  which slice it is depends on the account: say which with --account"
        else:
            held = level.slices[standing.part]
            yield f"  the account's slice holds {held:,} tokens, of which {seen.leave:,} must stay"
    if debt is not None and seen is not None:
        yield f"  {_fit(seen, debt, standing.cost)}"


def slot_paragraphs(standing: Standing) -> list[str]:
    """Return what is to be said of the slots."""
    return [held.line(standing.tier) for held in standing.slots]


def refund_paragraph(feature: Feature) -> str | None:
    """Return which requests cost nothing after all, None where all do."""
    if not feature.refunds:
        return None
    parts = []
    if feature.refund_on:
        listed = ", ".join(map(str, sorted(feature.refund_on)))
        parts.append(f"a request that is answered with {listed} costs nothing")
    if feature.refund_on_exception:
        parts.append("a request whose handler raises costs nothing")
    return "; ".join(parts)


def standing_document(standing: Standing) -> dict[str, Any]:
    """Return it as JSON shows it; None stands for what nobody was asked, or does not know."""
    pool, tier = standing.pool, standing.tier
    told = None
    if pool is not None:
        told = {
            "name": pool.name,
            **pool_document(pool, standing.features),
            **share_document(pool, tier),
            "now": level_document(standing.level, [tier]),
            "slice": _slice_document(standing),
        }
    slots = [
        {
            "name": one.name,
            "pool": one.pool,
            "limit": one.limit,
            "held": one.held,
            "denies": one.denies,
        }
        for one in standing.slots
    ]
    return {"pool": told, "slots": slots}


async def _slots(
    opened: Session,
    entry: Entry,
    account: Account,
    shard: int,
    level: Level | BackendError | None,
    part: int | None,
    now: int,
    *,
    anybody: bool,
) -> list[Held]:
    """Return how the slots of a cell stand, in the order in which a take asks for them."""
    demands = entry.demands
    if demands is None:
        return []
    quotas = [quota for quota in entry.cell.quotas if quota.concurrency is not None]
    keys = [key for key, _, _ in demands.slots(account, shard, part or 0)]
    told = await opened.nodes.ask_all([(key, count_held(key, now)) for key in keys[: len(quotas)]])
    found = []
    for quota, reply in zip(quotas, told, strict=True):
        if isinstance(reply, BackendError):
            raise reply
        subject = account.within.get(quota.per) if quota.per is not None else None
        whose = "the account" if subject is None else f"{quota.per} {subject}"
        known = subject is not None or not anybody
        limit = quota.concurrency or 0
        found.append(Held(quota.name, whose, limit, reply if known else None, pool=False))
    if demands.pool is not None and demands.pool.quota.concurrency is not None:
        held = level.held[part] if isinstance(level, Level) and part is not None else None
        pool, limit = demands.pool.pool, demands.pool.quota.concurrency
        whose = f"pool {pool.name}" if pool.slices == 1 else f"its slice of pool {pool.name}"
        found.append(Held(pool.name, whose, limit, held, pool=True))
    return found


def _fit(seen: Quota, debt: int, cost: int) -> str:
    wait = wait_us(seen, debt, cost)
    if wait is None:
        return f"in the way: it never has {count(cost, 'token')} for this tier"
    if not wait:
        return f"not in the way of {count(cost, 'token')}"
    fit = "fits" if cost == 1 else "fit"
    return f"in the way: {count(cost, 'token')} {fit} in {spell_about(wait)}, if nobody takes any"


def _slice_document(standing: Standing) -> dict[str, Any] | None:
    """Return the account's slice, None where it is not known."""
    seen, debt = standing.seen, standing.debt
    if seen is None or debt is None or standing.part is None:
        return None
    wait = wait_us(seen, debt, standing.cost)
    return {
        "number": standing.part,
        "capacity": seen.capacity,
        "leaves": seen.leave,
        "denies": wait is None or wait > 0,
        "retry_after": None if wait is None else wait / SECOND_US,
    }
