"""Measures how the memory of the service grows with the number of finished runs, on SQLite.

    python bench/memory.py --runs 4000 --every 500
    MALLOC_ARENA_MAX=2 python bench/memory.py --runs 4000 --every 500

Starts the service on an empty store, lets 16 callers create runs and wait for them, and prints
the service's memory (/proc/PID/status) at the start, after the first 50 runs, and after each
`--every` runs. The engine prints its result at once. The service inherits the environment, so that
settings of the allocator can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from runrecovery import AsyncRunRecoveryClient

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.servers import Server, service

CALLERS: Final = 16
WARM_UP_RUNS: Final = 50
RUN_S: Final = 300.0
COLUMNS: Final = ("VmRSS", "RssAnon", "RssFile")

RESULT: Final = r'{"type":"result","output":{}}'
CONFIG: Final = f"""\
max_concurrent = {CALLERS}

[engines.demo]
command = ["/bin/sh", "-c", 'read start; echo "$0"', '{RESULT}']
profile = "resumable"
"""


def memory_kib(pid: int) -> list[int]:
    """Return `COLUMNS` of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return [int(found[1]) for name in COLUMNS if (found := re.search(rf"{name}:\s+(\d+)", status))]


async def do_runs(client: AsyncRunRecoveryClient, count: int) -> None:
    """Create this many runs and wait for the end of each, `CALLERS` at a time."""
    free = asyncio.Semaphore(CALLERS)

    async def do_one() -> None:
        async with free:
            run = await client.runs.create(engine="demo", input={"task": "hello"})
            await client.wait_for_run(run.run_id, timeout_s=RUN_S)

    await asyncio.gather(*(do_one() for _ in range(count)))


async def measure(server: Server, data_dir: Path, *, runs: int, every: int) -> list[list[int]]:
    """Return rows of: runs done, size of the database in KiB, `COLUMNS`."""
    database = data_dir / "runrecovery.db"
    rows: list[list[int]] = []
    async with AsyncRunRecoveryClient(server.address) as client:
        done = 0
        for count in (0, WARM_UP_RUNS, *[every] * (runs // every)):
            await do_runs(client, count)
            done += count
            rows.append([done, database.stat().st_size >> 10, *memory_kib(server.pid)])
    return rows


def show(rows: list[list[int]]) -> None:
    """Print the table."""
    table = Table("runs", "database KiB", *(f"{name} KiB" for name in COLUMNS))
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=4000)
    parser.add_argument("--every", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as top:
        data_dir = Path(top)
        with service(data_dir, config=CONFIG, until="service.serving") as server:
            show(asyncio.run(measure(server, data_dir, runs=args.runs, every=args.every)))


if __name__ == "__main__":
    main()
