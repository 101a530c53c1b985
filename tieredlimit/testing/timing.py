"""What every backend promises of time: refills, clocks that step, and numbers that change."""

from __future__ import annotations

from datetime import UTC, datetime

from tieredlimit._core.bucket import wait_us
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
)
from tieredlimit.testing.clock import Clock

__all__ = ["TimingContract"]


class TimingContract:
    """When tokens come back, whatever becomes of the clock and of the quotas."""

    async def test_polling_while_empty_never_delays_the_refill(
        self, backend: Backend, clock: Clock
    ) -> None:
        for cost in (0, 1):
            image = shelf(quota("7/second"), tier=f"t{cost}")
            await drain(backend, image)
            refilled = clock.now + quota("7/second").interval_us

            while clock.now < refilled - 977:
                clock.now += 977
                polled = await backend.take([charge(image, cost)])
                assert polled.allowed == (cost == 0)
            clock.now = refilled - 1
            early = await backend.take([charge(image)])
            clock.now = refilled
            in_time = await backend.take([charge(image)])

            assert (early.allowed, in_time.allowed) == (False, True)

    async def test_instants_up_to_the_year_2200_are_exact(
        self, backend: Backend, clock: Clock
    ) -> None:
        small, large = quota("10000/second", "s"), quota("1/3650 days", "l", capacity=1)
        for year in (1971, 2026, 2100, 2200):
            clock.move_to(datetime(year, 1, 1, 0, 0, 0, 7, UTC))
            both = shelf(small, large, tier=f"t{year}")

            first = await backend.take([charge(both)])
            clock.now += 1
            later = await backend.take([charge(both, 0)])

            assert first == (True, clock.now - 1, [100, 3650 * DAY])
            assert later == (True, clock.now, [99, 3650 * DAY - 1])

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
            clock.now += max(wait or 0 for wait in waits) - 1
            assert not (await backend.take([charge(image, cost)])).allowed
            clock.now += 1

            assert (await backend.take([charge(image, cost)])).allowed

    async def test_window_shortened_from_a_day_to_a_minute_lowers_the_bucket(
        self, backend: Backend, clock: Clock
    ) -> None:
        await drain(backend, shelf(quota("5/day")))
        short = shelf(quota("5/minute"))

        denied = await backend.take([charge(short)])
        clock.now += MINUTE + 12 * SECOND
        retried = await backend.take([charge(short)])

        assert denied == (False, denied.now, [2 * MINUTE])
        assert retried.allowed

    async def test_peek_at_a_bucket_beyond_its_clamp_does_not_lower_it(
        self, backend: Backend
    ) -> None:
        day = shelf(quota("5/day"))
        await drain(backend, day)

        short = await debts(backend, charge(shelf(quota("5/minute"))))

        assert short == [2 * MINUTE]
        assert await debts(backend, charge(day)) == [DAY]

    async def test_peek_before_a_charge_of_the_same_bucket_does_not_hide_the_lowering(
        self, backend: Backend, clock: Clock
    ) -> None:
        await drain(backend, shelf(quota("5/day")))
        short = shelf(quota("5/minute"))

        await backend.take([charge(short, 0), charge(short, 1)])
        clock.now += MINUTE

        assert await debts(backend, charge(short)) == [MINUTE]

    async def test_clock_stepped_back_an_hour_costs_at_most_one_empty_window(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("5/minute"))
        await drain(backend, image)
        clock.now += -HOUR

        frozen = await backend.take([charge(image)])
        clock.now += MINUTE + 12 * SECOND - 1
        early = await backend.take([charge(image)])
        clock.now += 1
        served = await backend.take([charge(image)])

        assert (frozen.allowed, early.allowed, served.allowed) == (False, False, True)

    async def test_clock_stepped_back_never_refills_twice(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("5/minute"))
        await drain(backend, image)
        clock.now += 30 * SECOND
        refilled = await drain(backend, image)
        clock.now += -30 * SECOND

        again = await drain(backend, image)
        clock.now += 30 * SECOND
        once_more = await drain(backend, image)

        assert (refilled, again, once_more) == (2, 0, 0)

    async def test_client_that_obeys_every_retry_after_is_served_at_the_promised_rate_for_a_day(
        self, backend: Backend, clock: Clock
    ) -> None:
        only = quota("1/10 minutes", capacity=3)
        for change in ("shorter", "back"):
            image = shelf(only, tier=change)
            if change == "back":
                await drain(backend, image)
                clock.now -= HOUR
            else:
                await drain(backend, shelf(quota("3/7 days"), tier=change))
            served, end = 0, clock.now + DAY

            while clock.now < end:
                reply = await backend.take([charge(image)])
                served += reply.allowed
                clock.now += wait_us(only, reply.debts[0], 1) or 1

            # Lowered to two windows, six intervals, the first token is there after four of them.
            assert served == DAY // only.interval_us - 4, change

    async def test_smaller_window_of_another_tier_never_lowers_a_bucket(
        self, backend: Backend
    ) -> None:
        day, minute = shelf(quota("5/day"), tier="free"), shelf(quota("5/minute"), tier="pro")
        await drain(backend, day)
        await drain(backend, minute)

        reply = await backend.take([charge(minute), charge(day)])

        assert reply == (False, reply.now, [MINUTE, DAY])
        assert await debts(backend, charge(day), charge(minute)) == [DAY, MINUTE]

    async def test_smaller_window_of_another_quota_in_the_cell_never_lowers_a_bucket(
        self, backend: Backend, clock: Clock
    ) -> None:
        both = shelf(quota("5/minute", "m"), quota("5/day", "d"))
        await drain(backend, both)
        clock.now += -HOUR

        await backend.take([charge(both)])

        assert await debts(backend, charge(both)) == [2 * MINUTE, DAY + HOUR]

    async def test_lowering_one_bucket_leaves_a_full_one_full_though_the_clock_steps_back(
        self, backend: Backend, clock: Clock
    ) -> None:
        await drain(backend, shelf(quota("5/day", "d")))
        both = shelf(quota("5/minute", "d"), quota("9/minute", "m"))

        await backend.take([charge(both)])
        clock.now += -SECOND

        assert await debts(backend, charge(both)) == [2 * MINUTE, 0]

    async def test_raising_a_rate_keeps_what_was_used(self, backend: Backend, clock: Clock) -> None:
        await drain(backend, shelf(quota("5/minute")))
        raised = shelf(quota("6/minute"))

        assert await drain(backend, raised) == 0
        clock.now += 30 * SECOND
        assert await drain(backend, raised) == 3

    async def test_longer_window_grants_only_the_difference(self, backend: Backend) -> None:
        await drain(backend, shelf(quota("5/minute")))

        grown = await drain(backend, shelf(quota("5/minute", capacity=8)))

        assert grown == 3

    async def test_renamed_quota_starts_full_while_the_old_record_stays_until_full(
        self, backend: Backend, clock: Clock
    ) -> None:
        old, new = shelf(quota("5/day", "old")), shelf(quota("5/minute", "new"))
        await drain(backend, old)

        renamed = await drain(backend, new)
        clock.now += DAY // 5
        await backend.take([charge(new)])
        back = await drain(backend, old)

        assert (renamed, back) == (5, 1)

    async def test_bucket_of_another_name_is_dropped_once_it_is_full(
        self, backend: Backend, clock: Clock
    ) -> None:
        old, new = shelf(quota("5/minute", "old")), shelf(quota("5/day", "new"))
        await drain(backend, old)
        clock.now += HOUR

        await backend.take([charge(new)])

        assert await debts(backend, charge(old)) == [0]
        assert await debts(backend, charge(new)) == [DAY // 5]

    async def test_now_is_the_clock_that_decides(self, backend: Backend, clock: Clock) -> None:
        assert backend.now() == clock.now
