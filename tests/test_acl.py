"""The users that `tieredlimit acl` makes may do what a worker or an operator does, nothing else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from struct import pack
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from tests.clusters import RedisCluster
from tests.servers import RedisServer
from tests.test_cli_control import EXAMPLE, TEAM, Workers, run
from tests.test_cli_pools import POOLED as POOLED_POLICY
from tieredlimit import Account, Limiter, Policy, follow
from tieredlimit._core.keys import LEASES, key_prefix
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.acl import Role, rules, setuser
from tieredlimit.backends import Charge, ClusterBackend, RedisBackend, news
from tieredlimit.backends.control import ControlStore, control_store, shard_key
from tieredlimit.cli import main
from tieredlimit.errors import BackendError

pytestmark = [pytest.mark.redis, pytest.mark.login("default")]  # it makes users of its own

URL, POOLED = object(), object()
PASSWORD = "a-word-for-tests"
REFUSAL = r"(?i)permission|user executing the script can't"
PATIENT = 5.0
DEADLINE = 10.0
ANN, BEN = Account("ann"), Account("ben", within={"org": "o7"})
POLICY = Policy.from_dict(
    {
        "order": ["everyone"],
        "features": {
            "image": {"routes": ["POST /images"]},
            "video": {
                "routes": ["POST /videos"],
                "pool": {
                    "rate": "100/day",
                    "concurrency": 2,
                    "lease": "10 minutes",
                },
                "refund_on": [500],
            },
        },
        "tiers": {
            "everyone": {
                "quotas": {
                    "image": ["50/hour", {"rate": "90/hour", "per": "org", "name": "org"}],
                    "video": {"rate": "20/day", "concurrency": 2, "lease": "10 minutes"},
                }
            }
        },
    }
)


def url_of(server: RedisServer, user: str, database: int = 1) -> str:
    return f"redis://{user}:{PASSWORD}@127.0.0.1:{server.port}/{database}"


def allow(server: RedisServer, role: Role, without: str = "", *, cluster: bool = False) -> str:
    """Make the user of a role, but for one of its rules; return its name."""
    words = setuser(role, role, TEAM, password=PASSWORD, cluster=cluster)
    server.command(*[word for word in words if word != without])
    server.command("ACL", "LOG", "RESET")
    return role


def refused(server: RedisServer) -> list[str]:
    """Return what the server has refused, the latest first: commands, keys, channels."""
    entries: Any = server.command("ACL", "LOG")
    found = []
    for entry in entries:
        # A map in RESP3, which newer releases of redis-py speak by default.
        words = list(entry) if isinstance(entry, list) else list(chain(*entry.items()))
        found.append(words[words.index(b"object") + 1].decode())
    return found


class Admin:
    """Do to the database of a test what the worker in it must cope with."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.client = redis.Redis(port=server.port, db=1)
        self.published = NOTHING

    def close(self) -> None:
        self.client.close()

    def flush(self) -> None:
        self.client.flushall()

    def calls(self, command: str) -> int:
        """Return how often a command ran since the last `forget_calls`, in scripts or not."""
        stats: Any = self.client.info("commandstats")
        found: int = stats.get(f"cmdstat_{command}", {}).get("calls", 0)
        return found

    def forget_calls(self) -> None:
        self.client.config_resetstat()

    def store(self) -> ControlStore:
        url = f"redis://127.0.0.1:{self.server.port}/1"
        return control_store(RedisBackend.from_url(url), TEAM, 1)

    async def publish(self) -> int:
        """Publish one more revision; return its number."""
        store = self.store()
        number = self.published.number + 1
        revision = Revision(number, made_us=number, change=f"change {number}")
        self.published = (await store.publish(revision, seen=self.published)).revision
        await store.close()
        return number

    def litter(self) -> None:
        """Leave what a worker clears away: slots of long ago and far ahead, who fell silent."""
        old, far = pack("<16sd", b"old", 6e8), pack("<16sd", b"far", 6e8)
        slots = key_prefix(TEAM, 0, "video", "everyone" + LEASES, None) + "ann"
        self.client.zadd(slots, {old: 1, far: 4e15})
        self.client.zadd(f"tl:{{{TEAM}}}:workers", {"silent": 1})
        self.client.hset(f"tl:{{{TEAM}}}:heartbeats", "silent", "{}")


class Work:
    """Do all that a worker does, until something is refused."""

    def __init__(self, admin: Admin, user: str) -> None:
        self.admin = admin
        self.url = url_of(admin.server, user)

    def stopped(self) -> bool:
        return bool(refused(self.admin.server))

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait for something, or for a refusal."""
        async with asyncio.timeout(DEADLINE):
            while not done() and not self.stopped():  # noqa: ASYNC110 -- a server, not an event
                await asyncio.sleep(0.005)

    async def do(self) -> None:
        """Do it; whatever fails is in the server's log, or is raised."""
        self.admin.flush()
        self.admin.published = NOTHING
        await self.admin.publish()
        self.admin.litter()
        limiter = Limiter(POLICY, RedisBackend.from_url(self.url, timeout=PATIENT), namespace=TEAM)
        try:
            await self.work(limiter)
        except BaseException:
            if not self.stopped():
                raise
        finally:
            with suppress(BackendError):
                await limiter.close()

    async def work(self, limiter: Limiter) -> None:
        steps: Sequence[Callable[[Limiter], Awaitable[None]]] = (
            self.start, self.take, self.hold, self.settle, self.refund, self.look, self.follow,
            self.reload, self.seed,
        )  # fmt: skip
        for step in steps:
            await step(limiter)
            if self.stopped():
                return

    async def start(self, limiter: Limiter) -> None:
        await limiter.open()
        await self.until(lambda: limiter.revision[0] == self.admin.published.number)

    async def take(self, limiter: Limiter) -> None:
        decisions = await asyncio.gather(
            limiter.take(ANN, "image"), limiter.take(BEN, "image"), limiter.take(ANN, "image", 60)
        )
        if not self.stopped():
            assert [one.reason for one in decisions] == ["allowed", "allowed", "quota"]

    async def hold(self, limiter: Limiter) -> None:
        decision = await limiter.take(ANN, "video")
        if self.stopped():
            return
        assert decision.allowed
        assert decision.lease is not None
        assert await decision.lease.renew()
        assert await decision.lease.release()

    async def settle(self, limiter: Limiter) -> None:
        reservation = limiter.reserve(ANN, "image", 5)
        await reservation.take()
        assert await reservation.settle(0)

    async def refund(self, limiter: Limiter) -> None:
        decision = await limiter.take(BEN, "video")
        assert decision.allowed
        await limiter.refund(decision)
        if decision.lease is not None:
            await decision.lease.release()

    async def look(self, limiter: Limiter) -> None:
        assert set(await limiter.usage(ANN)) == {"image", "video"}

    async def follow(self, limiter: Limiter) -> None:
        self.admin.forget_calls()
        number = await self.admin.publish()
        await self.until(lambda: limiter.revision[0] == number)
        # Its publisher has waited for the replica once: then a worker makes sure of it.
        await self.until(lambda: self.admin.calls("wait") > 1 and self.admin.calls("ping") > 0)

    async def reload(self, limiter: Limiter) -> None:
        self.admin.client.script_flush()
        assert (await limiter.take(ANN, "image")).reason == "allowed" or self.stopped()

    async def seed(self, limiter: Limiter) -> None:
        self.admin.flush()
        for key in (f"tl:{{{TEAM}}}:head", shard_key(TEAM, 0)):
            await self.until(lambda key=key: bool(self.admin.client.exists(key)))  # type: ignore[misc]  # mypy cannot infer a lambda with a default


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """A server with a replica, which completing a revision waits for."""
    options = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
    with RedisServer(*options) as server, ExitStack() as stack:
        follow_it = ("--replicaof", "127.0.0.1", str(server.port))
        stack.enter_context(RedisServer(*follow_it))
        deadline = time.monotonic() + DEADLINE
        while "'online'" not in str(server.command("INFO", "replication")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield server


@pytest.fixture
def admin(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    # What a worker does now and then it shall do while the test looks.
    monkeypatch.setattr(news, "PULSE", 0.1)
    monkeypatch.setattr(follow, "_COMPLETE_AFTER", (0.0, 0.0))
    admin = Admin(server)
    yield admin
    admin.close()


def granted(role: Role, *, cluster: bool = False) -> list[str]:
    """Return the rules of a role that allow something."""
    return [rule for rule in rules(role, TEAM, cluster=cluster) if rule[0] in "~&+"]


class TestWorker:
    async def test_all_that_a_worker_does_is_allowed(self, admin: Admin) -> None:
        work = Work(admin, allow(admin.server, "worker"))

        await work.do()

        assert refused(admin.server) == []

    @pytest.mark.parametrize("rule", granted("worker"))
    async def test_nothing_of_it_is_too_much(self, admin: Admin, rule: str) -> None:
        work = Work(admin, allow(admin.server, "worker", without=rule))

        await work.do()

        assert refused(admin.server) != []

    @pytest.mark.parametrize(
        "words",
        [
            ("FLUSHALL",),
            ("FLUSHDB",),
            ("KEYS", "*"),
            ("SCAN", "0"),
            ("CONFIG", "GET", "requirepass"),
            ("CONFIG", "SET", "maxmemory", "1"),
            ("ACL", "LIST"),
            ("ACL", "SETUSER", "worker", "+@all"),
            ("SCRIPT", "FLUSH"),
            ("MONITOR",),
            ("SHUTDOWN",),
            ("CLIENT", "KILL", "TYPE", "normal"),
            ("REPLICAOF", "NO", "ONE"),
            ("PSUBSCRIBE", "*"),
            ("GET", "session:1"),
            ("GET", "tl1:{other:0}:image:free::u1"),
            ("GET", "tl1:{team2:0}:image:free::u1"),
            ("SET", "tl:{other}:head", "1 0123456789abcdef"),
            ("SET", "tl:{team}:label", "staging"),
            ("PUBLISH", "tl:{other}:news", "1"),
            ("EVAL", "return redis.call('KEYS', '*')", "0"),
            ("EVAL", "return redis.call('GET', 'session:1')", "0"),
            ("EVAL", "return redis.call('GET', KEYS[1])", "1", "session:1"),
        ],
    )
    def test_everything_else_is_refused(self, admin: Admin, words: tuple[str, ...]) -> None:
        user = allow(admin.server, "worker")
        with (
            redis.Redis.from_url(url_of(admin.server, user)) as client,
            pytest.raises(redis.ResponseError, match=REFUSAL),
        ):
            client.execute_command(*words)

    async def test_label_that_asks_for_care_stays_out_of_its_reach(self, admin: Admin) -> None:
        url = url_of(admin.server, allow(admin.server, "worker"))
        store = control_store(RedisBackend.from_url(url), TEAM, 1)

        with pytest.raises(BackendError, match=r"(?i)permission"):
            await store.set_label("staging")

        await store.close()


async def serve(cluster: RedisCluster, without: str = "") -> set[str]:
    """Let a worker that lacks a rule take, also in a slot that moves; return what was refused."""
    for node in cluster.nodes:
        allow(node, "worker", without=without, cluster=True)
    host, port = cluster.startup
    backend = ClusterBackend(f"redis+cluster://worker:{PASSWORD}@{host}:{port}", timeout=PATIENT)
    move = cluster.begin_move(cluster.keyslot("{team:7}"))
    with suppress(BackendError):
        async with Limiter(POLICY, backend, namespace=TEAM) as limiter:
            assert {(await limiter.take(ANN, one)).allowed for one in ("image", "video")} == {True}
            # What is not in a slot that moves is asked for where it goes.
            shelf = limiter._table.entry("everyone", "image").shelves[0]
            assert (
                await backend.take([Charge(shelf.key(Account(f"u{without}"), 7), shelf, 1)])
            ).allowed
    cluster.finish_move(move)
    return {one for node in cluster.nodes for one in refused(node)}


async def test_worker_of_a_cluster_is_allowed_what_it_needs_beside(
    own_cluster: RedisCluster,
) -> None:
    assert await serve(own_cluster) == set()
    assert await serve(own_cluster, without="+asking") == {"asking"}
    assert {one[:7] for one in await serve(own_cluster, without="+cluster|slots")} == {"cluster"}
    assert "+select" not in rules("worker", TEAM, cluster=True)


class Crew(Workers):
    """Workers whose heartbeats are written by somebody who may."""

    def __init__(self, server: RedisServer, user: str) -> None:
        super().__init__(url_of(server, user), "a")
        self._all = f"redis://127.0.0.1:{server.port}/1"

    def store(self) -> ControlStore:
        return control_store(RedisBackend.from_url(self._all), TEAM, 1)


EVERY_COMMAND: Sequence[tuple[object, ...]] = (
    ("status",),
    ("label", "staging", "--yes"),
    ("label", "", "--yes"),
    ("policy", "push", EXAMPLE, "--yes"),
    ("close", "video", "--tier", "pro", "--yes"),
    ("overrides",),
    ("set", "video", "7/day", "--tier", "pro", "--yes"),
    ("open", "video", "--tier", "pro", "--ramp", "30m", "--yes"),
    ("history",),
    ("undo", "--yes"),
    ("policy", "pull"),
    ("policy", "show"),
    ("policy", "diff", EXAMPLE),
    ("policy", "rollback", "1", "--yes"),
    ("explain", "--account", "u1", "--plan", "pro", "--feature", "video"),
    ("table", "--redis", URL, POOLED),
    ("reset", "image", "--account", "u1", "--slots", "--yes"),
    ("refund", "image", "--tokens", "1", "--account", "u1", "--yes"),
    ("watch", "--seconds", "1"),
    ("doctor",),
)


def operate(admin: Admin, user: str, pooled: Path) -> list[Result]:
    """Run every command until something is refused, CONFIG left out; return what they said."""
    admin.flush()
    # So many that the first change drops some.
    admin.client.zadd(f"tl:{{{TEAM}}}:numbers", {f"0{i}": -i for i in range(1, 250)})
    crew = Crew(admin.server, user)
    crew.beat()
    said = []
    for words in EVERY_COMMAND:
        given = [crew.url if word is URL else pooled if word is POOLED else word for word in words]
        said.append(run(crew, *given))
        if told(admin.server):
            break
    return said


def told(server: RedisServer) -> list[str]:
    return [one for one in refused(server) if not one.startswith("config")]


@pytest.fixture
def pooled(tmp_path: Path) -> Path:
    file = tmp_path / "pooled.toml"
    file.write_text(POOLED_POLICY, "utf-8")
    return file


class TestOperator:
    def test_every_command_works(self, admin: Admin, pooled: Path) -> None:
        user = allow(admin.server, "operator")

        said = operate(admin, user, pooled)

        assert told(admin.server) == []
        # The doctor finds weaknesses: a replica that keeps nothing on disk, for one.
        assert [one.exit_code for one in said] == [0] * (len(EVERY_COMMAND) - 1) + [5]
        assert "configuration: CONFIG is refused" in said[-1].stdout
        assert "refused" not in said[-1].stdout.replace("CONFIG is refused", "")

    @pytest.mark.parametrize("rule", granted("operator"))
    def test_nothing_of_it_is_too_much(self, admin: Admin, pooled: Path, rule: str) -> None:
        user = allow(admin.server, "operator", without=rule)

        operate(admin, user, pooled)

        assert told(admin.server) != []

    @pytest.mark.parametrize(
        "words",
        [("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "requirepass"), ("GET", "session:1")],
    )
    def test_everything_else_is_refused(self, admin: Admin, words: tuple[str, ...]) -> None:
        user = allow(admin.server, "operator")
        with (
            redis.Redis.from_url(url_of(admin.server, user)) as client,
            pytest.raises(redis.ResponseError, match=REFUSAL),
        ):
            client.execute_command(*words)


class TestCommand:
    def test_line_can_be_pasted_as_it_is(self, own_server: RedisServer) -> None:
        line = acl("--worker", "--namespace", "media-prod").stdout.strip()

        own_server.command(*line.split())

        (password,) = [word[1:] for word in line.split() if word[0] == ">"]
        url = own_server_url(own_server, "media-prod-worker", password)
        with redis.Redis.from_url(url) as client:
            assert client.set("tl1:{media-prod:0}:image:free::u1", "x") is True

    def test_rules_of_a_user_can_be_replaced_without_its_password(
        self, own_server: RedisServer
    ) -> None:
        first = acl("--operator", "--user", "ops").stdout.split()
        again = acl("--worker", "--user", "ops", "--keep-password").stdout.split()
        (password,) = [word[1:] for word in first if word[0] == ">"]

        own_server.command(*first)
        own_server.command(*again)

        with redis.Redis.from_url(own_server_url(own_server, "ops", password)) as client:
            assert client.time()
            with pytest.raises(redis.ResponseError, match=r"(?i)permission"):
                client.get("tl:{default}:label")

    def test_each_password_is_another(self) -> None:
        made = [json.loads(acl("--worker", "--json").stdout) for _ in range(2)]

        assert made[0]["rules"] == made[1]["rules"] == rules("worker", "default")
        assert len({one["password"] for one in made}) == 2
        assert min(len(one["password"]) for one in made) >= 32

    def test_what_a_worker_can_still_do_is_said(self) -> None:
        assert "whoever has this password could publish one" in acl("--worker").stderr

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            ((), "Say for whom: --worker or --operator."),
            (("--worker", "--namespace", "a b"), "a namespace is 1 to 32"),
            (("--worker", "--namespace", "*"), "a namespace is 1 to 32"),
            (("--worker", "--user", "a >b"), "write 1 to 64 of letters"),
        ],
    )
    def test_wrong_words_are_explained(self, words: tuple[str, ...], told: str) -> None:
        result = acl(*words)

        assert result.exit_code == 2
        assert told in result.stderr


def acl(*words: str) -> Result:
    return CliRunner().invoke(main, ["acl", *words], catch_exceptions=False)


def own_server_url(server: RedisServer, user: str, password: str) -> str:
    return f"redis://{user}:{password}@127.0.0.1:{server.port}/0"
