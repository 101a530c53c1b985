"""The matrix of faults and outage answers, as it was measured."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence

from tests.faults.listed import FAULTS
from tests.faults.runs import ANSWERS, Run
from tests.servers import find_server, server_version

TITLE = "fault", *ANSWERS, "stall", "recovery"


def table(runs: Mapping[str, Run]) -> list[tuple[str, ...]]:
    """Return the rows of what was run."""
    return [TITLE, *(_row(one.name, runs[one.name]) for one in FAULTS if one.name in runs)]


def lines(runs: Mapping[str, Run]) -> list[str]:
    """Return the matrix as lines of text."""
    rows = table(runs)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def page(runs: Mapping[str, Run], page: str) -> str:
    """Return a page of Markdown with its table and its line on the machine made anew."""
    rows = [f"| {' | '.join(row)} |" for row in table(runs)]
    rows.insert(1, "|---" * len(TITLE) + "|")
    server = server_version(find_server())
    made = f"Redis {server}, Python {platform.python_version()}, {platform.machine()}."
    found = re.fullmatch(r"(.*?<!-- matrix -->\n).*?(<!-- end -->.*)", page, re.DOTALL)
    if found is None:
        raise ValueError("the page has no place for the matrix: <!-- matrix --> ... <!-- end -->")
    return f"{found[1]}{made}\n\n" + "\n".join(rows) + f"\n{found[2]}"


def named(page: str) -> Sequence[str]:
    """Return the faults in a page's table."""
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    return [name for name in rows if name != TITLE[0]]


def _row(name: str, run: Run) -> tuple[str, ...]:
    cells = [_cell(run, answer) for answer in ANSWERS]
    recovery = "never" if run.recovery is None else f"{run.recovery:.2f} s"
    return name, *cells, f"{run.stall_ms:.0f} ms", recovery


def _cell(run: Run, answer: str) -> str:
    statuses = sorted(set().union(*(one.during[answer] for one in run.attempts)))
    closed, opened = run.closed_ms(answer), run.open_ms(answer)
    times = [_ms(closed), *([] if opened is None else [_ms(opened)])]
    return f"{', '.join(map(str, statuses))}: {' / '.join(times)}"


def _ms(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"
