"""What the pages on coming from another limiter say, taken apart for the tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from tests.contract import Clock
from tieredlimit import Limiter
from tieredlimit.backends import MemoryBackend

PAGES = Path(__file__).parent.parent / "docs" / "coming-from"
SECOND_US = 1_000_000
KEY = {"x-api-key": "key-ada"}


class Page:
    """Hold a page's blocks of code, by the comment that each begins with, and its series."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = PAGES / f"{name}.md"
        self.text = self.path.read_text("utf-8")
        python = re.findall(r"^```python\n(# (.*?)\n.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        self.code = {label: block for block, label in python}
        self.policies = re.findall(r"^```toml\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)

    def run(self, label: str, **given: Any) -> dict[str, Any]:
        """Run a block of code, and return what it defines."""
        namespace: dict[str, Any] = {"__name__": "page", **given}
        exec(compile(self.code[label], f"{label} of the page", "exec"), namespace)
        return namespace

    def series(self) -> list[tuple[int, int, int, int]]:
        """Return the rows of its table: second, requests sent, let in there, let in here."""
        rows = re.findall(r"^\| (\d+) s \| (\d+) \| (\d+) \| (\d+) \|$", self.text, re.MULTILINE)
        assert len(rows) > 4, "the page has no table of a series"
        return [(int(at), int(sent), int(there), int(here)) for at, sent, there, here in rows]


def clocked(clock: Clock) -> type[Limiter]:
    """Return a `Limiter` that keeps its buckets in memory, by a clock, whatever it is told."""

    class Clocked(Limiter):
        def __init__(self, policy: Any, backend: Any = None, **given: Any) -> None:
            super().__init__(policy, MemoryBackend(clock=clock), **given)

    return Clocked


def time_of(clock: Clock) -> SimpleNamespace:
    """Return what stands in for the module `time` in a peer that has no clock to be given."""
    return SimpleNamespace(time=lambda: clock() / SECOND_US, sleep=None)


async def statuses(
    app: Any, path: str, times: int = 1, headers: dict[str, str] | None = None
) -> list[int]:
    """Return the statuses of so many POSTs."""
    return [answer.status_code for answer in await answers(app, path, times, headers)]


async def answers(
    app: Any, path: str, times: int = 1, headers: dict[str, str] | None = None
) -> list[httpx.Response]:
    """Return the answers to so many POSTs, one after the other; an exception is a 500."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return [
            await client.post(path, headers=KEY if headers is None else headers)
            for _ in range(times)
        ]


async def let_in(
    app: Any, path: str, series: Iterable[Sequence[int]], wait_until: Callable[[int], None]
) -> list[int]:
    """Send a series, and return how many were let in at each of its instants."""
    counts = []
    for at, sent, *_ in series:
        wait_until(at)
        counts.append((await statuses(app, path, sent)).count(200))
    return counts


def most_within(seconds: int, admitted: Iterable[tuple[int, int]]) -> int:
    """Return the most that were let in within so many seconds, both ends included."""
    rows = list(admitted)
    return max(
        sum(count for at, count in rows if begin <= at <= begin + seconds) for begin, _ in rows
    )
