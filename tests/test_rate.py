"""Rates, durations and instants as a policy writes them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone, tzinfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tieredlimit._core.rate import (
    DAY_US,
    SECOND_US,
    Rate,
    parse_duration,
    parse_instant,
    parse_rate,
    spell_duration,
    spell_instant,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
UNITS = {
    "second": SECOND_US,
    "minute": 60 * SECOND_US,
    "hour": 3_600 * SECOND_US,
    "day": DAY_US,
    "week": 7 * DAY_US,
}


class NoOffset(tzinfo):
    """A zone that does not know its offset: Python takes such an instant for a naive one."""

    def utcoffset(self, moment: datetime | None) -> None:
        return None

    def dst(self, moment: datetime | None) -> None:
        return None

    def tzname(self, moment: datetime | None) -> None:
        return None


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("5/minute", Rate(5, 60 * SECOND_US, "minute")),
        ("5 per minute", Rate(5, 60 * SECOND_US, "minute")),
        (" 5 / MINUTES ", Rate(5, 60 * SECOND_US, "minute")),
        ("10/2 hours", Rate(10, 7_200 * SECOND_US, "2-hours")),
        ("10/2hour", Rate(10, 7_200 * SECOND_US, "2-hours")),
        ("1/1 day", Rate(1, DAY_US, "day")),
        ("1/01 day", Rate(1, DAY_US, "day")),
        ("1/030 days", Rate(1, 30 * DAY_US, "30-days")),
        ("3/week", Rate(3, 7 * DAY_US, "week")),
        ("3 per 2 Weeks", Rate(3, 14 * DAY_US, "2-weeks")),
    ],
)
def test_rate_is_read_as_the_limits_package_writes_it(text: str, rate: Rate) -> None:
    assert parse_rate(text) == rate


@given(
    amount=st.integers(1, 10**9),
    multiple=st.integers(1, 10**6),
    unit=st.sampled_from(sorted(UNITS)),
    plural=st.booleans(),
    per=st.sampled_from(["/", " / ", " per "]),
)
def test_rate_keeps_amount_and_period(
    amount: int, multiple: int, unit: str, plural: bool, per: str
) -> None:
    rate = parse_rate(f"{amount}{per}{multiple} {unit}{'s' if plural else ''}")

    assert (rate.amount, rate.period_us) == (amount, multiple * UNITS[unit])


@pytest.mark.fault("D7")
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("10/minute; 5/hour", "one rate each"),
        ("10/minute, 5/hour", "one rate each"),
        ("10/minute|5/hour", "one rate each"),
        ("1/week; 2/day", "one rate each"),
        ("10/minute;", 'such as "5/minute"'),
        ("10/minute 5/hour", 'such as "5/minute"'),
        ("10/minute please", 'such as "5/minute"'),
        ("1/0 day", "the number of days must be at least 1"),
        ("1/00 weeks", "the number of weeks must be at least 1"),
        ("1/year", "write 30 days"),
        ("1/2 years", "write 30 days"),
        ("1 per month", "write 30 days"),
    ],
)
def test_rate_is_the_whole_text_and_exactly_one(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        parse_rate(text)

    assert f'"{text}"' in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", 'got "";'),
        ("0/day", "write 0 alone for zero"),
        ("-1/day", 'such as "5/minute"'),
        ("1.5/day", 'such as "5/minute"'),
        ("٣/day", 'such as "5/minute"'),
        ("1/٣ weeks", 'such as "5/minute"'),
        ("5/minuet", 'did you mean "minute"'),
        ("Unlimited", 'did you mean "unlimited"'),
        ("\x1b[31m/day", r"\\u001b"),
        ("9" * 5_000 + "/day", "at most 64 characters"),
        ("1/" + "9" * 5_000 + " weeks", "at most 64 characters"),
    ],
)
def test_what_is_no_rate_is_refused_with_what_would_be_right(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        parse_rate(text)

    assert len(str(caught.value)) < 250


@given(st.text() | st.from_regex(r"[0-9]{0,70}(/| per )[0-9 ]{0,70}[a-z]{0,7}[;, ]?.{0,9}"))
def test_any_text_is_a_rate_or_a_value_error(text: str) -> None:
    try:
        rate = parse_rate(text)
    except ValueError:
        return

    assert rate.amount >= 1
    assert rate.period_us >= SECOND_US


@pytest.mark.parametrize(
    ("text", "duration_us"),
    [
        ("7 days", 7 * DAY_US),
        ("1 day", DAY_US),
        ("36 hours", 129_600 * SECOND_US),
        ("90seconds", 90 * SECOND_US),
        ("2 weeks", 14 * DAY_US),
        ("36500 days", 36_500 * DAY_US),
    ],
)
def test_duration_is_a_number_and_a_unit(text: str, duration_us: int) -> None:
    assert parse_duration(text) == duration_us


@pytest.mark.parametrize(
    "value",
    ["", "7", "days", "0 days", "-7 days", "7 Days", "1 month", " 7 days", "7 days\n", 7, None, []],
)
def test_what_is_no_duration_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match='write a duration such as "7 days"'):
        parse_duration(value)


def test_duration_over_100_years_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"36501 days"; a duration is at most 100 years'):
        parse_duration("36501 days")


@pytest.mark.parametrize(
    ("duration_us", "text"),
    [
        (7 * DAY_US, "7 days"),
        (8 * DAY_US, "8 days"),
        (129_600 * SECOND_US, "36 hours"),
        (60 * SECOND_US, "1 minute"),
        (1_500_000, "1.5 seconds"),
        (0, "0 seconds"),
    ],
)
def test_duration_is_spelled_in_its_largest_exact_unit(duration_us: int, text: str) -> None:
    assert spell_duration(duration_us) == text


@pytest.mark.parametrize(
    "value",
    [
        "2026-11-20T18:00:00Z",
        "2026-11-20t18:00:00z",
        "2026-11-20 18:00:00Z",
        "2026-11-20T19:00:00+01:00",
        "2026-11-20T18:00:00.000000Z",
        datetime(2026, 11, 20, 18, tzinfo=UTC),
        datetime(2026, 11, 20, 19, tzinfo=timezone(timedelta(hours=1))),
    ],
)
def test_instant_is_read_in_any_zone(value: object) -> None:
    assert spell_instant(parse_instant(value)) == "2026-11-20T18:00:00Z"


@given(st.datetimes(timezones=st.just(UTC)))
def test_instant_round_trips_to_the_microsecond(moment: datetime) -> None:
    instant_us = parse_instant(moment)

    assert timedelta(microseconds=instant_us) == moment - EPOCH
    assert parse_instant(spell_instant(instant_us)) == instant_us


@pytest.mark.parametrize(
    "value",
    [
        "yesterday",
        "2026-11-20",
        "2026-11-20T18:00:00",
        "2026-W47-5T18:00:00Z",
        "20261120T180000Z",
        "2026-13-20T18:00:00Z",
        "2026-11-20T18:00:00+01:00:30",
        "2026-11-20T18:00:00Z\n",
        "٢٠٢٦-11-20T18:00:00Z",
        datetime(2026, 11, 20),  # noqa: DTZ001 -- without a zone is the point
        datetime(2026, 11, 20, tzinfo=NoOffset()),
        datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
        date(2026, 11, 20),
        1_763_661_600,
        None,
        ["2026-11-20T18:00:00Z"],
    ],
)
def test_what_is_no_instant_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="write an instant with a zone"):
        parse_instant(value)
