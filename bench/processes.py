"""Measures the cost of a launch below a shim, and of ending many process trees.

    python bench/processes.py --rounds 5 --trees 200 --launches 10000

launch  An agent through the gate: the shim comes to it, two commits record it (SQLite), the agent
        is executed. Floor: `subprocess.Popen` of the same program.
end     `end_trees` of many trees of three processes, some of which ignore SIGTERM, beside their
        grace and 0.2 s. Floor: SIGKILL through a pidfd each and a poll, for as many processes.
check   `end_trees` of many launches without a living process. Floor: one plain scan of all of /proc
        (stat, limits, environ); the time beyond it is the cost of the launches.

The service (ours) and the floor are measured in turns. No process is left, and none lives longer
than two minutes.
"""

from __future__ import annotations

import argparse
import os
import resource
import secrets
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Final, cast

import structlog
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from runrecovery_service.clock import Clock
from runrecovery_service.domain.run import Run
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.host import Host
from runrecovery_service.process.launch import prepare
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.tree_ending import end_trees
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.storage import instances, launch_records
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.launch_records import LaunchRecord, LaunchSite
from runrecovery_service.storage.opening import open_database

LIFETIME_S: Final = 120
LAUNCHES: Final = 20
"""Launches in one round."""
STUBBORN_SHARE: Final = 0.1
GRACE_S: Final = 0.5
ALLOWED_S: Final = 0.2
"""Time after the grace for ending every process, and for the proof that none is left."""
DEADLINE_S: Final = 30.0
PROCESSES_A_TREE: Final = 3
DESCRIPTORS_A_TREE: Final = 12
PROGRAM: Final = ("/bin/sleep", str(LIFETIME_S))
TREE: Final = f"sleep {LIFETIME_S} & sleep {LIFETIME_S} & wait"
STUBBORN_TREE: Final = f"trap '' TERM; {TREE}"


class LaunchStore:
    """A SQLite store in which launches are recorded as a service records them."""

    def __init__(self, db: Database) -> None:
        here = Host.here()
        boot = InstanceStart(
            instance="bench",
            boot_token=secrets.token_hex(16),
            host_id=here.host_id,
            data_dir="",
            pid=os.getpid(),
        )
        self._db = db
        self._owner: Owner = instances.claim(db, boot, now=Clock().now())
        self._site = LaunchSite(
            host_id=here.host_id,
            boot_id=here.boot_id,
            pid_namespace=here.pid_namespace,
            watermark_bits=watermark_bits(),
        )
        self._runs = 0
        self._launches: dict[int, LaunchRecord] = {}

    def intend(self) -> LaunchMarkers:
        """Record a launch. No run is stored, because a launch record needs only these fields."""
        self._runs += 1
        run = cast(Run, SimpleNamespace(key=self._runs, attempt=1, turn=1))
        with self._db.transaction():
            launch = launch_records.record_launch(
                self._db, run, owner=self._owner, site=self._site, now=Clock().now()
            )
        self._launches[launch.key] = launch
        return replace(
            dead_launch(), launch_key=launch.key, cookie=launch.cookie, watermark=launch.watermark
        )

    def record(self, markers: LaunchMarkers, process: ShimmedProcess) -> None:
        """Commit the records that a service commits before it opens the gate."""
        made, owner = self._launches.pop(markers.launch_key), self._owner
        ticks = process.start_ticks
        launch_records.record_gated(self._db, made, owner=owner, pid=process.pid, start_ticks=ticks)
        launch_records.record_running(self._db, made, owner=owner)


@contextmanager
def launch_store() -> Iterator[LaunchStore]:
    """A new store in a temporary directory."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as place:
        db = open_database("", Path(place))
        try:
            yield LaunchStore(db)
        finally:
            db.close()


def dead_launch() -> LaunchMarkers:
    """Return the markers of a launch on this host that has no living process."""
    here = Host.here()
    return LaunchMarkers(
        launch_key=1,
        run_key=1,
        cookie=secrets.token_hex(16),
        watermark=secrets.randbits(watermark_bits()) or None,
        pid=None,
        start_ticks=None,
        host=here,
    )


def dead_launches(launches: int) -> list[LaunchMarkers]:
    """Return the markers of so many launches without a process. No process has their pids."""
    pattern, beyond = dead_launch(), int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    return [
        replace(
            pattern,
            launch_key=key,
            cookie=secrets.token_hex(16),
            watermark=secrets.randbits(watermark_bits()) or None,
            pid=beyond + key,
            start_ticks=key,
        )
        for key in range(1, launches + 1)
    ]


def _deadline_ns() -> int:
    return boot_time_ns() + LIFETIME_S * 10**9


def _prepare(command: Sequence[str], markers: LaunchMarkers) -> ShimmedProcess:
    return prepare(
        command,
        markers=markers,
        cwd=Path("/"),
        env={"PATH": os.defpath},
        deadline_ns=_deadline_ns(),
        journal=None,
    )


def _peak_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# -- launch --------------------------------------------------------------------------------------


def launch_ours(records: LaunchStore, peaks: list[int]) -> float:
    """Return the seconds of one launch through the gate; note the most memory of its shim."""
    markers = records.intend()
    begun = time.perf_counter()
    process = _prepare(PROGRAM, markers)
    try:
        records.record(markers, process)
        process.release(_deadline_ns())
        took = time.perf_counter() - begun
        peaks.append(_peak_kib(process.pid))
    finally:
        process.dispose()
    return took


def launch_bare() -> float:
    """Return the seconds of one launch without a shim."""
    begun = time.perf_counter()
    popen = _popen()
    took = time.perf_counter() - begun
    popen.kill()
    popen.communicate()
    return took


def start_python() -> float:
    """Return the seconds of an empty Python, from its start to its end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-I", "-S", "-c", ""], check=True)
    return time.perf_counter() - begun


def _popen() -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(PROGRAM, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


# -- end -----------------------------------------------------------------------------------------


def end_ours(trees: int) -> float:
    """Return the seconds that the ending of these trees takes; a tenth of them ignore SIGTERM."""
    grown: list[tuple[LaunchMarkers, ShimmedProcess]] = []
    stubborn = round(trees * STUBBORN_SHARE)
    try:
        for markers in dead_launches(trees):
            code = STUBBORN_TREE if markers.launch_key <= stubborn else TREE
            process = _prepare(["/bin/sh", "-c", code], markers)
            known = replace(markers, pid=process.pid, start_ticks=process.start_ticks)
            grown.append((known, process))
            process.release(_deadline_ns())
        begun = time.perf_counter()
        endings = end_trees(
            [markers for markers, _ in grown], why="bench", grace_s=GRACE_S, deadline_s=DEADLINE_S
        )
        took = time.perf_counter() - begun
        assert all(ending.gone for ending in endings.values())
    finally:
        for _, process in grown:
            process.dispose()
    return took


def end_bare(count: int) -> float:
    """Return the seconds that killing this many single processes takes, until all are dead."""
    popens = [subprocess.Popen(PROGRAM, start_new_session=True) for _ in range(count)]
    pidfds = [os.pidfd_open(popen.pid) for popen in popens]
    poll = select.poll()
    begun = time.perf_counter()
    for pidfd in pidfds:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        poll.register(pidfd, select.POLLIN)
    left = count
    while left:
        for pidfd, _ in poll.poll():
            poll.unregister(pidfd)
            left -= 1
    took = time.perf_counter() - begun
    for popen, pidfd in zip(popens, pidfds, strict=True):
        popen.wait()
        os.close(pidfd)
    return took


# -- check ---------------------------------------------------------------------------------------


def check_ours(launches: Sequence[LaunchMarkers]) -> float:
    """Return the seconds of the proof that no process of these launches is alive."""
    begun = time.perf_counter()
    endings = end_trees(launches, why="bench", grace_s=GRACE_S, deadline_s=DEADLINE_S)
    took = time.perf_counter() - begun
    assert all(ending.gone and not ending.found for ending in endings.values())
    return took


def scan_bare() -> float:
    """Return the seconds that one plain scan of all processes takes."""
    begun = time.perf_counter()
    for pid in [name for name in os.listdir("/proc") if name.isdigit()]:  # noqa: PTH208 - a floor
        for what in ("stat", "limits", "environ"):
            _read(f"/proc/{pid}/{what}")
    return time.perf_counter() - begun


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # the process has ended, or may not be read
        return b""
    try:
        return os.read(fd, 1 << 20)
    except OSError:
        return b""
    finally:
        os.close(fd)


# -- printing ------------------------------------------------------------------------------------


def in_turns(
    rounds: int, ours: Callable[[], float], floor: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Measure both in turns, in seconds; a first round, of cold caches, is not counted."""
    took = [(ours(), floor()) for _ in range(rounds + 1)][1:]
    return [one for one, _ in took], [other for _, other in took]


def show(title: str, ours: list[float], floor: list[float], *notes: str) -> None:
    """Print the two ways; the ratio is the median of the rounds' ratios."""
    ratios = [one / other for one, other in zip(ours, floor, strict=True)]
    table = Table(title=title)
    for heading in ("way", "ms, min", "median", "max", "ratio to floor"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, seconds, ratio in (("floor", floor, 1.0), ("ours", ours, statistics.median(ratios))):
        spread = (min(seconds), statistics.median(seconds), max(seconds))
        table.add_row(way, *(f"{1e3 * s:.1f}" for s in spread), f"{ratio:.2f}")
    console = Console()
    console.print(table)
    for note in notes:
        console.print(note)


def bench_launch(rounds: int) -> None:
    """Measure launches."""
    peaks: list[int] = []
    with launch_store() as records:
        ours, floor = in_turns(rounds * LAUNCHES, lambda: launch_ours(records, peaks), launch_bare)
    python = statistics.median(start_python() for _ in range(LAUNCHES))
    peak = f"a shim's most memory: {statistics.median(peaks) / 1024:.1f} MiB median"
    show(
        "One launch",
        ours,
        floor,
        f"{peak}, {max(peaks) / 1024:.1f} MiB most",
        f"an empty Python, which a shim is at least: {1e3 * python:.1f} ms median",
    )


def bench_end(rounds: int, trees: int) -> None:
    """Measure endings of trees."""
    count = trees * PROCESSES_A_TREE
    ours, floor = in_turns(rounds, lambda: end_ours(trees), lambda: end_bare(count))
    over = max(ours) - GRACE_S
    show(
        f"Ending {trees} trees of {PROCESSES_A_TREE} ({round(trees * STUBBORN_SHARE)} stubborn)",
        ours,
        floor,
        f"beyond the grace of {GRACE_S} s: {over:.3f} s at most"
        f" ({'within' if over <= ALLOWED_S else 'OVER'} the {ALLOWED_S} s that are allowed)",
    )


def bench_check(rounds: int, count: int) -> None:
    """Measure checks of launches without a living process."""
    launches = dead_launches(count)
    ours, floor = in_turns(rounds, lambda: check_ours(launches), scan_bare)
    beyond = [one - other for one, other in zip(ours, floor, strict=True)]
    note = f"beyond one scan: {statistics.median(beyond):.3f} s median, {max(beyond):.3f} s most"
    show(f"Checking {count} launches without a living process", ours, floor, note)


def fitting(trees: int) -> int:
    """Return this number of trees, or fewer if the limit on descriptors allows no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(most, 1 << 16)), hard))
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // DESCRIPTORS_A_TREE
    if room < trees:
        print(f"only {room} trees: the limit on open files allows no more")
    return min(trees, room)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trees", type=int, default=200)
    parser.add_argument("--launches", type=int, default=10_000)
    args = parser.parse_args()
    # Log lines are rendered and discarded, because a service renders them too.
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    bench_launch(args.rounds)
    bench_end(args.rounds, fitting(args.trees))
    bench_check(args.rounds, args.launches)


if __name__ == "__main__":
    main()
