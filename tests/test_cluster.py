"""Redis Cluster as it is met in the field: slots on the move, nodes that die, nodes that err."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

import pytest

from tests.clusters import SLOTS, Move, RedisCluster
from tests.contract import (
    DAY,
    START,
    BackendContract,
    Clock,
    debts,
    quota,
    shelf,
)
from tests.holds_contract import Ask, RedisHoldsContract
from tests.servers import Monitor, RedisServer
from tieredlimit import Account, BackendError, Limiter, UsageError
from tieredlimit._core.keys import Layout
from tieredlimit.backends import Charge, ClusterBackend, Reply
from tieredlimit.backends import fleet as fleet_module
from tieredlimit.backends import nodecalls as nodecalls_module
from tieredlimit.backends.call import Call
from tieredlimit.backends.replies import Refusal

PATIENT = 10.0
IMPATIENT = 0.1
DEADLINE = 30.0

POLICY = {
    "order": ["free"],
    "features": {"image": {"routes": ["POST /v1/images"]}},
    "tiers": {
        "free": {
            "quotas": {
                "image": ["1000/day", {"rate": "100000/day", "per": "org", "name": "org"}],
            }
        }
    },
}

OWN = shelf(quota("200/day"))
ORG = shelf(quota("700/day"), tier="org")
STEPS = (DAY // 200, quota("700/day").interval_us)


def pair(user: str, org: str, shard: int = 0) -> list[Charge]:
    """Charge an account and its org."""
    return [
        Charge(OWN.key(Account(user), shard), OWN, 1),
        Charge(ORG.key(Account(org), shard), ORG, 1),
    ]


async def poll(until: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not until():  # noqa: ASYNC110 -- some of it is in other processes
            await asyncio.sleep(0.005)


async def debt_of(backend: ClusterBackend, one: Charge) -> int:
    """Return what a bucket lacks, once its node is asked again after it could not answer."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return (await debts(backend, one))[0]
            except BackendError:
                await asyncio.sleep(0.005)


async def resolved(
    callers: Sequence[asyncio.Future[Reply]],
) -> list[Reply | BaseException]:
    """Return what became of callers, none of which may wait for ever."""
    async with asyncio.timeout(DEADLINE):
        return await asyncio.gather(*callers, return_exceptions=True)


def slot_of(charges: Sequence[Charge], cluster: RedisCluster) -> int:
    return cluster.keyslot(charges[0].key)


class Load:
    """Decisions that are taken again and again by many callers, and what became of them."""

    def __init__(self, backend: ClusterBackend, decisions: Sequence[Sequence[Charge]]) -> None:
        self.backend = backend
        self.allowed: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.errors: list[BaseException] = []
        self.count = 0
        self._decisions = decisions
        self._end = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._callers = [asyncio.ensure_future(self._call(one)) for one in self._decisions]
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._end.set()
        async with asyncio.timeout(DEADLINE):
            await asyncio.gather(*self._callers)

    async def more(self, count: int) -> None:
        """Wait for so many more decisions."""
        wanted = self.count + count
        await poll(lambda: self.count >= wanted)

    async def _call(self, charges: Sequence[Charge]) -> None:
        while not self._end.is_set():
            keys = [one.key for one in charges]
            try:
                reply = await self.backend.take(charges)
            except BackendError as exc:
                self.errors.append(exc)
                self.failed.update(keys)
                await asyncio.sleep(0.002)  # a client does not come back at once either
            else:
                self.allowed.update(keys if reply.allowed else ())
            self.count += 1


@pytest.fixture
async def backend(cluster_url: str) -> AsyncIterator[ClusterBackend]:
    backend = ClusterBackend(cluster_url, clock=Clock(), timeout=PATIENT)
    await backend.open()
    yield backend
    await backend.close()


class TestContract(BackendContract):
    @pytest.fixture
    async def backend(self, cluster_url: str, clock: Clock) -> AsyncIterator[ClusterBackend]:
        backend = ClusterBackend(cluster_url, clock=clock, timeout=PATIENT)
        yield backend
        await backend.close()


class TestHolds(RedisHoldsContract):
    @pytest.fixture
    async def backend(self, cluster_url: str, clock: Clock) -> AsyncIterator[ClusterBackend]:
        backend = ClusterBackend(cluster_url, clock=clock, timeout=PATIENT)
        yield backend
        await backend.close()

    @pytest.fixture
    async def live(self, cluster_url: str) -> AsyncIterator[ClusterBackend]:
        backend = ClusterBackend(cluster_url, timeout=PATIENT)
        yield backend
        await backend.close()

    @pytest.fixture
    def ask(self, redis_cluster: RedisCluster) -> Ask:
        return lambda *words: redis_cluster.owner_of(words[1]).command(*words)

    @pytest.fixture
    def keys(self, redis_cluster: RedisCluster) -> Callable[[], list[str]]:
        def found() -> list[str]:
            replies: Any = [node.command("KEYS", "*") for node in redis_cluster.masters]
            return sorted(key.decode() for reply in replies for key in reply)

        return found


class TestSpread:
    @pytest.mark.fault("F6")
    async def test_every_call_has_one_hash_tag_and_every_master_its_share(
        self, redis_cluster: RedisCluster, cluster_url: str
    ) -> None:
        limiter = Limiter(POLICY, ClusterBackend(cluster_url, timeout=PATIENT), shards=64)
        accounts = [Account(f"u{i}", within={"org": f"o{i % 100}"}) for i in range(600)]
        # From here on every node knows the script.
        await asyncio.gather(*(limiter.take(one, "image", 0) for one in accounts))
        monitors = [Monitor(node.url) for node in redis_cluster.masters]
        for monitor in monitors:
            await monitor.__aenter__()

        decisions = await asyncio.gather(*(limiter.take(one, "image") for one in accounts))

        sent = [await monitor.commands() for monitor in monitors]
        for monitor in monitors:
            await monitor.__aexit__(None, None, None)
        shares = []
        for commands in sent:
            words = [one.split() for one in commands if one.startswith("EVAL")]
            keys = [one[3 : 3 + int(one[2])] for one in words]
            assert all(len({key[: key.index("}")] for key in call}) == 1 for call in keys)
            # The first of each call is the shard's revision.
            shares.append(sum(len(key) - 1 for key in keys) / 2)
        assert {decision.reason for decision in decisions} == {"allowed"}
        assert sum(shares) == len(accounts)
        assert min(shares) > len(accounts) * 0.15
        await limiter.close()

    @pytest.mark.fault("F6")
    async def test_script_that_is_lost_never_mixes_tags_though_its_callers_give_up(
        self, backend: ClusterBackend
    ) -> None:
        calls = backend._fleet()._member_of("test:0").calls
        gone = calls.add(pair("u1", "o1"))
        lost = calls.next_call()
        assert lost is not None
        calls._again.append(lost.decisions)
        gone.cancel()
        futures = [calls.add(pair("u1", "o1", shard)) for shard in (0, 1)]

        sent = [calls.next_call(), calls.next_call(), calls.next_call()]

        assert [call and len(call.decisions) for call in sent] == [1, 1, None]
        for call in sent:
            if call:
                calls.fail(call, "the test is over")
        assert [str(future.exception()) for future in futures] == ["the test is over"] * 2

    async def test_clock_is_the_servers_and_is_carried_on(self, cluster_url: str) -> None:
        backend = ClusterBackend(cluster_url, timeout=PATIENT)

        before = backend.now()
        reply = await backend.take(pair("u1", "o1"))
        after = backend.now()

        assert abs(reply.now - before) < DAY
        assert reply.now <= after < reply.now + DAY
        await backend.close()

    async def test_many_tags_forget_old_slots(
        self, backend: ClusterBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fleet = backend._fleet()
        monkeypatch.setattr(fleet_module, "_SLOTS", 3)

        for shard in range(10):
            assert (await backend.take(pair("u1", "o1", shard))).allowed

        assert len(fleet._slots) <= 3

    async def test_more_than_may_wait_fails_at_once(
        self, backend: ClusterBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (fleet_module, nodecalls_module):
            monkeypatch.setattr(module, "MAX_WAITING", 20)
        monkeypatch.setattr(fleet_module, "IN_FLIGHT", 1)

        replies = await resolved(
            [asyncio.ensure_future(backend.take(pair(f"u{i}", "o"))) for i in range(60)]
        )

        refused = [one for one in replies if isinstance(one, BackendError)]
        assert {str(one) for one in refused} == {"20 decisions are waiting for Redis already"}
        assert 20 <= 60 - len(refused) < 60
        assert all(isinstance(one, BackendError) or one.allowed for one in replies)  # type: ignore[union-attr]  # no other error


class TestMovingSlots:
    @pytest.mark.fault("F5", "A3")
    async def test_slots_that_move_under_load_fail_nothing_and_charge_each_decision_once(
        self, redis_cluster: RedisCluster, backend: ClusterBackend
    ) -> None:
        decisions = [pair(f"u{i}", f"o{i % 2}", shard) for shard in range(3) for i in range(8)] * 2
        slots = {slot_of(one, redis_cluster) for one in decisions}

        def move_all() -> None:
            for slot in slots:
                source = redis_cluster.owner_of_slot(slot)
                move = redis_cluster.begin_move(slot)
                asked: Any = source.command("CLUSTER GETKEYSINSLOT", str(slot), "1000")
                for key in asked:
                    redis_cluster.move_keys(move, key)
                redis_cluster.finish_move(move)
                redis_cluster.move_slot(slot, move.target, source)

        async with Load(backend, decisions) as load:
            await load.more(100)
            await asyncio.to_thread(move_all)
            await load.more(100)
        spent: dict[str, int] = {}
        for one in decisions:
            spent.update(zip([c.key for c in one], await debts(backend, *one), strict=True))

        assert load.errors == []
        for key, debt in spent.items():
            step = STEPS[":org:" in key]
            assert debt == load.allowed[key] * step
        assert len(spent) == 3 * 10

    @pytest.mark.fault("F5")
    async def test_moved_is_followed_at_once_and_remembered(
        self, redis_cluster: RedisCluster, backend: ClusterBackend
    ) -> None:
        one = pair("u1", "o1")
        await backend.take(one)
        slot = slot_of(one, redis_cluster)
        source = redis_cluster.owner_of_slot(slot)
        target = next(node for node in redis_cluster.masters if node is not source)
        redis_cluster.move_slot(slot, source, target)

        replies = await resolved([asyncio.ensure_future(backend.take(one)) for _ in range(300)])

        assert sum(isinstance(one, Reply) and one.allowed for one in replies) == 199
        assert sum(isinstance(one, Reply) for one in replies) == 300
        owner = backend._fleet()._owners[slot]
        assert owner == ("127.0.0.1", target.port)
        redis_cluster.move_slot(slot, target, source)

    @pytest.mark.fault("F5")
    async def test_key_in_an_open_slot_is_served_wherever_it_is(
        self, redis_cluster: RedisCluster, backend: ClusterBackend
    ) -> None:
        one = pair("u1", "o1")
        await backend.take(one)
        move = redis_cluster.begin_move(slot_of(one, redis_cluster))

        before = await backend.take(one)
        redis_cluster.move_keys(move, *(c.key for c in one))
        for node in redis_cluster.masters:
            node.command("SCRIPT", "FLUSH")
        after = await backend.take(one)
        fresh = await backend.take(pair("u2", "o2")[:1])
        at_once = await resolved([asyncio.ensure_future(backend.take(one)) for _ in range(20)])
        redis_cluster.finish_move(move)

        assert list(before.debts) == [2 * step for step in STEPS]
        assert list(after.debts) == [3 * step for step in STEPS]
        assert list(fresh.debts) == [STEPS[0]]
        assert all(isinstance(reply, Reply) and reply.allowed for reply in at_once)
        assert await debts(backend, *one) == [23 * step for step in STEPS]
        back(redis_cluster, move)

    @pytest.mark.fault("F5")
    async def test_keys_apart_wait_until_they_are_together(
        self, redis_cluster: RedisCluster, backend: ClusterBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = pair("u1", "o1")
        await backend.take(one)
        move = redis_cluster.begin_move(slot_of(one, redis_cluster))
        redis_cluster.move_keys(move, one[0].key)
        fleet = backend._fleet()
        tried: list[Call] = []
        try_again = fleet.try_again

        def counted(call: Call) -> None:
            tried.append(call)
            try_again(call)

        monkeypatch.setattr(fleet, "try_again", counted)

        waiting = [asyncio.ensure_future(backend.take(one)) for _ in range(5)]
        gone = asyncio.ensure_future(backend.take(one))
        await poll(lambda: len(tried) > 20)
        undecided = [caller.done() for caller in waiting]
        gone.cancel()
        await asyncio.to_thread(redis_cluster.finish_move, move)
        replies = await resolved(waiting)

        assert undecided == [False] * 5
        assert all(isinstance(reply, Reply) and reply.allowed for reply in replies)
        assert await debts(backend, *one) == [6 * step for step in STEPS]
        back(redis_cluster, move)

    @pytest.mark.fault("F5")
    async def test_keys_that_stay_apart_fail_at_the_deadline_and_are_not_charged(
        self, redis_cluster: RedisCluster, backend: ClusterBackend
    ) -> None:
        one = pair("u1", "o1")
        await backend.take(one)
        hasty = ClusterBackend(redis_cluster.url, clock=Clock(), timeout=IMPATIENT)
        await hasty.open()
        move = redis_cluster.begin_move(slot_of(one, redis_cluster))
        redis_cluster.move_keys(move, one[0].key)

        with pytest.raises(BackendError, match=r"did not answer within 0\.1 s"):
            await hasty.take(one)
        redis_cluster.finish_move(move)

        assert await debts(backend, *one) == list(STEPS)
        await hasty.close()
        back(redis_cluster, move)

    @pytest.mark.fault("F2")
    async def test_scripts_lost_on_all_nodes_under_load_cost_no_decision(
        self, redis_cluster: RedisCluster, backend: ClusterBackend
    ) -> None:
        decisions = [pair(f"u{i}", f"o{i}", i) for i in range(24)]

        async with Load(backend, decisions) as load:
            for _ in range(5):
                await load.more(50)
                for node in redis_cluster.nodes:
                    node.command("SCRIPT", "FLUSH")

        assert load.errors == []
        for one in decisions:
            assert await debts(backend, one[0]) == [load.allowed[one[0].key] * STEPS[0]]


def back(cluster: RedisCluster, move: Move) -> None:
    cluster.move_slot(move.slot, move.target, move.source)


class TestLostNodes:
    @pytest.mark.fault("F1", "F5", "F10")
    async def test_killed_master_costs_errors_until_its_replica_took_over_and_no_charge_twice(
        self, own_cluster: RedisCluster
    ) -> None:
        # Two seeds, so that the dead one need not be the one that knows.
        ports = [node.port for node in own_cluster.masters]
        nodes = ",".join(f"127.0.0.1:{port}" for port in ports)
        url = f"redis+cluster://{RedisServer.login}{nodes}"
        backend = ClusterBackend(url, clock=Clock(), timeout=0.5)
        await backend.open()
        plenty = shelf(quota("1/second", capacity=10_000_000))
        decisions = [
            [Charge(plenty.key(Account(f"u{i}"), shard), plenty, 1)]
            for shard in range(8)
            for i in range(2)
        ]
        dead = own_cluster.owner_of(decisions[0][0].key)
        hit = [one[0].key for one in decisions if own_cluster.owner_of(one[0].key) is dead]

        async with Load(backend, decisions) as load:
            await load.more(500)
            own_cluster.kill_master(own_cluster.masters.index(dead))
            await asyncio.to_thread(own_cluster.wait_for_failover)
            served = load.allowed[hit[0]]
            await poll(lambda: load.allowed[hit[0]] > served + 20)
        spent = {one[0].key: await debt_of(backend, one[0]) for one in decisions}

        assert load.errors
        for key, debt in spent.items():
            level = debt // 1_000_000
            assert level <= load.allowed[key] + load.failed[key]
            # Replication is asynchronous: only what the dead one said last may be forgotten.
            if key not in hit:
                assert level >= load.allowed[key]
        assert set(spent) > set(hit)
        await backend.close()

    async def test_first_seed_may_be_dead(self, cluster_url: str) -> None:
        scheme, at, living = cluster_url.rpartition("@")
        dead = f"{scheme or 'redis+cluster://'}{at}127.0.0.1:{closed_port()}"
        url = f"{dead},{living.removeprefix('redis+cluster://')}"
        backend = ClusterBackend(url, timeout=PATIENT)

        assert (await backend.take(pair("u1", "o1"))).allowed

        await backend.close()

    async def test_no_node_at_all_is_an_error_for_takes_and_a_line_for_open(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        port = closed_port()
        backend = ClusterBackend(f"redis+cluster://:hush@127.0.0.1:{port}", timeout=PATIENT)

        await backend.open()
        with pytest.raises(BackendError, match=r"cannot connect to the Redis Cluster: ") as caught:
            await backend.take(pair("u1", "o1"))

        assert "trying again with each decision" in caplog.text
        assert "hush" not in caplog.text + str(caught.value)
        await backend.close()

    async def test_server_that_is_no_cluster_is_an_error(self, redis_server: RedisServer) -> None:
        backend = ClusterBackend(f"redis+cluster://127.0.0.1:{redis_server.port}", timeout=PATIENT)

        with pytest.raises(BackendError, match="cluster support disabled"):
            await backend.take(pair("u1", "o1"))

        await backend.close()

    async def test_closing_under_load_fails_what_waits_and_a_later_take_opens_again(
        self, redis_cluster: RedisCluster, backend: ClusterBackend
    ) -> None:
        one = pair("u1", "o1")
        await backend.take(one)
        move = redis_cluster.begin_move(slot_of(one, redis_cluster))
        redis_cluster.move_keys(move, one[0].key)
        fleet = backend._fleet()
        callers = [asyncio.ensure_future(backend.take(one)) for _ in range(300)]
        callers += [asyncio.ensure_future(backend.take(pair("u2", "o", i))) for i in range(1, 60)]
        await poll(lambda: bool(fleet._between))
        callers += [asyncio.ensure_future(backend.take(pair("u3", "o", i))) for i in range(1, 60)]
        await asyncio.sleep(0)

        await backend.close()
        replies = await resolved(callers)
        redis_cluster.finish_move(move)

        assert {type(reply) for reply in replies} <= {Reply, BackendError}
        assert "the connection to the Redis Cluster was closed" in {str(one) for one in replies}
        with pytest.raises(BackendError, match="was closed"):
            await fleet.add(one)
        fleet.refresh_soon()
        assert fleet._refreshing is None or fleet._refreshing.done()
        assert (await backend.take(one)).allowed
        back(redis_cluster, move)


class Node:
    """A node that says what a test wants it to."""

    def __init__(self) -> None:
        self.slots: Callable[[], bytes] = lambda: slots_of(("", self.port))
        self.says: Callable[[list[bytes]], bytes | None] = lambda words: (
            b"*2\r\n:%d\r\n:1\r\n" % START
        )
        self.asked: Counter[bytes] = Counter()
        self.open = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._server.close()
        await poll(lambda: not self.open)

    @property
    def url(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while head := await reader.readline():
                words = []
                for _ in range(int(head[1:])):
                    length = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(length + 2))[:-2])
                self.asked[words[0]] += 1
                if reply := self._reply(words):
                    writer.write(reply)
        except OSError:
            pass
        finally:
            self.open -= 1
            writer.close()

    def _reply(self, words: list[bytes]) -> bytes | None:
        if words[0] == b"CLUSTER":
            return self.slots()
        if words[0] == b"TIME":
            return b"*2\r\n$2\r\n10\r\n$1\r\n0\r\n"
        return self.says(words) if words[0] in (b"EVAL", b"EVALSHA") else b"+OK\r\n"


def slots_of(*nodes: tuple[str, int]) -> bytes:
    """Return the reply that shares all slots between nodes."""
    parts = []
    for i, (host, port) in enumerate(nodes):
        first, last = SLOTS * i // len(nodes), SLOTS * (i + 1) // len(nodes) - 1
        parts.append(
            b"*3\r\n:%d\r\n:%d\r\n*2\r\n$%d\r\n%b\r\n:%d\r\n"
            % (first, last, len(host), host.encode(), port)
        )
    return b"*%d\r\n" % len(parts) + b"".join(parts)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class TestNodesThatErr:
    @pytest.mark.fault("F5")
    @pytest.mark.parametrize("word", ["MOVED", "ASK"])
    async def test_redirection_in_circles_ends_in_an_error(self, word: str) -> None:
        async with Node() as node:
            node.says = lambda words: f"-{word} 7 :{node.port}\r\n".encode()
            backend = ClusterBackend(node.url, timeout=PATIENT)

            with pytest.raises(BackendError, match="more than 8 nodes sent a decision on"):
                await backend.take(pair("u1", "o1"))

            assert node.asked[b"EVALSHA"] == 9
            assert node.asked[b"ASKING"] == (8 if word == "ASK" else 0)
            await backend.close()

    @pytest.mark.fault("F5")
    @pytest.mark.parametrize("word", ["MOVED", "ASK"])
    async def test_redirection_to_a_dead_node_is_an_error_and_found_out_later(
        self, word: str
    ) -> None:
        async with Node() as node:
            dead = closed_port()
            node.says = lambda words: f"-{word} 7 127.0.0.1:{dead}\r\n".encode()
            backend = ClusterBackend(node.url, timeout=PATIENT)

            with pytest.raises(BackendError, match="cannot connect to Redis"):
                await backend.take(pair("u1", "o1"))
            node.says = Node().says
            await poll(lambda: ("127.0.0.1", dead) not in backend._fleet()._members)

            with pytest.raises(BackendError, match="is no decision"):
                await backend.take(pair("u1", "o1"))
            await backend.close()

    @pytest.mark.fault("F2", "F5")
    async def test_script_lost_where_a_slot_is_going_is_asked_for_again_with_its_text(
        self,
    ) -> None:
        async with Node() as source, Node() as target:
            source.says = lambda words: f"-ASK 7 127.0.0.1:{target.port}\r\n".encode()
            target.says = lambda words: b"-NOSCRIPT no such\r\n"
            backend = ClusterBackend(source.url, timeout=PATIENT)

            with pytest.raises(BackendError, match="Redis refused: NOSCRIPT no such"):
                await backend.take(pair("u1", "o1"))

            assert source.asked[b"EVALSHA"] == 1
            assert target.asked[b"EVALSHA"] == target.asked[b"EVAL"] == 1
            assert target.asked[b"ASKING"] == 2
            await backend.close()

    @pytest.mark.fault("F5")
    @pytest.mark.parametrize("where", ["", "7", "x 127.0.0.1:1", "7 nowhere", "16384 a:1", "7 a:0"])
    async def test_redirection_to_nowhere_is_an_error_and_ends_the_connection(
        self, where: str
    ) -> None:
        async with Node() as node:
            node.says = lambda words: f"-MOVED {where}\r\n".encode()
            backend = ClusterBackend(node.url, timeout=PATIENT)

            with pytest.raises(BackendError, match="Redis refused: MOVED"):
                await backend.take(pair("u1", "o1"))
            node.says = lambda words: b"*4\r\n:10\r\n:1\r\n:5\r\n:6\r\n"

            assert (await backend.take(pair("u1", "o1"))).allowed
            await backend.close()

    @pytest.mark.parametrize("host", ["", "?"])
    async def test_node_that_does_not_know_its_host_is_where_it_was_asked(self, host: str) -> None:
        async with Node() as node:
            node.slots = lambda: slots_of((host, node.port))
            node.says = lambda words: b"*4\r\n:10\r\n:1\r\n:5\r\n:6\r\n"
            backend = ClusterBackend(node.url, timeout=PATIENT)

            assert await backend.take(pair("u1", "o1")) == (True, 10, [5, 6])

            await backend.close()

    @pytest.mark.parametrize(
        "told", [b"*0\r\n", b":1\r\n", b"*1\r\n:1\r\n", b"-ERR no\r\n", b"?\r\n"]
    )
    async def test_slots_that_make_no_sense_are_asked_for_elsewhere(self, told: bytes) -> None:
        async with Node() as node, Node() as good:
            node.slots = lambda: told
            good.says = lambda words: b"*4\r\n:10\r\n:1\r\n:5\r\n:6\r\n"
            backend = ClusterBackend(f"{node.url},127.0.0.1:{good.port}", timeout=PATIENT)

            assert (await backend.take(pair("u1", "o1"))).allowed

            await backend.close()

    async def test_slot_that_nobody_serves_is_an_error_until_somebody_does(self) -> None:
        async with Node() as node:
            node.slots = lambda: b"*1\r\n*3\r\n:0\r\n:0\r\n*2\r\n$0\r\n\r\n:%d\r\n" % node.port
            node.says = lambda words: b"*4\r\n:10\r\n:1\r\n:5\r\n:6\r\n"
            backend = ClusterBackend(node.url, timeout=PATIENT)
            backend.join("test", Layout(1))

            with pytest.raises(BackendError, match="no node of the Redis Cluster serves slot"):
                await backend.take(pair("u1", "o1"))
            node.slots = lambda: slots_of(("", node.port))
            owners = backend._fleet()
            owners.refresh_soon()
            await poll(lambda: owners._owners[-1] is not None or retry(owners.refresh_soon))

            assert (await backend.take(pair("u1", "o1"))).allowed
            await backend.close()

    async def test_keys_apart_whose_slot_lost_its_node_are_an_error(self) -> None:
        async with Node() as node:
            node.says = lambda words: b"-TRYAGAIN later\r\n"
            backend = ClusterBackend(node.url, timeout=PATIENT)
            await backend.open()
            fleet = backend._fleet()
            caller = asyncio.ensure_future(backend.take(pair("u1", "o1")))
            await poll(lambda: node.asked[b"EVALSHA"] > 1)
            node.slots = lambda: b"-LOADING\r\n"
            fleet._owners = [None] * SLOTS

            with pytest.raises(BackendError, match="no node of the Redis Cluster serves slot"):
                await caller

            await backend.close()

    @pytest.mark.fault("F1")
    async def test_silent_cluster_fails_at_the_deadline_from_the_first_decision_on(self) -> None:
        async with Node() as node:
            node.slots = lambda: b""
            node.says = lambda words: None
            backend = ClusterBackend(node.url, timeout=IMPATIENT)

            with pytest.raises(BackendError, match=r"did not answer within 0\.1 s"):
                await backend.take(pair("u1", "o1"))
            await backend.close()
            node.slots = lambda: slots_of(("", node.port))
            for _ in range(2):
                with pytest.raises(BackendError, match=r"did not answer within 0\.1 s"):
                    await backend.take(pair("u1", "o1"))

            await backend.close()

    async def test_closing_while_opening_fails_who_waits_for_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in (fleet_module, nodecalls_module):
            monkeypatch.setattr(module, "MAX_WAITING", 5)
        async with Node() as node:
            node.slots = lambda: b""
            backend = ClusterBackend(node.url, timeout=PATIENT)
            callers = [asyncio.ensure_future(backend.take(pair("u1", "o1"))) for _ in range(7)]
            await poll(lambda: node.asked[b"CLUSTER"] == 1)

            await backend.close()
            replies = await resolved(callers)

            closed = "the connection to the Redis Cluster was closed"
            full = "5 decisions are waiting for Redis already"
            assert [str(one) for one in replies] == [closed] * 5 + [full] * 2

    async def test_connection_to_a_node_that_left_is_closed(self) -> None:
        async with Node() as node, Node() as leaving:
            node.slots = lambda: slots_of(("", node.port), ("127.0.0.1", leaving.port))
            leaving.says = lambda words: None
            backend = ClusterBackend(node.url, timeout=PATIENT)
            await backend.open()
            await poll(lambda: leaving.open == 1)
            fleet = backend._fleet()
            member = fleet._members["127.0.0.1", leaving.port]
            future = member.calls.add(pair("u1", "o1"))
            member.link.pump()
            await poll(lambda: leaving.asked[b"EVALSHA"] == 1)
            node.slots = lambda: slots_of(("", node.port))

            fleet.refresh_soon()
            seen = node.asked[b"CLUSTER"]
            await poll(lambda: node.asked[b"CLUSTER"] >= seen + 2)
            while_waited_for = leaving.open
            member.link.drop("the test goes on")
            await poll(lambda: leaving.open == 0)

            assert while_waited_for == 1
            assert isinstance(future.exception(), BackendError)
            await poll(lambda: len(fleet._members) == 1)
            await backend.close()

    async def test_refresh_that_fails_leaves_what_was_known(self) -> None:
        async with Node() as node:
            node.says = lambda words: b"*4\r\n:10\r\n:1\r\n:5\r\n:6\r\n"
            backend = ClusterBackend(node.url, timeout=PATIENT)
            await backend.take(pair("u1", "o1"))
            node.slots = lambda: b"-LOADING\r\n"

            backend._fleet().refresh_soon()
            await poll(lambda: backend._fleet()._refreshing is None)

            assert (await backend.take(pair("u1", "o1"))).allowed
            await backend.close()

    async def test_what_is_redirected_is_bounded_and_fails_once_closed(
        self, backend: ClusterBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fleet = backend._fleet()
        calls = fleet._member_of("test:0").calls
        fleet._closed = True
        futures = []
        for send in (
            lambda call: fleet.redirect(call, Refusal("ASK 7 127.0.0.1:1"), ("a", 1)),
            fleet.try_again,
            lambda call: taken_over(call, calls, monkeypatch),
        ):
            futures.append(calls.add(pair("u1", "o1")))
            call = calls.next_call()
            assert call is not None
            send(call)

        closed = "the connection to the Redis Cluster was closed"
        full = "0 decisions are waiting for Redis already"
        assert [str(one.exception()) for one in futures] == [closed, closed, full]


def taken_over(call: Call, calls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fleet_module, nodecalls_module):
        monkeypatch.setattr(module, "MAX_WAITING", 0)
    calls.take_over(call.decisions)


def retry(refresh_soon: Callable[[], None]) -> bool:
    refresh_soon()
    return False


class TestLoopsAndProcesses:
    async def test_every_event_loop_has_its_own_connections(self, cluster_url: str) -> None:
        backend = ClusterBackend(cluster_url, clock=Clock(), timeout=PATIENT)
        await backend.take(pair("u0", "o1"))

        async def take(i: int) -> None:
            await backend.take(pair(f"u{i}", "o1"))
            await backend.close()

        threads = [threading.Thread(target=lambda i=i: asyncio.run(take(i))) for i in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)

        reply = await backend.take(pair("u0", "o1"))
        assert list(reply.debts) == [2 * STEPS[0], 6 * STEPS[1]]
        await backend.close()
        await backend.take(pair("u0", "o1"))
        assert len(backend._sessions) == 1
        await backend.close()

    def test_child_of_a_fork_makes_its_own_connections(self, cluster_url: str) -> None:
        program = f"""
            import asyncio, os
            from tieredlimit.backends import ClusterBackend
            from tests.test_cluster import pair
            backend = ClusterBackend({cluster_url!r}, timeout=10)
            parent = asyncio.new_event_loop()
            parent.run_until_complete(backend.take(pair("u1", "o1")))
            child = os.fork()
            if not child:
                asyncio._set_running_loop(None)
                fresh = asyncio.new_event_loop()
                reply = fresh.run_until_complete(backend.take(pair("u1", "o1")))
                os._exit(0 if reply.allowed and len(backend._sessions) == 1 else 1)
            status = os.waitpid(child, 0)[1]
            reply = parent.run_until_complete(backend.take(pair("u1", "o1")))
            parent.run_until_complete(backend.close())
            print(status, reply.allowed)
        """

        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

        assert (ran.stdout.strip(), ran.stderr) == ("0 True", "")


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("redis://a:1", 'the Redis URL starts with "redis"'),
            ("redis+cluster://", "node 1 of the Redis URL is not host:port"),
            ("redis+cluster://:hush@a", "node 1 of the Redis URL"),
            ("redis+cluster://:hush@a:1,", "node 2 of the Redis URL"),
            ("redis+cluster://:hush@a:0", "node 1 of the Redis URL"),
            ("redis+cluster://:hush@a:65536", "node 1 of the Redis URL"),
            ("redis+cluster://:hush@a:1,b:x", "node 2 of the Redis URL"),
            ("redis+cluster://u:hush/x@a:1", "node 1 of the Redis URL"),
            ("redis+cluster://u:hush,a:1", "node 1 of the Redis URL"),
            ("redis+cluster://:hush@[::1:1", "node 1 of the Redis URL"),
            ("redis+cluster://:hush@a:1/3", "database 0 only"),
            ("redis+cluster://:hush@a:1?socket_timeout=soon", "the Redis URL cannot be read"),
            ("redis+cluster://:hush@a:1?no_such_option=1", "no_such_option"),
        ],
    )
    def test_url_that_cannot_be_used_is_an_error_without_its_password(
        self, url: str, said: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            ClusterBackend(url)

        assert said in str(caught.value)
        assert "hush" not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "seeds"),
        [
            ("redis+cluster://a:1", [("a", 1)]),
            ("redis+cluster://a:1,b:2/0", [("a", 1), ("b", 2)]),
            ("rediss+cluster://u:p%40@[::1]:1,[fe80::2]:2/", [("::1", 1), ("fe80::2", 2)]),
            ("redis+cluster://p,w@a:1,[::1]:2?socket_keepalive=1", [("a", 1), ("::1", 2)]),
        ],
    )
    def test_all_nodes_of_a_url_are_known(self, url: str, seeds: list[tuple[str, int]]) -> None:
        backend = ClusterBackend(url)

        assert backend.seeds == seeds
        for address in seeds:
            connection = backend.connection_to(address)
            assert (connection.host, connection.port) == address
            assert ("SSL" in type(connection).__mro__[1].__name__) == url.startswith("rediss")

    @pytest.mark.parametrize("timeout", [0, -1, float("nan")])
    def test_timeout_must_be_above_zero(self, timeout: float) -> None:
        with pytest.raises(UsageError, match="timeout must be above 0"):
            ClusterBackend("redis+cluster://a:1", timeout=timeout)
