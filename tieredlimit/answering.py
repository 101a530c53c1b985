"""What goes back to the client: the application's answer with its limits, or ours in its place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from tieredlimit._core.fields import Field
from tieredlimit.decision import Decision
from tieredlimit.ending import left_after
from tieredlimit.request import RequestLimits

__all__ = ["Answering", "Deny", "rendered"]

Deny: TypeAlias = Callable[[RequestLimits, Decision, Scope], Awaitable[ASGIApp]]
"""From a denial to the application that answers it."""

_WITH_HEADERS = frozenset(
    {"http.response.start", "websocket.accept", "websocket.http.response.start"}
)
_BEGINNINGS = _WITH_HEADERS | {"websocket.close"}
_ANSWERS = _BEGINNINGS - {"websocket.accept"}
# Fields that say something of the body that they come with.
_OF_A_BODY = frozenset(
    {
        *(b"content-type", b"content-length", b"content-encoding", b"content-language"),
        *(b"content-disposition", b"content-range", b"accept-ranges", b"transfer-encoding"),
        *(b"etag", b"last-modified"),
    }
)


class Answering:
    """Send what the application answers to one request.

    Args:
        limits: What the request takes with.
        scope: The request's.
        receive: The request's.
        send: Where to.
        deny: Gives the answer to a denial that comes from an endpoint.
        legacy: Whether `X-RateLimit-*` are sent as well.

    Attributes:
        started: Whether the answer has begun, which nothing can take back.
    """

    __slots__ = (
        *("_deny", "_left", "_legacy", "_limits", "_receive", "_scope", "_send"),
        "started",
    )

    def __init__(
        self,
        limits: RequestLimits,
        scope: Scope,
        receive: Receive,
        send: Send,
        deny: Deny,
        *,
        legacy: bool,
    ) -> None:
        self._limits = limits
        self._scope = scope
        self._receive = receive
        self._send = send
        self._deny = deny
        self._legacy = legacy
        self._left: int | None = None
        self.started = False

    async def send_with_limits(self, message: Message) -> None:
        """Send a message; the first with the fields that tell where the client stands."""
        limits = self._limits
        if limits.refusal is not None and await self.refuse(message):
            return
        ending = limits.ending
        if ending is not None and ending.needed:
            self._left = left_after(message, self._left, self._scope.get("method", ""))
            await ending.before(message, started=self.started, last=self._left == 0)
        kind = message["type"]
        if kind in _BEGINNINGS:
            self.started = True
            if kind in _WITH_HEADERS and limits.decisions and not limits.denied:
                message = _with_fields(message, limits.fields(legacy=self._legacy))
        await self._send(message)

    async def refuse(self, instead: Message | None = None) -> bool:
        """Answer with what refuses the request, in place of a message; say whether that is dropped.

        None stands for an application that has ended without an answer.
        """
        limits, scope = self._limits, self._scope
        refusal = limits.refusal
        begins = instead is None or instead["type"] in _ANSWERS
        if refusal is None or limits.refused is not None or self.started or not begins:
            return limits.refused is True
        limits.refused = False
        if isinstance(refusal, HTTPException):
            answer = rendered(refusal, scope)
        else:
            answer = await self._deny(limits, refusal.decision, scope)
        others = (instead or {}).get("headers", ())

        async def send_beside(message: Message) -> None:
            if message["type"] in _WITH_HEADERS:
                message = {**message, "headers": _beside(others, message.get("headers", ()))}
            await self.send_with_limits(message)

        await answer(scope, self._receive, send_beside)
        limits.refused = True
        return True


def rendered(answer: HTTPException, scope: Scope) -> ASGIApp:
    """Return what Starlette's exception middleware, which is behind us, would have answered."""
    offered = scope.get("extensions") or {}
    if scope["type"] == "websocket" and "websocket.http.response" not in offered:
        return WebSocketClose(1008)
    status, headers = answer.status_code, answer.headers
    detail: object = answer.detail
    if status in (204, 304):
        return Response(status_code=status, headers=headers)
    if isinstance(detail, str):
        return PlainTextResponse(detail, status, headers)
    return JSONResponse({"detail": detail}, status, headers)  # FastAPI's may be anything


def _with_fields(message: Message, fields: list[Field]) -> Message:
    """Return the message with our fields in place of the application's of the same names."""
    if not fields:
        return message
    ours = dict(fields)
    headers = [*message.get("headers", ())]
    for name, _ in headers:
        if name.lower() in ours:
            headers = [one for one in headers if one[0].lower() not in ours]
            break
    headers += fields
    return {**message, "headers": headers}


def _beside(headers: Any, answer: Any) -> list[Field]:
    """Return the fields of an answer, and those that the application gives each answer beside."""
    taken = {name.lower() for name, _ in answer if name.lower() != b"vary"} | _OF_A_BODY
    return [header for header in headers if header[0].lower() not in taken] + list(answer)
