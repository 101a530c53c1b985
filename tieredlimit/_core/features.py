"""Reading the features of a policy: what is metered, at which cost."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from tieredlimit._core.pool import Pool, check_pool, parse_percent, read_pool, read_pools
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.reading import Reading, did_you_mean, join, spell
from tieredlimit._core.routes import Route, clashes
from tieredlimit._core.tier import Feature, Outage, default_outage_share

if TYPE_CHECKING:
    from fractions import Fraction

WORDS = ("routes", "outage", "outage_share", "pool", "refund_on", "refund_on_exception")
OUTAGES = ("allow", "deny", "local")

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")


_NO_REFUND: frozenset[int] = frozenset()
_SERVER_ERROR = 500


def read_features(
    reading: Reading, value: Any, pools: Any, tiers: Collection[str]
) -> dict[str, Feature]:
    """Read all features; those with faults are there as well, as far as they could be read.

    `pools` is what the document says under [pools], `tiers` are the names of its tiers.
    """
    features = {}
    placed: list[tuple[Route, str]] = []
    shared = _Pools(reading, pools, tiers)
    for name, table in reading.named_tables("features", value).items():
        path = join("features", name)
        reading.known(path, table, WORDS)
        routes = _read_routes(reading, join(path, "routes"), table.get("routes", []))
        placed += ((route, place) for place, route, _ in routes)
        pairs = tuple((route, cost) for _, route, cost in routes)
        outage = _read_outage(reading, join(path, "outage"), table.get("outage", "allow"))
        pool = shared.read(path, name, table["pool"], pairs) if "pool" in table else None
        refund_on, on_exception = _read_refunds(reading, path, table)
        share = _read_share(reading, path, table, outage)
        features[name] = Feature(name, pairs, outage, pool, refund_on, on_exception, share)
    shared.check()
    # One fault a route: of many that are all alike, each would clash with every other.
    others: dict[int, int] = {}
    for first, second in clashes([route for route, _ in placed]):
        others.setdefault(second, first)
    for second, first in others.items():
        route, other = str(placed[second][0]), str(placed[first][0])
        reading.fault(
            placed[second][1],
            f"{spell(route)} matches requests that {placed[first][1]} matches, {spell(other)}",
        )
    return features


def _read_routes(reading: Reading, path: str, value: Any) -> list[tuple[str, Route, int]]:
    """Return the routes, each with its place and its cost."""
    if isinstance(value, list):
        said = [(f"{path}[{i}]", text, 1) for i, text in enumerate(value)]
    elif isinstance(value, Mapping):
        said = [(join(path, text), text, cost) for text, cost in value.items()]
    else:
        wanted = 'must be a list such as ["POST /v1/images"], or a table of costs'
        reading.fault(path, f"{wanted}, got {spell(value)}")
        return []
    routes = []
    for place, text, cost in said:
        if not isinstance(text, str):
            reading.fault(place, f'must be a route such as "POST /v1/images", got {spell(text)}')
            continue
        route = reading.parse(place, Route.parse, text)
        tokens = reading.whole(place, cost, 1, MAX_AMOUNT)
        if route is not None and tokens is not None:
            _check_spelling(reading, place, route)
            routes.append((place, route, tokens))
    return routes


def _check_spelling(reading: Reading, place: str, route: Route) -> None:
    """Warn of what is allowed and yet most likely meant otherwise: it would meter nothing."""
    for method in sorted(route.methods or ()):
        if method not in _METHODS:
            hint = did_you_mean(method, _METHODS)
            reading.warn(place, f'"{method}" is an unusual method{hint}')
    if "*" in route.path:
        reading.warn(place, 'a "*" in a path stands for itself; for any path write {rest:path}')
    if _ENCODED.search(route.path):
        reading.warn(place, "paths are matched decoded: an encoded character never matches")


def _read_outage(reading: Reading, path: str, value: Any) -> Outage:
    outage = reading.choice(path, value, OUTAGES)
    return cast(Outage, outage or "deny")  # `choice` has checked it


def _read_refunds(
    reading: Reading, path: str, table: Mapping[Any, Any]
) -> tuple[frozenset[int], bool]:
    """Read the statuses that cost nothing, and whether an exception does."""
    place, value = join(path, "refund_on"), table.get("refund_on", [])
    statuses = _NO_REFUND
    if isinstance(value, list):
        read = [reading.whole(f"{place}[{i}]", one, 400, 599) for i, one in enumerate(value)]
        statuses = frozenset(one for one in read if one is not None)
    else:
        reading.fault(place, f"must be a list of statuses such as [500, 503], got {spell(value)}")
    # An exception that nobody handles is answered 500.
    on_exception = table.get("refund_on_exception", _SERVER_ERROR in statuses)
    if not isinstance(on_exception, bool):
        place = join(path, "refund_on_exception")
        reading.fault(place, f"must be true or false, got {spell(on_exception)}")
        on_exception = False
    return statuses, on_exception


def _read_share(reading: Reading, path: str, table: Mapping[Any, Any], outage: Outage) -> Fraction:
    """Read the share that every process gives out during an outage."""
    if "outage_share" not in table:
        return default_outage_share()
    place, value = join(path, "outage_share"), table["outage_share"]
    if outage != "local":
        reading.fault(place, 'only outage = "local" gives out a share')
    share = parse_percent(value)
    if share is None or not share:
        reading.fault(place, f'must be a share above 0% such as "10%", got {spell(value)}')
    return share or default_outage_share()


class _Pools:
    """Find the pools of features, and check each against all that its features cost."""

    def __init__(self, reading: Reading, value: Any, tiers: Collection[str]) -> None:
        self._reading = reading
        self._tiers = tiers
        self._named = read_pools(reading, value, tiers)
        self._used: dict[str, tuple[Pool, str, list[tuple[str, int]]]] = {}
        self._asked: set[str] = set()

    def read(
        self, path: str, feature: str, value: Any, routes: tuple[tuple[Route, int], ...]
    ) -> Pool | None:
        """Read a feature's pool: a table, or the name of one; None where it has a fault."""
        place = join(path, "pool")
        costs = [(str(route), cost) for route, cost in routes]
        if isinstance(value, Mapping):
            if feature in self._named:
                told = f"[pools.{feature}] has this feature's name; write pool = {spell(feature)}"
                self._reading.fault(place, told)
                return None
            pool = read_pool(self._reading, place, feature, value, self._tiers)
        else:
            if not isinstance(value, str):
                wanted = "must be a table, or the name of one under [pools]"
                self._reading.fault(place, f"{wanted}, got {spell(value)}")
                return None
            if value not in self._named:
                hint = did_you_mean(value, self._named)
                self._reading.fault(place, f"unknown pool {spell(value)}{hint}")
                return None
            self._asked.add(value)
            pool, place = self._named[value], join("pools", value)
        if pool is not None:
            self._used.setdefault(pool.name, (pool, place, []))[2].extend(costs)
        return pool

    def check(self) -> None:
        """Note what no take can ever get from its pool, and pools that nobody uses."""
        for pool, place, costs in self._used.values():
            check_pool(self._reading, place, pool, costs)
        for name, unused in self._named.items():
            if name not in self._asked:
                place = join("pools", name)
                self._reading.warn(place, "no feature uses this pool")
                if unused is not None:
                    check_pool(self._reading, place, unused, [])
