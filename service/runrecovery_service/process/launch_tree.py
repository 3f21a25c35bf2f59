"""The processes of one launch, as a sweep sees them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import field
from typing import Final

from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import procfs
from runrecovery_service.process.ending_result import BY_SERVICE, NOTHING_LEFT, Ending
from runrecovery_service.process.markers import (
    Identity,
    LaunchMarkers,
    Member,
    ProtectedMember,
)

TICK_S: Final = 0.02
"""Time between two scans while no process of the launches is known to live."""
CERTAIN_SCANS, CERTAIN_S = 5, 0.1
"""How many empty scans, over how many seconds, prove the end of a launch that had processes. One
scan is not atomic: a process that forks fast enough can evade it."""
UNTOUCHED_SCANS, UNTOUCHED_S = 2, TICK_S
"""How many empty scans, over how many seconds, are enough if no process was ever found."""
_SIGNAL_ORDER: Final = (signal.SIGTERM, signal.SIGCONT, signal.SIGSTOP, signal.SIGKILL)


@dataclass(slots=True, kw_only=True, eq=False)
class PinnedProcess:
    """A process with an open pidfd, which stays this process even if the pid is reused.

    Attributes:
        member: the process, and the marker by which it belongs to its launch.
        proved: a marker of the launch was read while the pidfd was open.
        sent: the signals that were sent to the process.
        barred: the kernel refused to let this user signal the process.
    """

    member: Member
    run_key: int
    pidfd: int
    is_shim: bool
    proved: bool = False
    alive: bool = True
    sent: set[signal.Signals] = field(default_factory=set)
    barred: bool = False

    @property
    def identity(self) -> Identity:
        """Pid and start ticks of the process."""
        return self.member.proc.identity

    def release(self) -> None:
        """Close the pidfd, and count the process as dead."""
        if self.alive:
            self.alive = False
            os.close(self.pidfd)


@dataclass(slots=True, kw_only=True, eq=False)
class LaunchTree:
    """The processes of one launch that a sweep has found.

    Attributes:
        pinned: by identity, the processes for which a pidfd was opened, also those that have died
            since (their pidfd is closed).
        unproved: by identity, why a process that once carried a marker is no longer pinned.
        protected: members that must not be signalled, as the latest scan found them.
    """

    markers: LaunchMarkers
    pinned: dict[Identity, PinnedProcess] = field(default_factory=dict)
    unproved: dict[Identity, str] = field(default_factory=dict)
    protected: list[ProtectedMember] = field(default_factory=list)
    empty_scans: int = 0
    empty_since: float = 0.0

    @property
    def living(self) -> list[PinnedProcess]:
        """The processes that are alive, except the shim."""
        return [each for each in self.pinned.values() if each.alive and not each.is_shim]

    @property
    def shim(self) -> PinnedProcess | None:
        """The shim, if it was found and is alive."""
        return next((each for each in self.pinned.values() if each.alive and each.is_shim), None)

    def count_scan(self, *, began: float, busy: bool) -> None:
        """Count a scan that began at `began`. `busy`: the scan found a living process."""
        if busy:
            self.empty_scans = 0
            return
        self.empty_since = self.empty_since if self.empty_scans else began
        self.empty_scans += 1

    def is_empty(self, now: float) -> bool:
        """Return True if enough scans over enough time found no process except the shim."""
        scans, span_s = (
            (CERTAIN_SCANS, CERTAIN_S) if self.pinned else (UNTOUCHED_SCANS, UNTOUCHED_S)
        )
        return self.empty_scans >= scans and now - self.empty_since >= span_s

    def is_gone(self, now: float) -> bool:
        """Return True if no process is left, the shim included."""
        return self.is_empty(now) and (not self.pinned or self.shim is None)

    @property
    def is_hopeless(self) -> bool:
        """True if every living process was sent SIGKILL and the kernel refused the signal."""
        living = self.living or [shim for shim in (self.shim,) if shim is not None]
        return bool(living) and all(p.barred and signal.SIGKILL in p.sent for p in living)

    def ending(self, now: float) -> Ending:
        """Return the result for this launch."""
        if not (self.pinned or self.unproved or self.protected) and self.is_gone(now):
            return NOTHING_LEFT  # true for nearly all of thousands of launches
        agents = [each for each in self.pinned.values() if not each.is_shim]
        dead = frozenset(each.identity for each in agents if not each.alive)
        lonely = [self.shim] if self.shim is not None and not self.living else []
        refused = [*map(_why_alive, self.living), *map(_why_alive, lonely), *self._not_signalled()]
        if not refused and not self.is_gone(now):
            refused.append(
                f"launch {self.markers.launch_key}: the deadline passed before enough scans had"
                " confirmed that no process is left"
            )
        return Ending(
            found=len(agents),
            ended=len(dead),
            dead=dead,
            refused=tuple(refused),
            orphans=tuple(map(_orphan, agents)),
            gone=not refused,
        )

    def _not_signalled(self) -> Iterator[str]:
        yield from (f"pid {member.pid} {member.why}" for member in self.protected)
        for identity, why in self.unproved.items():
            proc = procfs.read_proc(identity[0])
            if proc is not None and proc.identity == identity and not proc.dead:
                yield f"pid {proc.pid} {why}"


def _orphan(pinned: PinnedProcess) -> Orphan:
    return Orphan(
        pid=pinned.member.proc.pid,
        evidence=pinned.member.proof.value,
        signals=tuple(number.name for number in _SIGNAL_ORDER if number in pinned.sent),
        ended=not pinned.alive,
        ended_by=BY_SERVICE,
    )


def _why_alive(pinned: PinnedProcess) -> str:
    proc, proof = pinned.member.proc, pinned.member.proof
    if pinned.barred:
        return f"pid {proc.pid} ({proof}) may not be signalled by this user"
    now = procfs.read_proc(proc.pid)
    state = now.state if now is not None else "unknown"
    last = "SIGKILL" if signal.SIGKILL in pinned.sent else "the deadline"
    return f"pid {proc.pid} ({proof}) is alive after {last} (state {state})"
