"""A home whose service may be a broken one, or one that may not signal other users."""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from campaign import watch
from campaign.plans import RunPlan
from campaign.watch import Identity
from runrecovery.v1 import run_pb2
from support.api import Api
from support.engines import EngineSpec
from support.service import Home, ServiceProcess
from support.waiting import until

HERE: Final = Path(__file__).parent
WITHOUT_KILL: Final = ("setpriv", "--bounding-set", "-kill")
"""Takes from root the right to signal other users' processes. Not another user instead: he might
not be able to execute the Python that we run in."""
SLOTS: Final = 4
SHIM: Final = "shim_main.py"
"""Among the arguments of every shim, also of other services."""


def is_root() -> bool:
    """True when what only root can make may be tried."""
    return os.geteuid() == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """What a lease marks its tree by."""

    key: int
    run_id: str
    cookie: str
    watermark: int

    @property
    def token(self) -> str:
        """What its tree bears in its environment."""
        return f"{self.key:x}.{self.cookie}"


@dataclass(frozen=True, slots=True)
class Shims:
    """Pinned shims, by identity."""

    pidfds: Mapping[Identity, int]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to those that live."""
        for pidfd in self.pidfds.values():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)

    def alive(self) -> list[int]:
        """Return the pids of those that live."""
        poll = select.poll()
        for pidfd in self.pidfds.values():
            poll.register(pidfd, select.POLLIN)
        dead = {pidfd for pidfd, _ in poll.poll(0)}
        return [identity[0] for identity, pidfd in self.pidfds.items() if pidfd not in dead]

    def close(self) -> None:
        """Let go of them."""
        for pidfd in self.pidfds.values():
            os.close(pidfd)


class House(Home):
    """A home whose engines are the adversary.

    Attributes:
        mark: among the arguments of everything that its engines start.
        mutant: what is broken in its service; empty: nothing.
        all_mighty: its service may signal everybody; else, started by root, only root's.
    """

    def __init__(self, path: Path, *, mutant: str = "", all_mighty: bool = True) -> None:
        self.mark = secrets.token_hex(8)
        self.mutant = mutant
        self.all_mighty = all_mighty
        path.mkdir()
        command = (sys.executable, "-I", "-S", str(HERE / "adversary.py"), self.mark)
        super().__init__(
            path,
            engines={
                "resumable": EngineSpec(command=command),
                "sticky": EngineSpec(command=command, profile="sticky_process"),
            },
            max_concurrent=SLOTS,
            orphan_grace_s=0.1,
            cancel_grace_s=0.2,
        )

    @property
    def _program(self) -> Sequence[str]:
        before = () if self.all_mighty else WITHOUT_KILL
        if self.mutant:
            return (*before, sys.executable, str(HERE / "mutants.py"), self.mutant)
        return (*before, sys.executable, "-m", "runrecovery_service")

    def spawn(self, *arguments: str, stderr: int | None = None) -> ServiceProcess:
        """Start the service, as it is or broken, as mighty as the house says."""
        log = self.path / f"service-{len(self.services)}.log"
        words = ["--config", str(self.config), "--data-dir", str(self.data)]
        fixed = ["--listen", "127.0.0.1:0", "--log-format", "json"]
        with log.open("wb") as output:
            popen = subprocess.Popen(
                [*self._program, "serve", *words, *fixed, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output if stderr is None else stderr,
                cwd=self.path,
                start_new_session=True,
            )
        service = ServiceProcess(popen=popen, log=log)
        self.services.append(service)
        return service

    def create(self, api: Api, planned: RunPlan) -> run_pb2.Run:
        """Create a run whose agent grows the planned tree."""
        given: dict[str, Any] = {"asks": planned.asks, "node": planned.node}
        return api.create(planned.engine, given, restart_policy=planned.policy)

    def marks(self, *, running: bool = False) -> Marks | None:
        """Return the marks of the newest lease, or of the newest one whose agent runs under the
        service of now; None: there is none."""
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
        return Marks(key=key, run_id=run_id, cookie=cookie, watermark=watermark)

    def forge_lease(self, pid: int, start_ticks: int) -> None:
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
        """Hold the living shims of a service: who is signalled later is who was looked at."""
        pidfds = {}
        for seen in watch.bearing(SHIM).values():
            pidfd = os.pidfd_open(seen.pid) if seen.ppid == service.pid else -1
            now = watch.look_at(seen.pid) if pidfd >= 0 else None
            if now is not None and SHIM.encode() in now.command and now.ppid == service.pid:
                pidfds[now.identity] = pidfd
            elif pidfd >= 0:
                os.close(pidfd)
        return Shims(pidfds)

    def leave(self) -> None:
        """End all that was ever started here."""
        for service in self.services:
            if service.popen.poll() is None:
                service.popen.kill()
        watch.end_bearing(self.mark)
        self.clear()
        until(lambda: not watch.bearing(self.mark), "nobody of the house is left")
        shutil.rmtree(self.path)
