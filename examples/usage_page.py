"""A page whose buttons know beforehand what is left: run it, then press one until it is grey.

    uvicorn examples.usage_page:app

The page asks /v1/usage every two seconds, which takes nothing and is mostly answered "not
modified". To see a closure arrive, let the buckets be in a Redis (`TIEREDLIMIT_REDIS`) and close a
feature for a while: `tieredlimit close image --all --for 1m --message "Images are paused."`
"""

from __future__ import annotations

import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from tieredlimit import Limiter, TieredLimitMiddleware, usage_app

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Studio</title>
<style>
  body { font: 1rem/1.5 system-ui; margin: 3rem auto; max-width: 30rem }
  button { font: inherit; padding: .5rem 1rem; min-width: 9rem }
  small { color: #666; margin-left: .5rem }
</style>
<h1>Studio</h1>
<p><button data-feature="image" data-path="/v1/images">Make an image</button><small></small></p>
<p><button data-feature="video" data-path="/v1/videos">Make a video</button><small></small></p>
<script>
  const buttons = document.querySelectorAll("button");

  function note(one) {
    const at = one.retry_at && new Date(one.retry_at).toLocaleTimeString();
    if (one.message) return at ? `${one.message} Again at ${at}.` : one.message;
    return one.remaining === null ? "" : `${one.remaining} of ${one.capacity} left`;
  }

  async function refresh() {
    // The browser keeps the answer, and asks whether it still holds.
    const answer = await fetch("/v1/usage");
    if (!answer.ok) return;
    const { features } = await answer.json();
    for (const button of buttons) {
      const one = features[button.dataset.feature];
      button.disabled = one.allowed === false;
      button.nextElementSibling.textContent = note(one);
    }
  }

  for (const button of buttons)
    button.onclick = async () => {
      await fetch(button.dataset.path, { method: "POST" });
      await refresh();
    };
  refresh();
  setInterval(refresh, 2000);
</script>
</html>
"""


def create_app(limiter: Limiter) -> Starlette:
    """Return the page, what its buttons do, and what it asks."""
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/v1/images", make, methods=["POST"]),
            Route("/v1/videos", make, methods=["POST"]),
            Route("/v1/usage", usage_app(limiter)),
        ]
    )
    # Nobody logs in here: clients are told apart by address.
    app.add_middleware(TieredLimitMiddleware, limiter=limiter)
    return app


async def page(_: Request) -> Response:
    """Show the buttons."""
    return HTMLResponse(PAGE)


async def make(_: Request) -> Response:
    """Pretend to make something."""
    return JSONResponse({"made": True}, status_code=201)


os.environ.setdefault("TIEREDLIMIT_POLICY", str(Path(__file__).with_name("policy.toml")))
limiter = Limiter.from_env()
app = create_app(limiter)
