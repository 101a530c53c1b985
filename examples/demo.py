"""Play the launch day of a media API over real HTTP, and check every outcome.

It starts `examples/media_api.py` in a process of its own, or with `--redis URL` in two that share
their buckets, and prints what each caller asked for and what they saw. With `--redis` alone it
starts a Redis and four of them under load, for a person to watch: video is closed for new accounts,
let in again, and the Redis killed.

`scripts/demo --help` lists what else it does. It leaves with 0 if all went as promised, 1 if not,
2 if it could not start.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import httpx

from examples.demo_day import launch_day
from examples.demo_fleet import SECONDS, SIGNALS, WORKERS, Fleet
from examples.demo_load import CROWD
from examples.demo_play import Play, print_head
from examples.demo_redis import OwnRedis, forget, require_redis
from examples.demo_screen import Screen
from examples.demo_server import MediaServer, StartError
from tieredlimit import Policy, PolicyError

OWN = "own"
REQUEST_SECONDS = 10.0
DEMO_APP = "examples.demo_app:app"


@click.command()
@click.option(
    "--redis",
    "redis_url",
    metavar="[URL]",
    is_flag=False,
    flag_value=OWN,
    help="Two servers that share a Redis. Without URL: a Redis of its own, and a fleet to watch.",
)
@click.option("--serve", is_flag=True, help="Only serve, for a curl of yours. Ctrl-C ends it.")
@click.option(
    "--port",
    type=click.IntRange(1, 65532),
    help="Where to serve; further servers take the next. Default: any that are free.",
)
@click.option(
    "--policy",
    "above",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    help="Lay this file over the demonstration's policy, and see which promises it breaks.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=10),
    default=SECONDS,
    show_default=True,
    help="About how long the fleet is to be watched.",
)
@click.option(
    "--still",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Put a picture (SVG) of the fleet's table into a file, while video is closed.",
)
def main(
    redis_url: str | None,
    serve: bool,
    port: int | None,
    above: tuple[Path, ...],
    seconds: float,
    still: Path | None,
) -> None:
    """Play the launch day of a media API over real HTTP."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the demonstration.
            stream.reconfigure(errors="backslashreplace")
    watched = redis_url == OWN and not serve
    if still is not None and not (watched and still.absolute().parent.is_dir()):
        wanted = "a file in a folder that is there" if watched else "--redis without URL"
        raise click.BadParameter(f"wants {wanted}", param_hint="'--still'")
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, _stop)
    try:
        if watched:
            sys.exit(_watch(port, _policies("policy", "demo_fleet", above=above), seconds, still))
        # A curl meets the policy that people read first; the day needs a little more.
        names = ("policy",) if serve else ("policy", "demo")
        sys.exit(_run(redis_url, serve, port, _policies(*names, above=above)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("\nstopped")
        sys.exit(0 if serve else 130)
    except (StartError, PolicyError) as exc:
        click.echo(f"The demonstration cannot start: {exc}", err=True)
        sys.exit(2)


def _run(redis_url: str | None, serve: bool, port: int | None, policies: Sequence[Path]) -> int:
    Policy.load(*policies)
    with ExitStack() as running:
        if redis_url == OWN:
            redis_url = running.enter_context(OwnRedis()).url
        environment = _environment(redis_url, policies)
        if redis_url:
            require_redis(redis_url)
            running.callback(forget, redis_url, environment["TIEREDLIMIT_NAMESPACE"])
        app = "examples.media_api:app" if serve else DEMO_APP
        servers = [
            running.enter_context(MediaServer(environment, port and port + i, app))
            for i in range(2 if redis_url else 1)
        ]
        return _serve(servers) if serve else _play(servers, redis_url)


def _watch(port: int | None, policies: Sequence[Path], seconds: float, still: Path | None) -> int:
    Policy.load(*policies)
    with ExitStack() as running:
        server = running.enter_context(OwnRedis())
        environment = {**_environment(server.url, policies), "TIEREDLIMIT_NAMESPACE": "demo"}
        click.echo(f"Starting {WORKERS} workers on a Redis of their own.")
        workers = [
            running.enter_context(MediaServer(environment, port and port + i, DEMO_APP))
            for i in range(WORKERS)
        ]
        urls = [worker.url for worker in workers]
        crowd = ", ".join(f"{size} {tier}" for tier, size in CROWD.items())
        click.echo(
            f"{' '.join(urls)}\n"
            f"Steady load by {crowd} accounts. To look on from another terminal:\n"
            f"tieredlimit watch --namespace demo --redis {server.url}\n"
        )
        screen = running.enter_context(Screen())
        fleet = Fleet(urls, server, environment, screen, seconds=seconds, still=still)
        asyncio.run(fleet.play())
        ended = [worker for worker in workers if not worker.running]
        fleet.differences += [f"a worker has ended by itself:\n{one.log()}" for one in ended]
    return _conclude(fleet.checks, fleet.differences)


def _environment(redis_url: str | None, policies: Sequence[Path]) -> Mapping[str, str]:
    return {
        "TIEREDLIMIT_POLICY": os.pathsep.join(str(path) for path in policies),
        "TIEREDLIMIT_REDIS": redis_url or "",
        # A namespace of its own: what an earlier run has used up does not disturb this one.
        "TIEREDLIMIT_NAMESPACE": f"demo-{uuid.uuid4().hex[:12]}",
        "TIEREDLIMIT_ENABLED": "1",
        "TIEREDLIMIT_CLOSE": "",
        "TIEREDLIMIT_CLOSE_FILE": "",
    }


def _policies(*names: str, above: Sequence[Path]) -> list[Path]:
    return [*(Path(__file__).with_name(f"{name}.toml") for name in names), *above]


def _play(servers: Sequence[MediaServer], redis_url: str | None) -> int:
    urls = [server.url for server in servers]
    where = (
        "memory, in one server process" if redis_url is None else "Redis, for two server processes"
    )
    click.echo(f"The media API's launch day. Buckets are in {where}:\n{' '.join(urls)}\n")
    with httpx.Client(timeout=REQUEST_SECONDS, trust_env=False) as client:
        play = Play(client, urls)
        print_head()
        try:
            launch_day(play)
        except httpx.HTTPError as exc:
            logs = "\n".join(server.log() for server in servers)
            play.differences.append(f"a server did not answer: {exc!r}\n{logs}")
    return _conclude(play.rows, play.differences)


def _conclude(outcomes: int, differences: Sequence[str]) -> int:
    if differences:
        click.echo(f"\nNot as promised: {len(differences)}", err=True)
        for difference in differences:
            click.echo(f"✗ {difference}", err=True)
        return 1
    click.echo(f"\nAll {outcomes} outcomes are as promised.")
    return 0


def _serve(servers: Sequence[MediaServer]) -> int:
    url = servers[0].url
    click.echo(f"Serving at {' '.join(server.url for server in servers)}. To paste:\n")
    for key, language, path in (
        ("key-ada", "", "/v1/images"),
        ("key-nova", "", "/v1/videos"),
        ("key-nova", "fr", "/v1/videos"),
        ("key-grace", "", "/v1/videos/hd"),
        ("", "", "/v1/videos"),
    ):
        headers = f" -H 'X-Api-Key: {key}'" if key else ""
        headers += f" -H 'Accept-Language: {language}'" if language else ""
        click.echo(f"curl -i -X POST{headers} {url}{path}")
    click.echo(f"curl -H 'X-Api-Key: key-ada' {url}/v1/usage")
    click.echo("\nCtrl-C ends it.")
    while all(server.running for server in servers):
        time.sleep(0.2)
    click.echo("A server has ended by itself:", err=True)
    for server in servers:
        click.echo(server.log(), err=True)
    return 1


def _stop(*_: object) -> None:
    # Once: impatience must not interrupt what ends the servers.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
