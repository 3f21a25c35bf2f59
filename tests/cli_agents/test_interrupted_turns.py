"""Turns of real CLIs that a kill or a deploy interrupts: the next process completes them.

The endpoint enforces the vendors' rules for tool calls, and each command leaves a mark.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from cli_agents.cli_setup import PATIENCE_S, RealCliSetup
from cli_agents.clis import Cli
from cli_agents.model_endpoint import ModelEndpoint
from cli_agents.three_steps import STEP_S, TASK, Moment, ThreeSteps
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.waiting import until

NOTICE: Final = "The service that runs you was restarted."
START_S: Final = 2.0
"""An idle machine needs about this time until the slowest of the CLIs calls its model."""
LATER_S: Final = 0.8 * STEP_S
"""The longest pause between a step of the turn and the kill."""

NewSetup = Callable[..., RealCliSetup]


@pytest.fixture
def moment(request: pytest.FixtureRequest) -> Moment:
    """Where the turn stops."""
    return getattr(request, "param", Moment.NOWHERE)


@pytest.fixture
def model(tmp_path: Path, moment: Moment) -> ThreeSteps:
    """The model of the endpoint."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return ThreeSteps(folder, moment)


@pytest.fixture
def endpoint(model: ThreeSteps) -> Iterator[ModelEndpoint]:
    """An endpoint with that model."""
    with ModelEndpoint(model) as endpoint:
        yield endpoint


def resumed_setup(new_setup: NewSetup, **keys: Any) -> RealCliSetup:
    """Return a setup whose interrupted turns are resumed."""
    return new_setup(unattended=True, restart_policy="resume", **keys)


def assert_finished_well(setup: RealCliSetup, api: Api, model: ThreeSteps) -> run_pb2.Run:
    """Wait for the end of the run, and check what it and its commands did."""
    run = setup.until(api, "SUCCEEDED", "FAILED")
    assert status_word(run) == "SUCCEEDED", run
    assert MessageToDict(run.output) == {"steps": [1, 2, 3]}
    assert setup.endpoint.violations == []
    begun = model.begun()
    assert len(begun) == len(set(begun)), "a command ran twice by itself"
    assert {call.partition("-")[0] for call in begun} == {"1", "2", "3"}
    assert not [call for call in model.begun("ended") if call not in begun]
    return run


def shares_sent(setup: RealCliSetup) -> list[int]:
    """Return the share of each answer that the endpoint has sent whole."""
    return [each.share for each in setup.endpoint.answered]


def counted_answers(run: run_pb2.Run) -> set[int]:
    """Return the shares of the answers in the usage of a run, each of which counts once.

    A share is a power of 3, so the digits of their sum show how often each one counts.
    """
    total, rest = divmod(run.usage.input_tokens, 10)
    assert (rest, run.usage.cached_input_tokens) == (0, 4 * total)
    digits = {3**place: total // 3**place % 3 for place in range(total.bit_length())}
    assert set(digits.values()) <= {0, 1}, f"an answer counts twice: {digits}"
    return {share for share, times in digits.items() if times}


def shares_with_effect(setup: RealCliSetup, model: ThreeSteps) -> set[int]:
    """Return the share of each answer whose command has begun."""
    begun = model.begun()
    return {
        each.share
        for each in setup.endpoint.answered
        if any(call in (each.command or "") for call in begun)
    }


@pytest.mark.parametrize(
    "moment",
    [Moment.REQUEST_OPEN, Moment.IN_A_TOOL, Moment.AFTER_A_RESULT],
    indirect=True,
    ids=lambda moment: moment.value,
)
def test_a_turn_that_is_killed_is_completed_in_its_session(
    cli: Cli, new_setup: NewSetup, model: ThreeSteps, moment: Moment, round_number: int
) -> None:
    setup = resumed_setup(new_setup)
    service, api = setup.home.start()
    setup.create_run(api, TASK)
    until(lambda: model.at_the_moment, "the turn is there", timeout_s=PATIENCE_S)
    service.kill()
    _, api = setup.home.start()

    run = assert_finished_well(setup, api, model)

    assert run.recovery.recovery_reason == "interrupted_turn_resumed"
    if moment is Moment.REQUEST_OPEN and run.attempt == 2:
        assert run.resume_count == 0  # Claude Code had not saved the session yet
    else:
        assert (run.attempt, run.resume_count) == (1, 1)
        assert setup.endpoint.got(setup.task, NOTICE)
    assert not setup.trusts()
    assert counted_answers(run) == set(shares_sent(setup))
    if cli.preset in {"codex", "gemini"}:  # Claude Code may not have saved all of an answer
        assert run.usage.output_tokens == 5 * sum(shares_sent(setup))


def test_a_turn_that_is_killed_as_its_session_begins_is_completed(
    cli: Cli, new_setup: NewSetup, model: ThreeSteps, round_number: int
) -> None:
    setup = resumed_setup(new_setup)
    service, api = setup.home.start()
    setup.create_run(api, TASK)
    until(lambda: setup.session_ids_in_output(api), "the id is printed", timeout_s=PATIENCE_S)
    service.kill()
    _, api = setup.home.start()

    run = assert_finished_well(setup, api, model)

    assert run.attempt + run.resume_count in {2, 3}  # resumed, or started again, or both


def wait_for_a_random_moment(chance: random.Random, setup: RealCliSetup, model: ThreeSteps) -> None:
    """Wait until a random moment of the turn, before its first request or after a later step.

    A time alone would not do: a turn takes longer on a busy machine.
    """
    requests, commands = chance.choice([(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)])
    until(
        lambda: len(setup.endpoint.requests) >= requests and len(model.begun()) >= commands,
        f"{commands} commands have begun",
        timeout_s=PATIENCE_S,
    )
    time.sleep(chance.uniform(0, LATER_S if requests else START_S))  # the moment is the test


def test_a_turn_that_is_killed_at_a_random_moment_is_completed(
    cli: Cli, new_setup: NewSetup, model: ThreeSteps, round_number: int
) -> None:
    setup = resumed_setup(new_setup)
    service, api = setup.home.start()
    setup.create_run(api, TASK)
    wait_for_a_random_moment(random.Random(round_number), setup, model)  # noqa: S311 - for a test
    service.kill()
    _, api = setup.home.start()

    run = assert_finished_well(setup, api, model)
    assert run.attempt + run.resume_count > 1, "the kill came after the turn"
    counted = counted_answers(run)
    assert all(share in counted for share in shares_sent(setup)[-1:]), "the result is not counted"
    assert counted <= set(shares_sent(setup)), "an answer counts twice, or was never sent"
    if cli.preset == "claude":  # it prints an answer before it begins the command
        assert counted >= shares_with_effect(setup, model)


def test_a_deploy_in_the_middle_of_eight_turns_fails_none(
    cli: Cli, new_setup: NewSetup, model: ThreeSteps, round_number: int
) -> None:
    setup = resumed_setup(new_setup, max_concurrent=8)
    setups = [setup, *(setup.for_another_run() for _ in range(7))]
    service, api = setup.home.start()
    for each in setups:
        each.create_run(api, TASK)
    until(model.begun, "a command of one of them ran", timeout_s=PATIENCE_S)
    assert service.stop() == 0
    assert [each.processes() for each in setups] == [[]] * 8
    _, api = setup.home.start()

    ended = [each.until(api, "SUCCEEDED", "FAILED") for each in setups]

    assert [status_word(run) for run in ended] == ["SUCCEEDED"] * 8, ended
    assert [MessageToDict(run.output) for run in ended] == [{"steps": [1, 2, 3]}] * 8
    assert setup.endpoint.violations == []
    assert len(model.begun()) == len(set(model.begun()))
