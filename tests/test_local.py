"""`outage = "local"`: what a process gives out by itself while Redis cannot be asked."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract import HOUR, SECOND, Clock
from tests.servers import RedisServer
from tieredlimit import Account, Limiter
from tieredlimit._core.quota import Quota, share_of
from tieredlimit.backends import RedisBackend

NOBODY = "redis://127.0.0.1:1/0"


def policy(cell: object, share: str = "20%", **feature: object) -> dict[str, Any]:
    return {
        "features": {"video": {"outage": "local", "outage_share": share, **feature}},
        "tiers": {"everyone": {"quotas": {"video": cell}}},
    }


def cut_off(document: dict[str, Any], clock: Clock, url: str = NOBODY) -> Limiter:
    return Limiter(document, RedisBackend.from_url(url, clock=clock))


async def admitted(limiter: Limiter, account: str, times: int, cost: int = 1) -> int:
    decisions = [await limiter.take(Account(account), "video", cost) for _ in range(times)]
    assert {decision.reason for decision in decisions} <= {"outage", "allowed"}
    return sum(decision.allowed for decision in decisions)


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("cell", "share", "each"),
    [("100/hour", "20%", 20), ("100/hour", "0.5%", 1), ("3/day", "10%", 1), ("7/hour", "100%", 7)],
)
async def test_fleet_gives_out_processes_times_the_share_or_one(
    cell: str, share: str, each: int
) -> None:
    clock = Clock()
    fleet = [cut_off(policy(cell, share), clock) for _ in range(4)]

    given_out = [await admitted(limiter, "u1", 150) for limiter in fleet]
    for limiter in fleet:
        await limiter.close()

    assert given_out == [each] * 4


async def test_share_refills_at_its_part_of_the_rate() -> None:
    clock = Clock()
    async with cut_off(policy("100/hour"), clock) as limiter:
        await admitted(limiter, "u1", 20)
        # 36 s a token, of which this process gives out one in five.
        clock.advance(180 * SECOND - 1)
        before = await admitted(limiter, "u1", 1)
        clock.advance(1)

        assert (before, await admitted(limiter, "u1", 2)) == (0, 1)


async def test_denial_says_when_the_share_has_refilled_and_is_an_outage() -> None:
    clock = Clock()
    async with cut_off(policy("100/hour"), clock) as limiter:
        await admitted(limiter, "u1", 20)

        denial = await limiter.take(Account("u1"), "video")

    assert (denial.allowed, denial.reason, denial.retry_after) == (False, "outage", 180.0)
    assert denial.response().status_code == 503


async def test_cost_above_the_share_is_denied_for_a_few_seconds() -> None:
    async with cut_off(policy("100/hour"), Clock()) as limiter:
        denial = await limiter.take(Account("u1"), "video", 21)
        others = await admitted(limiter, "u1", 30)

    assert not denial.allowed
    assert denial.retry_after is not None
    assert 1 <= denial.retry_after <= 5
    assert others == 20


async def test_all_quotas_must_have_their_share() -> None:
    clock = Clock()
    async with cut_off(policy(["100/hour", "10/day"], "50%"), clock) as limiter:
        assert await admitted(limiter, "u1", 60) == 5


async def test_pool_gives_out_its_share_and_keeps_its_line() -> None:
    document = policy("unlimited", "20%", pool={"rate": "100/hour", "leave": {"everyone": "50%"}})
    async with cut_off(document, Clock()) as limiter:
        first, second = [await admitted(limiter, name, 30) for name in ("u1", "u2")]

    assert (first, second) == (10, 0)


async def test_slots_are_not_held_by_one_process_alone() -> None:
    cell = {"rate": "100/hour", "concurrency": 1, "lease": "1 hour"}
    async with cut_off(policy(cell), Clock()) as limiter:
        decisions = [await limiter.take(Account("u1"), "video") for _ in range(3)]

    assert [(one.allowed, one.lease) for one in decisions] == [(True, None)] * 3


@pytest.mark.parametrize("cell", ["unlimited", 0])
async def test_what_has_no_quota_has_no_share(cell: object) -> None:
    async with cut_off(policy(cell), Clock()) as limiter:
        assert await admitted_any(limiter) == (cell == "unlimited")


async def admitted_any(limiter: Limiter) -> bool:
    return (await limiter.take(Account("u1"), "video")).allowed


async def test_who_could_not_be_identified_is_denied() -> None:
    async with cut_off(policy("100/hour"), Clock()) as limiter:
        assert not limiter.outage("video", 1, RuntimeError("identify failed")).allowed


async def test_accounts_beyond_the_bound_are_denied_and_others_are_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tieredlimit.local.MAX_KEYS", 100)
    async with cut_off(policy("100/hour", "1%"), Clock()) as limiter:
        first = await admitted(limiter, "victim", 1)
        invented = [await admitted(limiter, f"u{i}", 1) for i in range(300)]

        assert (first, sum(invented)) == (1, 99)
        assert await admitted(limiter, "victim", 1) == 0


@pytest.mark.redis
async def test_outage_hands_out_no_fresh_burst(own_server: RedisServer) -> None:
    clock = Clock()
    async with cut_off(policy("100/hour"), clock, own_server.url) as limiter:
        assert await admitted(limiter, "busy", 12) == 12
        assert await admitted(limiter, "spent", 90) == 90
        own_server.kill()

        left = {name: await admitted(limiter, name, 30) for name in ("busy", "spent", "idle")}

    # What it took counts in full against this process' share, down to nothing and not below.
    assert left == {"busy": 8, "spent": 0, "idle": 20}


@pytest.mark.redis
async def test_share_is_left_again_when_redis_is_back(own_server: RedisServer) -> None:
    clock = Clock()
    async with cut_off(policy("100/hour"), clock, own_server.url) as limiter:
        own_server.kill()
        await admitted(limiter, "u1", 30)
        own_server.restart()
        # Redis comes back by itself: there is no event to wait for.
        while (decision := await limiter.take(Account("u1"), "video")).reason == "outage":  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    assert decision.allowed
    assert decision.remaining == 99


@given(
    capacity=st.integers(1, 10_000),
    interval_us=st.integers(1, HOUR),
    share=st.fractions(Fraction(1, 10_000), 1),
    leave=st.integers(0, 9_999),
)
def test_share_is_never_more_than_its_part_but_for_one_token(
    capacity: int, interval_us: int, share: Fraction, leave: int
) -> None:
    whole = Quota("q", "1/second", capacity, interval_us, leave=min(leave, capacity - 1))

    part = share_of(whole, share)

    assert part.capacity == max(1, int(capacity * share))
    assert Fraction(1, part.interval_us) <= share * Fraction(1, interval_us)
    assert part.capacity - part.leave >= 1
    assert part.leave == min(-(-whole.leave * share // 1), part.capacity - 1)
    assert part.tag == whole.tag
