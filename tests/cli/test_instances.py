"""`runrecovery instances` shows the instances that use the database, with their states."""

from __future__ import annotations

import re

from runrecovery.v1 import recovery_service_pb2, run_pb2

from .conftest import FixedAnswers, Run


def instance(name: str, **fields: object) -> recovery_service_pb2.Instance:
    """Return an instance on a host with four slots."""
    made = recovery_service_pb2.Instance(name=name, epoch=3, host_id="h", max_running=4)
    for field, value in fields.items():
        if field.endswith(("_at", "_until")):
            getattr(made, field).FromJsonString(value)
        else:
            setattr(made, field, value)
    return made


def test_each_instance_is_shown_with_its_state(run: Run, server: FixedAnswers) -> None:
    a = instance("a", alive=True, version="0.2.0", slots_held=2, lease_until="2026-11-25T10:00:00Z")
    a.runs.add(status=run_pb2.RUN_STATUS_QUEUED, runs=7)
    a.runs.add(status=run_pb2.RUN_STATUS_RUNNING, runs=2)
    begun = {"taken_over_by": "a", "taken_over_at": "2026-11-25T10:00:00Z"}
    done = {"takeover_done_at": "2026-11-25T10:00:00Z"}
    server.answers["GetInstances"] = [
        recovery_service_pb2.GetInstancesResponse(
            instances=[
                a,
                instance("b", stopped_at="2026-11-25T10:00:00Z"),
                instance("c", **begun),
                instance("d", **begun, **done, host_return_until="2026-11-26T10:00:00Z"),
                instance("e"),
            ]
        )
    ]

    ended = run("instances", "--server", server.address)

    rows = [re.split("  +", line.strip()) for line in ended.out.splitlines()]
    lease = "2026-11-25 10:00:00Z"
    assert rows == [
        ["NAME", "STATE", "EPOCH", "VERSION", "HOST", "SLOTS", "RUNS", "LEASE UNTIL",
         "WAITS FOR HOST UNTIL"],
        ["a", "alive", "3", "0.2.0", "h", "2/4", "QUEUED 7, RUNNING 2", lease, "-"],
        ["b", "stopped", "3", "-", "h", "0/4", "-", "-", "-"],
        ["c", "taken over by a (not done yet)", "3", "-", "h", "0/4", "-", "-", "-"],
        ["d", "taken over by a", "3", "-", "h", "0/4", "-", "-", "2026-11-26 10:00:00Z"],
        ["e", "lease over", "3", "-", "h", "0/4", "-", "-", "-"],
    ]  # fmt: skip
