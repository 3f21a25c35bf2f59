"""Ending the process trees of leases: the one way in which the service ends anything.

A process is signalled only through a pidfd, and only after its evidence was read again while
that pidfd was open (`signals.send`); a number that was recorded or seen a moment ago never is.
The shim of a tree is left for last: it goes by itself when nothing is left below it.
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
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Final

import structlog

from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.process import procfs, signals
from runrecovery_service.process.evidence import (
    Doubt,
    Evidence,
    Hit,
    Host,
    Identity,
    LeaseEvidence,
    Marks,
    Membership,
    members,
    shielded,
)
from runrecovery_service.process.procfs import Proc

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
LAST_S: Final = 0.5
"""After the deadline: for those to die who were killed at it."""
LONELY_SHIM_S: Final = 0.5
"""A shim with nothing below it exits within milliseconds; one that has not by then is ended."""
_CHASES, _CHASES_AT_LEAST, CHASE_S = 30, 3, 0.2
"""Looks at the list of processes in one scan, while others start without end: so many at most, and
after the third only within this time. Strangers may fork as fast as the machine allows."""
_FREEZES: Final = 10
"""Rounds of SIGSTOP that look for newcomers before SIGKILL comes anyway."""
_IN_ORDER: Final = (signal.SIGTERM, signal.SIGCONT, signal.SIGSTOP, signal.SIGKILL)
BY_SERVICE, BY_SHIM = "service", "shim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What became of one lease's processes. Its shim, a part of the service, is not counted if it
    is on record.

    Attributes:
        found: processes that lived when they were found.
        ended: those of them that are dead now.
        dead: pid and start ticks of the latter.
        refused: a sentence for each process that could not or must not be ended.
        orphans: what was done to each of those that were found.
        gone: nothing that belongs to the lease is alive, its shim included.
    """

    found: int = 0
    ended: int = 0
    dead: frozenset[Identity] = field(default=frozenset(), repr=False, compare=False)
    refused: tuple[str, ...] = ()
    orphans: tuple[Orphan, ...] = field(default=(), repr=False, compare=False)
    gone: bool

    def with_book(self, killed: frozenset[Identity]) -> Ending:
        """Add whom the shim killed by itself, as its book tells; nobody is counted twice."""
        unseen = killed - self.dead
        by_shim = tuple(
            Orphan(pid=pid, evidence=Evidence.DESCENT, signals=("SIGKILL",), ended=True, by=BY_SHIM)
            for pid, _ in sorted(unseen)
        )
        return replace(
            self,
            found=self.found + len(unseen),
            ended=self.ended + len(unseen),
            dead=self.dead | killed,
            orphans=by_shim + self.orphans,
        )


def end_trees(
    leases: Collection[LeaseEvidence],
    *,
    why: str,
    grace_s: float,
    deadline_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, Ending]:
    """End every process that bears evidence of these leases; block until that is certain.

    All leases share each scan, one grace and the deadline, so that many trees take as long as
    one. Nothing is reaped: children of this process stay zombies, which counts as dead.
    Processes of an earlier boot are gone; of another host's it is told that they cannot be seen.
    Run it in a thread: it takes some 20 ms where nothing is found, else at least 100 ms.

    Args:
        why: for the audit, a word or two.
        grace_s: between SIGTERM and SIGKILL, for all together; cut short where the deadline would
            leave less than 2 s (or less than half of itself) for the killing.
        deadline_s: for everything; what lives then is reported in `Ending.refused`.

    Returns:
        One ending for each lease, by its key.

    Raises:
        OSError: /proc cannot be read at all.
    """
    here = Host.here()
    endings: dict[int, Ending] = {}
    local = []
    for lease in leases:
        elsewhere = _elsewhere(lease, here)
        if elsewhere is None:
            local.append(_as_seen_from(here, lease))
        else:
            endings[lease.lease_key] = elsewhere
    if local:
        with _Sweep(local, clock, why=why, grace_s=grace_s, deadline_s=deadline_s) as sweep:
            endings |= sweep.run()
    return endings


def _elsewhere(lease: LeaseEvidence, here: Host) -> Ending | None:
    """Judge a lease whose processes cannot live under this kernel; None for all others."""
    if lease.boot_id == here.boot_id:
        return None
    # A boot id is one kernel's. Under another one, the same host has been started again since;
    # of a host that it is not, nothing can be seen from here, and a container that moved would
    # be suspected for ever: it is told once.
    if lease.host_id != here.host_id:
        told = (
            f"was launched on another host ({lease.host_id}), which cannot be looked at from here"
        )
        return Ending(refused=(told,), gone=True)
    return NOTHING_LEFT


def _as_seen_from(here: Host, lease: LeaseEvidence) -> LeaseEvidence:
    """Return the lease without its pid where that means nothing: in another pid namespace. Its
    marks mean the same everywhere; what bears them there and can be seen from here is ours."""
    if lease.pid_namespace == here.pid_namespace:
        return lease
    return replace(lease, pid=None, start_ticks=None)


NOTHING_LEFT: Final = Ending(gone=True)
"""Of a lease whose processes are all gone before anybody looks."""


@dataclass(slots=True, kw_only=True, eq=False)
class _Held:
    """A process pinned by an open pidfd: whatever becomes of its pid, this is it.

    `proved` is set by the first evidence that was read while the pidfd was open.
    """

    hit: Hit
    run_key: int
    pidfd: int
    is_shim: bool
    proved: bool = False
    alive: bool = True
    sent: set[signal.Signals] = field(default_factory=set)
    barred: bool = False

    def release(self) -> None:
        """Note its end. A dead process needs no descriptor."""
        if self.alive:
            self.alive = False
            os.close(self.pidfd)


@dataclass(slots=True, kw_only=True, eq=False)
class _Tree:
    """What the sweep knows of one lease."""

    lease: LeaseEvidence
    held: dict[Identity, _Held] = field(default_factory=dict)
    unproved: dict[Identity, str] = field(default_factory=dict)
    doubts: list[Doubt] = field(default_factory=list)
    empty_scans: int = 0
    empty_since: float = 0.0

    @property
    def living(self) -> list[_Held]:
        """Who is alive, the shim aside."""
        return [held for held in self.held.values() if held.alive and not held.is_shim]

    @property
    def shim(self) -> _Held | None:
        """The shim, while it lives."""
        return next((h for h in self.held.values() if h.alive and h.is_shim), None)

    def note(self, *, began: float, busy: bool) -> None:
        """Count a scan that began at `began` and found somebody alive, or nobody."""
        if busy:
            self.empty_scans = 0
            return
        self.empty_since = self.empty_since if self.empty_scans else began
        self.empty_scans += 1

    def empty(self, now: float) -> bool:
        """True when enough scans over enough time found nobody but the shim."""
        scans, span_s = (CERTAIN_SCANS, CERTAIN_S) if self.held else (UNTOUCHED_SCANS, UNTOUCHED_S)
        return self.empty_scans >= scans and now - self.empty_since >= span_s

    def certain(self, now: float) -> bool:
        """True when nothing of it is left."""
        return self.empty(now) and (not self.held or self.shim is None)

    @property
    def hopeless(self) -> bool:
        """True when all that lives was sent SIGKILL and may not be signalled by us."""
        living = self.living or [shim for shim in (self.shim,) if shim is not None]
        return bool(living) and all(h.barred and signal.SIGKILL in h.sent for h in living)

    def ending(self, now: float) -> Ending:
        """Sum up."""
        if not (self.held or self.unproved or self.doubts) and self.certain(now):
            return NOTHING_LEFT  # of thousands of leases, nearly all
        agents = {ident: held for ident, held in self.held.items() if not held.is_shim}
        dead = frozenset(ident for ident, held in agents.items() if not held.alive)
        lonely = [self.shim] if self.shim is not None and not self.living else []
        refused = [*map(_why_alive, self.living), *map(_why_alive, lonely), *self._doubtful()]
        if not refused and not self.certain(now):
            refused.append(
                f"lease {self.lease.lease_key}: the deadline passed before it was certain"
                " that nothing is left"
            )
        return Ending(
            found=len(agents),
            ended=len(dead),
            dead=dead,
            refused=tuple(refused),
            orphans=tuple(map(_orphan, agents.values())),
            gone=not refused,
        )

    def _doubtful(self) -> Iterator[str]:
        yield from (f"pid {doubt.pid} {doubt.why}" for doubt in self.doubts)
        for identity, why in self.unproved.items():
            proc = procfs.read_proc(identity[0])
            if proc is not None and proc.identity == identity and not proc.dead:
                yield f"pid {proc.pid} {why}"


def _orphan(held: _Held) -> Orphan:
    return Orphan(
        pid=held.hit.proc.pid,
        evidence=held.hit.kind.value,
        signals=tuple(number.name for number in _IN_ORDER if number in held.sent),
        ended=not held.alive,
        by=BY_SERVICE,
    )


def _why_alive(held: _Held) -> str:
    proc = held.hit.proc
    if held.barred:
        return f"pid {proc.pid} ({held.hit.kind}) may not be signalled by this user"
    now = procfs.read_proc(proc.pid)
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
        why: str,
        grace_s: float,
        deadline_s: float,
    ) -> None:
        self._trees = {lease.lease_key: _Tree(lease=lease) for lease in leases}
        self._marks = Marks(leases)
        self._clock = clock
        self._why = why
        start = clock()
        self._grace_s = min(grace_s, max(deadline_s - KILLING_S, deadline_s / 2))
        # A grace counts from the first look: who was not asked has had none.
        self._kill_at = math.inf if self._grace_s else start
        self._deadline_s = deadline_s
        self._stop_at = start + deadline_s
        self._freezes = 0
        self._shield: frozenset[int] = frozenset()
        self._seen: frozenset[int] = frozenset()
        # Scans need descriptors too, and so does the service around us: what is over a quarter
        # waits until others have ended.
        self._most = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._room = self._most

    def __enter__(self) -> _Sweep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing frozen and no descriptor open, whatever happened."""
        for held in self._pinned():
            if signal.SIGSTOP in held.sent and signal.SIGKILL not in held.sent:
                self._signal(held, signal.SIGKILL)
            held.release()

    def run(self) -> dict[int, Ending]:
        """Look, act, wait; until every tree is settled or the deadline has passed."""
        self._look()
        reserved = self._stop_at - min(KILLING_S, self._deadline_s / 2)
        self._kill_at = min(self._clock() + self._grace_s, reserved)
        while not self._settled() and self._clock() < self._stop_at:
            self._act()
            self._wait()
            self._look()
        if not self._settled():
            self._kill_whoever_is_left()
        now = self._clock()
        return {key: tree.ending(now) for key, tree in self._trees.items()}

    def _kill_whoever_is_left(self) -> None:
        """At the deadline, however little of it the looks have left for acting: nobody who is
        proved goes on for want of time."""
        for held in self._living():
            if signal.SIGKILL not in held.sent:
                self._signal(held, signal.SIGKILL)
        self._mark_dead(LAST_S)
        self._look()

    def _living(self) -> list[_Held]:
        return [held for tree in self._trees.values() if tree.held for held in tree.living]

    def _shims(self) -> list[_Held]:
        shims = (tree.shim for tree in self._trees.values() if tree.held)
        return [shim for shim in shims if shim is not None]

    def _pinned(self) -> list[_Held]:
        return [*self._living(), *self._shims()]

    @property
    def _killing(self) -> bool:
        return self._clock() >= self._kill_at

    def _settled(self) -> bool:
        now = self._clock()
        return all(tree.certain(now) or tree.hopeless for tree in self._trees.values())

    # -- looking -------------------------------------------------------------------------------

    def _look(self) -> None:
        """Scan once: hold who is new, mark who has died, count the empty ones."""
        began = self._clock()
        self._room = self._most - len(self._pinned())
        try:
            busy = self._hold_newcomers()
        except OSError as error:
            # Blind for want of descriptors or memory is not the same as empty.
            if error.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOMEM}:
                raise
            busy = set(self._trees)
        self._mark_dead(0.0)
        for key, tree in self._trees.items():
            tree.note(began=began, busy=key in busy or bool(tree.held and tree.living))

    def _hold_newcomers(self) -> set[int]:
        """Pin and prove everybody not held yet; return the leases that need another look."""
        snapshot, roots = self._scan()
        self._shield = shielded(snapshot, own_pid=os.getpid())
        seen = members(snapshot, roots, shield=self._shield)
        known = self._known()
        newcomers = [
            hit
            for hit in seen.hits.values()
            if not hit.proc.dead and hit.proc.identity not in known
        ]
        pinned = [held for held in map(self._pin, newcomers) if held is not None]
        self._prove(pinned, seen)
        self._note_doubts(seen.doubts)
        return {hit.lease_key for hit in newcomers if not self._is_shim(hit)}

    def _scan(self) -> tuple[dict[int, Proc], dict[int, Hit]]:
        """Read every process and who of them bears a mark or is held."""
        known = self._known()
        if not self._shield:
            self._shield = shielded(procfs.scan(), own_pid=os.getpid())
        snapshot: dict[int, Proc] = {}
        roots: dict[int, Hit] = {}
        for pid in self._everybody():
            proc = procfs.read_proc(pid)
            if proc is None:
                continue
            snapshot[pid] = proc
            hit = self._root(proc, known)
            if hit is not None:
                roots[pid] = hit
                self._freeze_on_sight(hit, known)
        self._seen = frozenset(snapshot)
        return snapshot, roots

    def _everybody(self) -> Iterator[int]:
        """Yield all pids, and then those that have appeared meanwhile, until a look at the list
        shows no new one: who forks and exits all the time is somewhere in each list, but may be
        gone when his turn comes. The newest first, before they do it again."""
        read: set[int] = set()
        until = time.monotonic() + CHASE_S
        for chase in range(_CHASES):
            new = set(procfs.pids()) - read
            if not new or (chase >= _CHASES_AT_LEAST and time.monotonic() > until):
                return
            read |= new
            yield from sorted(new, key=lambda pid: (pid in self._seen, -pid))

    def _root(self, proc: Proc, known: Mapping[Identity, int]) -> Hit | None:
        key = known.get(proc.identity)
        if key is not None:
            return Hit(proc=proc, lease_key=key, kind=Evidence.HELD)
        return self._marks.read(proc)

    def _freeze_on_sight(self, hit: Hit, known: Mapping[Identity, int]) -> None:
        """Stop a newcomer at once when killing: by the end of the scan it may have forked on."""
        new = hit.proc.identity not in known and not hit.proc.dead
        if self._killing and new and hit.proc.pid not in self._shield and not self._is_shim(hit):
            held = self._pin(hit)
            if held is not None:
                self._signal(held, signal.SIGSTOP)

    def _known(self) -> dict[Identity, int]:
        return {ident: key for key, tree in self._trees.items() for ident in tree.held}

    def _is_shim(self, hit: Hit) -> bool:
        lease = self._trees[hit.lease_key].lease
        return hit.proc.identity == (lease.pid, lease.start_ticks)

    def _pin(self, hit: Hit) -> _Held | None:
        """Open a pidfd, if there is room; else the next scan finds the process again."""
        tree = self._trees[hit.lease_key]
        if hit.proc.identity in tree.held:
            return tree.held[hit.proc.identity]
        if self._room <= 0:
            return None
        try:
            pidfd = os.pidfd_open(hit.proc.pid)
        except OSError:  # gone, or no descriptor left
            return None
        held = _Held(hit=hit, run_key=tree.lease.run_key, pidfd=pidfd, is_shim=self._is_shim(hit))
        tree.held[hit.proc.identity] = held
        self._room -= 1
        return held

    def _prove(self, pinned: Collection[_Held], seen: Membership) -> None:
        """Read the evidence of the newly pinned again, all of it before the first signal: with
        the first parent that dies, its children's descent can be read no more."""
        fresh = [held for held in pinned if not held.proved]
        if not fresh:
            return
        snapshot = procfs.scan(list(seen.hits))
        known = {ident: key for ident, key in self._known().items() if self._is_proved(ident, key)}
        roots = {pid: hit for pid, proc in snapshot.items() if (hit := self._root(proc, known))}
        proof = members(snapshot, roots, shield=self._shield)
        for held in fresh:
            again = proof.hits.get(held.hit.proc.pid)
            same = again is not None and again.proc.identity == held.hit.proc.identity
            if again is not None and same and again.lease_key == held.hit.lease_key:
                held.hit, held.proved = again, True
                self._trees[again.lease_key].unproved.pop(again.proc.identity, None)
            else:
                self._let_go(held)

    def _is_proved(self, identity: Identity, lease_key: int) -> bool:
        return self._trees[lease_key].held[identity].proved

    def _let_go(self, held: _Held) -> None:
        """Forget somebody whose evidence could not be read again, and remember to tell."""
        tree = self._trees[held.hit.lease_key]
        held.release()
        tree.held.pop(held.hit.proc.identity, None)
        tree.unproved[held.hit.proc.identity] = (
            f"was seen with evidence ({held.hit.kind}) that was gone when it was read again"
        )

    def _note_doubts(self, doubts: Collection[Doubt]) -> None:
        for tree in self._trees.values():
            if tree.doubts:
                tree.doubts = []
        for doubt in doubts:
            self._trees[doubt.lease_key].doubts.append(doubt)

    # -- acting --------------------------------------------------------------------------------

    def _act(self) -> None:
        living = self._living()
        if not self._killing:
            for held in living:
                self._ask(held)
        else:
            self._freeze_then_kill(living)
        self._end_lonely_shims()

    def _ask(self, held: _Held) -> None:
        if signal.SIGTERM in held.sent:
            return
        self._signal(held, signal.SIGTERM)
        if held.hit.proc.state == "T":
            self._signal(held, signal.SIGCONT)  # a stopped process could not act on the SIGTERM

    def _freeze_then_kill(self, living: list[_Held]) -> None:
        """Stop everybody until a scan finds nobody new, then kill: the dead hide their children."""
        moving = [held for held in living if signal.SIGSTOP not in held.sent]
        for held in moving:
            self._signal(held, signal.SIGSTOP)
        self._freezes = self._freezes + 1 if moving else _FREEZES
        if self._freezes < _FREEZES:
            return
        self._freezes = 0
        for held in living:
            if signal.SIGKILL not in held.sent:
                self._signal(held, signal.SIGKILL)

    def _end_lonely_shims(self) -> None:
        """A shim that has nothing to guard and does not go is hung, or was stopped."""
        now = self._clock()
        for tree in self._trees.values():
            shim = tree.shim if tree.held else None
            if shim is None or not tree.empty(now) or now - tree.empty_since < LONELY_SHIM_S:
                continue
            if signal.SIGKILL not in shim.sent:
                self._signal(shim, signal.SIGKILL)

    def _signal(self, held: _Held, number: signal.Signals) -> None:
        held.sent.add(number)
        outcome = signals.send(
            held.hit.proc.pid,
            held.pidfd,
            number,
            prove=lambda: self._evidence_now(held),
            audit=lambda *facts: self._audit(held, *facts),
        )
        if outcome == signals.UNPROVED:
            held.sent.discard(number)
            if not held.proved:
                self._let_go(held)
        held.barred = held.barred or outcome == signals.BARRED

    def _evidence_now(self, held: _Held) -> str | None:
        """Read what proves a pinned process. What was proved under this pidfd stays proved, for
        as long as the pid is still this process: a mark may be wiped off meanwhile."""
        proc = procfs.read_proc(held.hit.proc.pid)
        if proc is None or proc.identity != held.hit.proc.identity:
            return None
        again = self._marks.read(proc)
        if again is not None and again.lease_key == held.hit.lease_key:
            held.proved = True
            return again.kind.value
        return held.hit.kind.value if held.proved else None

    def _audit(self, held: _Held, pid: int, name: str, evidence: str | None, outcome: str) -> None:
        facts = {
            "pid": pid, "signal": name, "lease": held.hit.lease_key, "run": held.run_key,
            "why": self._why, "evidence": evidence, "outcome": outcome,
        }  # fmt: skip
        if outcome == signals.BARRED:
            log.warning("process.signal_refused", **facts)
        elif outcome == signals.UNPROVED:
            log.info("process.signal_withheld", **facts)
        else:
            log.info("process.signalled", **facts)

    # -- waiting -------------------------------------------------------------------------------

    def _wait(self) -> None:
        """Wait for deaths while somebody should be dying, else for the next scan."""
        now = self._clock()
        left_s = max(0.0, self._stop_at - now)
        living = self._living()
        if not living:
            self._mark_dead(min(TICK_S, left_s), at_least=True)
        elif now < self._kill_at:
            self._mark_dead(min(GRACE_TICK_S, self._kill_at - now, left_s))
        elif all(signal.SIGKILL in held.sent for held in living):
            self._mark_dead(min(TICK_S, left_s))

    def _mark_dead(self, timeout_s: float, *, at_least: bool = False) -> None:
        """Note who has died. A zombie's pidfd is readable.

        Args:
            timeout_s: wait so long for all of them to.
            at_least: wait so long even if nobody is left to wait for.
        """
        by_fd = {held.pidfd: held for held in self._pinned()}
        poll = select.poll()
        for pidfd in by_fd:
            poll.register(pidfd, select.POLLIN)
        until = self._clock() + timeout_s
        while by_fd or at_least:
            # Rounded up: a remainder below one millisecond must not spin.
            wait_ms = math.ceil(max(0.0, until - self._clock()) * 1000)
            for pidfd, _ in poll.poll(wait_ms):
                poll.unregister(pidfd)
                by_fd.pop(pidfd).release()
            if self._clock() >= until:
                return
