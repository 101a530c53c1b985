"""Quotas: what a rate and a capacity become in whole microseconds."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tieredlimit._core.bucket import debit, remaining, settle_instant, wait_us
from tieredlimit._core.quota import MAX_AMOUNT, Quota, interval_of, parse_quota_rate
from tieredlimit._core.rate import DAY_US, SECOND_US, TEN_YEARS_US, Rate

ODD_RATES = ["7/3 hours", "1/day", "10000/second", "1/30 days", "3/second", "999/minute"]


def quota(text: str, capacity: int | None = None) -> Quota:
    _, tokens, interval_us, _ = parse_quota_rate(text, capacity)
    return Quota("q", text, tokens, interval_us)


def test_capacity_is_the_amount_unless_given() -> None:
    assert quota("5/minute").capacity == 5
    assert quota("5/minute", 20).capacity == 20


def test_window_and_clamp_are_the_buckets_own() -> None:
    bucket = quota("5/minute", 20)

    assert bucket.interval_us == 12 * SECOND_US
    assert bucket.window_us == 20 * 12 * SECOND_US
    assert bucket.clamp_us == 2 * bucket.window_us
    assert bucket.reach_us == bucket.window_us


def test_what_must_be_left_shortens_the_reach_and_nothing_else() -> None:
    whole = quota("5/minute", 20)

    bucket = replace(whole, leave=8)

    assert bucket.reach_us == 12 * bucket.interval_us
    assert (bucket.window_us, bucket.clamp_us) == (whole.window_us, whole.clamp_us)
    assert bucket.policy_item == whole.policy_item


@given(
    capacity=st.integers(1, 1_000),
    left=st.integers(0, 999),
    debt_us=st.integers(0, 2 * 10**6),
    cost=st.integers(1, 1_100),
)
def test_take_leaves_what_it_must_and_waits_exactly_until_it_does(
    capacity: int, left: int, debt_us: int, cost: int
) -> None:
    assume(left < capacity)
    bucket = replace(quota("1000/second", capacity), leave=left)
    debt_us = min(debt_us, bucket.clamp_us)

    taken = debit(bucket, debt_us, 0, cost)
    wait = wait_us(bucket, debt_us, cost)

    assert (taken is None) == (wait != 0)
    if taken is not None:
        assert remaining(bucket, taken) >= left
    assert (wait is None) == (cost > capacity - left)
    if wait:
        assert debit(bucket, debt_us, wait - 1, cost) is None
        later = debit(bucket, debt_us, wait, cost)
        assert later is not None
        assert remaining(bucket, later - wait) == left


def test_tag_follows_the_name_alone() -> None:
    assert Quota("a", "5/minute", 5, 1).tag == Quota("a", "6/hour", 9, 7).tag
    assert Quota("a", "5/minute", 5, 1).tag != Quota("b", "5/minute", 5, 1).tag
    assert len(Quota("a", "5/minute", 5, 1).tag) == 4


@given(amount=st.integers(1, 10**7), period_us=st.integers(1, 400).map(lambda n: n * SECOND_US))
def test_interval_is_never_faster_and_at_most_1_percent_slower_than_the_rate(
    amount: int, period_us: int
) -> None:
    try:
        interval_us, warning = interval_of(Rate(amount, period_us, ""))
    except ValueError:
        off = Fraction(-(-period_us // amount) * amount, period_us) - 1
        assert off > Fraction(1, 100) or amount > period_us
        return

    off = Fraction(interval_us * amount, period_us) - 1
    assert 0 <= off <= Fraction(1, 100)
    assert (warning is None) == (off <= Fraction(1, 1_000))


@pytest.mark.parametrize(
    ("amount", "period_us", "outcome"),
    [
        (5, 60_000_000, "exact"),
        (1, 1, "exact"),
        (1_001, 2_000, "exact"),  # slower by exactly a thousandth
        (1_001, 1_999, "warning"),
        (101, 200, "warning"),  # slower by exactly a hundredth
        (101, 199, "fault"),
    ],
)
def test_rounding_is_told_beyond_a_thousandth_and_refused_beyond_a_hundredth(
    amount: int, period_us: int, outcome: str
) -> None:
    try:
        _, warning = interval_of(Rate(amount, period_us, ""))
    except ValueError:
        found = "fault"
    else:
        found = "warning" if warning else "exact"

    assert found == outcome


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("700000/second", ["500000/second", "1000000/second"]),
        ("300000/second", ["250000/second", "1000000/3 seconds"]),
        ("25000000/minute", ["1000000/3 seconds", "500000/second"]),
    ],
)
def test_fault_of_rounding_names_the_nearest_exact_rates(text: str, nearest: list[str]) -> None:
    with pytest.raises(ValueError, match=f'"{text}" is .* off once rounded') as caught:
        parse_quota_rate(text, None)

    for rate in nearest:
        assert f'"{rate}"' in str(caught.value)
        amount, _, period = rate.partition("/")
        seconds = int(period.split()[0]) if period != "second" else 1
        assert interval_of(Rate(int(amount), seconds * SECOND_US, ""))[1] is None
        assert seconds * SECOND_US % int(amount) == 0


def test_warning_of_rounding_names_the_rate_and_its_neighbours() -> None:
    warning = parse_quota_rate("29500/second", None)[3]

    assert warning is not None
    assert warning.startswith('"29500/second" is 0.')
    assert '"1000000/34 seconds"' in warning
    assert '"1000000/33 seconds"' in warning


@pytest.mark.parametrize("text", ["1000001/second", "9" * 50 + "/day"])
def test_more_than_a_token_a_microsecond_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'at most "1000000/second"'):
        parse_quota_rate(text, 5)


def test_capacity_over_the_bound_is_refused_with_the_bound() -> None:
    told = '"2000000000/30 days" makes a capacity of 2,000,000,000; at most 1,000,000,000'
    with pytest.raises(ValueError, match=told):
        parse_quota_rate("2000000000/30 days", None)

    assert quota("2000000000/10000 days", 5).capacity == 5


def test_window_over_ten_years_is_refused_with_the_capacity_that_fits() -> None:
    assert quota("1/day", 3_650).window_us == TEN_YEARS_US

    told = r'3,651 at "1/day" takes 3,651 days .* \(3,650 days\): a capacity of 3,650'
    with pytest.raises(ValueError, match=told):
        parse_quota_rate("1/day", 3_651)


def test_rate_slower_than_a_token_in_ten_years_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 10 years \(3,650 days\)$"):
        parse_quota_rate("1/" + "9" * 50 + " days", None)


@given(
    amount=st.integers(1, 10**6),
    multiple=st.integers(1, 10**4),
    unit=st.sampled_from(["second", "minute", "hour", "day", "week"]),
    capacity=st.none() | st.integers(1, MAX_AMOUNT),
)
def test_accepted_quotas_stay_exact_in_a_double(
    amount: int, multiple: int, unit: str, capacity: int | None
) -> None:
    try:
        bucket = quota(f"{amount}/{multiple} {unit}", capacity)
    except ValueError:
        assume(False)

    assert 1 <= bucket.capacity <= MAX_AMOUNT
    assert bucket.interval_us >= 1
    assert bucket.window_us <= TEN_YEARS_US
    assert float(bucket.clamp_us) == bucket.clamp_us < 2**53


@pytest.mark.fault("A9")
@pytest.mark.parametrize("text", ODD_RATES)
def test_a_million_takes_of_odd_rates_keep_to_the_stated_interval(text: str) -> None:
    bucket = quota(text)
    start = now = 1_800_000_000_000_000
    full_at: int | None = None
    takes = 0

    for _ in range(1_000_000 // len(ODD_RATES)):
        candidate = debit(bucket, settle_instant(full_at, now, bucket.clamp_us), now, 1)
        if candidate is None:
            # The first instant at which one more fits: not a microsecond is lost in between.
            assert full_at is not None
            now = full_at + bucket.interval_us - bucket.window_us
            candidate = debit(bucket, settle_instant(full_at, now, bucket.clamp_us), now, 1)
        assert candidate is not None
        full_at = candidate
        takes += 1

    assert now - start == (takes - bucket.capacity) * bucket.interval_us


@pytest.mark.fault("A9")
@pytest.mark.parametrize("text", ODD_RATES)
def test_stated_interval_is_the_rate_but_for_less_than_a_microsecond(text: str) -> None:
    amount, _, period = text.partition("/")
    seconds = {
        "3 hours": 10_800, "day": 86_400, "second": 1, "30 days": 2_592_000, "minute": 60,
    }[period]  # fmt: skip

    off = quota(text).interval_us - Fraction(seconds * SECOND_US, int(amount))

    assert 0 <= off < 1


@pytest.mark.fault("A9")
@pytest.mark.parametrize("text", ODD_RATES)
def test_capacity_fits_a_full_bucket_in_singles_and_one_more_never(text: str) -> None:
    bucket = quota(text)
    now = full_at = 40 * 365 * DAY_US

    for _ in range(bucket.capacity):
        taken = debit(bucket, full_at, now, 1)
        assert taken is not None
        full_at = taken

    assert debit(bucket, full_at, now, 1) is None
    assert debit(bucket, now, now, bucket.capacity + 1) is None
