"""Reading the features of a policy: what is metered, at which cost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.reading import Reading, did_you_mean, join, spell
from tieredlimit._core.routes import Route, clashes
from tieredlimit._core.tier import Feature, Outage

WORDS = ("routes", "outage")
OUTAGES = ("allow", "deny")

_LATER = ("pool", "refund_on")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")


def read_features(reading: Reading, value: Any) -> dict[str, Feature]:
    """Read all features; those with faults are there as well, as far as they could be read."""
    features = {}
    placed: list[tuple[Route, str]] = []
    for name, table in reading.named_tables("features", value).items():
        path = join("features", name)
        reading.known(path, table, WORDS, _LATER)
        routes = _read_routes(reading, join(path, "routes"), table.get("routes", []))
        placed += ((route, place) for place, route, _ in routes)
        pairs = tuple((route, cost) for _, route, cost in routes)
        outage = _read_outage(reading, join(path, "outage"), table.get("outage", "allow"))
        features[name] = Feature(name, pairs, outage)
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
    if value == "local":
        reading.fault(path, '"local" is not supported yet')
        return "deny"
    outage = reading.choice(path, value, OUTAGES)
    return cast(Outage, outage or "deny")  # `choice` has checked it
