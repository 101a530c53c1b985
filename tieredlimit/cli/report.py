"""What a change is, before and after it is published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click

from tieredlimit._core.change import Change
from tieredlimit.backends.control import Published
from tieredlimit.cli.fleet import Fleet, named
from tieredlimit.cli.rates import Sample, spell_rate
from tieredlimit.cli.spelled import (
    brief,
    override_document,
    revision_document,
    sentence,
)
from tieredlimit.cli.terminal import count, printable

Cells = tuple[str, Sequence[str]]
"""A feature and the tiers concerned."""

_STAYS = {"closed": "stays open", "opened": "stays as it is"}
_SHOWN = 10
# Seconds; workers are heard every second.
_SILENT = 2.0


def preview(
    change: Change, now: int, taken: Sample | None, cells: Cells | None, verb: str
) -> Iterator[str]:
    """Yield what an operator should read before agreeing."""
    made = change.revision
    yield printable(made.change)
    for one in change.added:
        if one.sequence < made.number:  # by an undo
            yield printable(f"brings back {sentence(one, now)}")
            continue
        if one.begin_us is not None or one.end_us is not None:
            begin = "now" if one.begin_us is None else brief(one.begin_us)
            end = "further notice" if one.end_us is None else brief(one.end_us)
            yield f"from {begin} until {end}"
        for language, text in one.messages.items():
            yield printable(f"message{f' ({language})' if language else ''}: {text}")
    kept = {one.id: one for one in made.overrides}
    for one in change.ended:
        moved = kept.get(one.id)
        told = f"ends {sentence(one, now)}"
        if moved is not None:
            end = "" if moved.end_us is not None else ", until further notice"
            told = f"moves the end of {sentence(moved, now)}{end}"
        yield printable(told)
    if taken is not None and cells is not None:
        yield sampled(taken, cells, verb, all_of_it=_is_whole(change))
    stays = _STAYS.get(verb, "stays as it is")
    for one in change.exceptions[:_SHOWN]:
        yield click.style(printable(f"{stays}: {sentence(one, now)}"), fg="yellow")
    if len(change.exceptions) > _SHOWN:
        yield f"{stays}: {len(change.exceptions) - _SHOWN} more, see tieredlimit overrides"
    for note in change.notes:
        yield click.style(printable(f"note: {note}"), fg="yellow")


def sampled(taken: Sample, cells: Cells, verb: str, *, all_of_it: bool) -> str:
    """Return what a sample says of the accounts concerned."""
    feature, tiers = cells
    allowed = taken.of(feature, tiers, "allowed")
    source = f"sample of 1 s from {taken.workers} of {count(taken.live, 'worker')}"
    if not taken.workers:
        return "nobody knows how many requests that concerns: no worker was heard twice"
    if verb == "closed":
        told = f"would deny {'' if all_of_it else 'at most '}{spell_rate(allowed)}"
    elif verb == "opened":
        told = f"denied now: {spell_rate(taken.of(feature, tiers, 'closed'))}"
    else:
        told = f"admitted now: {spell_rate(allowed)}"
    others = "other features unchanged" if all_of_it and len(tiers) > 1 else "all else unchanged"
    return f"{told} ({source}) · {others}"


def _is_whole(change: Change) -> bool:
    """Say whether whole tiers are meant, as the workers count them."""
    return all(one.who.specificity <= 1 for one in change.added) and not change.exceptions


@dataclass(frozen=True, slots=True)
class Report:
    """Hold what came of a change; without `published` it was only tried."""

    verb: str
    change: Change
    fleet: Fleet
    published: Published | None
    admitted: int | None
    taken: Sample | None
    cells: Cells | None
    suffix: str

    def lines(self) -> Iterator[str]:
        """Yield the last lines of a command."""
        fleet, parts = self.fleet, [click.style(self.verb, bold=True)]
        begins = [one.begin_us for one in self.change.added if one.begin_us is not None]
        if begins:
            parts.append(f"from {brief(min(begins))} on")
        parts.append(fleet.count())
        if self.admitted is not None and not begins:
            parts.append(f"admitted since: {self.admitted:,}")
        if self.published is not None and self.published.replicas:
            parts.append(f"on {count(self.published.replicas, 'replica')}")
        parts.append(f"undo: {self.undo()}")
        yield " · ".join(parts)
        if self.admitted and self.change.exceptions:
            yield "admitted by the exceptions named above, or just before a worker followed"
        if not fleet.workers:
            yield "nobody follows: no worker lives in this namespace; those that start will"
        behind = fleet.behind()
        if silent := [one for one in behind if one.age >= _SILENT]:
            yield f"not heard since: {named(silent)}; gone, or cut off from Redis"
        if late := [one for one in behind if one.age < _SILENT]:
            yield f"not on it: {named(late)}; run tieredlimit status to look again"

    def document(self, now: int) -> dict[str, Any]:
        """Return it as JSON shows it."""
        change, fleet = self.change, self.fleet
        return {
            "namespace": fleet.namespace,
            "label": fleet.label,
            "done": self.verb if self.published else None,
            "revision": revision_document(change.revision),
            "added": [override_document(one, now) for one in change.added],
            "ended": [override_document(one, now) for one in change.ended],
            "exceptions": [override_document(one, now) for one in change.exceptions],
            "notes": list(change.notes),
            "sample": self._sample(),
            "workers": {
                "live": len(fleet.workers),
                "following": len(fleet.followers()),
                "behind": [f"{one.host}:{one.pid}" for one in fleet.behind()],
            },
            "shards": self.published and self.published.shards,
            "replicas": self.published and self.published.replicas,
            "admitted_since": self.admitted,
            "undo": self.undo(),
        }

    def undo(self) -> str:
        """Return the command line that takes it back, in the same place."""
        return self.change.undo + self.suffix

    def _sample(self) -> dict[str, Any] | None:
        if self.taken is None or self.cells is None:
            return None
        return {
            "seconds": 1,
            "workers": self.taken.workers,
            "live": self.taken.live,
            **{
                outcome: round(self.taken.of(*self.cells, outcome), 3)
                for outcome in ("allowed", "closed")
            },
        }
