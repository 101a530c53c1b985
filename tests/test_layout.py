"""How keys are spread over hash tags, and how processes that disagree about it are kept apart."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.clusters import RedisCluster
from tests.servers import RedisServer
from tieredlimit import Account, Limiter, Policy, UsageError
from tieredlimit._core.table import Table
from tieredlimit.backends import ClusterBackend, RedisBackend

PATIENT = 10.0
PLAIN = {
    "order": ["free"],
    "features": {"image": {"routes": ["POST /v1/images"], "outage": "deny"}},
    "tiers": {"free": {"quotas": {"image": "50/hour"}}},
}
OF_ORGS = {
    **PLAIN,
    "tiers": {
        "free": {"quotas": {"image": ["50/hour", {"rate": "70/hour", "per": "org", "name": "org"}]}}
    },
}
U1 = Account("u1")


def one_server(server: RedisServer, namespace: str, shards: int | None) -> Limiter:
    backend = RedisBackend.from_url(server.url, timeout=PATIENT)
    return Limiter(PLAIN, backend, namespace=namespace, shards=shards)


def cluster(url: str, shards: int | None) -> Limiter:
    return Limiter(PLAIN, ClusterBackend(url, timeout=PATIENT), namespace="team", shards=shards)


class TestRecord:
    async def test_other_shards_are_refused_and_takes_get_the_outage_answer(
        self, redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with one_server(redis_server, "team", 4):
            late = one_server(redis_server, "team", 8)

            with pytest.raises(UsageError) as caught:
                await late.open()
            decision = await late.take(U1, "image")

        assert str(caught.value) == (
            'the namespace "team" in Redis is laid out as "format 1, shards 4", this process has '
            '"format 1, shards 8": give all its processes the same shards, or another namespace'
        )
        assert (decision.allowed, decision.reason) == (False, "outage")
        assert 'laid out as "format 1, shards 4"' in caplog.text
        assert redis_server.command("KEYS", "tl1:*") == []
        await late.close()

    @pytest.mark.parametrize(
        ("write", "spelled"),
        [
            (("SET", "tl:{team}:layout", "format 2, shards 1"), "format 2, shards 1"),
            (("SETBIT", "tl:{team}:layout", "0", "1"), "\ufffd"),
        ],
    )
    async def test_other_key_format_is_refused(
        self, redis_server: RedisServer, redis_url: str, write: tuple[str, ...], spelled: str
    ) -> None:
        redis_server.command(*write)

        with pytest.raises(UsageError) as caught:
            await one_server(redis_server, "team", None).open()

        said = f'laid out as "{spelled}", this process has "format 1, shards 1"'
        assert said in str(caught.value)

    async def test_same_shards_and_other_namespaces_are_served(
        self, redis_server: RedisServer, redis_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        for namespace, shards in (("team", 4), ("team", 4), ("other", 8), ("third", None)):
            async with one_server(redis_server, namespace, shards) as limiter:
                assert (await limiter.take(U1, "image")).reason == "allowed"

        records = {name: redis_server.command("GET", f"tl:{{{name}}}:layout") for name in ALL}
        assert records == ALL
        assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []

    async def test_record_lost_to_flushall_is_written_again_on_the_next_connection(
        self, redis_server: RedisServer, redis_url: str
    ) -> None:
        async with one_server(redis_server, "team", 4) as limiter:
            redis_server.command("FLUSHALL")
            backend = limiter.backend
            assert isinstance(backend, RedisBackend)
            backend._session()[0].drop("the connection broke")

            assert (await limiter.take(U1, "image")).reason == "allowed"

            assert redis_server.command("GET", "tl:{team}:layout") == ALL["team"]

    @pytest.mark.login("default")  # it takes a right away
    async def test_user_who_may_not_touch_the_record_is_served(
        self, own_server: RedisServer, caplog: pytest.LogCaptureFixture
    ) -> None:
        own_server.command("ACL", "SETUSER", "app", "on", ">word", "~tl1:*", "+@all")
        backend = RedisBackend.from_url(
            own_server.url.replace("//", "//app:word@"), timeout=PATIENT
        )

        async with Limiter(PLAIN, backend, namespace="team", shards=4) as limiter:
            decision = await limiter.take(U1, "image")

        assert decision.reason == "allowed"
        assert "refused to compare the layout" in caplog.text
        assert own_server.command("EXISTS", "tl:{team}:layout") == 0


ALL = {
    "team": b"format 1, shards 4",
    "other": b"format 1, shards 8",
    "third": b"format 1, shards 1",
}


class TestRecordOnACluster:
    @pytest.mark.login("default")  # it takes a right away
    async def test_user_who_may_neither_load_scripts_nor_touch_the_record_is_served(
        self, own_cluster: RedisCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        for node in own_cluster.nodes:
            node.command("ACL", "SETUSER", "app", "on", ">word", "~tl1:*", "+@all", "-script")

        async with cluster(own_cluster.url.replace("//", "//app:word@"), 64) as limiter:
            decisions = [await limiter.take(Account(f"u{i}"), "image") for i in range(20)]

        assert {decision.reason for decision in decisions} == {"allowed"}
        assert "refused to load a script" in caplog.text
        assert "refused to compare the layout" in caplog.text

    async def test_other_shards_are_refused_and_takes_get_the_outage_answer(
        self, cluster_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with cluster(cluster_url, None) as first:
            late, same = cluster(cluster_url, 8), cluster(cluster_url, 64)

            with pytest.raises(UsageError, match=r'"format 1, shards 64".*"format 1, shards 8"'):
                await late.open()
            refused = await late.take(U1, "image")
            served = [(await one.take(U1, "image")).reason for one in (first, same)]

        assert refused.reason == "outage"
        assert 'laid out as "format 1, shards 64"' in caplog.text
        assert served == ["allowed", "allowed"]
        await late.close()
        await same.close()

    async def test_record_that_differs_after_a_reconnect_stops_all_nodes_until_it_is_gone(
        self, redis_cluster: RedisCluster, cluster_url: str
    ) -> None:
        limiter = cluster(cluster_url, 64)
        await limiter.open()
        backend = limiter.backend
        assert isinstance(backend, ClusterBackend)
        owner = redis_cluster.owner_of("tl:{team}:layout")
        owner.command("SET", "tl:{team}:layout", "format 1, shards 8")
        fleet = backend._fleet()
        link = fleet._members["127.0.0.1", owner.port].link

        link.drop("the connection broke")
        stopped = {(await limiter.take(Account(f"u{i}"), "image")).reason for i in range(20)}
        with pytest.raises(UsageError):
            await limiter.open()
        owner.command("DEL", "tl:{team}:layout")
        # Who has failed so often is only probed for a moment: there is no event to wait for.
        while (await limiter.take(U1, "image")).reason == "outage":  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        served = {(await limiter.take(Account(f"u{i}"), "image")).reason for i in range(20)}

        assert "outage" in stopped
        assert served == {"allowed"}
        assert owner.command("GET", "tl:{team}:layout") == b"format 1, shards 64"
        await limiter.close()


def table(shards: int, policy: Mapping[str, object] = OF_ORGS) -> Table:
    return Table(Policy.from_dict(policy), "test", shards)


def shards_of(accounts: Sequence[Account], shards: int) -> list[int]:
    compiled = table(shards)
    return [compiled.shard_of(account) for account in accounts]


texts = st.text(st.characters(codec="utf-8"), max_size=20)
ids = texts.filter(bool)


class TestShardOf:
    @given(org=ids, users=st.lists(ids, min_size=2), shards=st.integers(1, 1024))
    def test_accounts_of_one_org_share_a_shard_within_range(
        self, org: str, users: list[str], shards: int
    ) -> None:
        accounts = [Account(user, within={"org": org}) for user in users]

        found = set(shards_of(accounts, shards))

        assert len(found) == 1
        assert 0 <= found.pop() < shards
        assert shards_of(accounts, shards) == shards_of(accounts, shards)

    @given(user=ids, team=ids)
    def test_subject_that_no_quota_charges_does_not_matter(self, user: str, team: str) -> None:
        alone, within = Account(user), Account(user, within={"team": team})

        assert shards_of([alone], 64) == shards_of([within], 64)

    def test_shard_is_the_same_in_every_process_and_version(self) -> None:
        org = Account("u1", within={"team": "t1", "org": "o1"})

        assert shards_of([U1, org, Account("u1", anonymous=True)], 64) == SHARDS

    @given(user=ids)
    def test_one_shard_is_always_the_first(self, user: str) -> None:
        assert shards_of([Account(user)], 1) == [0]

    @pytest.mark.parametrize("org", [False, True])
    def test_subjects_spread_over_all_shards(self, org: bool) -> None:
        accounts = [
            Account("u", within={"org": f"o{i}"}) if org else Account(f"u{i}")
            for i in range(64 * 200)
        ]

        counts = Counter(shards_of(accounts, 64))

        assert len(counts) == 64
        assert 100 < min(counts.values()) <= max(counts.values()) < 300


SHARDS = [29, 45, 9]


@pytest.mark.parametrize("shards", [0, -1, 1025, "x", 1.0, True])
def test_shards_out_of_range_are_an_error(shards: int) -> None:
    with pytest.raises(UsageError, match="shards must be from 1 to 1,024, got "):
        Limiter(PLAIN, shards=shards)


@pytest.mark.parametrize(
    ("backend", "shards"), [(None, 1), ("redis://a", 1), ("redis+cluster://a:1", 64)]
)
def test_shards_are_by_default_what_the_backend_needs(backend: str | None, shards: int) -> None:
    assert Limiter(PLAIN, backend)._table.shards == shards


@pytest.mark.parametrize("url", ["redis://a", "redis+cluster://a:1"])
def test_one_backend_has_one_number_of_shards_for_a_namespace(url: str) -> None:
    backend = ClusterBackend(url) if "cluster" in url else RedisBackend.from_url(url)
    Limiter(PLAIN, backend, namespace="media", shards=4)
    Limiter(PLAIN, backend, namespace="media", shards=4)
    Limiter(PLAIN, backend, namespace="other", shards=8)

    with pytest.raises(UsageError, match=r'"media" has 4 shards on this backend already, got 8'):
        Limiter(PLAIN, backend, namespace="media", shards=8)
