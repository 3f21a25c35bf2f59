"""Turns a launch record into the markers that prove which processes belong to the launch."""

from __future__ import annotations

from runrecovery_service.process.evidence import LeaseEvidence
from runrecovery_service.storage.processes import Lease


def launch_markers(lease: Lease) -> LeaseEvidence:
    """Return the markers of a recorded launch."""
    return LeaseEvidence(
        lease_key=lease.key,
        run_key=lease.run_key,
        cookie=lease.cookie,
        watermark=lease.watermark,
        cgroup=lease.cgroup,
        pid=lease.pid,
        start_ticks=lease.start_ticks,
        boot_id=lease.boot_id,
        pid_namespace=lease.pid_namespace,
        host_id=lease.host_id,
    )
