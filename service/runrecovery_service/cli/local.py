"""Commands that work on the data directory of this machine, without calling a service."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final

import click

from runrecovery_service.cli import streams
from runrecovery_service.cli.exit_codes import ExitCode, of_class
from runrecovery_service.cli.failure import Failure
from runrecovery_service.cli.plain_text import safe
from runrecovery_service.config import reading
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import SCALARS, LogFormat, LogLevel, Settings
from runrecovery_service.domain.errors import ClaimLost, CommitsLost, Fenced, RunGone
from runrecovery_service.domain.start_errors import (
    BackupRefused,
    CallersRefused,
    CgroupRefused,
    ContainmentRefused,
    DatabaseOutOfReach,
    DatabaseRefused,
    DataDirRefused,
    Held,
    LeaseLost,
    OpenFilesRefused,
    PackagesMissing,
    RecoveryGaveUp,
    StartRefused,
    StoreLost,
    ThreadsRefused,
    TlsRefused,
    TracesRefused,
    WebhooksRefused,
)

START_EXIT_CODES: Final[Mapping[type, ExitCode]] = {
    Held: ExitCode.HELD,
    BackupRefused: ExitCode.REFUSED,
    DatabaseRefused: ExitCode.STORAGE,
    StoreLost: ExitCode.STORAGE,
    DatabaseOutOfReach: ExitCode.UNAVAILABLE,
    DataDirRefused: ExitCode.STORAGE,
    OpenFilesRefused: ExitCode.STORAGE,
    ThreadsRefused: ExitCode.STORAGE,
    RecoveryGaveUp: ExitCode.RECOVERY,
    CgroupRefused: ExitCode.USAGE,
    TlsRefused: ExitCode.USAGE,
    CallersRefused: ExitCode.USAGE,
    WebhooksRefused: ExitCode.USAGE,
    TracesRefused: ExitCode.USAGE,
    PackagesMissing: ExitCode.USAGE,
    ContainmentRefused: ExitCode.CONTAINMENT,
    Fenced: ExitCode.FENCED,
    CommitsLost: ExitCode.FENCED,
    ClaimLost: ExitCode.FENCED,
    RunGone: ExitCode.FENCED,
    LeaseLost: ExitCode.FENCED,
}
"""The exit code of a service that did not start, or that an error stopped. See `of_class`."""

HINTS: Final[Mapping[type, str]] = {
    StoreLost: "docs/operations.md, *When something is wrong*, says what to do",
    Held: "stop that service, or give this one its own --data-dir and --instance",
    OpenFilesRefused: "raise the limit (LimitNOFILE= of a unit), or lower max_concurrent",
    ThreadsRefused: "raise the limit on processes (TasksMax= of a unit, ulimit -u, pids.max)",
    RecoveryGaveUp: "the log says why; every changed run has a recorded decision",
    ContainmentRefused: "docs/processes.md says what is missing, and what best_effort means",
    Fenced: "another service runs under this instance's name, and continues",
    CommitsLost: "docs/postgresql.md, *Failover*, says what to do",
    ClaimLost: "no newer start is known; start again, and the recorded runs are recovered",
    RunGone: "its processes were ended; start again, and the recorded runs are recovered",
    LeaseLost: "no other service is known; service.lease_not_renewed in the log says why",
}

CONFIGURATION_FILE: Final = f"{__name__}.configuration_file"
"""Key in click's context: the configuration file, which can be missing."""
LOAD: Final = f"{__name__}.load"
"""Key in click's context: a function that reads the settings again from the same sources."""

_STORE_OPTIONS: Final = (
    click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Configuration. Default: $RUNRECOVERY_CONFIG, else ./runrecovery.toml if it exists.",
    ),
    click.option("--data-dir", metavar="DIR", help="Directory of outputs and SQLite database."),
    click.option("--database", metavar="URL", help="postgresql://… or sqlite:///path."),
    click.option("--instance", metavar="NAME", help="Name of this instance of the service."),
)


def _with_settings(function: Callable[..., ExitCode]) -> Callable[..., ExitCode]:
    """Add the options that locate the database to a command, and pass the settings to it."""

    @wraps(function)
    def call(**parameters: Any) -> ExitCode:  # click passes every parameter by its name
        with _refusals():
            streams.write_messages_in_background()
        path = parameters.pop("path")
        flags = {key: parameters.pop(key) for key in SCALARS if key in parameters}
        load = partial(reading.load, path=path, flags=flags, environ=os.environ)
        settings = _load(load)
        meta = click.get_current_context().meta
        meta[CONFIGURATION_FILE] = str(reading.configuration_file(path, os.environ))
        meta[LOAD] = partial(load, waits=False)
        # Before `app`, because importing it first keeps the import of structlog short.
        from runrecovery_service import logs

        logs.configure(settings.log_format, settings.log_level)
        with _refusals():
            return function(settings, **parameters)

    for option in reversed(_STORE_OPTIONS):
        call = option(call)
    return call


def _load(load: Callable[[], Settings]) -> Settings:
    try:
        return load()
    except ConfigError as error:
        listed = "".join(f"\n  {problem}" for problem in error.problems)
        raise Failure(f"the configuration is refused:{listed}", code=ExitCode.USAGE) from error


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (StartRefused, Fenced) as error:
        kind = type(error)
        raise Failure(
            str(error),
            code=of_class(START_EXIT_CODES, kind, otherwise=ExitCode.FAILED),
            hint=of_class(HINTS, kind, otherwise=""),
            closes_nothing=isinstance(error, StoreLost),
        ) from error


@click.command()
@_with_settings
@click.option("--listen", metavar="ADDRESS", help="HOST:PORT, [IPV6]:PORT or unix:PATH.")
@click.option("--http-listen", metavar="ADDRESS", help="HOST:PORT of HTTP, or empty for none.")
@click.option("--log-format", type=click.Choice([form.value for form in LogFormat]))
@click.option("--log-level", type=click.Choice([level.value for level in LogLevel]))
def serve(settings: Settings) -> ExitCode:
    """Run the service until SIGTERM or Ctrl-C; a second signal stops it at once.

    SIGHUP reloads the configuration.
    """
    import structlog

    from runrecovery_service import app
    from runrecovery_service.rpc.listen_address import ListenFailed

    if not settings.engines:
        file = click.get_current_context().meta[CONFIGURATION_FILE]
        structlog.get_logger().warning("service.no_engines", file=file)
    try:
        app.serve(settings, click.get_current_context().meta[LOAD])
    except ListenFailed as error:
        hint = "choose another address with --listen, or free this one"
        raise Failure(str(error), code=ExitCode.LISTEN, hint=hint) from error
    return ExitCode.OK


@click.command()
@_with_settings
def migrate(settings: Settings) -> ExitCode:
    """Migrate the database of a stopped service, as its next start would."""
    from runrecovery_service import offline

    click.echo(f"up to date: {', '.join(offline.migrate(settings))}")
    return ExitCode.OK


@click.command()
@_with_settings
def check(settings: Settings) -> ExitCode:
    """Check configuration, engines and database. Change nothing."""
    from runrecovery_service import offline

    problems = offline.check(settings)
    for problem in problems:
        click.echo(safe(problem))
    for note in offline.check_notes(settings):
        click.echo(safe(f"note: {note}"))
    if not settings.engines:
        file = click.get_current_context().meta[CONFIGURATION_FILE]
        click.echo(safe(f"note: no engine is configured in {file}, so no run can be created"))
    if problems:
        return ExitCode.FAILED
    click.echo("no problem found")
    return ExitCode.OK


@click.command()
@_with_settings
@click.option("--with-runs", is_flag=True, help="Also copy the folders of the runs, to DEST.runs.")
@click.argument("dest", type=click.Path(path_type=Path))
def backup(settings: Settings, dest: Path, *, with_runs: bool) -> ExitCode:
    """Back up the SQLite database to DEST, also while the service runs."""
    from runrecovery_service import offline

    made = offline.backup(settings, dest, with_runs=with_runs)
    kept = ", ".join(f"{count} of instance {name!r}" for name, count in made.runs.items()) or "none"
    size = dest.stat().st_size
    click.echo(f"copied to {dest} ({size} bytes) and verified; runs: {kept}")
    if made.folders is not None:
        click.echo(f"copied to {dest}.runs: {made.folders} folders of runs ({made.size} bytes)")
        fit = made.waiting - len(made.changed)
        click.echo(f"runs that wait: {made.waiting}, of which {fit} have the files of that moment")
    for run_id in made.changed:
        click.echo(safe(f"changed while it was copied: {run_id}"))
    return ExitCode.OK


@click.command()
def demo() -> ExitCode:
    """Kill a service under nine runs, and explain each decision. Leaves nothing behind."""
    from runrecovery_service.cli.demo import steps
    from runrecovery_service.cli.demo.signals import exit_on_termination

    exit_on_termination()
    try:
        return ExitCode(steps.run_demo())
    except OSError as error:
        raise Failure(f"the demo cannot continue: {error}", code=ExitCode.FAILED) from error
