"""Every link of every page leads somewhere in the repository; the site checks its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs_build.links import Link, anchors, links, rewritten
from tests.fences import ROOT, pages


@pytest.mark.parametrize("page", pages())
def test_links_of_a_page_lead_to_what_exists(page: str) -> None:
    for link in links((ROOT / page).read_text("utf-8")):
        if link.outside:
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+(/\S*)?|mailto:\S+@\S+", link.target)
            continue
        target = ROOT / link.resolved(page)
        assert not link.path.startswith("/"), f"{page}: {link.target} is right on no site"
        assert target.is_relative_to(ROOT), f"{page}: {link.target} leaves the repository"
        assert target.exists(), f"{page}: {link.target} leads nowhere"
        if link.anchor and target.suffix == ".md":
            found = anchors(target.read_text("utf-8"))
            assert link.anchor in found, f"{page}: {link.target}: no such heading"


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/")])
def test_page_begins_with_its_title_and_has_one(page: str) -> None:
    text = re.sub(
        r"^```.*?^```", "", (ROOT / page).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    )

    assert text.startswith("# ")
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1


def test_links_in_code_are_none() -> None:
    text = "[a](b.md) `[c](d.md)`\n\n```text\n[e](f.md)\n```\n\n![g](h.svg)"

    assert [link.target for link in links(text)] == ["b.md", "h.svg"]
    assert rewritten(text, lambda link: link.target.upper()).count("B.MD") == 1
    assert "f.md" in rewritten(text, lambda link: "x")


def test_anchor_is_as_github_makes_it() -> None:
    text = "# A `b`: c, d\n\n## A-b c\n\n## A-b c\n\n### [x](y.md) & z\n"

    assert anchors(text) == ["a-b-c-d", "a-b-c", "a-b-c-1", "x--z"]


def test_link_is_resolved_from_its_page() -> None:
    assert Link("../a.md#b").resolved("docs/x/y.md") == "docs/a.md"
    assert Link("#b").resolved("docs/x/y.md") == "docs/x/y.md"
    assert Link("https://a.example").outside
    assert Path(Link("../../README.md").resolved("docs/x/y.md")) == Path("README.md")
