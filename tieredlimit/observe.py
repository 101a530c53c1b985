"""Who may watch decisions: a Protocol of three methods, and one observer that logs."""

from __future__ import annotations

import inspect
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol

from tieredlimit._core.account import Account
from tieredlimit._core.tally import Pace, hashed_id, plain_id
from tieredlimit.decision import Decision
from tieredlimit.errors import BackendError, UsageError

__all__ = ["LoggingObserver", "Observer", "Observers"]

_METHODS = ("on_decision", "on_outage", "on_revision")
_LONGEST_TEXT = 500
_MOST_PLACES = 8

_log = logging.getLogger("tieredlimit")


class Observer(Protocol):
    """Watch what a limiter does.

    Called on the way of a request, in whatever thread that runs: return at once, and never wait.
    What is raised is logged and changes nothing.
    """

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        """See a decision, an outage answer included; `shadow` says that it was only measured."""
        ...

    def on_outage(self, feature: str, error: Exception) -> None:
        """See why a decision of this feature could not be made; its outage answer follows."""
        ...

    def on_revision(self, number: int, digest: str) -> None:
        """See which revision this process follows from now on."""
        ...


class LoggingObserver:
    """Log denials, outages and revisions, one line of JSON each, and so many a second at most.

    The line is the message; its fields are also the record's attribute `tieredlimit`, a mapping.
    Denials and revisions have the level INFO, outages WARNING. Each kind of event has a bound of
    its own; the next line of a kind after some were left out says how many, as `more`.

    Args:
        logger: Where to; None is the logger `tieredlimit.events`.
        per_second: The most lines of one kind in any second, 1 to 1,000.
        allowed: True logs what was allowed, too.
        ids: False never names an account. True adds a hash that is equal in every process of the
            namespace; "plain" adds the id as the store's keys spell it.
        namespace: The limiter's, for the hash.
        clock: Returns microseconds; for tests.

    Raises:
        UsageError: `per_second` or `ids` is something else.
    """

    def __init__(
        self,
        logger: logging.Logger | None = None,
        *,
        per_second: int = 10,
        allowed: bool = False,
        ids: bool | Literal["plain"] = False,
        namespace: str = "default",
        clock: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        if ids not in (False, True, "plain"):
            raise UsageError(f'ids must be False, True or "plain", got {ids!r:.80}')
        self._logger = logger or logging.getLogger("tieredlimit.events")
        self._allowed = allowed
        self._ids = ids
        self._namespace = namespace
        self._clock = clock
        kinds = ("allowed", "denied", "shadow_allowed", "shadow_denied", "outage", "revision")
        self._paces = {kind: Pace(per_second) for kind in kinds}

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        """Log a denial, or what was allowed if that was asked for."""
        if decision.allowed and not self._allowed:
            return
        event = "allowed" if decision.allowed else "denied"
        # In shadow or not: neither may crowd the other out.
        kind = f"shadow_{event}" if shadow else event
        more = self._room(kind, logging.INFO)
        if more is None:
            return
        fields: dict[str, Any] = {
            "event": event,
            "feature": decision.feature,
            "tier": decision.tier,
            "reason": decision.reason,
            "cost": decision.cost,
            "retry_after": decision.retry_after,
            "shadow": shadow,
        }
        if self._ids:
            plain = self._ids == "plain"
            fields["account"] = plain_id(account) if plain else hashed_id(account, self._namespace)
        self._write(logging.INFO, fields, more)

    def on_outage(self, feature: str, error: Exception) -> None:
        """Log why a decision could not be made.

        Only a store's error is quoted: the text of another may name an account.
        """
        more = self._room("outage", logging.WARNING)
        if more is None:
            return
        text = type(error).__name__
        if isinstance(error, BackendError):
            text = f"{text}: {error}"[:_LONGEST_TEXT]
        self._write(logging.WARNING, {"event": "outage", "feature": feature, "error": text}, more)

    def on_revision(self, number: int, digest: str) -> None:
        """Log which revision is followed from now on."""
        more = self._room("revision", logging.INFO)
        if more is None:
            return
        fields = {"event": "revision", "revision": number, "digest": digest}
        self._write(logging.INFO, fields, more)

    def _room(self, kind: str, level: int) -> int | None:
        """Return how many events went unsaid before this one, None if this one does, too."""
        if not self._logger.isEnabledFor(level):
            return None
        pace = self._paces[kind]
        if not pace.lets(self._clock()):
            return None
        more, pace.withheld = pace.withheld, 0
        return more

    def _write(self, level: int, fields: dict[str, Any], more: int) -> None:
        if more:
            fields["more"] = more
        self._logger.log(level, "%s", json.dumps(fields), extra={"tieredlimit": fields})


class Observers:
    """Tell several observers, none of which can disturb a decision or another observer.

    What one raises is logged, one line a second at most. False if there is none.

    Args:
        observers: Told in this order.
        clock: Returns microseconds; for tests.

    Raises:
        UsageError: One of them is no observer, or would have to be awaited.
    """

    __slots__ = ("_clock", "_observers", "_pace")

    def __init__(
        self,
        observers: Iterable[Observer] = (),
        *,
        clock: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        self._observers = tuple(observers)
        for observer in self._observers:
            _require_observer(observer)
        self._clock = clock
        self._pace = Pace(1)

    def __bool__(self) -> bool:
        return bool(self._observers)

    def on_decision(self, decision: Decision, account: Account, *, shadow: bool) -> None:
        """Tell all of them."""
        for observer in self._observers:
            try:
                observer.on_decision(decision, account, shadow=shadow)
            except Exception as exc:  # noqa: BLE001 -- whatever it is, the decision stands
                self._complain(observer, exc)

    def on_outage(self, feature: str, error: Exception) -> None:
        """Tell all of them."""
        for observer in self._observers:
            try:
                observer.on_outage(feature, error)
            except Exception as exc:  # noqa: BLE001 -- as above
                self._complain(observer, exc)

    def on_revision(self, number: int, digest: str) -> None:
        """Tell all of them."""
        for observer in self._observers:
            try:
                observer.on_revision(number, digest)
            except Exception as exc:  # noqa: BLE001 -- as above
                self._complain(observer, exc)

    def _complain(self, observer: Observer, error: Exception) -> None:
        pace = self._pace
        if not pace.lets(self._clock()):
            return
        more, pace.withheld = pace.withheld, 0
        _log.error(
            "tieredlimit: an observer failed, decisions go on: %s: %s%s\n%s",
            type(observer).__name__,
            f"{type(error).__name__}: {error}"[:_LONGEST_TEXT],
            f" ({more} more since the last line)" if more else "",
            "".join(traceback.format_tb(error.__traceback__)[-_MOST_PLACES:]),
        )


def _require_observer(observer: object) -> None:
    for name in _METHODS:
        method = None if isinstance(observer, type) else getattr(observer, name, None)
        if not callable(method):
            raise UsageError(
                f"an observer is an object with the methods {', '.join(_METHODS)}, "
                f"got {observer!r:.80}"
            )
        if inspect.iscoroutinefunction(method):
            raise UsageError(
                f"{type(observer).__name__}.{name} is asynchronous: nobody would await it"
            )
