"""One run as its page shows it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from runrecovery.v1 import recovery_service_pb2, run_pb2

from runrecovery_service.console.moments import Moment, duration_text, moment, to_datetime
from runrecovery_service.console.questions import ToolCallView, json_text, tool_call_view
from runrecovery_service.console.words import (
    KINDS,
    POLICIES,
    PROFILES,
    Word,
    count,
    recovery_word,
    status_word,
)
from runrecovery_service.lazy_dataclass import dataclass

MAX_DECISIONS: Final = 20
"""The page of a run shows at most this many decisions, the latest ones."""
_ENDED = {run_pb2.RUN_STATUS_SUCCEEDED, run_pb2.RUN_STATUS_FAILED, run_pb2.RUN_STATUS_CANCELED}


@dataclass(frozen=True, slots=True)
class Detail:
    """A name and its value, a text or a time."""

    name: str
    text: str = ""
    at: Moment | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run.

    Attributes:
        output, input: indented JSON; empty if there is none.
        can_cancel: whether the run has not ended, and no cancel was accepted.
        can_reopen: whether a recovery failed the run because its session was lost, and the time to
            reopen it has not passed.
    """

    run_id: str
    engine: str
    etag: str
    status: Word
    labels: tuple[tuple[str, str], ...]
    error_code: str
    error_message: str
    output: str
    input: str
    details: tuple[Detail, ...]
    is_ended: bool
    is_quarantined: bool
    cancel_requested: bool
    can_cancel: bool
    can_reopen: bool
    attempt: int


def run_view(run: run_pb2.Run, now: datetime) -> RunView:
    """Return the fields of a run as its page shows them."""
    is_quarantined = run.status == run_pb2.RUN_STATUS_UNSPECIFIED
    is_ended = run.status in _ENDED
    reopenable_until = to_datetime(run.reopenable_until)
    return RunView(
        run_id=run.run_id,
        engine=run.engine,
        etag=run.etag,
        status=status_word(run.status),
        labels=tuple(sorted(run.labels.items())),
        error_code=run.error.code,
        error_message=run.error.message,
        output=json_text(run.output) if run.HasField("output") else "",
        input=json_text(run.input) if run.input.fields else "",
        details=tuple(_details(run)),
        is_ended=is_ended,
        is_quarantined=is_quarantined,
        cancel_requested=run.cancel_requested and not is_ended,
        can_cancel=not is_ended and not is_quarantined and not run.cancel_requested,
        can_reopen=is_ended and reopenable_until is not None and reopenable_until > now,
        attempt=run.attempt,
    )


def _details(run: run_pb2.Run) -> list[Detail]:
    pairs = [
        Detail("Engine", run.engine),
        Detail("Created", at=moment(run.created_at)),
        Detail("Created by", run.created_by),
        Detail("First launched", at=moment(run.started_at)),
        Detail("Last change", at=moment(run.updated_at)),
        Detail("Ended", at=moment(run.ended_at)),
        Detail("Canceled by", run.canceled_by),
        Detail("Attempt", str(run.attempt) if run.attempt else ""),
        Detail("Waits as", PROFILES.get(run.interactive_profile.kind, "not recorded")),
        Detail("Restart policy", POLICIES.get(run.restart_policy, "")),
        Detail("Resumed", count(run.resume_count, "time") if run.resume_count else ""),
        Detail("Resumes at", at=moment(run.resume_at)),
        Detail("Must end by", at=moment(run.run_deadline_at)),
        Detail("Can be reopened until", at=moment(run.reopenable_until)),
        Detail("Tokens", _tokens(run)),
        Detail("Cost", _cost(run)),
        Detail("Model", run.usage.model),
    ]
    return [pair for pair in pairs if pair.text or pair.at is not None]


def _tokens(run: run_pb2.Run) -> str:
    if not run.HasField("usage"):
        return f"limit {run.max_tokens:,}" if run.HasField("max_tokens") else ""
    usage = run.usage
    used = f"{usage.input_tokens:,} in, {usage.output_tokens:,} out"
    return f"{used}, limit {run.max_tokens:,}" if run.HasField("max_tokens") else used


def _cost(run: run_pb2.Run) -> str:
    parts = []
    if run.usage.HasField("cost_usd"):
        parts.append(f"${run.usage.cost_usd:,.4f}")
    if run.HasField("max_cost_usd"):
        parts.append(f"limit ${run.max_cost_usd:,.2f}")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredQuestion:
    """A question of a run and its answer. `waited`: how long the answer took; empty without one."""

    interaction_id: int
    kind: str
    prompt: str
    tool_call: ToolCallView | None
    asked_at: Moment | None
    answer: str
    has_answer: bool
    auto_decided: bool
    replied_by: str
    replied_at: Moment | None
    waited: str


def answered_questions(
    questions: Sequence[run_pb2.Interaction], open_id: int
) -> tuple[AnsweredQuestion, ...]:
    """Return the closed questions of a run, newest first.

    Args:
        open_id: the number of the open question; 0: none is open.
    """
    return tuple(
        _answered(question)
        for question in reversed(questions)
        if question.interaction_id != open_id
    )


def _answered(question: run_pb2.Interaction) -> AnsweredQuestion:
    has_answer = question.HasField("replied_at")
    asked, replied = to_datetime(question.asked_at), to_datetime(question.replied_at)
    call = question.tool_call if question.HasField("tool_call") else None
    return AnsweredQuestion(
        interaction_id=question.interaction_id,
        kind=KINDS.get(question.kind, "Question") if call is None else "Permission",
        prompt=question.prompt,
        tool_call=None if call is None else tool_call_view(call),
        asked_at=moment(question.asked_at),
        answer=json_text(question.response) if has_answer else "",
        has_answer=has_answer,
        auto_decided=question.auto_decided,
        replied_by=question.replied_by,
        replied_at=moment(question.replied_at),
        waited=duration_text(replied - asked) if asked and replied else "",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionView:
    """A decision of a restart about a run, and why."""

    rule: str
    because: str
    outcome: Word
    status_before: Word
    status_after: Word
    at: Moment | None
    error_code: str
    reconciliation_id: str
    instance: str
    epoch: int
    facts: tuple[FactView, ...]
    processes: tuple[ProcessView, ...]


@dataclass(frozen=True, slots=True)
class FactView:
    """A fact that the rules examined."""

    name: str
    held: bool
    source: str


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process that outlived its service, and the signals that it got."""

    pid: int
    launch: str
    evidence: str
    done: str
    is_ended: bool


def decision_views(
    explanations: Sequence[recovery_service_pb2.RecoveryExplanation],
) -> tuple[DecisionView, ...]:
    """Return the latest decisions about a run, newest first, `MAX_DECISIONS` at most."""
    return tuple(_decision(each) for each in explanations[:MAX_DECISIONS])


def _decision(explained: recovery_service_pb2.RecoveryExplanation) -> DecisionView:
    made = explained.decision
    return DecisionView(
        rule=made.recovery_reason,
        because=explained.because,
        outcome=recovery_word(made.recovery_state),
        status_before=status_word(made.status_before),
        status_after=status_word(made.status_after),
        at=moment(made.recovered_at),
        error_code=made.error_code,
        reconciliation_id=made.reconciliation_id,
        instance=made.instance,
        epoch=made.epoch,
        facts=tuple(FactView(fact.name, fact.held, fact.source) for fact in explained.facts),
        processes=tuple(_process(process) for process in explained.processes),
    )


def _process(process: recovery_service_pb2.OrphanedProcess) -> ProcessView:
    done = " and ".join(process.signals) or "no signal"
    by = f", by the {process.ended_by}" if process.ended_by else ""
    return ProcessView(
        pid=process.pid,
        launch=f"attempt {process.attempt}, turn {process.turn}",
        evidence=process.evidence,
        done=f"{'ended' if process.ended else 'still alive'} after {done}{by}",
        is_ended=process.ended,
    )
