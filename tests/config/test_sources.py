"""The sources of a setting: default, file, environment, flag, and which of them wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runrecovery_service.config.settings import (
    SCALARS,
    ContainmentPolicy,
    LogFormat,
    LogLevel,
    Settings,
)

Load: TypeAlias = Callable[..., Settings]
Problems: TypeAlias = Callable[..., tuple[str, ...]]


def toml_of(value: object) -> str:
    return json.dumps(str(value) if isinstance(value, Path | LogFormat | LogLevel) else value)


def test_an_empty_configuration_means_the_defaults(load: Load) -> None:
    assert Settings() == load()


def test_every_default_may_be_written_in_the_file(load: Load) -> None:
    written = {key: getattr(Settings(), key) for key in SCALARS}
    toml = "\n".join(f"{key} = {toml_of(value)}" for key, value in written.items())

    assert Settings() == load(toml)


def test_every_default_may_be_given_by_the_environment(load: Load) -> None:
    environ = {
        f"RUNRECOVERY_{key.upper()}": toml_of(getattr(Settings(), key)).strip('"[]')
        for key in SCALARS
    }

    assert Settings() == load(environ=environ)


LAYERED = st.fixed_dictionaries(
    {
        key: st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("file", "environment", "flag"), values)
        )
        for key, values in {
            "instance": st.from_regex(r"[a-z0-9][a-z0-9_-]{0,10}", fullmatch=True),
            "max_queued": st.integers(1, 10_000_000),
            "stop_grace_s": st.integers(0, 3_600).map(float),
            "log_level": st.sampled_from([level.value for level in LogLevel]),
        }.items()
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(LAYERED)
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    load: Load, layered: dict[str, dict[str, object]]
) -> None:
    def layer(source: str) -> dict[str, object]:
        return {key: values[source] for key, values in layered.items() if source in values}

    loaded = load(
        "\n".join(f"{key} = {toml_of(value)}" for key, value in layer("file").items()),
        environ={f"RUNRECOVERY_{k.upper()}": str(v) for k, v in layer("environment").items()},
        flags=layer("flag"),
    )

    expected = {
        key: values.get(
            "flag", values.get("environment", values.get("file", getattr(Settings(), key)))
        )
        for key, values in layered.items()
    }
    assert expected == {key: getattr(loaded, key) for key in layered}


@pytest.mark.parametrize("word", list(ContainmentPolicy))
@pytest.mark.parametrize("source", ["file", "environment", "flag"])
def test_containment_may_be_set_by_every_source(
    load: Load, word: ContainmentPolicy, source: str
) -> None:
    loaded = {
        "file": lambda: load(f'containment = "{word}"'),
        "environment": lambda: load(environ={"RUNRECOVERY_CONTAINMENT": word.value}),
        "flag": lambda: load(flags={"containment": word.value}),
    }[source]()

    assert loaded.containment is word


def _place(problem: str, file: str) -> str:
    if problem.startswith(file):
        return f"{file}: {problem.removeprefix(file + ': ').partition(': ')[0]}"
    return problem.partition(": ")[0]


def test_all_problems_are_reported_at_once_each_with_its_source_and_key(
    problems: Problems, tmp_path: Path
) -> None:
    found = problems(
        "listen = '0.0.0.0:1'\nmax_queued = 0\n[engines.a]\ncommand = 'x'\n[engines.b]\nprofil = 1",
        environ={"RUNRECOVERY_LISTN": "x", "RUNRECOVERY_MAX_ATTEMPTS": "many"},
        flags={"data_dir": "", "log_level": None},
    )

    file = f"{tmp_path}/runrecovery.toml"
    assert sorted(
        [
            "environment RUNRECOVERY_LISTN",
            "environment RUNRECOVERY_MAX_ATTEMPTS",
            "flag --data-dir",
            f"{file}: engines.a.command",
            f"{file}: engines.a.profile",
            f"{file}: engines.b.command",
            f"{file}: engines.b.profil",
            f"{file}: engines.b.profile",
            f"{file}: listen",
            f"{file}: max_queued",
        ]
    ) == sorted(_place(text, file) for text in found)


def test_a_bad_value_is_refused_even_if_another_source_overrides_it(problems: Problems) -> None:
    found = problems("max_queued = 0", flags={"max_queued": 5})

    assert len(found) == 1


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("INSECURE_LISTEN", "yes"),
        ("INSECURE_LISTEN", "1"),
        ("INSECURE_LISTEN", "True"),
        ("MAX_QUEUED", "1.5"),
        ("MAX_QUEUED", "1_000"),
        ("MAX_QUEUED", " 5"),
        ("STOP_GRACE_S", "nan"),
        ("STOP_GRACE_S", "5s"),
        ("LOG_LEVEL", "INFO"),
    ],
)
def test_a_variable_that_is_not_written_exactly_is_refused(
    problems: Problems, variable: str, text: str
) -> None:
    (problem,) = problems(environ={f"RUNRECOVERY_{variable}": text})

    assert problem.startswith(f"environment RUNRECOVERY_{variable}: must be ")


@pytest.mark.parametrize("key", SCALARS)
def test_an_empty_variable_counts_as_not_set(load: Load, key: str) -> None:
    toml = "max_queued = 7\ncgroup_parent = '/sys/fs/cgroup/x'\ninstance = 'a'"

    assert load(toml, environ={f"RUNRECOVERY_{key.upper()}": ""}) == load(toml)


def test_an_empty_variable_with_an_unknown_name_is_ignored(load: Load) -> None:
    assert load(environ={"RUNRECOVERY_MAX_QUEUE": ""}) == Settings()


def test_variables_of_others_with_the_same_prefix_are_ignored(load: Load) -> None:
    others = {
        "RUNRECOVERY_PORT": "tcp://10.0.0.1:50051",
        "RUNRECOVERY_SERVICE_HOST": "10.0.0.1",
        "RUNRECOVERY_PORT_50051_TCP_ADDR": "10.0.0.1",
        "RUNRECOVERY_SERVER": "h:1",
        "RUNRECOVERY_RUN_ID": "r",
        "runrecovery_listen": "0.0.0.0:1",
    }

    assert Settings() == load(environ=others)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().listen = "x"  # type: ignore[misc]


def test_variables_of_commands_that_call_a_service_are_no_misspelt_keys(load: Load) -> None:
    words = (
        "SERVER",
        "TLS",
        "TLS_CA",
        "TLS_CERTIFICATE",
        "TLS_KEY",
        "TLS_SERVER_NAME",
        "TOKEN_FILE",
    )

    assert load(environ={f"RUNRECOVERY_{word}": "x" for word in words}) == Settings()
