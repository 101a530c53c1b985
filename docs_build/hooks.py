"""What MkDocs is told on its way: pages that are made, links that leave `docs/`, and nav."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# MkDocs loads this file alone, not as a module of its package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from docs_build import modules, nav, sources

log = logging.getLogger("mkdocs.plugins.docs_build")

_FETCHED = re.compile(
    r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?((?:https?:)?//[^\"'> ]+)"
    r"|<link[^>]*\srel=[\"']?(?:stylesheet|preconnect|icon)[^>]*"
    r"\shref=[\"']?((?:https?:)?//[^\"'> ]+)"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and write nav out."""
    inside = [file.src_uri for file in files.documentation_pages()]
    for place, content in {**sources.pages(inside), **modules.pages()}.items():
        files.append(File.generated(config, place, content=content))
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = nav.written_out(config.nav or [], pages, modules.title)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Lead the links that leave `docs/` to the pages of the site."""
    if page.file.generated_by is not None:
        return markdown
    return sources.on_site(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


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
