"""How many microseconds does the middleware add to a request?

    scripts/bench middleware [--seconds 0.2] [--rounds 7] [--uvloop] [--json PATH]

In process: one request after the other is put into an ASGI application that answers at once with
two headers and a short body; no server, no network. Buckets are in memory. A request names one of
1,000 accounts in a header, which `identify` reads. Rows take turns, and the median over the rounds
of the time per request is shown, less that of the same application behind nothing (`bare`), and
less that of one behind a middleware that wraps `send` and adds one header (`one header`).

- `tieredlimit` sends `RateLimit` and `RateLimit-Policy`; with one quota and with two; and where a
  request matches no route, where the cell is zero (answered 403), where the limiter is disabled,
  and where the quota is used up (answered 429).
- `slowapi` is `SlowAPIASGIMiddleware` with `headers_enabled` and as many default limits.
- `asgi-ratelimit` sends no headers unless it denies.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import cycle
from statistics import median
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from benchmarks.measure import (
    Bar,
    Chart,
    Target,
    arguments,
    environment,
    finish,
    run,
    table,
    take_turns,
)
from benchmarks.peers import LIMIT, notes
from benchmarks.policies import POLICY, SEED, drawn
from tieredlimit import Account, Limiter, TieredLimitMiddleware

ACCOUNTS = 1_000
BARE, HEADER = "bare", "one header"
_AT_ONCE = 50

App = tuple[str, ASGIApp, str, int]
"""A row's name, what is asked, on which path, and the status that it answers with."""


def main() -> None:
    """Measure, print the table, write the file."""
    options = arguments("middleware", __doc__, seconds=0.2, rounds=7)
    result, runs = run(measure(options.seconds, options.rounds), uvloop=options.uvloop)
    finish(
        options, "middleware", __doc__, result, _table(result["rows"]),
        targets=_targets(runs), charts=_charts(result["rows"]),
    )  # fmt: skip


async def measure(seconds: float, rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Let every application answer in turns; return the result, and the rounds of every row."""
    before = environment()
    apps, left_out = _apps()
    headers = [
        [(b"host", b"localhost"), (b"accept", b"*/*"), (b"x-account", account.id.encode())]
        for account in drawn(ACCOUNTS, 10 * ACCOUNTS)
    ]
    contenders: dict[str, Callable[[], Awaitable[float]]] = {}
    for name, app, path, expected in apps:
        scope = scope_of(path)
        status, _ = await _answer(app, {**scope, "headers": headers[0]})
        if expected == 429:
            status, _ = await _answer(app, {**scope, "headers": headers[0]})
        if status != expected:
            left_out[name] = f"answered {status} instead of {expected}"
            continue
        # A denied account is one that was there before.
        known = headers if expected == 200 else headers[:1]
        contenders[name] = partial(_time, app, scope, known, seconds)
    runs = await take_turns(contenders, rounds)
    result = {
        "environment": before,
        "settings": {"seconds": seconds, "rounds": rounds, "accounts": ACCOUNTS, "seed": SEED},
        "left_out": left_out,
        "rows": [
            {
                "target": name,
                "us": median(measured),
                "over_bare_us": _over(runs, name, BARE),
                "over_header_us": _over(runs, name, HEADER),
                "rounds": measured,
            }
            for name, measured in runs.items()
        ],
    }
    return result, runs


async def answer_at_once(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001 -- ASGI
    """Answer 200 with two headers and a short body."""
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"2")],
        }
    )
    await send({"type": "http.response.body", "body": b"{}"})


def _apps() -> tuple[list[App], dict[str, str]]:
    def ours(*, enabled: bool = True) -> ASGIApp:
        limiter = Limiter(POLICY, enabled=enabled)
        return TieredLimitMiddleware(answer_at_once, limiter=limiter, identify=_identify)

    image, video = "/v1/images", "/v1/videos"
    apps: list[App] = [
        (BARE, answer_at_once, image, 200),
        (HEADER, _AddHeader(answer_at_once), image, 200),
        ("tieredlimit, 1 quota", ours(), image, 200),
        ("tieredlimit, 2 quotas", ours(), video, 200),
        ("tieredlimit, no route", ours(), "/v1/health", 200),
        ("tieredlimit, disabled", ours(enabled=False), image, 200),
        ("tieredlimit, zero", ours(), "/v1/none", 403),
        ("tieredlimit, denied", ours(), "/v1/tight", 429),
    ]
    left_out = notes()
    for name, makes in (("slowapi", _slowapi), ("asgi-ratelimit", _asgi_ratelimit)):
        try:
            apps += makes()
        except Exception as exc:  # noqa: BLE001 -- a peer that does not run is named, not fatal
            left_out.setdefault(name, f"{type(exc).__name__}: {exc}"[:200])
    return apps, left_out


def _identify(conn: HTTPConnection) -> Account | None:
    account = conn.headers.get("x-account")
    return Account(account, plan="free") if account else None


class _AddHeader:
    """Add one header to each response: the least that a middleware with headers can do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-limit", b"1")]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_header)


def _slowapi() -> list[App]:
    slowapi: Any = import_module("slowapi")
    middleware: Any = import_module("slowapi.middleware").SlowAPIASGIMiddleware
    from starlette.applications import Starlette
    from starlette.routing import Route

    def app(path: str, *limits: str) -> ASGIApp:
        starlette = Starlette(routes=[Route(path, _endpoint, methods=["POST"])])
        starlette.state.limiter = slowapi.Limiter(
            key_func=lambda request: request.headers["x-account"],
            default_limits=list(limits),
            headers_enabled=True,
        )
        limited = middleware(answer_at_once)

        async def within_starlette(scope: Scope, receive: Receive, send: Send) -> None:
            scope["app"] = starlette
            await limited(scope, receive, send)

        return within_starlette

    minute, day, image, video = f"{LIMIT}/minute", f"{LIMIT}/day", "/v1/images", "/v1/videos"
    return [
        ("slowapi, 1 limit", app(image, minute), image, 200),
        ("slowapi, 2 limits", app(video, minute, day), video, 200),
        ("slowapi, no route", app(image, minute), "/v1/health", 200),
        ("slowapi, denied", app("/v1/tight", "1/hour", "1/day"), "/v1/tight", 429),
    ]


async def _endpoint() -> None:
    """Stand in the routes that slowapi looks through."""


def _asgi_ratelimit() -> list[App]:
    ratelimit: Any = import_module("ratelimit")
    memory: Any = import_module("ratelimit.backends.simple").MemoryBackend

    async def authenticate(scope: Scope) -> tuple[str, str]:
        return next(v for k, v in scope["headers"] if k == b"x-account").decode(), "default"

    def app(path: str, **amounts: int) -> ASGIApp:
        limited: ASGIApp = ratelimit.RateLimitMiddleware(
            answer_at_once, authenticate, memory(), {f"^{path}$": [ratelimit.Rule(**amounts)]}
        )
        return limited

    image, video, tight = "/v1/images", "/v1/videos", "/v1/tight"
    return [
        ("asgi-ratelimit, 1 limit", app(image, minute=LIMIT), image, 200),
        ("asgi-ratelimit, 2 limits", app(video, minute=LIMIT, day=LIMIT), video, 200),
        ("asgi-ratelimit, no route", app(image, minute=LIMIT), "/v1/health", 200),
        ("asgi-ratelimit, denied", app(tight, hour=1, day=1), tight, 429),
    ]


def scope_of(path: str) -> Scope:
    """Return the scope of a request without headers and state."""
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "client": ("127.0.0.1", 4000), "server": ("127.0.0.1", 80),
    }  # fmt: skip


async def receive_nothing() -> Message:
    """Return an empty body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def send_nowhere(message: Message) -> None:
    """Take a message, and do nothing with it."""


async def _answer(app: ASGIApp, scope: Scope) -> tuple[int, list[tuple[bytes, bytes]]]:
    """Return the status and the headers of one response."""
    started: list[Message] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            started.append(message)

    await app({**scope, "state": {}}, receive_nothing, send)
    return started[0]["status"], list(started[0]["headers"])


async def _time(
    app: ASGIApp, scope: Scope, headers: Sequence[list[tuple[bytes, bytes]]], seconds: float
) -> float:
    """Return the microseconds that a request takes."""
    workload = cycle(headers)
    requests = 0
    clock = time.perf_counter
    begin = now = clock()
    while now < begin + seconds:
        for _ in range(_AT_ONCE):
            await app(
                {**scope, "headers": next(workload), "state": {}}, receive_nothing, send_nowhere
            )
        requests += _AT_ONCE
        now = clock()
    return (now - begin) / requests * 1e6


def _over(runs: Mapping[str, Sequence[float]], name: str, floor: str) -> float:
    """Return the median over the rounds of what a row adds to another."""
    return median(own - least for own, least in zip(runs[name], runs[floor], strict=True))


def _targets(runs: Mapping[str, Sequence[float]]) -> list[Target]:
    targets = []
    for quotas, plural in ((1, ""), (2, "s")):
        name, peer = f"tieredlimit, {quotas} quota{plural}", f"slowapi, {quotas} limit{plural}"
        added = _over(runs, name, HEADER)
        share = added / _over(runs, peer, HEADER) if peer in runs else None
        question = f"middleware, memory, {quotas} quota{plural}"
        targets += [
            Target(f"{question}: over one header", 10, True, added, "us"),
            Target(f"{question}: slowapi's", round(1 / 6, 3), True, share),
        ]
    return targets


def _charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    bars = [
        Bar(
            row["target"], row["over_header_us"],
            "ours" if row["target"].startswith("tieredlimit") else "peer",
        )
        for row in rows
        if row["target"] not in (BARE, HEADER) and row["over_header_us"] > 0
    ]  # fmt: skip
    title = "Added to a request by the middleware, memory, in process"
    return [Chart(title, "us over adding one header, less is better", bars, [("10 us", 10)])]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["target", "us a request", "over bare", "over one header"]
    numbers = ("us", "over_bare_us", "over_header_us")
    lines = [[row["target"], *[f"{row[name]:.2f}" for name in numbers]] for row in rows]
    return table(header, lines, words=1)


if __name__ == "__main__":
    main()
