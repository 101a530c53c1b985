"""The faults: what each does to a scene, how that ends, and what must come of it."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import redis

from tests.clusters import Move
from tests.faults.scenes import (
    PASSWORD,
    Act,
    Scene,
    Setting,
    behind_proxy,
    by_name,
    cluster,
    one_server,
    sentinels,
)
from tests.servers import RedisServer

POLL_SECONDS = 0.005
DEADLINE_SECONDS = 20.0

GARBAGE = (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"+OK\r\n", b"*2\r\n:1\r\n:2\r\n", b"\x00\xff\r\n")


@dataclass(frozen=True, slots=True)
class Fault:
    """Say what is done, and what must come of it.

    Attributes:
        name: The row of the matrix.
        lines: Those of tests/faults.txt that it covers.
        setting: Makes what it is done to.
        begin: Does it.
        end: Makes it good again; returns when the server is back.
        outcome: `outage`: every request gets the outage answer, and the breaker opens. `decided`:
            the store goes on deciding. `outage, asked`: the outage answer, and yet the breaker
            stays closed, since the server answers. `some`: the outage answer at times.
        runs: Whether what was asked for and not answered has been charged, at most once.
        keeps: Whether what was charged before is kept.
        ends_itself: Whether it does so in a while: requests are made for as long.
        long: Whether it goes on until the pauses between two probes are at their longest.
    """

    name: str
    lines: tuple[str, ...]
    setting: Setting
    begin: Act
    end: Act
    outcome: Literal["outage", "decided", "outage, asked", "some"] = "outage"
    runs: Literal["never", "perhaps", "once"] = "never"
    keeps: bool = True
    ends_itself: bool = False
    long: bool = False


async def _wait_until(true: Act, scene: Scene) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await true(scene):  # noqa: ASYNC110 -- a server's state sets no event
            await asyncio.sleep(POLL_SECONDS)


async def _nothing(scene: Scene) -> None:
    pass


async def _mend(scene: Scene) -> None:
    scene.proxy.mend()


async def _refuse(scene: Scene) -> None:
    scene.proxy.refuse()


async def _listen(scene: Scene) -> None:
    await scene.proxy.listen()


async def _hang(scene: Scene) -> None:
    scene.proxy.hole = True


async def _delay(scene: Scene) -> None:
    scene.proxy.late = 0.25


async def _delay_a_little(scene: Scene) -> None:
    scene.proxy.late = 0.03


async def _drip(scene: Scene) -> None:
    scene.proxy.drip = 0.01


async def _cut(scene: Scene) -> None:
    scene.proxy.treat = lambda reply: reply[:3]
    scene.proxy.cut = True


async def _answer_garbage(scene: Scene) -> None:
    said = 0

    def garbage(reply: bytes) -> bytes:
        nonlocal said
        said += 1
        return GARBAGE[said % len(GARBAGE)]

    scene.proxy.treat = garbage


async def _swallow(scene: Scene) -> None:
    scene.proxy.treat = lambda reply: b""


async def _lose_name(scene: Scene) -> None:
    scene.names = False
    scene.proxy.break_connections()


async def _find_name(scene: Scene) -> None:
    scene.names = True


async def _kill(scene: Scene) -> None:
    await asyncio.to_thread(scene.server.kill)


async def _save_and_kill(scene: Scene) -> None:
    await scene.tell("SAVE")
    await _kill(scene)


async def _restart(scene: Scene) -> None:
    await asyncio.to_thread(scene.server.restart)


async def _restart_at_once(scene: Scene) -> None:
    await _kill(scene)
    await _restart(scene)


async def _pause(scene: Scene) -> None:
    await asyncio.to_thread(scene.server.pause)


async def _resume(scene: Scene) -> None:
    scene.server.resume()


async def _use_up_memory(scene: Scene) -> None:
    await scene.tell("CONFIG", "SET", "maxmemory", "1")


async def _give_memory(scene: Scene) -> None:
    await scene.tell("CONFIG", "SET", "maxmemory", "0")


async def _evict(scene: Scene) -> None:
    await scene.tell("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
    for i in range(100):
        await scene.tell("SET", f"other:{i}", "x" * 10_000)
    # All that are there, at one blow; and again with each write.
    await scene.tell("CONFIG", "SET", "maxmemory", "1")
    await scene.tell("CONFIG", "SET", "maxmemory", "2mb")


async def _forget_scripts(scene: Scene) -> None:
    await scene.tell("SCRIPT", "FLUSH")


async def _empty(scene: Scene) -> None:
    await scene.tell("FLUSHALL")


async def _want_replicas(scene: Scene) -> None:
    await scene.tell("CONFIG", "SET", "min-replicas-to-write", "1")


async def _want_no_replicas(scene: Scene) -> None:
    await scene.tell("CONFIG", "SET", "min-replicas-to-write", "0")


async def _become_replica(scene: Scene) -> None:
    await scene.tell("REPLICAOF", "127.0.0.1", "1")


async def _become_primary(scene: Scene) -> None:
    await scene.tell("REPLICAOF", "NO", "ONE")


async def _load(scene: Scene) -> None:
    for i in range(_LOADED_KEYS):
        await scene.tell("SET", f"other:{i}", "x" * _LOADED_BYTES)
    await _save_and_kill(scene)
    scene.meanwhile(scene.server.restart)


async def _end_loading(scene: Scene) -> None:
    await scene.end_it()


# While it loads, a server looks at its clients every 2 MB.
_LOADED_KEYS, _LOADED_BYTES = 40, 1_100_000
_SLOW_LOADING = ("--key-load-delay", "60000", "--rdbcompression", "no")


async def _run_endless_script(scene: Scene) -> None:
    await scene.tell("CONFIG", "SET", "lua-time-limit", "1")
    scene.meanwhile(scene.server.command, "EVAL", "while true do end", "0")
    await _wait_until(_is_busy, scene)


async def _is_busy(scene: Scene) -> bool:
    try:
        await scene.tell("PING")
    except redis.ResponseError as exc:
        return str(exc).startswith("BUSY")
    return False


async def _kill_script(scene: Scene) -> None:
    await scene.tell("SCRIPT", "KILL")
    await scene.end_it()


async def _fail_to_save(scene: Scene) -> None:
    # Where the dump belongs there is a folder.
    _dump_of(scene).mkdir()
    await scene.tell("CONFIG", "SET", "save", "3600 1000000")
    await scene.tell("BGSAVE")
    await _wait_until(lambda scene: _last_save_was(scene, "err"), scene)


async def _save_again(scene: Scene) -> None:
    shutil.rmtree(_dump_of(scene))
    await scene.tell("BGSAVE")
    await _wait_until(lambda scene: _last_save_was(scene, "ok"), scene)


async def _last_save_was(scene: Scene, status: str) -> bool:
    said = await scene.tell("INFO", "persistence")
    return bool(said["rdb_last_bgsave_status"] == status)  # type: ignore[index]  # redis-py's is untyped


def _dump_of(scene: Scene) -> Path:
    return scene.server._folder / "dump.rdb"


async def _ask_for_password(scene: Scene) -> None:
    user, _ = _login()
    await scene.tell("ACL", "SETUSER", user, "resetpass", f">{PASSWORD}")
    # Who is connected already need not show it.
    await scene.tell_as_operator("CLIENT", "KILL", "TYPE", "normal")


async def _ask_for_none(scene: Scene) -> None:
    user, password = _login()
    ours = ("resetpass", f">{password}") if password else ("nopass",)
    await scene.tell_as_operator("ACL", "SETUSER", user, *ours)


def _login() -> tuple[str, str]:
    """Return the user that the scenes log in as, and the password, "" for none."""
    user, _, password = RedisServer.login.rstrip("@").partition(":")
    return user or "default", password


async def _spoil_keys(scene: Scene) -> None:
    for key in await _keys_of_accounts(scene):
        await scene.tell("DEL", key)
        await scene.tell("LPUSH", key, "other")


async def _delete_keys(scene: Scene) -> None:
    for key in await _keys_of_accounts(scene):
        await scene.tell("DEL", key)


async def _keys_of_accounts(scene: Scene) -> list[str]:
    keys = await scene.tell("KEYS", "*guest*")
    return [key.decode() for key in keys]  # type: ignore[attr-defined]  # redis-py's is untyped


async def _fail_over(scene: Scene) -> None:
    scene.meanwhile(scene.sentinels.fail_over)


async def _await_it(scene: Scene) -> None:
    for ended in await scene.end_it():
        if isinstance(ended, BaseException):
            raise ended


async def _kill_a_master(scene: Scene) -> None:
    # One that has keys of ours.
    nodes = scene.cluster
    held = [await asyncio.to_thread(node.command, "KEYS", "*guest*") for node in nodes.masters]
    await asyncio.to_thread(nodes.kill_master, next(i for i, keys in enumerate(held) if keys))
    scene.meanwhile(nodes.wait_for_failover)


async def _move_slots(scene: Scene) -> None:
    scene.meanwhile(_move_all_slots_in_use, scene)


def _move_all_slots_in_use(scene: Scene) -> None:
    nodes = scene.cluster
    for node in nodes.masters:
        keys = node.command("KEYS", "*guest*")
        slots = {nodes.keyslot(key.decode()) for key in keys}  # type: ignore[attr-defined]  # redis-py's is untyped
        for slot in slots:
            move: Move = nodes.begin_move(slot)
            nodes.finish_move(move)


async def _kill_all(scene: Scene) -> None:
    for node in scene.cluster.living:
        await asyncio.to_thread(node.kill)


async def _pause_all(scene: Scene) -> None:
    for node in scene.cluster.living:
        await asyncio.to_thread(node.pause)


async def _resume_all(scene: Scene) -> None:
    for node in scene.cluster.living:
        node.resume()
    await asyncio.to_thread(scene.cluster.wait_for_failover)


async def _restart_all(scene: Scene) -> None:
    for node in scene.cluster.nodes:
        await asyncio.to_thread(node.restart)
    await asyncio.to_thread(scene.cluster.wait_for_failover)


FAULTS = [
    Fault("connections refused", ("E4", "F1"), behind_proxy, _refuse, _listen, long=True),
    Fault(
        *("accepts, never answers", ("F1", "F9"), behind_proxy, _hang, _mend),
        long=True,
    ),
    Fault(
        *("replies 250 ms late", ("F1", "F10"), behind_proxy, _delay, _mend),
        runs="once",
        long=True,
    ),
    Fault("replies 30 ms late", ("F1",), behind_proxy, _delay_a_little, _mend, "decided"),
    Fault(
        *("replies byte by byte", ("F1", "F10"), behind_proxy, _drip, _mend),
        runs="once",
        long=True,
    ),
    Fault("cut in mid-reply", ("F1", "F10"), behind_proxy, _cut, _mend, runs="once"),
    Fault("garbage for replies", ("F1", "F4"), behind_proxy, _answer_garbage, _mend, runs="once"),
    Fault("runs, swallows replies", ("F9", "F10"), behind_proxy, _swallow, _mend, runs="once"),
    Fault("name lost", ("F1",), by_name, _lose_name, _find_name),
    Fault("killed, back empty", ("F1", "F2"), one_server(), _kill, _restart, keeps=False),
    Fault("killed, back with its data", ("F1", "F2"), one_server(), _save_and_kill, _restart),
    Fault(
        *("restarted at once, empty", ("F1", "F2"), one_server(), _restart_at_once, _nothing),
        *("decided", "never"),
        keeps=False,
    ),
    Fault("paused", ("F1", "F9"), one_server(), _pause, _resume, runs="once", long=True),
    Fault("out of memory", ("F4", "F7"), one_server(), _use_up_memory, _give_memory),
    Fault("evicting", ("F4",), one_server(), _evict, _give_memory, "decided", keeps=False),
    Fault("SCRIPT FLUSH", ("F2",), one_server(), _forget_scripts, _nothing, "decided"),
    Fault("FLUSHALL", ("F2",), one_server(), _empty, _nothing, "decided", keeps=False),
    Fault("too few replicas", ("F3", "F4", "F7"), one_server(), _want_replicas, _want_no_replicas),
    Fault(
        *("became a replica", ("F3", "F4"), one_server(), _become_replica, _become_primary),
        keeps=True,
    ),
    Fault("loading", ("F2", "F4"), one_server(*_SLOW_LOADING), _load, _end_loading),
    Fault("busy in a script", ("F4",), one_server(), _run_endless_script, _kill_script),
    Fault("cannot save (MISCONF)", ("F4", "F7"), one_server(), _fail_to_save, _save_again),
    Fault("password changed", ("F4",), one_server(), _ask_for_password, _ask_for_none),
    Fault(
        *("wrong type under our keys", ("F4",), one_server(), _spoil_keys, _delete_keys),
        *("outage, asked", "never"),
        keeps=False,
    ),
    Fault(
        *("Sentinel failover", ("F1", "F3"), sentinels, _fail_over, _await_it),
        *("some", "perhaps"),
        keeps=False,
        ends_itself=True,
    ),
    Fault(
        *("Cluster: a master killed", ("F1", "F5"), cluster(1), _kill_a_master, _await_it),
        *("some", "perhaps"),
        keeps=False,
        ends_itself=True,
    ),
    Fault(
        *("Cluster: slots move", ("F5",), cluster(0), _move_slots, _await_it, "decided"),
        ends_itself=True,
    ),
    Fault(
        *("Cluster: all of it paused", ("F1", "F5", "F9"), cluster(0), _pause_all, _resume_all),
        runs="perhaps",
    ),
    Fault(
        *("Cluster: all of it down", ("F1", "F5"), cluster(0), _kill_all, _restart_all),
        keeps=False,
    ),
]
