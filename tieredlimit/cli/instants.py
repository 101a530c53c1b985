"""Instants on the command line."""

from __future__ import annotations

from datetime import UTC, datetime

import click


def instant(text: str) -> datetime:
    """Read a date (midnight in UTC) or an RFC 3339 instant; a time without a zone is UTC.

    Raises:
        click.BadParameter: It is neither.
    """
    try:
        read = datetime.fromisoformat(text)
        return read.astimezone(UTC) if read.tzinfo else read.replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        wanted = "write a date or an instant, such as 2026-11-20 or 2026-11-20T18:00:00Z"
        raise click.BadParameter(f"got {text!r:.80}; {wanted}") from None
