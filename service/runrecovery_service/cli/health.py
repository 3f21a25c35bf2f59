"""`runrecovery health`: a probe for scripts and containers."""

from __future__ import annotations

import json

import click
from runrecovery import ServingStatus

from runrecovery_service.cli import parameters
from runrecovery_service.cli.connection import ServiceConnection, with_service
from runrecovery_service.cli.exit_codes import ExitCode


@click.command()
@with_service
@click.option(
    "--service",
    "name",
    default="",
    metavar="NAME",
    help="A health name, for example liveness. Default: the service as a whole.",
)
@click.option(
    "--wait",
    "wait_s",
    type=parameters.Seconds(),
    metavar="SECONDS",
    help="Wait up to this long for SERVING, also for a service that does not run yet.",
)
def health(service: ServiceConnection, name: str, wait_s: float | None) -> ExitCode:
    """Check whether the service is SERVING; exit with 0 only if it is."""
    if wait_s is None:
        status = service.client.health.check(name)
    else:
        service.client.wait_until_ready(timeout_s=wait_s, service=name)
        status = ServingStatus.SERVING
    click.echo(json.dumps({"service": name, "status": status}) if service.as_json else status)
    return ExitCode.OK if status is ServingStatus.SERVING else ExitCode.UNAVAILABLE
