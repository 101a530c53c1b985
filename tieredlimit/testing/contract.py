"""The contract of backends, for those who write one of their own."""

from __future__ import annotations

from tieredlimit.testing.taking import TakingContract
from tieredlimit.testing.timing import TimingContract

__all__ = ["BackendContract"]


class BackendContract(TakingContract, TimingContract):
    """What every backend promises: subclass it, and give it two fixtures.

    `clock` returns a `tieredlimit.testing.Clock`, and `backend` a backend that decides by that
    clock and holds nothing yet. The tests are async: mark the subclass for your plugin
    (`@pytest.mark.asyncio`) unless that finds them by itself. It imports no test framework.
    """
