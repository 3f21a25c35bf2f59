"""Find living processes by a word among their arguments, without the code under test."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

Identity: TypeAlias = tuple[int, int]
"""Pid and start ticks."""

LOOK_S: Final = 0.005
CLEAR_LOOKS: Final = 3
"""Empty scans that count as clear: one is not atomic."""
CLEAR_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A living process and its arguments, joined by NULs."""

    pid: int
    ppid: int
    start_ticks: int
    state: str
    command: bytes

    @property
    def identity(self) -> Identity:
        """The pid and the start ticks, which a later process of that pid does not share."""
        return self.pid, self.start_ticks


def read_process(pid: int) -> Process | None:
    """Return one process, or None if it is dead or a zombie."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    state = fields[0].decode()
    if state in "ZXx":
        return None
    return Process(
        pid=pid, ppid=int(fields[1]), start_ticks=int(fields[19]), state=state, command=command
    )


def processes_with(mark: str) -> dict[Identity, Process]:
    """Return the living processes with `mark` among their arguments, newest pids first."""
    word = mark.encode()
    found = {}
    for pid in sorted((int(e) for e in os.listdir("/proc") if e.isdigit()), reverse=True):  # noqa: PTH208 - quick
        if word not in _command(pid):
            continue
        seen = read_process(pid)
        if seen is not None and word in seen.command:
            found[seen.identity] = seen
    return found


def _command(pid: int) -> bytes:
    try:
        fd = os.open(f"/proc/{pid}/cmdline", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""
    finally:
        os.close(fd)


def send_signal(pid: int, number: int, *, proof: Callable[[Process], bool]) -> bool:
    """Send a signal to a process that satisfies `proof`; return whether it was sent.

    `proof` is evaluated after the pidfd was opened, so that a reused pid is never signalled.
    """
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            seen = read_process(pid)
            if seen is not None and proof(seen):
                signal.pidfd_send_signal(pidfd, number)
                return True
        finally:
            os.close(pidfd)
    return False


def kill_all_with(mark: str) -> int:
    """Kill processes with `mark` until none is left; return how many were signalled."""
    word = mark.encode()
    ended: set[Identity] = set()
    clear, until = 0, time.monotonic() + CLEAR_S
    while clear < CLEAR_LOOKS and time.monotonic() < until:
        found = processes_with(mark)
        for identity, seen in found.items():
            if send_signal(seen.pid, signal.SIGKILL, proof=lambda now: word in now.command):
                ended.add(identity)
        clear = 0 if found else clear + 1
        time.sleep(LOOK_S)
    return len(ended)


@dataclass(slots=True, eq=False)
class ScanThread:
    """Scans for processes with a mark in a thread, again and again.

    Attributes:
        everybody: all processes that any scan has found.
        last_alive: the monotonic time at which the last scan with a living process began.
    """

    mark: str
    everybody: dict[Identity, Process] = field(default_factory=dict)
    last_alive: float = 0.0
    _words: set[bytes] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> ScanThread:
        self._thread = threading.Thread(target=self._work, name="scan", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        pause_s = LOOK_S
        while not self._over.wait(pause_s):
            began = time.monotonic()
            self.look()
            pause_s = max(LOOK_S, 2 * (time.monotonic() - began))

    def look(self) -> dict[Identity, Process]:
        """Scan now; return the living processes."""
        began = time.monotonic()
        found = processes_with(self.mark)
        for identity, seen in found.items():
            if identity not in self.everybody:
                self._words.update(seen.command.split(b"\0"))
                self.everybody[identity] = seen
        if found:
            self.last_alive = max(self.last_alive, began)
        return found

    def saw(self, word: str) -> bool:
        """Return whether a scan has found a process with that argument."""
        return word.encode() in self._words
