"""What every backend promises of a take: all of it or nothing, exactly, and to each their own."""

from __future__ import annotations

import itertools

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
    take_at_once,
)
from tieredlimit.testing.clock import Clock

__all__ = ["TakingContract"]


class TakingContract:
    """What a take charges, and what it leaves alone."""

    async def test_fresh_bucket_is_full_and_a_take_spends_from_it(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("5/minute"))

        reply = await backend.take([charge(image, 2)])

        assert reply == (True, clock.now, [2 * 12 * SECOND])
        assert await drain(backend, image) == 3

    async def test_denial_charges_no_bucket(self, backend: Backend) -> None:
        wide = charge(shelf(quota("10/minute"), tier="wide"))
        empty = charge(shelf(quota("1/minute"), tier="empty"), 2)

        assert not (await backend.take([wide, empty])).allowed
        assert await debts(backend, wide, empty) == [0, 0]

    async def test_denial_charges_nothing_in_any_order_of_charges(self, backend: Backend) -> None:
        fitting = [
            charge(shelf(quota("9/hour"), quota("99/day", "d"), tier=f"t{i}")) for i in range(3)
        ]
        denying = charge(shelf(quota("3/minute"), tier="tight"), 4)

        for order in itertools.permutations([*fitting, denying]):
            assert not (await backend.take(order)).allowed

        assert await debts(backend, *fitting, denying) == [0] * 7

    async def test_denied_large_cost_leaves_the_tokens_for_a_small_one(
        self, backend: Backend
    ) -> None:
        image = shelf(quota("20/hour"))
        assert (await backend.take([charge(image, 19)])).allowed

        denied = await take_at_once(backend, [charge(image, 20)], 100)
        small = await backend.take([charge(image, 1)])

        assert not any(reply.allowed for reply in denied)
        assert small.allowed

    async def test_hundred_concurrent_takes_charge_both_subjects_alike(
        self, backend: Backend
    ) -> None:
        mine = charge(shelf(quota("60/hour"), tier="mine"))
        ours = charge(shelf(quota("30/hour"), tier="ours"))

        replies = await take_at_once(backend, [mine, ours], 100)

        assert sum(reply.allowed for reply in replies) == 30
        assert await debts(backend, mine, ours) == [30 * MINUTE, HOUR]

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

    async def test_one_quota_of_a_cell_denying_leaves_the_other_whole(
        self, backend: Backend
    ) -> None:
        both = shelf(quota("5/minute", "m"), quota("2/day", "d"))
        await backend.take([charge(both, 2)])

        reply = await backend.take([charge(both)])

        assert reply == (False, reply.now, [24 * SECOND, DAY])

    async def test_charges_on_one_bucket_are_summed(self, backend: Backend) -> None:
        image = shelf(quota("5/minute"))

        too_much = await backend.take([charge(image, 4), charge(image, 4)])
        fits = await backend.take([charge(image, 4), charge(image, 1)])

        assert too_much == (False, too_much.now, [0, 0])
        assert fits == (True, fits.now, [MINUTE, MINUTE])

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

    async def test_capacity_fits_a_full_bucket_and_one_more_never_does(
        self, backend: Backend, clock: Clock
    ) -> None:
        for i, rate in enumerate(("1/day", "7/3 hours", "10000/second", "1/30 days", "5/minute")):
            only = quota(rate)
            image = shelf(only, tier=f"t{i}")

            never = await backend.take([charge(image, only.capacity + 1)])
            clock.now += 400 * DAY
            still = await backend.take([charge(image, only.capacity + 1)])
            fits = await backend.take([charge(image, only.capacity)])

            assert (never.allowed, still.allowed, fits.allowed) == (False, False, True), rate
            assert (list(never.debts), list(still.debts)) == ([0], [0]), rate
            assert wait_us(only, 0, only.capacity + 1) is None

    async def test_singles_of_the_capacity_fit_a_full_bucket_and_no_more(
        self, backend: Backend
    ) -> None:
        for i, rate in enumerate(("1/day", "7/3 hours", "10000/second", "1/30 days")):
            image = shelf(quota(rate, capacity=25), tier=f"t{i}")

            assert await drain(backend, image) == 25, rate

    async def test_thousand_takes_in_one_microsecond_admit_exactly_the_capacity(
        self, backend: Backend, clock: Clock
    ) -> None:
        image = shelf(quota("137/second"))

        replies = await take_at_once(backend, [charge(image)], 1_000)

        assert sum(reply.allowed for reply in replies) == 137
        assert {reply.now for reply in replies} == {clock.now}

    async def test_each_tier_has_its_own_bucket_and_keeps_it(self, backend: Backend) -> None:
        free, pro = shelf(quota("5/hour"), tier="free"), shelf(quota("5/hour"), tier="pro")

        taken = [await drain(backend, one) for one in (free, pro, free, pro, free)]

        assert taken == [5, 5, 0, 0, 0]

    async def test_each_subject_has_its_own_bucket(self, backend: Backend) -> None:
        image = shelf(quota("5/hour"))

        assert [await drain(backend, image, name) for name in ("u1", "u2", "u1")] == [5, 5, 0]

    async def test_open_and_close_may_be_repeated_and_buckets_stay(self, backend: Backend) -> None:
        image = shelf(quota("5/hour"))
        await backend.open()
        await backend.open()
        await drain(backend, image)

        await backend.close()
        await backend.close()

        assert await drain(backend, image) == 0
