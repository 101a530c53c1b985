"""Something of its own for each event loop; and nothing of the parent's after a fork."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from tieredlimit.forking import anew_after_fork

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Hold what each event loop has made for itself.

    Safe to use from several threads. In the child of a fork all of it is forgotten, and never
    closed: the parent still talks over these sockets.

    Args:
        make: Makes it, in the event loop that it is for.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._held: WeakKeyDictionary[asyncio.AbstractEventLoop, T] = WeakKeyDictionary()
        # What was asked for last: almost always what is asked for next.
        self._latest: tuple[asyncio.AbstractEventLoop, T] | None = None
        self._lock = Lock()
        self._left_to_parent: list[object] = []
        anew_after_fork(self)

    def __len__(self) -> int:
        """Return how many event loops have one."""
        return len(self._held)

    def here(self) -> T:
        """Return the running event loop's, made now if there is none."""
        loop = asyncio.get_running_loop()
        latest = self._latest
        if latest is not None and latest[0] is loop:
            return latest[1]
        held = self._held.get(loop)
        if held is None:
            held = self._make()
            with self._lock:
                for ended in [other for other in self._held if other.is_closed()]:
                    del self._held[ended]
                self._held[loop] = held
        self._latest = loop, held
        return held

    def all(self) -> list[T]:
        """Return those of all event loops."""
        with self._lock:
            return list(self._held.values())

    def pop(self) -> T | None:
        """Forget the running event loop's and return it, None if there is none."""
        with self._lock:
            self._latest = None
            return self._held.pop(asyncio.get_running_loop(), None)

    def leave_to_parent(self) -> None:
        """Start anew in the child of a fork."""
        self._left_to_parent += [self._held, self._latest]
        self._held = WeakKeyDictionary()
        self._latest = None
        self._lock = Lock()
