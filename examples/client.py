"""A client that backs off as an API behind tieredlimit asks it to.

    client = httpx.AsyncClient(transport=BackingOff(), base_url="https://api.example")

Then send requests as ever. What is denied for a while is sent again when its time has come; what is
denied for good, or for longer than you would wait, is what you get.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_random_exponential
from tenacity.stop import stop_after_attempt, stop_any, stop_base, stop_before_delay

DENIED = (403, 429, 503)
BUSY = ("concurrency", "pool")  # until a job ends, and nobody knows when
until_a_job_ends = wait_random_exponential(multiplier=2, max=30)


def retry_after(response: httpx.Response) -> int | None:
    """Return the seconds that the answer asks to wait for, None where it names no time."""
    told = response.headers.get("retry-after", "")
    return int(told) if told.isdecimal() else None


def reason(response: httpx.Response) -> str:
    """Return what the problem document gives as its reason, "" where there is none."""
    if response.headers.get("content-type") != "application/problem+json":
        return ""
    try:
        problem = response.json()
    except ValueError:
        return ""
    return str(problem.get("reason", "")) if isinstance(problem, dict) else ""


def may_fit_later(response: httpx.Response) -> bool:
    """Say whether it makes sense to send the same request again."""
    if response.status_code not in DENIED:
        return False
    return retry_after(response) is not None or reason(response) in BUSY


def answer(state: RetryCallState) -> httpx.Response:
    """Return the latest answer."""
    assert state.outcome is not None
    response: httpx.Response = state.outcome.result()
    return response


def pause(state: RetryCallState) -> float:
    """Return the seconds to wait: later than told, never earlier, for others were told the same."""
    seconds = retry_after(answer(state))
    if seconds is None:
        return 1 + until_a_job_ends(state)
    return seconds + random.uniform(0, max(1.0, seconds / 10))


class Budget(stop_base):
    """Let one request in ten be a repetition, and ten of them at once."""

    def __init__(self, share: float = 0.1, most: float = 10.0) -> None:
        self._share, self._most, self._left = share, most, most

    def earn(self) -> None:
        """Count a request that is no repetition."""
        self._left = min(self._most, self._left + self._share)

    def __call__(self, retry_state: RetryCallState) -> bool:  # noqa: ARG002 -- as tenacity asks
        """Stop where nothing is left, or else pay for one repetition."""
        if self._left < 1:
            return True
        self._left -= 1
        return False


class BackingOff(httpx.AsyncBaseTransport):
    """Send what was denied again, when and if the answer says so.

    Args:
        transport: What sends; None is httpx's own.
        attempts: How often a request is sent at most.
        patience: The seconds that a request may wait in all; a longer pause is not begun.
        sleep: How to wait.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        attempts: int = 4,
        patience: float = 60.0,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._transport = transport or httpx.AsyncHTTPTransport()
        self._budget = Budget()
        # The budget comes last: what is given up for another cause must not cost it anything.
        self._stop = stop_any(
            stop_after_attempt(attempts), stop_before_delay(patience), self._budget
        )
        self._sleep = sleep

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, again where that makes sense, and return the last answer."""
        if not isinstance(request.stream, httpx.ByteStream):
            # A body that is made while it is sent cannot be sent twice.
            return await self._transport.handle_async_request(request)
        self._budget.earn()
        retrying = AsyncRetrying(
            retry=retry_if_result(may_fit_later),
            wait=pause,
            stop=self._stop,
            retry_error_callback=answer,  # out of patience: you get the denial
            sleep=self._sleep,
        )
        return await retrying(self._send, request)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        if response.status_code in DENIED:
            await response.aread()  # its reason is in there, and the connection is free again
        return response

    async def aclose(self) -> None:
        """Close the transport below."""
        await self._transport.aclose()
