"""The way from a command line to a namespace in Redis, and back with a plain sentence."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from click.core import ParameterSource

from tieredlimit._core.keys import KEY_FORMAT, IdSecret, Layout
from tieredlimit._core.policy import Policy
from tieredlimit._core.revision import Revision
from tieredlimit.backends import ClusterBackend, RedisBackend
from tieredlimit.backends.control import ControlStore
from tieredlimit.backends.link import connection_of
from tieredlimit.backends.nodecalls import Address
from tieredlimit.backends.nodes import Nodes, Route
from tieredlimit.backends.redis_control import TIMEOUT, RedisControl
from tieredlimit.cli import policies as policy_files
from tieredlimit.cli.pace import Pace, pace_of
from tieredlimit.cli.terminal import printable
from tieredlimit.environment import STORED
from tieredlimit.errors import PolicyError, TieredLimitError, UsageError

P = ParamSpec("P")
T = TypeVar("T")

_NAMESPACE = re.compile(r"[a-z0-9_-]{1,32}")
_SECRET = "TIEREDLIMIT_ID_SECRET"  # noqa: S105 -- where it is, not what


class Failure(click.ClickException):
    """Report an operator's mistake, or a Redis that does not serve: exit code 1, no traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(printable(line) for line in message.splitlines()))


@dataclass(frozen=True, slots=True)
class Place:
    """Say which namespace is meant, and where it is.

    Attributes:
        url: The Redis URL.
        namespace: The namespace.
        explicit: Whether the command line itself names the namespace.
        paths: The policy files that count where no policy is stored.
        suffix: What a command line needs beside its own words to mean the same place.
        pace: How to wait.
    """

    url: str
    namespace: str
    explicit: bool
    paths: tuple[str, ...]
    suffix: str
    pace: Pace


class Session:
    """Hold the connections of one command to a namespace.

    Attributes:
        place: Where it is.
        store: The namespace's revisions and workers.
        shards: The number of its shards.
        route: How to get to the servers.
        nodes: Connections for commands of any kind.
        layout: The layout as Redis has noted it, None where no worker has been there yet.
    """

    def __init__(
        self, place: Place, route: Route, layout: bytes | None, default_shards: int
    ) -> None:
        self.place = place
        self.route = route
        self.layout = layout
        self._read = None if layout is None else _read_layout(layout)
        shards = default_shards if self._read is None else self._read.shards
        self.shards: int = shards
        self.nodes: Nodes = Nodes(route, TIMEOUT, {})
        self.store: ControlStore = RedisControl(route, place.namespace, shards, poll_interval=None)

    @property
    def secret(self) -> IdSecret | None:
        """What ids are hashed with in the namespace, None for nothing.

        Raises:
            Failure: The environment has another secret than the workers, or only one of them has.
        """
        given = os.environ.get(_SECRET) or None
        secret = None if given is None else IdSecret(given)
        if self._read is None or self._read.ids == ("" if secret is None else secret.fingerprint):
            return secret
        place = f'in the namespace "{self.place.namespace}"'
        if secret is None:
            told = f"{place} ids are hashed: give the workers' secret in {_SECRET}"
        elif self._read.ids:
            told = f"{place} ids are hashed with another secret than the one in {_SECRET}"
        else:
            told = f"{place} ids are not hashed: unset {_SECRET}"
        raise Failure(f"{told}. No account's buckets can be found, and nothing was done")


REDIS = click.option(
    "--redis",
    "url",
    envvar="TIEREDLIMIT_REDIS",
    show_envvar=True,
    metavar="URL",
    help="Where Redis is: redis://, rediss://, unix:// or redis+cluster://.",
)
NAMED = click.option(
    "--namespace",
    envvar="TIEREDLIMIT_NAMESPACE",
    show_envvar=True,
    default="default",
    show_default=True,
    metavar="NAME",
    help="The namespace.",
)
POLICY = click.option(
    "--policy",
    "paths",
    envvar="TIEREDLIMIT_POLICY",
    show_envvar=True,
    multiple=True,
    type=click.Path(path_type=str),
    metavar="FILE",
    help="The workers' policy file, where none is stored; repeatable.",
)


def connects(command: Callable[Concatenate[click.Context, Place, P], None]) -> Callable[..., None]:
    """Give a command the options that name a place, and the place."""

    @REDIS
    @NAMED
    @POLICY
    @click.pass_context
    @wraps(command)
    def connected(ctx: click.Context, /, *args: P.args, **given: P.kwargs) -> None:
        options: dict[str, Any] = given
        place = place_of(ctx, options.pop("url"), options.pop("namespace"), options.pop("paths"))
        command(ctx, place, *args, **given)

    return connected


def place_of(ctx: click.Context, url: str | None, namespace: str, paths: tuple[str, ...]) -> Place:
    """Return the place that the options of a command name.

    Raises:
        click.UsageError: No Redis is named, or the namespace can be none.
    """
    if not url:
        raise click.UsageError("Say which Redis: --redis URL, or TIEREDLIMIT_REDIS.")
    check_namespace(namespace)
    typed = {
        name: ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for name in ("url", "namespace")
    }
    suffix = f" --namespace {namespace}" if typed["namespace"] else ""
    if typed["url"] and "@" not in url and "password" not in url:
        suffix += f" --redis {url}"
    files = () if paths == (STORED,) else paths
    return Place(url, namespace, typed["namespace"], files, suffix, pace_of(ctx))


def check_namespace(namespace: str) -> None:
    """Check that a text can be a namespace.

    Raises:
        click.BadParameter: It cannot.
    """
    if not _NAMESPACE.fullmatch(namespace):
        told = f"got {namespace!r:.80}; a namespace is 1 to 32 of a-z, 0-9, _ and -"
        raise click.BadParameter(told, param_hint="'--namespace'")


@asynccontextmanager
async def session(place: Place) -> AsyncIterator[Session]:
    """Connect to a place, with as many shards as its workers have.

    Raises:
        BackendError: Redis cannot be reached or does not answer.
    """
    kind = ClusterBackend if "+cluster://" in place.url else RedisBackend.from_url
    try:
        backend = kind(place.url)
    except UsageError as exc:
        raise click.BadParameter(printable(str(exc)), param_hint="'--redis'") from exc
    route = _route(backend)
    first = Nodes(route, TIMEOUT, {})
    try:
        key = f"tl:{{{place.namespace}}}:layout"
        layout = await first.ask(key, "GET", key)
    finally:
        await first.close()
    opened = Session(place, route, layout, backend.default_shards)
    try:
        yield opened
    finally:
        await opened.nodes.close()
        await opened.store.close()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run the whole of a command.

    Raises:
        Failure: Something went wrong that a sentence explains.
    """
    try:
        return asyncio.run(coroutine)
    except PolicyError as exc:
        raise policy_files.FaultyPolicy(exc) from exc
    except TieredLimitError as exc:
        raise Failure(str(exc)) from exc


def policy_of(revision: Revision, place: Place) -> Policy:
    """Return the policy below the overrides: the stored one, else that of the files.

    Raises:
        Failure: There is neither.
        PolicyError: This release cannot use the stored one.
    """
    if revision.base is not None:
        return Policy.from_dict(revision.base, source=f"the policy of revision {revision.number}")
    if not place.paths:
        raise Failure(
            f'no policy is stored in "{place.namespace}", and no file is named: give the file '
            "that the workers use with --policy FILE (or TIEREDLIMIT_POLICY), or store one with "
            "tieredlimit policy push FILE"
        )
    return policy_files.load(place.paths)


def _route(backend: RedisBackend | ClusterBackend) -> Route:
    if isinstance(backend, ClusterBackend):
        cluster = backend

        def connect(node: Address | None) -> Any:
            return cluster.connection_to(node or cluster.seeds[0])

        return Route(connect, tuple(cluster.seeds))
    pool = backend._pool  # noqa: SLF001 -- of this package
    return Route(lambda _: connection_of(pool))


def _read_layout(layout: bytes) -> Layout:
    """Return the layout that the workers have noted.

    Raises:
        Failure: They have noted what this release cannot serve.
    """
    found = Layout.read(layout)
    if found is None or not 1 <= found.shards <= 1_024:
        raise Failure(
            f'the namespace in Redis is laid out as "{layout.decode("utf-8", "replace"):.80}", '
            f"and this release knows format {KEY_FORMAT}"
        )
    return found
