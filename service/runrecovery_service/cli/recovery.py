"""`runrecovery recovery`: one command for each method of RecoveryService."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from itertools import chain
from time import sleep
from typing import Final, TypeAlias

import click
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2

from runrecovery_service.cli import parameters
from runrecovery_service.cli.connection import ServiceConnection, with_service
from runrecovery_service.cli.ctrl_c import exit_at_once
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.cli.failure import Failure
from runrecovery_service.cli.plain_text import safe
from runrecovery_service.cli.printing import Columns, aligned_pairs, table, time, usage_text, word

Status: TypeAlias = recovery_service_pb2.GetRecoveryStatusResponse
UnendedLaunch: TypeAlias = recovery_service_pb2.UnendedLaunch

_STATE: Final = "RECOVERY_STATE_"
_IN_RECOVERY: Final = frozenset(
    {recovery_pb2.SERVICE_STATE_RECOVERING, recovery_pb2.SERVICE_STATE_RECOVERY_FAILED}
)
_POLL_INTERVAL_S: Final = 0.2

RECOVERED_COLUMNS: Final[Columns[run_pb2.Run]] = (
    ("RUN ID", lambda run: run.run_id),
    ("STATUS", lambda run: word(run, "status")),
    ("RECOVERY", lambda run: word(run.recovery, "recovery_state")),
    ("DECIDED BY", lambda run: run.recovery.recovery_reason),
    ("BEFORE", lambda run: word(run.recovery, "status_before")),
    ("ERROR", lambda run: run.recovery.error_code or "-"),
    ("RECOVERED", lambda run: time(run.recovery.recovered_at)),
)

HISTORY_COLUMNS: Final[Columns[run_pb2.RecoveryInfo]] = (
    ("RECOVERED", lambda info: time(info.recovered_at)),
    ("RECOVERY", lambda info: word(info, "recovery_state")),
    ("DECIDED BY", lambda info: info.recovery_reason),
    ("BEFORE", lambda info: word(info, "status_before")),
    ("AFTER", lambda info: word(info, "status_after")),
    ("ERROR", lambda info: info.error_code or "-"),
    ("REPORT", lambda info: info.reconciliation_id),
)

REPORT_COLUMNS: Final[Columns[recovery_pb2.Reconciliation]] = (
    ("REPORT", lambda report: report.reconciliation_id),
    ("TRIGGER", lambda report: word(report, "trigger")),
    ("STATE", lambda report: word(report, "state")),
    ("INSTANCE", lambda report: report.instance),
    ("EPOCH", lambda report: str(report.epoch)),
    ("RUNS", lambda report: str(report.runs_scanned)),
    ("STARTED", lambda report: time(report.started_at)),
)


def _outcome(process: recovery_service_pb2.OrphanedProcess) -> str:
    if not process.ended:
        return "not found dead"
    return f"ended by {process.ended_by}" if process.ended_by else "ended"


PLAN_COLUMNS: Final[Columns[recovery_service_pb2.PlannedDecision]] = (
    ("RUN ID", lambda planned: planned.run_id),
    ("ENGINE", lambda planned: planned.engine),
    ("STATUS", lambda planned: word(planned, "status_before")),
    ("WOULD BE", lambda planned: word(planned, "status_after")),
    ("RECOVERY", lambda planned: word(planned, "recovery_state")),
    ("DECIDED BY", lambda planned: planned.recovery_reason),
    ("ERROR", lambda planned: planned.error_code or "-"),
    ("UNCHANGED", lambda planned: "yes" if planned.unchanged else "no"),
)

FACT_COLUMNS: Final[Columns[recovery_service_pb2.RecoveryFact]] = (
    ("FACT", lambda fact: fact.name),
    ("TRUE", lambda fact: "yes" if fact.held else "no"),
    ("SOURCE", lambda fact: fact.source),
)

PROCESS_COLUMNS: Final[Columns[recovery_service_pb2.OrphanedProcess]] = (
    ("PID", lambda process: str(process.pid)),
    ("ATTEMPT", lambda process: str(process.attempt)),
    ("TURN", lambda process: str(process.turn)),
    ("EVIDENCE", lambda process: process.evidence),
    ("SIGNALS", lambda process: " ".join(process.signals) or "-"),
    ("OUTCOME", _outcome),
)

_ONLY_STATES: Final = click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(parameters.choices(run_pb2.RecoveryState.keys(), _STATE)),
    help="Only this recovery state. Can be repeated.",
)


@click.group()
def recovery() -> None:
    """Show what restarts decided, and why."""


@recovery.command()
@with_service
@click.option("--watch", is_flag=True, help="Show progress until the recovery has ended.")
def status(service: ServiceConnection, *, watch: bool) -> ExitCode:
    """Show the state of the service and the progress of its recovery."""
    if not watch:
        service.show(service.client.recovery.status(), describe_status)
        return ExitCode.OK
    last = _watch(service)
    serving = last.state == recovery_pb2.SERVICE_STATE_SERVING
    return ExitCode.OK if serving else ExitCode.UNAVAILABLE


def _watch(service: ServiceConnection) -> Status:
    """Show every change until the recovery has ended; return the last response."""
    progress = _changes(service) if service.as_json or not sys.stdout.isatty() else _bar()
    with progress as show, _remember_ctrl_c() as raise_if_interrupted:
        while True:
            answer = service.client.recovery.status()
            raise_if_interrupted()
            show(answer)
            if answer.state not in _IN_RECOVERY:
                break
            sleep(_POLL_INTERVAL_S)
    if not service.as_json:
        click.echo(describe_status(answer))
    return answer


@contextmanager
def _remember_ctrl_c() -> Iterator[Callable[[], None]]:
    """Remember Ctrl-C, because a KeyboardInterrupt raised in a callback of gRPC is lost."""
    seen: list[int] = []

    def note(number: int, _frame: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    def raise_if_interrupted() -> None:
        if seen:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield raise_if_interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _changes(service: ServiceConnection) -> Iterator[Callable[[Status], None]]:
    """Yield a function that prints a line for each response that differs from the last one."""
    shown: set[bytes] = set()

    def show(answer: Status) -> None:
        seen = answer.SerializeToString(deterministic=True)
        if seen not in shown:
            shown.clear()
            shown.add(seen)
            service.show(answer, progress_line)

    yield show


@contextmanager
def _bar() -> Iterator[Callable[[Status], None]]:
    """Yield a function that updates a progress bar on the terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(answer: Status) -> None:
            report = answer.reconciliation
            bar.update(
                task,
                description=f"{word(answer, 'state')} {_phase(report)}",
                completed=report.runs_scanned,
                total=report.runs_total or None,
            )

        yield show


@recovery.command(name="list")
@with_service
@_ONLY_STATES
@click.option("--reason", metavar="RULE", help="Only runs decided by this rule.")
@click.option("--engine", metavar="NAME", help="Only runs of this engine.")
@parameters.only_labels
@click.option("--report", metavar="ID", help="Only runs whose latest decision is in this report.")
@click.option("--after", callback=parameters.time, metavar="TIME", help="Decided at or after TIME.")
@click.option("--before", callback=parameters.time, metavar="TIME", help="Decided before TIME.")
@parameters.limit_rows
def list_recovered(
    service: ServiceConnection,
    states: tuple[str, ...],
    reason: str | None,
    engine: str | None,
    labels: Mapping[str, str],
    report: str | None,
    after: datetime | None,
    before: datetime | None,
    limit: int,
) -> None:
    """List the runs that a restart decided about, newest decision first.

    TIME is ISO 8601; UTC if it has no offset.
    """
    rows = service.client.recovery.recovered(
        recovery_states=_states(states),
        recovery_reason=reason,
        engine=engine,
        labels=labels,
        view=run_pb2.RUN_VIEW_BASIC,
        reconciliation_id=report,
        recovered_after=after,
        recovered_before=before,
    )
    service.show_rows(rows, RECOVERED_COLUMNS, limit=limit)


def _states(words: Iterable[str]) -> list[run_pb2.RecoveryState.ValueType]:
    return [run_pb2.RecoveryState.Value(_STATE + state.upper()) for state in words]


@recovery.command()
@with_service
@click.option(
    "--after",
    "after_cursor",
    callback=parameters.require_not_empty,
    metavar="CURSOR",
    help="Resume after this cursor, as shown by --json. Default: from now on.",
)
@_ONLY_STATES
@click.option("--reason", metavar="RULE", help="Only decisions by this rule.")
@click.option("--engine", metavar="NAME", help="Only runs of this engine.")
@parameters.only_labels
def watch(
    service: ServiceConnection,
    after_cursor: str | None,
    states: tuple[str, ...],
    reason: str | None,
    engine: str | None,
    labels: Mapping[str, str],
) -> None:
    """Show decisions as restarts make them, until Ctrl-C."""
    # Fails at once if no service runs; a service that stops later is waited for.
    service.client.recovery.status()
    decisions = service.client.recovery.watch_recovered(
        recovery_states=_states(states),
        recovery_reason=reason,
        engine=engine,
        labels=labels,
        after_cursor=after_cursor or "",
        include_bookmarks=service.as_json,  # programs need the first cursor as well
    )
    with exit_at_once(), closing(decisions):
        for response in decisions:
            service.show(response, decision_line)


@recovery.command()
@with_service
@click.argument("run_id")
def explain(service: ServiceConnection, run_id: str) -> None:
    """Explain every decision about one run: rule, facts, and the processes that were killed."""
    service.show(service.client.recovery.explain(run_id), describe_explanations)


@recovery.command()
@with_service
@parameters.limit_rows
def plan(service: ServiceConnection, limit: int) -> None:
    """Show what a restart would decide now. Change nothing."""
    planned = service.client.recovery.plan()
    service.show(planned.totals, describe_totals)
    service.show_rows(planned.decisions, PLAN_COLUMNS, limit=limit)


@recovery.command()
@with_service
@click.argument("run_id")
def info(service: ServiceConnection, run_id: str) -> None:
    """Show every decision about one run, newest first."""
    service.show_rows(iter(service.client.recovery.info(run_id).history), HISTORY_COLUMNS)


@recovery.command()
@with_service
@parameters.limit_rows
def reports(service: ServiceConnection, limit: int) -> None:
    """List the reports of all restarts, newest first."""
    service.show_rows(service.client.recovery.reconciliations(), REPORT_COLUMNS, limit=limit)


@recovery.command()
@with_service
@click.argument("report", default="latest")
def show(service: ServiceConnection, report: str) -> None:
    """Show one report, given by its id; the latest by default."""
    if report != "latest":
        service.show(service.client.recovery.reconciliation(report), describe_report)
        return
    latest = next(service.client.recovery.reconciliations(page_size=1), None)
    if latest is None:
        raise Failure("there is no report yet", code=ExitCode.NOT_FOUND)
    service.show(latest, describe_report)


def describe_status(answer: Status) -> str:
    """Return the state of the service as readable text, with the report of this start."""
    own = aligned_pairs(
        ("service", word(answer, "state")),
        ("instance", f"{answer.instance}, epoch {answer.epoch}"),
        ("containment", _containment(answer.containment)),
        *(("still alive", _unended(launch)) for launch in answer.unended_launches),
        *((f"used by {one.engine}", _engine_usage(one)) for one in answer.engine_usage),
    )
    if not answer.HasField("reconciliation"):
        return own
    return f"{own}\n\n{describe_report(answer.reconciliation)}"


def progress_line(answer: Status) -> str:
    """Return the progress of the recovery in one line."""
    report = answer.reconciliation
    done = f"{report.runs_scanned} of {report.runs_total} runs"
    return " ".join(part for part in (word(answer, "state"), _phase(report), done) if part)


def decision_line(response: recovery_service_pb2.WatchRecoveredResponse) -> str:
    """Return a decision in one line."""
    decision, made = response.decision, response.decision.recovery
    change = f"{word(made, 'status_before')} → {word(made, 'status_after')}"
    cells = (decision.run_id, change, word(made, "recovery_state"), made.recovery_reason)
    return safe("  ".join((time(made.recovered_at), *cells, made.error_code)).rstrip())


def describe_explanations(answer: recovery_service_pb2.ExplainRecoveryResponse) -> str:
    """Return the decisions about one run as readable text, newest first."""
    explained = [_explanation(explanation) for explanation in answer.explanations]
    return "\n\n".join(explained) or "no restart has decided about this run"


def _explanation(explained: recovery_service_pb2.RecoveryExplanation) -> str:
    made = explained.decision
    parts = [
        aligned_pairs(
            ("decision", f"{word(made, 'recovery_state')}, {made.recovery_reason}"),
            ("because", explained.because),
            ("status", f"{word(made, 'status_before')} → {word(made, 'status_after')}"),
            ("error", made.error_code),
            ("profile", word(explained, "profile") if explained.profile else ""),
            ("decided", time(made.recovered_at)),
            ("by", f"{made.instance}, epoch {made.epoch}" if made.instance else ""),
            ("report", made.reconciliation_id),
        )
    ]
    if explained.facts:
        parts.append(table(explained.facts, FACT_COLUMNS))
    if explained.processes:
        parts.append(table(explained.processes, PROCESS_COLUMNS))
    return "\n\n".join(parts)


def describe_totals(plan: recovery_service_pb2.RecoveryPlan) -> str:
    """Return the totals of a plan as readable text."""
    summary = aligned_pairs(
        ("runs", f"{plan.runs_total}, {plan.runs_unchanged} unchanged"),
        ("quarantined", plan.quarantined),
        ("launches to end", plan.launches),
    )
    lines = (summary, *_decisions(plan.decisions), *_groups(plan.groups), "")
    return "\n".join(lines)


def describe_report(report: recovery_pb2.Reconciliation) -> str:
    """Return the report of one restart as readable text."""
    orphans, cleared = report.orphans, report.bindings
    processes = (
        f"{orphans.found} found, {orphans.ended} ended, {orphans.refused} refused;"
        f" launches without a living process: {orphans.already_gone}"
    )
    released = (
        f"{cleared.sessions} sessions, {cleared.pending_interactions} questions,"
        f" {cleared.slots} slots, {cleared.trust_entries} trust entries"
    )
    summary = aligned_pairs(
        ("report", report.reconciliation_id),
        ("trigger", word(report, "trigger")),
        ("state", word(report, "state") + (" (safe mode)" if report.safe_mode else "")),
        ("error", report.error),
        ("instance", f"{report.instance}, epoch {report.epoch}"),
        *([("took over", report.recovered_instance)] if report.recovered_instance else []),
        ("started", time(report.started_at)),
        ("finished", time(report.finished_at)),
        (
            "runs",
            f"{report.runs_scanned} of {report.runs_total}, {report.runs_unchanged} unchanged",
        ),
        ("quarantined", report.quarantined),
        ("orphans", processes),
        ("released", released),
        ("containment", _containment(report.containment)),
    )
    parts = (
        _decisions(report.decisions),
        _phases(report),
        _trust_removals(report),
        _warnings(report),
    )
    return "\n".join((summary, *chain.from_iterable(parts)))


def _containment(proved: recovery_pb2.Containment) -> str:
    return f"{word(proved, 'level')}: {proved.detail}" if proved.detail else ""


def _unended(launch: UnendedLaunch) -> str:
    return f"run {launch.run_id}, attempt {launch.attempt}, since {time(launch.launched_at)}"


def _engine_usage(one: recovery_service_pb2.EngineUsage) -> str:
    return f"{usage_text(one.usage)}, in {one.turns} turns"


def _decisions(decisions: Iterable[recovery_pb2.DecisionCount]) -> Iterator[str]:
    for made in decisions:
        yield f"  {made.count:>8} x {made.rule} → {word(made, 'recovery_state')}"


def _groups(groups: Iterable[recovery_service_pb2.PlannedGroup]) -> Iterator[str]:
    for group in groups:
        running_s = group.running_time.ToTimedelta().total_seconds()
        yield (
            f"{word(group, 'outcome').lower().replace('_', ' ')}: {group.runs} runs,"
            f" {group.tokens} tokens, {running_s:.0f} s of running turns"
        )


def _phases(report: recovery_pb2.Reconciliation) -> Iterator[str]:
    for phase in report.phases:
        yield f"  {phase.duration.ToTimedelta().total_seconds():>8.3f} s {phase.name}"


def _trust_removals(report: recovery_pb2.Reconciliation) -> Iterator[str]:
    for one in report.trust_removals:
        run = f" (run {one.run_id})" if one.run_id else ""
        yield safe(f"trust of {one.folder} in {one.file}: {one.outcome}{run}")


def _warnings(report: recovery_pb2.Reconciliation) -> Iterator[str]:
    for warning in report.warnings:
        yield f"warning: {safe(warning)}"


def _phase(report: recovery_pb2.Reconciliation) -> str:
    return report.phases[-1].name if report.phases else ""
