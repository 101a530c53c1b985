"""JSON Web Tokens: the account is who a verified token says, and what it says of them.

Needs `pip install "tieredlimit[jwt]"`. Whoever asks an identity provider for its keys does so in a
thread, and once for all that wait.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from tieredlimit._core.account import Account
from tieredlimit._core.kept import Kept
from tieredlimit.credentials import (
    cookie_credential,
    header_credential,
    header_values,
    require_token,
)
from tieredlimit.errors import UsageError
from tieredlimit.forking import anew_after_fork
from tieredlimit.identity import Answer, Identify, resolve
from tieredlimit.integrations._jwt_claims import Claim, Claims

try:
    import jwt
    from jwt import PyJWK, PyJWKClient
    from jwt.algorithms import has_crypto

    from tieredlimit.integrations._jwt_keys import FetchedKeys, GivenKey, Key
except ImportError as exc:  # pragma: no cover -- the tests have PyJWT
    raise ImportError('PyJWT is missing: pip install "tieredlimit[jwt]"') from exc

if TYPE_CHECKING:
    from jwt.algorithms import AllowedPublicKeys

__all__ = ["Claim", "Claims", "access_token"]

_log = logging.getLogger("tieredlimit")

_LONGEST = 8_192
_MOST = 1_000_000
_MOST_LEEWAY = 3_600
_LONGEST_KEPT = 300.0


def access_token(
    key: str | bytes | AllowedPublicKeys | PyJWK | PyJWKClient,
    *,
    algorithms: Sequence[str],
    audience: str | Sequence[str] | None,
    issuer: str | Sequence[str] | None = None,
    leeway: float = 0.0,
    header: str | None = "authorization",
    scheme: str | None = "Bearer",
    cookie: str | None = None,
    claims: Claims | Callable[[Mapping[str, Any]], Answer] = Claims(),  # noqa: B008 -- frozen
    refuse_invalid: bool = False,
    most: int = 4_096,
    clock: Callable[[], float] = time.time,
) -> Identify:
    """Identify by a JSON Web Token, of which signature, audience, issuer and times are verified.

    A token without `exp` is not valid. One that is absent, not valid or longer than 8,192
    characters is a client without an account. A valid one is not verified again until its `exp`,
    and for 5 minutes at most.

    Args:
        key: What verifies: a secret, a public key (PEM, or as `cryptography` has it), a `PyJWK`, or
            a `PyJWKClient` that fetches them. Fetched keys are good for 5 minutes, and then until
            a fetch succeeds; for a token that names another key they are fetched again, every 10
            seconds at most. A key of a key set is for the algorithm that it names, or else for
            all of its type.
        algorithms: Those that are accepted, such as `["RS256"]`. What a token says of itself
            decides nothing; "none" is refused.
        audience: Who must be meant by `aud`; of several, one. None accepts tokens that name nobody,
            and none that are meant for somebody.
        issuer: Who must have issued it; of several, one. None is anybody.
        leeway: Seconds by which clocks may differ.
        header: The header to look in, None for no header.
        scheme: What stands before the token there, in any case; None is the bare token.
        cookie: The cookie to look in where the header has no token; None for no cookie.
        claims: From a valid token's claims to the account: which claim is what, or a function of
            yours, sync or async, that is called at every request; compose it with `remember`.
        refuse_invalid: Whether a token that is not valid is answered with 401, by the middleware.
            Where there is none the client is without an account either way.
        most: The most tokens that are not verified again, 1 to 1,000,000.
        clock: Returns seconds since 1970; for tests.

    The identify raises `UsageError` where a valid token's claims make no account, and
    `BackendError` where a token names a key that is not there and the latest fetch failed.

    Raises:
        UsageError: An argument cannot be used, or an algorithm and the key do not go together.
    """
    _check_places(header=header, scheme=scheme, cookie=cookie)
    if type(leeway) not in (int, float) or not 0 <= leeway <= _MOST_LEEWAY:
        raise UsageError(f"leeway must be from 0 to {_MOST_LEEWAY:,} s, got {leeway!r:.80}")
    if type(most) is not int or not 1 <= most <= _MOST:
        raise UsageError(f"most must be from 1 to {_MOST:,}, got {most!r:.80}")
    if not isinstance(claims, Claims) and not callable(claims):
        raise UsageError(f"claims must be Claims(…) or a function, got {claims!r:.80}")
    names = _checked_algorithms(algorithms)
    return _AccessToken(
        FetchedKeys(key) if isinstance(key, PyJWKClient) else GivenKey(key, names),
        _Expected(names, audience, issuer, leeway),
        _Places(None if header is None else header.lower().encode("ascii"), scheme, cookie),
        claims,
        refuse_invalid,
        Kept(most),
        clock,
    )


class _AccessToken:
    """Identify by a token; what `access_token` makes."""

    def __init__(
        self,
        keys: FetchedKeys | GivenKey,
        expected: _Expected,
        places: _Places,
        claims: Claims | Callable[[Mapping[str, Any]], Answer],
        refuse_invalid: bool,
        verified: Kept[bytes, Any],
        clock: Callable[[], float],
    ) -> None:
        self._keys = keys
        self._expected = expected
        self._places = places
        self._claims = claims
        self._refuse_invalid = refuse_invalid
        self._verified = verified
        self._clock = clock
        self._lock = Lock()
        anew_after_fork(self)

    def leave_to_parent(self) -> None:
        """Hold a lock of its own in the child of a fork. Nothing is kept by halves."""
        self._lock = Lock()

    def __call__(self, connection: HTTPConnection) -> Answer:
        token = self._places.token_of(connection)
        if token is None:
            return None
        if len(token) > _LONGEST or not token.isascii():
            return self._refused()
        digest = hashlib.sha256(token.encode()).digest()
        with self._lock:
            kept = self._verified.get(digest, self._clock())
        if kept is not None:
            return self._answer_of(kept[0])
        head = self._expected.head_of(token)
        if head is None:
            return self._refused()
        found = self._keys.find(head)
        if isinstance(found, Awaitable):
            return self._judged_later(token, digest, found)
        return self._judged(token, digest, found)

    def _judged(self, token: str, digest: bytes, found: Key | None) -> Answer:
        payload = None if found is None else self._expected.verified(token, found)
        if payload is None:
            return self._refused()
        # An account is made once; what a function makes of claims is its own affair.
        claims = self._claims
        kept = claims.account(payload) if isinstance(claims, Claims) else payload
        if kept is None:
            return None
        until = _until(payload["exp"], self._expected.leeway, self._clock())
        with self._lock:
            self._verified.put(digest, kept, until)
        return self._answer_of(kept)

    async def _judged_later(
        self, token: str, digest: bytes, finding: Awaitable[Key | None]
    ) -> Account | None:
        return await resolve(self._judged(token, digest, await finding))

    def _answer_of(self, kept: Any) -> Answer:
        claims = self._claims
        if isinstance(claims, Claims):
            account: Account = kept
            return account
        return claims(dict(kept))

    def _refused(self) -> Answer:
        if not self._refuse_invalid:
            return None
        told = {"www-authenticate": 'Bearer error="invalid_token"'}
        raise HTTPException(401, "The access token is not valid.", told)


class _Places(NamedTuple):
    """Where a token may be."""

    header: bytes | None
    scheme: str | None
    cookie: str | None

    def token_of(self, connection: HTTPConnection) -> str | None:
        """Return what looks like a token, None where there is none."""
        if self.header is not None:
            token = header_credential(connection, self.header, self.scheme)
            # Two that differ leave it open which one the application reads.
            if token is not None or len(set(header_values(connection, self.header))) > 1:
                return token
        return None if self.cookie is None else cookie_credential(connection, self.cookie)


class _Expected(NamedTuple):
    """What a token must be."""

    algorithms: tuple[str, ...]
    audience: str | Sequence[str] | None
    issuer: str | Sequence[str] | None
    leeway: float

    def head_of(self, token: str) -> Mapping[str, Any] | None:
        """Return what a token says of itself, None where it can be no valid one."""
        try:
            head = jwt.get_unverified_header(token)
        except Exception as exc:  # noqa: BLE001 -- whatever a stranger's text makes a parser do
            _tell(type(exc).__name__)
            return None
        if head.get("alg") not in self.algorithms:
            _tell("its algorithm is none of ours")
            return None
        return head

    def verified(self, token: str, found: Key) -> dict[str, Any] | None:
        """Return the claims of a token, None where it is not valid."""
        fit = self.algorithms if found.algorithms is None else found.algorithms
        algorithms = [name for name in self.algorithms if name in fit]
        # Who it names is read from the claims, and may be a number there.
        options: Any = {"require": ["exp"], "verify_sub": False}
        try:
            payload: dict[str, Any] = jwt.decode(
                token,
                found.key,
                algorithms=algorithms,
                audience=self.audience,
                issuer=self.issuer,
                leeway=self.leeway,
                options=options,
            )
        except Exception as exc:  # noqa: BLE001 -- as above; beside its own errors, it lets others through
            _tell(type(exc).__name__)
            return None
        return payload


def _tell(why: str) -> None:
    """Say why a token is not valid, to who looks for it: never with a word of the token."""
    _log.debug("tieredlimit: a token is not valid: %s", why)


def _until(exp: object, leeway: float, now: float) -> float:
    """Return until when a token need not be verified again."""
    if not isinstance(exp, int | float):
        return now  # PyJWT reads digits as well
    # Compared before anything is added: it may be any number.
    return exp + leeway if exp < now + _LONGEST_KEPT - leeway else now + _LONGEST_KEPT


def _check_places(**places: str | None) -> None:
    if places["cookie"] is None and places["header"] is None:
        raise UsageError("give a header or a cookie to find the token in")
    for place, word in places.items():
        if word is not None:
            require_token(place, word)


def _checked_algorithms(algorithms: Sequence[str]) -> tuple[str, ...]:
    if isinstance(algorithms, str) or not algorithms:
        raise UsageError(f'algorithms must be a list such as ["RS256"], got {algorithms!r:.80}')
    for name in algorithms:
        if str(name).lower() == "none":
            raise UsageError(f"algorithms must be such as sign a token, got {name!r:.80}")
        try:
            jwt.get_algorithm_by_name(name)
        except NotImplementedError:
            more = "" if has_crypto else "; without the package cryptography only HS… are known"
            raise UsageError(f"unknown algorithm {name!r:.80}{more}") from None
    secret = [name.startswith("HS") for name in algorithms]
    if any(secret) and not all(secret):
        # A public key would be taken for the secret of a token that anybody can sign.
        raise UsageError(f"HS… and others do not mix, got {', '.join(algorithms)}")
    return tuple(algorithms)
