"""What one request has taken so far: the object at `request.state.tieredlimit`."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Scope

from tieredlimit._core.account import Account
from tieredlimit._core.fields import Field
from tieredlimit.decision import Decision
from tieredlimit.errors import Denied, UsageError
from tieredlimit.identity import Identify, resolve
from tieredlimit.limiter import Limiter

__all__ = ["STATE_KEY", "RequestLimits"]

STATE_KEY = "tieredlimit"
"""Where in `scope["state"]` the middleware puts it."""


class RequestLimits:
    """Take for one request, each feature once, whichever doors the request passes.

    Attributes:
        limiter: What decides.
        decisions: What was decided so far, by feature.
        denied: True once the middleware answers with a denial, whose fields then stand.
    """

    __slots__ = (
        "_account",
        "_anonymous",
        "_asking",
        "_identify",
        "_pending",
        "_scope",
        "decisions",
        "denied",
        "limiter",
    )

    def __init__(
        self,
        limiter: Limiter,
        scope: Scope,
        identify: Identify | None,
        anonymous: Identify,
    ) -> None:
        self.limiter = limiter
        self._scope = scope
        self.decisions: dict[str, Decision] = {}
        self.denied = False
        self._identify = identify
        self._anonymous = anonymous
        self._account: Account | None = None
        self._asking: asyncio.Lock | None = None
        self._pending: dict[str, asyncio.Task[Decision]] | None = None

    @property
    def connection(self) -> HTTPConnection:
        """The request, as `identify` sees it."""
        return HTTPConnection(self._scope)

    async def account(self) -> Account:
        """Return who this request is charged to, asking `identify` at most once.

        Where that gives something else than an account or None, it is the client's address.
        """
        if self._account is None:
            # Two takes at once ask once.
            self._asking = self._asking or asyncio.Lock()
            async with self._asking:
                self._account = await self._ask()
        return self._account

    async def take(
        self, feature: str, cost: int = 1, *, account: Account | None = None
    ) -> Decision:
        """Charge the feature once in this request and return the decision.

        A second take of the same feature charges nothing and returns the first one's decision.
        `account` is who to charge instead of whom the middleware's `identify` names. Where that
        fails, the decision is the feature's outage answer.

        Raises:
            UsageError: As `Limiter.take`.
            HTTPException: `identify` raised it, to answer the request itself.
            Denied: `identify` raised it.
        """
        # From a request's body a feature may be anything; `Limiter.take` says what is wrong.
        decision = self.decisions.get(feature) if type(feature) is str else None
        if decision is not None:
            self._warn_of_another(feature, account)
            return decision
        if type(feature) is not str:
            return await self.take_first(feature, cost, account)
        if self._pending is None:
            self._pending = {}
        underway = self._pending
        pending = underway.get(feature)
        if pending is None:
            # A task, so that a second door that comes while the first still waits joins it.
            pending = asyncio.ensure_future(self.take_first(feature, cost, account))
            underway[feature] = pending
            pending.add_done_callback(lambda _: underway.pop(feature))
        return await asyncio.shield(pending)

    async def take_first(self, feature: str, cost: int, account: Account | None) -> Decision:
        """Do what `take` does where nothing else can be taking the feature yet."""
        try:
            account = account or await self.account()
        except (HTTPException, Denied):
            raise
        except Exception as exc:  # noqa: BLE001 -- whatever a lookup may raise is no decision
            decision = self.limiter.outage(feature, cost, exc)
        else:
            decision = await self.limiter.take(account, feature, cost)
        self.decisions[feature] = decision
        return decision

    def fields(self, *, legacy: bool) -> list[Field]:
        """Return the response fields of everything taken, each field once."""
        decisions = self.decisions
        if len(decisions) == 1:
            (decision,) = decisions.values()
            return decision.fields(legacy=legacy)
        return _merge(decision.fields(legacy=legacy) for decision in decisions.values())

    def _warn_of_another(self, feature: str, account: Account | None) -> None:
        """Log where a door names another payer than the one who was charged before it."""
        charged = self._account
        if account is None or charged is None:
            return
        if (account.id, account.anonymous) != (charged.id, charged.anonymous):
            told = "leave the routes out of the policy for a feature that handlers charge"
            self.limiter.complaints.log(
                f'"{feature}" was charged to whom the middleware named, before a handler named '
                "another account",
                UsageError(told),
            )

    async def _ask(self) -> Account:
        if self._account is not None:
            return self._account  # another take has asked while this one waited
        for identify in (self._identify, self._anonymous):
            if identify is None:
                continue
            try:
                answer = identify(self.connection)
                account = answer if isinstance(answer, Account) else await resolve(answer)
            except UsageError as exc:
                # An id that cannot be one may be the client's doing, and must not let it in free.
                told = "identify gave what is no account, the client is charged by its address"
                self.limiter.complaints.log(told, exc)
                continue
            if account is not None:
                return account
        return Account("unknown", anonymous=True)


def _merge(several: Iterable[list[Field]]) -> list[Field]:
    """Join the fields of several decisions: lists grow, `X-RateLimit-*` are the first's."""
    merged: dict[bytes, bytes] = {}
    for fields in several:
        for name, value in fields:
            if name not in merged:
                merged[name] = value
            elif not name.startswith(b"x-"):
                merged[name] += b", " + value
    return list(merged.items())
