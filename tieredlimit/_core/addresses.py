"""Client addresses, as servers give them and as forwarding headers carry them.

Both headers are read from the right. A proxy appends what it saw; all that stands to the left of
it was in the request already, and may be anybody's invention.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

UNKNOWN = "unknown"
"""The id shared by all whose address is not known: a stranger's text must not name a bucket."""

LONGEST_NODE = 128
"""Characters in which any address fits, with its brackets, zone and port."""

_LONGEST_NAME = 64
_READ_AT_MOST = 8192


def peer_id(host: str, ipv4_prefix: int, ipv6_prefix: int) -> str:
    """Return the id of a peer as the server names it, which need not be an address.

    A name such as `testclient` is the server's word and kept, where it is short and printable.
    """
    network = network_id(host, ipv4_prefix, ipv6_prefix)
    if network is not None:
        return network
    kept = 0 < len(host) <= _LONGEST_NAME and host.isascii() and host.isprintable()
    return host if kept else UNKNOWN


def network_id(node: str, ipv4_prefix: int, ipv6_prefix: int) -> str | None:
    """Return the network of an address in one spelling; None if the text is no address.

    Takes ports, brackets and zones, and IPv4 written as IPv6. A network of a single address is
    that address.
    """
    if len(node) > LONGEST_NODE:
        return None
    host = _without_port(node)
    try:
        if ":" not in host:
            return _of_ipv4(IPv4Address(host), ipv4_prefix)
        # The zone is the name of an interface of whoever wrote it.
        address = IPv6Address(host.partition("%")[0])
    except ValueError:
        return None
    if address.ipv4_mapped is not None:
        return _of_ipv4(address.ipv4_mapped, ipv4_prefix)
    if ipv6_prefix == address.max_prefixlen:
        return str(address)
    return str(IPv6Network((int(address), ipv6_prefix), strict=False))


def x_forwarded_for(header: str, hops: int) -> str:
    """Return what the proxy `hops` from us wrote into X-Forwarded-For.

    A shorter header did not pass all the proxies: its leftmost entry is the best there is. Text
    that cannot be read is returned as it is, or empty: it is no address.
    """
    return _unquoted(_from_the_right(header, hops))


def forwarded(header: str, hops: int) -> str:
    """Return the `for` that the proxy `hops` from us wrote into Forwarded (RFC 7239).

    As `x_forwarded_for`; empty as well where an element has no `for`, or two.
    """
    pairs = (pair.partition("=") for pair in _backwards(_from_the_right(header, hops), ";"))
    nodes = [_unquoted(value) for name, _, value in pairs if name.strip().lower() == "for"]
    return nodes[0] if len(nodes) == 1 else ""


def _from_the_right(header: str, hops: int) -> str:
    entry = ""
    for entry in islice(_backwards(header, ","), hops):  # noqa: B007 -- the last one is the answer
        pass
    return entry


def _backwards(text: str, separator: str) -> Iterator[str]:
    """Split outside of quoted strings, the last part first, and read no further than asked.

    Read from the left, one quote sent by a stranger would swallow what our proxies appended. Read
    from the right the start of a quoted string is certain: `=` stands before it, never a backslash.
    """
    end, floor = len(text), max(0, len(text) - _READ_AT_MOST)
    quoted = False
    for at in range(end - 1, floor - 1, -1):
        character = text[at]
        if character == '"':
            escaped = quoted and text[at - 1 : at] == "\\"
            if not escaped:
                quoted = not quoted
        elif character == separator and not quoted:
            yield text[at + 1 : end]
            end = at
    # What the bound has cut in two is no entry.
    yield "" if floor else text[:end]


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1])
    return value


def _without_port(node: str) -> str:
    if node.startswith("["):
        host, closed, port = node[1:].partition("]")
        return host if closed and (not port or port.startswith(":")) else ""
    return node.partition(":")[0] if node.count(":") == 1 else node


def _of_ipv4(address: IPv4Address, prefix: int) -> str:
    if prefix == address.max_prefixlen:
        return str(address)
    return str(IPv4Network((int(address), prefix), strict=False))
