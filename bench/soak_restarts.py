"""Restarts a service at half load once a minute, and checks that nothing of it grows.

    python bench/soak_restarts.py --minutes 30 --svg docs/images/soak.svg

The load is that of the campaign of kills (`tests/campaign/kill_load.py`). First it runs at full
speed for a while, then at half of the rate that was reached, or at a given rate. The restarts are
`kill -9` and SIGTERM in turns. Retention removes runs a minute after their end, except that a
run is kept for two minutes after its last process.

Every 10 s: memory and descriptors of the service, sizes of the database and of its write-ahead log,
rows of all tables, and folders of runs. Prints them, draws them, and fails when one of them is
larger in the last quarter than in the second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # see `tests/campaign/replicas.py`
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from campaign.kill_home import KillHome, Load
from support.service import ServiceProcess

from bench.flatness import has_grown
from bench.soak_drawing import draw

CLIENTS: Final = 3
FULL_LOAD_S: Final = 20.0
SAMPLE_S: Final = 10.0
RESTART_S: Final = 60.0
SIGNALS: Final = ("SIGKILL", "SIGTERM")
RETENTION: Final = {"ended_runs": "1m", "receipts": "1m", "reports": "1m"}
TABLES: Final = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The sizes at one moment."""

    minutes: float
    memory_mib: float
    descriptors: int
    wal_mib: float
    database_mib: float
    rows: int
    folders: int


SIZES: Final = tuple(Sample.__slots__)[1:]


def measure(home: KillHome, service: ServiceProcess, begun_s: float) -> Sample:
    """Measure a service and its data."""
    status = Path(f"/proc/{service.pid}/status").read_text("ascii")
    (rss,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    with home.reader() as rows:
        count = sum(rows(f"SELECT count(*) FROM {name}")[0][0] for (name,) in rows(TABLES))
    wal = home.database.with_name(home.database.name + "-wal")
    return Sample(
        minutes=round((time.monotonic() - begun_s) / 60, 2),
        memory_mib=round(int(rss) / 1024, 1),
        descriptors=sum(1 for _ in Path(f"/proc/{service.pid}/fd").iterdir()),
        wal_mib=round(wal.stat().st_size / MIB, 2),
        database_mib=round(home.database.stat().st_size / MIB, 2),
        rows=count,
        folders=sum(1 for _ in (home.data / "runs").iterdir()),
    )


def rate_of_half_load(home: KillHome) -> float:
    """Return half of the calls per second that are answered at full load."""
    load = Load(home, 0, "--period-s", "0", "--clients", str(CLIENTS))
    time.sleep(FULL_LOAD_S)
    rate = load.read().answers / FULL_LOAD_S
    load.close()
    click.echo(f"full load: {rate:.0f} calls per second of {CLIENTS} clients")
    return rate / 2


def soak(home: KillHome, minutes: float, rate: float) -> Iterator[tuple[Sample, str]]:
    """Yield samples, each with the signal that has ended the service just before it, or ''."""
    service, _ = home.start()
    period_s = CLIENTS / (rate or rate_of_half_load(home))
    load = Load(home, 1, "--period-s", str(period_s), "--clients", str(CLIENTS))
    try:
        yield from _restart_under_load(home, service, minutes)
        journal = load.read()
    finally:
        load.close()
    click.echo(
        f"{journal.answers} calls ({journal.answers / (60 * minutes):.0f} per second),"
        f" {len(journal.runs)} runs, {len(journal.replies)} replies"
    )
    if journal.violations:
        sys.exit("\n".join(journal.violations[:20]))


def _restart_under_load(
    home: KillHome, service: ServiceProcess, minutes: float
) -> Iterator[tuple[Sample, str]]:
    begun_s, restarts = time.monotonic(), 0
    while (passed_s := time.monotonic() - begun_s) < 60 * minutes:
        time.sleep(SAMPLE_S - passed_s % SAMPLE_S)
        sent = ""
        if time.monotonic() - begun_s >= (restarts + 1) * RESTART_S:
            sent = SIGNALS[restarts % len(SIGNALS)]
            restarts += 1
            if sent == "SIGKILL":
                service.kill()
            elif (code := service.stop()) != 0:
                sys.exit(f"a stop exited with {code}:\n{service.text[-3000:]}")
            service, _ = home.start()
        yield measure(home, service, begun_s), sent


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--minutes", type=click.FloatRange(2), default=30.0, show_default=True)
@click.option("--rate", type=float, default=0.0, help="Calls per second; default: half load.")
@click.option("--svg", type=click.Path(path_type=Path), help="Draw the sizes there.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the samples as JSON there.")
def main(*, minutes: float, rate: float, svg: Path | None, out: Path | None) -> None:
    """Run the soak."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    click.echo(" ".join(f"{name:>12}" for name in Sample.__slots__))
    samples: list[Sample] = []
    signals: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="runrecovery-soak-") as folder:
        home = KillHome(Path(folder) / "home")
        home.write_config(retention=RETENTION)
        home.may_fork = False  # a forked service shares memory with the forker
        with home:
            for sample, sent in soak(home, minutes, rate):
                samples.append(sample)
                click.echo(
                    " ".join(f"{value:>12}" for value in asdict(sample).values()) + f" {sent}"
                )
                if sent:
                    signals.append((sample.minutes, sent))
    series = {name: [float(getattr(one, name)) for one in samples] for name in SIZES}
    times = [one.minutes for one in samples]
    if out is not None:
        out.write_text(json.dumps({"minutes": times, "signals": signals, **series}))
    if svg is not None:
        svg.write_text(draw(times, series, signals), "utf-8")
    if names := [name for name, sizes in series.items() if has_grown(sizes)]:
        sys.exit(f"grew: {', '.join(names)}")


if __name__ == "__main__":
    main()
