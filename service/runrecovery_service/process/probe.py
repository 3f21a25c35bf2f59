"""What a start proves of its own containment: it loses a process on purpose, and finds it again.

A process is launched as an agent is, forks twice, leaves its session; then its shim is killed, so
that nothing but its marks tie it to its launch. Once with an empty environment, which leaves the
watermark alone; if that was not found, once with the cookie.
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
from runrecovery_service.process.evidence import (
    COOKIE_VARIABLE,
    Host,
    LeaseEvidence,
    Marks,
    shielded,
)
from runrecovery_service.process.launch import (
    LaunchFailed,
    ShimmedProcess,
    boot_time_ns,
    dispose,
    prepare,
)
from runrecovery_service.process.procfs import Proc

log = structlog.get_logger(__name__)

PATIENCE_S: Final = 10.0
_ESCAPE: Final = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep({PATIENCE_S})
os._exit(0)
"""
FOUND: Final = "a process that had forked twice, changed its session and cleaned its environment"
KEPT: Final = "only a process that kept its environment"


def prove_containment(watermark_bits: int) -> Containment:
    """Find out how surely lost processes are found on this system. Blocks for some 50 ms.

    Args:
        watermark_bits: how large a watermark may be set here; 0: none.
    """
    try:
        if watermark_bits and _finds_its_own(_lease(watermark_bits), {}):
            return Containment(
                level=ContainmentLevel.WATERMARK,
                detail=f"{FOUND} was found by its watermark and ended",
            )
        lease = _lease(0)
        if _finds_its_own(lease, {COOKIE_VARIABLE: lease.token}):
            return Containment(
                level=ContainmentLevel.COOKIE,
                detail=f"{KEPT} was found and ended; {_what_is_missing(watermark_bits)}",
            )
    except (LaunchFailed, OSError, RuntimeError) as error:
        return Containment(level=ContainmentLevel.NONE, detail=f"the probe failed: {error}")
    return Containment(level=ContainmentLevel.NONE, detail="the probe's process was not found")


def _what_is_missing(watermark_bits: int) -> str:
    if not watermark_bits:
        return "the service is itself under a limit on file locks (ulimit -x)"
    return "/proc does not show the limits of processes"


def _lease(watermark_bits: int) -> LeaseEvidence:
    here = Host.here()
    return LeaseEvidence(
        lease_key=0,  # the store counts from 1
        run_key=0,
        cookie=secrets.token_hex(16),
        watermark=secrets.randbits(watermark_bits) or None if watermark_bits else None,
        pid=None,
        start_ticks=None,
        boot_id=here.boot_id,
        pid_namespace=here.pid_namespace,
        host_id=here.host_id,
    )


def _finds_its_own(lease: LeaseEvidence, env: Mapping[str, str]) -> bool:
    process = prepare(
        [sys.executable, "-I", "-S", "-c", _ESCAPE],
        evidence=lease,
        cwd=Path("/"),
        env=env,
        deadline_ns=_soon(),
        book=None,
    )
    shim = procfs.read_proc(process.pid)
    escaped: Proc | None = None
    try:
        process.release(_soon())
        escaped = _announced(process)
        if shim is not None:
            _end(shim, replace(lease, pid=process.pid, start_ticks=process.start_ticks))
        return escaped is not None and escaped.identity in _find_and_end(lease)
    finally:
        if escaped is not None:
            # By the pid that it told itself: whatever the marks were good for, it must go.
            _end(escaped, replace(lease, pid=escaped.pid, start_ticks=escaped.start_ticks))
        dispose(process)


def _soon() -> int:
    return boot_time_ns() + int(PATIENCE_S * 1e9)


def _announced(process: ShimmedProcess) -> Proc | None:
    poll = select.poll()
    poll.register(process.stdout.fileno(), select.POLLIN)
    if not poll.poll(PATIENCE_S * 1000):
        return None
    line = process.stdout.readline()
    return procfs.read_proc(int(line)) if line.strip().isdigit() else None


def _find_and_end(lease: LeaseEvidence) -> set[tuple[int, int]]:
    """Do what a sweep does, in one pass: look at everybody, end who bears the marks."""
    marks = Marks([lease])
    everybody = procfs.scan()
    shield = shielded(everybody, own_pid=os.getpid())
    found = (proc for proc in everybody.values() if not proc.dead and proc.pid not in shield)
    return {proc.identity for proc in found if marks.read(proc) and _end(proc, lease)}


def _end(proc: Proc, lease: LeaseEvidence) -> bool:
    """Kill one process of the probe; True when it is dead."""
    marks = Marks([lease])
    try:
        pidfd = os.pidfd_open(proc.pid)
    except ProcessLookupError:
        return False

    def prove() -> str | None:
        again = procfs.read_proc(proc.pid)
        if again is None or again.identity != proc.identity or again.dead:
            return None
        hit = marks.read(again)
        return None if hit is None else hit.kind.value

    def audit(pid: int, name: str, evidence: str | None, outcome: str) -> None:
        log.debug(
            "process.probe_signalled", pid=pid, signal=name, evidence=evidence, outcome=outcome
        )

    try:
        outcome = signals.send(proc.pid, pidfd, signal.SIGKILL, prove=prove, audit=audit)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return outcome == signals.SENT and bool(poll.poll(PATIENCE_S * 1000))
    finally:
        os.close(pidfd)
