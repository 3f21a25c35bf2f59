"""A table of what each event of a turn changes: event in, state and action out."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.run import InteractionKind, Profile, Question, RunError
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import Budget, TurnUsage, Usage
from runrecovery_service.engines.dialect import (
    AskMessage,
    ProgressMessage,
    ResultMessage,
    RetryMessage,
    SessionMessage,
    UnknownMessage,
    UsageMessage,
)
from runrecovery_service.execution.turn_state import (
    CompareEnds,
    DeadlinePassed,
    LineRead,
    ProtocolBroken,
    RecordQuestion,
    RecordRetry,
    RecordSession,
    RecordUsage,
    ReportUnknown,
    Signal,
    TurnEvent,
    TurnRules,
    TurnState,
    advance,
)
from runrecovery_service.process.shim_events import (
    Empty,
    EndsItself,
    Exited,
    Gated,
    NotStarted,
    Started,
)

NOW_S: Final = 1000.0
SOON_S: Final = 1001.0
"""One second after the exit: until then, output may stay open."""
GRACE_S: Final = 1010.0
RULES: Final = TurnRules(
    profile=Profile.RESUMABLE, resumes=False, ends_once=True, exit_grace_s=10.0
)
STICKY: Final = replace(RULES, profile=Profile.STICKY_PROCESS)
LAST_COUNTS: Final = replace(RULES, ends_once=False)
RESUMING: Final = replace(RULES, resumes=True)
QUESTION: Final = Question(kind=InteractionKind.CONFIRM, prompt="Go on?")
ASKED, RESULT, OTHER = Asked(QUESTION), Succeeded({"a": 1}), Succeeded({"a": 2})
USED: Final = TurnUsage(turn=Usage(input_tokens=2, output_tokens=1))
MOST: Final = TurnUsage(turn=Usage(input_tokens=2, output_tokens=3, cost_nanos=7, model="m"))
HOPELESS: Final = RetryMessage(message="m", is_hopeless=True)
REFUSED: Final = RunError(
    code="ENGINE_UNAUTHENTICATED",
    message="The model refuses the agent's credentials, but the agent tries again: m.",
)
TIGHT: Final = replace(
    RULES, budget=Budget(max_tokens=10), used_before=Usage(input_tokens=4, output_tokens=3)
)
USED_UP: Final = RunError(code="BUDGET_EXCEEDED", message="The run has used 10 of its 10 tokens.")
EXIT: Final = Exited(code=0, user_us=1, system_us=2, max_rss_kib=3)
SUSPENDED: Final = (
    "The service was suspended for longer than its lease, so that the run's processes were ended."
)
NEW: Final = TurnState()

Facts = dict[str, Any]

# Columns: state before, event, rules; changed fields, action.
TABLE: Final[list[tuple[Facts, TurnEvent, TurnRules, Facts, object]]] = [
    # -- messages
    (
        {}, SessionMessage(value="h"), RULES,
        {"has_session": True}, RecordSession("h"),
    ),
    ({}, ProgressMessage(message="m"), RULES, {}, None),
    (
        {}, UnknownMessage(type="t"), RULES,
        {"unknown_types": frozenset({"t"})}, ReportUnknown("t"),
    ),
    ({"unknown_types": frozenset({"t"})}, UnknownMessage(type="t"), RULES, {}, None),
    (
        {}, UnknownMessage(type="t", problem="p"), RULES,
        {"unknown_types": frozenset({"t"})}, ReportUnknown("t", "p"),
    ),
    # -- usage is recorded every 5 s, right after the last word, and at the end
    (
        {}, UsageMessage(used=USED), RULES,
        {"used": USED, "usage_due_s": 1005.0}, RecordUsage(USED),
    ),
    (
        {"usage_due_s": 1000.5}, UsageMessage(used=USED), RULES,
        {"used": USED, "is_usage_new": True}, None,
    ),
    (
        {"used": USED, "is_usage_new": True, "usage_due_s": 1000.0}, Signal.USAGE_DUE, RULES,
        {"is_usage_new": False, "usage_due_s": 1005.0}, RecordUsage(USED),
    ),
    ({}, Signal.USAGE_DUE, RULES, {}, None),
    (
        {"last_word": RESULT}, UsageMessage(used=USED), RULES,
        {"used": USED, "usage_due_s": 1005.0}, RecordUsage(USED),
    ),
    (
        {"usage_due_s": 1004.0}, ResultMessage(output={"a": 1}), RULES,
        {"last_word": RESULT, "usage_due_s": 0.0}, None,
    ),
    (
        {"usage_due_s": 1004.0, "last_word": RESULT}, ResultMessage(output={"a": 2}), LAST_COUNTS,
        {"last_word": OTHER}, None,
    ),
    # -- none of its numbers decreases
    (
        {"used": TurnUsage(turn=Usage(input_tokens=1, output_tokens=3, cost_nanos=7, model="m"))},
        UsageMessage(used=USED), RULES,
        {"used": MOST, "usage_due_s": 1005.0}, RecordUsage(MOST),
    ),
    # -- retries are recorded 20 times; the second refusal of the credentials ends the turn
    ({}, RetryMessage(message="m"), RULES, {"retries": 1}, RecordRetry("m")),
    ({"retries": 20}, RetryMessage(message="m"), RULES, {}, None),
    ({}, HOPELESS, RULES, {"retries": 1, "stopped": REFUSED}, RecordRetry("m")),
    ({"retries": 20}, HOPELESS, RULES, {"stopped": REFUSED}, None),
    ({"last_word": RESULT}, HOPELESS, RULES, {"retries": 1}, RecordRetry("m")),
    (
        {"last_word": RESULT, "is_at_work": True}, HOPELESS, RULES,
        {"retries": 1, "stopped": REFUSED}, RecordRetry("m"),
    ),
    # -- a budget ends a turn that continues, and never a turn that is at its end
    ({"used": USED}, LineRead(None), TIGHT, {"stopped": USED_UP}, None),
    ({"used": USED}, LineRead(None), replace(TIGHT, used_before=None), {}, None),
    (
        {"usage_due_s": 1004.0}, UsageMessage(used=USED, is_answering=True), TIGHT,
        {"used": USED, "is_usage_new": True, "is_answering": True}, None,
    ),
    ({"used": USED, "is_answering": True}, LineRead(None), TIGHT, {}, None),
    (
        {"used": USED, "last_word": RESULT}, LineRead(None), TIGHT,
        {"exit_due_s": GRACE_S}, None,
    ),
    (
        {"used": USED, "last_word": RESULT}, LineRead(at_work=True), TIGHT,
        {"stopped": USED_UP}, None,
    ),
    (
        {"used": USED, "exited": EXIT}, LineRead(None), TIGHT,
        {}, None,
    ),
    # -- a resumable process asks
    (
        {}, AskMessage(question=QUESTION), RULES,
        {"protocol_error": "The agent asked without having named a session to resume."}, None,
    ),
    (
        {"has_session": True}, AskMessage(question=QUESTION), RULES,
        {"last_word": ASKED}, None,
    ),
    ({}, AskMessage(question=QUESTION), RESUMING, {"last_word": ASKED}, None),
    # -- a sticky process asks
    (
        {}, AskMessage(question=QUESTION), STICKY,
        {"is_waiting": True}, RecordQuestion(QUESTION),
    ),
    (
        {"is_waiting": True}, AskMessage(question=QUESTION), STICKY,
        {"protocol_error": "The agent asked while its last question was open."}, None,
    ),
    (
        {"last_word": RESULT}, AskMessage(question=QUESTION), STICKY,
        {"protocol_error": "The agent gave a second, different result or question."}, None,
    ),
    ({"is_waiting": True}, Signal.REPLY_ACCEPTED, STICKY, {"is_waiting": False}, None),
    # -- results
    ({}, ResultMessage(output={"a": 1}), RULES, {"last_word": RESULT}, None),
    (
        {"last_word": RESULT}, ResultMessage(output={"a": 2}), RULES,
        {}, CompareEnds(RESULT, OTHER),
    ),
    (
        {"last_word": RESULT}, ResultMessage(output={"a": 2}), LAST_COUNTS,
        {"last_word": OTHER}, None,
    ),
    (
        {"is_waiting": True}, ResultMessage(output={"a": 1}), STICKY,
        {"protocol_error": "The agent gave its result while its question was open."}, None,
    ),
    # -- lines: after the end of a turn the exit has to follow
    ({}, LineRead(None), RULES, {}, None),
    ({"last_word": RESULT}, LineRead(None), RULES, {"exit_due_s": GRACE_S}, None),
    ({}, LineRead(at_work=False), RULES, {"exit_due_s": GRACE_S}, None),
    (
        {"last_word": RESULT, "exit_due_s": SOON_S}, LineRead(at_work=True), RULES,
        {"is_at_work": True, "exit_due_s": None}, None,
    ),
    (
        {"is_at_work": True}, LineRead(None), RULES,
        {"is_at_work": False}, None,
    ),
    (
        {"last_word": RESULT, "exited": EXIT, "exit_due_s": SOON_S}, LineRead(None), RULES,
        {}, None,
    ),
    (
        {"last_word": RESULT, "open_outputs": 0}, LineRead(at_work=True), RULES,
        {"is_at_work": True}, None,
    ),
    # -- the shim
    ({}, Gated(watermarked=True), RULES, {}, None),
    ({}, Started(pid=1, start_ticks=2), RULES, {}, None),
    ({}, NotStarted("no"), RULES, {}, None),
    ({}, EXIT, RULES, {"exited": EXIT, "exit_due_s": SOON_S}, None),
    ({}, Empty(), RULES, {"is_tree_empty": True, "exit_due_s": SOON_S}, None),
    (
        {}, EndsItself("lease"), RULES,
        {"interrupted": SUSPENDED, "exit_due_s": SOON_S}, None,
    ),
    ({"exited": EXIT}, EndsItself("lease"), RULES, {"exit_due_s": SOON_S}, None),
    (
        {}, Signal.SHIM_GONE, RULES,
        {"is_unsupervised": True, "exit_due_s": SOON_S}, None,
    ),
    ({"exited": EXIT}, Signal.SHIM_GONE, RULES, {"exit_due_s": SOON_S}, None),
    ({}, Signal.SHIM_USELESS, RULES, {"is_unsupervised": True}, None),
    ({"exited": EXIT}, Signal.SHIM_USELESS, RULES, {}, None),
    # -- pipes
    (
        {}, Signal.STDOUT_ENDED, RULES,
        {"open_outputs": 1, "exit_due_s": GRACE_S}, None,
    ),
    ({}, Signal.STDERR_ENDED, RULES, {"open_outputs": 1}, None),
    ({"exit_due_s": NOW_S}, Signal.OUTPUT_UNREAD, RULES, {"exit_due_s": SOON_S}, None),
    (
        {}, Signal.REPLY_LOST, RULES,
        {"is_reply_lost": True, "exit_due_s": SOON_S}, None,
    ),
    # -- orders
    ({}, Signal.CANCELED, RULES, {"is_canceled": True}, None),
    (
        {}, DeadlinePassed(DueKind.RUN), RULES,
        {"deadline_passed": DueKind.RUN}, None,
    ),
    ({}, ProtocolBroken("How."), RULES, {"protocol_error": "How."}, None),
]  # fmt: skip


@pytest.mark.parametrize(("before", "event", "rules", "changes", "action"), TABLE)
def test_an_event_changes_what_the_table_says_and_nothing_else(
    before: Facts, event: TurnEvent, rules: TurnRules, changes: Facts, action: object
) -> None:
    state = replace(NEW, **before)

    assert advance(state, event, rules, now_s=NOW_S) == (replace(state, **changes), action)


def test_every_signal_is_in_the_table() -> None:
    assert {event for _, event, *_ in TABLE if isinstance(event, Signal)} == set(Signal)


@pytest.mark.parametrize(
    ("facts", "is_over"),
    [
        ({}, False),
        ({"exited": EXIT}, False),  # all output comes before the end
        ({"exited": EXIT, "open_outputs": 1}, False),
        ({"exited": EXIT, "open_outputs": 0}, True),
        ({"open_outputs": 0}, False),  # it may live until its exit is due
        ({"last_word": RESULT}, False),
        ({"is_reply_lost": True}, False),
        ({"is_unsupervised": True}, True),
        ({"interrupted": "lease"}, True),
        ({"is_canceled": True}, True),
        ({"deadline_passed": DueKind.WAIT}, True),
        ({"protocol_error": "How."}, True),
    ],
)
def test_a_turn_is_over_when_its_process_has_ended_or_must_be_killed(
    facts: Facts, *, is_over: bool
) -> None:
    assert replace(NEW, **facts).is_over is is_over


@pytest.mark.parametrize(
    ("facts", "wake_s", "to_record"),
    [
        ({}, None, False),
        ({"usage_due_s": 4.0}, None, False),
        ({"usage_due_s": 4.0, "is_usage_new": True}, 4.0, True),
        ({"usage_due_s": 4.0, "is_usage_new": True, "exit_due_s": 5.0}, 4.0, True),
        ({"usage_due_s": 4.0, "is_usage_new": True, "exit_due_s": 3.0}, 3.0, False),
        ({"usage_due_s": 4.0, "exit_due_s": 5.0}, 5.0, False),
    ],
)
def test_a_turn_without_events_wakes_for_what_is_due_first(
    facts: Facts, wake_s: float | None, *, to_record: bool
) -> None:
    state = replace(NEW, **facts)

    assert (state.wake_s, state.wakes_to_record) == (wake_s, to_record)


def test_reasons_to_end_a_process_tree_have_this_order() -> None:
    facts: Facts = {
        "is_canceled": True, "deadline_passed": DueKind.RUN, "protocol_error": "How.",
        "is_unsupervised": True, "is_reply_lost": True,
    }  # fmt: skip
    reasons = []
    while facts:
        reasons.append(replace(NEW, **facts).end_reason)
        del facts[next(iter(facts))]
    reasons.append(NEW.end_reason)

    assert reasons == [
        "canceled", "timed_out", "protocol_broken", "shim_lost", "reply_lost", "turn_over",
    ]  # fmt: skip


def test_at_most_a_hundred_unknown_message_types_are_remembered() -> None:
    state = NEW
    for number in range(101):
        state, _ = advance(state, UnknownMessage(type=str(number)), RULES, now_s=NOW_S)

    assert state.unknown_types == frozenset(str(number) for number in range(100))


EVENTS: Final = [event for _, event, *_ in TABLE]


@given(
    events=st.lists(st.sampled_from(EVENTS), max_size=12),
    rules=st.sampled_from([RULES, STICKY, LAST_COUNTS, RESUMING]),
)
def test_no_later_event_undoes_the_end_of_a_turn(events: list[TurnEvent], rules: TurnRules) -> None:
    state = NEW
    for event in events:
        before = state
        state, _ = advance(state, event, rules, now_s=NOW_S)

        assert not before.is_canceled or state.is_canceled
        assert before.exited is None or state.exited is not None
        assert before.protocol_error is None or state.protocol_error is not None
        assert before.deadline_passed is None or state.deadline_passed is not None
        assert state.open_outputs <= before.open_outputs


def test_every_event_is_accepted_in_every_state() -> None:
    states = [replace(NEW, **facts) for facts, *_ in TABLE]
    for state, event, rules in product(states, EVENTS, [RULES, STICKY, LAST_COUNTS]):
        advanced, _ = advance(state, event, rules, now_s=NOW_S)

        assert isinstance(advanced, TurnState)
