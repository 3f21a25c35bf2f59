"""One trial: grow, strike, start again, judge."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from campaign import watch
from campaign.canaries import Canaries, Neighbour, planted
from campaign.house import House, Marks, Shims
from campaign.plans import MOST_PAUSE_S, Kind, Plan, RunPlan, Way
from campaign.watch import Watch
from runrecovery.v1 import run_pb2
from support.api import ENDED, Api, status_word
from support.service import ServiceProcess
from support.waiting import until

SCANS: Final = 3
"""Looks for survivors once the service is SERVING: one scan is not atomic."""
LATE_S: Final = 15.0
"""In which a lease is closed once what could not be ended is gone; a patrol comes every 2 s."""


class Fault(StrEnum):
    """What a trial can find."""

    SURVIVOR = "survivor"
    """A process of a tree, or a shim, lives."""
    INNOCENT = "innocent"
    """A canary is dead or stopped."""
    RUN = "run"
    """A run is in a state that no rule gives it, or without a reason."""
    LEASE = "lease"
    """A lease is closed and must not be, or is open and must not be."""
    BROKEN = "broken"
    """The trial itself did not get through."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a trial saw. `grown`: processes of trees that were seen alive."""

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
class Stage:
    """A house and the service that runs in it, from trial to trial."""

    house: House
    service: ServiceProcess | None = None
    api: Api | None = None

    def start(self) -> Api:
        """Start the service if it does not run, and return a channel to it."""
        if self.api is None:
            self.service, self.api = self.house.start()
        return self.api

    def strike(self, shims: Shims, way: Way, pause_s: float) -> None:
        """Kill the service, and its shims in that way."""
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
    """One play on a stage; `mark` begins the marks of its runs."""

    stage: Stage
    plan: Plan
    mark: str
    neighbour: Neighbour
    outcome: Outcome = field(init=False)
    _canaries: Canaries = field(default_factory=Canaries)
    _runs: dict[str, RunPlan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outcome = Outcome(plan=self.plan)

    def play(self) -> Outcome:
        """Do all of it; what was started for the trial is ended afterwards.

        Raises:
            AssertionError, OSError, RpcError: it did not get through.
        """
        try:
            with Watch(self.mark) as seen:
                self._begin(seen)
                with self._pinned_shims() as shims:
                    if self.plan.kind is Kind.UNENDED:
                        self._end_with_a_stranger(shims, seen)
                    else:
                        self._end_with_nobody_left(shims, seen)
        finally:
            watch.end_bearing(self.mark)
            self._canaries.end()
        return self.outcome

    @contextmanager
    def _pinned_shims(self) -> Iterator[Shims]:
        assert self.stage.service is not None
        shims = self.stage.house.pin_shims(self.stage.service)
        try:
            yield shims
        finally:
            shims.signal(signal.SIGKILL)
            shims.close()

    def _find(self, fault: Fault, what: str) -> None:
        self.outcome.faults.append((fault, what))

    # -- before ------------------------------------------------------------------------------------

    def _begin(self, seen: Watch) -> None:
        house, api = self.stage.house, self.stage.start()
        earlier = house.marks() if self.plan.early and house.database.exists() else None
        if earlier is not None:
            self._canaries.release(earlier)
        for planned in self.plan.runs:
            self._runs[house.create(api, planned).run_id] = planned
        if earlier is None:
            for run_id, planned in self._runs.items():
                _until_begun(api, seen, run_id, planned.mark)
            self._canaries.release(_newest_lease(house))
        time.sleep(self.plan.pause_s)

    def _end(self, shims: Shims, seen: Watch) -> None:
        self._strike_and_start(shims, seen)
        self._judge_processes(seen)
        self._judge_runs()

    def _end_with_nobody_left(self, shims: Shims, seen: Watch) -> None:
        self._end(shims, seen)
        self._judge_shims(shims)
        open_leases, told = self._open_leases(), self._told()
        if len(open_leases) != len(told):
            self._find(Fault.LEASE, f"open: {open_leases}; told: {told}")

    def _strike_and_start(self, shims: Shims, seen: Watch) -> None:
        dice = random.Random(self.plan.seed)  # noqa: S311 - moments, not secrets
        seen.look()
        self.outcome.grown = len(seen.everybody)
        struck = time.monotonic()
        self.stage.strike(shims, self.plan.way, dice.uniform(0, MOST_PAUSE_S))
        pid, start_ticks = self._canaries.recorded()
        self.stage.house.forge_lease(pid, start_ticks - dice.randint(1, 1000))
        self.stage.start()
        seen.look()
        self.outcome.grown = len(seen.everybody)
        if seen.last_alive:
            self.outcome.last_death_s = max(0.0, seen.last_alive - struck)

    # -- judging -----------------------------------------------------------------------------------

    def _judge_processes(self, seen: Watch) -> None:
        survivors = dict(self._older_than_the_service())
        for _ in range(SCANS):
            survivors |= {s.pid: repr(s.command) for s in seen.look().values()}
            time.sleep(watch.LOOK_S)
        innocents = self._canaries.missing() + self.neighbour.missing()
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
        """Return who of this house was there before its service: an agent that had not begun to
        be its tree, or one of an earlier trial."""
        assert self.stage.service is not None
        service = watch.look_at(self.stage.service.pid)
        assert service is not None
        return {
            seen.pid: repr(seen.command)
            for seen in watch.bearing(self.stage.house.mark).values()
            if seen.start_ticks < service.start_ticks
        }

    def _judge_runs(self) -> None:
        api = self.stage.start()
        for run_id, planned in self._runs.items():
            run = api.get(run_id)
            if "Traceback" in run.error.message:
                self._find(Fault.BROKEN, f"the adversary failed: {run.error.message}")
            if not _has_its_reason(run, planned):
                self._find(Fault.RUN, f"{run_id} ({planned.mark}): {run}")

    def _open_leases(self) -> list[tuple[int, str]]:
        """Return key and state of the leases of earlier epochs that are not closed."""
        return [
            (key, state)
            for key, state in self.stage.house.rows(
                "SELECT id, state FROM process_lease WHERE state <> 'CLOSED'"
                " AND epoch < (SELECT epoch FROM instance WHERE name = 'default')"
            )
        ]

    def _told(self) -> list[str]:
        return [launch.run_id for launch in self.stage.start().status().unended_launches]

    # -- what cannot be ended -------------------------------------------------------------------

    def _end_with_a_stranger(self, shims: Shims, seen: Watch) -> None:
        """A process that the service may not signal bears the watermark of a lease."""
        lease = _newest_lease(self.stage.house, running=True)
        with planted(lease.watermark) as stranger:
            everybody = watch.bearing(stranger)
            self._end(shims, seen)
            if watch.bearing(stranger).keys() != everybody.keys():
                self._find(Fault.INNOCENT, "what must not be signalled is dead")
            self._judge_unended(lease)
        with suppress(AssertionError):
            until(lambda: not self._is_unended(lease), "it is noticed", timeout_s=LATE_S)
        self._judge_shims(shims)
        if self._open_leases() or self._told():
            self._find(Fault.LEASE, f"open although nothing is left: {self._open_leases()}")

    def _judge_unended(self, lease: Marks) -> None:
        expected = ([(lease.key, "KILL_PENDING")], [lease.run_id])
        found = (self._open_leases(), self._told())
        if found != expected:
            self._find(Fault.LEASE, f"something of it lives, and it says {found}, not {expected}")

    def _is_unended(self, lease: Marks) -> bool:
        return any(key == lease.key for key, _ in self._open_leases()) or bool(self._told())


def _newest_lease(house: House, *, running: bool = False) -> Marks:
    marks = until(lambda: house.marks(running=running), "there is a lease")
    assert marks is not None
    return marks


def _until_begun(api: Api, seen: Watch, run_id: str, mark: str) -> None:
    """Wait until an agent was seen at work, or its run has ended again."""
    until(
        lambda: seen.saw(mark) or api.get(run_id).status in ENDED,
        f"the tree of {run_id} has begun to grow",
    )


def _has_its_reason(run: run_pb2.Run, planned: RunPlan) -> bool:
    """True when a run that was interrupted is FAILED and says why, or begins again as planned."""
    if status_word(run) == "FAILED":
        return bool(run.error.code and run.error.message)
    again = status_word(run) in {"QUEUED", "RUNNING", "SUCCEEDED"}
    return planned.requeues and again and run.recovery.recovery_reason == "requeued"
