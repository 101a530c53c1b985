"""What a denied user reads, in a language they asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_MAX_HEADER = 1_000
_MAX_RANGES = 32


def choose(messages: Mapping[str, str], accept_language: str | None) -> tuple[str, str]:
    """Return the language tag and the text that suit an Accept-Language header best.

    Ranges are tried by falling weight and matched by RFC 4647, section 3.4 ("lookup": `fr-CA` falls
    back to `fr`), then against longer tags (`pt` finds `pt-BR`). Where nothing suits, the first
    text is the answer. The header is a stranger's: what is malformed in it counts for nothing.
    """
    if accept_language and len(messages) > 1:
        tags = {tag.lower(): tag for tag in messages}
        for wanted in _ranges(accept_language[:_MAX_HEADER]):
            if wanted == "*":
                break
            tag = _lookup(wanted, tags)
            if tag is not None:
                return tag, messages[tag]
    return next(iter(messages.items()))


def _ranges(header: str) -> Iterable[str]:
    weighed: list[tuple[float, int, str]] = []
    for item in header.split(",", _MAX_RANGES)[:_MAX_RANGES]:
        tag, _, rest = item.partition(";")
        name, _, value = rest.partition("=")
        try:
            weight = float(value) if name.strip().lower() == "q" else 1.0
        except ValueError:
            weight = 0.0
        if tag.strip() and 0 < weight <= 1:
            weighed.append((-weight, len(weighed), tag.strip().lower()))
    return [tag for _, _, tag in sorted(weighed)]


def _lookup(wanted: str, tags: Mapping[str, str]) -> str | None:
    prefix = wanted
    while prefix:
        if prefix in tags:
            return tags[prefix]
        prefix = prefix.rpartition("-")[0]
    return next((tag for low, tag in tags.items() if low.startswith(f"{wanted}-")), None)
