"""The servers that other tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
import redis.asyncio
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import servers
from tests.conftest import FAULTS, _server, read_faults
from tests.servers import Monitor, NoServerError, RedisServer, StartError, find_server

pytestmark = pytest.mark.login("default")  # they do what no limiter does


def client_of(server: RedisServer, timeout: float = 5.0) -> redis.Redis:
    return redis.Redis.from_url(
        server.url, socket_timeout=timeout, retry=Retry(NoBackoff(), 0), decode_responses=True
    )


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any server; the folder is alone on PATH."""
    monkeypatch.delenv(servers.CHOICE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers, "_server_in_wheel", lambda: None)
    return tmp_path


def executable(path: Path) -> Path:
    path.touch()
    path.chmod(0o755)
    return path


def test_no_server_says_what_to_install(nowhere: Path) -> None:
    with pytest.raises(NoServerError, match="apt-get install redis-server"):
        find_server()


def test_no_server_fails_a_test_instead_of_skipping_it(nowhere: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="No Redis server to test with"):
        _server()


def test_redis_on_path_wins_over_valkey(nowhere: Path) -> None:
    valkey = executable(nowhere / "valkey-server")
    assert find_server() == valkey

    real = executable(nowhere / "redis-server")
    assert find_server() == real


def test_server_on_path_wins_over_the_wheel(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_server_in_wheel", lambda: Path("/wheel"))
    assert find_server() == Path("/wheel")

    real = executable(nowhere / "redis-server")
    assert find_server() == real


def test_server_in_the_environments_own_folder_is_the_wheels(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(nowhere / "redis-server")
    monkeypatch.setattr(servers, "_own_scripts", lambda: nowhere)
    monkeypatch.setattr(servers, "_server_in_wheel", lambda: Path("/wheel"))

    assert find_server() == Path("/wheel")


def test_choice_forces_the_wheel_or_a_path(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(nowhere / "redis-server")
    other = executable(nowhere / "other")

    monkeypatch.setenv(servers.CHOICE, str(other))
    assert find_server() == other

    monkeypatch.setenv(servers.CHOICE, "wheel")
    with pytest.raises(NoServerError, match="TIEREDLIMIT_TEST_SERVER=wheel"):
        find_server()

    monkeypatch.setenv(servers.CHOICE, str(nowhere / "missing"))
    with pytest.raises(NoServerError, match="missing"):
        find_server()


def test_shared_database_is_empty(redis_server: RedisServer, redis_url: str) -> None:
    redis_server.command("SET", "left", "behind")

    with redis.Redis.from_url(redis_url) as client:
        assert client.get("left") == b"behind"


def test_shared_database_is_empty_again(redis_server: RedisServer, redis_url: str) -> None:
    assert redis_server.command("DBSIZE") == 0


def test_fixtures_that_start_servers_mark_their_tests(
    request: pytest.FixtureRequest, redis_url: str
) -> None:
    assert request.node.get_closest_marker("redis") is not None


def test_killed_server_refuses_and_comes_back_empty(own_server: RedisServer) -> None:
    own_server.command("SET", "key", "value")
    port = own_server.port

    own_server.kill()
    with pytest.raises(redis.ConnectionError):
        own_server.command("PING")

    own_server.restart()
    assert own_server.port == port
    assert own_server.command("DBSIZE") == 0


def test_paused_server_hangs_until_resumed(own_server: RedisServer) -> None:
    own_server.pause()
    with client_of(own_server, timeout=0.05) as client, pytest.raises(redis.TimeoutError):
        client.ping()

    own_server.resume()
    with client_of(own_server) as client:
        assert client.ping()


@pytest.mark.redis
def test_paused_server_can_be_ended() -> None:
    with RedisServer() as server:
        server.pause()

    with pytest.raises(redis.ConnectionError):
        server.command("PING")


def test_unix_socket_reaches_the_same_server(own_server: RedisServer) -> None:
    own_server.command("SET", "key", "value")

    with redis.Redis.from_url(own_server.unix_url) as client:
        assert client.get("key") == b"value"


def test_server_without_unix_socket_says_so(redis_server: RedisServer) -> None:
    with pytest.raises(ValueError, match="unix_socket=True"):
        _ = redis_server.unix_url


@pytest.mark.redis
def test_options_reach_the_server() -> None:
    with RedisServer("--maxmemory", "5mb") as server:
        assert server.command("CONFIG", "GET", "maxmemory") in (
            [b"maxmemory", b"5242880"],
            {b"maxmemory": b"5242880"},
        )


@pytest.mark.redis
def test_failed_start_shows_the_log() -> None:
    with pytest.raises(StartError, match="no-such-option"), RedisServer("--no-such-option", "1"):
        pass


def test_taken_port_is_exchanged_for_another(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = servers._free_port()
    ports = iter([redis_server.port, free])
    monkeypatch.setattr(servers, "_free_port", lambda: next(ports))

    with RedisServer() as server:
        assert server.port == free


async def test_monitor_shows_what_clients_sent_since_the_last_call(redis_url: str) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as client, Monitor(redis_url) as monitor:
        await client.ping()
        await monitor.commands()

        await client.set("a b", 'say "hi"\\')
        await client.get("a b")

        assert await monitor.commands() == ['SET a b say "hi"\\\\', "GET a b"]
        assert await monitor.commands() == []


async def test_monitor_leaves_out_what_scripts_do(redis_url: str) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as client, Monitor(redis_url) as monitor:
        await client.ping()
        await monitor.commands()

        await client.eval("return redis.call('SET', KEYS[1], '')", 1, "k")

        assert await monitor.commands() == ["EVAL return redis.call('SET', KEYS[1], '') 1 k"]


async def test_monitor_works_over_a_unix_socket(own_server: RedisServer) -> None:
    async with Monitor(own_server.unix_url) as monitor:
        own_server.command("SET", "k", "v")

        assert "SET k v" in await monitor.commands()


def test_fault_list_is_complete() -> None:
    faults = read_faults(FAULTS.read_text("utf-8"))

    last = {"A": 13, "B": 4, "C": 7, "D": 7, "E": 11, "F": 11, "G": 8, "H": 5}
    assert list(faults) == [f"{part}{n}" for part in last for n in range(1, last[part] + 1)]


@pytest.mark.parametrize("line", ["A03 zero", "Z1 no such part", "A1", "A1 twice"])
def test_fault_list_takes_nothing_else(line: str) -> None:
    with pytest.raises(pytest.UsageError, match=line):
        read_faults(f"# heading\nA1 first\n{line}")
