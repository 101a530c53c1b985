"""Token-bucket quotas per account tier and per feature, as a drop-in ASGI middleware."""

from tieredlimit._core.account import Account
from tieredlimit._core.policy import Policy
from tieredlimit.decision import Decision, QuotaState
from tieredlimit.demanded import PoolState, SlotState
from tieredlimit.errors import (
    BackendError,
    ConflictError,
    Denied,
    Fault,
    PolicyError,
    RevisionError,
    TieredLimitError,
    UsageError,
)
from tieredlimit.inforce import stored
from tieredlimit.leases import Lease
from tieredlimit.limiter import Limiter
from tieredlimit.middleware import TieredLimitMiddleware
from tieredlimit.observe import LoggingObserver, Observer
from tieredlimit.settling import Reservation
from tieredlimit.usage import usage_app

__all__ = [
    "Account",
    "BackendError",
    "ConflictError",
    "Decision",
    "Denied",
    "Fault",
    "Lease",
    "Limiter",
    "LoggingObserver",
    "Observer",
    "Policy",
    "PolicyError",
    "PoolState",
    "QuotaState",
    "Reservation",
    "RevisionError",
    "SlotState",
    "TieredLimitError",
    "TieredLimitMiddleware",
    "UsageError",
    "stored",
    "usage_app",
]
__version__ = "0.1.0"
