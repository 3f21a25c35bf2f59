"""The presets with the real CLIs: conversations, sessions and trust over kills of the service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_agents.clis import Cli
from cli_agents.desk import Desk, named
from cli_agents.endpoints import OPTIONS, QUESTION, REFUSAL, REFUSE, ModelEndpoint
from google.protobuf.json_format import MessageToDict
from support.api import status_word
from support.waiting import until

NewDesk = Callable[..., Desk]

pytestmark = pytest.mark.usefixtures("round_number")


@pytest.fixture
def round_number() -> int:
    """Which round of the scenario it is; see conftest.py."""
    return 1


def lose(session: Path, cut: str) -> None:
    """Remove a session, or cut it off."""
    whole = session.read_bytes()
    lines = whole.splitlines(keepends=True)
    left = {"in half": whole[: len(whole) // 2], "at a line": b"".join(lines[: len(lines) // 2])}
    if cut == "removed":
        session.unlink()
    else:
        session.write_bytes(left[cut])


def test_a_question_outlives_a_kill_of_the_service(
    cli: Cli, new_desk: NewDesk, endpoint: ModelEndpoint
) -> None:
    desk = new_desk()
    service, api = desk.home.start()
    waiting = desk.waiting(api)
    first_turn = desk.session.read_bytes()
    service.kill()
    service, api = desk.home.start()

    kept = api.get(desk.run_id)
    api.reply(desk.run_id, 1, "/Ostend")
    ended = desk.until(api, "SUCCEEDED", "FAILED")

    assert waiting.pending_interaction.prompt == QUESTION
    assert [option.label for option in waiting.pending_interaction.options] == OPTIONS
    assert kept.recovery.recovery_reason == "resumable_waiting_preserved"
    assert status_word(ended) == "SUCCEEDED", ended
    assert MessageToDict(ended.output) == {"answers": ["/Ostend"]}
    assert endpoint.saw(desk.task, QUESTION, "/Ostend")
    assert desk.session.read_bytes().startswith(first_turn)
    assert desk.handles_shown(api) == {"[secret]"}
    assert service.stop() == 0
    assert desk.processes() == []


@pytest.mark.parametrize("cut", ["removed", "in half", "at a line"])
def test_a_restart_fails_a_run_whose_session_is_lost(cli: Cli, new_desk: NewDesk, cut: str) -> None:
    desk = new_desk()
    service, api = desk.home.start()
    desk.waiting(api)
    service.kill()
    lose(desk.session, cut)
    _, api = desk.home.start()

    failed = api.get(desk.run_id)

    assert (status_word(failed), failed.error.code) == ("FAILED", "SESSION_RESUME_FAILED")
    assert failed.recovery.recovery_reason == "session_handle_lost"
    assert desk.settings.changed() == []
    assert not desk.trusts()


@pytest.mark.parametrize("cut", ["removed", "at a line"])
def test_a_session_that_is_lost_while_the_service_runs_fails_the_next_turn(
    cli: Cli, new_desk: NewDesk, endpoint: ModelEndpoint, cut: str
) -> None:
    desk = new_desk()
    _, api = desk.home.start()
    desk.waiting(api)
    lose(desk.session, cut)

    api.reply(desk.run_id, 1, "Hull")
    failed = desk.until(api, "SUCCEEDED", "FAILED")

    assert (status_word(failed), failed.error.code) == ("FAILED", "SESSION_RESUME_FAILED"), failed
    assert not endpoint.saw("Hull")
    assert desk.settings.changed() == []
    until(lambda: not desk.trusts(), "the entry is gone")


def test_a_folder_that_is_not_trusted_is_refused_where_the_cli_cares(
    cli: Cli, new_desk: NewDesk, endpoint: ModelEndpoint
) -> None:
    desk = new_desk(trust="none")
    _, api = desk.home.start()
    desk.begin(api)

    run = desk.until(api, "WAITING_USER", "FAILED")

    assert desk.settings.changed() == []
    assert not desk.trusts()
    if cli.needs_trust is None:
        assert status_word(run) == "WAITING_USER", run
    else:
        assert (status_word(run), run.error.code) == ("FAILED", "ENGINE_FAILED")
        assert cli.needs_trust in run.error.message
        assert endpoint.asked == []


@pytest.mark.parametrize("killed", ["service", "service and shims"])
def test_a_kill_in_the_middle_of_a_turn_leaves_no_process_and_no_trust(
    cli: Cli, new_desk: NewDesk, killed: str
) -> None:
    desk = new_desk()
    service, api = desk.home.start()
    desk.hanging(api)
    at_work = desk.processes()
    trusted = desk.trusts()
    if killed == "service":
        service.kill()
    else:
        desk.home.kill_with_shims(service)
        assert desk.processes()
    _, api = desk.home.start()

    left = desk.processes()
    failed = api.get(desk.run_id)

    assert at_work
    assert trusted
    assert left == []
    assert failed.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert not desk.trusts()
    assert desk.settings.changed() == []


@pytest.mark.parametrize("killed", ["service", "service and shims"])
def test_what_an_agent_has_started_and_hidden_ends_with_the_service(
    cli: Cli, new_desk: NewDesk, killed: str
) -> None:
    desk = new_desk(unattended=True)
    service, api = desk.home.start()
    word = desk.spawn(api)
    if killed == "service":
        service.kill()
    else:
        desk.home.kill_with_shims(service)
        assert named(word)  # at least one: a CLI that goes may take the other along
    _, api = desk.home.start()

    left = named(word), desk.processes()
    failed = api.get(desk.run_id)

    assert left == ([], [])
    assert failed.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert not desk.trusts()


def test_several_runs_of_one_home_leave_no_trust_behind(
    cli: Cli, new_desk: NewDesk, endpoint: ModelEndpoint
) -> None:
    desk = new_desk(max_concurrent=4)
    desks = [desk, *(desk.another() for _ in range(3))]
    service, api = desk.home.start()
    for each in desks:
        each.begin(api)
    for each in desks:
        each.until(api, "WAITING_USER")
    service.kill()
    _, api = desk.home.start()
    for each in desks:
        api.reply(each.run_id, 1, f"answer to {each.run_id}")
    ended = [each.until(api, "SUCCEEDED", "FAILED") for each in desks]

    assert [status_word(run) for run in ended] == ["SUCCEEDED"] * 4, ended
    assert [MessageToDict(run.output) for run in ended] == [
        {"answers": [f"answer to {each.run_id}"]} for each in desks
    ]
    assert all(endpoint.saw(each.task, f"answer to {each.run_id}") for each in desks)
    until(lambda: not desk.trusts(), "the entries are gone")
    assert desk.settings.changed() == []


def test_what_the_cli_says_of_its_failure_is_the_error_of_the_run(
    cli: Cli, new_desk: NewDesk
) -> None:
    desk = new_desk()
    _, api = desk.home.start()
    desk.begin(api, REFUSE)

    failed = desk.until(api, "FAILED")

    assert failed.error.code == "ENGINE_FAILED"
    assert REFUSAL in failed.error.message
    assert desk.settings.changed() == []


def test_trust_lives_as_long_as_the_run_and_the_users_settings_stay(
    cli: Cli, new_desk: NewDesk
) -> None:
    desk = new_desk()
    service, api = desk.home.start()
    before = desk.trusts()
    desk.hanging(api)
    meanwhile = desk.trusts()
    api.cancel(desk.run_id)
    desk.until(api, "CANCELED")
    until(lambda: not desk.trusts(), "the entry is gone")

    assert (before, meanwhile) == (False, True)
    assert desk.settings.changed() == []
    assert service.stop() == 0
    assert desk.settings.changed() == []
