"""A policy document as TOML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tieredlimit.cli.terminal import without_steering

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(document: Mapping[str, Any]) -> str:
    """Return what `tomllib` reads back as the same document; it holds nothing but JSON."""
    return "\n\n".join("\n".join(block) for block in _blocks(document, ())) + "\n"


def _blocks(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[list[str]]:
    inner = {key: value for key, value in table.items() if _is_section(value, len(path))}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if key not in inner]
    if path and (lines or not inner):
        lines.insert(0, f"[{'.'.join(map(_key, path))}]")
    if lines:
        yield lines
    for key, value in inner.items():
        yield from _blocks(value, (*path, key))


def _is_section(value: Any, depth: int) -> bool:
    """Say whether a value gets a heading: tiers and features do, what is inside stays on a line."""
    return isinstance(value, Mapping) and depth < 2


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _text(key)


def _value(value: Any) -> str:
    match value:
        case str():
            return _text(value)
        case bool():
            return str(value).lower()
        case Mapping():
            inner = ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case list():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            return repr(value)


def _text(text: str) -> str:
    # JSON's escapes are TOML's, once it writes no pairs of surrogates; TOML has one more.
    return without_steering(json.dumps(text, ensure_ascii=False))
