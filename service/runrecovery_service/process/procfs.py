"""What /proc says of processes. Reads and parses; judges nothing.

The shim runs this too: the standard library only, and of that only what is light.
"""

from __future__ import annotations

import os
import sys

RLIMIT_LOCKS = 10
"""The limit on file locks, of setrlimit(2); Python's `resource` does not name it. Linux since 2.6
inherits and shows it, and enforces nothing by it."""
MOST_ENVIRONMENT = 2 << 20
"""Bytes. Exec takes no more than that by default; a process may claim any size afterwards."""
_LOCKS = b"Max file locks"


class Proc:
    """One line of the process table. `start_ticks` counts 10 ms ticks since boot, raw."""

    __slots__ = ("group", "pid", "ppid", "session", "start_ticks", "state", "threads")

    def __init__(
        self,
        *,
        pid: int,
        ppid: int,
        group: int,
        session: int,
        start_ticks: int,
        state: str,
        threads: int,
    ) -> None:
        self.pid = pid
        self.ppid = ppid
        self.group = group
        self.session = session
        self.start_ticks = start_ticks
        self.state = state
        self.threads = threads

    @property
    def identity(self) -> tuple[int, int]:
        """Tells it from a later process with the same pid (not reused within a 10 ms tick)."""
        return self.pid, self.start_ticks

    @property
    def dead(self) -> bool:
        """True for a zombie. One whose other threads live is a process without its first thread."""
        return self.state in "ZXx" and self.threads <= 1

    def __repr__(self) -> str:
        return f"Proc(pid={self.pid}, start_ticks={self.start_ticks}, state={self.state!r})"


def read_proc(pid: int) -> Proc | None:
    """Read one process; None when there is none (or /proc hides it)."""
    raw = read(f"/proc/{pid}/stat")
    return _parse(pid, raw) if raw else None


def pids() -> list[int]:
    """Return every pid that /proc shows, in no order.

    Raises:
        OSError: /proc could not be read (no file descriptor left, not Linux).
    """
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - light


def scan(wanted: list[int] | None = None) -> dict[int, Proc]:
    """Read the process table, or only these pids of it.

    Not atomic: a process forked meanwhile may be missing, so one empty scan proves nothing.

    Raises:
        OSError: /proc could not be read.
    """
    found = {}
    for pid in pids() if wanted is None else wanted:
        proc = read_proc(pid)
        if proc is not None:
            found[pid] = proc
    return found


def watermark(pid: int) -> int | None:
    """Return the limit on file locks of a process if it is one number, soft and hard, below
    "unlimited"; else, and for a process that is gone, None.

    Any user may read it of any process, dumpable or not.
    """
    for line in read(f"/proc/{pid}/limits").splitlines():
        if line.startswith(_LOCKS):
            soft, hard, *_ = line[len(_LOCKS) :].split()
            return int(soft) if soft == hard and soft.isdigit() else None
    return None


def environment(pid: int, proc: Proc | None = None) -> bytes:
    """Return the environment that a process was started with, as far as it matters; empty when
    it may not be read.

    Args:
        proc: what is known of it; of one whose first thread has ended, another thread is asked.
    """
    if proc is None or proc.state not in "ZXx":
        return read(f"/proc/{pid}/environ", most=MOST_ENVIRONMENT)
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - light
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    for thread in threads:
        if found := read(f"/proc/{pid}/task/{thread}/environ", most=MOST_ENVIRONMENT):
            return found
    return b""


def cgroup(pid: int) -> str:
    """Return the path of a process's cgroup (v2) below the mount; empty when it is gone."""
    for line in read(f"/proc/{pid}/cgroup").splitlines():
        if line.startswith(b"0::"):
            return os.fsdecode(line[3:])
    return ""


def descendants(snapshot: dict[int, Proc], root: int) -> list[Proc]:
    """Return everybody below `root` in a snapshot, parents before their children. Pure."""
    children: dict[int, list[Proc]] = {}
    for proc in snapshot.values():
        children.setdefault(proc.ppid, []).append(proc)
    found = list(children.get(root, ()))
    for proc in found:
        found += children.get(proc.pid, ())
    return found


def read(path: str, *, most: int = sys.maxsize) -> bytes:
    """Read a file of /proc, about `most` bytes; empty when its process is gone or not ours to look
    into.

    Every other error is raised: a scan that could not look must not look like an empty one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    pieces: list[bytes] = []
    try:
        while most > 0 and (piece := os.read(fd, 65536)):
            pieces.append(piece)
            most -= len(piece)
    except (ProcessLookupError, PermissionError):
        return b""
    finally:
        os.close(fd)
    return b"".join(pieces)


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
