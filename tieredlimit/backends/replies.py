"""Reading what a server answers, in the Redis serialization protocol (RESP2).

Our scripts answer with an array of integers, and a server with an error where it refuses; nothing
else comes over a connection that carries nothing else. So this is all that is read here, an array
in a few steps however long it is.

Source: https://redis.io/docs/latest/develop/reference/protocol-spec/
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 2**24
"""The most bytes that a reply may have."""

_END = b"\r\n"
_NEXT = b"\r\n:"
_SPELLED = 80


@dataclass(frozen=True, slots=True)
class Refusal:
    """Hold the error that a server answered with."""

    text: str

    @property
    def code(self) -> str:
        """Its first word, such as `NOSCRIPT`."""
        return self.text.partition(" ")[0]


Answer = list[int] | str | Refusal
"""An array of integers, a status, or an error."""


def read_replies(data: bytes) -> tuple[list[Answer], bytes]:
    """Return the whole replies that data begins with, and what is left of it.

    Raises:
        ValueError: It is none of what is expected here.
    """
    replies: list[Answer] = []
    while data:
        if data[0] == 42:  # an array: "*"
            head = data.find(_END)
            if head < 0:
                break
            count = int(data[1:head])
            if not 1 <= count <= LONGEST or data[head + 2 : head + 3] not in (b":", b""):
                raise ValueError(_told(data))
            parts = data.split(_NEXT, count)
            last, end, rest = parts[-1].partition(_END)
            if len(parts) <= count or not end:
                if data.count(_END) > count:
                    raise ValueError(_told(data))
                break
            parts[-1] = last
            replies.append([int(part) for part in parts[1:]])
            data = rest
        else:
            kind, line = data[:1], data[1:]
            text, end, rest = line.partition(_END)
            if kind not in (b"-", b"+"):
                raise ValueError(_told(data))
            if not end:
                break
            said = text.decode("utf-8", "replace")
            replies.append(Refusal(said) if kind == b"-" else said)
            data = rest
    if len(data) > LONGEST:
        raise ValueError(f"a reply is longer than {LONGEST:,} bytes")
    return replies, data


def _told(data: bytes) -> str:
    return f"what is no reply to a script: {data[:_SPELLED]!r}"
