"""Resource limits of one agent process."""

from __future__ import annotations

import resource

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.pipe_size import LARGEST_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits:
    """The limits of an agent's resources. The service sets no limit for an attribute of None.

    Attributes:
        niceness: added to the service's own, 0 to 19.
        max_memory: bytes of private writable memory (RLIMIT_DATA) of each process.
        max_open_files: descriptors of each process (RLIMIT_NOFILE).
        max_processes: processes of the user as a whole, threads included (RLIMIT_NPROC). Root is
            exempt.
        soft_open_files: the soft limit on descriptors, if `max_open_files` is None although the
            service has raised its own limit.
        stdout_pipe_bytes: how much standard output the pipe holds while the service does not read.
    """

    niceness: int = 0
    max_memory: int | None = None
    max_open_files: int | None = None
    max_processes: int | None = None
    soft_open_files: int | None = None
    stdout_pipe_bytes: int = LARGEST_BYTES

    @property
    def rlimits(self) -> dict[int, int]:
        """The limits that are set, by the number of their resource (`resource.RLIMIT_…`)."""
        wanted = {
            resource.RLIMIT_DATA: self.max_memory,
            resource.RLIMIT_NOFILE: self.max_open_files,
            resource.RLIMIT_NPROC: self.max_processes,
        }
        return {key: value for key, value in wanted.items() if value is not None}


@dataclass(frozen=True, slots=True)
class AgentShare:
    """The share of the machine's resources that each agent gets, whatever its engine.

    Attributes:
        soft_open_files, stdout_pipe_bytes: as in `ResourceLimits`.
    """

    soft_open_files: int | None = None
    stdout_pipe_bytes: int = LARGEST_BYTES
