"""What a new policy changes for whom, and how many tokens the change hands out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tieredlimit._core.policy import Policy
from tieredlimit._core.pool import Pool
from tieredlimit._core.quota import Quota
from tieredlimit._core.rate import spell_duration
from tieredlimit._core.reading import join, spell
from tieredlimit._core.tier import Cell, Feature, Tier


@dataclass(frozen=True, slots=True)
class Difference:
    """Say what one place of a policy becomes.

    Attributes:
        path: The place, as a policy document spells it.
        before: What it says now, None where it is not there.
        after: What it will say, None where it will not be there.
        grants: Tokens that an account gets at once, at most, whose bucket is empty; None is without
            limit. Always 0 where no cell changes.
    """

    path: str
    before: str | None
    after: str | None
    grants: int | None = 0

    def __str__(self) -> str:
        if self.before is None:
            text = f"added: {self.after}" if self.after else "added"
        elif self.after is None:
            text = f"removed: {self.before}" if self.before else "removed"
        else:
            text = f"{self.before} -> {self.after}"
        if self.grants:
            tokens = f"{self.grants:,} token{'' if self.grants == 1 else 's'}"
            text = f"{text} (hands out at most {tokens} per account)"
        return f"{self.path}: {text}"


def diff(old: Policy, new: Policy) -> list[Difference]:
    """Return what differs, in the order of a policy document.

    When the numbers of a quota change, a bucket's time to full carries over: with an equal window
    the fraction used is kept, a longer window hands out the difference. A quota of a new name
    starts full, and so does one in a cell that was at zero, and whoever moves to another tier finds
    the buckets of that one. Of what is removed as a whole, the parts are not listed.
    """
    return [
        *_order(old, new),
        *_features(old.features, new.features),
        *_tiers(old.tiers, new.tiers),
    ]


def granted(before: Cell, after: Cell) -> int | None:
    """Return the tokens that whoever has an empty bucket gets when a cell becomes another.

    None is without limit.
    """
    if before.unlimited or after.zero:
        return 0
    if after.unlimited:
        return None
    kept = {(quota.per, quota.name): quota for quota in before.quotas}
    # One empty bucket denies: the others may be full, and which one is empty makes a difference.
    return max(
        (
            min(_left(kept.get((quota.per, quota.name)), quota, empty) for quota in after.quotas)
            for empty in before.quotas or (None,)
        ),
        default=0,
    )


def _left(before: Quota | None, after: Quota, empty: Quota | None) -> int:
    """Return the tokens in a bucket after the change, where that of `empty` was empty."""
    if before is None or before is not empty:
        return after.capacity
    return max(0, (after.window_us - before.window_us) // after.interval_us)


def _order(old: Policy, new: Policy) -> Iterator[Difference]:
    """Yield the order where the tiers that stay are tried in another one."""
    names, others = [tier.name for tier in old.tiers], [tier.name for tier in new.tiers]
    if [one for one in names if one in others] != [one for one in others if one in names]:
        yield Difference("order", ", ".join(names), ", ".join(others))


def _features(old: Mapping[str, Feature], new: Mapping[str, Feature]) -> Iterator[Difference]:
    for name in dict.fromkeys([*old, *new]):
        path, before, after = join("features", name), old.get(name), new.get(name)
        if before is None or after is None:
            yield Difference(path, "" if before else None, "" if after else None)
        else:
            for word, was_said, is_said in (
                ("outage", before.outage, after.outage),
                ("outage_share", _spell_share(before), _spell_share(after)),
                ("pool", *_spell_pools(before.pool, after.pool)),
                ("refund_on", _spell_refunds(before), _spell_refunds(after)),
            ):
                if was_said != is_said:
                    yield Difference(join(path, word), was_said, is_said)
        was, will = _routes(before), _routes(after)
        for route in dict.fromkeys([*was, *will]):
            if was.get(route) != will.get(route):
                place = join(join(path, "routes"), route)
                yield Difference(place, was.get(route), will.get(route))


def _tiers(old: Iterable[Tier], new: Iterable[Tier]) -> Iterator[Difference]:
    rows, others = ({tier.name: tier for tier in tiers} for tiers in (old, new))
    for name in dict.fromkeys([*rows, *others]):
        path, before, after = join("tiers", name), rows.get(name), others.get(name)
        if before is None or after is None:
            yield Difference(path, "" if before else None, "" if after else None)
        if after is None:
            continue
        was, will = _when(before), _when(after)
        if was != will:
            yield Difference(f"{path}.when", was, will)
        yield from _cells(path, before.cells if before else {}, after.cells)


def _cells(path: str, old: Mapping[str, Cell], new: Mapping[str, Cell]) -> Iterator[Difference]:
    for feature, after in new.items():
        place, before = join(f"{path}.quotas", feature), old.get(feature)
        if before is None:
            yield Difference(place, None, after.spell())
        elif (before.quotas, before.unlimited) != (after.quotas, after.unlimited):
            yield Difference(place, *_spell_both(before, after), granted(before, after))
    for feature, after in new.items():
        measured = old[feature].shadow if feature in old else None
        if measured != after.shadow:
            place = join(f"{path}.shadow", feature)
            yield Difference(place, *_spell_shadows(measured, after.shadow))
    for feature, after in new.items():
        said = old[feature].messages if feature in old else {}
        if list(said.items()) != list(after.messages.items()):
            place = join(f"{path}.messages", feature)
            yield Difference(place, _spell_texts(said), _spell_texts(after.messages))


def _spell_pools(before: Pool | None, after: Pool | None) -> tuple[str | None, str | None]:
    """Return both pools, None for one that is not there; equal ones are spelled as one is."""
    was, will = (None if one is None else f"{one.name}: {one.spell()}" for one in (before, after))
    if before == after:
        return was, was
    if before and after and was == will:
        leases, others = (_spell_leases([one.quota]) for one in (before, after))
        return f"{was}{leases}", f"{will}{others}"
    return was, will


def _spell_share(feature: Feature) -> str | None:
    """Return what each process gives out during an outage, None where that is no share."""
    return f"{float(feature.outage_share * 100):g}%" if feature.outage == "local" else None


def _spell_refunds(feature: Feature) -> str | None:
    statuses = [str(status) for status in sorted(feature.refund_on)]
    if feature.refund_on_exception:
        statuses.append("an exception")
    return ", ".join(statuses) or None


def _routes(feature: Feature | None) -> dict[str, str]:
    routes = feature.routes if feature else ()
    return {str(route): f"costs {cost:,}" for route, cost in routes}


def _when(tier: Tier | None) -> str | None:
    if tier is None:
        return None
    if tier.when is None:
        return "everybody"
    return ", ".join(tier.when.spell(word) for word in tier.when.words())


def _spell_both(before: Cell, after: Cell) -> tuple[str, str]:
    """Return both cells, with the names and the leases of their quotas where these alone differ."""
    was, will = before.spell(), after.spell()
    if was != will:
        return was, will
    leases, other_leases = (_spell_leases(cell.quotas) for cell in (before, after))
    if leases != other_leases:
        was, will = f"{was}{leases}", f"{will}{other_leases}"
    names, others = ([quota.name for quota in cell.quotas] for cell in (before, after))
    if names != others:
        was, will = f"{was} named {', '.join(names)}", f"{will} named {', '.join(others)}"
    return was, will


def _spell_leases(quotas: Iterable[Quota]) -> str:
    leases = [spell_duration(quota.lease_us) for quota in quotas if quota.lease_us is not None]
    return f" for {', '.join(leases)}"


def _spell_shadows(before: Cell | None, after: Cell | None) -> tuple[str | None, str | None]:
    """Return both cells, None for one that is not there."""
    if before and after:
        return _spell_both(before, after)
    return before.spell() if before else None, after.spell() if after else None


def _spell_texts(messages: Mapping[str, str]) -> str | None:
    """Return the texts by language, None for the built-in one."""
    texts = [f"{tag} {spell(text)}" if tag else spell(text) for tag, text in messages.items()]
    return ", ".join(texts) or None
