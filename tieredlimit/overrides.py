"""Temporary changes above the policy: from one revision to the next.

Nothing is sent anywhere: each function takes the revision that is in force and returns the one to
publish. Instants are integer microseconds since 1970 on the server's clock. A ramp goes on climbing
while an operator thinks: work out a change anew, with the server's time, once it is agreed to.

For one feature and the same accounts, a later command replaces what an earlier one said about the
time they share; what is over for good is dropped from every new revision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tieredlimit._core.cells import Content, read_cell
from tieredlimit._core.change import Change, living, next_revision, options
from tieredlimit._core.difference import Difference, diff
from tieredlimit._core.draft import Draft, Texts, spell_percent, spell_tiers
from tieredlimit._core.override import Override
from tieredlimit._core.policy import Policy
from tieredlimit._core.rate import spell_duration
from tieredlimit._core.revision import Revision, plain
from tieredlimit._core.share import ALL_BP
from tieredlimit._core.tier import Cell
from tieredlimit._core.who import Who
from tieredlimit.errors import UsageError

__all__ = [
    "Change",
    "Difference",
    "close",
    "diff",
    "open_",
    "options",
    "push",
    "rollback",
    "set_",
    "undo",
]


def close(
    revision: Revision,
    policy: Policy,
    feature: str,
    who: Who,
    *,
    now: int,
    begin_us: int | None = None,
    end_us: int | None = None,
    messages: Mapping[str, str] | None = None,
    reason: str = "",
    actor: str = "",
    no_exceptions: bool = False,
) -> Change:
    """Deny a feature from `begin_us` (None: now) until `end_us` (None: until further notice).

    `policy` is the one in force below the overrides. `messages` are what the denied read, by
    language tag; "" is the tag of a language not said.

    Raises:
        UsageError: A name is unknown, an instant or a text is out of bounds, or the policy lets
            nobody in already.
        RevisionError: There would be more overrides than a revision holds.
    """
    draft = Draft(revision, policy, feature, who, now, begin_us, end_us)
    draft.check()
    zero = draft.zero_tiers()
    given = [one for one in draft.alive if one.action == "set" and one.who.meets(who)]
    if zero == draft.tiers and not given:
        raise UsageError(
            f"{draft.base_says(zero)}: nobody gets in, there is nothing to close; "
            f"to let somebody in: {draft.suggest()}"
        )
    if zero and zero != draft.tiers:
        draft.notes.append(f"{draft.base_says(zero)}, with or without this")
    texts = Texts(messages, reason, actor, no_exceptions)
    return draft.lay_above("close", f"close {feature} for {who.spell()}", texts, draft.same)


def set_(
    revision: Revision,
    policy: Policy,
    feature: str,
    who: Who,
    quotas: Any,
    *,
    now: int,
    begin_us: int | None = None,
    end_us: int | None = None,
    messages: Mapping[str, str] | None = None,
    reason: str = "",
    actor: str = "",
    no_exceptions: bool = False,
) -> Change:
    """Put `quotas`, written as in a policy document, in the place of a cell for some time.

    A quota of the same name goes on with the bucket that it finds; one of a new name starts full.

    Raises:
        UsageError: A name is unknown, an instant, a text or the quotas are wrong: all faults.
        RevisionError: There would be more overrides than a revision holds.
    """
    draft = Draft(revision, policy, feature, who, now, begin_us, end_us)
    content = read_cell(draft.reading, "quotas", feature, quotas) or Content()
    draft.check()
    draft.notes += [str(warning) for warning in draft.reading.warnings]
    cell = Cell(feature, "", content.quotas, content.unlimited, {})
    rows = [policy.cell(tier, feature) for tier in draft.tiers]
    same = [row.tier for row in rows if _content(row) == _content(cell)]
    if same:
        draft.notes.append(f"the policy says the same for {spell_tiers(same)}")
    least = min((quota.capacity for quota in cell.quotas), default=None)
    for route, cost in policy.features[feature].routes:
        if least is not None and cost > least:
            told = f"costs {cost:,}, never fits a capacity of {least:,}: it is always denied"
            draft.notes.append(f"{route} {told}")
    texts = Texts(messages, reason, actor, no_exceptions)
    summary = f"set {feature} for {who.spell()} to {cell.spell()}"
    return draft.lay_above("set", summary, texts, draft.same, quotas=plain(quotas))


def open_(
    revision: Revision,
    policy: Policy,
    feature: str,
    who: Who,
    *,
    now: int,
    begin_us: int | None = None,
    end_us: int | None = None,
    percent_bp: int | None = None,
    ramp_us: int | None = None,
    messages: Mapping[str, str] | None = None,
    reason: str = "",
    actor: str = "",
    no_exceptions: bool = False,
) -> Change:
    """Let the policy decide again, for all of the accounts or a share that only ever grows.

    Without a share and without an instant this ends what was said of the same accounts before.
    `percent_bp` lets in so many hundredths of a percent, `ramp_us` climbs for so long from there to
    everybody. Whom an earlier share of the same accounts has let in stays in, unless they were
    closed again in between.

    Raises:
        UsageError: A name is unknown, an instant, a share or a text is out of bounds, nothing
            closes the accounts, or only the policy does.
        RevisionError: There would be more overrides than a revision holds.
    """
    draft = Draft(revision, policy, feature, who, now, begin_us, end_us)
    draft.check_share(percent_bp, ramp_us)
    draft.check()
    texts = Texts(messages, reason, actor, no_exceptions)
    summary = f"open {feature} for {who.spell()}"
    opened = [one for one in draft.same if one.action == "open"]
    if ramp_us is None and percent_bp in (None, ALL_BP):
        if draft.begin_us is None and end_us is None:
            return draft.open_fully(summary, texts)
        draft.require_closed(no_exceptions=no_exceptions)
        # Shares stay below: they still hold when this is over.
        whole = [one for one in opened if one.share is None]
        return draft.lay_above("open", summary, texts, whole)
    draft.require_closed(no_exceptions=no_exceptions)
    share = draft.share(percent_bp, ramp_us)
    told = spell_percent(share.start_bp)
    if ramp_us is not None:
        told = f"from {told} to all over {spell_duration(ramp_us)}"
    shares = [one for one in opened if one.share is not None]
    return draft.lay_above("open", f"{summary}, {told}", texts, shares, share=share)


def undo(revision: Revision, previous: Revision, *, now: int, actor: str = "") -> Change:
    """Bring back what was in force under the revision before, policy and overrides.

    Raises:
        UsageError: `previous` is not older, or a text is out of bounds.
    """
    if previous.number >= revision.number:
        raise UsageError(f"revision {previous.number} is not before revision {revision.number}")
    change = f"undo revision {revision.number}"
    if previous.number < revision.number - 1:
        change = f"go back to revision {previous.number}, from revision {revision.number}"
    elif revision.change:
        change = f"{change}: {revision.change}"
    return next_revision(
        revision, previous.base, previous.overrides, now=now, actor=actor, reason="", change=change
    )


def rollback(
    revision: Revision, old: Revision, *, now: int, reason: str = "", actor: str = ""
) -> Change:
    """Bring back the policy of an older revision; the overrides of today stay.

    Raises:
        UsageError: `old` is not older, or a text is out of bounds.
        PolicyError: This release cannot use that policy.
    """
    if old.number >= revision.number:
        raise UsageError(f"revision {old.number} is not before revision {revision.number}")
    notes = []
    if old.base is None:
        notes.append(f"revision {old.number} stored no policy: each worker uses its own file")
    else:
        policy = Policy.from_dict(old.base, source=f"the policy of revision {old.number}")
        notes += _strangers(policy, revision.overrides, now)
    change = f"roll back to the policy of revision {old.number}"
    return next_revision(
        revision,
        old.base,
        revision.overrides,
        now=now,
        actor=actor,
        reason=reason,
        change=change,
        notes=notes,
    )


def push(
    revision: Revision,
    document: Mapping[str, Any],
    *,
    now: int,
    source: str = "",
    reason: str = "",
    actor: str = "",
) -> Change:
    """Store a policy document as the base; the overrides stay. `source` names it in errors.

    Raises:
        PolicyError: The document has faults: all of them.
        UsageError: A text is out of bounds.
        RevisionError: The document is larger than a revision holds.
    """
    policy = Policy.from_dict(document, source=source)
    notes = _strangers(policy, revision.overrides, now)
    change = f"push {source}" if source else "push a policy"
    return next_revision(
        revision,
        plain(document),
        revision.overrides,
        now=now,
        actor=actor,
        reason=reason,
        change=change,
        notes=notes,
    )


def _content(cell: Cell) -> tuple[object, bool]:
    return cell.quotas, cell.unlimited


def _strangers(policy: Policy, overrides: Iterable[Override], now: int) -> list[str]:
    """Return a sentence for every override of a feature or a tier that the policy does not have."""
    tiers = {tier.name for tier in policy.tiers}
    notes = []
    for one in living(overrides, now):
        if one.feature not in policy.features:
            notes.append(f"{one.id} is about the feature {one.feature}, which this policy lacks")
        elif one.who.tier is not None and one.who.tier not in tiers:
            notes.append(f"{one.id} is about the tier {one.who.tier}, which this policy lacks")
    return notes
