"""Pools: what all accounts share, and whose part of it a flood cannot take."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from tests.test_limiter import Clock
from tests.test_settling import push
from tieredlimit import Account, Decision, Limiter
from tieredlimit.backends import Backend, ClusterBackend, MemoryBackend, RedisBackend
from tieredlimit.inforce import stored

PATIENT = 20.0
TOGETHER = 64
SEED = 20260301

CAPACITY = 1_000
INTERVAL_US = 10_000
"""A hundred tokens a second."""
LEFT_BY_FREE = 200
"""What nobody but pro can take: a full part of the pool, which fills as fast as the whole."""

PRO = Account("studio", plan="pro")


def policy(quota: object = "3/day", **words: object) -> dict[str, Any]:
    pool = {"rate": "100/second", "capacity": CAPACITY, "leave": {"new": "50%", "free": "20%"}}
    return {
        "order": ["new", "pro", "free"],
        "features": {"video": {"outage": "deny", "pool": {**pool, **words}}, "image": {}},
        "defaults": {"quotas": {"video": quota, "image": "unlimited"}},
        "tiers": {
            "new": {"when": {"plan": "new"}},
            "pro": {"when": {"plan": "pro"}, "quotas": {"video": "unlimited"}},
            "free": {},
        },
    }


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(
    params=[
        "memory",
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("cluster", marks=pytest.mark.redis),
    ]
)
async def backend(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Backend]:
    store: Backend = MemoryBackend(clock=clock)
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        store = RedisBackend.from_url(url, clock=clock, timeout=PATIENT)
    elif request.param == "cluster":
        url = request.getfixturevalue("cluster_url")
        store = ClusterBackend(url, clock=clock, timeout=PATIENT)
    yield store
    await store.close()


class Demand:
    """Ask for no more than a bucket of its own would hold."""

    def __init__(self, capacity: int, chance: random.Random) -> None:
        self._window_us = capacity * INTERVAL_US
        self._full_at = 0
        self._chance = chance

    def next(self, now: int) -> int:
        """Return the next cost, often all there is; 0 where nothing is left to ask for."""
        stands = max(self._full_at, now)
        there = (self._window_us - (stands - now)) // INTERVAL_US
        cost = self._chance.choice([there, self._chance.randint(0, there)])
        self._full_at = stands + cost * INTERVAL_US
        return cost


async def all_of(takes: Iterable[Any]) -> list[Decision]:
    """Take in this order, so many at a time."""
    waiting = list(takes)
    decided: list[Decision] = []
    for at in range(0, len(waiting), TOGETHER):
        decided += await asyncio.gather(*waiting[at : at + TOGETHER])
    return decided


class TestFlood:
    async def test_what_is_left_for_pro_is_there_whatever_the_others_ask_for(
        self, backend: Backend, clock: Clock
    ) -> None:
        chance = random.Random(SEED)
        crowd = [Account(f"u{i}", plan=chance.choice(["new", "free"])) for i in range(10_000)]
        chance.shuffle(crowd)
        demand = Demand(LEFT_BY_FREE, chance)
        flood: list[tuple[Account, int, Decision]] = []
        pro: list[Decision] = []
        spent = began = 0

        async with Limiter(policy(), backend) as limiter:
            began = clock.now
            while len(flood) < len(crowd):
                clock.advance(chance.choice([0.0, 0.000_001, 0.01, 0.05, 0.2]))
                some = crowd[len(flood) : len(flood) + chance.randint(1, 150)]
                takes = [(account, chance.randint(1, 3)) for account in some]
                # Now and then, so that meanwhile the flood goes as far as it can.
                for _ in range(chance.choice([0, 0, 0, 0, 0, 0, 0, 1, 2, 3])):
                    cost = demand.next(clock.now)
                    takes.insert(chance.randint(0, len(takes)), (PRO, cost))
                decided = await all_of(limiter.take(who, "video", cost) for who, cost in takes)
                for (who, cost), decision in zip(takes, decided, strict=True):
                    spent += cost if decision.allowed else 0
                    if who is PRO:
                        pro.append(decision)
                    else:
                        flood.append((who, cost, decision))
            refilled = (clock.now - began) // INTERVAL_US
            peeked = await all_of(limiter.peek(who, "video") for who, _, _ in flood)

        assert {one.reason for one in pro} == {"allowed"}
        assert sum(one.cost for one in pro) > LEFT_BY_FREE
        by_tier = Counter((one.tier, one.reason) for _, _, one in flood)
        assert {reason for _, reason in by_tier} == {"allowed", "pool"}
        assert by_tier["new", "pool"] > by_tier["new", "allowed"]
        assert by_tier["free", "pool"] > by_tier["free", "allowed"]
        # Most of it was denied, and yet nobody who was has paid.
        for (_, cost, decision), peek in zip(flood, peeked, strict=True):
            assert peek.remaining == 3 - (cost if decision.allowed else 0)
        assert spent <= CAPACITY + refilled
        denied = next(one for _, _, one in flood if not one.allowed)
        answer = denied.response()
        assert answer.status_code == 429
        assert b"#temporary-reduced-capacity" in answer.body
        assert denied.retry_after

    async def test_more_than_is_left_is_not_promised(self, backend: Backend) -> None:
        async with Limiter(policy(), backend) as limiter:
            free = [Account(f"u{i}") for i in range(400)]
            await all_of(limiter.take(one, "video", 3) for one in free)
            within = await limiter.take(PRO, "video", LEFT_BY_FREE)
            beyond = await limiter.take(PRO, "video", 10)

            assert within.allowed
            assert (beyond.reason, within.remaining) == ("pool", None)

    async def test_flood_of_those_first_in_line_starves_the_others(self, backend: Backend) -> None:
        # It is an order of who comes first, and no share for anybody.
        async with Limiter(policy(), backend) as limiter:
            await limiter.take(PRO, "video", CAPACITY)

            reasons = [
                (await limiter.take(Account("u", plan=plan), "video")).reason
                for plan in ("new", "free", "pro")
            ]

            assert reasons == ["pool"] * 3

    @pytest.mark.redis
    async def test_flood_by_the_servers_own_clock(self, redis_url: str) -> None:
        limiters = [
            Limiter(policy(), RedisBackend.from_url(redis_url, timeout=PATIENT)) for _ in range(2)
        ]
        over = asyncio.Event()
        flood: Counter[tuple[str, str]] = Counter()

        async def rush(number: int) -> None:
            chance = random.Random(SEED + number)
            limiter = limiters[number % 2]
            i = 0
            while not over.is_set():
                i += 1
                account = Account(f"u{number}-{i}", plan=chance.choice(["new", "free"]))
                decision = await limiter.take(account, "video", chance.randint(1, 3))
                flood[decision.tier, decision.reason] += 1
                await asyncio.sleep(0.001)

        async def work() -> list[Decision]:
            limiter, loop = limiters[0], asyncio.get_running_loop()
            done = await all_of(limiter.take(PRO, "video", 4) for _ in range(LEFT_BY_FREE // 4))
            for _ in range(100):
                # One token has come back for certain: the server has decided before its answer.
                heard = loop.time()
                while loop.time() < heard + INTERVAL_US / 1_000_000:  # noqa: ASYNC110 -- a pace
                    await asyncio.sleep(0.001)
                done.append(await limiter.take(PRO, "video"))
            return done

        async with limiters[0], limiters[1]:
            rushing = [asyncio.create_task(rush(number)) for number in range(20)]
            async with asyncio.timeout(PATIENT):
                while not (flood["new", "pool"] and flood["free", "pool"]):  # noqa: ASYNC110 -- a count
                    await asyncio.sleep(0.005)
            pro = await work()
            over.set()
            await asyncio.gather(*rushing)

        assert {one.reason for one in pro} == {"allowed"}
        assert {reason for _, reason in flood} == {"allowed", "pool"}


class TestRemembered:
    """A pool that has denied a tier denies it for a moment without being asked."""

    @pytest.fixture
    async def limiter(self, backend: Backend) -> AsyncIterator[Limiter]:
        async with Limiter(policy(), backend) as limiter:
            yield limiter

    async def denied(self, limiter: Limiter, account: str, cost: int = 1) -> Decision:
        decision = await limiter.take(Account(account, plan="new"), "video", cost)
        assert decision.reason == "pool"
        return decision

    @pytest.mark.redis
    async def test_accounts_of_the_tier_are_denied_without_asking(self, redis_url: str) -> None:
        backend = RedisBackend.from_url(redis_url, clock=Clock(), timeout=PATIENT)
        async with Limiter(policy(), backend) as limiter:
            await limiter.take(PRO, "video", 600)
            first = await self.denied(limiter, "u1")
            stats = limiter.call_stats
            assert stats is not None
            before = stats.calls

            others = [await self.denied(limiter, f"other{i}") for i in range(100)]

            assert stats.calls == before
            assert {one.retry_after for one in others} == {first.retry_after}
            assert {one.remaining for one in others} == {None}

    async def test_other_tiers_are_not_denied(self, limiter: Limiter) -> None:
        await limiter.take(PRO, "video", 600)
        await self.denied(limiter, "u1")

        free = await limiter.take(Account("u2"), "video")
        pro = await limiter.take(PRO, "video", 300)

        assert (free.reason, pro.reason) == ("allowed", "allowed")

    async def test_tier_that_leaves_less_does_not_open_one_that_leaves_more(
        self, limiter: Limiter
    ) -> None:
        await limiter.take(PRO, "video", 850)
        denied = await limiter.take(Account("u1"), "video")

        assert denied.reason == "pool"
        assert (await self.denied(limiter, "u2")).retry_after == 3.51
        assert denied.retry_after == 0.51

    async def test_smaller_cost_is_not_denied(self, limiter: Limiter) -> None:
        await limiter.take(PRO, "video", 498)
        await self.denied(limiter, "u1", 3)

        smaller = await limiter.take(Account("u2", plan="new"), "video", 2)

        assert smaller.allowed

    async def test_it_ends_when_the_pool_has_refilled(self, limiter: Limiter, clock: Clock) -> None:
        await limiter.take(PRO, "video", 500)
        denied = await self.denied(limiter, "u1")
        clock.advance(0.009_999)
        await self.denied(limiter, "u2")
        clock.advance(0.000_001)

        assert denied.retry_after == 0.01
        assert (await limiter.take(Account("u2", plan="new"), "video")).allowed

    async def test_what_is_given_back_is_seen_within_a_second(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        reservation = limiter.reserve(PRO, "video", 1_000)
        await reservation.take()
        denied = await self.denied(limiter, "u1")

        await reservation.settle(0)
        clock.advance(1)

        assert denied.retry_after == 5.01
        assert (await limiter.take(Account("u2", plan="new"), "video")).allowed
        assert (await limiter.take(Account("u1", plan="new"), "video")).allowed

    async def test_it_does_not_outlive_an_override(self, limiter: Limiter) -> None:
        reservation = limiter.reserve(PRO, "video", 1_000)
        await reservation.take()
        await self.denied(limiter, "u1")
        await reservation.settle(0)

        await limiter.control.close("image", everyone=True)
        await limiter.take(PRO, "video", 0)  # and so it has heard

        assert (await limiter.take(Account("u2", plan="new"), "video")).allowed

    async def test_it_does_not_outlive_a_policy(self, backend: Backend) -> None:
        async with Limiter(policy(), backend) as operator:
            await push(operator, policy())
            async with Limiter(stored(), backend) as limiter:
                await limiter.take(PRO, "video", 600)
                await self.denied(limiter, "u1")

                await push(operator, policy(leave={"new": "10%"}))
                await limiter.take(PRO, "video", 0)  # and so it has heard
                opened = await limiter.take(Account("u2", plan="new"), "video")
                await push(operator, policy(leave={"new": "90%"}))
                await limiter.take(PRO, "video", 0)
                closed = await limiter.take(Account("u2", plan="new"), "video")

        assert (opened.reason, closed.reason) == ("allowed", "pool")


class TestSlots:
    async def test_slots_of_a_pool_are_left_as_its_tokens_are(self, backend: Backend) -> None:
        document = policy(concurrency=10, lease="1 minute")
        async with Limiter(document, backend) as limiter:
            taken = {
                plan: await all_of(
                    limiter.take(Account(f"{plan}{i}", plan=plan), "video") for i in range(12)
                )
                for plan in ("new", "free", "pro")
            }

            allowed = {plan: sum(one.allowed for one in some) for plan, some in taken.items()}
            reasons = {one.reason for some in taken.values() for one in some}
            assert allowed == {"new": 5, "free": 3, "pro": 2}
            assert reasons == {"allowed", "pool"}

    async def test_slot_that_was_missing_is_not_remembered(self, backend: Backend) -> None:
        document = policy(concurrency=1, lease="1 minute", leave={})
        async with Limiter(document, backend) as limiter:
            first = await limiter.take(Account("u1", plan="new"), "video")
            denied = await limiter.take(Account("u2", plan="new"), "video")
            assert first.lease is not None
            await first.lease.release()

            again = await limiter.take(Account("u2", plan="new"), "video")

            assert (denied.reason, denied.retry_after, again.reason) == ("pool", None, "allowed")


class TestReasons:
    """What a denial is laid to where several things may deny, and when it is over."""

    async def test_any_of_the_accounts_own_quotas_denies_before_the_pool(
        self, clock: Clock
    ) -> None:
        limiter = Limiter(policy(["2/minute", "9/day"]), MemoryBackend(clock=clock))
        await limiter.take(Account("u1"), "video", 2)

        denied = await limiter.take(Account("u1"), "video")

        assert (denied.reason, denied.retry_after) == ("quota", 30.0)

    async def test_longest_wait_is_told_whoever_denies(self, clock: Clock) -> None:
        document = policy("60/minute", rate="60/hour", capacity=60, leave={})
        limiter = Limiter(document, MemoryBackend(clock=clock))
        await limiter.take(Account("u1"), "video", 60)

        both = await limiter.take(Account("u1"), "video")
        peeked = await limiter.peek(Account("u2"), "video")

        assert (both.reason, both.retry_after) == ("quota", 60.0)
        assert (peeked.allowed, peeked.reason, peeked.retry_after) == (False, "pool", 60.0)

    async def test_missing_slot_has_no_time_though_the_pool_has_one(self, clock: Clock) -> None:
        own = {"rate": "9/day", "concurrency": 1, "lease": "1 minute"}
        document = policy(own, rate="60/hour", capacity=1, leave={})
        limiter = Limiter(document, MemoryBackend(clock=clock))
        await limiter.take(Account("u1"), "video")

        denied = await limiter.take(Account("u1"), "video")

        assert (denied.reason, denied.retry_after) == ("concurrency", None)

    async def test_peek_says_that_a_slot_is_missing(self, clock: Clock) -> None:
        own = {"rate": "9/day", "concurrency": 1, "lease": "1 minute"}
        limiter = Limiter(policy(own), MemoryBackend(clock=clock))
        await limiter.take(Account("u1"), "video")

        peeked = await limiter.peek(Account("u1"), "video")

        assert (peeked.allowed, peeked.reason, peeked.retry_after) == (False, "concurrency", None)

    async def test_cost_that_fits_the_quota_and_never_the_pool_is_denied_by_the_pool(
        self, clock: Clock
    ) -> None:
        document = policy("5/day", capacity=5, leave={"new": 1})
        limiter = Limiter(document, MemoryBackend(clock=clock))

        whole = await limiter.take(Account("u1", plan="new"), "video", 5)
        beyond = await limiter.take(Account("u1", plan="new"), "video", 6)

        assert (whole.reason, whole.retry_after) == ("pool", None)
        assert (beyond.reason, beyond.retry_after) == ("quota", None)

    async def test_takes_are_counted_as_they_end(self, clock: Clock) -> None:
        document = policy("2/day", capacity=3, leave={})
        limiter = Limiter(document, MemoryBackend(clock=clock))

        for name in ("u1", "u1", "u1", "u2", "u2"):
            await limiter.take(Account(name), "video")

        assert limiter.tallies.of("video", "free").counts() == {
            "allowed": 3,
            "quota": 1,
            "pool": 1,
        }
