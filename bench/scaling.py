"""Shows which statements grow with ended runs, and which statements idle replicas send.

    python bench/scaling.py --runs 1000000 --replicas 1 --idle 20

Two databases, with 1,000 ended runs and with `--runs` of them. On the large one replicas serve
some calls, and then nothing for `--idle` seconds. The statements are those that PostgreSQL has
logged, so nothing is left out. Each is explained on both databases with its own parameters
(EXPLAIN ANALYZE, rolled back). A statement whose blocks grow with ended runs is marked, and so
is one whose plan reads the whole table of runs, even if the scan did not begin. Counts do not
depend on the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psycopg
import structlog
from rich.console import Console
from rich.table import Table
from runrecovery import RunRecoveryClient

sys.path.insert(0, str(Path(__file__).parent.parent))

from runrecovery_service.storage.opening import open_database

from bench.postgres import ScratchPostgres, scratch_postgres
from bench.seed import claim
from bench.servers import CONFIG, service

FEW: Final = 1000
GROWS: Final = 3.0
"""Blocks of the large database, as a multiple of the small one's. Deeper indexes cost less."""
LOG: Final = (
    "logging_collector=on", "log_destination=jsonlog", "log_statement=all",
    "log_parameter_max_length=-1", "fsync=off", "max_connections=400", "max_wal_size=4GB",
    "log_timezone=UTC",
)  # fmt: skip
ENDED: Final = """
    INSERT INTO run (run_id, engine, labels, input, status, profile, restart_policy, max_attempts,
      attempt, turn, interaction_count, owner, owner_epoch, version, queued_at,
      created_at, started_at, updated_at, ended_at)
    SELECT 'ended-' || n, 'demo', '{}', '{}', 'SUCCEEDED', 'RESUMABLE', 'FAIL', 1, 1, 1, 0, %s, %s,
      5, n, n, n, n, n
    FROM generate_series(1, %s) AS n
"""
PARAMETER: Final = re.compile(r"\$(\d+) = (NULL|'(?:[^']|'')*')")
SCANNED: Final = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")


@dataclass(slots=True)
class Cost:
    """What a statement reads: blocks of the cache or the disk, and rows of tables and indexes."""

    blocks: int = 0
    rows: int = 0
    scans: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Logged:
    """One statement of the log, with its parameters put in."""

    shape: str
    sql: str


def fill(server: ScratchPostgres, folder: Path, name: str, runs: int) -> str:
    """Make a database with ended runs, and return its URL."""
    url = server.create(name)
    db = open_database(url, folder)
    owner = claim(db, instance="r0", data_dir=folder)
    db.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(ENDED.encode(), (owner.instance, owner.epoch, runs))
        connection.execute(b"VACUUM ANALYZE")
    return url


def play(url: str, folder: Path, *, replicas: int, idle_s: float) -> tuple[float, float]:
    """Serve some calls, then none; return begin and end (Unix time) of the time without calls."""
    with ExitStack() as stack:
        for number in range(replicas):
            own = folder / f"r{number}"
            own.mkdir()
            config = f'database = {json.dumps(url)}\ninstance = "r{number}"\n{CONFIG}'
            server = stack.enter_context(service(own, config=config, until="service.serving"))
        with RunRecoveryClient(server.address) as client:
            for number in range(4):
                client.runs.create(engine="demo", run_id=f"played-{number}", input={"n": number})
            client.runs.get("played-0")
            next(iter(client.runs.list(page_size=50)))
            client.runs.cancel("played-3")
            client.recovery.instances()
        time.sleep(2)
        begun = time.time()
        time.sleep(idle_s)
        return begun, time.time()


def statements(server: ScratchPostgres, database: str) -> Iterator[tuple[float, Logged]]:
    """Yield the time and the text of each logged statement on a database, in order."""
    for file in sorted((server.folder / "data" / "log").glob("*.json")):
        for line in file.read_text("utf-8", "replace").splitlines():
            entry = json.loads(line)
            message = entry.get("message", "")
            found = re.match(r"(?:statement|execute [^:]*): (.*)", message, re.DOTALL)
            if found is None or entry.get("dbname") != database:
                continue
            at = datetime.fromisoformat(
                entry["timestamp"].removesuffix(" UTC") + "+00:00"
            ).timestamp()
            values = dict(PARAMETER.findall(entry.get("detail", "")))
            sql = _with_values(found[1], values)
            yield at, Logged(re.sub(r"\s+", " ", found[1]), sql)


def _with_values(sql: str, values: dict[str, str]) -> str:
    return re.sub(r"\$(\d+)", lambda hit: values.get(hit[1], "NULL"), sql)


def cost_of(url: str, sql: str) -> Cost | None:
    """Explain a statement, and undo it; None if it cannot be explained on this database."""
    explain = f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {sql}"
    with psycopg.connect(url) as connection:
        try:
            cursor = connection.cursor()
            cursor.execute(b"SET LOCAL lock_timeout = '5s'")
            rows = psycopg.ClientCursor(connection).execute(explain.encode()).fetchall()
        except psycopg.Error:
            return None
        finally:
            connection.rollback()
    plan = rows[0][0][0]["Plan"]
    cost = Cost(blocks=plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    _add(plan, cost)
    return cost


def _add(node: dict[str, Any], cost: Cost) -> None:
    if "Relation Name" in node and "Scan" in node["Node Type"]:
        read = sum(node.get(key, 0) for key in SCANNED) * node["Actual Loops"]
        cost.rows += round(read)
        cost.scans.add(node.get("Index Name") or f"all of {node['Relation Name']}")
    for child in node.get("Plans", ()):
        _add(child, cost)


def main() -> None:
    """Play both databases, and print the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--idle", type=float, default=20.0)
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as name,
        scratch_postgres(*LOG) as server,
    ):
        top = Path(name)
        few = fill(server, top, "few", FEW)
        many = fill(server, top, "many", args.runs)
        begun, ended = play(many, top, replicas=args.replicas, idle_s=args.idle)
        logged = list(statements(server, "many"))
        served = {one.shape: one.sql for at, one in logged if at >= begun - 60}
        show_idle(logged, begun, ended, replicas=args.replicas)
        show_plans(served, few, many, runs=args.runs)


def show_idle(
    logged: list[tuple[float, Logged]], begun: float, ended: float, *, replicas: int
) -> None:
    """Print the statements of idle replicas, per second and replica."""
    counts: dict[str, int] = {}
    for at, one in logged:
        if begun <= at < ended:
            counts[one.shape] = counts.get(one.shape, 0) + 1
    table = Table(title=f"{replicas} idle replica(s): statements per second and replica")
    table.add_column("per s", justify="right")
    table.add_column("statement")
    seconds = (ended - begun) * replicas
    for shape, count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(f"{count / seconds:.2f}", shape[:110])
    table.add_row(f"{sum(counts.values()) / seconds:.2f}", "all")
    Console(width=130).print(table)


def show_plans(served: dict[str, str], few: str, many: str, *, runs: int) -> None:
    """Print what each statement reads on both databases."""
    table = Table(title=f"Blocks and rows read, with {FEW:,} and {runs:,} ended runs")
    for heading in ("", "blocks", "rows", "scans", "statement"):
        table.add_column(heading, overflow="fold")
    for shape, sql in sorted(served.items()):
        if not shape.startswith(("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")):
            continue
        small, large = cost_of(few, sql), cost_of(many, sql)
        if small is None or large is None:
            continue
        grows = large.blocks > GROWS * max(small.blocks, 10) or "all of run" in large.scans
        table.add_row(
            "GROWS" if grows else "", f"{small.blocks} → {large.blocks}",
            f"{small.rows} → {large.rows}", ", ".join(sorted(large.scans)), shape[:300],
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
