"""Identifies this start, and claims the next epoch of its instance."""

from __future__ import annotations

import os
import secrets
from datetime import datetime

import structlog

from runrecovery_service import __version__
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import ContainmentRefused
from runrecovery_service.locks import ServiceLocks
from runrecovery_service.process.cgroup import CgroupParent
from runrecovery_service.process.host import Host
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.use_case import retry_conflicts

log = structlog.get_logger()


def this_host() -> Host:
    """Return the identity of this machine and its boot.

    Raises:
        ContainmentRefused: the system is not Linux, or /proc is not mounted.
    """
    try:
        return Host.here()
    except OSError as error:
        reason = f"the service needs Linux with a mounted /proc ({error.strerror})"
        raise ContainmentRefused(reason) from error


def this_start(settings: Settings, locks: ServiceLocks, host: Host) -> InstanceStart:
    """Return the identity of this start."""
    return InstanceStart(
        instance=settings.instance,
        boot_token=secrets.token_hex(16),
        host_id=host.host_id,
        data_dir=str(locks.data_dir),
        pid=os.getpid(),
        # A lock is named by a device number, which is unique only within one boot of a kernel.
        lock_id=f"{host.boot_id}/{locks.locks[0].name}",
        engines=tuple(settings.engines),
        max_running=settings.capacity,
        version=__version__,
    )


def launch_site(host: Host, cgroups: CgroupParent | None) -> LaunchSite:
    """Return the launch site of this start."""
    return LaunchSite(
        host_id=host.host_id,
        boot_id=host.boot_id,
        pid_namespace=host.pid_namespace,
        watermark_bits=watermark_bits(),
        cgroup_parent=None if cgroups is None else cgroups.below,
    )


def claim_epoch(db: Database, start: InstanceStart, ttl_s: float, *, now: datetime) -> Owner:
    """Claim the next epoch of the instance, with a lease of `ttl_s`.

    Raises:
        Held: an instance of this name is alive elsewhere.
    """
    with refusing(db.name):
        owner = retry_conflicts(lambda: instances.claim(db, start, now=now, ttl_s=ttl_s))
    if db.dialect.kind is DatabaseKind.SQLITE:
        db.watch_files()  # needs this thread's connection open: the last close would remove the log
    else:
        db.close()
    log.info("service.epoch_claimed", instance=owner.instance, epoch=owner.epoch)
    return owner
