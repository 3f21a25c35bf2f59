"""Which processes belong to which lease. Reads /proc and decides; signals nothing. Linux only.

Evidence, strongest first: pid and start ticks of the recorded leader; the lease's full cookie in
the environment; the session of a verified process; descent from one. What none of these proves
but a number hints at is a doubt: reported, never signalled.

Blind spots: a descendant that left its session, lost its parents *and* cleaned its environment;
and processes that a `hidepid` mount of /proc hides from the service's user.
"""

from __future__ import annotations

import os
import re
import socket
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, TypeAlias

COOKIE_VARIABLE: Final = "RUNRECOVERY_LEASE"
_MARK: Final = COOKIE_VARIABLE.encode() + b"="
_COOKIE: Final = re.compile(r"[0-9a-f]{32}")

Identity: TypeAlias = tuple[int, int]
"""Pid and start ticks: one process of one boot (a pid is not reused within a 10 ms tick)."""


class Evidence(StrEnum):
    """Why a process is held to belong to a lease."""

    LEADER = "leader"
    """Its pid and start ticks are the recorded ones."""
    COOKIE = "cookie"
    """Its environment bears the lease's full token."""
    HELD = "held"
    """It was verified earlier in the same sweep."""
    SESSION = "session"
    """A verified process leads its session, or shares the session that the leader made."""
    DESCENT = "descent"
    """Its parent is verified."""


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
    """What a lease row says of its process.

    Attributes:
        lease_key: the row's integer key.
        run_key: the run it was launched for.
        cookie: 128 random bits, 32 hex digits. A secret: never log it.
        pid, start_ticks: of the leader; None when the launch did not get as far as recording them.
    """

    lease_key: int
    run_key: int
    cookie: str = field(repr=False)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Proc:
    """One line of the process table. `start_ticks` counts 10 ms ticks since boot, raw."""

    pid: int
    ppid: int
    group: int
    session: int
    start_ticks: int
    state: str
    threads: int

    @property
    def identity(self) -> Identity:
        """Tells it from a later process with the same pid."""
        return self.pid, self.start_ticks

    @property
    def dead(self) -> bool:
        """True for a zombie. One whose other threads live is a process without its first thread."""
        return self.state in "ZXx" and self.threads <= 1


def read_proc(pid: int) -> Proc | None:
    """Read one process; None when there is none (or /proc hides it)."""
    raw = _read(f"/proc/{pid}/stat")
    return _parse(pid, raw) if raw else None


def scan(pids: Iterable[int] | None = None) -> dict[int, Proc]:
    """Read the process table, or only these pids of it.

    Not atomic: a process forked meanwhile may be missing, so one empty scan proves nothing.

    Raises:
        OSError: /proc could not be read (no file descriptor left, not Linux).
    """
    found = (read_proc(pid) for pid in (_all_pids() if pids is None else pids))
    return {proc.pid: proc for proc in found if proc is not None}


def cookie_of(pid: int) -> str | None:
    """Return the lease token in the environment of `pid`; None without one, or if unreadable."""
    return _token(_read(f"/proc/{pid}/environ"))


def cookies(snapshot: Mapping[int, Proc]) -> dict[int, str]:
    """Return the lease tokens of the living processes of a snapshot, by pid."""
    found = ((proc.pid, _token(_environment(proc))) for proc in snapshot.values() if not proc.dead)
    return {pid: token for pid, token in found if token is not None}


def _environment(proc: Proc) -> bytes:
    if proc.state not in "ZXx":
        return _read(f"/proc/{proc.pid}/environ")
    # The first thread has ended and with it this file; the other threads still have theirs.
    try:
        threads = os.scandir(f"/proc/{proc.pid}/task")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    with threads:
        return next(filter(None, (_read(f"{task.path}/environ") for task in threads)), b"")


def _token(environment: bytes) -> str | None:
    if _MARK not in environment:
        return None
    for entry in environment.split(b"\0"):
        if entry.startswith(_MARK):
            return entry.removeprefix(_MARK).decode("ascii", "replace")
    return None


def _all_pids() -> Iterator[int]:
    with os.scandir("/proc") as entries:
        yield from [int(entry.name) for entry in entries if entry.name.isdigit()]


def _read(path: str) -> bytes:
    """Read a file of /proc; empty when its process is gone or not ours to look into.

    Every other error is raised: a scan that could not look must not look like an empty one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    try:
        return b"".join(iter(lambda: os.read(fd, 65536), b""))
    except (ProcessLookupError, PermissionError):
        return b""
    finally:
        os.close(fd)


def _parse(pid: int, raw: bytes) -> Proc:
    # The second field is the program's own choice of name, parentheses and spaces included:
    # the fields after it begin behind the last ")". proc(5) counts them from 3.
    fields = raw[raw.rindex(b")") + 1 :].split()
    return Proc(
        pid=pid,
        state=fields[0].decode("ascii"),
        ppid=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A process that is proved to belong to a lease."""

    proc: Proc
    lease_key: int
    kind: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A living process that may belong to a lease; nothing proves it, so nobody may signal it."""

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
    snapshot: Mapping[int, Proc],
    leases: Collection[LeaseEvidence],
    tokens: Mapping[int, str],
    *,
    held: Mapping[Identity, int],
    shield: frozenset[int],
) -> Membership:
    """Decide which processes of a snapshot belong to which lease. Pure.

    Args:
        leases: of this host, boot and pid namespace only; elsewhere their pids mean nothing.
        tokens: `cookies(snapshot)`.
        held: processes verified earlier, with their lease; their kin count as kin of the lease.
        shield: pids that are never members and through which no kinship passes.
    """
    by_key = {lease.lease_key: lease for lease in leases}
    kinship = _Kinship(snapshot)
    roots = _roots(snapshot, by_key, tokens, held)
    hits = {pid: hit for pid, hit in roots.items() if pid not in shield}
    queue = deque(hits.values())
    while queue:
        hit = queue.popleft()
        for proc, kind in kinship.of(hit.proc, by_key[hit.lease_key]):
            if proc.pid not in hits and proc.pid not in shield:
                hits[proc.pid] = Hit(proc=proc, lease_key=hit.lease_key, kind=kind)
                queue.append(hits[proc.pid])
    ours = [hit for pid, hit in roots.items() if pid in shield]
    doubts = (*_shield_doubts(ours), *kinship.doubts(by_key, hits, shield))
    return Membership(hits=hits, doubts=doubts)


def _roots(
    snapshot: Mapping[int, Proc],
    leases: Mapping[int, LeaseEvidence],
    tokens: Mapping[int, str],
    held: Mapping[Identity, int],
) -> dict[int, Hit]:
    """Find the processes that prove themselves."""
    leaders = {(lease.pid, lease.start_ticks): key for key, lease in leases.items()}
    bearers = {lease.token: key for key, lease in leases.items() if _COOKIE.fullmatch(lease.cookie)}
    found: dict[int, Hit] = {}
    for pid, proc in snapshot.items():
        for key, kind in (
            (leaders.get(proc.identity), Evidence.LEADER),
            (bearers.get(tokens.get(pid, "")), Evidence.COOKIE),
            (held.get(proc.identity), Evidence.HELD),
        ):
            if key in leases and key is not None:
                found[pid] = Hit(proc=proc, lease_key=key, kind=kind)
                break
    return found


def _shield_doubts(hits: Iterable[Hit]) -> Iterator[Doubt]:
    for hit in hits:
        yield Doubt(
            pid=hit.proc.pid,
            lease_key=hit.lease_key,
            why=f"bears the lease's evidence ({hit.kind}) but is this service, an ancestor"
            " or in its process group",
        )


class _Kinship:
    """The children and sessions of a snapshot."""

    def __init__(self, snapshot: Mapping[int, Proc]) -> None:
        self._snapshot = snapshot
        self._children: dict[int, list[Proc]] = {}
        self._sessions: dict[int, list[Proc]] = {}
        for proc in snapshot.values():
            self._children.setdefault(proc.ppid, []).append(proc)
            self._sessions.setdefault(proc.session, []).append(proc)

    def of(self, member: Proc, lease: LeaseEvidence) -> Iterator[tuple[Proc, Evidence]]:
        """Yield who is proved by `member` being proved. Kin is never older than its proof."""
        for child in self._children.get(member.pid, ()):
            if child.start_ticks >= member.start_ticks:
                yield child, Evidence.DESCENT
        since = self._session_is_ours_since(member, lease)
        if since is not None:
            for mate in self._sessions[member.session]:
                if mate.start_ticks >= since:
                    yield mate, Evidence.SESSION

    def _session_is_ours_since(self, member: Proc, lease: LeaseEvidence) -> int | None:
        """Return the start ticks of the session's maker, if the whole session is the lease's.

        A session's number is not given to a new process while anyone lives in the session. So it
        is ours while its maker is a verified process (a zombie too), and when a verified process
        still lives in the session that the recorded leader made. A verified process in any other
        session proves nothing: somebody may have copied our environment into his own shell.
        """
        if member.session == member.pid:
            return member.start_ticks
        if member.session == lease.pid and not self._number_is_taken(lease):
            return lease.start_ticks
        return None

    def _number_is_taken(self, lease: LeaseEvidence) -> bool:
        """True when the leader's pid is somebody else's now: then its whole session had ended."""
        proc = None if lease.pid is None else self._snapshot.get(lease.pid)
        return proc is not None and proc.start_ticks != lease.start_ticks

    def doubts(
        self,
        leases: Mapping[int, LeaseEvidence],
        hits: Mapping[int, Hit],
        shield: frozenset[int],
    ) -> Iterator[Doubt]:
        """Yield who lives in a session with a recorded number whose maker is gone."""
        for key, lease in leases.items():
            if lease.pid is None or lease.start_ticks is None or self._number_is_taken(lease):
                continue
            for mate in self._sessions.get(lease.pid, ()):
                unproved = mate.pid not in hits and mate.pid not in shield and not mate.dead
                if unproved and mate.start_ticks >= lease.start_ticks:
                    yield Doubt(
                        pid=mate.pid,
                        lease_key=key,
                        why=f"is in session {lease.pid}, whose maker has ended; nothing proves"
                        " that the session is still the lease's",
                    )
