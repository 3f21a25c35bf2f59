"""`runrecovery prune`: removes data that has reached its age, or counts it in a dry run."""

from __future__ import annotations

from collections import Counter
from typing import Final

import click
from runrecovery.v1 import recovery_service_pb2

from runrecovery_service.cli.connection import ServiceConnection, with_service
from runrecovery_service.cli.printing import Columns, table, time

DRY_RUN_S: Final = 600.0
"""The deadline of a dry run, which reads the sizes of all files that would be removed."""
COLUMNS: Final[Columns[recovery_service_pb2.PrunedKind]] = (
    ("KIND", lambda kind: kind.kind),
    ("COUNT", lambda kind: str(kind.count)),
    ("FILE BYTES", lambda kind: str(kind.file_bytes)),
)


@click.command()
@with_service
@click.option("--dry-run", is_flag=True, help="Remove nothing, and show what would be removed.")
def prune(service: ServiceConnection, *, dry_run: bool) -> None:
    """Remove at once all data that has reached its age by the service's [retention]."""
    if dry_run:
        timeout_s = max(service.timeout_s, DRY_RUN_S)
        pruned = service.client.recovery.prune(dry_run=True, timeout_s=timeout_s)
    else:
        pruned = remove_all(service)
    service.show(pruned, lambda answer: describe_pruned(answer, dry_run=dry_run))


def remove_all(service: ServiceConnection) -> recovery_service_pb2.PruneResponse:
    """Call until nothing is left to remove, and return the last answer with the sums."""
    counts, sizes = Counter[str](), Counter[str]()
    while True:
        pruned = service.client.recovery.prune()
        for kind in pruned.kinds:
            counts[kind.kind] += kind.count
            sizes[kind.kind] += kind.file_bytes
        if pruned.done:
            break
    for kind in pruned.kinds:
        kind.count, kind.file_bytes = counts[kind.kind], sizes[kind.kind]
    return pruned


def describe_pruned(pruned: recovery_service_pb2.PruneResponse, *, dry_run: bool) -> str:
    """Return the counts of a removal or of a dry run as readable text."""
    if not pruned.kinds:
        return "nothing is removed: the service has no [retention]"
    kept = time(pruned.oldest_kept_at) if pruned.HasField("oldest_kept_at") else "none"
    lines = [
        "would be removed:" if dry_run else "removed:",
        table(pruned.kinds, COLUMNS),
        f"oldest ended run that is kept: {kept}",
    ]
    if pruned.unknown_folders:
        lines.append(f"folders of unknown runs, which are never removed: {pruned.unknown_folders}")
    return "\n".join(lines)
