"""One fault, from before it begins until it is over: requests through it, and what they met."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Scope

from tests.faults.listed import Fault
from tests.faults.scenes import Scene
from tieredlimit import Account, Decision, Limiter, TieredLimitMiddleware
from tieredlimit.backends.breaker import FAILURES, LONGEST_PAUSE
from tieredlimit.backends.server import DEFAULT_TIMEOUT

ANSWERS = ("allow", "deny", "local")
DENIED = ("zero", "closed")

CAPACITY = 1_000
"""Of a quota that does not refill as long as a run lasts."""
LOCAL = 20
"""What one process gives out of it by itself, where the answer is `local`."""

MOST_CLOSED_MS = DEFAULT_TIMEOUT * 1000 + 50
"""What a decision may take, and some more until the answer has left."""
MOST_OPEN_MS = 1.0
MOST_STALL_MS = 50.0
MOST_RECOVERY_SECONDS = 5.0

PATIENT_SECONDS = 1.0
"""What a decision may take where the store goes on deciding: the machine may be busy."""

_WARM = 4
_ROUNDS_CLOSED = 6
_ROUNDS_OPEN = 25
_ROUNDS_AFTER = 3
_DEADLINE_SECONDS = 20.0
_POLL_SECONDS = 0.005
_TICK_SECONDS = 0.002
_ATTEMPTS = 3

_WEEKLY = [f"{CAPACITY}/week", {"rate": f"{5 * CAPACITY}/week", "per": "org"}]
POLICY: dict[str, Any] = {
    "features": {
        "allow": {"routes": ["POST /allow"], "outage": "allow"},
        "deny": {"routes": ["POST /deny"], "outage": "deny"},
        "local": {"routes": ["POST /local"], "outage": "local", "outage_share": "2%"},
        "zero": {"routes": ["POST /zero"], "outage": "allow"},
        "closed": {"routes": ["POST /closed"], "outage": "allow"},
    },
    "tiers": {
        "everyone": {
            "quotas": {**dict.fromkeys((*ANSWERS, "closed"), _WEEKLY), "zero": 0},
        }
    },
}


class Asked(NamedTuple):
    """A request's status and milliseconds, with and without those for which others ran."""

    status: int
    ms: float
    own_ms: float


@dataclass
class Attempt:
    """What one run of a fault has shown; times in milliseconds.

    Attributes:
        during: By route, how often each status came while the fault lasted.
        statuses: The same, from its begin to the recovery.
        decided: By feature, how often the store has decided, in all.
        given_out: By feature, what the outage answer has let through.
        asked: By feature, how often there was no answer to what may have been asked.
        held: By feature, what the account and its org were charged at the end, as the store says.
        decided_after: By feature, what the store has decided after the recovery.
        opened: Whether the breaker was seen open.
        closed_early: Whether it was closed for a while although the fault went on.
        closed_ms, open_ms: By feature, what a request took longer than an unmetered one while
            the breaker was closed, at most, and while it was open, in the median.
        own_ms: As `closed_ms`, less the time for which the kernel ran others in our place.
        stall_ms: The longest that the event loop was kept from other work, less the same.
        recovery: Seconds from the server's return until it decides again, None for not in time.
    """

    during: dict[str, Counter[int]] = field(default_factory=dict)
    statuses: dict[str, Counter[int]] = field(default_factory=dict)
    decided: Counter[str] = field(default_factory=Counter)
    given_out: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    held: dict[str, tuple[int, int]] = field(default_factory=dict)
    decided_after: Counter[str] = field(default_factory=Counter)
    opened: bool = False
    closed_early: bool = False
    closed_ms: dict[str, float] = field(default_factory=dict)
    own_ms: dict[str, float] = field(default_factory=dict)
    open_ms: dict[str, float] = field(default_factory=dict)
    stall_ms: float = 0.0
    recovery: float | None = None

    # An observer of the limiter.

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        if decision.reason == "allowed":
            self.decided[decision.feature] += 1
        elif decision.allowed:
            self.given_out[decision.feature] += 1

    def on_outage(self, feature: str, error: Exception) -> None:
        self.asked[feature] += "not asked for now" not in str(error)

    def on_revision(self, number: int, digest: str) -> None:
        pass

    @property
    def in_time(self) -> bool:
        """Whether all times are within their bounds."""
        return (
            max(self.own_ms.values(), default=0) <= MOST_CLOSED_MS
            and max(self.open_ms.values(), default=0) <= MOST_OPEN_MS
            and self.stall_ms <= MOST_STALL_MS
            and self.recovery is not None
            and self.recovery <= MOST_RECOVERY_SECONDS
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Hold the attempts at a fault: one, and more where another process was in its way."""

    attempts: list[Attempt]

    def closed_ms(self, answer: str) -> float:
        return min(one.closed_ms[answer] for one in self.attempts)

    def own_ms(self, answer: str) -> float:
        return min(one.own_ms[answer] for one in self.attempts)

    def open_ms(self, answer: str) -> float | None:
        return min((a.open_ms[answer] for a in self.attempts if a.open_ms), default=None)

    @property
    def stall_ms(self) -> float:
        return min(one.stall_ms for one in self.attempts)

    @property
    def recovery(self) -> float | None:
        return min((a.recovery for a in self.attempts if a.recovery is not None), default=None)


RUNS: dict[str, Run] = {}
"""What has been run, by the fault's name."""


async def run_of(fault: Fault) -> Run:
    """Return the run of a fault, which is made once."""
    if fault.name not in RUNS:
        attempts: list[Attempt] = []
        while len(attempts) < _ATTEMPTS and not any(one.in_time for one in attempts):
            attempts.append(await attempt(fault))
        RUNS[fault.name] = Run(attempts)
    return RUNS[fault.name]


async def attempt(fault: Fault) -> Attempt:
    """Bring a fault about once, and measure."""
    seen = Attempt()
    timeout = DEFAULT_TIMEOUT if fault.outcome != "decided" else PATIENT_SECONDS
    async with (
        fault.setting(timeout) as scene,
        Limiter(POLICY, scene.backend, observers=[seen]) as limiter,
    ):
        app = application(limiter)
        # For the harness: it is in one process with what it measures.
        gc.collect()
        await limiter.control.close("closed", everyone=True)
        await _decided(app, seen, _WARM)
        async with _stalls(seen):
            await fault.begin(scene)
            await _through(fault, scene, app, limiter, seen)
            seen.during = {route: said.copy() for route, said in seen.statuses.items()}
            await fault.end(scene)
            await _recover(app, limiter, seen)
        before = seen.decided.copy()
        await _decided(app, seen, _ROUNDS_AFTER)
        seen.decided_after = seen.decided - before
        for route in ANSWERS:
            seen.held[route] = await _held(limiter, route)
    return seen


async def _decided(app: ASGIApp, seen: Attempt, times: int) -> None:
    """Make requests until so many more were decided by the store, however busy the machine is."""
    async with asyncio.timeout(_DEADLINE_SECONDS):
        for route in ANSWERS:
            wanted = seen.decided[route] + times
            while seen.decided[route] < wanted:
                await ask(app, route)


async def _held(limiter: Limiter, route: str) -> tuple[int, int]:
    """Return how many tokens are charged to the account and its org."""
    async with asyncio.timeout(_DEADLINE_SECONDS):
        while True:
            quotas = (await limiter.peek(_account(route), route)).quotas
            if quotas and None not in [quota.remaining for quota in quotas]:
                own, org = (quota.capacity - (quota.remaining or 0) for quota in quotas)
                return own, org


def application(limiter: Limiter) -> ASGIApp:
    """Return routes with each outage answer, one that is zero, one closed, and one not metered."""

    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("done")

    routes = [Route(f"/{name}", answer, methods=["POST"]) for name in (*ANSWERS, *DENIED)]
    app = Starlette(routes=[*routes, Route("/health", answer)])
    return TieredLimitMiddleware(app, limiter=limiter, identify=identify)


def identify(connection: HTTPConnection) -> Account:
    """Return an account of each route's own."""
    return _account(connection.url.path[1:])


def _account(route: str) -> Account:
    return Account(f"guest-{route}", within={"org": f"guests-{route}"})


async def ask(app: ASGIApp, route: str) -> Asked:
    """Make a request; return its status and how long it took."""
    status = 0

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    scope: Scope = {
        "type": "http",
        "method": "GET" if route == "health" else "POST",
        "path": f"/{route}",
        "raw_path": f"/{route}".encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": [(b"host", b"test")],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
    waited, began = waited_ms(), time.perf_counter()
    await app(scope, receive, send)
    took = (time.perf_counter() - began) * 1000
    return Asked(status, took, took - (waited_ms() - waited))


def waited_ms() -> float:
    """Return how long this thread has been ready to run and had no processor, in all.

    0 where the system does not say.
    """
    try:
        return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1_000_000
    except OSError:
        return 0.0


async def _through(
    fault: Fault, scene: Scene, app: ASGIApp, limiter: Limiter, seen: Attempt
) -> None:
    """Make requests while the fault lasts."""
    routes = (*ANSWERS, *DENIED, "health")
    taken: dict[str, list[Asked]] = {route: [] for route in routes}
    waits = fault.outcome in ("outage", "some")
    rounds = 0
    while rounds < _ROUNDS_CLOSED or (fault.ends_itself and not _is_over(scene)):
        if limiter.breaker_open and waits:
            break
        answers = await asyncio.gather(*(ask(app, route) for route in routes))
        _note(seen, routes, answers, taken)
        rounds += 1
        if rounds > FAILURES:
            await asyncio.sleep(_POLL_SECONDS)
    seen.closed_ms, seen.own_ms = _added(taken, max, "ms"), _added(taken, max, "own_ms")
    seen.opened = bool(limiter.breaker_open)
    if not seen.opened:
        return
    taken = {route: [] for route in routes}
    for _ in range(_ROUNDS_OPEN):
        for route in routes:
            _note(seen, [route], [await ask(app, route)], taken)
            await asyncio.sleep(0)  # nothing else waits in there: the loop would be held up by us
    seen.open_ms = _added(taken, median, "ms")
    if fault.long:
        async with asyncio.timeout(_DEADLINE_SECONDS):
            while all(one._pause < LONGEST_PAUSE for one in scene.backend.breakers):
                seen.closed_early |= not limiter.breaker_open
                await asyncio.sleep(_POLL_SECONDS)


def _added(
    taken: dict[str, list[Asked]], of: Callable[[list[float]], float], which: str
) -> dict[str, float]:
    """Return what the metered requests took longer than the median of those that are not."""
    unmetered = median([getattr(asked, which) for asked in taken["health"]] or [0.0])
    times = {a: [getattr(asked, which) for asked in taken[a]] or [unmetered] for a in ANSWERS}
    return {answer: max(of(times[answer]) - unmetered, 0.0) for answer in ANSWERS}


def _is_over(scene: Scene) -> bool:
    return all(future.done() for future in scene.ending)


async def _recover(app: ASGIApp, limiter: Limiter, seen: Attempt) -> None:
    """Make requests until the store decides them all, and measure how long that takes."""
    began = time.monotonic()
    while time.monotonic() - began < _DEADLINE_SECONDS:
        before = seen.decided.copy()
        answers = await asyncio.gather(*(ask(app, route) for route in (*ANSWERS, *DENIED)))
        _note(seen, (*ANSWERS, *DENIED), answers)
        decided = all(seen.decided[answer] > before[answer] for answer in ANSWERS)
        if decided and not limiter.breaker_open:
            seen.recovery = time.monotonic() - began
            return
        await asyncio.sleep(_POLL_SECONDS)


def _note(
    seen: Attempt,
    routes: Sequence[str],
    answers: Sequence[Asked],
    taken: dict[str, list[Asked]] | None = None,
) -> None:
    for route, asked in zip(routes, answers, strict=True):
        seen.statuses.setdefault(route, Counter())[asked.status] += 1
        if taken is not None:
            taken[route].append(asked)


@asynccontextmanager
async def _stalls(seen: Attempt) -> AsyncIterator[None]:
    """Measure by how much a task that wakes up again and again is late, at most."""

    async def tick() -> None:
        loop = asyncio.get_running_loop()
        while True:
            waited, due = waited_ms(), loop.time() + _TICK_SECONDS
            await asyncio.sleep(_TICK_SECONDS)
            late = (loop.time() - due) * 1000 - (waited_ms() - waited)
            seen.stall_ms = max(seen.stall_ms, late)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])
