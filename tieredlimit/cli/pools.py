"""The pools of a policy: what each tier leaves and reaches, and how they stand right now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from struct import pack
from typing import Any

import click

from tieredlimit._core.bucket import remaining
from tieredlimit._core.demands import PoolPart
from tieredlimit._core.policy import Policy
from tieredlimit._core.pool import Pool
from tieredlimit._core.rate import SECOND_US, spell_duration
from tieredlimit.cli.grid import grid
from tieredlimit.cli.session import Session
from tieredlimit.cli.terminal import count, folded, width
from tieredlimit.errors import BackendError

# Giving nothing back is how a bucket is read by the clock of the server that holds it.
_REFUND = files("tieredlimit.backends").joinpath("lua/refund.lua").read_text("utf-8")

_NARROWEST = 20


@dataclass(frozen=True, slots=True)
class Level:
    """Hold how a pool stands.

    Attributes:
        pool: The pool.
        debts: Per slice, the microseconds until it is full.
        held: Per slice, how many of its slots are held; empty where it has none.
    """

    pool: Pool
    debts: tuple[int, ...]
    held: tuple[int, ...]

    @property
    def slices(self) -> tuple[int, ...]:
        """The whole tokens in each slice."""
        part = self.pool.slice
        return tuple(remaining(part, debt) for debt in self.debts)

    def free(self, tier: str) -> Share:
        """Return what takes of a tier can have now, as far as the pool goes."""
        part = self.pool.seen_by(tier)
        tokens = sum(max(0, left - part.leave) for left in self.slices)
        limit = part.concurrency
        if limit is None:
            return Share(tokens, None)
        return Share(tokens, sum(max(0, limit - held) for held in self.held))

    def spell(self) -> str:
        """Return it as operators read it."""
        pool, slices = self.pool, self.slices
        text = f"{sum(slices):,} of {_whole(pool).tokens:,} tokens"
        if len(slices) > 1:
            emptiest = min(slices)
            text = f"{text}, {emptiest:,} of {pool.slice.capacity:,} in the emptiest slice"
        slots = _whole(pool).slots
        return text if slots is None else f"{text}, {sum(self.held):,} of {slots:,} slots held"


@dataclass(frozen=True, slots=True)
class Share:
    """Count tokens of a pool, and slots; None where it has none. All its slices together."""

    tokens: int
    slots: int | None

    def __str__(self) -> str:
        text = f"{self.tokens:,}"
        return text if self.slots is None else f"{text}, {count(self.slots, 'slot')}"

    def told(self) -> str:
        """Return it within a sentence."""
        if not self.tokens and not self.slots:
            return "nothing"
        text = count(self.tokens, "token")
        return text if self.slots is None else f"{text} and {count(self.slots, 'slot')}"


Known = Mapping[str, Level | BackendError]
"""How pools stand, by name, or why nobody knows; a pool that was not asked for is not there."""


def pools_of(policy: Policy, features: Iterable[str] | None = None) -> dict[str, Pool]:
    """Return the pools of some features by name; None is all."""
    chosen = policy.features if features is None else features
    found = (policy.features[name].pool for name in chosen)
    return {pool.name: pool for pool in found if pool is not None}


def reached(pool: Pool, tier: str) -> Share:
    """Return what takes of a tier get at, at most."""
    part = pool.seen_by(tier)
    slots = None if part.concurrency is None else part.concurrency * pool.slices
    return Share((part.capacity - part.leave) * pool.slices, slots)


def left(pool: Pool, tier: str) -> Share:
    """Return what takes of a tier leave."""
    whole, reach = _whole(pool), reached(pool, tier)
    slots = None if whole.slots is None else whole.slots - (reach.slots or 0)
    return Share(whole.tokens - reach.tokens, slots)


async def levels(opened: Session, pools: Iterable[Pool]) -> dict[str, Level | BackendError]:
    """Return how pools stand in a namespace, or why that is not known."""
    asked: list[tuple[str, Sequence[str | bytes | int]]] = []
    now = await opened.store.now()
    parts = [PoolPart.of(pool, "", opened.place.namespace, opened.shards) for pool in pools]
    for part in parts:
        nothing = pack("<4sd", part.quota.tag, 0.0)
        keys = [shelf.prefix for shelf in part.shelves]
        asked += [(key, ("EVAL", _REFUND, 1, key, nothing, "")) for key in keys]
        asked += [(slot.key, count_held(slot.key, now)) for slot in part.slots or ()]
    told = iter(await opened.nodes.ask_all(asked) if asked else ())
    return {part.pool.name: _level(part, told) for part in parts}


def count_held(key: str, now: int) -> tuple[str, ...]:
    """Return the command that counts the slots which are held under a key."""
    return "ZCOUNT", key, f"({now}", "+inf"


def heading(pool: Pool, features: Sequence[str]) -> str:
    """Return what a pool is, and for which features."""
    quota = pool.quota
    rate = " ".join(quota.rate.split())
    parts = [f"pool {pool.name}: {rate} cap {quota.capacity:,}"]
    if quota.concurrency is not None and quota.lease_us is not None:
        slots = count(quota.concurrency, "slot")
        parts.append(f"{slots} with a lease of {spell_duration(quota.lease_us)}")
    if pool.slices > 1:
        parts.append(f"in {pool.slices:,} slices of {pool.slice.capacity:,}")
    return f"{', '.join(parts)}; for {', '.join(features)}"


def lines(
    policy: Policy, features: Sequence[str], tiers: Sequence[str], known: Known
) -> Iterator[str]:
    """Yield each pool of some features: what it is, how it stands, and what tiers get of it."""
    room = max(_NARROWEST, width())
    for name, pool in pools_of(policy, features).items():
        yield ""
        for i, line in enumerate(folded(heading(pool, users(policy, pool)), room)):
            yield line if i else click.style(line, bold=True)
        level = known.get(name)
        if level is not None:
            yield from folded(f"now {state(level)}", room)
        heads = ["tier", "leaves", "reaches"]
        if isinstance(level, Level):
            heads.append("can take now")
        yield from grid(heads, [_row(policy, pool, tier, level)[: len(heads)] for tier in tiers])


def state(level: Level | BackendError) -> str:
    """Return how a pool stands, or why that is not known."""
    return level.spell() if isinstance(level, Level) else f"unknown: {level}"


def document(
    policy: Policy, features: Sequence[str], tiers: Sequence[str], known: Known
) -> dict[str, dict[str, Any]]:
    """Return the pools of some features as JSON shows them, by name; durations are seconds."""
    return {
        name: {
            **pool_document(pool, users(policy, pool)),
            "tiers": {
                tier: {**share_document(pool, tier), "zero": _shut_out(policy, pool, tier)}
                for tier in tiers
            },
            "now": level_document(known.get(name), tiers),
        }
        for name, pool in pools_of(policy, features).items()
    }


def pool_document(pool: Pool, features: Sequence[str]) -> dict[str, Any]:
    """Return a pool as JSON shows it."""
    quota = pool.quota
    return {
        "rate": quota.rate,
        "capacity": quota.capacity,
        "interval": quota.interval_us / SECOND_US,
        "window": quota.window_us / SECOND_US,
        "concurrency": quota.concurrency,
        "lease": None if quota.lease_us is None else quota.lease_us / SECOND_US,
        "slices": pool.slices,
        "features": list(features),
    }


def share_document(pool: Pool, tier: str) -> dict[str, int | None]:
    """Return what a tier leaves and reaches as JSON shows it."""
    leaves, reaches = left(pool, tier), reached(pool, tier)
    return {
        "leaves": leaves.tokens,
        "reaches": reaches.tokens,
        "leaves_slots": leaves.slots,
        "reaches_slots": reaches.slots,
    }


def level_document(level: Level | BackendError | None, tiers: Sequence[str]) -> Any:
    """Return how a pool stands as JSON shows it; None where nobody was asked."""
    if level is None:
        return None
    if isinstance(level, BackendError):
        return {"error": str(level)}
    free = {tier: level.free(tier) for tier in tiers}
    whole = _whole(level.pool)
    return {
        "tokens": sum(level.slices),
        "capacity": whole.tokens,
        "slices": list(level.slices),
        "slots_held": sum(level.held) if level.held else None,
        "slots": whole.slots,
        "can_take": {
            tier: {"tokens": share.tokens, "slots": share.slots} for tier, share in free.items()
        },
    }


def users(policy: Policy, pool: Pool) -> list[str]:
    """Return the features that a pool is for."""
    return [
        name
        for name, feature in policy.features.items()
        if feature.pool is not None and feature.pool.name == pool.name
    ]


def _row(policy: Policy, pool: Pool, tier: str, level: object) -> list[str]:
    if _shut_out(policy, pool, tier):
        return [tier, "-", "0: its cells are 0", "0"]
    free = str(level.free(tier)) if isinstance(level, Level) else ""
    return [tier, str(left(pool, tier)), str(reached(pool, tier)), free]


def _shut_out(policy: Policy, pool: Pool, tier: str) -> bool:
    """Say whether the policy lets a tier have none of the pool's features."""
    return all(policy.cell(tier, name).zero for name in users(policy, pool))


def _whole(pool: Pool) -> Share:
    """Return all there is: what an uneven cut leaves over is in no slice."""
    part = pool.slice
    slots = None if part.concurrency is None else part.concurrency * pool.slices
    return Share(part.capacity * pool.slices, slots)


def _level(part: PoolPart, told: Iterator[Any]) -> Level | BackendError:
    debts = [next(told) for _ in part.shelves]
    held = [next(told) for _ in part.slots or ()]
    refused = next((one for one in (*debts, *held) if isinstance(one, BackendError)), None)
    if refused is not None:
        return refused
    return Level(part.pool, tuple(after for _, after in debts), tuple(held))
