"""Measures launches by a whole service: from CreateRun to the agent's first line, and a second.

    python bench/launches.py --rounds 3 --launches 50 --seconds 10

first line  One caller creates a run and waits until its agent, a shell, has written a line. Floor:
            `subprocess.Popen` of the same shell below a Python that only forks and waits, from the
            spawn to the line. All take turns.
sustained   `CALLERS` callers create a run, wait for its end and create the next one, for so many
            seconds: launches per second, and processor time of the service and of all that it has
            launched, per launch.

The service is on SQLite in a temporary directory. Processor time is steadier than the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from runrecovery import AsyncRunRecoveryClient, RunRecoveryClient

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.servers import Server, service

CALLERS: Final = 8
LINE_S: Final = 30.0
TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
RESULT: Final = r'{"type":"result","output":{}}'
SCRIPT: Final = 'echo line > "$0"; echo "$1"'
CONFIG: Final = """\
max_concurrent = {callers}

[engines.demo]
command = ["/bin/sh", "-c", '{script}', "{line}", '{result}']
profile = "resumable"
"""
SUPERVISOR: Final = """
import subprocess, sys
sys.exit(subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode)
"""


class FirstLines:
    """A named pipe into which each agent writes a line."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def wait(self) -> None:
        """Wait for one line."""
        if not self._poll.poll(LINE_S * 1000):
            raise TimeoutError("no agent has written a line")
        os.read(self._fd, 4096)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._fd)


@contextmanager
def launching_service() -> Iterator[tuple[Server, FirstLines]]:
    """Run the service with an engine that writes a line into the pipe, and ends with a result."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as place:
        lines = FirstLines(Path(place) / "lines")
        config = CONFIG.format(callers=CALLERS, script=SCRIPT, line=lines.path, result=RESULT)
        data_dir = Path(place) / "data"
        data_dir.mkdir()
        try:
            with service(data_dir, config=config, until="service.serving") as server:
                yield server, lines
        finally:
            lines.close()


# -- first line ----------------------------------------------------------------------------------


def launch_ours(client: RunRecoveryClient, lines: FirstLines) -> float:
    """Return the seconds from CreateRun to the agent's first line; wait for the end of the run."""
    begun = time.perf_counter()
    run = client.runs.create(engine="demo")
    lines.wait()
    took = time.perf_counter() - begun
    client.wait_for_run(run.run_id, timeout_s=LINE_S)
    return took


def launch_bare(lines: FirstLines) -> float:
    """Return the seconds from the start of a Python that starts the same shell to its line."""
    begun = time.perf_counter()
    command = ["/bin/sh", "-c", SCRIPT, str(lines.path), RESULT]
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", SUPERVISOR, *command]):
        lines.wait()
        return time.perf_counter() - begun


def bench_first_line(server: Server, lines: FirstLines, launches: int) -> None:
    """Measure the time to the first line."""
    with RunRecoveryClient(server.address) as client:
        took = [(launch_ours(client, lines), launch_bare(lines)) for _ in range(launches + 3)][3:]
    table = Table(title="CreateRun to the agent's first line, one caller")
    for heading in ("way", "ms, min", "median", "p90", "ratio to floor"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    floor = statistics.median(other for _, other in took)
    for way, seconds in (("floor", [f for _, f in took]), ("ours", [o for o, _ in took])):
        ordered = sorted(seconds)
        spread = (ordered[0], statistics.median(ordered), ordered[len(ordered) * 9 // 10])
        ratio = statistics.median(ordered) / floor
        table.add_row(way, *(f"{1e3 * s:.1f}" for s in spread), f"{ratio:.2f}")
    Console().print(table)


# -- sustained -----------------------------------------------------------------------------------


def cpu_s(pid: int) -> tuple[float, float]:
    """Return the processor time of a process, and that of all children that it has reaped."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    user, system, children_user, children_system = map(int, fields[11:15])
    return (user + system) / TICKS_A_SECOND, (children_user + children_system) / TICKS_A_SECOND


async def launch_for(server: Server, seconds: float) -> int:
    """Create runs and wait for their ends, `CALLERS` at a time; return how many ended."""
    until, ended = time.perf_counter() + seconds, 0

    async def do_runs(client: AsyncRunRecoveryClient) -> None:
        nonlocal ended
        while time.perf_counter() < until:
            run = await client.runs.create(engine="demo")
            await client.wait_for_run(run.run_id, timeout_s=LINE_S)
            ended += 1

    async with AsyncRunRecoveryClient(server.address) as client:
        await asyncio.gather(*(do_runs(client) for _ in range(CALLERS)))
    return ended


def bench_sustained(server: Server, rounds: int, seconds: float) -> None:
    """Measure launches per second, and their processor time."""
    table = Table(title=f"Launches without a pause, {CALLERS} callers")
    for heading in ("launches/s", "service CPU ms a launch", "shim and agent CPU ms"):
        table.add_column(heading, justify="right")
    for _ in range(rounds):
        begun, own, below = time.perf_counter(), *cpu_s(server.pid)
        ended = asyncio.run(launch_for(server, seconds))
        rate = ended / (time.perf_counter() - begun)
        own_now, below_now = cpu_s(server.pid)
        spent = ((own_now - own) / ended, (below_now - below) / ended)
        table.add_row(f"{rate:.0f}", *(f"{1e3 * s:.1f}" for s in spent))
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launches", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10.0)
    args = parser.parse_args()
    with launching_service() as (server, lines):
        bench_first_line(server, lines, args.launches)
        bench_sustained(server, args.rounds, args.seconds)


if __name__ == "__main__":
    main()
