"""What a worker says of itself each second."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from tieredlimit.errors import BackendError, UsageError

SILENCE_US = 5_000_000
"""Microseconds after which a worker that was not heard is not listed."""
MAX_WORKERS = 10_000
"""The most workers listed."""
MAX_BYTES = 64 * 1024
"""The most that a heartbeat may take as JSON."""

_ID = re.compile(r"[A-Za-z0-9._:@-]{1,64}")
_NUMBERS = ("pid", "format", "revision", "started_us")
_TEXTS = ("id", "host", "version", "digest")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Say that a worker lives, what it is, and which revision it follows.

    Attributes:
        id: Names the worker, from its start to its end: 1 to 64 of letters, digits and `._:@-`.
        host: Where it runs.
        pid: Its process there.
        version: That of its package.
        format: The newest format of a revision that it can read.
        revision: The number of the revision that it follows.
        digest: That revision's digest.
        started_us: When it started, on the server's clock.
        counters: What it counted; anything that JSON can say.
        age: Seconds since it was heard, on the server's clock; of no meaning when sent.
    """

    id: str
    host: str
    pid: int
    version: str
    format: int
    revision: int
    digest: str
    started_us: int
    counters: Mapping[str, Any] = field(default_factory=dict)
    age: float = 0.0

    def to_json(self) -> bytes:
        """Return it as it is stored.

        Raises:
            UsageError: The id is malformed, or all of it is longer than 64 KiB.
        """
        if not _ID.fullmatch(self.id):
            raise UsageError(
                f"a worker's id is 1 to 64 of letters, digits and ._:@-, got {self.id!r:.80}"
            )
        document = {name: getattr(self, name) for name in (*_TEXTS, *_NUMBERS)}
        document["counters"] = dict(self.counters)
        content = json.dumps(document, separators=(",", ":")).encode()
        if len(content) > MAX_BYTES:
            raise UsageError(f"a heartbeat has at most {MAX_BYTES:,} bytes, got {len(content):,}")
        return content

    @classmethod
    def from_json(cls, content: bytes, *, age: float) -> Self:
        """Read what another worker, perhaps of a newer version, has said.

        Raises:
            BackendError: It is no heartbeat.
        """
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as exc:
            raise BackendError(f"the store holds what is no heartbeat: {content!r:.80}") from exc
        if (
            not isinstance(document, dict)
            or any(type(document.get(name)) is not int for name in _NUMBERS)
            or any(type(document.get(name)) is not str for name in _TEXTS)
            or not isinstance(document.get("counters"), dict)
        ):
            raise BackendError(f"the store holds what is no heartbeat: {content!r:.80}")
        known = {name: document[name] for name in (*_TEXTS, *_NUMBERS, "counters")}
        return cls(**known, age=age)
