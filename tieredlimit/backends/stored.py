"""Read what Redis holds under keys of ours, whoever wrote it."""

from __future__ import annotations

import re
from typing import Any

from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit.backends.revisions import LABEL_CHARACTERS
from tieredlimit.errors import BackendError, RevisionError

_STANDING = re.compile(rb"([1-9][0-9]{0,15}) ([0-9a-f]{16})")


def spelled(of: Revision) -> str:
    """Return how the head and the shards name a revision; nothing where none was published."""
    if of.number == 0:
        return ""
    return f"{of.number} {of.digest}"


def standing(key: str, told: Any) -> tuple[int, str]:
    """Read "<number> <digest>"; nothing means `NOTHING`.

    Raises:
        BackendError: It is something else.
    """
    if told in (None, b""):
        return NOTHING.number, NOTHING.digest
    found = _STANDING.fullmatch(told) if isinstance(told, bytes) else None
    if found is None:
        raise BackendError(f"Redis holds what is no revision under {key}: {told!r:.80}")
    return int(found[1]), found[2].decode()


def number(key: str, told: bytes) -> int:
    """Read the number of a document that is kept.

    Raises:
        BackendError: It is something else.
    """
    if not told.isdigit() or len(told) > 16:
        raise BackendError(f"Redis holds what is no revision's number in {key}: {told!r:.80}")
    return int(told)


def revision(key: str, content: bytes, number: int) -> Revision:
    """Read a document.

    Raises:
        BackendError: It cannot be read, or is another one's; the cause says why.
    """
    try:
        found = Revision.from_json(content)
    except RevisionError as exc:
        raise BackendError(f"Redis holds what cannot be read under {key}: {exc}") from exc
    if found.number != number:
        raise BackendError(f"Redis holds revision {found.number} under {key}")
    return found


def label(key: str, told: bytes | None) -> str:
    """Read a label.

    Raises:
        BackendError: It is something else, such as what would move a terminal's cursor.
    """
    text = (told or b"").decode("utf-8", "surrogateescape")
    if len(text) > LABEL_CHARACTERS or not text.isprintable():
        raise BackendError(f"Redis holds what is no label under {key}: {told!r:.80}")
    return text
