"""Collecting the faults of a document while reading it, so that one error can list them all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, time
from typing import Any, TypeVar

from tieredlimit.errors import Fault

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9_-]{1,32}")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_LONGEST = 80
_MANY_DIGITS = 10**30


class Reading:
    """Gather faults and warnings, each with its place.

    `origin` says which file a place comes from, or "" where there is but one.
    """

    def __init__(self, origin: Callable[[str], str] | None = None) -> None:
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []
        self._origin = origin

    def fault(self, path: str, message: str) -> None:
        """Note a fault; reading goes on."""
        self.faults.append(self._placed(path, message))

    def warn(self, path: str, message: str) -> None:
        """Note what works but deserves a look."""
        self.warnings.append(self._placed(path, message))

    def parse(self, path: str, parser: Callable[[Any], T], value: Any) -> T | None:
        """Return what `parser` makes of the value, or None where it raises ValueError: a fault."""
        try:
            return parser(value)
        except ValueError as exc:
            self.fault(path, str(exc))
            return None

    def table(self, path: str, value: Any) -> Mapping[Any, Any]:
        """Return the value if it is a table; otherwise it is a fault, and an empty one.

        Its keys may be anything: a document need not come from TOML.
        """
        if isinstance(value, Mapping):
            return value
        self.fault(path, f"must be a table, got {spell(value)}")
        return {}

    def named_tables(self, path: str, value: Any) -> dict[str, Mapping[Any, Any]]:
        """Return a table of named tables, of which there must be one.

        A wrong name is a fault; its table is there all the same, so that what refers to it is none.
        """
        table = self.table(path, value)
        if not table and isinstance(value, Mapping):
            self.fault(path, "is empty: a policy without any would let everything in")
        named = {}
        for name, entry in table.items():
            place = join(path, name)
            self.name(place, name)
            if isinstance(name, str):
                named[name] = self.table(place, entry)
        return named

    def known(self, path: str, table: Mapping[Any, Any], words: Sequence[str]) -> None:
        """Note every key that is not one of the words."""
        for key in table:
            if key not in words:
                self.fault(join(path, key), f"unknown key {spell(key)}{did_you_mean(key, words)}")

    def name(self, path: str, value: Any) -> None:
        """Note a value that is no name."""
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            self.fault(path, f"got {spell(value)}; a name is 1 to 32 of a-z, 0-9, _ and -")

    def choice(self, path: str, value: Any, words: Iterable[str]) -> str | None:
        """Return the value if it is one of the words; otherwise it is a fault, and None."""
        words = list(words)
        if isinstance(value, str) and value in words:
            return value
        hint = did_you_mean(value, words)
        self.fault(path, f"must be one of {', '.join(words)}, got {spell(value)}{hint}")
        return None

    def whole(self, path: str, value: Any, least: int, most: int) -> int | None:
        """Return the value if it is a whole number within bounds; otherwise a fault, and None."""
        if type(value) is int and least <= value <= most:
            return value
        self.fault(path, f"must be a whole number from {least} to {most:,}, got {spell(value)}")
        return None

    def strings(self, path: str, value: Any) -> frozenset[str] | None:
        """Return one string or a list of them as a set; otherwise a fault, and None."""
        if isinstance(value, str) and value:
            return frozenset((value,))
        if not isinstance(value, list) or not value:
            self.fault(path, f"must be a string or a list of strings, got {spell(value)}")
            return None
        wrong = [i for i, one in enumerate(value) if not isinstance(one, str) or not one]
        for i in wrong:
            self.fault(f"{path}[{i}]", f"must be a string, got {spell(value[i])}")
        return None if wrong else frozenset(value)

    def _placed(self, path: str, message: str) -> Fault:
        file = self._origin(path) if self._origin else ""
        return Fault(path, f"{message} ({file})" if file else message)


def join(path: str, key: object) -> str:
    """Return the path of a key below `path`, the key quoted where TOML would have it quoted."""
    last = key if isinstance(key, str) and _BARE_KEY.fullmatch(key) else spell(key)
    return f"{path}.{last}" if path else last


def spell(value: object) -> str:
    """Return a value as the document would write it, on one line, cut where it is long.

    Safe for whatever a document may hold: nested without end, escape sequences, huge numbers.
    """
    match value:
        case str():
            short = value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}..."
            return json.dumps(short, ensure_ascii=not short.isprintable())
        case bool():
            return str(value).lower()
        case int():
            # Python refuses to write out numbers of many thousand digits.
            return str(value) if abs(value) < _MANY_DIGITS else "a number of more than 30 digits"
        case float():
            return repr(value)
        case date() | time():
            return value.isoformat()
        case Mapping():
            return "a table"
        case list():
            return "a list" if value else "an empty list"
        case None:
            return "nothing"
        case _:
            return f"a {type(value).__name__}"


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return a hint at the known word that is closest, or nothing."""
    if not isinstance(word, str) or len(word) > _LONGEST:
        return ""
    from difflib import get_close_matches

    by_lower = {one.lower(): one for one in known}
    close = get_close_matches(word.lower(), list(by_lower), n=1)
    return f'; did you mean "{by_lower[close[0]]}"?' if close else ""
