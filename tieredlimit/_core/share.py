"""A share of the accounts, which grows but never turns away whom it has let in."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tieredlimit._core.rate import TEN_YEARS_US
from tieredlimit._core.reading import Reading, join

ALL_BP = 10_000
"""All accounts, in hundredths of a percent, in which every share is counted."""

MAX_INSTANT_US = 2**53 - 1
"""The last instant of an override, in the year 2255: every store holds it exactly."""

_POSITIONS = 2**32
_WORDS = ("start_bp", "begin_us", "duration_us")


@dataclass(frozen=True, slots=True)
class Share:
    """Let in a fixed share of the accounts, or one that climbs to all of them.

    Attributes:
        start_bp: The share at first, from 0 to 10,000 hundredths of a percent.
        begin_us: The instant at which it begins to climb.
        duration_us: How long it climbs, in a straight line, until everybody is in; 0 is never.
    """

    start_bp: int
    begin_us: int
    duration_us: int = 0

    def bp_at(self, now: int) -> int:
        """Return the share at an instant, in hundredths of a percent."""
        elapsed = now - self.begin_us
        if not self.duration_us or elapsed <= 0:
            return self.start_bp
        climbed = (ALL_BP - self.start_bp) * min(elapsed, self.duration_us) // self.duration_us
        return self.start_bp + climbed

    def enters_at(self, position: int) -> int | None:
        """Return the instant from which on the account at this position is inside.

        0 is always, None never. It stays inside from then on.
        """
        wanted_bp = position * ALL_BP // _POSITIONS + 1
        if wanted_bp <= self.start_bp:
            return 0
        if not self.duration_us:
            return None
        climb_us = (wanted_bp - self.start_bp) * self.duration_us
        return self.begin_us - (-climb_us // (ALL_BP - self.start_bp))

    def document(self) -> dict[str, int]:
        """Return what `read_share` reads back, ready for JSON."""
        return {word: getattr(self, word) for word in _WORDS}


def position(feature: str, account_id: str) -> int:
    """Return where an account stands among all of them, from 0 to 2**32 - 1, for one feature.

    Everywhere and always the same, and another for each feature: else the same accounts would
    always be the first.
    """
    digest = blake2b(f"{feature}\0{account_id}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def read_share(reading: Reading, path: str, value: Any) -> Share | None:
    """Read what `Share.document` wrote; None where it has a fault."""
    before = len(reading.faults)
    table = reading.table(path, value)
    reading.known(path, table, _WORDS)
    reading.whole(join(path, "start_bp"), table.get("start_bp"), 0, ALL_BP)
    reading.whole(join(path, "begin_us"), table.get("begin_us"), 0, MAX_INSTANT_US)
    reading.whole(join(path, "duration_us"), table.get("duration_us"), 0, TEN_YEARS_US)
    return Share(**table) if len(reading.faults) == before else None
