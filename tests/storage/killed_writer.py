"""Kills writers of a SQLite store at random moments, and checks that the store opens each time.

    python killed_writer.py DIRECTORY KILLS

It runs as a separate process, because it must fork before it has threads. A writer writes a byte
into a pipe for each acknowledged commit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from contextlib import closing
from pathlib import Path

import structlog
from runrecovery_service.storage.opening import open_database

CHANCE = random.Random()  # noqa: S311 - no secret
MOST_COMMITS = 40
SPIN = 20_000


def write_until_killed(directory: Path, acknowledged: int) -> None:
    db = open_database("", directory)
    db.watch_files()
    db.execute(f"PRAGMA wal_autocheckpoint = {CHANCE.choice((1, 2, 3, 10, 1000))}")
    while True:
        with db.transaction():
            key = os.urandom(8).hex()
            db.execute("INSERT INTO request_receipt VALUES (?, 'm', 'f', 1, 1, '')", (key,))
        os.write(acknowledged, b".")


def kill_one(directory: Path) -> int:
    """Start a writer, kill it after some commits, and return how many it has acknowledged."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            write_until_killed(directory, writer)
        finally:
            os._exit(1)
    os.close(writer)
    acknowledged = 0
    wanted = CHANCE.randrange(MOST_COMMITS)
    while acknowledged < wanted and (more := os.read(reader, 1)):
        acknowledged += len(more)
    for _ in range(CHANCE.randrange(SPIN)):  # somewhere within a commit
        pass
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    while more := os.read(reader, 4096):
        acknowledged += len(more)
    os.close(reader)
    return acknowledged


def main(directory: Path, kills: int) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stdout))
    expected = 0
    for _ in range(kills):
        expected += kill_one(directory)
        with closing(open_database("", directory)) as db:
            ((found,),) = db.fetch_all("SELECT count(*) FROM request_receipt")
        # The last commit may be durable although the writer could not report it.
        assert expected <= found <= expected + 1, (expected, found)
        expected = found
    print(f"{kills} kills survived")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
