"""Renewing, releasing, settling and refunding in Redis, on one server or a Cluster.

What is asked for while an answer is still to come waits for it and then travels together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from importlib.resources import files
from struct import pack
from typing import Any

from redis.exceptions import NoScriptError

from tieredlimit._core.quota import Quota
from tieredlimit.backends.call import Script
from tieredlimit.backends.holds import Correction, Hold, Settled, by_key
from tieredlimit.backends.nodes import Nodes, Route, Sessions
from tieredlimit.backends.perloop import PerLoop
from tieredlimit.errors import BackendError

TIMEOUT = 1.0
"""Seconds that any of them may take."""

MAX_WAITING = 10_000
"""The most that may wait for their turn; further ones fail at once."""

_MAX_TOGETHER = 128

_lua = files("tieredlimit.backends").joinpath("lua")
_RENEW, _RELEASE, _SETTLE, _REFUND = (
    Script(_lua.joinpath(f"{verb}.lua").read_text("utf-8"))
    for verb in ("renew", "release", "settle", "refund")
)

_Words = tuple[str | bytes | int, ...]


class RedisHolds:
    """Look after what takes have left behind in Redis; as `Holds`.

    Safe to use from several event loops and after a fork.

    Args:
        route: How to get to the servers.
        clock: An explicit clock, None for the server's.
    """

    def __init__(self, route: Route, clock: Callable[[], int] | None) -> None:
        self._sessions = Sessions(route, TIMEOUT)
        self._clock = clock
        self._queues = PerLoop(lambda: _Queue(self._sessions.nodes))

    async def renew(self, hold: Hold) -> bool:
        """Hold all slots for their whole lease again; False if one is lost."""
        keys, leases = zip(*hold.slots, strict=True)
        packed = [pack("<d", lease_us) for lease_us in leases]
        (renewed,) = await self._run(_RENEW, keys, self._now(), hold.id, *packed)
        return bool(renewed)

    async def release(self, hold: Hold) -> bool:
        """Free the slots; False if none was held any more."""
        keys, leases = zip(*hold.slots, strict=True)
        now = self._now()
        freed = await self._run(
            _RELEASE, keys, *[hold.id + pack("<d", lease_us) + now for lease_us in leases]
        )
        if min(freed) < 0:
            broken = keys[freed.index(-1)]
            raise BackendError(f"Redis holds what are no slots under {broken}")
        return any(freed)

    async def settle(self, record: str, corrections: Sequence[Correction]) -> Settled:
        """Correct what was charged under a record, once."""
        keys = list(by_key(corrections))
        packed = b"".join(
            pack("<H4sdd", keys.index(key) + 1, tag, us, clamp_us)
            for key, tag, us, clamp_us in corrections
        )
        settled, *debts = await self._run(_SETTLE, (record, *keys), self._now(), packed)
        return Settled(bool(settled), debts)

    async def refund(self, corrections: Sequence[Correction]) -> list[int]:
        """Give back without a record, never beyond full."""
        grouped = by_key(corrections)
        packed = [
            b"".join(pack("<4sd", one.tag, max(-one.us, 0)) for one in group)
            for group in grouped.values()
        ]
        told = await self._run(_REFUND, tuple(grouped), *packed, self._now())
        after = iter(told[1::2])
        debts = {key: [next(after) for _ in group] for key, group in grouped.items()}
        return [debts[one.key].pop(0) for one in corrections]

    async def level(self, key: str, quota: Quota) -> int:
        """Return the debt of one bucket."""
        return (await self.refund([Correction(key, quota.tag, 0, quota.clamp_us)]))[0]

    async def close(self) -> None:
        """Close the running event loop's connections, once what was asked for is answered."""
        queue = self._queues.pop()
        if queue is not None:
            await queue.end()
        await self._sessions.close()

    def _now(self) -> bytes:
        return b"" if self._clock is None else b"%d" % self._clock()

    async def _run(self, script: Script, keys: Sequence[str], *args: bytes) -> list[int]:
        told: Any = await self._queues.here().ask(script, keys, args)
        if type(told) is not list or not all(type(one) is int for one in told):
            raise BackendError(f"Redis answered what is no reply to a script: {told!r:.80}")
        return told


class _Asked:
    """Hold one script to run, and who waits for its reply."""

    __slots__ = ("args", "deadline", "future", "keys", "script")

    def __init__(
        self,
        script: Script,
        keys: Sequence[str],
        args: Sequence[bytes],
        future: asyncio.Future[Any],
        deadline: float,
    ) -> None:
        self.deadline = deadline
        self.script = script
        self.keys = keys
        self.args = args
        self.future = future


class _Call:
    """Hold one command, and what it asks for: releases of a hash tag share one."""

    def __init__(self, asked: _Asked) -> None:
        self.asked = [asked]

    @property
    def key(self) -> str:
        """Where it is to be asked."""
        return self.asked[0].keys[0]

    def words(self, *, in_full: bool) -> _Words:
        """Return the command, which spells the script or only its digest."""
        script = self.asked[0].script
        keys = [key for one in self.asked for key in one.keys]
        args = [arg for one in self.asked for arg in one.args]
        verb, text = ("EVAL", script.text) if in_full else ("EVALSHA", script.sha)
        return verb, text, len(keys), *keys, *args

    def answer(self, reply: Any) -> None:
        """Give each what was asked for its part of the reply."""
        if len(self.asked) == 1:
            _answer(self.asked[0], reply)
            return
        whole = type(reply) is list and len(reply) == sum(len(one.keys) for one in self.asked)
        for one in self.asked:
            if not whole:
                # An error each: callers add their own traceback to it.
                error = BackendError(str(reply)) if isinstance(reply, BackendError) else reply
                _answer(one, error)
            else:
                part, reply = reply[: len(one.keys)], reply[len(one.keys) :]
                _answer(one, part)


def _answer(asked: _Asked, reply: Any) -> None:
    if asked.future.done():
        return
    if isinstance(reply, BackendError):
        asked.future.set_exception(reply)
    else:
        asked.future.set_result(reply)


class _Queue:
    """Ask in order of arrival, and what waits together."""

    def __init__(self, nodes: Callable[[], Nodes]) -> None:
        self._nodes = nodes
        self._waiting: deque[_Asked] = deque()
        self._task: asyncio.Task[None] | None = None

    def ask(
        self, script: Script, keys: Sequence[str], args: Sequence[bytes]
    ) -> asyncio.Future[Any]:
        """Let a script wait for its turn.

        Raises:
            BackendError: Too many wait already.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise BackendError(f"{MAX_WAITING} releases and the like wait for Redis already")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append(_Asked(script, keys, args, future, loop.time() + TIMEOUT))
        if self._task is None:
            self._task = loop.create_task(self._work())
        return future

    async def end(self) -> None:
        """Wait until what was asked for is answered; each has its own deadline."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        try:
            while self._waiting:
                many = min(len(self._waiting), _MAX_TOGETHER)
                batch = [self._waiting.popleft() for _ in range(many)]
                now = asyncio.get_running_loop().time()
                late = [one for one in batch if one.deadline < now]
                _fail(late, TimeoutError(f"its turn did not come within {TIMEOUT:g} s"))
                batch = [one for one in batch if one.deadline >= now]
                try:
                    await self._ask_all(batch)
                except BaseException as exc:
                    _fail(batch, exc)
                    if not isinstance(exc, Exception):
                        _fail(self._waiting, exc)
                        raise
        finally:
            self._task = None

    async def _ask_all(self, batch: Sequence[_Asked]) -> None:
        if not batch:
            return
        nodes = self._nodes()
        calls = _calls(batch)
        in_full = False
        while calls:
            asked = [(call.key, call.words(in_full=in_full)) for call in calls]
            unknown = []
            for call, reply in zip(calls, await nodes.ask_all(asked), strict=True):
                # The one refusal that proves that nothing ran. EVAL also loads the script.
                if isinstance(reply, BackendError) and not in_full and _is_unknown(reply):
                    unknown.append(call)
                else:
                    call.answer(reply)
            calls, in_full = unknown, True


def _calls(batch: Sequence[_Asked]) -> list[_Call]:
    """Return the commands that a batch needs, in its order but for releases, which are joined."""
    calls: list[_Call] = []
    releases: dict[str, _Call] = {}
    for one in batch:
        if one.script is not _RELEASE:
            calls.append(_Call(one))
            continue
        tag = one.keys[0].partition("}")[0]
        if tag in releases:
            releases[tag].asked.append(one)
        else:
            releases[tag] = _Call(one)
            calls.append(releases[tag])
    return calls


def _is_unknown(error: BackendError) -> bool:
    return isinstance(error.__cause__, NoScriptError)


def _fail(batch: Sequence[_Asked] | deque[_Asked], why: BaseException) -> None:
    for one in batch:
        if not one.future.done():
            error = BackendError(f"Redis was not asked: {str(why) or type(why).__name__}")
            error.__cause__ = why
            one.future.set_exception(error)
