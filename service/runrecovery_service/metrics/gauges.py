"""Metrics that are read at each scrape: present values, and counters that other objects keep."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Final

from runrecovery_service.domain.reconciliation import Reconciliation
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE
from runrecovery_service.domain.run import TERMINAL, RunStatus
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metrics.snapshot import Family, Kind, Labels
from runrecovery_service.rpc.gate import ServiceState
from runrecovery_service.storage.run_counts import RunCount
from runrecovery_service.storage.usage import EngineUsage

if TYPE_CHECKING:  # not imported where there is no webhook
    from runrecovery_service.storage.webhook_deliveries import Backlog

Numbers = dict[Labels, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """The service at one moment.

    Attributes:
        state: the state of the service as a whole.
        is_healthy: whether the health check says SERVING.
        is_disk_low: whether a disk has less room than `min_free_bytes`.
        engines: the configured engines.
        engines_in_use: turns under way, by engine.
        lease_left_s: seconds until the lease ends unless it is renewed.
        open_streams: the number of open streams, by method.
        webhooks_failing_since: the first failed try of each webhook since its latest delivery;
            None: its latest try has succeeded.
        report: the report of the recovery of this start; None until it is committed.
        removed: the number of removals by retention, by kind.
        runs, usage, backlogs: as in `collector.Counts`; None: the store has not answered yet.
        counted_at: the time of the latest answer of the store.
    """

    version: str
    instance: str
    epoch: int
    now: datetime
    state: ServiceState
    is_healthy: bool
    is_disk_low: bool
    engines: tuple[str, ...]
    engines_in_use: Mapping[str, int]
    slots: int
    lease_left_s: float
    open_streams: Mapping[str, int]
    webhooks_failing_since: Mapping[str, datetime | None]
    report: Reconciliation | None
    removed: Mapping[str, int]
    runs: list[RunCount] | None
    usage: list[EngineUsage]
    backlogs: Mapping[str, Backlog] | None
    counted_at: datetime | None


@dataclass(frozen=True, slots=True)
class Gauge:
    """One metric, and the function that reads its numbers. An unknown number is left out."""

    name: str
    help: str
    labels: Labels
    read: Callable[[Present], Numbers]
    kind: Kind = Kind.GAUGE


def families_of(present: Present) -> Iterator[Family]:
    """Yield every metric of `GAUGES`."""
    for gauge in GAUGES:
        yield Family(
            kind=gauge.kind,
            name=gauge.name,
            help=gauge.help,
            labels=gauge.labels,
            numbers={labels: (number,) for labels, number in gauge.read(present).items()},
        )


def _one(number: float | None) -> Numbers:
    return {} if number is None else {(): number}


def _age(present: Present, since: datetime) -> float:
    # The wall clock may be set back.
    return max(0.0, (present.now - since).total_seconds())


def _info(present: Present) -> Numbers:
    return {(present.version, present.instance): 1.0}


def _state(present: Present) -> Numbers:
    return {(state.value,): float(state is present.state) for state in ServiceState}


def _runs(present: Present) -> Numbers:
    """Return a number for each unfinished status of each engine, so that no series disappears."""
    if present.runs is None:
        return {}
    statuses = [status.value for status in RunStatus if status not in TERMINAL]
    zeros: Numbers = {(engine, status): 0.0 for engine in present.engines for status in statuses}
    return zeros | {(one.engine, one.status.value): float(one.runs) for one in present.runs}


def _oldest(status: RunStatus) -> Callable[[Present], Numbers]:
    def read(present: Present) -> Numbers:
        if present.runs is None:
            return {}
        ages: Numbers = {
            (one.engine,): _age(present, one.oldest_since)
            for one in present.runs
            if one.status is status and one.oldest_since is not None
        }
        zeros: Numbers = {(engine,): 0.0 for engine in present.engines}
        return zeros | ages

    return read


def _used(present: Present, read: Callable[[EngineUsage], float | None]) -> Numbers:
    """Return the number of each engine and model; leave out those whose number is not known."""
    numbers = {(one.engine, one.usage.model): read(one) for one in present.usage}
    return {labels: number for labels, number in numbers.items() if number is not None}


def _tokens(**kinds: str) -> Callable[[Present], Numbers]:
    """Return numbers of tokens. Each kind is a field of `Usage`."""

    def read(present: Present) -> Numbers:
        return {
            (one.engine, one.usage.model, kind): float(getattr(one.usage, field))
            for one in present.usage
            for kind, field in kinds.items()
        }

    return read


def _age_of_runs(present: Present) -> Numbers:
    if present.counted_at is None:
        return {}
    return _one(_age(present, present.counted_at))


def _slots_used(present: Present) -> Numbers:
    in_use = Count(present.engines_in_use)
    return {(engine,): float(in_use[engine]) for engine in {*present.engines, *in_use}}


def _open_streams(present: Present) -> Numbers:
    return {(method,): float(count) for method, count in present.open_streams.items()}


def _webhooks_failing(present: Present) -> Numbers:
    return {
        (name,): 0.0 if since is None else _age(present, since)
        for name, since in present.webhooks_failing_since.items()
    }


def _webhooks(read: Callable[[Present, Backlog], float]) -> Callable[[Present], Numbers]:
    """Return a number for each webhook, 0 for one without waiting deliveries."""

    def read_all(present: Present) -> Numbers:
        if present.backlogs is None:
            return {}
        lacking: Numbers = {
            (name,): read(present, backlog)
            for name, backlog in present.backlogs.items()
            if name in present.webhooks_failing_since
        }
        return {(name,): 0.0 for name in present.webhooks_failing_since} | lacking

    return read_all


def _age_of_backlog(present: Present, backlog: Backlog) -> float:
    return 0.0 if backlog.oldest_at is None else _age(present, backlog.oldest_at)


def _of_report(read: Callable[[Reconciliation], Numbers]) -> Callable[[Present], Numbers]:
    return lambda present: {} if present.report is None else read(present.report)


def _duration(report: Reconciliation) -> Numbers:
    if report.finished_at is None:
        return {}
    return _one((report.finished_at - report.started_at).total_seconds())


def _decisions(report: Reconciliation) -> Numbers:
    zeros: Numbers = {(rule,): 0.0 for rule in (*(rule.name for rule in MATRIX), QUARANTINE_RULE)}
    return zeros | {(made.rule,): float(made.count) for made in report.decisions}


def _orphans(report: Reconciliation) -> Numbers:
    orphans = report.orphans
    return {
        ("ended",): float(orphans.ended),
        ("already_gone",): float(orphans.already_gone),
        ("refused",): float(orphans.refused),
    }


GAUGES: Final = (
    Gauge(
        "runrecovery_info",
        "1. The labels name the version and the instance.",
        ("version", "instance_name"),
        _info,
    ),
    Gauge("runrecovery_epoch", "Epoch of this start.", (), lambda it: _one(it.epoch)),
    Gauge("runrecovery_state", "1 for the state of the service.", ("state",), _state),
    Gauge(
        "runrecovery_healthy",
        "1 while health says SERVING.",
        (),
        lambda it: _one(float(it.is_healthy)),
    ),
    Gauge(
        "runrecovery_disk_low",
        "1 while a disk has less room than the floor.",
        (),
        lambda it: _one(float(it.is_disk_low)),
    ),
    Gauge("runrecovery_runs", "Unfinished runs.", ("engine", "status"), _runs),
    Gauge(
        "runrecovery_queue_oldest_seconds",
        "How long the oldest entry of the queue has been waiting.",
        ("engine",),
        _oldest(RunStatus.QUEUED),
    ),
    Gauge(
        "runrecovery_wait_oldest_seconds",
        "How long the oldest open question has been waiting for its answer.",
        ("engine",),
        _oldest(RunStatus.WAITING_USER),
    ),
    Gauge(
        "runrecovery_runs_age_seconds",
        "Seconds since the store was last asked successfully how many runs there are.",
        (),
        _age_of_runs,
    ),
    Gauge("runrecovery_slots", "Processes at one time.", (), lambda it: _one(it.slots)),
    Gauge("runrecovery_slots_used", "Turns under way.", ("engine",), _slots_used),
    Gauge(
        "runrecovery_lease_left_seconds",
        "Time until the lease of the instance ends unless it is renewed.",
        (),
        lambda it: _one(it.lease_left_s),
    ),
    Gauge(
        "runrecovery_webhook_failing_seconds",
        "How long the tries of a webhook have failed without a delivery.",
        ("webhook",),
        _webhooks_failing,
    ),
    Gauge(
        "runrecovery_webhook_due",
        "Deliveries that are still to be made to a webhook.",
        ("webhook",),
        _webhooks(lambda _, backlog: float(backlog.due)),
    ),
    Gauge(
        "runrecovery_webhook_oldest_seconds",
        "How old the oldest event of the deliveries is that are still to be made.",
        ("webhook",),
        _webhooks(_age_of_backlog),
    ),
    Gauge("runrecovery_streams_open", "Open streams.", ("method",), _open_streams),
    Gauge(
        "runrecovery_recovery_duration_seconds",
        "Duration of the recovery of this start.",
        (),
        _of_report(_duration),
    ),
    Gauge(
        "runrecovery_recovery_phase_seconds",
        "Duration of each phase of the recovery of this start.",
        ("phase",),
        _of_report(lambda it: {(phase.name,): phase.duration_s for phase in it.phases}),
    ),
    Gauge(
        "runrecovery_recovery_decisions",
        "Runs that the recovery of this start decided, by rule.",
        ("rule",),
        _of_report(_decisions),
    ),
    Gauge(
        "runrecovery_recovery_orphans",
        "Processes and launches of earlier epochs, by outcome.",
        ("outcome",),
        _of_report(_orphans),
    ),
    Gauge(
        "runrecovery_recovery_quarantined",
        "Runs that the recovery of this start quarantined.",
        (),
        _of_report(lambda it: _one(it.quarantined)),
    ),
    Gauge(
        "runrecovery_recovery_warnings",
        "Warnings in the report of this start.",
        (),
        _of_report(lambda it: _one(len(it.warnings))),
    ),
    Gauge(
        "runrecovery_safe_mode",
        "1 when this start launches nothing.",
        (),
        _of_report(lambda it: _one(float(it.safe_mode))),
    ),
    Gauge(
        "runrecovery_usage_turns_total",
        "Turns whose agents have reported their usage.",
        ("engine", "model"),
        lambda it: _used(it, lambda one: one.turns),
        Kind.COUNTER,
    ),
    Gauge(
        "runrecovery_usage_tokens_total",
        "Tokens that models have read and written.",
        ("engine", "model", "kind"),
        _tokens(input="input_tokens", output="output_tokens"),
        Kind.COUNTER,
    ),
    Gauge(
        "runrecovery_usage_part_tokens_total",
        "Tokens that were read from a prompt cache, written to one, or were reasoning.",
        ("engine", "model", "part"),
        _tokens(
            cached_input="cached_input_tokens",
            cache_write_input="cache_write_input_tokens",
            reasoning_output="reasoning_output_tokens",
        ),
        Kind.COUNTER,
    ),
    Gauge(
        "runrecovery_usage_cost_usd_total",
        "Cost in US dollars, as agents reported it.",
        ("engine", "model"),
        lambda it: _used(it, lambda one: one.usage.cost_usd),
        Kind.COUNTER,
    ),
    Gauge(
        "runrecovery_retention_removed_total",
        "Removals by retention: runs, parts of runs, reports, receipts.",
        ("kind",),
        lambda it: {(kind,): float(count) for kind, count in it.removed.items()},
        Kind.COUNTER,
    ),
)
