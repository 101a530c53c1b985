"""The clusters and sentinels that other tests stand on."""

from __future__ import annotations

import os

import pytest
import redis
from redis.exceptions import AskError, MovedError, TryAgainError

from tests.clusters import SLOTS, RedisCluster, RedisSentinels
from tests.servers import RedisServer

pytestmark = pytest.mark.redis

KEYS = ("{tag}a", "{tag}b")


def asking(node: RedisServer, *words: str) -> object:
    """Send ASKING and a command on one connection; return the second reply or error."""
    with redis.Redis(port=node.port) as client:
        pipeline = client.pipeline(transaction=False)
        pipeline.execute_command("ASKING")
        pipeline.execute_command(*words)
        reply: object = pipeline.execute(raise_on_error=False)[1]
        return reply


def set_keys(cluster: RedisCluster) -> int:
    for key in KEYS:
        cluster.owner_of(key).command("SET", key, "value")
    return cluster.keyslot(KEYS[0])


def test_every_slot_has_an_owner_and_every_key_one_place(
    redis_cluster: RedisCluster, cluster_url: str
) -> None:
    host, port = redis_cluster.startup
    assert cluster_url == f"redis+cluster://{RedisServer.login}{host}:{port}"
    assert len(redis_cluster.nodes) == 6
    edges = [redis_cluster.owner_of_slot(slot) for slot in (0, SLOTS // 2, SLOTS - 1)]
    assert set(edges) == set(redis_cluster.masters)
    for master in redis_cluster.masters:
        if master is redis_cluster.owner_of("key"):
            master.command("SET", "key", "value")
        else:
            with pytest.raises(MovedError):
                master.command("SET", "key", "value")


def test_open_slot_asks_and_says_try_again_and_moves_with_its_keys(
    redis_cluster: RedisCluster, cluster_url: str
) -> None:
    slot = set_keys(redis_cluster)

    move = redis_cluster.begin_move(slot)
    assert move.source.command("GET", KEYS[0]) == b"value"
    redis_cluster.move_keys(move, KEYS[0])
    with pytest.raises(AskError):
        move.source.command("GET", KEYS[0])
    assert asking(move.target, "GET", KEYS[0]) == b"value"
    assert isinstance(asking(move.target, "MGET", *KEYS), TryAgainError)
    redis_cluster.finish_move(move)

    assert redis_cluster.owner_of(KEYS[0]) is move.target
    assert move.target.command("MGET", *KEYS) == [b"value", b"value"]
    with pytest.raises(MovedError):
        move.source.command("GET", KEYS[0])


def test_slot_moves_there_and_back(redis_cluster: RedisCluster, cluster_url: str) -> None:
    slot = set_keys(redis_cluster)
    source = redis_cluster.owner_of_slot(slot)
    target = next(node for node in redis_cluster.masters if node is not source)

    redis_cluster.move_slot(slot, source, target)
    redis_cluster.move_slot(slot, target, source)

    assert redis_cluster.owner_of_slot(slot) is source
    assert source.command("MGET", *KEYS) == [b"value", b"value"]


def test_flush_takes_back_a_move_that_was_left_open(
    redis_cluster: RedisCluster, cluster_url: str
) -> None:
    move = redis_cluster.begin_move(set_keys(redis_cluster))
    redis_cluster.move_keys(move, KEYS[0])

    redis_cluster.flush()

    assert move.source.command("MGET", *KEYS) == [None, None]
    assert {node.command("DBSIZE") for node in redis_cluster.masters} == {0}


def test_command_counts_tell_the_nodes_apart(redis_cluster: RedisCluster, cluster_url: str) -> None:
    owner = redis_cluster.owner_of("key")

    owner.command("GET", "key")
    owner.command("GET", "key")

    counts = redis_cluster.commandstats()
    assert {port: of["get"] for port, of in counts.items() if of["get"]} == {owner.port: 2}


def test_killed_master_is_replaced_and_no_process_stays(own_cluster: RedisCluster) -> None:
    killed = own_cluster.owner_of("key")

    own_cluster.kill_master(own_cluster.masters.index(killed))
    own_cluster.wait_for_failover()
    new = own_cluster.owner_of("key")
    new.command("SET", "key", "value")

    assert new not in own_cluster.masters
    pids = [node.pid for node in own_cluster.living]
    own_cluster.__exit__(None, None, None)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_sentinels_hand_over_and_leave_the_old_primary_as_it_was(
    sentinels: RedisSentinels,
) -> None:
    old, new = sentinels.primary, sentinels.replica

    sentinels.hand_over()
    for server in (old, new):
        server.command("SET", "key", "value")

    assert (sentinels.primary, sentinels.replica) == (new, old)
