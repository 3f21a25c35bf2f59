"""What the operator may say, where it may be said, and how it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runrecovery_service.config import reading
from runrecovery_service.config.capacity import (
    CgroupLimits,
    cgroup_limits,
    default_capacity,
    machine_capacity,
)
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import (
    DEFAULT_ENV_ALLOW,
    SCALARS,
    ContainmentPolicy,
    EngineSettings,
    LogFormat,
    LogLevel,
    Settings,
)
from runrecovery_service.domain.run import Profile
from runrecovery_service.engines.presets import PRESETS, Preset
from runrecovery_service.trust.config_files import AgentCli

CANARY = "canary-9f1c"
PRESET = '[engines.x]\npreset = "claude"\n'
ENGINE = '[engines.reviewer]\ncommand = ["agent", "--jsonl"]\nprofile = "resumable"\n'

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(
        toml: str = "",
        *,
        flags: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        path = tmp_path / "runrecovery.toml"
        path.write_text(toml, encoding="utf-8")
        return reading.load(path=path, flags=flags or {}, environ=environ or {})

    return load


def problems(load: Load, *args: object, **kwargs: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return caught.value.problems


def test_a_file_without_end_is_refused_after_its_largest_size() -> None:
    with pytest.raises(ConfigError) as caught:
        reading.load(path=Path("/dev/zero"), flags={}, environ={})

    assert caught.value.problems == ("/dev/zero: has more than 1048576 bytes",)


@pytest.mark.parametrize(("spaces", "refused"), [(1_048_576, False), (1_048_577, True)])
def test_a_file_may_have_a_mebibyte(load: Load, *, spaces: int, refused: bool) -> None:
    try:
        load(" " * spaces)
        was_refused = False
    except ConfigError:
        was_refused = True

    assert was_refused is refused


def test_an_empty_configuration_means_the_defaults(load: Load) -> None:
    assert Settings() == load()


def test_every_default_is_a_value_that_may_be_written(load: Load) -> None:
    written = {key: getattr(Settings(), key) for key in SCALARS}
    toml = "\n".join(f"{key} = {_toml(value)}" for key, value in written.items())

    assert Settings() == load(toml)


def test_every_default_may_be_given_by_the_environment(load: Load) -> None:
    environ = {
        f"RUNRECOVERY_{key.upper()}": _toml(getattr(Settings(), key)).strip('"') for key in SCALARS
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(LAYERED)
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    load: Load, layered: dict[str, dict[str, object]]
) -> None:
    def layer(source: str) -> dict[str, object]:
        return {key: said[source] for key, said in layered.items() if source in said}

    loaded = load(
        "\n".join(f"{key} = {_toml(value)}" for key, value in layer("file").items()),
        environ={f"RUNRECOVERY_{k.upper()}": str(v) for k, v in layer("environment").items()},
        flags=layer("flag"),
    )

    expected = {
        key: said.get("flag", said.get("environment", said.get("file", getattr(Settings(), key))))
        for key, said in layered.items()
    }
    assert expected == {key: getattr(loaded, key) for key in layered}


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


def test_of_an_unknown_preset_nothing_else_is_missing(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load('[engines.x]\npreset = "cursor"\n')

    (problem,) = caught.value.problems
    assert 'must be "codex", "gemini" or "claude"' in problem


@pytest.mark.parametrize("preset", Preset)
def test_a_preset_says_what_an_engine_does_not(load: Load, preset: Preset) -> None:
    facts = PRESETS[preset]

    engine = load(f'[engines.x]\npreset = "{preset}"\n').engines["x"]

    assert engine == EngineSettings(
        preset=preset,
        command=(facts.program,),
        profile=Profile.RESUMABLE,
        env_allow=(*DEFAULT_ENV_ALLOW, *facts.variables),
        trust=preset.value,
    )
    assert facts.home_variable in engine.env_allow


def test_the_presets_are_the_clis_whose_files_can_be_edited() -> None:
    assert [preset.value for preset in Preset] == [cli.value for cli in AgentCli]


def test_an_engine_with_a_preset_has_the_last_word(load: Load) -> None:
    more = 'command = ["claude", "--model", "m"]\nenv_allow = ["PATH"]\ntrust = "none"\n'

    engine = load(PRESET + more + 'agent_home = "/srv/claude"').engines["x"]

    assert engine.command == ("claude", "--model", "m")
    assert engine.env_allow == ("PATH",)
    assert engine.trust is None
    assert engine.agent_home == "/srv/claude"


def test_an_engine_gets_a_usable_environment_unless_told_otherwise(load: Load) -> None:
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
def test_a_size_may_be_written_as_bytes_or_with_its_unit(load: Load, text: str, size: int) -> None:
    assert load(f"{ENGINE}max_memory = {text}").engines["reviewer"].max_memory == size


@pytest.mark.parametrize("text", ['"1.5G"', '"-1"', '"512X"', '"M"', '""', '"0x10"', '"1 2M"'])
def test_a_size_that_cannot_be_read_is_refused_with_an_example(load: Load, text: str) -> None:
    (problem,) = problems(load, f"{ENGINE}max_memory = {text}")

    assert "engines.reviewer.max_memory: must be bytes" in problem
    assert '"512M"' in problem


@pytest.mark.parametrize("text", ["0", '"1K"', "true", "1.5", '"1048575"', '"2000T"', "[]"])
def test_a_size_that_no_process_could_use_is_refused(load: Load, text: str) -> None:
    (problem,) = problems(load, f"{ENGINE}max_memory = {text}")

    assert "engines.reviewer.max_memory: must be" in problem


@pytest.mark.parametrize("word", list(ContainmentPolicy))
@pytest.mark.parametrize("source", ["file", "environment", "flag"])
def test_the_policy_of_containment_is_a_word(
    load: Load, word: ContainmentPolicy, source: str
) -> None:
    loaded = {
        "file": lambda: load(f'containment = "{word}"'),
        "environment": lambda: load(environ={"RUNRECOVERY_CONTAINMENT": word.value}),
        "flag": lambda: load(flags={"containment": word.value}),
    }[source]()

    assert loaded.containment is word


@pytest.mark.parametrize("text", ["3", "3.0", "15", "3600"])
def test_a_lease_may_last_from_seconds_to_an_hour(load: Load, text: str) -> None:
    assert load(f"lease_ttl_s = {text}").lease_ttl_s == float(text)


@pytest.mark.parametrize(
    ("toml", "place", "says"),
    [
        ("listn = 'a'", "listn", 'unknown key (did you mean "listen"?)'),
        ("zzz = 1", "zzz", "unknown key"),
        ("[engine.x]", "engine", 'did you mean "engines"'),
        ("engines = 3", "engines", "must be a table of engines, not 3"),
        ("engines.x = 3", "engines.x", "must be a table, not 3"),
        (ENGINE + "profil = 'x'", "engines.reviewer.profil", 'did you mean "profile"'),
        ("[engines.x]\nprofile = 'resumable'", "engines.x.command", "is missing"),
        ("[engines.x]\ncommand = ['a']", "engines.x.profile", "is missing"),
        ("engines.x.command = 'agent --jsonl'", "engines.x.command", "a list, not a shell line"),
        ("engines.x.command = []", "engines.x.command", "must name a program"),
        ("engines.x.command = ['./a']", "engines.x.command[0]", "absolute path, or a name without"),
        ("engines.x.command = ['~/a']", "engines.x.command[0]", 'found in PATH, not "~/a"'),
        ("engines.x.command = ['a', '']", "engines.x.command[1]", "must not be empty"),
        ("engines.x.command = ['a', 1]", "engines.x.command[1]", "must be a string, not 1"),
        ("engines.x.profile = 'RESUMABLE'", "engines.x.profile", 'or "sticky_process", not'),
        ("engines.x.env_allow = ['A', 'B C']", "engines.x.env_allow[1]", '"B C"'),
        ("engines.x.env_allow = 'A'", "engines.x.env_allow", "must be a list of strings"),
        ("engines.x.max_concurrent = 0", "engines.x.max_concurrent", "from 1 to 10000"),
        ("engines.x.session_file = 'a'", "engines.x.session_file", "must contain {value}"),
        (
            "engines.x.trust = true",
            "engines.x.trust",
            'must be "codex", "gemini", "claude" or "none"',
        ),
        (
            "engines.x.preset = 'cursor'",
            "engines.x.preset",
            'must be "codex", "gemini" or "claude"',
        ),
        ("engines.x.preset = 7", "engines.x.preset", 'must be "codex", "gemini" or "claude"'),
        (PRESET + "agent_home = 'relative'", "engines.x.agent_home", "must be an absolute path"),
        (ENGINE + "agent_home = '/a'", "engines.reviewer.agent_home", "engines with a preset"),
        (PRESET + "profile = 'sticky_process'", "engines.x.profile", 'must be "resumable"'),
        (PRESET + "session_file = '{value}'", "engines.x.session_file", "must not be set"),
        (PRESET + "trust = 'codex'", "engines.x.trust", 'must be "claude" or "none"'),
        (PRESET + "command = []", "engines.x.command", "must name a program"),
        ("engines.x.unknown_session = 'ask'", "engines.x.unknown_session", '"keep" or "fail"'),
        (ENGINE.replace("reviewer", "Bad"), "engines.Bad", "must be 1 to 63 of a-z"),
        ("insecure_listen = 'yes'", "insecure_listen", 'must be true or false, not "yes"'),
        ("insecure_listen = 1", "insecure_listen", "must be true or false, not 1"),
        ("max_queued = 1.5", "max_queued", "must be a whole number, not 1.5"),
        ("max_queued = 1.0", "max_queued", "must be a whole number, not 1.0"),
        ("max_queued = true", "max_queued", "must be a whole number, not true"),
        ("max_queued = '1'", "max_queued", 'must be a whole number, not "1"'),
        ("max_queued = 0", "max_queued", "must be from 1 to 10000000, not 0"),
        ("stop_grace_s = -0.1", "stop_grace_s", "must be from 0 to 3600 seconds, not -0.1"),
        ("stop_grace_s = nan", "stop_grace_s", "not nan"),
        ("stop_grace_s = inf", "stop_grace_s", "not inf"),
        ("stop_grace_s = '5'", "stop_grace_s", "must be a number of seconds"),
        ("instance = 'Über'", "instance", "must be 1 to 63 of a-z"),
        ("instance = ''", "instance", "must be 1 to 63 of a-z"),
        ("data_dir = ''", "data_dir", "must not be empty"),
        ("data_dir = ['a']", "data_dir", "must be a string, not a list"),
        ("log_format = 'xml'", "log_format", 'must be "auto", "json" or "console", not "xml"'),
        ("database = 'mysql://h/d'", "database", "must be empty, postgresql://… or sqlite:///path"),
        ("database = 'sqlite://x.db'", "database", "sqlite:////absolute/path"),
        ("database = 'sqlite:///'", "database", "sqlite:////absolute/path"),
        ("listen = '50051'", "listen", "must be HOST:PORT"),
        ("listen = ':50051'", "listen", "must be HOST:PORT"),
        ("listen = '::1:50051'", "listen", "must be HOST:PORT"),
        ("listen = 'dns:///h:1'", "listen", "must be HOST:PORT"),
        ("listen = '127.0.0.1:65536'", "listen", "the port must be from 0"),
        ("listen = '127.0.0.1:http'", "listen", "the port must be from 0"),
        ("listen = 'unix:'", "listen", "needs a path"),
        ("lease_ttl_s = 2.9", "lease_ttl_s", "must be from 3 to 3600 seconds, not 2.9"),
        ("lease_ttl_s = 3601", "lease_ttl_s", "must be from 3 to 3600 seconds, not 3601"),
        ("lease_ttl_s = '15s'", "lease_ttl_s", "must be a number of seconds"),
        ("containment = 'STRICT'", "containment", 'must be "best_effort" or "strict", not'),
        ("containment = true", "containment", 'must be "best_effort" or "strict", not true'),
        ("cgroup_parent = 'ours'", "cgroup_parent", "must be empty or an absolute path"),
        ("engines.x.nice = -1", "engines.x.nice", "must be from 0 to 19, not -1"),
        ("engines.x.nice = 20", "engines.x.nice", "must be from 0 to 19, not 20"),
        ("engines.x.max_memory = '512Q'", "engines.x.max_memory", 'like "512M" or "2G"'),
        ("engines.x.max_memory = 1000", "engines.x.max_memory", "must be from 1048576 to"),
        ("engines.x.max_open_files = 7", "engines.x.max_open_files", "must be from 8 to"),
        ("engines.x.max_processes = 0", "engines.x.max_processes", "must be from 1 to"),
        ("engines.x.session_timeout_s = 0", "engines.x.session_timeout_s", "from 0.1 to"),
        ("orphan_grace_s = 11", "orphan_grace_s", "must not be less than orphan_grace_s"),
    ],
)
def test_a_bad_value_in_the_file_is_refused_with_its_place(
    load: Load, tmp_path: Path, toml: str, place: str, says: str
) -> None:
    found = problems(load, toml)

    mine = [text for text in found if text.startswith(f"{tmp_path}/runrecovery.toml: {place}: ")]
    assert len(mine) == 1, found
    assert says in mine[0]


BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "max_concurrent": (0, 10_000),
    "max_queued": (1, 10_000_000),
    "max_attempts": (1, 1_000),
    "max_request_bytes": (1024, 67_108_864),
    "max_output_bytes": (65_536, 1_099_511_627_776),
    "max_concurrent_calls": (1, 1_000_000),
    "max_concurrent_streams": (1, 1_000_000),
    "watch_stall_s": (0.1, 3_600),
    "reopen_window_s": (0, 31_536_000),
    "cancel_grace_s": (0, 3_600),
    "exit_grace_s": (0, 3_600),
    "drain_delay_s": (0, 3_600),
    "stop_grace_s": (0, 3_600),
    "orphan_grace_s": (0, 3_600),
    "orphan_deadline_s": (0.1, 3_600),
    "recovery_batch_rows": (1, 1_000_000),
    "recovery_batch_s": (0.01, 60),
    "recovery_tries": (1, 1_000),
    "recovery_backoff_s": (0, 3_600),
    "safe_mode_after": (0, 1_000),
    "safe_mode_window_s": (1, 2_592_000),
    "lease_ttl_s": (3, 3_600),
    "retry_hint_s": (0.01, 3_600),
}
"""The least and the most of every key that is a number."""


def test_every_key_that_is_a_number_has_its_bounds_here() -> None:
    numbers = [key for key in SCALARS if type(getattr(Settings(), key)) in {int, float}]

    assert sorted(BOUNDS) == sorted(numbers)


@pytest.mark.parametrize("key", BOUNDS)
def test_the_least_and_the_most_may_be_written_and_nothing_beyond(load: Load, key: str) -> None:
    # The only two that must fit each other: their bounds are tried with the other one at its own.
    beside = {
        "orphan_grace_s": "orphan_deadline_s = 3600",
        "orphan_deadline_s": "orphan_grace_s = 0",
    }
    least, most = BOUNDS[key]
    step = 1 if type(getattr(Settings(), key)) is int else 0.001

    taken = [
        getattr(load(f"{key} = {value}\n{beside.get(key, '')}"), key) for value in (least, most)
    ]
    refused = [
        problems(load, f"{key} = {value}\n{beside.get(key, '')}")
        for value in (least - step, most + step)
    ]

    assert taken == [least, most]
    assert [len(found) for found in refused] == [1, 1]


def test_orphans_may_have_all_the_time_there_is_as_their_grace(load: Load) -> None:
    assert load("orphan_grace_s = 7\norphan_deadline_s = 7").orphan_grace_s == 7
    (found,) = problems(load, "orphan_grace_s = 7.1\norphan_deadline_s = 7")
    assert "orphan_deadline_s (7) must not be less than orphan_grace_s (7.1)" in found


def test_everything_that_is_wrong_is_told_at_once_with_its_place(
    load: Load, tmp_path: Path
) -> None:
    found = problems(
        load,
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


def test_a_bad_value_is_refused_also_where_another_source_overrides_it(load: Load) -> None:
    found = problems(load, "max_queued = 0", flags={"max_queued": 5})

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
def test_a_variable_is_taken_literally_or_refused(load: Load, variable: str, text: str) -> None:
    (problem,) = problems(load, environ={f"RUNRECOVERY_{variable}": text})

    assert problem.startswith(f"environment RUNRECOVERY_{variable}: must be ")


@pytest.mark.parametrize("key", SCALARS)
def test_an_empty_variable_counts_as_not_set(load: Load, key: str) -> None:
    toml = "max_queued = 7\ncgroup_parent = '/sys/fs/cgroup/x'\ninstance = 'a'"

    assert load(toml, environ={f"RUNRECOVERY_{key.upper()}": ""}) == load(toml)


def test_an_empty_variable_that_looks_like_a_slip_is_no_mistake(load: Load) -> None:
    assert load(environ={"RUNRECOVERY_MAX_QUEUE": ""}) == Settings()


def test_variables_that_share_only_the_prefix_are_nobodys_mistake(load: Load) -> None:
    others = {
        "RUNRECOVERY_PORT": "tcp://10.0.0.1:50051",
        "RUNRECOVERY_SERVICE_HOST": "10.0.0.1",
        "RUNRECOVERY_PORT_50051_TCP_ADDR": "10.0.0.1",
        "RUNRECOVERY_SERVER": "h:1",
        "RUNRECOVERY_RUN_ID": "r",
        "runrecovery_listen": "0.0.0.0:1",
    }

    assert Settings() == load(environ=others)


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:0", "127.8.9.1:1", "localhost:1", "LOCALHOST:1", "[::1]:1", "unix:/run/a.sock"],
)
def test_listening_on_this_machine_only_needs_no_leave(load: Load, listen: str) -> None:
    assert listen == load(flags={"listen": listen}).listen


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.com:1", "127.0.0.1.nip.io:1", "127.1:1"],
)
def test_listening_beyond_this_machine_needs_leave(load: Load, listen: str) -> None:
    (problem,) = problems(load, flags={"listen": listen})

    assert problem.startswith(f"flag --listen: {listen} can be reached from other machines")
    assert listen == load("insecure_listen = true", flags={"listen": listen}).listen


@pytest.mark.parametrize("path_from", ["flag", "environment"])
def test_a_file_that_was_named_must_exist(tmp_path: Path, path_from: str) -> None:
    path = tmp_path / "none.toml"
    environ = {"RUNRECOVERY_CONFIG": str(path)} if path_from == "environment" else {}

    with pytest.raises(ConfigError) as caught:
        reading.load(path=path if path_from == "flag" else None, flags={}, environ=environ)

    assert (f"{path}: No such file or directory",) == caught.value.problems


def test_a_nul_in_a_word_of_a_command_is_named_as_that(load: Load) -> None:
    (problem,) = problems(load, '[engines.x]\ncommand = ["a", "\\u0000"]\nprofile = "resumable"')

    assert problem.endswith("engines.x.command[1]: must not contain a NUL character")


def write_config(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "runrecovery.toml"
    path.write_bytes(data)
    return path


def test_a_byte_order_mark_before_utf8_is_no_mistake(tmp_path: Path) -> None:
    path = write_config(tmp_path, b"\xef\xbb\xbfmax_queued = 7\r\ninstance = 'a'\r\n")

    settings = reading.load(path=path, flags={}, environ={})

    assert (settings.max_queued, settings.instance) == (7, "a")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("max_queued = 7".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"\xfe\xff" + "max_queued = 7".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        (b"instance = '\xe4'", "is not valid UTF-8; save it as UTF-8"),
        (b"\xef\xbb\xbf\xef\xbb\xbfmax_queued = 7", "not valid TOML: "),
        ("max_queued = 7".encode("utf-16-le"), "not valid TOML: "),
        (b"max_queued = " + b"[" * 100_000, "is nested too deeply"),
        (b"max_queued = " + b"9" * 10_000, "not valid TOML: "),
    ],
    ids=["utf-16", "utf-16 be", "latin-1", "two marks", "utf-16 unmarked", "nested", "digits"],
)
def test_a_file_that_cannot_be_read_is_named_with_what_it_is(
    tmp_path: Path, data: bytes, problem: str
) -> None:
    path = write_config(tmp_path, data)

    with pytest.raises(ConfigError) as refused:
        reading.load(path=path, flags={}, environ={})

    assert refused.value.problems[0].startswith(f"{path}: {problem}")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a = ", "not valid TOML"), (b"\xff", "not valid UTF-8"), (b"a = " + b"9" * 5000, "TOML")],
)
def test_an_unreadable_file_does_not_hide_other_problems(
    tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        reading.load(path=path, flags={"instance": "-"}, environ={})

    of_file, of_flag = caught.value.problems
    assert says in of_file
    assert of_flag.startswith("flag --instance: ")


def test_the_file_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runrecovery.toml").write_text("instance = 'here'", encoding="utf-8")

    assert reading.load(path=None, flags={}, environ={}).instance == "here"


SECRET_URLS = [
    f"postgresql://user:{CANARY}@host:5432/db",
    f"postgresql://user:{CANARY}/@:?{CANARY}@host/db",
    f"postgresql://user:first@{CANARY}@host/db",
    f"postgresql://user@host/db?password={CANARY}",
    f"postgresql://user:x@host/db?sslpassword={CANARY}&a=b@c",
    f"postgresql://:{CANARY}@/db?host=/run",
    f"mysql://user:{CANARY}@host/db",
    f"user:{CANARY}@host/db",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_databases_password_is_never_shown(url: str) -> None:
    settings = Settings(database=url)

    assert CANARY not in repr(settings) + str(settings) + settings.redacted_database


@pytest.mark.parametrize("url", SECRET_URLS[-2:])
def test_a_refused_databases_password_is_never_shown(load: Load, url: str) -> None:
    found = problems(load, f"database = '{url}'", environ={"RUNRECOVERY_DATABASE": url})

    assert len(found) == 2
    assert CANARY not in "".join(found)


def test_a_redacted_database_can_still_be_recognised() -> None:
    settings = Settings(database="postgresql://user:pw@host:5432/db?sslmode=require")

    assert settings.redacted_database == "postgresql://user:***@host:5432/db?***"
    assert Settings().redacted_database == ""


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().listen = "x"  # type: ignore[misc]


@given(cores=st.integers(1, 4096), memory_bytes=st.integers(0, 2**50))
def test_a_machine_carries_two_runs_a_core_and_one_a_gib_but_always_one(
    cores: int, memory_bytes: int
) -> None:
    capacity = default_capacity(cores, memory_bytes)

    assert 1 <= capacity <= 2 * cores
    assert capacity == 1 or capacity * 1024**3 <= memory_bytes
    assert capacity == 2 * cores or (capacity + 1) * 1024**3 > memory_bytes


def test_the_configured_capacity_wins_over_the_machines() -> None:
    assert Settings(max_concurrent=7).capacity == 7
    assert machine_capacity() == Settings().capacity >= 1


def test_the_tightest_cgroup_on_the_way_up_counts(tmp_path: Path) -> None:
    leaf = tmp_path / "system.slice" / "app.service"
    leaf.mkdir(parents=True)
    (leaf / "memory.max").write_text("max\n")
    (leaf / "cpu.max").write_text("150000 100000\n")
    (leaf.parent / "memory.max").write_text("1048576\n")
    (leaf.parent / "cpu.max").write_text("max 100000\n")

    limits = cgroup_limits("0::/system.slice/app.service\n", tmp_path)

    assert CgroupLimits(cores=2, memory_bytes=1048576) == limits


@pytest.mark.parametrize("membership", ["", "0::/\n", "3:memory:/a\n", "0::/gone\n", "0::/../..\n"])
def test_without_cgroup_limits_there_are_none(tmp_path: Path, membership: str) -> None:
    assert CgroupLimits(cores=None, memory_bytes=None) == cgroup_limits(membership, tmp_path)


def _toml(value: object) -> str:
    return json.dumps(str(value) if isinstance(value, Path | LogFormat | LogLevel) else value)


def _place(problem: str, file: str) -> str:
    if problem.startswith(file):
        return f"{file}: {problem.removeprefix(file + ': ').partition(': ')[0]}"
    return problem.partition(": ")[0]
