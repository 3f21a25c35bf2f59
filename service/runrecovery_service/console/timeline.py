"""The timeline of a run: what happened, and how long each part took. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Final

from runrecovery.v1 import run_pb2

from runrecovery_service.console.bars import BarPart, bar, shares
from runrecovery_service.console.moments import Moment, duration_text, moment, to_datetime
from runrecovery_service.console.words import recovery_word
from runrecovery_service.lazy_dataclass import dataclass

_TITLES: Final = {
    run_pb2.RUN_EVENT_KIND_CREATED: ("Created", "calm"),
    run_pb2.RUN_EVENT_KIND_STARTED: ("Process launched", "busy"),
    run_pb2.RUN_EVENT_KIND_ASKED: ("Asked", "wait"),
    run_pb2.RUN_EVENT_KIND_ANSWERED: ("Answered", "good"),
    run_pb2.RUN_EVENT_KIND_AUTO_DECIDED: ("Decided automatically", "warn"),
    run_pb2.RUN_EVENT_KIND_QUEUED: ("Back in the queue", "calm"),
    run_pb2.RUN_EVENT_KIND_CANCEL_REQUESTED: ("Cancel requested", "warn"),
    run_pb2.RUN_EVENT_KIND_SUCCEEDED: ("Succeeded", "good"),
    run_pb2.RUN_EVENT_KIND_FAILED: ("Failed", "bad"),
    run_pb2.RUN_EVENT_KIND_CANCELED: ("Canceled", "calm"),
    run_pb2.RUN_EVENT_KIND_RECOVERED: ("Service restarted", "restart"),
    run_pb2.RUN_EVENT_KIND_REOPENED: ("Reopened", "good"),
    run_pb2.RUN_EVENT_KIND_RETRYING: ("Model call retried", "warn"),
}
_SPANS: Final = {
    run_pb2.RUN_STATUS_QUEUED: ("queued", "calm"),
    run_pb2.RUN_STATUS_RUNNING: ("working", "busy"),
    run_pb2.RUN_STATUS_WAITING_USER: ("waiting for an answer", "wait"),
}
_ENDED: Final = {
    run_pb2.RUN_STATUS_SUCCEEDED,
    run_pb2.RUN_STATUS_FAILED,
    run_pb2.RUN_STATUS_CANCELED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEvent:
    """One event. `took` is the time until the next event; empty for the last event."""

    title: str
    tone: str
    at: Moment | None
    detail: str
    caller: str
    interaction_id: int
    took: str
    span: str


@dataclass(frozen=True, slots=True)
class BarMark:
    """A restart on the bar."""

    at: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What happened to a run.

    Attributes:
        total: the time from the first event shown until the run ended, or until now.
        is_cut: whether earlier events exist that are not shown.
    """

    events: tuple[TimelineEvent, ...]
    parts: tuple[BarPart, ...]
    marks: tuple[BarMark, ...]
    total: str
    is_cut: bool


def timeline_of(events: Sequence[run_pb2.RunEvent], now: datetime, *, is_cut: bool) -> Timeline:
    """Return the timeline of the events of a run, oldest first.

    Args:
        now: where the bar of an unfinished run ends.
    """
    times = [to_datetime(event.happened_at) or now for event in events]
    is_ended = bool(events) and events[-1].status in _ENDED
    ends = [*times[1:], times[-1] if is_ended else max(now, times[-1])] if times else []
    spans = [max(end - start, timedelta()) for start, end in zip(times, ends, strict=True)]
    parts, starts = _parts(events, spans)
    return Timeline(
        events=tuple(
            _event(event, span, is_last=at == len(events) - 1)
            for at, (event, span) in enumerate(zip(events, spans, strict=True))
        ),
        parts=parts,
        marks=tuple(
            BarMark(start, "service restarted")
            for event, start in zip(events, starts, strict=True)
            if event.kind == run_pb2.RUN_EVENT_KIND_RECOVERED
        ),
        total=duration_text(sum(spans, timedelta())),
        is_cut=is_cut,
    )


def _event(event: run_pb2.RunEvent, span: timedelta, *, is_last: bool) -> TimelineEvent:
    title, tone = _TITLES.get(event.kind, ("Changed", "calm"))
    word, _ = _SPANS.get(event.status, ("", "calm"))
    return TimelineEvent(
        title=title,
        tone=tone,
        at=moment(event.happened_at),
        detail=_detail(event),
        caller=event.caller,
        interaction_id=event.interaction_id,
        took="" if is_last else duration_text(span),
        span=word,
    )


def _detail(event: run_pb2.RunEvent) -> str:
    if event.kind == run_pb2.RUN_EVENT_KIND_RECOVERED:
        decision = event.recovery
        return f"{recovery_word(decision.recovery_state).text}, by {decision.recovery_reason}"
    if event.kind == run_pb2.RUN_EVENT_KIND_STARTED:
        return f"attempt {event.attempt}"
    return event.message or event.error_code


def _parts(
    events: Sequence[run_pb2.RunEvent], spans: Sequence[timedelta]
) -> tuple[tuple[BarPart, ...], list[int]]:
    """Return the parts of the bar, and the position of each event on the bar."""
    amounts = [
        span.total_seconds() if event.status in _SPANS else 0.0
        for event, span in zip(events, spans, strict=True)
    ]
    words = [_SPANS.get(event.status, ("", "calm")) for event in events]
    parts = bar(
        [
            (amount, tone, f"{word}: {duration_text(span)}")
            for amount, (word, tone), span in zip(amounts, words, spans, strict=True)
        ]
    )
    return parts, [0, *accumulate(shares(amounts))][: len(events)]
