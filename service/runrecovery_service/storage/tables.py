"""The tables as this version reads and writes them. `migrations/` creates them.

Two tables are not declared here: `migration_checksum` and, in a SQLite store, `commit_count`.
`migrate.py` and `commit_count.py` read them before the store is used.
"""

from __future__ import annotations

from typing import Final

import peewee as pw

from runrecovery_service.domain.run import TERMINAL, RecoveryState


def sql_words(words: frozenset[str] | tuple[str, ...]) -> str:
    """Return words as a list for SQL's IN. Only for constants: nothing is escaped."""
    return ", ".join(f"'{word}'" for word in sorted(words))


def live(of: str = "") -> str:
    """Return an SQL condition for runs that a restart must decide on.

    The text is that of a partial index; with another text, the database would not use the index.

    Args:
        of: a prefix of the columns, for example `r.`.
    """
    return (
        f"{of}status NOT IN ({sql_words(frozenset(TERMINAL))})"
        f" AND {of}recovery_state <> '{RecoveryState.QUARANTINED}'"
    )


LIVE: Final = live()


class Run(pw.Model):
    """One row per run, clustered by `id`.

    `…_due_us` are deadlines on the steady clock `due_clock`. `retired_…` is the session of a failed
    run that can be reopened until `reopenable_until`. `session_mark` is the session fingerprint at
    the latest question. `interrupted_…` describes the interruption from which the next or current
    turn resumes. `resume_count` counts the resumes of the interrupted turn. `questions_before` is
    the `interaction_count` at the start of the latest attempt.

    `…_tokens` and `cost_nanos` are the summed usage of all turns. `model` is the latest reported
    model, NULL until the first report. `session_usage` is the usage that earlier processes of the
    session have reported. It is subtracted from the totals that the next process reports, or that
    its session file shows after a kill.

    `status`, `profile` and `restart_policy` have no CHECK constraint. A newer version on the same
    database may write an unknown value, and recovery must be able to quarantine a damaged row.
    """

    id = pw.BigAutoField()
    run_id = pw.TextField(unique=True)
    engine = pw.TextField()
    labels = pw.TextField()
    input = pw.TextField()
    output = pw.TextField(null=True)
    status = pw.TextField()
    profile = pw.TextField(null=True)
    restart_policy = pw.TextField()
    max_attempts = pw.BigIntegerField()
    attempt = pw.BigIntegerField()
    turn = pw.BigIntegerField()
    interaction_count = pw.BigIntegerField()
    session_type = pw.TextField(null=True)
    session_value = pw.TextField(null=True)
    session_turn = pw.BigIntegerField(null=True)
    session_verdict = pw.TextField(null=True)
    session_reason = pw.TextField(null=True)
    session_mark = pw.TextField(null=True)
    error_code = pw.TextField(null=True)
    error_message = pw.TextField(null=True)
    cancel_requested_at = pw.BigIntegerField(null=True)
    owner = pw.TextField()
    owner_epoch = pw.BigIntegerField()
    version = pw.BigIntegerField()
    queued_at = pw.BigIntegerField()
    created_at = pw.BigIntegerField()
    started_at = pw.BigIntegerField(null=True)
    updated_at = pw.BigIntegerField()
    ended_at = pw.BigIntegerField(null=True)
    recovery_state = pw.TextField()
    recovered_at = pw.BigIntegerField(null=True)
    recovery_reason = pw.TextField(null=True)
    recovered_version = pw.BigIntegerField(null=True)
    recovery_count = pw.BigIntegerField()
    reconciliation = pw.BigIntegerField(null=True)
    event_count = pw.BigIntegerField()
    session_timeout_us = pw.BigIntegerField(null=True)
    require_user_reply = pw.BigIntegerField(null=True)
    max_run_us = pw.BigIntegerField(null=True)
    auto_decided_count = pw.BigIntegerField()
    run_deadline_at = pw.BigIntegerField(null=True)
    reopenable_until = pw.BigIntegerField(null=True)
    retired_type = pw.TextField(null=True)
    retired_value = pw.TextField(null=True)
    wait_due_us = pw.BigIntegerField(null=True)
    run_due_us = pw.BigIntegerField(null=True)
    reopen_due_us = pw.BigIntegerField(null=True)
    resume_due_us = pw.BigIntegerField(null=True)
    due_clock = pw.TextField(null=True)
    max_resumes = pw.BigIntegerField()
    resume_count = pw.BigIntegerField()
    questions_before = pw.BigIntegerField()
    interrupted_at = pw.BigIntegerField(null=True)
    interrupted_by = pw.TextField(null=True)
    resume_at = pw.BigIntegerField(null=True)
    input_tokens = pw.BigIntegerField()
    cached_input_tokens = pw.BigIntegerField()
    cache_write_input_tokens = pw.BigIntegerField()
    output_tokens = pw.BigIntegerField()
    reasoning_output_tokens = pw.BigIntegerField()
    cost_nanos = pw.BigIntegerField(null=True)
    model = pw.TextField(null=True)
    session_usage = pw.TextField(null=True)
    max_tokens = pw.BigIntegerField(null=True)
    max_cost_nanos = pw.BigIntegerField(null=True)
    created_by = pw.TextField(null=True)
    canceled_by = pw.TextField(null=True)
    traceparent = pw.TextField(null=True)

    class Meta:
        table_name = "run"


class Interaction(pw.Model):
    """A question of a run. `no` is its interaction_id."""

    run = pw.BigIntegerField()
    no = pw.BigIntegerField()
    kind = pw.TextField()
    prompt = pw.TextField()
    options = pw.TextField()
    state = pw.TextField()
    asked_at = pw.BigIntegerField()
    wait_deadline_at = pw.BigIntegerField(null=True)
    replied_at = pw.BigIntegerField(null=True)
    response = pw.TextField(null=True)
    auto_decided = pw.BigIntegerField()
    tool_call = pw.TextField(null=True)
    replied_by = pw.TextField(null=True)

    class Meta:
        table_name = "interaction"
        primary_key = pw.CompositeKey("run", "no")


class RunEvent(pw.Model):
    """One event of a run. `no` is its sequence number.

    The creation (event 1) and decisions of recoveries (`RecoveryEvent`) have no row here. `usage`
    is the usage of the turn that ended with the event. `message` is a text of the agent.
    """

    run = pw.BigIntegerField()
    no = pw.BigIntegerField()
    kind = pw.TextField()
    status = pw.TextField()
    attempt = pw.BigIntegerField()
    interaction = pw.BigIntegerField()
    error_code = pw.TextField(null=True)
    happened_at = pw.BigIntegerField()
    usage = pw.TextField(null=True)
    message = pw.TextField(null=True)
    caller = pw.TextField(null=True)

    class Meta:
        table_name = "run_event"
        primary_key = pw.CompositeKey("run", "no")


class RemovedPart(pw.Model):
    """A part of a run that retention has removed: outputs, workspaces or events.

    This is a separate table because SQLite would rewrite the whole row of the run, up to a
    megabyte.
    """

    run = pw.BigIntegerField()
    part = pw.TextField()

    class Meta:
        table_name = "removed_part"
        primary_key = pw.CompositeKey("run", "part")


class RunLabel(pw.Model):
    """The labels of runs, indexed for searches."""

    key = pw.TextField()
    value = pw.TextField()
    run = pw.BigIntegerField()

    class Meta:
        table_name = "run_label"
        primary_key = pw.CompositeKey("key", "value", "run")


class RecoveryEvent(pw.Model):
    """One decision of one recovery for one run, with its facts. Append-only.

    `no` counts the run's decisions. `sequence` is the decision's number among the run's events.
    """

    run = pw.BigIntegerField()
    no = pw.BigIntegerField()
    reconciliation = pw.BigIntegerField()
    rule = pw.TextField()
    facts = pw.BigIntegerField()
    status_before = pw.TextField()
    status_after = pw.TextField()
    error_code = pw.TextField(null=True)
    recovery_state = pw.TextField()
    recovered_at = pw.BigIntegerField()
    processes_ended = pw.BigIntegerField()
    sequence = pw.BigIntegerField()
    profile = pw.TextField(null=True)
    attempt = pw.BigIntegerField(null=True)
    interaction = pw.BigIntegerField(null=True)
    session_turn = pw.BigIntegerField(null=True)
    session_verdict = pw.TextField(null=True)
    session_reason = pw.TextField(null=True)
    resumes = pw.BigIntegerField(null=True)
    caller = pw.TextField(null=True)

    class Meta:
        table_name = "recovery_event"
        primary_key = pw.CompositeKey("run", "no")


class Reconciliation(pw.Model):
    """The report of one recovery. JSON columns have values that are always read as a whole."""

    id = pw.BigAutoField()
    reconciliation_id = pw.TextField(unique=True)
    instance = pw.TextField()
    epoch = pw.BigIntegerField()
    cause = pw.TextField()
    state = pw.TextField()
    started_at = pw.BigIntegerField()
    finished_at = pw.BigIntegerField(null=True)
    phases = pw.TextField()
    decisions = pw.TextField()
    orphans = pw.TextField()
    bindings = pw.TextField()
    warnings = pw.TextField()
    quarantined = pw.BigIntegerField()
    runs_scanned = pw.BigIntegerField()
    runs_total = pw.BigIntegerField()
    runs_unchanged = pw.BigIntegerField()
    safe_mode = pw.BigIntegerField()
    containment = pw.TextField(null=True)
    error = pw.TextField(null=True)
    trust_removals = pw.TextField(null=True)
    recovered_instance = pw.TextField(null=True)

    class Meta:
        table_name = "reconciliation"


class Quarantine(pw.Model):
    """Why a run was quarantined."""

    id = pw.BigAutoField()
    run = pw.BigIntegerField(index=True)
    reconciliation = pw.BigIntegerField()
    reason = pw.TextField()
    detail = pw.TextField()
    quarantined_at = pw.BigIntegerField()

    class Meta:
        table_name = "quarantine"


class Instance(pw.Model):
    """A configured replica of the service. `epoch` counts its starts.

    `engines` is a JSON list of names, `max_running` the number of slots, `version` the version of
    the service. `stopped_at` is the time of the planned stop that ended the epoch. `taken_over_by`
    names the instance that has taken over this epoch; `taken_over_at` and `takeover_done_at` are
    the begin and the end of the takeover. Runs that need the host of this instance wait for it
    until `host_return_until`. All these times and `lease_until` are of the database's clock.
    `time_confirmed_at` is the latest wall-clock time that retention has found correct.
    """

    name = pw.TextField(primary_key=True)
    epoch = pw.BigIntegerField()
    boot_token = pw.TextField()
    host_id = pw.TextField()
    data_dir = pw.TextField()
    pid = pw.BigIntegerField()
    lock_id = pw.TextField(null=True)
    lease_until = pw.BigIntegerField()
    started_at = pw.BigIntegerField()
    time_confirmed_at = pw.BigIntegerField(null=True)
    engines = pw.TextField(default="[]")
    max_running = pw.BigIntegerField(default=0)
    version = pw.TextField(default="")
    stopped_at = pw.BigIntegerField(null=True)
    taken_over_by = pw.TextField(null=True)
    taken_over_at = pw.BigIntegerField(null=True)
    takeover_done_at = pw.BigIntegerField(null=True)
    host_return_until = pw.BigIntegerField(null=True)

    class Meta:
        table_name = "instance"


class InstanceEpoch(pw.Model):
    """A copy of the instance's epoch, in a row that writers lock.

    A claim waits for these locks. A renewal of the lease, which is in another row, does not.
    """

    name = pw.TextField(primary_key=True)
    epoch = pw.BigIntegerField()
    boot_token = pw.TextField(default="")

    class Meta:
        table_name = "instance_epoch"


class ProcessLease(pw.Model):
    """One launch record, written before the spawn.

    `pid` and `start_ticks` identify the shim. `usage` is the usage of the turn so far.
    """

    id = pw.BigAutoField()
    run = pw.BigIntegerField()
    attempt = pw.BigIntegerField()
    turn = pw.BigIntegerField()
    instance = pw.TextField()
    epoch = pw.BigIntegerField()
    host_id = pw.TextField()
    boot_id = pw.TextField()
    pid_namespace = pw.BigIntegerField()
    cookie = pw.TextField()
    watermark = pw.BigIntegerField(null=True)
    cgroup = pw.TextField(null=True)
    pid = pw.BigIntegerField(null=True)
    start_ticks = pw.BigIntegerField(null=True)
    state = pw.TextField()
    exit_code = pw.BigIntegerField(null=True)
    user_us = pw.BigIntegerField(null=True)
    system_us = pw.BigIntegerField(null=True)
    max_rss_kib = pw.BigIntegerField(null=True)
    ended_by = pw.BigIntegerField(null=True)
    processes_ended = pw.BigIntegerField()
    orphans = pw.TextField(null=True)
    created_at = pw.BigIntegerField()
    closed_at = pw.BigIntegerField(null=True)
    usage = pw.TextField(null=True)

    class Meta:
        table_name = "process_lease"


class EngineUsage(pw.Model):
    """The total usage of one engine, in turns that one instance supervised. It only grows."""

    engine = pw.TextField()
    instance = pw.TextField()
    turns = pw.BigIntegerField()
    input_tokens = pw.BigIntegerField()
    cached_input_tokens = pw.BigIntegerField()
    cache_write_input_tokens = pw.BigIntegerField()
    output_tokens = pw.BigIntegerField()
    reasoning_output_tokens = pw.BigIntegerField()
    cost_nanos = pw.BigIntegerField(null=True)

    class Meta:
        table_name = "engine_usage"
        primary_key = pw.CompositeKey("engine", "instance")


class ModelUsage(EngineUsage):
    """The total usage of one engine's model, in turns that one instance supervised.

    `model` is the name from the agent, '' if the agent named none, or 'other' for all models above
    the limit.
    """

    model = pw.TextField()

    class Meta:
        table_name = "model_usage"
        primary_key = pw.CompositeKey("engine", "instance", "model")


class TrustEntry(pw.Model):
    """A trust entry of the service in a file of an agent CLI.

    The row is written before the entry is added and deleted after the entry is removed.
    `removed_at` is the time of the removal. `away` is the reason why a removal failed. `look_at` is
    the time of the next check. `added` is opaque to the store: the package `trust` writes and reads
    it.
    """

    file = pw.TextField()
    folder = pw.TextField()
    place = pw.TextField()
    host_id = pw.TextField()
    cli = pw.TextField()
    run = pw.BigIntegerField()
    attempt = pw.BigIntegerField()
    instance = pw.TextField()
    added = pw.TextField()
    created_at = pw.BigIntegerField()
    removed_at = pw.BigIntegerField(null=True)
    away = pw.TextField(null=True)
    away_since = pw.BigIntegerField(null=True)
    look_at = pw.BigIntegerField(null=True)

    class Meta:
        table_name = "trust_entry"
        primary_key = pw.CompositeKey("file", "folder", "place")


class RequestReceipt(pw.Model):
    """The proof that a request was carried out, committed with its effect.

    `owner` is the instance of the run. The receipt can exist longer than the run.
    """

    request_id = pw.TextField(primary_key=True)
    method = pw.TextField()
    fingerprint = pw.TextField()
    run = pw.BigIntegerField()
    created_at = pw.BigIntegerField()
    owner = pw.TextField(default="")

    class Meta:
        table_name = "request_receipt"


class WebhookDelivery(pw.Model):
    """One event that one webhook has not received yet.

    `instance` delivers the event; it owned the run at the time of the event. `given_up_at` is the
    time at which the service stopped trying; NULL: the service still tries.
    """

    id = pw.BigAutoField()
    webhook = pw.TextField()
    instance = pw.TextField()
    run = pw.BigIntegerField()
    run_id = pw.TextField()
    engine = pw.TextField()
    sequence = pw.BigIntegerField()
    event = pw.TextField()
    status = pw.TextField()
    error_code = pw.TextField(null=True)
    created_at = pw.BigIntegerField()
    given_up_at = pw.BigIntegerField(null=True)

    class Meta:
        table_name = "webhook_delivery"


class StoreIdentity(pw.Model):
    """One row with the id of the store, which `runs/.store` in each data directory names."""

    id = pw.IntegerField(primary_key=True)
    store_id = pw.TextField()

    class Meta:
        table_name = "store_identity"


EVERY: Final = (
    Run,
    Interaction,
    RunEvent,
    RunLabel,
    RemovedPart,
    RecoveryEvent,
    Reconciliation,
    Quarantine,
    Instance,
    InstanceEpoch,
    ProcessLease,
    EngineUsage,
    ModelUsage,
    TrustEntry,
    RequestReceipt,
    WebhookDelivery,
    StoreIdentity,
)
