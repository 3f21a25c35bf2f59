"""Processes as /proc shows them, read without the code under test."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process. A later process with the same pid has other start ticks."""

    pid: int
    start_ticks: int


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _fields(pid: int) -> list[str]:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return []
    return stat[stat.rindex(")") + 2 :].split()


def living_process(pid: int) -> ProcessIdentity | None:
    """Return the process of this pid, or None if it is dead."""
    fields = _fields(pid)
    if not fields or fields[0] in "ZXx":
        return None
    return ProcessIdentity(pid, int(fields[19]))


def is_alive(process: ProcessIdentity) -> bool:
    """Return whether that very process lives."""
    return living_process(process.pid) == process


def is_stopped(process: ProcessIdentity) -> bool:
    """Return whether that very process is stopped by a signal."""
    return is_alive(process) and _fields(process.pid)[:1] == ["T"]


def open_files(pid: int) -> set[str]:
    """Return what a process's descriptors refer to: paths, and names like `socket:[1]`."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(link.readlink()))
    return found


def lock_limit(pid: int) -> int | None:
    """Return a process's limit on file locks, or None if it has no limit or is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/limits").read_text("ascii").splitlines():
            if line.startswith("Max file locks"):
                soft = line.split()[3]
                return int(soft) if soft.isdigit() else None
    return None


def processes_with_watermark(watermark: int) -> list[int]:
    """Return the living processes whose limit on file locks is this number."""
    marked = (pid for pid in _pids() if lock_limit(pid) == watermark)
    return sorted(pid for pid in marked if living_process(pid) is not None)


def send_signal(process: ProcessIdentity, number: int) -> None:
    """Send a signal to that very process; fail when it does not live."""
    assert send_signal_if_alive(process, number)


def send_signal_if_alive(process: ProcessIdentity, number: int) -> bool:
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


def are_dead(pids: Sequence[int]) -> bool:
    """Return whether no process of these pids lives."""
    return all(living_process(pid) is None for pid in pids)


def _works_below(pid: int, folder: Path) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder)
    except OSError:
        return False


def processes_below(folder: Path) -> list[int]:
    """Return the living processes whose working directory is below a folder."""
    below = (pid for pid in _pids() if _works_below(pid, folder))
    return sorted(pid for pid in below if living_process(pid) is not None)


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with, or {} if it is gone."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = [entry.decode("utf-8", "replace").partition("=") for entry in raw.split(b"\0") if entry]
    return {name: text for name, _, text in pairs}


def kill_below(folder: Path) -> list[int]:
    """Kill the processes whose working directory is below a folder; return their pids.

    The working directory is read after the pidfd was opened: a reused pid is never signalled.
    """
    killed = []
    for pid in processes_below(folder):
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if _works_below(pid, folder):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    killed.append(pid)
            finally:
                os.close(pidfd)
    return killed
