"""The operator's commands. Each is a module of its own, with its `command`."""

from __future__ import annotations

import io
import sys

import click

from tieredlimit import __version__
from tieredlimit.cli import (
    acl,
    check,
    control,
    doctor,
    explain,
    listing,
    policy,
    refill,
    schema,
    status,
    table,
    watch,
)

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 not done (or faults), 2 wrong usage, 3 nobody follows, "
    "4 partly done: run it again, 5 weaknesses.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Look at a rate-limit policy before it is deployed, and change it while it is in force.

    Where a command takes several POLICY files, each is laid over the ones before.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding must not turn a policy's messages into a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_COMMANDS = (
    check.command,
    table.command,
    explain.command,
    schema.command,
    *status.commands,
    *control.commands,
    *listing.commands,
    policy.command,
    *refill.commands,
    watch.command,
    doctor.command,
    acl.command,
)
for _command in _COMMANDS:
    main.add_command(_command)
