"""Who is charged."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from tieredlimit.errors import UsageError

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NO_TAGS: frozenset[str] = frozenset()
_NOT_WITHIN: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True, init=False)
class Account:
    """Name who is charged, and what billing says about them.

    Attributes:
        id: Any non-empty string; two accounts share buckets only if their ids are equal.
        plan: What billing calls the account's plan. None is an unknown plan: only tiers that do
            not ask for one can match.
        created_at: When the account was made, with a time zone. None is unknown and counts as new.
        tags: Labels a tier may ask for.
        within: Subjects around the account that are charged as well, such as `{"org": "o7"}`, from
            the inside out: `{"team": "t1", "org": "o7"}`. Always name all that a quota charges.
        anonymous: True for somebody without an account, whose id is a client address. An anonymous
            id never shares a bucket with an account of the same id.

    Raises:
        UsageError: An id is empty or no string, `created_at` is no instant with a time zone, or
            another attribute has the wrong type.
    """

    id: str
    plan: str | None = None
    created_at: datetime | None = None
    tags: Collection[str] = field(default=_NO_TAGS, hash=False)
    within: Mapping[str, str] = field(default_factory=dict, hash=False)
    anonymous: bool = field(default=False, kw_only=True)

    def __init__(
        self,
        id: str,  # noqa: A002 -- the attribute's name
        plan: str | None = None,
        created_at: datetime | None = None,
        tags: Collection[str] = _NO_TAGS,
        within: Mapping[str, str] = _NOT_WITHIN,
        *,
        anonymous: bool = False,
    ) -> None:
        # Made for every metered request: what is usual passes without a call.
        if type(id) is not str or not id or not id.isascii():
            _require_id("account id", id)
        if plan is not None and not isinstance(plan, str):
            raise UsageError(f"plan must be a string or None, got {_told(plan)}")
        if within is _NOT_WITHIN:
            within = {}  # one of its own
        elif within or type(within) is not dict:
            _require_within(within)
        if tags is not _NO_TAGS:
            _require_tags(tags)
        if created_at is not None:
            _require_instant(created_at)
        _set_id(self, id)
        _set_plan(self, plan)
        _set_created_at(self, created_at)
        _set_tags(self, tags)
        _set_within(self, within)
        _set_anonymous(self, anonymous)

    def created_us(self) -> int | None:
        """Return when the account was made, in microseconds since the epoch; None is unknown."""
        if self.created_at is None:
            return None
        return (self.created_at - _EPOCH) // _MICROSECOND


# A frozen dataclass' own way to set an attribute costs half as much again.
_set_id, _set_plan, _set_created_at, _set_tags, _set_within, _set_anonymous = (
    vars(Account)[name].__set__
    for name in ("id", "plan", "created_at", "tags", "within", "anonymous")
)


def _require_id(place: str, value: object) -> None:
    if not isinstance(value, str):
        # Not what: the text ends up in logs.
        raise UsageError(f"{place} must be a string, got {type(value).__name__}")
    if not value:
        raise UsageError(f"{place} must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        told = f"it holds a lone surrogate at {exc.start}"
        raise UsageError(f"{place} must be text that UTF-8 can hold: {told}") from None


def _require_within(within: object) -> None:
    if not isinstance(within, Mapping):
        raise UsageError(f"within must be a mapping, got {type(within).__name__}")
    for per, subject in within.items():
        _require_id(f"within[{per!r:.80}]", subject)


def _require_instant(created_at: object) -> None:
    if not isinstance(created_at, datetime):
        raise UsageError(f"created_at must be a datetime or None, got {_told(created_at)}")
    if created_at.utcoffset() is None:
        raise UsageError(f"created_at must have a time zone, got {created_at.isoformat()}")


def _require_tags(tags: object) -> None:
    if isinstance(tags, str) or not isinstance(tags, Collection):
        raise UsageError(f"tags must be a collection of strings, got {_told(tags)}")
    for tag in tags:
        if not isinstance(tag, str):
            raise UsageError(f"tags must be strings, got {_told(tag)}")


def _told(value: object) -> str:
    return f"{type(value).__name__} {value!r:.80}"
