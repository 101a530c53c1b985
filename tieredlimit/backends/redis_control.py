"""Revisions, heartbeats and the label of a namespace in Redis, on one server or a Cluster.

Scripts are sent in full each time: what runs this seldom need not know whether the server knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files

from redis.exceptions import ResponseError

from tieredlimit._core.keys import revision_key as shard_key
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends import stored
from tieredlimit.backends.heartbeat import MAX_WORKERS, SILENCE_US, Heartbeat
from tieredlimit.backends.news import follow
from tieredlimit.backends.nodes import Nodes, Route, Sessions
from tieredlimit.backends.revisions import (
    KEPT_REVISIONS,
    LISTED_REVISIONS,
    Published,
    check_label,
    check_succession,
    newer_of,
    repaired,
)
from tieredlimit.backends.wire import UnreachableError
from tieredlimit.errors import BackendError, ConflictError

TIMEOUT = 5.0
"""Seconds that a step of an operation may take."""

_ANY_LOWER = "*"
# How many heartbeats are read at a time.
_PAGE = 500

_lua = files("tieredlimit.backends").joinpath("lua")
_PUBLISH, _RAISE, _BEAT, _NOW = (
    _lua.joinpath(f"{verb}.lua").read_text("utf-8") for verb in ("publish", "raise", "beat", "now")
)


class RedisControl:
    """Keep revisions in Redis, under keys of one hash tag, and their number on every shard.

    Safe to use from several event loops and after a fork.

    Args:
        route: How to get to the servers.
        namespace: Whose revisions these are.
        shards: Over how many hash tags the namespace's buckets are spread.
        poll_interval: Seconds between two looks of `watch` at the head; None looks at news only.
        timeout: Seconds that a step of an operation may take.
    """

    def __init__(
        self,
        route: Route,
        namespace: str,
        shards: int,
        *,
        poll_interval: float | None,
        timeout: float = TIMEOUT,
    ) -> None:
        self._poll_interval = poll_interval
        prefix = f"tl:{{{namespace}}}:"
        self._prefix = prefix
        self._head, self._numbers = prefix + "head", prefix + "numbers"
        self._heard, self._beats = prefix + "workers", prefix + "heartbeats"
        self._label, self._channel = prefix + "label", prefix + "news"
        self._shards = [shard_key(namespace, shard) for shard in range(shards)]
        self._sessions = Sessions(route, timeout)

    async def head(self) -> Revision:
        """Return the revision in force; as `ControlStore.head`."""
        nodes = self._sessions.nodes()
        stands = await self._standing(nodes)
        while stands[0] > 0:
            found = await self.revision(stands[0])
            if found is not None and found.digest == stands[1]:
                return found
            # Unless the head has moved on meanwhile, perhaps to nothing.
            before, stands = stands, await self._standing(nodes)
            if before == stands:
                held = "no document" if found is None else f"one with digest {found.digest}"
                raise BackendError(
                    f"revision {before[0]} with digest {before[1]} is in force, and Redis holds "
                    f"{held} under {self._document(before[0])}"
                )
        return NOTHING

    async def revision(self, number: int) -> Revision | None:
        """Return one of the last 200 revisions; None if it is not kept."""
        key = self._document(number)
        content = await self._sessions.nodes().ask(self._head, "GET", key)
        return None if content is None else stored.revision(key, content, number)

    async def history(self, most: int = LISTED_REVISIONS) -> list[Revision]:
        """Return the latest revisions that are kept, newest first."""
        last = str(max(min(most, KEPT_REVISIONS), 1) - 1)
        told = await self._sessions.nodes().ask(self._head, "ZREVRANGE", self._numbers, "0", last)
        numbers = [stored.number(self._numbers, number) for number in told]
        if not numbers:
            return []
        keys = [self._document(number) for number in numbers]
        contents = await self._sessions.nodes().ask(self._head, "MGET", *keys)
        # What is not there was dropped a moment ago.
        return [
            stored.revision(key, content, number)
            for key, content, number in zip(keys, contents, numbers, strict=True)
            if content is not None
        ]

    async def publish(self, revision: Revision, *, seen: Revision) -> Published:
        """Make a revision the head and have all shards obey it; as `ControlStore.publish`."""
        check_succession(revision, seen)
        async with self._sessions.own_nodes() as nodes:
            await self._check_shards(nodes, seen)
            return await self._publish(nodes, revision, seen)

    async def complete(self, revision: Revision) -> Published:
        """Have all shards obey the head; as `ControlStore.complete`."""
        async with self._sessions.own_nodes() as nodes:
            stands = await self._standing(nodes)
            if stands != (revision.number, revision.digest):
                raise ConflictError(revision.number, stands[0])
            return await self._spread(nodes, revision)

    async def seed(self, revision: Revision) -> Revision:
        """Put the head back where Redis has lost it; as `ControlStore.seed`."""
        if revision.number == 0:
            return await self.head()
        async with self._sessions.own_nodes() as nodes:
            standing = await self._put(nodes, revision, _ANY_LOWER)
            if standing == (revision.number, revision.digest):
                return (await self._spread(nodes, revision)).revision
        return await self.head()

    async def repair(self, shard_number: int, revision: Revision) -> Revision:
        """Get out of a number that no document has; as `ControlStore.repair`."""
        head = await self.head()
        if head.number >= shard_number:
            return head
        again = repaired(newer_of(head, revision), shard_number, await self.now())
        async with self._sessions.own_nodes() as nodes:
            with suppress(ConflictError):  # somebody else did
                await self._publish(nodes, again, head)
        # Another's repair has the same content and digest, but an instant of its own.
        return await self.head()

    async def beat(self, heartbeat: Heartbeat) -> None:
        """Note that a worker lives; as `ControlStore.beat`."""
        content = heartbeat.to_json()
        keys = ("2", self._heard, self._beats)
        limits = (SILENCE_US, MAX_WORKERS)
        words = ("EVAL", _BEAT, *keys, heartbeat.id, content, *limits)
        if await self._sessions.nodes().ask(self._head, *words) != 1:
            raise BackendError(f"{MAX_WORKERS:,} workers are noted already")

    async def retire(self, worker: str) -> None:
        """Forget a worker that has ended; as `ControlStore.retire`."""
        nodes = self._sessions.nodes()
        await nodes.ask(self._head, "ZREM", self._heard, worker)
        await nodes.ask(self._head, "HDEL", self._beats, worker)

    async def workers(self) -> list[Heartbeat]:
        """Return the latest heartbeats of the workers heard within the last 5 s, by id."""
        nodes = self._sessions.nodes()
        now = await self.now()
        between = (now - SILENCE_US, now + SILENCE_US, "LIMIT", "0", MAX_WORKERS)
        ids = sorted(await nodes.ask(self._head, "ZRANGEBYSCORE", self._heard, *between))
        workers = []
        for start in range(0, len(ids), _PAGE):
            page = ids[start : start + _PAGE]
            instants = await nodes.ask(self._head, "ZMSCORE", self._heard, *page)
            contents = await nodes.ask(self._head, "HMGET", self._beats, *page)
            for at, content in zip(instants, contents, strict=True):
                if at is not None and content is not None:
                    age = max(now - float(at), 0) / 1e6
                    workers.append(Heartbeat.from_json(content, age=age))
        return workers

    async def watch(self, heard: Callable[[int], None]) -> None:
        """Tell the head's number now and whenever the head changes; runs until cancelled."""
        nodes = self._sessions.nodes()

        await follow(
            lambda: self._standing(nodes),
            lambda: nodes.connect(self._head),
            self._channel,
            heard,
            poll_interval=self._poll_interval,
        )

    async def label(self) -> str:
        """Return what the namespace is called; empty if nothing."""
        told = await self._sessions.nodes().ask(self._head, "GET", self._label)
        return stored.label(self._label, told)

    async def set_label(self, text: str) -> None:
        """Name the namespace; an empty text takes the label away."""
        check_label(text)
        words = ("SET", self._label, text) if text else ("DEL", self._label)
        await self._sessions.nodes().ask(self._head, *words)

    async def now(self) -> int:
        """Return the server's clock in microseconds since 1970; a Cluster's where the head is."""
        told = await self._sessions.nodes().ask(self._head, "EVAL", _NOW, "1", self._head)
        return int(told[0]) * 1_000_000 + int(told[1])

    async def close(self) -> None:
        """Close this event loop's connections."""
        await self._sessions.close()

    async def _publish(self, nodes: Nodes, revision: Revision, seen: Revision) -> Published:
        standing = await self._put(nodes, revision, stored.spelled(seen))
        if standing != (revision.number, revision.digest):
            raise ConflictError(seen.number, standing[0])
        published = await self._spread(nodes, revision)
        await self._drop_old(nodes)
        return published

    async def _check_shards(self, nodes: Nodes, seen: Revision) -> None:
        """Check that no shard obeys what follows the head.

        Raises:
            BackendError: One does: what the head was is lost, and must not be published over.
        """
        asked = [(key, ("GET", key)) for key in self._shards]
        for key, told in zip(self._shards, await nodes.ask_all(asked), strict=True):
            # What cannot be read is for `_spread` to say, once the head is published.
            number = stored.standing(key, told)[0] if isinstance(told, bytes) else 0
            if number > seen.number:
                stands = (await self._standing(nodes))[0]
                if stands >= number:
                    return
                raise BackendError(
                    f"{key} says that revision {number} is in force, and Redis has lost it since "
                    f"revision {stands}: any worker that runs puts it back within seconds; "
                    "look again"
                )

    async def _put(self, nodes: Nodes, revision: Revision, seen: str) -> tuple[int, str]:
        """Make a revision the head if it may be; return the head as it stands then."""
        keys = ("3", self._head, self._document(revision.number), self._numbers)
        content = revision.to_json()
        words = (_PUBLISH, *keys, seen, revision.number, revision.digest, content)
        try:
            told = await nodes.ask(self._head, "EVAL", *words)
        except UnreachableError:
            raise
        except BackendError as exc:
            if isinstance(exc.__cause__, ResponseError):
                raise
            raise BackendError(
                f"nobody knows whether revision {revision.number} is published: {exc}; run it again"
            ) from exc
        return stored.standing(self._head, told)

    async def _spread(self, nodes: Nodes, revision: Revision) -> Published:
        """Raise every shard to the head, tell the news, wait for the replicas."""
        script = ("EVAL", _RAISE, "1")
        head = (revision.number, revision.digest)
        shards = self._shards if revision.number else []
        told = await nodes.ask_all([(key, (*script, key, *head)) for key in shards])
        # Also where some shards failed. Who cannot be told looks for himself.
        await nodes.ask_all([(self._head, ("PUBLISH", self._channel, revision.number))])
        failed = [reply for reply in told if isinstance(reply, BackendError)]
        if failed:
            raise BackendError(
                f"revision {revision.number} is published, but {len(failed)} of {len(shards)} "
                f"shards have not heard of it: run it again ({failed[0]})"
            ) from failed[0]
        replicas = await nodes.replicas()
        numbers = [stored.standing(key, reply)[0] for key, reply in zip(shards, told, strict=True)]
        if max(numbers, default=0) > revision.number:
            # Somebody has published since; or the head was lost, and with it what the shard obeys.
            revision = await self.repair(max(numbers), revision)
        return Published(revision, len(self._shards), replicas)

    async def _drop_old(self, nodes: Nodes) -> None:
        """Drop the documents beyond the number kept; what fails is left to the next publisher."""
        words = ("ZRANGE", self._numbers, "0", str(-KEPT_REVISIONS - 1))
        (old,) = await nodes.ask_all([(self._head, words)])
        if isinstance(old, list) and old:
            keys = [self._document("").encode() + number for number in old]
            await nodes.ask_all(
                [(self._head, ("DEL", *keys)), (self._head, ("ZREM", self._numbers, *old))]
            )

    async def _standing(self, nodes: Nodes) -> tuple[int, str]:
        """Return the head's number and digest."""
        return stored.standing(self._head, await nodes.ask(self._head, "GET", self._head))

    def _document(self, number: int | str) -> str:
        return f"{self._prefix}revision:{number}"
