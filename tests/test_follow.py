"""Following: loaded once however many wait, put back where it was lost, given up in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tests.control_contract import PATIENCE, heartbeat
from tieredlimit import BackendError
from tieredlimit import follow as follow_module
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends import MemoryBackend
from tieredlimit.backends.control import MemoryControl, Published
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.errors import ConflictError
from tieredlimit.follow import Follower


def revision(number: int, word: str = "closed") -> Revision:
    return Revision(number, {"word": word})


class Leading:
    """Follow what is said, and remember it."""

    def __init__(self) -> None:
        self.adopted: list[Revision] = []
        self.complaints: list[str] = []
        self.compared = 0
        self.news = asyncio.Event()

    def standing(self) -> Revision:
        return self.adopted[-1] if self.adopted else NOTHING

    def adopt(self, revision: Revision) -> None:
        self.adopted.append(revision)
        self.news.set()

    def heartbeat(self) -> Heartbeat:
        return heartbeat()

    async def compare(self) -> None:
        self.compared += 1
        self.news.set()

    def complain(self, what: str, error: Exception) -> None:
        self.complaints.append(f"{what}: {error}")
        self.news.set()

    async def follows(self, number: int) -> None:
        await self.until(lambda: self.standing().number == number)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self.news.clear()
                if not condition():
                    await self.news.wait()


class Store(MemoryControl):
    """Count what is asked, hold back the head, fail on demand."""

    def __init__(self, backend: MemoryBackend) -> None:
        super().__init__(backend, "test", 1)
        self.asked = 0
        self.completed: list[int] = []
        self.repaired: list[int] = []
        self.beats = 0
        self.closed = 0
        self.retired: list[str] = []
        self.down: BackendError | None = None
        self.waited = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.changed: Callable[[], object] = lambda: None

    async def head(self) -> Revision:
        self.asked += 1
        self.waited.set()
        await self.gate.wait()
        if self.down is not None:
            raise self.down
        return await super().head()

    async def complete(self, revision: Revision) -> Published:
        self.completed.append(revision.number)
        self.changed()
        return await super().complete(revision)

    async def repair(self, shard_number: int, revision: Revision) -> Revision:
        self.repaired.append(shard_number)
        return await super().repair(shard_number, revision)

    async def beat(self, heartbeat: Heartbeat) -> None:
        self.beats += 1
        if self.down is not None:
            raise self.down
        await super().beat(heartbeat)

    async def retire(self, worker: str) -> None:
        self.retired.append(worker)
        await super().retire(worker)

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def store(backend: MemoryBackend) -> Store:
    return Store(backend)


@pytest.fixture
def other(backend: MemoryBackend) -> MemoryControl:
    """The store as another process has it."""
    return MemoryControl(backend, "test", 1)


@pytest.fixture
def leader(store: Store) -> Leading:
    leader = Leading()
    store.changed = leader.news.set
    return leader


@pytest.fixture
async def follower(
    leader: Leading, store: Store, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Follower]:
    """One that neither watches nor beats, unless it is started."""
    monkeypatch.setattr(follow_module, "_LOST_AFTER", 0.0)
    monkeypatch.setattr(follow_module, "_GIVEN_UP_AFTER", 0.0)
    monkeypatch.setattr(follow_module, "_COMPLETE_AFTER", (0.0, 0.0))
    follower = Follower(leader, store)
    yield follower
    store.gate.set()
    await follower.stop()


class TestLoading:
    async def test_however_many_wait_the_head_is_asked_for_once(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(1), seen=NOTHING)

        await asyncio.gather(*(follower.refresh(1) for _ in range(64)))

        assert store.asked == 1
        assert [one.number for one in leader.adopted] == [1]

    async def test_what_is_followed_already_is_not_adopted_again(
        self, follower: Follower, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(1), seen=NOTHING)

        await follower.refresh()
        await follower.refresh()

        assert len(leader.adopted) == 1

    async def test_failure_reaches_everybody_who_waits_and_the_next_one_tries_again(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(1), seen=NOTHING)
        store.down = BackendError("the store is down")

        failures = await asyncio.gather(
            *(follower.refresh(1) for _ in range(5)), return_exceptions=True
        )
        store.down = None
        await follower.refresh(1)

        assert [str(failure) for failure in failures] == ["the store is down"] * 5
        assert leader.standing().number == 1

    async def test_nobody_waits_long_and_what_comes_late_is_adopted_all_the_same(
        self,
        follower: Follower,
        store: Store,
        other: MemoryControl,
        leader: Leading,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(follow_module, "LOAD_TIMEOUT", 0.01)
        await other.publish(revision(1), seen=NOTHING)
        store.gate.clear()

        with pytest.raises(BackendError, match=r"the head was not loaded within 0\.01 s"):
            await follower.refresh(1)
        store.gate.set()
        await leader.until(lambda: leader.standing().number == 1)

        assert store.asked == 1

    async def test_whoever_gives_up_leaves_the_others_waiting(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(1), seen=NOTHING)
        store.gate.clear()
        impatient, patient = (asyncio.create_task(follower.refresh(1)) for _ in range(2))
        async with asyncio.timeout(PATIENCE):
            await store.waited.wait()

        impatient.cancel()
        await asyncio.wait([impatient])
        store.gate.set()
        await patient

        assert leader.standing().number == 1


class TestLost:
    @pytest.mark.fault("G5")
    async def test_emptied_store_is_seeded(
        self, follower: Follower, store: Store, leader: Leading
    ) -> None:
        leader.adopt(revision(4))

        await follower.refresh()

        assert (await store.head()) == revision(4)
        assert [one.number for one in leader.adopted] == [4]

    @pytest.mark.fault("G1")
    async def test_seeding_comes_too_late_where_somebody_was_newer(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        leader.adopt(revision(4))
        seed, newer = store.seed, revision(7)

        async def late(revision: Revision) -> Revision:
            await other.publish(newer, seen=await other.head())
            return await seed(revision)

        store.seed = late  # type: ignore[method-assign]  # for this once
        await follower.refresh()

        assert leader.standing() == newer

    @pytest.mark.fault("G6")
    async def test_shard_that_is_ahead_of_everybody_is_overtaken(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(4), seen=NOTHING)

        await asyncio.gather(*(follower.refresh(9) for _ in range(16)))
        await leader.until(lambda: leader.standing().number > 9)

        assert store.repaired == [9]
        assert leader.standing().number == 10
        assert leader.standing().base == revision(4).base

    async def test_head_that_comes_back_meanwhile_needs_no_repair(
        self,
        follower: Follower,
        store: Store,
        other: MemoryControl,
        leader: Leading,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(follow_module, "_LOST_AFTER", 0.02)
        monkeypatch.setattr(follow_module, "_GIVEN_UP_AFTER", 0.02)

        await follower.refresh(9)
        await other.publish(revision(9), seen=NOTHING)
        await leader.until(lambda: leader.standing().number == 9)

        assert store.repaired == []

    async def test_repair_that_fails_is_reported_and_tried_again(
        self, follower: Follower, store: Store, leader: Leading
    ) -> None:
        leader.adopt(revision(4))
        await store.seed(revision(4))

        async def failing(shard_number: int, revision: Revision) -> Revision:
            raise BackendError("the store is down")

        store.repair = failing  # type: ignore[method-assign]  # for a while
        await follower.refresh(9)
        await leader.until(lambda: bool(leader.complaints))
        del store.repair  # there again
        # Not before the first attempt is over.
        async with asyncio.timeout(PATIENCE):
            while leader.standing().number < 10:
                await follower.refresh(9)
                await asyncio.sleep(0)

        assert leader.complaints == [
            "revision 9 is lost, and cannot be replaced: the store is down"
        ]

    @pytest.mark.fault("G6")
    async def test_shard_of_another_digest_is_put_right_once(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(4), seen=NOTHING)
        await follower.refresh()

        await asyncio.gather(*(follower.refresh(4, other=True) for _ in range(16)))
        await leader.until(lambda: bool(store.completed))

        assert store.completed == [4]
        assert leader.complaints == []

    async def test_shard_of_another_digest_than_ours_may_be_right(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        leader.adopt(revision(4, "open"))
        await other.publish(revision(4), seen=NOTHING)

        await follower.refresh(4, other=True)

        assert leader.standing() == revision(4)

    @pytest.mark.parametrize(
        ("error", "complaints"),
        [
            (ConflictError(4, 5), []),
            (BackendError("down"), ["not all shards obey revision 4: down"]),
        ],
    )
    async def test_completing_that_fails_is_reported_unless_somebody_was_newer(
        self,
        follower: Follower,
        store: Store,
        other: MemoryControl,
        leader: Leading,
        error: Exception,
        complaints: list[str],
    ) -> None:
        await other.publish(revision(4), seen=NOTHING)
        done = asyncio.Event()

        async def failing(revision: Revision) -> Published:
            done.set()
            raise error

        store.complete = failing  # type: ignore[method-assign]  # a store that is down
        await follower.refresh()
        await follower.refresh(4, other=True)
        await done.wait()
        await leader.until(lambda: leader.complaints == complaints)

        await follower.stop()
        assert leader.complaints == complaints


class TestWatching:
    @pytest.mark.fault("G1")
    async def test_what_is_published_is_adopted_completed_and_told(
        self, follower: Follower, store: Store, other: MemoryControl, leader: Leading
    ) -> None:
        follower.start()

        for number in (1, 2, 3):
            await other.publish(revision(number), seen=await other.head())
            await leader.follows(number)
        await leader.until(lambda: 3 in store.completed)

        numbers = [one.number for one in leader.adopted]
        assert numbers == sorted(numbers)
        # Beside the heartbeat of each second: an operator waits for it.
        assert store.beats > 1

    @pytest.mark.fault("G1")
    async def test_repeated_news_changes_nothing(
        self, follower: Follower, other: MemoryControl, leader: Leading
    ) -> None:
        await other.publish(revision(1), seen=NOTHING)
        await follower.refresh()

        for number in (1, 1, 0, 7, 1):
            follower._hear(number)
        await follower.refresh()

        assert [one.number for one in leader.adopted] == [1]
        assert leader.complaints == []

    async def test_where_nothing_was_ever_published_nothing_is_asked(
        self, follower: Follower, store: Store
    ) -> None:
        follower._hear(0)

        assert store.asked == 0

    async def test_revision_that_cannot_be_loaded_is_reported(
        self, follower: Follower, store: Store, leader: Leading
    ) -> None:
        store.down = BackendError("it is no JSON")

        follower._hear(3)
        await leader.until(lambda: bool(leader.complaints))

        assert leader.complaints == [
            "a revision was published, and cannot be loaded: it is no JSON"
        ]


class TestBeating:
    async def test_each_heartbeat_compares(
        self, follower: Follower, store: Store, leader: Leading, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow_module, "BEAT_INTERVAL", 0.0)

        follower.start()
        await leader.until(lambda: leader.compared > 3)

        assert store.beats >= leader.compared

    async def test_failing_heartbeat_is_reported_and_the_next_one_comes(
        self, follower: Follower, store: Store, leader: Leading, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow_module, "BEAT_INTERVAL", 0.0)
        store.down = BackendError("the store is down")

        follower.start()
        await leader.until(lambda: len(leader.complaints) > 2)
        store.down = None
        await leader.until(lambda: leader.compared > 0)

        assert set(leader.complaints) == {
            "this process could not say that it lives: the store is down"
        }

    async def test_what_stops_says_goodbye_and_runs_nothing_any_more(
        self, follower: Follower, store: Store, leader: Leading
    ) -> None:
        ended = asyncio.Event()

        async def beside() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        follower.start(beside())
        await leader.until(lambda: leader.compared > 0)

        await follower.stop()

        assert ended.is_set()
        assert store.retired == [heartbeat().id]
        assert await store.workers() == []
        assert store.closed > 0
        assert not follower._tasks

    async def test_stopping_waits_for_no_store(
        self, follower: Follower, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(follow_module, "LOAD_TIMEOUT", 0.01)

        async def hanging(worker: str) -> None:
            await asyncio.Event().wait()

        store.retire = hanging  # type: ignore[method-assign]  # a store that is frozen

        async with asyncio.timeout(PATIENCE):
            await follower.stop()

        assert store.closed == 1

    def test_event_loop_that_ends_closes_the_store(self, backend: MemoryBackend) -> None:
        stores: list[Store] = []

        async def use() -> None:
            store, leader = Store(backend), Leading()
            stores.append(store)
            Follower(leader, store).start()
            await leader.until(lambda: leader.compared > 0)

        asyncio.run(use())

        assert stores[0].closed == 1
