"""The three replicas of the demo, as processes on one database and with shared workspaces."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runrecovery import RunRecoveryClient
from runrecovery_service.cli.demo.service_process import READY_TIMEOUT_S, ServiceProcess

NAMES: Final = ("a", "b", "c")
LEASE_TTL_S: Final = 4.0
ENGINE: Final = "agent"
# A run may be interrupted once by each of the three events.
CONFIG: Final = """\
database = {database}
instance = {instance}
runs_dir = {runs}
shared_workspaces = true
lease_ttl_s = {lease_ttl_s}
max_concurrent = 8
max_attempts = 5
cancel_grace_s = 1.0
orphan_grace_s = 1.0

[engines.{engine}]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "resumable"]
profile = "resumable"
resumes_interrupted = true
max_resumes = 5
session_file = "{{workspace}}/session-{{value}}.json"
"""


@dataclass(slots=True)
class Replica:
    """One instance. A replica that was killed can be started again, with a new address."""

    name: str
    folder: Path
    starts: int = 0
    process: ServiceProcess | None = None

    @property
    def running(self) -> ServiceProcess:
        """The process of the latest start."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process

    def start(self) -> None:
        """Start the service, and return once it serves."""
        self.starts += 1
        self.process = ServiceProcess.start(self.folder, self.starts)
        with self.connect() as client:
            client.wait_until_ready(READY_TIMEOUT_S)

    def freeze(self) -> None:
        """Suspend the process, as a hypervisor does that pauses a virtual machine."""
        self.running.popen.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let the process continue."""
        self.running.popen.send_signal(signal.SIGCONT)

    def connect(self, *, timeout_s: float = 10.0) -> RunRecoveryClient:
        """Return a client of this replica alone; `timeout_s` is the deadline of a call."""
        return RunRecoveryClient(self.running.address, timeout_s=timeout_s)


@dataclass(slots=True)
class Cluster:
    """The replicas, and which of them the clients use now."""

    replicas: dict[str, Replica] = field(default_factory=dict)
    in_use: set[str] = field(default_factory=set)

    def start(self, name: str) -> None:
        """Start a replica, and let clients use it."""
        self.replicas[name].start()
        self.in_use.add(name)

    def address(self, name: str) -> str:
        """Return the address of a replica."""
        return self.replicas[name].running.address


@contextmanager
def three_replicas(folder: Path, database: str) -> Iterator[Cluster]:
    """Prepare three replicas with their data below `folder`; kill those that run at the end."""
    cluster = Cluster()
    for name in NAMES:
        own = folder / name
        own.mkdir()
        text = CONFIG.format(
            database=json.dumps(database),
            instance=json.dumps(name),
            runs=json.dumps(str(folder / "shared")),
            lease_ttl_s=LEASE_TTL_S,
            engine=ENGINE,
            python=json.dumps(sys.executable),
        )
        (own / "runrecovery.toml").write_text(text, "utf-8")
        cluster.replicas[name] = Replica(name, own)
    try:
        yield cluster
    finally:
        for replica in cluster.replicas.values():
            if replica.process is not None:
                replica.process.crash()
