"""What a user of Redis must be allowed to be a worker or an operator of one namespace.

Commands that scripts run inside the server need the permission as well.
"""

from __future__ import annotations

from typing import Literal

from tieredlimit._core.keys import KEY_FORMAT

__all__ = ["ROLES", "Role", "rules", "setuser"]

Role = Literal["worker", "operator"]

ROLES: tuple[Role, ...] = ("worker", "operator")

# Per role and purpose. CONFIG GET is in neither: it shows the passwords of the server.
_COMMANDS: dict[Role, dict[str, str]] = {
    "worker": {
        "connecting": "client|setname select time get set script|load",
        "taking": "evalsha eval time get set zcard zrange zrevrangebyscore zadd zcount "
        "zremrangebyrank pexpire",
        "leases, settling and refunds": "evalsha eval time get set del zscore zadd zrem pexpire",
        "following revisions": "get subscribe ping eval time",
        "heartbeats": "eval time zrangebyscore zscore zcard hexists zrem hdel zadd hset pexpire",
        "putting back and completing a revision": "eval get set zadd zrange zrem del publish "
        "info wait",
    },
    "operator": {
        "connecting": "client|setname select get",
        "looking": "eval time get zrevrange mget zrangebyscore zmscore hmget zcount exists",
        "publishing": "eval get set zadd zrange zrem del publish info wait",
        "accounts": "eval time get set del",
        "doctor": "ping info time eval set wait publish script|load",
    },
}
_OF_A_CLUSTER = "cluster|slots asking"

# What stands beside the buckets, below the namespace's own hash tag.
_KEYS: dict[Role, str] = {
    "worker": "layout head numbers revision:* workers heartbeats",
    "operator": "layout head numbers revision:* workers heartbeats label",
}


def rules(role: Role, namespace: str, *, cluster: bool = False) -> list[str]:
    """Return the rules of a role in a namespace, as ACL SETUSER takes them from Redis 6.2 on.

    They replace whatever rules the user had. `cluster` says that it is a Redis Cluster.
    """
    commands = set(" ".join(_COMMANDS[role].values()).split())
    if cluster:
        commands = commands - {"select"} | set(_OF_A_CLUSTER.split())
    news = [f"&tl:{{{namespace}}}:news"]
    own = [f"~tl:{{{namespace}}}:{name}" for name in _KEYS[role].split()]
    allowed = [f"+{command}" for command in sorted(commands)]
    buckets = f"~tl{KEY_FORMAT}:{{{namespace}:*"
    return ["resetkeys", "resetchannels", "-@all", buckets, *own, *news, *allowed]


def setuser(
    user: str, role: Role, namespace: str, *, password: str | None, cluster: bool = False
) -> list[str]:
    """Return the command, word by word; without a password the user keeps those it has."""
    login = [] if password is None else ["resetpass", f">{password}"]
    return ["ACL", "SETUSER", user, "on", *login, *rules(role, namespace, cluster=cluster)]
