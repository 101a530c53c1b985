"""Matching text against a pattern with gaps, in one pass."""

from __future__ import annotations

from tieredlimit._core.routes import PART, REST


class Glob:
    """Text with `{}` for one character or more except slashes, and `{*}` for any.

    Without `{*}` it is asked about single segments. It takes the earliest match of each text, which
    is enough: a later one leaves less to what follows. So it never backtracks, unlike the regular
    expression for `/{x:path}/b/{y:path}/c`, which takes quadratic time, and worse for more.
    """

    __slots__ = ("_bare", "_end", "_gap", "_middle", "_start", "crosses_segments")

    def __init__(self, unit: str) -> None:
        # Between the texts of a chunk is a `{}`, between chunks a `{*}`.
        chunks = [chunk.split(PART) for chunk in unit.split(REST)]
        self.crosses_segments = len(chunks) > 1
        if not self.crosses_segments:
            chunks = [chunks[0][:-1], chunks[0][-1:]]
        self._gap = 0 if self.crosses_segments else 1
        self._start, *self._middle, end = chunks
        # The end is looked for from the end: everything backwards.
        self._end = [text[::-1] for text in reversed(end)]
        self._bare = unit in (PART, REST)

    def covers(self, text: str) -> bool:
        """Return whether the whole of `text` matches."""
        if self._bare:
            return len(text) >= self._gap
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
