"""Laying one policy document over another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Half a quota, half a condition or half a list of routes would mean what neither file says.
_WHOLE = frozenset({"when", "routes", "pool"})
_WHOLE_ENTRIES = frozenset({"quotas", "messages"})


def overlay(base: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `above` laid over it; neither is changed.

    Tables merge key by key, down to the parts that only make sense whole, which `above` replaces:
    a cell, a message, a `when`, a feature's `routes`. Lists and values are replaced.
    """
    merged = dict(base)
    for key, value in above.items():
        below = merged.get(key)
        if key in _WHOLE or not isinstance(below, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
        elif key in _WHOLE_ENTRIES:
            merged[key] = {**below, **value}
        else:
            merged[key] = overlay(below, value)
    return merged
