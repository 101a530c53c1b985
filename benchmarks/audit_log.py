"""What a worker notes of its decisions, in files that survive its being killed.

A note is written with one system call, straight to the kernel: SIGKILL loses none. A worker has two
files, each in the order of the server's clock: takes, and ends (settling, renewing, releasing).
Before it asks the server anything it notes that, too: what was asked and never noted as answered
is lost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Self

CALLERS = 64
"""How many takes of a worker may be asked for at once."""

ASKED, ADMITTED, DENIED, FAILED = range(4)
"""What became of a take; FAILED is one that the server did not answer."""

SETTLE, RENEW, RELEASE = range(3)
"""How something ends, or does not yet."""

_TAKE = Struct("<BBHHxxIq16s")
_END = Struct("<BBBBHHHxxIqq16s")
_CHUNK = 4_096
NOBODY = bytes(16)


class Take(NamedTuple):
    """Note a take.

    Attributes:
        outcome: What became of it. One that was only asked for says nothing else.
        feature: The number of the feature in `FEATURES`.
        account: The number of the account.
        cost: In tokens.
        remembered: How many denials the worker gave before without asking.
        now: The instant of the decision on the server's clock, in microseconds.
        id: What names its slots and its reservation, zeros where there are none.
    """

    outcome: int
    feature: int = 0
    account: int = 0
    cost: int = 0
    remembered: int = 0
    now: int = 0
    id: bytes = NOBODY


class End(NamedTuple):
    """Note that a reservation was settled, or a lease renewed or released, or that it will be.

    Attributes:
        answered: 0 before it is asked for, 1 after it was answered.
        kind: Which of them.
        done: 1 where the server did it, 0 where there was nothing left to do.
        feature: As in `Take`.
        account: As in `Take`.
        cost: What was charged.
        actual: What it is settled at.
        number: Of the worker's ends; the same before and after.
        first: An instant on the server's clock that it was not before.
        last: An instant that it was not after; the server decided nothing else between them.
        id: As in `Take`.
    """

    answered: int
    kind: int
    done: int
    feature: int
    account: int
    cost: int
    actual: int
    number: int
    first: int
    last: int
    id: bytes


@dataclass(frozen=True, slots=True)
class Files:
    """Name the two files of a worker."""

    takes: Path
    ends: Path

    @classmethod
    def of(cls, folder: Path, worker: int) -> Self:
        """Return those of the worker of that number."""
        return cls(folder / f"{worker}.takes", folder / f"{worker}.ends")

    def create(self) -> None:
        """Make both, empty."""
        self.takes.touch()
        self.ends.touch()

    def count(self) -> int:
        """Return about how many takes were decided, and no more: each is noted before and after.

        Those that nobody has answered yet, or ever will, are noted once.
        """
        return max(0, (self.takes.stat().st_size // _TAKE.size - CALLERS) // 2)


class Log:
    """Write a worker's notes."""

    def __init__(self, files: Files) -> None:
        self._takes = os.open(files.takes, os.O_WRONLY | os.O_APPEND)
        self._ends = os.open(files.ends, os.O_WRONLY | os.O_APPEND)

    def take(self, note: Take) -> None:
        """Note a take."""
        os.write(self._takes, _TAKE.pack(*note))

    def end(self, note: End) -> None:
        """Note an end."""
        os.write(self._ends, _END.pack(*note))

    def close(self) -> None:
        """Close both files."""
        os.close(self._takes)
        os.close(self._ends)


def read_takes(files: Files) -> Iterator[Take]:
    """Yield the takes of a worker in the order in which they were noted."""
    for record in _records(files.takes, _TAKE):
        yield Take._make(record)


def read_ends(files: Files) -> Iterator[End]:
    """Yield the ends of a worker in the order in which they were noted."""
    for record in _records(files.ends, _END):
        yield End._make(record)


def _records(path: Path, layout: Struct) -> Iterator[tuple[int | bytes, ...]]:
    with path.open("rb") as file:
        while chunk := file.read(layout.size * _CHUNK):
            # A worker may have been killed in the middle of its last note.
            yield from layout.iter_unpack(chunk[: len(chunk) // layout.size * layout.size])
