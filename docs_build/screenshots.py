"""Look at the built site in headless Chromium: `scripts/screenshots`.

It serves `site/` on loopback and takes a picture of each page in `SHOTS`, wide and as narrow as a
phone, light and dark. With `--check` it takes none: it fails where a page logs an error, asks
another host for anything or is wider than a phone, or where the search finds nothing.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from docs_build.browser import Browser, NoBrowserError

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
SHOTS = (
    *("", "concepts/", "capacity/", "handbook/", "deployment/", "metrics/"),
    *("reference/commands/", "reference/policy-keys/", "reference/api/tieredlimit/"),
)
WIDTHS = {"wide": (1440, 1800), "phone": (390, 1600)}
SEARCHED = "override"
FOUND = "document.querySelectorAll('.md-search-result__item').length"
OVERFLOW = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def served(site: Path = SITE) -> Iterator[str]:
    """Serve the built site; yield its address."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def shoot(browser: Browser, address: str, folder: Path) -> None:
    """Take all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for page in SHOTS:
        name = page.strip("/").replace("/", "-") or "start"
        for word, (width, height) in WIDTHS.items():
            for scheme in ("light", "dark"):
                browser.show(address + page, width=width, height=height, dark=scheme == "dark")
                target = folder / f"{name}-{word}-{scheme}.png"
                browser.shoot(target)
                sys.stdout.write(f"{target}\n")


def faults(browser: Browser, address: str) -> list[str]:
    """Return what is wrong with the site, as a browser sees it."""
    found = []
    for page in SHOTS:
        browser.show(address + page, width=WIDTHS["phone"][0])
        if browser.evaluate(OVERFLOW):
            found.append(f"/{page}: is wider than a phone")
    browser.show(f"{address}?q={SEARCHED}")
    if not browser.wait_for(FOUND):
        found.append(f'the search for "{SEARCHED}" finds nothing')
    asked = {url for url in browser.asked if not url.startswith((address, "data:", "about:"))}
    found += [f"a page asks for {url}" for url in sorted(asked)]
    return [*found, *dict.fromkeys(browser.complaints)]


def main() -> int:
    """Take pictures, or check."""
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only look for faults")
    parser.add_argument("--output", type=Path, default=ROOT / "screenshots", metavar="FOLDER")
    given = parser.parse_args()
    if not (SITE / "index.html").exists():
        sys.exit("scripts/screenshots: there is no site/: build it with scripts/docs")
    try:
        with served() as address, Browser() as browser:
            if not given.check:
                shoot(browser, address, given.output)
                return 0
            wrong = faults(browser, address)
    except NoBrowserError as exc:
        sys.exit(f"scripts/screenshots: {exc}")
    for line in wrong:
        sys.stderr.write(f"{line}\n")
    if not wrong:
        sys.stdout.write("no error, nothing from elsewhere, no page too wide, the search works\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
