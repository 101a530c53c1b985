"""Redis as it is met in the field: gone, slow, restarted, forked, and lying about its replies."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
import redis
import redis.asyncio
from redis._parsers import _AsyncHiredisParser, _AsyncRESP2Parser

from tests.contract import (
    HOUR,
    MINUTE,
    SECOND,
    START,
    Clock,
    charge,
    debts,
    drain,
    quota,
    shelf,
    take_at_once,
)
from tests.holds_contract import (
    Ask,
    RedisHoldsContract,
    claim,
    pool,
    slot,
)
from tests.proxy import Proxy
from tests.reference import Reference
from tests.servers import Monitor, RedisServer
from tieredlimit import Account, BackendError, Limiter, UsageError
from tieredlimit._core.keys import nameless
from tieredlimit.backends import Backend, Charge, RedisBackend, Reply
from tieredlimit.backends import calls as calls_module
from tieredlimit.backends import redis as redis_module
from tieredlimit.backends.call import Call

PATIENT = 10.0
IMPATIENT = 0.05
RECOVERY_SECONDS = 20.0

POLICY = {
    "order": ["free"],
    "features": {
        "image": {"routes": ["POST /v1/images"]},
        "video": {"routes": ["POST /v1/videos"]},
    },
    "tiers": {
        "free": {
            "quotas": {
                "image": ["50/hour", "70/day", {"rate": "3/hour", "per": "org", "name": "org"}],
                "video": 0,
            }
        }
    },
}


CAPACITY = {
    "pools": {"gpu": {"rate": "600/minute", "concurrency": 9, "lease": "1 minute"}},
    "features": {
        "video": {"routes": ["POST /v1/videos"], "pool": "gpu"},
        "image": {"routes": ["POST /v1/images"], "refund_on": [500]},
    },
    "tiers": {
        "free": {
            "quotas": {
                "video": [
                    {"rate": "50/hour", "concurrency": 2, "lease": "1 minute"},
                    {"rate": "90/day"},
                ],
                "image": "50/day",
            }
        }
    },
}


@pytest.fixture
async def frozen(redis_url: str) -> AsyncIterator[RedisBackend]:
    """The shared server, deciding by a clock that stands still."""
    backend = RedisBackend.from_url(redis_url, clock=Clock(), timeout=PATIENT)
    yield backend
    await backend.close()


@pytest.fixture
async def live(redis_url: str) -> AsyncIterator[RedisBackend]:
    """The shared server, deciding by its own clock."""
    backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
    yield backend
    await backend.close()


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    redis_server.command("FLUSHALL")
    async with Proxy(redis_server.port) as between:
        yield between


async def recovered(backend: Backend, charges: Sequence[Charge]) -> Reply:
    """Ask until there is an answer again."""
    async with asyncio.timeout(RECOVERY_SECONDS):
        while True:
            try:
                return await backend.take(charges)
            except BackendError:
                continue


def decisions_sent(
    backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> list[Sequence[Charge]]:
    """Record from now on the charges of each decision that leaves."""
    sent: list[Sequence[Charge]] = []
    _, calls = backend._session()
    next_call = calls.next_call

    def recorded(slots: int) -> Call | None:
        call = next_call(slots)
        if call is not None:
            sent.extend(one.charges for one in call.decisions)
        return call

    monkeypatch.setattr(calls, "next_call", recorded)
    return sent


def keys_of(server: RedisServer) -> list[str]:
    found = server.command("KEYS", "*")
    assert isinstance(found, list)
    return sorted(key.decode() for key in found)


def ttls_of(server: RedisServer) -> list[object]:
    return [server.command("PTTL", key) for key in keys_of(server)]


def server_now(server: RedisServer) -> int:
    found = server.command("TIME")
    assert isinstance(found, (list, tuple))
    return int(found[0]) * SECOND + int(found[1])


class TestRoundTrips:
    async def test_take_over_all_quotas_and_subjects_is_one_evalsha(self, redis_url: str) -> None:
        account = Account("u1", within={"org": "o1"})
        async with Limiter(POLICY, redis_url) as limiter, Monitor(redis_url) as monitor:
            await limiter.take(account, "image")
            await monitor.commands()

            for expected in (True, True, False):
                assert (await limiter.take(account, "image")).allowed is expected

                sent = await monitor.commands()
                assert [command.split()[0] for command in sent] == ["EVALSHA"]

    async def test_usage_of_all_features_is_one_evalsha(self, redis_url: str) -> None:
        async with Limiter(POLICY, redis_url) as limiter, Monitor(redis_url) as monitor:
            await monitor.commands()

            await limiter.usage(Account("u1"))

            assert [command.split()[0] for command in await monitor.commands()] == ["EVALSHA"]

    async def test_zero_and_what_never_fits_ask_nothing(self, redis_url: str) -> None:
        async with Limiter(POLICY, redis_url) as limiter, Monitor(redis_url) as monitor:
            await monitor.commands()

            zero = await limiter.take(Account("u1"), "video")
            never = await limiter.take(Account("u1"), "image", cost=4)

            assert (zero.allowed, never.allowed) == (False, False)
            assert await monitor.commands() == []


class TestHolds(RedisHoldsContract):
    @pytest.fixture
    async def backend(self, redis_url: str, clock: Clock) -> AsyncIterator[RedisBackend]:
        backend = RedisBackend.from_url(redis_url, clock=clock, timeout=PATIENT)
        yield backend
        await backend.close()

    @pytest.fixture
    def live(self, live: RedisBackend) -> RedisBackend:
        return live

    @pytest.fixture
    def ask(self, redis_server: RedisServer) -> Ask:
        return redis_server.command

    @pytest.fixture
    def keys(self, redis_server: RedisServer) -> Callable[[], list[str]]:
        return lambda: keys_of(redis_server)


class TestCapacityRoundTrips:
    async def test_pool_lease_reservation_and_two_quotas_are_one_evalsha(
        self, redis_url: str
    ) -> None:
        account = Account("u1")
        async with Limiter(CAPACITY, redis_url) as limiter, Monitor(redis_url) as monitor:
            first = limiter.reserve(account, "video", 2)
            await first.take()
            await monitor.commands()

            reasons = []
            for _ in range(2):
                reservation = limiter.reserve(account, "video", 2)
                reasons.append((await reservation.take()).reason)
                sent = await monitor.commands()
                assert [command.split()[0] for command in sent] == ["EVALSHA"]
            assert sent[0].split()[2] == "6"  # revision, quotas, pool, two slots, reservation

            assert reasons == ["allowed", "concurrency"]
            assert len(reservation.decision.slots) == 2

    @pytest.mark.fault("F2")
    async def test_scripts_that_were_flushed_are_sent_again_by_each_that_needs_them(
        self, redis_url: str, redis_server: RedisServer
    ) -> None:
        async with Limiter(CAPACITY, redis_url) as limiter, Monitor(redis_url) as monitor:
            account = Account("u1")
            reserved = await limiter.reserve(account, "video", 5).take()
            assert reserved.lease is not None
            lease, plain = reserved.lease, await limiter.take(account, "image", 5)

            async def settle() -> bool:
                return await limiter.settle(reserved.token, 3)

            async def refund() -> bool:
                return list((await limiter.refund(plain)).debts) == [0]

            for verb in (lease.renew, settle, refund, lease.release):
                redis_server.command("SCRIPT", "FLUSH")
                await monitor.commands()

                assert await verb()

                sent = [command.split()[0] for command in await monitor.commands()]
                assert [one for one in sent if one.startswith("EVAL")] == ["EVALSHA", "EVAL"]


class TestCapacityWithoutAccess:
    @pytest.mark.fault("F4", "F7")
    @pytest.mark.parametrize("denied", ["-zcard", "-get", "-time"])
    @pytest.mark.login("default")  # it takes a right away
    async def test_take_whose_parts_may_not_be_read_charges_nothing(
        self, own_server: RedisServer, denied: str
    ) -> None:
        own_server.command("ACL", "SETUSER", "app", "on", ">word", "~*", "+@all", denied)
        url = own_server.url.replace("redis://", "redis://app:word@")
        backend = RedisBackend.from_url(url, timeout=PATIENT)

        with pytest.raises(BackendError):
            await backend.claim(
                [charge(shelf(quota("5/hour"))), pool("9/hour")], claim(slot(), kept=HOUR)
            )

        assert keys_of(own_server) == []
        await backend.close()


class TestLostScript:
    @pytest.mark.fault("F2")
    async def test_flushed_script_is_sent_again_within_the_same_take(
        self, live: RedisBackend, redis_server: RedisServer
    ) -> None:
        image = [charge(shelf(quota("5/hour")))]
        await live.take(image)
        redis_server.command("SCRIPT", "FLUSH")

        async with Monitor(redis_server.url) as monitor:
            allowed = [(await live.take(image)).allowed for _ in range(5)]
            sent = [command.split()[0] for command in await monitor.commands()]

        assert allowed == [True] * 4 + [False]
        assert sent == ["EVALSHA", "EVAL"] + ["EVALSHA"] * 4

    @pytest.mark.fault("F2")
    async def test_restarted_server_is_taught_the_script_again(
        self, own_server: RedisServer
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, timeout=PATIENT)
        image = shelf(quota("5/hour"))
        await drain(backend, image)
        own_server.restart()

        reply = await recovered(backend, [charge(image)])

        assert reply.allowed
        await backend.close()

    @pytest.mark.fault("F2", "F4")
    @pytest.mark.login("default")  # it takes a right away
    async def test_user_who_may_not_load_scripts_is_served_all_the_same(
        self, own_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        own_server.command(
            "ACL", "SETUSER", "app", "on", ">word", "~*",
            "+evalsha", "+eval", "+time", "+get", "+set", "+client", "+hello",
        )  # fmt: skip
        url = own_server.url.replace("redis://", "redis://app:word@")
        backend = RedisBackend.from_url(url, timeout=PATIENT)
        await backend.open()

        assert await drain(backend, shelf(quota("5/hour"))) == 5
        assert "Redis refused to load a script" in caplog.text
        await backend.close()


class TestExpiry:
    @pytest.mark.fault("A1")
    @pytest.mark.parametrize("capacity", [1, 2, 30])
    @pytest.mark.parametrize(
        "rate", ["7/minute", "3/second", "50/second", "1000/second", "10000/second"]
    )
    async def test_admitted_is_never_more_than_capacity_plus_refill(
        self, live: RedisBackend, rate: str, capacity: int
    ) -> None:
        only = quota(rate, capacity=capacity)
        one = [charge(shelf(only))]
        reference = Reference()

        replies = [reply for _ in range(3) for reply in await take_at_once(live, one, 100)]

        admitted = sum(reply.allowed for reply in replies)
        elapsed = replies[-1].now - replies[0].now
        assert capacity <= admitted <= capacity + elapsed / only.interval_us
        for reply in sorted(replies, key=lambda reply: (reply.now, not reply.allowed)):
            assert (reply.allowed, list(reply.debts)) == reference.take(one, reply.now)

    @pytest.mark.fault("A1", "C6")
    @pytest.mark.parametrize("capacity", [1, 3, 1000])
    @pytest.mark.parametrize("rate", ["2/second", "900/second", "10000/second", "1000000/second"])
    async def test_key_of_a_bucket_that_fills_in_under_a_second_lives_until_it_is_full(
        self, live: RedisBackend, redis_server: RedisServer, rate: str, capacity: int
    ) -> None:
        one = charge(shelf(quota(rate, capacity=capacity)), capacity)

        reply = await live.take([one])
        found = redis_server.command(
            "EVAL",
            "local now = redis.call('TIME') return {redis.call('PTTL', KEYS[1]), now[1], now[2]}",
            "1",
            one.key,
        )

        assert isinstance(found, list)
        ttl_ms, now_ms = int(found[0]), int(found[1]) * 1000 + int(found[2]) // 1000
        full_at = reply.now + reply.debts[0]
        # A key is gone once the clock shows a later millisecond than that of its expiry.
        gone_at = (now_ms + ttl_ms + 1) * 1000 if ttl_ms >= 0 else (now_ms + 1) * 1000
        assert ttl_ms != -1
        assert gone_at >= full_at

    @pytest.mark.fault("C6", "F7")
    async def test_every_key_expires_after_any_path(
        self, live: RedisBackend, redis_server: RedisServer
    ) -> None:
        day, minute = shelf(quota("5/day"), quota("9/hour", "h")), shelf(quota("5/minute"))
        other = shelf(quota("2/hour"), tier="other")

        await live.take([charge(day), charge(other)])
        await drain(live, day)
        await live.take([charge(minute)])  # lowers
        await live.take([charge(minute, 0), charge(other, 1)])
        await live.take([charge(other, 3)])
        await live.take([charge(other, 0, "u2")])

        ttls = ttls_of(redis_server)
        assert len(ttls) == 2
        assert all(isinstance(ttl, int) and 0 < ttl <= HOUR // 1000 for ttl in ttls)

    @pytest.mark.fault("C6")
    async def test_with_a_clock_of_ours_keys_live_an_hour_at_least(
        self, frozen: RedisBackend, redis_server: RedisServer
    ) -> None:
        await frozen.take([charge(shelf(quota("5/second")))])
        await frozen.take([charge(shelf(quota("1/day"), tier="slow"))])

        shorter, longer = sorted(int(str(ttl)) for ttl in ttls_of(redis_server))

        assert HOUR // 1000 - 60_000 < shorter <= HOUR // 1000 < longer

    @pytest.mark.fault("A3", "A5")
    async def test_denials_and_peeks_make_no_key(
        self, live: RedisBackend, redis_server: RedisServer
    ) -> None:
        image, other = shelf(quota("5/hour")), shelf(quota("5/hour"), tier="other")

        await live.take([charge(image, 6)])
        await live.take([charge(image, 10**9), charge(other, 1)])
        await live.take([charge(image, 0)])

        assert keys_of(redis_server) == []


class TestWhatStandsUnderOurKeys:
    @pytest.mark.fault("F4", "F7")
    @pytest.mark.parametrize("order", [1, -1])
    async def test_wrong_type_is_an_error_and_nothing_else_is_written(
        self, live: RedisBackend, redis_server: RedisServer, order: int
    ) -> None:
        good, bad = charge(shelf(quota("5/hour"))), charge(shelf(quota("5/hour"), tier="bad"))
        redis_server.command("RPUSH", bad.key, "x")

        with pytest.raises(
            BackendError, match=rf"is no bucket under a key of {re.escape(nameless(bad.key))}$"
        ):
            await live.take([good, bad][::order])

        assert keys_of(redis_server) == [bad.key]
        assert (await live.take([good])).allowed

    @pytest.mark.fault("F7")
    async def test_value_that_is_no_record_is_an_error_and_stays(
        self, live: RedisBackend, redis_server: RedisServer
    ) -> None:
        good, bad = charge(shelf(quota("5/hour"))), charge(shelf(quota("5/hour"), tier="bad"))
        redis_server.command("SET", bad.key, "abc")

        with pytest.raises(
            BackendError, match=rf"is no bucket under a key of {re.escape(nameless(bad.key))}$"
        ):
            await live.take([good, bad])

        assert keys_of(redis_server) == [bad.key]
        assert redis_server.command("GET", bad.key) == b"abc"

    @pytest.mark.fault("F4", "F7")
    @pytest.mark.login("default")  # it takes a right away
    async def test_user_who_may_not_read_is_told_so_and_nothing_is_written(
        self, own_server: RedisServer
    ) -> None:
        own_server.command(
            "ACL", "SETUSER", "app", "on", ">word", "~*", "+evalsha", "+time", "+set", "+client",
            "+script",
        )  # fmt: skip
        url = own_server.url.replace("redis://", "redis://app:word@")
        backend = RedisBackend.from_url(url, timeout=PATIENT)
        takes = [backend.take([charge(shelf(quota("5/hour")), 1, f"u{i}")]) for i in range(9)]

        failures = await asyncio.gather(*takes, return_exceptions=True)

        assert {type(failure) for failure in failures} == {BackendError}
        assert all(str(failure).startswith("Redis refused: ") for failure in failures)
        assert keys_of(own_server) == []
        await backend.close()


class TestBusyEventLoops:
    def _compute(self) -> None:
        """Keep the event loop busy for longer than a decision may take."""
        until = time.monotonic() + 2 * IMPATIENT
        while time.monotonic() < until:
            pass

    @pytest.mark.parametrize("count", [1, 30])
    async def test_reply_that_came_while_the_loop_was_busy_counts(
        self, redis_url: str, count: int
    ) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=IMPATIENT)
        five = [charge(shelf(quota("5/hour")))]
        await backend.open()

        async def take_and_compute() -> Reply:
            taking = asyncio.ensure_future(backend.take(five))
            await asyncio.sleep(0)
            self._compute()
            return await taking

        replies = [await take_and_compute() for _ in range(7)] if count == 1 else []
        if count > 1:
            taking = [asyncio.ensure_future(backend.take(five)) for _ in range(count)]
            await asyncio.sleep(0)
            self._compute()
            replies = await asyncio.gather(*taking)

        assert [reply.allowed for reply in replies].count(True) == 5
        await backend.close()


class TestOutages:
    @pytest.mark.fault("F1", "F9")
    async def test_paused_server_is_an_error_in_time_and_charges_once_what_was_sent(
        self, own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, clock=Clock(), timeout=IMPATIENT)
        image = charge(shelf(quota("3600/hour")))
        await recovered(backend, [image._replace(cost=0)])
        own_server.pause()

        sent = decisions_sent(backend, monkeypatch)

        one_by_one = [
            await asyncio.gather(backend.take([image]), return_exceptions=True) for _ in range(2)
        ]
        together = await asyncio.gather(
            *(backend.take([image]) for _ in range(20)), return_exceptions=True
        )
        charged = len(sent)
        own_server.resume()
        after = await recovered(backend, [image._replace(cost=0)])

        failures = [*together, *(failure for (failure,) in one_by_one)]
        assert {str(failure) for failure in failures} == {"Redis did not answer within 0.05 s"}
        # Two were in flight. What was given up before it was sent was never charged.
        assert charged == redis_module.IN_FLIGHT
        assert list(after.debts) == [charged * SECOND]
        await backend.close()

    @pytest.mark.fault("F1")
    async def test_connection_without_replies_for_too_long_is_given_up(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_module, "STALL_TIMEOUT", 0.0)
        backend = RedisBackend.from_url(proxy.url, timeout=IMPATIENT)
        image = [charge(shelf(quota("5/hour")), 0)]
        await recovered(backend, image)
        before = proxy.connections
        proxy.hole = True

        # At the second deadline, if not at the first, the first call is older than any caller.
        for _ in range(2):
            with pytest.raises(BackendError, match="did not answer"):
                await backend.take(image)
        proxy.mend()  # but not this connection, over which nothing ever comes again
        await recovered(backend, image)

        assert proxy.connections > before
        await backend.close()

    @pytest.mark.fault("F1")
    async def test_slow_connection_is_not_abandoned_by_impatient_decisions(
        self, proxy: Proxy
    ) -> None:
        proxy.gate.clear()
        backend = RedisBackend.from_url(proxy.url, timeout=IMPATIENT)
        image = [charge(shelf(quota("5/hour")))]

        for _ in range(5):
            with pytest.raises(BackendError, match="did not answer within"):
                await backend.take(image)
        proxy.gate.set()
        await recovered(backend, image)

        assert proxy.connections == 1
        await backend.close()

    @pytest.mark.fault("F1")
    async def test_connection_that_is_never_made_is_given_up_and_tried_again(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_module, "CONNECT_TIMEOUT", 0.3)
        proxy.gate.clear()
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        image = [charge(shelf(quota("5/hour")))]

        with pytest.raises(BackendError, match="cannot connect to Redis"):
            await backend.take(image)
        proxy.gate.set()

        assert (await recovered(backend, image)).allowed
        await backend.close()

    @pytest.mark.fault("F1")
    async def test_greeting_that_is_never_answered_is_given_up_and_tried_again(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_module, "CONNECT_TIMEOUT", 0.3)
        digest = b"$40\r\n"  # what loading a script is answered
        proxy.treat = lambda reply: reply.partition(digest)[0]
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        image = [charge(shelf(quota("5/hour")))]

        with pytest.raises(BackendError, match="cannot connect to Redis"):
            await backend.take(image)
        proxy.heal()

        assert (await recovered(backend, image)).allowed
        await backend.close()

    @pytest.mark.fault("F1")
    async def test_killed_server_is_an_error_and_a_restarted_one_serves_again(
        self, own_server: RedisServer
    ) -> None:
        for url in (own_server.url, own_server.unix_url):
            backend = RedisBackend.from_url(url, timeout=PATIENT)
            image = [charge(shelf(quota("5/hour")))]
            await backend.take(image)
            own_server.kill()

            for expected in ("the connection to Redis broke", "cannot connect to Redis"):
                with pytest.raises(BackendError, match=expected):
                    await backend.take(image)
            own_server.restart()

            assert (await recovered(backend, image)).allowed
            await backend.close()

    @pytest.mark.fault("F1")
    async def test_opening_without_a_server_is_logged_and_not_fatal(
        self, own_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        own_server.kill()
        backend = RedisBackend.from_url(own_server.url, timeout=PATIENT)

        await backend.open()

        assert "cannot connect to Redis" in caplog.text
        assert "trying again with each decision" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING
        own_server.restart()
        await backend.close()

    @pytest.mark.fault("F1")
    async def test_name_that_does_not_resolve_is_an_error(self) -> None:
        backend = RedisBackend.from_url("redis://no-such-host.invalid:1/0", timeout=PATIENT)

        with pytest.raises(BackendError, match="cannot connect to Redis"):
            await backend.take([charge(shelf(quota("5/hour")))])

    @pytest.mark.fault("F1", "F9")
    async def test_write_that_the_server_never_reads_fails_in_time_and_later_takes_are_right(
        self, own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, clock=Clock(), timeout=0.3)
        image = shelf(quota("3600/hour"))
        await recovered(backend, [charge(image, 0)])
        own_server.pause()
        sent = decisions_sent(backend, monkeypatch)

        # More than all buffers between us and the server hold.
        huge = Charge(image.prefix + "k" * 40_000_000, image, 1)
        failures = await asyncio.gather(
            *(backend.take([huge]) for _ in range(5)), return_exceptions=True
        )
        charged = len(sent)
        own_server.resume()
        after = await recovered(backend, [huge._replace(cost=0)])
        replies = await asyncio.gather(
            *(backend.take([charge(image, i, f"u{i}")]) for i in range(50))
        )

        assert {type(failure) for failure in failures} == {BackendError}
        assert charged == redis_module.IN_FLIGHT
        assert after.debts[0] <= charged * SECOND
        assert [list(reply.debts) for reply in replies] == [[i * SECOND] for i in range(50)]
        await backend.close()

    async def test_more_waiting_decisions_than_the_bound_fail_at_once(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        image = [charge(shelf(quota("5/hour")))]
        await backend.open()
        monkeypatch.setattr(calls_module, "MAX_WAITING", 3)
        proxy.flow.clear()
        # Two are in flight and do not wait for a call any more.
        waiting = [asyncio.ensure_future(backend.take(image)) for _ in range(6)]

        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        proxy.flow.set()
        replies = await asyncio.gather(*waiting, return_exceptions=True)

        assert done == {waiting[5]}
        assert str(replies[5]) == "3 decisions are waiting for Redis already"
        assert all(isinstance(reply, Reply) for reply in replies[:5])
        await backend.close()

    @pytest.mark.fault("F3")
    async def test_server_that_became_a_replica_is_an_error_and_is_left(
        self, own_server: RedisServer
    ) -> None:
        async with Proxy(own_server.port) as proxy:
            backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
            image = [charge(shelf(quota("5/hour")))]
            await backend.take(image)
            own_server.command("REPLICAOF", "127.0.0.1", "1")

            for _ in range(2):
                with pytest.raises(BackendError, match="read only replica"):
                    await backend.take(image)
            own_server.command("REPLICAOF", "NO", "ONE")

            assert (await recovered(backend, image)).allowed
            assert proxy.connections == 3
            await backend.close()

    @pytest.mark.fault("F4")
    async def test_server_out_of_memory_is_an_error_and_charges_nothing(
        self, own_server: RedisServer
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, clock=Clock(), timeout=PATIENT)
        image = charge(shelf(quota("5/hour")))
        await backend.take([image])
        own_server.command("CONFIG", "SET", "maxmemory", "1")

        with pytest.raises(BackendError, match="maxmemory"):
            await backend.take([image])
        own_server.command("CONFIG", "SET", "maxmemory", "0")

        assert await debts(backend, image) == [HOUR // 5]
        await backend.close()

    @pytest.mark.fault("F4")
    @pytest.mark.login("default")  # it gives this user a password
    async def test_missing_password_is_an_error_and_the_right_one_is_served(
        self, own_server: RedisServer
    ) -> None:
        own_server.command("CONFIG", "SET", "requirepass", "word")
        backend = RedisBackend.from_url(own_server.url, timeout=PATIENT)
        image = [charge(shelf(quota("5/hour")))]

        for _ in range(3):
            with pytest.raises(BackendError, match="cannot connect to Redis"):
                await backend.take(image)
        knowing = RedisBackend.from_url(
            own_server.url.replace("redis://", "redis://:word@"), timeout=PATIENT
        )
        assert (await knowing.take(image)).allowed
        await knowing.close()
        await backend.close()

    @pytest.mark.fault("F4")
    async def test_server_busy_with_a_script_is_an_error_until_that_is_killed(
        self, own_server: RedisServer
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, timeout=IMPATIENT)
        image = [charge(shelf(quota("5/hour")))]
        await recovered(backend, image)
        own_server.command("CONFIG", "SET", "lua-time-limit", "1")
        endless = asyncio.ensure_future(
            asyncio.to_thread(own_server.command, "EVAL", "while true do end", "0")
        )

        async with asyncio.timeout(RECOVERY_SECONDS):
            busy = ""
            while "BUSY" not in busy:
                try:
                    await backend.take([image[0]._replace(cost=0)])
                except BackendError as exc:
                    busy = str(exc)
        own_server.command("SCRIPT", "KILL")
        with pytest.raises(redis.ResponseError):
            await endless

        assert busy.startswith("Redis refused: BUSY")
        assert (await recovered(backend, image)).allowed
        await backend.close()


class TestStats:
    async def test_calls_are_counted_with_their_decisions_and_failures(
        self, own_server: RedisServer
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, timeout=PATIENT)
        image = shelf(quota("500/hour"))
        await asyncio.gather(*(backend.take([charge(image, 1, f"u{i}")]) for i in range(50)))
        own_server.command("CONFIG", "SET", "maxmemory", "1")
        await asyncio.gather(backend.take([charge(image)]), return_exceptions=True)

        stats = backend.call_stats

        assert (stats.decisions, stats.failures) == (51, 1)
        assert stats.calls == sum(stats.by_seconds) == sum(stats.by_decisions) < 51
        assert stats.seconds_sum > 0

    @pytest.mark.parametrize("trouble", ["kill", "pause"])
    async def test_server_that_does_not_answer_is_counted_as_failing(
        self, own_server: RedisServer, trouble: str
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, timeout=0.05)
        image = [charge(shelf(quota("500/hour")))]
        await recovered(backend, image)
        before = backend.call_stats.failures
        getattr(own_server, trouble)()

        for _ in range(2):
            with pytest.raises(BackendError):
                await backend.take(image)

        assert backend.call_stats.failures >= before + 2
        await backend.close()


class TestReplies:
    """Against a proxy of ours in front of the real server."""

    @pytest.mark.fault("F10")
    async def test_decision_whose_reply_is_swallowed_runs_exactly_once(
        self, proxy: Proxy, frozen: RedisBackend
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, clock=Clock(), timeout=0.2)
        image = charge(shelf(quota("3600/hour")))
        failures: list[object] = []
        afterwards = []

        for number in range(1, 4):
            proxy.heal()
            await recovered(backend, [image._replace(cost=0)])
            proxy.treat = lambda reply: b""
            failures += await asyncio.gather(backend.take([image]), return_exceptions=True)
            afterwards.append((number, await debts(frozen, image)))

        assert {type(failure) for failure in failures} == {BackendError}
        assert afterwards == [(number, [number * SECOND]) for number in (1, 2, 3)]
        await backend.close()

    @pytest.mark.fault("F10")
    async def test_decisions_whose_replies_are_swallowed_run_once_if_sent_and_else_never(
        self, proxy: Proxy, frozen: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, clock=Clock(), timeout=0.2)
        image = charge(shelf(quota("3600/hour")))
        await recovered(backend, [image._replace(cost=0)])
        sent = decisions_sent(backend, monkeypatch)
        swallowed = 0

        def swallow_the_second(reply: bytes) -> bytes:
            nonlocal swallowed
            swallowed += 1
            return reply if swallowed == 1 else b""

        proxy.treat = swallow_the_second
        fifty = await asyncio.gather(
            *(backend.take([image]) for _ in range(50)), return_exceptions=True
        )
        after = await debts(frozen, image)

        assert {type(one) for one in fifty} <= {BackendError, Reply}
        assert BackendError in {type(one) for one in fifty}
        assert after == [len(sent) * SECOND]
        await backend.close()

    @pytest.mark.fault("F10")
    async def test_decisions_whose_connection_breaks_run_at_most_once_each(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, clock=Clock(), timeout=PATIENT)
        image = charge(shelf(quota("3600/hour")))
        await backend.open()
        sent = decisions_sent(backend, monkeypatch)
        proxy.cut = True
        proxy.treat = lambda reply: reply[:3]

        fifty = await asyncio.gather(
            *(backend.take([image]) for _ in range(50)), return_exceptions=True
        )
        charged = len(sent)
        proxy.heal()
        after = await recovered(backend, [image._replace(cost=0)])

        assert {type(failure) for failure in fifty} == {BackendError}
        # The others waited for another connection, which could not be made.
        assert charged == redis_module.IN_FLIGHT
        assert list(after.debts) == [charged * SECOND]
        await backend.close()

    @pytest.mark.fault("F1")
    @pytest.mark.parametrize("parser", [_AsyncHiredisParser, _AsyncRESP2Parser])
    @pytest.mark.parametrize(
        "garbage",
        [
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            b"+OK\r\n",
            b":1\r\n",
            b"$-1\r\n",
            b"*-1\r\n",
            b"*2\r\n:1\r\n:2\r\n",
            b"*3\r\n:1\r\n$1\r\nx\r\n:5\r\n",
            b"*4\r\n:1\r\n:2\r\n:3\r\n:4\r\n",
            b"*x\r\n",
            b"-ERR\r\n",
            b"-\xff\xfe\r\n",
            b"\x00" * 100 + b"\r\n",
        ],
    )
    async def test_garbage_is_an_error_and_is_got_over(
        self, proxy: Proxy, garbage: bytes, parser: type
    ) -> None:
        backend = RedisBackend.from_url(
            proxy.url, clock=Clock(), timeout=PATIENT, parser_class=parser
        )
        image = charge(shelf(quota("3600/hour")))
        await backend.open()
        proxy.treat = lambda reply: garbage

        with pytest.raises(BackendError):
            await backend.take([image])
        proxy.heal()
        after = await recovered(backend, [image._replace(cost=0)])

        assert list(after.debts) == [SECOND]
        await backend.close()

    async def test_reply_that_nobody_asked_for_costs_the_connection_and_no_decision(
        self, proxy: Proxy
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, clock=Clock(), timeout=PATIENT)
        image = charge(shelf(quota("3600/hour")))
        await backend.open()
        proxy.treat = lambda reply: reply + b"*3\r\n:1\r\n:2\r\n:3\r\n"

        first = await backend.take([image])
        proxy.treat = lambda reply: reply
        after = await recovered(backend, [image._replace(cost=0)])

        assert list(first.debts) == list(after.debts) == [SECOND]
        assert proxy.connections == 2
        await backend.close()

    @pytest.mark.parametrize("seed", range(3))
    async def test_cancelled_callers_leave_every_other_with_its_own_reply(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        rng = random.Random(seed)
        backend = RedisBackend.from_url(proxy.url, clock=Clock(), timeout=PATIENT)
        image = shelf(quota("3600/hour"))
        await backend.open()
        proxy.flow.clear()
        callers = [
            asyncio.ensure_future(backend.take([charge(image, i, f"u{i}")])) for i in range(200)
        ]
        sent = decisions_sent(backend, monkeypatch)
        before_they_start = set(rng.sample(range(200), 50))
        for i in before_they_start:
            callers[i].cancel()
        # All others are in flight or waiting for a call after one turn of the event loop.
        turn = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(turn.set_result, None)
        await turn
        while_waiting = set(rng.sample(range(200), 80)) - before_they_start
        for i in while_waiting:
            callers[i].cancel()
        proxy.flow.set()

        replies = await asyncio.gather(*callers, return_exceptions=True)
        executed = [charges[0].cost for charges in sent]
        again = await asyncio.gather(
            *(backend.take([charge(image, 0, f"u{i}")]) for i in range(200))
        )

        cancelled = before_they_start | while_waiting
        # Whoever was cancelled before the call was made is in none.
        in_flight = [i for i in range(200) if i not in before_they_start][: redis_module.IN_FLIGHT]
        assert executed == sorted({*in_flight, *range(200)} - (cancelled - {*in_flight}))
        for i, (reply, later) in enumerate(zip(replies, again, strict=True)):
            if i in cancelled:
                assert isinstance(reply, asyncio.CancelledError)
            else:
                assert reply == (True, START, [i * SECOND])
            assert list(later.debts) == [i * SECOND if i in executed else 0]
        assert proxy.connections == 1
        await backend.close()

    async def test_closing_while_connecting_is_an_error_for_the_decision_that_waits(
        self, proxy: Proxy
    ) -> None:
        proxy.gate.clear()
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        take = asyncio.ensure_future(backend.take([charge(shelf(quota("5/hour")))]))
        await proxy.accepted.wait()

        await backend.close()

        with pytest.raises(BackendError, match="the connection to Redis was closed"):
            await take

    async def test_closing_fails_the_decisions_that_wait_and_a_later_one_opens_again(
        self, proxy: Proxy
    ) -> None:
        backend = RedisBackend.from_url(proxy.url, timeout=PATIENT)
        image = [charge(shelf(quota("5/hour")))]
        await backend.take(image)
        proxy.flow.clear()
        take = asyncio.ensure_future(backend.take(image))
        turn = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(turn.set_result, None)
        await turn

        await backend.close()
        with pytest.raises(BackendError, match="the connection to Redis broke: closed"):
            await take
        proxy.flow.set()

        assert (await backend.take(image)).allowed
        await backend.close()

    async def test_link_without_a_connection_has_nothing_to_give_up(
        self, frozen: RedisBackend
    ) -> None:
        link, _ = frozen._session()

        link.check_pulse()
        link.drop("nothing to drop")
        await link.close()
        await link.close()

        assert not link.connected

    async def test_connection_is_given_up_only_once(self, frozen: RedisBackend) -> None:
        await frozen.open()
        link, _ = frozen._session()
        first = link._line
        assert first is not None

        link._drop(first, ConnectionResetError("first"))
        await first.closed
        await link.open()
        link._drop(first, ConnectionResetError("once more"))

        assert link.connected
        assert (await frozen.take([charge(shelf(quota("5/hour")))])).allowed


class TestClocks:
    @pytest.mark.fault("B1")
    async def test_callers_whose_clocks_are_a_minute_off_change_nothing(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        script = textwrap.dedent("""
            import sys, time
            url, skew = sys.argv[1], int(sys.argv[2])
            real, real_ns = time.time, time.time_ns
            time.time = lambda: real() + skew
            time.time_ns = lambda: real_ns() + skew * 1_000_000_000

            import asyncio, json
            from tests.contract import charge, quota, shelf
            from tieredlimit.backends import RedisBackend

            async def main():
                backend = RedisBackend.from_url(url, timeout=10.0)
                one = [charge(shelf(quota("20/day", capacity=20)))]
                replies = [await backend.take(one) for _ in range(10)]
                print(json.dumps([[r.allowed, r.now, backend.now()] for r in replies]))
                await backend.close()

            asyncio.run(main())
        """)
        before = server_now(redis_server)

        said = []
        for skew in (-60, 60, 0, 60, -60):
            command = [sys.executable, "-c", script, redis_url, str(skew)]
            done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
            said += json.loads(done.stdout)

        after = server_now(redis_server)
        assert [allowed for allowed, _, _ in said] == [True] * 20 + [False] * 30
        assert all(before <= now <= after for _, now, _ in said)
        assert all(abs(known - now) < 30 * SECOND for _, now, known in said)

    async def test_now_is_the_clock_of_this_host_until_the_server_was_heard(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        host = backend.now()

        await backend.open()

        assert abs(host - server_now(redis_server)) < HOUR
        assert abs(backend.now() - server_now(redis_server)) < MINUTE
        await backend.close()


class TestLoopsAndForks:
    @pytest.mark.fault("E8")
    def test_two_event_loops_in_two_threads_share_one_backend(self, redis_url: str) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        image = shelf(quota("150/day"))
        ready = threading.Barrier(2)
        admitted: list[int] = []

        async def take_many() -> int:
            replies = await take_at_once(backend, [charge(image)], 100)
            await backend.close()
            return sum(reply.allowed for reply in replies)

        def work() -> None:
            ready.wait()
            admitted.append(asyncio.run(take_many()))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(admitted) == 2
        assert sum(admitted) == 150

    def test_two_event_loops_that_take_turns_keep_a_connection_each(self, redis_url: str) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=PATIENT)
        image = [charge(shelf(quota("5/hour")))]

        with asyncio.Runner() as first, asyncio.Runner() as second:
            both = (first, second)
            allowed = [one.run(backend.take(image)).allowed for _ in range(3) for one in both]
            sessions = len(backend._sessions)
            for one in both:
                one.run(backend.close())

        assert allowed == [True] * 5 + [False]
        assert sessions == 2

    def test_event_loops_that_ended_are_forgotten(self, redis_url: str) -> None:
        backend = RedisBackend.from_url("unix:///no/such/socket", timeout=PATIENT)
        loops = [asyncio.new_event_loop() for _ in range(3)]

        for loop in loops:
            with pytest.raises(BackendError):
                loop.run_until_complete(backend.take([charge(shelf(quota("5/hour")))]))
            loop.close()

        assert len(backend._sessions) == 1

    @pytest.mark.fault("E8")
    def test_parent_and_child_of_a_fork_both_decide_right(self, redis_url: str) -> None:
        script = textwrap.dedent("""
            import asyncio, atexit, os, sys
            from tests.contract import charge, quota, shelf
            from tieredlimit.backends import RedisBackend

            backend = RedisBackend.from_url(sys.argv[1], timeout=10.0)
            image = shelf(quota("100000/day", capacity=120))
            own = shelf(quota("1000/day"), tier="own")

            async def take_many(who):
                # Costs of its own for each caller: a reply of the other process would show.
                await asyncio.gather(*(check(who, i) for i in range(100)))
                return sum(await asyncio.gather(*(take_one() for _ in range(100))))

            async def take_one():
                return (await backend.take([charge(image)])).allowed

            async def check(who, i):
                reply = await backend.take([charge(own, i, f"{who}{i}")])
                assert reply.debts == [i * own.quotas[0].interval_us], (who, i, reply)

            async def main():
                await take_many("before")
                arrived, leaving = os.pipe()
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        assert not backend._sessions, "the child kept its parent's connection"
                        taken = asyncio.run(take_many("child"))
                        os.write(leaving, str(taken).encode())
                        atexit._run_exitfuncs()  # what measures coverage
                        code = 0
                    finally:
                        os._exit(code)
                mine = await take_many("parent")
                await backend.close()
                _, status = os.waitpid(child, 0)
                assert status == 0, status
                print(mine + int(os.read(arrived, 100)))

            asyncio.run(main())
        """)

        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, redis_url],
            check=False, capture_output=True, text=True,
        )  # fmt: skip

        assert (done.returncode, done.stderr) == (0, "")
        assert int(done.stdout) == 20


class TestConfiguration:
    def test_client_that_repeats_commands_is_refused_and_told_how(self) -> None:
        client = redis.asyncio.Redis()

        with pytest.raises(UsageError, match=r"repeats a command up to \d+ times.*Retry\(redis"):
            RedisBackend(client)

    def test_url_with_an_option_to_repeat_commands_is_refused(self) -> None:
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        with pytest.raises(UsageError, match="repeats a command up to 3 times"):
            RedisBackend.from_url("redis://localhost", retry=Retry(NoBackoff(), 3))

    def test_synchronous_client_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"must be a redis\.asyncio\.Redis, got Redis"):
            RedisBackend(redis.Redis())  # type: ignore[arg-type]  # the mistake under test

    @pytest.mark.parametrize("timeout", [0, -1, math.nan])
    def test_timeout_that_is_not_above_zero_is_refused(self, timeout: float) -> None:
        with pytest.raises(UsageError, match="timeout must be above 0 seconds"):
            RedisBackend.from_url("redis://localhost", timeout=timeout)

    @pytest.mark.parametrize(
        "url", ["http://localhost", "localhost:6379", "", "redis:/localhost", "REDIS+x://h", "//h"]
    )
    def test_url_of_another_kind_is_refused_and_the_known_are_named(self, url: str) -> None:
        with pytest.raises(UsageError, match=re.escape("redis://, rediss://, unix://")):
            RedisBackend.from_url(url)

    @pytest.mark.parametrize("url", ["redis://[::1", "redis://localhost:port", "redis://h:99999"])
    def test_malformed_url_is_refused(self, url: str) -> None:
        with pytest.raises(UsageError, match="the Redis URL cannot be read; write"):
            RedisBackend.from_url(url)

    def test_password_in_a_malformed_url_is_not_told(self) -> None:
        with pytest.raises(UsageError) as caught:
            RedisBackend.from_url("redis://:s3cr#t@localhost:6379")

        assert "s3cr" not in f"{caught.value!r} {caught.value.__cause__!r}"

    def test_option_that_redis_does_not_know_is_refused(self) -> None:
        with pytest.raises(UsageError, match=r"cannot be used: .*sokcet_timeout"):
            RedisBackend.from_url("redis://localhost", sokcet_timeout=1)
