"""`tieredlimit doctor`: what it finds, and what a weakness means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.servers import RedisServer
from tests.test_cli_control import SECOND, TEAM, Workers, as_json, run
from tieredlimit import Policy
from tieredlimit.backends.control import shard_key
from tieredlimit.cli.checks import (
    Finding,
    clock_finding,
    latency_finding,
    outage_finding,
    permission_findings,
    read_config,
    read_info,
    server_findings,
)

SOUND_INFO = {"redis_version": "7.2.4", "role": "master", "connected_slaves": "1"}
SOUND_CONFIG = {
    "maxmemory-policy": "noeviction",
    "maxmemory": "0",
    "min-replicas-to-write": "1",
    "appendonly": "yes",
    "save": "",
}


def weak(info: Mapping[str, str] = {}, config: Mapping[str, str] = {}) -> dict[str, str]:
    """Return what is weak in a server that is sound but for this."""
    found = server_findings({**SOUND_INFO, **info}, {**SOUND_CONFIG, **config})
    return {one.name: one.line for one in found if one.level == "weakness"}


# --- What a server says


def test_sound_server_has_no_weakness() -> None:
    assert weak() == {}


@pytest.mark.parametrize(
    ("info", "config", "name", "told"),
    [
        ({"redis_version": "6.0.16"}, {}, "version", "6.2 is the oldest"),
        ({"connected_slaves": "0"}, {}, "replicas", "buckets start full, and a closure is gone"),
        ({"role": "slave"}, {}, "replicas", "name the primary"),
        ({}, {"min-replicas-to-write": "0"}, "min-replicas-to-write", "cut off goes on"),
        ({}, {"maxmemory-policy": "allkeys-lru"}, "memory", "even closures"),
        ({}, {"maxmemory-policy": "volatile-ttl"}, "memory", "drops buckets"),
        ({}, {"appendonly": "no"}, "persistence", "comes back empty"),
        ({}, {"appendonly": "no", "save": "3600 1"}, "persistence", "since the last snapshot"),
    ],
)
def test_weakness_says_what_it_means(
    info: dict[str, str], config: dict[str, str], name: str, told: str
) -> None:
    found = weak(info, config)

    assert list(found) == [name]
    assert told in found[name]


def test_refused_configuration_is_told_and_no_weakness() -> None:
    found = list(server_findings(SOUND_INFO, read_config([ValueError("NOPERM")])))

    assert [one.level for one in found] == ["ok", "ok", "unknown"]
    assert "NOPERM" in found[-1].line


def test_valkey_and_a_server_that_hides_its_version() -> None:
    valkey = list(server_findings({**SOUND_INFO, "valkey_version": "8.0.1"}, SOUND_CONFIG))
    silent = list(server_findings({"role": "master", "connected_slaves": "1"}, SOUND_CONFIG))

    assert valkey[0].told == "7.2.4 (Valkey 8.0.1)"
    assert silent[0].level == "unknown"


def test_clock_and_latency_have_bounds() -> None:
    assert clock_finding(10 * SECOND, 10 * SECOND - 200, 10 * SECOND + 200).level == "ok"
    behind = clock_finding(10 * SECOND, 70 * SECOND, 70 * SECOND)
    assert (behind.level, behind.told) == ("weakness", "60.000 s behind this host")
    assert latency_finding([0.001] * 100).level == "ok"
    assert latency_finding([0.001] * 99 + [0.2]).level == "weakness"
    assert latency_finding([0.02] * 100).level == "weakness"


def test_permissions_that_lack_are_weaknesses() -> None:
    refused = list(permission_findings({"scripts": ValueError("no"), "WAIT": 0}))

    assert [one.level for one in refused] == ["weakness"]
    assert "no decision and no change is possible" in refused[0].line
    assert [one.level for one in permission_findings({"scripts": b"OK"})] == ["ok"]


def test_what_is_read_is_plain() -> None:
    assert read_info(b"# Server\r\nredis_version:7.0.15\r\nos:Linux: x\r\n") == {
        "redis_version": "7.0.15",
        "os": "Linux: x",
    }
    assert read_config([[b"save", b""], [b"appendonly", b"yes"]]) == {
        "save": "",
        "appendonly": "yes",
    }
    assert Finding("ok", "a", "b\x1b").line == "a: b\\x1b"


def test_outage_answers_are_told_plainly() -> None:
    policy = Policy.from_dict(
        {
            "features": {
                "image": {},
                "video": {"outage": "deny"},
                "audio": {"outage": "local", "outage_share": "2.5%"},
            },
            "tiers": {"all": {"quotas": dict.fromkeys(("image", "video", "audio"), "5/day")}},
        }
    )

    assert outage_finding(policy).line == (
        "outage: while Redis is down image is allowed, without any limit, video is denied, "
        "audio gets a share from each process (2.5%); zero and closed stay so"
    )


# --- The command


def findings(told: Any) -> dict[str, tuple[str, str]]:
    listed = [*told["namespace"]["findings"]]
    for server in told["servers"].values():
        listed += server
    return {one["name"]: (one["level"], one["told"]) for one in listed}


@pytest.mark.login("default")  # it reads the configuration
def test_doctor_of_a_test_server_finds_its_weaknesses(redis_url: str) -> None:
    result = run(Workers(redis_url), "doctor")

    assert result.exit_code == 5
    assert "  weakness  persistence: none: a restart comes back empty" in result.stdout
    assert "  weakness  layout: not noted yet" in result.stdout
    assert "  weakness  workers: none lives: a change reaches nobody" in result.stdout
    assert "  ok        ping: it answers" in result.stdout
    assert result.stdout.splitlines()[-1] == "4 weaknesses"


@pytest.mark.login("default")  # it reads the configuration
def test_doctor_is_content_with_a_sound_server(own_server: RedisServer) -> None:
    own_server.command("CONFIG", "SET", "appendonly", "yes")
    own_server.command("SET", "tl:{team}:layout", "format 1, shards 3")
    workers = Workers(own_server.url, "w1")
    workers.beat()
    run(workers, "close", "video", "--tier", "free", "--yes")

    told = as_json(workers, "doctor", code=5)

    found = findings(told)
    weak = {name: one for name, one in found.items() if one[0] != "ok"}
    assert list(weak) == ["replicas"], weak
    assert found["layout"][1] == "format 1, shards 3"
    assert found["revision"][1] == "1, on 3 of 3 shards"
    assert found["workers"][1] == "1/1 workers on revision 1"
    assert told["ok"] is False


def test_doctor_sees_shards_and_workers_that_are_behind(
    redis_url: str, redis_server: RedisServer
) -> None:
    workers = Workers(redis_url, "w1", deaf=("w1",))
    workers.beat()
    run(workers, "close", "video", "--tier", "free", "--yes")
    redis_server.command("DEL", shard_key(TEAM, 0))
    behind = findings(as_json(workers, "doctor", code=5))
    redis_server.command("SET", shard_key(TEAM, 0), "9 0123456789abcdef")
    ahead = run(workers, "doctor").stdout

    assert behind["revision"] == ("weakness", "1, on 0 of 1 shard")
    assert behind["workers"] == ("weakness", "0/1 workers on revision 1; not app-1:4711")
    assert "Redis has lost a revision" in ahead


def test_doctor_sees_a_head_that_cannot_be_read(redis_url: str, redis_server: RedisServer) -> None:
    redis_server.command("SET", "tl:{team}:head", "garbage")

    result = run(Workers(redis_url), "doctor")

    assert result.exit_code == 5
    assert "weakness  revision: Redis holds what is no revision" in result.stdout


@pytest.mark.login("default")  # it makes a user of its own
def test_doctor_names_what_the_user_may_not(own_server: RedisServer) -> None:
    own_server.command(
        "ACL", "SETUSER", "ops", "on", ">x", "~*", "&*", "+@all", "-config", "-publish", "-script"
    )
    url = own_server.url.replace("redis://", "redis://ops:x@")

    told = run(Workers(url), "doctor").stdout

    assert "unknown   configuration: CONFIG is refused" in told
    assert "weakness  permissions: PUBLISH is refused" in told
    assert "weakness  permissions: SCRIPT LOAD is refused" in told


def test_doctor_leaves_nothing_behind(redis_url: str, redis_server: RedisServer) -> None:
    run(Workers(redis_url), "doctor")

    left = redis_server.command("KEYS", "*")
    assert left in ([], [b"tl1:{team:0}:doctor"])
    assert 0 < int(str(redis_server.command("PTTL", "tl1:{team:0}:doctor"))) <= 1000 or left == []


@pytest.mark.login("default")  # it reads the configuration
def test_doctor_looks_at_every_primary_of_a_cluster(cluster_url: str) -> None:
    told = as_json(Workers(cluster_url), "doctor", code=5)

    assert len(told["servers"]) >= 3
    for found in told["servers"].values():
        assert {"ping", "version", "replicas", "memory", "clock", "latency"} <= {
            one["name"] for one in found
        }
