"""Token-bucket quotas per account tier and per feature, as a drop-in ASGI middleware."""

from tieredlimit._core.account import Account
from tieredlimit._core.policy import Policy
from tieredlimit.decision import Decision, QuotaState
from tieredlimit.errors import (
    BackendError,
    Denied,
    Fault,
    PolicyError,
    TieredLimitError,
    UsageError,
)
from tieredlimit.limiter import Limiter
from tieredlimit.middleware import TieredLimitMiddleware

__all__ = [
    "Account",
    "BackendError",
    "Decision",
    "Denied",
    "Fault",
    "Limiter",
    "Policy",
    "PolicyError",
    "QuotaState",
    "TieredLimitError",
    "TieredLimitMiddleware",
    "UsageError",
]
__version__ = "0.1.0"
