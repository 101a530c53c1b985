"""What every store of revisions promises, and what its tests are made with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tieredlimit import BackendError, UsageError
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends.control import ControlStore
from tieredlimit.backends.heartbeat import Heartbeat
from tieredlimit.errors import ConflictError, RevisionError

NAMESPACE = "team"
SHARDS = 5
SECOND = 1_000_000
PATIENCE = 20.0

Age = Callable[[int], Awaitable[None]]
"""Let all heartbeats that are stored be older by so many microseconds."""


def revision(number: int, word: str = "closed") -> Revision:
    """Return a revision; its content is its number and the word."""
    return Revision(number, {"word": word, "of": number}, actor="ann", reason="why", change=word)


def heartbeat(worker: str = "w1", counted: int = 0) -> Heartbeat:
    return Heartbeat(
        id=worker,
        host="host-a",
        pid=4711,
        version="0.1.0",
        format=1,
        revision=17,
        digest=revision(17).digest,
        started_us=123,
        counters={"image": {"free": counted}},
    )


async def publish(store: ControlStore, count: int) -> list[Revision]:
    """Publish so many revisions, one after the other, and return them."""
    published = [await store.head()]
    for _ in range(count):
        following = revision(published[-1].number + 1)
        await store.publish(following, seen=published[-1])
        published.append(following)
    return published[1:]


class Ear:
    """Remember what a watcher was told."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self._news = asyncio.Event()

    def __call__(self, number: int) -> None:
        self.told.append(number)
        self._news.set()

    async def hears(self, number: int) -> None:
        """Return once the last that was told is this number."""
        async with asyncio.timeout(PATIENCE):
            while not self.told or self.told[-1] != number:
                await self._news.wait()
                self._news.clear()


@asynccontextmanager
async def watching(store: ControlStore) -> AsyncIterator[Ear]:
    """Watch a store, from `async with` until its end."""
    ear = Ear()
    task = asyncio.create_task(store.watch(ear))
    try:
        yield ear
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


class ControlContract:
    """What every store promises. Subclass it and provide `store`, `other` over the same, `age`."""

    async def test_where_nothing_was_published_there_is_nothing(self, store: ControlStore) -> None:
        assert await store.head() == NOTHING
        assert await store.revision(1) is None
        assert await store.history() == []
        assert await store.workers() == []
        assert await store.label() == ""

    async def test_published_revision_is_the_head_for_all(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        published = await store.publish(revision(1), seen=NOTHING)

        assert (published.revision, published.shards) == (revision(1), SHARDS)
        assert await other.head() == revision(1)
        assert await other.revision(1) == revision(1)

    async def test_head_is_found_again_after_closing(self, store: ControlStore) -> None:
        await store.publish(revision(1), seen=NOTHING)

        await store.close()

        assert await store.head() == revision(1)

    async def test_history_has_the_newest_first_and_not_more_than_asked_for(
        self, store: ControlStore
    ) -> None:
        published = await publish(store, 4)

        assert await store.history() == published[::-1]
        assert await store.history(3) == published[:0:-1]

    async def test_history_is_bounded(self, store: ControlStore) -> None:
        published = await publish(store, 203)

        assert [one.number for one in await store.history(1_000)] == list(range(203, 3, -1))
        assert await store.revision(3) is None
        assert await store.revision(4) == published[3]

    async def test_publisher_that_saw_another_head_is_told_which_is_in_force(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        await publish(store, 2)

        with pytest.raises(ConflictError) as caught:
            await other.publish(revision(2, "open"), seen=revision(1))

        assert (caught.value.seen, caught.value.found) == (1, 2)
        assert await store.head() == revision(2)

    async def test_same_number_of_other_content_is_another_head(self, store: ControlStore) -> None:
        await store.publish(revision(1), seen=NOTHING)

        with pytest.raises(ConflictError):
            await store.publish(revision(2), seen=revision(1, "open"))

        assert await store.head() == revision(1)

    async def test_of_publishers_at_once_exactly_one_wins(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        rivals = [revision(1, f"by {i}") for i in range(10)]

        outcomes = await asyncio.gather(
            *((store, other)[i % 2].publish(rival, seen=NOTHING) for i, rival in enumerate(rivals)),
            return_exceptions=True,
        )

        (winner,) = [i for i, one in enumerate(outcomes) if not isinstance(one, BaseException)]
        losers = [one for i, one in enumerate(outcomes) if i != winner]
        assert all(isinstance(one, ConflictError) and one.found == 1 for one in losers)
        assert await store.head() == await other.head() == rivals[winner]
        assert await store.history() == [rivals[winner]]

    @pytest.mark.fault("G6")
    async def test_publishing_the_same_revision_again_changes_nothing(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        first = await store.publish(revision(1), seen=NOTHING)

        again = await other.publish(revision(1), seen=NOTHING)

        assert again == first
        assert await store.history() == [revision(1)]

    @pytest.mark.parametrize("number", [0, 3, 4, 2**53])
    async def test_revision_must_follow_the_one_that_was_seen(
        self, store: ControlStore, number: int
    ) -> None:
        with pytest.raises(UsageError, match="a revision's number"):
            await store.publish(replace(revision(1), number=number), seen=revision(4))

    async def test_largest_number_is_kept_exactly(self, store: ControlStore) -> None:
        last = 2**53 - 1
        await store.publish(revision(last - 1), seen=NOTHING)

        await store.publish(revision(last), seen=revision(last - 1))

        assert await store.head() == revision(last)
        assert [one.number for one in await store.history()] == [last, last - 1]
        with pytest.raises(BackendError, match="numbers end there"):
            await store.repair(last + 1, revision(last))

    @pytest.mark.fault("G2")
    async def test_revision_too_large_to_be_stored_changes_nothing(
        self, store: ControlStore
    ) -> None:
        with pytest.raises(RevisionError, match="bytes"):
            await store.publish(Revision(1, {"word": "x" * 1_000_001}), seen=NOTHING)

        assert await store.head() == NOTHING

    async def test_only_the_head_can_be_completed(self, store: ControlStore) -> None:
        await publish(store, 2)

        with pytest.raises(ConflictError):
            await store.complete(revision(1))
        with pytest.raises(ConflictError):
            await store.complete(revision(2, "open"))

        assert (await store.complete(revision(2))).revision == revision(2)
        assert (await store.complete(revision(2))).shards == SHARDS

    @pytest.mark.fault("G5")
    async def test_emptied_store_is_seeded_with_what_a_worker_holds(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        assert await store.seed(revision(17)) == revision(17)

        assert await other.head() == revision(17)
        assert await other.history() == [revision(17)]
        await other.publish(revision(18), seen=revision(17))

    @pytest.mark.fault("G1")
    async def test_seeding_never_goes_back(self, store: ControlStore) -> None:
        published = await publish(store, 3)

        assert await store.seed(NOTHING) == published[2]
        assert await store.seed(published[1]) == published[2]
        assert await store.seed(revision(3, "open")) == published[2]

        assert await store.head() == published[2]

    async def test_repair_publishes_the_newest_content_above_the_number(
        self, store: ControlStore
    ) -> None:
        await publish(store, 2)

        repaired = await store.repair(7, revision(5, "lost"))

        assert (repaired.number, repaired.digest) == (8, revision(5, "lost").digest)
        assert await store.head() == repaired

    async def test_repair_keeps_to_the_head_where_that_is_newer_than_the_worker(
        self, store: ControlStore
    ) -> None:
        await publish(store, 2)

        repaired = await store.repair(7, revision(1, "old"))

        assert (repaired.number, repaired.digest) == (8, revision(2).digest)

    async def test_repair_does_nothing_where_the_head_has_come_that_far(
        self, store: ControlStore
    ) -> None:
        published = await publish(store, 3)

        assert await store.repair(3, revision(2)) == published[2]

        assert await store.head() == published[2]

    @pytest.mark.fault("G6")
    async def test_workers_that_repair_at_once_settle_on_one_revision(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        await publish(store, 2)

        repaired = await asyncio.gather(
            *((store, other)[i % 2].repair(7, revision(2)) for i in range(8))
        )

        assert {one.number for one in repaired} == {8}
        assert await store.head() == repaired[0]

    async def test_worker_that_has_ended_is_not_listed_any_more(self, store: ControlStore) -> None:
        await store.beat(heartbeat("w1"))
        await store.beat(heartbeat("w2"))

        await store.retire("w1")
        await store.retire("unheard-of")

        assert [one.id for one in await store.workers()] == ["w2"]

    async def test_heartbeats_are_listed_by_worker_the_latest_of_each(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        await store.beat(heartbeat("w2"))
        await other.beat(heartbeat("w1"))
        await store.beat(heartbeat("w2", counted=5))

        listed = await store.workers()

        assert [replace(one, age=0.0) for one in listed] == [heartbeat("w1"), heartbeat("w2", 5)]
        assert all(0 <= one.age < 5 for one in listed)

    async def test_worker_that_fell_silent_is_not_listed(
        self, store: ControlStore, age: Age
    ) -> None:
        await store.beat(heartbeat("silent"))
        await age(3 * SECOND)
        await store.beat(heartbeat("living"))
        assert len(await store.workers()) == 2

        await age(int(2.1 * SECOND))

        (living,) = await store.workers()
        assert living.id == "living"
        assert 2.1 <= living.age < 5

    async def test_heartbeat_from_a_future_that_the_clock_took_back_is_not_listed(
        self, store: ControlStore, age: Age
    ) -> None:
        await store.beat(heartbeat("w1"))

        await age(-60 * SECOND)

        assert await store.workers() == []
        await store.beat(heartbeat("w2"))
        assert [one.id for one in await store.workers()] == ["w2"]

    @pytest.mark.parametrize("worker", ["", "x" * 65, "two words", "ü", "a\nb"])
    async def test_worker_of_a_malformed_id_is_refused(
        self, store: ControlStore, worker: str
    ) -> None:
        with pytest.raises(UsageError, match="a worker's id"):
            await store.beat(heartbeat(worker))

    async def test_heartbeat_that_is_too_long_is_refused(self, store: ControlStore) -> None:
        with pytest.raises(UsageError, match="at most 65,536 bytes"):
            await store.beat(replace(heartbeat(), counters={"x" * 66_000: 1}))

    async def test_label_is_kept_and_taken_away(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        await store.set_label("PRODUCTION é")
        assert await other.label() == "PRODUCTION é"

        await other.set_label("")
        assert await store.label() == ""

    @pytest.mark.parametrize("text", ["x" * 65, "a\nb", "\x1b[2J", "\ud800"])
    async def test_label_that_does_not_print_is_refused(
        self, store: ControlStore, text: str
    ) -> None:
        with pytest.raises(UsageError, match="a label"):
            await store.set_label(text)

    async def test_clock_does_not_go_back(self, store: ControlStore) -> None:
        assert 0 < await store.now() <= await store.now()

    async def test_watcher_is_told_the_head_and_each_new_one(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        async with watching(store) as ear:
            await ear.hears(0)
            for number in (1, 2, 3):
                await publish(other, 1)
                await ear.hears(number)

        assert ear.told == [0, 1, 2, 3]

    @pytest.mark.fault("G1")
    async def test_watcher_that_starts_during_changes_ends_on_the_newest(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        publishing = asyncio.create_task(publish(other, 10))

        async with watching(store) as late:
            await publishing
            await late.hears(10)

        assert late.told == sorted(set(late.told))

    async def test_watchers_of_one_loop_are_independent(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        async with watching(store) as staying:
            async with watching(store) as leaving:
                await leaving.hears(0)
            await publish(other, 1)

            await staying.hears(1)
            assert leaving.told == [0]
