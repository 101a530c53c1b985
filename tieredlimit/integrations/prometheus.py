"""Prometheus: what a limiter counts, read when it is scraped; nothing is added to a decision.

Needs `pip install "tieredlimit[prometheus]"`. The metrics are listed in docs/metrics.md. They are
those of this process; labels are names of the policy, never an account.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from tieredlimit._core.tally import (
    CALL_DECISIONS,
    CALL_SECONDS,
    OUTCOMES,
    SHADOW_OUTCOMES,
    CallStats,
    Tallies,
)
from tieredlimit.errors import UsageError

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
except ImportError as exc:
    raise ImportError(
        'prometheus_client is missing: pip install "tieredlimit[prometheus]"'
    ) from exc

__all__ = ["Counted", "PrometheusCollector"]

_LABELS = ("feature", "tier", "outcome", "shadow")
_LABEL = re.compile(r"(?!__)(?!le$)[a-zA-Z_][a-zA-Z0-9_]*")


class Counted(Protocol):
    """What is read of a limiter.

    `call_stats` is None where decisions need no calls. A limiter that can stop asking its backend
    for a while also has `breaker_open`, a bool.
    """

    @property
    def namespace(self) -> str:
        """What the label `namespace` says."""
        ...

    @property
    def tallies(self) -> Tallies:
        """What was decided."""
        ...

    @property
    def call_stats(self) -> CallStats | None:
        """What the calls to the backend took."""
        ...

    @property
    def revision(self) -> tuple[int, str]:
        """The number and the digest of what is in force."""
        ...

    @property
    def unknown_plans(self) -> int:
        """Lookups of an account whose plan the policy does not know."""
        ...

    @property
    def unknown_ages(self) -> int:
        """Lookups that asked for an age that is not known."""
        ...


class PrometheusCollector:
    """Show limiters to Prometheus, from now on and for as long as the registry lives.

    Args:
        limiters: All of this process; their namespaces differ.
        registry: Where to register; None leaves that to you.
        namespace_label: The label that tells limiters apart. Where targets are labelled by a
            Kubernetes namespace already, another name keeps the two apart.

    Raises:
        UsageError: There is no limiter, two share a namespace, the label cannot be used, or the
            registry has such metrics already.
    """

    def __init__(
        self,
        *limiters: Counted,
        registry: CollectorRegistry | None = REGISTRY,
        namespace_label: str = "namespace",
    ) -> None:
        if not _LABEL.fullmatch(namespace_label) or namespace_label in _LABELS:
            raise UsageError(f"namespace_label must be another label, got {namespace_label!r:.80}")
        namespaces = [limiter.namespace for limiter in limiters]
        if not limiters or len(set(namespaces)) < len(namespaces):
            raise UsageError(
                "a collector takes limiters whose namespaces differ, "
                f"got {', '.join(namespaces) or 'none'}"
            )
        self._limiters = limiters
        self._label = namespace_label
        if registry is None:
            return
        try:
            registry.register(self)
        except ValueError as exc:
            raise UsageError(
                "the registry has metrics of tieredlimit already: give one PrometheusCollector "
                "all the limiters, or another registry"
            ) from exc

    def describe(self) -> Iterator[Metric]:
        """Return every metric without a value, so that registering reads no limiter."""
        return self._metrics(())

    def collect(self) -> Iterator[Metric]:
        """Return every metric as it is now."""
        return self._metrics(self._limiters)

    def _metrics(self, limiters: Sequence[Counted]) -> Iterator[Metric]:
        label = [self._label]
        decisions = CounterMetricFamily(
            "tieredlimit_decisions",
            "Decisions by feature, tier and outcome; shadow=true was only measured.",
            labels=[*label, *_LABELS],
        )
        seconds = HistogramMetricFamily(
            "tieredlimit_call_seconds", "Seconds that a call to the backend took.", labels=label
        )
        carried = HistogramMetricFamily(
            "tieredlimit_call_decisions",
            "Decisions that shared a call to the backend.",
            labels=label,
        )
        failures = CounterMetricFamily(
            "tieredlimit_call_failures", "Failures of the backend.", labels=label
        )
        revision = GaugeMetricFamily(
            "tieredlimit_revision",
            "The number of the revision that this process follows.",
            labels=label,
        )
        breaker = GaugeMetricFamily(
            "tieredlimit_breaker_state",
            "1 while this process does not ask the backend, 0 while it does.",
            labels=label,
        )
        plans = CounterMetricFamily(
            "tieredlimit_unknown_plans",
            "Lookups of an account whose plan the policy does not know.",
            labels=label,
        )
        ages = CounterMetricFamily(
            "tieredlimit_unknown_ages",
            "Lookups that asked for an age that the account did not have.",
            labels=label,
        )
        for limiter in limiters:
            of = [limiter.namespace]
            _add_decisions(decisions, of, limiter.tallies)
            stats = limiter.call_stats
            if stats is not None:
                sums = _cumulated(CALL_SECONDS, stats.by_seconds)
                seconds.add_metric(of, sums, stats.seconds_sum)
                sums = _cumulated(CALL_DECISIONS, stats.by_decisions)
                carried.add_metric(of, sums, stats.decisions)
                failures.add_metric(of, stats.failures)
            revision.add_metric(of, limiter.revision[0])
            if (is_open := getattr(limiter, "breaker_open", None)) is not None:
                breaker.add_metric(of, int(is_open))
            plans.add_metric(of, limiter.unknown_plans)
            ages.add_metric(of, limiter.unknown_ages)
        yield from (decisions, seconds, carried, failures, revision, breaker, plans, ages)


def _add_decisions(decisions: CounterMetricFamily, of: list[str], tallies: Tallies) -> None:
    for (feature, tier), tally in tallies.items():
        for outcome in OUTCOMES:
            count = getattr(tally, outcome)
            # What has not happened has no series, but for one: a pair that nobody asks for shows.
            if count or outcome == "allowed":
                decisions.add_metric([*of, feature, tier, outcome, "false"], count)
        for outcome in SHADOW_OUTCOMES:
            if count := getattr(tally, outcome):
                answer = outcome.removeprefix("shadow_")
                decisions.add_metric([*of, feature, tier, answer, "true"], count)


def _cumulated(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    spelled = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(spelled, accumulate(counts), strict=True))
