"""The launch day: who asks for what, and what they must see."""

from __future__ import annotations

import time
from collections.abc import Mapping

from examples.demo_play import Play, Promise

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
PAUSED = {
    "en": "Video is paused for new accounts. Images go on.",
    "fr": "La vidéo est suspendue pour les nouveaux comptes. Les images continuent.",
}
NEW_CROWD = {f"new-{number}": {"X-Api-Key": f"key-new-{number}"} for number in range(40)}


def launch_day(play: Play) -> None:
    """Play it: images for everybody, no videos for new accounts at noon, all others as ever."""
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

    play.scene("Videos: some for who has an account, none for who has not, and they read why.")
    play.ask(NOVA, VIDEOS, Promise(202, left={"video-day": 9}), headers=AS_NOVA)
    play.ask(ADA, VIDEOS, Promise(202, left={"video-day": 1}), headers=AS_ADA)
    play.ask(ADA, HD, Promise(429, "This request costs 8, more than"), headers=AS_ADA)
    play.ask(ANYONE, VIDEOS, Promise(403, "Sign in to make videos.", left={"video": 0}))
    image = {"allowed": True, "remaining": {"image-minute": 3, "image-day": 48}}
    video: dict[str, object] = {"allowed": True, "remaining": {"video-day": 9}}
    usage = {"image": image, "video": video}
    play.ask(NOVA, USAGE, Promise(200, usage=usage), headers=AS_NOVA)

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

    _close_and_reopen(play, image)

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


def _close_and_reopen(play: Play, image: Mapping[str, object]) -> None:
    """Play the middle of the day; `image` is what nova's usage must still say of images."""
    play.scene(
        'Video goes viral: limiter.control.close("video", tier="new", message=...), and at once\n'
        "no new account has any. They read why; images, and everybody else, go on."
    )
    play.operate("close", "video", "new", message=PAUSED)
    paused = Promise(403, PAUSED["en"])
    play.ask(NOVA, VIDEOS, paused, headers=AS_NOVA)
    french = {**AS_NOVA, "Accept-Language": "fr-CH, fr;q=0.9, en;q=0.5"}
    play.ask(NOVA, VIDEOS, Promise(403, PAUSED["fr"]), headers=french, note="in French")
    promise = Promise(403, PAUSED["en"], readable=True)
    play.ask(NOVA, VIDEOS, promise, headers={**AS_NOVA, **PAGE}, note="from a page")
    usage = {"image": image, "video": {"allowed": False, "remaining": {}}}
    play.ask(NOVA, USAGE, Promise(200, usage=usage), headers=AS_NOVA)
    left = {"image-minute": 2, "image-day": 47}
    play.ask(NOVA, IMAGES, Promise(201, left=left), headers=AS_NOVA)
    play.ask(ADA, VIDEOS, Promise(202, left={"video-day": 0}), headers=AS_ADA)
    play.crowd(VIDEOS, NEW_CROWD, inside=[])

    play.scene(
        'It calms down: limiter.control.open("video", tier="new", percent=50) lets about half of\n'
        "them in, always the same ones; without percent, everybody."
    )
    play.operate("open", "video", "new", percent=50)
    half = play.crowd(VIDEOS, NEW_CROWD, inside=range(12, 29))
    play.crowd(VIDEOS, NEW_CROWD, inside=half)
    play.operate("open", "video", "new")
    play.crowd(VIDEOS, NEW_CROWD, inside=NEW_CROWD)
    play.ask(NOVA, VIDEOS, Promise(202, left={"video-day": 8}), headers=AS_NOVA)


def _sleep_until(instant: float) -> None:
    time.sleep(max(0.0, instant - time.monotonic()))
