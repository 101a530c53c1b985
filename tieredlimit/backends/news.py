"""Hear of a new head: by publish/subscribe at once, by looking at it in any case.

What is told is only ever read from the head itself, by one reader: news that is lost, repeated, out
of order or made up can delay nothing but the next look, and bring it forward.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from redis.exceptions import ResponseError

from tieredlimit.errors import BackendError

PULSE = 10.0
"""Seconds without a word from a subscription after which it is asked for a sign of life."""

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0

_log = logging.getLogger("tieredlimit")


async def follow(
    look: Callable[[], Awaitable[tuple[int, str]]],
    connect: Callable[[], Awaitable[Any]],
    channel: str,
    heard: Callable[[int], None],
    *,
    poll_interval: float | None,
) -> None:
    """Tell the number of the head now and whenever the head changes, until cancelled.

    Args:
        look: Returns the head's number and digest.
        connect: Returns a connection to subscribe over.
        channel: Where news is published.
        heard: Is told the number.
        poll_interval: Seconds between two looks without news; None looks at news only.
    """
    news = asyncio.Event()
    listening = asyncio.create_task(_listen(connect, channel, news))
    told: tuple[int, str] | None = None
    pause, failing = _FIRST_PAUSE, False
    try:
        while True:
            news.clear()
            try:
                head = await look()
            except BackendError as exc:
                # Once for an outage, however long: the limiter says the rest.
                _log.log(
                    logging.DEBUG if failing else logging.WARNING,
                    "tieredlimit: cannot look for a new revision: %s; trying again",
                    exc,
                )
                failing, pause = True, min(2 * pause, _LONGEST_PAUSE)
                await _wait(news, pause if poll_interval is None else min(pause, poll_interval))
                continue
            failing, pause = False, _FIRST_PAUSE
            if head != told:
                told = head
                heard(head[0])
            await _wait(news, poll_interval)
    finally:
        listening.cancel()
        await asyncio.wait([listening])


async def _wait(news: asyncio.Event, longest: float | None) -> None:
    try:
        async with asyncio.timeout(longest):
            await news.wait()
    except TimeoutError:
        pass


async def _listen(connect: Callable[[], Awaitable[Any]], channel: str, news: asyncio.Event) -> None:
    """Set `news` at each message, and whenever some may have been missed."""
    pause = _FIRST_PAUSE
    while True:
        try:
            connection = await connect()
            try:
                await connection.send_command("SUBSCRIBE", channel.encode())
                async with asyncio.timeout(PULSE):
                    await _read(connection)
                pause = _FIRST_PAUSE
                news.set()
                await _hear(connection, news)
            finally:
                await connection.disconnect(nowait=True)
        except Exception as exc:  # noqa: BLE001 -- redis-py's parsers raise all sorts for garbage
            _log.debug("tieredlimit: no subscription to news of revisions: %s", exc)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


async def _hear(connection: Any, news: asyncio.Event) -> None:
    """Set `news` at each message, until the connection breaks or stays silent."""
    asked = False
    reading = asyncio.create_task(_read(connection))
    try:
        while True:
            # Not a timeout: that would cancel the reading half-way through a message.
            done, _ = await asyncio.wait([reading], timeout=PULSE)
            if done:
                reading.result()
                reading = asyncio.create_task(_read(connection))
                news.set()
                asked = False
            elif asked:
                raise BackendError(f"no sign of life within {PULSE:g} s")
            else:
                await connection.send_command("PING", check_health=False)
                asked = True
    finally:
        reading.cancel()
        await asyncio.wait([reading])


async def _read(connection: Any) -> Any:
    try:
        # In RESP3 messages are pushed, beside the replies.
        return await connection.read_response(disable_decoding=True, push_request=True)
    except ResponseError as exc:
        raise BackendError(f"Redis refused: {exc}") from exc
