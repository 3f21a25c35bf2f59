"""Which processes belong to which lease. Decides; signals nothing. Linux only.

Evidence, strongest first: the lease's watermark (a random limit on file locks that every
descendant inherits and only a privileged one can raise), its full cookie in the environment, its
own cgroup, pid and start ticks of the recorded shim; and descent from a process that one of these
proves. What nothing proves is nobody's: it is not signalled.

Blind spot: a descendant that lost its parents, cleaned its environment *and* lowered its limit on
purpose; and processes that a `hidepid` mount of /proc hides from the service's user.
"""

from __future__ import annotations

import re
import socket
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias

from runrecovery_service.process import procfs
from runrecovery_service.process.procfs import Proc

COOKIE_VARIABLE: Final = "RUNRECOVERY_LEASE"
_MARK: Final = COOKIE_VARIABLE.encode() + b"="
_COOKIE: Final = re.compile(r"[0-9a-f]{32}")

Identity: TypeAlias = tuple[int, int]
"""Pid and start ticks: one process of one boot (a pid is not reused within a 10 ms tick)."""


class Evidence(StrEnum):
    """Why a process is held to belong to a lease."""

    SHIM = "shim"
    """Its pid and start ticks are the recorded ones."""
    WATERMARK = "watermark"
    """Its limit on file locks is the lease's number."""
    COOKIE = "cookie"
    """Its environment bears the lease's full token."""
    CGROUP = "cgroup"
    """It is in the lease's own cgroup."""
    HELD = "held"
    """It was proved earlier in the same sweep, and is still that process."""
    DESCENT = "descent"
    """Its parent is proved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where pids mean something: this machine, since this boot, in this pid namespace."""

    host_id: str
    boot_id: str
    pid_namespace: int

    @classmethod
    def here(cls) -> Host:
        """Read where this process runs.

        `host_id` is /etc/machine-id; where an image has none, the host name.

        Raises:
            OSError: there is no Linux /proc.
        """
        return cls(
            host_id=_machine_id() or socket.gethostname(),
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(),
            pid_namespace=Path("/proc/self/ns/pid").stat().st_ino,
        )


def _machine_id() -> str:
    try:
        text = Path("/etc/machine-id").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if text == "uninitialized" else text


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEvidence:
    """What a lease row says of its processes.

    Attributes:
        lease_key: the row's integer key.
        run_key: the run it was launched for.
        cookie: 128 random bits, 32 hex digits. A secret: never log it.
        watermark: a random number of up to 62 bits; None for a launch without one.
        cgroup: path of its own cgroup below the mount; None for a launch without one.
        pid, start_ticks: of the shim; None when the launch did not get as far as recording them.
    """

    lease_key: int
    run_key: int
    cookie: str = field(repr=False)
    watermark: int | None = field(default=None, repr=False)
    cgroup: str | None = None
    pid: int | None
    start_ticks: int | None
    boot_id: str
    pid_namespace: int
    host_id: str

    @property
    def token(self) -> str:
        """The value of `COOKIE_VARIABLE` in the environment of everything that it launches."""
        return lease_token(self.lease_key, self.cookie)


def lease_token(lease_key: int, cookie: str) -> str:
    """Return what a launch puts into `COOKIE_VARIABLE`: `<lease key in hex>.<cookie>`."""
    return f"{lease_key:x}.{cookie}"


def cookie_of(proc: Proc) -> str | None:
    """Return the lease token in the environment of a process; None without one."""
    environment = procfs.environment(proc.pid, proc)
    if _MARK not in environment:
        return None
    for entry in environment.split(b"\0"):
        if entry.startswith(_MARK):
            return entry.removeprefix(_MARK).decode("ascii", "replace")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A process that is proved to belong to a lease."""

    proc: Proc
    lease_key: int
    kind: Evidence


class Marks:
    """The marks of many leases, by which one process is looked up."""

    def __init__(self, leases: Collection[LeaseEvidence]) -> None:
        self._shims: dict[Identity, int] = {}
        self._watermarks: dict[int, int] = {}
        self._tokens: dict[str, int] = {}
        self._cgroups: dict[str, int] = {}
        for lease in leases:
            key = lease.lease_key
            if lease.pid is not None and lease.start_ticks is not None:
                self._shims[lease.pid, lease.start_ticks] = key
            if lease.watermark:
                self._watermarks[lease.watermark] = key
            if _COOKIE.fullmatch(lease.cookie):
                self._tokens[lease.token] = key
            if lease.cgroup and lease.cgroup != "/":
                self._cgroups[lease.cgroup] = key

    def read(self, proc: Proc) -> Hit | None:
        """Read what a process bears; None when it bears no mark of these leases."""
        found = next(((key, kind) for key, kind in self._candidates(proc) if key is not None), None)
        return None if found is None else Hit(proc=proc, lease_key=found[0], kind=found[1])

    def _cgroup_of(self, path: str) -> int | None:
        """Find whose cgroup it is, or lies in: an agent may make others in its own."""
        while path and path != "/":
            if path in self._cgroups:
                return self._cgroups[path]
            path = path.rpartition("/")[0]
        return None

    def _candidates(self, proc: Proc) -> Iterator[tuple[int | None, Evidence]]:
        """Yield the cheap and strong ones first; nothing is read that is not needed."""
        yield self._shims.get(proc.identity), Evidence.SHIM
        if proc.dead:
            return
        mark = procfs.watermark(proc.pid) if self._watermarks else None
        yield None if mark is None else self._watermarks.get(mark), Evidence.WATERMARK
        token = cookie_of(proc)
        yield None if token is None else self._tokens.get(token), Evidence.COOKIE
        if self._cgroups:
            yield self._cgroup_of(procfs.cgroup(proc.pid)), Evidence.CGROUP


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A living process that bears a lease's mark and yet must not be signalled."""

    pid: int
    lease_key: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who belongs to the leases that were asked for. `hits` is by pid and includes zombies."""

    hits: dict[int, Hit]
    doubts: tuple[Doubt, ...]


def shielded(snapshot: Mapping[int, Proc], *, own_pid: int) -> frozenset[int]:
    """Return who is never signalled, whatever it bears: pid 1, us, our ancestors, our group."""
    found = {1, own_pid}
    own = snapshot.get(own_pid)
    if own is not None:
        found.update(proc.pid for proc in snapshot.values() if proc.group == own.group)
        above = own.ppid
        while above in snapshot and above not in found:
            found.add(above)
            above = snapshot[above].ppid
    return frozenset(found)


def members(
    snapshot: Mapping[int, Proc], roots: Mapping[int, Hit], *, shield: frozenset[int]
) -> Membership:
    """Add to the processes that prove themselves those that descend from them. Pure.

    Args:
        roots: by pid, who bears a mark or is held.
        shield: pids that are never members and through which no descent passes.
    """
    hits = {pid: hit for pid, hit in roots.items() if pid not in shield}
    children: dict[int, list[Proc]] = {}
    for proc in snapshot.values():
        children.setdefault(proc.ppid, []).append(proc)
    queue = deque(hits.values())
    while queue:
        parent = queue.popleft()
        for child in children.get(parent.proc.pid, ()):
            # Nobody is older than his parent: such a pair is of two moments.
            older = child.start_ticks < parent.proc.start_ticks
            if older or child.pid in hits or child.pid in shield:
                continue
            hits[child.pid] = Hit(proc=child, lease_key=parent.lease_key, kind=Evidence.DESCENT)
            queue.append(hits[child.pid])
    ours = (hit for pid, hit in roots.items() if pid in shield)
    return Membership(hits=hits, doubts=tuple(_shield_doubts(ours)))


def _shield_doubts(hits: Iterable[Hit]) -> Iterator[Doubt]:
    for hit in hits:
        yield Doubt(
            pid=hit.proc.pid,
            lease_key=hit.lease_key,
            why=f"bears the lease's mark ({hit.kind}) but is this service, an ancestor"
            " or in its process group",
        )
