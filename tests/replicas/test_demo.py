"""`make demo-replicas`: what it leaves behind, and what its claims notice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.storage import instances
from runrecovery_service.storage.opening import open_database
from storage.service_store import ServiceStore, boot
from support.processes import processes_below
from support.waiting import until

from demo import replicas
from demo.history import History

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for temporary files that PostgreSQL's user can reach, unlike that of pytest."""
    made = Path(tempfile.mkdtemp(prefix="runrecovery-test-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_gets_a_signal_leaves_no_process_and_no_file(folder: Path, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "demo.replicas"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
    ) as process:
        until(
            lambda: any(folder.glob("runrecovery-demo-*/c/data/lock")), "the third replica starts"
        )
        process.send_signal(number)

        assert process.wait(60) == 128 + number
    assert processes_below(folder) == []
    assert list(folder.iterdir()) == []


def test_a_claim_that_does_not_hold_is_shown_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def play(_: object, claims: Any, *__: object) -> None:
        claims.check("the sky is green", holds=False)

    monkeypatch.setattr(replicas, "_play", play)
    monkeypatch.setattr(replicas, "exit_on_termination", lambda: None)
    monkeypatch.setattr(replicas, "scratch_postgres", lambda *_: _NoServer())

    assert replicas.main() == 1
    assert "✗ the sky is green" in capsys.readouterr().out


class _NoServer:
    """Stands for a server that nothing connects to."""

    def __enter__(self) -> _NoServer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def create(self, name: str) -> str:
        return f"postgresql:///{name}"


def test_the_record_of_the_database_shows_a_write_under_an_epoch_that_is_over(
    postgresql_url: str, tmp_path: Path
) -> None:
    db = open_database(postgresql_url, tmp_path)
    history = History(postgresql_url)
    history.begin()
    store = ServiceStore(db=db, owner=instances.claim(db, boot("a"), now=ServiceStore.now))
    run = store.create()
    store.set(run, version=7)
    before = history.stale_writes()

    db.execute("UPDATE instance_epoch SET epoch = epoch + 1 WHERE name = 'a'")
    store.set(run, version=8)

    assert (before, len(history.stale_writes()), history.changes()) == ([], 1, 2)
    history.close()
    db.close()
