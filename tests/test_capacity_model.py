"""Pools, slots and reservations: memory, Redis and what they mean agree, whatever is done to them.

Once at the level of the store, where the reference knows every number; and once at the level of the
limiter, with tiers, overrides and policies that change, where memory and Redis decide alike.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract import DAY, HOUR, MINUTE, SECOND, START, Clock, quota
from tests.reference import Reference
from tests.servers import RedisServer
from tieredlimit import Account, Decision, Limiter, UsageError, deciding, overrides
from tieredlimit._core.keys import key_prefix
from tieredlimit._core.policy import Policy
from tieredlimit._core.quota import Quota
from tieredlimit._core.revision import Revision
from tieredlimit._core.shelf import Shelf
from tieredlimit._core.who import EVERYONE, Who
from tieredlimit.backends import Charge, Claim, MemoryBackend, RedisBackend, Slot, redis_holds
from tieredlimit.backends.backend import Claimed
from tieredlimit.backends.control import holds_of
from tieredlimit.backends.holds import Correction, Hold
from tieredlimit.backends.rooms import unfold

RATES = ["1/second", "3/second", "7/minute", "5/hour", "7/3 hours", "2/day"]
LEASES = [10 * SECOND, SECOND, 20 * SECOND, HOUR, 1]
KEPT = [1, SECOND, MINUTE, DAY]

numbers = itertools.count()


@dataclass(frozen=True)
class Law:
    """What a policy says: two accounts' quotas, the pool's, and how many slots there are."""

    accounts: tuple[tuple[Quota, ...], tuple[Quota, ...]]
    catch_all: bool
    pool: Quota
    slots: tuple[int, int]  # of each account, of the pool; 0 for none
    leases: tuple[int, int]


@dataclass(frozen=True)
class Take:
    """Take as an account; `kept` is how long it may be settled, 0 for not."""

    account: int
    cost: int
    pool: int  # how often the pool is charged
    slots: bool
    kept: int


@dataclass(frozen=True)
class Settle:
    """Correct an earlier take by so many tokens, at so many times what they cost now."""

    take: int
    tokens: int
    price: int


@dataclass(frozen=True)
class Refund:
    """Give back some of an earlier take, or more than that, without a record."""

    take: int
    tokens: int


@dataclass(frozen=True)
class Renew:
    take: int


@dataclass(frozen=True)
class Release:
    take: int


@dataclass(frozen=True)
class Obey:
    """Go by another policy, or by an override's numbers: the keys stay."""

    law: int


@dataclass(frozen=True)
class Move:
    """Move the clock, back too."""

    us: int


@dataclass(frozen=True)
class Pass:
    """Move the clock to the end of a lease or of a record, or to just before it."""

    take: int
    less: int


Step = Take | Settle | Refund | Renew | Release | Obey | Move | Pass

which = st.integers(0, 5)
buckets = st.builds(quota, st.sampled_from(RATES), st.just("x"), capacity=st.integers(1, 8))
pools = st.builds(
    lambda one, leave: replace(one, name="pool", leave=min(leave, one.capacity - 1)),
    buckets,
    st.integers(0, 4),
)


def named(*quotas: Quota) -> tuple[Quota, ...]:
    return tuple(replace(one, name="ab"[i]) for i, one in enumerate(quotas))


own = st.builds(named, buckets) | st.builds(named, buckets, buckets)
laws = st.builds(
    Law,
    st.tuples(own, own),
    st.booleans(),
    pools,
    st.tuples(st.sampled_from([1, 2, 1, 0]), st.sampled_from([2, 3, 1, 0])),
    st.tuples(st.sampled_from(LEASES), st.sampled_from(LEASES)),
)
takes = st.builds(
    Take,
    st.integers(0, 1),
    st.sampled_from([0, 1, 1, 1, 2, 3, 9]),
    st.sampled_from([0, 1, 1, 1, 2]),
    st.sampled_from([True, True, False]),
    st.sampled_from([0, *KEPT]),
)
moves = st.sampled_from([0, 1, SECOND, 12 * SECOND, HOUR, DAY]) | st.integers(-2 * HOUR, 2 * HOUR)
obeying = st.builds(Obey, st.integers(0, 2))
settling = st.builds(Settle, which, st.integers(-9, 9), st.sampled_from([1, 1, 3]))
passing = st.builds(Pass, which, st.integers(0, 1))
step = st.one_of(
    takes,
    takes,
    takes,
    settling,
    st.builds(Refund, which, st.integers(0, 9)),
    st.builds(Renew, which),
    st.builds(Release, which),
    obeying,
    st.builds(Move, moves | st.integers(-20 * SECOND, 20 * SECOND)),
    passing,
)
holding = st.builds(Take, st.just(0), st.just(0), st.integers(0, 1), st.just(True), st.just(0))
backward = st.builds(Move, st.integers(-20 * SECOND, -1))
reserving = st.builds(Take, st.just(0), st.integers(1, 3), st.just(0), st.just(False), st.just(DAY))
latest = st.just(-1)
# What single steps seldom come to: a lease on a clock that steps back, a price that changes.
stories = st.one_of(
    step.map(lambda one: (one,)),
    step.map(lambda one: (one,)),
    st.tuples(
        *(holding, obeying, backward, holding),
        *(st.builds(Pass, st.sampled_from([-1, -2]), st.integers(0, 1)), holding),
    ),
    st.tuples(
        *(reserving, obeying),
        *(st.builds(Settle, latest, st.integers(-3, 9), st.sampled_from([1, 3])), step, settling),
    ),
)
steps = st.lists(stories, min_size=2, max_size=10).map(
    lambda told: list(itertools.chain.from_iterable(told))
)


class Shared:
    """One server, one connection and one event loop for all examples."""

    def __init__(self, server: RedisServer, runner: asyncio.Runner) -> None:
        self.url = server.url
        self.clock = Clock()
        self.redis = RedisBackend.from_url(server.url, clock=self.clock, timeout=30.0)
        self.client = redis.Redis(port=server.port)
        self.run = runner.run


@pytest.fixture(scope="module")
def shared(redis_server: RedisServer) -> Iterator[Shared]:
    with asyncio.Runner() as runner:
        shared = Shared(redis_server, runner)
        with pytest.MonkeyPatch.context() as patch:
            # How long a denial is remembered must not depend on how fast the examples run.
            patch.setattr(deciding, "_local_us", lambda: 0)
            patch.setattr(redis_holds, "TIMEOUT", 30.0)
            yield shared
        shared.client.close()
        runner.run(shared.redis.close())


@dataclass(frozen=True)
class Done:
    """What a take has charged and holds, whether or not it was allowed."""

    charges: list[Charge]
    claim: Claim

    @property
    def hold(self) -> Hold:
        return Hold(self.claim.id, tuple((key, lease_us) for key, _, lease_us in self.claim.slots))

    @property
    def ends(self) -> int:
        """Microseconds for which a part of it lasts."""
        return min((slot.lease_us for slot in self.claim.slots), default=self.claim.keep_us)


class Machine:
    """The reference, memory and Redis side by side, on the same keys."""

    def __init__(self, shared: Shared, laws: Sequence[Law]) -> None:
        self.clock, self.client = shared.clock, shared.client
        self.memory, self.redis = MemoryBackend(clock=shared.clock), shared.redis
        self.reference = Reference()
        self.laws, self.law = laws, laws[0]
        self.done: list[Done] = []
        self.example = f"e{next(numbers)}"
        self._defined_from = 0
        in_memory, in_redis = holds_of(self.memory), holds_of(self.redis)
        assert in_memory is not None
        assert in_redis is not None
        self.holds = in_memory, in_redis

    async def step(self, step: Step) -> None:
        if isinstance(step, Take):
            await self._take(step)
        elif isinstance(step, Obey):
            self.law = self.laws[step.law % len(self.laws)]
        elif isinstance(step, Move):
            self._move(self.clock.now + step.us)
        elif self.done:
            await self._follow_up(step, self.done[step.take % len(self.done)])

    async def close(self) -> None:
        await self.holds[1].close()

    async def _take(self, step: Take) -> None:
        now, done = self.clock.now, self._asked(step)
        allowed, debts, held = self.reference.claim(done.charges, done.claim, now)

        if done.claim.id:
            in_memory = self.memory.claim_now(done.charges, done.claim)
            in_redis = await self.redis.claim(done.charges, done.claim)
            for reply in (in_memory, in_redis):
                for said, meant, slot in zip(reply.held, held, done.claim.slots, strict=True):
                    # Those that are over may count as long as there are enough.
                    assert said == meant if meant >= slot.limit else meant <= said < slot.limit
        else:
            in_memory, in_redis = [
                Claimed(*await one.take(done.charges), []) for one in (self.memory, self.redis)
            ]

        assert (in_memory.allowed, list(in_memory.debts)) == (allowed, debts)
        assert (in_redis.allowed, list(in_redis.debts)) == (allowed, debts)
        self.done.append(done)

    async def _follow_up(self, step: Step, done: Done) -> None:
        now, (in_memory, in_redis) = self.clock.now, self.holds
        meant: object
        if isinstance(step, Pass):
            self._move(now + done.ends - step.less)
        elif isinstance(step, Renew) and done.hold.slots:
            meant = self.reference.renew(done.hold, now)
            assert [await holds.renew(done.hold) for holds in self.holds] == [meant] * 2
        elif isinstance(step, Release) and done.hold.slots:
            meant = self.reference.release(done.hold, now)
            assert [await holds.release(done.hold) for holds in self.holds] == [meant] * 2
        elif isinstance(step, Refund):
            back = self._corrections(done, -step.tokens)
            meant = self.reference.refund(back, now)
            assert [await holds.refund(back) for holds in self.holds] == [meant] * 2
        elif isinstance(step, Settle) and done.claim.record:
            record, more = done.claim.record, self._corrections(done, step.tokens, step.price)
            settled, debts = self.reference.settle(record, more, now)
            if not settled:
                # The server's own clock ends a record there; here ours does.
                self.client.delete(record)
            for holds in (in_memory, in_redis):
                said = await holds.settle(record, more)
                assert (said.settled, list(said.debts)) == (settled, debts)

    def _corrections(self, done: Done, tokens: int, price: int = 1) -> list[Correction]:
        """Return what changes a take by so many tokens, by the numbers of today's policy."""
        today = {(key, one.tag): one for key, one in self._buckets(self.law)}
        corrected = []
        for key, shelf, _ in done.charges:
            for one in shelf.quotas:
                now = today.get((key, one.tag), one)
                us = tokens * price * now.interval_us
                corrected.append(Correction(key, one.tag, us, now.clamp_us))
        return corrected

    def _buckets(self, law: Law) -> list[tuple[str, Quota]]:
        shelves = [self._shelf(law, account) for account in range(2)]
        found = [(key, one) for key, shelf in shelves for one in shelf.quotas]
        return [*found, (self._pool, law.pool)]

    @property
    def _pool(self) -> str:
        return key_prefix("test", 0, "~pool", self.example, None) + "0"

    def _shelf(self, law: Law, account: int) -> tuple[str, Shelf]:
        prefix = key_prefix("test", 0, "video", "free", None)
        shelf = Shelf(law.accounts[account], None, prefix, law.catch_all)
        return shelf.key(Account(f"{self.example}u{account}")), shelf

    def _move(self, to: int) -> None:
        defined_from = self.reference.defined_from(self.clock.now)
        self._defined_from = max(self._defined_from, defined_from)
        self.clock.now = self.reference.clear_of(max(to, self._defined_from))

    def _asked(self, step: Take) -> Done:
        law, place = self.law, self._pool
        mine, shelf = self._shelf(law, step.account)
        pool = Shelf((law.pool,), None, place, catch_all=False)
        charges = [Charge(mine, shelf, step.cost), *[Charge(place, pool, step.cost)] * step.pool]
        slots = [
            Slot(key, limit, lease_us)
            for key, limit, lease_us in zip(
                (f"{mine}~lease", f"{place}~lease"), law.slots, law.leases, strict=True
            )
            if limit and step.slots
        ]
        if not slots and not step.kept:
            return Done(charges, Claim(b"", ()))
        id_ = next(numbers).to_bytes(16, "big")
        record = f"tl1:{{test:0}}:~reservation:{self.example}:{id_.hex()}" if step.kept else ""
        return Done(charges, Claim(id_, tuple(slots), record, step.kept))


@pytest.mark.fault("A3", "A4", "A10", "A12", "H1", "H2", "H4")
@given(laws=st.lists(laws, min_size=2, max_size=3), steps=steps)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_memory_redis_and_the_meaning_agree_on_what_is_taken_held_and_corrected(
    shared: Shared, laws: list[Law], steps: list[Step]
) -> None:
    shared.clock.now = START
    machine = Machine(shared, laws)

    async def run() -> None:
        try:
            for step in steps:
                await machine.step(step)
        finally:
            await machine.close()

    shared.run(run())


@dataclass(frozen=True)
class Ask:
    """Take as an account; `within_s` is how long it may be settled, 0 for not."""

    account: int
    feature: str
    cost: int
    within_s: int


@dataclass(frozen=True)
class Follow:
    """Do something with an earlier take: settle, refund, renew or release."""

    verb: str
    take: int
    actual: int


@dataclass(frozen=True)
class Override:
    """Close, open or set a feature for a tier, or for everyone."""

    verb: str
    feature: str
    tier: str | None


@dataclass(frozen=True)
class Push:
    """Put another policy in force."""

    document: int


Event = Ask | Follow | Override | Push | Move

TIERS = ["new", "pro", "everyone"]
FEATURES = ["video", "image"]


def quota_tables(slots: st.SearchStrategy[int], most: int = 4) -> st.SearchStrategy[dict[str, Any]]:
    held = st.fixed_dictionaries(
        {"concurrency": slots, "lease": st.sampled_from(["10 seconds", "1 minute"])}
    )
    return st.builds(
        lambda rate, capacity, held: {"rate": rate, "capacity": capacity, **held},
        st.sampled_from(["2/minute", "5/minute", "3/hour", "1/second"]),
        st.integers(2, most),
        held | st.just({}),
    )


def documents() -> st.SearchStrategy[dict[str, Any]]:
    mine = quota_tables(st.integers(1, 2)).map(lambda one: {**one, "name": "mine"})
    ours = quota_tables(st.integers(1, 2)).map(lambda one: {**one, "name": "ours", "per": "org"})
    cells: st.SearchStrategy[Any] = st.one_of(
        mine.map(lambda one: [one]),
        *(st.tuples(mine, ours).map(list), st.tuples(mine, ours).map(list)),
        st.just("unlimited"),
        st.just(0),
    )
    leave = st.dictionaries(st.sampled_from(TIERS), st.just("50%") | st.just(1), max_size=2)
    tiers = {
        "new": {"when": {"plan": "free", "account_age_below": "7 days"}},
        "pro": {"when": {"plan": "pro"}},
        "everyone": {},
    }
    return st.builds(
        lambda pool, leave, cells: {
            "order": TIERS,
            "pools": {"gpu": {**pool, "leave": leave}},
            "features": {
                "video": {"routes": ["POST /videos"], "pool": "gpu", "refund_on": [500]},
                "image": {"routes": ["POST /images"], "pool": "gpu"},
            },
            "tiers": {
                tier: {**tiers[tier], "quotas": dict(zip(FEATURES, row, strict=True))}
                for tier, row in zip(TIERS, cells, strict=True)
            },
        },
        quota_tables(st.integers(2, 3), 9),
        leave,
        st.lists(st.lists(cells, min_size=2, max_size=2), min_size=3, max_size=3),
    )


asking = st.builds(
    Ask,
    st.integers(0, 2),
    st.sampled_from(["video", "video", "image"]),
    st.sampled_from([1, 1, 2, 3, 0]),
    st.sampled_from([0, 60, 3600]),
)
following = st.builds(
    Follow,
    st.sampled_from(["settle", "refund", "renew", "release"]),
    st.integers(0, 3),
    st.integers(0, 5),
)
overriding = st.builds(
    Override,
    st.sampled_from(["close", "open", "set"]),
    st.sampled_from(FEATURES),
    st.sampled_from([None, None, *TIERS]),
)
pushing = st.builds(Push, st.integers(0, 1))
events = st.lists(
    st.one_of(
        *(asking, asking, asking, asking, following, following, following),
        *(overriding, overriding, pushing, st.builds(Move, moves)),
    ),
    min_size=12,
    max_size=24,
)


class Twins:
    """Two limiters, in memory and on Redis, to which the same things happen."""

    def __init__(self, shared: Shared, documents: Sequence[dict[str, Any]]) -> None:
        self.clock, self.client = shared.clock, shared.client
        self.documents = documents
        self.memory = MemoryBackend(clock=shared.clock)
        backends = (
            self.memory,
            RedisBackend.from_url(shared.url, clock=shared.clock, timeout=30.0),
        )
        self._policy = self._pushed = Policy.from_dict(documents[0])
        namespace = f"model-{next(numbers)}"
        self.limiters = [Limiter(self._policy, one, namespace=namespace) for one in backends]
        self.taken: list[tuple[Sequence[Decision], int]] = []
        self._seen: set[int] = set()
        week = timedelta(days=7)
        self._accounts = [
            Account("ann", plan="free", created_at=_instant(START + MINUTE) - week),
            Account("bob", plan="pro", within={"org": "o1"}),
            Account("eve", within={"org": "o1"}),
        ]

    async def happen(self, event: Event) -> None:
        if isinstance(event, Ask):
            await self._ask(event)
        elif isinstance(event, Override):
            await self._override(event)
        elif isinstance(event, Push):
            document = self.documents[event.document % len(self.documents)]
            self._pushed = Policy.from_dict(document)
            await self._publish(lambda head, _: overrides.push(head, document, now=self.clock.now))
        elif isinstance(event, Move):
            # What ended once must not begin again: a store may have forgotten it.
            ended = max((at for at in self._seen if at <= self.clock.now), default=0)
            self.clock.now = max(self.clock.now + event.us, ended)
        elif self.taken:
            await self._follow(event, *self.taken[event.take % len(self.taken)])
        self._seen |= self._ends()

    async def close(self) -> None:
        for limiter in self.limiters:
            await limiter.close()

    async def _ask(self, event: Ask) -> None:
        decisions = [await self._decided(limiter, event) for limiter in self.limiters]

        assert said(decisions[0]) == said(decisions[1])
        assert decisions[0].reason != "outage"
        if decisions[0].allowed:
            self.taken.append((decisions, self.clock.now + event.within_s * SECOND))

    async def _decided(self, limiter: Limiter, event: Ask) -> Decision:
        account, feature, cost = self._accounts[event.account], event.feature, event.cost

        async def take() -> Decision:
            if not event.within_s:
                return await limiter.take(account, feature, cost)
            return await limiter.reserve(
                account, feature, cost, settle_within=event.within_s
            ).take()

        decision = await take()
        if not decision.allowed and await self._has_heard(limiter):
            # A denial that needs no answer of the store may be by the rules of a moment ago.
            decision = await take()
        return decision

    async def _has_heard(self, limiter: Limiter) -> bool:
        """Let a limiter hear of what memory obeys already; return whether that was news."""
        before = limiter.revision
        if before[0] < self.limiters[0].revision[0]:
            await limiter._force.compare()
        return limiter.revision != before

    async def _follow(self, event: Follow, decisions: Sequence[Decision], until: int) -> None:
        pairs = list(zip(self.limiters, decisions, strict=True))
        if until <= self.clock.now and decisions[1].taken is not None:
            # The server's own clock ends a record there; here ours does.
            self.client.delete(decisions[1].taken.record)
        await self._has_heard(self.limiters[1])  # tokens are given back at today's price
        answers: list[object] = []
        if event.verb == "settle":
            answers = [await limiter.settle(one.token, event.actual) for limiter, one in pairs]
        elif event.verb == "refund":
            answers = [said(await limiter.refund(one)) for limiter, one in pairs]
        elif decisions[0].lease is not None:
            for limiter, one in pairs:
                ask = limiter.leases.renew if event.verb == "renew" else limiter.leases.release
                answers.append(await ask(one.token))
        assert all(answer == answers[0] for answer in answers)

    async def _override(self, event: Override) -> None:
        who = EVERYONE if event.tier is None else Who(tier=event.tier)

        def change(head: Revision, policy: Policy) -> overrides.Change:
            now = self.clock.now
            if event.verb == "set":
                cell = ["4/minute", {"rate": "9/hour", "concurrency": 1, "lease": "20 seconds"}]
                return overrides.set_(head, policy, event.feature, who, cell, now=now)
            operation = overrides.close if event.verb == "close" else overrides.open_
            return operation(head, policy, event.feature, who, now=now)

        await self._publish(change)

    async def _publish(self, change: Callable[[Revision, Policy], overrides.Change]) -> None:
        for limiter in self.limiters:
            store = limiter._force.store
            assert store is not None
            head = await store.head()
            base = self._policy if head.base is None else self._pushed
            try:
                changed = change(head, base).revision
            except UsageError:
                continue  # such as opening what is not closed
            await store.publish(changed, seen=head)

    def _ends(self) -> set[int]:
        """Return the instants at which something that memory holds begins or ends."""
        memory, ends = self.memory, set[int]()
        for room in (memory._accounts, memory._strangers):
            for held in room.held.values():
                ends.update(unfold(held)[1])
        for holders in memory.slots._held.values():
            for (_, lease_us), free_at in holders.items():
                ends.update((free_at - lease_us, free_at))
        return ends | {until for until, _ in memory.records._held.values()}


def _instant(us: int) -> datetime:
    return datetime.fromtimestamp(us // SECOND, UTC)


def said(decision: Decision) -> tuple[object, ...]:
    """Return what a decision says, whichever store it is of."""
    pool = decision.pool
    return (
        *(decision.allowed, decision.reason, decision.tier, decision.retry_after),
        *(list(decision.debts), decision.fields()),
        pool and (pool.remaining, pool.denies),
        [(one.name, one.denies) for one in decision.slots],
        decision.lease is None,
    )


@pytest.mark.fault("A3", "A10", "D4", "G1")
@given(documents=st.lists(documents(), min_size=2, max_size=2), events=events)
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_limiters_in_memory_and_on_redis_decide_alike_while_policies_and_overrides_change(
    shared: Shared, documents: list[dict[str, Any]], events: list[Event]
) -> None:
    shared.clock.now = START

    async def run() -> None:
        twins = Twins(shared, documents)
        try:
            for event in events:
                await twins.happen(event)
        finally:
            await twins.close()

    shared.run(run())
