"""Reads the configuration from its sources, and reports all its problems at once.

A value comes from a flag, else from the environment, else from the file, else from its default.
"""

from __future__ import annotations

import codecs
import errno
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

from runrecovery_service.config import values
from runrecovery_service.config.contradictions import contradictions
from runrecovery_service.config.permissions import permission_contradictions
from runrecovery_service.config.settings import (
    DEFAULT_ENV_ALLOW,
    SCALARS,
    CallerSettings,
    ClientAuth,
    EngineSettings,
    RetentionSettings,
    RoleName,
    Settings,
    TlsSettings,
    TraceSettings,
    WebhookSettings,
)
from runrecovery_service.config.values import InvalidValue, Reader
from runrecovery_service.config.webhooks import webhook_contradictions, webhooks_together
from runrecovery_service.domain.run import Profile, RestartPolicy
from runrecovery_service.engines.presets import PRESETS, Preset
from runrecovery_service.lazy_dataclass import dataclass

T = TypeVar(
    "T",
    EngineSettings,
    TlsSettings,
    CallerSettings,
    RetentionSettings,
    TraceSettings,
    WebhookSettings,
)
S = TypeVar("S")

FILE_NAME: Final = "runrecovery.toml"
ENVIRONMENT_PREFIX: Final = "RUNRECOVERY_"

MAX_FILE_BYTES: Final = 1_048_576
"""Largest configuration file. A device such as /dev/zero would otherwise be read without end."""


class ConfigError(Exception):
    """The configuration is refused.

    Attributes:
        problems: one sentence for each problem, which begins with the source and the key. No
            sentence has a secret.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """The values of one source.

    Attributes:
        place: returns how a message names a key of this source.
    """

    values: Mapping[str, object]
    place: Callable[[str], str]


def load(
    *,
    path: Path | None,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    waits: bool = True,
) -> Settings:
    """Read the configuration.

    Args:
        path: the file that `--config` names. None: the file that RUNRECOVERY_CONFIG names, else
            `runrecovery.toml` in the working directory if that file exists.
        flags: values of flags by key; None is the value of a flag that was not given.
        environ: the environment of the process.
        waits: whether the file can be a pipe, although reading from a pipe can block for ever.

    Raises:
        ConfigError: any source is invalid; the error lists every problem of all sources.
    """
    problems: list[str] = []
    file_layer = _file_layer(path, environ, problems, waits=waits)
    merged: dict[str, object] = {}
    places: dict[str, str] = {}
    for layer in (file_layer, _environment_layer(environ, problems), _flag_layer(flags)):
        read = _read(layer, problems)
        merged |= read
        places |= {key: layer.place(key) for key in read}
    settings = Settings(**merged)  # type: ignore[arg-type] # the reader of each key returned its value
    problems += contradictions(settings, places)
    if problems:
        raise ConfigError(tuple(problems))
    return settings


def configuration_file(path: Path | None, environ: Mapping[str, str]) -> Path:
    """Return the file to read: from `--config`, else from the environment, else the default."""
    return path or Path(environ.get("RUNRECOVERY_CONFIG") or FILE_NAME)


def _file_layer(
    path: Path | None, environ: Mapping[str, str], problems: list[str], *, waits: bool
) -> _Layer:
    source = configuration_file(path, environ)
    may_be_absent = path is None and not environ.get("RUNRECOVERY_CONFIG")
    values: Mapping[str, object] = {}
    try:
        if not may_be_absent or source.exists():
            values = tomllib.loads(_read_text(source, waits=waits))
    except UnicodeDecodeError as error:
        wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "UTF-16" if wide else "not valid UTF-8"
        problems.append(f"{source}: is {found}; save it as UTF-8")
    except RecursionError:
        problems.append(f"{source}: is nested too deeply")
    except _FileTooLarge:
        problems.append(f"{source}: has more than {MAX_FILE_BYTES} bytes")
    except ValueError as error:
        problems.append(f"{source}: not valid TOML: {error}")
    except OSError as error:
        problems.append(f"{source}: {error.strerror or 'cannot be read'}")
    return _Layer(values=values, place=lambda key: f"{source}: {key}")


class _FileTooLarge(Exception):
    """The configuration file has more than `MAX_FILE_BYTES` bytes."""


def _read_text(source: Path, *, waits: bool) -> str:
    if not waits and source.is_fifo():
        raise OSError(errno.EINVAL, "is a pipe, which cannot be read again")
    with source.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _FileTooLarge
    # Editors on Windows write a byte-order mark, which TOML does not allow.
    return data.decode("utf-8-sig")


def _environment_layer(environ: Mapping[str, str], problems: list[str]) -> _Layer:
    values: dict[str, object] = {}
    for variable in sorted(environ):
        key = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable != _variable(key):
            continue
        if not environ[variable]:
            continue  # counts as not set: `${MAX_QUEUED:-}` in a compose file makes it empty
        if key in SCALARS:
            values[key] = _from_text(environ[variable], key)
        # Other variables have the prefix too: Kubernetes sets some for a Service of this name, and
        # the service sets some for its agents. Only a name close to a key is refused.
        elif near := get_close_matches(key, SCALARS, n=1, cutoff=0.8):
            problems.append(f"environment {variable}: unknown (did you mean {_variable(near[0])}?)")
    return _Layer(values=values, place=lambda key: f"environment {_variable(key)}")


def _variable(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper()


def _from_text(text: str, key: str) -> object:
    """Convert the text of a variable to the type of its key; return the text if that fails."""
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


def _read(layer: _Layer, problems: list[str]) -> dict[str, object]:
    """Return the valid values of a layer, and add its invalid ones to `problems`."""
    read, found = _read_table(Settings, layer.values)
    problems += [f"{layer.place(problem.below)}: {problem}" for problem in found]
    return read


# -- tables -----------------------------------------------------------------------------


def _engines(value: object) -> Mapping[str, EngineSettings]:
    if not isinstance(value, dict):
        raise InvalidValue(f"must be a table of engines, not {values.quote(value)}")
    engines: dict[str, EngineSettings] = {}
    problems: list[InvalidValue] = []
    for name, table in value.items():
        try:
            engines[values.name(name)] = _engine(table)
        except (ValueError, ExceptionGroup) as error:
            problems += _problems_at(name, error)
    if problems:
        raise ExceptionGroup("engines", problems)
    return engines


def _table(table: object) -> dict[str, object]:
    if not isinstance(table, dict):
        raise InvalidValue(f"must be a table, not {values.quote(table)}")
    return table


def _tls(value: object) -> TlsSettings:
    settings = _structure(TlsSettings, _table(value))
    if settings.client_auth is ClientAuth.REQUIRE and settings.client_ca is None:
        raise InvalidValue('is missing; client_auth = "require" needs it', below="client_ca")
    if settings.client_auth is ClientAuth.NONE and settings.client_ca is not None:
        raise InvalidValue('has no effect without client_auth = "require"', below="client_ca")
    return settings


def _retention(value: object) -> RetentionSettings:
    return _structure(RetentionSettings, _table(value))


def _traces(value: object) -> TraceSettings:
    return _structure(TraceSettings, _table(value))


def _callers(value: object) -> tuple[CallerSettings, ...]:
    return _tables(value, "callers", _caller, _repeated)


def _tables(
    value: object,
    key: str,
    read: Callable[[object], S],
    check: Callable[[Sequence[S]], Iterable[InvalidValue]],
) -> tuple[S, ...]:
    """Read a list of tables.

    Args:
        check: yields the problems that the valid tables have in combination.
    """
    if not isinstance(value, list):
        raise InvalidValue(f"must be a list of tables, each under [[{key}]]")
    found: list[S] = []
    problems: list[InvalidValue] = []
    for index, table in enumerate(value):
        try:
            found.append(read(table))
        except (ValueError, ExceptionGroup) as error:
            problems += _problems_at(f"[{index}]", error)
    problems += check(found)
    if problems:
        raise ExceptionGroup(key, problems)
    return tuple(found)


def _caller(value: object) -> CallerSettings:
    settings = _structure(CallerSettings, _table(value))
    problems = []
    if settings.token_sha256 and settings.token_file:
        problems.append(InvalidValue("excludes token_sha256", below="token_file"))
    if not (settings.token_sha256 or settings.token_file or settings.certificate_name):
        problems.append(InvalidValue("needs token_sha256, token_file or certificate_name"))
    if settings.role is RoleName.OPERATOR and settings.engines is not None:
        problems.append(InvalidValue("is not for an operator, who sees all runs", below="engines"))
    if problems:
        raise ExceptionGroup("caller", problems)
    return settings


def _repeated(callers: Sequence[CallerSettings]) -> Iterator[InvalidValue]:
    """Yield a problem for each name, certificate or token that several callers have."""
    own: dict[str, list[str | None]] = {
        "name": [caller.name for caller in callers],
        "certificate_name": [caller.certificate_name for caller in callers],
        "token_sha256": [digest for caller in callers for digest in caller.token_sha256],
    }
    for key, found in own.items():
        for _ in {value for value in found if value is not None and found.count(value) > 1}:
            yield InvalidValue(f"two callers have the same {key}")


def _webhooks(value: object) -> tuple[WebhookSettings, ...]:
    return _tables(value, "webhooks", _webhook, webhooks_together)


def _webhook(value: object) -> WebhookSettings:
    settings = _structure(WebhookSettings, _table(value))
    problems = list(webhook_contradictions(settings))
    if problems:
        raise ExceptionGroup("webhook", problems)
    return settings


def _engine(value: object) -> EngineSettings:
    table = _table(value)
    settings = _structure(EngineSettings, _preset_values(table.get("preset")) | table)
    problems = [
        *_preset_contradictions(settings, table),
        *_resume_contradictions(settings),
        *permission_contradictions(settings),
    ]
    if problems:
        raise ExceptionGroup("engine", problems)
    return settings


def _preset_values(word: object) -> dict[str, object]:
    """Return the defaults that a preset gives to its engine table."""
    if word is None:
        return {}
    if not isinstance(word, str) or word not in set(Preset):
        # The reader of `preset` reports the invalid name. These values prevent further reports of
        # missing keys, which a valid preset would set.
        return {"command": ["?"], "profile": Profile.RESUMABLE.value.lower()}
    preset = PRESETS[Preset(word)]
    return {
        "command": [preset.program],
        "profile": Profile.RESUMABLE.value.lower(),
        "env_allow": [*DEFAULT_ENV_ALLOW, *preset.variables],
        "trust": word,
        "resumes_interrupted": True,
    }


def _preset_contradictions(
    settings: EngineSettings, table: Mapping[str, object]
) -> Iterator[InvalidValue]:
    if settings.preset is None:
        if settings.agent_home is not None:
            yield InvalidValue("is for engines with a preset", below="agent_home")
        return
    if settings.profile is not Profile.RESUMABLE:
        yield InvalidValue('must be "resumable" with a preset', below="profile")
    if settings.trust not in {settings.preset, None}:
        yield InvalidValue(f'must be "{settings.preset}" or "none" with this preset', below="trust")
    if settings.max_cost_usd is not None and not PRESETS[settings.preset].reports_cost:
        yield InvalidValue(
            "would never be reached: this CLI reports no cost; set max_tokens", below="max_cost_usd"
        )
    if "session_file" in table:
        yield InvalidValue("must not be set with a preset, which defines it", below="session_file")


def _resume_contradictions(settings: EngineSettings) -> Iterator[InvalidValue]:
    if settings.restart_policy is RestartPolicy.RESUME and not settings.resumes_interrupted:
        yield InvalidValue(
            '"resume" needs an engine with resumes_interrupted = true', below="restart_policy"
        )


_TABLES: Final[Mapping[str, Reader[object]]] = {
    "tls": _tls,
    "callers": _callers,
    "retention": _retention,
    "traces": _traces,
    "engines": _engines,
    "webhooks": _webhooks,
}
"""The readers of the keys of `Settings` that are tables."""


# -- reading a table ---------------------------------------------------------------------------


def _structure(kind: type[T], table: Mapping[str, object]) -> T:
    """Return the settings in a table.

    Raises:
        ExceptionGroup: of an InvalidValue for each problem.
    """
    read, problems = _read_table(kind, table)
    problems += [
        InvalidValue("is missing", below=key.name)
        for key in fields(kind)
        if key.default is MISSING and key.default_factory is MISSING and key.name not in table
    ]
    if problems:
        raise ExceptionGroup(kind.__name__, problems)
    return kind(**read)


def _read_table(
    kind: type, table: Mapping[str, object]
) -> tuple[dict[str, Any], list[InvalidValue]]:
    """Return the valid values of a table, and the problems of all other values."""
    read: dict[str, Any] = {}  # Any: each value has the type of its key
    problems: list[InvalidValue] = []
    readers = _readers(kind)
    for key in filter(table.__contains__, readers):
        try:
            read[key] = readers[key](table[key])
        except (ValueError, ExceptionGroup) as error:
            problems += _problems_at(key, error)
    for key in sorted(table.keys() - readers.keys()):
        problems.append(InvalidValue(f"unknown key{_suggestion(key, list(readers))}", below=key))
    return read, problems


@cache
def _readers(kind: type) -> Mapping[str, Reader[object]]:
    """Return the reader of each key: from `_TABLES`, else from its annotation."""
    tables = _TABLES if kind is Settings else {}
    hints = get_type_hints(kind, include_extras=True)
    return {key: tables.get(key) or hint.__metadata__[0] for key, hint in hints.items()}


def _problems_at(key: str, error: ValueError | ExceptionGroup[Any]) -> list[InvalidValue]:
    """Return the problems of a key's value. The place of each problem begins with the key."""
    problems = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
    return [
        InvalidValue(str(problem), below=_below(key, getattr(problem, "below", "")))
        for problem in problems
    ]


def _below(at: str, name: str) -> str:
    return f"{at}.{name}" if at and name and not name.startswith("[") else at + name


def _suggestion(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""
