"""Fixtures for users' own tests: `pytest_plugins = ["tieredlimit.integrations.pytest"]`.

Needs `pip install "tieredlimit[testing]"`. It is not found by itself: who installs tieredlimit for
an application has no plugin more in another one's tests.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

try:
    import pytest
except ImportError as exc:  # pragma: no cover -- the tests have pytest
    raise ImportError('pytest is missing: pip install "tieredlimit[testing]"') from exc

# So that the contract's assertions say what was found; before anything of it is imported.
pytest.register_assert_rewrite("tieredlimit.testing")

from tieredlimit._core.policy import Policy  # noqa: E402
from tieredlimit.backends import Backend, MemoryBackend  # noqa: E402
from tieredlimit.inforce import Stored  # noqa: E402
from tieredlimit.limiter import Limiter  # noqa: E402
from tieredlimit.observe import Observer  # noqa: E402
from tieredlimit.testing import Clock, RecordingObserver  # noqa: E402

__all__ = ["MakeLimiter", "tieredlimit_clock", "tieredlimit_decisions", "tieredlimit_limiter"]


class _Options(TypedDict, total=False):
    """What else a `Limiter` is told."""

    namespace: str
    shards: int | None
    enabled: bool
    observers: Iterable[Observer]
    close: str | None
    close_file: str | Path | None
    id_secret: str | None


class MakeLimiter(Protocol):
    """Make a limiter, as `Limiter` does; without a backend, in memory and by the test's clock."""

    def __call__(
        self,
        policy: Policy | Mapping[str, Any] | str | Path | Stored,
        backend: Backend | str | None = None,
        **options: Unpack[_Options],
    ) -> Limiter:
        """Return a limiter whose decisions `tieredlimit_decisions` keeps."""
        ...


@pytest.fixture
def tieredlimit_clock() -> Clock:
    """Return a clock that stands still until it is told otherwise."""
    return Clock()


@pytest.fixture
def tieredlimit_decisions() -> RecordingObserver:
    """Return what keeps the decisions of all limiters that `tieredlimit_limiter` makes."""
    return RecordingObserver()


@pytest.fixture
def tieredlimit_limiter(
    tieredlimit_clock: Clock, tieredlimit_decisions: RecordingObserver
) -> MakeLimiter:
    """Return what makes a limiter of a policy: `tieredlimit_limiter("policy.toml")`."""

    def make(
        policy: Policy | Mapping[str, Any] | str | Path | Stored,
        backend: Backend | str | None = None,
        **options: Unpack[_Options],
    ) -> Limiter:
        if backend is None:
            backend = MemoryBackend(clock=tieredlimit_clock)
        options["observers"] = [tieredlimit_decisions, *options.get("observers", ())]
        return Limiter(policy, backend, **options)

    return make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that failed what its limiters have decided."""
    report = yield
    decisions = getattr(item, "funcargs", {}).get("tieredlimit_decisions")
    if report.when == "call" and report.failed and isinstance(decisions, RecordingObserver):
        report.sections.append(("what tieredlimit has decided", str(decisions)))
    return report
