"""What one request has taken so far: the object at `request.state.tieredlimit`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Scope

from tieredlimit._core.account import Account
from tieredlimit._core.fields import Field, merged_fields
from tieredlimit.decision import STATUSES, Decision
from tieredlimit.ending import Ending, being_cancelled
from tieredlimit.errors import BackendError, Denied, UsageError
from tieredlimit.identity import Answer, Identify, resolve
from tieredlimit.limiter import SETTLE_WITHIN, Limiter
from tieredlimit.settling import Reservation

__all__ = ["STATE_KEY", "RequestLimits", "is_preflight", "limits_in"]

STATE_KEY = "tieredlimit"
"""Where in `scope["state"]` the middleware puts it."""


class RequestLimits:
    """Take for one request, each feature once, whichever doors the request passes.

    Attributes:
        limiter: What decides.
        decisions: What was decided so far, by feature.
        denied: True once the middleware answers with a denial, whose fields then stand.
        ending: What is done at the end of the response, None where that is nothing so far.
        failure: What `identify` raised, which is not asked again; None where it has not.
        metered: The feature that the middleware has metered the request as, None if none.
        outer: What takes of another limiter, whose door the request has passed before; or None.
        refusal: What `refuse` was told, None for nothing.
        refused: Whether the middleware has answered with that; None until it begins to.
    """

    __slots__ = (
        *("_account", "_anonymous", "_answer", "_asking", "_identify", "_over", "_pending"),
        *("_scope", "decisions", "denied", "ending", "failure", "limiter", "metered", "outer"),
        *("refusal", "refused"),
    )

    def __init__(
        self,
        limiter: Limiter,
        scope: Scope,
        identify: Identify | None,
        anonymous: Identify,
    ) -> None:
        self.limiter: Limiter = limiter
        self._scope = scope
        self.decisions: dict[str, Decision] = {}
        self.denied: bool = False
        self.failure: Exception | None = None
        self.metered: str | None = None
        self.outer: RequestLimits | None = None
        self.refusal: Denied | HTTPException | None = None
        self.refused: bool | None = None
        self._identify = identify
        self._anonymous = anonymous
        self._account: Account | None = None
        self._answer: Answer = None
        self._asking: asyncio.Lock | None = None
        self._pending: dict[str, asyncio.Future[Any]] | None = None
        self._over = False
        self.ending: Ending | None = None

    def see_to_end(self) -> Ending:
        """Return what sees to the end of the response, from now on if nothing did."""
        if self.ending is None:
            self.ending = Ending(self.limiter, self.decisions, over=self._over)
        return self.ending

    def end(self) -> None:
        """Let go of the request, which is over; what a task of its handler still takes counts.

        A scope and we refer to each other: left so, each request would wait for the garbage
        collector, which under load stops the whole process for tens of milliseconds.
        """
        self._over = True
        if self.ending is not None:
            self.ending.end()
        # What was raised refers to us, too, by the frames that it has passed.
        self.refusal = self.outer = None
        if self.failure is not None:
            self.failure = UsageError("identify has failed in this request, which is over")
        if self._account is not None:
            self._scope = {}
            return
        scope = self._scope = {**self._scope, STATE_KEY: None}
        state = scope.get("state")
        # An application may have put something else there.
        if isinstance(state, Mapping):
            scope["state"] = {key: value for key, value in state.items() if value is not self}

    async def account(self) -> Account:
        """Return who this request is charged to, asking `identify` at most once.

        Where that gives something else than an account or None, it is the client's address. Only
        an answer that nobody waited for, since that was cancelled, is asked for anew. An `identify`
        that takes must say for whom: to ask here, it would wait for itself.

        Raises:
            Exception: What `identify` raised, now or before in this request.
        """
        account = self._account or self._account_now()
        if account is None:
            # Two takes at once ask once.
            self._asking = self._asking or asyncio.Lock()
            async with self._asking:
                account = self._account = self._account or await self._account_later()
        return account

    def answers(self, error: Exception) -> TypeGuard[Denied | HTTPException]:
        """Say whether an exception is to be the request's answer.

        That is a denial, and the `HTTPException` that `identify` has raised; any other one is the
        application's own.
        """
        return isinstance(error, Denied) or (
            isinstance(error, HTTPException) and error is self.failure
        )

    async def take(
        self, feature: str, cost: int = 1, *, account: Account | None = None
    ) -> Decision:
        """Charge the feature once in this request and return the decision.

        A second take of the same feature charges nothing and returns the first one's decision. A
        lease is renewed while the response runs, and released at its end unless it was detached.
        `account` is who to charge instead of whom the middleware's `identify` names. Where that
        fails, the decision is the feature's outage answer. A feature that a newer policy has no
        more is not limited: its decision is `Limiter.unmetered`.

        Raises:
            UsageError: As `Limiter.take`, of a feature that no policy of this process ever had.
            HTTPException: `identify` raised it, to answer the request itself.
            Denied: `identify` raised it.
        """
        # From a request's body a feature may be anything; `Limiter.take` says what is wrong.
        decision = self.decisions.get(feature) if type(feature) is str else None
        if decision is not None:
            self._warn_of_another(feature, account)
            return decision
        return await self._take_once(feature, cost, account, None)

    async def _take_once(
        self, feature: str, cost: int, account: Account | None, settle_within: float | None
    ) -> Decision:
        """Take what was not decided yet, together with whoever takes it at the same time."""
        if type(feature) is not str:
            return await self.take_first(feature, cost, account)
        underway = self._pending = self._pending or {}
        if feature in underway:
            await asyncio.wait((underway[feature],))
            # Whoever took it may have been cancelled, or have found that it has to be another.
            return await self.take(feature, cost, account=account)
        # A task, which goes on where its caller gives up.
        taking = self.take_first(feature, cost, account, settle_within=settle_within)
        pending = underway[feature] = asyncio.ensure_future(taking)
        pending.add_done_callback(lambda _: underway.pop(feature))
        try:
            return await asyncio.shield(pending)
        finally:
            del pending  # what it raised refers to this frame

    async def take_beside(
        self, feature: str, cost: int, rematch: Callable[[], tuple[str, int]]
    ) -> Decision:
        """Do what `take_first` does where another door may be taking the feature already."""
        underway = self._pending = self._pending or {}
        if feature in underway:
            return await self.take(feature, cost)
        done = underway[feature] = asyncio.get_running_loop().create_future()
        try:
            return await self.take_first(feature, cost, None, rematch)
        finally:
            del underway[feature]
            done.set_result(None)

    async def take_first(
        self,
        feature: str,
        cost: int,
        account: Account | None = None,
        rematch: Callable[[], tuple[str, int]] | None = None,
        settle_within: float | None = None,
    ) -> Decision:
        """Do what `take` does where nothing else can be taking the feature yet.

        `rematch` and `settle_within` are as for `Limiter.take`.
        """
        decision: Decision | None
        waited = False
        try:
            account = account or self._account or self._account_now()
            if account is None:
                waited = True
                account = await self.account()
        except (HTTPException, Denied):
            raise
        except Exception as exc:  # noqa: BLE001 -- whatever a lookup may raise is no decision
            # Kept there alone: this frame is one of those that it has passed.
            self.failure = exc
        if waited and rematch is not None:
            # Another policy may have come into force meanwhile, which knows no such feature.
            feature, cost = rematch()
        try:
            if account is None:
                decision = self.limiter.outage(
                    feature, cost, self.failure or UsageError("nobody is it")
                )
            else:
                decision = None
                if settle_within is None:
                    decision = self.limiter.take_now(account, feature, cost)
                if decision is None:
                    decision = await self.limiter.take(
                        account, feature, cost, rematch=rematch, settle_within=settle_within
                    )
        except UsageError:
            decision = self.limiter.unmetered(feature, cost)
            if decision is None:
                raise
        return self._decided(decision)

    def lets_in(self, feature: str, cost: int) -> bool:
        """Say that the request may go on as metered, where that needs no waiting and no more care.

        False is no denial: `take_first` has the last word, and repeats nothing that was asked here.
        """
        self.metered = feature
        decision = self.decisions.get(feature)
        if decision is None:
            if self._pending:
                return False  # maybe this very feature, which is charged once
            try:
                account = self._account or self._account_now()
                if account is not None:
                    decision = self.limiter.take_now(account, feature, cost)
            except Exception:  # noqa: BLE001 -- `take_first` meets the same
                return False
            if decision is None:
                return False
            self._decided(decision)
        return decision.allowed

    def _decided(self, decision: Decision) -> Decision:
        """Keep what was decided, and see to its end where it has one."""
        self.decisions[decision.feature] = decision
        if decision.taken is not None:
            self.see_to_end().add(decision)
        return decision

    async def reserve(
        self,
        feature: str,
        cost: int = 1,
        *,
        account: Account | None = None,
        settle_within: float = SETTLE_WITHIN,
    ) -> Reservation:
        """Charge an estimate once in this request, to be corrected as `Limiter.reserve` says.

        Await it: `reservation = await request.state.tieredlimit.reserve("video", 30)`, then
        `await reservation.settle(seconds)`, here or by its token. Its lease is as of `take`. Where
        the feature is charged already, as by its route, that cost is final.

        Raises:
            Denied: It is denied; the middleware renders it.
            UsageError: As `Limiter.reserve`, or the feature was charged in this request before.
            HTTPException: `identify` raised it, to answer the request itself.
        """
        if type(feature) is str and (feature in self.decisions or feature in (self._pending or ())):
            told = "leave its routes out of the policy where a handler reserves"
            raise UsageError(f'"{feature:.80}" was charged in this request already; {told}')
        reservation = Reservation(
            lambda: self._take_once(feature, cost, account, settle_within),
            lambda taken, actual: self.limiter.settle(taken.token(), actual),
        )
        (await reservation.take()).raise_if_denied()
        return reservation

    def refuse(self, refusal: Denied | HTTPException) -> int:
        """Have the middleware answer with a refusal, in place of what the application will send.

        For frameworks that would make an error page of what is raised. What the application still
        answers is dropped, but for header fields that say nothing of a body, such as cookies. Where
        an answer has begun already, it is too late. Returns the usual status of such an answer.
        """
        self.refusal = refusal
        if isinstance(refusal, Denied):
            return STATUSES[refusal.decision.reason]
        return refusal.status_code

    def fields(self, *, legacy: bool) -> list[Field]:
        """Return the response fields of everything taken, each field once."""
        decisions = self.decisions
        if len(decisions) == 1:
            (decision,) = decisions.values()
            return decision.fields(legacy=legacy)
        return merged_fields(decision.fields(legacy=legacy) for decision in decisions.values())

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

    def _account_now(self) -> Account | None:
        """Return who it is, None where finding out has to wait."""
        if self.failure is not None:
            raise self.failure
        if self._answer is not None or self._asking is not None:
            return None  # another take has asked, and waits
        # Most answer at once. What does not is kept for `_account_later`.
        try:
            answer = self._first_answer()
        except Exception as exc:
            self.failure = exc
            raise
        if isinstance(answer, Account):
            self._account = answer
            return answer
        self._answer = answer
        return None

    async def _account_later(self) -> Account:
        """Return the account that an answer leads to, or else the client's address."""
        if self.failure is not None:
            raise self.failure
        answer, self._answer = self._answer, None
        try:
            if answer is None:
                answer = self._first_answer()
            account = await self._resolved(answer)
            if account is None:
                account = await self._resolved(self._answer_of(self._anonymous))
        except asyncio.CancelledError as exc:
            if being_cancelled():
                raise
            # Not we were, but what it has waited for.
            self.failure = BackendError("what identify waited for was cancelled")
            raise self.failure from exc
        except Exception as exc:
            self.failure = exc
            raise
        return account or Account("unknown", anonymous=True)

    def _first_answer(self) -> Answer:
        answer = None if self._identify is None else self._answer_of(self._identify)
        return self._answer_of(self._anonymous) if answer is None else answer

    def _answer_of(self, identify: Identify) -> Answer:
        try:
            return identify(HTTPConnection(self._scope))
        except UsageError as exc:
            self._complain(exc)
            return None

    async def _resolved(self, answer: Answer) -> Account | None:
        try:
            return answer if isinstance(answer, Account) else await resolve(answer)
        except UsageError as exc:
            self._complain(exc)
            return None

    def _complain(self, error: UsageError) -> None:
        # An id that cannot be one may be the client's doing, and must not let it in free.
        told = "identify gave what is no account, the client is charged by its address"
        self.limiter.complaints.log(told, error)


def limits_in(scope: Scope, limiter: Limiter) -> RequestLimits | None:
    """Return what takes of a limiter for a request, None where it has passed no door of that."""
    limits = scope.get(STATE_KEY)
    while isinstance(limits, RequestLimits) and limits.limiter is not limiter:
        limits = limits.outer
    return limits if isinstance(limits, RequestLimits) else None


def is_preflight(scope: Scope) -> bool:
    """Say whether a request of OPTIONS is a browser's, that asks before it sends another."""
    names = {name.lower() for name, _ in scope["headers"]}
    return b"origin" in names and b"access-control-request-method" in names
