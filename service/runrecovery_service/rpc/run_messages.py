"""Runs, questions and events as messages of the contract.

GetRun spends most of its own time here, so messages are filled in place and fields that have their
default are left unset. A session's handle is never read, so it cannot leave the service.
"""

from __future__ import annotations

from runrecovery.v1 import run_pb2

from runrecovery_service.domain.run import Interaction, Option, Run, RunEvent, ToolCall
from runrecovery_service.rpc.enums import (
    EVENT_KIND_TO_PROTO,
    INTERACTION_KIND_TO_PROTO,
    PROFILE_TO_PROTO,
    RESTART_POLICY_TO_PROTO,
    STATUS_TO_PROTO,
)
from runrecovery_service.rpc.json_values import write_struct, write_value
from runrecovery_service.rpc.recovery_messages import fill_recovery_info, fill_usage
from runrecovery_service.rpc.times import write_duration, write_time


def fill_run(to: run_pb2.Run, run: Run) -> None:
    """Fill a message with a run."""
    to.run_id = run.run_id
    to.engine = run.engine
    to.status = STATUS_TO_PROTO[run.status]
    _fill_profile(to.interactive_profile, run)
    to.restart_policy = RESTART_POLICY_TO_PROTO[run.restart_policy]
    if run.input:
        write_struct(to.input, run.input)
    elif run.input is not None:
        to.input.SetInParent()
    if run.interaction_count:
        to.interaction_count = run.interaction_count
    if run.attempt:
        to.attempt = run.attempt
    to.holds_slot = run.holds_slot
    to.cancel_requested = run.cancel_requested
    to.etag = run.etag
    write_time(to.created_at, run.created_at)
    write_time(to.updated_at, run.updated_at)
    if run.started_at is not None:
        write_time(to.started_at, run.started_at)
    if run.ended_at is not None:
        write_time(to.ended_at, run.ended_at)
    if run.labels:
        to.labels.update(run.labels)
    fill_recovery_info(to.recovery, run.recovery)
    if run.created_by:
        to.created_by = run.created_by
    if run.canceled_by:
        to.canceled_by = run.canceled_by
    _fill_optional_fields(to, run)


def _fill_profile(to: run_pb2.InteractiveProfile, run: Run) -> None:
    to.kind = PROFILE_TO_PROTO[run.profile]
    to.require_user_reply = run.require_user_reply
    if run.session_timeout_s is not None:
        write_duration(to.session_timeout, run.session_timeout_s)


def _fill_optional_fields(to: run_pb2.Run, run: Run) -> None:
    if run.output is not None:
        to.output.SetInParent()
        write_struct(to.output, run.output)
    if run.error is not None:
        to.error.code = run.error.code
        to.error.message = run.error.message
    if run.pending is not None:
        _fill_pending(to.pending_interaction, run.pending)
    if run.session is not None:
        to.session.type = run.session.type
        to.session.has_handle = True
        to.session.turn = run.session.turn
    if run.auto_decided_count:
        to.auto_decided_count = run.auto_decided_count
    if run.run_deadline_at is not None:
        write_time(to.run_deadline_at, run.run_deadline_at)
    if run.reopenable_until is not None:
        write_time(to.reopenable_until, run.reopenable_until)
    if run.resume_count:
        to.resume_count = run.resume_count
    if run.resume_at is not None:
        write_time(to.resume_at, run.resume_at)
    _fill_usage_and_budget(to, run)


def _fill_usage_and_budget(to: run_pb2.Run, run: Run) -> None:
    if run.usage is not None:
        fill_usage(to.usage, run.usage)
    if run.budget.max_tokens is not None:
        to.max_tokens = run.budget.max_tokens
    if run.budget.max_cost_usd is not None:
        to.max_cost_usd = run.budget.max_cost_usd


def _fill_pending(to: run_pb2.PendingInteraction, question: Interaction) -> None:
    _fill_question(to, question)
    if question.wait_deadline_at is not None:
        write_time(to.wait_deadline_at, question.wait_deadline_at)


def _fill_question(
    to: run_pb2.PendingInteraction | run_pb2.Interaction, question: Interaction
) -> None:
    to.interaction_id = question.interaction_id
    to.kind = INTERACTION_KIND_TO_PROTO[question.kind]
    to.prompt = question.prompt
    for option in question.options:
        _fill_option(to.options.add(), option)
    if question.tool_call is not None:
        _fill_tool_call(to.tool_call, question.tool_call)
    write_time(to.asked_at, question.asked_at)


def _fill_option(to: run_pb2.InteractionOption, option: Option) -> None:
    to.label = option.label
    write_value(to.value, option.value)


def _fill_tool_call(to: run_pb2.ToolCall, call: ToolCall) -> None:
    to.call_id = call.id
    to.tool = call.tool
    to.input.SetInParent()
    write_struct(to.input, call.input)
    to.workspace = call.workspace
    to.pattern = call.pattern


def fill_interaction(to: run_pb2.Interaction, question: Interaction) -> None:
    """Fill a message with a question and its answer."""
    _fill_question(to, question)
    if question.replied_at is not None:
        write_time(to.replied_at, question.replied_at)
        write_value(to.response, question.response)
        to.auto_decided = question.auto_decided
        to.replied_by = question.replied_by or ""


def fill_event(to: run_pb2.RunEvent, event: RunEvent) -> None:
    """Fill a message with an event, without the run."""
    to.kind = EVENT_KIND_TO_PROTO[event.kind]
    write_time(to.happened_at, event.happened_at)
    to.status = STATUS_TO_PROTO[event.status]
    to.attempt = event.attempt
    to.interaction_id = event.interaction_id
    to.error_code = event.error_code or ""
    to.caller = event.caller or ""
    if event.recovery is not None:
        fill_recovery_info(to.recovery, event.recovery)
    if event.message:
        to.message = event.message
    if event.usage is not None:
        fill_usage(to.usage, event.usage)
