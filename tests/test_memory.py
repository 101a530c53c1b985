"""Memory is bounded, and being so never refills a bucket."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from tests.contract import DAY, HOUR, MINUTE, SECOND, Clock, charge, debts, drain, quota, shelf
from tests.holds_contract import LEASE, HoldsContract, claim, corrections, hold, pool, slot
from tieredlimit import BackendError, UsageError
from tieredlimit.backends import MemoryBackend
from tieredlimit.backends.memory_holds import MemoryHolds

# Full keys leave in batches of about a second.
BATCH = 2 * SECOND


@pytest.fixture
def clock() -> Clock:
    return Clock()


def small(clock: Clock, keys: int, catch_all_keys: int = 1) -> MemoryBackend:
    return MemoryBackend(clock=clock, max_keys=keys, max_catch_all_keys=catch_all_keys)


@pytest.mark.fault("C7")
async def test_full_keys_leave_by_themselves(clock: Clock) -> None:
    memory = MemoryBackend(clock=clock)
    image = shelf(quota("1/minute"))
    for i in range(1_000):
        await memory.take([charge(image, 1, f"u{i}")])
    assert len(memory) == 1_000

    clock.advance(MINUTE + BATCH)
    for i in range(200):
        await memory.take([charge(image, 1, f"v{i}")])

    assert len(memory) == 200


async def test_key_charged_again_stays_until_its_later_instant(clock: Clock) -> None:
    memory = MemoryBackend(clock=clock)
    image = shelf(quota("2/minute"))
    other = charge(image, 1, "other")
    await memory.take([charge(image)])
    clock.advance(29 * SECOND)
    await memory.take([charge(image)])

    clock.advance(20 * SECOND)
    await memory.take([other])
    kept = await debts(memory, charge(image))
    clock.advance(HOUR)
    await memory.take([other])

    assert kept == [11 * SECOND]
    assert len(memory) == 1


@pytest.mark.fault("C7")
async def test_new_subject_beyond_the_maximum_is_an_error_and_nothing_is_forgotten(
    clock: Clock,
) -> None:
    memory = small(clock, keys=3)
    image = shelf(quota("5/hour"))
    for name in ("a", "b", "c"):
        await memory.take([charge(image, 2, name)])

    with pytest.raises(BackendError, match="memory holds 3 buckets in use, max_keys allows no"):
        await memory.take([charge(image, 1, "d")])

    assert [await drain(memory, image, name) for name in ("a", "b", "c")] == [3, 3, 3]


@pytest.mark.fault("C7")
async def test_attack_with_many_keys_never_refills_the_victim(clock: Clock) -> None:
    memory = small(clock, keys=100)
    image = shelf(quota("5/hour"))
    await drain(memory, image, "victim")

    refused = 0
    for i in range(2_000):
        clock.advance(SECOND // 10)
        try:
            await memory.take([charge(image, 1, f"attacker{i}")])
        except BackendError:
            refused += 1

    assert refused == 2_000 - 99
    assert len(memory) == 100
    assert await debts(memory, charge(image, 0, "victim")) == [HOUR - 200 * SECOND]


@pytest.mark.fault("C7")
async def test_room_comes_back_once_buckets_are_full(clock: Clock) -> None:
    memory = small(clock, keys=50)
    image = shelf(quota("1/minute"))
    for i in range(50):
        await memory.take([charge(image, 1, f"u{i}")])

    clock.advance(MINUTE + BATCH)

    assert (await memory.take([charge(image, 1, "new")])).allowed
    assert len(memory) <= 50


@pytest.mark.fault("C7")
async def test_one_take_can_have_all_the_room_of_buckets_that_are_full(clock: Clock) -> None:
    memory = small(clock, keys=50)
    image = shelf(quota("1/minute"))
    await memory.take([charge(image, 1, f"u{i}") for i in range(50)])

    clock.advance(MINUTE + BATCH)

    assert (await memory.take([charge(image, 1, f"v{i}") for i in range(50)])).allowed
    assert len(memory) == 50


@pytest.mark.fault("C7")
async def test_strangers_do_not_crowd_out_accounts(clock: Clock) -> None:
    memory = small(clock, keys=5, catch_all_keys=2)
    known, strange = (
        shelf(quota("5/hour"), tier="free"),
        shelf(quota("5/hour"), tier="everyone", catch_all=True),
    )
    for i in range(2):
        await memory.take([charge(strange, 1, f"s{i}")])

    with pytest.raises(BackendError, match="max_catch_all_keys allows no more"):
        await memory.take([charge(strange, 1, "s2")])
    for i in range(5):
        assert (await memory.take([charge(known, 1, f"u{i}")])).allowed

    assert len(memory) == 7


@pytest.mark.fault("C7")
async def test_accounts_do_not_crowd_out_strangers(clock: Clock) -> None:
    memory = small(clock, keys=2, catch_all_keys=5)
    known, strange = (
        shelf(quota("5/hour"), tier="free"),
        shelf(quota("5/hour"), tier="everyone", catch_all=True),
    )
    for i in range(2):
        await memory.take([charge(known, 1, f"u{i}")])

    with pytest.raises(BackendError, match="max_keys allows no more"):
        await memory.take([charge(known, 1, "u2")])

    for i in range(5):
        assert (await memory.take([charge(strange, 1, f"s{i}")])).allowed


@pytest.mark.fault("C7")
async def test_key_moves_rooms_with_what_was_used_when_another_tier_becomes_the_last(
    clock: Clock,
) -> None:
    memory = small(clock, keys=1, catch_all_keys=1)
    before, after = shelf(quota("5/hour")), shelf(quota("5/hour"), catch_all=True)
    await memory.take([charge(before, 3)])

    moved = await drain(memory, after)
    freed = await memory.take([charge(before, 1, "another")])
    with pytest.raises(BackendError, match="max_catch_all_keys"):
        await memory.take([charge(after, 1, "third")])

    assert (moved, freed.allowed, len(memory)) == (2, True, 2)


async def test_moved_key_leaves_by_itself_too(clock: Clock) -> None:
    memory = MemoryBackend(clock=clock)
    before, after = shelf(quota("5/hour")), shelf(quota("5/hour"), catch_all=True)
    await memory.take([charge(before, 5)])
    await memory.take([charge(after, 1)])

    clock.advance(HOUR + BATCH)
    await memory.take([charge(before, 1, "another")])

    assert len(memory) == 1


@pytest.mark.fault("C7")
async def test_two_new_keys_in_one_take_need_room_for_both(clock: Clock) -> None:
    memory = small(clock, keys=2)
    mine, ours = shelf(quota("5/hour"), tier="mine"), shelf(quota("5/hour"), tier="ours")
    await memory.take([charge(mine, 1, "a")])

    with pytest.raises(BackendError, match="memory holds 1 buckets"):
        await memory.take([charge(mine, 1, "b"), charge(ours, 1, "b")])

    assert len(memory) == 1
    assert (await memory.take([charge(mine, 1, "a"), charge(ours, 1, "b")])).allowed


@pytest.mark.fault("C7")
async def test_one_room_being_full_charges_nothing_in_the_other(clock: Clock) -> None:
    memory = small(clock, keys=2, catch_all_keys=1)
    known, strange = (
        shelf(quota("5/hour"), tier="free"),
        shelf(quota("5/hour"), tier="everyone", catch_all=True),
    )
    await memory.take([charge(strange, 1, "s0")])

    with pytest.raises(BackendError, match="max_catch_all_keys"):
        await memory.take([charge(known, 1, "u"), charge(strange, 1, "s1")])

    assert await debts(memory, charge(known, 0, "u")) == [0]
    assert len(memory) == 1


async def test_peeks_and_denials_need_no_room(clock: Clock) -> None:
    memory = small(clock, keys=1)
    image = shelf(quota("5/hour"))
    await memory.take([charge(image)])

    peeked = await memory.take([charge(image, 0, "unknown")])
    beside = await memory.take([charge(image, 1), charge(image, 0, "unknown")])
    denied = await memory.take([charge(image, 6, "unknown")])

    assert peeked == (True, clock.now, [0])
    assert (beside.allowed, denied.allowed) == (True, False)
    assert len(memory) == 1


async def test_what_was_decided_elsewhere_is_charged_to_a_known_key_though_there_is_no_room(
    clock: Clock,
) -> None:
    memory = small(clock, keys=1)
    known, unknown = (charge(shelf(quota("9/hour")), 1, subject) for subject in ("u1", "u2"))

    for one in (known, known, unknown):
        memory.note([one])

    assert await debts(memory, known, unknown) == [2 * HOUR // 9, 0]
    assert len(memory) == 1


async def test_lowered_key_leaves_at_its_earlier_instant(clock: Clock) -> None:
    memory = MemoryBackend(clock=clock)
    await drain(memory, shelf(quota("5/day")))
    await memory.take([charge(shelf(quota("5/minute")))])

    clock.advance(2 * MINUTE + BATCH)
    await memory.take([charge(shelf(quota("5/minute")), 1, "another")])

    assert len(memory) == 1


def test_threads_admit_exactly_the_capacity() -> None:
    memory = MemoryBackend(clock=Clock())
    image = shelf(quota("1000/hour"))
    ready = threading.Barrier(4)
    admitted: list[int] = []

    async def take_many() -> int:
        return sum([(await memory.take([charge(image)])).allowed for _ in range(500)])

    def work() -> None:
        ready.wait()
        admitted.append(asyncio.run(take_many()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(admitted) == 1_000
    assert len(admitted) == 4


def test_without_a_clock_it_is_the_time_of_day() -> None:
    before = MemoryBackend().now()

    assert 1_700_000_000 * SECOND < before <= MemoryBackend().now()


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["max_keys", "max_catch_all_keys"])
def test_maximum_below_one_is_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1, got {value}"):
        MemoryBackend(**{name: value})  # type: ignore[arg-type]  # the name decides the type


@pytest.mark.fault("E8")
def test_child_of_a_fork_in_mid_take_can_take() -> None:
    script = """
import asyncio, os, threading, warnings
from tests.contract import charge, quota, shelf
from tieredlimit.backends import MemoryBackend

# Python warns of what is tested here, from 3.12 on.
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

backend, stop = MemoryBackend(), threading.Event()
one = [charge(shelf(quota("1000000/day")))]

def busy():
    while not stop.is_set():
        asyncio.run(backend.take(one))

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        os._exit(0 if asyncio.new_event_loop().run_until_complete(backend.take(one)).allowed else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
"""

    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")


class TestHolds(HoldsContract):
    @pytest.fixture
    def backend(self, clock: Clock) -> MemoryBackend:
        return MemoryBackend(clock=clock)


class TestBoundsOfHolds:
    async def test_slot_beyond_the_maximum_is_an_error_and_charges_nothing(
        self, clock: Clock
    ) -> None:
        memory = small(clock, keys=3)
        one, many = charge(shelf(quota("9/hour"))), slot(100)
        given = [claim(many, kept=HOUR) for _ in range(3)]
        for mine in given[:2]:
            memory.claim_now([], mine)

        with pytest.raises(BackendError, match="memory holds 2 slots, max_keys allows no more"):
            memory.claim_now([one], claim(many, slot(1, name="b"), kept=HOUR))
        last = memory.claim_now([one], given[2])
        with pytest.raises(BackendError, match="memory holds 3 slots, max_keys allows no more"):
            memory.claim_now([one], claim(many))

        assert last.allowed
        assert await debts(memory, one) == [HOUR // 9]
        assert (len(memory.slots), len(memory.records)) == (3, 3)

    async def test_reservation_beyond_the_maximum_is_an_error_and_takes_nothing(
        self, clock: Clock
    ) -> None:
        memory = small(clock, keys=2)
        one, many = charge(shelf(quota("9/hour"))), slot(100)
        for _ in range(2):
            memory.claim_now([], claim(kept=HOUR))

        with pytest.raises(BackendError, match="holds 2 reservations, max_keys allows no more"):
            memory.claim_now([one], claim(many, kept=HOUR))

        assert await debts(memory, one) == [0]
        assert len(memory.slots) == 0

    async def test_room_for_buckets_being_full_takes_no_slot_and_reserves_nothing(
        self, clock: Clock
    ) -> None:
        memory = small(clock, keys=1)
        image = shelf(quota("9/hour"))
        await memory.take([charge(image)])

        with pytest.raises(BackendError, match="memory holds 1 buckets in use"):
            memory.claim_now([charge(image, 1, "u2")], claim(slot(), kept=HOUR))

        assert (len(memory.slots), len(memory.records)) == (0, 0)

    async def test_room_comes_back_once_slots_and_reservations_are_over(self, clock: Clock) -> None:
        memory = small(clock, keys=50)
        many = slot(100)
        for _ in range(50):
            memory.claim_now([], claim(many, kept=LEASE))
        clock.advance(LEASE)

        allowed = [memory.claim_now([], claim(many, kept=LEASE)).allowed for _ in range(50)]

        assert all(allowed)
        assert (len(memory.slots), len(memory.records)) == (50, 50)

    async def test_slots_and_reservations_that_are_over_leave_as_others_come(
        self, clock: Clock
    ) -> None:
        memory = MemoryBackend(clock=clock)
        holds = MemoryHolds(memory)
        many = slot(100)
        given = [claim(many, kept=LEASE) for _ in range(10)]
        for mine in given:
            memory.claim_now([], mine)
        clock.advance(LEASE - 1)
        for mine in given:
            await holds.renew(hold(mine))

        left = []
        for us in (1, LEASE):
            clock.advance(us)
            memory.claim_now([], claim(many, kept=LEASE))
            left.append((len(memory.slots), len(memory.records)))

        assert left == [(11, 1), (1, 1)]

    async def test_slot_that_a_stepped_back_clock_lowered_leaves_at_its_earlier_instant(
        self, clock: Clock
    ) -> None:
        memory = small(clock, keys=2)
        one = slot(1)
        memory.claim_now([], claim(one))
        clock.advance(-DAY)
        memory.claim_now([], claim(one))
        clock.advance(LEASE)

        allowed = [memory.claim_now([], claim(slot(1, name=name))).allowed for name in "ab"]

        assert allowed == [True, True]

    async def test_what_was_released_and_settled_leaves_nothing_behind(self, clock: Clock) -> None:
        memory = MemoryBackend(clock=clock)
        holds = MemoryHolds(memory)
        both = [charge(shelf(quota("60/day", capacity=20)), 2), pool("60/day", cost=2)]
        one = slot(1, DAY)
        less, all_ = corrections(both, -1), corrections(both, -2)

        for i in range(30_000):
            mine = claim(one, kept=DAY)
            assert memory.claim_now(both, mine).allowed
            await holds.renew(hold(mine))
            assert not memory.claim_now([], claim(one)).allowed
            await holds.settle(mine.record, less)
            await holds.refund(all_ if i % 3 else less)
            await holds.release(hold(mine))
            clock.advance(1_000)

        slots, records, room = memory.slots, memory.records, memory._accounts
        assert (len(slots), len(records)) == (0, 0)
        assert (slots._held, slots._full) == ({}, {})
        assert len(slots._due) < 2_000
        assert len(records._due) < 2_000
        assert len(memory) <= 2
        assert sum(map(len, room._slots.values())) < 2_000
        assert len(room._heap) == len(room._slots)

    async def test_key_that_was_given_back_to_leaves_at_its_earlier_instant(
        self, clock: Clock
    ) -> None:
        memory = MemoryBackend(clock=clock)
        one = charge(shelf(quota("60/hour")), 30)
        await memory.take([one])
        await MemoryHolds(memory).refund(corrections([one], -29))

        clock.advance(MINUTE + BATCH)
        await memory.take([charge(shelf(quota("60/hour")), 1, "another")])

        assert len(memory) == 1
