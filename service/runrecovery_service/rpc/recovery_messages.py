"""Decisions, explanations, plans and reports as messages of the contract."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2

from runrecovery_service.domain.explanation import RecordedDecision, explain_facts, explain_rule
from runrecovery_service.domain.instance import InstanceState
from runrecovery_service.domain.plan import PlannedDecision, RecoveryPlan
from runrecovery_service.domain.reconciliation import Containment, DecisionCount, Reconciliation
from runrecovery_service.domain.retention import PruneResult
from runrecovery_service.domain.run import RecoveryInfo
from runrecovery_service.domain.usage import Usage
from runrecovery_service.rpc.enums import (
    CONTAINMENT_LEVEL_TO_PROTO,
    PLANNED_OUTCOME_TO_PROTO,
    PROFILE_TO_PROTO,
    RECONCILIATION_STATE_TO_PROTO,
    RECOVERY_STATE_TO_PROTO,
    SERVICE_STATE_TO_PROTO,
    STATUS_TO_PROTO,
    TRIGGER_TO_PROTO,
)
from runrecovery_service.rpc.gate import ServiceState
from runrecovery_service.rpc.times import write_duration, write_time
from runrecovery_service.storage.decision_feed import FeedDecision
from runrecovery_service.storage.launch_records import UnendedLaunch
from runrecovery_service.storage.usage import EngineUsage
from runrecovery_service.webhooks.webhooks import WebhookStatus


def fill_recovery_info(to: run_pb2.RecoveryInfo, recovery: RecoveryInfo | None) -> None:
    """Fill a message with a decision; None gives state NONE."""
    if recovery is None:
        to.recovery_state = run_pb2.RECOVERY_STATE_NONE
        return
    to.recovery_state = RECOVERY_STATE_TO_PROTO[recovery.recovery_state]
    write_time(to.recovered_at, recovery.recovered_at)
    to.recovery_reason = recovery.recovery_reason
    to.status_before = STATUS_TO_PROTO[recovery.status_before]
    to.status_after = STATUS_TO_PROTO[recovery.status_after]
    if recovery.error_code:
        to.error_code = recovery.error_code
    to.reconciliation_id = recovery.reconciliation_id
    to.instance = recovery.instance
    to.epoch = recovery.epoch
    to.recovery_count = recovery.recovery_count
    to.processes_ended = recovery.processes_ended


def fill_usage(to: run_pb2.Usage, usage: Usage) -> None:
    """Fill a message with tokens and cost."""
    to.input_tokens = usage.input_tokens
    to.cached_input_tokens = usage.cached_input_tokens
    to.cache_write_input_tokens = usage.cache_write_input_tokens
    to.output_tokens = usage.output_tokens
    to.reasoning_output_tokens = usage.reasoning_output_tokens
    if usage.cost_usd is not None:
        to.cost_usd = usage.cost_usd
    to.model = usage.model
    to.SetInParent()


def fill_recovered_run(to: recovery_service_pb2.RecoveredRun, decided: FeedDecision) -> None:
    """Fill a message with a decision and its run."""
    to.run_id = decided.run_id
    to.engine = decided.engine
    to.labels.update(decided.labels)
    fill_recovery_info(to.recovery, decided.recovery)


def fill_explanation(to: recovery_service_pb2.RecoveryExplanation, seen: RecordedDecision) -> None:
    """Fill a message with a decision, its rule and facts, and the processes that were killed."""
    fill_recovery_info(to.decision, seen.info)
    to.because = explain_rule(seen.info.recovery_reason)
    to.profile = PROFILE_TO_PROTO[seen.profile]
    for fact in explain_facts(seen):
        to.facts.add(name=fact.name, held=fact.held, source=fact.source)
    for launch in seen.launches:
        for orphan in launch.orphans:
            to.processes.add(
                pid=orphan.pid,
                attempt=launch.attempt,
                turn=launch.turn,
                evidence=orphan.evidence,
                signals=orphan.signals,
                ended=orphan.ended,
                ended_by=orphan.ended_by,
            )


def fill_planned_decision(
    to: recovery_service_pb2.PlannedDecision, planned: PlannedDecision
) -> None:
    """Fill a message with the decision that a restart would make for one run."""
    verdict = planned.decision
    to.run_id = planned.run_id
    to.engine = planned.engine
    to.status_before = STATUS_TO_PROTO[planned.status]
    to.status_after = STATUS_TO_PROTO[verdict.becomes]
    to.recovery_reason = verdict.rule
    to.recovery_state = RECOVERY_STATE_TO_PROTO[verdict.state]
    to.error_code = verdict.error or ""
    to.unchanged = verdict.unchanged


def fill_plan(to: recovery_service_pb2.RecoveryPlan, plan: RecoveryPlan) -> None:
    """Fill a message with the totals of a plan."""
    _fill_decision_counts(to.decisions, plan.decisions)
    to.runs_total = plan.runs_total
    to.runs_unchanged = plan.runs_unchanged
    to.quarantined = plan.quarantined
    to.launches = plan.launches
    for outcome, work in plan.groups:
        group = to.groups.add(outcome=PLANNED_OUTCOME_TO_PROTO[outcome], runs=work.runs)
        group.tokens = work.tokens
        write_duration(group.running_time, work.running_us / 1e6)


def _fill_decision_counts(
    to: MutableSequence[recovery_pb2.DecisionCount], counts: Sequence[DecisionCount]
) -> None:
    to.extend(
        recovery_pb2.DecisionCount(
            rule=decided.rule,
            recovery_state=RECOVERY_STATE_TO_PROTO[decided.recovery_state],
            count=decided.count,
        )
        for decided in counts
    )


def fill_reconciliation(to: recovery_pb2.Reconciliation, report: Reconciliation) -> None:
    """Fill a message with a report."""
    to.reconciliation_id = report.reconciliation_id
    to.instance = report.instance
    to.epoch = report.epoch
    to.trigger = TRIGGER_TO_PROTO[report.cause]
    to.state = RECONCILIATION_STATE_TO_PROTO[report.state]
    write_time(to.started_at, report.started_at)
    if report.finished_at is not None:
        write_time(to.finished_at, report.finished_at)
    for phase in report.phases:
        write_duration(to.phases.add(name=phase.name).duration, phase.duration_s)
    _fill_decision_counts(to.decisions, report.decisions)
    to.quarantined = report.quarantined
    to.warnings.extend(report.warnings)
    to.runs_scanned = report.runs_scanned
    to.runs_total = report.runs_total
    to.runs_unchanged = report.runs_unchanged
    to.safe_mode = report.safe_mode
    to.error = report.error or ""
    if report.containment is not None:
        fill_containment(to.containment, report.containment)
    to.recovered_instance = report.recovered_instance or ""
    _fill_counts(to, report)
    to.trust_removals.extend(
        recovery_pb2.TrustRemoval(
            run_id=one.run_id, file=one.file, folder=one.folder, outcome=one.outcome
        )
        for one in report.trust_removals
    )


def fill_containment(to: recovery_pb2.Containment, proved: Containment) -> None:
    """Fill a message with the result of the containment probe."""
    to.level = CONTAINMENT_LEVEL_TO_PROTO[proved.level]
    to.detail = proved.detail


def _fill_counts(to: recovery_pb2.Reconciliation, report: Reconciliation) -> None:
    orphans, bindings = report.orphans, report.bindings
    to.orphans.SetInParent()
    to.orphans.found = orphans.found
    to.orphans.ended = orphans.ended
    to.orphans.already_gone = orphans.already_gone
    to.orphans.refused = orphans.refused
    to.bindings.SetInParent()
    to.bindings.sessions = bindings.sessions
    to.bindings.pending_interactions = bindings.pending_interactions
    to.bindings.slots = bindings.slots
    to.bindings.trust_entries = bindings.trust_entries


def fill_status(
    to: recovery_service_pb2.GetRecoveryStatusResponse,
    *,
    state: ServiceState,
    report: Reconciliation | None,
    containment: Containment | None,
    unended: Sequence[UnendedLaunch],
    used: Sequence[EngineUsage],
) -> None:
    """Fill a message with the state of the service.

    Args:
        report, containment: None: the field stays unset.
        unended: launches with processes that are still alive.
        used: the usage of each engine.
    """
    to.state = SERVICE_STATE_TO_PROTO[state]
    if report is not None:
        fill_reconciliation(to.reconciliation, report)
    if containment is not None:
        fill_containment(to.containment, containment)
    for launch in unended:
        left = to.unended_launches.add(run_id=launch.run_id, attempt=launch.attempt)
        write_time(left.launched_at, launch.launched_at)
    for one in used:
        fill_usage(to.engine_usage.add(engine=one.engine, turns=one.turns).usage, one.usage)


def fill_pruned(to: recovery_service_pb2.PruneResponse, pruned: PruneResult) -> None:
    """Fill a message with the counts of a removal or of a dry run."""
    for kind, count in pruned.counts.items():
        to.kinds.add(kind=kind.value, count=count, file_bytes=pruned.sizes.get(kind, 0))
    if pruned.oldest_kept is not None:
        write_time(to.oldest_kept_at, pruned.oldest_kept)
    to.done = pruned.done
    to.unknown_folders = pruned.unknown_folders


def fill_webhook(to: recovery_service_pb2.Webhook, status: WebhookStatus) -> None:
    """Fill a message with a webhook, its waiting deliveries, and the results of its tries."""
    state, backlog = status.state, status.backlog
    to.name, to.origin = status.endpoint.name, status.endpoint.origin
    to.disabled, to.last_failure = state.is_disabled, state.last_failure
    to.due, to.given_up = backlog.due, backlog.given_up
    to.delivered, to.failed = state.tries["delivered"], state.tries["failed"]
    if backlog.oldest_at is not None:
        write_time(to.oldest_due_at, backlog.oldest_at)
    if state.last_delivery_at is not None:
        write_time(to.last_delivered_at, state.last_delivery_at)
    if state.failing_since is not None:
        write_time(to.failing_since, state.failing_since)


def fill_instance(to: recovery_service_pb2.Instance, state: InstanceState) -> None:
    """Fill a message with an instance, its lease, its runs and its slots."""
    to.name, to.epoch, to.alive = state.name, state.epoch, state.is_alive
    to.host_id, to.version = state.host_id, state.version
    to.engines.extend(state.engines)
    to.max_running, to.slots_held = state.max_running, state.slots_held
    for status, runs in state.runs.items():
        to.runs.add(status=STATUS_TO_PROTO[status], runs=runs)
    to.taken_over_by = state.taken_over_by or ""
    write_time(to.started_at, state.started_at)
    for field, at in (
        (to.lease_until, state.lease_until),
        (to.stopped_at, state.stopped_at),
        (to.taken_over_at, state.taken_over_at),
        (to.takeover_done_at, state.takeover_done_at),
        (to.host_return_until, state.host_return_until),
    ):
        if at is not None:
            write_time(field, at)
