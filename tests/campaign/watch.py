"""Who of a campaign is alive: by a word among the arguments, and by none of the service's means."""

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
class Seen:
    """A living process and its arguments, joined by NULs."""

    pid: int
    ppid: int
    start_ticks: int
    state: str
    command: bytes

    @property
    def identity(self) -> Identity:
        """Tells it from a later process with the same pid."""
        return self.pid, self.start_ticks


def look_at(pid: int) -> Seen | None:
    """Read one process; None for one that is dead, zombies included."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()
    state = fields[0].decode()
    if state in "ZXx":
        return None
    return Seen(
        pid=pid, ppid=int(fields[1]), start_ticks=int(fields[19]), state=state, command=command
    )


def bearing(mark: str) -> dict[Identity, Seen]:
    """Return the living processes with `mark` among their arguments, newest pids first."""
    word = mark.encode()
    found = {}
    for pid in sorted((int(e) for e in os.listdir("/proc") if e.isdigit()), reverse=True):  # noqa: PTH208 - quick
        if word not in _command(pid):
            continue
        seen = look_at(pid)
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


def strike(pid: int, number: int, *, proof: Callable[[Seen], bool]) -> bool:
    """Send a signal to a process that is what it is held for; False when it is not, or is gone.

    The proof is read after the pidfd is open: who is signalled is who was looked at.
    """
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        try:
            seen = look_at(pid)
            if seen is not None and proof(seen):
                signal.pidfd_send_signal(pidfd, number)
                return True
        finally:
            os.close(pidfd)
    return False


def end_bearing(mark: str) -> int:
    """Kill whoever bears the mark until nobody does; return how many were signalled."""
    word = mark.encode()
    ended: set[Identity] = set()
    clear, until = 0, time.monotonic() + CLEAR_S
    while clear < CLEAR_LOOKS and time.monotonic() < until:
        found = bearing(mark)
        for identity, seen in found.items():
            if strike(seen.pid, signal.SIGKILL, proof=lambda now: word in now.command):
                ended.add(identity)
        clear = 0 if found else clear + 1
        time.sleep(LOOK_S)
    return len(ended)


@dataclass(slots=True, eq=False)
class Watch:
    """Looks for the bearers of a mark, again and again, in a thread.

    Attributes:
        everybody: all that were ever seen.
        last_alive: when (monotonic) the latest scan that saw one of them began.
    """

    mark: str
    everybody: dict[Identity, Seen] = field(default_factory=dict)
    last_alive: float = 0.0
    _words: set[bytes] = field(default_factory=set)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)
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

    def look(self) -> dict[Identity, Seen]:
        """Look now; return who is alive."""
        began = time.monotonic()
        found = bearing(self.mark)
        for identity, seen in found.items():
            if identity not in self.everybody:
                self._words.update(seen.command.split(b"\0"))
                self.everybody[identity] = seen
        if found:
            self.last_alive = max(self.last_alive, began)
        return found

    def saw(self, word: str) -> bool:
        """True once somebody with that argument was seen."""
        return word.encode() in self._words
