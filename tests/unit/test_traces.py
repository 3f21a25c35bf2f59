"""Spans of `[traces]`: whose trace they join, which are recorded, and what a start refuses."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from runrecovery_service.config.reloading import plan_reload
from runrecovery_service.config.settings import Settings, TraceSettings
from runrecovery_service.domain.start_errors import PackagesMissing, TracesRefused
from runrecovery_service.extras import demand_packages
from runrecovery_service.offline import check
from runrecovery_service.traces.otel_tracer import OtelTracer
from runrecovery_service.traces.reporting_exporter import ReportingExporter
from runrecovery_service.traces.setup import QUEUE_SPANS, build_tracer, sampler, traces_url
from structlog.testing import capture_logs
from support.trace_collector import Collector

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
URL = "http://127.0.0.1:4318"


def tracer(settings: TraceSettings) -> tuple[OtelTracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler=sampler(settings), shutdown_on_exit=False)
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


def test_an_outage_of_the_collector_is_reported_at_its_begin_and_its_end() -> None:
    done, failed = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
    exporter = ReportingExporter(Exports(done, failed, None, done, done, failed))
    spans = (ReadableSpan("a"), ReadableSpan("b"))

    with capture_logs() as logged:
        for _ in range(6):
            exporter.export(spans)

    assert [(line["event"], line.get("spans_lost")) for line in logged] == [
        ("traces.not_exported", None),
        ("traces.exported_again", 4),
        ("traces.not_exported", None),
    ]


async def test_the_oldest_spans_are_lost_when_too_many_wait_for_the_collector() -> None:
    with Collector(answers=False) as collector:
        start = build_tracer(TraceSettings(endpoint=collector.endpoint), instance="i")
        start.start("first", None).end()
        assert collector.asked.wait(30)
        for number in range(QUEUE_SPANS + 10):
            start.start(str(number), None).end()
        collector.answer()
        await start.stop()

        names = [span.name for span in collector.spans]
        assert names == ["first", *map(str, range(10, QUEUE_SPANS + 10))]


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
        build_tracer(TraceSettings(endpoint=URL), instance="i")


def test_a_reload_leaves_traces_to_a_restart() -> None:
    present = Settings(traces=TraceSettings(endpoint=URL))
    read = Settings(traces=TraceSettings(endpoint=URL, sample_ratio=0.5))

    assert plan_reload(present, read).needs_restart == ("traces",)
