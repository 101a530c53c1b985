"""Start real Redis Clusters and Sentinels for tests, move their slots and let them fail over."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any, Self

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from tests.servers import RedisServer, StartError

HOST = "127.0.0.1"
SLOTS = 16384
WAIT_SECONDS = 30.0
POLL_SECONDS = 0.02
NODE_TIMEOUT_MS = 1000
# Without them a full synchronisation waits for seconds, or for the disk.
REPLICATION = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
CLUSTER = (
    *("--cluster-enabled", "yes", "--cluster-announce-ip", HOST),
    *("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-replica-validity-factor", "0"),
    *REPLICATION,
)


@dataclass(frozen=True, slots=True)
class Move:
    """A slot on its way: the source asks clients on (ASK), the target takes those who ASKED."""

    slot: int
    source: RedisServer
    target: RedisServer


class RedisCluster:
    """A Redis Cluster on loopback, from `with` until its end.

    Attributes:
        nodes: All servers, the first masters first, then their replicas in turn.
        masters: The servers that were masters at first, whatever failovers made of them.
    """

    def __init__(self, masters: int = 3, replicas: int = 1) -> None:
        self.nodes: list[RedisServer] = [_Node(*CLUSTER) for _ in range(masters * (1 + replicas))]
        self.masters = self.nodes[:masters]
        self._moves: list[Move] = []

    @property
    def startup(self) -> tuple[str, int]:
        """Host and port of a node that runs."""
        return HOST, self.living[0].port

    @property
    def url(self) -> str:
        return "redis+cluster://{}{}:{}".format(RedisServer.login, *self.startup)

    @property
    def living(self) -> list[RedisServer]:
        return [node for node in self.nodes if node._process is not None]

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.enter_context(node)
            self._form()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def keyslot(self, key: str) -> int:
        slot: Any = self.living[0].command("CLUSTER KEYSLOT", key)
        return int(slot)

    def owner_of(self, key: str) -> RedisServer:
        return self.owner_of_slot(self.keyslot(key))

    def owner_of_slot(self, slot: int) -> RedisServer:
        view = _view(self.living[0])
        return next(node for node in self.living if slot in view[node.port].slots)

    def move_slot(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Hand a slot and its keys from its owner to another master, step by step."""
        self.finish_move(self._begin(Move(slot, source, target)))

    def begin_move(self, slot: int) -> Move:
        """Open a slot towards the master after its owner. No key has moved yet."""
        source, owners = self.owner_of_slot(slot), self._owners()
        return self._begin(Move(slot, source, owners[(owners.index(source) + 1) % len(owners)]))

    def move_keys(self, move: Move, *keys: str) -> None:
        """Move these keys of an open slot; where they are some of many, scripts meet TRYAGAIN."""
        where = (HOST, str(move.target.port), "", "0", "5000", "KEYS")
        move.source.command("MIGRATE", *where, *keys)

    def finish_move(self, move: Move) -> None:
        """Move the keys that are left, change the owner, wait until every node knows."""
        asked: Any = move.source.command("CLUSTER GETKEYSINSLOT", str(move.slot), "1000000")
        if asked:
            self.move_keys(move, *asked)
        # The target first: a slot that nobody owns would close the cluster.
        for node in dict.fromkeys([move.target, move.source, *self._owners()]):
            node.command("CLUSTER", "SETSLOT", str(move.slot), "NODE", _id(move.target))
        self._moves.remove(move)
        _wait(self._agrees, f"all nodes know that slot {move.slot} has moved")

    def kill_master(self, index: int) -> None:
        """End one of `masters` as a crash would."""
        self.masters[index].kill()

    def wait_for_failover(self) -> None:
        """Return once living masters own all slots and every living node knows."""
        _wait(self._agrees, "the cluster has failed over")

    def flush(self) -> None:
        """Close what moves are open, as if they had not begun; drop all keys and statistics."""
        for move in self._moves:
            for node in (move.source, move.target):
                node.command("CLUSTER", "SETSLOT", str(move.slot), "STABLE")
        self._moves.clear()
        for node in self._owners():
            node.command("FLUSHALL")
        for node in self.living:
            node.command("CONFIG", "RESETSTAT")

    def commandstats(self) -> dict[int, Counter[str]]:
        """Return how often each command ran since the last flush, by port of the node.

        What this harness asks the nodes is counted, too: HELLO, CLIENT, INFO, CLUSTER.
        """
        stats = {node.port: _info(node, "commandstats") for node in self.living}
        return {
            port: Counter({name.removeprefix("cmdstat_"): s["calls"] for name, s in of.items()})
            for port, of in stats.items()
        }

    def _owners(self) -> list[RedisServer]:
        view = _view(self.living[0])
        return [node for node in self.living if view[node.port].slots]

    def _form(self) -> None:
        for epoch, node in enumerate(self.nodes, 1):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", str(epoch))
        bounds = [SLOTS * i // len(self.masters) for i in range(len(self.masters) + 1)]
        for master, (first, end) in zip(self.masters, pairwise(bounds), strict=True):
            master.command("CLUSTER", "ADDSLOTS", *map(str, range(first, end)))
        for one, other in combinations(self.nodes, 2):
            one.command("CLUSTER", "MEET", HOST, str(other.port))
        _wait(self._has_met, "all nodes know each other")
        for i, replica in enumerate(self.nodes[len(self.masters) :]):
            replica.command("CLUSTER", "REPLICATE", _id(self.masters[i % len(self.masters)]))
        _wait(self._agrees, "the cluster is up")

    def _has_met(self) -> bool:
        ids = {_id(node) for node in self.nodes}
        return all({seen.id for seen in _view(node).values()} == ids for node in self.nodes)

    def _agrees(self) -> bool:
        """Whether every living node is ready and has the same picture, in which they own all."""
        ports, views = {node.port for node in self.living}, []
        for node in self.living:
            state: Any = node.command("CLUSTER INFO")
            linked = _info(node).get("master_link_status", "up") == "up"
            seen = {port: one for port, one in _view(node).items() if one.slots or port in ports}
            if state["cluster_state"] != "ok" or not linked or seen.keys() != ports:
                return False
            views.append(seen)
        failing = any(seen.role == "fail" for seen in views[0].values())
        return views.count(views[0]) == len(views) and not failing

    def _begin(self, move: Move) -> Move:
        slot = str(move.slot)
        self._moves.append(move)
        move.target.command("CLUSTER", "SETSLOT", slot, "IMPORTING", _id(move.source))
        move.source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", _id(move.target))
        return move


class RedisSentinels:
    """A primary, its replica and three sentinels, from `with` until its end."""

    NAME = "buckets"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            first = stack.enter_context(RedisServer(*REPLICATION))
            follow = ("--replicaof", HOST, str(first.port))
            self.servers = [first, stack.enter_context(RedisServer(*REPLICATION, *follow))]
            _wait(lambda: _info(self.servers[1])["master_link_status"] == "up", "a replica is up")
            sentinels = [_SentinelServer(self.NAME, first) for _ in range(3)]
            self.sentinels = [stack.enter_context(sentinel) for sentinel in sentinels]
            _wait(self._is_known, "the sentinels know each other and the replica")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    @property
    def primary(self) -> RedisServer:
        """The server that the first sentinel names."""
        (named,) = (one for one in self.servers if one.port == self._named()[0])
        return named

    @property
    def replica(self) -> RedisServer:
        """The other one."""
        (other,) = (one for one in self.servers if one.port != self._named()[0])
        return other

    def client(self, **options: Any) -> redis.asyncio.Redis:
        """Return a client of whichever is primary, without retries. It is yours to close."""
        once: dict[str, Any] = {"retry": Retry(NoBackoff(), 0), "socket_connect_timeout": 1.0}
        sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]  # redis-py's is untyped
            [(HOST, sentinel.port) for sentinel in self.sentinels],
            sentinel_kwargs={**once, "socket_timeout": 1.0},
        )
        options = {**once, **options}
        client: _Client = sentinel.master_for(self.NAME, redis_class=_Client, **options)
        return client

    def fail_over(self) -> None:
        """Kill the primary and wait until all sentinels name the other, which then is one."""
        old, new = self.primary, self.replica
        old.kill()
        self._wait_for(new)

    def hand_over(self) -> None:
        """Have the replica promoted. For seconds the old primary goes on as if nothing were."""
        new = self.replica
        self.sentinels[0].command("SENTINEL", "FAILOVER", self.NAME)
        self._wait_for(new)

    def _wait_for(self, new: RedisServer) -> None:
        _wait(
            lambda: set(self._named()) == {new.port} and _info(new)["role"] == "master",
            "the sentinels have failed over",
        )

    def _named(self) -> list[int]:
        asked = "SENTINEL GET-MASTER-ADDR-BY-NAME"
        addresses: list[Any] = [one.command(asked, self.NAME) for one in self.sentinels]
        return [int(port) for _, port in addresses]

    def _is_known(self) -> bool:
        for sentinel in self.sentinels:
            primary: Any = sentinel.command("SENTINEL MASTER", self.NAME)
            replicas: Any = sentinel.command("SENTINEL SLAVES", self.NAME)
            if (primary["num-other-sentinels"], primary["flags"]) != (2, "master"):
                return False
            if [replica["master-link-status"] for replica in replicas] != ["ok"]:
                return False
        return True


class _Client(redis.asyncio.Redis):
    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        pool: Any = self.connection_pool
        for sentinel in pool.sentinel_manager.sentinels:
            await sentinel.aclose()


class _Node(RedisServer):
    def __enter__(self) -> Self:
        # The nodes talk on their port + 10000, which must be one, too.
        try:
            return super().__enter__()
        except StartError as exc:
            if "port number too high" not in str(exc):
                raise
            return self.__enter__()


class _SentinelServer(RedisServer):
    def __init__(self, name: str, primary: RedisServer) -> None:
        super().__init__()
        self._watch = name, primary.port

    def _start(self) -> None:
        # A sentinel keeps what it learns in its configuration: it must be a file, and stay.
        file = self._folder / f"{self.port}.conf"
        if not file.exists():
            name, port = self._watch
            file.write_text(
                f"bind {HOST}\nport {self.port}\ndir {self._folder}\n"
                f"sentinel monitor {name} {HOST} {port} 2\n"
                f"sentinel down-after-milliseconds {name} 500\n"
                f"sentinel failover-timeout {name} 2000\n",
                "utf-8",
            )
        with self._log_file.open("ab") as log:
            command: list[str | Path] = [self._binary, file, "--sentinel"]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            self._wait_until_ready()
        except StartError as exc:
            self.kill()
            raise StartError(f"{exc}. The sentinel logged:\n{self.log}") from None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A node as another one describes it."""

    id: str
    role: str
    slots: frozenset[int]


def _view(node: RedisServer) -> dict[int, _Seen]:
    """Return by port what a node knows of the others and itself."""
    nodes: Any = node.command("CLUSTER NODES")
    view = {}
    for address, one in nodes.items():
        flags = set(one["flags"].split(",")) - {"myself"}
        role = "fail" if flags & {"fail", "fail?", "handshake"} else "".join(flags)
        slots = (range(int(span[0]), int(span[-1]) + 1) for span in one["slots"])
        port = int(address.rpartition(":")[2])
        view[port] = _Seen(one["node_id"], role, frozenset(chain.from_iterable(slots)))
    return view


def _id(node: RedisServer) -> str:
    return _view(node)[node.port].id


def _info(node: RedisServer, section: str = "replication") -> dict[str, Any]:
    found: Any = node.command("INFO", section)
    return dict(found)


def _wait(until: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Waited {WAIT_SECONDS} s, and still not: {what}")
        time.sleep(POLL_SECONDS)
