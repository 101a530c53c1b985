"""For users' own tests: a clock, states to put a limiter in, what it decided, and the contract.

Imports no test framework; `tieredlimit.integrations.pytest` has fixtures made of it.
"""

from tieredlimit.testing.clock import Clock
from tieredlimit.testing.contract import BackendContract
from tieredlimit.testing.recording import Recorded, RecordingObserver
from tieredlimit.testing.states import broken, closed, exhaust

__all__ = [
    "BackendContract",
    "Clock",
    "Recorded",
    "RecordingObserver",
    "broken",
    "closed",
    "exhaust",
]
