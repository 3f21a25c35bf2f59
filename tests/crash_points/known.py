"""The use cases of `storage/` whose commits are crash points, and why some of them are not reached.

`tests/unit/test_crash_points.py` fails when a use case that changes rows is in neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COMMITS: Final = frozenset(
    {
        "passed_deadlines.end_run",
        "passed_deadlines.end_wait",
        "hand_over.hand_over",
        "instances.announce_stop",
        "instances.claim",
        "instances.renew",
        "instances.resign",
        "interactions.reply",
        "launch_records.close_all",
        "launch_records.record_gated",
        "launch_records.record_running",
        "opening.open_database",
        "recovery_apply.apply_batch",
        "reopening.reopen",
        "reports.open_report",
        "reports.write_report",
        "runs.cancel",
        "runs.create",
        "session_checks.record_findings",
        "store_identity.store_id",
        "takeover.begin",
        "takeover.finish",
        "trust.record_entry",
        "trust.record_outcome",
        "turn_ends.record_end",
        "turn_starts.take_next",
        "turns.record_delivered",
        "turns.record_session",
        "turns.record_sticky_question",
        "turns.record_usage",
        "webhook_deliveries.remove_delivered",
    }
)
"""The use cases that the scenarios reach."""

_REPLICAS: Final = (
    "only at some moments of a takeover: `make campaign-replicas` kills at random ones"
)
_RETENTION: Final = "needs data of its age: `tests/retention/` kills a removal at every step"
_WEBHOOK: Final = "only with an endpoint that fails: `tests/crash/test_webhooks.py`"
UNREACHED: Final[Mapping[str, str]] = {
    "adoption.adopt": "only after the instance was renamed: `tests/crash/test_renamed_instance.py`",
    "passed_deadlines.end_pauses": "only after several interruptions of a turn",
    "passed_deadlines.end_reopening": "needs the time to reopen a run to pass",
    "passed_deadlines.move_to_clock": "only after another boot of the machine",
    "launch_records.record_late_end": "only for processes that could not be killed at first",
    "launch_records.take_unended": _REPLICAS,
    "reports.close_abandoned": _REPLICAS,
    "retention.confirm_time": _RETENTION,
    "retention.mark_removed": _RETENTION,
    "retention.remove_receipts": _RETENTION,
    "retention.remove_reports": _RETENTION,
    "retention.remove_runs": _RETENTION,
    "stale_bindings.clear_stale_bindings": "only if an older version has left bindings",
    "takeover.take_deliveries": _REPLICAS,
    "turn_starts.requeue_unlaunched": "only if a stop meets a launch that waits for resources",
    "turns.record_retry": "only if the agent's model does not answer",
    "turns.record_undelivered": "only if a process ends without having read its reply",
    "webhook_deliveries.forget_given_up": _WEBHOOK,
    "webhook_deliveries.give_up": _WEBHOOK,
    "webhook_deliveries.give_up_first": _WEBHOOK,
    "webhook_deliveries.try_again": _WEBHOOK,
    "webhook_outbox.forget_removed": "only after a webhook was removed from the configuration",
    "webhook_outbox.take_back": _REPLICAS,
    "work_stealing.take_from": (
        "only if an idle service is quicker than the owner: `tests/campaign/race.py` demands it"
    ),
}
