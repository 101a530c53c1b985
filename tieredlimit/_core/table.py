"""The compiled table: everything about a policy that a request would otherwise work out anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from zlib import crc32

from tieredlimit._core.account import Account
from tieredlimit._core.demands import Demands, PoolPart, local_shelves, slots_of
from tieredlimit._core.force import Variants, in_force, overridden
from tieredlimit._core.keys import ADDRESS, SHADOW, IdSecret, NameOf, key_prefix, name_by
from tieredlimit._core.matcher import Matcher
from tieredlimit._core.override import Override, edges
from tieredlimit._core.policy import Policy
from tieredlimit._core.pool import Pool
from tieredlimit._core.quota import Quota
from tieredlimit._core.ranking import NEAR_US, NEVER_US, Ranking, Unknowns
from tieredlimit._core.revision import NOTHING
from tieredlimit._core.shelf import Shelf, shared_of
from tieredlimit._core.stamp import Stamp
from tieredlimit._core.tally import Tallies, Tally
from tieredlimit._core.tier import Cell, Feature


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Hold one cell, ready to be charged.

    Attributes:
        cell: What the policy says, or an override in its place.
        feature: The feature it says it of.
        shelves: The quotas, by the subject that is charged.
        quotas: The quotas in the order of the shelves, which is the order of a reply's debts.
        most: The largest cost that can ever fit, None where there are no quotas.
        policy_field: What `RateLimit-Policy` says of the quotas.
        tally: Where its decisions are counted.
        variants: What else it may be, for some accounts; None if the same for all.
        closure: The override that closes it, None where it is open.
        shadow: What is measured beside it and never enforced, on buckets of its own; None for
            nothing.
        demands: What a take asks for beside the buckets, None where that is nothing.
    """

    cell: Cell
    feature: Feature
    shelves: tuple[Shelf, ...]
    quotas: tuple[Quota, ...]
    most: int | None
    policy_field: bytes
    tally: Tally
    variants: Variants[Entry] | None = None
    closure: Override | None = None
    shadow: Entry | None = None
    demands: Demands | None = None


class Table:
    """Answer the three questions of a request: which feature, which tier, which cell.

    Built once per policy and revision; never changed.

    Args:
        policy: What is in force below the overrides.
        namespace: Keeps the keys of several applications apart.
        shards: Over how many hash tags keys are spread.
        overrides: What is laid over it.
        standing: The number and the digest of the revision that both are of.
        now: The instant for which it is built; overrides that begin or end bound it.
        tallies: Where decisions are counted.
        unknowns: Where unknown plans and ages are counted.
        secret: What ids are hashed with in keys, None where they stand there as they are.

    Attributes:
        match: Returns the feature that a request is metered as, and its cost, as `Matcher.match`.
        ranking: Finds the tier of an account.
        rows: The cells by feature, for each tier in the policy's order.
        since: The first instant for which it holds, in microseconds on the backend's clock.
        before: The first one after that for which it does not, None where there is none.
        refunds: Whether any feature gives back what failed requests were charged.
        bounded: Whether there are instants for which it does not hold.
        timed: Whether a decision depends on the instant, other than by its buckets.

    Raises:
        RevisionError: An override sets quotas that cannot be read.
    """

    __slots__ = (
        *("_by_name", "_measured_pers", "_namespace", "_pers", "_stamps", "before", "bounded"),
        *("match", "overrides", "policy", "ranking", "refunds", "rows", "shards", "since"),
        *("standing", "timed"),
    )

    def __init__(
        self,
        policy: Policy,
        namespace: str,
        shards: int = 1,
        *,
        overrides: Sequence[Override] = (),
        standing: tuple[int, str] = (NOTHING.number, NOTHING.digest),
        now: int = 0,
        tallies: Tallies | None = None,
        unknowns: Unknowns | None = None,
        secret: IdSecret | None = None,
    ) -> None:
        self.policy = policy
        self.shards = shards
        self.standing = standing
        self._namespace = namespace
        matcher: Matcher[tuple[str, int]] = Matcher(
            (route, (feature.name, cost))
            for feature in policy.features.values()
            for route, cost in feature.routes
        )
        self.match: Callable[..., tuple[str, int] | None] = matcher.match
        self.refunds: bool = any(feature.refunds for feature in policy.features.values())
        self.overrides: dict[str, list[Override]] = {}
        for one in overrides:
            self.overrides.setdefault(one.feature, []).append(one)
        cells = _Cells(self, namespace, now, tallies or Tallies(), name_by(secret))
        self.rows: list[Mapping[str, Entry]] = [cells.row(i) for i in range(len(policy.tiers))]
        self._by_name = {tier.name: row for tier, row in zip(policy.tiers, self.rows, strict=True)}
        self._pers = cells.pers
        self._measured_pers = cells.pers | cells.measured_pers
        whens = [tier.when for tier in policy.tiers]
        self.ranking: Ranking = Ranking(whens, unknowns)
        self.since: int
        self.before: int | None
        self.since, self.before = edges(overrides, now)
        asks_age = any(when.asks_age for when in whens if when is not None)
        self.bounded: bool = self.since > 0 or self.before is not None
        self.timed: bool = asks_age or cells.personal or self.bounded
        self._stamps: dict[int, Stamp] = {}

    def holds(self, now: int) -> bool:
        """Say whether it is for this instant."""
        return self.since <= now and (self.before is None or now < self.before)

    def tier_of(self, account: Account, now: int) -> str:
        """Return the first tier whose `when` the account meets at the instant `now`."""
        rank = self.ranking.first(account, now)
        return self.policy.tiers[rank if rank >= 0 else ~rank].name

    def find(self, account: Account, feature: str, now: int) -> Entry | None:
        """Return the cell of an account and a feature, None if there is no such feature."""
        return self.look_up(account, feature, now)[0]

    def look_up(
        self, account: Account, feature: str, now: int
    ) -> tuple[Entry | None, tuple[int, int] | None]:
        """Return the same, and the instants around `now` for which it is sure.

        The last one is excluded; None is all for which the table is.
        """
        times: tuple[int, int] | None = None
        rank = self.ranking.first(account, now)
        if rank < 0:
            rank = ~rank
            times = self.ranking.times(account, now)
        elif self.timed:
            times = now - NEAR_US, now + NEAR_US
        entry = self.rows[rank].get(feature)
        if entry is not None and entry.variants is not None:
            entry, since, before = entry.variants.of(account, now)
            held = times or (0, NEVER_US)
            times = max(held[0], since), held[1] if before is None else min(held[1], before)
        return entry, times

    def stamp(self, shard: int) -> Stamp:
        """Return what says on a shard under which revision a decision was prepared."""
        stamp = self._stamps.get(shard)
        if stamp is None:
            stamp = self._stamps[shard] = Stamp(
                self._namespace, shard, *self.standing, self.since, self.before
            )
        return stamp

    def shard_of(self, account: Account) -> int:
        """Return the shard that holds all buckets an account is charged to.

        It follows the outermost subject around the account that any quota charges, so that what
        accounts share is in one place; subjects are named from the inside out.
        """
        return self._shard_of(account, self._pers)

    def place_of(self, account: Account, entry: Entry) -> tuple[int, int]:
        """Return the shard that holds all that a take of a cell charges, and the pool's slice.

        A pool and its features are on one shard, or on one for each slice; the slice is 0 where
        there is no pool.
        """
        pool = None if entry.demands is None else entry.demands.pool
        if pool is None:
            return self.shard_of(account), 0
        part = 0
        if len(pool.shelves) > 1:
            part = self._digest_of(account, self._pers) % len(pool.shelves)
        return pool.shards[part], part

    def measured_shard_of(self, account: Account) -> int:
        """Return the shard that holds the buckets of an account's cells in shadow.

        As `shard_of`, which must not follow a subject that only they charge: what is in force would
        move to other buckets.
        """
        return self._shard_of(account, self._measured_pers)

    def _shard_of(self, account: Account, pers: AbstractSet[str]) -> int:
        return 0 if self.shards == 1 else self._digest_of(account, pers) % self.shards

    def _digest_of(self, account: Account, pers: AbstractSet[str]) -> int:
        """Return what spreads accounts: equal for all that share a bucket."""
        outermost = next((per for per in reversed([*account.within]) if per in pers), None)
        if outermost is None:
            name = f"{ADDRESS if account.anonymous else ''}:{account.id}"
        else:
            name = f"{outermost}:{account.within[outermost]}"
        return crc32(name.encode("utf-8", "surrogatepass"))

    def entry(self, tier: str, feature: str) -> Entry:
        """Return the cell of a tier and a feature; a name that is not there is a KeyError."""
        return self._by_name[tier][feature]

    def row(self, tier: str) -> Mapping[str, Entry]:
        """Return a tier's cells by feature."""
        return self._by_name[tier]


class _Cells:
    """Build the entries of a table.

    Attributes:
        pers: The kinds of subjects that any quota charges.
        measured_pers: Those that any quota in shadow does.
        personal: Whether an override makes a cell depend on the account.
    """

    def __init__(
        self, table: Table, namespace: str, now: int, tallies: Tallies, name_of: NameOf
    ) -> None:
        self.pers: set[str] = set()
        self.measured_pers: set[str] = set()
        self.personal = False
        self._table = table
        self._namespace = namespace
        self._now = now
        self._tallies = tallies
        self._name_of = name_of
        self._parts: dict[tuple[str, str], PoolPart] = {}

    def row(self, rank: int) -> dict[str, Entry]:
        """Return the cells of a tier by feature."""
        tiers = self._table.policy.tiers
        # Where it is the only one, everybody is an account of it.
        catch_all = 0 < rank == len(tiers) - 1
        return {
            name: self._in_force(self._entry(cell, catch_all), catch_all)
            for name, cell in tiers[rank].cells.items()
        }

    def _in_force(self, base: Entry, catch_all: bool) -> Entry:
        cell = base.cell
        overrides = self._table.overrides.get(cell.feature)
        if overrides is None:
            return base

        def make(override: Override) -> Entry:
            made = self._entry(overridden(cell, override), catch_all)
            return replace(made, closure=override) if override.action == "close" else made

        found = in_force(overrides, cell.tier, base, self._now, make)
        if isinstance(found, Entry):
            return found
        self.personal = True
        return replace(base, variants=found)

    def _entry(self, cell: Cell, catch_all: bool) -> Entry:
        entry = self._demanding(self._filled(cell, cell.tier, catch_all, self.pers))
        if cell.shadow is None:
            return entry
        tier = cell.tier + SHADOW
        shadow = self._filled(cell.shadow, tier, catch_all, self.measured_pers)
        return replace(entry, shadow=shadow)

    def _demanding(self, entry: Entry) -> Entry:
        """Return a cell that may take something together with what else its takes ask for."""
        cell, pool = entry.cell, entry.feature.pool
        if cell.zero:
            return entry
        own = slots_of(cell.quotas, self._namespace, cell.feature, cell.tier)
        feature = entry.feature
        keeps_local = feature.outage == "local" and bool(entry.shelves or pool)
        if pool is None and not own and not feature.refunds and not keeps_local:
            return entry
        part = None if pool is None else self._part(pool, cell.tier)
        local = None
        if keeps_local:
            local = local_shelves(entry.shelves, part, feature.outage_share)
        demands = Demands(part, own, feature.refunds, self._name_of, local)
        if part is None:
            return replace(entry, demands=demands)
        reach = part.quota.capacity - part.quota.leave
        most = reach if entry.most is None else min(entry.most, reach)
        return replace(entry, demands=demands, most=most)

    def _part(self, pool: Pool, tier: str) -> PoolPart:
        part = self._parts.get((pool.name, tier))
        if part is None:
            part = PoolPart.of(pool, tier, self._namespace, self._table.shards)
            self._parts[pool.name, tier] = part
        return part

    def _filled(self, cell: Cell, tier: str, catch_all: bool, pers: set[str]) -> Entry:
        """Return a cell with its shelves, whose keys have this in the place of a tier."""
        kinds: dict[str | None, list[Quota]] = {}
        for quota in cell.quotas:
            kinds.setdefault(quota.per, []).append(quota)
        pers.update(per for per in kinds if per is not None)
        shelves = tuple(
            Shelf(
                tuple(quotas),
                per,
                key_prefix(self._namespace, 0, cell.feature, tier, per),
                catch_all,
                name_of=self._name_of,
            )
            for per, quotas in kinds.items()
        )
        shared = shared_of(tuple(quota for shelf in shelves for quota in shelf.quotas))
        return Entry(
            cell,
            self._table.policy.features[cell.feature],
            shelves,
            shared.quotas,
            min((quota.capacity for quota in shared.quotas), default=None),
            shared.policy_field,
            self._tallies.of(cell.feature, cell.tier),
        )
