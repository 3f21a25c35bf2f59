"""Which values are accepted, and how others are reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeAlias

import pytest
from runrecovery_service.config.settings import SCALARS, Settings

Load: TypeAlias = Callable[..., Settings]
Problems: TypeAlias = Callable[..., tuple[str, ...]]

PRESET = '[engines.x]\npreset = "claude"\n'
TLS = "[tls]\ncertificate = 'c'\nkey = 'k'\n"
DIGEST = "a" * 64
CALLER = f"[[callers]]\nname = 'ci'\nrole = 'viewer'\ntoken_sha256 = '{DIGEST}'\n"
ENGINE = '[engines.reviewer]\ncommand = ["agent", "--jsonl"]\nprofile = "resumable"\n'


@pytest.mark.parametrize("text", ["3", "3.0", "15", "3600"])
def test_a_lease_may_last_from_three_seconds_to_an_hour(load: Load, text: str) -> None:
    assert load(f"lease_ttl_s = {text}").lease_ttl_s == float(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60s", 60), ("1m", 60), ("90m", 5_400), ("12h", 43_200), ("30d", 2_592_000)],
)
def test_an_age_is_a_number_with_its_unit(load: Load, text: str, seconds: float) -> None:
    settings = load(f"[retention]\nended_runs = '{text}'").retention

    assert settings is not None
    assert (settings.ended_runs, settings.outputs) == (seconds, None)


@pytest.mark.parametrize(
    ("toml", "place", "message"),
    [
        ("listn = 'a'", "listn", 'unknown key (did you mean "listen"?)'),
        ("zzz = 1", "zzz", "unknown key"),
        ("[engine.x]", "engine", 'did you mean "engines"'),
        ("retention = '30d'", "retention", 'must be a table, not "30d"'),
        ("[retention]\nended = '30d'", "retention.ended", 'did you mean "ended_runs"'),
        ("[retention]\noutputs = 30", "retention.outputs", 'a text like "30d", "12h" or "90m"'),
        ("[retention]\noutputs = '-1d'", "retention.outputs", 'a text like "30d"'),
        ("[retention]\noutputs = '1w'", "retention.outputs", 'not "1w"'),
        ("[retention]\noutputs = '1.5d'", "retention.outputs", 'not "1.5d"'),
        ("[retention]\noutputs = '59s'", "retention.outputs", "from 1 minutes to 36500 days"),
        ("[retention]\nreports = '36501d'", "retention.reports", "from 1 minutes to 36500 days"),
        ("[retention]\nmax_ended_runs = -1", "retention.max_ended_runs", "from 0 to 1000000000"),
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
        ("tls = 1", "tls", "must be a table, not 1"),
        ("tls.certificate = 'c'", "tls.key", "is missing"),
        ("tls.certificat = 'c'", "tls.certificat", 'did you mean "certificate"'),
        ("tls.certificate = ''", "tls.certificate", "must not be empty"),
        (TLS + "client_auth = 'request'", "tls.client_auth", 'must be "none" or "require"'),
        (TLS + "client_auth = 'require'", "tls.client_ca", "is missing"),
        (TLS + "client_ca = 'c'", "tls.client_ca", "has no effect without client_auth"),
        ("callers = 1", "callers", "must be a list of tables, each under [[callers]]"),
        ("[callers]\nname = 'a'", "callers", "must be a list of tables"),
        ("callers = [1]", "callers[0]", "must be a table, not 1"),
        (CALLER.replace("name", "nam"), "callers[0].nam", 'did you mean "name"'),
        (CALLER.replace("'viewer'", "'admin'"), "callers[0].role", '"creator" or "operator", not'),
        (CALLER.replace("'ci'", "'C I'"), "callers[0].name", "must be 1 to 63 of a-z"),
        ("[[callers]]\nname = 'ci'\nrole = 'viewer'", "callers[0]", "needs token_sha256, token"),
        (CALLER + "token_file = 'f'", "callers[0].token_file", "excludes token_sha256"),
        (CALLER.replace(DIGEST, "secret"), "callers[0].token_sha256", "64 hexadecimal digits"),
        (
            CALLER.replace(
                DIGEST, "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"
            ),
            "callers[0].token_sha256",
            "is the SHA-256 of an empty text",
        ),
        (
            CALLER.replace(f"'{DIGEST}'", f"{[DIGEST] * 3}"),
            "callers[0].token_sha256",
            "a list of at most 2",
        ),
        (CALLER + "max_calls = 0", "callers[0].max_calls", "from 1 to 1000000"),
        (CALLER + "max_calls_per_s = 0", "callers[0].max_calls_per_s", "from 1 to 1000000"),
        (CALLER + "engines = []", "callers[0].engines", "must not be empty"),
        (CALLER + "engines = ['none']", "callers[0].engines", 'no engine "none" is configured'),
        (
            CALLER.replace("viewer", "operator") + "engines = ['a']",
            "callers[0].engines",
            "is not for an operator",
        ),
        (
            CALLER + "certificate_name = 'ci'",
            "callers[0].certificate_name",
            'needs tls.client_auth = "require"',
        ),
        (CALLER + CALLER.replace(DIGEST, "b" * 64), "callers", "two callers have the same name"),
        (
            CALLER + CALLER.replace("'ci'", "'cd'"),
            "callers",
            "two callers have the same token_sha256",
        ),
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
        ("database_direct = 'sqlite:///x'", "database_direct", "must be empty or postgresql://…"),
        (
            "database_direct = 'postgresql://h/d'",
            "database_direct",
            "needs a postgresql://… URL as `database`",
        ),
        ("listen = '50051'", "listen", "must be HOST:PORT"),
        ("listen = ':50051'", "listen", "must be HOST:PORT"),
        ("listen = '::1:50051'", "listen", "must be HOST:PORT"),
        ("listen = 'dns:///h:1'", "listen", "must be HOST:PORT"),
        ("listen = '127.0.0.1:65536'", "listen", "the port must be from 0"),
        ("listen = '127.0.0.1:http'", "listen", "the port must be from 0"),
        ("listen = 'unix:'", "listen", "needs a path"),
        ("probe_listen = 'unix:/a'", "probe_listen", "it needs TCP"),
        ("probe_listen = 'a'", "probe_listen", "must be HOST:PORT"),
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
def test_a_bad_value_in_the_file_is_reported_with_its_key(
    problems: Problems, tmp_path: Path, toml: str, place: str, message: str
) -> None:
    found = problems(toml)

    reported = [
        text for text in found if text.startswith(f"{tmp_path}/runrecovery.toml: {place}: ")
    ]
    assert len(reported) == 1, found
    assert message in reported[0]


BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "max_concurrent": (0, 10_000),
    "max_queued": (1, 10_000_000),
    "max_attempts": (1, 1_000),
    "max_request_bytes": (1024, 67_108_864),
    "max_output_bytes": (65_536, 1_099_511_627_776),
    "min_free_bytes": (0, 2**60),
    "max_concurrent_calls": (1, 1_000_000),
    "max_concurrent_streams": (1, 1_000_000),
    "watch_stall_s": (0.1, 3_600),
    "reopen_window_s": (0, 31_536_000),
    "cancel_grace_s": (0, 3_600),
    "exit_grace_s": (0, 3_600),
    "finish_s": (0, 604_800),
    "drain_delay_s": (0, 3_600),
    "stop_grace_s": (0, 3_600),
    "host_return_s": (1, 31_536_000),
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
"""The least and the greatest value of every numeric key."""


def test_every_numeric_key_has_its_bounds_in_this_table() -> None:
    numbers = [key for key in SCALARS if type(getattr(Settings(), key)) in {int, float}]

    assert sorted(BOUNDS) == sorted(numbers)


@pytest.mark.parametrize("key", BOUNDS)
def test_the_bounds_of_a_number_are_accepted_and_nothing_beyond(
    load: Load, problems: Problems, key: str
) -> None:
    # These two must fit each other: the bounds of one are tried with the other at its own bound.
    beside = {
        "orphan_grace_s": "orphan_deadline_s = 3600",
        "orphan_deadline_s": "orphan_grace_s = 0",
    }
    least, most = BOUNDS[key]
    step = 1 if type(getattr(Settings(), key)) is int else 0.001

    accepted = [
        getattr(load(f"{key} = {value}\n{beside.get(key, '')}"), key) for value in (least, most)
    ]
    refused = [
        problems(f"{key} = {value}\n{beside.get(key, '')}") for value in (least - step, most + step)
    ]

    assert accepted == [least, most]
    assert [len(found) for found in refused] == [1, 1]


@pytest.mark.parametrize(
    "beside", ["", "runs_dir = '/volume'", "database = 'postgresql://db.example/runs'"]
)
def test_shared_workspaces_need_a_folder_that_is_shared_and_postgresql(
    load: Load, problems: Problems, beside: str
) -> None:
    (found,) = problems(f"shared_workspaces = true\n{beside}")

    assert found.endswith(
        "shared_workspaces: needs runs_dir, which all instances share, and a PostgreSQL database"
    )
    both = "runs_dir = '/volume'\ndatabase = 'postgresql://db.example/runs'"
    assert load(f"shared_workspaces = true\n{both}").shared_workspaces


def test_the_orphan_grace_may_be_as_long_as_the_orphan_deadline_and_no_longer(
    load: Load, problems: Problems
) -> None:
    assert load("orphan_grace_s = 7\norphan_deadline_s = 7").orphan_grace_s == 7
    (found,) = problems("orphan_grace_s = 7.1\norphan_deadline_s = 7")
    assert "orphan_deadline_s (7) must not be less than orphan_grace_s (7.1)" in found


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:0", "127.8.9.1:1", "localhost:1", "LOCALHOST:1", "[::1]:1", "unix:/run/a.sock"],
)
def test_an_address_of_this_machine_only_needs_no_permission(load: Load, listen: str) -> None:
    assert listen == load(flags={"listen": listen}).listen


@pytest.mark.parametrize(
    "listen",
    ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.com:1", "127.0.0.1.nip.io:1", "127.1:1"],
)
def test_an_address_that_other_machines_can_reach_needs_tls_and_callers_or_insecure_listen(
    load: Load, problems: Problems, listen: str
) -> None:
    said = "flag --listen: {} can be reached from other machines, and there is no {}; add what"
    for toml, missing in (
        ("", "[tls] and no [[callers]]"),
        (TLS, "[[callers]]"),
        (CALLER, "[tls]"),
    ):
        (problem,) = problems(toml, flags={"listen": listen})
        assert problem.startswith(said.format(listen, missing))

    assert listen == load(TLS + CALLER, flags={"listen": listen}).listen
    assert listen == load("insecure_listen = true", flags={"listen": listen}).listen
