"""A recovery that is killed again and again ends as if it had not been killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from runrecovery.v1 import recovery_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_rpc
from support.api import refused, status_word
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

SEEDED: Final = 4_000
BATCH: Final = 20
KILLS: Final = 20
OUTCOMES: Final = {
    ("WAITING_USER", "RECOVERED_WAITING", None, "OPEN", 1),
    ("FAILED", "FAILED_RECONCILED", "SESSION_RESUME_FAILED", "CLOSED", 0),
    ("FAILED", "FAILED_RECONCILED", "INTERACTION_PROCESS_LOST", "CLOSED", 0),
    ("FAILED", "FAILED_RECONCILED", "ORCHESTRATOR_RESTART_INTERRUPTED", None, 0),
}
"""Status, recovery state, error, state of the question, session: nothing else may be seen."""


def decided(home: Home) -> int:
    ((count,),) = home.rows("SELECT count(*) FROM run WHERE recovery_state <> 'NONE'")
    return int(count)


def outcomes(home: Home) -> dict[tuple[object, ...], int]:
    """Count the decided runs, grouped by everything that a decision changes in one transaction."""
    rows = home.rows(
        "SELECT r.status, r.recovery_state, r.error_code, i.state, r.session_value IS NOT NULL,"
        " count(*) FROM run r LEFT JOIN interaction i ON i.run = r.id AND i.no = 1"
        " WHERE r.recovery_state <> 'NONE' GROUP BY 1, 2, 3, 4, 5"
    )
    return {row[:-1]: row[-1] for row in rows}


def assert_no_half_decision(home: Home) -> None:
    """Assert that every run is either untouched or completely decided."""
    assert set(outcomes(home)) <= OUTCOMES
    odd = home.rows(
        "SELECT count(*) FROM run r WHERE (r.recovery_state <> 'NONE') <>"
        " (SELECT count(*) FROM recovery_event e WHERE e.run = r.id)"
        " OR (r.recovery_state <> 'NONE') <> r.recovery_count"
        " OR (r.status = 'FAILED') <> (r.ended_at IS NOT NULL)"
        " OR (r.recovery_state <> 'NONE' AND r.recovered_at IS NULL)"
    )
    assert odd == [(0,)]


def kill_during_recovery(home: Home, decisions: int, delay_s: float = 0.0) -> ServiceProcess:
    """Start the service, and kill it after so many decisions and a delay, or when it serves."""
    service = home.spawn()
    service.until_event("recovery.started")
    sql = "SELECT runs_scanned - runs_unchanged FROM reconciliation ORDER BY id DESC LIMIT 1"
    with home.store() as store:
        until(
            lambda: (
                store.execute(sql).fetchone()[0] >= decisions or service.events("service.serving")
            ),
            "so much is decided",
        )
    ends = time.monotonic() + delay_s
    until(lambda: time.monotonic() >= ends, "the moment has come")
    service.kill()
    return service


def kill_many_recoveries(home: Home, dice: random.Random) -> list[int]:
    """Kill recoveries of one store; return how many runs were decided after each kill.

    The list is shorter than KILLS when a recovery ended before its kill: the machine was so busy
    that the test did not run for that long.
    """
    home.seed(SEEDED)
    progress: list[int] = []
    while len(progress) < KILLS:
        service = kill_during_recovery(home, dice.randrange(5 * BATCH), dice.uniform(0, 0.004))
        assert_no_half_decision(home)
        if service.events("service.serving"):
            break
        progress.append(decided(home))
    return progress


@pytest.mark.timeout(300)  # 21 starts of a service; on a machine that is busy they take long
def test_twenty_kills_in_a_recovery_of_200_batches_leave_one_decision_each(
    new_home: NewHome,
) -> None:
    dice = random.Random(os_seed())  # noqa: S311 - moments, not secrets
    for _ in range(5):
        home = new_home(recovery_batch_rows=BATCH, safe_mode_after=0, log_level="info")
        progress = kill_many_recoveries(home, dice)
        if len(progress) == KILLS:
            break

    _, api = home.start()

    assert len(progress) == KILLS

    assert progress == sorted(progress)
    assert 0 < progress[-1] < SEEDED, progress
    assert_no_half_decision(home)
    assert decided(home) == SEEDED
    assert home.rows("SELECT count(*), count(DISTINCT run) FROM recovery_event") == [
        (SEEDED, SEEDED)
    ]
    counts = outcomes(home)
    assert counts == {
        ("WAITING_USER", "RECOVERED_WAITING", None, "OPEN", 1): SEEDED * 30 // 100,
        ("FAILED", "FAILED_RECONCILED", "SESSION_RESUME_FAILED", "CLOSED", 0): SEEDED // 10,
        ("FAILED", "FAILED_RECONCILED", "INTERACTION_PROCESS_LOST", "CLOSED", 0): SEEDED // 10,
        ("FAILED", "FAILED_RECONCILED", "ORCHESTRATOR_RESTART_INTERRUPTED", None, 0): SEEDED // 2,
    }
    reports = api.recovery.ListReconciliations(
        recovery_rpc.ListReconciliationsRequest(), timeout=10
    ).reconciliations
    assert len(reports) == KILLS + 1
    assert [report.state for report in reports[1:]] == [
        recovery_pb2.RECONCILIATION_STATE_FAILED
    ] * KILLS
    assert sum(count.count for report in reports for count in report.decisions) == SEEDED
    last = reports[0]
    assert last.state == recovery_pb2.RECONCILIATION_STATE_COMPLETED
    waiting = SEEDED * 30 // 100
    assert last.runs_unchanged <= waiting
    assert last.runs_scanned == last.runs_total
    assert last.runs_scanned - last.runs_unchanged == sum(one.count for one in last.decisions)
    assert all(phase.duration != Duration() for phase in last.phases if phase.name == "converge")


def os_seed() -> int:
    """Return a new seed, which pytest shows if the test fails."""
    seed = time.time_ns()
    print(f"seed {seed}")
    return seed


def test_five_unfinished_starts_lead_to_safe_mode_and_one_finished_start_out_of_it(
    new_home: NewHome,
) -> None:
    home = new_home(recovery_batch_rows=50)
    service, api = home.start()
    api.create("resumable", {"questions": [{}]}, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    service.kill()
    home.seed(3000, mix="running=1")
    for _ in range(5):
        kill_during_recovery(home, 1)
    before = decided(home)

    service, api = home.start()

    assert before < 3001
    report = api.status().reconciliation
    assert report.safe_mode
    assert service.events("recovery.safe_mode")
    assert decided(home) == 3001
    api.reply("waits", 1, "yes")
    refusal = refused(lambda: api.create("resumable", {}))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SAFE_MODE")
    assert home.agents() == []
    assert home.rows("SELECT count(*) FROM process_lease WHERE epoch > 1") == [(0,)]
    service.kill()
    service, api = home.start()
    assert not api.status().reconciliation.safe_mode
    assert api.until_ended("waits").recovery.recovery_reason == "accepted_reply_redriven"
    assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"
