"""Spans of `[traces]`: whose trace they join, which are recorded, and what a start refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from runrecovery_service.config.reloading import plan_reload
from runrecovery_service.config.settings import Settings, TraceSettings
from runrecovery_service.domain.start_errors import PackagesMissing, TracesRefused
from runrecovery_service.extras import demand_packages
from runrecovery_service.metric_counters import Meters
from runrecovery_service.offline import check
from runrecovery_service.traces.otel_tracer import KeyedIds, OtelTracer
from runrecovery_service.traces.setup import QUEUE_SPANS, build_tracer, sampler, traces_url
from runrecovery_service.traces.span_outcomes import CountingExporter, SpanOutcomes
from structlog.testing import capture_logs
from support.trace_collector import Collector

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
URL = "http://127.0.0.1:4318"
DONE, FAILED = SpanExportResult.SUCCESS, SpanExportResult.FAILURE


def tracer(settings: TraceSettings) -> tuple[OtelTracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(
        sampler=sampler(settings), id_generator=KeyedIds(), shutdown_on_exit=False
    )
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTracer(provider), exporter


@pytest.mark.parametrize(
    ("ratio", "by_caller", "flag", "is_recorded"),
    [
        (0.0, True, "01", True),
        (0.0, False, "01", False),
        (1.0, True, "00", False),
        (1.0, False, "00", True),
        (0.0, True, None, False),
        (1.0, True, None, True),
    ],
)
def test_the_caller_decides_what_is_recorded_or_the_ratio_does(
    ratio: float, *, by_caller: bool, flag: str | None, is_recorded: bool
) -> None:
    start, exporter = tracer(
        TraceSettings(endpoint=URL, sample_ratio=ratio, sample_by_caller=by_caller)
    )
    parent = None if flag is None else f"00-{TRACE}-{SPAN}-{flag}"

    span = start.start("turn", parent)
    span.end()

    assert len(exporter.get_finished_spans()) == is_recorded
    assert span.traceparent is not None
    assert span.traceparent.endswith("-01" if is_recorded else "-00")
    assert flag is None or span.traceparent.split("-")[1] == TRACE


@pytest.mark.parametrize("damaged", ["", "x", "00-zz-11-01", f"00-{TRACE}-{SPAN}-01-more"])
def test_a_damaged_parent_begins_a_trace_instead_of_failing(damaged: str) -> None:
    start, exporter = tracer(TraceSettings(endpoint=URL))

    start.start("turn", damaged).end()

    assert [span.parent for span in exporter.get_finished_spans()] == [None]


def test_the_first_end_of_a_span_counts() -> None:
    start, exporter = tracer(TraceSettings(endpoint=URL))
    span = start.start("turn", None)

    span.end({"runrecovery.status": "FAILED"}, error="AGENT_FAILED")
    span.end(error="SERVICE_STOPPED")

    (ended,) = exporter.get_finished_spans()
    assert dict(ended.attributes or {}) == {
        "runrecovery.status": "FAILED",
        "error.type": "AGENT_FAILED",
    }


class Exports(SpanExporter):
    """Has one result after the other; None raises."""

    def __init__(self, *results: SpanExportResult | None) -> None:
        self.results = list(results)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self.results.pop(0)
        if result is None:
            raise ConnectionError
        return result


class Sending:
    """Spans that are handed to a collector with the given results, and the clock of the reports."""

    def __init__(self, *results: SpanExportResult | None, queue_spans: int = 4) -> None:
        self.meters, self.clock_s = Meters(), 1000.0
        self.outcomes = SpanOutcomes(
            meters=self.meters, queue_spans=queue_spans, now_s=lambda: self.clock_s
        )
        self.exporter = CountingExporter(Exports(*results), self.outcomes)

    def end(self, count: int) -> None:
        for _ in range(count):
            self.outcomes.note_ended()

    def export(self, count: int) -> None:
        self.exporter.export([ReadableSpan("a")] * count)

    @property
    def spans(self) -> dict[str, int]:
        return {outcome: count for (outcome,), count in self.meters.spans.values.items()}

    @property
    def exports(self) -> dict[str, int]:
        return {outcome: count for (outcome,), count in self.meters.span_exports.values.items()}


def test_every_span_and_every_request_is_counted_by_what_became_of_it() -> None:
    sending = Sending(DONE, FAILED, None)

    sending.end(6)  # the queue has room for 4
    sending.export(3)
    sending.end(3)
    sending.export(2)
    sending.export(2)

    assert sending.spans == {"sent": 3, "queue_full": 2, "not_exported": 4}
    assert sending.exports == {"sent": 1, "failed": 2}


def test_outcomes_are_0_before_the_first_span() -> None:
    sending = Sending()

    assert sending.spans == {"sent": 0, "queue_full": 0, "not_exported": 0}
    assert sending.exports == {"sent": 0, "failed": 0}


def test_an_outage_of_the_collector_is_reported_once_a_minute_and_at_its_end() -> None:
    sending = Sending(DONE, FAILED, None, FAILED, DONE, DONE)

    with capture_logs() as logged:
        for _ in range(6):
            sending.export(2)
            sending.clock_s += 30

    assert [(line["event"], line.get("spans"), line.get("spans_lost")) for line in logged] == [
        ("traces.spans_lost", 2, None),
        ("traces.spans_lost", 4, None),
        ("traces.exported_again", None, 6),
    ]
    assert {line.get("reason") for line in logged} == {"not_exported", None}


def test_a_collector_that_is_away_and_back_all_the_time_is_reported_once_a_minute() -> None:
    sending = Sending(*[FAILED, DONE] * 90)

    with capture_logs() as logged:
        for _ in range(180):  # a minute and a half
            sending.export(1)
            sending.clock_s += 0.5

    assert [(line["event"], line.get("spans"), line.get("spans_lost")) for line in logged] == [
        ("traces.spans_lost", 1, None),
        ("traces.exported_again", None, 1),
        ("traces.spans_lost", 60, None),
        ("traces.exported_again", None, 1),
    ]


def test_a_full_queue_is_reported_once_a_minute() -> None:
    sending = Sending(queue_spans=0)

    with capture_logs() as logged:
        sending.end(10)
        sending.clock_s += 60
        sending.end(1)

    assert [(line["event"], line["reason"], line["spans"]) for line in logged] == [
        ("traces.spans_lost", "queue_full", 1),
        ("traces.spans_lost", "queue_full", 10),
    ]


async def test_the_oldest_spans_are_lost_and_counted_when_too_many_wait() -> None:
    meters = Meters()
    with Collector(answers=False) as collector:
        start = build_tracer(
            TraceSettings(endpoint=collector.endpoint), instance="i", meters=meters
        )
        start.start("first", None).end()
        assert collector.asked.wait(30)
        for number in range(QUEUE_SPANS + 10):
            start.start(str(number), None).end()
        start.start("not recorded", f"00-{TRACE}-{SPAN}-00").end()
        collector.answer()
        await start.stop()

        names = [span.name for span in collector.spans]
        assert names == ["first", *map(str, range(10, QUEUE_SPANS + 10))]
        assert meters.spans.values == {
            ("sent",): QUEUE_SPANS + 1, ("queue_full",): 10, ("not_exported",): 0
        }  # fmt: skip


@pytest.mark.parametrize("parent", [f"00-{TRACE}-{SPAN}-01", None])
def test_the_same_key_gives_the_same_span_and_does_not_show(parent: str | None) -> None:
    key = "c0ffee" * 5
    before, _ = tracer(TraceSettings(endpoint=URL))
    after, exporter = tracer(TraceSettings(endpoint=URL))

    known = before.start("turn", parent, key=key).traceparent
    after.start("turn", parent, key=key).end()
    after.start("turn", parent).end()

    same, another = exporter.get_finished_spans()
    assert known == f"00-{same.context.trace_id:032x}-{same.context.span_id:016x}-01"
    assert another.context.span_id != same.context.span_id
    assert key[:16] not in known


def test_a_span_can_begin_in_the_past() -> None:
    start, exporter = tracer(TraceSettings(endpoint=URL))

    start.start("turn", None, started_at=datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)).end()

    (ended,) = exporter.get_finished_spans()
    assert ended.start_time == 1_767_225_600_000_001_000


@pytest.mark.parametrize("endpoint", [URL, f"{URL}/"])
def test_spans_go_to_the_path_of_otlp_below_the_endpoint(endpoint: str) -> None:
    assert traces_url(endpoint) == "http://127.0.0.1:4318/v1/traces"


def test_without_the_package_a_start_and_check_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(traces=TraceSettings(endpoint=URL), data_dir=tmp_path / "data")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    sentence = "traces: needs `pip install runrecovery-service[traces]`"

    with pytest.raises(PackagesMissing) as caught:
        demand_packages(settings)

    assert str(caught.value) == sentence
    assert sentence in check(settings)


def test_a_bad_variable_of_opentelemetry_refuses_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "nonsense")

    with pytest.raises(TracesRefused, match=r"^traces: a variable OTEL_… cannot be used: "):
        build_tracer(TraceSettings(endpoint=URL), instance="i", meters=Meters())


def test_a_reload_leaves_traces_to_a_restart() -> None:
    present = Settings(traces=TraceSettings(endpoint=URL))
    read = Settings(traces=TraceSettings(endpoint=URL, sample_ratio=0.5))

    assert plan_reload(present, read).needs_restart == ("traces",)
