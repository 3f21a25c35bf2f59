"""A trust file, its runs and its records change while the service edits the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import instances
from runrecovery_service.storage.opening import open_database
from runrecovery_service.trust import files
from storage.service_store import ServiceStore, boot
from storage.trust_host import ORIGINAL, CliHost, outcomes


def once_locked(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Call `do` once, right after an edit has locked its file."""
    look = files._read
    pending = [do]

    def looked(target: Path) -> Any:
        if pending:
            pending.pop()()
        return look(target)

    monkeypatch.setattr(files, "_read", looked)


def test_a_run_that_is_reopened_before_the_file_is_locked_keeps_its_entry(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.trusted_waiting_run()
    host.fail(run)
    text = host.file.read_bytes()
    once_locked(monkeypatch, lambda: host.store.set(run, status="WAITING_USER"))

    assert host.keeper().remove_stale() == TrustClearing()
    assert host.file.read_bytes() == text
    assert len(host.recorded()) == 1


def test_a_run_that_is_requeued_during_the_removal_keeps_its_record_and_gets_its_entry_again(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.trusted_waiting_run()
    host.fail(run)
    text, put = host.file.read_bytes(), files._replace

    def put_late(*given: Any) -> bool:
        host.store.set(run, status="QUEUED")
        return put(*given)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_replace", put_late)
        host.keeper().remove_stale()
    assert len(host.recorded()) == 1  # the next launch may rely on it

    host.add_entry(run)
    assert host.file.read_bytes() == text
    host.fail(run)
    host.keeper().remove_stale()
    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


def test_text_that_another_program_writes_during_a_removal_is_kept(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, text = host.trusted_run(), host.file.read_bytes()
    host.fail(run)
    theirs = b"# theirs\n"
    once_locked(monkeypatch, lambda: host.file.write_bytes(theirs + text))

    host.keeper().remove_stale()

    assert host.file.read_bytes() == theirs + ORIGINAL


def test_an_entry_that_the_user_adds_during_a_launch_stays_the_users(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.store.running().run
    users = ORIGINAL + f'\n[projects."{host.workspace(run)}"]\ntrust_level = "trusted"\n'.encode()
    put, pending = files._replace, [users]

    def put_late(*given: Any) -> bool:
        if pending:
            host.file.write_bytes(pending.pop())
        return put(*given)

    monkeypatch.setattr(files, "_replace", put_late)
    host.add_entry(run)
    host.fail(run)

    assert outcomes(host.keeper().remove_stale()) == [(run.run_id, "not_ours")]
    assert host.file.read_bytes() == users


@dataclass
class CliWithoutLock:
    """A CLI that rewrites its file without a lock, at every fifth step of the service's edits.

    A step is after the service has read the file and before the service replaces the file.
    """

    file: Path
    steps: int = 0
    writes: int = 0

    def step(self) -> None:
        """Count a step of the service; write at each fifth."""
        self.steps += 1
        if self.steps % 5 == 0:
            self.writes += 1
            document = json.loads(self.file.read_bytes())
            document["count"] += 1
            new = self.file.with_name("new")
            new.write_text(json.dumps(document, indent=1))
            new.replace(self.file)

    def before(self, do: Callable[..., Any]) -> Callable[..., Any]:
        """Return `do` with a step before each call."""

        def stepped(*given: Any, **named: Any) -> Any:
            self.step()
            return do(*given, **named)

        return stepped


def test_two_services_and_a_cli_without_a_lock_lose_no_write_of_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cli" / ".claude.json"
    file.parent.mkdir()
    mine = {"mine": [1.5, "é"], "projects": {"/mine": {}}}
    file.write_text(json.dumps({"count": 0, **mine}))
    cli = CliWithoutLock(file)
    monkeypatch.setattr(files, "_write", cli.before(files._write))
    monkeypatch.setattr(files, "_swap", cli.before(files._swap))

    def serve(name: str) -> int:
        """Serve with a store of its own; return how many runs were trusted while they ran."""
        home = tmp_path / name
        home.mkdir()
        db = open_database("", home)
        store = ServiceStore(db=db, owner=instances.claim(db, boot(), now=ServiceStore.now))
        host, trusted = CliHost(path=home, store=store), 0
        for at in range(10):
            turn = store.running()
            folder = host.workspace(turn.run)
            env = {"CLAUDE_CONFIG_DIR": str(file.parent)}
            host.keeper().add(turn.run, "claude", folder, env)
            trusted += str(folder) in json.loads(file.read_bytes())["projects"]
            if at % 2:
                host.keeper().remove_run(turn.run)
            store.end(turn, Succeeded({}))
            host.keeper().remove_stale()
        left = host.recorded()
        db.close()
        assert left == []
        return trusted

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, "ab")) == [10, 10]

    assert cli.writes > 10
    assert json.loads(file.read_bytes()) == {"count": cli.writes, **mine}
