"""Asking before anything changes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from tieredlimit.cli.fleet import Fleet
from tieredlimit.cli.session import Failure, Place

flag = click.option("--yes", is_flag=True, help="Go ahead without being asked.")


def require_consent(place: Place, fleet: Fleet, *, yes: bool, aside: bool = False) -> None:
    """Go on if the operator wants to; production wants the namespace's name.

    `aside` asks on standard error, for what is printed to be JSON alone.

    Raises:
        Failure: Nobody agreed.
    """
    name = place.namespace
    if yes:
        if fleet.production and not place.explicit:
            raise Failure(
                f'"{name}" is labelled {fleet.label}: beside --yes, name it on the command line '
                f"(--namespace {name}). Nothing was done"
            )
        return
    if not place.pace.attended():
        wanted = f"--yes --namespace {name}" if fleet.production else "--yes"
        raise Failure(f"nobody can be asked here, and nothing was done: say {wanted}")
    with _interruptible():
        if fleet.production:
            question = f"This is {fleet.label}. Type the namespace's name to go ahead"
            agreed = click.prompt(question, default="", show_default=False, err=aside) == name
        else:
            agreed = click.confirm("go ahead?", err=aside)
    if not agreed:
        raise Failure("nothing was done")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end a question at once: an event loop would only cancel what comes after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    of_the_loop = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, of_the_loop)
