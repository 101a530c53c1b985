"""Overrides: temporary changes to what the policy says, and which of them counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tieredlimit._core.account import Account
from tieredlimit._core.cells import UNLIMITED, read_cell, read_messages
from tieredlimit._core.reading import Reading, join, spell
from tieredlimit._core.share import (
    MAX_INSTANT_US,
    Share,
    position,
    read_share,
)
from tieredlimit._core.who import MAX_TEXT, Who, read_text, read_who
from tieredlimit.errors import RevisionError

__all__ = [
    "MAX_INSTANT_US",
    "MAX_LANGUAGES",
    "MAX_TEXT",
    "Action",
    "Override",
    "Share",
    "Who",
    "choose",
    "edges",
    "override_from",
    "position",
    "read_override",
    "settled",
]

MAX_LANGUAGES = 20
"""The most languages in which an override tells the denied why."""

Action = Literal["close", "open", "set"]

_ACTIONS = ("close", "open", "set")
_ID = re.compile(r"[a-z0-9-]{1,32}")
_NEEDED = ("id", "sequence", "action", "feature", "who", "made_us")


@dataclass(frozen=True, slots=True)
class Override:
    """Change what the policy says of one feature, for some accounts, for some time.

    Attributes:
        id: Its name, unique in a revision: 1 to 32 of a-z, 0-9 and -.
        sequence: The number of the revision that brought it: a higher one is newer.
        action: `close` denies; `set` puts `quotas` in the cell's place; `open` lets the policy
            decide, whatever less specific or older overrides say.
        feature: The feature's name.
        who: The accounts that are meant.
        begin_us: The first instant at which it counts, None for always until its end.
        end_us: The first instant at which it no longer counts, None for never.
        share: Which of the accounts an `open` lets in, None for all of them.
        quotas: What a `set` puts in the cell, as a policy document writes it.
        messages: What the denied read, by language tag; "" is a language not said.
        reason: Why it was made, for operators.
        actor: Who made it.
        no_exceptions: No older override counts where this one does, more specific ones included.
        made_us: When it was made.
    """

    id: str
    sequence: int
    action: Action
    feature: str
    who: Who
    begin_us: int | None = None
    end_us: int | None = None
    share: Share | None = None
    quotas: Any = field(default=None, hash=False)
    messages: Mapping[str, str] = field(default_factory=dict, hash=False)
    reason: str = ""
    actor: str = ""
    no_exceptions: bool = False
    made_us: int = 0

    @property
    def closes(self) -> bool:
        """Say whether it denies everything to whom it is meant for."""
        return self.action == "close" or (self.action == "set" and self.quotas == 0)

    def active(self, now: int) -> bool:
        """Say whether it counts at the instant `now`: its begin is included, its end is not."""
        if self.begin_us is not None and now < self.begin_us:
            return False
        return self.end_us is None or now < self.end_us

    def counts(self, account: Account, tier: str, now: int) -> bool:
        """Say whether it is active and meant for an account that the policy puts in `tier`."""
        if not self.active(now) or not self.who.matches(account, tier, now):
            return False
        if self.share is None:
            return True
        entered_at = self.share.enters_at(position(self.feature, account.id))
        return entered_at is not None and now >= entered_at

    def document(self) -> dict[str, Any]:
        """Return what `read_override` reads back, ready for JSON; what is empty is left out."""
        whole: dict[str, Any] = {
            "id": self.id,
            "sequence": self.sequence,
            "action": self.action,
            "feature": self.feature,
            "who": self.who.document(),
            "begin_us": self.begin_us,
            "end_us": self.end_us,
            "share": self.share and self.share.document(),
            "quotas": self.quotas,
            "messages": dict(self.messages) or None,
            "reason": self.reason or None,
            "actor": self.actor or None,
            "no_exceptions": self.no_exceptions or None,
            "made_us": self.made_us,
        }
        return {word: value for word, value in whole.items() if value is not None}


def choose(overrides: Iterable[Override], account: Account, tier: str, now: int) -> Override | None:
    """Return the override of one feature that wins for an account, None where the policy decides.

    Of those that count, the newest without exceptions takes away all older ones; of what is left
    the most specific wins, among equals the newest. `tier` is where the policy puts the account.
    """
    counting = [one for one in overrides if one.counts(account, tier, now)]
    if len(counting) < 2:
        return counting[0] if counting else None
    oldest = max((one.sequence for one in counting if one.no_exceptions), default=0)
    return max(
        (one for one in counting if one.sequence >= oldest),
        key=lambda one: (one.who.specificity, one.sequence),
    )


def edges(overrides: Iterable[Override], now: int) -> tuple[int, int | None]:
    """Return the interval around `now` in which no override begins or ends.

    Its first instant is included (0: nothing has happened yet), its last one is not (None: nothing
    will happen). Shares and ages are not looked at: see `settled`.
    """
    instants = (at for one in overrides for at in (one.begin_us, one.end_us) if at is not None)
    return _around(instants, now)


def settled(candidates: Iterable[Override], account: Account, now: int) -> tuple[int, int | None]:
    """Return the interval around `now` in which shares and ages say the same for this account.

    As `edges` does for begins and ends; together they bound how long the answer of `choose` holds
    while the account stays in its tier.
    """
    created_us = account.created_us()
    instants: list[int] = []
    for one in candidates:
        if one.share is not None and one.share.duration_us:
            entered_at = one.share.enters_at(position(one.feature, account.id))
            instants += [] if entered_at is None else [entered_at]
        if one.who.when is not None and created_us is not None:
            ages = (one.who.when.account_age_below_us, one.who.when.account_age_above_us)
            instants += [created_us + age_us for age_us in ages if age_us is not None]
    return _around(instants, now)


def override_from(document: Any) -> Override:
    """Read what `Override.document` wrote.

    Raises:
        RevisionError: It has faults: all of them.
    """
    reading = Reading()
    override = read_override(reading, "", document)
    if override is None:
        raise RevisionError(reading.faults, "override")
    return override


def read_override(reading: Reading, path: str, value: Any) -> Override | None:
    """Read what `Override.document` wrote; None where it has a fault.

    No policy is asked: the feature and the tier may be unknown to the one in force.
    """
    before = len(reading.faults)
    table = reading.table(path, value)
    if len(reading.faults) > before:
        return None
    reading.known(path, table, tuple(_READERS))
    given = {
        word: reader(reading, join(path, word), table[word])
        for word, reader in _READERS.items()
        if word in table
    }
    for word in _NEEDED:
        if word not in table:
            reading.fault(join(path, word), "is missing")
    _check_kind(reading, path, table)
    if len(reading.faults) > before:
        return None
    override = Override(**given)
    _check_times(reading, path, override)
    return override if len(reading.faults) == before else None


def _check_kind(reading: Reading, path: str, table: Mapping[Any, Any]) -> None:
    """Note what does not go with the action."""
    action, feature, place = table.get("action"), table.get("feature"), join(path, "quotas")
    if action == "set" and "quotas" not in table:
        reading.fault(place, f'is missing; give a quota, 0 or "{UNLIMITED}"')
    elif action == "set" and isinstance(feature, str):
        read_cell(reading, place, feature, table["quotas"])
    for word, kind in (("quotas", "set"), ("share", "open")):
        if word in table and action in _ACTIONS and action != kind:
            reading.fault(join(path, word), f'goes with "{kind}" only, not with "{action}"')


def _check_times(reading: Reading, path: str, override: Override) -> None:
    begin_us, end_us, share = override.begin_us, override.end_us, override.share
    if end_us is not None and end_us <= (begin_us or 0):
        reading.fault(join(path, "end_us"), f"must be after the begin, got {end_us}")
    if share and share.begin_us + share.duration_us > MAX_INSTANT_US:
        reading.fault(join(path, "share"), f"must be full by {MAX_INSTANT_US}, in the year 2255")


def _read_id(reading: Reading, path: str, value: Any) -> Any:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        reading.fault(path, f"got {spell(value)}; an id is 1 to 32 of a-z, 0-9 and -")
    return value


def _read_feature(reading: Reading, path: str, value: Any) -> Any:
    reading.name(path, value)
    return value


def _read_flag(reading: Reading, path: str, value: Any) -> Any:
    if not isinstance(value, bool):
        reading.fault(path, f"must be true or false, got {spell(value)}")
    return value


def _read_texts(reading: Reading, path: str, value: Any) -> Mapping[Any, Any]:
    """Read messages by language tag, among which "" is a language not said."""
    table = reading.table(path, value)
    if len(table) > MAX_LANGUAGES:
        reading.fault(path, f"at most {MAX_LANGUAGES} languages, got {len(table)}")
        return {}
    for language, text in table.items():
        place = join(path, language) if language else path
        before = len(reading.faults)
        read_messages(reading, path, {language: text} if language else text)
        if len(reading.faults) == before:
            read_text(reading, place, text)
    return table


_READERS: Mapping[str, Callable[[Reading, str, Any], Any]] = {
    "id": _read_id,
    "sequence": lambda reading, path, value: reading.whole(path, value, 1, MAX_INSTANT_US),
    "action": lambda reading, path, value: reading.choice(path, value, _ACTIONS),
    "feature": _read_feature,
    "who": read_who,
    "begin_us": lambda reading, path, value: reading.whole(path, value, 0, MAX_INSTANT_US),
    "end_us": lambda reading, path, value: reading.whole(path, value, 1, MAX_INSTANT_US),
    "share": read_share,
    "quotas": lambda _reading, _path, value: value,
    "messages": _read_texts,
    "reason": read_text,
    "actor": read_text,
    "no_exceptions": _read_flag,
    "made_us": lambda reading, path, value: reading.whole(path, value, 0, MAX_INSTANT_US),
}


def _around(instants: Iterable[int], now: int) -> tuple[int, int | None]:
    since, until = 0, None
    for at in instants:
        if at <= now:
            since = max(since, at)
        elif at <= MAX_INSTANT_US and (until is None or at < until):
            until = at
    return since, until
