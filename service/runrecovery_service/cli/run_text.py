"""The text that `runrecovery runs` prints: runs, questions and events."""

from __future__ import annotations

import json
from typing import Any, Final

from google.protobuf import json_format
from runrecovery.v1 import run_pb2, run_service_pb2

from runrecovery_service.cli.plain_text import safe
from runrecovery_service.cli.printing import (
    Columns,
    aligned_pairs,
    seconds,
    time,
    usage_text,
    word,
)


def _response(asked: run_pb2.Interaction) -> str:
    answer = _json(asked.response) if asked.HasField("response") else "-"
    return f"{answer} (automatic)" if asked.auto_decided else answer


def _json(message: Any) -> str:  # a Struct or a Value; the stubs of json_format accept any message
    return json.dumps(json_format.MessageToDict(message), ensure_ascii=False)


RUN_COLUMNS: Final[Columns[run_pb2.Run]] = (
    ("RUN ID", lambda run: run.run_id),
    ("STATUS", lambda run: word(run, "status")),
    ("ENGINE", lambda run: run.engine),
    ("ATTEMPT", lambda run: str(run.attempt)),
    ("RECOVERY", lambda run: word(run.recovery, "recovery_state")),
    ("CREATED", lambda run: time(run.created_at)),
)

INTERACTION_COLUMNS: Final[Columns[run_pb2.Interaction]] = (
    ("ID", lambda asked: str(asked.interaction_id)),
    ("KIND", lambda asked: word(asked, "kind")),
    ("PROMPT", lambda asked: asked.prompt),
    ("RESPONSE", _response),
    ("ASKED", lambda asked: time(asked.asked_at)),
    ("REPLIED", lambda asked: time(asked.replied_at)),
)


def _is_ending(run: run_pb2.Run) -> bool:
    """Return True while an accepted cancel is being carried out."""
    return run.cancel_requested and not run.HasField("ended_at")


def _if_set(message: Any, field: str) -> str:  # Any: the names of fields depend on the message
    return time(getattr(message, field)) if message.HasField(field) else ""


def _budget(run: run_pb2.Run) -> str:
    tokens = f"{run.max_tokens} tokens" if run.HasField("max_tokens") else ""
    cost = f"${run.max_cost_usd:g}" if run.HasField("max_cost_usd") else ""
    return ", ".join(filter(None, (tokens, cost)))


def _questions(profile: run_pb2.InteractiveProfile) -> str:
    """Return how long one question waits, and what happens then."""
    sticky = profile.kind == run_pb2.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS
    if not profile.HasField("session_timeout"):  # a run of an earlier version
        return ""
    timeout = seconds(profile.session_timeout)
    if not profile.require_user_reply:
        return f"waits {timeout}, then is decided automatically"
    if sticky:
        return f"waits {timeout} for the user's reply, then the run fails"
    return "waits for the user's reply without a limit"


def update_line(update: run_service_pb2.WatchRunResponse) -> str:
    """Return one response of a watch as a readable line."""
    if update.HasField("snapshot"):
        run = update.snapshot
        cells = (word(run, "status"), "snapshot", *_asked(run))
        return _line(time(run.updated_at), update.sequence, *cells)
    event = update.event
    return _line(
        time(event.happened_at),
        update.sequence,
        word(event, "kind"),
        f"→ {word(event, 'status')}",
        f"attempt {event.attempt}" if event.attempt else "",
        f"question {event.interaction_id}" if event.interaction_id else "",
        f"by {event.caller}" if event.caller else "",
        event.error_code,
        event.recovery.recovery_reason,
        event.message,
        usage_text(event.usage) if event.HasField("usage") else "",
        *_asked(event.run),
    )


def _asked(run: run_pb2.Run) -> tuple[str, ...]:
    return (run.pending_interaction.prompt,) if run.HasField("pending_interaction") else ()


def _line(at: str, sequence: int, *cells: str) -> str:
    return safe("  ".join(part for part in (at, f"#{sequence}", *cells) if part))


def describe(run: run_pb2.Run) -> str:
    """Return a run as readable text, one fact per line. `runs get` prints it."""
    pending, decided = run.pending_interaction, run.recovery
    offered = ", ".join(option.label for option in pending.options)
    return aligned_pairs(
        ("run", run.run_id),
        ("status", word(run, "status") + (" (cancel requested)" if _is_ending(run) else "")),
        ("engine", f"{run.engine} ({word(run.interactive_profile, 'kind')})"),
        ("labels", " ".join(f"{key}={run.labels[key]}" for key in sorted(run.labels))),
        ("attempt", run.attempt),
        ("restart policy", word(run, "restart_policy")),
        ("resumed", run.resume_count or ""),
        ("resumes at", _if_set(run, "resume_at")),
        ("question", f"#{pending.interaction_id} {pending.prompt}" if pending.prompt else ""),
        ("options", offered),
        ("waits until", _if_set(pending, "wait_deadline_at")),
        ("each question", _questions(run.interactive_profile)),
        ("auto-decided", run.auto_decided_count or ""),
        ("used", usage_text(run.usage) if run.HasField("usage") else ""),
        ("may use", _budget(run)),
        ("run deadline", _if_set(run, "run_deadline_at")),
        ("error", f"{run.error.code}: {run.error.message}" if run.error.code else ""),
        ("output", _json(run.output) if run.HasField("output") else ""),
        ("recovery", word(decided, "recovery_state")),
        ("decided by", decided.recovery_reason),
        ("recovered", _if_set(decided, "recovered_at")),
        ("reopenable until", _if_set(run, "reopenable_until")),
        ("processes ended", decided.processes_ended or ""),
        ("report", decided.reconciliation_id),
        ("created", time(run.created_at) + (f" by {run.created_by}" if run.created_by else "")),
        ("canceled by", run.canceled_by),
        ("updated", time(run.updated_at)),
        ("ended", _if_set(run, "ended_at")),
    )
