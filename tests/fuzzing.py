"""Ask an application behind the middleware a great many odd things, the same ones for a seed.

    scripts/fuzz [--requests 1000000] [--seed 1]

Each request is made up from a grammar: targets near those of metered routes and far from them,
methods, root paths, peers, headers that somebody hostile would send, identities that fail. Of each
answer is asked: that it is whole and no 500, that nothing was raised but what the application
raised, and that no handler of a metered route ran without a decision to allow its feature.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from tieredlimit import Account, Limiter, TieredLimitMiddleware, UsageError
from tieredlimit.backends import MemoryBackend
from tieredlimit.identity import client_address
from tieredlimit.request import STATE_KEY, RequestLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import HTTPConnection, Request
    from starlette.types import ASGIApp, Message, Scope
    from starlette.websockets import WebSocket

POLICY: dict[str, Any] = {
    "order": ["pro", "free", "everyone"],
    "features": {
        "image": {"routes": ["POST /v1/images", "GET /v1/images/{id}"]},
        "video": {
            "routes": {"POST /v1/videos": 1, "POST /v1/videos/hd": 8, "PUT /v1/videos/{id}:cut": 2},
            "outage": "deny",
            "pool": {
                "rate": "600/minute", "leave": {"everyone": "50%"}, "concurrency": 40,
                "lease": "1 minute",
            },
            "refund_on": [418],
        },
        "file": {"routes": ["GET /v1/files/{rest:path}"]},
        "hall": {"routes": ["GET /v1/ws/{room}"]},
        "admin": {"routes": ["* /admin/{rest:path}"]},
        "job": {"routes": ["POST|PUT /m/{tenant}/{job}/run"], "outage": "local"},
        "search": {"routes": ["GET /search"]},
        "body": {},
    },
    "defaults": {
        "quotas": {
            "image": ["50/second", "900/minute"], "video": "90/second", "file": "99/second",
            "hall": "20/second", "admin": 0, "job": "50/second", "search": "unlimited",
            "body": {"rate": "90/second", "concurrency": 3, "lease": "10 seconds"},
        },
        "shadow": {"search": "1/hour"},
        "messages": {"admin": {"en": "No.", "fr": "Non.", "zh-Hant": "不。", "pt-BR": "Não."}},
    },
    "tiers": {
        "pro": {"when": {"plan": "pro"}, "quotas": {"admin": "20/second", "image": "unlimited"}},
        "free": {"when": {"plan": ["free", "user:tier:enterprise:x"]}},
        "everyone": {},
    },
}  # fmt: skip

TARGETS = [
    "POST /v1/images", "GET /v1/images/7", "POST /v1/videos", "POST /v1/videos/hd",
    "PUT /v1/videos/7:cut", "GET /v1/files/", "GET /v1/files/a/b.txt", "WS /v1/ws/hall",
    "GET /admin/", "POST /admin/users/7", "POST /m/t/7/run", "PUT /m/7/run", "GET /search",
    "GET /health", "POST /body", "POST /reserve", "GET /raise", "GET /teapot", "GET /", "GET ",
    "OPTIONS *", "GET v1/images",
]  # fmt: skip
ENDS = [
    *[""] * 12, "/", "//", "%0A", "/%0A", "%0a%0a", "%00", "%20", "?x=/v1", "#x", ";x=1", "/.",
    "/..", "%2F", "%FF", "%C3%A9", "%ED%A0%80", "%E2%80%AE", "%", "%zz", "/run", "/run%0A", ":cut",
]  # fmt: skip
SLASHES = ["//", "%2F", "%2f", "/./", "/../", "/%2e/", "\\", "/;x=1/", "/%0A/", "%00/"]
METHODS = [
    *["GET"] * 6, *["POST"] * 8, "PUT", "HEAD", "OPTIONS", "DELETE", "get", "Post", "BREW", "",
    "GE T", "PO\u017fT", "PUT\r\n",
]  # fmt: skip
IDS = [
    "ann", "ben", "user:tier:enterprise:x", "{tag}", "}{", "a\r\nGET x", "\x00", "*192.0.2.1",
    "x" * 5_000, "é/../é", "\udcff", "", "\u202eann", "\u0430nn", "tl1:{default:0}:image", "~pool",
    "%2F", "ann ", " ann", "ANN", "\ufeffann", "192.0.2.1", "unknown",
]  # fmt: skip
PLANS = [None, "free", "pro", "PRO", "pro ", "user:tier:enterprise:x", "\udcff", "", "everyone"]
FORWARDED = [
    b"6.6.6.6", b"for=6.6.6.6", b'for="', b'"', b"\\", b"for=_x;by=y", b'for="[2001:db8::1]:80"',
    b"unknown", b"1.2.3.4, , 5.6.7.8", b"," * 500, b"\xff\xfe", b"6" * 9_000, b"::ffff:1.2.3.4",
    b"fe80::1%25eth0", b"1.2.3.4:99999", b"[", b"]:", b'for="\\"', b"\r\nx: y", b"\x00",
]  # fmt: skip
LANGUAGES = [
    b"fr", b"fr-CA;q=0.9, *;q=0.1", b"pt", b"*", b";;;", b"q=", b"fr;q=nan", b"fr;q=inf",
    b"fr;q=1e999", b"fr;q=-1", b"a-" * 5_000, b"," * 5_000, b"zh-Hant-TW;q=1.0", b"\xff", b"\x00",
    b"en;q=0.1,fr;Q=0,pt-br;q=.5", b"fr;q=" + b"9" * 900,
]  # fmt: skip
ROOTS = [*[""] * 24, "/api", "/v1", "/v1/images", "/m", "/", "/a/"]
COSTS: list[Any] = [
    1, 1, 1, 2, 0, -1, 10**9, 10**9 + 1, 10**400, 1.0, float("nan"), True, "1", None, [1], b"1",
    {"cost": 1}, object(), -0.0, 1j,
]  # fmt: skip
FEATURES: list[Any] = [
    "body", "body", "video", "image", "admin", "nobody", "", "\udcff", None, 7, ["body"], b"body",
    "BODY", "body ", "x" * 5_000, {"a": 1}, ("body",),
]  # fmt: skip
SERVERS: list[Callable[[str], str]] = [
    unquote,
    unquote,
    lambda target: unquote_to_bytes(target).decode("latin-1"),
    lambda target: unquote_to_bytes(target).decode("utf-8", "surrogateescape"),
]
PEERS: list[Any] = [
    ("192.0.2.1", 1), ("192.0.2.2", 1), ("2001:db8::1", 1), ("testclient", 1), ("", 0), None,
    ("x" * 900, 1), ("fe80::1%eth0", 1), ("\ud800", 1),
]  # fmt: skip
WORDS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "BREW"]
STATUSES = {200, 204, 307, 400, 401, 403, 404, 405, 418, 429, 503}


class OwnError(Exception):
    """What the application raises by itself, and nobody else."""


class FoundError(AssertionError):
    """Something happened that must not."""


@dataclass
class Fuzz:
    """Make up requests, ask them, and judge what comes back.

    Attributes:
        answers: How often each outcome was seen, by status or in a word.
        metered: How often each metered handler ran.
    """

    random: Random
    answers: Counter[object] = field(default_factory=Counter)
    metered: Counter[str] = field(default_factory=Counter)
    now: int = 1_700_000_000_000_000

    def __post_init__(self) -> None:
        self.ran: list[str] = []
        # So few keys that strangers meet a full store, and the outage answers.
        backend = MemoryBackend(clock=lambda: self.now, max_keys=60, max_catch_all_keys=30)
        self.limiter = Limiter(POLICY, backend)
        options: dict[str, Any] = {
            "limiter": self.limiter,
            "identify": self.identify,
            "anonymous": client_address(trusted_hops=1),
        }
        self.apps: list[ASGIApp] = [
            Starlette(
                routes=self.routes(),
                middleware=[Middleware(TieredLimitMiddleware, legacy_fields=legacy, **options)],
            )
            for legacy in (False, True)
        ]
        self.bare = Starlette(routes=self.routes())

    def routes(self) -> list[BaseRoute]:
        """Return the application's routes; those of metered ones say that they ran."""

        def runs(feature: str, status: int = 200) -> Callable[[Request], Any]:
            async def handle(request: Request) -> Response:
                self.ran.append(feature)
                return PlainTextResponse(feature, status)

            return handle

        async def talk(websocket: WebSocket) -> None:
            self.ran.append("hall")
            await websocket.accept()
            await websocket.close()

        async def body(request: Request) -> Response:
            limits: RequestLimits = request.state.tieredlimit
            try:
                decision = await limits.take(self.one(FEATURES), self.one(COSTS))
            except UsageError as exc:
                str(exc).encode()
                return JSONResponse({"wrong": str(exc)}, 400)
            decision.raise_if_denied()
            return JSONResponse({"remaining": decision.remaining})

        async def reserve(request: Request) -> Response:
            limits: RequestLimits = request.state.tieredlimit
            try:
                reservation = await limits.reserve(self.one(FEATURES), self.one(COSTS))
                await reservation.settle(self.one(COSTS))
            except UsageError as exc:
                return JSONResponse({"wrong": str(exc)}, 400)
            return Response(status_code=204)

        async def fails(request: Request) -> Response:
            raise OwnError

        inner = [Route("/{job}/run", runs("job"), methods=["POST", "PUT"])]
        return [
            Route("/v1/images", runs("image"), methods=["POST"]),
            Route("/v1/images/{id}", runs("image")),
            Route("/v1/videos", runs("video"), methods=["POST"]),
            Route("/v1/videos/hd", runs("video", 418), methods=["POST"]),
            Route("/v1/videos/{id}:cut", runs("video"), methods=["PUT"]),
            Route("/v1/files/{rest:path}", runs("file")),
            WebSocketRoute("/v1/ws/{room}", talk),
            Mount("/admin", routes=[Route("/{rest:path}", runs("admin"), methods=WORDS)]),
            Mount("/m", routes=[Mount("/{tenant}", routes=inner)]),
            Route("/search", runs("search")),
            Route("/health", runs("")),
            Route("/body", body, methods=["POST", "GET"]),
            Route("/reserve", reserve, methods=["POST", "GET"]),
            Route("/raise", fails, methods=["POST", "GET"]),
            Route("/teapot", runs("", 418), methods=["POST", "GET"]),
        ]

    def identify(self, connection: HTTPConnection) -> Any:
        """Answer in every way in which an identify may, and may not."""
        who = connection.headers.get("x-who")
        match who:
            case None:
                return None
            case "fails":
                raise LookupError("the user table is locked")
            case "refuses":
                raise HTTPException(401, "no key")
            case "wrong":
                return self.one(["ann", 7, False, [], {}, (), b"", 0.0, {"id": "ann"}])
            case "later":
                return self.later(connection)
            case _:
                return self.account()

    async def later(self, connection: HTTPConnection) -> Any:
        await asyncio.sleep(0)
        if self.random.random() < 0.1:
            raise self.one([LookupError("locked"), HTTPException(401), TimeoutError(), KeyError(1)])
        return self.account() if self.random.random() < 0.9 else self.one(["ann", 7, False])

    def account(self) -> Account:
        within = {"org": self.one(IDS)} if self.random.random() < 0.1 else {}
        return Account(self.one(IDS), plan=self.one(PLANS), within=within)

    def one(self, values: list[Any]) -> Any:
        """Return one of the values."""
        return values[int(self.random.random() * len(values))]

    def target(self) -> tuple[str, str]:
        """Return a method and a request target, most often of a route or near one."""
        chance = self.random.random
        method, _, target = self.one(TARGETS).partition(" ")
        if method != "WS" and chance() < 0.2:
            method = self.one(METHODS)
        if chance() < 0.3:
            return method, target
        end: str = self.one(ENDS)
        if chance() < 0.5:
            return method, target + end
        letters = list(target)
        for _ in range(1 + int(chance() * 3)):
            at = int(chance() * len(letters))
            letter = "".join(letters[at : at + 1])[:1] or "/"
            if letter == "/":
                letters[at : at + 1] = self.one(SLASHES)
            elif chance() < 0.7:
                letters[at : at + 1] = [f"%{ord(letter):02x}"]
            elif chance() < 0.5:
                letters[at : at + 1] = letter.swapcase()
            else:
                letters[at : at + 1] = [letter, self.one(ENDS)]
        return method, "".join(letters) + end

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what a client sends that means no good."""
        chance = self.random.random
        headers: list[tuple[bytes, bytes]] = []
        if chance() < 0.5:
            who = self.one([b"ann", b"ann", b"ann", b"later", b"fails", b"wrong", b"refuses"])
            headers.append((b"x-who", who))
        if chance() < 0.3:
            headers.append((b"Accept-Language", self.one(LANGUAGES)))
        if chance() < 0.4:
            name = self.one([b"x-forwarded-for", b"X-Forwarded-For", b"forwarded", b"FORWARDED"])
            headers += [(name, self.one(FORWARDED)) for _ in range(1 + int(chance() * 3))]
        if chance() < 0.1:
            headers += [(b"origin", b"https://x"), (b"Access-Control-Request-Method", b"POST")]
        if chance() < 0.1:
            headers += [(b"ratelimit", b'"image";r=99'), (b"x-http-method-override", b"GET")]
        return headers

    def scope(self) -> Scope:
        """Make up a request."""
        chance = self.random.random
        method, target = self.target()
        path: str = self.one(SERVERS)(target.partition("?")[0])
        root = self.one(ROOTS)
        if root and chance() < 0.7:
            path = root + path
        scope: Scope = {
            "type": "http", "method": method, "path": path, "root_path": root,
            "raw_path": target.encode(), "query_string": b"", "headers": self.headers(),
            "client": self.one(PEERS), "server": ("h", 80), "scheme": "http",
        }  # fmt: skip
        if method == "WS" or chance() < 0.02:
            scope["type"], scope["scheme"] = "websocket", "ws"
            del scope["method"]
            if chance() < 0.5:
                scope["extensions"] = {"websocket.http.response": {}}
        return scope

    async def ask(self) -> None:
        """Ask one request and judge the answer."""
        self.now += int(self.random.random() * 4_000)
        self.ran.clear()
        scope = self.scope()
        asked = dict(scope)
        sent: list[Message] = []
        websocket = scope["type"] == "websocket"
        received = ["websocket.connect"] if websocket else ["http.request"]

        async def receive() -> Message:
            if received:
                return {"type": received.pop(), "body": b"", "more_body": False}
            return {"type": "websocket.disconnect" if websocket else "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        try:
            await self.one(self.apps)(scope, receive, send)
        except OwnError:
            self.answers["raised"] += 1
            sent.clear()
        except Exception as exc:
            # Starlette's redirect cannot spell a path that is not UTF-8, for one.
            if not await self.raises_by_itself(asked, type(exc)):
                raise FoundError(f"{type(exc).__name__} {exc} escaped from {asked!r}") from exc
            self.answers["raised by the router"] += 1
            sent.clear()
        try:
            self.judge(scope, sent)
        except (FoundError, ValueError) as exc:
            raise FoundError(f"{exc}, asked {asked!r}, answered {sent!r:.2000}") from exc

    async def raises_by_itself(self, scope: Scope, kind: type[Exception]) -> bool:
        """Say whether the application raises so without the middleware as well."""

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None: ...

        try:
            await self.bare(scope, receive, send)
        except kind:
            return True
        return False

    def judge(self, scope: Scope, sent: list[Message]) -> None:
        """Check the answer.

        Raises:
            FoundError, ValueError: It is not as it must be.
        """
        for feature in filter(None, self.ran):
            self.metered[feature] += 1
            decision = scope[STATE_KEY].decisions.get(feature)
            if not _is_preflight(scope) and (decision is None or not decision.allowed):
                raise FoundError(f"{feature} ran without its decision, there is {decision!r:.300}")
        starts = [message for message in sent if "status" in message]
        if len(starts) > 1:
            raise FoundError("it was started twice")
        for start in starts:
            status = start["status"]
            self.answers[status] += 1
            if status not in STATUSES:
                raise FoundError(f"the status is {status}")
            for name, value in start["headers"]:
                if set(name + value) & set(b"\r\n\x00"):
                    raise FoundError(f"a header is split: {name!r}: {value!r}")
            headers = dict(start["headers"])
            if headers.get(b"content-type") == b"application/problem+json":
                _check_problem(headers, sent)
        if sent and not starts:
            self.answers["closed" if sent[0]["type"] == "websocket.close" else "accepted"] += 1

    async def run(self, requests: int) -> None:
        """Ask so many requests.

        Raises:
            FoundError: An answer was not as it must be.
        """
        async with self.limiter:
            for _ in range(requests):
                await self.ask()


def _is_preflight(scope: Scope) -> bool:
    names = {name.lower() for name, _ in scope["headers"]}
    asks = {b"origin", b"access-control-request-method"} <= names
    return asks and scope.get("method") == "OPTIONS"


def _check_problem(headers: dict[bytes, bytes], sent: list[Message]) -> None:
    body = b"".join(message.get("body", b"") for message in sent)
    problem = json.loads(body)
    if int(headers[b"content-length"]) != len(body) or headers[b"cache-control"] != b"no-store":
        raise FoundError("the problem's headers are wrong")
    if problem["retry_after"] is not None and problem["retry_after"] < 1:
        raise FoundError("it asks to come back at once")


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--requests", type=int, default=1_000_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args()
    logging.getLogger("tieredlimit").setLevel(logging.CRITICAL)
    fuzz = Fuzz(Random(options.seed))
    began = time.monotonic()
    asyncio.run(fuzz.run(options.requests))
    took = time.monotonic() - began
    print(f"{options.requests:,} requests in {took:.0f} s, nothing found (seed {options.seed})")
    print("answers:", ", ".join(f"{what} {n:,}" for what, n in fuzz.answers.most_common()))
    print("metered handlers that ran:", ", ".join(f"{f} {n:,}" for f, n in fuzz.metered.items()))


if __name__ == "__main__":
    main()
