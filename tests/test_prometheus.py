"""Prometheus: what a real scrape over HTTP sees."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest, make_asgi_app
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse
from starlette.applications import Starlette

from tests.policies import EXAMPLE
from tests.serving import serve
from tieredlimit import UsageError
from tieredlimit._core.tally import CALL_DECISIONS, CALL_SECONDS, CallStats, Tallies
from tieredlimit.integrations.prometheus import Counted, PrometheusCollector

DOCUMENTED = Path(__file__).parent.parent / "docs" / "metrics.md"
LABELS = ("namespace", "feature", "tier", "outcome", "shadow", "le")
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


class Worker:
    """What a limiter counts, without the limiter."""

    def __init__(self, namespace: str = "prod", *, calls: bool = True) -> None:
        self.namespace = namespace
        self.tallies = Tallies()
        self.call_stats = CallStats() if calls else None
        self.revision = (0, "")
        self.unknown_plans = 0
        self.unknown_ages = 0


class Guarded(Worker):
    """The same with a breaker."""

    breaker_open = False


def values(text: str, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of this name by their labels' values, in the order of `LABELS`."""
    return {
        tuple(sample.labels[label] for label in LABELS if label in sample.labels): sample.value
        for family in parse(text)
        for sample in family.samples
        if sample.name == name
    }


def shown(*workers: Counted, **options: Any) -> str:
    registry = CollectorRegistry()
    PrometheusCollector(*workers, registry=registry, **options)
    return generate_latest(registry).decode()


@contextmanager
def scraped(*workers: Counted) -> Iterator[httpx.Client]:
    registry = CollectorRegistry()
    PrometheusCollector(*workers, registry=registry)
    app = make_asgi_app(registry)
    with serve(app, lifespan="off") as url, httpx.Client(base_url=url) as client:
        yield client


def test_scrape_shows_all_that_was_counted_until_then() -> None:
    worker = Guarded()
    video = worker.tallies.of("video", "new")
    assert worker.call_stats is not None

    with scraped(worker) as client:
        before = client.get("/metrics").text
        video.allowed += 41
        video.closed += 2
        video.outage_denied += 1
        video.shadow_allowed += 5
        video.shadow_denied += 3
        worker.call_stats.observe(0.0004, 3)
        worker.call_stats.observe(2.0, 1)
        worker.call_stats.failures += 1
        worker.revision = (18, "1b2c")
        worker.unknown_plans += 7
        worker.unknown_ages += 8
        worker.breaker_open = True
        after = client.get("/metrics").text

    assert values(before, "tieredlimit_decisions_total") == {
        ("prod", "video", "new", "allowed", "false"): 0
    }
    assert values(before, "tieredlimit_revision") == {("prod",): 0}
    assert values(before, "tieredlimit_breaker_state") == {("prod",): 0}
    assert values(after, "tieredlimit_decisions_total") == {
        ("prod", "video", "new", "allowed", "false"): 41,
        ("prod", "video", "new", "closed", "false"): 2,
        ("prod", "video", "new", "outage_denied", "false"): 1,
        ("prod", "video", "new", "allowed", "true"): 5,
        ("prod", "video", "new", "denied", "true"): 3,
    }
    for name, value in {
        "revision": 18,
        "breaker_state": 1,
        "unknown_plans_total": 7,
        "unknown_ages_total": 8,
        "call_failures_total": 1,
        "call_seconds_count": 2,
        "call_seconds_sum": 2.0004,
        "call_decisions_count": 2,
        "call_decisions_sum": 4,
    }.items():
        assert values(after, f"tieredlimit_{name}") == {("prod",): value}, name
    seconds = values(after, "tieredlimit_call_seconds_bucket")
    assert seconds[("prod", "0.00025")] == 0
    assert seconds[("prod", "0.0005")] == seconds[("prod", "1.0")] == 1
    assert seconds[("prod", "+Inf")] == 2
    decisions = values(after, "tieredlimit_call_decisions_bucket")
    assert [decisions[("prod", le)] for le in ("1.0", "2.0", "4.0", "+Inf")] == [1, 1, 2, 2]


def test_openmetrics_scrape_is_valid_to_its_own_strict_parser() -> None:
    worker = Guarded()
    worker.tallies.of("video", "new").zero += 1
    assert worker.call_stats is not None
    worker.call_stats.observe(0.1, 200)

    with scraped(worker) as client:
        response = client.get("/metrics", headers=OPENMETRICS)

    assert response.headers["content-type"].startswith("application/openmetrics-text")
    parsed = list(parse_openmetrics(response.text))  # type: ignore[no-untyped-call]  # theirs
    families = {family.name: family.type for family in parsed}
    assert families["tieredlimit_decisions"] == "counter"
    assert families["tieredlimit_call_seconds"] == "histogram"


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 200)), max_size=30))
def test_histograms_are_those_of_the_calls(calls: list[tuple[float, int]]) -> None:
    worker = Worker()
    assert worker.call_stats is not None
    for seconds, decisions in calls:
        worker.call_stats.observe(seconds, decisions)

    text = shown(worker)

    by_seconds = values(text, "tieredlimit_call_seconds_bucket")
    by_decisions = values(text, "tieredlimit_call_decisions_bucket")
    assert len(by_seconds) == len(CALL_SECONDS) + 1
    assert len(by_decisions) == len(CALL_DECISIONS) + 1
    for (_, le), count in by_seconds.items():
        assert count == sum(seconds <= float(le) for seconds, _ in calls)
    for (_, le), count in by_decisions.items():
        assert count == sum(decisions <= float(le) for _, decisions in calls)


def test_limiters_are_told_apart_by_their_namespace() -> None:
    one, other = Worker("one"), Worker("other")
    one.unknown_plans, other.unknown_plans = 1, 2

    plans = values(shown(one, other), "tieredlimit_unknown_plans_total")

    assert plans == {("one",): 1, ("other",): 2}


def test_namespace_label_can_have_another_name() -> None:
    worker = Worker("prod")
    worker.tallies.of("video", "new").allowed += 1

    text = shown(worker, namespace_label="limits_of")

    assert 'tieredlimit_revision{limits_of="prod"} 0.0' in text
    assert 'limits_of="prod"' in text.partition("tieredlimit_decisions_total{")[2].split("}")[0]


@pytest.mark.parametrize("wrong", ["", "le", "tier", "__name__", "name space", "näme", "a\n"])
def test_label_that_would_spoil_the_scrape_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="namespace_label must be another label"):
        PrometheusCollector(Worker(), registry=None, namespace_label=wrong)


def test_memory_has_no_calls_and_no_breaker_to_show() -> None:
    text = shown(Worker(calls=False))

    for name in ("call_seconds_count", "call_decisions_count", "call_failures_total"):
        assert values(text, f"tieredlimit_{name}") == {}
    assert values(text, "tieredlimit_breaker_state") == {}
    assert values(text, "tieredlimit_revision") == {("prod",): 0}


def test_second_collector_in_a_registry_is_refused() -> None:
    registry = CollectorRegistry()
    PrometheusCollector(Worker("one"), registry=registry)

    with pytest.raises(UsageError, match="one PrometheusCollector all the limiters"):
        PrometheusCollector(Worker("other"), registry=registry)


def test_collector_without_a_registry_can_be_registered_later() -> None:
    registry = CollectorRegistry()
    collector = PrometheusCollector(Worker(), registry=None)

    registry.register(collector)

    assert b"tieredlimit_revision" in generate_latest(registry)


def test_registering_reads_no_limiter() -> None:
    class Unready(Worker):
        @property
        def revision(self) -> tuple[int, str]:
            raise AssertionError("read too early")

        @revision.setter
        def revision(self, value: tuple[int, str]) -> None: ...

    PrometheusCollector(Unready(), registry=CollectorRegistry(auto_describe=True))


@pytest.mark.parametrize(
    ("limiters", "got"), [([], "none"), ([Worker("one"), Worker("one")], "one, one")]
)
def test_limiters_that_could_not_be_told_apart_are_refused(
    limiters: list[Worker], got: str
) -> None:
    with pytest.raises(UsageError, match=f"whose namespaces differ, got {got}"):
        PrometheusCollector(*limiters, registry=None)


def test_every_label_is_a_name_of_the_policy_or_of_ours() -> None:
    worker = Guarded()
    for feature in ("image", "video"):
        for tier in ("new", "old"):
            tally = worker.tallies.of(feature, tier)
            for outcome in tally.__slots__:
                setattr(tally, outcome, 1)

    labels: dict[str, set[str]] = {}
    for family in parse(shown(worker)):
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)

    assert labels.keys() == {"namespace", "feature", "tier", "outcome", "shadow", "le"}
    assert labels["feature"] == {"image", "video"}
    assert labels["tier"] == {"new", "old"}
    assert labels["outcome"] == {
        *("allowed", "denied", "quota", "zero", "closed", "pool", "concurrency"),
        *("outage_allowed", "outage_denied"),
    }
    assert labels["shadow"] == {"true", "false"}


def test_documented_metrics_are_those_that_are_shown() -> None:
    collector = PrometheusCollector(Worker(), registry=None)

    named = {
        f"{metric.name}_total" if metric.type == "counter" else metric.name
        for metric in collector.describe()
    }

    documented = re.findall(r"^\| `(tieredlimit_\w+)`", DOCUMENTED.read_text("utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(named)


def test_setup_shown_in_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = DOCUMENTED.read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    (tmp_path / "policy.toml").write_text(EXAMPLE.read_text("utf-8"), "utf-8")
    monkeypatch.chdir(tmp_path)
    registry = CollectorRegistry()
    defaults = PrometheusCollector.__init__.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "registry", registry)  # not the one of all tests
    namespace: dict[str, Any] = {"app": Starlette()}

    exec(compile(block, "metrics.md", "exec"), namespace)

    assert [route.path for route in namespace["app"].routes] == ["/metrics"]
    assert len(registry._collector_to_names) == 1


def test_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "tieredlimit.integrations.prometheus")

    with pytest.raises(ImportError, match=r'pip install "tieredlimit\[prometheus\]"'):
        importlib.import_module("tieredlimit.integrations.prometheus")
