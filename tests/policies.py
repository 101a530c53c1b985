"""Policy documents that are right, for the tests that read them and those of the schema."""

from __future__ import annotations

import tomllib
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent.parent / "examples" / "policy.toml"

SMALLEST: dict[str, Any] = {
    "features": {"image": {}},
    "tiers": {"everyone": {"quotas": {"image": "5/minute"}}},
}

EVERY_WORD: dict[str, Any] = {
    "order": ["new", "tagged", "strangers", "old", "pro", "plus", "everyone"],
    "features": {
        "image": {
            "routes": ["POST|PUT /v1/images", "* /v1/images/{id}", "GET /f/{rest:path}"],
            "outage": "local",
            "outage_share": "12.5 %",
        },
        "video": {
            "routes": {"POST /v1/videos": 1, "POST /v1/videos/hd": 8},
            "outage": "deny",
            "pool": "gpu",
            "refund_on": [500, 503],
            "refund_on_exception": False,
        },
        "by-code": {
            "outage": "allow",
            "pool": {"rate": "9/second", "capacity": 900, "leave": {"new": 20}, "slices": 4},
        },
    },
    "pools": {
        "gpu": {
            "rate": "600/minute",
            "leave": {"new": "50%", "everyone": "33.3 %", "pro": 0},
            "concurrency": 40,
            "lease": "15 minutes",
        },
    },
    "defaults": {
        "quotas": {"image": "2/minute", "video": 0, "by-code": "unlimited"},
        "shadow": {"video": "5/day"},
        "messages": {"image": "That is enough for now.", "video": {"en": "No.", "pt-BR": "Não."}},
    },
    "tiers": {
        "new": {
            "when": {"plan": "free", "account_age_below": "7 days"},
            "quotas": {"image": ["5/minute", "50/day", "10 per 2 weeks"]},
            "shadow": {"image": [{"rate": "9/hour", "per": "org"}, "40/day"], "by-code": 0},
        },
        "tagged": {"when": {"tags": ["beta", "press"], "anonymous": False}},
        "strangers": {"when": {"anonymous": True, "tags": "crawler"}},
        "old": {
            "when": {
                "account_age_above": "36 hours",
                "created_before": "2026-11-20T18:00:00Z",
                "created_after": datetime(2020, 1, 1, tzinfo=UTC),
            }
        },
        "pro": {
            "when": {"plan": ["pro", "team"]},
            "quotas": {
                "image": "unlimited",
                "video": [
                    {
                        "rate": "200/day",
                        "capacity": 20,
                        "name": "own",
                        "concurrency": 3,
                        "lease": "10 minutes",
                    },
                    {"rate": "5000/day", "per": "org"},
                ],
            },
            "messages": {"video": "Come back tomorrow."},
        },
        "plus": {"when": {"plan": "plus"}, "extends": "pro", "quotas": {"video": "9/hour"}},
        "everyone": {},
    },
}


def valid_documents() -> dict[str, dict[str, Any]]:
    """Return every valid document by a name for it, each a copy to change at will."""
    return {
        "example": tomllib.loads(EXAMPLE.read_text("utf-8")),
        "smallest": deepcopy(SMALLEST),
        "every word": deepcopy(EVERY_WORD),
    }


def with_cell(cell: object, *, feature: str = "image", routes: object = None) -> dict[str, Any]:
    """Return a document of one tier and one feature whose cell is this."""
    return {
        "features": {feature: {"routes": [] if routes is None else routes}},
        "tiers": {"everyone": {"quotas": {feature: cell}}},
    }


def with_feature(**said: object) -> dict[str, Any]:
    """Return a document of one tier and one feature that says this, its cell being generous."""
    return {
        "features": {"image": said},
        "tiers": {"everyone": {"quotas": {"image": "1000/minute"}}},
    }


def with_whens(**whens: object) -> dict[str, Any]:
    """Return a document with these tiers in this order, and one last tier for everybody else."""
    return {
        "order": [*whens, "everyone"],
        "features": {"image": {}},
        "defaults": {"quotas": {"image": "5/minute"}},
        "tiers": {**{name: {"when": when} for name, when in whens.items()}, "everyone": {}},
    }
