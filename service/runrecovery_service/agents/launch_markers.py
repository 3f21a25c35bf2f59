"""Converts a launch record to the markers by which the processes of the launch are found."""

from __future__ import annotations

from runrecovery_service.process.host import Host
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.storage.launch_records import LaunchRecord


def launch_markers(lease: LaunchRecord) -> LaunchMarkers:
    """Return the markers of a launch from its record."""
    return LaunchMarkers(
        launch_key=lease.key,
        run_key=lease.run_key,
        cookie=lease.cookie,
        watermark=lease.watermark,
        cgroup=lease.cgroup,
        pid=lease.pid,
        start_ticks=lease.start_ticks,
        host=Host(
            host_id=lease.host_id,
            boot_id=lease.boot_id,
            pid_namespace=lease.pid_namespace,
        ),
    )
