"""Instants, durations and shares on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import click

from tieredlimit._core.rate import DAY_US, SECOND_US, parse_duration, parse_instant
from tieredlimit._core.share import ALL_BP

_SHORT = re.compile(r"([0-9]{1,9})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_CLOCK = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])")
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,2})?) ?%?")


@dataclass(frozen=True, slots=True)
class Moment:
    """Hold an instant as it was typed.

    Attributes:
        text: What was typed.
        at: The instant; of a time of day, the microseconds after midnight in UTC.
        clock: Whether it is a time of day.
    """

    text: str
    at: int
    clock: bool = False

    def resolve(self, now: int) -> int:
        """Return the instant; a time of day is one of the day in which `now` is, in UTC."""
        return now // DAY_US * DAY_US + self.at if self.clock else self.at


def instant(text: str) -> datetime:
    """Read a date (midnight in UTC) or an RFC 3339 instant; a time without a zone is UTC.

    Raises:
        click.BadParameter: It is neither.
    """
    try:
        read = datetime.fromisoformat(text)
        return read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        wanted = "write a date or an instant, such as 2026-11-20 or 2026-11-20T18:00:00Z"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}") from None


def moment(text: str) -> Moment:
    """Read an RFC 3339 instant with its zone, or a time of day in UTC.

    Raises:
        click.BadParameter: It is neither.
    """
    if found := _CLOCK.fullmatch(text):
        return Moment(text, (int(found[1]) * 60 + int(found[2])) * 60 * SECOND_US, clock=True)
    try:
        return Moment(text, parse_instant(text))
    except ValueError:
        wanted = "write 18:00 (today, UTC) or an instant with a zone: 2026-11-20T18:00:00Z"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}") from None


def duration(text: str) -> int:
    """Read a duration such as `30m` or `30 minutes` and return microseconds.

    Raises:
        click.BadParameter: It is none.
    """
    found = _SHORT.fullmatch(text)
    try:
        return parse_duration(f"{int(found[1])} {_UNITS[found[2]]}" if found else text)
    except ValueError:
        wanted = "write 90s, 30m, 2h, 7d, 2w, or the same in words: 30 minutes"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}") from None


def percent(text: str) -> int:
    """Read a share and return it in hundredths of a percent.

    Raises:
        click.BadParameter: It is none from 0.01 to 100.
    """
    found = _PERCENT.fullmatch(text)
    share_bp = int(Decimal(found[1]) * 100) if found else 0
    if not 1 <= share_bp <= ALL_BP:
        wanted = "write a percentage from 0.01 to 100, with two decimals at most"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}")
    return share_bp
