"""Decisions that share calls come out as if each had been sent alone."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.contract import DAY, HOUR, SECOND, START, Clock, charge, debts, quota, shelf
from tests.proxy import Proxy
from tests.reference import Reference
from tests.servers import Monitor, RedisServer
from tieredlimit import BackendError
from tieredlimit._core.keys import nameless
from tieredlimit._core.shelf import Shelf
from tieredlimit._core.stamp import Stamp
from tieredlimit.backends import Charge, RedisBackend, Reply
from tieredlimit.backends import redis as redis_module
from tieredlimit.backends.call import (
    MAX_DECISIONS,
    MAX_KEYS,
    Call,
    Script,
    Waiting,
    gather,
)
from tieredlimit.backends.calls import MAX_KEYS_OF_ONE, Calls
from tieredlimit.backends.replies import Answer, Refusal

PATIENT = 10.0
IMPATIENT = 0.05
RATES = ["1/second", "7/minute", "5/hour", "7/3 hours", "1/day", "10000/second"]

numbers = itertools.count()


@pytest.fixture
async def backend(redis_url: str) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend.from_url(redis_url, clock=Clock(), timeout=PATIENT)
    await backend.open()
    yield backend
    await backend.close()


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    redis_server.command("FLUSHALL")
    async with Proxy(redis_server.port) as between:
        yield between


@pytest.fixture
async def behind(proxy: Proxy) -> AsyncIterator[RedisBackend]:
    """The same server, behind the proxy."""
    backend = RedisBackend.from_url(proxy.url, clock=Clock(), timeout=PATIENT)
    await backend.open()
    yield backend
    await backend.close()


@dataclass
class Sent:
    """What left, call by call, and how many calls were in flight with each."""

    calls: list[list[Sequence[Charge]]] = field(default_factory=list)
    in_flight: list[int] = field(default_factory=list)

    @property
    def decisions(self) -> list[Sequence[Charge]]:
        return [charges for call in self.calls for charges in call]


def watch(backend: RedisBackend, monkeypatch: pytest.MonkeyPatch) -> Sent:
    """Record from now on what leaves."""
    sent = Sent()
    link, calls = backend._session()
    next_call = calls.next_call

    def recorded(slots: int) -> Call | None:
        call = next_call(slots)
        if call is not None:
            sent.calls.append([one.charges for one in call.decisions])
            sent.in_flight.append(len(link._sent) + 1)
        return call

    monkeypatch.setattr(calls, "next_call", recorded)
    return sent


async def one_turn() -> None:
    """Let every task run that can."""
    turn = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(turn.set_result, None)
    await turn


def together(
    backend: RedisBackend, decisions: Sequence[Sequence[Charge]]
) -> list[asyncio.Future[Reply]]:
    return [asyncio.ensure_future(backend.take(charges)) for charges in decisions]


async def resolved(callers: Sequence[asyncio.Future[Reply]]) -> list[Reply | BaseException]:
    """Return what became of callers, none of which may wait for ever."""
    async with asyncio.timeout(2 * PATIENT):
        return await asyncio.gather(*callers, return_exceptions=True)


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


@st.composite
def cells(draw: st.DrawFn) -> list[Shelf]:
    """Draw one to three cells, of one to three quotas each."""
    rates = st.tuples(st.sampled_from(RATES), st.none() | st.integers(1, 12))
    return [
        shelf(
            *(
                quota(rate, name, capacity=capacity)
                for name, (rate, capacity) in zip(
                    "abc", draw(st.lists(rates, min_size=1, max_size=3)), strict=False
                )
            ),
            tier=f"t{i}",
        )
        for i in range(draw(st.integers(1, 3)))
    ]


# (which cell, which subject, cost), any number of them a decision, any number of these at once.
charges = st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([0, 1, 1, 1, 2, 3, 13]))
batches = st.lists(st.lists(charges, max_size=4), min_size=1, max_size=24)
moves = st.sampled_from([0, 1, 99, SECOND, 1_542_857_143, HOUR, DAY])


@pytest.mark.fault("A3", "A4", "A12")
@given(cells=cells(), steps=st.lists(st.tuples(moves, batches), min_size=1, max_size=4))
@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_decisions_sent_together_come_out_as_one_by_one_and_as_defined(
    shared: Shared, cells: list[Shelf], steps: list[tuple[int, list[list[tuple[int, int, int]]]]]
) -> None:
    example = next(numbers)
    shared.clock.now = START
    reference = Reference()

    def decisions(batch: list[list[tuple[int, int, int]]], way: str) -> list[list[Charge]]:
        return [
            [
                charge(cells[cell % len(cells)], cost, f"{way}{example}.{subject}")
                for cell, subject, cost in one
            ]
            for one in batch
        ]

    async def run() -> None:
        for move_us, batch in steps:
            shared.clock.now += move_us

            defined = [
                reference.take(one, shared.clock.now) for one in decisions(batch, "together")
            ]
            at_once = await asyncio.gather(
                *(shared.redis.take(one) for one in decisions(batch, "together"))
            )
            alone = [await shared.redis.take(one) for one in decisions(batch, "alone")]

            assert [(reply.allowed, list(reply.debts)) for reply in at_once] == defined
            assert at_once == alone

    shared.run(run())


class TestBounds:
    async def test_account_is_served_in_order_of_arrival(self, backend: RedisBackend) -> None:
        image = [charge(shelf(quota("1/second", capacity=200)))]

        replies = await asyncio.gather(*(backend.take(image) for _ in range(500)))

        assert replies == [(i < 200, START, [min(i + 1, 200) * SECOND]) for i in range(500)]

    async def test_calls_stay_within_their_bounds_and_carry_all_in_order(
        self, backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = watch(backend, monkeypatch)
        image = shelf(quota("5/hour"))
        small = [[charge(image, 1, f"s{i}")] for i in range(500)]
        wide = [[charge(image, 1, f"w{i}.{j}") for j in range(70)] for i in range(60)]
        huge = [[charge(image, 1, f"h{i}") for i in range(MAX_KEYS + 300)]]
        everything = [*small, *wide, *huge, *small[:3], *wide[:3]]

        replies = await asyncio.gather(*together(backend, everything))

        keys = [sum(map(len, call)) for call in sent.calls]
        assert all(reply.allowed for reply in replies)
        assert sent.decisions == everything
        assert max(map(len, sent.calls)) == MAX_DECISIONS
        assert max(count for count in keys if count != MAX_KEYS + 300) <= MAX_KEYS
        assert [len(call) for call in sent.calls if huge[0] in call] == [1]
        assert max(sent.in_flight) == redis_module.IN_FLIGHT == 2

    async def test_idle_limiter_sends_a_decision_at_once_and_alone(
        self, backend: RedisBackend, redis_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = watch(backend, monkeypatch)
        image = [charge(shelf(quota("5/hour")))]

        async with Monitor(redis_url) as monitor:
            for count in range(1, 4):
                take = asyncio.ensure_future(backend.take(image))
                await one_turn()
                assert len(sent.calls) == count
                await take
            commands = [command.split()[0] for command in await monitor.commands()]

        assert commands == ["EVALSHA"] * 3
        assert [len(call) for call in sent.calls] == [1, 1, 1]

    @pytest.mark.parametrize("count", [255, 256, 257, 5_000])
    async def test_decision_of_hundreds_of_keys_is_one_decision(
        self, backend: RedisBackend, count: int
    ) -> None:
        image, tight = shelf(quota("5/hour")), shelf(quota("1/hour"), tier="tight")
        many = [charge(image, 1, f"u{i}") for i in range(count - 1)]

        before, denied, allowed, after = await asyncio.gather(
            backend.take([charge(image, 2, "u0")]),
            backend.take([*many, charge(tight, 2)]),
            backend.take([*many, charge(tight, 1)]),
            backend.take([charge(image, 3, "u0")]),
        )

        assert (before.allowed, denied.allowed, allowed.allowed) == (True, False, True)
        fifth = HOUR // 5
        assert list(denied.debts) == [2 * fifth] + [0] * (count - 1)
        assert list(allowed.debts) == [3 * fifth] + [fifth] * (count - 2) + [HOUR]
        assert after == (False, START, [3 * fifth])

    async def test_decision_of_more_keys_than_can_be_counted_is_an_error_for_it_alone(
        self, backend: RedisBackend
    ) -> None:
        one = charge(shelf(quota("5/hour")))

        good, bad = await resolved(together(backend, [[one], [one] * (MAX_KEYS_OF_ONE + 1)]))

        assert isinstance(good, Reply)
        assert str(bad) == "a decision may have at most 65535 keys, got 65536"

    async def test_charge_that_cannot_be_written_is_an_error_for_its_caller_alone(
        self, backend: RedisBackend
    ) -> None:
        one = charge(shelf(quota("5/hour")))
        takes = [[one], [one], [one], [one._replace(cost=10**400)], [one._replace(key="\ud800")]]

        *good, cost, key = await resolved(together(backend, [*takes[:3], takes[3], takes[4]]))

        assert all(isinstance(reply, Reply) for reply in good)
        assert isinstance(cost, OverflowError)
        assert isinstance(key, UnicodeEncodeError)

    async def test_what_is_decided_is_not_kept_until_its_deadline(
        self, backend: RedisBackend
    ) -> None:
        image = [charge(shelf(quota("5/hour")))]
        _, calls = backend._session()

        for _ in range(20):
            await asyncio.gather(*(backend.take(image) for _ in range(50)))
        await backend.take(image)

        assert len(calls._deadlines) == 1
        assert not calls.waiting


class TestCallersThatGiveUp:
    @pytest.mark.parametrize("seed", range(4))
    async def test_thousand_callers_cancelled_at_random_hang_nobody_and_charge_nothing_twice(
        self, backend: RedisBackend, monkeypatch: pytest.MonkeyPatch, seed: int
    ) -> None:
        rng = random.Random(seed)
        sent = watch(backend, monkeypatch)
        one = charge(shelf(quota("1/second", capacity=5_000)))
        callers: list[asyncio.Future[Reply]] = []

        for _ in range(20):
            callers += together(backend, [[one]] * 50)
            for _ in range(rng.randrange(4)):
                await one_turn()
            for caller in rng.sample(callers[-60:], rng.randrange(40)):
                caller.cancel()
        replies = await resolved(callers)
        executed = len(sent.decisions)
        link, calls = backend._session()
        later = await backend.take([one])

        served = [reply for reply in replies if isinstance(reply, Reply)]
        cancelled = [reply for reply in replies if isinstance(reply, asyncio.CancelledError)]
        assert len(served) + len(cancelled) == 1_000
        assert served
        assert cancelled
        assert len(served) <= executed <= 1_000
        assert later == (True, START, [(executed + 1) * SECOND])
        assert len({reply.debts[0] for reply in served}) == len(served)
        assert [reply.debts[0] for reply in served] == sorted(reply.debts[0] for reply in served)
        assert (calls.waiting, len(link._sent)) == (False, 0)

    async def test_callers_more_impatient_than_the_deadline_leave_no_dead_queue_behind(
        self, bare: Bare
    ) -> None:
        for _ in range(5):
            bare.calls.add([]).cancel()

        await bare.expired.wait()

        assert not bare.calls.waiting
        assert bare.calls.next_call() is None

    async def test_decision_fails_at_its_own_deadline_and_leaves_those_of_its_call_alone(
        self, bare: Bare
    ) -> None:
        hasty = bare.calls.add([])
        bare.calls._timeout = PATIENT
        patient = bare.calls.add([])
        call = bare.next_call()

        with pytest.raises(BackendError, match=r"did not answer within"):
            await hasty
        was_done = patient.done()
        bare.calls.answer(call, [START, 1, 1])

        assert not was_done
        assert await patient == (True, START, [])

    async def test_deadline_of_a_later_decision_is_kept_though_the_first_was_decided(
        self, bare: Bare
    ) -> None:
        first = bare.calls.add([])
        bare.calls.answer(bare.next_call(), [START, 1])
        second = bare.calls.add([])

        with pytest.raises(BackendError, match=r"did not answer within"):
            await second

        assert first.result().allowed


class TestFailures:
    async def test_refused_call_gives_each_of_its_decisions_an_error_of_its_own(
        self, bare: Bare
    ) -> None:
        futures = [bare.calls.add([]) for _ in range(3)]
        call = bare.next_call()
        waiting = bare.calls.add([])
        futures[1].cancel()

        wrong = bare.calls.answer(call, Refusal("ERR no"))

        first, second = futures[0].exception(), futures[2].exception()
        assert wrong is None
        assert str(first) == str(second) == "Redis refused: ERR no"
        assert first is not second
        assert not waiting.done()
        bare.calls.fail_waiting("closed")
        assert str(waiting.exception()) == "closed"

    @pytest.mark.parametrize(
        "reply",
        ["OK", [], [START], [START, 1], [START, 1, 1, 1]],
    )
    async def test_reply_of_another_shape_fails_the_call_and_is_told(
        self, bare: Bare, reply: Answer
    ) -> None:
        futures = [bare.calls.add([]) for _ in range(2)]

        wrong = bare.calls.answer(bare.next_call(), reply)

        assert wrong == "a reply of another kind than was asked for"
        for future in futures:
            assert str(future.exception()).startswith("Redis answered what is no decision: ")

    async def test_reply_that_names_no_key_of_the_decision_is_an_error(self, bare: Bare) -> None:
        future = bare.calls.add([])

        bare.calls.answer(bare.next_call(), [START, -7])

        assert "holds what is no bucket" in str(future.exception())

    @pytest.mark.fault("F7")
    async def test_broken_key_fails_only_the_decisions_that_charge_it(
        self,
        backend: RedisBackend,
        redis_server: RedisServer,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sent = watch(backend, monkeypatch)
        image = shelf(quota("5/hour"))
        lists, text, good = (charge(image, 1, name) for name in ("lists", "text", "good"))
        redis_server.command("RPUSH", lists.key, "x")
        redis_server.command("SET", text.key, "x" * 13)
        takes = [
            [good],
            [good],
            [good],
            [lists],
            [good, text],
            [good],
            [text, lists],
            [good, lists],
        ]

        replies = await resolved(together(backend, takes))

        assert max(map(len, sent.calls)) == 6
        for i, broken in ((3, lists), (4, text), (6, text), (7, lists)):
            cell = nameless(broken.key)
            assert str(replies[i]) == f"Redis holds what is no bucket under a key of {cell}"
        assert [replies[i] for i in (0, 1, 2, 5)] == [
            (True, START, [(i + 1) * HOUR // 5]) for i in range(4)
        ]
        assert await debts(backend, good) == [4 * HOUR // 5]

    @pytest.mark.fault("F2")
    async def test_lost_script_costs_no_decision_of_a_call(
        self, backend: RedisBackend, redis_server: RedisServer, redis_url: str
    ) -> None:
        one = charge(shelf(quota("1/second", capacity=500)))
        redis_server.command("SCRIPT", "FLUSH")

        async with Monitor(redis_url) as monitor:
            replies = await asyncio.gather(*(backend.take([one]) for _ in range(300)))
            commands = [command.split()[0] for command in await monitor.commands()]

        assert [list(reply.debts) for reply in replies] == [[(i + 1) * SECOND] for i in range(300)]
        assert commands.count("EVAL") == 2
        assert commands[:2] == ["EVALSHA", "EVALSHA"]

    @pytest.mark.fault("F2")
    async def test_lost_script_is_sent_only_for_those_that_still_wait_and_only_once(
        self, bare: Bare
    ) -> None:
        gone, stays = [bare.calls.add([]) for _ in range(2)]
        lost = Refusal("NOSCRIPT No matching script")
        assert bare.calls.answer(bare.next_call(), lost) is None
        alone = bare.calls.add([])
        gone.cancel()

        again = bare.next_call()
        bare.calls.answer(again, lost)
        bare.calls.answer(bare.next_call(), lost)
        alone.cancel()

        assert b"EVAL\r\n" in again.command
        assert [one.future for one in again.decisions] == [stays]
        assert str(stays.exception()) == "Redis refused: NOSCRIPT No matching script"
        assert bare.calls.next_call() is None

    @pytest.mark.fault("F2", "F10")
    async def test_connection_that_breaks_after_a_lost_script_leaves_nobody_waiting(
        self,
        proxy: Proxy,
        behind: RedisBackend,
        redis_server: RedisServer,
    ) -> None:
        one = charge(shelf(quota("1/second", capacity=500)))
        await behind.take([one._replace(cost=0)])
        redis_server.command("SCRIPT", "FLUSH")
        proxy.cut = True

        replies = await resolved(together(behind, [[one]] * 50))
        proxy.heal()
        await resolved(together(behind, [[one._replace(cost=0)]]))  # may meet the cut connection
        after = await behind.take([one._replace(cost=0)])

        assert {type(reply) for reply in replies} <= {BackendError, Reply}
        assert BackendError in {type(reply) for reply in replies}
        assert after.debts[0] <= 50 * SECOND

    @pytest.mark.fault("F1", "F10")
    async def test_what_waits_when_the_connection_breaks_is_served_over_another(
        self, proxy: Proxy, behind: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sent = watch(behind, monkeypatch)
        one = charge(shelf(quota("1/second", capacity=500)))
        proxy.flow.clear()
        callers = together(behind, [[one]] * 40)
        await one_turn()

        proxy.heal()
        replies = await resolved(callers)

        for lost in replies[:2]:
            assert str(lost).startswith("the connection to Redis broke")
        assert all(isinstance(reply, Reply) and reply.allowed for reply in replies[2:])
        assert len(sent.decisions) == 40
        assert proxy.connections == 2

    async def test_connection_found_closed_before_sending_costs_no_decision(
        self, proxy: Proxy, behind: RedisBackend
    ) -> None:
        link, _ = behind._session()
        assert link._line is not None
        link._line.transport.close()

        reply = await behind.take([charge(shelf(quota("5/hour")))])

        assert reply == (True, START, [HOUR // 5])
        assert proxy.connections == 2

    async def test_connection_that_broke_as_soon_as_it_was_made_is_made_again_for_who_waits(
        self, proxy: Proxy, behind: RedisBackend
    ) -> None:
        await behind.close()
        link, _ = behind._session()
        opening = asyncio.ensure_future(behind.open())
        await one_turn()
        callers = together(behind, [[charge(shelf(quota("5/hour")))]] * 3)
        # In the very turn in which it is made, before anybody hears of it.
        assert link._opening is not None
        link._opening.remove_done_callback(link._opened)
        link._opening.add_done_callback(lambda _: link.drop("broken at once"))
        link._opening.add_done_callback(link._opened)
        await opening

        replies = await resolved(callers)

        assert [isinstance(reply, Reply) for reply in replies] == [True] * 3
        assert proxy.connections == 3

    @pytest.mark.parametrize("task", ["_keeper", "_opening"])
    async def test_tasks_that_are_cancelled_from_outside_fail_what_waits_and_later_takes_work(
        self, proxy: Proxy, behind: RedisBackend, task: str
    ) -> None:
        image = [charge(shelf(quota("50/hour")))]
        link, _ = behind._session()
        if task == "_opening":
            link.drop("to be made anew")
            proxy.gate.clear()
        proxy.flow.clear()
        callers = together(behind, [image] * 20)
        opening = asyncio.ensure_future(link.open())
        await one_turn()

        getattr(link, task).cancel()
        replies = await resolved(callers)
        opened = await asyncio.gather(opening, return_exceptions=True)
        proxy.gate.set()
        proxy.flow.set()
        later = await behind.take(image)

        assert {type(reply) for reply in replies} == {BackendError}
        assert [str(error) for error in opened if error] == (
            ["the connection to Redis was closed"] if task == "_opening" else []
        )
        assert later.allowed

    async def test_closing_fails_all_that_was_sent_or_waits_and_makes_no_connection_for_it(
        self, proxy: Proxy, behind: RedisBackend
    ) -> None:
        proxy.flow.clear()
        callers = together(behind, [[charge(shelf(quota("5/hour")))]] * 20)
        await one_turn()

        await behind.close()
        replies = await resolved(callers)

        assert {str(reply) for reply in replies} == {
            "the connection to Redis broke: closed",
            "the connection to Redis was closed",
        }
        assert proxy.connections == 1

    async def test_connection_that_cannot_even_be_begun_is_an_error(
        self, backend: RedisBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link, _ = backend._session()
        link.drop("to be made anew")
        monkeypatch.setattr(link, "_make_connection", {}.popitem)

        replies = await resolved(together(backend, [[charge(shelf(quota("5/hour")))]] * 5))

        assert {str(reply) for reply in replies} == {
            "cannot connect to Redis: 'popitem(): dictionary is empty'"
        }

    async def test_thirty_waiting_decisions_survive_a_loop_that_is_busy_beyond_their_deadline(
        self, redis_url: str
    ) -> None:
        backend = RedisBackend.from_url(redis_url, timeout=IMPATIENT)
        await backend.open()
        image = shelf(quota("5/hour"))
        callers = together(backend, [[charge(image, 1, f"u{i}")] for i in range(30)])
        await one_turn()

        until = time.monotonic() + 2 * IMPATIENT
        while time.monotonic() < until:
            pass
        replies = await resolved(callers)

        assert all(isinstance(reply, Reply) and reply.allowed for reply in replies)
        await backend.close()


@dataclass
class Bare:
    """The queue alone: nothing is sent."""

    calls: Calls
    expired: asyncio.Event

    def next_call(self) -> Call:
        call = self.calls.next_call()
        assert call is not None
        return call


@pytest.fixture
def bare() -> Bare:
    expired = asyncio.Event()
    calls = Calls(
        Script("return 1"),
        clock=None,
        timeout=IMPATIENT,
        learn_clock=lambda now: None,
        expired=expired.set,
    )
    return Bare(calls, expired)


async def test_loop_that_was_frozen_grants_one_more_timeout_and_not_as_long_again(
    bare: Bare, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    later = loop.call_later
    delays: list[float] = []

    def recorded(delay: float, *rest: Any) -> Any:
        delays.append(delay)
        return later(0, *rest)

    monkeypatch.setattr(loop, "call_later", recorded)
    taking = bare.calls.add([charge(shelf(quota("5/hour")))])
    bare.calls._due -= 600  # as after ten minutes in a frozen container

    bare.calls._expire()
    taking.cancel()
    await bare.expired.wait()

    assert delays == [bare.calls._timeout]


def test_decisions_prepared_for_other_times_never_share_a_call() -> None:
    async def gathered() -> list[int]:
        loop = asyncio.get_running_loop()
        stamps = [Stamp("test", 0, 1, "ab", 0, 9), Stamp("test", 0, 1, "ab", 9, None)]
        queue = deque(Waiting(loop.create_future(), (), one, None) for one in stamps)
        return [len(gather(queue)), len(gather(queue))]

    assert asyncio.run(gathered()) == [1, 1]
