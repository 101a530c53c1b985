"""Route templates: what is one, what it covers, which of several wins, and what a search costs."""

from __future__ import annotations

import re
import sys
from itertools import chain, count, product
from random import Random
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Mount, Router
from starlette.routing import Route as StarletteRoute

from tieredlimit._core.matcher import Matcher
from tieredlimit._core.routes import Route, clashes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.requests import Request
    from starlette.types import Message, Scope


def matcher(*routes: str) -> Matcher[str]:
    """Return a matcher whose values are the routes as written."""
    return Matcher((Route.parse(text), text) for text in routes)


# --- Reading a route


def test_route_keeps_methods_and_path_as_written() -> None:
    route = Route.parse("POST|PUT /v1/images/{id}/")

    assert route == Route(frozenset({"POST", "PUT"}), "/v1/images/{id}/")


def test_star_is_every_method() -> None:
    assert Route.parse("* /x/{rest:path}").methods is None


@pytest.mark.parametrize("text", ["* /x/{rest:path}", "POST|PUT /v1/{id}/"])
def test_spelled_route_reads_back_as_the_same(text: str) -> None:
    assert str(Route.parse(text)) == text


@pytest.mark.parametrize("convertor", ["str", "path", "int", "float", "uuid"])
def test_convertors_of_the_router_are_accepted(convertor: str) -> None:
    path = f"/x/{{id:{convertor}}}"

    assert Route.parse(f"GET {path}").path == path


@pytest.mark.parametrize(
    ("text", "value", "hint"),
    [
        ("", "''", "one space and a path"),
        ("/v1/images", "'/v1/images'", "write methods, one space and a path"),
        ("POST", "'POST'", "write methods, one space and a path"),
        (" /v1", "''", "upper-case names"),
        ("post /v1", "'post'", "upper-case names"),
        ("Post /v1", "'Post'", "upper-case names"),
        ("POST| /v1", "''", "joined by '|'"),
        ("POST||PUT /v1", "''", "joined by '|'"),
        ("POST,PUT /v1", "'POST,PUT'", "joined by '|'"),
        ("POST|* /v1", "'*'", "alone for every method"),
        ("POST\n /v1", r"'POST\n'", "upper-case names"),
        ("É /v1", "'É'", "upper-case names"),
        ("POST  /v1", "' /v1'", "must start with '/'"),
        ("POST v1", "'v1'", "must start with '/'"),
        ("POST ", "''", "must start with '/'"),
        ("POST https://host/v1", "'https://host/v1'", "must start with '/'"),
        ("POST /v 1", "'/v 1'", "parameter"),
        ("POST /v1 ", "'/v1 '", "parameter"),
        ("POST /v1\n", r"'\n'", "parameter"),
        ("POST /v\x001", r"'\x00'", "parameter"),
        ("POST /v\u00851", r"'\x85'", "parameter"),
        ("POST /v\u20031", r"'\u2003'", "parameter"),
        ("POST /v1?x=1", "'/v1?x=1'", "queries are not matched"),
        ("POST /v1#x", "'/v1#x'", "queries are not matched"),
        ("POST /v1//x", "'/v1//x'", "single slashes"),
        ("POST /{}", "{}", "write {name}"),
        ("POST /{1}", "{1}", "no digit first"),
        ("POST /{a-b}", "{a-b}", "write {name}"),
        ("POST /{a:}", "{a:}", "{name:path}"),
        ("POST /{é}", "{é}", "write {name}"),
        ("POST /{a:slug}", "'slug'", "float, int, path, str, uuid"),
        ("POST /{a:PATH}", "'PATH'", "float, int, path, str, uuid"),
        ("POST /{a}/{a:path}", "'a' twice", "each parameter its name"),
        ("POST /{a", "'/{a'", "stray brace"),
        ("POST /a}", "'/a}'", "stray brace"),
        ("POST /{{a}}", "'/{{a}}'", "stray brace"),
        ("POST /{a}}/{b}", "'/{a}}/{b}'", "stray brace"),
    ],
)
def test_what_is_no_route_is_refused_with_the_value_and_what_would_be_right(
    text: str, value: str, hint: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)) as caught:
        Route.parse(text)

    assert value in str(caught.value)


def test_messages_stay_short_for_long_values() -> None:
    with pytest.raises(ValueError, match="must start with") as caught:
        Route.parse("POST " + "x" * 10_000)

    assert len(str(caught.value)) < 300


# --- Shapes and clashes


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("/v1/{id}", "/v1/{name}"),
        ("/v1/{id}", "/v1/{id:int}"),
        ("/v1/images", "/v1/images/"),
        ("/{rest:path}", "/{other:path}"),
        ("/{a:path}{b:path}", "/{rest:path}"),
    ],
)
def test_shapes_ignore_names_convertors_and_the_trailing_slash(left: str, right: str) -> None:
    assert Route(None, left).shape == Route(None, right).shape


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("/", "/{id}"),
        ("/v1/{id}", "/v1/{id:path}"),
        ("/v1/{id}", "/v1/id"),
        ("/v1/{a}{b}", "/v1/{a}"),
        ("/v1/images", "/v1/Images"),
    ],
)
def test_shapes_of_different_templates_differ(left: str, right: str) -> None:
    assert Route(None, left).shape != Route(None, right).shape


def test_routes_of_one_shape_and_a_common_method_clash() -> None:
    routes = [
        "POST /v1/{id}",
        "GET /v1/images",
        "PUT|POST /v1/{name}/",
        "DELETE /v1/{id}",
        "* /v1/images/",
        "HEAD /v1/images",
    ]

    assert clashes([Route.parse(text) for text in routes]) == [(0, 2), (1, 4), (1, 5), (4, 5)]


def test_every_method_twice_on_one_shape_is_a_clash() -> None:
    assert clashes([Route(None, "/x"), Route(None, "/x")]) == [(0, 1)]


def test_head_and_post_on_one_shape_are_no_clash() -> None:
    assert clashes([Route.parse("HEAD /x"), Route.parse("POST /x")]) == []


# --- What a template covers


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ("GET /", "/"),
        ("GET /", ""),
        ("GET /v1/images", "/v1/images"),
        ("GET /v1/{id}", "/v1/x"),
        ("GET /v1/{id:int}", "/v1/not-a-number"),
        ("GET /files/{name}.json", "/files/a.b.json"),
        ("GET /v1/videos/{id}:cancel", "/v1/videos/7:cancel"),
        ("GET /{a}-{b}-{c}", "/1-2-3"),
        ("GET /{a}{b}", "/12"),
        ("GET /x/{rest:path}", "/x/"),
        ("GET /x/{rest:path}", "/x/a/b//c/"),
        ("GET /a/{rest:path}/b", "/a//b"),
        ("GET /a/{rest:path}/b", "/a/b/b/b"),
        ("GET /a/{x:path}/b/{y:path}/c", "/a/1/b/2/b/3/c"),
        ("GET /a/{x:path}/{id}/b{y:path}", "/a/q/r/b"),
        ("GET /a/{x:path}-{id}z{y:path}c", "/a/-/-z/-yz/c"),
        ("GET /static/{rest:path}.js", "/static/a/b.js"),
        ("GET /static/{rest:path}.js", "/static/a/b.js\n"),
        ("GET /files/{name}.json", "/files/a.json\n"),
        ("GET /a/{x:path}/b{i}c{y:path}d", "/a/1/b/b2cd"),
        ("GET /{tenant}/x/{rest:path}/{last}", "/t/x/1/2"),
    ],
)
def test_template_covers_what_the_router_accepts(route: str, path: str) -> None:
    assert matcher(route).match("GET", path) == route


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ("GET /", "/x"),
        ("GET /v1/images", "/v1/Images"),
        ("GET /v1/images", "/v1/images/x"),
        ("GET /v1/images", "/v1/x/../images"),
        ("GET /v1/{id}", "/v1"),
        ("GET /v1/{id}", "/v1/"),
        ("GET /v1/{id}", "/v1/a/b"),
        ("GET /v1/{id}", "/v1\n/a"),
        ("GET /files/{name}.json", "/files/.json"),
        ("GET /{a}{b}", "/1"),
        ("GET /x/{rest:path}", "/x"),
        ("GET /a/{rest:path}/b", "/a/b"),
        ("GET /a/{rest:path}b", "/a/"),
        ("GET /a/{x:path}bb{y:path}b", "/a/bb"),
        ("GET /a/{x:path}/b/{y:path}/c", "/a/1/c/2/b"),
        ("GET /a/{x:path}-{id}z{y:path}c", "/a/-/-z/-/c"),
        ("GET /images", "x/images"),
        ("GET /images", "http://[/images"),
        ("GET /images", "http://host"),
    ],
)
def test_template_covers_no_more_than_its_spellings(route: str, path: str) -> None:
    assert matcher(route).match("GET", path) is None


@pytest.mark.parametrize(
    ("route", "path"),
    [
        ("GET /images", "images"),
        ("GET /images", "images/"),
        ("GET /images", "http://host/images"),
        ("GET /images", "http://host//images"),
        ("GET /images", "http://host/images;x=1"),
        ("GET /images", "http://host/images?x"),
        ("GET /images", "host:/images#x"),
        ("GET /{rest:path}", "*"),
    ],
)
def test_path_without_a_first_slash_is_covered_as_routers_read_it(route: str, path: str) -> None:
    assert matcher(route).match("GET", path) == route


def test_no_template_matches_nothing() -> None:
    assert matcher().match("GET", "/") is None
    assert matcher().match("GET", "//\n") is None


def test_values_may_be_false() -> None:
    assert Matcher([(Route.parse("GET /x"), 0)]).match("GET", "/x") == 0


def test_get_covers_head_and_nothing_else() -> None:
    routes = matcher("GET /x/{id}")

    assert routes.match("HEAD", "/x/1") == "GET /x/{id}"
    assert routes.match("OPTIONS", "/x/1") is None
    assert matcher("POST /x").match("HEAD", "/x") is None


def test_star_covers_invented_methods() -> None:
    assert matcher("* /x").match("BREW", "/x") == "* /x"


def test_method_in_lower_case_is_metered() -> None:
    assert matcher("POST /x").match("post", "/x") == "POST /x"


@pytest.mark.fault("E10")
@pytest.mark.parametrize("template", ["/v1/images", "/v1/images/", "/v1/{id}", "/v1/{id}/"])
@pytest.mark.parametrize(
    "path",
    [
        "/v1/images",
        "/v1/images/",
        "/v1/images//",
        "//v1/images",
        "/v1//images",
        "///v1///images///",
        "/v1/images\n",
        "/v1/images/\n",
        "//v1/images//\n",
    ],
)
def test_slashes_and_a_last_newline_are_no_way_round(template: str, path: str) -> None:
    route = f"GET {template}"

    assert matcher(route).match("GET", path) == route


@pytest.mark.fault("E10")
@pytest.mark.parametrize("template", ["/a/{x:path}/b", "/a/{x:path}/b/"])
def test_trailing_slash_after_an_empty_rest_is_no_way_round(template: str) -> None:
    assert matcher(f"GET {template}").match("GET", "/a//b/") == f"GET {template}"


@pytest.mark.fault("E10")
def test_doubled_slash_before_an_empty_rest_is_no_way_round() -> None:
    assert matcher("GET /v1/x/{rest:path}").match("GET", "/v1//x/") == "GET /v1/x/{rest:path}"


# --- Which of several wins


def test_literal_beats_mixed_beats_parameter_beats_rest() -> None:
    routes = ["GET /v1/{rest:path}", "GET /v1/{id}", "GET /v1/{id}.json", "GET /v1/a.json"]
    table = matcher(*routes)

    assert table.match("GET", "/v1/a.json") == "GET /v1/a.json"
    assert table.match("GET", "/v1/b.json") == "GET /v1/{id}.json"
    assert table.match("GET", "/v1/b") == "GET /v1/{id}"
    assert table.match("GET", "/v1/b/c") == "GET /v1/{rest:path}"


def test_earlier_segments_decide_first() -> None:
    table = matcher("GET /{a}/x/y", "GET /v1/{b}/{c}")

    assert table.match("GET", "/v1/x/y") == "GET /v1/{b}/{c}"


def test_dead_end_goes_back_to_the_less_specific() -> None:
    table = matcher("GET /v1/{id}/x", "GET /{a}/{b}/y", "GET /v1/{id}{n}/z", "GET /{rest:path}")

    assert table.match("GET", "/v1/7/x") == "GET /v1/{id}/x"
    assert table.match("GET", "/v1/7/y") == "GET /{a}/{b}/y"
    assert table.match("GET", "/v1/77/z") == "GET /v1/{id}{n}/z"
    assert table.match("GET", "/v1/7/w") == "GET /{rest:path}"


def test_template_of_another_method_hides_nothing() -> None:
    table = matcher("POST /v1/images", "PUT /v1/{id}", "DELETE /v1/{rest:path}", "* /{rest:path}")

    assert table.match("POST", "/v1/images") == "POST /v1/images"
    assert table.match("PUT", "/v1/images") == "PUT /v1/{id}"
    assert table.match("DELETE", "/v1/images") == "DELETE /v1/{rest:path}"
    assert table.match("PATCH", "/v1/images") == "* /{rest:path}"


def test_methods_of_one_shape_are_told_apart() -> None:
    table = matcher("GET /v1/{id}", "POST|PUT /v1/{name}")

    assert table.match("HEAD", "/v1/x") == "GET /v1/{id}"
    assert table.match("PUT", "/v1/x") == "POST|PUT /v1/{name}"


def test_longer_text_before_the_rest_wins() -> None:
    table = matcher("GET /a/{r:path}", "GET /a/x{r:path}", "GET /a/xy{r:path}", "GET /a/b/{r:path}")

    assert table.match("GET", "/a/b/c") == "GET /a/b/{r:path}"
    assert table.match("GET", "/a/xyz") == "GET /a/xy{r:path}"
    assert table.match("GET", "/a/xz/y") == "GET /a/x{r:path}"
    assert table.match("GET", "/a/z") == "GET /a/{r:path}"


@pytest.mark.parametrize(
    ("winner", "loser", "path"),
    [
        ("GET /a/x{r:path}", "GET /a/{id}", "/a/xy"),
        ("GET /a/x{r:path}", "GET /a/{r:path}yz", "/a/xyz"),
        ("GET /a/{id}.js", "GET /a/{r:path}.js", "/a/1.js"),
        ("GET /a/{id}/b", "GET /a/{r:path}/b", "/a/1/b"),
        ("GET /a/{id}{r:path}", "GET /a/{r:path}", "/a/1"),
        ("GET /a/{id}.js", "GET /a/{id}", "/a/1.js\n"),
        ("GET /a/{r:path}.js", "GET /a/{r:path}", "/a/1.js\n"),
        ("GET /a/{id}.tar.gz", "GET /a/{id}.gz", "/a/1.tar.gz"),
    ],
)
def test_more_of_the_path_written_out_wins(winner: str, loser: str, path: str) -> None:
    assert matcher(winner, loser).match("GET", path) == winner
    assert matcher(loser, winner).match("GET", path) == winner


def test_more_text_after_the_rest_wins() -> None:
    table = matcher("GET /a/{r:path}", "GET /a/{r:path}/b", "GET /a/{r:path}/{id}/b")

    assert table.match("GET", "/a/1/2/b") == "GET /a/{r:path}/{id}/b"
    assert table.match("GET", "/a//b") == "GET /a/{r:path}/b"
    assert table.match("GET", "/a/1") == "GET /a/{r:path}"


def test_path_as_given_comes_before_its_other_spellings() -> None:
    table = matcher("GET /files", "GET /files/{rest:path}", "GET /v1/x/", "GET /v1/{rest:path}")

    assert table.match("GET", "/files/") == "GET /files/{rest:path}"
    assert table.match("GET", "/files") == "GET /files"
    assert table.match("GET", "//files") == "GET /files"
    assert table.match("GET", "/v1/x/") == "GET /v1/x/"


@pytest.mark.fault("E10")
def test_last_newline_does_not_reach_for_another_template() -> None:
    table = matcher("GET /v1/images", "GET /v1/{id}", "GET /v1/{id}/x", "GET /v1/{rest:path}")

    assert table.match("GET", "/v1/images\n") == "GET /v1/images"
    assert table.match("GET", "/v1/7/x\n") == "GET /v1/{id}/x"
    assert table.match("GET", "/v1/\n") == "GET /v1/{id}"


# --- Against the router itself

SEGMENTS = [
    *["a", "b", "ab", "é", ".", "..", "a.b", "%2F"],
    *["{}", "{:int}", "{:float}", "{:path}", "{:path}", "{:str}"],
    *["{}.b", "a{}", "a{}b", "{}a{}", "{}b{}", "{}{}", "{}{:int}"],
    *["{:path}.b", "a{:path}", "a{:path}b{:path}a", "{:path}{}", "{}{:path}", "{:path}b{}b{:path}"],
]
PIECES = ["a", "b", "ab", "é", "1", "12", "a.b", ".b", ".", "..", "%2F", "\n", "A", "/", "/", "//"]


def with_names(template: str) -> str:
    names = count()
    return re.sub(r"\{", lambda _: f"{{p{next(names)}", template)


templates = st.builds(
    lambda segments, slash: with_names(
        "/" + "/".join(segments) + ("/" if segments else "") * slash
    ),
    st.lists(st.sampled_from(SEGMENTS), max_size=4),
    st.booleans(),
)
junk = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@st.composite
def paths_for(draw: st.DrawFn, template: str) -> str:
    """A path made from `template`, then perhaps spelled in an odd way."""
    path = re.sub(r"\{\w+(:\w+)?\}", lambda _: draw(junk), template)
    path = re.sub("/", lambda _: draw(st.sampled_from(["/", "/", "/", "//"])), path)
    return path + draw(st.sampled_from(["", "", "/", "//", "\n", "/\n", "\n\n", "b"]))


@st.composite
def requests(draw: st.DrawFn, size: int) -> tuple[list[tuple[str, str]], str, str]:
    """(method, template) pairs, a method and a path that has something to do with one of them."""
    methods = st.sampled_from(["GET", "POST", "*"])
    entries = draw(st.lists(st.tuples(methods, templates), min_size=1, max_size=size))
    made = paths_for(draw(st.sampled_from(entries))[1])
    path = draw(made | made | junk | junk.map("/".__add__) | st.text("/ab\n.é", max_size=9))
    return entries, draw(st.sampled_from(["GET", "HEAD", "POST", "BREW"])), path


async def endpoint(request: Request) -> Response:
    return Response()


def router_accepts(method: str, template: str, request_method: str, path: str) -> bool:
    route = StarletteRoute(template, endpoint, methods=None if method == "*" else [method])
    if method == "*":
        route.methods = None  # a class as endpoint would have it so
    scope = {"type": "http", "method": request_method, "path": path, "root_path": ""}
    return route.matches(scope)[0] is Match.FULL


def covers(template: str, path: str) -> bool:
    """Say the rules once more, with regular expressions and every spelling."""
    pattern = re.sub(r"\{\w+(:\w+)?\}", r"{\1}", template)
    parts = re.split(r"\{(.*?)\}", pattern)
    expression = "".join(
        re.escape(part) if index % 2 == 0 else ".*" if part == ":path" else "[^/]+"
        for index, part in enumerate(parts)
    )
    bare = expression.rstrip("/") or "/"
    path = path or "/"
    if not path.startswith("/"):
        return covers(template, f"/{path}") or covers(template, quarts_path(path))
    single = re.sub("/+", "/", path)
    spellings = [path, single]
    spellings += [spelling.removesuffix("\n").rstrip("/") or "/" for spelling in (path, single)]
    mounted = (text for one in dict.fromkeys(spellings) for text in begun_anew(one))
    return any(
        re.match(f"(?:{form})$", spelling, re.DOTALL)
        for spelling in chain(spellings, mounted if path.endswith("\n") else ())
        for form in (expression, bare)
    )


def quarts_path(path: str) -> str:
    try:
        return "/" + urlparse(path).path.lstrip("/")
    except ValueError:
        return "/ "  # what it answers 500, and no template covers


def begun_anew(path: str) -> Iterator[str]:
    """Yield what up to three mounts may make of a path, each giving its child the whole of it."""
    cuts = [at for at, letter in enumerate(path) if letter == "/" and at > 0][:9]
    for mounts in (1, 2, 3):
        for some in product(cuts, repeat=mounts):
            yield "".join(path[:at] for at in some) + path


@pytest.mark.fault("E10")
@given(requests(size=1))
@example(([("GET", "/v1/images")], "GET", "/v1/images\n"))
@example(([("GET", "/a/{x:path}/b/")], "GET", "/a//b/"))
def test_whatever_the_router_accepts_for_a_template_is_metered(
    case: tuple[list[tuple[str, str]], str, str],
) -> None:
    [(method, template)], request_method, path = case
    found = matcher(f"{method} {template}").match(request_method, path)

    if router_accepts(method, template, request_method, path):
        assert found is not None


@pytest.mark.fault("E10")
@given(requests(size=6))
def test_whatever_the_router_accepts_for_any_template_is_metered_as_one_that_covers_it(
    case: tuple[list[tuple[str, str]], str, str],
) -> None:
    entries, request_method, path = case
    found = matcher(*(f"{method} {template}" for method, template in entries)).match(
        request_method, path
    )

    if any(router_accepts(*entry, request_method, path) for entry in entries):
        assert found is not None
    if found is not None:
        method, _, template = found.partition(" ")
        assert covers(template, path)
        assert method in ("*", request_method, "GET" if request_method == "HEAD" else "*")


@given(requests(size=1))
def test_template_covers_exactly_what_its_expression_and_spellings_say(
    case: tuple[list[tuple[str, str]], str, str],
) -> None:
    [(_, template)], _, path = case
    found = matcher(f"* {template}").match("GET", path)

    # Spellings stop at the template's depth; there are fewer of those than the oracle tries.
    if found is not None or not path.endswith("\n"):
        assert (found is not None) == covers(template, path)


@given(requests(size=6), st.randoms(use_true_random=False))
@example(([("GET", "/{x}a{y}"), ("GET", "/{x}b{y}")], "GET", "/1a1b1"), Random(0))
@example(([("GET", "/{x}a{y}"), ("GET", "/{x}b{y}")], "GET", "/1a1b1"), Random(1))
def test_order_of_templates_does_not_matter(
    case: tuple[list[tuple[str, str]], str, str], random: Random
) -> None:
    entries, request_method, path = case
    routes = [Route.parse(f"{method} {template}") for method, template in entries]
    clashing = {right for _, right in clashes(routes)}
    kept = [route for index, route in enumerate(routes) if index not in clashing]
    shuffled = random.sample(kept, len(kept))

    left = Matcher((route, route.shape) for route in kept).match(request_method, path)
    right = Matcher((route, route.shape) for route in shuffled).match(request_method, path)

    assert left == right


@given(templates, st.booleans(), junk.map("/".__add__))
@example("/a/{p:path}/b/", False, "/a//b/")
def test_equal_shapes_cover_the_same_paths(template: str, renamed: bool, path: str) -> None:
    route = Route(None, template)
    other = Route(None, template.rstrip("/").replace("{p", "{q" if renamed else "{p") or "/")

    assert route.shape == other.shape
    assert Matcher([(route, 1)]).match("GET", path) == Matcher([(other, 1)]).match("GET", path)


async def ask(routes: list[BaseRoute], path: str) -> int:
    """Return the status with which a real router answers a GET of `path`."""
    scope: Scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": []}
    statuses: list[int] = []

    async def send(message: Message) -> None:
        statuses.append(message.get("status", 0))

    async def receive() -> Message:
        return {"type": "http.request"}

    await Router(routes, redirect_slashes=False)(scope, receive, send)
    return statuses[0]


@pytest.mark.fault("E10")
@pytest.mark.parametrize("path", ["/x/images", "/x/t/images", "/x/images/", "/x//images"])
@pytest.mark.parametrize("end", ["", "\n"])
@pytest.mark.parametrize(
    ("mount", "template"),
    [
        ("/x", "/{tenant}/images"),
        ("/x", "/{tenant}/images/"),
        ("/x", "/{tenant}/images/{rest:path}"),
        ("/{x}", "/images"),
        ("", "/x/{id}"),
    ],
)
async def test_whatever_a_mounted_route_answers_is_metered(
    mount: str, template: str, path: str, end: str
) -> None:
    status = await ask([Mount(mount, routes=[StarletteRoute(template, endpoint)])], path + end)
    found = matcher(f"GET {mount}{template}").match("GET", path + end)

    assert status != 200 or found is not None


async def test_a_mount_hands_its_child_too_much_before_a_last_newline() -> None:
    mount = Mount("/x", routes=[StarletteRoute("/{tenant}/images", endpoint)])

    # Where a release of the router no longer does, the spellings for it can go.
    assert await ask([mount], "/x/images\n") == 200


# --- What a search costs


def steps(action: Callable[[], object]) -> int:
    """Count the calls that `action` makes, of Python and C functions alike."""
    calls = 0

    def on_event(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.parametrize("path", ["/v1/path3", "/v1/images/7", "/v1/none", "/v1/none/"])
def test_5000_static_routes_cost_the_steps_of_5(path: str) -> None:
    few, many = (
        matcher(*(f"GET /v1/path{number}" for number in range(size)), "GET /v1/images/{id}")
        for size in (5, 5000)
    )

    assert few.match("GET", path) == many.match("GET", path)
    assert steps(lambda: few.match("GET", path)) == steps(lambda: many.match("GET", path))


def test_5000_templates_that_differ_in_text_cost_the_steps_of_5() -> None:
    few, many = (
        matcher(*(f"GET /v1/{{id}}/action{number}" for number in range(size))) for size in (5, 5000)
    )

    assert steps(lambda: few.match("GET", "/v1/7/action4")) == steps(
        lambda: many.match("GET", "/v1/7/action4")
    )


HOSTILE: list[Callable[[int], str]] = [
    lambda size: "/" * size,
    lambda size: "/a" + "/b" * size + "/d",
    lambda size: "/a" + "/b" * size + "/d\n",
    lambda size: "/a/" + "b" * size,
    lambda size: "/a/" + "-" * size + "/",
    lambda size: "/a/" + "-z" * size + "\n",
    lambda size: "/a/" + "/-" * size + "/c",
    lambda size: "/a/b/" + "-b-" * size + "c",
    lambda size: "\n" * size,
    lambda size: "/" + "\n/" * size + "\n",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_paths_cost_in_proportion_to_their_length(hostile: Callable[[int], str]) -> None:
    table = matcher(
        "GET /a/{x:path}/b/{y:path}/c",
        "GET /a/{x:path}/b/{i}/b/{y:path}/b/{z:path}/c",
        "GET /a/{x:path}-{i}z{y:path}-{j}/q{z:path}c",
        "GET /a/{i}-{j}-{k}-{m}.x",
        "GET /{x:path}b{y:path}b{z:path}b{w:path}e",
        "GET /{i}/{j}/{k}/{m}/q",
    )
    short = steps(lambda: table.match("GET", hostile(1000)))
    long = steps(lambda: table.match("GET", hostile(2000)))

    assert long <= 2 * short
    assert table.match("GET", hostile(100_000)) is None


def test_a_path_of_a_million_slashes_is_answered() -> None:
    table = matcher("GET /a/{x:path}/b/{y:path}/c", "GET /{x}/{y}/{z}")

    assert table.match("GET", "/" * 1_000_000) is None
    assert table.match("GET", "/a" + "/b" * 500_000 + "/c") == "GET /a/{x:path}/b/{y:path}/c"


def test_templates_deeper_than_the_recursion_limit_are_walked() -> None:
    deep = "GET " + "".join(f"/{{a{number}}}/b" for number in range(2000))

    assert matcher(deep).match("GET", "/1/b" * 2000) == deep


@pytest.mark.fault("E10")
async def test_path_outside_the_root_path_matches_what_a_mount_would_run() -> None:
    ran: list[str] = []

    async def endpoint(request: Request) -> Response:
        ran.append(request.path_params["model"])
        return Response()

    async def receive() -> Message:
        return {}

    async def send(message: Message) -> None: ...

    router = Router([Mount("/v1", routes=[StarletteRoute("/{model}/generate", endpoint)])])
    matcher = Matcher([(Route.parse("GET /v1/{model}/generate"), "generate")])
    scope = {"type": "http", "method": "GET", "path": "/v1/generate", "root_path": "/api"}

    await router({**scope, "headers": []}, receive, send)

    assert ran == ["v1"]
    assert matcher.match("GET", "/v1/generate", outside_root=True) == "generate"
    assert matcher.match("GET", "/v1/generate") is None


@pytest.mark.fault("E1", "E10")
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize(("root", "end"), [("", "\n"), ("/api", "")])
async def test_mounts_within_mounts_are_no_way_round(levels: int, root: str, end: str) -> None:
    ran: list[str] = []

    async def endpoint(request: Request) -> Response:
        ran.append(request.url.path)
        return Response()

    async def receive() -> Message:
        return {}

    async def send(message: Message) -> None: ...

    routes: list[BaseRoute] = [StarletteRoute("/{id}/images", endpoint)]
    for level in range(levels):
        routes = [Mount("/v1" if level == levels - 1 else f"/{{m{level}}}", routes=routes)]
    template = "/v1" + "".join(f"/{{m{level}}}" for level in range(levels - 1)) + "/{id}/images"
    path = f"/v1/images{end}"
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": []}

    await Router(routes)(scope, receive, send)

    assert ran
    assert matcher(f"GET {template}").match("GET", path, outside_root=bool(root))
    assert matcher(f"GET {template}").match("GET", "/v1/images") is None
