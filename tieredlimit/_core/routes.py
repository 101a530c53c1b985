"""Which requests a policy meters: methods and path templates.

A template covers every path for which Starlette's router would run a route of the same path, and
a little more. More costs somebody a token for a 404; less would be a way round a quota. So a
parameter matches whatever its convertor, and the spellings that routers forgive match as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

_CONVERTORS = ("float", "int", "path", "str", "uuid")
_METHOD = re.compile(r"[A-Z][A-Z0-9_-]*")
_PARAMETER = re.compile(r"\{([^{}]*)\}")
_DECLARATION = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?")
_UNPRINTABLE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]")
_RESTS = re.compile(r"(?:\{\*\}){2,}")

# In patterns, `{}` stands for a parameter within a segment and `{*}` for one of any length.
PART, REST = "{}", "{*}"


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

    def __str__(self) -> str:
        """Return the route as a policy writes it, with its methods in alphabetical order."""
        methods = "*" if self.methods is None else "|".join(sorted(self.methods))
        return f"{methods} {self.path}"

    @property
    def pattern(self) -> str:
        """Return the path with nameless parameters, its trailing slash as written."""
        return _RESTS.sub(REST, _PARAMETER.sub(_nameless, self.path))

    @property
    def shape(self) -> str:
        """Return a key that is equal for two routes only if they cover the same paths."""
        return self.pattern.rstrip("/") or "/"


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
    return not covered_methods(left).isdisjoint(covered_methods(right))


def covered_methods(methods: frozenset[str]) -> frozenset[str]:
    """Return the methods with those that they stand for."""
    return methods | {"HEAD"} if "GET" in methods else methods


def _nameless(parameter: re.Match[str]) -> str:
    return REST if parameter[1].endswith(":path") else PART


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
