"""Live control: what is changed while requests come, as the workers and their clients meet it."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import HTTPConnection
from starlette.types import Message, Receive, Scope, Send

from tests.contract import Clock
from tests.servers import Monitor, RedisServer
from tests.test_backends import Untouched
from tieredlimit import (
    Account,
    BackendError,
    Decision,
    Limiter,
    Policy,
    TieredLimitMiddleware,
    UsageError,
    overrides,
)
from tieredlimit import follow as follow_module
from tieredlimit._core.keys import revision_key
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit._core.stamp import Stamp
from tieredlimit._core.who import Who
from tieredlimit.backends import Backend, Charge, ClusterBackend, MemoryBackend, RedisBackend, Reply
from tieredlimit.backends.backend import StaleError
from tieredlimit.backends.call import Waiting, gather
from tieredlimit.backends.control import ControlStore, MemoryControl
from tieredlimit.backends.server import ServerClock
from tieredlimit.control import Control
from tieredlimit.follow import Follower
from tieredlimit.inforce import stored

PATIENCE = 20.0
SECOND = 1_000_000
MINUTE = 60 * SECOND
DAY = 24 * 60 * MINUTE

POLICY: dict[str, Any] = {
    "order": ["new", "pro", "everyone"],
    "features": {
        "image": {"routes": ["POST /images"], "outage": "allow"},
        "video": {"routes": ["POST /videos"], "outage": "deny"},
    },
    "defaults": {"quotas": {"image": "5000/minute", "video": "2000/hour"}},
    "tiers": {
        "new": {"when": {"plan": "free", "account_age_below": "7 days"}},
        "pro": {"when": {"plan": "pro"}, "quotas": {"image": "unlimited", "video": "4000/hour"}},
        "everyone": {},
    },
}
STORES = [
    "memory",
    pytest.param("redis", marks=pytest.mark.redis),
    pytest.param("cluster", marks=pytest.mark.redis),
]

# Without a known age it counts as new, for as long as a test may last.
NEW = Account("ann", plan="free")
OLD = Account("old", plan="free", created_at=datetime(2020, 1, 1, tzinfo=UTC))
PRO = Account("pro", plan="pro", created_at=datetime(2020, 1, 1, tzinfo=UTC))


def new(name: str) -> Account:
    return Account(name, plan="free")


def patient(url: str, clock: Clock | None = None) -> Backend:
    """Return a backend for which a late answer is no outage."""
    kind = ClusterBackend if "+cluster" in url else RedisBackend.from_url
    return kind(url, clock=clock, timeout=PATIENCE)


class House:
    """Workers of one application: they share a store, and decide by one clock that stands still."""

    def __init__(self, url: str | None) -> None:
        self.clock = Clock(time.time_ns() // 1000)
        self._url = url
        self._memory = MemoryBackend(clock=self.clock)
        self._workers: list[Limiter] = []

    @property
    def now(self) -> datetime:
        return datetime.fromtimestamp(self.clock.now / SECOND, UTC)

    def backend(self) -> Backend:
        if self._url is None:
            return self._memory
        return patient(self._url, self.clock)

    def limiter(self, policy: Any = POLICY, backend: Backend | None = None, **more: Any) -> Limiter:
        limiter = Limiter(policy, backend or self.backend(), **more)
        self._workers.append(limiter)
        return limiter

    async def worker(self, policy: Any = POLICY, **more: Any) -> Limiter:
        limiter = self.limiter(policy, **more)
        await limiter.open()
        return limiter

    async def close(self) -> None:
        for worker in self._workers:
            await worker.close()


@pytest.fixture(params=STORES)
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    fixture = {"redis": "redis_url", "cluster": "cluster_url"}.get(request.param)
    house = House(None if fixture is None else request.getfixturevalue(fixture))
    yield house
    await house.close()


@pytest.fixture
async def redis_house(redis_url: str) -> AsyncIterator[House]:
    house = House(redis_url)
    yield house
    await house.close()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for revisions as long as for decisions: the machine may be busy."""
    monkeypatch.setattr(follow_module, "LOAD_TIMEOUT", PATIENCE)


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that hear of no revision, unless a decision tells them."""
    monkeypatch.setattr(Follower, "_hear", lambda *_: None)


@pytest.fixture
def beatless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that beat once, when they start."""
    monkeypatch.setattr(follow_module, "BEAT_INTERVAL", 3600.0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def follows(worker: Limiter, number: int) -> None:
    """Return once it follows this revision, or a newer one."""
    await until(lambda: worker.revision[0] >= number)


async def becomes(ask: Callable[[], Awaitable[Decision]], reason: str) -> Decision:
    """Ask until the decision has this reason."""
    async with asyncio.timeout(PATIENCE):
        while True:
            decision = await ask()
            if decision.reason == reason:
                return decision
            await asyncio.sleep(0.005)


async def reason(worker: Limiter, account: Account, feature: str = "video") -> str:
    return (await worker.take(account, feature)).reason


def store_of(worker: Limiter) -> ControlStore:
    store = worker._force.store
    assert store is not None
    return store


async def do(
    worker: Limiter, operation: Callable[..., overrides.Change], *given: Any, **more: Any
) -> Revision:
    """Publish what the operation makes of the head."""
    store = store_of(worker)
    head = await store.head()
    change = operation(head, *given, now=await store.now(), **more)
    await store.publish(change.revision, seen=head)
    return change.revision


def base(**features: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document of one tier: feature = {routes, quotas}."""
    return {
        "features": {
            name: {key: value for key, value in given.items() if key != "quotas"}
            for name, given in features.items()
        },
        "tiers": {
            "everyone": {"quotas": {name: given["quotas"] for name, given in features.items()}}
        },
    }


async def done(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def by_header(connection: HTTPConnection) -> Account:
    return {"new": NEW, "old": OLD, "pro": PRO}[connection.headers.get("x-account", "new")]


def client_of(worker: Limiter, identify: Any = by_header) -> httpx.AsyncClient:
    app = TieredLimitMiddleware(done, limiter=worker, identify=identify)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


class TestChanging:
    async def test_closure_is_obeyed_by_the_next_decision_of_every_worker(
        self, house: House
    ) -> None:
        first, second = await house.worker(), await house.worker()
        assert await reason(second, NEW) == "allowed"

        for _ in range(5):
            await first.control.close("video", tier="new")
            assert [await reason(one, NEW) for one in (second, first)] == ["closed"] * 2
            assert await reason(second, NEW, "image") == "allowed"
            assert await reason(second, OLD) == "allowed"

            await first.control.open("video", tier="new")
            await becomes(lambda: second.take(NEW, "video"), "allowed")
            await becomes(lambda: first.take(NEW, "video"), "allowed")

    @pytest.mark.fault("G1")
    async def test_nor_does_a_worker_that_hears_nothing_let_anybody_in(
        self, redis_house: House, deaf: None
    ) -> None:
        workers = [await redis_house.worker() for _ in range(3)]

        await workers[0].control.close("video", tier="new")
        said = await asyncio.gather(
            *(reason(worker, NEW) for worker in workers for _ in range(100))
        )

        assert set(said) == {"closed"}

    @pytest.mark.fault("G1")
    async def test_worker_that_starts_during_a_closure_obeys_it(self, house: House) -> None:
        await (await house.worker()).control.close("video", tier="new")

        late, unopened = await house.worker(), house.limiter()

        assert await reason(late, NEW) == "closed"
        assert await reason(unopened, NEW) == "closed"

    async def test_quotas_are_put_in_the_place_of_the_cell(self, house: House) -> None:
        first, second = await house.worker(), await house.worker()

        await first.control.set("video", [{"rate": "3/hour", "name": "few"}], tier="new")
        decisions = [await second.take(NEW, "video") for _ in range(4)]

        assert [one.reason for one in decisions] == ["allowed"] * 3 + ["quota"]
        assert [quota.name for quota in decisions[3].quotas] == ["few"]
        assert decisions[0].remaining == 2
        assert (await second.take(OLD, "video")).remaining == 1999

    async def test_unlimited_and_zero_are_put_there_as_well(self, house: House) -> None:
        worker = await house.worker()

        await worker.control.set("video", "unlimited", tier="new")
        free = await becomes(lambda: worker.take(NEW, "video", cost=10**6), "allowed")
        await worker.control.set("video", 0, tier="new")
        zero = await becomes(lambda: worker.take(NEW, "video"), "zero")

        assert free.remaining is None
        assert zero.retry_after is None

    @pytest.mark.fault("G3")
    async def test_most_specific_wins_and_then_the_newest(self, house: House) -> None:
        worker = await house.worker()
        control = worker.control

        await control.close("video", everyone=True)
        await control.set("video", "7/hour", tier="pro")
        await control.close("video", when={"plan": "free"})
        await control.set("video", "9/hour", account="ann")
        ann = await becomes(lambda: worker.take(NEW, "video"), "allowed")

        assert ann.remaining == 8
        assert await reason(worker, Account("ben", plan="free")) == "closed"
        assert (await worker.take(PRO, "video")).remaining == 6
        assert await reason(worker, Account("cat")) == "closed"
        assert await reason(worker, Account("ann", anonymous=True)) == "closed"

    @pytest.mark.fault("G3")
    async def test_closing_without_exceptions_closes_the_more_specific_ones_too(
        self, house: House
    ) -> None:
        worker = await house.worker()
        await worker.control.set("video", "9/hour", account="ann")

        spared = await worker.control.close("video", everyone=True)
        await becomes(lambda: worker.take(OLD, "video"), "closed")
        before = await reason(worker, NEW)
        await worker.control.close("video", everyone=True, no_exceptions=True)
        await becomes(lambda: worker.take(NEW, "video"), "closed")

        assert before == "allowed"
        assert [one.who.account for one in spared.exceptions] == ["ann"]

    @pytest.mark.fault("G3")
    async def test_what_is_undone_is_as_it_was(self, house: House) -> None:
        worker = await house.worker()
        await worker.control.close("video", tier="new")
        await worker.control.close("video", everyone=True)
        await becomes(lambda: worker.take(OLD, "video"), "closed")

        await worker.control.undo()
        await becomes(lambda: worker.take(OLD, "video"), "allowed")

        assert await reason(worker, NEW) == "closed"
        assert [one.number for one in await worker.control.history()] == [3, 2, 1]

    async def test_changes_at_the_same_time_all_count(self, house: House) -> None:
        controls = [(await house.worker()).control for _ in range(4)]

        changes = await asyncio.gather(
            *(one.close("video", account=f"u{i}") for i, one in enumerate(controls))
        )

        assert sorted(change.revision.number for change in changes) == [1, 2, 3, 4]
        found = {one.who.account for one in await controls[0].overrides()}
        assert found == {"u0", "u1", "u2", "u3"}
        assert (await controls[0].in_force()).number == 4

    async def test_what_is_so_already_is_not_published_again(self, house: House) -> None:
        control = (await house.worker()).control
        first = await control.close("video", tier="new")

        with pytest.raises(UsageError, match="image is not closed for tier new"):
            await control.open("image", tier="new")

        assert (await control.in_force()).number == first.revision.number

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({}, "say who is meant"),
            ({"tier": "new", "everyone": True}, "say who is meant"),
            ({"tier": "now"}, 'unknown tier "now"; did you mean "new"'),
            ({"when": {"plam": "free"}}, "plam"),
            ({"tier": "new", "until": datetime(2030, 1, 1)}, "until must be a datetime with a"),  # noqa: DTZ001 -- meant
            ({"tier": "new", "till": 1}, "unknown argument 'till'"),
            ({"tier": "new", "until": datetime(2020, 1, 1, tzinfo=UTC)}, "is past"),
        ],
    )
    async def test_what_makes_no_sense_changes_nothing(
        self, given: dict[str, Any], said: str
    ) -> None:
        limiter = Limiter(POLICY)

        with pytest.raises(UsageError, match=said):
            await limiter.control.close("video", **given)

        assert limiter.revision[0] == 0

    async def test_where_nothing_was_changed_there_is_nothing_to_undo(self, house: House) -> None:
        worker = await house.worker()

        with pytest.raises(UsageError, match="nothing was ever changed"):
            await worker.control.undo()
        await worker.control.close("video", tier="new", reason="melting", actor="ann")
        await worker.control.undo(actor="ben")
        await becomes(lambda: worker.take(NEW, "video"), "allowed")

        undone, closed = await worker.control.history()
        assert (closed.reason, closed.actor, undone.actor) == ("melting", "ann", "ben")

    async def test_own_backend_has_no_control(self) -> None:
        with pytest.raises(UsageError, match="live control needs one of our backends"):
            _ = Limiter(POLICY, Untouched()).control

    async def test_peek_and_usage_say_what_a_take_would(self, house: House) -> None:
        worker = await house.worker()
        await worker.control.close("video", tier="new")
        await becomes(lambda: worker.take(NEW, "video"), "closed")

        peeked, usage = await worker.peek(NEW, "video"), await worker.usage(NEW)

        assert peeked.reason == usage["video"].reason == "closed"
        assert usage["image"].remaining == 5000


class TestAnswering:
    async def test_closed_is_a_403_that_says_why(self, house: House) -> None:
        worker = await house.worker()
        message = {"en": "Video is paused.", "fr": "La vidéo est en pause."}
        await worker.control.close("video", tier="new", message=message)

        async with client_of(worker) as client:
            english = await client.post("/videos")
            french = await client.post("/videos", headers={"accept-language": "fr-CH, en;q=0.5"})
            image = await client.post("/images")
            old = await client.post("/videos", headers={"x-account": "old"})

        assert (english.status_code, image.status_code, old.status_code) == (403, 200, 200)
        assert english.headers["content-type"] == "application/problem+json"
        assert english.headers["cache-control"] == "no-store"
        assert "retry-after" not in english.headers
        assert "ratelimit" not in english.headers
        assert english.json() == {
            "type": "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
            "title": "Request cannot be satisfied due to temporary server capacity constraints",
            "status": 403,
            "detail": "Video is paused.",
            "violated-policies": [],
            "reason": "closed",
            "feature": "video",
            "tier": "new",
            "retry_after": None,
        }
        assert french.json()["detail"] == "La vidéo est en pause."
        assert french.headers["content-language"] == "fr"

    async def test_without_a_message_there_is_one_of_ours(self, house: House) -> None:
        worker = await house.worker()
        await worker.control.close("video", everyone=True, until=house.now + timedelta(minutes=5))

        async with client_of(worker) as client:
            denied = await client.post("/videos")

        detail = denied.json()["detail"]
        assert detail.startswith("video is closed for now. Try again in ")

    @pytest.mark.fault("G7")
    async def test_retry_after_is_spread_and_whoever_obeys_it_gets_in(self, house: House) -> None:
        worker = await house.worker()
        end = house.now + timedelta(minutes=10)
        await worker.control.close("video", tier="new", until=end)
        accounts = [new(f"u{i}") for i in range(60)]
        await becomes(lambda: worker.take(accounts[0], "video"), "closed")

        told = [(await worker.take(account, "video")).retry_after for account in accounts]

        waits = [wait for wait in told if wait is not None]
        assert len(waits) == 60
        # Only ever later than the end, and by a tenth of the closure's length at most.
        assert min(waits) >= 600
        assert max(waits) <= 661
        assert len({round(wait) for wait in waits}) > 30
        start = house.clock.now
        for account, wait in zip(accounts, waits, strict=True):
            house.clock.now = start + round(wait * SECOND)
            assert await reason(worker, account) == "allowed"

    @pytest.mark.fault("G7")
    async def test_ramp_tells_everybody_the_time_of_their_own(self, house: House) -> None:
        worker = await house.worker()
        await worker.control.close("video", tier="new")
        await worker.control.open("video", tier="new", ramp=timedelta(minutes=10))
        accounts = [new(f"u{i}") for i in range(40)]
        # Let it begin, by the store's clock.
        house.clock.now = worker_ramp(await worker.control.overrides()) + SECOND
        await follows(worker, 2)

        told = [await worker.take(account, "video") for account in accounts]

        waits = [one.retry_after for one in told if one.reason == "closed"]
        assert len(waits) > 30
        start = house.clock.now
        for account, decision in zip(accounts, told, strict=True):
            if decision.retry_after is None:
                continue
            enters = start + round(decision.retry_after * SECOND)
            house.clock.now = enters - 1
            assert await reason(worker, account) == "closed"
            house.clock.now = enters
            assert await reason(worker, account) == "allowed"


def worker_ramp(overrides: Sequence[Any]) -> int:
    """Return when the ramp among these begins."""
    (begin,) = (one.share.begin_us for one in overrides if one.share is not None)
    assert isinstance(begin, int)
    return begin


class TestRamp:
    @pytest.mark.fault("G7")
    async def test_whoever_was_let_in_stays_in_up_to_a_hundred_percent(self, house: House) -> None:
        worker, other = await house.worker(), await house.worker()
        accounts = [new(f"u{i}") for i in range(120)]
        await worker.control.close("video", tier="new")
        await worker.control.open("video", tier="new", ramp=timedelta(seconds=60))
        begin = worker_ramp(await worker.control.overrides())
        await follows(worker, 2)
        await follows(other, 2)

        admitted: set[str] = set()
        counts = []
        for step in range(122):
            house.clock.now = begin + step * SECOND // 2
            asked = (worker, other)[step % 2]
            said = await asyncio.gather(*(asked.take(account, "video") for account in accounts))
            reasons = {one.reason for one in said}
            inside = {
                account.id for account, one in zip(accounts, said, strict=True) if one.allowed
            }
            assert reasons <= {"allowed", "closed"}
            assert admitted <= inside
            admitted = inside
            counts.append(len(inside))

        assert counts[0] == 0
        assert 40 < counts[60] < 80
        assert counts[120] == 120

    @pytest.mark.fault("G7")
    async def test_larger_percentage_keeps_whom_a_smaller_one_let_in(self, house: House) -> None:
        worker = await house.worker()
        accounts = [new(f"u{i}") for i in range(200)]
        await worker.control.close("video", tier="new")

        inside: list[set[str]] = []
        for number, percent in enumerate((10, 35.5, 80), 2):
            await worker.control.open("video", tier="new", percent=percent)
            await follows(worker, number)
            said = await asyncio.gather(*(worker.take(account, "video") for account in accounts))
            inside.append({a.id for a, one in zip(accounts, said, strict=True) if one.allowed})

        assert inside[0] < inside[1] < inside[2]
        assert 5 < len(inside[0]) < 40 < len(inside[1]) < 100 < len(inside[2]) < 190


class Wrong(ServerClock):
    """An estimate of the server's clock that is off by `skew_us`, until a reply tells better."""

    def __init__(self, clock: Clock, *, learns: bool = True) -> None:
        super().__init__(clock)
        self.skew_us = 0
        self._clock = clock
        self._learns = learns

    def learn(self, now: int) -> None:
        if self._learns:
            self.skew_us = 0

    def now(self) -> int:
        return self._clock() + self.skew_us


async def worker_with(house: House, clock: Wrong) -> Limiter:
    backend = house.backend()
    if isinstance(backend, ClusterBackend):
        backend.server_clock = clock
    elif isinstance(backend, RedisBackend):
        backend._clock = clock
    worker = house.limiter(backend=backend)
    await worker.open()
    return worker


class TestInstants:
    @pytest.mark.fault("B4")
    @pytest.mark.parametrize("skew_s", [-60, 60])
    async def test_closure_begins_and_ends_by_the_servers_clock(
        self, redis_house: House, skew_s: int
    ) -> None:
        house, wrong = redis_house, Wrong(redis_house.clock)
        worker = await worker_with(house, wrong)
        begin, end = house.clock.now + 100 * SECOND, house.clock.now + 200 * SECOND
        await worker.control.close(
            "video",
            tier="new",
            begin=house.now + timedelta(seconds=100),
            until=house.now + timedelta(seconds=200),
        )
        await follows(worker, 1)

        for at, expected in (
            (begin - 1, "allowed"), (begin, "closed"), (end - 1, "closed"), (end, "allowed"),
        ):  # fmt: skip
            house.clock.now = at
            wrong.skew_us = skew_s * SECOND
            if expected == "closed":
                assert await reason(worker, NEW) == "closed"
            else:
                # Who takes it for closed by a wrong clock asks nobody; a heartbeat sets it right.
                await becomes(lambda: worker.take(NEW, "video"), "allowed")

    @pytest.mark.fault("B4", "G3")
    async def test_end_that_passes_in_mid_request_counts_for_it(
        self, redis_house: House, beatless: None
    ) -> None:
        house, wrong = redis_house, Wrong(redis_house.clock)
        worker = await worker_with(house, wrong)
        await worker.control.set(
            "video", "3/hour", tier="new", until=house.now + timedelta(seconds=100)
        )
        await follows(worker, 1)
        house.clock.advance(100 * SECOND)
        wrong.skew_us = -1

        decision = await worker.take(NEW, "video")

        assert decision.remaining == 1999

    @pytest.mark.fault("B4", "D5")
    @pytest.mark.parametrize("learns", [True, False])
    @pytest.mark.parametrize("skew_us", [-60 * SECOND, -SECOND, -1, 1, SECOND, 60 * SECOND])
    async def test_account_comes_of_age_by_the_servers_clock(
        self, redis_house: House, skew_us: int, learns: bool, beatless: None
    ) -> None:
        house, wrong = redis_house, Wrong(redis_house.clock, learns=learns)
        worker = await worker_with(house, wrong)
        born = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=house.clock.now)
        account = Account("kid", plan="free", created_at=born)
        tiers: list[str] = []

        for age_us in (7 * DAY - 1, 7 * DAY):
            house.clock.now += age_us - (7 * DAY - 1 if tiers else 0)
            wrong.skew_us = skew_us
            decision = await worker.take(account, "video")
            assert decision.allowed
            tiers.append(decision.tier)

        assert tiers == ["new", "everyone"]

    @pytest.mark.fault("B4")
    async def test_wrong_estimate_costs_one_more_call(
        self, redis_house: House, redis_url: str, beatless: None
    ) -> None:
        house, wrong = redis_house, Wrong(redis_house.clock)
        async with Monitor(redis_url) as monitor:
            worker = await worker_with(house, wrong)
            born = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=house.clock.now)
            account = Account("kid", plan="free", created_at=born - timedelta(days=7))
            wrong.skew_us = -MINUTE

            await worker.take(account, "video")
            await worker.take(account, "video")
            sent = [line for line in await monitor.commands() if line.startswith("EVALSHA")]

        keys = [next(word for word in line.split() if word.endswith(":kid")) for line in sent
                if ":kid" in line]  # fmt: skip
        assert [key.split(":")[4] for key in keys] == ["new", "everyone", "everyone"]

    @pytest.mark.fault("B4")
    async def test_in_memory_the_clock_of_the_backend_decides(self) -> None:
        house = House(None)
        worker = await house.worker()
        minute = timedelta(minutes=1)
        await worker.control.close(
            "video", tier="new", begin=house.now + minute, until=house.now + 2 * minute
        )
        start, said = house.clock.now, []

        for after in (MINUTE - 1, MINUTE, 2 * MINUTE - 1, 2 * MINUTE, MINUTE):
            house.clock.now = start + after
            said.append(await reason(worker, NEW))

        assert said == ["allowed", "closed", "closed", "allowed", "closed"]


class TestRemembered:
    @pytest.mark.fault("G4")
    async def test_denial_is_forgotten_with_a_raised_quota(self, house: House) -> None:
        policy = {**POLICY, "defaults": {"quotas": {"image": 0, "video": "1/hour"}}}
        worker = await house.worker(policy)
        await worker.take(NEW, "video")
        assert await reason(worker, NEW) == "quota"
        assert worker._denials.held

        await worker.control.set("video", {"rate": "5/hour", "name": "more"}, tier="new")
        await follows(worker, 1)

        assert not worker._denials.held
        assert await reason(worker, NEW) == "allowed"


class TestSwapping:
    @pytest.mark.fault("D4")
    async def test_pushed_policy_holds_for_existing_accounts_at_their_next_request(
        self, house: House
    ) -> None:
        first, second = await house.worker(), await house.worker()
        await second.take(NEW, "video")

        await do(first, overrides.push, base(video={"quotas": "3/hour"}, image={"quotas": 0}))
        decision = await second.take(NEW, "video")

        assert (decision.tier, decision.remaining) == ("everyone", 2)
        assert await reason(second, NEW, "image") == "zero"
        assert second.policy.tiers[0].name == "everyone"

    async def test_rolled_back_policy_holds_again(self, house: House) -> None:
        first, second = await house.worker(), await house.worker()
        store = store_of(first)
        pushed = await do(first, overrides.push, base(video={"quotas": "3/hour"}))
        await do(first, overrides.push, base(video={"quotas": 0}))
        await becomes(lambda: second.take(NEW, "video"), "zero")

        await do(first, overrides.rollback, await store.revision(pushed.number))
        decision = await becomes(lambda: second.take(NEW, "video"), "allowed")

        assert decision.remaining == 2

    @pytest.mark.fault("D4")
    @pytest.mark.parametrize(
        ("features", "status", "said"),
        [
            ({"image": {"quotas": 0}}, 200, None),
            ({"video": {"quotas": 0}}, 200, None),
            ({"picture": {"routes": ["POST /images"], "quotas": 0}}, 403, "picture"),
            ({"image": {"routes": {"POST /images": 8}, "quotas": "8/hour"}}, 200, "r=0"),
        ],
    )
    async def test_policy_that_changes_in_mid_request_decides_from_the_route_on(
        self, house: House, features: dict[str, Any], status: int, said: str | None
    ) -> None:
        worker = await house.worker()
        asked, go = asyncio.Event(), asyncio.Event()

        async def identify(connection: HTTPConnection) -> Account:
            asked.set()
            await go.wait()
            return NEW

        async with client_of(worker, identify) as client:
            request = asyncio.create_task(client.post("/images"))
            await asked.wait()
            await do(worker, overrides.push, base(**features))
            await follows(worker, 1)
            go.set()
            answer = await request

        assert answer.status_code == status
        if status == 403:
            assert answer.json()["feature"] == said
        elif said is None:
            assert "ratelimit" not in answer.headers
        else:
            assert said in answer.headers["ratelimit"]

    @pytest.mark.fault("D4", "G1")
    @pytest.mark.parametrize(
        ("features", "status", "feature"),
        [
            ({"image": {"quotas": 0}}, 200, None),
            ({"video": {"quotas": 0}}, 200, None),
            ({"picture": {"routes": ["POST /images"], "quotas": 0}}, 403, "picture"),
        ],
    )
    async def test_so_does_a_worker_that_learns_of_it_by_its_decision(
        self,
        redis_house: House,
        deaf: None,
        features: dict[str, Any],
        status: int,
        feature: str | None,
    ) -> None:
        operator, worker = redis_house.limiter(), await redis_house.worker()
        await do(operator, overrides.push, base(**features))
        assert worker.revision[0] == 0

        async with client_of(worker) as client:
            answer = await client.post("/images")

        assert worker.revision[0] == 1
        assert answer.status_code == status
        if feature is not None:
            assert answer.json()["feature"] == feature
        else:
            assert "ratelimit" not in answer.headers

    async def test_identify_that_fails_while_its_feature_goes_is_no_500(self, house: House) -> None:
        worker = await house.worker()
        asked, go = asyncio.Event(), asyncio.Event()

        async def identify(connection: HTTPConnection) -> Account:
            asked.set()
            await go.wait()
            raise OSError("billing is down")

        async with client_of(worker, identify) as client:
            request = asyncio.create_task(client.post("/images"))
            await asked.wait()
            features = {
                "picture": {"routes": ["POST /images"], "quotas": "5/hour", "outage": "deny"}
            }
            await do(worker, overrides.push, base(**features))
            await follows(worker, 1)
            go.set()

            assert (await request).status_code == 503


class TestCalls:
    async def test_unlimited_asks_for_a_word_and_nothing_else_and_closed_for_none(
        self, redis_house: House, redis_url: str, beatless: None
    ) -> None:
        async def scripts() -> list[str]:
            return [line for line in await monitor.commands() if line.startswith("EVALSHA")]

        async with Monitor(redis_url) as monitor:
            worker = await redis_house.worker()
            await worker.control.close("video", tier="new")
            await follows(worker, 1)
            compared: list[str] = []
            async with asyncio.timeout(PATIENCE):
                while not compared:
                    compared = await scripts()

            unlimited = await worker.take(PRO, "image")
            asked = await scripts()
            closed = [await worker.take(NEW, "video") for _ in range(3)]
            unasked = await scripts()

        assert unlimited.allowed
        assert {one.reason for one in closed} == {"closed"}
        assert len(asked) == 1
        assert asked[0].split()[2:4] == ["1", revision_key("default", 0)]
        assert unasked == []

    async def test_unlimited_is_closed_with_the_next_decision_all_the_same(
        self, redis_house: House, deaf: None
    ) -> None:
        operator, worker = redis_house.limiter(), await redis_house.worker()
        assert await reason(worker, PRO, "image") == "allowed"

        await operator.control.close("image", tier="pro")

        assert await reason(worker, PRO, "image") == "closed"

    @pytest.mark.fault("G6")
    async def test_who_is_told_to_decide_anew_for_ever_gives_up(self, redis_url: str) -> None:
        backend = AlwaysStale.from_url(redis_url)
        assert isinstance(backend, AlwaysStale)
        limiter = Limiter(POLICY, backend)

        video = await limiter.take(NEW, "video")

        assert (video.allowed, video.reason) == (False, "outage")
        assert backend.takes == 4
        assert (await limiter.take(NEW, "image")).allowed

    async def test_decision_that_is_made_again_has_no_more_time_than_one(
        self, redis_url: str
    ) -> None:
        backend = NeverAgain.from_url(redis_url)
        assert isinstance(backend, NeverAgain)

        limiter = Limiter(POLICY, backend)

        async with asyncio.timeout(20):
            decision = await limiter.take(NEW, "video")

        assert (decision.reason, backend.takes) == ("outage", 2)

    async def test_new_revision_is_loaded_once_however_many_need_it(
        self, redis_house: House, deaf: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        operator = redis_house.limiter()
        workers = [await redis_house.worker() for _ in range(2)]
        loads = [count_heads(worker, monkeypatch) for worker in workers]

        for number in (1, 2):
            await (operator.control.close if number == 1 else operator.control.open)(
                "video", tier="new"
            )
            await asyncio.gather(
                *(worker.take(OLD, "video") for worker in workers for _ in range(500))
            )

            assert [worker.revision[0] for worker in workers] == [number] * 2
            assert [len(one) for one in loads] == [number] * 2

    def test_decisions_of_two_revisions_never_share_a_call(self) -> None:
        loop = asyncio.new_event_loop()
        stamps = [
            Stamp(namespace, shard, number, "ab" * 8, 0, None)
            for namespace in ("a", "b")
            for number in (1, 2)
            for shard in (0, 1)
        ]
        chosen = random.Random(4).choices([*stamps, None], k=2_000)
        waiting = [Waiting(loop.create_future(), [], stamp, None) for stamp in chosen]
        queue = deque(waiting)

        calls = []
        while queue:
            calls.append(gather(queue))

        assert [one for call in calls for one in call] == waiting
        for call in calls:
            told = {
                (one.stamp.revision, one.stamp.key.partition(":")[2].partition(":")[0])
                for one in call
                if one.stamp is not None
            }
            assert len(told) <= 1
            assert len({one.stamp is None for one in call}) == 1
        assert max(len(call) for call in calls) > 1
        loop.close()


class AlwaysStale(RedisBackend):
    """Say that every decision was prepared for another time."""

    takes = 0

    async def take(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Reply:
        self.takes += 1
        raise StaleError("time", 0, self.now())


class NeverAgain(AlwaysStale):
    """Say so once, and nothing the second time."""

    async def take(
        self,
        charges: Sequence[Charge],
        stamp: Stamp | None = None,
        times: tuple[int, int] | None = None,
    ) -> Reply:
        if self.takes:
            self.takes += len(charges)  # a heartbeat asks with none
            never: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            return await never
        return await super().take(charges, stamp, times)


def count_heads(worker: Limiter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note from now on each time that the head is asked for."""
    store, asked = store_of(worker), list[int]()
    head = store.head

    async def counted() -> Revision:
        asked.append(1)
        return await head()

    monkeypatch.setattr(store, "head", counted)
    return asked


class TestLost:
    @pytest.mark.fault("G5")
    async def test_emptied_redis_is_closed_again_for_workers_old_and_new(
        self, redis_house: House, redis_server: RedisServer
    ) -> None:
        first, second = await redis_house.worker(), await redis_house.worker()
        await first.control.close("video", tier="new")
        await follows(first, 1)
        await follows(second, 1)

        redis_server.command("FLUSHALL")
        said = [await reason(one, NEW) for one in (first, second)]
        late = await redis_house.worker()
        decision = await becomes(lambda: late.take(NEW, "video"), "closed")

        assert said == ["closed"] * 2
        assert decision.tier == "new"
        assert (await store_of(late).head()).number >= 1
        assert await reason(first, OLD) == "allowed"

    @pytest.mark.fault("G5")
    async def test_emptied_redis_hears_of_it_though_nobody_asks(
        self, redis_house: House, redis_server: RedisServer
    ) -> None:
        worker = await redis_house.worker()
        await worker.control.close("video", tier="new")
        await follows(worker, 1)
        key = revision_key("default", 0)

        redis_server.command("FLUSHALL")
        await until(lambda: redis_server.command("GET", key) is not None)

        assert redis_server.command("GET", key) == redis_server.command("GET", "tl:{default}:head")

    @pytest.mark.fault("G5")
    async def test_deployment_push_and_rollback_leave_it_closed(self, house: House) -> None:
        first = await house.worker()
        await first.control.close("video", tier="new")
        other = {**POLICY, "defaults": {"quotas": {"image": "1/hour", "video": "7/hour"}}}

        said = [await reason(await house.worker(other), NEW)]
        pushed = await do(first, overrides.push, other)
        said += [await reason(await house.worker(), NEW), await reason(first, NEW)]
        await do(first, overrides.push, {**other, "defaults": POLICY["defaults"]})
        await do(first, overrides.rollback, pushed)
        late = await house.worker()
        said += [await reason(first, NEW), await reason(late, NEW)]

        assert said == ["closed"] * 5
        assert (await late.take(OLD, "video")).quotas[0].capacity == 7

    async def test_whoever_leaves_the_file_it_was_given_says_so_once(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "tieredlimit")
        worker = await house.worker()
        other = {**POLICY, "defaults": {"quotas": {"image": "1/hour", "video": "7/hour"}}}

        first = (await do(worker, overrides.push, POLICY)).number
        await follows(worker, first)
        await do(worker, overrides.push, other)
        await follows(worker, first + 1)

        told = [one for one in caplog.messages if "not the one given here" in one]
        assert len(told) == 1
        assert f"the stored policy of revision {first} is in force" in told[0]

    async def test_whoever_comes_back_to_the_file_it_was_given_says_so(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "tieredlimit")
        worker = await house.worker()
        pushed = (await do(worker, overrides.push, POLICY)).number
        await follows(worker, pushed)

        await worker.control.undo()
        await follows(worker, pushed + 1)

        assert caplog.messages[-1] == (
            f"tieredlimit: revision {pushed + 1} stores no policy, "
            "and the one given here is in force again"
        )

    @pytest.mark.fault("G2")
    async def test_broken_policy_leaves_the_one_in_force_and_is_reported(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.WARNING, "tieredlimit")
        worker = await house.worker()
        store = store_of(worker)
        broken: Any = {"features": {}, "tiers": 7}
        first = Revision(1, broken)
        await store.publish(first, seen=await store.head())

        decision = await worker.take(NEW, "video")
        await follows(worker, 1)
        change = overrides.close(
            first, worker.policy, "video", Who(tier="new"), now=await store.now()
        )
        await store.publish(change.revision, seen=first)

        assert decision.remaining == 1999
        assert await reason(worker, NEW) == "closed"
        assert "revision 1 cannot be used: what was in force stays: PolicyError" in caplog.text

    @pytest.mark.fault("G2")
    async def test_document_that_cannot_be_read_is_an_outage_until_it_can(
        self, redis_house: House, redis_server: RedisServer, deaf: None
    ) -> None:
        operator, worker = redis_house.limiter(), await redis_house.worker()
        await operator.control.close("image", tier="pro")
        key = "tl:{default}:revision:1"
        document = redis_server.command("GET", key)
        assert isinstance(document, bytes)
        redis_server.command("SET", key, "of another release")

        before = await worker.take(NEW, "video")
        redis_server.command("SET", key, document.decode())

        assert (before.allowed, before.reason) == (False, "outage")
        assert await reason(worker, NEW) == "allowed"
        assert await reason(worker, PRO, "image") == "closed"

    @pytest.mark.fault("G6")
    async def test_shard_that_is_ahead_of_a_lost_head_is_overtaken(
        self, redis_house: House, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow_module, "_LOST_AFTER", 0.05)
        monkeypatch.setattr(follow_module, "_GIVEN_UP_AFTER", 0.05)
        worker = await redis_house.worker()
        await worker.control.close("video", tier="new")
        await follows(worker, 1)

        redis_server.command("SET", revision_key("default", 0), f"9 {'f' * 16}")
        await becomes(lambda: worker.take(OLD, "video"), "allowed")

        assert worker.revision[0] == 10
        assert await reason(worker, NEW) == "closed"

    @pytest.mark.fault("G6")
    async def test_of_two_revisions_of_a_number_the_heads_wins(
        self, redis_house: House, redis_server: RedisServer, deaf: None
    ) -> None:
        worker = await redis_house.worker()
        await worker.control.close("image", tier="pro")
        await becomes(lambda: worker.take(PRO, "image"), "closed")
        key = revision_key("default", 0)
        right = redis_server.command("GET", key)

        redis_server.command("SET", key, f"1 {'f' * 16}")
        await becomes(lambda: worker.take(NEW, "video"), "allowed")

        assert redis_server.command("GET", key) == right

    @pytest.mark.fault("G6")
    async def test_worker_of_the_wrong_one_takes_the_heads(
        self, redis_house: House, deaf: None
    ) -> None:
        operator, worker = redis_house.limiter(), await redis_house.worker()
        await operator.control.close("video", tier="new")
        worker._force.adopt(Revision(1, base(video={"quotas": "unlimited"})))

        assert await reason(worker, NEW) == "closed"

    async def test_shard_that_is_behind_is_raised_by_a_decision(
        self, redis_house: House, redis_server: RedisServer, deaf: None, beatless: None
    ) -> None:
        worker = await redis_house.worker()
        await worker.control.close("image", tier="pro")
        await becomes(lambda: worker.take(PRO, "image"), "closed")
        key = revision_key("default", 0)
        right = redis_server.command("GET", key)
        redis_server.command("DEL", key)

        await worker.take(NEW, "video")

        assert redis_server.command("GET", key) == right


class TestStored:
    async def test_without_one_opening_fails_and_says_what_to_do(self, house: House) -> None:
        worker = house.limiter(stored())

        with pytest.raises(
            BackendError,
            match=r'no policy is stored in the namespace "default"; push one: tieredlimit policy',
        ):
            await worker.open()

        assert not worker.ready
        with pytest.raises(BackendError, match="the stored policy was not loaded yet"):
            await worker.take(NEW, "video")

    async def test_what_was_pushed_decides(self, house: House) -> None:
        await do(house.limiter(), overrides.push, POLICY)

        worker = await house.worker(stored())

        assert worker.ready
        assert (await worker.take(NEW, "video")).remaining == 1999
        await do(worker, overrides.push, base(video={"quotas": "3/hour"}))
        assert (await worker.take(Account("ben"), "video")).remaining == 2

    async def test_requests_are_answered_503_until_there_is_one(self, house: House) -> None:
        worker, operator = house.limiter(stored()), house.limiter()

        async with client_of(worker) as client:
            before = await client.post("/videos")
            await do(operator, overrides.push, POLICY)
            after = await client.post("/videos")

        assert (before.status_code, after.status_code) == (503, 200)
        assert before.headers["retry-after"] == "1"
        assert before.headers["cache-control"] == "no-store"
        assert "ratelimit" in after.headers

    async def test_websockets_are_closed_before_they_are_accepted(self, house: House) -> None:
        worker = house.limiter(stored())
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b""}
        await TieredLimitMiddleware(done, limiter=worker)(scope, receive, send)

        assert [(one["type"], one["code"]) for one in sent] == [("websocket.close", 1013)]

    async def test_server_does_not_start_without_one(self, house: House) -> None:
        worker = house.limiter(stored())
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "lifespan.startup"}

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()

        with pytest.raises(BackendError, match="no policy is stored"):
            await TieredLimitMiddleware(app, limiter=worker)({"type": "lifespan"}, receive, send)

        assert [one["type"] for one in sent] == ["lifespan.startup.failed"]
        assert "tieredlimit policy push" in sent[0]["message"]

    async def test_store_that_is_down_is_said(self) -> None:
        worker = Limiter(stored(), "redis://127.0.0.1:1/0")

        with pytest.raises(BackendError, match="cannot connect to Redis"):
            await worker.open()

        await worker.close()


class TestBreakGlass:
    @pytest.fixture
    def policy(self, tmp_path: Path) -> Path:
        file = tmp_path / "policy.toml"
        file.write_text(
            """
            order = ["new", "everyone"]
            features.image = { routes = ["POST /images"], outage = "allow" }
            features.video = { routes = ["POST /videos"], outage = "allow" }
            defaults.quotas = { image = "5/minute", video = "5/minute" }
            tiers.new.when = { plan = "free" }
            tiers.everyone = {}
            """
        )
        return file

    async def test_environment_closes_though_redis_is_down(
        self, policy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TIEREDLIMIT_POLICY", str(policy))
        monkeypatch.setenv("TIEREDLIMIT_REDIS", "redis://127.0.0.1:1/0")
        monkeypatch.setenv("TIEREDLIMIT_CLOSE", "video:new")
        limiter = Limiter.from_env()

        async with client_of(limiter) as client:
            video, image = await client.post("/videos"), await client.post("/images")
            pro = await client.post("/videos", headers={"x-account": "pro"})

        assert (video.status_code, image.status_code, pro.status_code) == (403, 200, 200)
        assert video.json()["reason"] == "closed"
        await limiter.close()

    async def test_so_it_does_for_a_limiter_that_was_made_without_it(
        self, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "closed").write_text("image:new\n", "utf-8")
        monkeypatch.setenv("TIEREDLIMIT_CLOSE", "video:new")
        monkeypatch.setenv("TIEREDLIMIT_CLOSE_FILE", str(tmp_path / "closed"))
        limiter, other = Limiter(policy), Limiter(policy, close="")

        said = [(await one.take(NEW, "video")).reason for one in (limiter, other)]
        said += [(await limiter.take(NEW, "image")).reason]

        assert said == ["closed", "allowed", "closed"]

    async def test_closed_wins_over_what_an_outage_would_allow(
        self, own_server: RedisServer
    ) -> None:
        worker = Limiter(POLICY, own_server.url)
        await worker.open()
        await worker.control.close("image", tier="new")
        await becomes(lambda: worker.take(NEW, "image"), "closed")

        own_server.kill()

        assert await reason(worker, NEW, "image") == "closed"
        assert (await worker.take(OLD, "image")).allowed
        await worker.close()

    async def test_file_closes_over_everything_from_when_it_appears_until_it_is_gone(
        self, house: House, tmp_path: Path
    ) -> None:
        file = tmp_path / "close"
        worker = await house.worker(close_file=file)
        await worker.control.close("video", tier="new")
        await worker.control.set("video", "unlimited", account="ann")
        await becomes(lambda: worker.take(NEW, "video"), "allowed")

        file.write_text("video:new")
        await becomes(lambda: worker.take(NEW, "video"), "closed")
        file.write_text("image")
        await becomes(lambda: worker.take(NEW, "video"), "allowed")
        image = await reason(worker, OLD, "image")
        file.unlink()
        await becomes(lambda: worker.take(OLD, "image"), "allowed")

        assert image == "closed"


class TestUnopened:
    """Workers that no lifespan opens, as behind Daphne: their first request does."""

    async def test_who_needs_no_answer_hears_of_what_opens(self, redis_house: House) -> None:
        zero = base(video={"routes": ["POST /videos"], "quotas": 0})
        operator, worker = await redis_house.worker(zero), redis_house.limiter(zero)
        async with client_of(worker) as client:
            before = await client.post("/videos")
            await operator.control.set("video", "5/day", everyone=True)
            await follows(worker, 1)
            after = await client.post("/videos")

        assert (before.status_code, after.status_code) == (403, 200)

    async def test_who_takes_without_the_middleware_does_so_too(self, redis_house: House) -> None:
        zero = base(video={"quotas": 0})
        operator, worker = await redis_house.worker(zero), redis_house.limiter(zero)

        assert await reason(worker, NEW) == "zero"
        await operator.control.set("video", "5/day", everyone=True)
        await follows(worker, 1)
        assert await reason(worker, NEW) == "allowed"

    async def test_who_meters_nothing_hears_of_a_route_that_is_metered_now(
        self, redis_house: House
    ) -> None:
        operator, worker = await redis_house.worker(), redis_house.limiter()
        async with client_of(worker) as client:
            before = await client.post("/speech")
            speech = base(speech={"routes": ["POST /speech"], "quotas": 0})
            await do(operator, overrides.push, speech)
            await follows(worker, 1)
            after = await client.post("/speech")

        assert (before.status_code, after.status_code) == (200, 403)

    async def test_file_of_closures_is_looked_at(self, house: House, tmp_path: Path) -> None:
        file = tmp_path / "close"
        worker = house.limiter(close_file=file)
        async with client_of(worker) as client:
            before = await client.post("/videos")
            file.write_text("video")
            await until(lambda: worker._force._closures._in_file)
            after = await client.post("/videos")

        assert (before.status_code, after.status_code) == (200, 403)

    async def test_closed_limiter_stays_closed_though_another_asks_the_same_backend(
        self, redis_house: House
    ) -> None:
        backend = redis_house.backend()
        first, second = [redis_house.limiter(backend=backend) for _ in range(2)]
        await asyncio.gather(first.open(), second.open())

        await first.close()
        await second.take(OLD, "video")

        assert (first.following, len(first._force._followers)) == (False, 0)
        assert (second.following, len(second._force._followers)) == (True, 1)

    async def test_closed_worker_follows_again_once_it_is_asked(self, redis_house: House) -> None:
        zero = base(video={"routes": ["POST /videos"], "quotas": 0})
        worker = await redis_house.worker(zero)
        await worker.close()
        closed = worker.following

        async with client_of(worker) as client:
            await client.post("/videos")

        assert (closed, worker.following) == (False, True)

    async def test_switched_off_it_lets_all_through_though_no_policy_was_loaded(
        self, house: House
    ) -> None:
        worker = house.limiter(stored(), enabled=False)

        async def take(scope: Scope, receive: Receive, send: Send) -> None:
            (await scope["state"]["tieredlimit"].take("video")).raise_if_denied()
            await done(scope, receive, send)

        app = TieredLimitMiddleware(take, limiter=worker, identify=by_header)
        transport = httpx.ASGITransport(app)
        async with worker, httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/videos")
            decision = await worker.take(NEW, "video")

        assert answer.status_code == 200
        assert (decision.allowed, decision.tier) == (True, "")
        assert not worker.following


class TestProcesses:
    def test_child_of_a_fork_follows_by_itself(self, redis_url: str) -> None:
        run(f"""
            import asyncio, os, sys
            from tests.test_live import NEW, POLICY, becomes, patient, store_of
            from tieredlimit import Limiter

            limiter = Limiter(POLICY, patient({redis_url!r}))

            async def follow(reached):
                await limiter.open()
                assert (await limiter.take(NEW, "video")).allowed
                os.write(reached, b"!")
                await becomes(lambda: limiter.take(NEW, "video"), "closed")
                await limiter.close()

            async def main():
                await limiter.open()
                await limiter.take(NEW, "video")
                read, write = os.pipe()
                child = os.fork()
                if not child:
                    asyncio._set_running_loop(None)
                    asyncio.run(follow(write))
                    os._exit(0)
                assert await asyncio.to_thread(os.read, read, 1) == b"!"
                async with asyncio.timeout(20):
                    while len(workers := await store_of(limiter).workers()) < 2:
                        pass
                assert {{one.pid for one in workers}} == {{os.getpid(), child}}
                await limiter.control.close("video", tier="new")
                assert (await asyncio.to_thread(os.waitpid, child, 0))[1] == 0
                assert (await limiter.take(NEW, "video")).reason == "closed"
                await limiter.close()

            asyncio.run(main())
        """)

    def test_child_of_a_fork_waits_for_no_thread_of_the_parent_that_changes_what_is_in_force(
        self,
    ) -> None:
        run("""
            import asyncio, os, signal, threading
            from tests.test_live import NEW, POLICY
            from tieredlimit import Limiter

            limiter, held, over = Limiter(POLICY), threading.Event(), threading.Event()

            def hold():
                with limiter._force._lock:
                    held.set()
                    over.wait()

            async def change():
                await limiter.control.close("video", tier="new")
                assert (await limiter.take(NEW, "video")).reason == "closed"

            thread = threading.Thread(target=hold)
            thread.start()
            held.wait()
            child = os.fork()
            if not child:
                signal.alarm(10)
                asyncio.run(change())
                os._exit(0)
            over.set()
            thread.join()
            assert os.waitpid(child, 0)[1] == 0
        """)

    @pytest.mark.parametrize("store", ["redis_url", "cluster_url"])
    def test_event_loops_that_end_without_closing_leave_nothing_behind(
        self, store: str, request: pytest.FixtureRequest
    ) -> None:
        said = run(
            f"""
            import asyncio, gc
            from tests.test_live import NEW, POLICY, patient, until
            from tieredlimit import Limiter

            limiter = Limiter(POLICY, patient({request.getfixturevalue(store)!r}))

            async def use(number):
                assert (await limiter.take(NEW, "video")).allowed
                await limiter.control.close("image", tier="new")
                await until(lambda: limiter.revision[0] == 2 * number + 1)
                await limiter.control.open("image", tier="new")
                await until(lambda: limiter.revision[0] == 2 * number + 2)

            for number in range(3):
                asyncio.run(use(number))
                gc.collect()
            del limiter
            gc.collect()
            """,
            *("-X", "dev", "-W", "error"),
        )

        assert said == ""

    def test_whoever_only_changes_something_leaves_nothing_behind_once_closed(
        self, redis_url: str
    ) -> None:
        said = run(
            f"""
            import asyncio, gc
            from tests.test_live import POLICY, patient
            from tieredlimit import Limiter

            async def main():
                limiter = Limiter(POLICY, patient({redis_url!r}))
                await limiter.control.close("image", tier="new")
                await limiter.close()

            asyncio.run(main())
            gc.collect()
            """,
            *("-X", "dev", "-W", "error"),
        )

        assert said == ""


def run(script: str, *options: str) -> str:
    """Run a script in a process of its own; return what it said on stderr.

    What asyncio's debug mode says of callbacks that took long is about the machine, not about us.
    """
    here = str(Path(__file__).parent.parent)
    quiet = "import logging\nlogging.getLogger('asyncio').setLevel(logging.ERROR)\n"
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *options, "-c", quiet + textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


class Watcher:
    """Remember what was seen."""

    def __init__(self) -> None:
        self.decisions: list[tuple[str, str, str]] = []
        self.outages: list[tuple[str, str]] = []
        self.revisions: list[int] = []

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        self.decisions.append((account.id, decision.feature, decision.reason))

    def on_outage(self, feature: str, error: Exception) -> None:
        self.outages.append((feature, type(error).__name__))

    def on_revision(self, number: int, digest: str) -> None:
        self.revisions.append(number)


class Clumsy:
    """Raise at whatever there is to see."""

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        raise ValueError("decision")

    def on_outage(self, feature: str, error: Exception) -> None:
        raise ValueError("outage")

    def on_revision(self, number: int, digest: str) -> None:
        raise ValueError("revision")


class TestWatched:
    async def test_observers_see_decisions_and_revisions_and_disturb_neither(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        watcher = Watcher()
        worker = await house.worker(observers=[Clumsy(), watcher])

        await worker.take(PRO, "image")
        await worker.take(NEW, "video")
        await worker.control.close("video", tier="new")
        await follows(worker, 1)
        denied = await worker.take(NEW, "video")

        assert denied.reason == "closed"
        assert watcher.decisions == [
            ("pro", "image", "allowed"), ("ann", "video", "allowed"), ("ann", "video", "closed"),
        ]  # fmt: skip
        assert watcher.revisions == [1]
        assert "an observer failed, decisions go on: Clumsy: ValueError" in caplog.text

    async def test_observers_see_outages(self) -> None:
        watcher = Watcher()
        limiter = Limiter(POLICY, "redis://127.0.0.1:1/0", observers=[Clumsy(), watcher])

        decision = await limiter.take(NEW, "video")

        assert decision.reason == "outage"
        assert watcher.outages == [("video", "BackendError")]
        assert watcher.decisions == [("ann", "video", "outage")]
        await limiter.close()

    async def test_decisions_are_counted_by_cell_and_since_the_revision(self, house: House) -> None:
        worker = await house.worker()
        await worker.take(NEW, "video")
        await worker.take(PRO, "image")
        await worker.control.close("video", tier="new")
        await follows(worker, 1)

        for account in (NEW, NEW, OLD):
            await worker.take(account, "video")

        assert worker.tallies.snapshot() == {
            "video/new": {"allowed": 1, "closed": 2},
            "image/pro": {"allowed": 1},
            "video/everyone": {"allowed": 1},
        }
        assert worker.tallies.since() == {
            "video/new": {"closed": 2},
            "video/everyone": {"allowed": 1},
        }

    async def test_denials_are_sampled_without_a_name(self, house: House) -> None:
        worker = await house.worker()
        await worker.control.close("video", tier="new")
        await becomes(lambda: worker.take(NEW, "video"), "closed")

        sample = worker.samples.snapshot()[-1]

        assert (sample["feature"], sample["tier"], sample["reason"]) == ("video", "new", "closed")
        assert sample["at_us"] == house.clock.now
        assert "ann" not in str(sample)

    async def test_workers_are_listed_with_what_they_follow_and_count(
        self, redis_house: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow_module, "BEAT_INTERVAL", 0.02)
        workers = [await redis_house.worker() for _ in range(3)]
        await workers[0].control.close("video", tier="new")
        for worker in workers:
            await follows(worker, 1)
            await worker.take(NEW, "video")
        store = store_of(workers[0])

        async def counted() -> int:
            beats = await store.workers()
            told = [beat.counters["since"].get("video/new", {}) for beat in beats]
            return sum(beat.revision == 1 and one.get("closed", 0) > 0
                       for beat, one in zip(beats, told, strict=True))  # fmt: skip

        async with asyncio.timeout(PATIENCE):
            while True:
                if await counted() == 3:
                    break
                await asyncio.sleep(0.005)
        await workers[2].close()

        assert len({beat.id for beat in await store.workers()}) == 2

    def test_policy_is_the_one_below_the_overrides(self) -> None:
        assert Limiter(POLICY).policy.cell("new", "video") == Policy.from_dict(POLICY).cell(
            "new", "video"
        )


@pytest.mark.fault("G1")
async def test_load_that_failed_is_tried_again_though_nobody_tells_twice(redis_url: str) -> None:
    worker = Limiter(POLICY, redis_url)
    operator = Limiter(POLICY, redis_url)
    store = worker._force.store
    assert store is not None
    head, failures = store.head, 0

    async def failing_once() -> Revision:
        nonlocal failures
        if not failures:
            failures += 1
            raise BackendError("for once")
        return await head()

    async with worker, operator:
        await operator.control.close("video", everyone=True)
        await until(lambda: worker.revision[0] == 1)
        store.head = failing_once  # type: ignore[method-assign]  # to fail

        await operator.control.open("video", everyone=True)
        await until(lambda: worker.revision[0] == 2)

    assert failures == 1


@pytest.mark.fault("G5")
async def test_what_is_published_on_an_emptied_redis_is_not_undone_by_what_stood_before(
    own_server: RedisServer,
) -> None:
    worker = Limiter(POLICY, own_server.url)
    async with worker:
        await worker.control.close("image", everyone=True)
        await worker.control.open("image", everyone=True)
        await until(lambda: worker.revision[0] == 2)
        own_server.command("FLUSHALL")
        operator = Limiter(POLICY, own_server.url)

        await operator.control.close("video", everyone=True)
        await until(lambda: worker.revision[0] > 2)

        in_force = await operator.control.in_force()
        await operator.close()
    assert [one.feature for one in in_force.overrides] == ["video"]
    assert in_force.number == worker.revision[0] == 3


class TestChangingWhatTheStoreHasLost:
    """The store was emptied, or restored to an older state, and nobody has put anything back."""

    @pytest.fixture
    def followed(self) -> list[Revision]:
        """What this process has seen, the latest last."""
        return [NOTHING]

    @pytest.fixture
    def store(self) -> MemoryControl:
        return MemoryControl(MemoryBackend(), "test", 1)

    @pytest.fixture
    def control(self, store: MemoryControl, followed: list[Revision]) -> Control:
        return Control(store, lambda: Policy.from_dict(POLICY), lambda: followed[-1])

    @pytest.mark.fault("G5")
    async def test_undo_goes_by_what_is_followed(
        self, control: Control, store: MemoryControl, followed: list[Revision]
    ) -> None:
        followed.append((await control.close("image", everyone=True)).revision)
        followed.append((await control.close("video", everyone=True)).revision)
        followed.append((await control.open("image", everyone=True)).revision)
        store._held.head = followed[2]

        undone = await control.undo()

        assert undone.revision.number == 4
        assert [one.feature for one in undone.revision.overrides] == ["image", "video"]

    @pytest.mark.fault("G5")
    async def test_change_keeps_what_was_published_meanwhile(
        self, control: Control, store: MemoryControl, followed: list[Revision]
    ) -> None:
        followed.append((await control.close("image", everyone=True)).revision)
        followed.append((await control.open("image", everyone=True)).revision)
        store._held.head = NOTHING
        await Control(store, lambda: Policy.from_dict(POLICY)).close("video", everyone=True)

        changed = await control.close("image", tier="new")

        assert [one.feature for one in changed.revision.overrides] == ["video", "image"]


async def test_undo_where_nothing_older_is_kept_is_an_error(own_server: RedisServer) -> None:
    async with Limiter(POLICY, own_server.url) as limiter:
        await limiter.control.close("image", everyone=True)
        await limiter.control.close("video", everyone=True)
        await until(lambda: limiter.revision[0] == 2)
        own_server.command("FLUSHALL")
        store = limiter._force.store
        assert store is not None
        await store.seed(limiter._force.standing())

        with pytest.raises(UsageError, match="what was before revision 2 is not kept any more"):
            await limiter.control.undo()
