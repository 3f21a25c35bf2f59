"""The presets with the real CLIs: conversations, sessions and trust, over kills of the service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_agents.cli_setup import RealCliSetup, pids_of_sleep
from cli_agents.clis import Cli
from cli_agents.model_endpoint import (
    OPTIONS,
    QUESTION,
    REFUSAL,
    REFUSE,
    SHELL,
    ModelEndpoint,
)
from google.protobuf.json_format import MessageToDict
from support.api import status_word
from support.waiting import until

NewSetup = Callable[..., RealCliSetup]

pytestmark = pytest.mark.usefixtures("round_number")


@pytest.fixture
def round_number() -> int:
    """The number of the round; conftest.py parametrizes it."""
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


def test_a_question_survives_a_kill_of_the_service(
    cli: Cli, new_setup: NewSetup, endpoint: ModelEndpoint
) -> None:
    setup = new_setup()
    service, api = setup.home.start()
    waiting = setup.run_until_question(api)
    first_turn = setup.session.read_bytes()
    service.kill()
    service, api = setup.home.start()

    kept = api.get(setup.run_id)
    api.reply(setup.run_id, 1, "/Ostend")
    ended = setup.until(api, "SUCCEEDED", "FAILED")

    assert waiting.pending_interaction.prompt == QUESTION
    assert [option.label for option in waiting.pending_interaction.options] == OPTIONS
    assert kept.recovery.recovery_reason == "resumable_waiting_preserved"
    assert status_word(ended) == "SUCCEEDED", ended
    assert MessageToDict(ended.output) == {"answers": ["/Ostend"]}
    assert endpoint.got(setup.task, QUESTION, "/Ostend")
    assert setup.session.read_bytes().startswith(first_turn)
    assert setup.session_ids_in_output(api) == {"[secret]"}
    assert service.stop() == 0
    assert setup.processes() == []


@pytest.mark.parametrize("cut", ["removed", "in half", "at a line"])
def test_a_restart_fails_a_run_whose_session_is_lost(
    cli: Cli, new_setup: NewSetup, cut: str
) -> None:
    setup = new_setup()
    service, api = setup.home.start()
    setup.run_until_question(api)
    service.kill()
    lose(setup.session, cut)
    _, api = setup.home.start()

    failed = api.get(setup.run_id)

    assert (status_word(failed), failed.error.code) == ("FAILED", "SESSION_RESUME_FAILED")
    assert failed.recovery.recovery_reason == "session_handle_lost"
    assert setup.settings.changed() == []
    assert not setup.trusts()


@pytest.mark.parametrize("cut", ["removed", "at a line"])
def test_a_session_that_is_lost_while_the_service_runs_fails_the_run_at_its_next_turn(
    cli: Cli, new_setup: NewSetup, endpoint: ModelEndpoint, cut: str
) -> None:
    setup = new_setup()
    _, api = setup.home.start()
    setup.run_until_question(api)
    lose(setup.session, cut)

    api.reply(setup.run_id, 1, "Hull")
    failed = setup.until(api, "SUCCEEDED", "FAILED")

    assert (status_word(failed), failed.error.code) == ("FAILED", "SESSION_RESUME_FAILED"), failed
    assert not endpoint.got("Hull")
    assert setup.settings.changed() == []
    until(lambda: not setup.trusts(), "the trust entry is removed")


def test_a_cli_that_needs_trust_refuses_an_untrusted_folder(
    cli: Cli, new_setup: NewSetup, endpoint: ModelEndpoint
) -> None:
    setup = new_setup(trust="none")
    _, api = setup.home.start()
    setup.create_run(api)

    run = setup.until(api, "WAITING_USER", "FAILED")

    assert setup.settings.changed() == []
    assert not setup.trusts()
    if cli.needs_trust is None:
        assert status_word(run) == "WAITING_USER", run
    else:
        assert (status_word(run), run.error.code) == ("FAILED", "ENGINE_FAILED")
        assert cli.needs_trust in run.error.message
        assert endpoint.requests == []


@pytest.mark.parametrize("killed", ["service", "service and shims"])
def test_a_kill_in_the_middle_of_a_turn_leaves_no_process_and_no_trust(
    cli: Cli, new_setup: NewSetup, killed: str
) -> None:
    setup = new_setup()
    service, api = setup.home.start()
    setup.run_until_model_hangs(api)
    at_work = setup.processes()
    trusted = setup.trusts()
    if killed == "service":
        service.kill()
    else:
        setup.home.kill_with_shims(service)
        assert setup.processes()
    _, api = setup.home.start()

    left = setup.processes()
    failed = api.get(setup.run_id)

    assert at_work
    assert trusted
    assert left == []
    assert failed.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert not setup.trusts()
    assert setup.settings.changed() == []


@pytest.mark.parametrize("killed", ["service", "service and shims"])
def test_commands_that_the_agent_started_and_hid_are_killed_after_a_restart(
    cli: Cli, new_setup: NewSetup, killed: str
) -> None:
    setup = new_setup(unattended=True)
    service, api = setup.home.start()
    duration = setup.run_two_sleeps(api)
    if killed == "service":
        service.kill()
    else:
        setup.home.kill_with_shims(service)
        assert pids_of_sleep(duration)  # at least one: a CLI may end the other with itself
    _, api = setup.home.start()

    left = pids_of_sleep(duration), setup.processes()
    failed = api.get(setup.run_id)

    assert left == ([], [])
    assert failed.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert not setup.trusts()


def test_several_runs_with_one_agent_home_leave_no_trust_entry(
    cli: Cli, new_setup: NewSetup, endpoint: ModelEndpoint
) -> None:
    setup = new_setup(max_concurrent=4)
    setups = [setup, *(setup.for_another_run() for _ in range(3))]
    service, api = setup.home.start()
    for each in setups:
        each.create_run(api)
    for each in setups:
        each.until(api, "WAITING_USER")
    service.kill()
    _, api = setup.home.start()
    for each in setups:
        api.reply(each.run_id, 1, f"answer to {each.run_id}")
    ended = [each.until(api, "SUCCEEDED", "FAILED") for each in setups]

    assert [status_word(run) for run in ended] == ["SUCCEEDED"] * 4, ended
    assert [MessageToDict(run.output) for run in ended] == [
        {"answers": [f"answer to {each.run_id}"]} for each in setups
    ]
    assert all(endpoint.got(each.task, f"answer to {each.run_id}") for each in setups)
    until(lambda: not setup.trusts(), "the trust entries are removed")
    assert setup.settings.changed() == []


def test_the_usage_of_a_run_is_what_the_model_sent(
    cli: Cli, new_setup: NewSetup, endpoint: ModelEndpoint
) -> None:
    setup = new_setup()
    service, api = setup.home.start()
    waiting = setup.run_until_question(api)
    first = len(endpoint.answered)
    service.kill()
    service, api = setup.home.start()
    api.reply(setup.run_id, 1, "Ostend")
    ended = setup.until(api, "SUCCEEDED", "FAILED")

    for run, answers in ((waiting, endpoint.answered[:first]), (ended, endpoint.answered)):
        used, calls = run.usage, sum(each.share for each in answers)
        assert (used.input_tokens, used.cached_input_tokens) == (10 * calls, 4 * calls), run
        assert used.output_tokens == 5 * calls
        assert used.reasoning_output_tokens == (0 if cli.preset == "claude" else 2 * calls)
        assert used.HasField("cost_usd") is (cli.preset == "claude")
    assert first < len(endpoint.answered)


def test_the_calls_of_a_killed_turn_count(
    cli: Cli, new_setup: NewSetup, endpoint: ModelEndpoint
) -> None:
    setup = new_setup(unattended=True, restart_policy="resume")
    service, api = setup.home.start()
    setup.create_run(api, f"{SHELL} [ -e once ] || {{ touch once; sleep 60; }}\n")
    until(lambda: [*setup.home.data.rglob("once")], "the command runs", timeout_s=90.0)
    service.kill()
    _, api = setup.home.start()
    ended = setup.until(api, "SUCCEEDED", "FAILED")

    assert status_word(ended) == "SUCCEEDED", ended
    assert ended.usage.input_tokens == 10 * sum(each.share for each in endpoint.answered)


def test_the_clis_error_message_is_the_error_of_the_run(cli: Cli, new_setup: NewSetup) -> None:
    setup = new_setup()
    _, api = setup.home.start()
    setup.create_run(api, REFUSE)

    failed = setup.until(api, "FAILED")

    assert failed.error.code == "ENGINE_FAILED"
    assert REFUSAL in failed.error.message
    assert setup.settings.changed() == []


def test_trust_lasts_as_long_as_the_run_and_the_users_settings_are_unchanged(
    cli: Cli, new_setup: NewSetup
) -> None:
    setup = new_setup()
    service, api = setup.home.start()
    before = setup.trusts()
    setup.run_until_model_hangs(api)
    meanwhile = setup.trusts()
    api.cancel(setup.run_id)
    setup.until(api, "CANCELED")
    until(lambda: not setup.trusts(), "the trust entry is removed")

    assert (before, meanwhile) == (False, True)
    assert setup.settings.changed() == []
    assert service.stop() == 0
    assert setup.settings.changed() == []
