"""Whatever a router gives to a metered handler is charged, however its request is spelled.

Applications of nested mounts, included routers, classes and WebSockets are made up, with a policy
that meters each of their routes as it would be written; then they are asked in odd ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, unquote_to_bytes

import pytest
from fastapi import APIRouter, FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, Router, WebSocketRoute
from starlette.websockets import WebSocket

from tieredlimit import Limiter, TieredLimitMiddleware
from tieredlimit.request import STATE_KEY

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Scope

SEGMENTS = [
    *["a", "b", "v1", "é", ".", "..", "a.b", "%2F", ";x=1"],
    *["{}", "{}", "{:int}", "{:path}", "{}.b", "a{}", "{}-{}", "{}{:path}", "{:uuid}", "{:float}"],
]
PIECES = [
    *["a", "b", "v1", "V1", "é", "e\u0301", "1", "12", "-", "1.5", ".b", ".", "..", "%2F", "%"],
    *["\n", "\r", "\x00", " ", ";x=1", "?", "#", "\\", "\ufffd", "\u2028", "/", "/", "//", "/./"],
    "00000000-0000-0000-0000-000000000000",
]
METHODS = ["GET", "HEAD", "POST", "OPTIONS", "get", "Post", "BREW", "CONNECT", ""]
END = ["", "", "", "/", "//", "\n", "/\n", "\n\n", "/.", "/..", ";x=1", "\x00", " ", "?"]


@dataclass
class Leaf:
    """A route as made up: its methods as a policy writes them, and its whole template."""

    methods: str
    template: str
    kind: str


@dataclass
class Level:
    """A mount, or the application itself."""

    prefix: str
    leaves: list[tuple[str, str, str]] = field(default_factory=list)
    inner: list[Level] = field(default_factory=list)


def segments(most: int) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(SEGMENTS), max_size=most).map(
        lambda parts: "".join(f"/{part}" for part in parts)
    )


leaves = st.tuples(
    st.sampled_from(["GET", "POST", "GET|POST", "OPTIONS", "*"]),
    st.tuples(segments(3), st.sampled_from(["", "", "/"])).map("".join).map(lambda s: s or "/"),
    st.sampled_from(["function", "class", "websocket"]),
)
levels = st.recursive(
    st.builds(Level, segments(2), st.lists(leaves, min_size=1, max_size=3), st.just([])),
    lambda inner: st.builds(
        Level, segments(2), st.lists(leaves, max_size=2), st.lists(inner, min_size=1, max_size=2)
    ),
    max_leaves=4,
)


def named(level: Level, names: Iterator[int]) -> Level:
    """Give every parameter its name: in one template none may come twice."""

    def name(path: str) -> str:
        return re.sub(r"\{", lambda _: f"{{p{next(names)}", path)

    return Level(
        name(level.prefix),
        [(methods, name(path), kind) for methods, path, kind in level.leaves],
        [named(one, names) for one in level.inner],
    )


def policy_routes(level: Level, above: str = "") -> list[Leaf]:
    prefix = above + level.prefix
    found = [
        Leaf("GET" if kind == "websocket" else methods, prefix + path, kind)
        for methods, path, kind in level.leaves
    ]
    for one in level.inner:
        found += policy_routes(one, prefix)
    return found


def starlette_routes(level: Level, ran: Callable[[Scope], None]) -> list[BaseRoute]:
    routes: list[BaseRoute] = []
    for methods, path, kind in level.leaves:
        if kind == "websocket":
            routes.append(WebSocketRoute(path, websocket_endpoint(ran)))
        elif kind == "class" or methods == "*":
            routes.append(
                Route(path, class_endpoint(ran, None if methods == "*" else methods.split("|")))
            )
        else:
            routes.append(Route(path, endpoint(ran), methods=methods.split("|")))
    routes += [Mount(one.prefix, routes=starlette_routes(one, ran)) for one in level.inner]
    return routes


def endpoint(ran: Callable[[Scope], None]) -> Callable[[Request], Any]:
    async def handle(request: Request) -> Response:
        ran(request.scope)
        return Response()

    return handle


def class_endpoint(ran: Callable[[Scope], None], methods: list[str] | None) -> type[HTTPEndpoint]:
    async def handle(_: HTTPEndpoint, request: Request) -> Response:
        ran(request.scope)
        return Response()

    known = [method.lower() for method in methods or ["GET", "POST", "BREW", "OPTIONS"]]
    return type("Endpoint", (HTTPEndpoint,), dict.fromkeys(known, handle))


def websocket_endpoint(ran: Callable[[Scope], None]) -> Callable[[WebSocket], Any]:
    async def handle(websocket: WebSocket) -> None:
        ran(websocket.scope)
        await websocket.accept()
        await websocket.close()

    return handle


def limiter_for(routes: list[Leaf]) -> Limiter:
    """Meter all routes as one feature: what the policy refuses as clashing is there already."""
    known: dict[str, str] = {}
    for leaf in routes:
        shape = re.sub(r"\{\w+(:path)?[^}]*\}", r"{\1}", leaf.template)
        shape = re.sub(r"(\{:path\})+", "{:path}", shape).rstrip("/") or "/"
        known[shape] = f"* {leaf.template}" if shape in known else f"{leaf.methods} {leaf.template}"
    return Limiter(
        {
            "features": {"all": {"routes": list(known.values())}},
            "tiers": {"everyone": {"quotas": {"all": "unlimited"}}},
        }
    )


def uncharged(app: ASGIApp, limiter: Limiter, scopes: list[Scope], scope: Scope) -> bool:
    """Say whether a handler ran that was not charged."""
    scopes.clear()
    ask(TieredLimitMiddleware(app, limiter=limiter), scope)
    return any("all" not in one["state"][STATE_KEY].decisions for one in scopes)


def ask(app: ASGIApp, scope: Scope) -> None:
    async def receive() -> Message:
        return {"type": "websocket.connect" if scope["type"] == "websocket" else "http.request"}

    async def send(message: Message) -> None: ...

    # Nothing here waits: an event loop of its own for each request would take most of the time.
    with pytest.raises(StopIteration):
        app(scope, receive, send).send(None)  # type: ignore[attr-defined]  # it is a coroutine


def http(method: str, path: str, **scope: Any) -> Scope:
    return {
        "type": "http", "method": method, "path": path, "root_path": "", "headers": [],
        "query_string": b"", "client": ("192.0.2.1", 1), "server": ("h", 80), "scheme": "http",
        **scope,
    }  # fmt: skip


def websocket(path: str, **scope: Any) -> Scope:
    made = http("", path, type="websocket", scheme="ws", **scope)
    del made["method"]
    return made


def mostly(usual: st.SearchStrategy[str], odd: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.sampled_from([True] * 7 + [False]).flatmap(lambda one: usual if one else odd)


junk = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


VALUES = {
    "int": ["0", "12"],
    "float": ["1", "1.5"],
    "uuid": ["00000000-0000-0000-0000-000000000000"],
    "path": ["", "a", "a/b", "/", "//v1", "a/"],
}


@st.composite
def paths_for(draw: st.DrawFn, template: str) -> str:
    """A path made from a template, then perhaps spelled in an odd way."""

    def value(parameter: re.Match[str]) -> str:
        fitting = st.sampled_from(VALUES.get(parameter[1] or "", ["1", "a", "b", "v1", "é"]))
        return draw(mostly(fitting, junk))

    path = re.sub(r"\{\w+(?::(\w+))?\}", value, template)
    if draw(st.booleans()):
        path = re.sub("/", lambda _: draw(st.sampled_from(["/"] * 7 + ["//"])), path)
    segment = path.split("/")
    if draw(st.booleans()) and len(segment) > 2:
        # What nested mounts are given when they disagree about where they are.
        path = "/" + "/".join(segment[draw(st.integers(1, len(segment) - 1)) :])
    return path + draw(st.sampled_from(END))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Level, Scope]:
    """An application, and a request that has something to do with one of its routes."""
    level = named(draw(levels), count())
    level.prefix = ""
    leaf = draw(st.sampled_from(policy_routes(level)))
    made = paths_for(leaf.template)
    path = draw(mostly(made, junk.map("/".__add__)))
    root = draw(st.sampled_from(["", "", "", "/api", "/a", "/v1", "/", "/a/"]))
    if root and draw(st.booleans()):
        path = root + path
    if leaf.kind == "websocket" and draw(st.integers(0, 3)):
        return level, websocket(path, root_path=root)
    fitting = st.sampled_from(METHODS if leaf.methods == "*" else leaf.methods.split("|"))
    return level, http(draw(mostly(fitting, st.sampled_from(METHODS))), path, root_path=root)


@pytest.mark.fault("E1", "E10")
@given(cases(), st.booleans())
def test_no_request_that_a_nested_application_answers_is_free(
    case: tuple[Level, Scope], redirects: bool
) -> None:
    level, scope = case
    scopes: list[Scope] = []
    app = Router(starlette_routes(level, scopes.append), redirect_slashes=redirects)

    assert not uncharged(app, limiter_for(policy_routes(level)), scopes, scope)


# --- FastAPI's routers, whose routes we know by feature

FASTAPI = {
    "images": "POST /v1/images",
    "image": "GET /v1/images/{id}",
    "variations": "POST /v1/images/{id}/variations",
    "files": "GET /v1/files/{rest:path}",
    "numbers": "GET /v1/numbers/{n:int}",
    "deep": "POST /v1/a/{tenant}/jobs",
    "sub": "POST /sub/{id}",
    "subroot": "GET /sub/",
    "ws": "GET /v1/ws/{room}",
}


def fastapi_application(ran: Callable[[str], None], **settings: Any) -> FastAPI:
    def says(feature: str) -> Callable[[], Any]:
        async def handle() -> str:
            ran(feature)
            return feature

        return handle

    async def talk(websocket: WebSocket) -> None:
        ran("ws")
        await websocket.accept()
        await websocket.close()

    def add(router: APIRouter | FastAPI, feature: str, path: str) -> None:
        method = FASTAPI[feature].partition(" ")[0]
        router.add_api_route(path, says(feature), methods=[method])

    v1 = APIRouter(prefix="/v1")
    images = APIRouter(prefix="/images")
    add(images, "images", "")
    add(images, "image", "/{id}")
    add(images, "variations", "/{id}/variations")
    deep = APIRouter()
    add(deep, "deep", "/{tenant}/jobs")
    v1.include_router(images)
    v1.include_router(deep, prefix="/a")
    add(v1, "files", "/files/{rest:path}")
    add(v1, "numbers", "/numbers/{n:int}")
    v1.add_api_websocket_route("/ws/{room}", talk)
    app = FastAPI(openapi_url=None, **settings)
    app.include_router(v1)
    inner = FastAPI(openapi_url=None)
    add(inner, "sub", "/{id}")
    add(inner, "subroot", "/")
    app.mount("/sub", inner)
    return app


def limiter_by_feature() -> Limiter:
    features = {feature: {"routes": [route]} for feature, route in FASTAPI.items()}
    cells = dict.fromkeys(FASTAPI, "unlimited")
    return Limiter({"features": features, "tiers": {"everyone": {"quotas": cells}}})


TARGETS = [
    "POST /v1/images", "GET /v1/images/7", "POST /v1/images/7/variations", "GET /v1/files/a/b",
    "GET /v1/files/", "GET /v1/numbers/12", "POST /v1/a/t/jobs", "POST /sub/7", "GET /sub/",
    "GET /sub", "GET /v1/ws/hall",
]  # fmt: skip


def odd_letter(letter: str) -> st.SearchStrategy[str]:
    """Spell one letter of a target: as it is, encoded, in another case, and so on."""
    encoded = f"%{ord(letter):02x}"
    spelled = [letter] * 60 + [encoded, encoded.upper(), f"%25{encoded[1:]}", letter.upper()]
    if letter == "/":
        spelled += ["//", "%2F", "%2f", "/./", "/../", "/%2e/", "\\", "/;x=1/"]
    return st.sampled_from(spelled)


odd_ends = st.sampled_from(
    [*["", "", "", "", "/", "//", "%0A", "/%0A", "%0a%0a", "%00", "%20", "?", "?x=/y", "#x", ";x"],
     *["/.", "/..", "%2F", "%FF", "%C3%A9", "%ED%A0%80", "%E2%80%AE", ".json", "%", "%zz"]]
)  # fmt: skip


@st.composite
def targets(draw: st.DrawFn) -> tuple[str, str]:
    """A method and a target, most often spelled in an odd way."""
    method, _, target = draw(st.sampled_from(TARGETS)).partition(" ")
    spelled = "".join(draw(st.tuples(*map(odd_letter, target))))
    return draw(mostly(st.just(method), st.sampled_from(METHODS))), spelled + draw(odd_ends)


# Each server has its own way to make text of a target's bytes.
decoders = st.sampled_from(
    [
        unquote,
        lambda target: unquote_to_bytes(target).decode("latin-1"),
        lambda target: unquote_to_bytes(target).decode("utf-8", "surrogateescape"),
        lambda target: target,
    ]
)


def unpaid(app: ASGIApp, ran: list[str], scope: Scope) -> set[str]:
    """Return the features whose handlers ran and that were not decided."""
    ran.clear()
    ask(app, scope)
    limits = scope[STATE_KEY]
    return set(ran) - set(limits.decisions)


@pytest.mark.fault("E1", "E10")
@given(
    targets(),
    decoders,
    st.sampled_from([*[""] * 9, "/api", "/v1", "/v1/images", "/sub"]),
    st.booleans(),
)
def test_no_spelling_of_a_target_is_free_of_the_feature_that_runs(
    asked: tuple[str, str], decode: Callable[[str], str], root: str, prefixed: bool
) -> None:
    method, target = asked
    path = decode(target.partition("?")[0].partition("#")[0])
    path = root + path if prefixed else path
    scopes = [http(method, path, root_path=root, raw_path=target.encode())]
    if method == "GET":
        scopes.append(websocket(path, root_path=root))

    assert not any(unpaid(FASTAPI_APP, RAN, scope) for scope in scopes)


@pytest.mark.fault("E10")
@pytest.mark.filterwarnings("ignore:The `root_path` parameter")
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("path", ["/v1/images", "/api/v1/images", "/api/v1/images/"])
@pytest.mark.parametrize("server_root", ["", "/api", "/other"])
def test_root_path_that_the_application_gives_itself_is_no_way_round(
    path: str, server_root: str, wrapped: bool
) -> None:
    ran: list[str] = []
    inner: ASGIApp = fastapi_application(ran.append, root_path="/api")
    if wrapped:
        inner = GZipMiddleware(inner)
    app = TieredLimitMiddleware(inner, limiter=limiter_by_feature())

    assert unpaid(app, ran, http("POST", path, root_path=server_root)) == set()
    assert ran or path.endswith("/")


RAN: list[str] = []
FASTAPI_APP = fastapi_application(RAN.append)
FASTAPI_APP.add_middleware(TieredLimitMiddleware, limiter=limiter_by_feature())


@pytest.mark.parametrize("route", FASTAPI.items(), ids=str)
def test_every_route_runs_as_it_is_written(route: tuple[str, str]) -> None:
    feature, (method, _, template) = route[0], route[1].partition(" ")
    path = re.sub(r"\{.*?\}", "7", template)
    scope = websocket(path) if feature == "ws" else http(method, path)

    assert unpaid(FASTAPI_APP, RAN, scope) == set()
    assert [feature] == RAN


# --- What a preflight may do, and what it may not


@pytest.mark.fault("E10")
@pytest.mark.parametrize(
    ("method", "names", "charged"),
    [
        ("OPTIONS", [b"origin", b"access-control-request-method"], False),
        ("OPTIONS", [b"Origin", b"Access-Control-Request-Method"], False),
        ("OPTIONS", [b"origin"], True),
        ("OPTIONS", [b"access-control-request-method"], True),
        ("OPTIONS", [], True),
        ("options", [b"origin", b"access-control-request-method"], True),
        ("POST", [b"origin", b"access-control-request-method"], True),
        ("GET", [b"origin", b"access-control-request-method"], True),
        ("HEAD", [b"origin", b"access-control-request-method"], True),
    ],
)
def test_only_a_preflight_passes_as_one(method: str, names: list[bytes], charged: bool) -> None:
    level = Level("", [("*", "/x", "class")])
    scopes: list[Scope] = []
    app = Router(starlette_routes(level, scopes.append))
    scope = http(method, "/x", headers=[(name, b"POST") for name in names])

    assert uncharged(app, limiter_for(policy_routes(level)), scopes, scope) is not charged
