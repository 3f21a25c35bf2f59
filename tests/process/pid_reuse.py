"""Let a pid be reused while a tree is ended, by the first process of a pid namespace; print it.

A process with a watermark is swept. At the moment that argv names, it is killed and reaped, and an
innocent process takes its pid. A check can be left out, by name, to prove that it is needed.

Moments: `before` the sweep; `opening` the pidfd, the first time; `opened`, right after that;
`shim`: opening it while a shim kills its tree. Checks: `prove` (the sweep reads a pinned process
again), `send` (the proof is read before a signal).
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from runrecovery_service.process import procfs, shim, signals, tree_ending
from runrecovery_service.process.host import Host
from runrecovery_service.process.launch_tree import PinnedProcess
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.pinned_trees import PinnedTrees
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.tree_ending import end_trees

LIFETIME_S = 30
MARK = secrets.randbits(62)
open_pidfd = os.pidfd_open


def sleeper(prepare: Callable[[], object]) -> Proc:
    """Fork a process in a session of its own that sleeps; return it once it does."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        signal.alarm(LIFETIME_S)
        prepare()
        os.write(tell, b".")
        time.sleep(LIFETIME_S)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    proc = procfs.read_proc(pid)
    assert proc is not None
    return proc


def set_watermark() -> None:
    """Set the watermark, as a shim does for its tree."""
    resource.setrlimit(procfs.RLIMIT_LOCKS, (MARK, MARK))


def replace_it() -> Proc:
    """Kill the process of the launch; give its pid to an innocent one."""
    os.kill(ours.pid, signal.SIGKILL)
    os.waitpid(ours.pid, 0)
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(ours.pid - 1))
    innocent = sleeper(lambda: None)
    assert innocent.pid == ours.pid, "somebody else took the pid"
    assert innocent.start_ticks > ours.start_ticks
    return innocent


def swapping_open(pid: int, flags: int = 0) -> int:
    """Open a pidfd, with the race at the chosen moment."""
    if pid != ours.pid or swapped:
        return open_pidfd(pid, flags)
    if moment == "opened":
        pidfd = open_pidfd(pid)
        swapped.append(replace_it())
        return pidfd
    swapped.append(replace_it())
    return open_pidfd(pid, flags)


class Log:
    """Replaces the log of the sweep."""

    def info(self, _: str, **facts: object) -> None:
        """Keep the pid that a signal was sent to or withheld from."""
        lines.add((facts["signal"], facts["outcome"]))

    warning = info


def believe_the_pin(
    trees: PinnedTrees, pinned: Collection[PinnedProcess], found: object, *, protected: object
) -> None:
    """Count every pinned process as proved, without a second read."""
    for each in pinned:
        each.proved = True


def send_unproved(pid: int, pidfd: int, number: int, **told: Callable[..., object]) -> str:
    """Send a signal without reading the proof."""
    return real_send(pid, pidfd, number, prove=lambda: "believed", audit=told["audit"])


moment, grace_s, *without = sys.argv[1:]
lines: set[tuple[object, object]] = set()
swapped: list[Proc] = []
real_send = signals.send
if "prove" in without:
    PinnedTrees.prove = believe_the_pin  # type: ignore[assignment, method-assign]
if "send" in without:
    signals.send = send_unproved
tree_ending.log = Log()

ours = sleeper(set_watermark)
began = time.clock_gettime(time.CLOCK_BOOTTIME)
while time.clock_gettime(time.CLOCK_BOOTTIME) - began < 0.05:
    time.sleep(0.01)  # start ticks are 10 ms long: the next process must be a later one
here = Host.here()
lease = LaunchMarkers(
    launch_key=1,
    run_key=1,
    cookie=secrets.token_hex(16),
    watermark=MARK,
    pid=ours.pid,
    start_ticks=ours.start_ticks,
    host=here,
)
if moment == "shim":
    guard = shim.Shim(-1, -1, os.open(os.devnull, os.O_WRONLY), -1)
    os.pidfd_open = swapping_open
    lines.add(("SIGKILL", guard._signal(ours, signal.SIGKILL, "test")))
    gone = True
else:
    # As an agent of the lease: a shim would be left for last.
    agent = dataclasses.replace(lease, pid=None, start_ticks=None)
    if moment == "before":
        swapped.append(replace_it())
        agent = lease
    os.pidfd_open = swapping_open
    gone = end_trees([agent], why="test", grace_s=float(grace_s), deadline_s=2)[1].gone

if ("SIGKILL", signals.SENT) in lines:  # then the process with this pid is dying
    os.waitid(os.P_PID, ours.pid, os.WEXITED | os.WNOWAIT)
now = procfs.read_proc(ours.pid)
sys.stdout.write(
    json.dumps(
        {
            "swapped": len(swapped),
            "gone": gone,
            # Whether it is the innocent one, and how it is.
            "innocent": now is not None and [now.identity] == [one.identity for one in swapped],
            "state": now.state if now is not None else "",
            "lines": sorted(map(str, lines)),
        }
    )
)
