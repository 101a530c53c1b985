"""Leases: how many jobs run at once, whatever becomes of those who hold them."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from struct import pack
from typing import Any

import pytest

from tests.proxy import Proxy
from tests.servers import RedisServer
from tests.test_limiter import PATIENT, Clock, Spy
from tieredlimit import Account, BackendError, Limiter, UsageError
from tieredlimit._core.taken import Taken
from tieredlimit.backends import Backend, MemoryBackend, RedisBackend
from tieredlimit.backends.holds import Correction, Hold, Settled
from tieredlimit.complaints import Complaints
from tieredlimit.leases import MOST_ABANDONED, Lease, Leases

DEADLINE = 30.0
IMPATIENT = 0.2
ANN = Account("ann")
BEN = Account("ben")
KEY = "tl1:{default:0}:video:everyone~lease::ann"

# By the server's clock, at one instant: a slot is held until the instant by which it stands.
COUNT = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
return redis.call('ZCOUNT', KEYS[1], string.format('(%.0f', now), '+inf')
"""


def policy(slots: int = 2, lease: str = "1 minute", **words: object) -> dict[str, Any]:
    quota = {"rate": "1000/hour", "concurrency": slots, "lease": lease}
    return {
        "features": {"video": {"outage": "deny", **words}},
        "tiers": {"everyone": {"quotas": {"video": quota}}},
    }


async def poll(until: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not until():  # noqa: ASYNC110 -- some of it is in other processes
            await asyncio.sleep(0.005)


async def turns() -> None:
    """Let the event loop do what is due."""
    for _ in range(10):
        await asyncio.sleep(0)


async def running(limiter: Limiter, account: Account = ANN) -> int:
    """Return how many slots a look from outside finds taken."""
    (slots,) = (await limiter.peek(account, "video")).slots
    return slots.held


def held(server: RedisServer, key: str = KEY) -> int:
    counted: Any = server.command("EVAL", COUNT, "1", key)
    return int(counted)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def backend(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Backend]:
    store: Backend = MemoryBackend(clock=clock)
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        store = RedisBackend.from_url(url, clock=clock, timeout=PATIENT)
    yield store
    await store.close()


@pytest.fixture
async def limiter(backend: Backend) -> AsyncIterator[Limiter]:
    async with Limiter(policy(), backend) as limiter:
        yield limiter


@pytest.fixture
async def other(backend: Backend) -> AsyncIterator[Limiter]:
    """What another process has: it knows of no lease but by its token."""
    other = Limiter(policy(), backend)
    yield other
    await other.close()


class TestSlots:
    async def test_as_many_as_the_policy_says_run_at_once(self, limiter: Limiter) -> None:
        first, second = [await limiter.take(ANN, "video") for _ in range(2)]
        third = await limiter.take(ANN, "video")
        elsewhere = await limiter.take(BEN, "video")

        assert (first.allowed, second.allowed, elsewhere.allowed) == (True, True, True)
        assert (third.allowed, third.reason, third.retry_after) == (False, "concurrency", None)
        assert [(one.limit, one.held, one.denies) for one in third.slots] == [(2, 2, True)]
        assert third.lease is None
        assert third.token == ""
        # The denied one cost nothing.
        assert third.remaining == 998

    async def test_slot_is_free_at_once_when_it_is_released(self, limiter: Limiter) -> None:
        first, _ = [await limiter.take(ANN, "video") for _ in range(2)]
        denied = await limiter.take(ANN, "video")
        assert first.lease is not None

        assert await first.lease.release()

        assert denied.reason == "concurrency"
        assert (await limiter.take(ANN, "video")).allowed

    @pytest.mark.fault("H4")
    async def test_releasing_twice_frees_one_slot(self, limiter: Limiter, other: Limiter) -> None:
        first, _ = [await limiter.take(ANN, "video") for _ in range(2)]
        assert first.lease is not None

        freed = [
            await first.lease.release(),
            await first.lease.release(),
            await other.leases.release(first.token),
        ]

        assert freed == [True, False, False]
        assert (await limiter.take(ANN, "video")).allowed
        assert (await limiter.take(ANN, "video")).reason == "concurrency"

    @pytest.mark.fault("H4")
    async def test_releasing_late_does_not_free_the_slot_of_another(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        old = [await limiter.take(ANN, "video") for _ in range(2)]
        clock.advance(60)
        for _ in range(2):
            assert (await limiter.take(ANN, "video")).allowed

        for one in old:
            await limiter.leases.release(one.token)

        assert (await limiter.take(ANN, "video")).reason == "concurrency"

    @pytest.mark.fault("H1")
    async def test_slot_of_a_holder_that_is_gone_is_free_after_its_lease_and_not_before(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        for _ in range(2):
            await limiter.take(ANN, "video")

        clock.advance(59.999_999)
        before = await limiter.take(ANN, "video")
        clock.advance(0.000_001)
        after = await limiter.take(ANN, "video")

        assert (before.reason, after.reason) == ("concurrency", "allowed")

    async def test_renewed_lease_is_held_for_its_whole_time_again(
        self, limiter: Limiter, other: Limiter, clock: Clock
    ) -> None:
        first, second = [await limiter.take(ANN, "video") for _ in range(2)]
        assert first.lease is not None

        clock.advance(50)
        renewed = [await first.lease.renew(), await other.leases.renew(second.token)]
        clock.advance(59)
        before = await limiter.take(ANN, "video")
        clock.advance(1)
        after = await limiter.take(ANN, "video")

        assert renewed == [True, True]
        assert (before.reason, after.reason) == ("concurrency", "allowed")

    @pytest.mark.fault("H2")
    async def test_late_renewal_does_not_bring_back_what_another_holds(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        late, _ = [await limiter.take(ANN, "video") for _ in range(2)]
        assert late.lease is not None
        clock.advance(60)
        for _ in range(2):
            assert (await limiter.take(ANN, "video")).allowed

        assert not await late.lease.renew()

        assert late.lease.lost
        assert await running(limiter) == 2

    @pytest.mark.fault("H2")
    async def test_renewal_of_what_was_released_holds_nothing(
        self, limiter: Limiter, other: Limiter
    ) -> None:
        decision = await limiter.take(ANN, "video")
        await other.leases.release(decision.token)

        assert not await limiter.leases.renew(decision.token)
        assert await running(limiter) == 0

    async def test_slots_of_an_org_and_a_pool_are_held_and_freed_together(
        self, backend: Backend
    ) -> None:
        quotas = [
            {"rate": "9/hour", "concurrency": 2, "lease": "1 minute"},
            {"rate": "9/day", "per": "org", "concurrency": 1, "lease": "1 hour"},
        ]
        pool = {"rate": "9/minute", "concurrency": 1, "lease": "30 seconds"}
        document = policy(pool=pool)
        document["tiers"]["everyone"]["quotas"]["video"] = quotas
        ann, cat = Account("ann", within={"org": "o1"}), Account("cat", within={"org": "o1"})
        async with Limiter(document, backend) as limiter:
            decision = await limiter.take(ann, "video")

            of_org = await limiter.take(cat, "video")
            of_pool = await limiter.take(Account("ben", within={"org": "o2"}), "video")
            freed = await limiter.leases.release(decision.token)
            again = await limiter.take(cat, "video")

        assert decision.lease is not None
        assert decision.lease.seconds == 30
        assert (of_org.reason, of_pool.reason) == ("concurrency", "pool")
        assert [one.denies for one in of_org.slots] == [False, True, True]
        assert freed
        assert again.allowed

    async def test_denial_takes_no_slot(self, backend: Backend) -> None:
        document = policy()
        document["tiers"]["everyone"]["quotas"]["video"]["capacity"] = 1
        async with Limiter(document, backend) as limiter:
            first = await limiter.take(ANN, "video")
            await limiter.leases.release(first.token)

            assert (await limiter.take(ANN, "video")).reason == "quota"
            assert await running(limiter) == 0


class TestKeeping:
    async def test_block_holds_the_slot_and_frees_it_whatever_happens(
        self, limiter: Limiter
    ) -> None:
        decision = await limiter.take(ANN, "video")
        assert decision.lease is not None

        async def fail(lease: Lease) -> None:
            async with lease:
                during.append(await running(limiter))
                raise ZeroDivisionError

        during: list[int] = []
        with pytest.raises(ZeroDivisionError):
            await fail(decision.lease)

        assert (during, await running(limiter)) == ([1], 0)
        assert decision.lease.over

    async def test_detached_lease_is_left_to_whoever_has_its_token(
        self, limiter: Limiter, other: Limiter
    ) -> None:
        decision = await limiter.take(ANN, "video")
        assert decision.lease is not None

        async with decision.lease:
            token = decision.lease.detach()
        after_block = await running(limiter)
        async with other.leases.hold(token):
            during = await running(limiter)

        assert token == decision.token
        assert (after_block, during, await running(limiter)) == (1, 1, 0)

    async def test_who_takes_over_a_lease_renews_it_at_once(self, clock: Clock) -> None:
        memory = MemoryBackend(clock=clock)
        limiter, other = Limiter(policy(), memory), Limiter(policy(), memory)
        decision = await limiter.take(ANN, "video")
        clock.advance(59)

        async with other.leases.hold(decision.token) as lease:
            await turns()
            clock.advance(59)
            late = await running(limiter)

        assert late == 1
        assert not lease.lost

    async def test_closing_waits_for_what_is_being_released(self, limiter: Limiter) -> None:
        decision = await limiter.take(ANN, "video")
        assert decision.lease is not None

        _ = limiter.leases.release_soon(decision.lease)
        await limiter.close()

        assert await running(limiter) == 0

    @pytest.mark.redis
    async def test_job_longer_than_its_lease_keeps_its_slot(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        async with Limiter(policy(1, "1 second"), backend) as limiter:
            decision = await limiter.take(ANN, "video")
            assert decision.lease is not None
            seen = set()

            async with decision.lease:
                until = now_of(redis_server) + 2_500_000
                while now_of(redis_server) < until:
                    seen.add((held(redis_server), (await limiter.take(ANN, "video")).reason))
                    await asyncio.sleep(0.005)

            assert seen == {(1, "concurrency")}
            assert held(redis_server) == 0

    @pytest.mark.redis
    async def test_lease_that_the_store_has_lost_is_said_to_be(
        self, redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with Limiter(policy(1, "1 second"), redis_url) as limiter:
            decision = await limiter.take(ANN, "video")
            lease = decision.lease
            assert lease is not None

            async with lease:
                redis_server.command("DEL", KEY)
                await poll(lambda: lease.lost)

        assert "a lease was lost: its job may be over the limit" in caplog.text
        assert held(redis_server) == 0


def now_of(server: RedisServer) -> int:
    time: Any = server.command("TIME")
    seconds, us = time
    return int(seconds) * 1_000_000 + int(us)


class TestTokens:
    async def test_what_holds_no_slot_is_no_lease(self, backend: Backend) -> None:
        document = policy()
        document["tiers"]["everyone"]["quotas"]["video"] = "9/hour"
        limiter = Limiter(document, backend)
        decision = await limiter.take(ANN, "video", settle_within=60)

        assert decision.lease is None
        for use in (limiter.leases.renew, limiter.leases.release):
            with pytest.raises(UsageError, match="of a take that holds no slot"):
                await use(decision.token)

    async def test_lease_of_another_namespace_is_left_alone(
        self, limiter: Limiter, backend: Backend
    ) -> None:
        decision = await limiter.take(ANN, "video")
        stranger = Limiter(policy(), backend, namespace="stranger")

        for use in (stranger.leases.renew, stranger.leases.release):
            with pytest.raises(UsageError, match='not of the namespace "stranger"'):
                await use(decision.token)
        with pytest.raises(UsageError, match='not of the namespace "stranger"'):
            stranger.leases.hold(decision.token)

        assert await running(limiter) == 1

    @pytest.mark.parametrize("token", ["", "garbage", "e30", "x" * 99_999, None, 5, b"e30"])
    async def test_garbage_is_a_usage_error(self, token: Any) -> None:
        limiter = Limiter(policy(), MemoryBackend())

        for use in (limiter.leases.renew, limiter.leases.release):
            with pytest.raises(UsageError, match="token"):
                await use(token)

    async def test_backend_of_ones_own_has_no_slots_and_says_so(self) -> None:
        token = (await Limiter(policy(), MemoryBackend()).take(ANN, "video")).token
        limiter = Limiter(policy(), Spy())

        with pytest.raises(UsageError, match="need one of our backends"):
            await limiter.take(ANN, "video")
        with pytest.raises(UsageError, match="need one of our backends"):
            await limiter.leases.release(token)


WORKER = """
import asyncio, sys
from tieredlimit import Account, Limiter

URL, KEEPS = sys.argv[1], sys.argv[2] == "keeps"
POLICY = {
    "features": {"video": {}},
    "tiers": {
        "everyone": {
            "quotas": {
                "video": {"rate": "100000/hour", "concurrency": 3, "lease": "1 second"},
            },
        },
    },
}


async def main():
    async with Limiter(POLICY, URL) as limiter:
        held = []
        print("up", flush=True)
        while True:
            decision = await limiter.take(Account("ann"), "video")
            if decision.allowed:
                held.append(decision)
                if KEEPS:
                    decision.lease.keep()
            await asyncio.sleep(0.005)


asyncio.run(main())
"""


@contextmanager
def worker(url: str, how: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), url, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            yield process
        finally:
            process.kill()


@pytest.mark.redis
@pytest.mark.fault("H1")
class TestKilledHolder:
    async def test_slots_of_a_killed_worker_come_back_after_their_lease_and_not_before(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        counts = set()

        def count() -> int:
            counts.add(held(redis_server))
            return held(redis_server)

        with worker(redis_url, "keeps") as killed:
            await poll(lambda: count() == 3)
            with worker(redis_url, "takes"):
                until = now_of(redis_server) + 1_500_000
                mine = set(scores(redis_server))
                while now_of(redis_server) < until:
                    count()
                    # Renewed all the time: nobody else gets one.
                    assert set(scores(redis_server)) == mine
                killed.kill()
                killed.wait()
                left = scores(redis_server)
                taken: dict[bytes, int] = {}

                def all_taken_over() -> bool:
                    count()
                    for holder, free_at in scores(redis_server).items():
                        if holder not in mine:
                            taken.setdefault(holder, free_at - 1_000_000)
                    return len(taken) >= 3

                await poll(all_taken_over)

        assert set(left) == mine
        assert max(counts) == 3
        for taken_at, free_at in zip(sorted(taken.values()), sorted(left.values()), strict=True):
            assert taken_at >= free_at


def scores(server: RedisServer) -> dict[bytes, int]:
    """Return by holder until when each slot is held."""
    found: Any = server.command("ZRANGE", KEY, "0", "-1", "WITHSCORES")
    return {holder: int(score) for holder, score in pairs(found)}


def pairs(found: Sequence[Any]) -> list[tuple[bytes, float]]:
    if found and isinstance(found[0], (tuple, list)):
        return [(holder, float(score)) for holder, score in found]
    return [(found[i], float(found[i + 1])) for i in range(0, len(found), 2)]


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    redis_server.command("FLUSHALL")
    async with Proxy(redis_server.port) as between:
        yield between


@pytest.mark.redis
@pytest.mark.fault("H5")
class TestLostAnswers:
    async def swallowed(self, limiter: Limiter, proxy: Proxy) -> str:
        """Take while nothing comes back, and nobody new gets through; return the reason."""
        await limiter.peek(BEN, "video")
        proxy.treat = lambda reply: b""
        proxy.gate.clear()
        return (await limiter.take(ANN, "video")).reason

    async def test_slot_whose_answer_was_lost_is_released_well_before_its_lease(
        self, redis_server: RedisServer, proxy: Proxy
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, timeout=IMPATIENT)
        async with Limiter(policy(lease="1 hour"), backend) as limiter:
            reason = await self.swallowed(limiter, proxy)
            during = held(redis_server)
            proxy.heal()
            await poll(lambda: not held(redis_server))

            assert (reason, during) == ("outage", 1)

    async def test_slot_whose_taker_gave_up_is_released(
        self, redis_server: RedisServer, proxy: Proxy
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        async with Limiter(policy(lease="1 hour"), backend) as limiter:
            await limiter.peek(BEN, "video")
            proxy.flow.clear()
            taking = asyncio.create_task(limiter.take(ANN, "video"))
            await poll(lambda: held(redis_server) == 1)

            taking.cancel()
            proxy.flow.set()
            await poll(lambda: not held(redis_server))

            assert (await asyncio.gather(taking, return_exceptions=True))[0].__class__ is (
                asyncio.CancelledError
            )

    async def test_closing_releases_what_is_left(
        self, redis_server: RedisServer, proxy: Proxy
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, timeout=IMPATIENT)
        limiter = Limiter(policy(lease="1 hour"), backend)
        await self.swallowed(limiter, proxy)
        during = held(redis_server)
        proxy.heal()

        await limiter.close()

        assert (during, held(redis_server)) == (1, 0)

    async def test_release_whose_answer_was_lost_is_tried_again(
        self, redis_server: RedisServer, proxy: Proxy
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        async with Limiter(policy(lease="1 hour"), backend) as limiter:
            decision = await limiter.take(ANN, "video")
            assert decision.lease is not None
            proxy.gate.clear()  # releases have a connection of their own
            with pytest.raises(BackendError):
                await decision.lease.release()
            during = held(redis_server)

            proxy.heal()
            await poll(lambda: not held(redis_server))

            assert during == 1


class Store:
    """Release and renew when it is up, and count what it is asked."""

    def __init__(self) -> None:
        self.up = True
        self.held: set[bytes] = set()
        self.asked = 0

    async def renew(self, hold: Hold) -> bool:
        return await self._ask(lambda: hold.id in self.held)

    async def release(self, hold: Hold) -> bool:
        def release() -> bool:
            was = hold.id in self.held
            self.held.discard(hold.id)
            return was

        return await self._ask(release)

    async def settle(self, record: str, corrections: Sequence[Correction]) -> Settled:
        raise NotImplementedError

    async def refund(self, corrections: Sequence[Correction]) -> list[int]:
        raise NotImplementedError

    async def level(self, key: str, quota: object) -> int:
        raise NotImplementedError

    async def close(self) -> None: ...

    async def _ask(self, answer: Callable[[], bool]) -> bool:
        self.asked += 1
        await asyncio.sleep(0)
        if not self.up:
            raise BackendError("the store is down")
        return answer()


def a_lease(number: int, seconds: float) -> Taken:
    id_ = pack(">QQ", 0, number)
    return Taken(id_, "video", "everyone", 1, (), ((KEY, round(seconds * 1_000_000)),), "")


class TestStoreThatIsDown:
    async def test_what_was_abandoned_is_released_once_it_is_up(self) -> None:
        store = Store()
        leases = Leases(store, "tieredlimit", Complaints(), 1.0)
        store.up = False
        for number in range(1_000):
            store.held.add(a_lease(number, 3600).id)
            leases.abandon(a_lease(number, 3600))

        await poll(lambda: store.asked > 0)
        # Not all of them again and again: others have to ask for something, too.
        asked_at_once = store.asked
        store.up = True
        await poll(lambda: not store.held)
        await leases.close()

        assert asked_at_once <= 128

    async def test_what_is_abandoned_is_bounded(self) -> None:
        store = Store()
        leases = Leases(store, "tieredlimit", Complaints(), 1.0)
        for number in range(MOST_ABANDONED + 100):
            store.held.add(a_lease(number, 3600).id)
            leases.abandon(a_lease(number, 3600))

        await leases.close()

        # The rest ends with its time.
        assert len(store.held) == 100

    async def test_renewal_that_failed_is_tried_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        store = Store()
        leases = Leases(store, "tieredlimit", Complaints(), 1.0)
        store.held.add(a_lease(1, 60).id)
        lease = Lease(leases, a_lease(1, 60))  # renewed as soon as it is kept
        store.up = False

        lease.keep()
        await poll(lambda: "a lease could not be renewed; trying again" in caplog.text)

        assert not lease.lost
        assert not lease.over
        store.up = True
        assert await lease.renew()
        assert await lease.release()

    async def test_lease_that_was_lost_stays_lost_where_the_store_says_nothing_more(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING)
        store = Store()
        leases = Leases(store, "tieredlimit", Complaints(), 1.0)
        lease = Lease(leases, a_lease(1, 60))
        lost = not await lease.renew()
        store.up = False

        lease.keep()
        await poll(lambda: "a lease could not be renewed" in caplog.text)

        assert (lost, lease.lost) == (True, True)

    async def test_end_of_a_block_does_not_fail_where_the_store_is_down(self) -> None:
        store = Store()
        leases = Leases(store, "tieredlimit", Complaints(), 1.0)
        lease = Lease(leases, a_lease(1, 3600))
        store.held.add(lease.taken.id)

        async with lease:
            store.up = False
        store.up = True
        await poll(lambda: not store.held)

        assert lease.over
        await leases.close()


@pytest.mark.fault("H1")
async def test_slots_that_are_still_held_are_released_where_another_of_the_lease_was_lost() -> None:
    clock = Clock()
    pool = {"rate": "1000/hour", "concurrency": 1, "lease": "1 hour"}
    limiter = Limiter(policy(3, "10 seconds", pool=pool), MemoryBackend(clock=clock))
    lease = (await limiter.take(ANN, "video")).lease
    assert lease is not None

    async with lease:
        clock.now += 11_000_000  # as a process that was stopped finds it
        assert not await lease.renew()
    after = await limiter.take(BEN, "video")

    assert lease.lost
    assert after.reason == "allowed"
    await limiter.close()


@pytest.mark.fault("F11")
async def test_limiter_that_is_not_enabled_asks_nobody_about_what_others_took() -> None:
    async with Limiter(policy(refund_on=[500]), MemoryBackend(clock=Clock())) as others:
        decision = await others.take(ANN, "video", settle_within=60)
    token = decision.token

    async with Limiter(policy(), "redis://127.0.0.1:1/0", enabled=False) as limiter:
        async with limiter.leases.hold(token) as lease:
            settled = await limiter.settle(token, 5)
            refunded = await limiter.refund(decision)
        renewed, released = await limiter.leases.renew(token), await limiter.leases.release(token)

    assert (lease.lost, settled, renewed, released) == (False, False, True, False)
    assert refunded is decision


async def test_take_that_was_never_sent_has_nothing_to_release() -> None:
    limiter = Limiter(policy(), "redis://127.0.0.1:1/0")

    outcomes = [(await limiter.take(ANN, "video")).reason for _ in range(1_000)]

    assert set(outcomes) == {"outage"}
    assert limiter.breaker_open
    # Only those before the breaker opened may have been on their way.
    assert len(limiter.leases._here()._left) < 20
    await limiter.close()
