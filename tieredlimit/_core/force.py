"""What overrides make of one cell: one entry for everybody, or one for each that may win."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from tieredlimit._core.account import Account
from tieredlimit._core.cells import read_cell
from tieredlimit._core.override import Override, choose, settled
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.reading import Reading
from tieredlimit._core.share import ALL_BP, position
from tieredlimit._core.tier import Cell
from tieredlimit.errors import RevisionError

E = TypeVar("E")

_NOBODY = Account("nobody")
# How many begins, ends and entries are looked through for the end of a closure.
_MOST_INSTANTS = 256
# Those who wait for the same instant come back within a tenth of the closure's length, and these.
_LEAST_SPREAD_US = SECOND_US
_MOST_SPREAD_US = 60 * SECOND_US
_POSITIONS = 2**32


class Variants(Generic[E]):
    """Hold what a cell may be, where that depends on more than the tier.

    Args:
        overrides: The active overrides of the feature that may mean accounts of the tier.
        tier: The tier.
        base: What the policy says.
        made: What each override makes of it, by the override's id.
    """

    __slots__ = ("_base", "_by_account", "_made", "_others", "_tier")

    def __init__(
        self, overrides: Sequence[Override], tier: str, base: E, made: dict[str, E]
    ) -> None:
        self._by_account: dict[str, list[Override]] = {}
        self._others = [one for one in overrides if one.who.account is None]
        for one in overrides:
            if one.who.account is not None:
                self._by_account.setdefault(one.who.account, []).append(one)
        self._tier = tier
        self._base = base
        self._made = made

    def of(self, account: Account, now: int) -> tuple[E, int, int | None]:
        """Return what it is for an account, and the instants around `now` for which that holds."""
        overrides = self._others
        own = self._by_account.get(account.id)
        if own is not None:
            overrides = [*overrides, *own]
        winner = choose(overrides, account, self._tier, now)
        since, before = settled(overrides, account, now)
        return (self._base if winner is None else self._made[winner.id]), since, before

    def of_nobody(self, now: int) -> E:
        """Return what it is for whom nobody knows: only what all of the tier are told counts."""
        told = [
            one
            for one in self._others
            if one.who.when is None and (one.share is None or one.share.bp_at(now) == ALL_BP)
        ]
        winner = choose(told, _NOBODY, self._tier, now)
        return self._base if winner is None else self._made[winner.id]

    def all(self) -> list[E]:
        """Return everything that it may be."""
        return [self._base, *self._made.values()]


def in_force(
    overrides: Sequence[Override],
    tier: str,
    base: E,
    now: int,
    make: Callable[[Override], E],
) -> E | Variants[E]:
    """Return what a cell is under the overrides of its feature at the instant `now`.

    `make` returns what an override that closes or sets makes of it.
    """
    active = [one for one in overrides if one.active(now) and one.who.tier in (None, tier)]
    if not active:
        return base
    made = {one.id: base if one.action == "open" else make(one) for one in active}
    if any(one.who.specificity > 1 or one.share is not None for one in active):
        return Variants(active, tier, base, made)
    winner = choose(active, _NOBODY, tier, now)
    return base if winner is None else made[winner.id]


def overridden(cell: Cell, override: Override) -> Cell:
    """Return the cell that an override which closes or sets puts in a cell's place.

    Raises:
        RevisionError: Its quotas cannot be read.
    """
    messages = override.messages or cell.messages
    if override.action == "close":
        return replace(
            cell,
            quotas=(),
            unlimited=False,
            messages=override.messages,
            closed_until_us=override.end_us,
        )
    reading = Reading()
    content = read_cell(reading, f"overrides.{override.id}", cell.feature, override.quotas)
    if content is None:
        raise RevisionError(reading.faults)
    return replace(cell, quotas=content.quotas, unlimited=content.unlimited, messages=messages)


def reopens_in(
    closure: Override, overrides: Sequence[Override], account: Account, tier: str, now: int
) -> int | None:
    """Return the microseconds until a closure lets an account in again, None where none are known.

    Where many wait for the same instant each is told a time of its own, only ever later.
    """
    place = position(closure.feature, account.id)
    overrides = [
        one
        for one in overrides
        if one.who.account in (None, account.id) and one.who.tier in (None, tier)
    ]
    shared: set[int] = set()
    own: set[int] = set()
    for one in overrides:
        shared.update(at for at in (one.begin_us, one.end_us) if at is not None and at > now)
        entered_at = None if one.share is None else one.share.enters_at(place)
        if entered_at is not None and entered_at > now:
            own.add(entered_at)
    for at in sorted(shared | own)[:_MOST_INSTANTS]:
        winner = choose(overrides, account, tier, at)
        if winner is None or not winner.closes:
            if at in own:
                return at - now
            tenth = (at - (closure.begin_us or closure.made_us)) // 10
            spread = min(max(tenth, _LEAST_SPREAD_US), _MOST_SPREAD_US)
            return at - now + spread * place // _POSITIONS
    return None
