"""What can go wrong, one class per thing a caller would handle differently.

::

    TieredLimitError
    ├── PolicyError     the policy document is wrong; carries every fault at once
    ├── UsageError      an argument is wrong: a cost, an account, a feature (also a ValueError)
    ├── BackendError    the store could not answer; the charges may or may not have been applied
    └── Denied          a denial, raised on request by `Decision.raise_if_denied`

A denial is a value (`Decision`), not an error: only `raise_if_denied` turns it into one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tieredlimit.decision import Decision

__all__ = ["BackendError", "Denied", "Fault", "PolicyError", "TieredLimitError", "UsageError"]


class TieredLimitError(Exception):
    """Catch every error of this package."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Say what is wrong with one place of a policy document.

    `path` is the place as the document spells it (`tiers.new.quotas.video`), empty for the document
    as a whole; `message` names the value and what would be right.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class PolicyError(TieredLimitError):
    """Report every fault of a policy document at once.

    `faults` holds them in the order in which they were found; `source` names the files, or is empty
    where the document did not come from one.
    """

    def __init__(self, faults: Iterable[Fault], source: str = "") -> None:
        self.faults = tuple(faults)
        self.source = source
        count = f"{len(self.faults)} fault{'' if len(self.faults) == 1 else 's'}"
        heading = f"{source}: {count}" if source else f"policy: {count}"
        super().__init__("\n".join([heading, *(f"  {fault}" for fault in self.faults)]))


class UsageError(TieredLimitError, ValueError):
    """Report an argument that cannot be used; nothing was sent to a backend."""


class BackendError(TieredLimitError):
    """Report that the store could not answer in time, or not at all.

    The charges may or may not have been applied: do not repeat the call.
    """


class Denied(TieredLimitError):  # noqa: N818 -- a denial is no error
    """Carry a denial up to whoever renders it; `decision` says why and until when."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        super().__init__(f"{decision.feature}: denied ({decision.reason}) in tier {decision.tier}")
