"""Let an innocent process take over a pid between the read of a process and the open of its pidfd.

    unshare --pid --fork --mount-proc python takeover.py [--no-recheck]

The takeover is forced: `os.pidfd_open` is wrapped, and root chooses the next pid in a namespace. It
happens in three places: where the sweep sends SIGTERM, where the sweep stops what it finds, and
where a shim kills its tree. Prints one JSON object: by place, whether the innocent was spared.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final
from unittest import mock

import structlog

sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.mutants import skip_rechecks
from runrecovery_service.process import procfs
from runrecovery_service.process.host import Host
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.shim import Shim
from runrecovery_service.process.tree_ending import end_trees

NEXT_PID: Final = Path("/proc/sys/kernel/ns_last_pid")
ANOTHER_TICK_S: Final = 0.03
SLEEPER: Final = "import os, time; os.write(1, b'.'); time.sleep(60)"
MARKED: Final = f"import resource, sys; resource.setrlimit(10, (int(sys.argv[1]),) * 2); {SLEEPER}"
PATIENCE_S: Final = 10.0
DYING_S: Final = 0.2
"""A signal that was sent has acted by then."""


def start(code: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, and wait until it runs."""
    popen = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", code, *words],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert popen.stdout is not None
    assert popen.stdout.read(1) == b"."
    return popen


class Takeover:
    """A victim, and the innocent process that gets its pid when its pidfd is opened."""

    def __init__(self) -> None:
        self.watermark = secrets.randbits(61) | 1 << 61
        self.victim = start(MARKED, str(self.watermark))
        self.innocent: subprocess.Popen[bytes] | None = None
        self._pidfd_open = os.pidfd_open

    def pidfd_open(self, pid: int, flags: int = 0) -> int:
        """Open a pidfd. Before the first one of the victim, replace the victim by the innocent."""
        if pid == self.victim.pid and self.innocent is None:
            self.victim.kill()
            self.victim.wait()
            time.sleep(ANOTHER_TICK_S)
            NEXT_PID.write_text(str(pid - 1))
            self.innocent = start(SLEEPER)
            assert self.innocent.pid == pid
        return self._pidfd_open(pid, flags)

    def spared(self, act: Callable[[], object]) -> bool:
        """Return whether the innocent is alive and not stopped after `act`."""
        with mock.patch.object(os, "pidfd_open", self.pidfd_open):
            act()
        assert self.innocent is not None, "no pidfd was opened"
        with suppress(subprocess.TimeoutExpired):
            self.innocent.wait(DYING_S)
        proc = procfs.read_proc(self.innocent.pid)
        spared = proc is not None and proc.state in "SR"
        self.innocent.kill()
        self.innocent.wait(PATIENCE_S)
        return spared


def in_a_sweep(*, grace_s: float) -> bool:
    """Take over the pid while a sweep kills the victim."""
    scene, here = Takeover(), Host.here()
    launch = LaunchMarkers(
        launch_key=1,
        run_key=1,
        cookie=secrets.token_hex(16),
        watermark=scene.watermark,
        pid=None,
        start_ticks=None,
        host=here,
    )
    return scene.spared(lambda: end_trees([launch], why="", grace_s=grace_s, deadline_s=3.0))


def in_a_shim() -> bool:
    """Take over the pid while a shim kills the victim. Both are children of this process."""
    scene = Takeover()
    victim = procfs.read_proc(scene.victim.pid)
    assert victim is not None
    null = os.open(os.devnull, os.O_RDWR)
    shim = Shim(null, null, null, null)
    return scene.spared(lambda: shim._signal(victim, signal.SIGKILL, "service_gone"))


def main() -> None:
    """Run all three, and print the result."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    if sys.argv[1:] == ["--no-recheck"]:
        skip_rechecks()
    told = {
        "sweep, asked": in_a_sweep(grace_s=0.2),
        "sweep, frozen on sight": in_a_sweep(grace_s=0.0),
        "shim": in_a_shim(),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
