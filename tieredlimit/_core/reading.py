"""Collecting the faults of a document while reading it, so that one error can list them all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from tieredlimit.errors import Fault

T = TypeVar("T")

_NAME = re.compile(r"[a-z0-9_-]{1,32}")


class Reading:
    """Gather faults and warnings, each with its place."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.warnings: list[Fault] = []

    def fault(self, path: str, message: str) -> None:
        """Note a fault; reading goes on."""
        self.faults.append(Fault(path, message))

    def warn(self, path: str, message: str) -> None:
        """Note what works but deserves a look."""
        self.warnings.append(Fault(path, message))

    def parse(self, path: str, parser: Callable[[Any], T], value: Any) -> T | None:
        """Return what `parser` makes of the value, or None where it raises ValueError: a fault."""
        try:
            return parser(value)
        except ValueError as exc:
            self.fault(path, str(exc))
            return None

    def table(self, path: str, value: Any) -> Mapping[str, Any]:
        """Return the value if it is a table; otherwise it is a fault, and an empty one."""
        if isinstance(value, Mapping):
            return value
        self.fault(path, f"must be a table, got {spell(value)}")
        return {}

    def known(self, path: str, table: Mapping[str, Any], words: Iterable[str]) -> None:
        """Note every key that is not one of the words."""
        words = list(words)
        for key in table:
            if key not in words:
                self.fault(join(path, key), f'unknown key "{key}"{did_you_mean(key, words)}')

    def name(self, path: str, value: Any) -> bool:
        """Say whether the value is a name; otherwise it is a fault."""
        if isinstance(value, str) and _NAME.fullmatch(value):
            return True
        bound = "a name is 1 to 32 of a-z, 0-9, _ and -"
        self.fault(path, f"got {spell(value)}; {bound}")
        return False

    def choice(self, path: str, value: Any, words: Iterable[str]) -> str | None:
        """Return the value if it is one of the words; otherwise it is a fault, and None."""
        words = list(words)
        if isinstance(value, str) and value in words:
            return value
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
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
        values = [value] if isinstance(value, str) else value
        if isinstance(values, list) and values and all(isinstance(v, str) and v for v in values):
            return frozenset(values)
        self.fault(path, f"must be a string or a list of strings, got {spell(value)}")
        return None


def join(path: str, key: object) -> str:
    """Return the path of a key below `path`."""
    return f"{path}.{key}" if path else str(key)


def spell(value: Any) -> str:
    """Return a value as the document would write it, cut where it is long."""
    if isinstance(value, str):
        text = f'"{value}"'
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, Mapping):
        text = "a table"
    else:
        text = repr(value) if not isinstance(value, list) or value else "an empty list"
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint at the known word that is closest, or nothing."""
    close = get_close_matches(word, list(known), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
