"""What a connection carries to prove who it is: a value in a header, or in a cookie."""

from __future__ import annotations

import re

from starlette.requests import HTTPConnection

from tieredlimit.errors import UsageError

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


def header_values(connection: HTTPConnection, name: bytes) -> list[bytes]:
    """Return every value of a header, which is named in lower case."""
    # Servers are bound to send names in lower case; one that does not must not hide a header.
    headers = connection.scope.get("headers", ())
    return [value for given, value in headers if given.lower() == name]


def header_credential(connection: HTTPConnection, name: bytes, scheme: str | None) -> str | None:
    """Return what stands in a header, behind its scheme if there is one.

    None where it is absent, empty, of another scheme, or there twice with differing values: the
    application behind us might read the other one, and the account that is charged would not be the
    one that is served.
    """
    values = set(header_values(connection, name))
    if len(values) != 1:
        return None
    text = values.pop().decode("latin-1").strip(" \t")
    if scheme is not None:
        given, _, text = text.partition(" ")
        if given.lower() != scheme.lower():
            return None
        text = text.strip(" \t")
    return text or None


def cookie_credential(connection: HTTPConnection, name: str) -> str | None:
    """Return the value of a cookie; None where it is absent or empty.

    Of several of that name it is the one that Starlette takes, the last, as most frameworks do.
    """
    return connection.cookies.get(name) or None


def require_token(place: str, word: str) -> None:
    """Go on if a word may name a header, a scheme or a cookie.

    Raises:
        UsageError: It may not.
    """
    if not _TOKEN.fullmatch(word):
        raise UsageError(f"{place} must be an HTTP token, got {word!r:.80}")
