"""Why an account falls in its tier and a request in its feature, for people to read."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher

from tieredlimit._core.account import Account
from tieredlimit._core.condition import When
from tieredlimit._core.matcher import Matcher
from tieredlimit._core.policy import Policy
from tieredlimit._core.rate import parse_instant, spell_instant
from tieredlimit._core.routes import Route

_LAST_US = parse_instant(datetime.max.replace(tzinfo=UTC))
_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))
# Enough to see what is similar: comparing costs the product of the lengths.
_LONGEST_COMPARED = 256
_DEEPEST_ROOT = 8
_LEAST_LIKENESS = 0.7


@dataclass(frozen=True, slots=True)
class Passed:
    """Say why a tier passed an account over: the first word of its `when` that fails.

    Attributes:
        tier: The tier's name.
        word: The word, as the policy writes it.
        asks: What the word asks for.
        has: What the account has instead.
    """

    tier: str
    word: str
    asks: str
    has: str


@dataclass(frozen=True, slots=True)
class Change:
    """Say at which instant an account falls in another tier only because it grows older."""

    at: int
    tier: str


@dataclass(frozen=True, slots=True)
class TierChoice:
    """Say which tier takes an account, and why.

    Attributes:
        tier: The tier's name.
        holds: What its `when` asks for, all of which the account has; empty in the last tier.
        passed: The tiers tried before it, in their order.
        change: The next change by age alone, None where there is none.
    """

    tier: str
    holds: tuple[str, ...]
    passed: tuple[Passed, ...]
    change: Change | None


@dataclass(frozen=True, slots=True)
class Metered:
    """Say by which route a request is metered, as which feature, and what it costs."""

    route: Route
    feature: str
    cost: int


@dataclass(frozen=True, slots=True)
class Nearest:
    """Point from a request that no route covers to a route that may have been meant."""

    route: Route
    feature: str
    why: str


def choose_tier(policy: Policy, account: Account, now: int) -> TierChoice:
    """Return the first tier whose `when` the account meets at the instant `now`, with reasons."""
    at = _tier_index(policy, account, now)
    tier = policy.tiers[at]
    passed = tuple(
        Passed(row.name, word, row.when.spell(word), _has(row.when, word, account, now))
        for row in policy.tiers[:at]
        if row.when and (word := row.when.failing_word(account, now))
    )
    holds = tuple(tier.when.spell(word) for word in tier.when.words()) if tier.when else ()
    return TierChoice(tier.name, holds, passed, _next_change(policy, account, at, now))


def find_route(policy: Policy, method: str, path: str) -> Metered | None:
    """Return how a request is metered, None if it is not; `path` is as `Matcher.match` wants it."""
    return Matcher((one.route, one) for one in _routes(policy)).match(method, path)


def nearest_route(policy: Policy, method: str, path: str) -> Nearest | None:
    """Return a route that whoever sent an unmetered request may have had in mind."""
    routes = _routes(policy)
    by_path = Matcher((Route(None, one.route.path), one) for one in routes)
    if one := by_path.match(method, path):
        return Nearest(one.route, one.feature, f"the same path, but not {method.upper()}")
    below = path
    for _ in range(_DEEPEST_ROOT):
        _, slash, rest = below[1:].partition("/")
        below = slash + rest
        one = by_path.match(method, below) if below else None
        if one and "{" not in one.route.path.split("/")[1]:
            root = path.removesuffix(below)
            return Nearest(one.route, one.feature, f'write the path without the root path "{root}"')
    closest = max(routes, key=lambda one: _likeness(one.route.path, path), default=None)
    if closest is None or _likeness(closest.route.path, path) < _LEAST_LIKENESS:
        return None
    return Nearest(closest.route, closest.feature, "a similar path")


def spell_about(duration_us: int) -> str:
    """Return a duration as people say it, in its two largest units; what is below is dropped."""
    if duration_us < 1_000:
        return _count(str(duration_us), "microsecond")
    if duration_us < 1_000_000:
        return _count(f"{duration_us / 1_000:.4g}", "millisecond")
    if duration_us < 60_000_000:
        return _count(f"{duration_us / 1_000_000:.4g}", "second")
    rest = duration_us // 1_000_000
    counts = []
    for unit, seconds in _UNITS:
        count, rest = divmod(rest, seconds)
        counts.append((count, unit))
    first = next(i for i, (count, _) in enumerate(counts) if count)
    return " ".join(_count(str(count), unit) for count, unit in counts[first : first + 2] if count)


def spell_age(account: Account, now: int) -> str:
    """Return how old an account is, as a phrase that follows its name."""
    created_us = account.created_us()
    if created_us is None:
        return "is of unknown age, which counts as new"
    if created_us > now:
        return "is not created yet"
    return f"is {spell_about(now - created_us)} old"


def _has(when: When, word: str, account: Account, now: int) -> str:
    match word:
        case "plan":
            return f"this one's plan is {'unknown' if account.plan is None else account.plan}"
        case "anonymous":
            return "this one is anonymous" if account.anonymous else "this one has an account"
        case "tags":
            return f"this one lacks {', '.join(sorted(when.tags.difference(account.tags)))}"
        case "created_before" | "created_after" if (created_us := account.created_us()) is not None:
            return f"this one was created {spell_instant(created_us)}"
        case _:
            return f"this one {spell_age(account, now)}"


def _next_change(policy: Policy, account: Account, tier: int, now: int) -> Change | None:
    created_us = account.created_us()
    if created_us is None:
        return None
    instants = {
        created_us + age
        for row in policy.tiers
        if row.when
        for age in (row.when.account_age_below_us, row.when.account_age_above_us)
        if age is not None
    }
    for at in sorted(instants):
        if now < at <= _LAST_US:
            then = _tier_index(policy, account, at)
            if then != tier:
                return Change(at, policy.tiers[then].name)
    return None


def _tier_index(policy: Policy, account: Account, now: int) -> int:
    return next(
        i
        for i, tier in enumerate(policy.tiers)
        if tier.when is None or tier.when.failing_word(account, now) is None
    )


def _routes(policy: Policy) -> list[Metered]:
    return [
        Metered(route, feature.name, cost)
        for feature in policy.features.values()
        for route, cost in feature.routes
    ]


def _likeness(template: str, path: str) -> float:
    """Return from 0 to 1 how alike they are, where a parameter says neither yes nor no."""
    path = path[:_LONGEST_COMPARED]
    wanted, given = template.split("/"), path.split("/")
    if len(wanted) == len(given):
        texts = [(w, g) for w, g in zip(wanted, given, strict=True) if "{" not in w]
        template, path = ("/".join(side) for side in zip(*texts, strict=True))
    return SequenceMatcher(None, template, path, autojunk=False).ratio()


def _count(number: str, unit: str) -> str:
    return f"{number} {unit}{'' if number == '1' else 's'}"
