"""What every backend promises, with the faults that each promise covers, and a model beside it."""

from __future__ import annotations

import pytest

from tests.reference import Reference
from tieredlimit import testing
from tieredlimit.backends import Backend
from tieredlimit.testing.charges import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    charge,
    debts,
    drain,
    quota,
    shelf,
    take_at_once,
)

__all__ = [
    "DAY",
    "HOUR",
    "MINUTE",
    "SECOND",
    "START",
    "BackendContract",
    "Clock",
    "charge",
    "debts",
    "drain",
    "quota",
    "shelf",
    "take_at_once",
]

START = 1_790_000_000_123_457

FAULTS = {
    "test_denial_charges_no_bucket": ("A3",),
    "test_denial_charges_nothing_in_any_order_of_charges": (
        "A3",
        "A4",
    ),
    "test_denied_large_cost_leaves_the_tokens_for_a_small_one": ("A3",),
    "test_hundred_concurrent_takes_charge_both_subjects_alike": (
        "A3",
        "A4",
    ),
    "test_second_of_two_keys_denying_leaves_the_first_whole": ("A4",),
    "test_one_quota_of_a_cell_denying_leaves_the_other_whole": ("A4",),
    "test_charges_on_one_bucket_are_summed": ("A12",),
    "test_sum_far_beyond_the_clamp_is_denied_and_charges_nothing": (
        "A3",
        "A12",
    ),
    "test_capacity_fits_a_full_bucket_and_one_more_never_does": (
        "A5",
        "A9",
    ),
    "test_singles_of_the_capacity_fit_a_full_bucket_and_no_more": ("A9",),
    "test_thousand_takes_in_one_microsecond_admit_exactly_the_capacity": ("A7",),
    "test_polling_while_empty_never_delays_the_refill": ("A2",),
    "test_instants_up_to_the_year_2200_are_exact": ("A8",),
    "test_retry_at_the_stated_time_succeeds_and_a_microsecond_earlier_does_not": ("B3",),
    "test_window_shortened_from_a_day_to_a_minute_lowers_the_bucket": ("A11",),
    "test_peek_at_a_bucket_beyond_its_clamp_does_not_lower_it": ("A11",),
    "test_peek_before_a_charge_of_the_same_bucket_does_not_hide_the_lowering": ("A11",),
    "test_clock_stepped_back_an_hour_costs_at_most_one_empty_window": (
        "A11",
        "B2",
    ),
    "test_clock_stepped_back_never_refills_twice": ("B2",),
    "test_client_that_obeys_every_retry_after_is_served_at_the_promised_rate_for_a_day": (
        "A11",
        "B2",
        "B3",
    ),
    "test_smaller_window_of_another_tier_never_lowers_a_bucket": (
        "A11",
        "D6",
    ),
    "test_smaller_window_of_another_quota_in_the_cell_never_lowers_a_bucket": ("A11",),
    "test_lowering_one_bucket_leaves_a_full_one_full_though_the_clock_steps_back": ("A11",),
    "test_raising_a_rate_keeps_what_was_used": ("C3",),
    "test_longer_window_grants_only_the_difference": ("C3",),
    "test_renamed_quota_starts_full_while_the_old_record_stays_until_full": ("C3",),
    "test_each_tier_has_its_own_bucket_and_keeps_it": ("D6",),
}


class Clock(testing.Clock):
    """The same clock, which is told to go on in microseconds."""

    def __init__(self, now: int = START) -> None:
        super().__init__()
        self.now = now

    def advance(self, us: int) -> None:  # type: ignore[override]  # these tests count in integers
        self.now += us


class BackendContract(testing.BackendContract):
    """The public contract; subclass it and provide `backend`, which decides by `clock`."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.mark.fault("A9")
    async def test_long_run_of_an_odd_rate_equals_the_reference(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("7/3 hours", "h"), quota("11/day", "d", capacity=4))
        reference = Reference()

        for i in range(500):
            clock.advance(i * 7_919_003)
            charges = [charge(image, i % 4)]
            reply = await backend.take(charges)

            assert (reply.allowed, list(reply.debts)) == reference.take(charges, clock.now)


for name, faults in FAULTS.items():
    # Only where our tests run: those who use the contract have no such marker.
    pytest.mark.fault(*faults)(getattr(testing.BackendContract, name))
