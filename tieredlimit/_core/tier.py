"""What a policy is made of: features, tiers, and the cell that each pair of them gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tieredlimit._core.condition import When
from tieredlimit._core.pool import Pool
from tieredlimit._core.quota import Quota
from tieredlimit._core.routes import Route

if TYPE_CHECKING:
    from fractions import Fraction

_AMOUNT = re.compile(r"\s*([0-9]+)")

Outage = Literal["allow", "deny", "local"]


def default_outage_share() -> Fraction:
    """Return the share of each quota that a process gives out by itself, where none is said."""
    from fractions import Fraction  # it brings decimal, and importing tieredlimit needs neither

    return Fraction(1, 10)


@dataclass(frozen=True, slots=True)
class Cell:
    """Say what one tier may do with one feature.

    Attributes:
        feature: The feature's name.
        tier: The tier's name.
        quotas: The quotas, all of which must allow. Empty means zero, unless `unlimited`.
        unlimited: True where nothing limits.
        messages: What a denied user reads, by language tag, the first being the default; "" is the
            tag of a text whose language is not said. Empty means the built-in text.
        shadow: The cell that is measured beside this one and never enforced, None for none.
        closed_until_us: Where an override has closed it, the instant at which that ends, in
            microseconds; None until further notice.
    """

    feature: str
    tier: str
    quotas: tuple[Quota, ...]
    unlimited: bool
    messages: Mapping[str, str]
    shadow: Cell | None = None
    closed_until_us: int | None = None

    @property
    def zero(self) -> bool:
        """Say whether the cell denies everything."""
        return not self.quotas and not self.unlimited

    def spell(self) -> str:
        """Return the cell as an operator reads it."""
        if not self.quotas:
            return "unlimited" if self.unlimited else "0"
        return " + ".join(_spell_quota(quota) for quota in self.quotas)


@dataclass(frozen=True, slots=True)
class Feature:
    """Describe what is metered.

    Attributes:
        name: Its name.
        routes: The requests that count, with their costs.
        outage: What they get while the store cannot be asked.
        outage_share: The share of each quota that every process gives out then, if `local`.
        pool: The capacity that all accounts share, None for none.
        refund_on: The statuses with which a request costs nothing after all.
        refund_on_exception: Whether one costs nothing whose handler raises before it answers.
    """

    name: str
    routes: tuple[tuple[Route, int], ...]
    outage: Outage
    pool: Pool | None = None
    refund_on: frozenset[int] = frozenset()
    refund_on_exception: bool = False
    outage_share: Fraction = field(default_factory=default_outage_share)

    @property
    def refunds(self) -> bool:
        """Say whether the end of a request may give back what it was charged."""
        return self.refund_on_exception or bool(self.refund_on)


@dataclass(frozen=True, slots=True)
class Tier:
    """Describe a row: whom it takes in (`when`, None for everybody) and a cell per feature."""

    name: str
    when: When | None
    cells: Mapping[str, Cell]


def _spell_quota(quota: Quota) -> str:
    text = quota.rate
    amount = _AMOUNT.match(text)
    if amount is None or int(amount[1]) != quota.capacity:
        text = f"{text} cap {quota.capacity}"
    if quota.per:
        text = f"{text} per {quota.per}"
    return text if quota.concurrency is None else f"{text}, {quota.concurrency} at once"
