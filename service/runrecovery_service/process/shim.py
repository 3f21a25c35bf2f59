"""The guard of one process tree: it stands between the service and the agent.

It is started before the agent, marks itself (and so all that comes of it), waits at the gate until
the launch is on record, and starts the agent. Then it reaps whoever loses his parent, reports how
the agent ended, and leaves when nothing is left. When the gate closes, because the service died,
or no heartbeat comes before the deadline, because it hangs or was cut off from its store, it ends
everything below it at once: nobody else may be there to do it.

Run by `shim_main.py` with three inherited descriptors: two pipes (`wire.py`) and a file that takes
the audit. The standard library only, and of that only what is light.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time

from runrecovery_service.process import prctl, procfs, signals, wire

TICK_S = 1.0
"""Boot time also passes while the machine sleeps, and a poll's does not: look so often."""
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What ends a tree must outlive what is sent to the tree."""
_FREEZES = 10
"""Rounds of SIGSTOP that look for newcomers before SIGKILL comes anyway."""
_KILL_TICK_S = 0.002
_BLIND_S = 0.1
_BARRED_MOST_S = 60.0
"""Between two tries while all that is left may not be signalled by this user: it stays ours, so the
shim stays."""
_KILLED = "killed"


class Shim:
    """One launch. `run` is its whole life."""

    def __init__(self, gate: int, report: int, book: int) -> None:
        self._gate = gate
        self._report = report
        self._book = book
        self._heard = b""
        self._gate_closed = False
        self._is_released = False
        self._deadline_ns = 0
        self._agent = 0
        self._woken, self._wake = os.pipe()

    def run(self) -> int:
        """Guard, and return the exit code for the shim itself."""
        prctl.hide()  # first of all: nobody of our user may write into our pipes, or trace us
        os.set_blocking(self._report, False)  # a service that does not read keeps nobody alive
        for fd in (self._gate, self._report, self._book, self._woken, self._wake):
            os.set_inheritable(fd, False)  # noqa: FBT003 - that is its signature
        order = self._read_order()
        if order is None:
            return wire.NEVER_RAN
        marked = self._stand_guard(order)
        self._tell(f"{wire.GATED} {marked:d}")
        if not self._released():
            return wire.NEVER_RAN
        if not self._start(order):
            return 0
        why = self._watch()
        if why:
            self._tell(f"{wire.ENDING} {why}")
            self._end_everything(why)
        self._tell(wire.EMPTY)
        return 0

    # -- the gate ------------------------------------------------------------------------------

    def _read_order(self) -> wire.Order | None:
        while b"\n" not in self._heard:
            if not self._hear():
                return None
        length, _, self._heard = self._heard.partition(b"\n")
        while len(self._heard) < int(length):
            if not self._hear():
                return None
        order = wire.unpack(self._heard[: int(length)])
        self._heard = self._heard[int(length) :]
        self._deadline_ns = order.deadline_ns
        return order

    def _hear(self) -> bool:
        """Read what the gate has, waiting for it; False once it is closed."""
        heard = os.read(self._gate, 65536)
        self._heard += heard
        self._gate_closed = not heard
        return bool(heard)

    def _take_lines(self) -> None:
        """Take the newest deadline of those that came, and the release."""
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            if line == wire.RELEASE:
                self._is_released = True
            else:
                self._deadline_ns = int(line)

    def _released(self) -> bool:
        """Wait for the release; False when the gate closed or the deadline passed."""
        while not self._gate_closed:
            if self._over():  # before hearing more: what comes now comes too late
                return False
            self._take_lines()
            if self._is_released:
                return not self._over()
            if _readable(self._gate, TICK_S):
                self._hear()
        return False

    def _over(self) -> bool:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) > self._deadline_ns

    # -- standing guard ------------------------------------------------------------------------

    def _stand_guard(self, order: wire.Order) -> bool:
        """Mark this process and take its place; True when the watermark is set."""
        prctl.become_subreaper()
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        # What the service's thread blocked, the deaths of our children maybe, came along.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.set_blocking(self._woken, False)
        os.set_blocking(self._wake, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        if not order.watermark:
            return False
        try:
            resource.setrlimit(procfs.RLIMIT_LOCKS, (order.watermark, order.watermark))
        except (OSError, ValueError):
            return False
        return True

    # -- the agent -----------------------------------------------------------------------------

    def _start(self, order: wire.Order) -> bool:
        """Start the agent; False when the system refused, which has been told."""
        try:
            # Before the fork: once the agent lives, nothing here may fail.
            null = os.open(os.devnull, os.O_RDWR)
            failed, fails = os.pipe()  # closed by the exec, unless there is something to say
            self._agent = os.fork()
        except OSError as error:
            self._tell(f"{wire.REFUSED} {error.errno or 0} fork")
            return False
        if not self._agent:
            _become(order, fails)
        os.close(fails)
        said = b""
        while piece := os.read(failed, 4096):
            said += piece
        os.close(failed)
        if said:
            os.waitpid(self._agent, 0)
            self._tell(f"{wire.REFUSED} {os.fsdecode(said)}")
            return False
        try:
            proc = procfs.read_proc(self._agent)
        except OSError:  # no descriptor or memory for a moment; the service can do without
            proc = None
        self._tell(f"{wire.STARTED} {self._agent} {proc.start_ticks if proc else 0}")
        self._let_go_of_streams(null)
        return True

    def _let_go_of_streams(self, null: int) -> None:
        """The service must see the end of the agent's output, and the agent that of its input.
        Whatever this program itself has to complain about goes into the book."""
        for fd, to in ((0, null), (1, null), (2, self._book)):
            os.dup2(to, fd)
        os.close(null)

    def _watch(self) -> str:
        """Reap until nothing is left; or return why everything must end."""
        poll = select.poll()
        poll.register(self._gate, select.POLLIN)
        poll.register(self._woken, select.POLLIN)
        while self._reap():
            left_s = (self._deadline_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9
            events = dict(poll.poll(max(0.0, min(left_s, TICK_S)) * 1000))
            if self._over():  # before hearing more: what comes now comes too late
                return wire.LEASE_OVER
            if self._gate in events and not self._hear():
                return wire.SERVICE_GONE
            self._take_lines()
            if self._woken in events:
                os.read(self._woken, 4096)
        return ""

    def _reap(self) -> bool:
        """Bury the dead; False when there are no children any more. Whoever loses his parent
        becomes our child: no children, no descendants. The kernel says so, not a scan."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self._agent:
                code = os.waitstatus_to_exitcode(status)
                user_us, system_us = int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6)
                self._tell(f"{wire.EXITED} {code} {user_us} {system_us} {usage.ru_maxrss}")

    # -- ending everything ---------------------------------------------------------------------

    def _end_everything(self, why: str) -> None:
        """Kill every descendant; return when the kernel says that none is left.

        First everybody is stopped, until a look finds nobody new: who is killed while others run
        leaves children behind that were not seen.
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
            stuck = living and all(state[p.identity] == signals.BARRED for p in living)
            barred_s = min(barred_s * 2, _BARRED_MOST_S) if stuck else _KILL_TICK_S
            self._pause(barred_s)

    def _pause(self, seconds: float) -> None:
        """Wait until a child has died, `seconds` at most."""
        if _readable(self._woken, seconds):
            os.read(self._woken, 4096)

    def _living(self) -> list[procfs.Proc]:
        try:
            below = procfs.descendants(procfs.scan(), os.getpid())
        except OSError:  # no descriptor or memory for a moment; we must not go
            self._pause(_BLIND_S)
            return []
        return [proc for proc in below if not proc.dead]

    def _signal(self, proc: procfs.Proc, number: int, why: str) -> str:
        try:
            pidfd = os.pidfd_open(proc.pid)
        except OSError:  # gone, or no descriptor left: the next look tells
            return signals.GONE
        try:
            return signals.send(
                proc.pid,
                pidfd,
                number,
                prove=lambda: _descent(proc),
                audit=lambda *facts: self._audit(proc, why, *facts),
            )
        except OSError:  # no descriptor for its proof: the next look tries again
            return signals.GONE
        finally:
            os.close(pidfd)

    def _audit(
        self, proc: procfs.Proc, why: str, pid: int, name: str, evidence: str | None, outcome: str
    ) -> None:
        at_ns = time.time_ns()
        line = (
            f'{{"event": "process.signalled", "at_ns": {at_ns}, "pid": {pid},'
            f' "start_ticks": {proc.start_ticks}, "signal": "{name}", "why": "{why}",'
            f' "evidence": "{evidence}", "outcome": "{outcome}", "by": {os.getpid()}}}\n'
        )
        try:
            os.write(self._book, line.encode())
        except OSError:  # a full disk keeps nobody alive
            return

    def _tell(self, event: str) -> None:
        """Report to the service, if it still listens."""
        try:
            os.write(self._report, event.encode("utf-8", "replace") + b"\n")
        except OSError:
            return


def _readable(fd: int, seconds: float) -> bool:
    """Wait until there is something to read. By poll: select takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _descent(proc: procfs.Proc) -> str | None:
    """Read whether a process is that one still, and below us."""
    found = procfs.read_proc(proc.pid)
    if found is None or found.identity != proc.identity:
        return None
    us = os.getpid()
    while found is not None and found.ppid not in {us, 0}:
        found = procfs.read_proc(found.ppid)
    return "descent" if found is not None and found.ppid == us else None


def _give_up_protection() -> None:
    """What protects the service from the out-of-memory killer is not for its agents."""
    score = "/proc/self/oom_score_adj"
    if procfs.read(score).startswith(b"-"):
        with open(score, "wb", buffering=0) as file:  # noqa: PTH123 - light
            file.write(b"0")


def _hear_every_signal() -> None:
    """Undo what this program, or whoever started the service, ignores."""
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):  # SIGKILL, SIGSTOP and the C library's own
            continue


def _become(order: wire.Order, fails: int) -> None:
    """Turn this fork into the agent, or say what is in the way. Never returns."""
    doing = "setsid"
    try:
        os.setsid()
        doing = f"the working directory {order.cwd}"
        os.chdir(order.cwd)
        if order.cgroup_procs:
            doing = f"the cgroup {order.cgroup_procs}"
            with open(order.cgroup_procs, "wb", buffering=0) as procs:  # noqa: PTH123 - light
                procs.write(b"0")
        doing = "the score for the out-of-memory killer"
        _give_up_protection()
        doing = "nice"
        if order.niceness:
            os.nice(order.niceness)
        _hear_every_signal()
        if order.soft_open_files:
            doing = "the limit on open files"
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (order.soft_open_files, hard))
        for key, value in order.limits.items():
            doing = f"limit {key}"
            resource.setrlimit(key, (value, value))
        doing = order.program
        os.execve(order.program, order.argv, order.env)  # noqa: S606 - no shell is the point
    except BaseException as error:  # noqa: BLE001 - the edge of the fork: nothing may run on here
        code = error.errno if isinstance(error, OSError) else 0
        os.write(fails, f"{code or 0} {doing}".encode("utf-8", "replace"))
    finally:
        os._exit(wire.NEVER_RAN)
