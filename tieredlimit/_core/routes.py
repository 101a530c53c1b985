"""Which requests a policy meters: route templates, and the table that finds one for a request.

A template covers every path for which Starlette's router would run a route of the same path, and
a little more. More costs somebody a token for a 404; less would be a way round a quota. So a
parameter matches whatever its convertor, and the spellings that routers forgive match as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

T = TypeVar("T")

_CONVERTORS = ("float", "int", "path", "str", "uuid")
_METHOD = re.compile(r"[A-Z][A-Z0-9_-]*")
_PARAMETER = re.compile(r"\{([^{}]*)\}")
_DECLARATION = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?")
_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_SLASHES = re.compile(r"/{2,}")
_RESTS = re.compile(r"(?:\{\*\}){2,}")

# In patterns, `{}` stands for a parameter within a segment and `{*}` for one of any length.
_PART, _REST = "{}", "{*}"


@dataclass(frozen=True, slots=True)
class Route:
    """Name the requests of one method list and one path template.

    Attributes:
        methods: Upper-case methods as written; GET also stands for HEAD. None is every method,
            those not yet invented included.
        path: The template as written, in Starlette's notation. `parse` checks it; the constructor
            does not.
    """

    methods: frozenset[str] | None
    path: str

    @classmethod
    def parse(cls, text: str) -> Route:
        """Read a route such as `POST /v1/images/{id}`, `POST|PUT /x` or `* /x/{rest:path}`.

        Raises:
            ValueError: It is none; the message names the value and what would be right.
        """
        methods, space, path = text.partition(" ")
        if not space:
            raise ValueError(
                f"{text!r:.80} is no route: write methods, one space and a path, such as "
                "'POST /v1/images', 'POST|PUT /v1/images' or '* /v1/images'"
            )
        _check_path(path)
        return cls(_parse_methods(methods), path)

    def spell(self) -> str:
        """Return the route as a policy writes it, with its methods in alphabetical order."""
        methods = "*" if self.methods is None else "|".join(sorted(self.methods))
        return f"{methods} {self.path}"

    @property
    def pattern(self) -> str:
        """Return the path with nameless parameters, its trailing slash as written."""
        return _RESTS.sub(_REST, _PARAMETER.sub(_nameless, self.path))

    @property
    def shape(self) -> str:
        """Return a key that is equal for two routes only if they cover the same paths."""
        return self.pattern.rstrip("/") or "/"


class Matcher(Generic[T]):
    """Find what a request's route stands for. Of entries that clash, any may win.

    Costs one dict lookup for a path without parameters, however many there are, and otherwise a
    walk whose length depends on the templates, not on the path. The longest paths that servers let
    through cost time in proportion to their length.
    """

    def __init__(self, entries: Iterable[tuple[Route, T]]) -> None:
        routes = list(entries)
        self._written = _Index((route.methods, route.pattern, value) for route, value in routes)
        self._depth = max((route.path.count("/") for route, _ in routes), default=0)
        self._bare = self._written
        if any(route.pattern != route.shape for route, _ in routes):
            self._bare = _Index((route.methods, route.shape, value) for route, value in routes)

    def match(self, method: str, path: str) -> T | None:
        """Return the value of the most specific route that covers the request, or None.

        `path` is decoded and below the root path, as the router sees it. Segment by segment, text
        beats text with a parameter, which beats `{id}`, which beats `{rest:path}`; a template of
        other methods hides nothing. The path as given is tried first, then without doubled and
        trailing slashes: `/files/` is `/files/{rest:path}` before it is `/files`.
        """
        # Not every router compares methods exactly: Starlette's class endpoints once did not.
        method = method.upper()
        path = path or "/"
        if path[0] != "/":
            return None
        hit = self._written.find(method, path)
        if hit is None and self._bare is not self._written:
            hit = self._bare.find(method, path)
        if hit is None and ("//" in path or path.endswith(("/", "\n"))):
            spellings = _spellings(path, self._depth)
            hits = (self._bare.find(method, spelling) for spelling in spellings)
            hit = next(filter(None, hits), None)
        return hit[0] if hit else None


def clashes(routes: Sequence[Route]) -> list[tuple[int, int]]:
    """Return the index pairs of routes that cover the same paths and share a method."""
    by_shape: defaultdict[str, list[int]] = defaultdict(list)
    for index, route in enumerate(routes):
        by_shape[route.shape].append(index)
    return sorted(
        (left, right)
        for indices in by_shape.values()
        for left, right in combinations(indices, 2)
        if _overlap(routes[left].methods, routes[right].methods)
    )


def _overlap(left: frozenset[str] | None, right: frozenset[str] | None) -> bool:
    if left is None or right is None:
        return True
    return not _covered(left).isdisjoint(_covered(right))


def _covered(methods: frozenset[str]) -> frozenset[str]:
    return methods | {"HEAD"} if "GET" in methods else methods


def _nameless(parameter: re.Match[str]) -> str:
    return _REST if parameter[1].endswith(":path") else _PART


def _parse_methods(text: str) -> frozenset[str] | None:
    if text == "*":
        return None
    methods = text.split("|")
    for method in methods:
        if not _METHOD.fullmatch(method):
            raise ValueError(
                f"{method!r:.80} is no method: write upper-case names joined by '|', "
                "such as 'GET|POST', or '*' alone for every method"
            )
    return frozenset(methods)


def _check_path(path: str) -> None:
    if not path.startswith("/"):
        raise ValueError(f"path {path!r:.80} must start with '/', one space after the methods")
    if (bad := _UNPRINTABLE.search(path)) is not None:
        raise ValueError(
            f"path {path!r:.80} must not contain {bad[0]!r}: "
            "write a parameter such as {name} where requests have white space"
        )
    if "?" in path or "#" in path:
        raise ValueError(f"path {path!r:.80} must have no '?' or '#': queries are not matched")
    if "//" in path:
        raise ValueError(
            f"path {path!r:.80} must have single slashes: requests that double them match as well"
        )
    names: set[str] = set()
    texts_and_parameters = _PARAMETER.split(path)
    for parameter in texts_and_parameters[1::2]:
        declaration = _DECLARATION.fullmatch(parameter)
        if declaration is None:
            raise ValueError(
                f"path {path!r:.80} has {{{parameter}}}: write {{name}} or {{name:path}}, "
                "where a name is letters, digits and '_', and no digit first"
            )
        name, convertor = declaration.groups("str")
        if convertor not in _CONVERTORS:
            raise ValueError(
                f"path {path!r:.80} has the unknown convertor {convertor!r}: "
                f"write one of {', '.join(_CONVERTORS)}, or none"
            )
        if name in names:
            raise ValueError(f"path {path!r:.80} has {name!r} twice: give each parameter its name")
        names.add(name)
    if any("{" in text or "}" in text for text in texts_and_parameters[::2]):
        raise ValueError(f"path {path!r:.80} has a stray brace: write parameters as {{name}}")


def _spellings(path: str, depth: int) -> Iterator[str]:
    """Yield other spellings of `path` that some router takes for the same, nearest first."""
    single = _SLASHES.sub("/", path)
    bare = path.removesuffix("\n").rstrip("/")
    yield single
    yield bare or "/"
    yield single.removesuffix("\n").rstrip("/") or "/"
    if path.endswith("\n"):
        # Starlette's Mount takes one character too many off such a path, its child then matches
        # the whole of it: `/mount/x\n` runs the child's `/{id}/x`, which we know with its mount.
        slash = 0
        for _ in range(depth):
            slash = path.find("/", slash + 1)
            if slash < 0:
                break
            yield path[:slash] + path
            yield path[:slash] + bare


# What a pattern means to each method; None is every other. Values are boxed: they may be false.
_Methods: TypeAlias = dict[str | None, tuple[T]]


class _Index(Generic[T]):
    """Patterns by specificity: those without parameters in a dict, the rest in a trie."""

    def __init__(self, entries: Iterable[tuple[frozenset[str] | None, str, T]]) -> None:
        self._static: dict[str, _Methods[T]] = {}
        self._root: _Node[T] = _Node()
        # Branches keep the order in which they are made, and least specific is what they want.
        ranked = sorted(entries, key=lambda entry: _specificity(entry[1]), reverse=True)
        for methods, pattern, value in ranked:
            if "{" in pattern:
                found = self._root.insert(_units(pattern)).methods
            else:
                found = self._static.setdefault(pattern, {})
            for method in [None] if methods is None else _covered(methods):
                found[method] = (value,)

    def find(self, method: str, path: str) -> tuple[T] | None:
        """Return the boxed value of the most specific pattern, or None."""
        # Routers end their regular expression with `$`, which also matches before a last newline.
        static = self._static.get(path) or self._static.get(path.removesuffix("\n"))
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


@dataclass(slots=True)
class _Node(Generic[T]):
    """What the segments up to here lead to: to `methods` if the path ends here."""

    methods: _Methods[T] = field(default_factory=dict)
    texts: dict[str, _Node[T]] = field(default_factory=dict)
    branches: dict[str, tuple[_Glob, _Node[T]]] = field(default_factory=dict)

    def insert(self, units: Iterable[str]) -> _Node[T]:
        """Return the node of the pattern made of `units`, new or not."""
        node = self
        for unit in units:
            if "{" in unit:
                _, node = node.branches.setdefault(unit, (_Glob(unit), _Node()))
            else:
                node = node.texts.setdefault(unit, _Node())
        return node

    def follow(self, path: str, at: int) -> Iterator[tuple[_Node[T], int]]:
        """Yield where `path` leads from the segment at `at`, and on to where; least specific first.

        Beyond the last segment is one more than the path's length.
        """
        end = path.find("/", at)
        if end < 0:
            end = len(path)
        segment = path[at:end]
        text = segment.removesuffix("\n") if end == len(path) else segment
        for glob, node in self.branches.values():
            if glob.crosses_segments:
                if glob.covers(path[at:]) or glob.covers(path[at:].removesuffix("\n")):
                    yield node, len(path) + 1
            elif glob.covers(segment) or (text != segment and glob.covers(text)):
                yield node, end + 1
        if text in self.texts:
            yield self.texts[text], end + 1


class _Glob:
    """Text with `{}` for one character or more except slashes, and `{*}` for any.

    Without `{*}` it is asked about single segments. It takes the earliest match of each text, which
    is enough: a later one leaves less to what follows. So it never backtracks, unlike the regular
    expression for `/{x:path}/b/{y:path}/c`, which takes quadratic time, and worse for more.
    """

    __slots__ = ("_end", "_gap", "_middle", "_start", "crosses_segments")

    def __init__(self, unit: str) -> None:
        # Between the texts of a chunk is a `{}`, between chunks a `{*}`.
        chunks = [chunk.split(_PART) for chunk in unit.split(_REST)]
        self.crosses_segments = len(chunks) > 1
        if not self.crosses_segments:
            chunks = [chunks[0][:-1], chunks[0][-1:]]
        self._gap = 0 if self.crosses_segments else 1
        self._start, *self._middle, end = chunks
        # The end is looked for from the end: everything backwards.
        self._end = [text[::-1] for text in reversed(end)]

    def covers(self, text: str) -> bool:
        """Return whether the whole of `text` matches."""
        at = _skip_start(self._start, text)
        left = 0 if self._end == [""] else _skip_start(self._end, text[::-1])
        if at < 0 or left < 0:
            return False
        stop = len(text) - left
        for chunk in self._middle:
            at = _skip_first(chunk, text, at)
            if at < 0:
                return False
        return at + self._gap <= stop


def _skip_start(chunk: list[str], text: str) -> int:
    """Return where the shortest match of `chunk` at the start of `text` ends, or -1."""
    first, *rest = chunk
    return _skip(rest, text, len(first)) if text.startswith(first) else -1


def _skip_first(chunk: list[str], text: str, at: int) -> int:
    """Return where the match of `chunk` that ends first ends, from `at` on, or -1."""
    first, *rest = chunk
    start = text.find(first, at)
    while start >= 0:
        end = _skip(rest, text, start + len(first))
        if end >= 0:
            return end
        # What failed here fails from every later place in this segment: go on in the next one.
        slash = text.find("/", start + len(first))
        if slash < 0:
            break
        start = text.find(first, slash + 1 - len(first))
    return -1


def _skip(texts: list[str], text: str, at: int) -> int:
    """Return where the shortest match of `texts`, each after a `{}`, ends, from `at`, or -1."""
    for part in texts:
        slash = text.find("/", at)
        stop = slash if slash >= 0 else len(text)
        found = text.find(part, at + 1, stop + len(part))
        if found < 0:
            return -1
        at = found + len(part)
    return at


def _units(pattern: str) -> list[str]:
    """Split a pattern into segments; all from the first that has a `{*}` on are the last unit."""
    segments = pattern[1:].split("/")
    for index, segment in enumerate(segments):
        if _REST in segment:
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
    return (kind, _REST in unit, -prefix, -len(_text(unit)), -unit.count(_PART))


def _text(unit: str) -> str:
    return unit.replace(_REST, "").replace(_PART, "")
