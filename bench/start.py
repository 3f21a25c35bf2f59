"""Measures a first start until SERVING, against the least that any such service needs.

    python bench/start.py --rounds 10

imports  A Python process that has imported what the service is built from.
server   The same imports, and a grpc.aio server on uvloop that answers health checks at once.
ours     `runrecovery serve` with a new data directory: the database is created, recovery runs.

The last two count until a health check says SERVING. All take turns. The first table is an
installation for SQLite: psycopg, which peewee imports wherever it finds it, is hidden from all
three. The second, where psycopg is installed, is with it. rich, which structlog takes along and
the service does without, is hidden from the floors. All run from compiled modules, as pip leaves
an installation.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


def imports(hidden: Sequence[str]) -> float:
    """Return the seconds that the imports take."""
    begun = time.perf_counter()
    with floor(IMPORTS + "print('imported', flush=True)", "rich", *hidden):
        return time.perf_counter() - begun


def health_server(hidden: Sequence[str]) -> float:
    """Return the seconds until a bare server is SERVING."""
    begun = time.perf_counter()
    with floor(HEALTH_SERVER, "rich", *hidden) as server:
        return _serving(server.address) - begun


def ours(hidden: Sequence[str]) -> float:
    """Return the seconds until the service is SERVING on an empty store."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as data_dir:
        begun = time.perf_counter()
        with service(Path(data_dir), hidden=hidden, until="service.listening") as server:
            return _serving(server.address) - begun


def _serving(address: str) -> float:
    """Wait until health says SERVING; return the time of that."""
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest()
        for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=ANSWER_S):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return time.perf_counter()
    raise ChildProcessError("the server never said SERVING")


WAYS: Final[dict[str, Callable[[Sequence[str]], float]]] = {
    "imports": imports,
    "server": health_server,
    "ours": ours,
}


def compare(rounds: int, hidden: Sequence[str]) -> dict[str, list[float]]:
    """Measure all ways in turns, in seconds; a first round, of cold caches, is not counted."""
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, measure in WAYS.items():
            seconds = measure(hidden)
            if number:
                took[way].append(seconds)
    return took


def show(took: dict[str, list[float]], title: str) -> None:
    """Print the table; a ratio is the median of the rounds' ratios."""
    table = Table(title=title)
    for heading in ("way", "ms, min", "median", "max", "ratio to imports", "to server"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for way, seconds in took.items():
        spread = (min(seconds), statistics.median(seconds), max(seconds))
        ratios = (_ratio(seconds, took["imports"]), _ratio(seconds, took["server"]))
        table.add_row(way, *(f"{1e3 * s:.0f}" for s in spread), *(f"{r:.2f}" for r in ratios))
    Console().print(table)


def _ratio(seconds: list[float], base: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(seconds, base, strict=True))


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
