"""What the service and the shim of one launch say to each other, over two pipes.

To the shim, on the gate: the order, then a line for each heartbeat, a time of CLOCK_BOOTTIME in
nanoseconds, and once the word that releases the agent. The gate's end, for whatever reason, is an
order too: end everything. From the shim, on the report: one line per event.

The shim runs this too: the standard library only, and of that only what is light.
"""

from __future__ import annotations

import os

RELEASE = b"go"
NEVER_RAN = 125
"""The shim's exit code when the gate closed, or its time ran out, before the agent was released."""

GATED, STARTED, REFUSED, EXITED, EMPTY, ENDING = (
    "gated", "started", "refused", "exited", "empty", "ending",
)  # fmt: skip
"""The shim's events: it stands at the gate (`gated WATERMARKED`); the agent runs (`started PID
START_TICKS`); it could not be started (`refused ERRNO WHAT`); it has exited (`exited CODE USER_US
SYSTEM_US MAX_RSS_KIB`); nothing is left below the shim (`empty`); it ends everything by itself
(`ending WHY`)."""

SERVICE_GONE, LEASE_OVER = "service_gone", "lease_over"
"""Why a shim ends everything: the gate closed, or no heartbeat came in time."""


class Order:
    """What the shim is to launch, and how.

    Attributes:
        deadline_ns: CLOCK_BOOTTIME at which it ends everything unless a heartbeat moves it.
        watermark: for the limit on file locks; 0: none can be set here.
        program, argv, env, cwd: of the agent.
        niceness: added to the service's own.
        limits: `resource.RLIMIT_…` to the agent's soft and hard limit.
        cgroup_procs: the file that takes the agent into its cgroup; empty: none.
        soft_open_files: the agent's soft limit on open files, where the service raised its own;
            0: as the service's.
    """

    __slots__ = (
        "argv", "cgroup_procs", "cwd", "deadline_ns", "env", "limits", "niceness", "program",
        "soft_open_files", "watermark",
    )  # fmt: skip

    def __init__(
        self,
        *,
        deadline_ns: int,
        watermark: int,
        program: str,
        argv: list[str],
        env: dict[str, str],
        cwd: str,
        niceness: int,
        limits: dict[int, int],
        cgroup_procs: str,
        soft_open_files: int = 0,
    ) -> None:
        self.deadline_ns = deadline_ns
        self.watermark = watermark
        self.program = program
        self.argv = argv
        self.env = env
        self.cwd = cwd
        self.niceness = niceness
        self.limits = limits
        self.cgroup_procs = cgroup_procs
        self.soft_open_files = soft_open_files


def pack(order: Order) -> bytes:
    """Return an order as the gate takes it: its length in a line, then its words.

    Raises:
        ValueError: a word holds a NUL, which no program could be given.
    """
    words = [
        str(order.deadline_ns), str(order.watermark), str(order.niceness),
        order.program, order.cwd, order.cgroup_procs, str(order.soft_open_files),
        str(len(order.limits)), *(f"{key}={value}" for key, value in order.limits.items()),
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
    program, cwd, cgroup_procs = next(words), next(words), next(words)
    soft_open_files = int(next(words))
    limits = dict(next(words).split("=") for _ in range(int(next(words))))
    return Order(
        deadline_ns=deadline_ns,
        watermark=watermark,
        niceness=niceness,
        program=program,
        cwd=cwd,
        cgroup_procs=cgroup_procs,
        soft_open_files=soft_open_files,
        limits={int(key): int(value) for key, value in limits.items()},
        argv=[next(words) for _ in range(int(next(words)))],
        env=dict(word.split("=", 1) for word in words),
    )
