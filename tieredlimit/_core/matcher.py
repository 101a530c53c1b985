"""Finding the route that covers a request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar
from urllib.parse import urlparse

from tieredlimit._core.glob import Glob
from tieredlimit._core.routes import PART, REST, Route, covered_methods

T = TypeVar("T")

_SLASHES = re.compile(r"/{2,}")
_MOST_CUTS = 8


class Matcher(Generic[T]):
    """Find what a request's route stands for. Of entries that clash, any may win.

    Costs one dict lookup for a path without parameters, however many there are, and otherwise a
    walk whose length depends on the templates, not on the path. The longest paths that servers let
    through cost time in proportion to their length.
    """

    def __init__(self, entries: Iterable[tuple[Route, T]]) -> None:
        routes = list(entries)
        self._written = _Index((route.methods, route.pattern, value) for route, value in routes)
        self._bare = self._written
        if any(route.pattern != route.shape for route, _ in routes):
            self._bare = _Index((route.methods, route.shape, value) for route, value in routes)

    def match(self, method: str, path: str, *, outside_root: bool = False) -> T | None:
        """Return the value of the most specific route that covers the request, or None.

        `path` is decoded and below the root path, as the router sees it. Segment by segment, text
        beats text with a parameter, which beats `{id}`, which beats `{rest:path}`; a template of
        other methods hides nothing. The path as given is tried first, then without doubled and
        trailing slashes: `/files/` is `/files/{rest:path}` before it is `/files`. `outside_root`
        says that there is a root path which the request's path does not begin with.
        """
        # Not every router compares methods exactly: endpoints that are classes may fold their case.
        method = method.upper()
        path = path or "/"
        if path[0] != "/":
            found = (self.match(method, one, outside_root=outside_root) for one in _rooted(path))
            return next((value for value in found if value is not None), None)
        static = self._written.static.get(path)
        if static is not None and (hit := static.get(method) or static.get(None)) is not None:
            return hit[0]
        hit = self._written.find(method, path)
        if hit is None and self._bare is not self._written:
            hit = self._bare.find(method, path)
        if hit is None and (outside_root or "//" in path or path.endswith(("/", "\n"))):
            spellings = _spellings(path)
            hits = (self._bare.find(method, spelling) for spelling in spellings)
            hit = next(filter(None, hits), None)
            if hit is None and (outside_root or path.endswith("\n")):
                mounted = (self._bare.find_mounted(method, one) for one in (path, *spellings))
                hit = next(filter(None, mounted), None)
        return hit[0] if hit else None


def _rooted(path: str) -> Iterator[str]:
    """Yield what routers make of a path without a first slash: Litestar and Quart serve those.

    Some servers pass on `POST v1/images` and `POST http://host/v1/images` as they came.
    """
    yield f"/{path}"
    try:
        # As Quart does, which so cuts off `;params`, and what was an encoded `?` or `#`.
        yield f"/{urlparse(path).path.lstrip('/')}"
    except ValueError:
        return


def _spellings(path: str) -> list[str]:
    """Return other spellings of `path` that some router takes for the same, nearest first."""
    single = _SLASHES.sub("/", path)
    bare, single_bare = (text.removesuffix("\n").rstrip("/") or "/" for text in (path, single))
    return list(dict.fromkeys((single, bare, single_bare)))


# What a pattern means to each method; None is every other. Values are boxed: they may be false.
_Methods: TypeAlias = dict[str | None, tuple[T]]


class _Index(Generic[T]):
    """Patterns by specificity in a trie; those without parameters in a dict as well."""

    def __init__(self, entries: Iterable[tuple[frozenset[str] | None, str, T]]) -> None:
        self.static: dict[str, _Methods[T]] = {}
        self._root: _Node[T] = _Node()
        # Branches keep the order in which they are made, and least specific is what they want.
        ranked = sorted(entries, key=lambda entry: _specificity(entry[1]), reverse=True)
        for methods, pattern, value in ranked:
            found = self._root.insert(_units(pattern)).methods
            if "{" not in pattern:
                self.static[pattern] = found
            for method in [None] if methods is None else covered_methods(methods):
                found[method] = (value,)

    def find(self, method: str, path: str) -> tuple[T] | None:
        """Return the boxed value of the most specific pattern, or None."""
        # Routers end their regular expression with `$`, which also matches before a last newline.
        static = self.static.get(path) or self.static.get(path.removesuffix("\n"))
        if static and (hit := static.get(method) or static.get(None)):
            return hit
        # A stack of our own: deep templates must not meet the recursion limit. Patterns form a
        # tree, so however this backtracks, it visits no node twice.
        pending = [(self._root, 1)]
        while pending:
            node, at = pending.pop()
            if at <= len(path):
                pending += node.follow(path, at)
            elif hit := node.methods.get(method) or node.methods.get(None):
                return hit
        return None

    def find_mounted(self, method: str, path: str) -> tuple[T] | None:
        """Return what `find` would, were what is below each mount given the whole path again.

        Starlette's Mount takes one character too many off a path with a last newline, and nothing
        off a path outside the root path. Its child then matches the whole of it: `/m/x` and a
        newline run the child's `/{id}/x`, which we know with its mount; and so on in that child.
        Therefore the path may begin anew at each slash of a pattern.
        """
        pending = [(self._root, 1)]
        seen: set[tuple[int, int]] = set()
        while pending:
            node, at = pending.pop()
            if (id(node), at) in seen:
                continue
            seen.add((id(node), at))
            if at <= len(path):
                if at > 1:
                    pending.append((node, 1))
                pending += node.follow(path, at, mounted=True)
            elif hit := node.methods.get(method) or node.methods.get(None):
                return hit
        return None


@dataclass(slots=True)
class _Node(Generic[T]):
    """What the segments up to here lead to: to `methods` if the path ends here."""

    methods: _Methods[T] = field(default_factory=dict)
    texts: dict[str, _Node[T]] = field(default_factory=dict)
    branches: dict[str, tuple[Glob, _Node[T]]] = field(default_factory=dict)

    def insert(self, units: Iterable[str]) -> _Node[T]:
        """Return the node of the pattern made of `units`, new or not."""
        node = self
        for unit in units:
            if "{" in unit:
                _, node = node.branches.setdefault(unit, (Glob(unit), _Node()))
            else:
                node = node.texts.setdefault(unit, _Node())
        return node

    def follow(self, path: str, at: int, *, mounted: bool = False) -> list[tuple[_Node[T], int]]:
        """Return where `path` leads from the segment at `at`, and on to where.

        The least specific comes first. Beyond the last segment is one more than the path's length.
        `mounted` is as for `find_mounted`.
        """
        led: list[tuple[_Node[T], int]] = []
        end = path.find("/", at)
        if end < 0:
            end = len(path)
        segment = path[at:end]
        text = segment.removesuffix("\n") if end == len(path) else segment
        for glob, node in self.branches.values():
            if glob.crosses_segments:
                rests = _rests(path, at) if mounted else (path[at:],)
                if any(glob.covers(one) or glob.covers(one.removesuffix("\n")) for one in rests):
                    led.append((node, len(path) + 1))
            elif glob.covers(segment) or (text != segment and glob.covers(text)):
                led.append((node, end + 1))
        if text in self.texts:
            led.append((self.texts[text], end + 1))
        return led


def _rests(path: str, at: int) -> Iterator[str]:
    """Yield what is left of a path that may begin anew, twice at most and at its first slashes."""
    yield path[at:]
    cuts: list[int] = []
    slash = path.find("/", 1)
    while slash >= 0 and len(cuts) < _MOST_CUTS:
        cuts.append(slash)
        slash = path.find("/", slash + 1)
    firsts = [path[at:cut] for cut in cuts if cut >= at]
    yield from (first + path for first in firsts)
    yield from (first + path[:cut] + path for first in firsts for cut in cuts)


def _units(pattern: str) -> list[str]:
    """Split a pattern into segments; all from the first that has a `{*}` on are the last unit."""
    segments = pattern[1:].split("/")
    for index, segment in enumerate(segments):
        if REST in segment:
            return [*segments[:index], "/".join(segments[index:])]
    return segments


def _specificity(pattern: str) -> tuple[list[tuple[int, ...]], str]:
    """Return a key by which more specific patterns sort first, and equal ones always alike."""
    return [_unit_specificity(unit) for unit in _units(pattern)], pattern


def _unit_specificity(unit: str) -> tuple[int, ...]:
    if "{" not in unit:
        return (0,)
    only_parameters = not _text(unit.partition("/")[0])
    prefix = unit.index("{")
    kind = 2 if only_parameters else 1
    return (kind, REST in unit, -prefix, -len(_text(unit)), -unit.count(PART))


def _text(unit: str) -> str:
    return unit.replace(REST, "").replace(PART, "")
