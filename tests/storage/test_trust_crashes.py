"""A crash at any step of a launch or of a removal leaves no trust entry behind."""

from __future__ import annotations

from contextlib import suppress

import pytest
from runrecovery_service.storage import trust
from runrecovery_service.trust import files
from storage.service_store import Crash, CrashingDatabase
from storage.trust_host import ORIGINAL, CliHost, outcomes


def test_a_crash_between_record_and_entry_leaves_a_record_that_is_cleared(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.store.running().run
    with monkeypatch.context() as patch:
        patch.setattr(files, "_replace", crash)
        with pytest.raises(Crash):
            host.add_entry(run)
    assert (host.file.read_bytes(), len(host.recorded())) == (ORIGINAL, 1)
    host.fail(run)

    assert outcomes(host.keeper().remove_stale()) == [(run.run_id, "gone")]
    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


def test_a_crash_between_removal_and_its_record_leaves_a_record_that_is_cleared(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = host.trusted_run()
    host.fail(run)
    with monkeypatch.context() as patch:
        patch.setattr(trust, "record_outcome", crash)
        assert len(host.keeper().remove_stale().failures) == 1
    assert (host.file.read_bytes(), len(host.recorded())) == (ORIGINAL, 1)

    assert outcomes(host.keeper().remove_stale()) == [(run.run_id, "gone")]
    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


def crash(*_: object, **__: object) -> None:
    raise Crash


def test_a_crash_at_any_statement_of_a_launch_or_a_removal_leaves_no_entry(host: CliHost) -> None:
    store = host.store
    for at in range(40):
        run = store.running().run
        try:
            host.add_entry(run, CrashingDatabase(store.db, at))
            launched = True
        except Crash:
            launched = False
        assert launched <= host.trusts(run)
        assert host.trusts(run) <= (run.key in dict(host.recorded()))
        host.fail(run)
        with suppress(Crash):
            host.keeper(CrashingDatabase(store.db, at)).remove_stale()
        host.keeper().remove_stale()

        assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])
    assert launched
