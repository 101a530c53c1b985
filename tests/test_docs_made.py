"""What code makes for the documentation: pictures that a limiter draws, keys of the schema."""

from __future__ import annotations

import json
import re
import tomllib

import pytest

from docs_build import modules, policy_keys, write
from examples import bucket_picture, slot_picture, tier_picture
from tieredlimit import Policy

MADE = write.made()


@pytest.mark.parametrize("place", MADE)
def test_what_code_makes_is_what_the_documentation_holds(place: str) -> None:
    assert MADE[place] == (write.DOCS / place).read_text("utf-8"), (
        "make it anew: scripts/docs write"
    )


async def test_bucket_of_the_picture_lets_a_burst_through_and_denies_what_is_too_much() -> None:
    asked = await bucket_picture.play()

    burst = [one for one in asked if one.second < 30]
    assert [one.allowed for one in burst] == [True] * 7 + [False]
    assert burst[-1].retry_after == 6.0
    assert burst[-1].before == burst[-1].after
    assert [one.allowed for one in asked if one.cost > 1] == [True, False, True]


async def test_slot_of_the_job_that_crashed_is_free_when_its_lease_is_over() -> None:
    jobs = {job.name: job for job in await slot_picture.play()}

    crashed = jobs["B"]
    last_renewal = crashed.asked + slot_picture.LEASE / 3
    assert abs(crashed.held_until - (last_renewal + slot_picture.LEASE)) < 0.5
    assert not jobs["C"].allowed
    assert not jobs["D"].allowed
    assert jobs["E"].allowed
    assert jobs["E"].lane == crashed.lane


def test_account_of_the_picture_leaves_its_tier_by_itself() -> None:
    tiers = {tier.name: tier.accounts for tier in tier_picture.read()}

    assert tiers == {"new": (0,), "pro": (2,), "free": (1,), "everyone": (3,)}


def test_every_key_of_the_schema_is_on_the_page() -> None:
    schema = json.loads(policy_keys.SCHEMA.read_text("utf-8"))
    nodes = [schema, *schema["$defs"].values(), schema["properties"]["defaults"]]
    nodes += schema["$defs"]["quota"]["anyOf"]
    keys = {key for node in nodes for key in node.get("properties", {})}

    listed = set(re.findall(r"^\| `(\w+)` \|", policy_keys.page(), re.MULTILINE))

    assert listed == keys
    assert len(keys) > 25


def test_every_public_module_has_a_page_of_its_public_names() -> None:
    pages = modules.pages()

    assert "reference/api/tieredlimit.md" in pages
    assert "reference/api/integrations.fastapi.md" in pages
    assert "Limiter" in modules.public_names("tieredlimit")
    assert "client_address" in modules.public_names("tieredlimit.identity")


def test_policy_of_the_picture_has_no_faults() -> None:
    assert Policy.from_dict(tomllib.loads(tier_picture.POLICY)).warnings == ()
