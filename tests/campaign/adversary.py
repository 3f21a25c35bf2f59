"""The engine of the campaign: grows the tree that its input describes, and keeps it alive.

    adversary.py HOME_MARK                as the service starts it; then it becomes
    adversary.py HOME_MARK MARK NODE      and so does whoever executes a program in the tree

The marks are random words that the service does not know. They stay in the arguments of every
process over fork, exec and changes of name: by them, and nothing else, the campaign tells who of
the tree is alive. A later attempt of a run ends at once and bears no MARK. Nothing lives longer
than LIFETIME_S (STAY_S if the plan says so), unless it is stopped; the campaign ends what is left.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

LIFETIME_S = 60
STAY_S = 7200
FLICK_S = 0.005
NOBODY = 65534
PR_SET_DUMPABLE, PR_SET_NAME = 4, 15

Node = dict[str, Any]  # as it came out of JSON; plans.py has its type


def say(**fields: object) -> None:
    """Tell the service something."""
    os.write(1, json.dumps(fields).encode() + b"\n")


def become(node: Node, environment: dict[str, str]) -> None:
    """Execute this program again, as another process of the tree."""
    words = [sys.executable, "-I", "-S", __file__, *sys.argv[1:2], node["mark"], json.dumps(node)]
    os.execve(words[0], words, environment)  # noqa: S606 - no shell is the point


# -- what a process does to itself ---------------------------------------------------------------


def prctl(option: int, value: object) -> None:
    """Change an attribute of this process."""
    import ctypes  # it takes longer than all the rest: only for those who need it

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def take_other_limits() -> None:
    """Set limits, of which none is the one that the service marks trees by."""
    for number in (resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_MEMLOCK):
        resource.setrlimit(number, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def lead_group() -> None:
    """Leave our process group, unless we lead a session, and so a group already."""
    if os.getsid(0) != os.getpid():
        os.setpgid(0, 0)


def turn_into_nobody() -> None:
    """Become another user; root alone can."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def answer_with_a_child() -> None:
    """Answer the first SIGTERM with a child in a session of its own."""

    def answer(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            signal.alarm(LIFETIME_S)
            os.setsid()
            rest()

    signal.signal(signal.SIGTERM, answer)


def strike_shim(number: int) -> None:
    """Send a signal to our parent if he is our shim."""
    parent = os.getppid()
    if b"shim_main.py" in Path(f"/proc/{parent}/cmdline").read_bytes():
        with suppress(PermissionError):  # we may be another user by now
            os.kill(parent, number)


ACTS: dict[str, Callable[[], object]] = {
    "ignore": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "undumpable": lambda: prctl(PR_SET_DUMPABLE, 0),
    "rename": lambda: prctl(PR_SET_NAME, b") S 1 (kthread"),
    "chdir": lambda: os.chdir("/"),
    "close": lambda: os.closerange(0, 64),
    "group": lead_group,
    "limits": take_other_limits,
    "nobody": turn_into_nobody,
    "hydra": answer_with_a_child,
}


# -- how a process goes on -------------------------------------------------------------------------


def rest() -> None:
    """Live until somebody or the alarm ends us."""
    while True:
        time.sleep(LIFETIME_S)


def stop() -> None:
    """Stop, and live on if somebody continues us."""
    os.kill(os.getpid(), signal.SIGSTOP)
    rest()


def flicker(generations: int) -> None:
    """Live on in a new process every few milliseconds."""
    for _ in range(generations):
        time.sleep(FLICK_S)
        if os.fork():
            os._exit(0)


def storm(children: int) -> None:
    """Have many children at once."""
    for _ in range(children):
        if os.fork() == 0:
            signal.alarm(LIFETIME_S)
            rest()


# -- growing -------------------------------------------------------------------------------------


def plant(node: Node) -> None:
    """Start a process of the tree below us."""
    pid = os.fork()
    if pid:
        if node["how"] == "daemon":
            os.waitpid(pid, 0)
        return
    try:
        if node["how"] != "child":
            os.setsid()
        if node["how"] == "daemon" and os.fork():
            return
        enter(node)
    finally:
        os._exit(0)


def enter(node: Node) -> None:
    """Begin to be a process of the tree, by executing a program if the plan says so."""
    executes, node = node["executes"], node | {"executes": ""}
    if executes:
        with suppress(PermissionError):  # not everybody may execute the Python that we run in
            become(node, {} if executes == "scrubbed" else dict(os.environ))
    live(node)


def live(node: Node) -> None:
    """Do what the plan says, to the end."""
    signal.alarm(LIFETIME_S)
    for act in node["acts"]:
        ACTS[act]()
    for below in node["below"]:
        plant(below)
    storm(int(node["storm"]))
    if node["shim"]:
        strike_shim(int(node["shim"]))
    if node["end"] == "stop":
        stop()
    elif node["end"] == "flicker":
        flicker(int(node["generations"]))
    elif node["end"] == "stay":
        signal.alarm(STAY_S)
        rest()
    elif node["end"] == "rest":
        rest()
    os._exit(0)


def lead() -> None:
    """Hear from the service what to grow, and become its leader."""
    message = json.loads(sys.stdin.readline())
    if message["attempt"] > 1:
        say(type="result", output={})
        return
    if message["input"]["asks"]:
        say(type="ask", kind="open_text", prompt="?")
    become(message["input"]["node"], dict(os.environ))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        lead()
    else:
        live(json.loads(sys.argv[3]))
