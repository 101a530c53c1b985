"""What a terminal shows: its width, the columns a text takes, and nothing that would steer it."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from typing import Any

import click

FIXED_WIDTH = 80
"""Columns where standard output is no terminal and COLUMNS says nothing."""

_COLUMNS = re.compile(r"[1-9][0-9]{0,4}")
_UNSEEN = {"Mn", "Me", "Cf"}
_STEERING = {"Cc", "Cs", "Zl", "Zp"}
_STEERING_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

# The same, but for what JSON escapes anyway.
_STEERING_IN_JSON = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def width() -> int:
    """Return how many columns a line may take."""
    columns = os.environ.get("COLUMNS", "")
    if _COLUMNS.fullmatch(columns):
        return int(columns)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or FIXED_WIDTH
    except (OSError, ValueError):
        return FIXED_WIDTH


def display_width(text: str) -> int:
    """Return the columns a text takes: two for wide characters, none for combining ones."""
    return sum(_columns(character) for character in text)


def pad(text: str, columns: int) -> str:
    """Return a text with as many spaces after it as it is short of `columns`."""
    return text + " " * (columns - display_width(text))


def printable(text: str) -> str:
    """Return a text on one line, with what would steer a terminal spelled out."""
    return "".join(
        character.encode("unicode_escape").decode() if _steers(character) else character
        for character in text
    )


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def folded(text: str, columns: int) -> list[str]:
    """Return a text as lines of so many columns at most, all but the first indented by two.

    What would steer a terminal is spelled out. Only a single word is ever wider.
    """
    first, *words = printable(text).split(" ")
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        if display_width(longer) <= columns or not lines[-1].strip():
            lines[-1] = longer
        else:
            lines.append(f"  {word}")
    return lines


def echo_json(document: Any, indent: int | None = 2) -> None:
    """Print a document as JSON, with what would steer a terminal escaped; None is on one line."""
    click.echo(without_steering(json.dumps(document, indent=indent, ensure_ascii=False)))


def without_steering(written: str) -> str:
    """Return JSON, or TOML, with what would steer a terminal escaped: it stands in strings only."""
    return _STEERING_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


def _steers(character: str) -> bool:
    category, direction = unicodedata.category(character), unicodedata.bidirectional(character)
    return category in _STEERING or direction in _STEERING_BIDI


def _columns(character: str) -> int:
    if unicodedata.category(character) in _UNSEEN:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
