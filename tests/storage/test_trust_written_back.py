"""A trust entry that a CLI writes back after its removal is removed again."""

from __future__ import annotations

from datetime import timedelta

import pytest
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.trust import codex
from runrecovery_service.trust.entry import Removals
from storage.trust_host import ORIGINAL, CliHost, outcomes


def test_an_entry_that_a_cli_writes_back_is_removed_again(host: CliHost) -> None:
    host.fail(host.trusted_run())
    read = host.file.read_bytes()
    host.keeper().remove_stale()
    checks = []

    for at in range(100):  # rounds of the trust sweep
        if at in (1, 30):
            host.file.write_bytes(read)  # a CLI that had read it before
        if host.keeper().stale_files():
            checks.append(at)
            host.keeper().remove_stale_in(str(host.file), lock_wait_s=1)
        if at == 20:
            assert host.file.read_bytes() == ORIGINAL

    assert len(checks) == 2
    assert host.file.read_bytes() == ORIGINAL
    assert host.store.rows("SELECT * FROM trust_entry") == []


def test_a_defect_keeps_no_record_of_a_removed_entry_for_ever(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.fail(host.trusted_run())
    host.keeper().remove_stale()

    def fail(*_: object) -> Removals:
        raise LookupError

    monkeypatch.setattr(codex.CodexEditor, "remove_all", fail)
    for _ in range(2):
        assert host.keeper().remove_stale() == TrustClearing()
        host.store.advance(60)

    assert host.store.rows("SELECT * FROM trust_entry") == []


def test_a_start_removes_an_entry_that_was_written_back(host: CliHost) -> None:
    run = host.trusted_run()
    host.fail(run)
    read = host.file.read_bytes()
    host.keeper().remove_stale()
    host.file.write_bytes(read)

    assert outcomes(host.keeper().remove_stale()) == [(run.run_id, "removed")]
    assert host.file.read_bytes() == ORIGINAL


def test_an_entry_that_is_written_back_after_the_end_of_its_run_is_removed(host: CliHost) -> None:
    turn = host.store.running()
    host.add_entry(turn.run)
    read = host.file.read_bytes()
    host.keeper().remove_run(turn.run)
    host.store.end(turn, Succeeded({}))
    host.file.write_bytes(read)

    assert host.keeper().remove_run(turn.run) == TrustClearing()
    host.store.advance(5)
    assert host.keeper().stale_files() == [str(host.file)]
    host.keeper().remove_stale_in(str(host.file), lock_wait_s=1)
    assert host.file.read_bytes() == ORIGINAL


def test_a_run_that_is_requeued_after_the_removal_gets_a_new_entry_that_stays(
    host: CliHost,
) -> None:
    run = host.trusted_waiting_run()
    host.fail(run)
    text = host.file.read_bytes()
    host.keeper().remove_stale()
    host.store.set(run, status="QUEUED")
    host.add_entry(run)
    host.store.advance(100)

    assert host.keeper().remove_stale() == TrustClearing()
    assert host.file.read_bytes() == text
    assert host.recorded() == [(run.key, str(host.workspace(run)))]


def test_a_wall_clock_that_is_set_back_keeps_no_record_for_ever(host: CliHost) -> None:
    host.fail(host.trusted_run())
    host.keeper().remove_stale()
    host.store.step_wall_clock(timedelta(days=-30))

    assert host.keeper().stale_files() == [str(host.file)]
    host.keeper().remove_stale_in(str(host.file), lock_wait_s=1)
    assert host.store.rows("SELECT * FROM trust_entry") == []
