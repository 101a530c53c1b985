"""Steady load of many accounts on several servers, and what became of each request."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import httpx

CROWD = {"new": 240, "free": 60, "pro": 20}
"""How many accounts each tier has: `key-new-0` to `key-new-239` are the keys of the first."""

_REQUEST_SECONDS = 10.0
_MOST_PENDING = 500
_SEED = 4


@dataclass(frozen=True, slots=True)
class Stream:
    """Say who asks for what, and how often.

    Attributes:
        tier: The tier that the accounts are in, which is how their keys begin.
        feature: What they ask for.
        path: Where, with POST.
        per_second: How many requests a second, each from any account of the tier.
    """

    tier: str
    feature: str
    path: str
    per_second: int


class Answer(NamedTuple):
    """Hold what became of one request; a status of 0 is no answer. Instants are monotonic."""

    tier: str
    feature: str
    account: int
    status: int
    sent_at: float
    came_at: float

    @property
    def admitted(self) -> bool:
        """Whether the request went through."""
        return 200 <= self.status < 300


class Load:
    """Send streams of requests from `async with` until its end; `answers` are in order of arrival.

    Every request goes to any of the servers, whichever asked the last.
    """

    def __init__(self, urls: Sequence[str], streams: Iterable[Stream]) -> None:
        self.answers: list[Answer] = []
        self._urls = urls
        self._streams = tuple(streams)
        self._random = random.Random(_SEED)
        self._pending: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._client = httpx.AsyncClient(timeout=_REQUEST_SECONDS, trust_env=False)
        self._pacers = [asyncio.create_task(self._keep_sending(one)) for one in self._streams]
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._pacers, *self._pending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def settle(self) -> None:
        """Wait until all that was sent so far has been answered."""
        if self._pending:
            await asyncio.wait(set(self._pending))

    def sent(self, since: float, until: float = float("inf")) -> Iterator[Answer]:
        """Return what was sent from the one instant to just before the other."""
        return (one for one in self.answers if since <= one.sent_at < until)

    def came(self, since: float) -> dict[tuple[str, str], Counter[int]]:
        """Return how many answers of each status came from then on, by tier and feature."""
        counts = {(one.tier, one.feature): Counter[int]() for one in self._streams}
        for one in reversed(self.answers):
            if one.came_at < since:
                break
            counts[one.tier, one.feature][one.status] += 1
        return counts

    async def _keep_sending(self, stream: Stream) -> None:
        next_at = time.monotonic() + self._random.random() / stream.per_second
        while True:
            await asyncio.sleep(next_at - time.monotonic())
            next_at += 1 / stream.per_second
            # Servers that stall must not be buried under what waits for them.
            if len(self._pending) < _MOST_PENDING:
                task = asyncio.create_task(self._send(stream))
                self._pending.add(task)
                task.add_done_callback(self._pending.discard)

    async def _send(self, stream: Stream) -> None:
        account = self._random.randrange(CROWD[stream.tier])
        url = self._random.choice(self._urls) + stream.path
        headers = {"X-Api-Key": f"key-{stream.tier}-{account}"}
        sent_at = time.monotonic()
        try:
            status = (await self._client.post(url, headers=headers)).status_code
        except httpx.HTTPError:
            status = 0
        came_at = time.monotonic()
        self.answers.append(Answer(stream.tier, stream.feature, account, status, sent_at, came_at))
