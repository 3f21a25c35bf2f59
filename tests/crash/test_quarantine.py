"""A run with a damaged row is quarantined, and recovery decides all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import refused, state_word, status_word
from support.service import Home

NewHome = Callable[..., Home]

SEEDED: Final = 600
DAMAGE: Final = {
    "an unknown status": "status = 'GARBAGE'",
    "an empty status": "status = ''",
    "an input that is no JSON": "input = '{\"a\": '",
    "labels that are no JSON": "labels = 'x'",
    "an output that is no JSON": "output = '{'",
    "an unknown restart policy": "restart_policy = 'MAYBE'",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_one_damaged_run_is_quarantined_and_599_are_decided(new_home: NewHome, damage: str) -> None:
    home = new_home(recovery_batch_rows=100)
    home.seed(SEEDED)
    with home.store(writable=True) as store:
        (run_id,) = store.execute("SELECT run_id FROM run WHERE id = 317").fetchone()
        store.execute(f"UPDATE run SET {damage} WHERE id = 317")  # noqa: S608 - our own words
    row = home.rows("SELECT status, input, labels, output, restart_policy FROM run WHERE id = 317")

    service, api = home.start()

    report = api.status().reconciliation
    assert (report.runs_scanned, report.quarantined) == (SEEDED, 1)
    assert sum(one.count for one in report.decisions if one.rule != "record_damaged") == 599
    assert len(report.warnings) == 1
    assert run_id in report.warnings[0]
    run = api.get(run_id)
    assert (status_word(run), state_word(run.recovery)) == ("UNSPECIFIED", "QUARANTINED")
    assert run.recovery.recovery_reason == "record_damaged"
    quarantined = [run_pb2.RECOVERY_STATE_QUARANTINED]
    assert [one.run_id for one in api.recovered(recovery_states=quarantined)] == [run_id]
    listed = api.runs.ListRuns(pb.ListRunsRequest(page_size=1000), timeout=10).runs
    assert len(listed) == SEEDED
    assert run in listed
    for call in (lambda: api.cancel(run_id), lambda: api.reply(run_id, 1, "yes")):
        assert refused(call).reason == "RUN_QUARANTINED"
    assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"
    same = "SELECT status, input, labels, output, restart_policy FROM run WHERE id = 317"
    assert home.rows(same) == row

    service.kill()
    _, api = home.start()
    assert api.get(run_id) == run
    assert api.status().reconciliation.quarantined == 0


def test_a_repaired_run_is_decided_by_the_next_start(new_home: NewHome) -> None:
    home = new_home()
    home.seed(10, mix="waiting=1")
    with home.store(writable=True) as store:
        store.execute("UPDATE run SET status = 'GARBAGE' WHERE id = 3")
    service, api = home.start()
    assert service.stop() == 0
    with home.store(writable=True) as store:
        store.execute(
            "UPDATE run SET status = 'WAITING_USER', session_value = '', recovery_state = 'NONE'"
            " WHERE id = 3"
        )
        (run_id,) = store.execute("SELECT run_id FROM run WHERE id = 3").fetchone()

    _, api = home.start()

    info = api.recovery_info(run_id)
    rules = [one.recovery_reason for one in info.history]
    assert rules == ["session_handle_lost", "record_damaged"]
    assert status_word(api.get(run_id)) == "FAILED"
