"""What went wrong on the way to a decision, in the log, and never too much of it."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable

from tieredlimit.errors import BackendError, TieredLimitError

__all__ = ["Complaints"]

_LOG_INTERVAL = 1.0
_LONGEST_COMPLAINT = 500
_MOST_PLACES = 8

_log = logging.getLogger("tieredlimit")


class Complaints:
    """Log what went wrong on the way to a decision, one line a second at most.

    Args:
        clock: Returns seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._quiet_until = -math.inf
        self._unsaid = 0

    def log(self, what: str, error: Exception) -> None:
        """Log it with the error, and with where it was raised, if not by the store.

        Only our own errors are quoted, which name no account: others may quote whatever a client
        sent.
        """
        now = self._clock()
        if now < self._quiet_until:
            self._unsaid += 1
            return
        from_store = isinstance(error, BackendError)
        places = [] if from_store else traceback.format_tb(error.__traceback__)
        _log.log(
            logging.WARNING if from_store else logging.ERROR,
            "tieredlimit: %s: %s%s%s",
            what,
            _told(error),
            f" ({self._unsaid} more since the last line)" if self._unsaid else "",
            # Without the exception, for its text.
            "".join(["\n", *places[-_MOST_PLACES:]]) if places else "",
        )
        self._quiet_until, self._unsaid = now + _LOG_INTERVAL, 0


def _told(error: Exception) -> str:
    kind = type(error).__name__
    return f"{kind}: {error}"[:_LONGEST_COMPLAINT] if isinstance(error, TieredLimitError) else kind
