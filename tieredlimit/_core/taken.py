"""What a take leaves behind: what is held or was charged, and the token that says it elsewhere."""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from typing import Any

from tieredlimit._core.keys import LEASES, reservation_key
from tieredlimit._core.quota import MAX_AMOUNT
from tieredlimit._core.slots import MAX_LEASE_US
from tieredlimit.errors import UsageError

POOL_KIND = "~pool"
"""What stands for a pool where other buckets have the subject that they charge."""

_FORMAT = 1
_LONGEST_TOKEN = 16_384
_MOST_PARTS = 64
_MOST_US = 2**53
# Nothing else may be spelled: what stands under other keys is none of a take's.
_HEAD = r"tl1:\{([a-z0-9_-]{1,32}:[0-9]{1,4})\}:(?:~pool|[a-z0-9_-]{1,32}):[a-z0-9_-]{1,32}"
_TAIL = r":[a-z0-9_-]{0,32}:[A-Za-z0-9_.@%~=*-]{1,72}"
# Compiled at the first token: most processes read none, and each costs at import.
_BUCKET_KEY = _HEAD + _TAIL
_SLOT_KEY = f"{_HEAD}{LEASES}{_TAIL}"


@dataclass(frozen=True, slots=True)
class Bucket:
    """Say what one bucket was charged at, so that it can be corrected later.

    Attributes:
        key: The key it stands under.
        kind: The subject that it charges, "" for the account itself, `~pool` for a pool.
        tag: The four bytes that stand for its quota's name.
        interval_us: Microseconds that a token cost.
        clamp_us: How far from full it may get.
    """

    key: str
    kind: str
    tag: bytes
    interval_us: int
    clamp_us: int


@dataclass(frozen=True, slots=True)
class Taken:
    """Say what a take has charged, what it holds, and where.

    Attributes:
        id: The 16 bytes that name it.
        feature: What was taken.
        tier: In which tier.
        cost: The tokens that every bucket was charged.
        buckets: The buckets.
        slots: The key and the lease in microseconds of each slot that is held.
        record: Where the reservation is noted, empty where what was charged is final.
    """

    id: bytes
    feature: str
    tier: str
    cost: int
    buckets: tuple[Bucket, ...]
    slots: tuple[tuple[str, int], ...]
    record: str

    def token(self) -> str:
        """Return it as text, safe in a URL. It holds the keys: the account's id, readable."""
        buckets = [[b.key, b.kind, b.tag.hex(), b.interval_us, b.clamp_us] for b in self.buckets]
        document = {
            "v": _FORMAT,
            "id": self.id.hex(),
            "f": self.feature,
            "t": self.tier,
            "c": self.cost,
            "b": buckets,
            "s": [list(slot) for slot in self.slots],
            "r": self.record,
        }
        text = json.dumps(document, separators=(",", ":"))
        return urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def read(cls, token: str, namespace: str) -> Taken:
        """Read a token of a namespace.

        Raises:
            UsageError: It is none, or one of another namespace.
        """
        if type(token) is not str or len(token) > _LONGEST_TOKEN:
            raise UsageError(f"a token is a string of at most {_LONGEST_TOKEN:,} characters")
        try:
            text = urlsafe_b64decode(token + "=" * (-len(token) % 4))
            taken = _taken(json.loads(text))
        except (Base64Error, ValueError, TypeError, KeyError, RecursionError) as exc:
            raise UsageError(f"{token!r:.40} is no token of a take") from exc
        if not taken.is_within(namespace):
            raise UsageError(f'the token {token!r:.40} is not of the namespace "{namespace}"')
        return taken

    def is_within(self, namespace: str) -> bool:
        """Say whether it names keys of a take in a namespace alone, all with one hash tag."""
        found = [re.fullmatch(_BUCKET_KEY, bucket.key) for bucket in self.buckets]
        found += [re.fullmatch(_SLOT_KEY, key) for key, _ in self.slots]
        if not found:
            return not self.record  # of what is unlimited
        tags = {match and match[1] for match in found}
        (tag,) = tags if len(tags) == 1 else (None,)
        if tag is None or tag.partition(":")[0] != namespace:
            return False
        return self.record in ("", reservation_key(tag, self.id))


def _taken(document: Any) -> Taken:
    """Build what a document says.

    Raises:
        ValueError, TypeError, KeyError: It is of another kind.
    """
    if document["v"] != _FORMAT:
        raise ValueError("another format")
    id_, feature, tier = document["id"], document["f"], document["t"]
    buckets = tuple(
        Bucket(
            _text(key),
            _text(kind),
            _bytes(tag, 4),
            _whole(interval, _MOST_US),
            _whole(clamp, _MOST_US),
        )
        for key, kind, tag, interval, clamp in document["b"]
    )
    slots = tuple((_text(key), _whole(lease, MAX_LEASE_US)) for key, lease in document["s"])
    if len(buckets) > _MOST_PARTS or len(slots) > _MOST_PARTS:
        raise ValueError("too many parts")
    cost = document["c"]
    if type(cost) is not int or not 0 <= cost <= MAX_AMOUNT:
        raise ValueError("a cost out of bounds")
    return Taken(
        _bytes(id_, 16), _text(feature), _text(tier), cost, buckets, slots, _text(document["r"])
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    return value


def _bytes(value: Any, length: int) -> bytes:
    read = bytes.fromhex(_text(value))
    if len(read) != length:
        raise ValueError("another length")
    return read


def _whole(value: Any, most: int) -> int:
    if type(value) is not int or not 0 < value <= most:
        raise ValueError("out of bounds")
    return value
