"""What the operator may say, where, and what it means.

A value comes from a flag, else the environment, else the file, else its default. Everything that
is wrong anywhere is reported at once, each problem with its place.
"""

from __future__ import annotations

import codecs
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from enum import StrEnum
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias, TypeVar, get_type_hints

from runrecovery_service.domain.run import Profile
from runrecovery_service.domain.session_check import UnknownSession
from runrecovery_service.engines.presets import PRESETS, Preset

if TYPE_CHECKING:
    from cattrs import Converter

FILE_NAME: Final = "runrecovery.toml"
ENVIRONMENT_PREFIX: Final = "RUNRECOVERY_"
DEFAULT_ENV_ALLOW: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")
BYTES_A_RUN: Final = 1024**3
"""Memory that `default_capacity` reckons for one agent process with its tools."""

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_SIZE: Final = re.compile(r"([0-9]{1,12}) ?([KMGT]?)(?:iB|B)?", re.IGNORECASE)
_UNITS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_CGROUPS: Final = Path("/sys/fs/cgroup")
_DAY_S: Final = 86_400.0

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Reader: TypeAlias = Callable[[object], T]


class ConfigError(Exception):
    """The configuration is refused.

    Attributes:
        problems: one sentence each, beginning with its place; never a secret.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class LogLevel(StrEnum):
    """The least important event that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How events are written; AUTO is CONSOLE on a terminal and JSON elsewhere."""

    AUTO = "auto"
    JSON = "json"
    CONSOLE = "console"


class ContainmentPolicy(StrEnum):
    """What a start does when its probe cannot prove that every process would be found."""

    BEST_EFFORT = "best_effort"
    """Say so and go on."""
    STRICT = "strict"
    """Refuse to start."""


class _Wrong(ValueError):
    """A value cannot be taken; `below` is where in the value, when it is not all of it."""

    def __init__(self, text: str, *, below: str = "") -> None:
        super().__init__(text)
        self.below = below


# -- readers: from one value as it was written to the value that it means; else _Wrong ----------


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        text = f'"{value}"' if isinstance(value, str) else str(value)
        return text if len(text) <= 80 else text[:77] + "…"
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else "this"


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Wrong(f"must be true or false, not {_shown(value)}")
    return value


def _whole(least: int, most: int) -> Reader[int]:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _Wrong(f"must be a whole number, not {_shown(value)}")
        if not least <= value <= most:
            raise _Wrong(f"must be from {least} to {most}, not {value}")
        return value

    return read


def _seconds(least: float, most: float) -> Reader[float]:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _Wrong(f"must be a number of seconds, not {_shown(value)}")
        if not least <= value <= most:  # also true of nan
            raise _Wrong(f"must be from {least:g} to {most:g} seconds, not {value}")
        return float(value)

    return read


def _bytes(least: int, most: int) -> Reader[int]:
    def read(value: object) -> int:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if found is not None:
            value = int(found[1]) * _UNITS[found[2].upper()]
        elif isinstance(value, str):
            raise _Wrong(f'must be bytes, or a text like "512M" or "2G", not {_shown(value)}')
        return _whole(least, most)(value)

    return read


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _Wrong(f"must be a string, not {_shown(value)}")
    if "\0" in value:
        raise _Wrong("must not contain a NUL character")
    return value


def _filled(value: object) -> str:
    if not _text(value):
        raise _Wrong("must not be empty")
    return _text(value)


def _name(value: object) -> str:
    if not _NAME.fullmatch(_text(value)):
        raise _Wrong(
            f"must be 1 to 63 of a-z, 0-9, - and _, beginning with a letter or digit,"
            f" not {_shown(value)}"
        )
    return _text(value)


def _path(value: object) -> Path:
    return value if isinstance(value, Path) else Path(_filled(value))


def _one_of(kind: type[E]) -> Reader[E]:
    known = {member.value.lower(): member for member in kind}

    def read(value: object) -> E:
        if not isinstance(value, str) or value not in known:
            *words, last = (f'"{word}"' for word in known)
            raise _Wrong(f"must be {', '.join(words)} or {last}, not {_shown(value)}")
        return known[value]

    return read


def _database(value: object) -> str:
    # The value is never repeated: it may hold a password.
    url = _text(value)
    if url.startswith("sqlite://") and not re.match(r"sqlite:///[^?#]", url):
        raise _Wrong("a SQLite database is sqlite:///relative/path or sqlite:////absolute/path")
    if url.startswith("sqlite:///:memory:"):
        raise _Wrong("a SQLite database in memory would be lost with the process; name a file")
    if url and not url.startswith(("sqlite:///", "postgresql://")):
        raise _Wrong("must be empty, postgresql://… or sqlite:///path")
    return url


def _listen(value: object) -> str:
    address = _filled(value)
    if _is_socket_file(address):
        if not address.partition(":")[2]:
            raise _Wrong("a unix: address needs a path")
        return address
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed) or re.search(r"[\s/@,]", host):
        raise _Wrong(f"must be HOST:PORT, [IPV6]:PORT or unix:PATH, not {_shown(value)}")
    if not _PORT.fullmatch(port) or int(port) > 65_535:
        raise _Wrong(f"the port must be from 0 (any free one) to 65535, not {_shown(port)}")
    return address


def _is_socket_file(address: str) -> bool:
    return address.startswith(("unix:", "unix-abstract:"))


def is_loopback(address: str) -> bool:
    """Whether a valid listen address can be reached from this machine only.

    A host name other than `localhost` counts as reachable from elsewhere, whatever it resolves to.
    """
    if _is_socket_file(address):
        return True
    host = address.rpartition(":")[0].strip("[]").lower()
    try:
        ip = ip_address(host)
    except ValueError:
        return host == "localhost"
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback  # not before Python 3.13 by itself


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Wrong(f"must be a list of strings, not {_shown(value)}")
    for index, word in enumerate(value):
        try:
            _text(word)
        except _Wrong as error:
            raise _Wrong(str(error), below=f"[{index}]") from None
    return tuple(value)


def _command(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        raise _Wrong('must be a list, not a shell line: ["program", "argument"]')
    words = _strings(value)
    if not words:
        raise _Wrong("must name a program")
    if "" in words:
        raise _Wrong("must not be empty", below=f"[{words.index('')}]")
    return words


def _variables(value: object) -> tuple[str, ...]:
    names = _strings(value)
    for index, name in enumerate(names):
        if not _VARIABLE.fullmatch(name):
            raise _Wrong(f"{_shown(name)} is no name of a variable", below=f"[{index}]")
    return names


def _cgroup_parent(value: object) -> str:
    if _text(value) and not _text(value).startswith("/"):
        raise _Wrong(f"must be empty or an absolute path, not {_shown(value)}")
    return _text(value)


def _session_file(value: object) -> str:
    if "{value}" not in _text(value):
        raise _Wrong("must contain {value}, which the session handle takes the place of")
    return _text(value)


def _absolute(value: object) -> str:
    if not _filled(value).startswith("/"):
        raise _Wrong(f"must be an absolute path, not {_shown(value)}")
    return _filled(value)


def _trust(value: object) -> str | None:
    if value == "none":
        return None
    if not isinstance(value, str) or value not in set(Preset):
        words = ", ".join(f'"{preset}"' for preset in Preset)
        raise _Wrong(f'must be {words} or "none", not {_shown(value)}')
    return value


def _engine(table: object) -> EngineSettings:
    if not isinstance(table, dict):
        raise _Wrong(f"must be a table, not {_shown(table)}")
    settings: EngineSettings = _converter().structure(
        _preset_values(table.get("preset")) | table, EngineSettings
    )
    if problems := list(_preset_contradictions(settings, table)):
        raise ExceptionGroup("preset", problems)
    return settings


def _preset_values(word: object) -> dict[str, object]:
    """Return what a preset says where the table does not."""
    if word is None:
        return {}
    if not isinstance(word, str) or word not in set(Preset):
        # That is told by itself; what a preset would have said is then not missing.
        return {"command": ["?"], "profile": Profile.RESUMABLE.value.lower()}
    facts = PRESETS[Preset(word)]
    return {
        "command": [facts.program],
        "profile": Profile.RESUMABLE.value.lower(),
        "env_allow": [*DEFAULT_ENV_ALLOW, *facts.variables],
        "trust": word,
    }


def _preset_contradictions(
    settings: EngineSettings, table: Mapping[str, object]
) -> Iterator[_Wrong]:
    if settings.preset is None:
        if settings.agent_home is not None:
            yield _Wrong("is for engines with a preset", below="agent_home")
        return
    if settings.profile is not Profile.RESUMABLE:
        yield _Wrong('must be "resumable" with a preset', below="profile")
    if settings.trust not in {settings.preset, None}:
        yield _Wrong(f'must be "{settings.preset}" or "none" with this preset', below="trust")
    if "session_file" in table:
        yield _Wrong("must not be set with a preset, which knows it", below="session_file")


def _engines(value: object) -> Mapping[str, EngineSettings]:
    if not isinstance(value, dict):
        raise _Wrong(f"must be a table of engines, not {_shown(value)}")
    engines: dict[str, EngineSettings] = {}
    problems: list[Exception] = []
    for name, table in value.items():
        try:
            engines[_name(name)] = _engine(table)
        except (ValueError, ExceptionGroup) as error:
            problems += [_Wrong(text, below=at) for at, text in _leaves(error, name)]
    if problems:
        raise ExceptionGroup("engines", problems)
    return engines


# -- the settings ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One `[engines.NAME]` table.

    Attributes:
        preset: an agent CLI, `"codex"`, `"gemini"` or `"claude"`, that is spoken with in its own
            way. Without one the engine speaks the JSON-lines protocol. It gives command, profile,
            env_allow and trust their defaults.
        command: the words of the command, the program first; no shell reads them. With a preset
            its own arguments come behind them.
        profile: how its runs wait for their user: `"resumable"` or `"sticky_process"`.
        agent_home: the folder that the CLI of a preset keeps its configuration and its sessions
            in; without it the CLI's own variable or default holds.
        trust: the CLI that is let trust the workspace of each run while the run is alive:
            `"codex"`, `"gemini"`, `"claude"`, or `"none"`.
        env_allow: names of the service's environment variables that its processes get.
        max_concurrent: its processes at one time; without it only the service's own limit holds.
        session_file: where it keeps a conversation, with `{workspace}` and `{value}` (the session
            handle) filled in, so that a restart can see whether it is still there.
        unknown_session: what a restart does with a run whose session it cannot judge: `"keep"` it
            waiting, or `"fail"` it as one whose session is lost.
        session_timeout_s: how long a question waits: that of a sticky process, which is then
            ended, and any one without `require_user_reply`.
        require_user_reply: false: a question that waited so long is decided automatically, and
            the run goes on.
        max_run_time_s: what a run may take from its first launch, waits included; then it fails.
            Without it a run may take any time.
        nice: added to the niceness of the service.
        max_memory: private writable memory of each process (RLIMIT_DATA), in bytes or "512M".
        max_open_files: descriptors of each process (RLIMIT_NOFILE).
        max_processes: of the service's user as a whole, threads too (RLIMIT_NPROC; not for root).
    """

    command: Annotated[tuple[str, ...], _command]
    profile: Annotated[Profile, _one_of(Profile)]
    preset: Annotated[Preset | None, _one_of(Preset)] = None
    agent_home: Annotated[str | None, _absolute] = None
    trust: Annotated[str | None, _trust] = None
    env_allow: Annotated[tuple[str, ...], _variables] = DEFAULT_ENV_ALLOW
    max_concurrent: Annotated[int | None, _whole(1, 10_000)] = None
    session_file: Annotated[str | None, _session_file] = None
    unknown_session: Annotated[UnknownSession, _one_of(UnknownSession)] = UnknownSession.KEEP
    session_timeout_s: Annotated[float, _seconds(0.1, 365 * _DAY_S)] = 1_200.0
    require_user_reply: Annotated[bool, _boolean] = True
    max_run_time_s: Annotated[float | None, _seconds(0.1, 365 * _DAY_S)] = None
    nice: Annotated[int, _whole(0, 19)] = 0
    max_memory: Annotated[int | None, _bytes(1024**2, 2**50)] = None
    max_open_files: Annotated[int | None, _whole(8, 2**20)] = None
    max_processes: Annotated[int | None, _whole(1, 2**22)] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole configuration. Relative paths start from the working directory.

    Attributes:
        listen: HOST:PORT (port 0: any free one), [IPV6]:PORT or unix:PATH.
        insecure_listen: allow `listen` to be reached from other machines, without encryption.
        data_dir: outputs, workspaces, the lock, and the SQLite database unless it is elsewhere.
        database: empty: SQLite in `data_dir`; else `postgresql://…` or `sqlite:///path`.
        instance: the name of this copy of the service; its runs are recovered under it.
        max_concurrent: processes at one time; 0: from the machine's cores and memory.
        max_queued: runs that may wait for a slot; one more is refused as OVERLOADED.
        max_attempts: how often a run is started from the beginning, restarts included.
        max_request_bytes: the largest request that is accepted.
        max_output_bytes: what is kept of each stream of one attempt.
        max_concurrent_calls: calls in progress; health checks and streams are not counted.
        max_concurrent_streams: watches and followed outputs open at one time.
        watch_stall_s: a stream whose reader takes nothing for so long is cut off.
        reopen_window_s: how long a run that lost its session in a restart can be set back; its
            question and handle are kept for it.
        cancel_grace_s: from SIGTERM to SIGKILL for a canceled run.
        exit_grace_s: from the last line after a question or result, or from a closed stdout, to the
            process's exit.
        drain_delay_s: from NOT_SERVING to the end of accepting calls, for load balancers.
        stop_grace_s: for calls that are in progress at a stop.
        orphan_grace_s: from SIGTERM to SIGKILL for processes of earlier epochs.
        orphan_deadline_s: for all of them together; what lives longer is reported.
        recovery_batch_rows: runs decided in one transaction, at most.
        recovery_batch_s: the time that one such transaction aims at.
        recovery_tries: failed recoveries until the service exits.
        recovery_backoff_s: pause after the first of them; each further one doubles.
        safe_mode_after: starts without a finished recovery until a start launches nothing;
            0: never.
        safe_mode_window_s: the time within which such starts are counted.
        lease_ttl_s: how long the instance, and every process tree, outlives its last sign of life
            to the store; renewed five times as often.
        containment: `best_effort`, or `strict`: refuse to start where a process that hides could
            not be found.
        cgroup_parent: a delegated cgroup (v2) in which each launch gets a cgroup of its own;
            empty: none.
        retry_hint_s: when callers that come too early are told to try again.
        log_level: `debug`, `info`, `warning` or `error`.
        log_format: `auto`, `json` or `console`.
        engines: what may be run, by name.
    """

    listen: Annotated[str, _listen] = "127.0.0.1:50051"
    insecure_listen: Annotated[bool, _boolean] = False
    data_dir: Annotated[Path, _path] = Path("./runrecovery-data")
    database: Annotated[str, _database] = field(default="", repr=False)
    instance: Annotated[str, _name] = "default"
    max_concurrent: Annotated[int, _whole(0, 10_000)] = 0
    max_queued: Annotated[int, _whole(1, 10_000_000)] = 10_000
    max_attempts: Annotated[int, _whole(1, 1_000)] = 3
    max_request_bytes: Annotated[int, _whole(1024, 64 * 1024**2)] = 1024**2
    max_output_bytes: Annotated[int, _whole(64 * 1024, 1024**4)] = 16 * 1024**2
    max_concurrent_calls: Annotated[int, _whole(1, 1_000_000)] = 1_000
    max_concurrent_streams: Annotated[int, _whole(1, 1_000_000)] = 5_000
    watch_stall_s: Annotated[float, _seconds(0.1, 3_600)] = 30.0
    reopen_window_s: Annotated[float, _seconds(0, 365 * _DAY_S)] = 7 * _DAY_S
    cancel_grace_s: Annotated[float, _seconds(0, 3_600)] = 5.0
    exit_grace_s: Annotated[float, _seconds(0, 3_600)] = 10.0
    drain_delay_s: Annotated[float, _seconds(0, 3_600)] = 0.0
    stop_grace_s: Annotated[float, _seconds(0, 3_600)] = 5.0
    orphan_grace_s: Annotated[float, _seconds(0, 3_600)] = 2.0
    orphan_deadline_s: Annotated[float, _seconds(0.1, 3_600)] = 10.0
    recovery_batch_rows: Annotated[int, _whole(1, 1_000_000)] = 20_000
    recovery_batch_s: Annotated[float, _seconds(0.01, 60)] = 0.5
    recovery_tries: Annotated[int, _whole(1, 1_000)] = 5
    recovery_backoff_s: Annotated[float, _seconds(0, 3_600)] = 0.5
    safe_mode_after: Annotated[int, _whole(0, 1_000)] = 5
    safe_mode_window_s: Annotated[float, _seconds(1, 30 * _DAY_S)] = 600.0
    lease_ttl_s: Annotated[float, _seconds(3, 3_600)] = 15.0
    containment: Annotated[ContainmentPolicy, _one_of(ContainmentPolicy)] = (
        ContainmentPolicy.BEST_EFFORT
    )
    cgroup_parent: Annotated[str, _cgroup_parent] = ""
    retry_hint_s: Annotated[float, _seconds(0.01, 3_600)] = 1.0
    log_level: Annotated[LogLevel, _one_of(LogLevel)] = LogLevel.INFO
    log_format: Annotated[LogFormat, _one_of(LogFormat)] = LogFormat.AUTO
    engines: Annotated[Mapping[str, EngineSettings], _engines] = field(default_factory=dict)

    @property
    def redacted_database(self) -> str:
        """The database's URL for people and logs: no password, no parameters."""
        return redacted_url(self.database)

    @property
    def capacity(self) -> int:
        """Processes at one time: `max_concurrent`, or what this machine can carry."""
        return self.max_concurrent or machine_capacity()


SCALARS: Final = tuple(key.name for key in fields(Settings) if key.name != "engines")
"""The keys that a flag or an environment variable may set."""


def redacted_url(url: str) -> str:
    """Return a database URL without its password and parameters, which may hold one too.

    A password with reserved characters in it is not a valid URL, and yet is hidden: everything
    before the last `@` counts as user and password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return "***" if url else ""
    credentials, at, place = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    place, question, _ = place.partition("?")
    hidden = f"{user}{':***' if colon else ''}{at}{place}{'?***' if question else ''}"
    return f"{scheme}://{hidden}"


# -- loading -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """One source of values, and how the place of a key is called there."""

    values: Mapping[str, object]
    place: Callable[[str], str]


def load(*, path: Path | None, flags: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """Read the configuration.

    Args:
        path: the file that `--config` names; None: the one that RUNRECOVERY_CONFIG names, else
            `runrecovery.toml` in the working directory if there is one.
        flags: values of flags by key; a value of None was not given.
        environ: the process's environment.

    Raises:
        ConfigError: something in any of them is wrong; it lists everything.
    """
    problems: list[str] = []
    file_layer = _file_layer(path, environ, problems)
    merged: dict[str, object] = {}
    places: dict[str, str] = {}
    for layer in (file_layer, _environment_layer(environ, problems), _flag_layer(flags)):
        read = _read(layer, problems)
        merged |= read
        places |= {key: layer.place(key) for key in read}
    settings = Settings(**merged)  # type: ignore[arg-type] # each was read by its own key's reader
    problems += _contradictions(settings, places)
    if problems:
        raise ConfigError(tuple(problems))
    return settings


def _file_layer(path: Path | None, environ: Mapping[str, str], problems: list[str]) -> _Layer:
    named = path or (Path(found) if (found := environ.get("RUNRECOVERY_CONFIG")) else None)
    source = named or Path(FILE_NAME)
    values: Mapping[str, object] = {}
    try:
        if named is not None or source.exists():
            # Editors of Windows put a byte-order mark before UTF-8, which TOML does not know.
            values = tomllib.loads(source.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "UTF-16" if wide else "not valid UTF-8"
        problems.append(f"{source}: is {found}; save it as UTF-8")
    except RecursionError:
        problems.append(f"{source}: is nested too deeply")
    except ValueError as error:
        problems.append(f"{source}: not valid TOML: {error}")
    except OSError as error:
        problems.append(f"{source}: {error.strerror or 'cannot be read'}")
    return _Layer(values=values, place=lambda key: f"{source}: {key}")


def _environment_layer(environ: Mapping[str, str], problems: list[str]) -> _Layer:
    values: dict[str, object] = {}
    for variable in sorted(environ):
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable != _variable(key):
            continue
        if not environ[variable]:
            continue  # as `${MAX_QUEUED:-}` in a compose file leaves it: not set
        if key in SCALARS:
            values[key] = _from_text(environ[variable], key)
        # Others use the prefix too (Kubernetes for a service of this name, the service for its
        # own processes), so that only what looks like a slip of the pen is refused.
        elif near := get_close_matches(key, SCALARS, n=1, cutoff=0.8):
            problems.append(f"environment {variable}: unknown (did you mean {_variable(near[0])}?)")
    return _Layer(values=values, place=lambda key: f"environment {_variable(key)}")


def _variable(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper()


def _from_text(text: str, key: str) -> object:
    """A variable's text as TOML would have it, or as it is when it cannot be that."""
    default = _defaults()[key]
    if isinstance(default, bool):
        return {"true": True, "false": False}.get(text, text)
    for kind in (int, float):
        if isinstance(default, int | float) and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?\d+)?", text):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _flag_layer(flags: Mapping[str, object]) -> _Layer:
    given = {key: value for key, value in flags.items() if value is not None}
    return _Layer(values=given, place=lambda key: f"flag --{key.replace('_', '-')}")


@cache
def _defaults() -> Mapping[str, object]:
    settings = Settings()
    return {key: getattr(settings, key) for key in SCALARS}


@cache
def _converter() -> Converter:
    # Imported here: it takes longer than all of the rest, and clients do not need it.
    from cattrs import Converter  # noqa: PLC0415
    from cattrs.gen import make_dict_structure_fn, override  # noqa: PLC0415

    converter = Converter(forbid_extra_keys=True, detailed_validation=True)

    def hook(read: Reader[object]) -> Callable[[Any, Any], object]:
        return lambda value, _: read(value)

    for kind in (EngineSettings, Settings):
        hints = get_type_hints(kind, include_extras=True)
        readers = {
            key: override(struct_hook=hook(hint.__metadata__[0])) for key, hint in hints.items()
        }
        # mypy cannot see that `readers` holds no other keyword of that function.
        structure = make_dict_structure_fn(kind, converter, **readers)  # type: ignore[arg-type]
        converter.register_structure_hook(kind, structure)
    return converter


def _read(layer: _Layer, problems: list[str]) -> dict[str, object]:
    """Read one layer's good values; its bad ones become problems."""
    if not layer.values:
        return {}
    good = dict(layer.values)
    try:
        settings = _converter().structure(good, Settings)
    except ExceptionGroup as error:
        leaves = list(_leaves(error, ""))
        problems += [f"{layer.place(at)}: {text}" for at, text in leaves]
        bad = {at.partition(".")[0] for at, _ in leaves}
        good = {key: value for key, value in good.items() if key not in bad}
        settings = _converter().structure(good, Settings)
    return {key: getattr(settings, key) for key in good}


def _leaves(error: Exception, at: str) -> Iterator[tuple[str, str]]:
    """Yield (place, problem) of every leaf of what cattrs raised."""
    from cattrs.errors import ClassValidationError, ForbiddenExtraKeysError  # noqa: PLC0415

    match error:
        case ClassValidationError():
            noted, rest = error.group_exceptions()
            for inner, note in noted:
                yield from _leaves(inner, _below(at, note.name))
            for inner in rest:
                yield from _leaves(inner, at)
        case ExceptionGroup():
            for inner in error.exceptions:
                yield from _leaves(inner, at)
        case ForbiddenExtraKeysError():
            known = [key.name for key in fields(error.cl)]
            for name in sorted(error.extra_fields, key=str):
                yield _below(at, name), f"unknown key{_suggestion(name, known)}"
        case KeyError():
            yield at, "is missing"
        case _Wrong():
            yield _below(at, error.below), str(error)
        case _:
            yield at, str(error)


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at and name and not name.startswith("[") else at + name


def _suggestion(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _contradictions(settings: Settings, places: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong although each value is right by itself."""
    if not settings.insecure_listen and not is_loopback(settings.listen):
        yield (
            f"{places['listen']}: {settings.listen} can be reached from other machines and the"
            " connection is not encrypted; listen on 127.0.0.1, or set insecure_listen = true"
        )
    if settings.orphan_deadline_s < settings.orphan_grace_s:
        place = places.get("orphan_deadline_s") or places["orphan_grace_s"]
        yield (
            f"{place}: orphan_deadline_s ({settings.orphan_deadline_s:g}) must not be less than"
            f" orphan_grace_s ({settings.orphan_grace_s:g})"
        )


# -- the machine -------------------------------------------------------------------------------


def default_capacity(cores: int, memory_bytes: int) -> int:
    """Return how many agent processes a machine carries: two a core, one a GiB, at least one."""
    return max(1, min(2 * cores, memory_bytes // BYTES_A_RUN))


@cache
def machine_capacity() -> int:
    """Return `default_capacity` of what this process may use: its CPUs and its cgroup's memory."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = Path("/proc/self/cgroup")
    group = own.read_text(encoding="utf-8") if own.exists() else ""
    limits = cgroup_limits(group, _CGROUPS)
    return default_capacity(
        min(len(os.sched_getaffinity(0)), limits.cores or 10**6),
        min(memory_bytes, limits.memory_bytes or memory_bytes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What a cgroup (v2) and those around it allow; None: no limit."""

    cores: int | None
    memory_bytes: int | None


def cgroup_limits(membership: str, root: Path) -> CgroupLimits:
    """Return the tightest limits from a process's cgroup up to the root.

    Args:
        membership: the text of `/proc/<pid>/cgroup`.
        root: where cgroup v2 is mounted.
    """
    inside = next((line[3:] for line in membership.splitlines() if line.startswith("0::")), "/")
    leaf = root / inside.lstrip("/")
    groups = [group for group in (leaf, *leaf.parents) if group.is_relative_to(root)]
    memory = [words[0] for group in groups if (words := _words(group / "memory.max"))]
    quotas = [words for group in groups if len(words := _words(group / "cpu.max")) == 2]
    return CgroupLimits(
        cores=min((-(-int(q) // int(p)) for q, p in quotas if q != "max"), default=None),
        memory_bytes=min((int(text) for text in memory if text != "max"), default=None),
    )


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:  # not mounted, not v2, or the root, which has no limits
        return []
