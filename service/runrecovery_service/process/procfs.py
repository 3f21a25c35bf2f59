"""Reads and parses the files of processes in /proc.

The shim imports this module too, so it imports only light modules of the standard library.
"""

from __future__ import annotations

import os
import sys

RLIMIT_LOCKS = 10
"""The limit on file locks of setrlimit(2), which Python's `resource` does not name. Linux since 2.6
inherits and shows this limit but does not enforce it."""
MAX_ENVIRONMENT_BYTES = 2 << 20
"""How much of an environment is read. By default exec takes no larger one, but a process can claim
any size later."""
_PF_KTHREAD = 0x200000
"""The flag of a thread of the kernel (include/linux/sched.h)."""
_LOCKS = b"\nMax file locks"
_PIECE = 65536


class Proc:
    """One process, as /proc describes it.

    `start_ticks` is the raw start time, in 10 ms ticks since boot. `of_kernel` is True for a thread
    of the kernel, which runs no program and carries no marker.
    """

    __slots__ = ("group", "of_kernel", "pid", "ppid", "session", "start_ticks", "state", "threads")

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
        of_kernel: bool = False,
    ) -> None:
        self.pid = pid
        self.ppid = ppid
        self.group = group
        self.session = session
        self.start_ticks = start_ticks
        self.state = state
        self.threads = threads
        self.of_kernel = of_kernel

    @property
    def identity(self) -> tuple[int, int]:
        """The pid and start ticks. A later process with the same pid has other start ticks."""
        return self.pid, self.start_ticks

    @property
    def dead(self) -> bool:
        """True for a zombie, unless only its first thread has ended and other threads live."""
        return self.state in "ZXx" and self.threads <= 1

    def __repr__(self) -> str:
        return f"Proc(pid={self.pid}, start_ticks={self.start_ticks}, state={self.state!r})"


def read_proc(pid: int) -> Proc | None:
    """Return one process; None if there is none or /proc hides it."""
    raw = read(f"/proc/{pid}/stat")
    return _parse(pid, raw) if raw else None


def pids() -> list[int]:
    """Return every pid that /proc shows, in no particular order.

    Raises:
        OSError: /proc could not be read (no file descriptor left, not Linux).
    """
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - light


def scan(wanted: list[int] | None = None) -> dict[int, Proc]:
    """Return the processes of the system, or only the wanted pids.

    The scan is not atomic: a process that was forked meanwhile may be missing. So one empty scan
    proves nothing.

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
    """Return the limit on file locks of a process if soft and hard limit are the same number.

    None for other limits, for "unlimited" and for a process that has ended. Any user may read the
    limits of any process, even of one that is not dumpable.
    """
    _, found, rest = read(f"/proc/{pid}/limits").partition(_LOCKS)
    if not found:
        return None
    soft, hard, _ = rest.split(None, 2)
    return int(soft) if soft == hard and soft.isdigit() else None


def environment(pid: int, proc: Proc | None = None) -> bytes:
    """Return the start of a process's initial environment; empty if it cannot be read.

    Args:
        proc: the process, if it was read before. If its first thread has ended, the environment is
            read through another thread.
    """
    if proc is None or proc.state not in "ZXx":
        return read(f"/proc/{pid}/environ", most=MAX_ENVIRONMENT_BYTES)
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - light
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    for thread in threads:
        if found := read(f"/proc/{pid}/task/{thread}/environ", most=MAX_ENVIRONMENT_BYTES):
            return found
    return b""


def cgroup(pid: int) -> str:
    """Return the path of a process's cgroup (v2) below the mount; empty if there is none."""
    for line in read(f"/proc/{pid}/cgroup").splitlines():
        if line.startswith(b"0::"):
            return os.fsdecode(line[3:])
    return ""


def descendants(snapshot: dict[int, Proc], root: int) -> list[Proc]:
    """Return all descendants of `root` in a snapshot, parents before their children. Pure."""
    children: dict[int, list[Proc]] = {}
    for proc in snapshot.values():
        children.setdefault(proc.ppid, []).append(proc)
    found = list(children.get(root, ()))
    for proc in found:
        found += children.get(proc.pid, ())
    return found


def read(path: str, *, most: int = sys.maxsize) -> bytes:
    """Return about `most` bytes of a file of /proc; empty if they cannot be read.

    They cannot be read if the process has ended, or if this user may not read the file.

    Raises:
        OSError: any other error. A scan that failed must not be taken for an empty one.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
    pieces: list[bytes] = []
    try:
        while most > 0:
            pieces.append(piece := os.read(fd, _PIECE))
            most -= len(piece)
            if len(piece) < _PIECE:  # the end of the file: otherwise /proc fills the whole buffer
                break
    except (ProcessLookupError, PermissionError):
        return b""
    finally:
        os.close(fd)
    return b"".join(pieces)


def _parse(pid: int, raw: bytes) -> Proc:
    # The second field is a name that the program chose. It may contain parentheses and spaces, so
    # the next fields begin after the last ")". proc(5) counts them from 3.
    fields = raw[raw.rindex(b")") + 1 :].split(None, 20)
    return Proc(
        pid=pid,
        state=fields[0].decode("ascii"),
        ppid=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        of_kernel=bool(int(fields[6]) & _PF_KTHREAD),
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
    )
