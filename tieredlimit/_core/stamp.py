"""What a decision tells a store about how it was prepared."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack

from tieredlimit._core.keys import revision_key

# Beyond every instant, and exact as a double.
_NEVER = 2.0**53


class Stamp:
    """Say under which revision, on which shard and for which time decisions were prepared.

    Attributes:
        tag: The hash tag of the shard's keys.
        key: Where the shard holds its revision.
        revision: The number and the digest, as the shard spells them.
        since: The decisions hold from this instant on, in microseconds on the backend's clock.
        before: They hold before this one, None for ever.
    """

    __slots__ = ("before", "key", "revision", "since", "tag")

    def __init__(
        self, namespace: str, shard: int, number: int, digest: str, since: int, before: int | None
    ) -> None:
        self.tag: str = f"{namespace}:{shard}"
        self.key: str = revision_key(namespace, shard)
        self.revision: str = f"{number} {digest}"
        self.since: int = since
        self.before: int | None = before


def prepared_for(stamp: Stamp | None, times: Sequence[tuple[int, int]]) -> bytes:
    """Return for which instants decisions of one stamp were prepared, as the script reads it.

    `times` are those that hold for some of them only. Two little-endian doubles, the last excluded;
    empty for all instants.
    """
    since, before = (0, None) if stamp is None else (stamp.since, stamp.before)
    if times:
        since = max(since, max(times)[0])
        ends = min([end for _, end in times])
        before = ends if before is None else min(before, ends)
    elif not since and before is None:
        return b""
    return pack("<dd", since, _NEVER if before is None else before)
