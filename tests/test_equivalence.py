"""Memory, Redis and the definition of a token bucket decide alike, to the microsecond."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract import DAY, HOUR, SECOND, START, Clock, charge, quota, shelf
from tests.reference import Reference
from tests.servers import RedisServer
from tieredlimit._core.quota import Quota
from tieredlimit._core.shelf import Shelf
from tieredlimit.backends import Charge, MemoryBackend, RedisBackend, Reply

YEAR_2200 = 7_258_118_400 * SECOND
RATES = [
    "1/second", "3/second", "10000/second", "7/minute", "5/hour", "7/3 hours", "1/day", "11/2 days",
    "1/30 days", "13/week",
]  # fmt: skip

numbers = itertools.count()


@dataclass(frozen=True)
class Step:
    """Move the clock, perhaps change the policy, then take.

    `charges` are (subject, quarters of a capacity, tokens more than that).
    """

    move_us: int
    policy: int
    charges: tuple[tuple[int, int, int], ...]


rates = st.builds(
    quota, st.sampled_from(RATES), st.just("x"), capacity=st.none() | st.integers(1, 12)
)


@st.composite
def policies(draw: st.DrawFn) -> list[list[Shelf]]:
    """Draw one to three policies, each a shelf per subject; names recur with other numbers."""
    subjects = draw(st.integers(1, 4))
    names = st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True)
    return [
        [
            shelf(*(_named(draw(rates), name) for name in draw(names)), tier=f"t{subject}")
            for subject in range(subjects)
        ]
        for _ in range(draw(st.integers(1, 3)))
    ]


moves = st.one_of(
    st.just(0),
    st.integers(-5, 5),
    st.integers(-3 * SECOND, 3 * SECOND),
    st.integers(-2 * HOUR, 2 * HOUR),
    st.integers(-2 * DAY, 40 * DAY),
    st.sampled_from([100, SECOND, 1_542_857_143, 12 * 60 * SECOND, DAY, -DAY, -HOUR]),
)
costs = st.tuples(
    st.integers(0, 3),
    st.sampled_from([0, 0, 0, 1, 2, 3, 4]),
    st.sampled_from([0, 1, 1, 1, 2, 3]),
)
steps = st.lists(
    st.builds(Step, moves, st.integers(0, 2), st.lists(costs, min_size=1, max_size=5).map(tuple)),
    min_size=1,
    max_size=8,
)


def _named(numbers: Quota, name: str) -> Quota:
    return Quota(name, numbers.rate, numbers.capacity, numbers.interval_us)


class Shared:
    """One server, one connection and one event loop for all examples."""

    def __init__(self, server: RedisServer, runner: asyncio.Runner) -> None:
        self.clock = Clock()
        self.redis = RedisBackend.from_url(server.url, clock=self.clock, timeout=30.0)
        self.run = runner.run


@pytest.fixture(scope="module")
def shared(redis_server: RedisServer) -> Iterator[Shared]:
    with asyncio.Runner() as runner:
        shared = Shared(redis_server, runner)
        yield shared
        runner.run(shared.redis.close())


@pytest.mark.fault("A2", "A3", "A4", "A8", "A9", "A11", "A12", "B2", "C3")
@given(
    start=st.just(START) | st.integers(SECOND, YEAR_2200),
    policies=policies(),
    steps=steps,
)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_memory_redis_and_the_definition_agree_on_every_decision_and_debt(
    shared: Shared, start: int, policies: list[list[Shelf]], steps: list[Step]
) -> None:
    example = f"e{next(numbers)}"
    clock = shared.clock
    clock.now = start
    memory = MemoryBackend(clock=clock)
    reference = Reference()
    defined_from = Fraction(0)

    async def run() -> None:
        nonlocal defined_from
        for step in steps:
            defined_from = max(defined_from, reference.last_turned_full(clock.now))
            clock.now = max(clock.now + step.move_us, -int(-defined_from // 1), 0)
            charges = _charges(example, policies[step.policy % len(policies)], step)

            by_definition = reference.take(charges, clock.now)
            in_memory = await memory.take(charges)
            in_redis = await shared.redis.take(charges)

            assert _said(in_memory) == by_definition
            assert in_redis == in_memory

    shared.run(run())


def _charges(example: str, shelves: list[Shelf], step: Step) -> list[Charge]:
    charges = []
    for subject, quarters, more in step.charges:
        on = shelves[subject % len(shelves)]
        cost = min(one.capacity for one in on.quotas) * quarters // 4 + more
        charges.append(charge(on, min(cost, max(q.capacity for q in on.quotas) + 1), example))
    return charges


def _said(reply: Reply) -> tuple[bool, list[int]]:
    return reply.allowed, list(reply.debts)


LONG_RUN = [
    ("7/3 hours", 3, 487_999_999),
    ("1/day", 2, 7_777_777_777),
    ("10000/second", 10_000, 37),
    ("1/30 days", 2, 999_983 * SECOND),
    ("11/7 minutes", 11, 13_000_003),
]


def admitted_by_definition(only: Quota, takes: int, elapsed_us: int) -> int:
    """Return how many single takes, one a step, a full bucket of two or more tokens admits.

    A step is shorter than the interval: asked so often, the bucket is never full again.
    """
    return min(takes, only.capacity + Fraction(elapsed_us, only.interval_us).__floor__())


@pytest.mark.fault("A9")
@pytest.mark.parametrize(("rate", "capacity", "step_us"), LONG_RUN)
async def test_memory_does_not_drift_over_half_a_million_takes_of_odd_rates(
    rate: str, capacity: int, step_us: int
) -> None:
    clock = Clock()
    memory = MemoryBackend(clock=clock)
    only = quota(rate, capacity=capacity)
    one = [charge(shelf(only))]
    admitted = 0

    for i in range(1, 500_000 // len(LONG_RUN) + 1):
        admitted += (await memory.take(one)).allowed
        if i % 101 == 0:
            assert admitted == admitted_by_definition(only, i, clock.now - START)
        clock.now += step_us


@pytest.mark.fault("A9")
@pytest.mark.parametrize(("rate", "capacity", "step_us"), LONG_RUN)
def test_redis_does_not_drift_over_thousands_of_takes_of_odd_rates(
    shared: Shared, rate: str, capacity: int, step_us: int
) -> None:
    clock = shared.clock
    clock.now = START - step_us
    only = quota(rate, capacity=capacity)
    one = [charge(shelf(only), 1, f"long{next(numbers)}")]
    admitted = takes = 0

    async def take_many() -> Sequence[Reply]:
        replies = []
        for _ in range(250):
            # One by one: those that are asked at once share a call, and its instant.
            clock.now += step_us
            replies.append(await shared.redis.take(one))
        return replies

    for _ in range(16):
        replies = shared.run(take_many())
        takes += len(replies)
        admitted += sum(reply.allowed for reply in replies)

        assert [reply.now for reply in replies] == sorted(reply.now for reply in replies)
        assert admitted == admitted_by_definition(only, takes, replies[-1].now - START)
