"""What MkDocs is told on its way: pages that are made, links that leave `docs/`, patterns in nav.

A page of `docs/` is read in two places, in the repository and on the site. There, what it links to
outside `docs/` has to be a page, too: the root's Markdown files are, and any other file that is
linked to becomes a page that shows its source.
"""

from __future__ import annotations

import fnmatch
import logging
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# MkDocs loads this file alone, not as a module of its package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from docs_build import modules
from docs_build.links import Link, links, rewritten

log = logging.getLogger("mkdocs.plugins.docs_build")

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {
    "README.md": "source/readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
}
_LANGUAGES = {".py": "python", ".toml": "toml", ".lua": "lua", ".yaml": "yaml", ".txt": "text"}
_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?((?:https?:)?//[^\"'> ]+)"
    r"|<link[^>]*\srel=[\"']?(?:stylesheet|preconnect|icon)[^>]*"
    r"\shref=[\"']?((?:https?:)?//[^\"'> ]+)"
)
_FIRST = ("index.md", "README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and write out what nav leaves to be found."""
    for name, page in ROOT_PAGES.items():
        content = _on_site((ROOT / name).read_text("utf-8"), name, page)
        files.append(File.generated(config, page, content=content))
    for page, content in modules.pages().items():
        files.append(File.generated(config, page, content=content))
    for target in sorted(_linked_sources(files)):
        page = _page_of(target)
        files.append(File.generated(config, page, content=_source(target)))
    names = [file.src_uri for file in files.documentation_pages()]
    config.nav = _written_out(config.nav or [], names, set(_named(config.nav or [])))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead the links that leave `docs/` to the pages of the site."""
    if page.file.generated_by is not None:
        return markdown
    return _on_site(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_post_build(config: MkDocsConfig) -> None:
    """Look at what was built: every public name is described, nothing is fetched from elsewhere."""
    site = Path(config.site_dir)
    for module in modules.public_modules():
        page = site / modules.place(module).removesuffix(".md") / "index.html"
        shown = page.read_text("utf-8")
        for name in modules.public_names(module):
            if f'id="{module}.{name}"' not in shown:
                log.warning("%s: %s.%s is not described", page, module, name)
    for html in site.rglob("*.html"):
        for found in _FETCHED.finditer(html.read_text("utf-8")):
            log.warning("%s: fetches %s from elsewhere", html, found[1] or found[2])


def _on_site(markdown: str, name: str, page: str) -> str:
    """Return a page with its links as the site has them; `name` is its path from the checkout."""

    def to(link: Link) -> str:
        target = link.resolved(name)
        if link.outside or not link.path or not (ROOT / target).exists():
            return link.target
        if name.startswith("docs/") and target.startswith("docs/"):
            return link.target
        here = posixpath.dirname(page) or "."
        led = posixpath.relpath(_page_of(target), here)
        return f"{led}#{link.anchor}" if link.anchor else led

    return rewritten(markdown, to)


def _page_of(target: str) -> str:
    """Return the page of the site that shows a file, or a folder, of the repository."""
    if target in ROOT_PAGES:
        return ROOT_PAGES[target]
    if target.startswith("docs/"):
        inside = target.removeprefix("docs/")
        folder = (ROOT / target).is_dir()
        return f"{inside}/{_index_of(ROOT / target)}" if folder else inside
    return f"source/{target}/index.md" if (ROOT / target).is_dir() else f"source/{target}.md"


def _index_of(folder: Path) -> str:
    return next((name for name in _FIRST if (folder / name).exists()), "index.md")


def _linked_sources(files: Files) -> set[str]:
    """Return what pages, and the root's files, link to outside `docs/` and the root's files."""
    pages = [f"docs/{f.src_uri}" for f in files.documentation_pages() if f.generated_by is None]
    found: set[str] = set()
    for name in [*pages, *ROOT_PAGES]:
        for link in links((ROOT / name).read_text("utf-8")):
            target = link.resolved(name)
            known = target.startswith(("docs/", "..")) or target in ROOT_PAGES
            if not link.outside and link.path and not known and (ROOT / target).exists():
                found.add(target)
    for folder in [target for target in found if (ROOT / target).is_dir()]:
        found |= {f"{folder}/{path.name}" for path in _shown(ROOT / folder)}
    return found


def _shown(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] not in "._"
    ]


def _source(target: str) -> str:
    path = ROOT / target
    if path.is_dir():
        listed = [f"- [{one.name}]({one.name}.md)" for one in _shown(path)]
        return "\n".join([f"# {target}", "", *listed, ""])
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return _on_site(text, target, _page_of(target))
    language = _LANGUAGES.get(path.suffix) or ("bash" if text.startswith("#!") else "text")
    # More backticks than any line of a docstring begins with.
    return f"# {target}\n\n``````{language}\n{text}``````\n"


def _named(nav: Any) -> list[str]:
    """Return the pages that nav names outright."""
    if isinstance(nav, str):
        return [] if "*" in nav else [nav.removesuffix("?")]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [name for entry in entries for name in _named(entry)]


def _written_out(nav: list[Any], names: list[str], named: set[str]) -> list[Any]:
    """Return nav with its patterns and its pages that need not be there replaced."""
    written: list[Any] = []
    for entry in nav:
        title, what = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(what, list):
            inside = _written_out(what, names, named)
            # A section that holds nothing yet is not shown.
            written += [{title: inside}] if inside else []
        elif "*" in what:
            # In the order of the files: an index first, then by name; what is made, as it is made.
            found = [one for one in fnmatch.filter(names, what) if one not in named]
            written += [{modules.title(one): one} if modules.title(one) else one for one in found]
        elif not what.endswith("?"):
            written.append(entry)
        elif (page := what.removesuffix("?")) in names:
            written.append({title: page} if title else page)
    return written
