"""Values kept until an instant, and never more than so many of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Keep values by key, each until its instant; the one least recently used makes room.

    Instants are of any clock, as long as it is always the same one. Not safe to share between
    threads by itself.

    Args:
        most: The most values kept; 0 keeps none.
    """

    __slots__ = ("_held", "_most")

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def __len__(self) -> int:
        """Return how many are kept, those whose time is over included."""
        return len(self._held)

    def get(self, key: K, now: float) -> tuple[V] | None:
        """Return the value in a tuple, None where there is none, or its instant has come."""
        found = self._held.get(key)
        if found is None:
            return None
        value, until = found
        if now >= until:
            del self._held[key]
            return None
        self._held.move_to_end(key)
        return (value,)

    def put(self, key: K, value: V, until: float) -> None:
        """Keep a value, in the place of the one before."""
        self._held[key] = value, until
        self._held.move_to_end(key)
        while len(self._held) > self._most:
            self._held.popitem(last=False)

    def drop(self, key: K) -> None:
        """Keep the key's value no longer, if there is one."""
        self._held.pop(key, None)

    def clear(self) -> None:
        """Keep nothing."""
        self._held.clear()
