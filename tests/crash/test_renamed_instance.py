"""A start under another instance name adopts the runs of the old name on the same SQLite store."""

from __future__ import annotations

from collections.abc import Callable

from support.api import state_word, status_word
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]
QUESTION = {"kind": "open_text", "prompt": "Go on?"}


def test_a_start_under_another_name_recovers_the_runs_of_the_old_name(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", {"questions": [QUESTION]}, run_id="waits")
    api.create("resumable", {"hold": True}, run_id="works")
    api.until_status("waits", "WAITING_USER")
    api.until_status("works", "RUNNING")
    until(lambda: home.agents_of("works"), "the agent runs")
    home.kill_with_shims(service)
    assert home.agents_of("works")  # an orphan, which only its launch record leads to

    service, api = home.start("--instance", "renamed")

    works, waits = api.get("works"), api.get("waits")
    assert (status_word(works), works.error.code) == (
        "FAILED",
        "ORCHESTRATOR_RESTART_INTERRUPTED",
    )
    assert state_word(waits.recovery) == "RECOVERED_WAITING"
    assert home.agents_of("works") == []
    (warning,) = api.status().reconciliation.warnings
    assert warning == (
        "instance 'default' had this database before: its unfinished runs (at least 2) and launches"
        " (at least 1) are adopted"
    )
    (told,) = service.events("recovery.adopted")
    assert (told["previous_instance"], told["runs"], told["launches"]) == ("default", 2, 1)

    api.reply("waits", 1, "yes")
    assert status_word(api.until_ended("waits")) == "SUCCEEDED"


SEEDED = 60_000
RENAMED = "SELECT count(*) FROM run WHERE owner = 'renamed'"


def test_an_adoption_that_was_killed_is_completed_by_the_next_start(new_home: NewHome) -> None:
    home = new_home()
    home.seed(SEEDED)
    service = home.spawn("--instance", "renamed")
    until(lambda: home.rows(RENAMED) != [(0,)], "the first runs are adopted")
    service.kill()
    ((renamed,),) = home.rows(RENAMED)
    assert 0 < renamed < SEEDED
    left = SEEDED - renamed

    service, api = home.start("--instance", "renamed")

    (told,) = service.events("recovery.adopted")
    assert (told["previous_instance"], told["runs"]) == ("default", left)
    (warning,) = api.status().reconciliation.warnings
    assert f"its unfinished runs (at least {left})" in warning
    assert home.rows("SELECT owner, count(*) FROM run GROUP BY 1") == [("renamed", SEEDED)]
    assert home.rows("SELECT count(*) FROM run WHERE recovery_count <> 1") == [(0,)]
    assert home.rows("SELECT name FROM instance") == [("renamed",)]
    assert service.stop() == 0
