"""Working out what a command does to the overrides of one feature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tieredlimit._core.change import UNDO, Change, living, next_revision, options, raise_faults
from tieredlimit._core.override import Action, Override, read_override
from tieredlimit._core.policy import Policy
from tieredlimit._core.rate import SECOND_US, TEN_YEARS_US, spell_instant
from tieredlimit._core.reading import Reading, did_you_mean, spell
from tieredlimit._core.revision import Revision
from tieredlimit._core.share import ALL_BP, MAX_INSTANT_US, Share
from tieredlimit._core.who import Who, may_both_hold
from tieredlimit.errors import UsageError

_PUBLISHING_US = 2 * SECOND_US
"""How long workers may go on with the revision before: what a ramp lets in meanwhile stays in."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Hold what a command says beside what it does; as the attributes of an override."""

    messages: Mapping[str, str] | None
    reason: str
    actor: str
    no_exceptions: bool


class Draft:
    """Work out what a command does to the overrides of one feature.

    Faults are gathered in `reading` until `check`; `notes` are for the operator.
    """

    def __init__(
        self,
        revision: Revision,
        policy: Policy,
        feature: str,
        who: Who,
        now: int,
        begin_us: int | None,
        end_us: int | None,
    ) -> None:
        self.reading = Reading()
        self.notes: list[str] = []
        self.feature = feature
        self.who = who
        self._revision = revision
        self._policy = policy
        self._now = now
        self._check_names()
        self._check_times(begin_us, end_us)
        self.begin_us = begin_us if isinstance(begin_us, int) and begin_us > now else None
        self.end_us = end_us
        self.start = now if self.begin_us is None else self.begin_us
        self.tiers = tiers_of(policy, who)
        self._all = living(revision.overrides, now)
        self.alive = [one for one in self._all if one.feature == feature]
        self.same = [one for one in self.alive if one.who == who]

    def check(self) -> None:
        """Raise a UsageError that lists every fault, if there is one."""
        if not self.reading.faults and not self.tiers:
            self.reading.fault("", f"{self.who.spell()}: matches nobody, by the policy's own words")
        raise_faults(self.reading)

    def check_share(self, percent_bp: int | None, ramp_us: int | None) -> None:
        """Note a share or a ramp that is out of bounds."""
        if percent_bp is not None and not (type(percent_bp) is int and 1 <= percent_bp <= ALL_BP):
            self.reading.fault("percent", "must be from 0.01 to 100, in hundredths")
        if ramp_us is not None and not (
            type(ramp_us) is int and SECOND_US <= ramp_us <= TEN_YEARS_US
        ):
            self.reading.fault("ramp", "must be at least 1 second and at most 10 years")

    def zero_tiers(self) -> list[str]:
        """Return the tiers concerned that the policy lets nothing do."""
        return [tier for tier in self.tiers if self._policy.cell(tier, self.feature).zero]

    def base_says(self, tiers: Sequence[str]) -> str:
        """Return what the policy says of tiers that it has at zero."""
        return f"the policy says quotas.{self.feature} = 0 for {spell_tiers(tiers)}"

    def suggest(self) -> str:
        """Return the command that would let in whom the policy does not."""
        return f'tieredlimit set {self.feature} {options(self.who)} "10/day"'

    def require_closed(self, *, no_exceptions: bool) -> None:
        """Raise a UsageError if nothing closes the accounts, so that nothing can be opened."""
        if self._closers(no_exceptions=no_exceptions):
            return
        zero = self.zero_tiers()
        if zero == self.tiers:
            raise UsageError(
                f"{self.base_says(zero)}, and no override closes it: there is nothing to open; "
                f"to let somebody in: {self.suggest()}"
            )
        others = ", ".join(
            f"{one.id} ({one.who.spell()})"
            for one in self.alive
            if one.action != "open" and one.who.meets(self.who)
        )
        at = "" if self.begin_us is None else f" at {spell_instant(self.begin_us)}"
        hint = f"; see {others}" if others else ""
        raise UsageError(
            f"{self.feature} is not closed for {self.who.spell()}{at}: "
            f"there is nothing to open{hint}"
        )

    def share(self, percent_bp: int | None, ramp_us: int | None) -> Share:
        """Return the share to let in, which holds all whom an earlier one has let in.

        Raises:
            UsageError: That would turn somebody away, or everybody is in.
        """
        asked = percent_bp or 0
        earlier = [one for one in self.same if one.action == "open" and self._lets_in(one)]
        reached = max((_reached_bp(one, self.start) for one in earlier), default=0)
        if reached == ALL_BP or (percent_bp is not None and percent_bp < reached):
            raise UsageError(
                f"{spell_percent(reached)} of {self.who.spell()} are in already, and whoever was "
                f"let in stays in: give at least as much, or close {self.feature} first"
            )
        # What is cut at a later instant is cut there exactly; now, it goes on for a moment.
        margin_us = _PUBLISHING_US if self.begin_us is None else 0
        kept = max((_reached_bp(one, self.start + margin_us) for one in earlier), default=0)
        if ramp_us is None and kept > asked:
            self.notes.append(
                f"lets in {spell_percent(kept)}: so many are in by the time it counts"
            )
        return Share(max(asked, kept), self.start, ramp_us or 0)

    def open_fully(self, summary: str, texts: Texts) -> Change:
        """End what is said of the accounts; open them above what less specific ones say."""
        broader = [
            one for one in self._closers(no_exceptions=texts.no_exceptions) if one not in self.same
        ]
        if not self.same:
            self.require_closed(no_exceptions=texts.no_exceptions)
        for one in self.same:
            if one.begin_us is not None and one.begin_us > self._now:
                self.notes.append(f"{one.id}, due {spell_instant(one.begin_us)}, is called off")
        if zero := self.zero_tiers():
            told = f"{self.base_says(zero)}: nobody gets in there; to let somebody in"
            self.notes.append(f"{told}: {self.suggest()}")
        if broader:
            return self.lay_above("open", summary, texts, self.same)
        rest = [one for one in self._all if one not in self.same]
        stay = [one for one in rest if self._stands(one, "open", self.who.specificity)]
        return next_revision(
            self._revision,
            self._revision.base,
            rest,
            now=self._now,
            actor=texts.actor,
            reason=texts.reason,
            change=summary,
            notes=self.notes,
            exceptions=stay,
        )

    def lay_above(
        self,
        action: Action,
        summary: str,
        texts: Texts,
        replaced: Iterable[Override],
        *,
        share: Share | None = None,
        quotas: Any = None,
    ) -> Change:
        """Add an override, newer than all; the replaced end where it begins."""
        added = self._build(action, texts, share, quotas)
        ended = [one for one in replaced if self._overlaps(one)]
        self._note_lost_ends(ended)
        rest = []
        for one in self._all:
            if one not in ended:
                rest.append(one)
            elif (one.begin_us or 0) < self.start and self.start > self._now:
                rest.append(replace(one, end_us=self.start))
        if action == "open":
            self._note_later_closures(rest)
        least = self.who.specificity + 1
        stay = [] if added.no_exceptions else [x for x in rest if self._stands(x, action, least)]
        undo = UNDO
        if action != "open" and not self.same and not self._broader():
            undo = f"tieredlimit open {self.feature} {options(self.who)}"
        return next_revision(
            self._revision,
            self._revision.base,
            [*rest, added],
            now=self._now,
            actor=texts.actor,
            reason=texts.reason,
            change=summary,
            notes=self.notes,
            exceptions=stay,
            undo=undo,
        )

    def _build(self, action: Action, texts: Texts, share: Share | None, quotas: Any) -> Override:
        """Build the override from the document that it will be stored as, with all its checks."""
        number = self._revision.number + 1
        unchecked = Override(
            f"{action}-{number}",
            number,
            action,
            self.feature,
            self.who,
            self.begin_us,
            self.end_us,
            share,
            quotas,
            texts.messages or {},
            texts.reason,
            texts.actor,
            texts.no_exceptions,
            self._now,
        )
        override = read_override(self.reading, "", unchecked.document())
        raise_faults(self.reading)
        return override or unchecked

    def _note_lost_ends(self, ended: Iterable[Override]) -> None:
        for one in ended:
            if self.end_us is not None and (one.end_us is None or one.end_us > self.end_us):
                self.notes.append(f"{one.id} is replaced, and does not come back when this is over")

    def _note_later_closures(self, rest: Iterable[Override]) -> None:
        for one in rest:
            if one.feature != self.feature or one.action == "open" or one.begin_us is None:
                continue
            if one.begin_us > self.start and self._overlaps(one) and self._is_below(one):
                due = spell_instant(one.begin_us)
                self.notes.append(f"{one.id}, due {due}, will not count for whom this lets in")

    def _closers(self, *, no_exceptions: bool) -> list[Override]:
        """Return what keeps the accounts from what the policy says, where the change begins."""
        return [
            one
            for one in self.alive
            if one.action != "open"
            and self._is_in_span(one)
            and (self._is_below(one) or (no_exceptions and one.who.meets(self.who)))
        ]

    def _broader(self) -> list[Override]:
        return [
            one
            for one in self.alive
            if one.action != "open" and one.who != self.who and self._is_below(one)
        ]

    def _is_below(self, one: Override) -> bool:
        """Say whether an `open` of the accounts would win over it for all of them."""
        if one.who.covers(self.who):
            return True
        return one.who.specificity < self.who.specificity and one.who.meets(self.who)

    def _is_in_span(self, one: Override) -> bool:
        return one.active(self.start) if self.end_us is None else self._overlaps(one)

    def _overlaps(self, one: Override) -> bool:
        """Say whether it is active at some instant of what the command speaks of."""
        if one.end_us is not None and one.end_us <= self.start:
            return False
        return self.end_us is None or (one.begin_us or 0) < self.end_us

    def _stands(self, one: Override, action: Action, least: int) -> bool:
        """Say whether it goes on saying something else where it is specific enough."""
        if one.feature != self.feature or one.who.specificity < least:
            return False
        if not self._overlaps(one) or not one.who.meets(self.who):
            return False
        if action == "close":
            return not one.closes
        return action == "set" or one.action != "open"

    def _lets_in(self, earlier: Override) -> bool:
        """Say whether an `open` of the same accounts counts, and nothing newer closed them."""
        if not earlier.active(self.start):
            return False
        return not any(
            one.sequence > earlier.sequence
            and one.action != "open"
            and one.active(self.start)
            and one.who.covers(self.who)
            and (one.no_exceptions or one.who.specificity >= self.who.specificity)
            for one in self.alive
        )

    def _check_names(self) -> None:
        policy, tiers = self._policy, [tier.name for tier in self._policy.tiers]
        for kind, name, known in (
            ("feature", self.feature, list(policy.features)),
            ("tier", self.who.tier, tiers),
        ):
            if name is not None and name not in known:
                hint = did_you_mean(name, known) or f"; the policy has {', '.join(known)}"
                self.reading.fault("", f"unknown {kind} {spell(name)}{hint}")
        self._note_slips()

    def _note_slips(self) -> None:
        """Note what may be said, and means nobody as a rule."""
        when, tiers = self.who.when, self._policy.tiers
        if when is None:
            return
        plans = {plan for tier in tiers if tier.when for plan in tier.when.plan or ()}
        for plan in sorted((when.plan or frozenset()) - plans):
            hint = did_you_mean(plan, sorted(plans))
            self.notes.append(f"no tier of the policy asks for the plan {spell(plan)}{hint}")
        after_us = when.created_after_us
        if after_us is not None and after_us > self._now:
            told = "as yet only accounts of unknown age count as made after it"
            self.notes.append(f"{spell_instant(after_us)} is to come: {told}")

    def _check_times(self, begin_us: int | None, end_us: int | None) -> None:
        before = len(self.reading.faults)
        for word, at in (("begin", begin_us), ("end", end_us)):
            if at is not None:
                self.reading.whole(word, at, 0, MAX_INSTANT_US)
        if len(self.reading.faults) > before:
            return
        if begin_us is not None and begin_us < self._now:
            # Of a time of day, tomorrow's may have been meant.
            self.notes.append(f"the begin, {spell_instant(begin_us)}, is past: it counts at once")
        if end_us is None:
            return
        if end_us <= self._now:
            told = f"{spell_instant(end_us)} is past: it is {spell_instant(self._now)}"
            self.reading.fault("end", told)
        elif begin_us is not None and end_us <= begin_us:
            told = f"{spell_instant(end_us)} is not after {spell_instant(begin_us)}, the begin"
            self.reading.fault("end", told)


def tiers_of(policy: Policy, who: Who) -> list[str]:
    """Return the tiers in which the policy may put those who are meant."""
    return [
        tier.name
        for tier in policy.tiers
        if who.tier in (None, tier.name) and may_both_hold(who.when, tier.when)
    ]


def spell_tiers(tiers: Sequence[str]) -> str:
    """Return the names of tiers, as an operator reads them."""
    return f"tier{'' if len(tiers) == 1 else 's'} {', '.join(tiers)}"


def spell_percent(share_bp: int) -> str:
    """Return hundredths of a percent, as an operator reads them."""
    return f"{share_bp / 100:g} %"


def _reached_bp(one: Override, now: int) -> int:
    return ALL_BP if one.share is None else one.share.bp_at(now)
