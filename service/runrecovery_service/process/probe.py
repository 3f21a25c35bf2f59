"""The containment probe of a start: it loses a process on purpose and tries to find it again.

A process is launched like an agent, forks twice and leaves its session. Then its shim is killed, so
that only markers connect the process to its launch. The first try has an empty environment, so that
only the watermark is left. If the process was not found, the second try keeps the cookie.
"""

from __future__ import annotations

import os
import secrets
import select
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.domain.reconciliation import Containment, ContainmentLevel
from runrecovery_service.process import procfs, signals
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.host import Host
from runrecovery_service.process.launch import prepare
from runrecovery_service.process.launch_errors import LaunchFailed
from runrecovery_service.process.markers import (
    COOKIE_VARIABLE,
    LaunchMarkers,
    MarkerIndex,
    protected_pids,
)
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.shimmed_process import ShimmedProcess

log = structlog.get_logger(__name__)

TIMEOUT_S: Final = 10.0
_ESCAPE: Final = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep({TIMEOUT_S})
os._exit(0)
"""
FOUND: Final = "a process that had forked twice, changed its session and cleaned its environment"
KEPT: Final = "only a process that kept its environment"


def prove_containment(watermark_bits: int) -> Containment:
    """Return how reliably lost processes are found on this system. Block for some 50 ms.

    Args:
        watermark_bits: the size of a watermark on this system; 0: none can be set.
    """
    try:
        if watermark_bits and _finds_escaped(_new_markers(watermark_bits), {}):
            return Containment(
                level=ContainmentLevel.WATERMARK,
                detail=f"{FOUND} was found by its watermark and ended",
            )
        markers = _new_markers(0)
        if _finds_escaped(markers, {COOKIE_VARIABLE: markers.token}):
            return Containment(
                level=ContainmentLevel.COOKIE,
                detail=f"{KEPT} was found and ended; {_why_no_watermark(watermark_bits)}",
            )
    except (LaunchFailed, OSError, RuntimeError) as error:
        return Containment(level=ContainmentLevel.NONE, detail=f"the probe failed: {error}")
    return Containment(level=ContainmentLevel.NONE, detail="the probe's process was not found")


def _why_no_watermark(watermark_bits: int) -> str:
    if not watermark_bits:
        return "the service is itself under a limit on file locks (ulimit -x)"
    return "/proc does not show the limits of processes"


def _new_markers(watermark_bits: int) -> LaunchMarkers:
    return LaunchMarkers(
        launch_key=0,  # the keys of stored launches begin with 1
        run_key=0,
        cookie=secrets.token_hex(16),
        watermark=secrets.randbits(watermark_bits) or None if watermark_bits else None,
        pid=None,
        start_ticks=None,
        host=Host.here(),
    )


def _finds_escaped(markers: LaunchMarkers, env: Mapping[str, str]) -> bool:
    process = prepare(
        [sys.executable, "-I", "-S", "-c", _ESCAPE],
        markers=markers,
        cwd=Path("/"),
        env=env,
        deadline_ns=_deadline_ns(),
        journal=None,
    )
    shim = procfs.read_proc(process.pid)
    escaped: Proc | None = None
    try:
        process.release(_deadline_ns())
        escaped = _read_escaped(process)
        if shim is not None:
            _kill(shim, replace(markers, pid=process.pid, start_ticks=process.start_ticks))
        return escaped is not None and escaped.identity in _find_and_kill(markers)
    finally:
        if escaped is not None:
            # Kill it by the pid that it reported itself, because it must end even if no marker is
            # found.
            _kill(escaped, replace(markers, pid=escaped.pid, start_ticks=escaped.start_ticks))
        process.dispose()


def _deadline_ns() -> int:
    return boot_time_ns() + int(TIMEOUT_S * 1e9)


def _read_escaped(process: ShimmedProcess) -> Proc | None:
    """Return the escaped process, which writes its pid to standard output."""
    poll = select.poll()
    poll.register(process.stdout.fileno(), select.POLLIN)
    if not poll.poll(TIMEOUT_S * 1000):
        return None
    line = process.stdout.readline()
    return procfs.read_proc(int(line)) if line.strip().isdigit() else None


def _find_and_kill(markers: LaunchMarkers) -> set[tuple[int, int]]:
    """Kill every process that carries a marker, in one scan; return the processes that died."""
    index = MarkerIndex([markers])
    snapshot = procfs.scan()
    protected = protected_pids(snapshot, own_pid=os.getpid())
    living = (proc for proc in snapshot.values() if not proc.dead and proc.pid not in protected)
    return {proc.identity for proc in living if index.find_member(proc) and _kill(proc, markers)}


def _kill(proc: Proc, markers: LaunchMarkers) -> bool:
    """Kill one process of the probe; True once it is dead."""
    index = MarkerIndex([markers])
    try:
        pidfd = os.pidfd_open(proc.pid)
    except ProcessLookupError:
        return False

    def prove() -> str | None:
        again = procfs.read_proc(proc.pid)
        if again is None or again.identity != proc.identity or again.dead:
            return None
        member = index.find_member(again)
        return None if member is None else member.proof.value

    def audit(pid: int, name: str, proof: str | None, outcome: str) -> None:
        log.debug("process.probe_signalled", pid=pid, signal=name, evidence=proof, outcome=outcome)

    try:
        outcome = signals.send(proc.pid, pidfd, signal.SIGKILL, prove=prove, audit=audit)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return outcome == signals.SENT and bool(poll.poll(TIMEOUT_S * 1000))
    finally:
        os.close(pidfd)
