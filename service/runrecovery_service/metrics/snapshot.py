"""Metrics at one moment as plain values, which the collector passes to its thread.

`gauges.py` defines the gauges, and `metric_counters.py` the counters and histograms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import TypeAlias

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Counter, Histogram, Meters

Labels: TypeAlias = tuple[str, ...]


class Kind(Enum):
    """The type of a metric in Prometheus."""

    COUNTER = auto()
    GAUGE = auto()
    HISTOGRAM = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One metric, with a value for each combination of its labels.

    Attributes:
        numbers: by the values of the labels: one number; for a histogram the count of each bucket,
            and then the sum.
        bounds: the upper bounds of the buckets of a histogram.
    """

    kind: Kind
    name: str
    help: str
    labels: Labels
    numbers: Mapping[Labels, tuple[float, ...]]
    bounds: tuple[float, ...] = ()


def families_of(meters: Meters, *more: Counter) -> Iterator[Family]:
    """Yield the counters and histograms as they are now. Call it on the event loop."""
    for meter in (*meters, *more):
        if isinstance(meter, Histogram):
            yield Family(
                kind=Kind.HISTOGRAM,
                name=meter.name,
                help=meter.help,
                labels=meter.labels,
                # Copied at once: another thread may add a series meanwhile.
                numbers={labels: tuple(series) for labels, series in list(meter.series.items())},
                bounds=meter.bounds,
            )
        else:
            yield Family(
                kind=Kind.COUNTER,
                name=meter.name,
                help=meter.help,
                labels=meter.labels,
                numbers={labels: (count,) for labels, count in list(meter.values.items())},
            )
