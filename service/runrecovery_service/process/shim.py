"""The shim: the guard of one process tree, between the service and the agent.

It is started before the agent and sets the launch's markers on itself, which all its descendants
inherit. It waits at the gate until the launch is recorded, and then starts the agent. It reaps
every descendant that loses its parent, and reports how the agent ended. When no process is left and
the service needs no more of the agent's output, it exits.

The shim kills its whole tree at once if the gate closes (the service died) or if no heartbeat comes
before the deadline (the service hangs or was cut off from its database). In both cases the service
may be unable to kill the tree. If the service died, the shim then saves the output that the service
had not kept.

`shim_main.py` runs it with its inherited descriptors: two pipes (`wire.py`), the journal, and the
spool (`spool.py`). It imports only light modules of the standard library.
"""

from __future__ import annotations

import os
import resource
import select
import time

from runrecovery_service.process import output_rest, prctl, procfs, signals, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal  # see signals.py

TICK_S = 1.0
"""How often the deadline is checked: a poll does not notice that the machine slept, but boot time
also passes while it sleeps."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that others can send to the whole tree. The shim has to outlive them."""
_FREEZES = 10
"""Rounds of SIGSTOP that search for new processes before SIGKILL is sent in any case."""
_KILL_TICK_S = 0.002
_BLIND_S = 0.1
_MAX_BARRED_S = 60.0
"""Longest time between two tries while the kernel lets this user signal none of the living
processes. They still belong to the launch, so the shim stays."""
_KILLED = "killed"


class Shim:
    """The guard of one launch. `run` is its whole life."""

    def __init__(self, gate: int, report: int, journal: int, spool: int) -> None:
        self._gate = gate
        self._report = report
        self._journal = journal
        self._spool = spool
        self._output = -1
        self._unparsed = b""
        self._gate_closed = False
        self._is_released = False
        self._is_output_done = False
        self._is_output_left = False
        self._deadline_ns = 0
        self._agent = 0
        self._start_ticks = 0
        self._wake_read, self._wake_write = os.pipe()

    def run(self) -> int:
        """Guard the tree; return the exit code of the shim."""
        prctl.hide()  # first: no process of the same user may write to our pipes or trace us
        os.set_blocking(self._report, False)  # a service that does not read must not block us
        own = (self._gate, self._report, self._journal, self._spool)
        for fd in (*own, self._wake_read, self._wake_write):
            os.set_inheritable(fd, False)  # noqa: FBT003 - that is its signature
        order = self._read_order()
        if order is None:
            return wire.NEVER_RAN
        watermarked = self._prepare_guard(order)
        self._report_event(f"{wire.GATED} {watermarked:d}")
        if not self._wait_for_release():
            return wire.NEVER_RAN
        if not self._start_agent(order):
            return 0
        why = self._watch()
        if why:
            self._report_event(f"{wire.ENDING} {why}")
            self._kill_tree(why)
        self._report_event(wire.EMPTY)
        if order.rest:
            self._settle_output(order.rest)
        return 0

    # -- the gate ------------------------------------------------------------------------------

    def _read_order(self) -> wire.Order | None:
        while b"\n" not in self._unparsed:
            if not self._read_gate():
                return None
        length, _, self._unparsed = self._unparsed.partition(b"\n")
        while len(self._unparsed) < int(length):
            if not self._read_gate():
                return None
        order = wire.unpack(self._unparsed[: int(length)])
        self._unparsed = self._unparsed[int(length) :]
        self._deadline_ns = order.deadline_ns
        return order

    def _read_gate(self) -> bool:
        """Wait for bytes from the gate; False once it is closed."""
        data = os.read(self._gate, 65536)
        self._unparsed += data
        self._gate_closed = not data
        return bool(data)

    def _parse_lines(self) -> None:
        """Read the newest deadline and the orders from the lines that have arrived."""
        *lines, self._unparsed = self._unparsed.split(b"\n")
        for line in lines:
            if line == wire.RELEASE:
                self._is_released = True
            elif line == wire.DONE:
                self._is_output_done = True
            elif line == wire.LEFT:
                self._is_output_left = True
            else:
                self._deadline_ns = int(line)

    def _wait_for_release(self) -> bool:
        """Wait for the release; False if the gate closed or the deadline passed first."""
        while not self._gate_closed:
            if self._is_overdue():  # before reading: a heartbeat that comes now is too late
                return False
            self._parse_lines()
            if self._is_released:
                return not self._is_overdue()
            if _is_readable(self._gate, TICK_S):
                self._read_gate()
        return False

    def _is_overdue(self) -> bool:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) > self._deadline_ns

    # -- preparation ---------------------------------------------------------------------------

    def _prepare_guard(self, order: wire.Order) -> bool:
        """Become subreaper, set up signals and the watermark; True if the watermark is set."""
        prctl.become_subreaper()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        # The shim inherits the signals that the service's thread had blocked, SIGCHLD perhaps.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            own = procfs.read_proc(os.getpid())
        except OSError:  # no descriptor or memory now: a later start will not find the exit code
            own = None
        self._start_ticks = own.start_ticks if own else 0
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if not order.watermark:
            return False
        try:
            resource.setrlimit(procfs.RLIMIT_LOCKS, (order.watermark, order.watermark))
        except (OSError, ValueError):
            return False
        return True

    # -- the agent -----------------------------------------------------------------------------

    def _start_agent(self, order: wire.Order) -> bool:
        """Start the agent; False if the system refused, which is then reported."""
        try:
            # Opened before the fork: once the agent is alive, no step of the shim may fail.
            null = os.open(os.devnull, os.O_RDWR)
            failure_read, failure_write = os.pipe()  # a successful exec closes it without data
            if order.rest:
                self._output = os.open("/proc/self/fd/1", os.O_RDONLY | os.O_NONBLOCK)
            self._agent = os.fork()
        except OSError as error:
            self._report_event(f"{wire.REFUSED} {error.errno or 0} fork")
            return False
        if not self._agent:
            _become_agent(order, failure_write)
        os.close(failure_write)
        failure = b""
        while piece := os.read(failure_read, 4096):
            failure += piece
        os.close(failure_read)
        if failure:
            os.waitpid(self._agent, 0)
            self._report_event(f"{wire.REFUSED} {os.fsdecode(failure)}")
            return False
        try:
            proc = procfs.read_proc(self._agent)
        except OSError:  # no descriptor or memory now; the service does not need the start ticks
            proc = None
        self._report_event(f"{wire.STARTED} {self._agent} {proc.start_ticks if proc else 0}")
        self._release_streams(null)
        return True

    def _release_streams(self, null: int) -> None:
        """Close the agent's streams in the shim, so that both sides notice the end of a stream.

        Errors of the shim itself are written to the journal from now on.
        """
        for fd, target in ((0, null), (1, null), (2, self._journal)):
            os.dup2(target, fd)
        os.close(null)

    def _watch(self) -> str:
        """Reap until no process is left; or return why the whole tree must be killed."""
        poll = select.poll()
        poll.register(self._gate, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while self._reap():
            left_s = (self._deadline_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9
            events = dict(poll.poll(max(0.0, min(left_s, TICK_S)) * 1000))
            if self._is_overdue():  # before reading: a heartbeat that comes now is too late
                return wire.LEASE_OVER
            if self._gate in events and not self._read_gate():
                return wire.SERVICE_GONE
            self._parse_lines()
            if self._wake_read in events:
                os.read(self._wake_read, 4096)
        return ""

    def _reap(self) -> bool:
        """Reap dead children; False if no child is left.

        Every descendant that loses its parent becomes a child of the shim. So no children means no
        descendants, as reported by the kernel and not by a scan.
        """
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._agent:
                code = os.waitstatus_to_exitcode(status)
                # Recorded before it is reported: a restart then finds every exit that the service
                # knew.
                self._write_fact(f'"event": "{wire.AGENT_EXITED}", "code": {code}')
                user_us, system_us = int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6)
                self._report_event(f"{wire.EXITED} {code} {user_us} {system_us} {usage.ru_maxrss}")

    # -- the last output -----------------------------------------------------------------------

    def _settle_output(self, rest: str) -> None:
        """Wait until the service needs no more output, or save the output that the service leaves.

        While the service can still read the pipe, the shim must not read it. A service that has
        hung for longer than its lease can still do so, although the tree is dead.
        """
        os.close(self._report)  # the service waits for the end of the report, not for the exit
        while not (self._is_output_done or self._is_output_left or self._gate_closed):
            self._read_gate()
            self._parse_lines()
        if not self._is_output_done:
            is_stopped = self._is_output_left
            fact = output_rest.save(self._output, self._spool, rest, is_stopped=is_stopped)
            self._write_fact(fact)

    # -- killing the tree ----------------------------------------------------------------------

    def _kill_tree(self, why: str) -> None:
        """Kill every descendant; return when the kernel reports that none is left.

        All processes are stopped first, until a scan finds no new one. A process that is killed
        while others run could leave children that no scan has seen.
        """
        state: dict[tuple[int, int], str] = {}
        freezes, barred_s = 0, _KILL_TICK_S
        while self._reap():
            living = self._living()
            newcomers = [proc for proc in living if proc.identity not in state]
            for proc in newcomers:
                state[proc.identity] = self._signal(proc, signal.SIGSTOP, why)
            freezes = freezes + 1 if newcomers else _FREEZES
            if freezes >= _FREEZES:
                freezes = 0
                for proc in living:
                    if state[proc.identity] != _KILLED:
                        outcome = self._signal(proc, signal.SIGKILL, why)
                        state[proc.identity] = _KILLED if outcome == signals.SENT else outcome
            is_stuck = living and all(state[p.identity] == signals.BARRED for p in living)
            barred_s = min(barred_s * 2, _MAX_BARRED_S) if is_stuck else _KILL_TICK_S
            self._pause(barred_s)

    def _pause(self, seconds: float) -> None:
        """Wait until a child has died, `seconds` at most."""
        if _is_readable(self._wake_read, seconds):
            os.read(self._wake_read, 4096)

    def _living(self) -> list[procfs.Proc]:
        try:
            below = procfs.descendants(procfs.scan(), os.getpid())
        except OSError:  # no descriptor or memory now; the shim must not exit for that
            self._pause(_BLIND_S)
            return []
        return [proc for proc in below if not proc.dead]

    def _signal(self, proc: procfs.Proc, number: int, why: str) -> str:
        try:
            pidfd = os.pidfd_open(proc.pid)
        except OSError:  # it has ended, or no descriptor is left: the next scan decides
            return signals.GONE
        try:
            return signals.send(
                proc.pid,
                pidfd,
                number,
                prove=lambda: _descent(proc),
                audit=lambda *facts: self._audit(proc, why, *facts),
            )
        except OSError:  # no descriptor to read /proc: the next scan tries again
            return signals.GONE
        finally:
            os.close(pidfd)

    def _audit(
        self, proc: procfs.Proc, why: str, pid: int, name: str, proof: str | None, outcome: str
    ) -> None:
        at_ns = time.time_ns()
        line = (
            f'{{"event": "process.signalled", "at_ns": {at_ns}, "pid": {pid},'
            f' "start_ticks": {proc.start_ticks}, "signal": "{name}", "why": "{why}",'
            f' "evidence": "{proof}", "outcome": "{outcome}", "by": {os.getpid()}}}\n'
        )
        self._write_journal(line)

    def _write_fact(self, members: str) -> None:
        self._write_journal(
            f'{{{members}, "at_ns": {time.time_ns()}, "by": {os.getpid()},'
            f' "by_start_ticks": {self._start_ticks}}}\n'
        )

    def _write_journal(self, line: str) -> None:
        try:
            os.write(self._journal, line.encode())
        except OSError:  # a full disk must not keep processes alive
            return

    def _report_event(self, event: str) -> None:
        """Send an event to the service. A service that is gone is ignored."""
        try:
            os.write(self._report, event.encode("utf-8", "replace") + b"\n")
        except OSError:
            return


def _is_readable(fd: int, seconds: float) -> bool:
    """Wait up to `seconds`. By poll, because select takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _descent(proc: procfs.Proc) -> str | None:
    """Return "descent" if the process still is the same one and a descendant of the shim."""
    found = procfs.read_proc(proc.pid)
    if found is None or found.identity != proc.identity:
        return None
    own_pid = os.getpid()
    while found is not None and found.ppid not in {own_pid, 0}:
        found = procfs.read_proc(found.ppid)
    return "descent" if found is not None and found.ppid == own_pid else None


# -- the forked child that becomes the agent ---------------------------------------------------


def _become_agent(order: wire.Order, failure: int) -> None:
    """Turn this fork into the agent, or write the failed step to `failure`. Never return."""
    limits = order.confinement
    step = "setsid"
    try:
        os.setsid()
        step = f"the working directory {order.cwd}"
        os.chdir(order.cwd)
        if limits.cgroup_procs:
            step = f"the cgroup {limits.cgroup_procs}"
            with open(limits.cgroup_procs, "wb", buffering=0) as procs:  # noqa: PTH123 - light
                procs.write(b"0")
        step = "the score for the out-of-memory killer"
        _drop_oom_protection()
        step = "nice"
        if limits.niceness:
            os.nice(limits.niceness)
        _reset_signals()
        if limits.soft_open_files:
            step = "the limit on open files"
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (limits.soft_open_files, hard))
        for key, value in limits.rlimits.items():
            step = f"limit {key}"
            resource.setrlimit(key, (value, value))
        step = order.program
        os.execve(order.program, order.argv, order.env)  # noqa: S606 - no shell is the point
    except BaseException as error:  # noqa: BLE001 - the fork must end here, whatever fails
        code = error.errno if isinstance(error, OSError) else 0
        os.write(failure, f"{code or 0} {step}".encode("utf-8", "replace"))
    finally:
        os._exit(wire.NEVER_RAN)


def _drop_oom_protection() -> None:
    """Reset a negative score: only the service is protected from the out-of-memory killer."""
    score = "/proc/self/oom_score_adj"
    if procfs.read(score).startswith(b"-"):
        with open(score, "wb", buffering=0) as file:  # noqa: PTH123 - light
            file.write(b"0")


def _reset_signals() -> None:
    """Reset every signal that the shim, or the service's parent, had ignored."""
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):  # SIGKILL, SIGSTOP and the C library's own
            continue
