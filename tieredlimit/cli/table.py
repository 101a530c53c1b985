"""`tieredlimit table`: what every tier may do with every feature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import click
from click.core import ParameterSource

from tieredlimit._core.policy import Policy
from tieredlimit._core.quota import Quota
from tieredlimit._core.rate import SECOND_US
from tieredlimit._core.reading import did_you_mean
from tieredlimit.cli import policies as policy_files
from tieredlimit.cli import pools as pool_lines
from tieredlimit.cli.grid import grid as grid_lines
from tieredlimit.cli.session import NAMED, REDIS, Failure, Place, place_of, run, session
from tieredlimit.cli.terminal import display_width, echo_json, pad, printable, width
from tieredlimit.errors import TieredLimitError

_GAP = "  "
_CORNER = "tier"
_COLOURS = {"0": "red", "unlimited": "green"}

_Grid = Mapping[str, Mapping[str, str]]
"""Cells as an operator reads them, by tier and feature."""


@click.command("table")
@policy_files.argument
@click.option("--tier", "tiers", multiple=True, help="Show this tier; may be repeated.")
@click.option("--feature", "features", multiple=True, help="Show this feature; may be repeated.")
@REDIS
@NAMED
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    policies: tuple[str, ...],
    *,
    url: str | None,
    namespace: str,
    tiers: tuple[str, ...],
    features: tuple[str, ...],
    as_json: bool,
) -> None:
    """Print what every tier may do with every feature, and what it gets of each pool.

    Tiers stand in the order in which they are tried: the first that matches wins. "10/day cap 2"
    refills at 10 a day and holds 2 at most; "+" joins quotas that must all allow; "per org" is
    charged to the account's org. Cells in shadow, which are only measured, follow below.

    Where a Redis is named, and POLICY has pools: how these stand there now.
    """
    policy = policy_files.load(policies)
    rows = _chosen("--tier", tiers, [tier.name for tier in policy.tiers])
    columns = _chosen("--feature", features, list(policy.features))
    known: pool_lines.Known = {}
    notes: list[str] = []
    if url or ctx.get_parameter_source("namespace") is ParameterSource.COMMANDLINE:
        place = place_of(ctx, url, namespace, ())
        asked_for = ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE
        known, notes = _known(place, policy, columns, asked_for=asked_for)
    if as_json:
        pools = pool_lines.document(policy, columns, rows, known)
        echo_json({**_document(policy, rows, columns), "pools": pools})
    else:
        grid = {
            row: {name: _spelled(policy.cell(row, name).spell()) for name in columns}
            for row in rows
        }
        for line in lines(grid, columns, width()):
            click.echo(line)
        for line in (
            *_shadows(policy, rows, columns),
            *pool_lines.lines(policy, columns, rows, known),
        ):
            click.echo(line)
    for note in notes:
        click.echo(printable(note), err=True)


def _known(
    place: Place, policy: Policy, features: Sequence[str], *, asked_for: bool
) -> tuple[pool_lines.Known, list[str]]:
    """Return how the pools of some features stand, and what else must be said of that.

    Raises:
        Failure: Redis does not answer, and the levels were `asked_for`.
    """
    if not pool_lines.pools_of(policy, features):
        return {}, []
    try:
        return run(_look(place, policy, features))
    except Failure as exc:
        if asked_for:
            raise
        return {}, [f"how the pools stand is unknown: {exc.message}"]


async def _look(
    place: Place, policy: Policy, features: Sequence[str]
) -> tuple[pool_lines.Known, list[str]]:
    pools = pool_lines.pools_of(policy, features)
    async with session(place) as opened:
        known = await pool_lines.levels(opened, pools.values())
        head = await opened.store.head()
        notes = []
        if opened.layout is None:
            notes.append(f'no worker has ever used the namespace "{place.namespace}"')
        if head.base is not None and _pools_stored(head.base) != pool_lines.pools_of(policy):
            told = f"the policy that is stored (revision {head.number}) has other pools"
            notes.append(f"{told}: the levels are told by POLICY's numbers")
        return known, notes


def _pools_stored(document: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the pools of a stored policy, None where this release cannot read it."""
    try:
        return pool_lines.pools_of(Policy.from_dict(document))
    except TieredLimitError:
        return None


def lines(grid: _Grid, features: Sequence[str], columns: int) -> Iterator[str]:
    """Yield the lines of a table that is at most so many columns wide.

    Features that do not fit beside each other follow in further blocks. Where one alone does not
    fit beside the tiers, all are listed below them. Only a single word is ever wider.
    """
    margin = max(map(display_width, [*grid, _CORNER]))
    room = columns - margin - len(_GAP)
    shown = [_Column.of(name, [row[name] for row in grid.values()], None) for name in features]
    if sum(column.width + len(_GAP) for column in shown) - len(_GAP) > room:
        # Half of the room, so that a cell of many quotas grows downwards, not over a block.
        shown = [
            _Column.of(name, [row[name] for row in grid.values()], room // 2) for name in features
        ]
    if any(column.width > room for column in shown):
        yield from _listing(grid, columns)
        return
    blocks = list(_blocks(shown, room))
    for i, block in enumerate(blocks):
        if i:
            yield ""
        yield from _block(list(grid), block, margin)


@dataclass(frozen=True)
class _Column:
    """Hold a feature's column: per tier, the lines of its cell."""

    feature: str
    cells: Sequence[Sequence[str]]
    width: int

    @classmethod
    def of(cls, feature: str, texts: Sequence[str], fold_at: int | None) -> _Column:
        cells = [[text] if fold_at is None else _fold(text, fold_at) for text in texts]
        parts = [line for cell in cells for line in cell]
        return cls(feature, cells, max(map(display_width, [feature, *parts])))


def _blocks(columns: Sequence[_Column], room: int) -> Iterator[list[_Column]]:
    block: list[_Column] = []
    used = 0
    for column in columns:
        if block and used + len(_GAP) + column.width > room:
            yield block
            block, used = [], 0
        used += column.width + (len(_GAP) if block else 0)
        block.append(column)
    yield block


def _block(tiers: Sequence[str], columns: Sequence[_Column], margin: int) -> Iterator[str]:
    heads = [pad(_CORNER, margin), *(pad(c.feature, c.width) for c in columns)]
    yield click.style(_GAP.join(heads).rstrip(), bold=True)
    for i, tier in enumerate(tiers):
        height = max(len(column.cells[i]) for column in columns)
        for line in range(height):
            parts = [pad("" if line else tier, margin)]
            for column in columns:
                cell = column.cells[i]
                parts.append(_coloured(cell[line] if line < len(cell) else "", column.width))
            yield _GAP.join(parts).rstrip()


def _shadows(policy: Policy, tiers: Sequence[str], features: Sequence[str]) -> Iterator[str]:
    """Yield the lines on cells in shadow, none where there are none."""
    cells = [policy.cell(tier, feature) for tier in tiers for feature in features]
    rows = [
        (cell.tier, cell.feature, _spelled(cell.shadow.spell()))
        for cell in cells
        if cell.shadow is not None
    ]
    if rows:
        yield ""
        yield from grid_lines((_CORNER, "feature", "in shadow: measured, not enforced"), rows)


def _listing(grid: _Grid, columns: int) -> Iterator[str]:
    margin = max(display_width(feature) for row in grid.values() for feature in row)
    room = columns - margin - 2 * len(_GAP)
    for i, (tier, row) in enumerate(grid.items()):
        if i:
            yield ""
        yield click.style(tier, bold=True)
        for feature, text in row.items():
            for line, part in enumerate(_fold(text, room)):
                head = pad("" if line else feature, margin)
                yield f"{_GAP}{head}{_GAP}{_coloured(part, 0)}"


def _fold(text: str, columns: int) -> list[str]:
    """Return a cell on several lines, broken before its quotas, or between words where it must."""
    folded = [""]
    for i, quota in enumerate(text.split(" + ")):
        whole = f"+ {quota}" if i else quota
        for part in [whole] if display_width(whole) <= columns else whole.split(" "):
            longer = f"{folded[-1]} {part}".lstrip()
            if not folded[-1] or display_width(longer) <= columns:
                folded[-1] = longer
            else:
                folded.append(part)
    return folded


def _coloured(text: str, columns: int) -> str:
    padding = pad("", columns - display_width(text))
    return click.style(text, fg=_COLOURS[text]) + padding if text in _COLOURS else text + padding


def _spelled(text: str) -> str:
    # A rate stands there as the policy wrote it, with whatever white space.
    return printable(" ".join(text.split()))


def _chosen(option: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the known names that are wanted, in their own order; all where none is named."""
    for name in wanted:
        if name not in known:
            hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
            raise click.BadParameter(f"got {name!r:.80}{hint}", param_hint=f"'{option}'")
    return [name for name in known if not wanted or name in wanted]


def _document(policy: Policy, tiers: Sequence[str], features: Sequence[str]) -> dict[str, object]:
    cells: dict[str, dict[str, object]] = {}
    for tier in tiers:
        cells[tier] = {}
        for feature in features:
            cell = policy.cell(tier, feature)
            cells[tier][feature] = {
                "text": cell.spell(),
                "zero": cell.zero,
                "unlimited": cell.unlimited,
                "quotas": [quota_document(quota) for quota in cell.quotas],
                "messages": dict(cell.messages),
                "shadow": None if cell.shadow is None else cell.shadow.spell(),
            }
    return {"tiers": list(tiers), "features": list(features), "cells": cells}


def quota_document(quota: Quota) -> dict[str, object]:
    """Return a quota as JSON shows it; durations are seconds."""
    return {
        "name": quota.name,
        "rate": quota.rate,
        "capacity": quota.capacity,
        "interval": quota.interval_us / SECOND_US,
        "window": quota.window_us / SECOND_US,
        "per": quota.per,
        "concurrency": quota.concurrency,
        "lease": None if quota.lease_us is None else quota.lease_us / SECOND_US,
    }
