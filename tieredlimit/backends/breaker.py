"""A breaker: who has failed so often in a row is not asked any more, until a probe was answered."""

from __future__ import annotations

import random

FAILURES = 5
"""How many failures in a row there must be before a server is not asked any more: calls that broke
or were refused, and decisions that waited in vain."""

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds until the first probe, and between the later ones."""


class Breaker:
    """Say whether a server is asked, and when it is probed where it is not.

    Closed, it counts failures in a row. Open, nothing is asked but for a probe now and then, at
    pauses that double up to a second, each by chance up to a third shorter, so that a fleet of
    processes does not come back at once. An answer in time closes it.

    Attributes:
        open: Whether the server is not asked.
        why: What failed last.
        opened: How often it has opened.
    """

    __slots__ = ("_failures", "_pause", "open", "opened", "why")

    def __init__(self) -> None:
        self.open: bool = False
        self.why: str = ""
        self.opened: int = 0
        self._failures = 0
        self._pause = FIRST_PAUSE

    @property
    def shaken(self) -> bool:
        """Whether anything has failed since the last answer."""
        return self.open or self._failures > 0

    def failed(self, why: str, times: int = 1) -> bool:
        """Count failures; say whether it opens now."""
        self.why = why
        self._failures += times
        if self.open or self._failures < FAILURES:
            return False
        self.open = True
        self.opened += 1
        self._pause = FIRST_PAUSE
        return True

    def answered(self) -> bool:
        """Take note of an answer; say whether it closes now."""
        was_open, self.open, self._failures = self.open, False, 0
        return was_open

    def pause(self) -> float:
        """Return the seconds until the next probe; each is longer than the one before."""
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        return pause * random.uniform(2 / 3, 1)  # noqa: S311 -- to spread, not to hide
