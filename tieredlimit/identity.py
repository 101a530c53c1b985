"""Who a request is charged to: from a connection to an account.

An *identify* takes Starlette's `HTTPConnection`, of a request or a WebSocket, and returns an
`Account`, None ("not known here"), or an awaitable of either. The middleware charges a client that
stays unknown by its address. Whatever an identify does not read, a client may send in vain.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

from starlette.requests import HTTPConnection

from tieredlimit._core.account import Account
from tieredlimit._core.addresses import (
    LONGEST_NODE,
    UNKNOWN,
    forwarded,
    network_id,
    peer_id,
    x_forwarded_for,
)
from tieredlimit.credentials import header_credential, header_values, require_token
from tieredlimit.errors import UsageError
from tieredlimit.remembered import Remembered, remember

__all__ = [
    "Answer",
    "Identify",
    "Remembered",
    "api_key",
    "blocking",
    "client_address",
    "first_of",
    "remember",
    "request_user",
    "resolve",
    "session",
]

Answer: TypeAlias = Account | Awaitable[Account | None] | None
"""An account, or None where it is not known; now or later."""

Identify: TypeAlias = Callable[[HTTPConnection], Answer]
"""From a connection to whoever is charged for it."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_LONGEST_KEY = 4096
_MOST_HOPS = 32
_ADDRESSES_KEPT = 4096


async def resolve(answer: Answer) -> Account | None:
    """Wait for the account behind an answer, if it is not there yet.

    An answer that is None or an `Account` already needs no waiting; a caller in a hurry skips the
    call.

    Raises:
        UsageError: The answer, or what it led to, is neither an account nor None.
    """
    account: object = await answer if inspect.isawaitable(answer) else answer
    if account is None or isinstance(account, Account):
        return account
    # Only the type: what a lookup returns by mistake may hold secrets.
    kind = type(account).__qualname__
    raise UsageError(f"an identify must answer with an Account or None, got a value of type {kind}")


def first_of(*identifies: Identify) -> Identify:
    """Ask one identify after the other; the first that knows the client wins.

    The answer is there at once as long as those asked answer at once.

    Raises:
        UsageError: There is none to ask.
    """
    if not identifies:
        raise UsageError("first_of needs at least one identify, got none")

    def identify(connection: HTTPConnection) -> Answer:
        for position, ask in enumerate(identifies, start=1):
            answer = ask(connection)
            if answer is not None:
                if isinstance(answer, Account):
                    return answer
                return ask_on(answer, identifies[position:], connection)
        return None

    async def ask_on(
        answer: Answer, remaining: tuple[Identify, ...], connection: HTTPConnection
    ) -> Account | None:
        account = await resolve(answer)
        for ask in remaining:
            if account is not None:
                break
            account = await resolve(ask(connection))
        return account

    return identify


def blocking(function: Callable[_P, _R]) -> Callable[_P, Awaitable[_R]]:
    """Declare that a plain function waits for something, such as a database driver.

    It then runs in the event loop's default thread pool, with the context variables of the request.
    An identify or lookup without this mark is called on the event loop, and must not wait.

    Raises:
        UsageError: The function is async already.
    """
    from asgiref.sync import sync_to_async

    try:
        sync_to_async(function)
    except TypeError as exc:
        raise UsageError(f"blocking takes a plain function, got {function!r:.80}") from exc

    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except StopIteration as exc:
            # No future takes it, and whoever awaits one would wait for ever.
            raise RuntimeError("the function raised StopIteration") from exc

    return sync_to_async(called, thread_sensitive=False)


def api_key(
    lookup: Callable[[str], Answer], *, header: str | None = None, scheme: str | None = None
) -> Identify:
    """Identify by a key in a header: `X-Api-Key: <key>`, or `Authorization: <scheme> <key>`.

    Args:
        lookup: From the key to its account, sync or async; None if there is no such key.
        header: Another header, in any case. None is `x-api-key`, or with a scheme `authorization`.
        scheme: What stands before the key, such as `Bearer`, in any case. None is the bare key.

    A client is unknown, and `lookup` not called, if the key is absent, empty or longer than 4,096
    characters, or if the header comes twice with differing values: the application behind us might
    read the other one, and the account that is charged would not be the one that is served.

    Raises:
        UsageError: `header` or `scheme` is no HTTP token.
    """
    if header is None:
        header = "x-api-key" if scheme is None else "authorization"
    for place, word in (("header", header), ("scheme", scheme)):
        if word is not None:
            require_token(place, word)
    name = header.lower().encode("ascii")

    def identify(connection: HTTPConnection) -> Answer:
        key = header_credential(connection, name, scheme)
        return lookup(key) if key is not None and len(key) <= _LONGEST_KEY else None

    return identify


def request_user(to_account: Callable[[Any], Answer] | None = None) -> Identify:
    """Identify by `scope["user"]`, as Starlette's AuthenticationMiddleware leaves it.

    That middleware must be the outer one. Without a user, or with one that does not say
    `is_authenticated`, the client is unknown.

    Args:
        to_account: From the user to the account, sync or async. None takes `identity` as the id
            (or `display_name`, where the class does not implement it), and `plan`, `created_at` and
            `tags` where the user has them.

    The identify raises `UsageError` where there is no mapping and the user has no `identity`.
    """
    mapping = _account_of_user if to_account is None else to_account

    def identify(connection: HTTPConnection) -> Answer:
        user = connection.scope.get("user")
        return mapping(user) if getattr(user, "is_authenticated", False) else None

    return identify


def session(key: str = "user_id", lookup: Callable[[Any], Answer] | None = None) -> Identify:
    """Identify by a value in `scope["session"]`, where Starlette's SessionMiddleware keeps it.

    That middleware must be the outer one. Without a session, or with one that has no such value, or
    None, the client is unknown.

    Args:
        key: The name of the value.
        lookup: From the value to its account, sync or async; None if there is no such user. Without
            it, the value is the account's id, a whole number as its digits.

    The identify raises `UsageError` where the value is to be an id and is neither a string nor a
    whole number.
    """

    def identify(connection: HTTPConnection) -> Answer:
        kept = connection.scope.get("session")
        # Some session middleware has something else there before a session is begun.
        value = kept.get(key) if isinstance(kept, Mapping) else None
        if value is None:
            return None
        if lookup is not None:
            return lookup(value)
        return Account(str(value) if type(value) is int else value)

    return identify


def client_address(
    *,
    trusted_hops: int = 0,
    header: Literal["x-forwarded-for", "forwarded"] = "x-forwarded-for",
    ipv6_prefix: int = 64,
    ipv4_prefix: int = 32,
) -> Callable[[HTTPConnection], Account]:
    """Identify by the client's address, as an anonymous account. Knows everybody.

    What a header has in an address's place shares one account, `unknown`, whatever text it is; a
    short name by which the server calls the peer, such as `testclient`, is kept.

    Args:
        trusted_hops: How many proxies of ours every request passes. Each appends the address it saw
            to the header, so the client's is that many entries from the right; a header that is
            shorter gives its leftmost entry, one that is absent the peer. Who can reach us past a
            proxy can be anyone: close that way. 0 is the peer as the server gives it, and will
            do where the server has put the client's address there (uvicorn's `--proxy-headers`).
        header: The one header that these proxies write; the other is not read.
        ipv6_prefix: Bits that make a client: a host usually has a whole /64 to choose from.
        ipv4_prefix: The same for IPv4, and for IPv4 written as IPv6.

    Raises:
        UsageError: An argument is out of bounds.
    """
    _require_within("trusted_hops", trusted_hops, 0, _MOST_HOPS)
    _require_within("ipv6_prefix", ipv6_prefix, 1, 128)
    _require_within("ipv4_prefix", ipv4_prefix, 1, 32)
    if header not in ("x-forwarded-for", "forwarded"):
        raise UsageError(f"header must be 'x-forwarded-for' or 'forwarded', got {header!r:.80}")
    node_in = forwarded if header == "forwarded" else x_forwarded_for
    name = header.encode("ascii")

    @lru_cache(maxsize=_ADDRESSES_KEPT)
    def account_of_peer(host: str) -> Account:
        return Account(peer_id(host, ipv4_prefix, ipv6_prefix), anonymous=True)

    @lru_cache(maxsize=_ADDRESSES_KEPT)
    def account_of_node(node: str) -> Account:
        return Account(network_id(node, ipv4_prefix, ipv6_prefix) or UNKNOWN, anonymous=True)

    # What the caches keep is cut one character above the bound: too long stays too long.
    def by_peer(connection: HTTPConnection) -> Account:
        client = connection.scope.get("client")
        host = (client and client[0]) or ""
        return account_of_peer(host[: LONGEST_NODE + 1])

    def by_header(connection: HTTPConnection) -> Account:
        lines = b",".join(header_values(connection, name)).decode("latin-1")
        if not lines.strip():
            return by_peer(connection)
        return account_of_node(node_in(lines, trusted_hops)[: LONGEST_NODE + 1])

    return by_header if trusted_hops else by_peer


def _account_of_user(user: Any) -> Account:
    return Account(
        _identity_of(user),
        plan=getattr(user, "plan", None),
        created_at=getattr(user, "created_at", None),
        tags=getattr(user, "tags", None) or (),
    )


def _identity_of(user: Any) -> Any:
    for name in ("identity", "display_name"):
        try:
            return getattr(user, name)
        except NotImplementedError:
            continue
        except AttributeError:
            break
    # Only the type: the user itself may be anything.
    kind = type(user).__qualname__
    raise UsageError(f"a user of type {kind} has no {name}; give request_user a mapping")


def _require_within(place: str, value: int, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{place} must be an integer from {least} to {most}, got {value!r:.80}")
