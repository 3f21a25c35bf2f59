"""Grow the process tree that the arguments describe; each process prints its role and pid.

Each process lives for 60 s at most. Roles:

- child, session (setsid), daemon (double fork and setsid), thread (its first thread ends, another
  lives), zombie, stopped, other-user (root alone can make it).
- scrubbed (a child with an empty environment), scrubbed-session, scrubbed-daemon (double fork and
  setsid); undumpable (a child whose /proc is unreadable), escapee (a scrubbed daemon, undumpable).
- renegade: double-forked into the leader's group, scrubbed, and it has lowered its limit on locks:
  only descent from its shim proves it.
- storm: a child with 300 children. flicker: a daemon that forks and exits every 5 ms, for 20 s.
- stubborn makes all that follow, and the leader, ignore SIGTERM. hydra makes the leader answer
  SIGTERM with a child in a session of its own, without an environment; scrubbed-hydra is a
  scrubbed child that does so; turncoat-hydra removes its watermark first.
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
STORM = 300
FLICKER_S, FLICK_S = 20, 0.005
PR_SET_DUMPABLE = 4
RLIMIT_LOCKS = 10

SCRUBBED = (
    "import os, sys, time; os.write(1, f'{sys.argv[1]} {os.getpid()}\\n'.encode());"
    f" time.sleep({LIFETIME_S})"
)
UNDUMPABLE = f"import ctypes; ctypes.CDLL(None).prctl({PR_SET_DUMPABLE}, 0, 0, 0, 0); {SCRUBBED}"
RENEGADE = f"import resource; resource.setrlimit({RLIMIT_LOCKS}, (5, 5)); {SCRUBBED}"

HYDRA = f"""
import os, resource, signal, sys, time
def answer(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.argv[1].startswith("turncoat"):
        resource.setrlimit({RLIMIT_LOCKS}, (5, 5))
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
    """Print the role and the pid in one write, so that lines do not mix."""
    os.write(1, f"{role} {pid}\n".encode())


def rest(role: str) -> None:
    """Print the role and sleep."""
    signal.alarm(LIFETIME_S)
    announce(role, os.getpid())
    while True:
        time.sleep(LIFETIME_S)


def become(code: str, role: str) -> None:
    """Become a program with an empty environment."""
    command = [sys.executable, "-I", "-S", "-c", code, role]
    os.execve(command[0], command, {})  # noqa: S606 - no shell is the point


def fork(then: Callable[[], object]) -> int:
    """Run `then` in a child; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        then()
    finally:
        os._exit(0)


def fork_twice(then: Callable[[], object], *, setsid: bool) -> None:
    """Run `then` in a grandchild whose parent exits."""

    def first() -> None:
        if setsid:
            os.setsid()
        fork(then)

    os.waitpid(fork(first), 0)


def in_session(then: Callable[[], object]) -> None:
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
    """Wait until the first thread has ended, then print the role."""
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


def hide(role: str) -> None:
    """Make /proc of this process unreadable."""
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    rest(role)


def turn_into_nobody(role: str) -> None:
    """Become another user."""
    os.setgid(65534)
    os.setuid(65534)
    rest(role)


def storm(role: str) -> None:
    """Fork many children, then print the role."""

    def sleep() -> None:
        signal.alarm(LIFETIME_S)
        time.sleep(LIFETIME_S)

    for _ in range(STORM):
        fork(sleep)
    rest(role)


def flicker() -> None:
    """Fork and exit every few milliseconds."""
    until = time.monotonic() + FLICKER_S
    while time.monotonic() < until:
        time.sleep(FLICK_S)
        if os.fork():
            os._exit(0)


def reborn() -> None:
    """Become a scrubbed program that exits by SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    become(SCRUBBED, "late")


def be_stubborn(role: str) -> None:
    """Ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def be_a_hydra(role: str) -> None:
    """Fork a child when SIGTERM comes."""

    def answer(*_: object) -> None:
        fork(lambda: in_session(reborn))

    signal.signal(signal.SIGTERM, answer)


GROW: dict[str, Callable[[str], object]] = {
    "child": lambda role: fork(lambda: rest(role)),
    "session": lambda role: fork(lambda: in_session(lambda: rest(role))),
    "daemon": lambda role: fork_twice(lambda: rest(role), setsid=True),
    "scrubbed": lambda role: fork(lambda: become(SCRUBBED, role)),
    "scrubbed-session": lambda role: fork(lambda: in_session(lambda: become(SCRUBBED, role))),
    "scrubbed-daemon": lambda role: fork_twice(lambda: become(SCRUBBED, role), setsid=True),
    "undumpable": lambda role: fork(lambda: hide(role)),
    "escapee": lambda role: fork_twice(lambda: become(UNDUMPABLE, role), setsid=True),
    "renegade": lambda role: fork_twice(lambda: become(RENEGADE, role), setsid=False),
    "other-user": lambda role: fork(lambda: turn_into_nobody(role)),
    "thread": lambda role: fork(lambda: lose_first_thread(role)),
    "storm": lambda role: fork(lambda: storm(role)),
    "flicker": lambda _: fork_twice(flicker, setsid=True),
    "scrubbed-hydra": lambda role: fork(lambda: in_session(lambda: become(HYDRA, role))),
    "turncoat-hydra": lambda role: fork(lambda: in_session(lambda: become(HYDRA, role))),
    "zombie": leave_zombie,
    "stopped": leave_stopped,
    "stubborn": be_stubborn,
    "hydra": be_a_hydra,
}

for word in sys.argv[1:]:
    GROW[word](word)
rest("leader")
