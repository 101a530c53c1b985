"""The quotas of a cell that charge one kind of subject, ready to be sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from struct import pack

from tieredlimit._core.account import Account
from tieredlimit._core.fields import policy_field
from tieredlimit._core.keys import ADDRESS, STAND_IN, NameOf, subject_name
from tieredlimit._core.quota import Quota

_FIRST_SHARD = ":0}"


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """Hold the quotas of a cell that charge one kind of subject: their buckets share one key.

    Attributes:
        quotas: The quotas, at least one.
        per: The subject around the account that is charged, None for the account itself.
        prefix: The key without the subject, on the first shard.
        catch_all: True in the last of several tiers, where strangers land.
        spelled: The key as Redis is sent it, where no subject follows the prefix: a pool's.
        name_of: Returns what stands for a subject in a key.
        tags: What stands for the quotas' names in a store, in their order.
        steps: Interval, reach and clamp of each quota.
        packed: What a take of cost 1 charges, as the store's script reads it.
        packed_peek: The same for cost 0.
        parts: How many numbers the script answers with for it alone: whether, and each debt.
    """

    quotas: tuple[Quota, ...]
    per: str | None
    prefix: str
    catch_all: bool
    spelled: bytes = b""
    name_of: NameOf = field(default=subject_name, repr=False)
    tags: tuple[int, ...] = field(init=False)
    steps: tuple[tuple[int, int, int], ...] = field(init=False)
    packed: bytes = field(init=False, repr=False)
    packed_peek: bytes = field(init=False, repr=False)
    parts: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # What equal quotas have in common is there once: a policy of thousands of cells, most of
        # them defaults, must fit the processor's caches.
        shared = shared_of(self.quotas)
        for name in ("quotas", "tags", "steps", "packed", "packed_peek", "parts"):
            object.__setattr__(self, name, getattr(shared, name))

    def key(self, account: Account, shard: int = 0) -> str:
        """Return the key of the account's buckets on a shard.

        An account that is not within such a subject stands alone, as a subject of its own that no
        id can spell.

        Raises:
            UsageError: An id cannot be stored.
        """
        if shard or self.per is not None:
            return subject_key(self.prefix, self.per, account, shard, self.name_of)
        # Almost every one; as there.
        return self.prefix + self.name_of(account.id, ADDRESS if account.anonymous else "")

    def packed_for(self, cost: int) -> bytes:
        """Return what a take of `cost` charges, as the store's script reads it."""
        if cost == 1:
            return self.packed
        return self.packed_peek if cost == 0 else _packed(self.quotas, cost)


def subject_key(
    prefix: str, per: str | None, account: Account, shard: int, name_of: NameOf = subject_name
) -> str:
    """Return the key of a subject of an account on a shard; `prefix` is for the first one.

    `name_of` returns what stands for the subject.

    Raises:
        UsageError: An id cannot be stored.
    """
    if shard:
        before, _, after = prefix.partition(_FIRST_SHARD)
        prefix = f"{before}:{shard}}}{after}"
    if per is None:
        return prefix + name_of(account.id, ADDRESS if account.anonymous else "")
    subject = account.within.get(per)
    if subject is None:
        mark = STAND_IN + ADDRESS if account.anonymous else STAND_IN
        return prefix + name_of(account.id, mark)
    return prefix + name_of(subject, "")


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """Hold what follows from quotas alone; see `Shelf`."""

    quotas: tuple[Quota, ...]
    tags: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    packed: bytes
    packed_peek: bytes
    parts: int
    policy_field: bytes


@lru_cache(maxsize=16_384)
def shared_of(quotas: tuple[Quota, ...]) -> Shared:
    """Return what equal quotas have in common, always the same one."""
    return Shared(
        quotas,
        tuple(int.from_bytes(quota.tag, "little") for quota in quotas),
        tuple((quota.interval_us, quota.reach_us, quota.clamp_us) for quota in quotas),
        _packed(quotas, 1),
        _packed(quotas, 0),
        1 + len(quotas),
        policy_field(quotas),
    )


def _packed(quotas: tuple[Quota, ...], cost: int) -> bytes:
    """Return per quota: the tag, then increment, reach and clamp as little-endian doubles.

    All are whole microseconds below 2**53, which a double holds exactly.
    """
    packed = b"".join(
        pack(
            "<4sddd",
            quota.tag,
            float(cost * quota.interval_us),
            float(quota.reach_us),
            float(quota.clamp_us),
        )
        for quota in quotas
    )
    return b"$%d\r\n%b\r\n" % (len(packed), packed)
