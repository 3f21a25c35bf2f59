"""Finds the processes that belong to each launch. It makes no decision and sends no signal.

A launch has up to four markers, strongest first:

- the watermark: a random limit on file locks. Every descendant inherits it, and only a privileged
  process can raise it.
- the cookie: a random token in the environment.
- the launch's own cgroup.
- pid and start ticks of the recorded shim.

A process belongs to a launch if it carries a marker or descends from a process that does. Any other
process is never signalled.

Two kinds of processes are missed. The first lost its parents, cleaned its environment *and* lowered
its limit on purpose. The second is hidden from the service's user by a `hidepid` mount of /proc.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import field
from enum import StrEnum
from typing import Final, TypeAlias

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import procfs
from runrecovery_service.process.host import Host
from runrecovery_service.process.procfs import Proc

COOKIE_VARIABLE: Final = "RUNRECOVERY_LEASE"
_COOKIE_ENTRY: Final = COOKIE_VARIABLE.encode() + b"="
_COOKIE: Final = re.compile(r"[0-9a-f]{32}")

Identity: TypeAlias = tuple[int, int]
"""Pid and start ticks: one process of one boot (a pid is not reused within a 10 ms tick)."""


class Proof(StrEnum):
    """The marker that proves that a process belongs to a launch."""

    SHIM = "shim"
    """The process has the pid and start ticks of the recorded shim."""
    WATERMARK = "watermark"
    """The process's limit on file locks is the launch's watermark."""
    COOKIE = "cookie"
    """The process's environment contains the launch's whole token."""
    CGROUP = "cgroup"
    """The process is in the launch's own cgroup."""
    PINNED = "pinned"
    """An earlier scan of the same sweep has pinned the process."""
    DESCENT = "descent"
    """The process's parent belongs to the launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchMarkers:
    """The markers of one launch, as its launch record has them.

    Attributes:
        launch_key: integer key of the launch record.
        run_key: integer key of the run.
        cookie: 128 random bits, 32 hex digits. A secret: never log it.
        watermark: a random number of up to 62 bits; None for a launch without one.
        cgroup: path of the launch's own cgroup below the mount; None for a launch without one.
        pid, start_ticks: those of the shim; None if the launch ended before they were recorded.
        host: the host, boot and pid namespace of the launch.
    """

    launch_key: int
    run_key: int
    cookie: str = field(repr=False)
    watermark: int | None = field(default=None, repr=False)
    cgroup: str | None = None
    pid: int | None
    start_ticks: int | None
    host: Host

    @property
    def token(self) -> str:
        """The value of `COOKIE_VARIABLE` in the environment of the launched processes."""
        return launch_token(self.launch_key, self.cookie)


def launch_token(launch_key: int, cookie: str) -> str:
    """Return the value of `COOKIE_VARIABLE` for a launch: `<launch key in hex>.<cookie>`."""
    return f"{launch_key:x}.{cookie}"


def read_token(proc: Proc) -> str | None:
    """Return the launch token in the environment of a process, or None."""
    environment = procfs.environment(proc.pid, proc)
    if _COOKIE_ENTRY not in environment:
        return None
    for entry in environment.split(b"\0"):
        if entry.startswith(_COOKIE_ENTRY):
            return entry.removeprefix(_COOKIE_ENTRY).decode("ascii", "replace")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process that is proved to belong to a launch."""

    proc: Proc
    launch_key: int
    proof: Proof


class MarkerIndex:
    """The markers of many launches, indexed to find the launch of a process."""

    def __init__(self, launches: Collection[LaunchMarkers]) -> None:
        self._shims: dict[Identity, int] = {}
        self._watermarks: dict[int, int] = {}
        self._tokens: dict[str, int] = {}
        self._cgroups: dict[str, int] = {}
        for launch in launches:
            key = launch.launch_key
            if launch.pid is not None and launch.start_ticks is not None:
                self._shims[launch.pid, launch.start_ticks] = key
            if launch.watermark:
                self._watermarks[launch.watermark] = key
            if _COOKIE.fullmatch(launch.cookie):
                self._tokens[launch.token] = key
            if launch.cgroup and launch.cgroup != "/":
                self._cgroups[launch.cgroup] = key

    def find_member(self, proc: Proc) -> Member | None:
        """Return the process as a member of its launch; None if it carries none of the markers."""
        found = next(((key, by) for key, by in self._candidates(proc) if key is not None), None)
        return None if found is None else Member(proc=proc, launch_key=found[0], proof=found[1])

    def _candidates(self, proc: Proc) -> Iterator[tuple[int | None, Proof]]:
        """Yield a launch key for each kind of marker, lazily, the cheapest and strongest first."""
        yield self._shims.get(proc.identity), Proof.SHIM
        if proc.dead or proc.of_kernel:
            return
        watermark = procfs.watermark(proc.pid) if self._watermarks else None
        yield None if watermark is None else self._watermarks.get(watermark), Proof.WATERMARK
        token = read_token(proc)
        yield None if token is None else self._tokens.get(token), Proof.COOKIE
        if self._cgroups:
            yield self._launch_of_cgroup(procfs.cgroup(proc.pid)), Proof.CGROUP

    def _launch_of_cgroup(self, path: str) -> int | None:
        """Return the launch whose cgroup is `path` or above it. Agents can make cgroups below."""
        while path and path != "/":
            if path in self._cgroups:
                return self._cgroups[path]
            path = path.rpartition("/")[0]
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectedMember:
    """A living process that carries a launch's marker but must not be signalled."""

    pid: int
    launch_key: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """The processes of some launches. `members` is keyed by pid and includes zombies."""

    members: dict[int, Member]
    protected: tuple[ProtectedMember, ...]


def protected_pids(snapshot: Mapping[int, Proc], *, own_pid: int) -> frozenset[int]:
    """Return the pids that are never signalled: 1, this process, its ancestors and its group."""
    found = {1, own_pid}
    own = snapshot.get(own_pid)
    if own is not None:
        found.update(proc.pid for proc in snapshot.values() if proc.group == own.group)
        above = own.ppid
        while above in snapshot and above not in found:
            found.add(above)
            above = snapshot[above].ppid
    return frozenset(found)


def find_members(
    snapshot: Mapping[int, Proc], roots: Mapping[int, Member], *, protected: frozenset[int]
) -> Membership:
    """Return the roots and all their descendants. Pure.

    Args:
        roots: by pid, the processes that carry a marker, or that an earlier scan has pinned.
        protected: pids that are never members, and through which no descent passes.
    """
    members = {pid: member for pid, member in roots.items() if pid not in protected}
    children: dict[int, list[Proc]] = {}
    for proc in snapshot.values():
        children.setdefault(proc.ppid, []).append(proc)
    queue = deque(members.values())
    while queue:
        parent = queue.popleft()
        for child in children.get(parent.proc.pid, ()):
            # A process that is older than its parent is no child of it: the parent's pid was reused
            # between the two reads.
            older = child.start_ticks < parent.proc.start_ticks
            if older or child.pid in members or child.pid in protected:
                continue
            members[child.pid] = Member(
                proc=child, launch_key=parent.launch_key, proof=Proof.DESCENT
            )
            queue.append(members[child.pid])
    marked = (member for pid, member in roots.items() if pid in protected)
    return Membership(members=members, protected=tuple(_protected_members(marked)))


def _protected_members(members: Iterable[Member]) -> Iterator[ProtectedMember]:
    for member in members:
        yield ProtectedMember(
            pid=member.proc.pid,
            launch_key=member.launch_key,
            why=f"carries the launch's marker ({member.proof}) but is this service, an ancestor"
            " of it or in its process group",
        )
