"""The protocol between the service and the shim of one launch, over two pipes.

The service writes to the gate:

1. the launch order;
2. a line for each heartbeat (a time of CLOCK_BOOTTIME in nanoseconds), and once, among these, the
   line that releases the agent;
3. the line that says whether the service or the shim saves the last output.

When the gate closes, for whatever reason, the shim kills its whole tree. The shim writes to the
report: one line per event.

The shim imports this module too, so it imports only light modules of the standard library.
"""

from __future__ import annotations

import os

RELEASE = b"go"
DONE, LEFT = b"done", b"left"
"""Lines of the gate. `done`: the service needs no more output of the agent. `left`: the service
reads no more, and the shim saves the rest of the output. A gate that closes without `done` means
`left`. A shim with a file for the rest exits only after one of these lines."""
NEVER_RAN = 125
"""The shim's exit code if the gate closed or the deadline passed before the agent's release."""

GATED, STARTED, REFUSED, EXITED, EMPTY, ENDING = (
    "gated", "started", "refused", "exited", "empty", "ending",
)  # fmt: skip
"""The shim's events:

- `gated WATERMARKED`: the shim waits at the gate.
- `started PID START_TICKS`: the agent was started.
- `refused ERRNO STEP`: the agent could not be started.
- `exited CODE USER_US SYSTEM_US MAX_RSS_KIB`: the agent's own process has ended.
- `empty`: the shim has no children left.
- `ending WHY`: the shim kills its whole tree.
"""

AGENT_EXITED, KEPT, REST = "agent.exited", "output.kept", "output.rest"
"""Entries of the journal. The shim records the agent's exit, and the rest of the output that it has
saved. The service records that it has kept all output."""

SERVICE_GONE, LEASE_OVER = "service_gone", "lease_over"
"""Why a shim kills its tree: the gate closed, or no heartbeat came before the deadline."""


UNKNOWN = -1
POSITION_BYTES = 24
"""The beginning of the spool: three integers of 8 bytes. The raw output follows."""


class Position:
    """How much of the output in the spool is already in the output file.

    Attributes:
        start: the offset in the spool of the first byte that is not in the file.
        kept: the size of the file; UNKNOWN: the file lacks something.
        begin: the size of the file before the first output of the process; UNKNOWN: the file lacks
            some of the output.
    """

    __slots__ = ("begin", "kept", "start")

    def __init__(self, *, start: int, kept: int, begin: int) -> None:
        self.start = start
        self.kept = kept
        self.begin = begin


def pack_position(position: Position) -> bytes:
    """Return a position as the beginning of the spool."""
    numbers = (position.start, position.kept, position.begin)
    return b"".join(number.to_bytes(8, "little", signed=True) for number in numbers)


def unpack_position(data: bytes) -> Position:
    """Return the position in the beginning of a spool."""
    start, kept, begin = (
        int.from_bytes(data[at : at + 8], "little", signed=True)
        for at in range(0, POSITION_BYTES, 8)
    )
    return Position(start=start, kept=kept, begin=begin)


class Confinement:
    """The limits of the agent's processes.

    Attributes:
        niceness: added to the service's own.
        rlimits: the soft and hard limit of each `resource.RLIMIT_…`.
        cgroup_procs: the file that moves the agent into its cgroup; empty: no cgroup.
        soft_open_files: the agent's soft limit on open files where the service raised its own;
            0: the same as the service's.
    """

    __slots__ = ("cgroup_procs", "niceness", "rlimits", "soft_open_files")

    def __init__(
        self,
        *,
        niceness: int = 0,
        rlimits: dict[int, int] | None = None,
        cgroup_procs: str = "",
        soft_open_files: int = 0,
    ) -> None:
        self.niceness = niceness
        self.rlimits = rlimits or {}
        self.cgroup_procs = cgroup_procs
        self.soft_open_files = soft_open_files


class Order:
    """The order to the shim: the agent to launch.

    Attributes:
        deadline_ns: CLOCK_BOOTTIME at which the shim kills everything unless a heartbeat moves it.
        watermark: the limit on file locks to set; 0: none can be set here.
        program, argv, env, cwd: those of the agent.
        confinement: the limits of the agent's processes.
        rest: the file for output that the service has not saved; empty: such output is lost.
    """

    __slots__ = ("argv", "confinement", "cwd", "deadline_ns", "env", "program", "rest", "watermark")

    def __init__(
        self,
        *,
        deadline_ns: int,
        watermark: int,
        program: str,
        argv: list[str],
        env: dict[str, str],
        cwd: str,
        confinement: Confinement,
        rest: str = "",
    ) -> None:
        self.deadline_ns = deadline_ns
        self.watermark = watermark
        self.program = program
        self.argv = argv
        self.env = env
        self.cwd = cwd
        self.confinement = confinement
        self.rest = rest


def pack(order: Order) -> bytes:
    """Return an order in the format of the gate: a line with its length, then its words.

    Raises:
        ValueError: a word contains a NUL, which no program can receive.
    """
    limits = order.confinement
    words = [
        str(order.deadline_ns), str(order.watermark), str(limits.niceness),
        order.program, order.cwd, order.rest, limits.cgroup_procs,
        str(limits.soft_open_files),
        str(len(limits.rlimits)), *(f"{key}={value}" for key, value in limits.rlimits.items()),
        str(len(order.argv)), *order.argv,
        *(f"{name}={value}" for name, value in order.env.items()),
    ]  # fmt: skip
    if any("\0" in word for word in words):
        raise ValueError("embedded null byte")
    body = b"\0".join(map(os.fsencode, words))
    return b"%d\n" % len(body) + body


def unpack(body: bytes) -> Order:
    """Return the order of a body (without the line of its length)."""
    words = iter([os.fsdecode(word) for word in body.split(b"\0")])
    deadline_ns, watermark, niceness = int(next(words)), int(next(words)), int(next(words))
    program, cwd, rest, cgroup_procs = next(words), next(words), next(words), next(words)
    soft_open_files = int(next(words))
    rlimits = dict(next(words).split("=") for _ in range(int(next(words))))
    return Order(
        deadline_ns=deadline_ns,
        watermark=watermark,
        program=program,
        cwd=cwd,
        rest=rest,
        confinement=Confinement(
            niceness=niceness,
            rlimits={int(key): int(value) for key, value in rlimits.items()},
            cgroup_procs=cgroup_procs,
            soft_open_files=soft_open_files,
        ),
        argv=[next(words) for _ in range(int(next(words)))],
        env=dict(word.split("=", 1) for word in words),
    )
