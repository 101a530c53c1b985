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
# Names of features may be in what is said: beyond so many at a time they share one line.
_MOST_KINDS = 16
_OTHERS = ""
_LONGEST_COMPLAINT = 500
_MOST_PLACES = 8

_log = logging.getLogger("tieredlimit")


class Complaints:
    """Log what went wrong on the way to a decision: of each kind one line a second at most.

    What goes wrong all the time must not hide what goes wrong besides. Of more than 16 kinds at a
    time the others share one line.

    Args:
        clock: Returns seconds; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}

    def log(self, what: str, error: Exception) -> None:
        """Log it with the error, and with where it was raised, if not by the store.

        Only our own errors are quoted, which name no account: others may quote whatever a client
        sent.
        """
        now = self._clock()
        kind = self._kind_of(what, now)
        quiet_until, unsaid = self._kinds.get(kind, (-math.inf, 0))
        if now < quiet_until:
            self._kinds[kind] = quiet_until, unsaid + 1
            return
        from_store = isinstance(error, BackendError)
        places = [] if from_store else traceback.format_tb(error.__traceback__)
        _log.log(
            logging.WARNING if from_store else logging.ERROR,
            "tieredlimit: %s: %s%s%s",
            what,
            _told(error),
            f" ({unsaid} more since the last line)" if unsaid else "",
            # Without the exception, for its text.
            "".join(["\n", *places[-_MOST_PLACES:]]) if places else "",
        )
        self._kinds[kind] = now + _LOG_INTERVAL, 0

    def _kind_of(self, what: str, now: float) -> str:
        kinds = self._kinds
        if what not in kinds and len(kinds) >= _MOST_KINDS:
            for kind in [one for one, (until, _) in kinds.items() if until <= now]:
                del kinds[kind]
            if len(kinds) >= _MOST_KINDS:
                return _OTHERS
        return what


def _told(error: Exception) -> str:
    name = type(error).__name__
    return f"{name}: {error}"[:_LONGEST_COMPLAINT] if isinstance(error, TieredLimitError) else name
