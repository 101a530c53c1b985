"""What the site shows of the repository beside `docs/`.

A page of `docs/` is read in two places, in the repository and on the site. There, what it links to
outside `docs/` has to be a page, too: the root's Markdown files are, and any other file that is
linked to becomes a page that shows its source.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from pathlib import Path

from docs_build.links import Link, links, rewritten

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "README.md": "source/readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}
"""The pages of the site that show the root's files."""

_LANGUAGES = {".py": "python", ".toml": "toml", ".lua": "lua", ".yaml": "yaml"}
_INDEXES = ("index.md", "README.md")
_NOT_FOUND_BY_SEARCH = "---\nsearch:\n  exclude: true\n---\n\n"


def pages(inside: Iterable[str]) -> dict[str, str]:
    """Return what is to be added to the site by its place there; `inside` are pages of `docs/`."""
    added = {
        place: on_site((ROOT / name).read_text("utf-8"), name, place)
        for name, place in ROOT_PAGES.items()
    }
    names = [*(f"docs/{page}" for page in inside), *ROOT_PAGES]
    for target in sorted(_linked(names)):
        added[place_of(target)] = _NOT_FOUND_BY_SEARCH + _source(target)
    return added


def on_site(markdown: str, name: str, place: str) -> str:
    """Return a page with its links as the site has them; `name` is its path from the checkout."""

    def to(link: Link) -> str:
        target = link.resolved(name)
        if link.outside or not link.path or not (ROOT / target).exists():
            return link.target
        if name.startswith("docs/") and target.startswith("docs/"):
            return link.target
        led = posixpath.relpath(place_of(target), posixpath.dirname(place) or ".")
        return f"{led}#{link.anchor}" if link.anchor else led

    return rewritten(markdown, to)


def place_of(target: str) -> str:
    """Return the place on the site of a file, or a folder, of the repository."""
    path = ROOT / target
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    if target.startswith("docs/"):
        inside = target.removeprefix("docs/")
        if not path.is_dir():
            return inside
        index = next((name for name in _INDEXES if (path / name).exists()), _INDEXES[0])
        return f"{inside}/{index}"
    return f"source/{target}/index.md" if path.is_dir() else f"source/{target}.md"


def _linked(names: Iterable[str]) -> set[str]:
    """Return what pages link to that the site does not show anyway."""
    found: set[str] = set()
    for name in names:
        for link in links((ROOT / name).read_text("utf-8")):
            target = link.resolved(name)
            known = target.startswith(("docs/", "..")) or target in ROOT_PAGES
            if not link.outside and link.path and not known and (ROOT / target).exists():
                found.add(target)
    for folder in [target for target in found if (ROOT / target).is_dir()]:
        found |= {f"{folder}/{path.name}" for path in _shown(ROOT / folder)}
    return found


def _shown(folder: Path) -> list[Path]:
    return [one for one in sorted(folder.iterdir()) if one.is_file() and one.name[0] not in "._"]


def _source(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        listed = [f"- [{one.name}]({one.name}.md)" for one in _shown(path)]
        return "\n".join([f"# {target}", "", *listed, ""])
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return on_site(text, target, place_of(target))
    language = _LANGUAGES.get(path.suffix) or ("bash" if text.startswith("#!") else "text")
    # More backticks than a docstring has.
    return f"# {target}\n\n``````{language}\n{text}``````\n"
