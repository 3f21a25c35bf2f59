"""Grows a process tree of the shape that the arguments name; every process says its role and pid.

Nothing of it lives longer than 60 s. Roles: child, session (setsid), daemon (double fork and
setsid), thread (its first thread ends, another lives), zombie, stopped; scrubbed (a child with an
empty environment), scrubbed-session, scrubbed-daemon. "stubborn" makes all that follow, and the
leader, ignore SIGTERM. "hydra" makes the leader answer SIGTERM with a child that nothing but its
descent ties to it; "scrubbed-hydra" is a child that does so, with an empty environment and in a
session of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

LIFETIME_S = 60
SCRUBBED = (
    "import os, sys, time; os.write(1, f'{sys.argv[1]} {os.getpid()}\\n'.encode());"
    f" time.sleep({LIFETIME_S})"
)

HYDRA = f"""
import os, signal, sys, time
def answer(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setsid()
        time.sleep({LIFETIME_S})
        os._exit(0)
signal.signal(signal.SIGTERM, answer)
os.write(1, f"{{sys.argv[1]}} {{os.getpid()}}\\n".encode())
until = time.monotonic() + {LIFETIME_S}
while time.monotonic() < until:
    time.sleep(1)
"""


def announce(role: str, pid: int) -> None:
    """One write, so that lines of several processes do not mix."""
    os.write(1, f"{role} {pid}\n".encode())


def rest(role: str) -> None:
    """Say who we are and sleep."""
    signal.alarm(LIFETIME_S)
    announce(role, os.getpid())
    while True:
        time.sleep(LIFETIME_S)


def scrub(role: str) -> None:
    """Become a program with an empty environment."""
    command = [sys.executable, "-I", "-S", "-c", SCRUBBED, role]
    os.execve(command[0], command, {})  # noqa: S606 - no shell is the point


def fork(then: Callable[[], None]) -> int:
    """Run `then` in a child; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        then()
    finally:
        os._exit(0)


def fork_twice(then: Callable[[], None], *, setsid: bool) -> None:
    """Run `then` in a process that is nobody's child here."""

    def first() -> None:
        if setsid:
            os.setsid()
        fork(then)

    os.waitpid(fork(first), 0)


def in_session(then: Callable[[], None]) -> None:
    """Run `then` in a new session."""
    os.setsid()
    then()


def lose_first_thread(role: str) -> None:
    """End the first thread: /proc then shows a zombie that is alive."""
    signal.alarm(LIFETIME_S)
    libc = ctypes.CDLL(None)
    threading.Thread(target=rest_in_thread, args=[role]).start()
    libc.pthread_exit(None)


def rest_in_thread(role: str) -> None:
    """Wait until the first thread has ended, then say so."""
    stat = f"/proc/{os.getpid()}/stat"
    while True:
        with open(stat, "rb") as file:  # noqa: PTH123 - as little as possible in this thread
            if file.read().rsplit(b")", 1)[1].split()[0] == b"Z":
                break
    announce(role, os.getpid())
    time.sleep(LIFETIME_S)


def leave_zombie(role: str) -> None:
    """Leave a dead child unreaped."""
    pid = fork(lambda: None)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    announce(role, pid)


def leave_stopped(role: str) -> None:
    """Leave a child that is stopped."""

    def stop() -> None:
        signal.alarm(LIFETIME_S)
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(LIFETIME_S)

    pid = fork(stop)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    announce(role, pid)


def reborn() -> None:
    """Become a scrubbed program that obeys SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    scrub("late")


def be_stubborn(role: str) -> None:
    """Ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def be_a_hydra(role: str) -> None:
    """Answer SIGTERM with a child."""

    def answer(*_: object) -> None:
        fork(lambda: in_session(reborn))

    signal.signal(signal.SIGTERM, answer)


def scrub_hydra(role: str) -> None:
    """Become a scrubbed program that answers its first SIGTERM with a child in a new session."""
    command = [sys.executable, "-I", "-S", "-c", HYDRA, role]
    os.execve(command[0], command, {})  # noqa: S606 - no shell is the point


GROW: dict[str, Callable[[str], object]] = {
    "child": lambda role: fork(lambda: rest(role)),
    "session": lambda role: fork(lambda: in_session(lambda: rest(role))),
    "daemon": lambda role: fork_twice(lambda: rest(role), setsid=True),
    "scrubbed": lambda role: fork(lambda: scrub(role)),
    "scrubbed-session": lambda role: fork(lambda: in_session(lambda: scrub(role))),
    "scrubbed-daemon": lambda role: fork_twice(lambda: scrub(role), setsid=False),
    "thread": lambda role: fork(lambda: lose_first_thread(role)),
    "scrubbed-hydra": lambda role: fork(lambda: in_session(lambda: scrub_hydra(role))),
    "zombie": leave_zombie,
    "stopped": leave_stopped,
    "stubborn": be_stubborn,
    "hydra": be_a_hydra,
}

for word in sys.argv[1:]:
    GROW[word](word)
rest("leader")
