"""Every counter and histogram of the service.

Every package counts, whether or not metrics are on. `metrics/` converts the numbers to the
Prometheus format at a scrape. Only one thread writes a counter or histogram, so none needs a lock.
The exception is `SharedCounter`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

CALL_BOUNDS_S: Final = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0
)  # fmt: skip
STORE_BOUNDS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0
)  # fmt: skip
LAUNCH_BOUNDS_S: Final = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TURN_BOUNDS_S: Final = (
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0
)  # fmt: skip
COMMIT_BOUNDS: Final = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Counter:
    """A count for each combination of label values. No value may come from a caller or name a run.

    Attributes:
        name: the name of the metric, which ends in `_total`.
        help: the meaning, one sentence.
        labels: the names of the labels.
        values: the counts, by label values in the order of `labels`.
    """

    def __init__(self, name: str, help: str, *labels: str) -> None:  # noqa: A002 - Prometheus' word
        self.name = name
        self.help = help
        self.labels = labels
        self.values: dict[tuple[str, ...], int] = {} if labels else {(): 0}

    def add(self, *labels: str, many: int = 1) -> None:
        """Count one event, or `many` events."""
        self.values[labels] = self.values.get(labels, 0) + many

    def show_zero(self, *labels: str) -> None:
        """Begin the series with 0: Prometheus misses the increase of a series that begins at 1."""
        self.values.setdefault(labels, 0)


class SharedCounter(Counter):
    """A counter that several threads write. Use it only for rare events: each takes a lock."""

    def __init__(self, name: str, help: str, *labels: str) -> None:  # noqa: A002 - Prometheus' word
        super().__init__(name, help, *labels)
        self._lock = threading.Lock()

    def add(self, *labels: str, many: int = 1) -> None:
        """Count one event, or `many` events."""
        with self._lock:
            super().add(*labels, many=many)


class Histogram:
    """Counts of values in fixed buckets, for each combination of label values.

    Attributes:
        name: the name of the metric, which ends in its unit.
        help: the meaning, one sentence.
        labels: the names of the labels.
        bounds: the upper bounds of the buckets, ascending. One more bucket is above the last.
        series: by label values: the count of each bucket, followed by the sum of all values.
    """

    def __init__(self, name: str, help: str, *labels: str, bounds: tuple[float, ...]) -> None:  # noqa: A002 - Prometheus' word
        self.name = name
        self.help = help
        self.labels = labels
        self.bounds = bounds
        self.series: dict[tuple[str, ...], list[float]] = {}
        if not labels:
            self._new_series(())

    def observe(self, value: float, *labels: str) -> None:
        """Count a value."""
        series = self.series.get(labels) or self._new_series(labels)
        series[bisect_left(self.bounds, value)] += 1
        series[-1] += value

    def _new_series(self, labels: tuple[str, ...]) -> list[float]:
        series = self.series[labels] = [0.0] * (len(self.bounds) + 2)
        return series


class Meters:
    """Every counter and histogram of one service. docs/metrics.md lists each by its name."""

    def __init__(self) -> None:
        self._add_calls()
        self._add_runs()
        self._add_store()
        self._add_traces()

    def _add_calls(self) -> None:
        self.calls = Counter("runrecovery_calls_total", "Calls that have ended.", "method", "code")
        self.call_seconds = Histogram(
            "runrecovery_call_duration_seconds",
            "Duration of calls with one response.",
            "method",
            bounds=CALL_BOUNDS_S,
        )
        self.streams_cut = Counter(
            "runrecovery_streams_cut_total", "Streams cut off from a slow reader.", "method"
        )

    def _add_runs(self) -> None:
        self.launch_seconds = Histogram(
            "runrecovery_launch_duration_seconds",
            "From the slot of a turn to the start of its agent.",
            "engine",
            bounds=LAUNCH_BOUNDS_S,
        )
        self.turn_seconds = Histogram(
            "runrecovery_turn_duration_seconds",
            "From the slot of a turn to the record of its end, by the status of the run then.",
            "engine",
            "status",
            bounds=TURN_BOUNDS_S,
        )
        self.output_lost = Counter(
            "runrecovery_output_lost_total", "Pieces of output that could not be kept.", "engine"
        )
        self.webhook_tries = Counter(
            "runrecovery_webhook_tries_total", "Tries of webhook deliveries.", "webhook", "outcome"
        )
        self.takeovers = Counter(
            "runrecovery_takeovers_total", "Takeovers of dead instances.", "outcome"
        )
        self.takeover_runs = Counter(
            "runrecovery_takeover_runs_total",
            "Decisions of completed takeovers on runs of dead instances.",
            "rule",
        )

    def _add_store(self) -> None:
        self.storage_seconds = Histogram(
            "runrecovery_storage_duration_seconds",
            "From a request of the service to the answer of the store.",
            "operation",
            bounds=STORE_BOUNDS_S,
        )
        self.storage_errors = Counter(
            "runrecovery_storage_errors_total",
            "Requests that failed because the store did.",
            "operation",
            "code",
        )
        self.commit_writes = Histogram(
            "runrecovery_commit_size_writes", "Writes in one commit.", bounds=COMMIT_BOUNDS
        )

    def _add_traces(self) -> None:
        self.spans = SharedCounter(
            "runrecovery_spans_total", "Spans of traces that have ended.", "outcome"
        )
        self.span_exports = Counter(
            "runrecovery_span_exports_total", "Requests to the collector of traces.", "outcome"
        )

    def __iter__(self) -> Iterator[Counter | Histogram]:
        return iter(vars(self).values())
