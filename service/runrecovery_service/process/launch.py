"""Starts one agent below a shim, which guards it. Linux only.

`prepare` spawns the shim, which waits at its gate, a pipe from the service. Once the launch is
recorded, `ShimmedProcess.release` starts the agent. If the service crashes before that, the shim
exits and the agent never runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import wire
from runrecovery_service.process.agent_command import find_program
from runrecovery_service.process.launch_errors import LaunchFailed, launch_error
from runrecovery_service.process.markers import COOKIE_VARIABLE, LaunchMarkers
from runrecovery_service.process.pipe_size import widen_pipe
from runrecovery_service.process.procfs import read_proc
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.safe_open import open_regular
from runrecovery_service.process.shim_events import Gated
from runrecovery_service.process.shimmed_process import SHIM_TIMEOUT_S, ShimmedProcess
from runrecovery_service.process.spool import Spool

SHIM: Final = str(Path(__file__).with_name("shim_main.py"))


@dataclass(frozen=True, slots=True)
class OutputRest:
    """Where a shim saves the standard output that its service could not keep.

    Attributes:
        path: the file for it, an absolute path.
        kept_bytes: the size of the output file before the agent starts.
    """

    path: Path
    kept_bytes: int


def prepare(
    command: Sequence[str],
    *,
    markers: LaunchMarkers,
    cwd: Path,
    env: Mapping[str, str],
    deadline_ns: int,
    journal: Path | None,
    limits: ResourceLimits | None = None,
    cgroup_procs: Path | None = None,
    rest: OutputRest | None = None,
) -> ShimmedProcess:
    """Spawn the shim for `command` and return once it waits at its gate.

    Blocks for some 15 ms: call it in a thread. No shell is used. The program's name is searched in
    the PATH of `env`, not in the service's own PATH. A relative path is relative to `cwd`.

    Args:
        markers: the markers that the tree will carry.
        cwd: the agent's working directory. The shim itself stays in /.
        env: the agent's whole environment. No variable of the service is added.
        deadline_ns: CLOCK_BOOTTIME at which the shim kills everything unless a heartbeat comes.
        journal: the file to which the shim appends the signals that it sends; None: no journal.
        cgroup_procs: the file that moves the agent into its own cgroup.
        rest: where the shim saves output that the service has not saved; None: such output is lost.

    Raises:
        LaunchFailed: the program is not found or not executable, or the system refused the launch.
        LaunchDelayed: the system refused the launch for a lack of descriptors, processes or memory.
    """
    if read_proc(os.getpid()) is None:
        raise LaunchFailed("a launch needs /proc to record the new process")
    limits = limits or ResourceLimits()
    order = wire.Order(
        deadline_ns=deadline_ns,
        watermark=markers.watermark or 0,
        program=find_program(command, cwd=cwd, path=env.get("PATH", os.defpath)),
        argv=list(command),
        env=dict(env),
        cwd=str(cwd),
        confinement=_confinement(limits, cgroup_procs),
        rest="" if rest is None else str(rest.path),
    )
    try:
        packed = wire.pack(order)
    except ValueError as error:  # a NUL in a word
        raise LaunchFailed(f"{command[0]}: {error}") from error
    kept_bytes = 0 if rest is None else rest.kept_bytes
    process = _spawn(markers, journal, kept_bytes, limits.stdout_pipe_bytes)
    try:
        process.send_order(packed)
        event = process.next_event()
    except LaunchFailed:
        _abandon(process)
        raise
    if not isinstance(event, Gated):
        _abandon(process)
        raise LaunchFailed(f"the shim reported {event} before it reached its gate")
    process.watermarked = event.watermarked
    return process


def _confinement(limits: ResourceLimits, cgroup_procs: Path | None) -> wire.Confinement:
    return wire.Confinement(
        niceness=limits.niceness,
        rlimits=limits.rlimits,
        cgroup_procs=str(cgroup_procs or ""),
        soft_open_files=limits.soft_open_files or 0,
    )


def _spawn(
    markers: LaunchMarkers, journal: Path | None, kept_bytes: int, pipe_bytes: int
) -> ShimmedProcess:
    with ExitStack() as for_service, ExitStack() as for_shim:
        try:
            gate_read, gate = _pipe(for_shim, for_service)
            report, report_write = _pipe(for_service, for_shim)
            journal_fd = _open_journal(journal)
            for_shim.callback(os.close, journal_fd)
            spool = Spool(kept_bytes=kept_bytes)
            for_service.callback(spool.close)
            descriptors = (gate_read, report_write, journal_fd, spool.descriptor)
            popen = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-I", "-S", SHIM, *map(str, descriptors)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                # Only the cookie: variables such as LD_PRELOAD are for the agent, not the shim.
                env={COOKIE_VARIABLE: markers.token},
                close_fds=True,
                pass_fds=descriptors,
                start_new_session=True,
            )
        except OSError as error:
            reason = f"{error.strerror}: {error.filename or 'the shim'}"
            raise launch_error(error, reason) from error
        # If a step below fails, the gate closes with all other descriptors, and the shim exits.
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            assert pipe is not None  # noqa: S101 - all three are pipes
            for_service.callback(pipe.close)
        assert popen.stdout is not None  # noqa: S101 - see above
        widen_pipe(popen.stdout.fileno(), pipe_bytes)
        process = ShimmedProcess(
            popen=popen,
            start_ticks=_start_ticks(popen.pid),
            gate=gate,
            report=report,
            spool=spool,
        )
        for_service.pop_all()
        return process


def _pipe(for_reader: ExitStack, for_writer: ExitStack) -> tuple[int, int]:
    read, write = os.pipe()
    for_reader.callback(os.close, read)
    for_writer.callback(os.close, write)
    return read, write


def _open_journal(journal: Path | None) -> int:
    if journal is None:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    return open_regular(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _start_ticks(pid: int) -> int:
    # /proc shows the shim even if it has ended: it has not been reaped.
    proc = read_proc(pid)
    if proc is None:
        raise LaunchFailed(f"/proc does not show the new process {pid}")
    return proc.start_ticks


def _abandon(process: ShimmedProcess) -> None:
    """Make the shim exit before its agent has started. Reap the shim if it exits in time."""
    process.close()
    with suppress(subprocess.TimeoutExpired):
        process.popen.wait(SHIM_TIMEOUT_S)
