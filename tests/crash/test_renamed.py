"""Another instance name on the same SQLite store: the next start adopts what the old name left."""

from __future__ import annotations

from collections.abc import Callable

from support.service import Home, state_word, status_word, until

NewHome = Callable[..., Home]
QUESTION = {"kind": "open_text", "prompt": "Go on?"}


def test_a_start_under_another_name_recovers_what_the_old_one_left(new_home: NewHome) -> None:
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
