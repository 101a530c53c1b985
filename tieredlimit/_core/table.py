"""The compiled table: everything about a policy that a request would otherwise work out anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from struct import pack
from zlib import crc32

from tieredlimit._core.account import Account
from tieredlimit._core.fields import policy_field
from tieredlimit._core.keys import ADDRESS, STAND_IN, key_prefix, subject_name
from tieredlimit._core.matcher import Matcher
from tieredlimit._core.policy import Policy
from tieredlimit._core.quota import Quota
from tieredlimit._core.ranking import Ranking
from tieredlimit._core.tier import Cell, Feature

_FIRST_SHARD = ":0}"


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """Hold the quotas of a cell that charge one kind of subject: their buckets share one key.

    Attributes:
        quotas: The quotas, at least one.
        per: The subject around the account that is charged, None for the account itself.
        prefix: The key without the subject, on the first shard.
        catch_all: True in the last of several tiers, where strangers land.
        tags: What stands for the quotas' names in a store, in their order.
        steps: Interval, window and clamp of each quota.
        packed: What a take of cost 1 charges, as the store's script reads it.
        packed_peek: The same for cost 0.
        parts: How many numbers the script answers with for it alone: whether, and each debt.
    """

    quotas: tuple[Quota, ...]
    per: str | None
    prefix: str
    catch_all: bool
    tags: tuple[int, ...] = field(init=False)
    steps: tuple[tuple[int, int, int], ...] = field(init=False)
    packed: bytes = field(init=False, repr=False)
    packed_peek: bytes = field(init=False, repr=False)
    parts: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # What equal quotas have in common is there once: a policy of thousands of cells, most of
        # them defaults, must fit the processor's caches.
        shared = _shared(self.quotas)
        for name in ("quotas", "tags", "steps", "packed", "packed_peek", "parts"):
            object.__setattr__(self, name, getattr(shared, name))

    def key(self, account: Account, shard: int = 0) -> str:
        """Return the key of the account's buckets on a shard.

        An account that is not within such a subject stands alone, as a subject of its own that no
        id can spell.

        Raises:
            UsageError: An id cannot be stored.
        """
        prefix = self.prefix
        if shard:
            before, _, after = prefix.partition(_FIRST_SHARD)
            prefix = f"{before}:{shard}}}{after}"
        if self.per is None:
            return prefix + subject_name(account.id, ADDRESS if account.anonymous else "")
        subject = account.within.get(self.per)
        if subject is None:
            mark = STAND_IN + ADDRESS if account.anonymous else STAND_IN
            return prefix + subject_name(account.id, mark)
        return prefix + subject_name(subject)

    def packed_for(self, cost: int) -> bytes:
        """Return what a take of `cost` charges, as the store's script reads it."""
        if cost == 1:
            return self.packed
        return self.packed_peek if cost == 0 else _packed(self.quotas, cost)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """Hold one cell, ready to be charged.

    Attributes:
        cell: What the policy says.
        feature: The feature it says it of.
        shelves: The quotas, by the subject that is charged.
        quotas: The quotas in the order of the shelves, which is the order of a reply's debts.
        most: The largest cost that can ever fit, None where there are no quotas.
        policy_field: What `RateLimit-Policy` says of the quotas.
    """

    cell: Cell
    feature: Feature
    shelves: tuple[Shelf, ...]
    quotas: tuple[Quota, ...]
    most: int | None
    policy_field: bytes


class Table:
    """Answer the three questions of a request: which feature, which tier, which cell.

    Built once per policy and namespace; never changed.

    Attributes:
        match: Returns the feature that a request is metered as, and its cost, as `Matcher.match`.
        asks_age: Whether the tier of an account may depend on when it was made.
        shards: Over how many hash tags keys are spread.
    """

    __slots__ = (
        "_entries",
        "_pers",
        "_ranking",
        "_rows",
        "asks_age",
        "match",
        "policy",
        "shards",
    )

    def __init__(self, policy: Policy, namespace: str, shards: int = 1) -> None:
        self.policy = policy
        self.shards = shards
        matcher: Matcher[tuple[str, int]] = Matcher(
            (route, (feature.name, cost))
            for feature in policy.features.values()
            for route, cost in feature.routes
        )
        self.match = matcher.match
        self._entries: dict[str, dict[str, Entry]] = {
            tier.name: {
                name: _entry(
                    cell, policy.features[name], namespace, i > 0 and i == len(policy.tiers) - 1
                )
                for name, cell in tier.cells.items()
            }
            for i, tier in enumerate(policy.tiers)
        }
        self._pers = {
            quota.per
            for tier in policy.tiers
            for cell in tier.cells.values()
            for quota in cell.quotas
            if quota.per is not None
        }
        self._rows = [self._entries[tier.name] for tier in policy.tiers]
        whens = [tier.when for tier in policy.tiers]
        self._ranking = Ranking(whens)
        self.asks_age = any(when.asks_age for when in whens if when is not None)

    def tier_of(self, account: Account, now: int) -> str:
        """Return the first tier whose `when` the account meets at the instant `now`."""
        return self.policy.tiers[self._ranking.first(account, now)].name

    def find(self, account: Account, feature: str, now: int) -> Entry | None:
        """Return the cell of an account and a feature, None if there is no such feature."""
        return self._rows[self._ranking.first(account, now)].get(feature)

    def shard_of(self, account: Account) -> int:
        """Return the shard that holds all buckets an account is charged to.

        It follows the outermost subject around the account that any quota charges, so that what
        accounts share is in one place; subjects are named from the inside out.
        """
        if self.shards == 1:
            return 0
        outermost = next((per for per in reversed([*account.within]) if per in self._pers), None)
        if outermost is None:
            name = f"{ADDRESS if account.anonymous else ''}:{account.id}"
        else:
            name = f"{outermost}:{account.within[outermost]}"
        return crc32(name.encode("utf-8", "surrogatepass")) % self.shards

    def entry(self, tier: str, feature: str) -> Entry:
        """Return the cell of a tier and a feature; a name that is not there is a KeyError."""
        return self._entries[tier][feature]

    def row(self, tier: str) -> Mapping[str, Entry]:
        """Return a tier's cells by feature."""
        return self._entries[tier]


def _entry(cell: Cell, feature: Feature, namespace: str, catch_all: bool) -> Entry:
    kinds: dict[str | None, list[Quota]] = {}
    for quota in cell.quotas:
        kinds.setdefault(quota.per, []).append(quota)
    shelves = tuple(
        Shelf(tuple(quotas), per, key_prefix(namespace, 0, cell.feature, cell.tier, per), catch_all)
        for per, quotas in kinds.items()
    )
    shared = _shared(tuple(quota for shelf in shelves for quota in shelf.quotas))
    most = min((quota.capacity for quota in shared.quotas), default=None)
    return Entry(cell, feature, shelves, shared.quotas, most, shared.policy_field)


@dataclass(frozen=True, slots=True, eq=False)
class _Shared:
    """Hold what follows from quotas alone; see `Shelf` and `Entry`."""

    quotas: tuple[Quota, ...]
    tags: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    packed: bytes
    packed_peek: bytes
    parts: int
    policy_field: bytes


@lru_cache(maxsize=16_384)
def _shared(quotas: tuple[Quota, ...]) -> _Shared:
    return _Shared(
        quotas,
        tuple(int.from_bytes(quota.tag, "little") for quota in quotas),
        tuple((quota.interval_us, quota.window_us, quota.clamp_us) for quota in quotas),
        _packed(quotas, 1),
        _packed(quotas, 0),
        1 + len(quotas),
        policy_field(quotas),
    )


def _packed(quotas: tuple[Quota, ...], cost: int) -> bytes:
    """Return per quota: the tag, then increment, window and clamp as little-endian doubles.

    All are whole microseconds below 2**53, which a double holds exactly.
    """
    packed = b"".join(
        pack(
            "<4sddd",
            quota.tag,
            float(cost * quota.interval_us),
            float(quota.window_us),
            float(quota.clamp_us),
        )
        for quota in quotas
    )
    return b"$%d\r\n%b\r\n" % (len(packed), packed)
