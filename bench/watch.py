"""Measures the cost of many watchers: memory, other calls, and the time until all have an event.

    python bench/watch.py --rounds 5 --seconds 2 --watchers 1000

memory   How much the service grows with `--watchers` idle watches open: on one connection, on 50,
         and on one each (WatchRun), and on 50 (WatchRecovered). A new process for each row.
         Floor: a grpc.aio server whose handlers write one answer and wait.
get      GetRun by 16 callers with the watches open. Floor: the same service without them.
health   Health.Check, one every few ms: without watchers, beside the idle ones, while all of them
         get an event at once, and beside 50 that read nothing. Floor: without watchers.
all      From the acceptance of a reply to a run that all watch, until the last of them has the
         event, in time and in processor time of the server. Floor: a grpc.aio server that writes
         as many bytes to as many streams.

Floor and ours are measured in turns. The watchers are a process of their own (watchers.py).
"""

from __future__ import annotations

import argparse
import resource
import secrets
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import grpc
from rich.console import Console
from rich.table import Table
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery.v1 import run_service_pb2_grpc as pb_grpc

sys.path.insert(0, str(Path(__file__).parent.parent))

from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.storage.decision_feed import START
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.store_identity import store_id

from bench.load import Connection, Load, Target, generate
from bench.seed import Seeding, claim, fill
from bench.servers import Server, floor, service
from bench.watchers import watching

GET: Final = "/runrecovery.v1.RunService/GetRun"
WATCH_RUN: Final = "/runrecovery.v1.RunService/WatchRun"
WATCH_RECOVERED: Final = "/runrecovery.v1.RecoveryService/WatchRecovered"
CHECK: Final = "/grpc.health.v1.Health/Check"

RUNS: Final = 2000
CALLERS: Final = 16
SHARED_BY: Final = 50
"""How many connections the watchers share, if they share connections."""
UNREADING: Final = 50
CHECK_EVERY_S: Final = 0.002
SETTLE_S: Final = 0.5
FAN_OUT_S: Final = 30.0
MOST_MIB: Final = 60.0
LEAST_RATE: Final = 0.9
MOST_HEALTH_MS: Final = 100.0
DESCRIPTORS_OF_OTHERS: Final = 200

ANSWERS: Final = ("00" * 500, "00" * 700)
"""Answers of the floor in hexadecimal, as long as a run, and as an event with a run."""

STREAMS_ONLY: Final = """
import asyncio, sys
import grpc, uvloop

first, event = (bytes.fromhex(text) for text in sys.argv[1:])

async def main():
    told = asyncio.Event()

    async def watch(request, context):
        await context.write(first)
        await told.wait()
        await context.write(event)
        await asyncio.Event().wait()

    async def reply(request, context):
        told.set()
        asyncio.get_running_loop().call_later(0.1, told.clear)
        return b""

    async def check(request, context):
        return b""

    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    services = {
        "runrecovery.v1.RunService": {"WatchRun": stream(watch), "SubmitReply": unary(reply)},
        "grpc.health.v1.Health": {"Check": unary(check)},
    }
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(*service) for service in services.items())
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()

uvloop.run(main())
"""


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of a process in MiB: resident, and its proportional share of shared pages."""

    rss: float
    pss: float

    @classmethod
    def of(cls, pid: int) -> Memory:
        """Read the memory of a process."""
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib = {
            name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines[1:])
        }
        return cls(kib["Rss"] / 1024, kib["Pss"] / 1024)


def cpu_s(pid: int) -> float:
    """Return the processor time of a process's present threads, in seconds.

    It is exact, while /proc/PID/stat counts in steps that are a third of what an event takes.
    """
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


class Checks(threading.Thread):
    """Checks health every few milliseconds and keeps how long each answer took."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._connection = Connection(Target(address=server.address, method=CHECK), [b""])
        self._over = threading.Event()
        self.took_ms: list[float] = []

    def run(self) -> None:
        """Check until it is stopped."""
        while not self._over.wait(CHECK_EVERY_S):
            self.took_ms += (1e3 * took for took in self._connection.run(1, 0.0))

    def __enter__(self) -> Checks:
        self._connection.run(1, 0.0)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@dataclass(frozen=True, slots=True)
class FanOut:
    """One event to all watchers.

    Attributes:
        ms: until the last watcher has the event.
        cpu_us: processor time of the server, for each watcher.
    """

    ms: float
    cpu_us: float


@dataclass(slots=True)
class Findings:
    """Everything that was measured."""

    memory: list[tuple[str, Memory, Memory]] = field(default_factory=list)
    alone: list[Load] = field(default_factory=list)
    beside: list[Load] = field(default_factory=list)
    health: dict[str, list[float]] = field(default_factory=dict)
    fan_out_floor: list[FanOut] = field(default_factory=list)
    fan_out: list[FanOut] = field(default_factory=list)

    def check(self, when: str, took_ms: Sequence[float]) -> None:
        """Add answers of health."""
        self.health.setdefault(when, []).extend(took_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The settings that all measurements share."""

    top: Path
    watchers: int
    seconds: float
    ids: Sequence[str]
    start_cursor: str

    def payloads(self, name: str, requests: Sequence[bytes]) -> Path:
        """Write the requests into a file for a generator."""
        file = self.top / f"{name}.payloads"
        file.write_text("".join(f"{request.hex()}\n" for request in requests))
        return file

    def watch_each(self) -> Path:
        """Watches of many runs."""
        requests = (pb.WatchRunRequest(run_id=run_id) for run_id in self.ids[: self.watchers])
        return self.payloads("each", [request.SerializeToString() for request in requests])

    def get(self, ours: Server) -> Load:
        """GetRun by many callers."""
        requests = [pb.GetRunRequest(run_id=run_id).SerializeToString() for run_id in self.ids]
        return generate(
            Target(address=ours.address, method=GET), self.payloads("get", requests),
            callers=CALLERS, seconds=self.seconds, pid=ours.pid,
        )  # fmt: skip

    def growth(self, server: Server, method: str, payloads: Path, connections: int) -> Memory:
        """Return how much a server grows with the watches open."""
        warm = watching(server.address, method, payloads, streams=1, connections=1)
        with warm:
            before = Memory.of(server.pid)
        many = watching(
            server.address, method, payloads, streams=self.watchers, connections=connections
        )
        with many:
            time.sleep(SETTLE_S)
            after = Memory.of(server.pid)
        return Memory(after.rss - before.rss, after.pss - before.pss)

    def health(self, server: Server) -> list[float]:
        """Check health for a while."""
        with Checks(server) as checks:
            time.sleep(self.seconds)
        return checks.took_ms

    def fan_out(self, server: Server, run_id: str) -> tuple[FanOut, list[float]]:
        """Return what it takes until all watchers of a run have an event, and health meanwhile."""
        request = pb.WatchRunRequest(run_id=run_id).SerializeToString()
        watches = watching(
            server.address, WATCH_RUN, self.payloads("one", [request]),
            streams=self.watchers, connections=SHARED_BY,
        )  # fmt: skip
        with watches as watchers, grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.RunServiceStub(channel)
            grpc.channel_ready_future(channel).result(FAN_OUT_S)
            time.sleep(SETTLE_S)
            with Checks(server) as checks:
                reply = pb.SubmitReplyRequest(run_id=run_id, interaction_id=1)
                reply.response.bool_value = True
                used_s, begun = cpu_s(server.pid), time.monotonic()
                stub.SubmitReply(reply, timeout=FAN_OUT_S)
                told = watchers.said()
                used_s = cpu_s(server.pid) - used_s
                time.sleep(SETTLE_S)
        took = FanOut(ms=1e3 * (told - begun), cpu_us=1e6 * used_s / self.watchers)
        return took, checks.took_ms

    def unread(self, server: Server) -> list[float]:
        """Check health while some watchers read nothing."""
        everything = recovery_pb.WatchRecoveredRequest(after_cursor=self.start_cursor)
        payloads = self.payloads("everything", [everything.SerializeToString()])
        watches = watching(
            server.address, WATCH_RECOVERED, payloads, streams=UNREADING, connections=UNREADING,
            unread=True,
        )  # fmt: skip
        with watches:
            return self.health(server)


# -- the comparisons -----------------------------------------------------------------------------


def measure_memory(bench: Bench, data_dir: Path, found: Findings) -> None:
    """Memory, in fresh processes."""
    recovered = bench.payloads("recovered", [b""])
    lines = [
        ("WatchRun, 1 connection", WATCH_RUN, bench.watch_each(), 1),
        (f"WatchRun, {SHARED_BY} connections", WATCH_RUN, bench.watch_each(), SHARED_BY),
        (f"WatchRecovered, {SHARED_BY} connections", WATCH_RECOVERED, recovered, SHARED_BY),
    ]
    if fits(bench.watchers):
        each = ("WatchRun, a connection each", WATCH_RUN, bench.watch_each(), bench.watchers)
        lines.insert(2, each)
    for name, method, payloads, connections in lines:
        with floor(STREAMS_ONLY, *ANSWERS) as bare:
            least = bench.growth(bare, WATCH_RUN, payloads, connections)
        with service(data_dir, until="service.serving") as ours:
            bench.get(ours)
            grown = bench.growth(ours, method, payloads, connections)
        found.memory.append((name, least, grown))


def measure_calls(bench: Bench, data_dir: Path, found: Findings, *, rounds: int) -> None:
    """Calls and health beside watchers, in turns."""
    each = bench.watch_each()
    with ExitStack() as stack:
        ours = stack.enter_context(service(data_dir, until="service.serving"))
        bare = stack.enter_context(floor(STREAMS_ONLY, *ANSWERS))
        take_slot(ours)
        for number in range(rounds):
            found.check("without watchers", bench.health(ours))
            found.alone.append(bench.get(ours))
            idle = watching(
                ours.address, WATCH_RUN, each, streams=bench.watchers, connections=SHARED_BY
            )
            with idle:
                time.sleep(SETTLE_S)
                found.check("beside idle watchers", bench.health(ours))
                found.beside.append(bench.get(ours))
            least, checks = bench.fan_out(bare, "any")
            found.fan_out_floor.append(least)
            found.check("while all are told, of the floor", checks)
            took, checks = bench.fan_out(ours, bench.ids[-1 - number])
            found.fan_out.append(took)
            found.check("while all are told", checks)
            found.check(f"beside {UNREADING} that do not read", bench.unread(ours))


def take_slot(server: Server) -> None:
    """Let a run hold the only slot, so that what a reply queues stays queued."""
    with grpc.insecure_channel(server.address) as channel:
        pb_grpc.RunServiceStub(channel).CreateRun(pb.CreateRunRequest(engine="demo"))


def fits(watchers: int) -> bool:
    """Raise this process's limit on open files; return True if the connections fit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard in {resource.RLIM_INFINITY, -1} or hard >= watchers + DESCRIPTORS_OF_OTHERS:
        return True
    print(f"the limit on open files allows no {watchers} connections")
    return False


# -- the store -----------------------------------------------------------------------------------


def store(top: Path, *, runs: int) -> tuple[Path, list[str], str]:
    """Make a store of waiting runs; return its folder, their ids, and the cursor of the start."""
    data_dir = top / "data"
    data_dir.mkdir(mode=0o700)
    db = open_database("", data_dir)
    with closing(db):
        owner = claim(db, instance="default", data_dir=data_dir)
        fill(db, owner, Seeding(runs=runs, mix={"waiting": 1}), now=datetime.now(UTC))
        ids = [row[0] for row in db.fetch_all("SELECT run_id FROM run ORDER BY id")]
        store_id(db, new=secrets.token_hex(16))
        cursor = PageTokens.of_store(db).encode_bookmark(START)
    return data_dir, ids, cursor


# -- the tables ----------------------------------------------------------------------------------


def show(found: Findings, watchers: int) -> None:
    """Print the results, and mark those that exceed what is allowed."""
    console = Console(width=120)
    if found.memory:
        console.print(_memory(found, watchers))
    if found.beside:
        for table in (_calls(found, watchers), _health(found), _fan_out(found, watchers)):
            console.print(table)


def _memory(found: Findings, watchers: int) -> Table:
    table = _table(
        f"Growth by {watchers} idle watchers, MiB (allowed: {MOST_MIB:.0f})",
        ("how", "floor RSS", "ours RSS", "PSS", "KiB each", "ratio", ""),
    )
    for name, least, grown in found.memory:
        each, ratio = 1024 * grown.rss / watchers, grown.rss / least.rss
        table.add_row(
            name, f"{least.rss:.1f}", f"{grown.rss:.1f}", f"{grown.pss:.1f}", f"{each:.1f}",
            f"{ratio:.2f} x", _verdict(within=grown.rss <= MOST_MIB),
        )  # fmt: skip
    return table


def _calls(found: Findings, watchers: int) -> Table:
    table = _table(
        f"GetRun, {CALLERS} callers, beside {watchers} idle watchers; min / median / max",
        ("", "calls/s", "p50 ms", "p99 ms", "server CPU µs", "rate", ""),
    )
    for name, loads in (("without", found.alone), ("with", found.beside)):
        table.add_row(
            name,
            _spread([load.calls_per_s for load in loads], "{:,.0f}"),
            _spread([load.p50_ms for load in loads], "{:.2f}"),
            _spread([load.p99_ms for load in loads], "{:.2f}"),
            _spread([load.server_cpu_us for load in loads], "{:.0f}"),
        )
    pairs = list(zip(found.beside, found.alone, strict=True))
    rates = [one.calls_per_s / other.calls_per_s for one, other in pairs]
    table.add_row(
        "ratio",
        "",
        _spread([one.p50_ms / other.p50_ms for one, other in pairs], "{:.2f}"),
        _spread([one.p99_ms / other.p99_ms for one, other in pairs], "{:.2f}"),
        _spread([one.server_cpu_us / other.server_cpu_us for one, other in pairs], "{:.2f}"),
        _spread(rates, "{:.2f}"),
        _verdict(within=statistics.median(rates) >= LEAST_RATE),
    )
    return table


def _health(found: Findings) -> Table:
    table = _table(
        f"Health.Check, ms (allowed: {MOST_HEALTH_MS:.0f})",
        ("when", "checks", "p50", "p99", "max", ""),
    )
    for when, took_ms in found.health.items():
        ordered = sorted(took_ms)
        table.add_row(
            when, str(len(ordered)), f"{statistics.median(ordered):.2f}",
            f"{ordered[int(0.99 * len(ordered))]:.2f}", f"{ordered[-1]:.1f}",
            _verdict(within=ordered[-1] <= MOST_HEALTH_MS),
        )  # fmt: skip
    return table


def _fan_out(found: Findings, watchers: int) -> Table:
    table = _table(
        f"One event until the last of {watchers} watchers has it; min / median / max",
        ("", "ms", "server CPU µs for each"),
    )
    for name, took in (("floor", found.fan_out_floor), ("ours", found.fan_out)):
        table.add_row(
            name,
            _spread([one.ms for one in took], "{:.0f}"),
            _spread([one.cpu_us for one in took], "{:.0f}"),
        )
    pairs = list(zip(found.fan_out, found.fan_out_floor, strict=True))
    table.add_row(
        "ratio",
        _spread([one.ms / other.ms for one, other in pairs], "{:.2f}"),
        _spread([one.cpu_us / other.cpu_us for one, other in pairs], "{:.2f}"),
    )
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def _verdict(*, within: bool) -> str:
    return "within" if within else "OVER"


def _spread(values: Sequence[float], form: str) -> str:
    shown = (min(values), statistics.median(values), max(values))
    return " / ".join(form.format(value) for value in shown)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--only", choices=("memory", "calls"))
    args = parser.parse_args()
    found = Findings()
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as top:
        data_dir, ids, cursor = store(Path(top), runs=max(RUNS, args.watchers))
        bench = Bench(
            top=Path(top),
            watchers=args.watchers,
            seconds=args.seconds,
            ids=ids,
            start_cursor=cursor,
        )
        if args.only in {None, "memory"}:
            measure_memory(bench, data_dir, found)
        if args.only in {None, "calls"}:
            measure_calls(bench, data_dir, found, rounds=args.rounds)
    show(found, args.watchers)


if __name__ == "__main__":
    main()
