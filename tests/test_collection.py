"""The tests themselves: processes that share them have to find the same ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[1]
COLLECT_A_DAY_LATER = """
import sys, time
import pytest
now, now_ns = time.time, time.time_ns
time.time = lambda: now() + 86_413
time.time_ns = lambda: now_ns() + 86_413 * 10**9
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_names_depend_on_neither_time_nor_process(request: pytest.FixtureRequest) -> None:
    """pytest-xdist runs nothing at all when two processes differ by one name."""
    here = {item.nodeid for item in request.session.items}
    files = sorted({name.partition("::")[0] for name in here})

    later = subprocess.run(
        [sys.executable, "-c", COLLECT_A_DAY_LATER, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert later.returncode == 0, later.stdout + later.stderr
    assert here - set(later.stdout.splitlines()) == set()
