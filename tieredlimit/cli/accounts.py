"""An account on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import click

from tieredlimit._core.account import Account
from tieredlimit.cli.terminal import printable
from tieredlimit.errors import UsageError

ANYBODY = "anybody"
"""Stands for an account whose id was not given."""


def account_of(
    account_id: str | None,
    plan: str | None,
    created_at: datetime | None,
    tags: Iterable[str],
    within: Iterable[str],
    anonymous: bool,
) -> Account:
    """Return the account that the options of a command describe.

    Raises:
        click.UsageError: There can be none.
    """
    name = ANYBODY if account_id is None else account_id
    subjects = dict(_subject(text) for text in within)
    try:
        return Account(name, plan, created_at, frozenset(tags), subjects, anonymous=anonymous)
    except UsageError as exc:
        raise click.UsageError(printable(str(exc))) from exc


def _subject(text: str) -> tuple[str, str]:
    name, equals, subject = text.partition("=")
    if not (name and equals and subject):
        wanted = "write NAME=ID, such as org=o7"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}", param_hint="'--within'")
    return name, subject
