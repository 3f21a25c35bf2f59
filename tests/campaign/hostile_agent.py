"""The engine of the campaign: grows the tree that its input describes, and keeps it alive.

    hostile_agent.py HOME_MARK                the command of the engine, which becomes
    hostile_agent.py HOME_MARK MARK NODE      as does each process of the tree that calls exec

The marks are random words that the service does not know. They stay in the arguments of every
process over fork, exec and changes of name. The campaign finds living processes by the marks alone.
A later attempt of a run exits at once, without a MARK. A process lives for LIFETIME_S at most
(STAY_S if the plan says so), unless it is stopped. The campaign kills the rest.
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
    """Send a message to the service."""
    os.write(1, json.dumps(fields).encode() + b"\n")


def become(node: Node, environment: dict[str, str]) -> None:
    """Execute this program again, as another process of the tree."""
    words = [sys.executable, "-I", "-S", __file__, *sys.argv[1:2], node["mark"], json.dumps(node)]
    os.execve(words[0], words, environment)  # noqa: S606 - no shell is the point


# -- what a process does to itself ---------------------------------------------------------------


def prctl(option: int, value: object) -> None:
    """Change an attribute of this process."""
    import ctypes  # slow to import, and few processes need it

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def take_other_limits() -> None:
    """Set limits, but not the limit that is the watermark."""
    for number in (resource.RLIMIT_CORE, resource.RLIMIT_MSGQUEUE, resource.RLIMIT_MEMLOCK):
        resource.setrlimit(number, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))


def lead_group() -> None:
    """Leave our process group, unless we lead a session, and so a group already."""
    if os.getsid(0) != os.getpid():
        os.setpgid(0, 0)


def turn_into_nobody() -> None:
    """Become another user, which needs root."""
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


def signal_shim(number: int) -> None:
    """Send a signal to the parent if it is the shim."""
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
    """Sleep until a signal or the alarm."""
    while True:
        time.sleep(LIFETIME_S)


def stop() -> None:
    """Stop by SIGSTOP; sleep after a SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    rest()


def flicker(generations: int) -> None:
    """Fork and exit every few milliseconds."""
    for _ in range(generations):
        time.sleep(FLICK_S)
        if os.fork():
            os._exit(0)


def storm(children: int) -> None:
    """Fork many children at once."""
    for _ in range(children):
        if os.fork() == 0:
            signal.alarm(LIFETIME_S)
            rest()


# -- growing -------------------------------------------------------------------------------------


def plant(node: Node) -> None:
    """Start a process of the tree below this one."""
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
    """Become a process of the tree, by exec if the plan says so."""
    executes, node = node["executes"], node | {"executes": ""}
    if executes:
        with suppress(PermissionError):  # another user may lack access to this Python
            become(node, {} if executes == "scrubbed" else dict(os.environ))
    live(node)


def live(node: Node) -> None:
    """Carry out the plan of this process."""
    signal.alarm(LIFETIME_S)
    for act in node["acts"]:
        ACTS[act]()
    for below in node["below"]:
        plant(below)
    storm(int(node["storm"]))
    if node["shim"]:
        signal_shim(int(node["shim"]))
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
    """Read the plan of the tree from the service, and become its leader."""
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
