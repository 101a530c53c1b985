"""Write anew what pages hold that code makes: `scripts/docs write`. A test compares it.

The outputs of commands in the handbook are played by `python -m tests.consoles --write`, which
needs a Redis server.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from docs_build import commands, policy_keys
from examples import bucket_picture, pool_picture, slot_picture, tier_picture

DOCS = Path(__file__).parents[1] / "docs"


def made() -> dict[str, str]:
    """Return what code makes, by its path below `docs/`."""
    return {
        "reference/commands.md": commands.page(),
        "reference/policy-keys.md": policy_keys.page(),
        "bucket.svg": bucket_picture.drawn(asyncio.run(bucket_picture.play())),
        "pool.svg": pool_picture.drawn(*asyncio.run(pool_picture.play())),
        "slots.svg": slot_picture.drawn(asyncio.run(slot_picture.play())),
        "tiers.svg": tier_picture.drawn(tier_picture.read()),
    }


if __name__ == "__main__":
    for place, content in made().items():
        (DOCS / place).write_text(content, "utf-8")
