"""Measures a first start until SERVING, against the least that any such service needs.

    python bench/start.py --rounds 10

imports  A Python process that has imported what the service is built from.
server   The same imports, and a grpc.aio server on uvloop that answers health checks at once.
ours     `runrecovery serve` with a new data directory: the database is created, recovery runs.

The last two count until a health check says SERVING. All take turns. Beside the time, each way has
the processor time of its process until then, which hardly depends on other work of the machine.
The first table is an installation for SQLite: psycopg, which peewee imports wherever it finds it,
is hidden from all three. The second, where psycopg is installed, is with it. rich, which structlog
takes along and the service does without, is hidden from the floors. All run from compiled modules,
as pip leaves an installation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.servers import floor, service

ANSWER_S: Final = 20.0
POSTGRESQL_DRIVERS: Final = ("psycopg", "psycopg2", "psycopg2cffi")

IMPORTS: Final = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import grpc, grpc.aio, uvloop, peewee, structlog, click
import grpc_health.v1.health_pb2_grpc, grpc_reflection.v1alpha.reflection_pb2
import google.rpc.error_details_pb2, google.rpc.status_pb2
import runrecovery.v1.run_service_pb2, runrecovery.v1.recovery_service_pb2
"""

IMPORTED: Final = "import time; print('imported', flush=True); time.sleep(60)"

HEALTH_SERVER: Final = (
    IMPORTS
    + """
import asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

async def main():
    server = grpc.aio.server()
    servicer = aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()

uvloop.run(main())
"""
)


@dataclass(frozen=True, slots=True)
class Start:
    """What one start took, in seconds: in all, and of the processor."""

    wall: float
    cpu: float


def imports(hidden: Sequence[str]) -> Start:
    """Measure the imports."""
    begun = time.perf_counter()
    with floor(IMPORTS + IMPORTED, "rich", *hidden) as server:
        return Start(time.perf_counter() - begun, _cpu_s(server.pid))


def health_server(hidden: Sequence[str]) -> Start:
    """Measure a bare server until it is SERVING."""
    begun = time.perf_counter()
    with floor(HEALTH_SERVER, "rich", *hidden) as server:
        return Start(_serving(server.address) - begun, _cpu_s(server.pid))


def ours(hidden: Sequence[str]) -> Start:
    """Measure the service on an empty store until it is SERVING."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as data_dir:
        begun = time.perf_counter()
        with service(Path(data_dir), hidden=hidden, until="service.listening") as server:
            return Start(_serving(server.address) - begun, _cpu_s(server.pid))


def _cpu_s(pid: int) -> float:
    """Return the processor time of the living threads of a process."""
    stats = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9


def _serving(address: str) -> float:
    """Wait until health says SERVING; return the time of that."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=ANSWER_S):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return time.perf_counter()
    raise ChildProcessError("the server never said SERVING")


WAYS: Final[dict[str, Callable[[Sequence[str]], Start]]] = {
    "imports": imports,
    "server": health_server,
    "ours": ours,
}


def compare(rounds: int, hidden: Sequence[str]) -> dict[str, list[Start]]:
    """Measure all ways in turns; a first round, of cold caches, is not counted."""
    starts: dict[str, list[Start]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, measure in WAYS.items():
            start = measure(hidden)
            if number:
                starts[way].append(start)
    return starts


def show(starts: dict[str, list[Start]], title: str) -> None:
    """Print the table; a ratio is the median of the rounds' ratios."""
    table = Table(title=title)
    for heading in (
        "way",
        "ms, min",
        "median",
        "to imports",
        "CPU ms, min",
        "median",
        "to imports",
    ):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way in starts:
        cells = []
        for value in ("wall", "cpu"):
            ours, base = ([getattr(s, value) for s in starts[one]] for one in (way, "imports"))
            ratio = statistics.median(one / other for one, other in zip(ours, base, strict=True))
            spread = (min(ours), statistics.median(ours))
            cells += [*(f"{1e3 * s:.0f}" for s in spread), f"{ratio:.2f}"]
        table.add_row(way, *cells)
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as compiled:
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = compiled
        show(compare(args.rounds, POSTGRESQL_DRIVERS), "Start to SERVING, SQLite installation")
        if find_spec("psycopg") is not None:
            show(compare(args.rounds, ()), "Start to SERVING, psycopg installed too")


if __name__ == "__main__":
    main()
