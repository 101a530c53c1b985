"""Changing what is in force, live, for every process of a namespace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypedDict, Unpack

from tieredlimit import overrides
from tieredlimit._core.change import Change
from tieredlimit._core.condition import When, read_when
from tieredlimit._core.override import Override
from tieredlimit._core.policy import Policy
from tieredlimit._core.reading import Reading
from tieredlimit._core.revision import NOTHING, Revision
from tieredlimit._core.who import Who
from tieredlimit.backends.control import ControlStore
from tieredlimit.errors import ConflictError, UsageError
from tieredlimit.follow import sound_head

__all__ = ["Control", "Given"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
# How often a change is worked out anew because somebody else was first.
_ATTEMPTS = 5


class Given(TypedDict, total=False):
    """What every change may be told: who is meant, from when until when, and what is said of it."""

    account: str | None
    tier: str | None
    when: Mapping[str, Any] | When | None
    everyone: bool
    begin: datetime | None
    until: datetime | None
    message: str | Mapping[str, str] | None
    reason: str
    actor: str


class Control:
    """Close, open and set features, as the commands of the same names do.

    Once a change has returned, no decision that the store can answer is made by what was in force
    before. Who is meant is `tier`, `account`, `when`, `tier` and `when`, or `everyone=True`. Times
    are instants with a time zone; None is at once, and until further notice. `message` is what the
    denied read, or a mapping of it by language.

    Every change raises `BackendError` where the store cannot be reached or not all of it has heard
    (run it again), `UsageError` where it makes no sense, with what would, and `ConflictError` where
    others keep changing things meanwhile; then nothing was changed.
    """

    def __init__(
        self,
        store: ControlStore,
        policy: Callable[[], Policy],
        standing: Callable[[], Revision] = lambda: NOTHING,
    ) -> None:
        self._store = store
        self._policy = policy
        self._standing = standing

    async def close(
        self, feature: str, *, no_exceptions: bool = False, **given: Unpack[Given]
    ) -> Change:
        """Deny a feature; `no_exceptions` also to those of whom something else was said before."""
        return await self._change(overrides.close, feature, given, no_exceptions=no_exceptions)

    async def open(
        self,
        feature: str,
        *,
        percent: float | None = None,
        ramp: timedelta | None = None,
        **given: Unpack[Given],
    ) -> Change:
        """Let the policy decide again: for all who are meant, or a share that may climb to all."""
        share = {
            "percent_bp": None if percent is None else round(percent * 100),
            "ramp_us": None if ramp is None else ramp // _MICROSECOND,
        }
        return await self._change(overrides.open_, feature, given, **share)

    async def set(self, feature: str, quotas: Any, **given: Unpack[Given]) -> Change:
        """Put quotas in the policy's place, written as in a policy file."""

        def set_(revision: Revision, policy: Policy, feature: str, who: Who, **rest: Any) -> Change:
            return overrides.set_(revision, policy, feature, who, quotas, **rest)

        return await self._change(set_, feature, given)

    async def undo(self, *, actor: str = "") -> Change:
        """Go back to what was in force before the latest change.

        Raises:
            UsageError: Nothing was changed yet, or what was before is not kept any more.
        """
        head = await sound_head(self._store, self._standing)
        if not head.number:
            raise UsageError("nothing was ever changed: there is nothing to undo")
        before = [one for one in await self._store.history() if one.number < head.number]
        if not before and head.number > 1:
            raise UsageError(f"what was before revision {head.number} is not kept any more")
        previous = before[0] if before else Revision(0)
        change = overrides.undo(head, previous, now=await self._store.now(), actor=actor)
        await self._store.publish(change.revision, seen=head)
        return change

    async def in_force(self) -> Revision:
        """Return the revision in force, with its overrides; its number is 0 if there is none."""
        return await self._store.head()

    async def overrides(self) -> tuple[Override, ...]:
        """Return the overrides that are in force or will be."""
        return (await self._store.head()).overrides

    async def history(self, most: int = 50) -> list[Revision]:
        """Return the latest revisions, newest first."""
        return await self._store.history(most)

    async def _change(
        self, operation: Callable[..., Change], feature: str, given: Mapping[str, Any], **rest: Any
    ) -> Change:
        arguments = _arguments(dict(given))
        who = arguments.pop("who")
        for attempt in range(_ATTEMPTS):
            head = await sound_head(self._store, self._standing)
            policy = self._policy() if head.base is None else Policy.from_dict(head.base)
            now = await self._store.now()
            change = operation(head, policy, feature, who, now=now, **arguments, **rest)
            if change.revision.digest == head.digest:
                return change  # it is so already
            try:
                await self._store.publish(change.revision, seen=head)
            except ConflictError:
                if attempt == _ATTEMPTS - 1:
                    raise
            else:
                return change
        raise AssertionError  # the last attempt has returned or raised


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return what the operations of `tieredlimit.overrides` take."""
    who = [given.pop(word, None) for word in ("account", "tier", "when")]
    when = who[2]
    if isinstance(when, Mapping):
        reading = Reading()
        when = read_when(reading, "when", when)
        if reading.faults:
            raise UsageError("; ".join(map(str, reading.faults)))
    everyone = given.pop("everyone", False)
    if everyone == any(word is not None for word in who):
        raise UsageError("say who is meant: account, tier, when, or everyone=True alone")
    arguments: dict[str, Any] = {"who": Who(who[0], who[1], when)}
    for word, name in (("begin", "begin_us"), ("until", "end_us")):
        instant = given.pop(word, None)
        if instant is not None:
            if not isinstance(instant, datetime) or instant.utcoffset() is None:
                raise UsageError(f"{word} must be a datetime with a time zone, got {instant!r:.80}")
            arguments[name] = (instant - _EPOCH) // _MICROSECOND
    message = given.pop("message", None)
    if message is not None:
        arguments["messages"] = {"": message} if isinstance(message, str) else dict(message)
    for word in ("reason", "actor"):
        if word in given:
            arguments[word] = given.pop(word)
    if given:
        raise UsageError(f"unknown argument {next(iter(given))!r:.80}")
    return arguments
