"""Navigation as mkdocs.yml spells it, with patterns and pages that need not be there.

`decisions/0*.md` stands for every page of that name that nav does not name elsewhere, in the order
of the files: an index first, then by name. `servers.md?` is left out where there is no such page,
and so is a section that holds nothing.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any


def written_out(
    nav: Sequence[Any], pages: Sequence[str], title_of: Callable[[str], str] = lambda _: ""
) -> list[Any]:
    """Return nav as MkDocs reads it; `title_of` names a page that a pattern has found, or ""."""
    return _written_out(nav, pages, title_of, set(_named(nav)))


def _written_out(
    nav: Sequence[Any], pages: Sequence[str], title_of: Callable[[str], str], named: set[str]
) -> list[Any]:
    written: list[Any] = []
    for entry in nav:
        title, what = next(iter(entry.items())) if isinstance(entry, dict) else ("", entry)
        if isinstance(what, list):
            inside = _written_out(what, pages, title_of, named)
            written += [{title: inside}] if inside else []
        elif "*" in what:
            found = [page for page in fnmatch.filter(pages, what) if page not in named]
            written += [_entry(title_of(page), page) for page in found]
        elif not what.endswith("?"):
            written.append(entry)
        elif (page := what.removesuffix("?")) in pages:
            written.append(_entry(title, page))
    return written


def _named(nav: Any) -> list[str]:
    """Return the pages that nav names outright."""
    if isinstance(nav, str):
        return [] if "*" in nav else [nav.removesuffix("?")]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [name for entry in entries for name in _named(entry)]


def _entry(title: str, page: str) -> Any:
    return {title: page} if title else page
