"""What every backend promises, and what its tests are made with."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from tests.reference import Reference
from tieredlimit._core.account import Account
from tieredlimit._core.bucket import wait_us
from tieredlimit._core.keys import key_prefix
from tieredlimit._core.quota import Quota, parse_quota_rate
from tieredlimit._core.shelf import Shelf
from tieredlimit.backends import Backend, Charge, Reply

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
START = 1_790_000_000_123_457


class Clock:
    """A clock that stands still until it is told otherwise; microseconds."""

    def __init__(self, now: int = START) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, us: int) -> None:
        self.now += us


def quota(rate: str, name: str = "q", *, capacity: int | None = None) -> Quota:
    _, tokens, interval_us, _ = parse_quota_rate(rate, capacity)
    return Quota(name, rate, tokens, interval_us)


def shelf(*quotas: Quota, tier: str = "free", catch_all: bool = False) -> Shelf:
    return Shelf(tuple(quotas), None, key_prefix("test", 0, "image", tier, None), catch_all)


def charge(on: Shelf, cost: int = 1, subject: str = "u1") -> Charge:
    return Charge(on.key(Account(subject)), on, cost)


async def take_at_once(backend: Backend, charges: Sequence[Charge], times: int) -> list[Reply]:
    return await asyncio.gather(*(backend.take(charges) for _ in range(times)))


async def drain(backend: Backend, on: Shelf, subject: str = "u1") -> int:
    """Take single tokens until one is denied; return how many there were."""
    taken = 0
    while (await backend.take([charge(on, 1, subject)])).allowed:
        taken += 1
    return taken


async def debts(backend: Backend, *charges: Charge) -> list[int]:
    """Peek at the buckets of some charges."""
    peek = [one._replace(cost=0) for one in charges]
    return list((await backend.take(peek)).debts)


class BackendContract:
    """What every backend promises. Subclass it and provide `backend`, which decides by `clock`."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    async def test_fresh_bucket_is_full_and_a_take_spends_from_it(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("5/minute"))

        reply = await backend.take([charge(image, 2)])

        assert reply == (True, clock.now, [2 * 12 * SECOND])
        assert await drain(backend, image) == 3

    @pytest.mark.fault("A3")
    async def test_denial_charges_no_bucket(self, backend: Backend) -> None:
        wide = charge(shelf(quota("10/minute"), tier="wide"))
        empty = charge(shelf(quota("1/minute"), tier="empty"), 2)

        assert not (await backend.take([wide, empty])).allowed
        assert await debts(backend, wide, empty) == [0, 0]

    @pytest.mark.fault("A3", "A4")
    async def test_denial_charges_nothing_in_any_order_of_charges(self, backend: Backend) -> None:
        fitting = [
            charge(shelf(quota("9/hour"), quota("99/day", "d"), tier=f"t{i}")) for i in range(3)
        ]
        denying = charge(shelf(quota("3/minute"), tier="tight"), 4)

        for order in itertools.permutations([*fitting, denying]):
            assert not (await backend.take(order)).allowed

        assert await debts(backend, *fitting, denying) == [0] * 7

    @pytest.mark.fault("A3")
    async def test_denied_large_cost_leaves_the_tokens_for_a_small_one(
        self, backend: Backend
    ) -> None:
        image = shelf(quota("20/hour"))
        assert (await backend.take([charge(image, 19)])).allowed

        denied = await take_at_once(backend, [charge(image, 20)], 100)
        small = await backend.take([charge(image, 1)])

        assert not any(reply.allowed for reply in denied)
        assert small.allowed

    @pytest.mark.fault("A3", "A4")
    async def test_hundred_concurrent_takes_charge_both_subjects_alike(
        self, backend: Backend
    ) -> None:
        mine = charge(shelf(quota("60/hour"), tier="mine"))
        ours = charge(shelf(quota("30/hour"), tier="ours"))

        replies = await take_at_once(backend, [mine, ours], 100)

        assert sum(reply.allowed for reply in replies) == 30
        assert await debts(backend, mine, ours) == [30 * MINUTE, HOUR]

    @pytest.mark.fault("A4")
    async def test_second_of_two_keys_denying_leaves_the_first_whole(
        self, backend: Backend
    ) -> None:
        ours = shelf(quota("2/hour"), tier="ours")
        first, second = shelf(quota("5/hour"), tier="a"), shelf(quota("5/hour"), tier="b")
        await drain(backend, ours)

        for other in (first, second):
            for both in ([charge(other), charge(ours)], [charge(ours), charge(other)]):
                assert not (await backend.take(both)).allowed

        assert await debts(backend, charge(first), charge(second)) == [0, 0]

    @pytest.mark.fault("A4")
    async def test_one_quota_of_a_cell_denying_leaves_the_other_whole(
        self, backend: Backend
    ) -> None:
        both = shelf(quota("5/minute", "m"), quota("2/day", "d"))
        await backend.take([charge(both, 2)])

        reply = await backend.take([charge(both)])

        assert reply == (False, reply.now, [24 * SECOND, DAY])

    @pytest.mark.fault("A12")
    async def test_charges_on_one_bucket_are_summed(self, backend: Backend) -> None:
        image = shelf(quota("5/minute"))

        too_much = await backend.take([charge(image, 4), charge(image, 4)])
        fits = await backend.take([charge(image, 4), charge(image, 1)])

        assert too_much == (False, too_much.now, [0, 0])
        assert fits == (True, fits.now, [MINUTE, MINUTE])

    @pytest.mark.fault("A3", "A12")
    async def test_sum_far_beyond_the_clamp_is_denied_and_charges_nothing(
        self, backend: Backend
    ) -> None:
        image = shelf(quota("5/minute"))
        await backend.take([charge(image)])

        reply = await backend.take([charge(image, 5)] * 5)

        assert not reply.allowed
        assert await debts(backend, charge(image)) == [12 * SECOND]

    async def test_peek_writes_nothing(self, backend: Backend) -> None:
        image = shelf(quota("5/minute"))

        assert (await backend.take([charge(image, 0)])).allowed
        assert await drain(backend, image) == 5
        assert (await backend.take([charge(image, 0)])).allowed
        assert await debts(backend, charge(image)) == [MINUTE]

    async def test_peek_beside_a_charge_only_reads(self, backend: Backend) -> None:
        read, spent = shelf(quota("5/minute"), tier="a"), shelf(quota("5/minute"), tier="b")

        reply = await backend.take([charge(read, 0), charge(spent, 2)])

        assert reply == (True, reply.now, [0, 24 * SECOND])
        assert await drain(backend, read) == 5

    async def test_no_charges_are_allowed(self, backend: Backend, clock: Clock) -> None:
        assert await backend.take([]) == (True, clock.now, [])

    @pytest.mark.fault("A5", "A9")
    @pytest.mark.parametrize(
        "rate", ["1/day", "7/3 hours", "10000/second", "1/30 days", "5/minute"]
    )
    async def test_capacity_fits_a_full_bucket_and_one_more_never_does(
        self, backend: Backend, clock: Clock, rate: str
    ) -> None:
        only = quota(rate)
        image = shelf(only)

        never = await backend.take([charge(image, only.capacity + 1)])
        clock.advance(400 * DAY)
        still = await backend.take([charge(image, only.capacity + 1)])
        fits = await backend.take([charge(image, only.capacity)])

        assert (never.allowed, still.allowed, fits.allowed) == (False, False, True)
        assert (list(never.debts), list(still.debts)) == ([0], [0])
        assert wait_us(only, 0, only.capacity + 1) is None

    @pytest.mark.fault("A9")
    @pytest.mark.parametrize("rate", ["1/day", "7/3 hours", "10000/second", "1/30 days"])
    async def test_singles_of_the_capacity_fit_a_full_bucket_and_no_more(
        self, backend: Backend, rate: str
    ) -> None:
        image = shelf(quota(rate, capacity=25))

        assert await drain(backend, image) == 25

    @pytest.mark.fault("A7")
    async def test_thousand_takes_in_one_microsecond_admit_exactly_the_capacity(
        self, backend: Backend
    ) -> None:
        image = shelf(quota("137/second"))

        replies = await take_at_once(backend, [charge(image)], 1_000)

        assert sum(reply.allowed for reply in replies) == 137
        assert {reply.now for reply in replies} == {START}

    @pytest.mark.fault("A2")
    @pytest.mark.parametrize("cost", [0, 1])
    async def test_polling_while_empty_never_delays_the_refill(
        self, backend: Backend, clock: Clock, cost: int
    ) -> None:
        image = shelf(quota("7/second"))
        await drain(backend, image)
        refilled = clock.now + quota("7/second").interval_us

        while clock.now < refilled - 977:
            clock.advance(977)
            polled = await backend.take([charge(image, cost)])
            assert polled.allowed == (cost == 0)
        clock.now = refilled - 1
        early = await backend.take([charge(image)])
        clock.now = refilled
        in_time = await backend.take([charge(image)])

        assert (early.allowed, in_time.allowed) == (False, True)

    @pytest.mark.fault("A8")
    @pytest.mark.parametrize("year", [1971, 2026, 2100, 2200])
    async def test_instants_up_to_the_year_2200_are_exact(
        self, backend: Backend, clock: Clock, year: int
    ) -> None:
        clock.now = (datetime(year, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // (
            datetime.resolution
        ) + 7
        small, large = quota("10000/second", "s"), quota("1/3650 days", "l", capacity=1)
        both = shelf(small, large)

        first = await backend.take([charge(both)])
        clock.advance(1)
        later = await backend.take([charge(both, 0)])

        assert first == (True, clock.now - 1, [100, 3650 * DAY])
        assert later == (True, clock.now, [99, 3650 * DAY - 1])

    @pytest.mark.fault("B3")
    async def test_retry_at_the_stated_time_succeeds_and_a_microsecond_earlier_does_not(
        self, backend: Backend, clock: Clock
    ) -> None:
        quotas = (quota("7/3 hours", "h"), quota("10/minute", "m"), quota("9/day", "d"))
        image = shelf(*quotas)
        for cost in (3, 1, 5, 2, 7, 7, 4):
            reply = await backend.take([charge(image, cost)])
            waits = [wait_us(q, debt, cost) for q, debt in zip(quotas, reply.debts, strict=True)]
            if reply.allowed:
                continue
            clock.advance(max(wait or 0 for wait in waits) - 1)
            assert not (await backend.take([charge(image, cost)])).allowed
            clock.advance(1)

            assert (await backend.take([charge(image, cost)])).allowed

    @pytest.mark.fault("A11")
    async def test_window_shortened_from_a_day_to_a_minute_lowers_the_bucket(
        self, backend: Backend, clock: Clock
    ) -> None:
        await drain(backend, shelf(quota("5/day")))
        short = shelf(quota("5/minute"))

        denied = await backend.take([charge(short)])
        clock.advance(MINUTE + 12 * SECOND)
        retried = await backend.take([charge(short)])

        assert denied == (False, denied.now, [2 * MINUTE])
        assert retried.allowed

    @pytest.mark.fault("A11")
    async def test_peek_at_a_bucket_beyond_its_clamp_does_not_lower_it(
        self, backend: Backend, clock: Clock
    ) -> None:
        day = shelf(quota("5/day"))
        await drain(backend, day)

        short = await debts(backend, charge(shelf(quota("5/minute"))))

        assert short == [2 * MINUTE]
        assert await debts(backend, charge(day)) == [DAY]

    @pytest.mark.fault("A11")
    async def test_peek_before_a_charge_of_the_same_bucket_does_not_hide_the_lowering(
        self, backend: Backend, clock: Clock
    ) -> None:
        await drain(backend, shelf(quota("5/day")))
        short = shelf(quota("5/minute"))

        await backend.take([charge(short, 0), charge(short, 1)])
        clock.advance(MINUTE)

        assert await debts(backend, charge(short)) == [MINUTE]

    @pytest.mark.fault("A11", "B2")
    async def test_clock_stepped_back_an_hour_costs_at_most_one_empty_window(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("5/minute"))
        await drain(backend, image)
        clock.advance(-HOUR)

        frozen = await backend.take([charge(image)])
        clock.advance(MINUTE + 12 * SECOND - 1)
        early = await backend.take([charge(image)])
        clock.advance(1)
        served = await backend.take([charge(image)])

        assert (frozen.allowed, early.allowed, served.allowed) == (False, False, True)

    @pytest.mark.fault("B2")
    async def test_clock_stepped_back_never_refills_twice(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("5/minute"))
        await drain(backend, image)
        clock.advance(30 * SECOND)
        refilled = await drain(backend, image)
        clock.advance(-30 * SECOND)

        again = await drain(backend, image)
        clock.advance(30 * SECOND)
        once_more = await drain(backend, image)

        assert (refilled, again, once_more) == (2, 0, 0)

    @pytest.mark.fault("A11", "B2", "B3")
    @pytest.mark.parametrize("change", ["shorter window", "clock back"])
    async def test_client_that_obeys_every_retry_after_is_served_at_the_promised_rate_for_a_day(
        self, backend: Backend, clock: Clock, change: str
    ) -> None:
        only = quota("1/10 minutes", capacity=3)
        image = shelf(only)
        if change == "clock back":
            await drain(backend, image)
            clock.advance(-HOUR)
        else:
            await drain(backend, shelf(quota("3/7 days")))
        served, end = 0, clock.now + DAY

        while clock.now < end:
            reply = await backend.take([charge(image)])
            served += reply.allowed
            clock.advance(wait_us(only, reply.debts[0], 1) or 1)

        # Lowered to two windows, six intervals, the first token is there after four of them.
        assert served == DAY // only.interval_us - 4

    @pytest.mark.fault("A11", "D6")
    async def test_smaller_window_of_another_tier_never_lowers_a_bucket(
        self, backend: Backend
    ) -> None:
        day, minute = shelf(quota("5/day"), tier="free"), shelf(quota("5/minute"), tier="pro")
        await drain(backend, day)
        await drain(backend, minute)

        reply = await backend.take([charge(minute), charge(day)])

        assert reply == (False, reply.now, [MINUTE, DAY])
        assert await debts(backend, charge(day), charge(minute)) == [DAY, MINUTE]

    @pytest.mark.fault("A11")
    async def test_smaller_window_of_another_quota_in_the_cell_never_lowers_a_bucket(
        self, backend: Backend, clock: Clock
    ) -> None:
        both = shelf(quota("5/minute", "m"), quota("5/day", "d"))
        await drain(backend, both)
        clock.advance(-HOUR)

        await backend.take([charge(both)])

        assert await debts(backend, charge(both)) == [2 * MINUTE, DAY + HOUR]

    @pytest.mark.fault("A11")
    async def test_lowering_one_bucket_leaves_a_full_one_full_though_the_clock_steps_back(
        self, backend: Backend, clock: Clock
    ) -> None:
        await drain(backend, shelf(quota("5/day", "d")))
        both = shelf(quota("5/minute", "d"), quota("9/minute", "m"))

        await backend.take([charge(both)])
        clock.advance(-SECOND)

        assert await debts(backend, charge(both)) == [2 * MINUTE, 0]

    @pytest.mark.fault("C3")
    async def test_raising_a_rate_keeps_what_was_used(self, backend: Backend, clock: Clock) -> None:
        await drain(backend, shelf(quota("5/minute")))
        raised = shelf(quota("6/minute"))

        assert await drain(backend, raised) == 0
        clock.advance(30 * SECOND)
        assert await drain(backend, raised) == 3

    @pytest.mark.fault("C3")
    async def test_longer_window_grants_only_the_difference(self, backend: Backend) -> None:
        await drain(backend, shelf(quota("5/minute")))

        grown = await drain(backend, shelf(quota("5/minute", capacity=8)))

        assert grown == 3

    @pytest.mark.fault("C3")
    async def test_renamed_quota_starts_full_while_the_old_record_stays_until_full(
        self, backend: Backend, clock: Clock
    ) -> None:
        old, new = shelf(quota("5/day", "old")), shelf(quota("5/minute", "new"))
        await drain(backend, old)

        renamed = await drain(backend, new)
        clock.advance(DAY // 5)
        await backend.take([charge(new)])
        back = await drain(backend, old)

        assert (renamed, back) == (5, 1)

    async def test_bucket_of_another_name_is_dropped_once_it_is_full(
        self, backend: Backend, clock: Clock
    ) -> None:
        old, new = shelf(quota("5/minute", "old")), shelf(quota("5/day", "new"))
        await drain(backend, old)
        clock.advance(HOUR)

        await backend.take([charge(new)])

        assert await debts(backend, charge(old)) == [0]
        assert await debts(backend, charge(new)) == [DAY // 5]

    @pytest.mark.fault("D6")
    async def test_each_tier_has_its_own_bucket_and_keeps_it(self, backend: Backend) -> None:
        free, pro = shelf(quota("5/hour"), tier="free"), shelf(quota("5/hour"), tier="pro")

        taken = [await drain(backend, one) for one in (free, pro, free, pro, free)]

        assert taken == [5, 5, 0, 0, 0]

    async def test_each_subject_has_its_own_bucket(self, backend: Backend) -> None:
        image = shelf(quota("5/hour"))

        assert [await drain(backend, image, name) for name in ("u1", "u2", "u1")] == [5, 5, 0]

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

    async def test_open_and_close_may_be_repeated_and_buckets_stay(self, backend: Backend) -> None:
        image = shelf(quota("5/hour"))
        await backend.open()
        await backend.open()
        await drain(backend, image)

        await backend.close()
        await backend.close()

        assert await drain(backend, image) == 0

    async def test_now_is_the_clock_that_decides(self, backend: Backend, clock: Clock) -> None:
        assert backend.now() == clock.now
