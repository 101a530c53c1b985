"""What a policy is made of: features, tiers, and the cell that each pair of them gets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tieredlimit._core.condition import When
from tieredlimit._core.quota import Quota
from tieredlimit._core.routes import Route

_AMOUNT = re.compile(r"\s*([0-9]+)")

Outage = Literal["allow", "deny"]


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
    """

    feature: str
    tier: str
    quotas: tuple[Quota, ...]
    unlimited: bool
    messages: Mapping[str, str]
    shadow: Cell | None = None

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
    """Describe what is metered: its routes with their costs, and the answer during an outage."""

    name: str
    routes: tuple[tuple[Route, int], ...]
    outage: Outage


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
    return f"{text} per {quota.per}" if quota.per else text
