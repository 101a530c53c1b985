"""The order of the tiers: reading it, and checking that somebody reaches each of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tieredlimit._core.condition import When
from tieredlimit._core.reading import Reading, did_you_mean, join, spell

# Into how many ranges of ages those are cut at most whom no tier has taken yet: with more of them
# a tier may count as reachable that is not, and never the other way round.
_MOST_PIECES = 16


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
        takers = [_takers(part, before) for part in when.parts()]
        if all(takers):
            names = ", ".join(dict.fromkeys(taker for some in takers for taker in some))
            reading.fault(path, f"is unreachable: every account it wants is taken by {names}")
        before.append((name, when))


def _takers(part: When, tiers: Sequence[tuple[str, When]]) -> list[str]:
    """Return the tiers that together take every account that matches, none if somebody is left."""
    left, takers = [part], []
    for name, when in tiers:
        rest = [one for piece in left for one in when.rest_of(piece)]
        if rest != left:
            takers.append(name)
        if not rest:
            return takers
        if len(rest) <= _MOST_PIECES:
            left = rest
    return []
