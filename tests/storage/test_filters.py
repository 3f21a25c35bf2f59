"""Lists by label and time, and how much of each run they read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from runrecovery.v1 import run_service_pb2
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.run import Option, Page, Question, Run, RunFilter, View
from runrecovery_service.domain.turn import Asked
from runrecovery_service.rpc import run_messages
from runrecovery_service.storage import decisions, runs
from runrecovery_service.storage.sql_dialects import DatabaseKind

from .conftest import QUESTION, World

CLIENTS_TAKE = 4 * 1024 * 1024


def listed(world: World, view: View = View.FULL, **wanted: Any) -> list[Run]:
    page = runs.page(world.db, RunFilter(**wanted), after=None, limit=100, view=view)
    return list(page.rows)


def ids(found: list[Run]) -> list[str]:
    return [run.run_id for run in found]


def test_runs_are_found_by_all_their_labels(world: World) -> None:
    both = world.create(labels={"team": "red", "tier": "1"})
    one = world.create(labels={"team": "red"})
    world.create(labels={"team": "redder", "tier": "1"})
    world.create(labels={})

    assert ids(listed(world, labels={"team": "red"})) == [one.run_id, both.run_id]
    assert ids(listed(world, labels={"team": "red", "tier": "1"})) == [both.run_id]
    assert listed(world, labels={"team": "red", "tier": "2"}) == []


def test_a_label_filter_pages_without_gap_or_repeat(world: World) -> None:
    made = [world.create(labels={"n": "x" if number % 3 else "y"}) for number in range(12)]
    wanted, after, seen = RunFilter(labels={"n": "x"}), None, list[str]()
    while True:
        page = runs.page(world.db, wanted, after=after, limit=3)
        seen += ids(list(page.rows))
        after = page.after
        if after is None:
            break

    assert seen == [run.run_id for run in reversed(made) if run.labels["n"] == "x"]


def test_labels_of_any_text_are_found(world: World) -> None:
    odd = {"a.b_c-d": "\"'%_\\ ß \u2028", "empty": ""}
    run = world.create(labels=odd)

    assert ids(listed(world, labels=odd)) == [run.run_id]
    assert listed(world, labels={"empty": " "}) == []


def test_a_damaged_record_spoils_no_label_filter(world: World) -> None:
    run = world.create(labels={"team": "red"})
    world.set(run, labels="{")

    assert ids(listed(world, labels={"team": "red"})) == [run.run_id]


def test_a_refused_create_leaves_no_label(world: World) -> None:
    from runrecovery_service.domain.errors import RunAlreadyExists

    run = world.create(labels={"team": "red"})
    with pytest.raises(RunAlreadyExists):
        world.create(run_id=run.run_id, labels={"team": "green"})

    assert listed(world, labels={"team": "green"}) == []


def test_runs_are_found_by_when_they_were_created(world: World) -> None:
    first, second = world.create(), world.create()
    at = second.created_at

    assert ids(listed(world, after=at)) == [second.run_id]
    assert ids(listed(world, before=at)) == [first.run_id]
    assert listed(world, after=at + timedelta(microseconds=1)) == []


def test_recovered_runs_are_found_by_label(world: World) -> None:
    red, _ = world.waiting(labels={"team": "red"}), world.waiting()
    world.recover()

    page = decisions.recovered_page(
        world.db, RecoveredFilter(labels={"team": "red"}), after=None, limit=9
    )

    assert ids(list(page.rows)) == [red.run_id]


def test_a_label_of_many_runs_finds_the_same_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [world.waiting(labels={"a": "1", "n": str(number % 2)}) for number in range(6)]
    world.recover()
    wanted = {"a": "1", "n": "0"}
    expected = [run.run_id for run in reversed(made) if run.labels == wanted]

    for few in (1, 4, 100):  # both are common, one of them is, none is
        monkeypatch.setattr(runs, "FEW_LABELLED", few)
        page = decisions.recovered_page(
            world.db, RecoveredFilter(labels=wanted), after=None, limit=9
        )
        assert ids(list(page.rows)) == expected
        assert ids(listed(world, labels=wanted)) == expected


def test_recovered_runs_by_label_page_without_gap_or_repeat(world: World) -> None:
    made = [world.waiting(labels={"team": "red"}) for _ in range(5)]
    world.recover()
    wanted, after, seen = RecoveredFilter(labels={"team": "red"}), None, list[str]()
    while True:
        page = decisions.recovered_page(world.db, wanted, after=after, limit=2)
        seen += ids(list(page.rows))
        after = page.after
        if after is None:
            break

    assert seen == [run.run_id for run in reversed(made)]


@pytest.mark.parametrize("listing", ["runs", "recovered"])
def test_the_basic_view_leaves_out_what_may_be_large(world: World, listing: str) -> None:
    turn = world.running(input={"secret": "x" * 100})
    world.keep_session(turn)
    question = Question(kind=QUESTION.kind, prompt="P" * 100, options=(Option(label="L", value=1),))
    world.end(turn, Asked(question))
    world.recover()

    def page(view: View) -> Page[Run]:
        if listing == "runs":
            return runs.page(world.db, RunFilter(), after=None, limit=9, view=view)
        return decisions.recovered_page(world.db, RecoveredFilter(), after=None, limit=9, view=view)

    (basic,), (full,) = page(View.BASIC).rows, page(View.FULL).rows
    assert (basic.input, basic.output) == (None, None)
    assert basic.pending is not None
    assert (basic.pending.prompt, basic.pending.options) == ("", ())
    assert basic.pending.interaction_id == 1
    assert full.input == {"secret": "x" * 100}
    assert full.pending is not None
    assert full.pending.prompt == "P" * 100
    assert (basic.etag, basic.status, basic.recovery) == (full.etag, full.status, full.recovery)


def test_a_page_of_the_worst_runs_fits_what_clients_take(world: World) -> None:
    numbers = [1] * 50_000  # 2 characters each in JSON, 11 bytes on the wire
    for _ in range(12):
        world.create(input={"n": numbers}, labels={"l": "ß" * 256})

    page = runs.page(world.db, RunFilter(), after=None, limit=1000)
    response = run_service_pb2.ListRunsResponse(next_page_token="t" * 60)
    for run in page.rows:
        run_messages.fill_run(response.runs.add(), run)

    assert 1 < len(page.rows) < 12
    assert page.after is not None
    assert response.ByteSize() < CLIENTS_TAKE


def test_a_thousand_runs_in_the_basic_view_are_one_page(world: World) -> None:
    for _ in range(1000):
        world.create(input={"text": "x" * 2000}, labels={"team": "red", "tier": "1"})

    page = runs.page(world.db, RunFilter(), after=None, limit=1000, view=View.BASIC)
    response = run_service_pb2.ListRunsResponse()
    for run in page.rows:
        run_messages.fill_run(response.runs.add(), run)

    assert (len(page.rows), page.after) == (1000, None)
    assert response.ByteSize() < CLIENTS_TAKE / 4


def test_a_label_leads_to_its_runs_by_its_index(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    if world.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL plans by its statistics")
    asked: list[tuple[str, Any]] = []
    execute: Callable[[Any], Any] = world.db.peewee.execute

    def note(query: Any) -> Any:
        asked.append(query.sql())
        return execute(query)

    monkeypatch.setattr(world.db.peewee, "execute", note)
    runs.page(world.db, RunFilter(labels={"team": "red", "n": "1"}), after=(9,), limit=5)
    ((sql, params),) = asked

    plan = [row[3] for row in world.db.fetch_all(f"EXPLAIN QUERY PLAN {sql}", params)]

    assert "USING PRIMARY KEY (key=? AND value=? AND run<?)" in plan[0]
    assert not any("TEMP B-TREE" in step or step.startswith("SCAN") for step in plan), plan
