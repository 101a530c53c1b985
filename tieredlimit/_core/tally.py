"""What a process counts: plain integers, written without a lock.

No decision rests on them. Between threads an increment may be lost, and what is read while others
write may be from two moments.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping
from hashlib import blake2b

from tieredlimit._core.account import Account
from tieredlimit._core.keys import ACCOUNT, ADDRESS, IdSecret, subject_name
from tieredlimit._core.rate import SECOND_US
from tieredlimit.errors import UsageError

OUTCOMES = (
    *("allowed", "quota", "zero", "closed", "pool", "concurrency"),
    *("outage_allowed", "outage_denied"),
)
"""How a decision that was enforced can end."""

SHADOW_OUTCOMES = ("shadow_allowed", "shadow_denied")
"""How a decision that was only measured can end."""

MOST_PAIRS = 4_096
"""The most pairs of a feature and a tier that are counted apart."""

REST = ("*", "*")
"""Where pairs are counted that are not counted apart: names that no policy can have."""

CALL_SECONDS = (
    *(0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01),
    *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
"""The upper bounds, each included, that calls are sorted by in seconds; the rest is above."""

CALL_DECISIONS = (1, 2, 4, 8, 16, 32, 64, 128)
"""The same for the decisions that a call carried."""

MAX_PER_SECOND = 1_000
"""The most that may be let through in a second where that is bounded."""


class Tally:
    """Count the decisions of one feature for one tier, from the start of the process.

    The hot path writes `tally.allowed += 1`. `outage_allowed` and `outage_denied` are the outage
    answers; what was decided in shadow is in the last two only.
    """

    __slots__ = OUTCOMES + SHADOW_OUTCOMES

    def __init__(self) -> None:
        self.allowed = 0
        self.quota = 0
        self.zero = 0
        self.closed = 0
        self.pool = 0
        self.concurrency = 0
        self.outage_allowed = 0
        self.outage_denied = 0
        self.shadow_allowed = 0
        self.shadow_denied = 0

    def count(self, allowed: bool, reason: str, *, shadow: bool = False) -> None:
        """Count one decision, for who is not in a hurry; `reason` is the decision's."""
        answer = "allowed" if allowed else "denied"
        if shadow:
            outcome = f"shadow_{answer}"
        else:
            outcome = f"outage_{answer}" if reason == "outage" else reason
        setattr(self, outcome, getattr(self, outcome) + 1)

    def counts(self) -> dict[str, int]:
        """Return what is not zero, by outcome."""
        counted = ((outcome, getattr(self, outcome)) for outcome in self.__slots__)
        return {outcome: count for outcome, count in counted if count}


class Tallies:
    """Hold the tallies of a limiter.

    Snapshots are ready for JSON: `{"video/new": {"allowed": 41}}`, without what is zero. With
    `most`, only so many of the busiest pairs are named and the others are summed under `*/*`: where
    that is there, a pair that is missing is not known to be zero.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Tally] = {}
        self._marked: dict[tuple[str, str], dict[str, int]] = {}

    def of(self, feature: str, tier: str) -> Tally:
        """Return the tally of a pair, always the same one.

        Ask when a policy is compiled, with its names; what a client sent never gets here. Pairs
        that a later policy lacks stay, as counters must not run backwards.
        """
        pair = (feature, tier)
        if pair not in self._held and len(self._held) >= MOST_PAIRS:
            pair = REST
        return self._held.setdefault(pair, Tally())

    def items(self) -> tuple[tuple[tuple[str, str], Tally], ...]:
        """Return every (feature, tier) with its tally; other threads may add more meanwhile."""
        return tuple(self._held.items())

    def snapshot(self, most: int | None = None) -> dict[str, dict[str, int]]:
        """Return what was counted since the process started."""
        return _spelled({pair: tally.counts() for pair, tally in self.items()}, most)

    def mark(self) -> None:
        """Let `since` begin now: a revision is adopted."""
        self._marked = {pair: tally.counts() for pair, tally in self.items()}

    def since(self, most: int | None = None) -> dict[str, dict[str, int]]:
        """Return what was added since the last `mark`, or since the start without one."""
        marked = self._marked
        return _spelled(
            {pair: _added(tally.counts(), marked.get(pair, {})) for pair, tally in self.items()},
            most,
        )


class Pace:
    """Let so many through in any second, and count the others.

    Takes instants in microseconds, all of one clock; after a step back it starts anew.

    Attributes:
        withheld: How many were not let through since this was last set to 0.
    """

    __slots__ = ("_latest", "_per_second", "withheld")

    def __init__(self, per_second: int) -> None:
        if type(per_second) is not int or not 1 <= per_second <= MAX_PER_SECOND:
            raise UsageError(
                f"per_second must be a whole number from 1 to {MAX_PER_SECOND:,}, "
                f"got {per_second!r:.80}"
            )
        self._per_second = per_second
        self._latest: deque[int] = deque(maxlen=per_second)
        self.withheld = 0

    def lets(self, now: int) -> bool:
        """Say whether one more may pass at this instant."""
        latest = self._latest
        if len(latest) == self._per_second and 0 <= now - latest[0] < SECOND_US:
            self.withheld += 1
            return False
        latest.append(now)
        return True


class Samples:
    """Remember a few recent denials, to tell an operator who is being denied.

    Args:
        namespace: The limiter's, for `hashed_id`.
        most: How many are remembered; older ones make room.
        per_second: How many are taken of any second.
        plain: True remembers ids as `plain_id` spells them, instead of hashes.
        secret: What the store's keys hash ids with, for `hashed_id`; None for nothing.

    Raises:
        UsageError: `most` is below 1, or `per_second` is out of bounds.
    """

    def __init__(
        self,
        namespace: str,
        *,
        most: int = 50,
        per_second: int = 10,
        plain: bool = False,
        secret: IdSecret | None = None,
    ) -> None:
        if type(most) is not int or most < 1:
            raise UsageError(f"most must be a whole number above 0, got {most!r:.80}")
        self._namespace = namespace
        self._plain = plain
        self._secret = secret
        self._pace = Pace(per_second)
        self._kept: deque[dict[str, str | int]] = deque(maxlen=most)

    def add(self, now: int, account: Account, feature: str, tier: str, reason: str) -> None:
        """Remember a denial, if this second has room; `now` is on the backend's clock."""
        if not self._pace.lets(now):
            return
        if self._plain:
            spelled = plain_id(account)
        else:
            spelled = hashed_id(account, self._namespace, self._secret)
        self._kept.append(
            {"at_us": now, "feature": feature, "tier": tier, "reason": reason, "account": spelled}
        )

    def snapshot(self) -> list[dict[str, str | int]]:
        """Return them ready for JSON, the oldest first."""
        return [dict(sample) for sample in tuple(self._kept)]


class CallStats:
    """Count the calls to one backend.

    Attributes:
        calls: Calls that have ended, well or not.
        decisions: Decisions that they carried.
        failures: Failures of the store, as its breaker counts them: calls that were refused or
            broke off, decisions that got no answer in time, connections that could not be made.
        seconds_sum: How long they took together.
        by_seconds: How many fell into each bound of `CALL_SECONDS`, and last those above.
        by_decisions: The same for `CALL_DECISIONS`.
    """

    __slots__ = ("by_decisions", "by_seconds", "calls", "decisions", "failures", "seconds_sum")

    def __init__(self) -> None:
        self.calls: int = 0
        self.decisions: int = 0
        self.failures: int = 0
        self.seconds_sum: float = 0.0
        self.by_seconds: list[int] = [0] * (len(CALL_SECONDS) + 1)
        self.by_decisions: list[int] = [0] * (len(CALL_DECISIONS) + 1)

    def observe(self, seconds: float, decisions: int) -> None:
        """Count one call that has ended: how long it took and how many decisions it carried."""
        self.calls += 1
        self.decisions += decisions
        self.seconds_sum += seconds
        self.by_seconds[bisect_left(CALL_SECONDS, seconds)] += 1
        self.by_decisions[bisect_left(CALL_DECISIONS, decisions)] += 1

    def snapshot(self) -> dict[str, int | float]:
        """Return the sums, ready for JSON."""
        return {
            "calls": self.calls,
            "decisions": self.decisions,
            "failures": self.failures,
            "seconds_sum": round(self.seconds_sum, 6),
        }


def hashed_id(account: Account, namespace: str, secret: IdSecret | None = None) -> str:
    """Return 16 hexadecimal digits for an account's id, after `*` if it is a client address.

    Equal in every process of a namespace, so that an operator can look for one account. It keeps
    ids out of sight; whoever knows the namespace can still try one id after the other. With a
    secret nobody can, and it is how the store's keys spell the id, cut short.
    """
    if secret is not None:
        return _mark(account) + secret.name(account.id)[1:17]
    digest = blake2b(f"{namespace}\0{account.id}".encode(), digest_size=8).hexdigest()
    return _mark(account) + digest


def plain_id(account: Account) -> str:
    """Return an account's id as the store's keys spell it: bounded, and on one line."""
    return subject_name(account.id, _mark(account))


def _mark(account: Account) -> str:
    return ADDRESS if account.anonymous else ACCOUNT


def _added(counts: Mapping[str, int], marked: Mapping[str, int]) -> dict[str, int]:
    added = ((outcome, count - marked.get(outcome, 0)) for outcome, count in counts.items())
    # Below zero: another thread has written back what it had read before the mark.
    return {outcome: count for outcome, count in added if count > 0}


def _spelled(
    counts: Mapping[tuple[str, str], dict[str, int]], most: int | None
) -> dict[str, dict[str, int]]:
    counted = {pair: count for pair, count in counts.items() if count}
    named = set(counted)
    if most is not None and len(counted) > most:
        busiest = sorted(counted, key=lambda pair: -sum(counted[pair].values()))
        named = set(busiest[:most]) - {REST}
    spelled: dict[str, dict[str, int]] = {}
    rest: Counter[str] = Counter()
    for pair, count in counted.items():
        if pair in named:
            spelled["/".join(pair)] = count
        else:
            rest.update(count)
    if rest:
        spelled["/".join(REST)] = dict(rest)
    return spelled
