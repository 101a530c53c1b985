"""`tieredlimit acl`: the user of Redis that workers, or operators, log in as."""

from __future__ import annotations

import re
import secrets

import click

from tieredlimit.acl import ROLES, Role, rules, setuser
from tieredlimit.cli.session import NAMED, check_namespace
from tieredlimit.cli.terminal import echo_json

_PASSWORD_BYTES = 24
_USER = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_NOTES = {
    "worker": "It can charge, fill and empty every bucket of this namespace, and put a revision "
    "back that Redis has lost: whoever has this password could publish one.",
    "operator": "It can publish, and change every account's buckets, in this namespace. Of the "
    "server's configuration doctor sees nothing: CONFIG GET would show its passwords.",
}


@click.command("acl")
@click.option(
    "--worker", "role", flag_value="worker", type=click.Choice(ROLES), help="For workers."
)
@click.option("--operator", "role", flag_value="operator", help="For whoever runs these commands.")
@NAMED
@click.option("--user", metavar="NAME", help="The user's name; NAMESPACE-worker if not given.")
@click.option("--cluster", is_flag=True, help="For the nodes of a Redis Cluster.")
@click.option("--keep-password", is_flag=True, help="Only the rules, of a user that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    role: Role | None,
    namespace: str,
    user: str | None,
    *,
    cluster: bool,
    keep_password: bool,
    as_json: bool,
) -> None:
    """Print the ACL SETUSER line for a user who may do what a worker or an operator must.

    Nothing is sent anywhere: paste it into redis-cli, on every node, replicas too. The password is
    made anew each time. For Redis 6.2 and later.
    """
    if role is None:
        raise click.UsageError("Say for whom: --worker or --operator.")
    check_namespace(namespace)
    user = f"{namespace}-{role}" if user is None else user
    if not _USER.fullmatch(user):
        told = f"got {user!r:.80}; write 1 to 64 of letters, digits and _.@-"
        raise click.BadParameter(told, param_hint="'--user'")
    password = None if keep_password else secrets.token_urlsafe(_PASSWORD_BYTES)
    if as_json:
        listed = rules(role, namespace, cluster=cluster)
        echo_json({"user": user, "password": password, "rules": listed})
        return
    click.echo(" ".join(setuser(user, role, namespace, password=password, cluster=cluster)))
    click.echo(_NOTES[role], err=True)
