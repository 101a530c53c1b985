"""Whom an override means."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tieredlimit._core.account import Account
from tieredlimit._core.condition import When, read_when
from tieredlimit._core.rate import parse_duration, spell_duration, spell_instant
from tieredlimit._core.reading import Reading, join, spell
from tieredlimit.errors import UsageError

MAX_TEXT = 500
"""The longest id, reason, actor or message of an override, in characters."""

_WORDS = ("account", "tier", "when")
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]{1,64}")


@dataclass(frozen=True, slots=True)
class Who:
    """Name an account, or words of `when`, a tier, or both; nothing given is everyone.

    Attributes:
        account: The id of one account, which excludes the others. Anonymous accounts have none.
        tier: The name of the tier in which the policy puts the account.
        when: Words that must hold, ages in whole seconds.

    Raises:
        UsageError: An account stands beside a tier or words, or the words match nobody.
    """

    account: str | None = None
    tier: str | None = None
    when: When | None = None

    def __post_init__(self) -> None:
        if self.account is not None and (self.tier is not None or self.when is not None):
            raise UsageError("an account stands alone: give no tier and no words beside it")
        if self.when is None:
            return
        if not self.when.words():
            raise UsageError("when has no word: leave it out for everyone")
        if contradiction := self.when.contradiction():
            raise UsageError(f"when matches nobody: {contradiction}")
        for age_us in (self.when.account_age_below_us, self.when.account_age_above_us):
            if age_us is not None and not _is_spellable(age_us):
                raise UsageError(
                    "an age is whole seconds, at least one and at most 100 years, "
                    f"got {age_us} microseconds"
                )

    @property
    def specificity(self) -> int:
        """Return 3 for an account, 2 for words of `when`, 1 for a tier, 0 for everyone."""
        if self.account is not None:
            return 3
        if self.when is not None:
            return 2
        return 0 if self.tier is None else 1

    def matches(self, account: Account, tier: str, now: int) -> bool:
        """Say whether an account is meant that the policy puts in `tier` at the instant `now`."""
        if self.account is not None:
            return self.account == account.id and not account.anonymous
        if self.tier is not None and self.tier != tier:
            return False
        return self.when is None or self.when.failing_word(account, now) is None

    def covers(self, other: Who) -> bool:
        """Say whether everybody that `other` means is meant.

        Conservative: where it cannot be told from the words alone, the answer is no.
        """
        if self.account is not None or other.account is not None:
            return self.account == other.account or self == EVERYONE
        if self.tier not in (None, other.tier):
            return False
        return self.when is None or (other.when is not None and self.when.covers(other.when))

    def meets(self, other: Who) -> bool:
        """Say whether somebody may be meant by both; where it cannot be told, the answer is yes."""
        if self.account is not None and other.account is not None:
            return self.account == other.account
        if self.account is not None or other.account is not None:
            when = self.when or other.when
            return when is None or when.anonymous is not True
        if self.tier is not None and other.tier is not None and self.tier != other.tier:
            return False
        return may_both_hold(self.when, other.when)

    def spell(self) -> str:
        """Return who is meant, as an operator reads it."""
        if self.account is not None:
            plain = _PLAIN.fullmatch(self.account)
            return f"account {self.account if plain else spell(self.account)}"
        parts = [] if self.tier is None else [f"tier {self.tier}"]
        if self.when is not None:
            parts += [self.when.spell(word) for word in self.when.words()]
        return ", ".join(parts) or "everyone"

    def document(self) -> dict[str, Any]:
        """Return what `read_who` reads back, ready for JSON."""
        given: dict[str, Any] = {"account": self.account, "tier": self.tier}
        document = {word: value for word, value in given.items() if value is not None}
        return document if self.when is None else {**document, "when": _when_document(self.when)}

    def key(self) -> str:
        """Return a text that is equal for two of them only if they mean the same."""
        return json.dumps(self.document())


EVERYONE = Who()
"""Every account, those without an account included."""


def read_who(reading: Reading, path: str, value: Any) -> Who | None:
    """Read what `Who.document` wrote; None where it has a fault."""
    before = len(reading.faults)
    table = reading.table(path, value)
    reading.known(path, table, _WORDS)
    account, tier, when = (table.get(word) for word in _WORDS)
    if "account" in table:
        read_text(reading, join(path, "account"), account)
        if account == "":
            reading.fault(join(path, "account"), "must not be empty")
        if len(table) > 1:
            reading.fault(path, "an account stands alone: no tier and no words beside it")
    if "tier" in table:
        reading.name(join(path, "tier"), tier)
    if "when" in table:
        place = join(path, "when")
        when = read_when(reading, place, when)
        for word in ("plan", "tags"):
            for text in sorted(getattr(when, word) or ()) if when else ():
                read_text(reading, join(place, word), text)
    return Who(account, tier, when) if len(reading.faults) == before else None


def read_text(reading: Reading, path: str, value: Any) -> str:
    """Return a bounded text, the empty one included; anything else is a fault, and ""."""
    if not isinstance(value, str):
        reading.fault(path, f"must be a text, got {spell(value)}")
    elif len(value) > MAX_TEXT:
        reading.fault(path, f"must be at most {MAX_TEXT} characters, got {len(value):,}")
    elif any("\ud800" <= character <= "\udfff" for character in value):
        reading.fault(path, f"holds a lone surrogate, which cannot be stored: {spell(value)}")
    else:
        return value
    return ""


def may_both_hold(one: When | None, other: When | None) -> bool:
    """Say whether an account may meet both conditions; where it cannot be told, yes."""
    if one is None or other is None:
        return True
    if one.plan is not None and other.plan is not None and one.plan.isdisjoint(other.plan):
        return False
    if None not in (one.anonymous, other.anonymous) and one.anonymous != other.anonymous:
        return False
    both = When(
        account_age_below_us=_least(one.account_age_below_us, other.account_age_below_us),
        account_age_above_us=_most(one.account_age_above_us, other.account_age_above_us),
        created_before_us=_least(one.created_before_us, other.created_before_us),
        created_after_us=_most(one.created_after_us, other.created_after_us),
    )
    return both.contradiction() is None


def _when_document(when: When) -> Mapping[str, Any]:
    document: dict[str, Any] = {}
    for word in when.words():
        if word in {"plan", "tags"}:
            document[word] = sorted(getattr(when, word))
        elif word == "anonymous":
            document[word] = when.anonymous
        else:
            spelled = spell_duration if word.startswith("account_age") else spell_instant
            document[word] = spelled(getattr(when, f"{word}_us"))
    return document


def _is_spellable(age_us: int) -> bool:
    try:
        return parse_duration(spell_duration(age_us)) == age_us
    except ValueError:
        return False


def _least(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _most(*values: int | None) -> int | None:
    return max((value for value in values if value is not None), default=None)
