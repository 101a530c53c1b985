"""What a cell in shadow would decide is measured, and changes nothing."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract import DAY, HOUR, SECOND, Clock, charge, quota, shelf
from tests.policies import SMALLEST, with_cell
from tests.proxy import Proxy
from tests.servers import Monitor, RedisServer
from tieredlimit import Account, BackendError, Decision, Limiter, Policy, PolicyError, UsageError
from tieredlimit._core.difference import diff
from tieredlimit._core.table import Table
from tieredlimit.backends import (
    Backend,
    Charge,
    ClusterBackend,
    MemoryBackend,
    RedisBackend,
    Reply,
)
from tieredlimit.backends.calls import MAX_MEASURING
from tieredlimit.shadow import _MOST_TASKS

PATIENT = 10.0
ANN, BOB = Account("ann", within={"org": "o1"}), Account("bob", within={"org": "o1"})

numbers = itertools.count()


def policy(cell: object, shadow: object = None, **features: object) -> dict[str, Any]:
    """Return a policy of one tier in which `image` has a cell, and one in shadow."""
    row: dict[str, Any] = {"quotas": {"image": cell, **features}}
    if shadow is not None:
        row["shadow"] = {"image": shadow}
    return {"features": {name: {} for name in row["quotas"]}, "tiers": {"free": row}}


def counts(limiter: Limiter) -> dict[str, int]:
    """Return how the decisions of `image` for `free` ended."""
    return limiter.tallies.of("image", "free").counts()


def in_shadow(limiter: Limiter) -> tuple[int, int]:
    """Return how many were measured as allowed and as denied."""
    tally = limiter.tallies.of("image", "free")
    return tally.shadow_allowed, tally.shadow_denied


async def one_turn() -> None:
    """Let everything run that can."""
    turn = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(turn.set_result, None)
    await turn


async def measured(limiter: Limiter, allowed: int, denied: int) -> bool:
    """Wait until so many are measured."""
    async with asyncio.timeout(PATIENT):
        while in_shadow(limiter) != (allowed, denied):
            await one_turn()
    return True


async def quiet(backend: Backend) -> None:
    """Wait until there is nothing to send and no reply to come."""
    if not isinstance(backend, RedisBackend):
        return
    link, calls = backend._session()
    async with asyncio.timeout(PATIENT):
        while calls.waiting or link.busy or link._later or link._opening:
            await one_turn()
    await one_turn()  # whoever was answered is told


class Recorder:
    """Note every decision."""

    def __init__(self) -> None:
        self.seen: list[tuple[Decision, str, bool]] = []

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        self.seen.append((decision, account.id, shadow))

    def on_outage(self, feature: str, error: Exception) -> None: ...

    def on_revision(self, number: int, digest: str) -> None: ...


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def backend(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[Backend]:
    store: Backend = MemoryBackend(clock=clock)
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        store = RedisBackend.from_url(url, clock=clock, timeout=PATIENT)
    await store.open()
    yield store
    await quiet(store)
    await store.close()


@pytest.fixture
async def redis(redis_url: str, clock: Clock) -> AsyncIterator[RedisBackend]:
    store = RedisBackend.from_url(redis_url, clock=clock, timeout=PATIENT)
    await store.open()
    yield store
    await quiet(store)
    await store.close()


class TestPolicy:
    def shadow(self, document: dict[str, Any], tier: str = "everyone") -> str | None:
        cell = Policy.from_dict(document).cell(tier, "image").shadow
        return cell.spell() if cell else None

    @pytest.mark.parametrize(
        ("cell", "spelled"),
        [
            ("5/day", "5/day"),
            (["5/minute", "50/day"], "5/minute + 50/day"),
            ({"rate": "5/day", "capacity": 2, "per": "org"}, "5/day cap 2 per org"),
            (0, "0"),
        ],
    )
    def test_any_cell_that_can_deny_may_be_in_shadow(self, cell: object, spelled: str) -> None:
        assert self.shadow({**SMALLEST, "defaults": {"shadow": {"image": cell}}}) == spelled

    def test_without_the_word_there_is_none(self) -> None:
        assert self.shadow(SMALLEST) is None

    def test_tier_has_its_own_else_that_of_the_tier_it_extends_else_the_default(self) -> None:
        document = {
            "order": ["own", "heir", "plain"],
            "features": {"image": {}},
            "defaults": {"quotas": {"image": 0}, "shadow": {"image": "1/day"}},
            "tiers": {
                "own": {"when": {"plan": "own"}, "shadow": {"image": "2/day"}},
                "heir": {
                    "when": {"plan": "heir"}, "extends": "own", "quotas": {"image": "unlimited"},
                },
                "plain": {},
            },
        }  # fmt: skip

        found = {tier: self.shadow(document, tier) for tier in document["tiers"]}

        assert found == {"own": "2/day", "heir": "2/day", "plain": "1/day"}

    @pytest.mark.parametrize(
        ("cell", "fault"),
        [
            (
                "unlimited",
                'shadow.image: "unlimited" measures nothing; give a quota or 0, or leave it out',
            ),
            (["unlimited"], 'shadow.image[0]: "unlimited" is a whole cell: it cannot stand among'),
            ([], "shadow.image: an empty list limits nothing; write 0"),
            (5, 'shadow.image: got 5; write a rate such as "5/minute", a table, 0'),
            ("5/month", "shadow.image: "),
            ({"rate": "5/day", "burst": 2}, 'shadow.image.burst: unknown key "burst"'),
            (["5/day", "9/day"], 'shadow.image[1].name: "image-day" is taken by defaults.shadow'),
        ],
    )
    def test_fault_is_named_with_its_path(self, cell: object, fault: str) -> None:
        with pytest.raises(PolicyError) as caught:
            Policy.from_dict({**SMALLEST, "defaults": {"shadow": {"image": cell}}})

        assert [str(one) for one in caught.value.faults] == [str(caught.value.faults[0])]
        assert str(caught.value.faults[0]).startswith(f"defaults.{fault}")

    def test_every_fault_is_listed(self) -> None:
        document = with_cell("5/minute")
        document["tiers"]["everyone"]["shadow"] = {"imgae": "5/day", "image": "unlimited"}
        document["defaults"] = {"shadow": "5/day", "shadows": {}}

        with pytest.raises(PolicyError) as caught:
            Policy.from_dict(document)

        assert sorted(fault.path for fault in caught.value.faults) == [
            "defaults.shadow",
            "defaults.shadows",
            "tiers.everyone.shadow.image",
            "tiers.everyone.shadow.imgae",
        ]

    def test_route_that_costs_more_than_it_holds_is_a_warning(self) -> None:
        document = with_cell("5/minute", routes={"POST /hd": 4})
        document["defaults"] = {"shadow": {"image": "3/day"}}

        (warning,) = Policy.from_dict(document).warnings

        assert str(warning) == (
            'defaults.shadow.image: "POST /hd" costs 4, never fits a capacity of 3'
        )

    def test_overlay_replaces_one_cell_and_keeps_the_others(self, tmp_path: Path) -> None:
        below, above = tmp_path / "below.toml", tmp_path / "above.toml"
        below.write_text(
            '[features]\nimage = {}\nvideo = {}\n[tiers.all]\nquotas = { image = 0, video = 0 }\n'
            'shadow.image = ["1/day", "1/hour"]\nshadow.video = "2/day"\n'
        )  # fmt: skip
        above.write_text('[tiers.all]\nshadow.image = "3/day"\n')

        cells = Policy.load(below, above).tiers[0].cells

        spelled = {name: cell.shadow.spell() for name, cell in cells.items() if cell.shadow}
        assert spelled == {"image": "3/day", "video": "2/day"}

    def test_difference_names_what_is_measured_anew(self) -> None:
        policies = [
            Policy.from_dict(policy("5/minute", shadow))
            for shadow in (None, "5/day", {"rate": "5/day", "name": "other"}, 0, None)
        ]

        told = [
            [str(one) for one in diff(before, after)]
            for before, after in itertools.pairwise(policies)
        ]

        assert told == [
            ["tiers.free.shadow.image: added: 5/day"],
            ["tiers.free.shadow.image: 5/day named image-day -> 5/day named other"],
            ["tiers.free.shadow.image: 5/day -> 0"],
            ["tiers.free.shadow.image: removed: 0"],
        ]


class TestKeys:
    def prefixes(self, document: dict[str, Any]) -> list[str]:
        entry = Table(Policy.from_dict(document), "media").entry("free", "image")
        shadow = entry.shadow
        return [one.prefix for one in (*entry.shelves, *(shadow.shelves if shadow else ()))]

    @pytest.mark.fault("G8")
    def test_buckets_are_apart_even_where_the_quotas_are_equal(self) -> None:
        assert self.prefixes(policy("5/day", "5/day")) == [
            "tl1:{media:0}:image:free::",
            "tl1:{media:0}:image:free~shadow::",
        ]

    def test_no_tier_can_spell_them(self) -> None:
        document = policy("5/day")
        document["tiers"]["free~shadow"] = document["tiers"].pop("free")

        with pytest.raises(PolicyError, match="a name is 1 to 32"):
            Policy.from_dict(document)

    @pytest.mark.fault("G8")
    def test_subject_that_only_a_shadow_charges_moves_nobody_to_another_shard(self) -> None:
        without, beside = (
            Table(Policy.from_dict(policy("5/day", shadow)), "media", 64)
            for shadow in (None, {"rate": "9/day", "per": "org"})
        )
        accounts = [Account(f"u{i}", within={"org": f"o{i % 3}"}) for i in range(60)]

        assert [beside.shard_of(one) for one in accounts] == [
            without.shard_of(one) for one in accounts
        ]
        for org in ("o0", "o1", "o2"):
            shards = {beside.measured_shard_of(a) for a in accounts if a.within["org"] == org}
            assert len(shards) == 1


class TestMeasuring:
    async def test_tighter_cell_counts_its_denials_and_the_rule_in_force_allows(
        self, backend: Backend
    ) -> None:
        limiter = Limiter(policy("9/hour", "2/hour"), backend)

        taken = [await limiter.take(ANN, "image") for _ in range(5)]

        assert [one.remaining for one in taken] == [8, 7, 6, 5, 4]
        assert await measured(limiter, 2, 3)
        assert counts(limiter)["allowed"] == 5

    @pytest.mark.fault("G8")
    async def test_denial_of_the_rule_in_force_does_not_keep_the_shadow_from_deciding(
        self, backend: Backend
    ) -> None:
        limiter = Limiter(policy("1/hour", "3/hour"), backend)

        taken = [await limiter.take(ANN, "image") for _ in range(5)]  # all but two from memory

        assert [one.reason for one in taken] == ["allowed", *["quota"] * 4]
        assert await measured(limiter, 3, 2)

    async def test_what_is_zero_or_unlimited_or_never_fits_is_measured_too(
        self, backend: Backend
    ) -> None:
        for cell, cost, reason in (
            (0, 1, "zero"),
            ("unlimited", 1, "allowed"),
            ("1/day", 2, "quota"),
        ):
            limiter = Limiter(policy(cell, "2/hour"), backend, namespace=f"n{next(numbers)}")

            taken = [await limiter.take(ANN, "image", cost) for _ in range(3)]

            assert {one.reason for one in taken} == {reason}
            assert await measured(limiter, 2 // cost, 3 - 2 // cost)

    async def test_closure_denies_and_what_would_be_is_measured_on(self, backend: Backend) -> None:
        async with Limiter(policy("9/hour", "2/hour"), backend) as limiter:
            await limiter.take(ANN, "image")
            await limiter.control.close("image", tier="free")

            closed = [await limiter.take(ANN, "image") for _ in range(3)]

            assert {one.reason for one in closed} == {"closed"}
            assert await measured(limiter, 2, 2)

    async def test_other_quotas_for_some_leave_the_shadow_as_it_is(self) -> None:
        limiter = Limiter(policy("9/hour", "2/hour"))
        await limiter.control.set("image", "1/day", account="bob")

        taken = [await limiter.take(BOB, "image") for _ in range(3)]

        assert [one.reason for one in taken] == ["allowed", "quota", "quota"]
        assert in_shadow(limiter) == (2, 1)

    async def test_shadow_of_zero_denies_and_asks_nobody(
        self, redis: RedisBackend, redis_url: str
    ) -> None:
        limiter = Limiter(policy(0, 0), redis)
        async with Monitor(redis_url) as monitor:
            await limiter.take(ANN, "image")

            assert in_shadow(limiter) == (0, 1)
            assert await monitor.commands() == []

    async def test_denial_in_shadow_is_remembered_and_asks_nobody(
        self, redis: RedisBackend, redis_url: str
    ) -> None:
        limiter = Limiter(policy(0, "1/hour"), redis)
        for _ in range(2):
            await limiter.take(ANN, "image")
        assert await measured(limiter, 1, 1)

        async with Monitor(redis_url) as monitor:
            for _ in range(20):
                await limiter.take(ANN, "image")

            assert await measured(limiter, 1, 21)
            # It lives, and says so, but charges nothing.
            told = await monitor.commands()
            assert not [one for one in told if one.startswith("EVALSHA ") and ":image:" in one]
        await limiter.control.set("image", "9/day", tier="free")
        await limiter.open()
        assert limiter._shadows._denials.held == {}
        await limiter.close()

    async def test_peek_and_usage_measure_nothing(self, backend: Backend) -> None:
        limiter = Limiter(policy("9/hour", "1/hour"), backend)

        await limiter.peek(ANN, "image")
        await limiter.usage(ANN)
        await quiet(backend)

        assert in_shadow(limiter) == (0, 0)

    @pytest.mark.fault("F11")
    async def test_disabled_limiter_measures_nothing(self, backend: Backend) -> None:
        limiter = Limiter(policy("9/hour", "1/hour"), backend, enabled=False)

        await limiter.take(ANN, "image")
        await quiet(backend)

        assert counts(limiter) == {"allowed": 1}

    async def test_observers_see_both_decisions_and_which_is_which(self, backend: Backend) -> None:
        recorder = Recorder()
        limiter = Limiter(policy("1/hour", "2/day"), backend, observers=[recorder])

        for account in (ANN, ANN, ANN, BOB):
            await limiter.take(account, "image")
        assert await measured(limiter, 3, 1)

        enforced = [(one.reason, who) for one, who, shadow in recorder.seen if not shadow]
        others = [(one, who) for one, who, shadow in recorder.seen if shadow]
        denied = others[2][0]
        assert enforced == [
            ("allowed", "ann"),
            ("quota", "ann"),
            ("quota", "ann"),
            ("allowed", "bob"),
        ]
        assert [(one.reason, one.tier, who) for one, who in others] == [
            ("allowed", "free", "ann"), ("allowed", "free", "ann"), ("quota", "free", "ann"),
            ("allowed", "free", "bob"),
        ]  # fmt: skip
        assert (denied.cell.spell(), denied.remaining, denied.retry_after) == ("2/day", 0, 43_200.0)
        assert len(limiter.samples.snapshot()) == 2

    async def test_shared_subject_is_measured_as_one_on_every_shard(
        self, redis_url: str, clock: Clock
    ) -> None:
        backend = RedisBackend.from_url(redis_url, clock=clock, timeout=PATIENT)
        document = policy("9/hour", [{"rate": "4/day", "per": "org"}, "3/day"])
        async with Limiter(document, backend, shards=64) as limiter:
            for i in range(6):
                await limiter.take(Account(f"u{i}", within={"org": "o1"}), "image")

            assert await measured(limiter, 4, 2)

    async def test_take_that_was_prepared_anew_is_measured_once(
        self, redis: RedisBackend, redis_url: str, clock: Clock
    ) -> None:
        late = RedisBackend.from_url(redis_url, clock=clock, timeout=PATIENT)
        limiter = Limiter(policy("9/hour", "9/hour"), redis)
        # Never opened: it hears of nothing, and learns by its call that it is behind.
        async with Limiter(policy("9/hour"), late) as other:
            await limiter.take(ANN, "image")
            await other.control.close("image", tier="free")

            closed = await limiter.take(ANN, "image")
            await quiet(redis)

        assert closed.reason == "closed"
        assert in_shadow(limiter) == (2, 0)

    async def test_middleware_way_without_waiting_measures(self) -> None:
        limiter = Limiter(policy("9/hour", "1/hour"))

        decisions = [limiter.take_now(ANN, "image") for _ in range(2)]

        assert all(decisions)
        assert in_shadow(limiter) == (1, 1)


class TestNeverInTheWay:
    """Whatever becomes of the shadow, the rule in force decides as if it were not there."""

    pytestmark = pytest.mark.fault("G8")

    async def test_both_leave_at_once_and_the_rule_in_force_first(
        self, redis: RedisBackend
    ) -> None:
        limiter = Limiter(policy("9/hour", "9/hour"), redis)
        taking = asyncio.ensure_future(limiter.take(ANN, "image"))
        await one_turn()

        sent = [call.command for call, _ in redis._session()[0]._sent]

        assert [b"image:free::ann" in one for one in sent] == [True, False]
        assert [b"image:free~shadow::ann" in one for one in sent] == [False, True]
        assert (await taking).allowed
        assert await measured(limiter, 1, 0)

    async def test_many_that_measure_share_calls(self, redis: RedisBackend, redis_url: str) -> None:
        limiter = Limiter(policy("9/hour", "9/hour"), redis)
        async with Monitor(redis_url) as monitor:
            await asyncio.gather(*(limiter.take(Account(f"u{i}"), "image") for i in range(100)))
            assert await measured(limiter, 100, 0)

            commands = await monitor.commands()

        assert sum("~shadow" in one for one in commands) == 2  # the first one's, and the rest

    async def test_reply_is_not_waited_for(self, redis_server: RedisServer, clock: Clock) -> None:
        redis_server.command("FLUSHALL")
        async with Proxy(redis_server.port) as proxy:
            backend = RedisBackend.from_url(proxy.url, clock=clock, timeout=PATIENT)
            limiter = Limiter(policy(0, "9/hour"), backend)
            await backend.open()
            proxy.flow.clear()

            denied = await limiter.take(ANN, "image")

            assert (denied.reason, in_shadow(limiter)) == ("zero", (0, 0))
            proxy.flow.set()
            assert await measured(limiter, 1, 0)
            await backend.close()

    async def test_call_that_only_measures_takes_no_turn_of_the_others(
        self, redis_server: RedisServer, clock: Clock
    ) -> None:
        redis_server.command("FLUSHALL")
        async with Proxy(redis_server.port) as proxy:
            backend = RedisBackend.from_url(proxy.url, clock=clock, timeout=PATIENT)
            limiter = Limiter(policy(0, "9/hour"), backend)
            await backend.open()
            proxy.flow.clear()
            link, calls = backend._session()

            for i in range(3):
                await limiter.take(Account(f"u{i}"), "image")
                await one_turn()

            assert sum(call.measured for call, _ in link._sent) == 1
            assert len(calls.measuring) == 2
            assert link._flights == len(link._sent) - 1
            proxy.flow.set()
            assert await measured(limiter, 3, 0)
            await backend.close()

    async def test_more_than_may_wait_are_given_up_and_the_rule_in_force_is_asked(
        self, redis: RedisBackend
    ) -> None:
        limiter = Limiter(policy("9/hour", "9/hour"), redis)
        many = MAX_MEASURING + 500

        taken = await asyncio.gather(
            *(limiter.take(Account(f"u{i}"), "image") for i in range(many))
        )
        await quiet(redis)

        allowed, denied = in_shadow(limiter)
        assert {one.reason for one in taken} == {"allowed"}
        assert (MAX_MEASURING <= allowed <= many, denied) == (True, 0)

    async def test_bucket_that_is_none_is_its_own_trouble(
        self, redis: RedisBackend, redis_server: RedisServer
    ) -> None:
        limiter = Limiter(policy("2/hour", "9/hour"), redis)
        redis_server.command("LPUSH", "tl1:{default:0}:image:free~shadow::ann", "x")

        taken = [await limiter.take(ANN, "image") for _ in range(3)]
        await quiet(redis)

        assert [one.reason for one in taken] == ["allowed", "allowed", "quota"]
        assert in_shadow(limiter) == (0, 0)

    async def test_server_that_may_not_write_any_more_still_denies(self, clock: Clock) -> None:
        with RedisServer("--maxmemory-policy", "noeviction") as server:
            backend = RedisBackend.from_url(server.url, clock=clock, timeout=PATIENT)
            limiter = Limiter(policy({"rate": "9/hour", "capacity": 1}, "9/hour"), backend)
            await limiter.take(ANN, "image")
            await quiet(backend)
            server.command("CONFIG", "SET", "maxmemory", "1")

            denied = await limiter.take(ANN, "image")
            await quiet(backend)
            await backend.close()

        assert denied.reason == "quota"
        assert in_shadow(limiter) == (1, 0)

    async def test_outage_is_answered_as_ever_and_nothing_is_measured(
        self, own_server: RedisServer, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, clock=clock, timeout=PATIENT)
        document = policy("9/hour", "9/hour", video=0)
        document["tiers"]["free"]["shadow"]["video"] = "9/hour"
        unheard: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
        own_server.kill()

        async with Limiter(document, backend) as limiter:
            caplog.clear()
            taken = [await limiter.take(ANN, "image"), await limiter.take(ANN, "video")]
            await quiet(backend)
        gc.collect()

        assert [one.reason for one in taken] == ["outage", "zero"]
        assert counts(limiter) == {"outage_allowed": 1}
        assert limiter.tallies.of("video", "free").counts() == {"zero": 1}
        assert unheard == []
        assert [one for one in caplog.records if one.levelno > logging.WARNING] == []

    async def test_server_that_hangs_costs_a_closed_feature_no_time(
        self, own_server: RedisServer
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, timeout=0.02)
        limiter = Limiter(policy(0, "9/hour"), backend)
        await backend.open()
        own_server.pause()

        denied = await limiter.take(ANN, "image")

        future = backend._session()[1].measuring[0].future
        assert denied.reason == "zero"
        with pytest.raises(BackendError, match="did not answer within"):
            await asyncio.wait_for(asyncio.shield(future), PATIENT)
        own_server.resume()
        await quiet(backend)
        assert in_shadow(limiter) == (0, 0)
        await backend.close()

    @pytest.mark.parametrize("kind", [BackendError("busy"), RuntimeError("a fault of ours")])
    async def test_measuring_that_raises_is_dropped(
        self, kind: Exception, redis: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limiter = Limiter(policy("1/hour", "9/hour"), redis)

        def fail(*_: object) -> None:
            raise kind

        monkeypatch.setattr(redis, "measure", fail)

        taken = [await limiter.take(ANN, "image") for _ in range(2)]

        assert [one.reason for one in taken] == ["allowed", "quota"]
        assert in_shadow(limiter) == (0, 0)

    @pytest.mark.fault("C7")
    async def test_memory_full_of_what_is_measured_has_room_for_what_is_in_force(
        self, clock: Clock
    ) -> None:
        backend = MemoryBackend(clock=clock, max_keys=2)
        limiter = Limiter(policy("unlimited", "9/hour", video="1/hour"), backend)
        for i in range(5):
            await limiter.take(Account(f"u{i}"), "image")

        taken = [await limiter.take(Account(f"u{i}"), "video") for i in range(2)]

        assert in_shadow(limiter) == (2, 0)  # bounded as well
        assert [one.reason for one in taken] == ["allowed", "allowed"]
        assert len(backend) == 2

    async def test_memory_that_is_full_for_the_rule_in_force_is_not_for_the_shadow(
        self, clock: Clock
    ) -> None:
        backend = MemoryBackend(clock=clock, max_keys=1)
        limiter = Limiter(policy("1/hour", "9/hour"), backend)

        await limiter.take(ANN, "image")

        assert (len(backend), in_shadow(limiter)) == (1, (1, 0))

    async def test_connection_that_breaks_loses_what_was_being_measured(
        self, redis: RedisBackend
    ) -> None:
        limiter = Limiter(policy(0, "9/hour"), redis)
        link = redis._session()[0]
        await limiter.take(ANN, "image")
        await one_turn()
        assert link.busy

        link.drop("broke")
        await quiet(redis)
        await limiter.take(BOB, "image")

        assert await measured(limiter, 1, 0)

    async def test_script_that_redis_forgot_is_loaded_again_for_it(
        self, redis: RedisBackend, redis_server: RedisServer
    ) -> None:
        limiter = Limiter(policy(0, "9/hour"), redis)
        redis_server.command("SCRIPT", "FLUSH")

        await limiter.take(ANN, "image")

        assert await measured(limiter, 1, 0)


class Slow:
    """A store of somebody else's, which answers when it is told to."""

    def __init__(self, *, hangs_for: str = "~shadow") -> None:
        self._memory = MemoryBackend(clock=Clock())
        self._hangs_for = hangs_for
        self.go_on = asyncio.Event()
        self.asked: list[str] = []

    def now(self) -> int:
        return self._memory.now()

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def take(self, charges: Sequence[Charge]) -> Reply:
        self.asked += [one.key for one in charges]
        if self._hangs_for in charges[0].key:
            await self.go_on.wait()
        return await self._memory.take(charges)


class TestStoreOfSomebodyElse:
    @pytest.mark.fault("G8")
    async def test_is_asked_on_the_side(self) -> None:
        store = Slow()
        limiter = Limiter(policy("1/hour", "9/hour"), store)

        taken = [await limiter.take(ANN, "image") for _ in range(2)]

        assert [one.reason for one in taken] == ["allowed", "quota"]
        assert in_shadow(limiter) == (0, 0)
        store.go_on.set()
        assert await measured(limiter, 2, 0)
        assert limiter._shadows._tasks == set()

    async def test_what_it_still_does_is_bounded_and_ends_with_the_limiter(self) -> None:
        store = Slow()
        async with Limiter(policy(0, "9/hour"), store) as limiter:
            for i in range(_MOST_TASKS + 10):
                await limiter.take(Account(f"u{i}"), "image")
            assert len(limiter._shadows._tasks) == _MOST_TASKS
        await one_turn()
        await one_turn()

        assert limiter._shadows._tasks == set()
        assert in_shadow(limiter) == (0, 0)

    async def test_failing_store_is_asked_again_and_counts_nothing(self) -> None:
        class Failing(Slow):
            async def take(self, charges: Sequence[Charge]) -> Reply:
                await super().take(charges)
                raise BackendError("no")

        limiter = Limiter(policy(0, "9/hour"), Failing(hangs_for="nothing"))
        for _ in range(3):
            await limiter.take(ANN, "image")
        while limiter._shadows._tasks:
            await one_turn()

        assert counts(limiter) == {"zero": 3}


@pytest.mark.redis
class TestCluster:
    async def test_shadow_of_an_organisation_is_measured_on_its_own_node(
        self, cluster_url: str
    ) -> None:
        backend = ClusterBackend(cluster_url, timeout=PATIENT)
        document = policy("2/hour", {"rate": "30/day", "per": "org"})
        async with Limiter(document, backend) as limiter:
            accounts = [Account(f"u{i}", within={"org": f"o{i % 2}"}) for i in range(40)]

            taken = await asyncio.gather(*(limiter.take(one, "image") for one in accounts * 2))

            assert {one.reason for one in taken} == {"allowed"}
            assert await measured(limiter, 60, 20)

    async def test_nodes_are_looked_for_by_what_only_measures(self, cluster_url: str) -> None:
        backend = ClusterBackend(cluster_url, timeout=PATIENT)
        limiter = Limiter(policy(0, "9/hour"), backend)

        await limiter.take(ANN, "image")  # lost: nobody is known yet
        async with asyncio.timeout(PATIENT):
            while not backend._fleet().ready:
                await one_turn()
        await limiter.take(ANN, "image")

        assert await measured(limiter, 1, 0)
        await limiter.close()


cells = st.one_of(
    st.just(0),
    st.lists(
        st.builds(
            lambda rate, capacity, name, per: {
                "rate": rate, "name": name, **({"capacity": capacity} if capacity else {}),
                **({"per": "org"} if per else {}),
            },
            st.sampled_from(["1/second", "3/second", "7/minute", "5/hour", "11/2 days"]),
            st.none() | st.integers(1, 6),
            st.sampled_from("abc"),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda one: one["name"],
    ),
)  # fmt: skip
takes = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 1, 100, SECOND, 20 * SECOND, HOUR, DAY]),
        st.sampled_from([ANN, BOB, Account("cat"), Account("ann", anonymous=True)]),
        st.sampled_from([0, 1, 1, 1, 2, 3, 7]),
        st.sampled_from([None, None, None, "close", "open"]),
    ),
    min_size=1,
    max_size=25,
)


async def decide_three_ways(
    backends: Sequence[Backend], clock: Clock, cell: Any, shadow: Any, steps: Any, *, close: str
) -> None:
    """Compare limiters with the shadow, without it, and with it as the rule in force."""
    name = f"e{next(numbers)}"
    both, alone = (
        Limiter(document, backend, namespace=f"{name}{kind}", close=close)
        for kind, document, backend in zip(
            "ab", (policy(cell, shadow), policy(cell)), backends[:2], strict=True
        )
    )
    enforced = Limiter(policy(shadow), backends[2], namespace=f"{name}c")
    async with AsyncExitStack() as stack:
        for limiter in (both, alone, enforced):
            stack.push_async_callback(limiter.close)
        for i, (move_us, account, cost, change) in enumerate(steps):
            clock.now += move_us
            for limiter in (both, alone) if change else ():
                with suppress(UsageError):  # there is nothing to close, or to open
                    await getattr(limiter.control, change)("image", account="ann")

            with_it = await both.take(account, "image", cost)
            without_it = await alone.take(account, "image", cost)
            await enforced.take(account, "image", cost)

            assert _told(with_it) == _told(without_it)
            tally = enforced.tallies.of("image", "free")
            assert await measured(both, tally.allowed, tally.quota + tally.zero)
            assert sum(in_shadow(both)) == i + 1
        in_force = {word: count for word, count in counts(both).items() if "shadow" not in word}
        assert in_force == counts(alone)


def _told(decision: Decision) -> tuple[object, ...]:
    return (*decision[:2], *decision[3:6], tuple(decision.debts), decision.fields())


@pytest.mark.fault("G8")
@given(cell=cells | st.just("unlimited"), shadow=cells, steps=takes)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_memory_decides_as_without_and_measures_as_if_enforced(
    cell: Any, shadow: Any, steps: Any
) -> None:
    clock = Clock()
    backends = [MemoryBackend(clock=clock) for _ in range(3)]

    asyncio.run(decide_three_ways(backends, clock, cell, shadow, steps, close=""))


@pytest.mark.fault("G8")
@given(cell=cells | st.just("unlimited"), shadow=cells, steps=takes, closed=st.booleans())
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_redis_decides_as_without_and_measures_as_if_enforced(
    redis_server: RedisServer, cell: Any, shadow: Any, steps: Any, closed: bool
) -> None:
    async def run() -> None:
        clock = Clock()
        backend = RedisBackend.from_url(redis_server.url, clock=clock, timeout=PATIENT)
        unchanged = [(*step[:3], None) for step in steps]
        close = "image" if closed else ""
        await decide_three_ways([backend] * 3, clock, cell, shadow, unchanged, close=close)
        await backend.close()

    asyncio.run(run())


async def test_memory_measures_on_buckets_that_takes_never_see(clock: Clock) -> None:
    backend = MemoryBackend(clock=clock)
    one = charge(shelf(quota("1/hour")))

    measured_first = [backend.measure_now([one]).allowed for _ in range(2)]

    assert measured_first == [True, False]
    assert (await backend.take([one])).allowed
    assert len(backend) == 1
