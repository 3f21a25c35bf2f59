"""A home of the campaign: its service may be a mutant, or may lack the right to signal others."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from campaign import scan
from campaign.plans import RunPlan
from campaign.scan import Identity
from runrecovery.v1 import run_pb2
from support.api import Api
from support.engines import EngineSpec
from support.service import Home, ServiceProcess
from support.waiting import until

HERE: Final = Path(__file__).parent
WITHOUT_KILL: Final = ("setpriv", "--bounding-set", "-kill")
"""Takes from root the right to signal other users' processes. To become another user instead would
not do: that user may lack access to this Python."""
SLOTS: Final = 4
SHIM: Final = "shim_main.py"
"""Among the arguments of every shim, also of other services."""


def is_root() -> bool:
    """Return whether trials that need root can run."""
    return os.geteuid() == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedMarkers:
    """The markers of one launch record."""

    key: int
    run_id: str
    cookie: str
    watermark: int

    @property
    def token(self) -> str:
        """The value of the cookie variable in the environment of the tree."""
        return f"{self.key:x}.{self.cookie}"


@dataclass(frozen=True, slots=True)
class Shims:
    """Shims that are held by pidfds, by identity."""

    pidfds: Mapping[Identity, int]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the living ones."""
        for pidfd in self.pidfds.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)

    def alive(self) -> list[int]:
        """Return the pids of the living ones."""
        poll = select.poll()
        for pidfd in self.pidfds.values():
            poll.register(pidfd, select.POLLIN)
        dead = {pidfd for pidfd, _ in poll.poll(0)}
        return [identity[0] for identity, pidfd in self.pidfds.items() if pidfd not in dead]

    def close(self) -> None:
        """Close the pidfds."""
        for pidfd in self.pidfds.values():
            os.close(pidfd)


class CampaignHome(Home):
    """A home whose engines are the hostile agent.

    Attributes:
        mark: an argument of every process that the engines start.
    """

    def __init__(self, path: Path, *, mutant: str = "", may_signal_all: bool = True) -> None:
        """Make the configuration.

        Args:
            mutant: the mutant that runs as the service; empty for the real service.
            may_signal_all: whether the service may signal processes of other users.
        """
        self.mark = secrets.token_hex(8)
        path.mkdir()
        rights = () if may_signal_all else WITHOUT_KILL
        program = (sys.executable, str(HERE / "mutants.py"), mutant) if mutant else ()
        command = (sys.executable, "-I", "-S", str(HERE / "hostile_agent.py"), self.mark)
        super().__init__(
            path,
            engines={
                "resumable": EngineSpec(command=command),
                "sticky": EngineSpec(command=command, profile="sticky_process"),
            },
            prefix=(*rights, *program),
            max_concurrent=SLOTS,
            orphan_grace_s=0.1,
            cancel_grace_s=0.2,
        )

    def create(self, api: Api, planned: RunPlan) -> run_pb2.Run:
        """Create a run whose agent grows the planned tree."""
        given: dict[str, Any] = {"asks": planned.asks, "node": planned.node}
        return api.create(planned.engine, given, restart_policy=planned.policy)

    def newest_markers(self, *, running: bool = False) -> RecordedMarkers | None:
        """Return the markers of the newest launch record, or None if there is no record.

        Args:
            running: consider only launches whose agent runs under the current service.
        """
        rows = self.rows(
            "SELECT l.id, r.run_id, l.cookie, l.watermark FROM process_lease l"
            " JOIN run r ON r.id = l.run WHERE l.watermark IS NOT NULL AND (NOT ?"
            " OR l.state = 'RUNNING' AND l.epoch = (SELECT epoch FROM instance))"
            " ORDER BY l.id DESC LIMIT 1",
            running,
        )
        if not rows:
            return None
        key, run_id, cookie, watermark = rows[0]
        return RecordedMarkers(key=key, run_id=run_id, cookie=cookie, watermark=watermark)

    def forge_launch(self, pid: int, start_ticks: int) -> None:
        """Record a launch of an earlier epoch whose shim had this pid."""
        with self.store(writable=True) as store:
            store.execute(
                "INSERT INTO process_lease (run, attempt, turn, instance, epoch, host_id, boot_id,"
                " pid_namespace, cookie, watermark, pid, start_ticks, state, processes_ended,"
                " created_at) SELECT run, attempt, 1000000 + id, instance, epoch, host_id, boot_id,"
                " pid_namespace, ?, ?, ?, ?, 'RUNNING', 0, created_at FROM process_lease"
                " ORDER BY id DESC LIMIT 1",
                (secrets.token_hex(16), secrets.randbits(61) | 1 << 61, pid, start_ticks),
            )

    def pin_shims(self, service: ServiceProcess) -> Shims:
        """Open pidfds of the living shims of a service."""
        pidfds = {}
        for seen in scan.processes_with(SHIM).values():
            pidfd = os.pidfd_open(seen.pid) if seen.ppid == service.pid else -1
            now = scan.read_process(seen.pid) if pidfd >= 0 else None
            if now is not None and SHIM.encode() in now.command and now.ppid == service.pid:
                pidfds[now.identity] = pidfd
            elif pidfd >= 0:
                os.close(pidfd)
        return Shims(pidfds)

    def clear_all(self) -> None:
        """Kill everything that was started here, and remove the folder."""
        for service in self.services:
            if service.popen.poll() is None:
                service.popen.kill()
        scan.kill_all_with(self.mark)
        self.clear()
        until(lambda: not scan.processes_with(self.mark), "no process of the home is left")
        shutil.rmtree(self.path)
