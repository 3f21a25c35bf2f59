"""Writes metrics in Prometheus' text form. Imported only when metrics are on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from runrecovery_service.metrics.snapshot import Family, Kind

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The only format that is offered. Every version of Prometheus reads it."""


class _Given(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return map(_metric, self._families)


def render(families: Iterable[Family]) -> bytes:
    """Return the metrics of the service and its process (CPU time, memory, descriptors) as text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(families))
    ProcessCollector(namespace="runrecovery", registry=registry)
    return generate_latest(registry)


def _metric(family: Family) -> Metric:
    match family.kind:
        case Kind.COUNTER:
            counter = CounterMetricFamily(family.name, family.help, labels=family.labels)
            for labels, (number,) in family.numbers.items():
                counter.add_metric(labels, number)
            return counter
        case Kind.GAUGE:
            gauge = GaugeMetricFamily(family.name, family.help, labels=family.labels)
            for labels, (number,) in family.numbers.items():
                gauge.add_metric(labels, number)
            return gauge
        case Kind.HISTOGRAM:
            histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
            bounds = [*map(floatToGoString, family.bounds), "+Inf"]
            for labels, (*counts, total) in family.numbers.items():
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                histogram.add_metric(labels, buckets, total)
            return histogram
