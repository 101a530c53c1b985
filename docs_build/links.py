"""Links of Markdown pages: where they stand, and where they lead."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^( *)(```+|~~~+)[^\n]*\n.*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"(\]\()([^()\s]+)(\))")
_OUTSIDE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Link:
    """One link: the target as it is written, its path and its anchor, either of which may be ""."""

    target: str

    @property
    def outside(self) -> bool:
        """Whether it leads out of the repository: it begins with a scheme."""
        return bool(_OUTSIDE.match(self.target))

    @property
    def path(self) -> str:
        """Return what stands before the `#`."""
        return self.target.partition("#")[0]

    @property
    def anchor(self) -> str:
        """Return what stands behind the `#`."""
        return self.target.partition("#")[2]

    def resolved(self, page: str) -> str:
        """Return the file that it leads to from a page; both are paths from the checkout."""
        if not self.path:
            return page
        return posixpath.normpath(posixpath.join(posixpath.dirname(page), self.path))


def links(markdown: str) -> Iterator[Link]:
    """Yield every link of a page, none from its code."""
    hidden = _code(markdown)
    for found in _LINK.finditer(markdown):
        if not any(begin <= found.start() < end for begin, end in hidden):
            yield Link(found[2])


def rewritten(markdown: str, to: Callable[[Link], str]) -> str:
    """Return a page with the target of every link replaced."""
    hidden = _code(markdown)

    def replaced(found: re.Match[str]) -> str:
        if any(begin <= found.start() < end for begin, end in hidden):
            return found[0]
        return found[1] + to(Link(found[2])) + found[3]

    return _LINK.sub(replaced, markdown)


def anchors(markdown: str) -> list[str]:
    """Return the anchors of a page's headings, as GitHub makes them; a repeated one is counted."""
    seen: dict[str, int] = {}
    found = []
    for line in _FENCE.sub("", markdown).splitlines():
        if heading := re.match(r"#{1,6} +(.+?) *#*$", line):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
            count = seen[slug] = seen.get(slug, -1) + 1
            found.append(f"{slug}-{count}" if count else slug)
    return found


def _code(markdown: str) -> list[tuple[int, int]]:
    spans = [found.span() for found in _FENCE.finditer(markdown)]
    prose = _FENCE.sub(lambda found: " " * len(found[0]), markdown)
    return [*spans, *(found.span() for found in _CODE.finditer(prose))]
