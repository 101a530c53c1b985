"""Slots: how many jobs of one subject, or of a whole pool, may run at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from tieredlimit._core.rate import DAY_US, parse_duration, spell_duration
from tieredlimit._core.reading import Reading, join, spell

MAX_CONCURRENCY = 1_000_000
"""The most slots that one subject may have."""

MAX_LEASE_US = DAY_US
"""The longest lease, in microseconds: how long a slot stays taken whose holder crashed."""

WORDS = ("concurrency", "lease")


class Slot(NamedTuple):
    """Ask for one of `limit` slots under a key, for `lease_us` microseconds unless renewed."""

    key: str
    limit: int
    lease_us: int


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Say how many slots there are under one kind of key, and for how long one is held.

    Attributes:
        prefix: The key without the subject, on the first shard.
        per: The subject around the account that holds them, None for the account itself.
        limit: The slots that a take of this cell may fill.
        lease_us: Microseconds for which a slot is held unless it is renewed.
    """

    prefix: str
    per: str | None
    limit: int
    lease_us: int


def read_slots(
    reading: Reading, path: str, table: Mapping[Any, Any]
) -> tuple[int | None, int | None]:
    """Read `concurrency` and `lease`: both or none; None where there are none, or a fault."""
    if not any(word in table for word in WORDS):
        return None, None
    limit = lease_us = None
    place = join(path, "concurrency")
    if "concurrency" in table:
        limit = reading.whole(place, table["concurrency"], 1, MAX_CONCURRENCY)
    else:
        reading.fault(place, "is missing: lease needs it; write the slots, such as 3")
    place = join(path, "lease")
    if "lease" in table:
        lease_us = reading.parse(place, parse_duration, table["lease"])
    else:
        reading.fault(place, 'is missing: concurrency needs it; write such as "10 minutes"')
    if lease_us is not None and lease_us > MAX_LEASE_US:
        most = spell_duration(MAX_LEASE_US)
        reading.fault(place, f"got {spell(table['lease'])}; a lease is at most {most}: renew it")
    return limit, lease_us
