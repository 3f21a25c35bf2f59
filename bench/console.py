"""What the pages of the console cost, at many runs, and what open pages cost other callers.

    python bench/console.py --runs 100000 --rounds 5 --seconds 2 --open 200

pages    Each page of the console, one request after another on new connections: the time until its
         last byte, the processor time of the service, its size. Floor: `GET /healthz`.
get      GetRun by 16 callers over gRPC with `--open` pages open, each with its stream: pages of
         every kind, then pages of as many different runs. Floor: the same service without open
         pages.

A restart has decided on the seeded runs before: a third of them waits, the others have failed.
"""

from __future__ import annotations

import argparse
import html
import re
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Final

import structlog
from rich.console import Console
from rich.table import Table
from runrecovery.v1 import run_service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.load import Load, Target, cpu_s, generate
from bench.seed import DEFAULT_MIX, Seeding, seed_store
from bench.servers import CONFIG, Server, service

GET: Final = "/runrecovery.v1.RunService/GetRun"
CALLERS: Final = 16
SETTLE_S: Final = 0.5
MOST_MS: Final = 100.0
MOST_KB: Final = 100.0
MOST_RATIO: Final = 1.1
FLOOR: Final = "/healthz"
ID: Final = re.compile(r'href="(/runs/[^"?]+)"')
NEXT: Final = re.compile(r'href="([^"]+)" rel="next"')
REPORT: Final = re.compile(r'href="(/restarts/[^"?]+)"')


@dataclass(frozen=True, slots=True)
class PageCost:
    """What a page costs: milliseconds until its last byte, and of processor time; kilobytes."""

    path: str
    ms: float
    cpu_ms: float
    kb: float


@dataclass(frozen=True, slots=True)
class Site:
    """The service with its console."""

    server: Server
    host: str

    def get(self, path: str) -> bytes:
        """Return a page."""
        connection = HTTPConnection(self.host, timeout=60)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ConnectionError(f"{path}: {response.status}")
        return body

    def first(self, path: str, pattern: re.Pattern[str]) -> str:
        """Return the first address of a page that matches."""
        found = pattern.search(self.get(path).decode())
        if found is None:
            raise LookupError(f"{path} has no {pattern.pattern}")
        return found[1]

    def runs(self, number: int) -> list[str]:
        """Return the addresses of so many different runs that wait."""
        found: list[str] = []
        path = "/runs?status=waiting"
        while len(found) < number:
            page = self.get(path).decode()
            found += dict.fromkeys(ID.findall(page))
            following = NEXT.search(page)
            if following is None:
                break
            path = html.unescape(following[1])
        return found[:number]

    def cost(self, path: str, rounds: int) -> PageCost:
        """Measure a page."""
        self.get(path)
        before_s, times, size = cpu_s(self.server.pid), [], 0
        for _ in range(rounds):
            begun = time.perf_counter()
            size = len(self.get(path))
            times.append((time.perf_counter() - begun) * 1000)
        cpu_ms = (cpu_s(self.server.pid) - before_s) * 1000 / rounds
        return PageCost(path, statistics.median(times), cpu_ms, size / 1000)

    @contextmanager
    def open_pages(self, streams: Sequence[str], number: int) -> Iterator[None]:
        """Keep streams of pages open."""
        host, _, port = self.host.partition(":")
        sockets = []
        try:
            for at in range(number):
                sock = socket.create_connection((host, int(port)), timeout=60)
                sockets.append(sock)
                path = streams[at % len(streams)]
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())
                if not sock.recv(65_536).startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(f"{path} was refused")
            time.sleep(SETTLE_S)
            yield
        finally:
            for sock in sockets:
                sock.close()


@contextmanager
def site(runs: int) -> Iterator[Site]:
    """Run a service with its console on a store with so many runs."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as folder:
        data_dir = Path(folder) / "data"
        seed_store("", data_dir, Seeding(runs=runs, mix=DEFAULT_MIX), instance="default")
        with socket.create_server(("127.0.0.1", 0)) as free:
            host = f"127.0.0.1:{free.getsockname()[1]}"
        config = f'http_listen = "{host}"\n{CONFIG}'
        with service(data_dir, config=config, until="service.serving") as server:
            yield Site(server, host)


def measure_get(server: Server, payloads: Path, seconds: float) -> Load:
    """Call GetRun."""
    target = Target(address=server.address, method=GET)
    return generate(target, payloads, callers=CALLERS, seconds=seconds, pid=server.pid)


def print_pages(out: Console, costs: Sequence[PageCost]) -> None:
    """Print what the pages cost."""
    table = Table("page", "ms", "CPU ms", "KB", "", title="pages, one after another")
    for cost in costs:
        is_good = cost.ms <= MOST_MS and cost.kb <= MOST_KB
        path = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", cost.path)
        verdict = "" if cost.path == FLOOR else "✓" if is_good else "above 100"
        table.add_row(path, f"{cost.ms:.1f}", f"{cost.cpu_ms:.1f}", f"{cost.kb:.1f}", verdict)
    out.print(table)


def print_get(out: Console, loads: Mapping[str, Sequence[Load]]) -> None:
    """Print GetRun without open pages, which comes first, and with them."""
    table = Table("GetRun", "p50 ms", "calls/s", "server CPU µs", "times p50", "times CPU", "")
    floor = next(iter(loads.values()))
    for name, measured in loads.items():
        row = [
            statistics.median(load.p50_ms for load in measured),
            statistics.median(load.calls_per_s for load in measured),
            statistics.median(load.server_cpu_us for load in measured),
        ]
        pairs = list(zip(floor, measured, strict=True))
        ratio = statistics.median(with_.p50_ms / without.p50_ms for without, with_ in pairs)
        cpu = statistics.median(
            with_.server_cpu_us / without.server_cpu_us for without, with_ in pairs
        )
        verdict = "" if measured is floor else "✓" if ratio <= MOST_RATIO else f"above {MOST_RATIO}"
        cells = (f"{row[0]:.2f}", f"{row[1]:.0f}", f"{row[2]:.0f}", f"{ratio:.2f}", f"{cpu:.2f}")
        table.add_row(name, *cells, verdict)
    out.print(table)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--open", type=int, default=200)
    given = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    out = Console(highlight=False)
    with site(given.runs) as console, tempfile.TemporaryDirectory() as folder:
        run, report = console.first("/runs?status=waiting", ID), console.first("/restarts", REPORT)
        paths = (
            FLOOR,
            "/",
            "/runs",
            "/runs?status=waiting",
            run,
            "/restarts",
            report,
            "/plan",
            "/instances",
        )
        print_pages(out, [console.cost(path, given.rounds * 4) for path in paths])
        payloads = Path(folder) / "payloads"
        run_id = run.removeprefix("/runs/")
        payloads.write_text(pb.GetRunRequest(run_id=run_id).SerializeToString().hex() + "\n")
        streams = {
            "no page open": [],
            f"{given.open} pages": ["/live/waiting", "/live/runs", f"/live{run}", "/live/service"],
            f"{given.open} runs": [f"/live{each}" for each in console.runs(given.open)],
        }
        loads: dict[str, list[Load]] = {name: [] for name in streams}
        for _ in range(given.rounds):
            for name, paths_of_streams in streams.items():
                number = given.open if paths_of_streams else 0
                with console.open_pages(paths_of_streams, number):
                    loads[name].append(measure_get(console.server, payloads, given.seconds))
        print_get(out, loads)


if __name__ == "__main__":
    main()
