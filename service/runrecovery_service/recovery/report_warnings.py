"""The texts of all warnings that a recovery writes into its report."""

from __future__ import annotations

from runrecovery_service.storage.adoption import Adopted


def adopted(previous: Adopted) -> str:
    """Return the warning that runs of another instance name were adopted."""
    return (
        f"instance {previous.instance!r} had this database before: its unfinished runs (at least"
        f" {previous.runs}) and launches (at least {previous.launches}) are adopted"
    )


def commits_lost(note: str) -> str:
    """Return the warning that the database has lost commits."""
    return f"{note}; see docs/postgresql.md#failover"


def orphan_refused(run_id: str, reason: str) -> str:
    """Return the warning that a process of a run could not be killed."""
    return f"run {run_id}: {reason}"


def launches_elsewhere(count: int) -> str:
    """Return the warning that launches of a dead instance are on another host."""
    return (
        f"{count} launches of the instance are on another host or boot; their records stay open"
        " until the instance starts there again"
    )


def run_quarantined(run_id: str, reason: str) -> str:
    """Return the warning that a run is quarantined."""
    return f"run {run_id} is quarantined: {reason}"


def sessions_not_answered(engine: str, check_s: float) -> str:
    """Return the warning that the session check of an engine took too long."""
    return (
        f"engine {engine}: some sessions could not be checked within {check_s:g} s per bulk;"
        " they count as not answered"
    )


def trust_entry_kept(reason: str) -> str:
    """Return the warning that an entry stays in the file of an agent CLI."""
    return f"trust entries stay: {reason}"
