"""The limiter is opened: around an application's lifespan, or at the first request."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from tieredlimit.errors import BackendError, UsageError
from tieredlimit.limiter import Limiter

__all__ = ["get_ready", "lifespan", "unready"]


async def get_ready(limiter: Limiter, what: str) -> bool:
    """Follow, and load a stored policy, where no lifespan has done so; say whether to go on.

    `what` is answered 503 until there is a policy, as the log will have it. A limiter that is not
    enabled needs none, and one that has a policy keeps nobody waiting.
    """
    if limiter.ready or not limiter.enabled:
        limiter.follow()
        return True
    try:
        await limiter.open()
    except (BackendError, UsageError) as exc:
        limiter.complaints.log(f"there is no policy yet: {what} answered 503", exc)
    return limiter.ready


async def unready(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer where nobody knows yet what is metered."""
    if scope["type"] == "websocket":
        await WebSocketClose(1013)(scope, receive, send)
        return
    headers = {"retry-after": "1", "cache-control": "no-store"}
    await PlainTextResponse("Service Unavailable", 503, headers)(scope, receive, send)


async def lifespan(
    limiter: Limiter, app: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """Open the limiter before an application starts up, and close it once that has shut down."""

    async def receive_and_open() -> Message:
        message = await receive()
        if message["type"] == "lifespan.startup":
            try:
                await limiter.open()
            except Exception as exc:
                # Unsaid, servers take this for an application without lifespan, and serve.
                await send({"type": "lifespan.startup.failed", "message": str(exc)})
                raise
        return message

    async def close_and_send(message: Message) -> None:
        if message["type"] != "lifespan.startup.complete":
            await limiter.close()
        await send(message)

    try:
        await app(scope, receive_and_open, close_and_send)
    except BaseException:
        await limiter.close()
        raise
