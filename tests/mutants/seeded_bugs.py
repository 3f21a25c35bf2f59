"""The seeded bugs: each changes one text of one file of the service, and its tests must catch it.

They are chosen by kind: a guard that is left out, a comparison that is off by one, an order that is
turned round, a scope that is too wide, a fact that is ignored, a state that is not reset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Mutant:
    """One seeded bug.

    Attributes:
        file: below `service/runrecovery_service`.
        old: the text that is replaced. It stands in the file once.
        test: the file or folder with the test that must fail.
    """

    name: str
    file: str
    old: str
    new: str
    test: str


MUTANTS: Final = (
    Mutant(
        name="cancel-does-not-win",
        file="domain/recovery_matrix.py",
        old="needs=Fact.CANCEL,",
        new="needs=Fact.CANCEL | Fact.PENDING,",
        test="tests/domain/test_recovery_matrix.py",
    ),
    Mutant(
        name="undelivered-reply-dropped-to-start-over",
        file="domain/recovery_matrix.py",
        old="needs=Fact.REPLY | Fact.HANDLE,",
        new="needs=Fact.REPLY | Fact.HANDLE, lacks=Fact.REQUEUE,",
        test="tests/domain/test_recovery_matrix.py",
    ),
    Mutant(
        name="ended-run-starts-again",
        file="domain/transitions.py",
        old="RunStatus.SUCCEEDED: frozenset[RunStatus](),",
        new="RunStatus.SUCCEEDED: frozenset({RunStatus.RUNNING}),",
        test="tests/domain/test_transitions.py",
    ),
    Mutant(
        name="second-resume-waits-twice-as-long",
        file="domain/resume_backoff.py",
        old="2.0 ** min(resumes - 1, 10)",
        new="2.0 ** min(resumes, 10)",
        test="tests/storage/test_resume.py",
    ),
    Mutant(
        name="unknown-session-counts-as-lost",
        file="domain/session_check.py",
        old="LOST: Final = frozenset({SessionVerdict.INVALID, SessionVerdict.UNKNOWN_REFUSED})",
        new="LOST: Final = frozenset(SessionVerdict) - {SessionVerdict.VALID}",
        test="tests/engines/test_catalog.py",
    ),
    Mutant(
        name="budget-exceeded-by-one-turn",
        file="domain/usage.py",
        old="used.total_tokens >= self.max_tokens",
        new="used.total_tokens > self.max_tokens",
        test="tests/domain/test_usage.py",
    ),
    Mutant(
        name="output-tokens-do-not-count",
        file="domain/usage.py",
        old="return self.input_tokens + self.output_tokens",
        new="return self.input_tokens",
        test="tests/domain/test_usage.py",
    ),
    Mutant(
        name="role-too-wide",
        file="rpc/method_roles.py",
        old='CancelRun": Role.REPLIER',
        new='CancelRun": Role.VIEWER',
        test="tests/service/test_callers.py",
    ),
    Mutant(
        name="stale-version-overwritten",
        file="storage/runs.py",
        old='AND status = ? AND version = ?"',
        new='AND status = ? AND version >= ?"',
        test="tests/storage/test_runs.py",
    ),
    Mutant(
        name="run-of-newer-epoch-overwritten",
        file="storage/runs.py",
        old="AND owner_epoch = ? AND status",
        new="AND owner_epoch >= ? AND status",
        test="tests/storage/test_calls_through_peers.py",
    ),
    Mutant(
        name="etag-ignored",
        file="storage/runs.py",
        old="if etag and etag != run.etag:",
        new='if etag == "":',
        test="tests/storage/test_runs.py",
    ),
    Mutant(
        name="cancel-of-a-living-process-ends-the-run-at-once",
        file="storage/runs.py",
        old="has_process = run.holds_slot",
        new="has_process = False",
        test="tests/storage/test_runs.py",
    ),
    Mutant(
        name="receipts-shared-by-callers",
        file="storage/requests.py",
        old="return self.request_id if self.caller is None else f",
        new="return self.request_id if self.caller is None or self.caller else f",
        test="tests/storage/test_runs.py",
    ),
    Mutant(
        name="reused-request-id-with-another-payload",
        file="storage/requests.py",
        old="if (method, fingerprint) != (receipt.method, receipt.fingerprint.hex()):",
        new="if method != receipt.method:",
        test="tests/storage/test_runs.py",
    ),
    Mutant(
        name="new-process-beside-an-unkillable-one",
        file="storage/queue_order.py",
        old="l.state = 'KILL_PENDING'",
        new="l.state = 'KILLED'",
        test="tests/storage/test_launch_records.py",
    ),
    Mutant(
        name="last-in-first-out",
        file="storage/queue_order.py",
        old='" ORDER BY queued_at, id LIMIT 1"',
        new='" ORDER BY queued_at DESC, id LIMIT 1"',
        test="tests/storage/test_turns.py",
    ),
    Mutant(
        name="attempt-not-given-back",
        file="storage/turn_starts.py",
        old='{"attempt": run.attempt - 1, "turn": 0}',
        new='{"turn": 0}',
        test="tests/storage/test_lost_commits.py",
    ),
    Mutant(
        name="unknown-sequence-answered",
        file="storage/events.py",
        old="if after > last:",
        new="if after > last + 1:",
        test="tests/storage/test_events.py",
    ),
    Mutant(
        name="page-skips-a-row",
        file="storage/use_case.py",
        old="after=key(page[-1]))",
        new="after=key(row))",
        test="tests/storage/test_runs.py",
    ),
    Mutant(
        name="second-reply-accepted",
        file="storage/interactions.py",
        old="if to_json(asked.response) != to_json(response):",
        new="if asked.response is None:",
        test="tests/storage/test_interactions.py",
    ),
    Mutant(
        name="reply-to-a-future-question",
        file="storage/interactions.py",
        old="if run.pending.interaction_id != interaction_id:",
        new="if run.pending.interaction_id > interaction_id:",
        test="tests/storage/test_interactions.py",
    ),
    Mutant(
        name="reply-after-a-cancel",
        file="storage/interactions.py",
        old="or run.pending is None or run.cancel_requested:",
        new="or run.pending is None:",
        test="tests/storage/test_interactions.py",
    ),
    Mutant(
        name="commits-not-synced",
        file="storage/sqlite_file.py",
        old='"synchronous": 2,',
        new='"synchronous": 1,',
        test="tests/storage/test_opening.py",
    ),
    Mutant(
        name="lost-renewal-unnoticed",
        file="storage/instances.py",
        old="AND lease_until >= ?",
        new="AND lease_until <> ?",
        test="tests/storage/test_commit_history.py",
    ),
    Mutant(
        name="decided-for-the-user-who-must-reply",
        file="storage/passed_deadlines.py",
        old="if not run.require_user_reply and run.pending is not None:",
        new="if run.pending is not None:",
        test="tests/storage/test_deadlines.py",
    ),
    Mutant(
        name="pause-before-resume-unlimited",
        file="storage/passed_deadlines.py",
        old="AND {which} AND resume_due_us > ?",
        new="AND {which} AND resume_due_us < ?",
        test="tests/storage/test_resume.py",
    ),
    Mutant(
        name="reopenable-run-removed",
        file="storage/retention.py",
        old='" AND r.reopen_due_us IS NULL AND r.ended_at <= ?"',
        new='" AND r.ended_at <= ?"',
        test="tests/storage/test_retention.py",
    ),
    Mutant(
        name="run-with-trust-entry-removed",
        file="storage/retention.py",
        old='" AND NOT EXISTS (SELECT 1 FROM trust_entry t WHERE t.run = r.id)"',
        new='""',
        test="tests/storage/test_retention.py",
    ),
    Mutant(
        name="webhooks-out-of-order",
        file="storage/webhook_deliveries.py",
        old='ORDER BY sequence LIMIT 1",\n        (run_key',
        new='ORDER BY sequence DESC LIMIT 1",\n        (run_key',
        test="tests/storage/test_webhook_deliveries.py",
    ),
    Mutant(
        name="redirect-counts-as-delivered",
        file="webhooks/sender.py",
        old="if 200 <= answer.status < 300:",
        new="if 200 <= answer.status < 400:",
        test="tests/webhooks",
    ),
    Mutant(
        name="signature-without-timestamp",
        file="webhooks/signature.py",
        old='f"{message_id}.{timestamp}.".encode()',
        new='f"{message_id}.".encode()',
        test="tests/webhooks",
    ),
    Mutant(
        name="webhook-to-a-private-address",
        file="webhooks/address_policy.py",
        old="return address.is_global and not any",
        new="return not any",
        test="tests/webhooks",
    ),
    Mutant(
        name="living-replica-taken-over",
        file="storage/dead_instances.py",
        old="i.lease_until <= {now} AND COALESCE",
        new="i.lease_until > 0 AND COALESCE",
        test="tests/replicas/test_takeover.py",
    ),
    Mutant(
        name="takeover-does-not-fence",
        file="storage/takeover.py",
        old="SET epoch = i.epoch + 1, boot_token = ?, taken",
        new="SET epoch = i.epoch, boot_token = ?, taken",
        test="tests/replicas/test_takeover.py",
    ),
    Mutant(
        name="paused-run-taken-by-a-peer",
        file="storage/work_stealing.py",
        old="r.owner_epoch = i.epoch AND r.resume_due_us IS NULL",
        new="r.owner_epoch = i.epoch",
        test="tests/replicas/test_sharing.py",
    ),
    Mutant(
        name="run-with-living-process-handed-over",
        file="storage/movable_runs.py",
        old="WHERE l.run = r.id AND l.state <> 'CLOSED')",
        new="WHERE l.run = r.id AND l.state = 'NONE')",
        test="tests/replicas/test_sharing.py",
    ),
    Mutant(
        name="one-process-too-many",
        file="execution/dispatcher.py",
        old="self.slots_in_use < self.capacity",
        new="self.slots_in_use <= self.capacity",
        test="tests/execution/test_dispatch.py",
    ),
    Mutant(
        name="engine-limit-exceeded",
        file="execution/dispatcher.py",
        old="if count >= limits.get(name",
        new="if count > limits.get(name",
        test="tests/service/test_slots.py",
    ),
    Mutant(
        name="last-output-missed",
        file="execution/turn_state.py",
        old="self.exited is not None and not self.open_outputs",
        new="self.exited is not None",
        test="tests/execution/test_turn_state.py",
    ),
    Mutant(
        name="signal-without-proof",
        file="process/signals.py",
        old="outcome = UNPROVED if proof is None else _send(pidfd, number)",
        new="outcome = _send(pidfd, number)",
        test="tests/process/test_sweep_spares.py",
    ),
    Mutant(
        name="shim-outlives-its-service",
        file="process/shim.py",
        old="                return wire.SERVICE_GONE",
        new='                return ""',
        test="tests/process/test_shim.py",
    ),
    Mutant(
        name="shim-ignores-the-deadline",
        file="process/shim.py",
        old="> self._deadline_ns\n",
        new="> self._deadline_ns + 10**18\n",
        test="tests/process/test_shim.py",
    ),
    Mutant(
        name="agent-starts-before-it-is-recorded",
        file="process/shim.py",
        old="            if self._is_released:\n",
        new="            if True:\n",
        test="tests/process/test_shim.py",
    ),
    Mutant(
        name="exit-of-another-shim-believed",
        file="process/shim_journal.py",
        old='return entry if (entry["by"], entry["by_start_ticks"]) == shim else None',
        new="return entry",
        test="tests/process/test_shim_journal.py",
    ),
    Mutant(
        name="processes-of-an-earlier-boot-signalled",
        file="process/tree_ending.py",
        old="if launch.host.boot_id == here.boot_id:",
        new="if launch.host.host_id == here.host_id:",
        test="tests/process/test_sweep_spares.py",
    ),
    Mutant(
        name="reads-during-recovery",
        file="rpc/gate.py",
        old="or access is Access.ALWAYS:\n",
        new="or access is not Access.MUTATION:\n",
        test="tests/rpc/test_gate.py",
    ),
    Mutant(
        name="drained-service-serves-again",
        file="rpc/gate.py",
        old="if state is not self._state and not self.draining:",
        new="if state is not self._state:",
        test="tests/rpc/test_gate.py",
    ),
    Mutant(
        name="runs-of-other-engines-visible",
        file="domain/caller.py",
        old="        if not self.sees(engine):\n            raise RunNotFound(run_id)",
        new="        if not self.name:\n            raise RunNotFound(run_id)",
        test="tests/domain/test_caller.py",
    ),
    Mutant(
        name="page-token-of-another-filter",
        file="rpc/paging.py",
        old="if content[_RANDOM_BYTES:_HEAD_BYTES] != scope.digest:",
        new='if content[_RANDOM_BYTES:_HEAD_BYTES] == b"":',
        test="tests/rpc/test_paging.py",
    ),
    Mutant(
        name="one-call-too-many",
        file="rpc/callers.py",
        old="self._in_progress[caller.name] >= caller.max_calls",
        new="self._in_progress[caller.name] > caller.max_calls",
        test="tests/rpc/test_callers.py",
    ),
    Mutant(
        name="first-of-two-tokens-counts",
        file="rpc/callers.py",
        old="if len(given) > 1:",
        new="if len(given) > 2:",
        test="tests/service/test_callers.py",
    ),
    Mutant(
        name="safe-mode-one-start-late",
        file="recovery/safe_mode.py",
        old="owner, since) >= after",
        new="owner, since) > after",
        test="tests/crash/test_recovery_matrix.py",
    ),
    Mutant(
        name="open-to-the-network-without-tls",
        file="config/contradictions.py",
        old="if address and not values.is_loopback(address):",
        new="if address and not values:",
        test="tests/config",
    ),
    Mutant(
        name="time-without-zone-is-local",
        file="cli/parameters.py",
        old="at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)",
        new="at.astimezone(UTC)",
        test="tests/cli/test_runs.py",
    ),
    Mutant(
        name="trust-file-not-synced",
        file="trust/files.py",
        old="        os.fsync(descriptor)\n\n\ndef _set_owner",
        new="\n\ndef _set_owner",
        test="tests/trust/test_edit_preserves.py",
    ),
    Mutant(
        name="truncated-output-not-said",
        file="agents/output.py",
        old="if len(data) > room:",
        new="if len(data) > room + 1:",
        test="tests/unit/test_output_files.py",
    ),
    Mutant(
        name="outage-of-the-lease-never-ends",
        file="lease_renewal.py",
        old="        self.unrenewed.clear()\n",
        new="",
        test="tests/unit/test_lease_renewal.py",
    ),
    Mutant(
        name="planned-stop-not-noted",
        file="ownership.py",
        old="await self.lease.note.keep_stop(stopped_us)",
        new="self.lease.note.keep(stopped_us)",
        test="tests/unit/test_renewal_note.py",
    ),
    Mutant(
        name="loss-reported-at-every-start",
        file="lifecycle.py",
        old="        forget_loss(self.settings.data_dir)\n",
        new="",
        test="tests/unit/test_lifecycle.py",
    ),
    Mutant(
        name="pause-of-an-earlier-step-kept",
        file="periodic.py",
        old="                pause_s = None\n",
        new="",
        test="tests/unit/test_periodic.py",
    ),
    Mutant(
        name="request-during-a-try-forgotten",
        file="webhooks/sender.py",
        old="asked_s = await self._try(delivery)\n",
        new="asked_s = await self._try(delivery)\n                at_once = self._at_once\n",
        test="tests/webhooks/test_sender.py",
    ),
    Mutant(
        name="folder-left-open",
        file="retention/files.py",
        old="self._move(name, folder, key)\n            finally:\n                os.close(folder)",
        new="self._move(name, folder, key)\n            finally:\n                pass",
        test="tests/retention/test_files.py",
    ),
    Mutant(
        name="doubt-never-ends",
        file="storage/changes.py",
        old="self._run_keys, self._in_doubt = set(), False",
        new="self._run_keys = set()",
        test="tests/storage/test_change_feed.py",
    ),
    Mutant(
        name="refused-run-not-counted",
        file="storage/recovery_apply.py",
        old="        on_commit(tally)\n        return tally\n    tally = Tally()",
        new="        return tally\n    tally = Tally()",
        test="tests/storage/test_planned_stop.py",
    ),
    Mutant(
        name="call-counted-twice-over-http",
        file="rpc/callers.py",
        old="self._demand_room(caller, counts=False)",
        new="self._demand_room(caller, counts=True)",
        test="tests/rpc/test_callers.py",
    ),
    Mutant(
        name="cancel-swallowed-by-a-change",
        file="rpc/gate.py",
        old="        await wait_within(change, timeout_s)\n",
        new="""        try:
            await asyncio.wait_for(change.wait(), timeout_s)
        except TimeoutError:
            return
""",
        test="tests/rpc/test_gate.py",
    ),
    Mutant(
        name="refusal-not-forgotten-after-success",
        file="rpc/certificate_reload.py",
        old='self._found, self._refused = found, ""',
        new="self._found = found",
        test="tests/rpc/test_tls.py",
    ),
    Mutant(
        name="place-of-a-failed-handshake-not-released",
        file="http/server.py",
        old="            self._table.leave()\n",
        new="",
        test="tests/over_http/test_server.py",
    ),
    Mutant(
        name="header-for-caches-dropped",
        file="http/origins.py",
        old='            return ((b"vary", b"origin"),)\n',
        new="            return ()\n",
        test="tests/over_http/test_origins.py",
    ),
    Mutant(
        name="failed-text-kept",
        file="metrics/collector.py",
        old="""            self._until_s = monotonic() + TEXT_KEPT_S
        finally:
""",
        new="""        finally:
            self._until_s = monotonic() + TEXT_KEPT_S
""",
        test="tests/metrics/test_collector.py",
    ),
    Mutant(
        name="descriptor-left-open",
        file="engines/sessions/files.py",
        old="        os.close(descriptor)\n",
        new="        pass\n",
        test="tests/engines/test_session_check_layouts.py",
    ),
    Mutant(
        name="outage-logged-once-for-ever",
        file="systemd.py",
        old="        else:\n            self._failed = False\n",
        new="",
        test="tests/service/test_systemd.py",
    ),
    Mutant(
        name="first-byte-of-a-split-secret-kept",
        file="execution/agent_io.py",
        old="max(self.listener.max_secret_bytes - 1, 0), 0)",
        new="max(self.listener.max_secret_bytes - 2, 0), 0)",
        test="tests/execution/test_split_secrets.py",
    ),
    Mutant(
        name="name-of-a-file-not-synced",
        file="storage/durable_files.py",
        old="    sync_directory(path.parent)\n",
        new="",
        test="tests/unit/test_durable_files.py",
    ),
    Mutant(
        name="task-outlives-its-sender",
        file="webhooks/sender.py",
        old="        await self._tidying.cancel()\n",
        new="",
        test="tests/webhooks/test_sender.py",
    ),
    Mutant(
        name="session-checks-of-old-engines-kept",
        file="setup/reload.py",
        old="            sessions.replace_checks(checks)\n",
        new="",
        test="tests/unit/test_reload.py",
    ),
)
