"""What the child of a fork must make anew: locks that a thread of the parent may hold for ever."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["Forked", "anew_after_fork"]


class Forked(Protocol):
    """What holds locks, or what is on the parent's event loops."""

    def leave_to_parent(self) -> None:
        """Start anew in the child of a fork, where no other thread is yet."""
        ...


def anew_after_fork(one: Forked) -> None:
    """Have it told in every child of a fork, as long as it lives."""
    _living.add(one)


_living: WeakSet[Forked] = WeakSet()


def _after_fork() -> None:
    for one in list(_living):
        one.leave_to_parent()


os.register_at_fork(after_in_child=_after_fork)
