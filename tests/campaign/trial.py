"""One trial: grow trees, kill the service, start it again, judge."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from campaign import scan
from campaign.home import CampaignHome, RecordedMarkers, Shims
from campaign.look_alikes import LookAlikes, Neighbour, unkillable_family
from campaign.plans import MOST_PAUSE_S, Kind, Plan, RunPlan, Way
from campaign.scan import ScanThread
from runrecovery.v1 import run_pb2
from support.api import ENDED, Api, status_word
from support.service import ServiceProcess
from support.waiting import until

SCANS: Final = 3
"""Scans for survivors once the service is SERVING: one scan is not atomic."""
LATE_S: Final = 15.0
"""Within which the straggler sweep, every 2 s, closes a launch whose last process is gone."""


class Fault(StrEnum):
    """A fault that a trial can find."""

    SURVIVOR = "survivor"
    """A process of a tree, or a shim, is alive."""
    INNOCENT = "innocent"
    """An innocent process is dead or stopped."""
    RUN = "run"
    """A run has a state that no rule gives, or no reason."""
    LAUNCH = "launch record"
    """A launch record is closed too early, or stays open."""
    BROKEN = "broken"
    """The trial itself broke down."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """The result of a trial. `grown` counts the processes of trees that were seen alive."""

    plan: Plan
    grown: int = 0
    survivors: int = 0
    innocents: int = 0
    last_death_s: float | None = None
    seconds: float = 0.0
    faults: list[tuple[Fault, str]] = field(default_factory=list)

    def __str__(self) -> str:
        died = "-" if self.last_death_s is None else f"{self.last_death_s:.3f} s"
        return (
            f"seed={self.plan.seed} {self.plan.kind}: {self.plan.way}{', early' * self.plan.early};"
            f" runs={len(self.plan.runs)} grown={self.grown} survivors={self.survivors}"
            f" innocents={self.innocents} last death={died} took={self.seconds:.2f} s"
        )


@dataclass(slots=True, eq=False)
class TrialHome:
    """A home and its service, which trials of one kind use one after another."""

    home: CampaignHome
    service: ServiceProcess | None = None
    api: Api | None = None

    def start(self) -> Api:
        """Start the service unless it runs; return a channel to it."""
        if self.api is None:
            self.service, self.api = self.home.start()
        return self.api

    def kill_service(self, shims: Shims, way: Way, pause_s: float) -> None:
        """Kill the service, and its shims, in that way."""
        assert self.service is not None
        match way:
            case Way.SHIMS_STOPPED:
                shims.signal(signal.SIGSTOP)
            case Way.SHIMS_UNSEEN:
                self.service.popen.send_signal(signal.SIGSTOP)
                shims.signal(signal.SIGKILL)
            case Way.SHIMS_THEN_SERVICE:
                shims.signal(signal.SIGKILL)
                time.sleep(pause_s)
        self.service.popen.kill()
        if way is Way.SERVICE_THEN_SHIMS:
            shims.signal(signal.SIGKILL)
        self.service.kill()
        self.service = self.api = None


@dataclass(slots=True, kw_only=True, eq=False)
class Trial:
    """One trial. `mark` is the prefix of the marks of its runs."""

    trial_home: TrialHome
    plan: Plan
    mark: str
    neighbour: Neighbour
    outcome: Outcome = field(init=False)
    _look_alikes: LookAlikes = field(default_factory=LookAlikes)
    _runs: dict[str, RunPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outcome = Outcome(plan=self.plan)

    def run(self) -> Outcome:
        """Run the trial, and kill everything that it started.

        Raises:
            AssertionError, OSError, RpcError: the trial broke down.
        """
        try:
            with ScanThread(self.mark) as seen:
                self._begin(seen)
                with self._pinned_shims() as shims:
                    if self.plan.kind is Kind.UNENDED:
                        self._end_with_an_unkillable_process(shims, seen)
                    else:
                        self._end_with_no_process_left(shims, seen)
        finally:
            scan.kill_all_with(self.mark)
            self._look_alikes.end()
        return self.outcome

    @contextmanager
    def _pinned_shims(self) -> Iterator[Shims]:
        assert self.trial_home.service is not None
        shims = self.trial_home.home.pin_shims(self.trial_home.service)
        try:
            yield shims
        finally:
            shims.signal(signal.SIGKILL)
            shims.close()

    def _find(self, fault: Fault, what: str) -> None:
        self.outcome.faults.append((fault, what))

    # -- before ------------------------------------------------------------------------------------

    def _begin(self, seen: ScanThread) -> None:
        home, api = self.trial_home.home, self.trial_home.start()
        earlier = home.newest_markers() if self.plan.early and home.database.exists() else None
        if earlier is not None:
            self._look_alikes.start(earlier)
        for planned in self.plan.runs:
            self._runs[home.create(api, planned).run_id] = planned
        if earlier is None:
            for run_id, planned in self._runs.items():
                _until_begun(api, seen, run_id, planned.mark)
            self._look_alikes.start(_newest_launch(home))
        time.sleep(self.plan.pause_s)

    def _end(self, shims: Shims, seen: ScanThread) -> None:
        self._kill_and_restart(shims, seen)
        self._judge_processes(seen)
        self._judge_runs()

    def _end_with_no_process_left(self, shims: Shims, seen: ScanThread) -> None:
        self._end(shims, seen)
        self._judge_shims(shims)
        open_launches, reported = self._open_launches(), self._reported()
        if len(open_launches) != len(reported):
            self._find(Fault.LAUNCH, f"open: {open_launches}; reported: {reported}")

    def _kill_and_restart(self, shims: Shims, seen: ScanThread) -> None:
        dice = random.Random(self.plan.seed)  # noqa: S311 - moments, not secrets
        seen.look()
        self.outcome.grown = len(seen.everybody)
        killed = time.monotonic()
        self.trial_home.kill_service(shims, self.plan.way, dice.uniform(0, MOST_PAUSE_S))
        pid, start_ticks = self._look_alikes.recorded()
        self.trial_home.home.forge_launch(pid, start_ticks - dice.randint(1, 1000))
        self.trial_home.start()
        seen.look()
        self.outcome.grown = len(seen.everybody)
        if seen.last_alive:
            self.outcome.last_death_s = max(0.0, seen.last_alive - killed)

    # -- judging -----------------------------------------------------------------------------------

    def _judge_processes(self, seen: ScanThread) -> None:
        survivors = dict(self._older_than_the_service())
        for _ in range(SCANS):
            survivors |= {s.pid: repr(s.command) for s in seen.look().values()}
            time.sleep(scan.LOOK_S)
        innocents = self._look_alikes.missing() + self.neighbour.missing()
        self.outcome.survivors, self.outcome.innocents = len(survivors), len(innocents)
        for pid, who in survivors.items():
            self._find(Fault.SURVIVOR, f"pid {pid}: {who}")
        for who in innocents:
            self._find(Fault.INNOCENT, who)

    def _judge_shims(self, shims: Shims) -> None:
        for pid in shims.alive():
            self.outcome.survivors += 1
            self._find(Fault.SURVIVOR, f"pid {pid}: a shim")

    def _older_than_the_service(self) -> dict[int, str]:
        """Return the processes of this home that are older than its service.

        They are agents that had not begun to grow, or processes of an earlier trial.
        """
        assert self.trial_home.service is not None
        service = scan.read_process(self.trial_home.service.pid)
        assert service is not None
        return {
            seen.pid: repr(seen.command)
            for seen in scan.processes_with(self.trial_home.home.mark).values()
            if seen.start_ticks < service.start_ticks
        }

    def _judge_runs(self) -> None:
        api = self.trial_home.start()
        for run_id, planned in self._runs.items():
            run = api.get(run_id)
            if "Traceback" in run.error.message:
                self._find(Fault.BROKEN, f"the hostile agent failed: {run.error.message}")
            if not _has_its_reason(run, planned):
                self._find(Fault.RUN, f"{run_id} ({planned.mark}): {run}")

    def _open_launches(self) -> list[tuple[int, str]]:
        """Return key and state of the open launch records of earlier epochs."""
        return [
            (key, state)
            for key, state in self.trial_home.home.rows(
                "SELECT id, state FROM process_lease WHERE state <> 'CLOSED'"
                " AND epoch < (SELECT epoch FROM instance WHERE name = 'default')"
            )
        ]

    def _reported(self) -> list[str]:
        return [launch.run_id for launch in self.trial_home.start().status().unended_launches]

    # -- what cannot be ended -------------------------------------------------------------------

    def _end_with_an_unkillable_process(self, shims: Shims, seen: ScanThread) -> None:
        """End a trial in which a process with the watermark of a launch may not be signalled."""
        launch = _newest_launch(self.trial_home.home, running=True)
        with unkillable_family(launch.watermark) as stranger:
            everybody = scan.processes_with(stranger)
            self._end(shims, seen)
            if scan.processes_with(stranger).keys() != everybody.keys():
                self._find(Fault.INNOCENT, "a process that must not be signalled is dead")
            self._judge_unended(launch)
        with suppress(AssertionError):
            until(lambda: not self._is_unended(launch), "the launch is closed", timeout_s=LATE_S)
        self._judge_shims(shims)
        if self._open_launches() or self._reported():
            self._find(Fault.LAUNCH, f"open although nothing is left: {self._open_launches()}")

    def _judge_unended(self, launch: RecordedMarkers) -> None:
        expected = ([(launch.key, "KILL_PENDING")], [launch.run_id])
        found = (self._open_launches(), self._reported())
        if found != expected:
            self._find(Fault.LAUNCH, f"a process of it lives; found {found}, expected {expected}")

    def _is_unended(self, launch: RecordedMarkers) -> bool:
        return any(key == launch.key for key, _ in self._open_launches()) or bool(self._reported())


def _newest_launch(home: CampaignHome, *, running: bool = False) -> RecordedMarkers:
    marks = until(lambda: home.newest_markers(running=running), "there is a launch record")
    assert marks is not None
    return marks


def _until_begun(api: Api, seen: ScanThread, run_id: str, mark: str) -> None:
    """Wait until an agent was seen at work, or its run has ended."""
    until(
        lambda: seen.saw(mark) or api.get(run_id).status in ENDED,
        f"the tree of {run_id} has begun to grow",
    )


def _has_its_reason(run: run_pb2.Run, planned: RunPlan) -> bool:
    """Return whether an interrupted run is FAILED with a reason, or was queued again as planned."""
    if status_word(run) == "FAILED":
        return bool(run.error.code and run.error.message)
    again = status_word(run) in {"QUEUED", "RUNNING", "SUCCEEDED"}
    return planned.requeues and again and run.recovery.recovery_reason == "requeued"
