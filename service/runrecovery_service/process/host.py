"""The host, boot and pid namespace in which a process was launched. Linux only."""

from __future__ import annotations

import socket
from pathlib import Path

from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The scope in which a pid names one process: a machine, one of its boots, a pid namespace."""

    host_id: str
    boot_id: str
    pid_namespace: int

    @classmethod
    def here(cls) -> Host:
        """Return the scope of this process.

        `host_id` is /etc/machine-id, or the host name where an image has no machine id.

        Raises:
            OSError: there is no Linux /proc.
        """
        return cls(
            host_id=_machine_id() or socket.gethostname(),
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip(),
            pid_namespace=Path("/proc/self/ns/pid").stat().st_ino,
        )


def _machine_id() -> str:
    try:
        text = Path("/etc/machine-id").read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if text == "uninitialized" else text
