"""`runrecovery instances`: shows the instances that use one database."""

from __future__ import annotations

from typing import Final

import click
from runrecovery.v1 import recovery_service_pb2

from runrecovery_service.cli.connection import ServiceConnection, with_service
from runrecovery_service.cli.printing import Columns, table, time, word


def _state(instance: recovery_service_pb2.Instance) -> str:
    if instance.alive:
        return "alive"
    if instance.taken_over_by:
        is_done = instance.HasField("takeover_done_at")
        return f"taken over by {instance.taken_over_by}" + ("" if is_done else " (not done yet)")
    return "stopped" if instance.HasField("stopped_at") else "lease over"


def _runs(instance: recovery_service_pb2.Instance) -> str:
    return ", ".join(f"{word(owned, 'status')} {owned.runs}" for owned in instance.runs) or "-"


COLUMNS: Final[Columns[recovery_service_pb2.Instance]] = (
    ("NAME", lambda instance: instance.name),
    ("STATE", _state),
    ("EPOCH", lambda instance: str(instance.epoch)),
    ("VERSION", lambda instance: instance.version or "-"),
    ("HOST", lambda instance: instance.host_id),
    ("SLOTS", lambda instance: f"{instance.slots_held}/{instance.max_running}"),
    ("RUNS", _runs),
    ("LEASE UNTIL", lambda instance: time(instance.lease_until)),
    ("WAITS FOR HOST UNTIL", lambda instance: time(instance.host_return_until)),
)


@click.command()
@with_service
def instances(service: ServiceConnection) -> None:
    """Show the instances that use the database of the service, with their runs and slots."""
    answer = recovery_service_pb2.GetInstancesResponse(
        instances=service.client.recovery.instances()
    )
    service.show(answer, lambda shown: table(shown.instances, COLUMNS))
