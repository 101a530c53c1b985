"""The `when` of a tier: which accounts it takes in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tieredlimit._core.account import Account
from tieredlimit._core.rate import parse_duration, parse_instant, spell_duration, spell_instant
from tieredlimit._core.reading import Reading, join, spell

WORDS = (
    "plan",
    "account_age_below",
    "account_age_above",
    "created_before",
    "created_after",
    "tags",
    "anonymous",
)

# What an account's age, and its making, must at least be, and what they must be below.
_RANGES = (
    ("account_age_above_us", "account_age_below_us"),
    ("created_after_us", "created_before_us"),
)


@dataclass(frozen=True, slots=True)
class When:
    """Hold the words of a `when`; an account matches where every word given holds.

    Durations and instants are microseconds. None, or an empty set of tags, is a word not given.
    An account whose age is unknown counts as new: it is below any age and after any instant.

    Attributes:
        plan: The account's plan is one of these.
        account_age_below_us: It is younger; at exactly this age it no longer is.
        account_age_above_us: It is at least this old.
        created_before_us: It was made before this instant.
        created_after_us: It was made at this instant or later.
        tags: It carries every one of these.
        anonymous: It is, or is not, an account at all.
    """

    plan: frozenset[str] | None = None
    account_age_below_us: int | None = None
    account_age_above_us: int | None = None
    created_before_us: int | None = None
    created_after_us: int | None = None
    tags: frozenset[str] = frozenset()
    anonymous: bool | None = None

    @property
    def asks_age(self) -> bool:
        """Say whether the answer depends on when the account was made."""
        return (
            self.account_age_below_us is not None
            or self.account_age_above_us is not None
            or self.created_before_us is not None
            or self.created_after_us is not None
        )

    def failing_word(self, account: Account, now: int) -> str | None:
        """Return the first word that does not hold for the account, None if all do."""
        if self.plan is not None and account.plan not in self.plan:
            return "plan"
        if self.anonymous is not None and account.anonymous != self.anonymous:
            return "anonymous"
        if self.tags and not self.tags.issubset(account.tags):
            return "tags"
        return self._failing_age(account.created_us(), now) if self.asks_age else None

    def _failing_age(self, created_us: int | None, now: int) -> str | None:
        below, above = self.account_age_below_us, self.account_age_above_us
        before, after = self.created_before_us, self.created_after_us
        if created_us is None:
            # Unknown counts as new: nothing that asks for age may be satisfied by not knowing.
            if above is not None:
                return "account_age_above"
            return "created_before" if before is not None else None
        if below is not None and now - created_us >= below:
            return "account_age_below"
        if above is not None and now - created_us < above:
            return "account_age_above"
        if before is not None and created_us >= before:
            return "created_before"
        if after is not None and created_us < after:
            return "created_after"
        return None

    def contradiction(self) -> str | None:
        """Say why no account can ever match, None if one can."""
        below, above = self.account_age_below_us, self.account_age_above_us
        if below is not None and above is not None and above >= below:
            return (
                f"account_age_above ({spell_duration(above)}) must be below "
                f"account_age_below ({spell_duration(below)})"
            )
        before, after = self.created_before_us, self.created_after_us
        if before is not None and after is not None and after >= before:
            return (
                f"created_after ({spell_instant(after)}) must be before "
                f"created_before ({spell_instant(before)})"
            )
        return None

    def covers(self, other: When) -> bool:
        """Say whether every account that matches `other` also matches this one.

        Conservative: where it cannot be told from the words alone, the answer is no.
        """
        return (
            self._covers_kind(other)
            and _at_most(other.account_age_below_us, self.account_age_below_us)
            and _at_least(other.account_age_above_us, self.account_age_above_us)
            and _at_most(other.created_before_us, self.created_before_us)
            and _at_least(other.created_after_us, self.created_after_us)
        )

    def rest_of(self, other: When) -> list[When]:
        """Return whom `other` takes in and this one does not, as conditions that share nobody.

        Where it cannot be told from the words alone, that is all of `other`. Ages and instants can
        be told: "below 7 days" leaves those who are older, and "above 7 days" nobody of these.
        """
        if not self._covers_kind(other) or not self._meets_ages(other):
            return [other]
        rest, inside = [], other
        for least, most in _RANGES:
            floor, ceiling = getattr(self, least), getattr(self, most)
            if ceiling is not None:
                rest.append(_raised(inside, least, ceiling))
                inside = _lowered(inside, most, ceiling)
            if floor is not None:
                rest.append(_lowered(inside, most, floor))
                inside = _raised(inside, least, floor)
        return [one for one in rest if one.contradiction() is None]

    def _covers_kind(self, other: When) -> bool:
        """Say whether every account that matches `other` matches this one, but for its age."""
        return (
            _within(other.plan, self.plan)
            and self.tags <= other.tags
            and self.anonymous in (None, other.anonymous)
        )

    def _meets_ages(self, other: When) -> bool:
        """Say whether an account may be of an age that both ask for."""
        return (
            _is_below(self.account_age_above_us, other.account_age_below_us)
            and _is_below(other.account_age_above_us, self.account_age_below_us)
            and _is_below(self.created_after_us, other.created_before_us)
            and _is_below(other.created_after_us, self.created_before_us)
        )

    def parts(self) -> list[When]:
        """Return one `When` per plan, with and without an account: together they say the same.

        A part may be covered where the whole is only covered by several others together.
        """
        plans = [None] if self.plan is None else [frozenset({plan}) for plan in sorted(self.plan)]
        kinds = [True, False] if self.anonymous is None else [self.anonymous]
        return [replace(self, plan=plan, anonymous=kind) for plan in plans for kind in kinds]

    def spell(self, word: str) -> str:
        """Return what one word asks for, as an operator reads it."""
        match word:
            case "plan":
                return f"plan is {' or '.join(sorted(self.plan or ()))}"
            case "tags":
                return f"tags include {', '.join(sorted(self.tags))}"
            case "anonymous":
                return "has no account" if self.anonymous else "has an account"
            case "account_age_below":
                return f"account is younger than {spell_duration(self.account_age_below_us or 0)}"
            case "account_age_above":
                return f"account is at least {spell_duration(self.account_age_above_us or 0)} old"
            case "created_before":
                return f"created before {spell_instant(self.created_before_us or 0)}"
            case _:
                return f"created at or after {spell_instant(self.created_after_us or 0)}"

    def words(self) -> list[str]:
        """Return the words given, in the order in which they are checked."""
        given = {
            "plan": self.plan is not None,
            "anonymous": self.anonymous is not None,
            "tags": bool(self.tags),
            "account_age_below": self.account_age_below_us is not None,
            "account_age_above": self.account_age_above_us is not None,
            "created_before": self.created_before_us is not None,
            "created_after": self.created_after_us is not None,
        }
        return [word for word, there in given.items() if there]


def read_when(reading: Reading, path: str, value: Any) -> When | None:
    """Read a `when`; None where it has a fault."""
    before = len(reading.faults)
    words = reading.table(path, value)
    reading.known(path, words, WORDS)
    if words is value and not words:
        reading.fault(path, "is empty; leave it out in the last tier, say a word in the others")
    given: dict[str, Any] = {}
    for word in WORDS:
        if word not in words:
            continue
        place, said = join(path, word), words[word]
        match word:
            case "plan" | "tags":
                given[word] = reading.strings(place, said)
            case "account_age_below" | "account_age_above":
                given[f"{word}_us"] = reading.parse(place, parse_duration, said)
            case "created_before" | "created_after":
                given[f"{word}_us"] = reading.parse(place, parse_instant, said)
            case _:
                given[word] = said
                if not isinstance(said, bool):
                    reading.fault(place, f"must be true or false, got {spell(said)}")
    if len(reading.faults) > before:
        return None
    when = When(**given)
    if contradiction := when.contradiction():
        reading.fault(path, f"matches nobody: {contradiction}")
        return None
    return when


def _raised(when: When, least: str, bound: int) -> When:
    said = getattr(when, least)
    given: dict[str, Any] = {least: bound if said is None else max(said, bound)}
    return replace(when, **given)


def _lowered(when: When, most: str, bound: int) -> When:
    said = getattr(when, most)
    given: dict[str, Any] = {most: bound if said is None else min(said, bound)}
    return replace(when, **given)


def _within(inner: frozenset[str] | None, outer: frozenset[str] | None) -> bool:
    return outer is None or (inner is not None and inner <= outer)


def _is_below(least: int | None, most: int | None) -> bool:
    return least is None or most is None or least < most


def _at_most(inner: int | None, outer: int | None) -> bool:
    return outer is None or (inner is not None and inner <= outer)


def _at_least(inner: int | None, outer: int | None) -> bool:
    return outer is None or (inner is not None and inner >= outer)
