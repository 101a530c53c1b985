"""What a policy writes as text: rates, durations, instants.

Each function raises `ValueError` with a message that says what would be right; the policy reader
adds the place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tieredlimit._core.reading import did_you_mean, spell

SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US
TEN_YEARS_US = 3_650 * DAY_US

_UNIT_US = {
    "second": SECOND_US,
    "minute": 60 * SECOND_US,
    "hour": 3_600 * SECOND_US,
    "day": DAY_US,
    "week": 7 * DAY_US,
}
# Compiled at the first policy, not at import.
_DURATION = r"([0-9]{1,9}) ?(second|minute|hour|day|week)s?"
_MULTIPLE = r"(?i:(?:/|per)\s*([0-9]*)\s*([a-z]+)\s*)"
# `fromisoformat` alone takes week dates, dates without a time and zones of odd seconds.
_INSTANT = (
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?"
    r"([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Beyond it, the parser's time grows with the square of the length.
_LONGEST_RATE = 64


@dataclass(frozen=True, slots=True)
class Rate:
    """Hold so many tokens per period; `label` names the period (`minute`, `2-hours`)."""

    amount: int
    period_us: int
    label: str


def parse_rate(text: str) -> Rate:
    """Read one rate in the notation of the `limits` package, the whole string, exactly one item.

    Raises:
        ValueError: It is no rate, more than one, zero, or counts in calendar months or years.
    """
    # Here, not above: limits loads all its storages, and a worker needs it only while loading.
    from limits import parse_many

    if len(text) > _LONGEST_RATE:
        raise ValueError(f"got {spell(text)}; a rate is at most {_LONGEST_RATE} characters")
    tail = re.search(_MULTIPLE, text)
    multiple, unit = (tail[1], tail[2].lower().removesuffix("s")) if tail else ("", "")
    if unit in {"month", "year"}:
        raise ValueError(f"got {spell(text)}; write 30 days: calendar quotas are billing")
    if multiple and int(multiple) == 0:
        raise ValueError(f"got {spell(text)}; the number of {unit}s must be at least 1")
    if tail and unit == "week":
        # limits has no weeks; seven days say the same.
        days = int(multiple or 1) * 7
        spelled = f"{text[: tail.start()]}/{days} days{text[tail.end() :]}"
    else:
        spelled = text
    try:
        items = parse_many(spelled)
    except ValueError:
        hint = did_you_mean(unit, _UNIT_US.keys() - {unit}) or did_you_mean(text, ["unlimited"])
        wanted = 'write a rate such as "5/minute" or "10/2 hours"'
        raise ValueError(f"got {spell(text)}; {wanted}{hint}") from None
    if len(items) != 1:
        raise ValueError(f"got {spell(text)}; one rate each: write a list of quotas for several")
    if items[0].amount < 1:
        raise ValueError(f"got {spell(text)}; an amount is at least 1: write 0 alone for zero")
    label = unit if int(multiple or 1) == 1 else f"{int(multiple)}-{unit}s"
    return Rate(items[0].amount, items[0].get_expiry() * SECOND_US, label)


def parse_duration(value: object) -> int:
    """Read a duration such as `"7 days"` and return microseconds."""
    match = re.fullmatch(_DURATION, value) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError(
            f'got {spell(value)}; write a duration such as "7 days" or "36 hours", '
            "in seconds, minutes, hours, days or weeks, at least one"
        )
    duration_us = int(match[1]) * _UNIT_US[match[2]]
    if duration_us > 10 * TEN_YEARS_US:
        raise ValueError(f"got {spell(value)}; a duration is at most 100 years (36,500 days)")
    return duration_us


def parse_instant(value: object) -> int:
    """Read an RFC 3339 instant, as text or as TOML's own, and return microseconds since 1970."""
    wanted = f"got {spell(value)}; write an instant with a zone, such as 2026-11-20T18:00:00Z"
    instant = value
    try:
        if isinstance(instant, str) and re.fullmatch(_INSTANT, instant):
            instant = datetime.fromisoformat(instant.upper())
        if not isinstance(instant, datetime) or instant.utcoffset() is None:
            raise ValueError(wanted)
        # In its own zone an instant may lie outside the years 1 to 9999 that UTC can spell.
        return (instant.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        raise ValueError(wanted) from None


def spell_duration(duration_us: int) -> str:
    """Return a duration as people write it, in its largest exact unit."""
    for unit in ("day", "hour", "minute", "second"):
        count, rest = divmod(duration_us, _UNIT_US[unit])
        if count and not rest:
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{duration_us / SECOND_US:g} seconds"


def spell_instant(instant_us: int) -> str:
    """Return an instant as RFC 3339 has it, in UTC."""
    return (_EPOCH + timedelta(microseconds=instant_us)).isoformat().replace("+00:00", "Z")
