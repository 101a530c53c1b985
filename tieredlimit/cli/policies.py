"""Policy files on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import click

from tieredlimit._core.policy import Policy
from tieredlimit.cli.terminal import count, printable
from tieredlimit.errors import Fault, PolicyError

argument = click.argument(
    "policies", nargs=-1, required=True, metavar="POLICY...", type=click.Path(path_type=str)
)
"""One policy file or more, each laid over the ones before."""


class FaultyPolicy(click.ClickException):
    """Report a policy that cannot be used, on standard error, with every fault: exit code 1."""

    exit_code = 1

    def __init__(self, error: PolicyError) -> None:
        super().__init__("\n".join(fault_lines(error)))

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the faults."""
        click.echo(self.message, file=file, err=file is None)


def load(paths: Sequence[str]) -> Policy:
    """Return the policy of the files.

    Raises:
        FaultyPolicy: It has faults.
    """
    try:
        return Policy.load(*paths)
    except PolicyError as exc:
        raise FaultyPolicy(exc) from exc


def fault_lines(error: PolicyError) -> list[str]:
    """Return one line per fault and a last one that counts them; one line for a file as a whole."""
    source = printable(error.source)
    if len(error.faults) == 1 and not error.faults[0].path:
        return [f"{source}: {printable(str(error.faults[0]))}"]
    summary = f"{source}: {count(len(error.faults), 'fault')}"
    return [*(fault_line("fault", "red", fault) for fault in error.faults), summary]


def fault_line(kind: str, colour: str, fault: Fault) -> str:
    """Return a fault or a warning as one line."""
    place = f"{click.style(printable(fault.path), bold=True)}: " if fault.path else ""
    return f"{click.style(f'{kind}:', fg=colour)} {place}{printable(fault.message)}"
