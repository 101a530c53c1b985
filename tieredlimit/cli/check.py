"""`tieredlimit check`: is this policy sound?"""

from __future__ import annotations

from collections.abc import Sequence

import click

from tieredlimit._core.policy import Policy
from tieredlimit.cli import policies as policy_files
from tieredlimit.cli.pools import pools_of
from tieredlimit.cli.terminal import count, echo_json, printable
from tieredlimit.errors import Fault, PolicyError


@click.command("check")
@policy_files.argument
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, policies: tuple[str, ...], *, strict: bool, as_json: bool) -> None:
    """Print every fault and warning of a policy, with its place.

    Exit codes: 0 sound, 1 faults (with --strict, warnings too), 2 wrong usage.
    """
    try:
        policy = Policy.load(*policies)
    except PolicyError as exc:
        if as_json:
            echo_json(_document(policies, exc.faults, None, strict))
        else:
            click.echo("\n".join(policy_files.fault_lines(exc)))
        ctx.exit(1)
    if as_json:
        echo_json(_document(policies, (), policy, strict))
    else:
        for warning in policy.warnings:
            click.echo(policy_files.fault_line("warning", "yellow", warning))
        click.echo(_summary(policies, policy, strict))
    ctx.exit(1 if strict and policy.warnings else 0)


def _summary(paths: Sequence[str], policy: Policy, strict: bool) -> str:
    sizes = _sizes(policy)
    size = (
        f"{count(sizes['tiers'], 'tier')} x {count(sizes['features'], 'feature')}, "
        f"{count(sizes['quotas'], 'quota')}, {count(sizes['routes'], 'route')}"
    )
    if sizes["pools"]:
        size = f"{size}, {count(sizes['pools'], 'pool')}"
    failed = strict and policy.warnings
    word = click.style("not ok", fg="red") if failed else click.style("ok", fg="green")
    parts = [f"{printable(' + '.join(paths))}: {word}", size]
    if policy.warnings:
        allowed = ", and --strict allows none" if strict else ""
        parts.append(count(len(policy.warnings), "warning") + allowed)
    return " · ".join(parts)


def _document(
    paths: Sequence[str], faults: Sequence[Fault], policy: Policy | None, strict: bool
) -> dict[str, object]:
    return {
        "policy": list(paths),
        "ok": policy is not None and not (strict and policy.warnings),
        "faults": _faults(faults),
        "warnings": _faults(policy.warnings if policy else ()),
        **(_sizes(policy) if policy else {}),
    }


def _faults(faults: Sequence[Fault]) -> list[dict[str, str]]:
    return [{"path": fault.path, "message": fault.message} for fault in faults]


def _sizes(policy: Policy) -> dict[str, int]:
    return {
        "tiers": len(policy.tiers),
        "features": len(policy.features),
        "quotas": sum(len(cell.quotas) for tier in policy.tiers for cell in tier.cells.values()),
        "routes": sum(len(feature.routes) for feature in policy.features.values()),
        "pools": len(pools_of(policy)),
    }
