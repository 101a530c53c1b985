"""Print the matrix at the end of a run."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.matrix import lines
from tests.faults.runs import RUNS

MATRIX = "tieredlimit_faults"
"""Where a process that shares the tests with others tells the matrix that it has run."""

elsewhere: list[str] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    told = getattr(session.config, "workeroutput", None)
    if told is not None and RUNS:
        told[MATRIX] = list(lines(RUNS))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    elsewhere.extend(getattr(node, "workeroutput", {}).get(MATRIX, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    matrix = list(lines(RUNS)) if RUNS else elsewhere
    if matrix:
        terminalreporter.section(
            "faults: statuses, ms added while asked / while not asked any more"
        )
        for line in matrix:
            terminalreporter.line(line)
