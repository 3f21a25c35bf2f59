"""Measures how many sessions a restart checks per second, against the least work on such files.

    python bench/sessions.py --files 2000 --rounds 3

The files are like those of the CLIs, 200 KiB to 1 MiB, in a home of each CLI. Three ways are
measured in turns:

floor      Each file, whose path is known: open, stat, read 4 KiB of its beginning and of its end.
read       The service's check without a fingerprint: find the file, judge its first and last lines.
unchanged  The service's check with a fingerprint: find the file, compare its size and time.

Then `read` and `unchanged` as a restart does them: it reads handles from the store, and writes
findings into it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from runrecovery_service.clock import Clock
from runrecovery_service.domain.session_check import SessionCheck, SessionFingerprint, StoredHandle
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck, changed_findings
from runrecovery_service.storage import session_checks
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.recovery_scope import ApplyScope
from support.sessions import PRESETS, SessionHome

from bench.seed import claim

KIB: Final = 1024
SMALLEST, LARGEST = 200 * KIB, 1024 * KIB
AS_MUCH: Final = 4 * KIB
INSTANCE: Final = "default"
ENGINE: Final = "cli"
WAYS: Final = ("floor", "read", "unchanged", "read, restart", "unchanged, restart")


@dataclass(frozen=True, slots=True)
class Sessions:
    """Sessions of one CLI, and their files."""

    home: SessionHome
    handles: Sequence[StoredHandle]
    files: Sequence[Path]

    @property
    def fingerprinted(self) -> list[StoredHandle]:
        """The handles, each with the present fingerprint of its file."""
        stats = [file.stat() for file in self.files]
        return [
            replace(stored, fingerprint=SessionFingerprint(found.st_size, found.st_mtime_ns))
            for stored, found in zip(self.handles, stats, strict=True)
        ]


def make(preset: str, top: Path, count: int) -> Sessions:
    """Write sessions, each of a workspace of its own."""
    home = SessionHome(preset, top / preset)
    handles, files = [], []
    for at in range(count):
        workspace = top / "runs" / str(at) / "1" / "workspace"
        workspace.mkdir(parents=True, exist_ok=True)
        size = SMALLEST + (LARGEST - SMALLEST) * at // count
        handle = home.new_id(at)
        files.append(home.write(handle, workspace, turns=8, filler=(size - 24 * KIB) // 8))
        handles.append(StoredHandle(handle=handle, workspace=workspace))
    return Sessions(home, handles, files)


def floor(sessions: Sessions) -> int:
    """Read the beginning and the end of every file, and judge nothing."""
    seen = 0
    for path in sessions.files:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        seen += len(os.pread(descriptor, AS_MUCH, 0))
        seen += len(os.pread(descriptor, AS_MUCH, max(0, size - AS_MUCH)))
        os.close(descriptor)
    return seen


def check(sessions: Sessions, handles: Sequence[StoredHandle]) -> None:
    """Check the handles in one bulk."""
    found = list(sessions.home.store.check(handles))
    if not all(one.holds for one in found):
        raise AssertionError(found)


def restart(sessions: Sessions, handles: Sequence[StoredHandle], top: Path) -> float:
    """Check the handles as a restart does, and return the seconds that it takes."""
    with tempfile.TemporaryDirectory(dir=top) as folder:
        db = open_database("", Path(folder))
        first = claim(db, instance=INSTANCE, data_dir=top)
        with db.transaction():
            for key, stored in enumerate(handles, 1):
                _store(db.execute, key, stored, first.epoch)
        owner = claim(db, instance=INSTANCE, data_dir=top)
        scope = ApplyScope(
            owner=owner, before=owner.epoch, reconciliation_key=1, reopen=Clock().due_in(60),
            now=datetime.now(UTC), steady=Clock().steady(),
        )  # fmt: skip
        checks: dict[str, SessionCheck] = {ENGINE: SessionCheck(sessions.home.store.check)}
        begun = time.perf_counter()
        found = 0
        bulk = BulkSessionCheck(checks=checks, workspace=lambda key, _: handles[key - 1].workspace)
        for changed in changed_findings(db, scope, bulk):
            session_checks.record_findings(db, scope, changed)
            found += sum(one.holds for one in changed.values())
        seconds = time.perf_counter() - begun
        db.close()
    if found != len(handles):
        raise AssertionError(found)
    return seconds


def _store(
    execute: Callable[[str, Sequence[object]], object], key: int, stored: StoredHandle, epoch: int
) -> None:
    row: dict[str, object] = {
        "id": key, "run_id": f"run-{key}", "engine": ENGINE, "labels": "{}", "input": "{}",
        "status": "WAITING_USER", "profile": "RESUMABLE", "restart_policy": "FAIL",
        "max_attempts": 1, "attempt": 1, "turn": 1, "interaction_count": 1, "session_type": ENGINE,
        "session_value": stored.handle,
        "session_mark": stored.fingerprint and str(stored.fingerprint),
        "owner": INSTANCE, "owner_epoch": epoch, "version": 1, "queued_at": 1, "created_at": 1,
        "updated_at": 1,
    }  # fmt: skip
    marks = ", ".join("?" for _ in row)
    execute(f"INSERT INTO run ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


def seconds_of(do: Callable[[], object]) -> float:
    """Return how many seconds the call takes."""
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun


def measure(sessions: Sessions, top: Path, *, rounds: int) -> dict[str, list[float]]:
    """Measure all ways in turns; return the seconds of each round."""
    fingerprinted = sessions.fingerprinted
    floor(sessions)  # from here on all files are in memory
    ways: dict[str, Callable[[], float]] = {
        "floor": lambda: seconds_of(lambda: floor(sessions)),
        "read": lambda: seconds_of(lambda: check(sessions, sessions.handles)),
        "unchanged": lambda: seconds_of(lambda: check(sessions, fingerprinted)),
        "read, restart": lambda: restart(sessions, sessions.handles, top),
        "unchanged, restart": lambda: restart(sessions, fingerprinted, top),
    }
    measured: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            measured[way].append(ways[way]())
    return measured


def show(measured: dict[str, dict[str, list[float]]], *, files: int) -> None:
    """Print the table."""
    table = Table(title=f"Checks of {files:,} sessions of 200 KiB to 1 MiB, SQLite")
    for heading in ("CLI", "way", "µs each, median", "sessions a second", "ratio to floor"):
        table.add_column(heading, justify="left" if heading in {"CLI", "way"} else "right")
    for preset, ways in measured.items():
        for way, rounds in ways.items():
            ratio = statistics.median(
                ours / least for ours, least in zip(rounds, ways["floor"], strict=True)
            )
            middle = statistics.median(rounds)
            table.add_row(
                preset, way, f"{1e6 * middle / files:.1f}", f"{files / middle:,.0f}", f"{ratio:.2f}"
            )
    Console(width=100).print(table)


def main() -> None:
    """Measure each CLI."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    measured = {}
    for preset in PRESETS:
        with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as folder:
            top = Path(folder).resolve()
            measured[preset] = measure(make(preset, top, args.files), top, rounds=args.rounds)
    show(measured, files=args.files)


if __name__ == "__main__":
    main()
