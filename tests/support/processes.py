"""Processes as /proc shows them, read without the code that is tested."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seen:
    """One process: a later one with the same pid has other start ticks."""

    pid: int
    start_ticks: int


def _fields(pid: int) -> list[str]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return []
    return stat[stat.rindex(")") + 2 :].split()


def seen(pid: int) -> Seen | None:
    """Return the process of this pid, None when it is dead or gone."""
    fields = _fields(pid)
    if not fields or fields[0] in "ZXx":
        return None
    return Seen(pid, int(fields[19]))


def is_alive(process: Seen) -> bool:
    """True while that very process lives."""
    return seen(process.pid) == process


def is_stopped(process: Seen) -> bool:
    """True while that very process is stopped by a signal."""
    return is_alive(process) and _fields(process.pid)[:1] == ["T"]


def open_files(pid: int) -> set[str]:
    """What a process's descriptors lead to now: paths, and names like `socket:[1]`."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            found.add(str(link.readlink()))
    return found


def lock_limit(pid: int) -> int | None:
    """Return a process's limit on file locks where that is a number."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/limits").read_text("ascii").splitlines():
            if line.startswith("Max file locks"):
                soft = line.split()[3]
                return int(soft) if soft.isdigit() else None
    return None


def bearers(watermark: int) -> list[int]:
    """Return the living processes whose limit on file locks is this number."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    return sorted(pid for pid in pids if lock_limit(pid) == watermark and seen(pid) is not None)


def strike(process: Seen, number: int) -> None:
    """Send a signal to that very process; fail when it does not live."""
    assert strike_if_alive(process, number)


def strike_if_alive(process: Seen, number: int) -> bool:
    """Send a signal to that very process; return False when it does not live."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if not is_alive(process):
            return False
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True
