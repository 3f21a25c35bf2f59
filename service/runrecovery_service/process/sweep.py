"""Ending the process trees of leases: the only code that sends signals.

A process is signalled only through a pidfd, and only after its evidence was read again while
that pidfd was open; a number that was recorded or seen a moment ago is never signalled.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final

import structlog

from runrecovery_service.process import evidence
from runrecovery_service.process.evidence import Hit, Host, Identity, LeaseEvidence, Membership

log = structlog.get_logger(__name__)

TICK_S: Final = 0.02
"""Between two scans, when nothing is known to live."""
GRACE_TICK_S: Final = 0.1
"""Between two scans during the grace, to find what was forked meanwhile."""
CERTAIN_SCANS, CERTAIN_S = 5, 0.1
"""Empty scans, and the time they span, that close a lease of which something lived. One scan is
not atomic: a process that forks fast enough can stay ahead of it."""
UNTOUCHED_SCANS, UNTOUCHED_S = 2, TICK_S
"""The same for a lease of which nothing was ever found."""
KILLING_S: Final = 2.0
"""Of the deadline, kept for SIGKILL and the empty scans after it."""
_FREEZES: Final = 10
"""Rounds of SIGSTOP that look for newcomers before SIGKILL comes anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What became of one lease's processes.

    Attributes:
        found: processes that lived when they were found.
        ended: those of them that are dead now.
        refused: a sentence for each process that could not or must not be ended.
        gone: nothing that belongs to the lease, or may belong to it, is alive.
    """

    found: int = 0
    ended: int = 0
    refused: tuple[str, ...] = ()
    gone: bool


def end_trees(
    leases: Collection[LeaseEvidence],
    *,
    grace_s: float,
    deadline_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, Ending]:
    """End every process that bears evidence of these leases; block until that is certain.

    All leases share each scan, one grace and the deadline, so that many trees take as long as
    one. Nothing is reaped: children of this process stay zombies, which counts as dead.
    Processes of an earlier boot or another pid namespace are gone; of another host's it is told
    that they cannot be seen. Run it in a thread: it takes some 20 ms where nothing is found, else
    at least 100 ms.

    Args:
        grace_s: between SIGTERM and SIGKILL, for all together; cut short where the deadline would
            leave less than 2 s (or less than half of itself) for the killing.
        deadline_s: for everything; what lives then is reported in `Ending.refused`.

    Returns:
        One ending for each lease, by its key.

    Raises:
        OSError: /proc cannot be read at all.
    """
    here = Host.here()
    endings = {lease.lease_key: _elsewhere(lease, here) for lease in leases}
    local = [lease for lease in leases if endings[lease.lease_key] is None]
    if local:
        with _Sweep(local, clock, grace_s=grace_s, deadline_s=deadline_s) as sweep:
            endings.update(sweep.run())
    return {key: ending for key, ending in endings.items() if ending is not None}


def _elsewhere(lease: LeaseEvidence, here: Host) -> Ending | None:
    """Judge a lease whose pids mean nothing here; None for all others."""
    if (lease.boot_id, lease.pid_namespace) == (here.boot_id, here.pid_namespace):
        return None
    # A boot id is one kernel's. Under another one, the same host has been started again since;
    # of a host that it is not, nothing can be seen from here, and a container that moved would
    # be suspected for ever: it is told once.
    if lease.boot_id != here.boot_id and lease.host_id != here.host_id:
        told = (
            f"was launched on another host ({lease.host_id}), which cannot be looked at from here"
        )
        return Ending(refused=(told,), gone=True)
    return Ending(gone=True)


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    """A verified process, pinned by an open pidfd: whatever becomes of its pid, this is it."""

    hit: Hit
    run_key: int
    pidfd: int
    alive: bool = True
    sent: set[signal.Signals] = field(default_factory=set)
    barred: bool = False

    def release(self) -> None:
        """Note its end. A dead process needs no descriptor."""
        if self.alive:
            self.alive = False
            os.close(self.pidfd)


def _signal(held: _Held, number: signal.Signals) -> None:
    """Send one signal to one verified process. Nothing else in this code base sends any."""
    held.sent.add(number)
    facts = {"pid": held.hit.proc.pid, "signal": number.name, "lease": held.hit.lease_key}
    try:
        signal.pidfd_send_signal(held.pidfd, number)
    except ProcessLookupError:
        return  # it ended by itself; the poll of its pidfd will say so
    except PermissionError:
        held.barred = True
        log.warning("process.signal_refused", run=held.run_key, **facts)
        return
    log.info("process.signalled", run=held.run_key, evidence=held.hit.kind.value, **facts)


@dataclass(slots=True, kw_only=True, eq=False)
class _Tree:
    """What the sweep knows of one lease."""

    lease: LeaseEvidence
    held: dict[Identity, _Held] = field(default_factory=dict)
    unproved: dict[Identity, str] = field(default_factory=dict)
    doubts: tuple[evidence.Doubt, ...] = ()
    empty_scans: int = 0
    empty_since: float = 0.0

    @property
    def living(self) -> list[_Held]:
        return [held for held in self.held.values() if held.alive]

    def note(self, *, began: float, busy: bool) -> None:
        """Count a scan that began at `began` and found somebody alive, or nobody."""
        if busy:
            self.empty_scans = 0
            return
        self.empty_since = self.empty_since if self.empty_scans else began
        self.empty_scans += 1

    def certain(self, now: float) -> bool:
        """True when enough scans over enough time found nothing."""
        scans, span_s = (CERTAIN_SCANS, CERTAIN_S) if self.held else (UNTOUCHED_SCANS, UNTOUCHED_S)
        return self.empty_scans >= scans and now - self.empty_since >= span_s

    @property
    def hopeless(self) -> bool:
        """True when all that lives was sent SIGKILL and may not be signalled by us."""
        living = self.living
        return bool(living) and all(h.barred and signal.SIGKILL in h.sent for h in living)

    def ending(self, now: float) -> Ending:
        """Sum up."""
        living = self.living
        refused = [*map(_why_alive, living), *self._doubtful()]
        if not refused and not self.certain(now):
            refused.append(
                f"lease {self.lease.lease_key}: the deadline passed before it was certain"
                " that nothing is left"
            )
        return Ending(
            found=len(self.held),
            ended=len(self.held) - len(living),
            refused=tuple(refused),
            gone=not refused,
        )

    def _doubtful(self) -> Iterator[str]:
        yield from (f"pid {doubt.pid} {doubt.why}" for doubt in self.doubts)
        for identity, why in self.unproved.items():
            proc = evidence.read_proc(identity[0])
            if proc is not None and proc.identity == identity and not proc.dead:
                yield f"pid {proc.pid} {why}"


def _why_alive(held: _Held) -> str:
    proc = held.hit.proc
    if held.barred:
        return f"pid {proc.pid} ({held.hit.kind}) may not be signalled by this user"
    now = evidence.read_proc(proc.pid)
    state = now.state if now is not None else "unknown"
    last = "SIGKILL" if signal.SIGKILL in held.sent else "the deadline"
    return f"pid {proc.pid} ({held.hit.kind}) is alive after {last} (state {state})"


class _Sweep:
    """One call of `end_trees`."""

    def __init__(
        self,
        leases: Collection[LeaseEvidence],
        clock: Callable[[], float],
        *,
        grace_s: float,
        deadline_s: float,
    ) -> None:
        self._trees = {lease.lease_key: _Tree(lease=lease) for lease in leases}
        self._clock = clock
        start = clock()
        self._kill_at = start + min(grace_s, max(deadline_s - KILLING_S, deadline_s / 2))
        self._stop_at = start + deadline_s
        self._freezes = 0
        # Scans need descriptors too, and so does the service around us: what is over a quarter
        # waits until others have ended.
        self._room = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def __enter__(self) -> _Sweep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing frozen and no descriptor open, whatever happened."""
        for held in self._living():
            if signal.SIGSTOP in held.sent and signal.SIGKILL not in held.sent:
                _signal(held, signal.SIGKILL)
            os.close(held.pidfd)

    def run(self) -> dict[int, Ending]:
        """Look, act, wait; until every tree is settled or the deadline has passed."""
        while True:
            self._look()
            if self._settled() or self._clock() >= self._stop_at:
                break
            self._act()
            self._wait()
        now = self._clock()
        return {key: tree.ending(now) for key, tree in self._trees.items()}

    def _living(self) -> list[_Held]:
        return [held for tree in self._trees.values() for held in tree.living]

    def _settled(self) -> bool:
        now = self._clock()
        return all(tree.certain(now) or tree.hopeless for tree in self._trees.values())

    def _look(self) -> None:
        """Scan once: hold who is new, mark who has died, count the empty ones."""
        began = self._clock()
        try:
            busy = self._hold_newcomers()
        except OSError as error:
            # Blind for want of descriptors or memory is not the same as empty.
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise
            busy = set(self._trees)
        self._mark_dead(0.0)
        for key, tree in self._trees.items():
            tree.note(began=began, busy=key in busy or bool(tree.living))

    def _hold_newcomers(self) -> set[int]:
        """Open and verify everybody not held yet; return the leases that need another look."""
        snapshot = evidence.scan()
        shield = evidence.shielded(snapshot, own_pid=os.getpid())
        seen = self._members(snapshot, shield)
        known = self._known()
        newcomers = [
            hit
            for hit in seen.hits.values()
            if not hit.proc.dead and hit.proc.identity not in known
        ]
        opened = self._open(newcomers)
        try:
            # The proof that counts is the one read while the pidfds are open.
            proof = self._members(evidence.scan(self._witnesses(seen)), shield)
        except OSError:
            for pidfd in opened.values():
                os.close(pidfd)
            raise
        for hit in newcomers:
            if hit.proc.pid in opened:
                self._keep_if_proved(hit, opened[hit.proc.pid], proof)
        for key, tree in self._trees.items():
            tree.doubts = tuple(doubt for doubt in seen.doubts if doubt.lease_key == key)
        return {hit.lease_key for hit in newcomers}

    def _witnesses(self, seen: Membership) -> set[int]:
        """Return whose state decides about the hits: they themselves and the recorded leaders."""
        leaders = {tree.lease.pid for tree in self._trees.values()}
        return {*seen.hits, *(pid for pid in leaders if pid is not None)}

    def _known(self) -> dict[Identity, int]:
        return {ident: key for key, tree in self._trees.items() for ident in tree.held}

    def _members(self, snapshot: Mapping[int, evidence.Proc], shield: frozenset[int]) -> Membership:
        return evidence.members(
            snapshot,
            [tree.lease for tree in self._trees.values()],
            evidence.cookies(snapshot),
            held=self._known(),
            shield=shield,
        )

    def _open(self, hits: Collection[Hit]) -> dict[int, int]:
        """Open pidfds, by pid, as far as there is room; the next scan finds the rest again."""
        room = self._room - len(self._living())
        opened: dict[int, int] = {}
        for hit in hits:
            if len(opened) >= room:
                break
            try:
                opened[hit.proc.pid] = os.pidfd_open(hit.proc.pid)
            except OSError as error:
                if error.errno != errno.ESRCH:
                    break
        return opened

    def _keep_if_proved(self, hit: Hit, pidfd: int, proof: Membership) -> None:
        tree = self._trees[hit.lease_key]
        again = proof.hits.get(hit.proc.pid)
        same = again is not None and again.proc.identity == hit.proc.identity
        if again is not None and same and again.lease_key == hit.lease_key:
            tree.held[hit.proc.identity] = _Held(
                hit=again, run_key=tree.lease.run_key, pidfd=pidfd, alive=True
            )
            tree.unproved.pop(hit.proc.identity, None)
            return
        os.close(pidfd)
        tree.unproved[hit.proc.identity] = (
            f"was seen with evidence ({hit.kind}) that was gone when it was read again"
        )

    def _act(self) -> None:
        living = self._living()
        if self._clock() < self._kill_at:
            for held in living:
                self._ask(held)
        else:
            self._freeze_then_kill(living)

    def _ask(self, held: _Held) -> None:
        if signal.SIGTERM in held.sent:
            return
        _signal(held, signal.SIGTERM)
        if held.hit.proc.state == "T":
            _signal(held, signal.SIGCONT)  # a stopped process could not act on the SIGTERM

    def _freeze_then_kill(self, living: list[_Held]) -> None:
        """Stop everybody until a scan finds nobody new, then kill: the dead hide their children."""
        moving = [held for held in living if signal.SIGSTOP not in held.sent]
        for held in moving:
            _signal(held, signal.SIGSTOP)
        self._freezes = self._freezes + 1 if moving else _FREEZES
        if self._freezes < _FREEZES:
            return
        self._freezes = 0
        for held in living:
            if signal.SIGKILL not in held.sent:
                _signal(held, signal.SIGKILL)

    def _wait(self) -> None:
        """Wait for deaths while somebody should be dying, else for the next scan."""
        now = self._clock()
        left_s = max(0.0, self._stop_at - now)
        living = self._living()
        if not living:
            time.sleep(min(TICK_S, left_s))
        elif now < self._kill_at:
            self._mark_dead(min(GRACE_TICK_S, self._kill_at - now, left_s))
        elif all(signal.SIGKILL in held.sent for held in living):
            self._mark_dead(min(TICK_S, left_s))

    def _mark_dead(self, timeout_s: float) -> None:
        """Note who has died; wait up to `timeout_s` for all to. A zombie's pidfd is readable."""
        by_fd = {held.pidfd: held for held in self._living()}
        poll = select.poll()
        for pidfd in by_fd:
            poll.register(pidfd, select.POLLIN)
        until = self._clock() + timeout_s
        while by_fd:
            # Rounded up: a remainder below one millisecond must not spin.
            wait_ms = math.ceil(max(0.0, until - self._clock()) * 1000)
            for pidfd, _ in poll.poll(wait_ms):
                poll.unregister(pidfd)
                by_fd.pop(pidfd).release()
            if self._clock() >= until:
                return
