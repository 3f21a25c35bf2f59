"""What the service uses of its machine: clock, threads, processes, identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field

from runrecovery_service.claim import this_host
from runrecovery_service.clock import Clock
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.host import Host
from runrecovery_service.process.processes import MachineProcesses, Processes
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.storage.storage_threads import StorageThreads


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that the service runs on.

    Attributes:
        now_ns: returns CLOCK_BOOTTIME.
        host: returns the identity of the machine and of its boot.
        storage_threads: makes the threads of the storage.
        pool: returns a pool with the given number of threads, for blocking work.
    """

    clock: Clock = field(default_factory=Clock)
    now_ns: Callable[[], int] = boot_time_ns
    host: Callable[[], Host] = this_host
    processes: Processes = field(default_factory=MachineProcesses)
    storage_threads: StorageThreads = field(default_factory=StorageThreads)
    pool: Callable[[int, str], SteadyThreadPool] = SteadyThreadPool
