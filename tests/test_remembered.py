"""Looked-up accounts, remembered for a moment, and never longer or more of them than was said."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import HTTPConnection

from tieredlimit import Account, BackendError, UsageError
from tieredlimit._core.kept import Kept
from tieredlimit.identity import Remembered, api_key, remember, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

FREE, PRO = Account("u1", plan="free"), Account("u1", plan="pro")


class Seconds:
    """A clock that stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Billing:
    """Look accounts up, and note what was asked; async lookups wait until they are let."""

    def __init__(self, **accounts: Account) -> None:
        self.accounts = accounts
        self.asked: list[str] = []
        self.gate = asyncio.Event()

    def now(self, key: str) -> Account | None:
        self.asked.append(key)
        return self.accounts.get(key)

    async def later(self, key: str) -> Account | None:
        self.asked.append(key)
        account = self.accounts.get(key)
        await self.gate.wait()
        return account

    async def failing(self, key: str) -> Account | None:
        self.asked.append(key)
        await self.gate.wait()
        raise ConnectionError("the database is down")


async def leave(*waiting: asyncio.Future[Any]) -> None:
    for one in waiting:
        one.cancel()
    await asyncio.wait(waiting)
    await asyncio.sleep(0)


def on_a_loop_that_ends(ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it on an event loop that is closed with whatever still waits there."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask())
    loop.close()


def tasks_of_lookups() -> list[asyncio.Task[Any]]:
    return [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]


@pytest.fixture
def clock() -> Seconds:
    return Seconds()


class TestKept:
    @given(
        most=st.integers(0, 4),
        steps=st.lists(
            st.tuples(
                st.sampled_from(["get", "put", "drop", "wait"]),
                st.sampled_from("abcde"),
                st.integers(0, 5),
            ),
            max_size=60,
        ),
    )
    def test_it_does_what_a_list_in_order_of_use_would_do(
        self, most: int, steps: list[tuple[str, str, int]]
    ) -> None:
        kept: Kept[str, int] = Kept(most)
        model: list[tuple[str, int, int]] = []
        now = 0

        for number, (step, key, seconds) in enumerate(steps):
            found = next((one for one in model if one[0] == key), None)
            rest = [one for one in model if one[0] != key]
            if step == "wait":
                now += seconds
            elif step == "drop":
                kept.drop(key)
                model = rest
            elif step == "put":
                kept.put(key, number, now + seconds)
                model = [*rest, (key, number, now + seconds)]
                model = model[-most:] if most else []
            elif found is None or found[2] <= now:
                assert kept.get(key, now) is None
                model = rest
            else:
                assert kept.get(key, now) == (found[1],)
                model = [*rest, found]
            assert len(kept) == len(model) <= most


class TestRemember:
    def test_a_key_is_looked_up_once_until_its_time_is_over(self, clock: Seconds) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.now, 30, clock=clock)

        first = [lookup("k"), lookup("k")]
        billing.accounts["k"] = PRO
        clock.now += 29.999
        still = lookup("k")
        clock.now += 0.001
        then = lookup("k")

        assert (first, still, then) == ([FREE, FREE], FREE, PRO)
        assert billing.asked == ["k", "k"]

    def test_a_key_without_an_account_is_remembered_for_its_own_time(self, clock: Seconds) -> None:
        billing = Billing()
        lookup = remember(billing.now, 30, missing_seconds=2, clock=clock)

        assert (lookup("k"), lookup("k")) == (None, None)
        billing.accounts["k"] = FREE
        clock.now += 2

        assert lookup("k") is FREE
        assert billing.asked == ["k", "k"]

    def test_a_key_without_an_account_is_not_remembered_where_that_is_said(self) -> None:
        billing = Billing()
        lookup = remember(billing.now, missing_seconds=0)

        assert (lookup("k"), lookup("k")) == (None, None)
        assert billing.asked == ["k", "k"]

    def test_what_a_lookup_raises_is_not_remembered(self) -> None:
        asked = []

        def failing(key: str) -> Account:
            asked.append(key)
            raise ConnectionError("the database is down")

        lookup = remember(failing)

        for _ in range(2):
            with pytest.raises(ConnectionError):
                lookup("k")
        assert asked == ["k", "k"]

    async def test_what_is_no_account_is_passed_on_and_not_remembered(self) -> None:
        asked = []

        def wrong(key: str) -> Any:
            asked.append(key)
            return {"id": key}

        lookup = remember(wrong)

        for _ in range(2):
            with pytest.raises(UsageError, match="type dict"):
                await resolve(lookup("k"))
        assert asked == ["k", "k"]

    def test_strangers_who_try_keys_do_not_crowd_out_an_account(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.now, most=3)
        lookup("k")

        for i in range(1_000):
            lookup(f"stranger-{i}")
        lookup("k")

        assert billing.asked.count("k") == 1
        assert len(lookup) == 4

    def test_the_account_least_recently_asked_for_makes_room(self) -> None:
        billing = Billing(a=FREE, b=FREE, c=FREE)
        lookup = remember(billing.now, most=2)

        for key in "abaca":
            lookup(key)
        lookup("b")

        assert billing.asked == ["a", "b", "c", "b"]

    def test_a_forgotten_key_is_looked_up_anew_and_others_are_not(self) -> None:
        billing = Billing(k=FREE, other=FREE)
        lookup = remember(billing.now)
        lookup("k"), lookup("other"), lookup("nobody")
        billing.accounts.update(k=PRO, nobody=FREE)

        lookup.forget("k")
        lookup.forget("nobody")

        assert (lookup("k"), lookup("nobody"), lookup("other")) == (PRO, FREE, FREE)
        assert billing.asked.count("other") == 1

    def test_all_keys_can_be_forgotten_at_once(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.now)
        lookup("k"), lookup("nobody")

        lookup.clear()

        assert len(lookup) == 0
        assert lookup("k") is FREE
        assert billing.asked == ["k", "nobody", "k"]

    def test_a_key_forgotten_while_it_is_looked_up_is_not_remembered(self) -> None:
        billing = Billing(k=FREE)

        def changing(key: str) -> Account | None:
            account = billing.now(key)
            lookup.forget(key)  # the plan changes, and another thread says so
            return account

        lookup = remember(changing)

        lookup("k"), lookup("k")

        assert billing.asked == ["k", "k"]

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            ({"seconds": 0}, "seconds must be more than 0"),
            ({"seconds": 86_401}, "at most 86,400"),
            ({"seconds": float("nan")}, "seconds"),
            ({"seconds": True}, "seconds"),
            ({"seconds": 2, "missing_seconds": 3}, "missing_seconds must be from 0 to seconds"),
            ({"missing_seconds": -1}, "missing_seconds"),
            ({"most": 0}, "most must be from 1"),
            ({"most": 10**7}, "most must be from 1"),
            ({"patience": 0}, "patience must be more than 0, at most 86,400, or None, got 0"),
            ({"patience": float("inf")}, "patience"),
            ({"lookup": "k"}, "takes a lookup"),
        ],
    )
    def test_bounds_are_checked_at_once(self, arguments: dict[str, Any], named: str) -> None:
        with pytest.raises(UsageError, match=named):
            remember(**{"lookup": Billing().now, **arguments})

    def test_an_identify_is_refused_in_the_place_of_a_lookup(self) -> None:
        identify: Remembered[Any] = remember(lambda _: FREE)

        with pytest.raises(UsageError, match="around a lookup"):
            identify(HTTPConnection({"type": "http", "headers": []}))

    def test_threads_share_what_is_remembered(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.now)
        lookup("k")
        found: list[object] = []

        thread = threading.Thread(target=lambda: found.append(lookup("k")))
        thread.start()
        thread.join()

        assert (found, billing.asked) == ([FREE], ["k"])

    @given(
        steps=st.lists(
            st.tuples(
                st.sampled_from(["ask", "change", "wait", "forget"]),
                st.sampled_from("ab"),
                st.integers(0, 6),
            ),
            max_size=60,
        )
    )
    def test_no_answer_is_older_than_was_said(self, steps: list[tuple[str, str, int]]) -> None:
        clock = Seconds()
        seconds, missing = 5, 2
        plans: dict[str, list[tuple[float, Account | None]]] = {
            key: [(clock.now, None)] for key in "ab"
        }
        forgotten = dict.fromkeys("ab", 0.0)
        lookup: Remembered[str] = remember(
            lambda key: plans[key][-1][1], seconds, missing_seconds=missing, clock=clock
        )

        for step, key, number in steps:
            if step == "wait":
                clock.now += number
            elif step == "change":
                plans[key].append((clock.now, Account(key, plan=str(number)) if number else None))
            elif step == "forget":
                lookup.forget(key)
                forgotten[key] = clock.now
                plans[key] = plans[key][-1:]
            else:
                answer = lookup(key)
                oldest = clock.now - (missing if answer is None else seconds)
                # What was in force at the oldest instant that is allowed, and all since.
                before = [at for at, _ in plans[key] if at <= oldest]
                since = max(before, default=0.0)
                assert answer in [one for at, one in plans[key] if at >= since]


class TestRememberLater:
    async def test_those_who_ask_for_a_key_at_once_share_one_lookup(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        asking = [asyncio.ensure_future(resolve(lookup("k"))) for _ in range(50)]
        other = asyncio.ensure_future(resolve(lookup("other")))
        await asyncio.sleep(0)

        billing.gate.set()

        assert await asyncio.gather(*asking) == [FREE] * 50
        assert await other is None
        assert billing.asked == ["k", "other"]
        assert lookup("k") is FREE

    async def test_who_leaves_does_not_take_the_answer_from_the_others(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        first, second = (asyncio.ensure_future(resolve(lookup("k"))) for _ in range(2))
        await asyncio.sleep(0)

        first.cancel()
        await asyncio.wait([first])
        billing.gate.set()

        assert first.cancelled()
        assert await second is FREE

    async def test_lookup_that_nobody_waits_for_any_more_is_cancelled_and_asked_anew(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later, patience=None)
        waiting = [asyncio.ensure_future(resolve(lookup("k"))) for _ in range(2)]
        others = [asyncio.ensure_future(resolve(lookup(f"stranger-{i}"))) for i in range(50)]
        await asyncio.sleep(0)

        await leave(*waiting, *others)
        left = (lookup._underway, tasks_of_lookups())
        billing.gate.set()

        assert left == ({}, [])
        assert await resolve(lookup("k")) is FREE
        assert billing.asked.count("k") == 2

    async def test_who_leaves_before_the_lookup_has_begun_leaves_nothing_behind(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        waiting: Any = lookup("k")
        waiting.send(None)

        waiting.close()
        await asyncio.sleep(0)

        assert (lookup._underway, tasks_of_lookups()) == ({}, [])

    async def test_who_begins_to_wait_after_all_others_have_left_asks_anew(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        first = asyncio.ensure_future(resolve(lookup("k")))
        late = lookup("k")
        await asyncio.sleep(0)

        await leave(first)
        billing.gate.set()

        assert await resolve(late) is FREE
        assert billing.asked == ["k", "k"]

    async def test_lookup_that_does_not_answer_in_time_is_no_decision_and_asked_anew(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later, patience=0.001)
        waiting = [resolve(lookup("k")) for _ in range(3)]

        failed = await asyncio.gather(*waiting, return_exceptions=True)
        billing.gate.set()

        assert [type(one) for one in failed] == [BackendError] * 3
        assert str(failed[0]) == "the lookup of an account did not answer within 0.001 s"
        assert await resolve(lookup("k")) is FREE
        assert billing.asked == ["k", "k"]

    async def test_lookup_that_will_not_be_cancelled_holds_up_nobody(self) -> None:
        gate = asyncio.Event()
        asked = []

        async def stubborn(key: str) -> Account:
            asked.append(key)
            while len(asked) == 1 and not gate.is_set():
                with suppress(asyncio.CancelledError):
                    await gate.wait()
            return FREE

        lookup = remember(stubborn, patience=0.001)
        with pytest.raises(BackendError):
            await resolve(lookup("k"))

        found = await resolve(lookup("k"))
        gate.set()
        await asyncio.gather(*tasks_of_lookups())

        assert (found, asked) == (FREE, ["k", "k"])

    async def test_lookup_that_is_late_is_not_joined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later, patience=60)
        loop = asyncio.get_running_loop()
        lookup("k").close()  # type: ignore[union-attr]  # whoever asked has left
        start = loop.time()

        joined = lookup("k")
        monkeypatch.setattr(loop, "time", lambda: start + 61)
        anew = lookup("k")
        monkeypatch.undo()
        billing.gate.set()

        assert (await resolve(joined), await resolve(anew)) == (FREE, FREE)
        assert billing.asked == ["k", "k"]

    async def test_no_more_keys_are_under_way_than_was_said_and_further_ones_ask_by_themselves(
        self,
    ) -> None:
        billing = Billing(c=PRO)
        lookup = remember(billing.later, most=2)
        asking = [asyncio.ensure_future(resolve(lookup(key))) for key in "abcabc"]
        await asyncio.sleep(0)

        underway = sum(len(keys) for keys in lookup._underway.values())
        billing.gate.set()
        found = await asyncio.gather(*asking)

        assert underway == 2
        assert found == [None, None, PRO] * 2
        assert billing.asked == ["a", "b", "c", "c"]
        assert (lookup("a"), lookup("b"), len(lookup)) == (None, None, 2)

    async def test_a_failure_reaches_all_who_wait_and_is_not_remembered(self) -> None:
        billing = Billing()
        lookup = remember(billing.failing)
        asking = [asyncio.ensure_future(resolve(lookup("k"))) for _ in range(3)]
        await asyncio.sleep(0)

        billing.gate.set()
        failed = await asyncio.gather(*asking, return_exceptions=True)
        with pytest.raises(ConnectionError):
            await resolve(lookup("k"))

        assert [type(one) for one in failed] == [ConnectionError] * 3
        assert billing.asked == ["k", "k"]

    async def test_the_time_counts_from_the_question_and_not_from_the_answer(
        self, clock: Seconds
    ) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later, 30, clock=clock)
        asking = asyncio.ensure_future(resolve(lookup("k")))
        await asyncio.sleep(0)
        clock.now += 20
        billing.gate.set()
        await asking

        clock.now += 10

        await resolve(lookup("k"))
        assert billing.asked == ["k", "k"]

    async def test_a_key_forgotten_meanwhile_is_asked_anew_by_those_who_come_later(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        early = asyncio.ensure_future(resolve(lookup("k")))
        await asyncio.sleep(0)

        billing.accounts["k"] = PRO
        lookup.forget("k")
        late = asyncio.ensure_future(resolve(lookup("k")))
        await asyncio.sleep(0)
        billing.gate.set()

        assert (await early, await late) == (FREE, PRO)
        assert lookup("k") is PRO

    async def test_each_event_loop_waits_for_a_lookup_of_its_own(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        asked, leave = threading.Event(), threading.Event()

        async def wait_elsewhere() -> None:
            waiting = asyncio.ensure_future(resolve(lookup("k")))
            await asyncio.sleep(0)
            asked.set()
            await asyncio.to_thread(leave.wait)
            waiting.cancel()

        elsewhere = threading.Thread(target=asyncio.run, args=(wait_elsewhere(),))
        elsewhere.start()
        await asyncio.to_thread(asked.wait)
        billing.gate = asyncio.Event()
        billing.gate.set()
        found = await resolve(lookup("k"))
        leave.set()
        await asyncio.to_thread(elsewhere.join)

        assert (found, billing.asked) == (FREE, ["k", "k"])

    async def test_what_waits_on_a_loop_that_is_gone_is_not_kept(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)

        async def ask() -> None:
            lookup("k").close()  # type: ignore[union-attr]  # whoever asked has left
            await asyncio.sleep(0)

        await asyncio.to_thread(on_a_loop_that_ends, ask)
        billing.gate = asyncio.Event()
        billing.gate.set()

        assert await resolve(lookup("k")) is FREE
        assert lookup._underway == {}

    async def test_who_waited_on_a_loop_that_is_gone_is_collected_without_complaint(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unraisable: list[object] = []
        monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
        billing = Billing(k=FREE)
        lookup = remember(billing.later)

        async def ask() -> None:
            waiting: Any = asyncio.ensure_future(resolve(lookup("k")))
            waiting._log_destroy_pending = False  # asyncio's own
            await asyncio.sleep(0)

        await asyncio.to_thread(on_a_loop_that_ends, ask)
        billing.gate = asyncio.Event()
        billing.gate.set()

        assert await resolve(lookup("k")) is FREE
        gc.collect()
        assert (unraisable, lookup._underway) == ([], {})

    def test_collector_may_end_who_waited_while_the_lock_is_held(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)

        async def ask() -> None:
            waiting: Any = lookup("k")
            waiting.send(None)
            with lookup._lock:
                waiting.close()

        thread = threading.Thread(target=asyncio.run, args=(ask(),), daemon=True)
        thread.start()
        thread.join(10)

        assert not thread.is_alive()
        assert lookup._underway == {}

    async def test_all_keys_forgotten_meanwhile_are_not_remembered(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)
        early = asyncio.ensure_future(resolve(lookup("k")))
        await asyncio.sleep(0)

        lookup.clear()
        billing.gate.set()

        assert await early is FREE
        assert len(lookup) == 0

    def test_without_an_event_loop_the_answer_is_left_to_be_awaited(self) -> None:
        billing = Billing(k=FREE)
        lookup = remember(billing.later)

        answers = [lookup("k"), lookup("k")]
        billing.gate.set()

        assert [asyncio.run(resolve(answer)) for answer in answers] == [FREE, FREE]
        assert len(lookup) == 0

    async def test_it_stands_between_an_api_key_and_its_lookup(self) -> None:
        billing = Billing(k=FREE)
        billing.gate.set()
        identify = api_key(remember(billing.later, seconds=30))
        scope = {"type": "http", "headers": [(b"x-api-key", b"k")]}

        for _ in range(3):
            assert await resolve(identify(HTTPConnection(scope))) is FREE

        assert billing.asked == ["k"]


def test_child_of_a_fork_waits_for_no_lock_and_no_lookup_of_the_parent() -> None:
    program = """
import asyncio, os, signal
from tests.test_remembered import FREE, Billing
from tieredlimit.identity import remember, resolve

async def ask():
    lookup("k").close()
    await asyncio.sleep(0)

def answered_in_the_child():
    signal.alarm(20)  # what waits for ever ends with a signal
    billing.gate = asyncio.Event()
    billing.gate.set()
    return asyncio.run(resolve(lookup("k"))) == FREE and list(lookup._underway) == []

billing = Billing(k=FREE)
lookup = remember(billing.later)
loop = asyncio.new_event_loop()
loop.run_until_complete(ask())
with lookup._lock:
    child = os.fork()
    if not child:
        os._exit(0 if answered_in_the_child() else 1)
assert os.waitpid(child, 0)[1] == 0
billing.gate.set()
loop.run_until_complete(resolve(lookup("k")))
loop.close()
"""

    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )

    assert (done.returncode, done.stderr) == (0, "")
