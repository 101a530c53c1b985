"""Print the matrix at the end of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.matrix import lines
from tests.faults.runs import RUNS

if TYPE_CHECKING:
    import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if RUNS:
        terminalreporter.section(
            "faults: statuses, ms added while asked / while not asked any more"
        )
        for line in lines(RUNS):
            terminalreporter.line(line)
