"""Ids that are hashed in Redis, and ids that nothing writes into a log."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from click.testing import CliRunner, Result
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from tests.servers import Monitor, RedisServer
from tests.test_cli_control import EXAMPLE
from tests.test_cli_pools import POOLED
from tieredlimit import Account, BackendError, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit._core.keys import IdSecret, Layout, subject_name
from tieredlimit.backends import ClusterBackend, MemoryBackend, RedisBackend
from tieredlimit.cli import main

PATIENT = 5.0
SECRET, OTHER = "a secret for tests", "another one of them"
TEAM = "team"
OLD = datetime(2020, 1, 1, tzinfo=UTC)
# None of these stands anywhere else; some of them Redis would hold in another spelling.
IDS = ("zebra-7", "okapi@example.org", "gnu/é", "quagga" * 20, "192.0.2.77", "org-tapir")
NUMBER = 770_077
ANN, MAIL, SLASH, LONG = (Account(name, "pro", within={"org": "org-tapir"}) for name in IDS[:4])
ADDRESS = Account(IDS[4], anonymous=True)
POLICY: Mapping[str, Any] = {
    "order": ["everyone"],
    "features": {
        "image": {"routes": ["POST /images"], "outage": "deny"},
        "video": {
            "routes": ["POST /videos"],
            "pool": {"rate": "900/day", "concurrency": 90, "lease": "10 minutes"},
            "refund_on": [500],
        },
    },
    "tiers": {
        "everyone": {
            "quotas": {
                "image": ["2/day", {"rate": "900/day", "per": "org", "name": "org"}],
                "video": {"rate": "20/day", "concurrency": 2, "lease": "10 minutes"},
            }
        }
    },
}


def limiter_at(url: str, secret: str | None = SECRET, **given: Any) -> Limiter:
    backend = RedisBackend.from_url(url, timeout=PATIENT)
    return Limiter(POLICY, backend, namespace=TEAM, id_secret=secret, **given)


async def use(limiter: Limiter) -> list[str]:
    """Do with a limiter all that names accounts; return the tokens that were handed out."""
    tokens = []
    for account in (ANN, MAIL, SLASH, LONG, ADDRESS):
        for _ in range(3):
            await limiter.take(account, "image")
        first = await limiter.take(account, "video")
        assert first.lease is not None
        await first.lease.renew()
        tokens += [first.token, first.lease.token]
        await limiter.refund(first)
        reservation = limiter.reserve(account, "video", 3)
        await reservation.take()
        tokens.append(reservation.token)
        await reservation.settle(1)
        await limiter.usage(account)
    assert (await limiter.take(ANN, "video")).reason == "concurrency"
    return tokens


def held_by(server: RedisServer) -> str:
    """Return all keys and values of a server, readable."""
    found = []
    with redis.Redis(port=server.port) as client:
        for key in client.scan_iter():
            found.append(repr(key))
            kind = client.type(key)
            if kind == b"string":
                found.append(repr(client.get(key)))
            elif kind == b"zset":
                found.append(repr(client.zrange(key, 0, -1)))
            else:
                assert kind == b"hash"
                found.append(repr(client.hgetall(key)))
    return "\n".join(found)


def readable(text: str) -> list[str]:
    """Return which ids a text shows, as they are or as keys and logs spell them."""
    return [
        name
        for name in IDS
        if any(one in text for one in (name, repr(name)[1:-1], subject_name(name)))
    ]


class TestNames:
    def test_same_subject_has_the_same_name_and_only_with_the_same_secret(self) -> None:
        one, same, other = IdSecret(SECRET), IdSecret(SECRET), IdSecret(OTHER)

        assert one.name("u1") == same.name("u1")
        assert len({one.name("u1"), one.name("u2"), other.name("u1"), subject_name("u1")}) == 4
        assert re.fullmatch(r"~[0-9a-f]{32}", one.name("u1"))
        assert re.fullmatch(r"=\*~[0-9a-f]{32}", one.name("é" * 1000, "=*"))

    def test_fingerprint_tells_secrets_apart(self) -> None:
        assert IdSecret(SECRET).fingerprint == IdSecret(SECRET).fingerprint
        assert IdSecret(SECRET).fingerprint != IdSecret(OTHER).fingerprint

    @pytest.mark.parametrize("wrong", ["", "short", "x" * 15, 1234567890123456, b"x" * 16])
    def test_secret_that_can_be_guessed_is_refused_and_not_shown(self, wrong: Any) -> None:
        with pytest.raises(UsageError) as caught:
            Limiter(POLICY, id_secret=wrong)

        assert str(caught.value) == "id_secret must be a string of at least 16 characters"

    def test_lone_surrogate_is_an_error_here_too(self) -> None:
        with pytest.raises(UsageError, match=r"holds a lone surrogate at 1$"):
            IdSecret(SECRET).name("a\ud800")

    def test_record_without_a_secret_is_what_it_always_was(self) -> None:
        assert Layout(4).record() == "format 1, shards 4"

    @pytest.mark.parametrize("layout", [Layout(1), Layout(64, IdSecret(SECRET).fingerprint)])
    def test_record_comes_back(self, layout: Layout) -> None:
        assert Layout.read(layout.record().encode()) == layout

    @pytest.mark.parametrize("wrong", [b"", b"format 2, shards 1", b"format 1, shards 1, ids x"])
    def test_what_is_no_record_is_none(self, wrong: bytes) -> None:
        assert Layout.read(wrong) is None

    async def test_decisions_are_the_same_with_and_without(self) -> None:
        plain, hashed = (
            Limiter(POLICY, MemoryBackend(clock=lambda: 10**15), id_secret=secret)
            for secret in (None, SECRET)
        )

        for account in (ANN, MAIL, ANN, ADDRESS, ANN, Account(ADDRESS.id), LONG):
            one, other = [await limiter.take(account, "image") for limiter in (plain, hashed)]
            assert (one.allowed, one.remaining) == (other.allowed, other.remaining)

    def test_environment_gives_the_secret(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIEREDLIMIT_POLICY", str(EXAMPLE))
        monkeypatch.setenv("TIEREDLIMIT_ID_SECRET", SECRET)

        (shelf,) = Limiter.from_env()._table.entry("free", "image").shelves

        assert shelf.key(ANN).endswith(IdSecret(SECRET).name(ANN.id))


@pytest.mark.redis
class TestRedis:
    async def test_no_id_can_be_read_in_what_redis_is_told_or_holds(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with Monitor(redis_url) as monitor, limiter_at(redis_url) as limiter:
            await use(limiter)
            await limiter._force.store.beat(limiter._force.heartbeat())  # type: ignore[union-attr]  # Redis has one
            said = "\n".join(await monitor.commands())
            held = held_by(redis_server)

        assert readable(said) == readable(held) == []
        assert IdSecret(SECRET).name(ANN.id) in held
        assert '"denied"' in held

    async def test_without_a_secret_this_test_would_find_them(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with Monitor(redis_url) as monitor, limiter_at(redis_url, None) as limiter:
            await use(limiter)
            said = "\n".join(await monitor.commands())
            held = held_by(redis_server)

        # The long one as a digest that anybody can make.
        assert readable(said) == readable(held) == list(IDS)

    async def test_tokens_name_nobody(self, redis_url: str) -> None:
        async with limiter_at(redis_url) as limiter:
            tokens = await use(limiter)

        assert all(tokens)
        spelled = [repr(base64.urlsafe_b64decode(token + "==")) for token in tokens]
        assert readable("\n".join(tokens + spelled)) == []

    @pytest.mark.parametrize(
        ("first", "second", "same"),
        [
            (SECRET, OTHER, "id_secret"),
            (SECRET, None, "id_secret"),
            (None, SECRET, "id_secret"),
        ],
    )
    async def test_process_with_another_secret_is_refused(
        self,
        redis_server: RedisServer,
        redis_url: str,
        first: str | None,
        second: str | None,
        same: str,
    ) -> None:
        async with limiter_at(redis_url, first):
            late = limiter_at(redis_url, second)

            with pytest.raises(UsageError) as caught:
                await late.open()
            decision = await late.take(ANN, "image")

        assert f"give all its processes the same {same}, or another" in str(caught.value)
        assert (decision.allowed, decision.reason) == (False, "outage")
        assert redis_server.command("KEYS", "tl1:*image*") == []
        assert SECRET not in str(caught.value)
        await late.close()

    async def test_both_are_named_where_both_differ(self, redis_url: str) -> None:
        async with limiter_at(redis_url, None):
            late = limiter_at(redis_url, shards=4)

            with pytest.raises(UsageError, match="the same shards and id_secret, or"):
                await late.open()
        await late.close()

    async def test_record_without_a_secret_stays_byte_for_byte(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with limiter_at(redis_url, None):
            pass

        assert redis_server.command("GET", "tl:{team}:layout") == b"format 1, shards 1"

    def test_one_backend_has_one_secret_for_a_namespace(self) -> None:
        backend = RedisBackend.from_url("redis://127.0.0.1:1")
        Limiter(POLICY, backend, namespace=TEAM, id_secret=SECRET)

        with pytest.raises(UsageError, match='"team" has another id_secret on this backend'):
            Limiter(POLICY, backend, namespace=TEAM)

    async def test_cluster_compares_it_as_well(self, cluster_url: str) -> None:
        first, late = (
            Limiter(POLICY, ClusterBackend(cluster_url, timeout=PATIENT), id_secret=secret)
            for secret in (SECRET, OTHER)
        )
        async with first:
            with pytest.raises(UsageError, match="the same id_secret, or another namespace"):
                await late.open()
        await late.close()


def command(url: str, secret: str | None, *words: str) -> Result:
    env = {
        "TIEREDLIMIT_REDIS": url,
        "TIEREDLIMIT_NAMESPACE": TEAM,
        "TIEREDLIMIT_POLICY": None,
        "TIEREDLIMIT_ID_SECRET": secret,
    }
    return CliRunner().invoke(main, list(words), env=env, catch_exceptions=False)


@pytest.fixture
def policy(tmp_path: Path) -> str:
    file = tmp_path / "policy.toml"
    file.write_text(POOLED, "utf-8")
    return str(file)


def take(url: str, policy: str, feature: str, secret: str | None = SECRET) -> Any:
    async def take_once() -> Any:
        backend = RedisBackend.from_url(url, timeout=PATIENT)
        async with Limiter(policy, backend, namespace=TEAM, id_secret=secret) as limiter:
            return await limiter.take(Account("zebra-7", "pro"), feature)

    return asyncio.run(take_once())


@pytest.mark.redis
class TestCommands:
    def test_reset_and_refund_find_what_is_hashed(self, redis_url: str, policy: str) -> None:
        for _ in range(2):
            take(redis_url, policy, "text")
        given = ("--account", "zebra-7", "--policy", policy, "--yes")

        refunded = command(redis_url, SECRET, "refund", "text", "--tokens", "1", *given)
        left = take(redis_url, policy, "text").remaining
        reset = command(redis_url, SECRET, "reset", "text", *given)
        filled = take(redis_url, policy, "text").remaining

        assert (refunded.exit_code, left) == (0, 7)
        assert (reset.exit_code, filled) == (0, 8)

    def test_explain_sees_the_slots_of_who_is_hashed(self, redis_url: str, policy: str) -> None:
        take(redis_url, policy, "video")
        words = ("explain", "--account", "zebra-7", "--plan", "pro", "--feature", "video")

        said = command(redis_url, SECRET, *words, "--policy", policy)

        assert said.exit_code == 0
        assert "1 of 2 held by the account" in said.stdout

    @pytest.mark.parametrize(
        ("workers", "operator", "told"),
        [
            (SECRET, None, "ids are hashed: give the workers' secret in TIEREDLIMIT_ID_SECRET"),
            (SECRET, OTHER, "ids are hashed with another secret than the one in TIEREDLIMIT_ID"),
            (None, SECRET, "ids are not hashed: unset TIEREDLIMIT_ID_SECRET"),
            (SECRET, "short", "id_secret must be a string of at least 16 characters"),
        ],
    )
    @pytest.mark.parametrize(
        "words",
        [
            ("reset", "text", "--account", "zebra-7", "--yes"),
            ("refund", "text", "--tokens", "1", "--account", "zebra-7", "--yes"),
            ("explain", "--account", "zebra-7", "--plan", "pro", "--feature", "video"),
        ],
    )
    def test_wrong_secret_is_told_and_nothing_is_done(
        self,
        redis_url: str,
        policy: str,
        workers: str | None,
        operator: str | None,
        told: str,
        words: tuple[str, ...],
    ) -> None:
        take(redis_url, policy, "text", workers)

        said = command(redis_url, operator, *words, "--policy", policy)

        assert said.exit_code == 1
        assert told in said.stderr
        assert take(redis_url, policy, "text", workers).remaining == 7

    @pytest.mark.parametrize(
        "words",
        [("status",), ("overrides",), ("explain", "--plan", "pro", "--feature", "video")],
    )
    def test_commands_that_look_for_nobody_need_no_secret(
        self, redis_url: str, policy: str, words: tuple[str, ...]
    ) -> None:
        take(redis_url, policy, "text")

        assert command(redis_url, None, *words, "--policy", policy).exit_code == 0


class Everything(logging.Handler):
    """Keep all that is logged, as it would be written."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """All that any logger is given, and not just once a second."""
    monkeypatch.setattr("tieredlimit.complaints._LOG_INTERVAL", 0.0)
    handler, root = Everything(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    for name in ("httpx", "httpcore", "hpack"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)  # they log what is asked
    yield handler.lines
    root.removeHandler(handler)
    root.setLevel(level)


def application(limiter: Limiter, identify: Any) -> TieredLimitMiddleware:
    async def make(request: Any) -> PlainTextResponse:
        return PlainTextResponse("made")

    routes = [Route("/images", make, methods=["POST"]), Route("/videos", make, methods=["POST"])]
    return TieredLimitMiddleware(Starlette(routes=routes), limiter=limiter, identify=identify)


def refuses(error: Exception) -> Any:
    def identify(connection: Any) -> Account:
        raise error

    return identify


def numbered(connection: Any) -> Account:
    number: Any = NUMBER
    return Account(number)


def unstorable(connection: Any) -> Account:
    return Account(f"{IDS[0]}\ud800")


def grouped(connection: Any) -> Account:
    org: Any = [IDS[5]]
    return Account(IDS[0], within={"org": org})


def named(connection: Any) -> Account:
    return Account(IDS[0], within={"org": IDS[5]})


async def post(app: Any, *paths: str) -> list[int]:
    transport = httpx.ASGITransport(app, client=("192.0.2.77", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return [(await client.post(path)).status_code for path in paths]


@pytest.mark.redis
class TestLogs:
    async def test_denials_say_nothing(self, redis_url: str, logged: list[str]) -> None:
        async with limiter_at(redis_url, None) as limiter:
            await use(limiter)
            statuses = await post(application(limiter, named), *["/images"] * 3)

        assert statuses[-1] == 429
        assert readable("\n".join(logged)) == []

    @pytest.mark.parametrize(
        "identify",
        [
            refuses(KeyError("zebra-7")),
            refuses(ValueError("no user zebra-7 of org-tapir")),
            refuses(UsageError("oh")),
            numbered,
            unstorable,
            grouped,
        ],
    )
    async def test_identify_that_fails_or_names_nobody_says_so_without_ids(
        self, redis_url: str, logged: list[str], identify: Any
    ) -> None:
        async with limiter_at(redis_url, None) as limiter:
            await post(application(limiter, identify), "/images", "/videos")

        said = [line for line in logged if line.startswith("tieredlimit ")]
        assert said != []
        assert readable("\n".join(logged)) == []
        assert str(NUMBER) not in "\n".join(logged)

    async def test_what_is_no_bucket_is_told_by_its_cell(
        self, redis_server: RedisServer, redis_url: str, logged: list[str]
    ) -> None:
        async with limiter_at(redis_url, None) as limiter:
            decision = await limiter.take(ANN, "video")
            assert decision.lease is not None
            settled = limiter.reserve(ANN, "video", 2)
            await settled.take()
            image, video = (
                f"tl1:{{team:0}}:{name}:everyone::zebra-7" for name in ("image", "video")
            )
            redis_server.command("SET", image, "what is that?")
            redis_server.command("SET", video, "what is that?")

            denied = await limiter.take(ANN, "image")
            for work in (limiter.refund(decision), settled.settle(0)):
                with pytest.raises(BackendError) as caught:
                    await work
                limiter.complaints.log("tokens were not given back", caught.value)

        assert denied.reason == "outage"
        said = "\n".join(logged)
        assert "no bucket under a key of tl1:{team:0}:image:everyone:" in said
        assert "no bucket stands in a key of tl1:{team:0}:video:everyone:" in said
        assert readable(said) == []

    async def test_outages_lost_leases_and_the_way_back_name_nobody(
        self, own_server: RedisServer, logged: list[str]
    ) -> None:
        backend = RedisBackend.from_url(own_server.url, timeout=0.2)
        async with Limiter(POLICY, backend, namespace=TEAM) as limiter:
            held = await limiter.take(ANN, "video")
            assert held.lease is not None
            settled = limiter.reserve(ANN, "video", 2)
            await settled.take()
            own_server.command("FLUSHALL")
            assert not await held.lease.renew()
            own_server.kill()

            during = [await limiter.take(one, "image") for one in (ANN, MAIL, SLASH, ADDRESS)]
            for work in (limiter.refund(held), settled.settle(0), held.lease.renew()):
                with suppress(Exception):
                    await work
            statuses = await post(application(limiter, named), "/images")
            own_server.restart()
            async with asyncio.timeout(PATIENT):
                while (await limiter.take(ANN, "image")).reason == "outage":  # noqa: ASYNC110 -- no event
                    await asyncio.sleep(0.005)

        assert {one.reason for one in during} == {"outage"}
        assert statuses == [503]
        assert len(logged) > 3
        assert readable("\n".join(logged)) == []
