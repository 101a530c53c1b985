"""The rate limit fields, character by character: the draft moves, and clients parse them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.contract import quota
from tieredlimit._core.fields import (
    legacy_fields,
    rate_limit_fields,
    whole_seconds,
    zero_fields,
)

SECOND_US = 1_000_000


@dataclass(frozen=True)
class View:
    name: str = "image-minute"
    capacity: int = 5
    window_us: int = 60 * SECOND_US
    remaining: int | None = 4
    next_token_us: int | None = 12 * SECOND_US


DAY = View("image-day", 50, 86_400 * SECOND_US, 49, 1_728 * SECOND_US)


def test_fields_say_capacity_window_remaining_and_time() -> None:
    assert rate_limit_fields([View()]) == [
        (b"ratelimit-policy", b'"image-minute";q=5;w=60'),
        (b"ratelimit", b'"image-minute";r=4;t=12'),
    ]


def test_several_quotas_stand_in_one_field_each() -> None:
    assert rate_limit_fields([View(), DAY]) == [
        (b"ratelimit-policy", b'"image-minute";q=5;w=60, "image-day";q=50;w=86400'),
        (b"ratelimit", b'"image-minute";r=4;t=12, "image-day";r=49;t=1728'),
    ]


def test_full_bucket_has_no_time() -> None:
    assert rate_limit_fields([View(remaining=5, next_token_us=None)])[1] == (
        b"ratelimit",
        b'"image-minute";r=5',
    )


def test_quota_that_was_not_asked_for_says_its_policy_alone() -> None:
    assert rate_limit_fields([View(remaining=None)]) == [
        (b"ratelimit-policy", b'"image-minute";q=5;w=60')
    ]


def test_no_quota_makes_no_field() -> None:
    assert rate_limit_fields([]) == []
    assert legacy_fields([]) == []
    assert zero_fields([]) == []


def test_zero_has_neither_window_nor_time() -> None:
    assert zero_fields(["video"]) == [
        (b"ratelimit-policy", b'"video";q=0'),
        (b"ratelimit", b'"video";r=0'),
    ]


@pytest.mark.parametrize(
    ("text", "capacity", "seconds"),
    [("7/minute", 7, 60), ("7/minute", 3, 26), ("1/second", 1, 1), ("10/second", 5, 1),
     ("1000000/second", 10**9, 1000), ("7/3 hours", 7, 10_800), ("1000000/1000001 seconds", 1, 2)],
)  # fmt: skip
def test_window_is_told_as_the_policy_has_it(text: str, capacity: int, seconds: int) -> None:
    one = quota(text, "image-minute", capacity=capacity)

    policy, _ = rate_limit_fields([View(capacity=capacity, window_us=one.window_us)])

    assert policy[1] == f'"image-minute";q={capacity};w={seconds}'.encode()


def test_times_round_up_and_are_at_least_a_second() -> None:
    policy, limit = rate_limit_fields([View(window_us=100_000, next_token_us=11_000_001)])

    assert policy[1] == b'"image-minute";q=5;w=1'
    assert limit[1] == b'"image-minute";r=4;t=12'


@pytest.mark.parametrize(
    ("duration_us", "seconds"),
    [(0, 1), (1, 1), (999_999, 1), (1_000_000, 1), (1_000_001, 2), (-5, 1), (10**15, 10**9)],
)
def test_seconds_are_never_a_moment_too_early(duration_us: int, seconds: int) -> None:
    assert whole_seconds(duration_us) == seconds


def test_legacy_fields_show_the_tightest_quota() -> None:
    assert legacy_fields([DAY, View()]) == [
        (b"x-ratelimit-limit", b"5"),
        (b"x-ratelimit-remaining", b"4"),
        (b"x-ratelimit-reset", b"12"),
    ]


def test_legacy_fields_show_the_first_of_equals_and_0_where_it_is_full() -> None:
    full = View("a", 4, SECOND_US, 4, None)

    assert legacy_fields([full, View()]) == [
        (b"x-ratelimit-limit", b"4"),
        (b"x-ratelimit-remaining", b"4"),
        (b"x-ratelimit-reset", b"0"),
    ]


def test_legacy_fields_leave_out_what_was_not_asked_for() -> None:
    assert legacy_fields([View(remaining=None)]) == []
    assert legacy_fields([View(remaining=None), DAY])[0] == (b"x-ratelimit-limit", b"50")
