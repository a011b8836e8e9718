"""OpenMetrics as its consumers read it: by prometheus-client's strict parser."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families


def families_of(text: str) -> dict[str, Metric]:
    """The metrics of a page by name. Raises ValueError if it is not OpenMetrics to the letter."""
    return {metric.name: metric for metric in text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]


def values_of(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by its name and its label values in the order of the labels' names."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for metric in families_of(text).values()
        for sample in metric.samples
    }
