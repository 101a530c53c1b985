"""Run the faults suite and, if asked to, write what it has measured into a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest


def main() -> int:
    """Run the suite; write only what has passed."""
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page with the matrix")
    given, others = parser.parse_known_args()
    if given.write is not None:
        others += ["--deselect", "tests/faults/test_matrix.py::test_page_shows_every_fault"]
    code = pytest.main([str(Path(__file__).parent), "-q", *others])
    if code == pytest.ExitCode.OK and given.write is not None:
        # Not before: pytest wants to see modules as they are imported.
        from tests.faults.matrix import page
        from tests.faults.runs import RUNS

        given.write.write_text(page(RUNS, given.write.read_text("utf-8")), "utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
