"""The processes of the demo's runs, found in /proc without asking the service."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path

from runrecovery_service.cli.demo.scenario import DemoFailed
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import procfs, signals
from runrecovery_service.process.launch import SHIM


def find_processes(folder: Path, run_ids: Mapping[str, str]) -> dict[str, list[int]]:
    """Return the living processes below `folder` by run, which is in their environment."""
    found: dict[str, list[int]] = {name: [] for name in run_ids}
    names = {f"RUNRECOVERY_RUN_ID={run_id}".encode(): name for name, run_id in run_ids.items()}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            for variable in _environment(Path(entry.path), folder) & names.keys():
                found[names[variable]].append(int(entry.name))
    return found


def _environment(process: Path, folder: Path) -> set[bytes]:
    """Return the environment of a process that works below `folder`; empty for any other."""
    try:
        if not (process / "cwd").readlink().is_relative_to(folder):
            return set()
        return set((process / "environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


@dataclass(frozen=True, slots=True)
class Shim:
    """The shim that guards the agent of one run of the demo."""

    proc: procfs.Proc

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the shim, if its pid still belongs to the same process."""
        pidfd = os.pidfd_open(self.proc.pid)
        try:
            outcome = signals.send(
                self.proc.pid, pidfd, number, prove=self._prove_identity, audit=lambda *_: None
            )
        finally:
            os.close(pidfd)
        if outcome != signals.SENT:
            raise DemoFailed(f"the shim {self.proc.pid} could not be signalled: {outcome}")

    def _prove_identity(self) -> str | None:
        now = procfs.read_proc(self.proc.pid)
        return "shim" if now is not None and now.identity == self.proc.identity else None


def find_shim(run: str, pids: Iterable[int]) -> Shim:
    """Return the shim of a run: the parent of one of its processes that runs the shim's program."""
    for pid in pids:
        agent = procfs.read_proc(pid)
        parent = None if agent is None else procfs.read_proc(agent.ppid)
        if parent is not None and SHIM.encode() in procfs.read(f"/proc/{parent.pid}/cmdline"):
            return Shim(parent)
    raise DemoFailed(f"run {run} has no shim")
