"""The errors of a launch."""

from __future__ import annotations

import errno
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

TRANSIENT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""System errors for a lack of descriptors, processes or memory. Other programs can free these."""


@dataclass(eq=False)
class LaunchFailed(Exception):
    """The command could not be started. No process of the launch is left."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class LaunchDelayed(LaunchFailed):
    """The system has no descriptor, process or memory left now. It is safe to launch again."""


class ShimLost(LaunchFailed):
    """The shim ended before it reported the agent's start.

    If the deadline passed while the shim waited at its gate, the agent never ran. If the shim was
    killed, the agent can be alive.
    """


def launch_error(error: OSError, reason: str) -> LaunchFailed:
    """Return the exception for a system call of a launch that failed."""
    return LaunchDelayed(reason) if error.errno in TRANSIENT else LaunchFailed(reason)
