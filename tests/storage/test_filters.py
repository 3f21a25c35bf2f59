"""Runs are listed by label and time, in a basic or a full view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import pytest
from runrecovery.v1 import run_service_pb2
from runrecovery_service.domain.errors import RunAlreadyExists
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.run import Option, Page, Question, Run, RunFilter, RunStatus, View
from runrecovery_service.domain.turn import Asked
from runrecovery_service.rpc import run_messages
from runrecovery_service.storage import decisions, label_filter, run_pages
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import QUESTION, ServiceStore

CLIENTS_TAKE = 4 * 1024 * 1024


def listed(store: ServiceStore, view: View = View.FULL, **wanted: Any) -> list[Run]:
    page = run_pages.page(store.db, RunFilter(**wanted), after=None, limit=100, view=view)
    return list(page.rows)


def ids(found: Iterable[Run]) -> list[str]:
    return [run.run_id for run in found]


def all_pages(page_after: Callable[..., Page[Run]]) -> list[list[str]]:
    """Return the run_ids of each page, read one after the other to the last."""
    page = page_after(after=None)
    pages = [ids(page.rows)]
    while page.after is not None:
        page = page_after(after=page.after)
        pages.append(ids(page.rows))
    return pages


@contextmanager
def query_plans(store: ServiceStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Return SQLite's plan of each query that the block makes, once the block has ended."""
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL plans by its statistics")
    made: list[tuple[str, Any]] = []
    plans: list[list[str]] = []
    execute: Callable[[Any], Any] = store.db.peewee.execute

    def note(query: Any) -> Any:
        made.append(query.sql())
        return execute(query)

    monkeypatch.setattr(store.db.peewee, "execute", note)
    yield plans
    for sql, params in made:
        plan = store.db.fetch_all(f"EXPLAIN QUERY PLAN {sql}", params)
        plans.append([row[3] for row in plan])


def test_runs_are_found_by_all_their_labels(store: ServiceStore) -> None:
    both = store.create(labels={"team": "red", "tier": "1"})
    one = store.create(labels={"team": "red"})
    store.create(labels={"team": "redder", "tier": "1"})
    store.create(labels={})

    assert ids(listed(store, labels={"team": "red"})) == [one.run_id, both.run_id]
    assert ids(listed(store, labels={"team": "red", "tier": "1"})) == [both.run_id]
    assert listed(store, labels={"team": "red", "tier": "2"}) == []


def test_a_label_filter_pages_without_gap_or_repeat(store: ServiceStore) -> None:
    made = [store.create(labels={"n": "x" if number % 3 else "y"}) for number in range(12)]
    wanted = RunFilter(labels={"n": "x"})

    seen = all_pages(partial(run_pages.page, store.db, wanted, limit=3))

    assert list(chain.from_iterable(seen)) == [
        run.run_id for run in reversed(made) if run.labels["n"] == "x"
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        RunFilter(),
        RunFilter(engines=frozenset({"a", "b"})),
        RunFilter(engine="a"),
        RunFilter(labels={"n": "x"}),
        RunFilter(statuses=frozenset({RunStatus.WAITING_USER})),
    ],
)
def test_a_list_that_begins_with_the_oldest_run_is_the_other_one_reversed(
    store: ServiceStore, wanted: RunFilter
) -> None:
    for number in range(6):
        store.waiting(engine="ab"[number % 2], labels={"n": "xxy"[number % 3]})
    store.create(engine="c")
    seen, after = list[str](), None
    while True:
        page = run_pages.page(store.db, wanted, after=after, limit=2, oldest_first=True)
        seen += ids(list(page.rows))
        after = page.after
        if after is None:
            break

    newest_first = run_pages.page(store.db, wanted, after=None, limit=100)
    assert len(seen) >= 3
    assert seen == ids(list(newest_first.rows))[::-1]


def test_lists_of_some_engines_have_full_pages_of_their_runs_only(store: ServiceStore) -> None:
    made = [store.waiting(engine="a" if number % 2 else "b") for number in range(6)]
    store.recover()
    mine = [run.run_id for run in reversed(made) if run.engine == "a"]
    engines = frozenset({"a", "none"})

    found = all_pages(partial(run_pages.page, store.db, RunFilter(engines=engines), limit=2))
    recovered = all_pages(
        partial(decisions.recovered_page, store.db, RecoveredFilter(engines=engines), limit=2)
    )

    assert found == recovered == [mine[:2], mine[2:]]
    assert listed(store, engines=frozenset({"none"})) == []
    assert listed(store, engines=engines, engine="b") == []


def test_a_quarantined_run_is_found_by_no_status(store: ServiceStore) -> None:
    run, quarantined = store.create(), store.create()
    store.set(quarantined, recovery_state="QUARANTINED")

    assert ids(listed(store, statuses=tuple(RunStatus))) == [run.run_id]
    assert ids(listed(store)) == [quarantined.run_id, run.run_id]


def test_labels_of_any_text_are_found(store: ServiceStore) -> None:
    odd = {"a.b_c-d": "\"'%_\\ ß \u2028", "empty": ""}
    run = store.create(labels=odd)

    assert ids(listed(store, labels=odd)) == [run.run_id]
    assert listed(store, labels={"empty": " "}) == []


def test_a_damaged_run_does_not_break_a_label_filter(store: ServiceStore) -> None:
    run = store.create(labels={"team": "red"})
    store.set(run, labels="{")

    assert ids(listed(store, labels={"team": "red"})) == [run.run_id]


def test_a_refused_create_leaves_no_label(store: ServiceStore) -> None:
    run = store.create(labels={"team": "red"})
    with pytest.raises(RunAlreadyExists):
        store.create(run_id=run.run_id, labels={"team": "green"})

    assert listed(store, labels={"team": "green"}) == []


def test_runs_are_found_by_creation_time(store: ServiceStore) -> None:
    first, second = store.create(), store.create()
    at = second.created_at

    assert ids(listed(store, after=at)) == [second.run_id]
    assert ids(listed(store, before=at)) == [first.run_id]
    assert listed(store, after=at + timedelta(microseconds=1)) == []


def test_recovered_runs_are_found_by_label(store: ServiceStore) -> None:
    red, _ = store.waiting(labels={"team": "red"}), store.waiting()
    store.recover()

    page = decisions.recovered_page(
        store.db, RecoveredFilter(labels={"team": "red"}), after=None, limit=9
    )

    assert ids(page.rows) == [red.run_id]


def test_a_label_of_many_runs_finds_the_same_runs(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [store.waiting(labels={"a": "1", "n": str(number % 2)}) for number in range(6)]
    store.recover()
    wanted = {"a": "1", "n": "0"}
    expected = [run.run_id for run in reversed(made) if run.labels == wanted]

    for few in (1, 4, 100):  # both are common, one of them is, none is
        monkeypatch.setattr(label_filter, "RARE_LABEL_RUNS", few)
        page = decisions.recovered_page(
            store.db, RecoveredFilter(labels=wanted), after=None, limit=9
        )
        assert ids(page.rows) == expected
        assert ids(listed(store, labels=wanted)) == expected


def test_recovered_runs_by_label_page_without_gap_or_repeat(store: ServiceStore) -> None:
    made = [store.waiting(labels={"team": "red"}) for _ in range(5)]
    store.recover()
    wanted = RecoveredFilter(labels={"team": "red"})

    seen = all_pages(partial(decisions.recovered_page, store.db, wanted, limit=2))

    assert list(chain.from_iterable(seen)) == [run.run_id for run in reversed(made)]


@pytest.mark.parametrize("listing", ["runs", "recovered"])
def test_the_basic_view_omits_large_fields(store: ServiceStore, listing: str) -> None:
    turn = store.running(input={"secret": "x" * 100})
    store.keep_session(turn)
    question = Question(kind=QUESTION.kind, prompt="P" * 100, options=(Option(label="L", value=1),))
    store.end(turn, Asked(question))
    store.recover()

    def page(view: View) -> Page[Run]:
        if listing == "runs":
            return run_pages.page(store.db, RunFilter(), after=None, limit=9, view=view)
        return decisions.recovered_page(store.db, RecoveredFilter(), after=None, limit=9, view=view)

    (basic,), (full,) = page(View.BASIC).rows, page(View.FULL).rows
    assert (basic.input, basic.output) == (None, None)
    assert basic.pending is not None
    assert (basic.pending.prompt, basic.pending.options) == ("", ())
    assert basic.pending.interaction_id == 1
    assert full.input == {"secret": "x" * 100}
    assert full.pending is not None
    assert full.pending.prompt == "P" * 100
    assert (basic.etag, basic.status, basic.recovery) == (full.etag, full.status, full.recovery)


def test_a_page_of_the_largest_runs_fits_into_one_message(store: ServiceStore) -> None:
    numbers = [1] * 50_000  # 2 characters each in JSON, 11 bytes on the wire
    for _ in range(12):
        store.create(input={"n": numbers}, labels={"l": "ß" * 256})

    page = run_pages.page(store.db, RunFilter(), after=None, limit=1000)
    response = run_service_pb2.ListRunsResponse(next_page_token="t" * 60)
    for run in page.rows:
        run_messages.fill_run(response.runs.add(), run)

    assert 1 < len(page.rows) < 12
    assert page.after is not None
    assert response.ByteSize() < CLIENTS_TAKE


def test_a_thousand_runs_in_the_basic_view_are_one_page(store: ServiceStore) -> None:
    for _ in range(1000):
        store.create(input={"text": "x" * 2000}, labels={"team": "red", "tier": "1"})

    page = run_pages.page(store.db, RunFilter(), after=None, limit=1000, view=View.BASIC)
    response = run_service_pb2.ListRunsResponse()
    for run in page.rows:
        run_messages.fill_run(response.runs.add(), run)

    assert (len(page.rows), page.after) == (1000, None)
    assert response.ByteSize() < CLIENTS_TAKE / 4


def test_runs_are_found_by_label_through_an_index(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = RunFilter(labels={"team": "red", "n": "1"})

    with query_plans(store, monkeypatch) as plans:
        run_pages.page(store.db, wanted, after=(9,), limit=5)

    (plan,) = plans
    assert "USING PRIMARY KEY (key=? AND value=? AND run<?)" in plan[0]
    assert not any("TEMP B-TREE" in step or step.startswith("SCAN") for step in plan), plan


@pytest.mark.parametrize("merged", [100, 1])
def test_lists_of_engines_follow_every_other_filter(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch, merged: int
) -> None:
    monkeypatch.setattr(run_pages, "ENGINES_MERGED", merged)
    made = [store.create(engine="abc"[number % 3]) for number in range(9)]
    for run in made[3:6]:
        store.cancel(run)
    names = {run.run_id: name for run, name in zip(made, "123456789", strict=True)}

    def pages(limit: int = 2, **wanted: Any) -> list[str]:
        found = all_pages(partial(run_pages.page, store.db, RunFilter(**wanted), limit=limit))
        return ["".join(names[run_id] for run_id in page) for page in found]

    both = frozenset({"a", "b"})
    assert pages(engines=both) == ["87", "54", "21"]
    assert pages(engines=both, engine="b") == ["85", "2"]
    assert pages(engines=both, engine="c") == [""]
    assert pages(engines=frozenset()) == [""]
    assert pages(engine="c") == ["96", "3"]
    assert pages(engines=both, statuses=frozenset({RunStatus.CANCELED})) == ["54"]
    assert pages(engines=both, statuses=frozenset({RunStatus.QUEUED})) == ["87", "21"]
    assert pages(engine="a", statuses=frozenset({RunStatus.QUEUED})) == ["71"]
    assert pages(engine="b", statuses=frozenset({RunStatus.CANCELED})) == ["5"]
    assert pages(engines=both, after=made[4].created_at) == ["87", "5"]
    assert pages(engines=both, before=made[4].created_at, limit=9) == ["421"]
    assert pages(engines=both, labels={"none": "x"}) == [""]


def test_runs_of_some_engines_are_found_through_an_index_that_nothing_else_reads(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, waiting = frozenset({"a", "b"}), frozenset({RunStatus.WAITING_USER})

    with query_plans(store, monkeypatch) as plans:
        run_pages.page(store.db, RunFilter(engines=engines), after=(9,), limit=5)
        for listed in (frozenset({"a"}), engines):
            wanted = RunFilter(engines=listed, statuses=waiting)
            run_pages.page(store.db, wanted, after=(9,), limit=5)
        decisions.recovered_page(store.db, RecoveredFilter(engines=engines), after=None, limit=5)

    of_list, of_one_waiting, of_several_waiting, of_recovered = plans
    by_index = "run_engine (engine=? AND id<?)"
    for plan, engines_read in ((of_list, 2), (of_one_waiting, 1)):
        assert len([step for step in plan if by_index in step]) == engines_read, plan
        assert not any(step.startswith("SCAN") and " run" in step for step in plan), plan
    assert not any("run_engine" in step for step in of_several_waiting), of_several_waiting
    assert not any("run_engine" in step for step in of_recovered), of_recovered
