"""Services whose steps are in a wrong order, which the campaign must detect.

Each mutant is applied in a forked service, before its crash points are added. Without kills it
works like the service.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from crash_points.kills import Kill


@dataclass(frozen=True, slots=True)
class CrashMutant:
    """A change of the service, the kills that show it, and the kinds of violation that it causes.

    One of the kinds must be found.
    """

    apply: Callable[[], None]
    kills: tuple[Kill, Kill]
    kinds: frozenset[str]


def _replace(owner: object, name: str, broken: Callable[..., Any]) -> None:
    """Replace an attribute, which must exist."""
    getattr(owner, name)
    setattr(owner, name, broken)


def complete_the_report_first() -> None:
    """Commit the complete report before the decisions, which then leave the report as it is."""
    from runrecovery_service.recovery.reconcile import Recovery
    from runrecovery_service.recovery.report import ReportBuilder

    decide, complete, write = Recovery._decide_runs, ReportBuilder.complete, ReportBuilder.write
    to_decide: list[Callable[[], None]] = []

    def decide_later(self: Any, db: Any, report: Any, scope: Any) -> None:
        to_decide.append(lambda: decide(self, db, report, scope))

    def complete_and_decide(self: Any, db: Any) -> Any:
        completed = complete(self, db)
        _replace(ReportBuilder, "write", lambda *_: None)
        to_decide.pop()()
        _replace(ReportBuilder, "write", write)
        return completed

    _replace(Recovery, "_decide_runs", decide_later)
    _replace(ReportBuilder, "complete", complete_and_decide)


def close_launches_first() -> None:
    """Close the launch records of a recovery before the processes of the launches are killed."""
    from runrecovery_service.agents.end_launches import LaunchEnder
    from runrecovery_service.process.ending_result import Ending
    from runrecovery_service.storage import launch_records

    end, close_all = LaunchEnder.end, launch_records.close_all
    to_end: list[Callable[[], object]] = []

    def end_later(self: Any, launches: Sequence[Any]) -> Mapping[int, Any]:
        to_end.append(lambda: end(self, launches))
        return {launch.key: Ending(gone=True) for launch in launches}

    def close_and_end(*args: Any, **named: Any) -> None:
        close_all(*args, **named)
        to_end.pop()()

    _replace(LaunchEnder, "end", end_later)
    _replace(launch_records, "close_all", close_and_end)


def commit_decisions_first() -> None:
    """Commit the decisions of a batch before the runs that they change."""
    from runrecovery_service.storage import recovery_apply

    record = recovery_apply._record_decisions

    def record_and_commit(db: Any, *args: Any) -> None:
        record(db, *args)
        db.peewee.commit()
        db.peewee.begin("IMMEDIATE")

    _replace(recovery_apply, "_record_decisions", record_and_commit)


def record_launches_late() -> None:
    """Record a launch only once its agent runs; a recovery knows no launch before that."""
    from runrecovery_service.execution.launcher import Launch
    from runrecovery_service.execution.turn_records import TurnRecords
    from runrecovery_service.storage import launch_records

    start, unclosed = Launch._start, launch_records.unclosed_launches
    record_shim, record_start = TurnRecords.record_shim, TurnRecords.record_start

    async def record_nothing(*_: Any, **__: Any) -> None:
        pass

    async def start_and_record(self: Any, *args: Any) -> None:
        await start(self, *args)
        shim = self._process
        await record_shim(self.records, pid=shim.pid, start_ticks=shim.start_ticks)
        await record_start(self.records)

    def find_recorded(*args: Any, **named: Any) -> list[Any]:
        return [launch for launch in unclosed(*args, **named) if launch.pid is not None]

    _replace(TurnRecords, "record_shim", record_nothing)
    _replace(TurnRecords, "record_start", record_nothing)
    _replace(Launch, "_start", start_and_record)
    _replace(launch_records, "unclosed_launches", find_recorded)


_WHILE_AGENTS_LIVE: Final = Kill(("serving: commit of turns.record_session",), 2, with_shims=True)
MUTANTS: Final[Mapping[str, CrashMutant]] = {
    "report-first": CrashMutant(
        complete_the_report_first,
        (_WHILE_AGENTS_LIVE, Kill(("start: commit of reports.write_report",), 2)),
        frozenset({"early report"}),
    ),
    "close-first": CrashMutant(
        close_launches_first,
        (_WHILE_AGENTS_LIVE, Kill(("start: commit of launch_records.close_all",))),
        frozenset({"orphan"}),
    ),
    "decisions-first": CrashMutant(
        commit_decisions_first,
        (_WHILE_AGENTS_LIVE, Kill(("start: commit of recovery_apply.apply_batch",))),
        frozenset({"history", "torn"}),
    ),
    "record-late": CrashMutant(
        record_launches_late,
        (
            Kill(("serving: after release of a gate",), 2, with_shims=True),
            Kill(("start: commit of recovery_apply.apply_batch",)),
        ),
        frozenset({"orphan", "torn"}),
    ),
}
