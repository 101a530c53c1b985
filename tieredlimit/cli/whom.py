"""The options that say whom an override means, until when, and why."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce, wraps
from typing import Any

import click

from tieredlimit._core.condition import When
from tieredlimit._core.rate import spell_instant
from tieredlimit._core.who import EVERYONE, Who
from tieredlimit.cli.instants import Moment, duration, moment
from tieredlimit.cli.terminal import printable
from tieredlimit.errors import UsageError

_TAGGED = re.compile(r"([A-Za-z]{2,3}(?:-[A-Za-z0-9]{1,8})*)=(.*)", re.DOTALL)

_INSTANT = "INSTANT"
_WHOM = (
    click.option("--tier", metavar="NAME", help="The accounts in this tier of the policy."),
    click.option("--account", metavar="ID", help="One account, whatever its tier."),
    click.option("--plan", "plans", multiple=True, metavar="PLAN", help="Of a plan; repeatable."),
    click.option("--tag", "tags", multiple=True, metavar="TAG", help="With a tag; repeatable."),
    click.option("--account-age-below", type=duration, metavar="AGE", help="Younger, such as 7d."),
    click.option("--account-age-above", type=duration, metavar="AGE", help="At least so old."),
    click.option("--created-before", type=moment, metavar=_INSTANT, help="Made before this."),
    click.option("--created-after", type=moment, metavar=_INSTANT, help="Made at this or later."),
    click.option(
        "--anonymous/--no-anonymous", default=None, help="Without an account, or with one."
    ),
    click.option("--all", "everyone", is_flag=True, help="Everybody."),
)
_WHEN = (
    click.option("--from", "begin", type=moment, metavar=_INSTANT, help="Not before this."),
    click.option("--until", "end", type=moment, metavar=_INSTANT, help="Not after this."),
    click.option("--for", "span", type=duration, metavar="TIME", help="For so long, such as 30m."),
)
_WHY = (
    click.option("--reason", default="", metavar="TEXT", help="Why, for the history."),
    click.option("--actor", metavar="NAME", help="Who does it; your login name @ host."),
)
MESSAGE = click.option(
    "--message",
    "messages",
    multiple=True,
    metavar="[LANGUAGE=]TEXT",
    help="What the denied read; repeatable with a language each: fr=TEXT.",
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Hold whom and when a command means, as typed; some of it waits for the server's clock."""

    tier: str | None
    account: str | None
    plans: Sequence[str]
    tags: Sequence[str]
    account_age_below: int | None
    account_age_above: int | None
    created_before: Moment | None
    created_after: Moment | None
    anonymous: bool | None
    everyone: bool
    begin: Moment | None
    end: Moment | None
    span: int | None

    def check(self) -> None:
        """Check what needs no clock.

        Raises:
            click.UsageError: Nobody is named, or everybody and somebody, or two ends.
        """
        named = any(
            value not in (None, ())
            for value in (self.tier, self.account, self.plans, self.tags, self.anonymous)
        ) or any(
            value is not None
            for value in (
                self.account_age_below,
                self.account_age_above,
                self.created_before,
                self.created_after,
            )
        )
        if not named and not self.everyone:
            raise click.UsageError(
                "Say whom: --tier NAME, --account ID, --plan PLAN and the like, or --all."
            )
        if named and self.everyone:
            raise click.UsageError("--all is everybody: name nobody beside it.")
        if self.end is not None and self.span is not None:
            raise click.UsageError("Give --until or --for, not both.")

    def who(self, now: int) -> Who:
        """Return who is meant.

        Raises:
            UsageError: An account stands beside other words, or the words match nobody.
        """
        if self.everyone:
            return EVERYONE
        if self.account == "":
            raise UsageError("an account's id is not empty")
        when = When(
            frozenset(self.plans) or None,
            self.account_age_below,
            self.account_age_above,
            _at(self.created_before, now),
            _at(self.created_after, now),
            frozenset(self.tags),
            self.anonymous,
        )
        return Who(self.account, self.tier, when if when.words() else None)

    def times(self, now: int) -> tuple[int | None, int | None]:
        """Return the begin and the end; `--for` counts from the begin, or from `now`."""
        begin, end = _at(self.begin, now), _at(self.end, now)
        if self.span is not None:
            end = max(begin or now, now) + self.span
        return begin, end

    def understood(self, now: int) -> list[str]:
        """Return how times of day were understood."""
        given = {
            "--created-before": self.created_before,
            "--created-after": self.created_after,
            "--from": self.begin,
            "--until": self.end,
        }
        return [
            f"{option} {one.text} is {spell_instant(one.resolve(now))}"
            for option, one in given.items()
            if one is not None and one.clock
        ]


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say whom and when; it takes the rest and a `Wanted`."""

    @wraps(command)
    def wanting(*args: Any, **given: Any) -> None:
        words = {name: given.pop(name) for name in Wanted.__slots__}
        wanted = Wanted(**words)
        wanted.check()
        command(*args, wanted=wanted, **given)

    return reduce(lambda inner, option: option(inner), reversed((*_WHOM, *_WHEN)), wanting)


def explained(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say who does it, and why."""
    return reduce(lambda inner, option: option(inner), reversed(_WHY), command)


def actor_of(given: str | None) -> str:
    """Return who does it."""
    if given is not None:
        return given
    try:
        login = getpass.getuser()
    except (KeyError, OSError):
        login = "unknown"
    return printable(f"{login}@{socket.gethostname()}")


def texts_of(messages: Sequence[str]) -> Mapping[str, str]:
    """Return messages by language tag; "" is a language not said.

    Raises:
        click.BadParameter: A language has two.
    """
    texts: dict[str, str] = {}
    for message in messages:
        found = _TAGGED.fullmatch(message)
        language, text = (found[1], found[2]) if found else ("", message)
        if language.lower() in map(str.lower, texts):
            which = f'the language "{language}"' if language else "no language"
            raise click.BadParameter(f"two texts for {which}", param_hint="'--message'")
        texts[language] = text
    return texts


def _at(one: Moment | None, now: int) -> int | None:
    return None if one is None else one.resolve(now)
