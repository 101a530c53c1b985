"""How a command waits, and whether a person is there to be asked."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import click


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


@dataclass(frozen=True, slots=True)
class Pace:
    """Hold what a command does while it waits.

    Attributes:
        clock: Returns seconds, from any start.
        pause: Waits for so many of them.
        attended: Says whether somebody sits at a terminal and can be asked.
    """

    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    attended: Callable[[], bool] = _is_terminal


def pace_of(ctx: click.Context) -> Pace:
    """Return the pace that the commands were started with."""
    return ctx.find_object(Pace) or Pace()
