"""The order of the tiers: reading it, and checking that somebody reaches each of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tieredlimit._core.condition import When
from tieredlimit._core.reading import Reading, did_you_mean, join, spell


def read_order(reading: Reading, value: Any, tiers: Collection[str]) -> list[str] | None:
    """Read the order in which tiers are tried; None where it has a fault."""
    if not isinstance(value, list):
        reading.fault("order", f"must be a list of tier names, got {spell(value)}")
        return None
    before = len(reading.faults)
    first: dict[str, int] = {}
    for i, name in enumerate(value):
        place = f"order[{i}]"
        if not isinstance(name, str):
            reading.fault(place, f"must be the name of a tier, got {spell(name)}")
        elif name not in tiers:
            reading.fault(place, f"unknown tier {spell(name)}{did_you_mean(name, tiers)}")
        elif first.setdefault(name, i) != i:
            reading.fault(place, f"{spell(name)} stands at order[{first[name]}] already")
    for name in tiers:
        if name not in first:
            reading.fault("order", f"leaves out the tier {spell(name)}")
    return value if len(reading.faults) == before else None


def check_reach(
    reading: Reading, order: Sequence[str], whens: Mapping[str, When | None], faulty: set[str]
) -> None:
    """Note tiers that no account can reach, and a last tier that does not take everybody.

    A tier whose `when` is `faulty` is neither judged nor taken to keep accounts from another.
    """
    last = order[-1]
    before: list[tuple[str, When]] = []
    for name in order:
        when, path = whens[name], join("tiers", name)
        if name in faulty:
            continue
        if when is None:
            if name != last:
                reading.fault(path, "has no `when`: no account reaches the tiers after it")
            continue
        if name == last:
            reading.fault(f"{path}.when", "the last tier takes everybody else: it has no `when`")
        takers = [_taker(part, before) for part in when.parts()]
        if None not in takers:
            names = ", ".join(dict.fromkeys(taker for taker in takers if taker))
            reading.fault(path, f"is unreachable: every account it wants is taken by {names}")
        before.append((name, when))


def _taker(part: When, tiers: Sequence[tuple[str, When]]) -> str | None:
    """Return the first tier that takes every account that matches, None if none does."""
    return next((name for name, when in tiers if when.covers(part)), None)
