"""What every store promises of what takes leave behind: slots, reservations, refunds, and pools."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from struct import pack
from typing import Any

import pytest

from tests.contract import DAY, HOUR, MINUTE, SECOND, Clock, charge, debts, drain, quota, shelf
from tieredlimit import BackendError
from tieredlimit._core.keys import POOL, RESERVATION, key_prefix, nameless
from tieredlimit._core.shelf import Shelf
from tieredlimit.backends import (
    Backend,
    Charge,
    Claim,
    ClusterBackend,
    MemoryBackend,
    RedisBackend,
    Slot,
    redis_holds,
)
from tieredlimit.backends.backend import Claimed
from tieredlimit.backends.control import holds_of
from tieredlimit.backends.holds import Correction, Hold, Holds

LEASE = 10 * SECOND
MOST_DROPPED = 16
"""How many slots that are free again a take drops."""

Ask = Callable[..., Any]
"""Run a command on the server that has the key, its second word."""

ids = itertools.count()


def new_id() -> bytes:
    return next(ids).to_bytes(16, "big")


def slot(limit: int = 1, lease_us: int = LEASE, name: str = "video") -> Slot:
    return Slot(key_prefix("test", 0, name, "free~lease", None) + "u1", limit, lease_us)


def record(id_: bytes) -> str:
    return key_prefix("test", 0, RESERVATION, id_.hex(), None)[:-2]


def claim(*slots: Slot, kept: int = 0) -> Claim:
    """Return a claim of these slots, with a record if it is kept for some time."""
    id_ = new_id()
    return Claim(id_, slots, record(id_) if kept else "", kept)


def hold(of: Claim) -> Hold:
    return Hold(of.id, tuple((key, lease_us) for key, _, lease_us in of.slots))


def pool(rate: str, *, leave: int = 0, cost: int = 1) -> Charge:
    shared = replace(quota(rate, "pool"), leave=leave)
    key = key_prefix("test", 0, POOL, "gpu", None) + "0"
    return Charge(key, Shelf((shared,), None, key, catch_all=False), cost)


def corrections(charges: Sequence[Charge], tokens: int) -> list[Correction]:
    """Return what charges so many more tokens, below zero what gives them back."""
    return [
        Correction(one.key, q.tag, tokens * q.interval_us, q.clamp_us)
        for one in charges
        for q in one.shelf.quotas
    ]


async def take(backend: Backend, charges: Sequence[Charge], claimed: Claim) -> Claimed:
    if isinstance(backend, MemoryBackend):
        return backend.claim_now(charges, claimed)
    assert isinstance(backend, RedisBackend | ClusterBackend)
    return await backend.claim(charges, claimed)


async def give_back(holds: Holds, by: str, of: Claim, given: Sequence[Correction]) -> list[int]:
    """Give back by settling or by a refund, and return the debts since."""
    if by == "refund":
        return list(await holds.refund(given))
    return list((await holds.settle(of.record, given)).debts)


async def admitted(backend: Backend, of: Slot, most: int = 20) -> int:
    """Return how many more may hold a slot at once, and leave it as it was."""
    given = [claim(of) for _ in range(most)]
    taken = [(await take(backend, [], one)).allowed for one in given]
    holds = holds_of(backend)
    assert holds is not None
    for one, allowed in zip(given, taken, strict=True):
        if allowed:
            await holds.release(hold(one))
    await holds.close()
    return sum(taken)


class HoldsContract:
    """Subclass it and provide `backend`, which decides by `clock`."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture(autouse=True)
    def patience(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A late answer is no error: a busy machine is not what is tested here."""
        monkeypatch.setattr(redis_holds, "TIMEOUT", 10.0)

    @pytest.fixture
    async def holds(self, backend: Backend) -> AsyncIterator[Holds]:
        holds = holds_of(backend)
        assert holds is not None
        yield holds
        await holds.close()

    # Slots

    async def test_slots_never_exceed_their_number_under_a_hundred_concurrent_claims(
        self, backend: Backend
    ) -> None:
        seven = slot(7)

        replies = await asyncio.gather(*(take(backend, [], claim(seven)) for _ in range(100)))

        assert sum(reply.allowed for reply in replies) == 7
        assert sorted(reply.held[0] for reply in replies) == [*range(7), *[7] * 93]

    @pytest.mark.fault("A3", "A4")
    async def test_denial_by_a_slot_charges_no_bucket_and_no_pool_and_reserves_nothing(
        self, backend: Backend, holds: Holds
    ) -> None:
        own, shared, one = (
            charge(shelf(quota("5/hour"), quota("9/day", "d"))),
            pool("9/hour"),
            slot(),
        )
        await take(backend, [], claim(one))
        denied = claim(one, kept=HOUR)

        reply = await take(backend, [own, shared], denied)

        assert (reply.allowed, reply.debts, reply.held) == (False, [0, 0, 0], [1])
        assert await debts(backend, own, shared) == [0, 0, 0]
        settled = await holds.settle(denied.record, corrections([own, shared], -1))
        assert not settled.settled

    @pytest.mark.fault("A3", "A4")
    @pytest.mark.parametrize("denying", ["own", "pool"])
    async def test_denial_by_a_bucket_takes_no_slot_and_no_other_bucket(
        self, backend: Backend, denying: str
    ) -> None:
        two = slot(2)
        own, shared = charge(shelf(quota("5/hour"))), pool("9/hour", leave=3)
        await backend.take([own._replace(cost=5) if denying == "own" else shared._replace(cost=6)])
        before = await debts(backend, own, shared._replace(shelf=pool("9/hour").shelf))

        reply = await take(backend, [own, shared], claim(two))

        assert (reply.allowed, reply.held) == (False, [0])
        assert await debts(backend, own, shared) == before
        assert await admitted(backend, two) == 2

    @pytest.mark.fault("A3", "A4")
    async def test_hundred_mixed_takes_charge_all_their_parts_alike(self, backend: Backend) -> None:
        own, shared, mine = charge(shelf(quota("60/hour"))), pool("30/hour", leave=10), slot(25)
        given = [claim(mine, kept=HOUR) for _ in range(100)]

        replies = await asyncio.gather(*(take(backend, [own, shared], one) for one in given))

        assert sum(reply.allowed for reply in replies) == 20
        assert await debts(backend, own, shared) == [20 * MINUTE, 40 * MINUTE]
        assert await admitted(backend, mine) == 5

    @pytest.mark.fault("A3")
    async def test_one_of_two_slots_being_taken_leaves_the_other_free(
        self, backend: Backend
    ) -> None:
        free, taken = slot(1, name="free"), slot(1, name="taken")
        await take(backend, [], claim(taken))

        for order in ((free, taken), (taken, free)):
            assert not (await take(backend, [], claim(*order))).allowed

        assert await admitted(backend, free) == 1

    @pytest.mark.fault("H1")
    async def test_slot_of_a_crashed_holder_is_free_after_its_lease_and_not_before(
        self, backend: Backend, clock: Clock
    ) -> None:
        one = slot()
        await take(backend, [], claim(one))

        clock.advance(LEASE - 1)
        early = await take(backend, [], claim(one))
        clock.advance(1)
        in_time = await take(backend, [], claim(one))

        assert (early.allowed, early.held) == (False, [1])
        assert in_time.allowed

    async def test_renewal_holds_all_slots_for_their_whole_lease_again(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        short, long = slot(1, LEASE, "short"), slot(1, 2 * LEASE, "long")
        mine = claim(short, long)
        await take(backend, [], mine)

        clock.advance(LEASE - 1)
        renewed = await holds.renew(hold(mine))
        clock.advance(LEASE - 1)
        held = [await admitted(backend, one) for one in (short, long)]
        clock.advance(1)
        short_is_free = [await admitted(backend, one) for one in (short, long)]
        clock.advance(LEASE)
        both_are_free = [await admitted(backend, one) for one in (short, long)]

        assert renewed
        assert (held, short_is_free, both_are_free) == ([0, 0], [1, 0], [1, 1])

    @pytest.mark.fault("H2")
    async def test_late_renewal_revives_nothing(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        one = slot()
        late = claim(one)
        await take(backend, [], late)
        clock.advance(LEASE)

        unclaimed = await holds.renew(hold(late))
        other = claim(one)
        given_away = (await take(backend, [], other)).allowed
        again = await holds.renew(hold(late))

        assert (unclaimed, given_away, again) == (False, True, False)
        assert await holds.renew(hold(other))

    @pytest.mark.fault("H2")
    async def test_renewal_of_two_slots_of_which_one_is_lost_renews_neither(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        short, long = slot(1, LEASE, "short"), slot(1, 2 * LEASE, "long")
        mine = claim(long, short)
        await take(backend, [], mine)
        clock.advance(LEASE)

        renewed = await holds.renew(hold(mine))
        clock.advance(LEASE)

        assert not renewed
        assert await admitted(backend, long) == 1

    @pytest.mark.fault("H2")
    async def test_released_lease_is_not_renewed(self, backend: Backend, holds: Holds) -> None:
        mine = claim(slot())
        await take(backend, [], mine)
        await holds.release(hold(mine))

        assert not await holds.renew(hold(mine))
        assert await admitted(backend, slot()) == 1

    @pytest.mark.fault("H4")
    async def test_releasing_twice_frees_one_slot(self, backend: Backend, holds: Holds) -> None:
        three = slot(3)
        mine, *_ = given = [claim(three) for _ in range(3)]
        for one in given:
            await take(backend, [], one)

        released = [await holds.release(hold(mine)) for _ in range(3)]

        assert released == [True, False, False]
        assert await admitted(backend, three) == 1

    @pytest.mark.fault("H4")
    async def test_releasing_after_the_time_is_over_frees_nobody_elses_slot(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        one = slot()
        late = claim(one)
        await take(backend, [], late)
        clock.advance(LEASE)
        await take(backend, [], claim(one))

        released = await holds.release(hold(late))

        assert not released
        assert await admitted(backend, one) == 0

    async def test_release_of_what_is_over_but_not_yet_given_away_says_so(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        mine = claim(slot(5))
        await take(backend, [], mine)
        clock.advance(LEASE)

        assert not await holds.release(hold(mine))

    @pytest.mark.fault("H5")
    async def test_what_a_take_holds_is_released_by_the_id_that_its_caller_made(
        self, backend: Backend, holds: Holds
    ) -> None:
        one, mine = slot(), claim(slot())
        await take(backend, [], mine)
        full = await admitted(backend, one)

        unheard_of = Hold(mine.id, ((one.key, one.lease_us),))

        assert full == 0
        assert await holds.release(unheard_of)
        assert await admitted(backend, one) == 1

    async def test_claim_without_an_id_only_counts(self, backend: Backend) -> None:
        one = slot()
        nobody = Claim(b"", (one,))

        free = await take(backend, [], nobody)
        await take(backend, [], claim(one))
        full = await take(backend, [], nobody)

        assert (free.allowed, free.held) == (True, [0])
        assert (full.allowed, full.held) == (False, [1])

    async def test_fewer_slots_than_are_held_admit_nobody_until_enough_are_free(
        self, backend: Backend, holds: Holds
    ) -> None:
        given = [claim(slot(5)) for _ in range(5)]
        for one in given:
            await take(backend, [], one)

        fewer = []
        for one in given:
            fewer.append(await admitted(backend, slot(2)))
            await holds.release(hold(one))

        assert fewer == [0, 0, 0, 0, 1]

    @pytest.mark.fault("A11")
    @pytest.mark.parametrize("step_back", [SECOND, HOUR])
    async def test_clock_stepped_back_holds_a_slot_for_its_own_lease_at_most(
        self, backend: Backend, clock: Clock, step_back: int
    ) -> None:
        one = slot()
        await take(backend, [], claim(one))
        await take(backend, [], claim(one))  # denied
        clock.advance(-step_back)

        denied = await take(backend, [], claim(one))
        clock.advance(LEASE - 1)
        early = await take(backend, [], claim(one))
        clock.advance(1)
        in_time = await take(backend, [], claim(one))

        assert (denied.allowed, early.allowed, in_time.allowed) == (False, False, True)

    @pytest.mark.fault("A11")
    async def test_clock_stepped_back_holds_a_slot_no_longer_for_who_asked_with_a_longer_lease(
        self, backend: Backend, clock: Clock
    ) -> None:
        short, long = slot(1, LEASE), slot(1, HOUR)
        await take(backend, [], claim(short))
        clock.advance(-30 * MINUTE)

        denied = [(await take(backend, [], claim(one))).allowed for one in (long, short)]
        clock.advance(LEASE)
        in_time = await take(backend, [], claim(short))

        assert denied == [False, False]
        assert in_time.allowed

    async def test_denials_hold_no_slot_for_longer_than_its_lease(
        self, backend: Backend, clock: Clock
    ) -> None:
        long, short = slot(2, 3 * LEASE), slot(2, LEASE)
        for one in (long, short):
            await take(backend, [], claim(one))
        clock.advance(LEASE)
        await take(backend, [], claim(short))
        clock.advance(LEASE - 1)
        denied = await take(backend, [], claim(short))

        clock.advance(LEASE + 1)

        assert not denied.allowed
        assert await admitted(backend, short) == 2

    @pytest.mark.fault("H1")
    async def test_denial_while_all_are_held_denies_nobody_once_the_first_is_free(
        self, backend: Backend, clock: Clock
    ) -> None:
        two = slot(2)
        await take(backend, [], claim(two))
        clock.advance(LEASE // 2)
        await take(backend, [], claim(two))
        await take(backend, [], claim(two))  # denied

        clock.advance(LEASE // 2)

        assert await admitted(backend, two) == 1

    async def test_slot_that_a_raised_limit_has_given_is_free_after_its_shorter_lease(
        self, backend: Backend, clock: Clock
    ) -> None:
        one, two = slot(1, DAY), slot(2, LEASE)
        await take(backend, [], claim(one))
        await take(backend, [], claim(one))  # denied
        await take(backend, [], claim(two))

        clock.advance(LEASE)

        assert await admitted(backend, two) == 1

    @pytest.mark.fault("A11")
    @pytest.mark.parametrize("step_back", [0, HOUR])
    async def test_slot_is_held_for_its_own_lease_whatever_lease_others_ask_for(
        self, backend: Backend, clock: Clock, step_back: int
    ) -> None:
        long, short = slot(1, 3 * LEASE), slot(1, LEASE)
        await take(backend, [], claim(long))
        clock.advance(-step_back)

        early = []
        for us in (0, LEASE, LEASE, LEASE - 1):
            clock.advance(us)
            early.append((await take(backend, [], claim(short))).allowed)
        clock.advance(1)
        in_time = await take(backend, [], claim(short))

        assert (early, in_time.allowed) == ([False] * 4, True)

    @pytest.mark.fault("A8")
    @pytest.mark.parametrize("year", [1971, 2026, 2100, 2200])
    @pytest.mark.parametrize("lease_us", [1, 999_999_999, DAY])
    async def test_leases_are_exact_to_the_microsecond_up_to_the_year_2200(
        self, backend: Backend, holds: Holds, clock: Clock, year: int, lease_us: int
    ) -> None:
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        clock.now = (datetime(year, 1, 1, tzinfo=UTC) - epoch) // datetime.resolution + 7
        one = slot(1, lease_us)
        mine = claim(one)
        await take(backend, [], mine)

        clock.advance(lease_us - 1)
        renewed = await holds.renew(hold(mine))
        clock.advance(lease_us - 1)
        held = await admitted(backend, one)
        clock.advance(1)
        lost = await holds.renew(hold(mine))

        assert (renewed, held, lost) == (True, 0, False)
        assert await admitted(backend, one) == 1

    # Pools

    async def test_take_must_leave_in_a_pool_what_its_tier_leaves(self, backend: Backend) -> None:
        new, first = pool("10/hour", leave=5), pool("10/hour")

        flood = [(await backend.take([new])).allowed for _ in range(20)]
        rest = [(await backend.take([first])).allowed for _ in range(20)]

        assert (sum(flood), sum(rest)) == (5, 5)

    @pytest.mark.fault("A3")
    async def test_denial_by_what_must_be_left_charges_the_account_nothing(
        self, backend: Backend
    ) -> None:
        own = charge(shelf(quota("20/hour")))
        for _ in range(3):
            await backend.take([own, pool("5/hour", leave=2)])

        denied = await backend.take([own, pool("5/hour", leave=2)])
        first = await backend.take([own, pool("5/hour")])

        assert denied == (False, denied.now, [9 * MINUTE, 36 * MINUTE])
        assert first == (True, first.now, [12 * MINUTE, 48 * MINUTE])

    @pytest.mark.fault("A11")
    async def test_pool_whose_window_was_shortened_is_lowered_beside_other_charges(
        self, backend: Backend, clock: Clock
    ) -> None:
        own, short = charge(shelf(quota("9/hour"))), pool("10/minute")
        await backend.take([own, pool("10/day", cost=10)])

        denied = await backend.take([own, short])
        clock.advance(2 * MINUTE)
        filled = await backend.take([own, short._replace(cost=10)])

        assert (denied.allowed, denied.debts[1]) == (False, 2 * MINUTE)
        assert filled.allowed

    @pytest.mark.fault("A12")
    async def test_charges_on_one_bucket_are_summed_with_a_pool_too(self, backend: Backend) -> None:
        own = charge(shelf(quota("9/hour")), 2)
        shared = pool("6/hour", leave=2, cost=2)

        too_much = await take(backend, [own, shared, shared, shared], claim(slot()))
        fits = await take(backend, [own, shared, own, shared], claim(slot(), kept=HOUR))

        assert (too_much.allowed, too_much.debts) == (False, [0, 0, 0, 0])
        assert fits.allowed
        assert await debts(backend, own, shared) == [4 * quota("9/hour").interval_us, 40 * MINUTE]

    # Reservations

    @pytest.mark.fault("A10", "E9")
    async def test_settling_corrects_every_bucket_once(
        self, backend: Backend, holds: Holds
    ) -> None:
        both = [charge(shelf(quota("60/hour"), quota("9/day", "d")), 5), pool("60/hour", cost=5)]
        given = claim(kept=DAY)
        await take(backend, both, given)
        two_less = corrections(both, -2)

        first = await holds.settle(given.record, two_less)
        again = [await holds.settle(given.record, two_less) for _ in range(3)]

        day = quota("9/day").interval_us
        assert (first.settled, list(first.debts)) == (True, [3 * MINUTE, 3 * day, 3 * MINUTE])
        assert [(one.settled, list(one.debts)) for one in again] == [(False, list(first.debts))] * 3
        assert await debts(backend, *both) == list(first.debts)

    @pytest.mark.fault("A10")
    async def test_what_is_given_back_is_no_more_than_was_charged(
        self, backend: Backend, holds: Holds
    ) -> None:
        one = charge(shelf(quota("60/hour")), 5)
        given = claim(kept=HOUR)
        await backend.take([one])
        await take(backend, [one], given)

        settled = await holds.settle(given.record, corrections([one], -50))

        assert (settled.settled, list(settled.debts)) == (True, [5 * MINUTE])

    @pytest.mark.fault("A10")
    async def test_what_is_given_back_late_fills_a_bucket_no_further_than_full(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        image = shelf(quota("60/hour"))
        one, given = charge(image, 60), claim(kept=HOUR)
        await take(backend, [one], given)

        clock.advance(40 * MINUTE)
        settled = await holds.settle(given.record, corrections([one], -60))

        assert (settled.settled, list(settled.debts)) == (True, [0])
        assert await drain(backend, image) == 60

    @pytest.mark.fault("A10")
    async def test_settling_after_everything_was_given_back_leaves_full_what_is_full(
        self, backend: Backend, holds: Holds
    ) -> None:
        image = shelf(quota("5/hour"))
        one, given = charge(image, 5), claim(kept=HOUR)
        await take(backend, [one], given)
        await holds.refund(corrections([one], -5))

        settled = await holds.settle(given.record, corrections([one], -3))

        assert list(settled.debts) == [0]
        assert await drain(backend, image) == 5

    @pytest.mark.fault("A10")
    async def test_settling_after_quotas_have_changed_gives_back_what_was_charged_at_most(
        self, backend: Backend, holds: Holds
    ) -> None:
        cheap, dear = charge(shelf(quota("60/hour")), 4), charge(shelf(quota("6/hour")), 4)
        given = claim(kept=HOUR)
        await backend.take([cheap])
        await take(backend, [cheap], given)

        settled = await holds.settle(given.record, corrections([dear], -4))

        assert list(settled.debts) == [4 * MINUTE]
        assert await debts(backend, dear) == [4 * MINUTE]

    async def test_more_leaves_a_bucket_below_empty_by_one_capacity_at_most(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        image = shelf(quota("60/hour"))
        one, given = charge(image, 60), claim(kept=HOUR)
        await take(backend, [one], given)

        settled = await holds.settle(given.record, corrections([one], 500))
        clock.advance(HOUR)
        still_empty = await drain(backend, image)
        clock.advance(MINUTE)

        assert list(settled.debts) == [2 * HOUR]
        assert (still_empty, await drain(backend, image)) == (0, 1)

    async def test_more_charges_a_bucket_that_is_full_again(
        self, backend: Backend, holds: Holds, clock: Clock
    ) -> None:
        one, given = charge(shelf(quota("60/hour"))), claim(kept=DAY)
        await take(backend, [one], given)
        clock.advance(HOUR)

        settled = await holds.settle(given.record, corrections([one], 30))

        assert list(settled.debts) == [30 * MINUTE]
        assert await debts(backend, one) == [30 * MINUTE]

    async def test_exact_estimate_is_settled_and_changes_nothing(
        self, backend: Backend, holds: Holds
    ) -> None:
        one, given = charge(shelf(quota("60/hour")), 7), claim(kept=HOUR)
        await take(backend, [one], given)

        settled = [await holds.settle(given.record, corrections([one], 0)) for _ in range(2)]

        assert [(bool(one.settled), list(one.debts)) for one in settled] == [
            (True, [7 * MINUTE]),
            (False, [7 * MINUTE]),
        ]

    async def test_record_of_other_buckets_is_an_error_and_stays(
        self, backend: Backend, holds: Holds
    ) -> None:
        one, given = charge(shelf(quota("60/hour"), quota("9/day", "d")), 4), claim(kept=HOUR)
        await take(backend, [one], given)
        before = await debts(backend, one)

        with pytest.raises(BackendError, match="is of other buckets"):
            await holds.settle(given.record, corrections([one], -4)[:1])

        assert await debts(backend, one) == before
        assert (await holds.settle(given.record, corrections([one], -4))).settled

    @pytest.mark.fault("H3")
    async def test_releasing_what_was_reserved_gives_nothing_back(
        self, backend: Backend, holds: Holds
    ) -> None:
        one, given = charge(shelf(quota("60/hour")), 7), claim(slot(), kept=HOUR)
        await take(backend, [one], given)

        await holds.release(hold(given))

        assert await debts(backend, one) == [7 * MINUTE]
        assert (await holds.settle(given.record, corrections([one], -7))).settled

    # Refunds

    @pytest.mark.fault("A10")
    async def test_refund_above_the_capacity_fills_a_bucket_and_no_more(
        self, backend: Backend, holds: Holds
    ) -> None:
        image = shelf(quota("5/hour"), quota("9/day", "d"))
        one = charge(image, 4)
        await backend.take([one])

        after = await holds.refund(corrections([one], -50))
        again = await holds.refund(corrections([one], -50))

        assert (list(after), list(again)) == ([0, 0], [0, 0])
        assert await drain(backend, image) == 5

    async def test_refund_of_some_leaves_the_rest_and_tells_every_debt(
        self, backend: Backend, holds: Holds
    ) -> None:
        own, shared = charge(shelf(quota("60/hour")), 7), pool("30/hour", cost=7)
        await backend.take([own, shared])

        after = await holds.refund(corrections([own, shared], -3))

        assert list(after) == [4 * MINUTE, 8 * MINUTE]
        assert await debts(backend, own, shared) == list(after)

    @pytest.mark.fault("A10")
    @pytest.mark.parametrize("by", ["settle", "refund"])
    @pytest.mark.parametrize("full", ["first", "last"])
    async def test_giving_back_counts_where_another_bucket_of_the_key_is_full_already(
        self, backend: Backend, holds: Holds, clock: Clock, full: str, by: str
    ) -> None:
        quotas = [quota("5/second", "s"), quota("60/hour")]
        if full == "last":
            quotas.reverse()
        one, given = charge(shelf(*quotas), 5), claim(kept=HOUR)
        await take(backend, [one], given)
        clock.advance(SECOND)

        after = await give_back(holds, by, given, corrections([one], -3))

        left = [0, 2 * MINUTE - SECOND]
        assert after == (left if full == "first" else left[::-1])
        assert await debts(backend, one) == after

    @pytest.mark.fault("A11")
    @pytest.mark.parametrize("by", ["settle", "refund"])
    async def test_bucket_that_was_filled_up_stays_full_though_the_clock_steps_back(
        self, backend: Backend, holds: Holds, clock: Clock, by: str
    ) -> None:
        one, given = charge(shelf(quota("60/hour"), quota("60/day", "d")), 5), claim(kept=HOUR)
        await take(backend, [one], given)
        hour, day = corrections([one], -5)

        await give_back(holds, by, given, [hour, day._replace(us=0)])
        clock.advance(-MINUTE)

        assert (await debts(backend, one))[0] == 0

    async def test_more_gives_nothing_back_where_the_window_is_shorter_since(
        self, backend: Backend, holds: Holds
    ) -> None:
        long, given = charge(shelf(quota("60/hour")), 30), claim(kept=HOUR)
        short = charge(shelf(quota("60/hour", capacity=5)))
        await take(backend, [long], given)

        settled = await holds.settle(given.record, corrections([short], 1))

        assert list(settled.debts) == [30 * MINUTE]
        assert await debts(backend, long) == [30 * MINUTE]

    async def test_level_of_a_pool_is_its_debt_and_changes_nothing(
        self, backend: Backend, holds: Holds
    ) -> None:
        shared = pool("30/hour", cost=7)
        (bucket,) = shared.shelf.quotas
        before = await holds.level(shared.key, bucket)
        await backend.take([shared])

        levels = [await holds.level(shared.key, bucket) for _ in range(2)]

        assert (before, levels) == (0, [14 * MINUTE] * 2)


class RedisHoldsContract(HoldsContract):
    """What holds for stores whose keys can be looked at; provide `ask` and `live` as well.

    `live` decides by the server's clock.
    """

    @pytest.mark.fault("C6", "F7")
    async def test_every_key_expires_after_every_path(
        self, live: Backend, ask: Ask, keys: Callable[[], list[str]]
    ) -> None:
        own, shared, held = (
            charge(shelf(quota("9/day"), quota("9/hour", "h")), 3),
            pool("99/hour"),
            slot(2),
        )
        given = [claim(held, kept=HOUR) for _ in range(3)]
        ttls: dict[str, list[int]] = {}

        def look() -> None:
            for key in keys():
                ttls.setdefault(key, []).append(ask("PTTL", key))

        holds = holds_of(live)
        assert holds is not None
        for one in given:
            await take(live, [own, shared], one)
            look()
        await holds.renew(hold(given[0]))
        look()
        await holds.settle(given[0].record, corrections([own, shared], 2))
        look()
        await holds.settle(given[1].record, corrections([own, shared], -2))
        look()
        await holds.refund(corrections([own, shared], -1))
        look()
        await holds.release(hold(given[0]))
        look()
        await holds.close()

        assert len(ttls) == 5
        for key, seen in ttls.items():
            most = DAY if "~lease" in key or "free::" in key else HOUR
            assert all(0 < ttl <= most // 1000 for ttl in seen), (key, seen)

    @pytest.mark.fault("A1", "C6")
    @pytest.mark.parametrize("first", ["day", "hour"])
    async def test_key_lives_until_the_last_of_its_buckets_is_full(
        self, live: Backend, ask: Ask, first: str
    ) -> None:
        both = [quota("9/day"), quota("9/hour", "h")]
        own = charge(shelf(*(both if first == "day" else reversed(both))), 3)
        alone, beside, twice = claim(kept=HOUR), claim(kept=HOUR), claim()
        early: list[str] = []

        def look(path: str, debts: Sequence[int]) -> None:
            if ask("PTTL", own.key) < max(debts[:2]) // 1000 - 60_000:
                early.append(path)

        holds = holds_of(live)
        assert holds is not None
        look("take", (await live.take([own])).debts)
        look("take of a pool", (await live.take([own, pool("99/hour")])).debts)
        ask("DEL", own.key)
        look("claim", (await take(live, [own], alone)).debts)
        look("claim of a pool", (await take(live, [own, pool("99/hour")], beside)).debts)
        ask("DEL", own.key)
        look("take of two", (await take(live, [own, own], twice)).debts[2:])
        look("more", (await holds.settle(alone.record, corrections([own], 1))).debts)
        less = corrections([own, pool("99/hour")], -1)
        look("less", (await holds.settle(beside.record, less)).debts)
        look("refund", await holds.refund(corrections([own], -1)))
        await holds.close()

        assert early == []

    @pytest.mark.parametrize("by", ["settle", "refund"])
    async def test_key_is_gone_once_all_was_given_back(
        self, backend: Backend, holds: Holds, ask: Ask, by: str
    ) -> None:
        one, given = charge(shelf(quota("60/hour"), quota("60/day", "d")), 5), claim(kept=HOUR)
        await take(backend, [one], given)

        await give_back(holds, by, given, corrections([one], -5))

        assert ask("EXISTS", one.key) == 0

    async def test_key_of_a_renewed_slot_lives_as_long_as_the_longest_lease(
        self, backend: Backend, holds: Holds, ask: Ask
    ) -> None:
        mine = claim(slot())
        await take(backend, [], mine)
        ask("PEXPIRE", mine.slots[0].key, "60000")

        await holds.renew(hold(mine))

        assert ask("PTTL", mine.slots[0].key) > DAY // 1000 - 60_000

    async def test_record_is_gone_once_its_time_is_over(self, live: Backend, ask: Ask) -> None:
        one, given = charge(shelf(quota("60/hour")), 7), claim(kept=20_000)
        holds = holds_of(live)
        assert holds is not None
        await take(live, [one], given)
        async with asyncio.timeout(20):
            while ask("EXISTS", given.record):  # noqa: ASYNC110 -- the server does it
                await asyncio.sleep(0.005)

        settled = await holds.settle(given.record, corrections([one], -7))

        assert not settled.settled
        assert 6 * MINUTE < settled.debts[0] <= 7 * MINUTE
        await holds.close()

    @pytest.mark.fault("A10")
    async def test_settling_after_the_buckets_were_reset_leaves_them_full(
        self, backend: Backend, holds: Holds, ask: Ask
    ) -> None:
        image = shelf(quota("5/hour"))
        one, given = charge(image, 5), claim(kept=HOUR)
        await take(backend, [one], given)
        ask("DEL", one.key)

        settled = await holds.settle(given.record, corrections([one], -3))

        assert (settled.settled, list(settled.debts)) == (True, [0])
        assert ask("EXISTS", one.key) == 0
        assert await drain(backend, image) == 5

    @pytest.mark.fault("F4", "F7")
    @pytest.mark.parametrize("wrong", ["bucket", "pool", "first slot", "second slot"])
    async def test_take_of_a_key_that_holds_something_else_is_an_error_and_takes_nothing(
        self, backend: Backend, ask: Ask, keys: Callable[[], list[str]], wrong: str
    ) -> None:
        own, shared = charge(shelf(quota("5/hour"))), pool("9/hour")
        slots = [slot(1, name="a"), slot(1, name="b")]
        broken = {
            "bucket": own.key,
            "pool": shared.key,
            "first slot": slots[0].key,
            "second slot": slots[1].key,
        }[wrong]
        ask("RPUSH", broken, "x")

        told = f"holds what is no .* under .*{nameless(broken)[-20:]}"
        with pytest.raises(BackendError, match=told):
            await take(backend, [own, shared], claim(*slots, kept=HOUR))

        assert keys() == [broken]

    @pytest.mark.fault("F4", "F7")
    @pytest.mark.parametrize("wrong", ["record", "bucket"])
    async def test_settling_what_holds_something_else_is_an_error_and_corrects_nothing(
        self, backend: Backend, holds: Holds, ask: Ask, wrong: str
    ) -> None:
        own, shared, given = charge(shelf(quota("60/hour")), 4), pool("60/hour"), claim(kept=HOUR)
        await take(backend, [shared, own], given)
        broken = given.record if wrong == "record" else own.key
        ask("DEL", broken)
        ask("RPUSH", broken, "x")

        with pytest.raises(BackendError):
            await holds.settle(given.record, corrections([shared, own], -1))
        if wrong == "bucket":
            with pytest.raises(BackendError):
                await holds.refund(corrections([shared, own], -1))

        assert await debts(backend, shared) == [MINUTE]
        assert ask("EXISTS", given.record) == 1
        assert ask("TYPE", broken) == b"list"

    @pytest.mark.fault("F4", "F7")
    async def test_slot_that_is_something_else_is_an_error_and_renews_and_frees_nothing(
        self, backend: Backend, holds: Holds, ask: Ask, clock: Clock
    ) -> None:
        good, bad = slot(1, name="a"), slot(1, name="b")
        mine = claim(good, bad)
        await take(backend, [], mine)
        ask("DEL", bad.key)
        ask("RPUSH", bad.key, "x")
        clock.advance(SECOND)

        with pytest.raises(BackendError):
            await holds.renew(hold(mine))
        clock.advance(LEASE - SECOND)

        assert await admitted(backend, good) == 1
        assert ask("TYPE", bad.key) == b"list"

    async def test_lease_whose_key_holds_something_else_keeps_no_other_from_being_released(
        self, backend: Backend, holds: Holds, ask: Ask
    ) -> None:
        good, bad = slot(1, name="a"), slot(1, name="b")
        mine, other = claim(good), claim(bad)
        await take(backend, [], mine)
        ask("RPUSH", bad.key, "x")

        freed = await asyncio.gather(
            *(holds.release(hold(one)) for one in (other, mine, other)), return_exceptions=True
        )

        assert [type(one) for one in freed] == [BackendError, bool, BackendError]
        assert await admitted(backend, good) == 1

    async def test_purge_drops_a_bounded_number_of_slots_that_are_over_and_admits(
        self, backend: Backend, ask: Ask, clock: Clock
    ) -> None:
        five = slot(5)
        dead = [
            word
            for i in range(10_000)
            for word in (str(clock.now - i), pack(">Qq", 1, i) + pack("<d", LEASE))
        ]
        ask("ZADD", five.key, *dead)
        left = [10_000]

        allowed = []
        for _ in range(7):
            allowed.append((await take(backend, [], claim(five))).allowed)
            left.append(ask("ZCARD", five.key))

        assert allowed == [True] * 5 + [False] * 2
        assert [a - b for a, b in itertools.pairwise(left)] == [MOST_DROPPED - 1] * 5 + [0] * 2
