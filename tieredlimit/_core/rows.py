"""The rows of the table of tier and feature: what each tier says, what it takes from others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tieredlimit._core.cells import Content, read_cell, read_messages, read_shadow
from tieredlimit._core.reading import Reading, did_you_mean, join, spell
from tieredlimit._core.tier import Cell, Feature

DEFAULTS_WORDS = ("quotas", "shadow", "messages")
WORDS = ("when", "extends", *DEFAULTS_WORDS)

_Messages = dict[str, str]


@dataclass(slots=True)
class _Row:
    """Hold what one tier, or [defaults], says itself; None is a cell with a fault."""

    cells: dict[str, Content | None] = field(default_factory=dict)
    shadows: dict[str, Content | None] = field(default_factory=dict)
    messages: dict[str, _Messages] = field(default_factory=dict)


class Rows:
    """Work out a tier's cells: its own, else those of the tier it extends, else the defaults."""

    def __init__(
        self,
        reading: Reading,
        features: Mapping[str, Feature],
        tiers: Mapping[str, Mapping[Any, Any]],
        defaults: Any,
    ) -> None:
        self._reading = reading
        self._features = features
        table = reading.table("defaults", defaults)
        reading.known("defaults", table, DEFAULTS_WORDS)
        self._defaults = self._read("defaults", table)
        self._own: dict[str, _Row] = {}
        self._extends: dict[str, str] = {}
        for name, tier in tiers.items():
            path = join("tiers", name)
            reading.known(path, tier, WORDS)
            self._own[name] = self._read(path, tier)
            if "extends" in tier:
                extended = reading.choice(join(path, "extends"), tier["extends"], tiers)
                if extended is not None:
                    self._extends[name] = extended
        for name, extended in self._extends.items():
            line = self._line(extended)
            if name in line:
                circle = " -> ".join([name, *line[: line.index(name) + 1]])
                reading.fault(f"{join('tiers', name)}.extends", f"goes round in a circle: {circle}")

    def cells(self, tier: str) -> dict[str, Cell]:
        """Return the tier's cells; a feature without one is a fault."""
        rows = [*(self._own[name] for name in self._line(tier)), self._defaults]
        cells = {}
        for feature in self._features:
            row = next((row for row in rows if feature in row.cells), None)
            if row is None:
                self._reading.fault(
                    join(f"{join('tiers', tier)}.quotas", feature),
                    'is missing; give a quota, 0 or "unlimited", here or under [defaults]',
                )
            elif content := row.cells[feature]:
                texts = (row.messages[feature] for row in rows if feature in row.messages)
                cells[feature] = Cell(
                    feature,
                    tier,
                    content.quotas,
                    content.unlimited,
                    next(texts, {}),
                    _shadow(feature, tier, rows),
                )
        return cells

    def _line(self, tier: str) -> list[str]:
        """Return the tier, then the tiers it extends, nearest first; a circle ends the line."""
        line = {tier: None}
        above = self._extends.get(tier)
        while above is not None and above not in line:
            line[above] = None
            above = self._extends.get(above)
        return list(line)

    def _read(self, path: str, table: Mapping[Any, Any]) -> _Row:
        row = _Row()
        for word, cells, read in (
            ("quotas", row.cells, read_cell),
            ("shadow", row.shadows, read_shadow),
        ):
            for feature, place, value in self._entries(join(path, word), table.get(word, {})):
                cells[feature] = content = read(self._reading, place, feature, value)
                self._check_costs(place, self._features[feature], content)
        for feature, place, value in self._entries(
            join(path, "messages"), table.get("messages", {})
        ):
            texts = read_messages(self._reading, place, value)
            if texts is not None:
                row.messages[feature] = texts
        return row

    def _entries(self, path: str, value: Any) -> list[tuple[str, str, Any]]:
        """Return what a table says by feature, with its place; what is no feature is a fault."""
        entries = []
        for feature, entry in self._reading.table(path, value).items():
            place = join(path, feature)
            if isinstance(feature, str) and feature in self._features:
                entries.append((feature, place, entry))
            else:
                hint = did_you_mean(feature, self._features)
                self._reading.fault(place, f"unknown feature {spell(feature)}{hint}")
        return entries

    def _check_costs(self, path: str, feature: Feature, content: Content | None) -> None:
        """Warn of a route that costs more than a bucket holds: it is denied for ever."""
        if content is None or not content.quotas or not feature.routes:
            return
        least = min(quota.capacity for quota in content.quotas)
        route, cost = max(feature.routes, key=lambda pair: pair[1])
        if cost > least:
            self._reading.warn(
                path, f"{spell(str(route))} costs {cost:,}, never fits a capacity of {least:,}"
            )


def _shadow(feature: str, tier: str, rows: Iterable[_Row]) -> Cell | None:
    """Return the cell that a tier measures beside the one in force: the first row's that has one.

    Nobody ever reads a message of it.
    """
    contents = (row.shadows[feature] for row in rows if feature in row.shadows)
    content = next(contents, None)
    if content is None:
        return None
    return Cell(feature, tier, content.quotas, unlimited=False, messages={})
