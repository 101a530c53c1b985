"""How a subject is named in a store: bounded, and one name for one subject.

A name is the subject's UTF-8 with every byte outside `[A-Za-z0-9_.@-]` percent-encoded. A name that
would be longer than 64 bytes is replaced by `~` and a 128-bit BLAKE2b digest of the subject. The
marks before a name (`~` digest, `=` account in place of a missing group, `*` client address) are
outside that alphabet, so no subject can spell another's name, a tier, or a cluster hash tag.

With an `IdSecret` every name is such a digest, and keyed: the store holds no id that can be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from hashlib import blake2b
from typing import NamedTuple
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

PROBE = "~probe"
"""The same: what is written to find out whether a server can be written to."""

ACCOUNT = ""
ADDRESS = "*"
STAND_IN = "="

LEAST_SECRET = 16
"""The fewest characters of an id secret: a short one can be guessed by its fingerprint."""

NameOf = Callable[[str, str], str]
"""Returns the marked name of a subject; `subject_name`, or that of an `IdSecret`."""

_NAME_BYTES = 64
_LAYOUT = re.compile(rb"format ([0-9]{1,6}), shards ([0-9]{1,6})(?:, ids ([0-9a-f]{16}))?")
_PLAIN = re.compile(r"[A-Za-z0-9_.@-]{1,64}").fullmatch


def key_prefix(namespace: str, shard: int, feature: str, tier: str, per: str | None) -> str:
    """Return the start of every key of one cell's buckets for one kind of subject."""
    return f"tl{KEY_FORMAT}:{{{namespace}:{shard}}}:{feature}:{tier}:{per or ''}:"


def revision_key(namespace: str, shard: int) -> str:
    """Return where a shard holds the number and the digest of its revision."""
    return f"tl{KEY_FORMAT}:{{{namespace}:{shard}}}:revision"


def probe_key(tag: str) -> str:
    """Return what is written to find out whether the server of a hash tag can be written to."""
    return f"tl{KEY_FORMAT}:{{{tag}}}:{PROBE}"


def reservation_key(tag: str, id: bytes) -> str:  # noqa: A002 -- the reservation's
    """Return where a reservation is noted, beside the buckets of a hash tag."""
    return f"tl{KEY_FORMAT}:{{{tag}}}:{RESERVATION}:{id.hex()}"


def nameless(key: str) -> str:
    """Return a bucket's key without the subject's name, for what is logged."""
    return key.rpartition(":")[0]


class Layout(NamedTuple):
    """Say how a namespace is laid out, for all its processes to agree upon.

    Attributes:
        shards: Over how many hash tags keys are spread.
        ids: The fingerprint of the secret that ids are hashed with, empty where they are not.
    """

    shards: int
    ids: str = ""

    def record(self) -> str:
        """Return what the store notes of it."""
        told = f"format {KEY_FORMAT}, shards {self.shards}"
        return f"{told}, ids {self.ids}" if self.ids else told

    @classmethod
    def read(cls, record: bytes) -> Layout | None:
        """Read what `record` wrote; None if it is of another format, or nothing of the kind."""
        found = _LAYOUT.fullmatch(record)
        if found is None or int(found[1]) != KEY_FORMAT:
            return None
        return cls(int(found[2]), (found[3] or b"").decode())


def subject_name(subject: str, mark: str = ACCOUNT) -> str:
    """Return the marked name of a subject.

    Raises:
        UsageError: The subject holds a lone surrogate, which no store can hold.
    """
    if _PLAIN(subject):
        return mark + subject
    raw = _encoded(subject)
    if len(raw) <= _NAME_BYTES:
        # quote() leaves "~" alone, which is ours.
        name = quote(raw, safe="@").replace("~", "%7E")
        if len(name) <= _NAME_BYTES:
            return mark + name
    return f"{mark}~{blake2b(raw, digest_size=16).hexdigest()}"


def name_by(secret: IdSecret | None) -> NameOf:
    """Return what names subjects: with a secret, or readably without one."""
    return subject_name if secret is None else secret.name


class IdSecret:
    """Name subjects so that only those who know the secret can tell, or try out, who is meant.

    Attributes:
        fingerprint: Tells two secrets apart, and gives neither away.

    Raises:
        UsageError: The secret is too short.
    """

    __slots__ = ("_keyed", "fingerprint")

    def __init__(self, secret: str) -> None:
        if type(secret) is not str or len(secret) < LEAST_SECRET:
            # Without what it is.
            raise UsageError(f"id_secret must be a string of at least {LEAST_SECRET} characters")
        key = blake2b(secret.encode("utf-8", "surrogatepass"), digest_size=32).digest()
        self._keyed = blake2b(key=key, digest_size=16, person=b"ids")
        self.fingerprint: str = blake2b(key=key, digest_size=8, person=b"fingerprint").hexdigest()

    def name(self, subject: str, mark: str = ACCOUNT) -> str:
        """Return the marked name of a subject, always a digest; as `subject_name`.

        Raises:
            UsageError: As `subject_name`.
        """
        digest = self._keyed.copy()
        digest.update(_encoded(subject))
        return f"{mark}~{digest.hexdigest()}"


def _encoded(subject: str) -> bytes:
    try:
        return subject.encode()
    except UnicodeEncodeError as exc:
        # Without the id: what goes wrong is logged.
        raise UsageError(f"an id holds a lone surrogate at {exc.start}") from None
