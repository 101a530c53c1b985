"""What is closed in this process, whatever is published: by the environment, and by a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tieredlimit._core.override import Override
from tieredlimit._core.policy import Policy
from tieredlimit._core.reading import did_you_mean
from tieredlimit._core.share import MAX_INSTANT_US
from tieredlimit._core.who import EVERYONE, Who
from tieredlimit.complaints import Complaints
from tieredlimit.errors import UsageError

__all__ = ["Closures", "read_closures"]

_LONGEST_FILE = 64 * 1024


class Closures:
    """Hold what is closed in this process.

    Args:
        close: What is closed from the start; None is what `TIEREDLIMIT_CLOSE` says.
        close_file: A file with lines of the same; None is what `TIEREDLIMIT_CLOSE_FILE` names.
        given: The policy by which `close` is read; None where it may say any name.
        complaints: Is told of what cannot be read, and of names that close nothing.

    Attributes:
        file: The file, None where there is none.

    Raises:
        UsageError: `close` says a feature or a tier that the given policy has not.
    """

    def __init__(
        self,
        close: str | None,
        close_file: str | Path | None,
        given: Policy | None,
        complaints: Complaints,
    ) -> None:
        close_file = close_file or os.environ.get("TIEREDLIMIT_CLOSE_FILE") or None
        if close is None:
            # Whoever has nothing else left must not find that somebody forgot to pass it on.
            close = os.environ.get("TIEREDLIMIT_CLOSE", "")
        self.file: Path | None = None if close_file is None else Path(close_file)
        self._complaints = complaints
        self._always = read_closures(close, "TIEREDLIMIT_CLOSE", given)
        self._in_file: tuple[Override, ...] = ()
        self._text = ""
        self.look()

    def all(self) -> tuple[Override, ...]:
        """Return them as overrides, which nothing that is published outdoes."""
        return (*self._always, *self._in_file)

    def look(self) -> bool:
        """Take in what the file says now; say whether that is something else."""
        if self.file is None:
            return False
        try:
            with self.file.open("rb") as file:
                text = file.read(_LONGEST_FILE).decode("utf-8-sig")
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as exc:
            self._complaints.log(f"{self.file} cannot be read: what it closed stays closed", exc)
            return False
        if text == self._text:
            return False
        self._text = text
        lines = [line.partition("#")[0] for line in text.splitlines()]
        self._in_file = read_closures(",".join(lines), str(self.file))
        return True

    def check(self, policy: Policy) -> None:
        """Complain of every name that the policy in force has not: it may be a slip."""
        for one in self.all():
            for told in _unknown(one, policy):
                what = f"{one.reason}: {_spelled(one)} closes nothing under the policy in force"
                self._complaints.log(what, UsageError(told))


def read_closures(text: str, place: str, policy: Policy | None = None) -> tuple[Override, ...]:
    """Read what is closed in this process whatever is published: `video:new, image`.

    Raises:
        UsageError: A feature or a tier is unknown to the policy, if one is given.
    """
    closures = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        feature, _, tier = (part.strip() for part in item.partition(":"))
        one = Override(
            id="local",
            # Above whatever is published, and without exceptions.
            sequence=MAX_INSTANT_US,
            action="close",
            feature=feature,
            who=Who(tier=tier) if tier else EVERYONE,
            no_exceptions=True,
            reason=place,
        )
        for told in [] if policy is None else _unknown(one, policy):
            raise UsageError(f"{place}: {told}")
        closures.append(one)
    return tuple(closures)


def _unknown(one: Override, policy: Policy) -> Iterator[str]:
    """Yield what a policy has not of the names in a closure."""
    for kind, name, known in (
        ("feature", one.feature, list(policy.features)),
        ("tier", one.who.tier, [tier.name for tier in policy.tiers]),
    ):
        if name is not None and name not in known:
            yield f'unknown {kind} "{name:.80}"{did_you_mean(name, known)}'


def _spelled(one: Override) -> str:
    tier = "" if one.who.tier is None else f":{one.who.tier:.80}"
    return f'"{one.feature:.80}{tier}"'
