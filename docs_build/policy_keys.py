"""The page of all keys of a policy file, made from the JSON Schema that is shipped for editors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).parents[1] / "tieredlimit" / "policy.schema.json"

_Node = Mapping[str, Any]

HEAD = """\
# Keys of a policy

<!-- Made from tieredlimit/policy.schema.json by `scripts/docs write`: change that one. -->

Every key that a policy file may hold, as the JSON Schema has it that is shipped for editors
(`tieredlimit schema`). What the keys are for is told in [the policy file](../policy.md). A key that
is not listed here is a fault.
"""

SECTIONS = (
    ("The file", "", "properties"),
    ("A feature: `[features.NAME]`", "feature", "properties"),
    ("A pool: `[pools.NAME]`, or a feature's `pool`", "pool", "properties"),
    ("A tier: `[tiers.NAME]`", "tier", "properties"),
    ("Whom a tier takes in: `when`", "when", "properties"),
    ("A quota that is a table", "quota", "table"),
    ("What tiers get that do not say otherwise: `[defaults]`", "defaults", "properties"),
)
"""Heading, the definition, and where its keys are: its own, or those of the table it may be."""

VALUES = (
    ("Names", "name"),
    ("Cells", "cell"),
    ("Routes", "route"),
    ("Rates", "rate"),
    ("Spans of time", "duration"),
    ("Instants", "instant"),
)
"""Heading and definition of the values that several keys have in common."""


def page() -> str:
    """Return the page."""
    schema = json.loads(SCHEMA.read_text("utf-8"))
    parts = [HEAD]
    for heading, name, where in SECTIONS:
        parts.append(f"## {heading}\n\n{_section(schema, name, where)}\n")
    parts.append("## Values\n")
    for heading, name in VALUES:
        node = schema["$defs"][name]
        parts.append(f"### {heading}\n\n{_told(node.get('description', ''))}{_examples(node)}\n")
    return "\n".join(parts)


def _section(schema: _Node, name: str, where: str) -> str:
    node: _Node = schema if not name else schema["$defs"].get(name) or schema["properties"][name]
    if where == "table":
        node = next(one for one in node["anyOf"] if one.get("type") == "object")
    needed = set(node.get("required", ()))
    rows = ["| key | value | meaning |", "|---|---|---|"]
    rows += [
        f"| `{key}` | {_value(schema, one)}{_default(one, key in needed)} "
        f"| {_meaning(schema, one)} |"
        for key, one in node["properties"].items()
    ]
    told = node.get("description", "")
    together = [f"`{a}` and `{b[0]}`" for a, b in node.get("dependentRequired", {}).items()][:1]
    if together:
        rows += ["", f"{together[0]} stand together or not at all."]
    return "\n".join(([_told(told), ""] if told else []) + rows)


def _value(schema: _Node, node: _Node) -> str:
    """Say in a few words what may stand there."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return _NAMED.get(name) or _value(schema, schema["$defs"][name])
    if "enum" in node:
        return " or ".join(f"`{json.dumps(one)}`" for one in node["enum"])
    for several in ("oneOf", "anyOf"):
        if several in node:
            return " or ".join(_value(schema, one) for one in node[several])
    kind = node.get("type")
    if kind == "array":
        return f"a list, each {_value(schema, node['items'])}"
    if kind == "integer":
        return f"{node['minimum']:,} to {node['maximum']:,}"
    if kind == "object":
        inside = node.get("additionalProperties")
        if isinstance(inside, Mapping):
            kind_of_key = "route" if "route" in json.dumps(node.get("propertyNames")) else "name"
            return f"a table: {kind_of_key} to {_value(schema, inside)}"
        return "a table"
    return {"string": "a text", "boolean": "`true` or `false`"}[str(kind)]


_NAMED = {
    "name": "a [name](#names)",
    "cell": "a [cell](#cells)",
    "route": "a [route](#routes)",
    "rate": "a [rate](#rates)",
    "duration": "a [span of time](#spans-of-time)",
    "instant": "an [instant](#instants)",
    "feature": "a [feature](#a-feature-featuresname)",
    "pool": "a [pool](#a-pool-poolsname-or-a-features-pool)",
    "tier": "a [tier](#a-tier-tiersname)",
    "when": "a table of [words](#whom-a-tier-takes-in-when)",
    "strings": "a text, or a list of texts",
    "cost": "tokens, 1 to 1,000,000,000",
    "quotas": "a table: feature to [cell](#cells)",
    "shadow": 'a table: feature to [cell](#cells), never `"unlimited"`',
    "messages": "a table: feature to a text, or to texts by language",
}


def _default(node: _Node, needed: bool) -> str:
    if needed:
        return "; **needed**"
    return f"; default `{json.dumps(node['default'])}`" if "default" in node else ""


def _meaning(schema: _Node, node: _Node) -> str:
    told = node.get("description", "")
    examples = _examples(node)
    if "$ref" in node:
        there = schema["$defs"][node["$ref"].rpartition("/")[2]]
        told = told or there.get("description", "")
        examples = examples or _examples(there)
    return _told(told).replace("|", "\\|") + examples.replace("|", "\\|")


def _examples(node: _Node) -> str:
    found = [f"`{_toml(one)}`" for one in node.get("examples", ())]
    return f" For example {', '.join(found)}." if found else ""


def _told(text: str) -> str:
    return " ".join(text.split())


def _toml(value: Any) -> str:
    """Spell an example as the policy file does."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if key.replace("-", "_").isidentifier() else json.dumps(key)
