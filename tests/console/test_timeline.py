"""The timeline of a run."""

from __future__ import annotations

from datetime import UTC, datetime

from runrecovery.v1 import run_pb2
from runrecovery_service.console.bars import BAR_UNITS, MIN_UNITS, bar, shares
from runrecovery_service.console.timeline import timeline_of


def event(kind: str, status: str, at_s: int, **more: object) -> run_pb2.RunEvent:
    """Return an event, so many seconds after 10:00."""
    found = run_pb2.RunEvent(
        kind=run_pb2.RunEventKind.Value(f"RUN_EVENT_KIND_{kind}"),
        status=run_pb2.RunStatus.Value(f"RUN_STATUS_{status}"),
        **more,  # type: ignore[arg-type] # fields of the message
    )
    found.happened_at.FromDatetime(at(at_s))
    return found


def at(seconds: int) -> datetime:
    """Return a time, so many seconds after 10:00."""
    return datetime(2026, 11, 30, 10, seconds // 60, seconds % 60, tzinfo=UTC)


def test_a_timeline_shows_how_long_each_part_took_until_now() -> None:
    events = [
        event("CREATED", "QUEUED", 0),
        event("STARTED", "RUNNING", 10, attempt=1),
        event("ASKED", "WAITING_USER", 30, interaction_id=1),
    ]

    shown = timeline_of(events, at(100), is_cut=False)

    assert [(each.title, each.span, each.took) for each in shown.events] == [
        ("Created", "queued", "10 s"),
        ("Process launched", "working", "20 s"),
        ("Asked", "waiting for an answer", ""),
    ]
    assert [(part.tone, part.text) for part in shown.parts] == [
        ("calm", "queued: 10 s"),
        ("busy", "working: 20 s"),
        ("wait", "waiting for an answer: 1 min 10 s"),
    ]
    assert shown.total == "1 min 40 s"


def test_the_bar_of_an_ended_run_ends_with_it() -> None:
    events = [event("CREATED", "QUEUED", 0), event("CANCELED", "CANCELED", 5, caller="ada")]

    shown = timeline_of(events, at(1000), is_cut=False)

    assert (shown.total, [part.text for part in shown.parts]) == ("5.0 s", ["queued: 5.0 s"])
    assert shown.events[-1].caller == "ada"


def test_a_restart_is_a_mark_between_two_parts() -> None:
    decision = run_pb2.RecoveryInfo(
        recovery_state=run_pb2.RECOVERY_STATE_RECOVERED_WAITING,
        recovery_reason="resumable_waiting_preserved",
    )
    events = [
        event("ASKED", "WAITING_USER", 0, interaction_id=1),
        event("RECOVERED", "WAITING_USER", 50, recovery=decision),
    ]

    shown = timeline_of(events, at(100), is_cut=True)

    assert [(mark.at, mark.text) for mark in shown.marks] == [(500, "service restarted")]
    assert shown.events[1].detail == "kept waiting, by resumable_waiting_preserved"
    assert shown.is_cut


def test_a_run_without_events_has_an_empty_timeline() -> None:
    assert timeline_of([], at(0), is_cut=True).parts == ()


def test_clocks_that_were_stepped_back_give_no_negative_parts() -> None:
    events = [event("CREATED", "QUEUED", 50), event("STARTED", "RUNNING", 20)]

    shown = timeline_of(events, at(10), is_cut=False)

    assert (shown.total, shown.parts) == ("0 ms", ())


def test_the_parts_of_a_bar_fill_it_and_can_all_be_seen() -> None:
    parts = bar([(1e6, "busy", "long"), (0, "calm", "nothing"), (1, "wait", "short")])

    assert [part.text for part in parts] == ["long", "short"]
    assert parts[1].width == MIN_UNITS
    assert parts[1].start == parts[0].width
    assert parts[0].width + parts[1].width == BAR_UNITS


def test_a_bar_of_very_many_parts_stays_within_its_width() -> None:
    assert sum(shares([1.0] * 500)) <= BAR_UNITS
    assert shares([0.0, 0.0]) == [0, 0]
    assert sum(shares([1.0, 1.0, 1.0])) == BAR_UNITS
