"""The operator's commands. Each is a module of its own, with its `command`."""

from __future__ import annotations

import io
import sys

import click

from tieredlimit import __version__
from tieredlimit.cli import check, explain, schema, table

__all__ = ["main"]


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the policy has faults, 2 wrong usage.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Look at a rate-limit policy before it is deployed, and while it is in force.

    Where a command takes several POLICY files, each is laid over the ones before.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal of another encoding must not turn a policy's messages into a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


for _module in (check, table, explain, schema):
    main.add_command(_module.command)
