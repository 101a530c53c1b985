"""A clock that stands still until a test says otherwise."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

from tieredlimit._core.rate import SECOND_US
from tieredlimit.errors import UsageError

__all__ = ["Clock"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Clock:
    """Stand still, and go on when told: `MemoryBackend(clock=Clock())`.

    Args:
        start: The instant at which it stands, with a time zone; noon of 1 January 2026, unless
            said.

    Attributes:
        now: Integer microseconds since 1970, which is also what calling it returns. It may be set,
            backwards too.

    Raises:
        UsageError: `start` has no time zone.
    """

    def __init__(self, start: datetime = _START) -> None:
        self.now: int = 0
        self.move_to(start)

    def __call__(self) -> int:
        """Return integer microseconds since 1970."""
        return self.now

    def __repr__(self) -> str:
        return f"Clock({self.instant.isoformat()})"

    @property
    def instant(self) -> datetime:
        """The instant at which it stands, in UTC."""
        return _EPOCH + self.now * _MICROSECOND

    def advance(self, seconds: float | timedelta) -> None:
        """Go on by so many seconds, to the nearest microsecond.

        Raises:
            UsageError: That is less than nothing, or no number; `move_to` goes back.
        """
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        if not math.isfinite(seconds) or seconds < 0:
            raise UsageError(f"seconds must be 0 or more, got {seconds!r:.80}; move_to goes back")
        self.now += round(seconds * SECOND_US)

    def move_to(self, instant: datetime) -> None:
        """Stand at an instant, before or after.

        Raises:
            UsageError: It has no time zone.
        """
        if instant.utcoffset() is None:
            raise UsageError(f"an instant is a datetime with a time zone, got {instant!r:.80}")
        self.now = (instant - _EPOCH) // _MICROSECOND
