"""JSON Web Tokens: the types of what verifies them, and of what makes an account of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_type

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK, PyJWKClient

from tieredlimit import Account
from tieredlimit.identity import Identify, remember
from tieredlimit.integrations.jwt import Claim, Claims, access_token


def claims() -> Claims:
    plan: Claim = ("app_metadata", "plan")
    read = Claims(id="uid", plan=plan, created_at=None, tags="scope", within={"org": "org_id"})
    assert_type(read.id, Claim)
    assert_type(read.plan, Claim | None)
    assert_type(read.account({"uid": "u1"}), Account | None)
    return read


def identifies(
    fetched: PyJWKClient, one: PyJWK, key: RSAPublicKey | EllipticCurvePublicKey, secret: str
) -> list[Identify]:
    def by_claims(claims: Mapping[str, Any]) -> Account | None:
        return Account(claims["sub"])

    async def by_database(claims: Mapping[str, Any]) -> Account | None:
        return await looked_up(claims["sub"])

    async def looked_up(name: str) -> Account | None:
        return Account(name)

    kept = remember(looked_up)
    assert_type(access_token(secret, algorithms=["HS256"], audience=None), Identify)
    access_token({"kty": "oct"}, algorithms=["HS256"], audience=None)  # type: ignore[arg-type]
    return [
        access_token(
            fetched,
            algorithms=("RS256", "ES256"),
            audience=["api", "web"],
            issuer="https://issuer.example",
            leeway=2.5,
            header="x-token",
            scheme=None,
            cookie="token",
            claims=claims(),
            refuse_invalid=True,
            most=100,
            clock=lambda: 0.0,
        ),
        access_token(one, algorithms=["RS256"], audience="api", claims=by_claims),
        access_token(key, algorithms=["RS256"], audience="api", claims=by_database),
        access_token(
            b"-----BEGIN PUBLIC KEY-----",
            algorithms=["ES256"],
            audience="api",
            header=None,
            cookie="token",
            claims=lambda claims: kept(claims["sub"]),
        ),
    ]
