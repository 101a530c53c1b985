"""Mount one ASGI application below a path of another, for frameworks that have no way of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


def mounted(outer: Any, prefix: str, inner: Any) -> ASGIApp:
    """Return an application that gives what is below `prefix` to `inner`, as ASGI would have it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        root = scope.get("root_path", "") if "path" in scope else ""
        if scope.get("path", "").startswith(f"{root}{prefix}/"):
            await inner({**scope, "root_path": root + prefix, "mounted": True}, receive, send)
        else:
            await outer(scope, receive, send)

    return app
