"""Laying one policy document over another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tieredlimit._core.reading import join

_Shape = Mapping[str, Any]

# The tables that merge; "*" is any name. All others only make sense whole: half a quota, half a
# condition or half a list of routes would mean what neither file says.
_ROW: _Shape = {"quotas": {}, "shadow": {}, "messages": {}}
_MERGED: _Shape = {
    "features": {"*": {}},
    "pools": {"*": {"leave": {}}},
    "defaults": _ROW,
    "tiers": {"*": _ROW},
}

_LAST_PART = re.compile(r"(^|[.\[])[^.\[]*$")


def overlay(
    base: Mapping[str, Any], above: Mapping[str, Any], shape: _Shape = _MERGED
) -> dict[str, Any]:
    """Return `base` with `above` laid over it; neither is changed.

    Tables merge key by key, down to the parts that only make sense whole, which `above` replaces:
    a cell, a message, a `when`, a feature's `routes` and its own `pool`. Lists and values are
    replaced.
    """
    merged = dict(base)
    for key, value in above.items():
        inner = _inner(shape, key)
        below = merged.get(key)
        if inner is None or not isinstance(below, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
        else:
            merged[key] = overlay(below, value, inner)
    return merged


def places(document: Mapping[str, Any], shape: _Shape = _MERGED, path: str = "") -> Iterator[str]:
    """Yield the place of everything that an overlay takes from `document`."""
    for key, value in document.items():
        place = join(path, key)
        yield place
        inner = _inner(shape, key)
        if inner is not None and isinstance(value, Mapping):
            yield from places(value, inner, place)


def origin_of(path: str, origins: Mapping[str, str]) -> str:
    """Return the origin of the place, or of the nearest one around it; "" where there is none."""
    while path and path not in origins:
        path = _LAST_PART.sub("", path)
    return origins.get(path, "")


def _inner(shape: _Shape, key: str) -> _Shape | None:
    inner: _Shape | None = shape.get(key, shape.get("*"))
    return inner
