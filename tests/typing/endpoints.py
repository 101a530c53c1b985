"""What all frameworks have in common, for one that has no module of ours: the types of a door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

from starlette.requests import HTTPConnection
from starlette.types import Scope

from tieredlimit import Account
from tieredlimit.identity import Answer
from tieredlimit.integrations.endpoints import (
    Asked,
    Connection,
    Door,
    feature_of,
    limits_of,
    refused,
)
from tieredlimit.request import RequestLimits


class OwnFrameworks:
    """A request of another framework, with the scope that it was made of."""

    scope: Mapping[str, Any] = {}


async def another_framework(connection: OwnFrameworks, scope: Scope, answer: Answer) -> int | None:
    known: list[Connection] = [connection, scope, HTTPConnection(scope)]
    assert_type([feature_of(one) for one in known], list[str | None])
    assert_type(limits_of(connection, "it"), RequestLimits)
    assert_type(refused(connection, ValueError()), int | None)

    def own_price(request: OwnFrameworks) -> int:
        return len(request.scope)

    door = Door("video", own_price, account=lambda _: answer)
    assert_type(door, Door[OwnFrameworks])
    assert_type(door.feature, str)
    asked = door.asked(connection, connection)
    assert_type(asked, Asked | None)
    assert_type(await door.charge(connection, (1, Account("u1"))), int | None)
    return await door.charge(connection, asked)
