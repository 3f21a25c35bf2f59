"""`runrecovery runs`: one command for each method of RunService."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from typing import Final

import click
from google.protobuf.message import DecodeError
from runrecovery import JsonValue
from runrecovery.v1 import run_pb2, run_service_pb2

from runrecovery_service.cli import parameters
from runrecovery_service.cli.connection import ServiceConnection, with_service
from runrecovery_service.cli.ctrl_c import exit_at_once
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.cli.failure import Failure
from runrecovery_service.cli.printing import json_line, word
from runrecovery_service.cli.run_text import INTERACTION_COLUMNS, RUN_COLUMNS, describe, update_line

_STATUS: Final = "RUN_STATUS_"
_POLICY: Final = "RESTART_POLICY_"
_DID_NOT_SUCCEED: Final = frozenset({run_pb2.RUN_STATUS_FAILED, run_pb2.RUN_STATUS_CANCELED})


UNSENDABLE: Final = (ValueError, RecursionError, DecodeError)
"""Errors of a JSON value that cannot be sent because of a number, a text or its depth."""


def describe_unsendable(error: Exception) -> str:
    """Return in one sentence why the value cannot be sent."""
    match error:
        case RecursionError() | DecodeError():
            return "is nested too deeply"
        case UnicodeEncodeError():
            return "contains half of a surrogate pair, which is not valid text"
        case _:
            return str(error) if len(str(error)) < 200 else "contains a number that is too large"


@click.group()
def runs() -> None:
    """Create, show, watch, answer and cancel runs."""


@runs.command()
@with_service
@click.argument("engine")
@click.option(
    "--input",
    "given",
    callback=parameters.json_object,
    metavar="JSON|@FILE|-",
    help="Input for the engine: a JSON object, a file, or standard input.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=parameters.labels,
    metavar="KEY=VALUE",
    help="A label. Can be repeated.",
)
@click.option("--run-id", metavar="ID", help="The id of the run. Default: the service makes one.")
@click.option(
    "--restart-policy",
    type=click.Choice(parameters.choices(run_pb2.RestartPolicy.keys(), _POLICY)),
    help="What a restart does with the run while it is QUEUED or RUNNING.",
)
@click.option(
    "--session-timeout",
    "session_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="How long one question waits; at most the engine's own timeout.",
)
@click.option(
    "--require-user-reply/--no-require-user-reply",
    default=None,
    help="Whether a question requires the user's reply, or is decided automatically after the"
    " session timeout. Default: the setting of the engine.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1, max=2**63 - 1),
    metavar="N",
    help="Tokens that the run may use; at most the engine's own limit.",
)
@click.option(
    "--max-cost-usd",
    type=click.FloatRange(min=0, min_open=True),
    metavar="USD",
    help="What the run may cost, as its agent reports; at most the engine's own limit.",
)
@click.option("--wait", is_flag=True, help="Wait until the run has ended or asks its user.")
def create(
    service: ServiceConnection,
    engine: str,
    given: Mapping[str, JsonValue] | None,
    labels: Mapping[str, str],
    run_id: str | None,
    restart_policy: str | None,
    session_timeout_s: float | None,
    *,
    require_user_reply: bool | None,
    max_tokens: int | None,
    max_cost_usd: float | None,
    wait: bool,
) -> ExitCode:
    """Record a run of ENGINE and queue it."""
    policy = run_pb2.RestartPolicy.Value(_POLICY + (restart_policy or "unspecified").upper())
    try:
        run = service.client.runs.create(
            engine=engine,
            input=given,
            labels=labels,
            run_id=run_id,
            restart_policy=policy,
            session_timeout_s=session_timeout_s,
            require_user_reply=require_user_reply,
            max_tokens=max_tokens,
            max_cost_usd=max_cost_usd,
        )
    except UNSENDABLE as error:
        raise click.BadParameter(describe_unsendable(error), param_hint="--input") from error
    if wait:
        click.echo(f"waiting for run {run.run_id}", err=True)
        run = service.client.wait_for_run(run.run_id, timeout_s=None, or_waiting=True)
    service.show(run, describe)
    return ExitCode.FAILED if run.status in _DID_NOT_SUCCEED else ExitCode.OK


@runs.command()
@with_service
@click.argument("run_id")
def get(service: ServiceConnection, run_id: str) -> None:
    """Show one run with its recovery fields."""
    service.show(service.client.runs.get(run_id), describe)


@runs.command(name="list")
@with_service
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(parameters.choices(run_pb2.RunStatus.keys(), _STATUS)),
    help="Only this status. Can be repeated.",
)
@click.option("--engine", metavar="NAME", help="Only runs of this engine.")
@parameters.only_labels
@click.option(
    "--created-after",
    callback=parameters.time,
    metavar="TIME",
    help="Created at or after TIME.",
)
@click.option(
    "--created-before", callback=parameters.time, metavar="TIME", help="Created before TIME."
)
@parameters.limit_rows
def list_runs(
    service: ServiceConnection,
    statuses: tuple[str, ...],
    engine: str | None,
    labels: Mapping[str, str],
    created_after: datetime | None,
    created_before: datetime | None,
    limit: int,
) -> None:
    """List runs, newest first, without input, output and question.

    TIME is ISO 8601; UTC if it has no offset.
    """
    rows = service.client.runs.list(
        statuses=[run_pb2.RunStatus.Value(_STATUS + status.upper()) for status in statuses],
        engine=engine,
        labels=labels,
        created_after=created_after,
        created_before=created_before,
        view=run_pb2.RUN_VIEW_BASIC,
    )
    service.show_rows(rows, RUN_COLUMNS, limit=limit)


@runs.command()
@with_service
@click.argument("run_id")
@click.option(
    "--after-sequence",
    type=click.IntRange(min=0, max=2**63 - 1),
    metavar="N",
    help="Only events after this one, without a snapshot.",
)
@click.option("--from-start", is_flag=True, help="Every event since the creation.")
def watch(
    service: ServiceConnection, run_id: str, after_sequence: int | None, *, from_start: bool
) -> ExitCode:
    """Show the events of a run until it has ended, also across restarts of the service."""
    if from_start and after_sequence is not None:
        raise click.UsageError("Give --after-sequence or --from-start, not both.")
    # Fails at once if no service runs; a service that stops later is waited for.
    service.client.recovery.status()
    status = None
    updates = service.client.runs.watch(run_id, after_sequence=0 if from_start else after_sequence)
    with exit_at_once(), closing(updates):
        for update in updates:
            status = (update.snapshot if update.HasField("snapshot") else update.event).status
            service.show(update, update_line)
    if status is None:  # the run had ended before --after-sequence
        status = service.client.runs.get(run_id).status
    # Any other status: failed, canceled or quarantined.
    return ExitCode.OK if status == run_pb2.RUN_STATUS_SUCCEEDED else ExitCode.FAILED


@runs.command()
@with_service
@click.argument("run_id")
@click.argument("value", required=False)
@click.option("--json-value", metavar="JSON", help="The answer as JSON instead of a plain string.")
@click.option(
    "--interaction",
    type=click.IntRange(min=1, max=2**31 - 1),
    metavar="N",
    help="The question to answer. Default: the open one.",
)
def reply(
    service: ServiceConnection,
    run_id: str,
    value: str | None,
    json_value: str | None,
    interaction: int | None,
) -> None:
    """Answer the question of a waiting run with the string VALUE."""
    answer = _answer(value, json_value)
    asked = interaction or _open_question(service, run_id)
    try:
        run = service.client.runs.reply(run_id, asked, answer)
    except UNSENDABLE as error:
        raise click.BadParameter(describe_unsendable(error), param_hint="--json-value") from error
    service.show(run, describe)


def _answer(value: str | None, json_value: str | None) -> JsonValue:
    if (value is None) == (json_value is None):
        raise click.UsageError("Give the answer as VALUE or by --json-value.")
    if json_value is None:
        return value
    try:
        answer: JsonValue = json.loads(json_value)
    except RecursionError as error:
        raise click.BadParameter(describe_unsendable(error), param_hint="--json-value") from error
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}", param_hint="--json-value") from error
    return answer


def _open_question(service: ServiceConnection, run_id: str) -> int:
    run = service.client.runs.get(run_id)
    if not run.HasField("pending_interaction"):
        raise Failure(
            f"run {run_id} is {word(run, 'status')} and has no open question",
            code=ExitCode.REFUSED,
        )
    return run.pending_interaction.interaction_id


@runs.command()
@with_service
@click.argument("run_id")
def cancel(service: ServiceConnection, run_id: str) -> None:
    """Cancel a run; a live process is ended first."""
    service.show(service.client.runs.cancel(run_id), describe)


@runs.command()
@with_service
@click.argument("run_id")
@click.option(
    "--session-handle-file",
    "session_handle",
    callback=parameters.secret,
    metavar="FILE|-",
    help="A file (-: standard input) with another session handle, a secret. Default: the stored"
    " handle.",
)
def reopen(service: ServiceConnection, run_id: str, session_handle: str | None) -> None:
    """Reopen a run that a recovery failed because its session was lost."""
    service.show(service.client.runs.reopen(run_id, session_handle=session_handle), describe)


@runs.command()
@with_service
@click.argument("run_id")
def interactions(service: ServiceConnection, run_id: str) -> None:
    """List the questions of a run and their answers, oldest first."""
    service.show_rows(service.client.runs.interactions(run_id), INTERACTION_COLUMNS)


@runs.command()
@with_service
@click.argument("run_id")
@click.option("--stderr", is_flag=True, help="Show standard error instead of standard output.")
@click.option(
    "--attempt",
    type=click.IntRange(min=1, max=2**31 - 1),
    metavar="N",
    help="Default: the latest attempt.",
)
@click.option("--follow", is_flag=True, help="Continue until the attempt has ended.")
def output(
    service: ServiceConnection, run_id: str, attempt: int | None, *, stderr: bool, follow: bool
) -> None:
    """Print the output of an attempt, with session handles masked."""
    channel = run_service_pb2.OUTPUT_CHANNEL_STDOUT
    pieces = service.client.runs.output(
        run_id,
        attempt=attempt or 0,
        channel=run_service_pb2.OUTPUT_CHANNEL_STDERR if stderr else channel,
        follow=follow,
        # With --follow the reading continues after a restart of the service.
        reconnect_s=60.0 if follow else service.timeout_s,
    )
    sink = sys.stdout.buffer
    with exit_at_once():
        for piece in pieces:
            sink.write(json_line(piece).encode() + b"\n" if service.as_json else piece.data)
            sink.flush()
            if piece.truncated:
                click.echo("(the rest of the output was not stored)", err=True)
