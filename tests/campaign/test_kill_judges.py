"""The judges of the campaign of kills find what they are for, in the store of a killed service."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from campaign.judges import Rows
from campaign.kill_home import KillHome
from campaign.kill_judges import (
    Report,
    StoredRun,
    newest_report,
    stored_runs,
    violations_in_the_end,
    violations_now,
    wrong_decisions,
)
from campaign.kill_load import KillClient, Watcher
from campaign.load import QUESTION, Journal
from campaign.witness import STARTS
from runrecovery.v1 import run_pb2
from support.stores import lose_session

ASKS: Final = {"questions": [QUESTION]}
FAIL: Final = run_pb2.RESTART_POLICY_FAIL


@dataclass(frozen=True, kw_only=True)
class Played:
    """A store after a kill, and what the judges compare it with.

    Attributes:
        before: the runs at the kill before the latest recovery.
        lost: the run that had lost its session then.
    """

    home: KillHome
    journal: Journal
    before: dict[int, StoredRun]
    lost: str

    @contextmanager
    def changed(self, tmp_path: Path, sql: str = "") -> Iterator[Rows]:
        """Yield a reader of a copy of the store, after a statement."""
        with (
            closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None)) as copy,
            self.home.store() as store,
        ):
            store.backup(copy)
            copy.executescript(sql)
            yield lambda query: copy.execute(query).fetchall()


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Play the life of four runs: one succeeds, one is canceled, one is lost, one is reopened."""
    with KillHome(tmp_path_factory.mktemp("judged") / "home") as home:
        journal = Journal()
        service, api = home.start()
        client = KillClient(0, 0, journal, api, 0.0)

        def create(given: dict[str, Any]) -> str:
            known = set(journal.runs)
            assert client.create_run("resumable", given)
            (run_id,) = journal.runs.keys() - known
            return run_id

        asked, canceled, lost = (create(ASKS) for _ in range(3))
        for run_id in (asked, canceled, lost):
            api.until_status(run_id, "WAITING_USER")
        client.reply_to(asked, 1)
        api.until_ended(asked)
        Watcher(0, 0, journal, api).watch(asked)
        api.cancel(canceled)
        journal.add_cancel(canceled)
        service.kill()
        with home.reader() as rows:
            before = stored_runs(rows)
        kept = lose_session(home, lost)
        service, api = home.start()
        for name, text in kept.items():
            Path(name).write_bytes(text)
        client = KillClient(0, 0, journal, api, 0.0)
        client.get(lost)
        service.kill()
        yield Played(home=home, journal=journal, before=before, lost=lost)


def latest(rows: Rows) -> Report:
    """Return the latest report."""
    report = newest_report(rows)
    assert report is not None
    return report


def test_a_store_that_lost_nothing_has_no_violation(played: Played, tmp_path: Path) -> None:
    with played.changed(tmp_path) as rows:
        assert [*violations_now(played.journal, rows, played.home.notes)] == []
        assert [*wrong_decisions(played.before, latest(rows), played.lost, rows)] == []
    assert len(played.journal.runs) == 3
    assert played.journal.watched
    assert played.journal.reopens == {played.lost}


COPY_LAUNCH: Final = (
    "INSERT INTO process_lease (run, attempt, turn, instance, epoch, host_id, boot_id,"
    " pid_namespace, cookie, state, processes_ended, created_at, closed_at)"
    " SELECT run, attempt, {turn}, instance, {epoch}, host_id, boot_id, pid_namespace, cookie,"
    " {state}, processes_ended, created_at, {closed_at} FROM process_lease"
)
COPY_DECISION: Final = (
    "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
    " status_after, recovery_state, recovered_at, processes_ended, sequence)"
    " SELECT run, 9, reconciliation, rule, facts, status_before, status_after, recovery_state,"
    " recovered_at, processes_ended, 9 FROM recovery_event WHERE rule = 'session_handle_lost'"
)
OVERLAPPING_TURN: Final = COPY_LAUNCH.format(
    turn="turn + 9", epoch="epoch", state="'CLOSED'", closed_at="NULL"
)
RUNNING_TURNS: Final = ";".join(
    COPY_LAUNCH.format(
        turn=f"turn + {more}",
        epoch="(SELECT epoch FROM instance)",
        state="'RUNNING'",
        closed_at="created_at",
    )
    for more in (10, 20)
)


@pytest.mark.parametrize(
    ("sql", "kinds"),
    [
        ("DELETE FROM run WHERE id = 1", {"lost write", "launches", "events"}),
        ("UPDATE run SET engine = 'sticky'", {"lost write"}),
        ("UPDATE run SET status = 'FAILED', cancel_requested_at = NULL", {"lost write"}),
        ("UPDATE interaction SET response = NULL", {"lost write"}),
        ("UPDATE interaction SET response = '\"other\"'", {"lost write", "not asked"}),
        ("DELETE FROM recovery_event WHERE rule = 'reopened_by_caller'", {"lost write", "events"}),
        (
            """UPDATE run SET labels = '{"nonce": "other"}'""",
            {"lost write", "not asked", "created twice"},
        ),
        ("UPDATE run_event SET no = no + 10 WHERE no = 2", {"events"}),
        ("UPDATE run_event SET kind = 'QUEUED' WHERE run = 1 AND no = 2", {"events"}),
        (COPY_DECISION, {"decisions", "events"}),
        (OVERLAPPING_TURN, {"launches"}),
        (RUNNING_TURNS, {"slots", "launches"}),
    ],
)
def test_each_kind_of_damage_is_found(
    played: Played, tmp_path: Path, sql: str, kinds: set[str]
) -> None:
    with played.changed(tmp_path, sql) as rows:
        found = [*violations_now(played.journal, rows, played.home.notes)]

    assert {violation.kind for violation in found} == kinds


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("DELETE FROM recovery_event WHERE run = 3", "has none for StoredRun"),
        ("UPDATE run SET owner_epoch = 0 WHERE id = 3", "has none for StoredRun"),
        (
            "UPDATE recovery_event SET rule = 'requeued' WHERE rule = 'session_handle_lost'",
            "has lost its session",
        ),
        (COPY_DECISION.replace("SELECT run", "SELECT 1"), "about run 1, which had ended"),
        ("UPDATE reconciliation SET runs_unchanged = 5", "live runs"),
    ],
)
def test_a_recovery_that_did_not_decide_once_about_each_live_run_is_found(
    played: Played, tmp_path: Path, sql: str, text: str
) -> None:
    with played.changed(tmp_path, sql) as rows:
        found = [*wrong_decisions(played.before, latest(rows), played.lost, rows)]

    assert {violation.kind for violation in found} == {"decisions"}
    assert any(text in violation.text for violation in found)


@pytest.mark.parametrize(
    "add",
    ["99 {run} 1 resume\n", "{launch} {run} 1 resume\n", "{other} {run} 1 start\n"],
    ids=["a launch without a record", "a launch with two agents", "an attempt that began twice"],
)
def test_a_start_that_no_launch_record_allows_is_found(
    played: Played, tmp_path: Path, add: str
) -> None:
    notes = (played.home.notes / STARTS).read_text()
    launch, run_id, *_ = next(line.split() for line in notes.splitlines() if " start" in line)
    with played.changed(tmp_path) as rows:
        others = [str(key) for (key,) in rows("SELECT max(id) FROM process_lease WHERE run = 1")]
        more = add.format(run=run_id, launch=launch, other=others[0])
        (tmp_path / STARTS).write_text(notes + more)

        found = [*violations_now(played.journal, rows, tmp_path)]

    assert {violation.kind for violation in found} == {"launches"}


@pytest.mark.parametrize("ended", [True, False])
def test_a_watch_that_repeats_an_event_is_found(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, ended: bool
) -> None:
    (run_id,) = played.journal.watched
    seen = played.journal.seen[run_id]
    monkeypatch.setitem(played.journal.seen, run_id, [*seen[:2], *seen[1:]])
    monkeypatch.setattr(played.journal, "watched", {run_id} if ended else set())

    with played.changed(tmp_path) as rows:
        found = [*violations_now(played.journal, rows, played.home.notes)]

    assert [violation.kind for violation in found] == ["events"]


def test_a_watch_that_ends_before_the_last_event_is_found(
    played: Played, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_id,) = played.journal.watched
    monkeypatch.setitem(played.journal.seen, run_id, played.journal.seen[run_id][:-1])

    with played.changed(tmp_path) as rows:
        found = [*violations_now(played.journal, rows, played.home.notes)]

    assert [violation.kind for violation in found] == ["events"]


def test_runs_that_have_not_ended_and_cancels_without_effect_are_found_in_the_end(
    played: Played, tmp_path: Path
) -> None:
    with played.changed(tmp_path, "UPDATE run SET status = 'FAILED', ended_at = 1") as rows:
        ended = [*violations_in_the_end(played.journal, rows, played.home.notes)]
    with played.changed(tmp_path) as rows:
        waiting = [*violations_in_the_end(played.journal, rows, played.home.notes)]

    assert [violation.kind for violation in waiting] == ["not ended"]
    assert [violation.kind for violation in ended] == ["lost write"]
    assert "which is FAILED" in ended[0].text
