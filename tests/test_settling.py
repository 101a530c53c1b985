"""Settling: what a job really cost is known at its end, and is charged once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.proxy import Proxy
from tests.servers import RedisServer
from tests.test_limiter import PATIENT, Clock, Spy
from tieredlimit import Account, BackendError, Denied, Limiter, UsageError, overrides
from tieredlimit.backends import Backend, MemoryBackend, RedisBackend
from tieredlimit.inforce import stored

DEADLINE = 30.0
IMPATIENT = 0.2
ANN = Account("ann", within={"org": "o1"})
BEN = Account("ben", within={"org": "o1"})


def policy(*quotas: object, **words: object) -> dict[str, Any]:
    """Let video cost one token a second of it: 60 an hour, and 600 a day for the org."""
    own = list(quotas) or ["60/hour", {"rate": "600/day", "per": "org"}]
    return {
        "features": {"video": {"outage": "allow", **words}, "image": {}},
        "tiers": {"everyone": {"quotas": {"video": own, "image": "unlimited"}}},
    }


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


async def left(limiter: Limiter, account: Account = ANN) -> list[int | None]:
    """Return what is in each bucket of the account, the tightest last."""
    return [one.remaining for one in (await limiter.peek(account, "video")).quotas]


class TestReserving:
    async def test_estimate_is_charged_at_once(self, limiter: Limiter) -> None:
        async with limiter.reserve(ANN, "video", 30) as reservation:
            during = await left(limiter)

        assert during == [30, 570]
        assert reservation.decision.remaining == 30
        assert reservation.lease is None

    async def test_what_was_not_used_is_given_back(self, limiter: Limiter) -> None:
        async with limiter.reserve(ANN, "video", 30) as reservation:
            settled = await reservation.settle(12)

        assert settled
        assert await left(limiter) == [48, 588]

    async def test_what_was_used_beyond_is_charged(self, limiter: Limiter) -> None:
        async with limiter.reserve(ANN, "video", 30) as reservation:
            settled = await reservation.settle(45)

        assert settled
        assert await left(limiter) == [15, 555]

    async def test_job_that_used_nothing_costs_nothing(self, limiter: Limiter) -> None:
        async with limiter.reserve(ANN, "video", 30) as reservation:
            await reservation.settle(0)

        assert await left(limiter) == [60, 600]

    async def test_what_costs_more_than_is_left_is_paid_off_before_anything_else(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        async with limiter.reserve(ANN, "video", 60) as reservation:
            await reservation.settle(90)

        denied = await limiter.take(ANN, "video")
        clock.advance(30 * 60 + 59)
        later = await limiter.take(ANN, "video")
        clock.advance(1)
        paid_off = await limiter.take(ANN, "video")

        assert (denied.retry_after, denied.remaining) == (31 * 60, 0)
        assert (later.allowed, paid_off.allowed) == (False, True)

    async def test_debt_is_one_capacity_at_most(self, limiter: Limiter) -> None:
        async with limiter.reserve(ANN, "video", 60) as reservation:
            await reservation.settle(10**9)

        # An hour of debt, and then a minute for one token.
        assert (await limiter.take(ANN, "video")).quotas[0].retry_after == 3600 + 60

    @pytest.mark.fault("A10", "E9")
    async def test_settling_twice_settles_once(self, limiter: Limiter, backend: Backend) -> None:
        other = Limiter(policy(), backend)
        async with limiter.reserve(ANN, "video", 30) as reservation:
            answers = [
                await reservation.settle(10),
                await reservation.settle(0),
                await other.settle(reservation.token, 0),
                await other.settle(reservation.token, 60),
            ]
        await other.close()

        assert answers == [True, False, False, False]
        assert await left(limiter) == [50, 590]

    @pytest.mark.fault("E9")
    async def test_of_many_who_settle_at_once_one_does(self, limiter: Limiter) -> None:
        reservation = limiter.reserve(ANN, "video", 30)
        await reservation.take()

        answers = await asyncio.gather(*(reservation.settle(actual) for actual in range(20)))

        assert sorted(answers) == [False] * 19 + [True]
        used = answers.index(True)
        assert await left(limiter) == [60 - used, 600 - used]

    async def test_another_process_settles_by_the_token(
        self, limiter: Limiter, backend: Backend
    ) -> None:
        async with limiter.reserve(ANN, "video", 30) as reservation:
            token = reservation.detach()

        async with Limiter(policy(), backend) as other:
            settled = await other.settle(token, 5)

        assert settled
        assert await left(limiter) == [55, 595]

    @pytest.mark.fault("E9")
    async def test_where_nobody_settles_the_estimate_stands(self, limiter: Limiter) -> None:
        async def crash() -> None:
            async with limiter.reserve(ANN, "video", 30):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await crash()

        assert await left(limiter) == [30, 570]

    async def test_settling_too_late_does_nothing_and_says_so(self, clock: Clock) -> None:
        limiter = Limiter(policy(), MemoryBackend(clock=clock))
        reservation = limiter.reserve(ANN, "video", 30, settle_within=60)
        await reservation.take()
        clock.advance(60)

        assert not await reservation.settle(0)
        assert await left(limiter) == [31, 570]

    @pytest.mark.fault("A10")
    async def test_giving_back_late_never_fills_beyond_full(
        self, limiter: Limiter, clock: Clock
    ) -> None:
        reservation = limiter.reserve(ANN, "video", 30)
        await reservation.take()
        clock.advance(29 * 60)

        await reservation.settle(0)
        taken = await limiter.take(ANN, "video", 60)
        more = await limiter.take(ANN, "video", 1)

        assert (taken.allowed, more.allowed) == (True, False)

    async def test_pool_is_settled_with_the_account(self, backend: Backend) -> None:
        document = policy(pool={"rate": "100/hour"})
        async with Limiter(document, backend) as limiter:
            async with limiter.reserve(ANN, "video", 50) as reservation:
                await reservation.settle(20)

            pool = (await limiter.peek(BEN, "video")).pool
            assert pool is not None
            assert (pool.remaining, await left(limiter)) == (80, [40, 580])

    async def test_lease_is_held_while_the_block_runs(self, backend: Backend) -> None:
        document = policy({"rate": "60/hour", "concurrency": 1, "lease": "1 minute"})
        async with Limiter(document, backend) as limiter:
            async with limiter.reserve(ANN, "video", 30) as reservation:
                during = await limiter.take(ANN, "video")
                await reservation.settle(10)
                settled = await limiter.take(ANN, "video")
            after = await limiter.take(ANN, "video")

            reasons = [one.reason for one in (during, settled, after)]
            assert reasons == ["concurrency", "concurrency", "allowed"]
            assert after.remaining == 49

    async def test_detached_lease_outlives_the_block(self, backend: Backend) -> None:
        document = policy({"rate": "60/hour", "concurrency": 1, "lease": "1 minute"})
        async with Limiter(document, backend) as limiter:
            async with limiter.reserve(ANN, "video", 30) as reservation:
                token = reservation.detach()
            during = await limiter.take(ANN, "video")
            async with limiter.leases.hold(token):
                await limiter.settle(token, 10)
            after = await limiter.take(ANN, "video")

            assert (during.reason, after.reason, after.remaining) == ("concurrency", "allowed", 49)

    async def test_what_was_taken_by_hand_is_not_taken_again_where_it_is_entered(
        self, backend: Backend
    ) -> None:
        document = policy({"rate": "60/hour", "concurrency": 1, "lease": "1 minute"})
        async with Limiter(document, backend) as limiter:
            reservation = limiter.reserve(ANN, "video", 20)
            taken = await reservation.take()

            async with reservation:
                during = await limiter.take(ANN, "video")
            entered = reservation.decision
            after = await limiter.take(ANN, "video")

            assert entered is taken
            assert (during.reason, after.reason, after.remaining) == ("concurrency", "allowed", 39)

    async def test_reservation_that_is_entered_twice_is_taken_twice(self, limiter: Limiter) -> None:
        reservation = limiter.reserve(ANN, "video", 20)
        await reservation.take()

        for _ in range(2):
            async with reservation:
                pass

        assert await left(limiter) == [20, 560]

    async def test_reserving_what_is_unlimited_costs_nothing(self, limiter: Limiter) -> None:
        async with limiter.reserve(ANN, "image", 30) as reservation:
            assert not await reservation.settle(5)

        assert reservation.token == ""


class TestDenied:
    @pytest.mark.fault("A3")
    async def test_denied_reservation_raises_and_charges_nothing(self, limiter: Limiter) -> None:
        with pytest.raises(Denied) as caught:
            async with limiter.reserve(ANN, "video", 61):
                raise AssertionError

        assert caught.value.decision.reason == "quota"
        assert await left(limiter) == [60, 600]

    async def test_taking_by_hand_returns_the_denial(self, limiter: Limiter) -> None:
        await limiter.take(ANN, "video", 60)
        reservation = limiter.reserve(ANN, "video", 30)

        decision = await reservation.take()

        assert not decision.allowed
        assert (reservation.token, reservation.lease) == ("", None)
        assert not await reservation.settle(5)

    async def test_nothing_is_there_before_it_was_taken(self, limiter: Limiter) -> None:
        reservation = limiter.reserve(ANN, "video", 30)

        with pytest.raises(UsageError, match="nothing is reserved yet"):
            _ = reservation.token
        with pytest.raises(UsageError, match="nothing is reserved yet"):
            await reservation.settle(5)


class TestArguments:
    @pytest.mark.parametrize("actual", [-1, 10**9 + 1, 1.5, True, None, "5"])
    async def test_actual_cost_is_a_whole_number(self, limiter: Limiter, actual: Any) -> None:
        reservation = limiter.reserve(ANN, "video", 30)
        await reservation.take()

        for settle in (reservation.settle(actual), limiter.settle(reservation.token, actual)):
            with pytest.raises(UsageError, match="the actual cost must be a whole number"):
                await settle

        assert await left(limiter) == [30, 570]

    @pytest.mark.parametrize("seconds", [0, 0.5, -1, 31 * 86_400, True, None, "60", float("nan")])
    async def test_time_to_settle_is_bounded(self, limiter: Limiter, seconds: Any) -> None:
        with pytest.raises(UsageError, match="settle_within must be from 1 to"):
            limiter.reserve(ANN, "video", 30, settle_within=seconds)

    async def test_token_of_another_namespace_settles_nothing(
        self, limiter: Limiter, backend: Backend
    ) -> None:
        decision = await limiter.take(ANN, "video", 30, settle_within=60)
        stranger = Limiter(policy(), backend, namespace="stranger")

        with pytest.raises(UsageError, match='not of the namespace "stranger"'):
            await stranger.settle(decision.token, 0)

        assert await left(limiter) == [30, 570]

    async def test_token_of_a_take_that_was_final_settles_nothing(self, backend: Backend) -> None:
        document = policy({"rate": "60/hour", "concurrency": 1, "lease": "1 minute"})
        async with Limiter(document, backend) as limiter:
            decision = await limiter.take(ANN, "video", 30)

            assert decision.token
            assert not await limiter.settle(decision.token, 0)
            assert await left(limiter) == [30]

    async def test_backend_of_ones_own_has_no_reservations_and_says_so(self) -> None:
        limiter = Limiter(policy(), Spy())

        with pytest.raises(UsageError, match="need one of our backends"):
            await limiter.reserve(ANN, "video", 30).take()


class TestPrices:
    """One token of 60 an hour is a minute of refill, one of 30 an hour is two."""

    @pytest.mark.fault("A10")
    @pytest.mark.parametrize(
        ("then", "now", "given_back"),
        [
            # 20 tokens back. Charged a minute each, and two today: a minute each is given back.
            ("60/hour", "30/hour", 20 * 60),
            # Charged two minutes each, and one today: only one is given back.
            ("30/hour", "60/hour", 20 * 60),
            ("60/hour", "60/hour", 20 * 60),
        ],
    )
    async def test_tokens_are_given_back_at_the_lower_of_both_prices(
        self, backend: Backend, then: str, now: str, given_back: int
    ) -> None:
        def quota(rate: str) -> dict[str, object]:
            return {"rate": rate, "name": "video"}

        async with Limiter(policy(quota(then)), backend) as before:
            decision = await before.take(ANN, "video", 30, settle_within=60)
        async with Limiter(policy(quota(now)), backend) as after:
            full_in = seconds_to_full((await after.peek(ANN, "video")).debts)
            await after.settle(decision.token, 10)
            settled = seconds_to_full((await after.peek(ANN, "video")).debts)

        assert full_in - settled == given_back

    async def test_more_is_charged_at_todays_price(self, backend: Backend) -> None:
        def quota(rate: str) -> dict[str, object]:
            return {"rate": rate, "name": "video"}

        async with Limiter(policy(quota("60/hour")), backend) as before:
            decision = await before.take(ANN, "video", 10, settle_within=60)
        async with Limiter(policy(quota("30/hour")), backend) as after:
            await after.settle(decision.token, 15)
            settled = seconds_to_full((await after.peek(ANN, "video")).debts)

        assert settled == 10 * 60 + 5 * 120

    async def test_quota_that_is_gone_is_settled_at_its_own_price(self, backend: Backend) -> None:
        async with Limiter(policy(), backend) as before:
            decision = await before.take(ANN, "video", 30, settle_within=60)
            async with Limiter(policy("10/minute"), backend) as after:
                settled = await after.settle(decision.token, 10)

            assert settled
            assert await left(before) == [50, 590]

    @pytest.mark.parametrize(
        ("everybodys", "anns", "minutes"),
        [("10/hour", "60/hour", 1), ("60/hour", "10/hour", 6)],
    )
    @pytest.mark.parametrize(("estimate", "actual"), [(4, 7), (7, 4)])
    async def test_account_with_an_override_is_settled_at_its_own_price(
        self,
        backend: Backend,
        everybodys: str,
        anns: str,
        minutes: int,
        estimate: int,
        actual: int,
    ) -> None:
        async with Limiter(policy(everybodys), backend) as limiter:
            await limiter.control.set("video", anns, account="ann")
            async with limiter.reserve(ANN, "video", estimate) as reservation:
                await reservation.settle(actual)

            settled = seconds_to_full((await limiter.peek(ANN, "video")).debts)

        assert settled == actual * minutes * 60

    @pytest.mark.fault("A10")
    async def test_account_with_an_override_is_refunded_all_that_it_was_charged(
        self, backend: Backend
    ) -> None:
        async with Limiter(policy("60/hour", refund_on=[500]), backend) as limiter:
            await limiter.control.set("video", "10/hour", account="ann")
            decision = await limiter.take(ANN, "video", 4)

            await limiter.refund(decision)

            assert await left(limiter) == [10]

    async def test_override_that_has_ended_is_no_price_of_today(self, clock: Clock) -> None:
        async with Limiter(policy("30/hour"), MemoryBackend(clock=clock)) as limiter:
            end = datetime.fromtimestamp(clock.now / 1_000_000, UTC) + timedelta(minutes=10)
            await limiter.control.set("video", "60/hour", tier="everyone", until=end)
            reservation = limiter.reserve(ANN, "video", 20)
            await reservation.take()
            clock.advance(10 * 60)

            await reservation.settle(25)
            settled = seconds_to_full((await limiter.peek(ANN, "video")).debts)

        assert settled == (20 - 10) * 60 + 5 * 120

    async def test_pushed_policy_counts_for_what_was_reserved_before(
        self, backend: Backend
    ) -> None:
        def quota(rate: str) -> dict[str, object]:
            return {"rate": rate, "name": "video"}

        async with Limiter(policy(), backend) as operator:
            await push(operator, policy(quota("30/hour")))
            async with Limiter(stored(), backend) as limiter:
                reservation = limiter.reserve(ANN, "video", 30)
                await reservation.take()
                await push(operator, policy(quota("60/hour")))
                await limiter.take(BEN, "video")  # and so it has heard

                await reservation.settle(10)
                settled = seconds_to_full((await limiter.peek(ANN, "video")).debts)

        assert settled == 30 * 120 - 20 * 60


@pytest.mark.redis
class TestRealServer:
    async def test_settling_too_late_does_nothing_and_says_so(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        async with Limiter(policy(), backend) as limiter:
            reservation = limiter.reserve(ANN, "video", 30, settle_within=1)
            taken = (await reservation.take()).taken
            assert taken is not None
            before = redis_server.command("EXISTS", taken.record)
            async with asyncio.timeout(DEADLINE):
                while redis_server.command("EXISTS", taken.record):  # noqa: ASYNC110 -- a server's
                    await asyncio.sleep(0.005)

            assert before == 1
            assert not await reservation.settle(0)
            assert await left(limiter) == [30, 570]

    @pytest.mark.fault("C6")
    async def test_nothing_is_left_behind_once_it_is_settled(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        async with Limiter(policy(), backend) as limiter:
            async with limiter.reserve(ANN, "video", 30) as reservation:
                await reservation.settle(0)

            found: Any = redis_server.command("KEYS", "*ann*")
            records: Any = redis_server.command("KEYS", "*~reservation*")
            assert (found, records) == ([], [])


class TestOutage:
    """With `outage = "allow"`: the job runs, and nobody knows what it was charged."""

    async def test_reservation_without_an_answer_goes_on_and_settles_nothing(self) -> None:
        backend = RedisBackend.from_url("redis://127.0.0.1:1/0", timeout=IMPATIENT)
        async with Limiter(policy(), backend) as limiter:
            async with limiter.reserve(ANN, "video", 30) as reservation:
                settled = await reservation.settle(10)

            assert reservation.decision.reason == "outage"
            assert (reservation.token, reservation.lease, settled) == ("", None, False)
            assert await limiter.settle(reservation.token, 10) is False
            assert reservation.detach() == ""

    async def test_reservation_that_an_outage_denies_raises(self) -> None:
        backend = RedisBackend.from_url("redis://127.0.0.1:1/0", timeout=IMPATIENT)
        async with Limiter(policy(outage="deny"), backend) as limiter:
            with pytest.raises(Denied) as caught:
                async with limiter.reserve(ANN, "video", 30):
                    raise AssertionError

        assert caught.value.decision.reason == "outage"

    @pytest.mark.redis
    async def test_where_the_answer_was_lost_the_estimate_stands(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with (
            Proxy(redis_server.port) as proxy,
            Limiter(policy(), RedisBackend.from_url(proxy.url, timeout=IMPATIENT)) as limiter,
            Limiter(policy(), RedisBackend.from_url(redis_url, timeout=PATIENT)) as other,
        ):
            await limiter.peek(BEN, "video")
            proxy.treat = lambda reply: b""
            async with limiter.reserve(ANN, "video", 30) as reservation:
                settled = await reservation.settle(10)
            proxy.heal()

            assert (reservation.decision.reason, reservation.token) == ("outage", "")
            assert not settled
            assert await left(other) == [30, 570]

    @pytest.mark.redis
    @pytest.mark.fault("E9")
    async def test_settling_without_an_answer_may_be_repeated(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with (
            Proxy(redis_server.port) as proxy,
            Limiter(policy(), RedisBackend.from_url(proxy.url, timeout=PATIENT)) as limiter,
            Limiter(policy(), RedisBackend.from_url(redis_url, timeout=PATIENT)) as other,
        ):
            async with limiter.reserve(BEN, "video", 0) as warm:
                await warm.settle(0)  # and so there is a connection
            async with limiter.reserve(ANN, "video", 30) as reservation:
                proxy.treat = lambda reply: b""
                with pytest.raises(BackendError):
                    await reservation.settle(10)
                after_first = await left(other)
                proxy.heal()
                again = await reservation.settle(10)

            # The first one ran: only its answer was lost.
            assert (after_first, again) == ([50, 590], False)
            assert await left(other) == [50, 590]


async def push(operator: Limiter, document: dict[str, Any]) -> None:
    """Do what `tieredlimit policy push` does."""
    store = operator._force.store
    assert store is not None
    head = await store.head()
    change = overrides.push(head, document, now=await store.now())
    await store.publish(change.revision, seen=head)


def seconds_to_full(debts: Any) -> int:
    (debt,) = debts
    return int(debt) // 1_000_000
