"""What can go wrong, one class per thing a caller would handle differently.

::

    TieredLimitError
    ├── PolicyError     the policy document is wrong; carries every fault at once
    ├── UsageError      an argument is wrong: a cost, an account, a feature (also a ValueError)
    ├── RevisionError   a stored revision cannot be read or stored; carries every fault at once
    ├── ConflictError   somebody else published first: look at what they did, then try again
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

__all__ = [
    "BackendError",
    "ConflictError",
    "Denied",
    "Fault",
    "PolicyError",
    "RevisionError",
    "TieredLimitError",
    "UsageError",
]


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
        self.faults: tuple[Fault, ...] = tuple(faults)
        self.source = source
        super().__init__(_listed(self.faults, source or "policy"))


class UsageError(TieredLimitError, ValueError):
    """Report an argument that cannot be used; nothing was sent to a backend."""


class RevisionError(TieredLimitError):
    """Report every fault of a revision at once; what is in force stays in force.

    `faults` holds them in the order in which they were found; `source` says which revision it is.
    """

    def __init__(self, faults: Iterable[Fault], source: str = "revision") -> None:
        self.faults: tuple[Fault, ...] = tuple(faults)
        self.source = source
        super().__init__(_listed(self.faults, source))


class ConflictError(TieredLimitError):
    """Report that another revision was published in the meantime; nothing was changed.

    `seen` is the number that the change was made for, `found` the one now in force. They are equal
    where two publishers made the same number of different content.
    """

    def __init__(self, seen: int, found: int) -> None:
        self.seen = seen
        self.found = found
        which = f"revision {found}" if found != seen else f"another revision {found}"
        super().__init__(
            f"{which} is in force, and this change was made for revision {seen}: nothing was "
            "published; look at what changed, then run it again"
        )


class BackendError(TieredLimitError):
    """Report that the store could not answer in time, or not at all.

    The charges may or may not have been applied: do not repeat the call.
    """


class Denied(TieredLimitError):  # noqa: N818 -- a denial is no error
    """Carry a denial up to whoever renders it; `decision` says why and until when."""

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        super().__init__(f"{decision.feature}: denied ({decision.reason}) in tier {decision.tier}")


def _listed(faults: tuple[Fault, ...], source: str) -> str:
    heading = f"{source}: {len(faults)} fault{'' if len(faults) == 1 else 's'}"
    return "\n".join([heading, *(f"  {fault}" for fault in faults)])
