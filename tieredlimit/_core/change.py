"""The step from one revision to the next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tieredlimit._core.override import Override
from tieredlimit._core.reading import Reading
from tieredlimit._core.revision import Revision
from tieredlimit._core.share import ALL_BP
from tieredlimit._core.who import EVERYONE, MAX_TEXT, Who, read_text
from tieredlimit.errors import UsageError

UNDO = "tieredlimit undo"
"""The command that takes back any change."""


@dataclass(frozen=True, slots=True)
class Change:
    """Say what a command changes, before anything is published.

    Attributes:
        revision: The revision to publish.
        added: The overrides it brings.
        ended: The overrides it ends, or whose end it moves, as they were.
        exceptions: More specific overrides that go on as they are: what stays open despite a
            `close`, stays closed despite an `open`, stays otherwise despite a `set`.
        notes: Sentences that the operator should read first.
        undo: The command line that takes it back.
    """

    revision: Revision
    added: tuple[Override, ...] = ()
    ended: tuple[Override, ...] = ()
    exceptions: tuple[Override, ...] = ()
    notes: tuple[str, ...] = ()
    undo: str = UNDO


def next_revision(
    revision: Revision,
    base: Mapping[str, Any] | None,
    overrides: Iterable[Override],
    *,
    now: int,
    actor: str,
    reason: str,
    change: str,
    notes: Iterable[str] = (),
    exceptions: Iterable[Override] = (),
    undo: str = UNDO,
) -> Change:
    """Return the change to a revision of this content, without the overrides that are over.

    Raises:
        UsageError: A text is out of bounds.
        RevisionError: The revision is larger than a store should be given.
    """
    reading = Reading()
    read_text(reading, "actor", actor)
    read_text(reading, "reason", reason)
    raise_faults(reading)
    kept = tuple(living(overrides, now))
    made = Revision(revision.number + 1, base, kept, actor, reason, now, change[:MAX_TEXT])
    made.to_json()
    told = list(notes)
    if made.digest == revision.digest:
        told.append("nothing changes: the same is in force already")
    before = {one.id: one for one in living(revision.overrides, now)}
    after = {one.id: one for one in kept}
    added = tuple(one for one in kept if one.id not in before)
    ended = tuple(one for one in before.values() if after.get(one.id) != one)
    return Change(made, added, ended, tuple(exceptions), tuple(told), undo)


def living(overrides: Iterable[Override], now: int) -> list[Override]:
    """Return the overrides without those that can never again make a difference.

    These are the ones whose end has passed, and an `open` that lets everybody in for good together
    with what it was made to open.
    """
    alive = [one for one in overrides if one.end_us is None or now < one.end_us]
    finished = [one for one in alive if _is_finished(one, now)]
    for opened in finished:
        alive = [one for one in alive if not _is_buried(one, opened, alive)]
    return [one for one in alive if one not in finished or _is_needed(one, alive)]


def options(who: Who) -> str:
    """Return who is meant as the options of a command, quoted for a shell."""
    if who == EVERYONE:
        return "--all"
    words: list[str] = []
    for option, name in (("--account", who.account), ("--tier", who.tier)):
        words += [] if name is None else [option, name]
    for word, said in who.document().get("when", {}).items():
        option = f"--{word.replace('_', '-')}"
        if word == "anonymous":
            words.append(option if said else "--no-anonymous")
        elif word in {"plan", "tags"}:
            words += [part for one in said for part in (option.removesuffix("s"), one)]
        else:
            words += [option, said]
    return shlex.join(words)


def raise_faults(reading: Reading) -> None:
    """Raise a UsageError that lists every fault, if there is one."""
    if len(reading.faults) == 1:
        raise UsageError(str(reading.faults[0]))
    if reading.faults:
        lines = [f"{len(reading.faults)} faults", *(f"  {fault}" for fault in reading.faults)]
        raise UsageError("\n".join(lines))


def _is_finished(one: Override, now: int) -> bool:
    """Say whether an `open` lets in all whom it means, from now on for ever."""
    if one.action != "open" or one.end_us is not None or not one.active(now):
        return False
    return one.share is None or one.share.bp_at(now) == ALL_BP


def _is_buried(one: Override, opened: Override, alive: Iterable[Override]) -> bool:
    """Say whether a finished `open` of the same accounts hides this override for ever."""
    if (one.feature, one.who) != (opened.feature, opened.who) or one.sequence >= opened.sequence:
        return False
    if not one.no_exceptions or opened.no_exceptions:
        return True
    # It goes on keeping older, more specific overrides from counting.
    return not any(
        other.feature == one.feature
        and other.sequence < one.sequence
        and other.who.specificity > one.who.specificity
        and other.who.meets(one.who)
        for other in alive
    )


def _is_needed(opened: Override, alive: Iterable[Override]) -> bool:
    """Say whether something would count for the accounts without this finished `open`."""
    return any(_hides(opened, one) for one in alive)


def _hides(opened: Override, one: Override) -> bool:
    if one.feature != opened.feature or one.action == "open" or not one.who.meets(opened.who):
        return False
    if one.who.specificity < opened.who.specificity:
        return True
    if one.sequence > opened.sequence:
        return False
    return opened.no_exceptions or one.who.specificity == opened.who.specificity
