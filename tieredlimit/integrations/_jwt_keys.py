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

from tieredlimit.complaints import Complaints
from tieredlimit.errors import BackendError, UsageError
from tieredlimit.forking import anew_after_fork

__all__ = ["FetchedKeys", "GivenKey", "Key"]

_LONGEST_KID = 256
_FRESH = 300.0
_BETWEEN_FETCHES = 10.0


# What a key is good for that does not say so itself; keys of other types say so by their curve.
_BY_TYPE = {
    "RSA": ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    "oct": ("HS256", "HS384", "HS512"),
}


class Key(NamedTuple):
    """A key that is ready to verify, and the algorithms it is for; None is any."""

    key: Any
    algorithms: tuple[str, ...] | None


class GivenKey:
    """One key, made ready once."""

    def __init__(self, key: Any, algorithms: Sequence[str]) -> None:
        if isinstance(key, PyJWK):
            self._key = _key_of(key)
            fit = self._key.algorithms or ()
            if not set(fit) & set(algorithms):
                told = f"the key is for {', '.join(fit)}, algorithms are {', '.join(algorithms)}"
                raise UsageError(told)
            return
        ready: Any = None
        for name in algorithms:
            try:
                ready = jwt.get_algorithm_by_name(name).prepare_key(key)
            except Exception as exc:  # noqa: BLE001 -- cryptography has errors of its own
                # Never the key, which may be a secret.
                raise UsageError(f"the key does not go with {name}: {type(exc).__name__}") from None
        self._key = Key(ready, None)

    def find(self, head: Mapping[str, Any]) -> Key | Awaitable[Key | None] | None:
        """Return the key."""
        del head
        return self._key


class FetchedKeys:
    """Keys that an identity provider publishes, found by the name that a token gives."""

    def __init__(self, client: PyJWKClient) -> None:
        self._client = client
        self._complaints = Complaints()
        self._lock = Lock()
        self._keys: dict[str, Key] = {}
        self._failure: str | None = None
        self._due = 0.0
        self._next_fetch = 0.0
        self._fetching: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self._left_to_parent: list[object] = []
        anew_after_fork(self)

    def leave_to_parent(self) -> None:
        """Keep the keys in the child of a fork, and wait for no fetch of the parent's."""
        self._left_to_parent.append(self._fetching)
        self._fetching = {}
        self._lock = Lock()

    def find(self, head: Mapping[str, Any]) -> Key | Awaitable[Key | None] | None:
        """Return the key at once, where it is there or must not be asked for now.

        Raises:
            BackendError: It is not there, and the latest fetch failed: it may be a new one.
        """
        kid = head.get("kid")
        if not isinstance(kid, str) or not 0 < len(kid) <= _LONGEST_KID:
            return None
        found = self._keys.get(kid)
        now = time.monotonic()
        if found is not None:
            if now >= self._due and now >= self._next_fetch:
                _ = self._fetch_here()  # nobody waits for what may be the same as before
            return found
        # A stranger may name any number of keys: that must not make us ask for them each time.
        if now < self._next_fetch and asyncio.get_running_loop() not in self._fetching:
            return self._published(kid)
        return self._find_later(kid)

    async def _find_later(self, kid: str) -> Key | None:
        # Who leaves, leaves: the others still wait for it.
        await asyncio.shield(self._fetch_here())
        return self._published(kid)

    def _published(self, kid: str) -> Key | None:
        found = self._keys.get(kid)
        if found is None and self._failure is not None:
            raise BackendError(self._failure)
        return found

    def _fetch_here(self) -> asyncio.Task[None]:
        """Return what fetches the keys for this event loop."""
        loop = asyncio.get_running_loop()
        with self._lock:
            fetching = self._fetching.get(loop)
            if fetching is None:
                for gone in [other for other in self._fetching if other.is_closed()]:
                    del self._fetching[gone]
                fetching = self._fetching[loop] = loop.create_task(self._fetch(loop))
        return fetching

    async def _fetch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Fetch the keys; where that fails, those of before stay."""
        try:
            fetch = sync_to_async(self._client.get_jwk_set, thread_sensitive=False)
            published = await fetch(refresh=True)
            self._keys = {
                one.key_id: _key_of(one)
                for one in published.keys
                if one.key_id and one.public_key_use in ("sig", None)
            }
        except Exception as exc:  # noqa: BLE001 -- a client of one's own may raise anything
            told = f"the keys that verify tokens could not be fetched: {type(exc).__name__}"
            self._failure = told
            self._next_fetch = time.monotonic() + _BETWEEN_FETCHES
            without = "tokens of a key that is not there have the outage answer"
            self._complaints.log(without, BackendError(told))
        else:
            self._failure = None
            now = time.monotonic()
            self._due, self._next_fetch = now + _FRESH, now + _BETWEEN_FETCHES
        finally:
            with self._lock:
                self._fetching.pop(loop, None)


def _key_of(published: PyJWK) -> Key:
    """Return a key for its own algorithm, or for all of its type if it names none."""
    name = published.algorithm_name
    fit = _BY_TYPE.get(published.key_type or "", ())
    # PyJWT takes the first of its type for one that is not named, and says the same of either.
    document: object = getattr(published, "_jwk_data", None)
    named = not isinstance(document, Mapping) or document.get("alg")
    return Key(published.key, (name,) if named or name not in fit[:1] else fit)
