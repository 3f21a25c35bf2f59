"""Starting one agent behind a shim, and learning what becomes of it. Linux only.

`prepare` spawns the shim, which stops at its gate. Once that is on record, `release` lets the
agent start. Until then nothing of the agent has run, and a crash leaves nothing of it.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Final, TypeAlias

from runrecovery_service.process import procfs, signals, wire
from runrecovery_service.process.evidence import COOKIE_VARIABLE, Identity, LeaseEvidence
from runrecovery_service.process.files import open_regular, read_start
from runrecovery_service.process.procfs import read_proc

SHIM: Final = str(Path(__file__).with_name("shim_main.py"))
WATERMARK_BITS: Final = 62
"""Two launches in a billion years share a number; below what setrlimit calls unlimited."""
LEAST_WATERMARK_BITS: Final = 40
PATIENCE_S: Final = 20.0
"""For the shim to stand at its gate, and then for the agent's start. It takes some 20 ms."""


@dataclass(eq=False)
class LaunchFailed(Exception):
    """The command could not be started; nothing is left of the attempt."""

    reason: str

    def __str__(self) -> str:
        return self.reason


class LaunchDelayed(LaunchFailed):
    """The system has no descriptor, process or memory left for it now; trying again is safe."""


TRANSIENT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
"""What the system refuses for want of means, which others give back."""


def refused(error: OSError, reason: str) -> LaunchFailed:
    """Return what a launch raises when the system refuses a step of it."""
    return LaunchDelayed(reason) if error.errno in TRANSIENT else LaunchFailed(reason)


class ShimLost(LaunchFailed):
    """The shim was gone before it told of the agent's start. Its time may have run out at the
    gate, and then the agent never ran; or it was killed, and the agent may live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What an agent may use. None: no limit of ours.

    Attributes:
        niceness: added to the service's own, 0 to 19.
        max_memory: bytes of private writable memory (RLIMIT_DATA) of each process.
        max_open_files: descriptors of each process (RLIMIT_NOFILE).
        max_processes: of the user as a whole, threads included (RLIMIT_NPROC); root is exempt.
        soft_open_files: the soft limit on descriptors, where there is no `max_open_files` and the
            service raised its own.
    """

    niceness: int = 0
    max_memory: int | None = None
    max_open_files: int | None = None
    max_processes: int | None = None
    soft_open_files: int | None = None

    @property
    def limits(self) -> dict[int, int]:
        """The limits that are set, by the number of their resource."""
        wanted = {
            resource.RLIMIT_DATA: self.max_memory,
            resource.RLIMIT_NOFILE: self.max_open_files,
            resource.RLIMIT_NPROC: self.max_processes,
        }
        return {key: value for key, value in wanted.items() if value is not None}


# -- what the shim tells -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gated:
    """The shim stands at the gate; `watermarked`: it bears the lease's number."""

    watermarked: bool


@dataclass(frozen=True, slots=True)
class Started:
    """The agent runs."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The system refused to start the agent; `errno` says why, 0 if it did not."""

    reason: str
    errno: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Exited:
    """The agent's own process has ended; others of its tree may live.

    Attributes:
        code: its exit code, negative for the signal that ended it.
        user_us, system_us: processor time of it and of the children that it waited for.
        max_rss_kib: the most memory that one of these had at once.
    """

    code: int
    user_us: int
    system_us: int
    max_rss_kib: int


@dataclass(frozen=True, slots=True)
class EndsItself:
    """The shim ends everything; why is `wire.SERVICE_GONE` or `wire.LEASE_OVER`."""

    why: str


@dataclass(frozen=True, slots=True)
class Empty:
    """Nothing is left below the shim: the kernel says that it has no children."""


ShimEvent: TypeAlias = Gated | Started | NotStarted | Exited | EndsItself | Empty


def parse_event(line: str) -> ShimEvent:
    """Return what a line of the shim says.

    Raises:
        ValueError: it is none of the shim's.
    """
    match line.split(" "):
        case [wire.GATED, marked]:
            return Gated(watermarked=marked == "1")
        case [wire.STARTED, pid, ticks]:
            return Started(int(pid), int(ticks))
        case [wire.REFUSED, number, *what]:
            why = os.strerror(int(number)) if number != "0" else "refused"
            return NotStarted(f"{why}: {' '.join(what)}", int(number))
        case [wire.EXITED, code, user_us, system_us, rss]:
            return Exited(int(code), int(user_us), int(system_us), int(rss))
        case [wire.ENDING, why]:
            return EndsItself(why)
        case [wire.EMPTY]:
            return Empty()
    raise ValueError(f"not a line of the shim: {line[:80]!r}")


# -- launching ---------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class ShimmedProcess:
    """An agent behind its shim, with pipes to the agent's standard streams.

    The pipes are unbuffered and blocking. Whoever hands one to an event loop hands over closing
    it too; `dispose` closes what is left.

    Attributes:
        pid, start_ticks: of the shim, which leads a session of its own, away from the agent's.
        watermarked: the tree bears the lease's watermark.
        agent: what is known of the agent's process since its start.
        gate, report: our ends of the shim's two pipes.
        told: events that came together with one that was waited for.
    """

    pid: int
    start_ticks: int
    watermarked: bool
    popen: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]
    gate: int
    report: int
    agent: Started | None = None
    told: list[ShimEvent] = field(default_factory=list)
    _heard: bytes = field(default=b"", repr=False)
    _gate_open: bool = True
    # A heartbeat of the loop must not go into a descriptor that a thread has closed meanwhile:
    # its number may be that of a new file.
    _at_gate: Lock = field(default_factory=Lock, repr=False)

    def heartbeat(self, deadline_ns: int) -> bool:
        """Tell the shim until when (CLOCK_BOOTTIME) the tree may live; False if it is gone.

        A pipe that a stopped shim has let run full drops the heartbeat: it then ends its tree.
        """
        return self._say(b"%d\n" % deadline_ns)

    def _say(self, line: bytes) -> bool:
        with self._at_gate:
            if not self._gate_open:
                return False
            try:
                os.write(self.gate, line)
            except BlockingIOError:
                return True
            except OSError:
                return False
            return True

    def release(self, deadline_ns: int) -> Started:
        """Open the gate: the agent starts, and may live until `deadline_ns`. Blocks for some
        milliseconds.

        Raises:
            LaunchFailed: the system refused to start it.
            LaunchDelayed: the same, for want of means.
            ShimLost: the shim is gone.
        """
        self._say(b"%d\n%s\n" % (deadline_ns, wire.RELEASE))
        event = _next_event(self)
        if isinstance(event, Started):
            self.agent = event
            return event
        if isinstance(event, NotStarted):
            raise refused(OSError(event.errno, event.reason), event.reason)
        raise LaunchFailed(f"shim: {event}")

    def take(self, data: bytes) -> list[ShimEvent]:
        """Return the events that a piece of the report completes."""
        *lines, self._heard = (self._heard + data).split(b"\n")
        return [parse_event(os.fsdecode(line)) for line in lines]

    def last_words(self) -> list[ShimEvent]:
        """Return what is left in the report, without waiting for more."""
        events, self.told = self.told, []
        while self.report >= 0 and _readable_within(self.report, 0):
            data = os.read(self.report, 4096)
            if not data:
                break
            events += self.take(data)
        return events

    def close_report(self) -> None:
        """Listen no longer."""
        with self._at_gate:
            if self.report >= 0:
                os.close(self.report)
                self.report = -1

    def close_gate(self) -> None:
        """Make the shim end whatever lives, and go."""
        with self._at_gate:
            if self._gate_open:
                self._gate_open = False
                os.close(self.gate)


def prepare(
    command: Sequence[str],
    *,
    evidence: LeaseEvidence,
    cwd: Path,
    env: Mapping[str, str],
    deadline_ns: int,
    book: Path | None,
    bounds: Bounds | None = None,
    cgroup_procs: Path | None = None,
) -> ShimmedProcess:
    """Spawn the shim for `command` and return once it stands at its gate.

    Blocks for some 15 ms: call it in a thread. No shell is involved. The first word is looked up
    in the PATH of `env`, not in the service's own; a relative path is one below `cwd`.

    Args:
        evidence: the marks that the tree will bear.
        cwd: of the agent; the shim itself stays in /.
        env: the whole environment of the agent; nothing of the service's is added.
        deadline_ns: CLOCK_BOOTTIME at which the shim ends everything without a heartbeat.
        book: the file that the shim appends its audit to; None: nobody will read it.
        cgroup_procs: the file that takes the agent into its own cgroup.

    Raises:
        LaunchFailed: not found, not executable, or refused by the system.
        LaunchDelayed: refused for want of means.
    """
    if read_proc(os.getpid()) is None:
        raise LaunchFailed("launching needs /proc, to record what was launched")
    bounds = bounds or Bounds()
    try:
        order = wire.pack(
            wire.Order(
                deadline_ns=deadline_ns,
                watermark=evidence.watermark or 0,
                program=_resolve(command, cwd=cwd, path=env.get("PATH", os.defpath)),
                argv=list(command),
                env=dict(env),
                cwd=str(cwd),
                niceness=bounds.niceness,
                limits=bounds.limits,
                cgroup_procs=str(cgroup_procs or ""),
                soft_open_files=bounds.soft_open_files or 0,
            )
        )
    except ValueError as error:  # a NUL in a word
        raise LaunchFailed(f"{command[0]}: {error}") from error
    process = _spawn(evidence, book)
    try:
        _hand_over(process, order)
        event = _next_event(process)
    except LaunchFailed:
        _abandon(process)
        raise
    if not isinstance(event, Gated):
        _abandon(process)
        raise LaunchFailed("the shim did not come to its gate")
    process.watermarked = event.watermarked
    return process


def _spawn(evidence: LeaseEvidence, book: Path | None) -> ShimmedProcess:
    theirs: list[int] = []
    ours: list[int] = []
    try:
        for read_is_ours in (False, True):
            read, write = os.pipe()
            ours.append(read if read_is_ours else write)
            theirs.append(write if read_is_ours else read)
        theirs.append(_open_book(book))
        popen = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-I", "-S", SHIM, *map(str, theirs)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            # Only the mark: what an engine's variables do to programs (LD_PRELOAD) is not for it.
            env={COOKIE_VARIABLE: evidence.token},
            close_fds=True,
            pass_fds=theirs,
            start_new_session=True,
        )
    except OSError as error:
        for fd in ours:
            os.close(fd)
        raise refused(error, f"{error.strerror}: {error.filename or 'the shim'}") from error
    finally:
        for fd in theirs:
            os.close(fd)
    try:
        return _describe(popen, gate=ours[0], report=ours[1])
    except BaseException:  # an open gate would keep the shim standing there
        for fd in ours:
            os.close(fd)
        for pipe in (popen.stdin, popen.stdout, popen.stderr):
            if pipe is not None:
                pipe.close()
        raise


def _open_book(book: Path | None) -> int:
    if book is None:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    return open_regular(book, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def _describe(popen: subprocess.Popen[bytes], *, gate: int, report: int) -> ShimmedProcess:
    # Readable even if it has ended already: nobody has reaped it.
    proc = read_proc(popen.pid)
    if proc is None or popen.stdin is None or popen.stdout is None or popen.stderr is None:
        raise LaunchFailed(f"/proc does not show the new process {popen.pid}")
    return ShimmedProcess(
        pid=popen.pid,
        start_ticks=proc.start_ticks,
        watermarked=False,
        popen=popen,
        stdin=popen.stdin,
        stdout=popen.stdout,
        stderr=popen.stderr,
        gate=gate,
        report=report,
    )


def _hand_over(process: ShimmedProcess, order: bytes) -> None:
    left = memoryview(order)
    until = time.monotonic() + PATIENCE_S
    os.set_blocking(process.gate, False)
    try:
        while left:
            if not _ready_within(process.gate, select.POLLOUT, until - time.monotonic()):
                raise LaunchFailed(f"the shim did not take its order within {PATIENCE_S:g} s")
            left = left[os.write(process.gate, left) :]
    except BrokenPipeError:
        raise ShimLost(f"the shim ended: {_complaint(process)}") from None


def _next_event(process: ShimmedProcess) -> ShimEvent:
    """Wait for one event of the shim. Only while it says one thing at a time."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if not _readable_within(process.report, until - time.monotonic()):
            continue
        data = os.read(process.report, 4096)
        if not data:
            raise ShimLost(f"the shim ended: {_complaint(process)}")
        events = process.take(data)
        if events:
            process.told += events[1:]
            return events[0]
    raise LaunchFailed(f"the shim said nothing for {PATIENCE_S:g} s")


def _readable_within(fd: int, seconds: float) -> bool:
    return _ready_within(fd, select.POLLIN, seconds)


def _ready_within(fd: int, event: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _complaint(process: ShimmedProcess) -> str:
    """Return the last line that a shim which ended wrote about itself."""
    if not _readable_within(process.stderr.fileno(), 0):
        return "it did not say why"
    lines = os.read(process.stderr.fileno(), 65536).decode("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it did not say why")


def _resolve(command: Sequence[str], *, cwd: Path, path: str) -> str:
    if not command or not command[0]:
        raise LaunchFailed("the engine's command is empty")
    name = command[0]
    if "/" in name:
        places = [(cwd / name).absolute()]
    else:
        # Relative entries would let a run's workspace choose the program.
        places = [Path(entry) / name for entry in path.split(os.pathsep) if entry.startswith("/")]
    files = [place for place in places if _is_file(place)]
    for file in files:
        if os.access(file, os.X_OK):
            return str(file)
    where = "" if "/" in name else " on the engine's PATH"
    raise LaunchFailed(f"{name} is not {'executable' if files else 'found'}{where}")


def why_not_launchable(command: Sequence[str], *, env_allow: Iterable[str]) -> str | None:
    """Return why a command could not be launched from here, None if it could be found."""
    env = agent_environment(env_allow, os.environ, {})
    try:
        _resolve(command, cwd=Path.cwd(), path=env.get("PATH", os.defpath))
    except LaunchFailed as error:
        return error.reason
    return None


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):
        return False


def agent_environment(
    allow: Iterable[str], source: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, str]:
    """Return the allowed variables of `source`, then `extra`, which wins.

    The lease's own variable comes from `extra` alone: one that the service inherited names a
    lease of somebody else.
    """
    passed = {name: source[name] for name in allow if name in source and name != COOKIE_VARIABLE}
    return passed | dict(extra)


# -- afterwards --------------------------------------------------------------------------------


def dispose(process: ShimmedProcess) -> None:
    """Close what is still open of the pipes and reap the shim.

    Blocks until the shim has ended, which it does when its tree has.
    """
    close(process)
    process.popen.wait()


def _abandon(process: ShimmedProcess) -> None:
    """Send away a shim whose agent has not started; reap it if it goes within PATIENCE_S."""
    close(process)
    with suppress(subprocess.TimeoutExpired):
        process.popen.wait(PATIENCE_S)


def close(process: ShimmedProcess) -> None:
    """Close the pipes. The gate is one of them: the shim ends what still lives."""
    process.close_gate()
    process.close_report()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()


def killed_by_shim(book: Path) -> frozenset[Identity]:
    """Return whom a shim killed by itself, as its book tells; nobody where there is no book."""
    try:
        lines = read_start(book).decode("utf-8", "replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(identity for line in lines if (identity := _killed(line)) is not None)


def _killed(line: str) -> Identity | None:
    try:
        told = json.loads(line)
        if (told["signal"], told["outcome"]) == ("SIGKILL", signals.SENT):
            return int(told["pid"]), int(told["start_ticks"])
    except (ValueError, KeyError, TypeError):  # cut off by a crash, or a complaint
        pass
    return None


# -- watermarks --------------------------------------------------------------------------------


def watermark_bits() -> int:
    """Return how large a watermark this process may set; 0: none that would be unique.

    A service that is itself under a limit (another's watermark, `ulimit -x`) can only go below.
    """
    try:
        hard = resource.getrlimit(procfs.RLIMIT_LOCKS)[1]
    except (OSError, ValueError):  # not a Linux
        return 0
    bits = WATERMARK_BITS if hard == resource.RLIM_INFINITY else hard.bit_length() - 1
    return min(bits, WATERMARK_BITS) if bits >= LEAST_WATERMARK_BITS else 0


def boot_time_ns() -> int:
    """Return CLOCK_BOOTTIME, the clock of heartbeats: it also runs while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
