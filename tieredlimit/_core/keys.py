"""How a subject is named in a store: bounded, and one name for one subject.

A name is the subject's UTF-8 with every byte outside `[A-Za-z0-9_.@-]` percent-encoded. A name that
would be longer than 64 bytes is replaced by `~` and a 128-bit BLAKE2b digest of the subject. The
marks before a name (`~` digest, `=` account in place of a missing group, `*` client address) are
outside that alphabet, so no subject can spell another's name, a tier, or a cluster hash tag.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from urllib.parse import quote

from tieredlimit.errors import UsageError

KEY_FORMAT = 1
"""The number in the first part of every key; another number is another way to store buckets."""

SHADOW = "~shadow"
"""Behind a tier's name: the buckets of its cells in shadow. No name holds a `~`."""

LEASES = "~lease"
"""Behind a tier's name, or a pool's: the slots that are held."""

POOL = "~pool"
"""In the place of a feature: what all its accounts share."""

RESERVATION = "~reservation"
"""The same: what was charged and may still be settled."""

ACCOUNT = ""
ADDRESS = "*"
STAND_IN = "="

_NAME_BYTES = 64
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]{1,64}").fullmatch


def key_prefix(namespace: str, shard: int, feature: str, tier: str, per: str | None) -> str:
    """Return the start of every key of one cell's buckets for one kind of subject."""
    return f"tl{KEY_FORMAT}:{{{namespace}:{shard}}}:{feature}:{tier}:{per or ''}:"


def revision_key(namespace: str, shard: int) -> str:
    """Return where a shard holds the number and the digest of its revision."""
    return f"tl{KEY_FORMAT}:{{{namespace}:{shard}}}:revision"


def reservation_key(tag: str, id: bytes) -> str:  # noqa: A002 -- the reservation's
    """Return where a reservation is noted, beside the buckets of a hash tag."""
    return f"tl{KEY_FORMAT}:{{{tag}}}:{RESERVATION}:{id.hex()}"


def subject_name(subject: str, mark: str = ACCOUNT) -> str:
    """Return the marked name of a subject.

    Raises:
        UsageError: The subject holds a lone surrogate, which no store can hold.
    """
    if _PLAIN(subject):
        return mark + subject
    try:
        raw = subject.encode()
    except UnicodeEncodeError as exc:
        raise UsageError(f"id {subject!r:.80} holds a lone surrogate at {exc.start}") from None
    if len(raw) <= _NAME_BYTES:
        # quote() leaves "~" alone, which is ours.
        name = quote(raw, safe="@").replace("~", "%7E")
        if len(name) <= _NAME_BYTES:
            return mark + name
    return f"{mark}~{blake2b(raw, digest_size=16).hexdigest()}"
