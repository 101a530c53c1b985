"""Reading a policy document: all of it, noting every fault, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from tieredlimit._core.cells import CellContent, read_cell, read_messages
from tieredlimit._core.condition import When
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.rate import parse_duration, parse_instant
from tieredlimit._core.reading import Reading, did_you_mean, join, spell
from tieredlimit._core.routes import Route, clashes
from tieredlimit._core.tier import Cell, Feature, Outage, Tier
from tieredlimit.errors import Fault, PolicyError

_Documents = dict[str, Mapping[str, Any]]


def read_document(
    document: Mapping[str, Any], source: str
) -> tuple[dict[str, Feature], tuple[Tier, ...], tuple[Fault, ...]]:
    """Return the features, the tiers in order, and the warnings of a policy document.

    Raises:
        PolicyError: It has faults; the error lists every one of them.
    """
    reading = Reading()
    top = reading.table("", document)
    reading.known("", top, ("order", "features", "defaults", "tiers", "pools"))
    if "pools" in top:
        reading.fault("pools", "is not supported yet")
    features = _read_features(reading, top.get("features", {}))
    tier_tables = _read_names(reading, "tiers", top.get("tiers", {}))
    order = _read_order(reading, top.get("order"), list(tier_tables))
    rows = _Rows(reading, list(features), tier_tables, top.get("defaults", {}))
    before = len(reading.faults)
    whens = {name: _read_when(reading, name, tier_tables[name]) for name in order}
    whens_are_sound = len(reading.faults) == before
    tiers = [Tier(name, whens[name], rows.cells(name)) for name in order]
    if whens_are_sound:
        # A `when` with a fault was read in part only: it would seem to take in more than it says.
        _check_reach(reading, tiers)
    _check_costs(reading, features, tiers)
    if reading.faults:
        raise PolicyError(reading.faults, source)
    return features, tuple(tiers), tuple(reading.warnings)


def _read_names(reading: Reading, path: str, value: Any) -> _Documents:
    """Read a table of named tables."""
    table = reading.table(path, value)
    if not table:
        reading.fault(path, "is empty: a policy without any would let everything in")
    return {
        name: reading.table(join(path, name), entry)
        for name, entry in table.items()
        if reading.name(join(path, name), name)
    }


def _read_features(reading: Reading, value: Any) -> dict[str, Feature]:
    features = {}
    placed: list[tuple[Route, str]] = []
    for name, table in _read_names(reading, "features", value).items():
        path = join("features", name)
        reading.known(path, table, ("routes", "outage", "pool", "refund_on"))
        for word in ("pool", "refund_on"):
            if word in table:
                reading.fault(join(path, word), "is not supported yet")
        routes = _read_routes(reading, join(path, "routes"), table.get("routes", []))
        placed += ((route, join(path, f'routes "{text}"')) for text, route, _ in routes)
        outage: str | None = table.get("outage", "allow")
        if outage == "local":
            reading.fault(join(path, "outage"), '"local" is not supported yet')
        else:
            outage = reading.choice(join(path, "outage"), outage, ("allow", "deny"))
        pairs = tuple((route, cost) for _, route, cost in routes)
        features[name] = Feature(name, pairs, cast(Outage, outage))  # `choice` has checked it
    for first, second in clashes([route for route, _ in placed]):
        reading.fault(placed[second][1], f"matches the same requests as {placed[first][1]}")
    return features


def _read_routes(reading: Reading, path: str, value: Any) -> list[tuple[str, Route, int]]:
    if isinstance(value, list):
        costs = [(text, 1) for text in value]
    elif isinstance(value, Mapping):
        costs = list(value.items())
    else:
        wanted = 'must be a list such as ["POST /v1/images"], or a table of costs'
        reading.fault(path, f"{wanted}, got {spell(value)}")
        return []
    routes = []
    for text, cost in costs:
        place = f"{path} {spell(text)}"
        if not isinstance(text, str):
            reading.fault(place, 'must be a route such as "POST /v1/images"')
            continue
        route = reading.parse(place, Route.parse, text)
        tokens = reading.whole(place, cost, 1, MAX_AMOUNT)
        if route is not None and tokens is not None:
            routes.append((text, route, tokens))
    return routes


def _read_order(reading: Reading, value: Any, tiers: list[str]) -> list[str]:
    """Read the order in which tiers are tried; a single tier needs none."""
    if value is None:
        if len(tiers) > 1:
            reading.fault(
                "order", f"is needed with {len(tiers)} tiers: the first that matches wins"
            )
        return tiers
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        reading.fault("order", f"must be a list of tier names, got {spell(value)}")
        return tiers
    for i, name in enumerate(value):
        if name not in tiers:
            reading.fault(f"order[{i}]", f'unknown tier "{name}"{did_you_mean(name, tiers)}')
        elif name in value[:i]:
            reading.fault(f"order[{i}]", f'"{name}" stands there twice')
    missing = [name for name in tiers if name not in value]
    for name in missing:
        reading.fault("order", f'leaves out the tier "{name}"')
    return [name for name in dict.fromkeys(value) if name in tiers] + missing


def _read_when(reading: Reading, tier: str, table: Mapping[str, Any]) -> When | None:
    if "when" not in table:
        return None
    path = f"tiers.{tier}.when"
    words = reading.table(path, table["when"])
    known = ("plan", "account_age_below", "account_age_above")
    reading.known(path, words, (*known, "created_before", "created_after", "tags", "anonymous"))
    if not words and isinstance(table["when"], Mapping):
        reading.fault(path, "is empty; leave it out in the last tier, say a word in the others")

    def read_strings(word: str) -> frozenset[str] | None:
        return reading.strings(join(path, word), words[word]) if word in words else None

    def read_age(word: str) -> int | None:
        return (
            reading.parse(join(path, word), parse_duration, words[word]) if word in words else None
        )

    def read_instant(word: str) -> int | None:
        return (
            reading.parse(join(path, word), parse_instant, words[word]) if word in words else None
        )

    anonymous = words.get("anonymous")
    if anonymous is not None and not isinstance(anonymous, bool):
        reading.fault(join(path, "anonymous"), f"must be true or false, got {spell(anonymous)}")
        anonymous = None
    when = When(
        plan=read_strings("plan"),
        account_age_below_us=read_age("account_age_below"),
        account_age_above_us=read_age("account_age_above"),
        created_before_us=read_instant("created_before"),
        created_after_us=read_instant("created_after"),
        tags=read_strings("tags") or frozenset(),
        anonymous=anonymous,
    )
    if contradiction := when.contradiction():
        reading.fault(path, f"matches nobody: {contradiction}")
    return when


class _Rows:
    """Work out a tier's cells: its own, else those of the tier it extends, else the defaults."""

    def __init__(
        self, reading: Reading, features: list[str], tiers: _Documents, defaults: Any
    ) -> None:
        self._reading = reading
        self._features = features
        self._own: dict[str, tuple[dict[str, CellContent | None], dict[str, dict[str, str]]]] = {}
        self._extends: dict[str, str] = {}
        table = reading.table("defaults", defaults)
        reading.known("defaults", table, ("quotas", "messages"))
        self._defaults = self._read("defaults", table)
        for name, tier in tiers.items():
            path = join("tiers", name)
            reading.known(path, tier, ("when", "extends", "quotas", "messages"))
            self._own[name] = self._read(path, tier)
            if "extends" in tier:
                extended = reading.choice(join(path, "extends"), tier["extends"], tiers)
                if extended:
                    self._extends[name] = extended
        for name in self._extends:
            if name in self._line(self._extends[name]):
                reading.fault(f"tiers.{name}.extends", "goes round in a circle")

    def cells(self, tier: str) -> dict[str, Cell]:
        """Return the tier's cells; a feature without one is a fault."""
        layers = [self._own[name] for name in self._line(tier)] + [self._defaults]
        cells = {}
        for feature in self._features:
            contents = [quotas[feature] for quotas, _ in layers if feature in quotas]
            if not contents:
                self._reading.fault(
                    f"tiers.{tier}.quotas.{feature}",
                    'is missing; give a quota, 0 or "unlimited", here or under [defaults]',
                )
            elif contents[0] is not None:
                quotas, unlimited = contents[0]
                messages = next((texts[feature] for _, texts in layers if feature in texts), {})
                cells[feature] = Cell(feature, tier, quotas, unlimited, messages)
        return cells

    def _line(self, tier: str) -> list[str]:
        """Return the tier, then the tiers it extends, nearest first; a circle ends the line."""
        line = [tier]
        while (above := self._extends.get(line[-1])) is not None and above not in line:
            line.append(above)
        return line

    def _read(
        self, path: str, table: Mapping[str, Any]
    ) -> tuple[dict[str, CellContent | None], dict[str, dict[str, str]]]:
        reading = self._reading
        quotas: dict[str, CellContent | None] = {}
        for feature, value in self._entries(join(path, "quotas"), table.get("quotas", {})):
            quotas[feature] = read_cell(reading, f"{path}.quotas.{feature}", feature, value)
        messages: dict[str, dict[str, str]] = {}
        for feature, value in self._entries(join(path, "messages"), table.get("messages", {})):
            texts = read_messages(reading, f"{path}.messages.{feature}", value)
            if texts:
                messages[feature] = texts
        return quotas, messages

    def _entries(self, path: str, value: Any) -> list[tuple[str, Any]]:
        """Return what a table says by feature; a name that is no feature is a fault."""
        entries = []
        for feature, entry in self._reading.table(path, value).items():
            if feature in self._features:
                entries.append((feature, entry))
            else:
                hint = did_you_mean(feature, self._features)
                self._reading.fault(join(path, feature), f'unknown feature "{feature}"{hint}')
        return entries


def _check_reach(reading: Reading, tiers: list[Tier]) -> None:
    """Note tiers that no account can reach, and a last tier that does not take everybody."""
    for i, tier in enumerate(tiers):
        path = f"tiers.{tier.name}"
        last = i == len(tiers) - 1
        if last and tier.when is not None:
            reading.fault(f"{path}.when", "the last tier takes everybody else: it has no `when`")
        elif not last and tier.when is None:
            reading.fault(path, "has no `when`, so that no account reaches the tiers after it")
        if tier.when is None:
            continue
        before = [earlier for earlier in tiers[:i] if earlier.when is not None]
        covering = [
            next((e.name for e in before if e.when and e.when.covers(part)), None)
            for part in tier.when.by_plan()
        ]
        if None not in covering:
            names = ", ".join(dict.fromkeys(str(name) for name in covering))
            reading.fault(path, f"is unreachable: every account it wants is taken by {names}")


def _check_costs(reading: Reading, features: Mapping[str, Feature], tiers: list[Tier]) -> None:
    """Warn of routes that cost more than a bucket holds: they are denied for ever."""
    for feature in features.values():
        for route, cost in feature.routes:
            for tier in tiers:
                cell = tier.cells.get(feature.name)
                for quota in cell.quotas if cell else ():
                    if cost > quota.capacity:
                        reading.warn(
                            f"tiers.{tier.name}.quotas.{feature.name}",
                            f'"{route}" costs {cost}, which never fits a capacity of '
                            f"{quota.capacity}",
                        )
