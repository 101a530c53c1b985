"""Play the launch day of a media API over real HTTP, and check every outcome.

It starts `examples/media_api.py` in a process of its own, or with `--redis URL` in two that share
their buckets, and prints what each caller asked for and what they saw.

`scripts/demo --help` lists what else it does. It leaves with 0 if all went as promised, 1 if not,
2 if it could not start.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click
import httpx
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from examples.demo_play import Play, Promise, print_head
from examples.demo_server import MediaServer, StartError
from tieredlimit import Policy, PolicyError

POLICIES = [Path(__file__).with_name(name) for name in ("policy.toml", "demo.toml")]
REQUEST_SECONDS = 10.0

ANYONE = "no account"
ADA, NOVA, GRACE, LINUS = "ada (free)", "nova (new)", "grace (pro)", "linus (pro)"
AS_ADA, AS_NOVA, AS_GRACE, AS_LINUS = (
    {"X-Api-Key": f"key-{name}"} for name in ("ada", "nova", "grace", "linus")
)
PAGE = {"Origin": "https://studio.example"}
PREFLIGHT = {
    **PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "x-api-key",
}

IMAGES, VIDEOS, HD, USAGE = (
    "POST /v1/images",
    "POST /v1/videos",
    "POST /v1/videos/hd",
    "GET /v1/usage",
)
USED_UP = "The quota for {} is used up. Try again in"
NOT_YET = "Video is not yet open to new accounts. Images are."
NOT_YET_FR = "La vidéo n'est pas encore ouverte aux nouveaux comptes. Les images le sont."


@click.command()
@click.option("--redis", "redis_url", metavar="URL", help="Two servers that share a Redis.")
@click.option("--serve", is_flag=True, help="Only serve, for a curl of yours. Ctrl-C ends it.")
@click.option(
    "--port",
    type=click.IntRange(1, 65534),
    help="Where to serve; a second server takes the next. Default: any that are free.",
)
@click.option(
    "--policy",
    "above",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path),
    help="Lay this file over the demonstration's policy, and see which promises it breaks.",
)
def main(redis_url: str | None, serve: bool, port: int | None, above: tuple[Path, ...]) -> None:
    """Play the launch day of a media API over real HTTP."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the demonstration.
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        sys.exit(_run(redis_url, serve, port, [*POLICIES, *above]))
    except KeyboardInterrupt:
        click.echo("\nstopped")
        sys.exit(0 if serve else 130)
    except (StartError, PolicyError) as exc:
        click.echo(f"The demonstration cannot start: {exc}", err=True)
        sys.exit(2)


def launch_day(play: Play) -> None:
    """Play it: images for everybody, no videos for new accounts, all others as ever."""
    play.scene(
        "A route that the policy does not name is never limited, nor is a preflight charged."
    )
    play.ask(ANYONE, "GET /health", Promise(200))
    play.ask(ANYONE, "OPTIONS /v1/images", Promise(200), headers=PREFLIGHT, note="preflight")

    play.scene("Images: everybody has some, pro accounts without limit.")
    left = {"image-minute": 4, "image-day": 49}
    play.ask(NOVA, IMAGES, Promise(201, left=left), headers=AS_NOVA)
    left = {"image-minute": 3, "image-day": 48}
    play.ask(NOVA, "POST /v1/images/7/variations", Promise(201, left=left), headers=AS_NOVA)
    play.ask(GRACE, IMAGES, Promise(201), headers=AS_GRACE)
    for tokens in (1, 0):
        play.ask(ANYONE, IMAGES, Promise(201, left={"image-minute": tokens}))
    denial = Promise(429, USED_UP.format("image"), range(20, 31), {"image-minute": 0})
    play.ask(ANYONE, IMAGES, denial)

    play.scene("Videos: none for new accounts, and they read why. The others go on.")
    closed = Promise(403, NOT_YET, left={"video": 0})
    play.ask(NOVA, VIDEOS, closed, headers=AS_NOVA)
    french = {**AS_NOVA, "Accept-Language": "fr-CH, fr;q=0.9, en;q=0.5"}
    promise = Promise(403, NOT_YET_FR, left={"video": 0})
    play.ask(NOVA, VIDEOS, promise, headers=french, note="in French")
    promise = Promise(403, NOT_YET, left={"video": 0}, readable=True)
    play.ask(NOVA, VIDEOS, promise, headers={**AS_NOVA, **PAGE}, note="from a page")
    image = {"allowed": True, "remaining": {"image-minute": 3, "image-day": 48}}
    usage = {"image": image, "video": {"allowed": False, "remaining": {}}}
    play.ask(NOVA, USAGE, Promise(200, usage=usage), headers=AS_NOVA)
    play.ask(ANYONE, VIDEOS, Promise(403, "Sign in to make videos.", left={"video": 0}))
    play.ask(ADA, VIDEOS, Promise(202, left={"video-day": 1}), headers=AS_ADA)
    play.ask(ADA, HD, Promise(429, "This request costs 8, more than"), headers=AS_ADA)

    play.scene("An HD video costs 8. Grace and Linus have 20 each, and 24 together: their org's.")
    for own, org in ((12, 16), (4, 8)):
        left = {"video-day": own, "video-day-org": org}
        play.ask(GRACE, HD, Promise(202, left=left), headers=AS_GRACE)
    denial = Promise(429, USED_UP.format("video"), range(1700, 1729), {"video-day": 4})
    play.ask(GRACE, HD, denial, headers=AS_GRACE)
    # The denial has cost the org nothing: its last 8 are there for Linus.
    left = {"video-day": 12, "video-day-org": 0}
    play.ask(LINUS, HD, Promise(202, left=left), headers=AS_LINUS)
    denial = Promise(429, USED_UP.format("video"), range(3570, 3601), {"video-day-org": 0})
    play.ask(LINUS, VIDEOS, denial, headers=AS_LINUS)
    usage = {
        "image": {"allowed": True, "remaining": {}},
        "video": {"allowed": False, "remaining": {"video-day": 12, "video-day-org": 0}},
    }
    play.ask(LINUS, USAGE, Promise(200, usage=usage), headers=AS_LINUS)

    play.scene(
        "A burst: 20 at once and not one more, then one every 3 seconds, as Retry-After says."
    )
    began_at = play.burst(ADA, IMAGES, {201: 20, 429: 5}, AS_ADA)
    denial = Promise(429, USED_UP.format("image"), range(1, 4), {"image-minute": 0})
    response, came_at = play.ask(ADA, IMAGES, denial, headers=AS_ADA)
    wait = int(response.headers.get("retry-after", 0))
    # Retry-After is rounded up. On a slow machine, a second less could be enough: then do not ask.
    if came_at + wait - 1 < began_at + 2.5:
        _sleep_until(came_at + wait - 1)
        play.ask(ADA, IMAGES, denial, headers=AS_ADA, note=f"{wait - 1} s later")
    _sleep_until(came_at + wait)
    promise = Promise(201, left={"image-minute": 0})
    play.ask(ADA, IMAGES, promise, headers=AS_ADA, note=f"{wait} s later")


def _run(redis_url: str | None, serve: bool, port: int | None, policies: Sequence[Path]) -> int:
    Policy.load(*policies)
    if redis_url:
        _require_redis(redis_url)
    environment = {
        "TIEREDLIMIT_POLICY": os.pathsep.join(str(path) for path in policies),
        "TIEREDLIMIT_REDIS": redis_url or "",
        # A namespace of its own: what an earlier run has used up does not disturb this one.
        "TIEREDLIMIT_NAMESPACE": f"demo-{uuid.uuid4().hex[:12]}",
        "TIEREDLIMIT_ENABLED": "1",
    }
    with ExitStack() as running:
        servers = [
            running.enter_context(MediaServer(environment, port and port + i))
            for i in range(2 if redis_url else 1)
        ]
        return _serve(servers) if serve else _play(servers, redis_url)


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
    if play.differences:
        click.echo(f"\nNot as promised: {len(play.differences)}", err=True)
        for difference in play.differences:
            click.echo(f"✗ {difference}", err=True)
        return 1
    click.echo(f"\nAll {play.rows} outcomes are as promised.")
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


def _require_redis(url: str) -> None:
    try:
        with redis.Redis.from_url(
            url, socket_timeout=REQUEST_SECONDS, retry=Retry(NoBackoff(), 0)
        ) as client:
            client.ping()
    except (redis.RedisError, ValueError) as exc:
        # Without the URL, which may hold a password.
        raise StartError(f"Redis does not answer: {exc}") from exc


def _sleep_until(instant: float) -> None:
    time.sleep(max(0.0, instant - time.monotonic()))


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
