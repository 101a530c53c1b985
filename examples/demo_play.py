"""Ask over HTTP, compare with what was promised, and print both as rows of a table."""

from __future__ import annotations

import re
import textwrap
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import click
import httpx

# With the tick, 100 columns.
_WIDTHS = (11, 31, 7, 46)
_FOLLOW_SECONDS = 10.0
_AT_ONCE = 20
_EXPOSED = "access-control-expose-headers"


@dataclass(frozen=True, slots=True)
class Promise:
    """Say what a client must see.

    Attributes:
        status: The status of the response.
        message: How the problem's `detail` begins; empty where there must be no problem.
        retry_after: The seconds that Retry-After may say; None where it must be absent.
        left: What RateLimit must say: whole tokens left, by quota; empty where it must be absent.
        usage: What /v1/usage must say; None where the body is another.
        readable: Whether a browser must let a page of another origin read it.
    """

    status: int
    message: str = ""
    retry_after: range | None = None
    left: Mapping[str, int] = field(default_factory=dict)
    usage: Mapping[str, Any] | None = None
    readable: bool = False


class Play:
    """Play callers against servers that share their buckets, each asked in turn.

    `rows` counts what was asked, and `differences` names what was not as promised.
    """

    def __init__(self, client: httpx.Client, urls: Sequence[str]) -> None:
        self.rows = 0
        self.differences: list[str] = []
        self._client = client
        self._all_urls = tuple(urls)
        self._urls = cycle(self._all_urls)

    def scene(self, title: str) -> None:
        """Print a line above the rows that follow."""
        click.secho(f"\n{title}", bold=True)

    def ask(
        self,
        who: str,
        request: str,
        promise: Promise,
        *,
        note: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[httpx.Response, float]:
        """Send a request such as `GET /health`, print its row; return the answer and when it came.

        `note` is what the row says after the request. The instant is `time.monotonic()`'s.
        """
        response = self._client.send(self._request(request, headers))
        came_at = time.monotonic()
        self._row(
            who,
            f"{request}{note and ', '}{note}",
            str(response.status_code),
            _seen(response),
            list(_differences(response, promise)),
        )
        return response, came_at

    def burst(
        self, who: str, request: str, statuses: Mapping[int, int], headers: Mapping[str, str]
    ) -> float:
        """Send as many requests at once as `statuses` promises; return when that began."""
        size = sum(statuses.values())
        requests = [self._request(request, headers) for _ in range(size)]
        began_at = time.monotonic()
        with ThreadPoolExecutor(size) as threads:
            answers = threads.map(self._client.send, requests)
            seen = Counter(answer.status_code for answer in answers)
        promised, counts = _spell_counts(statuses), _spell_counts(seen)
        differs = [] if seen == statuses else [f"{counts}, promised {promised}"]
        status = "/".join(str(status) for status in sorted(seen))
        self._row(who, f"{request}, {size} at once", status, [counts], differs)
        return began_at

    def crowd(
        self,
        request: str,
        callers: Mapping[str, Mapping[str, str]],
        inside: range | Collection[str],
    ) -> frozenset[str]:
        """Let each of the callers, given with their headers, ask once; return who was let in.

        `inside` promises who that is, or as a range how many.
        """
        requests = [self._request(request, headers) for headers in callers.values()]
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            statuses = [answer.status_code for answer in threads.map(self._client.send, requests)]
        among = zip(callers, statuses, strict=True)
        seen = frozenset(name for name, status in among if status < 300)
        differs = []
        if isinstance(inside, range):
            if len(seen) not in inside:
                differs.append(f"{len(seen)} are let in, promised {_spell_range(inside)}")
        elif seen != set(inside):
            others = sorted(seen.symmetric_difference(inside))
            differs.append(f"let in or not, against the promise: {', '.join(others)}")
        status = "/".join(str(status) for status in sorted(set(statuses)))
        counts = _spell_counts(Counter(statuses))
        self._row(f"{len(callers)} new", f"{request}, one each", status, [counts], differs)
        return seen

    def operate(self, verb: str, feature: str, tier: str, **given: Any) -> None:
        """Close or open a feature for a tier, as the operator, and print that row."""
        body = {"feature": feature, "tier": tier, **given}
        url = f"{next(self._urls)}/operator/{verb}"
        response = self._client.post(url, json=body)
        said, status = _body(response), response.status_code
        seen = f"revision {said['revision']}: {said['change']}" if "revision" in said else str(said)
        differs = [] if response.is_success else [f"status {status}, promised 200: {seen}"]
        self._row("operator", f"{verb} {feature}, tier {tier}", str(status), [seen], differs)
        self._wait_for(said.get("revision", 0))

    def _wait_for(self, revision: int) -> None:
        """Wait until every process follows: closing holds at once, opening within a second."""
        deadline = time.monotonic() + _FOLLOW_SECONDS
        for url in self._all_urls:
            while time.monotonic() < deadline:
                if _body(self._client.get(f"{url}/operator"))["revision"] >= revision:
                    break
                time.sleep(0.02)

    def _request(self, request: str, headers: Mapping[str, str] | None) -> httpx.Request:
        method, path = request.split()
        return self._client.build_request(method, next(self._urls) + path, headers=headers)

    def _row(
        self, who: str, request: str, status: str, seen: Sequence[str], differs: Sequence[str]
    ) -> None:
        self.rows += 1
        self.differences += [f"{who}, {request}: {difference}" for difference in differs]
        tick = click.style("✗", fg="red") if differs else click.style("✓", fg="green")
        lines = [part for line in seen for part in _wrapped(line)] or [""]
        click.echo(f"{tick} {_line(who, request, status, lines[0])}")
        for line in lines[1:]:
            click.echo(f"  {_line('', '', '', line)}")


def print_head() -> None:
    """Print the table's head."""
    click.echo(f"  {_line('who', 'request', 'status', 'what the client saw')}")
    click.echo("─" * (2 + sum(_WIDTHS) + len(_WIDTHS) - 1))


def _line(*cells: str) -> str:
    return " ".join(cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _WIDTHS[3], subsequent_indent="  ", break_on_hyphens=False)


def _seen(response: httpx.Response) -> list[str]:
    """Return what a reader of the table should know of an answer, line by line."""
    body, headers = _body(response), response.headers
    seen = [body["detail"]] if "detail" in body else []
    for feature, state in _usage(body).items():
        left = ", ".join(f"{name} {tokens}" for name, tokens in state["remaining"].items())
        seen.append(f"{feature}: {left or ('unlimited' if state['allowed'] else 'none')}")
    seen += [f"{name}: {headers[name]}" for name in ("Retry-After", "RateLimit") if name in headers]
    if response.status_code == 429 and "Retry-After" not in headers:
        seen.append("no Retry-After: it will never fit")
    if _EXPOSED in headers:
        seen.append(f"and may read: {headers[_EXPOSED]}")
    return seen or ["not limited"]


def _differences(response: httpx.Response, promise: Promise) -> Iterator[str]:
    body, headers = _body(response), response.headers
    if response.status_code != promise.status:
        yield f"status {response.status_code}, promised {promise.status}"

    message = body.get("detail", "")
    if not message.startswith(promise.message) or bool(message) != bool(promise.message):
        yield f"message {message!r}, promised {promise.message!r}"

    limits = headers.get("ratelimit", "")
    left = {name: int(tokens) for name, tokens in re.findall(r'"([^"]+)";r=(\d+)', limits)}
    if left != promise.left:
        yield f"RateLimit has {left}, promised {dict(promise.left)}"

    wait = int(headers["retry-after"]) if "retry-after" in headers else None
    promised = promise.retry_after
    if (wait is None) != (promised is None) or (promised and wait not in promised):
        yield f"Retry-After {wait}, promised {_spell_range(promised)}"
    if wait is not None and any(int(t) > wait for t in re.findall(r";t=(\d+)", limits)):
        yield f"Retry-After {wait} comes before the t of {limits}"

    if promise.usage is not None and _usage(body) != promise.usage:
        yield f"usage {_usage(body)}, promised {dict(promise.usage)}"
    if promise.readable and not (
        headers.get("access-control-allow-origin") and "Retry-After" in headers.get(_EXPOSED, "")
    ):
        yield "a page of another origin cannot read it"


def _body(response: httpx.Response) -> dict[str, Any]:
    if not response.headers.get("content-type", "").endswith("json"):
        return {}
    body: dict[str, Any] = response.json()
    return body


def _usage(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state for name, state in body.items() if isinstance(state, dict)}


def _spell_counts(statuses: Mapping[int, int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))


def _spell_range(seconds: range | None) -> str:
    if seconds is None:
        return "none"
    first, last = seconds[0], seconds[-1]
    return str(first) if first == last else f"{first} to {last}"
