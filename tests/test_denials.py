"""Denials remembered: the store is not asked again, and nobody is denied who would be allowed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract import SECOND, Clock
from tieredlimit import Account, Decision, Limiter
from tieredlimit._core import denials as denials_module
from tieredlimit._core.denials import MOST, Denials
from tieredlimit.backends import Charge, MemoryBackend, RedisBackend, Reply

ANN, BOB = Account("ann", within={"org": "o"}), Account("bob", within={"org": "o"})


def policy(*quotas: Any) -> dict[str, Any]:
    return {"features": {"image": {}}, "tiers": {"all": {"quotas": {"image": list(quotas)}}}}


class Counted(MemoryBackend):
    """Memory that counts how often it was asked."""

    asked = 0

    async def take(self, charges: Sequence[Charge]) -> Reply:
        self.asked += 1
        return await super().take(charges)


async def exhausted(*quotas: Any) -> tuple[Limiter, Counted, Clock]:
    clock = Clock()
    backend = Counted(clock=clock)
    limiter = Limiter(policy(*quotas), backend)
    while (await limiter.take(ANN, "image")).allowed:
        pass
    backend.asked = 0
    return limiter, backend, clock


async def test_denied_account_that_hammers_asks_nobody_until_a_second_has_passed() -> None:
    limiter, backend, clock = await exhausted("1/minute")

    denied = [await limiter.take(ANN, "image") for _ in range(100)]
    clock.now += SECOND - 1
    late = await limiter.take(ANN, "image")
    asked_before = backend.asked
    clock.now += 1
    again = await limiter.take(ANN, "image")

    assert {decision.reason for decision in [*denied, late, again]} == {"quota"}
    assert (asked_before, backend.asked) == (0, 1)
    assert late.retry_after == pytest.approx(59.000001)
    assert again.retry_after == pytest.approx(59.0)


async def test_bucket_that_has_filled_since_the_denial_is_told_as_full_and_no_fuller() -> None:
    limiter, backend, clock = await exhausted("1/minute", "50/second")

    clock.now += SECOND // 2
    denied = await limiter.take(ANN, "image")

    assert backend.asked == 0
    assert [quota.remaining for quota in denied.quotas] == [0, 50]


async def test_retry_at_its_time_asks_and_is_allowed() -> None:
    limiter, backend, clock = await exhausted("4/second")

    denied = await limiter.take(ANN, "image")
    clock.now += round((denied.retry_after or 0) * SECOND)

    assert (await limiter.take(ANN, "image")).allowed
    assert backend.asked == 1


async def test_smaller_cost_is_asked_about_and_a_larger_one_is_not() -> None:
    clock = Clock()
    backend = Counted(clock=clock)
    limiter = Limiter(policy("10/minute"), backend)
    await limiter.take(ANN, "image", 6)
    await limiter.take(ANN, "image", 5)
    backend.asked = 0

    larger = await limiter.take(ANN, "image", 9)
    smaller = await limiter.take(ANN, "image", 4)

    assert (larger.allowed, smaller.allowed, backend.asked) == (False, True, 1)
    assert larger.retry_after == pytest.approx(30.0)


@pytest.mark.parametrize("feature", [{}, {"refund_on": [500]}], ids=["plain", "refunding"])
async def test_denial_after_a_smaller_take_tells_the_time_anew(feature: dict[str, Any]) -> None:
    clock = Clock()
    document = {**policy("10/minute"), "features": {"image": feature}}
    limiter = Limiter(document, MemoryBackend(clock=clock))
    await limiter.take(ANN, "image", 6)
    before = await limiter.take(ANN, "image", 5)
    await limiter.take(ANN, "image", 4)

    after = await limiter.take(ANN, "image", 5)

    assert before.retry_after == pytest.approx(6.0)
    assert after.retry_after == pytest.approx(30.0)
    assert (before.remaining, after.remaining) == (4, 0)


async def test_denial_of_one_account_is_not_anothers() -> None:
    limiter, backend, _ = await exhausted("1/minute")

    assert (await limiter.take(BOB, "image")).allowed
    assert backend.asked == 1


async def test_denial_by_the_organisation_is_remembered_for_each_of_its_accounts() -> None:
    limiter, backend, _ = await exhausted("9/minute", {"rate": "2/hour", "per": "org"})

    first = await limiter.take(BOB, "image")
    again = await limiter.take(BOB, "image")
    elsewhere = await limiter.take(Account("bob", within={"org": "other"}), "image")

    assert (first.allowed, again.allowed, elsewhere.allowed) == (False, False, True)
    assert backend.asked == 2
    assert [quota.name for quota in again.quotas if quota.denies] == ["image-hour-org"]


async def test_clock_that_stepped_back_asks_again() -> None:
    limiter, backend, clock = await exhausted("1/minute")

    clock.now -= 1
    await limiter.take(ANN, "image")

    assert backend.asked == 1


@pytest.mark.redis
async def test_redis_is_not_called_for_a_remembered_denial(redis_url: str) -> None:
    backend = RedisBackend.from_url(redis_url)
    asked = 0
    take = backend.take

    async def counted(*asking: Any) -> Reply:
        nonlocal asked
        asked += bool(asking[0])  # else it only compares revisions, beside the takes
        return await take(*asking)

    backend.take = counted  # type: ignore[method-assign, assignment]  # to count
    async with Limiter(policy("2/hour"), backend) as limiter:
        decisions = [await limiter.take(ANN, "image") for _ in range(50)]

    assert [decision.allowed for decision in decisions].count(True) == 2
    assert asked == 3


def test_number_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denials_module, "MOST", 100)
    denials = Denials()

    for i in range(1_000):
        denials.remember(i, 1, 0, SECOND, [SECOND], 0)

    assert len(denials.held) <= 100 < MOST


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 1_000, 249_999, 250_000, 600_000, SECOND, 3 * SECOND]),
        st.integers(0, 4),
        st.sampled_from([ANN, BOB]),
    ),
    max_size=30,
)


@given(STEPS)
def test_decisions_are_the_same_with_and_without_remembering(
    steps: list[tuple[int, int, Account]],
) -> None:
    document = policy({"rate": "4/second", "capacity": 3}, {"rate": "5/second", "per": "org"})
    clocks = Clock(), Clock()
    remembering = Limiter(document, MemoryBackend(clock=clocks[0]))
    forgetful = Limiter(document, MemoryBackend(clock=clocks[1]))

    async def play() -> None:
        for advance, cost, account in steps:
            clocks[0].now += advance
            clocks[1].now += advance
            forgetful._denials.held.clear()
            one = await remembering.take(account, "image", cost)
            other = await forgetful.take(account, "image", cost)
            assert (one.allowed, one.reason) == (other.allowed, other.reason)
            if not one.allowed:
                assert not sooner(one, other)

    def sooner(one: Decision, other: Decision) -> bool:
        # What others took meanwhile is not known: the time told may be early, by that alone.
        return (one.retry_after or 0) > (other.retry_after or 0)

    asyncio.run(play())


def test_denial_is_not_believed_for_longer_than_a_second_of_this_process() -> None:
    denials = Denials()
    denials.remember("ann", 1, now=0, wait_us=60 * SECOND, debts=[SECOND], local_us=7)

    assert denials.recall("ann", 1, now=0, local_us=7 + SECOND - 1) == [SECOND]
    assert denials.recall("ann", 1, now=0, local_us=7 + SECOND) is None
    assert denials.recall("ann", 1, now=0, local_us=7) is None


@pytest.mark.fault("G4")
async def test_denial_is_forgotten_where_an_override_gives_the_cell_other_quotas() -> None:
    clock = Clock()
    limiter = Limiter(policy("5/minute", "100/day"), MemoryBackend(clock=clock))
    end = datetime.fromtimestamp(clock.now / 1e6, UTC) + timedelta(seconds=1)
    await limiter.control.set("image", "1/minute", everyone=True, until=end)
    assert (await limiter.take(ANN, "image")).allowed
    clock.now += 900_000
    assert not (await limiter.take(ANN, "image")).allowed

    clock.now += 200_000
    decision = await limiter.take(ANN, "image")

    # What was used is kept; but it is judged by the policy's own quotas again.
    assert [quota.name for quota in decision.quotas] == ["image-minute", "image-day"]
    assert decision.retry_after == pytest.approx(10.9)


def test_debts_of_other_quotas_are_not_recalled() -> None:
    denials = Denials()
    mine, others = object(), object()
    denials.remember("u1", 1, 0, SECOND, [SECOND], 0, mine)

    assert denials.recall("u1", 1, 1, 1, others) is None
    assert denials.recall("u1", 1, 1, 1, mine) == [SECOND - 1]
