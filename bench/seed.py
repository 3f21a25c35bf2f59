"""Fills a store with live runs, as a killed service leaves them.

    python bench/seed.py --data-dir DIR --runs 100000

The next service that starts on the store (same instance) recovers all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog
from runrecovery_service.domain.run import InteractionKind, Option
from runrecovery_service.process.host import Host
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.rows import options_to_json, to_json, to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind

DEFAULT_MIX: Final = {"waiting": 30, "lost": 10, "sticky": 10, "running": 30, "queued": 20}
ROWS_PER_INSERT: Final = 5000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The columns of the runs of one kind of the mix."""

    status: str
    profile: str = "RESUMABLE"
    session: bool = False
    asked: bool = False
    launched: bool = True


SHAPES: Final = {
    "waiting": Shape(status="WAITING_USER", session=True, asked=True),
    "lost": Shape(status="WAITING_USER", asked=True),
    "sticky": Shape(status="WAITING_USER", profile="STICKY_PROCESS", asked=True),
    "running": Shape(status="RUNNING"),
    "queued": Shape(status="QUEUED", launched=False),
}
"""A restart keeps runs of the shape `waiting`, and fails runs of every other shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeding:
    """How many runs to create, and of which kinds. `mix` has the weight of each kind of SHAPES."""

    runs: int
    mix: Mapping[str, int]
    engine: str = "demo"
    input_bytes: int = 200

    def words(self) -> Iterator[str]:
        """The kind of each run: the mix in proportion, and well shuffled."""
        deck = [word for word, weight in self.mix.items() for _ in range(weight)]
        # 7919 is a prime larger than the number of kinds, so that each round has every kind once.
        return (deck[number * 7919 % len(deck)] for number in range(self.runs))


def claim(db: Database, *, instance: str, data_dir: Path) -> Owner:
    """Claim the instance's next epoch as a start of the service does, and release its lease."""
    boot = InstanceStart(
        instance=instance,
        boot_token=secrets.token_hex(16),
        host_id=Host.here().host_id,
        data_dir=str(data_dir),
        pid=os.getpid(),
    )
    owner = instances.claim(db, boot, now=datetime.now(UTC))
    instances.resign(db, owner)
    return owner


_COLUMNS: Final = (
    "run_id", "engine", "labels", "input", "status", "profile", "restart_policy",
    "max_attempts", "attempt", "turn", "interaction_count", "session_type", "session_value",
    "session_turn", "owner", "owner_epoch", "version", "queued_at", "created_at", "started_at",
    "updated_at",
)  # fmt: skip


def fill(db: Database, owner: Owner, seeding: Seeding, *, now: datetime) -> dict[str, int]:
    """Insert the runs and their open questions; return how many there are of each kind."""
    row = db.fetch_one("SELECT COALESCE(max(id), 0) FROM run")
    before = row[0] if row else 0
    words = Counter[str]()
    with db.transaction():
        batch: list[tuple[object, ...]] = []
        for word in seeding.words():
            words[word] += 1
            batch.append(_row(SHAPES[word], owner, seeding, to_us(now)))
            if len(batch) == ROWS_PER_INSERT:
                _insert(db, batch)
                batch = []
        _insert(db, batch)
        _ask(db, after=before, now=now)
    db.execute("ANALYZE" if db.dialect.kind is DatabaseKind.POSTGRESQL else "PRAGMA optimize")
    return dict(words)


def _row(shape: Shape, owner: Owner, seeding: Seeding, now_us: int) -> tuple[object, ...]:
    return (
        str(uuid.uuid4()),
        seeding.engine,
        '{"origin":"bench/seed.py"}',
        to_json({"prompt": "x" * max(seeding.input_bytes - 13, 0)}),
        shape.status,
        shape.profile,
        "FAIL",
        1,
        int(shape.launched),
        int(shape.launched),
        int(shape.asked),
        "demo" if shape.session else None,
        secrets.token_hex(16) if shape.session else None,
        1 if shape.session else None,
        owner.instance,
        owner.epoch,
        3,
        now_us,
        now_us,
        now_us if shape.launched else None,
        now_us,
    )


def _insert(db: Database, rows: list[tuple[object, ...]]) -> None:
    marks = ", ".join(db.dialect.param for _ in _COLUMNS)
    sql = f"INSERT INTO run ({', '.join(_COLUMNS)}) VALUES ({marks})"
    cursor = db.peewee.cursor()
    cursor.executemany(sql, rows)
    cursor.close()


def _ask(db: Database, *, after: int, now: datetime) -> None:
    options = options_to_json((Option(label="Yes", value=True), Option(label="No", value=False)))
    db.execute(
        "INSERT INTO interaction (run, no, kind, prompt, options, state, asked_at)"
        " SELECT id, 1, ?, ?, ?, 'OPEN', CAST(? AS BIGINT) FROM run"
        " WHERE id > ? AND interaction_count = 1",
        (InteractionKind.CONFIRM.value, "Shall I go on?", options, to_us(now), after),
    )


def seed_store(
    url: str, data_dir: Path, seeding: Seeding, *, instance: str
) -> tuple[Owner, dict[str, int]]:
    """Fill a store, which is made as needed. Return the owner of the runs, and `fill`'s counts."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    db = open_database(url, data_dir)
    try:
        owner = claim(db, instance=instance, data_dir=data_dir)
        return owner, fill(db, owner, seeding, now=datetime.now(UTC))
    finally:
        db.close()


def mix_from_text(text: str) -> dict[str, int]:
    """Parse `waiting=30,queued=70`."""
    mix = {word: int(weight) for word, _, weight in (p.partition("=") for p in text.split(","))}
    unknown = mix.keys() - SHAPES.keys()
    if unknown or not sum(mix.values()):
        raise argparse.ArgumentTypeError(f"give weights to some of {', '.join(SHAPES)}")
    return mix


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--mix", type=mix_from_text, default=DEFAULT_MIX, metavar="WORD=WEIGHT,…")
    parser.add_argument("--database", default="", help="URL; empty: SQLite in the data directory")
    parser.add_argument("--instance", default="default")
    parser.add_argument("--engine", default="demo")
    parser.add_argument("--input-bytes", type=int, default=200)
    return parser


def main() -> None:
    """Seed the store that the command line names and print what was made, as JSON."""
    args = _parser().parse_args()
    # The log goes to standard error, so that it does not mix with the JSON.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(file=sys.stderr))
    seeding = Seeding(
        runs=args.runs, mix=args.mix, engine=args.engine, input_bytes=args.input_bytes
    )
    owner, words = seed_store(
        args.database, args.data_dir.resolve(), seeding, instance=args.instance
    )
    print(json.dumps({"instance": owner.instance, "epoch": owner.epoch, "runs": words}))


if __name__ == "__main__":
    main()
