"""The tables of engines: their keys, defaults, presets and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import (
    DEFAULT_ENV_ALLOW,
    EngineSettings,
    PermissionPolicy,
    Settings,
)
from runrecovery_service.domain.run import Profile
from runrecovery_service.engines.presets import PRESETS, Preset, dialect_of
from runrecovery_service.trust.config_files import AgentCli

Load: TypeAlias = Callable[..., Settings]
Problems: TypeAlias = Callable[..., tuple[str, ...]]

PRESET = '[engines.x]\npreset = "claude"\n'
ENGINE = '[engines.reviewer]\ncommand = ["agent", "--jsonl"]\nprofile = "resumable"\n'


def test_an_engine_is_read_with_all_its_keys(load: Load) -> None:
    more = (
        'env_allow = ["API_KEY"]\nmax_concurrent = 4\nsession_file = "{workspace}/{value}.json"\n'
        'session_timeout_s = 90\nnice = 5\nmax_memory = "512M"\nmax_open_files = 64\n'
        'max_processes = 200\ntrust = "codex"'
    )

    loaded = load(ENGINE + more)

    assert {
        "reviewer": EngineSettings(
            command=("agent", "--jsonl"),
            profile=Profile.RESUMABLE,
            env_allow=("API_KEY",),
            max_concurrent=4,
            session_file="{workspace}/{value}.json",
            session_timeout_s=90.0,
            nice=5,
            max_memory=512 * 1024**2,
            max_open_files=64,
            max_processes=200,
            trust="codex",
        )
    } == loaded.engines


def test_an_unknown_preset_is_the_only_problem_that_is_reported(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load('[engines.x]\npreset = "cursor"\n')

    (problem,) = caught.value.problems
    assert 'must be "codex", "gemini" or "claude"' in problem


@pytest.mark.parametrize("preset", Preset)
def test_a_preset_and_its_dialect_agree_on_reported_costs(preset: Preset) -> None:
    assert PRESETS[preset].reports_cost == dialect_of(preset).reports_cost


@pytest.mark.parametrize("preset", Preset)
def test_a_preset_sets_what_an_engine_does_not_set(load: Load, preset: Preset) -> None:
    facts = PRESETS[preset]

    engine = load(f'[engines.x]\npreset = "{preset}"\n').engines["x"]

    assert engine == EngineSettings(
        preset=preset,
        command=(facts.program,),
        profile=Profile.RESUMABLE,
        env_allow=(*DEFAULT_ENV_ALLOW, *facts.variables),
        trust=preset.value,
        resumes_interrupted=True,
    )
    assert facts.home_variable in engine.env_allow


def test_the_presets_are_the_clis_whose_trust_files_can_be_edited() -> None:
    assert [preset.value for preset in Preset] == [cli.value for cli in AgentCli]


def test_the_keys_of_an_engine_override_its_preset(load: Load) -> None:
    more = 'command = ["claude", "--model", "m"]\nenv_allow = ["PATH"]\ntrust = "none"\n'

    engine = load(PRESET + more + 'agent_home = "/srv/claude"').engines["x"]

    assert engine.command == ("claude", "--model", "m")
    assert engine.env_allow == ("PATH",)
    assert engine.trust is None
    assert engine.agent_home == "/srv/claude"


def test_the_optional_keys_of_an_engine_have_defaults(load: Load) -> None:
    engine = load(ENGINE).engines["reviewer"]

    assert engine.env_allow == ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
    assert (engine.max_concurrent, engine.session_file) == (None, None)
    assert (engine.session_timeout_s, engine.nice) == (1200.0, 0)
    assert (engine.max_memory, engine.max_open_files, engine.max_processes) == (None, None, None)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1048576", 2**20),
        ('"1048576"', 2**20),
        ('"1048576B"', 2**20),
        ('"1024K"', 2**20),
        ('"512M"', 512 * 2**20),
        ('"512 MiB"', 512 * 2**20),
        ('"2g"', 2 * 2**30),
        ('"2GB"', 2 * 2**30),
        ('"1T"', 2**40),
    ],
)
def test_a_size_may_be_in_bytes_or_have_a_unit(load: Load, text: str, size: int) -> None:
    assert load(f"{ENGINE}max_memory = {text}").engines["reviewer"].max_memory == size


def test_a_budget_of_a_run_is_in_tokens_and_dollars(load: Load) -> None:
    engine = load(f"{PRESET}max_tokens = 1000\nmax_cost_usd = 2").engines["x"]

    assert (engine.max_tokens, engine.max_cost_usd) == (1000, 2.0)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        ("max_tokens = 0", "max_tokens: must be from 1 to 1000000000000000, not 0"),
        ("max_cost_usd = 0", "max_cost_usd: must be above 0 and at most 1000000000, not 0"),
        ("max_cost_usd = nan", "max_cost_usd: must be above 0 and at most 1000000000, not nan"),
        ('max_cost_usd = "1"', 'max_cost_usd: must be a number of US dollars, not "1"'),
        ("max_cost_usd = true", "max_cost_usd: must be a number of US dollars, not true"),
    ],
)
def test_a_budget_out_of_range_is_refused(problems: Problems, table: str, problem: str) -> None:
    (found,) = problems(PRESET + table)

    assert found.endswith(f"engines.x.{problem}")


@pytest.mark.parametrize("preset", ["codex", "gemini"])
def test_a_cost_that_a_cli_never_reports_is_no_budget(problems: Problems, preset: str) -> None:
    (found,) = problems(f'[engines.x]\npreset = "{preset}"\nmax_cost_usd = 2')

    assert found.endswith(
        "engines.x.max_cost_usd: would never be reached: this CLI reports no cost; set max_tokens"
    )


@pytest.mark.parametrize("text", ['"1.5G"', '"-1"', '"512X"', '"M"', '""', '"0x10"', '"1 2M"'])
def test_a_size_that_cannot_be_parsed_is_refused_with_an_example(
    problems: Problems, text: str
) -> None:
    (problem,) = problems(f"{ENGINE}max_memory = {text}")

    assert "engines.reviewer.max_memory: must be bytes" in problem
    assert '"512M"' in problem


@pytest.mark.parametrize("text", ["0", '"1K"', "true", "1.5", '"1048575"', '"2000T"', "[]"])
def test_a_size_out_of_range_or_of_another_type_is_refused(problems: Problems, text: str) -> None:
    (problem,) = problems(f"{ENGINE}max_memory = {text}")

    assert "engines.reviewer.max_memory: must be" in problem


def test_a_nul_character_in_a_command_is_reported_as_one(problems: Problems) -> None:
    (problem,) = problems('[engines.x]\ncommand = ["a", "\\u0000"]\nprofile = "resumable"')

    assert problem.endswith("engines.x.command[1]: must not contain a NUL character")


def test_permissions_are_asked_for_with_claude(load: Load) -> None:
    engine = load(PRESET + 'permissions = "ask"\nask_for = ["Bash", "mcp__*", "Write(/etc/*)"]\n')

    assert engine.engines["x"].permissions is PermissionPolicy.ASK
    assert engine.engines["x"].ask_for == ("Bash", "mcp__*", "Write(/etc/*)")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (PRESET + 'permissions = "ask"\n', "x.ask_for: must name tools"),
        (PRESET + 'permissions = "ask"\nask_for = []\n', "x.ask_for: must name tools"),
        (PRESET + 'ask_for = ["Bash"]\n', 'x.ask_for: is for engines with permissions = "ask"'),
        (PRESET + 'permissions = "always"\n', 'x.permissions: must be "cli" or "ask"'),
        (
            PRESET + 'permissions = "ask"\nask_for = ["Bash", "Bash(ls"]\n',
            'x.ask_for[1]: must end with ")" after an argument, not "Bash(ls"',
        ),
        (
            PRESET + 'permissions = "ask"\nask_for = "Bash"\n',
            "x.ask_for: must be a list of strings",
        ),
        (
            ENGINE + 'permissions = "ask"\nask_for = ["Bash"]\n',
            'reviewer.permissions: "ask" needs preset = "claude"',
        ),
        (
            '[engines.x]\npreset = "codex"\npermissions = "ask"\nask_for = ["Bash"]\n',
            'x.permissions: "ask" does not work with Codex: its hooks can refuse a call',
        ),
        (
            '[engines.x]\npreset = "gemini"\npermissions = "ask"\nask_for = ["Bash"]\n',
            'x.permissions: "ask" does not work with Gemini CLI: its hooks can refuse a call',
        ),
        (
            PRESET + 'command = ["claude", "--settings=a"]\npermissions = "ask"\nask_for = ["*"]\n',
            "x.command[1]: must not have --settings",
        ),
        (
            PRESET + 'command = ["claude", "--bare"]\npermissions = "ask"\nask_for = ["Bash"]\n',
            "x.command[1]: must not have --bare",
        ),
    ],
)
def test_permissions_that_cannot_be_asked_for_are_refused(
    problems: Problems, text: str, problem: str
) -> None:
    (found,) = problems(text)

    assert problem in found
