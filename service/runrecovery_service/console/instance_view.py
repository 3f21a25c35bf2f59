"""The instances of the service as their page shows them. Pure."""

from __future__ import annotations

from datetime import datetime

from runrecovery.v1 import recovery_service_pb2 as pb

from runrecovery_service.console.bars import BarPart, bar
from runrecovery_service.console.moments import Moment, moment, to_datetime
from runrecovery_service.console.words import Word, status_word
from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceView:
    """An instance.

    Attributes:
        slots: a bar of its slots: first those that runs hold, then the free ones.
        takeover: which instance has taken it over or is taking it over; empty: none.
    """

    name: str
    state: Word
    epoch: int
    version: str
    host_id: str
    engines: tuple[str, ...]
    slots_held: int
    max_running: int
    slots: tuple[BarPart, ...]
    runs: tuple[tuple[Word, int], ...]
    lease_until: Moment | None
    started_at: Moment | None
    stopped_at: Moment | None
    takeover: str
    taken_over_at: Moment | None
    host_return_until: Moment | None


def instance_view(instance: pb.Instance, now: datetime) -> InstanceView:
    """Return the fields of an instance as its page shows them."""
    free = max(instance.max_running - instance.slots_held, 0)
    return InstanceView(
        name=instance.name,
        state=_state(instance),
        epoch=instance.epoch,
        version=instance.version,
        host_id=instance.host_id,
        engines=tuple(instance.engines),
        slots_held=instance.slots_held,
        max_running=instance.max_running,
        slots=bar([(instance.slots_held, "busy", "held"), (free, "free", "free")]),
        runs=tuple((status_word(owned.status), owned.runs) for owned in instance.runs),
        lease_until=moment(instance.lease_until),
        started_at=moment(instance.started_at),
        stopped_at=moment(instance.stopped_at),
        takeover=_takeover(instance),
        taken_over_at=moment(instance.taken_over_at),
        host_return_until=_future(instance, now),
    )


def _state(instance: pb.Instance) -> Word:
    if instance.alive:
        return Word("alive", "good")
    if instance.HasField("stopped_at"):
        return Word("stopped", "calm")
    return Word("dead", "bad")


def _takeover(instance: pb.Instance) -> str:
    if not instance.taken_over_by:
        return ""
    if instance.HasField("takeover_done_at"):
        return f"taken over by {instance.taken_over_by}"
    return f"being taken over by {instance.taken_over_by}"


def _future(instance: pb.Instance, now: datetime) -> Moment | None:
    until = to_datetime(instance.host_return_until)
    return moment(instance.host_return_until) if until is not None and until > now else None
