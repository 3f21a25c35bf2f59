"""Launch one agent and print its pid, like a service; then wait for a kill if argv says "hold"."""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path

from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.host import Host
from runrecovery_service.process.launch import prepare
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.watermark import watermark_bits

what, journal = sys.argv[1], Path(sys.argv[2])
here = Host.here()
lease = LaunchMarkers(
    launch_key=1,
    run_key=1,
    cookie=secrets.token_hex(16),
    watermark=secrets.randbits(watermark_bits()),
    pid=None,
    start_ticks=None,
    host=here,
)
in_a_minute = boot_time_ns() + 60 * 10**9
process = prepare(
    ["/bin/sleep", "60"],
    markers=lease,
    cwd=Path("/"),
    env={},
    deadline_ns=in_a_minute,
    journal=journal,
)
agent = process.release(in_a_minute)


def owner(pid: int) -> tuple[int, int]:
    """Return the user and group that a process's environment belongs to."""
    found = os.stat(f"/proc/{pid}/environ")  # noqa: PTH116
    return found.st_uid, found.st_gid


told: dict[str, object] = {"shim": process.pid, "agent": agent.pid}
told |= {"shim_owner": owner(process.pid), "agent_owner": owner(agent.pid)}
sys.stdout.write(json.dumps(told) + "\n")
sys.stdout.flush()
if what == "hold":
    process.popen.wait()
process.dispose()
