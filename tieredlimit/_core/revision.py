"""A revision: a number and what is in force under it, the stored policy and the overrides."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from typing import Any

from tieredlimit._core.override import Override, read_override
from tieredlimit._core.rate import parse_instant, spell_instant
from tieredlimit._core.reading import Reading, spell
from tieredlimit._core.share import MAX_INSTANT_US
from tieredlimit._core.who import read_text
from tieredlimit.errors import Fault, RevisionError

FORMAT = 1
"""The number in every document; another number is another way to write revisions."""

MAX_OVERRIDES = 1_000
MAX_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Revision:
    """Hold what is in force: a stored policy document, and the overrides above it.

    Attributes:
        number: Higher by one with every change; 0 where nothing was ever published.
        base: The stored policy document, None where each worker uses the file it was given. It may
            have faults that only `Policy.from_dict` finds.
        overrides: The overrides, in the order in which they were made.
        actor: Who made the change.
        reason: Why, for operators.
        made_us: When, in microseconds since 1970 on the server's clock.
        change: One line that says what it changed.
        digest: 16 hexadecimal characters that stand for `base` and `overrides`.
    """

    number: int
    base: Mapping[str, Any] | None = field(default=None, hash=False)
    overrides: tuple[Override, ...] = ()
    actor: str = ""
    reason: str = ""
    made_us: int = 0
    change: str = ""
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        digest = blake2b(_canonical(self._content()), digest_size=8).hexdigest()
        object.__setattr__(self, "digest", digest)

    def to_json(self) -> bytes:
        """Return the document to store.

        Raises:
            RevisionError: It is larger than a store should be given.
        """
        faults = []
        if len(self.overrides) > MAX_OVERRIDES:
            faults.append(_too_many(len(self.overrides)))
        document = {
            "format": FORMAT,
            "number": self.number,
            **self._content(),
            "actor": self.actor,
            "reason": self.reason,
            "made_us": self.made_us,
            "change": self.change,
        }
        encoded = _canonical(document)
        if len(encoded) > MAX_BYTES:
            faults.append(_too_large(len(encoded)))
        if faults:
            raise RevisionError(faults, f"revision {self.number}")
        return encoded

    @classmethod
    def from_json(cls, encoded: bytes) -> Revision:
        """Read a stored document.

        Raises:
            RevisionError: It has another format, or faults: all of them.
        """
        if len(encoded) > MAX_BYTES:
            raise RevisionError([_too_large(len(encoded))])
        try:
            document = json.loads(encoded, parse_constant=_refuse)
            found = document.get("format") if isinstance(document, dict) else None
            if type(found) is int and found != FORMAT:
                told = f"is {spell(found)}; this release reads format {FORMAT}"
                raise RevisionError([Fault("format", told)])
            return _read(document)
        except (ValueError, RecursionError) as exc:
            raise RevisionError([Fault("", f"is not JSON: {exc}")]) from exc

    def _content(self) -> dict[str, Any]:
        return {"base": self.base, "overrides": [one.document() for one in self.overrides]}


def plain(value: Any) -> Any:
    """Return a copy of a checked part of a policy document that JSON can hold.

    The only values of a right document that TOML knows and JSON does not are instants.
    """
    match value:
        case Mapping():
            return {key: plain(one) for key, one in value.items()}
        case list():
            return [plain(one) for one in value]
        case datetime():
            return spell_instant(parse_instant(value))
        case _:
            return value


def _read(document: Any) -> Revision:
    reading = Reading()
    table = reading.table("", document)
    if reading.faults:
        raise RevisionError(reading.faults)
    reading.known("", table, tuple(_READERS))
    given: dict[str, Any] = {
        word: reader(reading, word, table[word]) if word in table else None
        for word, reader in _READERS.items()
    }
    for word in _READERS:
        if word not in table:
            reading.fault(word, "is missing")
    number, overrides = given["number"], given["overrides"] or []
    for i, override in overrides:
        if number is not None and override.sequence > number:
            told = f"must be at most the number of the revision, {number}, got {override.sequence}"
            reading.fault(f"overrides[{i}].sequence", told)
    if reading.faults:
        raise RevisionError(reading.faults, "revision" if number is None else f"revision {number}")
    del given["format"]
    given["overrides"] = tuple(override for _, override in overrides)
    return Revision(**given)


def _read_base(reading: Reading, path: str, value: Any) -> Mapping[str, Any] | None:
    return None if value is None else reading.table(path, value)


def _read_overrides(reading: Reading, path: str, value: Any) -> list[tuple[int, Override]]:
    """Return those without faults, each with its place in the list."""
    if not isinstance(value, list):
        reading.fault(path, f"must be a list, got {spell(value)}")
        return []
    if len(value) > MAX_OVERRIDES:
        reading.fault(path, _too_many(len(value)).message)
        return []
    overrides: list[tuple[int, Override]] = []
    first: dict[str, int] = {}
    for i, document in enumerate(value):
        override = read_override(reading, f"{path}[{i}]", document)
        if override is None:
            continue
        overrides.append((i, override))
        if first.setdefault(override.id, i) != i:
            told = f"{spell(override.id)} is taken by {path}[{first[override.id]}]"
            reading.fault(f"{path}[{i}].id", told)
    return overrides


def _canonical(document: Mapping[str, Any]) -> bytes:
    """Return compact JSON with keys as they stand: the order of messages and tiers means something.

    All in ASCII, so that even a lone surrogate of a policy document comes back as it was.
    """
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


def _too_many(count: int) -> Fault:
    return Fault("overrides", f"at most {MAX_OVERRIDES:,} at a time, got {count:,}: end some first")


def _too_large(count: int) -> Fault:
    return Fault("", f"at most {MAX_BYTES:,} bytes, got {count:,}")


_READERS: Mapping[str, Callable[[Reading, str, Any], Any]] = {
    "format": lambda reading, path, value: reading.whole(path, value, FORMAT, FORMAT),
    "number": lambda reading, path, value: reading.whole(path, value, 0, MAX_INSTANT_US),
    "base": _read_base,
    "overrides": _read_overrides,
    "actor": read_text,
    "reason": read_text,
    "made_us": lambda reading, path, value: reading.whole(path, value, 0, MAX_INSTANT_US),
    "change": read_text,
}

NOTHING = Revision(0)
"""What is in force where nothing was ever published."""
