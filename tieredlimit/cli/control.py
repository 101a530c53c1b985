"""`tieredlimit close`, `open` and `set`: temporary changes above the policy."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from tieredlimit import overrides
from tieredlimit._core.change import Change
from tieredlimit._core.draft import tiers_of
from tieredlimit._core.revision import Revision
from tieredlimit.cli import confirm, whom
from tieredlimit.cli.instants import duration, percent
from tieredlimit.cli.publishing import Manner, Plan, carry_out
from tieredlimit.cli.session import Place, connects, policy_of, run
from tieredlimit.cli.whom import Wanted

_feature = click.argument("feature")
_no_exceptions = click.option(
    "--no-exceptions", is_flag=True, help="For those, too, of whom something else was said."
)
_dry_run = click.option("--dry-run", is_flag=True, help="Only say what would change.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_EXITS = "Exit codes: 0 done, 1 not done, 2 wrong usage, 3 nobody follows, 4 partly done."


def _common(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what all three have, in the order of their help."""
    for add in (_json, _dry_run, confirm.flag, _no_exceptions):
        command = add(command)
    return whom.explained(whom.MESSAGE(command))


@click.command("close", epilog=_EXITS)
@_feature
@whom.options
@_common
@connects
def close(
    ctx: click.Context,
    place: Place,
    /,
    feature: str,
    wanted: Wanted,
    **given: Any,
) -> None:
    """Deny FEATURE to some accounts, or all, now or for a time.

    \b
    tieredlimit close video --tier new --message "Video is paused for new accounts."
    tieredlimit close video --plan free --created-after 18:00 --for 2h
    """  # noqa: D301 -- click reads the backspace
    _publish(ctx, place, "closed", feature, wanted, overrides.close, given)


@click.command("open", epilog=_EXITS)
@_feature
@whom.options
@click.option("--percent", "percent_bp", type=percent, help="Only so many of the accounts.")
@click.option("--ramp", "ramp_us", type=duration, metavar="TIME", help="Climb to all for so long.")
@_common
@connects
def open_(ctx: click.Context, place: Place, /, feature: str, wanted: Wanted, **given: Any) -> None:
    """Let the policy decide on FEATURE again, for all of the accounts or a growing share.

    A share is sticky: whoever was let in stays in.

    \b
    tieredlimit open video --tier new --percent 10
    tieredlimit open video --tier new --ramp 30m
    """  # noqa: D301 -- click reads the backspace
    more = {"percent_bp": given.pop("percent_bp"), "ramp_us": given.pop("ramp_us")}
    _publish(ctx, place, "opened", feature, wanted, overrides.open_, given, **more)


@click.command("set", epilog=_EXITS)
@_feature
@click.argument("quotas", nargs=-1, required=True)
@whom.options
@_common
@connects
def set_(
    ctx: click.Context,
    place: Place,
    /,
    feature: str,
    quotas: tuple[str, ...],
    wanted: Wanted,
    **given: Any,
) -> None:
    """Put QUOTAS in the place of what the policy says of FEATURE, now or for a time.

    QUOTAS are written as in a policy file: a rate, 0, unlimited, a table, or several of them.

    \b
    tieredlimit set video "10/day" --tier new
    tieredlimit set image "5/minute" "50/day" --all --for 1h
    tieredlimit set video '{ rate = "200/day", capacity = 20 }' --account u1
    """  # noqa: D301 -- click reads the backspace
    cell = [_quota(text) for text in quotas]
    more = {"quotas": cell[0] if len(cell) == 1 else cell}
    _publish(ctx, place, "set", feature, wanted, overrides.set_, given, **more)


commands = (close, open_, set_)


def _publish(
    ctx: click.Context,
    place: Place,
    verb: str,
    feature: str,
    wanted: Wanted,
    change: Callable[..., Change],
    given: Mapping[str, Any],
    **more: Any,
) -> None:
    actor = whom.actor_of(given["actor"])
    messages = whom.texts_of(given["messages"])

    async def compute(head: Revision, now: int) -> Change:
        begin, end = wanted.times(now)
        return change(
            head,
            policy_of(head, place),
            feature,
            wanted.who(now),
            now=now,
            begin_us=begin,
            end_us=end,
            messages=messages,
            reason=given["reason"],
            actor=actor,
            no_exceptions=given["no_exceptions"],
            **more,
        )

    def cells(head: Revision, now: int) -> tuple[str, Sequence[str]]:
        return feature, tiers_of(policy_of(head, place), wanted.who(now))

    plan = Plan(
        verb,
        compute,
        lines=lambda _head, now: wanted.understood(now),
        cells=cells,
        counts_admitted=verb == "closed" and not _is_narrow(wanted),
    )
    manner = Manner(given["yes"], given["dry_run"], given["as_json"])
    ctx.exit(run(carry_out(place, plan, manner)))


def _is_narrow(wanted: Wanted) -> bool:
    """Say whether fewer are meant than whole tiers, as the workers count them."""
    narrow = (wanted.account, wanted.anonymous, wanted.account_age_below, wanted.account_age_above)
    instants = (wanted.created_before, wanted.created_after)
    return any(one is not None for one in (*narrow, *instants)) or bool(wanted.plans or wanted.tags)


def _quota(text: str) -> Any:
    """Read a quota as a policy file writes it, where a rate may go without its quotes.

    Raises:
        click.BadParameter: It looks like a table or a list, and is none.
    """
    text = text.strip()
    if text.lstrip("-").isdigit():
        return int(text)
    if not text.startswith(("[", "{", '"')):
        return text
    try:
        document = tomllib.loads(f"cell = {text}")
    except tomllib.TOMLDecodeError:
        document = {}
    if list(document) != ["cell"]:
        wanted = """write it as in a policy file, such as '{ rate = "200/day", capacity = 20 }'"""
        raise click.BadParameter(f"got {text!r:.80}; {wanted}", param_hint="'QUOTAS'")
    return document["cell"]
