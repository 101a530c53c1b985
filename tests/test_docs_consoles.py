"""docs/handbook.md and docs/commands.md: each command is run, and prints what the page shows."""

from __future__ import annotations

import json
import tomllib

import pytest

from tests import fences
from tests.consoles import SCENES, Scene, alike, blocks, exit_code, stage, steps
from tieredlimit import Account, Limiter


@pytest.mark.login("default")  # doctor shows what an administrator sees of the configuration
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.page)
def test_commands_of_a_page_print_what_it_shows(scene: Scene, redis_url: str) -> None:
    played = [step for block in blocks(scene.text) for step in steps(block)]

    with stage(redis_url, scene) as night:
        printed = [(step, *night.play(step)) for step in played]

    told = "play them anew: python -m tests.consoles --write"
    for step, code, shown in printed:
        assert code == exit_code(step), shown
        assert alike(shown) == alike(step.shown), f"{step.command}; {told}"
    assert len(printed) > 3


def test_what_differs_from_run_to_run_is_alike_and_what_counts_is_not() -> None:
    head = "3/3 workers on revision 4 · "
    one = f"{head}2026-11-25T17:48:43Z 71de6642ef950727 · 30 req/s, 2 days old"
    other = f"{head}2027-01-02T03:04:05Z 877feb8429d11f3e · 7.5 req/s, 1 day 3 hours old"

    assert alike(one) == alike(other)
    for word, wrong in (("revision 4", "revision 5"), ("3/3", "2/3"), ("workers", "worker")):
        assert alike(one) != alike(other.replace(word, wrong))


async def test_denial_of_the_handbook_is_what_a_client_of_a_new_account_gets() -> None:
    (shown,) = [block for block in fences.blocks("docs/handbook.md") if block.language == "http"]
    policy = next(b for b in fences.blocks("docs/handbook.md") if b.language == "toml")
    limiter = Limiter(tomllib.loads(policy.text))
    await limiter.control.close("video", tier="new", message="Video is paused for new accounts.")

    denial = (await limiter.take(Account("nova", plan="free"), "video")).response()

    head, _, body = shown.text.partition("\n\n")
    status, *fields = head.splitlines()
    sent = {f"{name.decode()}: {value.decode()}" for name, value in denial.raw_headers}
    assert status == f"HTTP/1.1 {denial.status_code} Forbidden"
    assert set(fields) <= sent
    assert json.loads(body) == json.loads(denial.document()[1])
