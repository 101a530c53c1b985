"""The end of a request: slots that are free again, failed work that costs nothing."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive
from starlette.websockets import WebSocketDisconnect

from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.limiter import Limiter

__all__ = ["Ending", "being_cancelled", "left_after"]

_ANSWERS = frozenset({"http.response.start", "websocket.http.response.start"})
_BODIES = frozenset(
    {"http.response.body", "http.response.zerocopysend", "websocket.http.response.body"}
)
_LAST = frozenset({"http.response.pathsend", "websocket.close"})
_REFUSED = 403
_BODILESS = frozenset({204, 304})
_GONE = frozenset({"http.disconnect", "websocket.disconnect"})
# Referred to, or the garbage collector may take them.
_refunding: set[asyncio.Task[None]] = set()
# What a handler raises because of a client that has gone.
_DISCONNECTS = (ClientDisconnect, WebSocketDisconnect)


class Ending:
    """Release what a request holds, and give back what it was charged where the policy says so.

    Args:
        limiter: What decided.
        decisions: What was decided for the request, by feature; a refund takes its decision's
            place.
        over: Whether the response has ended already.
    """

    __slots__ = ("_decisions", "_gone", "_held", "_limiter", "_over")

    def __init__(self, limiter: Limiter, decisions: dict[str, Decision], *, over: bool) -> None:
        self._limiter = limiter
        self._decisions = decisions
        self._held: list[Decision] = []
        self._gone = False
        self._over = over

    @property
    def needed(self) -> bool:
        """Whether there is anything to be done."""
        return bool(self._held)

    def add(self, decision: Decision) -> None:
        """Take care of a decision, and keep its lease until the end."""
        self._held.append(decision)
        if decision.lease is not None:
            if self._over:
                # The response ended while this was being decided.
                _ = self._limiter.leases.release_soon(decision.lease)
            else:
                decision.lease.keep()

    def watch(self, receive: Receive) -> Receive:
        """Return what passes on what a client sends, and sees it go."""

        async def receive_until_gone() -> Message:
            message = await receive()
            if message["type"] in _GONE:
                self._gone = True
            return message

        return receive_until_gone

    async def before(self, message: Message, *, started: bool, last: bool) -> None:
        """Do what must be done before a message is sent: who comes back at once finds it done.

        `started` is whether the answer has begun before, `last` whether it ends with this.
        """
        if not started and message["type"] in _ANSWERS:
            await self._refund(message["status"])
        elif not started and message["type"] == "websocket.close":
            await self._refund(_REFUSED)  # what servers make of it before the handshake
        if last:
            await self.release()

    async def failed(self, error: Exception) -> None:
        """Give back what an exception before the answer makes cost nothing, and release.

        Somebody in front of us will answer.
        """
        if self._held:
            if not isinstance(error, _DISCONNECTS):
                await self._refund(None)
            await self.release()

    async def release(self) -> None:
        """Release the leases that were not detached, waiting no longer than for a decision."""
        releasing = self._release()
        if releasing:
            await asyncio.wait(releasing, timeout=self._patience)

    def end(self) -> None:
        """Release what is left: the application has returned."""
        self._over = True
        if self._held:
            self._release()

    @property
    def _patience(self) -> float:
        # While Redis is not asked for decisions, no answer is held up for it either.
        return 0.0 if self._limiter.breaker_open else self._limiter.patience

    def _release(self) -> list[asyncio.Task[bool]]:
        leases = [one.lease for one in self._held if one.lease and not one.lease.over]
        return [self._limiter.leases.release_soon(lease) for lease in leases]

    async def _refund(self, status: int | None) -> None:
        """Give back by the response's status, None where the handler raised before there was one.

        Never once the client has gone: that alone may have made the handler fail, and must not pay.
        """
        if self._gone:
            return
        refunding = []
        for decision in self._held:
            feature = self._limiter.feature(decision.feature)
            if feature is None or self._decisions.get(decision.feature) is not decision:
                continue
            if feature.refund_on_exception if status is None else status in feature.refund_on:
                refunding.append(asyncio.create_task(self._give_back(decision)))
        for task in refunding:
            _refunding.add(task)
            task.add_done_callback(_refunding.discard)
        if refunding:
            await asyncio.wait(refunding, timeout=self._patience)

    async def _give_back(self, decision: Decision) -> None:
        try:
            self._decisions[decision.feature] = await self._limiter.refund(decision)
        except (BackendError, UsageError) as exc:
            self._limiter.complaints.log("a refund may not have happened", exc)


def being_cancelled() -> bool:
    """Say whether a `CancelledError` that came is this task's own, not of what it waited for."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs
        return True
    return task is None or task.cancelling() > 0


def left_after(message: Message, left: int | None, method: str) -> int | None:
    """Return how many bytes of an answer to a method follow a message, None if nobody can tell.

    Before the message there were `left`. With 0 the client has the whole answer, whatever the
    application still sends: it may be back before that.
    """
    kind = message["type"]
    if kind in _ANSWERS:
        if method == "HEAD" or message["status"] in _BODILESS:
            return 0
        lengths = [
            value
            for name, value in message.get("headers", ())
            if name.lower() == b"content-length" and value.isdigit()
        ]
        return int(lengths[0]) if lengths else None
    if kind in _LAST or (kind in _BODIES and not message.get("more_body", False)):
        return 0
    if left is None or kind not in _BODIES:
        return left
    # Of a file nobody knows how much was sent.
    return max(left - len(message["body"]), 0) if "body" in message else None
