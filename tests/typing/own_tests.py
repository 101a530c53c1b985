"""What users' own tests are given, with the types that a checker must give it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import assert_type

import pytest

from tieredlimit import Account, Decision, Limiter, LoggingObserver
from tieredlimit.backends import Backend, MemoryBackend
from tieredlimit.integrations import pytest as plugin
from tieredlimit.integrations.pytest import (
    MakeLimiter,
    tieredlimit_clock,
    tieredlimit_decisions,
    tieredlimit_limiter,
)
from tieredlimit.testing import (
    BackendContract,
    Clock,
    Recorded,
    RecordingObserver,
    broken,
    closed,
    exhaust,
)

pytest_plugins = [plugin.__name__]
FIXTURES = (tieredlimit_clock, tieredlimit_decisions, tieredlimit_limiter)


def clocks() -> Clock:
    clock = Clock(datetime(2026, 1, 9, tzinfo=UTC))
    assert_type(clock.now, int)
    assert_type(clock(), int)
    assert_type(clock.instant, datetime)
    clock.advance(1.5)
    clock.advance(timedelta(days=1))
    clock.move_to(clock.instant)
    clock.now += 1
    return clock


async def states(limiter: Limiter, account: Account) -> None:
    assert_type(await exhaust(limiter, account, "video"), Decision)
    async with closed(limiter, "video") as nothing:
        assert_type(nothing, None)
    until = datetime(2026, 1, 9, tzinfo=UTC)
    async with closed(limiter, "video", tier="free", until=until, message={"en": "Paused."}):
        pass
    async with closed(limiter, "video", when={"plan": "free"}, no_exceptions=True, actor="ann"):
        pass
    with broken(limiter) as nothing:
        assert_type(nothing, None)
    closed(limiter, "video", tire="free")  # type: ignore[call-arg]


def recorded(observer: RecordingObserver, account: Account) -> None:
    Limiter({}, observers=[observer])
    assert_type(observer.decisions, list[Recorded])
    assert_type(observer.outages, list[tuple[str, Exception]])
    assert_type(observer.revisions, list[tuple[int, str]])
    for one in observer.of("video", account="u1", allowed=False, reason="quota", shadow=True):
        assert_type(one, Recorded)
        assert_type((one.decision, one.account, one.shadow), tuple[Decision, Account, bool])
    observer.assert_allowed("video", times=2, account=account, tier="free")
    observer.assert_denied("video", "pool", times=0)
    observer.assert_denied("video", "poll")  # type: ignore[arg-type]
    observer.clear()


async def test_of_a_user(
    tieredlimit_limiter: MakeLimiter,
    tieredlimit_clock: Clock,
    tieredlimit_decisions: RecordingObserver,
) -> None:
    assert_type(tieredlimit_limiter("policy.toml"), Limiter)
    tieredlimit_limiter(Path("policy.toml"), "redis://localhost:6379/0", namespace="tests")
    tieredlimit_limiter({}, MemoryBackend(clock=tieredlimit_clock), observers=[LoggingObserver()])
    tieredlimit_limiter({}, shard=4)  # type: ignore[call-arg]
    tieredlimit_decisions.assert_allowed("video")


@pytest.mark.asyncio
class TestOwnBackend(BackendContract):
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def backend(self, clock: Clock) -> Backend:
        return MemoryBackend(clock=clock)
