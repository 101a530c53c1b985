"""What the site is made of beside the pages of `docs/`: nav written out, sources as pages."""

from __future__ import annotations

import pytest

from docs_build import modules, nav, sources
from tests.fences import pages

PAGES = ["index.md", "servers.md", "frameworks/index.md", "frameworks/quart.md"]


@pytest.mark.parametrize(
    ("spelled", "written"),
    [
        ([{"Start": "index.md"}], [{"Start": "index.md"}]),
        (["frameworks/*.md"], ["frameworks/index.md", "frameworks/quart.md"]),
        ([{"F": ["frameworks/index.md", "frameworks/*.md"]}], [{"F": PAGES[2:]}]),
        ([{"Servers": "servers.md?"}, "testing.md?"], [{"Servers": "servers.md"}]),
        ([{"Empty": ["coming-from/*.md", "usage.md?"]}], []),
        (["gone.md"], ["gone.md"]),  # MkDocs itself complains
    ],
)
def test_nav_is_written_out(spelled: list[object], written: list[object]) -> None:
    assert nav.written_out(spelled, PAGES) == written


def test_page_of_a_module_is_called_as_the_module_without_the_package() -> None:
    place = modules.place("tieredlimit.integrations.fastapi")

    assert nav.written_out(["reference/api/*.md"], [place], modules.title) == [
        {"integrations.fastapi": place}
    ]


def test_links_that_leave_docs_lead_to_pages_of_the_site() -> None:
    page = "[a](../README.md#try-it) [b](../SECURITY.md) [c](policy.md) [d](../examples) [e](#x)"

    shown = sources.on_site(page, "docs/capacity.md", "capacity.md")

    assert shown == (
        "[a](source/readme.md#try-it) [b](reporting.md) [c](policy.md) "
        "[d](source/examples/index.md) [e](#x)"
    )
    assert "[p](policy.md)" in sources.on_site("[p](docs/policy.md)", "SECURITY.md", "reporting.md")
    assert "(../../policy.md)" in sources.on_site(
        "[p](../docs/policy.md)", "examples/x", "source/examples/x.md"
    )


def test_every_file_that_a_page_links_to_is_a_page_of_the_site() -> None:
    inside = [page.removeprefix("docs/") for page in pages() if page.startswith("docs/")]

    added = sources.pages(inside)

    assert {"changelog.md", "contributing.md", "reporting.md", "source/readme.md"} <= added.keys()
    assert "import asyncio" in added["source/examples/video_jobs.py.md"]
    assert "(demo.py.md)" in added["source/examples/index.md"]
    assert not {place for place in added if "__init__" in place}
