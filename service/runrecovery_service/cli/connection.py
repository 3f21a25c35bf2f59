"""Options, client and exit codes of the commands that call a running service."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, TypeVar

import click
from google.protobuf.message import Message
from runrecovery import RunRecoveryClient, Tls, errors
from runrecovery.errors import RunRecoveryClientError

from runrecovery_service.cli import parameters
from runrecovery_service.cli.exit_codes import ExitCode, of_class
from runrecovery_service.cli.failure import Failure
from runrecovery_service.cli.printing import Columns, json_line, print_table
from runrecovery_service.config import defaults
from runrecovery_service.lazy_dataclass import dataclass

MessageT = TypeVar("MessageT", bound=Message)
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

CALL_EXIT_CODES: Final[Mapping[type, ExitCode]] = {
    errors.NotFound: ExitCode.NOT_FOUND,
    errors.InvalidRequest: ExitCode.USAGE,
    errors.TokenUnusable: ExitCode.USAGE,
    errors.Unauthenticated: ExitCode.DENIED,
    errors.PermissionDenied: ExitCode.DENIED,
    errors.RunAlreadyExists: ExitCode.REFUSED,
    errors.RequestIdReused: ExitCode.REFUSED,
    errors.RunNotWaiting: ExitCode.REFUSED,
    errors.InteractionSuperseded: ExitCode.REFUSED,
    errors.RunAlreadyTerminal: ExitCode.REFUSED,
    errors.RunQuarantined: ExitCode.REFUSED,
    errors.RunOfAnotherInstance: ExitCode.REFUSED,
    errors.RunNotReopenable: ExitCode.REFUSED,
    errors.SessionNotResumable: ExitCode.REFUSED,
    errors.EtagMismatch: ExitCode.REFUSED,
    errors.OutputOutOfRange: ExitCode.REFUSED,
    errors.WatchHistoryPruned: ExitCode.REFUSED,
    errors.WatchSequenceUnknown: ExitCode.REFUSED,
    errors.Unavailable: ExitCode.UNAVAILABLE,
    errors.Overloaded: ExitCode.UNAVAILABLE,
    errors.StorageFull: ExitCode.UNAVAILABLE,
    errors.SlowReader: ExitCode.UNAVAILABLE,
    errors.DeadlineExceeded: ExitCode.UNAVAILABLE,
}
"""The exit code of a command whose call failed, by error class. See `of_class`."""


_WATCH_AGAIN: Final = "without --after-sequence the watch begins with the present state of the run"
FIXED_HINTS: Final[Mapping[type, str]] = {
    errors.TokenUnusable: "",
    errors.Unauthenticated: "--token-file, or --tls-certificate with --tls-key, says who calls",
    errors.WatchHistoryPruned: _WATCH_AGAIN,
    errors.WatchSequenceUnknown: _WATCH_AGAIN,
}
"""Hints that depend on the class of the error only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceConnection:
    """The service that a command calls, and the form of its output.

    Attributes:
        timeout_s: the deadline of one call.
        as_json: whether to print JSON lines for programs instead of text for people.
    """

    client: RunRecoveryClient
    timeout_s: float
    as_json: bool

    def show(self, message: MessageT, for_people: Callable[[MessageT], str]) -> None:
        """Print one message."""
        click.echo(json_line(message) if self.as_json else for_people(message))

    def show_rows(
        self, rows: Iterator[MessageT], columns: Columns[MessageT], *, limit: int = 0
    ) -> None:
        """Print at most `limit` rows (0: all), each as soon as it arrives."""
        shown = (row for _, row in zip(range(limit), rows, strict=False)) if limit else rows
        if self.as_json:
            for row in shown:
                click.echo(json_line(row))
            return
        print_table(shown, columns)
        if limit and next(rows, None) is not None:
            click.echo(f"(only the first {limit}; --limit 0 shows all)", err=True)


def _file_option(name: str, text: str) -> Callable[[AnyFunction], AnyFunction]:
    variable = f"RUNRECOVERY_{name.removeprefix('--').replace('-', '_').upper()}"
    return click.option(
        name,
        envvar=variable,
        show_envvar=True,
        metavar="FILE",
        callback=parameters.require_not_empty,
        help=text,
    )


_OPTIONS: Final = (
    click.option(
        "--server",
        envvar="RUNRECOVERY_SERVER",
        default=defaults.LISTEN,
        show_default=True,
        show_envvar=True,
        metavar="HOST:PORT",
        callback=parameters.target,
        help="Address of the service.",
    ),
    click.option(
        "--tls",
        is_flag=True,
        envvar="RUNRECOVERY_TLS",
        help="Encrypt, and trust the roots that gRPC trusts. Any other --tls option implies it.",
    ),
    _file_option("--tls-ca", "Certificates (PEM) that sign the service's."),
    _file_option("--tls-certificate", "Own certificate (PEM), if the service demands one."),
    _file_option("--tls-key", "Private key (PEM) of --tls-certificate."),
    click.option(
        "--tls-server-name",
        envvar="RUNRECOVERY_TLS_SERVER_NAME",
        metavar="NAME",
        help="Name in the certificate of the service, if --server has another one.",
    ),
    _file_option("--token-file", "File with the bearer token."),
    click.option(
        "--timeout",
        "timeout_s",
        type=parameters.Seconds(min_open=True),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Deadline of one call, including the wait for a service that does not run yet.",
    ),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object per line, as in the contract.",
    ),
)


def with_service(
    function: Callable[..., ExitCode | None],
) -> Callable[..., ExitCode | None]:
    """Add the options of a client to a command, and pass it the service as first argument."""

    @wraps(function)
    def call(**given: Any) -> ExitCode | None:  # click passes every parameter by its name
        parameters.require_utf8(given)
        server, timeout_s = given.pop("server"), given.pop("timeout_s")
        as_json = given.pop("as_json")
        with failures(server), _connect(server, timeout_s, given) as client:
            service = ServiceConnection(client=client, timeout_s=timeout_s, as_json=as_json)
            return function(service, **given)

    for option in reversed(_OPTIONS):
        call = option(call)
    return call


def _connect(server: str, timeout_s: float, given: dict[str, Any]) -> RunRecoveryClient:
    """Remove the options about TLS and the token from `given`, and return a client with them."""
    named = {key: given.pop(f"tls_{key}") for key in ("ca", "certificate", "key", "server_name")}
    wants_tls, token_file = given.pop("tls"), given.pop("token_file")
    try:
        tls = Tls(**named) if any(named.values()) else wants_tls
        return RunRecoveryClient(server, tls=tls, token_file=token_file, timeout_s=timeout_s)
    except OSError as error:
        raise Failure(f"{error.filename}: {error.strerror}", code=ExitCode.USAGE) from error
    except (TypeError, ValueError) as error:
        raise Failure(_as_flags(str(error)), code=ExitCode.USAGE) from error


def _as_flags(text: str) -> str:
    """Return a message of the client, with the names of options in place of argument names."""
    return {
        "give certificate and key, or neither": "give --tls-certificate and --tls-key, or neither"
    }.get(text, text.replace("give tls=", "give --tls-ca or --tls"))


@contextmanager
def failures(server: str) -> Iterator[None]:
    """Turn errors of the client into a `Failure` with sentence, hint and exit code."""
    try:
        yield
    except RunRecoveryClientError as error:
        sentence = str(error) or type(error).__name__
        if sentence == "Deadline Exceeded":  # gRPC's own text for a call without an answer
            sentence = f"{server} did not answer in time"
        raise Failure(sentence, code=exit_code(error), hint=hint(error, server)) from error


def exit_code(error: RunRecoveryClientError) -> ExitCode:
    """Return the exit code for a failed call."""
    return of_class(CALL_EXIT_CODES, type(error), otherwise=ExitCode.FAILED)


def hint(error: RunRecoveryClientError, server: str) -> str:
    """Return what the user can do about the error; empty if that is unknown."""
    match error:
        case errors.RecoveryInProgress():
            return "`runrecovery recovery status --watch` shows its progress"
        case errors.DeadlineExceeded() | errors.Unavailable(reason=""):
            return f"is a service running at {server}? `runrecovery serve` starts one"
        case errors.InvalidRequest(violations=violations):
            missing = (bad for bad in violations if bad.description not in str(error))
            return "; ".join(f"{bad.field}: {bad.description}" for bad in missing)
        case (
            errors.RunNotWaiting()
            | errors.InteractionSuperseded()
            | errors.RunAlreadyTerminal()
            | errors.RunNotReopenable()
        ):
            return "`runrecovery runs get RUN_ID` shows the state of the run"
        case errors.SessionNotResumable():
            return "restore its session file, or give another handle with `--session-handle-file`"
        case errors.WatchCursorInvalid():
            return "without --after the watch begins with the next decision"
        case errors.InternalError(error_id=error_id) if error_id:
            return f"the service's log has the details under error_id {error_id}"
        case _:
            return of_class(FIXED_HINTS, type(error), otherwise="")
