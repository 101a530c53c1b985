"""What verifies tokens: one key that was given, or those that an identity provider publishes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple

import jwt
from asgiref.sync import sync_to_async
from jwt import PyJWK, PyJWKClient

from tieredlimit.errors import BackendError, UsageError

__all__ = ["FetchedKeys", "GivenKey", "Key"]

_LONGEST_KID = 256
_FRESH = 300.0
_BETWEEN_FETCHES = 10.0


class Key(NamedTuple):
    """A key that is ready to verify, and the one algorithm it is for; "" is any."""

    key: Any
    algorithm: str


class GivenKey:
    """One key, made ready once."""

    def __init__(self, key: Any, algorithms: Sequence[str]) -> None:
        if isinstance(key, PyJWK):
            if key.algorithm_name not in algorithms:
                raise UsageError(
                    f"the key is for {key.algorithm_name}, algorithms are {', '.join(algorithms)}"
                )
            self._key = Key(key.key, key.algorithm_name)
            return
        ready: Any = None
        for name in algorithms:
            try:
                ready = jwt.get_algorithm_by_name(name).prepare_key(key)
            except Exception as exc:  # noqa: BLE001 -- cryptography has errors of its own
                # Never the key, which may be a secret.
                raise UsageError(f"the key does not go with {name}: {type(exc).__name__}") from None
        self._key = Key(ready, "")

    def find(self, head: Mapping[str, Any]) -> Key | Awaitable[Key | None] | None:
        """Return the key."""
        del head
        return self._key


class FetchedKeys:
    """Keys that an identity provider publishes, found by the name that a token gives."""

    def __init__(self, client: PyJWKClient) -> None:
        self._client = client
        self._lock = Lock()
        self._keys: dict[str, Key] | None = None
        self._due = 0.0
        self._next_fetch = 0.0
        self._fetching: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}

    def find(self, head: Mapping[str, Any]) -> Key | Awaitable[Key | None] | None:
        """Return the key at once, where it is there or must not be asked for now."""
        kid = head.get("kid")
        if not isinstance(kid, str) or not 0 < len(kid) <= _LONGEST_KID:
            return None
        found = (self._keys or {}).get(kid)
        now = time.monotonic()
        if found is not None:
            if now >= self._due and now >= self._next_fetch:
                _ = self._fetch_here()  # nobody waits for what may be the same as before
            return found
        # A stranger may name any number of keys: that must not make us ask for them each time.
        if self._keys is not None and now < self._next_fetch and not self._fetching:
            return None
        return self._find_later(kid)

    async def _find_later(self, kid: str) -> Key | None:
        if self._keys is None and not self._fetching and time.monotonic() < self._next_fetch:
            raise BackendError("the keys that verify tokens could not be fetched")
        # Who leaves, leaves: the others still wait for it.
        await asyncio.shield(self._fetch_here())
        return (self._keys or {}).get(kid)

    def _fetch_here(self) -> asyncio.Task[None]:
        """Return what fetches the keys for this event loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            fetching = self._fetching.get(loop)
            if fetching is None:
                for gone in [other for other in self._fetching if other.is_closed()]:
                    del self._fetching[gone]
                fetching = self._fetching[loop] = loop.create_task(self._fetch(loop))
                fetching.add_done_callback(lambda done: done.cancelled() or done.exception())
        return fetching

    async def _fetch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fetch the keys; where that fails, those of before stay."""
        try:
            fetch = sync_to_async(self._client.get_jwk_set, thread_sensitive=False)
            published = await fetch(refresh=True)
        except Exception as exc:  # a client of one's own may raise anything
            self._next_fetch = time.monotonic() + _BETWEEN_FETCHES
            if self._keys is None:
                told = "the keys that verify tokens could not be fetched"
                raise BackendError(f"{told}: {type(exc).__name__}") from exc
        else:
            self._keys = {
                one.key_id: Key(one.key, one.algorithm_name)
                for one in published.keys
                if one.key_id and one.public_key_use in ("sig", None)
            }
            now = time.monotonic()
            self._due, self._next_fetch = now + _FRESH, now + _BETWEEN_FETCHES
        finally:
            with self._lock:
                self._fetching.pop(loop, None)
