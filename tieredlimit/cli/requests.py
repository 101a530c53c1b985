"""The request that an operator asks about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import click

_METHOD = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_ORIGIN = re.compile(r"(https?|wss?)://[^/?#]*", re.IGNORECASE)
_WEBSOCKET = ("WS", "WEBSOCKET")


@dataclass(frozen=True, slots=True)
class Request:
    """Name a request as the router sees it: a WebSocket is a GET, the path is decoded."""

    method: str
    path: str
    websocket: bool = False

    def __str__(self) -> str:
        return f"{'WebSocket' if self.websocket else self.method} {self.path}"


def split_words(
    words: Sequence[str], feature: str | None, *, fileless: bool = False
) -> tuple[Sequence[str], Request | None]:
    """Tell the policy files from the request behind them; with a feature there is no request.

    `fileless` says that the policy may come from elsewhere, and then there need be no file.

    Raises:
        click.UsageError: The words are neither.
    """
    if feature is not None:
        if len(words) > 1 and words[-1].startswith("/") and not Path(words[-1]).exists():
            raise click.UsageError("Give METHOD PATH or --feature, not both.")
        if not words and not fileless:
            raise click.UsageError("Give the policy, or --redis URL for the one that is stored.")
        return words, None
    if len(words) < (2 if fileless else 3):
        raise click.UsageError(
            "Give the policy and then the request, such as: policy.toml POST /v1/videos; "
            "or --feature NAME instead of a request."
        )
    *paths, method, target = words
    if not _METHOD.fullmatch(method):
        raise click.UsageError(
            f"{method!r:.80} is no method. Give METHOD PATH last, such as: POST /v1/videos"
        )
    return paths, _request(method.upper(), target)


def _request(method: str, target: str) -> Request:
    """Read a path as a client sends it, or a whole URL."""
    origin = _ORIGIN.match(target)
    below = target[origin.end() :] if origin else target
    path = unquote(re.split(r"[?#]", below)[0]) or ("/" if origin else "")
    if not path.startswith("/"):
        raise click.UsageError(f"{target!r:.80} is no path: it must start with '/'.")
    scheme = origin[1].lower() if origin else ""
    websocket = method in _WEBSOCKET or scheme.startswith("ws")
    return Request("GET" if websocket else method, path, websocket)
