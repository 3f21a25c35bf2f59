"""Whatever happens to a commit, a mutation and its receipt are both recorded, or neither is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import pytest
from peewee import OperationalError
from runrecovery.v1 import recovery_service_pb2, run_service_pb2
from runrecovery_service.domain.run import Profile, Run
from runrecovery_service.storage import reopening
from storage.service_store import Crash, ServiceStore, receipt

RECEIPT: Final = receipt("0190d3c5-7c3e-7000-8000-000000000001")
DONE: Final = "done"
NOTHING: Final = "nothing"
READS: Final = 1  # MethodOptions.NO_SIDE_EFFECTS
MOST_STATEMENTS: Final = 60


@dataclass(frozen=True, slots=True)
class Mutation:
    """A mutating method in one situation.

    Attributes:
        prepare: creates the run that the call changes.
        call: makes the call, with the receipt.
        effect: queries for everything that the call changes, with their results after the call.
            Before it, every result differs.
    """

    method: str
    prepare: Callable[[ServiceStore], Run]
    call: Callable[[ServiceStore, Run], Run]
    effect: dict[str, list[tuple[Any, ...]]]


def lost(store: ServiceStore) -> Run:
    run = store.waiting()
    store.set(run, session_verdict="INVALID")
    store.recover()
    return store.get(run)


def reopen(store: ServiceStore, run: Run) -> Run:
    return reopening.reopen(
        store.db, run.run_id, handle=None, session_type_of=lambda _: "jsonl",
        wait_s_of=lambda _: 60.0, owner=store.owner, etag=None, receipt=RECEIPT,
        due_in=store.due_in, steady=store.steady, now=store.tick(),
    )  # fmt: skip


def create(store: ServiceStore, _: Run) -> Run:
    return store.create(engine="new", run_id="new", with_receipt=RECEIPT)


def reply(store: ServiceStore, run: Run) -> Run:
    return store.reply(run, receipt=RECEIPT)


def cancel(store: ServiceStore, run: Run) -> Run:
    return store.cancel(run, receipt=RECEIPT)


LAST_EVENT: Final = "SELECT kind FROM run_event ORDER BY no DESC LIMIT 1"
QUESTION: Final = "SELECT state, response FROM interaction"
MUTATIONS: Final = {
    "create": Mutation(
        "CreateRun",
        ServiceStore.create,
        create,
        {
            "SELECT count(*) FROM run WHERE engine = 'new'": [(1,)],
            "SELECT key, value FROM run_label ORDER BY run": [("team", "blue")] * 2,
        },
    ),
    "reply to a resumable run": Mutation(
        "SubmitReply",
        ServiceStore.waiting,
        reply,
        {
            "SELECT status FROM run": [("QUEUED",)],
            LAST_EVENT: [("ANSWERED",)],
            QUESTION: [("ANSWERED", '"yes"')],
        },
    ),
    "reply to a sticky run": Mutation(
        "SubmitReply",
        lambda store: store.waiting(profile=Profile.STICKY_PROCESS),
        reply,
        {
            "SELECT status FROM run": [("RUNNING",)],
            LAST_EVENT: [("ANSWERED",)],
            QUESTION: [("ANSWERED", '"yes"')],
        },
    ),
    "cancel a queued run": Mutation(
        "CancelRun",
        ServiceStore.create,
        cancel,
        {"SELECT status FROM run": [("CANCELED",)], LAST_EVENT: [("CANCELED",)]},
    ),
    "cancel a running run": Mutation(
        "CancelRun",
        lambda store: store.running().run,
        cancel,
        {
            "SELECT status FROM run WHERE cancel_requested_at IS NOT NULL": [("RUNNING",)],
            LAST_EVENT: [("CANCEL_REQUESTED",)],
        },
    ),
    "cancel a waiting run": Mutation(
        "CancelRun",
        ServiceStore.waiting,
        cancel,
        {
            "SELECT status FROM run": [("CANCELED",)],
            "SELECT state FROM interaction": [("CLOSED",)],
        },
    ),
    "reopen": Mutation(
        "ReopenRun",
        lost,
        reopen,
        {
            "SELECT status, session_value FROM run": [("WAITING_USER", "secret")],
            "SELECT state FROM interaction": [("OPEN",)],
            "SELECT rule FROM recovery_event ORDER BY no DESC LIMIT 1": [("reopened_by_caller",)],
        },
    ),
}


@pytest.fixture(params=MUTATIONS)
def mutation(request: pytest.FixtureRequest) -> Mutation:
    return MUTATIONS[request.param]


def observed(store: ServiceStore, mutation: Mutation) -> str:
    """Return `DONE` or `NOTHING`; fail if the mutation is partly done."""
    receipts = store.rows(
        "SELECT method FROM request_receipt WHERE request_id = ?", RECEIPT.request_id
    )
    effects = {sql: store.rows(sql) == after for sql, after in mutation.effect.items()}
    if receipts:
        assert (receipts, effects) == ([("M",)], dict.fromkeys(effects, True))
        return DONE
    assert effects == dict.fromkeys(effects, False)
    return NOTHING


@contextmanager
def cut_at(store: ServiceStore, number: int) -> Iterator[None]:
    """Raise Crash instead of executing the statement of this number. Statements of peewee count."""
    execute: Callable[..., Any] = store.db.peewee.execute_sql
    left = [number]

    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise Crash
        return execute(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.db.peewee, "execute_sql", counted)
        yield


@contextmanager
def lose_commit_answers(store: ServiceStore, *, stands: bool) -> Iterator[None]:
    """Raise Crash instead of the answer to each COMMIT.

    Args:
        stands: whether the commit is carried out nevertheless. SQLite then refuses the rollback,
            because no transaction is open.
    """
    commit: Callable[[], Any] = store.db.peewee.commit

    def lose() -> Any:
        if stands:
            commit()
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.db.peewee, "commit", lose)
        yield


def test_every_mutating_method_is_tried() -> None:
    services = [
        *run_service_pb2.DESCRIPTOR.services_by_name.values(),
        *recovery_service_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    mutating = {
        method.name
        for service in services
        for method in service.methods
        if method.GetOptions().idempotency_level != READS
    }

    # These two change many rows in many transactions, and have tests of their own.
    assert mutating - {"Prune", "RetryWebhook"} == {
        "CreateRun",
        "SubmitReply",
        "CancelRun",
        "ReopenRun",
    }
    assert {mutation.method for mutation in MUTATIONS.values()} == mutating - {
        "Prune",
        "RetryWebhook",
    }


def test_a_crash_at_any_statement_of_a_call_leaves_all_of_it_or_nothing(
    store: ServiceStore, mutation: Mutation
) -> None:
    run = mutation.prepare(store)
    assert observed(store, mutation) == NOTHING

    for at in range(MOST_STATEMENTS):
        try:
            with cut_at(store, at):
                mutation.call(store, run)
        except Crash:
            assert observed(store, mutation) == NOTHING, at
        else:
            break

    assert at > 4
    assert observed(store, mutation) == DONE


def test_a_call_whose_commit_failed_is_done_by_the_next_try(
    store: ServiceStore, mutation: Mutation
) -> None:
    run = mutation.prepare(store)
    with pytest.raises(Crash), lose_commit_answers(store, stands=False):
        mutation.call(store, run)
    assert observed(store, mutation) == NOTHING

    mutation.call(store, run)

    assert observed(store, mutation) == DONE


def test_a_call_whose_commit_succeeded_without_an_answer_is_not_done_twice(
    store: ServiceStore, mutation: Mutation
) -> None:
    run = mutation.prepare(store)
    with pytest.raises((Crash, OperationalError)), lose_commit_answers(store, stands=True):
        mutation.call(store, run)
    assert observed(store, mutation) == DONE
    before = store.dump()

    again = mutation.call(store, run)

    assert before == store.dump()
    assert again.run_id == ("new" if mutation.method == "CreateRun" else run.run_id)


def test_many_callers_with_the_same_request_have_one_effect(
    store: ServiceStore, mutation: Mutation
) -> None:
    run = mutation.prepare(store)

    answers = store.all_at_once([lambda: mutation.call(store, run)] * 50, threads=12)

    assert observed(store, mutation) == DONE
    wanted = "new" if mutation.method == "CreateRun" else run.run_id
    assert {answer.run_id if isinstance(answer, Run) else repr(answer) for answer in answers} == {
        wanted
    }
    assert store.rows("SELECT count(*) FROM request_receipt") == [(1,)]
