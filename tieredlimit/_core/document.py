"""Reading a policy document: all of it, noting every fault, before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tieredlimit._core.condition import When, read_when
from tieredlimit._core.features import read_features
from tieredlimit._core.order import check_reach, read_order
from tieredlimit._core.reading import Reading, join
from tieredlimit._core.rows import Rows
from tieredlimit._core.tier import Feature, Tier
from tieredlimit.errors import Fault, PolicyError

WORDS = ("order", "features", "pools", "defaults", "tiers")


def read_document(
    document: Mapping[str, Any], source: str, origin: Callable[[str], str] | None = None
) -> tuple[dict[str, Feature], tuple[Tier, ...], tuple[Fault, ...]]:
    """Return the features, the tiers in order, and the warnings of a policy document.

    `origin` says which file a place comes from, where there are several.

    Raises:
        PolicyError: It has faults; the error lists every one of them.
    """
    reading = Reading(origin)
    top = reading.table("", document)
    if reading.faults:
        raise PolicyError(reading.faults, source)
    reading.known("", top, WORDS)
    said = top.get("tiers")
    names = [name for name in said if isinstance(name, str)] if isinstance(said, Mapping) else []
    features = read_features(reading, top.get("features", {}), top.get("pools", {}), names)
    tables = reading.named_tables("tiers", top.get("tiers", {}))
    rows = Rows(reading, features, tables, top.get("defaults", {}))
    cells = {name: rows.cells(name) for name in tables}
    whens, faulty = _read_whens(reading, tables)
    order: list[str] | None = list(tables)
    if "order" in top:
        order = read_order(reading, top["order"], tables)
    elif len(tables) > 1:
        reading.fault("order", f"is missing; name the {len(tables)} tiers, first match first")
        order = None
    if order:
        # In a wrong order every tier would seem to stand in the way of others.
        check_reach(reading, order, whens, faulty)
    if reading.faults or order is None:
        raise PolicyError(reading.faults, source)
    tiers = tuple(Tier(name, whens[name], cells[name]) for name in order)
    return features, tiers, tuple(reading.warnings)


def _read_whens(
    reading: Reading, tables: Mapping[str, Mapping[Any, Any]]
) -> tuple[dict[str, When | None], set[str]]:
    """Return every tier's `when`, None for everybody, and the tiers where it has a fault."""
    whens: dict[str, When | None] = {}
    faulty: set[str] = set()
    for name, table in tables.items():
        whens[name] = None
        if "when" in table:
            whens[name] = read_when(reading, f"{join('tiers', name)}.when", table["when"])
            if whens[name] is None:
                faulty.add(name)
    return whens, faulty
