"""Ending the process trees of launches: the only way in which the service ends processes.

A process is signalled only through a pidfd, and only after one of its markers was read while that
pidfd was open (`signals.send`). A pid that was recorded or seen earlier is never signalled.
The shim of a tree is signalled last: it exits by itself when no process is left below it.
"""

from __future__ import annotations

import errno
import math
import os
import select
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Final

import structlog

from runrecovery_service.process import procfs, signals
from runrecovery_service.process.ending_result import NOTHING_LEFT, Ending
from runrecovery_service.process.host import Host
from runrecovery_service.process.launch_tree import TICK_S, PinnedProcess
from runrecovery_service.process.markers import (
    Identity,
    LaunchMarkers,
    Member,
    find_members,
    protected_pids,
)
from runrecovery_service.process.pinned_trees import PinnedTrees
from runrecovery_service.process.procfs import Proc

log = structlog.get_logger(__name__)

GRACE_TICK_S: Final = 0.1
"""Time between two scans during the grace, to find processes that were forked meanwhile."""
LEAST_PAUSE_S: Final = 0.005
"""Pause between two scans that take longer than the time between their beginnings."""
KILLING_S: Final = 2.0
"""Part of the deadline that is reserved for SIGKILL and the empty scans after it."""
LAST_S: Final = 0.5
"""Time after the deadline for processes to die that were killed at the deadline."""
LONELY_SHIM_S: Final = 0.5
"""How long a shim with nothing below it may take to exit before it is killed. It usually takes
milliseconds."""
_LISTINGS, _MIN_LISTINGS, LISTING_S = 30, 3, 0.2
"""While new processes appear, one scan lists the pids again: three times in any case, then until
0.2 s have passed, 30 times at most. Other programs may fork as fast as the machine allows."""
_FREEZES: Final = 10
"""Rounds of SIGSTOP that search for new processes before SIGKILL is sent in any case."""


def end_trees(
    launches: Collection[LaunchMarkers],
    *,
    why: str,
    grace_s: float,
    deadline_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, Ending]:
    """End every process that belongs to one of the launches. Block until none is left.

    All launches share each scan, the grace and the deadline. So the time does not grow with the
    number of trees.
    Children of this process are not reaped: they stay zombies, which count as dead. Processes of an
    earlier boot have ended. Processes on another host are reported as out of sight.
    Call it in a thread: it takes some 20 ms if nothing is found, else at least 100 ms.

    Args:
        why: the reason for the log, one or two words.
        grace_s: time between SIGTERM and SIGKILL, for all launches together. It is shortened if
            the deadline would leave less than 2 s (or less than half of itself) for SIGKILL.
        deadline_s: time for everything. `Ending.refused` names the processes that live then.

    Returns:
        One ending for each launch, by its key.

    Raises:
        OSError: /proc cannot be read at all.
    """
    here = Host.here()
    endings: dict[int, Ending] = {}
    local = []
    for launch in launches:
        elsewhere = _elsewhere(launch, here)
        if elsewhere is None:
            local.append(_without_foreign_pid(launch, here))
        else:
            endings[launch.launch_key] = elsewhere
    if local:
        with _Sweep(local, clock, why=why, grace_s=grace_s, deadline_s=deadline_s) as sweep:
            endings |= sweep.run()
    return endings


def _elsewhere(launch: LaunchMarkers, here: Host) -> Ending | None:
    """Return the ending of a launch that has no process under this kernel; None for all others."""
    if launch.host.boot_id == here.boot_id:
        return None
    # A boot id names one kernel. Another one on the same host means that the host was restarted.
    # Another host cannot be seen from here. That is reported once, because a container that moved
    # would otherwise be reported for ever.
    if launch.host.host_id != here.host_id:
        report = (
            f"was launched on another host ({launch.host.host_id}), whose processes cannot be seen"
            " from here"
        )
        return Ending(refused=(report,), gone=True)
    return NOTHING_LEFT


def _without_foreign_pid(launch: LaunchMarkers, here: Host) -> LaunchMarkers:
    """Return the launch without its pid if that pid is of another pid namespace.

    The other markers mean the same in every namespace: a visible process that carries one belongs
    to the launch.
    """
    if launch.host.pid_namespace == here.pid_namespace:
        return launch
    return replace(launch, pid=None, start_ticks=None)


class _Sweep:
    """The state of one call of `end_trees`."""

    def __init__(
        self,
        launches: Collection[LaunchMarkers],
        clock: Callable[[], float],
        *,
        why: str,
        grace_s: float,
        deadline_s: float,
    ) -> None:
        self._processes = PinnedTrees(launches)
        self._clock = clock
        self._why = why
        start = clock()
        self._grace_s = min(grace_s, max(deadline_s - KILLING_S, deadline_s / 2))
        # The grace begins after the first scan: only then processes have received SIGTERM.
        self._kill_at = math.inf if self._grace_s else start
        self._deadline_s = deadline_s
        self._stop_at = start + deadline_s
        self._scanned_at = start
        self._freezes = 0
        self._protected: frozenset[int] = frozenset()
        self._seen: frozenset[int] = frozenset()

    def __enter__(self) -> _Sweep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill stopped processes and close every descriptor, also after an error."""
        for pinned in self._processes.pinned:
            if signal.SIGSTOP in pinned.sent and signal.SIGKILL not in pinned.sent:
                self._signal(pinned, signal.SIGKILL)
            pinned.release()

    def run(self) -> dict[int, Ending]:
        """Scan, signal and wait until every tree is settled or the deadline has passed."""
        self._scan_and_pin()
        reserved = self._stop_at - min(KILLING_S, self._deadline_s / 2)
        self._kill_at = min(self._clock() + self._grace_s, reserved)
        while not self._is_settled() and self._clock() < self._stop_at:
            self._send_signals()
            self._wait()
            self._scan_and_pin()
        if not self._is_settled():
            self._kill_survivors()
        now = self._clock()
        return {tree.markers.launch_key: tree.ending(now) for tree in self._processes.trees}

    def _kill_survivors(self) -> None:
        """Kill every proved process at the deadline, even if the scans took all of the time."""
        for pinned in self._processes.living:
            if signal.SIGKILL not in pinned.sent:
                self._signal(pinned, signal.SIGKILL)
        self._note_deaths(LAST_S)
        self._scan_and_pin()

    @property
    def _is_killing(self) -> bool:
        return self._clock() >= self._kill_at

    def _is_settled(self) -> bool:
        now = self._clock()
        return all(tree.is_gone(now) or tree.is_hopeless for tree in self._processes.trees)

    # -- scanning ------------------------------------------------------------------------------

    def _scan_and_pin(self) -> None:
        """Scan once: pin new processes, note deaths, count the scan for each tree."""
        began = self._scanned_at = self._clock()
        self._processes.count_free_pins()
        try:
            busy = self._pin_newcomers()
        except OSError as error:
            # A scan without descriptors or memory has seen nothing, which does not mean empty.
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise
            busy = self._processes.keys
        self._note_deaths(0.0)
        for tree in self._processes.trees:
            is_busy = tree.markers.launch_key in busy or bool(tree.pinned and tree.living)
            tree.count_scan(began=began, busy=is_busy)

    def _pin_newcomers(self) -> set[int]:
        """Pin and prove new processes; return the keys of launches that need another scan."""
        snapshot, roots = self._scan()
        self._protected = protected_pids(snapshot, own_pid=os.getpid())
        found = find_members(snapshot, roots, protected=self._protected)
        known = self._processes.identities
        newcomers = [
            member
            for member in found.members.values()
            if not member.proc.dead and member.proc.identity not in known
        ]
        pinned = [each for each in map(self._processes.pin, newcomers) if each is not None]
        self._processes.prove(pinned, found, protected=self._protected)
        self._processes.note_protected(found.protected)
        return {each.launch_key for each in newcomers if not self._processes.is_shim(each)}

    def _scan(self) -> tuple[dict[int, Proc], dict[int, Member]]:
        """Read every process; return them all, and those that carry a marker or are pinned."""
        known = self._processes.identities
        is_killing = self._is_killing
        if is_killing and not self._protected:  # before the first process is stopped on sight
            self._protected = protected_pids(procfs.scan(), own_pid=os.getpid())
        snapshot: dict[int, Proc] = {}
        roots: dict[int, Member] = {}
        for pid in self._all_pids():
            proc = procfs.read_proc(pid)
            if proc is None:
                continue
            snapshot[pid] = proc
            root = self._processes.find_direct_member(proc, known)
            if root is not None:
                roots[pid] = root
                if is_killing:
                    self._freeze_on_sight(root, known)
        self._seen = frozenset(snapshot)
        return snapshot, roots

    def _all_pids(self) -> Iterator[int]:
        """Yield all pids, then those that appeared meanwhile, until a listing shows no new one.

        A process that forks and exits all the time is in every listing under another pid, and may
        have ended before its pid is read. So new pids come first.
        """
        read: set[int] = set()
        until = time.monotonic() + LISTING_S
        for listing in range(_LISTINGS):
            new = set(procfs.pids()) - read
            if not new or (listing >= _MIN_LISTINGS and time.monotonic() > until):
                return
            read |= new
            yield from sorted(new, key=lambda pid: (pid in self._seen, -pid))

    def _freeze_on_sight(self, member: Member, known: Mapping[Identity, int]) -> None:
        """Stop a new process at once while killing: it could fork again before the scan ends."""
        is_new = member.proc.identity not in known and not member.proc.dead
        may_signal = member.proc.pid not in self._protected and not self._processes.is_shim(member)
        if is_new and may_signal:
            pinned = self._processes.pin(member)
            if pinned is not None:
                self._signal(pinned, signal.SIGSTOP)

    # -- signalling ----------------------------------------------------------------------------

    def _send_signals(self) -> None:
        living = self._processes.living
        if not self._is_killing:
            for pinned in living:
                self._terminate(pinned)
        else:
            self._freeze_then_kill(living)
        self._kill_lonely_shims()

    def _terminate(self, pinned: PinnedProcess) -> None:
        if signal.SIGTERM in pinned.sent:
            return
        self._signal(pinned, signal.SIGTERM)
        if pinned.member.proc.state == "T":
            self._signal(pinned, signal.SIGCONT)  # a stopped process cannot handle the SIGTERM

    def _freeze_then_kill(self, living: list[PinnedProcess]) -> None:
        """Stop processes until a scan finds no new one, then kill all of them.

        All are stopped first, because the children of a dead process cannot be traced to it.
        """
        moving = [pinned for pinned in living if signal.SIGSTOP not in pinned.sent]
        for pinned in moving:
            self._signal(pinned, signal.SIGSTOP)
        self._freezes = self._freezes + 1 if moving else _FREEZES
        if self._freezes < _FREEZES:
            return
        self._freezes = 0
        for pinned in living:
            if signal.SIGKILL not in pinned.sent:
                self._signal(pinned, signal.SIGKILL)

    def _kill_lonely_shims(self) -> None:
        """Kill a shim that has nothing below it and does not exit: it hangs or was stopped."""
        now = self._clock()
        for tree in self._processes.trees:
            shim = tree.shim if tree.pinned else None
            if shim is None or not tree.is_empty(now) or now - tree.empty_since < LONELY_SHIM_S:
                continue
            if signal.SIGKILL not in shim.sent:
                self._signal(shim, signal.SIGKILL)

    def _signal(self, pinned: PinnedProcess, number: signal.Signals) -> None:
        pinned.sent.add(number)
        outcome = signals.send(
            pinned.member.proc.pid,
            pinned.pidfd,
            number,
            prove=lambda: self._processes.read_proof(pinned),
            audit=lambda *facts: self._audit(pinned, *facts),
        )
        if outcome == signals.UNPROVED:
            pinned.sent.discard(number)
            if not pinned.proved:
                self._processes.unpin(pinned)
        pinned.barred = pinned.barred or outcome == signals.BARRED

    def _audit(
        self, pinned: PinnedProcess, pid: int, name: str, proof: str | None, outcome: str
    ) -> None:
        facts = {
            "pid": pid, "signal": name, "lease": pinned.member.launch_key, "run": pinned.run_key,
            "why": self._why, "evidence": proof, "outcome": outcome,
        }  # fmt: skip
        if outcome == signals.BARRED:
            log.warning("process.signal_refused", **facts)
        elif outcome == signals.UNPROVED:
            log.info("process.signal_withheld", **facts)
        else:
            log.info("process.signalled", **facts)

    # -- waiting -------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait for signalled processes to die, or else for the time of the next scan."""
        now = self._clock()
        left_s = max(0.0, self._stop_at - now)
        living = self._processes.living
        if not living:
            rest_s = max(LEAST_PAUSE_S, self._scanned_at + TICK_S - now)
            self._note_deaths(min(rest_s, left_s), whole_time=True)
        elif now < self._kill_at:
            self._note_deaths(min(GRACE_TICK_S, self._kill_at - now, left_s))
        elif all(signal.SIGKILL in pinned.sent for pinned in living):
            self._note_deaths(min(TICK_S, left_s))

    def _note_deaths(self, timeout_s: float, *, whole_time: bool = False) -> None:
        """Wait at most `timeout_s` until all pinned processes have died; release the dead ones.

        A pidfd becomes readable when its process dies, even if the process is not reaped.

        Args:
            whole_time: always wait for the full `timeout_s`.
        """
        by_fd = {pinned.pidfd: pinned for pinned in self._processes.pinned}
        poll = select.poll()
        for pidfd in by_fd:
            poll.register(pidfd, select.POLLIN)
        until = self._clock() + timeout_s
        while by_fd or whole_time:
            # Rounded up: a remainder below one millisecond must not spin.
            wait_ms = math.ceil(max(0.0, until - self._clock()) * 1000)
            for pidfd, _ in poll.poll(wait_ms):
                poll.unregister(pidfd)
                by_fd.pop(pidfd).release()
            if self._clock() >= until:
                return
