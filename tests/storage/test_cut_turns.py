"""A recovery reports exactly the turns as spans whose end no service has recorded."""

from __future__ import annotations

from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.storage import launch_records
from runrecovery_service.storage.cut_turns import CutTurn, cut_turns
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.recovery_apply import Batch
from storage.service_store import QUESTION, ServiceStore, one_of_each

ALL = Batch(0, 1 << 62, 0)


def cut(store: ServiceStore, *, limit: int = 100) -> list[CutTurn]:
    """Return the cut turns of the latest recovery."""
    [(report,)] = store.rows("SELECT max(id) FROM reconciliation")
    return cut_turns(store.db, report, ALL, limit=limit)


def test_turns_with_a_process_are_cut_and_no_others_and_each_once(store: ServiceStore) -> None:
    made = one_of_each(store)

    store.recover()
    first = cut(store)
    store.recover()
    second = cut(store)

    assert [(turn.run_id, turn.rule, turn.status, turn.has_failed) for turn in first] == [
        (made[2].run_id, "sticky_process_lost", "FAILED", True),
        (made[6].run_id, "cancel_completed", "CANCELED", False),
        (made[7].run_id, "running_interrupted", "FAILED", True),
        (made[8].run_id, "requeued", "QUEUED", True),
    ]
    assert second == []


def test_a_cut_turn_has_its_trace_and_its_launch(store: ServiceStore) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    turn = store.running(traceparent=traceparent)
    launched_at = store.now

    store.recover()

    (found,) = cut(store)
    assert found.cookie == turn.launch.cookie
    assert found.cookie not in repr(found)
    assert found.traceparent == traceparent
    assert found.launched_at == launched_at
    assert (found.engine, found.attempt, found.turn) == ("demo", 1, 1)


def test_a_turn_whose_end_is_found_has_not_failed(store: ServiceStore) -> None:
    turns = [store.running(), store.running()]
    for turn in turns:
        store.keep_session(turn)
    ends = (FoundEnd(end=Succeeded({})), FoundEnd(end=Asked(QUESTION)))

    store.recover(found={turn.run.key: end for turn, end in zip(turns, ends, strict=True)})

    assert [(turn.rule, turn.has_failed) for turn in cut(store)] == [
        ("result_found_in_output", False),
        ("question_found_in_output", False),
    ]


def test_a_turn_that_has_ended_is_not_cut_although_a_process_of_it_lives(
    store: ServiceStore,
) -> None:
    turn = store.running()
    store.keep_session(turn)
    alive = LaunchEnd(exit_code=0, processes_ended=0, gone=False)
    store.end(turn, Asked(QUESTION), ended=alive)
    assert launch_records.unended_launches(store.db, store.owner, limit=1) != []

    store.recover()

    assert cut(store) == []


def test_no_more_turns_than_the_limit_are_read(store: ServiceStore) -> None:
    store.running()
    store.running()

    store.recover()

    assert len(cut(store, limit=1)) == 1
