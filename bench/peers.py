"""Measures a peer beside the service: DBOS Transact, recovery of its workflows and status reads.

    python -m venv /tmp/dbos && /tmp/dbos/bin/pip install dbos
    python bench/peers.py --dbos /tmp/dbos/bin/python --runs 1000

The peer is never installed into the environment of the service. Both use SQLite. Figures are
processor time, per run or call:

recovery  The service: as `recovery.py`. DBOS: its recovery of as many workflows that were PENDING
          when their process ended. Its queue starts to execute them meanwhile, in the same process.
read      The service: GetRun by the client, both processes. DBOS: `get_workflow_status`, in the
          process that has the database.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import structlog
from rich.console import Console
from rich.table import Table
from runrecovery import RunRecoveryClient

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.recovery import INSTANCE, stores
from bench.seed import DEFAULT_MIX, Seeding, seed_store
from bench.servers import service

READS: Final = 500
_DBOS: Final = """
import json, sqlite3, sys, time
from dbos import DBOS, SetWorkflowID
path, runs, reads, executor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
DBOS(config={"name": "peer", "system_database_url": "sqlite:///" + path, "executor_id": executor,
             "application_version": "1", "log_level": "ERROR"})

@DBOS.workflow()
def work(text):
    return text

DBOS.launch()
if executor == "killed":
    for number in range(runs):
        with SetWorkflowID(f"run-{number}"):
            work("x" * 200)
    DBOS.destroy()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE workflow_status SET status = 'PENDING'")
else:
    begun = time.process_time()
    recovered = len(DBOS._recover_pending_workflows(["killed"]))
    recovery = time.process_time() - begun
    assert recovered == runs
    begun = time.process_time()
    for number in range(reads):
        DBOS.get_workflow_status(f"run-{number % runs}")
    print(json.dumps([recovery / runs, (time.process_time() - begun) / reads]))
    DBOS.destroy()
"""


def measure_dbos(python: str, *, runs: int) -> list[float]:
    """Return the seconds that DBOS needs for one recovered workflow, and for one read."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as name:
        file = str(Path(name) / "dbos.sqlite")
        answers = [
            subprocess.run(
                [python, "-c", _DBOS, file, str(runs), str(READS), executor],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            for executor in ("killed", "successor")
        ]
    seconds: list[float] = json.loads(answers[1].splitlines()[-1])
    return seconds


def measure_ours(*, runs: int) -> list[float]:
    """Return the seconds that the service needs for one recovered run, and for one GetRun."""
    with stores("sqlite") as places:
        recovery = places.measure("ours", places.seeded("seeded", runs)).cpu_s / runs
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as name:
        folder = Path(name)
        seed_store("", folder, Seeding(runs=runs, mix=DEFAULT_MIX), instance=INSTANCE)
        with (
            service(folder, until="service.serving") as server,
            RunRecoveryClient(server.address) as client,
        ):
            run_ids = [run.run_id for run in client.runs.list()]
            begun = _cpu_s(server.pid)
            for number in range(READS):
                client.runs.get(run_ids[number % len(run_ids)])
            return [recovery, (_cpu_s(server.pid) - begun) / READS]


def _cpu_s(pid: int) -> float:
    """Return the processor time of this process and of another one."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dbos", metavar="PYTHON", help="the Python that has DBOS")
    parser.add_argument("--runs", type=int, default=1000)
    args = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    if args.dbos is None:
        print("DBOS is not measured: --dbos names no Python that has it")
        return
    ours = measure_ours(runs=args.runs)
    dbos = measure_dbos(args.dbos, runs=args.runs)
    table = Table(title=f"Processor time in µs, {args.runs:,} runs, SQLite")
    for heading in ("what", "service", "DBOS", "ratio"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, one, other in zip(("recovery, a run", "read"), ours, dbos, strict=True):
        table.add_row(what, f"{1e6 * one:.0f}", f"{1e6 * other:.0f}", f"{other / one:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
