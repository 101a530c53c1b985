"""Revisions in every store; publishers that die half-way, and a Redis that lies or forgets."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.clusters import RedisCluster, RedisSentinels
from tests.contract import Clock
from tests.control_contract import (
    NAMESPACE,
    PATIENCE,
    SECOND,
    SHARDS,
    Age,
    ControlContract,
    Ear,
    heartbeat,
    publish,
    revision,
    watching,
)
from tests.proxy import Proxy
from tests.servers import Monitor, RedisServer
from tests.test_backends import Untouched
from tieredlimit import BackendError, UsageError
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends import Backend, ClusterBackend, MemoryBackend, RedisBackend
from tieredlimit.backends import news as news_module
from tieredlimit.backends import redis_control as redis_module
from tieredlimit.backends.control import (
    ControlStore,
    MemoryControl,
    control_store,
    shard_key,
)
from tieredlimit.backends.link import connection_of
from tieredlimit.backends.nodes import Nodes, Route
from tieredlimit.backends.redis_control import RedisControl
from tieredlimit.errors import ConflictError, RevisionError

PREFIX = f"tl:{{{NAMESPACE}}}:"
HEAD = PREFIX + "head"


def on(backend: Backend, *, shards: int = SHARDS, poll: float | None = 0.05) -> ControlStore:
    return control_store(backend, NAMESPACE, shards, poll_interval=poll)


def at(url: str, *, shards: int = SHARDS, poll: float | None = 0.05) -> ControlStore:
    """Return a store as another process would have it."""
    backend = ClusterBackend(url) if "+cluster" in url else RedisBackend.from_url(url)
    return on(backend, shards=shards, poll=poll)


def standing(server: RedisServer, number: int) -> list[object]:
    """Return what the head and all shards hold; they should all be the same."""
    return [server.command("GET", HEAD)] + [
        server.command("GET", shard_key(NAMESPACE, shard)) for shard in range(SHARDS)
    ]


def spelled(one: Revision) -> bytes:
    return f"{one.number} {one.digest}".encode()


class TestMemory(ControlContract):
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def backend(self, clock: Clock) -> MemoryBackend:
        return MemoryBackend(clock=clock)

    @pytest.fixture
    def store(self, backend: MemoryBackend) -> ControlStore:
        return on(backend)

    @pytest.fixture
    def other(self, backend: MemoryBackend) -> ControlStore:
        return on(backend)

    @pytest.fixture
    def age(self, clock: Clock) -> Age:
        async def age(us: int) -> None:
            clock.advance(us)

        return age

    async def test_namespaces_and_backends_are_apart(
        self, store: ControlStore, backend: MemoryBackend
    ) -> None:
        await publish(store, 1)

        assert await control_store(backend, "other", 1).head() == NOTHING
        assert await on(MemoryBackend()).head() == NOTHING

    async def test_who_follows_has_adopted_a_revision_before_its_publisher_goes_on(
        self, store: ControlStore
    ) -> None:
        class Follower:
            def __init__(self) -> None:
                self.adopted: list[Revision] = []

            def adopt(self, revision: Revision) -> None:
                self.adopted.append(revision)

        assert isinstance(store, MemoryControl)
        follower = Follower()
        store.follow(follower)

        await publish(store, 1)

        assert follower.adopted == [NOTHING, revision(1)]

    async def test_workers_are_bounded(
        self, store: ControlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tieredlimit.backends.heartbeat.MAX_WORKERS", 2)
        await store.beat(heartbeat("w1"))
        await store.beat(heartbeat("w2"))

        with pytest.raises(BackendError, match="2 workers are noted already"):
            await store.beat(heartbeat("w3"))
        await store.beat(heartbeat("w2"))

    async def test_watcher_hears_of_a_publisher_in_another_thread(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        async with watching(store) as ear:
            await ear.hears(0)
            await asyncio.to_thread(lambda: asyncio.run(publish_one(other)))

            await ear.hears(1)

    async def test_event_loop_that_ended_under_its_watcher_is_forgotten(
        self, store: ControlStore, other: ControlStore
    ) -> None:
        ear = Ear()
        loop = asyncio.new_event_loop()
        watch = loop.create_task(store.watch(ear))
        thread = threading.Thread(target=lambda: loop.run_until_complete(ear.hears(0)))
        thread.start()
        await asyncio.to_thread(thread.join)
        loop.close()

        await publish(other, 2)

        assert ear.told == [0]
        watch._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own

    def test_child_of_a_fork_is_not_held_up_by_a_lock_of_the_parent(self) -> None:
        run("""
            import asyncio, os
            from tests.control_contract import publish
            from tests.test_control import on
            from tieredlimit.backends import MemoryBackend

            store = on(MemoryBackend())
            with store._held.lock:
                child = os.fork()
                if not child:
                    os._exit(len(asyncio.run(publish(store, 1))) - 1)
            assert os.waitpid(child, 0)[1] == 0
        """)


async def publish_one(store: ControlStore) -> None:
    await publish(store, 1)


class RedisContract(ControlContract):
    @pytest.fixture
    async def store(self, url: str) -> AsyncIterator[ControlStore]:
        store = at(url)
        yield store
        await store.close()

    @pytest.fixture
    async def other(self, url: str) -> AsyncIterator[ControlStore]:
        store = at(url)
        yield store
        await store.close()


@pytest.mark.redis
class TestRedis(RedisContract):
    @pytest.fixture
    def url(self, redis_url: str) -> str:
        return redis_url

    @pytest.fixture
    def age(self, redis_server: RedisServer) -> Age:
        return ageing(redis_server)


@pytest.mark.redis
class TestRedisOverClient(RedisContract):
    """A client that decodes, in another encoding, and speaks RESP3."""

    @pytest.fixture
    async def store(self, redis_url: str) -> AsyncIterator[ControlStore]:
        client = redis.asyncio.Redis.from_url(
            redis_url,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            encoding="latin-1",
            protocol=3,
        )
        store = on(RedisBackend(client))
        yield store
        await store.close()
        await client.aclose()

    @pytest.fixture
    def url(self, redis_url: str) -> str:
        return redis_url

    @pytest.fixture
    def age(self, redis_server: RedisServer) -> Age:
        return ageing(redis_server)


@pytest.mark.redis
class TestCluster(RedisContract):
    @pytest.fixture
    def url(self, cluster_url: str) -> str:
        return cluster_url

    @pytest.fixture
    def age(self, redis_cluster: RedisCluster) -> Age:
        return ageing(redis_cluster.owner_of(HEAD))

    async def test_replicas_are_waited_for_on_every_node(self, store: ControlStore) -> None:
        published = await store.publish(revision(1), seen=NOTHING)

        assert published.replicas == 1

    async def test_shards_on_all_nodes_hear(
        self, store: ControlStore, redis_cluster: RedisCluster
    ) -> None:
        many = on(ClusterBackend(redis_cluster.url), shards=64)

        await publish(many, 2)

        keys = [shard_key(NAMESPACE, shard) for shard in range(64)]
        owners = {key: redis_cluster.owner_of(key) for key in keys}
        assert len(set(owners.values())) == 3
        held = {owners[key].command("GET", key) for key in keys}
        assert held == {spelled(revision(2))}
        await many.close()

    async def test_slots_that_move_are_followed(
        self, store: ControlStore, redis_cluster: RedisCluster
    ) -> None:
        await publish(store, 1)
        slot = redis_cluster.keyslot(HEAD)

        move = redis_cluster.begin_move(slot)
        redis_cluster.move_keys(move, HEAD)
        assert await store.head() == revision(1)
        # Its keys are on two nodes now: it waits until they are together.
        publishing = asyncio.create_task(publish(store, 1))
        await store.now()
        await asyncio.to_thread(redis_cluster.finish_move, move)

        assert await publishing == [revision(2)]
        assert await store.head() == revision(2)


def ageing(server: RedisServer) -> Age:
    async def age(us: int) -> None:
        heard: Any = server.command("ZRANGE", PREFIX + "workers", "0", "-1")
        for worker in heard:
            server.command("ZINCRBY", PREFIX + "workers", str(-us), worker.decode())

    return age


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[ControlStore]:
    store = at(redis_url)
    yield store
    await store.close()


@pytest.fixture
async def other(redis_url: str) -> AsyncIterator[ControlStore]:
    store = at(redis_url)
    yield store
    await store.close()


class DiedError(Exception):
    """What a publisher in these tests dies of."""


async def die(store: ControlStore, step: int, *, part: float) -> None:
    """Publish revision 2 and die in a step, counted from 0, having sent a part of it."""
    whole, steps = Nodes.ask_all, 0

    async def ask_all(self: Nodes, asked: Sequence[Any]) -> list[Any]:
        nonlocal steps
        steps += 1
        if steps <= step:
            return await whole(self, asked)
        await whole(self, asked[: round(part * len(asked))])
        raise DiedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Nodes, "ask_all", ask_all)
        with pytest.raises(DiedError):
            await store.publish(revision(2), seen=revision(1))


STEPS = ["compare the shards", "set the head", "raise the shards", "tell the news", "drop old"]


@pytest.mark.redis
@pytest.mark.fault("G6")
class TestDyingPublisher:
    @pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("step", range(len(STEPS)), ids=STEPS)
    async def test_whoever_comes_next_completes_what_is_left(
        self,
        redis_server: RedisServer,
        store: ControlStore,
        other: ControlStore,
        step: int,
        part: float,
    ) -> None:
        await publish(store, 1)
        await die(store, step, part=part)

        head = await other.head()
        await other.complete(head)

        assert head == revision(2 if STEPS[step] not in STEPS[: 1 + (part < 1)] else 1)
        assert set(standing(redis_server, head.number)) == {spelled(head)}

    @pytest.mark.parametrize("step", range(len(STEPS)), ids=STEPS)
    async def test_running_it_again_completes_it(
        self, redis_server: RedisServer, store: ControlStore, other: ControlStore, step: int
    ) -> None:
        await publish(store, 1)
        await die(store, step, part=0.5)

        await other.publish(revision(2), seen=revision(1))

        assert set(standing(redis_server, 2)) == {spelled(revision(2))}
        assert [one.number for one in await other.history()] == [2, 1]

    async def test_the_next_revision_completes_it_as_well(
        self, redis_server: RedisServer, store: ControlStore, other: ControlStore
    ) -> None:
        await publish(store, 1)
        await die(store, STEPS.index("raise the shards"), part=0.5)

        await publish(other, 1)

        assert set(standing(redis_server, 3)) == {spelled(revision(3))}

    async def test_reply_that_gets_lost_is_said_and_nothing_is_sent_twice(
        self, redis_server: RedisServer, redis_url: str, store: ControlStore
    ) -> None:
        async with Proxy(redis_server.port) as proxy, Monitor(redis_url) as monitor:
            behind = at(proxy.url)
            # The reply to the script that sets the head is the revision itself.
            proxy.treat = lambda reply: b"" if spelled(revision(1)) in reply else reply
            proxy.cut = False
            publishing = asyncio.create_task(behind.publish(revision(1), seen=NOTHING))
            async with asyncio.timeout(PATIENCE):
                while redis_server.command("GET", HEAD) is None:
                    await asyncio.to_thread(lambda: None)
            proxy.break_connections()
            with pytest.raises(BackendError, match="nobody knows whether revision 1 is published"):
                await publishing
            sent = [one for one in await monitor.commands() if "publish --" in one]
            await behind.close()

        assert len(sent) == 1
        assert await store.head() == revision(1)
        assert (await store.publish(revision(1), seen=NOTHING)).shards == SHARDS


@pytest.mark.redis
class TestLostState:
    @pytest.mark.fault("G5")
    async def test_emptied_server_gets_everything_back(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 3)
        redis_server.command("FLUSHALL")

        assert await store.seed(revision(3)) == revision(3)

        assert set(standing(redis_server, 3)) == {spelled(revision(3))}
        assert await store.head() == revision(3)

    @pytest.mark.parametrize("lost", [HEAD, PREFIX + "revision:3", shard_key(NAMESPACE, 2)])
    async def test_any_part_that_was_lost_is_put_back(
        self, redis_server: RedisServer, store: ControlStore, lost: str
    ) -> None:
        await publish(store, 3)
        redis_server.command("DEL", lost)

        assert await store.seed(revision(3)) == revision(3)

        assert set(standing(redis_server, 3)) == {spelled(revision(3))}
        assert await store.head() == revision(3)

    @pytest.mark.fault("G1")
    async def test_seeding_never_lowers_a_shard(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 3)

        await store.seed(revision(2))

        assert set(standing(redis_server, 3)) == {spelled(revision(3))}

    @pytest.mark.fault("G5")
    async def test_nothing_is_published_over_a_head_that_is_lost(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 3)
        redis_server.command("DEL", HEAD)

        with pytest.raises(BackendError, match="revision 3 is in force, and Redis has lost it"):
            await store.publish(revision(1, "empty"), seen=NOTHING)

        await store.seed(revision(3))
        await store.publish(revision(4), seen=revision(3))

    async def test_shard_ahead_of_a_lost_head_is_repaired(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        redis_server.command("SET", shard_key(NAMESPACE, 0), "7 00000000000000aa")

        repaired = await store.repair(7, revision(1))

        assert repaired.change == "restored revision 1: what followed it up to 7 was lost"
        assert abs(repaired.made_us - await store.now()) < 10 * SECOND
        assert set(standing(redis_server, 8)) == {spelled(repaired)}
        assert await store.history() == [repaired, revision(1)]

    async def test_completing_gets_above_a_shard_that_is_ahead(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        redis_server.command("SET", shard_key(NAMESPACE, 0), "7 00000000000000aa")

        published = await store.complete(revision(1))

        assert (published.revision.number, published.revision.digest) == (8, revision(1).digest)
        assert set(standing(redis_server, 8)) == {spelled(published.revision)}

    async def test_of_the_same_number_the_digest_of_the_head_wins(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        redis_server.command("SET", shard_key(NAMESPACE, 0), "1 00000000000000aa")

        await store.complete(revision(1))

        assert set(standing(redis_server, 1)) == {spelled(revision(1))}

    async def test_what_is_kept_has_no_expiry_but_heartbeats_have(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        await store.beat(heartbeat())

        keys: Any = redis_server.command("KEYS", "*")
        left = {key.decode(): redis_server.command("PTTL", key.decode()) for key in keys}
        fleeting = {PREFIX + "workers", PREFIX + "heartbeats"}
        kept = {HEAD, PREFIX + "revision:1", PREFIX + "numbers"}
        kept |= {shard_key(NAMESPACE, shard) for shard in range(SHARDS)}
        assert left.keys() == fleeting | kept
        assert all(left[key] == -1 for key in kept)
        assert all(0 < int(str(left[key])) <= 10_000 for key in fleeting)

    async def test_workers_are_bounded_and_the_silent_make_room(
        self, redis_server: RedisServer, store: ControlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(redis_module, "MAX_WORKERS", 2)
        await store.beat(heartbeat("w1"))
        await store.beat(heartbeat("w2"))

        with pytest.raises(BackendError, match="2 workers are noted already"):
            await store.beat(heartbeat("w3"))
        await store.beat(heartbeat("w2"))
        await ageing(redis_server)(6 * SECOND)
        await store.beat(heartbeat("w3"))

        assert redis_server.command("HKEYS", PREFIX + "heartbeats") == [b"w3"]


FOREIGN = [
    HEAD,
    PREFIX + "revision:1",
    PREFIX + "numbers",
    PREFIX + "label",
    PREFIX + "workers",
    PREFIX + "heartbeats",
    shard_key(NAMESPACE, 3),
]
GARBAGE = ["", "x", "1", "1 xyz", "-1 00000000000000aa", "0 00000000000000aa", "\x00\xff", "[1]"]


@pytest.mark.redis
@pytest.mark.fault("G2")
class TestHostileContents:
    async def everything(self, store: ControlStore) -> list[BackendError]:
        """Do all that can be done and return what it raised, which may be BackendError only."""
        raised = []
        for act in (
            store.head(),
            store.revision(1),
            store.history(),
            store.publish(revision(2), seen=revision(1)),
            store.publish(revision(3), seen=revision(2)),
            store.complete(revision(1)),
            store.complete(revision(2)),
            store.seed(revision(9)),
            store.repair(30, revision(9)),
            store.beat(heartbeat()),
            store.workers(),
            store.label(),
            store.set_label("x"),
            store.now(),
        ):
            async with asyncio.timeout(PATIENCE):
                try:
                    await act
                except ConflictError:
                    pass
                except BackendError as exc:
                    raised.append(exc)
        return raised

    @pytest.mark.parametrize("key", FOREIGN)
    async def test_key_of_another_type_is_an_error_of_the_store(
        self, redis_server: RedisServer, store: ControlStore, key: str
    ) -> None:
        await publish(store, 1)
        redis_server.command("DEL", key)
        redis_server.command("XADD", key, "*", "field", "value")

        raised = await self.everything(store)

        assert any("WRONGTYPE" in str(exc) for exc in raised)

    @pytest.mark.parametrize("key", [key for key in FOREIGN if "s" not in key.rpartition(":")[2]])
    @pytest.mark.parametrize("garbage", [*GARBAGE, "9007199254740993 00000000000000aa"])
    async def test_garbage_is_an_error_of_the_store(
        self, redis_server: RedisServer, store: ControlStore, key: str, garbage: str
    ) -> None:
        await publish(store, 1)
        redis_server.command("SET", key, garbage)

        raised = await self.everything(store)

        if key not in (PREFIX + "label", PREFIX + "revision:1") and garbage:
            assert any(key in str(exc) for exc in raised)

    async def test_document_that_cannot_be_read_says_why(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        redis_server.command("SET", PREFIX + "revision:1", '{"format": 2}')

        for act in (store.head(), store.revision(1), store.history()):
            with pytest.raises(BackendError, match="reads format 1") as caught:
                await act
            assert isinstance(caught.value.__cause__, RevisionError)

    @pytest.mark.parametrize("instead", [revision(2), revision(1, "open")])
    async def test_document_of_another_revision_is_not_the_head(
        self, redis_server: RedisServer, store: ControlStore, instead: Revision
    ) -> None:
        await publish(store, 1)
        redis_server.command("SET", PREFIX + "revision:1", instead.to_json().decode())

        with pytest.raises(BackendError, match="Redis holds"):
            await store.head()

    async def test_head_without_its_document_is_an_error(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        redis_server.command("DEL", PREFIX + "revision:1")

        with pytest.raises(BackendError, match="Redis holds no document"):
            await store.head()
        assert await store.history() == []

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 1}', "[" * 100_000])
    async def test_heartbeat_that_cannot_be_read_is_an_error(
        self, redis_server: RedisServer, store: ControlStore, content: str
    ) -> None:
        await store.beat(heartbeat())
        redis_server.command("HSET", PREFIX + "heartbeats", "w1", content)

        with pytest.raises(BackendError, match="what is no heartbeat"):
            await store.workers()

    async def test_heartbeat_of_a_newer_version_may_say_more(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await store.beat(heartbeat())
        said = heartbeat().to_json().decode()
        redis_server.command("HSET", PREFIX + "heartbeats", "w1", said[:-1] + ',"new":1}')

        assert [one.id for one in await store.workers()] == ["w1"]

    async def test_shard_that_refuses_is_counted_and_the_others_hear(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        key = shard_key(NAMESPACE, 3)
        redis_server.command("LPUSH", key, "x")

        with pytest.raises(
            BackendError,
            match="revision 1 is published, but 1 of 5 shards have not heard of it: run it again",
        ):
            await store.publish(revision(1), seen=NOTHING)

        redis_server.command("DEL", key)
        assert (await store.complete(await store.head())).shards == SHARDS
        assert set(standing(redis_server, 1)) == {spelled(revision(1))}

    async def test_label_of_control_characters_is_an_error(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        redis_server.command("SET", PREFIX + "label", "\x1b[2J")

        with pytest.raises(BackendError, match="no label"):
            await store.label()


@pytest.mark.redis
class TestWatch:
    @pytest.mark.fault("G1")
    async def test_news_is_heard_without_a_poll(
        self, redis_server: RedisServer, redis_url: str, other: ControlStore
    ) -> None:
        store = at(redis_url, poll=None)
        async with watching(store) as ear:
            await ear.hears(0)
            await subscribed(redis_server)
            for number in (1, 2, 3):
                await publish(other, 1)
                await ear.hears(number)
        await store.close()

    @pytest.mark.fault("G1")
    @pytest.mark.login("default")  # it takes a right away
    async def test_poll_finds_what_no_news_told(
        self, own_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        own_server.command("ACL", "SETUSER", "default", "-subscribe")
        store, other = at(own_server.url), at(own_server.url)

        async with watching(store) as ear:
            await ear.hears(0)
            await publish(other, 1)
            await ear.hears(1)

        assert caplog.text == ""
        await store.close()
        await other.close()

    @pytest.mark.fault("G1")
    async def test_news_that_is_repeated_reordered_or_made_up_misleads_nobody(
        self, redis_server: RedisServer, redis_url: str, other: ControlStore
    ) -> None:
        store = at(redis_url, poll=None)
        await publish(other, 3)
        async with watching(store) as ear:
            await ear.hears(3)
            await subscribed(redis_server)
            for news in ("2", "3", "3", "1", "99", "x", "", "\x00" * 1000):
                redis_server.command("PUBLISH", PREFIX + "news", news)
            await publish(other, 1)
            await ear.hears(4)

        assert ear.told == [3, 4]
        await store.close()

    async def test_emptied_server_and_its_seed_are_told(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 2)
        async with watching(store) as ear:
            await ear.hears(2)
            redis_server.command("FLUSHALL")
            await ear.hears(0)
            await store.seed(revision(2))
            await ear.hears(2)

    async def test_other_content_of_the_same_number_is_told(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        async with watching(store) as ear:
            await ear.hears(1)
            redis_server.command("SET", HEAD, "1 00000000000000aa")
            async with asyncio.timeout(PATIENCE):
                while ear.told != [1, 1]:
                    await store.now()

    @pytest.mark.parametrize("poll", [0.05, None])
    @pytest.mark.fault("G1")
    async def test_restarted_server_is_found_again(
        self, own_server: RedisServer, caplog: pytest.LogCaptureFixture, poll: float | None
    ) -> None:
        store, other = at(own_server.url, poll=poll), at(own_server.url)
        await publish(other, 1)
        async with watching(store) as ear:
            await ear.hears(1)
            await asyncio.to_thread(own_server.kill)
            await other.close()
            with pytest.raises(BackendError):
                await other.head()
            await asyncio.to_thread(own_server.restart)
            await ear.hears(0)
            await publish(other, 2)
            await ear.hears(2)

        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert len(warnings) <= 1
        await store.close()
        await other.close()

    async def test_garbage_head_is_waited_out(
        self, redis_server: RedisServer, store: ControlStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        redis_server.command("SET", HEAD, "garbage")
        async with watching(store) as ear:
            async with asyncio.timeout(PATIENCE):
                while "no revision" not in caplog.text:
                    await store.now()
            redis_server.command("DEL", HEAD)
            await ear.hears(0)

    async def test_silent_subscription_is_asked_for_a_sign_of_life(
        self,
        redis_server: RedisServer,
        redis_url: str,
        other: ControlStore,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(news_module, "PULSE", 0.05)
        async with Proxy(redis_server.port) as proxy:
            store = at(proxy.url, poll=None)
            async with watching(store) as ear:
                await ear.hears(0)
                await subscribed(redis_server)
                before = proxy.connections
                proxy.flow.clear()  # and nothing is ever heard on what is connected
                async with asyncio.timeout(PATIENCE):
                    while proxy.connections == before:
                        proxy.accepted.clear()
                        await proxy.accepted.wait()
                proxy.heal()
                await publish(other, 1)
                await ear.hears(1)
            await store.close()

    async def test_what_the_listener_raises_ends_the_watch(self, store: ControlStore) -> None:
        def heard(number: int) -> None:
            raise DiedError

        with pytest.raises(DiedError):
            await store.watch(heard)


async def subscribed(server: RedisServer) -> None:
    """Return once somebody is subscribed to the news."""
    async with asyncio.timeout(PATIENCE):
        while await asyncio.to_thread(server.command, "PUBSUB", "CHANNELS", PREFIX + "news") == []:
            pass


class TestOutage:
    async def test_nobody_there_is_an_error_that_says_so(self, own_server: RedisServer) -> None:
        store = at(own_server.url)
        own_server.kill()

        for act in (
            store.head(),
            store.publish(revision(1), seen=NOTHING),
            store.beat(heartbeat()),
            store.workers(),
        ):
            with pytest.raises(BackendError, match="cannot connect to Redis"):
                await act

    async def test_server_that_does_not_answer_is_given_up(self, own_server: RedisServer) -> None:
        backend = RedisBackend.from_url(own_server.url)
        route = Route(lambda _: connection_of(backend._pool))
        store = RedisControl(route, NAMESPACE, SHARDS, poll_interval=None, timeout=0.2)
        await publish(store, 1)
        own_server.pause()

        with pytest.raises(BackendError, match="did not answer in time"):
            await store.head()
        with pytest.raises(BackendError, match="Redis did not answer in time"):
            await store.publish(revision(2), seen=revision(1))

        own_server.resume()
        assert (await store.head()).number in (1, 2)
        await store.close()

    async def test_connection_that_the_server_closed_meanwhile_is_made_anew(
        self, redis_server: RedisServer, store: ControlStore
    ) -> None:
        await publish(store, 1)
        assert await store.head() == revision(1)
        redis_server.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    assert await store.head() == revision(1)
                except BackendError:  # heard of only while asking
                    continue
                break

    async def test_garbage_from_the_network_is_an_error(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with Proxy(redis_server.port) as proxy:
            store = at(proxy.url)
            await store.now()
            proxy.treat = lambda reply: b"?what\r\n"

            with pytest.raises(BackendError, match="the connection to Redis broke"):
                await store.head()

            proxy.heal()
            assert await store.head() == NOTHING
            await store.close()

    def test_each_event_loop_has_connections_of_its_own(self, redis_url: str) -> None:
        store = at(redis_url)

        async def use(number: int) -> Revision:
            await publish(store, 1)
            try:
                return await store.head()
            finally:
                if number % 2:
                    await store.close()

        assert [asyncio.run(use(number)).number for number in (1, 3, 5)] == [1, 2, 3]

    def test_child_of_a_fork_leaves_the_connections_to_its_parent(self, redis_url: str) -> None:
        run(f"""
            import asyncio, os
            from tests.control_contract import publish
            from tests.test_control import at

            async def main():
                store = at({redis_url!r})
                await publish(store, 1)
                child = os.fork()
                if not child:
                    asyncio._set_running_loop(None)
                    os._exit(len(asyncio.run(publish(store, 1))) - 1)
                assert os.waitpid(child, 0)[1] == 0
                assert (await store.head()).number == 2
                await store.close()

            asyncio.run(main())
        """)

    async def test_other_backends_have_no_control(self) -> None:
        with pytest.raises(UsageError, match="got Untouched"):
            on(Untouched())


def run(program: str) -> None:
    """Run a program in a process of its own, which is to end well and in silence."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=False,
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")


class TestReplicas:
    async def test_without_replicas_nothing_is_waited_for(
        self, redis_url: str, store: ControlStore
    ) -> None:
        async with Monitor(redis_url) as monitor:
            published = await store.publish(revision(1), seen=NOTHING)
            commands = await monitor.commands()

        assert published.replicas == 0
        assert not any(command.startswith("WAIT") for command in commands)

    @pytest.mark.login("default")  # it takes a right away
    async def test_user_that_may_not_ask_counts_none(self, own_server: RedisServer) -> None:
        own_server.command("ACL", "SETUSER", "default", "-info")
        store = at(own_server.url)

        assert (await store.publish(revision(1), seen=NOTHING)).replicas == 0
        await store.close()

    @pytest.mark.fault("F3")
    async def test_primary_that_sentinel_names_is_used_and_its_replica_counted(
        self, sentinels: RedisSentinels
    ) -> None:
        client = sentinels.client()
        store = on(RedisBackend(client))

        published = await store.publish(revision(1), seen=NOTHING)
        assert published.replicas == 1

        await asyncio.to_thread(sentinels.fail_over)
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    assert await store.head() == revision(1)
                    await publish(store, 1)
                except BackendError:
                    continue
                break
        assert sentinels.primary.command("GET", HEAD) == spelled(revision(2))
        await store.close()
        await client.aclose()


class TestCut:
    async def test_node_that_is_gone_leaves_the_publishing_unfinished_until_its_replica_serves(
        self, own_cluster: RedisCluster
    ) -> None:
        store = on(ClusterBackend(own_cluster.url), shards=64)
        head = own_cluster.owner_of(HEAD)
        (gone, *_) = (i for i, node in enumerate(own_cluster.masters) if node is not head)
        await publish(store, 1)
        await asyncio.to_thread(own_cluster.kill_master, gone)

        with pytest.raises(BackendError, match=r"published, but \d+ of 64 shards have not heard"):
            await store.publish(revision(2), seen=revision(1))
        await asyncio.to_thread(own_cluster.wait_for_failover)

        assert (await store.complete(await store.head())).shards == 64
        keys = [shard_key(NAMESPACE, shard) for shard in range(64)]
        held = {own_cluster.owner_of(key).command("GET", key) for key in keys}
        assert held == {spelled(revision(2))}
        await store.close()


async def test_closing_that_is_cancelled_closes_its_connections_all_the_same(
    redis_server: RedisServer, redis_url: str
) -> None:
    backend = RedisBackend.from_url(redis_url)
    made: list[Any] = []

    def connect(_: object) -> Any:
        made.append(connection_of(backend._pool))
        return made[-1]

    nodes = Nodes(Route(connect), 5.0, {})
    await nodes.ask("tl1:{test:0}:a", "GET", "tl1:{test:0}:a")

    closing = asyncio.create_task(nodes.close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])

    assert [one.is_connected for one in made] == [False]
